"""When a client did what it stands out for: its activity round by round, and the stretch in which it was active."""

from typing import NamedTuple

import numpy as np

from gradlens.case.robust import in_sigmas
from gradlens.case.sums import Sums, typical
from gradlens.log import UpdateLog
from gradlens.log.accumulated import residuals_of, sketch_rows
from gradlens.log.kernels import BLOCK

RANGE = 3.84  # fall of twice the log likelihood that a 95 % interval allows


class Stretch(NamedTuple):
    """Rounds in which a client was active, as positions, and the range that its begin may lie in.

    Examples
    --------
    >>> Stretch(4, 19, 3, 5).first
    4
    """

    first: int
    last: int
    earliest: int
    latest: int


def activity(log: UpdateLog, sums: Sums, clean: np.ndarray) -> np.ndarray:
    """How much each client's residual of a round goes along with its other rounds, float64 [round, client].

    In robust sigmas of the clean clients of the round, drawn in by arcsinh; NaN where a client was not comparable.

    Parameters
    ----------
    log : UpdateLog
    sums : Sums
        Of the same log.
    clean : numpy.ndarray
        bool [client], the clients that are no suspects.

    Notes
    -----
    Of client k in round t it is the inner product of the residual x_kt with the sum of the residuals of all other
    rounds, summed over layers, each in units of its typical square.

    Examples
    --------
    >>> from gradlens.case.sums import sums_of
    >>> from gradlens.examples import example_log
    >>> log = example_log()
    >>> activity(log, sums_of(log), np.arange(10) < 9)[:, 9].round() > 1
    array([ True,  True,  True,  True])
    """
    accumulated = log.accumulated
    scales = {layer: typical(np.diagonal(products)) for layer, products in sums.totals.items()}
    table = np.full((len(log), len(sums.clients)), np.nan)
    for position, round_ in enumerate(log):
        clients = round_.clients[round_.comparable]
        if not len(clients):
            continue
        along = np.zeros(len(clients))
        for layer, of_all in accumulated.sums.items():
            residuals, others = residuals_of(round_, layer), of_all[accumulated.of(clients)]
            size = log.model[layer].size
            if accumulated.sketched:
                rows = sketch_rows(layer, residuals.clipped(0, size))
                along += _along(rows, others) / scales[layer]
                continue
            for start in range(0, size, BLOCK):
                stop = min(start + BLOCK, size)
                along += _along(residuals.clipped(start, stop), others[:, start:stop]) / scales[layer]
        table[position, np.searchsorted(sums.clients, clients)] = along
    return _scaled(table, clean)


def _along(rows: np.ndarray, sums: np.ndarray) -> np.ndarray:
    """Inner products of each row with the rest of its sum, float64 [row]."""
    rows, sums = rows.astype(np.float64), sums.astype(np.float64)
    return np.einsum("ij,ij->i", rows, sums - rows)


def _scaled(table: np.ndarray, clean: np.ndarray) -> np.ndarray:
    scaled = np.full_like(table, np.nan)
    for position, row in enumerate(table):
        if np.isfinite(row[clean]).sum() > 1:
            scaled[position] = np.arcsinh(in_sigmas(row, clean))
    return scaled


def stretch_of(values: np.ndarray) -> Stretch | None:
    """The stretch of rounds in which values lie above 0, the middle of the clean clients; None where none do.

    Parameters
    ----------
    values : ndarray, float64 [round]
        A client's activity; NaN where it took no part.

    Notes
    -----
    The stretch from first to last leaves the least squares about its own mean within and about 0 outside. Its begin may
    lie wherever, with the same end, the squares are so much larger only as the likelihood of normal deviations allows
    in a 95 % interval.

    Examples
    --------
    >>> stretch_of(np.array([0.1, -0.2, 0.0, 3.1, 2.9, 3.0]))
    Stretch(first=3, last=5, earliest=3, latest=3)
    """
    present = np.flatnonzero(np.isfinite(values))
    if not len(present):
        return None
    series, count = values[present], len(present)
    sums = np.concatenate([[0.0], np.cumsum(series)])
    gains = np.full((count, count), -np.inf)
    for first in range(count):
        for last in range(first, count):
            inside = sums[last + 1] - sums[first]
            gains[first, last] = inside**2 / (last + 1 - first) if inside > 0 else -np.inf
    if not np.isfinite(gains).any():
        return None
    first, last = np.unravel_index(int(gains.argmax()), gains.shape)
    left = max(float(series @ series) - gains[first, last], 0.0)
    allowed = RANGE * max(left / max(count - 2, 1), 1e-6)
    begins = present[np.flatnonzero(gains[:, last] >= gains[first, last] - allowed)]
    return Stretch(int(present[first]), int(present[last]), int(begins.min()), int(begins.max()))
