"""Copies of a run that hold less: for a second examiner without names, and to keep for longer."""

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from gradlens.custody.seals import LARGEST
from gradlens.errors import InputError
from gradlens.log import Evidence, LogWriter, Round
from gradlens.log.files import read_table
from gradlens.log.manifest import SIGNATURES, STAMP, regular_file, stem
from gradlens.run import Run

GIVEN_AWAY = (
    "every global model in full; of each update its norm, moments and a sketch of 512 numbers per layer, and the final "
    "bias whole, which tells what labels a client holds; how many examples each client claims; when each took part; "
    "the ground truth and verdicts where they were recorded; metrics. Not: names of clients, what they signed, "
    "updates, reasons of refusals, the scenario, where the run came from"
)


def share(run: Run, out: Path, *, seed: int | None = None) -> dict[str, str]:
    """Makes a copy of a run for a second examiner: sketches and statistics instead of updates, and no names.

    Parameters
    ----------
    run : Run
        Recorded in full, or as sketches.
    out : Path
        The folder of the copy, new or empty.
    seed : int, optional
        Of the new names' order; by default drawn by the operating system.

    Returns
    -------
    dict of str to str
        Name -> the name in the copy. It stays with whoever shares.

    Raises
    ------
    InputError
        If the run is not intact or holds whole layers of its updates, or the folder is taken.

    Notes
    -----
    The copy has a chain of hashes of its own, and names the head of the run it was made from. What it gives away:
    `GIVEN_AWAY`, which the command prints. Signs of the sketches are in it; of a run that was
    recorded in full they are drawn anew.

    Examples
    --------
    >>> from tempfile import TemporaryDirectory
    >>> from gradlens.examples import example_run
    >>> with TemporaryDirectory() as folder:
    ...     names = share(Run.open(example_run(f"{folder}/run")), Path(folder) / "copy", seed=0)
    ...     copy = Run.open(f"{folder}/copy")
    ...     len(names), copy.verify().intact, copy.evidence.level
    (10, True, 'sketch')
    """
    _check_intact(run)
    if run.evidence.level == "layers":
        raise InputError(f"{run.path}: whole layers were recorded, of which a copy would give away the updates")
    every = sorted({name for round_ in run.log for name in (*round_.clients.tolist(), *round_.refused)})
    order = np.random.default_rng(seed).permutation(len(every))
    names = {
        every[place]: f"anonymous-{number:0{len(str(len(every)))}d}" for number, place in enumerate(order.tolist(), 1)
    }
    level = Evidence("sketch") if run.evidence.level == "full" else run.evidence
    source = {"shared from": {"head": run.head, "rounds": len(run.log)}}
    _rewritten(run, out, level, source, names)
    return names


def thinned(run: Run, out: Path, evidence: Evidence) -> None:
    """Writes a run at a lower evidence level, everything else as it is.

    Parameters
    ----------
    run : Run
        Recorded in full.
    out : Path
        The folder of the thinner run, new or empty.
    evidence : Evidence
        What is kept of each update.

    Raises
    ------
    InputError
        If the run is not intact or not recorded in full, or the folder is taken.

    Notes
    -----
    The thinner run has a chain of its own, whose `run.json` names the head and the level of the run it was made from.
    Seals on that head, which prove what the run was, stand beside it in hexadecimal digits.

    Examples
    --------
    >>> from tempfile import TemporaryDirectory
    >>> from gradlens.examples import example_run
    >>> with TemporaryDirectory() as folder:
    ...     thinned(Run.open(example_run(f"{folder}/run")), Path(folder) / "thin", Evidence("sketch", seed=1))
    ...     Run.open(f"{folder}/thin").header["source"]["thinned from"]["evidence"]
    'full'
    """
    _check_intact(run)
    if run.evidence.level != "full":
        raise InputError(f"{run.path}: expected a run that was recorded in full, found {run.evidence.settings!r}")
    before = {"head": run.head, "rounds": len(run.log), "evidence": run.evidence.settings}
    seals = [run.path / name for name in (SIGNATURES, STAMP) if (run.path / name).is_file()]
    before |= {path.name: regular_file(path, LARGEST).read_bytes().hex() for path in seals}
    source = {"thinned from": before} | dict(run.header.get("source", {}))
    if run.scenario:
        source["scenario"] = run.scenario
    _rewritten(run, out, evidence, source, None)


def _check_intact(run: Run) -> None:
    verification = run.verify()
    if not verification.intact:
        raise InputError(f"{run.path}: expected an intact run, found: {verification.faults[0]}")


def _rewritten(
    run: Run, out: Path, evidence: Evidence, source: Mapping[str, Any], names: Mapping[str, str] | None
) -> None:
    """Writes a run anew at another level; with names, those of clients are replaced and reasons left out."""
    files = run.manifest.named()
    writer = LogWriter.create(out, run.model, run.start, source=source, evidence=evidence)
    try:
        states, metrics = run.states(), [dict(line.get("metrics", {})) for line in run.manifest.rounds]
        for round_, state, numbers in zip(run.log, states, metrics, strict=True):
            path = f"verdicts/{stem(round_.index)}"
            verdict = _renamed(read_table(run.path / path), names) if path in files else None
            writer.commit(_of_others(round_, names), state, verdict=verdict, metrics=numbers)
        if run.has_truth:
            writer.add_truth(_renamed(run.truth, names))
        if run.is_closed:
            writer.close()
    except BaseException:
        writer.leave_open()
        shutil.rmtree(out)
        raise
    writer.leave_open()


def _of_others(round_: Round, names: Mapping[str, str] | None) -> Round:
    """The round with the names replaced, without signatures and reasons of refusals, which may quote what was sent."""
    if names is None:
        return round_
    clients = np.array([names[name] for name in round_.clients.tolist()], np.str_)
    refused = {names[name]: "refused" for name in round_.refused}
    started = {names[name]: start for name, start in round_.started.items()}
    return replace(round_, clients=clients, refused=refused, started=started, signatures={})


def _renamed(table: pd.DataFrame, names: Mapping[str, str] | None) -> pd.DataFrame:
    if names is None:
        return table
    named = table.assign(client=[names.get(str(name), "unknown") for name in table["client"]])
    return named.assign(reason=["" for _ in range(len(named))]) if "reason" in named else named
