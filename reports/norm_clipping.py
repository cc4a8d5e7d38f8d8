"""Writes what norm clipping and weak DP do to a backdoor: `python reports/norm_clipping.py runs/norm_clipping ...`.

Takes the sweeps of simulations/scenarios/norm_clipping.toml and norm_clipping_femnist.toml; writes
reports/norm_clipping.csv and .html. Held against: Sun et al. 2019, arXiv:1911.07963. What is said of a run is the mean
of its last rounds, and beside it stands the same attack measured on the models of its attack-free control.
"""

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from norm_clipping_page import page
from tqdm import tqdm

from gradlens.detectors import DETECTORS, detect
from gradlens.errors import InputError
from gradlens.evaluation import evaluate, with_truth
from gradlens.log import UpdateLog
from gradlens.processes import processes
from gradlens.reporting.page import write
from gradlens.run import Run, Sweep
from simulations import Scenario
from simulations.attacks import Turn
from simulations.scenario import build

ROOT = Path(__file__).resolve().parents[1]
CSV, HTML = ROOT / "reports/norm_clipping.csv", ROOT / "reports/norm_clipping.html"
LAST = 8  # rounds that a figure of a run is the mean of: one period of the rarest attack
DETECTED_BY = ("layer_norms", "accomplices", "panel")
ATTACKS = {"explicit_boosting": "unconstrained", "norm_bound": "norm-bounded"}
ROUNDING = 1e-5  # an update at the bound may be longer by what float32 loses
PLACE = ["task", "model"]
RULE = ["bound", "std"]  # NaN: without
CELL = ["attack", "malicious", "period", "tasks"]


def main(*folders: str, workers: int = 2) -> None:
    """Both files, from the folders of sweeps."""
    sweeps = [Sweep.open(folder) for folder in folders]
    with processes(workers) as executor:
        found = gathered(sweeps, executor)
    found.to_csv(CSV, index=False, float_format="%.4g")
    write(page(pd.read_csv(CSV), [run for sweep in sweeps for run in sweep.runs]), HTML)


def gathered(sweeps: Sequence[Sweep], executor: Executor | None = None, *, progress: bool = True) -> pd.DataFrame:
    """All figures: a row per thing told, the column `part` says of what.

    runs: a run's asr, main_accuracy, and those of its control (last rounds); clipped, clipped_benign: shares of the
    poisoned, and of the benign, updates that are longer than the bound, from the first attacked round on. A control has
    the attack "none". rounds: the same per round, of the cells in which every rule was run. norms: quantiles q50, q90,
    q99 of the benign norms of attack-free runs without defence, per seed and round, and over all rounds from the first
    attacked one on and all seeds (no round). detectors: value, low, high of a detector's metric, thresholds set on
    attack-free runs of other seeds.
    Raises InputError where a folder holds no attacked run with its control, or a run that is not closed.
    """
    parts = []
    for sweep in sweeps:
        if not sweep.index["controls"]:
            raise InputError(f"{sweep.path}: expected attacked runs and their attack-free controls, found no pair")
        if unclosed := [run.name for run in sweep.runs if not run.is_closed]:
            raise InputError(f"{sweep.path}: run {unclosed[0]} is not closed; simulate goes on with it")
        runs = pd.DataFrame([_figures(sweep, run) for run in sweep.runs])
        paths, start = [run.path for run in sweep.runs], first_attacked(sweep)
        shares = (executor.map if executor else map)(clipped, paths, [start] * len(paths))
        bar = tqdm(shares, sweep.name, len(paths), unit="run", disable=None if progress else True)
        runs = runs.join(pd.DataFrame(list(bar)))
        centre = _centre(runs)
        parts += [
            runs.assign(part="runs"),
            _rounds(sweep, runs, centre).assign(part="rounds"),
            _norms(sweep, runs).assign(part="norms"),
            _detected(sweep, runs, centre, executor).assign(part="detectors"),
        ]
    found = pd.concat(parts, ignore_index=True)
    names = ["part", *PLACE, *RULE, *CELL, "fraction", "seed", "round"]
    return found[[*names, *(name for name in found.columns if name not in (*names, "run"))]]


def settings_of(scenario: Scenario) -> dict[str, Any]:
    """What tells the cells of the sweep apart; fraction: attackers among the updates of all attacked rounds."""
    ((name, rule),) = scenario.aggregator.items()
    found = {"task": scenario.task, "model": scenario.model, "bound": rule.get("bound"), "std": rule.get("std")}
    if name not in ("mean", "norm_clipping", "weak_dp"):
        raise InputError(f"runs: expected the rules mean, norm_clipping and weak_dp, found {name}")
    if scenario.is_control:
        return found | {"attack": "none", "malicious": 0, "period": np.nan, "tasks": np.nan, "fraction": 0.0}
    attack = next((word for part, word in ATTACKS.items() if part in scenario.attack), None)
    ((when, settings),) = scenario.schedule.items()
    if attack is None or "writer_class" not in scenario.attack or when != "every_nth":
        raise InputError(
            "runs: expected writer_class with explicit_boosting or norm_bound at a fixed frequency (every_nth), found "
            f"{scenario.label('attack')}, {scenario.label('schedule')}"
        )
    period, cohort = settings["period"], scenario.clients_per_round or scenario.num_clients
    return found | {
        "attack": attack,
        "malicious": scenario.num_malicious,
        "period": period,
        "tasks": scenario.attack["writer_class"]["targets"],
        "fraction": scenario.num_malicious / period / cohort,
    }


def _figures(sweep: Sweep, run: Run) -> dict[str, Any]:
    """The row of one run, but for what is clipped."""
    scenario = Scenario(**run.scenario)
    row = {"run": run.name, "seed": scenario.seed, **settings_of(scenario)}
    row["main_accuracy"] = _last(run.metrics["main_accuracy"])
    if scenario.is_control:
        return row
    control = sweep.control_of(run.name)
    on_control = sweep.controls[sweep.controls["run"].eq(run.name)].sort_values("round")["asr"]
    return row | {
        "asr": _last(run.metrics["asr"]),
        "control_asr": _last(on_control),
        "control_accuracy": _last(control.metrics["main_accuracy"]),
    }


def clipped(path: Path, start: int) -> dict[str, float]:
    """The shares of a run's poisoned, and of its benign, updates that are longer than its bound, from a round on."""
    run = Run.open(path)
    bound = settings_of(Scenario(**run.scenario))["bound"]
    if bound is None:
        return {"clipped": np.nan, "clipped_benign": np.nan}
    poisoned = set(run.truth.loc[run.truth["poisoned"], ["round", "client"]].itertuples(index=False, name=None))
    longer: dict[bool, list[bool]] = {True: [], False: []}
    for round_ in run.log:
        if round_.index >= start:
            for client, norm in zip(round_.clients.tolist(), round_.total_norms, strict=True):
                longer[(round_.index, client) in poisoned].append(bool(norm > bound * (1 + ROUNDING)))
    return {"clipped": _share(longer[True]), "clipped_benign": _share(longer[False])}


def first_attacked(sweep: Sweep) -> int:
    """The first round in which anybody attacks in a sweep; raises InputError where nobody does."""
    scenarios = [each for run in sweep.runs if not (each := Scenario(**run.scenario)).is_control]
    for index in range(max(each.rounds for each in scenarios)):
        if any(build("schedule", each.schedule).due(Turn(index, 0, 0)) for each in scenarios):
            return index
    raise InputError(f"{sweep.path}: nobody attacks in any round")


def _last(values: pd.Series) -> float:
    return float(values.to_numpy(np.float64)[-LAST:].mean())


def _share(longer: Sequence[bool]) -> float:
    return float(np.mean(longer)) if longer else np.nan


def _centre(runs: pd.DataFrame) -> Mapping[str, Any]:
    """The number of attackers, the frequency and the number of tasks with which most of the rules were run."""
    attacked = runs[runs["attack"].ne("none")]
    keys = ["malicious", "period", "tasks"]
    most = attacked.groupby(keys)["run"].count().idxmax()
    return dict(zip(keys, most, strict=True))  # type: ignore[arg-type]


def _central(runs: pd.DataFrame, centre: Mapping[str, Any]) -> pd.DataFrame:
    """The attacked runs at the centre."""
    here = np.all([runs[name].eq(value) for name, value in centre.items()], axis=0)
    return runs[here & runs["attack"].ne("none")]


def _rounds(sweep: Sweep, runs: pd.DataFrame, centre: Mapping[str, Any]) -> pd.DataFrame:
    """ASR and main accuracy after every round, of attacked runs at the centre and of their controls."""
    parts = []
    for row in _central(runs, centre).to_dict("records"):
        name = str(row["run"])
        metrics, control = sweep.run(name).metrics, sweep.control_of(name).metrics
        on_control = sweep.controls[sweep.controls["run"].eq(name)].sort_values("round")["asr"].to_numpy()
        told = {key: row[key] for key in (*PLACE, *RULE, *CELL, "fraction", "seed")}
        parts.append(
            metrics[["round", "asr", "main_accuracy"]].assign(
                control_asr=on_control, control_accuracy=control["main_accuracy"].to_numpy(), **told
            )
        )
    return pd.concat(parts, ignore_index=True)


def _norms(sweep: Sweep, runs: pd.DataFrame) -> pd.DataFrame:
    """How long benign updates are where nobody attacks and nothing is clipped."""
    start, rows, pooled = first_attacked(sweep), [], []
    free = runs[runs["attack"].eq("none") & runs["bound"].isna()]
    if free.empty:
        raise InputError(f"{sweep.path}: expected attack-free runs without defence (mean), found none")
    place = {name: free[name].iloc[0] for name in PLACE}
    for name, seed in zip(free["run"], free["seed"], strict=True):
        for round_ in sweep.run(str(name)).log:
            norms = round_.total_norms
            rows.append({"seed": seed, "round": round_.index, **_quantiles(norms)})
            pooled += [norms] if round_.index >= start else []
    whole = {"seed": np.nan, "round": np.nan, **_quantiles(np.concatenate(pooled)), "first": start}
    return pd.DataFrame([*rows, whole]).assign(**place)


def _quantiles(norms: np.ndarray) -> dict[str, float]:
    q50, q90, q99 = np.quantile(norms, [0.5, 0.9, 0.99])
    return {"q50": float(q50), "q90": float(q90), "q99": float(q99)}


def _detected(sweep: Sweep, runs: pd.DataFrame, centre: Mapping[str, Any], executor: Executor | None) -> pd.DataFrame:
    """How well detectors tell the attackers' updates at the centre, thresholds set on controls of other seeds."""
    central = _central(runs, centre)
    central = central[central["attack"].eq("norm-bounded") | central["bound"].isna()]
    names = {str(name): sweep.control_of(str(name)).name for name in central["run"]}
    wanted = list(dict.fromkeys([*names, *names.values()]))
    scores = dict(zip(wanted, _scored([sweep.run(name) for name in wanted], executor), strict=True))
    start, keys, parts = first_attacked(sweep), [*PLACE, *RULE, *CELL, "fraction"], []
    for key, own in central.groupby(keys, dropna=False, sort=False):
        attacked, null = (_stacked(scores, own["seed"], which, start) for which in (own["run"], own["run"].map(names)))
        figures = evaluate(attacked, null=null).rename(columns={"bound": "sign"})  # the bound of a rule is another
        parts.append(figures.assign(**dict(zip(keys, key, strict=True))))
    found = pd.concat(parts, ignore_index=True)
    return found[found["metric"].isin(["auc", "tpr_5", "fpr_5"])]


def _stacked(
    scores: Mapping[str, pd.DataFrame], seeds: Iterable[int], names: Iterable[str], start: int
) -> pd.DataFrame:
    """The scores of runs from the first attacked round on, one below the other."""
    parts = [scores[name].assign(seed=seed) for seed, name in zip(seeds, names, strict=True)]
    found = pd.concat(parts, ignore_index=True)
    return found[found["round"].ge(start)].reset_index(drop=True)


def _scored(runs: Sequence[Run], executor: Executor | None) -> Iterator[pd.DataFrame]:
    paths = [run.path for run in runs]
    return iter((executor.map if executor else map)(scored, paths))  # type: ignore[operator]


def scored(path: Path) -> pd.DataFrame:
    """What the detectors say of a run, with the truth."""
    run = Run.open(path)
    log: UpdateLog = run.log
    return with_truth(detect(log, {name: DETECTORS[name]() for name in DETECTED_BY}), run.truth)


if __name__ == "__main__":
    main(*sys.argv[1:])
