"""Detectors: a log -> a verdict on the clients of its last round.

`score_by` makes one of any statistic and any scorer, `calibrate` sets its threshold by a named null,
`detect` asks several after every round of a log; `DETECTORS` names them all, the published ones after their papers.
"""

from collections.abc import Callable, Mapping
from functools import partial

from gradlens import statistics
from gradlens.detectors.verdict import TEXTBOOK, Detector, Verdict, calibrate, detect, score_by
from gradlens.scorers import isolation_forest, local_outlier_factor, robust_zscore, two_cluster_margin

__all__ = ["DETECTORS", "Detector", "Verdict", "calibrate", "detect", "score_by"]

DETECTORS: Mapping[str, Callable[..., Detector]] = {
    "final_bias": partial(score_by, statistics.final_bias, robust_zscore, threshold=TEXTBOOK),
    "final_rows": partial(score_by, statistics.final_rows, robust_zscore, threshold=TEXTBOOK),
    "layer_norms": partial(score_by, statistics.layer_norms, robust_zscore, threshold=TEXTBOOK),
    "layer_cosines": partial(score_by, statistics.layer_cosines, robust_zscore, threshold=TEXTBOOK),
    "accumulated_norms": partial(score_by, statistics.accumulated_norms, robust_zscore, threshold=TEXTBOOK),
    "two_clusters": partial(score_by, statistics.final_rows, two_cluster_margin, threshold=TEXTBOOK),
    "isolation_forest": partial(score_by, statistics.layer_cosines, isolation_forest, threshold=0.6),
    "local_outlier_factor": partial(score_by, statistics.layer_cosines, local_outlier_factor, threshold=1.5),
}
