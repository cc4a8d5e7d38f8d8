"""Pictures of where poisoned updates differ: layer by layer, and along an axis such as the learning rate."""

import re
from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from gradlens.errors import InputError
from gradlens.plots.axes import BELOW, CLEAR, DASHES, PARTLY, inside, is_control, say_instead, titled
from gradlens.words import conditions, plain

LOCALIZED = [
    "layer",
    "statistic",
    "unit",
    "auc",
    "low",
    "high",
    "p",
    "seeds",
    "effect",
    "control_auc",
    "control_effect",
]
LOCALIZED += ["labels", "phase", "since", "control"]


def plot_localization(table: pd.DataFrame, *, statistic: str | None = None, ax: Axes | None = None) -> Axes:
    """Heat map condition x layer of the AUC with which one statistic separates, the control's columns beside.

    table: what `localize` gives, with any columns of varied settings, `phase` and `control`; whole layers only
    are drawn. statistic: the one to draw; the one that separates best unless named. The colours run from 0 to 1
    around 0.5, always; a cell outlined in black has p < 0.05.
    """
    ax = plt.gca() if ax is None else ax
    whole = table[table["unit"].fillna("").eq("")] if "unit" in table else table
    if statistic is None and len(whole):
        attacked = whole[~is_control(whole)]
        statistic = str((attacked if len(attacked) else whole).groupby("statistic")["auc"].max().idxmax())
    whole = whole[whole["statistic"].eq(str(statistic))]
    if whole.empty:
        return say_instead(ax, f"{plain(statistic)}: nothing was localised", "the table has no such row")
    varied = [c for c in whole.columns if c not in LOCALIZED]
    whole = whole.assign(
        condition=conditions(whole[varied].to_dict("records")),
        block=[_block(phase, control) for phase, control in zip(_phase(whole), is_control(whole), strict=True)],
    )
    _draw_localization(ax, whole)
    lines = max(block.count("\n") + 1 if block else 0 for block in whole["block"])
    return titled(ax, _localization_finding(whole, str(statistic)), pad=6 + 13 * lines)


def _phase(table: pd.DataFrame) -> pd.Series:
    return table["phase"].astype(str) if "phase" in table else pd.Series("", table.index)


def _block(phase: str, control: bool) -> str:
    return f"{phase}\n{'attack-free control' if control else 'attacked'}".strip()


def _draw_localization(ax: Axes, whole: pd.DataFrame) -> None:
    """The cells, block by block with a gap between, each with its number; black outlines where p < 0.05."""
    rows, layers = (list(dict.fromkeys(whole[c])) for c in ("condition", "layer"))
    phases = list(dict.fromkeys(_phase(whole).tolist()))
    blocks: list[str] = [_block(phase, control) for phase in phases for control in (False, True)]
    blocks = [block for block in blocks if whole["block"].eq(block).any()]
    width = len(layers)
    values = np.full((len(rows), len(blocks) * (width + 1) - 1), np.nan)
    small = np.zeros(values.shape, bool)
    places: list[Any] = list(whole.itertuples())
    for each in places:
        cell = rows.index(each.condition), blocks.index(each.block) * (width + 1) + layers.index(each.layer)
        values[cell] = each.auc
        small[cell] = bool(getattr(each, "p", 1.0) < 0.05)  # NaN is not smaller
    numbers = np.array([["" if np.isnan(v) else f"{v:.2f}" for v in row] for row in values])
    sns.heatmap(
        values, mask=np.isnan(values), annot=numbers, fmt="", cmap="vlag", vmin=0, vmax=1,
        linewidths=0.6, linecolor="white", ax=ax, xticklabels=False, yticklabels=False,
        annot_kws={"fontsize": "x-small"}, cbar_kws={"label": "AUC", "shrink": 0.8, "fraction": 0.05, "pad": 0.02},
    )  # fmt: skip
    inside(ax)
    for row, column in np.argwhere(small):
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
    ax.set_xlabel("layer" + (" (outlined: p < 0.05)" if small.any() else ""))


def _localization_finding(whole: pd.DataFrame, statistic: str) -> str:
    attacked, control = whole[~is_control(whole)], whole[is_control(whole)]
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
KINDS = {  # what is drawn, and what of the control; the label of the ordinate, where nothing is found, what lies there
    "auc": ("auc", "control_auc", "AUC of poisoned against benign updates", 0.5, "chance"),
    "effect": ("effect", "control_effect", "effect [robust sigmas]", 0.0, "no difference"),
}
BESIDE = {"auc": "control: the same clients, no attack", "effect": "control: the farthest benign client"}
MARKERS = "osD^v"
MOST_PLACES = 4  # lines that can be told apart without colour
CHANGE = 0.1  # of an AUC, from which a title says that it rises or falls

Place = tuple[str, str]  # layer, statistic


def plot_localization_along(
    table: pd.DataFrame,
    axis: str,
    *,
    places: Sequence[Place] | None = None,
    measure: str = "auc",
    ax: Axes | None = None,
) -> Axes:
    """How well layers separate along one axis of a sweep: a line per layer and statistic, its control's thin in grey.

    table: rows of `localize_sweep` or `localize_rounds` in which nothing but `axis` varies: a numeric setting, drawn
    to a logarithmic scale where its values reach over a factor of four, "since", or names such as partitions, in the
    order of the table. Bars: the 95 % intervals. The control is taken from the columns control_auc, control_effect.
    places: (layer, statistic), the title speaks of the first; None: the four of the highest AUC anywhere.
    measure: "auc", or "effect", in robust sigmas, without intervals.
    Raises: InputError if a place has several rows at one value of the axis, or the axis or measure is unknown.
    """
    ax = plt.gca() if ax is None else ax
    if axis not in table:
        raise InputError(f"axis: expected a column of the table ({', '.join(map(str, table))}), found {axis!r}")
    if measure not in KINDS:
        raise InputError(f"measure: expected one of {', '.join(KINDS)}, found {measure!r}")
    whole = table[table["unit"].fillna("").eq("") & ~is_control(table)]
    lines = _lines(whole, axis, places)
    if not lines:
        return say_instead(ax, f"Nothing was localised along {plain(axis)}", "the table has no such row")
    value, control, label, nothing, there = KINDS[measure]
    positions = _along(ax, whole[axis].drop_duplicates().tolist(), axis)
    for number, (place, line) in enumerate(lines.items()):
        _draw_line(ax, line, [positions[v] for v in line[axis]], number, len(lines), place, value, control)
    ax.axhline(nothing, color="0.3", linewidth=0.8, linestyle=":", zorder=1, label=there)
    grey: dict[str, Any] = {
        "color": "0.6",
        "linewidth": 0.9,
        "marker": "o",
        "markersize": 4,
        "markerfacecolor": "white",
    }
    if any(line[control].notna().any() for line in lines.values()):
        ax.plot([], [], label=BESIDE[measure], **grey)
    if measure == "auc":
        ax.set_ylim(min(0.3, ax.get_ylim()[0]), 1.03)
    ax.spines[["top", "right"]].set_visible(False)
    ax.set(xlabel=AXES.get(axis, plain(axis)), ylabel=label)
    handles, labels = ax.get_legend_handles_labels()
    order = sorted(range(len(labels)), key=lambda i: labels[i] in (there, BESIDE[measure]))  # the places first
    legend = ax.legend([handles[i] for i in order], [labels[i] for i in order], **BELOW, ncols=2)
    for text in legend.get_texts():
        text.set_parse_math(False)
    return titled(ax, _along_finding(lines, axis, measure))


def _lines(whole: pd.DataFrame, axis: str, places: Sequence[Place] | None) -> dict[Place, pd.DataFrame]:
    """The rows of each place along the axis, in its order."""
    order = {value: i for i, value in enumerate(_ordered(whole[axis].drop_duplicates().tolist()))}
    by_place = {(str(k[0]), str(k[1])): part for k, part in whole.groupby(["layer", "statistic"], sort=False)}
    if places is None:
        best = sorted(by_place, key=lambda place: -float(by_place[place]["auc"].max()))
        places = best[:MOST_PLACES]
    lines = {}
    for place in places:
        if place not in by_place:
            continue
        part = by_place[place]
        if (twice := part[axis].duplicated()).any():
            raise InputError(
                f"{_named(place)} has several rows at {axis} {part.loc[twice, axis].iloc[0]}; "
                "choose the rows of one condition, phase and labels first"
            )
        lines[place] = part.sort_values(axis, key=lambda column: column.map(order))
    return lines


def _ordered(values: Sequence[Any]) -> list[Any]:
    return sorted(values) if all(_is_number(value) for value in values) else list(values)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.number) and not isinstance(value, bool)


def _along(ax: Axes, values: Sequence[Any], axis: str) -> dict[Any, float]:
    """Where each value of the axis lies, on axes that are scaled and marked for it."""
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
    """ "dirichlet(alpha=0.5)" -> "dirichlet 0.5"."""
    return plain(re.sub(r"\((?:\w+=)?([^(),]*)\)", r" \1", str(value)), 40)


def _draw_line(
    ax: Axes, line: pd.DataFrame, x: Sequence[float], number: int, of: int, place: Place, value: str, control: str
) -> None:
    style: dict[str, Any] = {"linestyle": DASHES[number % len(DASHES)], "marker": MARKERS[number % len(MARKERS)]}
    x = _moved(ax, x, number - (of - 1) / 2)  # so that bars do not hide one another
    ax.plot(x, line[control], color="0.6", linewidth=0.9, markersize=4, markerfacecolor="white", zorder=2, **style)
    y = line[value].to_numpy(np.float64)
    bars = np.zeros((2, len(y)))
    if value == "auc":
        bars = np.abs(np.nan_to_num(np.stack([y - line["low"], line["high"] - y]).astype(np.float64)))
    colour = sns.color_palette("colorblind")[number % 10]
    ax.errorbar(
        x, y, yerr=bars if bars.any() else None, color=colour, linewidth=1.8, markersize=5, elinewidth=1, capsize=2,
        zorder=3, label=_named(place), **style,
    )  # fmt: skip


def _moved(ax: Axes, x: Sequence[float], by: float) -> list[float]:
    """The positions, moved by so many hundredths of their distance from one another."""
    if len(x) < 2:
        return list(x)
    if ax.get_xscale() == "log":
        step = (x[-1] / x[0]) ** (1 / (len(x) - 1))
        return [each * step ** (0.05 * by) for each in x]
    return [each + 0.05 * by * (x[-1] - x[0]) / (len(x) - 1) for each in x]


def _along_finding(lines: dict[Place, pd.DataFrame], axis: str, measure: str) -> str:
    """How the first place changes along the axis, who does best where it ends, and the control's highest."""
    value, control, *_ = KINDS[measure]
    first, line = next(iter(lines.items()))
    y = line[value].to_numpy(np.float64)
    if not np.isfinite(y).any():
        return f"{_named(first)}: {measure} not known"
    at = [_in_words(each) if isinstance(each, str) else f"{each:g}" for each in line[axis]]
    small = CHANGE if measure == "auc" else max(CHANGE * float(np.nanmax(np.abs(y))), 0.5)
    change, ends = y[-1] - y[0], f"{y[0]:.2f} at {at[0]}, {y[-1]:.2f} at {at[-1]}"
    along = AXES.get(axis, plain(axis)).partition(" [")[0]
    if abs(change) >= small:
        verb = "rises" if change > 0 else "falls"
    elif np.nanmax(y) - np.nanmin(y) >= small:
        verb, ends = "changes", f"{np.nanmin(y):.2f} to {np.nanmax(y):.2f}"
    else:
        verb, ends = "stays", f"{np.nanmin(y):.2f} to {np.nanmax(y):.2f}"
    beside = []
    there = {
        place: float(part[value].iloc[-1])
        for place, part in lines.items()
        if part[axis].iloc[-1] == line[axis].iloc[-1]
    }
    best = max(there, key=lambda place: np.nan_to_num(there[place], nan=-np.inf))
    if there[best] - y[-1] >= small:
        beside.append(f"there {_named(best)} {there[best]:.2f}")
    controls = np.concatenate([part[control].to_numpy(np.float64) for part in lines.values()])
    if np.isfinite(controls).any():
        beside.append(f"control at most {np.nanmax(controls):.2f}")
    what = "AUC" if measure == "auc" else "effect"
    along = f"over the {along}" if axis == "since" else f"with {along}"
    return f"{_named(first)} {verb} {along}: {what} {ends}" + (f" ({', '.join(beside)})" if beside else "")


def _named(place: Place) -> str:
    return f"{plain(place[1])} in {plain(place[0])}"
