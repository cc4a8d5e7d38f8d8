"""The page and the results section of the gauntlet: sentences, pictures and tables, computed from its figures."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from gradlens.reporting import page as report_page
from gradlens.reporting.page import Block, figure, finding, listed, measured, number, render, table, text
from simulations.studies import cases
from simulations.studies.conditions import CELL, PARTITION_NAMES, TASK_NAMES
from simulations.studies.gauntlet_figures import (
    CLEAN_STRETCH,
    EACH_COHORT,
    WORKING_GAIN,
    Tables,
    gains,
    norms,
)
from simulations.studies.gauntlet_ranking import (
    MATCHED,
    headline,
    observed,
    of_purpose,
    of_settings,
    ranked_rows,
    ranking,
    ranking_purpose,
)
from simulations.studies.gauntlet_scores import ATTACK_FREE, CHOOSE, CHOOSE_SEEDS, CONFIRM, PANEL
from simulations.studies.results import markdown, share, value_at

FOUND_ENOUGH = 0.5  # TPR by which detectors are ranked: in a cell where no detector reaches it, all of them fail
SECTION_ROWS, HARD_ROWS = 10, 8  # best detectors in the results section, and in a table of hard cells
GROUP = ["task", "partition", "setting"]  # cells of one group differ in the attack only
HARD_METRICS = (  # title, metric, is it a share?
    ("AUC", "auc", False),
    ("TPR at 5 %, matched", "tpr_5_matched", True),
    ("TPR at 1 %, matched", "tpr_1_matched", True),
    ("TPR at 5 %, attack-free threshold", "tpr_5", True),
)
NULL_NAMES = {"reference": "shipped reference", "own": "own null"}
MATCHED_HOW = (
    "Matched: a cell is judged at the threshold that 5 % (or 1 %) of the benign clients of attacked runs exceed, on "
    "average over the other cells in which the attack works: those of the same task, partition and way of drawing "
    "clients, at seeds of the same purpose, choosing or confirming. Where there is no other, the cell's own runs set "
    "it. By this figure detectors are ranked."
)


def write(tables: Tables, path: Path) -> None:
    """Writes the page.

    Parameters
    ----------
    tables : Tables
    path : Path
        Of the page, in HTML.
    """
    figures, runs, labels = tables
    purpose = ranking_purpose(figures)
    figures = of_settings(figures, of_purpose(figures, purpose))
    by_client = of_purpose(figures, purpose).query("per == 'client'")
    working = by_client[by_client["works"].eq(1)]
    ranked = ranking(working)
    sections = [
        report_page.section("how", "What was run", _how(runs)),
        report_page.section("ranking", "Detectors over all cells in which the attack works", _rankings(figures)),
        report_page.section("cells", "Cell by cell: attackers found", _heat_maps(working, headline(working))),
        report_page.section(
            "alarms", "Cell by cell: benign clients flagged while attacked", _heat_maps(working, "fpr_5")
        ),
        report_page.section("hard", "Clients drawn at random, attackers that come and go", _hard_cells(by_client)),
        report_page.section("panel", "The panel under the three nulls", _panel_nulls(of_purpose(figures, purpose))),
        report_page.section("labels", "Which label the attackers want", _target_labels(of_purpose(labels, purpose))),
        report_page.section("attacks", "The attacks", _attacks(by_client, runs)),
        report_page.section("cases", "What becomes of whole recordings", _cases(cases.committed(), runs)),
    ]
    report_page.write(render("Gauntlet", _lead(runs), _findings(by_client, working, ranked), sections), path)


# The section of the results ------------------------------------------------------------------------------------


def section(figures: pd.DataFrame, page: str = "gauntlet") -> str:
    """The section of the results on detectors, in Markdown, from the figures; page: where all of them are."""
    purpose = ranking_purpose(figures)
    by_client = of_purpose(figures, purpose).query("per == 'client'")
    working = by_client[by_client["works"].eq(1)]
    ranked = ranking(working)
    rows = ranked_rows(ranked.head(SECTION_ROWS), by_client)
    chosen = figures[figures["purpose"].eq(CHOOSE) & figures["per"].eq("client") & figures["works"].eq(1)]
    chosen = of_settings(chosen, by_client)
    for row, name in zip(rows, ranked.index, strict=False):
        row["detector"] = f"`{name}`"
        if purpose == CONFIRM and len(chosen):
            row["matched 5 %, choosing seeds"] = share(value_at(ranking(chosen), name, MATCHED))
    columns = [title for title in rows[0] if any(row[title] != "–" for row in rows)]
    lead = (
        f"{len(ranked)} detectors against {working['family'].nunique()} attacks that work, in {_count_cells(working)} "
        "cells (task, partition, attack, way of drawing clients), per client over a run. The table shows the "
        f"{len(rows)} best on average; all of them, cell by cell with intervals, are in "
        f"[`reports/{page}.html`](reports/{page}.html). `make {page.replace('_', '-')}` runs it"
        f"{', `make gauntlet SEEDS=7,8 FAMILIES=trigger` a part of it' if page == 'gauntlet' else ''}."
    )
    body = markdown(columns, [[row[title] for title in columns] for row in rows])
    return "\n\n".join(
        ["## The detectors, measured", lead, *_caveats(figures, working, purpose), body, *_hard_sentences(by_client)]
    )


def _caveats(figures: pd.DataFrame, working: pd.DataFrame, purpose: str) -> list[str]:
    """Which seeds and thresholds the figures are of, and plainly what a table does not have yet."""
    seeds = f"seeds {CHOOSE_SEEDS[0]} to {CHOOSE_SEEDS[-1]}"
    sentences = [
        "Attack-free thresholds come from attack-free runs of other seeds. FPR while attacked is the share of benign "
        "clients of attacked runs above them, FPR attack-free that of the clients of further attack-free runs."
    ]
    if headline(working) == MATCHED:
        sentences.insert(0, MATCHED_HOW)
    else:
        sentences.append(
            "**Thresholds are not matched in this table**: detectors pay with different false-positive rates while "
            "attacked, and are ranked by what they find at the attack-free threshold. The next full run matches them."
        )
    if purpose == CONFIRM:
        sentences.append(f"Detectors were chosen on {seeds}; all figures but those named so are of other seeds.")
        waiting = _unconfirmed(figures)
        if waiting:
            sentences.append(f"**Not confirmed yet, and left out here**: {listed(waiting)}.")
    else:
        sentences.append(f"**Not confirmed**: all figures are of {seeds}, on which the detectors were chosen.")
    return [" ".join(sentences)]


def _unconfirmed(figures: pd.DataFrame) -> list[str]:
    """Tasks and ways of drawing clients of which there are only figures of seeds that chose."""
    attacked = figures[figures["purpose"].ne(ATTACK_FREE)]
    confirmed = attacked.groupby(["task", "setting"])["purpose"].agg(lambda purposes: purposes.eq(CONFIRM).any())
    waiting = confirmed.index[~confirmed.to_numpy(bool)].tolist()
    return sorted(f"{TASK_NAMES.get(task, task)} ({setting})" for task, setting in waiting)


def _hard_sentences(by_client: pd.DataFrame) -> list[str]:
    """What the panel and the best other detector find where only a fifth of the clients is drawn in a round."""
    sampled = by_client[
        by_client["setting"].ne("full") & by_client["family"].ne("none") & by_client["metric"].eq(headline(by_client))
    ]
    sentences = []
    for setting, part in sampled.groupby("setting", sort=False):
        panel_rows = part[part["detector"].eq(PANEL)]
        others = part[~part["detector"].str.startswith(PANEL)].sort_values("value")
        if len(panel_rows) and len(others):
            of_panel, best = panel_rows.iloc[0], others.iloc[-1]
            sentences.append(
                f"in the setting `{setting}` the panel finds {_with_interval(of_panel)}, the best other detector "
                f"(`{best['detector']}`) {share(best['value'])}"
            )
    if not sentences:
        return []
    lead = "The hardest case is a trigger under label skew where each client is seen in only a few rounds"
    return [f"{lead}: {'; '.join(sentences)}."]


def _count_cells(figures: pd.DataFrame) -> int:
    return len(figures[CELL].drop_duplicates())


# Lead and findings -----------------------------------------------------------------------------------------------


def _lead(runs: pd.DataFrame) -> str:
    attacked, kinds = runs[runs["kind"].eq("attacked")], runs["kind"].value_counts()
    tasks = sorted({TASK_NAMES.get(task, task) for task in runs["task"].astype(str)})
    return (
        f"{attacked['family'].nunique()} attacks on {' and '.join(tasks)}, {len(attacked)} attacked runs and "
        f"{kinds.get(ATTACK_FREE, 0)} attack-free ones, {runs['detectors'].max()} detectors and settings. They are "
        "ranked on seeds "
        "that confirm, at thresholds at which all of them flag as many benign clients of attacked runs. Beside it "
        "stand thresholds from attack-free runs of other seeds, tested on further ones."
    )


def _findings(by_client: pd.DataFrame, working: pd.DataFrame, ranked: pd.DataFrame) -> list[Block]:
    if not len(ranked):
        return []
    blocks = [_best_detector(working, ranked), _false_alarms(by_client, ranked)]
    return [*blocks, _failures(working[working["metric"].eq(headline(working))])]


def _best_detector(working: pd.DataFrame, ranked: pd.DataFrame) -> Block:
    name, best, by = str(ranked.index[0]), ranked.iloc[0], headline(working)
    runners_up = [f"{other} {share(value_at(ranked, other, by))}" for other in ranked.index[1:4]]
    return finding(
        "The best detector",
        f"{name} finds {share(best[by])} of the malicious clients where 5 % of the benign clients of attacked runs are "
        f"flagged, on average over the {_count_cells(working)} cells in which the attack works "
        f"({share(value_at(ranked, name, f'{by}_plain'))} where it does not hide).",
        [f"Next: {listed(runners_up)}."],
    )


def _false_alarms(by_client: pd.DataFrame, ranked: pd.DataFrame) -> Block:
    """What attack-free thresholds cost while attacked, for the detectors ranked highest, and what the panel's cost."""
    costs = [f"{name} {share(value_at(ranked, name, 'fpr_5'))}" for name in ranked.index[:4]]
    sentence = (
        "At the threshold that 5 % of attack-free clients should exceed, so many benign clients of attacked runs do: "
        f"{listed(costs)}."
    )
    attack_free = by_client[by_client["family"].eq("none") & by_client["metric"].eq("fpr_5")]
    of_panel = attack_free[attack_free["detector"].eq(PANEL)]
    return finding(
        "False alarms",
        sentence,
        [f"Attack-free, {PANEL}, {_place(row)}: {_with_interval(row)}" for _, row in of_panel.iterrows()],
    )


def _failures(tpr: pd.DataFrame) -> Block:
    """The cells in which no detector finds half of the malicious clients, and the weakest ones of the panel."""
    best = tpr.groupby(CELL)["value"].max()
    failed = best[best < FOUND_ENOUGH]
    sentence = (
        f"In {len(failed)} of {len(best)} cells no detector finds half of the malicious clients at 5 %: "
        + listed([_cell_name(key) for key in failed.index])
        if len(failed)
        else f"In each of the {len(best)} cells some detector finds at least half of the malicious clients."
    )
    of_panel = tpr[tpr["detector"].eq(PANEL)].sort_values("value")
    weakest = [f"{_place(row)}, {row['family']}: {share(row['value'])}" for _, row in of_panel.head(4).iterrows()]
    return finding("Where it fails", sentence, [f"The panel's weakest cells: {'; '.join(weakest)}."])


def _with_interval(row: pd.Series) -> str:
    return measured(row["value"], row["low"], row["high"], row["bound"], share=True)


def _place(row: Any) -> str:
    """Task, partition and, where not all clients take part, the way of drawing them."""
    place = f"{TASK_NAMES.get(row['task'], row['task'])}, {PARTITION_NAMES.get(row['partition'], row['partition'])}"
    return place if row["setting"] == "full" else f"{place}, {row['setting']}"


def _cell_name(key: Sequence[Any]) -> str:
    cell = dict(zip(CELL, key, strict=True))
    return f"{cell['family']} ({_place(cell)})"


# Sections --------------------------------------------------------------------------------------------------------


def _how(runs: pd.DataFrame) -> list[Block]:
    rows = []
    for key, part in runs.groupby(GROUP, sort=False):
        (task, partition, setting), first = map(str, key), part.iloc[0]
        attack_free = part[part["kind"].eq(ATTACK_FREE)]
        rows.append(
            {
                "task": TASK_NAMES.get(task, task),
                "clients": f"{first['drawn']} of {first['clients']}, {setting}",
                "partition": PARTITION_NAMES.get(partition, partition),
                "rounds": str(first["rounds"]),
                "attacked runs": str(part["kind"].eq("attacked").sum()),
                "attack-free runs": str(len(attack_free)),
                "benign clients": str(attack_free["seen"].sum()),
                "code": listed(sorted(set(part["code"]))),
            }
        )
    about = (
        "A cell is a task, a partition, a way of drawing clients and an attack. Detectors were chosen on seeds "
        f"{CHOOSE_SEEDS[0]} to {CHOOSE_SEEDS[-1]}; what is shown is of the other seeds where there are any. "
        f"{MATCHED_HOW} "
        "Beside it: half of the attack-free runs of a task and partition set thresholds (by the ranks of their "
        "scores), the other half tests them. Updates of an attacked run count from its first poisoned one on. Per "
        "client: the last score of a detector that accumulates over rounds, the mean over the client's rounds of any "
        "other. An attack works where its ASR lies 20 points above its control's or, for one without a target, main "
        "accuracy 20 points below. Adaptive attacks keep to benign norms; the same ones without a cap are called loud "
        "and count as not adaptive. Intervals are over runs, 95 %. Detectors that need data of the server's own "
        "(fltrust, and the part of deepsight that queries a model) are left out."
    )
    caption = (
        "What was run. Each attacked run has a control of the same seed, by which the attack is judged. Code: a digest "
        "of the detectors as they were then; settings are run apart."
    )
    return [text(about), table(rows, caption)]


def _rankings(figures: pd.DataFrame) -> list[Block]:
    """The ranking by the seeds that confirm and, folded, by those that choose."""
    blocks = []
    for purpose, seeds in ((CONFIRM, "Seeds that confirm"), (CHOOSE, "Seeds on which detectors were chosen")):
        part = of_purpose(figures, purpose)
        working = part[part["works"].eq(1)]
        if not len(working):
            continue
        by_client, by_update = (working[working["per"].eq(per)] for per in ("client", "update"))
        ranked, updates = ranking(by_client), ranking(by_update)
        rows = ranked_rows(ranked, part[part["per"].eq("client")])
        for row, name in zip(rows, ranked.index, strict=True):
            row["per update: AUC"] = number(value_at(updates, name, "auc"))
            row["TPR at 5 %, matched "] = share(value_at(updates, name, MATCHED))
            row["FPR while attacked "] = share(value_at(updates, name, "fpr_5"))
        caption = f"{seeds}: means over cells in which the attack works, per client and, on the right, per update."
        blocks.append(table(rows, caption, folded=bool(blocks)))
    return blocks or [text("No attack works here.")]


def _heat_maps(working: pd.DataFrame, metric: str) -> list[Block]:
    blocks = []
    known = working[working["metric"].eq(metric)].assign(value=lambda rows: observed(rows))
    for key, part in known.groupby(GROUP, sort=False):
        grid = part.pivot_table(index="detector", columns="family", values="value")
        grid = grid.loc[grid.mean(axis=1).sort_values(ascending=False).index]
        if grid.shape[1] > 2:
            blocks.append(_heat_map(grid, _place(dict(zip(GROUP, key, strict=True))), metric))
    return blocks


def _heat_map(grid: pd.DataFrame, place: str, metric: str) -> Block:
    first, hardest = str(grid.index[0]), str(grid.max(axis=0).idxmin())
    if metric.startswith("tpr"):
        title = f"{place}: {first} finds most ({share(grid.iloc[0].mean())}); {hardest} hides best"
        axis = "TPR at 5 % FPR while attacked, per client (%)"
        caption = "Share of malicious clients above the threshold that 5 % of benign clients of attacked runs exceed."
    else:
        title = f"{place}: {first} flags most benign clients ({share(grid.iloc[0].mean())})"
        axis = "FPR while attacked, per client (%)"
        caption = "Share of benign clients of attacked runs above the threshold set for 5 % of attack-free clients."

    def draw(canvas: Figure) -> None:
        ax = canvas.subplots()
        sns.heatmap(
            grid * 100, vmin=0, vmax=100, cmap="Greys", annot=True, fmt=".0f", annot_kws={"size": 6.5}, linewidths=0.3,
            linecolor="white", cbar_kws={"label": axis, "shrink": 0.6}, ax=ax,
        )  # fmt: skip
        ax.set(xlabel="attack", ylabel="detector")
        ax.tick_params(axis="both", labelsize=7.5)
        ax.set_title(title, loc="left")

    return figure(draw, (2.8 + 0.34 * grid.shape[1], 1.7 + 0.19 * len(grid)), caption)


def _hard_cells(by_client: pd.DataFrame) -> list[Block]:
    shown = [metric for _, metric, _ in HARD_METRICS]
    sampled = by_client[by_client["setting"].ne("full") & by_client["metric"].isin(shown)]
    attacked = sampled[sampled["family"].ne("none")]
    if not len(attacked):
        return [text("Not run.")]
    blocks = []
    for setting, part in attacked.groupby("setting", sort=False):
        grid = part.pivot_table(index="detector", columns="metric", values=["value", "low", "high"])
        order = grid["value"][headline(part)].sort_values(ascending=False).index[:HARD_ROWS]
        rows = []
        for name in order:
            row = {"detector": str(name)}
            for title, metric, is_share in HARD_METRICS:
                value, low, high = (value_at(grid, name, (column, metric)) for column in ("value", "low", "high"))
                row[title] = measured(value, low, high, share=is_share)
            rows.append(row)
        blocks.append(table(rows, f"{setting}: the {len(rows)} best of {len(grid)} detectors, per client."))
    return blocks


def _panel_nulls(figures: pd.DataFrame) -> list[Block]:
    nulls = {
        PANEL: "attack-free runs of other seeds",
        CLEAN_STRETCH: "the run's own first rounds",
        EACH_COHORT: "each cohort itself",
    }
    rows = []
    for key, part in figures[figures["detector"].isin(nulls)].groupby(GROUP, sort=False):
        place = _place(dict(zip(GROUP, key, strict=True)))
        for name, null in nulls.items():
            of_null = part[part["detector"].eq(name)]
            if len(of_null):
                rows.append({"where": place, "null": null} | _rates_under_null(of_null))
    about = (
        "The panel learns scales and covariance from its null. Attack-free runs show what benign clients do in every "
        "round; the first rounds of a run, declared clean, show only what they do early; a cohort by itself has fewer "
        "clients than features, and its rate is nominal."
    )
    caption = "At 5 %, means over cells in which the attack works; attack-free: the share of benign clients flagged."
    return [text(about), table(rows, caption, folded=False)]


def _rates_under_null(figures: pd.DataFrame) -> dict[str, str]:
    row = {}
    for per in ("client", "update"):
        rows = figures[figures["per"].eq(per)]
        of_works = rows[rows["works"].eq(1)].assign(value=lambda known: observed(known))
        for title, metric in (("TPR, matched", MATCHED), ("TPR", "tpr_5"), ("FPR while attacked", "fpr_5")):
            row[f"{title}, per {per}"] = share(of_works[of_works["metric"].eq(metric)]["value"].mean())
        alarms = rows[rows["family"].eq("none") & rows["metric"].eq("fpr_5")]
        row[f"attack-free, per {per}"] = _with_interval(alarms.iloc[0]) if len(alarms) else "–"
    return row


def _target_labels(labels: pd.DataFrame) -> list[Block]:
    rows = []
    for key, part in labels.groupby(CELL, sort=False):
        row = {"cell": _cell_name(key)}
        for whose in ("attackers", "flagged"):
            accuracy = part[part["whose"].eq(whose)]
            known = accuracy.iloc[0] if len(accuracy) else None
            row[f"target right, {whose}"] = (
                "–" if known is None else measured(known["value"], known["low"], known["high"], share=True)
            )
            row[f"updates, {whose}"] = "0" if known is None else str(int(known["clients"]))
        rows.append(row)
    about = (
        "`suspected_labels` names the label that an update pushes towards, here in the first three attacked rounds: of "
        "all attackers, and of those that the panel flags in that round."
    )
    return [text(about), table(rows, "Share of updates whose suspected target label is the attack's.")]


def _attacks(by_client: pd.DataFrame, runs: pd.DataFrame) -> list[Block]:
    """How far each attack works and how loud it is, cell by cell."""
    of_panel = by_client[by_client["detector"].eq(PANEL) & by_client["metric"].eq(headline(by_client))]
    tpr = {tuple(key): value for *key, value in of_panel[[*CELL, "value"]].itertuples(index=False, name=None)}
    lengths, adaptive = norms(runs), set(by_client.loc[by_client["adaptive"].eq(1), "family"])
    rows = [
        {
            "cell": _cell_name(key),
            "adaptive": "yes" if dict(zip(CELL, key, strict=True))["family"] in adaptive else "",
            "norm": number(lengths[key]),
            "gain": number(100 * gain, 0),
            "works": "yes" if gain >= WORKING_GAIN else "no",
            "panel, TPR at 5 %": share(tpr.get(key, np.nan)),
        }
        for key, gain in sorted(gains(runs).items(), key=lambda item: item[1])
    ]
    caption = (
        "Norm: of poisoned updates, in median norms of their round's benign ones. Gain: points of ASR above the "
        "control, or of main accuracy below it. Cells in which the attack does not work are in no mean above."
    )
    return [table(rows, caption)]


def _cases(judged: pd.DataFrame, runs: pd.DataFrame) -> list[Block]:
    """What `investigate` concludes from recordings with 4 of 20 clients malicious, attack by attack."""
    of_adapters = ", adapters" if runs["task"].eq(cases.ADAPTED).any() else ""
    shown = judged[judged["kind"].eq(f"attacked{of_adapters}") & judged["malicious"].eq(4)]
    if not len(shown):
        return [text("No such recordings were judged yet.")]
    rows = []
    for (setting, name), part in shown.groupby(["setting", "family"]):
        row = {"setting": str(setting), "attack": str(name)}
        for null, title in NULL_NAMES.items():
            of_null = part[part["null"].eq(null)]
            row[f"found, {title}"] = share((of_null["found"] / of_null["attackers"].clip(lower=1)).mean())
            row[f"innocents, {title}"] = number(of_null["innocent"].mean())
        rows.append(row)
    free = judged[judged["kind"].eq(f"attack-free{of_adapters}") & judged["null"].eq("reference")]
    about = (
        f"A case is one verdict on a recording. {(free['innocent'] > 0).sum()} of {len(free)} attack-free recordings "
        "had anybody accused. Recordings of seeds that chose nothing; other numbers of attackers and the intervals are "
        "in the results on cases."
    )
    caption = "Attackers accused, and innocent clients accused per recording, by the shipped reference and by 20 "
    return [text(about), table(rows, caption + "attack-free recordings of the setting; 4 of 20 clients malicious.")]
