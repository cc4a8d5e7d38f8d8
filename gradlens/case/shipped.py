"""The reference that is shipped with the package: weights of readings, and what attack-free recordings show by them.

`python -m simulations.studies.shipped_reference` makes it.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from typing import Any

import numpy as np

from gradlens.case.null import TRANSFER, Null
from gradlens.case.scoring import Scoring

NAME = "reference.json"


@dataclass(frozen=True, eq=False)
class Reference:
    """What `reference.json` holds.

    Attributes
    ----------
    version : int
        Counted up whenever figures change.
    scoring : Scoring
        Weights, and scales pooled over settings.
    settings : tuple of Mapping
        For each setting its description, the number of its clients, whether they are sampled, and float64 [recording]
        the highest score of each attack-free recording: "last", after the last round; "looks", the largest after
        rounds 1, 2, 4, 8, ... and the last; and "apart", how far the two camps of each stand apart after the last.

    Examples
    --------
    >>> len(reference().settings) >= 30
    True
    """

    version: int
    scoring: Scoring
    settings: tuple[Mapping[str, Any], ...]

    def null(self, *, sampled: bool = False, looks: bool = False) -> Null:
        """The null that it is for recordings without one of their own.

        Parameters
        ----------
        sampled : bool
            Whether only some of the clients take part in each round: recordings are compared with their like.
        looks : bool
            Whether the recording is looked at after 1, 2, 4, 8, ... rounds, too.
        """
        alike = [setting for setting in self.settings if setting["sampled"] == sampled]
        highest = tuple(np.sort(setting["looks" if looks else "last"]) for setting in alike)
        apart = tuple(np.sort(setting["apart"]) for setting in alike)
        clients = sum(setting["clients"] * len(setting["last"]) for setting in alike)
        whose = "in which some clients take part in each round" if sampled else "in which all clients take part"
        says = (
            f"the reference shipped with gradlens, version {self.version}: {sum(map(len, highest)):,} attack-free "
            f"recordings of {len(alike)} small settings {whose}. The rate holds in {100 * TRANSFER:.0f} % of settings "
            "of their kind, and is nominal in others"
        )
        return Null("reference", self.scoring, highest, apart, clients, says)


@lru_cache(maxsize=1)
def reference() -> Reference:
    """Reads the shipped reference.

    Examples
    --------
    >>> reference() is reference()
    True
    """
    stored = json.loads(files("gradlens.case").joinpath(NAME).read_text("utf-8"))
    readings = stored["readings"]
    named = ("scale", "above", "below", "side")
    columns = {name: np.array([reading[name] for reading in readings]) for name in named}
    scoring = Scoring(
        tuple(reading["name"] for reading in readings),
        columns["scale"],
        columns["above"],
        columns["below"],
        stored["intercept"],
        np.append(columns["side"], stored["one-sidedness"]),
    )
    settings = tuple(
        {**setting, **{name: _heights(setting[name]) for name in ("last", "looks", "apart")}}
        for setting in stored["settings"]
    )
    return Reference(stored["version"], scoring, settings)


def _heights(stored: list[float | None]) -> np.ndarray:
    """Stored heights; none, as of a recording without camps, is below all others."""
    return np.array([-np.inf if height is None else height for height in stored])
