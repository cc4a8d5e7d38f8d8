"""Assembles the page of a report, on a run or on a sweep."""

from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from pathlib import Path

from gradlens.detectors import Detector
from gradlens.plots import count
from gradlens.reporting.analysis import analyse, usual
from gradlens.reporting.findings import sweep_findings
from gradlens.reporting.page import render
from gradlens.reporting.provenance import common_settings
from gradlens.reporting.run_report import examine, run_findings, run_sections
from gradlens.reporting.sweep_report import representative, sections
from gradlens.run import Run, Sweep


def of_run(
    run: Run,
    detectors: Mapping[str, Detector] | None,
    fpr: float,
    control: Run | Path | str | None,
    null: Sequence[Run] | int | None,
    permutations: int,
) -> str:
    """Returns the HTML page on a single run; parameters as of `gradlens.report`."""
    detectors = usual() if detectors is None else detectors
    control = Run.open(control) if isinstance(control, Path | str) else control
    e = examine(run, detectors, fpr=fpr, control=control, null=null, permutations=permutations)
    layers = ", ".join(run.log.model.parameters)
    lead = f"One recorded run of {count(len(run.log), 'round')}; the model's layers are {layers}."
    return render(f"Report on run {run.name}", lead, run_findings(e), run_sections(e))


def of_sweep(
    sweep: Sweep,
    detectors: Mapping[str, Detector] | None,
    fpr: float,
    permutations: int,
    executor: Executor | None,
    *,
    progress: bool,
) -> str:
    """Returns the HTML page on a sweep; parameters as of `gradlens.report`."""
    detectors = usual() if detectors is None else detectors
    a = analyse(sweep, detectors, fpr=fpr, permutations=permutations, executor=executor, progress=progress)
    chosen = representative(a)
    conditions = count(len(a.outcomes), "attacked condition")
    seeds, controls = count(a.outcomes["seeds"].max(), "seed"), len(a.runs["control"].unique())
    seeds = f"{seeds} each" if len(a.outcomes["seeds"].unique()) == 1 else f"up to {seeds}"
    lead = f"{len(a.runs)} attacked runs ({conditions}, {seeds}), {controls} attack-free controls"
    lead = ", ".join([lead, *common_settings(sweep.runs)]) + "."
    return render(f"Report on sweep {sweep.name}", lead, sweep_findings(a, chosen), sections(a, chosen, executor))
