"""What the published detectors share: a rule over the comparable clients of a round, and the verdict made of it.

A rule is a function (log, **settings) -> `Judgement` that sees the comparable clients of the last round alone, so that
no client that sends NaN, 1e6 or 1e30 changes what is said of another. It may look back in the log; earlier rounds
hold all their clients, also those that were not comparable then.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from gradlens.detectors.verdict import Detector, Verdict
from gradlens.log import CannotSay, InputError, UpdateLog


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
        round_ = log[-1]
        comparable = round_.comparable
        refused = sorted(round_.refused)
        clients = np.concatenate([round_.clients, np.array(refused, dtype=np.str_)])
        scores, weights = np.full(len(clients), np.inf), np.zeros(len(clients))
        shown, null = np.flatnonzero(comparable), "uncalibrated: the published rule"
        try:
            judgement = self._judged(log, comparable)
        except CannotSay as reason:
            scores[shown] = 0
            return Verdict(clients, scores, np.isposinf(scores), abstained=str(reason), null=null)
        scores[shown] = judgement.scores
        flags = np.isposinf(scores)
        flags[shown] = judgement.flags
        if judgement.weights is not None:
            weights[shown] = judgement.weights
        evidence = None if judgement.evidence is None else judgement.evidence.reindex(round_.clients)
        return Verdict(clients, scores, flags, None if judgement.weights is None else weights, evidence, null=null)

    def _judged(self, log: UpdateLog, comparable: np.ndarray) -> Judgement:
        found = int(comparable.sum())
        if found < self.smallest:
            index = log[-1].index
            raise CannotSay(f"round {index} has {found} comparable clients, at least {self.smallest} are needed")
        judgement = self.rule(log if comparable.all() else log.keep(comparable), **dict(self.settings))
        if np.shape(judgement.scores) != (found,) or not np.isfinite(judgement.scores).all():
            raise InputError(f"{self!r} must give a finite score for each of {found} clients")
        return judgement

    def __repr__(self) -> str:
        settings = ", ".join(f"{name}={value!r}" for name, value in self.settings)
        return f"{self.rule.__name__.strip('_')}({settings})"
