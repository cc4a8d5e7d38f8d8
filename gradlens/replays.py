"""Replay: what another rule, or a filter, would have made of the updates that a run holds."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd

from gradlens.aggregators import AGGREGATORS, Aggregator, FilteredAggregator, calibrated_filter, step
from gradlens.detectors import DETECTORS
from gradlens.errors import InputError
from gradlens.log.writer import VERDICT_COLUMNS
from gradlens.names import named
from gradlens.run import Run

__all__ = ["Replay", "replay", "rule_named"]

State = Mapping[str, np.ndarray]  # layer -> array
NAMED = 20  # clients that are named
Measure = Callable[[State], Mapping[str, float]]


@dataclass(frozen=True, eq=False)
class Replay:
    """What came of a replay.

    rounds: a row per round: round, clients (recorded), left_out, change and recorded_change (L2 norms of what the round
    changes in the parameters, here and in the run), distance (L2, between both global models after the round), then
    what `measure` gives of the global model here, each beside the run's own figure, recorded_NAME.
    decisions: of a filter, the rows that a live one writes (`Run.verdicts`); empty for a rule. state: layer -> array,
    the global model after the last round.
    """

    rounds: pd.DataFrame
    decisions: pd.DataFrame
    state: State

    def __str__(self) -> str:
        """Round by round, and who was left out in how many of them."""
        lines = [self.rounds.to_string(index=False, float_format=lambda value: f"{value:.4g}")]
        if len(self.decisions):
            counts = self.decisions.loc[~self.decisions["kept"].astype(bool), "client"].value_counts()
            named = [f"{client} ({count})" for client, count in counts.head(NAMED).items()]
            more = ", ..." if len(counts) > NAMED else ""
            lines.append(f"left out, in so many rounds: {', '.join(named) or 'nobody'}{more}")
        lines.append(
            "the updates are as they were sent: from another global model clients would have sent others, so that"
        )
        lines.append("accuracy and ASR say the less, the farther both models have come apart (distance)")
        return "\n".join(lines)


def replay(
    run: Run,
    aggregate: Aggregator,
    *,
    measure: Measure | None = None,
    server_learning_rate: float | None = None,
    server_momentum: float | None = None,
) -> Replay:
    """Aggregates the recorded updates round after round by another rule, from the run's first global model on.

    The updates stay as they were sent, though from another global model clients would have sent others: it answers
    what the server would have made of this evidence, not what would have happened. Nothing corrects what adds up: where
    both models have come far apart (`distance`, beside `recorded_change`), accuracy and ASR say little; and honest
    updates that pushed back against an attack still do where the attack is left out. With the run's own rule the run
    comes out again. measure: a global model -> figures by name (main_accuracy, asr). server_learning_rate,
    server_momentum: None, those of the run's scenario; 1 and 0 where it has none.
    Raises: InputError where updates were recorded as sketches, or a filter is told to stop.
    """
    rate = run.scenario.get("server_learning_rate", 1.0) if server_learning_rate is None else server_learning_rate
    momentum = run.scenario.get("server_momentum", 0.0) if server_momentum is None else server_momentum
    if not len(run.log):
        raise InputError(f"{run.path}: a replay needs at least one round, found none")
    recorded = state = run.start
    before, rows, decisions = None, [], []
    for prefix, after in zip(run.log.prefixes(), run.states(), strict=True):
        round_ = prefix[-1]
        update = aggregate(prefix)
        moved = step(state, update, rate, momentum=momentum, before=before, buffers=run.model.buffers)
        left_out = 0
        if isinstance(aggregate, FilteredAggregator):
            decision = aggregate.decision(prefix)
            decisions.append(decision.table(round_.index, repr(aggregate.detector)))
            left_out = int((decision.weights == 0).sum())
        told = run.metrics.iloc[len(rows)]
        figures = {}
        for name, value in (measure(moved) if measure else {}).items():
            figures |= {name: value, f"recorded_{name}": told.get(name, np.nan)}
        rows.append(
            {
                "round": round_.index,
                "clients": len(round_),
                "left_out": left_out,
                "change": _distance(moved, state, run.model.parameters),
                "recorded_change": _distance(after, recorded, run.model.parameters),
                "distance": _distance(moved, after, run.model.parameters),
                **figures,
            }
        )
        before, state, recorded = state, moved, after
    said = pd.concat(decisions, ignore_index=True) if decisions else pd.DataFrame(columns=list(VERDICT_COLUMNS))
    return Replay(pd.DataFrame(rows), said, state)


def rule_named(
    aggregator: str, detector: str | None = None, *, action: str = "drop", clean_rounds: int = 0, fpr: float = 0.05
) -> Aggregator:
    """A rule by its name, and the filter of a detector in front of it; raises InputError where there is none of it.

    clean_rounds: first rounds on which the detector is calibrated to `fpr`, 0: it keeps its own threshold.
    """
    rule = named("aggregators", AGGREGATORS, aggregator)()
    if detector is None:
        return rule
    judge = named("detectors", DETECTORS, detector)()
    return calibrated_filter(rule, judge, clean_rounds=clean_rounds, fpr=fpr, action=action)


def _distance(one: State, other: State, layers: tuple[str, ...]) -> float:
    """L2 distance of two global models."""
    parts = (np.subtract(one[name], other[name], dtype=np.float64).reshape(-1) for name in layers)
    return float(np.sqrt(sum(part @ part for part in parts)))
