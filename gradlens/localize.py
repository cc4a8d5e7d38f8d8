"""Localisation: in which layer, unit and class poisoned updates differ from benign ones, and how surely.

An update's feature counts by how unusual it is in its round: |robust z| among that round's comparable clients.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import rankdata
from tqdm import tqdm

from gradlens.evaluation import bootstrap
from gradlens.log import CannotSay, InputError, UpdateLog
from gradlens.scorers import robustly_scaled
from gradlens.statistics import STATISTICS, Statistic

__all__ = ["Unusual", "localize", "localize_sweep", "unusual"]

COLUMNS = ["layer", "statistic", "unit", "auc", "low", "high", "p", "seeds"]
PHASES = ("first 3 attacked rounds", "later")


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


def localize(
    runs: Any,
    statistics: Mapping[str, Statistic] = STATISTICS,
    rounds: Collection[int] | None = None,
    permutations: int = 999,
    seed: int = 0,
) -> pd.DataFrame:
    """How well each feature by itself tells the poisoned updates of a setting's runs from the benign ones.

    runs: a run, runs, or pairs (log, truth), one per seed. rounds: those looked at; None: the attacked ones, in
    which an update was poisoned. The attack-free control is the same call with the control's log and the attacked
    run's truth: what the attacker's labels give where nobody attacked. Updates of compromised clients that
    were not poisoned in that round are left out.
    Returns: layer, statistic, unit ("" = the layer as a whole, its most unusual unit), auc (updates of a run
    pooled, then the mean over runs), low, high (95 % bootstrap over runs, NaN for one), p, seeds (runs).
      p: of the hypothesis that it makes no difference which clients are malicious, one-sided, by permuting
      that within each run; Holm-corrected over the layers and statistics of this call; NaN for a unit, which is
      described and not tested.
    Raises: InputError if the truth poisons nothing or says nothing of an update, or no statistic can say.
    """
    cases = []
    for log, truth in _pairs(runs):
        chosen = _attacked(truth) if rounds is None else sorted(set(rounds))
        cases.append((unusual(log, statistics, chosen), truth, chosen))
    table = _located(cases, permutations, seed)
    if table.empty:
        raise InputError(
            f"no run has both poisoned and benign updates that a statistic could score ({len(cases)} runs, "
            f"statistics {', '.join(statistics)}); are the truth and the rounds those of these runs?"
        )
    return table


def localize_sweep(
    sweep: Any,
    statistics: Mapping[str, Statistic] = STATISTICS,
    permutations: int = 999,
    seed: int = 0,
    *,
    progress: bool = False,
) -> pd.DataFrame:
    """`localize` under each condition of a sweep, attacked and control, early and late.

    A condition is a combination of the varied settings without the seed; its runs are those of all seeds.
    Returns: the varied settings, control (bool), phase ("first 3 attacked rounds", "later"), then the columns
    of `localize`; control rows use the attacked runs' truth on their controls' logs.
    """
    runs, known = {run.name: run for run in sweep.runs}, {}

    def seen(run: Any) -> Mapping[str, Unusual]:
        if run.name not in known:  # a control serves many attacked runs
            known[run.name] = unusual(run.log, statistics)
        return known[run.name]

    axes = [axis for axis in sweep.axes if axis != "seed"]
    parts = []
    for key, names in tqdm(
        _conditions(sweep.settings, axes), "localize", unit=" conditions", disable=None if progress else True
    ):
        attacked = [(runs[name], runs[name].truth) for name in names]
        for control in (False, True):
            logs = [seen(sweep.control_of(run.name) if control else run) for run, _ in attacked]
            for phase, part in zip(PHASES, (slice(3), slice(3, None)), strict=True):
                cases = [(log, t, _attacked(t)[part]) for log, (_, t) in zip(logs, attacked, strict=True)]
                table = _located(cases, permutations, seed)
                if len(table):
                    parts.append(table.assign(**key, control=control, phase=phase))
    columns = [*axes, "control", "phase", *COLUMNS]
    return pd.concat(parts, ignore_index=True)[columns] if parts else pd.DataFrame(columns=columns)


def unusual(
    log: UpdateLog, statistics: Mapping[str, Statistic] = STATISTICS, rounds: Collection[int] | None = None
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


def _pairs(runs: Any) -> list[tuple[UpdateLog, pd.DataFrame]]:
    several: Iterable[Any] = [runs] if hasattr(runs, "log") else runs
    return [run if isinstance(run, tuple) else (run.log, run.truth) for run in several]


def _attacked(truth: pd.DataFrame) -> list[int]:
    """The rounds in which an update was poisoned, in order."""
    return sorted(set(truth.loc[truth["poisoned"].astype(bool), "round"].tolist()))


def _conditions(settings: pd.DataFrame, axes: Sequence[str]) -> list[tuple[dict[str, Any], list[str]]]:
    """The settings of each condition that is no control, and the names of its runs."""
    attacked = settings[~settings["control"].astype(bool)]
    if not axes:
        return [({}, attacked.index.tolist())] if len(attacked) else []
    groups = attacked.groupby(list(axes), sort=False, dropna=False)
    return [(dict(zip(axes, key, strict=True)), group.index.tolist()) for key, group in groups]


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


Case = tuple[Mapping[str, Unusual], pd.DataFrame, Collection[int]]  # of one run: what was seen, truth, rounds


def _located(cases: Sequence[Case], permutations: int, seed: int) -> pd.DataFrame:
    """The table of `localize`; a statistic without an answer in any run has no row."""
    known = [_labels(truth) for _, truth, _ in cases]
    rows: list[dict[str, Any]] = []
    for name in dict.fromkeys(name for seen, _, _ in cases for name in seen):
        found: list[tuple[np.ndarray, np.ndarray]] = []
        features: tuple[tuple[str, str], ...] = ()
        for i, ((seen, _, rounds), labels) in enumerate(zip(cases, known, strict=True)):
            if name in seen and (aucs := _aucs(seen[name], labels, rounds, permutations, [seed, i])) is not None:
                found.append(aucs)
                features = seen[name].features
        if found:
            rows += _rows(name, features, np.stack([a for a, _ in found]), np.mean([p for _, p in found], axis=0))
    table = pd.DataFrame(rows, columns=COLUMNS)
    tested = (table["unit"] == "").to_numpy()
    table.loc[tested, "p"] = _holm(table.loc[tested, "p"].to_numpy(np.float64))
    return table


def _rows(name: str, features: Sequence[tuple[str, str]], aucs: np.ndarray, permuted: np.ndarray) -> list[dict]:
    """Rows of one statistic: aucs [run, feature]; permuted [permutation, layer], their mean over runs by chance."""
    rows = []
    for j, (layer, unit) in enumerate(features):
        auc, p = float(aucs[:, j].mean()), np.nan
        if not unit:  # the layers come first
            as_good = permuted[:, j] >= auc - 1e-12
            p = (1 + int(as_good.sum())) / (1 + len(as_good))
        low, high = bootstrap(aucs[:, j])
        rows.append(dict(zip(COLUMNS, (layer, name, unit, auc, low, high, p, len(aucs)), strict=True)))
    return rows


def _labels(truth: pd.DataFrame) -> dict[tuple[int, str], int]:
    """(round, client) -> 1 poisoned, 0 benign, -1 not poisoned, but of a client that is compromised in any round."""
    poisoned = truth["poisoned"].to_numpy(bool)
    suspects = truth.loc[truth["compromised"].astype(bool) | poisoned, "client"].unique()
    label = np.where(poisoned, 1, np.where(truth["client"].isin(suspects), -1, 0))
    return dict(zip(zip(truth["round"].tolist(), truth["client"].tolist(), strict=True), label.tolist(), strict=True))


def _aucs(
    seen: Unusual,
    labels: Mapping[tuple[int, str], int],
    rounds: Collection[int],
    permutations: int,
    address: list[int],
) -> tuple[np.ndarray, np.ndarray] | None:
    """AUC of each feature [feature], and of each layer with other clients called malicious [permutation, layer].

    None where a run has no poisoned or no benign update in these rounds. A client's updates keep together: the
    AUC follows from the sum of each client's ranks, so that all permutations are one matrix product.
    """
    chosen = np.flatnonzero(np.isin(seen.rounds, list(rounds)))
    updates_of = zip(seen.rounds[chosen].tolist(), seen.clients[chosen].tolist(), strict=True)
    label = np.array([_label(labels, *update) for update in updates_of])
    chosen, label = chosen[label >= 0], label[label >= 0]
    if not label.any() or label.all():
        return None
    clients, whose = np.unique(seen.clients[chosen], return_inverse=True)
    ranks = rankdata(seen.scores[chosen], axis=0)
    sums = np.zeros((len(clients), ranks.shape[1]))
    np.add.at(sums, whose, ranks)
    updates = np.bincount(whose)
    malicious = np.bincount(whose, label) > 0
    shuffled = np.random.default_rng(address).permuted(np.tile(malicious, (permutations, 1)), axis=1)
    layers = sum(unit == "" for _, unit in seen.features)
    return _auc(malicious[None], sums, updates)[0], _auc(shuffled, sums[:, :layers], updates)


def _label(labels: Mapping[tuple[int, str], int], round_: int, client: str) -> int:
    try:
        return labels[round_, client]
    except KeyError:
        raise InputError(
            f"the truth says nothing of client {client!r} in round {round_}; is it another run's?"
        ) from None


def _auc(malicious: np.ndarray, sums: np.ndarray, updates: np.ndarray) -> np.ndarray:
    """AUCs [labelling, feature] of clients called malicious, bool [labelling, client], from their rank sums."""
    positives = malicious @ updates
    negatives = updates.sum() - positives
    above = malicious.astype(np.float64) @ sums - (positives * (positives + 1) / 2)[:, None]
    return above / (positives * negatives)[:, None]


def _holm(p: np.ndarray) -> np.ndarray:
    """Holm's step-down correction of p-values [test] (Holm 1979)."""
    order = np.argsort(p)
    stepped = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    corrected = np.empty_like(p)
    corrected[order] = np.minimum(stepped, 1)
    return corrected
