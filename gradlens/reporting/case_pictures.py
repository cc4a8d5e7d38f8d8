"""Pictures of a case file: what a client did round by round, how all clients scored, the model without the suspects."""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from gradlens.plots import plain
from gradlens.plots.axes import BELOW, MALICIOUS, THRESHOLD, name_points, titled
from gradlens.reporting.case_evidence import CaseEvidence
from gradlens.reporting.page import Block, figure, number

SIGMAS = (-100, -30, -10, -3, 0, 3, 10, 30, 100, 300, 1000, 10_000)  # ticks of an axis that is drawn in
MOST_ROWS = 30  # clients in the picture of scores
MARKS = {"accused": ("D", MALICIOUS), "ambiguous": ("s", "#8a6d00"), "next in line": ("o", "white"), "": ("o", "0.62")}
SERIES = {"main_accuracy": "main accuracy", "asr": "attack success rate"}


def activity_picture(evidence: CaseEvidence, client: str) -> Block:
    """Draws a client's activity over rounds on the band of the clean clients, with the range of its onset.

    Parameters
    ----------
    evidence : CaseEvidence
    client : str
        One of `evidence.shown`.

    Returns
    -------
    Block
    """
    assert evidence.sums is not None
    rounds = np.array([round_.index for round_ in evidence.run.log])
    own, others = evidence.active[:, evidence.position(client)], evidence.active[:, evidence.clean]
    stretch = evidence.stretch(client)
    names = evidence.sums.clients[evidence.clean]

    def draw(canvas: Figure) -> None:
        ax = canvas.subplots()
        _band(ax, rounds, others, names)
        line = {"color": MALICIOUS, "linewidth": 1.7, "marker": "o", "markersize": 4}
        [drawn] = ax.plot(rounds, own, label=plain(client), zorder=4, **line)
        sigmas = zip(rounds.tolist(), np.sinh(own).tolist(), strict=True)
        name_points(drawn, [f"{plain(client)}, round {index}: {size:.1f} sigmas" for index, size in sigmas])
        if stretch is not None:
            start, end = rounds[stretch.earliest] - 0.5, rounds[stretch.latest] + 0.5
            ax.axvspan(start, end, facecolor="#f0c674", alpha=0.45, linewidth=0, zorder=0.5, label="onset")
            for edge in (start, end):
                ax.axvline(edge, color="0.35", linewidth=0.8, linestyle=":")
        ticks = [s for s in SIGMAS if _lowest(own, others) <= np.arcsinh(s) <= _highest(own, others)]
        ax.set_yticks(np.arcsinh(ticks), [f"{tick:,}" for tick in ticks])
        _finished(ax, "round", "activity (sigmas of the clean clients)")
        titled(ax, f"{plain(client)}: {_activity_in_words(own, others, stretch, rounds)}")

    onset = "" if stretch is None else " Between the dotted lines: the rounds in which it may have begun, 95 % range."
    caption = (
        f"Activity of {client} round by round: how far its update goes along with what it sent in its other rounds. "
        f"Light band: all {len(names)} clients thought clean; dark band: the middle half of them; the one that comes "
        f"highest is named. A round without a dot is one in which it took no part.{onset}"
    )
    return figure(draw, (7.4, 3.9), caption)


def _band(ax: Axes, rounds: np.ndarray, others: np.ndarray, names: np.ndarray) -> None:
    """Draws the range of the clean clients, that of their middle half, and the name of the highest."""
    seen = np.isfinite(others).any(axis=1)
    if not seen.any():
        return
    known, at = others[seen], rounds[seen]
    ax.fill_between(at, np.nanmin(known, axis=1), np.nanmax(known, axis=1), color="0.88", linewidth=0, label="clean")
    low, high = np.nanquantile(known, [0.25, 0.75], axis=1)
    ax.fill_between(at, low, high, color="0.70", linewidth=0, label="middle half of the clean")
    row, column = np.unravel_index(int(np.nanargmax(known)), known.shape)
    ax.annotate(
        plain(names[column]), (float(at[row]), float(known[row, column])), textcoords="offset points", xytext=(0, 4),
        ha="center", fontsize="small", color="0.3", parse_math=False, zorder=5,
    )  # fmt: skip


def _activity_in_words(own: np.ndarray, others: np.ndarray, stretch: object, rounds: np.ndarray) -> str:
    """The title: how active the client was in its stretch, and how far a clean client came at most."""
    first, last = (stretch.first, stretch.last) if stretch is not None else (0, len(own) - 1)  # type: ignore[attr-defined]
    within = own[first : last + 1]
    middle = float(np.sinh(np.nanmedian(within))) if np.isfinite(within).any() else float("nan")
    when = f"in round {rounds[first]}" if first == last else f"in rounds {rounds[first]} to {rounds[last]}"
    highest = float(np.sinh(np.nanmax(others))) if np.isfinite(others).any() else float("nan")
    return f"{number(middle, 1)} sigmas {when}; a clean client reaches {number(highest, 1)} at most in any round"


def _lowest(*parts: np.ndarray) -> float:
    return float(min(np.nanmin(part, initial=0.0) for part in parts)) - 0.5


def _highest(*parts: np.ndarray) -> float:
    return float(max(np.nanmax(part, initial=0.0) for part in parts)) + 0.5


def case_scores_picture(clients: pd.DataFrame, fwer: str) -> Block:
    """Draws the score of every client, the most suspicious on top, and the threshold.

    Parameters
    ----------
    clients : pandas.DataFrame
        `Case.clients`, ranked.
    fwer : str
        The rate of the threshold, in words.

    Returns
    -------
    Block
    """
    shown = clients.head(MOST_ROWS)
    threshold = float(shown["threshold"].iloc[0])

    def draw(canvas: Figure) -> None:
        ax = canvas.subplots()
        for status, (marker, color) in MARKS.items():
            rows = shown[shown["status"].eq(status)]
            if len(rows):
                label = status or "others"
                style = {"color": color, "markeredgecolor": "0.2", "label": label, "ms": 6}
                [drawn] = ax.plot(rows["score"], rows["rank"], marker, **style)
                scored = zip(rows["client"], rows["score"], strict=True)
                name_points(drawn, [f"{plain(name)}: score {score:.1f}" for name, score in scored])
        if np.isfinite(threshold):
            ax.axvline(threshold, color=THRESHOLD, linestyle="--", linewidth=1.2, label=f"threshold {threshold:.1f}")
        ax.set_yticks(shown["rank"], [plain(name) for name in shown["client"]])
        for tick in ax.get_yticklabels():
            tick.set_parse_math(False)
        ax.set_ylim(len(shown) + 0.7, 0.3)
        ax.grid(axis="y", color="0.92", linewidth=0.6)
        ax.set_axisbelow(True)
        above = int((clients["score"] > threshold).sum())
        _finished(ax, "score (higher = more suspicious)", "")
        titled(ax, f"{above} of {len(clients)} clients {'lies' if above == 1 else 'lie'} above the threshold")

    part = f" Shown: the first {len(shown)} of {len(clients)}." if len(shown) < len(clients) else ""
    line = f"Dashed: the threshold for a rate of {fwer}." if np.isfinite(threshold) else "There is no threshold."
    caption = f"Score of every client over the whole recording, the most suspicious on top. {line}{part}"
    return figure(draw, (7.4, 1.5 + 0.19 * len(shown)), caption)


def without_picture(rounds: pd.DataFrame, names: str) -> Block:
    """Draws main accuracy and attack success rate as recorded, and of a replay without the suspects.

    Parameters
    ----------
    rounds : pandas.DataFrame
        `Replay.rounds` with the figures of `measure`.
    names : str
        The suspects, for the caption.

    Returns
    -------
    Block
    """
    measured = [name for name in SERIES if name in rounds and rounds[name].notna().any()]

    def draw(canvas: Figure) -> None:
        for ax, name in zip(np.atleast_1d(canvas.subplots(1, len(measured))), measured, strict=True):
            lines = ax.plot(rounds["round"], rounds[f"recorded_{name}"], "o-", color=MALICIOUS, ms=3.5)
            lines += ax.plot(rounds["round"], rounds[name], "--", color="#0b5394", linewidth=1.8)
            for line, label in zip(lines, ("as recorded", "without them"), strict=True):
                line.set_label(label)
                points = zip(rounds["round"], line.get_ydata(), strict=True)
                name_points(line, [f"round {index}, {label}: {value:.2f}" for index, value in points])
            ax.set_ylim(-0.03, 1.03)
            _finished(ax, "round", SERIES[name])
            last = rounds.iloc[-1]
            change = f"{number(float(last[f'recorded_{name}']))} as recorded, {number(float(last[name]))} without them"
            titled(ax, f"{SERIES[name].capitalize()} at the end: {change}")

    caption = (
        f"The global model on held-out samples: as recorded, and as the recorded updates without {names} make it. The "
        "updates are as they were sent: given another model, clients would have sent others."
    )
    return figure(draw, (4.6 * len(measured) + 0.6, 3.9), caption)


def _finished(ax: Axes, across: str, up: str) -> None:
    """Labels, whole rounds, no frame, and the legend below."""
    ax.spines[["top", "right"]].set_visible(False)
    ax.set_xlabel(across)
    ax.set_ylabel(up)
    if across == "round":
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    handles, _ = ax.get_legend_handles_labels()
    legend = ax.legend(**BELOW | {"bbox_to_anchor": (0.5, -0.14)}, ncols=min(max(len(handles), 1), 5))
    for label in legend.get_texts():
        label.set_parse_math(False)
