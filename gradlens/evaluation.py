"""Evaluation: how well scores tell poisoned updates from benign ones, with intervals over seeds.

A seed is one run of a setting and the only thing that is resampled: the clients of a run share its model and
its data, so intervals over clients would be too narrow.
"""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import pandas as pd
from scipy.stats import rankdata

from gradlens.log import InputError

__all__ = ["auc", "bootstrap", "evaluate", "roc_points", "with_truth"]

METRICS = ("auc", "tpr_1", "tpr_5", "fpr", "abstained")
RESAMPLES = 2_000


def with_truth(scores: pd.DataFrame, truth: pd.DataFrame) -> pd.DataFrame:
    """The table of `detect` with a column `malicious`: this very update was poisoned.

    truth: round, client, compromised, poisoned. Updates of compromised clients that were not poisoned in that
    round are neither malicious nor benign and leave the table.
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
    idle = table["compromised"].astype(bool) & ~table["malicious"]
    return table[~idle].drop(columns=["compromised", "poisoned", "_merge"]).reset_index(drop=True)


def evaluate(scores: pd.DataFrame, by: Sequence[str] = ()) -> pd.DataFrame:
    """AUC, TPR at 1 % and 5 % FPR, FPR and abstentions of each detector, under each combination of `by`.

    scores: detector, score, flag, abstained, malicious (see `with_truth`), `seed` (one run if there is no such
    column) and the columns of `by`. Each figure is taken over all updates of a seed, then averaged over seeds.
    Returns: *by, detector, metric, value, low, high, seeds, bound.
      auc: chance that a poisoned update scores higher than a benign one, a tie counting half;
      tpr_1, tpr_5: largest share of poisoned updates above a threshold that at most 1 or 5 % of the benign
        ones pass; bound ">=" where a seed has too few benign updates to tell that rate from 0;
      fpr: share of benign updates flagged, also where nothing is poisoned; where none is, the exact one-sided
        95 % upper limit 1 - 0.05^(1/n) with bound "<=";
      abstained: share of updates without a verdict; they are outside the other four.
      low, high: 95 % percentile bootstrap over seeds, NaN for one; seeds: those that have the figure.
    Raises: InputError if a column is missing.
    """
    keys = [*by, "detector"]
    _demand(scores, [*keys, "score", "flag", "abstained", "malicious"])
    rows = []
    for key, group in _groups(scores, keys):
        seeds = [part for _, part in group.groupby("seed", sort=False)] if "seed" in group else [group]
        figures = pd.DataFrame([_figures(part) for part in seeds])
        for metric in METRICS:
            values = figures[metric].dropna().to_numpy()
            row = {**key, "metric": metric, "value": values.mean() if len(values) else np.nan}
            row |= dict(zip(("low", "high"), bootstrap(values), strict=True)) | {"seeds": len(values), "bound": ""}
            rows.append(row | _bound(metric, figures))
    return pd.DataFrame(rows, columns=[*keys, "metric", "value", "low", "high", "seeds", "bound"])


def roc_points(scores: pd.DataFrame, by: Sequence[str] = ()) -> pd.DataFrame:
    """The corners of each detector's ROC curve, all seeds pooled: *by, detector, fpr, tpr, from (0, 0) to (1, 1).

    Updates without a verdict are left out, and so is a group without both kinds of updates.
    Raises: InputError if a column is missing.
    """
    keys = [*by, "detector"]
    _demand(scores, [*keys, "score", "abstained", "malicious"])
    parts = []
    for key, group in _groups(scores[scores["abstained"] == ""], keys):
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


def _demand(scores: pd.DataFrame, columns: Sequence[str]) -> None:
    if missing := [name for name in columns if name not in scores.columns]:
        raise InputError(f"scores need the column {missing[0]!r}, found {', '.join(map(str, scores.columns))}")


def _groups(scores: pd.DataFrame, keys: list[str]) -> Iterator[tuple[Mapping[str, object], pd.DataFrame]]:
    for key, group in scores.groupby(keys, sort=False, dropna=False):
        yield dict(zip(keys, key, strict=True)), group


def _figures(updates: pd.DataFrame) -> dict[str, float]:
    """The figures of one seed, NaN where it has no answer, and `benign`, `flagged`: what the FPR rests on."""
    answered = (updates["abstained"] == "").to_numpy()
    score, flag, malicious = (updates[c].to_numpy()[answered] for c in ("score", "flag", "malicious"))
    score, malicious = score.astype(np.float64), malicious.astype(bool)
    flagged, benign = int(flag[~malicious].sum()), int((~malicious).sum())
    return {
        "auc": auc(score, malicious),
        "tpr_1": _tpr_at(0.01, score, malicious),
        "tpr_5": _tpr_at(0.05, score, malicious),
        "fpr": flagged / benign if benign else np.nan,
        "abstained": 1 - float(answered.mean()),
        "benign": benign,
        "flagged": flagged,
    }


def auc(score: np.ndarray, malicious: np.ndarray) -> float:
    """Chance that a malicious one of the scores [update] is the higher, a tie counting half; NaN without both kinds."""
    positives, negatives = int(malicious.sum()), int((~malicious).sum())
    if not positives or not negatives:
        return np.nan
    above = rankdata(score)[malicious].sum() - positives * (positives + 1) / 2
    return float(above / (positives * negatives))


def _tpr_at(fpr: float, score: np.ndarray, malicious: np.ndarray) -> float:
    benign = np.sort(score[~malicious])
    if not malicious.any() or not len(benign):
        return np.nan
    passing = int(np.floor(fpr * len(benign)))  # so many benign updates may lie above the threshold
    return float((score[malicious] > benign[len(benign) - 1 - passing]).mean())


def _bound(metric: str, figures: pd.DataFrame) -> dict[str, object]:
    """What replaces a row's figures where the data only bound them."""
    benign = int(figures["benign"].sum())
    if metric == "fpr" and benign and not figures["flagged"].sum():
        limit = 1 - 0.05 ** (1 / benign)
        return {"value": limit, "low": 0.0, "high": limit, "bound": "<="}
    target = {"tpr_1": 0.01, "tpr_5": 0.05}.get(metric)
    told = figures["benign"][figures["auc"].notna()]
    return {"bound": ">="} if target and (told * target < 1).any() else {}


def _roc(score: np.ndarray, malicious: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    order = np.argsort(-score, kind="stable")
    score, malicious = score[order], malicious[order]
    last = np.append(score[1:] != score[:-1], True)  # of equal scores all pass a threshold or none
    tpr = np.append(0, np.cumsum(malicious)[last] / malicious.sum())
    fpr = np.append(0, np.cumsum(~malicious)[last] / (~malicious).sum())
    turn = np.abs(np.diff(fpr)[:-1] * np.diff(tpr)[1:] - np.diff(tpr)[:-1] * np.diff(fpr)[1:]) > 1e-12
    corners = np.concatenate([[True], turn, [True]])
    return fpr[corners], tpr[corners]
