"""Measures how unusual every update is in its round, for each statistic: |robust z| among the comparable clients."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from gradlens.errors import CannotSay
from gradlens.log import UpdateLog
from gradlens.scorers import robustly_scaled
from gradlens.statistics import STATISTICS, Statistic

# statistics whose columns are layers or units; listed by name, so that new statistics do not change the selection
LOCATED_BY: Mapping[str, Statistic] = {
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
    """How unusual every update of a log is in its round, by one statistic.

    Parameters
    ----------
    rounds : numpy.ndarray
        int64 [update], the round of each update.
    clients : numpy.ndarray
        str [update], who sent it.
    features : tuple of (str, str)
        Pairs (layer, unit), one per feature. Unit "" is the layer as a whole, scored as its most unusual unit.
    scores : numpy.ndarray
        float64 [update, feature], |robust z| in robust sigmas, +inf for an update that is not comparable.

    Examples
    --------
    >>> from gradlens.examples import example_log
    >>> seen = unusual(example_log())["layer_norms"]
    >>> seen.features
    (('fc1.weight', ''), ('fc1.bias', ''), ('fc2.weight', ''), ('fc2.bias', ''))
    >>> seen.scores.shape
    (40, 4)
    """

    rounds: np.ndarray
    clients: np.ndarray
    features: tuple[tuple[str, str], ...]
    scores: np.ndarray


def unusual(
    log: UpdateLog, statistics: Mapping[str, Statistic] = LOCATED_BY, rounds: Collection[int] | None = None
) -> dict[str, Unusual]:
    """Measures how unusual every update of a log is in its round, by each statistic.

    Parameters
    ----------
    log : UpdateLog
        What the server saw.
    statistics : Mapping
        Name -> statistic whose columns are layers or units.
    rounds : collection of int, optional
        The rounds to measure; None takes all.

    Returns
    -------
    dict
        Name -> `Unusual`, without statistics that abstain in every round.

    Examples
    --------
    >>> from gradlens.examples import example_log
    >>> seen = unusual(example_log(), rounds=[3])["final_bias"]
    >>> seen.clients[seen.scores[:, 0].argmax()].item()
    'client-9'
    """
    tables: dict[str, list[tuple[int, pd.DataFrame]]] = {name: [] for name in statistics}
    for prefix in log.prefixes():
        if rounds is not None and prefix.last_index not in rounds:
            continue
        for name, statistic in statistics.items():
            try:
                tables[name].append((prefix.last_index, prefix.remembered(statistic)))
            except CannotSay:
                continue
    return {name: _unusual(of_rounds) for name, of_rounds in tables.items() if of_rounds}


def _unusual(tables: list[tuple[int, pd.DataFrame]]) -> Unusual:
    """Scores the tables of one statistic, pairs (round, [client, column]); layers come first, then units."""
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
    """Splits the name of a column: "fc2.bias[3]" -> ("fc2.bias", "3"), "fc1.weight" -> ("fc1.weight", "")."""
    if not column.endswith("]"):
        return column, ""
    layer, _, unit = column[:-1].rpartition("[")
    return layer, unit


def _sizes(rounds: Sequence[np.ndarray]) -> np.ndarray:
    """Computes |robust z| of each feature within its round, from tables [client, feature] to [update, feature].

    A row with a value that is not finite is not comparable: it is +inf throughout and takes no part in the reference.
    Rounds with equally many comparable clients are scaled together.
    """
    x = np.concatenate(rounds)
    finite = np.isfinite(x).all(axis=1)
    index = np.repeat(np.arange(len(rounds)), [len(table) for table in rounds])
    counts = np.bincount(index[finite], minlength=len(rounds))
    sizes = np.full(x.shape, np.inf)
    for count in set(counts.tolist()) - {0}:
        rows = np.flatnonzero(finite & (counts[index] == count))
        stacked = x[rows].reshape(-1, count, x.shape[1])  # [round, client, feature]
        sizes[rows] = np.abs(robustly_scaled(stacked)).reshape(len(rows), -1)
    return sizes
