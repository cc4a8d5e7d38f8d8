"""All the rounds that the server saw: `UpdateLog`, and what adds up over them: `Accumulated`."""

import ctypes
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import lru_cache
from hashlib import sha256
from sys import getrefcount
from typing import TYPE_CHECKING, Any, TypeVar, cast, overload
from weakref import WeakValueDictionary

import numpy as np
from scipy import sparse

from gradlens.errors import InputError
from gradlens.log import kernels
from gradlens.log.kernels import BLOCK, Columns
from gradlens.log.model import ModelSpec
from gradlens.log.round import Round
from gradlens.log.sketches import CountSketch

if TYPE_CHECKING:
    from gradlens.detectors import Detector, Verdict

BUDGET = 1_000_000_000  # bytes of accumulated updates held in full; above it they are sketched
CLIP = 3.0  # median residual norms that one round of a client counts at most
SKETCH = 512  # numbers that a sketch keeps of a larger layer
LARGE = 20_000_000  # bytes of a round's updates from which freed memory is given back round by round
HELD = 2  # references to an array that is in one table alone, as it is looked at
RECENT = 3  # rounds held with their Grams and medians
REMEMBERED = 4_096  # tables and verdicts held

Answer = TypeVar("Answer")


@dataclass(frozen=True, eq=False)
class Accumulated:
    """For every client seen so far, the sum of its residuals over its rounds.

    A residual is the client's update minus the coordinate-wise median of that round's comparable clients. Layer by
    layer its norm is clipped at three times the cohort's median residual norm, so that no single round decides; a
    client that is not comparable adds nothing in that round. The sampling noise of local training averages out
    in such a sum while a systematic conflict of objectives adds up; divide by the root of `rounds` to compare clients.
    clients: str [client], sorted; rounds: int64 [client], summed; sums: layer -> float32 [client, number].
    lengths, squares: layer -> float64 [client], the sums of the residuals' norms and of their squares.
    sketched: the sums are count sketches (linear: inner products hold in expectation), to stay within 1 GB.
    """

    clients: np.ndarray
    rounds: np.ndarray
    sums: Mapping[str, np.ndarray]
    lengths: Mapping[str, np.ndarray]
    squares: Mapping[str, np.ndarray]
    sketched: bool = False

    def of(self, clients: np.ndarray) -> np.ndarray:
        """The rows of these clients, int64 [client]."""
        return np.searchsorted(self.clients, clients)


class UpdateLog(Sequence[Round]):
    """The rounds so far, in order; every statistic, detector and aggregator takes one and answers for `log[-1]`.

    `log[3]` is a round, `log[:4]` a prefix without copying, `log[2:5]` a stretch. A log, its prefixes and
    its `keep`s share what was computed; rounds on disk are mapped when they are asked for, so a log may be
    larger than memory. Raises InputError where a round's layers differ from the model's.
    """

    def __init__(self, model: ModelSpec, rounds: Iterable[Round] = ()) -> None:
        self.model = model
        self._memory = _Memory([fitted(model, round_) for round_ in rounds])
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
            memory = _Memory(sources)
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
        """The sum of every client's residuals over the rounds of this log (`Accumulated`)."""
        if self._last is None:
            return self._memory.accumulated(self._window, self.model)
        self._memory.cut = True
        before = self._memory.accumulated(self._window[:-1], self.model)
        return _advance(before, self._last, self.model)

    def verdict(self, detector: "Detector") -> "Verdict":
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
            if len(self._memory.answers) > REMEMBERED:
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
        stop, state = _latest(held, self._window)
        for position in range(stop, self._window.stop):
            carry = step
            if not self._memory.cut:
                held.clear()  # what is interrupted while it changes must not be found again
                carry = getattr(step, "carry", step)
            state = carry(state, self[: position + 1 - self._window.start])
            _hold(held, position + 1, state, self._memory.cut)
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


@dataclass(eq=False)
class _Memory:
    """What a log, its prefixes and its keeps hold together."""

    sources: list[Round | Callable[[], Round]]
    recent: OrderedDict[int, Round] = field(default_factory=OrderedDict)
    indices: dict[int, int] = field(default_factory=dict)  # of the rounds that were looked at
    sums: dict[int, dict[int, Accumulated]] = field(default_factory=dict)  # start -> stop -> the sum until there
    shown: WeakValueDictionary[tuple[int, int], Accumulated] = field(default_factory=WeakValueDictionary)
    answers: OrderedDict[Any, Any] = field(default_factory=OrderedDict)
    states: dict[Any, dict[int, Any]] = field(default_factory=dict)  # (step, start) -> stop -> the state there
    cut: bool = False  # a log whose last round was cut down by `keep` has asked for what adds up

    def round(self, position: int) -> Round:
        if position not in self.recent:
            for earlier in self.recent.values():
                earlier.forget()
            source = self.sources[position]
            self.recent[position] = source if isinstance(source, Round) else source()
            self.indices[position] = self.recent[position].index
            if len(self.recent) > RECENT:
                self.recent.popitem(last=False)
            if self.recent[position].nbytes > LARGE:
                _give_back()
        self.recent.move_to_end(position)
        return self.recent[position]

    def accumulated(self, window: range, model: ModelSpec) -> Accumulated:
        if (shown := self.shown.get((window.start, window.stop))) is not None:
            return shown
        held = self.sums.setdefault(window.start, {})
        stop, total = _latest(held, window)
        total = total or _nothing(model)
        for position in range(stop, window.stop):
            ours = not self.cut and all(getrefcount(total.sums[name]) == HELD for name in total.sums)
            if ours:
                held.clear()  # what is interrupted while it changes must not be found again
            total = _advance(total, self.round(position), model, in_place=ours)
            _hold(held, position + 1, total, self.cut)
        # with a table of its own, so that whoever holds it is seen to hold its arrays
        shown = self.shown[window.start, window.stop] = replace(total, sums=dict(total.sums))
        return shown


def _give_back() -> None:
    """Memory that was freed goes back to the system, of which the C library of Linux else keeps up to 64 MB."""
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


def _latest(held: Mapping[int, Answer], window: range) -> tuple[int, Answer | None]:
    """Of what is held, the latest that lies within a window, and its stop; None at its start."""
    stop = max((stop for stop in held if stop <= window.stop), default=window.start)
    return stop, held.get(stop)


def _hold(held: dict[int, Answer], stop: int, state: Answer, cut: bool) -> None:
    """The latest is held; two where logs are cut down by `keep`, which go on from the one before: each is large."""
    held[stop] = state
    for other in [each for each in held if each != stop and not (cut and each == stop - 1)]:
        del held[other]


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


def _nothing(model: ModelSpec) -> Accumulated:
    sums = {name: np.zeros((0, model[name].size), np.float32) for name in model.parameters}
    nothing = dict.fromkeys(model.parameters, np.zeros(0))
    return Accumulated(np.zeros(0, np.str_), np.zeros(0, np.int64), sums, nothing, nothing)


def _advance(before: Accumulated, round_: Round, model: ModelSpec, *, in_place: bool = False) -> Accumulated:
    """The sums after one more round; a new value, so that what was handed out does not change.

    in_place: nobody else holds the arrays of the sums before, which may change: they can be most of the memory.
    """
    clients = np.union1d(before.clients, round_.clients)
    sketched = before.sketched or len(clients) * model.num_parameters * 4 > BUDGET
    seen = np.searchsorted(clients, before.clients)
    rows = np.searchsorted(clients, round_.clients[round_.comparable])
    rounds = np.zeros(len(clients), np.int64)
    rounds[seen] = before.rounds
    rounds[rows] += 1
    sums, lengths, squares = {}, {}, {}
    for name in model.parameters:
        residuals, norms, factors = _residuals(round_, name)
        lengths[name], squares[name] = np.zeros(len(clients)), np.zeros(len(clients))
        lengths[name][seen], squares[name][seen] = before.lengths[name], before.squares[name]
        lengths[name][rows] += norms * factors
        squares[name][rows] += (norms * factors) ** 2
        past = before.sums[name]
        if sketched:
            past = past if before.sketched else _sketch(name, past)
        if in_place and len(past) == len(clients):
            sums[name] = past
        else:
            sums[name] = np.zeros((len(clients), past.shape[1]), np.float32)
            sums[name][seen] = past
        if sketched:
            sums[name][rows] += _sketch(name, _clipped(residuals, factors, 0, model[name].size))
            continue
        for start in range(0, model[name].size, BLOCK):
            block = _clipped(residuals, factors, start, min(start + BLOCK, model[name].size))
            for row, numbers in zip(rows, block, strict=True):
                sums[name][row, start : start + BLOCK] += numbers
    return Accumulated(clients, rounds, sums, lengths, squares, sketched)


def _residuals(round_: Round, layer: str) -> tuple[Columns, np.ndarray, np.ndarray]:
    """What is added up: (start, stop) -> the comparable clients' updates minus the median's, float32 [client, number];
    the norms of these residuals, float64 [client]; and what clips them at three times their median.
    """
    comparable, median = round_.comparable, round_.median[layer].reshape(-1)
    columns = round_.columns(layer, sketch=True)

    def residuals(start: int, stop: int) -> np.ndarray:
        numbers = columns(start, stop)
        return (numbers if comparable.all() else numbers[comparable]) - median[start:stop]

    norms = np.sqrt(kernels.squares(residuals, int(comparable.sum()), median.size))
    positive = norms[norms > 0]  # among many equal updates the median residual would be 0
    bound = CLIP * np.median(positive) if len(positive) else np.inf
    return residuals, norms, bound / np.maximum(norms, bound) if len(positive) else np.ones(len(norms))


def _clipped(residuals: Columns, factors: np.ndarray, start: int, stop: int) -> np.ndarray:
    block = residuals(start, stop)
    return np.multiply(block, factors.astype(np.float32)[:, None], out=block)


def _clipped_residuals(round_: Round, layer: str) -> np.ndarray:
    """Float32 [comparable client, number]: updates minus the median's, norms clipped at three times their median."""
    residuals, _, factors = _residuals(round_, layer)
    return _clipped(residuals, factors, 0, round_.median[layer].size)


def _sketch(layer: str, matrix: np.ndarray) -> np.ndarray:
    """The count sketch of each row, float32 [client, at most 512 numbers]; a small layer stays whole."""
    if matrix.shape[1] <= SKETCH:
        return matrix
    sketch = _count_sketch(layer, matrix.shape[1])
    return np.stack([sketch.sketch(row) for row in matrix]) if len(matrix) else np.zeros((0, SKETCH), np.float32)


@lru_cache(maxsize=64)
def _count_sketch(layer: str, size: int) -> CountSketch:
    return CountSketch.of(0, layer, size, SKETCH)  # whoever looks at a log again must get the same
