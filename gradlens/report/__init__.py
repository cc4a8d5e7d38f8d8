"""One self-contained HTML file on a run or a sweep: `report`."""

from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from pathlib import Path

from gradlens.detectors import Detector
from gradlens.plots import count
from gradlens.report.analysis import analyse, attack_table, usual
from gradlens.report.findings import sweep_findings
from gradlens.report.page import render, write
from gradlens.report.provenance import common_settings
from gradlens.report.single import examine, run_findings, run_sections
from gradlens.report.sweep import representative, sections
from gradlens.run import Run, Sweep, open_run

__all__ = ["attack_table", "report"]


def report(
    source: Run | Sweep | Path | str,
    out_path: Path | str,
    *,
    detectors: Mapping[str, Detector] | None = None,
    fpr: float = 0.05,
    control: Run | Path | str | None = None,
    null: Sequence[Run] = (),
    permutations: int = 999,
    executor: Executor | None = None,
    progress: bool = False,
) -> Path:
    """Writes what a run or a sweep shows as one self-contained HTML file: findings first, then the evidence.

    detectors: name -> uncalibrated detector; None: one per statistic. fpr: the false-positive rate that
    thresholds are set for. permutations: behind each p-value.
    control, null: for a single run, its attack-free control and attack-free runs to set thresholds on; those of
    the sweep are found if the run lies in one. executor: works over the settings of a sweep and draws;
    None: in this process. progress: show a bar while a sweep is analysed.
    Returns the path. Raises InputError where the source is no run or sweep, or the path cannot be written.
    """
    source = source if isinstance(source, Run | Sweep) else open_run(source)
    detectors = usual() if detectors is None else detectors
    if isinstance(source, Run):
        control = Run.open(control) if isinstance(control, Path | str) else control
        e = examine(source, detectors, fpr=fpr, control=control, null=null, permutations=permutations)
        layers = ", ".join(source.log.model.parameters)
        lead = f"One recorded run of {count(len(source.log), 'round')}; the model's layers are {layers}."
        page = render(f"Report on run {source.name}", lead, run_findings(e), run_sections(e))
        return write(page, out_path)
    a = analyse(source, detectors, fpr=fpr, permutations=permutations, executor=executor, progress=progress)
    chosen = representative(a)
    conditions = count(len(a.outcomes), "attacked condition")
    seeds, controls = count(a.outcomes["seeds"].max(), "seed"), len(a.runs["control"].unique())
    seeds = f"{seeds} each" if len(a.outcomes["seeds"].unique()) == 1 else f"up to {seeds}"
    lead = f"{len(a.runs)} attacked runs ({conditions}, {seeds}), {controls} attack-free controls"
    lead = ", ".join([lead, *common_settings(source.runs)]) + "."
    return write(
        render(f"Report on sweep {source.name}", lead, sweep_findings(a, chosen), sections(a, chosen, executor)),
        out_path,
    )
