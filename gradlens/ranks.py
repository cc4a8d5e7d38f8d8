"""The score that a given share of benign updates exceeds, from scores that come in groups."""

from collections.abc import Callable
from functools import cache

import numpy as np

from gradlens.errors import InputError

EPSILON = 1e-9  # for what is whole but for rounding
OtherSeeds = Callable[[float, object], tuple[float, bool]]  # rate, seed -> a threshold, whether it supports the rate


def rank_threshold(scores: np.ndarray, units: np.ndarray, fpr: float) -> float:
    """The smallest score that an update of one more unit exceeds with probability at most `fpr`.

    Parameters
    ----------
    scores : ndarray, float64 [score]
        Of benign updates, finite, in any order.
    units : ndarray [score]
        Which independent unit each score belongs to. A client of a run is one unit: its data persist, so that its
        rounds are not independent of each other.
    fpr : float
        Above 0 and below 1.

    Returns
    -------
    float

    Raises
    ------
    InputError
        If there are fewer than `units_needed(fpr)` units, so that no score is high enough.

    Notes
    -----
    Each of the n units weighs as much as any other, and each of its T scores 1 / T of that. The threshold is the
    smallest score t with ::

        sum over units of (share of the unit's scores above t) <= (n + 1) * fpr - 1

    An update of a further unit, exchangeable with the n, exceeds it with probability at most `fpr`, however its rounds
    depend on each other [1]_. Where each unit has one score it is the k-th smallest, k = ceil((n + 1)(1 - fpr)).

    References
    ----------
    .. [1] Lee, Barber & Willett 2023, arXiv 2306.06342 (hierarchical conformal prediction).

    Examples
    --------
    >>> import numpy as np
    >>> rank_threshold(np.arange(19.0), np.arange(19), fpr=0.05)
    18.0
    >>> rank_threshold(np.arange(39.0), np.arange(39), fpr=0.05)
    37.0
    >>> rank_threshold(np.repeat(np.arange(39.0), 10), np.repeat(np.arange(39), 10), fpr=0.05)
    37.0
    """
    _, unit, rounds = np.unique(units, return_inverse=True, return_counts=True)
    if len(rounds) < units_needed(fpr):
        raise InputError(f"a rate of {fpr:g} needs {units_needed(fpr)} independent units, found {len(rounds)}")
    order = np.argsort(-scores, kind="stable")
    shares = 1 / rounds[unit[order]]
    above = np.cumsum(shares) - shares
    allowed = (len(rounds) + 1) * fpr - 1 + EPSILON
    return float(scores[order][np.searchsorted(above, allowed, "right") - 1])


def units_needed(fpr: float) -> int:
    """The fewest independent units among which one more is the highest with probability at most `fpr`.

    Examples
    --------
    >>> units_needed(0.05), units_needed(0.01)
    (19, 99)
    """
    return int(np.ceil(1 / fpr - EPSILON)) - 1


def smallest_rate(units: int) -> float:
    """The smallest rate that a number of independent units supports, rounded up to two digits.

    Examples
    --------
    >>> smallest_rate(19), smallest_rate(60)
    (0.05, 0.017)
    """
    rate = 1 / (units + 1)
    step = 10.0 ** (np.floor(np.log10(rate)) - 1)
    return float(f"{np.ceil(rate / step - EPSILON) * step:.2g}")


def by_other_seeds(scores: np.ndarray, seeds: np.ndarray, units: np.ndarray) -> OtherSeeds:
    """The thresholds that null scores of every seed but one give.

    Parameters
    ----------
    scores : ndarray, float64 [score]
        Finite.
    seeds : ndarray [score]
        None where they have none.
    units : ndarray [score]
        As in `rank_threshold`.

    Returns
    -------
    callable
        ``(rate, seed) -> (threshold, True)`` by the scores of other seeds; their largest (or NaN, without any) and
        False where they are of too few units for the rate.

    Examples
    --------
    >>> import numpy as np
    >>> threshold = by_other_seeds(np.arange(30.0), np.repeat([0, 1], [20, 10]), np.arange(30))
    >>> threshold(0.05, 1), threshold(0.05, 0)
    ((19.0, True), (29.0, False))
    """
    present = set(seeds.tolist()) - {None}

    @cache
    def without(seed: object, rate: float) -> tuple[float, bool]:
        others = seeds != seed if seed is not None else np.ones(len(scores), bool)
        if len(np.unique(units[others])) >= units_needed(rate):
            return rank_threshold(scores[others], units[others], rate), True
        return float(scores[others].max()) if others.any() else np.nan, False

    return lambda rate, seed: without(seed if seed in present else None, rate)
