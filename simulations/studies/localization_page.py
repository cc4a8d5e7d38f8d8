"""The page on localization: pictures, tables and sentences, all computed from its tables."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from gradlens.localization import PHASES
from gradlens.plots import CLEAR, PARTLY, count, plot_localization_along
from gradlens.plots.axes import titled
from gradlens.reporting.page import (
    Block,
    code,
    figure,
    finished,
    listed,
    number,
    render,
    rows_of,
    section,
    table,
    text,
)
from gradlens.reporting.provenance import software_table
from simulations.studies import STUDIES
from simulations.studies.localization_findings import EARLY, LATER, NAMES, auc_words, center_words, findings
from simulations.studies.localization_tables import CENTER, Location, Tables, around_center

SHOWN_ROUNDS = {0, 2, 5, 10}  # in the table, and the last one
WIDTH = 10.5  # inches of two panels


def page(tables: Tables) -> str:
    """The page as HTML."""
    runs = tables.sweep.runs
    attacked = int((~tables.sweep.settings["control"].astype(bool)).sum())
    scenario = runs[0].scenario
    lead = (
        f"{attacked} attacked runs and {len(runs) - attacked} attack-free controls: {scenario['task']}, "
        f"{scenario['model']}, {scenario['num_clients']} clients, {scenario['rounds']} rounds, an unboosted trigger in "
        "every round. Learning rate, poison rate and number of attackers in all combinations on iid data; skew around "
        f"the center ({center_words()}) at every learning rate."
    )
    sections = [
        section("axes", "Along each axis", along_each_axis(tables)),
        section("rounds", "Since the attack began", since_it_began(tables)),
        section("product", "All combinations", all_combinations(tables)),
        section("theory", "How far the bias moves", how_far(tables)),
        section("provenance", "Where this comes from", provenance(tables)),
    ]
    return render("Where poisoned updates differ, and when that fades", lead, findings(tables), finished(sections))


# Along each axis, and round by round -----------------------------------------------------------------------------


def along_each_axis(tables: Tables) -> list[Block]:
    """A picture per axis, early beside later, and for skew how far as well."""
    about = (
        "One setting at a time differs from the center. Thin grey lines with open marks are the attack-free control "
        "with the same clients called malicious. Bars are 95 % intervals over seeds."
    )
    blocks = [text(about)]
    for axis in CENTER:
        rows = around_center(tables.phases, axis)
        caption = f"AUC against the {NAMES[axis]}, the rest at the center."
        blocks.append(_panels(rows, "phase", PHASES, axis, tables.locations, caption))
    caption = (
        "The same against skew in robust sigmas: how far attackers stand out, and how far the farthest benign client "
        "of the control does. Where the grey mark lies above its line, an honest client moves that tensor farther."
    )
    skewed = around_center(tables.phases, "partition")
    return [*blocks, _panels(skewed, "phase", PHASES, "partition", tables.locations, caption, "effect")]


def _panels(
    rows: pd.DataFrame,
    by: str,
    values: Sequence[Any],
    axis: str,
    locations: Sequence[Location],
    caption: str,
    measure: str = "auc",
) -> Block:
    """A panel for each of two values of a column, along an axis."""

    def draw(canvas: Figure) -> None:
        for ax, value in zip(canvas.subplots(1, len(values), sharey=True), values, strict=True):
            plot_localization_along(rows[rows[by].eq(value)], axis, places=locations, measure=measure, ax=ax)
            name = f"{NAMES.get(by, by)} {value:g}" if isinstance(value, float) else str(value)
            title = f"{name[0].upper()}{name[1:]}\n{ax.get_title(loc='left')}"
            ax.set_title(title, loc="left", fontsize="medium", fontweight="bold", parse_math=False)

    return figure(draw, (WIDTH, 4.4), caption)


def since_it_began(tables: Tables) -> list[Block]:
    """Round by round at the lowest and the highest learning rate, and when the final bias has faded."""
    rows = around_center(tables.rounds, "learning_rate")
    rates = sorted(rows["learning_rate"].unique())
    caption = "AUC of single rounds since the attack began, all else at the center; bars: 95 % intervals over seeds."
    panels = _panels(rows, "learning_rate", [rates[0], rates[-1]], "since", tables.locations, caption)
    return [panels, fading_table(tables)]


def fading_table(tables: Tables) -> Block:
    """Per learning rate: ASR, and the AUC of the final bias and of the best statistic, in some rounds."""
    rounds, rows = around_center(tables.rounds, "learning_rate"), []
    drifts = around_center(tables.drifts, "learning_rate")
    for rate, part in rounds.groupby("learning_rate"):
        for since in sorted({*SHOWN_ROUNDS, int(part["since"].max())} & set(part["since"])):
            places = rows_of(part[part["since"].eq(since)])
            bias = next(row for row in places if (row.layer, row.statistic) == tables.locations[0])
            best = max(places, key=lambda row: row.auc)
            drift = drifts[drifts["learning_rate"].eq(rate) & drifts["round"].eq(since)]
            rows.append(
                {
                    "Learning rate": f"{rate:g}",
                    "Rounds since": str(since),
                    "ASR before": number(drift["asr"].mean()),
                    "Drift share": number(drift["share"].mean()),
                    "Final bias": auc_words(bias._asdict()),
                    "Its control": number(bias.control_auc),
                    "Best": f"{best.statistic} in {best.layer}",
                    "Its AUC": auc_words(best._asdict()),
                }
            )
    caption = (
        "The final bias round by round. ASR: of the model that the round starts from. Drift share: how far the "
        "attackers' final bias of the target moves, over learning rate x steps x share of wrong labels. Best: of the "
        "four that the picture shows."
    )
    return table(rows, caption, folded=False)


# All combinations ------------------------------------------------------------------------------------------------


def all_combinations(tables: Tables) -> list[Block]:
    """The AUC of the final bias in every combination, early and later."""
    rows = tables.final_bias_in(tables.phases[tables.phases["partition"].eq("iid")])
    numbers = sorted(rows["num_malicious"].unique())

    def draw(canvas: Figure) -> None:
        axes = canvas.subplots(2, len(numbers), sharex=True, sharey=True, squeeze=False)
        for line, phase in zip(axes, PHASES, strict=True):
            for ax, attackers in zip(line, numbers, strict=True):
                _heat_map(ax, rows[rows["phase"].eq(phase) & rows["num_malicious"].eq(attackers)], attackers, phase)
                ax.set(xlabel="learning rate" if phase == LATER else "", ylabel="poison rate" if ax is line[0] else "")

    layer, statistic = tables.locations[0]
    caption = f"AUC of {statistic} in {layer} in every combination on iid data, mean over seeds."
    return [figure(draw, (WIDTH, 5.0), caption), text(_combinations_sentence(rows))]


def _heat_map(ax: Axes, rows: pd.DataFrame, attackers: int, phase: str) -> None:
    grid = rows.pivot_table(index="poison_rate", columns="learning_rate", values="auc").iloc[::-1]
    sns.heatmap(
        grid, annot=True, fmt=".2f", cmap="vlag", vmin=0, vmax=1, cbar=False, linewidths=0.6, ax=ax,
        linecolor="white", annot_kws={"fontsize": "small"},
    )  # fmt: skip
    low, high = grid.to_numpy().min(), grid.to_numpy().max()
    ax.set_title(f"{count(attackers, 'attacker')}, {phase}\nAUC {low:.2f} to {high:.2f}", fontsize="small")


def _combinations_sentence(rows: pd.DataFrame) -> str:
    parts = []
    for phase in PHASES:
        aucs = rows.loc[rows["phase"].eq(phase), "auc"]
        when = phase if phase == EARLY else "later rounds"
        combinations = f"{(aucs >= CLEAR).sum()} of {len(aucs)} combinations ({(aucs < PARTLY).sum()} below {PARTLY:g})"
        parts.append(f"in the {when} at {CLEAR:g} or more in {combinations}")
    inverted = rows[rows["auc"] < 1 - PARTLY]
    attackers = [count(int(number_of), "attacker") for number_of in sorted(inverted["num_malicious"].unique())]
    below = (
        f" Below {1 - PARTLY:.1g} it lies in {len(inverted)} cells, of {listed(attackers)}: there benign clients are "
        "the unusual ones."
    )
    return f"The AUC of the final bias is {' and '.join(parts)}.{below if len(inverted) else ''}"


# How far the bias moves ------------------------------------------------------------------------------------------


def how_far(tables: Tables) -> list[Block]:
    """The first round's drift against learning rate x steps x wrong labels, and what becomes of it."""
    first, later = tables.drifts[tables.drifts["round"].eq(0)], around_center(tables.drifts, "learning_rate")
    mean = first.groupby(list(CENTER)[:3], as_index=False)[["drift", "expected", "share"]].mean()
    style: dict[str, Any] = {
        "hue": "learning_rate",
        "style": "learning_rate",
        "palette": "cividis",
        "hue_norm": (0, 0.3),
    }

    def draw(canvas: Figure) -> None:
        left, right = canvas.subplots(1, 2)
        sns.scatterplot(mean, x="expected", y="drift", s=40, ax=left, **style)
        ends = [mean["expected"].min(), mean["expected"].max()]
        left.plot(ends, ends, color="0.5", linestyle=":", label="as expected")
        left.set(xscale="log", yscale="log", ylabel="drift of the target's final bias [logits]")
        left.set_xlabel("learning rate x steps x share of wrong labels [logits]")
        sns.lineplot(later, x="round", y="share", markers=True, dashes=True, errorbar=None, ax=right, **style)
        right.set(ylim=(0, None), xlabel="rounds since the attack began", ylabel="drift, share of the expected")
        right.xaxis.set_major_locator(MaxNLocator(integer=True))
        for ax, title in ((left, _drift_title(mean)), (right, _share_title(later))):
            ax.legend(title="learning rate", frameon=False)
            ax.spines[["top", "right"]].set_visible(False)
            titled(ax, title)

    caption = (
        "Left: the first attacked round, a mark per combination, mean over seeds: the attackers' drift of the target's "
        "final bias minus the benign clients', against what it would be if nothing were learned on the way (dotted). "
        "Right: the drift as a share of that, round by round, all but the learning rate at the center."
    )
    return [figure(draw, (WIDTH, 4.4), caption), drift_table(mean)]


def _drift_title(mean: pd.DataFrame) -> str:
    ordered = mean.sort_values("expected")
    low, high = ordered["expected"].iloc[0], ordered["expected"].iloc[-1]
    shares = [ordered.loc[ordered["expected"].eq(end), "share"].mean() for end in (low, high)]
    return (
        f"Drift: {shares[0]:.2f} of the expected where that is {low:.2g} logits, {shares[1]:.2f} where it is {high:.2g}"
    )


def _share_title(later: pd.DataFrame) -> str:
    shares = later.pivot_table(index="learning_rate", columns="round", values="share")
    rates, values = shares.index.to_numpy(np.float64), shares.to_numpy(np.float64)
    parts = [f"{values[i, 0]:.2f} to {values[i, -1]:.2f} at {rates[i]:g}" for i in (0, -1)]
    return f"Round by round the drift goes from {', '.join(parts)}"


def drift_table(mean: pd.DataFrame) -> Block:
    """Drift and what was expected in every combination."""
    rows = [
        {
            "Learning rate": f"{row.learning_rate:g}",
            "Poison rate": f"{row.poison_rate:g}",
            "Attackers": str(row.num_malicious),
            "Drift [logits]": number(row.drift, 3),
            "Expected [logits]": number(row.expected, 3),
            "Share": number(row.share),
        }
        for row in rows_of(mean)
    ]
    return table(rows, "Drift of the target's final bias in the first attacked round. Means over seeds.", folded=True)


def provenance(tables: Tables) -> list[Block]:
    """Commands and software."""
    runs = tables.sweep.runs
    about = f"Everything above comes from {len(runs)} recorded runs; reports/localization.csv has the figures."
    return [text(about), code(["# the runs, and this page", *STUDIES["localization"].commands]), software_table(runs)]
