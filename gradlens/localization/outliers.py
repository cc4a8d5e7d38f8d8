"""How unusual every update was in its round, by each statistic: |robust z| among that round's comparable clients."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from gradlens.errors import CannotSay
from gradlens.log import UpdateLog
from gradlens.scorers import robustly_scaled
from gradlens.statistics import STATISTICS, Statistic

LOCATED_BY: Mapping[str, Statistic] = {  # those whose columns are layers or units; named, so that they stay the same
    name: STATISTICS[name]
    for name in (
        "final_bias",
        "final_rows",
        "layer_norms",
        "layer_cosines",
        "spectral",
        "accumulated_norms",
        "accumulated_spectral",
    )
    if name in STATISTICS
}


@dataclass(frozen=True, eq=False)
class Unusual:
    """How unusual every update of a log was in its round, by one statistic.

    rounds: int64 [update]; clients: str [update]; features: (layer, unit) [feature], unit "" being the layer as a
    whole, its most unusual unit; scores: float64 [update, feature], |robust z|, +inf where not comparable.
    """

    rounds: np.ndarray
    clients: np.ndarray
    features: tuple[tuple[str, str], ...]
    scores: np.ndarray


def unusual(
    log: UpdateLog, statistics: Mapping[str, Statistic] = LOCATED_BY, rounds: Collection[int] | None = None
) -> dict[str, Unusual]:
    """How unusual every update of a log (of these rounds) was, statistic -> `Unusual`, those that could say."""
    answers: dict[str, list[tuple[int, pd.DataFrame]]] = {name: [] for name in statistics}
    for prefix in log.prefixes():
        if rounds is not None and prefix.last_index not in rounds:
            continue
        for name, statistic in statistics.items():
            try:
                answers[name].append((prefix.last_index, prefix.remembered(statistic)))
            except CannotSay:
                continue
    return {name: _unusual(tables) for name, tables in answers.items() if tables}


def _unusual(tables: list[tuple[int, pd.DataFrame]]) -> Unusual:
    columns = tables[0][1].columns.tolist()
    layers: dict[str, list[int]] = {}
    for position, column in enumerate(columns):
        layers.setdefault(_layer_and_unit(column)[0], []).append(position)
    features: list[tuple[str, str]] = [(layer, "") for layer in layers]
    features += [feature for feature in map(_layer_and_unit, columns) if feature[1]]
    units = [position for position, column in enumerate(columns) if _layer_and_unit(column)[1]]
    scores = _sizes([table.to_numpy(np.float64) for _, table in tables])
    whole = [scores[:, positions].max(axis=1) for positions in layers.values()]
    return Unusual(
        np.repeat([index for index, _ in tables], [len(table) for _, table in tables]),
        np.concatenate([table.index.to_numpy(dtype=np.str_) for _, table in tables]),
        tuple(features),
        np.column_stack([*whole, scores[:, units]]),
    )


def _layer_and_unit(column: str) -> tuple[str, str]:
    """ "fc2.bias[3]" -> ("fc2.bias", "3"); "fc1.weight" -> ("fc1.weight", "")."""
    if not column.endswith("]"):
        return column, ""
    layer, _, unit = column[:-1].rpartition("[")
    return layer, unit


def _sizes(rounds: Sequence[np.ndarray]) -> np.ndarray:
    """|robust z| of each feature within its round, of tables [client, feature] -> [update, feature].

    A row that is not finite is +inf throughout and no reference. Rounds of equally many clients go together.
    """
    x = np.concatenate(rounds)
    finite = np.isfinite(x).all(axis=1)
    index = np.repeat(np.arange(len(rounds)), [len(table) for table in rounds])
    counts = np.bincount(index[finite], minlength=len(rounds))
    sizes = np.full(x.shape, np.inf)
    for count in set(counts.tolist()) - {0}:
        rows = np.flatnonzero(finite & (counts[index] == count))
        together = x[rows].reshape(-1, count, x.shape[1])
        sizes[rows] = np.abs(robustly_scaled(together)).reshape(len(rows), -1)
    return sizes
