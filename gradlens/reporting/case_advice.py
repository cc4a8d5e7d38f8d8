"""What to do after a verdict, in plain words, and what no verdict says."""

import numpy as np
import pandas as pd

from gradlens.case.null import needed
from gradlens.case.peeling import SMALLEST
from gradlens.case.verdicts import ESTABLISHED, NOT_ESTABLISHED, SUSPECTED
from gradlens.plots import percent
from gradlens.reporting.case_evidence import CaseEvidence
from gradlens.reporting.page import listed


def advice(evidence: CaseEvidence, *, intact: bool) -> tuple[str, list[str]]:
    """What to do next: a sentence and the steps.

    Parameters
    ----------
    evidence : CaseEvidence
    intact : bool
        Whether the recording is what was recorded.

    Returns
    -------
    tuple of (str, list of str)
    """
    if not intact:
        return "Find out who changed the evidence before anything else, and do not act on this page.", []
    steps = {ESTABLISHED: _established, SUSPECTED: _suspected, NOT_ESTABLISHED: _nothing}
    sentence, points = steps.get(evidence.case.verdict, _cannot_say)(evidence)
    noted = f"Keep the recording as it is, and note its head in another place: {evidence.run.head}"
    return sentence, [*points, noted]


def unsaid(verdict: str) -> list[str]:
    """What no verdict says, as points of a list.

    Parameters
    ----------
    verdict : str

    Returns
    -------
    list of str

    Examples
    --------
    >>> unsaid("established")[0]
    'Whether it was done on purpose: a broken device or unusual data can look like an attack.'
    """
    purpose = "Whether it was done on purpose: a broken device or unusual data can look like an attack."
    behind = "Who is behind a client: a name is what the server was told."
    rest = "That the others are innocent: an attacker who hides among them is not found."
    return [purpose, behind, rest] if verdict == ESTABLISHED else [rest]


def _established(evidence: CaseEvidence) -> tuple[str, list[str]]:
    names, case = evidence.accused, evidence.case
    points = [
        f"Leave {listed(names)} out of further rounds until this is explained.",
        "Compute what the model would have been without them: gradlens replay, as written out in the last section.",
        "Ask those who run them for their training data and logs.",
    ]
    begins = case.suspects["first_earliest"].dropna()
    if len(begins):
        points.append(
            f"Do not rely on the models from round {int(begins.min())} on: the accused may have been active from then."
        )
    if evidence.ambiguous:
        points.append(f"Of {listed(evidence.ambiguous)}, ask how many examples and which labels they have.")
    return "Act on the accused, and keep the evidence.", points


def _suspected(evidence: CaseEvidence) -> tuple[str, list[str]]:
    points = [
        "Do not leave anybody out for this: attack-free recordings hold such clients, too.",
        "Record more rounds and investigate again, with --looks, which counts that you looked more than once.",
        _better_null(evidence),
    ]
    if evidence.ambiguous:
        points.insert(1, f"Ask {listed(evidence.ambiguous)} how many examples and which labels they have.")
    return "Collect more evidence.", points


def _nothing(evidence: CaseEvidence) -> tuple[str, list[str]]:
    points = [f"If you have another reason for suspicion: {_lower(_better_null(evidence))}"]
    return "Nothing has to be done.", points


def _cannot_say(evidence: CaseEvidence) -> tuple[str, list[str]]:
    case = evidence.case
    if case.clients["rank"].isna().any():
        needs = f"Record rounds in which at least {SMALLEST} clients send updates that can be compared."
        return "A verdict needs more clients or other rounds.", [needs]
    if case.null.resolves > case.fwer or np.isinf(case.clients["threshold"].iloc[0]):
        higher = f"Or ask for a rate that this null resolves: --fwer {_rate(case.null.resolves)}"
        return "A verdict needs more attack-free recordings.", [_better_null(evidence), higher]
    return (
        "A verdict needs to know which of the groups is honest.",
        [
            "Find that out by other means: look into the data of a few clients of each group.",
            "Until then trust neither group's updates more than the other's.",
        ],
    )


def _better_null(evidence: CaseEvidence) -> str:
    number, rate = needed(evidence.case.fwer), percent(evidence.case.fwer)
    return (
        f"Record at least {number} attack-free runs of this very setting (a rate of {rate} needs as many), and compare "
        "with them: --null FOLDER"
    )


def _rate(resolves: float) -> str:
    return "1" if pd.isna(resolves) else f"{np.ceil(resolves * 1000) / 1000:g}"


def _lower(sentence: str) -> str:
    return sentence[:1].lower() + sentence[1:]
