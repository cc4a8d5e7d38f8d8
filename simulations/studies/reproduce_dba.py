"""Xie et al. 2020, reproduced: a trigger in parts lives longer than the same trigger whole, and FoolsGold against both.

The paper's figures are those of its text ("DBA", ICLR 2020).
"""

import pandas as pd

from simulations.studies.reproduce_outcomes import figure_at
from simulations.studies.results import Finding, markdown, over_seeds

LATER = 50  # benign rounds after the last attack
ALONE = {"distributed_trigger": 0.89, "centralized_trigger": 0.21}  # ASR after them, single shot
FOOLED = {"distributed_trigger": 0.9155, "centralized_trigger": 0.0291}  # ASR in round 30 behind FoolsGold, multi-shot
LAST_ROUNDS = 5
WORDS = {"distributed_trigger": "in parts", "centralized_trigger": "whole"}
DEVIATION = "a smaller network, trained by the server before; 500 images per client"


def findings(single: pd.DataFrame, multi: pd.DataFrame) -> list[Finding]:
    """What came of the two experiments, beside the paper's figures.

    Parameters
    ----------
    single, multi : DataFrame
        Rows of `outcomes`, with the columns of `reproduce.computed`.
    """
    found = []
    if len(single):
        for kind, theirs in ALONE.items():
            rows = single[single["attack"].str.startswith(kind) & ~single["control"]]
            found += [
                Finding(f"MNIST, trigger {WORDS[kind]}: ASR in the last attacked round", "–",
                        figure_at(rows, "asr", 0), DEVIATION),
                Finding(f"MNIST, trigger {WORDS[kind]}: ASR 50 benign rounds later", f"{theirs:.2f}",
                        figure_at(rows, "asr", LATER), DEVIATION),
            ]  # fmt: skip
        control = single[single["control"]]
        found += [
            Finding("MNIST: ASR then, no attack", "–", figure_at(control, "asr", LATER), DEVIATION),
            Finding("MNIST: main accuracy then, no attack", "–", figure_at(control, "accuracy", LATER), DEVIATION),
        ]
    for kind, theirs in FOOLED.items() if len(multi) else ():
        rows = _last(multi[_attack(multi).eq(kind) & multi["detector"].eq("foolsgold") & ~multi["control"]])
        for count, part in rows.groupby("num_malicious"):
            claim = f"MNIST behind FoolsGold, trigger {WORDS[kind]}, {count} malicious: ASR in round 30"
            found.append(Finding(claim, f"{theirs:.2f}", over_seeds(part, "asr"), DEVIATION))
    return found


def text(single: pd.DataFrame, multi: pd.DataFrame) -> str:
    """Both attacks without FoolsGold and behind it.

    Parameters
    ----------
    single, multi : DataFrame
        As of `findings`.
    """
    if not len(multi):
        return "FoolsGold was not run yet."
    last = _last(multi)
    rows = []
    attacked = last[~last["control"]].assign(kind=_attack(last))
    for (detector, kind, count), part in attacked.groupby(["detector", "kind", "num_malicious"]):  # type: ignore[misc]
        rule = "mean" if detector == "none" else str(detector)
        control = last[last["control"] & last["run"].isin(part["control_run"])]
        rows.append(
            [rule, f"{WORDS[str(kind)]}, {count} malicious", over_seeds(part, "asr"), over_seeds(part, "accuracy"),
             over_seeds(control, "asr"), over_seeds(control, "accuracy")]
        )  # fmt: skip
    columns = ["weights", "trigger", "ASR", "main accuracy", "ASR, control", "main accuracy, control"]
    lead = "Of the centralized attack on FoolsGold the paper's number of attackers was not found; both are shown."
    return f"Multi-shot, means over the last {LAST_ROUNDS} rounds. {lead}\n\n{markdown(columns, rows)}"


def _attack(rows: pd.DataFrame) -> pd.Series:
    return rows["attack"].str.partition("+")[0].str.partition("(")[0]


def _last(rows: pd.DataFrame) -> pd.DataFrame:
    return rows[rows["round"] > rows["round"].max() - LAST_ROUNDS]
