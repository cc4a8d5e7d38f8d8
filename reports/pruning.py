"""Writes what is left of a backdoor after training's end is mended: `python reports/pruning.py runs/pruning`.

Takes runs, or folders of them, of simulations/scenarios/pruning.toml with their attack-free controls; writes
reports/pruning.csv (its figures: reports/pruning_steps.py) and .html.
"""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from pruning_steps import (
    ADJUSTMENT,
    BETWEEN,
    BOTH,
    BUDGET,
    HOW,
    IMAGES,
    LIES,
    NOTHING,
    PRUNING,
    SHIELDED,
    STEPS,
    TUNED,
    TUNED_ALONE,
    TUNED_ALONE_WITH,
    TUNED_WITH,
    gathered,
)

from gradlens.evaluation import bootstrap
from gradlens.plots import count
from gradlens.plots.axes import BENIGN, MALICIOUS, titled
from gradlens.reporting.page import (
    Block,
    code,
    figure,
    finding,
    finished,
    measured,
    number,
    render,
    section,
    table,
    text,
    write,
)
from gradlens.reporting.provenance import software_table
from gradlens.run import Run, Sweep, open_run

ROOT = Path(__file__).resolve().parents[1]
CSV, HTML = ROOT / "reports/pruning.csv", ROOT / "reports/pruning.html"
RUNS = ["attacked", "attack-free control"]
KEYS = ("model", "partition")
FALLS, GONE = 0.3, 0.2  # an ASR that falls by so much has been acted on; one below has been taken away
NOTABLE = 0.1  # of an ASR
SUBJECT = {
    PRUNING: "Pruning alone", ADJUSTMENT: "Adjustment alone", BOTH: "Pruning with adjustment after it",
    TUNED_ALONE: "Fine-tuning by the benign clients, without any step before it,",
    TUNED_ALONE_WITH: "Fine-tuning with the attacker, without any step before it,",
    TUNED: "Fine-tuning by the benign clients after both", TUNED_WITH: "Fine-tuning with the attacker after both",
    BETWEEN: "Pruning, fine-tuning by the benign clients, and adjustment last",
}  # fmt: skip
ABOUT = {
    PRUNING: "Pruning", ADJUSTMENT: "Adjustment", BOTH: "Both", TUNED_ALONE: "Fine-tuning alone",
    TUNED_ALONE_WITH: "Alone, with the attacker", TUNED: "Fine-tuning after both", TUNED_WITH: "With the attacker",
    BETWEEN: "Fine-tuning between",
}  # fmt: skip
# Wu et al. 2020, abstract: ASR before and after, points of test accuracy lost, on Fashion-MNIST
PAPER = {BOTH: (0.997, 0.019, 5.5), BETWEEN: (0.997, 0.064, 1.7)}
WIDTH = 10.5  # inches


def main(*folders: str) -> None:
    """Both files, from runs or folders of runs."""
    found = gathered([run for folder in folders for run in _runs(folder)])
    found.to_csv(CSV, index=False, float_format="%.4f")
    write(page(pd.read_csv(CSV), [run for folder in folders for run in _runs(folder)]), HTML)


def _runs(folder: str) -> list[Run]:
    found = open_run(folder)
    return found.runs if isinstance(found, Sweep) else [found]


# What is drawn ------------------------------------------------------------------------------------------------


def page(found: pd.DataFrame, runs: Sequence[Run]) -> str:
    """The page as HTML."""
    seeds = found.groupby(list(KEYS))["seed"].nunique()
    lead = (
        f"{sum(seeds)} attacked runs and their attack-free controls ({_places(found)}): {runs[0].scenario['task']}, "
        f"{runs[0].scenario['num_clients']} clients, one of which replaces the global model in the last rounds. The "
        "steps of Wu et al. 2020, taken on the last global model. A budget of "
        f"{100 * BUDGET:g} points of accuracy for each step is kept on {IMAGES:,} test images; figures are of the "
        "other half."
    )
    sections = [
        section("paper", "Beside the paper", beside_the_paper(found)),
        section("steps", "Step by step", step_by_step(found)),
        section("lies", "Clients that lie", clients_that_lie(found)),
        section("curves", "Without a budget", without_a_budget(found)),
        section("provenance", "Where this comes from", provenance(runs)),
    ]
    return render(
        "After training: what pruning and adjustment leave of a backdoor", lead, findings(found), finished(sections)
    )


def _places(found: pd.DataFrame) -> str:
    seeds = found.groupby(list(KEYS), sort=False)["seed"].nunique()
    return ", ".join(f"{_place(key)}: {count(int(n), 'seed')}" for key, n in seeds.items())


def _place(key: Any) -> str:
    return " ".join(map(str, key)).replace("dirichlet", "Dirichlet")


def _groups(rows: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    return [(_place(key), part) for key, part in rows.groupby(list(KEYS), sort=False)]


def _by_model(rows: pd.DataFrame) -> list[pd.DataFrame]:
    """A part per model: each has its own picture."""
    return [part for _, part in rows.groupby("model", sort=False)]


def beside_the_paper(found: pd.DataFrame) -> list[Block]:
    """The paper's figures on Fashion-MNIST, and those of the same steps here."""
    rows = found[found["part"].eq("steps") & found["how"].fillna("ranks").eq("ranks") & ~found["control"].astype(bool)]
    said = []
    for step, (before, after, lost) in PAPER.items():
        said.append({"Where": "the paper", "Step": step, "ASR before": _percent(before), "ASR after": _percent(after)})
        said[-1]["Accuracy lost"] = f"{lost:g} points"
        for place, part in _groups(rows):
            lose = 100 * (_mean(part, NOTHING, "main_accuracy") - _mean(part, step, "main_accuracy"))
            asr = [_percent(_mean(part, which, "asr")) for which in (NOTHING, step)]
            said.append({"Where": place, "Step": step, "ASR before": asr[0], "ASR after": asr[1]})
            said[-1]["Accuracy lost"] = f"{number(lose, 1)} points"
    about = (
        "Wu et al. 2020 give, on Fashion-MNIST, an ASR of 99.7 % that falls to 1.9 % at 5.5 points of accuracy, and to "
        "6.4 % at 1.7 points with fine-tuning after pruning, which is taken here as fine-tuning between the two steps. "
        "Their model, trigger, split and number of rounds were not found: wu_cnn stands in for the model, the other "
        "settings are those of simulations/scenarios/pruning.toml."
    )
    caption = "Means over seeds; channels by the mean of truthful clients' ranks. A negative loss is a gain."
    return [text(about), table(said, caption, folded=False)]


def _percent(share: float) -> str:
    return f"{number(100 * share, 1)} %"


def step_by_step(found: pd.DataFrame) -> list[Block]:
    """A picture per model: ASR above main accuracy, attacked beside control; and the table."""
    rows = found[found["part"].eq("steps") & found["how"].fillna("ranks").eq("ranks")]
    caption = (
        "Every step within its budget, channels by the mean of truthful clients' ranks. Marks: means over seeds, "
        "bars: 95 % intervals over seeds; open grey marks: the attack-free control, the same trigger stamped."
    )
    return [*(figure(_steps_drawn(_groups(own)), (WIDTH, 6.8), caption) for own in _by_model(rows)), steps_table(found)]


def _steps_drawn(groups: list[tuple[str, pd.DataFrame]]) -> Callable[[Figure], None]:
    def draw(canvas: Figure) -> None:
        axes = canvas.subplots(2, len(groups), sharex=True, sharey=True, squeeze=False)
        for (place, part), column in zip(groups, axes.T, strict=True):
            for ax, value, title in zip(column, ("asr", "main_accuracy"), (_asr_title, _accuracy_title), strict=True):
                _dots(ax, part, value)
                titled(ax, f"{place}: {title(part)}")
        canvas.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)

    return draw


def _dots(ax: Axes, part: pd.DataFrame, value: str) -> None:
    """Means with intervals over seeds, step by step downwards, of attacked runs and controls."""
    for is_control, colour, marker, shift in ((False, MALICIOUS, "o", -0.14), (True, BENIGN, "s", 0.14)):
        own = part[part["control"].eq(is_control)]
        for position, step in enumerate(STEPS):
            values = own.loc[own["step"].eq(step), value].to_numpy(np.float64)
            if not len(values):
                continue
            mean, (low, high) = values.mean(), bootstrap(values)
            ax.plot([low, high], [position + shift] * 2, color=colour, linewidth=1.4)
            face = "white" if is_control else colour
            label = RUNS[is_control] if position == 0 else None
            ax.plot(mean, position + shift, marker, color=colour, markerfacecolor=face, linestyle="", label=label)
    ax.set_yticks(range(len(STEPS)), STEPS)
    name = "ASR" if value == "asr" else "main accuracy"
    ax.set(xlim=(-0.03, 1.03), xlabel=f"{name} [share of images]", ylim=(len(STEPS) - 0.5, -0.5))
    ax.tick_params(labelbottom=True)
    ax.spines[["top", "right"]].set_visible(False)


def _asr_title(part: pd.DataFrame) -> str:
    at = {step: _mean(part, step, "asr") for step in STEPS}
    lowest = min((PRUNING, ADJUSTMENT, BOTH), key=lambda step: at[step])
    tuned = f"tuned alone {at[TUNED_ALONE]:.2f}, after both {at[TUNED]:.2f}"
    return f"ASR {at[NOTHING]:.2f}, lowest untuned {at[lowest]:.2f} ({lowest}); {tuned}"


def _accuracy_title(part: pd.DataFrame) -> str:
    at = {step: _mean(part, step, "main_accuracy") for step in STEPS}
    tuned = f"tuned alone {at[TUNED_ALONE]:.2f}, after both {at[TUNED]:.2f}"
    return f"accuracy {at[NOTHING]:.2f}, both {at[BOTH]:.2f}; {tuned}"


def _mean(part: pd.DataFrame, step: str, value: str, *, control: bool = False) -> float:
    return float(part.loc[part["step"].eq(step) & part["control"].eq(control), value].mean())


def steps_table(found: pd.DataFrame) -> Block:
    """Every step in every condition with its interval, by ranks and by votes, attacked and control."""
    rows = found[found["part"].eq("steps")].assign(how=lambda t: t["how"].fillna(""))
    said = [
        {
            "Condition": _place((model, partition)),
            "Run": "control" if is_control else "attacked",
            "Step": step,
            "By": how,
            "Main accuracy": _shown(own["main_accuracy"]),
            "ASR": _shown(own["asr"]),
            "Pruned": number(own["pruned"].mean(), 1),
            "Kept": number(own["kept"].mean(), 1),
        }
        for (model, partition, is_control, step, how), own in rows.groupby(
            [*KEYS, "control", "step", "how"], sort=False
        )
    ]
    caption = "Every step. Pruned, kept: channels, of an adjustment weights. Means with 95 % intervals over seeds."
    return table(said, caption, folded=True)


def _shown(values: pd.Series) -> str:
    array = values.to_numpy(np.float64)
    return measured(float(array.mean()), *bootstrap(array))


def clients_that_lie(found: pd.DataFrame) -> list[Block]:
    """ASR after both steps, and how many channels are pruned, over the number of liars."""
    about = (
        "Liars send well-formed ranks or votes: in reverse order; or with the "
        f"{SHIELDED} channels that the trigger raises most shown as the most active ones. The attacker lies first."
    )
    caption = "Attacked runs by number of liars: means over seeds, bars: 95 % intervals over seeds; kinds side by side."
    models = _by_model(among_liars(found))
    return [text(about), *(figure(_lies_drawn(_groups(own)), (WIDTH, 6.4), caption) for own in models)]


def _lies_drawn(groups: list[tuple[str, pd.DataFrame]]) -> Callable[[Figure], None]:
    kinds = [(how, lie) for how in HOW for lie in LIES]
    whole = pd.concat([part for _, part in groups])
    channels = whole.loc[whole["step"].eq(PRUNING), ["pruned", "kept"]].sum(axis=1).max()

    def draw(canvas: Figure) -> None:
        axes = canvas.subplots(2, len(groups), sharex=True, sharey="row", squeeze=False)
        for (place, part), column in zip(groups, axes.T, strict=True):
            drawn = ((BOTH, "asr", "ASR after both"), (PRUNING, "pruned", "channels pruned"))
            for ax, (step, value, label) in zip(column, drawn, strict=True):
                own = part[part["step"].eq(step)]
                for place_of, kind in enumerate(kinds):
                    _kind(ax, own[own["how"].eq(kind[0]) & own["lie"].eq(kind[1])], value, place_of, ", ".join(kind))
                titled(ax, f"{place}: {_lies_finding(own, value, label)}")
                unit = "[share of images]" if value == "asr" else "[count]"
                ax.set(xlabel="liars [clients of 10]", ylabel=f"{label} {unit}", xticks=sorted(own["liars"].unique()))
                ax.set_ylim(*((-0.03, 1.03) if value == "asr" else (0, channels)))
                ax.spines[["top", "right"]].set_visible(False)
                ax.label_outer()
        canvas.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)

    return draw


def _kind(ax: Axes, rows: pd.DataFrame, value: str, place: int, label: str) -> None:
    """Means with intervals over seeds by number of liars, of one kind of lie, beside those of the other kinds."""
    colour, marker = [("0.1", "o"), ("0.1", "^"), ("0.55", "s"), ("0.55", "D")][place]
    for liars, own in rows.groupby("liars"):
        values, x = own[value].to_numpy(np.float64), liars + 0.14 * (place - 1.5)
        ax.plot([x, x], bootstrap(values), color=colour, linewidth=1.4)
        ax.plot(
            x, values.mean(), marker, color=colour, markerfacecolor="white" if place % 2 else colour,
            label=label if liars == 0 else None,
        )  # fmt: skip


def _lies_finding(rows: pd.DataFrame, value: str, label: str) -> str:
    """The kind of lie that moves a mean furthest with the most liars."""
    means = rows.pivot_table(value, ["how", "lie"], "liars")
    most_liars = int(means.columns.max())
    moved = means[most_liars] - means[0]
    digits = 2 if value == "asr" else 1
    worst = moved.abs().idxmax()
    none, most = (number(float(means.loc[worst, liars]), digits) for liars in (0, most_liars))
    if none == most:
        return f"{label}: no kind of lie by {most_liars} liars moves the mean"
    return f"{label}: {most_liars} liars move it at most from {none} to {most} ({', '.join(worst)})"


def among_liars(found: pd.DataFrame) -> pd.DataFrame:
    """The rows on lies, those of truthful clients as no liar of each kind; attacked runs only."""
    attacked = found[~found["control"].astype(bool)]
    truthful = attacked[attacked["part"].eq("steps") & attacked["step"].isin([PRUNING, BOTH])]
    none = [truthful.assign(lie=lie, liars=0) for lie in LIES]
    return pd.concat([*none, attacked[attacked["part"].eq("lies")]], ignore_index=True)


def without_a_budget(found: pd.DataFrame) -> list[Block]:
    """ASR and accuracy at every delta, and at every share of channels pruned."""
    blocks = []
    for part_name, name, unit in (
        ("deltas", "delta", "standard deviations of a layer's weights"),
        ("channels", "share pruned", "of the last convolution's channels"),
    ):
        label = f"{name} [{unit}]"
        rows = found[found["part"].eq(part_name)]
        rows = rows.melt([*KEYS, "seed", "control", "value"], ["asr", "main_accuracy"], "what", "share")
        rows["what"] = rows["what"].map({"asr": "ASR", "main_accuracy": "main accuracy"})
        rows["run"] = np.where(rows["control"].astype(bool), RUNS[1], RUNS[0])
        caption = f"Without a budget: ASR and main accuracy over the {name}; means over seeds with 95 % intervals."
        for own in _by_model(rows):
            drawn = _curves_drawn(_groups(own), label, "delta" if part_name == "deltas" else "share")
            blocks.append(figure(drawn, (WIDTH, 6.4), caption))
    return blocks


def _curves_drawn(groups: list[tuple[str, pd.DataFrame]], label: str, name: str) -> Callable[[Figure], None]:
    def draw(canvas: Figure) -> None:
        axes = canvas.subplots(2, len(groups), sharex=True, sharey=True, squeeze=False)
        for (place, part), column in zip(groups, axes.T, strict=True):
            said = _curve_findings(part, name)
            for ax, what in zip(column, ("ASR", "main accuracy"), strict=True):
                sns.lineplot(
                    part[part["what"].eq(what)], x="value", y="share", hue="run", hue_order=RUNS, style="run",
                    style_order=RUNS, markers=["o", "s"], dashes=["", (4, 2)], errorbar=("ci", 95),
                    err_style="bars", palette=[MALICIOUS, BENIGN], seed=0, ax=ax,
                )  # fmt: skip
                titled(ax, f"{place}: {said[what]}")
                ax.set(xlabel=label, ylabel=f"{what} [share of images]", ylim=(-0.03, 1.03))
                ax.legend().remove()
                ax.spines[["top", "right"]].set_visible(False)
                ax.label_outer()
        if name == "delta":
            axes[0, 0].invert_xaxis()  # all share it
        canvas.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)

    return draw


def _curve_findings(part: pd.DataFrame, name: str) -> dict[str, str]:
    """The lowest mean ASR, and what accuracy it comes with, beside that of the mildest setting."""
    own = part[part["run"].eq(RUNS[0])].pivot_table(index="value", columns="what", values="share")
    best, mildest = own["ASR"].idxmin(), max(own.index) if name == "delta" else min(own.index)
    asr, accuracy = own["ASR"], own["main accuracy"]
    return {
        "ASR": f"lowest ASR {asr[best]:.2f}, at {name} {best:.2g} ({asr[mildest]:.2f} at {mildest:g})",
        "main accuracy": f"accuracy {accuracy[best]:.2f} at {name} {best:.2g} ({accuracy[mildest]:.2f} at {mildest:g})",
    }


def provenance(runs: Sequence[Run]) -> list[Block]:
    """Commands and software."""
    lines = [
        "# the runs, and this page",
        "gradlens simulate simulations/scenarios/pruning.toml -o runs/pruning",
        "python reports/pruning.py runs/pruning",
    ]
    about = f"Everything above comes from {len(runs)} recorded runs; reports/pruning.csv has the figures."
    return [text(about), code(lines), software_table(runs)]


# What is found ------------------------------------------------------------------------------------------------


def findings(found: pd.DataFrame) -> list[Block]:
    """What each step does, sentences with figures, whichever way they fall."""
    steps = found[found["part"].eq("steps")]
    ranks = steps[steps["how"].fillna("ranks").eq("ranks")]
    return [*(effect(ranks, step) for step in SUBJECT), before_tuning(ranks), ranks_or_votes(steps), liars(found)]


def effect(rows: pd.DataFrame, step: str) -> Block:
    """How far ASR and accuracy fall by a step, in every condition."""
    lines, acted, gone = [], 0, 0
    for place, part in _groups(rows):
        before, after = _mean(part, NOTHING, "asr"), _mean(part, step, "asr")
        acted, gone = acted + (before - after >= FALLS), gone + (after < GONE)
        own = part[~part["control"].astype(bool)]
        change = own[own["step"].eq(step)].set_index("seed")["main_accuracy"]
        change = 100 * (change - own[own["step"].eq(NOTHING)].set_index("seed")["main_accuracy"])
        control = 100 * (
            _mean(part, step, "main_accuracy", control=True) - _mean(part, NOTHING, "main_accuracy", control=True)
        )
        beside = "" if np.isnan(control) else f"; accuracy of the control {number(control, 1)}"
        asr = [_shown(own.loc[own["step"].eq(which), "asr"]) for which in (NOTHING, step)]
        points = number(float(change.mean()), 1)
        lines.append(f"{place}: ASR {asr[0]} to {asr[1]}, accuracy {points} points{beside}")
    of = f"of {count(len(lines), 'condition')}"
    sentence = f"lowers the mean ASR by {FALLS:g} or more in {acted} {of}, to below {GONE:g} in {gone}."
    return finding(ABOUT[step], f"{SUBJECT[step]} {sentence}", lines)


def before_tuning(rows: pd.DataFrame) -> Block:
    """What both steps add to the fine-tuning that follows them, in every condition."""
    lines, apart = [], []
    for place, part in _groups(rows):
        alone, after = (_mean(part, step, "asr") for step in (TUNED_ALONE, TUNED))
        apart.append(after - alone)
        accuracy = [number(_mean(part, step, "main_accuracy")) for step in (TUNED_ALONE, TUNED)]
        lines.append(
            f"{place}: ASR {number(alone)} after fine-tuning alone, {number(after)} with both steps before it; "
            f"accuracy {accuracy[0]} and {accuracy[1]}"
        )
    lower = sum(each <= -NOTABLE for each in apart)
    of = f"of {count(len(lines), 'condition')}"
    said = f"Both steps before fine-tuning lower the mean ASR by {NOTABLE:g} or more in {lower} {of}, against it alone."
    return finding("Worth of the steps", said, lines)


def ranks_or_votes(steps: pd.DataFrame) -> Block:
    """Whether the way in which clients are asked makes a difference."""
    names = (PRUNING, BOTH)
    own = steps[~steps["control"].astype(bool) & steps["step"].isin(names)]
    means = own.groupby(["step", "how"])[["asr", "main_accuracy"]].mean()
    lines = [
        f"{step} by {how}: ASR {number(means.loc[(step, how), 'asr'])}, "
        f"accuracy {number(means.loc[(step, how), 'main_accuracy'])}"
        for step in names
        for how in HOW
    ]
    apart = max(abs(float(means.loc[(step, "ranks"), "asr"] - means.loc[(step, "votes"), "asr"])) for step in names)
    verb = "makes a difference" if apart >= NOTABLE else "makes little difference"
    said = f"Which of them clients send {verb} (mean ASR {number(apart)} apart)."
    return finding("Ranks or votes", said, lines)


def liars(found: pd.DataFrame) -> Block:
    """What lies change against the same steps among truthful clients."""
    means = among_liars(found).groupby(["how", "lie", "step", "liars"])[["asr", "pruned"]].mean()
    most_liars = int(means.index.get_level_values("liars").max())
    lines, rises = [], []
    for how in HOW:
        for lie in LIES:
            none, most = (float(means.loc[(how, lie, BOTH, n), "asr"]) for n in (0, most_liars))
            pruned = [number(float(means.loc[(how, lie, PRUNING, n), "pruned"]), 1) for n in (0, most_liars)]
            rises.append(most - none)
            lines.append(
                f"{how}, {lie}: ASR after both {number(none)} with no liar, {number(most)} with {most_liars}; "
                f"channels pruned {pruned[0]} and {pruned[1]}"
            )
    raised = f"{sum(each >= NOTABLE for each in rises)} of {count(len(rises), 'kind')}"
    said = f"Lies of {most_liars} of 10 clients raise the mean ASR after both steps by {NOTABLE:g} or more in {raised}."
    return finding("Liars", said, lines)


if __name__ == "__main__":
    main(*sys.argv[1:])
