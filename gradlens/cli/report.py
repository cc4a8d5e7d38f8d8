"""`gradlens report`: what was found, on one page."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gradlens.cli.options import Folder, Workers
from gradlens.cli.output import ends_in, say

if TYPE_CHECKING:
    from gradlens import Run, Sweep


def report(
    run: Folder,
    out: Annotated[Path, typer.Option("--out", "-o", help="The HTML file.", show_default=False)],
    workers: Workers = 2,
) -> None:
    """Writes what was found as one self-contained HTML file."""
    import gradlens

    ends_in(out, (".html", ".htm"), "--out")
    say(f"report: {write_report(gradlens.open(run), out, workers)}")


def write_report(run: "Run | Sweep", out: Path, workers: int) -> Path:
    """Writes the report of a run, or of a sweep in several processes."""
    import gradlens
    from gradlens.processes import processes

    if workers == 1 or isinstance(run, gradlens.Run):
        return gradlens.report(run, out, progress=True)
    with processes(workers) as executor:
        return gradlens.report(run, out, executor=executor, progress=True)
