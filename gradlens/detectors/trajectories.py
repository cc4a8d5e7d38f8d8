"""Published detectors that follow a client's rounds: FoolsGold, FLDetector, FLANDERS."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from gradlens.clustering import gap_count, lower_cluster_end
from gradlens.detectors.published import Judgement, evidence_of, published
from gradlens.detectors.verdict import Detector
from gradlens.errors import CannotSay
from gradlens.geometry import TIE, pairwise_cosines, ratio
from gradlens.log import Round, UpdateLog
from gradlens.log.accumulated import BUDGET, sketch_rows
from gradlens.log.round import BLOCK, PAIRWISE
from gradlens.settings import one_of, positive, whole_number
from gradlens.statistics import prediction_residual

__all__ = ["flanders", "fldetector", "foolsgold"]


def foolsgold(kappa: float = 1.0, layers: str = "all") -> Detector:
    """Trusts a client less, the more its history points the way of another's; flags weights below 0.5.

    Parameters
    ----------
    kappa : float, default 1.0
        How steeply weights fall with similarity; 1 is the paper's and the official code's.
    layers : {"all", "final"}, default "all"
        What the histories hold: all layers, or the final weight alone, as in several reproductions, for the features
        that tell labels (the paper gives these more weight).

    Returns
    -------
    Detector
        Its verdicts have weights from 0 to 1.

    Raises
    ------
    InputError
        For a setting out of its range.

    Notes
    -----
    A history is the sum of a client's updates over its rounds, for everybody seen so far; rounds in which the client
    was not comparable do not count. With cs_ij the cosine of two histories, 0 for j = i so that no maximum is below 0
    [1]_::

        v_i = max over j of cs_ij
        cs_ij is multiplied by v_i / v_j where v_i < v_j     (pardoning)
        w_i = 1 - max over j of cs_ij, divided by the largest of these
        weight = kappa * (ln(w_i / (1 - w_i)) + 0.5), clipped to 0 and 1

    The score is 1 - w_i, before the logarithm, which tells apart what the clipped weights do not: from 0, for the
    client least like any other, to 1. The paper has no flags; a weight below 0.5 is our own choice, at kappa 1 a score
    above 0.5. Histories of more than 1 GB are sketched (`Accumulated`).

    **Abstains** when fewer than 3 clients are comparable, when all histories point the same way (everybody would be
    everybody's sybil), when more than 5,000 clients have been seen, or without a final weight if `layers` is "final".

    **Fails when** there is a single attacker, who is like nobody; and on data that are alike for all clients (iid),
    where benign histories point the same way, too.

    References
    ----------
    .. [1] Fung, Yoon & Beschastnikh 2020, "The Limitations of Federated Learning in Sybil Settings", RAID, algorithm 1;
       arXiv:1808.04866; github.com/DistributedML/FoolsGold.

    Examples
    --------
    >>> from gradlens import DETECTORS
    >>> from gradlens.examples import example_log
    >>> verdict = DETECTORS["foolsgold"]()(example_log(rounds=8, num_malicious=3))
    >>> sorted(verdict.clients[verdict.scores.argsort()[-3:]].tolist())
    ['client-7', 'client-8', 'client-9']
    """
    kappa = positive("foolsgold: kappa", kappa)
    return published(_foolsgold, kappa=kappa, layers=one_of("foolsgold: layers", layers, "all", "final"))


def fldetector(window: int = 10, start: int | None = None, seed: int = 0) -> Detector:
    """Flags clients whose updates are harder to predict from their own past, if they form a cluster of their own.

    Parameters
    ----------
    window : int, default 10
        Rounds that are averaged, and pairs that L-BFGS uses; 10 is the official code's.
    start : int, optional
        Rounds before the first decision; by default ``window + 1``, our own choice. The official code waits 50.
    seed : int, default 0
        Of the reference samples.

    Returns
    -------
    Detector

    Raises
    ------
    InputError
        For a setting out of its range.

    Notes
    -----
    The score is the statistic `prediction_residual` minus 1: 0 means predicted as well as the average client, 1 twice
    as badly [1]_. The gap statistic [2]_ looks for 1 to 7 clusters of the scores, scaled to 0 to 1, with 10 uniform
    reference samples. Where it finds one there is no attack; otherwise 2-means splits the scores and the cluster of the
    larger mean is flagged. On a line both are solved exactly, not from random starts.

    **Abstains** when fewer than 3 clients are comparable, before `start` rounds, or while most clients have no earlier
    update to predict from.

    **Fails when** an attacker is consistent: updates that are poisoned alike in every round are predicted well.

    References
    ----------
    .. [1] Zhang, Cao, Jia & Gong 2022, KDD, arXiv:2207.09209, algorithms 1-3; github.com/zaixizhang/FLDetector,
       train_mnist.py.
    .. [2] Tibshirani, Walther & Hastie 2001 (the gap statistic).

    Examples
    --------
    >>> from gradlens import DETECTORS
    >>> from gradlens.examples import example_log
    >>> DETECTORS["fldetector"]()(example_log()).abstained
    'the log has 4 rounds, FLDetector decides from 11 on'
    >>> verdict = DETECTORS["fldetector"](window=3)(example_log(rounds=8))
    >>> str(verdict.clients[verdict.scores.argmax()])
    'client-9'
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
    """Flags clients whose local models stray farthest from a matrix autoregression's forecast.

    Parameters
    ----------
    num_malicious : int, optional
        The number f of clients that are flagged; by default fewer than half, (n - 1) // 2, our own choice: the method
        itself sets no bound.
    window : int, default 5
        Rounds, the last one included, at least 3; the default is our own.
    sampled : int, default 500
        Coordinates that are looked at, as in the authors' code.
    alpha : float, default 1.0
        Ridge on A, as in that code; of X over its largest absolute value.
    beta : float, default 1.0
        Ridge on B, likewise.
    iterations : int, default 100
        Of the alternating least squares, as in that code.
    seed : int, default 0
        Of the sampled coordinates.

    Returns
    -------
    Detector

    Raises
    ------
    InputError
        For a setting out of its range.

    Notes
    -----
    X_t [client, number] holds the local models (global model + update) at a fixed sample of coordinates [1]_. A
    [client, client] and B [number, number] minimize ::

        sum over t of |X_t - A X_(t-1) B|^2 + alpha |A|^2 + beta |B|^2

    over the rounds before the last (matrix autoregression [2]_), by alternating least squares from A = B = 1; the
    forecast is A X B. The score is the L2 norm of the client's model - forecast, over the cohort's median of it (its
    mean where that is 0), minus 1. The `num_malicious` highest are flagged; equal scores at the border are not.

    The authors' code differs: its first pair predicts the first round from the last, it starts at random, and it fits A
    and B to shifted numbers but applies them to unshifted ones. Nor are flagged clients' models replaced in the history
    by the aggregate here, since a detector does not know what was aggregated. A client that was absent or not
    comparable in an earlier round counts there as the global model.

    **Abstains** when fewer than 3 clients are comparable, before 3 rounds, when most clients were not in the round
    before, when f clients or fewer took part, or when the updates were not recorded whole.

    **Fails when** nobody is malicious, since it flags f clients all the same; when an attacker changes as steadily as
    the others do; and under client sampling, which leaves little history.

    References
    ----------
    .. [1] Gabrielli, Belli, Matrullo, Miori & Tolomei 2023, arXiv:2303.16668; github.com/adap/flower,
    baselines/flanders.
    .. [2] Chen, Xiao & Yang 2021, "Autoregressive models for matrix-valued time series".

    Examples
    --------
    >>> from gradlens import DETECTORS
    >>> from gradlens.examples import example_log
    >>> verdict = DETECTORS["flanders"](num_malicious=1)(example_log())
    >>> verdict.clients[verdict.flags].tolist()
    ['client-9']
    """
    return published(
        _flanders,
        num_malicious=None if num_malicious is None else whole_number("flanders: num_malicious", num_malicious),
        window=whole_number("flanders: window", window, least=3),
        sampled=whole_number("flanders: sampled", sampled, least=1),
        alpha=positive("flanders: alpha", alpha),
        beta=positive("flanders: beta", beta),
        iterations=whole_number("flanders: iterations", iterations, least=1),
        seed=whole_number("flanders: seed", seed),
    )


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
    """Adds the updates of one more round to the histories: a step for `UpdateLog.folded`."""

    layers: str

    def __call__(self, before: _Histories | None, log: UpdateLog) -> _Histories:
        return self._advanced(before, log, in_place=False)

    def carry(self, before: _Histories | None, log: UpdateLog) -> _Histories:
        """Does the same in the memory of the histories before."""
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
    cosines = pairwise_cosines(histories.gram)
    np.fill_diagonal(cosines, 0)
    trust, nearest = _trust(np.minimum(cosines, 1))
    rows = [histories.clients.index(client) for client in round_.clients.tolist()]
    weights = _logit(trust[rows], kappa)
    evidence = evidence_of(round_, {"similarity": nearest[rows]})
    return Judgement(1 - trust[rows], weights < 0.5, weights, evidence)


def _trust(cosines: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """1 - the largest pardoned similarity, over the largest such value; and that similarity; both [seen]."""
    most = cosines.max(axis=1)
    pardon = ratio(most[:, None], np.maximum(most[:, None], most[None, :]), otherwise=1.0)
    pardoned = (cosines * pardon).max(axis=1)
    trust = 1 - pardoned
    if trust.max() <= TIE:
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
    if np.ptp(scores) <= TIE:
        return Judgement(np.zeros(len(scores)), np.zeros(len(scores), dtype=bool), evidence=evidence)
    flags = np.zeros(len(scores), dtype=bool)
    if gap_count(scores, seed) > 1:
        flags = scores > lower_cluster_end(scores)
    return Judgement(scores, flags, evidence=evidence)


# FLANDERS


@dataclass(frozen=True)
class _Sampling:
    """Keeps the local models of the last rounds at a sample of coordinates: a step for `UpdateLog.folded`.

    For each round: the global model [number], and client -> its local model [number] where it was comparable.
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
    if np.ptp(scores) <= TIE:
        scores = np.zeros(len(scores))
    border = np.sort(scores)[len(scores) - flagged - 1]
    return Judgement(scores, scores > border + TIE)


def _forecast(models: np.ndarray, alpha: float, beta: float, iterations: int) -> np.ndarray:
    """Forecasts the next of a series of matrices [round, client, number] by X_t = A X_(t-1) B.

    A and B are fitted by alternating least squares. B is never formed: X B = (X F') (F F' + beta)^-1 Y, with F the
    stacked A X_(t-1) and Y the stacked X_t, so that all but the forecast itself is inner products of clients' rows.
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
