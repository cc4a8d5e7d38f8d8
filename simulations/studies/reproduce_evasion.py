"""What is left of the signal where attackers know the detectors: what each sees, and each layer, as they hide more.

No paper has it. Every detector pays alike, 5 % of the benign updates of the same run; beside every figure stands that
of the control, in which the same clients are honest.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd

from gradlens import DETECTORS, detect, evaluate, investigate, localize, with_truth
from gradlens.run import Run
from simulations import Scenario
from simulations.assemble import assemble
from simulations.cohorts import client_names, malicious_clients
from simulations.studies.reproduce_outcomes import outcomes
from simulations.studies.results import Finding, markdown, over_seeds

OUTCOME, CASE, DETECTOR, PLACE = "outcome", "case", "detector", "place"
COLUMNS = ["what", "name", "layer", "asr", "accuracy", "auc", "tpr", "accused", "innocent"]
SHOWN = 8  # detectors in the table: those that find most of the attackers who hide most
FINAL = ("final_bias", "final_rows")
NOTICEABLE = 0.1  # of AUC beyond the control's
WORDS = {
    "scaling": "boosted fourfold",
    "train_and_scale": "scaled to a typical norm",
    "constrain_and_scale": "kept near the global model, boosted twofold",
    "hiding": "final bias drawn from the others'",
    "hiding(layers=final)": "final layer drawn from the others'",
    "norm_cap": "norms capped",
}


def measured(run: Run, scenario: Scenario) -> pd.DataFrame:
    """Measures what detectors, layers and the case say of a run.

    Parameters
    ----------
    run : Run
        The recording.
    scenario : Scenario
        The attacked scenario that it is, or is the control of.

    Returns
    -------
    DataFrame
        What a row holds stands in the column what. "outcome": asr and accuracy at the end. "case": accused, the share
        of the attackers that are, and innocent, the number of others. "detector" (name): auc, and tpr, the share of
        poisoned updates above the threshold that 5 % of the benign ones exceed. "place" (a statistic as name, layer):
        auc. In a control the attackers are those of the attacked scenario.
    """
    cohorts = assemble(scenario).cohorts
    names = client_names(scenario)[malicious_clients(scenario)].tolist()
    rounds = [index for index, cohort in enumerate(cohorts) if cohort.attacking.any()]
    rows = [*_outcome(run, scenario), *_case(run, names), *_detectors(run, names, rounds), *_places(run, names, rounds)]
    return pd.DataFrame(rows, columns=COLUMNS)


def _outcome(run: Run, scenario: Scenario) -> Iterator[dict[str, Any]]:
    last = outcomes(run, scenario).iloc[-1]
    yield {"what": OUTCOME, "asr": last["asr"], "accuracy": last["accuracy"]}


def _case(run: Run, names: list[str]) -> Iterator[dict[str, Any]]:
    suspects = set(investigate(run).suspects["client"])
    yield {"what": CASE, "accused": len(suspects & set(names)) / len(names), "innocent": len(suspects - set(names))}


def _detectors(run: Run, names: list[str], rounds: list[int]) -> Iterator[dict[str, Any]]:
    scores = detect(run, {name: build() for name, build in DETECTORS.items()})
    poisoned = run.truth["client"].isin(names) & run.truth["round"].isin(rounds)
    scored = with_truth(scores, run.truth.assign(compromised=poisoned, poisoned=poisoned))
    figures = evaluate(scored[scored["round"].isin(rounds)]).pivot_table(
        index="detector", columns="metric", values="value"
    )
    for name in figures.index:
        auc, tpr = (figures.loc[name].get(metric, np.nan) for metric in ("auc", "tpr_5"))
        yield {"what": DETECTOR, "name": name, "auc": auc, "tpr": tpr}


def _places(run: Run, names: list[str], rounds: list[int]) -> Iterator[dict[str, Any]]:
    where = localize(run, rounds=rounds, suspects=names, permutations=1)
    for _, row in where[where["unit"].fillna("").eq("")].iterrows():
        yield {"what": PLACE, "name": row["statistic"], "layer": row["layer"], "auc": row["auc"]}


def findings(table: pd.DataFrame) -> list[Finding]:
    """None: no paper has these figures."""
    return []


def text(table: pd.DataFrame) -> str:
    """Does a final-layer signal survive, what does each detector see, and what does the case say?

    Parameters
    ----------
    table : DataFrame
        Rows of `measured`, with the columns of `reproduce.computed`.
    """
    if not len(table):
        return "Not run yet."
    table = table.assign(way=table["attack"].map(way))
    return "\n\n".join(part for name, rows in table.groupby("partition", sort=False) for part in _of(str(name), rows))


def way(attack: str) -> str:
    """How an update is sent, in words.

    Examples
    --------
    >>> way("trigger(size=3)+hiding(layers=final)+norm_cap")
    "final layer drawn from the others', norms capped"
    """
    parts = [part.partition("(")[0] if "layers" not in part else part for part in attack.split("+")[1:]]
    return ", ".join(WORDS[part] for part in parts if part in WORDS) or "as trained"


def _of(partition: str, table: pd.DataFrame) -> list[str]:
    attacked, control = table[~table["control"]], table[table["control"]]
    ways = attacked["way"].drop_duplicates().tolist()
    hidden = attacked[attacked["way"].eq(ways[-1]) & attacked["what"].eq(DETECTOR)]
    best = hidden.groupby("name")["tpr"].mean().nlargest(SHOWN).index.tolist()
    columns = ["sent", "ASR", "main accuracy", "final layer", "best of any layer", "accused", "innocents accused"]
    rows = [_row(each, attacked[attacked["way"].eq(each)]) for each in ways] + [_row("no attack", control)]
    sees = [[each, *(_tpr(attacked[attacked["way"].eq(each)], name) for name in best)] for each in ways]
    sees.append(["no attack", *(_tpr(control, name) for name in best)])
    return [
        f"## {partition}",
        _sentence(attacked, control, ways[-1]),
        markdown(columns, rows),
        "Share of poisoned updates above the threshold that 5 % of the benign ones of the same run exceed, of the "
        f"{SHOWN} detectors that find most of those who hide most:",
        markdown(["sent", *(f"`{name}`" for name in best)], sees),
    ]


def _sentence(attacked: pd.DataFrame, control: pd.DataFrame, hidden: str) -> str:
    """Whether the final layer still says anything of those who hide most."""
    rows = attacked[attacked["way"].eq(hidden)]
    final, peace, whole = _final(rows)[1], _final(control)[1], _best(rows)
    survives = "no outlier is left" if final - peace < NOTICEABLE else "a signal survives"
    hidden_more = " (below 0.5: they are more ordinary than the others)" if final < 0.5 - NOTICEABLE else ""
    return (
        f"**Where attackers are alike in norm and draw their final layer from the others', {survives} in it:** the "
        f"best AUC of `{'` and `'.join(FINAL)}` is {final:.2f}{hidden_more}, and {peace:.2f} for the same clients "
        f"where nobody attacks. The best of any layer is {whole[1]:.2f}, by {whole[0]}; where nobody attacks it is "
        f"{_best(control)[1]:.2f}."
    )


def _row(name: str, rows: pd.DataFrame) -> list[str]:
    outcome, case = (rows[rows["what"].eq(what)] for what in (OUTCOME, CASE))
    final, whole = _final(rows), _best(rows)
    return [name, over_seeds(outcome, "asr"), over_seeds(outcome, "accuracy"), f"{final[1]:.2f}",
            f"{whole[1]:.2f} {whole[0]}", over_seeds(case, "accused"), f"{case['innocent'].mean():.2f}"]  # fmt: skip


def _final(rows: pd.DataFrame) -> tuple[str, float]:
    """The statistic of the final layer with the highest AUC."""
    return _best(rows[rows["name"].isin(FINAL)])


def _best(rows: pd.DataFrame) -> tuple[str, float]:
    """The place with the highest AUC, mean over seeds."""
    means = rows[rows["what"].eq(PLACE)].groupby(["name", "layer"])["auc"].mean()
    name, layer = means.idxmax()  # type: ignore[misc]
    return f"`{name}` in `{layer}`", float(means.max())


def _tpr(rows: pd.DataFrame, name: str) -> str:
    rows = rows[rows["what"].eq(DETECTOR) & rows["name"].eq(name)]
    return f"{rows['tpr'].mean():.2f}"
