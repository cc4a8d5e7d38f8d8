"""Detectors: a log -> a verdict on the clients of its last round.

`score_by` makes a detector of any statistic and any scorer, `calibrate` sets its threshold by a named null, and
`detect` asks several detectors after every round of a log. `DETECTORS` names them all, the published ones after their
papers.
"""

from collections.abc import Callable, Mapping
from functools import partial

from gradlens import scorers, statistics
from gradlens.detectors.clusters import deepsight, flame, freqfed, rflbat
from gradlens.detectors.directions import alignins, fltrust, rlr, signguard
from gradlens.detectors.distances import dnc, krum, multi_krum, multi_metrics
from gradlens.detectors.final_layer import auror, bilgin, lfighter, tolpegin
from gradlens.detectors.panels import panel
from gradlens.detectors.trajectories import flanders, fldetector, foolsgold
from gradlens.detectors.verdict import TEXTBOOK, Detector, Verdict, calibrate, detect, score_by
from gradlens.statistics import Statistic

__all__ = ["DETECTORS", "USUAL", "Detector", "Verdict", "calibrate", "detect", "score_by"]


def _by_robust_z(statistic: Statistic) -> Callable[..., Detector]:
    return partial(score_by, statistic, scorer=scorers.robust_zscore, threshold=TEXTBOOK)


DETECTORS: Mapping[str, Callable[..., Detector]] = {
    # a statistic by its robust z
    "final_bias": _by_robust_z(statistics.final_bias),
    "final_rows": _by_robust_z(statistics.final_rows),
    "layer_norms": _by_robust_z(statistics.layer_norms),
    "layer_cosines": _by_robust_z(statistics.layer_cosines),
    "spectral": _by_robust_z(statistics.spectral),
    "accumulated_norms": _by_robust_z(statistics.accumulated_norms),
    "accumulated_spectral": _by_robust_z(statistics.accumulated_spectral),
    "accumulated_neighbours": _by_robust_z(statistics.accumulated_neighbours),
    "accomplices": _by_robust_z(statistics.accomplices),
    "label_drift_residual": _by_robust_z(statistics.label_drift_residual),
    "persistence": _by_robust_z(statistics.persistence),
    # a statistic by other scorers
    "two_clusters": partial(score_by, statistics.final_rows, scorers.two_cluster_margin, threshold=TEXTBOOK),
    "agglomerative": partial(score_by, statistics.final_rows, scorers.agglomerative_margin, threshold=TEXTBOOK),
    "hdbscan": partial(score_by, statistics.layer_cosines, scorers.hdbscan_outlier, threshold=TEXTBOOK),
    "isolation_forest": partial(score_by, statistics.layer_cosines, scorers.isolation_forest, threshold=0.6),
    "local_outlier_factor": partial(score_by, statistics.layer_cosines, scorers.local_outlier_factor, threshold=1.5),
    # published, by the final layer
    "bilgin": bilgin,
    "tolpegin": tolpegin,
    "lfighter": lfighter,
    "auror": auror,
    "deepsight": deepsight,
    "freqfed": freqfed,
    # published, by distance and direction
    "krum": krum,
    "multi_krum": multi_krum,
    "multi_metrics": multi_metrics,
    "dnc": dnc,
    "flame": flame,
    "rflbat": rflbat,
    "signguard": signguard,
    "alignins": alignins,
    "rlr": rlr,
    "fltrust": fltrust,
    # published, over a client's rounds
    "foolsgold": foolsgold,
    "fldetector": fldetector,
    "flanders": flanders,
    # all together
    "panel": panel,
}

# the default of the command line and of reports: quick, and without a model to run
USUAL = ("final_bias", "final_rows", "layer_norms", "layer_cosines", "accumulated_norms", "panel")
