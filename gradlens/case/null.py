"""What a case rests on: how high the most conspicuous client of an attack-free recording comes."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gradlens.case.camps import camps_of
from gradlens.case.peeling import SMALLEST, peel
from gradlens.case.scoring import Scoring
from gradlens.case.sums import Sums
from gradlens.log import ModelSpec
from gradlens.words import count

TRANSFER = 0.9  # share of settings like those of the reference in which its rate holds


@dataclass(frozen=True, eq=False)
class Null:
    """The highest scores of attack-free recordings, and the scoring by which they were read.

    Attributes
    ----------
    kind : str
        "attack-free recordings", "clean stretch" or "reference".
    scoring : Scoring
        Reads the recording as it read those of the null.
    highest : tuple of numpy.ndarray
        For every setting float64 [recording], sorted: the largest height at which its peeling took a client out. One
        setting where the recordings are of the very setting of the case.
    apart : tuple of numpy.ndarray
        Likewise, how far the two camps of every recording stand apart (`camps_of`).
    clients : int
        Clients of these recordings, in all.
    says : str
        What it rests on, and where its rate holds.
    model : ModelSpec or None
        Of its recordings; None where recordings of any model can be compared.

    Examples
    --------
    >>> from gradlens.case.shipped import reference
    >>> reference().null().kind
    'reference'
    """

    kind: str
    scoring: Scoring
    highest: tuple[np.ndarray, ...]
    apart: tuple[np.ndarray, ...]
    clients: int
    says: str
    model: ModelSpec | None = None

    @property
    def recordings(self) -> int:
        """How many attack-free recordings there are."""
        return sum(map(len, self.highest))

    @property
    def resolves(self) -> float:
        """The smallest p that any recording can get."""
        return self._of_settings([1 / (1 + len(heights)) for heights in self.highest])

    def p(self, height: float) -> float:
        """p of a recording whose most conspicuous client comes so high.

        Of a single setting it is (1 + recordings at least as high) / (recordings + 1). Of J settings it is the
        ceil(.9 (J + 1))-th smallest of theirs, which holds in a new one of the kind with probability .9 [1]_.

        Parameters
        ----------
        height : float

        References
        ----------
        .. [1] Dunn, Wasserman & Ramdas 2023, JASA 118.
        """
        return self._p(height, self.highest)

    def threshold(self, fwer: float) -> float:
        """The height that must be exceeded for p to be at most `fwer`; inf where the null cannot tell.

        Parameters
        ----------
        fwer : float
        """
        return self._threshold(fwer, self.highest)

    def apart_threshold(self, fwer: float) -> float:
        """How far two camps must stand apart for that to happen in a share `fwer` of attack-free recordings at most.

        Parameters
        ----------
        fwer : float
        """
        return self._threshold(fwer, self.apart)

    def _p(self, value: float, known: Sequence[np.ndarray]) -> float:
        return self._of_settings([(1 + np.sum(values >= value)) / (1 + len(values)) for values in known])

    def _threshold(self, fwer: float, known: Sequence[np.ndarray]) -> float:
        if self.resolves > fwer:
            return math.inf
        values = np.unique(np.concatenate(known))
        return float(min(value for value in values if self._p(np.nextafter(value, np.inf), known) <= fwer))

    def _of_settings(self, values: Sequence[float]) -> float:
        if len(values) == 1:
            return float(values[0])
        place = math.ceil(TRANSFER * (len(values) + 1))
        return float(np.sort(values)[place - 1]) if place <= len(values) else 1.0


def needed(fwer: float) -> int:
    """How many attack-free recordings of a setting resolve a rate.

    Parameters
    ----------
    fwer : float

    Examples
    --------
    >>> needed(0.05), needed(0.01)
    (19, 99)
    """
    return math.ceil(round(1 / fwer, 9)) - 1


def null_of(recordings: Sequence[Sequence[Sums]], scoring: Scoring, model: ModelSpec | None = None) -> Null:
    """The null of attack-free recordings of the same setting.

    Parameters
    ----------
    recordings : sequence of sequence of Sums
        Of every recording the sums after each look.
    scoring : Scoring
    model : ModelSpec, optional
        Of all recordings.

    Examples
    --------
    >>> from gradlens.case.shipped import reference
    >>> from gradlens.case.sums import sums_of
    >>> from gradlens.examples import example_log
    >>> free = [[sums_of(example_log(num_malicious=0, seed=seed))] for seed in range(1, 4)]
    >>> null_of(free, reference().scoring).recordings
    3
    """
    highest = [
        max((peel(sums, scoring).highest for sums in looks if len(sums.clients) >= SMALLEST), default=np.inf)
        for looks in recordings
    ]
    apart = [
        camps_of(looks[-1], scoring).apart if len(looks[-1].clients) >= SMALLEST else np.inf for looks in recordings
    ]
    clients = sum(len(looks[-1].clients) for looks in recordings)
    says = (
        f"{count(len(recordings), 'attack-free recording')} with {count(clients, 'client')}, taken to be of the same "
        "setting: the rate holds for such recordings"
    )
    return Null("attack-free recordings", scoring, (np.sort(highest),), (np.sort(apart),), clients, says, model)
