"""Who finds most in the gauntlet: the ranking of the detectors, from its figures."""

import pandas as pd

from gradlens.reporting.page import number
from simulations.studies.gauntlet_figures import WHERE
from simulations.studies.gauntlet_scores import ATTACK_FREE, CHOOSE, CONFIRM
from simulations.studies.results import share, value_at

MATCHED, UNMATCHED = "tpr_5_matched", "tpr_5"  # what ranks the detectors, and what did in tables that lack it
RANKED = (  # title, column of `ranking`
    ("TPR at 5 %, matched", "tpr_5_matched"),
    ("TPR at 1 %, matched", "tpr_1_matched"),
    ("matched 5 %, not adaptive", "tpr_5_matched_plain"),
    ("FPR at matched 5 %", "fpr_5_matched"),
    ("TPR at attack-free 5 %", "tpr_5"),
    ("TPR at attack-free 1 %", "tpr_1"),
    ("FPR while attacked, 5 %", "fpr_5"),
    ("FPR while attacked, 1 %", "fpr_1"),
)


def ranking_purpose(figures: pd.DataFrame) -> str:
    """The seeds whose figures rank the detectors: those that confirm or, without any, those that choose."""
    return CONFIRM if figures["purpose"].eq(CONFIRM).any() else CHOOSE


def of_purpose(figures: pd.DataFrame, purpose: str) -> pd.DataFrame:
    """The figures of attacked runs of a purpose, and of attack-free runs of the same settings."""
    shown = figures[figures["purpose"].isin((purpose, ATTACK_FREE))]
    return of_settings(shown, shown[shown["purpose"].eq(purpose)])


def of_settings(figures: pd.DataFrame, others: pd.DataFrame) -> pd.DataFrame:
    """The figures of settings (task, way of drawing clients) that the others have, too."""
    return figures[pd.MultiIndex.from_frame(figures[WHERE]).isin(pd.MultiIndex.from_frame(others[WHERE]))]


def headline(figures: pd.DataFrame) -> str:
    """The metric that ranks the detectors; tables from before thresholds were matched have another."""
    return MATCHED if figures["metric"].eq(MATCHED).any() else UNMATCHED


def observed(figures: pd.DataFrame) -> pd.Series:
    """The values, with 0 in place of the upper limit where no false positive was seen, so that they can be averaged."""
    is_limit = figures["bound"].eq("<=") & figures["low"].eq(0) & figures["value"].eq(figures["high"])
    return figures["value"].where(~(figures["metric"].str.startswith("fpr") & is_limit), 0.0)


def ranking(working: pd.DataFrame) -> pd.DataFrame:
    """Averages the figures per client of each detector over cells.

    Parameters
    ----------
    working : DataFrame
        The figures per client of cells in which the attack works.

    Returns
    -------
    DataFrame
        Index detector, the best by `headline` first; a column for every metric and, with the ending _plain, one for its
        mean over the cells whose attack is not adaptive.
    """
    known = working.assign(value=observed(working))
    means, plain = (
        rows.pivot_table(index="detector", columns="metric", values="value", aggfunc="mean")
        for rows in (known, known[known["adaptive"].eq(0)])
    )
    return means.join(plain.add_suffix("_plain")).sort_values(headline(working), ascending=False)


def ranked_rows(ranked: pd.DataFrame, by_client: pd.DataFrame) -> list[dict[str, str]]:
    """A row per detector: what it finds and what that costs, attacked and attack-free.

    Parameters
    ----------
    ranked : DataFrame
        As of `ranking`.
    by_client : DataFrame
        All figures per client.
    """
    attack_free = by_client[by_client["family"].eq("none")]
    alarms = attack_free.assign(value=observed(attack_free)).pivot_table(
        index="detector", columns="metric", values="value", aggfunc="mean"
    )
    return [
        {"detector": str(name), "AUC": number(value_at(ranked, name, "auc"))}
        | {title: share(value_at(ranked, name, column)) for title, column in RANKED}
        | {f"FPR attack-free, {rate} %": share(value_at(alarms, name, f"fpr_{rate}")) for rate in (5, 1)}
        for name in ranked.index
    ]
