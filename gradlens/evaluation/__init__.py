"""Evaluation: how well scores separate poisoned from benign updates, with intervals over seeds.

A seed is one run of a setting, and only seeds are repeated: the clients of a run share its model and its data, so
intervals over clients would be too narrow.
"""

from gradlens.evaluation.detection import detection_times, rounds_to_detection
from gradlens.evaluation.intervals import bootstrap, mean_interval
from gradlens.evaluation.metrics import evaluate
from gradlens.evaluation.ranking import auc, average_precision, roc_points
from gradlens.evaluation.truth import per_client, with_truth

__all__ = [
    "auc", "average_precision", "bootstrap", "detection_times", "evaluate", "mean_interval", "per_client", "roc_points",
    "rounds_to_detection", "with_truth",
]  # fmt: skip
