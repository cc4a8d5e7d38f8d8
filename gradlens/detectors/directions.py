"""Published detectors that judge which way the updates point: AlignIns, RLR, FLTrust, SignGuard."""

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from gradlens.clustering import majority_cluster
from gradlens.detectors.distances import drawn, global_products, inner_products, numbers_at
from gradlens.detectors.published import Judgement, evidence_of, published
from gradlens.detectors.verdict import Detector
from gradlens.errors import CannotSay, InputError
from gradlens.geometry import cosines, ratio
from gradlens.log import Round, UpdateLog
from gradlens.settings import positive, share, whole_number

__all__ = ["alignins", "fltrust", "rlr", "signguard"]

Reference = Callable[[UpdateLog], Mapping[str, np.ndarray]]  # layer -> the server's own update [*shape]

NO_SPREAD = 1e-9  # deviation of cosines, shares or log norms below which they count as equal, as in AlignIns' program
FEWEST_SIGNS = 1_000  # coordinates whose signs SignGuard counts at least: a tenth of a small model says little
SAMPLE = 8_192  # numbers from which the k-th largest of a million is estimated


def alignins(sparsity: float = 0.3, lambda_s: float = 1.0, lambda_c: float = 1.0) -> Detector:
    """Flags clients whose alignment with the global model, or with the majority's signs, is unusual.

    Parameters
    ----------
    sparsity : float, default 0.3
        The share of coordinates that count as large; the authors' program's. Of equally large coordinates at the
        border, the mean agreement counts.
    lambda_s : float, default 1.0
        Bound of MPSA in standard deviations; the authors' program's.
    lambda_c : float, default 1.0
        Bound of TDA in standard deviations; the authors' program's.

    Returns
    -------
    Detector

    Raises
    ------
    InputError
        For a setting out of its range.

    Notes
    -----
    TDA is the cosine of the update to the global model before the round. MPSA is the share of the update's largest
    coordinates that have the sign of the sum of all clients' signs [1]_. Kept are the clients with ::

        |x - median| / standard deviation (ddof 0)

    below `lambda_c` for TDA and below `lambda_s` for MPSA. The score is the larger of the two, each divided by its
    lambda: no unit, flagged from 1 on. A standard deviation below 1e-9 counts as none.

    **Abstains** when fewer than 3 clients are comparable, or the updates were not recorded whole.

    **Fails when** nobody is malicious: with both lambdas at 1 about half of an attack-free cohort is flagged; calibrate
    the score instead. TDA says nothing about a global model of zeros.

    References
    ----------
    .. [1] Xu et al. 2025, "Detecting Backdoor Attacks in Federated Learning via Direction Alignment Inspection", CVPR,
       arXiv:2503.07978; github.com/JiiahaoXU/AlignIns, src/aggregation.py.

    Examples
    --------
    >>> from gradlens import DETECTORS
    >>> from gradlens.examples import example_log
    >>> verdict = DETECTORS["alignins"]()(example_log())
    >>> verdict.evidence.columns.tolist()
    ['tda', 'mpsa']
    """
    return published(
        _alignins,
        sparsity=share("sparsity", sparsity),
        lambda_s=positive("lambda_s", lambda_s),
        lambda_c=positive("lambda_c", lambda_c),
    )


def rlr(threshold: int | None = None) -> Detector:
    """Scores the share of a client's update that the robust learning rate would turn around; flags nobody.

    Parameters
    ----------
    threshold : int, optional
        Votes below which the learning rate is turned around; by default (n - 1) // 2 + 1, which no minority reaches
        alone. The paper's program has 4 for 10 clients and 8 for 33.

    Returns
    -------
    Detector

    Raises
    ------
    InputError
        For a setting out of its range.

    Notes
    -----
    The aggregation rule turns the learning rate around at every coordinate where the absolute sum of the clients' signs
    is below `threshold` [1]_. The score is the share of a client's update, by absolute size, at coordinates where the
    votes for its sign are fewer than `threshold` more than those against it: what is turned around, or outvoted. From 0
    to 1; 0 where all are equal. The paper turns coordinates around and rejects no client, so there are no flags;
    calibrate the score instead.

    **Abstains** when fewer than 3 clients are comparable, when `threshold` exceeds the number of clients, or when the
    updates were not recorded whole.

    **Fails when** the attacker's large coordinates have the signs of the others, and when label skew leaves benign
    clients without common signs: then most of every update is turned around.

    References
    ----------
    .. [1] Ozdayi, Kantarcioglu & Gel 2021, "Defending against Backdoors in Federated Learning with Robust Learning
    Rate",
       AAAI, arXiv:2007.03767.

    Examples
    --------
    >>> from gradlens import DETECTORS
    >>> from gradlens.examples import example_log
    >>> verdict = DETECTORS["rlr"]()(example_log())
    >>> verdict.flags.any().item(), verdict.scores.max().item() <= 1
    (False, True)
    """
    return published(_rlr, threshold=None if threshold is None else whole_number("threshold", threshold, least=1))


def fltrust(reference: Reference | None = None) -> Detector:
    """Trusts an update as far as it points the way of the server's own, and flags those that are not trusted at all.

    Parameters
    ----------
    reference : callable, optional
        ``log -> {layer: array}``: the update that the server got by training on its root data (100 examples in the
        paper) from the global model of ``log[-1]``. Without it the detector abstains.

    Returns
    -------
    Detector
        Its verdicts have weights: what the paper's aggregate multiplies each update by, trust x norm of the server's
        update / norm of the client's, scaled so that the largest is 1.

    Raises
    ------
    InputError
        If the reference cannot be called; when called, if it misses a layer, has another shape or is not finite.

    Notes
    -----
    With u_0 the server's update [1]_::

        trust = max(0, cosine(u_i, u_0)),  score = 1 - cosine(u_i, u_0)

    The score goes from 0 to 2 and has no unit. Unlike other scores it is not 0 where all clients are equal, since
    nobody's score rests on other clients. An update of zeros has cosine 0. The evidence has the cosine and the ratio of
    the norms.

    **Abstains** when fewer than 3 clients are comparable, without a reference, when the server's update is zero, or
    when the updates were not recorded whole.

    **Fails when** the root data differ from the clients' (the server then distrusts benign clients), and when the
    attack keeps a positive cosine to the server's update, as a stealthy backdoor does.

    References
    ----------
    .. [1] Cao, Fang, Liu & Gong 2021, "FLTrust: Byzantine-robust Federated Learning via Trust Bootstrapping", NDSS,
       arXiv:2012.13995, algorithm 2.

    Examples
    --------
    >>> from gradlens import DETECTORS
    >>> from gradlens.examples import example_log
    >>> def reference(log):  # what training on the server's own data would give; here, the cohort's median
    ...     return log[-1].median
    >>> verdict = DETECTORS["fltrust"](reference)(example_log())
    >>> verdict.weights.max().item()
    1.0
    """
    if reference is not None and not callable(reference):
        raise InputError(f"reference must be a function log -> {{layer: array}}, found {reference!r:.80}")
    return published(_fltrust, reference=reference)


def signguard(lower: float = 0.1, upper: float = 3.0, sample: float = 0.1, seed: int = 0) -> Detector:
    """Flags updates of an unusual norm, and those with unusual shares of positive, zero and negative signs.

    Parameters
    ----------
    lower : float, default 0.1
        Multiple of the median norm below which an update is flagged; the authors' program's.
    upper : float, default 3.0
        Multiple of the median norm above which an update is flagged; the authors' program's.
    sample : float, default 0.1
        The share of random coordinates whose signs are counted, at least 1,000 of them; 0.1 as in the authors' program,
        which takes a contiguous stretch.
    seed : int, default 0
        Of the coordinates, which are drawn anew in every round.

    Returns
    -------
    Detector

    Raises
    ------
    InputError
        For a setting out of its range, or unless `lower` and `upper` lie on both sides of 1.

    Notes
    -----
    Kept are the clients within the bounds of the norm and in the largest cluster of the sign shares (each divided by
    its largest value), found by mean shift with a flat kernel [1]_; among clusters of equal size none is the minority.
    The bandwidth is the mean distance to the nearest half of the cohort: scikit-learn's estimate with quantile 0.5, of
    all clients instead of 50. The score is the larger of ::

        log(norm / median norm) / log(bound)
        distance of the sign shares to the center of the kept cluster, in bandwidths

    at least 1 for flagged clients and at most 1 for kept ones. The variants with similarity features (-Sim, -Dist) are
    not here.

    **Abstains** when fewer than 3 clients are comparable, or the updates were not recorded whole.

    **Fails when** the attack keeps to the usual norm and to the usual shares of signs, whatever their places; and when
    label skew splits benign clients into clusters.

    References
    ----------
    .. [1] Xu et al. 2022, "Byzantine-robust Federated Learning through Collaborative Malicious Gradient Filtering",
    ICDCS,
       arXiv:2109.05872; github.com/JianXu95/SignGuard, aggregators/signguard.py.

    Examples
    --------
    >>> from gradlens import DETECTORS
    >>> from gradlens.examples import example_log
    >>> verdict = DETECTORS["signguard"]()(example_log())
    >>> str(verdict.clients[verdict.evidence["norm"].argmax()]), verdict.evidence.columns.tolist()
    ('client-9', ['positive', 'zero', 'negative', 'norm'])
    """
    if not positive("lower", lower) < 1 < positive("upper", upper):
        raise InputError(f"lower and upper must lie on both sides of 1, found {lower!r} and {upper!r}")
    settings = {"sample": share("sample", sample), "seed": whole_number("seed", seed)}
    return published(_signguard, lower=float(lower), upper=float(upper), **settings)


# Methods


def _alignins(log: UpdateLog, sparsity: float, lambda_s: float, lambda_c: float) -> Judgement:
    round_ = log[-1]
    model = float(sum(np.square(round_.global_model[name], dtype=np.float64).sum() for name in round_.parameters))
    tda = cosines(log.remembered(global_products), round_.total_norms * np.sqrt(model))
    mpsa = _sign_agreement(round_, sparsity)
    scores = np.maximum(_distance_to_median(mpsa) / lambda_s, _distance_to_median(tda) / lambda_c)
    return Judgement(scores, scores >= 1 - NO_SPREAD, evidence=evidence_of(round_, {"tda": tda, "mpsa": mpsa}))


def _rlr(log: UpdateLog, threshold: int | None) -> Judgement:
    round_, clients = log[-1], len(log[-1])
    least = (clients - 1) // 2 + 1 if threshold is None else threshold
    if least > clients:
        raise CannotSay(f"threshold {least} needs {least} comparable clients, found {clients}")
    carried, total = np.zeros(clients), np.zeros(clients)
    for name in round_.parameters:
        for block in round_.blocks(name):
            votes = _votes(block)
            let_through = (votes >= least).astype(np.float32) - (votes <= -least)
            total += np.abs(block).sum(axis=1)
            carried += np.maximum(block * let_through, 0).sum(axis=1)
    shares = ratio(total - carried, total)
    return Judgement(np.where(shares > NO_SPREAD, shares, 0.0), np.zeros(clients, dtype=bool))


def _fltrust(log: UpdateLog, reference: Reference | None) -> Judgement:
    round_ = log[-1]
    if reference is None:
        raise CannotSay("FLTrust needs the server's own update: give it as reference, a function log -> {layer: array}")
    if not round_.is_whole:
        raise CannotSay("the server's own update cannot be compared with updates of which not everything was recorded")
    server = _checked(reference(log), round_)
    size = float(np.sqrt(sum(np.square(array).sum() for array in server.values())))
    if size == 0:
        raise CannotSay(f"the server's own update in round {round_.index} is zero: it has no direction")
    norms = round_.total_norms
    cosine = cosines(inner_products(round_, server), norms * size)
    ratios = ratio(np.full(len(norms), size), norms)
    weights = np.maximum(cosine, 0) * ratios
    weights /= weights.max() or 1.0
    evidence = evidence_of(round_, {"cosine": cosine, "norm_ratio": ratios})
    return Judgement(1 - cosine, cosine <= 0, weights, evidence)


def _signguard(log: UpdateLog, lower: float, upper: float, sample: float, seed: int) -> Judgement:
    round_ = log[-1]
    norms, signs = round_.total_norms, _sign_shares(round_, sample, seed)
    by_norm = _outside(norms, lower, upper)
    cluster, by_sign = majority_cluster(signs)
    kept = cluster & (by_norm < 1)
    scores = np.maximum(by_norm, by_sign)
    scores = np.where(kept, np.minimum(scores, 1.0), np.maximum(scores, 1.0))
    positives, zeros, negatives = signs.T
    evidence = {"positive": positives, "zero": zeros, "negative": negatives, "norm": norms}
    return Judgement(scores, ~kept, evidence=evidence_of(round_, evidence))


# AlignIns


def _distance_to_median(x: np.ndarray) -> np.ndarray:
    """|x - median| in standard deviations, [client] -> [client]; 0 where there is no deviation."""
    deviation = x.std()
    return np.abs(x - np.median(x)) / deviation if deviation > NO_SPREAD else np.zeros_like(x)


def _sign_agreement(round_: Round, sparsity: float) -> np.ndarray:
    """The share of each client's largest coordinates that has the sign of most clients, float64 [client]."""
    layers = [round_.flat(name) for name in round_.parameters]
    majority = [np.concatenate([np.sign(_votes(b)) for b in round_.blocks(name)]) for name in round_.parameters]
    signs = np.concatenate(majority).astype(np.float32)
    count = max(1, int(sparsity * len(signs)))

    def agreement(client: int) -> float:
        return _agreement(np.concatenate([layer[client] for layer in layers]), signs, count)

    with ThreadPoolExecutor(2) as pool:  # a client at a time: numpy works outside the interpreter's lock
        return np.array(list(pool.map(agreement, range(len(round_)))))


def _agreement(row: np.ndarray, signs: np.ndarray, count: int) -> float:
    edge, above, at = kth_largest(np.abs(row), count)
    agreeing = np.count_nonzero(row * signs > edge)
    # a zero agrees with a vote that is level
    at_edge = np.count_nonzero(row[at] * signs[at] > 0 if edge > 0 else signs[at] == 0)
    return (agreeing + (count - above) * at_edge / len(at)) / count


def kth_largest(sizes: np.ndarray, k: int) -> tuple[float, int, np.ndarray]:
    """The k-th largest number, how many are larger, and the positions of those that equal it.

    Looks between two numbers that a sample places around it; partitioning all of them takes 5 times longer.

    Parameters
    ----------
    sizes : ndarray [number]
    k : int
        From 1 to the count of numbers.

    Returns
    -------
    edge : float
    larger : int
    at_edge : ndarray, int64 [equal number]

    Examples
    --------
    >>> edge, larger, at_edge = kth_largest(np.array([3.0, 1.0, 3.0, 9.0]), 2)
    >>> edge, larger, at_edge.tolist()
    (3.0, 1, [0, 2])
    """
    sample = np.sort(sizes[:: max(1, len(sizes) // SAMPLE)])
    place, margin = int(len(sample) * (1 - k / len(sizes))), int(2 * np.sqrt(len(sample)))
    low, high = sample[max(place - margin, 0)], sample[min(place + margin, len(sample) - 1)]
    reaching = sizes >= low
    between = np.flatnonzero(reaching & (sizes <= high))
    larger = np.count_nonzero(reaching) - len(between)
    if not larger < k <= larger + len(between):
        between, larger = np.arange(len(sizes)), 0
    near, place = sizes[between], len(between) - (k - larger)
    edge = np.partition(near, place)[place]
    return float(edge), int(larger + np.count_nonzero(near > edge)), between[near == edge]


# SignGuard


def _outside(norms: np.ndarray, lower: float, upper: float) -> np.ndarray:
    """How far each norm is from the median, [client]: 0 at the median, 1 at either bound, on a logarithmic scale."""
    median = np.median(norms)
    if median == 0:
        return np.where(norms > 0, 1.0, 0.0)
    logs = np.log(np.maximum(norms / median, 1e-12))
    logs[np.abs(logs) < NO_SPREAD] = 0
    return np.where(logs > 0, logs / np.log(upper), logs / np.log(lower))


def _sign_shares(round_: Round, sample: float, seed: int) -> np.ndarray:
    """Shares of positive, zero and negative numbers among random coordinates, each over its largest, [client, 3]."""
    size = sum(np.size(round_.global_model[name]) for name in round_.parameters)
    rng = np.random.default_rng([seed, round_.index])
    numbers = numbers_at(round_.blocks, round_.parameters, drawn(round_, max(FEWEST_SIGNS, int(sample * size)), rng))
    positive, negative = np.count_nonzero(numbers > 0, axis=1), np.count_nonzero(numbers < 0, axis=1)
    shares = np.stack([positive, numbers.shape[1] - positive - negative, negative], axis=1) / numbers.shape[1]
    return shares / np.where(shares.max(axis=0) > 0, shares.max(axis=0), 1.0)


# What several of them need


def _votes(block: np.ndarray) -> np.ndarray:
    """The sum of the clients' signs at each number, [client, number] -> int32 [number]."""
    return np.add.reduce(block > 0, axis=0, dtype=np.int32) - np.add.reduce(block < 0, axis=0, dtype=np.int32)


def _checked(update: Any, round_: Round) -> dict[str, np.ndarray]:
    """The server's update as float64; raises InputError where it is not an update of this model."""
    if not isinstance(update, Mapping):
        raise InputError(f"the reference must give {{layer: array}}, found {update!r:.80}")
    checked = {}
    for name in round_.parameters:
        expected = np.shape(round_.global_model[name])
        if name not in update or np.shape(update[name]) != expected:
            found = np.shape(update[name]) if name in update else "none"
            raise InputError(f"the reference's update of {name!r} must have shape {expected}, found {found}")
        checked[name] = np.asarray(update[name], np.float64)
        if not np.isfinite(checked[name]).all():
            raise InputError(f"the reference's update of {name!r} must be finite, found numbers that are not")
    return checked
