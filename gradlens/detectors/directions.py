"""Published detectors that ask which way the updates point: AlignIns, RLR, FLTrust, SignGuard."""

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pandas as pd

from gradlens.detectors.distances import drawn, global_products, inner_products, numbers_at
from gradlens.detectors.published import Judgement, published
from gradlens.detectors.verdict import Detector
from gradlens.errors import CannotSay, InputError
from gradlens.log import Round, UpdateLog
from gradlens.settings import positive, share, whole_number

__all__ = ["alignins", "fltrust", "rlr", "signguard"]

Reference = Callable[[UpdateLog], Mapping[str, np.ndarray]]  # layer -> the server's own update [*shape]

FLAT = 1e-9  # deviation of a cosine or a share over the clients below which AlignIns' program takes them for equal
FEWEST = 1_000  # coordinates whose signs SignGuard counts at least: a tenth of a small model says little
SAMPLE = 8_192  # numbers from which the k-th largest of a million is guessed


def alignins(sparsity: float = 0.3, lambda_s: float = 1.0, lambda_c: float = 1.0) -> Detector:
    """Flags whose update is aligned with the global model, or with the majority's signs, unlike the others' are.

    TDA is the cosine of the update to the global model before the round; MPSA, of the update's largest coordinates,
    the share whose sign is the sign of the sum of all clients' signs. Kept is whose |x - median| / standard deviation
    (ddof 0) is below lambda_c for TDA and below lambda_s for MPSA. Score: the larger of the two, each divided by its
    lambda: no unit, flagged from 1 on.
    sparsity: the share of coordinates that count as large; among equally large ones at the edge their mean agreement
    counts. lambda_s, lambda_c: 1.0 as in the authors' program, sparsity 0.3 too. A deviation below 1e-9 counts as none.
    With lambda 1 about half of an attack-free cohort is flagged. Raises: InputError for a setting out of its range.
    Source: Xu et al. 2025, "Detecting Backdoor Attacks in Federated Learning via Direction Alignment Inspection",
    CVPR, arXiv:2503.07978; github.com/JiiahaoXU/AlignIns, src/aggregation.py.
    """
    return published(
        _alignins,
        sparsity=share("sparsity", sparsity),
        lambda_s=positive("lambda_s", lambda_s),
        lambda_c=positive("lambda_c", lambda_c),
    )


def rlr(threshold: int | None = None) -> Detector:
    """How much of a client's update the robust learning rate would not let through, as a score; it flags nobody.

    The rule turns the learning rate round at every coordinate where |sum of the clients' signs| < threshold. Score: the
    share of a client's update, by absolute size, at coordinates where the votes for its sign are fewer than
    `threshold` more than those against: what the rule turns round, or what others outvote. From 0 to 1; 0 where all
    are equal. The paper turns coordinates round and nobody away: there are no flags; calibrate the score instead.
    threshold: None: (n - 1) // 2 + 1, what no minority reaches alone; the paper's program has 4 of 10 clients and 8
    of 33. Raises: InputError for a threshold below 1. Abstains where it is above the number of clients.
    Source: Ozdayi, Kantarcioglu & Gel 2021, "Defending against Backdoors in Federated Learning with Robust Learning
    Rate", AAAI, arXiv:2007.03767.
    """
    return published(_rlr, threshold=None if threshold is None else whole_number("threshold", threshold, least=1))


def fltrust(reference: Reference | None = None) -> Detector:
    """Trusts an update as far as it points the way of the server's own, and flags who is not trusted at all.

    Trust is max(0, cosine of the update to the server's). Score: 1 - cosine, from 0 to 2, no unit; unlike other scores
    it is not 0 where all clients are equal, since nobody's score rests on other clients. An update of zeros has
    cosine 0. Weights: what the paper's aggregate multiplies each update by, trust x norm of the server's / norm of
    the client's, scaled so that the largest is 1; the evidence has the cosine and that ratio of norms.
    reference: a function log -> {layer: array}, what the server got by training on its root data (100 examples in the
    paper) from the global model of `log[-1]`; without one the detector abstains.
    Raises: InputError where the reference cannot be called, or misses a layer, has another shape or is not finite.
    Abstains where the server's update is zero.
    Source: Cao, Fang, Liu & Gong 2021, "FLTrust: Byzantine-robust Federated Learning via Trust Bootstrapping", NDSS,
    arXiv:2012.13995, algorithm 2.
    """
    if reference is not None and not callable(reference):
        raise InputError(f"reference must be a function log -> {{layer: array}}, found {reference!r:.80}")
    return published(_fltrust, reference=reference)


def signguard(lower: float = 0.1, upper: float = 3.0, sample: float = 0.1, seed: int = 0) -> Detector:
    """Flags updates of an unusual norm, and those whose shares of positive, zero and negative signs are unlike most.

    Kept is whose norm is between `lower` and `upper` times the median norm, and who is in the largest cluster of the
    sign shares (each divided by its largest value), found by mean shift with a flat kernel; among clusters of equal
    size none is the minority. Score: the larger of log(norm / median) / log(bound) and the distance of the sign shares
    to the centre of the kept cluster, in bandwidths; at least 1 for whom it flags, at most 1 for whom it keeps.
    lower, upper: 0.1 and 3.0 as in the authors' program. sample: the share of random coordinates whose signs are
    counted, 0.1 as there (which takes a contiguous stretch), at least 1,000 of them. seed: of these, drawn afresh in
    every round. The bandwidth is the mean distance to the nearest half of the cohort, scikit-learn's estimate with
    quantile 0.5, of all clients instead of 50. The variants with similarity features (-Sim, -Dist) are not here.
    Raises: InputError for a setting out of its range.
    Source: Xu et al. 2022, "Byzantine-robust Federated Learning through Collaborative Malicious Gradient Filtering",
    ICDCS, arXiv:2109.05872; github.com/JianXu95/SignGuard, aggregators/signguard.py.
    """
    if not positive("lower", lower) < 1 < positive("upper", upper):
        raise InputError(f"lower and upper must lie on both sides of 1, found {lower!r} and {upper!r}")
    settings = {"sample": share("sample", sample), "seed": whole_number("seed", seed)}
    return published(_signguard, lower=float(lower), upper=float(upper), **settings)


# Rules


def _alignins(log: UpdateLog, sparsity: float, lambda_s: float, lambda_c: float) -> Judgement:
    round_ = log[-1]
    model = float(sum(np.square(round_.global_model[name], dtype=np.float64).sum() for name in round_.parameters))
    tda = _cosines(log.remembered(global_products), round_.total_norms * np.sqrt(model))
    mpsa = _sign_agreement(round_, sparsity)
    scores = np.maximum(_distance_to_median(mpsa) / lambda_s, _distance_to_median(tda) / lambda_c)
    evidence = pd.DataFrame({"tda": tda, "mpsa": mpsa}, index=round_.clients)
    return Judgement(scores, scores >= 1 - FLAT, evidence=evidence)


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
    shares = np.divide(total - carried, total, out=np.zeros(clients), where=total > 0)
    return Judgement(np.where(shares > FLAT, shares, 0.0), np.zeros(clients, dtype=bool))


def _fltrust(log: UpdateLog, reference: Reference | None) -> Judgement:
    round_ = log[-1]
    if reference is None:
        raise CannotSay("FLTrust needs the server's own update: give it as reference, a function log -> {layer: array}")
    if not round_.is_whole:
        raise CannotSay("the server's own update cannot be compared with updates of which not everything was recorded")
    own = _checked(reference(log), round_)
    size = float(np.sqrt(sum(np.square(array).sum() for array in own.values())))
    if size == 0:
        raise CannotSay(f"the server's own update in round {round_.index} is zero: it has no direction")
    norms = round_.total_norms
    cosines = _cosines(inner_products(round_, own), norms * size)
    ratios = np.divide(size, norms, out=np.zeros_like(norms), where=norms > 0)
    weights = np.maximum(cosines, 0) * ratios
    weights /= weights.max() or 1.0
    evidence = pd.DataFrame({"cosine": cosines, "norm_ratio": ratios}, index=round_.clients)
    return Judgement(1 - cosines, cosines <= 0, weights, evidence)


def _signguard(log: UpdateLog, lower: float, upper: float, sample: float, seed: int) -> Judgement:
    round_ = log[-1]
    norms, signs = round_.total_norms, _sign_shares(round_, sample, seed)
    by_norm = _outside(norms, lower, upper)
    cluster, by_sign = _majority(signs)
    kept = cluster & (by_norm < 1)
    scores = np.maximum(by_norm, by_sign)
    scores = np.where(kept, np.minimum(scores, 1.0), np.maximum(scores, 1.0))
    evidence = pd.DataFrame(signs, index=round_.clients, columns=["positive", "zero", "negative"])
    return Judgement(scores, ~kept, evidence=evidence.assign(norm=norms))


# AlignIns


def _distance_to_median(x: np.ndarray) -> np.ndarray:
    """|x - median| in standard deviations, [client] -> [client]; 0 where there is no deviation."""
    deviation = x.std()
    return np.abs(x - np.median(x)) / deviation if deviation > FLAT else np.zeros_like(x)


def _sign_agreement(round_: Round, sparsity: float) -> np.ndarray:
    """Of each client's largest coordinates, the share that has the sign of most clients, float64 [client]."""
    layers = [round_.flat(name) for name in round_.parameters]
    majority = [np.concatenate([np.sign(_votes(b)) for b in round_.blocks(name)]) for name in round_.parameters]
    signs = np.concatenate(majority).astype(np.float32)
    count = max(1, int(sparsity * len(signs)))

    def agreement(client: int) -> float:
        return _agreement(np.concatenate([layer[client] for layer in layers]), signs, count)

    with ThreadPoolExecutor(2) as pool:  # a client at a time: numpy works outside the interpreter's lock
        return np.array(list(pool.map(agreement, range(len(round_)))))


def _agreement(row: np.ndarray, signs: np.ndarray, count: int) -> float:
    edge, above, at = _largest(np.abs(row), count)
    agreeing = np.count_nonzero(row * signs > edge)
    # a zero agrees with a vote that is level
    at_edge = np.count_nonzero(row[at] * signs[at] > 0 if edge > 0 else signs[at] == 0)
    return (agreeing + (count - above) * at_edge / len(at)) / count


def _largest(sizes: np.ndarray, k: int) -> tuple[float, int, np.ndarray]:
    """The k-th largest number, how many are larger, and the positions of those that equal it.

    It is looked for between two numbers that a sample places around it: to partition them all takes 5 x longer.
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
    """How far each norm is from the median, [client]: 0 at it, 1 at either bound, on the scale of its logarithm."""
    median = np.median(norms)
    if median == 0:
        return np.where(norms > 0, 1.0, 0.0)
    logs = np.log(np.maximum(norms / median, 1e-12))
    logs[np.abs(logs) < FLAT] = 0
    return np.where(logs > 0, logs / np.log(upper), logs / np.log(lower))


def _sign_shares(round_: Round, sample: float, seed: int) -> np.ndarray:
    """Shares of positive, zero and negative numbers among random coordinates, each by its largest, [client, 3]."""
    size = sum(np.size(round_.global_model[name]) for name in round_.parameters)
    rng = np.random.default_rng([seed, round_.index])
    numbers = numbers_at(round_.blocks, round_.parameters, drawn(round_, max(FEWEST, int(sample * size)), rng))
    positive, negative = np.count_nonzero(numbers > 0, axis=1), np.count_nonzero(numbers < 0, axis=1)
    shares = np.stack([positive, numbers.shape[1] - positive - negative, negative], axis=1) / numbers.shape[1]
    return shares / np.where(shares.max(axis=0) > 0, shares.max(axis=0), 1.0)


def _majority(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Who is in the largest mean-shift cluster, bool [client], and everybody's distance to its centre in bandwidths."""
    apart = np.linalg.norm(x[:, None] - x, axis=2)
    bandwidth = np.sort(apart, axis=1)[:, max(len(x) // 2, 1) - 1].mean()  # a client is its own nearest
    labels, centres = _mean_shift(x, bandwidth)
    sizes = np.bincount(labels[labels >= 0], minlength=len(centres))
    largest = np.flatnonzero(sizes == sizes.max())
    distances = np.linalg.norm(x[:, None] - centres[largest], axis=2).min(axis=1)
    scale = bandwidth if bandwidth > 0 else distances.max()
    return np.isin(labels, largest), distances / scale if scale > 0 else distances


def _mean_shift(x: np.ndarray, bandwidth: float) -> tuple[np.ndarray, np.ndarray]:
    """Labels [client], -1 outside every cluster, and centres [cluster, feature] of mean shift with a flat kernel.

    Every client climbs to the mean of what lies within the bandwidth until it stays; of centres nearer than the
    bandwidth the one with more clients within it remains. scikit-learn's `MeanShift`, which takes 20 x longer.
    """
    centres, reach = x[np.lexsort(x.T)], bandwidth + FLAT
    for _ in range(300):
        within = np.linalg.norm(centres[:, None] - x, axis=2) <= reach
        moved = within @ x / within.sum(axis=1, keepdims=True)
        still = np.linalg.norm(moved - centres, axis=1).max() <= 1e-3 * bandwidth
        centres = moved
        if still:
            break
    count = (np.linalg.norm(centres[:, None] - x, axis=2) <= reach).sum(axis=1)
    chosen: list[np.ndarray] = []
    for centre in centres[np.lexsort((*np.round(centres, 9).T[::-1], count))[::-1]]:
        if all(np.linalg.norm(centre - other) > reach for other in chosen):
            chosen.append(centre)
    apart = np.linalg.norm(x[:, None] - np.array(chosen), axis=2)
    return np.where(apart.min(axis=1) <= reach, apart.argmin(axis=1), -1), np.array(chosen)


# What several of them need


def _votes(block: np.ndarray) -> np.ndarray:
    """The sum of the clients' signs at each number, [client, number] -> int32 [number]."""
    return np.add.reduce(block > 0, axis=0, dtype=np.int32) - np.add.reduce(block < 0, axis=0, dtype=np.int32)


def _cosines(products: np.ndarray, norms: np.ndarray) -> np.ndarray:
    return np.clip(np.divide(products, norms, out=np.zeros_like(products), where=norms > 0), -1.0, 1.0)


def _checked(update: Any, round_: Round) -> dict[str, np.ndarray]:
    """The server's own update as float64; raises InputError where it is not an update of this model."""
    if not isinstance(update, Mapping):
        raise InputError(f"the reference must give {{layer: array}}, found {update!r:.80}")
    own = {}
    for name in round_.parameters:
        expected = np.shape(round_.global_model[name])
        if name not in update or np.shape(update[name]) != expected:
            found = np.shape(update[name]) if name in update else "none"
            raise InputError(f"the reference's update of {name!r} must have shape {expected}, found {found}")
        own[name] = np.asarray(update[name], np.float64)
        if not np.isfinite(own[name]).all():
            raise InputError(f"the reference's update of {name!r} must be finite, found numbers that are not")
    return own
