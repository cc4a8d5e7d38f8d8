"""The page on pruning: pictures, tables and sentences, all computed from `pruning.csv`."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gradlens.evaluation import mean_interval
from gradlens.plots import count
from gradlens.plots.axes import BENIGN, MALICIOUS, titled
from gradlens.reporting.page import Block, code, figure, finished, number, render, section, table, text
from gradlens.reporting.provenance import software_table
from gradlens.run import Run
from simulations.studies import STUDIES
from simulations.studies.pruning_findings import (
    CONDITION,
    among_liars,
    by_condition,
    by_ranks,
    condition_name,
    findings,
    mean_of,
    with_interval,
)
from simulations.studies.pruning_steps import (
    ADJUSTMENT,
    BETWEEN,
    BOTH,
    BUDGET,
    LIES,
    NOTHING,
    NUM_SHIELDED,
    PRUNING,
    REPORTED,
    STEPS,
    TUNED,
    TUNED_ALONE,
    VALIDATION_IMAGES,
)

RUNS = ["attacked", "attack-free control"]
# Wu et al. 2020, abstract: ASR before and after, points of test accuracy lost, on Fashion-MNIST
PAPER = {BOTH: (0.997, 0.019, 5.5), BETWEEN: (0.997, 0.064, 1.7)}
CURVES = (  # part of the table, what its values are, their unit, short name
    ("deltas", "delta", "standard deviations of a layer's weights", "delta"),
    ("channels", "share pruned", "of the last convolution's channels", "share"),
)
DASHES: Any = ["", (4, 2)]
WIDTH = 10.5  # inches


def page(rows: pd.DataFrame, runs: Sequence[Run]) -> str:
    """The page as HTML, from the rows of `pruning.csv` and the runs that they were computed from."""
    seeds = rows.groupby(CONDITION, sort=False)["seed"].nunique()
    conditions = ", ".join(f"{condition_name(key)}: {count(int(n), 'seed')}" for key, n in seeds.items())
    lead = (
        f"{sum(seeds)} attacked runs and their attack-free controls ({conditions}): {runs[0].scenario['task']}, "
        f"{runs[0].scenario['num_clients']} clients, one of which replaces the global model in the last rounds. The "
        "steps of Wu et al. 2020 are taken on the last global model. Each step keeps to a budget of "
        f"{100 * BUDGET:g} points of accuracy on {VALIDATION_IMAGES:,} test images; figures are of the other half."
    )
    sections = [
        section("paper", "Beside the paper", beside_the_paper(rows)),
        section("steps", "Step by step", step_by_step(rows)),
        section("lies", "Clients that lie", clients_that_lie(rows)),
        section("curves", "Without a budget", without_a_budget(rows)),
        section("provenance", "Where this comes from", provenance(runs)),
    ]
    title = "After training: what pruning and adjustment leave of a backdoor"
    return render(title, lead, findings(rows), finished(sections))


def _by_model(rows: pd.DataFrame) -> list[pd.DataFrame]:
    """The rows of each model, which has a picture of its own."""
    return [part for _, part in rows.groupby("model", sort=False)]


def beside_the_paper(rows: pd.DataFrame) -> list[Block]:
    """The paper's figures on Fashion-MNIST, and those of the same steps here."""
    steps = by_ranks(rows)
    steps = steps[~steps["control"].astype(bool)]
    listing = []
    for step, (before, after, lost) in PAPER.items():
        listing.append(_paper_row("the paper", step, before, after, f"{lost:g} points"))
        for name, part in by_condition(steps):
            loss = 100 * (mean_of(part, NOTHING, "main_accuracy") - mean_of(part, step, "main_accuracy"))
            before_here, after_here = (mean_of(part, which, "asr") for which in (NOTHING, step))
            listing.append(_paper_row(name, step, before_here, after_here, f"{number(loss, 1)} points"))
    about = (
        "On Fashion-MNIST Wu et al. 2020 report an ASR of 99.7 % that falls to 1.9 % at a cost of 5.5 points of "
        "accuracy, and to 6.4 % at a cost of 1.7 points with fine-tuning after pruning, which is read here as "
        "fine-tuning between the two steps. Their model, trigger, split and number of rounds were not found: wu_cnn "
        "stands in for the model, and the other settings are those of simulations/scenarios/pruning.toml."
    )
    caption = "Means over seeds; channels by the mean of truthful clients' ranks. A negative loss is a gain."
    return [text(about), table(listing, caption, folded=False)]


def _paper_row(where: str, step: str, before: float, after: float, lost: str) -> dict[str, str]:
    asr = [f"{number(100 * rate, 1)} %" for rate in (before, after)]
    return {"Where": where, "Step": step, "ASR before": asr[0], "ASR after": asr[1], "Accuracy lost": lost}


# Step by step ----------------------------------------------------------------------------------------------------


def step_by_step(rows: pd.DataFrame) -> list[Block]:
    """A picture per model: ASR above main accuracy, attacked beside control; and the table."""
    caption = (
        "Every step within its budget, channels by the mean of truthful clients' ranks. Marks: means over seeds, "
        "bars: 95 % intervals over seeds; open grey marks: the attack-free control, with the same trigger."
    )
    models = _by_model(by_ranks(rows))
    return [*(figure(_steps_picture(by_condition(part)), (WIDTH, 6.8), caption) for part in models), steps_table(rows)]


def _steps_picture(conditions: list[tuple[str, pd.DataFrame]]) -> Callable[[Figure], None]:
    def draw(canvas: Figure) -> None:
        axes = canvas.subplots(2, len(conditions), sharex=True, sharey=True, squeeze=False)
        for (name, part), (upper, lower) in zip(conditions, axes.T, strict=True):
            _dots(upper, part, "asr")
            titled(upper, f"{name}: {_asr_title(part)}")
            _dots(lower, part, "main_accuracy")
            titled(lower, f"{name}: {_accuracy_title(part)}")
        canvas.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)

    return draw


def _dots(ax: Axes, part: pd.DataFrame, metric: str) -> None:
    """Means with intervals over seeds, step by step downwards, of attacked runs and controls."""
    for is_control, color, marker, shift in ((False, MALICIOUS, "o", -0.14), (True, BENIGN, "s", 0.14)):
        runs = part[part["control"].eq(is_control)]
        for position, step in enumerate(STEPS):
            values = runs.loc[runs["step"].eq(step), metric].to_numpy(np.float64)
            if not len(values):
                continue
            mean, (low, high) = values.mean(), mean_interval(values, 0, 1)
            ax.plot([low, high], [position + shift] * 2, color=color, linewidth=1.4)
            face = "white" if is_control else color
            label = RUNS[is_control] if position == 0 else None
            ax.plot(mean, position + shift, marker, color=color, markerfacecolor=face, linestyle="", label=label)
    ax.set_yticks(range(len(STEPS)), STEPS)
    name = "ASR" if metric == "asr" else "main accuracy"
    ax.set(xlim=(-0.03, 1.03), xlabel=f"{name} [share of images]", ylim=(len(STEPS) - 0.5, -0.5))
    ax.tick_params(labelbottom=True)
    ax.spines[["top", "right"]].set_visible(False)


def _asr_title(part: pd.DataFrame) -> str:
    asr = {step: mean_of(part, step, "asr") for step in STEPS}
    lowest = min((PRUNING, ADJUSTMENT, BOTH), key=lambda step: asr[step])
    tuned = f"tuned alone {asr[TUNED_ALONE]:.2f}, after both {asr[TUNED]:.2f}"
    return f"ASR {asr[NOTHING]:.2f}, lowest untuned {asr[lowest]:.2f} ({lowest}); {tuned}"


def _accuracy_title(part: pd.DataFrame) -> str:
    accuracy = {step: mean_of(part, step, "main_accuracy") for step in STEPS}
    tuned = f"tuned alone {accuracy[TUNED_ALONE]:.2f}, after both {accuracy[TUNED]:.2f}"
    return f"accuracy {accuracy[NOTHING]:.2f}, both {accuracy[BOTH]:.2f}; {tuned}"


def steps_table(rows: pd.DataFrame) -> Block:
    """Every step in every condition with its interval, by ranks and by votes, attacked and control."""
    steps = rows[rows["part"].eq("steps")]
    steps = steps.assign(how=steps["how"].fillna(""))
    listing = [
        {
            "Condition": condition_name((model, partition)),
            "Run": "control" if is_control else "attacked",
            "Step": step,
            "By": how,
            "Main accuracy": with_interval(part["main_accuracy"]),
            "ASR": with_interval(part["asr"]),
            "Pruned": number(part["pruned"].mean(), 1),
            "Kept": number(part["kept"].mean(), 1),
        }
        for (model, partition, is_control, step, how), part in steps.groupby(
            [*CONDITION, "control", "step", "how"], sort=False
        )
    ]
    caption = "Every step. Pruned, kept: channels; of an adjustment, weights. Means with 95 % intervals over seeds."
    return table(listing, caption, folded=True)


# Clients that lie ------------------------------------------------------------------------------------------------


def clients_that_lie(rows: pd.DataFrame) -> list[Block]:
    """ASR after both steps, and how many channels are pruned, over the number of liars."""
    about = (
        "Liars send well-formed ranks or votes: in reverse order, or with the "
        f"{NUM_SHIELDED} channels that the trigger raises most reported as the most active ones. The attacker is the "
        "first liar."
    )
    caption = "Attacked runs by number of liars: means over seeds, bars: 95 % intervals over seeds; kinds side by side."
    models = _by_model(among_liars(rows))
    return [text(about), *(figure(_lies_picture(by_condition(part)), (WIDTH, 6.4), caption) for part in models)]


def _lies_picture(conditions: list[tuple[str, pd.DataFrame]]) -> Callable[[Figure], None]:
    kinds = [(how, lie) for how in REPORTED for lie in LIES]
    whole = pd.concat([part for _, part in conditions])
    channels = whole.loc[whole["step"].eq(PRUNING), ["pruned", "kept"]].sum(axis=1).max()
    panels = ((BOTH, "asr", "ASR after both"), (PRUNING, "pruned", "channels pruned"))

    def draw(canvas: Figure) -> None:
        axes = canvas.subplots(2, len(conditions), sharex=True, sharey="row", squeeze=False)
        for (name, part), column in zip(conditions, axes.T, strict=True):
            for ax, (step, metric, label) in zip(column, panels, strict=True):
                rows = part[part["step"].eq(step)]
                for position, (how, lie) in enumerate(kinds):
                    of_kind = rows[rows["how"].eq(how) & rows["lie"].eq(lie)]
                    _marks_of_kind(ax, of_kind, metric, position, f"{how}, {lie}")
                titled(ax, f"{name}: {_lies_title(rows, metric, label)}")
                unit = "[share of images]" if metric == "asr" else "[count]"
                ax.set(xlabel="liars [clients of 10]", ylabel=f"{label} {unit}", xticks=sorted(rows["liars"].unique()))
                ax.set_ylim(*((-0.03, 1.03) if metric == "asr" else (0, channels)))
                ax.spines[["top", "right"]].set_visible(False)
                ax.label_outer()
        canvas.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)

    return draw


def _marks_of_kind(ax: Axes, rows: pd.DataFrame, metric: str, position: int, label: str) -> None:
    """Means with intervals over seeds by number of liars, of one kind of lie, beside those of the other kinds."""
    color, marker = [("0.1", "o"), ("0.1", "^"), ("0.55", "s"), ("0.55", "D")][position]
    most = 1.0 if metric == "asr" else np.inf
    for liars in sorted(rows["liars"].unique()):
        values, x = rows.loc[rows["liars"].eq(liars), metric].to_numpy(np.float64), liars + 0.14 * (position - 1.5)
        ax.plot([x, x], mean_interval(values, 0, most), color=color, linewidth=1.4)
        ax.plot(
            x, values.mean(), marker, color=color, markerfacecolor="white" if position % 2 else color,
            label=label if liars == 0 else None,
        )  # fmt: skip


def _lies_title(rows: pd.DataFrame, metric: str, label: str) -> str:
    """The kind of lie that moves a mean furthest with the most liars."""
    means = rows.pivot_table(metric, ["how", "lie"], "liars")
    most = int(means.columns.max())
    moved = (means[most] - means[0]).abs()
    digits = 2 if metric == "asr" else 1
    how, lie = moved.index[int(moved.to_numpy().argmax())]
    before, after = (number(float(means[liars].to_dict()[how, lie]), digits) for liars in (0, most))
    if before == after:
        return f"{label}: no kind of lie by {most} liars moves the mean"
    return f"{label}: {most} liars move it at most from {before} to {after} ({how}, {lie})"


# Without a budget, provenance ------------------------------------------------------------------------------------


def without_a_budget(rows: pd.DataFrame) -> list[Block]:
    """ASR and accuracy at every delta, and at every share of channels pruned."""
    blocks = []
    for part_name, name, unit, short_name in CURVES:
        values = rows[rows["part"].eq(part_name)]
        values = values.melt([*CONDITION, "seed", "control", "value"], ["asr", "main_accuracy"], "what", "share")
        values["what"] = values["what"].map({"asr": "ASR", "main_accuracy": "main accuracy"})
        values["run"] = np.where(values["control"].astype(bool), RUNS[1], RUNS[0])
        caption = f"Without a budget: ASR and main accuracy over the {name}; means over seeds with 95 % intervals."
        for part in _by_model(values):
            draw = _curves_picture(by_condition(part), f"{name} [{unit}]", short_name)
            blocks.append(figure(draw, (WIDTH, 6.4), caption))
    return blocks


def _curves_picture(conditions: list[tuple[str, pd.DataFrame]], label: str, name: str) -> Callable[[Figure], None]:
    def draw(canvas: Figure) -> None:
        axes = canvas.subplots(2, len(conditions), sharex=True, sharey=True, squeeze=False)
        for (condition, part), column in zip(conditions, axes.T, strict=True):
            titles = _curve_titles(part, name)
            for ax, what in zip(column, ("ASR", "main accuracy"), strict=True):
                sns.lineplot(
                    part[part["what"].eq(what)], x="value", y="share", hue="run", hue_order=RUNS, style="run",
                    style_order=RUNS, markers=["o", "s"], dashes=DASHES,
                    errorbar=partial(mean_interval, least=0, most=1), err_style="bars",
                    palette=[MALICIOUS, BENIGN], ax=ax,
                )  # fmt: skip
                titled(ax, f"{condition}: {titles[what]}")
                ax.set(xlabel=label, ylabel=f"{what} [share of images]", ylim=(-0.03, 1.03))
                ax.legend().remove()
                ax.spines[["top", "right"]].set_visible(False)
                ax.label_outer()
        if name == "delta":
            axes[0, 0].invert_xaxis()  # which all share
        canvas.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)

    return draw


def _curve_titles(part: pd.DataFrame, name: str) -> dict[str, str]:
    """The lowest mean ASR and the accuracy it comes with, beside those of the mildest setting."""
    means = part[part["run"].eq(RUNS[0])].pivot_table(index="value", columns="what", values="share")
    values = means.index.to_numpy(np.float64).tolist()
    asr, accuracy = (dict(zip(values, means[name].tolist(), strict=True)) for name in ("ASR", "main accuracy"))
    best = min(asr, key=lambda value: asr[value])
    mildest = max(asr) if name == "delta" else min(asr)
    return {
        "ASR": f"lowest ASR {asr[best]:.2f}, at {name} {best:.2g} ({asr[mildest]:.2f} at {mildest:g})",
        "main accuracy": f"accuracy {accuracy[best]:.2f} at {name} {best:.2g} ({accuracy[mildest]:.2f} at {mildest:g})",
    }


def provenance(runs: Sequence[Run]) -> list[Block]:
    """Commands and software."""
    about = f"Everything above comes from {len(runs)} recorded runs; reports/pruning.csv has the figures."
    return [text(about), code(["# the runs, and this page", *STUDIES["pruning"].commands]), software_table(runs)]
