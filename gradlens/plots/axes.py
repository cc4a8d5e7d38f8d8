"""What the plots share: colors and dashes that stay distinct in grayscale, titles, and the empty plot."""

import textwrap
from collections.abc import Iterable, Mapping
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.lines import Line2D

from gradlens.words import plain

MALICIOUS, BENIGN, THRESHOLD = "#b8400a", "0.62", "0.1"
DASHES = ["-", (0, (5, 1.5)), (0, (1, 1)), (0, (6, 1.5, 1, 1.5)), (0, (3, 1, 1, 1, 1, 1))]
# seaborn's palettes "colorblind" and "vlag", the latter at 32 places: importing seaborn would take half a second
COLORS = ["#0173b2", "#de8f05", "#029e73", "#d55e00", "#cc78bc", "#ca9161", "#fbafe4", "#949494", "#ece133", "#56b4e9"]
VLAG = (
    "2369bd3972bc4a7bbc5983bd698cbe7695c1839dc490a6c79fb0ccabb9d0b8c3d5c5cddbd4d8e2e1e2e9eeedf0f8f4f5"
    "faf3f2f6e8e7f0dbdaeacfcde4c0bedfb4b2daa8a5d59c99cf8e8bca827fc57674c06a68ba5d5cb55151af4446a9373b"
)
BLUE_TO_RED = LinearSegmentedColormap.from_list("vlag", [f"#{color}" for color in textwrap.wrap(VLAG, 6)])
CLEAR, PARTLY = 0.9, 0.7  # the AUC from which a title says "separates", and "partly"
BELOW: dict[str, Any] = {
    "loc": "upper center", "bbox_to_anchor": (0.5, -0.16), "frameon": False, "fontsize": "small",
    "handlelength": 2.6, "columnspacing": 1.4,
}  # fmt: skip


NAMES: WeakKeyDictionary[Line2D, tuple[str, ...]] = WeakKeyDictionary()  # of the points of lines that were drawn


def name_points(line: Line2D, names: Iterable[str]) -> None:
    """Names the points of a line, for a page that shows the name of a point under the pointer.

    Parameters
    ----------
    line : matplotlib.lines.Line2D
    names : iterable of str
        One per point.

    Examples
    --------
    >>> from matplotlib.figure import Figure
    >>> [line] = Figure().subplots().plot([1, 2], [3, 4])
    >>> name_points(line, ["client-1, round 1", "client-1, round 2"])
    >>> names_of_points(line)[0]
    'client-1, round 1'
    """
    NAMES[line] = tuple(names)


def names_of_points(line: Line2D) -> tuple[str, ...]:
    """The names that `name_points` gave; none without it.

    Parameters
    ----------
    line : matplotlib.lines.Line2D
    """
    return NAMES.get(line, ())


def is_control(table: pd.DataFrame) -> pd.Series:
    """Returns which rows belong to an attack-free control, bool [row]; none without a column `control`."""
    return table["control"].astype(bool) if "control" in table else pd.Series(False, table.index)


def heat_map(
    ax: Axes,
    values: np.ndarray,
    words: np.ndarray,
    *,
    bar: Mapping[str, Any] | None = None,
    fonts: Mapping[str, Any],
    **cells: Any,
) -> None:
    """Draws a table of numbers as colored cells with a word in each, its first row on top.

    Parameters
    ----------
    ax : matplotlib.axes.Axes
        Where to draw; it is left without ticks.
    values : numpy.ndarray
        float64 [row, column]; a cell of NaN stays empty.
    words : numpy.ndarray
        str [row, column], written black or white, whichever is legible on the cell.
    bar : Mapping, optional
        Settings of the color bar; None draws none.
    fonts : Mapping
        Settings of the words.
    **cells
        Settings of the cells, as for `Axes.pcolormesh`: cmap, vmin, vmax, linewidths, edgecolor.
    """
    mesh = ax.pcolormesh(np.ma.masked_where(np.isnan(values), values), **cells)
    ax.set(xlim=(0, values.shape[1]), ylim=(values.shape[0], 0), xticks=[], yticks=[])
    ax.spines[:].set_visible(False)
    if bar is not None:
        ax.figure.colorbar(mesh, ax=ax, **bar).outline.set_linewidth(0)
    light = _luminance(mesh.to_rgba(values)[..., :3]) > 0.408
    for row, column in np.argwhere((words != "") & ~np.isnan(values)):
        ax.text(  # left out of the layout, which would spend most of its time on words that no cell lets out
            column + 0.5, row + 0.5, str(words[row, column]), ha="center", va="center", in_layout=False,
            color="0.15" if light[row, column] else "white", **fonts,
        )  # fmt: skip


def _luminance(colors: np.ndarray) -> np.ndarray:
    """The relative luminance of colors [..., red green blue], as WCAG 2 defines it."""
    linear = np.where(colors <= 0.03928, colors / 12.92, ((colors + 0.055) / 1.055) ** 2.4)
    return linear @ [0.2126, 0.7152, 0.0722]


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
