"""The sections of a report on a sweep: a function per section, one per table and one per figure."""

from collections.abc import Callable, Mapping
from concurrent.futures import Executor, Future
from typing import Any

import numpy as np
import pandas as pd

from gradlens.plots import percent
from gradlens.reporting.analysis import COSTLY, PARTLY, PHASES, WORKED, Analysis, labelled
from gradlens.reporting.page import Block, Section, finished, heading, measured, number, rows_of, section, table, text
from gradlens.reporting.pictures import (
    bias_picture,
    localization_picture,
    roc_picture,
    scores_picture,
    training_picture,
)
from gradlens.reporting.provenance import commands, runs_table, settings_table, software_table, thresholds_table
from gradlens.reporting.shared import attacked_rounds, effects, flag_table, p_value, poisoners, shown, with_malicious

Drawn = Block | Future  # a block, or one that is being drawn
Draw = Callable[..., Drawn]  # takes a function of `pictures` and its arguments

ORDER = ("worked", "worked in part", "uncertain", "failed", "not measured")
CASES = (
    "The case of each run is concluded from its recording alone, without its truth or its control, at a rate of 5 % of "
    "attack-free recordings in which anybody is accused. Established: somebody is accused."
)
MOST_FIGURES = 6  # of the filter; the table holds all conditions


def sections(a: Analysis, chosen: Mapping[str, Any], executor: Executor | None = None) -> list[Section]:
    """All sections of a sweep's report, in order; the executor, if any, draws."""

    draw = at_once if executor is None else executor.submit
    return finished(
        [
            section("attack", "1 Did the attack work?", attack_section(a)),
            section("where", "2 Where is the anomaly?", where_section(a, draw)),
            section("who", "3 Who is it?", who_section(a, chosen, draw)),
            section("when", "4 When?", when_section(a, chosen, draw)),
            section("bias", "5 Final bias per client and class", bias_section(a, chosen)),
            section("filter", "6 The filter", filter_section(a, draw)),
            section("provenance", "7 Provenance", provenance_section(a)),
        ]
    )


def at_once(picture: Callable[..., Block], *args: Any) -> Block:
    """Draws in this process."""
    return picture(*args)


def representative(a: Analysis) -> dict[str, Any]:
    """The condition whose ASR rises most above its control's, at little cost and without a filter if there is one.

    Returns: condition, why (it was chosen), run, control (names, of the lowest seed), detector (of the best AUC),
    scores (see `labelled`).
    """
    ranked = a.outcomes.sort_values("difference", ascending=False, kind="stable")
    bare = ranked[ranked["filter"].eq("")]
    quiet = bare[[not is_costly(row) and row.outcome.startswith("worked") for row in rows_of(bare)]]
    why = ("whose ASR rises most at little cost in main accuracy", "whose ASR rises most", "whose ASR rises most")
    row, why = next((table.iloc[0], said) for table, said in zip((quiet, bare, ranked), why, strict=True) if len(table))
    runs = a.runs[a.runs["condition"].eq(row["condition"])].sort_values("seed", kind="stable")
    aucs = figures_of(a, row["condition"], control=False)["auc"]
    best = max(aucs, key=lambda name: np.nan_to_num(aucs[name].value, nan=-1.0))
    return {
        "condition": row["condition"],
        "why": "the first of all" if np.isnan(row["difference"]) else why,
        "run": str(runs.index[0]),
        "control": str(runs["control"].iloc[0]),
        "detector": best,
        "scores": labelled(a.sweep, runs, a.raw),
    }


def is_costly(row: Any) -> bool:
    """Whether main accuracy ends far below the control's: such a model has learnt little but the attack."""
    return bool(row.accuracy < row.control_accuracy - COSTLY)


def figures_of(a: Analysis, name: str, *, control: bool) -> dict[str, dict[str, Any]]:
    """metric -> detector -> row of `evaluate`, under one condition or on its control."""
    part = a.figures[a.figures["condition"].eq(name) & a.figures["control"].eq(control)]
    found: dict[str, dict[str, Any]] = {}
    for row in rows_of(part):
        found.setdefault(str(row.metric), {})[str(row.detector)] = row
    return found


# 1 ------------------------------------------------------------------------------------------------------------


def attack_section(a: Analysis) -> list[Block]:
    """Section 1."""
    about = (
        "The attack success rate (ASR) after the last round is set against the one that the same attack has on a model "
        f"trained without it. An attack worked where it ends at least {100 * WORKED:.0f} points above its control, and "
        f"in part from {100 * PARTLY:.0f} points; anything less is called a failure. It is uncertain where the "
        "interval of the difference reaches 0: more seeds would tell. At a cost: main accuracy ends over "
        f"{100 * COSTLY:.0f} points below the control's."
    )
    return [text(about), outcome_table(a)]


def outcome_table(a: Analysis) -> Block:
    """ASR and main accuracy of every condition against its control, what worked first."""
    ranked = a.outcomes.assign(rank=a.outcomes["outcome"].map(ORDER.index))
    rows = [
        {
            "Condition": row.condition,
            "Outcome": row.outcome + (", at a cost" if is_costly(row) else ""),
            "ASR": number(row.asr),
            "ASR on control": number(row.control_asr),
            "Difference": measured(row.difference, row.low, row.high),
            "Main accuracy": number(row.accuracy),
            "of control": number(row.control_accuracy),
            "Seeds": str(row.seeds),
        }
        for row in rows_of(ranked.sort_values(["rank", "difference"], ascending=[True, False], kind="stable"))
    ]
    caption = "Attack success and main accuracy after the last round. Means over seeds, difference with 95 % interval."
    return table(rows, caption, folded=len(rows) > 40)


# 2 ------------------------------------------------------------------------------------------------------------


def where_section(a: Analysis, draw: Draw) -> list[Drawn]:
    """Section 2."""
    about = (
        "How well each layer tells malicious from benign updates by itself, by how unusual an update is in its round "
        "(|robust z| of the statistic). Each heat map shows one statistic: on the left the attacked runs, beside "
        "them the attack-free control with the same clients called malicious, where about 0.5 is expected. Below 0.5 "
        "the malicious clients lie nearer to the middle of the cohort than the benign ones."
    )
    names = list(dict.fromkeys(a.places["statistic"]))
    layers = a.places.groupby("statistic")["layer"].nunique()
    single = [name for name in names if layers[name] == 1]
    groups = [single, *([name] for name in names if name not in single)]
    heat_maps = [localization_figure(a, group, draw) for group in groups if group]
    return [text(about), *heat_maps, best_places(a), all_places(a)]


def best_places(a: Analysis) -> Block:
    """The layer that separates best in each condition and phase, its best unit, and the control's figure beside."""
    free, units = by_place(whole_layers(a, control=True)), by_place(a.places[a.places["unit"].ne("")])
    rows = []
    for best in best_of(whole_layers(a, control=False), 1):
        unit = max(units.get(place(best), []), key=lambda row: (not row.control, row.auc), default=None)
        rows.append(place_row(best, free) | {"Best unit": f"[{unit.unit}] {number(unit.auc)}" if unit else ""})
    caption = "The layer that separates best, per condition. The same layer and statistic on the control beside it."
    return table(rows, caption, folded=len(rows) > 24)


def all_places(a: Analysis) -> Block:
    """The three best layers of each condition and phase."""
    free = by_place(whole_layers(a, control=True))
    rows = [place_row(row, free) for row in best_of(whole_layers(a, control=False), 3)]
    return table(rows, "The three best layers and statistics of every condition.", folded=True)


def whole_layers(a: Analysis, *, control: bool) -> pd.DataFrame:
    """The rows of whole layers, attacked or control."""
    return a.places[a.places["unit"].eq("") & a.places["control"].eq(control)]


def best_of(places: pd.DataFrame, most: int) -> list[Any]:
    """The rows of the highest AUCs in each condition and phase, as many as `most`."""
    ranked = places.sort_values("auc", ascending=False, kind="stable")
    parts = [ranked[ranked["condition"].eq(name)] for name in dict.fromkeys(places["condition"])]
    return [row for part in parts for phase in PHASES for row in rows_of(part[part["phase"].eq(phase)].head(most))]


def place(row: Any) -> tuple[str, str, str, str]:
    """What a row of `localize_sweep` is about."""
    return row.condition, row.phase, row.layer, row.statistic


def by_place(places: pd.DataFrame) -> dict[tuple[str, str, str, str], list[Any]]:
    """place -> its rows."""
    found: dict[tuple[str, str, str, str], list[Any]] = {}
    for row in rows_of(places):
        found.setdefault(place(row), []).append(row)
    return found


def place_row(row: Any, free: Mapping[Any, list[Any]]) -> dict[str, str]:
    """One place as texts, with what the control gives there."""
    control = free.get(place(row), [])
    return {
        "Condition": row.condition,
        "Rounds": row.phase,
        "Layer": row.layer,
        "Statistic": row.statistic,
        "AUC": shown(row),
        "p": p_value(row.p),
        "AUC on control": shown(control[0]) if control else "–",
        **effects(row),
    }


def localization_figure(a: Analysis, statistics: list[str], draw: Draw = at_once) -> Drawn:
    """The heat map of one statistic, or of those that look at a single layer, together."""
    axes = [axis for axis in a.sweep.axes if axis != "seed"]
    part = a.places[a.places["statistic"].isin(statistics)]
    name = statistics[0] if len(statistics) == 1 else "final layer"
    caption = (
        f"AUC per layer and condition by the statistic {' and '.join(statistics)}, mean over seeds, in the first three "
        "attacked rounds and later. The color scale is the same in every such figure."
    )
    columns = [*axes, "control", "phase", "layer", "unit", "auc", "p"]
    return draw(localization_picture, part[columns], name, caption)


# 3 ------------------------------------------------------------------------------------------------------------


def who_section(a: Analysis, chosen: Mapping[str, Any], draw: Draw) -> list[Drawn]:
    """Section 3."""
    about = (
        "Each detector scores every update of the attacked rounds. AUC and TPR are threshold-free; flags use "
        f"thresholds set for a false-positive rate of {percent(a.fpr)} on what the null names (section 7). The figure "
        f"and the first table show the condition {chosen['why']}: {chosen['condition']}."
    )
    return [
        text(CASES),
        case_table(a),
        text(about),
        detector_table(a, chosen["condition"]),
        roc_figure(a, chosen, draw),
        client_table(a, chosen),
        heading("False alarms where nobody attacks"),
        alarm_table(a),
        heading("All conditions"),
        auc_table(a),
    ]


def case_table(a: Analysis) -> Block:
    """How often the case is established under each condition, whom it names, and how often where nobody attacks."""
    rows = []
    for name, runs in a.runs.groupby("condition", sort=False):
        own = a.cases[a.cases["recording"].isin(runs.index)]
        free = a.cases[a.cases["recording"].isin(runs["control"])]
        rows.append(
            {
                "Condition": str(name),
                "Runs": str(len(own)),
                "Established": percent(own["verdict"].eq("established").mean()),
                "Attackers found": f"{own['found'].sum()} of {own['attackers'].sum()}",
                "Innocents accused": str(own["innocents"].sum()),
                "Controls accused": f"{free['verdict'].eq('established').sum()} of {len(free)}",
            }
        )
    return table(rows, "Cases by condition, beside those of the attack-free controls.", folded=len(rows) > 40)


def detector_table(a: Analysis, name: str) -> Block:
    """AUC, TPR at 1 % and 5 % FPR and FPR of each detector under one condition, beside the control's AUC."""
    attacked, free = figures_of(a, name, control=False), figures_of(a, name, control=True)
    rows = [
        {
            "Detector": detector,
            "AUC": shown(row),
            "AUC on control": shown(free["auc"][detector]),
            "TPR at 1 % FPR": shown(attacked["tpr_1"][detector], share=True),
            "TPR at 5 % FPR": shown(attacked["tpr_5"][detector], share=True),
            "Benign flagged": shown(attacked["fpr"][detector], share=True),
            "Abstained": percent(attacked["abstained"][detector].value),
        }
        for detector, row in sorted(attacked["auc"].items(), key=lambda item: -item[1].value)
    ]
    return table(rows, f"Detectors under {name}, mean over seeds with 95 % interval.")


def roc_figure(a: Analysis, chosen: Mapping[str, Any], draw: Draw = at_once) -> Drawn:
    """ROC curves of the representative condition beside those of its control."""
    name = chosen["condition"]
    caption = f"ROC curves under {name}, the updates of all seeds pooled; right: the control, with the same labels."
    return draw(roc_picture, chosen["scores"], a.figures[a.figures["condition"].eq(name)], caption)


def client_table(a: Analysis, chosen: Mapping[str, Any]) -> Block:
    """How often each detector flags each client of the representative run, malicious clients marked."""
    run = a.sweep.run(chosen["run"])
    raw = a.raw[a.raw["run"].eq(chosen["run"]) & a.raw["abstained"].eq("")]
    return flag_table(
        raw, poisoners(run), f"How often each client is flagged in run {run.name} ({chosen['condition']})."
    )


def alarm_table(a: Analysis) -> Block:
    """Share of updates that each detector flags in attack-free runs, held out of its threshold, per setting."""
    part = a.alarms[a.alarms["metric"].eq("fpr")]
    rows = [
        {
            "Setting": row.cell,
            "Detector": row.detector,
            "Flagged": shown(row, share=True),
            "Asked for": percent(a.fpr),
            "Seeds": str(row.seeds),
        }
        for row in rows_of(part)
    ]
    caption = "Share of updates flagged in attack-free runs. No run is part of the null of its own threshold."
    return table(rows, caption, folded=len(rows) > 24)


def auc_table(a: Analysis) -> Block:
    """AUC of each detector in every condition, attacked and control."""
    part = a.figures[a.figures["metric"].eq("auc")]
    detectors = list(dict.fromkeys(part["detector"]))
    rows = []
    for name, group in part.groupby("condition", sort=False):
        found = {(bool(row.control), row.detector): shown(row) for row in rows_of(group)}
        for control in (False, True):
            row = {"Condition": str(name), "Runs": "control" if control else "attacked"}
            rows.append(row | {str(d): found.get((control, d), "–") for d in detectors})
    return table(rows, "AUC of each detector in every condition.", folded=True)


# 4 ------------------------------------------------------------------------------------------------------------


def when_section(a: Analysis, chosen: Mapping[str, Any], draw: Draw) -> list[Drawn]:
    """Section 4."""
    first = attacked_rounds(a.sweep.run(chosen["run"]))[0]
    about = (
        f"Scores over rounds in one run: {chosen['condition']}, run {chosen['run']}, in which the first poisoned "
        f"update is sent in round {first} (rounds are counted from 0). It is the run of the lowest seed of the "
        f"condition {chosen['why']}. Beside it stands its control, run {chosen['control']}, on the same axes."
    )
    detectors = {str(chosen["detector"]): None} | ({"final_bias": None} if has_scores(a, "final_bias") else {})
    return [text(about), *(scores_figure(a, chosen, name, draw) for name in detectors)]


def has_scores(a: Analysis, detector: str) -> bool:
    """Whether the detector is among those of the report."""
    return bool(a.raw["detector"].eq(detector).any())


def scores_figure(a: Analysis, chosen: Mapping[str, Any], detector: str, draw: Draw = at_once) -> Drawn:
    """Scores of the representative run beside those of its control."""
    raw = a.raw[a.raw["detector"].eq(detector)]
    own = with_malicious(raw[raw["run"].eq(chosen["run"])], a.sweep.run(chosen["run"]).truth)
    free = raw[raw["run"].eq(chosen["control"])].assign(malicious=False)
    rules = a.thresholds[a.thresholds["run"].eq(chosen["run"]) & a.thresholds["detector"].eq(detector)]
    return draw(scores_picture, own, free, dict(rules.iloc[0]))


# 5 ------------------------------------------------------------------------------------------------------------


def bias_section(a: Analysis, chosen: Mapping[str, Any]) -> list[Block]:
    """Section 5."""
    run, control = a.sweep.run(chosen["run"]), a.sweep.run(chosen["control"])
    about = (
        "Under plain SGD the final bias of a class moves by the learning rate times how many more labels of that class "
        "a client holds than the model predicts. A client that relabels samples moves it, and so does an honest one "
        "with unusual labels: hence the control. The anomaly may fade as the model learns the poisoned labels."
    )
    rounds = attacked_rounds(run)
    return [
        text(about),
        *(bias_picture(run, control, index, run.truth) for index in dict.fromkeys([rounds[0], rounds[-1]])),
    ]


# 6 ------------------------------------------------------------------------------------------------------------


def filter_section(a: Analysis, draw: Draw) -> list[Drawn]:
    """Section 6."""
    pairs = filtered_pairs(a)
    if not pairs:
        missing = "No condition of this sweep was run both with and without a filter or a robust aggregator."
        return [text(missing + " What a filter would do is therefore not known from these runs.")]
    about = (
        "The same conditions with and without the server's defence, and the same without any attack, which shows what "
        "the defence costs where there is nothing to filter."
    )
    drawn = [training_figure(a, base, draw) for base in list(pairs)[:MOST_FIGURES]]
    return [text(about), filter_table(a, pairs), *drawn]


def filtered_pairs(a: Analysis) -> dict[str, list[Any]]:
    """base condition -> outcomes without and with each defence, the strongest attack first."""
    ranked = a.outcomes.sort_values("difference", ascending=False, kind="stable")
    groups = {str(base): list(part.itertuples()) for base, part in ranked.groupby("base", sort=False)}
    both = {base: rows for base, rows in groups.items() if len({row.filter == "" for row in rows}) == 2}
    return {base: sorted(rows, key=lambda row: row.filter) for base, rows in both.items()}


def filter_table(a: Analysis, pairs: Mapping[str, list[Any]]) -> Block:
    """What each defence makes of ASR and main accuracy, and whom it removes."""
    rows = []
    for base, found in pairs.items():
        bare = found[0]
        for row in found[1:]:
            malicious, benign = removed(a, row.condition)
            rows.append(
                {
                    "Condition": base,
                    "Filter": row.filter,
                    "ASR": number(bare.asr),
                    "ASR, filter": number(row.asr),
                    "ASR, control": number(row.control_asr),
                    "Accuracy": number(bare.accuracy),
                    "Accuracy, filter": number(row.accuracy),
                    "Accuracy, filtered control": number(row.control_accuracy),
                    "Malicious removed": malicious,
                    "Benign removed": benign,
                }
            )
    caption = "ASR and main accuracy after the last round with and without a filter, mean over seeds."
    return table(rows, caption + " The filtered control shows what the filter costs where nobody attacks.")


def removed(a: Analysis, name: str) -> tuple[str, str]:
    """Share of malicious and of benign updates that the live filter kept out, – where no verdict was recorded."""
    parts = []
    for run in a.runs.index[a.runs["condition"].eq(name)]:
        source = a.sweep.run(str(run))
        if len(source.verdicts):
            parts.append(source.verdicts.merge(source.truth, on=["round", "client"], how="inner"))
    if not parts:
        return "–", "–"
    joined = pd.concat(parts, ignore_index=True)
    out, poisoned = ~joined["kept"].astype(bool), joined["poisoned"].astype(bool)
    return tuple(percent(part.mean()) if len(part) else "–" for part in (out[poisoned], out[~poisoned]))  # type: ignore[return-value]


def training_figure(a: Analysis, base: str, draw: Draw = at_once) -> Drawn:
    """Main accuracy and ASR over rounds, with and without the defence, beside the control."""
    caption = (
        f"Main accuracy and ASR over rounds under {base}; right: the controls, on which the attack is only measured."
    )
    return draw(training_picture, training_table(a, base), caption)


def training_table(a: Analysis, base: str) -> pd.DataFrame:
    """round, main_accuracy, asr, seed, filter, control of a base condition's runs and of their controls."""
    parts = []
    for name, row in a.runs[a.runs["base"].eq(base)].iterrows():
        common = {"seed": row["seed"], "filter": row["filter"]}
        own, free = (a.sweep.run(str(n)).metrics for n in (name, row["control"]))
        asr = a.sweep.controls.query("run == @name").set_index("round")["asr"]
        parts.append(own.reindex(columns=["round", "main_accuracy", "asr"]).assign(**common, control=False))
        free = free.reindex(columns=["round", "main_accuracy"]).assign(asr=free["round"].map(asr))
        parts.append(free.assign(**common, control=True))
    return pd.concat(parts, ignore_index=True).astype({"main_accuracy": float, "asr": float})


# 7 ------------------------------------------------------------------------------------------------------------


def provenance_section(a: Analysis) -> list[Block]:
    """Section 7."""
    used = {str(name) for name in [*a.runs.index, *a.runs["control"]]}
    runs = [run for run in a.sweep.runs if run.name in used]
    blocks = [text(f"Everything above comes from {len(runs)} recorded runs in {a.sweep.path}.")]
    blocks += [text(f"Left out: {sentence}.") for sentence in a.left_out]
    blocks += [commands(a.sweep.path, runs), settings_table(runs), software_table(runs)]
    return [
        *blocks,
        thresholds_table(a.thresholds),
        runs_table(runs, {str(name): str(c) for name, c in a.runs["condition"].items()}),
    ]
