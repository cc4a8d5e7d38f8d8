"""Computes the tables behind the report on a sweep: `analyse`.

A **cell** is an attack-free setting together with the attacks whose control it is. Thresholds are set within a cell,
for each seed on the attack-free runs of the other seeds, so that every control is held out of its own threshold.
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from tqdm import tqdm

from gradlens.case import investigate
from gradlens.case.several import table_of_cases
from gradlens.detectors import DETECTORS, USUAL, Detector, calibrate, detect
from gradlens.errors import InputError
from gradlens.evaluation import evaluate, mean_interval, with_truth
from gradlens.localization import PHASES, localize_sweep
from gradlens.log import UpdateLog
from gradlens.plots import conditions
from gradlens.reporting.shared import poisoners
from gradlens.run import Run, Sweep

DEFENCES = ("aggregator", "detector", "filter")  # settings of the server
ATTACKS = ("attack", "num_malicious", "poison_rate", "schedule")  # settings of the attack
WORKED, PARTLY = 0.5, 0.1  # least gain in ASR over the control of an attack that worked, or worked in part
MOST_ROUNDS = 1 << 40  # more than any run has
COSTLY = 0.1  # loss of main accuracy against the control from which an attack would be noticed


@dataclass(frozen=True, eq=False)
class Analysis:
    """The tables of a sweep's report.

    Parameters
    ----------
    sweep : Sweep
        The sweep.
    runs : pandas.DataFrame
        Indexed by attacked run: condition, base (condition without the defense), filter, cell, seed, control.
    outcomes : pandas.DataFrame
        A row per condition, see `attack_outcomes`.
    places : pandas.DataFrame
        Table of `localize_sweep` with a column `condition`.
    raw : pandas.DataFrame
        Table of `detect` over all runs, with columns run, seed.
    figures : pandas.DataFrame
        `evaluate` by condition and control, over the attacked rounds (see `labelled`).
    alarms : pandas.DataFrame
        `evaluate` of the attack-free runs, by cell.
    thresholds : pandas.DataFrame
        Columns run, detector, threshold, null.
    cases : pandas.DataFrame
        `table_of_cases` of all runs, with columns attackers, found (attackers accused) and innocents (accused).
    left_out : list of str
        A sentence on each run of the sweep that is not in the tables.
    fpr : float
        False-positive rate for which the thresholds were set.
    """

    sweep: Sweep
    runs: pd.DataFrame
    outcomes: pd.DataFrame
    places: pd.DataFrame
    raw: pd.DataFrame
    figures: pd.DataFrame
    alarms: pd.DataFrame
    thresholds: pd.DataFrame
    cases: pd.DataFrame
    left_out: list[str]
    fpr: float


def analyse(
    sweep: Sweep,
    detectors: Mapping[str, Detector] | None = None,
    *,
    fpr: float = 0.05,
    permutations: int = 999,
    executor: Executor | None = None,
    progress: bool = False,
) -> Analysis:
    """Computes all tables of a sweep's report.

    Parameters
    ----------
    sweep : Sweep
        The sweep.
    detectors : Mapping, optional
        Name -> uncalibrated detector; None takes `usual()`.
    fpr : float
        False-positive rate for which thresholds are set.
    permutations : int
        Number of permutations behind each p-value.
    executor : concurrent.futures.Executor, optional
        Distributes the cells; None works in this process.
    progress : bool
        Whether to show a progress bar of the cells, on a terminal only.

    Returns
    -------
    Analysis

    Raises
    ------
    InputError
        If the sweep has no closed attacked run with its control, or a run has no ground truth.
    """
    runs, left_out = attacked_runs(sweep)
    cells = [part for _, part in runs.groupby("cell", sort=False)]
    settings = (usual() if detectors is None else detectors, fpr, permutations)
    if executor is None:
        results = (_cell(sweep, cell, *settings) for cell in cells)
    else:
        paths = repeat(sweep.path, len(cells))
        results = executor.map(_cell_at, paths, cells, *(repeat(setting) for setting in settings))
    parts = list(tqdm(results, "analyse", len(cells), unit="setting", disable=None if progress else True))
    tables = {name: pd.concat([part[name] for part in parts], ignore_index=True) for name in parts[0]}
    tables["cases"] = _cases(tables["cases"])
    order = {name: i for i, name in enumerate(runs["condition"].unique())}  # in the sweep, not by cell
    for name in ("places", "figures"):
        tables[name] = tables[name].sort_values(
            "condition", key=lambda c: c.map(order), kind="stable", ignore_index=True
        )
    return Analysis(sweep, runs, attack_outcomes(sweep, runs), **tables, left_out=left_out, fpr=fpr)


def usual(names: Sequence[str] = USUAL) -> dict[str, Detector]:
    """Returns the detectors that a report uses by default, name -> uncalibrated detector."""
    return {name: DETECTORS[name]() for name in names}


def attacked_runs(sweep: Sweep) -> tuple[pd.DataFrame, list[str]]:
    """Lists the closed attacked runs that have a closed control, and why each other run is left out.

    Parameters
    ----------
    sweep : Sweep
        The sweep.

    Returns
    -------
    tuple of (pandas.DataFrame, list of str)
        The table `Analysis.runs`, and a sentence per run that is left out.

    Raises
    ------
    InputError
        If there is no closed attacked run with a closed control.
    """
    settings = {str(name): row for name, row in sweep.settings[_axes(sweep)].to_dict("index").items()}
    controls, names, left_out = sweep.index["controls"], [], []
    closed = {run.name for run in sweep.runs if run.is_closed}
    for run in sweep.runs:
        if run.name not in closed:
            left_out.append(f"{run.name} is open: {run.in_flight or 'it has no closing line'}")
        elif run.name in controls and controls[run.name] in closed:
            names.append(run.name)
        elif run.name in controls:
            left_out.append(f"{run.name}: its attack-free control {controls[run.name]} is not there, or is open")
        elif run.name not in controls.values():
            left_out.append(f"{run.name} is neither attacked nor the control of an attacked run")
    if lost := len(sweep.index["runs"]) - len(sweep.runs):
        left_out.append(f"{lost} of {len(sweep.index['runs'])} runs of the sweep are not there (yet)")
    if not names:
        raise InputError(f"{sweep.path}: a report on a sweep needs a closed attacked run and its control, found none")
    attacked = [settings[name] for name in names]
    attack_free = [settings[controls[name]] for name in names]
    columns = {
        "condition": conditions(attacked),
        "base": conditions([_without(row, DEFENCES) for row in attacked]),
        "filter": [_defense(row) for row in attacked],
        "cell": conditions([_without(row, ATTACKS) for row in attack_free]),
        "seed": [seed_of(sweep.run(name)) for name in names],
        "control": [controls[name] for name in names],
    }
    return pd.DataFrame(columns, index=pd.Index(names, name="run")), left_out


def _axes(sweep: Sweep) -> list[str]:
    """Returns the varied settings except the seed."""
    return [axis for axis in sweep.axes if axis != "seed"]


def _without(settings: Mapping[Any, Any], names: Sequence[str]) -> dict[Any, Any]:
    """Returns the settings except those of some names."""
    return {name: value for name, value in settings.items() if name not in names}


def _defense(settings: Mapping[Any, Any]) -> str:
    """Names the server's defenses, "" if it has none."""
    return ", ".join(str(settings[n]) for n in DEFENCES if str(settings.get(n, "none")) not in ("none", "mean", "drop"))


def _named(sweep: Sweep, runs: pd.DataFrame, places: pd.DataFrame) -> list[str]:
    """Returns the condition of each row of `localize_sweep`, named as in `runs`."""

    def keys(table: pd.DataFrame) -> list[tuple[str, ...]]:
        rows = table[_axes(sweep)].to_dict("records")
        return [tuple(f"{v:g}" if isinstance(v, int | float) else str(v) for v in row.values()) for row in rows]

    known = dict(zip(keys(sweep.settings.loc[runs.index]), runs["condition"], strict=True))
    return [known[key] for key in keys(places)]


def attack_outcomes(sweep: Sweep, runs: pd.DataFrame) -> pd.DataFrame:
    """Compares the attack success rate at the end of training with that of the control, per condition.

    Parameters
    ----------
    sweep : Sweep
        The sweep.
    runs : pandas.DataFrame
        Table of `attacked_runs`.

    Returns
    -------
    pandas.DataFrame
        Columns condition, base, filter, asr, control_asr, difference, low, high (95 % interval of the
        difference over seeds), accuracy, control_accuracy, seeds, outcome; means over seeds.
    """
    reference = sweep.controls.sort_values("round").groupby("run")["asr"].last()
    by_name = {run.name: run for run in sweep.runs}
    rows = []
    for name, part in runs.groupby("condition", sort=False):
        asr = np.array([final(by_name[run], "asr") for run in part.index])
        control = np.array([float(reference.get(run, np.nan)) for run in part.index])
        difference = (asr - control)[np.isfinite(asr - control)]
        low, high = mean_interval(difference, -1, 1)
        gain = float(difference.mean()) if len(difference) else np.nan
        row = {"condition": name, "base": part["base"].iloc[0], "filter": part["filter"].iloc[0]}
        row |= {"asr": asr.mean(), "control_asr": control.mean(), "difference": gain, "low": low, "high": high}
        row |= {
            "accuracy": np.mean([final(by_name[run], "main_accuracy") for run in part.index]),
            "control_accuracy": np.mean([final(by_name[run], "main_accuracy") for run in part["control"]]),
            "seeds": len(part),
            "outcome": outcome(gain, low),
        }
        rows.append(row)
    return pd.DataFrame(rows)


def attack_table(sweep: Sweep) -> pd.DataFrame:
    """Tabulates how well each attack worked, the largest gain in attack success rate first.

    Parameters
    ----------
    sweep : Sweep
        The sweep.

    Returns
    -------
    pandas.DataFrame
        A row per condition with columns condition, outcome, ASR, ASR on control, difference, main accuracy, seeds;
        means over seeds, after the last round.

    Raises
    ------
    InputError
        If there is no closed attacked run with a closed control.
    """
    outcomes = attack_outcomes(sweep, attacked_runs(sweep)[0]).sort_values("difference", ascending=False, kind="stable")
    names = {"asr": "ASR", "control_asr": "ASR on control", "accuracy": "main accuracy"}
    columns = ["condition", "outcome", "asr", "control_asr", "difference", "accuracy", "seeds"]
    return outcomes[columns].rename(columns=names).reset_index(drop=True)


def final(run: Run, metric: str) -> float:
    """Returns a metric after the last round, NaN if it was not measured."""
    return float(run.metrics[metric].iloc[-1]) if metric in run.metrics and len(run.metrics) else float("nan")


def outcome(difference: float, low: float = float("nan")) -> str:
    """Rates an attack by how far its success rate ends above the control's.

    Parameters
    ----------
    difference : float
        Attack success rate minus the control's.
    low : float
        Lower limit of its interval; at 0 or below a gain is uncertain. NaN is not considered.

    Returns
    -------
    str
        "worked" from 0.5, "worked in part" from 0.1, "failed" below, "uncertain" if the gain may be none, "not
        measured" for NaN.

    Examples
    --------
    >>> outcome(0.7), outcome(0.2), outcome(0.7, low=-0.1)
    ('worked', 'worked in part', 'uncertain')
    """
    if np.isnan(difference):
        return "not measured"
    if difference < PARTLY:
        return "failed"
    if low <= 0:
        return "uncertain"
    return "worked" if difference >= WORKED else "worked in part"


def thresholds_of(
    detectors: Mapping[str, Detector], controls: Sequence[Run], seed: Any, fpr: float
) -> dict[str, Detector]:
    """Calibrates detectors on the attack-free runs of other seeds or, if they are too few, on each cohort.

    Parameters
    ----------
    detectors : Mapping
        Name -> uncalibrated detector.
    controls : sequence of Run
        Attack-free runs of one setting.
    seed : Any
        Seed whose runs are held out.
    fpr : float
        False-positive rate for which thresholds are set.

    Returns
    -------
    dict
        Name -> calibrated detector.
    """
    return calibrated_on(detectors, [run for run in controls if seed_of(run) != seed], fpr)[0]


def calibrated_on(
    detectors: Mapping[str, Detector], null: Sequence[Run] | UpdateLog, fpr: float
) -> tuple[dict[str, Detector], str]:
    """Calibrates detectors on a null or, where it has too few clients for the rate, on each cohort.

    Parameters
    ----------
    detectors : Mapping
        Name -> uncalibrated detector.
    null : sequence of Run, or UpdateLog
        Attack-free runs, none for each cohort; or a stretch of a log that is declared clean.
    fpr : float
        False-positive rate for which thresholds are set.

    Returns
    -------
    tuple of (dict, str)
        Name -> calibrated detector; and why a null that was given does not serve, "" if it does.
    """
    of_scores = {name: detector for name, detector in detectors.items() if not hasattr(detector, "fitted")}
    for source in [null] if isinstance(null, UpdateLog) else null:
        detect(source, of_scores)  # reads each round once; `calibrate` then finds the verdicts in the log's cache
    calibrated, short = {}, ""
    for name, detector in detectors.items():
        try:
            calibrated[name] = calibrate(detector, null or None, fpr)
        except InputError as reason:
            calibrated[name], short = calibrate(detector, None, fpr), str(reason)
    return calibrated, short


def rule_of(detector: Detector, run: Run) -> dict[str, Any]:
    """The threshold of a calibrated detector, None where each cohort sets its own, and its null in the last round."""
    null = run.log.verdict(detector).null if len(run.log) else getattr(detector, "null", "")
    return {"threshold": getattr(detector, "threshold", None), "null": null}


def labelled(sweep: Sweep, runs: pd.DataFrame, raw: pd.DataFrame) -> pd.DataFrame:
    """Labels the scores of runs and their controls in the attacked rounds, by the truth of the attacked runs.

    Parameters
    ----------
    sweep : Sweep
        The sweep.
    runs : pandas.DataFrame
        Rows of `attacked_runs`.
    raw : pandas.DataFrame
        Table of `detect` with a column `run`, for the runs and their controls.

    Returns
    -------
    pandas.DataFrame
        The scores with columns run (the attacked one), condition, control (bool), seed, phase, malicious. On controls
        the same clients are called malicious.
    """
    scores, truths = [], []
    for i, (name, row) in enumerate(zip(runs.index.astype(str), runs.to_dict("records"), strict=True)):
        truth = sweep.run(name).truth
        attacked = sorted(truth.loc[truth["poisoned"].astype(bool), "round"].unique())
        truths.append(truth.assign(round=truth["round"] + i * MOST_ROUNDS))
        for control, source in ((False, name), (True, row["control"])):
            part = raw[raw["run"].eq(source) & raw["round"].isin(attacked)]
            phase = np.where(part["round"].isin(attacked[:3]), *PHASES)
            keys = {"run": name, "condition": row["condition"], "control": control, "seed": row["seed"], "phase": phase}
            scores.append(part.assign(**keys, round=part["round"] + i * MOST_ROUNDS))
    # rounds are shifted per run, so that a single join serves all runs: a join costs as much as thousands of rows
    table = with_truth(pd.concat(scores, ignore_index=True), pd.concat(truths, ignore_index=True))
    return table.assign(round=table["round"] % MOST_ROUNDS)


def _cases(table: pd.DataFrame) -> pd.DataFrame:
    """The cases of all runs with a q value that accounts for their number, and how right each is."""
    cases = dict(zip(table["recording"], table["case"], strict=True))
    return table_of_cases(cases).merge(table.drop(columns="case"), on="recording", validate="one_to_one")


def _case_row(run: Run) -> dict[str, Any]:
    """The case of a run by its recording alone, and how many of those it accuses are attackers by the truth."""
    case, attackers = investigate(run.log), set(poisoners(run))
    accused = set(case.suspects["client"])
    right = {"attackers": len(attackers), "found": len(accused & attackers), "innocents": len(accused - attackers)}
    return {"recording": run.name, "case": case} | right


def _cell_at(path: Path, cell: pd.DataFrame, *settings: Any) -> dict[str, pd.DataFrame]:
    """Computes a cell in another process, which opens the sweep itself."""
    return _cell(Sweep.open(path), cell, *settings)


def _cell(
    sweep: Sweep, cell: pd.DataFrame, detectors: Mapping[str, Detector], fpr: float, permutations: int
) -> dict[str, pd.DataFrame]:
    """Computes the tables of one cell's runs, under their names in `Analysis`."""
    controls = [sweep.run(str(name)) for name in cell["control"].unique()]
    part = replace(sweep, runs=[*(sweep.run(str(name)) for name in cell.index), *controls])
    by_seed = {seed: thresholds_of(detectors, controls, seed, fpr) for seed in dict.fromkeys(map(seed_of, part.runs))}
    scores, thresholds = [], []
    for run in part.runs:
        scores.append(detect(run, by_seed[seed_of(run)]).assign(run=run.name, seed=seed_of(run)))
        for name, detector in by_seed[seed_of(run)].items():
            thresholds.append({"run": run.name, "detector": name, **rule_of(detector, run)})
    raw = pd.concat(scores, ignore_index=True)
    places = localize_sweep(part, permutations=permutations)
    places.insert(0, "condition", _named(sweep, cell, places))
    clean = raw[raw["run"].isin(cell["control"])].assign(cell=cell["cell"].iloc[0], malicious=False)
    return {
        "places": places,
        "raw": raw,
        "figures": evaluate(labelled(sweep, cell, raw), by=["condition", "control"]),
        "alarms": evaluate(clean, by=["cell"]),
        "thresholds": pd.DataFrame(thresholds),
        "cases": pd.DataFrame([_case_row(run) for run in part.runs]),
    }


def seed_of(run: Run) -> Any:
    """Returns the seed of a run's scenario, 0 if it has none."""
    return run.scenario.get("seed", 0)
