"""A case in three plain sentences: what was found, how sure, what cannot be told."""

import pandas as pd

from gradlens.case.accomplices import Group
from gradlens.case.null import Null, needed
from gradlens.case.spikes import SIZES
from gradlens.case.verdicts import CANNOT_SAY, ESTABLISHED, SUSPECTED, Finding
from gradlens.words import count, percent

MOST_NAMED = 6


def sayings(
    verdict: str,
    clients: pd.DataFrame,
    finding: Finding,
    null: Null,
    fwer: float,
    rounds: int,
    groups: list[Group],
    seen: float | None,
) -> tuple[str, str, str]:
    """The three sentences.

    Parameters
    ----------
    verdict : str
    clients : pandas.DataFrame
        The table of a case.
    finding : Finding
    null : Null
    fwer : float
    rounds : int
        Of the recording.
    groups : list of Group
    seen : float or None
        The smallest planted deviation that would have been found; None where it was not tried or none was.

    Examples
    --------
    >>> from gradlens import investigate
    >>> from gradlens.examples import example_log
    >>> investigate(example_log(num_malicious=2)).says[0].partition(":")[0]
    '2 of 10 clients stand out over 4 rounds'
    """
    found = _found(verdict, clients, finding, null, fwer, rounds, groups)
    sure, untold = _sure(verdict, finding, null, fwer), _untold(verdict, clients, seen)
    return with_plain_spaces(found), with_plain_spaces(sure), with_plain_spaces(untold)


def with_plain_spaces(text: str) -> str:
    r"""The text as a terminal takes it: no-break spaces would be printed as escapes.

    Examples
    --------
    >>> with_plain_spaces("5\N{NO-BREAK SPACE}%")
    '5 %'
    """
    return text.replace("\N{NO-BREAK SPACE}", " ")


def _found(
    verdict: str,
    clients: pd.DataFrame,
    finding: Finding,
    null: Null,
    fwer: float,
    rounds: int,
    groups: list[Group],
) -> str:
    accused = clients.loc[clients["status"] == "accused", "client"].tolist()
    ambiguous = clients.loc[clients["status"] == "ambiguous", "client"].tolist()
    first, over = clients["client"].iloc[0], f"over {count(rounds, 'round')}"
    if verdict == ESTABLISHED:
        verb = "stands" if len(accused) == 1 else "stand"
        together = "".join(
            f"; {listed(group.clients)} act together, being alike by {group.cosine:.2f} where innocent clients are by "
            f"{group.innocent:.2f} at most"
            for group in groups
        )
        return f"{len(accused)} of {len(clients)} clients {verb} out {over}: {listed(accused)}{together}."
    if verdict == CANNOT_SAY and finding.undecided is not None:
        one, other = groups
        return (
            f"The {len(clients)} clients fall into two groups, one of {len(one.clients)} ({listed(one.clients)}) and "
            f"one of {len(other.clients)} ({listed(other.clients)}), and it cannot be told which of them is honest."
        )
    if verdict == CANNOT_SAY:
        are = "is 1" if null.recordings == 1 else f"are {null.recordings}"
        return (
            f"Nobody is accused, since the null is too small for a rate of {percent(fwer)}: {needed(fwer)} attack-free "
            f"recordings of this setting are needed, there {are}; {first} is the most conspicuous."
        )
    if ambiguous:
        verb = "stands" if len(ambiguous) == 1 else "stand"
        return (
            f"{listed(ambiguous)} of {len(clients)} clients {verb} out {over}, but the number of examples or "
            "labels of one kind may explain it: nobody is accused."
        )
    if verdict == SUSPECTED:
        return f"Nobody is accused; {first} is more conspicuous {over} than most attack-free recordings have a client."
    return f"Nothing was found: no client stands out {over} more than clients of attack-free recordings do."


def _sure(verdict: str, finding: Finding, null: Null, fwer: float) -> str:
    rests = f"This rests on {null.says}."
    if verdict == CANNOT_SAY and finding.undecided is None:
        return f"p cannot be less than {null.resolves:.3f} with this null. {rests}"
    anybody = f"a client so conspicuous is in at most {percent(finding.p)} of recordings without an attack"
    if verdict == ESTABLISHED:
        return (
            f"p = {finding.p:.3f}: {anybody}, and at most {percent(fwer)} of those would see anybody accused. {rests}"
        )
    return f"p = {finding.p:.3f}: {anybody}. {rests}"


def _untold(verdict: str, clients: pd.DataFrame, seen: float | None) -> str:
    if verdict == ESTABLISHED:
        spared = clients[clients["status"] == "next in line"]
        following = (
            f" Next in line, and not accused, is {spared['client'].iloc[0]} at {spared['score'].iloc[0]:.1f}, where "
            f"the threshold is {spared['threshold'].iloc[0]:.1f}."
            if len(spared)
            else ""
        )
        return (
            "What was sent differs; whether on purpose, it cannot tell, and while somebody attacks innocent clients "
            f"differ more than in the null.{following}"
        )
    if verdict == CANNOT_SAY:
        return "The ranking is shown all the same; a place in it is no accusation."
    if seen is None:
        return f"Not even a planted deviation {SIZES[-1]:g} times a typical client's would surely have been found here."
    return (
        f"A client that in every round had added {seen:g} times a typical client's deviation would have been found in "
        "8 of 10 trials; a weaker or a well-hidden attack may be there."
    )


def listed(names: "list[str] | tuple[str, ...]") -> str:
    """Names as words: the first six, and how many more.

    Examples
    --------
    >>> listed(["a", "b", "c"])
    'a, b and c'
    """
    if len(names) > MOST_NAMED:
        return f"{', '.join(names[:MOST_NAMED])} and {len(names) - MOST_NAMED} more"
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
