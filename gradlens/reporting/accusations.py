"""The case of a run as the first finding of its report."""

from collections.abc import Collection
from typing import Any

import pandas as pd

from gradlens.case import Case
from gradlens.reporting.page import Block, finding, listed, rows_of

MOST = 8  # clients named one by one


def who(case: Case, malicious: Collection[str] | None) -> Block:
    """The verdict and its three sentences, then a line per suspect.

    Parameters
    ----------
    case : Case
    malicious : collection of str or None
        Clients that sent poison by the ground truth; None where there is none.

    Returns
    -------
    Block

    Examples
    --------
    >>> from gradlens import investigate
    >>> from gradlens.examples import example_log
    >>> who(investigate(example_log(num_malicious=2)), None)["text"].partition(" over")[0]
    'Established. 2 of 10 clients stand out'
    """
    suspects = rows_of(pd.concat([case.suspects, case.ambiguous]))
    lines = [_line(row, malicious) for row in suspects[:MOST]]
    if len(suspects) > MOST:
        lines.append(f"and {len(suspects) - MOST} more")
    if missed := [client for client in malicious or () if client not in set(case.suspects["client"])]:
        lines.append(f"malicious and not accused: {listed(missed)}")
    return finding("Who", f"{case.verdict.capitalize()}. {' '.join(case.says)}", lines)


def named(case: Case) -> list[str]:
    """The accused clients, then those whose examples or labels may explain it.

    Parameters
    ----------
    case : Case

    Examples
    --------
    >>> from gradlens import investigate
    >>> from gradlens.examples import example_log
    >>> named(investigate(example_log(num_malicious=2)))
    ['client-9', 'client-8']
    """
    return [*case.suspects["client"].tolist(), *case.ambiguous["client"].tolist()]


def _line(row: Any, malicious: Collection[str] | None) -> str:
    """One suspect: since when, where, which label it pushes, and what the ground truth says of it."""
    parts = [row.status if row.status == "accused" else "stands out, not accused"]
    if not pd.isna(row.first_round):
        parts.append(f"since round {row.first_round}{_between(row)}")
    if not pd.isna(row.layer):
        parts.append(f"most of all in {row.layer}")
    if not pd.isna(row.suspected_label):
        parts.append(f"toward label {row.suspected_label}")
    if malicious is not None:
        parts.append("malicious" if row.client in malicious else "benign")
    return f"{row.client}: {', '.join(parts)}"


def _between(row: Any) -> str:
    """The rounds between which the first one lies, where they are several."""
    if pd.isna(row.first_earliest) or row.first_earliest == row.first_latest:
        return ""
    return f" (between {row.first_earliest} and {row.first_latest})"
