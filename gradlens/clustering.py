"""Clusters of rows or of numbers, without chance: the same rows give the same clusters.

What is drawn at random (the reference samples of the gap statistic) is drawn from a seed that the caller names.
"""

from typing import Any

import numpy as np

from gradlens.geometry import ROUNDING, TIE, distances

CLOSEST = 1e-9  # of the largest distance; HDBSCAN sees nothing nearer, since an infinite density exceeds no other


def density_clusters(
    apart: np.ndarray, smallest: int, neighbors: int | None = None, single: bool = False
) -> np.ndarray:
    """HDBSCAN's cluster of each row of a distance matrix.

    Parameters
    ----------
    apart : ndarray, float64 [row, row]
        Distances of all pairs; those of 0 count as a billionth of the largest.
    smallest : int
        Rows that make a cluster (HDBSCAN's ``min_cluster_size``). Fewer rows than that have no cluster.
    neighbors : int, optional
        HDBSCAN's ``min_samples`` as the package ``hdbscan`` counts them: other rows, without the row itself; by default
        `smallest`. scikit-learn counts the row too, and is given one more.
    single : bool, default False
        Whether all rows together may be one cluster.

    Returns
    -------
    ndarray, int64 [row]
        The number of the row's cluster, -1 outside all of them; all 0 where all rows are equal.

    References
    ----------
    .. [1] Campello, Moulavi & Sander 2013, "Density-based clustering based on hierarchical density estimates", as
       scikit-learn implements it.

    Examples
    --------
    >>> x = np.array([0.0, 1.0, 2.0, 50.0])
    >>> density_clusters(np.abs(x[:, None] - x), smallest=3, neighbors=1, single=True).tolist()
    [0, 0, 0, -1]
    """
    from sklearn.cluster import HDBSCAN

    largest = apart.max(initial=0.0)
    if largest == 0:
        return np.zeros(len(apart), dtype=np.int64)
    if len(apart) < smallest:
        return np.full(len(apart), -1)
    floored = np.maximum(np.round(apart / largest, 12), CLOSEST)  # rounded, so that no tie is decided by rounding
    np.fill_diagonal(floored, 0)
    others = min(smallest if neighbors is None else neighbors, len(apart) - 1)
    settings: Any = {"metric": "precomputed", "copy": False, "allow_single_cluster": single}
    return HDBSCAN(smallest, min_samples=others + 1, **settings).fit_predict(floored)


def two_means(points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """2-means of points, started from the two halves along their principal direction.

    Parameters
    ----------
    points : ndarray, float64 [point, number]

    Returns
    -------
    second : ndarray, bool [point]
        Which points are in the second cluster.
    centers : ndarray, float64 [2, number]
        The two means; equal where all points are.

    Examples
    --------
    >>> second, centers = two_means(np.array([[0.0], [1.0], [9.0]]))
    >>> sorted(centers[:, 0].tolist())
    [0.5, 9.0]
    """
    centered = points - points.mean(axis=0)
    if points.shape[0] < points.shape[1]:  # decompose the smaller of the two symmetric matrices
        upper = np.linalg.eigh(centered @ centered.T)[1][:, -1] > 0
    else:
        upper = centered @ np.linalg.eigh(centered.T @ centered)[1][:, -1] > 0
    if not centered.any() or not upper.any() or upper.all():  # all points are equal
        return upper, np.stack([points[0], points[0]])
    start = np.stack([points[~upper].mean(axis=0), points[upper].mean(axis=0)])
    labels, centers = lloyd(points[None], start[None])
    return labels[0] == 1, centers[0]


def lloyd(points: np.ndarray, centers: np.ndarray, iterations: int = 300) -> tuple[np.ndarray, np.ndarray]:
    """k-means of several tables of points at once, by Lloyd's iteration from given centers.

    Parameters
    ----------
    points : ndarray, float64 [table, point, number]
    centers : ndarray, float64 [table, k, number]
        Where each table starts from.
    iterations : int, default 300
        It stops after as many, or when no point changes its cluster.

    Returns
    -------
    labels : ndarray, int64 [table, point]
        The nearest center, the first of equally near ones.
    centers : ndarray, float64 [table, k, number]
        The means; a center that is nearest to no point stays where it is.

    Examples
    --------
    >>> labels, centers = lloyd(np.array([[[0.0], [1.0], [9.0]]]), np.array([[[0.0], [8.0]]]))
    >>> labels.tolist(), centers.tolist()
    ([[0, 0, 1]], [[[0.5], [9.0]]])
    """
    mean = points.mean(axis=1, keepdims=True)  # far from the origin a squared distance would lose its digits
    points, centers = points - mean, centers - mean
    labels = None
    for _ in range(iterations):
        squares = np.square(centers).sum(axis=2)[:, None] - 2 * points @ centers.transpose(0, 2, 1)
        nearest = squares.argmin(axis=2)
        if labels is not None and (nearest == labels).all():
            break
        labels = nearest
        member = (labels[:, None] == np.arange(centers.shape[1])[:, None]).astype(np.float64)
        sizes = member.sum(axis=2, keepdims=True)
        centers = np.where(sizes > 0, member @ points / np.maximum(sizes, 1), centers)
    return np.asarray(labels), centers + mean


def two_linked(points: np.ndarray) -> np.ndarray:
    """Which points are in the second of the last two clusters that average linkage joins, [point, number] -> [point].

    Examples
    --------
    >>> two_linked(np.array([[0.0], [1.0], [9.0]])).tolist()
    [False, False, True]
    """
    from scipy.cluster.hierarchy import cut_tree, linkage  # takes 0.1 s to import

    return cut_tree(linkage(points, "average"), 2)[:, 0] == 1


def two_means_by_column(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Exact 2-means of each column by itself.

    Two clusters on a line are what lies below and above a cut: all cuts of the sorted column are tried at once.

    Parameters
    ----------
    x : ndarray [client, column]

    Returns
    -------
    gaps : ndarray, float64 [column]
        The distance between the two means, 0 where all numbers of the column are equal.
    minority : ndarray, bool [client, column]
        Who is in the smaller cluster; nobody where both are equally large or all numbers are equal.

    Examples
    --------
    >>> gaps, minority = two_means_by_column(np.array([[0.0], [1.0], [9.0]]))
    >>> gaps.tolist(), minority[:, 0].tolist()
    ([8.5], [False, False, True])
    """
    columns = np.ascontiguousarray(x.T)
    ordered = np.sort(columns, axis=1)
    clients = ordered.shape[1]
    below = np.arange(1, clients)
    sums = np.cumsum(ordered, axis=1, dtype=np.float64)
    gaps = (sums[:, -1:] - sums[:, :-1]) / (clients - below) - sums[:, :-1] / below
    between = np.where(ordered[:, 1:] > ordered[:, :-1], below * (clients - below) * np.square(gaps), 0)
    best = between.argmax(axis=1)[:, None]
    gaps = np.where(np.take_along_axis(between, best, 1) > 0, np.take_along_axis(gaps, best, 1), 0)
    lower = columns <= np.take_along_axis(ordered, best, axis=1)
    minority = np.where(2 * (best + 1) < clients, lower, ~lower) & (2 * (best + 1) != clients) & (gaps > 0)
    return gaps[:, 0], minority.T


def gap_clusters(points: np.ndarray, most: int, samples: int, seed: int) -> np.ndarray:
    """k-means clusters of points, with k chosen by the gap statistic.

    Chooses the smallest k with Gap(k) >= Gap(k + 1) - s(k + 1). Points and uniform reference samples both fill the unit
    cube; both grow from k to k + 1 clusters by starting a new one at the point farthest from its center.

    Parameters
    ----------
    points : ndarray, float64 [point, number]
    most : int
        Clusters that are tried at most.
    samples : int
        Number of reference samples.
    seed : int
        Of the reference samples.

    Returns
    -------
    ndarray, int64 [point]

    References
    ----------
    .. [1] Tibshirani, Walther & Hastie 2001 (the gap statistic).

    Examples
    --------
    >>> gap_clusters(np.array([[0.0], [0.1], [0.2], [9.0], [9.1]]), most=3, samples=5, seed=0).tolist()
    [0, 0, 0, 1, 1]
    """
    width = np.ptp(points, axis=0)
    unit = (points - points.min(axis=0)) / np.where(width > 0, width, 1)
    reference = np.random.default_rng(seed).random((samples, *points.shape)) * (width > 0)
    tables = np.concatenate([unit[None], reference])
    centers = tables.mean(axis=1, keepdims=True)
    previous_gap, clusters = -np.inf, np.zeros(len(points), dtype=np.int64)
    for _ in range(min(most, len(points) - 1)):
        labels, centers = lloyd(tables, centers)
        squares = np.square(tables - np.take_along_axis(centers, labels[:, :, None], axis=1)).sum(axis=2)
        within = squares.sum(axis=1)
        if within[0] <= ROUNDING:
            return labels[0]
        logs = np.log(within)
        gap, spread = logs[1:].mean() - logs[0], logs[1:].std() * np.sqrt(1 + 1 / samples)
        if previous_gap >= gap - spread:
            return clusters
        previous_gap, clusters = gap, labels[0]
        farthest = np.take_along_axis(tables, squares.argmax(axis=1)[:, None, None], axis=1)
        centers = np.concatenate([centers, farthest], axis=1)
    return clusters


def gap_count(numbers: np.ndarray, seed: int, most: int = 7, samples: int = 10) -> int:
    """The number of clusters that the gap statistic finds among numbers which are not all equal.

    Chooses the smallest k with Gap(k) >= Gap(k + 1) - s(k + 1); on a line k-means is solved exactly.

    Parameters
    ----------
    numbers : ndarray, float64 [number]
    seed : int
        Of the uniform reference samples.
    most : int, default 7
        Clusters that are tried at most.
    samples : int, default 10
        Number of reference samples.

    Returns
    -------
    int
        From 1 to `most`.

    References
    ----------
    .. [1] Tibshirani, Walther & Hastie 2001 (the gap statistic).

    Examples
    --------
    >>> gap_count(np.array([0.0, 0.1, 0.2, 0.3, 9.0, 9.1]), seed=0)
    2
    """
    scaled = np.sort((numbers - numbers.min()) / np.ptp(numbers))
    uniform = np.sort(np.random.default_rng(seed).uniform(size=(samples, len(numbers))), axis=1)
    most = min(most, len(numbers) - 1)  # with as many clusters as numbers nothing is left within
    spread = np.stack([_within(sample, most) for sample in (scaled, *uniform)])  # [sample, k - 1]
    with np.errstate(divide="ignore"):  # 0 where there are no more different numbers than clusters
        logs = np.log(spread[1:])
        gaps = np.log(spread[1:].mean(axis=0)) - np.log(spread[0])
    error = np.array([np.std(column) if np.isfinite(column).all() else 0.0 for column in logs.T])
    error *= np.sqrt(1 + 1 / samples)
    fits = gaps[:-1] >= gaps[1:] - error[1:]
    return int(np.argmax(fits)) + 1 if fits.any() else most


def lower_cluster_end(numbers: np.ndarray) -> float:
    """The largest number of the lower one of two clusters, by exact 2-means.

    Examples
    --------
    >>> lower_cluster_end(np.array([9.0, 1.0, 0.0, 8.0]))
    1.0
    """
    ordered = np.sort(numbers)
    cost = _costs(ordered)
    return float(ordered[np.argmin(cost[0, :-1] + cost[1:, -1])])


def _within(ordered: np.ndarray, most: int) -> np.ndarray:
    """The smallest sum of squares within k clusters of ordered numbers, for k = 1 to `most`: float64 [k - 1].

    Clusters on a line are stretches, so the best clusters follow from the best ones of every beginning.
    """
    cost = _costs(ordered)
    best = cost[0]
    within = [best[-1]]
    for _ in range(most - 1):
        before = np.concatenate([[np.inf], best[:-1]])  # of what lies before a last cluster that begins here
        best = (before[:, None] + cost).min(axis=0)
        within.append(best[-1])
    return np.where(np.array(within) > TIE * len(ordered), within, 0)


def _costs(ordered: np.ndarray) -> np.ndarray:
    """The sum of squares about the mean of the i-th to the j-th number, float64 [i, j], infinite where j < i."""
    count = len(ordered)
    first, second = (np.concatenate([[0], np.cumsum(p)]) for p in (ordered, ordered**2))
    lengths = np.arange(1, count + 1)[None, :] - np.arange(count)[:, None]
    totals = first[None, 1:] - first[:-1, None]
    costs = second[None, 1:] - second[:-1, None] - totals**2 / np.maximum(lengths, 1)
    return np.where(lengths > 0, np.maximum(costs, 0), np.inf)


def mean_shift(points: np.ndarray, bandwidth: float) -> tuple[np.ndarray, np.ndarray]:
    """Clusters of points by mean shift with a flat kernel.

    Every point climbs to the mean of the points within the bandwidth until it stays; of centers nearer than the
    bandwidth the one with more points within it remains. The result is that of scikit-learn's ``MeanShift``, which
    takes 20 times longer on cohorts.

    Parameters
    ----------
    points : ndarray, float64 [point, number]
    bandwidth : float

    Returns
    -------
    labels : ndarray, int64 [point]
        The nearest center, -1 beyond the bandwidth of all.
    centers : ndarray, float64 [cluster, number]

    Examples
    --------
    >>> labels, centers = mean_shift(np.array([[0.0], [1.0], [9.0]]), bandwidth=2.0)
    >>> labels.tolist(), centers.tolist()
    ([0, 0, 1], [[0.5], [9.0]])
    """
    centers, reach = points[np.lexsort(points.T)], bandwidth + TIE
    for _ in range(300):
        within = distances(centers, points) <= reach
        moved = within @ points / within.sum(axis=1, keepdims=True)
        still = np.linalg.norm(moved - centers, axis=1).max() <= 1e-3 * bandwidth
        centers = moved
        if still:
            break
    count = (distances(centers, points) <= reach).sum(axis=1)
    chosen: list[np.ndarray] = []
    for center in centers[np.lexsort((*np.round(centers, 9).T[::-1], count))[::-1]]:
        if all(np.linalg.norm(center - other) > reach for other in chosen):
            chosen.append(center)
    apart = distances(points, np.array(chosen))
    return np.where(apart.min(axis=1) <= reach, apart.argmin(axis=1), -1), np.array(chosen)


def majority_cluster(points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The largest mean-shift cluster; among equally large ones none is the minority.

    The bandwidth is the mean distance to the nearest half of the points: scikit-learn's estimate with quantile 0.5, of
    all points.

    Parameters
    ----------
    points : ndarray, float64 [point, number]

    Returns
    -------
    members : ndarray, bool [point]
        Who is in the largest cluster, or in one of the largest.
    away : ndarray, float64 [point]
        Distance to the (nearest such) cluster's center, in bandwidths.

    Examples
    --------
    >>> members, away = majority_cluster(np.array([[0.0], [0.0], [0.0], [1.0], [1.0]]))
    >>> members.tolist()
    [True, True, True, False, False]
    """
    apart = distances(points, points)
    bandwidth = np.sort(apart, axis=1)[:, max(len(points) // 2, 1) - 1].mean()  # a point is its own nearest
    labels, centers = mean_shift(points, bandwidth)
    sizes = np.bincount(labels[labels >= 0], minlength=len(centers))
    largest = np.flatnonzero(sizes == sizes.max())
    away = distances(points, centers[largest]).min(axis=1)
    scale = bandwidth if bandwidth > 0 else away.max()
    return np.isin(labels, largest), away / scale if scale > 0 else away
