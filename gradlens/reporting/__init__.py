"""Reports on a run or a sweep as one self-contained HTML file: `report`."""

from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from pathlib import Path

from gradlens.detectors import Detector
from gradlens.errors import InputError
from gradlens.run import Run, Sweep, open_run

__all__ = ["report"]


def report(
    source: Run | Sweep | Path | str,
    out_path: Path | str,
    *,
    detectors: Mapping[str, Detector] | None = None,
    fpr: float = 0.05,
    control: Run | Path | str | None = None,
    null: Sequence[Run] | int | None = None,
    permutations: int = 999,
    executor: Executor | None = None,
    progress: bool = False,
) -> Path:
    """Writes a report on a run or a sweep as one self-contained HTML file: findings first, then the evidence.

    Parameters
    ----------
    source : Run, Sweep, pathlib.Path or str
        The run or sweep, or its folder.
    out_path : pathlib.Path or str
        The file to write.
    detectors : Mapping, optional
        Name -> uncalibrated detector; None takes one per statistic.
    fpr : float
        False-positive rate for which thresholds are set.
    control : Run, pathlib.Path or str, optional
        For a single run, its attack-free control; None looks for it in the sweep that contains the run.
    null : sequence of Run or int, optional
        For a single run, what its case and the thresholds rest on: attack-free runs of the same setting, or the number
        of its first rounds that are declared clean. None: the reference that comes with gradlens, and each cohort.
    permutations : int
        Number of permutations behind each p-value.
    executor : concurrent.futures.Executor, optional
        Distributes the settings of a sweep and the drawing; None works in this process.
    progress : bool
        Whether to show a progress bar while a sweep is analyzed.

    Returns
    -------
    pathlib.Path
        The file.

    Raises
    ------
    InputError
        If the source is no run or sweep, a null is given for a sweep or is attacked, a run has no round, a sweep has
        no closed attacked run with its control, or the path cannot be written.

    Examples
    --------
    >>> import tempfile
    >>> from gradlens import DETECTORS
    >>> from gradlens.examples import example_run
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     run = example_run(f"{folder}/run")
    ...     page = report(run, f"{folder}/report.html", detectors={"krum": DETECTORS["krum"]()}, permutations=19)
    ...     page.read_text()[:15]
    '<!doctype html>'
    """
    from gradlens.reporting import document, page  # plots take long to import, and memory that a server does without

    source = source if isinstance(source, Run | Sweep) else open_run(source)
    if isinstance(source, Run):
        whole = document.of_run(source, detectors, fpr, control, null, permutations)
    elif null:
        raise InputError("null: it is for the report on a single run; a sweep has its attack-free controls")
    else:
        whole = document.of_sweep(source, detectors, fpr, permutations, executor, progress=progress)
    return page.write(whole, out_path)
