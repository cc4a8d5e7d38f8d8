"""What scorers share: rows whose numbers are all finite, and robust scaling."""

from collections.abc import Callable

import numpy as np
import pandas as pd

from gradlens.geometry import ROUNDING, ratio

Scorer = Callable[[pd.DataFrame], np.ndarray]  # [client, feature] -> [client]

LARGEST = 1e150  # larger numbers count as infinite, since their squares are
FARTHEST = 1e100  # robust sigmas; larger scores are cut to it


def robustly_scaled(x: np.ndarray) -> np.ndarray:
    """(x - median) / (1.4826 MAD) of each feature.

    Parameters
    ----------
    x : ndarray, float64 [..., client, feature]
        Finite numbers.

    Returns
    -------
    ndarray, float64 [..., client, feature]
        In robust sigmas. Where the MAD is 0, 1.2533 mean absolute deviations take its place; a feature that is the same
        for all clients becomes 0.

    Examples
    --------
    >>> import numpy as np
    >>> from gradlens.scorers import robustly_scaled
    >>> robustly_scaled(np.array([[1.0], [2.0], [3.0], [4.0], [100.0]]))[:, 0].round(2).tolist()
    [-1.35, -0.67, 0.0, 0.67, 65.43]
    """
    deviation = without_rounding(x - _median(x), x)
    size = np.abs(deviation)
    mad = 1.4826 * _median(size)
    return divided(deviation, np.where(mad > 0, mad, 1.2533 * size.mean(axis=-2, keepdims=True)))


def over_finite_rows(features: pd.DataFrame, score: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """The scores of the rows whose numbers are all finite, by these rows alone; +inf for the others."""
    x = features.to_numpy(np.float64)
    usable = (np.abs(x) < LARGEST).all(axis=1)
    scores = np.full(len(x), np.inf)
    if usable.any():
        scores[usable] = score(x[usable])
    return scores


def without_rounding(deviation: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Sets deviations below rounding to 0: of equal numbers none may stand out by its last digit."""
    return np.where(np.abs(deviation) > ROUNDING * _median(np.abs(x)), deviation, 0.0)


def divided(deviation: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Deviations in units of a scale, cut to 1e100; 0 where the scale is 0."""
    with np.errstate(over="ignore"):
        return np.clip(ratio(deviation, scale), -FARTHEST, FARTHEST)


def distinct_rows(z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The distinct rows [row, feature], sorted, and the row of each client [client]."""
    _, first, whose = np.unique(np.round(z, 9), axis=0, return_index=True, return_inverse=True)
    return z[first], whose.reshape(-1)


def _median(x: np.ndarray) -> np.ndarray:
    """Median over the clients, [..., client, feature] -> [..., 1, feature]; faster than numpy's on small tables."""
    ordered, middle = np.sort(x, axis=-2), x.shape[-2] // 2
    above = ordered[..., middle : middle + 1, :]
    return above if x.shape[-2] % 2 else (ordered[..., middle - 1 : middle, :] + above) / 2
