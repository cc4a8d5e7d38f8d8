"""The figures on norm clipping and weak differential privacy: from recorded runs to the rows of `norm_clipping.csv`.

The figures of a run are means over its last rounds; beside them stand those of its attack-free control, on which the
success of the same attack is measured as well.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd
from tqdm import tqdm

from gradlens.detectors import DETECTORS, detect
from gradlens.errors import InputError
from gradlens.evaluation import evaluate, with_truth
from gradlens.run import Run, Sweep
from simulations import Scenario, stored_scenario
from simulations.attacks import Turn
from simulations.scenario import build

LAST_ROUNDS = 8  # that the figures of a run are averaged over: one period of the rarest attack
DETECTOR_NAMES = ("layer_norms", "accomplices", "panel")
ATTACK_WORDS = {"explicit_boosting": "unconstrained", "norm_bound": "norm-bounded"}
ROUNDING = 1e-5  # relative: an update at the bound may come out longer by what float32 loses
PLACE = ["task", "model"]
RULE = ["bound", "std"]  # NaN without clipping, without noise
CELL = ["attack", "malicious", "period", "tasks"]
RATES = ["main_accuracy", "asr", "control_asr", "control_accuracy", "clipped", "clipped_benign"]
NORMS = ["q50", "q90", "q99", "first"]
DETECTION = ["detector", "metric", "value", "low", "high", "seeds", "sign"]
COLUMNS = ["part", *PLACE, *RULE, *CELL, "fraction", "seed", "round", *RATES, *NORMS, *DETECTION]


def gathered(sweeps: Sequence[Sweep], executor: Executor | None = None, *, progress: bool = True) -> pd.DataFrame:
    """The rows of several sweeps; see `rows_of_sweep`."""
    return pd.concat([rows_of_sweep(sweep, executor, progress=progress) for sweep in sweeps], ignore_index=True)


def rows_of_sweep(sweep: Sweep, executor: Executor | None = None, *, progress: bool = True) -> pd.DataFrame:
    """Computes all figures of a sweep of one task and model.

    Parameters
    ----------
    sweep : Sweep
        Attacked runs with their controls under the rules mean, norm_clipping and weak_dp.
    executor : Executor, optional
        Works over runs; by default this process does.
    progress : bool
        Show a bar.

    Returns
    -------
    DataFrame
        In `COLUMNS`; `part` says what a row holds. "runs": ASR and main accuracy of a run and of its control over the
        last rounds; clipped and clipped_benign are the shares of poisoned and of benign updates since the first
        attacked round that are longer than the bound; a control has the attack "none". "rounds": ASR and main accuracy
        after each round, in the cells that every rule was run in. "norms": quantiles of the norms of benign updates in
        attack-free runs without a defense, per seed and round, and once (without a round) over all seeds and rounds
        since the first attacked one. "detectors": a detector's metric with its interval, thresholds set on attack-free
        runs of other seeds.

    Raises
    ------
    InputError
        If there is no attacked run with its control, a run is not closed, or a run has other settings than these.
    """
    if not sweep.index["controls"]:
        raise InputError(f"{sweep.path}: expected attacked runs and their attack-free controls, found no pair")
    if unclosed := [run.name for run in sweep.runs if not run.is_closed]:
        raise InputError(f"{sweep.path}: run {unclosed[0]} is not closed; `gradlens simulate` continues it")
    runs = pd.DataFrame([_run_figures(sweep, run) for run in sweep.runs])
    paths, start = [run.path for run in sweep.runs], first_attacked_round(sweep)
    shares = (executor.map if executor else map)(clipped_shares, paths, [start] * len(paths))
    bar = tqdm(shares, sweep.name, len(paths), unit="run", disable=None if progress else True)
    runs = runs.join(pd.DataFrame(list(bar)))
    center = _center(runs)
    parts = [
        runs.assign(part="runs"),
        _rows_over_rounds(sweep, runs, center).assign(part="rounds"),
        _norm_rows(sweep, runs).assign(part="norms"),
        _detector_rows(sweep, runs, center, executor).assign(part="detectors"),
    ]
    return pd.concat(parts, ignore_index=True)[COLUMNS]


def place_of(sweep: Sweep) -> tuple[str, str]:
    """Task and model of a sweep."""
    scenario = stored_scenario(sweep.runs[0])
    return scenario.task, scenario.model


def settings_of(scenario: Scenario) -> dict[str, Any]:
    """The settings that tell cells apart; fraction: the attackers' share of the updates of all attacked rounds."""
    ((name, rule),) = scenario.aggregator.items()
    if name not in ("mean", "norm_clipping", "weak_dp"):
        raise InputError(f"runs: expected the rules mean, norm_clipping and weak_dp, found {name}")
    settings = {"task": scenario.task, "model": scenario.model, "bound": rule.get("bound"), "std": rule.get("std")}
    if scenario.is_control:
        return settings | {"attack": "none", "malicious": 0, "period": np.nan, "tasks": np.nan, "fraction": 0.0}
    attack = next((word for part, word in ATTACK_WORDS.items() if part in scenario.attack), None)
    ((schedule, when),) = scenario.schedule.items()
    if attack is None or "writer_class" not in scenario.attack or schedule != "every_nth":
        raise InputError(
            "runs: expected writer_class with explicit_boosting or norm_bound at a fixed frequency (every_nth), found "
            f"{scenario.label('attack')}, {scenario.label('schedule')}"
        )
    period, cohort = when["period"], scenario.clients_per_round or scenario.num_clients
    return settings | {
        "attack": attack,
        "malicious": scenario.num_malicious,
        "period": period,
        "tasks": scenario.attack["writer_class"]["targets"],
        "fraction": scenario.num_malicious / period / cohort,
    }


def _run_figures(sweep: Sweep, run: Run) -> dict[str, Any]:
    """The row of one run, without the shares that are clipped."""
    scenario = stored_scenario(run)
    row = {"run": run.name, "seed": scenario.seed, **settings_of(scenario)}
    row["main_accuracy"] = _mean_of_last(run.metrics["main_accuracy"])
    if scenario.is_control:
        return row
    control = sweep.control_of(run.name)
    return row | {
        "asr": _mean_of_last(run.metrics["asr"]),
        "control_asr": _mean_of_last(_control_asr(sweep, run.name)),
        "control_accuracy": _mean_of_last(control.metrics["main_accuracy"]),
    }


def _control_asr(sweep: Sweep, name: str) -> pd.Series:
    """The success of a run's attack on the models of its control, round by round."""
    return sweep.controls[sweep.controls["run"].eq(name)].sort_values("round")["asr"]


def _mean_of_last(values: pd.Series) -> float:
    return float(values.to_numpy(np.float64)[-LAST_ROUNDS:].mean())


def clipped_shares(path: Path, start: int) -> dict[str, float]:
    """The shares of a run's poisoned and of its benign updates since a round that are longer than its bound."""
    run = Run.open(path)
    bound = settings_of(stored_scenario(run))["bound"]
    if bound is None:
        return {"clipped": np.nan, "clipped_benign": np.nan}
    poisoned = set(run.truth.loc[run.truth["poisoned"], ["round", "client"]].itertuples(index=False, name=None))
    is_longer: dict[bool, list[bool]] = {True: [], False: []}
    for round_ in run.log:
        if round_.index >= start:
            for client, norm in zip(round_.clients.tolist(), round_.total_norms, strict=True):
                is_longer[(round_.index, client) in poisoned].append(bool(norm > bound * (1 + ROUNDING)))
    return {"clipped": _share(is_longer[True]), "clipped_benign": _share(is_longer[False])}


def _share(is_longer: Sequence[bool]) -> float:
    return float(np.mean(is_longer)) if is_longer else np.nan


def first_attacked_round(sweep: Sweep) -> int:
    """The first round of a sweep in which anybody attacks.

    Raises
    ------
    InputError
        If nobody attacks in any round.
    """
    scenarios = [scenario for run in sweep.runs if not (scenario := stored_scenario(run)).is_control]
    for index in range(max(scenario.rounds for scenario in scenarios)):
        if any(build("schedule", scenario.schedule).due(Turn(index, 0, 0)) for scenario in scenarios):
            return index
    raise InputError(f"{sweep.path}: nobody attacks in any round")


def _center(runs: pd.DataFrame) -> Mapping[str, Any]:
    """The number of attackers, the period and the number of tasks with which most rules were run."""
    attacked = runs[runs["attack"].ne("none")]
    keys = ["malicious", "period", "tasks"]
    sizes = {key: len(part) for key, part in attacked.groupby(keys)}
    return dict(zip(keys, max(sizes, key=lambda key: sizes[key]), strict=True))


def _at_center(runs: pd.DataFrame, center: Mapping[str, Any]) -> pd.DataFrame:
    """The attacked runs at the center."""
    is_here = np.all([runs[name].eq(value) for name, value in center.items()], axis=0)
    return runs[is_here & runs["attack"].ne("none")]


def _rows_over_rounds(sweep: Sweep, runs: pd.DataFrame, center: Mapping[str, Any]) -> pd.DataFrame:
    """ASR and main accuracy after every round, of the attacked runs at the center and of their controls."""
    parts = []
    for row in _at_center(runs, center).to_dict("records"):
        name = str(row["run"])
        metrics, control = sweep.run(name).metrics, sweep.control_of(name).metrics
        settings = {key: row[key] for key in (*PLACE, *RULE, *CELL, "fraction", "seed")}
        parts.append(
            metrics[["round", "asr", "main_accuracy"]].assign(
                control_asr=_control_asr(sweep, name).to_numpy(),
                control_accuracy=control["main_accuracy"].to_numpy(),
                **settings,
            )
        )
    return pd.concat(parts, ignore_index=True)


def _norm_rows(sweep: Sweep, runs: pd.DataFrame) -> pd.DataFrame:
    """Quantiles of the norms of benign updates where nobody attacks and nothing is clipped."""
    start, rows, pooled = first_attacked_round(sweep), [], []
    undefended = runs[runs["attack"].eq("none") & runs["bound"].isna()]
    if undefended.empty:
        raise InputError(f"{sweep.path}: expected attack-free runs without a defense (mean), found none")
    place = {name: undefended[name].iloc[0] for name in PLACE}
    for name, seed in zip(undefended["run"], undefended["seed"], strict=True):
        for round_ in sweep.run(str(name)).log:
            norms = round_.total_norms
            rows.append({"seed": seed, "round": round_.index, **_quantiles(norms)})
            pooled += [norms] if round_.index >= start else []
    rows.append({"seed": np.nan, "round": np.nan, **_quantiles(np.concatenate(pooled)), "first": start})
    return pd.DataFrame(rows).assign(**place)


def _quantiles(norms: np.ndarray) -> dict[str, float]:
    q50, q90, q99 = np.quantile(norms, [0.5, 0.9, 0.99])
    return {"q50": float(q50), "q90": float(q90), "q99": float(q99)}


def _detector_rows(
    sweep: Sweep, runs: pd.DataFrame, center: Mapping[str, Any], executor: Executor | None
) -> pd.DataFrame:
    """How well detectors tell the attackers' updates at the center, thresholds set on controls of other seeds."""
    central = _at_center(runs, center)
    central = central[central["attack"].eq("norm-bounded") | central["bound"].isna()]
    controls = {str(name): sweep.control_of(str(name)).name for name in central["run"]}
    names = list(dict.fromkeys([*controls, *controls.values()]))
    scores = dict(zip(names, _scores([sweep.run(name) for name in names], executor), strict=True))
    start, keys, parts = first_attacked_round(sweep), [*PLACE, *RULE, *CELL, "fraction"], []
    for key, cell in central.groupby(keys, dropna=False, sort=False):
        attacked = _stacked(scores, cell["seed"], cell["run"], start)
        null = _stacked(scores, cell["seed"], cell["run"].map(controls), start)
        figures = evaluate(attacked, null=null).rename(columns={"bound": "sign"})  # a rule has a bound, too
        parts.append(figures.assign(**dict(zip(keys, cast(Any, key), strict=True))))
    table = pd.concat(parts, ignore_index=True)
    return table[table["metric"].isin(["auc", "tpr_5", "fpr_5"])]


def _stacked(
    scores: Mapping[str, pd.DataFrame], seeds: Iterable[int], names: Iterable[str], start: int
) -> pd.DataFrame:
    """The scores of several runs since the first attacked round, in one table."""
    parts = [scores[name].assign(seed=seed) for seed, name in zip(seeds, names, strict=True)]
    table = pd.concat(parts, ignore_index=True)
    return table[table["round"].ge(start)].reset_index(drop=True)


def _scores(runs: Sequence[Run], executor: Executor | None) -> Iterator[pd.DataFrame]:
    paths = [run.path for run in runs]
    return executor.map(scored, paths) if executor else map(scored, paths)


def scored(path: Path) -> pd.DataFrame:
    """What the detectors say of a run, with the truth."""
    run = Run.open(path)
    return with_truth(detect(run.log, {name: DETECTORS[name]() for name in DETECTOR_NAMES}), run.truth)
