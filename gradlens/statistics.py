"""Statistics: what of a log's last round is measured, a table [client, feature].

A feature is named after its layer, "fc1.weight", or after one unit of it, "fc2.bias[2]". Rows of clients that
are not comparable (`Round.comparable`) are NaN, and no reference rests on them.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, cast

import numpy as np
import pandas as pd

from gradlens.log import CannotSay, Round, UpdateLog

__all__ = [
    "STATISTICS",
    "CannotSay",
    "Statistic",
    "accumulated_norms",
    "final_bias",
    "final_rows",
    "layer_cosines",
    "layer_norms",
]

Statistic = Callable[[UpdateLog], pd.DataFrame]  # index client, columns features; raises CannotSay

SMALLEST = 3  # comparable clients; among two, neither is the odd one out


def final_bias(log: UpdateLog) -> pd.DataFrame:
    """Each client's final-layer bias update in the last round, minus the cohort's median.

    Under softmax cross-entropy and plain SGD the bias of class c moves by learning rate x sum over steps of
    mean(y_c - p_c): a client with more labels c than the model predicts moves it up. It measures label conflict,
    so a label-skewed benign client moves it too.
    Returns: float64 [client, class] in logits, a column per class, "fc2.bias[c]".
    Raises: CannotSay below 3 comparable clients, or if the model has no final bias.
    Source: Bilgin 2021, arXiv:2111.14683; the identity is Jebreel et al. 2022, arXiv:2207.01982, eq. (1).
    """
    round_ = _cohort(log)
    layer = log.model.final_bias
    if layer is None:
        raise CannotSay("the model has no final bias; final_rows looks at the final weight instead")
    return _table(round_, _units(layer, log.model[layer].size), _deviations(round_, layer))


def final_rows(log: UpdateLog) -> pd.DataFrame:
    """How far each class's row of the final weight strays from the cohort's median row in the last round.

    Returns: float64 [client, class], L2 norms in units of the weight, a column per class, "fc2.weight[c]".
    Raises: CannotSay below 3 comparable clients, or if the model has no final weight.
    """
    round_ = _cohort(log)
    layer = log.model.final_weight
    if layer is None:
        raise CannotSay("the model has no final weight (a layer of two or more dimensions)")
    classes = log.model[layer].shape[0]
    rows = _deviations(round_, layer).reshape(len(round_), classes, -1)
    with np.errstate(all="ignore"):  # in the rows that become NaN
        return _table(round_, _units(layer, classes), np.sqrt(np.einsum("kci,kci->kc", rows, rows)))


def layer_norms(log: UpdateLog) -> pd.DataFrame:
    """L2 norm of each client's update in the last round, layer by layer.

    Returns: float64 [client, layer], in units of the weights. Raises: CannotSay below 3 comparable clients.
    """
    round_ = _cohort(log)
    return _table(round_, log.model.parameters, np.stack([round_.norms[n] for n in log.model.parameters], axis=1))


def layer_cosines(log: UpdateLog) -> pd.DataFrame:
    """Cosine of each client's update to the coordinate-wise median of the cohort's, layer by layer.

    Returns: float64 [client, layer], from -1 to 1; 0 where either norm is 0.
    Raises: CannotSay below 3 comparable clients.
    """
    round_ = _cohort(log)
    cosines = [_cosines(round_, name) for name in log.model.parameters]
    return _table(round_, log.model.parameters, np.stack(cosines, axis=1))


def accumulated_norms(log: UpdateLog) -> pd.DataFrame:
    """L2 norm of what each client of the last round has added up to so far, layer by layer.

    The norm of the sum of its residuals (`Accumulated`), divided by the root of the rounds it took part in: the
    noise of local training keeps this constant, a systematic pull lets it grow with that root.
    Returns: float64 [client, layer], in units of the weights.
    Raises: CannotSay below 3 comparable clients, or before half of them have taken part twice: until then nothing
    has added up.
    """
    round_ = _cohort(log)
    accumulated = log.accumulated
    rows = accumulated.of(round_.clients)
    rounds = np.maximum(accumulated.rounds[rows], 1)  # 0 for those that never sent a finite update
    if np.median(rounds[round_.comparable]) < 2:
        raise CannotSay(f"by round {round_.index} most of its clients have taken part once, twice is needed")
    sums = [accumulated.sums[name][rows] for name in log.model.parameters]
    norms = [np.sqrt(np.einsum("ki,ki->k", s, s, dtype=np.float64) / rounds) for s in sums]
    return _table(round_, log.model.parameters, np.stack(norms, axis=1))


STATISTICS: Mapping[str, Statistic] = {
    "final_bias": final_bias,
    "final_rows": final_rows,
    "layer_norms": layer_norms,
    "layer_cosines": layer_cosines,
    "accumulated_norms": accumulated_norms,
}


def _cohort(log: UpdateLog) -> Round:
    """The last round; raises CannotSay where it has too few clients to compare."""
    round_ = log[-1]
    found = int(round_.comparable.sum())
    if found < SMALLEST:
        raise CannotSay(f"round {round_.index} has {found} comparable clients, at least {SMALLEST} are needed")
    return round_


def _table(round_: Round, columns: Sequence[str], values: np.ndarray) -> pd.DataFrame:
    values = np.where(round_.comparable[:, None], values, np.nan)
    clients = _index(tuple(round_.clients.tolist())).rename("client")
    return pd.DataFrame(values, index=clients, columns=_index(tuple(columns)).view())


@lru_cache(maxsize=256)
def _index(names: tuple[str, ...]) -> pd.Index:
    """The labels of a table's rows or columns: making them takes longer than most statistics."""
    return pd.Index(names, dtype=cast(Any, object))


def _units(layer: str, count: int) -> list[str]:
    return [f"{layer}[{unit}]" for unit in range(count)]


def _deviations(round_: Round, layer: str) -> np.ndarray:
    """Updates minus the cohort's coordinate-wise median, float64 [client, number]."""
    with np.errstate(all="ignore"):  # in the rows that become NaN
        return round_.flat(layer).astype(np.float64) - round_.median[layer].reshape(-1)


def _cosines(round_: Round, layer: str) -> np.ndarray:
    median = round_.median[layer].reshape(-1).astype(np.float64)
    dots, start = np.zeros(len(round_)), 0
    with np.errstate(all="ignore"):  # in the rows that become NaN
        for block in round_.blocks(layer):
            dots += block.astype(np.float64) @ median[start : start + block.shape[1]]
            start += block.shape[1]
        norms = round_.norms[layer] * np.sqrt(median @ median)
        return np.divide(dots, norms, out=np.zeros_like(dots), where=norms > 0)
