"""All the rounds that the server saw: `UpdateLog`."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from hashlib import sha256
from typing import TypeVar, cast, overload

import numpy as np
from scipy import sparse

from gradlens.errors import InputError
from gradlens.log.accumulated import Accumulated, Accumulating, nothing_accumulated
from gradlens.log.memory import MOST_ANSWERS, Carried, Memory
from gradlens.log.model import ModelSpec
from gradlens.log.round import Round

Answer = TypeVar("Answer")


class UpdateLog(Sequence[Round]):
    """The rounds so far, in order; every statistic, detector and aggregator takes a log and answers for `log[-1]`.

    `log[3]` is a round, `log[:4]` a prefix without a copy, `log[2:5]` a stretch of consecutive rounds.

    Parameters
    ----------
    model : ModelSpec
        The recorded layers.
    rounds : iterable of Round
        Their layers must be those of the model.

    Raises
    ------
    InputError
        Where a round's layers differ from the model's.

    Notes
    -----
    A log, its prefixes and its selections (`keep`) share what was computed. Rounds on disk are mapped when they are
    needed, so that a log may be larger than memory.

    Examples
    --------
    >>> from gradlens.examples import example_log
    >>> log = example_log(rounds=4)
    >>> log[-1].index, len(log[:2])
    (3, 2)
    >>> log.keep(log[-1].clients != "client-9")[-1].clients[-1].item()
    'client-8'
    """

    def __init__(self, model: ModelSpec, rounds: Iterable[Round] = ()) -> None:
        self.model = model
        self._memory = Memory([fitted(model, round_) for round_ in rounds])
        self._window = range(len(self._memory.sources))
        self._last: Round | None = None  # in place of the last round, where it was changed by `keep` or `combined`
        self._change = b""  # tells one such log from another

    @classmethod
    def lazy(cls, model: ModelSpec, sources: Sequence[Callable[[], Round]]) -> "UpdateLog":
        """A log whose rounds are made (read, mapped) when they are needed, each by a function."""
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
        part = self._sharing(window)
        if len(window) > 0 and window[-1] == self._window[-1]:
            part._last, part._change = self._last, self._change
        return part

    def _sharing(self, window: range) -> "UpdateLog":
        """The log of the rounds in a window, all of them as they were recorded, with the same memory."""
        log = UpdateLog(self.model)
        log._memory, log._window = self._memory, window
        return log

    def _ending_with(self, last: Round, change: bytes) -> "UpdateLog":
        """The log with another last round; `change` says how it came from the present one."""
        log = self._sharing(self._window)
        log._last, log._change = last, self._change + change
        return log

    @property
    def last_index(self) -> int:
        """The index of the last round; a round that was read before is not read again for it."""
        position = self._window[-1]
        return self._memory.indices[position] if position in self._memory.indices else self[-1].index

    def prefixes(self) -> Iterator["UpdateLog"]:
        """`log[:1]`, `log[:2]`, ...: what was known after each round."""
        return (self[: k + 1] for k in range(len(self)))

    def append(self, round_: Round) -> "UpdateLog":
        """The log with one more round; this one stays as it is."""
        fitted_round = fitted(self.model, round_)
        stop = self._window.stop
        longer = self._sharing(range(self._window.start, stop + 1))
        if self._last is not None or stop < len(self._memory.sources):  # another future of the same past
            longer._memory = Memory(self._memory.sources[:stop])
            if self._last is not None:
                longer._memory.sources[-1] = self._last
        longer._memory.sources.append(fitted_round)
        return longer

    def keep(self, selection: np.ndarray) -> "UpdateLog":
        """The log with only some clients in its last round.

        Parameters
        ----------
        selection : numpy.ndarray
            A mask, bool [client], or positions, int [chosen].
        """
        positions = np.arange(len(self[-1].clients))[selection]
        return self._ending_with(self[-1].take(positions), b"|" + positions.tobytes())

    def combined(self, matrix: "np.ndarray | sparse.csr_array", clients: np.ndarray | None = None) -> "UpdateLog":
        """The log whose last round has linear combinations of its clients in their place; see `Round.combined`."""
        matrix = sparse.csr_array(matrix, dtype=np.float64)
        last = self[-1].combined(matrix, clients)
        arrays = (matrix.indptr, matrix.indices, matrix.data, last.clients)
        return self._ending_with(last, b"*" + sha256(b"|".join(array.tobytes() for array in arrays)).digest())

    def only(self, *layers: str) -> "UpdateLog":
        """The log of some layers alone, which reads nothing else: to scan a long log for its final bias.

        Parameters
        ----------
        *layers : str
            Names, one of a parameter layer among them.

        Raises
        ------
        InputError
            Where the model lacks a layer, or none of them is a parameter.

        Notes
        -----
        Whether a client is finite and comparable is judged by these layers alone.
        """
        model = self.model.only(layers)

        def source(position: int) -> Callable[[], Round]:
            return lambda: self[position].only(layers)

        return UpdateLog.lazy(model, [source(position) for position in range(len(self))])

    @property
    def accumulated(self) -> Accumulated:
        """The sum of every client's residuals over the rounds of this log."""
        return self.folded(Accumulating()).lend() if len(self) else nothing_accumulated(self.model)

    def verdict(self, detector: Callable[["UpdateLog"], Answer]) -> Answer:
        """`detector(self)`, computed once for a detector that can be hashed."""
        return self.remembered(detector)

    def remembered(self, question: Callable[["UpdateLog"], Answer]) -> Answer:
        """`question(self)`, computed once if the question can be hashed.

        Parameters
        ----------
        question : callable
            A detector, a statistic, or any other pure function of a log.
        """
        try:
            key = (question, self._window, self._change)
            answer = self._memory.answers.get(key)
        except TypeError:  # it cannot be hashed
            return question(self)
        if answer is None:
            answer = self._memory.answers[key] = question(self)
            if len(self._memory.answers) > MOST_ANSWERS:
                self._memory.answers.popitem(last=False)
        return answer

    def folded(self, step: Callable[[Answer | None, "UpdateLog"], Answer]) -> Answer:
        """Carries a state over the rounds: `step(None, log[:1])`, then `step(state, log[:2])`, and so on.

        Where the step can be hashed, the latest state is held, so that each round is looked at once when prefix after
        prefix is asked.

        Parameters
        ----------
        step : callable
            (state after the rounds before, or None; log) -> state after the last round of the log, as a new value. A
            step may have a method `carry` with the same arguments, which may change the state that it is given and
            return it; it is called where nobody else needs that state.

        Returns
        -------
        Any
            The state after the last round of this log; not to be changed.
        """
        if self._last is not None:
            self._memory.selected = True
            return step(self[:-1].folded(step) if len(self) > 1 else None, self)
        try:
            carried = self._memory.carried.setdefault((step, self._window.start), Carried())
        except TypeError:  # it cannot be hashed
            carried = Carried()
        state, stop = carried.latest(self._window)
        for position in range(stop, self._window.stop):
            advance = step
            if not self._memory.selected:
                carried.clear()  # a state whose change is interrupted must not be found again
                advance = getattr(step, "carry", step)
            state = advance(state, self[: position + 1 - self._window.start])
            carried.hold(position + 1, state, with_previous=self._memory.selected)
        return cast(Answer, state)

    def recorded(self, round_: Round, source: Callable[[], Round]) -> "UpdateLog":
        """The log with one more round that from now on is read from where it was written.

        What was computed while the round was in memory stays known, if this very round was appended before.

        Parameters
        ----------
        round_ : Round
            As it is in memory.
        source : callable
            Reads the same round.
        """
        sources, stop = self._memory.sources, self._window.stop
        if self._last is None and stop < len(sources) and sources[stop] is round_:
            longer = self._sharing(range(self._window.start, stop + 1))
        else:
            longer = self.append(round_)
        longer._memory.sources[stop] = source
        return longer


def fitted(model: ModelSpec, round_: Round) -> Round:
    """The round with the model's buffers marked; raises InputError where its layers differ from the model's."""
    where = f"round {round_.index}"
    sketches = [layer.name for layer in model.layers if layer.sketch_of]
    if missing := [name for name in sketches if name not in round_.moments]:
        raise InputError(f"{where}: layer {missing[0]!r} is recorded as a sketch, but the round has no moments of it")
    if difference := sorted(set(round_.updates) ^ set(model)):
        whose = "updates" if difference[0] in round_.updates else "model"
        raise InputError(f"{where}: layer {difference[0]!r} is in the {whose} alone; the model has {list(model)}")
    for layer in model.layers:
        if (shape := np.shape(round_.global_model[layer.name])) != layer.shape:
            raise InputError(f"{where}: layer {layer.name!r} must have shape {layer.shape}, found {shape}")
    return round_ if round_.buffers == model.buffers else replace(round_, buffers=model.buffers)
