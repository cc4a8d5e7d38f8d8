"""From sums to who is accused: the heights of peeling beside the null's, whether there is a majority to judge by."""

from dataclasses import dataclass

import numpy as np

from gradlens.case.null import Null
from gradlens.case.peeling import FURTHER, MOST, accused, most_accused, peel
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
    no_majority : bool
        Whether more than 45 % of the clients stand out: then nobody can tell which side is honest.
    """

    p: float
    suspects: np.ndarray
    scores: np.ndarray
    no_majority: bool


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
    threshold, scoring, clients = null.threshold(fwer), null.scoring, len(sums.clients)
    whole = peel(sums, scoring, FURTHER)
    peeling = whole.up_to(most_accused(clients))
    suspects = accused(sums, scoring, peeling, threshold)
    standing_out = accused(sums, scoring, whole, threshold).sum()
    return Finding(
        null.p(peeling.highest), suspects, scoring.scores(sums, ~suspects), bool(standing_out > MOST * clients)
    )
