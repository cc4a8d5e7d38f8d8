"""The figures of the gauntlet: from the scores of single runs to the table `gauntlet.csv`."""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor
from pathlib import Path

import numpy as np
import pandas as pd

from gradlens.attribution import attribution_accuracy
from gradlens.detectors.nulls import nominal_threshold
from gradlens.detectors.panels import Observed, Panel
from gradlens.errors import InputError
from gradlens.evaluation import evaluate, mean_interval, per_client
from simulations.attacks import build_attack
from simulations.studies.conditions import CELL
from simulations.studies.gauntlet_scores import PANEL, RunScores, clean_rounds, unfitted_panel
from simulations.studies.results import REPORTS

CSV = REPORTS / "gauntlet.csv"
WORKING_GAIN = 0.2  # an attack works from here on: ASR above the control's, or main accuracy below it
RATES = {"1": 0.01, "5": 0.05}  # ending of tpr_ and fpr_ -> false-positive rate
ADAPTIVE = {  # attacks made to pass for benign
    "constrain_and_scale", "norm_bound", "layer_substitution", "train_and_scale", "hiding", "a_little_is_enough",
    "min_max", "min_sum", "mimic",
}  # fmt: skip
CUMULATIVE = {  # detectors whose last score of a client covers all of its rounds; scores of the others are averaged
    "accumulated_norms", "accumulated_spectral", "accumulated_neighbours", "accomplices", "label_drift_residual",
    "persistence", "foolsgold", "fldetector", "flanders", "panel", "panel (clean stretch)", "panel (each cohort)",
}  # fmt: skip
CLEAN_STRETCH, EACH_COHORT = "panel (clean stretch)", "panel (each cohort)"  # the panel under its other nulls
METRICS = ("auc", "tpr_1", "tpr_5", "fpr_1", "fpr_5")
COLUMNS = [
    "detector", "family", "adaptive", "works", "partition", "per", "metric", "value", "low", "high", "seeds", "bound",
    "task", "setting",
]  # fmt: skip

Scored = tuple[RunScores, pd.DataFrame]  # a run, and its updates with the scores of a detector


def committed(path: Path = CSV) -> pd.DataFrame:
    """The figures in a `gauntlet.csv`, by default the one in `reports/`."""
    return pd.read_csv(path, keep_default_na=False, na_values=["nan", ""], dtype={"family": str}).fillna({"bound": ""})


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
    mean_gains = gains(results)
    groups = list(sharing_a_null(results).values())
    parts = map(_group_figures, groups) if executor is None else executor.map(_group_figures, groups)
    table = pd.concat(list(parts), ignore_index=True)
    cells = table[CELL].itertuples(index=False, name=None)
    table["works"] = [int(mean_gains.get(tuple(cell), 0.0) >= WORKING_GAIN) for cell in cells]
    table["adaptive"] = table["family"].isin(ADAPTIVE).astype(int)
    table = table[table["metric"].isin(METRICS) & table["value"].notna()]
    return table.sort_values([*CELL, "detector", "per", "metric"], kind="stable")[COLUMNS].reset_index(drop=True)


def gains(results: Sequence[RunScores]) -> dict[tuple[str, ...], float]:
    """Cell -> how far its attack works, the mean over its runs."""
    gains_of: dict[tuple[str, ...], list[float]] = {}
    for run in results:
        if not run.scenario.is_control:
            gains_of.setdefault(tuple(run.cell.values()), []).append(run.gain)
    return {cell: float(np.mean(values)) for cell, values in gains_of.items()}


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


def _group_figures(runs: Sequence[RunScores]) -> pd.DataFrame:
    """The figures of runs that share a null."""
    null = calibrating(runs)
    tested = [run for run in runs if not run.scenario.is_control or (run.is_attack_free and run.scenario.seed % 2)]
    names = [name for name in runs[0].arrays["detectors"].tolist() if not name.startswith(PANEL)]
    tables = [
        _evaluated(name, [run.scored_by(name) for run in null], [(run, run.scored_by(name)) for run in tested])
        for name in names
    ]
    return pd.concat([*tables, *_panel_figures(null, tested)], ignore_index=True)


def _evaluated(detector: str, null: Sequence[pd.DataFrame], tested: Sequence[Scored]) -> pd.DataFrame:
    """The figures of one detector per update and per client, its thresholds set on the null."""
    scores = pd.concat([table.assign(**run.cell) for run, table in tested], ignore_index=True)
    scores, null_scores = scores.assign(detector=detector), pd.concat(null, ignore_index=True).assign(detector=detector)
    how = "last" if detector in CUMULATIVE else "mean"
    by_client = evaluate(per_client(scores, CELL, how), CELL, per_client(null_scores, (), how))
    tables = [evaluate(scores, CELL, null_scores).assign(per="update"), by_client.assign(per="client")]
    return pd.concat(tables, ignore_index=True)


# The panel under the three nulls of `calibrate` ------------------------------------------------------------------


def _panel_figures(null: Sequence[RunScores], tested: Sequence[RunScores]) -> list[pd.DataFrame]:
    """The panel calibrated on attack-free runs, on the first rounds of the run, and on each cohort itself."""
    unfitted = unfitted_panel()
    fitted, known = unfitted.fitted([run.observed for run in null])
    null_scores = np.split(known.scores, np.cumsum([len(run.observed.values) for run in null])[:-1])
    null_tables = [_with_panel_scores(run, of_run) for run, of_run in zip(null, null_scores, strict=True)]
    scored = [(run, _with_panel_scores(run, fitted.scores(run.observed))) for run in tested]
    tables = [_evaluated(PANEL, null_tables, scored)]
    for name, judge in ((CLEAN_STRETCH, _flags_by_clean_stretch), (EACH_COHORT, _flags_by_cohort)):
        flagged = [(run, flags) for run in tested if (flags := judge(unfitted, run))]
        for rate in RATES:
            parts = [
                _with_panel_scores(run, flags[rate]).assign(**run.cell, detector=name)
                for run, flags in flagged
                if rate in flags
            ]
            if parts:
                tables.append(_flag_rates(pd.concat(parts, ignore_index=True), rate))
    return tables


def _flags_by_clean_stretch(unfitted: Panel, run: RunScores) -> dict[str, np.ndarray]:
    """Whom the panel flags at each rate, float64 [row], its null being the clean first rounds where they suffice."""
    observed = run.observed
    clean = observed.positions < clean_rounds(run.scenario, run.setting)
    if not clean.any():
        return {}
    stretch = Observed(
        observed.positions[clean], observed.clients[clean], observed.features, observed.values[clean], observed.heard
    )
    flags = {}
    try:
        fitted, null = unfitted.fitted([stretch])
        scores = fitted.scores(observed)
        for rate, fpr in sorted(RATES.items(), reverse=True):  # a lower rate needs more clients
            flags[rate] = (scores > null.threshold(fpr)).astype(float)
    except InputError:  # too few clients
        pass
    return flags


def _flags_by_cohort(unfitted: Panel, run: RunScores) -> dict[str, np.ndarray]:
    """Whom the panel flags at each rate, float64 [row], where each cohort is its own null."""
    observed, scores = run.observed, unfitted.scores(run.observed)
    cohorts = [scores[observed.positions == position] for position in range(int(observed.positions.max()) + 1)]
    flags = {}
    for rate, fpr in RATES.items():
        thresholds = np.array([nominal_threshold(cohort, fpr) for cohort in cohorts])
        flags[rate] = (scores > thresholds[observed.positions]).astype(float)
    return flags


def _with_panel_scores(run: RunScores, scores: np.ndarray) -> pd.DataFrame:
    """The updates of a run with a panel's scores, or flags (1), of what it observed, [row].

    Updates that are not comparable keep their +inf and are flagged.
    """
    known = run.answers(PANEL)[0].astype(np.float64)
    known[np.isfinite(known)] = scores  # NaN where the panel abstained
    return run.updates(known, np.isinf(known) | (known == 1))


def _flag_rates(scores: pd.DataFrame, rate: str) -> pd.DataFrame:
    """The shares of malicious and of benign updates, and clients, that a calibrated detector flags."""
    flags = scores.assign(score=scores["flag"].astype(float))  # so that a client's last flag is its last score
    judged = flags[flags["malicious"] | ~flags["compromised"]]
    rows = []
    for per, table in (("update", judged), ("client", per_client(flags, CELL, "last"))):
        for key, cell in table.groupby([*CELL, "detector", "malicious"], sort=False):
            shares = cell.groupby("seed")["score"].mean().to_numpy()
            low, high = mean_interval(shares, 0, 1)
            metric = f"{'tpr' if key[-1] else 'fpr'}_{rate}"
            row = dict(zip([*CELL, "detector"], key[:-1], strict=True)) | {"per": per, "metric": metric, "bound": ""}
            row |= {"value": shares.mean(), "low": low, "high": high, "seeds": len(shares)}
            if metric.startswith("fpr") and not cell["score"].any():
                limit = 1 - 0.05 ** (1 / len(cell))
                row |= {"value": limit, "low": 0.0, "high": limit, "bound": "<="}
            rows.append(row)
    return pd.DataFrame(rows)


# The suspected target label --------------------------------------------------------------------------------------


def label_accuracy(results: Sequence[RunScores]) -> pd.DataFrame:
    """How often the suspected target label is right in the first attacked rounds.

    Returns
    -------
    DataFrame
        Columns of `CELL`, `whose` ("attackers": all of them; "flagged": those that the panel flags at 5 % per update,
        calibrated on attack-free runs of other seeds), value, low, high, seeds, clients.
    """
    rows = [row for runs in sharing_a_null(results).values() for row in _named_labels(runs)]
    if not rows:
        return pd.DataFrame(columns=[*CELL, "whose", "value", "low", "high", "seeds", "clients"])
    table = pd.DataFrame(rows)
    parts = [
        attribution_accuracy(part, CELL).query("label == 'target'").assign(whose=whose)
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
                    "seed": run.scenario.seed,
                    "target": suspected,
                    "source": pd.NA,
                    "true_target": target,
                    "true_source": pd.NA,
                    "flagged": scores.get((position, client), np.inf) > threshold,
                }
