"""Ctrl-C and SIGTERM: one exception that ends a command in order."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from gradlens.errors import Stopped


@contextmanager
def stoppable() -> Iterator[None]:
    """Within, Ctrl-C and SIGTERM raise `Stopped`: files are let go of, and worker processes end."""

    def stop(number: int, _: object) -> NoReturn:
        raise Stopped(number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
