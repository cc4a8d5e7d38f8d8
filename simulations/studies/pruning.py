"""What pruning after training leaves of a backdoor: `python -m simulations.studies.pruning runs/pruning`.

Takes runs, or folders of runs, of `simulations/scenarios/pruning.toml` with their attack-free controls; writes
`reports/pruning.csv` and `pruning.html`, which compares them with Wu et al. 2020, arXiv:2011.01767.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from gradlens.reporting.page import write
from gradlens.run import Run, Sweep, open_run
from simulations.studies.pruning_page import page
from simulations.studies.pruning_steps import PAIR, parts_of
from simulations.studies.results import REPORTS, collected, run_as_command

OUT = REPORTS / "pruning"


def main(arguments: Sequence[str] | None = None) -> None:
    """Writes the rows of each attacked run and its control as they are computed, then the page."""
    parser = argparse.ArgumentParser(
        prog="simulations.studies.pruning", description=(__doc__ or "").partition(":")[0] + "."
    )
    parser.add_argument("runs", type=Path, nargs="+", help="runs, or folders of runs: runs/pruning")
    parser.add_argument("--resume", action="store_true", help="keep the rows of a model, partition and seed")
    parser.add_argument("--out", type=Path, default=OUT, help="table and page, without their endings")
    options = parser.parse_args(arguments)
    runs = [run for folder in options.runs for run in runs_in(folder)]
    path = options.out.with_suffix(".csv")
    rows = collected(path, PAIR, parts_of(runs), resume=options.resume, float_format="%.4f", progress="pairs of runs")
    write(page(rows, runs), options.out.with_suffix(".html"))


def runs_in(folder: Path) -> list[Run]:
    """The runs of a sweep, or the one run that the folder holds."""
    source = open_run(folder)
    return source.runs if isinstance(source, Sweep) else [source]


if __name__ == "__main__":
    run_as_command(main)
