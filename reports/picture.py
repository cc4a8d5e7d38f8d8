"""Draws the README's picture from a sweep: where poisoned updates differ, and where they do not."""

import sys
from pathlib import Path

import seaborn as sns
from matplotlib.figure import Figure

import gradlens
from gradlens.localization import localize_sweep
from gradlens.plots import plot_localization
from gradlens.statistics import STATISTICS

STATISTIC_NAMES = ("final_bias", "accumulated_norms")


def main(sweep: str, out: str) -> None:
    """Two heat maps, one below the other, of the runs without a filter."""
    found = gradlens.open(sweep)
    assert isinstance(found, gradlens.Sweep)
    table = localize_sweep(found, {name: STATISTICS[name] for name in STATISTIC_NAMES})
    table = table[table["detector"] == "none"].drop(columns=["detector", "poison_rate", "schedule"])
    with sns.axes_style("white"):
        figure = Figure(figsize=(12, 7.5), layout="constrained")
        for ax, name in zip(figure.subplots(2, 1), STATISTIC_NAMES, strict=True):
            plot_localization(table, statistic=name, ax=ax)
    figure.savefig(Path(out), dpi=110)


if __name__ == "__main__":
    main(*sys.argv[1:])
