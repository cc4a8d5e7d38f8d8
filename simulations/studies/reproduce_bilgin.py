"""Bilgin 2021, reproduced: which layer of an update says that it is poisoned, in which round, under which conditions.

The paper's figures are those that its notebook saved (arXiv:2111.14683, cell 39). Its statistic, m, is how far the
final bias of a local model is from the mean over all local models, at the farthest class; here every layer gets it.
"""

import numpy as np
import pandas as pd
import torch

from gradlens.evaluation import mean_interval
from gradlens.evaluation.ranking import auc, ranks
from gradlens.log import Round
from gradlens.run import Run
from gradlens.words import with_interval
from simulations import Scenario
from simulations.assemble import Federation, assemble
from simulations.studies.reproduce_outcomes import success_rates
from simulations.studies.results import Finding, markdown, over_seeds
from simulations.training import load_state, outputs

EARLY = 5  # rounds in which the notebook's anomaly shows
MALICIOUS = (0.00836, 0.00701, 0.00588, 0.00455, 0.00284)  # m of the malicious client in rounds 1 to 5
BENIGN = (0.00256, 0.00235, 0.00216, 0.00200, 0.00209)  # mean of m over the benign ones
SPREAD = "0.0018 to 0.0026"  # of the mean over the benign clients
LATE_AUC, ACCURACY, BACKDOOR = 0.439, (0.3843, 0.6206), 0.1364
COLUMNS = ["round", "layer", "is_final_bias", "malicious", "benign", "benign_max", "auc", "rank", "accuracy", "asr",
           "drift", "expected"]  # fmt: skip
CLEAR, CHANCE = 0.9, 0.7  # AUC from which on m tells attackers apart; below which it hardly does
RATIO = "m of the malicious client / mean m of the benign"
DEVIATION = "JPEG copies of the images; the server's shard is drawn at random"
CENTER = "center"
AXES = ("learning_rate", "poison_rate", "num_malicious", "partition", "pretraining", "schedule")


def measured(run: Run, scenario: Scenario) -> pd.DataFrame:
    """Measures every round and layer of a run.

    Parameters
    ----------
    run : Run
        The recording.
    scenario : Scenario
        The attacked scenario that it is, or is the control of.

    Returns
    -------
    DataFrame
        A row per round and layer: round, layer, is_final_bias, malicious (m of the attackers, mean; in a control of
        those who are not attacking there; NaN in a round without any), benign and benign_max (mean and maximum of m
        over the others), auc, rank (of the attacker that is farthest out, 1 the first), accuracy and asr (after the
        round), drift and expected (as of `drifts`; in the rows of the final bias).
    """
    federation = assemble(scenario)
    accuracies, rates = run.metrics["main_accuracy"].tolist(), success_rates(run, federation)
    rows = []
    for round_ in run.log:
        attacking = federation.cohorts[round_.index].attacking
        after = {"accuracy": accuracies[round_.index], "asr": rates[round_.index]}
        for layer in run.model.parameters:
            is_bias = layer == run.model.final_bias
            row = {"round": round_.index, "layer": layer, "is_final_bias": is_bias} | _figures(round_, layer, attacking)
            rows.append(row | after | (drifts(federation, round_, attacking) if is_bias and attacking.any() else {}))
    return pd.DataFrame(rows, columns=COLUMNS)


def deviation(updates: np.ndarray) -> np.ndarray:
    """Bilgin's m: how far each client is from the mean over all of them, at the farthest number.

    Parameters
    ----------
    updates : array
        [client, *shape] of a layer.

    Returns
    -------
    numpy.ndarray
        float64 [client].

    Examples
    --------
    >>> deviation(np.array([[0.0, 0.0], [0.0, 3.0], [0.0, 0.0]])).tolist()
    [1.0, 2.0, 1.0]
    """
    flat = updates.reshape(len(updates), -1).astype(np.float64)
    return np.abs(flat - flat.mean(axis=0)).max(axis=1)


def _figures(round_: Round, layer: str, attacking: np.ndarray) -> dict[str, float]:
    m = deviation(round_.updates[layer])
    benign = m[~attacking]
    figures = {"benign": float(benign.mean()), "benign_max": float(benign.max())}
    if not attacking.any():
        return figures | {"malicious": np.nan, "auc": np.nan, "rank": np.nan}
    first = float(ranks(-m)[attacking].min())
    return figures | {"malicious": float(m[attacking].mean()), "auc": float(auc(m, attacking)), "rank": first}


def drifts(federation: Federation, round_: Round, attacking: np.ndarray) -> dict[str, float]:
    """How far the attackers' bias of the target class moves beyond the others', and how far it is expected to.

    Parameters
    ----------
    federation : Federation
        Of the run.
    round_ : Round
        One round of it.
    attacking : array
        bool [client].

    Returns
    -------
    dict
        drift, in logits; and expected: learning rate x steps x share of the poisoned samples x (1 - mean probability
        of the target on them before the round), which is the drift if nothing of them were learned in the round.

    Notes
    -----
    Under plain SGD a bias moves by learning rate x sum over steps of mean(y - p), which is exact. A client without
    poisoned samples moves by that of its own; where data are alike, the difference is the poisoned samples' part.
    """
    scenario, bias = federation.scenario, round_.updates[str(federation.spec.final_bias)]
    client = next(iter(federation.poisoned))
    x, y = (part[federation.chosen[client]] for part in federation.poisoned[client])
    load_state(federation.model, round_.global_model)
    logits = torch.cat(list(outputs(federation.model, x)))
    unlearned = 1 - torch.softmax(logits, dim=1)[torch.arange(len(y)), y].mean().item()
    count = len(federation.poisoned[client][1])
    steps = scenario.local_epochs * -(-count // scenario.batch_size)
    target = int(y[0])
    drift = float(bias[attacking, target].mean() - bias[~attacking, target].mean())
    return {"drift": drift, "expected": scenario.learning_rate * steps * len(y) / count * unlearned}


def findings(exact: pd.DataFrame, conditions: pd.DataFrame) -> list[Finding]:
    """What came of the experiment as released, beside the notebook's figures.

    Parameters
    ----------
    exact, conditions : DataFrame
        Rows of `measured`, with the columns of `reproduce.computed`.
    """
    if not len(exact):
        return []
    bias = exact[exact["is_final_bias"]]
    attacked, free = bias[~bias["control"]], bias[bias["control"]]
    early, late = attacked[attacked["round"] < EARLY], attacked[attacked["round"] >= EARLY]
    ratio = early.assign(value=early["malicious"] / early["benign"])
    first, last = _first(attacked), attacked["round"].max()
    measured = [
        *((f"{RATIO}, round {index + 1}", f"{theirs / others:.2f}", _over_seeds(ratio[ratio["round"].eq(index)]))
          for index, (theirs, others) in enumerate(zip(MALICIOUS, BENIGN, strict=True))),
        ("the malicious client has the largest m, rounds 1 to 5", "5 of 5", _over_seeds(first, 0, 1)),
        ("the same client where nobody attacks", "–", _over_seeds(_first(free), 0, 1)),
        ("AUC of m, rounds 6 to 25", f"{LATE_AUC:.2f}", _over_seeds(late.assign(value=late["auc"]), 0, 1)),
        ("mean m of the benign clients", SPREAD, _over_seeds(attacked.assign(value=attacked["benign"]), digits=4)),
        ("main accuracy after round 1", f"{ACCURACY[0]:.2f}", _at(attacked, "accuracy", 0)),
        ("main accuracy after round 25", f"{ACCURACY[1]:.2f}", _at(attacked, "accuracy", last)),
        ("ASR on the images trained on, after round 25", f"{BACKDOOR:.2f}", _at(attacked, "asr", last)),
        ("the same images where nobody attacks", "–", _at(free, "asr", last)),
    ]  # fmt: skip
    return [Finding(claim, theirs, ours, DEVIATION) for claim, theirs, ours in measured]


def _first(rows: pd.DataFrame) -> pd.DataFrame:
    """Whether the largest m is the attacker's, in the first rounds."""
    rows = rows[rows["round"] < EARLY]
    return rows.assign(value=rows["rank"].eq(1.0))


def _at(rows: pd.DataFrame, column: str, index: int) -> str:
    """A figure after a round."""
    rows = rows[rows["round"].eq(index)]
    return _over_seeds(rows.assign(value=rows[column]), 0, 1)


def _over_seeds(rows: pd.DataFrame, least: float = 0, most: float = np.inf, digits: int = 2) -> str:
    """The mean of the column value with its interval over seeds."""
    if digits == 2:
        return over_seeds(rows, "value", least, most)
    seeds = rows.groupby("seed")["value"].mean()
    low, high = mean_interval(seeds, least, most)
    return f"{seeds.mean():.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def text(exact: pd.DataFrame, conditions: pd.DataFrame) -> str:
    """Which gradients, to what extent, under which conditions: three sentences and the table behind them.

    Parameters
    ----------
    exact, conditions : DataFrame
        As of `findings`.
    """
    if not len(conditions):
        return "The conditions were not run yet."
    table = by_condition(conditions)
    return "\n\n".join([_answer(table), _without_attack(conditions), _table(table)])


def by_condition(table: pd.DataFrame) -> pd.DataFrame:
    """AUC of m by condition, layer and phase, with its interval over seeds.

    Parameters
    ----------
    table : DataFrame
        Rows of `measured` with the settings of their runs.

    Returns
    -------
    DataFrame
        condition (what differs from the center, "center" for nothing), layer, is_final_bias, phase ("early", the first
        five attacked rounds, or "later"), auc, low, high; the center first.
    """
    attacked = with_condition(table[~table["control"] & table["auc"].notna()])
    first = attacked.groupby("run")["round"].transform("min")
    attacked["phase"] = np.where(attacked["round"] < first + EARLY, "early", "later")
    keys = ["condition", "layer", "is_final_bias", "phase"]
    seeds = attacked.groupby([*keys, "seed"], sort=False)["auc"].mean().reset_index()
    figures = [
        dict(zip(keys, key, strict=True)) | {"auc": part["auc"].mean()} | _ends(part["auc"])
        for key, part in seeds.groupby(keys, sort=False)
        if isinstance(key, tuple)
    ]
    return pd.DataFrame(figures).sort_values("condition", key=lambda names: names.ne(CENTER), kind="stable")


def with_condition(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows with a column condition: what differs from the center, which is what most runs have."""
    runs = rows.drop_duplicates("run").set_index("run")[list(AXES)]
    center = runs.mode().iloc[0]
    names = {
        name: ", ".join(f"{axis.replace('_', ' ')} {row[axis]}" for axis in AXES if row[axis] != center[axis])
        for name, row in runs.iterrows()
    }
    return rows.assign(condition=rows["run"].map(names).replace("", CENTER))


def _without_attack(table: pd.DataFrame) -> str:
    """How far the farthest honest client is out where nobody attacks, beside the attacker."""
    bias = with_condition(table[table["is_final_bias"] & (table["round"] < EARLY)])
    attacked, free = bias[~bias["control"] & bias["condition"].eq(CENTER)], bias[bias["control"]]
    farthest = [
        f"{_over_seeds(part.assign(value=part['benign_max'] / part['benign']))} ({condition})"
        for condition, part in free.groupby("condition", sort=False)
    ]
    attackers = _over_seeds(attacked.assign(value=attacked["malicious"] / attacked["benign"]))
    return (
        f"In the first {EARLY} rounds the attacker's m in the final bias is {attackers} times the mean of the others "
        f"({CENTER}). Where nobody attacks, the largest m of an honest client is {'; '.join(farthest)} times the mean."
    )


def _ends(values: pd.Series) -> dict[str, float]:
    low, high = mean_interval(values, 0, 1)
    return {"low": low, "high": high}


def _answer(table: pd.DataFrame) -> str:
    """Which gradients, to what extent, under which conditions."""
    center = table[table["condition"].eq(CENTER)].set_index(["layer", "phase"])["auc"]
    early, later = (center.xs(phase, level="phase").sort_values(ascending=False) for phase in ("early", "later"))
    bias = table[table["is_final_bias"]]
    name = str(bias["layer"].iloc[0])
    strong, weak = (
        bias[bias["phase"].eq("early") & fits(bias["auc"])]["condition"].tolist() for fits in (_clear, _chance)
    )
    return (
        f"**Which gradients:** at the center, in the first {EARLY} attacked rounds, m is highest in `{early.index[0]}` "
        f"(AUC {early.iloc[0]:.2f}); in the final bias, `{name}`, its AUC is {early[name]:.2f}. **To what extent:** "
        f"later it is {later[name]:.2f} there and {later.iloc[0]:.2f} in `{later.index[0]}`, the highest then. "
        f"**Under which conditions:** early, the final bias tells the attackers apart (AUC {CLEAR} and more) for "
        f"{', '.join(strong) or 'none'}, and hardly (below {CHANCE}) for {', '.join(weak) or 'none'}."
    )


def _clear(values: pd.Series) -> pd.Series:
    return values >= CLEAR


def _chance(values: pd.Series) -> pd.Series:
    return values < CHANCE


def _table(table: pd.DataFrame) -> str:
    rows = []
    for condition, part in table.groupby("condition", sort=False):
        bias, others = part[part["is_final_bias"]], part[~part["is_final_bias"]]
        cells = [_cell(bias[bias["phase"].eq(phase)]) for phase in ("early", "later")]
        for phase in ("early", "later"):
            best = others[others["phase"].eq(phase)].nlargest(1, "auc")
            cells.append(f"{_cell(best)} `{best['layer'].iloc[0]}`" if len(best) else "–")
        rows.append([str(condition), *cells])
    return markdown(["condition", "final bias, early", "later", "best other layer, early", "later"], rows)


def _cell(rows: pd.DataFrame) -> str:
    return "–" if not len(rows) else with_interval(*rows[["auc", "low", "high"]].iloc[0].tolist())
