"""How well scores rank malicious above benign updates, without a threshold."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from gradlens.evaluation.score_tables import demand, groups, judged


def auc(score: np.ndarray, malicious: np.ndarray) -> float:
    """Returns the area under the ROC curve, ties counting half; NaN without both kinds of update.

    Parameters
    ----------
    score : ndarray, float64 [update]
        Higher is more suspicious.
    malicious : ndarray, bool [update]

    Examples
    --------
    >>> auc(np.array([1.0, 2.0, 3.0]), np.array([False, True, True]))
    1.0
    """
    positives, negatives = int(malicious.sum()), int((~malicious).sum())
    if not positives or not negatives:
        return np.nan
    above = ranks(score)[malicious].sum() - positives * (positives + 1) / 2
    return float(above / (positives * negatives))


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks numbers within each column, 1 for the smallest, ties by their mean rank.

    Parameters
    ----------
    values : ndarray, float64 [update] or [update, feature]

    Returns
    -------
    ndarray, float64, of the same shape
        NaN throughout a column in which a number is NaN.

    Notes
    -----
    As `scipy.stats.rankdata`, which takes half a second to import.

    Examples
    --------
    >>> ranks(np.array([0.2, 0.7, 0.2])).tolist()
    [1.5, 3.0, 1.5]
    """
    placed = np.empty(values.shape)
    for column, place in zip(np.atleast_2d(values.T), np.atleast_2d(placed.T), strict=True):
        order = np.argsort(column)
        ascending = column[order]
        ends = np.append(np.flatnonzero(ascending[1:] != ascending[:-1]) + 1, len(order))  # after each run of equals
        sizes = np.diff(ends, prepend=0)
        place[order] = np.repeat(ends - (sizes - 1) / 2, sizes)
        if np.isnan(ascending[-1:]).any():
            place[:] = np.nan
    return placed


def average_precision(score: np.ndarray, malicious: np.ndarray) -> float:
    """Returns the area under the stepwise precision-recall curve; NaN without both kinds of update.

    Parameters
    ----------
    score : ndarray, float64 [update]
        Higher is more suspicious.
    malicious : ndarray, bool [update]

    Examples
    --------
    >>> average_precision(np.array([1.0, 2.0, 3.0]), np.array([False, True, True]))
    1.0
    """
    if not malicious.any() or malicious.all():
        return np.nan
    true, false = passing(score, malicious)
    return float((np.diff(true, prepend=0) * true / (true + false)).sum() / true[-1])


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
    demand(scores, [*keys, "score", "abstained", "malicious"])
    parts = []
    for key, group in groups(judged(scores[scores["abstained"] == ""]), keys):
        malicious = group["malicious"].to_numpy(bool)
        if malicious.any() and not malicious.all():
            fpr, tpr = _roc(group["score"].to_numpy(np.float64), malicious)
            parts.append(pd.DataFrame({**key, "fpr": fpr, "tpr": tpr}))
    columns = [*keys, "fpr", "tpr"]
    return pd.concat(parts, ignore_index=True)[columns] if parts else pd.DataFrame(columns=columns)


def _roc(score: np.ndarray, malicious: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    true, false = passing(score, malicious)
    tpr, fpr = np.append(0, true / true[-1]), np.append(0, false / false[-1])
    turn = np.abs(np.diff(fpr)[:-1] * np.diff(tpr)[1:] - np.diff(tpr)[:-1] * np.diff(fpr)[1:]) > 1e-12
    corners = np.concatenate([[True], turn, [True]])
    return fpr[corners], tpr[corners]


def passing(score: np.ndarray, malicious: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Counts malicious and benign updates that reach each distinct score, from the highest."""
    order = np.argsort(-score, kind="stable")
    score, malicious = score[order], malicious[order]
    last = np.append(score[1:] != score[:-1], True)  # equal scores pass a threshold together
    return np.cumsum(malicious)[last], np.cumsum(~malicious)[last]
