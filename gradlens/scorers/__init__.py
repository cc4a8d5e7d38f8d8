"""Scorers: a table [client, feature] -> a score per client; higher = more suspicious.

A row with a number that is not finite scores +inf, and no median, spread or cluster rests on it. No score is NaN or
-inf.
"""

from collections.abc import Mapping

from gradlens.scorers.deviations import (
    agglomerative_margin,
    hdbscan_outlier,
    robust_zscore,
    two_cluster_margin,
    zscore,
)
from gradlens.scorers.estimators import isolation_forest, local_outlier_factor, outlier
from gradlens.scorers.scaling import Scorer, robustly_scaled

__all__ = [
    "SCORERS",
    "Scorer",
    "agglomerative_margin",
    "hdbscan_outlier",
    "isolation_forest",
    "local_outlier_factor",
    "outlier",
    "robust_zscore",
    "robustly_scaled",
    "two_cluster_margin",
    "zscore",
]

SCORERS: Mapping[str, Scorer] = {
    "zscore": zscore,
    "robust_zscore": robust_zscore,
    "two_cluster_margin": two_cluster_margin,
    "agglomerative_margin": agglomerative_margin,
    "hdbscan_outlier": hdbscan_outlier,
    "isolation_forest": isolation_forest,
    "local_outlier_factor": local_outlier_factor,
}
