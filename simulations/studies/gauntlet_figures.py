"""The tables of the gauntlet: from the scores of single runs to `gauntlet.csv` and its neighbors."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from gradlens.attribution import attribution_accuracy
from gradlens.detectors.nulls import nominal_threshold
from gradlens.detectors.panels import Observed, Panel
from gradlens.errors import InputError
from gradlens.evaluation import evaluate, mean_interval, per_client
from gradlens.evaluation.score_tables import judged
from simulations.attacks import build_attack
from simulations.studies.conditions import ADAPTIVE, CELL, UNCAPPED
from simulations.studies.gauntlet_scores import (
    ATTACK_FREE,
    CHOOSE,
    PANEL,
    RunScores,
    clean_rounds,
    digest,
    unfitted_panel,
)
from simulations.studies.results import REPORTS

OUT = REPORTS / "gauntlet"  # tables and page, without their endings
CSV = OUT.with_suffix(".csv")
WORKING_GAIN = 0.2  # an attack works from here on: ASR above the control's, or main accuracy below it
RATES = {"1": 0.01, "5": 0.05}  # ending of tpr_ and fpr_ -> false-positive rate
CUMULATIVE = {  # detectors whose last score of a client covers all of its rounds; scores of the others are averaged
    "accumulated_norms", "accumulated_spectral", "accumulated_neighbours", "accomplices", "label_drift_residual",
    "persistence", "foolsgold", "fldetector", "flanders", "panel", "panel (clean stretch)", "panel (each cohort)",
}  # fmt: skip
CLEAN_STRETCH, EACH_COHORT = "panel (clean stretch)", "panel (each cohort)"  # the panel under its other nulls
WHERE = ["task", "setting"]  # what a part of the gauntlet is run for
KEYS = [*CELL, "purpose"]  # figures of the seeds that choose and of those that confirm are never mixed
METRICS = (
    "auc",  # within attacked runs
    "tpr_1", "tpr_5", "fpr_1", "fpr_5",  # thresholds set on attack-free runs; fpr of an attack's cell: while attacked
    "tpr_1_matched", "tpr_5_matched", "fpr_1_matched", "fpr_5_matched",  # set on benign clients of attacked runs
    # figures of whole recordings, "per" a case, are a group of their own here
)  # fmt: skip
COLUMNS = [
    "detector", "family", "adaptive", "norm", "works", "partition", "purpose", "per", "metric", "value", "low", "high",
    "seeds", "bound", "task", "setting",
]  # fmt: skip

Cell = tuple[str, ...]  # values of CELL
Scored = tuple[RunScores, pd.DataFrame]  # a run, and its updates with the scores of a detector


class Tables(NamedTuple):
    """What the gauntlet writes.

    Parameters
    ----------
    figures : DataFrame
        A row per figure of a detector in a cell, as `figures` computes them: `gauntlet.csv`.
    runs : DataFrame
        A row per run, as `run_facts` lists them: `gauntlet_runs.csv`.
    labels : DataFrame
        How often suspected labels are right, as of `label_accuracy`: `gauntlet_labels.csv`.
    """

    figures: pd.DataFrame
    runs: pd.DataFrame
    labels: pd.DataFrame

    @classmethod
    def of(cls, results: Sequence[RunScores], executor: Executor | None = None) -> "Tables":
        """The tables of some runs."""
        return cls(figures(results, executor), run_facts(results), label_accuracy(results))

    @classmethod
    def read(cls, out: Path = OUT) -> "Tables":
        """The tables in a folder, by default `reports/`; of runs and labels none where they were not written yet."""
        others = [pd.read_csv(path) if path.exists() else pd.DataFrame(columns=KEYS) for path in _paths(out)[1:]]
        return cls(committed(_paths(out)[0]), *others)

    def beside(self, others: "Tables") -> "Tables":
        """These, and of the others what is of settings (task, way of drawing clients) that are not here."""
        here = self.figures[WHERE].drop_duplicates()

        def apart(table: pd.DataFrame) -> pd.DataFrame:
            return table[~pd.MultiIndex.from_frame(table[WHERE]).isin(pd.MultiIndex.from_frame(here))]

        pairs = [(apart(other), table) for table, other in zip(self, others, strict=True)]
        joined = [pd.concat([part for part in pair if len(part)] or pair, ignore_index=True) for pair in pairs]
        return Tables(joined[0].sort_values([*KEYS, "detector", "per", "metric"], kind="stable"), *joined[1:])

    def write(self, out: Path) -> None:
        """Writes them; runs and labels as they are, figures to five digits."""
        out.parent.mkdir(parents=True, exist_ok=True)
        for table, path in zip(self, _paths(out), strict=True):
            table.to_csv(path, index=False, float_format="%.5g" if table is self.figures else None)


def _paths(out: Path) -> list[Path]:
    return [out.with_name(f"{out.name}{ending}.csv") for ending in ("", "_runs", "_labels")]


def committed(path: Path = CSV) -> pd.DataFrame:
    """The figures in a `gauntlet.csv`, by default the one in `reports/`.

    A file from before seeds were split has those that choose alone, and no matched thresholds. Those of its adaptive
    attacks that can outgrow benign norms are loud.
    """
    table = pd.read_csv(path, keep_default_na=False, na_values=["nan", ""], dtype={"family": str})
    table = table.fillna({"bound": ""})
    if "purpose" not in table:
        loud = table["family"].isin(UNCAPPED)
        table["family"] = table["family"].where(~loud, table["family"] + " (loud)")
        table["adaptive"] = table["adaptive"].where(~loud, 0)
        table["purpose"] = np.where(table["family"].eq("none"), ATTACK_FREE, CHOOSE)
        table["norm"] = np.nan
    return table


def figures(results: Sequence[RunScores], executor: Executor | None = None) -> pd.DataFrame:
    """Computes every figure of every detector in every cell.

    Parameters
    ----------
    results : sequence of RunScores
        Attacked runs, their controls, and attack-free runs.
    executor : Executor, optional
        Works over the groups of runs that share a null; by default this process does.

    Returns
    -------
    DataFrame
        In the columns of `gauntlet.csv`; a detector has no row for a metric that it has no answer for.
    """
    runs = run_facts(results)
    working = {cell for cell, gain in gains(runs).items() if gain >= WORKING_GAIN}
    groups = list(sharing_a_null(results).values())
    of_group = partial(_group_figures, working=working)
    parts = map(of_group, groups) if executor is None else executor.map(of_group, groups)
    table = pd.concat(list(parts), ignore_index=True)
    cells, lengths = list(table[CELL].itertuples(index=False, name=None)), norms(runs)
    table["works"] = [int(cell in working) for cell in cells]
    table["norm"] = [lengths.get(cell, np.nan) for cell in cells]
    table["adaptive"] = table["family"].isin(ADAPTIVE).astype(int)
    table = table[table["metric"].isin(METRICS) & table["value"].notna()]
    return table.sort_values([*KEYS, "detector", "per", "metric"], kind="stable")[COLUMNS].reset_index(drop=True)


def run_facts(results: Sequence[RunScores]) -> pd.DataFrame:
    """What is said of the runs themselves.

    Returns
    -------
    DataFrame
        Columns of `KEYS`, seed, kind ("attacked", "control" or "attack-free"), clients, drawn (clients in a round),
        rounds, seen (clients that took part), gain and norm (of attacked runs, as of `RunScores`), detectors, and code,
        a digest of what the detectors were when they judged the run.
    """
    rows = []
    for run in results:
        scenario, names = run.scenario, run.arrays["detectors"].tolist()
        attacked = not scenario.is_control
        rows.append(
            run.cell
            | {"purpose": run.purpose, "seed": scenario.seed}
            | {"kind": "attacked" if attacked else ATTACK_FREE if run.is_attack_free else "control"}
            | {"clients": scenario.num_clients, "drawn": scenario.clients_per_round or scenario.num_clients}
            | {"rounds": scenario.rounds, "seen": len(np.unique(run.arrays["client"]))}
            | {"gain": run.gain if attacked else np.nan, "norm": run.norm if attacked else np.nan}
            | {"detectors": len(names), "code": digest(tuple(names))}
        )
    return pd.DataFrame(rows)


def gains(runs: pd.DataFrame) -> dict[Cell, float]:
    """Cell -> how far its attack works, the mean over its runs of all seeds."""
    return _means(runs, "gain")


def norms(runs: pd.DataFrame) -> dict[Cell, float]:
    """Cell -> how long poisoned updates are, in norms of benign ones, the mean over its runs of all seeds."""
    return _means(runs, "norm")


def _means(runs: pd.DataFrame, column: str) -> dict[Cell, float]:
    means = runs[runs["kind"].eq("attacked")].groupby(CELL, sort=False)[column].mean()
    return dict(zip(means.index.tolist(), means.tolist(), strict=True))


def sharing_a_null(results: Sequence[RunScores]) -> dict[tuple[object, ...], list[RunScores]]:
    """Groups the runs by what shares a null: task, partition and way of drawing clients."""
    groups: dict[tuple[object, ...], list[RunScores]] = {}
    for run in results:
        key = (run.scenario.task, run.cell["partition"], run.scenario.clients_per_round is not None)
        groups.setdefault(key, []).append(run)
    return groups


def calibrating(runs: Sequence[RunScores]) -> list[RunScores]:
    """The half of the attack-free runs that sets thresholds; the other half is tested."""
    return [run for run in runs if run.is_attack_free and run.scenario.seed % 2 == 0]


def _group_figures(runs: Sequence[RunScores], working: Collection[Cell]) -> pd.DataFrame:
    """The figures of runs that share a null."""
    null = calibrating(runs)
    tested = [run for run in runs if not run.scenario.is_control or (run.is_attack_free and run.scenario.seed % 2)]
    names = [name for name in runs[0].arrays["detectors"].tolist() if not name.startswith(PANEL)]
    tables = [
        _evaluated(name, [run.scored_by(name) for run in null], [(run, run.scored_by(name)) for run in tested], working)
        for name in names
    ]
    return pd.concat([*tables, *_panel_figures(null, tested, working)], ignore_index=True)


def _evaluated(
    detector: str, null: Sequence[pd.DataFrame], tested: Sequence[Scored], working: Collection[Cell]
) -> pd.DataFrame:
    """The figures of one detector per update and per client."""
    null_scores, tables = pd.concat(null, ignore_index=True).assign(detector=detector), []
    for per, scores in _by_unit(detector, tested).items():
        of_unit = null_scores if per == "update" else per_client(null_scores, (), _summary(detector))
        tables += [evaluate(scores, KEYS, of_unit).assign(per=per), matched_rates(scores, working).assign(per=per)]
    return pd.concat(tables, ignore_index=True)


def _by_unit(detector: str, tested: Sequence[Scored]) -> dict[str, pd.DataFrame]:
    """What is judged: the updates since the attack began, and the clients over all of their rounds."""
    tables = [table.assign(**run.cell, purpose=run.purpose) for run, table in tested]
    scores = pd.concat(tables, ignore_index=True).assign(detector=detector)
    return {"update": scores[scores["begun"]], "client": per_client(scores, KEYS, _summary(detector))}


def _summary(detector: str) -> str:
    return "last" if detector in CUMULATIVE else "mean"


# Thresholds by which all detectors pay alike --------------------------------------------------------------------


def matched_rates(scores: pd.DataFrame, working: Collection[Cell]) -> pd.DataFrame:
    """The shares of malicious and of benign rows above thresholds that benign rows of attacked runs set.

    A cell is judged at the `matched_threshold` of the other cells of its group in which the attack works, at seeds of
    the same purpose; of its own runs where there is no other.

    Parameters
    ----------
    scores : DataFrame
        Of one detector in a group of cells that share a null, per update or per client; columns of `KEYS`, detector,
        seed, score, abstained, malicious and, per update, compromised.
    working : collection of tuple
        The cells in which the attack works.

    Returns
    -------
    DataFrame
        Columns of `KEYS`, detector, metric, value, low, high, seeds, bound.
    """
    known = judged(scores)
    known = known[known["abstained"].eq("") & known["purpose"].ne(ATTACK_FREE)]
    tables = []
    for _, part in known.groupby("purpose"):
        cells = dict(list(part.groupby(CELL)))
        benign = {cell: rows.loc[~rows["malicious"], "score"].to_numpy() for cell, rows in cells.items()}
        pools = {cell: values for cell, values in benign.items() if cell in working and len(values)}
        for cell, rows in cells.items():
            others = [values for other, values in pools.items() if other != cell] or list(pools.values())
            for rate, fpr in RATES.items() if others else ():
                flagged = rows["score"].gt(matched_threshold(others, fpr)) | np.isposinf(rows["score"])
                resolved = sum(map(len, others)) * fpr >= 1
                tables.append(_shares(rows.assign(flagged=flagged), f"{rate}_matched", resolved=resolved))
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()


def matched_threshold(benign: Sequence[np.ndarray], fpr: float) -> float:
    """The smallest score that, on average over cells, at most a share `fpr` of the benign scores of a cell exceeds.

    Parameters
    ----------
    benign : sequence of ndarray
        The benign scores of each cell; none is empty.
    fpr : float
        Above 0 and below 1.

    Examples
    --------
    >>> matched_threshold([np.arange(10.0)], 0.2)
    7.0
    >>> matched_threshold([np.arange(10.0), np.zeros(1000)], 0.2)  # cells weigh the same, however large they are
    5.0
    """
    weights = np.concatenate([np.full(len(scores), 1 / len(scores) / len(benign)) for scores in benign])
    values, places = np.unique(np.concatenate(benign), return_inverse=True)
    above = 1 - np.cumsum(np.bincount(places, weights))
    return float(values[above <= fpr + 1e-9][0])


def _shares(rows: pd.DataFrame, suffix: str, *, resolved: bool = True) -> pd.DataFrame:
    """The shares of malicious and of benign rows that are flagged, means over seeds.

    Where no benign row is, the rate is the upper limit that `evaluate` gives. Not resolved: benign rows are so few that
    the threshold should be higher, and a true-positive rate is at most the share.
    """
    figures = []
    for key, cell in rows.groupby([*KEYS, "detector", "malicious"], sort=False):
        shares = cell.groupby("seed")["flagged"].mean().to_numpy(np.float64)
        low, high = mean_interval(shares, 0, 1)
        row = dict(zip([*KEYS, "detector"], key[:-1], strict=True)) | {
            "metric": f"{'tpr' if key[-1] else 'fpr'}_{suffix}"
        }
        row |= {"value": shares.mean(), "low": low, "high": high, "seeds": len(shares), "bound": ""}
        if not key[-1] and not cell["flagged"].any():
            limit = 1 - 0.05 ** (1 / len(cell))
            row |= {"value": limit, "low": 0.0, "high": limit, "bound": "<="}
        elif key[-1] and not resolved:
            row |= {"low": 0.0, "high": shares.mean() if np.isnan(high) else high, "bound": "<="}
        figures.append(row)
    return pd.DataFrame(figures)


# The panel under the three nulls of `calibrate` ------------------------------------------------------------------


def _panel_figures(
    null: Sequence[RunScores], tested: Sequence[RunScores], working: Collection[Cell]
) -> list[pd.DataFrame]:
    """The panel calibrated on attack-free runs, on the first rounds of the run, and on each cohort itself."""
    unfitted = unfitted_panel()
    fitted, known = unfitted.fitted([run.observed for run in null])
    null_scores = np.split(known.scores, np.cumsum([len(run.observed.values) for run in null])[:-1])
    null_tables = [_with_panel_scores(run, of_run) for run, of_run in zip(null, null_scores, strict=True)]
    scored = [(run, _with_panel_scores(run, fitted.scores(run.observed))) for run in tested]
    tables = [_evaluated(PANEL, null_tables, scored, working)]
    for name, judge in ((CLEAN_STRETCH, _by_clean_stretch), (EACH_COHORT, _by_cohort)):
        answers = [(run, answer) for run in tested if (answer := judge(unfitted, run))]
        for kind in ("scores", *RATES):
            scored = [(run, _with_panel_scores(run, answer[kind])) for run, answer in answers if kind in answer]
            for per, units in _by_unit(name, scored).items() if scored else ():
                if kind == "scores":
                    figures = matched_rates(units, working)
                else:  # a threshold of each run or cohort: scores are 1 above it
                    rows = judged(units)
                    figures = _shares(rows.assign(flagged=rows["score"].gt(0)), kind)
                tables.append(figures.assign(per=per))
    return tables


def _by_clean_stretch(unfitted: Panel, run: RunScores) -> dict[str, np.ndarray]:
    """The panel's scores, its null being the clean first rounds, and whom it flags at each rate where they suffice.

    Returns "scores" and rates -> float64 [row]; nothing where the first rounds do not suffice for any rate.
    """
    observed = run.observed
    clean = observed.positions < clean_rounds(run.scenario, run.setting)
    if not clean.any():
        return {}
    stretch = Observed(
        observed.positions[clean], observed.clients[clean], observed.features, observed.values[clean], observed.heard
    )
    answer: dict[str, np.ndarray] = {}
    try:
        fitted, null = unfitted.fitted([stretch])
        scores = fitted.scores(observed)
        for rate, fpr in sorted(RATES.items(), reverse=True):  # a lower rate needs more clients
            answer[rate] = (scores > null.threshold(fpr)).astype(float)
            answer["scores"] = scores
    except InputError:  # too few clients
        pass
    return answer


def _by_cohort(unfitted: Panel, run: RunScores) -> dict[str, np.ndarray]:
    """The panel's scores, in spreads above the median of each cohort, and whom it flags at each rate.

    Returns "scores" and rates -> float64 [row]; each cohort is its own null.
    """
    observed, scores = run.observed, unfitted.scores(run.observed)
    cohorts = [scores[observed.positions == position] for position in range(int(observed.positions.max()) + 1)]

    def thresholds(fpr: float) -> np.ndarray:
        return np.array([nominal_threshold(cohort, fpr) for cohort in cohorts])[observed.positions]

    center = thresholds(0.5)
    spread = thresholds(RATES["5"]) - center
    spreads = np.divide(scores - center, spread, out=np.zeros_like(scores), where=spread > 0)  # 0 where all agree
    return {"scores": spreads} | {rate: (scores > thresholds(fpr)).astype(float) for rate, fpr in RATES.items()}


def _with_panel_scores(run: RunScores, scores: np.ndarray) -> pd.DataFrame:
    """The updates of a run with a panel's scores, or flags (1), of what it observed, [row].

    Updates that are not comparable keep their +inf and are flagged.
    """
    known = run.answers(PANEL)[0].astype(np.float64)
    known[np.isfinite(known)] = scores  # NaN where the panel abstained
    return run.updates(known, np.isinf(known) | (known == 1))


# The suspected target label --------------------------------------------------------------------------------------


def label_accuracy(results: Sequence[RunScores]) -> pd.DataFrame:
    """How often the suspected target label is right in the first attacked rounds.

    Returns
    -------
    DataFrame
        Columns of `KEYS`, `whose` ("attackers": all of them; "flagged": those that the panel flags at 5 % per update,
        calibrated on attack-free runs of other seeds), value, low, high, seeds, clients.
    """
    rows = [row for runs in sharing_a_null(results).values() for row in _named_labels(runs)]
    if not rows:
        return pd.DataFrame(columns=[*KEYS, "whose", "value", "low", "high", "seeds", "clients"])
    table = pd.DataFrame(rows)
    parts = [
        attribution_accuracy(part, KEYS).query("label == 'target'").assign(whose=whose)
        for whose, part in (("attackers", table), ("flagged", table[table["flagged"]]))
        if len(part)
    ]
    return pd.concat(parts, ignore_index=True).drop(columns="label")


def _named_labels(runs: Sequence[RunScores]) -> Iterator[Mapping[str, object]]:
    """A row per malicious update in the first attacked rounds: suspected and true target, and whether it is flagged."""
    fitted, null = unfitted_panel().fitted([run.observed for run in calibrating(runs)])
    threshold = null.threshold(RATES["5"], "attack-free runs")
    for run in runs:
        target = build_attack(run.scenario.attack).target_label
        if target is None:
            continue
        updates = zip(run.observed.positions.tolist(), run.observed.clients.tolist(), strict=True)
        scores = dict(zip(updates, fitted.scores(run.observed), strict=True))
        malicious = set(run.arrays["client"][run.arrays["poisoned"]].tolist())
        columns = (run.arrays[name].tolist() for name in ("early", "early_clients", "targets"))
        for position, client, suspected in zip(*columns, strict=True):
            if client in malicious:
                yield run.cell | {
                    "purpose": run.purpose,
                    "seed": run.scenario.seed,
                    "target": suspected,
                    "source": pd.NA,
                    "true_target": target,
                    "true_source": pd.NA,
                    "flagged": scores.get((position, client), np.inf) > threshold,
                }
