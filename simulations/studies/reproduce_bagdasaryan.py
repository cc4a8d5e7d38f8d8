"""Bagdasaryan et al. 2018, reproduced: one client replaces a model that has converged, in one round.

The paper's figures are those of its abstract, its supplement and its code (arXiv:1807.00459); where a figure is known
from memory alone it is not quoted.
"""

import numpy as np
import pandas as pd

from gradlens.geometry import pairwise_cosines
from gradlens.log import Round
from gradlens.run import Run
from simulations import Scenario
from simulations.assemble import assemble
from simulations.studies.reproduce_bilgin import deviation
from simulations.studies.reproduce_outcomes import success_rates
from simulations.studies.results import Finding, markdown, over_seeds

COLUMNS = ["round", "since", "accuracy", "asr", "norm", "norm_rank", "cosine_rank", "bias_rank", "clients"]
DEVIATION = "bilgin_cnn in place of ResNet-18, trained by the server for eight epochs; 100 images per client"


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
        A row per round: round, since (rounds since the first attack, negative before it), accuracy and asr (after it),
        and in a round with an attacker what it shows: norm (of its update, in median norms of the others), norm_rank,
        cosine_rank and bias_rank (its place, 1 the most conspicuous, by the norm, by the smallest mean cosine to the
        others, by the deviation of the final bias), among so many clients. In a control they are those of the same
        client, which is honest there.
    """
    federation = assemble(scenario)
    cohorts, rates = federation.cohorts, success_rates(run, federation)
    first = next(index for index, cohort in enumerate(cohorts) if cohort.attacking.any())
    rows = []
    for round_ in run.log:
        after = {"accuracy": float(run.metrics["main_accuracy"].iloc[round_.index]), "asr": rates[round_.index]}
        attacking = cohorts[round_.index].attacking
        shown = _shown(round_, attacking, run.model.final_bias) if attacking.sum() == 1 else {}
        rows.append({"round": round_.index, "since": round_.index - first} | after | shown)
    return pd.DataFrame(rows, columns=COLUMNS)


def _shown(round_: Round, attacking: np.ndarray, bias: str | None) -> dict[str, float]:
    """How conspicuous the only attacker is."""
    norms = round_.total_norms
    cosines = pairwise_cosines(round_.total_gram)
    np.fill_diagonal(cosines, 0)
    shown = {
        "norm": float(norms[attacking][0] / np.median(norms[~attacking])),
        "norm_rank": _place(norms, attacking),
        "cosine_rank": _place(-cosines.sum(axis=1), attacking),
        "clients": len(round_),
    }
    return shown | ({} if bias is None else {"bias_rank": _place(deviation(round_.updates[bias]), attacking)})


def _place(scores: np.ndarray, attacking: np.ndarray) -> float:
    """The attacker's place, 1 for the highest score."""
    return float(1 + (scores > scores[attacking][0]).sum())


def findings(single: pd.DataFrame, stealth: pd.DataFrame, words: pd.DataFrame) -> list[Finding]:
    """What came of the replacement, beside the paper's figures.

    Parameters
    ----------
    single, stealth, words : DataFrame
        Rows of `measured`, with the columns of `reproduce.computed`.
    """
    found = []
    if len(single):
        attacked, control = single[~single["control"]], single[single["control"]]
        for name, rows in attacked.groupby(attacked["attack"].map(_what), sort=False):
            found.append(
                Finding(f"ASR in the round of the replacement: {name}", "1.00", _at(rows, 0, "asr"), DEVIATION)
            )
            found.append(Finding(f"ASR 50 benign rounds later: {name}", "–", _at(rows, 50, "asr"), DEVIATION))
        found.append(Finding("ASR in that round, control", "–", _at(control, 0, "asr"), DEVIATION))
        found.append(Finding("main accuracy before the replacement", "–", _at(attacked, -1, "accuracy"), DEVIATION))
        found.append(Finding("main accuracy in its round", "–", _at(attacked, 0, "accuracy"), DEVIATION))
        found.append(Finding("main accuracy in that round, control", "–", _at(control, 0, "accuracy"), DEVIATION))
    if len(words):
        attacked, control = words[~words["control"]], words[words["control"]]
        about = "Shakespeare in place of Reddit, a transformer in place of an LSTM"
        found += [
            Finding("words: the sentence completed, in that round", "1.00", _at(attacked, 0, "asr"), about),
            Finding("words: ten benign rounds later", "–", _at(attacked, 10, "asr"), about),
            Finding("words: the sentence completed, control", "–", _at(control, 0, "asr"), about),
            Finding("words: main accuracy before", "–", _at(attacked, -1, "accuracy"), about),
            Finding("words: main accuracy in that round", "–", _at(attacked, 0, "accuracy"), about),
            Finding("words: main accuracy in that round, control", "–", _at(control, 0, "accuracy"), about),
        ]
    return found


def text(single: pd.DataFrame, stealth: pd.DataFrame, words: pd.DataFrame) -> str:
    """What the attacker's update shows, by how it was made; and what poisoned data do alone.

    Parameters
    ----------
    single, stealth, words : DataFrame
        As of `findings`.
    """
    if not len(stealth):
        return "How conspicuous the attacker is was not measured yet."
    attacked = stealth[~stealth["control"]]
    once = attacked[attacked["schedule"].str.startswith("single_round")]
    rows = [
        [f"`{_how(str(name))}`", _at(part, 0, "asr"), _at(part, 10, "asr"), _at(part, 0, "accuracy"),
         *(_at(part, 0, column, np.inf) for column in ("norm", "norm_rank", "cosine_rank", "bias_rank"))]
        for name, part in once.groupby("attack", sort=False)
    ]  # fmt: skip
    columns = ["sent", "ASR", "ASR 10 rounds later", "main accuracy", "norm, in others'", "place by norm"]
    columns += ["by cosine", "by final bias"]
    shares = ", ".join(
        f"{_at(part, 10, 'asr')} with {count} of 20 clients"
        for count, part in attacked[attacked["schedule"].eq("every_round")].groupby("num_malicious")
    )
    return (
        "One of 20 clients attacks in one round; places are among the 20, 1 the most conspicuous.\n\n"
        f"{markdown(columns, rows)}\n\nPoisoned data alone, in every round, reach after 11 rounds an ASR of {shares}."
    )


def _what(attack: str) -> str:
    """What is shown as another class: images with a feature, or with pixels."""
    if not attack.startswith("semantic"):
        return "a square of pixels"
    return next((name.replace("_", " ") for name in ("green_cars", "striped_wall") if name in attack), "racing stripes")


def _how(attack: str) -> str:
    """The part of an attack that says how it is sent."""
    return attack.rpartition("+")[2]


def _at(rows: pd.DataFrame, since: int, column: str, most: float = 1.0) -> str:
    """The mean of a figure so many rounds after the first attack, with its interval over seeds."""
    return over_seeds(rows[rows["since"].eq(since)], column, most=most)
