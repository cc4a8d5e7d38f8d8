"""`gradlens detect`, `localize` and `report`."""

from collections.abc import Iterator, Sequence
from itertools import repeat
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gradlens.cli.options import AsCsv, AsJson, ExecutorAddress, Folder, Workers, executor_for, import_from_here
from gradlens.cli.output import cell_text, ends_in, lines_of, one_format, say, write
from gradlens.errors import InputError

if TYPE_CHECKING:
    import pandas as pd

    from gradlens import Run, Sweep
    from gradlens.detectors import Detector

SHOWN_ROWS = 40
DetectorNames = Annotated[
    list[str] | None,
    typer.Option(
        "--detector",
        "-d",
        help="A detector by name, module:function, or all; repeatable. Without it, the usual ones: `gradlens list "
        "detectors` marks them.",
        show_default=False,
    ),
]


def detect(
    run: Folder,
    detector: DetectorNames = None,
    fpr: Annotated[
        float | None, typer.Option(help="Calibrate on each cohort itself to this nominal false-positive rate.")
    ] = None,
    workers: Workers = 1,
    executor: ExecutorAddress = "processes",
    as_csv: AsCsv = False,
    as_json: AsJson = False,
) -> None:
    """Scores every client in every round, and says who was flagged how often."""
    import pandas as pd
    from tqdm import tqdm

    one_format(as_csv, as_json)
    import_from_here(detector or [])
    names = _names(detector)
    _detectors(names, fpr)  # bad settings are reported before any work
    runs = _runs(run)
    with executor_for(executor, min(workers, len(runs)), several=len(runs) > 1) as pool:
        results = (pool.map if pool else map)(_detected, [each.path for each in runs], repeat(names), repeat(fpr))
        tables = list(tqdm(results, "detect", len(runs), unit="run", disable=None, leave=False))
    table = pd.concat(tables, ignore_index=True)
    table = table[["run", *(c for c in table.columns if c != "run")]] if len(tables) > 1 else table.drop(columns="run")
    write(table, as_csv, as_json, lambda: _flag_lines(table, fpr))


def localize(
    run: Folder,
    suspects: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES|CSV",
            help="Whom to tell from the others instead of by the truth: clients, separated by commas, or the flags in "
            "what `gradlens detect RUN -d NAME --csv` wrote.",
            show_default=False,
        ),
    ] = None,
    workers: Workers = 1,
    executor: ExecutorAddress = "processes",
    as_csv: AsCsv = False,
    as_json: AsJson = False,
) -> None:
    """Ranks layers, units and classes by how well they tell poisoned updates, or those of suspects, from the others."""
    import gradlens
    from gradlens.localization import localize_sweep

    one_format(as_csv, as_json)
    opened = gradlens.open(run)
    several = isinstance(opened, gradlens.Sweep)
    with executor_for(executor, workers if several else 1, several=several) as pool:
        if not isinstance(opened, gradlens.Sweep):
            who = None if suspects is None else _suspects(suspects, opened)
            table = gradlens.localize(opened, control=_control_of(opened), suspects=who)
        elif suspects is None:
            table = localize_sweep(opened, executor=pool, progress=True)
        else:
            raise InputError(f"--suspects: they are those of one run; name the folder of a run of the sweep {run}")
    table = table.sort_values("auc", ascending=False, kind="stable", ignore_index=True)
    write(table, as_csv, as_json, lambda: _ranking_lines(table))


def report(
    run: Folder,
    out: Annotated[Path, typer.Option("--out", "-o", help="The HTML file.", show_default=False)],
    workers: Workers = 2,
) -> None:
    """Writes what was found as one self-contained HTML file."""
    import gradlens

    ends_in(out, (".html", ".htm"), "--out")
    say(f"report: {write_report(gradlens.open(run), out, workers)}")


def write_report(run: "Run | Sweep", out: Path, workers: int) -> Path:
    """Writes the report of a run, or of a sweep in several processes."""
    import gradlens
    from gradlens.processes import processes

    if workers == 1 or isinstance(run, gradlens.Run):
        return gradlens.report(run, out, progress=True)
    with processes(workers) as executor:
        return gradlens.report(run, out, executor=executor, progress=True)


def _detected(path: Path, names: Sequence[str], fpr: float | None) -> "pd.DataFrame":
    """The scores of one run, wherever they are computed."""
    import gradlens

    run = gradlens.Run.open(path)
    return gradlens.detect(run, _detectors(names, fpr)).assign(run=run.name)


def _runs(path: Path) -> "list[Run]":
    import gradlens

    opened = gradlens.open(path)
    return opened.runs if isinstance(opened, gradlens.Sweep) else [opened]


def _names(given: Sequence[str] | None) -> list[str]:
    """The names of the detectors, each once; InputError for one that does not exist."""
    from gradlens.detectors import DETECTORS, USUAL
    from gradlens.names import available, named

    for name in given or []:
        if name != "all":
            named("detectors", DETECTORS, name, "--detector")
    return list(available("detectors", DETECTORS) if "all" in (given or []) else dict.fromkeys(given or USUAL))


def _detectors(names: Sequence[str], fpr: float | None) -> "dict[str, Detector]":
    from gradlens.detectors import DETECTORS, calibrate
    from gradlens.names import named

    detectors = {name: named("detectors", DETECTORS, name)() for name in names}
    return detectors if fpr is None else {name: calibrate(each, None, fpr) for name, each in detectors.items()}


def _suspects(text: str, run: "Run") -> "list[str] | pd.DataFrame":
    """The clients that --suspects names, or the verdicts in its file, those on this run."""
    import pandas as pd

    path = Path(text)
    if not path.is_file():
        return [name for name in (part.strip() for part in text.split(",")) if name]
    try:
        table = pd.read_csv(path, dtype={"client": str, "run": str}, keep_default_na=False)
    except (ValueError, UnicodeDecodeError) as error:
        raise InputError(f"--suspects: {path} is not readable as CSV: {error}") from error
    for name in {"client", "run"} & set(table):
        table[name] = table[name].map(cell_text)
    return table[table["run"].eq(run.name)] if "run" in table else table


def _control_of(run: "Run") -> "Run | None":
    """The attack-free control of a run that lies in the folder of its sweep, None if there is none."""
    import gradlens
    from gradlens.run import SWEEP

    folder = run.path.resolve().parent
    try:
        return gradlens.Sweep.open(folder).control_of(run.name) if (folder / SWEEP).is_file() else None
    except InputError:  # it is a control itself, or its control has not run yet
        return None


def _ranking_lines(table: "pd.DataFrame") -> Iterator[str]:
    """The layers that separate best; of suspects, what the figures mean."""
    whole = table[table["unit"] == ""].drop(columns=["unit", "labels"]).dropna(axis="columns", how="all")
    yield from lines_of(whole.head(20))
    if table["labels"].eq("suspects").any():
        yield "by the suspects given, not by the truth: p says that they differ there, not that they are guilty"


def _flag_lines(table: "pd.DataFrame", fpr: float | None) -> Iterator[str]:
    """Who was flagged in how many of its rounds, the most suspicious first."""
    answered = table[table["abstained"] == ""]
    keys = [name for name in ("run", "detector", "client") if name in table.columns]
    counts = answered.groupby(keys, sort=False)["flag"].agg(flagged="sum", rounds="count").reset_index()
    top = counts[counts["flagged"] > 0].sort_values("flagged", ascending=False, kind="stable")
    yield from lines_of(top.head(SHOWN_ROWS)) if len(top) else ["nobody was flagged"]
    if len(top) > SHOWN_ROWS:
        yield f"... and {len(top) - SHOWN_ROWS} more; --csv writes all"
    for reason, rows in table[table["abstained"] != ""].groupby("abstained"):
        yield f"abstained in {rows.groupby(['detector', 'round']).ngroups} verdicts: {reason}"
    if fpr is None:
        yield "thresholds are textbook values, not calibrated; --fpr 0.05 sets them by each cohort itself"
    else:
        yield f"thresholds are calibrated on each cohort itself, to a nominal false-positive rate of {fpr:g} per update"
