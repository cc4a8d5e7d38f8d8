"""All the rounds that the server saw: `UpdateLog`."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from hashlib import sha256
from typing import TypeVar, cast, overload

import numpy as np
from scipy import sparse

from gradlens.errors import InputError
from gradlens.log.accumulated import Accumulated, Accumulating
from gradlens.log.memory import ANSWERS, Memory, hold, latest
from gradlens.log.model import ModelSpec
from gradlens.log.round import Round

Answer = TypeVar("Answer")


class UpdateLog(Sequence[Round]):
    """The rounds so far, in order; every statistic, detector and aggregator takes one and answers for `log[-1]`.

    `log[3]` is a round, `log[:4]` a prefix without copying, `log[2:5]` a stretch. A log, its prefixes and
    its `keep`s share what was computed; rounds on disk are mapped when they are asked for, so a log may be
    larger than memory. Raises InputError where a round's layers differ from the model's.
    """

    def __init__(self, model: ModelSpec, rounds: Iterable[Round] = ()) -> None:
        self.model = model
        self._memory = Memory([fitted(model, round_) for round_ in rounds])
        self._window = range(len(self._memory.sources))
        self._last: Round | None = None  # stands for the last round, where `keep` chose some of its clients
        self._kept = b""

    @classmethod
    def lazy(cls, model: ModelSpec, sources: Sequence[Callable[[], Round]]) -> "UpdateLog":
        """A log whose rounds are made (read, mapped) when they are asked for."""
        log = cls(model)
        log._memory.sources.extend(sources)
        log._window = range(len(sources))
        return log

    def __len__(self) -> int:
        return len(self._window)

    @overload
    def __getitem__(self, key: int) -> Round: ...
    @overload
    def __getitem__(self, key: slice) -> "UpdateLog": ...
    def __getitem__(self, key: int | slice) -> "Round | UpdateLog":
        if isinstance(key, slice):
            return self._stretch(self._window[key])
        position = self._window[key]
        if self._last is not None and position == self._window[-1]:
            return self._last
        return self._memory.round(position)

    def __iter__(self) -> Iterator[Round]:
        return (self[i] for i in range(len(self)))

    def __repr__(self) -> str:
        return f"UpdateLog({len(self)} rounds, {self.model.num_parameters:,} parameters in {len(self.model)} layers)"

    def _stretch(self, window: range) -> "UpdateLog":
        if window.step != 1:
            raise InputError(f"a part of a log is a run of consecutive rounds, found a step of {window.step}")
        part = UpdateLog.__new__(UpdateLog)
        part.model, part._memory, part._window = self.model, self._memory, window
        to_the_end = len(window) > 0 and window[-1] == self._window[-1]
        part._last, part._kept = (self._last, self._kept) if to_the_end else (None, b"")
        return part

    @property
    def last_index(self) -> int:
        """The index of the last round; a round that was looked at before is not read again for it."""
        position = self._window[-1]
        return self._memory.indices[position] if position in self._memory.indices else self[-1].index

    def prefixes(self) -> Iterator["UpdateLog"]:
        """`log[:1]`, `log[:2]`, ...: what was known after each round."""
        return (self[: k + 1] for k in range(len(self)))

    def append(self, round_: Round) -> "UpdateLog":
        """The log with one more round; this one stays as it is."""
        fitted_round = fitted(self.model, round_)
        stop = self._window.stop
        memory = self._memory
        if self._last is not None or stop < len(memory.sources):  # another future of the same past
            sources = memory.sources[:stop]
            if self._last is not None:
                sources[-1] = self._last
            memory = Memory(sources)
        memory.sources.append(fitted_round)
        longer = self._stretch(self._window)
        longer._memory, longer._window = memory, range(self._window.start, stop + 1)
        longer._last, longer._kept = None, b""
        return longer

    def keep(self, selection: np.ndarray) -> "UpdateLog":
        """The log whose last round has only the clients of a mask [client] or of a list of positions."""
        part = self._stretch(self._window)
        positions = np.arange(len(self[-1].clients))[selection]
        part._last = self[-1].take(positions)
        part._kept = self._kept + b"|" + positions.tobytes()
        return part

    def combined(self, matrix: "np.ndarray | sparse.csr_array", clients: np.ndarray | None = None) -> "UpdateLog":
        """The log whose last round has linear combinations of its clients in their place (`Round.combined`)."""
        matrix, part = sparse.csr_array(matrix, dtype=np.float64), self._stretch(self._window)
        part._last = self[-1].combined(matrix, clients)
        parts = (matrix.indptr, matrix.indices, matrix.data, part._last.clients)
        part._kept = self._kept + b"*" + sha256(b"|".join(each.tobytes() for each in parts)).digest()
        return part

    def only(self, *layers: str) -> "UpdateLog":
        """The log of these layers alone, of whose rounds nothing else is read: to scan a long log for a final bias.

        Whether a client is finite and comparable is then judged by these layers alone, too: what it sent elsewhere
        is not seen. Raises: InputError where the model has no such layer, or none of them is a parameter.
        """
        model = self.model.only(layers)

        def source(position: int) -> Callable[[], Round]:
            return lambda: self[position].only(layers)

        return UpdateLog.lazy(model, [source(position) for position in range(len(self))])

    @property
    def accumulated(self) -> Accumulated:
        """The sum of every client's residuals over the rounds of this log."""
        return self.folded(Accumulating()).lend()

    def verdict(self, detector: Callable[["UpdateLog"], Answer]) -> Answer:
        """`detector(self)`, computed once for a detector that can be hashed."""
        return self.remembered(detector)

    def remembered(self, question: Callable[["UpdateLog"], Answer]) -> Answer:
        """`question(self)`, computed once for all who ask: a detector, a statistic, any pure function of a log."""
        try:
            key = (question, self._window, self._kept)
            known = self._memory.answers.get(key)
        except TypeError:  # it cannot be hashed
            return question(self)
        if known is None:
            known = self._memory.answers[key] = question(self)
            if len(self._memory.answers) > ANSWERS:
                self._memory.answers.popitem(last=False)
        return known

    def folded(self, step: Callable[[Answer | None, "UpdateLog"], Answer]) -> Answer:
        """`step` over the rounds: `step(None, log[:1])`, `step(that, log[:2])`, ..., the answer for this log.

        For what is carried from round to round: asked of prefix after prefix, each round is looked at once. Of a
        `step` that can be hashed the latest state is held (once a log was cut down by `keep`, the latest two), which
        must not change when it is carried on. A `step` with a method `carry` is asked by it where nobody else needs
        the state any more: it may then change the state and give it back, which spares a copy.
        """
        if self._last is not None:
            self._memory.cut = True
            return step(self[:-1].folded(step) if len(self) > 1 else None, self)
        try:
            held = self._memory.states.setdefault((step, self._window.start), {})
        except TypeError:  # it cannot be hashed
            held = {}
        stop, state = latest(held, self._window)
        for position in range(stop, self._window.stop):
            carry = step
            if not self._memory.cut:
                held.clear()  # what is interrupted while it changes must not be found again
                carry = getattr(step, "carry", step)
            state = carry(state, self[: position + 1 - self._window.start])
            hold(held, position + 1, state, self._memory.cut)
        return cast(Answer, state)

    def recorded(self, round_: Round, source: Callable[[], Round]) -> "UpdateLog":
        """The log with one more round that is from now on read from where it was written.

        What was computed while the round was live stays known, where this very round had been appended.
        """
        sources, stop = self._memory.sources, self._window.stop
        if stop < len(sources) and sources[stop] is round_:
            longer = self._stretch(self._window)
            longer._window = range(self._window.start, stop + 1)
        else:
            longer = self.append(round_)
        longer._memory.sources[stop] = source
        return longer


def fitted(model: ModelSpec, round_: Round) -> Round:
    """The round with the model's buffers marked; raises InputError where its layers are not the model's."""
    where = f"round {round_.index}"
    if sketches := [each.name for each in model.layers if each.sketch_of and each.name not in round_.moments]:
        raise InputError(f"{where}: layer {sketches[0]!r} is recorded as a sketch, and a round of it has moments")
    if difference := sorted(set(round_.updates) ^ set(model)):
        whose = "updates" if difference[0] in round_.updates else "model"
        raise InputError(f"{where}: layer {difference[0]!r} is in the {whose} alone; the model has {list(model)}")
    for layer in model.layers:
        if (shape := np.shape(round_.global_model[layer.name])) != layer.shape:
            raise InputError(f"{where}: layer {layer.name!r} must have shape {layer.shape}, found {shape}")
    return round_ if round_.buffers == model.buffers else replace(round_, buffers=model.buffers)
