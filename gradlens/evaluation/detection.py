"""How many attacks a detector finds and how soon, beside what it says of benign clients in the same time."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from gradlens.errors import InputError
from gradlens.evaluation.intervals import mean_interval
from gradlens.evaluation.score_tables import demand, groups, numbered


def detection_times(scores: pd.DataFrame, by: Sequence[str] = (), per: str = "run") -> pd.DataFrame:
    """Counts the rounds from each attack's first poisoned update to its first flag.

    Parameters
    ----------
    scores : pandas.DataFrame
        Table of `with_truth`. With `idle=True` there, a flag in an idle round counts as well, once the attacker has
        sent a poisoned update. A flag in a round in which the detector abstained does not count.
    by : sequence of str
        Further columns that tell runs apart, such as varied settings.
    per : str
        "run" for one row per run, detected as soon as any of its attackers is flagged, or "client" for one row per
        attacker.

    Returns
    -------
    pandas.DataFrame
        Columns *by, seed (if given), client (if per client), detector, first (round of the first poisoned update),
        rounds (until the first flag, 0 if it was flagged at once), detected. If detected is False the time is
        censored: `rounds` counts the rounds from `first` to the last one in the table, and detection takes at least
        that long.

    Raises
    ------
    InputError
        If a column is missing, or `per` is unknown.

    Examples
    --------
    >>> scores = pd.DataFrame({"round": [0, 1, 2], "client": "a", "detector": "layer_norms"})
    >>> scores = scores.assign(flag=[False, False, True], abstained="", malicious=True)
    >>> detection_times(scores)[["first", "rounds", "detected"]].values.tolist()
    [[0, 2, True]]
    """
    if per not in ("run", "client"):
        raise InputError(f"per must be 'run' or 'client', found {per!r}")
    keys = [*by, *(["seed"] if "seed" in scores else []), *(["client"] if per == "client" else []), "detector"]
    demand(scores, [*keys, "round", "client", "flag", "abstained", "malicious"])
    malicious = scores["malicious"].to_numpy(bool)
    of_attackers = malicious | scores["compromised"].to_numpy(bool) if "compromised" in scores else malicious
    scores, malicious = scores[of_attackers], malicious[of_attackers]
    ids, example = numbered(scores, keys)
    rounds, never = scores["round"].to_numpy(np.int64), np.iinfo(np.int64).max
    first, first_flag = np.full(len(example), never), np.full(len(example), never)
    last = np.zeros(len(example), np.int64)
    np.minimum.at(first, ids[malicious], rounds[malicious])
    np.maximum.at(last, ids, rounds)
    caught = scores["flag"].to_numpy(bool) & (scores["abstained"] == "").to_numpy() & (rounds >= first[ids])
    np.minimum.at(first_flag, ids[caught], rounds[caught])
    table = scores.iloc[example][keys].reset_index(drop=True)
    table["first"], table["detected"] = first, first_flag < never
    table["rounds"] = np.where(first_flag < never, first_flag - first, last - first + 1)
    return table.loc[first < never, [*keys, "first", "rounds", "detected"]].reset_index(drop=True)


def rounds_to_detection(scores: pd.DataFrame, by: Sequence[str] = (), per: str = "run") -> pd.DataFrame:
    """Summarizes how many attacks each detector finds, and how soon; parameters as of `detection_times`.

    Returns
    -------
    pandas.DataFrame
        Columns *by, detector, detected (share of runs or of a run's attackers, averaged over seeds), low, high (95 %
        interval over seeds, NaN for a single one), median (rounds until half of the cases were detected, 0
        if at once, inf if half never were), cases, seeds.
    """
    times = detection_times(scores, by, per)
    keys, rows = [*by, "detector"], []
    for key, group in groups(times, keys):
        values = group.groupby("seed", sort=False)["detected"].mean() if "seed" in group else group["detected"]
        shares = np.asarray(values, np.float64) if "seed" in group else np.array([values.mean()])
        until = np.sort(np.where(group["detected"], group["rounds"].astype(np.float64), np.inf))
        row = {**key, "detected": shares.mean(), "median": until[(len(until) - 1) // 2], "cases": len(group)}
        rows.append(row | dict(zip(("low", "high"), mean_interval(shares, 0, 1), strict=True)) | {"seeds": len(shares)})
    return pd.DataFrame(rows, columns=[*keys, "detected", "low", "high", "median", "cases", "seeds"])
