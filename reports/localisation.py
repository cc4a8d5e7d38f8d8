"""Writes where poisoned updates differ and when that fades: `python reports/localisation.py runs/localisation`.

Reads the sweep of simulations/scenarios/localisation.toml; writes reports/localisation.csv and .html. The theory that
the page is held against: under plain SGD the final bias of the target class moves by learning rate x steps x share of
wrong labels while the poison is not learnt, and no longer once it is; a benign client with other labels moves the same
tensor.
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from gradlens.localization import PHASES, localize_rounds, localize_sweep
from gradlens.plots import CLEAR, PARTLY, count, plot_localization_along
from gradlens.plots.axes import titled
from gradlens.processes import processes
from gradlens.reporting.page import (
    Block,
    code,
    figure,
    finding,
    finished,
    listed,
    measured,
    number,
    render,
    rows_of,
    section,
    table,
    text,
    write,
)
from gradlens.reporting.provenance import software_table
from gradlens.run import Run, Sweep
from gradlens.statistics import final_bias

ROOT = Path(__file__).resolve().parents[1]
CSV, HTML = ROOT / "reports/localisation.csv", ROOT / "reports/localisation.html"
CENTRE = {"learning_rate": 0.1, "poison_rate": 0.5, "num_malicious": 4, "partition": "iid"}
NAMES = {
    "learning_rate": "learning rate",
    "poison_rate": "poison rate",
    "num_malicious": "number of attackers",
    "partition": "label skew",
}
PERMUTATIONS = 999
EARLY, LATER = PHASES
MUCH = 0.1  # of an AUC
TELLING = 0.5  # of the expected drift: where it varies by so much at a high ASR, the ASR does not tell
WIDTH = 10.5  # inches of two panels


@dataclass(frozen=True, eq=False)
class Evidence:
    """The tables of a page: whole layers by phase, by round since the attack began, drifts of the target's final bias.

    places: the (layer, statistic) that the pictures draw, the final bias first.
    """

    sweep: Sweep
    phases: pd.DataFrame
    rounds: pd.DataFrame
    drifts: pd.DataFrame
    places: list[tuple[str, str]]


def main(folder: str, workers: str = "2") -> None:
    """Both files, from the runs of a sweep."""
    e = gathered(Sweep.open(folder), int(workers))
    pd.concat([e.phases, e.rounds], ignore_index=True).drop(columns=["unit", "control", "labels"]).to_csv(
        CSV, index=False, float_format="%.4f"
    )
    write(page(e), HTML)


def gathered(sweep: Sweep, workers: int = 1) -> Evidence:
    """The tables; round by round only where one setting at a time differs from the centre."""
    model = sweep.runs[0].log.model
    last, first = model.final_bias, model.parameters[0]
    places = [(last, "final_bias"), (model.final_weight, "final_rows")]
    places += [(first, "layer_norms"), (first, "accumulated_norms")]
    settings = sweep.settings.to_dict("index")
    near = replace(sweep, runs=[run for run in sweep.runs if _is_near(settings[run.name])])
    if workers > 1:
        with processes(workers) as executor:
            phases = localize_sweep(sweep, permutations=PERMUTATIONS, executor=executor, progress=True)
            rounds = localize_rounds(near, permutations=PERMUTATIONS, executor=executor, progress=True)
    else:
        phases = localize_sweep(sweep, permutations=PERMUTATIONS)
        rounds = localize_rounds(near, permutations=PERMUTATIONS)
    drawn = [place in places for place in zip(rounds["layer"], rounds["statistic"], strict=True)]
    rounds, words = rounds[drawn], _partitions(sweep)
    phases, rounds = (
        each[~each["control"].astype(bool) & each["unit"].eq("")].assign(partition=each["partition"].map(words))
        for each in (phases, rounds)
    )
    return Evidence(sweep, phases, rounds, drifts_of(sweep), [(str(layer), name) for layer, name in places])


def _partitions(sweep: Sweep) -> dict[str, str]:
    """The label of each partition -> its name and its skew, "dirichlet 0.5"."""
    words, settings = {}, sweep.settings.to_dict("index")
    for run in sweep.runs:
        name, values = next(iter(run.scenario["partition"].items()))
        skew = f" {values['alpha']:g}" if "alpha" in values else ""
        words[settings[run.name]["partition"]] = name + skew
    return words


def _is_near(settings: Mapping[Any, Any]) -> bool:
    """Whether at most one setting differs from the centre; of a control, the attack's settings do not count."""
    ignored = ("poison_rate", "num_malicious") if settings["control"] else ()
    return sum(settings[name] != value for name, value in CENTRE.items() if name not in ignored) <= 1


def drifts_of(sweep: Sweep) -> pd.DataFrame:
    """How far the final bias of the target moves, per attacked run on iid data, and how far it could.

    Of the first round in every run, of all rounds where nothing but the learning rate differs from the centre.
    Columns: the settings, round, drift (mean of the attackers minus mean of the benign clients, in logits), expected
    (learning rate x steps x share of the attacker's samples with a wrong label: the drift if none of it were learnt),
    share (their ratio), asr (of the model that the round starts from, against the attack).
    """
    rows, known = [], sweep.settings.to_dict("index")
    for run in sweep.runs:
        settings = known[run.name]
        if settings["control"] or settings["partition"] != CENTRE["partition"]:
            continue
        differ = [name for name, value in CENTRE.items() if settings[name] != value]
        asr = [0.0, *run.metrics["asr"].tolist()]
        for index, drift, expected in _drifts(run, len(run.log) if set(differ) <= {"learning_rate"} else 1):
            figures = {"round": index, "drift": drift, "expected": expected, "share": drift / expected}
            rows.append({**settings, **figures, "asr": asr[index]})
    return pd.DataFrame(rows)


def _drifts(run: Run, rounds: int) -> Iterator[tuple[int, float, float]]:
    scenario = run.scenario
    target = scenario["attack"]["trigger"]["target_label"]
    guilty = list(set(run.truth.loc[run.truth["poisoned"].astype(bool), "client"]))
    for prefix in (run.log[: k + 1] for k in range(rounds)):
        bias, round_ = final_bias(prefix).to_numpy(), prefix[-1]
        malicious = np.isin(round_.clients, guilty)
        drift = bias[malicious, target].mean() - bias[~malicious, target].mean()
        steps = scenario["local_epochs"] * np.ceil(round_.num_examples[malicious] / scenario["batch_size"]).mean()
        wrong = scenario["poison_rate"] * (1 - 1 / bias.shape[1])  # a sample of the target's class stays as it is
        yield round_.index, float(drift), float(scenario["learning_rate"] * steps * wrong)


# What is drawn ------------------------------------------------------------------------------------------------


def page(e: Evidence) -> str:
    """The page as HTML."""
    attacked = int((~e.sweep.settings["control"].astype(bool)).sum())
    scenario = e.sweep.runs[0].scenario
    lead = (
        f"{attacked} attacked runs and {len(e.sweep.runs) - attacked} attack-free controls: {scenario['task']}, "
        f"{scenario['model']}, {scenario['num_clients']} clients, {scenario['rounds']} rounds, an unboosted trigger in "
        "every round. Learning rate, poison rate and number of attackers in all combinations on iid data; skew around "
        f"the centre ({_centre()}) at every learning rate."
    )
    sections = [
        section("axes", "Along each axis", along_each_axis(e)),
        section("rounds", "Since the attack began", since_it_began(e)),
        section("product", "All combinations", all_combinations(e)),
        section("theory", "How far the bias moves", how_far(e)),
        section("provenance", "Where this comes from", provenance(e)),
    ]
    return render("Where poisoned updates differ, and when that fades", lead, findings(e), finished(sections))


def along_each_axis(e: Evidence) -> list[Block]:
    """A picture per axis, early beside later, and for skew how far as well."""
    about = (
        "One setting at a time differs from the centre. Thin grey lines with open marks are the attack-free control "
        "with the same clients called malicious. Bars are 95 % intervals over seeds and rounds."
    )
    blocks = [text(about)]
    for axis in CENTRE:
        part = around(e.phases, axis)
        caption = f"AUC against the {NAMES[axis]}, the rest at the centre."
        blocks.append(_panels(part, "phase", PHASES, axis, e.places, caption))
    caption = (
        "The same against skew in robust sigmas: how far attackers stand out, and how far the farthest benign client "
        "of the control does. Where the grey mark lies above its line, an honest client moves that tensor farther."
    )
    return [*blocks, _panels(around(e.phases, "partition"), "phase", PHASES, "partition", e.places, caption, "effect")]


def around(rows: pd.DataFrame, axis: str) -> pd.DataFrame:
    """The rows in which nothing but the axis differs from the centre."""
    same = [rows[name].eq(value) for name, value in CENTRE.items() if name != axis]
    return rows[np.logical_and.reduce(same)]


def _panels(
    rows: pd.DataFrame,
    by: str,
    values: Sequence[Any],
    axis: str,
    places: Sequence[tuple[str, str]],
    caption: str,
    measure: str = "auc",
) -> Block:
    def draw(canvas: Figure) -> None:
        for ax, value in zip(canvas.subplots(1, len(values), sharey=True), values, strict=True):
            plot_localization_along(rows[rows[by].eq(value)], axis, places=places, measure=measure, ax=ax)
            what = f"{NAMES.get(by, by)} {value:g}" if isinstance(value, float) else str(value)
            title = ax.get_title(loc="left")
            ax.set_title(
                f"{what[0].upper()}{what[1:]}\n{title}",
                loc="left",
                fontsize="medium",
                fontweight="bold",
                parse_math=False,
            )

    return figure(draw, (WIDTH, 4.4), caption)


def since_it_began(e: Evidence) -> list[Block]:
    """Round by round at the lowest and the highest learning rate, and when the final bias has faded."""
    rows = around(e.rounds, "learning_rate")
    rates = sorted(rows["learning_rate"].unique())
    shown = [rates[0], rates[-1]]
    caption = "AUC of single rounds since the attack began, all else at the centre; bars: 95 % intervals over seeds."
    return [_panels(rows, "learning_rate", shown, "since", e.places, caption), fading_table(e)]


def fading_table(e: Evidence) -> Block:
    """Per learning rate: ASR, and AUC of the final bias and of what does best, in some rounds."""
    found, rows = around(e.rounds, "learning_rate"), []
    drifts = around(e.drifts, "learning_rate")
    for rate, part in found.groupby("learning_rate"):
        for since in sorted({0, 2, 5, 10, int(part["since"].max())} & set(part["since"])):
            own = rows_of(part[part["since"].eq(since)])
            bias = next(row for row in own if (row.layer, row.statistic) == e.places[0])
            best = max(own, key=lambda row: row.auc)
            here = drifts[drifts["learning_rate"].eq(rate) & drifts["round"].eq(since)]
            rows.append(
                {
                    "Learning rate": f"{rate:g}",
                    "Rounds since": str(since),
                    "ASR before": number(here["asr"].mean()),
                    "Drift share": number(here["share"].mean()),
                    "Final bias": _shown(bias._asdict()),
                    "Its control": number(bias.control_auc),
                    "Best": f"{best.statistic} in {best.layer}",
                    "Its AUC": _shown(best._asdict()),
                }
            )
    caption = (
        "The final bias round by round. ASR: of the model that the round starts from. Drift share: how far the "
        "attackers' final bias of the target moves, over learning rate x steps x share of wrong labels. Best: of the "
        "four that the picture shows."
    )
    return table(rows, caption, folded=False)


def all_combinations(e: Evidence) -> list[Block]:
    """AUC of the final bias in every combination, early and later."""
    rows = e.phases[_is_place(e.phases, e.places[0]) & e.phases["partition"].eq("iid")]
    numbers = sorted(rows["num_malicious"].unique())

    def draw(canvas: Figure) -> None:
        axes = canvas.subplots(2, len(numbers), sharex=True, sharey=True, squeeze=False)
        for row, phase in zip(axes, PHASES, strict=True):
            for ax, attackers in zip(row, numbers, strict=True):
                part = rows[rows["phase"].eq(phase) & rows["num_malicious"].eq(attackers)]
                grid = part.pivot_table(index="poison_rate", columns="learning_rate", values="auc").iloc[::-1]
                sns.heatmap(
                    grid, annot=True, fmt=".2f", cmap="vlag", vmin=0, vmax=1, cbar=False, linewidths=0.6, ax=ax,
                    linecolor="white", annot_kws={"fontsize": "small"},
                )  # fmt: skip
                low, high = grid.to_numpy().min(), grid.to_numpy().max()
                ax.set_title(f"{count(attackers, 'attacker')}, {phase}\nAUC {low:.2f} to {high:.2f}", fontsize="small")
                ax.set(xlabel="learning rate" if phase == LATER else "", ylabel="poison rate" if ax is row[0] else "")

    caption = f"AUC of {e.places[0][1]} in {e.places[0][0]} in every combination on iid data, mean over seeds."
    return [figure(draw, (WIDTH, 5.0), caption), text(_in_all(rows))]


def _in_all(rows: pd.DataFrame) -> str:
    parts = []
    for phase in PHASES:
        aucs = rows.loc[rows["phase"].eq(phase), "auc"]
        said = f"{(aucs >= CLEAR).sum()} of {len(aucs)} combinations ({(aucs < PARTLY).sum()} below {PARTLY:g})"
        parts.append(f"in the {phase if phase == EARLY else 'later rounds'} at {CLEAR:g} or more in {said}")
    turned = rows[rows["auc"] < 1 - PARTLY]
    who = listed([count(int(number_), "attacker") for number_ in sorted(turned["num_malicious"].unique())])
    below = (
        f" Below {1 - PARTLY:.1g} it lies in {len(turned)} cells, of {who}: there benign clients are the unusual ones."
    )
    return f"The AUC of the final bias is {' and '.join(parts)}.{below if len(turned) else ''}"


def how_far(e: Evidence) -> list[Block]:
    """The first round's drift against learning rate x steps x wrong labels, and what becomes of it."""
    first, later = e.drifts[e.drifts["round"].eq(0)], around(e.drifts, "learning_rate")
    mean = first.groupby(list(CENTRE)[:3], as_index=False)[["drift", "expected", "share"]].mean()

    def draw(canvas: Figure) -> None:
        left, right = canvas.subplots(1, 2)
        common: dict[str, Any] = {
            "hue": "learning_rate",
            "style": "learning_rate",
            "palette": "cividis",
            "hue_norm": (0, 0.3),
        }
        sns.scatterplot(mean, x="expected", y="drift", s=40, ax=left, **common)
        ends = [mean["expected"].min(), mean["expected"].max()]
        left.plot(ends, ends, color="0.5", linestyle=":", label="as expected")
        left.set(xscale="log", yscale="log", ylabel="drift of the target's final bias [logits]")
        left.set_xlabel("learning rate x steps x share of wrong labels [logits]")
        sns.lineplot(later, x="round", y="share", markers=True, dashes=True, errorbar=None, ax=right, **common)
        right.set(ylim=(0, None), xlabel="rounds since the attack began", ylabel="drift, share of the expected")
        right.xaxis.set_major_locator(MaxNLocator(integer=True))
        for ax, finding_ in ((left, _drift_finding(mean)), (right, _share_finding(later))):
            ax.legend(title="learning rate", frameon=False)
            ax.spines[["top", "right"]].set_visible(False)
            titled(ax, finding_)

    caption = (
        "Left: the first attacked round, a mark per combination, mean over seeds: the attackers' drift of the target's "
        "final bias minus the benign clients', against what it would be if nothing were learnt on the way (dotted). "
        "Right: the drift as a share of that, round by round, all but the learning rate at the centre."
    )
    return [figure(draw, (WIDTH, 4.4), caption), drift_table(mean)]


def _drift_finding(mean: pd.DataFrame) -> str:
    ordered = mean.sort_values("expected")
    low, high = ordered["expected"].iloc[0], ordered["expected"].iloc[-1]
    ends = [ordered.loc[ordered["expected"].eq(end), "share"].mean() for end in (low, high)]
    return f"Drift: {ends[0]:.2f} of the expected where that is {low:.2g} logits, {ends[1]:.2f} where it is {high:.2g}"


def _share_finding(later: pd.DataFrame) -> str:
    by = later.pivot_table(index="learning_rate", columns="round", values="share")
    said = [f"{by.iloc[i, 0]:.2f} to {by.iloc[i, -1]:.2f} at {by.index[i]:g}" for i in (0, -1)]
    return f"Round by round the drift goes from {', '.join(said)}"


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


def provenance(e: Evidence) -> list[Block]:
    """Commands and software."""
    about = f"Everything above comes from {len(e.sweep.runs)} recorded runs; reports/localisation.csv has the figures."
    lines = [
        "# the runs, and this page",
        "gradlens simulate simulations/scenarios/localisation.toml -o runs/localisation",
        "python reports/localisation.py runs/localisation",
    ]
    return [text(about), code(lines), software_table(e.sweep.runs)]


# What is found ------------------------------------------------------------------------------------------------


def findings(e: Evidence) -> list[Block]:
    """What of the theory is borne out, each sentence with its figures; what is not says so."""
    return [where(e), moves(e), fades(e), learnt(e), *(along(e, axis) for axis in CENTRE), drowned(e), remains(e)]


def where(e: Evidence) -> Block:
    """The final bias at the centre, early, beside all others."""
    rows = around(e.phases, "partition")
    rows = rows[rows["partition"].eq("iid") & rows["phase"].eq(EARLY)]
    own = rows[_is_place(rows, e.places[0])].iloc[0]
    better = rows[rows["auc"].gt(own["auc"]) & ~_is_place(rows, e.places[0])].sort_values("effect", ascending=False)
    verb = (
        "carries the signal" if own["auc"] >= CLEAR else "carries it in part" if own["auc"] >= PARTLY else "is silent"
    )
    others = [f"{row.statistic} in {row.layer}" for row in rows_of(better)]
    beside = f" {len(others)} other places have a higher AUC, farthest {listed(others[:3])}." if others else ""
    return finding(
        "Where",
        f"At the centre ({_centre()}) the final bias {verb} in the {EARLY}: AUC {_shown(own)}, control "
        f"{number(own['control_auc'])}; {number(own['effect'], 1)} robust sigmas, the farthest benign client of the "
        f"control {number(own['control_effect'], 1)}.{beside}",
    )


def along(e: Evidence, axis: str) -> Block:
    """How the final bias changes along an axis, early and later."""
    parts = []
    for phase in PHASES:
        rows = around(e.phases, axis)
        rows = rows[rows["phase"].eq(phase) & _is_place(rows, e.places[0])]
        rows = rows if axis == "partition" else rows.sort_values(axis)
        ends = rows.iloc[0], rows.iloc[-1]
        change = ends[1]["auc"] - ends[0]["auc"]
        verb = "rises" if change >= MUCH else "falls" if change <= -MUCH else "stays"
        at = [f"{row[axis]:g}" if axis != "partition" else str(row[axis]) for row in ends]
        which = "later" if phase == LATER else f"in the {phase}"
        parts.append(f"{which} it {verb}, from AUC {_shown(ends[0])} at {at[0]} to {_shown(ends[1])} at {at[1]}")
    name = NAMES[axis]
    return finding(name.capitalize(), f"The final bias along the {name}, the rest at the centre: {'; '.join(parts)}.")


def fades(e: Evidence) -> Block:
    """From when on the final bias no longer separates, by learning rate."""
    rows = around(e.rounds, "learning_rate")
    rows = rows[_is_place(rows, e.places[0])]
    lines, lost = [], []
    for rate, part in rows.sort_values("since").groupby("learning_rate"):
        low = part.loc[part["auc"] < PARTLY, "since"]
        lost += [rate] if len(low) else []
        when = (
            f"below {PARTLY:g} for the first time in round {int(low.iloc[0])}"
            if len(low)
            else f"never below {PARTLY:g}"
        )
        first, last = part["auc"].iloc[0], part["auc"].iloc[-5:].mean()
        lines.append(
            f"learning rate {rate:g}: AUC {number(first)} in the first round, {number(last)} in the last five, {when}"
        )
    said = f"At {len(lost)} of {len(lines)} learning rates the final bias falls below an AUC of {PARTLY:g}"
    return finding(
        "Fades", f"{said} within {int(rows['since'].max()) + 1} rounds of attack, the rest at the centre.", lines
    )


def learnt(e: Evidence) -> Block:
    """Whether the drift is the smaller the more was trained on the poison; and whether the ASR tells."""
    later = around(e.drifts, "learning_rate")
    trained = _rank_correlation(later["learning_rate"] * later["round"], later["share"])
    verb = "shrinks" if trained <= -0.5 else "grows" if trained >= 0.5 else "neither shrinks nor grows"
    known = later.loc[later["asr"] >= CLEAR, "share"]
    told = f"from {number(known.min())} to {number(known.max())}" if len(known) else "not known"
    tells = "does not tell" if len(known) and known.max() - known.min() >= TELLING else "tells"
    return finding(
        "Learnt",
        f"The drift {verb} as the poison is learnt: rank correlation of learning rate x rounds since and the drift's "
        f"share of what was expected {number(trained)} over {len(later)} rounds. ASR {tells} how much is learnt: "
        f"where it is {CLEAR:g} or more already, that share is {told}.",
    )


def _rank_correlation(first: pd.Series, second: pd.Series) -> float:
    return float(first.corr(second, method="spearman"))


def drowned(e: Evidence) -> Block:
    """From which skew on an honest client moves the final bias farther than the attackers."""
    rows = around(e.phases, "partition")
    rows = rows[rows["phase"].eq(EARLY) & _is_place(rows, e.places[0])]
    lost = [str(row.partition) for row in rows_of(rows) if row.effect < row.control_effect]
    lines = [
        f"{row.partition}: attackers {number(row.effect, 1)}, farthest benign client {number(row.control_effect, 1)} "
        f"robust sigmas; AUC {_shown(row._asdict())}, control {number(row.control_auc)}"
        for row in rows_of(rows)
    ]
    said = f"Under {listed(lost)} an honest client of the control" if lost else "Under no skew tried an honest client"
    return finding("Skew drowns it", f"{said} moves the final bias farther than attackers do in the {EARLY}.", lines)


def moves(e: Evidence) -> Block:
    """Whether the drift of the first round is learning rate x steps x wrong labels."""
    first = e.drifts[e.drifts["round"].eq(0)]
    mean = first.groupby(list(CENTRE)[:3])[["drift", "expected", "share"]].mean()
    small = mean[mean["expected"] <= mean["expected"].quantile(0.25)]
    large = mean[mean["expected"] >= mean["expected"].quantile(0.75)]
    within = ": part is learnt within the round" if large["share"].mean() < small["share"].mean() else ""
    rank = _rank_correlation(mean["expected"], mean["drift"])
    verb = "follows" if rank >= CLEAR else "follows in part" if rank >= PARTLY else "does not follow"
    return finding(
        "How far",
        f"In the first attacked round the target's final bias {verb} learning rate x steps x share of wrong labels: "
        f"rank correlation {number(rank)} over {len(mean)} combinations. In the quarter of them where that is smallest "
        f"the drift is {number(small['share'].min())} to {number(small['share'].max())} of it, where it is largest "
        f"{number(large['share'].min())} to {number(large['share'].max())}{within}.",
    )


def remains(e: Evidence) -> Block:
    """What separates later, where the final bias no longer does."""
    rows = e.phases[e.phases["phase"].eq(LATER)]
    own = rows[_is_place(rows, e.places[0])].set_index(list(CENTRE))["auc"]
    keys = own[own < PARTLY].index
    best = rows.sort_values("auc", ascending=False).drop_duplicates(list(CENTRE)).set_index(list(CENTRE)).loc[keys]
    still = best[best["auc"] >= CLEAR]
    places = (still["statistic"] + " in " + still["layer"]).value_counts()
    lines = [f"{name}: {count(int(number_), 'condition')}" for name, number_ in places.head(5).items()]
    skew = int(sum(key[3] != "iid" for key in best.index.difference(still.index)))
    return finding(
        "What remains",
        f"In {len(keys)} of {len(own)} conditions the final bias does not separate later (AUC below {PARTLY:g}). In "
        f"{len(still)} of these another statistic still does ({CLEAR:g} or more); nothing does so in "
        f"{len(keys) - len(still)}, {skew} of them under skew. Which is best:",
        lines,
    )


def _is_place(rows: pd.DataFrame, place: tuple[str, str]) -> pd.Series:
    return rows["layer"].eq(place[0]) & rows["statistic"].eq(place[1])


def _shown(row: Mapping[str, Any] | pd.Series) -> str:
    return measured(float(row["auc"]), float(row["low"]), float(row["high"]))


def _centre() -> str:
    return ", ".join(f"{NAMES[name] if name != 'partition' else 'data'} {value}" for name, value in CENTRE.items())


if __name__ == "__main__":
    main(*sys.argv[1:])
