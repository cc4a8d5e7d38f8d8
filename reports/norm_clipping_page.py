"""The page on norm clipping and weak DP: pictures, tables and sentences, all from the table of norm_clipping.py."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from norm_clipping_findings import (
    BOUNDED,
    CONTROL,
    LINES,
    NO_DEFENCE,
    PAPER_NORM,
    UNCONSTRAINED,
    Figure95,
    Place,
    along_setting,
    cost,
    findings,
    its_attack,
    multiple,
    of_rule,
    places_of,
)

from gradlens.plots import count, percent
from gradlens.plots.axes import BENIGN, DASHES, MALICIOUS, titled
from gradlens.reporting.page import (
    Block,
    code,
    figure,
    finished,
    heading,
    listed,
    measured,
    number,
    render,
    section,
    table,
    text,
)
from gradlens.reporting.provenance import software_table
from gradlens.run import Run

VALUES = {"asr": "ASR", "main_accuracy": "main accuracy"}
OF_CONTROL = {"asr": "control_asr", "main_accuracy": "control_accuracy"}
MARKERS = ["o", "s", "^", "D", "v", "P", "X"]
WIDTH = 10.5  # inches


def page(found: pd.DataFrame, runs: Sequence[Run]) -> str:
    """The page as HTML."""
    places = places_of(found)
    attacked = sum(len(place.runs) - len(place.free) for place in places)
    seeds = min(place.runs["seed"].nunique() for place in places)
    lead = (
        f"{attacked} attacked runs and {sum(len(place.free) for place in places)} attack-free controls, "
        f"{count(seeds, 'seed')} of each: {'; '.join(_setting(place, runs) for place in places)}. The attack of Sun et "
        "al. 2019: the 7s of some clients shown as 1s, each such client one task. Held against their norm clipping and "
        "weak differential privacy, at far smaller scale than theirs (3,383 writers, 300 rounds)."
    )
    sections = [
        section("bounds", "What each bound does", [each for place in places for each in bounds(place)]),
        section("rounds", "Over rounds", [each for place in places for each in over_rounds(place)]),
        section("cells", "Over attackers and tasks", [each for place in places for each in over_cells(place)]),
        section("norms", "Benign norms and the bounds", norms(places)),
        section("detectors", "If clipping does not stop it: what detectors see", detectors(places)),
        section("deviations", "What differs from the paper", [text(each) for each in DEVIATIONS]),
        section("provenance", "Where this comes from", provenance(places, runs)),
    ]
    return render("Norm clipping and weak DP against a backdoor", lead, findings(places), finished(sections))


def _setting(place: Place, runs: Sequence[Run]) -> str:
    scenario = next(run.scenario for run in runs if f"{run.scenario['task']}, {run.scenario['model']}" == place.name)
    cohort = scenario["clients_per_round"] or scenario["num_clients"]
    return (
        f"{place.name}, {scenario['num_clients']} clients ({listed(list(scenario['partition']))}) x "
        f"{scenario['samples_per_client'] or 'all'} images, {cohort} in each of {scenario['rounds']} rounds"
    )


# What is drawn ------------------------------------------------------------------------------------------------


def bounds(place: Place) -> list[Block]:
    """Rule by rule: the bound, what it leaves of the attacks and what it costs."""
    rows = []
    for rule in place.rules:
        free = of_rule(place.free, rule)
        attacked = {attack: of_rule(place.at_centre(attack), rule) for attack in (UNCONSTRAINED, BOUNDED)}
        bound = float(free["bound"].iloc[0])
        rows.append(
            {
                "Defence": rule,
                "M": number(bound),
                "Paper's M": number(PAPER_NORM * bound / place.q90, 1),
                "ASR, unconstrained": Figure95.of(attacked[UNCONSTRAINED]["asr"]).said(),
                "ASR, norm-bounded": Figure95.of(attacked[BOUNDED]["asr"]).said(),
                "ASR, control": Figure95.of(attacked[UNCONSTRAINED]["control_asr"]).said(),
                "Accuracy, attack-free": Figure95.of(free["main_accuracy"]).said(3),
                "cost, attack-free": cost(place, free).said(1),
                "cost, unconstrained": cost(place, attacked[UNCONSTRAINED]).said(1),
                "cost, norm-bounded": cost(place, attacked[BOUNDED]).said(1),
                "Benign clipped": _percent(free["clipped_benign"].mean()),
                "Norm-bounded clipped": _percent(attacked[BOUNDED]["clipped"].mean()),
            }
        )
    caption = (
        f"{place.name}: every defence at {_centre_words(place)}. Last 8 rounds, means with 95 % intervals over seeds. "
        f"x: times the 90th percentile of benign norms, {number(place.q90, 3)}; Paper's M: the same multiple of "
        f"{PAPER_NORM:g}. Cost: main accuracy against the attack-free runs without defence, points, seed by seed. "
        "Clipped: share of updates longer than M, benign ones in attack-free runs."
    )
    return [table(rows, caption, folded=False)]


def _percent(share: float) -> str:
    return "–" if np.isnan(share) else percent(share)


def _centre_words(place: Place) -> str:
    attackers = count(int(place.centre["malicious"]), "attacker")
    period = int(place.centre["period"])
    when = "in every round" if period == 1 else f"every {period} rounds"
    return f"{attackers} {when}, {count(int(place.centre['tasks']), 'task')}"


def over_rounds(place: Place) -> list[Block]:
    """A picture of ASR and one of main accuracy, a panel for each defence, both attacks beside the control."""
    rules, blocks = place.rules, []
    columns = min(4 if len(rules) > 6 else 3, len(rules))
    lines = -(-len(rules) // columns)
    for value, name in VALUES.items():

        def draw(canvas: Figure, value: str = value, name: str = name) -> None:
            axes = canvas.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
            low = 0.0 if value == "asr" else float(place.rounds["main_accuracy"].min())
            for ax, rule in zip(axes.flat, rules, strict=False):
                own = _beside_control(of_rule(place.rounds, rule), value)
                sns.lineplot(
                    own, x="round", y=value, hue="run", hue_order=LINES, style="run", style_order=LINES,
                    palette=[MALICIOUS, "0.1", "0.55"], dashes=[(1, 0), (4, 1.5), (1, 1)], errorbar=("ci", 95), seed=0,
                    ax=ax,
                )  # fmt: skip
                titled(ax, f"{rule}: {_ends(place, rule, value)}")
                ax.set(xlabel="round", ylabel=f"{name} [share of images]", ylim=(low - 0.03, 1.03))
                handles, _ = ax.get_legend_handles_labels()
                ax.legend().remove()
                ax.spines[["top", "right"]].set_visible(False)
            for ax in axes.flat[max(0, len(rules) - columns) : len(rules)]:  # nothing is below them
                ax.tick_params(labelbottom=True)
                ax.xaxis.label.set_visible(True)
            for ax in axes.flat[len(rules) :]:
                ax.set_axis_off()
            canvas.legend(handles, LINES, loc="outside lower center", ncols=3, frameon=False)

        caption = (
            f"{place.name}: {name} after each round at {_centre_words(place)}; means over seeds, 95 % intervals. "
            "On the control the same images are measured."
        )
        blocks.append(figure(draw, (WIDTH, 2.9 * lines + 0.6), caption))
    return [heading(place.name), *blocks]


def _beside_control(rows: pd.DataFrame, value: str) -> pd.DataFrame:
    """round, run (the attack, or the control), and the value."""
    control = rows.drop_duplicates(["seed", "round"])
    control = control.drop(columns=value).rename(columns={OF_CONTROL[value]: value}).assign(run=CONTROL)
    return pd.concat([rows.assign(run=rows["attack"]), control], ignore_index=True)[["round", "run", "seed", value]]


def _ends(place: Place, rule: str, value: str) -> str:
    """Where the lines of a panel end."""
    said = []
    for attack in (UNCONSTRAINED, BOUNDED):
        own = of_rule(place.at_centre(attack), rule)
        said += [f"{own[value].mean():.2f} {attack}"] if len(own) else []
    control = of_rule(place.at_centre(UNCONSTRAINED), rule)[OF_CONTROL[value]].mean()
    return ", ".join([*said, f"{control:.2f} attack-free"])


def over_cells(place: Place) -> list[Block]:
    """ASR and main accuracy over the share of attackers, and over the number of tasks, each rule under its attack."""
    attacked = its_attack(place)
    axes_of = {"fraction": along_setting(place, attacked, "fraction"), "tasks": along_setting(place, attacked, "tasks")}
    axes_of = {name: rows for name, rows in axes_of.items() if len(rows)}
    if not axes_of:
        return []
    labels = {"fraction": "attackers [% of all updates]", "tasks": "tasks [target clients]"}
    rules = [rule for rule in place.rules if any(rows["rule"].eq(rule).any() for rows in axes_of.values())]

    def draw(canvas: Figure) -> None:
        axes = canvas.subplots(2, len(axes_of), sharey="row", sharex="col", squeeze=False)
        for column, (name, rows) in zip(axes.T, axes_of.items(), strict=True):
            ticks = sorted(rows[name].unique())
            for ax, (value, word) in zip(column, VALUES.items(), strict=True):
                for position, rule in enumerate(rules):
                    _line(ax, of_rule(rows, rule), name, ticks, value, position, len(rules))
                titled(ax, _along_title(rows, name, ticks, value, rules))
                said = [f"{100 * tick:.2g}" if name == "fraction" else f"{tick:g}" for tick in ticks]
                ax.set_xticks(range(len(ticks)), said)
                ax.set(xlabel=labels[name], ylabel=f"{word} [share of images]")
                ax.spines[["top", "right"]].set_visible(False)
                if value == "asr":
                    ax.set_ylim(-0.03, 1.03)
                ax.label_outer()
        handles, names = axes[0, 0].get_legend_handles_labels()
        canvas.legend(handles, names, loc="outside lower center", ncols=3, frameon=False)

    caption = (
        f"{place.name}: no defence under the unconstrained attack, each defence under the norm-bounded one; means over "
        "seeds, bars: 95 % intervals over seeds; open grey marks: the attack-free control of the same rule."
    )
    return [heading(place.name), figure(draw, (WIDTH, 7.4), caption)]


def _line(ax: Axes, rows: pd.DataFrame, name: str, ticks: Sequence[Any], value: str, position: int, of: int) -> None:
    """One rule along a setting: means with intervals, and its control's beside."""
    colour = [MALICIOUS, "0.1", "0.1", "0.1", "0.5", "0.5"][position % 6]
    shift, points = 0.12 * (position - (of - 1) / 2), []
    for tick, own in rows.groupby(name):
        x = ticks.index(tick) + shift
        mean, low, high = Figure95.of(own[value])
        control = own[OF_CONTROL[value]].mean()
        ax.plot([x, x], [low, high], color=colour, linewidth=1.2)
        ax.plot(x, control, MARKERS[position], color=BENIGN, markerfacecolor="white", markersize=4, zorder=1)
        points.append((x, mean))
    label = rows["rule"].iloc[0] if len(rows) else None
    ax.plot(
        *np.transpose(points or [(np.nan, np.nan)]), color=colour, linestyle=DASHES[position % len(DASHES)],
        marker=MARKERS[position], markersize=5, linewidth=1.2, label=label,
    )  # fmt: skip


def _along_title(rows: pd.DataFrame, name: str, ticks: Sequence[Any], value: str, rules: Sequence[str]) -> str:
    """From the lowest to the highest setting, without defence and at the tightest bound."""
    clipped = [rule for rule in rules if rule.startswith("clipping")]
    said = []
    for rule in (NO_DEFENCE, *clipped[-1:]):
        means = of_rule(rows, rule).groupby(name)[value].mean()
        if len(means):
            said.append(f"{rule} {means.iloc[0]:.2f} to {means.iloc[-1]:.2f}")
    low, high = (f"{100 * t:.2g} %" if name == "fraction" else f"{t:g}" for t in (ticks[0], ticks[-1]))
    of = "of updates" if name == "fraction" else "tasks"
    return f"{VALUES[value]} from {low} to {high} {of}: {'; '.join(said)}"


def norms(places: Sequence[Place]) -> list[Block]:
    """Benign norms over rounds with the bounds, and their quantiles."""

    def draw(canvas: Figure) -> None:
        for ax, place in zip(canvas.subplots(1, len(places), squeeze=False)[0], places, strict=True):
            rounds = place.norms[place.norms["round"].notna()]
            for name, dash, word in (("q90", "-", "90th percentile"), ("q50", "--", "median")):
                sns.lineplot(rounds, x="round", y=name, color="0.1", linestyle=dash, label=word, seed=0, ax=ax)
            clipping = place.runs[place.runs["bound"].notna()].drop_duplicates("bound").sort_values("bound")
            for bound in clipping["bound"]:
                ax.axhline(bound, color=MALICIOUS, linewidth=1)
                ax.annotate(
                    f"M = {bound:g}\n{multiple(bound, place.q90)} x", (1, bound), xycoords=("axes fraction", "data"),
                    xytext=(3, 0), textcoords="offset points", va="center", fontsize="small",
                )  # fmt: skip
            first = place.first
            ax.axvline(first, color="0.6", linewidth=0.8, linestyle=":")
            least = clipping["bound"].min() if len(clipping) else np.nan
            after = rounds[rounds["round"].ge(first)].groupby("round")["q90"].mean()
            titled(ax, f"{place.name}: 90th percentile {after.min():.2f} to {after.max():.2f}, least M {least:g}")
            ax.set(xlabel="round", ylabel="L2 norm of benign updates")
            ax.set_yscale("log", base=2, subs=[])
            ax.yaxis.set_major_formatter("{x:g}")
            ax.spines[["top", "right"]].set_visible(False)
            handles, names = ax.get_legend_handles_labels()
            ax.legend().remove()
        canvas.legend(handles, names, loc="outside lower center", ncols=2, frameon=False)

    rows = []
    for place in places:
        whole = place.norms[place.norms["round"].isna()].iloc[0]
        quantiles = {f"{100 * q:g} %": number(float(whole[f"q{100 * q:.0f}"]), 3) for q in (0.5, 0.9, 0.99)}
        bounds_ = place.runs[place.runs["bound"].notna()].drop_duplicates("bound").sort_values("bound")["bound"]
        said = ", ".join(f"{bound:g} ({bound / place.q90:.2f} x)" for bound in bounds_)
        rows.append({"Task, model": place.name, **quantiles, "Bounds M (multiples of 90 %)": said})
    about = (
        "A bound belongs to the model and the local data that make the norms. Of the paper's runs it is said that most "
        f"benign norms are below {PAPER_NORM:g}; its M of 3, 5 and 10 are thus read as 1.5, 2.5 and 5 times a large "
        "benign norm, and that is taken to be the 90th percentile over all rounds from the first attacked one on. "
        "Noise is rescaled with M: 0.025 at M = 5 is a standard deviation of 0.005 M in each parameter of the mean; "
        "the variance reading (0.158) is not run. Where there is a second, smaller noise it is that same number on the "
        "sum of the updates, as in programs on GaussianSumQuery."
    )
    caption = "Benign norms in attack-free runs without defence; mean over seeds, 95 % intervals; dotted: first attack."
    quantile_caption = "Quantiles of benign norms from the first attacked round on, all seeds, attack-free, no defence."
    return [text(about), figure(draw, (WIDTH, 3.8), caption), table(rows, quantile_caption, folded=False)]


def detectors(places: Sequence[Place]) -> list[Block]:
    """What detectors see of the attacks at the centre, by AUC and TPR at a nominal FPR of 5 %."""
    rows = [
        {
            "Task, model": place.name,
            "Defence": str(rule),
            "Attack": str(attack),
            "Detector": str(detector),
            "AUC": _metric(own, "auc"),
            "TPR at 5 % FPR": _metric(own, "tpr_5"),
            "FPR reached": _metric(own, "fpr_5"),
        }
        for place in places
        for (rule, attack, detector), own in place.detectors.groupby(["rule", "attack", "detector"], sort=False)
    ]
    caption = (
        "Updates of attacked rounds. Thresholds at 5 % FPR are set on attack-free runs of other seeds under the same "
        "defence. Detectors see the updates as sent, before clipping."
    )
    return [table(rows, caption, folded=False)]


def _metric(rows: pd.DataFrame, metric: str) -> str:
    own = rows[rows["metric"].eq(metric)]
    if own.empty:
        return "–"
    row = own.iloc[0]
    sign = "" if pd.isna(row["sign"]) else str(row["sign"])
    return measured(float(row["value"]), float(row["low"]), float(row["high"]), sign)


DEVIATIONS = (
    "Writers: MNIST names none, so each client holds one style of each digit (k-means on principal components); the "
    "writers of the FEMNIST subset are 12 groups of several hands each. Tasks are therefore a far larger share of the "
    "population than the paper's 30 of 3,383, and honest clients hold the same images rightly labelled. One attacker "
    "among 12 FEMNIST groups sends 8.3 % of all updates, the paper's at most 3.3 %; its ASR is measured on 25 to 28 "
    "held-out images a seed, so that one image is 0.04.",
    "One attacker is the same client throughout (fixed frequency alone; no random sampling). It trains on as many "
    "images as it holds, all of them, or half under the norm-bounded attack, relabelled ones drawn evenly from all "
    "tasks; the paper's trains on all images of all tasks. Its norm-bounded training is one of five epochs, projected "
    "after each, where the released code repeats that five times.",
    "Attacks begin in round 10 and not in the first: boosting an untrained model wrecks it. Models are smaller and "
    "there are fewer rounds, so main accuracy is below the paper's.",
)


def provenance(places: Sequence[Place], runs: Sequence[Run]) -> list[Block]:
    """Commands and software."""
    lines = [
        "# the runs, and this page",
        "gradlens simulate simulations/scenarios/norm_clipping.toml -o runs/norm_clipping",
        "gradlens simulate simulations/scenarios/norm_clipping_femnist.toml -o runs/norm_clipping_femnist",
        "python reports/norm_clipping.py runs/norm_clipping runs/norm_clipping_femnist",
    ]
    about = f"Everything above comes from {len(runs)} recorded runs; reports/norm_clipping.csv has the figures."
    return [text(about), code(lines), software_table(runs)]
