"""Statistics of every layer in one round that compare clients with each other.

They follow from `Round.gram` and read no number of a layer again. Above 5,000 clients nothing pairwise is formed, and
they abstain.
"""

from collections.abc import Callable

import numpy as np
import pandas as pd

from gradlens.geometry import ROUNDING, TIE, centered, cosines, mean_of_largest, pairwise_cosines, squared_distances
from gradlens.log import Round, UpdateLog
from gradlens.log.kernels import two_leading
from gradlens.settings import whole_number
from gradlens.statistics.cohort import layer_by_layer, median_products

EIGENVALUE_GAP = 1e-6  # relative gap below which two eigenvalues count as equal: between them no direction is certain


def aggregate_cosines(log: UpdateLog) -> pd.DataFrame:
    """Cosine of each client's update to the plain mean of the comparable clients' updates, layer by layer.

    Parameters
    ----------
    log : UpdateLog
        The rounds so far; the last one is judged.

    Returns
    -------
    DataFrame, float64 [client, layer]
        From -1 to 1; 0 where either norm is 0.

    Raises
    ------
    CannotSay
        Where it abstains.

    Notes
    -----
    The mean includes the client's own update.

    **Abstains** when fewer than 3 clients are comparable, or more than 5,000 took part.

    **Fails when** a client sends a large update: unlike the median of `layer_cosines`, the mean follows it, and its
    cosine is then high.

    Examples
    --------
    >>> from gradlens.examples import example_log
    >>> from gradlens.statistics import aggregate_cosines
    >>> cosines = aggregate_cosines(example_log())["fc1.weight"]
    >>> bool(cosines["client-9"] > cosines.median())  # the mean follows the boosted update
    True
    """
    return _by_gram(log, _mean_cosines)


def spectral(log: UpdateLog) -> pd.DataFrame:
    """How far each client lies along the direction in which the cohort differs most, layer by layer.

    Parameters
    ----------
    log : UpdateLog
        The rounds so far; the last one is judged.

    Returns
    -------
    DataFrame, float64 [client, layer]
        At least 0, without a unit; 0 for all where the updates are equal, or where no direction leads because the two
        largest eigenvalues are equal (a relative gap below 1e-6).

    Raises
    ------
    CannotSay
        Where it abstains.

    Notes
    -----
    The updates minus the mean of the comparable clients' are projected on their first principal direction v (the
    leading eigenvector of the centered Gram matrix), and the length of the projection is divided by the cohort's median
    distance from the mean; clients that lie on the mean do not enter that median::

        |<u_i - mean, v>| / median over j of |u_j - mean|

    This is the spectral signature of [1]_, applied to updates as in DnC [2]_; both square it, and DnC looks at a random
    sample of all layers at once.

    **Abstains** when fewer than 3 clients are comparable, or more than 5,000 took part.

    **Fails when** label skew is what the cohort differs in most, or several attackers make up so much of the cohort
    that the mean lies between the two groups.

    References
    ----------
    .. [1] Tran, Li & Madry 2018, arXiv:1811.00636.
    .. [2] Shejwalkar & Houmansadr 2021, NDSS.

    Examples
    --------
    >>> from gradlens.examples import example_log
    >>> from gradlens.statistics import spectral
    >>> spectral(example_log())["fc1.weight"].idxmax()
    'client-9'
    """
    return _by_gram(log, _leading)


def neighbour_distances(log: UpdateLog, neighbours: int | None = None) -> pd.DataFrame:
    """Mean distance of each client's update from those of its nearest clients, layer by layer.

    Parameters
    ----------
    log : UpdateLog
        The rounds so far; the last one is judged.
    neighbours : int, optional
        How many of the nearest; by default half of the others, rounded down, so that a minority cannot be its own
        neighborhood; at most all others.

    Returns
    -------
    DataFrame, float64 [client, layer]
        In units of the weights; a distance below a millionth of the two norms is 0.

    Raises
    ------
    CannotSay
        Where it abstains.
    InputError
        Unless `neighbours` is a whole number of at least 1.

    Notes
    -----
    The measure is our own, of the kind of Krum's, which sums squared distances.

    **Abstains** when fewer than 3 clients are comparable, or more than 5,000 took part.

    **Fails when** malicious updates lie among the benign ones, or label skew spreads the benign ones farther apart.

    Examples
    --------
    >>> from gradlens.examples import example_log
    >>> from gradlens.statistics import neighbour_distances
    >>> neighbour_distances(example_log())["fc1.weight"].idxmax()
    'client-9'
    """
    if neighbours is not None:
        whole_number("neighbour_distances: neighbours", neighbours, least=1)
    return _by_gram(log, lambda gram: _nearest_distances(gram, neighbours))


def neighbour_cosines(log: UpdateLog, neighbours: int = 3) -> pd.DataFrame:
    """Mean cosine of each client's update to those nearest to it in direction, layer by layer.

    Parameters
    ----------
    log : UpdateLog
        The rounds so far; the last one is judged.
    neighbours : int, default 3
        As many as the accomplices that an attacker is expected to have; at most all others. The default is our own.

    Returns
    -------
    DataFrame, float64 [client, layer]
        From -1 to 1; 1 for equal updates, 0 for a client that lies on the median.

    Raises
    ------
    CannotSay
        Where it abstains.
    InputError
        Unless `neighbours` is a whole number of at least 1.

    Notes
    -----
    The cosines are those of the updates minus the cohort's coordinate-wise median, so that what most clients have in
    common does not count: sybils, which pull the same way, have high values. (Minus the mean, which they move, it would
    be the others.) FoolsGold [1]_ takes the one nearest, uncentered.

    **Abstains** when fewer than 3 clients are comparable, or more than 5,000 took part.

    **Fails when** there is a single attacker, or benign clients share unusual labels and so a direction.

    References
    ----------
    .. [1] Fung, Yoon & Beschastnikh 2020, RAID, arXiv:1808.04866.

    Examples
    --------
    >>> from gradlens.examples import example_log
    >>> from gradlens.statistics import neighbour_cosines
    >>> cosines = neighbour_cosines(example_log(num_malicious=3), neighbours=2)["fc1.weight"]
    >>> sorted(cosines.nlargest(3).index)
    ['client-7', 'client-8', 'client-9']
    """
    whole_number("neighbour_cosines: neighbours", neighbours, least=1)
    dots = log.remembered(median_products)

    def of_layer(round_: Round, name: str) -> np.ndarray:
        return _nearest_cosines(_comparable_gram(round_, name), *dots[name], neighbours)

    return layer_by_layer(log, of_layer)


def _by_gram(log: UpdateLog, measure: Callable[[np.ndarray], np.ndarray]) -> pd.DataFrame:
    """The table of a measure of the comparable clients' inner products in a layer, [client, client] -> [client]."""

    return layer_by_layer(log, lambda round_, name: measure(_comparable_gram(round_, name)))


def _comparable_gram(round_: Round, layer: str) -> np.ndarray:
    return round_.gram[layer][np.ix_(round_.comparable, round_.comparable)]


def _mean_cosines(gram: np.ndarray) -> np.ndarray:
    dots, squares = gram.mean(axis=1), np.diagonal(gram)  # with the mean update, with itself
    mean_square = dots.mean()
    if mean_square <= ROUNDING * squares.mean():
        return np.zeros(len(gram))
    return cosines(dots, np.sqrt(squares * mean_square), clip=False)


def _leading(gram: np.ndarray) -> np.ndarray:
    means = gram.mean(axis=1)
    about_mean = _without_center(centered(gram, means, means.mean()), gram)
    distances = np.sqrt(np.diagonal(about_mean))
    if not distances.any():
        return np.zeros(len(gram))
    (second, first), vectors = two_leading(about_mean)
    if first - second <= EIGENVALUE_GAP * first:
        return np.zeros(len(gram))
    component = np.abs(vectors[:, 1])
    component[component < TIE * component.max()] = 0  # rounding
    return np.sqrt(first) * component / np.median(distances[distances > 0])


def _nearest_distances(gram: np.ndarray, neighbours: int | None) -> np.ndarray:
    distances = np.sqrt(squared_distances(gram))
    count = (len(gram) - 1) // 2 if neighbours is None else neighbours
    return np.sort(distances, axis=1)[:, 1 : count + 1].mean(axis=1)  # the first is the client itself


def _nearest_cosines(gram: np.ndarray, dots: np.ndarray, square: float, neighbours: int) -> np.ndarray:
    about_median = _without_center(centered(gram, dots, square), gram)
    return mean_of_largest(pairwise_cosines(about_median), np.ones(len(gram), bool), neighbours)


def _without_center(about_center: np.ndarray, gram: np.ndarray) -> np.ndarray:
    """A centered Gram matrix with zeros for the clients that lie on the center but for rounding."""
    away = np.diagonal(about_center) > ROUNDING * np.diagonal(gram).mean()
    return np.where(away[:, None] & away[None, :], about_center, 0)
