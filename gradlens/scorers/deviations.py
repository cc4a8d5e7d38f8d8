"""Scorers by deviation: from the cohort's center, from the larger of two clusters, from the dense majority."""

from collections.abc import Callable

import numpy as np
import pandas as pd

from gradlens.clustering import density_clusters, two_linked, two_means
from gradlens.scorers.scaling import divided, over_finite_rows, robustly_scaled, without_rounding


def zscore(features: pd.DataFrame) -> np.ndarray:
    """Largest absolute z-score of each client over the features.

    Parameters
    ----------
    features : DataFrame [client, feature]
        A statistic's table.

    Returns
    -------
    ndarray, float64 [client]
        In standard deviations; 0 where all clients are equal; +inf for a row with a number that is not finite.

    Notes
    -----
    With the mean and the population's standard deviation (ddof 0) of all clients::

        max over features f of |x_if - mean_f| / deviation_f

    **Fails when** one client is large: it moves both the mean and the deviation. Of n clients none can score above
    (n - 1) / sqrt(n), whatever it sends. A baseline; prefer `robust_zscore`.

    Examples
    --------
    >>> import pandas as pd
    >>> from gradlens.scorers import zscore
    >>> zscore(pd.DataFrame({"norm": [1.0, 2.0, 3.0, 4.0, 100.0]})).round(2).tolist()
    [0.54, 0.51, 0.49, 0.46, 2.0]
    """
    return over_finite_rows(features, lambda x: _largest(_standardized(x)))


def robust_zscore(features: pd.DataFrame) -> np.ndarray:
    """Largest absolute modified z-score of each client over the features.

    Parameters
    ----------
    features : DataFrame [client, feature]
        A statistic's table.

    Returns
    -------
    ndarray, float64 [client]
        In robust sigmas (1.4826 MAD); 0 where all clients are equal; +inf for a row with a number that is not finite.

    Notes
    -----
    With the median and the median absolute deviation (MAD) of all clients [1]_::

        max over features f of |x_if - median_f| / (1.4826 MAD_f)

    Where the MAD is 0, 1.2533 mean absolute deviations take its place; a normal distribution's sigma is either.

    **Fails when** half of the clients or more are malicious, and when the textbook threshold of 3.5, made for one
    feature, is applied to the largest of several: benign clients then pass it often (see `calibrate`).

    References
    ----------
    .. [1] Iglewicz & Hoaglin 1993.

    Examples
    --------
    >>> import pandas as pd
    >>> from gradlens.scorers import robust_zscore
    >>> robust_zscore(pd.DataFrame({"norm": [1.0, 2.0, 3.0, 4.0, 100.0]})).round(2).tolist()
    [1.35, 0.67, 0.0, 0.67, 65.43]
    """
    return over_finite_rows(features, lambda x: _largest(robustly_scaled(x)))


def two_cluster_margin(features: pd.DataFrame) -> np.ndarray:
    """How much nearer a client is to the center of the smaller of two k-means clusters.

    Parameters
    ----------
    features : DataFrame [client, feature]
        A statistic's table.

    Returns
    -------
    ndarray, float64 [client]
        In robust sigmas; positive on the minority's side, large where the clusters lie far apart; +inf for a row with a
        number that is not finite.

    Notes
    -----
    2-means splits the robustly scaled rows (`robustly_scaled`), started from the two halves along their principal
    direction, so that nothing is random. The score is ::

        distance to the larger cluster's center - distance to the smaller cluster's center

    Where the clusters are equally large, or all clients are equal, no side is the minority and all score 0.

    **Fails when** the malicious clients are not the smaller cluster, or nobody is malicious: two clusters are found in
    any cohort. 2-means avoids clusters of one, see `agglomerative_margin`.

    Examples
    --------
    >>> import pandas as pd
    >>> from gradlens.scorers import two_cluster_margin
    >>> two_cluster_margin(pd.DataFrame({"norm": [1.0, 2.0, 3.0, 9.0, 10.0]})).round(2).tolist()
    [-2.53, -2.53, -1.85, 2.19, 2.53]
    """
    return over_finite_rows(features, lambda x: _margin(x, lambda z: two_means(z)[0]))


def agglomerative_margin(features: pd.DataFrame) -> np.ndarray:
    """How much nearer a client is to the center of the smaller of the last two clusters that average linkage joins.

    Parameters
    ----------
    features : DataFrame [client, feature]
        A statistic's table.

    Returns
    -------
    ndarray, float64 [client]
        In robust sigmas, as in `two_cluster_margin`; +inf for a row with a number that is not finite.

    Notes
    -----
    The margin of `two_cluster_margin` for other clusters: average linkage [1]_ gives one far client a cluster of its
    own. The distances of all pairs of clients are held at a time.

    **Fails when** the malicious clients are not the smaller cluster, or a single benign client lies far away: it then
    becomes the minority, and malicious clients score low.

    References
    ----------
    .. [1] Sokal & Michener 1958 (average linkage).

    Examples
    --------
    >>> import pandas as pd
    >>> from gradlens.scorers import agglomerative_margin
    >>> agglomerative_margin(pd.DataFrame({"norm": [1.0, 2.0, 3.0, 4.0, 100.0]})).round(2).tolist()
    [-65.76, -65.76, -65.09, -63.74, 65.76]
    """
    return over_finite_rows(features, lambda x: _margin(x, two_linked))


def hdbscan_outlier(features: pd.DataFrame) -> np.ndarray:
    """Distance of each client from the nearest other client of the dense majority.

    Parameters
    ----------
    features : DataFrame [client, feature]
        A statistic's table.

    Returns
    -------
    ndarray, float64 [client]
        In robust sigmas; 0 where all clients are equal; +inf for a row with a number that is not finite.

    Notes
    -----
    The majority is HDBSCAN's cluster [1]_ of the robustly scaled rows (`robustly_scaled`), with ``min_cluster_size``
    more than half of the clients, ``min_samples`` 1 and one cluster allowed, as FLAME sets it. A client outside it
    scores more than any inside: HDBSCAN lets in every client that is as near to a member as its members are to each
    other.

    **Fails when** the malicious clients lie as dense as the benign ones and next to them, and when no majority is
    dense: then up to half of an attack-free cohort lies outside.

    References
    ----------
    .. [1] Campello, Moulavi & Sander 2013, "Density-based clustering based on hierarchical density estimates".

    Examples
    --------
    >>> import pandas as pd
    >>> from gradlens.scorers import hdbscan_outlier
    >>> hdbscan_outlier(pd.DataFrame({"norm": [1.0, 2.0, 3.0, 4.0, 100.0]})).round(2).tolist()
    [0.67, 0.67, 0.67, 0.67, 64.75]
    """
    return over_finite_rows(features, _beyond_the_majority)


def _largest(z: np.ndarray) -> np.ndarray:
    return np.abs(z).max(axis=1, initial=0.0)


def _standardized(x: np.ndarray) -> np.ndarray:
    deviation = without_rounding(x - x.mean(axis=0), x)
    unit = divided(deviation, np.abs(deviation).max(axis=0))  # the square of a tiny number would be 0
    return divided(unit, np.sqrt(np.square(unit).mean(axis=0)))


def _margin(x: np.ndarray, split: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """The margin between the two sides of a split of the scaled rows, [client, feature] -> bool [client]."""
    z = robustly_scaled(x)
    if not z.any():
        return np.zeros(len(z))
    order = _canonical(z)
    side = split(z[order])
    if side.all() or not side.any() or 2 * side.sum() == len(side):
        return np.zeros(len(z))
    if 2 * side.sum() > len(side):
        side = ~side
    small, large = z[order][side].mean(axis=0), z[order][~side].mean(axis=0)
    return np.linalg.norm(z - large, axis=1) - np.linalg.norm(z - small, axis=1)


def _canonical(z: np.ndarray) -> np.ndarray:
    """Positions that sort the rows, so that the order of clients changes nothing."""
    return np.lexsort(np.round(z, 9).T)


def _beyond_the_majority(x: np.ndarray) -> np.ndarray:
    from scipy.spatial import KDTree
    from scipy.spatial.distance import cdist

    z = robustly_scaled(x)
    if len(z) < 2 or not z.any():
        return np.zeros(len(z))
    order = _canonical(z)
    inside = np.empty(len(z), dtype=bool)
    inside[order] = density_clusters(cdist(z[order], z[order]), len(z) // 2 + 1, 1, single=True) == 0
    nearest = KDTree(z[inside]).query(z, k=2)[0]
    return np.where(inside, nearest[:, 1], nearest[:, 0])  # the nearest to a member is itself
