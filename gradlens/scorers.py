"""Scorers: a table [client, feature] -> a score per client; higher = more suspicious.

A row with a number that is not finite scores +inf and is left out of every reference; no score is NaN or -inf.
"""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from gradlens.log import InputError

__all__ = [
    "SCORERS",
    "Scorer",
    "isolation_forest",
    "local_outlier_factor",
    "outlier",
    "robust_zscore",
    "robustly_scaled",
    "two_cluster_margin",
    "zscore",
]

Scorer = Callable[[pd.DataFrame], np.ndarray]  # [client, feature] -> [client]

LARGEST = 1e150  # beyond it a square is infinite, and so is the number, to a scorer
ROUNDING = 1e-12  # of a feature's typical size: what summing the same numbers in another order makes
FARTHEST = 1e100  # robust sigmas; farther is as far


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
    return _over_finite_rows(features, _margin)


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

    Source: Liu, Ting & Zhou 2008, "Isolation Forest", ICDM.
    """
    from sklearn.ensemble import IsolationForest  # takes a second to import

    return outlier(IsolationForest())(features)


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


def _margin(x: np.ndarray) -> np.ndarray:
    z = robustly_scaled(x)
    if not z.any():
        return np.zeros(len(z))
    order = np.lexsort(np.round(z, 9).T)  # the same rows in the same order, whatever the clients' order
    centres, sizes = _two_means(z[order])
    if sizes[0] == sizes[1]:
        return np.zeros(len(z))
    small, large = centres[np.argsort(sizes)]
    return np.linalg.norm(z - large, axis=1) - np.linalg.norm(z - small, axis=1)


def _two_means(z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Centres [2, feature] and sizes [2] of 2-means, started from the halves along the principal direction."""
    from sklearn.cluster import KMeans  # takes a second to import

    centred = z - z.mean(axis=0)
    upper = centred @ np.linalg.svd(centred, full_matrices=False)[2][0] > 0
    start = np.stack([z[upper].mean(axis=0), z[~upper].mean(axis=0)])
    model = KMeans(2, init=start, n_init=1, tol=0)  # pyright: ignore[reportArgumentType] - typed by its defaults
    labels = model.fit_predict(z)
    return model.cluster_centers_, np.bincount(labels, minlength=2)


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
