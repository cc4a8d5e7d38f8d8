"""Plots of localization: the AUC of every layer, and how it changes along an axis such as the learning rate."""

import re
from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from gradlens.errors import InputError
from gradlens.plots.axes import (
    BELOW,
    BLUE_TO_RED,
    CLEAR,
    COLORS,
    DASHES,
    PARTLY,
    heat_map,
    is_control,
    say_instead,
    titled,
)
from gradlens.words import conditions, plain

LOCALIZED = [  # columns of a localization table; all others are varied settings
    "layer", "statistic", "unit", "auc", "low", "high", "p", "seeds", "effect", "control_auc", "control_effect",
    "labels", "phase", "since", "control",
]  # fmt: skip


def plot_localization(table: pd.DataFrame, *, statistic: str | None = None, ax: Axes | None = None) -> Axes:
    """Draws the AUC of every layer under one statistic as a heat map, condition x layer, beside the control's.

    Parameters
    ----------
    table : pandas.DataFrame
        Rows of `localize` or `localize_sweep`; the columns `phase` and `control` split the picture into blocks, and
        varied settings name its rows. Only rows of whole layers (unit "") are drawn.
    statistic : str, optional
        Name of the statistic to draw; None takes the one with the highest AUC among attacked rows.
    ax : matplotlib.axes.Axes, optional
        Where to draw; None takes the current Axes.

    Returns
    -------
    matplotlib.axes.Axes
        The color scale always runs from 0 to 1 around 0.5; cells with p < 0.05 are outlined in black. The title names
        the layer that separates best. It is empty, with the reason, if the table has no row of the statistic.

    Examples
    --------
    >>> from matplotlib.figure import Figure
    >>> table = pd.DataFrame({"layer": ["fc1.weight", "fc2.bias"], "statistic": "layer_norms", "auc": [0.6, 0.95]})
    >>> plot_localization(table, ax=Figure().subplots()).get_title(loc="left")
    'layer_norms: fc2.bias separates best (AUC 0.95)'
    """
    ax = plt.gca() if ax is None else ax
    layers = table[table["unit"].fillna("").eq("")] if "unit" in table else table
    if statistic is None and len(layers):
        attacked = layers[~is_control(layers)]
        statistic = str((attacked if len(attacked) else layers).groupby("statistic")["auc"].max().idxmax())
    layers = layers[layers["statistic"].eq(str(statistic))]
    if layers.empty:
        return say_instead(ax, f"{plain(statistic)}: nothing was localized", "the table has no such row")
    varied = [column for column in layers.columns if column not in LOCALIZED]
    layers = layers.assign(
        condition=conditions(layers[varied].to_dict("records")),
        block=[_block(phase, control) for phase, control in zip(_phase(layers), is_control(layers), strict=True)],
    )
    _draw_localization(ax, layers)
    lines = max(block.count("\n") + 1 if block else 0 for block in layers["block"])
    return titled(ax, _localization_finding(layers, str(statistic)), pad=6 + 13 * lines)


def _phase(table: pd.DataFrame) -> pd.Series:
    """Returns the phase of each row, "" where the table has no such column."""
    return table["phase"].astype(str) if "phase" in table else pd.Series("", table.index)


def _block(phase: str, control: bool) -> str:
    """Names the block of columns that a row belongs to."""
    return f"{phase}\n{'attack-free control' if control else 'attacked'}".strip()


def _draw_localization(ax: Axes, table: pd.DataFrame) -> None:
    """Draws the cells with their numbers, a gap between blocks, and black outlines where p < 0.05."""
    rows, layers = (list(dict.fromkeys(table[column])) for column in ("condition", "layer"))
    phases = list(dict.fromkeys(_phase(table).tolist()))
    blocks: list[str] = [_block(phase, control) for phase in phases for control in (False, True)]
    blocks = [block for block in blocks if table["block"].eq(block).any()]
    width = len(layers)
    values = np.full((len(rows), len(blocks) * (width + 1) - 1), np.nan)
    significant = np.zeros(values.shape, bool)
    records: list[Any] = list(table.itertuples())
    for record in records:
        cell = rows.index(record.condition), blocks.index(record.block) * (width + 1) + layers.index(record.layer)
        values[cell] = record.auc
        significant[cell] = bool(getattr(record, "p", 1.0) < 0.05)  # False for NaN
    numbers = np.array([["" if np.isnan(v) else f"{v:.2f}" for v in row] for row in values])
    heat_map(
        ax, values, numbers, cmap=BLUE_TO_RED, vmin=0, vmax=1, linewidths=0.6, edgecolor="white",
        fonts={"fontsize": "x-small"}, bar={"label": "AUC", "shrink": 0.8, "fraction": 0.05, "pad": 0.02},
    )  # fmt: skip
    for row, column in np.argwhere(significant):
        ax.add_patch(Rectangle((column + 0.04, row + 0.04), 0.92, 0.92, fill=False, edgecolor="black", lw=1))
    ticks = [b * (width + 1) + i for b in range(len(blocks)) for i in range(width)]
    names = [plain(layer) for layer in layers] * len(blocks)
    ax.set_xticks(np.array(ticks) + 0.5, names, rotation=45, ha="right", rotation_mode="anchor", parse_math=False)
    ax.set_yticks(np.arange(len(rows)) + 0.5, rows, rotation=0, parse_math=False)
    ax.tick_params(length=0, labelsize="small")
    if blocks != [""]:
        for b, block in enumerate(blocks):
            ax.annotate(
                block, (b * (width + 1) + width / 2, 0), (0, 3), ha="center", va="bottom", fontsize="small",
                textcoords="offset points", annotation_clip=False, parse_math=False,
            )  # fmt: skip
    ax.set_ylabel("condition" if rows != ["all runs"] else "")
    ax.set_xlabel("layer" + (" (outlined: p < 0.05)" if significant.any() else ""))


def _localization_finding(table: pd.DataFrame, statistic: str) -> str:
    """Says which layer separates best, and the highest AUC of the control."""
    attacked, control = table[~is_control(table)], table[is_control(table)]
    if attacked.empty or attacked["auc"].isna().all():
        return f"{plain(statistic)}: no attacked condition to show"
    best = attacked.sort_values("auc", ascending=False).iloc[0]
    beside = f", control at most {control['auc'].max():.2f}" if control["auc"].notna().any() else ""
    if best["auc"] >= PARTLY:
        verb = "separates best" if best["auc"] >= CLEAR else "separates best, in part"
        return f"{plain(statistic)}: {plain(best['layer'])} {verb} (AUC {best['auc']:.2f}{beside})"
    return f"{plain(statistic)}: no layer separates (best AUC {best['auc']:.2f}{beside})"


AXES = {
    "learning_rate": "learning rate",
    "poison_rate": "poison rate [share of an attacker's eligible samples]",
    "num_malicious": "malicious clients",
    "num_clients": "clients",
    "partition": "partition",
    "since": "rounds since the attack began",
}
KINDS = {  # measure -> its column, the control's column, axis label, value of no difference, name of that value
    "auc": ("auc", "control_auc", "AUC of poisoned against benign updates", 0.5, "chance"),
    "effect": ("effect", "control_effect", "effect [robust sigmas]", 0.0, "no difference"),
}
BESIDE = {"auc": "control: the same clients, no attack", "effect": "control: the farthest benign client"}
MARKERS = "osD^v"
MOST_PLACES = 4  # most lines that can be told apart without color
CHANGE = 0.1  # smallest change of an AUC that the title calls a rise or a fall

Place = tuple[str, str]  # layer, statistic


def plot_localization_along(
    table: pd.DataFrame,
    axis: str,
    *,
    places: Sequence[Place] | None = None,
    measure: str = "auc",
    ax: Axes | None = None,
) -> Axes:
    """Draws how well layers separate along one axis of a sweep: a line per layer and statistic, the control's in gray.

    Parameters
    ----------
    table : pandas.DataFrame
        Rows of `localize_sweep` or `localize_rounds` in which only `axis` varies. Rows of controls and of single units
        are not drawn; the control's lines come from the columns control_auc and control_effect.
    axis : str
        Column of the table on the horizontal axis. Numbers are sorted, on a logarithmic scale if all are positive and
        the largest is at least four times the smallest (but not for "since"); names keep the order of the table.
    places : sequence of (str, str), optional
        Pairs (layer, statistic) to draw; the title describes the first. None takes the four with the highest AUC.
    measure : str
        "auc", with its 95 % interval as error bars, or "effect", in robust sigmas.
    ax : matplotlib.axes.Axes, optional
        Where to draw; None takes the current Axes.

    Returns
    -------
    matplotlib.axes.Axes
        It is empty, with the reason, if the table has no row to draw.

    Raises
    ------
    InputError
        If the axis or the measure is unknown, or a pair has several rows at one value of the axis.

    Examples
    --------
    >>> from matplotlib.figure import Figure
    >>> table = pd.DataFrame({"learning_rate": [0.01, 0.1], "auc": [0.6, 0.9], "control_auc": [0.5, 0.52]})
    >>> table = table.assign(layer="fc2.bias", statistic="layer_norms", unit="", low=[0.5, 0.85], high=[0.7, 0.95])
    >>> ax = plot_localization_along(table, "learning_rate", ax=Figure().subplots())
    >>> print(ax.get_title(loc="left").replace(chr(10), " "))
    layer_norms in fc2.bias rises with learning rate: AUC 0.60 at 0.01, 0.90 at 0.1 (control at most 0.52)
    """
    ax = plt.gca() if ax is None else ax
    if axis not in table:
        raise InputError(f"axis: expected a column of the table ({', '.join(map(str, table))}), found {axis!r}")
    if measure not in KINDS:
        raise InputError(f"measure: expected one of {', '.join(KINDS)}, found {measure!r}")
    layers = table[table["unit"].fillna("").eq("") & ~is_control(table)]
    lines = _lines(layers, axis, places)
    if not lines:
        return say_instead(ax, f"Nothing was localized along {plain(axis)}", "the table has no such row")
    value, control, label, baseline, baseline_label = KINDS[measure]
    positions = _along(ax, layers[axis].drop_duplicates().tolist(), axis)
    for number, (place, line) in enumerate(lines.items()):
        _draw_line(ax, line, [positions[v] for v in line[axis]], number, len(lines), place, value, control)
    ax.axhline(baseline, color="0.3", linewidth=0.8, linestyle=":", zorder=1, label=baseline_label)
    gray: dict[str, Any] = {
        "color": "0.6",
        "linewidth": 0.9,
        "marker": "o",
        "markersize": 4,
        "markerfacecolor": "white",
    }
    if any(line[control].notna().any() for line in lines.values()):
        ax.plot([], [], label=BESIDE[measure], **gray)
    if measure == "auc":
        ax.set_ylim(min(0.3, ax.get_ylim()[0]), 1.03)
    ax.spines[["top", "right"]].set_visible(False)
    ax.set(xlabel=AXES.get(axis, plain(axis)), ylabel=label)
    handles, labels = ax.get_legend_handles_labels()
    order = sorted(range(len(labels)), key=lambda i: labels[i] in (baseline_label, BESIDE[measure]))  # layers first
    legend = ax.legend([handles[i] for i in order], [labels[i] for i in order], **BELOW, ncols=2)
    for text in legend.get_texts():
        text.set_parse_math(False)
    return titled(ax, _along_finding(lines, axis, measure))


def _lines(table: pd.DataFrame, axis: str, places: Sequence[Place] | None) -> dict[Place, pd.DataFrame]:
    """Returns the rows of each pair of layer and statistic, in the order of the axis."""
    order = {value: i for i, value in enumerate(_ordered(table[axis].drop_duplicates().tolist()))}
    by_place = {(str(k[0]), str(k[1])): part for k, part in table.groupby(["layer", "statistic"], sort=False)}
    if places is None:
        best = sorted(by_place, key=lambda place: -float(by_place[place]["auc"].max()))
        places = best[:MOST_PLACES]
    lines = {}
    for place in places:
        if place not in by_place:
            continue
        part = by_place[place]
        if (repeated := part[axis].duplicated()).any():
            raise InputError(
                f"{_named(place)} has several rows at {axis} {part.loc[repeated, axis].iloc[0]}; "
                "choose the rows of one condition, phase and labels first"
            )
        lines[place] = part.sort_values(axis, key=lambda column: column.map(order))
    return lines


def _ordered(values: Sequence[Any]) -> list[Any]:
    """Sorts numbers; names keep their order."""
    return sorted(values) if all(_is_number(value) for value in values) else list(values)


def _is_number(value: Any) -> bool:
    """Whether a value of the axis is a number; a bool is not."""
    return isinstance(value, int | float | np.number) and not isinstance(value, bool)


def _along(ax: Axes, values: Sequence[Any], axis: str) -> dict[Any, float]:
    """Sets the scale and ticks of the horizontal axis, and returns the position of each value on it."""
    values = _ordered(values)
    if not all(_is_number(value) for value in values):
        ax.set_xticks(range(len(values)), [_in_words(value) for value in values], parse_math=False)
        ax.set_xlim(-0.4, len(values) - 0.6)
        return {value: float(i) for i, value in enumerate(values)}
    if axis == "since":
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        return {value: float(value) for value in values}
    if min(values) > 0 and max(values) >= 4 * min(values):
        ax.set_xscale("log")
    ax.set_xticks(values, [f"{value:g}" for value in values])
    ax.set_xticks([], minor=True)
    return {value: float(value) for value in values}


def _in_words(value: Any) -> str:
    """Shortens the name of a component: "dirichlet(alpha=0.5)" -> "dirichlet 0.5"."""
    return plain(re.sub(r"\((?:\w+=)?([^(),]*)\)", r" \1", str(value)), 40)


def _draw_line(
    ax: Axes, line: pd.DataFrame, x: Sequence[float], number: int, of: int, place: Place, value: str, control: str
) -> None:
    """Draws line `number` of `of`, with error bars for an AUC, and its control's thin gray line."""
    style: dict[str, Any] = {"linestyle": DASHES[number % len(DASHES)], "marker": MARKERS[number % len(MARKERS)]}
    x = _moved(ax, x, number - (of - 1) / 2)  # so that error bars do not overlap
    ax.plot(x, line[control], color="0.6", linewidth=0.9, markersize=4, markerfacecolor="white", zorder=2, **style)
    y = line[value].to_numpy(np.float64)
    bars = np.zeros((2, len(y)))
    if value == "auc":
        bars = np.abs(np.nan_to_num(np.stack([y - line["low"], line["high"] - y]).astype(np.float64)))
    color = COLORS[number % len(COLORS)]
    ax.errorbar(
        x, y, yerr=bars if bars.any() else None, color=color, linewidth=1.8, markersize=5, elinewidth=1, capsize=2,
        zorder=3, label=_named(place), **style,
    )  # fmt: skip


def _moved(ax: Axes, x: Sequence[float], by: float) -> list[float]:
    """Shifts positions by `by` times 5 % of their mean spacing."""
    if len(x) < 2:
        return list(x)
    if ax.get_xscale() == "log":
        step = (x[-1] / x[0]) ** (1 / (len(x) - 1))
        return [position * step ** (0.05 * by) for position in x]
    return [position + 0.05 * by * (x[-1] - x[0]) / (len(x) - 1) for position in x]


def _along_finding(lines: dict[Place, pd.DataFrame], axis: str, measure: str) -> str:
    """Says how the first line changes along the axis, which line is highest at its end, and the control's maximum."""
    value, control, *_ = KINDS[measure]
    first, line = next(iter(lines.items()))
    y = line[value].to_numpy(np.float64)
    if not np.isfinite(y).any():
        return f"{_named(first)}: {measure} not known"
    names = [_in_words(position) if isinstance(position, str) else f"{position:g}" for position in line[axis]]
    threshold = CHANGE if measure == "auc" else max(CHANGE * float(np.nanmax(np.abs(y))), 0.5)
    change, figures = y[-1] - y[0], f"{y[0]:.2f} at {names[0]}, {y[-1]:.2f} at {names[-1]}"
    along = AXES.get(axis, plain(axis)).partition(" [")[0]
    if abs(change) >= threshold:
        verb = "rises" if change > 0 else "falls"
    elif np.nanmax(y) - np.nanmin(y) >= threshold:
        verb, figures = "changes", f"{np.nanmin(y):.2f} to {np.nanmax(y):.2f}"
    else:
        verb, figures = "stays", f"{np.nanmin(y):.2f} to {np.nanmax(y):.2f}"
    remarks = []
    at_end = {
        place: float(part[value].iloc[-1])
        for place, part in lines.items()
        if part[axis].iloc[-1] == line[axis].iloc[-1]
    }
    best = max(at_end, key=lambda place: np.nan_to_num(at_end[place], nan=-np.inf))
    if at_end[best] - y[-1] >= threshold:
        remarks.append(f"there {_named(best)} {at_end[best]:.2f}")
    controls = np.concatenate([part[control].to_numpy(np.float64) for part in lines.values()])
    if np.isfinite(controls).any():
        remarks.append(f"control at most {np.nanmax(controls):.2f}")
    what = "AUC" if measure == "auc" else "effect"
    along = f"over the {along}" if axis == "since" else f"with {along}"
    return f"{_named(first)} {verb} {along}: {what} {figures}" + (f" ({', '.join(remarks)})" if remarks else "")


def _named(place: Place) -> str:
    """Names a pair of layer and statistic, "layer_norms in fc2.bias"."""
    return f"{plain(place[1])} in {plain(place[0])}"
