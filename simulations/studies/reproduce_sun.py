"""Sun et al. 2019, reproduced: what norm clipping and weak DP leave of a backdoor, and how often it must attack.

The paper has curves, of which no figure was found (arXiv:1911.07963); what it says of them is compared, and its bounds
and its noise are taken as they are. Figures are means over the last rounds, one period of the rarest attack.
"""

import numpy as np
import pandas as pd

from gradlens.run import Run
from simulations import Scenario
from simulations.studies.reproduce_outcomes import outcomes
from simulations.studies.results import Finding, markdown, over_seeds

LAST_ROUNDS = 8
DEVIATION = "MNIST by pseudo-writers, 100 clients, ten in a round, 14 rounds; trained by the server before"
FEMNIST = "FEMNIST by 12 groups of writers, all of them in every round, 14 rounds"
BOOSTED, BOUNDED = "explicit_boosting", "norm_bound"
NO_DEFENSE, TIGHT, NOISY = "mean", "norm_clipping(bound=3)", "weak_dp(bound=5)"


def measured(run: Run, scenario: Scenario) -> pd.DataFrame:
    """Measures every round of a run.

    Parameters
    ----------
    run : Run
        The recording.
    scenario : Scenario
        The attacked scenario that it is, or is the control of.

    Returns
    -------
    DataFrame
        As `outcomes`, with norm and norm_90: the median and the 90 % quantile of the norms of benign updates.
    """
    rows, poisoned = outcomes(run, scenario), run.truth[run.truth["poisoned"]].groupby("round")["client"].agg(set)
    norms = [round_.total_norms[~np.isin(round_.clients, list(poisoned.get(round_.index, ())))] for round_ in run.log]
    return rows.assign(norm=[np.median(part) for part in norms], norm_90=[np.quantile(part, 0.9) for part in norms])


def findings(table: pd.DataFrame, femnist: pd.DataFrame) -> list[Finding]:
    """What came of it, beside what the paper says.

    Parameters
    ----------
    table, femnist : DataFrame
        Rows of `measured`, with the columns of `reproduce.computed`.
    """
    if not len(table):
        return []
    last = table[table["round"] > table["round"].max() - LAST_ROUNDS]
    attacked, control = last[~last["control"]], last[last["control"]]
    center = attacked[attacked["schedule"].eq(_most(attacked, "schedule")) & _tasks(attacked).eq(10)]
    boosted, bounded = (center[center["attack"].str.contains(part)] for part in (BOOSTED, BOUNDED))
    rows = [
        ("90 % quantile of benign norms, no attack", "–", over_seeds(control, "norm_90", most=np.inf)),
        ("ASR without a defense, one attacker in ten", "high", _asr(boosted, NO_DEFENSE)),
        ("the same at M = 3", "mitigated", _asr(boosted, TIGHT)),
        ("ASR of the attack that knows M = 3", "mitigated", _asr(bounded, TIGHT)),
        ("the same in the control's model", "–", _asr(control, TIGHT)),
        ("main accuracy at M = 3, no attack", "almost no effect", _accuracy(control, TIGHT)),
        ("main accuracy without a defense, no attack", "–", _accuracy(control, NO_DEFENSE)),
        ("ASR of the attack that knows M = 5", "–", _asr(bounded, "norm_clipping(bound=5)")),
        ("the same with noise of 0.025", "lower", _asr(bounded, NOISY)),
        ("main accuracy with that noise, no attack", "almost no effect", _accuracy(control, NOISY)),
    ]
    return [Finding(*row, DEVIATION) for row in rows]


def text(table: pd.DataFrame, femnist: pd.DataFrame) -> str:
    """Frequencies and pools, tasks, bounds; then FEMNIST.

    Parameters
    ----------
    table, femnist : DataFrame
        As of `findings`.
    """
    if not len(table):
        return "Not run yet."
    lead = f"Means over the last {LAST_ROUNDS} rounds."
    parts = [lead, _cells(table)]
    if len(femnist):
        parts.append(f"{FEMNIST}:\n\n{_cells(femnist)}")
    return "\n\n".join(parts)


def _cells(table: pd.DataFrame) -> str:
    """Every cell beside its control."""
    last = table[table["round"] > table["round"].max() - LAST_ROUNDS]
    attacked, control = last[~last["control"]], last[last["control"]]
    keys = ["aggregator", "attack", "num_malicious", "schedule"]
    rows = []
    for (rule, attack, malicious, schedule), part in attacked.groupby(keys, sort=False):  # type: ignore[misc]
        whole = table[table["run"].isin(part["run"])]
        per_round = f"{whole.loc[whole['attackers'].cumsum() > 0, 'attackers'].mean():.2f}"
        beside = control[control["run"].isin(part["control_run"])]
        kind = "boosted" if BOOSTED in attack else "knows the bound"
        rows.append(
            [str(rule), kind, f"{_tasks(part).iloc[0]}", _when(str(schedule), int(malicious)), per_round,
             over_seeds(part, "asr"), over_seeds(part, "accuracy"), over_seeds(beside, "accuracy")]
        )  # fmt: skip
    columns = ["rule", "attack", "tasks", "attackers", "per round", "ASR", "main accuracy", "main accuracy, control"]
    return markdown(columns, rows)


def _when(schedule: str, malicious: int) -> str:
    """How attackers come, in words."""
    if schedule.startswith("random_pool"):
        return "drawn from a pool"
    every = schedule.partition("period=")[2].partition(",")[0].rstrip(")")
    return f"{malicious} in every round" if every == "1" else f"{malicious} in one of {every or 2} rounds"


def _tasks(rows: pd.DataFrame) -> pd.Series:
    """The number of clients whose images are relabeled."""
    return rows["attack"].str.extract(r"targets=(\d+)", expand=False).fillna("1").astype(int)


def _most(rows: pd.DataFrame, column: str) -> object:
    """What most runs have."""
    return rows.drop_duplicates("run")[column].mode().iloc[0]


def _asr(rows: pd.DataFrame, rule: str) -> str:
    return over_seeds(rows[rows["aggregator"].eq(rule)], "asr")


def _accuracy(rows: pd.DataFrame, rule: str) -> str:
    return over_seeds(rows[rows["aggregator"].eq(rule)], "accuracy")
