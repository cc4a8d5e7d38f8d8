"""`gradlens detect`: scores and flags of every client in every round, then the case of the run."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import repeat
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gradlens.cli.investigate import case_lines
from gradlens.cli.options import (
    AsCsv,
    AsJson,
    CleanRounds,
    ExecutorAddress,
    Folder,
    NullRuns,
    Workers,
    basis_from,
    executor_for,
    import_from_here,
    runs_of,
)
from gradlens.cli.output import lines_of, one_format, write
from gradlens.errors import InputError
from gradlens.words import count

if TYPE_CHECKING:
    import pandas as pd

    from gradlens import Case, Run
    from gradlens.detectors import Detector, Verdict
    from gradlens.log import UpdateLog

SHOWN_ROWS = 40
USUAL_RATE = 0.05
TOO_SMALL = "the null is too small"
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
        typer.Option(
            help="Rate of false positives per update to which thresholds are calibrated: on --null or --clean-rounds, "
            "where it is 0.05 unless given, or else on each cohort itself, where it is nominal."
        ),
    ] = None,
    null: NullRuns = None,
    clean_rounds: CleanRounds = 0,
    workers: Workers = 1,
    executor: ExecutorAddress = "processes",
    as_csv: AsCsv = False,
    as_json: AsJson = False,
) -> None:
    """Scores every client in every round, counts how often each was flagged, and ends with the case of the run."""
    import pandas as pd
    from tqdm import tqdm

    one_format(as_csv, as_json)
    import_from_here(detector or [])
    runs = runs_of(run)
    basis = basis_from(null or [], clean_rounds)
    asked = _asked(_names(detector), basis, fpr, runs, cases=not (as_csv or as_json))
    with executor_for(executor, min(workers, len(runs)), several=len(runs) > 1) as pool:
        answers = (pool.map if pool else map)(_answer, [run.path for run in runs], repeat(asked))
        answers = list(tqdm(answers, "detect", len(runs), unit="run", disable=None, leave=False))
    table = pd.concat([table for table, _ in answers], ignore_index=True)
    table = table[["run", *(c for c in table.columns if c != "run")]] if len(runs) > 1 else table.drop(columns="run")
    cases = [case for _, case in answers if case is not None]
    write(
        table,
        as_csv,
        as_json,
        lambda: [*_flag_lines(table), *_calibration_lines(table, asked, basis), *_case_lines(cases)],
    )


@dataclass(frozen=True)
class Asked:
    """What is asked of each run, wherever it is processed.

    Parameters
    ----------
    names : list of str
        Of the detectors.
    calibrated : Mapping or None
        The detectors calibrated on attack-free recordings; None where they are made, and calibrated, for each run.
    fpr : float or None
        None for the detectors' own thresholds.
    null : Any
        What the case rests on: None, a number of clean rounds, or the null of attack-free recordings.
    cases : bool
        Whether the case is asked for.
    """

    names: list[str]
    calibrated: "Mapping[str, Detector] | None"
    fpr: float | None
    null: Any
    cases: bool


def _asked(names: list[str], basis: Any, fpr: float | None, runs: "Sequence[Run]", *, cases: bool) -> Asked:
    """Checks the settings before any work, and reads the attack-free recordings once."""
    from gradlens.case.investigation import basis_of
    from gradlens.detectors import calibrate
    from gradlens.detectors.nulls import attack_free

    fpr = USUAL_RATE if fpr is None and basis is not None else fpr
    detectors = _detectors(names)
    if fpr is not None:
        for each in detectors.values():
            calibrate(each, None, fpr)  # raises for a rate that is none
    if not isinstance(basis, list):
        return Asked(names, None, fpr, basis, cases)
    for source in basis:
        attack_free(source)
    calibrated = {name: _calibrated(each, basis, fpr or USUAL_RATE) for name, each in detectors.items()}
    return Asked(names, calibrated, fpr, basis_of(runs[0].log, basis) if cases else None, cases)


def _answer(path: Path, asked: Asked) -> "tuple[pd.DataFrame, Case | None]":
    """The scores of one run, and its case if that is asked for."""
    import gradlens

    run = gradlens.Run.open(path)
    table = gradlens.detect(run, asked.calibrated or _made_for(run, asked)).assign(run=run.name)
    return table, gradlens.investigate(run, asked.null) if asked.cases and len(run.log) else None


def _made_for(run: "Run", asked: Asked) -> "dict[str, Detector]":
    """The detectors with their own thresholds, or calibrated on each cohort or on the clean rounds of the run."""
    from gradlens.detectors import calibrate

    detectors, rounds = _detectors(asked.names), asked.null
    if asked.fpr is None:
        return detectors
    if rounds is None:
        return {name: calibrate(detector, None, asked.fpr) for name, detector in detectors.items()}
    if rounds > len(run.log):
        raise InputError(f"--clean-rounds: expected at most {len(run.log)}, the rounds of {run.name}, found {rounds}")
    on_clean = {name: _calibrated(each, run.log[:rounds], asked.fpr) for name, each in detectors.items()}
    return {
        name: found if isinstance(found, Unsupported) else calibrate(detectors[name], rounds, asked.fpr)
        for name, found in on_clean.items()
    }


def _calibrated(detector: "Detector", null: Any, fpr: float) -> "Detector":
    """The detector calibrated on a null, or one that ranks and abstains where the null is too small for the rate."""
    from gradlens.detectors import calibrate

    try:
        return calibrate(detector, null, fpr)
    except InputError as reason:
        return Unsupported(detector, f"{TOO_SMALL}: {reason}")


@dataclass(frozen=True)
class Unsupported:
    """A detector whose null is too small for the rate: it scores, says what it needs, and flags nobody for a score.

    Parameters
    ----------
    detector : Detector
    reason : str
        How many clients the null would need.
    """

    detector: "Detector"
    reason: str

    def __call__(self, log: "UpdateLog") -> "Verdict":
        """The verdict of the detector without its flags."""
        import numpy as np

        verdict = log.verdict(self.detector)
        flags = np.isposinf(verdict.scores)
        return replace(verdict, flags=flags, abstained=verdict.abstained or self.reason, null="none")


def _names(given: Sequence[str] | None) -> list[str]:
    """The names of the detectors, each once; raises InputError for one that does not exist."""
    from gradlens.detectors import DETECTORS, USUAL
    from gradlens.names import available, named

    for name in given or []:
        if name != "all":
            named("detectors", DETECTORS, name, "--detector")
    return list(available("detectors", DETECTORS) if "all" in (given or []) else dict.fromkeys(given or USUAL))


def _detectors(names: Sequence[str]) -> "dict[str, Detector]":
    from gradlens.detectors import DETECTORS
    from gradlens.names import named

    return {name: named("detectors", DETECTORS, name)() for name in names}


def _flag_lines(table: "pd.DataFrame") -> Iterator[str]:
    """Lines that count in how many of its rounds each client was flagged, the most suspicious client first."""
    answered = table[table["abstained"] == ""]
    keys = [name for name in ("run", "detector", "client") if name in table.columns]
    counts = answered.groupby(keys, sort=False)["flag"].agg(flagged="sum", rounds="count").reset_index()
    top = counts[counts["flagged"] > 0].sort_values("flagged", ascending=False, kind="stable")
    yield from lines_of(top.head(SHOWN_ROWS)) if len(top) else ["nobody was flagged"]
    if len(top) > SHOWN_ROWS:
        yield f"... and {len(top) - SHOWN_ROWS} more; --csv writes all"
    unsupported = table[table["abstained"].str.startswith(TOO_SMALL)]
    if len(unsupported):
        yield "the ranking by the median score over rounds, without a threshold:"
        yield from lines_of(_ranking(unsupported, keys))
    for reason, rows in table[table["abstained"] != ""].groupby("abstained"):
        yield f"abstained in {rows.groupby(['detector', 'round']).ngroups} verdicts: {reason}"


def _ranking(table: "pd.DataFrame", keys: Sequence[str]) -> "pd.DataFrame":
    """The clients of each detector by their median score, as many of each as fit."""
    medians = table.groupby(list(keys), sort=False)["score"].median().reset_index()
    of_one = medians.groupby(list(keys[:-1]), sort=False)
    most = max(1, SHOWN_ROWS // of_one.ngroups)
    places = of_one["score"].rank(ascending=False, method="first")
    shown = medians.assign(rank=places.astype(int))[places <= most]
    order = shown.sort_values("rank", kind="stable")
    return order.sort_values(list(keys[:-1]), kind="stable").head(SHOWN_ROWS).reset_index(drop=True)


def _calibration_lines(table: "pd.DataFrame", asked: Asked, basis: Any) -> Iterator[str]:
    """What the thresholds rest on, and what their rate holds for; nothing where no detector has one."""
    if len(table) and table["abstained"].str.startswith(TOO_SMALL).all():
        return
    rate = None if asked.fpr is None else f"the rate of {asked.fpr:g} is per update and"
    if rate is None:
        yield (
            "thresholds are textbook values, not calibrated; --null RUNS sets them by attack-free recordings, "
            "--fpr 0.05 by each cohort itself"
        )
    elif isinstance(basis, list):
        yield (
            f"thresholds are calibrated on {count(len(basis), 'attack-free recording')}: {rate} holds for benign "
            "clients like theirs"
        )
    elif basis is not None:
        yield (
            f"thresholds are calibrated on {count(basis, 'first round')} taken to be clean: {rate} holds for benign "
            "clients like those of that stretch, while they behave as they did in it"
        )
    else:
        yield (
            f"thresholds are calibrated on each cohort itself: {rate} nominal, it holds only where most clients are "
            "benign and their scores are normally distributed"
        )


def _case_lines(cases: "Sequence[Case]") -> Iterator[str]:
    """The case of a single run, or how many runs have which verdict."""
    if len(cases) == 1:
        yield from case_lines(cases[0])
    elif cases:
        verdicts = [case.verdict for case in cases]
        yield "cases: " + ", ".join(f"{verdicts.count(verdict)} {verdict}" for verdict in dict.fromkeys(verdicts))
