"""A report on one run: what can be said without ground truth, and with it how well."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from gradlens.case import Case, investigate
from gradlens.detectors import Detector, detect
from gradlens.detectors.nulls import attack_free as log_of_null
from gradlens.errors import InputError
from gradlens.evaluation import evaluate, with_truth
from gradlens.localization import localize
from gradlens.plots import CLEAR, PARTLY, count, percent
from gradlens.reporting.accusations import named, who
from gradlens.reporting.analysis import calibrated_on, final, outcome, rule_of
from gradlens.reporting.live import live, live_section
from gradlens.reporting.page import Block, Section, finding, listed, number, rows_of, section, table, text
from gradlens.reporting.pictures import (
    ALONE,
    bias_picture,
    localization_picture,
    roc_picture,
    scores_picture,
    training_picture,
)
from gradlens.reporting.provenance import commands, runs_table, settings_table, software_table, thresholds_table
from gradlens.reporting.shared import (
    attacked_rounds,
    effects,
    flag_table,
    p_value,
    poisoners,
    shown,
    surely,
    with_malicious,
)
from gradlens.run import SWEEP, Run, Sweep

Null = int | Sequence[Run] | None  # clean rounds, attack-free runs, or what the case and each cohort have themselves


@dataclass(frozen=True, eq=False)
class Examination:
    """One run's tables.

    raw: what `detect` gives; free: the same of the control. rules: per detector: threshold, null; short: why
    thresholds do not rest on the null that was named, "" if they do or none was.
    truth: None where the run has none. figures: `evaluate` over the attacked rounds, by control; places: what
    `localize` gives, with control; both empty where nothing is known to be poisoned. chance: ASR on the control.
    """

    run: Run
    control: Run | None
    case: Case
    raw: pd.DataFrame
    free: pd.DataFrame | None
    rules: pd.DataFrame
    truth: pd.DataFrame | None
    scores: pd.DataFrame
    figures: pd.DataFrame
    places: pd.DataFrame
    chance: pd.Series
    fpr: float
    short: str = ""
    nowhere: str = ""  # why there are no places though something was poisoned


def examine(
    run: Run,
    detectors: Mapping[str, Detector],
    *,
    fpr: float,
    control: Run | None = None,
    null: Null = None,
    permutations: int = 999,
) -> Examination:
    """The tables of one run; raises InputError where it holds no round, or the null is attacked.

    A run that lies in a sweep's folder finds its control there. What the case and the thresholds rest on is named by
    the caller alone.
    """
    if not len(run.log):
        raise InputError(f"{run.path}: a report needs at least one committed round, found none")
    null = null if isinstance(null, int) else list(null or []) or None
    for source in null if isinstance(null, list) else []:
        log_of_null(source)
    case = investigate(run, null)
    around = _surroundings(run)
    control = around[0] if control is None else control
    calibrated, short = calibrated_on(detectors, run.log[:null] if isinstance(null, int) else null or [], fpr)
    raw = detect(run, calibrated)
    free = None if control is None else detect(control, calibrated)
    rules = pd.DataFrame([rule_of(d, run) | {"detector": n} for n, d in calibrated.items()]).assign(run=run.name)
    truth = run.truth if run.has_truth else None
    scores, figures, places, nowhere = pd.DataFrame({"control": []}), pd.DataFrame(), pd.DataFrame(), ""
    if truth is not None and truth["poisoned"].astype(bool).any():
        scores = _labelled(raw, free, truth)
        figures = evaluate(scores, by=["control"])
        places, nowhere = _places(run, control, truth, permutations)
    tables = (raw, free, rules, truth, scores, figures, places, around[1])
    return Examination(run, control, case, *tables, fpr, short, nowhere)


def _places(run: Run, control: Run | None, truth: pd.DataFrame, permutations: int) -> tuple[pd.DataFrame, str]:
    """What `localize` gives for a run and its control, or why it cannot say: a cohort of two has no usual client."""
    sources = [run] if control is None else [run, control]
    beside = None if control is None else [control]
    try:
        tables = [
            localize([(source.log, truth)], permutations=permutations, control=beside if source is run else None)
            for source in sources
        ]
    except InputError as reason:
        return pd.DataFrame(), str(reason)
    return pd.concat([part.assign(control=bool(i)) for i, part in enumerate(tables)], ignore_index=True), ""


def _surroundings(run: Run) -> tuple[Run | None, pd.Series]:
    """The control of a run in a sweep's folder, and the control's ASR by round."""
    nothing: tuple[Run | None, pd.Series] = (None, pd.Series(dtype=float))
    if not (run.path.resolve().parent / SWEEP).is_file():
        return nothing
    try:
        sweep = Sweep.open(run.path.resolve().parent)
        control = sweep.control_of(run.name)
    except InputError:  # a control itself, or a sweep whose control has not run
        return nothing
    return control, sweep.controls[sweep.controls["run"].eq(run.name)].set_index("round")["asr"]


def _labelled(raw: pd.DataFrame, free: pd.DataFrame | None, truth: pd.DataFrame) -> pd.DataFrame:
    """The scores of the attacked rounds with labels, the control's with those of the run."""
    attacked = truth.loc[truth["poisoned"].astype(bool), "round"].unique()
    parts = [(False, raw)] + ([(True, free)] if free is not None else [])
    return pd.concat(
        [with_truth(part[part["round"].isin(attacked)], truth).assign(control=control) for control, part in parts],
        ignore_index=True,
    )


# Findings -----------------------------------------------------------------------------------------------------


def run_findings(e: Examination) -> list[Block]:
    """All findings on a run."""
    known = None if e.truth is None else poisoners(e.run)
    found = [who(e.case, known), unusable(e), flags(e), attack(e), separated(e), located(e), live(e.run), state(e)]
    return [each for each in found if each]


def unusable(e: Examination) -> Block | None:
    """What was refused, what was not comparable, and where detectors abstained."""
    lines = []
    if rows := refusals(e.run):
        names = list(dict.fromkeys(row["Client"] for row in rows))
        lines.append(f"{count(len(rows), 'update')} refused, of {listed(names)}: section 5 gives the reasons")
    if odd := incomparable(e.run):
        names = list(dict.fromkeys(row["Client"] for row in odd))
        lines.append(f"{count(len(odd), 'update')} not finite or beyond comparison, of {listed(names)}")
    silent = e.raw[e.raw["abstained"].ne("")]
    for name, part in silent.groupby("detector", sort=False):
        reasons = listed(list(dict.fromkeys(part["abstained"])), 2)
        lines.append(f"{name} abstained in {count(part['round'].nunique(), 'round')}: {reasons}")
    return finding("Not scored", "Some updates could not be judged as the others are.", lines) if lines else None


def flags(e: Examination) -> Block:
    """What the thresholds of the detectors rest on, and what a control says."""
    nominal = e.rules[e.rules["null"].str.startswith("nominal")]
    if len(nominal) == len(e.rules):
        too_small = f"The null that was named is too small ({e.short}). " if e.short else ""
        sentence = (
            f"{too_small}The detectors' thresholds rest on each cohort itself, its majority taken as benign: "
            f"{percent(e.fpr)} false positives are nominal. A client with unusual data is flagged like an attacker."
        )
    else:
        null = e.rules["null"].drop(nominal.index).iloc[0]
        where = "these first rounds" if null.startswith("declared clean") else "other runs"
        sentence = f"The detectors' thresholds were set for {percent(e.fpr)} false positives on {where} (null: {null})."
        if len(nominal):
            sentence += f" Those of {listed(list(nominal['detector']))} rest on each cohort itself and are nominal."
    if e.free is None:
        if attack_free(e):
            return finding("Flags", f"{sentence} The run is itself attack-free.")
        return finding("Flags", sentence + " No attack-free control was given, so what is usual here is not known.")
    rates = e.free[e.free["abstained"].eq("")].groupby("detector")["flag"].mean()
    span = f"{percent(float(rates.min()))} to {percent(float(rates.max()))}" if len(rates) else "nothing"
    return finding("Flags", f"{sentence} On the attack-free control they flag {span} of the updates.")


def attack_free(e: Examination) -> bool:
    """Whether the run has ground truth and nothing in it is poisoned."""
    return e.truth is not None and not e.truth["poisoned"].astype(bool).any()


def alone(e: Examination) -> str:
    """What a figure says that has no control beside it."""
    return "The run is itself attack-free by its ground truth." if attack_free(e) else ALONE


def attack(e: Examination) -> Block | None:
    """Whether the attack worked, where it was measured."""
    rate, accuracy = final(e.run, "asr"), final(e.run, "main_accuracy")
    if np.isnan(rate):
        return None
    if not len(e.chance):
        sentence = (
            f"ASR {number(rate)} and main accuracy {number(accuracy)} at the end; without a control's ASR nobody "
        )
        return finding("Attack", sentence + "can tell whether that is more than chance.")
    chance = float(e.chance.iloc[-1])
    said = outcome(rate - chance)
    return finding(
        "Attack",
        f"The attack {said}: ASR {number(rate)}, on the control {number(chance)}; main accuracy {number(accuracy)} "
        "(one seed, no interval).",
    )


def separated(e: Examination) -> Block | None:
    """How well the best detector tells malicious from benign updates, with ground truth."""
    if e.figures.empty:
        if e.truth is None:
            return finding("Truth", "The run has no ground truth: how many flags are right cannot be said.")
        return finding("Truth", "By its ground truth nobody sent poison: every flag is a false alarm.")
    aucs = e.figures[e.figures["metric"].eq("auc")].sort_values("value", ascending=False, kind="stable")
    best = rows_of(aucs[~aucs["control"]])[0]
    free = [row for row in rows_of(aucs[aucs["control"]]) if row.detector == best.detector]
    beside = f", with the same labels on the control {shown(free[0])}" if free else ""
    verb = "separates" if best.value >= CLEAR else "separates in part" if best.value >= PARTLY else "does not separate"
    tail = "; no other does better" if best.value < PARTLY else ""
    sentence = f"{best.detector} {verb} malicious from benign updates: AUC {shown(best)}{beside}{tail}"
    return finding("Evaluation", f"{sentence} (one seed, no interval).")


def located(e: Examination) -> Block | None:
    """The layer that gives the malicious clients away."""
    if e.places.empty:
        return None
    whole = e.places[e.places["unit"].eq("")].sort_values("auc", ascending=False, kind="stable")
    best = rows_of(whole[~whole["control"]])[0]
    same = whole["layer"].eq(best.layer) & whole["statistic"].eq(best.statistic) & whole["control"]
    beside = f", on the control {shown(rows_of(whole[same])[0])}" if same.any() else ""
    verdict = "Not found: no layer separates; the best is" if best.auc < PARTLY else "The anomaly is clearest in"
    return finding("Where", f"{verdict} {best.layer} by {best.statistic}: AUC {shown(best)}{beside}, {surely(best.p)}.")


def state(e: Examination) -> Block | None:
    """Whether the recording is complete."""
    if e.run.is_closed:
        return None
    return finding("Recording", f"The run is open: {e.run.in_flight or 'it has no closing line'}.")


# Sections -----------------------------------------------------------------------------------------------------


def run_sections(e: Examination) -> list[Section]:
    """All sections of a run's report, in order."""
    return [
        section("who", "1 Who is flagged?", who_section(e)),
        section("when", "2 When?", when_section(e)),
        section("bias", "3 Final bias per client and class", bias_section(e)),
        section("where", "4 Where is the anomaly?", where_section(e)),
        section("refused", "5 What could not be scored", refused_section(e)),
        section("live", "6 What a live filter did", live_section(e.run, e.control, alone(e))),
        section("training", "7 Training", training_section(e)),
        section("provenance", "8 Provenance", provenance_section(e)),
    ]


def who_section(e: Examination) -> list[Block]:
    """Section 1."""
    known = None if e.truth is None else poisoners(e.run)
    said = e.raw[e.raw["abstained"].eq("")]
    blocks = [text("How often each detector flags each client, of the rounds in which it took part and was judged.")]
    blocks.append(
        flag_table(said, known, "Flags per client and detector.") if len(said) else text("No verdict at all.")
    )
    if e.figures.empty:
        return blocks
    beside = "" if e.free is None else "; right: the control with the same clients called malicious"
    caption = f"ROC curves over the attacked rounds{beside}."
    return [*blocks, figures_table(e), roc_picture(e.scores, e.figures, caption)]


def figures_table(e: Examination) -> Block:
    """AUC, TPR and FPR of each detector, with ground truth."""
    found: dict[tuple[str, bool], dict[str, Any]] = {}
    for row in rows_of(e.figures):
        found.setdefault((row.detector, bool(row.control)), {})[row.metric] = row
    rows = [
        {
            "Detector": name,
            "AUC": shown(own["auc"]),
            "AUC on control": shown(found[name, True]["auc"]) if (name, True) in found else "–",
            "TPR at 1 % FPR": shown(own["tpr_1"], share=True),
            "TPR at 5 % FPR": shown(own["tpr_5"], share=True),
            "Benign flagged": shown(own["fpr"], share=True),
        }
        for (name, control), own in found.items()
        if not control
    ]
    return table(rows, "Detectors against the ground truth, attacked rounds. One seed: no intervals.")


def when_section(e: Examination) -> list[Block]:
    """Section 2: the detectors that flag most, at most three."""
    said = e.raw[e.raw["abstained"].eq("")]
    if said.empty:
        return [text("Every detector abstained in every round.")]
    order = said.groupby("detector")["flag"].mean().sort_values(ascending=False, kind="stable").index[:3]
    if not e.figures.empty:
        aucs = e.figures[e.figures["metric"].eq("auc") & ~e.figures["control"]].sort_values("value", ascending=False)
        order = list(aucs["detector"])[:3]
    chosen = "that separate best" if not e.figures.empty else "that flag most"
    blocks = [text(f"Score of every client over the rounds, counted from 0, by the detectors {chosen}.")]
    return [*blocks, *(scores_figure(e, str(name)) for name in order)]


def scores_figure(e: Examination, detector: str) -> Block:
    """Scores by one detector, beside the control if there is one."""
    own = e.raw[e.raw["detector"].eq(detector)]
    own = own if e.truth is None else with_malicious(own, e.truth)
    free = None if e.free is None else e.free[e.free["detector"].eq(detector)].assign(malicious=False)
    rule = rows_of(e.rules[e.rules["detector"].eq(detector)])[0]
    facts = {"detector": detector, "threshold": rule.threshold, "null": rule.null}
    return scores_picture(own, free, facts, alone(e), named(e.case))


def bias_section(e: Examination) -> list[Block]:
    """Section 3: first and last attacked round, or the round with most flags and the last one."""
    rounds = attacked = attacked_rounds(e.run) if e.truth is not None else []
    if not attacked:
        flags = e.raw.groupby("round")["flag"].sum()
        rounds = [int(flags.idxmax()), len(e.run.log) - 1]  # type: ignore[arg-type]
    about = "How each client moves the final bias of each class, against the cohort's median; the rounds shown are "
    about += "the first and last attacked ones." if attacked else "the one with most flags and the last."
    shown_rounds = dict.fromkeys([rounds[0], rounds[-1]])
    beside = (e.truth, alone(e), named(e.case))
    return [text(about), *(bias_picture(e.run, e.control, index, *beside) for index in shown_rounds)]


def where_section(e: Examination) -> list[Block]:
    """Section 4."""
    if e.places.empty:
        unknown = "Which layer gives malicious clients away can be said only where the ground truth names some."
        return [
            text(f"Which layer gives malicious clients away cannot be said: {e.nowhere}." if e.nowhere else unknown)
        ]
    about = (
        "How well each layer tells the malicious updates from the benign ones by itself, over all attacked rounds. "
        "The intervals of one run are over its clients and say nothing of other seeds; p says how often randomly named "
        "clients would do as well in any layer by any statistic."
    )
    order = e.run.log.model.parameters.index
    part = e.places.assign(by=e.places["statistic"]).sort_values("layer", key=lambda c: c.map(order), kind="stable")
    part = part[["by", "control", "layer", "unit", "auc", "p"]]
    caption = "AUC of each layer by each statistic; an empty cell is a layer that the statistic does not look at."
    return [text(about), localization_picture(part, "Layer by layer", caption), places_table(e)]


def places_table(e: Examination) -> Block:
    """AUC of every layer and statistic, the best first."""
    whole = e.places[e.places["unit"].eq("")].sort_values("auc", ascending=False, kind="stable")
    free = {(row.layer, row.statistic): shown(row) for row in rows_of(whole[whole["control"]])}
    rows = [
        {
            "Layer": row.layer,
            "Statistic": row.statistic,
            "AUC": shown(row),
            "p": p_value(row.p),
            "AUC on control": free.get((row.layer, row.statistic), "–"),
            **effects(row),
        }
        for row in rows_of(whole[~whole["control"]])
    ]
    return table(rows, "Layers and statistics, the best first.", folded=len(rows) > 24)


def refused_section(e: Examination) -> list[Block]:
    """Section 5."""
    blocks = []
    if rows := refusals(e.run):
        blocks.append(
            table(rows, "Refused updates: they could not be recorded. Such a client is flagged in every verdict.")
        )
    if odd := incomparable(e.run):
        blocks.append(table(odd, "Updates beyond comparison: recorded, and left out of every reference."))
    silent = e.raw[e.raw["abstained"].ne("")].groupby(["detector", "abstained"], sort=False)["round"]
    rows = [
        {"Detector": str(row.detector), "Reason": str(row.abstained), "Rounds": str(row.round)}
        for row in rows_of(silent.nunique().reset_index())
    ]
    if rows:
        blocks.append(table(rows, "Abstentions: rounds in which a detector gives no verdict."))
    return blocks or [text("Every update was recorded and compared, and no detector abstained.")]


def refusals(run: Run) -> list[dict[str, str]]:
    """A row per refused update: round, client, reason."""
    return [
        {"Round": str(round_.index), "Client": client, "Reason": reason}
        for round_ in run.log
        for client, reason in sorted(round_.refused.items())
    ]


def incomparable(run: Run) -> list[dict[str, str]]:
    """A row per recorded update that is not finite, or of a norm beyond comparison."""
    rows = []
    for round_ in run.log:
        for i in np.flatnonzero(~round_.comparable):
            why = "beyond comparison: over 1,000 times the median norm" if round_.finite[i] else "not finite"
            rows.append({"Round": str(round_.index), "Client": str(round_.clients[i]), "Reason": why})
    return rows


def training_section(e: Examination) -> list[Block]:
    """Section 7."""
    metrics = e.run.metrics.reindex(columns=["round", "main_accuracy", "asr"]).astype(float)
    if metrics[["main_accuracy", "asr"]].isna().all(axis=None):
        return [text("Neither main accuracy nor ASR was recorded with this run.")]
    parts = [metrics.assign(control=attack_free(e))]
    if e.control is not None:
        free = e.control.metrics.reindex(columns=["round", "main_accuracy"])
        parts.append(free.assign(asr=free["round"].map(e.chance), control=True).astype({"asr": float}))
    both = pd.concat(parts, ignore_index=True).astype({"control": bool})
    return [training_picture(both, "Main accuracy and, where an attack was measured, ASR over rounds.", alone(e))]


def provenance_section(e: Examination) -> list[Block]:
    """Section 8."""
    runs = [e.run, *([e.control] if e.control is not None else [])]
    conditions = {e.run.name: "this run"}
    blocks = [commands(e.run.path, [e.run]), settings_table(runs), software_table(runs)]
    return [*blocks, thresholds_table(e.rules), runs_table(runs, conditions)]
