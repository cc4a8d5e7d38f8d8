"""Peeling: takes the most conspicuous client out of the clean set, judges everybody anew, and goes on."""

from dataclasses import dataclass

import numpy as np

from gradlens.case.scoring import Scoring
from gradlens.case.sums import Sums

SMALLEST = 5  # clients that a verdict needs
ONE_IN = 60  # clients of which one is taken out at a time
MOST = 0.45  # of the clients that can be accused; above it there is no majority to judge them by


@dataclass(frozen=True, eq=False)
class Peeling:
    """The order in which clients were taken out, and how conspicuous each was.

    Attributes
    ----------
    order : numpy.ndarray
        int64 [depth], positions of the clients, the first one out first.
    heights : numpy.ndarray
        float64 [depth], score of each when it was taken out: the largest among the clean clients.

    Examples
    --------
    >>> Peeling(np.array([3, 1]), np.array([4.0, -2.0])).highest
    4.0
    """

    order: np.ndarray
    heights: np.ndarray

    @property
    def highest(self) -> float:
        """The largest of all heights: the statistic of the recording."""
        return float(self.heights.max())


def most_accused(clients: int, most: float = MOST) -> int:
    """How many of so many clients can be accused, at least one.

    Examples
    --------
    >>> most_accused(20), most_accused(6)
    (9, 2)
    """
    return max(int(most * clients), 1)


def peel(sums: Sums, scoring: Scoring, most: float = MOST) -> Peeling:
    """Takes clients out of the clean set, the most conspicuous first, until a share of them is out.

    Each time everything that judges a client, the middle, the scales and the companions, is computed anew from the
    clients that are left: two accomplices do not hide each other, and no innocent client is judged by an attacker that
    is out already (Rosner's generalized test for many outliers [1]_, in place of whose normal quantiles stands the same
    peeling of attack-free recordings). Of more than 119 clients several are taken out at a time, one in 60, so that the
    work does not grow with their fourth power.

    Parameters
    ----------
    sums : Sums
    scoring : Scoring
    most : float
        The share.

    Returns
    -------
    Peeling

    References
    ----------
    .. [1] Rosner 1983, Technometrics 25.

    Examples
    --------
    >>> from gradlens.case.shipped import reference
    >>> from gradlens.case.sums import sums_of
    >>> from gradlens.examples import example_log
    >>> peel(sums_of(example_log()), reference().scoring).order[0].item()
    9
    """
    clean = np.ones(len(sums.clients), bool)
    order, heights = np.zeros(0, np.int64), np.zeros(0)
    depth, at_a_time = most_accused(len(clean), most), max(len(clean) // ONE_IN, 1)
    while len(order) < depth:
        scores = np.where(clean, scoring.scores(sums, clean), -np.inf)
        out = np.argsort(-scores, kind="stable")[: min(at_a_time, depth - len(order))]
        order, heights = np.append(order, out), np.append(heights, scores[out])
        clean[out] = False
    return Peeling(order, heights)


def accused(sums: Sums, scoring: Scoring, peeling: Peeling, threshold: float) -> np.ndarray:
    """Which clients stay above the threshold when each is put back alone, bool [client].

    Suspects are the clients taken out up to the deepest height above the threshold. Each is judged by the clients that
    are no suspects; who does not reach the threshold is no suspect any more, and the others are judged again.

    Parameters
    ----------
    sums : Sums
    scoring : Scoring
    peeling : Peeling
        Of the same recording.
    threshold : float

    Examples
    --------
    >>> from gradlens.case.shipped import reference
    >>> from gradlens.case.sums import sums_of
    >>> from gradlens.examples import example_log
    >>> sums, scoring = sums_of(example_log(num_malicious=2)), reference().scoring
    >>> np.flatnonzero(accused(sums, scoring, peel(sums, scoring), 2.0)).tolist()
    [8, 9]
    """
    suspects = np.zeros(len(sums.clients), bool)
    above = np.flatnonzero(peeling.heights > threshold)
    if not len(above):
        return suspects
    suspects[peeling.order[: above[-1] + 1]] = True
    while True:
        kept = suspects & (scoring.scores(sums, ~suspects) > threshold)
        if (kept == suspects).all():
            return suspects
        suspects = kept
