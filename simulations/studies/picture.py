"""The README's picture: `python -m simulations.studies.picture runs/first_look reports/picture.png`.

Shows where poisoned updates differ, layer by layer, and where they do not.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import seaborn as sns
from matplotlib.figure import Figure

from gradlens.localization import localize_sweep
from gradlens.plots import plot_localization
from gradlens.run import Sweep
from gradlens.statistics import STATISTICS
from simulations.studies.results import REPORTS, run_as_command

STATISTIC_NAMES = ("final_bias", "accumulated_norms")


def main(arguments: Sequence[str] | None = None) -> None:
    """Draws two heat maps, one below the other, of the runs without a filter."""
    parser = argparse.ArgumentParser(
        prog="simulations.studies.picture", description=(__doc__ or "").partition(":")[0] + "."
    )
    parser.add_argument("sweep", type=Path, help="folder of the sweep, runs/first_look")
    parser.add_argument("out", type=Path, nargs="?", default=REPORTS / "picture.png", help="(reports/picture.png)")
    options = parser.parse_args(arguments)
    table = localize_sweep(Sweep.open(options.sweep), {name: STATISTICS[name] for name in STATISTIC_NAMES})
    table = table[table["detector"] == "none"].drop(columns=["detector", "poison_rate", "schedule"])
    with sns.axes_style("white"):
        figure = Figure(figsize=(12, 7.5), layout="constrained")
        for ax, name in zip(figure.subplots(2, 1), STATISTIC_NAMES, strict=True):
            plot_localization(table, statistic=name, ax=ax)
    figure.savefig(options.out, dpi=110)


if __name__ == "__main__":
    run_as_command(main)
