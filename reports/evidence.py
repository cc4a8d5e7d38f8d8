"""How far verdicts on sketches are those on whole updates: `python reports/evidence.py --help`.

Reads runs of the gauntlet that were kept (`python reports/gauntlet.py --keep`), one of each cell in which the attack
works, asks every detector that compares whole updates after every round of the whole log and of its sketches of six
sizes, and writes evidence.csv (a row per run, detector and size) and evidence.html. A run whose rows are there
is not asked again; without a folder the page alone is written.
"""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import gauntlet_tables
import numpy as np
import pandas as pd
import seaborn as sns
from gauntlet_page import NAMES, PARTITIONS
from matplotlib.figure import Figure
from tqdm import tqdm

from gradlens import DETECTORS, Evidence
from gradlens.detectors import Detector, detect
from gradlens.evaluation import auc, bootstrap, per_client, with_truth
from gradlens.log import UpdateLog
from gradlens.plots import count
from gradlens.reporting.page import Block, figure, finding, listed, number, render, rows_of, section, table, text, write
from gradlens.run import Run
from simulations import Scenario

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "reports" / "evidence"
SETTINGS = ("fashion_mnist", "digits")
WIDTHS = (64, 128, 256, 512, 1024, 2048)
USUAL = 512
NEAR = 0.02  # of an AUC
FINAL = {  # rest on the final layer alone, which is recorded whole in these models: nothing can differ
    "final_bias", "final_rows", "two_clusters", "agglomerative", "bilgin", "tolpegin", "lfighter", "auror", "deepsight",
    "freqfed",
}  # fmt: skip
NUMBERS = {"multi_metrics", "signguard", "alignins", "rlr", "flanders"}  # need the numbers themselves, and abstain
COSINES = {"layer_cosines", "hdbscan", "isolation_forest", "local_outlier_factor"}  # score `layer_cosines`
NEEDS = {"fltrust"}  # what the server would have to hold data for is not asked
COLUMNS = ("run", "task", "partition", "family", "seed", "detector", "width", "auc_full", "auc", "equal_flags")


def main(words: Sequence[str] | None = None) -> None:
    """Asks, writes the rows and the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="?", help="the kept runs of the gauntlet, runs/gauntlet")
    parser.add_argument("--most", type=int, default=100, help="runs of a setting at most (default: every cell's)")
    parser.add_argument("--out", type=Path, default=OUT, help="without its ending")
    asked = parser.parse_args(words)
    path = asked.out.with_suffix(".csv")
    if asked.runs is not None:
        chosen = [(setting, run) for setting in SETTINGS for run in sample(asked.runs / setting, asked.most)]
        known = set(pd.read_csv(path)["run"]) if path.exists() else set()
        for setting, run in tqdm(chosen, desc="evidence", disable=None):
            if run.name not in known:
                rows = pd.DataFrame(compared(setting, run), columns=list(COLUMNS))
                rows.to_csv(path, mode="a", header=not path.exists(), index=False, lineterminator="\n")
    write_page(pd.read_csv(path), asked.out.with_suffix(".html"))


def sample(folder: Path, most: int) -> list[Run]:
    """Of every cell in which the attack works one run, its seed taking turns; as many as `most`, spread over cells."""
    figures = pd.read_csv(ROOT / "reports" / "gauntlet.csv", keep_default_na=False)
    working = set(figures.loc[figures["works"].eq(1), gauntlet_tables.KEYS].itertuples(index=False, name=None))
    cells: dict[tuple[str, ...], list[tuple[int, Path]]] = {}
    for path in sorted(folder.iterdir()):
        scenario = Scenario(**Run.open(path).scenario) if (path / "run.json").exists() else None
        if scenario is None or scenario.is_control:
            continue
        cell = tuple(gauntlet_tables.Scores(scenario, folder.name, {}).cell[key] for key in gauntlet_tables.KEYS)
        if cell in working:
            cells.setdefault(cell, []).append((scenario.seed, path))
    paths = [sorted(cells[cell])[turn % len(cells[cell])][1] for turn, cell in enumerate(sorted(cells))]
    places = np.unique(np.linspace(0, len(paths) - 1, min(most, len(paths))).round().astype(int)) if paths else []
    return [Run.open(paths[place]) for place in places]


def detectors() -> dict[str, Detector]:
    """Those that compare whole updates, by name."""
    return {name: build() for name, build in DETECTORS.items() if name not in FINAL | NUMBERS | NEEDS}


def compared(setting: str, run: Run) -> Iterator[dict[str, object]]:
    """The rows of one run; its name is the seed of its signs."""
    scenario = Scenario(**run.scenario)
    of_run = {"run": run.name, "seed": scenario.seed} | gauntlet_tables.Scores(scenario, setting, {}).cell
    asked = detectors()
    whole = judged(run, run.log, asked)
    for width in WIDTHS:
        sketched = judged(run, Evidence("sketch", width=width, seed=int(run.name, 16)).of_log(run.log), asked)
        for name in asked:
            (before, flags), (after, others) = whole[name], sketched[name]
            figures = {
                "auc_full": round(before, 6),
                "auc": round(after, 6),
                "equal_flags": round(equal(flags, others), 6),
            }
            yield {key: (of_run | {"detector": name, "width": width} | figures)[key] for key in COLUMNS}


def judged(run: Run, log: UpdateLog, asked: Mapping[str, Detector]) -> dict[str, tuple[float, pd.DataFrame]]:
    """Detector -> its AUC over the clients, as the gauntlet takes it, and its table."""
    scores = with_truth(detect(log, asked), run.truth, idle=True)
    hows = {name: "last" if name in gauntlet_tables.LOOKS_BACK else "mean" for name in asked}
    clients = per_client(scores, (), hows)
    found = {}
    for name in asked:
        of = clients[clients["detector"].eq(name) & clients["abstained"].eq("")]
        area = auc(of["score"].to_numpy(np.float64), of["malicious"].to_numpy(bool)) if len(of) else np.nan
        found[name] = (area, scores[scores["detector"].eq(name)])
    return found


def equal(one: pd.DataFrame, other: pd.DataFrame) -> float:
    """Share of the updates that both tables flag, or neither."""
    return float((one["flag"].to_numpy() == other["flag"].to_numpy()).mean())


def write_page(rows: pd.DataFrame, path: Path) -> None:
    """Writes the page of the rows of evidence.csv."""
    summary = summarised(rows)
    sections = [
        section("how", "What was compared", _how(rows)),
        section("sizes", "Sizes of sketches", [_curves(summary), _areas(summary), _flags(summary)]),
        section("abstain", "Who abstains", _abstains()),
    ]
    lead = f"Verdicts on count sketches beside verdicts on whole updates, {count(rows['run'].nunique(), 'run')}."
    write(render("Evidence levels", lead, findings(summary), sections), path)
    print(f"{len(rows)} rows: {path}")


def summarised(rows: pd.DataFrame) -> pd.DataFrame:
    """Per detector and width: means over runs of both AUCs, their difference with its interval, equal flags, farthest.

    auc_full, auc, difference, low, high, away (the mean size of a run's difference), equal_flags, runs.
    """
    summary = []
    for (name, width), part in rows.dropna(subset=["auc", "auc_full"]).groupby(["detector", "width"], sort=False):
        apart = (part["auc"] - part["auc_full"]).to_numpy()
        low, high = bootstrap(apart)
        row = {"detector": name, "width": width, "auc_full": part["auc_full"].mean(), "auc": part["auc"].mean()}
        row |= {"difference": apart.mean(), "low": low, "high": high, "away": np.abs(apart).mean()}
        summary.append(row | {"equal_flags": part["equal_flags"].mean(), "runs": len(part)})
    return pd.DataFrame(summary).sort_values(["detector", "width"], ignore_index=True)


def findings(summary: pd.DataFrame) -> list[Block]:
    """What the figures say."""
    usual = summary[summary["width"].eq(USUAL)]
    near = usual["difference"].abs() <= NEAR
    beyond = [f"{row.detector}: {interval(row)} from {row.auc_full:.3f}" for row in rows_of(usual[~near])]
    said = f"At {USUAL} numbers a layer {near.sum()} of {count(len(usual), 'detector')} keep their mean AUC"
    said += f" within {NEAR:g}"
    said += f"; beyond it: {listed(usual.loc[~near, 'detector'].tolist())}." if beyond else "."
    if beyond and set(usual.loc[~near, "detector"]) <= COSINES:
        said += " All of these score cosines to the cohort's coordinate-wise median, where a sketch has only the median"
        said += " of its own numbers."
    sure = usual[(usual["low"] >= -NEAR) & (usual["high"] <= NEAR)]["detector"].tolist()
    certain = f"For {len(sure)} of them the 95 % interval of the difference lies within it: {listed(sure, 30)}."
    by_width = summary.groupby("width")["difference"].agg(lambda each: int((each.abs() <= NEAR).sum()))
    total = summary.groupby("width")["detector"].count()
    sizes = [f"{width} numbers: {by_width[width]} of {total[width]} detectors" for width in by_width.index]
    single = f"In a single run the AUC differs by {usual['away'].mean():.3f} on average at {USUAL} numbers; "
    single += f"{100 * usual['equal_flags'].mean():.1f} % of all flags are the same."
    return [
        finding("Agreement", said, beyond),
        finding("Certainty", certain),
        finding("Size", f"Detectors within {NEAR:g} of their AUC on whole updates, by the size of the sketch.", sizes),
        finding("Single runs", single),
    ]


def interval(row: Any) -> str:
    """A difference of AUCs with its interval."""
    return f"{number(row.difference, 3)} [{number(row.low, 3)}, {number(row.high, 3)}]"


def _how(rows: pd.DataFrame) -> list[Block]:
    runs = rows.drop_duplicates("run")
    cells = runs.groupby(["task", "partition"])["family"].agg(["count", lambda each: listed(sorted(each), 40)])
    listing = [
        {
            "task": NAMES.get(task, task),
            "labels": PARTITIONS.get(partition, partition),
            "runs": str(number),
            "attacks": who,
        }
        for (task, partition), (number, who) in zip(cells.index, cells.to_numpy(), strict=True)
    ]
    said = "One run of each cell of the gauntlet in which the attack works, its seed taking turns. Every detector that "
    said += "compares whole updates is asked after every round, of the whole log and of its sketches, each run under "
    said += "signs of its own. A client's score is taken as in the gauntlet, the AUC is that of a run's attackers "
    said += (
        "against its benign clients, intervals are bootstraps over runs. The final layer, biases and layers smaller "
    )
    said += "than a sketch are whole."
    return [text(said), table(listing, "Runs")]


def _curves(summary: pd.DataFrame) -> Block:
    def draw(canvas: Figure) -> None:
        ax = canvas.subplots()
        sns.lineplot(summary, x="width", y="away", hue="detector", marker="o", ax=ax, palette="husl")
        ax.set_xscale("log", base=2)
        ax.set_xticks(WIDTHS, [str(width) for width in WIDTHS])
        ax.axhline(NEAR, color="0.5", linestyle=":")
        ax.set(xlabel="numbers a layer", ylabel="|AUC of sketches - AUC of whole updates|")
        ax.set_title("Distance of the AUCs of single runs", loc="left")
        sns.move_legend(ax, "upper left", bbox_to_anchor=(1, 1), frameon=False, title=None)

    return figure(draw, (9.5, 6), f"Mean over runs of the distance between both AUCs; dotted: {NEAR:g}.")


def _areas(summary: pd.DataFrame) -> Block:
    listing = []
    for name, part in summary.groupby("detector"):
        differences = {str(row.width): interval(row) for row in rows_of(part)}
        listing.append({"detector": str(name), "AUC, whole": f"{part['auc_full'].iloc[0]:.3f}"} | differences)
    return table(
        listing, "AUC of sketches minus AUC of whole updates, by numbers a layer. Means over runs.", folded=False
    )


def _flags(summary: pd.DataFrame) -> Block:
    wide = summary.pivot_table(index="detector", columns="width", values="equal_flags")
    listing = [
        {"detector": str(name)} | {str(width): f"{100 * value:.1f}" for width, value in row.items()}
        for name, row in wide.iterrows()
    ]
    return table(listing, "Share of updates with the same flag, in per cent, by numbers a layer.", folded=False)


def _abstains() -> list[Block]:
    said = f"What needs a layer's own numbers abstains on a sketch: {listed(sorted(NUMBERS), 20)}. "
    said += f"What rests on the final layer alone has it whole, and says the same: {listed(sorted(FINAL), 20)}. "
    said += "The panel goes without the share of a client's signs that agree with the cohort's."
    return [text(said)]


if __name__ == "__main__":
    main()
