"""What the published detectors share: a rule over the comparable clients of a round, and the verdict made of it.

A rule is a function (log, **settings) -> `Judgement` that sees the comparable clients of the last round alone, so that
no client that sends NaN, 1e6 or 1e30 changes what is said of another. It may look back in the log; earlier rounds
hold all their clients, also those that were not comparable then.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import pandas as pd

from gradlens.detectors.verdict import Detector, Verdict, verdict_on
from gradlens.errors import CannotSay, InputError
from gradlens.log import UpdateLog


@dataclass(frozen=True, eq=False)
class Judgement:
    """What a rule says of the clients it was shown, in their order.

    scores: float64 [client], finite, higher = more suspicious, without a unit that differs from run to run, so that
    scores of several rounds and runs can be compared; flags: bool [client], the method's own published decision;
    weights: float64 [client] from 0 to 1, of a soft verdict; evidence: [client, feature], what the score was made of.
    """

    scores: np.ndarray
    flags: np.ndarray
    weights: np.ndarray | None = None
    evidence: pd.DataFrame | None = None


Rule = Callable[..., Judgement]  # (log, **settings); raises CannotSay


def published(rule: Rule, smallest: int = 3, **settings: Any) -> Detector:
    """The detector of a rule; it abstains below `smallest` comparable clients and where the rule cannot say."""
    return PublishedDetector(rule, tuple(settings.items()), smallest)


@dataclass(frozen=True)
class PublishedDetector:
    """What `published` builds."""

    rule: Rule
    settings: tuple[tuple[str, Any], ...]
    smallest: int

    def __call__(self, log: UpdateLog) -> Verdict:
        """The verdict on the last round; raises InputError where the rule breaks its promise of finite scores."""
        return judged(log, partial(self.rule, **dict(self.settings)), self.smallest, "uncalibrated: the published rule")

    def __repr__(self) -> str:
        settings = ", ".join(f"{name}={value!r}" for name, value in self.settings)
        return f"{self.rule.__name__.strip('_')}({settings})"


def judged(log: UpdateLog, judge: Callable[[UpdateLog], Judgement], smallest: int, null: str) -> Verdict:
    """The verdict made of what a rule says of the comparable clients of the last round.

    Who is refused or not comparable scores +inf and is flagged; below `smallest` comparable clients, or where the
    rule cannot say, it is an abstention. Raises: InputError where the rule's scores are not finite, one per client.
    """
    round_ = log[-1]
    shown, scores = np.flatnonzero(round_.comparable), np.zeros(len(round_))
    try:
        if len(shown) < smallest:
            found = f"round {round_.index} has {len(shown)} comparable clients"
            raise CannotSay(f"{found}, at least {smallest} are needed")
        judgement = judge(log if round_.comparable.all() else log.keep(round_.comparable))
    except CannotSay as reason:
        return verdict_on(round_, scores, np.inf, abstained=str(reason), null=null)
    if np.shape(judgement.scores) != shown.shape or not np.isfinite(judgement.scores).all():
        raise InputError(f"a detector's rule must give a finite score for each of {len(shown)} clients")
    scores[shown] = judgement.scores
    evidence = None if judgement.evidence is None else judgement.evidence.reindex(round_.clients)
    verdict = verdict_on(round_, scores, np.inf, evidence=evidence, null=null)
    verdict.flags[shown] = judgement.flags
    if judgement.weights is None:
        return verdict
    weights = np.zeros(len(verdict.clients))
    weights[shown] = judgement.weights
    return replace(verdict, weights=weights)
