"""gradlens finds the clients that poison a federated model and shows where they gave themselves away.

Every name below is imported when it is first used, so that the command line starts quickly.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from gradlens import moved as _moved

if TYPE_CHECKING:
    from gradlens.aggregators import AGGREGATORS, filtered
    from gradlens.attribution import influence, label_drift, suspected_labels, sybils
    from gradlens.case import Case, investigate
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
    from gradlens.server import Recorder, Signed, StartedFrom
    from gradlens.statistics import STATISTICS

__version__: str

_HOMES = {
    "aggregators": ("AGGREGATORS", "filtered"),
    "attribution": ("influence", "label_drift", "suspected_labels", "sybils"),
    "case": ("Case", "investigate"),
    "detectors": ("DETECTORS", "Verdict", "calibrate", "detect", "score_by"),
    "errors": ("CannotSay", "InputError"),
    "evaluation": ("evaluate", "per_client", "rounds_to_detection", "with_truth"),
    "ingestion": ("ingest",),
    "localization": ("localize",),
    "log": ("Evidence", "LogWriter", "ModelSpec", "Round", "UpdateLog"),
    "replays": ("Replay", "replay"),
    "reporting": ("report",),
    "run": ("Run", "Sweep", "open"),
    "scorers": ("SCORERS",),
    "server": ("Recorder", "Signed", "StartedFrom"),
    "statistics": ("STATISTICS",),
}
_MODULE_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "AGGREGATORS",
    "DETECTORS",
    "SCORERS",
    "STATISTICS",
    "CannotSay",
    "Case",
    "Evidence",
    "InputError",
    "LogWriter",
    "ModelSpec",
    "Recorder",
    "Replay",
    "Round",
    "Run",
    "Signed",
    "StartedFrom",
    "Sweep",
    "UpdateLog",
    "Verdict",
    "calibrate",
    "detect",
    "evaluate",
    "filtered",
    "influence",
    "ingest",
    "investigate",
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

_moved.register()


def __getattr__(name: str) -> Any:
    if name in _MODULE_OF:
        value = getattr(import_module(f"gradlens.{_MODULE_OF[name]}"), {"open": "open_run"}.get(name, name))
        globals()[name] = value
        return value
    if name == "__version__":
        return import_module("importlib.metadata").version("gradlens-forensics")
    if name in _HOMES:
        return import_module(f"gradlens.{name}")
    raise AttributeError(f"module 'gradlens' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_HOMES})
