"""Who is malicious: scores joined with the ground truth, per update and per client."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from gradlens.errors import InputError
from gradlens.evaluation.score_tables import demand, judged, numbered


def with_truth(scores: pd.DataFrame, truth: pd.DataFrame, *, idle: bool = False) -> pd.DataFrame:
    """Adds the column `malicious` to a table of scores: whether the update itself was poisoned.

    Parameters
    ----------
    scores : pandas.DataFrame
        Table of `detect`, with columns round, client.
    truth : pandas.DataFrame
        Ground truth with columns round, client, compromised, poisoned.
    idle : bool
        Whether to keep updates of compromised clients that were not poisoned in their round, which are neither
        malicious nor benign. A column `compromised` then marks their clients, as `per_client` needs for scores that
        accumulate over rounds.

    Returns
    -------
    pandas.DataFrame
        `scores` with the new columns; without `idle`, such updates are left out.

    Raises
    ------
    InputError
        If the ground truth has an update twice, or lacks one that has a score.

    Examples
    --------
    >>> scores = pd.DataFrame({"round": 0, "client": ["a", "b"], "score": [0.5, 4.0]})
    >>> truth = scores[["round", "client"]].assign(compromised=[False, True], poisoned=[False, True])
    >>> with_truth(scores, truth)["malicious"].tolist()
    [False, True]
    """
    keys = ["round", "client"]
    if truth.duplicated(keys).any():
        repeated = truth.loc[truth.duplicated(keys), keys].iloc[0]
        raise InputError(f"the truth names client {repeated['client']!r} twice in round {repeated['round']}")
    table = scores.merge(truth[[*keys, "compromised", "poisoned"]], on=keys, how="left", indicator=True)
    if (missing := table["_merge"] == "left_only").any():
        first = table[missing].iloc[0]
        raise InputError(
            f"the truth says nothing of {int(missing.sum())} scored updates, "
            f"the first of client {first['client']!r} in round {first['round']}; is it another run's?"
        )
    table["malicious"] = table["poisoned"].astype(bool)
    table["compromised"] = table["compromised"].astype(bool) | table["malicious"]
    table = table.drop(columns=["poisoned", "_merge"])
    return table if idle else judged(table).drop(columns="compromised")


def per_client(
    scores: pd.DataFrame, by: Sequence[str] = (), how: str | Mapping[str, str] = "mean", flagged: str = "any"
) -> pd.DataFrame:
    """Summarizes scores of updates as one row per client and detector; `evaluate` takes either.

    Parameters
    ----------
    scores : pandas.DataFrame
        Table of `with_truth`. With `idle=True` there, the idle rounds of a compromised client count in its score and
        flag as well.
    by : sequence of str
        Further columns that tell runs apart, such as varied settings.
    how : str or Mapping
        "mean" averages a client's scores over its scored rounds, "last" takes the last of them (for scores that
        accumulate already). A mapping gives one per detector, "mean" for all others.
    flagged : str
        A client is flagged if it was in "any" of its scored rounds, or in at least "half" of them.

    Returns
    -------
    pandas.DataFrame
        Columns *by, seed (if given), client, detector, score, flag, abstained, malicious, rounds (number of scored
        rounds).

    Raises
    ------
    InputError
        If a column is missing, a client has two scores of a detector in a round, or `how` or `flagged` is unknown.

    Notes
    -----
    A client is malicious if any of its updates in the table was poisoned, even where the detector abstained.
    Compromised clients without a poisoned update are left out. A client without a scored round is not flagged, has
    score 0, and `abstained` holds the last reason.

    Examples
    --------
    >>> scores = pd.DataFrame({"round": [0, 1], "client": "a", "detector": "layer_norms", "score": [1.0, 3.0]})
    >>> scores = scores.assign(flag=[False, True], abstained="", malicious=True)
    >>> per_client(scores)[["client", "score", "flag", "rounds"]].values.tolist()
    [['a', 2.0, True, 2]]
    """
    seed = ["seed"] if "seed" in scores else []
    keys = [*by, *seed, "client", "detector"]
    demand(scores, [*keys, "round", "score", "flag", "abstained", "malicious"])
    hows: Mapping[str, str] = {"": how} if isinstance(how, str) else how
    if unknown := [summary for summary in hows.values() if summary not in ("mean", "last")]:
        raise InputError(f"how must be 'mean' or 'last', found {unknown[0]!r}")
    if flagged not in ("any", "half"):
        raise InputError(f"flagged must be 'any' or 'half', found {flagged!r}")
    ids, first = numbered(scores, keys)
    count = len(first)
    table = scores.iloc[first][keys].reset_index(drop=True)
    answered = (scores["abstained"] == "").to_numpy()
    rounds = np.bincount(ids[answered], minlength=count)
    last = _last_rows(ids, np.where(answered, 1, 0), scores["round"].to_numpy())
    score = np.bincount(ids[answered], scores["score"].to_numpy(np.float64)[answered], count) / np.maximum(rounds, 1)
    by_last = table["detector"].isin([name for name, summary in hows.items() if summary == "last"]) | (how == "last")
    score = np.where(by_last & (rounds > 0), scores["score"].to_numpy(np.float64)[last], score)
    flags = np.bincount(ids[answered], scores["flag"].to_numpy(np.float64)[answered], count)
    malicious = np.bincount(ids, scores["malicious"].to_numpy(np.float64), count) > 0
    table["score"], table["flag"] = score, flags >= (1 if flagged == "any" else np.maximum(rounds / 2, 0.5))
    table["abstained"] = scores["abstained"].to_numpy()[last]
    table["malicious"], table["rounds"] = malicious, rounds
    if "compromised" in scores:
        idle = (np.bincount(ids, scores["compromised"].to_numpy(np.float64), count) > 0) & ~malicious
        table = table[~idle].reset_index(drop=True)
    return table


def _last_rows(ids: np.ndarray, answered: np.ndarray, rounds: np.ndarray) -> np.ndarray:
    """Returns the row of each group's last scored round, or last round if none is; InputError on a repeated round."""
    order = np.lexsort((rounds, answered, ids))
    repeated = (np.diff(ids[order]) == 0) & (np.diff(rounds[order]) == 0)
    if repeated.any():
        raise InputError(
            f"a client has two scores of one detector in round {rounds[order][1:][repeated][0]}; tables of several "
            "runs need a column that tells them apart: seed, or one named in `by`"
        )
    return order[np.append(np.diff(ids[order]) != 0, True)] if len(order) else order
