"""Filters: a detector's verdict decides which clients enter a rule, and with which weight (`filtered`, `Decision`)."""

import warnings
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

from gradlens.aggregators.rules import Aggregator, Weighing, clip_factors, scaled
from gradlens.detectors import Detector, Verdict, calibrate
from gradlens.detectors.verdict import verdict_on
from gradlens.errors import EverybodyRefused, InputError, UnreadableError
from gradlens.log import Round, UpdateLog
from gradlens.log.writer import VERDICT_COLUMNS
from gradlens.settings import whole_number

__all__ = ["ACTIONS", "Decision", "FilterStopped", "FilteredAggregator", "calibrated_filter", "filtered"]

ACTIONS = ("drop", "down_weight", "clip", "record")
FALLBACKS = ("keep_model", "use_all", "stop")
MOST_OF_FLAGGED = 0.5  # largest weight of a flagged client where the detector gives no weights for this round


class FilterStopped(InputError):  # noqa: N818 - a decision, not a fault
    """Raised by a filter that is set to "stop" when all clients are flagged, or when its detector abstains.

    Examples
    --------
    >>> from gradlens.aggregators import mean
    >>> from gradlens.detectors import DETECTORS
    >>> from gradlens.examples import example_log
    >>> rule = filtered(mean(), DETECTORS["layer_norms"](), when_abstained="stop")
    >>> try:
    ...     rule(example_log(num_clients=2))
    ... except FilterStopped as reason:
    ...     print(str(reason).partition(", as set in")[0])
    round 3: the detector abstained: stop
    """


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
    """Builds a rule that aggregates the clients of the last round as a detector's verdict on them says.

    Parameters
    ----------
    aggregate : Aggregator
        The rule for the clients that enter. It sees only them: its `num_malicious`, where it is None, is counted anew.
    detector : Detector
        Gives the verdict.
    action : {"drop", "down_weight", "clip", "record"}
        What becomes of a flagged client. "drop": it is left out. "down_weight": its update is scaled down, see Notes.
        "clip": its norm is clipped to the median norm of the unflagged clients. "record": nothing; the verdict is
        recorded and all clients are aggregated as without a filter.
    out_for : int or None
        For how many rounds after its flag a client still counts as flagged; 0: in that round only; None: until it is
        cleared. Earlier flags are read from the log, so that a replay decides the same.
    when_all_flagged, when_abstained : {"keep_model", "use_all", "stop"}
        What happens when all clients are flagged, or the detector abstains. "keep_model": the update is zero.
        "use_all": all comparable clients enter as without a filter, though after an abstention those that are out by an
        earlier flag stay out. "stop": `FilterStopped` is raised. Neither concerns "record".
    cleared : collection of str
        Clients whose earlier flags are forgotten.

    Returns
    -------
    FilteredAggregator
        Also gives the `Decision` on each client.

    Raises
    ------
    InputError
        For another setting.

    Notes
    -----
    Clients that were refused, are not finite or too long to be compared do not enter; "record" leaves the last kind to
    the rule.

    Under "down_weight" a client counts by the verdict's weights where the detector gives them; one that is flagged for
    an earlier round counts 1/2 at most. Without such weights an unflagged client counts 1 and a flagged one
    1 / max(2, z), where z = (score - median) / (1.4826 MAD) over the finite scores of the cohort; 1/2 where the MAD is
    0. Weights are scaled to mean 1 over the clients that enter (weighted by examples if the rule is such a mean), so
    that a mean becomes the weighted mean; other rules see updates of another length.

    **Fails when** the detector misses the attackers, or flags benign clients whose data differ from the others'.

    Examples
    --------
    >>> from gradlens.aggregators import mean
    >>> from gradlens.detectors import DETECTORS
    >>> from gradlens.examples import example_log
    >>> rule = filtered(mean(), DETECTORS["layer_norms"]())
    >>> decision = rule.decision(example_log())
    >>> sorted(set(decision.clients.tolist()) - set(decision.kept))
    ['client-9']
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


def calibrated_filter(
    aggregate: Aggregator, detector: Detector, *, clean_rounds: int = 0, fpr: float = 0.05, **settings: Any
) -> "FilteredAggregator":
    """Builds a filter whose detector is calibrated on the first rounds, which are declared clean.

    Parameters
    ----------
    aggregate : Aggregator
        The rule for the clients that enter.
    detector : Detector
        Gives the verdict.
    clean_rounds : int
        How many first rounds calibrate the detector; 0: it keeps its own threshold.
    fpr : float
        The share of benign updates that it may flag, above 0 and below 1; without clean rounds it changes nothing.
    **settings
        As for `filtered`.

    Returns
    -------
    FilteredAggregator
        As `filtered(aggregate, calibrate(detector, null=clean_rounds, fpr=fpr), **settings)`.

    Raises
    ------
    InputError
        For a setting out of its range.

    Examples
    --------
    >>> from gradlens.aggregators import median
    >>> from gradlens.detectors import DETECTORS
    >>> calibrated_filter(median(), DETECTORS["flame"](), clean_rounds=3, action="clip")
    filtered(median(), calibrate(flame(on='updates'), null=3, fpr=0.05), action='clip')
    """
    rounds = whole_number("clean_rounds", clean_rounds)
    if isinstance(fpr, bool) or not isinstance(fpr, int | float) or not 0 < fpr < 1:
        raise InputError(f"fpr must be a rate above 0 and below 1, found {fpr!r:.80}")
    return filtered(aggregate, calibrate(detector, null=rounds, fpr=fpr) if rounds else detector, **settings)


@dataclass(frozen=True, eq=False)
class Decision:
    """What a filter decided on each client of a round.

    Attributes
    ----------
    verdict : Verdict
        What the detector says of the clients.
    clients : ndarray of str [client]
        Those recorded, in the order of the round, then those refused.
    weights : ndarray of float64 [client]
        0: left out; 1: used as it is; between: clipped or weighed down.
    reasons : ndarray of str [client]
        Why the weight is not 1, "" where it is.
    outcome : str
        What held for the whole round, "" where the verdict decided on each client.

    Examples
    --------
    >>> from gradlens.aggregators import mean
    >>> from gradlens.detectors import DETECTORS
    >>> from gradlens.examples import example_log
    >>> decision = filtered(mean(), DETECTORS["layer_norms"](), action="clip").decision(example_log())
    >>> decision.weights.round(2).tolist()[-2:], decision.reasons.tolist()[-1]
    ([1.0, 0.25], 'flagged, clipped')
    """

    verdict: Verdict
    clients: np.ndarray
    weights: np.ndarray
    reasons: np.ndarray
    outcome: str = ""

    @classmethod
    def unfiltered(cls, round_: Round) -> "Decision":
        """The decision without a filter: keeps every client whose numbers are all finite."""
        verdict = verdict_on(round_, np.zeros(len(round_)), np.inf, abstained="no detector was asked")
        finite = np.isin(verdict.clients, round_.clients[round_.finite])
        reasons = [
            f"refused: {round_.refused[client]}" if client in round_.refused else "" if kept else "not finite"
            for client, kept in zip(verdict.clients.tolist(), finite, strict=True)
        ]
        return cls(verdict, verdict.clients, finite * 1.0, np.array(reasons, np.str_), "only recorded")

    def in_order(self, clients: Sequence[str], notes: Mapping[str, str]) -> "Decision":
        """The decision with its clients in another order, and with notes, client -> text, among the reasons."""
        places = {client: place for place, client in enumerate(self.clients.tolist())}
        rows = np.array([places[client] for client in clients], dtype=np.int64)
        reasons = [
            "; ".join(part for part in (reason, notes.get(client, "")) if part)
            for client, reason in zip(clients, self.reasons[rows].tolist(), strict=True)
        ]
        ordered = np.array(clients, np.str_)
        return replace(self, clients=ordered, weights=self.weights[rows], reasons=np.array(reasons, np.str_))

    def warn_if_nobody_is_kept(self, round_: Round) -> None:
        """Warns if a round changes nothing, with the most frequent reason: everybody was refused, or left out."""
        if not len(self.clients) or self.weights.any():
            return
        total = len(self.clients)
        reasons = round_.refused.values() if not len(round_) else self.reasons.tolist()
        reason, count = Counter(reasons).most_common(1)[0]
        reason = reason or self.outcome
        others = f" ({count} of {total})" if count < total else ""
        done = "is used" if len(round_) else "could be recorded"
        message = f"round {round_.index}: nothing of {total} clients {done}: {reason}{others}"
        if reason.endswith("is missing"):
            message += "; Recorder(layers=...) names the layers that clients send, where these are not all"
        warnings.warn(EverybodyRefused(message), stacklevel=4)

    @property
    def kept(self) -> list[str]:
        """Names of the clients that enter, list of str."""
        return self.clients[self.weights > 0].tolist()

    @property
    def stopped(self) -> bool:
        """Whether the filter is set to stop in such a round."""
        return self.outcome.endswith(": stop")

    def weighing(self, weights: np.ndarray, outcome: str, done: str = "") -> "Decision":
        """Returns the decision with these weights [client] and their reasons.

        `done` is the reason added for clients whose weight lies between 0 and 1, such as "clipped".
        """
        reasons = [
            "" if weight == 1 else ", ".join(filter(None, (reason, done if weight > 0 else "")))
            for reason, weight in zip(self.reasons.tolist(), weights.tolist(), strict=True)
        ]
        return replace(self, weights=weights, outcome=outcome, reasons=np.array(reasons, dtype=np.str_))

    def table(self, round_: int, detector: str) -> pd.DataFrame:
        """The rows of the round in `verdicts.arrow`; the reason is the client's, then what held for the round."""
        reasons = ["; ".join(filter(None, (str(reason), self.outcome))) for reason in self.reasons]
        table = self.verdict.table(round_, detector).assign(
            kept=self.weights > 0, null=self.verdict.null, weight=self.weights, reason=np.array(reasons, dtype=np.str_)
        )
        return table[list(VERDICT_COLUMNS)]


@dataclass(frozen=True)
class FilteredAggregator:
    """A rule behind a detector, as `filtered` builds it.

    Parameters
    ----------
    aggregate, detector, action, ...
        The settings of `filtered`.

    Examples
    --------
    >>> from gradlens.aggregators import median
    >>> from gradlens.detectors import DETECTORS
    >>> filtered(median(), DETECTORS["flame"](), action="record")
    filtered(median(), flame(on='updates'), action='record')
    """

    aggregate: Aggregator
    detector: Detector
    action: str = "drop"
    out_for: int | None = 0
    when_all_flagged: str = "keep_model"
    when_abstained: str = "use_all"
    cleared: frozenset[str] = frozenset()

    def __call__(self, log: UpdateLog) -> dict[str, np.ndarray]:
        """The aggregated update, layer -> array [*shape]; raises FilterStopped where the settings say so."""
        decision = self.decision(log)
        if decision.stopped:
            raise FilterStopped(f"round {log[-1].index}: {decision.outcome}, as set in {self!r}")
        if self.action == "record":
            return self.aggregate(log)
        weights = decision.weights[: len(log[-1])]
        if self.action == "down_weight" and weights.any():
            weights = weights / _mean_weight(self.aggregate, log[-1], weights)
        return self.aggregate(scaled(log, np.arange(len(weights)), weights))

    @property
    def weighing(self) -> Weighing | None:
        """What clients count in the mean that the inner rule ends in; None: all count alike."""
        return getattr(self.aggregate, "weighing", None)

    def verdict(self, log: UpdateLog) -> Verdict:
        """The detector's verdict on the last round."""
        return log.verdict(self.detector)

    def kept(self, log: UpdateLog) -> np.ndarray:
        """Which recorded clients of the last round enter, bool [client]."""
        return self.decision(log).weights[: len(log[-1])] > 0

    def decision(self, log: UpdateLog) -> Decision:
        """What is decided on each client of the last round, and why; nothing is aggregated, and it does not stop."""
        round_ = log[-1]
        try:
            verdict, since = self.verdict(log), self._flagged_before(log)
        except UnreadableError as reason:  # a server carries on without earlier rounds that can no longer be read
            verdict = verdict_on(round_, np.zeros(len(round_)), np.inf, abstained=f"earlier rounds are lost: {reason}")
            since = {}
        untrusted = np.isin(verdict.clients, round_.clients[round_.comparable], invert=True)
        out = verdict.flags | untrusted | np.isin(verdict.clients, list(since))
        undecided = Decision(verdict, verdict.clients, np.ones(len(out)), self._reasons(round_, verdict, since))
        if self.action == "record":
            finite = np.isin(verdict.clients, round_.clients[round_.finite])
            return undecided.weighing(finite * 1.0, "only recorded")
        if verdict.abstained and self.when_abstained != "use_all":
            return undecided.weighing(np.zeros(len(out)), f"the detector abstained: {self.when_abstained}")
        weights = self._weights(round_, verdict, out, untrusted)
        if len(out) and (out.all() or not weights.any()):
            outcome = f"everybody is flagged: {self.when_all_flagged}"
            weights = ~untrusted * 1.0 if self.when_all_flagged == "use_all" else np.zeros(len(out))
            return undecided.weighing(weights, outcome)
        outcome = "the detector abstained: use_all" if verdict.abstained else ""
        done = {"clip": "clipped", "down_weight": "weighed down"}.get(self.action, "")
        return undecided.weighing(weights, outcome, done)

    def _flagged_before(self, log: UpdateLog) -> dict[str, int]:
        """Client that is still out by an earlier flag -> the round of its last flag."""
        if self.out_for == 0 or len(log) < 2:
            return {}
        last_flags, now = log[:-1].folded(LastFlags(self.detector)), log[-1].index
        within = np.inf if self.out_for is None else self.out_for
        return {name: at for name, at in last_flags.items() if now - at <= within and name not in self.cleared}

    def _weights(self, round_: Round, verdict: Verdict, out: np.ndarray, untrusted: np.ndarray) -> np.ndarray:
        """The weight of each client of the verdict, float64 [client], where not all are flagged."""
        recorded = len(round_)
        if self.action == "drop":
            return ~out * 1.0
        if self.action == "clip":
            norms, weights = round_.total_norms, ~out * 1.0
            if not out.all():
                unflagged, finite = norms[~out[:recorded]], round_.finite
                clip = clip_factors(np.where(finite, norms, 0), float(np.median(unflagged)) if len(unflagged) else 0.0)
                weights[:recorded] = np.where(out[:recorded], clip * finite, 1.0)
            return weights
        if verdict.weights is not None:
            weights = np.where(out & ~verdict.flags, np.minimum(verdict.weights, MOST_OF_FLAGGED), verdict.weights)
            return np.where(untrusted, 0.0, weights)
        scores = verdict.scores[~untrusted]
        spread = 1.4826 * np.median(np.abs(scores - np.median(scores))) if len(scores) else 0.0
        if spread > 0:
            z = np.where(untrusted, np.inf, (verdict.scores - np.median(scores)) / spread)
        else:
            z = np.zeros(len(out))
        return np.where(untrusted, 0.0, np.where(out, 1 / np.maximum(1 / MOST_OF_FLAGGED, z), 1.0))

    def _reasons(self, round_: Round, verdict: Verdict, since: dict[str, int]) -> np.ndarray:
        """What speaks against each client of the verdict, str [client]; "" where nothing does."""
        not_finite = set(round_.clients[~round_.finite].tolist())
        too_long = set(round_.clients[round_.finite & ~round_.comparable].tolist())

        def reason(client: str, flagged: bool) -> str:
            if client in round_.refused:
                return f"refused: {round_.refused[client]}"
            if client in not_finite:
                return "not finite"
            if client in too_long:
                return "too long to be compared"
            return "flagged" if flagged else f"flagged in round {since[client]}" if client in since else ""

        flags = zip(verdict.clients.tolist(), verdict.flags.tolist(), strict=True)
        return np.array([reason(client, flagged) for client, flagged in flags], dtype=np.str_)

    def __repr__(self) -> str:
        changed = [
            f", {name}={value!r}"
            for name, value, default in (
                ("action", self.action, "drop"),
                ("out_for", self.out_for, 0),
                ("when_all_flagged", self.when_all_flagged, "keep_model"),
                ("when_abstained", self.when_abstained, "use_all"),
                ("cleared", sorted(self.cleared), []),
            )
            if value != default
        ]
        return f"filtered({self.aggregate!r}, {self.detector!r}{''.join(changed)})"


def _mean_weight(aggregate: Aggregator, round_: Round, weights: np.ndarray) -> float:
    """The mean of the weights [client] above 0, by examples where the rule ends in a mean by examples."""
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
