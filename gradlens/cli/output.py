"""Output of the commands: lines, tables, CSV and JSON that no terminal or spreadsheet takes for instructions."""

import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    import pandas as pd

FORMULA = ("=", "+", "-", "@")  # first characters of a cell that a spreadsheet takes for a formula


def say(*lines: str) -> None:
    r"""Prints each text as one line, with control characters escaped.

    Examples
    --------
    >>> say("two", "li\nes")
    two
    li\nes
    """
    for line in lines:
        print(safe(line))


def safe(text: str) -> str:
    r"""Returns the text as one line, with control characters written as escapes.

    Examples
    --------
    >>> print(safe("a\x1b[2Jb"))
    a\x1b[2Jb
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


def say_json(value: Any) -> None:
    """Prints a value as JSON, indented; what JSON does not know is printed as text.

    Examples
    --------
    >>> say_json({"rounds": 3})
    {
     "rounds": 3
    }
    """
    print(json.dumps(value, indent=1, default=str))


def write(table: "pd.DataFrame", as_csv: bool, as_json: bool, summary: Callable[[], Iterable[str]]) -> None:
    """Prints a table as CSV or as JSON, or else a summary of it.

    Parameters
    ----------
    table : pandas.DataFrame
        The table.
    as_csv, as_json : bool
        Which form is wanted.
    summary : callable
        () -> lines of the summary; called only if neither form is wanted.

    Examples
    --------
    >>> import pandas as pd
    >>> write(pd.DataFrame({"client": ["a"], "score": [2.5]}), True, False, lambda: [])
    client,score
    a,2.5
    """
    if as_csv:
        sys.stdout.write(_cells_as_text(table).to_csv(index=False))
    elif as_json:
        print(table.to_json(orient="records", indent=1))
    else:
        say(*summary())


def lines_of(table: "pd.DataFrame", digits: str = ".4g") -> list[str]:
    """Formats a table as lines of text.

    Parameters
    ----------
    table : pandas.DataFrame
        The table.
    digits : str, default ".4g"
        Format of its floats.

    Returns
    -------
    list of str
        A line with the names of the columns, then a line per row.

    Examples
    --------
    >>> import pandas as pd
    >>> lines_of(pd.DataFrame({"client": ["a"], "score": [2.51]}), ".1f")
    ['client  score', '     a    2.5']
    """
    text = table.rename(columns=lambda name: safe(str(name))).map(lambda v: safe(v) if isinstance(v, str) else v)
    return text.to_string(index=False, float_format=lambda value: f"{value:{digits}}").splitlines()


def one_format(as_csv: bool, as_json: bool) -> None:
    """Raises a usage error if both CSV and JSON are wanted."""
    if as_csv and as_json:
        raise typer.BadParameter("--csv and --json exclude each other")


def ends_in(path: Path, endings: tuple[str, ...], option: str) -> None:
    """Raises a usage error unless the file's name has one of these endings, such as ".html"."""
    if path.suffix.lower() not in endings:
        raise typer.BadParameter(f"{option}: expected a file that ends in {', '.join(endings)}, found {path}")


def _cells_as_text(table: "pd.DataFrame") -> "pd.DataFrame":
    return table.rename(columns=lambda name: cell(str(name))).map(lambda v: cell(v) if isinstance(v, str) else v)


def cell(text: str) -> str:
    """Returns text for a cell of a CSV file, with an apostrophe before what a spreadsheet would take for a formula.

    Examples
    --------
    >>> cell("=1+1"), cell("client-1")
    ("'=1+1", 'client-1')
    """
    return f"'{safe(text)}" if text.startswith(FORMULA) else safe(text)


def cell_text(cell: str) -> str:
    """Returns the text that `cell` made a cell of; control characters stay escaped.

    Examples
    --------
    >>> cell_text("'=1+1"), cell_text("client-1")
    ('=1+1', 'client-1')
    """
    return cell[1:] if cell.startswith("'") and cell[1:].startswith(FORMULA) else cell
