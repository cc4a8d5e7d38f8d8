"""Recording at a federated server: `Recorder` sees what the clients sent before the server aggregates it.

Whatever a client sends is untrusted: it is recorded, or refused with a reason, and never raises an error. A mistake of
the server's own code raises InputError. If a round cannot be written, the recorder warns and training goes on.
"""

import json
import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from numbers import Real
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import numpy as np
import pandas as pd
import pyarrow as pa

from gradlens.aggregators import Decision, FilteredAggregator, FilterStopped, filtered, mean
from gradlens.custody import keys_of_clients
from gradlens.detectors import DETECTORS, Detector
from gradlens.errors import EvidenceLost, InputError
from gradlens.log import Evidence, LogWriter, ModelSpec, Round, UpdateLog
from gradlens.log.files import read_state
from gradlens.log.intake import Sent, Signed, StartedFrom, State, averaged_in, received, spec_of, state_of
from gradlens.log.levels import Reduction
from gradlens.log.manifest import MANIFEST, read_manifest, stem
from gradlens.log.signatures import Signers
from gradlens.log.writer import FolderLock, check_free
from gradlens.names import named

__all__ = ["Decision", "Recorder", "Signed", "StartedFrom"]

HELD = 16  # rounds that are kept in memory if there is no folder
PATIENCE = 3.0  # seconds to wait for another server to release the folder


@dataclass(frozen=True, eq=False)
class _Waiting:
    """A round whose resulting global model is not known yet.

    Attributes
    ----------
    round_ : Round
        What the clients sent.
    state : Mapping of str to ndarray
        Layer -> array, the global model that the clients started from, in full.
    gap : Round or None
        An empty round to record first, where rounds before this one are missing.
    before : UpdateLog or None
        The log before the round.
    metrics : Mapping of str to float
        Metrics of the round that the recorder adds itself.
    verdict : DataFrame or None
        What the filter decided.
    """

    round_: Round
    state: Mapping[str, np.ndarray]
    gap: Round | None
    before: UpdateLog | None
    metrics: Mapping[str, float]
    verdict: pd.DataFrame | None = None


class Recorder:
    """Records each round of a federated server, decides whose updates to use, or both.

    Call `log_round` with what the clients sent, aggregate the clients that its decision keeps, then call `commit` with
    the new global model. As a context manager the recorder ends with `close`, or on an exception with `leave_open`.

    Parameters
    ----------
    path : Path or str, optional
        The folder of the run. An open run of the same model that is already there is continued. None records nothing.
    detector : Detector or str, optional
        A detector or its name, short for ``filter=filtered(mean(), detector)``.
    filter : FilteredAggregator, optional
        Decides which clients to keep. Without a filter or detector, the weight is 0 only for clients that were refused
        or sent numbers that are not finite.
    sent : {"models", "updates"}, default "models"
        Whether clients send local models or updates.
    buffers : collection of str, default ()
        Layers that are never scored, in addition to integer layers and the statistics of batch normalization.
    final_layer : str, optional
        The layer that answers, by the name of its weight, its bias or its module. By default it is found by names,
        order and shapes; where these do not agree there is none, and statistics of it abstain.
    layers : collection of str, optional
        The layers that clients send, by names or patterns such as "body.*", where the rest of the model stays with the
        clients or the server (personal heads, frozen layers, adapters). The others are not recorded, neither as zero
        nor as missing; what a client sends of them is left out. By default all layers.
    evidence : Evidence or str, default "full"
        How much of each update is recorded, an `Evidence` or the name of its level. Below "full", each answer is
        reduced as it arrives and then released, so that a generator of answers needs the memory of one.
    source : Mapping, optional
        JSON values for `run.json` that say where the updates come from.
    strict : bool, default False
        Whether a round that cannot be recorded raises `EvidenceLost` instead of warning.
    client_keys : Path, str or Mapping, optional
        The clients' public keys: a folder with a file NAME.pub for each client, or client -> 64 hexadecimal digits.
        With them, what is not signed by its client is refused (`Signed`, `gradlens.custody.sign_update`); without them,
        signatures that come are kept and not checked.
    run_name : str, default ""
        The name of the run that clients sign, so that a signature of another run is refused.

    Attributes
    ----------
    lost : list of str
        A line for each round that could not be recorded, and one if the run could not be closed.

    Raises
    ------
    InputError
        For an unknown detector or a wrong setting, if another writer holds the folder, or if the folder cannot be used:
        it holds something else, a closed run, or a run of another evidence level.

    Notes
    -----
    If a round does not start from the global model that the last recorded round ended with (rounds were lost, or the
    server was restarted from elsewhere), an empty round is recorded in between. The metric `lost` of a round is the
    number of rounds known to be lost before it.

    Without a folder the last 16 rounds are kept in memory, which is as far as any detector looks back at updates.

    Below the evidence level "full" the log does not hold the updates, so nothing can be aggregated from it: use the
    `decision` of a filter, and aggregate where the updates are.

    Examples
    --------
    >>> from gradlens.examples import example_log
    >>> round_ = example_log()[0]
    >>> state, updates = round_.global_model, round_.updates
    >>> clients = enumerate(round_.clients.tolist())
    >>> sent = {client: {layer: rows[i] for layer, rows in updates.items()} for i, client in clients}
    >>> recorder = Recorder(detector="layer_norms", sent="updates")
    >>> decision = recorder.log_round(state, sent)
    >>> decision.clients[decision.weights == 0].tolist(), decision.reasons[-1].item()
    (['client-9'], 'flagged')
    >>> kept = decision.weights > 0
    >>> recorder.commit({layer: state[layer] + rows[kept].mean(axis=0) for layer, rows in updates.items()})
    >>> len(recorder.log), recorder.lost
    (1, [])
    """

    def __init__(
        self,
        path: Path | str | None = None,
        *,
        detector: Detector | str | None = None,
        filter: FilteredAggregator | None = None,
        sent: Literal["models", "updates"] = "models",
        buffers: Collection[str] = (),
        final_layer: str | None = None,
        layers: Collection[str] | None = None,
        evidence: Evidence | str = "full",
        source: Mapping[str, Any] | None = None,
        strict: bool = False,
        client_keys: Path | str | Mapping[str, str] | None = None,
        run_name: str = "",
    ) -> None:
        if sent not in ("models", "updates"):
            raise InputError(f"sent: clients send 'models' or 'updates', found {sent!r:.80}")
        self.path = None if path is None else Path(path)
        self.filter = _filter(filter, detector)
        self.sent, self.buffers, self.strict = sent, tuple(buffers), strict
        self.final_layer, self.layers = final_layer, None if layers is None else tuple(layers)
        self.client_keys = None if client_keys is None else keys_of_clients(client_keys)
        self.run_name = run_name
        settings = {"sent": sent, "filter": repr(self.filter)} | ({"layers": self.layers} if self.layers else {})
        if self.client_keys is not None:
            settings |= {"signers": len(self.client_keys), "run_name": run_name}
        self.source = _plain_source({**(source or {}), "recorder": settings})
        self.evidence = Evidence.of(evidence)
        self.lost: list[str] = []
        self._detector = detector if isinstance(detector, str) else repr(self.filter and self.filter.detector)
        self._log: UpdateLog | None = None
        self._reduction: Reduction | None = None
        self._waiting: _Waiting | None = None
        self._held: dict[int, Round] = {}  # without a folder
        self._num_lost = 0  # rounds lost since the last one on the disk
        self._last_state: Mapping[str, np.ndarray] | None = None  # the global model after the last recorded round
        self._writer: LogWriter | None = None
        self._closed = False
        self._lock: FolderLock | None = None
        if self.path is not None:
            self._lock = FolderLock.of(self.path, PATIENCE)
            self._writer = _resumed(self.path, self._lock)
        if self._writer is not None:
            self._adopt_evidence(self._writer)
            self._log = self._writer.log
            self._last_state = {name: np.array(array) for name, array in self._writer.global_model.items()}

    def _adopt_evidence(self, writer: LogWriter) -> None:
        """Takes over the evidence level of a resumed run, with its seed; raises InputError if the levels differ."""
        if (recorded := writer.evidence.settings) != self.evidence.settings:
            writer.leave_open()
            raise InputError(f"{self.path}: the run records {recorded!r}, {self.evidence.settings!r} was asked for")
        self.evidence = writer.evidence
        self._reduction = self.evidence.on(writer.model)

    @property
    def model(self) -> ModelSpec:
        """The layers as clients send them; raises InputError before the first round."""
        if self._reduction is None:
            raise InputError("there is no model before the first round")
        return self._reduction.sent

    @property
    def log(self) -> UpdateLog:
        """The rounds so far, including one that waits for its commit; raises InputError before the first round."""
        if self._log is None:
            raise InputError("there is no log before the first round")
        return self._log

    def next_round(self, global_model: State) -> int:
        """Returns the index of the round that starts from a global model: what clients must sign in it.

        Parameters
        ----------
        global_model : Mapping
            Layer -> array, the model that clients are about to be sent.

        Raises
        ------
        InputError
            If its layers differ from those of the rounds before.
        """
        if self._log is None:
            return 0
        state = self._state_of(global_model, self.model)
        return len(self._log) + (self._waiting is None and self._starts_elsewhere(state))

    def log_round(self, global_model: State, sent: Sent, num_examples: Mapping[Any, Any] | None = None) -> Decision:
        """Takes what the clients of one round sent, and decides whose updates to use.

        Parameters
        ----------
        global_model : Mapping
            Layer -> array, the model that the clients started from. Arrays are copied; they may be of numpy, torch, or
            anything that `numpy.asarray` takes.
        sent : Mapping or iterable of pairs
            Client -> (layer -> array), local models or updates (`sent` of the recorder). Clients are known by
            ``str(client)``, escaped if it cannot be printed. Where clients work asynchronously, an answer is
            ``StartedFrom(round, state)``, with the index of the round whose global model that client was given. What
            came with a signature is ``Signed(signature, state)``.
        num_examples : Mapping, optional
            Client -> the number of examples that it claims; by default 1 for everybody.

        Returns
        -------
        Decision
            Weights and reasons, in the order of arrival. The reasons also say which types of numbers were converted.

        Raises
        ------
        InputError
            If the layers of the global model differ from those of the rounds before, or the recorder is closed.
        FilterStopped
            If the filter is set to stop in such a round; the round then waits for its commit like any other.
        EvidenceLost
            If `strict` is set and the round before, which waited for its commit, cannot be recorded.

        Notes
        -----
        Nothing that a client sends raises an error. What cannot be recorded is refused with a reason, has weight 0 and
        is flagged. Different answers under one name are all refused.

        A round before that still waits for its commit is committed with `global_model` as its result.
        """
        if self._closed:
            raise InputError("this recorder is closed")
        reduction = self._reduction or self.evidence.on(
            spec_of(global_model, self.buffers, final_layer=self.final_layer, layers=self.layers)
        )
        state = self._state_of(global_model, reduction.sent)
        self._reduction = reduction
        if self._waiting is not None:
            self._record(state)
        before = self._log
        log, gap = UpdateLog(reduction.model) if before is None else before, None
        if self._last_state is not None and self._starts_elsewhere(state):
            gap = reduction.round(len(log), [], [], [], self._last_state, {})
            log = log.append(gap)
        answers = received(
            len(log), reduction.sent, state, sent, num_examples, as_models=self.sent == "models", reduction=reduction,
            partial=self.layers is not None, averaged=averaged_in(global_model, reduction.sent),
            base=cache(self._base), signers=self._signers(log),
        )  # fmt: skip
        metrics = {"converted": len(answers.notes)} if answers.notes else {}
        self._log = log.append(answers.round_)
        # before the filter decides, so that the round is kept even if a detector raises
        self._waiting = _Waiting(answers.round_, state, gap, before, metrics)
        if self.filter is None:
            decision = Decision.unfiltered(answers.round_)
        else:
            decision = self.filter.decision(self._log)
            self._waiting = replace(self._waiting, verdict=decision.table(answers.round_.index, self._detector))
        if decision.stopped:
            raise FilterStopped(f"round {answers.round_.index}: {decision.outcome} was asked for by {self.filter!r}")
        decision.warn_if_nobody_is_kept(answers.round_)
        return decision.in_order(answers.clients, answers.notes)

    def commit(self, next_global: State, metrics: Mapping[str, float] | None = None) -> None:
        """Ends the round; when the call returns, the round is on the disk, or noted in `lost`.

        Parameters
        ----------
        next_global : Mapping
            Layer -> array, the global model after the round.
        metrics : Mapping of str to float, optional
            Name -> number, such as main_accuracy.

        Raises
        ------
        InputError
            If no round waits for its commit, the layers differ from the model's, or a metric is not a number.
        EvidenceLost
            If `strict` is set and the round cannot be recorded.
        """
        if self._waiting is None:
            reason = "the run is closed" if self._closed else "log_round comes first"
            raise InputError(f"there is no round to commit; {reason}")
        for name, value in (metrics or {}).items():
            if not isinstance(value, Real | np.number | np.bool_):
                raise InputError(f"metrics are numbers, found {name!r:.80}: {value!r:.80}")
        self._record(self._state_of(next_global, self.model), metrics or {})

    def close(self, next_global: State | None = None) -> None:
        """Ends the run; a second call does nothing.

        Parameters
        ----------
        next_global : Mapping, optional
            Layer -> array, the global model after a round that still waits for its commit. By default that round is
            recorded with the global model it started from and the metric `result_unknown`.

        Raises
        ------
        InputError
            If the layers of `next_global` differ from the model's.
        EvidenceLost
            If `strict` is set, and the round cannot be recorded or the run not closed.
        """
        if self._closed:
            return
        self._finish(next_global)
        self._closed = True
        try:
            if self._writer is not None:
                self._writer.close()
        except OSError as error:
            self._note_loss(f"the run was not closed: {error}")
        finally:
            self._release()

    def leave_open(self) -> None:
        """Releases the folder without closing the run, so that another recorder can continue it."""
        if self._closed:
            return
        self._finish(None)
        self._closed = True
        self._release()

    def _release(self) -> None:
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

    def _state_of(self, global_model: State, model: ModelSpec) -> dict[str, np.ndarray]:
        return state_of(global_model, model, partial=self.layers is not None)

    def _starts_elsewhere(self, state: Mapping[str, np.ndarray]) -> bool:
        """Whether a round from this model follows a gap: rounds were lost, or the last one ended with another model."""
        last = self._last_state
        return last is not None and (self._num_lost > 0 or not _equal(state, last))

    def _signers(self, log: UpdateLog) -> Signers | None:
        """Whose signatures are expected in the round after a log, None where they are not checked."""

        @cache
        def texts(index: int) -> frozenset[str]:
            try:
                return frozenset(log[index].signatures.values())
            except InputError:  # no longer held, or unreadable
                return frozenset()

        return None if self.client_keys is None else Signers(self.client_keys, self.run_name, texts)

    def _finish(self, next_global: State | None) -> None:
        if self._waiting is None:
            return
        if next_global is None:
            self._record(self._waiting.state, {"result_unknown": 1})
        else:
            self._record(self._state_of(next_global, self.model))

    def _record(self, next_global: Mapping[str, np.ndarray], metrics: Mapping[str, float] | None = None) -> None:
        """Writes the waiting round, and the gap before it; if that fails, the round is noted as lost."""
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
                self._last_state = waiting.state
            if waiting.gap is not None:
                self._writer.commit(waiting.gap, waiting.state, metrics={"lost": self._num_lost})
                self._num_lost, self._last_state = 0, waiting.state
            lost = {"lost": self._num_lost} if self._num_lost else {}  # rounds lost before the run could be created
            all_metrics = {**(metrics or {}), **waiting.metrics, **lost}
            self._writer.commit(round_, next_global, verdict=waiting.verdict, metrics=all_metrics)
        except (OSError, pa.ArrowException) as error:
            self._num_lost += 1
            self._log = waiting.before if self._writer is None else self._writer.log
            self._note_loss(f"round {round_.index} was not recorded: {error}")
            return
        self._log, self._last_state, self._num_lost = self._writer.log, next_global, 0

    def _base(self, index: int) -> Mapping[str, np.ndarray]:
        """The global model of an earlier round, in full; raises InputError where it is not at hand."""
        if self.path is not None and self._writer is not None:
            return read_state(self.path / "globals" / stem(index), self.model)
        if self.evidence.level != "full":
            raise InputError("without a folder and below the evidence level full, earlier models are not kept")
        return self.log[index].global_model

    def _round(self, index: int) -> Round:
        if index not in self._held:
            raise InputError(f"round {index} is no longer held: without a folder, only the last {HELD} rounds are")
        return self._held[index]

    def _note_loss(self, message: str) -> None:
        """Adds a line to `lost`, and warns; raises EvidenceLost if `strict` is set."""
        self.lost.append(" ".join(message.split()))
        warning = EvidenceLost(f"{self.path}: {self.lost[-1]}")
        if self.strict:
            raise warning
        warnings.warn(warning, stacklevel=4)


def _filter(filter_: FilteredAggregator | None, detector: Detector | str | None) -> FilteredAggregator | None:
    if detector is None:
        return filter_
    if filter_ is not None:
        raise InputError("a recorder takes a detector or a filter, found both; set the detector in the filter")
    if not isinstance(detector, str):
        return filtered(mean(), detector)
    return filtered(mean(), named("detectors", DETECTORS, detector)())


def _plain_source(source: dict[str, Any]) -> dict[str, Any]:
    try:
        return json.loads(json.dumps(source, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise InputError(f"source: expected plain values that JSON can represent, found {error}") from error


def _resumed(folder: Path, lock: FolderLock) -> LogWriter | None:
    """Resumes the run in the folder, None if a new one can be started; raises InputError in any other case."""
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


def _equal(one: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray]) -> bool:
    return all(np.array_equal(one[name], other[name], equal_nan=True) for name in one)
