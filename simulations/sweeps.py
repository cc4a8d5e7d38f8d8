"""Runs many scenarios into one folder, in this process or by an executor; a second call runs only what is missing."""

import fcntl
import json
import logging
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import BrokenExecutor, CancelledError, Executor, Future, as_completed
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pandas as pd
from tqdm import tqdm

from gradlens.errors import InputError
from gradlens.log.files import replace_with, write_table
from gradlens.log.manifest import MANIFEST, RUN, read_manifest
from gradlens.processes import processes
from gradlens.run import CONTROL_COLUMNS, CONTROLS, SWEEP, Run, Sweep
from gradlens.sealing import break_seal, seal_sweep
from simulations.assemble import model_of
from simulations.attacks import build_part
from simulations.components import Component
from simulations.measure import attack_goal, attack_success, measuring_task
from simulations.rounds import run
from simulations.scenario import Scenario, varied
from simulations.tasks import build_model
from simulations.training import one_thread

Job = tuple[Callable[..., Any], tuple[Any, ...]]
PATIENCE = 180.0  # seconds; a network file system may hold the lock of a machine that crashed for up to 90


def run_sweep(
    scenarios: Iterable[Scenario],
    folder: Path | str,
    *,
    axes: Sequence[str] | None = None,
    workers: int = 1,
    executor: Executor | None = None,
    progress: bool = True,
) -> Sweep:
    """Runs every scenario into `folder`/digest, and measures the success of each attack on its control's models too.

    Closed runs are kept and open ones continued where they stopped: an interruption loses at most the rounds in flight.

    Parameters
    ----------
    scenarios : iterable of Scenario
        As `sweep` or `load_sweep` gives them.
    folder : Path or str
        The folder of the sweep.
    axes : sequence of str, optional
        Names of the settings that distinguish runs; None, the default: those that vary.
    workers : int
        Number of new processes, each with one torch thread; 1, the default: this process. A script that asks for more
        needs the usual `if __name__ == "__main__"`.
    executor : concurrent.futures.Executor, optional
        Runs the scenarios instead, such as that of `dask_executor`; its workers must see the same files under the same
        paths. If another process still records a run, as may a worker that was believed lost, it is waited for while
        rounds arrive.
    progress : bool
        Whether to show progress bars.

    Returns
    -------
    Sweep
        All runs, closed.

    Raises
    ------
    InputError
        If there is no scenario, one of them cannot run, or the folder is that of a single run.

    Examples
    --------
    >>> import tempfile
    >>> from simulations import sweep
    >>> scenarios = sweep(Scenario(rounds=1, num_clients=5, attack="label_flip"), num_malicious=[0, 1])
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     len(run_sweep(scenarios, folder, progress=False).runs)
    2
    """
    scenarios, folder = list(dict.fromkeys(scenarios)), Path(folder).absolute()
    _check(scenarios, folder, workers)
    folder.mkdir(parents=True, exist_ok=True)
    break_seal(folder)
    replace_with(folder / SWEEP, json.dumps(_index(scenarios, varied(scenarios) if axes is None else axes)).encode())
    pending = [scenario for scenario in scenarios if not _is_done(folder / scenario.digest)]
    with _executing(executor, min(workers, len(pending))) as pool:
        patience = 0.0 if executor is None else PATIENCE
        _do([(_run, (scenario, folder / scenario.digest, patience)) for scenario in pending], pool, "runs", progress)
        if missing := [scenario.digest for scenario in pending if not _is_done(folder / scenario.digest)]:
            raise InputError(f"{folder / missing[0]}: not there after it ran; do the workers see the same files?")
        _measure_controls(scenarios, folder, pool, progress)
    seal_sweep(folder)
    return Sweep.open(folder)


def _check(scenarios: Sequence[Scenario], folder: Path, workers: int) -> None:
    if not scenarios:
        raise InputError("sweep: expected at least one scenario, found none")
    if workers < 1:
        raise InputError(f"sweep: expected at least one worker, found {workers}")
    if any((folder / name).exists() for name in (RUN, MANIFEST)):
        raise InputError(f"{folder}: expected the folder of a sweep, found a run")


def _index(scenarios: Sequence[Scenario], axes: Sequence[str]) -> dict[str, Any]:
    digests = {scenario.digest for scenario in scenarios}
    controls = {scenario.digest: scenario.control.digest for scenario in scenarios if not scenario.is_control}
    return {
        "format": 1,
        "axes": list(axes),
        "runs": {scenario.digest: {axis: scenario.label(axis) for axis in axes} for scenario in scenarios},
        "controls": {attacked: control for attacked, control in controls.items() if control in digests},
    }


def _is_done(path: Path) -> bool:
    begun = (path / MANIFEST).is_file() and read_manifest(path).lines  # no lines where it was stopped at its start
    return bool(begun) and Run.open(path).is_closed


def _executing(executor: Executor | None, workers: int) -> AbstractContextManager[Executor | None]:
    """The executor to use, shut down at the end if it was created here; None: this process."""
    if executor is not None or workers <= 1:
        return nullcontext(executor)
    return processes(workers)


@contextmanager
def dask_executor(address: str, timeout: float = 10.0) -> Iterator[Executor]:
    """Yields the workers of a Dask scheduler as an executor, for `run_sweep`.

    The workers need this package, and must see the same files under the same paths. A run whose worker is lost is
    repeated by another one, at most three times.

    Parameters
    ----------
    address : str
        Address of the scheduler, "tcp://host:port".
    timeout : float, default 10.0
        Seconds within which the scheduler must answer.

    Yields
    ------
    concurrent.futures.Executor
        The workers of the scheduler.

    Raises
    ------
    InputError
        If dask is not installed, no scheduler answers in time, or it is lost.

    Examples
    --------
    >>> with dask_executor("localhost"):
    ...     pass
    Traceback (most recent call last):
    gradlens.errors.InputError: dask: expected the address of a scheduler, tcp://HOST:PORT, found 'localhost'
    """
    if not re.fullmatch(r"(tcp|tls|ws|wss|ucx)://\S+:\d+", address):
        raise InputError(f"dask: expected the address of a scheduler, tcp://HOST:PORT, found {address!r}")
    try:
        from distributed import Client, KilledWorker
    except ImportError as error:
        raise InputError("dask: expected dask.distributed, found none; pip install 'dask[distributed]'") from error
    with _quiet("distributed", "tornado.application"):
        try:
            client = Client(address, timeout=timeout, set_as_default=False)
        except OSError as error:
            raise InputError(f"dask: no scheduler answers at {address} ({_first_line(error)})") from error
        try:
            if not client.scheduler_info()["workers"]:
                tqdm.write(f"dask: the scheduler at {address} has no worker yet; waiting for one", file=sys.stderr)
            yield client.get_executor(pure=False)  # dask must not skip equal calls, as runs are called to write files
        except KilledWorker as error:
            raise InputError(f"dask: several workers were lost with the same run, memory? ({error.task})") from error
        except CancelledError as error:
            raise InputError(f"dask: the scheduler at {address} was lost; what was finished is kept") from error
        finally:
            client.close()


@contextmanager
def _quiet(*names: str) -> Iterator[None]:
    """Silences the loggers of libraries whose errors are raised as exceptions as well."""
    known = [log for log in logging.root.manager.loggerDict if any(f"{log}.".startswith(f"{name}.") for name in names)]
    loggers = [logging.getLogger(log) for log in known]
    previous = [logger.disabled for logger in loggers]
    for logger in loggers:
        logger.disabled = True
    try:
        yield
    finally:
        for logger, disabled in zip(loggers, previous, strict=True):
            logger.disabled = disabled


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _run(scenario: Scenario, path: Path, patience: float) -> None:
    """Runs a scenario, once no other writer into its folder has recorded a round for `patience` seconds."""
    manifest, size, deadline = path / MANIFEST, -1, 0.0
    while patience and _is_held(manifest):
        if (now := manifest.stat().st_size) != size:
            size, deadline = now, time.monotonic() + patience
        if time.monotonic() > deadline:
            break
        time.sleep(0.1)
    run(scenario, path)


def _is_held(manifest: Path) -> bool:
    """Whether a running writer holds the lock of a run."""
    try:
        with open(manifest, "r+b") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def _do(jobs: Sequence[Job], executor: Executor | None, name: str, progress: bool) -> list[Any]:
    """The results of all jobs, in their order; the first failure cancels jobs that have not started."""
    bar = tqdm(total=len(jobs), desc=name, unit="", disable=None if progress and jobs else True)
    with bar:
        if executor is None:
            return [_counted(bar, function(*arguments)) for function, arguments in jobs]
        futures: list[Future[Any]] = [executor.submit(function, *arguments) for function, arguments in jobs]
        try:
            for future in as_completed(futures):
                _counted(bar, future.result())
        except BrokenExecutor:  # the pool is setting this on all of them, and must not meet a cancelled one
            raise
        except BaseException:
            for future in futures:
                future.cancel()
            raise
        return [future.result() for future in futures]


def _counted(bar: Any, result: Any) -> Any:
    bar.update()
    return result


def _measure_controls(scenarios: Sequence[Scenario], folder: Path, executor: Executor | None, progress: bool) -> None:
    """Writes `controls.arrow`: run, control, round, and the ASR of the run's attack on its control's global models."""
    digests = {scenario.digest for scenario in scenarios}
    attacked = [s for s in scenarios if not s.is_control and s.control.digest in digests]
    pairs = dict.fromkeys((scenario.control, _poisoning(scenario)) for scenario in attacked)
    known = _known(folder, attacked)
    missing = [pair for pair in pairs if pair not in known]
    jobs: list[Job] = [(control_success, (control, folder / control.digest, attack)) for control, attack in missing]
    known |= dict(zip(missing, _do(jobs, executor, "controls", progress), strict=True))
    rows = [
        (scenario.digest, scenario.control.digest, index, asr)
        for scenario in attacked
        for index, asr in enumerate(known[scenario.control, _poisoning(scenario)])
    ]
    if rows:
        write_table(folder / CONTROLS, pd.DataFrame(rows, columns=list(CONTROL_COLUMNS)))


def control_success(control: Scenario, path: Path, attack: str) -> list[float]:
    """Measures an attack on the global models of a run in which nobody attacked.

    Parameters
    ----------
    control : Scenario
        The scenario of that run.
    path : Path
        Its folder.
    attack : str
        The attack's component as JSON.

    Returns
    -------
    list of float
        The attack success rate after each round.
    """
    goal = attack_goal(control.replace(attack=json.loads(attack), num_malicious=1))
    model = model_of(control) if control.adapters else build_model(measuring_task(control), control.model)
    with one_thread():
        return [attack_success(goal, model, state) for state in Run.open(path).states()]


def _poisoning(scenario: Scenario) -> str:
    """The parts of an attack that poison data, as JSON: they decide its success on a given model."""
    parts: Component = scenario.attack
    return json.dumps({name: settings for name, settings in parts.items() if build_part(name, settings).poisons})


def _known(folder: Path, attacked: Sequence[Scenario]) -> dict[tuple[Scenario, str], list[float]]:
    """Measurements of an earlier call: (control, parts of the attack) -> ASR after each round."""
    if not (folder / CONTROLS).is_file():
        return {}
    table = Sweep.open(folder).controls.sort_values("round")
    measured = {str(name): rows["asr"].tolist() for name, rows in table.groupby("run")}
    return {
        (scenario.control, _poisoning(scenario)): measured[scenario.digest]
        for scenario in attacked
        if len(measured.get(scenario.digest, [])) == scenario.rounds
    }
