"""Figures of a report: the attacked run on the left and its attack-free control on the right, on equal axes.

Without a control the caption says that the figure cannot show what is usual.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gradlens.errors import CannotSay
from gradlens.evaluation import roc_points
from gradlens.log import UpdateLog
from gradlens.plots import (
    MOST_CLIENTS,
    clients_by_bias,
    conditions,
    plot_final_bias,
    plot_localization,
    plot_roc,
    plot_scores,
    plot_training,
    plot_weights,
)
from gradlens.reporting.page import Block, figure
from gradlens.run import Run
from gradlens.statistics import final_bias

WIDTH = 10.5  # inches of a pair of panels
BROAD = 18  # most columns of a heat map with legible numbers
ALONE = "No attack-free control stands beside it: what is usual here is not known."
NAMES = ("Attacked", "Attack-free control")


def roc_picture(scores: pd.DataFrame, figures: pd.DataFrame, caption: str) -> Block:
    """Draws the ROC curves of one setting.

    Parameters
    ----------
    scores : pandas.DataFrame
        Table of `with_truth` with a column `control` (bool), attacked and control rows.
    figures : pandas.DataFrame
        Table of `evaluate` with a column `control`, for the AUCs.
    caption : str
        Text below the picture.

    Returns
    -------
    Block
    """

    def draw(canvas: Figure) -> None:
        for ax, control in _panels(canvas, bool(scores["control"].any())):
            rows, aucs = scores["control"].eq(control), figures[figures["control"].eq(control)]
            call(plot_roc(roc_points(scores[rows]).assign(control=control), figures=aucs, ax=ax), NAMES[control])

    return _pair(draw, 5.9, caption, bool(scores["control"].any()))


def scores_picture(
    own: pd.DataFrame,
    free: pd.DataFrame | None,
    rule: Mapping[str, Any],
    alone: str = ALONE,
    suspects: Sequence[str] | None = None,
) -> Block:
    """Draws the scores of one detector over rounds.

    Parameters
    ----------
    own : pandas.DataFrame
        Scores of the run, as for `plot_scores`.
    free : pandas.DataFrame or None
        Scores of its control.
    rule : Mapping
        Keys detector, threshold (missing if each cohort sets its own) and null.
    alone : str
        Sentence that the caption gets without a control.
    suspects : sequence of str, optional
        Clients that the case names: they have lines of their own where the truth is not known.

    Returns
    -------
    Block
    """
    threshold = None if pd.isna(rule["threshold"]) else float(rule["threshold"])

    def draw(canvas: Figure) -> None:
        for ax, control in _panels(canvas, free is not None):
            table, other = (free, own) if control and free is not None else (own, free)
            name = NAMES[control] if free is not None else "This run"
            drawn = plot_scores(table, threshold=threshold, beside=other, named=None if control else suspects, ax=ax)
            call(drawn, f"{name}: {rule['detector']}")

    kind = "each cohort sets its own threshold" if threshold is None else "dashed: the threshold"
    caption = f"Score of every client by {rule['detector']}; {kind}. Its null: {rule['null']}."
    return _pair(draw, 4.3, caption, free is not None, alone)


def bias_picture(
    run: Run,
    control: Run | None,
    index: int,
    truth: pd.DataFrame | None,
    alone: str = ALONE,
    suspects: Sequence[str] = (),
) -> Block:
    """Draws the final-bias updates of one round, client x class, beside the control's on the same scale.

    Parameters
    ----------
    run : Run
        The reported run.
    control : Run or None
        Its attack-free control.
    index : int
        The round.
    truth : pandas.DataFrame or None
        Ground truth of the run, which puts malicious clients on top.
    alone : str
        Sentence that the caption gets without a control.
    suspects : sequence of str
        Clients that the case names; without ground truth they come first.

    Returns
    -------
    Block
    """
    logs = [source.log[: index + 1] for source in (run, control) if source is not None]
    scale = max(_bias_scale(log) for log in logs) or None

    def draw(canvas: Figure) -> None:
        order = clients_by_bias(logs[0], truth)
        order = sorted(order, key=lambda client: truth is not None or client not in suspects)
        for ax, free in _panels(canvas, control is not None):
            known = None if free else truth
            plot_final_bias(logs[free], known, scale=scale, order=order, ax=ax)
            call(ax, NAMES[free] if control else "This run")

    beside = f", beside its control {control.name} in the same order" if control else ""
    first = ", malicious ones first" if truth is not None else ", those that the case names first" if suspects else ""
    caption = (
        f"Final-bias update of every client minus the cohort's median in round {index} of run {run.name}{beside}. "
        f"Clients from the most unusual down{first}; + and \N{MINUS SIGN} mark more than half of the scale."
    )
    return _pair(draw, 1.9 + 0.17 * min(MOST_CLIENTS, len(run.log[index])), caption, control is not None, alone)


def training_picture(metrics: pd.DataFrame, caption: str, alone: str = ALONE) -> Block:
    """Draws main accuracy and attack success rate over rounds.

    Parameters
    ----------
    metrics : pandas.DataFrame
        As for `plot_training`, with a column `control` (bool); rows may be of one kind only.
    caption : str
        Text below the picture.
    alone : str
        Sentence that the caption gets if rows are of one kind only.

    Returns
    -------
    Block
    """
    kinds = sorted(metrics["control"].unique().tolist())

    def draw(canvas: Figure) -> None:
        for (ax, _), free in zip(_panels(canvas, len(kinds) > 1), kinds, strict=True):
            call(
                plot_training(metrics[metrics["control"].eq(free)], ax=ax),
                NAMES[free] if len(kinds) > 1 else "This run",
            )

    return _pair(draw, 4.4, caption, len(kinds) > 1, alone)


def localization_picture(places: pd.DataFrame, name: str, caption: str) -> Block:
    """Draws the localization heat map of one statistic, with the control's columns in the same picture.

    Parameters
    ----------
    places : pandas.DataFrame
        Rows of `localize_sweep` for that statistic.
    name : str
        The statistic.
    caption : str
        Text below the picture.

    Returns
    -------
    Block
        Phases are stacked if the picture gets too broad. Of a deep model only the layers that separate best are drawn,
        in the order of the model, and the caption says so.
    """
    varied = [c for c in places.columns if c not in ("control", "phase", "layer", "statistic", "unit", "auc", "p")]
    layers = places["layer"].nunique()
    part = _best_layers(places, BROAD // (1 + int(places["control"].any()))).assign(statistic=name)
    if (shown := part["layer"].nunique()) < layers:
        caption = f"{caption} Shown: the {shown} of {layers} layers that separate best, in the order of the model."
    labels = set(conditions(part[varied].to_dict("records")))
    columns = len(part["layer"].unique()) * (1 + int(part["control"].any()))
    phases = part["phase"].unique().tolist() if "phase" in part else []
    stacked = len(phases) > 1 and columns * len(phases) > BROAD
    rows = [part[part["phase"].eq(phase)] for phase in phases] if stacked else [part]
    across = columns * max(1, len(phases) - len(rows) + 1)
    width = 1.6 + 0.075 * max(map(len, labels)) + max(0.48 * across, 5.0)
    height = len(rows) * (1.9 + 0.24 * max(3, len(labels)))

    def draw(canvas: Figure) -> None:
        for ax, table in zip(np.atleast_1d(canvas.subplots(len(rows), 1)), rows, strict=True):
            plot_localization(table, statistic=name, ax=ax)

    return figure(draw, (min(14.0, width), height), caption)


def _best_layers(places: pd.DataFrame, most: int) -> pd.DataFrame:
    """Returns the rows of at most `most` layers, those with the attacked AUC farthest from 0.5."""
    attacked = places[~places["control"].astype(bool)]
    strength = attacked["auc"].sub(0.5).abs().groupby(attacked["layer"], sort=False).max()
    best = strength.nlargest(most).index if len(strength) > most else strength.index
    return places if places["layer"].isin(best).all() else places[places["layer"].isin(best)]


def weights_picture(own: pd.DataFrame, free: pd.DataFrame | None, truth: pd.DataFrame | None, alone: str) -> Block:
    """Draws the weights that a live filter gave the updates, client x round.

    Parameters
    ----------
    own : pandas.DataFrame
        `Run.verdicts` of the run.
    free : pandas.DataFrame or None
        `Run.verdicts` of its control.
    truth : pandas.DataFrame or None
        Ground truth of the run, which marks malicious clients.
    alone : str
        Sentence that the caption gets without a control.

    Returns
    -------
    Block
    """
    tables = [own] if free is None else [own, free]
    clients = max(table.loc[table["weight"].lt(1), "client"].nunique() for table in tables)

    def draw(canvas: Figure) -> None:
        for (ax, control), table in zip(_panels(canvas, free is not None), tables, strict=True):
            plot_weights(table, None if control else truth, ax=ax)
            call(ax, NAMES[control] if free is not None else "This run")

    caption = (
        "What each update counted, of the clients that did not always count in full: \N{MULTIPLICATION SIGN} left out, "
        "a number counted less, white in full, hatched took no part."
    )
    return _pair(draw, 1.8 + 0.2 * min(MOST_CLIENTS, clients), caption, free is not None, alone)


def call(ax: Axes, name: str) -> None:
    """Writes the name of a panel above its title."""
    title = ax.get_title(loc="left")
    ax.set_title(f"{name}\n{title}", loc="left", fontsize="medium", fontweight="bold", parse_math=False)


def _panels(canvas: Figure, pair: bool) -> list[tuple[Axes, bool]]:
    axes = np.atleast_1d(canvas.subplots(1, 2 if pair else 1))
    return list(zip(axes, (False, True), strict=False))


def _pair(draw: Any, height: float, caption: str, pair: bool, alone: str = ALONE) -> Block:
    return figure(draw, (WIDTH, height) if pair else (0.6 * WIDTH, height), caption if pair else f"{caption} {alone}")


def _bias_scale(log: UpdateLog) -> float:
    """Returns the largest |bias update minus median| of the last round, in logits; 0 if the statistic abstains."""
    try:
        return float(np.nanmax(np.abs(final_bias(log).to_numpy()), initial=0.0))
    except CannotSay:
        return 0.0
