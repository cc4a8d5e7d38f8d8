"""Statistics of every layer in one round: size, direction, shape, and who lies near whom.

What compares clients with one another follows from `round.gram` and touches no number of a layer again; above
5,000 clients nothing pairwise is formed, and those statistics cannot say.
"""

from collections.abc import Callable, Iterator, Mapping

import numpy as np
import pandas as pd

from gradlens.errors import CannotSay, InputError
from gradlens.log import Layer, Round, UpdateLog
from gradlens.log.kernels import two_leading
from gradlens.settings import whole_number
from gradlens.statistics.cohort import cohort, table

ROUNDING = 1e-12  # of squared norms; below it, a difference of equal numbers
EQUAL = 1e-6  # relative gap below which two eigenvalues count as equal: between them no direction is certain
MOMENTS = 1e-4  # share of the squares that must be left about the mean: moments have about six digits
LARGEST = float(np.finfo(np.float32).max)
KURTOSIS_FROM = 24  # numbers of a layer: from here on the standard error sqrt(24 / numbers) is at most 1


def layer_norms(log: UpdateLog) -> pd.DataFrame:
    """L2 norm of each client's update in the last round, layer by layer.

    Returns: float64 [client, layer], in units of the weights. Raises: CannotSay below 3 comparable clients.
    """
    round_ = cohort(log)
    return table(round_, log.model.parameters, np.stack([round_.norms[n] for n in log.model.parameters], axis=1))


def layer_cosines(log: UpdateLog) -> pd.DataFrame:
    """Cosine of each client's update to the coordinate-wise median of the cohort's, layer by layer.

    Of a layer that is recorded as a sketch it is the median of the sketches, whose numbers are sums over the layer and
    therefore have a median nearer to their mean, which a few clients move.
    Returns: float64 [client, layer], from -1 to 1; 0 where either norm is 0.
    Raises: CannotSay below 3 comparable clients.
    """
    dots = log.remembered(_median_dots)
    return _layer_by_layer(log, lambda round_, name: _cosines(round_, name, *dots[name]))


def aggregate_cosines(log: UpdateLog) -> pd.DataFrame:
    """Cosine of each client's update to the plain mean of the comparable clients', its own included, layer by layer.

    Unlike the median of `layer_cosines`, the mean follows a client that sends much.
    Returns: float64 [client, layer], from -1 to 1; 0 where either norm is 0.
    Raises: CannotSay below 3 comparable clients, or above 5,000.
    """
    return _by_gram(log, _mean_cosines)


def global_cosines(log: UpdateLog) -> pd.DataFrame:
    """Cosine of each client's update to the global model's weights before the round, layer by layer.

    Near -1 the client shrinks the weights, near 1 it lets them grow.
    Returns: float64 [client, layer], from -1 to 1; 0 where either norm is 0, so all 0 for a model that starts at 0.
    Raises: CannotSay below 3 comparable clients.
    Source: the temporal direction alignment of AlignIns (Xu et al. 2025, CVPR), there over all layers at once.
    """

    def of_layer(round_: Round, name: str) -> np.ndarray:
        return _cosines(round_, name, *_dots(round_, name, round_.global_model[name]))

    return _layer_by_layer(log, of_layer)


def sign_agreement(log: UpdateLog) -> pd.DataFrame:
    """Share of a client's numbers that have the sign of the cohort's majority, layer by layer.

    The majority's sign is that of the sum of all comparable clients' signs, the client's own included. Numbers that
    are 0, and those on which the cohort is split evenly, do not count.
    Returns: float64 [client, layer], from 0 to 1; 0 where no number counts.
    Raises: CannotSay below 3 comparable clients.
    Source: the majority of RLR (Ozdayi et al. 2021, AAAI); AlignIns (Xu et al. 2025, CVPR) asks it of a client's
    largest numbers only.
    """
    return _layer_by_layer(log, _agreement)


def large_share(log: UpdateLog, multiple: float = 2.0) -> pd.DataFrame:
    """Share of a client's numbers that are large for the cohort, layer by layer.

    Large is more than `multiple` times the median over the clients of their root mean square in that layer; where most
    clients send 0 it is whatever is not 0. Our own measure, and so is the default: in a normal's tails beyond two
    sigmas lie 4.6 % of the numbers, enough to count in small layers too.
    Returns: float64 [client, layer], from 0 to 1.
    Raises: CannotSay below 3 comparable clients; InputError unless `multiple` is positive and finite.
    """
    if not 0 < multiple < np.inf:
        raise InputError(f"large_share: multiple must be positive and finite, found {multiple!r}")
    return _layer_by_layer(log, lambda round_, name: _share_above(round_, name, multiple))


def spectral(log: UpdateLog) -> pd.DataFrame:
    """How far each client lies along the direction in which the cohort differs most, layer by layer.

    The updates minus the mean of the comparable clients' are projected on their first principal direction (the leading
    eigenvector of the centred Gram matrix). The length of that projection, without its sign, is divided by the
    cohort's median distance from the mean, which leaves no unit; clients that lie on the mean do not enter that median.
    Returns: float64 [client, layer], at least 0; 0 for all where the updates are equal, or where no direction
    leads because the two largest eigenvalues are equal (a relative gap below 1e-6).
    Raises: CannotSay below 3 comparable clients, or above 5,000.
    Source: the spectral signature of Tran, Li & Madry 2018, arXiv:1811.00636, as DnC (Shejwalkar & Houmansadr 2021,
    NDSS) asks it of updates; both square it, and DnC looks at a random part of all layers at once.
    """
    return _by_gram(log, _leading)


def kurtosis(log: UpdateLog) -> pd.DataFrame:
    """Excess kurtosis of a client's numbers in a layer: 0 for a normal, high where a few numbers carry the update.

    The population's (no bias correction): the mean fourth power over the squared mean square, about the client's own
    mean, minus 3. A column per layer of at least 24 numbers: in smaller ones its standard error, about
    sqrt(24 / numbers), would pass 1. Of a layer that was not recorded whole it follows from its moments.
    Returns: float64 [client, layer of at least 24 numbers]; 0 where all of a client's numbers are equal.
    Raises: CannotSay below 3 comparable clients, or if no layer has 24 numbers.
    """
    round_ = cohort(log)
    names = [name for name in log.model.parameters if log.model[name].sent_size >= KURTOSIS_FROM]
    if not names:
        raise CannotSay(f"the model has no layer of {KURTOSIS_FROM} numbers or more")
    values = np.full((len(round_), len(names)), np.nan)
    values[round_.comparable] = np.stack([_excess(round_, log.model[name]) for name in names], axis=1)
    return table(round_, names, values)


def neighbour_distances(log: UpdateLog, neighbours: int | None = None) -> pd.DataFrame:
    """Mean distance of each client's update to those of its nearest clients, layer by layer.

    neighbours: how many; None: half of the others, rounded down, so that a minority cannot be its own
    neighbourhood; at most all others. Our own measure, of the kind of Krum's (which sums squares).
    Returns: float64 [client, layer], in units of the weights; below a millionth of the two norms a distance is 0.
    Raises: CannotSay below 3 comparable clients, or above 5,000; InputError unless `neighbours` is at least 1.
    """
    if neighbours is not None:
        whole_number("neighbour_distances: neighbours", neighbours, least=1)
    return _by_gram(log, lambda gram: _nearest_distances(gram, neighbours))


def neighbour_cosines(log: UpdateLog, neighbours: int = 3) -> pd.DataFrame:
    """Mean cosine of each client's update to those nearest to it in direction, layer by layer.

    The updates are taken minus the coordinate-wise median of the cohort's, so what most have in common does not count:
    sybils, who pull the same way, have high values (about the mean, which they move, the others would have). Equal
    updates have cosine 1; who lies on the median has cosine 0.
    neighbours: as many as the sybils beside the client that one expects; 3 is our own choice; at most all others.
    Returns: float64 [client, layer], from -1 to 1.
    Raises: CannotSay below 3 comparable clients, or above 5,000; InputError unless `neighbours` is at least 1.
    Source: of the kind of FoolsGold (Fung, Yoon & Beschastnikh 2020, RAID), which takes the one nearest, uncentred.
    """
    whole_number("neighbour_cosines: neighbours", neighbours, least=1)
    dots = log.remembered(_median_dots)

    def of_layer(round_: Round, name: str) -> np.ndarray:
        return _nearest_cosines(_centred(_comparable_gram(round_, name), *dots[name]), neighbours)

    return _layer_by_layer(log, of_layer)


def _layer_by_layer(log: UpdateLog, measure: Callable[[Round, str], np.ndarray]) -> pd.DataFrame:
    """The table of a measure (round, layer) -> [comparable client]."""
    round_ = cohort(log)
    values = np.full((len(round_), len(log.model.parameters)), np.nan)
    values[round_.comparable] = np.stack([measure(round_, name) for name in log.model.parameters], axis=1)
    return table(round_, log.model.parameters, values)


def _by_gram(log: UpdateLog, measure: Callable[[np.ndarray], np.ndarray]) -> pd.DataFrame:
    """The table of a measure of the comparable clients' inner products in a layer, [client, client] -> [client]."""

    return _layer_by_layer(log, lambda round_, name: measure(_comparable_gram(round_, name)))


def _comparable_gram(round_: Round, layer: str) -> np.ndarray:
    return round_.gram[layer][np.ix_(round_.comparable, round_.comparable)]


def _comparable_blocks(round_: Round, layer: str) -> Iterator[np.ndarray]:
    """The comparable clients' updates of a layer in slices [client, number]; CannotSay of a sketched layer."""
    rows = slice(None) if round_.comparable.all() else round_.comparable
    return (block[rows] for block in round_.blocks(layer))


def _median_dots(log: UpdateLog) -> Mapping[str, tuple[np.ndarray, float]]:
    """Layer -> inner products of the cohort's median with the comparable updates, [client], and with itself."""
    round_ = cohort(log)
    return {name: _dots(round_, name, round_.median[name]) for name in log.model.parameters}


def _dots(round_: Round, layer: str, direction: np.ndarray) -> tuple[np.ndarray, float]:
    direction, rows = np.asarray(direction).reshape(-1), round_.comparable
    dots, square, start = np.zeros(int(rows.sum())), 0.0, 0
    for block in round_.blocks(layer, sketch=True):
        part = direction[start : start + block.shape[1]].astype(np.float64)
        dots += (block if rows.all() else block[rows]).astype(np.float64) @ part
        square += float(part @ part)
        start += block.shape[1]
    return dots, square


def _cosines(round_: Round, layer: str, dots: np.ndarray, square: float) -> np.ndarray:
    norms = round_.gram_norms[layer][round_.comparable] * np.sqrt(square)
    return np.round(_divided(dots, norms), 12)  # BLAS sums equal rows in different orders: near 0 it would show


def _agreement(round_: Round, layer: str) -> np.ndarray:
    balance = counted = np.zeros(int(round_.comparable.sum()))
    for block in _comparable_blocks(round_, layer):
        signs = ((block > 0).view(np.int8) - (block < 0).view(np.int8)).astype(np.float32)
        majority = np.sign(signs.sum(axis=0))
        balance = balance + signs @ majority  # those with the majority minus those against it: exact in float32
        counted = counted + np.abs(signs, out=signs) @ np.abs(majority)
    return _divided(balance + counted, 2 * counted)


def _share_above(round_: Round, layer: str, multiple: float) -> np.ndarray:
    size = round_.global_model[layer].size
    norms = round_.norms[layer][round_.comparable]
    bound = min(float(multiple * np.median(norms) / np.sqrt(size)), LARGEST)
    count = np.zeros(len(norms))
    for block in _comparable_blocks(round_, layer):
        # row by row: counting along an axis is several times slower
        count += [np.count_nonzero(row) for row in np.abs(block) > bound]
    return count / size


def _excess(round_: Round, layer: Layer) -> np.ndarray:
    size = layer.sent_size
    if layer.name in round_.moments:
        return _excess_of_moments(round_.moments[layer.name][round_.comparable] / size)
    mean = squares = fourths = np.zeros(int(round_.comparable.sum()))
    for block in _comparable_blocks(round_, layer.name):
        mean = mean + block.astype(np.float64).sum(axis=1) / size
    for block in _comparable_blocks(round_, layer.name):
        deviation = block - mean[:, None]
        deviation *= deviation
        squares = squares + deviation.sum(axis=1)
        fourths = fourths + np.einsum("ki,ki->k", deviation, deviation)
    variance = squares / size
    differ = variance > ROUNDING * mean**2
    return np.where(differ, _divided(fourths / size, variance**2) - 3, 0)


def _excess_of_moments(moments: np.ndarray) -> np.ndarray:
    """Excess kurtosis [client] from the means of the first four powers [client, 4]; 0 where nothing but the mean is
    left of the digits that they have.
    """
    mean, squares, cubes, fourths = moments.T
    variance = squares - mean**2
    central = fourths - 4 * mean * cubes + 6 * mean**2 * squares - 3 * mean**4
    return np.where(variance > MOMENTS * squares, _divided(central, variance**2) - 3, 0)


def _mean_cosines(gram: np.ndarray) -> np.ndarray:
    dots, squares = gram.mean(axis=1), np.diagonal(gram)  # with the mean update, with itself
    mean_square = dots.mean()
    if mean_square <= ROUNDING * squares.mean():
        return np.zeros(len(gram))
    return _divided(dots, np.sqrt(squares * mean_square))


def _leading(gram: np.ndarray) -> np.ndarray:
    means = gram.mean(axis=1)
    centred = _centred(gram, means, means.mean())
    distances = np.sqrt(np.diagonal(centred))
    if not distances.any():
        return np.zeros(len(gram))
    (second, first), vectors = two_leading(centred)
    if first - second <= EQUAL * first:
        return np.zeros(len(gram))
    component = np.abs(vectors[:, 1])
    component[component < 1e-9 * component.max()] = 0  # rounding
    return np.sqrt(first) * component / np.median(distances[distances > 0])


def _nearest_distances(gram: np.ndarray, neighbours: int | None) -> np.ndarray:
    squares = np.diagonal(gram)
    total = squares[:, None] + squares[None, :]
    distances = total - 2 * gram
    distances = np.sqrt(np.where(distances > ROUNDING * total, distances, 0))
    count = (len(gram) - 1) // 2 if neighbours is None else neighbours
    return np.sort(distances, axis=1)[:, 1 : count + 1].mean(axis=1)  # the first is the client itself


def _nearest_cosines(centred: np.ndarray, neighbours: int) -> np.ndarray:
    norms = np.sqrt(np.diagonal(centred))
    cosines = _divided(centred, np.outer(norms, norms))
    np.fill_diagonal(cosines, -np.inf)
    count = min(neighbours, len(centred) - 1)
    return np.sort(cosines, axis=1)[:, -count:].mean(axis=1)


def _centred(gram: np.ndarray, dots: np.ndarray, square: float) -> np.ndarray:
    """The Gram matrix of the updates minus a centre, of which dots [client] are the inner products with the updates and
    square is that with itself; who lies on the centre but for rounding has 0s.
    """
    centred = gram - dots[:, None] - dots[None, :] + square
    away = np.diagonal(centred) > ROUNDING * np.diagonal(gram).mean()
    return np.where(away[:, None] & away[None, :], centred, 0)


def _divided(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """The quotient, 0 where the denominator is."""
    return np.divide(numerator, denominator, out=np.zeros_like(numerator), where=denominator > 0)
