"""Ctrl-C and SIGTERM: both raise one exception, so that a command cleans up before it ends."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from gradlens.errors import Stopped


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

    def stop(number: int, _: object) -> NoReturn:
        raise Stopped(number)

    previous = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
