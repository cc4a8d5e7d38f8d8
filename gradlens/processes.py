"""A pool of processes that ends with the work it was started for, however that ends."""

import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.connection import Connection

from threadpoolctl import threadpool_limits
from tqdm import tqdm

from gradlens.errors import InputError


@contextmanager
def processes(workers: int) -> Iterator[Executor]:
    """An executor of `workers` processes, started afresh.

    They end when the block does; at once where it is left by an interruption, and where this process is killed:
    each of them holds the end of a pipe that closes with it. Ctrl-C reaches this process only, which decides.
    Raises InputError where a worker was killed.
    """
    context = get_context("spawn")  # a fork after torch used threads hangs
    theirs, ours = context.Pipe(duplex=False)
    with theirs, ours, ProcessPoolExecutor(workers, context, _end_with, (theirs,)) as executor:
        try:
            _start(executor, workers)
            yield executor
        except Exception as error:
            executor.shutdown(cancel_futures=True)
            if isinstance(error, BrokenProcessPool):
                raise InputError(
                    "a worker process ended early: it was killed, memory ran out (fewer workers need less), or the "
                    "script lacks `if __name__ == '__main__'`; what was finished is kept"
                ) from error
            raise
        except BaseException:
            ours.close()
            raise


def _start(executor: Executor, workers: int) -> None:
    """Starts all workers, deaf to Ctrl-C from their first instruction on: the signal mask is inherited."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        for _ in range(workers):
            executor.submit(int)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end_with(lifeline: Connection) -> None:
    """Ends this worker when the other end of the pipe is closed."""

    def watch() -> None:
        lifeline.poll(None)
        os._exit(1)

    threadpool_limits(1)  # the workers themselves keep the cores busy
    tqdm.set_lock(threading.RLock())  # its own is a semaphore, which a process that ends like this leaves behind
    threading.Thread(target=watch, daemon=True).start()
