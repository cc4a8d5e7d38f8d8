"""Evaluation: how well scores tell poisoned updates from benign ones, with intervals over seeds.

A seed is one run of a setting and the only thing that is resampled: the clients of a run share its model and
its data, so intervals over clients would be too narrow.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from gradlens.errors import InputError

__all__ = [
    "auc",
    "average_precision",
    "bootstrap",
    "detection_times",
    "evaluate",
    "per_client",
    "roc_points",
    "rounds_to_detection",
    "with_truth",
]

METRICS = ("auc", "pr_auc", "tpr_1", "tpr_5", "fpr", "abstained")
RATES = {"1": 0.01, "5": 0.05}  # suffix of tpr_ and fpr_ -> the false-positive rate that is meant
RESAMPLES = 2_000


def with_truth(scores: pd.DataFrame, truth: pd.DataFrame, *, idle: bool = False) -> pd.DataFrame:
    """The table of `detect` with a column `malicious`: this very update was poisoned.

    truth: round, client, compromised, poisoned. Updates of compromised clients that were not poisoned in that
    round are neither malicious nor benign and leave the table; idle: they stay, and a column `compromised` tells
    whose they are: what a score accumulates over rounds counts in them as well (`per_client`).
    Raises: InputError if the truth names an update twice or says nothing of a scored one.
    """
    keys = ["round", "client"]
    if truth.duplicated(keys).any():
        twice = truth.loc[truth.duplicated(keys), keys].iloc[0]
        raise InputError(f"the truth names client {twice['client']!r} twice in round {twice['round']}")
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
    return table if idle else _judged(table).drop(columns="compromised")


def per_client(
    scores: pd.DataFrame, by: Sequence[str] = (), how: str | Mapping[str, str] = "mean", flagged: str = "any"
) -> pd.DataFrame:
    """One row per client of a run, for each detector, instead of one per update; `evaluate` takes either.

    scores: the table of `with_truth`, with idle=True where attackers come and go: a compromised client's idle rounds
    then count in its score and flag; the rounds looked at are those in the table. A client is malicious if it
    poisoned in one of them, whether or not the detector could say there; a compromised one that did not leaves the
    table. how: the score is the mean over the client's scored rounds ("mean") or that of the last of them ("last",
    for scores that are accumulated already), one for all or detector -> how ("mean" for those not named).
    flagged: in "any" of its scored rounds or in at least "half" of them. A client without a scored round is
    abstained, for the last reason given, scores 0 and is not flagged.
    Returns: *by, seed (if there is one), client, detector, score, flag, abstained, malicious, rounds (scored).
    Raises: InputError if a column is missing, or a setting is none of those named.
    """
    seed = ["seed"] if "seed" in scores else []
    keys = [*by, *seed, "client", "detector"]
    _demand(scores, [*keys, "round", "score", "flag", "abstained", "malicious"])
    hows: Mapping[str, str] = {"": how} if isinstance(how, str) else how
    if wrong := [each for each in hows.values() if each not in ("mean", "last")]:
        raise InputError(f"how must be 'mean' or 'last', found {wrong[0]!r}")
    if flagged not in ("any", "half"):
        raise InputError(f"flagged must be 'any' or 'half', found {flagged!r}")
    ids, first = _numbered(scores, keys)
    count = len(first)
    table = scores.iloc[first][keys].reset_index(drop=True)
    answered = (scores["abstained"] == "").to_numpy()
    rounds = np.bincount(ids[answered], minlength=count)
    last = _last_rows(ids, np.where(answered, 1, 0), scores["round"].to_numpy())
    score = np.bincount(ids[answered], scores["score"].to_numpy(np.float64)[answered], count) / np.maximum(rounds, 1)
    by_last = table["detector"].isin([name for name, each in hows.items() if each == "last"]) | (how == "last")
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


def evaluate(scores: pd.DataFrame, by: Sequence[str] = (), null: pd.DataFrame | None = None) -> pd.DataFrame:
    """AUC, TPR at 1 % and 5 % FPR, FPR and abstentions of each detector, under each combination of `by`.

    scores: detector, score, flag, abstained, malicious (see `with_truth`, `per_client`), `seed` (one run if there
    is no such column) and the columns of `by`. Each figure is taken over all updates (or clients) of a seed, then
    averaged over seeds. null: attack-free scores of the same kind, on which thresholds are set: those of the same
    detector, of the same values in the columns of `by` that the null has, and of other seeds.
    Returns: *by, detector, metric, value, low, high, seeds, bound.
      auc: chance that a poisoned update scores higher than a benign one, a tie counting half;
      pr_auc: average precision, sum over thresholds of precision x gain in recall; chance is the share poisoned;
      tpr_1, tpr_5: share of poisoned updates above a threshold. Without a null: the best one that at most 1 or 5 %
        of the seed's own benign ones pass; bound ">=" where a seed has too few of them to tell that rate from 0.
        With a null of m scores: the (m + 1)(1 - fpr)-th smallest, rounded up, as in `calibrate`; where m is too
        small for the rate, the null's largest and bound "<=", since the threshold asked for is no lower;
      fpr_1, fpr_5: share of benign updates above that same threshold, with a null only;
      fpr: share of benign updates flagged, also where nothing is poisoned;
      abstained: share of updates without a verdict; they are outside all others.
      Where no benign update at all is flagged (or above the threshold) a false-positive rate is the exact one-sided
      95 % upper limit 1 - 0.05^(1/n) of n updates, bound "<="; updates of a run are not independent, clients less so.
      low, high: 95 % percentile bootstrap over seeds, NaN for one; seeds: those that have the figure.
    Raises: InputError if a column is missing, or the null holds a poisoned update.
    """
    keys = [*by, "detector"]
    _demand(scores, [*keys, "score", "flag", "abstained", "malicious"])
    null_of = None if null is None else _nulls(null, keys)
    metrics = METRICS if null_of is None else (*METRICS[:4], "fpr_1", "fpr_5", *METRICS[4:])
    rows = []
    for key, seeds in _by_seed(_judged(scores), keys):
        reference = None if null_of is None else null_of(key)
        figures = pd.DataFrame([_figures(part, reference, seed) for seed, part in seeds])
        for metric in metrics:
            values = figures[metric].dropna().to_numpy()
            row = {**key, "metric": metric, "value": values.mean() if len(values) else np.nan}
            row |= dict(zip(("low", "high"), bootstrap(values), strict=True)) | {"seeds": len(values), "bound": ""}
            rows.append(row | _bound(metric, figures, row))
    return pd.DataFrame(rows, columns=[*keys, "metric", "value", "low", "high", "seeds", "bound"])


def detection_times(scores: pd.DataFrame, by: Sequence[str] = (), per: str = "run") -> pd.DataFrame:
    """How many rounds after its first poisoned update each attack was first flagged, those never flagged included.

    scores: the table of `with_truth`; with idle=True a flag in an attacker's idle round counts, too, once it has
    poisoned. per: "run", where a flag on any of its attackers will do, or "client". A round without a verdict flags
    nobody. Returns: *by, seed (if there is one), client (per client), detector, first (round of the first poisoned
    update), rounds (from there until the first flag, 0 = at once; if there was none, the rounds looked at in vain),
    detected (False: the time is censored, detection took at least `rounds`).
    Raises: InputError if a column is missing, or `per` is neither.
    """
    if per not in ("run", "client"):
        raise InputError(f"per must be 'run' or 'client', found {per!r}")
    keys = [*by, *(["seed"] if "seed" in scores else []), *(["client"] if per == "client" else []), "detector"]
    _demand(scores, [*keys, "round", "client", "flag", "abstained", "malicious"])
    malicious = scores["malicious"].to_numpy(bool)
    theirs = malicious | scores["compromised"].to_numpy(bool) if "compromised" in scores else malicious
    scores, malicious = scores[theirs], malicious[theirs]
    ids, example = _numbered(scores, keys)
    rounds, never = scores["round"].to_numpy(np.int64), np.iinfo(np.int64).max
    first, found = np.full(len(example), never), np.full(len(example), never)
    last = np.zeros(len(example), np.int64)
    np.minimum.at(first, ids[malicious], rounds[malicious])
    np.maximum.at(last, ids, rounds)
    caught = scores["flag"].to_numpy(bool) & (scores["abstained"] == "").to_numpy() & (rounds >= first[ids])
    np.minimum.at(found, ids[caught], rounds[caught])
    table = scores.iloc[example][keys].reset_index(drop=True)
    table["first"], table["detected"] = first, found < never
    table["rounds"] = np.where(found < never, found - first, last - first + 1)
    return table.loc[first < never, [*keys, "first", "rounds", "detected"]].reset_index(drop=True)


def rounds_to_detection(scores: pd.DataFrame, by: Sequence[str] = (), per: str = "run") -> pd.DataFrame:
    """How soon attacks are found: the summary of `detection_times` for each detector and combination of `by`.

    Returns: *by, detector, detected (share of the runs, or of the clients of a run, averaged over seeds), low, high
    (95 % bootstrap over seeds, NaN for one), median (rounds until half of the cases were detected, 0 = at once, inf
    where half never were: it counts the censored ones in full), cases, seeds.
    Raises: as `detection_times`.
    """
    times = detection_times(scores, by, per)
    keys, rows = [*by, "detector"], []
    for key, group in _groups(times, keys):
        values = group.groupby("seed", sort=False)["detected"].mean() if "seed" in group else group["detected"]
        shares = np.asarray(values, np.float64) if "seed" in group else np.array([values.mean()])
        until = np.sort(np.where(group["detected"], group["rounds"].astype(np.float64), np.inf))
        row = {**key, "detected": shares.mean(), "median": until[(len(until) - 1) // 2], "cases": len(group)}
        rows.append(row | dict(zip(("low", "high"), bootstrap(shares), strict=True)) | {"seeds": len(shares)})
    return pd.DataFrame(rows, columns=[*keys, "detected", "low", "high", "median", "cases", "seeds"])


def roc_points(scores: pd.DataFrame, by: Sequence[str] = ()) -> pd.DataFrame:
    """The corners of each detector's ROC curve, all seeds pooled: *by, detector, fpr, tpr, from (0, 0) to (1, 1).

    Updates without a verdict are left out, and so is a group without both kinds of updates.
    Raises: InputError if a column is missing.
    """
    keys = [*by, "detector"]
    _demand(scores, [*keys, "score", "abstained", "malicious"])
    parts = []
    for key, group in _groups(_judged(scores[scores["abstained"] == ""]), keys):
        malicious = group["malicious"].to_numpy(bool)
        if malicious.any() and not malicious.all():
            fpr, tpr = _roc(group["score"].to_numpy(np.float64), malicious)
            parts.append(pd.DataFrame({**key, "fpr": fpr, "tpr": tpr}))
    columns = [*keys, "fpr", "tpr"]
    return pd.concat(parts, ignore_index=True)[columns] if parts else pd.DataFrame(columns=columns)


def bootstrap(values: np.ndarray) -> tuple[float, float]:
    """The 95 % percentile interval of the mean of values [seed], by 2,000 resamples; NaN below two values."""
    if len(values) < 2:
        return np.nan, np.nan
    drawn = np.random.default_rng(0).integers(len(values), size=(RESAMPLES, len(values)))
    low, high = np.quantile(values[drawn].mean(axis=1), [0.025, 0.975])
    return float(low), float(high)


def auc(score: np.ndarray, malicious: np.ndarray) -> float:
    """Chance that a malicious one of the scores [update] is the higher, a tie counting half; NaN without both kinds."""
    from scipy.stats import rankdata  # takes 0.3 s to import

    positives, negatives = int(malicious.sum()), int((~malicious).sum())
    if not positives or not negatives:
        return np.nan
    above = rankdata(score)[malicious].sum() - positives * (positives + 1) / 2
    return float(above / (positives * negatives))


def average_precision(score: np.ndarray, malicious: np.ndarray) -> float:
    """Area under the precision-recall curve of scores [update], by steps, no interpolation; NaN without both kinds.

    Equal scores pass a threshold together, so their order changes nothing.
    """
    if not malicious.any() or malicious.all():
        return np.nan
    true, false = _passing(score, malicious)
    return float((np.diff(true, prepend=0) * true / (true + false)).sum() / true[-1])


def _demand(scores: pd.DataFrame, columns: Sequence[str]) -> None:
    if missing := [name for name in columns if name not in scores.columns]:
        raise InputError(f"scores need the column {missing[0]!r}, found {', '.join(map(str, scores.columns))}")


def _judged(scores: pd.DataFrame) -> pd.DataFrame:
    """Without the updates that are neither malicious nor benign: those a compromised client did not poison."""
    if "compromised" not in scores:
        return scores
    idle = scores["compromised"].astype(bool) & ~scores["malicious"].astype(bool)
    return scores[~idle].reset_index(drop=True)


def _groups(scores: pd.DataFrame, keys: list[str]) -> Iterator[tuple[Mapping[str, object], pd.DataFrame]]:
    for key, group in scores.groupby(keys, sort=False, dropna=False, observed=True):
        yield dict(zip(keys, key, strict=True)), group


def _numbered(scores: pd.DataFrame, keys: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """The group of each row, counted as the groups appear, and the first row of each group."""
    ids = scores.groupby(keys, sort=False, dropna=False, observed=True).ngroup().to_numpy()
    return ids, np.unique(ids, return_index=True)[1]


def _last_rows(ids: np.ndarray, answered: np.ndarray, rounds: np.ndarray) -> np.ndarray:
    """The row of each group's last scored round, of its last round if none is; raises InputError on a round twice."""
    order = np.lexsort((rounds, answered, ids))
    same = (np.diff(ids[order]) == 0) & (np.diff(rounds[order]) == 0)
    if same.any():
        raise InputError(
            f"a client has two scores of one detector in round {rounds[order][1:][same][0]}; tables of several runs "
            "need a column that tells them apart: seed, or one named in `by`"
        )
    return order[np.append(np.diff(ids[order]) != 0, True)] if len(order) else order


Null = tuple[np.ndarray, np.ndarray, Mapping[Any, int]]  # scores, the highest first, the seed of each, how many of each
Updates = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]  # of one seed: score, flag, malicious, answered


def _by_seed(scores: pd.DataFrame, keys: list[str]) -> Iterator[tuple[dict[str, object], list[tuple[object, Updates]]]]:
    """Each combination of keys and the updates of its seeds."""
    within = [*keys, "seed"] if "seed" in scores else keys
    ids, example = _numbered(scores, within)
    if not len(example):
        return
    order = np.argsort(ids, kind="stable")
    columns = [scores[name].to_numpy(dtype)[order] for name, dtype in (("score", np.float64), ("flag", bool))]
    columns += [scores["malicious"].to_numpy(bool)[order], (scores["abstained"] == "").to_numpy()[order]]
    ends = np.cumsum(np.bincount(ids))[:-1]
    parts = list(zip(*(np.split(column, ends) for column in columns), strict=True))
    heads = scores.iloc[example].reset_index(drop=True)
    for key, group in _groups(heads, keys):
        seeds = group.get("seed", [None])
        yield dict(key), [(seed, parts[i]) for i, seed in zip(group.index, seeds, strict=True)]


def _figures(updates: Updates, null: Null | None, seed: object) -> dict[str, float]:
    """The figures of one seed, NaN where it has no answer, and what their bounds rest on.

    benign, flagged; with a null, for each rate, how many benign ones pass its threshold and whether it is resolved.
    """
    answered = updates[3]
    score, flag, malicious = (column[answered] for column in updates[:3])
    flagged, benign = int(flag[~malicious].sum()), int((~malicious).sum())
    figures = {
        "auc": auc(score, malicious),
        "pr_auc": average_precision(score, malicious),
        "fpr": flagged / benign if benign else np.nan,
        "abstained": 1 - float(answered.mean()),
        "benign": benign,
        "flagged": flagged,
    }
    for suffix, rate in RATES.items():
        if null is None:
            figures[f"tpr_{suffix}"] = _tpr_at(rate, score, malicious)
            continue
        threshold, resolved = _threshold(null, rate, seed)
        above = (score > threshold) | np.isposinf(score)  # as `calibrate` flags
        said = not np.isnan(threshold)
        figures[f"tpr_{suffix}"] = float(above[malicious].mean()) if said and malicious.any() else np.nan
        figures[f"fpr_{suffix}"] = float(above[~malicious].mean()) if said and benign else np.nan
        figures[f"passed_{suffix}"], figures[f"resolved_{suffix}"] = int(above[~malicious].sum()), resolved
    return figures


def _tpr_at(fpr: float, score: np.ndarray, malicious: np.ndarray) -> float:
    benign = np.sort(score[~malicious])
    if not malicious.any() or not len(benign):
        return np.nan
    passing = int(np.floor(fpr * len(benign)))  # so many benign updates may lie above the threshold
    return float((score[malicious] > benign[len(benign) - 1 - passing]).mean())


def _nulls(null: pd.DataFrame, keys: list[str]) -> Callable[[Mapping[str, object]], Null]:
    """What gives the null of a combination of keys: that of equal values in those of the keys that the null has."""
    _demand(null, ["detector", "score", "abstained"])
    if "malicious" in null and (poisoned := int(null["malicious"].sum())):
        raise InputError(f"a null must be free of attacks, found {poisoned} malicious rows")
    shared, known = [key for key in keys if key in null], {}
    for key, group in _groups(null[null["abstained"] == ""], shared):
        score = group["score"].to_numpy(np.float64)
        order = np.argsort(-score, kind="stable")
        seeds = group["seed"].to_numpy()[order] if "seed" in group else np.full(len(order), None)
        known[tuple(key.values())] = score[order], seeds, dict(Counter(seeds.tolist()))
    nothing = np.zeros(0), np.zeros(0), {}
    return lambda key: known.get(tuple(key[name] for name in shared), nothing)


def _threshold(null: Null, rate: float, seed: object) -> tuple[float, bool]:
    """The rank of the scores of other seeds that a share `rate` passes; their largest and False if they are too few.

    NaN where there are none.
    """
    scores, seeds, counts = null
    own = 0 if seed is None else counts.get(seed, 0)
    others = len(scores) - own
    if not others:
        return np.nan, False
    passing = int(np.floor((others + 1) * rate + 1e-9))  # of the null and one more, those above the threshold
    highest = slice(max(passing, 1) + own)  # among which there are enough of other seeds
    left = scores[highest][seeds[highest] != seed] if own else scores[highest]
    return float(left[max(passing, 1) - 1]), passing >= 1


def _bound(metric: str, figures: pd.DataFrame, row: Mapping[str, Any]) -> dict[str, object]:
    """What replaces a row's figures where the data only bound them."""
    kind, _, suffix = metric.partition("_")
    if not row["seeds"] or kind not in ("fpr", "tpr"):
        return {}
    benign, passed = int(figures["benign"].sum()), f"passed_{suffix}" if suffix else "flagged"
    if kind == "fpr" and benign and not figures[passed].sum():
        limit = 1 - 0.05 ** (1 / benign)
        return {"value": limit, "low": 0.0, "high": limit, "bound": "<="}
    if suffix and passed in figures:
        high = row["value"] if np.isnan(row["high"]) else row["high"]
        return {} if figures[f"resolved_{suffix}"].all() else {"low": 0.0, "high": high, "bound": "<="}
    told = figures["benign"][figures["auc"].notna()]
    return {"bound": ">="} if kind == "tpr" and (told * RATES[suffix] < 1).any() else {}


def _roc(score: np.ndarray, malicious: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    true, false = _passing(score, malicious)
    tpr, fpr = np.append(0, true / true[-1]), np.append(0, false / false[-1])
    turn = np.abs(np.diff(fpr)[:-1] * np.diff(tpr)[1:] - np.diff(tpr)[:-1] * np.diff(fpr)[1:]) > 1e-12
    corners = np.concatenate([[True], turn, [True]])
    return fpr[corners], tpr[corners]


def _passing(score: np.ndarray, malicious: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How many malicious and how many benign ones reach each different score, the highest first."""
    order = np.argsort(-score, kind="stable")
    score, malicious = score[order], malicious[order]
    last = np.append(score[1:] != score[:-1], True)  # of equal scores all pass a threshold or none
    return np.cumsum(malicious)[last], np.cumsum(~malicious)[last]
