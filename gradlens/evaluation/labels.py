"""How often suspected labels are right, where the true ones are known."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from gradlens.errors import InputError
from gradlens.evaluation.intervals import mean_interval


def attribution_accuracy(suspected: pd.DataFrame, by: Sequence[str] = ()) -> pd.DataFrame:
    """Computes how often the suspected labels are right, for each combination of `by`.

    Parameters
    ----------
    suspected : DataFrame
        Rows of `suspected_labels`, for instance of the flagged or of the malicious clients, with the columns target,
        source, true_target, true_source, those of `by`, and seed (without it, all rows are one run). A true source of
        <NA> means several, and <NA> is then the right answer; rows without a true target are left out.
    by : sequence of str, default ()
        Columns that name the experimental condition.

    Returns
    -------
    DataFrame
        ``*by``, label ("target", "source"), value (the accuracy per seed, averaged over seeds), low, high (95 %
        interval over seeds, NaN for one), seeds, clients (rows that were judged).

    Raises
    ------
    InputError
        If a column is missing.

    Examples
    --------
    >>> import pandas as pd
    >>> rows = pd.DataFrame({"target": [1, 1], "source": [3, 2], "true_target": [1, 1], "true_source": [3, 3]})
    >>> attribution_accuracy(rows)[["label", "value"]].values.tolist()
    [['target', 1.0], ['source', 0.5]]
    """
    needed = [*by, "target", "source", "true_target", "true_source"]
    if missing := [name for name in needed if name not in suspected]:
        raise InputError(f"suspected labels need the column {missing[0]!r}, found {', '.join(suspected.columns)}")
    judged = suspected.assign(target_is_right=_right(suspected, "target"), source_is_right=_right(suspected, "source"))
    parts = judged.groupby(list(by), sort=False, dropna=False) if by else [((), judged)]
    rows = []
    for key, part in parts:
        for label in ("target", "source"):
            labelled = part[part["true_target"].notna()]
            seeds = "seed" if "seed" in labelled else np.zeros(len(labelled))
            right = labelled.groupby(seeds, sort=False)[f"{label}_is_right"]
            values = right.mean().to_numpy(np.float64)
            row = dict(zip(by, key, strict=True)) | {"label": label, "value": values.mean() if len(values) else np.nan}
            row |= dict(zip(("low", "high"), mean_interval(values, 0, 1), strict=True))
            rows.append(row | {"seeds": len(values), "clients": len(labelled)})
    return pd.DataFrame(rows, columns=[*by, "label", "value", "low", "high", "seeds", "clients"])


def _right(suspected: pd.DataFrame, label: str) -> np.ndarray:
    """Whether the suspected label is the true one, or both are <NA>."""
    guess, true = (suspected[name].astype("Int64") for name in (label, f"true_{label}"))
    both = guess.isna() & true.isna()
    return ((guess == true).fillna(value=False) | both).to_numpy(bool)
