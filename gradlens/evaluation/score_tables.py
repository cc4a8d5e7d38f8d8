"""Tables of scores: their columns, their groups, and the rows that are judged."""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import pandas as pd

from gradlens.errors import InputError


def demand(scores: pd.DataFrame, columns: Sequence[str]) -> None:
    """Raises InputError if the scores lack a column."""
    if missing := [name for name in columns if name not in scores.columns]:
        raise InputError(f"scores need the column {missing[0]!r}, found {', '.join(map(str, scores.columns))}")


def judged(scores: pd.DataFrame) -> pd.DataFrame:
    """Drops updates that are neither malicious nor benign: those that a compromised client did not poison."""
    if "compromised" not in scores:
        return scores
    idle = scores["compromised"].astype(bool) & ~scores["malicious"].astype(bool)
    return scores[~idle].reset_index(drop=True)


def groups(scores: pd.DataFrame, keys: list[str]) -> Iterator[tuple[Mapping[str, object], pd.DataFrame]]:
    """Yields each combination of values of the keys, in order of appearance, with its rows."""
    for key, group in scores.groupby(keys, sort=False, dropna=False, observed=True):
        yield dict(zip(keys, key, strict=True)), group


def numbered(scores: pd.DataFrame, keys: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Returns the number of each row's group, in order of appearance, and the position of each group's first row."""
    ids = scores.groupby(keys, sort=False, dropna=False, observed=True).ngroup().to_numpy()
    return ids, np.unique(ids, return_index=True)[1]
