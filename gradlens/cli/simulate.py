"""`gradlens demo` and `gradlens simulate`: run scenarios and record them."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from gradlens.cli.investigate import case_lines
from gradlens.cli.options import ExecutorAddress, Workers, check_executor, executor_for, import_from_here
from gradlens.cli.output import lines_of, say
from gradlens.errors import InputError

if TYPE_CHECKING:
    from gradlens import Run, Sweep


def demo(
    folder: Annotated[Path, typer.Option("--runs", help="The folder of the runs.")] = Path("runs/demo"),
    out: Annotated[Path, typer.Option("--out", "-o", help="The HTML file of the report.")] = Path("reports/demo.html"),
    workers: Workers = 2,
) -> None:
    """Simulates attacks on scikit-learn's digits, writes a report, and investigates one of the recordings."""
    import simulations
    from gradlens.cli.report import write_report

    toml = Path(simulations.__file__).parent / "scenarios" / "demo.toml"
    sweep = cast("Sweep", _simulated(toml, folder, workers, {}))
    path = write_report(sweep, out, workers)
    say(*_summary(sweep), "", f"report: {path}", "", *_unknown(sweep))


def simulate(
    scenario: Annotated[Path, typer.Argument(help="A TOML file with one scenario or a sweep.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder of the run or the sweep.", show_default=False)],
    workers: Annotated[
        int,
        typer.Option("--workers", "-w", min=1, help="Number of processes for a sweep, or of threads for a single run."),
    ] = 2,
    executor: ExecutorAddress = "processes",
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="Replace a setting or an axis of the file; repeatable."),
    ] = None,
) -> None:
    """Simulates a scenario or all scenarios of a sweep; a second call runs only what is missing."""
    import_from_here()
    result = _simulated(scenario, out, workers, dict(_change(text) for text in changes or []), executor)
    say(*_summary(result))


def _unknown(sweep: "Sweep") -> list[str]:
    """The case of the run of the strongest attack, by its recording alone."""
    import gradlens
    from gradlens.reporting.analysis import attack_table, attacked_runs

    condition = attack_table(sweep)["condition"].iloc[0]
    runs = attacked_runs(sweep)[0]
    recording = sweep.run(str(runs.index[runs["condition"].eq(condition)][0]))
    first = f"investigating {recording.path} by its recording alone, without its truth or its control:"
    return [first, *case_lines(gradlens.investigate(recording.log))]


def _simulated(
    toml: Path, out: Path, workers: int, changes: Mapping[str, Any], executor: str = "processes"
) -> "Run | Sweep":
    from gradlens.log.manifest import named_file
    from simulations import load_sweep, run, run_sweep

    scenarios, axes = load_sweep(named_file(toml), **changes)
    check_executor(executor)
    if executor != "processes":
        if len(scenarios) == 1:
            raise InputError(f"--executor: it shares out the runs of a sweep, {toml} is a single scenario")
        with executor_for(executor, workers, several=True) as pool:
            return run_sweep(scenarios, out, axes=axes, executor=pool)
    if len(scenarios) == 1:
        return run(scenarios[0], out, workers=workers, progress=True)
    return run_sweep(scenarios, out, axes=axes, workers=workers)


def _change(text: str) -> tuple[str, Any]:
    """Splits `name=value`; the value is read as TOML, or as a bare word."""
    import tomllib

    name, equals, value = text.partition("=")
    if not equals or not name:
        raise InputError(f"--set: expected NAME=VALUE, found {text!r}")
    try:
        return name, tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return name, value


def _summary(result: "Run | Sweep") -> list[str]:
    """The head of a run; for a sweep, a table of final main accuracy and ASR by condition, with the control's ASR."""
    from gradlens import Run

    if isinstance(result, Run):
        return [f"run: {result.path}, head {result.head}"]
    from gradlens.reporting.analysis import attack_table

    return lines_of(attack_table(result), ".2f")
