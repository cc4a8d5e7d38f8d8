"""Options and arguments that several commands share, and what they stand for."""

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
AsJson = Annotated[bool, typer.Option("--json", help="Write the answer as JSON.")]
AsCsv = Annotated[bool, typer.Option("--csv", help="Write the whole table as CSV.")]
Workers = Annotated[int, typer.Option("--workers", "-w", min=1, help="Number of worker processes.")]
ExecutorAddress = Annotated[
    str,
    typer.Option(
        "--executor",
        metavar="processes|ADDRESS",
        help="Where a sweep runs; ADDRESS is a Dask scheduler, tcp://HOST:PORT.",
    ),
]
TrustCode = Annotated[
    bool,
    typer.Option("--trust-code", help="Import the code that the run names: a task, model or attack `module:function`."),
]


def executor_for(executor: str, workers: int, *, several: bool) -> "AbstractContextManager[Executor | None]":
    """What the runs of a sweep are shared out to; None for this process."""
    check_executor(executor)
    if executor == "processes":
        from gradlens.processes import processes

        return processes(workers) if workers > 1 else nullcontext()
    if not several:
        raise InputError("--executor: it shares out the runs of a sweep, this is a single run")
    from simulations.sweeps import dask_executor

    return dask_executor(executor)


def check_executor(executor: str) -> None:
    """Raises InputError for what is neither `processes` nor an address."""
    if executor != "processes" and "://" not in executor:
        raise InputError(f"--executor: expected processes, or tcp://HOST:PORT of a Dask scheduler, found {executor!r}")


def import_from_here(names: Sequence[str] = ("module:function",)) -> None:
    """Lets `module:function`, where a name is one, be found in the working folder, after all libraries."""
    if any(":" in name for name in names) and (here := str(Path.cwd())) not in sys.path:
        sys.path.append(here)
