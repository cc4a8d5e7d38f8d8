"""`filtered`: a detector's verdict decides who is aggregated, and how; `Decision`: what was decided, and why."""

from collections.abc import Collection
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from gradlens.aggregators.rules import Aggregator, Weighing, clip_factors, scaled
from gradlens.detectors import Detector, Verdict
from gradlens.detectors.verdict import verdict_on
from gradlens.errors import InputError, UnreadableError
from gradlens.log import Round, UpdateLog
from gradlens.log.writer import VERDICT_COLUMNS

__all__ = ["ACTIONS", "Decision", "FilterStopped", "FilteredAggregator", "filtered"]

ACTIONS = ("drop", "down_weight", "clip", "record")
FALLBACKS = ("keep_model", "use_all", "stop")
DISTRUSTED = 0.5  # what a flagged client counts at most, where a filter weighs down by its own rule


class FilterStopped(InputError):  # noqa: N818 - a decision, not a fault
    """A filter was told to stop where everybody is flagged, or where its detector abstains."""


def filtered(
    aggregate: Aggregator,
    detector: Detector,
    *,
    action: str = "drop",
    out_for: int | None = 0,
    when_all_flagged: str = "keep_model",
    when_abstained: str = "use_all",
    cleared: Collection[str] = (),
) -> "FilteredAggregator":
    """Aggregates the clients of the last round as the verdict on them says.

    action: what becomes of a flagged client.
    - "drop": it is left out.
    - "down_weight": each client counts by the verdict's weights where the detector gives them, a flagged one 1/2 at
      most where it is flagged for an earlier round. Without weights an unflagged client counts 1 and a flagged one
      1 / max(2, z), z = (score - median) / (1.4826 MAD) over the cohort's finite scores; 1/2 where the MAD is 0. The
      weights are scaled to mean 1 over who counts at all (for a mean by examples: that mean of them), so that a mean
      becomes the weighted mean of what clients count in it times their weights; other rules see updates of another
      length.
    - "clip": its norm is clipped to the median norm of the unflagged.
    - "record": nothing; the verdict is given, and everybody aggregated as without a filter.
    out_for: for how many rounds after its flag a client counts as flagged; 0: in that round only; None: until it is
    cleared. cleared: names whose earlier flags are forgotten. Flags of earlier rounds are asked from the log, so that
    a replay decides the same.
    when_all_flagged, when_abstained: "keep_model": the update is zero; "use_all": every client that is comparable
    (no verdict trusts the others: refused, not finite, of an absurd size) as without a filter, but under an abstention
    those yet out from an earlier flag stay out; "stop": `FilterStopped` is raised. Neither concerns "record".
    f is counted anew: a rule sees only those who are left, and its num_malicious is what it tolerates of them.
    Raises: InputError for another setting.
    """
    for setting, value, allowed in (
        ("action", action, ACTIONS),
        ("when_all_flagged", when_all_flagged, FALLBACKS),
        ("when_abstained", when_abstained, FALLBACKS),
    ):
        if value not in allowed:
            raise InputError(f"filtered: {setting} is one of {', '.join(allowed)}, found {value!r:.80}")
    if out_for is not None and (isinstance(out_for, bool) or not isinstance(out_for, int | np.integer) or out_for < 0):
        raise InputError(f"filtered: out_for is a number of rounds, or None until cleared, found {out_for!r:.80}")
    if isinstance(cleared, str):
        raise InputError(f"filtered: cleared is a set of clients' names, found the one name {cleared!r:.80}")
    memory = None if out_for is None else int(out_for)
    names = frozenset(str(name) for name in cleared)
    return FilteredAggregator(aggregate, detector, action, memory, when_all_flagged, when_abstained, names)


@dataclass(frozen=True, eq=False)
class Decision:
    """What a filter decided on the clients of a round: of those recorded, in the round's order, then the refused.

    weights: float64 [client], 0 for who is left out, 1 for who is used as it is, between them what a clipped or a
    weighed down client counts; reasons: str [client], why it is not 1, "" where it is; outcome: what held for the
    whole round, "" where the verdict decided on each client.
    """

    verdict: Verdict
    clients: np.ndarray
    weights: np.ndarray
    reasons: np.ndarray
    outcome: str = ""

    @property
    def kept(self) -> list[str]:
        """Names of the clients that are aggregated."""
        return self.clients[self.weights > 0].tolist()

    @property
    def stopped(self) -> bool:
        """Whether the filter was told to stop here."""
        return self.outcome.endswith(": stop")

    def weighing(self, weights: np.ndarray, outcome: str, done: str = "") -> "Decision":
        """The decision with these weights [client]; done: what was done to who counts less than 1 but more than 0."""
        reasons = [
            "" if weight == 1 else ", ".join(filter(None, (reason, done if weight > 0 else "")))
            for reason, weight in zip(self.reasons.tolist(), weights.tolist(), strict=True)
        ]
        return replace(self, weights=weights, outcome=outcome, reasons=np.array(reasons, dtype=np.str_))

    def table(self, round_: int, detector: str) -> pd.DataFrame:
        """The rows that `verdicts.arrow` holds of the round (`gradlens.run.VERDICT_COLUMNS`).

        reason: the client's own, then what held for the whole round.
        """
        reasons = ["; ".join(filter(None, (str(reason), self.outcome))) for reason in self.reasons]
        table = self.verdict.table(round_, detector).assign(
            kept=self.weights > 0, null=self.verdict.null, weight=self.weights, reason=np.array(reasons, dtype=np.str_)
        )
        return table[list(VERDICT_COLUMNS)]


@dataclass(frozen=True)
class FilteredAggregator:
    """What `filtered` builds."""

    aggregate: Aggregator
    detector: Detector
    action: str = "drop"
    out_for: int | None = 0
    when_all_flagged: str = "keep_model"
    when_abstained: str = "use_all"
    cleared: frozenset[str] = frozenset()

    def __call__(self, log: UpdateLog) -> dict[str, np.ndarray]:
        """The aggregated update; raises FilterStopped where the settings say so."""
        decision = self.decision(log)
        if decision.stopped:
            raise FilterStopped(f"round {log[-1].index}: {decision.outcome} was asked for by {self!r}")
        if self.action == "record":
            return self.aggregate(log)
        weights = decision.weights[: len(log[-1])]
        if self.action == "down_weight" and weights.any():
            weights = weights / _mean_weight(self.aggregate, log[-1], weights)
        return self.aggregate(scaled(log, np.arange(len(weights)), weights))

    @property
    def weighing(self) -> Weighing | None:
        """What clients count in the mean that the inner rule ends in; None: all alike."""
        return getattr(self.aggregate, "weighing", None)

    def verdict(self, log: UpdateLog) -> Verdict:
        """What the detector says of the last round."""
        return log.verdict(self.detector)

    def kept(self, log: UpdateLog) -> np.ndarray:
        """Which recorded clients of the last round are aggregated, bool [client]."""
        return self.decision(log).weights[: len(log[-1])] > 0

    def decision(self, log: UpdateLog) -> Decision:
        """What is decided on each client of the last round, and why; nothing is aggregated or raised for it."""
        round_ = log[-1]
        try:
            verdict, since = self.verdict(log), self._flagged_before(log)
        except UnreadableError as reason:  # a server goes on without the rounds that were taken from it
            verdict = verdict_on(round_, np.zeros(len(round_)), np.inf, abstained=f"earlier rounds are lost: {reason}")
            since = {}
        untrusted = np.isin(verdict.clients, round_.clients[round_.comparable], invert=True)
        out = verdict.flags | untrusted | np.isin(verdict.clients, list(since))
        said = Decision(verdict, verdict.clients, np.ones(len(out)), self._reasons(round_, verdict, since))
        if self.action == "record":
            finite = np.isin(verdict.clients, round_.clients[round_.finite])
            return said.weighing(finite * 1.0, "only recorded")
        if verdict.abstained and self.when_abstained != "use_all":
            return said.weighing(np.zeros(len(out)), f"the detector abstained: {self.when_abstained}")
        weights = self._weights(round_, verdict, out, untrusted)
        if len(out) and (out.all() or not weights.any()):
            outcome = f"everybody is flagged: {self.when_all_flagged}"
            weights = ~untrusted * 1.0 if self.when_all_flagged == "use_all" else np.zeros(len(out))
            return said.weighing(weights, outcome)
        outcome = "the detector abstained: use_all" if verdict.abstained else ""
        done = {"clip": "clipped", "down_weight": "weighed down"}.get(self.action, "")
        return said.weighing(weights, outcome, done)

    def _flagged_before(self, log: UpdateLog) -> dict[str, int]:
        """Clients that are yet out from an earlier flag -> the round of their last one."""
        if self.out_for == 0 or len(log) < 2:
            return {}
        flagged, now = log[:-1].folded(LastFlags(self.detector)), log[-1].index
        within = np.inf if self.out_for is None else self.out_for
        return {name: at for name, at in flagged.items() if now - at <= within and name not in self.cleared}

    def _weights(self, round_: Round, verdict: Verdict, out: np.ndarray, untrusted: np.ndarray) -> np.ndarray:
        """What each client of the verdict counts, [client], where not everybody is flagged."""
        recorded = len(round_)
        if self.action == "drop":
            return ~out * 1.0
        if self.action == "clip":
            norms, weights = round_.total_norms, ~out * 1.0
            if not out.all():
                own, finite = norms[~out[:recorded]], round_.finite
                clip = clip_factors(np.where(finite, norms, 0), float(np.median(own)) if len(own) else 0.0)
                weights[:recorded] = np.where(out[:recorded], clip * finite, 1.0)
            return weights
        if verdict.weights is not None:
            weights = np.where(out & ~verdict.flags, np.minimum(verdict.weights, DISTRUSTED), verdict.weights)
            return np.where(untrusted, 0.0, weights)
        scores = verdict.scores[~untrusted]
        spread = 1.4826 * np.median(np.abs(scores - np.median(scores))) if len(scores) else 0.0
        if spread > 0:
            z = np.where(untrusted, np.inf, (verdict.scores - np.median(scores)) / spread)
        else:
            z = np.zeros(len(out))
        return np.where(untrusted, 0.0, np.where(out, 1 / np.maximum(1 / DISTRUSTED, z), 1.0))

    def _reasons(self, round_: Round, verdict: Verdict, since: dict[str, int]) -> np.ndarray:
        """What speaks against each client of the verdict, str [client], "" if nothing does."""
        broken = set(round_.clients[~round_.finite].tolist())
        absurd = set(round_.clients[round_.finite & ~round_.comparable].tolist())

        def reason(client: str, flagged: bool) -> str:
            if client in round_.refused:
                return f"refused: {round_.refused[client]}"
            if client in broken:
                return "not finite"
            if client in absurd:
                return "too long to be compared"
            return "flagged" if flagged else f"flagged in round {since[client]}" if client in since else ""

        found = [reason(*each) for each in zip(verdict.clients.tolist(), verdict.flags.tolist(), strict=True)]
        return np.array(found, dtype=np.str_)

    def __repr__(self) -> str:
        changed = [
            f", {name}={value!r}"
            for name, value, usual in (
                ("action", self.action, "drop"),
                ("out_for", self.out_for, 0),
                ("when_all_flagged", self.when_all_flagged, "keep_model"),
                ("when_abstained", self.when_abstained, "use_all"),
                ("cleared", sorted(self.cleared), []),
            )
            if value != usual
        ]
        return f"filtered({self.aggregate!r}, {self.detector!r}{''.join(changed)})"


def _mean_weight(aggregate: Aggregator, round_: Round, weights: np.ndarray) -> float:
    """The mean of the weights [client] over who counts at all; by examples where the rule ends in a mean by them."""
    rows, weighing = np.flatnonzero(weights), getattr(aggregate, "weighing", None)
    shares = np.ones(len(rows)) if weighing is None else weighing(round_, rows)
    return float(np.average(weights[rows], weights=shares))


@dataclass(frozen=True)
class LastFlags:
    """A step for `UpdateLog.folded`: client -> the last round in which the detector flagged it."""

    detector: Detector

    def __call__(self, before: dict[str, int] | None, log: UpdateLog) -> dict[str, int]:
        verdict, index = log.verdict(self.detector), log.last_index
        return {**(before or {}), **dict.fromkeys(verdict.clients[verdict.flags].tolist(), index)}
