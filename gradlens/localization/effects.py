"""From how unusual updates were to the rows of a table: AUC, interval, effect and p of every feature."""

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
STRETCHES = 20  # of consecutive rounds, which are resampled whole where there are more rounds


@dataclass(frozen=True, eq=False)
class Case:
    """A run to locate in: how unusual its updates were and its control's (statistic -> `Unusual`), labels, rounds.

    labels: (round, client) -> 1 poisoned, 0 benign, -1 neither.
    """

    seen: Mapping[str, Unusual]
    labels: Mapping[tuple[int, str], int]
    rounds: Collection[int]
    control: Mapping[str, Unusual] | None = None

    def during(self, rounds: Collection[int]) -> "Case":
        """The same run in other rounds."""
        return replace(self, rounds=rounds)

    def on_control(self) -> "Case":
        """The control in the run's stead, with the run's labels."""
        assert self.control is not None
        return replace(self, seen=self.control, control=None)


@dataclass(frozen=True, eq=False)
class Found:
    """What one statistic gives in one run, [feature]; permuted [permutation, layer]; resampled [resample, feature]."""

    aucs: np.ndarray
    permuted: np.ndarray
    resampled: np.ndarray
    effects: np.ndarray
    control_aucs: np.ndarray
    control_effects: np.ndarray


def located(cases: Sequence[Case], permutations: int, seed: int) -> pd.DataFrame:
    """The table of `localize`; a statistic without an answer in any run has no row."""
    rows: list[tuple[Any, ...]] = []
    for name in dict.fromkeys(name for case in cases for name in case.seen):
        asked = [(case, [seed, i]) for i, case in enumerate(cases) if name in case.seen]
        found = [answer for case, address in asked if (answer := _found(case, name, permutations, address)) is not None]
        if found:
            rows += _rows(name, asked[0][0].seen[name].features, found, [seed, len(cases)])
    table = pd.DataFrame(rows, columns=COLUMNS[:-1]).assign(labels="truth")
    tested = (table["unit"] == "").to_numpy()
    table.loc[tested, "p"] = _holm(table.loc[tested, "p"].to_numpy(np.float64))
    return table


def _rows(
    name: str, features: Sequence[tuple[str, str]], found: Sequence[Found], address: list[int]
) -> Iterator[tuple[Any, ...]]:
    """The rows of one statistic, from what its runs gave."""
    aucs = np.stack([each.aucs for each in found])
    auc = aucs.mean(axis=0)
    low, high = _interval(aucs, [each.resampled for each in found], address)
    permuted = np.mean([each.permuted for each in found], axis=0)  # the layers come first
    as_good = (permuted >= auc[: permuted.shape[1]] - 1e-12).sum(axis=0)
    p = np.full(len(features), np.nan)
    p[: len(as_good)] = (1 + as_good) / (1 + len(permuted))
    beside = [_mean(getattr(each, kind) for each in found) for kind in ("effects", "control_aucs", "control_effects")]
    for (layer, unit), *figures in zip(features, auc, low, high, p, *beside, strict=True):
        yield layer, name, unit, *figures[:4], len(found), *figures[4:]


def _mean(values: Iterable[np.ndarray]) -> np.ndarray:
    """The mean of arrays [feature], without those that are NaN."""
    table = np.stack(list(values))
    known = np.isfinite(table)
    counts = known.sum(axis=0)
    return np.divide(np.where(known, table, 0).sum(axis=0), counts, out=np.full(len(counts), np.nan), where=counts > 0)


def attacked_rounds(truth: pd.DataFrame) -> list[int]:
    """The rounds in which an update was poisoned, in order."""
    return sorted(set(truth.loc[truth["poisoned"].astype(bool), "round"].tolist()))


def labels_of(truth: pd.DataFrame) -> dict[tuple[int, str], int]:
    """(round, client) -> 1 poisoned, 0 benign, -1 not poisoned, but of a client that is compromised in any round."""
    poisoned = truth["poisoned"].to_numpy(bool)
    suspects = truth.loc[truth["compromised"].astype(bool) | poisoned, "client"].unique()
    label = np.where(poisoned, 1, np.where(truth["client"].isin(suspects), -1, 0))
    return dict(zip(zip(truth["round"].tolist(), truth["client"].tolist(), strict=True), label.tolist(), strict=True))


def _found(case: Case, name: str, permutations: int, address: list[int]) -> Found | None:
    """What one statistic gives in one run; None where these rounds have no poisoned or no benign update.

    A client's updates keep together: the AUC follows from the sum of each client's ranks, so that all permutations
    are one matrix product.
    """
    seen = case.seen[name]
    chosen, malicious = _labelled(seen, case)
    if not malicious.any() or malicious.all():
        return None
    scores = seen.scores[chosen]
    clients, whose = np.unique(seen.clients[chosen], return_inverse=True)
    sums, updates = _rank_sums(scores, whose, len(clients)), np.bincount(whose)
    guilty = np.bincount(whose, malicious) > 0
    shuffled = np.random.default_rng(address).permuted(np.tile(guilty, (permutations, 1)), axis=1)
    layers = sum(unit == "" for _, unit in seen.features)
    return Found(
        _auc(guilty[None], sums, updates)[0],
        _auc(shuffled, sums[:, :layers], updates),
        _resampled(scores, malicious, seen.rounds[chosen], address),
        _effects(scores, malicious),
        *_of_control(case, name),
    )


def _of_control(case: Case, name: str) -> tuple[np.ndarray, np.ndarray]:
    """AUCs of the same labels on the control, and effects of the client farthest out there, [feature]; NaN without."""
    nothing = np.full(len(case.seen[name].features), np.nan)
    if case.control is None or name not in case.control:
        return nothing, nothing
    seen = case.control[name]
    if seen.features != case.seen[name].features:
        raise InputError(f"the control is of another model: {name} has other layers or units there")
    chosen, malicious = _labelled(seen, case)
    aucs = nothing
    if malicious.any() and not malicious.all():
        ranks = _ranks(seen.scores[chosen])
        aucs = _auc(malicious[None], ranks, np.ones(len(ranks), np.int64))[0]
    within = np.isin(seen.rounds, list(case.rounds)) & np.isfinite(seen.scores).all(axis=1)
    scores, clients = seen.scores[within], seen.clients[within]
    if not len(scores):
        return aucs, nothing
    usual = [np.median(scores[clients == client], axis=0) for client in np.unique(clients)]
    return aucs, np.max(usual, axis=0) - np.median(scores, axis=0)


def _labelled(seen: Unusual, case: Case) -> tuple[np.ndarray, np.ndarray]:
    """Positions of the updates of the rounds that are poisoned or benign, and which of them are poisoned."""
    chosen = np.flatnonzero(np.isin(seen.rounds, list(case.rounds)))
    updates = zip(seen.rounds[chosen].tolist(), seen.clients[chosen].tolist(), strict=True)
    label = np.array([_label(case.labels, *update) for update in updates], dtype=np.int64)
    return chosen[label >= 0], label[label >= 0] == 1


def _effects(scores: np.ndarray, malicious: np.ndarray) -> np.ndarray:
    """Median of the poisoned minus median of the benign ones of scores [update, feature], where comparable."""
    comparable = np.isfinite(scores).all(axis=1)
    poisoned, benign = scores[comparable & malicious], scores[comparable & ~malicious]
    if not len(poisoned) or not len(benign):
        return np.full(scores.shape[1], np.nan)
    return np.median(poisoned, axis=0) - np.median(benign, axis=0)


def _resampled(scores: np.ndarray, malicious: np.ndarray, rounds: np.ndarray, address: list[int]) -> np.ndarray:
    """AUCs [resample, feature] with the rounds of scores [update, feature] drawn anew; no row for a single round."""
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
    both = (times[:, :, None] * times[:, None, :]).reshape(len(times), -1)
    return both @ _wins(scores, malicious, when, count) / pairs[:, None]


def _wins(scores: np.ndarray, malicious: np.ndarray, when: np.ndarray, count: int) -> np.ndarray:
    """How often poisoned updates of one stretch score above benign ones of another, [stretch x stretch, feature].

    A tie counts half. Scores [update, feature]; when: the stretch of each update.
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
    """95 % interval [feature] of the mean of AUCs [run, feature]: runs are drawn, and of each one of its resamples."""
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


def _rank_sums(scores: np.ndarray, whose: np.ndarray, count: int) -> np.ndarray:
    """Sums of the ranks of scores [update, feature] over the updates of each client, [client, feature]."""
    sums = np.zeros((count, scores.shape[1]))
    np.add.at(sums, whose, _ranks(scores))
    return sums


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


def _ranks(scores: np.ndarray) -> np.ndarray:
    """Ranks of scores [update, feature] in each column, ties in the middle."""
    from scipy.stats import rankdata  # takes 0.3 s to import

    return rankdata(scores, axis=0)
