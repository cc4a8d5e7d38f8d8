"""Rules that aggregate means of clients in place of clients: nearest-neighbor mixing and bucketing.

Mixed clients are linear combinations of clients (`Round.combined`): nothing is copied.
"""

from collections.abc import Callable, Mapping
from itertools import pairwise

import numpy as np
from scipy import sparse

from gradlens.aggregators.averages import geometric_median, mean, median, rlr, trimmed_mean
from gradlens.aggregators.neighbors import bulyan, krum, multi_krum
from gradlens.aggregators.rules import Aggregator, Rule, rows_of, tolerated_of
from gradlens.errors import InputError
from gradlens.log import UpdateLog
from gradlens.settings import configured, whole_number, whole_number_or_none

__all__ = ["RULES", "bucketing", "nearest_neighbour_mixing"]

BUCKETS = 102  # purpose of the random numbers, apart from those of noise and of simulations

RULES: Mapping[str, Callable[..., Aggregator]] = {
    "mean": mean,
    "median": median,
    "trimmed_mean": trimmed_mean,
    "geometric_median": geometric_median,
    "krum": krum,
    "multi_krum": multi_krum,
    "bulyan": bulyan,
    "rlr": rlr,
}


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
    Algorithm 1 of [1]_. As many buckets as there are malicious clients may hold one of them.

    **Fails when** those buckets are more than the rule inside tolerates.

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


def _rule(where: str, rule: str | Aggregator) -> Aggregator:
    if callable(rule):
        return rule
    if rule not in RULES:
        raise InputError(f"{where}: rule is an aggregator or one of {', '.join(RULES)}, found {rule!r:.80}")
    return RULES[rule]()
