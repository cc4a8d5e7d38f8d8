"""What the page on localization says, in sentences computed from its tables; what the theory gets wrong is said too."""

from collections.abc import Mapping
from typing import Any

import pandas as pd

from gradlens.localization import PHASES
from gradlens.plots import CLEAR, PARTLY, count
from gradlens.reporting.page import Block, finding, listed, measured, number, rows_of
from simulations.studies.localization_tables import CENTER, Tables, around_center, is_at

NAMES = {
    "learning_rate": "learning rate",
    "poison_rate": "poison rate",
    "num_malicious": "number of attackers",
    "partition": "label skew",
}
EARLY, LATER = PHASES
NOTABLE_CHANGE = 0.1  # of an AUC
STRONG_CORRELATION = 0.5
UNINFORMATIVE_RANGE = 0.5  # of the expected drift: where it varies so much at a high ASR, the ASR does not tell


def findings(tables: Tables) -> list[Block]:
    """The findings, each computed from the figures, whichever way they fall."""
    along_axes = [along(tables, axis) for axis in CENTER]
    return [
        where(tables),
        moves(tables),
        fades(tables),
        learned(tables),
        *along_axes,
        drowned(tables),
        remains(tables),
    ]


def center_words() -> str:
    """The settings at the center, in words."""
    return ", ".join(f"{NAMES[name] if name != 'partition' else 'data'} {value}" for name, value in CENTER.items())


def auc_words(row: Mapping[str, Any] | pd.Series) -> str:
    """An AUC with its interval."""
    return measured(float(row["auc"]), float(row["low"]), float(row["high"]))


def where(tables: Tables) -> Block:
    """The final bias at the center, early, beside all others."""
    rows = around_center(tables.phases, "partition")
    rows = rows[rows["partition"].eq("iid") & rows["phase"].eq(EARLY)]
    bias = tables.final_bias_in(rows).iloc[0]
    others = rows[rows["auc"].gt(bias["auc"]) & ~is_at(rows, tables.locations[0])]
    better = [f"{row.statistic} in {row.layer}" for row in rows_of(others.sort_values("effect", ascending=False))]
    verb = (
        "carries the signal" if bias["auc"] >= CLEAR else "carries it in part" if bias["auc"] >= PARTLY else "is silent"
    )
    beside = f" {len(better)} other places have a higher AUC, farthest {listed(better[:3])}." if better else ""
    return finding(
        "Where",
        f"At the center ({center_words()}) the final bias {verb} in the {EARLY}: AUC {auc_words(bias)}, control "
        f"{number(bias['control_auc'])}; {number(bias['effect'], 1)} robust sigmas, the farthest benign client of the "
        f"control {number(bias['control_effect'], 1)}.{beside}",
    )


def along(tables: Tables, axis: str) -> Block:
    """How the final bias changes along an axis, early and later."""
    parts = []
    for phase in PHASES:
        rows = around_center(tables.phases, axis)
        rows = tables.final_bias_in(rows[rows["phase"].eq(phase)])
        rows = rows if axis == "partition" else rows.sort_values(axis)
        first, last = rows.iloc[0], rows.iloc[-1]
        change = last["auc"] - first["auc"]
        verb = "rises" if change >= NOTABLE_CHANGE else "falls" if change <= -NOTABLE_CHANGE else "stays"
        ends = [f"{row[axis]:g}" if axis != "partition" else str(row[axis]) for row in (first, last)]
        when = "later" if phase == LATER else f"in the {phase}"
        parts.append(f"{when} it {verb}, from AUC {auc_words(first)} at {ends[0]} to {auc_words(last)} at {ends[1]}")
    name = NAMES[axis]
    return finding(name.capitalize(), f"The final bias along the {name}, the rest at the center: {'; '.join(parts)}.")


def fades(tables: Tables) -> Block:
    """From when on the final bias no longer separates, by learning rate."""
    rows = tables.final_bias_in(around_center(tables.rounds, "learning_rate"))
    points, lost = [], 0
    for rate, part in rows.sort_values("since").groupby("learning_rate"):
        below = part.loc[part["auc"] < PARTLY, "since"]
        lost += len(below) > 0
        when = (
            f"below {PARTLY:g} for the first time in round {int(below.iloc[0])}"
            if len(below)
            else f"never below {PARTLY:g}"
        )
        first, last = part["auc"].iloc[0], part["auc"].iloc[-5:].mean()
        points.append(
            f"learning rate {rate:g}: AUC {number(first)} in the first round, {number(last)} in the last five, {when}"
        )
    sentence = (
        f"At {lost} of {len(points)} learning rates the final bias falls below an AUC of {PARTLY:g} within "
        f"{int(rows['since'].max()) + 1} rounds of attack, the rest at the center."
    )
    return finding("Fades", sentence, points)


def learned(tables: Tables) -> Block:
    """Whether the drift shrinks the more was trained on the poison, and whether the ASR tells."""
    later = around_center(tables.drifts, "learning_rate")
    correlation = rank_correlation(later["learning_rate"] * later["round"], later["share"])
    verb = (
        "shrinks"
        if correlation <= -STRONG_CORRELATION
        else "grows"
        if correlation >= STRONG_CORRELATION
        else "neither shrinks nor grows"
    )
    shares = later.loc[later["asr"] >= CLEAR, "share"]
    span = f"from {number(shares.min())} to {number(shares.max())}" if len(shares) else "not known"
    tells = "does not tell" if len(shares) and shares.max() - shares.min() >= UNINFORMATIVE_RANGE else "tells"
    return finding(
        "Learned",
        f"The drift {verb} as the poison is learned: rank correlation of learning rate x rounds since and the drift's "
        f"share of what was expected {number(correlation)} over {len(later)} rounds. ASR {tells} how much is learned: "
        f"where it is {CLEAR:g} or more already, that share is {span}.",
    )


def rank_correlation(first: pd.Series, second: pd.Series) -> float:
    """Spearman's correlation."""
    return float(first.corr(second, method="spearman"))


def drowned(tables: Tables) -> Block:
    """From which skew on an honest client moves the final bias farther than the attackers."""
    rows = around_center(tables.phases, "partition")
    rows = tables.final_bias_in(rows[rows["phase"].eq(EARLY)])
    lost = [str(row.partition) for row in rows_of(rows) if row.effect < row.control_effect]
    points = [
        f"{row.partition}: attackers {number(row.effect, 1)}, farthest benign client {number(row.control_effect, 1)} "
        f"robust sigmas; AUC {auc_words(row._asdict())}, control {number(row.control_auc)}"
        for row in rows_of(rows)
    ]
    under = f"Under {listed(lost)} an honest client of the control" if lost else "Under no skew tried an honest client"
    return finding("Skew drowns it", f"{under} moves the final bias farther than attackers do in the {EARLY}.", points)


def moves(tables: Tables) -> Block:
    """Whether the drift of the first round is learning rate x steps x share of wrong labels."""
    first = tables.drifts[tables.drifts["round"].eq(0)]
    mean = first.groupby(list(CENTER)[:3])[["drift", "expected", "share"]].mean()
    small = mean[mean["expected"] <= mean["expected"].quantile(0.25)]
    large = mean[mean["expected"] >= mean["expected"].quantile(0.75)]
    within = ": part is learned within the round" if large["share"].mean() < small["share"].mean() else ""
    correlation = rank_correlation(mean["expected"], mean["drift"])
    verb = "follows" if correlation >= CLEAR else "follows in part" if correlation >= PARTLY else "does not follow"
    return finding(
        "How far",
        f"In the first attacked round the target's final bias {verb} learning rate x steps x share of wrong labels: "
        f"rank correlation {number(correlation)} over {len(mean)} combinations. In the quarter of them where that is "
        f"smallest the drift is {number(small['share'].min())} to {number(small['share'].max())} of it, where it is "
        f"largest {number(large['share'].min())} to {number(large['share'].max())}{within}.",
    )


def remains(tables: Tables) -> Block:
    """What separates later, where the final bias no longer does."""
    rows = tables.phases[tables.phases["phase"].eq(LATER)]
    bias = tables.final_bias_in(rows).set_index(list(CENTER))["auc"]
    lost = bias[bias < PARTLY].index
    best = rows.sort_values("auc", ascending=False).drop_duplicates(list(CENTER)).set_index(list(CENTER)).loc[lost]
    still = best[best["auc"] >= CLEAR]
    locations = (still["statistic"] + " in " + still["layer"]).value_counts()
    points = [f"{name}: {count(int(conditions), 'condition')}" for name, conditions in locations.head(5).items()]
    skewed = int(sum(settings[3] != "iid" for settings in best.index.difference(still.index)))
    return finding(
        "What remains",
        f"In {len(lost)} of {len(bias)} conditions the final bias does not separate later (AUC below {PARTLY:g}). In "
        f"{len(still)} of these another statistic still does ({CLEAR:g} or more); nothing does so in "
        f"{len(lost) - len(still)}, {skewed} of them under skew. Which is best:",
        points,
    )
