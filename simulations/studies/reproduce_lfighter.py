"""Jebreel et al. 2024 (LFighter), reproduced: what rules and filters leave of label flipping by 40 % of the clients.

The paper's figures are those of its table 3.
"""

import numpy as np
import pandas as pd

from simulations.studies.results import Finding, markdown, over_seeds

LAST_ROUNDS = 5
NO_ATTACK = "no attack"
MNIST = {"mean": 0.0944, "foolsgold": 0.8852, "tolpegin": 0.0058, "flame": 0.0126, "lfighter": 0.0068}
CIFAR10 = {
    NO_ATTACK: 0.1490, "mean": 0.5293, "median": 0.5374, "trimmed_mean": 0.5561, "multi_krum": 0.7162,
    "foolsgold": 0.4600, "tolpegin": 0.6523, "flame": 0.6521, "lfighter": 0.1210,
}  # fmt: skip
DEVIATIONS = ("50 clients, 30 rounds; Dirichlet 1.0", "a small network for ResNet-18, 20 rounds; Dirichlet 1.0")


def findings(mnist: pd.DataFrame, cifar10: pd.DataFrame) -> list[Finding]:
    """What the rules leave, beside the paper's table.

    Parameters
    ----------
    mnist, cifar10 : DataFrame
        Rows of `outcomes`, with the columns of `reproduce.computed`.
    """
    found = []
    for name, table, paper, about in zip(
        ("MNIST", "CIFAR-10"), (mnist, cifar10), (MNIST, CIFAR10), DEVIATIONS, strict=True
    ):
        if len(table):
            rules = list(dict.fromkeys([NO_ATTACK, *_rules(table)]))
            found += [
                Finding(f"{name}: ASR, {rule}", _theirs(paper.get(rule, np.nan)), _figure(table, rule, "asr"), about)
                for rule in rules
            ]
    return found


def text(mnist: pd.DataFrame, cifar10: pd.DataFrame) -> str:
    """What each rule costs.

    Parameters
    ----------
    mnist, cifar10 : DataFrame
        As of `findings`.
    """
    if not len(mnist) + len(cifar10):
        return "Not run yet."
    rows = []
    for name, table in (("MNIST", mnist), ("CIFAR-10", cifar10)):
        for rule in list(dict.fromkeys(_rules(table))) if len(table) else ():
            part = table[_rules(table).eq(rule) & ~table["control"]]
            dropped = [over_seeds(part, f"dropped_{whose}") for whose in ("malicious", "benign")]
            if part["dropped_malicious"].isna().all():
                dropped = ["–", "–"]
            rows.append([name, rule, _figure(table, rule, "asr"), _figure(table, rule, "accuracy"), *dropped])
    columns = ["data", "rule or filter", "ASR", "main accuracy", "poisoned updates left out", "benign ones left out"]
    return f"Means over the last {LAST_ROUNDS} rounds, 40 % of the clients malicious.\n\n{markdown(columns, rows)}"


def _rules(table: pd.DataFrame) -> pd.Series:
    """The filter, or the rule where there is none."""
    return table["detector"].where(table["detector"].ne("none"), table["aggregator"].str.partition("(")[0])


def _figure(table: pd.DataFrame, rule: str, column: str) -> str:
    """A figure of a rule under attack; of "no attack" that of the mean's control."""
    last = table[table["round"] > table["round"].max() - LAST_ROUNDS]
    is_control, of_rule = last["control"], _rules(last).eq("mean" if rule == NO_ATTACK else rule)
    return over_seeds(last[of_rule & (is_control if rule == NO_ATTACK else ~is_control)], column)


def _theirs(figure: float) -> str:
    return "–" if np.isnan(figure) else f"{figure:.2f}"
