"""Where a client gave itself away: the layer and units in which its sums differ most from those of clean clients."""

import numpy as np

from gradlens.case.robust import in_sigmas
from gradlens.case.sums import Sums
from gradlens.geometry import about_reference_mean
from gradlens.log import UpdateLog

TOP_UNITS = 3
TINY = 1e-300


def layers_of(sums: Sums, clean: np.ndarray) -> np.ndarray:
    """For each client the layer in which its summed residuals are largest beside the clean clients', str [client].

    Parameters
    ----------
    sums : Sums
    clean : numpy.ndarray
        bool [client].

    Examples
    --------
    >>> from gradlens.case.sums import sums_of
    >>> from gradlens.examples import example_log
    >>> str(layers_of(sums_of(example_log()), np.arange(10) < 9)[9])
    'fc1.weight'
    """
    names = list(sums.totals)
    heights = []
    for products in sums.totals.values():
        squares = np.log(np.maximum(np.diagonal(about_reference_mean(products, clean)), TINY))
        heights.append(in_sigmas(squares, clean, least=1e-9))
    return np.array(names)[np.argmax(heights, axis=0)]


def units_of(log: UpdateLog, client: str, layer: str, clean: np.ndarray) -> list[int]:
    """The units of a layer whose summed residuals stand out most from the clean clients', the first one first.

    Parameters
    ----------
    log : UpdateLog
    client, layer : str
    clean : numpy.ndarray
        str [client], names of the clean clients.

    Returns
    -------
    list of int
        At most three, none of them below the largest of the clean clients; none where sums are sketched.

    Examples
    --------
    >>> from gradlens.examples import example_log
    >>> log = example_log()
    >>> sorted(units_of(log, "client-9", "fc2.bias", log[-1].clients[:9]))
    [1, 3]
    """
    accumulated = log.accumulated
    shape = log.model[layer].shape
    if accumulated.sketched or not shape:
        return []
    rows = accumulated.of(np.append(clean, client))
    sums = log.model.by_unit(layer, accumulated.sums[layer][rows].astype(np.float64))
    sums = sums / np.sqrt(accumulated.rounds[rows])[:, None, None]
    sizes = np.linalg.norm(sums - np.median(sums[:-1], axis=0), axis=2)  # [client, unit]
    ratios = sizes[-1] / np.maximum(sizes[:-1].max(axis=0), TINY)
    return [int(unit) for unit in np.argsort(-ratios, kind="stable")[:TOP_UNITS] if ratios[unit] > 1]
