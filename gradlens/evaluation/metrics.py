"""The metrics of each detector, averaged over seeds, and the bounds where the data only bound them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from gradlens.errors import InputError
from gradlens.evaluation.intervals import mean_interval
from gradlens.evaluation.ranking import auc, average_precision
from gradlens.evaluation.score_tables import demand, groups, judged, numbered
from gradlens.ranks import OtherSeeds, by_other_seeds

METRICS = ("auc", "pr_auc", "tpr_1", "tpr_5", "fpr", "abstained")
RATES = {"1": 0.01, "5": 0.05}  # suffix of tpr_ and fpr_ -> target false-positive rate


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
        clients) of a seed, then averaged over seeds; low and high are the 95 % interval over seeds
        (`mean_interval`), NaN for a single one; seeds is the number of seeds that have the metric.

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
    demand(scores, [*keys, "score", "flag", "abstained", "malicious"])
    null_of = None if null is None else _nulls(null, keys)
    metrics = METRICS if null_of is None else (*METRICS[:4], "fpr_1", "fpr_5", *METRICS[4:])
    rows = []
    for key, seeds in _by_seed(judged(scores), keys):
        reference = None if null_of is None else null_of(key)
        figures = pd.DataFrame([_figures(part, reference, seed) for seed, part in seeds])
        for metric in metrics:
            values = figures[metric].dropna().to_numpy()
            row = {**key, "metric": metric, "value": values.mean() if len(values) else np.nan}
            row |= dict(zip(("low", "high"), mean_interval(values, 0, 1), strict=True))
            row |= {"seeds": len(values), "bound": ""}
            rows.append(row | _bound(metric, figures, row))
    return pd.DataFrame(rows, columns=[*keys, "metric", "value", "low", "high", "seeds", "bound"])


Updates = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]  # of one seed: score, flag, malicious, answered


def _by_seed(scores: pd.DataFrame, keys: list[str]) -> Iterator[tuple[dict[str, object], list[tuple[object, Updates]]]]:
    """Yields each combination of the keys with pairs (seed, updates)."""
    within = [*keys, "seed"] if "seed" in scores else keys
    ids, example = numbered(scores, within)
    if not len(example):
        return
    order = np.argsort(ids, kind="stable")
    columns = [scores[name].to_numpy(dtype)[order] for name, dtype in (("score", np.float64), ("flag", bool))]
    columns += [scores["malicious"].to_numpy(bool)[order], (scores["abstained"] == "").to_numpy()[order]]
    ends = np.cumsum(np.bincount(ids))[:-1]
    parts = list(zip(*(np.split(column, ends) for column in columns), strict=True))
    heads = scores.iloc[example].reset_index(drop=True)
    for key, group in groups(heads, keys):
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
    demand(null, ["detector", "score", "abstained"])
    if "malicious" in null and (poisoned := int(null["malicious"].sum())):
        raise InputError(f"a null must be free of attacks, found {poisoned} malicious rows")
    null = null[(null["abstained"] == "") & np.isfinite(null["score"].to_numpy(np.float64))]
    shared, clients = [key for key in keys if key in null], [name for name in ("seed", "client") if name in null]
    known = {}
    for key, group in groups(null, shared):
        units = numbered(group, clients)[0] if "client" in clients else np.arange(len(group))
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
