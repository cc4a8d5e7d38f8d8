"""One self-contained HTML file on a run or a sweep: `report`."""

from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from pathlib import Path

from gradlens.detectors import Detector
from gradlens.run import Run, Sweep, open_run

__all__ = ["report"]


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
    from gradlens.reporting import document, page  # plots take long to import, and memory that a server does without

    source = source if isinstance(source, Run | Sweep) else open_run(source)
    if isinstance(source, Run):
        whole = document.of_run(source, detectors, fpr, control, null, permutations)
    else:
        whole = document.of_sweep(source, detectors, fpr, permutations, executor, progress=progress)
    return page.write(whole, out_path)
