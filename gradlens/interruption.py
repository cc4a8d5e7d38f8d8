"""Ctrl-C and SIGTERM: both raise one exception, so that a command cleans up before it ends."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NoReturn

from gradlens.errors import Stopped


@dataclass
class _Waiting:
    """How many blocks are being gone through to their end, and the signal that waits for them."""

    blocks: int = 0
    signal: int | None = None


_WAITING = _Waiting()


@contextmanager
def stoppable() -> Iterator[None]:
    """Makes Ctrl-C and SIGTERM raise `Stopped` in a `with` block, so that files are closed and worker processes end.

    Yields
    ------
    None
        The handlers of both signals before the block are restored after it.

    Raises
    ------
    Stopped
        When one of these signals arrives; its argument is the number of the signal.

    Examples
    --------
    >>> try:
    ...     with stoppable():
    ...         signal.raise_signal(signal.SIGTERM)
    ... except Stopped as stopped:
    ...     stopped.args[0] == signal.SIGTERM
    True
    """

    def stop(number: int, _: object) -> None:
        if _WAITING.blocks and _WAITING.signal is None:
            _WAITING.signal = number
        else:
            _raise(number)

    previous = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    _WAITING.blocks, _WAITING.signal = 0, None
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def to_the_end() -> Iterator[None]:
    """A block at whose end a signal is heard that arrives within it; a second signal is heard at once.

    For short work by other people's classes: an exception in the middle of one that is being built or closed, such as a
    ZipFile, leaves half of it behind or is swallowed, and with it the signal.

    Yields
    ------
    None

    Raises
    ------
    Stopped
        At the end, if a signal arrived within a block of `stoppable`.

    Examples
    --------
    >>> done = []
    >>> try:
    ...     with stoppable(), to_the_end():
    ...         signal.raise_signal(signal.SIGTERM)
    ...         done.append("all of it")
    ... except Stopped:
    ...     print(done)
    ['all of it']
    """
    _WAITING.blocks += 1
    try:
        yield
    finally:
        _WAITING.blocks -= 1
        if not _WAITING.blocks and (number := _WAITING.signal) is not None:
            _raise(number)


def _raise(number: int) -> NoReturn:
    _WAITING.signal = None
    raise Stopped(number)
