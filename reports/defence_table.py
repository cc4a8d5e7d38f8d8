"""Writes what each defence leaves of each attack: `python reports/defence_table.py RUNS`.

Reads the sweep of simulations/scenarios/defences.toml; writes reports/defences.csv, a row per defence, partition and
attack, and the README's section on the defences.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from attack_table import control_rates, shown, with_section

from gradlens.errors import InputError
from gradlens.evaluation import bootstrap
from gradlens.reporting.analysis import WORKED, attacked_runs, final
from gradlens.run import Run, Sweep
from simulations import Scenario

ROOT = Path(__file__).resolve().parents[1]
CSV, README = ROOT / "reports/defences.csv", ROOT / "README.md"
BEGIN, END = "<!-- defences -->", "<!-- /defences -->"
BEFORE = "<!-- attacks -->"
NONE, RULE, FILTER, CALIBRATED = "none", "rule", "filter", "calibrated filter"
KINDS = (NONE, CALIBRATED, FILTER, RULE)
STOPPED, CHEAP = 0.1, 0.02  # an ASR of at most so much is a stopped backdoor; so much main accuracy is no price
USUAL = {"fpr": 0.02, "out_for": 0}  # of the calibrated filters, whose others go without saying
HARMS = 0.1  # of main accuracy lost without a defence: from there on an attack that only sends does damage


def main(folder: str) -> None:
    """The table of the sweep, and the README's section."""
    rows(Sweep.open(folder)).to_csv(CSV, index=False, float_format="%.4f")
    README.write_text(with_section(README.read_text(), section(committed()), BEGIN, END, BEFORE))


def committed() -> pd.DataFrame:
    """The table as it is in the repository."""
    return pd.read_csv(CSV, keep_default_na=False, na_values=["nan", ""])


def rows(sweep: Sweep) -> pd.DataFrame:
    """A row per defence, partition and attack: means over seeds after the last round, with 95 % bootstrap intervals.

    asr, control_asr: NaN for attacks without a target. dropped_malicious, dropped_benign: of the updates sent once the
    attack has begun, the share that a filter left out; NaN for a rule. works: without a defence the ASR ends at least
    0.5 above the control's, or main accuracy 0.1 below it.
    """
    found, reference = [], control_rates(sweep)
    for _, part in attacked_runs(sweep)[0].groupby("condition", sort=False):
        runs = [sweep.run(str(name)) for name in part.index]
        controls = [sweep.control_of(run.name) for run in runs]
        scenario = Scenario(**runs[0].scenario)
        asr, accuracy = (np.array([final(run, name) for run in runs]) for name in ("asr", "main_accuracy"))
        dropped = np.array([_dropped(run) for run in runs])
        found.append(
            {
                "defence": named(scenario),
                "kind": _kind(scenario),
                "partition": next(iter(scenario.partition)),
                "attack": shown(scenario.attack),
                "asr": asr.mean(),
                **dict(zip(("asr_low", "asr_high"), bootstrap(asr), strict=True)),
                "control_asr": np.nan if np.isnan(asr).all() else np.mean([reference[run.name] for run in runs]),
                "accuracy": accuracy.mean(),
                **dict(zip(("accuracy_low", "accuracy_high"), bootstrap(accuracy), strict=True)),
                "control_accuracy": np.mean([final(run, "main_accuracy") for run in controls]),
                "dropped_malicious": dropped[:, 0].mean(),
                "dropped_benign": dropped[:, 1].mean(),
                "seeds": len(runs),
            }
        )
    return _working(pd.DataFrame(found))


def named(scenario: Scenario) -> str:
    """The rule, or the detector with those settings of its filter that are not usual."""
    if not scenario.detector:
        return str(scenario.label("aggregator"))
    other = {name: scenario.filter[name] for name in USUAL if scenario.filter.get(name, USUAL[name]) != USUAL[name]}
    settings = [f"{name}={value}" for name, value in other.items()]
    return ", ".join([str(scenario.label("detector")), *settings])


def _kind(scenario: Scenario) -> str:
    if scenario.detector:
        return CALIBRATED if scenario.filter.get("clean_rounds") else FILTER
    return NONE if scenario.label("aggregator") == "mean" else RULE


def _dropped(run: Run) -> tuple[float, float]:
    """Of the malicious and of the benign updates since the attack began, the share that the filter left out."""
    verdicts = run.verdicts
    if verdicts.empty:
        return np.nan, np.nan
    both = verdicts.merge(run.truth, on=["round", "client"])
    both = both[both["round"] >= both.loc[both["poisoned"], "round"].min()]
    left_out = ~both["kept"].astype(bool)
    return float(left_out[both["poisoned"]].mean()), float(left_out[~both["poisoned"]].mean())


def _working(table: pd.DataFrame) -> pd.DataFrame:
    """The table with the column `works`, of what each attack does without a defence."""
    bare = table[table["kind"] == NONE]
    if bare.empty:
        raise InputError("the sweep needs the plain mean, beside which defences are measured; found none")
    does = (bare["asr"] - bare["control_asr"] >= WORKED) | (bare["control_accuracy"] - bare["accuracy"] >= HARMS)
    works = pd.Series(does.to_numpy(), index=pd.MultiIndex.from_frame(bare[["partition", "attack"]]))
    return table.assign(works=works.loc[pd.MultiIndex.from_frame(table[["partition", "attack"]])].to_numpy())


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """A row per defence, over the attacks that work: mean and largest ASR, the least accuracy, that of honest runs."""
    found = []
    for (kind, defence), part in table.groupby(["kind", "defence"], sort=False):
        works = part[part["works"]]
        aims, damages = works[works["asr"].notna()], works[works["asr"].isna()]
        found.append(
            {
                "kind": kind,
                "defence": defence,
                **{f"asr_{name}": each["asr"].mean() for name, each in aims.groupby("partition")},
                "asr_worst": aims["asr"].max(),
                "damaged": damages["accuracy"].min(),
                "honest": part.drop_duplicates("partition")["control_accuracy"].mean(),
                "dropped_malicious": works["dropped_malicious"].mean(),
                "dropped_benign": part["dropped_benign"].mean(),
            }
        )
    order = {kind: place for place, kind in enumerate(KINDS)}
    found = pd.DataFrame(found).assign(place=lambda each: each["kind"].map(order))
    return found.sort_values(["place", "asr_worst"], kind="stable").drop(columns="place").reset_index(drop=True)


def section(table: pd.DataFrame) -> str:
    """The README's section on the defences, from the table."""
    each = summary(table)
    partitions = [name for name in ("iid", "dirichlet") if f"asr_{name}" in each]
    columns = ["defence", "kind", *(f"ASR, {name}" for name in partitions), "worst ASR", "accuracy, damaged"]
    columns += ["accuracy, honest", "left out: malicious", "benign"]
    lines = [
        [f"`{row['defence']}`", row["kind"], *(f"{row[f'asr_{name}']:.2f}" for name in partitions)]
        + [f"{row[name]:.2f}" for name in ("asr_worst", "damaged", "honest")]
        + [_share(row[name]) for name in ("dropped_malicious", "dropped_benign")]
        for row in each.to_dict("records")
    ]
    body = "\n".join("| " + " | ".join(line) + " |" for line in [columns, ["---"] * len(columns), *lines])
    return "\n\n".join(["## The defences, measured", _lead(table), body, _finding(each)])


def _lead(table: pd.DataFrame) -> str:
    aims = table[table["works"] & table["asr"].notna()]["attack"].unique()
    damages = table[table["works"] & table["asr"].isna()]["attack"].unique()
    return (
        "What stays of an attack behind each rule, and behind live filters in front of the mean: digits, ten honest "
        "rounds, on which calibrated filters set their thresholds (for 2 % of benign updates, unless it says), then 4 "
        f"of 20 clients attack for 20 rounds; {table['seeds'].min()} seeds. ASR: mean over backdoors that work against "
        f"the plain mean ({_named(aims)}). "
        f"Damaged: the lowest main accuracy under {_named(damages)}. Honest: main accuracy while nobody attacks. Left "
        "out: of the updates sent since the attack began, by a filter. Cell by cell, with intervals and controls: "
        "[`reports/defences.csv`](reports/defences.csv)."
    )


def _finding(each: pd.DataFrame) -> str:
    """Which defences stop every backdoor at no price, which come near, and which do at a price."""
    free = each.loc[each["kind"] == NONE, "honest"].iloc[0]
    stops = each["asr_worst"] <= STOPPED
    cheap = (each["honest"] >= free - CHEAP) & (each["damaged"] >= free - HARMS)
    good, dear = each[stops & cheap], each[stops & ~cheap]
    asked = f"ASR at most {STOPPED:g}, main accuracy honest within {CHEAP:g} and damaged within {HARMS:g} of {free:.2f}"
    said = f"Every backdoor is stopped, and main accuracy kept ({asked}), by {_list(good)}."
    near = each[~stops & cheap].nsmallest(3, "asr_worst")
    if len(near):
        worst = [f"{text} {value:.2f}" for text, value in zip(_each(near), near["asr_worst"], strict=True)]
        said += f" Of the others that keep it, least gets through {', '.join(worst)} at worst."
    return said + (f" Every backdoor is stopped, but main accuracy not kept, by {_list(dear)}." if len(dear) else "")


def _each(part: pd.DataFrame) -> list[str]:
    return [f"`{row.defence}` ({row.kind})" if row.kind != RULE else f"`{row.defence}`" for row in part.itertuples()]


def _list(part: pd.DataFrame) -> str:
    return ", ".join(_each(part)) or "none"


def _named(names: Sequence[str] | np.ndarray) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _share(value: float) -> str:
    return "–" if np.isnan(value) else f"{100 * value:.0f} %"


if __name__ == "__main__":
    main(*sys.argv[1:])
