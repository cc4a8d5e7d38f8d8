"""Scorers by general outlier estimators: isolation forest, local outlier factor, any of scikit-learn's form."""

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from gradlens.errors import InputError
from gradlens.scorers.scaling import Scorer, distinct_rows, over_finite_rows, robustly_scaled

TREES, SUBSAMPLE = 100, 256  # of an isolation forest, as its authors set them
CHUNK = 1 << 21  # numbers of an isolation forest that are worked on at a time


def outlier(estimator: Any) -> Scorer:
    """Makes a scorer of a scikit-learn outlier estimator.

    Parameters
    ----------
    estimator : object
        Cloned and fitted anew to each table. It has one of ``negative_outlier_factor_``, ``decision_scores_`` (PyOD),
        ``score_samples`` or ``decision_function``. A ``random_state`` that is not set becomes 0; ``n_neighbors``
        becomes at most all others.

    Returns
    -------
    OutlierScorer
        Its scores are in the estimator's own units, with the sign turned where needed so that higher is more
        suspicious.

    Raises
    ------
    InputError
        When called, if the estimator has none of these, or answers with numbers that are not finite.

    Notes
    -----
    The estimator sees the robustly scaled rows (`robustly_scaled`). Equal rows count once and are sorted first, so that
    the order of clients changes nothing and equal rows get equal scores; where all are equal all score 0.

    **Fails when** the estimator does; most of them need more rows than a small cohort has.

    Examples
    --------
    >>> import pandas as pd
    >>> from sklearn.neighbors import LocalOutlierFactor
    >>> from gradlens.scorers import outlier
    >>> scorer = outlier(LocalOutlierFactor(n_neighbors=2))
    >>> scorer
    outlier(LocalOutlierFactor(n_neighbors=2))
    >>> scorer(pd.DataFrame({"norm": [1.0, 2.0, 3.0, 4.0, 100.0]})).argmax().item()
    4
    """
    return OutlierScorer(estimator)


@dataclass(frozen=True)
class OutlierScorer:
    """The scorer that `outlier` makes of an estimator.

    Parameters
    ----------
    estimator : object
        A scikit-learn outlier estimator, not fitted.

    Examples
    --------
    >>> import numpy as np
    >>> from sklearn.ensemble import IsolationForest
    >>> from gradlens.scorers.estimators import OutlierScorer
    >>> OutlierScorer(IsolationForest()).score(np.array([[1.0], [2.0], [3.0], [99.0]])).argmax().item()
    3
    """

    estimator: Any

    def __call__(self, features: pd.DataFrame) -> np.ndarray:
        """The scores of all clients, +inf for a row with a number that is not finite."""
        return over_finite_rows(features, self.score)

    def __repr__(self) -> str:
        return f"outlier({self.estimator!r})"

    def score(self, x: np.ndarray) -> np.ndarray:
        """Scores of rows that are all finite, [client, feature] -> [client]."""
        z = robustly_scaled(x)
        different, whose = distinct_rows(z)
        if len(different) < 2:
            return np.zeros(len(z))
        scores = _outlyingness(_fitted(self.estimator, different), different)
        if not np.isfinite(scores).all():
            raise InputError(f"{self!r} must give finite scores, found {scores[~np.isfinite(scores)][0]}")
        return scores[whose]


def isolation_forest(features: pd.DataFrame) -> np.ndarray:
    """Anomaly score of each client in an isolation forest of 100 trees.

    Parameters
    ----------
    features : DataFrame [client, feature]
        A statistic's table.

    Returns
    -------
    ndarray, float64 [client]
        From 0 to 1, about 0.5 for a client of an inconspicuous cohort; 0 where all are equal; +inf for a row with a
        number that is not finite.

    Notes
    -----
    Each tree isolates at most 256 clients by random cuts [1]_, both as its authors set them::

        2 ** -(mean depth over the trees / expected depth)

    It means the same as ``outlier(IsolationForest(random_state=0))``, grown level by level over all trees at once, in a
    tenth of the time. The random cuts come from a fixed seed.

    **Fails when** several malicious clients are alike, since a group takes as many cuts to isolate as benign clients
    do; and in small cohorts, where the scores of all clients lie close together.

    References
    ----------
    .. [1] Liu, Ting & Zhou 2008, "Isolation Forest", ICDM, eqs. (1), (2).

    Examples
    --------
    >>> import pandas as pd
    >>> from gradlens.scorers import isolation_forest
    >>> isolation_forest(pd.DataFrame({"norm": [1.0, 2.0, 3.0, 4.0, 100.0]})).argmax().item()
    4
    """
    return over_finite_rows(features, _isolation)


def local_outlier_factor(features: pd.DataFrame, neighbours: int | None = None) -> np.ndarray:
    """How much sparser it is around a client than around its neighbors (LOF).

    Parameters
    ----------
    features : DataFrame [client, feature]
        A statistic's table.
    neighbours : int, optional
        More than the attackers that are expected, or they are each other's neighbors; by default half of the cohort.

    Returns
    -------
    ndarray, float64 [client]
        Ratios, about 1 for an inconspicuous client; 0 where all are equal; +inf for a row with a number that is not
        finite.

    Notes
    -----
    The local outlier factor [1]_ of the robustly scaled rows (`robustly_scaled`).

    **Fails when** more clients than `neighbours` are malicious and alike.

    References
    ----------
    .. [1] Breunig, Kriegel, Ng & Sander 2000, "LOF: identifying density-based local outliers", SIGMOD.

    Examples
    --------
    >>> import pandas as pd
    >>> from gradlens.scorers import local_outlier_factor
    >>> local_outlier_factor(pd.DataFrame({"norm": [1.0, 2.0, 3.0, 4.0, 100.0]})).argmax().item()
    4
    """
    from sklearn.neighbors import LocalOutlierFactor

    def score(x: np.ndarray) -> np.ndarray:
        count = max(1, len(x) // 2) if neighbours is None else neighbours
        return OutlierScorer(LocalOutlierFactor(n_neighbors=count)).score(x)

    return over_finite_rows(features, score)


def _isolation(x: np.ndarray) -> np.ndarray:
    """The mean path length of every row over all trees, as a score, [client, feature] -> [client]."""
    different, whose = distinct_rows(robustly_scaled(x))
    if len(different) < 2:
        return np.zeros(len(x))
    different = different[:, np.ptp(different, axis=0) > 0]
    size, rng = min(SUBSAMPLE, len(different)), np.random.default_rng(0)
    together = max(1, CHUNK // (len(different) + size * different.shape[1]))
    starts = range(0, TREES, together)
    lengths = [_path_lengths(different, min(together, TREES - start), size, rng) for start in starts]
    return 2.0 ** (-np.sum(lengths, axis=0) / (TREES * _expected_depth(np.array(size))))[whose]


def _path_lengths(x: np.ndarray, trees: int, size: int, rng: np.random.Generator) -> np.ndarray:
    """How deep each row ends plus the expected depth of what is left to cut there, summed over random trees [row].

    All nodes of a level are cut at once, each in a random feature that is not the same for all its sampled rows,
    between their smallest and largest number.
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
    """A fitted estimator's scores of the rows that it was fitted to, turned so that higher is farther out."""
    if hasattr(fitted, "negative_outlier_factor_"):
        return -np.asarray(fitted.negative_outlier_factor_)
    if hasattr(fitted, "decision_scores_"):
        return np.asarray(fitted.decision_scores_)
    for method in ("score_samples", "decision_function"):
        if hasattr(fitted, method):
            return -np.asarray(getattr(fitted, method)(z))
    raise InputError(f"an outlier estimator must have score_samples or decision_function, found {fitted!r}")
