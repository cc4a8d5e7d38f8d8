"""Wrappers of a rule: clipping, noise, mixing, buckets; `published_rules` has the published rules made of them.

Clipped, mixed and bucketed clients are linear combinations of clients (`Round.combined`): nothing is copied. Noise and
buckets are drawn from a generator seeded by seed, purpose and round, so that a replay gives the same bits. Buffers are
averaged over the clients that enter, and never clipped or noised.
"""

from itertools import pairwise

import numpy as np
from scipy import sparse

from gradlens.aggregators.rules import (
    Aggregator,
    Rule,
    Weighing,
    clip_factors,
    rows_of,
    scaled,
    tolerated_of,
)
from gradlens.aggregators.selection import RULES
from gradlens.errors import InputError
from gradlens.log import UpdateLog
from gradlens.settings import configured, whole_number, whole_number_or_none

__all__ = ["bucketing", "clipped", "nearest_neighbour_mixing", "noised"]

NOISE, BUCKETS = 101, 102  # purposes of random numbers, apart from those of simulations


def clipped(aggregate: Aggregator, bound: float | None = None) -> Aggregator:
    """Clips the L2 norm of each whole update to a bound, then aggregates.

    Parameters
    ----------
    aggregate : Aggregator
        The rule that aggregates the clipped updates.
    bound : float, optional
        A length above 0. None: the median norm of the round's finite clients, which follows training.

    Returns
    -------
    Aggregator
        Buffers are never clipped.

    Raises
    ------
    InputError
        For any other bound.

    Notes
    -----
    Each update becomes u / max(1, norm(u) / bound) ([1]_, section 4).

    **Fails when** attackers keep to the norm of benign clients.

    References
    ----------
    .. [1] Sun, Kairouz, Suresh & McMahan 2019, "Can You Really Backdoor Federated Learning?", arXiv:1911.07963.

    Examples
    --------
    >>> from gradlens.aggregators import mean
    >>> clipped(mean(), bound=1.0)
    clipped(mean(weighted=False, cap=10), bound=1)
    """
    return Rule(configured(_clipped, bound=length_or_none("clipped", bound)), aggregate, _weighing(aggregate))


def noised(aggregate: Aggregator, std: float, seed: int = 0) -> Aggregator:
    """Aggregates, then adds Gaussian noise to each parameter of the update.

    Parameters
    ----------
    aggregate : Aggregator
        The rule.
    std : float
        Standard deviation of the noise, in units of the weights, at least 0.
    seed : int
        The noise of round i is drawn from default_rng([seed, 101, i]), layer after layer.

    Returns
    -------
    Aggregator
        Buffers get no noise. Without a finite client there is none.

    Raises
    ------
    InputError
        Unless `std` is a finite number of at least 0 and `seed` a count.

    Notes
    -----
    Around a filter the noise also moves a model that the filter keeps: put the filter outside.

    **Fails when** the noise is small beside the backdoor's update, or so large that it hides what is learned.

    Examples
    --------
    >>> from gradlens.aggregators import mean
    >>> noised(mean(), std=0.01)
    noised(mean(weighted=False, cap=10), std=0.01, seed=0)
    """
    method = configured(_noised, std=deviation("noised", std), seed=whole_number("noised: seed", seed))
    return Rule(method, aggregate, _weighing(aggregate))


def nearest_neighbour_mixing(rule: str | Aggregator = "mean", num_malicious: int | None = None) -> Aggregator:
    """Replaces each client by the mean of the clients nearest to it, then aggregates.

    Parameters
    ----------
    rule : str or Aggregator
        An aggregator, or the name of one of `RULES` with its defaults.
    num_malicious : int, optional
        Fewer than half of the clients. None: the most that the cohort allows.

    Returns
    -------
    Aggregator
        Buffers are mixed in the same way.

    Raises
    ------
    InputError
        For an unknown rule, or what is no count.
    CannotSay
        Above 5,000 clients.

    Notes
    -----
    Each client becomes the mean of the n - num_malicious clients nearest to it, itself among them ([1]_, algorithm 2).

    **Fails when** the rule inside fails on clients that are more alike; mixing also spreads the attackers' updates.

    References
    ----------
    .. [1] Allouah, Farhadkhani, Guerraoui, Gupta, Pinot & Stephan 2023, "Fixing by Mixing: A Recipe for Optimal
       Byzantine ML under Heterogeneity", AISTATS, arXiv:2302.01772.

    Examples
    --------
    >>> nearest_neighbour_mixing("median", num_malicious=2)
    nearest_neighbour_mixing(median(), num_malicious=2)
    """
    name = "nearest_neighbour_mixing"
    number = whole_number_or_none(f"{name}: num_malicious", num_malicious)
    return Rule(configured(_nearest_neighbour_mixing, num_malicious=number), _rule(name, rule))


def bucketing(rule: str | Aggregator = "mean", size: int = 2, seed: int = 0) -> Aggregator:
    """Averages the clients in random buckets, then aggregates the buckets.

    Parameters
    ----------
    rule : str or Aggregator
        As for `nearest_neighbour_mixing`.
    size : int
        Clients in a bucket, 2 as in the experiments of [1]_; the last bucket may hold fewer.
    seed : int
        Of the buckets, drawn anew in each round.

    Returns
    -------
    Aggregator
        Buffers are mixed in the same way.

    Raises
    ------
    InputError
        For an unknown rule, or what is no count.

    Notes
    -----
    Algorithm 1 of [1]_. In the worst case each malicious client lies in another bucket and spoils it.

    **Fails when** more buckets hold a malicious client than the rule inside tolerates.

    References
    ----------
    .. [1] Karimireddy, He & Jaggi 2022, "Byzantine-Robust Learning on Heterogeneous Datasets via Bucketing", ICLR,
       arXiv:2006.09365.

    Examples
    --------
    >>> bucketing("median", size=2)
    bucketing(median(), size=2, seed=0)
    """
    count = whole_number("bucketing: size", size, least=1)
    method = configured(_bucketing, size=count, seed=whole_number("bucketing: seed", seed))
    return Rule(method, _rule("bucketing", rule))


def _clipped(aggregate: Aggregator, log: UpdateLog, bound: float | None) -> dict[str, np.ndarray]:
    rows = rows_of(log[-1])
    norms = log[-1].total_norms[rows]
    length = (float(np.median(norms)) if len(norms) else 0.0) if bound is None else bound
    return aggregate(scaled(log, rows, clip_factors(norms, length)))


def _noised(aggregate: Aggregator, log: UpdateLog, std: float, seed: int) -> dict[str, np.ndarray]:
    update = aggregate(log)
    return with_noise(log, update, std, seed) if log[-1].finite.any() else update


def _nearest_neighbour_mixing(rule: Aggregator, log: UpdateLog, num_malicious: int | None) -> dict[str, np.ndarray]:
    distances = log[-1].squared_distances  # first: it also computes the norms, which tell who is finite
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


def _weighing(aggregate: Aggregator) -> Weighing | None:
    """The weighing of the inner rule, which a rule around it does not change; None: all clients count alike."""
    return getattr(aggregate, "weighing", None)


def with_noise(log: UpdateLog, update: dict[str, np.ndarray], std: float, seed: int) -> dict[str, np.ndarray]:
    """Adds Gaussian noise to the parameters of an update.

    Parameters
    ----------
    log : UpdateLog
        The index of its last round seeds the noise.
    update : dict of str to array
        Layer -> array [*shape].
    std : float
        Standard deviation of the noise, in units of the weights.
    seed : int
        The noise is drawn from default_rng([seed, 101, round]), layer after layer.

    Returns
    -------
    dict of str to array
        Layer -> array [*shape], float32 for parameters; buffers as they are.

    Examples
    --------
    >>> from gradlens.aggregators import mean
    >>> from gradlens.examples import example_log
    >>> log = example_log()
    >>> with_noise(log, mean()(log), std=0.01, seed=0)["fc2.bias"].dtype
    dtype('float32')
    """
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


def length_or_none(where: str, value: float | None, setting: str = "bound") -> float | None:
    """Returns a length above 0 as a float, None as it is; raises InputError for any other value of the setting."""
    if value is not None and (not _is_number(value) or not 0 < value < np.inf):
        raise InputError(f"{where}: {setting} is a length above 0, or None, found {value!r:.80}")
    return None if value is None else float(value)


def deviation(where: str, value: float, setting: str = "std") -> float:
    """Returns a standard deviation as a float; raises InputError unless it is a finite number of at least 0."""
    if not _is_number(value) or not 0 <= value < np.inf:
        raise InputError(f"{where}: {setting} is a number of at least 0, found {value!r:.80}")
    return float(value)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float | np.number) and not isinstance(value, bool)
