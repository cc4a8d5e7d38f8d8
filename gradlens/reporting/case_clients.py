"""A case file on single clients: when, by what, for which label and with whom; and the table of all clients."""

from typing import Any

import numpy as np
import pandas as pd

from gradlens.case.verdicts import CANNOT_SAY
from gradlens.plots import count
from gradlens.reporting.case_evidence import CaseEvidence
from gradlens.reporting.case_pictures import activity_picture
from gradlens.reporting.page import Block, heading, listed, number, rows_of, table, text
from gradlens.reporting.shared import p_value

MOST_READINGS, MOST_LABELS = 6, 2
FAR = 3.0  # sigmas from which a label's drift is named
OF = {
    "rounds": "its updates, round by round,",
    "totals": "the sum of its updates over all rounds",
    "unexplained": "what its labels leave unexplained of that sum",
}
KINDS = {
    "size": "How far {of} lies from the mean of the clean clients",
    "company": "How alike {of} is to the three most similar clients",
    "spectrum": "How far {of} goes along the direction in which clean clients differ most",
    "distance": "How far {of} lies from the nearer half of the clean clients",
    "pull": "How far {of} goes the same way as that of the three clients who share it most",
    "opposition": "How little its updates agree with the median update of their round",
    "burst": "Its largest update in any round, beside those of others in that round",
}


def reading_in_words(reading: str) -> tuple[str, str]:
    """A reading in plain words, and the layers that it reads.

    Parameters
    ----------
    reading : str
        As `gradlens.case.readings.readings_of` names it.

    Returns
    -------
    tuple of (str, str)

    Examples
    --------
    >>> reading_in_words("opposition, final bias")
    ('How little its updates agree with the median update of their round', 'final bias')
    """
    name, _, role = reading.partition(", ")
    kind, _, of = name.partition(" of ")
    return KINDS.get(kind, name).format(of=OF.get(of, of)).replace("round, lies", "round, lie"), role


def client_blocks(evidence: CaseEvidence, client: str) -> list[Block]:
    """Blocks on one client.

    Parameters
    ----------
    evidence : CaseEvidence
    client : str
        One of `evidence.shown`.

    Returns
    -------
    list of Block
    """
    row = next(row for row in rows_of(evidence.case.clients) if row.client == client)
    status = row.status if client in (*evidence.accused, *evidence.ambiguous) else "most conspicuous, not accused"
    score = (
        f"Score {number(row.score, 1)}, where the threshold is {_threshold(row.threshold)}; p {p_value(row.p)}. "
        f"{when_in_words(row)} {where_in_words(row)}"
    )
    blocks = [heading(f"{client}: {status}"), text(score)]
    if status == "ambiguous":
        blocks.append(text("Its number of examples or its labels may explain what it sent: it is not accused."))
    blocks += [text(sentence) for sentence in (_labels_in_words(evidence, row), _company_in_words(evidence, row))]
    return [*blocks, activity_picture(evidence, client), _readings_table(evidence, client)]


def when_in_words(row: Any) -> str:
    """Since when a client was active, and until when.

    Parameters
    ----------
    row : named tuple
        A row of `Case.clients`.

    Returns
    -------
    str
        A sentence; "" where it was not looked into.
    """
    if pd.isna(row.first_round):
        return ""
    sure = (
        ""
        if row.first_earliest == row.first_latest
        else f" (its begin lies between rounds {row.first_earliest} and {row.first_latest})"
    )
    if row.first_round == row.last_round:
        return f"Active in round {row.first_round} alone{sure}."
    return f"Active from round {row.first_round} to round {row.last_round}{sure}."


def where_in_words(row: Any) -> str:
    """Where a client differs most: a sentence, "" where it was not looked into.

    Parameters
    ----------
    row : named tuple
        A row of `Case.clients`.
    """
    if pd.isna(row.layer):
        return ""
    units = f", units {row.units}" if row.units else ""
    return f"It differs most in layer {row.layer}{units}."


def _labels_in_words(evidence: CaseEvidence, row: Any) -> str:
    label = "" if pd.isna(row.suspected_label) else f"It pushes the model toward label {row.suspected_label}. "
    drift = evidence.label_drift(row.client)
    far = drift[drift["sigmas"].abs() > FAR].head(MOST_LABELS)
    if drift.empty:
        return f"{label}The model does not tell which labels a client has."
    if far.empty:
        return f"{label}Over all rounds its final bias drifted no more than the clean clients' did, for any label."
    parts = [f"label {int(of.label)} ({number(of.sigmas, 1)} sigmas of the clean clients)" for of in rows_of(far)]
    return f"{label}Over all rounds its final bias drifted apart from the clean clients' for {listed(parts)}."


def _company_in_words(evidence: CaseEvidence, row: Any) -> str:
    """With whom it acts, and whom it is most alike."""
    group = next((group for group in evidence.case.groups if row.client in group.clients), None)
    nearest = [f"{near.client} ({number(near.cosine)})" for near in rows_of(evidence.neighbors(row.client))]
    most = number(evidence.most_alike_clean())
    alike = f"Most alike, by the cosine of what they sent over all rounds: {listed(nearest)}"
    alike = f"{alike}; two clean clients are alike by {most} at most."
    if group is None:
        return f"No other suspect is found to act with it. {alike}"
    others = [client for client in group.clients if client != row.client]
    bound = f"mean cosine {number(group.cosine)}, between innocent clients {number(group.innocent)} at most"
    return f"It acts with {listed(others)} (group {group.name}: {bound}). {alike}"


def _readings_table(evidence: CaseEvidence, client: str) -> Block:
    readings = evidence.readings(client)
    rows = []
    for reading in rows_of(readings[readings["adds"] > 0].head(MOST_READINGS)):
        words, role = reading_in_words(reading.reading)
        sigmas, adds = number(reading.sigmas, 1), number(reading.adds)
        rows.append({"What was read": words, "Layers": role, "Sigmas": sigmas, "Adds": adds})
    caption = (
        f"What speaks against {client}: the readings that add most to its score, and how much. Sigmas are robust "
        "standard deviations of clean clients; a negative one lies below their middle."
    )
    return table(rows, caption, folded=False)


def clients_table(evidence: CaseEvidence) -> Block:
    """The table of all clients, the most suspicious first.

    Parameters
    ----------
    evidence : CaseEvidence

    Returns
    -------
    Block
    """
    clients = evidence.case.clients
    if not evidence.ranked:
        return table(
            [{"Client": str(name)} for name in clients["client"]], "The clients by name; none of them is ranked."
        )
    rows = [
        {
            "Rank": str(row.rank),
            "Client": str(row.client),
            "Status": row.status or "–",
            "Score": number(row.score, 1),
            "Above threshold by": "–" if np.isinf(row.threshold) else number(row.score - row.threshold, 1),
            "p": p_value(row.p),
            "Active in rounds": "–" if pd.isna(row.first_round) else f"{row.first_round} to {row.last_round}",
            "Layer": "–" if pd.isna(row.layer) else str(row.layer),
            "Label": "–" if pd.isna(row.suspected_label) else str(row.suspected_label),
            "Group": row.group or "–",
        }
        for row in rows_of(clients)
    ]
    caption = (
        f"All {count(len(rows), 'client')}, the most suspicious first. p: how often an attack-free recording holds a "
        "client so conspicuous. Rounds, label and group were looked into for suspects alone."
    )
    return table(rows, caption, folded=len(rows) > 24)


def next_in_line(evidence: CaseEvidence) -> str:
    """Who comes next and is not accused, and how far below the threshold.

    Parameters
    ----------
    evidence : CaseEvidence

    Returns
    -------
    str
        A sentence.
    """
    if not evidence.ranked:
        return "The clients have no scores, and their order says nothing."
    if evidence.case.verdict == CANNOT_SAY and evidence.case.groups:
        return "Scores are those of one group judged by the other; judged the other way round, others come first."
    spared = evidence.case.clients[evidence.case.clients["status"].eq("next in line")]
    if spared.empty:
        return "Every client is accused or ambiguous: nobody is next in line."
    [row] = rows_of(spared)
    if np.isinf(row.threshold):
        return f"First in line, and not accused, is {row.client} at {number(row.score, 1)}; there is no threshold."
    gap = row.threshold - row.score
    where = f"{number(abs(gap), 1)} {'below' if gap >= 0 else 'above'} the threshold of {number(row.threshold, 1)}"
    if gap < 0:
        where += ", which it does not reach when it is judged without the other conspicuous clients"
    return f"Next in line, and not accused, is {row.client}: its score of {number(row.score, 1)} lies {where}."


def _threshold(value: float) -> str:
    return "none, for want of a null that resolves the rate" if np.isinf(value) else number(value, 1)
