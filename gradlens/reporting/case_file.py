"""The case file: what a recording shows of who poisoned it, for readers who know nothing of the method."""

import shlex
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd

from gradlens.aggregators import AGGREGATORS, Aggregator
from gradlens.case import Case
from gradlens.case.verdicts import CANNOT_SAY, ESTABLISHED, NOT_ESTABLISHED, SUSPECTED
from gradlens.errors import CannotSay, InputError
from gradlens.localization import localize
from gradlens.plots import count, percent
from gradlens.replays import leaving_out, replay
from gradlens.reporting.accusations import named
from gradlens.reporting.case_advice import advice, unsaid
from gradlens.reporting.case_clients import (
    client_blocks,
    clients_table,
    next_in_line,
    when_in_words,
    where_in_words,
)
from gradlens.reporting.case_evidence import MOST_SHOWN, CaseEvidence, evidence_of
from gradlens.reporting.case_pictures import case_scores_picture, without_picture
from gradlens.reporting.case_words import CASE_WORDS, METHOD
from gradlens.reporting.page import (
    Block,
    code,
    finding,
    heading,
    listed,
    number,
    render,
    rows_of,
    section,
    table,
    text,
    write,
)
from gradlens.reporting.provenance import software_table
from gradlens.reporting.shared import p_value
from gradlens.run import Run

Measure = Callable[[Mapping[str, Any]], Mapping[str, float]]
MEANING = {
    ESTABLISHED: "Established: the clients named here sent what innocent clients hardly ever send, and are accused.",
    SUSPECTED: "Suspected: somebody stands out, but innocent clients do so, too, now and then. Nobody is accused.",
    NOT_ESTABLISHED: "Not established: nobody stands out more than innocent clients do. Nobody is accused.",
    CANNOT_SAY: "Cannot say: what there is does not allow a verdict. Nobody is accused, and nobody is cleared.",
}
PERMUTATIONS, MOST_LAYERS = 999, 8
LEVEL, MOST_UNFOLDED = 0.05, 60  # of q; rows of the table of recordings


def case_file(run: Run, case: Case, out: Path | str, *, measure: Measure | None = None) -> Path:
    """Writes the case file of a recording as one self-contained HTML file.

    Parameters
    ----------
    run : Run
        The recording.
    case : Case
        What `investigate` concludes from it.
    out : pathlib.Path or str
        The file to write.
    measure : callable, optional
        A global model, layer -> array -> figures by name, main_accuracy and asr; for what the model would have been
        without the suspects.

    Returns
    -------
    pathlib.Path
        The file.

    Raises
    ------
    InputError
        If the path is a folder or cannot be written.

    Examples
    --------
    >>> import tempfile, gradlens
    >>> from gradlens.examples import example_run
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     run = gradlens.open(example_run(f"{folder}/run"))
    ...     page = case_file(run, gradlens.investigate(run), f"{folder}/case.html")
    ...     page.read_text()[:15]
    '<!doctype html>'
    """
    evidence, verified = evidence_of(run, case), run.verify()
    parts = [
        ("clients", "Who, and what speaks against them", _clients_section(evidence)),
        ("where", "Where in the model", _where_section(evidence)),
        ("without", "The model without them", _without_section(evidence, measure)),
        ("all", "All clients", _all_section(evidence)),
        ("method", "How this was found", _method_section(case)),
        ("integrity", "Is the evidence what was recorded?", _integrity_section(run, verified)),
        ("again", "To do it again", [_commands(run, case)]),
    ]
    told = [part for part in parts if part[2]]
    sections = [section(name, f"{place}. {title}", blocks) for place, (name, title, blocks) in enumerate(told, 1)]
    lead = f"Verdict: {case.verdict}{_with_p(case)}. {_size(run)}"
    page = render(f"Case file of {run.name}", lead, _first_page(evidence, verified), sections, CASE_WORDS)
    return write(page, out)


def _with_p(case: Case) -> str:
    return "" if pd.isna(case.p) else f" (p {p_value(case.p)})"


def _size(run: Run) -> str:
    clients = {client for round_ in run.log for client in (*round_.clients.tolist(), *round_.refused)}
    return f"A recording of {count(len(run.log), 'round')} with {count(len(clients), 'client')}."


def _first_page(evidence: CaseEvidence, verified: Any) -> list[Block]:
    """What a reader needs who reads no further."""
    case, run = evidence.case, evidence.run
    intact = (
        f"Every file is what was recorded: {count(len(run.manifest.named()), 'file')}, head {run.head}."
        if verified.intact
        else f"WARNING: the evidence is not what was recorded, and nothing here can be relied on: {verified.faults[0]}"
    )
    return [
        finding("Verdict", MEANING[case.verdict]),
        finding("What happened", case.says[0]),
        finding("Who, since when", *_who(evidence)),
        finding("How sure", case.says[1]),
        finding("What to do next", *advice(evidence, intact=verified.intact)),
        finding("What cannot be said", case.says[2], unsaid(case.verdict)),
        finding("Evidence", intact),
    ]


def _who(evidence: CaseEvidence) -> tuple[str, list[str]]:
    case = evidence.case
    if case.verdict == CANNOT_SAY and case.groups:
        sides = [
            f"Group {group.name}, {count(len(group.clients), 'client')}: {listed(group.clients)}; they are alike by "
            f"{number(group.cosine)} (mean cosine of what they sent over all rounds)."
            for group in case.groups
        ]
        return "Nobody is accused: either group may be the honest one.", sides
    if case.suspects.empty and case.ambiguous.empty:
        return f"Nobody is accused. {next_in_line(evidence)}", []
    points = []
    for row in rows_of(pd.concat([case.suspects, case.ambiguous])):
        label = "" if pd.isna(row.suspected_label) else f" It pushes toward label {row.suspected_label}."
        points.append(f"{row.client}, {row.status}. {when_in_words(row)} {where_in_words(row)}{label}")
    sentence = f"{count(len(case.suspects), 'client')} accused"
    if len(case.ambiguous):
        sentence += f", {len(case.ambiguous)} ambiguous, and these are not accused"
    return f"{sentence}.", points


def _clients_section(evidence: CaseEvidence) -> list[Block]:
    names = named(evidence.case)
    blocks = [block for client in evidence.shown for block in client_blocks(evidence, client)]
    if len(names) > MOST_SHOWN:
        rest = f"{count(len(names) - MOST_SHOWN, 'more client')} of those above have no page: the table of all clients"
        blocks.append(text(f"{rest} has their figures."))
    return blocks


def _where_section(evidence: CaseEvidence) -> list[Block]:
    """Layers and units that separate the suspects from everybody else, in the rounds in which they were active."""
    names = evidence.accused
    if not names:
        return []
    stretches = [stretch for client in evidence.shown if (stretch := evidence.stretch(client)) is not None]
    log = evidence.run.log
    positions = sorted({place for of in stretches for place in range(of.first, of.last + 1)})
    rounds = [log[place].index for place in positions] or None
    try:
        places = localize(log, suspects=names, rounds=rounds, permutations=PERMUTATIONS)
    except (InputError, CannotSay) as reason:
        return [text(f"This could not be computed: {reason}.")]
    layers = places[places["unit"].eq("")].sort_values(["auc", "effect"], ascending=False, kind="stable")
    units = places[~places["unit"].eq("")].sort_values(["auc", "effect"], ascending=False, kind="stable")
    chosen = (
        "The suspects were chosen by what is now localized: that they differ somewhere is no news, and p does not say "
        "that they are guilty. What is new is the order: where they differ more than elsewhere."
    )
    return [
        text(chosen),
        _places_table(layers, f"Layers that separate {listed(names)} from all other clients best, in the rounds they "
                      "were active. AUC 1: every update of theirs is more unusual than every other."),
        _places_table(units, "Single units that separate them best; units are not tested and have no p."),
    ]  # fmt: skip


def _places_table(places: pd.DataFrame, caption: str) -> Block:
    rows = [
        {
            "Layer": str(row.layer),
            **({"Unit": str(row.unit)} if row.unit else {}),
            "Statistic": str(row.statistic),
            "AUC": number(row.auc),
            "Effect in sigmas": number(row.effect, 1),
            **({} if row.unit else {"p": p_value(row.p)}),
        }
        for row in rows_of(places.head(MOST_LAYERS))
    ]
    return table(rows, caption, folded=False)


def _without_section(evidence: CaseEvidence, measure: Measure | None) -> list[Block]:
    """What the server's rule makes of the recorded updates without the accused."""
    names, run = evidence.accused, evidence.run
    if not names:
        return []
    if measure is None:
        return [
            text(
                "This was not measured: the recording is no simulation whose data can be loaded here. What the server "
                "would have computed without the accused is found by `gradlens replay`, see the last section; its "
                "global model can then be tested where the model is used."
            )
        ]
    try:
        rounds = replay(run, leaving_out(_rule_of(run), names), measure=measure).rounds
    except InputError as reason:
        return [text(f"This could not be computed: {reason}.")]
    return [without_picture(rounds, listed(names))]


def _rule_of(run: Run) -> Aggregator:
    """The rule of the run's scenario without any filter; the mean where it has none that is built in."""
    component = run.scenario.get("aggregator")
    if isinstance(component, str) and component in AGGREGATORS:
        return AGGREGATORS[component]()
    if isinstance(component, Mapping) and len(component) == 1:
        [(name, settings)] = component.items()
        if name in AGGREGATORS:
            return AGGREGATORS[name](**settings)
    return AGGREGATORS["mean"]()


def _all_section(evidence: CaseEvidence) -> list[Block]:
    blocks = [text(next_in_line(evidence)), clients_table(evidence)]
    if evidence.ranked:
        blocks.insert(1, case_scores_picture(evidence.case.clients, percent(evidence.case.fwer)))
    return blocks


def _method_section(case: Case) -> list[Block]:
    null = (
        f"This rests on {case.null.says}. The smallest p that it can give is {p_value(case.null.resolves)}; anybody at "
        f"all is accused in at most {percent(case.fwer)} of attack-free recordings."
    )
    return [*(text(sentence) for sentence in METHOD), heading("What it is compared with"), text(null)]


def _integrity_section(run: Run, verified: Any) -> list[Block]:
    rows = {
        "Recording": run.name,
        "Committed rounds": str(verified.rounds),
        "State": "closed" if verified.closed else f"open; {verified.in_flight}".rstrip("; "),
        "Committed files": str(len(run.manifest.named())),
        "Evidence level": run.evidence.level,
        "Head": verified.head,
        "Faults": "none" if verified.intact else "; ".join(verified.faults),
        "Date of this page": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }
    sealed = (
        "A recording is a chain: every round's files are named by their hashes, and every line of its manifest by that "
        "before it. The head is the hash of the last line. Whoever noted it elsewhere can prove later that nothing was "
        "changed; without a noted head, a chain that was rewritten as a whole is not noticed."
    )
    found = [{"Property": name, "Value": value} for name, value in rows.items()]
    return [text(sealed), table(found, "The recording as it was read.", folded=False), software_table([run])]


def _commands(run: Run, case: Case) -> Block:
    folder = shlex.quote(str(run.path))
    options = {"clean stretch": " --clean-rounds N", "attack-free recordings": " --null ATTACK_FREE_RUNS"}
    lines = [
        "# this page again, with the options used then",
        f"gradlens investigate {folder}{options.get(case.null.kind, '')} --fwer {case.fwer:g} -o case.html",
        "# that nobody changed the evidence",
        f"gradlens verify {folder} --head {run.head}",
    ]
    if names := case.suspects["client"].tolist():
        without = " ".join(f"--without {shlex.quote(name)}" for name in names)
        lines += [
            "# where the accused differ from the others",
            f"gradlens localize {folder} --suspects {shlex.quote(','.join(names))}",
            "# the model without the accused",
            f"gradlens replay {folder} {without}",
        ]
    return code(lines)


def cases_file(table: pd.DataFrame, cases: Mapping[str, Case], out: Path | str) -> Path:
    """Writes a page on the cases of several recordings as one self-contained HTML file.

    Parameters
    ----------
    table : pandas.DataFrame
        What `gradlens.case.several.table_of_cases` makes of the cases.
    cases : Mapping
        Name of the recording -> its case.
    out : pathlib.Path or str
        The file to write.

    Returns
    -------
    pathlib.Path
        The file.

    Raises
    ------
    InputError
        If the path is a folder or cannot be written.

    Examples
    --------
    >>> import tempfile
    >>> from gradlens import investigate
    >>> from gradlens.case.several import table_of_cases
    >>> from gradlens.examples import example_log
    >>> cases = {"a": investigate(example_log()), "b": investigate(example_log(num_malicious=0))}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     cases_file(table_of_cases(cases), cases, f"{folder}/cases.html").read_text()[:15]
    '<!doctype html>'
    """
    ranked = table.sort_values(["q", "p"], kind="stable", ignore_index=True)
    established = ranked[ranked["verdict"].eq(ESTABLISHED)]
    blocks = [block for name in established["recording"] for block in _sentences(name, cases[name])]
    null = next(iter(cases.values())).null.says if cases else "nothing"
    sections = [
        section("recordings", "1. All recordings", [_cases_table(ranked)]),
        section("established", "2. The established ones", blocks or [text("No recording is established.")]),
        section("method", "3. How this was found", [*(text(of) for of in METHOD), text(f"This rests on {null}.")]),
    ]
    lead = f"{count(len(table), 'recording')}, each investigated on its own."
    page = render(f"Cases of {count(len(table), 'recording')}", lead, _cases_findings(ranked), sections, CASE_WORDS)
    return write(page, out)


def _cases_findings(ranked: pd.DataFrame) -> list[Block]:
    """How many recordings, who is established, which comes next: a sentence each."""
    verdicts = ranked["verdict"].value_counts()
    parts = [f"{verdicts[verdict]} {verdict}" for verdict in MEANING if verdict in verdicts]
    established, others = ranked[ranked["verdict"].eq(ESTABLISHED)], ranked[~ranked["verdict"].eq(ESTABLISHED)]
    sure = int((established["q"] <= LEVEL).sum())
    several = (
        f"{listed(established['recording'].tolist())}. Of these, {sure} with q at most {LEVEL:g}: of those "
        f"named so, at most {percent(LEVEL)} are expected to be attack-free."
    )
    known = others[others["p"].notna()]
    following = "None of the other recordings has a p."
    if len(known):
        [row] = rows_of(known.head(1))
        following = f"Next comes {row.recording}: {row.verdict}, p {p_value(row.p)}, q {p_value(row.q)}."
    return [
        finding("How many", f"{count(len(ranked), 'recording')}: {listed(parts)}."),
        finding("Established", several if len(established) else "No recording is established: nobody is accused."),
        finding("Next", following if len(others) else "There is no other recording."),
    ]


def _cases_table(ranked: pd.DataFrame) -> Block:
    rows = [
        {
            "Recording": str(row.recording),
            "Verdict": row.verdict,
            "p": p_value(row.p),
            "q": p_value(row.q),
            "Accused": row.suspects or "–",
            "Ambiguous": row.ambiguous or "–",
        }
        for row in rows_of(ranked)
    ]
    caption = (
        "All recordings, those with the smallest q first. q is p adjusted for their number (Benjamini and Yekutieli): "
        f"of the recordings with q at most {LEVEL:g}, at most {percent(LEVEL)} are expected to be attack-free."
    )
    return table(rows, caption, folded=len(rows) > MOST_UNFOLDED)


def _sentences(name: str, case: Case) -> list[Block]:
    """The three sentences of a case under its name."""
    return [heading(name), *(text(sentence) for sentence in case.says)]
