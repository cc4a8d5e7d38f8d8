"""Robust sigmas: how far clients lie from the middle of the clean ones."""

import numpy as np

MAD = 1.4826  # sigma of normal numbers over their median absolute deviation


def in_sigmas(values: np.ndarray, clean: np.ndarray, least: float = 1e-12) -> np.ndarray:
    """Deviations from the clean clients' median, in robust sigmas of the clean clients.

    Parameters
    ----------
    values : ndarray, float64 [client] or [client, number]
        NaN where a client has none; every number is known of a clean client.
    clean : numpy.ndarray
        bool [client].
    least : float
        The smallest sigma.

    Returns
    -------
    ndarray, float64, of the same shape
        Not drawn in; NaN where a client has no value.

    Examples
    --------
    >>> in_sigmas(np.array([1.0, 2.0, 3.0, 20.0]), np.array([True, True, True, False])).round(2).tolist()
    [-0.67, 0.0, 0.67, 12.14]
    """
    apart = values - np.nanmedian(values[clean], axis=0)
    return apart / np.maximum(MAD * np.nanmedian(np.abs(apart[clean]), axis=0), least)
