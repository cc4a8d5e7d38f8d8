"""Pictures of a round's clients: their final-bias updates, and the labels that they hold."""

from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from gradlens.errors import CannotSay
from gradlens.evaluation import auc
from gradlens.log import UpdateLog
from gradlens.plots.axes import CLEAR, PARTLY, inside, say_instead, titled
from gradlens.scorers import robust_zscore
from gradlens.statistics import final_bias
from gradlens.words import count, percent, plain

MOST_CLIENTS = 40  # rows of a heat map that can still be read in print
MOST_LABELS, MOST_NUMBERS = 40, 20  # columns of a heat map of counts, and those up to which it has numbers


def plot_final_bias(
    log: UpdateLog | Any,
    truth: pd.DataFrame | None = None,
    *,
    scale: float | None = None,
    order: Sequence[str] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Heat map client x class of the centred final-bias update of the last round, malicious clients marked on top.

    log: an UpdateLog (`log[:k]` for round k's picture) or a Run; truth: columns round, client, poisoned.
    scale: the value of full colour, in logits, to share with a picture beside it; order: clients from the top, any
    others below; None: malicious ones first, then the most unusual.
    """
    ax = plt.gca() if ax is None else ax
    log = getattr(log, "log", log)
    index = log[-1].index
    try:
        table = final_bias(log)
    except CannotSay as reason:
        return say_instead(ax, f"Round {index}: no final-bias picture", str(reason))
    deviation = pd.Series(robust_zscore(table), table.index)
    poisoned = _poisoned(truth, index)
    rows = [client for client in order or [] if client in table.index]
    rows += [client for client in clients_by_bias(log, truth) if client not in set(rows)]
    shown = table.loc[rows[:MOST_CLIENTS]]
    largest = float(np.nanmax(np.abs(shown.to_numpy()), initial=0.0)) or 1.0
    scale = largest if scale is None else scale
    _draw_bias(ax, shown, poisoned, scale, extend="both" if largest > scale * 1.0001 else "neither")
    several = f" ({len(shown)} of {len(table)} shown)" if len(shown) < len(table) else ""
    ax.set_ylabel(f"client{several}")
    ax.set_xlabel("class")
    return titled(ax, _bias_finding(index, table, deviation, poisoned))


def clients_by_bias(log: UpdateLog, truth: pd.DataFrame | None = None) -> list[str]:
    """The clients of the last round, malicious ones first, then by how unusual their final bias is; [] if unknown."""
    try:
        table = final_bias(log)
    except CannotSay:
        return []
    benign = ~table.index.isin(_poisoned(truth, log[-1].index))
    return [str(client) for client in table.index[np.lexsort((-robust_zscore(table), benign))]]


def _draw_bias(ax: Axes, shown: pd.DataFrame, poisoned: set[str], scale: float, extend: str) -> None:
    values = shown.to_numpy(np.float64)
    signs = np.where(values >= scale / 2, "+", np.where(values <= -scale / 2, "\N{MINUS SIGN}", ""))
    sns.heatmap(
        values, mask=np.isnan(values), annot=signs, fmt="", cmap="vlag", vmin=-scale, vmax=scale,
        linewidths=0.4, linecolor="white", ax=ax, xticklabels=False, yticklabels=False,
        annot_kws={"fontsize": "small", "fontweight": "bold"},
        cbar_kws={"label": "bias update minus cohort median [logits]", "extend": extend, "shrink": 0.8},
    )  # fmt: skip
    inside(ax)
    for row in np.flatnonzero(np.isnan(values).all(axis=1)).tolist():
        ax.add_patch(Rectangle((0, row), values.shape[1], 1, facecolor="0.9", edgecolor="0.6", hatch="///", lw=0))
        box = {"facecolor": "white", "linewidth": 0, "pad": 1.5}
        ax.text(
            values.shape[1] / 2, row + 0.5, "not comparable", ha="center", va="center", fontsize="x-small", bbox=box
        )
    classes = [str(column).rpartition("[")[2].rstrip("]") for column in shown.columns]
    step = max(1, len(classes) // 20)
    ax.set_xticks(np.arange(len(classes))[::step] + 0.5, [plain(c) for c in classes[::step]], parse_math=False)
    names = [
        f"malicious \N{BLACK RIGHT-POINTING POINTER} {plain(c)}" if c in poisoned else plain(c) for c in shown.index
    ]
    ax.set_yticks(np.arange(len(names)) + 0.5, names, rotation=0, fontsize="small", parse_math=False)
    for label, client in zip(ax.get_yticklabels(), shown.index, strict=True):
        label.set_fontweight("bold" if client in poisoned else "normal")
    on_top = sum(client in poisoned for client in shown.index)
    if 0 < on_top < len(shown) and poisoned.issuperset(shown.index[:on_top]):
        ax.axhline(on_top, color="black", linewidth=1.2)


def _bias_finding(index: int, table: pd.DataFrame, deviation: pd.Series, poisoned: set[str]) -> str:
    """What the picture shows: whether the malicious clients deviate most, or who does."""
    marked = deviation.index.isin(poisoned)
    if marked.any() and not marked.all():
        value = auc(deviation.to_numpy(), marked)
        who = f"the {marked.sum()} malicious clients" if marked.sum() > 1 else "the malicious client"
        verb = "" if marked.sum() > 1 else "s"
        if value >= CLEAR:
            return f"Round {index}: {who} stand{verb} out (AUC {value:.2f})"
        if value >= PARTLY:
            return f"Round {index}: {who} stand{verb} out in part (AUC {value:.2f})"
        return f"Round {index}: {who} do{'es' if verb else ''} not stand out (AUC {value:.2f})"
    if not np.isfinite(deviation).any():
        return f"Round {index}: no client is comparable"
    first = int(np.argmax(deviation.to_numpy()))
    if beyond := int(np.isinf(deviation).sum()):
        return f"Round {index}: {count(beyond, 'client')} sent an update beyond comparison"
    column = table.columns[int(np.argmax(np.abs(table.to_numpy()[first])))]
    where = str(column).rpartition("[")[2].rstrip("]")
    name = plain(table.index[first])
    return f"Round {index}: {name} deviates most, class {plain(where)}, {deviation.iloc[first]:.1f} robust sigmas"


def _poisoned(truth: pd.DataFrame | None, index: int) -> set[str]:
    if truth is None:
        return set()
    now = truth[(truth["round"] == index) & truth["poisoned"].astype(bool)]
    return set(now["client"].astype(str))


def plot_weights(verdicts: pd.DataFrame, truth: pd.DataFrame | None = None, *, ax: Axes | None = None) -> Axes:
    """Heat map client x round of what each update counted where a filter ran, the darker the less.

    verdicts: columns round, client, weight (1: as it came, 0: left out), as of a Run; truth: columns round, client,
    poisoned. Clients that always counted in full are not drawn; the one that counted least is on top.
    """
    ax = plt.gca() if ax is None else ax
    whole = verdicts.pivot_table(index="client", columns="round", values="weight", aggfunc="min")
    part = whole[whole.lt(1).any(axis=1)]
    out, less = int(whole.eq(0).sum().sum()), int((whole.gt(0) & whole.lt(1)).sum().sum())
    finding = f"{out} of {count(int(whole.notna().sum().sum()), 'update')} left out, {less} counted less"
    if part.empty:
        return say_instead(ax, finding, "every update counted in full")
    shown = part.loc[part.mean(axis=1).sort_values(kind="stable").index[:MOST_CLIENTS]]
    values = shown.to_numpy(np.float64)
    partly = np.char.lstrip(np.char.mod("%.1g", np.nan_to_num(values)), "0")
    said = np.where(values == 0, "\N{MULTIPLICATION SIGN}", np.where((values > 0) & (values < 1), partly, ""))
    sns.heatmap(
        values, mask=np.isnan(values), annot=said, fmt="", cmap="Greys_r", vmin=-0.6, vmax=1, linewidths=0.4,
        linecolor="0.8", ax=ax, xticklabels=False, yticklabels=False, annot_kws={"fontsize": "x-small"}, cbar=False,
    )  # fmt: skip
    inside(ax)
    ax.patch.set(facecolor="0.92", hatch="///", edgecolor="0.6")
    poisoners = set() if truth is None else set(truth.loc[truth["poisoned"].astype(bool), "client"].astype(str))
    names = [
        f"malicious \N{BLACK RIGHT-POINTING POINTER} {plain(c)}" if str(c) in poisoners else plain(c)
        for c in shown.index
    ]
    ax.set_yticks(np.arange(len(names)) + 0.5, names, rotation=0, fontsize="small", parse_math=False)
    step = max(1, len(shown.columns) // 20)
    ax.set_xticks(np.arange(len(shown.columns))[::step] + 0.5, [str(each) for each in shown.columns[::step]])
    several = f" ({len(shown)} of {len(part)} shown)" if len(shown) < len(part) else ""
    ax.set(xlabel="round", ylabel=f"client{several}")
    return titled(ax, finding)


def label_counts(table: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Heat map client x label of how many samples of each label each client holds, the darker the more.

    table: columns client, label, count; pairs without a row count 0. Clients are drawn in the order of the table, at
    most 40; of more than 40 labels the most frequent. The title says whether labels depend on the client: Cramer's V
    of clients and labels, corrected for bias (Bergsma 2013), is near 0 where all draw from the same labels, however
    unequal their sizes, and 1 where each label has clients of its own; below 0.1 labels are called evenly spread.
    """
    ax = plt.gca() if ax is None else ax
    if table.empty or not table["count"].sum():
        return say_instead(ax, "No label counts", "no client holds a sample")
    clients, labels = (list(dict.fromkeys(table[column])) for column in ("client", "label"))
    counts = table.pivot_table(index="client", columns="label", values="count", aggfunc="sum", fill_value=0)
    counts = counts.reindex(index=clients, columns=labels)
    frequent = counts.columns.isin(counts.sum().sort_values(ascending=False, kind="stable").index[:MOST_LABELS])
    shown = counts.loc[clients[:MOST_CLIENTS], frequent]
    numbers = np.where(shown > 0, shown.astype(int).astype(str), "") if shown.shape[1] <= MOST_NUMBERS else False
    sns.heatmap(
        shown.to_numpy(np.float64), annot=numbers, fmt="", cmap="Blues", vmin=0, linewidths=0.4, linecolor="white",
        ax=ax, xticklabels=False, yticklabels=False, annot_kws={"fontsize": "x-small"},
        cbar_kws={"label": "samples", "shrink": 0.8, "ticks": MaxNLocator(6, integer=True)},
    )  # fmt: skip
    inside(ax)
    names = [[plain(name, 12) if str(name).strip() else repr(name) for name in each] for each in shown.axes]
    step = int(np.ceil(len(shown) / 25))  # of many clients only some are named
    ax.set_yticks(np.arange(len(shown))[::step] + 0.5, names[0][::step], rotation=0, parse_math=False)
    turned = 90 if sum(map(len, names[1])) > 50 else 0
    ax.set_xticks(np.arange(shown.shape[1]) + 0.5, names[1], rotation=turned, parse_math=False)
    ax.tick_params(length=0, labelsize="small")
    for number, (axis, what) in enumerate(((ax.yaxis, "client"), (ax.xaxis, "label"))):
        part = f" ({shown.shape[number]} of {counts.shape[number]} shown)"
        axis.set_label_text(what + (part if shown.shape[number] < counts.shape[number] else ""))
    return titled(ax, _labels_finding(counts.to_numpy(np.float64)))


def _labels_finding(counts: np.ndarray) -> str:
    """Whether labels depend on the client, how far a client's labels go, and how large the clients are."""
    sizes = counts.sum(axis=1)
    held = counts[sizes > 0][:, counts.sum(axis=0) > 0]
    least, most = int(sizes.min()), int(sizes.max())
    each = f"{count(len(sizes), 'client')} of {f'{least:,} to ' if least < most else ''}{most:,} samples"
    if min(held.shape) < 2:
        return f"Labels cannot be compared: {each}"
    total, (rows, columns) = held.sum(), held.shape
    expected = np.outer(held.sum(axis=1), held.sum(axis=0)) / total
    chi_square = ((held - expected) ** 2 / expected).sum()
    excess = max(0.0, chi_square / total - (rows - 1) * (columns - 1) / (total - 1))
    freedom = min(rows - (rows - 1) ** 2 / (total - 1), columns - (columns - 1) ** 2 / (total - 1)) - 1
    association = min(1.0, np.sqrt(excess / freedom)) if freedom > 0 else 0.0
    own = percent((held.max(axis=1) / held.sum(axis=1)).mean())
    verdict = "are spread evenly" if association < 0.1 else "differ between clients"
    every = percent(held.sum(axis=0).max() / total)
    return f"Labels {verdict} (V {association:.2f}): the commonest is {own} of a client, {every} of all; {each}"
