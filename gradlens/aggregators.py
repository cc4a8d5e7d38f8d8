"""Aggregators: a log -> the aggregated update of its last round; `filtered` leaves flagged clients out.

Sums are formed in float64, in the order of the clients' names, so that the order in which they answered changes
no bit. A client with a number that is not finite never enters; without any client the update is zero. Buffers are
averaged over the clients that enter.

num_malicious: how many malicious clients a rule is to stand, None = the most that it tolerates for the cohort. A
cohort that has become too small for a number (a client is refused, or sends NaN) is treated as with None.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import numpy as np

from gradlens.detectors import Detector, Verdict
from gradlens.log import InputError, Round, UpdateLog

__all__ = [
    "AGGREGATORS",
    "Aggregator",
    "filtered",
    "geometric_median",
    "krum",
    "mean",
    "median",
    "multi_krum",
    "step",
    "trimmed_mean",
]

Aggregator = Callable[[UpdateLog], dict[str, np.ndarray]]  # layer -> aggregated update [*shape]


def mean(weighted: bool = False, cap: float = 10.0) -> Aggregator:
    """The mean of the updates, each client counting alike or by its number of examples.

    weighted: by `num_examples`, which is a claim: a client counts at most `cap` x the median client.
    Source: McMahan et al. 2017, "Communication-Efficient Learning of Deep Networks from Decentralized Data".
    """
    return Mean(weighted, float(cap))


def median() -> Aggregator:
    """The coordinate-wise median of the updates; buffers are averaged.

    Source: Yin et al. 2018, "Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates".
    """
    return Median()


def trimmed_mean(num_malicious: int | None = None) -> Aggregator:
    """The mean of each coordinate without its `num_malicious` smallest and as many of its largest values.

    num_malicious: fewer than half of the clients; None leaves one or two values, which is the median.
    Raises: InputError if it is no count.
    Source: Yin et al. 2018, arXiv 1803.01498, definition 2, with beta = num_malicious / number of clients.
    """
    return TrimmedMean(_count("trimmed_mean", "num_malicious", num_malicious))


def geometric_median(smoothing: float = 1e-6, iterations: int = 100) -> Aggregator:
    """The point whose distances to the updates have the smallest sum, found by the smoothed Weiszfeld algorithm.

    From the mean, `iterations` times: each client weighs 1 / max(smoothing, its distance to the last point). The
    weights follow from inner products, so that the coordinates are touched once; they are rounded to float32, whose
    last digit does not hang on who else took part. smoothing: a length, 1e-6 as in the paper, which is content with
    3 iterations since each costs its server a round of messages; here they cost nothing.
    Raises: InputError unless both are positive.
    Source: Pillutla, Kakade, Harchaoui 2019, "Robust Aggregation for Federated Learning" (RFA), arXiv 1912.13445,
    every client counting alike.
    """
    if not smoothing > 0:
        raise InputError(f"geometric_median: smoothing is a length above 0, found {smoothing!r}")
    return GeometricMedian(float(smoothing), _count("geometric_median", "iterations", iterations, 1) or 1)


def krum(num_malicious: int | None = None) -> Aggregator:
    """The update of the one client that is nearest to its neighbours.

    Of n clients each scores the sum of its squared distances to the n - num_malicious - 2 nearest others; the
    smallest score wins, among equal ones the first name.
    num_malicious: n > 2 num_malicious + 2. Raises: InputError if it is no count.
    Source: Blanchard et al. 2017, "Machine Learning with Adversaries", section 4.
    """
    return Krum(_count("krum", "num_malicious", num_malicious))


def multi_krum(num_malicious: int | None = None, num_selected: int | None = None) -> Aggregator:
    """The mean of the `num_selected` updates of the smallest Krum scores.

    num_malicious: as for `krum`; num_selected: None = all but `num_malicious`, as most ports do; the paper leaves it
    open. Raises: InputError if one of them is no count.
    Source: Blanchard et al. 2017, section 4.1, which computes the scores once.
    """
    counted = _count("multi_krum", "num_malicious", num_malicious)
    return MultiKrum(counted, _count("multi_krum", "num_selected", num_selected, 1))


AGGREGATORS: Mapping[str, Callable[..., Aggregator]] = {
    "mean": mean,
    "median": median,
    "trimmed_mean": trimmed_mean,
    "geometric_median": geometric_median,
    "krum": krum,
    "multi_krum": multi_krum,
}


def filtered(aggregate: Aggregator, detector: Detector) -> "FilteredAggregator":
    """Aggregates the clients of the last round that the detector does not flag.

    Where everybody is flagged the update is zero, so that the global model stays; a detector that abstains
    flags nobody but those that no verdict trusts: refused, not finite, of an absurd size.
    """
    return FilteredAggregator(aggregate, detector)


def step(
    global_model: Mapping[str, np.ndarray],
    update: Mapping[str, np.ndarray],
    server_learning_rate: float = 1.0,
    *,
    momentum: float = 0.0,
    before: Mapping[str, np.ndarray] | None = None,
    buffers: Collection[str] = (),
) -> dict[str, np.ndarray]:
    """The next global model, layer -> array: global + server learning rate x update + momentum x last change.

    before: the global model before the last round, None in the first one. Buffers take the update as it is. In
    float64, then back to each layer's own dtype (integers rounded). Raises KeyError for a layer without update.
    """

    def moved(name: str, array: np.ndarray) -> np.ndarray:
        now = np.asarray(array, np.float64)
        if name in buffers:
            return now + update[name]
        pushed = momentum * (now - before[name]) if momentum and before is not None else 0.0
        return np.float64(server_learning_rate) * update[name] + now + pushed

    return {name: _cast(moved(name, array), array.dtype) for name, array in global_model.items()}


@dataclass(frozen=True)
class Mean:
    """What `mean` builds."""

    weighted: bool
    cap: float

    def __call__(self, log: UpdateLog) -> dict[str, np.ndarray]:
        round_, rows = log[-1], _rows(log[-1])
        weights = _capped(round_.num_examples[rows], self.cap) if self.weighted else np.ones(len(rows))
        return _averaged(log, rows, weights)

    def __repr__(self) -> str:
        return f"mean(weighted={self.weighted}, cap={self.cap:g})"


@dataclass(frozen=True)
class Median:
    """What `median` builds."""

    def __call__(self, log: UpdateLog) -> dict[str, np.ndarray]:
        return _trimmed(log, None)

    def __repr__(self) -> str:
        return "median()"


@dataclass(frozen=True)
class TrimmedMean:
    """What `trimmed_mean` builds."""

    num_malicious: int | None

    def __call__(self, log: UpdateLog) -> dict[str, np.ndarray]:
        return _trimmed(log, self.num_malicious)

    def __repr__(self) -> str:
        return f"trimmed_mean(num_malicious={self.num_malicious})"


@dataclass(frozen=True)
class GeometricMedian:
    """What `geometric_median` builds."""

    smoothing: float
    iterations: int

    def __call__(self, log: UpdateLog) -> dict[str, np.ndarray]:
        gram = log[-1].total_gram  # before the question who is finite, which it answers on the way
        rows = _rows(log[-1])
        gram = gram[np.ix_(rows, rows)]
        return _averaged(log, rows, weiszfeld(gram, self.smoothing, self.iterations))

    def __repr__(self) -> str:
        return f"geometric_median(smoothing={self.smoothing:g}, iterations={self.iterations})"


@dataclass(frozen=True)
class Krum:
    """What `krum` builds."""

    num_malicious: int | None

    def __call__(self, log: UpdateLog) -> dict[str, np.ndarray]:
        nearest = _by_krum(log[-1], self.num_malicious)[0][:1]
        return _averaged(log, nearest, np.ones(len(nearest)))

    def __repr__(self) -> str:
        return f"krum(num_malicious={self.num_malicious})"


@dataclass(frozen=True)
class MultiKrum:
    """What `multi_krum` builds."""

    num_malicious: int | None
    num_selected: int | None

    def __call__(self, log: UpdateLog) -> dict[str, np.ndarray]:
        rows, stood = _by_krum(log[-1], self.num_malicious)
        rows = rows[: self.num_selected or len(rows) - stood]
        rows = rows[np.argsort(log[-1].clients[rows])]
        return _averaged(log, rows, np.ones(len(rows)))

    def __repr__(self) -> str:
        return f"multi_krum(num_malicious={self.num_malicious}, num_selected={self.num_selected})"


@dataclass(frozen=True)
class FilteredAggregator:
    """What `filtered` builds."""

    aggregate: Aggregator
    detector: Detector

    def __call__(self, log: UpdateLog) -> dict[str, np.ndarray]:
        return self.aggregate(log.keep(self.kept(log)))

    def verdict(self, log: UpdateLog) -> Verdict:
        """What the detector says of the last round."""
        return log.verdict(self.detector)

    def kept(self, log: UpdateLog) -> np.ndarray:
        """Which recorded clients of the last round are aggregated, bool [client]."""
        verdict = self.verdict(log)
        return ~np.isin(log[-1].clients, verdict.clients[verdict.flags])

    def __repr__(self) -> str:
        return f"filtered({self.aggregate!r}, {self.detector!r})"


def _rows(round_: Round) -> np.ndarray:
    """Positions of the clients whose numbers are all finite, in the order of their names."""
    order = np.argsort(round_.clients)
    return order[round_.finite[order]]


def _capped(num_examples: np.ndarray, cap: float) -> np.ndarray:
    """Weights [client] of the claimed numbers of examples; all alike where nobody claims any."""
    claims = np.maximum(num_examples, 0).astype(np.float64)
    weights = np.minimum(claims, cap * np.median(claims)) if len(claims) else claims
    return weights if weights.any() else np.ones(len(claims))


def _averaged(log: UpdateLog, rows: np.ndarray, weights: np.ndarray) -> dict[str, np.ndarray]:
    """The weighted mean of these clients of the last round."""
    return {name: log[-1].weighted_mean(name, rows, weights) for name in log.model}


def _trimmed(log: UpdateLog, num_malicious: int | None) -> dict[str, np.ndarray]:
    """The mean of each coordinate's middle values; None: of the one or two in the very middle."""
    round_, rows = log[-1], _rows(log[-1])
    trimmed = _stood(num_malicious, (len(rows) - 1) // 2)
    return {
        layer.name: round_.trimmed_mean(layer.name, trimmed, round_.finite)
        if layer.kind == "parameter"
        else round_.weighted_mean(layer.name, rows, np.ones(len(rows)))
        for layer in log.model.layers
    }


def _by_krum(round_: Round, num_malicious: int | None) -> tuple[np.ndarray, int]:
    """Positions of the finite clients from the smallest Krum score to the largest, and how many are stood."""
    distances = round_.squared_distances  # before the question who is finite, which it answers on the way
    rows = _rows(round_)
    stood = _stood(num_malicious, (len(rows) - 3) // 2)
    distances = distances[np.ix_(rows, rows)]
    np.fill_diagonal(distances, np.inf)  # nobody is its own neighbour
    neighbours = max(1, len(rows) - stood - 2) if len(rows) > 1 else 0
    scores = np.sort(distances, axis=1)[:, :neighbours].sum(axis=1)
    return rows[np.argsort(scores, kind="stable")], stood


def _stood(num_malicious: int | None, most: int) -> int:
    """How many malicious clients the rule is to stand, of the most that it can."""
    most = max(0, most)
    return most if num_malicious is None else min(num_malicious, most)


def weiszfeld(gram: np.ndarray, smoothing: float, iterations: int) -> np.ndarray:
    """Weights [client] of the geometric median, the largest 1, from inner products [client, client]."""
    weights = np.ones(len(gram))
    for _ in range(iterations if len(gram) else 0):
        shares = weights / weights.sum()
        products = gram @ shares
        squares = np.diagonal(gram) - 2 * products + shares @ products  # of the distances to the last point
        nearness = 1 / np.maximum(smoothing, np.sqrt(np.maximum(squares, 0)))
        before, weights = weights, nearness / nearness.max()
        if (np.abs(weights - before) <= 1e-12 * before).all():
            break
    return weights.astype(np.float32).astype(np.float64)


def _count(rule: str, setting: str, value: int | None, least: int = 0) -> int | None:
    """The setting; raises InputError where it is neither None nor a count."""
    if value is not None and (isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least):
        raise InputError(f"{rule}: {setting} is a whole number of at least {least}, or None, found {value!r}")
    return None if value is None else int(value)


def _cast(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Float64 numbers as `dtype`: integers rounded, what is beyond float32 infinite."""
    with np.errstate(over="ignore"):
        return np.asarray(np.rint(values) if np.issubdtype(dtype, np.integer) else values, dtype)
