"""The start and end of every statistic: a cohort that can be compared, and a table [client, feature]."""

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, cast

import numpy as np
import pandas as pd

from gradlens.errors import CannotSay
from gradlens.log import Round, UpdateLog

Statistic = Callable[[UpdateLog], pd.DataFrame]  # index client, columns features; raises CannotSay

SMALLEST = 3  # comparable clients; of two, neither is the odd one out


def cohort(log: UpdateLog) -> Round:
    """Returns the last round; raises CannotSay where fewer than three of its clients can be compared."""
    round_ = log[-1]
    count = int(round_.comparable.sum())
    if count < SMALLEST:
        raise CannotSay(f"round {round_.index} has {count} comparable clients, at least {SMALLEST} are needed")
    return round_


def table(round_: Round, columns: Sequence[str], values: np.ndarray) -> pd.DataFrame:
    """Puts values [client, feature] under these column names, with NaN in the rows of clients that are not comparable.

    Parameters
    ----------
    round_ : Round
        Whose clients the rows are.
    columns : sequence of str
        A name per feature.
    values : ndarray, float64 [client, feature]

    Returns
    -------
    DataFrame, float64 [client, feature]
        Its index is called "client".
    """
    values = np.where(round_.comparable[:, None], values, np.nan)
    clients = _index(tuple(round_.clients.tolist())).rename("client")
    return pd.DataFrame(values, index=clients, columns=_index(tuple(columns)).view())


@lru_cache(maxsize=256)
def _index(names: tuple[str, ...]) -> pd.Index:
    """The labels of a table's rows or columns; making them takes longer than most statistics."""
    return pd.Index(names, dtype=cast(Any, object))


def units(layer: str, count: int) -> list[str]:
    """Column names of the units of a layer: "fc2.bias[0]", "fc2.bias[1]", ..."""
    return [f"{layer}[{unit}]" for unit in range(count)]


def deviations(round_: Round, layer: str) -> np.ndarray:
    """Updates of a layer minus the cohort's coordinate-wise median, float64 [client, number]."""
    with np.errstate(all="ignore"):  # in the rows that become NaN
        return round_.flat(layer, sketch=True).astype(np.float64) - round_.median[layer].reshape(-1)


def layer_by_layer(log: UpdateLog, measure: Callable[[Round, str], np.ndarray]) -> pd.DataFrame:
    """The table of a measure (round, layer) -> [comparable client]."""
    round_ = cohort(log)
    values = np.full((len(round_), len(log.model.parameters)), np.nan)
    values[round_.comparable] = np.stack([measure(round_, name) for name in log.model.parameters], axis=1)
    return table(round_, log.model.parameters, values)


def median_products(log: UpdateLog) -> Mapping[str, tuple[np.ndarray, float]]:
    """Layer -> inner products of the cohort's median with the comparable updates, [client], and with itself."""
    round_ = cohort(log)
    return {name: products_with(round_, name, round_.median[name]) for name in log.model.parameters}


def products_with(round_: Round, layer: str, direction: np.ndarray) -> tuple[np.ndarray, float]:
    """Inner products of a direction [*shape] with the comparable updates of a layer, [client], and with itself."""
    direction, rows = np.asarray(direction).reshape(-1), round_.comparable
    dots, square, start = np.zeros(int(rows.sum())), 0.0, 0
    for block in round_.blocks(layer, sketch=True):
        part = direction[start : start + block.shape[1]].astype(np.float64)
        dots += (block if rows.all() else block[rows]).astype(np.float64) @ part
        square += float(part @ part)
        start += block.shape[1]
    return dots, square
