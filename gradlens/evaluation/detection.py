"""How many attacks a detector finds and how soon, beside what it says of benign clients in the same time."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from gradlens.errors import InputError
from gradlens.evaluation.intervals import mean_interval
from gradlens.evaluation.score_tables import demand, groups, numbered

RUN = "number of the run"  # a column beside those of the scores


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
    keys = [*by, *(["seed"] if "seed" in scores else []), *(["client"] if per == "client" else []), "detector"]
    return _cases(scores, by, per)[[*keys, "first", "rounds", "detected"]]


def rounds_to_detection(scores: pd.DataFrame, by: Sequence[str] = (), per: str = "run") -> pd.DataFrame:
    """Summarizes how many attacks each detector finds and how soon, beside what benign clients would show.

    Parameters
    ----------
    scores : pandas.DataFrame
        As for `detection_times`, with the benign clients of the same runs.
    by : sequence of str
        As for `detection_times`.
    per : str
        As for `detection_times`.

    Returns
    -------
    pandas.DataFrame
        Columns

        - those of `by`, detector.
        - detected: share of runs, or of a run's attackers, that were detected, averaged over seeds.
        - low, high: its 95 % interval over seeds (`mean_interval`), NaN for a single one.
        - median: rounds until half of the cases were detected, 0 if at once, inf if half never were.
        - benign_detected: the same share for benign clients in the attackers' place. Without it the share says little:
          who is watched for long enough is flagged at some time.
        - benign_median: rounds until half of the cases would have been detected with benign clients in the attackers'
          place; inf if half never were.
        - cases, seeds: how many there are.

    Raises
    ------
    InputError
        As for `detection_times`.

    Notes
    -----
    In place of an attacker stands each benign client of its run in turn, watched from the round of the attacker's first
    poisoned update to the attacker's last round; its rounds count from its own first update in that time. In place of
    the k attackers of a run stand k of its benign clients, drawn at random: if b of B of them are flagged within t
    rounds, the chance that one of the k is among these is 1 - C(B - b, k) / C(B, k). Where there are fewer than k
    benign clients, all of them stand. A detector that flags 5 % of all updates by a coin finds an attack by four
    clients within 16 rounds with a chance of 96 %, and four benign clients as well. The two columns are NaN for runs
    without benign clients.

    Examples
    --------
    >>> scores = pd.DataFrame({"round": [0, 0, 0, 1, 1, 1], "client": ["a", "b", "c"] * 2, "detector": "layer_norms"})
    >>> scores = scores.assign(flag=scores["round"].eq(1) & scores["client"].ne("c"), abstained="")
    >>> scores = scores.assign(malicious=scores["client"].eq("a"))
    >>> rounds_to_detection(scores)[["detected", "median", "benign_detected", "benign_median"]].values.tolist()
    [[1.0, 1.0, 0.5, 1.0]]
    """
    cases, keys, rows = _cases(scores, by, per), [*by, "detector"], []
    chances = _chances_of_benign(scores, cases, by)
    for key, group in groups(cases, keys):
        seeds = group["seed"] if "seed" in group else np.zeros(len(group))
        shares = group.groupby(seeds, sort=False)["detected"].mean().to_numpy(np.float64)
        until = np.sort(np.where(group["detected"], group["rounds"].astype(np.float64), np.inf))
        chance = chances[group.index]
        known = ~np.isnan(chance[:, -1])
        benign = pd.Series(chance[:, -1]).groupby(np.asarray(seeds), sort=False).mean().mean()
        over_rounds = chance[known].mean(axis=0) if known.any() else np.full(1, np.nan)
        half = np.flatnonzero(over_rounds >= 0.5 - 1e-12)
        row = {**key, "detected": shares.mean(), "median": until[(len(until) - 1) // 2]}
        row |= dict(zip(("low", "high"), mean_interval(shares, 0, 1), strict=True))
        row |= {"benign_detected": benign, "benign_median": half[0] if len(half) else np.inf if known.any() else np.nan}
        rows.append(row | {"cases": len(group), "seeds": len(shares)})
    columns = ["detected", "low", "high", "median", "benign_detected", "benign_median", "cases", "seeds"]
    return pd.DataFrame(rows, columns=[*keys, *columns])


def _cases(scores: pd.DataFrame, by: Sequence[str], per: str) -> pd.DataFrame:
    """Builds the table of `detection_times` with two more columns: last (round) and attackers (their number)."""
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
    guilty = pd.DataFrame({"case": ids[malicious], "client": scores["client"].to_numpy()[malicious]}).drop_duplicates()
    table["last"], table["attackers"] = last, np.bincount(guilty["case"], minlength=len(table))
    return table[first < never].reset_index(drop=True)


def _chances_of_benign(scores: pd.DataFrame, cases: pd.DataFrame, by: Sequence[str]) -> np.ndarray:
    """Returns the chance [case, round] that benign clients in the attackers' place are flagged within as many rounds.

    The first column is that of no round after the start; a case without benign clients is NaN.
    """
    of_run = [*by, *(["seed"] if "seed" in scores else []), "detector"]
    scores = scores.reset_index(drop=True)
    runs = numbered(pd.concat([scores[of_run], cases[of_run]]), of_run)[0]
    scores, of_case = scores.assign(**{RUN: runs[: len(scores)]}), runs[len(scores) :]
    guilty = scores["malicious"].astype(bool)
    guilty |= scores["compromised"].astype(bool) if "compromised" in scores else False
    benign = scores[~guilty.groupby([scores[RUN], scores["client"]]).transform("any")]
    by_run = dict(list(benign.groupby(RUN)))
    most = int((cases["last"] - cases["first"]).max()) if len(cases) else 0
    chances = np.full((len(cases), most + 1), np.nan)
    known: dict[tuple[int, ...], np.ndarray] = {}  # attackers of a run that start together share theirs
    for i, (run, times) in enumerate(zip(of_case, cases[["first", "last", "attackers"]].to_numpy(), strict=True)):
        case = (int(run), *times.tolist())
        if case not in known and run in by_run:
            known[case] = _chance_over_rounds(_rounds_to_flag(by_run[run], *case[1:3]), case[3], most)
        chances[i] = known.get(case, np.nan)
    return chances


def _rounds_to_flag(run: pd.DataFrame, first: int, last: int) -> np.ndarray:
    """Counts the rounds from each client's first update in a time to its first flag there, inf for never."""
    watched = run[run["round"].between(first, last)]
    flagged = watched[watched["flag"].astype(bool) & watched["abstained"].eq("")]
    start = watched.groupby("client")["round"].min()
    waiting = flagged.groupby("client")["round"].min().reindex(start.index) - start
    return waiting.fillna(np.inf).to_numpy(np.float64)


def _chance_over_rounds(waiting: np.ndarray, drawn: int, most: int) -> np.ndarray:
    """Returns the chance that any of the clients drawn at random is flagged within 0, 1, ..., `most` rounds."""
    if not len(waiting):
        return np.full(most + 1, np.nan)
    drawn = min(drawn, len(waiting))
    silent = (waiting > np.arange(most + 1)[:, None]).sum(axis=1)
    before = np.arange(drawn)  # clients drawn before the next one
    return 1 - np.clip((silent[:, None] - before) / (len(waiting) - before), 0, 1).prod(axis=1)
