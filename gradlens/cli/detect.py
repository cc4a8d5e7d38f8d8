"""`gradlens detect`: scores and flags of every client in every round."""

from collections.abc import Iterator, Sequence
from itertools import repeat
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gradlens.cli.options import AsCsv, AsJson, ExecutorAddress, Folder, Workers, executor_for, import_from_here
from gradlens.cli.output import lines_of, one_format, write

if TYPE_CHECKING:
    import pandas as pd

    from gradlens import Run
    from gradlens.detectors import Detector

SHOWN_ROWS = 40
DetectorNames = Annotated[
    list[str] | None,
    typer.Option(
        "--detector",
        "-d",
        help="Name of a detector, module:function, or all; repeatable. By default the usual ones, which `gradlens "
        "list detectors` marks.",
        show_default=False,
    ),
]


def detect(
    run: Folder,
    detector: DetectorNames = None,
    fpr: Annotated[
        float | None,
        typer.Option(help="Calibrate each threshold on the cohort itself, to this nominal false-positive rate."),
    ] = None,
    workers: Workers = 1,
    executor: ExecutorAddress = "processes",
    as_csv: AsCsv = False,
    as_json: AsJson = False,
) -> None:
    """Scores every client in every round, and counts how often each was flagged."""
    import pandas as pd
    from tqdm import tqdm

    one_format(as_csv, as_json)
    import_from_here(detector or [])
    names = _names(detector)
    _detectors(names, fpr)  # bad settings are reported before any work
    runs = _runs(run)
    with executor_for(executor, min(workers, len(runs)), several=len(runs) > 1) as pool:
        results = (pool.map if pool else map)(_detected, [run.path for run in runs], repeat(names), repeat(fpr))
        tables = list(tqdm(results, "detect", len(runs), unit="run", disable=None, leave=False))
    table = pd.concat(tables, ignore_index=True)
    table = table[["run", *(c for c in table.columns if c != "run")]] if len(tables) > 1 else table.drop(columns="run")
    write(table, as_csv, as_json, lambda: _flag_lines(table, fpr))


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
    """The names of the detectors, each once; raises InputError for one that does not exist."""
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
    return detectors if fpr is None else {name: calibrate(detector, None, fpr) for name, detector in detectors.items()}


def _flag_lines(table: "pd.DataFrame", fpr: float | None) -> Iterator[str]:
    """Lines that count in how many of its rounds each client was flagged, the most suspicious client first."""
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
