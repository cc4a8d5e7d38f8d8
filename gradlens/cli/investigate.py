"""`gradlens investigate`: one answer for one recording, or a table of them."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gradlens.cli.options import AsJson, Folder
from gradlens.cli.output import ends_in, lines_of, say, say_json

if TYPE_CHECKING:
    from gradlens import Case, Run

NullRuns = Annotated[
    list[Path] | None,
    typer.Option(
        "--null",
        metavar="RUNS",
        help="A folder of attack-free recordings of the same setting: a run, a sweep or a folder of runs; repeatable.",
        show_default=False,
    ),
]
CleanRounds = Annotated[
    int, typer.Option("--clean-rounds", min=0, help="Number of first rounds that are known to be clean.")
]
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

    if out is not None:
        ends_in(out, (".html", ".htm"), "--out")
    basis = basis_from(null or [], clean_rounds)
    runs = runs_in(run)
    cases = {of.name: gradlens.investigate(of, basis, fwer, looks=looks) for of in runs}
    if len(runs) == 1 and runs[0].path == Path(run):
        _one(runs[0], cases[runs[0].name], as_json, out)
    else:
        _many(cases, as_json, out)


def basis_from(null: Sequence[Path], clean_rounds: int) -> Any:
    """The null that the options name, as `gradlens.investigate` takes it.

    Parameters
    ----------
    null : sequence of Path
        Folders of attack-free recordings.
    clean_rounds : int
        0 for none.

    Raises
    ------
    InputError
        If both are given, or a folder holds no recording.

    Examples
    --------
    >>> basis_from([], 4)
    4
    """
    from gradlens.errors import InputError

    if null and clean_rounds:
        raise InputError("--null and --clean-rounds exclude each other: name one of them")
    return [run for folder in null for run in runs_in(folder)] or clean_rounds or None


def runs_in(folder: Path) -> "list[Run]":
    """The recordings in a folder: the run itself, the runs of a sweep, or those in its subfolders, sorted by name.

    Parameters
    ----------
    folder : Path

    Raises
    ------
    InputError
        If there is none.

    Examples
    --------
    >>> import tempfile
    >>> from gradlens.examples import example_run
    >>> with tempfile.TemporaryDirectory() as place:
    ...     [run.name for run in runs_in(example_run(f"{place}/run").parent)]
    ['run']
    """
    import gradlens

    inside = sorted(path.parent for path in folder.glob("*/run.json")) if folder.is_dir() else []
    if inside and not (folder / "run.json").exists() and not (folder / "sweep.json").exists():
        return [gradlens.Run.open(path) for path in inside]
    opened = gradlens.open(folder)
    return opened.runs if isinstance(opened, gradlens.Sweep) else [opened]


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
