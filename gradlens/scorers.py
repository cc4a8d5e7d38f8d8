"""Scorers: a table [client, feature] -> a score per client; higher = more suspicious.

A row with a number that is not finite scores +inf and is left out of every reference; no score is NaN or -inf.
"""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from gradlens.errors import InputError

__all__ = [
    "SCORERS",
    "Scorer",
    "agglomerative_margin",
    "density_clusters",
    "hdbscan_outlier",
    "isolation_forest",
    "lloyd",
    "local_outlier_factor",
    "outlier",
    "robust_zscore",
    "robustly_scaled",
    "two_cluster_margin",
    "two_means",
    "zscore",
]

Scorer = Callable[[pd.DataFrame], np.ndarray]  # [client, feature] -> [client]

LARGEST = 1e150  # beyond it a square is infinite, and so is the number, to a scorer
ROUNDING = 1e-12  # of a feature's typical size: what summing the same numbers in another order makes
FARTHEST = 1e100  # robust sigmas; farther is as far
TREES, SUBSAMPLE = 100, 256  # of an isolation forest, as its authors set them
WORKING = 1 << 21  # numbers that a chunk of trees works on at a time


def zscore(features: pd.DataFrame) -> np.ndarray:
    """Largest |z-score| of each client, [client, feature] -> [client], in standard deviations (ddof 0).

    Its references are the mean and the deviation of all clients, which one large client moves: a baseline.
    """
    return _over_finite_rows(features, lambda x: _largest(_standardised(x)))


def robust_zscore(features: pd.DataFrame) -> np.ndarray:
    """Largest |modified z-score| of each client, [client, feature] -> [client], in robust sigmas (1.4826 MAD).

    Source: Iglewicz & Hoaglin 1993. Where the MAD is 0 the mean absolute deviation replaces it; where all
    clients are equal the score is 0.
    """
    return _over_finite_rows(features, lambda x: _largest(robustly_scaled(x)))


def two_cluster_margin(features: pd.DataFrame) -> np.ndarray:
    """How much nearer a client is to the centre of the smaller of two clusters, [client, feature] -> [client].

    Splits the robustly scaled rows with 2-means. The score is the distance to the larger cluster's centre minus
    the distance to the smaller one's, in robust sigmas: positive on the minority's side, large where the two
    lie far apart. Where the clusters are equally large, or all clients are equal, no side is the minority
    and everybody scores 0.
    """
    return _over_finite_rows(features, lambda x: _margin(x, lambda z: two_means(z)[0]))


def agglomerative_margin(features: pd.DataFrame) -> np.ndarray:
    """How much nearer a client is to the centre of the smaller of two clusters, [client, feature] -> [client].

    The margin of `two_cluster_margin`, in robust sigmas, where the clusters are the last two that average linkage
    joins: one far client makes a cluster of its own, which 2-means avoids. All pairs of clients are held at a time.
    Source: Sokal & Michener 1958 (average linkage).
    """
    return _over_finite_rows(features, lambda x: _margin(x, _last_joined))


def hdbscan_outlier(features: pd.DataFrame) -> np.ndarray:
    """Distance to the nearest other client of the dense majority in robust sigmas, [client, feature] -> [client].

    The cluster is HDBSCAN's on the robustly scaled rows, with min_cluster_size more than half of the clients,
    min_samples 1 and one cluster allowed, as FLAME sets it. Whoever is outside it scores more than anybody inside:
    HDBSCAN lets in all who are as near to a member as its members are to each other. All equal score 0.
    Source: Campello, Moulavi & Sander 2013, "Density-based clustering based on hierarchical density estimates".
    """
    return _over_finite_rows(features, _beyond_the_majority)


def outlier(estimator: Any) -> Scorer:
    """A scorer made of a scikit-learn outlier estimator, in that estimator's own units with their sign turned.

    It is cloned and fitted to each table anew, on the robustly scaled rows, with `random_state` 0 where it has
    one that is not set and `n_neighbors` at most all others. Equal rows count once and are put in order first, so
    the order of clients changes nothing and equal rows get equal scores; where all are equal all score 0.
    Raises: InputError, when called, if the estimator has none of negative_outlier_factor_, score_samples,
    decision_scores_ (PyOD), decision_function, or answers with numbers that are not finite.
    """
    return OutlierScorer(estimator)


def isolation_forest(features: pd.DataFrame) -> np.ndarray:
    """Anomaly score of an isolation forest of 100 trees, from 0 to 1, about 0.5 for an inconspicuous cohort.

    Each tree isolates at most 256 clients by random cuts; the score is 2^(-mean depth / expected depth). What
    `outlier(IsolationForest(random_state=0))` means, grown level by level over all trees at once: a tenth of the time.
    Where all clients are equal all score 0. Source: Liu, Ting & Zhou 2008, "Isolation Forest", ICDM, eqs. (1), (2).
    """
    return _over_finite_rows(features, _isolation)


def local_outlier_factor(features: pd.DataFrame, neighbours: int | None = None) -> np.ndarray:
    """How much sparser it is around a client than around its neighbours; about 1 for an inconspicuous one.

    neighbours: more than the attackers one expects, or they are each other's; None: half of the cohort.
    Source: Breunig, Kriegel, Ng & Sander 2000, "LOF: identifying density-based local outliers", SIGMOD.
    """
    from sklearn.neighbors import LocalOutlierFactor

    def score(x: np.ndarray) -> np.ndarray:
        count = max(1, len(x) // 2) if neighbours is None else neighbours
        return OutlierScorer(LocalOutlierFactor(n_neighbors=count)).score(x)

    return _over_finite_rows(features, score)


SCORERS: Mapping[str, Scorer] = {
    "zscore": zscore,
    "robust_zscore": robust_zscore,
    "two_cluster_margin": two_cluster_margin,
    "agglomerative_margin": agglomerative_margin,
    "hdbscan_outlier": hdbscan_outlier,
    "isolation_forest": isolation_forest,
    "local_outlier_factor": local_outlier_factor,
}


def robustly_scaled(x: np.ndarray) -> np.ndarray:
    """(x - median) / (1.4826 MAD) of each feature, float64 [..., client, feature] of finite numbers -> the same shape.

    A normal's sigma is 1.4826 MAD, or 1.2533 mean absolute deviations, which are used where the MAD is 0;
    a feature that is the same for all clients becomes 0.
    """
    deviation = _without_rounding(x - _median(x), x)
    size = np.abs(deviation)
    mad = 1.4826 * _median(size)
    return _divided(deviation, np.where(mad > 0, mad, 1.2533 * size.mean(axis=-2, keepdims=True)))


def density_clusters(
    distances: np.ndarray, smallest: int, neighbours: int | None = None, single: bool = False
) -> np.ndarray:
    """HDBSCAN's cluster of each row of a distance matrix, float64 [row, row] -> int64 [row], -1 outside all of them.

    smallest: min_cluster_size; neighbours: min_samples, the row itself among them, `smallest` where None; single: all
    rows may be one cluster. Distances of 0 count as a billionth of the largest: an infinite density has no excess
    over another. Fewer rows than `smallest` have no cluster; where all rows are equal they are one cluster.
    Source: Campello, Moulavi & Sander 2013, as scikit-learn has it.
    """
    from sklearn.cluster import HDBSCAN

    largest = distances.max(initial=0.0)
    if largest == 0:
        return np.zeros(len(distances), dtype=np.int64)
    if len(distances) < smallest:
        return np.full(len(distances), -1)
    floored = np.maximum(np.round(distances / largest, 12), 1e-9)  # of ties, rounding must decide none
    np.fill_diagonal(floored, 0)
    neighbours = min(smallest if neighbours is None else neighbours, len(distances))
    settings: Any = {"metric": "precomputed", "copy": False, "allow_single_cluster": single}
    return HDBSCAN(smallest, min_samples=neighbours, **settings).fit_predict(floored)


def two_means(z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """2-means of the rows [row, feature], bool [row] (in the second cluster) and centres [2, feature].

    Started from the halves along the principal direction, so that nothing is random; to the end, by `lloyd`.
    """
    centred = z - z.mean(axis=0)
    if z.shape[0] < z.shape[1]:  # the smaller of two symmetric matrices has the direction, or the positions along it
        upper = np.linalg.eigh(centred @ centred.T)[1][:, -1] > 0
    else:
        upper = centred @ np.linalg.eigh(centred.T @ centred)[1][:, -1] > 0
    if not centred.any() or not upper.any() or upper.all():  # all rows are equal
        return upper, np.stack([z[0], z[0]])
    start = np.stack([z[~upper].mean(axis=0), z[upper].mean(axis=0)])
    labels, centres = lloyd(z[None], start[None])
    return labels[0] == 1, centres[0]


def lloyd(x: np.ndarray, centres: np.ndarray, most: int = 300) -> tuple[np.ndarray, np.ndarray]:
    """k-means of several tables at once from given starts: [table, row, feature], [table, k, feature].

    Returns: int64 [table, row], whose centre is nearest, the first of equally near ones, and the centres when nothing
    changed any more (or after `most` rounds); a centre that nobody is nearest to stays where it is.
    """
    middle = x.mean(axis=1, keepdims=True)  # far from the origin a squared distance would lose its digits
    x, centres = x - middle, centres - middle
    labels = None
    for _ in range(most):
        squares = np.square(centres).sum(axis=2)[:, None] - 2 * x @ centres.transpose(0, 2, 1)
        nearest = squares.argmin(axis=2)
        if labels is not None and (nearest == labels).all():
            break
        labels = nearest
        member = (labels[:, None] == np.arange(centres.shape[1])[:, None]).astype(np.float64)
        sizes = member.sum(axis=2, keepdims=True)
        centres = np.where(sizes > 0, member @ x / np.maximum(sizes, 1), centres)
    return np.asarray(labels), centres + middle


@dataclass(frozen=True)
class OutlierScorer:
    """What `outlier` builds."""

    estimator: Any

    def __call__(self, features: pd.DataFrame) -> np.ndarray:
        return _over_finite_rows(features, self.score)

    def __repr__(self) -> str:
        return f"outlier({self.estimator!r})"

    def score(self, x: np.ndarray) -> np.ndarray:
        """Scores of rows that are all finite, [client, feature] -> [client]."""
        z = robustly_scaled(x)
        different, whose = _different_rows(z)
        if len(different) < 2:
            return np.zeros(len(z))
        scores = _outlyingness(_fitted(self.estimator, different), different)
        if not np.isfinite(scores).all():
            raise InputError(f"{self!r} must give finite scores, found {scores[~np.isfinite(scores)][0]}")
        return scores[whose]


def _over_finite_rows(features: pd.DataFrame, score: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """The scores of the rows whose numbers are all finite, by these rows alone; +inf for the others."""
    x = features.to_numpy(np.float64)
    usable = (np.abs(x) < LARGEST).all(axis=1)
    scores = np.full(len(x), np.inf)
    if usable.any():
        scores[usable] = score(x[usable])
    return scores


def _median(x: np.ndarray) -> np.ndarray:
    """Median over the clients, [..., client, feature] -> [..., 1, feature]; in tables this small ahead of numpy's."""
    ordered, middle = np.sort(x, axis=-2), x.shape[-2] // 2
    above = ordered[..., middle : middle + 1, :]
    return above if x.shape[-2] % 2 else (ordered[..., middle - 1 : middle, :] + above) / 2


def _largest(z: np.ndarray) -> np.ndarray:
    return np.abs(z).max(axis=1, initial=0.0)


def _without_rounding(deviation: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Deviations below rounding set to 0: of equal numbers none may stand out by its last digit."""
    return np.where(np.abs(deviation) > ROUNDING * _median(np.abs(x)), deviation, 0.0)


def _divided(deviation: np.ndarray, scale: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        z = np.divide(deviation, scale, out=np.zeros_like(deviation), where=scale > 0)
    return np.clip(z, -FARTHEST, FARTHEST)


def _standardised(x: np.ndarray) -> np.ndarray:
    deviation = _without_rounding(x - x.mean(axis=0), x)
    unit = _divided(deviation, np.abs(deviation).max(axis=0))  # the square of a tiny number would be 0
    return _divided(unit, np.sqrt(np.square(unit).mean(axis=0)))


def _margin(x: np.ndarray, split: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """The margin between the two sides that `split` makes of the scaled rows, [client, feature] -> bool [client]."""
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
    """Positions that put the same rows in the same order, whatever the clients' order."""
    return np.lexsort(np.round(z, 9).T)


def _last_joined(z: np.ndarray) -> np.ndarray:
    from scipy.cluster.hierarchy import cut_tree, linkage  # takes 0.1 s to import

    return cut_tree(linkage(z, "average"), 2)[:, 0] == 1


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


def _isolation(x: np.ndarray) -> np.ndarray:
    """The mean path length of every row over all trees, as a score, [client, feature] -> [client]."""
    different, whose = _different_rows(robustly_scaled(x))
    if len(different) < 2:
        return np.zeros(len(x))
    different = different[:, np.ptp(different, axis=0) > 0]
    size, rng = min(SUBSAMPLE, len(different)), np.random.default_rng(0)
    together = max(1, WORKING // (len(different) + size * different.shape[1]))
    starts = range(0, TREES, together)
    lengths = [_path_lengths(different, min(together, TREES - start), size, rng) for start in starts]
    return 2.0 ** (-np.sum(lengths, axis=0) / (TREES * _expected_depth(np.array(size))))[whose]


def _path_lengths(x: np.ndarray, trees: int, size: int, rng: np.random.Generator) -> np.ndarray:
    """How deep each row ends, plus what is left to cut there, summed over random trees [row].

    All nodes of a level are cut at once: each between the smallest and the largest number that its sampled rows have
    in a random feature which is not the same for all of them.
    """
    rows, limit = len(x), int(np.ceil(np.log2(size)))
    sampled = np.stack([rng.permutation(rows)[:size] for _ in range(trees)]) if size < rows else None
    node = np.repeat(np.arange(trees)[:, None], rows, axis=1)  # of every row in every tree, -1 where it has ended
    lengths = np.zeros((trees, rows))
    for depth in range(limit + 1):
        inside = node if sampled is None else np.take_along_axis(node, sampled, axis=1)
        row = np.broadcast_to(np.arange(rows), node.shape) if sampled is None else sampled
        alive = inside >= 0
        members, row = inside[alive], row[alive]
        order = np.argsort(members, kind="stable")
        members, row = members[order], row[order]
        nodes, first, counts = np.unique(members, return_index=True, return_counts=True)
        if not len(nodes):
            break
        ends = (counts == 1) | (depth == limit)
        place = np.searchsorted(nodes, np.maximum(node, nodes[0]))
        at_end = (node >= 0) & ends[place]
        lengths[at_end] = depth + _expected_depth(counts)[place[at_end]]
        low, high = np.minimum.reduceat(x[row], first, axis=0), np.maximum.reduceat(x[row], first, axis=0)
        feature = np.where(high > low, rng.random(low.shape), -1.0).argmax(axis=1)
        low, high = (np.take_along_axis(bound, feature[:, None], axis=1)[:, 0] for bound in (low, high))
        cut = low + (high - low) * rng.random(len(nodes))
        cut = np.where(cut < high, cut, low)
        right = x[np.arange(rows), feature[place]] > cut[place]
        node = np.where((node >= 0) & ~at_end, 2 * place + right, -1)
    return lengths.sum(axis=0)


def _expected_depth(rows: np.ndarray) -> np.ndarray:
    """Mean depth at which random cuts isolate one of so many rows: 2 H(n - 1) - 2 (n - 1) / n."""
    n = np.maximum(rows, 2).astype(np.float64)
    depth = 2 * (np.log(n - 1) + np.euler_gamma) - 2 * (n - 1) / n
    return np.where(rows > 2, depth, np.where(rows == 2, 1.0, 0.0))


def _different_rows(z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The different rows [row, feature] in order, and which of them each client's is [client]."""
    _, first, whose = np.unique(np.round(z, 9), axis=0, return_index=True, return_inverse=True)
    return z[first], whose.reshape(-1)


def _fitted(estimator: Any, z: np.ndarray) -> Any:
    from sklearn.base import clone

    estimator = clone(estimator)
    settings = estimator.get_params()
    if settings.get("random_state", 0) is None:
        estimator.set_params(random_state=0)
    if settings.get("n_neighbors", 0) >= len(z):
        estimator.set_params(n_neighbors=len(z) - 1)
    with warnings.catch_warnings():  # an enormous LOF; equal rows, which it takes for the cause, count once here
        warnings.filterwarnings("ignore", "Duplicate values are leading to incorrect results", UserWarning)
        return estimator.fit(z)


def _outlyingness(fitted: Any, z: np.ndarray) -> np.ndarray:
    """A fitted estimator's scores of the rows that it was fitted to, turned so that higher = farther out."""
    if hasattr(fitted, "negative_outlier_factor_"):
        return -np.asarray(fitted.negative_outlier_factor_)
    if hasattr(fitted, "decision_scores_"):
        return np.asarray(fitted.decision_scores_)
    for method in ("score_samples", "decision_function"):
        if hasattr(fitted, method):
            return -np.asarray(getattr(fitted, method)(z))
    raise InputError(f"an outlier estimator must have score_samples or decision_function, found {fitted!r}")
