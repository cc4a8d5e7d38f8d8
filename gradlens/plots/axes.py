"""What the plots share: colors and dashes that stay distinct in grayscale, titles, and the empty plot."""

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
    """Returns which rows belong to an attack-free control, bool [row]; none without a column `control`."""
    return table["control"].astype(bool) if "control" in table else pd.Series(False, table.index)


def inside(ax: Axes) -> None:
    """Excludes the texts inside an Axes, such as cell numbers, from the layout, which would spend most time on them."""
    for text in ax.texts:
        text.set_in_layout(False)


def titled(ax: Axes, finding: str, *, pad: float | None = None) -> Axes:
    """Writes the finding above the picture as its title, wrapped to the width that the Axes has before layout.

    Parameters
    ----------
    ax : matplotlib.axes.Axes
        Where the picture is drawn.
    finding : str
        The title, drawn as plain text.
    pad : float, optional
        Distance of the title from the picture, in points; None leaves matplotlib's own.

    Returns
    -------
    matplotlib.axes.Axes
        `ax` itself.
    """
    figure = ax.get_figure(root=True)
    inches = ax.get_position().width * (figure.get_size_inches()[0] if figure else 6.4)
    text = textwrap.fill(finding, max(30, int(inches * 13)), break_long_words=False)
    ax.set_title(text, loc="left", fontsize="medium", fontweight="bold", pad=pad, parse_math=False)
    return ax


def say_instead(ax: Axes, title: str, reason: str) -> Axes:
    """Leaves the Axes empty but for a title and the reason why there is nothing to draw.

    Parameters
    ----------
    ax : matplotlib.axes.Axes
        Where the picture would have been drawn.
    title : str
        Title of the picture.
    reason : str
        Why it is empty, cut to 120 characters.

    Returns
    -------
    matplotlib.axes.Axes
        `ax` itself.
    """
    ax.set_axis_off()
    ax.text(0.5, 0.5, plain(reason, 120), ha="center", va="center", transform=ax.transAxes, wrap=True, parse_math=False)
    return titled(ax, title)
