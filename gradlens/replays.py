"""Replays: what another aggregation rule, or a filter, would have made of the updates that a run holds."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from gradlens.aggregators import AGGREGATORS, Aggregator, FilteredAggregator, calibrated_filter, step
from gradlens.detectors import DETECTORS, calibrate
from gradlens.errors import InputError
from gradlens.log import UpdateLog
from gradlens.log.writer import VERDICT_COLUMNS
from gradlens.names import named
from gradlens.run import Run

__all__ = ["Replay", "leaving_out", "replay", "rule_named"]

State = Mapping[str, np.ndarray]  # layer -> array
NUM_SHOWN = 20  # clients that the text names
Measure = Callable[[State], Mapping[str, float]]


@dataclass(frozen=True, eq=False)
class Replay:
    """The result of a replay; its text is a table of the rounds.

    Attributes
    ----------
    rounds : DataFrame
        A row per round: round, clients (recorded), left_out, change and recorded_change (L2 norms of what the round
        changes in the parameters, here and in the run), distance (L2, between both global models after the round), then
        the figures of `measure` for the global model here, each beside that of the run, recorded_NAME.
    decisions : DataFrame
        Of a filter, the rows that a live one writes (`Run.verdicts`); empty for a rule.
    state : Mapping of str to ndarray
        The global model after the last round, layer -> array.

    Examples
    --------
    >>> import tempfile, gradlens
    >>> from gradlens.examples import example_run
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     result = replay(gradlens.open(example_run(f"{folder}/run")), gradlens.AGGREGATORS["median"]())
    >>> result.rounds["clients"].tolist(), len(result.decisions)
    ([10, 10, 10, 10], 0)
    """

    rounds: pd.DataFrame
    decisions: pd.DataFrame
    state: State

    def __str__(self) -> str:
        """The table of rounds, and which clients were left out in how many of them."""
        lines = [self.rounds.to_string(index=False, float_format=lambda value: f"{value:.4g}")]
        if len(self.decisions):
            counts = self.decisions.loc[~self.decisions["kept"].astype(bool), "client"].value_counts()
            listed = [f"{client} ({count})" for client, count in counts.head(NUM_SHOWN).items()]
            more = ", ..." if len(counts) > NUM_SHOWN else ""
            lines.append(f"left out, in so many rounds: {', '.join(listed) or 'nobody'}{more}")
        lines.append(
            "the updates are as they were sent: given another global model, clients would have sent others, so that"
        )
        lines.append("all figures say less the farther both models are apart (distance)")
        return "\n".join(lines)


def replay(
    run: Run,
    aggregate: Aggregator,
    *,
    measure: Measure | None = None,
    server_learning_rate: float | None = None,
    server_momentum: float | None = None,
) -> Replay:
    """Aggregates the recorded updates of each round by another rule, from the run's first global model on.

    Parameters
    ----------
    run : Run
        The recording.
    aggregate : Aggregator
        A rule, or a filter in front of one.
    measure : callable, optional
        A global model, layer -> array -> figures by name, such as main_accuracy and asr.
    server_learning_rate, server_momentum : float, optional
        None: those of the run's scenario; 1 and 0 where it has none.

    Returns
    -------
    Replay
        With the run's own rule the run comes out again.

    Raises
    ------
    InputError
        If updates were recorded as sketches, the run has no round, or a filter is set to stop and does.

    Notes
    -----
    A replay says what the server would have made of the recorded updates, not what would have happened: given another
    global model, clients would have sent other updates.

    **Fails when** both models have come far apart (`distance`, beside `recorded_change`): differences add up, nothing
    corrects them, and accuracy and ASR say little. Honest updates that pushed back against an attack still do so
    where the attack is left out.

    Examples
    --------
    >>> from tempfile import TemporaryDirectory
    >>> from gradlens import AGGREGATORS, Recorder, Run
    >>> from gradlens.examples import example_log
    >>> log, folder = example_log(rounds=2), TemporaryDirectory()
    >>> state = log[0].global_model
    >>> with Recorder(f"{folder.name}/run", sent="updates") as recorder:
    ...     for prefix in log.prefixes():
    ...         clients, updates = prefix[-1].clients.tolist(), prefix[-1].updates
    ...         sent = {client: {n: a[row] for n, a in updates.items()} for row, client in enumerate(clients)}
    ...         _ = recorder.log_round(state, sent)
    ...         state = step(state, AGGREGATORS["mean"]()(prefix))
    ...         recorder.commit(state)
    >>> replay(Run.open(f"{folder.name}/run"), AGGREGATORS["median"]()).rounds[["round", "clients", "left_out"]]
       round  clients  left_out
    0      0       10         0
    1      1       10         0
    >>> folder.cleanup()
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
        recorded_figures = run.metrics.iloc[len(rows)]
        figures = {}
        for name, value in (measure(moved) if measure else {}).items():
            figures |= {name: value, f"recorded_{name}": recorded_figures.get(name, np.nan)}
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
    table = pd.concat(decisions, ignore_index=True) if decisions else pd.DataFrame(columns=list(VERDICT_COLUMNS))
    return Replay(pd.DataFrame(rows), table, state)


def leaving_out(aggregate: Aggregator, clients: Collection[str]) -> Aggregator:
    """The rule applied to all clients but some, whatever these send.

    Parameters
    ----------
    aggregate : Aggregator
        A rule, or a filter in front of one.
    clients : collection of str
        Who is left out.

    Examples
    --------
    >>> from gradlens import AGGREGATORS
    >>> from gradlens.examples import example_log
    >>> log = example_log()
    >>> everybody, without = (AGGREGATORS["mean"](), leaving_out(AGGREGATORS["mean"](), ["client-9"]))
    >>> float(everybody(log)["fc2.bias"][1]) > float(without(log)["fc2.bias"][1])
    True
    """
    names = list(clients)

    def rule(log: UpdateLog) -> dict[str, np.ndarray]:
        return aggregate(log.keep(~np.isin(log[-1].clients, names)))

    return rule


def rule_named(
    aggregator: str,
    detector: str | None = None,
    *,
    action: str = "drop",
    clean_rounds: int = 0,
    null: Sequence[Run] = (),
    fpr: float = 0.05,
) -> Aggregator:
    """Builds a rule by its name, with a detector's filter in front of it if one is named.

    Parameters
    ----------
    aggregator : str
        A name in `AGGREGATORS`, of an installed package, or `module:function`; its settings are the defaults.
    detector : str, optional
        Likewise of `DETECTORS`.
    action : str
        What the filter does with a flagged client; see `filtered`.
    clean_rounds, fpr : int, float
        As for `calibrated_filter`.
    null : sequence of Run
        Attack-free recordings that calibrate the detector in place of clean rounds.

    Raises
    ------
    InputError
        For an unknown name, with the nearest ones, a setting out of its range, or a null that is too small for `fpr`.

    Examples
    --------
    >>> rule_named("median")
    median()
    >>> rule_named("median", "flame", action="clip")
    filtered(median(), flame(on='updates'), action='clip')
    """
    rule = named("aggregators", AGGREGATORS, aggregator)()
    if detector is None:
        return rule
    judge = named("detectors", DETECTORS, detector)()
    if null:
        judge, clean_rounds = calibrate(judge, null, fpr), 0
    return calibrated_filter(rule, judge, clean_rounds=clean_rounds, fpr=fpr, action=action)


def _distance(one: State, other: State, layers: tuple[str, ...]) -> float:
    """L2 distance of two global models."""
    parts = (np.subtract(one[name], other[name], dtype=np.float64).reshape(-1) for name in layers)
    return float(np.sqrt(sum(part @ part for part in parts)))
