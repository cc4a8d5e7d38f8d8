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
from simulations.studies.conditions import CELL, PARTITION_NAMES, TASK_NAMES
from simulations.studies.gauntlet_figures import (
    CLEAN_STRETCH,
    EACH_COHORT,
    WORKING_GAIN,
    gains,
    label_accuracy,
)
from simulations.studies.gauntlet_scores import PANEL, RunScores
from simulations.studies.results import markdown, share, value_at

FOUND_ENOUGH = 0.5  # TPR at 5 % FPR, per client: in a cell where no detector reaches it, all of them fail
SECTION_ROWS, HARD_ROWS = 10, 8  # best detectors in the results section, and in a table of hard cells
GROUP = ["task", "partition", "setting"]  # cells of one group differ in the attack only
HARD_METRICS = (("AUC", "auc", False), ("TPR at 5 %", "tpr_5", True), ("TPR at 1 %", "tpr_1", True))  # is it a share?


def write(figures: pd.DataFrame, results: Sequence[RunScores], path: Path) -> None:
    """Writes the page.

    Parameters
    ----------
    figures : DataFrame
        As of `gauntlet_figures.figures`.
    results : sequence of RunScores
        What the figures were computed from.
    path : Path
        Of the page, in HTML.
    """
    by_client = figures[figures["per"].eq("client")]
    working = by_client[by_client["works"].eq(1)]
    ranked = ranking(working)
    sections = [
        report_page.section("how", "What was run", _how(results)),
        report_page.section(
            "ranking", "Detectors over all cells in which the attack works", _ranking_blocks(figures, ranked)
        ),
        report_page.section("cells", "Cell by cell", _heat_maps(working)),
        report_page.section("hard", "Clients drawn at random, attackers that come and go", _hard_cells(by_client)),
        report_page.section("panel", "The panel under the three nulls", _panel_nulls(figures)),
        report_page.section("labels", "Which label the attackers want", _target_labels(results)),
        report_page.section("weak", "Cells in which the attack does not work", _failed_attacks(figures, results)),
    ]
    report_page.write(render("Gauntlet", _lead(results), _findings(figures, working, ranked), sections), path)


def ranking(working: pd.DataFrame) -> pd.DataFrame:
    """Averages the figures per client of each detector over cells.

    Parameters
    ----------
    working : DataFrame
        The figures per client of cells in which the attack works.

    Returns
    -------
    DataFrame
        Index detector, the best first; columns auc, tpr_1, tpr_5, and tpr_1_plain, tpr_5_plain over the cells whose
        attack is not adaptive.
    """
    known = working[working["metric"].isin(("auc", "tpr_1", "tpr_5"))]
    means, plain_means = (
        rows.pivot_table(index="detector", columns="metric", values="value", aggfunc="mean")
        for rows in (known, known[known["adaptive"].eq(0)])
    )
    means = means.join(plain_means[["tpr_1", "tpr_5"]].add_suffix("_plain"))
    return means.sort_values("tpr_5", ascending=False)


# The section of the results ------------------------------------------------------------------------------------


def section(figures: pd.DataFrame) -> str:
    """The section of the results on detectors, in Markdown, from the figures."""
    by_client = figures[figures["per"].eq("client")]
    working = by_client[by_client["works"].eq(1)]
    attack_free = by_client[by_client["family"].eq("none") & by_client["metric"].eq("fpr_5")]
    ranked = ranking(working)
    columns = ["detector", "AUC", "TPR at 5 % FPR", "TPR at 1 % FPR", "5 %, nobody hides", "attack-free at 5 %"]
    rows = []
    for name, row in zip(ranked.index.astype(str), ranked.head(SECTION_ROWS).to_dict("records"), strict=False):
        alarms = attack_free[attack_free["detector"].eq(name)]["value"].mean()
        rates = [row["tpr_5"], row["tpr_1"], row["tpr_5_plain"], alarms]
        rows.append([f"`{name}`", number(row["auc"]), *(share(rate) for rate in rates)])
    lead = (
        f"{len(ranked)} detectors against {working['family'].nunique()} attacks that work, in {_count_cells(working)} "
        "cells (task, partition, attack, way of drawing clients), per client over a run; thresholds come from "
        f"attack-free runs of other seeds. The table shows the {len(rows)} best on average; all of them, cell by cell "
        "with intervals, are in [`reports/gauntlet.html`](reports/gauntlet.html). `make gauntlet` runs it, "
        "`make gauntlet SEEDS=7,8 FAMILIES=trigger` a part of it."
    )
    return "\n\n".join(["## The detectors, measured", lead, markdown(columns, rows), *_hard_sentences(by_client)])


def _hard_sentences(by_client: pd.DataFrame) -> list[str]:
    """What the panel and the best other detector find where only a fifth of the clients is drawn in a round."""
    sampled = by_client[
        by_client["setting"].ne("full") & by_client["family"].ne("none") & by_client["metric"].eq("tpr_5")
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


def _lead(results: Sequence[RunScores]) -> str:
    attacked = [run for run in results if not run.scenario.is_control]
    attack_free = [run for run in results if run.is_attack_free]
    families = {run.cell["family"] for run in attacked}
    tasks = sorted({TASK_NAMES.get(run.scenario.task, run.scenario.task) for run in results})
    return (
        f"{len(families)} attacks on {' and '.join(tasks)}, {len(attacked)} attacked runs and {len(attack_free)} "
        f"attack-free ones, {len(results[0].arrays['detectors'])} detectors and settings. Scores of attack-free runs "
        "of other seeds set every threshold; further attack-free runs test it."
    )


def _findings(figures: pd.DataFrame, working: pd.DataFrame, ranked: pd.DataFrame) -> list[Block]:
    blocks = [_best_detector(working, ranked)] if len(ranked) else []
    of_panel = figures[figures["family"].eq("none") & figures["detector"].eq(PANEL)]
    points = [
        f"{_place(row)}, per {row['per']}: {_with_interval(row)}"
        for _, row in of_panel[of_panel["metric"].eq("fpr_5") & of_panel["per"].eq("client")].iterrows()
    ]
    if points:
        about = "Of attack-free clients the panel flags, at the threshold set for 5 %:"
        blocks.append(finding("False alarms", about, points))
    tpr = working[working["metric"].eq("tpr_5")]
    return [*blocks, _failures(tpr)] if len(tpr) else blocks


def _best_detector(working: pd.DataFrame, ranked: pd.DataFrame) -> Block:
    name, best = str(ranked.index[0]), ranked.iloc[0]
    runners_up = [f"{other} {share(value_at(ranked, other, 'tpr_5'))}" for other in ranked.index[1:4]]
    return finding(
        "The best detector",
        f"{name} finds {share(best['tpr_5'])} of the malicious clients at 5 % false positives and "
        f"{share(best['tpr_1'])} at 1 %, on average over the {_count_cells(working)} cells in which the attack "
        f"works ({share(best['tpr_5_plain'])} and {share(best['tpr_1_plain'])} where it does not hide).",
        [f"Next: {listed(runners_up)}."],
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


def _how(results: Sequence[RunScores]) -> list[Block]:
    groups: dict[tuple[str, str, str], list[RunScores]] = {}
    for run in results:
        cell = run.cell
        groups.setdefault((cell["task"], cell["setting"], cell["partition"]), []).append(run)
    rows = []
    for (task, setting, partition), runs in groups.items():
        scenario = runs[0].scenario
        attack_free = [run for run in runs if run.is_attack_free]
        drawn = scenario.clients_per_round or scenario.num_clients
        rows.append(
            {
                "task": TASK_NAMES.get(task, task),
                "clients": f"{drawn} of {scenario.num_clients}, {setting}",
                "partition": PARTITION_NAMES.get(partition, partition),
                "rounds": str(scenario.rounds),
                "attacked runs": str(sum(not run.scenario.is_control for run in runs)),
                "attack-free runs": str(len(attack_free)),
                "benign clients": str(sum(len(np.unique(run.arrays["client"])) for run in attack_free)),
            }
        )
    about = (
        "A cell is a task, a partition, a way of drawing clients and an attack. Half of the attack-free runs of a "
        "task and partition set the thresholds (by the ranks of their scores), the other half tests them. Per client: "
        "the last score of a detector that accumulates over rounds, the mean over the client's rounds of any other. An "
        "attack works where its ASR lies 20 points above its control's or, for one without a target, main accuracy 20 "
        "points below. Intervals are over runs, 95 %. Detectors that need data of the server's own "
        "(fltrust, and the part of deepsight that queries a model) are left out."
    )
    caption = "What was run. Each attacked run has a control of the same seed, by which the attack is judged."
    return [text(about), table(rows, caption)]


def _ranking_blocks(figures: pd.DataFrame, ranked: pd.DataFrame) -> list[Block]:
    if not len(ranked):
        return [text("No attack works here.")]
    attack_free = figures[figures["family"].eq("none") & figures["per"].eq("client")]
    alarms = attack_free.pivot_table(index="detector", columns="metric", values="value", aggfunc="mean")
    updates = figures[figures["works"].eq(1) & figures["per"].eq("update")]
    by_update = updates.pivot_table(index="detector", columns="metric", values="value", aggfunc="mean")
    rows = [
        {
            "detector": str(name),
            "AUC": number(row["auc"]),
            "TPR at 5 %": share(row["tpr_5"]),
            "TPR at 1 %": share(row["tpr_1"]),
            "not adaptive, 5 %": share(row["tpr_5_plain"]),
            "attack-free, 5 %": share(value_at(alarms, name, "fpr_5")),
            "per update: AUC": number(value_at(by_update, name, "auc")),
            "TPR at 5 % ": share(value_at(by_update, name, "tpr_5")),
        }
        for name, row in ranked.iterrows()
    ]
    caption = (
        "Means over cells in which the attack works, per client and, on the right, per update. Attack-free: share of "
        "benign clients above the threshold set for 5 %."
    )
    return [table(rows, caption, folded=False)]


def _heat_maps(working: pd.DataFrame) -> list[Block]:
    blocks = []
    for key, part in working[working["metric"].eq("tpr_5")].groupby(GROUP, sort=False):
        grid = part.pivot_table(index="detector", columns="family", values="value")
        grid = grid.loc[grid.mean(axis=1).sort_values(ascending=False).index]
        if grid.shape[1] > 2:
            blocks.append(_heat_map(grid, _place(dict(zip(GROUP, key, strict=True)))))
    return blocks


def _heat_map(grid: pd.DataFrame, place: str) -> Block:
    best, hardest = str(grid.index[0]), str(grid.max(axis=0).idxmin())
    title = f"{place}: {best} finds most ({share(grid.iloc[0].mean())}); {hardest} hides best"

    def draw(canvas: Figure) -> None:
        ax = canvas.subplots()
        sns.heatmap(
            grid * 100, vmin=0, vmax=100, cmap="Greys", annot=True, fmt=".0f", annot_kws={"size": 6.5}, linewidths=0.3,
            linecolor="white", cbar_kws={"label": "TPR at 5 % FPR, per client (%)", "shrink": 0.6}, ax=ax,
        )  # fmt: skip
        ax.set(xlabel="attack", ylabel="detector")
        ax.tick_params(axis="both", labelsize=7.5)
        ax.set_title(title, loc="left")

    size = (2.8 + 0.34 * grid.shape[1], 1.7 + 0.19 * len(grid))
    return figure(draw, size, "Share of malicious clients above the threshold that 5 % of attack-free clients pass.")


def _hard_cells(by_client: pd.DataFrame) -> list[Block]:
    sampled = by_client[by_client["setting"].ne("full") & by_client["metric"].isin(("auc", "tpr_5", "tpr_1"))]
    attacked = sampled[sampled["family"].ne("none")]
    if not len(attacked):
        return [text("Not run.")]
    blocks = []
    for setting, part in attacked.groupby("setting", sort=False):
        grid = part.pivot_table(index="detector", columns="metric", values=["value", "low", "high"])
        order = grid["value"]["tpr_5"].sort_values(ascending=False).index[:HARD_ROWS]
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
    return [text(about), table(rows, "Flags at 5 %; attack-free: the share of benign clients flagged.", folded=False)]


def _rates_under_null(figures: pd.DataFrame) -> dict[str, str]:
    row = {}
    for per in ("client", "update"):
        rows = figures[figures["per"].eq(per)]
        row[f"TPR at 5 %, per {per}"] = share(rows[rows["works"].eq(1) & rows["metric"].eq("tpr_5")]["value"].mean())
        alarms = rows[rows["family"].eq("none") & rows["metric"].eq("fpr_5")]
        row[f"attack-free, per {per}"] = _with_interval(alarms.iloc[0]) if len(alarms) else "–"
    return row


def _target_labels(results: Sequence[RunScores]) -> list[Block]:
    rows = []
    for key, part in label_accuracy(results).groupby(CELL, sort=False):
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


def _failed_attacks(figures: pd.DataFrame, results: Sequence[RunScores]) -> list[Block]:
    of_panel = figures[figures["detector"].eq(PANEL) & figures["per"].eq("client") & figures["metric"].eq("tpr_5")]
    tpr = {tuple(key): value for *key, value in of_panel[[*CELL, "value"]].itertuples(index=False, name=None)}
    rows = [
        {
            "cell": _cell_name(key),
            "gain": number(100 * gain, 0),
            "panel, TPR at 5 %": share(tpr.get(key, np.nan)),
        }
        for key, gain in gains(results).items()
        if gain < WORKING_GAIN
    ]
    caption = "Points of ASR above the control, or of main accuracy below it; these cells are in no mean above."
    return [table(rows, caption)]
