"""What the commands print: lines, tables, CSV and JSON, with nothing in them that a terminal or spreadsheet obeys."""

import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    import pandas as pd

FORMULA = ("=", "+", "-", "@")  # what a cell begins with that a spreadsheet computes


def say(*lines: str) -> None:
    """Prints lines, each of which stays one line whatever is in it."""
    for line in lines:
        print(safe(line))


def safe(text: str) -> str:
    """Text as one line without control characters, which are written as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


def say_json(value: Any) -> None:
    """Prints plain values as JSON."""
    print(json.dumps(value, indent=1, default=str))


def write(table: "pd.DataFrame", as_csv: bool, as_json: bool, summary: Callable[[], Iterable[str]]) -> None:
    """Prints a table as CSV or as JSON, or a summary of it."""
    if as_csv:
        sys.stdout.write(_cells_as_text(table).to_csv(index=False))
    elif as_json:
        print(table.to_json(orient="records", indent=1))
    else:
        say(*summary())


def lines_of(table: "pd.DataFrame", digits: str = ".4g") -> list[str]:
    """A table as lines of text."""
    text = table.rename(columns=lambda name: safe(str(name))).map(lambda v: safe(v) if isinstance(v, str) else v)
    return text.to_string(index=False, float_format=lambda value: f"{value:{digits}}").splitlines()


def one_format(as_csv: bool, as_json: bool) -> None:
    """Raises a usage error where an answer is wanted in two forms at once."""
    if as_csv and as_json:
        raise typer.BadParameter("--csv and --json exclude each other")


def ends_in(path: Path, endings: tuple[str, ...], option: str) -> None:
    """Raises a usage error unless the file's name ends in one of these."""
    if path.suffix.lower() not in endings:
        raise typer.BadParameter(f"{option}: expected a file that ends in {', '.join(endings)}, found {path}")


def _cells_as_text(table: "pd.DataFrame") -> "pd.DataFrame":
    return table.rename(columns=lambda name: cell(str(name))).map(lambda v: cell(v) if isinstance(v, str) else v)


def cell(text: str) -> str:
    """Text for a cell of a CSV file; an apostrophe stands before what a spreadsheet would take for a formula."""
    return f"'{safe(text)}" if text.startswith(FORMULA) else safe(text)


def cell_text(cell: str) -> str:
    """The inverse of `cell`, for text without control characters."""
    return cell[1:] if cell.startswith("'") and cell[1:].startswith(FORMULA) else cell
