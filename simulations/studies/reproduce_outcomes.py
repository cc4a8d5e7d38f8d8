"""What the reproductions of several papers measure alike: success and accuracy after each round."""

import pandas as pd

from gradlens.run import Run
from simulations import Scenario
from simulations.assemble import Federation, assemble
from simulations.measure import attack_success
from simulations.studies.defenses import dropped_shares
from simulations.studies.results import over_seeds
from simulations.training import one_thread

CONTROL_SAMPLES = 1_000
COLUMNS = ["round", "since", "accuracy", "asr", "attackers", "dropped_malicious", "dropped_benign"]


def success_rates(run: Run, federation: Federation) -> list[float]:
    """ASR after each round; in a control that of the attack which it is the control of, on 1,000 samples at most.

    Parameters
    ----------
    run : Run
        The recording.
    federation : Federation
        Of the attacked scenario that it is, or is the control of.
    """
    if run.metrics.get("asr", pd.Series(dtype=float)).notna().any():
        return run.metrics["asr"].tolist()
    x, wanted = (part[:CONTROL_SAMPLES] for part in federation.goal)
    with one_thread():
        return [attack_success((x, wanted), federation.model, state) for state in run.states()]


def outcomes(run: Run, scenario: Scenario) -> pd.DataFrame:
    """Measures what became of the model, round by round.

    Parameters
    ----------
    run : Run
        The recording.
    scenario : Scenario
        The attacked scenario that it is, or is the control of.

    Returns
    -------
    DataFrame
        A row per round: round, since (rounds since the last attack of the attacked scenario; negative before it),
        accuracy and asr (after it), attackers (updates that the attacked scenario poisons in it), and dropped_malicious
        and dropped_benign, the shares of updates that a live filter left out since the first attack; NaN without one.
    """
    federation = assemble(scenario)
    rates, attackers = success_rates(run, federation), [int(cohort.attacking.sum()) for cohort in federation.cohorts]
    last = max(index for index, count in enumerate(attackers) if count)
    malicious, benign = dropped_shares(run)
    rows = {
        "round": range(len(rates)),
        "since": [index - last for index in range(len(rates))],
        "accuracy": run.metrics["main_accuracy"],
        "asr": rates,
        "attackers": attackers,
        "dropped_malicious": malicious,
        "dropped_benign": benign,
    }
    return pd.DataFrame(rows, columns=COLUMNS)


def figure_at(rows: pd.DataFrame, column: str, since: int) -> str:
    """The mean of a share so many rounds after the last attack, with its interval over seeds."""
    return over_seeds(rows[rows["since"].eq(since)], column)
