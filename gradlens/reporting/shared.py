"""What the report on a run and the report on a sweep share: figures as text, and who did what in a run."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from gradlens.plots import percent
from gradlens.reporting.page import Block, measured, number, table
from gradlens.run import Run


def shown(row: Any, *, share: bool = False) -> str:
    """A row of `evaluate` or `localize` as text."""
    value = row.auc if hasattr(row, "auc") else row.value
    return measured(value, row.low, row.high, getattr(row, "bound", ""), share=share)


def effects(row: Any) -> dict[str, str]:
    """How far the malicious clients stand out there, and how far a benign one does."""
    return {"Effect": number(row.effect, 1), "Farthest benign": number(row.control_effect, 1)}


def p_value(p: float) -> str:
    """A p-value with the digits that matter."""
    return "–" if np.isnan(p) else "< 0.001" if p < 0.001 else number(p, 3)


def surely(p: float) -> str:
    """A p-value in a sentence, with a warning where chance could have given the AUC."""
    return f"p {p_value(p)}" + ("" if p < 0.05 else ", which chance could give")


def poisoners(run: Run) -> dict[str, int]:
    """client -> number of its poisoned updates, those with at least one."""
    truth = run.truth
    counts = truth.loc[truth["poisoned"].astype(bool), "client"].value_counts()
    return {str(client): int(number) for client, number in counts.items()}


def flag_table(raw: pd.DataFrame, poisoned: Mapping[str, int] | None, caption: str) -> Block:
    """Share of a client's rounds in which each detector flags it, most flagged first; poisoned None: unknown."""
    shares = raw.pivot_table(index="client", columns="detector", values="flag", aggfunc="mean", sort=False)
    counts = raw.groupby("client")["round"].nunique()
    order = shares.mean(axis=1).sort_values(ascending=False, kind="stable").index
    rows = []
    for client in order:
        row = {"Client": str(client), "Rounds": str(counts[client])}
        if poisoned is not None:
            row["Poisoned updates"] = str(poisoned.get(str(client), 0))
        rows.append(row | {str(name): percent(share) for name, share in shares.loc[client].items()})
    return table(rows, caption + " Share of its rounds, by detector.", folded=len(rows) > 24)


def attacked_rounds(run: Run) -> list[int]:
    """The rounds in which an update was poisoned, in order."""
    return sorted(set(run.truth.loc[run.truth["poisoned"].astype(bool), "round"].tolist()))


def with_malicious(raw: pd.DataFrame, truth: pd.DataFrame) -> pd.DataFrame:
    """The scores of all rounds with a column malicious: this update was poisoned."""
    joined = raw.merge(truth[["round", "client", "poisoned"]], how="left", on=["round", "client"])
    return joined.assign(malicious=joined["poisoned"].eq(True)).drop(columns="poisoned")
