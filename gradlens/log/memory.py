"""What a log, its prefixes and its selections hold together: rounds, answers, and states carried over rounds."""

import ctypes
from collections import OrderedDict
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

from gradlens.log.round import Round

LARGE = 20_000_000  # bytes of a round's updates from which freed memory is given back round by round
RECENT = 3  # rounds held with their Grams and medians
ANSWERS = 4_096  # tables and verdicts held

State = TypeVar("State")


@dataclass(eq=False)
class Memory:
    """What a log, its prefixes and its keeps hold together."""

    sources: list[Round | Callable[[], Round]]
    recent: OrderedDict[int, Round] = field(default_factory=OrderedDict)
    indices: dict[int, int] = field(default_factory=dict)  # of the rounds that were looked at
    answers: OrderedDict[Any, Any] = field(default_factory=OrderedDict)
    states: dict[Any, dict[int, Any]] = field(default_factory=dict)  # (step, start) -> stop -> the state there
    cut: bool = False  # a log whose last round was cut down by `keep` has asked for what adds up

    def round(self, position: int) -> Round:
        """The round at a position, made if it is not among the last few; what is large of the others is let go of."""
        if position not in self.recent:
            for earlier in self.recent.values():
                earlier.forget()
            source = self.sources[position]
            self.recent[position] = source if isinstance(source, Round) else source()
            self.indices[position] = self.recent[position].index
            if len(self.recent) > RECENT:
                self.recent.popitem(last=False)
            if self.recent[position].nbytes > LARGE:
                _give_memory_back()
        self.recent.move_to_end(position)
        return self.recent[position]


def _give_memory_back() -> None:
    """Memory that was freed goes back to the system, of which the C library of Linux else keeps up to 64 MB."""
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


def latest(held: Mapping[int, State], window: range) -> tuple[int, State | None]:
    """Of what is held, the latest that lies within a window, and its stop; None at its start."""
    stop = max((stop for stop in held if stop <= window.stop), default=window.start)
    return stop, held.get(stop)


def hold(held: dict[int, State], stop: int, state: State, cut: bool) -> None:
    """The latest is held; two where logs are cut down by `keep`, which go on from the one before: each is large."""
    held[stop] = state
    for other in [each for each in held if each != stop and not (cut and each == stop - 1)]:
        del held[other]
