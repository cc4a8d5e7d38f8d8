"""Options and arguments that several commands share, and the functions that act on them."""

import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gradlens.errors import InputError

if TYPE_CHECKING:
    from concurrent.futures import Executor

    from gradlens import Run

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
NullRuns = Annotated[
    list[Path] | None,
    typer.Option(
        "--null",
        metavar="RUNS",
        help="A folder of attack-free recordings of the same setting: a run, a sweep or a folder of runs; repeatable.",
        show_default=False,
    ),
]
CleanRounds = Annotated[
    int, typer.Option("--clean-rounds", min=0, help="Number of first rounds that are known to be clean.")
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


def basis_from(null: Sequence[Path], clean_rounds: int) -> Any:
    """The null that the options name, as `gradlens.investigate` takes it.

    Parameters
    ----------
    null : sequence of Path
        Folders of attack-free recordings.
    clean_rounds : int
        0 for none.

    Raises
    ------
    InputError
        If both are given, or a folder holds no recording.

    Examples
    --------
    >>> basis_from([], 4)
    4
    """
    if null and clean_rounds:
        raise InputError("--null and --clean-rounds exclude each other: name one of them")
    return [run for folder in null for run in runs_in(folder)] or clean_rounds or None


def runs_in(folder: Path) -> "list[Run]":
    """The recordings in a folder: the run itself, the runs of a sweep, or those in its subfolders, sorted by name.

    Parameters
    ----------
    folder : Path

    Raises
    ------
    InputError
        If there is none.

    Examples
    --------
    >>> import tempfile
    >>> from gradlens.examples import example_run
    >>> with tempfile.TemporaryDirectory() as place:
    ...     [run.name for run in runs_in(example_run(f"{place}/run").parent)]
    ['run']
    """
    from gradlens.run import Run

    inside = sorted(path.parent for path in folder.glob("*/run.json")) if folder.is_dir() else []
    if inside and not (folder / "run.json").exists() and not (folder / "sweep.json").exists():
        return [Run.open(path) for path in inside]
    return runs_of(folder)


def runs_of(folder: Path) -> "list[Run]":
    """The run in a folder, or the runs of the sweep in it; raises InputError if it is neither.

    Parameters
    ----------
    folder : Path

    Examples
    --------
    >>> import tempfile
    >>> from gradlens.examples import example_run
    >>> with tempfile.TemporaryDirectory() as place:
    ...     [run.name for run in runs_of(example_run(f"{place}/run"))]
    ['run']
    """
    import gradlens

    opened = gradlens.open(folder)
    return opened.runs if isinstance(opened, gradlens.Sweep) else [opened]
