"""`gradlens report`: the analysis of a run or a sweep on one page."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gradlens.cli.options import CleanRounds, Folder, NullRuns, Workers, basis_from
from gradlens.cli.output import ends_in, say

if TYPE_CHECKING:
    from gradlens import Run, Sweep


def report(
    run: Folder,
    out: Annotated[Path, typer.Option("--out", "-o", help="The HTML file to write.", show_default=False)],
    null: NullRuns = None,
    clean_rounds: CleanRounds = 0,
    workers: Workers = 2,
) -> None:
    """Analyzes a run or a sweep and writes the report as one self-contained HTML file."""
    import gradlens

    ends_in(out, (".html", ".htm"), "--out")
    basis = basis_from(null or [], clean_rounds)
    say(f"report: {write_report(gradlens.open(run), out, workers, basis)}")


def write_report(run: "Run | Sweep", out: Path, workers: int, null: Any = None) -> Path:
    """Writes the report of a run or a sweep.

    Parameters
    ----------
    run : Run or Sweep
        What to analyze.
    out : Path
        The HTML file.
    workers : int
        Number of processes that analyze the runs of a sweep.
    null : sequence of Run or int, optional
        As for `gradlens.report`.

    Returns
    -------
    Path
        The file.
    """
    import gradlens
    from gradlens.processes import processes

    if workers == 1 or isinstance(run, gradlens.Run):
        return gradlens.report(run, out, null=null, progress=True)
    with processes(workers) as executor:
        return gradlens.report(run, out, null=null, executor=executor, progress=True)
