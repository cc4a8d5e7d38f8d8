"""From sums to who is accused: the heights of peeling beside the null's, whether there is a majority to judge by."""

from dataclasses import dataclass

import numpy as np

from gradlens.case.camps import SEVERAL, camps_of, malicious_side
from gradlens.case.null import Null
from gradlens.case.peeling import MOST, accused, most_accused, peel
from gradlens.case.scoring import Scoring
from gradlens.case.sums import Sums

ESTABLISHED, SUSPECTED, NOT_ESTABLISHED, CANNOT_SAY = "established", "suspected", "not established", "cannot say"
SUSPICION = 0.2  # p up to which something is suspected


@dataclass(frozen=True, eq=False)
class Finding:
    """What one look at a recording finds.

    Attributes
    ----------
    p : float
        Of the recording.
    suspects : numpy.ndarray
        bool [client], who stays significant when put back alone.
    scores : numpy.ndarray
        float64 [client], each judged by those that are no suspects.
    undecided : numpy.ndarray or None
        bool [client], the smaller of two camps of which it cannot be told which one is honest; None where it can.
    """

    p: float
    suspects: np.ndarray
    scores: np.ndarray
    undecided: np.ndarray | None


def look(sums: Sums, null: Null, fwer: float) -> Finding:
    """Looks at a recording.

    Parameters
    ----------
    sums : Sums
    null : Null
    fwer : float

    Examples
    --------
    >>> from gradlens.case.shipped import reference
    >>> from gradlens.case.sums import sums_of
    >>> from gradlens.examples import example_log
    >>> np.flatnonzero(look(sums_of(example_log(num_malicious=2)), reference().null(), 0.05).suspects).tolist()
    [8, 9]
    """
    threshold, scoring = null.threshold(fwer), null.scoring
    peeling = peel(sums, scoring)
    suspects = accused(sums, scoring, peeling, threshold)
    scores = scoring.scores(sums, ~suspects)
    camps = camps_of(sums, scoring)
    groups = [camps.smaller] if camps.apart > null.apart_threshold(fwer) else []
    as_many_as_can_be = suspects.sum() >= most_accused(len(suspects))
    groups.append(suspects | (scores > threshold) if as_many_as_can_be else suspects)
    return Finding(null.p(peeling.highest), suspects, scores, _undecided(sums, scoring, groups))


def _undecided(sums: Sums, scoring: Scoring, groups: list[np.ndarray]) -> np.ndarray | None:
    """The first group that may be the honest one, or that leaves no majority to judge it; None if none does.

    A group of more than a quarter of the clients is accused only if it looks, rather than the others, as malicious
    sides do.
    """
    for group in groups:
        if group.sum() <= SEVERAL * len(group):
            continue
        if group.sum() > MOST * len(group) or malicious_side(sums, scoring, group) <= 0:
            return group
    return None
