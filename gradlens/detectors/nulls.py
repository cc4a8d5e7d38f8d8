"""What thresholds rest on: scores of benign updates, and the clients and runs that they are of."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import ndtri

from gradlens.errors import InputError
from gradlens.log import UpdateLog
from gradlens.ranks import rank_threshold, smallest_rate, units_needed
from gradlens.words import count


@dataclass(frozen=True, eq=False)
class NullScores:
    """The scores of a null.

    Parameters
    ----------
    scores : ndarray, float64 [score]
        Finite: a client that was refused, or whose update was not finite, is flagged whatever the threshold and says
        nothing of how high the others score.
    units : ndarray, int64 [score]
        Which client of which run each score is of. The rounds of one client are not independent of each other, since
        its data persist: however many there are, they count as one.
    runs : int
        How many runs they are of.
    left_out : int, default 0
        Number of updates that were refused or not finite.

    Examples
    --------
    >>> import numpy as np
    >>> from gradlens.detectors.nulls import NullScores
    >>> null = NullScores(np.arange(60.0), np.repeat(np.arange(30), 2), runs=3, left_out=1)
    >>> null.clients, null.threshold(0.05), null.summary
    (30, 58.0, '30 clients, 60 scores, 1 update left out as refused or not finite')
    """

    scores: np.ndarray
    units: np.ndarray
    runs: int
    left_out: int = 0

    @property
    def clients(self) -> int:
        """How many independent units there are: clients, each counted once for every run it is in."""
        return len(np.unique(self.units))

    @property
    def summary(self) -> str:
        """What there is, and what was left out, in words."""
        text = f"{count(self.clients, 'client')}, {count(len(self.scores), 'score')}"
        if self.left_out:
            text += f", {count(self.left_out, 'update')} left out as refused or not finite"
        return text

    def threshold(self, fpr: float, what: str = "") -> float:
        """The score that an update of one more client exceeds with probability at most `fpr` (`rank_threshold`).

        Raises InputError if the null has too few clients; it then says how many are needed, `what` being the null.
        """
        needed, clients = units_needed(fpr), self.clients
        if clients >= needed:
            return rank_threshold(self.scores, self.units, fpr)
        ways = [f"set fpr to at least {smallest_rate(clients):g}"] if clients else []
        if clients and not what.startswith("declared clean"):
            ways.insert(0, f"give {int(np.ceil(needed * self.runs / clients))} such runs")
        problem = f"calibrate to fpr {fpr:g} needs {needed} clients with a score, found {clients}"
        problem += f" ({what})" if what else ""
        advice = f": {' or '.join(ways)}" if ways else ""
        raise InputError(f"{problem}; rounds of the same client count once{advice}")


def nominal_threshold(scores: np.ndarray, fpr: float) -> float:
    """Median + normal quantile * 1.4826 MAD of a cohort's scores [client]: the cut of `calibrate` without a null."""
    finite = scores[np.isfinite(scores)]
    if not len(finite):
        return np.inf
    deviation = np.abs(finite - np.median(finite))
    sigma = 1.4826 * np.median(deviation) or 1.2533 * deviation.mean()
    return float(np.median(finite) + ndtri(1 - fpr) * sigma)


def attack_free(source: Any) -> UpdateLog:
    """The log of a null; raises InputError if it is none, or if its run's truth knows of a poisoned update."""
    if isinstance(source, UpdateLog):
        return source
    if not isinstance(getattr(source, "log", None), UpdateLog):
        raise InputError(f"a null is a sequence of runs or logs, a stretch of a log, or None, found {source!r:.80}")
    try:
        poisoned = int(source.truth["poisoned"].sum())
    except InputError:  # without recorded truth the caller's word counts
        poisoned = 0
    if poisoned:
        raise InputError(f"a null must be free of attacks, found {poisoned} poisoned updates in run {source.name}")
    return source.log
