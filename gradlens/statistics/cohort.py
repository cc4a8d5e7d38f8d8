"""What every statistic starts from and ends with: a cohort that can be compared, and a table [client, feature]."""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, cast

import numpy as np
import pandas as pd

from gradlens.errors import CannotSay
from gradlens.log import Round, UpdateLog

Statistic = Callable[[UpdateLog], pd.DataFrame]  # index client, columns features; raises CannotSay

ROUNDING = 1e-12  # of a squared norm, what is left of 0 after sums of products
SMALLEST = 3  # comparable clients; among two, neither is the odd one out


def cohort(log: UpdateLog) -> Round:
    """The last round; raises CannotSay where it has too few clients to compare."""
    round_ = log[-1]
    found = int(round_.comparable.sum())
    if found < SMALLEST:
        raise CannotSay(f"round {round_.index} has {found} comparable clients, at least {SMALLEST} are needed")
    return round_


def table(round_: Round, columns: Sequence[str], values: np.ndarray) -> pd.DataFrame:
    """A statistic's answer: values [client, feature] under these column names, NaN where a client is not comparable."""
    values = np.where(round_.comparable[:, None], values, np.nan)
    clients = _index(tuple(round_.clients.tolist())).rename("client")
    return pd.DataFrame(values, index=clients, columns=_index(tuple(columns)).view())


@lru_cache(maxsize=256)
def _index(names: tuple[str, ...]) -> pd.Index:
    """The labels of a table's rows or columns: making them takes longer than most statistics."""
    return pd.Index(names, dtype=cast(Any, object))


def units(layer: str, count: int) -> list[str]:
    """Column names of the units of a layer, "fc2.bias[0]", ..."""
    return [f"{layer}[{unit}]" for unit in range(count)]


def deviations(round_: Round, layer: str) -> np.ndarray:
    """Updates minus the cohort's coordinate-wise median, float64 [client, number]."""
    with np.errstate(all="ignore"):  # in the rows that become NaN
        return round_.flat(layer, sketch=True).astype(np.float64) - round_.median[layer].reshape(-1)
