"""Builds the localization table from scores of unusual updates: AUC, interval, effect and p of every feature."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

from gradlens.errors import InputError
from gradlens.evaluation import mean_interval
from gradlens.evaluation.ranking import ranks
from gradlens.localization.client_intervals import client_interval
from gradlens.localization.outliers import Unusual
from gradlens.localization.permutations import adjusted, labelings

COLUMNS = ["layer", "statistic", "unit", "auc", "low", "high", "p", "seeds"]
COLUMNS += ["effect", "control_auc", "control_effect", "labels"]


@dataclass(frozen=True, eq=False)
class LabeledRun:
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
    >>> case = LabeledRun(unusual(log), labels, rounds=[0, 1, 2, 3])
    >>> case.during([0]).rounds
    [0]
    """

    seen: Mapping[str, Unusual]
    labels: Mapping[tuple[int, str], int]
    rounds: Collection[int]
    control: Mapping[str, Unusual] | None = None

    def during(self, rounds: Collection[int]) -> "LabeledRun":
        """Returns the same run with other rounds to compare."""
        return replace(self, rounds=rounds)

    def on_control(self) -> "LabeledRun":
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
    clients : numpy.ndarray
        str [client], who was scored.
    sums : numpy.ndarray
        float64 [client, layer], the ranks of each client's updates, summed.
    updates : numpy.ndarray
        int [client], the number of each client's updates.
    low, high : numpy.ndarray
        float64 [feature], the interval of the AUC over clients.
    effects : numpy.ndarray
        float64 [feature], median of poisoned minus median of benign scores, in robust sigmas.
    control_aucs : numpy.ndarray
        float64 [feature], the AUC of the same labels on the control, NaN without one.
    control_effects : numpy.ndarray
        float64 [feature], the effect of the control's most extreme client, NaN without a control.
    """

    aucs: np.ndarray
    clients: np.ndarray
    sums: np.ndarray
    updates: np.ndarray
    low: np.ndarray
    high: np.ndarray
    effects: np.ndarray
    control_aucs: np.ndarray
    control_effects: np.ndarray


def located(cases: Sequence[LabeledRun], permutations: int, seed: int) -> pd.DataFrame:
    """Builds the table of `localize` from runs of one setting.

    Parameters
    ----------
    cases : sequence of LabeledRun
        The runs, one per seed.
    permutations : int
        Number of permutations behind the p-values.
    seed : int
        Seed of the permutations.

    Returns
    -------
    pandas.DataFrame
        A row per feature, p-values adjusted over layers and statistics. A statistic has no row if no run has both
        poisoned and benign updates that it scored.

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
    >>> table = located([LabeledRun(unusual(log), labels, range(4))], permutations=99, seed=0)
    >>> table.loc[table["statistic"].eq("layer_norms"), ["layer", "auc"]].values.tolist()
    [['fc1.weight', 1.0], ['fc1.bias', 1.0], ['fc2.weight', 1.0], ['fc2.bias', 1.0]]
    """
    figures: dict[str, dict[int, Found]] = {}  # statistic -> position of a run -> its figures
    for name in dict.fromkeys(name for case in cases for name in case.seen):
        results = {i: _result(case, name) for i, case in enumerate(cases) if name in case.seen}
        known = {i: result for i, result in results.items() if result is not None}
        figures |= {name: known} if known else {}
    rows = [row for name, results in figures.items() for row in _rows(name, cases, results)]
    table = pd.DataFrame(rows, columns=COLUMNS[:-1]).assign(labels="truth")
    if table.empty:
        return table
    tested = (table["unit"] == "").to_numpy()
    highest, exact = _highest(cases, figures, permutations, seed)
    table.loc[tested, "p"] = adjusted(table.loc[tested, "auc"].to_numpy(np.float64), highest, exact=exact)
    return table


def _rows(name: str, cases: Sequence[LabeledRun], results: Mapping[int, Found]) -> Iterator[tuple[Any, ...]]:
    """Yields the table's rows of one statistic, combined over runs, without p-values."""
    found = list(results.values())
    aucs = np.stack([result.aucs for result in found])
    low, high = found[0].low, found[0].high
    if len(found) > 1:
        low, high = np.transpose([mean_interval(values, 0, 1) for values in aucs.T])
    kinds = ("effects", "control_aucs", "control_effects")
    means = [_mean(getattr(result, kind) for result in found) for kind in kinds]
    features = cases[next(iter(results))].seen[name].features
    for (layer, unit), *figures in zip(features, aucs.mean(axis=0), low, high, *means, strict=True):
        yield layer, name, unit, *figures[:3], np.nan, len(found), *figures[3:]


def _highest(
    cases: Sequence[LabeledRun], figures: Mapping[str, Mapping[int, Found]], permutations: int, seed: int
) -> tuple[np.ndarray, bool]:
    """Returns the highest AUC of all layers and statistics [labeling], and whether these are all labelings.

    A labeling names the same clients malicious for every statistic. AUCs are averaged over the runs in which the
    statistic scored both kinds under the labeling.
    """
    of_runs = [[results[i] for results in figures.values() if i in results] for i in range(len(cases))]
    clients = [np.unique(np.concatenate([np.zeros(0, np.str_), *(r.clients for r in found)])) for found in of_runs]
    guilty = [{client for (_, client), label in case.labels.items() if label == 1} for case in cases]
    attackers = [np.isin(names, list(who)) for names, who in zip(clients, guilty, strict=True)]
    drawn, exact = labelings(attackers, permutations, seed)
    highest = np.full(len(drawn[0]), -np.inf)
    for results in figures.values():
        aucs = np.stack(
            [
                _auc(drawn[i][:, np.searchsorted(clients[i], result.clients)], result.sums, result.updates)
                for i, result in results.items()
            ]
        )
        known = np.isfinite(aucs).sum(axis=0)
        means = np.where(known > 0, np.nansum(aucs, axis=0) / np.maximum(known, 1), -np.inf)
        highest = np.maximum(highest, means.max(axis=1))
    return highest, exact


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


def _result(case: LabeledRun, name: str) -> Found | None:
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
    layers = sum(unit == "" for _, unit in seen.features)
    return Found(
        _auc(attackers[None], sums, updates)[0],
        clients,
        sums[:, :layers],
        updates,
        *client_interval(scores, malicious, owner),
        _effects(scores, malicious),
        *_of_control(case, name),
    )


def _of_control(case: LabeledRun, name: str) -> tuple[np.ndarray, np.ndarray]:
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
        aucs = _auc(malicious[None], ranks(seen.scores[chosen]), np.ones(len(chosen), np.int64))[0]
    within = np.isin(seen.rounds, list(case.rounds)) & np.isfinite(seen.scores).all(axis=1)
    scores, clients = seen.scores[within], seen.clients[within]
    if not len(scores):
        return aucs, unknown
    medians = [np.median(scores[clients == client], axis=0) for client in np.unique(clients)]
    return aucs, np.max(medians, axis=0) - np.median(scores, axis=0)


def _labeled(seen: Unusual, case: LabeledRun) -> tuple[np.ndarray, np.ndarray]:
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


def _rank_sums(scores: np.ndarray, owner: np.ndarray, count: int) -> np.ndarray:
    """Sums the ranks of scores [update, feature] over the updates of each client, [client, feature]."""
    sums = np.zeros((count, scores.shape[1]))
    np.add.at(sums, owner, ranks(scores))
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

    NaN for a labeling that leaves no update of one kind. updates: int [client], the number of updates of each client.
    """
    positives = malicious @ updates
    negatives = updates.sum() - positives
    above = malicious.astype(np.float64) @ sums - (positives * (positives + 1) / 2)[:, None]
    with np.errstate(invalid="ignore"):
        return above / (positives * negatives)[:, None]
