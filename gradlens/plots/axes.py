"""What the pictures share: colours and dashes that grey print keeps apart, titles, and why a picture is empty."""

import textwrap
from typing import Any

import pandas as pd
from matplotlib.axes import Axes

from gradlens.words import plain

MALICIOUS, BENIGN, THRESHOLD = "#b8400a", "0.62", "0.1"
DASHES = ["-", (0, (5, 1.5)), (0, (1, 1)), (0, (6, 1.5, 1, 1.5)), (0, (3, 1, 1, 1, 1, 1))]
CLEAR, PARTLY = 0.9, 0.7  # the AUC from which a title says "separates", and "partly"
BELOW: dict[str, Any] = {
    "loc": "upper center", "bbox_to_anchor": (0.5, -0.16), "frameon": False, "fontsize": "small",
    "handlelength": 2.6, "columnspacing": 1.4,
}  # fmt: skip


def is_control(table: pd.DataFrame) -> pd.Series:
    """Which rows are of an attack-free control; none where the table does not tell."""
    return table["control"].astype(bool) if "control" in table else pd.Series(False, table.index)


def inside(ax: Axes) -> None:
    """Leaves the texts of cells, which cannot reach beyond the axes, out of the layout: it takes most of the time."""
    for each in ax.texts:
        each.set_in_layout(False)


def titled(ax: Axes, finding: str, *, pad: float | None = None) -> Axes:
    """The finding above the picture, broken to the width that the axes have before layout."""
    figure = ax.get_figure(root=True)
    inches = ax.get_position().width * (figure.get_size_inches()[0] if figure else 6.4)
    text = textwrap.fill(finding, max(30, int(inches * 13)), break_long_words=False)
    ax.set_title(text, loc="left", fontsize="medium", fontweight="bold", pad=pad, parse_math=False)
    return ax


def say_instead(ax: Axes, title: str, reason: str) -> Axes:
    """An empty picture that says why it is empty."""
    ax.set_axis_off()
    ax.text(0.5, 0.5, plain(reason, 120), ha="center", va="center", transform=ax.transAxes, wrap=True, parse_math=False)
    return titled(ax, title)
