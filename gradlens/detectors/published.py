"""What the published detectors share: how one is built, what it judges, and the verdict made of its judgement.

A method is a function (log, **settings) -> `Judgement`. It is shown the comparable clients of the last round alone, so
that a client which sends NaN, 1e6 or 1e30 does not change another's score. It may look back in the log; earlier rounds
hold all their clients, also those that were not comparable then.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

from gradlens.detectors.verdict import Detector, Verdict, verdict_on
from gradlens.errors import CannotSay, InputError
from gradlens.log import Round, UpdateLog
from gradlens.settings import Configured, configured
from gradlens.statistics.cohort import SMALLEST


@dataclass(frozen=True, eq=False)
class Judgement:
    """What a method says about the clients it was shown, in their order.

    Parameters
    ----------
    scores : ndarray, float64 [client]
        Finite; higher is more suspicious. Without a unit that differs from run to run, so that scores of several rounds
        and runs can be compared.
    flags : ndarray, bool [client]
        The method's own published decision.
    weights : ndarray, float64 [client], optional
        Of a soft verdict, from 0 to 1.
    evidence : DataFrame [client, feature], optional
        What the score was made of.

    Examples
    --------
    >>> import numpy as np
    >>> from gradlens.detectors.published import Judgement
    >>> Judgement(scores=np.array([0.1, 7.0]), flags=np.array([False, True])).flags.sum().item()
    1
    """

    scores: np.ndarray
    flags: np.ndarray
    weights: np.ndarray | None = None
    evidence: pd.DataFrame | None = None


Method = Callable[..., Judgement]  # (log, **settings); raises CannotSay


def published(method: Method, **settings: Any) -> Detector:
    """The detector of a method with its settings.

    Parameters
    ----------
    method : callable
        ``(log, **settings) -> Judgement``; it raises `CannotSay` where it abstains.
    **settings
        Checked already, in the order in which they are printed.

    Returns
    -------
    PublishedDetector
        It prints as the method's name, without leading underscores, with its settings.

    Examples
    --------
    >>> from gradlens.detectors.published import Judgement, published
    >>> from gradlens.examples import example_log
    >>> def longest(log, times):
    ...     norms = log[-1].total_norms
    ...     return Judgement(norms, norms > times * norms.mean())
    >>> detector = published(longest, times=2.0)
    >>> detector
    longest(times=2.0)
    >>> verdict = detector(example_log())
    >>> verdict.clients[verdict.flags].tolist()
    ['client-9']
    """
    return PublishedDetector(configured(method, **settings))


@dataclass(frozen=True, repr=False)
class PublishedDetector:
    """The detector that `published` builds.

    Parameters
    ----------
    method : Configured
        A method with its settings.

    Examples
    --------
    >>> from gradlens import DETECTORS
    >>> DETECTORS["flame"]()
    flame(on='updates')
    """

    method: Configured

    def __call__(self, log: UpdateLog) -> Verdict:
        """The verdict on the last round; raises InputError if the method's scores are not finite, one per client."""
        return judged(log, self.method, "uncalibrated: the published rule")

    def __repr__(self) -> str:
        return repr(self.method)


def judged(log: UpdateLog, method: Callable[[UpdateLog], Judgement], null: str) -> Verdict:
    """The verdict that a method's judgement of the comparable clients of the last round makes.

    Parameters
    ----------
    log : UpdateLog
        The rounds so far.
    method : callable
        ``log -> Judgement``.
    null : str
        What the threshold rests on, for the verdict.

    Returns
    -------
    Verdict
        Clients that are refused or not comparable score +inf and are flagged. With fewer than 3 comparable clients, or
        where the method cannot say, it is an abstention.

    Raises
    ------
    InputError
        If the method's scores are not finite, one per client.
    """
    round_ = log[-1]
    shown, scores = np.flatnonzero(round_.comparable), np.zeros(len(round_))
    try:
        if len(shown) < SMALLEST:
            raise CannotSay(f"round {round_.index} has {len(shown)} comparable clients, at least {SMALLEST} are needed")
        judgement = method(log if round_.comparable.all() else log.keep(round_.comparable))
    except CannotSay as reason:
        return verdict_on(round_, scores, np.inf, abstained=str(reason), null=null)
    if np.shape(judgement.scores) != shown.shape or not np.isfinite(judgement.scores).all():
        raise InputError(f"a detector's method must give a finite score for each of {len(shown)} clients")
    scores[shown] = judgement.scores
    evidence = None if judgement.evidence is None else judgement.evidence.reindex(round_.clients)
    verdict = verdict_on(round_, scores, np.inf, evidence=evidence, null=null)
    verdict.flags[shown] = judgement.flags
    if judgement.weights is None:
        return verdict
    weights = np.zeros(len(verdict.clients))
    weights[shown] = judgement.weights
    return replace(verdict, weights=weights)


def evidence_of(round_: Round, columns: dict[str, np.ndarray]) -> pd.DataFrame:
    """Columns [client] as the evidence of a judgement on the clients of a round."""
    return pd.DataFrame(columns, index=pd.Index(round_.clients.tolist(), name="client"))


def relative(scores: np.ndarray) -> np.ndarray:
    """Scores [client] as multiples of their median, or of their mean where that is 0; all 0 where all are 0.

    Examples
    --------
    >>> relative(np.array([1.0, 2.0, 8.0])).tolist()
    [0.5, 1.0, 4.0]
    """
    scale = np.median(scores) or scores.mean()
    return scores / scale if scale > 0 else np.zeros_like(scores)
