"""Peeling: takes the most conspicuous client out of the clean set, judges everybody anew, and goes on."""

from dataclasses import dataclass

import numpy as np

from gradlens.case.benign import Benign
from gradlens.case.sums import Sums

MOST = 0.45  # of the clients that can be suspects; above it there is no majority to judge them by


@dataclass(frozen=True, eq=False)
class Peeling:
    """The order in which clients were taken out, and how far each was.

    Attributes
    ----------
    order : numpy.ndarray
        int64 [depth], positions of the clients, the first one out first.
    heights : numpy.ndarray
        float64 [depth], logarithm of the distance of each when it was taken out: the largest among the clean clients.
    put_back : numpy.ndarray
        float64 [depth, client], logarithm of every client's distance once the clients up to that depth are out.

    Examples
    --------
    >>> from gradlens.case.sums import sums_of
    >>> from gradlens.examples import example_log
    >>> benign = Benign.of([sums_of(example_log(num_malicious=0, seed=seed)) for seed in range(1, 6)])
    >>> peeling = peel(sums_of(example_log(num_malicious=2)), benign)
    >>> sorted(peeling.order[:2].tolist())
    [8, 9]
    """

    order: np.ndarray
    heights: np.ndarray
    put_back: np.ndarray


def peel(sums: Sums, benign: Benign) -> Peeling:
    """Takes clients out of the clean set, the farthest first, until 45 % of them are out.

    Each time everything that judges a client, the middle, the scales and the companions, is computed anew from the
    clients that are left: two accomplices do not hide each other, and no innocent client is judged by an attacker that
    is out already (Rosner's generalized test for many outliers [1]_, in place of whose normal quantiles stands the same
    peeling of attack-free recordings).

    Parameters
    ----------
    sums : Sums
    benign : Benign
        Learned from other recordings.

    Returns
    -------
    Peeling

    References
    ----------
    .. [1] Rosner 1983, Technometrics 25.

    Examples
    --------
    >>> from gradlens.case.sums import sums_of
    >>> from gradlens.examples import example_log
    >>> benign = Benign.of([sums_of(example_log(num_malicious=0, seed=seed)) for seed in range(1, 6)])
    >>> peel(sums_of(example_log()), benign).order[0].item()
    9
    """
    clean = np.ones(len(sums.clients), bool)
    distances = _logarithms(sums, benign, clean)
    order, heights, put_back = [], [], []
    for _ in range(int(MOST * len(clean))):
        farthest = int(np.where(clean, distances, -np.inf).argmax())
        order.append(farthest)
        heights.append(distances[farthest])
        clean[farthest] = False
        distances = _logarithms(sums, benign, clean)
        put_back.append(distances)
    return Peeling(np.array(order, np.int64), np.array(heights), np.array(put_back).reshape(len(order), len(clean)))


def _logarithms(sums: Sums, benign: Benign, clean: np.ndarray) -> np.ndarray:
    return np.log(np.maximum(benign.distances(sums, clean), 1e-30))
