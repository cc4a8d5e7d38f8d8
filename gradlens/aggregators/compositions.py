"""What is put around a rule: clipping, noise, mixing, buckets; and the published rules that are made of it.

Clipped, mixed and bucketed clients are linear combinations of clients (`Round.combined`): nothing is copied. Noise and
buckets have an address, seed, purpose and round, so that a replay gives the same bits. Buffers are averaged over the
clients that enter, and never clipped or noised.
"""

from itertools import pairwise

import numpy as np
from scipy import sparse

from gradlens.aggregators.filters import filtered
from gradlens.aggregators.rules import (
    RULES,
    Aggregator,
    Rule,
    Weighing,
    averaged,
    clip_factors,
    mean,
    rows_of,
    scaled,
    tolerated_of,
)
from gradlens.detectors import flame as flame_detector
from gradlens.detectors.distances import inner_products
from gradlens.errors import InputError
from gradlens.log import UpdateLog
from gradlens.settings import configured, whole_number, whole_number_or_none

__all__ = [
    "bucketing",
    "centred_clipping",
    "clipped",
    "crfl",
    "flame",
    "nearest_neighbour_mixing",
    "noised",
    "norm_clipping",
    "weak_dp",
]

NOISE, BUCKETS = 101, 102  # purposes of random numbers, apart from those of simulations
FINEST = np.float32  # factors are rounded to it: their last digits in float64 hang on who else took part


def clipped(aggregate: Aggregator, bound: float | None = None) -> Aggregator:
    """Clips the L2 norm of each whole update to `bound`, then aggregates.

    bound: a length above 0; None: the median norm of the finite clients of the round, which is rescaled with training.
    Raises: InputError for any other bound.
    Source: Sun, Kairouz, Suresh & McMahan 2019, "Can You Really Backdoor Federated Learning?", arXiv:1911.07963,
    section 4: update / max(1, norm / bound).
    """
    return Rule(configured(_clipped, bound=_bound("clipped", bound)), aggregate, _weighing(aggregate))


def noised(aggregate: Aggregator, std: float, seed: int = 0) -> Aggregator:
    """Aggregates, then adds Gaussian noise of standard deviation `std` to each parameter of the update.

    seed: the noise of round i is drawn from default_rng([seed, 101, i]), layer after layer. Without a finite client
    there is no noise. Around a filter the noise also moves a model that the filter keeps: put the filter outside.
    Raises: InputError unless std is a finite number of at least 0 and seed a count.
    """
    method = configured(_noised, std=_std("noised", std), seed=whole_number("noised: seed", seed))
    return Rule(method, aggregate, _weighing(aggregate))


def norm_clipping(bound: float | None = None) -> Aggregator:
    """The mean of the updates, each clipped to the norm `bound`; None: the median norm of the round's clients.

    The paper's bounds are 3, 5 and 10 on updates of its own model: a bound says nothing without the benign norms.
    Raises: InputError for a bound that is no length.
    Source: Sun et al. 2019, arXiv:1911.07963, "norm thresholding of updates".
    """
    return Rule(configured(_norm_clipping, bound=_bound("norm_clipping", bound)))


def weak_dp(bound: float | None = None, std: float = 0.025, seed: int = 0) -> Aggregator:
    """Norm clipping, then Gaussian noise on the mean, too little of it for differential privacy.

    bound: as for `norm_clipping`; the paper's runs have 5. std: of the noise on the aggregate, in each coordinate;
    0.025 is the paper's as most programs read it (backdoors101 takes it for the variance: 0.158). Programs that add
    noise to the sum, as TensorFlow Privacy's GaussianSumQuery, divide theirs by the number of clients. seed: `noised`.
    Raises: InputError for a setting out of its range.
    Source: Sun et al. 2019, arXiv:1911.07963, "(weak) differential privacy".
    """
    settings = {"bound": _bound("weak_dp", bound), "std": _std("weak_dp", std)}
    return Rule(configured(_weak_dp, **settings, seed=whole_number("weak_dp: seed", seed)))


def centred_clipping(radius: float | None = None, iterations: int = 1, start: str = "last") -> Aggregator:
    """From a centre v, `iterations` times: v + the mean of the clients' differences to v, clipped to `radius`.

    start: "last", the last change of the global model, which is the last aggregate where the server's learning rate
    is 1 (zero in the first round), or "zero", as in ByzFL. radius: a length above 0, None: the median distance to the
    centre, anew in each iteration; ByzFL has 100, which clips nothing of updates that are shorter. iterations: 1.
    Raises: InputError for a setting out of its range.
    Source: Karimireddy, He & Jaggi 2021, "Learning from History for Byzantine Robust Optimization", ICML,
    arXiv:2012.10333, equation (CC); its workers send momentum.
    """
    if start not in ("last", "zero"):
        raise InputError(f"centred_clipping: start is 'last' or 'zero', found {start!r:.80}")
    count = whole_number("centred_clipping: iterations", iterations, least=1)
    length = _bound("centred_clipping", radius, "radius")
    return Rule(configured(_centred_clipping, radius=length, iterations=count, start=start))


def nearest_neighbour_mixing(rule: str | Aggregator = "mean", num_malicious: int | None = None) -> Aggregator:
    """Each client becomes the mean of the n - num_malicious clients nearest to it, itself among them; then `rule`.

    rule: an aggregator, or the name of one of `RULES` at its defaults. num_malicious: fewer than half of the clients.
    Raises: InputError for an unknown rule or what is no count. Raises CannotSay above 5,000 clients.
    Source: Allouah, Farhadkhani, Guerraoui, Gupta, Pinot & Stephan 2023, "Fixing by Mixing: A Recipe for Optimal
    Byzantine ML under Heterogeneity", AISTATS, arXiv:2302.01772, algorithm 2.
    """
    name = "nearest_neighbour_mixing"
    number = whole_number_or_none(f"{name}: num_malicious", num_malicious)
    return Rule(configured(_nearest_neighbour_mixing, num_malicious=number), _rule(name, rule))


def bucketing(rule: str | Aggregator = "mean", size: int = 2, seed: int = 0) -> Aggregator:
    """The clients are put at random into buckets of `size`, each becomes the mean of its bucket; then `rule`.

    rule: as for `nearest_neighbour_mixing`. size: 2, as in the paper's experiments; the last bucket may hold fewer.
    seed: of the buckets, drawn anew in each round. Up to as many buckets as malicious clients hold one of them.
    Raises: InputError for an unknown rule or what is no count.
    Source: Karimireddy, He & Jaggi 2022, "Byzantine-Robust Learning on Heterogeneous Datasets via Bucketing", ICLR,
    arXiv:2006.09365, algorithm 1.
    """
    count = whole_number("bucketing: size", size, least=1)
    method = configured(_bucketing, size=count, seed=whole_number("bucketing: seed", seed))
    return Rule(method, _rule("bucketing", rule))


def flame(noise: float = 0.001, seed: int = 0, on: str = "updates") -> Aggregator:
    """The clients that FLAME's clusters keep, clipped to the median norm of the whole cohort, their mean, and noise.

    noise: the standard deviation, as a share of that median norm; 0.001 as in the paper's image tasks (its ports have
    0.001 to 1.2e-5). on: "updates" or "models", see the detector `gradlens.detectors.DETECTORS["flame"]`.
    Raises: InputError for a setting out of its range.
    Source: Nguyen et al. 2022, "FLAME: Taming Backdoors in Federated Learning", USENIX Security, arXiv:2101.02281,
    algorithm 1.
    """
    flame_detector(on)  # refuses another `on`
    number = whole_number("flame: seed", seed)
    return Rule(configured(_flame, noise=_std("flame", noise, "noise"), seed=number, on=on))


def crfl(bound: float = 15.0, std: float = 0.01, seed: int = 0) -> Aggregator:
    """The mean of the updates, after which the norm of the *global model* is clipped to `bound`, and noise added.

    The update is what takes the global model there, at a server learning rate of 1 and without server momentum.
    bound: 15 as the authors' program has for MNIST, 100 for EMNIST; std: 0.01, as there. The paper leaves the noise
    out of the last round, which a server that does not know its last round cannot, and votes over noised copies when
    it predicts, which is not done here: there is no certificate.
    Raises: InputError for a setting out of its range.
    Source: Xie, Chen, Chen & Li 2021, "CRFL: Certifiably Robust Federated Learning against Backdoor Attacks", ICML,
    arXiv:2106.08283, algorithm 1; github.com/AI-secure/CRFL.
    """
    if bound is None:
        raise InputError("crfl: bound is a length above 0, found None")
    settings = {"bound": _bound("crfl", bound), "std": _std("crfl", std)}
    return Rule(configured(_crfl, **settings, seed=whole_number("crfl: seed", seed)))


def _clipped(aggregate: Aggregator, log: UpdateLog, bound: float | None) -> dict[str, np.ndarray]:
    rows = rows_of(log[-1])
    norms = log[-1].total_norms[rows]
    length = (float(np.median(norms)) if len(norms) else 0.0) if bound is None else bound
    return aggregate(scaled(log, rows, clip_factors(norms, length)))


def _noised(aggregate: Aggregator, log: UpdateLog, std: float, seed: int) -> dict[str, np.ndarray]:
    update = aggregate(log)
    return _with_noise(log, update, std, seed) if log[-1].finite.any() else update


def _norm_clipping(log: UpdateLog, bound: float | None) -> dict[str, np.ndarray]:
    return clipped(mean(), bound)(log)


def _weak_dp(log: UpdateLog, bound: float | None, std: float, seed: int) -> dict[str, np.ndarray]:
    return noised(clipped(mean(), bound), std, seed)(log)


def _centred_clipping(log: UpdateLog, radius: float | None, iterations: int, start: str) -> dict[str, np.ndarray]:
    rows = rows_of(log[-1])
    update = averaged(log, rows, np.ones(len(rows)))  # of the buffers; the parameters come next
    if not len(rows):
        return update
    part = log[-1].take(rows)
    everyone, norms, center = np.arange(len(rows)), part.total_norms, _start(log, start)
    for _ in range(iterations):
        square = sum(float(np.vdot(array, array)) for array in center.values())
        distances = np.sqrt(np.maximum(norms**2 - 2 * inner_products(part, center) + square, 0))
        bound = float(np.median(distances)) if radius is None else radius
        factors = clip_factors(distances, bound).astype(FINEST).astype(np.float64)
        stays = 1 - factors.sum() / len(rows)
        for name, array in center.items():
            center[name] = array * stays + part.weighted_mean(name, everyone, factors, len(rows))
    return update | {name: array.astype(np.float32) for name, array in center.items()}


def _start(log: UpdateLog, start: str) -> dict[str, np.ndarray]:
    """The first center of centered clipping, layer -> float64 [*shape]."""
    now = log[-1].global_model
    if start == "zero" or len(log) < 2:
        return {name: np.zeros(now[name].shape) for name in log.model.parameters}
    before = log[-2].global_model
    return {name: now[name].astype(np.float64) - before[name] for name in log.model.parameters}


def _nearest_neighbour_mixing(rule: Aggregator, log: UpdateLog, num_malicious: int | None) -> dict[str, np.ndarray]:
    distances = log[-1].squared_distances  # first: it finds the norms, by which who is finite is known
    rows = rows_of(log[-1])
    if not len(rows):
        return rule(log.keep(rows))
    distances = distances[np.ix_(rows, rows)]
    np.fill_diagonal(distances, -1)  # every client is nearest to itself
    count = len(rows) - tolerated_of(num_malicious, (len(rows) - 1) // 2)
    nearest = np.sort(np.argsort(distances, axis=1, kind="stable")[:, :count], axis=1)
    shares = (np.full(nearest.size, 1 / count), nearest.reshape(-1), np.arange(len(rows) + 1) * count)
    return rule(log.keep(rows).combined(sparse.csr_array(shares, shape=distances.shape)))


def _bucketing(rule: Aggregator, log: UpdateLog, size: int, seed: int) -> dict[str, np.ndarray]:
    rows = rows_of(log[-1])
    order = np.random.default_rng([seed, BUCKETS, log[-1].index]).permutation(len(rows))
    edges = np.append(np.arange(0, len(rows), size), len(rows))
    if not len(rows):
        return rule(log.keep(rows))
    sizes = np.diff(edges)
    members = np.concatenate([np.sort(order[start:stop]) for start, stop in pairwise(edges)])
    shares = sparse.csr_array((np.repeat(1 / sizes, sizes), members, edges), shape=(len(sizes), len(rows)))
    names = np.array([f"bucket-{number:06d}" for number in range(len(sizes))])
    return rule(log.keep(rows).combined(shares, names))


def _flame(log: UpdateLog, noise: float, seed: int, on: str) -> dict[str, np.ndarray]:
    norms = log[-1].total_norms[log[-1].finite]
    bound = float(np.median(norms)) if len(norms) else 0.0  # of the whole cohort, before the filter
    kept = filtered(mean(), flame_detector(on)).kept(log)
    rule = clipped(mean(), bound) if bound > 0 else mean()
    return noised(rule, noise * bound, seed)(log.keep(kept))


def _crfl(log: UpdateLog, bound: float, std: float, seed: int) -> dict[str, np.ndarray]:
    update = mean()(log)
    if not log[-1].finite.any():
        return update
    now = {name: log[-1].global_model[name].astype(np.float64) for name in log.model.parameters}
    following = {name: array + update[name] for name, array in now.items()}
    norm = np.sqrt(sum(float(np.vdot(array, array)) for array in following.values()))
    factor = float(clip_factors(norm, bound))
    change = {name: (array * factor - now[name]).astype(np.float32) for name, array in following.items()}
    return _with_noise(log, update | change, std, seed)


def _weighing(aggregate: Aggregator) -> Weighing | None:
    """What clients count in the mean inside a rule that is put around another, which changes nothing of that."""
    return getattr(aggregate, "weighing", None)


def _with_noise(log: UpdateLog, update: dict[str, np.ndarray], std: float, seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng([seed, NOISE, log[-1].index])
    parts = ((name, update[name]) for name in log.model.parameters)
    return update | {
        name: np.asarray(array + std * rng.standard_normal(array.shape), np.float32) for name, array in parts
    }


def _rule(where: str, rule: str | Aggregator) -> Aggregator:
    if callable(rule):
        return rule
    if rule not in RULES:
        raise InputError(f"{where}: rule is an aggregator or one of {', '.join(RULES)}, found {rule!r:.80}")
    return RULES[rule]()


def _bound(where: str, value: float | None, setting: str = "bound") -> float | None:
    if value is not None and (not _is_number(value) or not 0 < value < np.inf):
        raise InputError(f"{where}: {setting} is a length above 0, or None, found {value!r:.80}")
    return None if value is None else float(value)


def _std(where: str, value: float, setting: str = "std") -> float:
    if not _is_number(value) or not 0 <= value < np.inf:
        raise InputError(f"{where}: {setting} is a number of at least 0, found {value!r:.80}")
    return float(value)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float | np.number) and not isinstance(value, bool)
