"""What norm clipping and weak DP do to a backdoor: `python -m simulations.studies.norm_clipping SWEEP ...`.

Takes the sweeps of `simulations/scenarios/norm_clipping.toml` and `norm_clipping_femnist.toml`; writes
`reports/norm_clipping.csv` and `norm_clipping.html`, which compares them with Sun et al. 2019, arXiv:1911.07963.
"""

import argparse
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

from gradlens.processes import processes
from gradlens.reporting.page import write
from gradlens.run import Sweep
from simulations.studies import norm_clipping_figures as figures
from simulations.studies.norm_clipping_page import page
from simulations.studies.results import REPORTS, collected, run_as_command

OUT = REPORTS / "norm_clipping"


def main(arguments: Sequence[str] | None = None) -> None:
    """Writes the rows of each sweep as they are computed, then the page."""
    parser = argparse.ArgumentParser(
        prog="simulations.studies.norm_clipping", description=(__doc__ or "").partition(":")[0] + "."
    )
    parser.add_argument("sweeps", type=Path, nargs="+", help="runs/norm_clipping runs/norm_clipping_femnist")
    parser.add_argument("--resume", action="store_true", help="keep the rows of a task and model that are there")
    parser.add_argument("--workers", type=int, default=2, help="processes (default: 2)")
    parser.add_argument("--out", type=Path, default=OUT, help="table and page, without their endings")
    options = parser.parse_args(arguments)
    sweeps = [Sweep.open(folder) for folder in options.sweeps]
    with processes(options.workers) if options.workers > 1 else nullcontext() as executor:
        parts = [
            (figures.place_of(sweep), lambda sweep=sweep: figures.rows_of_sweep(sweep, executor)) for sweep in sweeps
        ]
        rows = collected(
            options.out.with_suffix(".csv"),
            figures.PLACE,
            parts,
            resume=options.resume,
            float_format="%.4g",
            progress="sweeps",
        )
    write(page(rows, [run for sweep in sweeps for run in sweep.runs]), options.out.with_suffix(".html"))


if __name__ == "__main__":
    run_as_command(main)
