"""The page on norm clipping and weak DP: pictures, tables and sentences, all computed from `norm_clipping.csv`."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gradlens.evaluation import mean_interval
from gradlens.plots import count
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
from simulations.studies import STUDIES
from simulations.studies.norm_clipping_findings import (
    BOUNDED,
    CONTROL,
    LINES,
    NO_DEFENSE,
    PAPER_NORM,
    UNCONSTRAINED,
    Estimate,
    Place,
    along_setting,
    cost,
    findings,
    its_attack,
    multiple,
    of_rule,
    places_of,
)
from simulations.studies.results import share

METRIC_WORDS = {"asr": "ASR", "main_accuracy": "main accuracy"}
CONTROL_COLUMNS = {"asr": "control_asr", "main_accuracy": "control_accuracy"}
AXIS_LABELS = {"fraction": "attackers [% of all updates]", "tasks": "tasks [target clients]"}
MARKERS = ["o", "s", "^", "D", "v", "P", "X"]
RULE_COLORS = [MALICIOUS, "0.1", "0.1", "0.1", "0.5", "0.5"]
WIDTH = 10.5  # inches


def page(rows: pd.DataFrame, runs: Sequence[Run]) -> str:
    """The page as HTML, from the rows of `norm_clipping.csv` and the runs that they were computed from."""
    places = places_of(rows)
    attacked = sum(len(place.runs) - len(place.controls) for place in places)
    seeds = min(place.runs["seed"].nunique() for place in places)
    lead = (
        f"{attacked} attacked runs and {sum(len(place.controls) for place in places)} attack-free controls, "
        f"{count(seeds, 'seed')} of each: {'; '.join(_setting(place, runs) for place in places)}. The attack is that "
        "of Sun et al. 2019: the 7s of some clients are to be taken for 1s, and each such client is one task. The "
        "defenses are their norm clipping and weak differential privacy, at a far smaller scale than theirs (3,383 "
        "writers, 300 rounds)."
    )
    sections = [
        section("bounds", "What each bound does", [block for place in places for block in bounds(place)]),
        section("rounds", "Over rounds", [block for place in places for block in over_rounds(place)]),
        section("cells", "Over attackers and tasks", [block for place in places for block in over_cells(place)]),
        section("norms", "Benign norms and the bounds", norms(places)),
        section("detectors", "If clipping does not stop it: what detectors see", detectors(places)),
        section("deviations", "What differs from the paper", [text(paragraph) for paragraph in DEVIATIONS]),
        section("provenance", "Where this comes from", provenance(runs)),
    ]
    return render("Norm clipping and weak DP against a backdoor", lead, findings(places), finished(sections))


def _setting(place: Place, runs: Sequence[Run]) -> str:
    scenario = next(run.scenario for run in runs if f"{run.scenario['task']}, {run.scenario['model']}" == place.name)
    cohort = scenario["clients_per_round"] or scenario["num_clients"]
    return (
        f"{place.name}, {scenario['num_clients']} clients ({listed(list(scenario['partition']))}) x "
        f"{scenario['samples_per_client'] or 'all'} images, {cohort} in each of {scenario['rounds']} rounds"
    )


def _center_words(place: Place) -> str:
    attackers = count(int(place.center["malicious"]), "attacker")
    period = int(place.center["period"])
    when = "in every round" if period == 1 else f"every {period} rounds"
    return f"{attackers} {when}, {count(int(place.center['tasks']), 'task')}"


# What each bound does --------------------------------------------------------------------------------------------


def bounds(place: Place) -> list[Block]:
    """Rule by rule: the bound, what it leaves of the attacks and what it costs."""
    rows = []
    for rule in place.rules:
        controls = of_rule(place.controls, rule)
        unconstrained, bounded = (of_rule(place.at_center(attack), rule) for attack in (UNCONSTRAINED, BOUNDED))
        bound = float(controls["bound"].iloc[0])
        rows.append(
            {
                "Defense": rule,
                "M": number(bound),
                "Paper's M": number(PAPER_NORM * bound / place.q90, 1),
                "ASR, unconstrained": Estimate.of(unconstrained["asr"]).in_words(),
                "ASR, norm-bounded": Estimate.of(bounded["asr"]).in_words(),
                "ASR, control": Estimate.of(unconstrained["control_asr"]).in_words(),
                "Accuracy, attack-free": Estimate.of(controls["main_accuracy"]).in_words(3),
                "cost, attack-free": cost(place, controls).in_words(1),
                "cost, unconstrained": cost(place, unconstrained).in_words(1),
                "cost, norm-bounded": cost(place, bounded).in_words(1),
                "Benign clipped": share(controls["clipped_benign"].mean()),
                "Norm-bounded clipped": share(bounded["clipped"].mean()),
            }
        )
    caption = (
        f"{place.name}: every defense with {_center_words(place)}. Last 8 rounds, means with 95 % intervals over "
        f"seeds. x: times the 90th percentile of benign norms, {number(place.q90, 3)}; Paper's M: the same multiple of "
        f"{PAPER_NORM:g}. Cost: main accuracy against the attack-free runs without a defense, in points, seed by seed. "
        "Clipped: share of updates longer than M, benign ones in attack-free runs."
    )
    return [table(rows, caption, folded=False)]


# Over rounds -----------------------------------------------------------------------------------------------------


def over_rounds(place: Place) -> list[Block]:
    """A picture of ASR and one of main accuracy, a panel for each defense, both attacks beside the control."""
    rules = place.rules
    columns = min(4 if len(rules) > 6 else 3, len(rules))
    lines = -(-len(rules) // columns)
    blocks = []
    for metric, word in METRIC_WORDS.items():
        caption = (
            f"{place.name}: {word} after each round with {_center_words(place)}; means over seeds, 95 % intervals. "
            "On the control the same images are measured."
        )
        draw = _rounds_picture(place, metric, lines, columns)
        blocks.append(figure(draw, (WIDTH, 2.9 * lines + 0.6), caption))
    return [heading(place.name), *blocks]


def _rounds_picture(place: Place, metric: str, lines: int, columns: int) -> Callable[[Figure], None]:
    rules = place.rules
    low = 0.0 if metric == "asr" else float(place.rounds["main_accuracy"].min())

    def draw(canvas: Figure) -> None:
        axes = canvas.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
        handles: Sequence[Any] = []
        for ax, rule in zip(axes.flat, rules, strict=False):
            sns.lineplot(
                _beside_control(of_rule(place.rounds, rule), metric), x="round", y=metric, hue="run", hue_order=LINES,
                style="run", style_order=LINES, palette=[MALICIOUS, "0.1", "0.55"],
                dashes=[(1, 0), (4, 1.5), (1, 1)], errorbar=partial(mean_interval, least=0, most=1), ax=ax,
            )  # fmt: skip
            titled(ax, f"{rule}: {_last_values(place, rule, metric)}")
            ax.set(xlabel="round", ylabel=f"{METRIC_WORDS[metric]} [share of images]", ylim=(low - 0.03, 1.03))
            handles, _ = ax.get_legend_handles_labels()
            ax.legend().remove()
            ax.spines[["top", "right"]].set_visible(False)
        for ax in axes.flat[max(0, len(rules) - columns) : len(rules)]:  # the lowest of their columns
            ax.tick_params(labelbottom=True)
            ax.xaxis.label.set_visible(True)
        for ax in axes.flat[len(rules) :]:
            ax.set_axis_off()
        canvas.legend(handles, LINES, loc="outside lower center", ncols=3, frameon=False)

    return draw


def _beside_control(rows: pd.DataFrame, metric: str) -> pd.DataFrame:
    """round, run (the attack, or the control), seed, and the metric."""
    control = rows.drop_duplicates(["seed", "round"])
    control = control.drop(columns=metric).rename(columns={CONTROL_COLUMNS[metric]: metric}).assign(run=CONTROL)
    table = pd.concat([rows.assign(run=rows["attack"]), control], ignore_index=True)
    return table[["round", "run", "seed", metric]]


def _last_values(place: Place, rule: str, metric: str) -> str:
    """Where the lines of a panel end."""
    parts = []
    for attack in (UNCONSTRAINED, BOUNDED):
        attacked = of_rule(place.at_center(attack), rule)
        parts += [f"{attacked[metric].mean():.2f} {attack}"] if len(attacked) else []
    control = of_rule(place.at_center(UNCONSTRAINED), rule)[CONTROL_COLUMNS[metric]].mean()
    return ", ".join([*parts, f"{control:.2f} attack-free"])


# Over attackers and tasks ----------------------------------------------------------------------------------------


class Along(NamedTuple):
    """The runs along one setting: its name, its values in order, and the rows of the runs."""

    setting: str
    ticks: list[float]
    rows: pd.DataFrame

    def tick_label(self, value: float) -> str:
        """A value on the axis."""
        return f"{100 * value:.2g}" if self.setting == "fraction" else f"{value:g}"


def over_cells(place: Place) -> list[Block]:
    """ASR and main accuracy over the share of attackers, and over the number of tasks, each rule under its attack."""
    attacked = its_attack(place)
    settings = []
    for name in AXIS_LABELS:
        rows = along_setting(place, attacked, name)
        if len(rows):
            settings.append(Along(name, sorted(rows[name].unique()), rows))
    if not settings:
        return []
    rules = [rule for rule in place.rules if any(along.rows["rule"].eq(rule).any() for along in settings)]
    caption = (
        f"{place.name}: no defense under the unconstrained attack, each defense under the norm-bounded one; means over "
        "seeds, bars: 95 % intervals over seeds; open grey marks: the attack-free control of the same rule."
    )
    return [heading(place.name), figure(_cells_picture(settings, rules), (WIDTH, 7.4), caption)]


def _cells_picture(settings: Sequence[Along], rules: Sequence[str]) -> Callable[[Figure], None]:
    def draw(canvas: Figure) -> None:
        axes = canvas.subplots(2, len(settings), sharey="row", sharex="col", squeeze=False)
        for column, along in zip(axes.T, settings, strict=True):
            for ax, (metric, word) in zip(column, METRIC_WORDS.items(), strict=True):
                for position, rule in enumerate(rules):
                    _rule_line(ax, along, rule, metric, position, len(rules))
                titled(ax, _along_title(along, metric, rules))
                ax.set_xticks(range(len(along.ticks)), [along.tick_label(tick) for tick in along.ticks])
                ax.set(xlabel=AXIS_LABELS[along.setting], ylabel=f"{word} [share of images]")
                ax.spines[["top", "right"]].set_visible(False)
                if metric == "asr":
                    ax.set_ylim(-0.03, 1.03)
                ax.label_outer()
        handles, names = axes[0, 0].get_legend_handles_labels()
        canvas.legend(handles, names, loc="outside lower center", ncols=3, frameon=False)

    return draw


def _rule_line(ax: Axes, along: Along, rule: str, metric: str, position: int, num_rules: int) -> None:
    """One rule along a setting: means with intervals, and those of its control beside them."""
    rows = of_rule(along.rows, rule)
    color, points = RULE_COLORS[position % len(RULE_COLORS)], []
    for tick, runs in rows.groupby(along.setting):
        x = along.ticks.index(tick) + 0.12 * (position - (num_rules - 1) / 2)  # type: ignore[arg-type]
        mean, low, high = Estimate.of(runs[metric])
        control = runs[CONTROL_COLUMNS[metric]].mean()
        ax.plot([x, x], [low, high], color=color, linewidth=1.2)
        ax.plot(x, control, MARKERS[position], color=BENIGN, markerfacecolor="white", markersize=4, zorder=1)
        points.append((x, mean))
    label = rows["rule"].iloc[0] if len(rows) else None
    ax.plot(
        *np.transpose(points or [(np.nan, np.nan)]), color=color, linestyle=DASHES[position % len(DASHES)],
        marker=MARKERS[position], markersize=5, linewidth=1.2, label=label,
    )  # fmt: skip


def _along_title(along: Along, metric: str, rules: Sequence[str]) -> str:
    """From the lowest to the highest value, without a defense and at the tightest bound."""
    clipping = [rule for rule in rules if rule.startswith("clipping")]
    parts = []
    for rule in (NO_DEFENSE, *clipping[-1:]):
        means = of_rule(along.rows, rule).groupby(along.setting)[metric].mean()
        if len(means):
            parts.append(f"{rule} {means.iloc[0]:.2f} to {means.iloc[-1]:.2f}")
    is_fraction = along.setting == "fraction"
    low, high = (along.tick_label(tick) + " %" * is_fraction for tick in (along.ticks[0], along.ticks[-1]))
    what = "of updates" if is_fraction else "tasks"
    return f"{METRIC_WORDS[metric]} from {low} to {high} {what}: {'; '.join(parts)}"


# Benign norms ----------------------------------------------------------------------------------------------------

ABOUT_NORMS = (
    "A bound belongs to the model and the local data that make the norms. The paper says of its runs that most benign "
    f"norms are below {PAPER_NORM:g}; its M of 3, 5 and 10 are therefore read as 1.5, 2.5 and 5 times a large benign "
    "norm, taken here as the 90th percentile over all rounds since the first attacked one. The noise is rescaled with "
    "M: 0.025 at M = 5 is a standard deviation of 0.005 M in each parameter of the mean; the reading as a variance "
    "(0.158) is not run. Where there is a second, smaller noise, it is the same number on the sum of the updates, as "
    "in programs that use GaussianSumQuery."
)


def norms(places: Sequence[Place]) -> list[Block]:
    """Benign norms over rounds with the bounds, and their quantiles."""

    def draw(canvas: Figure) -> None:
        handles: Sequence[Any] = []
        names: Sequence[str] = []
        for ax, place in zip(canvas.subplots(1, len(places), squeeze=False)[0], places, strict=True):
            _norms_panel(ax, place)
            handles, names = ax.get_legend_handles_labels()
            ax.legend().remove()
        canvas.legend(handles, names, loc="outside lower center", ncols=2, frameon=False)

    rows = []
    for place in places:
        overall = place.norms[place.norms["round"].isna()].iloc[0]
        quantiles = {f"{100 * q:g} %": number(float(overall[f"q{100 * q:.0f}"]), 3) for q in (0.5, 0.9, 0.99)}
        multiples = ", ".join(f"{bound:g} ({bound / place.q90:.2f} x)" for bound in place.bounds)
        rows.append({"Task, model": place.name, **quantiles, "Bounds M (multiples of 90 %)": multiples})
    caption = (
        "Benign norms in attack-free runs without a defense; mean over seeds, 95 % intervals; dotted: first attack."
    )
    quantiles_caption = (
        "Quantiles of benign norms since the first attacked round, all seeds, attack-free, without a defense."
    )
    return [
        text(ABOUT_NORMS),
        figure(draw, (WIDTH, 3.8), caption),
        table(rows, quantiles_caption, folded=False),
    ]


def _norms_panel(ax: Axes, place: Place) -> None:
    rounds = place.norms[place.norms["round"].notna()]
    for name, dash, word in (("q90", "-", "90th percentile"), ("q50", "--", "median")):
        interval = partial(mean_interval, least=0)
        sns.lineplot(rounds, x="round", y=name, color="0.1", linestyle=dash, label=word, errorbar=interval, ax=ax)
    for bound in place.bounds:
        ax.axhline(bound, color=MALICIOUS, linewidth=1)
        ax.annotate(
            f"M = {bound:g}\n{multiple(bound, place.q90)} x", (1, bound), xycoords=("axes fraction", "data"),
            xytext=(3, 0), textcoords="offset points", va="center", fontsize="small",
        )  # fmt: skip
    ax.axvline(place.first, color="0.6", linewidth=0.8, linestyle=":")
    least = min(place.bounds, default=np.nan)
    after = rounds[rounds["round"].ge(place.first)].groupby("round")["q90"].mean()
    titled(ax, f"{place.name}: 90th percentile {after.min():.2f} to {after.max():.2f}, least M {least:g}")
    ax.set(xlabel="round", ylabel="L2 norm of benign updates")
    ax.set_yscale("log", base=2, subs=[])
    ax.yaxis.set_major_formatter("{x:g}")
    ax.spines[["top", "right"]].set_visible(False)


# Detectors, deviations, provenance -------------------------------------------------------------------------------


def detectors(places: Sequence[Place]) -> list[Block]:
    """What detectors see of the attacks at the center, by AUC and TPR at a nominal FPR of 5 %."""
    rows = [
        {
            "Task, model": place.name,
            "Defense": str(rule),
            "Attack": str(attack),
            "Detector": str(detector),
            "AUC": _metric(figures, "auc"),
            "TPR at 5 % FPR": _metric(figures, "tpr_5"),
            "FPR reached": _metric(figures, "fpr_5"),
        }
        for place in places
        for (rule, attack, detector), figures in place.detectors.groupby(["rule", "attack", "detector"], sort=False)
    ]
    caption = (
        "Updates of attacked rounds. Thresholds at 5 % FPR are set on attack-free runs of other seeds under the same "
        "defense. Detectors see the updates as sent, before clipping."
    )
    return [table(rows, caption, folded=False)]


def _metric(figures: pd.DataFrame, metric: str) -> str:
    rows = figures[figures["metric"].eq(metric)]
    if rows.empty:
        return "–"
    row = rows.iloc[0]
    sign = "" if pd.isna(row["sign"]) else str(row["sign"])
    return measured(float(row["value"]), float(row["low"]), float(row["high"]), sign)


DEVIATIONS = (
    "Writers: MNIST names none, so each client holds one style of each digit (k-means on principal components); the "
    "writers of the FEMNIST subset are 12 groups of several hands each. Tasks are therefore a far larger share of the "
    "population than the paper's 30 of 3,383, and honest clients hold the same images with the right labels. One "
    "attacker among 12 FEMNIST groups sends 8.3 % of all updates, the paper's at most 3.3 %; its ASR is measured on 25 "
    "to 28 held-out images per seed, so that one image is 0.04.",
    "One attacker is the same client throughout (fixed frequency only; no random sampling). It trains on as many "
    "images as it holds, all of them relabeled, or half under the norm-bounded attack, with the relabeled ones drawn "
    "evenly from all tasks; the paper's trains on all images of all tasks. Its norm-bounded training is one of five "
    "epochs, projected after each, where the released code repeats that five times.",
    "Attacks begin in round 10 and not in the first: boosting wrecks an untrained model. Models are smaller and there "
    "are fewer rounds, so main accuracy is below the paper's.",
)


def provenance(runs: Sequence[Run]) -> list[Block]:
    """Commands and software."""
    about = f"Everything above comes from {len(runs)} recorded runs; reports/norm_clipping.csv has the figures."
    return [text(about), code(["# the runs, and this page", *STUDIES["norm_clipping"].commands]), software_table(runs)]
