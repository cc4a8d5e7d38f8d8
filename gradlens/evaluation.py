"""Evaluation: how well scores separate poisoned from benign updates, with intervals over seeds.

A seed is one run of a setting, and only seeds are resampled: the clients of a run share its model and its data, so
intervals over clients would be too narrow.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from gradlens.errors import InputError
from gradlens.ranks import OtherSeeds, by_other_seeds

__all__ = [
    "auc", "average_precision", "bootstrap", "detection_times", "evaluate", "per_client", "roc_points",
    "rounds_to_detection", "with_truth",
]  # fmt: skip

METRICS = ("auc", "pr_auc", "tpr_1", "tpr_5", "fpr", "abstained")
RATES = {"1": 0.01, "5": 0.05}  # suffix of tpr_ and fpr_ -> target false-positive rate
RESAMPLES = 2_000


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
    return table if idle else _judged(table).drop(columns="compromised")


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
    _demand(scores, [*keys, "round", "score", "flag", "abstained", "malicious"])
    hows: Mapping[str, str] = {"": how} if isinstance(how, str) else how
    if unknown := [summary for summary in hows.values() if summary not in ("mean", "last")]:
        raise InputError(f"how must be 'mean' or 'last', found {unknown[0]!r}")
    if flagged not in ("any", "half"):
        raise InputError(f"flagged must be 'any' or 'half', found {flagged!r}")
    ids, first = _numbered(scores, keys)
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


def evaluate(scores: pd.DataFrame, by: Sequence[str] = (), null: pd.DataFrame | None = None) -> pd.DataFrame:
    """Computes AUC, average precision, TPR at 1 % and 5 % FPR, FPR and abstentions of each detector.

    Parameters
    ----------
    scores : pandas.DataFrame
        Table of `with_truth` or `per_client`: columns detector, score, flag, abstained, malicious, those of `by`, and
        seed (without it the table is one run).
    by : sequence of str
        Columns whose combinations are evaluated separately, such as varied settings.
    null : pandas.DataFrame, optional
        Attack-free scores of the same kind, on which thresholds are set. Each seed uses those of other seeds, of the
        same detector and with equal values in the columns of `by` that the null has. None sets thresholds on the
        benign updates themselves.

    Returns
    -------
    pandas.DataFrame
        Columns *by, detector, metric, value, low, high, seeds, bound. Each metric is computed over all updates (or
        clients) of a seed, then averaged over seeds; low and high are the 95 % percentile bootstrap interval over
        seeds, NaN for a single one; seeds is the number of seeds that have the metric.

    Raises
    ------
    InputError
        If a column is missing, or the null contains a malicious row.

    Notes
    -----
    The metrics are

    - auc: the probability that a poisoned update scores higher than a benign one, a tie counting half.
    - pr_auc: average precision, the sum over thresholds of precision times gain in recall; chance level is the share
      of poisoned updates.
    - tpr_1, tpr_5: the share of poisoned updates above a threshold. Without a null it is the best one that at most 1 %
      or 5 % of the seed's own benign updates exceed, with bound ">=" if a seed has too few of them to resolve that
      rate. With a null it is the one that an update of one more client exceeds with at most that probability, as in
      `calibrate`, where a client of a seed counts once (a row, where there is no column client); of a null of too few
      clients it is the largest score, with bound "<=", since the threshold for that rate cannot be lower. Null scores
      that are not finite are left out: such updates are flagged whatever the threshold.
    - fpr_1, fpr_5: the share of benign updates above the same threshold; with a null only.
    - fpr: the share of benign updates that are flagged; also without any poisoned update.
    - abstained: the share of updates without a verdict, which do not enter the other metrics.

    If no benign update at all is flagged (or above the threshold), a false-positive rate is the exact one-sided 95 %
    upper limit 1 - 0.05^(1/n) of n updates, with bound "<=". The limit assumes independence, which updates of one run
    violate, those of one client most.

    Examples
    --------
    >>> scores = pd.DataFrame({"detector": "layer_norms", "score": [0.5, 1.0, 4.0], "flag": [False, False, True]})
    >>> table = evaluate(scores.assign(abstained="", malicious=[False, False, True]))
    >>> table.set_index("metric").loc[["auc", "tpr_5"], "value"].tolist()
    [1.0, 1.0]
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
    _demand(scores, [*keys, "round", "client", "flag", "abstained", "malicious"])
    malicious = scores["malicious"].to_numpy(bool)
    of_attackers = malicious | scores["compromised"].to_numpy(bool) if "compromised" in scores else malicious
    scores, malicious = scores[of_attackers], malicious[of_attackers]
    ids, example = _numbered(scores, keys)
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
        bootstrap interval over seeds, NaN for a single one), median (rounds until half of the cases were detected, 0
        if at once, inf if half never were), cases, seeds.
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
    """Returns the corners of each detector's ROC curve, with all seeds pooled.

    Parameters
    ----------
    scores : pandas.DataFrame
        Table of `with_truth` or `per_client`. Updates without a verdict are left out.
    by : sequence of str
        Columns whose combinations get a curve of their own.

    Returns
    -------
    pandas.DataFrame
        Columns *by, detector, fpr, tpr, each curve from (0, 0) to (1, 1). There is no curve without both malicious and
        benign updates.

    Examples
    --------
    >>> scores = pd.DataFrame({"detector": "layer_norms", "score": [0.5, 1.0, 4.0], "abstained": ""})
    >>> roc_points(scores.assign(malicious=[False, False, True]))[["fpr", "tpr"]].values.tolist()
    [[0.0, 0.0], [0.0, 1.0], [1.0, 1.0]]
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
    """Returns the 95 % percentile bootstrap interval of the mean of values [seed]; NaN for fewer than two values."""
    if len(values) < 2:
        return np.nan, np.nan
    drawn = np.random.default_rng(0).integers(len(values), size=(RESAMPLES, len(values)))
    low, high = np.quantile(values[drawn].mean(axis=1), [0.025, 0.975])
    return float(low), float(high)


def auc(score: np.ndarray, malicious: np.ndarray) -> float:
    """Returns the area under the ROC curve of scores [update], ties counting half; NaN without both kinds."""
    from scipy.stats import rankdata  # takes 0.3 s to import

    positives, negatives = int(malicious.sum()), int((~malicious).sum())
    if not positives or not negatives:
        return np.nan
    above = rankdata(score)[malicious].sum() - positives * (positives + 1) / 2
    return float(above / (positives * negatives))


def average_precision(score: np.ndarray, malicious: np.ndarray) -> float:
    """Returns the area under the stepwise precision-recall curve of scores [update]; NaN without both kinds."""
    if not malicious.any() or malicious.all():
        return np.nan
    true, false = _passing(score, malicious)
    return float((np.diff(true, prepend=0) * true / (true + false)).sum() / true[-1])


def _demand(scores: pd.DataFrame, columns: Sequence[str]) -> None:
    if missing := [name for name in columns if name not in scores.columns]:
        raise InputError(f"scores need the column {missing[0]!r}, found {', '.join(map(str, scores.columns))}")


def _judged(scores: pd.DataFrame) -> pd.DataFrame:
    """Drops updates that are neither malicious nor benign: those that a compromised client did not poison."""
    if "compromised" not in scores:
        return scores
    idle = scores["compromised"].astype(bool) & ~scores["malicious"].astype(bool)
    return scores[~idle].reset_index(drop=True)


def _groups(scores: pd.DataFrame, keys: list[str]) -> Iterator[tuple[Mapping[str, object], pd.DataFrame]]:
    for key, group in scores.groupby(keys, sort=False, dropna=False, observed=True):
        yield dict(zip(keys, key, strict=True)), group


def _numbered(scores: pd.DataFrame, keys: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Returns the number of each row's group, in order of appearance, and the position of each group's first row."""
    ids = scores.groupby(keys, sort=False, dropna=False, observed=True).ngroup().to_numpy()
    return ids, np.unique(ids, return_index=True)[1]


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


Updates = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]  # of one seed: score, flag, malicious, answered


def _by_seed(scores: pd.DataFrame, keys: list[str]) -> Iterator[tuple[dict[str, object], list[tuple[object, Updates]]]]:
    """Yields each combination of the keys with pairs (seed, updates)."""
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


def _figures(updates: Updates, null: OtherSeeds | None, seed: object) -> dict[str, float]:
    """Computes the metrics of one seed, NaN where undefined, and the counts that their bounds depend on."""
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
        threshold, resolved = null(rate, seed)
        above = (score > threshold) | np.isposinf(score)  # flagged in the same way by `calibrate`
        known = not np.isnan(threshold)
        figures[f"tpr_{suffix}"] = float(above[malicious].mean()) if known and malicious.any() else np.nan
        figures[f"fpr_{suffix}"] = float(above[~malicious].mean()) if known and benign else np.nan
        figures[f"passed_{suffix}"], figures[f"resolved_{suffix}"] = int(above[~malicious].sum()), resolved
    return figures


def _tpr_at(fpr: float, score: np.ndarray, malicious: np.ndarray) -> float:
    benign = np.sort(score[~malicious])
    if not malicious.any() or not len(benign):
        return np.nan
    passing = int(np.floor(fpr * len(benign)))  # benign updates allowed above the threshold
    return float((score[malicious] > benign[len(benign) - 1 - passing]).mean())


def _nulls(null: pd.DataFrame, keys: list[str]) -> Callable[[Mapping[str, object]], OtherSeeds]:
    """Returns a function from a combination of keys to its null, which agrees in all keys that the null has."""
    _demand(null, ["detector", "score", "abstained"])
    if "malicious" in null and (poisoned := int(null["malicious"].sum())):
        raise InputError(f"a null must be free of attacks, found {poisoned} malicious rows")
    null = null[(null["abstained"] == "") & np.isfinite(null["score"].to_numpy(np.float64))]
    shared, clients = [key for key in keys if key in null], [name for name in ("seed", "client") if name in null]
    known = {}
    for key, group in _groups(null, shared):
        units = _numbered(group, clients)[0] if "client" in clients else np.arange(len(group))
        seeds = group["seed"].to_numpy() if "seed" in group else np.full(len(group), None)
        known[tuple(key.values())] = by_other_seeds(group["score"].to_numpy(np.float64), seeds, units)
    nothing = by_other_seeds(np.zeros(0), np.zeros(0), np.zeros(0))
    return lambda key: known.get(tuple(key[name] for name in shared), nothing)


def _bound(metric: str, figures: pd.DataFrame, row: Mapping[str, Any]) -> dict[str, object]:
    """Returns the columns to replace in a row whose metric the data only bound."""
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
    num_benign = figures["benign"][figures["auc"].notna()]
    return {"bound": ">="} if kind == "tpr" and (num_benign * RATES[suffix] < 1).any() else {}


def _roc(score: np.ndarray, malicious: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    true, false = _passing(score, malicious)
    tpr, fpr = np.append(0, true / true[-1]), np.append(0, false / false[-1])
    turn = np.abs(np.diff(fpr)[:-1] * np.diff(tpr)[1:] - np.diff(tpr)[:-1] * np.diff(fpr)[1:]) > 1e-12
    corners = np.concatenate([[True], turn, [True]])
    return fpr[corners], tpr[corners]


def _passing(score: np.ndarray, malicious: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Counts malicious and benign updates that reach each distinct score, from the highest."""
    order = np.argsort(-score, kind="stable")
    score, malicious = score[order], malicious[order]
    last = np.append(score[1:] != score[:-1], True)  # equal scores pass a threshold together
    return np.cumsum(malicious)[last], np.cumsum(~malicious)[last]
