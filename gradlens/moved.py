"""Module paths of version 0.1, most of which bore the names of functions; kept until version 0.3 with a warning."""

import sys
import warnings
from importlib import import_module
from types import ModuleType
from typing import Any

MOVED = {
    "gradlens.ingest": "gradlens.ingestion",
    "gradlens.localize": "gradlens.localization",
    "gradlens.replay": "gradlens.replays",
    "gradlens.report": "gradlens.reporting",
    "gradlens.log.received": "gradlens.log.intake",
}


class MovedModule(ModuleType):
    """Stands in for a module that moved: warns, and gives what its new place holds."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        place = MOVED[self.__name__]
        warnings.warn(f"{self.__name__} is now {place}", DeprecationWarning, stacklevel=2)
        return getattr(import_module(place), name)


def register() -> None:
    """Makes the old paths importable; `gradlens.report` and its like stay functions."""
    for path in MOVED:
        sys.modules.setdefault(path, MovedModule(path))
