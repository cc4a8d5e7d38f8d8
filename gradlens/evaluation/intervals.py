"""The interval of a mean over seeds."""

import warnings
from collections.abc import Iterable

import numpy as np

CONFIDENCE = 0.95


def mean_interval(values: Iterable[float], least: float = -np.inf, most: float = np.inf) -> tuple[float, float]:
    """Returns the 95 % interval of a mean over seeds by Student's t, cut off at the ends of the figure's range.

    Parameters
    ----------
    values : iterable of float
        The figure of each seed, such as its AUC.
    least, most : float
        The range of the figure: 0 and 1 for a share or an AUC, -1 and 1 for a difference of shares.

    Returns
    -------
    tuple of float
        The lower and the upper end, NaN for fewer than two seeds.

    Notes
    -----
    With n seeds of mean m and standard deviation s the ends are m - t s / sqrt(n) and m + t s / sqrt(n), where t is the
    97.5 % quantile of Student's distribution with n - 1 degrees of freedom: 12.7 for two seeds, 4.3 for three, 2.8 for
    five, 2.4 for eight. Two seeds hardly bound a figure, and the interval shows it.

    For normal figures the coverage is exactly 95 %, whatever the number of seeds. It is lower for figures that crowd at
    an end of their range, as an AUC near 1 does: the mean of figures with the distribution Beta(9, 1), which is 0.9, is
    covered in 92, 90, 90 and 91 % of all cases by the intervals over 2, 3, 5 and 8 seeds. It is lowest for figures that
    are mostly equal. Where all seeds agree the interval has no width, and says nothing of how often another seed would
    differ: of a figure that is 1 in nine of ten seeds and 0.5 in the tenth, those intervals cover the mean in 18, 27,
    41 and 57 % of all cases.

    References
    ----------
    Student, "The probable error of a mean", Biometrika 6 (1908), 1-25.

    Examples
    --------
    >>> low, high = mean_interval(np.array([0.7, 0.8, 0.9]), 0, 1)
    >>> print(f"{low:.2f} {high:.2f}")
    0.55 1.00
    """
    from scipy.special import stdtrit  # takes 0.1 s to import

    figures = np.array(list(values), np.float64)
    if len(figures) < 2:
        return np.nan, np.nan
    mean, error = figures.mean(), figures.std(ddof=1) / np.sqrt(len(figures))
    reach = stdtrit(len(figures) - 1, (1 + CONFIDENCE) / 2) * error
    low, high = np.clip([mean - reach, mean + reach], least, most)
    return float(low), float(high)


def bootstrap(values: np.ndarray) -> tuple[float, float]:
    """Returns `mean_interval` of values; an old name, kept until version 0.3.

    Parameters
    ----------
    values : ndarray, float64 [seed]

    Notes
    -----
    The percentile bootstrap that it named covers 50 % where 95 % was said, for two seeds.

    Examples
    --------
    >>> with warnings.catch_warnings():
    ...     warnings.simplefilter("ignore", DeprecationWarning)
    ...     bootstrap(np.array([0.5, 0.5]))
    (0.5, 0.5)
    """
    warnings.warn("bootstrap is now mean_interval; it goes in version 0.3", DeprecationWarning, stacklevel=2)
    return mean_interval(values)
