"""Where poisoned updates differ and when that fades: `python -m simulations.studies.localization runs/localization`.

Takes the sweep of `simulations/scenarios/localization.toml`; writes `reports/localization.csv` and `localization.html`.
The page compares the runs with the theory: under plain SGD the final bias of the target class moves by learning rate x
steps x share of wrong labels as long as the poison is not learned, and no longer once it is; a benign client with
unusual labels moves the same tensor.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from gradlens.reporting.page import write
from gradlens.run import Sweep
from simulations.studies.localization_page import page
from simulations.studies.localization_tables import gathered
from simulations.studies.results import REPORTS, run_as_command

OUT = REPORTS / "localization"


def main(arguments: Sequence[str] | None = None) -> None:
    """Writes the table and the page of a sweep."""
    parser = argparse.ArgumentParser(
        prog="simulations.studies.localization", description=(__doc__ or "").partition(":")[0] + "."
    )
    parser.add_argument("sweep", type=Path, help="folder of the sweep, runs/localization")
    parser.add_argument("--workers", type=int, default=2, help="processes (default: 2)")
    parser.add_argument("--out", type=Path, default=OUT, help="table and page, without their endings")
    options = parser.parse_args(arguments)
    tables = gathered(Sweep.open(options.sweep), options.workers)
    tables.rows().to_csv(options.out.with_suffix(".csv"), index=False, float_format="%.4f")
    write(page(tables), options.out.with_suffix(".html"))


if __name__ == "__main__":
    run_as_command(main)
