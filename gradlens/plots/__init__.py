"""Plots: each function takes a tidy table or a log, draws one picture on an Axes and returns the Axes.

Every title states the finding, computed from the data that is drawn. The palette is safe for color-blind readers,
and no difference rests on color alone: lines also differ in width or dashes, and cells carry numbers or signs. Names
that came from clients are drawn as plain text, never as formulas.
"""

from gradlens.plots.axes import CLEAR, PARTLY
from gradlens.plots.clients import MOST_CLIENTS, clients_by_bias, label_counts, plot_final_bias, plot_weights
from gradlens.plots.localization import plot_localization, plot_localization_along
from gradlens.plots.scores import plot_roc, plot_scores, plot_training
from gradlens.words import conditions, count, percent, phrase, plain, with_interval

__all__ = [
    "CLEAR",
    "MOST_CLIENTS",
    "PARTLY",
    "clients_by_bias",
    "conditions",
    "count",
    "label_counts",
    "percent",
    "phrase",
    "plain",
    "plot_final_bias",
    "plot_localization",
    "plot_localization_along",
    "plot_roc",
    "plot_scores",
    "plot_training",
    "plot_weights",
    "with_interval",
]
