"""The gauntlet's page: what its table says, in sentences, pictures and tables that are computed from it."""

from collections.abc import Sequence
from pathlib import Path

import gauntlet_tables as tables
import numpy as np
import pandas as pd
import seaborn as sns
from attack_table import with_section
from matplotlib.figure import Figure

from gradlens.plots import percent
from gradlens.reporting.page import Block, figure, finding, listed, measured, number, render, section, table, text
from gradlens.reporting.page import write as write_page

NAMES = {"fashion_mnist": "Fashion-MNIST", "digits": "digits"}
PARTITIONS = {"iid": "iid", "dirichlet": "Dirichlet 0.5"}
ENOUGH = 0.5  # TPR at 5 % FPR below which a detector finds too little to be called working
INTERVAL = ("value", "low", "high")
BEGIN, END = "<!-- gauntlet -->", "<!-- /gauntlet -->"
BEFORE = "<!-- attacks -->"  # the next section
TOP = 10  # detectors in the README
MOST = 8  # rows of a picture's cells that are named


def write(figures: pd.DataFrame, results: Sequence[tables.Scores], path: Path) -> None:
    """Writes the page of the gauntlet's figures."""
    client = figures[figures["per"].eq("client")]
    working = client[client["works"].eq(1)]
    ranked = ranking(working)
    sections = [
        section("how", "What was run", _how(results)),
        section("ranking", "Detectors over all cells in which the attack works", _ranking(figures, ranked)),
        section("cells", "Cell by cell", _heat_maps(working)),
        section("hard", "Clients drawn at random, attackers that come and go", _hard(client)),
        section("panel", "The panel under the three nulls", _panels(figures)),
        section("labels", "Which label the attackers want", _labels(results)),
        section("weak", "Cells in which the attack does not work", _weak(figures, results)),
    ]
    page = render("Gauntlet", _lead(results), _findings(figures, working, ranked), sections)
    write_page(page, path)


def readme(text_of_readme: str, figures: pd.DataFrame) -> str:
    """The README with its section on the detectors written anew from the figures of gauntlet.csv."""
    return with_section(text_of_readme, readme_section(figures), BEGIN, END, BEFORE)


def readme_section(figures: pd.DataFrame) -> str:
    """The README's section on the detectors."""
    client = figures[figures["per"].eq("client")]
    working, free = client[client["works"].eq(1)], client[client["family"].eq("none") & client["metric"].eq("fpr_5")]
    ranked = ranking(working)
    lines = ["| detector | AUC | TPR at 5 % FPR | TPR at 1 % FPR | 5 %, nobody hides | attack-free at 5 % |"]
    lines += ["| --- | --- | --- | --- | --- | --- |"]
    for name, row in ranked.head(TOP).iterrows():
        alarms = free[free["detector"].eq(name)]["value"].mean()
        cells = [number(row["auc"]), _share(row["tpr_5"]), _share(row["tpr_1"]), _share(row["tpr_5_plain"])]
        lines.append(f"| `{name}` | {' | '.join([*cells, _share(alarms)])} |")
    lead = (
        f"{len(ranked)} detectors against {working['family'].nunique()} attacks that work, in {_cells(working)} cells "
        "(task, partition, attack, way of drawing clients), per client over a run; thresholds come from attack-free "
        f"runs of other seeds. The {min(TOP, len(ranked))} best on average; all of them, cell by cell with intervals, "
        "are in [`reports/gauntlet.html`](reports/gauntlet.html). `make gauntlet` runs it, "
        "`make gauntlet SEEDS=7,8 FAMILIES=trigger` a part of it."
    )
    return "\n\n".join(["## The detectors, measured", lead, "\n".join(lines), *_hard_sentences(client)])


def _hard_sentences(client: pd.DataFrame) -> list[str]:
    """What the panel and the best other detector find where only a fifth of the clients takes part in a round."""
    sampled = client[client["setting"].ne("full") & client["family"].ne("none") & client["metric"].eq("tpr_5")]
    said = []
    for setting, part in sampled.groupby("setting", sort=False):
        own = part[part["detector"].eq(tables.PANEL)]
        others = part[~part["detector"].str.startswith(tables.PANEL)].sort_values("value")
        if len(own) and len(others):
            first, other = own.iloc[0], others.iloc[-1]
            found = measured(first["value"], first["low"], first["high"], first["bound"], share=True)
            said.append(
                f"{setting}: the panel {found}, the best other (`{other['detector']}`) {_share(other['value'])}"
            )
    if not said:
        return []
    return [f"Hardest is a trigger under label skew where each client is seen in few rounds. {'; '.join(said)}."]


def ranking(working: pd.DataFrame) -> pd.DataFrame:
    """Per detector the mean over cells of its figures per client, the best first; index: detector."""
    full = working[working["metric"].isin(("auc", "tpr_1", "tpr_5"))]
    means = full.pivot_table(index="detector", columns="metric", values="value", aggfunc="mean")
    honest = full[full["adaptive"].eq(0)].pivot_table(
        index="detector", columns="metric", values="value", aggfunc="mean"
    )
    means = means.join(honest[["tpr_1", "tpr_5"]].add_suffix("_plain"))
    return means.sort_values("tpr_5", ascending=False)


def _cells(figures: pd.DataFrame) -> int:
    return len(figures[tables.KEYS].drop_duplicates())


def _lead(results: Sequence[tables.Scores]) -> str:
    attacked = [run for run in results if not run.scenario.is_control]
    free = [run for run in results if run.free]
    families = {run.cell["family"] for run in attacked}
    tasks = sorted({NAMES.get(run.scenario.task, run.scenario.task) for run in results})
    return (
        f"{len(families)} attacks on {' and '.join(tasks)}, {len(attacked)} attacked runs and {len(free)} attack-free "
        f"ones, {len(results[0].arrays['detectors'])} detectors and settings. Scores of attack-free runs of other "
        "seeds set every threshold; further attack-free runs test it."
    )


def _findings(figures: pd.DataFrame, working: pd.DataFrame, ranked: pd.DataFrame) -> list[Block]:
    found = []
    if len(ranked):
        best, row = str(ranked.index[0]), ranked.iloc[0]
        beside = [f"{name} {_share(ranked.loc[name, 'tpr_5'])}" for name in ranked.index[1:4]]
        found.append(
            finding(
                "The best detector",
                f"{best} finds {_share(row['tpr_5'])} of the malicious clients at 5 % false positives and "
                f"{_share(row['tpr_1'])} at 1 %, on average over the {_cells(working)} cells in which the attack "
                f"works ({_share(row['tpr_5_plain'])} and {_share(row['tpr_1_plain'])} where it does not hide).",
                [f"Next: {listed(beside)}."],
            )
        )
    free = figures[figures["family"].eq("none") & figures["detector"].eq(tables.PANEL)]
    points = [
        f"{_place(row)}, per {row['per']}: {measured(row['value'], row['low'], row['high'], row['bound'], share=True)}"
        for _, row in free[free["metric"].eq("fpr_5") & free["per"].eq("client")].iterrows()
    ]
    if points:
        about = "Of attack-free clients the panel flags, at the threshold set for 5 %:"
        found.append(finding("False alarms", about, points))
    tpr = working[working["metric"].eq("tpr_5")]
    if len(tpr):
        best_of_cell = tpr.groupby(tables.KEYS)["value"].max()
        missed = best_of_cell[best_of_cell < ENOUGH]
        said = (
            f"In {len(missed)} of {len(best_of_cell)} cells no detector finds half of the malicious clients at 5 %: "
            + listed([_cell_name(key) for key in missed.index])
            if len(missed)
            else f"In each of the {len(best_of_cell)} cells some detector finds at least half of the malicious clients."
        )
        own = tpr[tpr["detector"].eq(tables.PANEL)].sort_values("value")
        worst = [f"{_place(row)}, {row['family']}: {_share(row['value'])}" for _, row in own.head(4).iterrows()]
        found.append(finding("Where it fails", said, [f"The panel's weakest cells: {'; '.join(worst)}."]))
    return found


def _share(value: float) -> str:
    return "–" if np.isnan(value) else percent(value)


def _place(row: pd.Series) -> str:
    place = f"{NAMES.get(row['task'], row['task'])}, {PARTITIONS.get(row['partition'], row['partition'])}"
    return place if row["setting"] == "full" else f"{place}, {row['setting']}"


def _cell_name(key: Sequence[str]) -> str:
    row = pd.Series(dict(zip(tables.KEYS, key, strict=True)))
    return f"{row['family']} ({_place(row)})"


def _how(results: Sequence[tables.Scores]) -> list[Block]:
    rows = []
    groups: dict[tuple[str, str, str], list[tables.Scores]] = {}
    for run in results:
        cell = run.cell
        groups.setdefault((cell["task"], cell["setting"], cell["partition"]), []).append(run)
    for (task, setting, partition), runs in groups.items():
        first = runs[0].scenario
        free = [run for run in runs if run.free]
        rows.append(
            {
                "task": NAMES.get(task, task),
                "clients": f"{first.clients_per_round or first.num_clients} of {first.num_clients}, {setting}",
                "partition": PARTITIONS.get(partition, partition),
                "rounds": str(first.rounds),
                "attacked runs": str(sum(not run.scenario.is_control for run in runs)),
                "attack-free runs": str(len(free)),
                "benign clients": str(sum(len(np.unique(run.arrays["client"])) for run in free)),
            }
        )
    return [
        text(
            "A cell is a task, a partition, a way of drawing clients and an attack. Half of the attack-free runs of a "
            "task and partition set the thresholds (their scores' ranks), the other half tests them. Per client: the "
            "last score of a detector that looks back, the mean over the client's rounds of one that does not. An "
            "attack works where its ASR lies 20 points above its control's, or, of one without a target, main accuracy "
            "20 points below. Intervals are 95 % bootstraps over runs. Detectors that need the server's own data "
            "(fltrust, and what deepsight asks a model) are not asked."
        ),
        table(rows, "What was run. Each attacked run has a control of the same seed, by which the attack is judged."),
    ]


def _ranking(figures: pd.DataFrame, ranked: pd.DataFrame) -> list[Block]:
    if not len(ranked):
        return [text("No attack works here.")]
    free = figures[figures["family"].eq("none") & figures["per"].eq("client")]
    alarms = free.pivot_table(index="detector", columns="metric", values="value", aggfunc="mean")
    update = figures[figures["works"].eq(1) & figures["per"].eq("update")]
    by_update = update.pivot_table(index="detector", columns="metric", values="value", aggfunc="mean")

    def mean(of: pd.DataFrame, name: str, metric: str) -> float:
        return float(of.loc[name, metric]) if name in of.index and metric in of.columns else np.nan

    rows = [
        {
            "detector": str(name),
            "AUC": number(row["auc"]),
            "TPR at 5 %": _share(row["tpr_5"]),
            "TPR at 1 %": _share(row["tpr_1"]),
            "not adaptive, 5 %": _share(row["tpr_5_plain"]),
            "attack-free, 5 %": _share(mean(alarms, str(name), "fpr_5")),
            "per update: AUC": number(mean(by_update, str(name), "auc")),
            "TPR at 5 % ": _share(mean(by_update, str(name), "tpr_5")),
        }
        for name, row in ranked.iterrows()
    ]
    caption = "Means over cells in which the attack works, per client and, on the right, per update. "
    return [
        table(rows, caption + "Attack-free: share of benign clients above the threshold set for 5 %.", folded=False)
    ]


def _heat_maps(working: pd.DataFrame) -> list[Block]:
    tpr = working[working["metric"].eq("tpr_5")]
    blocks = []
    for (task, partition, setting), part in tpr.groupby(["task", "partition", "setting"], sort=False):
        grid = part.pivot_table(index="detector", columns="family", values="value")
        grid = grid.loc[grid.mean(axis=1).sort_values(ascending=False).index]
        place = _place(pd.Series({"task": task, "partition": partition, "setting": setting}))
        if grid.shape[1] > 2:
            blocks.append(_heat_map(grid, place))
    return blocks


def _heat_map(grid: pd.DataFrame, place: str) -> Block:
    best, worst = str(grid.index[0]), str(grid.columns[grid.max(axis=0).argmin()])
    title = f"{place}: {best} finds most ({_share(grid.iloc[0].mean())}); {worst} hides best"

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


def _hard(client: pd.DataFrame) -> list[Block]:
    sampled = client[client["setting"].ne("full") & client["metric"].isin(("auc", "tpr_5", "tpr_1"))]
    attacked = sampled[sampled["family"].ne("none")]
    if not len(attacked):
        return [text("Not run.")]
    blocks = []
    for setting, part in attacked.groupby("setting", sort=False):
        grid = part.pivot_table(index="detector", columns="metric", values=["value", "low", "high"])
        order = grid["value"]["tpr_5"].sort_values(ascending=False).index[:MOST]
        rows = [
            {
                "detector": str(name),
                **{
                    label: measured(*(float(grid.loc[name, (of, metric)]) for of in INTERVAL), share=share)
                    for label, metric, share in (
                        ("AUC", "auc", False), ("TPR at 5 %", "tpr_5", True), ("TPR at 1 %", "tpr_1", True),
                    )
                },
            }
            for name in order
        ]  # fmt: skip
        blocks.append(table(rows, f"{setting}: the {len(rows)} best of {len(grid)} detectors, per client."))
    return blocks


def _panels(figures: pd.DataFrame) -> list[Block]:
    names = {tables.PANEL: "attack-free runs of other seeds", tables.STRETCH: "the run's own first rounds",
             tables.COHORT: "each cohort itself"}  # fmt: skip
    rows = []
    for place, part in figures[figures["detector"].isin(names)].groupby(["task", "partition", "setting"], sort=False):
        where = _place(pd.Series(dict(zip(("task", "partition", "setting"), place, strict=True))))
        for name, null in names.items():
            own = part[part["detector"].eq(name)]
            row = {"where": where, "null": null}
            for per in ("client", "update"):
                of = own[own["per"].eq(per)]
                hits = of[of["works"].eq(1) & of["metric"].eq("tpr_5")]["value"].mean()
                row[f"TPR at 5 %, per {per}"] = _share(hits) if hits == hits else "–"
                alarm = of[of["family"].eq("none") & of["metric"].eq("fpr_5")]
                row[f"attack-free, per {per}"] = (
                    measured(*alarm[["value", "low", "high"]].iloc[0], alarm["bound"].iloc[0], share=True)
                    if len(alarm)
                    else "–"
                )
            if len(own):
                rows.append(row)
    about = (
        "The panel learns scales and covariance from its null. Attack-free runs show what benign clients do in every "
        "round; the first rounds of a run, declared clean, show only what they do early; a cohort by itself has fewer "
        "clients than features, and its rate is nominal."
    )
    return [text(about), table(rows, "Flags at 5 %; attack-free: what of benign clients is flagged.", folded=False)]


def _labels(results: Sequence[tables.Scores]) -> list[Block]:
    found = tables.named(results)
    rows = []
    for key, part in found.groupby(tables.KEYS, sort=False):
        own = part.set_index("whose")
        row = {"cell": _cell_name(key)}
        for whose in ("attackers", "flagged"):
            of = own.loc[whose] if whose in own.index else None
            row[f"target right, {whose}"] = (
                "–" if of is None else measured(of["value"], of["low"], of["high"], share=True)
            )
            row[f"updates, {whose}"] = "0" if of is None else str(int(of["clients"]))
        rows.append(row)
    about = (
        "`suspected_labels` names the label that an update pushes towards, here in the first three attacked rounds: of "
        "all attackers, and of those that the panel flags in that round."
    )
    return [text(about), table(rows, "Share of updates whose suspected target label is the attack's.")]


def _weak(figures: pd.DataFrame, results: Sequence[tables.Scores]) -> list[Block]:
    own = figures[figures["detector"].eq(tables.PANEL) & figures["per"].eq("client") & figures["metric"].eq("tpr_5")]
    found = {tuple(key): value for *key, value in own[[*tables.KEYS, "value"]].itertuples(index=False, name=None)}
    rows = [
        {
            "cell": _cell_name(key),
            "gain": number(100 * gain, 0),
            "panel, TPR at 5 %": _share(found.get(key, np.nan)) if key in found else "–",
        }
        for key, gain in tables.gains(results).items()
        if gain < tables.WORKS
    ]
    caption = "Points of ASR above the control, or of main accuracy below it; these cells are in no mean above."
    return [table(rows, caption)]
