"""What a log, its prefixes and its selections share: the latest rounds, answers, and states carried over rounds."""

import ctypes
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from gradlens.log.round import Round

LARGE_ROUND_BYTES = 20_000_000  # of a round's updates, from which freed memory is returned to the system each round
RECENT_ROUNDS = 3  # rounds held with their Gram matrices and medians
MOST_ANSWERS = 4_096  # tables and verdicts held


@dataclass(eq=False)
class Carried:
    """The latest states of one step that is carried over the rounds (`UpdateLog.folded`): stop -> the state there."""

    states: dict[int, Any] = field(default_factory=dict)

    def latest(self, window: range) -> tuple[Any, int]:
        """The latest state within a window and its stop; None and the window's start where there is none."""
        stop = max((stop for stop in self.states if stop <= window.stop), default=window.start)
        return self.states.get(stop), stop

    def hold(self, stop: int, state: Any, *, with_previous: bool) -> None:
        """Holds a state in place of the earlier ones, which are large; the one right before it can stay."""
        self.states[stop] = state
        held = {stop, stop - 1} if with_previous else {stop}
        self.states = {place: state for place, state in self.states.items() if place in held}

    def clear(self) -> None:
        """Forgets every state, as one of them is about to be changed in place."""
        self.states.clear()


@dataclass(eq=False)
class Memory:
    """What a log, its prefixes and its selections share.

    Attributes
    ----------
    sources : list
        For every round, the round itself or a function that reads it.
    recent : OrderedDict
        Position -> round, those that were read last.
    indices : dict
        Position -> index, of all rounds that were read.
    answers : OrderedDict
        What was computed once for all (`UpdateLog.remembered`).
    carried : dict
        (step, start of the window) -> the latest states of that step.
    selected : bool
        Whether a log with a selection in its last round has asked for a carried state. Such a log goes on from the
        state one round earlier, so that from then on the latest two states are held, and none is changed in place.
    """

    sources: list[Round | Callable[[], Round]]
    recent: OrderedDict[int, Round] = field(default_factory=OrderedDict)
    indices: dict[int, int] = field(default_factory=dict)
    answers: OrderedDict[Any, Any] = field(default_factory=OrderedDict)
    carried: dict[Any, Carried] = field(default_factory=dict)
    selected: bool = False

    def round(self, position: int) -> Round:
        """The round at a position, read unless it is a recent one; the others let go of their large arrays."""
        if position not in self.recent:
            for earlier in self.recent.values():
                earlier.forget()
            source = self.sources[position]
            self.recent[position] = source if isinstance(source, Round) else source()
            self.indices[position] = self.recent[position].index
            if len(self.recent) > RECENT_ROUNDS:
                self.recent.popitem(last=False)
            if self.recent[position].nbytes > LARGE_ROUND_BYTES:
                _return_freed_memory()
        self.recent.move_to_end(position)
        return self.recent[position]


def _return_freed_memory() -> None:
    """Returns freed memory to the system, of which the C library of Linux would keep up to 64 MB."""
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)
