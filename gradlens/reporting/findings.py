"""Writes the findings on a sweep from its tables, negative results included."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from gradlens.evaluation import evaluate
from gradlens.plots import CLEAR, PARTLY, count, percent
from gradlens.reporting.analysis import COSTLY, PHASES, WORKED, Analysis
from gradlens.reporting.analysis import PARTLY as GAINED_PARTLY
from gradlens.reporting.page import Block, finding, listed, number, rows_of
from gradlens.reporting.shared import attacked_rounds, poisoners, shown, surely
from gradlens.reporting.sweep_report import (
    best_of,
    by_place,
    figures_of,
    filtered_pairs,
    is_costly,
    place,
    whole_layers,
)

MOST = 6  # points of a list
SURE = 0.05  # q up to which an accusation stands


def sweep_findings(a: Analysis, chosen: Mapping[str, Any]) -> list[Block]:
    """Writes all findings on a sweep, in the order of the report's sections.

    Parameters
    ----------
    a : Analysis
        Tables of the sweep.
    chosen : Mapping
        The representative run and detector, see `representative`.

    Returns
    -------
    list of Block
    """
    blocks = [worked(a), accused(a), filters(a), where(a, chosen), where_in_all(a), who(a, chosen), named(a, chosen)]
    return [block for block in [*blocks, how_sure(a), when(a, chosen), left_out(a)] if block]


def worked(a: Analysis) -> Block:
    """Says how many attacks worked and how many failed, and which is the strongest."""
    bare = ranked(a.outcomes[a.outcomes["filter"].eq("")])
    of = Counter(row.outcome for row in bare)
    limit = f"an ASR at least {100 * WORKED:.0f} points above the attack-free control"
    sentence = f"{of['worked']} of {count(len(bare), 'attacked condition')} worked ({limit})"
    sentence += f", {of['worked in part']} more in part, and {of['failed']} failed"
    if of["worked"] or of["worked in part"]:
        sentence += f"; the strongest is {bare[0].condition}"
    if costly := sum(is_costly(row) for row in bare if row.outcome == "worked"):
        sentence += f"; {costly} of those that worked cost over {100 * COSTLY:.0f} points of main accuracy"
    if of["uncertain"]:
        sentence += f"; {of['uncertain']} may have worked, more seeds would tell"
    if of["not measured"]:
        sentence += f"; {of['not measured']} cannot be judged, since an ASR is missing"
    return finding("Attack", f"{sentence}.")


def accused(a: Analysis) -> Block:
    """Says how many attackers the cases of all runs name, and how many innocent clients, with and without an attack."""
    attacked = a.cases[a.cases["recording"].isin(a.runs.index)]
    free = a.cases[~a.cases["recording"].isin(a.runs.index)]
    established = attacked[attacked["verdict"].eq("established")]
    clean = int(established["innocents"].eq(0).sum())
    sure = int(established["q"].le(SURE).sum())
    sentence = (
        f"From the recordings alone somebody is accused in {len(established)} of {count(len(attacked), 'attacked run')}"
        f", in {clean} of them nobody innocent, and {attacked['found'].sum()} of "
        f"{count(int(attacked['attackers'].sum()), 'attacker')} are found; in "
        f"{free['verdict'].eq('established').sum()} of {count(len(free), 'attack-free run')} somebody is "
        f"accused, where 5 % are allowed; {sure} of the accusations stand when their number is accounted for "
        f"(q at most {SURE:g})."
    )
    return finding("Who", sentence)


def ranked(outcomes: pd.DataFrame) -> list[Any]:
    """Returns the rows of the outcomes, the largest gain in attack success rate first."""
    return rows_of(outcomes.sort_values("difference", ascending=False, kind="stable"))


def points(lines: Sequence[str], where_else: str) -> list[str]:
    """Keeps the first 6 lines, and counts the rest with a note where to find them."""
    more = len(lines) - MOST
    return [*lines[:MOST], *([f"and {more} more, in {where_else}"] if more > 0 else [])]


def where(a: Analysis, chosen: Mapping[str, Any]) -> Block | None:
    """Says which layer separates best under the chosen condition, early and late, beside the control."""
    attacked = whole_layers(a, control=False)
    best = {row.phase: row for row in best_of(attacked[attacked["condition"].eq(chosen["condition"])], 1)}
    if not best:
        return finding("Where", f"Not found: no statistic could say where {chosen['condition']} differs.")
    top = max(best.values(), key=lambda row: row.auc)
    rows, controls = by_place(attacked), by_place(whole_layers(a, control=True))
    parts = []
    for phase in PHASES:
        spot = (top.condition, phase, top.layer, top.statistic)
        if spot in rows:
            beside = f", control {number(controls[spot][0].auc)}" if spot in controls else ""
            parts.append(f"AUC {shown(rows[spot][0])} in the {'later rounds' if phase == 'later' else phase}{beside}")
    if top.auc < PARTLY:
        sentence = (
            f"Not found: under {chosen['condition']} no layer separates malicious from benign updates; the best is"
        )
    else:
        strength = "separates" if top.auc >= CLEAR else "separates in part"
        sentence = f"Under {chosen['condition']}, {chosen['why']}, the anomaly {strength} best in"
    return finding("Where", f"{sentence} {top.layer} by {top.statistic}: {'; '.join(parts)}; {surely(top.p)}.")


def where_in_all(a: Analysis) -> Block | None:
    """Counts conditions in which any layer separates significantly, by outcome, beside the controls."""
    verdict = {row.condition: row.outcome for row in rows_of(a.outcomes) if not row.filter}
    significant = {place(row)[0] for row in rows_of(whole_layers(a, control=False)) if row.p < 0.05}
    by_chance = {place(row)[0] for row in rows_of(whole_layers(a, control=True)) if row.p < 0.05}
    good = [name for name, result in verdict.items() if result.startswith("worked")]
    bad = [name for name, result in verdict.items() if result == "failed"]
    if len(good) + len(bad) < 2:
        return None
    separated, idle = (sum(name in significant for name in names) for names in (good, bad))
    tests = distinct_controls(a, list(verdict))
    sentence = (
        f"Some layer separates with p < 0.05 in {separated} of {count(len(good), 'condition')} whose attack worked at "
        f"least in part, in {idle} of {len(bad)} whose attack failed, and by chance in "
        f"{sum(not by_chance.isdisjoint(names) for names in tests)} of the {len(tests)} different controls."
    )
    best = best_of(whole_layers(a, control=False), 1)
    most_common = Counter(row.layer for row in best if row.condition in good and row.p < 0.05).most_common(3)
    lines = (
        [f"Best layer most often: {listed([f'{layer} ({number} times)' for layer, number in most_common])}"]
        if most_common
        else []
    )
    missed = [name for name in good if name not in significant]
    lines += [f"Not found: {name} {verdict[name]}, and no layer separates" for name in missed]
    return finding("Over all", sentence, points(lines, "section 2"))


def distinct_controls(a: Analysis, conditions: Sequence[str]) -> list[list[str]]:
    """Groups conditions whose controls are the same test: equal attack-free runs and equal malicious clients."""
    tests: dict[frozenset[Any], list[str]] = {}
    for name in conditions:
        runs = a.runs.loc[a.runs["condition"].eq(name), "control"]
        named = zip(runs, (frozenset(poisoners(a.sweep.run(str(run)))) for run in runs.index), strict=True)
        tests.setdefault(frozenset(named), []).append(name)
    return list(tests.values())


def who(a: Analysis, chosen: Mapping[str, Any]) -> Block:
    """Says which detector is best under the chosen condition, and which attacks that worked no detector separates."""
    attacked, clean = (figures_of(a, chosen["condition"], control=control) for control in (False, True))
    name = chosen["detector"]
    auc, caught = attacked["auc"][name], attacked["tpr_5"][name]
    sentence = (
        f"{name} tells malicious from benign updates best: AUC {shown(auc)}, with the same labels on the attack-free "
        f"control {shown(clean['auc'][name])}; it catches {shown(caught, share=True)} of the malicious updates at 5 % "
        f"false positives ({count(auc.seeds, 'seed')})."
    )
    if not auc.value >= PARTLY:
        sentence = (
            f"Not found: no detector separates under {chosen['condition']}; the best is {name} with AUC {shown(auc)}."
        )
    hidden = []
    for row in ranked(a.outcomes):
        if row.outcome.startswith("worked") and not row.filter:
            aucs = figures_of(a, row.condition, control=False)["auc"]
            best = max(aucs.values(), key=lambda figure: np.nan_to_num(figure.value, nan=-1.0))
            if not best.value >= PARTLY:
                hidden.append(f"Not found: {row.condition} {row.outcome}; best AUC {shown(best)} ({best.detector})")
    return finding("Detector", sentence, points(hidden, "section 3"))


def named(a: Analysis, chosen: Mapping[str, Any]) -> Block:
    """Names the clients that the best detector flags in most rounds of the representative run."""
    raw = a.raw[a.raw["run"].eq(chosen["run"]) & a.raw["detector"].eq(chosen["detector"]) & a.raw["abstained"].eq("")]
    poisoned = poisoners(a.sweep.run(chosen["run"]))
    shares = raw.groupby("client")["flag"].agg(["sum", "size"]).sort_values("sum", ascending=False, kind="stable")
    flagged = [row for row in rows_of(shares) if row.sum > row.size / 2]
    lines = [
        f"{row.Index}: flagged in {row.sum} of {row.size} rounds, {'malicious' if row.Index in poisoned else 'benign'}"
        for row in flagged
    ]
    missed = [client for client in poisoned if client not in {row.Index for row in flagged}]
    if missed:
        lines.append(f"malicious and not flagged in most rounds: {listed(missed)}")
    right = sum(row.Index in poisoned for row in flagged)
    sentence = (
        f"In run {chosen['run']} of that condition, {chosen['detector']} flags {count(len(flagged), 'client')} in most "
        f"rounds, {right} of them among the {len(poisoned)} malicious."
    )
    return finding("Flagged", sentence, points(lines, "section 3"))


def how_sure(a: Analysis) -> Block:
    """Names the null of the thresholds, and the share of attack-free updates that they flag."""
    nulls = Counter(str(null) for null in a.thresholds["null"])
    rates = [row for row in rows_of(a.alarms[a.alarms["metric"].eq("fpr")]) if np.isfinite(row.value)]
    flagged = f"from {percent(min(r.value for r in rates))} to {percent(max(r.value for r in rates))}" if rates else "–"
    nominal = sum(number for null, number in nulls.items() if null.startswith("nominal"))
    if nominal:
        head = (
            f"There are too few attack-free runs of other seeds, so {'all' if nominal == nulls.total() else nominal} "
        )
        head += "thresholds rest on each cohort itself and their false-positive rate is only nominal"
    else:
        null = nulls.most_common(1)[0][0]
        head = f"Thresholds rest on attack-free runs of other seeds in the same setting (null: {null})"
    sentence = (
        f"{head}. Asked for {percent(a.fpr)} false positives, the detectors flag {flagged} of attack-free updates"
    )
    abstained = a.figures[a.figures["metric"].eq("abstained")]["value"].max()
    silent = f"; a detector abstained on up to {percent(float(abstained))} of the updates" if abstained > 0 else ""
    return finding("How sure", f"{sentence}{silent}.")


def when(a: Analysis, chosen: Mapping[str, Any]) -> Block:
    """Says in which round the attack begins and is first flagged, and whether the anomaly fades."""
    run, name = a.sweep.run(chosen["run"]), chosen["detector"]
    first = attacked_rounds(run)[0]
    part = chosen["scores"][~chosen["scores"]["control"] & chosen["scores"]["detector"].eq(name)]
    of_run = part[part["run"].eq(chosen["run"])]
    caught = of_run[of_run["malicious"] & of_run["flag"].astype(bool)]
    sentence = f"In run {chosen['run']} the attack begins in round {first}; {name} "
    benign = of_run[~of_run["client"].isin(list(poisoners(run)))]
    if len(caught):
        until = caught["round"].min()
        benign = benign[benign["round"] <= until]
        sentence += f"first flags a malicious client in round {until}"
    else:
        sentence += "never flags a malicious client"
    accused, watched = (part["client"].nunique() for part in (benign[benign["flag"].astype(bool)], benign))
    by_then = "it has flagged by then" if len(caught) else "it flags"
    sentence += f"; of {count(watched, 'benign client')} {by_then} {accused}, counted since the attack began"
    phases = evaluate(part, by=["phase"])
    aucs = {row.phase: row for row in rows_of(phases[phases["metric"].eq("auc")])}
    if len(aucs) == 2:
        early, late = (aucs[phase] for phase in PHASES)
        change = late.value - early.value
        verb = "fades" if change < -0.1 else "grows" if change > 0.1 else "stays"
        sentence += f". The anomaly {verb}: AUC {shown(early)} in the {PHASES[0]}, {shown(late)} later"
    return finding("When", sentence + ".")


def filters(a: Analysis) -> Block:
    """Says which attacks the filter stopped, and at what cost in main accuracy."""
    pairs = filtered_pairs(a)
    if not pairs:
        return finding("Filter", "Not tested: no condition was run both with and without a filter.")
    verbs, changes = Counter(), []
    for rows in pairs.values():
        bare = rows[0]
        for row in rows[1:]:
            verbs[_stopped(bare, row)] += 1
            changes.append((bare.asr, row.asr, bare.accuracy, row.accuracy, row.control_accuracy))
    attacks = verbs["stopped"] + verbs["weakened"] + verbs["not stopped"]
    asr, with_filter, accuracy, filtered, free = np.mean(changes, axis=0)
    sentence = (
        f"The filter stopped {verbs['stopped']} of {count(attacks, 'attack')} that had an effect without it: on "
        f"average ASR is {number(asr)} without and {number(with_filter)} with it, main accuracy {number(accuracy)} "
        f"without and {number(filtered)} with it, and {number(free)} with it where nobody attacks"
    )
    if verbs["weakened"]:
        sentence += f"; {verbs['weakened']} more were weakened"
    return finding("Filter", f"{sentence}.")


def _stopped(bare: Any, row: Any) -> str:
    """What a filter did to an attack, by the outcomes without and with it."""
    if np.isnan(bare.difference):
        return "cannot be judged"
    if bare.difference < GAINED_PARTLY:
        return "nothing to stop"
    if row.difference < GAINED_PARTLY:
        return "stopped"
    return "weakened" if row.asr < bare.asr - GAINED_PARTLY else "not stopped"


def left_out(a: Analysis) -> Block | None:
    """Lists the runs of the sweep that are not in the report; None if all are."""
    if not a.left_out:
        return None
    return finding("Left out", "Not everything in the folder could be used.", points(a.left_out, "section 7"))
