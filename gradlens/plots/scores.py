"""Plots of detection and training: scores over rounds, ROC curves, main accuracy and attack success rate."""

from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from gradlens.errors import InputError
from gradlens.evaluation import auc, mean_interval
from gradlens.plots.axes import (
    BELOW,
    BENIGN,
    CLEAR,
    COLORS,
    DASHES,
    MALICIOUS,
    PARTLY,
    THRESHOLD,
    is_control,
    name_points,
    say_instead,
    titled,
)
from gradlens.words import count, percent, plain, with_interval

MALICIOUS_LINE: dict[str, Any] = {"color": MALICIOUS, "linewidth": 1.7, "marker": "o", "markersize": 4}
MOST_NAMED = 3  # clients whose lines are named where nobody is known to be malicious
MEASURES = {"main_accuracy": ("main accuracy", "#0b5394", ""), "asr": ("attack success rate", "#b8400a", "o")}


def plot_scores(
    scores: pd.DataFrame,
    *,
    threshold: float | None = None,
    beside: pd.DataFrame | None = None,
    named: Sequence[str] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draws every client's score over rounds, malicious clients as thick lines with dots, the threshold dashed.

    Where nobody is known to be malicious, the clients named, at most three, have lines of their own and their names.

    Parameters
    ----------
    scores : pandas.DataFrame
        Scores of one detector, with columns round, client, score and, if known, malicious, flag, abstained. A client
        with any malicious update is drawn as malicious. Rows with a reason in `abstained` are left out.
    threshold : float, optional
        Score above which an update is flagged. None draws no line.
    beside : pandas.DataFrame, optional
        Scores of a neighboring plot, to share the limits of the vertical axis.
    named : sequence of str, optional
        Clients to name, such as those that a case accuses; None names the most suspicious by these scores.
    ax : matplotlib.axes.Axes, optional
        Where to draw; None takes the current Axes.

    Returns
    -------
    matplotlib.axes.Axes
        Infinite scores are triangles at the upper edge; the vertical axis is logarithmic if the largest score exceeds
        20 times both the 90 % quantile and the threshold. The title gives AUC and flags if malicious clients are known,
        otherwise the flags alone. It is empty, with the reason, if the detector abstained in every round.

    Examples
    --------
    >>> from matplotlib.figure import Figure
    >>> scores = pd.DataFrame({"round": 0, "client": ["a", "b"], "score": [0.5, 4.0], "malicious": [False, True]})
    >>> plot_scores(scores, ax=Figure().subplots()).get_title(loc="left")
    'Malicious clients stand out: AUC 1.00 over 1 round'
    """
    ax = plt.gca() if ax is None else ax
    if "abstained" in scores:
        scores = scores[scores["abstained"].fillna("").eq("")]
    if scores.empty:
        return say_instead(ax, "No scores", "the detector abstained in every round")
    known = "malicious" in scores
    poisoned = scores[scores["malicious"].astype(bool)] if known else scores[scores["score"].isna()]
    malicious = set(poisoned["client"])
    present = set(scores["client"])
    given = suspicion_order(scores, threshold) if named is None else [client for client in named if client in present]
    lines = [] if known else given[:MOST_NAMED]
    _draw_scores(ax, scores, malicious, lines)
    _scale_scores(ax, scores, threshold, beside)
    if threshold is not None:
        ax.axhline(threshold, color=THRESHOLD, linestyle="--", linewidth=1.2, zorder=4)
    _score_legend(ax, scores, malicious, lines, known, threshold)
    ax.spines[["top", "right"]].set_visible(False)
    ax.set_xlabel("round")
    ax.set_ylabel("score (higher = more suspicious)")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    return titled(ax, _score_finding(scores, malicious, known, threshold))


def suspicion_order(scores: pd.DataFrame, threshold: float | None = None) -> list[str]:
    """Ranks clients by how suspicious they are: flagged in most rounds, then first flagged, then largest median score.

    Parameters
    ----------
    scores : pandas.DataFrame
        Columns round, client, score and, where the detector flags, flag.
    threshold : float, optional
        Score above which an update is flagged, where there is no column flag.

    Returns
    -------
    list of str

    Examples
    --------
    >>> suspicion_order(pd.DataFrame({"round": [0, 0], "client": ["a", "b"], "score": [0.5, 4.0]}))
    ['b', 'a']
    """
    table = scores.assign(flag=_flags(scores, threshold))
    rounds = table[table["flag"]].groupby("client")["round"].agg(["nunique", "min"])
    ranks = table.groupby("client")["score"].median().to_frame("median").join(rounds)
    by, ascending = ["nunique", "min", "median"], [False, True, False]
    return [str(client) for client in ranks.sort_values(by, ascending=ascending, kind="stable").index]


def _flags(scores: pd.DataFrame, threshold: float | None) -> pd.Series:
    """Which updates are flagged, bool."""
    return (
        scores["flag"].astype(bool)
        if "flag" in scores
        else scores["score"] > (np.inf if threshold is None else threshold)
    )


def _draw_scores(ax: Axes, scores: pd.DataFrame, malicious: set[str], named: list[str]) -> None:
    """Draws a line per client: thin gray ones, on them the named ones, on top the malicious ones."""
    finite = scores[np.isfinite(scores["score"])]
    groups: list[tuple[pd.Series, dict[str, Any]]] = [
        (~finite["client"].isin(malicious | set(named)), {"color": BENIGN, "linewidth": 0.8, "zorder": 2})
    ]
    groups += [(finite["client"].eq(client), _named_style(number)) for number, client in enumerate(named)]
    groups += [(finite["client"].isin(malicious), MALICIOUS_LINE | {"zorder": 3})]
    for rows, style in groups:
        for client, line in finite[rows].sort_values("round").groupby("client"):
            [drawn] = ax.plot(line["round"], line["score"], markeredgewidth=0, **style)
            points = zip(line["round"], line["score"], strict=True)
            name_points(drawn, [f"{plain(client)}, round {index}: {score:.3g}" for index, score in points])


def _named_style(number: int) -> dict[str, Any]:
    """The line of a client that is named in the legend."""
    return {"color": COLORS[number], "linewidth": 1.6, "linestyle": DASHES[number], "zorder": 3}


def _scale_scores(ax: Axes, scores: pd.DataFrame, threshold: float | None, beside: pd.DataFrame | None) -> None:
    """Sets limits that show the threshold, and a logarithmic axis where a few scores dwarf the rest."""
    values = scores["score"].to_numpy(np.float64)
    both = values if beside is None else np.append(values, beside["score"].to_numpy(np.float64))
    finite = both[np.isfinite(both)] if np.isfinite(both).any() else np.zeros(1)
    usual = max(float(np.quantile(np.abs(finite), 0.9)), abs(threshold or 0.0), 1e-12)
    top = max(float(finite.max()), threshold if threshold is not None else -np.inf)
    low = min(float(finite.min()), 0.0)
    logarithmic = top > 20 * usual
    if logarithmic:
        ax.set_yscale("symlog", linthresh=usual)
    upper = top * 2 if logarithmic else top + 0.12 * max(top - low, 1e-12)
    ax.set_ylim(low - 0.02 * max(top - low, 1e-12) if not logarithmic else low * 1.2, upper)
    infinite = scores[np.isposinf(values)]
    if len(infinite):
        ax.plot(infinite["round"], np.full(len(infinite), upper), "^", color="black", ms=5, clip_on=False, zorder=5)


def _score_legend(
    ax: Axes, scores: pd.DataFrame, malicious: set[str], named: list[str], known: bool, threshold: float | None
) -> None:
    """Draws the legend below the plot, with the number of clients of each kind."""
    others = scores["client"].nunique() - len(malicious) - len(named)
    handles = []
    if malicious:
        handles.append(Line2D([], [], label=f"malicious ({len(malicious)})", **MALICIOUS_LINE))
    handles += [Line2D([], [], label=plain(client), **_named_style(number)) for number, client in enumerate(named)]
    if others or known:
        kind = "benign" if known else "others" if named else "clients"
        handles.append(Line2D([], [], color=BENIGN, linewidth=0.8, label=f"{kind} ({others})"))
    if threshold is not None:
        handles.append(Line2D([], [], color=THRESHOLD, linestyle="--", label=f"threshold {threshold:.3g}"))
    if np.isposinf(scores["score"]).any():
        handles.append(Line2D([], [], color="black", marker="^", linestyle="", label="infinite"))
    legend = ax.legend(handles=handles, **BELOW, ncols=min(len(handles), 4))
    for label in legend.get_texts():
        label.set_parse_math(False)


def _score_finding(scores: pd.DataFrame, malicious: set[str], known: bool, threshold: float | None) -> str:
    """Gives AUC and flagged share with ground truth, false positives without an attack, else who is flagged most."""
    if malicious:  # only attacked rounds, without the malicious clients' updates that were not poisoned
        poisoned = scores["malicious"].astype(bool)
        attacked = scores["round"].isin(scores.loc[poisoned, "round"])
        scores = scores[attacked & (poisoned | ~scores["client"].isin(malicious))]
    rounds = scores["round"].nunique()
    flags = _flags(scores, threshold)
    if malicious:
        poisoned = scores["malicious"].astype(bool)
        value = auc(scores["score"].to_numpy(), poisoned.to_numpy())
        verb = "stand out" if value >= CLEAR else "stand out in part" if value >= PARTLY else "do not stand out"
        caught = f", {percent(flags[poisoned].mean())} of their updates flagged" if threshold is not None else ""
        return f"Malicious clients {verb}: AUC {value:.2f} over {count(rounds, 'round')}{caught}"
    if known:
        return f"No attack: {flags.sum()} of {len(flags)} updates flagged ({percent(flags.mean())})"
    if not flags.any():
        return f"No client is flagged in {count(rounds, 'round')}"
    client = suspicion_order(scores, threshold)[0]
    flagged = scores.loc[flags & scores["client"].eq(client), "round"]
    return f"{plain(client)} is flagged most: {flagged.nunique()} of {rounds} rounds, first in round {flagged.min()}"


def plot_roc(points: pd.DataFrame, *, figures: pd.DataFrame | None = None, ax: Axes | None = None) -> Axes:
    """Draws the ROC curve of each detector as steps, with the AUC and its interval in the legend.

    Parameters
    ----------
    points : pandas.DataFrame
        Rows of `roc_points`: columns fpr, tpr and, for several curves, detector; `control` (bool) marks points of an
        attack-free control.
    figures : pandas.DataFrame, optional
        Rows of `evaluate`, with one of metric "auc" per detector. None takes the area under each drawn curve instead,
        without an interval.
    ax : matplotlib.axes.Axes, optional
        Where to draw; None takes the current Axes.

    Returns
    -------
    matplotlib.axes.Axes
        The title names the detector with the highest AUC. It is empty, with the reason, if there are no points.

    Raises
    ------
    InputError
        If `figures` does not have exactly one AUC for a detector.

    Examples
    --------
    >>> from matplotlib.figure import Figure
    >>> points = pd.DataFrame({"fpr": [0, 0, 1], "tpr": [0, 1, 1], "detector": "layer_norms"})
    >>> plot_roc(points, ax=Figure().subplots()).get_title(loc="left")
    'layer_norms separates best: AUC 1.00'
    """
    ax = plt.gca() if ax is None else ax
    if points.empty:
        return say_instead(ax, "No ROC curve", "there is no malicious or no benign update to compare")
    points = points if "detector" in points else points.assign(detector="score")
    lines = []
    for number, (detector, curve) in enumerate(points.groupby("detector", sort=False)):
        lines.append((*_auc_of(str(detector), curve, figures), str(detector), curve, number))
    lines.sort(key=lambda line: (-line[0], line[3]))  # order of the legend; colors follow the order of the table
    ax.plot([0, 1], [0, 1], color="0.6", linewidth=0.8, linestyle=":", zorder=1)
    for value, low, high, detector, curve, number in lines:
        ax.plot(
            curve["fpr"], curve["tpr"], drawstyle="steps-post", color=COLORS[number % len(COLORS)],
            linestyle=DASHES[number % len(DASHES)], linewidth=1.8,
            label=f"{plain(detector)}: AUC {with_interval(value, low, high)}",
        )  # fmt: skip
    ax.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01), xlabel="false-positive rate (benign updates flagged)")
    ax.set_ylabel("true-positive rate (malicious updates flagged)")
    ax.set_aspect("equal")
    ax.spines[["top", "right"]].set_visible(False)
    legend = ax.legend(**BELOW | {"bbox_to_anchor": (0.5, -0.12)}, ncols=2 if len(lines) > 3 else 1)
    for text in legend.get_texts():
        text.set_parse_math(False)
    value, low, high, detector, *_ = lines[0]
    if len(points) and is_control(points).all():
        return titled(ax, f"By chance at most AUC {with_interval(value, low, high)} ({plain(detector)})")
    if value < PARTLY:
        return titled(ax, f"No detector separates (best AUC {with_interval(value, low, high)})")
    verb = "separates best" if value >= CLEAR else "separates best, in part"
    return titled(ax, f"{plain(detector)} {verb}: AUC {with_interval(value, low, high)}")


def _auc_of(detector: str, curve: pd.DataFrame, figures: pd.DataFrame | None) -> tuple[float, float, float]:
    """Returns the AUC of a detector and its interval, NaN where it has none."""
    if figures is not None:
        row = figures[figures["metric"].eq("auc") & figures["detector"].eq(detector)]
        if len(row) != 1:
            raise InputError(f"figures must have one auc row for detector {detector!r}, found {len(row)}")
        return float(row["value"].iloc[0]), float(row["low"].iloc[0]), float(row["high"].iloc[0])
    return float(np.trapezoid(curve["tpr"], curve["fpr"])), float("nan"), float("nan")


def plot_training(metrics: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Draws main accuracy and attack success rate (ASR) over rounds: mean over seeds with its 95 % interval.

    Parameters
    ----------
    metrics : pandas.DataFrame
        Columns round, main_accuracy, asr and, where there are several, seed, filter (its name, "" for none) and
        control (bool). A measure without any number is left out.
    ax : matplotlib.axes.Axes, optional
        Where to draw; None takes the current Axes.

    Returns
    -------
    matplotlib.axes.Axes
        Filters differ in dashes; lines of the ASR have dots, and those of controls are thin and gray beside
        attacked ones. The title gives the ASR at the end of training, the control's, and what a filter changes.

    Examples
    --------
    >>> from matplotlib.figure import Figure
    >>> metrics = pd.DataFrame({"round": [0, 1], "main_accuracy": [0.5, 0.9], "asr": [0.1, 0.8]})
    >>> plot_training(metrics, ax=Figure().subplots()).get_title(loc="left")
    'ASR 0.80, main accuracy 0.90'
    """
    ax = plt.gca() if ax is None else ax
    table = metrics.assign(
        control=is_control(metrics),
        seed=metrics.get("seed", 0),
        filter=metrics["filter"].fillna("").astype(str) if "filter" in metrics else "",
    )
    filters = sorted(table["filter"].unique())
    both = len(table["control"].unique()) > 1
    rounds = table["round"].nunique()
    for (control, name, measure), part in _lines_of(table):
        label, color, marker = MEASURES[measure]
        thin = bool(control) and both
        by_round = part.groupby("round")[measure]
        means = by_round.mean()
        ax.plot(
            means.index, means, color="0.5" if thin else color,
            linestyle=DASHES[filters.index(name) % len(DASHES)], linewidth=0.9 if thin else 1.8,
            marker=marker, markersize=3 if thin else 5, markeredgewidth=0, markevery=max(1, rounds // 6),
            label=label + (f", filter {plain(name)}" if name else "") + (", no attack" if thin else ""),
        )  # fmt: skip
        if not thin:
            low, high = np.transpose([mean_interval(values, 0, 1) for _, values in by_round])
            ax.fill_between(means.index, low, high, color=color, linewidth=0, alpha=0.2)
    seeds = table["seed"].nunique()
    ax.spines[["top", "right"]].set_visible(False)
    ax.set(ylim=(-0.02, 1.02), ylabel="share of test samples")
    ax.set_xlabel("round" + (f" (mean of {seeds} seeds, band: 95 % interval)" if seeds > 1 else " (one seed)"))
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    legend = ax.legend(**BELOW, ncols=2)
    for text in legend.get_texts():
        text.set_parse_math(False)
    return titled(ax, _training_finding(table))


def _lines_of(table: pd.DataFrame) -> list[tuple[tuple[bool, str, str], pd.DataFrame]]:
    """Lists the lines to draw with their rows, the control's first, so that they lie below all others."""
    groups = sorted(table.groupby(["control", "filter"]), key=lambda group: (not group[0][0], group[0][1]))
    return [
        ((bool(control), str(name), measure), part.dropna(subset=[measure]))
        for (control, name), part in groups
        for measure in MEASURES
        if part[measure].notna().any()
    ]


def _training_finding(table: pd.DataFrame) -> str:
    """Gives the ASR at the end, the control's and what a filter changes; main accuracy where there is no attack."""
    end = table[table["round"].eq(table.groupby(["control", "filter", "seed"])["round"].transform("max"))]
    means = {key: part[["main_accuracy", "asr"]].mean().tolist() for key, part in end.groupby(["control", "filter"])}
    attacked = {str(name): mean for (control, name), mean in means.items() if not control}
    controls = {str(name): mean for (control, name), mean in means.items() if control}
    if not attacked:
        accuracy, rate = controls.get("", next(iter(controls.values())))
        return f"No attack: main accuracy {accuracy:.2f}" + (f", ASR {rate:.2f}" if np.isfinite(rate) else "")
    accuracy, rate = attacked.get("", next(iter(attacked.values())))
    if np.isnan(rate):
        return f"Main accuracy {accuracy:.2f}"
    chance = controls.get("", next(iter(controls.values()), (np.nan, np.nan)))[1]
    beside = f" (control {chance:.2f})" if np.isfinite(chance) else ""
    filtered = [mean for name, mean in attacked.items() if name]
    if "" not in attacked or not filtered:
        return f"ASR {rate:.2f}{beside}, main accuracy {accuracy:.2f}"
    kept, lowered = min(filtered, key=lambda mean: mean[1])
    verb = "The filter lowers ASR" if lowered < rate - 0.1 else "The filter does not lower ASR"
    return f"{verb}: {rate:.2f} to {lowered:.2f}{beside}, main accuracy {accuracy:.2f} to {kept:.2f}"
