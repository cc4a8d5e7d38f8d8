"""`gradlens investigate`: one answer for one recording, or a table of them."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gradlens.cli.options import AsJson, CleanRounds, Folder, NullRuns, basis_from, runs_in
from gradlens.cli.output import ends_in, lines_of, say, say_json

if TYPE_CHECKING:
    from gradlens import Case, Run

SHOWN = ("client", "rank", "p", "score", "first_round", "last_round", "layer", "suspected_label", "group", "statistics")


def investigate(
    run: Folder,
    null: NullRuns = None,
    clean_rounds: CleanRounds = 0,
    fwer: Annotated[
        float, typer.Option(help="Share of attack-free recordings in which anybody at all may be accused.")
    ] = 0.05,
    looks: Annotated[
        bool, typer.Option("--looks", help="Conclude after 1, 2, 4, 8, ... rounds and the last, as on a live server.")
    ] = False,
    as_json: AsJson = False,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The case file to write, in HTML.", show_default=False)
    ] = None,
) -> None:
    """Concludes who, if anybody, poisoned a recording: a verdict whose error is controlled per recording."""
    import gradlens
    from gradlens.case.investigation import basis_of

    if out is not None:
        ends_in(out, (".html", ".htm"), "--out")
    basis = basis_from(null or [], clean_rounds)
    runs = runs_in(run)
    if isinstance(basis, list):  # read once, however many recordings are compared with it
        basis = basis_of(runs[0].log, basis, looks)
    cases = {of.name: gradlens.investigate(of, basis, fwer, looks=looks) for of in runs}
    if len(runs) == 1 and runs[0].path == Path(run):
        _one(runs[0], cases[runs[0].name], as_json, out)
    else:
        _many(cases, as_json, out)


def _one(run: "Run", case: "Case", as_json: bool, out: Path | None) -> None:
    if out is not None:
        from gradlens.cli.replay import measure_of_run
        from gradlens.names import nothing_imported
        from gradlens.reporting.case_file import case_file

        with nothing_imported():
            case_file(run, case, out, measure=measure_of_run(run) if len(case.suspects) else None)
    if as_json:
        say_json(case.as_dict())
        return
    say(*case_lines(case))
    if out is not None:
        say(f"case: {out}")


def case_lines(case: "Case") -> Iterator[str]:
    """The lines of a case: its verdict, its sentences, who is accused or could be explained, and who is next in line.

    Parameters
    ----------
    case : Case

    Examples
    --------
    >>> from gradlens import investigate
    >>> from gradlens.examples import example_log
    >>> next(case_lines(investigate(example_log(num_malicious=2))))
    'verdict: established'
    """
    yield f"verdict: {case.verdict}"
    yield from case.says
    table = case.clients[case.clients["status"] != ""]
    if len(table) and case.clients["rank"].notna().all():
        yield from lines_of(table[["status", *SHOWN]].astype(object).fillna("-"))


def _many(cases: "dict[str, Case]", as_json: bool, out: Path | None) -> None:
    from gradlens.case.several import table_of_cases

    if as_json:
        say_json({name: case.as_dict() for name, case in cases.items()})
    table = table_of_cases(cases)
    if out is not None:
        from gradlens.reporting.case_file import cases_file

        cases_file(table, cases, out)
    if not as_json:
        say(*lines_of(table.drop(columns="says")))
        say("q is p adjusted for the number of recordings (Benjamini and Yekutieli)")
        if out is not None:
            say(f"cases: {out}")
