"""The tables behind the study of localization: where updates differ, round by round, and how far the bias moves."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

from gradlens.localization import localize_rounds, localize_sweep
from gradlens.processes import processes
from gradlens.run import Run, Sweep
from gradlens.statistics import final_bias

CENTER = {"learning_rate": 0.1, "poison_rate": 0.5, "num_malicious": 4, "partition": "iid"}
PERMUTATIONS = 999

Location = tuple[str, str]  # layer, statistic


@dataclass(frozen=True, eq=False)
class Tables:
    """The tables of a page.

    Parameters
    ----------
    sweep : Sweep
        Where they are from.
    phases : DataFrame
        Whole layers by phase, early and later, as of `localize_sweep`.
    rounds : DataFrame
        Whole layers by round since the attack began, as of `localize_rounds`.
    drifts : DataFrame
        As of `drifts_of`.
    locations : list of (layer, statistic)
        Those that the pictures draw, the final bias first.
    """

    sweep: Sweep
    phases: pd.DataFrame
    rounds: pd.DataFrame
    drifts: pd.DataFrame
    locations: list[Location]

    def rows(self) -> pd.DataFrame:
        """The rows of `localization.csv`: by phase, then by round."""
        return pd.concat([self.phases, self.rounds], ignore_index=True).drop(columns=["unit", "control", "labels"])

    def final_bias_in(self, rows: pd.DataFrame) -> pd.DataFrame:
        """Those rows that are on the final bias."""
        return rows[is_at(rows, self.locations[0])]


def is_at(rows: pd.DataFrame, location: Location) -> pd.Series:
    """Which rows are on a statistic of a layer."""
    return rows["layer"].eq(location[0]) & rows["statistic"].eq(location[1])


def around_center(rows: pd.DataFrame, axis: str) -> pd.DataFrame:
    """The rows in which no setting apart from one differs from the center."""
    is_same = [rows[name].eq(value) for name, value in CENTER.items() if name != axis]
    return rows[np.logical_and.reduce(is_same)]


def gathered(sweep: Sweep, workers: int = 1) -> Tables:
    """Computes the tables of a sweep; single rounds only where at most one setting differs from the center."""
    model = sweep.runs[0].log.model
    last, first = model.final_bias, model.parameters[0]
    locations = [(str(last), "final_bias"), (str(model.final_weight), "final_rows")]
    locations += [(first, "layer_norms"), (first, "accumulated_norms")]
    settings = sweep.settings.to_dict("index")
    near = replace(sweep, runs=[run for run in sweep.runs if _is_near_center(settings[run.name])])
    if workers > 1:
        with processes(workers) as executor:
            phases = localize_sweep(sweep, permutations=PERMUTATIONS, executor=executor, progress=True)
            rounds = localize_rounds(near, permutations=PERMUTATIONS, executor=executor, progress=True)
    else:
        phases = localize_sweep(sweep, permutations=PERMUTATIONS)
        rounds = localize_rounds(near, permutations=PERMUTATIONS)
    rounds = rounds[[location in locations for location in zip(rounds["layer"], rounds["statistic"], strict=True)]]
    names = _partition_names(sweep)
    phases, rounds = (
        table[~table["control"].astype(bool) & table["unit"].eq("")].assign(partition=table["partition"].map(names))
        for table in (phases, rounds)
    )
    return Tables(sweep, phases, rounds, drifts_of(sweep), locations)


def _partition_names(sweep: Sweep) -> dict[str, str]:
    """The label of each partition -> its name and its skew, "dirichlet 0.5"."""
    names, settings = {}, sweep.settings.to_dict("index")
    for run in sweep.runs:
        name, values = next(iter(run.scenario["partition"].items()))
        skew = f" {values['alpha']:g}" if "alpha" in values else ""
        names[settings[run.name]["partition"]] = name + skew
    return names


def _is_near_center(settings: Mapping[Any, Any]) -> bool:
    """Whether at most one setting differs from the center; of a control, the attack's settings do not count."""
    ignored = ("poison_rate", "num_malicious") if settings["control"] else ()
    return sum(settings[name] != value for name, value in CENTER.items() if name not in ignored) <= 1


def drifts_of(sweep: Sweep) -> pd.DataFrame:
    """Measures how far the final bias of the target class moves in attacked runs on iid data.

    Parameters
    ----------
    sweep : Sweep
        Runs with a trigger; the first round of each is measured, and all rounds where no setting apart from the
        learning rate differs from the center.

    Returns
    -------
    DataFrame
        The settings, round, drift (mean of the attackers minus mean of the benign clients, in logits), expected
        (learning rate x steps x share of the attacker's samples with a wrong label: the drift if none of it were
        learned), share (drift / expected), asr (of the model that the round starts from).
    """
    rows, settings_of = [], sweep.settings.to_dict("index")
    for run in sweep.runs:
        settings = settings_of[run.name]
        if settings["control"] or settings["partition"] != CENTER["partition"]:
            continue
        changed = {name for name, value in CENTER.items() if settings[name] != value}
        asr = [0.0, *run.metrics["asr"].tolist()]
        for index, drift, expected in _drifts(run, len(run.log) if changed <= {"learning_rate"} else 1):
            figures = {"round": index, "drift": drift, "expected": expected, "share": drift / expected}
            rows.append({**settings, **figures, "asr": asr[index]})
    return pd.DataFrame(rows)


def _drifts(run: Run, rounds: int) -> Iterator[tuple[int, float, float]]:
    """Round, drift and expected drift of the first rounds of a run."""
    scenario = run.scenario
    target = scenario["attack"]["trigger"]["target_label"]
    attackers = list(set(run.truth.loc[run.truth["poisoned"].astype(bool), "client"]))
    for prefix in (run.log[: k + 1] for k in range(rounds)):
        bias, round_ = final_bias(prefix).to_numpy(), prefix[-1]
        malicious = np.isin(round_.clients, attackers)
        drift = bias[malicious, target].mean() - bias[~malicious, target].mean()
        steps = scenario["local_epochs"] * np.ceil(round_.num_examples[malicious] / scenario["batch_size"]).mean()
        wrong = scenario["poison_rate"] * (1 - 1 / bias.shape[1])  # samples of the target class keep their label
        yield round_.index, float(drift), float(scenario["learning_rate"] * steps * wrong)
