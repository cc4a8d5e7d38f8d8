"""Recording at a server: `Recorder` stands between what the clients sent and what the server makes of it.

Everything that a client sends is hostile: it never stops the server, it is recorded, or refused with a reason. What
the server itself gets wrong is an InputError. Evidence that cannot be written is missed loudly while training goes on.
"""

import json
import warnings
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import partial
from numbers import Real
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import numpy as np
import pandas as pd
import pyarrow as pa

from gradlens.aggregators import Decision, FilteredAggregator, FilterStopped, filtered, mean
from gradlens.detectors import DETECTORS, Detector
from gradlens.detectors.verdict import verdict_on
from gradlens.errors import EverybodyRefused, EvidenceLost, InputError
from gradlens.log import Evidence, LogWriter, ModelSpec, Round, UpdateLog
from gradlens.log.intake import Received, Sent, State, received, spec_of, state_of
from gradlens.log.levels import Reduction
from gradlens.log.manifest import MANIFEST, read_manifest
from gradlens.log.writer import FolderLock, check_free
from gradlens.names import named

__all__ = ["Decision", "Recorder"]

HELD = 16  # rounds held without a folder
PATIENCE = 3.0  # seconds for which a server that is about to let go of the folder is waited for


@dataclass(frozen=True, eq=False)
class _Waiting:
    """A round of which it is not known yet what came of it; gap: an empty round for what was not recorded before it.

    state: the whole global model that the clients started from.
    """

    round_: Round
    state: Mapping[str, np.ndarray]
    gap: Round | None
    before: UpdateLog | None
    metrics: Mapping[str, float]
    verdict: pd.DataFrame | None = None


class Recorder:
    """Stands between the clients' answers and the server's aggregation: records every round, judges it, or both.

    path: the folder of the run, None = judge only. An open run of the same model that lies there is gone on with.
    detector: a detector or its name, short for `filter=filtered(mean(), detector)`; without either, nobody is
    judged, and only who was refused or is not finite has weight 0. sent: clients send local models or updates.
    buffers: layers that are never scored, besides those of integers and those that batch normalisation keeps.
    evidence: what of each update is recorded, an `Evidence` or the name of its level. Below "full" each answer is
    reduced as it arrives and then let go of, so that a generator of many answers takes the memory of one. The run is
    to be filtered by a filter's `decision`, and aggregated where the updates are: the log does not hold them.
    source: what `run.json` says of where this comes from, plain values. strict: what cannot be recorded raises
    EvidenceLost instead of warning.
    lost: one line for each round that was not recorded. Where a round does not start from the global model that the
    last recorded round ended with (rounds were lost, the server was started from elsewhere), an empty round stands
    between them. The metric `lost` of a round is the number of rounds known to be lost before it. Without a folder
    the last 16 rounds are held, which is as far as any detector looks back at updates.
    model: of what clients send; InputError before the first round.
    Raises: InputError where the folder holds something else, a closed run or one of another evidence level, and for an
    unknown detector.
    """

    def __init__(
        self,
        path: Path | str | None = None,
        *,
        detector: Detector | str | None = None,
        filter: FilteredAggregator | None = None,
        sent: Literal["models", "updates"] = "models",
        buffers: Collection[str] = (),
        evidence: Evidence | str = "full",
        source: Mapping[str, Any] | None = None,
        strict: bool = False,
    ) -> None:
        if sent not in ("models", "updates"):
            raise InputError(f"sent: clients send 'models' or 'updates', found {sent!r:.80}")
        self.path = None if path is None else Path(path)
        self.filter = _filter(filter, detector)
        self.sent, self.buffers, self.strict = sent, tuple(buffers), strict
        self.source = _plain_source({**(source or {}), "recorder": {"sent": sent, "filter": repr(self.filter)}})
        self.evidence = Evidence.of(evidence)
        self.lost: list[str] = []
        self._detector = detector if isinstance(detector, str) else repr(self.filter and self.filter.detector)
        self._log: UpdateLog | None = None
        self._reduction: Reduction | None = None
        self._waiting: _Waiting | None = None
        self._held: dict[int, Round] = {}  # without a folder
        self._missed = 0  # rounds lost since the last one on the disk
        self._ended: Mapping[str, np.ndarray] | None = None  # the global model after the last recorded round
        self._writer: LogWriter | None = None
        self._closed = False
        self._lock: FolderLock | None = None
        if self.path is not None:
            self._lock = FolderLock.of(self.path, PATIENCE)
            self._writer = _begun(self.path, self._lock)
        if self._writer is not None:
            self._go_on_with(self._writer)
            self._log = self._writer.log
            self._ended = {name: np.array(array) for name, array in self._writer.global_model.items()}

    def _go_on_with(self, writer: LogWriter) -> None:
        """The run's own evidence, with its seed; raises InputError where another one was asked for."""
        if (found := writer.evidence.settings) != self.evidence.settings:
            writer.leave_open()
            raise InputError(f"{self.path}: the run records {found!r}, {self.evidence.settings!r} was asked for")
        self.evidence = writer.evidence
        self._reduction = self.evidence.on(writer.model)

    @property
    def model(self) -> ModelSpec:
        """Of what clients send; raises InputError before the first round."""
        if self._reduction is None:
            raise InputError("there is no model before the first round")
        return self._reduction.sent

    @property
    def log(self) -> UpdateLog:
        """The rounds so far, the one that waits for its commit included; raises InputError before the first."""
        if self._log is None:
            raise InputError("there is no log before the first round")
        return self._log

    def log_round(self, global_model: State, sent: Sent, num_examples: Mapping[Any, Any] | None = None) -> Decision:
        """What every client sent -> who is kept, with weights and reasons.

        global_model: layer -> array, what the clients started from; sent: client -> (layer -> array), or pairs of
        them; arrays are those of numpy or torch, or what `numpy.asarray` takes, and are copied. num_examples: client ->
        count, None: 1 for everybody. Nothing that a client sent raises: what cannot be recorded is refused with a
        reason, has weight 0 and is flagged. Answers that differ under one name are all refused. Clients are known by
        `str(client)`, escaped where that cannot be printed.
        A round that still waits for its commit is committed, with this global model as what came of it.
        The decision is given in the order of arrival, its reasons say which types of numbers were converted, too.
        Raises: InputError where the layers of the global model are not those of the rounds before; FilterStopped where
        the filter is told to stop, the round then waits like any other.
        """
        if self._closed:
            raise InputError("this recorder is closed")
        reduction = self._reduction or self.evidence.on(spec_of(global_model, self.buffers))
        state = state_of(global_model, reduction.sent)
        self._reduction = reduction
        if self._waiting is not None:
            self._record(state)
        before = self._log
        log, gap = UpdateLog(reduction.model) if before is None else before, None
        if self._ended is not None and (self._missed or not _equal(state, self._ended)):
            gap = reduction.round(len(log), [], [], [], self._ended, {})
            log = log.append(gap)
        as_models = self.sent == "models"
        answers = received(
            len(log), reduction.sent, state, sent, num_examples, as_models=as_models, reduction=reduction
        )
        _warn_if_all_refused(answers.round_)
        metrics = {"converted": len(answers.notes)} if answers.notes else {}
        self._log = log.append(answers.round_)
        self._waiting = _Waiting(
            answers.round_, state, gap, before, metrics
        )  # the evidence is kept if the detector fails
        if self.filter is None:
            return _as_sent(_unjudged(answers.round_), answers)
        decision = self.filter.decision(self._log)
        table = decision.table(answers.round_.index, self._detector)
        self._waiting = replace(self._waiting, verdict=table)
        if decision.stopped:
            raise FilterStopped(f"round {answers.round_.index}: {decision.outcome} was asked for by {self.filter!r}")
        return _as_sent(decision, answers)

    def commit(self, next_global: State, metrics: Mapping[str, float] | None = None) -> None:
        """Ends the round with what came of it; when the call returns it is on the disk, or in `lost`.

        Raises: InputError without a round, where the layers are not the model's, or a metric is no number.
        """
        if self._waiting is None:
            raise InputError("there is no round to commit; log_round comes first")
        for name, value in (metrics or {}).items():
            if not isinstance(value, Real | np.number | np.bool_):
                raise InputError(f"metrics are numbers, found {name!r:.80}: {value!r:.80}")
        self._record(state_of(next_global, self.model), metrics or {})

    def close(self, next_global: State | None = None) -> None:
        """Ends the run; next_global: what came of a round that still waits for its commit.

        Without it that round is recorded with the global model that it had, and the metric `result_unknown`.
        """
        if self._closed:
            return
        self._finish(next_global)
        self._closed = True
        try:
            if self._writer is not None:
                self._writer.close()
        except OSError as error:
            self._lose(f"the run was not closed: {error}")
        finally:
            self._let_go()

    def leave_open(self) -> None:
        """Lets go of the folder without a closing line: another recorder can go on with the run."""
        if self._closed:
            return
        self._finish(None)
        self._closed = True
        self._let_go()

    def _let_go(self) -> None:
        if self._writer is not None:
            self._writer.leave_open()
        if self._lock is not None:
            self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.leave_open()

    def __repr__(self) -> str:
        where = "in memory" if self.path is None else repr(str(self.path))
        rounds = 0 if self._log is None else len(self._log)
        return f"Recorder({where}, {rounds} rounds, {len(self.lost)} lost, filter={self.filter!r})"

    def _finish(self, next_global: State | None) -> None:
        if self._waiting is None:
            return
        if next_global is None:
            self._record(self._waiting.state, {"result_unknown": 1})
        else:
            self._record(state_of(next_global, self.model))

    def _record(self, next_global: Mapping[str, np.ndarray], metrics: Mapping[str, float] | None = None) -> None:
        """Writes the round that waits, and the gap before it; what the disk does not take is lost."""
        assert self._waiting is not None
        waiting, self._waiting = self._waiting, None
        round_ = waiting.round_
        if self.path is None:
            self._held = {**self._held, round_.index: round_}
            self._held.pop(round_.index - HELD, None)
            self._log = self.log[: round_.index].recorded(round_, partial(self._round, round_.index))
            return
        try:
            if self._writer is None:
                self._writer = LogWriter.create(
                    self.path, self.model, waiting.state, source=self.source, evidence=self.evidence, lock=self._lock
                )
                self._ended = waiting.state
            if waiting.gap is not None:
                self._writer.commit(waiting.gap, waiting.state, metrics={"lost": self._missed})
                self._missed, self._ended = 0, waiting.state
            lost = {"lost": self._missed} if self._missed else {}  # before the run was begun
            noted = {**(metrics or {}), **waiting.metrics, **lost}
            self._writer.commit(round_, next_global, verdict=waiting.verdict, metrics=noted)
        except (OSError, pa.ArrowException) as error:
            self._missed += 1
            self._log = waiting.before if self._writer is None else self._writer.log
            self._lose(f"round {round_.index} was not recorded: {error}")
            return
        self._log, self._ended, self._missed = self._writer.log, next_global, 0

    def _round(self, index: int) -> Round:
        if index not in self._held:
            raise InputError(f"round {index} is no longer held: without a folder to record into the last {HELD} are")
        return self._held[index]

    def _lose(self, what: str) -> None:
        self.lost.append(" ".join(what.split()))
        lost = EvidenceLost(f"{self.path}: {self.lost[-1]}")
        if self.strict:
            raise lost
        warnings.warn(lost, stacklevel=4)


def _filter(given: FilteredAggregator | None, detector: Detector | str | None) -> FilteredAggregator | None:
    if detector is None:
        return given
    if given is not None:
        raise InputError("a recorder takes a detector or a filter, found both; the filter has a detector of its own")
    if not isinstance(detector, str):
        return filtered(mean(), detector)
    return filtered(mean(), named("detectors", DETECTORS, detector)())


def _plain_source(source: dict[str, Any]) -> dict[str, Any]:
    try:
        return json.loads(json.dumps(source, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise InputError(f"source: expected plain values that JSON can hold, found {error}") from error


def _begun(folder: Path, lock: FolderLock) -> LogWriter | None:
    """The run in the folder, to go on with; None where one can be started. Raises InputError for all else."""
    try:
        if (folder / MANIFEST).is_file() and read_manifest(folder).lines:
            return LogWriter.resume(folder, lock=lock)
        check_free(folder)
    except OSError as error:
        lock.release()
        raise InputError(f"{folder}: a run cannot be recorded here: {error.strerror or error}") from error
    except BaseException:
        lock.release()
        raise
    return None


def _warn_if_all_refused(round_: Round) -> None:
    """Warns of a round from which the server learns nothing, with the reason that was given most often."""
    if len(round_) or not round_.refused:
        return
    reason, count = Counter(round_.refused.values()).most_common(1)[0]
    others = f" ({count} of {len(round_.refused)})" if count < len(round_.refused) else ""
    what = f"round {round_.index}: nothing of {len(round_.refused)} clients could be recorded: {reason}{others}"
    warnings.warn(EverybodyRefused(what), stacklevel=4)


def _equal(one: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray]) -> bool:
    return all(np.array_equal(one[name], other[name], equal_nan=True) for name in one)


def _unjudged(round_: Round) -> Decision:
    """Everybody whose numbers are finite is kept."""
    verdict = verdict_on(round_, np.zeros(len(round_)), np.inf, abstained="no detector was asked")
    finite = np.isin(verdict.clients, round_.clients[round_.finite])
    reasons = [
        f"refused: {round_.refused[client]}" if client in round_.refused else "" if kept else "not finite"
        for client, kept in zip(verdict.clients.tolist(), finite, strict=True)
    ]
    return Decision(verdict, verdict.clients, finite * 1.0, np.array(reasons, np.str_), "only recorded")


def _as_sent(decision: Decision, answers: Received) -> Decision:
    """The decision in the order of arrival, with what was converted."""
    clients = np.array(answers.clients, np.str_)
    places = {client: place for place, client in enumerate(decision.clients.tolist())}
    rows = np.array([places[client] for client in answers.clients], dtype=np.int64)
    reasons = [
        "; ".join(part for part in (reason, answers.notes.get(client, "")) if part)
        for client, reason in zip(answers.clients, decision.reasons[rows].tolist(), strict=True)
    ]
    weights = decision.weights[rows]
    return replace(decision, clients=clients, weights=weights, reasons=np.array(reasons, np.str_))
