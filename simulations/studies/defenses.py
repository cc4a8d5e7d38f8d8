"""What each defense leaves of each attack: `python -m simulations.studies.defenses runs/defenses`.

Reads the sweep of `simulations/scenarios/defenses.toml`; writes `reports/defenses.csv`, a row per defense, partition
and attack. `section` is the text that the results show of it.
"""

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from gradlens.errors import InputError
from gradlens.evaluation import mean_interval
from gradlens.reporting.analysis import WORKED, attacked_runs, final
from gradlens.run import Run, Sweep
from simulations import Scenario, stored_scenario
from simulations.studies.conditions import control_asr, main_part
from simulations.studies.results import REPORTS, markdown, run_as_command

CSV = REPORTS / "defenses.csv"
NONE, RULE, FILTER, CALIBRATED = "none", "rule", "filter", "calibrated filter"
KINDS = (NONE, CALIBRATED, FILTER, RULE)
STOPPED_ASR = 0.1  # a backdoor at or below this ASR is stopped
LITTLE_COST = 0.02  # of main accuracy: a defense that costs no more is called free of cost
DAMAGE = 0.1  # of main accuracy lost without a defense: from here on an attack without a target works
COMMON_FILTER = {"fpr": 0.02, "out_for": 0}  # settings of calibrated filters that labels leave out


def main(arguments: Sequence[str] | None = None) -> None:
    """Writes the table of a sweep."""
    parser = argparse.ArgumentParser(prog="simulations.studies.defenses", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("sweep", type=Path, help="folder of the sweep, runs/defenses")
    parser.add_argument("--out", type=Path, default=CSV, help="the table (default: reports/defenses.csv)")
    options = parser.parse_args(arguments)
    defense_rows(Sweep.open(options.sweep)).to_csv(options.out, index=False, float_format="%.4f")


def committed() -> pd.DataFrame:
    """The table in `reports/`."""
    return pd.read_csv(CSV, keep_default_na=False, na_values=["nan", ""])


def defense_rows(sweep: Sweep) -> pd.DataFrame:
    """Summarizes each defense against each attack over its seeds, after the last round.

    Parameters
    ----------
    sweep : Sweep
        Attacked runs and their controls; those with the plain mean and no filter are what defenses are compared with.

    Returns
    -------
    DataFrame
        A row per defense, partition and attack, with 95 % intervals over seeds. `asr` and `control_asr` are
        NaN for attacks without a target. `dropped_malicious` and `dropped_benign` are the shares of the updates since
        the attack began that a filter left out, NaN for a rule. `works` says whether the attack works without a
        defense: ASR ends at least 0.5 above the control's, or main accuracy at least 0.1 below it.

    Raises
    ------
    InputError
        If there are no runs with the plain mean.
    """
    rows, control_rates = [], control_asr(sweep)
    for _, part in attacked_runs(sweep)[0].groupby("condition", sort=False):
        runs = [sweep.run(str(name)) for name in part.index]
        controls = [sweep.control_of(run.name) for run in runs]
        scenario = stored_scenario(runs[0])
        asr, accuracy = (np.array([final(run, name) for run in runs]) for name in ("asr", "main_accuracy"))
        dropped = np.array([dropped_shares(run) for run in runs])
        rows.append(
            {
                "defense": defense_label(scenario),
                "kind": defense_kind(scenario),
                "partition": next(iter(scenario.partition)),
                "attack": main_part(scenario.attack),
                "asr": asr.mean(),
                **dict(zip(("asr_low", "asr_high"), mean_interval(asr, 0, 1), strict=True)),
                "control_asr": np.nan if np.isnan(asr).all() else np.mean([control_rates[run.name] for run in runs]),
                "accuracy": accuracy.mean(),
                **dict(zip(("accuracy_low", "accuracy_high"), mean_interval(accuracy, 0, 1), strict=True)),
                "control_accuracy": np.mean([final(run, "main_accuracy") for run in controls]),
                "dropped_malicious": dropped[:, 0].mean(),
                "dropped_benign": dropped[:, 1].mean(),
                "seeds": len(runs),
            }
        )
    return with_works(pd.DataFrame(rows))


def defense_label(scenario: Scenario) -> str:
    """The rule, or the detector with those settings of its filter that are not common to most."""
    if not scenario.detector:
        return str(scenario.label("aggregator"))
    settings = [
        f"{name}={scenario.filter[name]}"
        for name, common in COMMON_FILTER.items()
        if scenario.filter.get(name, common) != common
    ]
    return ", ".join([str(scenario.label("detector")), *settings])


def defense_kind(scenario: Scenario) -> str:
    """One of `KINDS`."""
    if scenario.detector:
        return CALIBRATED if scenario.filter.get("clean_rounds") else FILTER
    return NONE if scenario.label("aggregator") == "mean" else RULE


def dropped_shares(run: Run) -> tuple[float, float]:
    """The shares of malicious and benign updates since the attack began that the filter left out; NaN without one."""
    verdicts = run.verdicts
    if verdicts.empty:
        return np.nan, np.nan
    updates = verdicts.merge(run.truth, on=["round", "client"])
    updates = updates[updates["round"] >= updates.loc[updates["poisoned"], "round"].min()]
    dropped = ~updates["kept"].astype(bool)
    return float(dropped[updates["poisoned"]].mean()), float(dropped[~updates["poisoned"]].mean())


def with_works(table: pd.DataFrame) -> pd.DataFrame:
    """The table with the column `works`, from the rows without a defense."""
    undefended = table[table["kind"] == NONE]
    if undefended.empty:
        raise InputError("defenses: expected runs with the plain mean to compare with, found none")
    gain, damage = (
        undefended["asr"] - undefended["control_asr"],
        undefended["control_accuracy"] - undefended["accuracy"],
    )
    condition = ["partition", "attack"]
    works = pd.Series(
        ((gain >= WORKED) | (damage >= DAMAGE)).to_numpy(), index=pd.MultiIndex.from_frame(undefended[condition])
    )
    return table.assign(works=works.loc[pd.MultiIndex.from_frame(table[condition])].to_numpy())


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """A row per defense, over the attacks that work without one.

    Columns: kind, defense, asr_PARTITION (mean ASR), asr_worst, damaged (lowest main accuracy under attacks without a
    target), honest (main accuracy without an attack), dropped_malicious, dropped_benign.
    """
    rows = []
    for (kind, defense), part in table.groupby(["kind", "defense"], sort=False):
        works = part[part["works"]]
        targeted, untargeted = works[works["asr"].notna()], works[works["asr"].isna()]
        rows.append(
            {
                "kind": kind,
                "defense": defense,
                **{f"asr_{name}": group["asr"].mean() for name, group in targeted.groupby("partition")},
                "asr_worst": targeted["asr"].max(),
                "damaged": untargeted["accuracy"].min(),
                "honest": part.drop_duplicates("partition")["control_accuracy"].mean(),
                "dropped_malicious": works["dropped_malicious"].mean(),
                "dropped_benign": part["dropped_benign"].mean(),
            }
        )
    order = {kind: place for place, kind in enumerate(KINDS)}
    table = pd.DataFrame(rows)
    table = table.assign(place=table["kind"].map(order)).sort_values(["place", "asr_worst"], kind="stable")
    return table.drop(columns="place").reset_index(drop=True)


# The section of the results ------------------------------------------------------------------------------------


def section(table: pd.DataFrame) -> str:
    """The section of the results on defenses, in Markdown, from the table."""
    defenses = summary(table)
    partitions = [name for name in ("iid", "dirichlet") if f"asr_{name}" in defenses]
    columns = ["defense", "kind", *(f"ASR, {name}" for name in partitions), "worst ASR", "accuracy, damaged"]
    columns += ["accuracy, honest", "left out: malicious", "benign"]
    lines = [
        [f"`{row['defense']}`", row["kind"], *(f"{row[f'asr_{name}']:.2f}" for name in partitions)]
        + [f"{row[name]:.2f}" for name in ("asr_worst", "damaged", "honest")]
        + [_percent(row[name]) for name in ("dropped_malicious", "dropped_benign")]
        for row in defenses.to_dict("records")
    ]
    return "\n\n".join(["## The defenses, measured", _lead(table), markdown(columns, lines), _conclusion(defenses)])


def _lead(table: pd.DataFrame) -> str:
    works = table[table["works"]]
    backdoors, damages = (works[works["asr"].isna() == untargeted]["attack"].unique() for untargeted in (False, True))
    return (
        "What remains of an attack behind each aggregation rule, and behind live filters in front of the mean. Task: "
        "digits, ten honest rounds, on which calibrated filters set their thresholds (for 2 % of benign updates unless "
        f"the name says otherwise); then 4 of 20 clients attack for 20 rounds; {table['seeds'].min()} seeds. ASR: mean "
        f"over the backdoors that work against the plain mean ({_names(backdoors)}). Damaged: the lowest main accuracy "
        f"under {_names(damages)}. Honest: main accuracy while nobody attacks. Left out: the share of the updates sent "
        "since the attack began that a filter drops. Cell by cell, with intervals and controls: "
        "[`reports/defenses.csv`](reports/defenses.csv)."
    )


def _conclusion(defenses: pd.DataFrame) -> str:
    """Which defenses stop every backdoor without a cost, which come close, and which do so at a cost."""
    undefended = defenses.loc[defenses["kind"] == NONE, "honest"].iloc[0]
    stops = defenses["asr_worst"] <= STOPPED_ASR
    free = (defenses["honest"] >= undefended - LITTLE_COST) & (defenses["damaged"] >= undefended - DAMAGE)
    criterion = (
        f"ASR at most {STOPPED_ASR:g}; main accuracy within {LITTLE_COST:g} of {undefended:.2f} without an attack and "
        f"within {DAMAGE:g} of it under damage"
    )
    best = _labels(defenses[stops & free])
    sentences = [
        f"Every backdoor is stopped and main accuracy kept ({criterion}) by {best}."
        if best
        else f"No defense stops every backdoor and keeps main accuracy ({criterion})."
    ]
    near = defenses[~stops & free].nsmallest(3, "asr_worst")
    if len(near):
        worst = [f"{label} {asr:.2f}" for label, asr in zip(_label_list(near), near["asr_worst"], strict=True)]
        sentences.append(
            f"Of the others that keep main accuracy, these let the least through at worst: {', '.join(worst)}."
        )
    costly = defenses[stops & ~free]
    if len(costly):
        sentences.append(f"Every backdoor is stopped, but main accuracy is not kept, by {_labels(costly)}.")
    return " ".join(sentences)


def _label_list(defenses: pd.DataFrame) -> list[str]:
    return [
        f"`{row['defense']}`" if row["kind"] == RULE else f"`{row['defense']}` ({row['kind']})"
        for row in defenses.to_dict("records")
    ]


def _labels(defenses: pd.DataFrame) -> str:
    return ", ".join(_label_list(defenses))


def _names(attacks: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in attacks)


def _percent(share: float) -> str:
    return "–" if np.isnan(share) else f"{100 * share:.0f} %"


if __name__ == "__main__":
    run_as_command(main)
