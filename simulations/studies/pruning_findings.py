"""What the page on pruning says, in sentences computed from the rows of `pruning.csv`."""

from typing import Any

import numpy as np
import pandas as pd

from gradlens.evaluation import mean_interval
from gradlens.plots import count
from gradlens.reporting.page import Block, finding, measured, number
from simulations.studies.pruning_steps import (
    ADJUSTMENT,
    BETWEEN,
    BOTH,
    LIES,
    NOTHING,
    PRUNING,
    REPORTED,
    TUNED,
    TUNED_ALONE,
    TUNED_ALONE_WITH,
    TUNED_WITH,
)
from simulations.studies.results import figures_by

CONDITION = ["model", "partition"]
LOWERED, REMOVED = 0.3, 0.2  # an ASR that falls by so much is lowered; one that ends below is removed
NOTABLE = 0.1  # difference of an ASR
TITLES = {
    PRUNING: "Pruning", ADJUSTMENT: "Adjustment", BOTH: "Both", TUNED_ALONE: "Fine-tuning alone",
    TUNED_ALONE_WITH: "Alone, with the attacker", TUNED: "Fine-tuning after both", TUNED_WITH: "With the attacker",
    BETWEEN: "Fine-tuning between",
}  # fmt: skip
SUBJECTS = {
    PRUNING: "Pruning alone", ADJUSTMENT: "Adjustment alone", BOTH: "Pruning with adjustment after it",
    TUNED_ALONE: "Fine-tuning by the benign clients, without any step before it,",
    TUNED_ALONE_WITH: "Fine-tuning with the attacker, without any step before it,",
    TUNED: "Fine-tuning by the benign clients after both", TUNED_WITH: "Fine-tuning with the attacker after both",
    BETWEEN: "Pruning, fine-tuning by the benign clients, and adjustment last",
}  # fmt: skip


def condition_name(condition: Any) -> str:
    """Model and partition, "cnn Dirichlet 0.5"."""
    return " ".join(map(str, condition)).replace("dirichlet", "Dirichlet")


def by_condition(rows: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """The name and the rows of each condition."""
    return [(condition_name(condition), part) for condition, part in rows.groupby(CONDITION, sort=False)]


def by_ranks(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows of steps that rest on the clients' ranks, or on no report at all."""
    return rows[rows["part"].eq("steps") & rows["how"].fillna("ranks").eq("ranks")]


def mean_of(part: pd.DataFrame, step: str, metric: str, *, control: bool = False) -> float:
    """The mean of a metric after a step, over the attacked runs or their controls."""
    return float(part.loc[part["step"].eq(step) & part["control"].eq(control), metric].mean())


def with_interval(values: pd.Series) -> str:
    """A mean over seeds with its interval."""
    array = values.to_numpy(np.float64)
    return measured(float(array.mean()), *mean_interval(array, 0, 1))


def among_liars(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows on lies, those of truthful clients as no liar of each kind; attacked runs only."""
    attacked = rows[~rows["control"].astype(bool)]
    truthful = attacked[attacked["part"].eq("steps") & attacked["step"].isin([PRUNING, BOTH])]
    without_liars = [truthful.assign(lie=lie, liars=0) for lie in LIES]
    return pd.concat([*without_liars, attacked[attacked["part"].eq("lies")]], ignore_index=True)


def findings(rows: pd.DataFrame) -> list[Block]:
    """The findings, each computed from the figures, whichever way they fall."""
    steps = by_ranks(rows)
    return [*(effect(steps, step) for step in SUBJECTS), before_tuning(steps), ranks_or_votes(rows), liars(rows)]


def effect(rows: pd.DataFrame, step: str) -> Block:
    """How far a step lowers ASR and accuracy, in every condition; rows: as of `by_ranks`."""
    points, lowered, removed = [], 0, 0
    for name, part in by_condition(rows):
        before, after = mean_of(part, NOTHING, "asr"), mean_of(part, step, "asr")
        lowered, removed = lowered + (before - after >= LOWERED), removed + (after < REMOVED)
        attacked = part[~part["control"].astype(bool)]
        asr = [with_interval(attacked.loc[attacked["step"].eq(which), "asr"]) for which in (NOTHING, step)]
        changed, unchanged = (
            attacked[attacked["step"].eq(which)].set_index("seed")["main_accuracy"] for which in (step, NOTHING)
        )
        of_control = 100 * (
            mean_of(part, step, "main_accuracy", control=True) - mean_of(part, NOTHING, "main_accuracy", control=True)
        )
        beside = "" if np.isnan(of_control) else f"; accuracy of the control {number(of_control, 1)}"
        change = number(float((100 * (changed - unchanged)).mean()), 1)
        points.append(f"{name}: ASR {asr[0]} to {asr[1]}, accuracy {change} points{beside}")
    sentence = (
        f"{SUBJECTS[step]} lowers the mean ASR by {LOWERED:g} or more in {lowered} of "
        f"{count(len(points), 'condition')}, to below {REMOVED:g} in {removed}."
    )
    return finding(TITLES[step], sentence, points)


def before_tuning(rows: pd.DataFrame) -> Block:
    """What both steps add to the fine-tuning that follows them, in every condition; rows: as of `by_ranks`."""
    points, differences = [], []
    for name, part in by_condition(rows):
        alone, after = (mean_of(part, step, "asr") for step in (TUNED_ALONE, TUNED))
        differences.append(after - alone)
        accuracy = [number(mean_of(part, step, "main_accuracy")) for step in (TUNED_ALONE, TUNED)]
        points.append(
            f"{name}: ASR {number(alone)} after fine-tuning alone, {number(after)} with both steps before it; "
            f"accuracy {accuracy[0]} and {accuracy[1]}"
        )
    lower = sum(difference <= -NOTABLE for difference in differences)
    sentence = (
        f"With both steps before it, fine-tuning ends with a mean ASR lower by {NOTABLE:g} or more in {lower} of "
        f"{count(len(points), 'condition')}, compared with fine-tuning alone."
    )
    return finding("Worth of the steps", sentence, points)


def ranks_or_votes(rows: pd.DataFrame) -> Block:
    """Whether it makes a difference what clients report."""
    steps = (PRUNING, BOTH)
    attacked = rows[rows["part"].eq("steps") & ~rows["control"].astype(bool) & rows["step"].isin(steps)]
    asr, accuracy = (figures_by(attacked, ["step", "how"], metric) for metric in ("asr", "main_accuracy"))
    points = [
        f"{step} by {how}: ASR {number(asr[step, how])}, accuracy {number(accuracy[step, how])}"
        for step in steps
        for how in REPORTED
    ]
    difference = max(abs(asr[step, "ranks"] - asr[step, "votes"]) for step in steps)
    verb = "makes a difference" if difference >= NOTABLE else "makes little difference"
    sentence = f"Whether clients send ranks or votes {verb} (mean ASR {number(difference)} apart)."
    return finding("Ranks or votes", sentence, points)


def liars(rows: pd.DataFrame) -> Block:
    """What lies change, beside the same steps among truthful clients."""
    reports = among_liars(rows)
    asr, pruned = (figures_by(reports, ["how", "lie", "step", "liars"], metric) for metric in ("asr", "pruned"))
    most = int(reports["liars"].max())
    points, rises = [], []
    for how in REPORTED:
        for lie in LIES:
            truthful, lied = (asr[how, lie, BOTH, n] for n in (0, most))
            channels = [number(pruned[how, lie, PRUNING, n], 1) for n in (0, most)]
            rises.append(lied - truthful)
            points.append(
                f"{how}, {lie}: ASR after both {number(truthful)} with no liar, {number(lied)} with {most}; "
                f"channels pruned {channels[0]} and {channels[1]}"
            )
    raised = f"{sum(rise >= NOTABLE for rise in rises)} of {count(len(rises), 'kind')}"
    sentence = f"Lies of {most} of 10 clients raise the mean ASR after both steps by {NOTABLE:g} or more in {raised}."
    return finding("Liars", sentence, points)
