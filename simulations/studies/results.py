"""Where studies write, how rows are added to a table as they are computed, and tables in Markdown."""

from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import pandas as pd
from tqdm import tqdm

from gradlens.errors import InputError
from gradlens.evaluation import mean_interval
from gradlens.plots import percent
from gradlens.words import with_interval

ROOT = Path(__file__).resolve().parents[2]
REPORTS = ROOT / "reports"


class Finding(NamedTuple):
    """A figure of a paper, and what came of it here.

    Parameters
    ----------
    claim : str
        What is measured.
    paper : str
        The paper's figure, or an en dash where it has none.
    ours : str
        The same, measured here, with its interval over seeds.
    deviation : str
        What differs from the paper's experiment; "" where nothing is known to.
    """

    claim: str
    paper: str
    ours: str
    deviation: str = ""


Part = tuple[tuple[object, ...], Callable[[], pd.DataFrame]]  # its values in the key columns, what computes its rows


def run_as_command(main: Callable[[], None]) -> None:
    """Runs a study; an `InputError` becomes one line and exit status 1."""
    try:
        main()
    except InputError as error:
        raise SystemExit(f"error: {error}") from None


def collected(
    path: Path,
    keys: Sequence[str],
    parts: Sequence[Part],
    *,
    resume: bool = False,
    float_format: str | None = None,
    progress: str = "parts",
) -> pd.DataFrame:
    """Writes the rows of each part of a study as soon as they are computed.

    Parameters
    ----------
    path : Path
        The table, in CSV.
    keys : sequence of str
        The columns whose values tell parts apart.
    parts : sequence of (values of the key columns, function that computes the rows)
        In the order in which they are written.
    resume : bool
        Keep the rows that are there, and skip the parts that they belong to; by default a new table is begun.
    float_format : str, optional
        Of real numbers, such as "%.4f".
    progress : str
        What the bar counts.

    Returns
    -------
    DataFrame
        The whole table, as read from the file.
    """
    done = set(pd.read_csv(path)[list(keys)].itertuples(index=False, name=None)) if resume and path.exists() else set()
    begun = bool(done)
    for key, rows in tqdm(parts, desc=progress, disable=None):
        if key not in done:
            append(rows(), path, new=not begun, float_format=float_format)
            begun = True
    return pd.read_csv(path)


def append(rows: pd.DataFrame, path: Path, *, new: bool = False, float_format: str | None = None) -> None:
    """Adds rows to a table on disk; new: replaces it instead."""
    new = new or not path.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    mode = "w" if new else "a"
    rows.to_csv(path, mode=mode, header=new, index=False, lineterminator="\n", float_format=float_format)


def over_seeds(rows: pd.DataFrame, column: str, least: float = 0, most: float = 1) -> str:
    """The mean of a column with its interval over seeds; an en dash without rows.

    Parameters
    ----------
    rows : DataFrame
        With a column seed.
    column : str
        What is averaged, first over each seed.
    least, most : float
        The range of the figure.
    """
    seeds = rows.groupby("seed")[column].mean()
    return with_interval(float(seeds.mean()), *mean_interval(seeds, least, most)) if len(seeds) else "–"


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    return "\n".join("| " + " | ".join(row) + " |" for row in [columns, ["---"] * len(columns), *rows])


def share(value: float) -> str:
    """A share in per cent, an en dash for none."""
    return "–" if np.isnan(value) else percent(value)


def value_at(table: pd.DataFrame, row: Hashable, column: Hashable) -> float:
    """The number in one place of a table; NaN where there is no such row or column."""
    if row not in table.index or column not in table.columns:
        return np.nan
    return float(cast(Any, table.loc)[row, column])


def figures_by(table: pd.DataFrame, keys: Sequence[str], value: str) -> dict[tuple[Any, ...], float]:
    """Values of the key columns -> the mean of a column over the rows that have them, in order of appearance."""
    means = table.groupby(list(keys), sort=False)[value].mean()
    return {key if isinstance(key, tuple) else (key,): float(mean) for key, mean in means.items()}
