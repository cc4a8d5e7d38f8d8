"""`investigate`: one answer for one recording."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from gradlens.attribution import suspected_labels
from gradlens.case.accomplices import Group, both_groups, groups_of
from gradlens.case.activity import activity, stretch_of
from gradlens.case.explanations import claimed_examples, left_unexplained
from gradlens.case.looks import looks_of
from gradlens.case.null import Null, null_of
from gradlens.case.peeling import SMALLEST
from gradlens.case.places import layers_of, units_of
from gradlens.case.sayings import sayings
from gradlens.case.scoring import Scoring, scales_of
from gradlens.case.shipped import reference
from gradlens.case.spikes import smallest_seen
from gradlens.case.sums import Sums, sums_of
from gradlens.case.verdicts import CANNOT_SAY, ESTABLISHED, NOT_ESTABLISHED, SUSPECTED, SUSPICION, Finding, look
from gradlens.detectors.nulls import attack_free
from gradlens.errors import CannotSay, InputError
from gradlens.log import UpdateLog
from gradlens.log.adapters import judged
from gradlens.words import count

COLUMNS = (
    "client", "rank", "p", "score", "threshold", "status", "first_round", "first_earliest", "first_latest",
    "last_round", "layer", "units", "statistics", "suspected_label", "group",
)  # fmt: skip
BLANK = dict.fromkeys(COLUMNS, pd.NA) | {"units": "", "group": ""}  # of what was not looked into
SAMPLED = 0.75  # share of all clients in a typical round, below which clients count as sampled
SPEAKING, STANDS_OUT = 3, 3.5  # statistics named per client; robust sigmas from which on a suspected label is named


@dataclass(frozen=True, eq=False)
class Case:
    """The answer for a recording: who, how sure, since when, where, and what cannot be told.

    Attributes
    ----------
    verdict : str
        "established": somebody is accused, p <= fwer. "suspected": p <= .2, nobody is accused. "not established":
        neither. "cannot say": the null cannot resolve the rate, the clients fall into two groups of which it cannot be
        told which one is honest, or they are too few.
    p : float
        Of the recording: how often an attack-free one holds a client as conspicuous. NaN where it cannot be said.
    suspects : pandas.DataFrame
        A row per accused client, columns as in `clients`.
    ambiguous : pandas.DataFrame
        Clients that stand out as much, but whose number of examples or single label may explain it: not accused.
    clients : pandas.DataFrame
        A row per client, the most suspicious first: client; rank; p (how often an attack-free recording holds a client
        as conspicuous); score; threshold; status ("accused", "ambiguous", "next in line" or ""); first_round,
        between first_earliest and first_latest, and last_round of its activity; layer and units where it differs most;
        statistics that speak; suspected_label; group. What was not looked into is missing.
    groups : tuple of Group
        Suspects who act together; where it cannot be told which side is honest, both sides.
    null : Null
        What it rests on.
    fwer : float
        The rate of attack-free recordings in which anybody may be accused.
    says : tuple of str
        Three sentences: what was found, how sure, what cannot be told.

    Examples
    --------
    >>> from gradlens.examples import example_log
    >>> case = investigate(example_log(num_malicious=2))
    >>> case.verdict, sorted(case.suspects["client"])
    ('established', ['client-8', 'client-9'])
    """

    verdict: str
    p: float
    suspects: pd.DataFrame
    ambiguous: pd.DataFrame
    clients: pd.DataFrame
    groups: tuple[Group, ...]
    null: Null
    fwer: float
    says: tuple[str, str, str]

    def __str__(self) -> str:
        return "\n".join((f"verdict: {self.verdict}", *self.says))

    def as_dict(self) -> dict[str, Any]:
        """The case as plain values, as `gradlens investigate --json` prints it."""
        return {
            "verdict": self.verdict,
            "p": _plain(self.p),
            "suspects": _rows(self.suspects),
            "ambiguous": _rows(self.ambiguous),
            "groups": [
                {**group._asdict(), "clients": list(group.clients), "innocent": _plain(group.innocent)}
                for group in self.groups
            ],
            "clients": _rows(self.clients),
            "null": {
                "kind": self.null.kind,
                "recordings": self.null.recordings,
                "settings": len(self.null.highest),
                "clients": self.null.clients,
                "resolves": self.null.resolves,
                "says": self.null.says,
            },
            "fwer": self.fwer,
            "says": list(self.says),
        }


def investigate(run: Any, null: Any = None, fwer: float = 0.05, *, looks: bool = False) -> Case:
    """Concludes from a recording which of its clients, if any, can be accused of poisoning.

    Parameters
    ----------
    run : Run or UpdateLog
        The recording.
    null : None, Run, UpdateLog, Sweep, sequence of them, or int
        What to compare with: attack-free recordings of the same setting, at least 19 for a rate of 5 %; or the number
        of first rounds of this recording that are known to be clean, which widen the scales where benign clients of
        this setting differ more than elsewhere; None takes the reference shipped with gradlens.
    fwer : float
        Share of attack-free recordings in which anybody at all may be accused.
    looks : bool
        Whether to conclude after 1, 2, 4, 8, ... rounds and the last, as on a live server. Who was accused at one look
        stays accused, and the rate covers all of them.

    Returns
    -------
    Case

    Raises
    ------
    InputError
        If the null is none of these, is of another model, holds an update that its own truth calls poisoned, or `fwer`
        is not between 0 and 1.

    Notes
    -----
    The recording is summed up once. Each client's readings are compared with those of the clients thought clean, at
    first everybody; their weights were learned from simulated recordings (`gradlens.case.shipped`). The most
    conspicuous client is taken out, everything is computed anew, and so on to 45 % of the clients (`peel`); the largest
    height is the statistic of the recording. Its null is the same procedure on attack-free recordings. Suspects are
    those taken out up to the deepest significant height who are significant again when put back alone. Where a quarter
    of the clients or more stand apart from the others, they are accused only if they, rather than the others, look as
    malicious sides do (`gradlens.case.camps`).

    The rate is that of attack-free recordings. In attacked ones innocent clients react to the attack, and how often
    they are accused is measured, not guaranteed: see the results.

    Examples
    --------
    >>> from gradlens.examples import example_log
    >>> case = investigate(example_log(num_malicious=0))
    >>> case.verdict, len(case.suspects)
    ('not established', 0)
    """
    if not 0 < fwer < 1:
        raise InputError(f"fwer: expected a rate between 0 and 1, found {fwer}")
    log = log_of(run)
    basis = basis_of(log, null, looks)
    try:
        sums = sums_of(log)
    except CannotSay as reason:
        return _silent(log, basis, fwer, str(reason))
    if len(sums.clients) < SMALLEST:
        return _silent(log, basis, fwer, f"{count(len(sums.clients), 'client')} took part, {SMALLEST} are needed")
    finding = _looked(log, sums, basis, fwer, looks)
    return _case(log, sums, finding, basis, fwer)


def log_of(run: Any) -> UpdateLog:
    """The log of a run, or the log itself; raises InputError for anything else."""
    log = getattr(run, "log", run)
    if not isinstance(log, UpdateLog):
        raise InputError(f"investigate: expected a run or a log, found a {type(run).__name__}")
    if not len(log):
        raise InputError("investigate: the recording has no round")
    return judged(log)


def basis_of(log: UpdateLog, null: Any, looks: bool = False) -> Null:
    """The null that `investigate` was given, in a form that tells p."""
    if null is None:
        return reference().null(sampled=is_sampled(log), looks=looks)
    if isinstance(null, int) and not isinstance(null, bool):
        return _widened(log, null, reference().null(sampled=is_sampled(log), looks=looks))
    logs = [] if isinstance(null, Null) else [log_of(attack_free(run)) for run in _several(null)]
    models = [null.model] if isinstance(null, Null) else [other.model for other in logs]
    if any(model not in (None, log.model) for model in models):
        raise InputError("investigate: the null must be recordings of the same model, found another one")
    if isinstance(null, Null):
        return null
    if not logs:
        raise InputError("investigate: expected attack-free recordings, found none")
    return null_of([_sums_at_looks(other, looks) for other in logs], reference().scoring, log.model)


def is_sampled(log: UpdateLog) -> bool:
    """Whether fewer than three quarters of all clients take part in a typical round.

    Examples
    --------
    >>> from gradlens.examples import example_log
    >>> is_sampled(example_log())
    False
    """
    cohorts = [len(round_.clients) for round_ in log]
    everybody = {client for round_ in log for client in round_.clients.tolist()}
    return bool(np.median(cohorts) < SAMPLED * len(everybody))


def _several(null: Any) -> list[Any]:
    """The runs or logs that a null names."""
    if isinstance(null, UpdateLog) or hasattr(null, "log"):
        return [null]
    runs = getattr(null, "runs", null)
    if isinstance(runs, str) or not isinstance(runs, Iterable):
        raise InputError(
            "investigate: null: expected attack-free runs or logs, or the number of clean rounds, found "
            f"{null if isinstance(null, bool) else f'a {type(null).__name__}'}"
        )
    return list(runs)


def _widened(log: UpdateLog, rounds: int, basis: Null) -> Null:
    """The reference, with wider scales where benign clients of this recording differ more than those of others."""
    if not 1 <= rounds <= len(log):
        raise InputError(
            f"investigate: clean rounds: expected 1 to {len(log)}, the rounds of the recording, found {rounds}"
        )
    here = scales_of([sums_of(log[:rounds])], basis.scoring.readings)
    scoring = replace(basis.scoring, scales=np.fmax(basis.scoring.scales, here))
    says = f"{basis.says}. Its scales are widened by {count(rounds, 'first round')} declared clean"
    return replace(basis, kind="clean stretch", scoring=scoring, says=says)


def _sums_at_looks(log: UpdateLog, looks: bool) -> list[Sums]:
    """The sums of a log after its last round, or after each look."""
    return [sums_of(log[:stop]) for stop in (looks_of(len(log)) if looks else [len(log)])]


def _looked(log: UpdateLog, sums: Sums, basis: Null, fwer: float, looks: bool) -> Finding:
    """What the last look finds; with earlier ones an accusation of theirs stands, and p is the smallest."""
    finding = look(sums, basis, fwer)
    for stop in looks_of(len(log))[:-1] if looks else []:
        early = sums_of(log[:stop])
        if len(early.clients) >= SMALLEST:
            before = look(early, basis, fwer)
            stands = finding.suspects | np.isin(sums.clients, early.clients[before.suspects])
            finding = replace(finding, suspects=stands, p=min(finding.p, before.p))
    return finding


class Details(NamedTuple):
    """What is known of some clients, client -> column -> value, and their groups."""

    of: dict[str, dict[str, Any]]
    groups: list[Group]


def _case(log: UpdateLog, sums: Sums, finding: Finding, basis: Null, fwer: float) -> Case:
    """The case that follows from what was found."""
    threshold = basis.threshold(fwer)
    unresolved = basis.resolves > fwer
    left = left_unexplained(sums, basis.scoring, ~finding.suspects, claimed_examples(log))
    ambiguous = finding.suspects & (left <= threshold)
    accused = finding.suspects & ~ambiguous
    if finding.undecided is not None or unresolved:
        ambiguous, accused = np.zeros_like(ambiguous), np.zeros_like(accused)
    verdict = _verdict(finding, accused, fwer, unresolved)
    details = _details(log, sums, basis.scoring, finding)
    clients = _table(sums, finding, basis, threshold, accused, ambiguous, details)
    of_status = {
        status: clients[clients["status"] == status].reset_index(drop=True) for status in ("accused", "ambiguous")
    }
    seen = smallest_seen(sums, basis.scoring, threshold) if verdict in (NOT_ESTABLISHED, SUSPECTED) else None
    says = sayings(verdict, clients, finding, basis, fwer, len(log), details.groups, seen)
    return Case(
        verdict,
        finding.p,
        of_status["accused"],
        of_status["ambiguous"],
        clients,
        tuple(details.groups),
        basis,
        fwer,
        says,
    )


def _verdict(finding: Finding, accused: np.ndarray, fwer: float, unresolved: bool) -> str:
    if unresolved or finding.undecided is not None:
        return CANNOT_SAY
    if accused.any():
        return ESTABLISHED
    return SUSPECTED if finding.p <= max(SUSPICION, fwer) else NOT_ESTABLISHED


def _details(log: UpdateLog, sums: Sums, scoring: Scoring, finding: Finding) -> Details:
    """When, where and with whom, of every suspect; what speaks against whom, of everybody."""
    suspects, camp = finding.suspects, finding.undecided
    parts, clean = scoring.parts(sums, ~suspects), ~suspects
    layers = layers_of(sums, clean)
    found: dict[str, dict[str, Any]] = {}
    for position, client in enumerate(sums.clients.tolist()):
        speaking = [place for place in np.argsort(-parts[position])[:SPEAKING] if parts[position, place] > 0]
        found[client] = {"layer": str(layers[position]), "statistics": "; ".join(scoring.readings[p] for p in speaking)}
    groups = groups_of(sums, suspects) if camp is None else both_groups(sums, camp)
    for group in groups:
        for client in group.clients:
            found[client]["group"] = group.name
    if not suspects.any():
        return Details(found, groups)
    active, labels = activity(log, sums, clean), dict[tuple[int, ...], pd.DataFrame]()
    for position in np.flatnonzero(suspects):
        client = str(sums.clients[position])
        stretch = stretch_of(active[:, position])
        units = units_of(log, client, str(layers[position]), sums.clients[clean])
        found[client]["units"] = ", ".join(map(str, units))
        if stretch is not None:
            indices = [log[place].index for place in stretch]
            found[client] |= dict(
                zip(("first_round", "last_round", "first_earliest", "first_latest"), indices, strict=True)
            )
            found[client] |= {"suspected_label": _label(log, client, range(stretch.first, stretch.last + 1), labels)}
    return Details(found, groups)


def _label(log: UpdateLog, client: str, positions: Sequence[int], known: dict[tuple[int, ...], pd.DataFrame]) -> Any:
    """The label that a client pushes in its attacked rounds; <NA> where that does not stand out of the cohort's.

    Accomplices have attacked rounds in common: `known` keeps the labels of all clients by the rounds they rest on.
    """
    present = tuple(place for place in positions if client in log[place].clients.tolist())
    if not present:
        return pd.NA
    try:
        if present not in known:
            known[present] = suspected_labels(log[: present[-1] + 1], [log[place].index for place in present])
    except CannotSay:
        return pd.NA
    labels = known[present]
    if client not in labels.index or not labels["strength"][client] > STANDS_OUT:
        return pd.NA
    return labels["target"][client]


def _table(
    sums: Sums,
    finding: Finding,
    basis: Null,
    threshold: float,
    accused: np.ndarray,
    ambiguous: np.ndarray,
    details: Details,
) -> pd.DataFrame:
    """A row per client, the most suspicious first."""
    order = np.lexsort((-finding.scores, ambiguous, ~(accused | ambiguous)))
    rows = []
    for rank, position in enumerate(order, 1):
        client, score = str(sums.clients[position]), float(finding.scores[position])
        status = "accused" if accused[position] else "ambiguous" if ambiguous[position] else ""
        row = {"client": client, "rank": rank, "score": score, "threshold": threshold, "status": status}
        rows.append(BLANK | row | {"p": max(finding.p, basis.p(score))} | details.of[client])
    table = pd.DataFrame(rows, columns=list(COLUMNS))
    free = table.index[table["status"] == ""]
    if len(free):
        table.loc[free[0], "status"] = "next in line"
    whole = ["first_round", "first_earliest", "first_latest", "last_round", "suspected_label"]
    table[whole] = table[whole].astype("Int64")
    return table


def _silent(log: UpdateLog, basis: Null, fwer: float, reason: str) -> Case:
    """The case of a recording that cannot be judged: every client is listed, none is ranked."""
    clients = sorted({client for round_ in log for client in (*round_.clients.tolist(), *round_.refused)})
    table = pd.DataFrame({"client": clients}).reindex(columns=list(COLUMNS))
    empty = table.iloc[:0]
    says = (
        f"It cannot be said whether anybody poisoned the model: {reason}.",
        "No p can be given.",
        "Nothing was compared.",
    )
    return Case(CANNOT_SAY, float("nan"), empty, empty, table, (), basis, fwer, says)


def _rows(table: pd.DataFrame) -> list[dict[str, Any]]:
    return [{str(name): _plain(value) for name, value in row.items()} for row in table.to_dict("records")]


def _plain(value: Any) -> Any:
    """A value that JSON knows; None for what is missing or not finite."""
    if isinstance(value, str):
        return value
    if pd.isna(value) or not np.isfinite(value):
        return None
    return int(value) if isinstance(value, (int, np.integer)) else float(value)
