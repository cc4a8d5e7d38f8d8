"""Reports the decisions of a live filter: whose updates were left out or weighed less, in which round, and why."""

import numpy as np
import pandas as pd

from gradlens.plots import count
from gradlens.reporting.page import Block, finding, listed, number, rows_of, table, text
from gradlens.reporting.pictures import weights_picture
from gradlens.reporting.shared import poisoners
from gradlens.run import Run

MOST = 8  # clients named in a sentence


def lowered(run: Run) -> pd.DataFrame:
    """Returns the verdicts on updates with a weight below 1, sorted by round and client.

    Parameters
    ----------
    run : Run
        A run that was recorded with or without a filter.

    Returns
    -------
    pandas.DataFrame
        Rows of `Run.verdicts`.
    """
    verdicts = run.verdicts
    return verdicts[verdicts["weight"].lt(1)].sort_values(["round", "client"], kind="stable")


def by_client(run: Run) -> pd.DataFrame:
    """Summarizes the filter's decisions per client, for clients whose weight was ever below 1.

    Parameters
    ----------
    run : Run
        A run that was recorded with or without a filter.

    Returns
    -------
    pandas.DataFrame
        Columns client, rounds (with a verdict), out (rounds in which it was left out), less (rounds with a weight
        between 0 and 1), weight (mean over the latter, NaN without any), flags, reasons (a list). The client with the
        smallest mean weight comes first.
    """
    verdicts = run.verdicts
    rows = []
    for client, reduced in lowered(run).groupby("client", sort=False):
        of_client, less = verdicts[verdicts["client"].eq(client)], reduced.loc[reduced["weight"].gt(0), "weight"]
        rows.append(
            {
                "client": str(client),
                "rounds": len(of_client),
                "out": int(reduced["weight"].eq(0).sum()),
                "less": len(less),
                "weight": less.mean(),
                "flags": int(of_client["flag"].astype(bool).sum()),
                "reasons": list(dict.fromkeys(filter(None, reduced["reason"]))),
                "counted": of_client["weight"].mean(),
            }
        )
    columns = ["client", "rounds", "out", "less", "weight", "flags", "reasons", "counted"]
    clients = pd.DataFrame(rows, columns=columns).sort_values(["counted", "client"], kind="stable")
    return clients.drop(columns="counted").reset_index(drop=True)


def live(run: Run) -> Block | None:
    """Writes the finding on the live filter.

    Parameters
    ----------
    run : Run
        The reported run.

    Returns
    -------
    Block or None
        A sentence and a line per affected client, at most 8; None if no filter ran.
    """
    verdicts = run.verdicts
    if verdicts.empty:
        return None
    out, less = verdicts["weight"].eq(0), verdicts["weight"].between(0, 1, inclusive="neither")
    malicious = poisoners(run) if run.has_truth else None
    poisoned = pd.Series(False, verdicts.index)
    if malicious is not None:
        truth = verdicts[["round", "client"]].merge(run.truth, on=["round", "client"], how="left")
        poisoned = truth["poisoned"].eq(True).set_axis(verdicts.index)
    parts = [
        f"{verb} {which.sum()}{suffix}{'' if malicious is None else f' ({(which & poisoned).sum()} of them poisoned)'}"
        for verb, which, suffix in (("kept out", out, ""), ("let", less, " count less"))
        if which.any()
    ]
    sentence = f"Of {count(len(verdicts), 'update')} a live filter {' and '.join(parts) or 'let all count in full'}"
    if passed := int((poisoned & ~out & ~less).sum()):
        sentence += f"; {count(passed, 'poisoned update')} counted in full"
    clients = by_client(run)
    lines = []
    for row in rows_of(clients.head(MOST)):
        decisions = [f"kept out in {row.out}"] * bool(row.out)
        decisions += [f"counted {number(row.weight)} on average in {row.less}"] * bool(row.less)
        label = "" if malicious is None else (", malicious" if row.client in malicious else ", benign")
        lines.append(f"{row.client}: {' and '.join(decisions)} of {count(row.rounds, 'round')}{label}")
    if len(clients) > MOST:
        lines.append(f"and {len(clients) - MOST} more, in section 6")
    return finding("Filter", f"{sentence}; {count(len(clients), 'client')} affected.", lines)


def live_section(run: Run, control: Run | None, alone: str) -> list[Block]:
    """Writes the section on the live filter: a heat map of weights and a table each of clients and updates.

    Parameters
    ----------
    run : Run
        The reported run.
    control : Run or None
        Its attack-free control.
    alone : str
        Sentence that the caption gets if the control has no verdicts to compare.

    Returns
    -------
    list of Block
        A single sentence if no filter ran.
    """
    verdicts = run.verdicts
    if verdicts.empty:
        return [text("No filter ran while this run was recorded: every update that could be recorded was aggregated.")]
    names = listed(list(dict.fromkeys(verdicts["detector"].astype(str))))
    blocks = [text(f"The filter went by {names}. An update counts 1 as it came, 0 where it was left out.")]
    if abstentions := _abstained(verdicts):
        blocks.append(table(abstentions, "Rounds in which the filter's detector gave no verdict."))
    clients = by_client(run)
    if clients.empty:
        return [*blocks, text("Every update counted in full.")]
    truth = run.truth if run.has_truth else None
    malicious = None if truth is None else poisoners(run)
    control_verdicts = None if control is None or control.verdicts.empty else control.verdicts
    blocks.append(weights_picture(verdicts, control_verdicts, truth, alone))
    rows = [
        {
            "Client": row.client,
            **({} if malicious is None else {"Truth": "malicious" if row.client in malicious else "benign"}),
            "Rounds": str(row.rounds),
            "Flagged": str(row.flags),
            "Left out": str(row.out),
            "Counted less": str(row.less),
            "Its mean weight there": number(row.weight) if row.less else "–",
            "Reasons": listed(row.reasons, 3),
        }
        for row in rows_of(clients)
    ]
    blocks.append(table(rows, "Clients that did not always count in full, the one that counted least first."))
    return [*blocks, table(_reduced_updates(run), "Every update that did not count in full, and why.", folded=True)]


def _reduced_updates(run: Run) -> list[dict[str, str]]:
    """Lists the rows of the table of updates with a weight below 1."""
    return [
        {
            "Round": str(row.round),
            "Client": str(row.client),
            "Score": number(row.score) if np.isfinite(row.score) else str(row.score),
            "Flagged": "yes" if row.flag else "",
            "Weight": number(row.weight, 3),
            "Reason": str(row.reason),
        }
        for row in rows_of(lowered(run))
    ]


def _abstained(verdicts: pd.DataFrame) -> list[dict[str, str]]:
    """Lists the reasons why the detector abstained, with the number of rounds, the first and the last."""
    without_verdict = verdicts[verdicts["abstained"].ne("")]
    rounds = without_verdict.groupby("abstained", sort=False)["round"].agg(["nunique", "min", "max"])
    return [
        {"Reason": str(reason), "Rounds": str(row["nunique"]), "First": str(row["min"]), "Last": str(row["max"])}
        for reason, row in rounds.iterrows()
    ]
