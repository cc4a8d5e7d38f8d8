"""Verdicts on sketches beside verdicts on whole updates: `python -m simulations.studies.evidence_levels --help`.

Takes runs of the gauntlet that were kept (`python -m simulations.studies.gauntlet --keep`), one of each cell in which
the attack works. Every detector that compares whole updates judges every round twice: from the whole log, and from its
sketches, in six sizes. Writes `evidence.csv`, a row per run, detector and size, and `evidence.html`. A run whose rows
are there is not judged again; without a folder of runs only the page is written.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from gradlens import DETECTORS, Evidence
from gradlens.detectors import Detector, detect
from gradlens.evaluation import auc, mean_interval, per_client, with_truth
from gradlens.log import UpdateLog
from gradlens.plots import count
from gradlens.reporting.page import Block, figure, finding, listed, number, render, rows_of, section, table, text, write
from gradlens.run import Run
from simulations import stored_scenario
from simulations.studies.conditions import CELL, PARTITION_NAMES, TASK_NAMES, cell_of
from simulations.studies.gauntlet_figures import CUMULATIVE
from simulations.studies.gauntlet_figures import committed as gauntlet_figures
from simulations.studies.results import REPORTS, collected, run_as_command

OUT = REPORTS / "evidence"
SETTINGS = ("fashion_mnist", "digits")
WIDTHS = (64, 128, 256, 512, 1024, 2048)  # numbers in the sketch of a layer
DEFAULT_WIDTH = 512
CLOSE = 0.02  # of an AUC
FINAL_LAYER_ONLY = {  # need the final layer alone, which these models record whole: nothing can differ
    "final_bias", "final_rows", "two_clusters", "agglomerative", "bilgin", "tolpegin", "lfighter", "auror", "deepsight",
    "freqfed",
}  # fmt: skip
NEED_COORDINATES = {"multi_metrics", "signguard", "alignins", "rlr", "flanders"}  # abstain on a sketch
COSINES = {"layer_cosines", "hdbscan", "isolation_forest", "local_outlier_factor"}  # score `layer_cosines`
NEED_SERVER_DATA = {"fltrust"}  # left out: the server holds no data here
COLUMNS = ("run", "task", "partition", "family", "seed", "detector", "width", "auc_full", "auc", "equal_flags")


def main(arguments: Sequence[str] | None = None) -> None:
    """Judges, and writes the rows and the page."""
    parser = argparse.ArgumentParser(
        prog="simulations.studies.evidence_levels", description=(__doc__ or "").partition(":")[0] + "."
    )
    parser.add_argument("runs", type=Path, nargs="?", help="folder of the kept runs, runs/gauntlet")
    parser.add_argument("--most", type=int, default=100, help="most runs of a setting (default: one of every cell)")
    parser.add_argument("--out", type=Path, default=OUT, help="table and page, without their endings")
    options = parser.parse_args(arguments)
    path = options.out.with_suffix(".csv")
    if options.runs is not None:
        chosen = [run for setting in SETTINGS for run in sampled(options.runs / setting, options.most)]
        parts = [((run.name,), lambda run=run: compared(run)) for run in chosen]
        collected(path, ["run"], parts, resume=True, progress="runs")
    write_page(pd.read_csv(path), options.out.with_suffix(".html"))


def sampled(folder: Path, most: int) -> list[Run]:
    """One run of every cell in which the attack works, seeds taking turns; at most `most`, spread over the cells."""
    figures = gauntlet_figures()
    working = set(figures.loc[figures["works"].eq(1), CELL].itertuples(index=False, name=None))
    cells: dict[tuple[str, ...], list[tuple[int, Path]]] = {}
    for path in sorted(folder.iterdir()):
        scenario = stored_scenario(Run.open(path)) if (path / "run.json").exists() else None
        if scenario is None or scenario.is_control:
            continue
        cell = tuple(cell_of(scenario)[name] for name in CELL)
        if cell in working:
            cells.setdefault(cell, []).append((scenario.seed, path))
    paths = [sorted(cells[cell])[turn % len(cells[cell])][1] for turn, cell in enumerate(sorted(cells))]
    places = np.unique(np.linspace(0, len(paths) - 1, min(most, len(paths))).round().astype(int)) if paths else []
    return [Run.open(paths[place]) for place in places]


def detectors() -> dict[str, Detector]:
    """The detectors that compare whole updates, by name."""
    left_out = FINAL_LAYER_ONLY | NEED_COORDINATES | NEED_SERVER_DATA
    return {name: build() for name, build in DETECTORS.items() if name not in left_out}


def compared(run: Run) -> pd.DataFrame:
    """The rows of one run; its name is the seed of the signs of its sketches.

    Columns: `COLUMNS`; auc_full and auc are those of whole updates and of sketches, equal_flags the share of updates
    that get the same flag.
    """
    scenario = stored_scenario(run)
    about_run = {"run": run.name, "seed": scenario.seed} | cell_of(scenario)
    judges = detectors()
    whole = judged(run, run.log, judges)
    rows = []
    for width in WIDTHS:
        sketched = judged(run, Evidence("sketch", width=width, seed=int(run.name, 16)).of_log(run.log), judges)
        for name in judges:
            (auc_full, flags), (auc_sketched, sketched_flags) = whole[name], sketched[name]
            figures = {
                "auc_full": round(auc_full, 6),
                "auc": round(auc_sketched, 6),
                "equal_flags": round(equal_flags(flags, sketched_flags), 6),
            }
            rows.append(about_run | {"detector": name, "width": width} | figures)
    return pd.DataFrame(rows, columns=list(COLUMNS))


def judged(run: Run, log: UpdateLog, judges: Mapping[str, Detector]) -> dict[str, tuple[float, pd.DataFrame]]:
    """Detector -> its AUC over clients, taken as in the gauntlet, and its table of scores."""
    scores = with_truth(detect(log, judges), run.truth, idle=True)
    clients = per_client(scores, (), {name: "last" if name in CUMULATIVE else "mean" for name in judges})
    answers = {}
    for name in judges:
        known = clients[clients["detector"].eq(name) & clients["abstained"].eq("")]
        malicious = known["malicious"].to_numpy(bool)
        area = auc(known["score"].to_numpy(np.float64), malicious) if len(known) else np.nan
        answers[name] = (area, scores[scores["detector"].eq(name)])
    return answers


def equal_flags(first: pd.DataFrame, second: pd.DataFrame) -> float:
    """Share of the updates that get the same flag in both tables."""
    return float((first["flag"].to_numpy() == second["flag"].to_numpy()).mean())


# The page --------------------------------------------------------------------------------------------------------


def write_page(rows: pd.DataFrame, path: Path) -> None:
    """Writes the page from the rows of `evidence.csv`."""
    summary = summarized(rows)
    sections = [
        section("how", "What was compared", _how(rows)),
        section("sizes", "Sizes of sketches", [_distances(summary), _differences(summary), _flags(summary)]),
        section("abstain", "Who abstains", _abstentions()),
    ]
    lead = f"Verdicts on count sketches beside verdicts on whole updates, {count(rows['run'].nunique(), 'run')}."
    write(render("Evidence levels", lead, findings(summary), sections), path)
    print(f"{len(rows)} rows: {path}")


def summarized(rows: pd.DataFrame) -> pd.DataFrame:
    """Averages over runs, a row per detector and width.

    Parameters
    ----------
    rows : DataFrame
        As in `evidence.csv`.

    Returns
    -------
    DataFrame
        detector, width, auc_full, auc, difference (auc - auc_full) with its 95 % interval low, high, distance (mean
        size of a run's difference), equal_flags, runs.
    """
    summary = []
    for (name, width), part in rows.dropna(subset=["auc", "auc_full"]).groupby(["detector", "width"], sort=False):
        difference = (part["auc"] - part["auc_full"]).to_numpy()
        low, high = mean_interval(difference, -1, 1)
        row = {"detector": name, "width": width, "auc_full": part["auc_full"].mean(), "auc": part["auc"].mean()}
        row |= {"difference": difference.mean(), "low": low, "high": high, "distance": np.abs(difference).mean()}
        summary.append(row | {"equal_flags": part["equal_flags"].mean(), "runs": len(part)})
    return pd.DataFrame(summary).sort_values(["detector", "width"], ignore_index=True)


def findings(summary: pd.DataFrame) -> list[Block]:
    """What the figures say."""
    usual = summary[summary["width"].eq(DEFAULT_WIDTH)]
    is_close = usual["difference"].abs() <= CLOSE
    farther = usual.loc[~is_close, "detector"].tolist()
    points = [f"{row.detector}: {with_interval(row)} from {row.auc_full:.3f}" for row in rows_of(usual[~is_close])]
    agreement = (
        f"With {DEFAULT_WIDTH} numbers per layer, {is_close.sum()} of {count(len(usual), 'detector')} keep their mean "
        f"AUC to within {CLOSE:g}"
    )
    agreement += f"; {listed(farther)} {'does' if len(farther) == 1 else 'do'} not." if farther else "."
    if farther and set(farther) <= COSINES:
        agreement += " All of these score cosines to the cohort's coordinate-wise median, for which a sketch has only "
        agreement += "the median of its own numbers."
    certain = usual[(usual["low"] >= -CLOSE) & (usual["high"] <= CLOSE)]["detector"].tolist()
    close_at = summary["difference"].abs().le(CLOSE).groupby(summary["width"])
    sizes = [f"{width} numbers: {int(close.sum())} of {len(close)} detectors" for width, close in close_at]
    about_size = f"Detectors within {CLOSE:g} of their AUC on whole updates, by the size of the sketch."
    return [
        finding("Agreement", agreement, points),
        finding(
            "Certainty",
            f"For {len(certain)} of them the 95 % interval of the difference lies within {CLOSE:g} as well: "
            f"{listed(certain, 30)}.",
        ),
        finding("Size", about_size, sizes),
        finding(
            "Single runs",
            f"In a single run the AUC differs by {usual['distance'].mean():.3f} on average with {DEFAULT_WIDTH} "
            f"numbers; {100 * usual['equal_flags'].mean():.1f} % of all flags are the same.",
        ),
    ]


def with_interval(row: Any) -> str:
    """A difference of AUCs with its interval."""
    return f"{number(row.difference, 3)} [{number(row.low, 3)}, {number(row.high, 3)}]"


def _how(rows: pd.DataFrame) -> list[Block]:
    listing = [
        {
            "task": TASK_NAMES.get(str(task), str(task)),
            "labels": PARTITION_NAMES.get(str(partition), str(partition)),
            "runs": str(len(runs)),
            "attacks": listed(sorted(runs["family"]), 40),
        }
        for (task, partition), runs in rows.drop_duplicates("run").groupby(["task", "partition"])
    ]
    about = (
        "One run of each cell of the gauntlet in which the attack works, seeds taking turns. Every detector that "
        "compares whole updates judges every round twice: from the whole log, and from its sketches, whose signs are "
        "drawn anew for each run. Scores are taken per client as in the gauntlet; an AUC is that of the attackers of a "
        "run against its benign clients; intervals are over runs (Student's t). The final layer, biases and layers "
        "smaller than a sketch are recorded whole."
    )
    return [text(about), table(listing, "Runs")]


def _distances(summary: pd.DataFrame) -> Block:
    def draw(canvas: Figure) -> None:
        ax = canvas.subplots()
        sns.lineplot(summary, x="width", y="distance", hue="detector", marker="o", ax=ax, palette="husl")
        ax.set_xscale("log", base=2)
        ax.set_xticks(WIDTHS, [str(width) for width in WIDTHS])
        ax.axhline(CLOSE, color="0.5", linestyle=":")
        ax.set(xlabel="numbers per layer", ylabel="|AUC of sketches - AUC of whole updates|")
        ax.set_title("Distance of the AUCs of single runs", loc="left")
        sns.move_legend(ax, "upper left", bbox_to_anchor=(1, 1), frameon=False, title=None)

    return figure(draw, (9.5, 6), f"Mean over runs of the distance between both AUCs; dotted: {CLOSE:g}.")


def _differences(summary: pd.DataFrame) -> Block:
    listing = []
    for name, part in summary.groupby("detector"):
        differences = {str(row.width): with_interval(row) for row in rows_of(part)}
        listing.append({"detector": str(name), "AUC, whole": f"{part['auc_full'].iloc[0]:.3f}"} | differences)
    caption = "AUC of sketches minus AUC of whole updates, by numbers per layer. Means over runs."
    return table(listing, caption, folded=False)


def _flags(summary: pd.DataFrame) -> Block:
    shares = summary.pivot_table(index="detector", columns="width", values="equal_flags")
    listing = [
        {"detector": str(name)} | {str(width): f"{100 * value:.1f}" for width, value in row.items()}
        for name, row in shares.iterrows()
    ]
    return table(listing, "Share of updates with the same flag, in per cent, by numbers per layer.", folded=False)


def _abstentions() -> list[Block]:
    about = (
        f"Detectors that need the coordinates of a layer abstain on a sketch: {listed(sorted(NEED_COORDINATES), 20)}. "
        "Those that need the final layer alone have it whole and say the same: "
        f"{listed(sorted(FINAL_LAYER_ONLY), 20)}. The panel does without the share of a client's signs that agree with "
        "the cohort's."
    )
    return [text(about)]


if __name__ == "__main__":
    run_as_command(main)
