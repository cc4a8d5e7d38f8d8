"""Many scenarios into one folder, in this process or over an executor; a second call runs only what is missing."""

import json
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, as_completed
from contextlib import AbstractContextManager, nullcontext
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pandas as pd
from tqdm import tqdm

from gradlens.log import InputError
from gradlens.log.files import replace_with, write_table
from gradlens.log.manifest import MANIFEST, RUN
from gradlens.run import CONTROL_COLUMNS, CONTROLS, SWEEP, Run, Sweep
from simulations.attacks import ATTACKS, build_attack
from simulations.federated import attack_success, run
from simulations.scenario import Component, Scenario, varied
from simulations.tasks import build_model, load_task
from simulations.training import one_thread

Job = tuple[Callable[..., Any], tuple[Any, ...]]


def run_sweep(
    scenarios: Iterable[Scenario],
    folder: Path | str,
    *,
    axes: Sequence[str] | None = None,
    workers: int = 1,
    executor: Executor | None = None,
    progress: bool = True,
) -> Sweep:
    """Runs every scenario into `folder`/digest, and measures each attack on the models of its control as well.

    Closed runs are kept, open ones go on where they stopped; what an interruption leaves is never lost.
    axes: the settings to tell runs apart by (default: those that vary). workers: processes, started afresh with
    one torch thread each; 1: this process. executor: any other one, e.g. Dask's; it must see the same files. A
    script that asks for processes needs the usual `if __name__ == "__main__"`.
    Raises InputError where a scenario cannot run, or the folder is that of a single run.
    """
    scenarios, folder = list(dict.fromkeys(scenarios)), Path(folder)
    if not scenarios:
        raise InputError("sweep: expected at least one scenario, found none")
    if workers < 1:
        raise InputError(f"sweep: expected at least one worker, found {workers}")
    if any((folder / name).exists() for name in (RUN, MANIFEST)):
        raise InputError(f"{folder}: expected the folder of a sweep, found a run")
    folder.mkdir(parents=True, exist_ok=True)
    replace_with(folder / SWEEP, json.dumps(_index(scenarios, varied(scenarios) if axes is None else axes)).encode())
    pending = [scenario for scenario in scenarios if not _is_done(folder / scenario.digest)]
    with _executing(executor, min(workers, len(pending))) as pool:
        _do([(run, (each, folder / each.digest)) for each in pending], pool, "runs", progress)
        _measure_controls(scenarios, folder, pool, progress)
    return Sweep.open(folder)


def _index(scenarios: Sequence[Scenario], axes: Sequence[str]) -> dict[str, Any]:
    digests = {scenario.digest for scenario in scenarios}
    controls = {each.digest: each.control.digest for each in scenarios if not each.is_control}
    return {
        "format": 1,
        "axes": list(axes),
        "runs": {each.digest: {axis: each.label(axis) for axis in axes} for each in scenarios},
        "controls": {attacked: control for attacked, control in controls.items() if control in digests},
    }


def _is_done(path: Path) -> bool:
    return (path / MANIFEST).is_file() and Run.open(path).is_closed


def _executing(executor: Executor | None, workers: int) -> AbstractContextManager[Executor | None]:
    """The executor to use, shut down at the end if it is our own; None for this process."""
    if executor is not None or workers <= 1:
        return nullcontext(executor)
    return ProcessPoolExecutor(workers, mp_context=get_context("spawn"))  # a fork after torch used threads hangs


def _do(jobs: Sequence[Job], executor: Executor | None, name: str, progress: bool) -> list[Any]:
    """The results of all jobs, in their order; at the first failure what has not begun is called off."""
    bar = tqdm(total=len(jobs), desc=name, unit="", disable=None if progress and jobs else True)
    with bar:
        if executor is None:
            return [_counted(bar, function(*arguments)) for function, arguments in jobs]
        futures: list[Future[Any]] = [executor.submit(function, *arguments) for function, arguments in jobs]
        try:
            for future in as_completed(futures):
                _counted(bar, future.result())
        except BaseException:
            for future in futures:
                future.cancel()
            raise
        return [future.result() for future in futures]


def _counted(bar: Any, result: Any) -> Any:
    bar.update()
    return result


def _measure_controls(scenarios: Sequence[Scenario], folder: Path, executor: Executor | None, progress: bool) -> None:
    """Writes `controls.arrow`: run, control, round, asr of the run's attack on its control's global models."""
    digests = {scenario.digest for scenario in scenarios}
    attacked = [each for each in scenarios if not each.is_control and each.control.digest in digests]
    questions = dict.fromkeys((each.control, _poisoning(each)) for each in attacked)
    known = _known(folder, attacked)
    asked = [question for question in questions if question not in known]
    jobs: list[Job] = [(control_success, (control, folder / control.digest, text)) for control, text in asked]
    known |= dict(zip(asked, _do(jobs, executor, "controls", progress), strict=True))
    rows = [
        (each.digest, each.control.digest, index, asr)
        for each in attacked
        for index, asr in enumerate(known[each.control, _poisoning(each)])
    ]
    if rows:
        write_table(folder / CONTROLS, pd.DataFrame(rows, columns=list(CONTROL_COLUMNS)))


def control_success(control: Scenario, path: Path, attack: str) -> list[float]:
    """The success of an attack (the JSON of its parts) after each round of a run in which nobody attacked."""
    task = load_task(control.task, 1)  # its test images are all that is needed
    built, model = build_attack(json.loads(attack)), build_model(task, control.model)
    with one_thread():
        return [attack_success(task, built, model, state) for state in Run.open(path).states()]


def _poisoning(scenario: Scenario) -> str:
    """What of an attack decides its success on a given model, as JSON: the parts that have a target."""
    parts: Component = scenario.attack
    return json.dumps({n: each for n, each in parts.items() if ATTACKS[n](**each).target_label is not None})


def _known(folder: Path, attacked: Sequence[Scenario]) -> dict[tuple[Scenario, str], list[float]]:
    """What an earlier call has measured already."""
    if not (folder / CONTROLS).is_file():
        return {}
    table = Sweep.open(folder).controls.sort_values("round")
    found = {str(name): rows["asr"].tolist() for name, rows in table.groupby("run")}
    return {
        (each.control, _poisoning(each)): found[each.digest]
        for each in attacked
        if len(found.get(each.digest, [])) == each.rounds
    }
