"""Plots of clients: their final-bias updates, the weights that a filter gave them, and the labels that they hold."""

from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from gradlens.errors import CannotSay
from gradlens.evaluation import auc
from gradlens.log import UpdateLog
from gradlens.plots.axes import BLUE_TO_RED, CLEAR, PARTLY, heat_map, say_instead, titled
from gradlens.scorers import robust_zscore
from gradlens.statistics import final_bias
from gradlens.words import count, percent, plain

MOST_CLIENTS = 40  # most rows of a heat map, so that it can be read in print
MOST_LABELS, MOST_NUMBERS = 40, 20  # most columns of a heat map of counts, and most columns with a number in each cell


def plot_final_bias(
    log: UpdateLog | Any,
    truth: pd.DataFrame | None = None,
    *,
    scale: float | None = None,
    order: Sequence[str] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draws the final-bias updates of the last round as a heat map, client x class, after subtracting the median.

    Parameters
    ----------
    log : UpdateLog or Run
        What the server saw; its last round is drawn, so `log[:k]` draws round k - 1 of a log that starts at round 0.
    truth : pandas.DataFrame, optional
        Ground truth with columns round, client, poisoned; malicious clients are marked. None marks nobody.
    scale : float, optional
        Value of the most saturated color, in logits, to compare several pictures. None takes the largest one drawn.
    order : sequence of str, optional
        Clients from the top; all others follow below. None puts malicious clients first, then the most unusual ones.
    ax : matplotlib.axes.Axes, optional
        Where to draw; None takes the current Axes.

    Returns
    -------
    matplotlib.axes.Axes
        With at most 40 clients. Its title says whether the malicious clients stand out (AUC of the robust z-score), or
        without ground truth which client deviates most. It is empty, with the reason, if the statistic abstains.

    Examples
    --------
    >>> from matplotlib.figure import Figure
    >>> from gradlens.examples import example_log
    >>> plot_final_bias(example_log(), ax=Figure().subplots()).get_title(loc="left").partition(",")[0]
    'Round 3: client-9 deviates most'
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
    omission = f" ({len(shown)} of {len(table)} shown)" if len(shown) < len(table) else ""
    ax.set_ylabel(f"client{omission}")
    ax.set_xlabel("class")
    return titled(ax, _bias_finding(index, table, deviation, poisoned))


def clients_by_bias(log: UpdateLog, truth: pd.DataFrame | None = None) -> list[str]:
    """Ranks the clients of the last round by how unusual their final-bias update is.

    Parameters
    ----------
    log : UpdateLog
        What the server saw.
    truth : pandas.DataFrame, optional
        Ground truth with columns round, client, poisoned; malicious clients then come first.

    Returns
    -------
    list of str
        Clients by decreasing robust z-score, empty if the statistic abstains.

    Examples
    --------
    >>> from gradlens.examples import example_log
    >>> clients_by_bias(example_log())[0]
    'client-9'
    """
    try:
        table = final_bias(log)
    except CannotSay:
        return []
    benign = ~table.index.isin(_poisoned(truth, log[-1].index))
    return [str(client) for client in table.index[np.lexsort((-robust_zscore(table), benign))]]


def _draw_bias(ax: Axes, shown: pd.DataFrame, poisoned: set[str], scale: float, extend: str) -> None:
    """Draws the cells, hatches the rows that are not comparable, and marks the malicious clients."""
    values = shown.to_numpy(np.float64)
    signs = np.where(values >= scale / 2, "+", np.where(values <= -scale / 2, "\N{MINUS SIGN}", ""))
    heat_map(
        ax, values, signs, cmap=BLUE_TO_RED, vmin=-scale, vmax=scale, linewidths=0.4, edgecolor="white",
        fonts={"fontsize": "small", "fontweight": "bold"},
        bar={"label": "bias update minus cohort median [logits]", "extend": extend, "shrink": 0.8},
    )  # fmt: skip
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
    num_malicious = sum(client in poisoned for client in shown.index)
    if 0 < num_malicious < len(shown) and poisoned.issuperset(shown.index[:num_malicious]):
        ax.axhline(num_malicious, color="black", linewidth=1.2)


def _bias_finding(index: int, table: pd.DataFrame, deviation: pd.Series, poisoned: set[str]) -> str:
    """Says whether the malicious clients deviate most or, without ground truth, which client does."""
    malicious = deviation.index.isin(poisoned)
    if malicious.any() and not malicious.all():
        value = auc(deviation.to_numpy(), malicious)
        who = f"the {malicious.sum()} malicious clients" if malicious.sum() > 1 else "the malicious client"
        verb = "" if malicious.sum() > 1 else "s"
        if value >= CLEAR:
            return f"Round {index}: {who} stand{verb} out (AUC {value:.2f})"
        if value >= PARTLY:
            return f"Round {index}: {who} stand{verb} out in part (AUC {value:.2f})"
        return f"Round {index}: {who} do{'es' if verb else ''} not stand out (AUC {value:.2f})"
    if not np.isfinite(deviation).any():
        return f"Round {index}: no client is comparable"
    first = int(np.argmax(deviation.to_numpy()))
    if not_comparable := int(np.isinf(deviation).sum()):
        return f"Round {index}: {count(not_comparable, 'client')} sent an update beyond comparison"
    column = table.columns[int(np.argmax(np.abs(table.to_numpy()[first])))]
    label = str(column).rpartition("[")[2].rstrip("]")
    name = plain(table.index[first])
    return f"Round {index}: {name} deviates most, class {plain(label)}, {deviation.iloc[first]:.1f} robust sigmas"


def _poisoned(truth: pd.DataFrame | None, index: int) -> set[str]:
    """Returns the clients that sent a poisoned update in one round."""
    if truth is None:
        return set()
    poisoned = truth[(truth["round"] == index) & truth["poisoned"].astype(bool)]
    return set(poisoned["client"].astype(str))


def plot_weights(verdicts: pd.DataFrame, truth: pd.DataFrame | None = None, *, ax: Axes | None = None) -> Axes:
    """Draws the weight that a filter gave each update as a heat map, client x round, darker for smaller weights.

    Parameters
    ----------
    verdicts : pandas.DataFrame
        Columns round, client, weight, as in `Run.verdicts`; weight 1 leaves an update as it came, 0 excludes it.
    truth : pandas.DataFrame, optional
        Ground truth with columns client, poisoned; clients that poisoned any update are marked.
    ax : matplotlib.axes.Axes, optional
        Where to draw; None takes the current Axes.

    Returns
    -------
    matplotlib.axes.Axes
        With at most 40 clients, the one with the smallest mean weight on top. Clients whose weight was always 1 are
        not drawn; a round without the client is hatched. The title counts the updates that were left out or weighed
        less. It is empty, with the reason, if every weight is 1.

    Examples
    --------
    >>> from matplotlib.figure import Figure
    >>> verdicts = pd.DataFrame({"round": [0, 0, 1], "client": ["a", "b", "a"], "weight": [1.0, 0.0, 0.5]})
    >>> plot_weights(verdicts, ax=Figure().subplots()).get_title(loc="left")
    '1 of 3 updates left out, 1 counted less'
    """
    ax = plt.gca() if ax is None else ax
    weights = verdicts.pivot_table(index="client", columns="round", values="weight", aggfunc="min")
    reduced = weights[weights.lt(1).any(axis=1)]
    out, less = int(weights.eq(0).sum().sum()), int((weights.gt(0) & weights.lt(1)).sum().sum())
    finding = f"{out} of {count(int(weights.notna().sum().sum()), 'update')} left out, {less} counted less"
    if reduced.empty:
        return say_instead(ax, finding, "every update counted in full")
    shown = reduced.loc[reduced.mean(axis=1).sort_values(kind="stable").index[:MOST_CLIENTS]]
    values = shown.to_numpy(np.float64)
    fractions = np.char.lstrip(np.char.mod("%.1g", np.nan_to_num(values)), "0")
    symbols = np.where(values == 0, "\N{MULTIPLICATION SIGN}", np.where((values > 0) & (values < 1), fractions, ""))
    heat_map(
        ax, values, symbols, cmap="Greys_r", vmin=-0.6, vmax=1, linewidths=0.4, edgecolor="0.8",
        fonts={"fontsize": "x-small"},
    )  # fmt: skip
    ax.patch.set(facecolor="0.92", hatch="///", edgecolor="0.6")
    poisoners = set() if truth is None else set(truth.loc[truth["poisoned"].astype(bool), "client"].astype(str))
    names = [
        f"malicious \N{BLACK RIGHT-POINTING POINTER} {plain(c)}" if str(c) in poisoners else plain(c)
        for c in shown.index
    ]
    ax.set_yticks(np.arange(len(names)) + 0.5, names, rotation=0, fontsize="small", parse_math=False)
    step = max(1, len(shown.columns) // 20)
    ax.set_xticks(np.arange(len(shown.columns))[::step] + 0.5, [str(index) for index in shown.columns[::step]])
    omission = f" ({len(shown)} of {len(reduced)} shown)" if len(shown) < len(reduced) else ""
    ax.set(xlabel="round", ylabel=f"client{omission}")
    return titled(ax, finding)


def label_counts(table: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Draws how many samples of each label each client holds as a heat map, client x label.

    Parameters
    ----------
    table : pandas.DataFrame
        Columns client, label, count; a pair without a row counts 0.
    ax : matplotlib.axes.Axes, optional
        Where to draw; None takes the current Axes.

    Returns
    -------
    matplotlib.axes.Axes
        With at most 40 clients, in the order of the table, and the 40 most frequent labels. It is empty, with the
        reason, if no client holds a sample.

    Notes
    -----
    The title measures label skew by Cramer's V of clients and labels with the bias correction of [1]_. V is near 0
    where all clients draw from the same label distribution, however unequal their sizes, and 1 where no two clients
    share a label or every client holds a single one. Below 0.1 the title calls the labels evenly spread.

    References
    ----------
    .. [1] Bergsma 2013, "A bias-correction for Cramer's V and Tschuprow's T", Journal of the Korean Statistical
       Society.

    Examples
    --------
    >>> from matplotlib.figure import Figure
    >>> table = pd.DataFrame({"client": ["a", "b"], "label": ["cat", "dog"], "count": [50, 50]})
    >>> label_counts(table, ax=Figure().subplots()).get_title(loc="left").partition(":")[0]
    'Labels differ between clients (V 1.00)'
    """
    ax = plt.gca() if ax is None else ax
    if table.empty or not table["count"].sum():
        return say_instead(ax, "No label counts", "no client holds a sample")
    clients, labels = (list(dict.fromkeys(table[column])) for column in ("client", "label"))
    counts = table.pivot_table(index="client", columns="label", values="count", aggfunc="sum", fill_value=0)
    counts = counts.reindex(index=clients, columns=labels)
    frequent = counts.columns.isin(counts.sum().sort_values(ascending=False, kind="stable").index[:MOST_LABELS])
    shown = counts.loc[clients[:MOST_CLIENTS], frequent]
    numbered = (shown > 0) & (shown.shape[1] <= MOST_NUMBERS)
    heat_map(
        ax, shown.to_numpy(np.float64), np.where(numbered, shown.astype(int).astype(str), ""), cmap="Blues", vmin=0,
        linewidths=0.4, edgecolor="white", fonts={"fontsize": "x-small"},
        bar={"label": "samples", "shrink": 0.8, "ticks": MaxNLocator(6, integer=True)},
    )  # fmt: skip
    names = [[plain(name, 12) if str(name).strip() else repr(name) for name in index] for index in shown.axes]
    step = int(np.ceil(len(shown) / 25))  # at most 25 rows are named
    ax.set_yticks(np.arange(len(shown))[::step] + 0.5, names[0][::step], rotation=0, parse_math=False)
    angle = 90 if sum(map(len, names[1])) > 50 else 0
    ax.set_xticks(np.arange(shown.shape[1]) + 0.5, names[1], rotation=angle, parse_math=False)
    ax.tick_params(length=0, labelsize="small")
    for number, (axis, what) in enumerate(((ax.yaxis, "client"), (ax.xaxis, "label"))):
        omission = f" ({shown.shape[number]} of {counts.shape[number]} shown)"
        axis.set_label_text(what + (omission if shown.shape[number] < counts.shape[number] else ""))
    return titled(ax, _labels_finding(counts.to_numpy(np.float64)))


def _labels_finding(counts: np.ndarray) -> str:
    """Says whether labels depend on the client, the share of the commonest label, and the sizes of the clients."""
    sizes = counts.sum(axis=1)
    held = counts[sizes > 0][:, counts.sum(axis=0) > 0]
    least, most = int(sizes.min()), int(sizes.max())
    clients = f"{count(len(sizes), 'client')} of {f'{least:,} to ' if least < most else ''}{most:,} samples"
    if min(held.shape) < 2:
        return f"Labels cannot be compared: {clients}"
    total, (rows, columns) = held.sum(), held.shape
    expected = np.outer(held.sum(axis=1), held.sum(axis=0)) / total
    chi_square = ((held - expected) ** 2 / expected).sum()
    excess = max(0.0, chi_square / total - (rows - 1) * (columns - 1) / (total - 1))
    freedom = min(rows - (rows - 1) ** 2 / (total - 1), columns - (columns - 1) ** 2 / (total - 1)) - 1
    association = min(1.0, np.sqrt(excess / freedom)) if freedom > 0 else 0.0
    in_client = percent((held.max(axis=1) / held.sum(axis=1)).mean())
    verdict = "are spread evenly" if association < 0.1 else "differ between clients"
    overall = percent(held.sum(axis=0).max() / total)
    shares = f"{in_client} of a client, {overall} of all"
    return f"Labels {verdict} (V {association:.2f}): the commonest is {shares}; {clients}"
