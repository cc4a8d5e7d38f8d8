"""gradlens finds the clients that poison a federated model and shows where they gave themselves away."""

from gradlens.aggregators import AGGREGATORS, filtered
from gradlens.attribution import influence, label_drift, suspected_labels, sybils
from gradlens.detectors import DETECTORS, Verdict, calibrate, detect, score_by
from gradlens.errors import CannotSay, InputError
from gradlens.evaluation import evaluate, per_client, rounds_to_detection, with_truth
from gradlens.ingestion import ingest
from gradlens.localization import localize
from gradlens.log import Evidence, LogWriter, ModelSpec, Round, UpdateLog
from gradlens.replays import Replay, replay
from gradlens.reporting import report
from gradlens.run import Run, Sweep
from gradlens.run import open_run as open
from gradlens.scorers import SCORERS
from gradlens.server import Recorder
from gradlens.statistics import STATISTICS

__all__ = [
    "AGGREGATORS",
    "DETECTORS",
    "SCORERS",
    "STATISTICS",
    "CannotSay",
    "Evidence",
    "InputError",
    "LogWriter",
    "ModelSpec",
    "Recorder",
    "Replay",
    "Round",
    "Run",
    "Sweep",
    "UpdateLog",
    "Verdict",
    "calibrate",
    "detect",
    "evaluate",
    "filtered",
    "influence",
    "ingest",
    "label_drift",
    "localize",
    "open",
    "per_client",
    "replay",
    "report",
    "rounds_to_detection",
    "score_by",
    "suspected_labels",
    "sybils",
    "with_truth",
]
