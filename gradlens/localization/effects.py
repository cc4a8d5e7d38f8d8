"""Builds the localization table from scores of unusual updates: AUC, interval, effect and p of every feature."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

from gradlens.errors import InputError
from gradlens.localization.outliers import Unusual

COLUMNS = ["layer", "statistic", "unit", "auc", "low", "high", "p", "seeds"]
COLUMNS += ["effect", "control_auc", "control_effect", "labels"]

RESAMPLES = 1_000
STRETCHES = 20  # most blocks of consecutive rounds that a run is split into, and that are resampled as a whole


@dataclass(frozen=True, eq=False)
class Case:
    """A run in which an attack is to be localized, with its ground truth and its control.

    Parameters
    ----------
    seen : Mapping
        Statistic -> `Unusual`, how unusual the run's updates are.
    labels : Mapping
        (round, client) -> 1 poisoned, 0 benign, -1 neither.
    rounds : collection of int
        The rounds to compare.
    control : Mapping, optional
        Statistic -> `Unusual` of the attack-free control; None where there is none.

    Examples
    --------
    >>> from gradlens.examples import example_log
    >>> from gradlens.localization import unusual
    >>> log = example_log()
    >>> labels = {(round_.index, client): int(client == "client-9") for round_ in log for client in round_.clients}
    >>> case = Case(unusual(log), labels, rounds=[0, 1, 2, 3])
    >>> case.during([0]).rounds
    [0]
    """

    seen: Mapping[str, Unusual]
    labels: Mapping[tuple[int, str], int]
    rounds: Collection[int]
    control: Mapping[str, Unusual] | None = None

    def during(self, rounds: Collection[int]) -> "Case":
        """Returns the same run with other rounds to compare."""
        return replace(self, rounds=rounds)

    def on_control(self) -> "Case":
        """Returns the control in place of the run, with the run's labels; the case must have a control."""
        assert self.control is not None
        return replace(self, seen=self.control, control=None)


@dataclass(frozen=True, eq=False)
class Found:
    """The figures of one statistic in one run.

    Parameters
    ----------
    aucs : numpy.ndarray
        float64 [feature], the AUC of poisoned against benign updates.
    permuted : numpy.ndarray
        float64 [permutation, layer], the same with permuted malicious clients.
    resampled : numpy.ndarray
        float64 [resample, feature], the same with resampled rounds; no row for a single round.
    effects : numpy.ndarray
        float64 [feature], median of poisoned minus median of benign scores, in robust sigmas.
    control_aucs : numpy.ndarray
        float64 [feature], the AUC of the same labels on the control, NaN without one.
    control_effects : numpy.ndarray
        float64 [feature], the effect of the control's most extreme client, NaN without a control.
    """

    aucs: np.ndarray
    permuted: np.ndarray
    resampled: np.ndarray
    effects: np.ndarray
    control_aucs: np.ndarray
    control_effects: np.ndarray


def located(cases: Sequence[Case], permutations: int, seed: int) -> pd.DataFrame:
    """Builds the table of `localize` from runs of one setting.

    Parameters
    ----------
    cases : sequence of Case
        The runs, one per seed.
    permutations : int
        Number of permutations behind each p-value.
    seed : int
        Seed of permutations and resamples.

    Returns
    -------
    pandas.DataFrame
        A row per feature, p-values corrected by Holm's method over layers and statistics. A statistic has no row if no
        run has both poisoned and benign updates that it scored.

    Raises
    ------
    InputError
        If a run's labels lack one of its updates, or a control has other layers or units than its run.

    Examples
    --------
    >>> from gradlens.examples import example_log
    >>> from gradlens.localization import unusual
    >>> log = example_log()
    >>> labels = {(round_.index, client): int(client == "client-9") for round_ in log for client in round_.clients}
    >>> table = located([Case(unusual(log), labels, range(4))], permutations=99, seed=0)
    >>> table.loc[table["statistic"].eq("layer_norms"), ["layer", "auc"]].values.tolist()
    [['fc1.weight', 1.0], ['fc1.bias', 1.0], ['fc2.weight', 1.0], ['fc2.bias', 1.0]]
    """
    rows: list[tuple[Any, ...]] = []
    for name in dict.fromkeys(name for case in cases for name in case.seen):
        scored = [(case, [seed, i]) for i, case in enumerate(cases) if name in case.seen]
        results = [
            result for case, address in scored if (result := _result(case, name, permutations, address)) is not None
        ]
        if results:
            rows += _rows(name, scored[0][0].seen[name].features, results, [seed, len(cases)])
    table = pd.DataFrame(rows, columns=COLUMNS[:-1]).assign(labels="truth")
    tested = (table["unit"] == "").to_numpy()
    table.loc[tested, "p"] = _holm(table.loc[tested, "p"].to_numpy(np.float64))
    return table


def _rows(
    name: str, features: Sequence[tuple[str, str]], results: Sequence[Found], address: list[int]
) -> Iterator[tuple[Any, ...]]:
    """Yields the table's rows of one statistic, combined over runs."""
    aucs = np.stack([result.aucs for result in results])
    auc = aucs.mean(axis=0)
    low, high = _interval(aucs, [result.resampled for result in results], address)
    permuted = np.mean([result.permuted for result in results], axis=0)  # layers only, which come first
    as_high = (permuted >= auc[: permuted.shape[1]] - 1e-12).sum(axis=0)
    p = np.full(len(features), np.nan)
    p[: len(as_high)] = (1 + as_high) / (1 + len(permuted))
    kinds = ("effects", "control_aucs", "control_effects")
    means = [_mean(getattr(result, kind) for result in results) for kind in kinds]
    for (layer, unit), *figures in zip(features, auc, low, high, p, *means, strict=True):
        yield layer, name, unit, *figures[:4], len(results), *figures[4:]


def _mean(values: Iterable[np.ndarray]) -> np.ndarray:
    """Averages arrays [feature], skipping values that are not finite."""
    table = np.stack(list(values))
    known = np.isfinite(table)
    counts = known.sum(axis=0)
    return np.divide(np.where(known, table, 0).sum(axis=0), counts, out=np.full(len(counts), np.nan), where=counts > 0)


def attacked_rounds(truth: pd.DataFrame) -> list[int]:
    """Returns the rounds in which any update was poisoned, in order.

    Parameters
    ----------
    truth : pandas.DataFrame
        Columns round, client, poisoned.

    Returns
    -------
    list of int

    Examples
    --------
    >>> attacked_rounds(pd.DataFrame({"round": [0, 1, 2], "client": "a", "poisoned": [False, True, True]}))
    [1, 2]
    """
    return sorted(set(truth.loc[truth["poisoned"].astype(bool), "round"].tolist()))


def labels_of(truth: pd.DataFrame) -> dict[tuple[int, str], int]:
    """Labels every update by the ground truth.

    Parameters
    ----------
    truth : pandas.DataFrame
        Columns round, client, compromised, poisoned.

    Returns
    -------
    dict
        (round, client) -> 1 poisoned; 0 benign; -1 not poisoned, but sent by a client compromised in any round.

    Examples
    --------
    >>> truth = pd.DataFrame({"round": [0, 1], "client": "a", "compromised": True, "poisoned": [False, True]})
    >>> labels_of(truth)
    {(0, 'a'): -1, (1, 'a'): 1}
    """
    poisoned = truth["poisoned"].to_numpy(bool)
    attackers = truth.loc[truth["compromised"].astype(bool) | poisoned, "client"].unique()
    label = np.where(poisoned, 1, np.where(truth["client"].isin(attackers), -1, 0))
    return dict(zip(zip(truth["round"].tolist(), truth["client"].tolist(), strict=True), label.tolist(), strict=True))


def _result(case: Case, name: str, permutations: int, address: list[int]) -> Found | None:
    """Evaluates one statistic in one run; None if its rounds have no poisoned or no benign update.

    Permutations exchange whole clients: the AUC follows from each client's sum of ranks, so that all permutations are
    one matrix product.
    """
    seen = case.seen[name]
    chosen, malicious = _labeled(seen, case)
    if not malicious.any() or malicious.all():
        return None
    scores = seen.scores[chosen]
    clients, owner = np.unique(seen.clients[chosen], return_inverse=True)
    sums, updates = _rank_sums(scores, owner, len(clients)), np.bincount(owner)
    attackers = np.bincount(owner, malicious) > 0
    shuffled = np.random.default_rng(address).permuted(np.tile(attackers, (permutations, 1)), axis=1)
    layers = sum(unit == "" for _, unit in seen.features)
    return Found(
        _auc(attackers[None], sums, updates)[0],
        _auc(shuffled, sums[:, :layers], updates),
        _resampled(scores, malicious, seen.rounds[chosen], address),
        _effects(scores, malicious),
        *_of_control(case, name),
    )


def _of_control(case: Case, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns AUCs of the same labels on the control and effects of its most extreme client, [feature], or NaN."""
    unknown = np.full(len(case.seen[name].features), np.nan)
    if case.control is None or name not in case.control:
        return unknown, unknown
    seen = case.control[name]
    if seen.features != case.seen[name].features:
        raise InputError(f"the control is of another model: {name} has other layers or units there")
    chosen, malicious = _labeled(seen, case)
    aucs = unknown
    if malicious.any() and not malicious.all():
        ranks = _ranks(seen.scores[chosen])
        aucs = _auc(malicious[None], ranks, np.ones(len(ranks), np.int64))[0]
    within = np.isin(seen.rounds, list(case.rounds)) & np.isfinite(seen.scores).all(axis=1)
    scores, clients = seen.scores[within], seen.clients[within]
    if not len(scores):
        return aucs, unknown
    medians = [np.median(scores[clients == client], axis=0) for client in np.unique(clients)]
    return aucs, np.max(medians, axis=0) - np.median(scores, axis=0)


def _labeled(seen: Unusual, case: Case) -> tuple[np.ndarray, np.ndarray]:
    """Returns positions of the poisoned and benign updates of the case's rounds, and which of them are poisoned."""
    chosen = np.flatnonzero(np.isin(seen.rounds, list(case.rounds)))
    updates = zip(seen.rounds[chosen].tolist(), seen.clients[chosen].tolist(), strict=True)
    label = np.array([_label(case.labels, *update) for update in updates], dtype=np.int64)
    return chosen[label >= 0], label[label >= 0] == 1


def _effects(scores: np.ndarray, malicious: np.ndarray) -> np.ndarray:
    """Returns median poisoned minus median benign score, from scores [update, feature] of comparable updates."""
    comparable = np.isfinite(scores).all(axis=1)
    poisoned, benign = scores[comparable & malicious], scores[comparable & ~malicious]
    if not len(poisoned) or not len(benign):
        return np.full(scores.shape[1], np.nan)
    return np.median(poisoned, axis=0) - np.median(benign, axis=0)


def _resampled(scores: np.ndarray, malicious: np.ndarray, rounds: np.ndarray, address: list[int]) -> np.ndarray:
    """Returns AUCs [resample, feature] of scores [update, feature] with resampled rounds; no row for a single round."""
    _, when = np.unique(rounds, return_inverse=True)
    number = int(when.max()) + 1
    count = min(number, STRETCHES)
    if count == 1:
        return np.zeros((0, scores.shape[1]))
    when = when * count // number
    drawn = np.random.default_rng([*address, 1]).integers(count, size=(RESAMPLES, count))
    times = (drawn[:, :, None] == np.arange(count)).sum(axis=1).astype(np.float64)  # [resample, stretch]
    pairs = (times @ np.bincount(when[malicious], minlength=count)) * (
        times @ np.bincount(when[~malicious], minlength=count)
    )
    times, pairs = times[pairs > 0], pairs[pairs > 0]
    weights = (times[:, :, None] * times[:, None, :]).reshape(len(times), -1)  # of each pair of stretches
    return weights @ _wins(scores, malicious, when, count) / pairs[:, None]


def _wins(scores: np.ndarray, malicious: np.ndarray, when: np.ndarray, count: int) -> np.ndarray:
    """Counts pairs in which a poisoned update of one stretch outscores a benign one of another.

    A tie counts half. From scores [update, feature] and the stretch of each update to [stretch x stretch, feature].
    """
    wins = np.zeros((count, count, scores.shape[1]))
    of_benign = np.zeros((len(scores), count))
    of_benign[np.flatnonzero(~malicious), when[~malicious]] = 1
    of_poisoned = (when[malicious] == np.arange(count)[:, None]).astype(np.float64)
    below = np.zeros((len(scores) + 1, count))
    for j in range(scores.shape[1]):
        order = np.argsort(scores[:, j])
        np.cumsum(of_benign[order], axis=0, out=below[1:])
        ordered, poisoned = scores[order, j], scores[malicious, j]
        first, last = (np.searchsorted(ordered, poisoned, side) for side in ("left", "right"))
        wins[:, :, j] = of_poisoned @ (below[first] + below[last]) / 2
    return wins.reshape(count * count, -1)


def _interval(aucs: np.ndarray, pools: Sequence[np.ndarray], address: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Returns the 95 % interval [feature] of the mean AUC over runs, resampling runs and, within each, its rounds."""
    if len(aucs) == 1 and not len(pools[0]):
        return np.full(aucs.shape[1], np.nan), np.full(aucs.shape[1], np.nan)
    pools = [pool if len(pool) else aucs[i : i + 1] for i, pool in enumerate(pools)]
    sizes = np.array([len(pool) for pool in pools])
    starts, rows = np.cumsum(sizes) - sizes, np.concatenate(pools)
    rng, total = np.random.default_rng([*address, 2]), np.zeros((RESAMPLES, aucs.shape[1]))
    for _ in range(len(aucs)):
        run = rng.integers(len(aucs), size=RESAMPLES)
        total += rows[starts[run] + rng.integers(sizes[run])]
    low, high = np.quantile(total / len(aucs), [0.025, 0.975], axis=0)
    return low, high


def _rank_sums(scores: np.ndarray, owner: np.ndarray, count: int) -> np.ndarray:
    """Sums the ranks of scores [update, feature] over the updates of each client, [client, feature]."""
    sums = np.zeros((count, scores.shape[1]))
    np.add.at(sums, owner, _ranks(scores))
    return sums


def _label(labels: Mapping[tuple[int, str], int], round_: int, client: str) -> int:
    """Looks up the label of an update; raises InputError if there is none."""
    try:
        return labels[round_, client]
    except KeyError:
        raise InputError(
            f"the truth says nothing of client {client!r} in round {round_}; is it another run's?"
        ) from None


def _auc(malicious: np.ndarray, sums: np.ndarray, updates: np.ndarray) -> np.ndarray:
    """Computes AUCs [labeling, feature] from rank sums [client, feature] and bool [labeling, client] of attackers.

    updates: int [client], the number of updates of each client.
    """
    positives = malicious @ updates
    negatives = updates.sum() - positives
    above = malicious.astype(np.float64) @ sums - (positives * (positives + 1) / 2)[:, None]
    return above / (positives * negatives)[:, None]


def _holm(p: np.ndarray) -> np.ndarray:
    """Applies Holm's step-down correction to p-values [test] (Holm 1979)."""
    order = np.argsort(p)
    stepped = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    corrected = np.empty_like(p)
    corrected[order] = np.minimum(stepped, 1)
    return corrected


def _ranks(scores: np.ndarray) -> np.ndarray:
    """Ranks scores [update, feature] within each column, ties by their mean rank."""
    from scipy.stats import rankdata  # takes 0.3 s to import

    return rankdata(scores, axis=0)
