"""Options and arguments that several commands share, and the functions that act on them."""

import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gradlens.errors import InputError

if TYPE_CHECKING:
    from concurrent.futures import Executor

Folder = Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run or of a sweep.", show_default=False)]
AsJson = Annotated[bool, typer.Option("--json", help="Print the answer as JSON.")]
AsCsv = Annotated[bool, typer.Option("--csv", help="Print the whole table as CSV.")]
Workers = Annotated[int, typer.Option("--workers", "-w", min=1, help="Number of worker processes.")]
ExecutorAddress = Annotated[
    str,
    typer.Option(
        "--executor",
        metavar="processes|ADDRESS",
        help="Where the runs of a sweep are processed: in processes here, or at a Dask scheduler, tcp://HOST:PORT.",
    ),
]
TrustCode = Annotated[
    bool,
    typer.Option("--trust-code", help="Import code that the run names: a task, model or attack `module:function`."),
]


def executor_for(executor: str, workers: int, *, several: bool) -> "AbstractContextManager[Executor | None]":
    """Opens the executor that processes the runs of a sweep.

    Parameters
    ----------
    executor : str
        "processes", or the address of a Dask scheduler, "tcp://HOST:PORT".
    workers : int
        Number of worker processes; a Dask scheduler has its own.
    several : bool
        Whether there is more than one run.

    Returns
    -------
    context manager
        It yields the executor, or None where this process does the work.

    Raises
    ------
    InputError
        If `executor` is neither, or a scheduler is named for a single run.

    Examples
    --------
    >>> with executor_for("processes", 1, several=True) as pool:
    ...     print(pool)
    None
    """
    check_executor(executor)
    if executor == "processes":
        from gradlens.processes import processes

        return processes(workers) if workers > 1 else nullcontext()
    if not several:
        raise InputError("--executor: it shares out the runs of a sweep, this is a single run")
    from simulations.sweeps import dask_executor

    return dask_executor(executor)


def check_executor(executor: str) -> None:
    """Raises InputError unless `executor` is "processes" or looks like an address.

    Examples
    --------
    >>> check_executor("tcp://localhost:8786")
    """
    if executor != "processes" and "://" not in executor:
        raise InputError(f"--executor: expected processes, or tcp://HOST:PORT of a Dask scheduler, found {executor!r}")


def import_from_here(names: Sequence[str] = ("module:function",)) -> None:
    """Appends the working folder to Python's search path if one of the names is `module:function`."""
    if any(":" in name for name in names) and (folder := str(Path.cwd())) not in sys.path:
        sys.path.append(folder)
