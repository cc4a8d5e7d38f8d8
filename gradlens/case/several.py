"""Cases of several recordings in one table."""

from collections.abc import Mapping

import pandas as pd

from gradlens.case.investigation import Case


def table_of_cases(cases: Mapping[str, Case]) -> pd.DataFrame:
    """A row per recording, with a q value that accounts for their number.

    Parameters
    ----------
    cases : Mapping
        Name of the recording -> its case.

    Returns
    -------
    pandas.DataFrame
        recording, verdict, p, q, suspects (names, separated by commas), ambiguous (likewise), says (the first
        sentence). q is p adjusted by Benjamini and Yekutieli [1]_: among the recordings with q at most .05, at most 5 %
        are expected to be attack-free, however they depend on each other. NaN where nothing can be said.

    References
    ----------
    .. [1] Benjamini & Yekutieli 2001, Annals of Statistics 29.

    Examples
    --------
    >>> from gradlens import investigate
    >>> from gradlens.examples import example_log
    >>> logs = {"a": example_log(num_malicious=2), "b": example_log(num_malicious=0)}
    >>> table = table_of_cases({name: investigate(log) for name, log in logs.items()})
    >>> table["verdict"].tolist()
    ['established', 'not established']
    """
    from scipy.stats import false_discovery_control

    rows = [
        {
            "recording": name,
            "verdict": case.verdict,
            "p": case.p,
            "q": float("nan"),
            "suspects": ", ".join(case.suspects["client"]),
            "ambiguous": ", ".join(case.ambiguous["client"]),
            "says": case.says[0],
        }
        for name, case in cases.items()
    ]
    table = pd.DataFrame(rows, columns=["recording", "verdict", "p", "q", "suspects", "ambiguous", "says"])
    known = table["p"].notna()
    if known.any():
        table.loc[known, "q"] = false_discovery_control(table.loc[known, "p"].to_numpy(float), method="by")
    return table
