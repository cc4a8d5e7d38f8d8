"""Statistics of every layer in one round: size, direction and shape of each client's update."""

from collections.abc import Iterator

import numpy as np
import pandas as pd

from gradlens.errors import CannotSay, InputError
from gradlens.geometry import ROUNDING, cosines, ratio
from gradlens.log import Layer, Round, UpdateLog
from gradlens.statistics.cohort import cohort, layer_by_layer, median_products, products_with, table

MOMENT_DIGITS = 1e-4  # share of the squares that must be left about the mean: moments have about six digits
LARGEST_FLOAT32 = float(np.finfo(np.float32).max)
KURTOSIS_FROM = 24  # numbers of a layer: from here on the standard error sqrt(24 / numbers) is at most 1


def layer_norms(log: UpdateLog) -> pd.DataFrame:
    """L2 norm of each client's update in the last round, layer by layer.

    Parameters
    ----------
    log : UpdateLog
        The rounds so far; the last one is judged.

    Returns
    -------
    DataFrame, float64 [client, layer]
        In units of the weights.

    Raises
    ------
    CannotSay
        Where it abstains.

    Notes
    -----
    The square root of the sum of squares of the layer's numbers.

    **Abstains** when fewer than 3 clients are comparable.

    **Fails when** the attacker keeps to the norm of the others, or benign clients train for different numbers of steps.

    Examples
    --------
    >>> from gradlens.examples import example_log
    >>> from gradlens.statistics import layer_norms
    >>> layer_norms(example_log()).idxmax().to_dict()
    {'fc1.weight': 'client-9', 'fc1.bias': 'client-9', 'fc2.weight': 'client-9', 'fc2.bias': 'client-9'}
    """
    round_ = cohort(log)
    return table(round_, log.model.parameters, np.stack([round_.norms[n] for n in log.model.parameters], axis=1))


def layer_cosines(log: UpdateLog) -> pd.DataFrame:
    """Cosine of each client's update to the coordinate-wise median of the cohort's, layer by layer.

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
    With m the coordinate-wise median of the comparable clients' updates of the layer::

        <u_i, m> / (|u_i| |m|)

    For a layer recorded as a sketch, m is the median of the sketches. A number of a sketch is a sum over the layer, so
    that median lies nearer to the mean, which a few clients can move.

    **Abstains** when fewer than 3 clients are comparable.

    **Fails when** the cohort has no common direction (close to convergence, or under strong label skew): the median is
    then nearly 0 and its direction is noise.

    Examples
    --------
    >>> from gradlens.examples import example_log
    >>> from gradlens.statistics import layer_cosines
    >>> layer_cosines(example_log())["fc1.weight"].between(-1, 1).all().item()
    True
    """
    dots = log.remembered(median_products)
    return layer_by_layer(log, lambda round_, name: _cosines(round_, name, *dots[name]))


def global_cosines(log: UpdateLog) -> pd.DataFrame:
    """Cosine of each client's update to the global model's weights before the round, layer by layer.

    Parameters
    ----------
    log : UpdateLog
        The rounds so far; the last one is judged.

    Returns
    -------
    DataFrame, float64 [client, layer]
        From -1 to 1; 0 where either norm is 0, so all 0 for a model that starts at 0.

    Raises
    ------
    CannotSay
        Where it abstains.

    Notes
    -----
    Near -1 the client shrinks the weights, near 1 it lets them grow. Over all layers at once this is the temporal
    direction alignment of AlignIns [1]_.

    **Abstains** when fewer than 3 clients are comparable.

    **Fails when** the attack moves no client along the weights: in many dimensions the cosine is near 0 for all.

    References
    ----------
    .. [1] Xu et al. 2025, CVPR, arXiv:2503.07978.

    Examples
    --------
    >>> from gradlens.examples import example_log
    >>> from gradlens.statistics import global_cosines
    >>> global_cosines(example_log()).shape
    (10, 4)
    """

    def of_layer(round_: Round, name: str) -> np.ndarray:
        return _cosines(round_, name, *products_with(round_, name, round_.global_model[name]))

    return layer_by_layer(log, of_layer)


def sign_agreement(log: UpdateLog) -> pd.DataFrame:
    """Share of a client's numbers that have the sign of the cohort's majority, layer by layer.

    Parameters
    ----------
    log : UpdateLog
        The rounds so far; the last one is judged.

    Returns
    -------
    DataFrame, float64 [client, layer]
        From 0 to 1; 0 where no number counts.

    Raises
    ------
    CannotSay
        Where it abstains.

    Notes
    -----
    The majority's sign is that of the sum of the signs of all comparable clients, the client included, as RLR takes it
    [1]_. Numbers that are 0, and those on which the cohort is evenly split, do not count. AlignIns [2]_ applies this to
    a client's largest numbers only.

    **Abstains** when fewer than 3 clients are comparable, or a layer was recorded as a sketch.

    **Fails when** an attack changes few or small numbers, or sends boosted numbers with the usual signs.

    References
    ----------
    .. [1] Ozdayi, Kantarcioglu & Gel 2021, AAAI, arXiv:2007.03767.
    .. [2] Xu et al. 2025, CVPR, arXiv:2503.07978.

    Examples
    --------
    >>> from gradlens.examples import example_log
    >>> from gradlens.statistics import sign_agreement
    >>> sign_agreement(example_log()).loc["client-9"].between(0, 1).all().item()
    True
    """
    return layer_by_layer(log, _agreement)


def large_share(log: UpdateLog, multiple: float = 2.0) -> pd.DataFrame:
    """Share of a client's numbers that are large for the cohort, layer by layer.

    Parameters
    ----------
    log : UpdateLog
        The rounds so far; the last one is judged.
    multiple : float, default 2.0
        Of the cohort's median root mean square, from which on a number is large. The default is our own: of a normal
        distribution 4.6 % lies beyond two sigmas, enough to count in small layers, too.

    Returns
    -------
    DataFrame, float64 [client, layer]
        From 0 to 1.

    Raises
    ------
    CannotSay
        Where it abstains.
    InputError
        Unless `multiple` is positive and finite.

    Notes
    -----
    Large is whatever exceeds `multiple` times the median over the clients of their root mean square in that layer;
    where most clients send 0, whatever is not 0. The measure is our own.

    **Abstains** when fewer than 3 clients are comparable, or a layer was recorded as a sketch.

    **Fails when** the attacker spreads its change evenly and keeps to the norm of the others.

    Examples
    --------
    >>> from gradlens.examples import example_log
    >>> from gradlens.statistics import large_share
    >>> large_share(example_log())["fc1.weight"].idxmax()
    'client-9'
    """
    if not 0 < multiple < np.inf:
        raise InputError(f"large_share: multiple must be positive and finite, found {multiple!r}")
    return layer_by_layer(log, lambda round_, name: _share_above(round_, name, multiple))


def kurtosis(log: UpdateLog) -> pd.DataFrame:
    """Excess kurtosis of a client's numbers in a layer; high where a few numbers carry the update.

    Parameters
    ----------
    log : UpdateLog
        The rounds so far; the last one is judged.

    Returns
    -------
    DataFrame, float64 [client, layer of at least 24 numbers]
        0 for a normal distribution, and where all of a client's numbers are equal.

    Raises
    ------
    CannotSay
        Where it abstains.

    Notes
    -----
    The population's, without bias correction, about the client's own mean in the layer::

        mean of (u - mean)^4 / (mean of (u - mean)^2)^2 - 3

    Layers of fewer than 24 numbers are left out: there its standard error, about sqrt(24 / numbers), passes 1. For a
    layer that was not recorded whole it follows from its moments.

    **Abstains** when fewer than 3 clients are comparable, or no layer has 24 numbers.

    **Fails when** benign updates are sparse themselves, as those of embeddings and of units that rarely fire are.

    Examples
    --------
    >>> from gradlens.examples import example_log
    >>> from gradlens.statistics import kurtosis
    >>> kurtosis(example_log()).columns.tolist()
    ['fc1.weight', 'fc2.weight']
    """
    round_ = cohort(log)
    names = [name for name in log.model.parameters if log.model[name].sent_size >= KURTOSIS_FROM]
    if not names:
        raise CannotSay(f"the model has no layer of {KURTOSIS_FROM} numbers or more")
    values = np.full((len(round_), len(names)), np.nan)
    values[round_.comparable] = np.stack([_excess(round_, log.model[name]) for name in names], axis=1)
    return table(round_, names, values)


def _comparable_blocks(round_: Round, layer: str) -> Iterator[np.ndarray]:
    """The comparable clients' updates of a layer in slices [client, number]; raises CannotSay for a sketched layer."""
    rows = slice(None) if round_.comparable.all() else round_.comparable
    return (block[rows] for block in round_.blocks(layer))


def _cosines(round_: Round, layer: str, dots: np.ndarray, square: float) -> np.ndarray:
    lengths = round_.gram_norms[layer][round_.comparable] * np.sqrt(square)
    return np.round(cosines(dots, lengths), 12)  # near 0, BLAS gives equal rows different last digits


def _agreement(round_: Round, layer: str) -> np.ndarray:
    balance = counted = np.zeros(int(round_.comparable.sum()))
    for block in _comparable_blocks(round_, layer):
        signs = ((block > 0).view(np.int8) - (block < 0).view(np.int8)).astype(np.float32)
        majority = np.sign(signs.sum(axis=0))
        balance = balance + signs @ majority  # those with the majority minus those against it: exact in float32
        counted = counted + np.abs(signs, out=signs) @ np.abs(majority)
    return ratio(balance + counted, 2 * counted)


def _share_above(round_: Round, layer: str, multiple: float) -> np.ndarray:
    size = round_.global_model[layer].size
    norms = round_.norms[layer][round_.comparable]
    bound = min(float(multiple * np.median(norms) / np.sqrt(size)), LARGEST_FLOAT32)
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
    return np.where(differ, ratio(fourths / size, variance**2) - 3, 0)


def _excess_of_moments(moments: np.ndarray) -> np.ndarray:
    """Excess kurtosis [client] from the means of the first four powers [client, 4].

    0 where the variance is lost in the rounding of the moments.
    """
    mean, squares, cubes, fourths = moments.T
    variance = squares - mean**2
    central = fourths - 4 * mean * cubes + 6 * mean**2 * squares - 3 * mean**4
    return np.where(variance > MOMENT_DIGITS * squares, ratio(central, variance**2) - 3, 0)
