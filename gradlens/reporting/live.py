"""What the filter of a run decided while it ran: who was left out, who counted less, in which round, and why."""

import numpy as np
import pandas as pd

from gradlens.plots import count
from gradlens.reporting.page import Block, finding, listed, number, rows_of, table, text
from gradlens.reporting.pictures import weights_picture
from gradlens.reporting.shared import poisoners
from gradlens.run import Run

MOST = 8  # clients named in a sentence


def lowered(run: Run) -> pd.DataFrame:
    """The verdicts on updates that did not count in full, in the order of rounds and clients."""
    found = run.verdicts
    return found[found["weight"].lt(1)].sort_values(["round", "client"], kind="stable")


def by_client(run: Run) -> pd.DataFrame:
    """A row per client that did not always count in full, the one that counted least first.

    Columns: client, rounds (with a verdict), out, less (rounds in which it was left out, or counted less), weight (its
    mean where it counted less, else NaN), flags, reasons (a list).
    """
    verdicts, part = run.verdicts, lowered(run)
    rows = []
    for client, own in part.groupby("client", sort=False):
        everything, less = verdicts[verdicts["client"].eq(client)], own.loc[own["weight"].gt(0), "weight"]
        rows.append(
            {
                "client": str(client),
                "rounds": len(everything),
                "out": int(own["weight"].eq(0).sum()),
                "less": len(less),
                "weight": less.mean(),
                "flags": int(everything["flag"].astype(bool).sum()),
                "reasons": list(dict.fromkeys(filter(None, own["reason"]))),
                "counted": everything["weight"].mean(),
            }
        )
    columns = ["client", "rounds", "out", "less", "weight", "flags", "reasons", "counted"]
    found = pd.DataFrame(rows, columns=columns).sort_values(["counted", "client"], kind="stable")
    return found.drop(columns="counted").reset_index(drop=True)


def live(run: Run) -> Block | None:
    """The finding, None where no filter ran."""
    verdicts = run.verdicts
    if verdicts.empty:
        return None
    out, less = verdicts["weight"].eq(0), verdicts["weight"].between(0, 1, inclusive="neither")
    known = poisoners(run) if run.has_truth else None
    poisoned = pd.Series(False, verdicts.index)
    if known is not None:
        said = verdicts[["round", "client"]].merge(run.truth, on=["round", "client"], how="left")
        poisoned = said["poisoned"].eq(True).set_axis(verdicts.index)
    parts = [
        f"{verb} {which.sum()}{done}{'' if known is None else f' ({(which & poisoned).sum()} of them poisoned)'}"
        for verb, which, done in (("kept out", out, ""), ("let", less, " count less"))
        if which.any()
    ]
    sentence = f"Of {count(len(verdicts), 'update')} a live filter {' and '.join(parts) or 'let all count in full'}"
    if passed := int((poisoned & ~out & ~less).sum()):
        sentence += f"; {count(passed, 'poisoned update')} counted in full"
    clients = by_client(run)
    lines = []
    for row in rows_of(clients.head(MOST)):
        done = [f"kept out in {row.out}"] * bool(row.out)
        done += [f"counted {number(row.weight)} on average in {row.less}"] * bool(row.less)
        label = "" if known is None else (", malicious" if row.client in known else ", benign")
        lines.append(f"{row.client}: {' and '.join(done)} of {count(row.rounds, 'round')}{label}")
    if len(clients) > MOST:
        lines.append(f"and {len(clients) - MOST} more, in section 6")
    return finding("Filter", f"{sentence}; {count(len(clients), 'client')} affected.", lines)


def live_section(run: Run, control: Run | None, alone: str) -> list[Block]:
    """What was decided on each client and round: a picture and two tables; one sentence where no filter ran.

    alone: what a figure says that has no control beside it.
    """
    verdicts = run.verdicts
    if verdicts.empty:
        return [text("No filter ran while this run was recorded: every update that could be recorded was aggregated.")]
    names = listed(list(dict.fromkeys(verdicts["detector"].astype(str))))
    blocks = [text(f"The filter went by {names}. An update counts 1 as it came, 0 where it was left out.")]
    if silent := _abstained(verdicts):
        blocks.append(table(silent, "Rounds in which the filter's detector gave no verdict."))
    clients = by_client(run)
    if clients.empty:
        return [*blocks, text("Every update counted in full.")]
    truth = run.truth if run.has_truth else None
    known = None if truth is None else poisoners(run)
    free = None if control is None or control.verdicts.empty else control.verdicts
    blocks.append(weights_picture(verdicts, free, truth, alone))
    rows = [
        {
            "Client": row.client,
            **({} if known is None else {"Truth": "malicious" if row.client in known else "benign"}),
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
    return [*blocks, table(_each(run), "Every update that did not count in full, and why.", folded=True)]


def _each(run: Run) -> list[dict[str, str]]:
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
    part = verdicts[verdicts["abstained"].ne("")]
    found = part.groupby("abstained", sort=False)["round"].agg(["nunique", "min", "max"])
    return [
        {"Reason": str(reason), "Rounds": str(row["nunique"]), "First": str(row["min"]), "Last": str(row["max"])}
        for reason, row in found.iterrows()
    ]
