"""Published detectors that look back over a client's rounds: FoolsGold, FLDetector, FLANDERS."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from gradlens.detectors.published import Judgement, published
from gradlens.detectors.verdict import Detector
from gradlens.errors import CannotSay, InputError
from gradlens.log import Round, UpdateLog
from gradlens.log.accumulated import BUDGET, sketch_rows
from gradlens.log.round import BLOCK, PAIRWISE
from gradlens.settings import whole_number
from gradlens.statistics import prediction_residual

__all__ = ["flanders", "fldetector", "foolsgold"]

ROUNDING = 1e-9  # differences of scores below it are sums in another order
MOST_CLUSTERS = 7  # that FLDetector's gap statistic tries
REFERENCES = 10  # uniform samples it compares with


def foolsgold(kappa: float = 1.0, layers: str = "all") -> Detector:
    """Trusts a client the less, the more its history points the way another client's does; flags weights below 0.5.

    A history is the sum of the client's updates over its rounds, of everybody seen so far. cs_ij: cosine of two
    histories, 0 for j = i, so that no maximum is below 0; v_i = max over j of cs_ij; pardoning: cs_ij *= v_i / v_j
    where v_i < v_j; w_i = 1 - max over j of cs_ij, divided by the largest; weight = kappa (ln(w_i / (1 - w_i)) + 0.5),
    from 0 to 1.
    Score: 1 - w_i before that logit, which tells apart what the clipped weights do not: from 0, the client least like
    any other, to 1. The paper has no flags; 0.5 is our own choice, at kappa 1 a score above 0.5.
    kappa: how steeply weights fall with similarity; 1 is the paper's and the official code's. layers: "all", or
    "final": the final weight alone, as in several reproductions, for the features that tell labels (the paper weights
    these more).
    Histories of more than 1 GB are sketched (`Accumulated`). Rounds in which a client was not comparable do not count.
    Raises: InputError unless `kappa` is above 0 and `layers` one of the two. Abstains where all histories point the
    same way: everybody would be everybody's sybil; above 5,000 clients seen; without a final weight if it is asked for.
    Source: Fung, Yoon & Beschastnikh 2020, "The Limitations of Federated Learning in Sybil Settings", RAID, algorithm
    1; arXiv:1808.04866; github.com/DistributedML/FoolsGold.
    """
    if layers not in ("all", "final"):
        raise InputError(f"foolsgold: layers must be 'all' or 'final', found {layers!r}")
    return published(_foolsgold, kappa=_positive("foolsgold", "kappa", kappa), layers=layers)


def fldetector(window: int = 10, start: int | None = None, seed: int = 0) -> Detector:
    """Flags the clients whose updates are harder to predict from their own past, if they form a cluster of their own.

    Score: the statistic `prediction_residual` minus 1: 0 = predicted as well as the average client, 1 = twice as badly.
    Decision: the gap statistic over k = 1 to 7 clusters of the scores, scaled to 0 to 1, with 10 uniform reference
    samples; the smallest k with gap(k) >= gap(k + 1) - s(k + 1). Where it is 1 there is no attack; else 2-means, and
    the cluster of the larger mean is flagged. In one dimension both are solved exactly, not from random starts.
    window: rounds that are averaged, and pairs that L-BFGS uses; 10 is the official code's. start: rounds before the
    first decision; None: window + 1, our own choice: the official code waits 50. seed: of the reference samples.
    Raises: InputError where one is no whole number of at least 1 (seed: 0). Abstains before `start` rounds, or while
    most clients have no earlier update to predict from.
    Source: Zhang, Cao, Jia & Gong 2022, KDD, arXiv:2207.09209, algorithms 1-3; gap statistic: Tibshirani, Walther &
    Hastie 2001; github.com/zaixizhang/FLDetector, train_mnist.py.
    """
    window = whole_number("fldetector: window", window, least=1)
    start = None if start is None else whole_number("fldetector: start", start, least=1)
    return published(_fldetector, window=window, start=start, seed=whole_number("fldetector: seed", seed))


def flanders(
    num_malicious: int | None = None,
    window: int = 5,
    sampled: int = 500,
    alpha: float = 1.0,
    beta: float = 1.0,
    iterations: int = 100,
    seed: int = 0,
) -> Detector:
    """Flags the clients whose local models stray farthest from a forecast that a matrix autoregression makes of them.

    X_t [client, number]: the local models (global model + update) at a fixed sample of coordinates. A [client, client]
    and B [number, number] minimise sum over t of |X_t - A X_t-1 B|^2 + ridge over the rounds before the last, by
    alternating least squares from A = B = 1; the forecast is A X B. Score: L2 norm of the client's model - forecast,
    over the cohort's median (mean, where that is 0) of it, minus 1. The num_malicious highest are flagged.
    num_malicious: f; None: fewer than half, (n - 1) // 2, our own choice: the method itself sets no bound. window:
    rounds, the last among them, at least 3; 5 is our own choice. sampled: coordinates, 500 in the authors' code;
    seed: of their choice.
    alpha, beta: ridge on A and B, iterations: 1, 1, 100 in that code; all are of X over its largest absolute value.
    Where that code differs: its first pair predicts the first round from the last, it starts at random, and it fits A
    and B to shifted numbers but applies them to unshifted ones. Not taken over: flagged clients' models are not
    replaced in the history by the aggregate, since what was aggregated is not for a detector to know. A client that
    was absent or not comparable in an earlier round counts there as the global model. Equal scores at the border
    are flagged or not together: not.
    Raises: InputError for a setting out of its range. Abstains before 3 rounds, where most of the clients were not in
    the round before, or where f clients or fewer took part.
    Source: Gabrielli, Belli, Matrullo, Miori & Tolomei 2023, arXiv:2303.16668; github.com/adap/flower,
    baselines/flanders; matrix autoregression: Chen, Xiao & Yang 2021, "Autoregressive models for matrix-valued time
    series".
    """
    return published(
        _flanders,
        num_malicious=None if num_malicious is None else whole_number("flanders: num_malicious", num_malicious),
        window=whole_number("flanders: window", window, least=3),
        sampled=whole_number("flanders: sampled", sampled, least=1),
        alpha=_positive("flanders", "alpha", alpha),
        beta=_positive("flanders", "beta", beta),
        iterations=whole_number("flanders: iterations", iterations, least=1),
        seed=whole_number("flanders: seed", seed),
    )


def _positive(detector: str, setting: str, value: Any) -> float:
    if not isinstance(value, int | float | np.number) or isinstance(value, bool) or not 0 < value < math.inf:
        raise InputError(f"{detector}: {setting} must be a finite number above 0, found {value!r}")
    return float(value)


# FoolsGold


@dataclass(frozen=True, eq=False)
class _Histories:
    """The sum of each client's updates so far: layer -> float32 [seen, number]; their Gram matrix [seen, seen]."""

    clients: tuple[str, ...]
    sums: Mapping[str, np.ndarray]
    gram: np.ndarray
    sketched: bool


@dataclass(frozen=True)
class _Adding:
    """The histories of a log, from round to round (`UpdateLog.folded`)."""

    layers: str

    def __call__(self, before: _Histories | None, log: UpdateLog) -> _Histories:
        return self._advanced(before, log, in_place=False)

    def carry(self, before: _Histories | None, log: UpdateLog) -> _Histories:
        """The same, in the memory of the histories before."""
        return self._advanced(before, log, in_place=True)

    def _advanced(self, before: _Histories | None, log: UpdateLog, in_place: bool) -> _Histories:
        round_ = log[-1]
        names = round_.parameters if self.layers == "all" else (str(log.model.final_weight),)
        known = before.clients if before else ()
        present = round_.clients[round_.comparable].tolist()
        clients = (*known, *sorted(set(present) - set(known)))
        if len(clients) > PAIRWISE:
            raise CannotSay(f"{len(clients):,} clients seen: nothing pairwise is formed above {PAIRWISE:,}")
        size = sum(log.model[name].size for name in names)
        was_sketched = before is not None and before.sketched
        sketched = was_sketched or 4 * len(clients) * size > BUDGET
        place = {client: row for row, client in enumerate(clients)}
        rows = np.array([place[client] for client in present], dtype=np.int64)
        gram, sums = np.zeros((len(clients), len(clients))), {}
        for name in names:
            past = before.sums[name] if before else np.zeros((0, log.model[name].size), np.float32)
            past = sketch_rows(name, past) if sketched and not was_sketched else past
            if in_place and len(past) == len(clients):
                sums[name] = past
            else:
                sums[name] = np.zeros((len(clients), past.shape[1]), np.float32)
                sums[name][: len(past)] = past
            _add(sums[name], rows, round_, name, sketched)
            gram[rows] += _products(sums[name], rows)
        if before:
            absent = np.setdiff1d(np.arange(len(known)), rows)
            gram[np.ix_(absent, absent)] = before.gram[np.ix_(absent, absent)]
        gram[:, rows] = gram[rows].T
        return _Histories(clients, sums, gram, sketched)


def _add(sums: np.ndarray, rows: np.ndarray, round_: Round, layer: str, sketched: bool) -> None:
    comparable = np.flatnonzero(round_.comparable)
    if sketched:
        sums[rows] += sketch_rows(layer, round_.flat(layer, sketch=True)[comparable])
        return
    updates = round_.flat(layer, sketch=True)
    for row, position in zip(rows.tolist(), comparable.tolist(), strict=True):
        sums[row] += updates[position]


def _products(sums: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Inner products of some of the histories with all of them, float64 [row, seen]."""
    products = np.zeros((len(rows), len(sums)))
    for start in range(0, sums.shape[1], BLOCK):
        block = sums[:, start : start + BLOCK].astype(np.float64)
        # of everybody with everybody BLAS forms one half
        products += (block @ block.T)[rows] if len(rows) == len(sums) else block[rows] @ block.T
    return products


def _foolsgold(log: UpdateLog, kappa: float, layers: str) -> Judgement:
    if layers == "final" and log.model.final_weight is None:
        raise CannotSay("the model has no final weight (a layer of two or more dimensions)")
    round_, histories = log[-1], log.folded(_Adding(layers))
    trust, nearest = _trust(_cosines(histories.gram))
    rows = [histories.clients.index(client) for client in round_.clients.tolist()]
    weights = _logit(trust[rows], kappa)
    evidence = pd.DataFrame({"similarity": nearest[rows]}, index=pd.Index(round_.clients, name="client"))
    return Judgement(1 - trust[rows], weights < 0.5, weights, evidence)


def _cosines(gram: np.ndarray) -> np.ndarray:
    norms = np.sqrt(np.diagonal(gram))
    products = np.outer(norms, norms)
    cosines = np.divide(gram, products, out=np.zeros_like(gram), where=products > 0)
    np.fill_diagonal(cosines, 0)
    return np.minimum(cosines, 1)


def _trust(cosines: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """1 - the largest pardoned similarity, over the largest such; and that similarity; both [seen]."""
    most = cosines.max(axis=1)
    ratio = np.divide(most[:, None], most[None, :], out=np.ones_like(cosines), where=most[None, :] > most[:, None])
    pardoned = (cosines * ratio).max(axis=1)
    trust = 1 - pardoned
    if trust.max() <= ROUNDING:
        raise CannotSay(f"the histories of all {len(trust)} clients point the same way")
    return trust / trust.max(), pardoned


def _logit(trust: np.ndarray, kappa: float) -> np.ndarray:
    with np.errstate(divide="ignore"):  # 0 and 1 are minus and plus infinity, then 0 and 1 again
        return np.clip(kappa * (np.log(trust) - np.log1p(-trust) + 0.5), 0, 1)


# FLDetector


def _fldetector(log: UpdateLog, window: int, start: int | None, seed: int) -> Judgement:
    needed = window + 1 if start is None else start
    if len(log) < needed:
        raise CannotSay(f"the log has {len(log)} rounds, FLDetector decides from {needed} on")
    evidence = prediction_residual(log, window)
    scores = evidence["update"].to_numpy() - 1
    if np.ptp(scores) <= ROUNDING:
        return Judgement(np.zeros(len(scores)), np.zeros(len(scores), dtype=bool), evidence=evidence)
    flags = np.zeros(len(scores), dtype=bool)
    if _number_of_clusters(scores, seed) > 1:
        flags = scores > np.sort(scores)[_last_of_lower_cluster(scores)]
    return Judgement(scores, flags, evidence=evidence)


def _number_of_clusters(scores: np.ndarray, seed: int) -> int:
    """The gap statistic's, from 1 to 7; of scores that are not all equal."""
    scaled = np.sort((scores - scores.min()) / np.ptp(scores))
    uniform = np.sort(np.random.default_rng(seed).uniform(size=(REFERENCES, len(scores))), axis=1)
    most = min(MOST_CLUSTERS, len(scores) - 1)  # with as many clusters as scores nothing is left within
    spread = np.stack([_within(sample, most) for sample in (scaled, *uniform)])  # [sample, k - 1]
    with np.errstate(divide="ignore"):  # 0 where there are no more different scores than clusters
        own, logs = np.log(spread[0]), np.log(spread[1:])
        gaps = np.log(spread[1:].mean(axis=0)) - own
    error = np.array([np.std(each) if np.isfinite(each).all() else 0.0 for each in logs.T])
    error *= np.sqrt(1 + 1 / REFERENCES)
    fits = gaps[:-1] >= gaps[1:] - error[1:]
    return int(np.argmax(fits)) + 1 if fits.any() else most


def _within(ordered: np.ndarray, most: int) -> np.ndarray:
    """The smallest sum of squares within k clusters of ordered numbers, for k = 1 to `most`: float64 [k - 1].

    Clusters in one dimension are stretches, so the best ones follow from the best ones of every beginning.
    """
    cost = _costs(ordered)
    best, found = cost[0], [cost[0, -1]]
    for _ in range(most - 1):
        before = np.concatenate([[np.inf], best[:-1]])  # of what lies before a last cluster that begins here
        best = (before[:, None] + cost).min(axis=0)
        found.append(best[-1])
    within = np.array(found)
    return np.where(within > ROUNDING * len(ordered), within, 0)


def _costs(ordered: np.ndarray) -> np.ndarray:
    """The sum of squares about the mean of the i-th to the j-th number, float64 [i, j], infinite where j < i."""
    count = len(ordered)
    first, second = (np.concatenate([[0], np.cumsum(p)]) for p in (ordered, ordered**2))
    lengths = np.arange(1, count + 1)[None, :] - np.arange(count)[:, None]
    totals = first[None, 1:] - first[:-1, None]
    costs = second[None, 1:] - second[:-1, None] - totals**2 / np.maximum(lengths, 1)
    return np.where(lengths > 0, np.maximum(costs, 0), np.inf)


def _last_of_lower_cluster(scores: np.ndarray) -> int:
    """Where the lower one of two clusters ends among the ordered scores."""
    cost = _costs(np.sort(scores))
    return int(np.argmin(cost[0, :-1] + cost[1:, -1]))


# FLANDERS


@dataclass(frozen=True)
class _Sampling:
    """The local models at a sample of coordinates, of the last rounds (`UpdateLog.folded`).

    Of each round: the global model [number], and client -> its local model [number], where it was comparable.
    """

    window: int
    sampled: int
    seed: int

    def __call__(
        self, before: tuple[tuple[np.ndarray, Mapping[str, np.ndarray]], ...] | None, log: UpdateLog
    ) -> tuple[tuple[np.ndarray, Mapping[str, np.ndarray]], ...]:
        round_ = log[-1]
        rng = np.random.default_rng(self.seed)
        size = log.model.num_parameters
        chosen = np.sort(rng.choice(size, self.sampled, replace=False)) if size > self.sampled else np.arange(size)
        place, moves, start = [], [], 0
        for name in round_.parameters:
            inside = chosen[(chosen >= start) & (chosen < start + log.model[name].size)] - start
            place.append(round_.global_model[name].reshape(-1)[inside])
            moves.append(round_.flat(name)[:, inside])
            start += log.model[name].size
        centre = np.concatenate(place).astype(np.float64)
        updates = np.concatenate(moves, axis=1)
        models = {str(round_.clients[row]): centre + updates[row] for row in np.flatnonzero(round_.comparable)}
        return (*(before or ()), (centre, models))[-self.window :]


def _flanders(
    log: UpdateLog,
    num_malicious: int | None,
    window: int,
    sampled: int,
    alpha: float,
    beta: float,
    iterations: int,
    seed: int,
) -> Judgement:
    clients = [str(client) for client in log[-1].clients]
    flagged = (len(clients) - 1) // 2 if num_malicious is None else num_malicious
    if flagged >= len(clients):
        raise CannotSay(f"{len(clients)} clients took part, more than num_malicious = {flagged} are needed")
    if len(log) < 3:
        raise CannotSay(
            f"the log has {len(log)} rounds, at least 3 are needed: two to fit a forecast and one to compare"
        )
    rounds = log.folded(_Sampling(window, sampled, seed))
    if 2 * sum(client in rounds[-2][1] for client in clients) < len(clients):
        raise CannotSay("most of the clients were not in the round before, from which they are forecast")
    models = np.stack([[of.get(client, centre) for client in clients] for centre, of in rounds])
    if not np.isfinite(models).all():
        raise CannotSay("the global model of one of the last rounds is not finite")
    errors = np.linalg.norm(models[-1] - _forecast(models[:-1], alpha, beta, iterations), axis=1)
    unit = np.median(errors) if np.median(errors) > 0 else errors.mean()
    scores = errors / unit - 1 if unit > 0 else errors
    if np.ptp(scores) <= ROUNDING:
        scores = np.zeros(len(scores))
    border = np.sort(scores)[len(scores) - flagged - 1]
    return Judgement(scores, scores > border + ROUNDING)


def _forecast(models: np.ndarray, alpha: float, beta: float, iterations: int) -> np.ndarray:
    """The next of a series of matrices [round, client, number] by X_t = A X_t-1 B, fitted by alternating least squares.

    B is never formed: X B = (X F') (F F' + beta)^-1 Y, with F the stacked A X_t-1 and Y the stacked X_t, so that all
    but the forecast itself is inner products of clients' rows.
    """
    scale = np.abs(models).max()
    if scale == 0:
        return models[-1]
    x = models / scale
    rounds, clients, numbers = len(x) - 1, x.shape[1], x.shape[2]
    rows = x.reshape(-1, numbers)
    gram = rows @ rows.T
    earlier, later = gram[:-clients, :-clients], gram[clients:, clients:]
    across = gram[clients:, :-clients]  # of Y with X_t-1
    blocks = [slice(t * clients, (t + 1) * clients) for t in range(rounds)]
    cross, own = sum(across[b, b] for b in blocks), sum(earlier[b, b] for b in blocks)  # of B = 1
    left, inner = np.eye(clients), np.zeros_like(later)
    for _ in range(iterations):
        left = np.linalg.solve(own + alpha * np.eye(clients), np.transpose(cross)).T
        every = np.kron(np.eye(rounds), left)
        inner = np.linalg.inv(every @ earlier @ every.T + beta * np.eye(len(earlier)))
        turned = earlier @ every.T @ inner  # X_t-1 B = turned Y
        cross = sum(later[b] @ turned[b].T for b in blocks)
        own = sum(turned[b] @ later @ turned[b].T for b in blocks)
    last = gram[-clients:, :-clients] @ np.kron(np.eye(rounds), left).T @ inner
    return scale * (left @ (last @ rows[clients:]))
