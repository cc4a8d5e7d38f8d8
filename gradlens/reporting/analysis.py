"""What the report says of a sweep, as tables: `analyse`.

A **cell** is an attack-free setting and the attacks that it is the control of. Thresholds are set in a cell, for
each seed on the attack-free runs of the other seeds, so every control is held out of its own threshold.
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

from gradlens.detectors import DETECTORS, USUAL, Detector, calibrate, detect
from gradlens.errors import InputError
from gradlens.evaluation import bootstrap, evaluate, with_truth
from gradlens.localization import PHASES, localize_sweep
from gradlens.plots import conditions
from gradlens.run import Run, Sweep

DEFENCES = ("aggregator", "detector", "filter")  # settings of the server, not of the attack
ATTACKS = ("attack", "num_malicious", "poison_rate", "schedule")  # and of the attack
WORKED, PARTLY = 0.5, 0.1  # by so much the ASR must end above the control's
MOST_ROUNDS = 1 << 40  # no run is longer
COSTLY = 0.1  # so much main accuracy below the control's, and the attack is no backdoor that goes unnoticed


@dataclass(frozen=True, eq=False)
class Analysis:
    """A sweep's tables.

    runs: per attacked run (index): condition, base (without the defence), filter, cell, seed, control.
    outcomes: per condition: ASR, that of the control, their difference with its interval, main accuracy, outcome.
    places: what `localize_sweep` gives, with `condition`. raw: what `detect` gives, with run and seed.
    figures: `evaluate` by condition and control, over the attacked rounds (see `labelled`).
    alarms: `evaluate` of the attack-free runs by cell. thresholds: per run and detector: threshold, null.
    left_out: why a run of the sweep is not in the tables. fpr: the rate that the thresholds were set for.
    """

    sweep: Sweep
    runs: pd.DataFrame
    outcomes: pd.DataFrame
    places: pd.DataFrame
    raw: pd.DataFrame
    figures: pd.DataFrame
    alarms: pd.DataFrame
    thresholds: pd.DataFrame
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
    """All tables of a sweep's report; the executor, if any, works over the cells; progress: show a bar of them.

    Raises InputError where the sweep has no attacked run with its control, or a run has no ground truth.
    """
    runs, left_out = attacked_runs(sweep)
    cells = [part for _, part in runs.groupby("cell", sort=False)]
    settings = (usual() if detectors is None else detectors, fpr, permutations)
    if executor is None:
        done = (_cell(sweep, cell, *settings) for cell in cells)
    else:
        paths = repeat(sweep.path, len(cells))
        done = executor.map(_cell_at, paths, cells, *(repeat(each) for each in settings))
    parts = list(tqdm(done, "analyse", len(cells), unit="setting", disable=None if progress else True))
    tables = {name: pd.concat([part[name] for part in parts], ignore_index=True) for name in parts[0]}
    order = {name: i for i, name in enumerate(runs["condition"].unique())}  # of the sweep, not of the cells
    for name in ("places", "figures"):
        tables[name] = tables[name].sort_values(
            "condition", key=lambda c: c.map(order), kind="stable", ignore_index=True
        )
    return Analysis(sweep, runs, attack_outcomes(sweep, runs), **tables, left_out=left_out, fpr=fpr)


def usual(names: Sequence[str] = USUAL) -> dict[str, Detector]:
    """The detectors of a report: one per statistic, all with the robust z-score."""
    return {name: DETECTORS[name]() for name in names}


def attacked_runs(sweep: Sweep) -> tuple[pd.DataFrame, list[str]]:
    """A row per attacked run whose control is there, and a sentence on each that is left out."""
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
    own, free = ([settings[name] for name in which] for which in (names, [controls[name] for name in names]))
    columns = {
        "condition": conditions(own),
        "base": conditions([_without(row, DEFENCES) for row in own]),
        "filter": [_defence(row) for row in own],
        "cell": conditions([_without(row, ATTACKS) for row in free]),
        "seed": [seed_of(sweep.run(name)) for name in names],
        "control": [controls[name] for name in names],
    }
    return pd.DataFrame(columns, index=pd.Index(names, name="run")), left_out


def _axes(sweep: Sweep) -> list[str]:
    return [axis for axis in sweep.axes if axis != "seed"]


def _without(settings: Mapping[Any, Any], names: Sequence[str]) -> dict[Any, Any]:
    return {name: value for name, value in settings.items() if name not in names}


def _defence(settings: Mapping[Any, Any]) -> str:
    """What the server does about attackers, "" where it does nothing."""
    return ", ".join(str(settings[n]) for n in DEFENCES if str(settings.get(n, "none")) not in ("none", "mean", "drop"))


def _named(sweep: Sweep, runs: pd.DataFrame, places: pd.DataFrame) -> list[str]:
    """The condition of each row of `localize_sweep`, in the words of `runs`."""

    def keys(table: pd.DataFrame) -> list[tuple[str, ...]]:
        rows = table[_axes(sweep)].to_dict("records")
        return [tuple(f"{v:g}" if isinstance(v, int | float) else str(v) for v in row.values()) for row in rows]

    known = dict(zip(keys(sweep.settings.loc[runs.index]), runs["condition"], strict=True))
    return [known[key] for key in keys(places)]


def attack_outcomes(sweep: Sweep, runs: pd.DataFrame) -> pd.DataFrame:
    """Per condition: did the attack work, at the end of training, against its control?"""
    reference = sweep.controls.sort_values("round").groupby("run")["asr"].last()
    by_name = {run.name: run for run in sweep.runs}
    rows = []
    for name, part in runs.groupby("condition", sort=False):
        asr = np.array([final(by_name[run], "asr") for run in part.index])
        control = np.array([float(reference.get(run, np.nan)) for run in part.index])
        difference = (asr - control)[np.isfinite(asr - control)]
        low, high = bootstrap(difference)
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
    """Did the attacks work? A row per condition, what worked most first.

    Columns: condition, outcome, ASR, ASR on control, difference, main accuracy, seeds; means over seeds, after the
    last round.
    """
    found = attack_outcomes(sweep, attacked_runs(sweep)[0]).sort_values("difference", ascending=False, kind="stable")
    names = {"asr": "ASR", "control_asr": "ASR on control", "accuracy": "main accuracy"}
    columns = ["condition", "outcome", "asr", "control_asr", "difference", "accuracy", "seeds"]
    return found[columns].rename(columns=names).reset_index(drop=True)


def final(run: Run, metric: str) -> float:
    """A metric after the last round, NaN where it was not measured."""
    return float(run.metrics[metric].iloc[-1]) if metric in run.metrics and len(run.metrics) else float("nan")


def outcome(difference: float, low: float = float("nan")) -> str:
    """A word for how far the ASR ends above the control's; an interval that reaches 0 is a failure."""
    if np.isnan(difference):
        return "not measured"
    if difference < PARTLY or low <= 0:
        return "failed"
    return "worked" if difference >= WORKED else "worked in part"


def thresholds_of(
    detectors: Mapping[str, Detector], controls: Sequence[Run], seed: Any, fpr: float
) -> dict[str, Detector]:
    """The detectors, calibrated on the attack-free runs of other seeds; where those are too few, on each cohort."""
    null = [run for run in controls if seed_of(run) != seed]
    calibrated = {}
    for name, detector in detectors.items():
        try:
            calibrated[name] = calibrate(detector, null, fpr)
        except InputError:  # too few null scores for this rate
            calibrated[name] = calibrate(detector, None, fpr)
    return calibrated


def labelled(sweep: Sweep, runs: pd.DataFrame, raw: pd.DataFrame) -> pd.DataFrame:
    """The scores of some runs in their attacked rounds, and of their controls with the same clients called malicious.

    raw: what `detect` gives, with run. Returns: the same with run (the attacked one), condition, control, seed,
    phase, malicious.
    """
    scores, truths = [], []
    for i, (name, row) in enumerate(zip(runs.index.astype(str), runs.to_dict("records"), strict=True)):
        truth = sweep.run(name).truth
        attacked = sorted(truth.loc[truth["poisoned"].astype(bool), "round"].unique())
        truths.append(truth.assign(round=truth["round"] + i * MOST_ROUNDS))
        for control, source in ((False, name), (True, row["control"])):
            own = raw[raw["run"].eq(source) & raw["round"].isin(attacked)]
            phase = np.where(own["round"].isin(attacked[:3]), *PHASES)
            said = {"run": name, "condition": row["condition"], "control": control, "seed": row["seed"], "phase": phase}
            scores.append(own.assign(**said, round=own["round"] + i * MOST_ROUNDS))
    # one join for all runs, whose rounds are moved apart for it: each join costs as much as thousands of rows
    table = with_truth(pd.concat(scores, ignore_index=True), pd.concat(truths, ignore_index=True))
    return table.assign(round=table["round"] % MOST_ROUNDS)


def _cell_at(path: Path, cell: pd.DataFrame, *settings: Any) -> dict[str, pd.DataFrame]:
    return _cell(Sweep.open(path), cell, *settings)


def _cell(
    sweep: Sweep, cell: pd.DataFrame, detectors: Mapping[str, Detector], fpr: float, permutations: int
) -> dict[str, pd.DataFrame]:
    """The tables of one cell's runs, under their names in `Analysis`."""
    free = [sweep.run(str(name)) for name in cell["control"].unique()]
    part = replace(sweep, runs=[*(sweep.run(str(name)) for name in cell.index), *free])
    for run in free:
        detect(run, detectors)  # each round is read once for all; `calibrate` finds the verdicts in the log's memory
    by_seed = {seed: thresholds_of(detectors, free, seed, fpr) for seed in dict.fromkeys(map(seed_of, part.runs))}
    scores, thresholds = [], []
    for run in part.runs:
        scores.append(detect(run, by_seed[seed_of(run)]).assign(run=run.name, seed=seed_of(run)))
        for name, detector in by_seed[seed_of(run)].items():
            said = {key: getattr(detector, key, None) for key in ("threshold", "null")}
            thresholds.append({"run": run.name, "detector": name, **said})
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
    }


def seed_of(run: Run) -> Any:
    """The seed that a run was simulated with, 0 if it was not."""
    return run.scenario.get("seed", 0)
