"""Reading from disk: a recorded run with its ground truth, metrics and verdicts (`Run`), and a sweep of runs."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from gradlens.errors import InputError
from gradlens.log.files import read_state, read_table
from gradlens.log.levels import Evidence
from gradlens.log.log import UpdateLog
from gradlens.log.manifest import (
    LARGEST_TEXT,
    MANIFEST,
    TRUTH,
    Manifest,
    describe_in_flight,
    read_manifest,
    regular_file,
    stem,
)
from gradlens.log.model import ModelSpec
from gradlens.log.verification import Verification, verify
from gradlens.log.writer import TRUTH_COLUMNS, VERDICT_COLUMNS, read_header, sources

SWEEP, CONTROLS = "sweep.json", "controls.arrow"
CONTROL_COLUMNS = ("run", "control", "round", "asr")


@dataclass(frozen=True)
class Run:
    """A recorded run; `Run.open` opens one.

    Attributes
    ----------
    path : Path
        The folder of the run.
    log : UpdateLog
        The committed rounds, as the evidence level records them; each is read from the folder on use.
    header : Mapping
        The content of `run.json`.
    manifest : Manifest
        The hash chain of what was committed.
    model : ModelSpec
        The layers as clients sent them.
    evidence : Evidence
        The evidence level: how much of each update is recorded.

    Notes
    -----
    A run whose writer was stopped is open: it holds every committed round, and `in_flight` names the lost one.

    Examples
    --------
    >>> from tempfile import TemporaryDirectory
    >>> from gradlens import LogWriter
    >>> from gradlens.examples import example_log
    >>> log = example_log(rounds=2)
    >>> with TemporaryDirectory() as folder:
    ...     with LogWriter.create(folder, log.model, log[0].global_model) as writer:
    ...         writer.commit(log[0], log[1].global_model, metrics={"main_accuracy": 0.5})
    ...     run = Run.open(folder)
    ...     run.log, run.is_closed, run.has_truth, run.metrics["main_accuracy"].tolist(), run.verify().intact
    (UpdateLog(1 rounds, 172 parameters in 4 layers), True, False, [0.5], True)
    """

    path: Path
    log: UpdateLog
    header: Mapping[str, Any]
    manifest: Manifest
    model: ModelSpec
    evidence: Evidence

    @classmethod
    def open(cls, path: Path | str) -> "Run":
        """Opens the folder of a run.

        Parameters
        ----------
        path : Path or str
            The folder.

        Raises
        ------
        InputError
            If it does not hold a run, nothing was committed, its manifest is broken, or a newer version wrote it.
        """
        folder = Path(path)
        manifest = read_manifest(folder)
        if manifest.faults:
            raise InputError(f"{folder}: {manifest.faults[0]}; run `gradlens verify {folder}` for details")
        if not manifest.lines:
            raise InputError(f"{folder}: expected a run with a committed line in its manifest, found none")
        reduction, header = read_header(folder)
        log = UpdateLog.lazy(reduction.model, sources(folder, reduction, len(manifest.rounds)))
        return cls(folder, log, header, manifest, reduction.sent, reduction.evidence)

    @property
    def name(self) -> str:
        """The name of the run's folder."""
        return self.path.resolve().name

    @property
    def scenario(self) -> dict[str, Any]:
        """The settings of the simulation, {} for a run that was recorded elsewhere."""
        return dict(self.header.get("scenario", {}))

    @property
    def is_closed(self) -> bool:
        """Whether the run has a closing line."""
        return self.manifest.closed

    @property
    def in_flight(self) -> str:
        """A sentence on the round that was lost when the writer was stopped, "" if none was."""
        return describe_in_flight(self.manifest)

    @property
    def head(self) -> str:
        """SHA-256 of the manifest's last line; note it elsewhere, so that `verify` can prove the run unchanged."""
        return self.manifest.head

    @property
    def has_truth(self) -> bool:
        """Whether the ground truth was recorded."""
        return TRUTH in self.manifest.named()

    @cached_property
    def truth(self) -> pd.DataFrame:
        """The ground truth, columns round, client, compromised, poisoned; raises InputError if the run has none."""
        if not self.has_truth:
            raise InputError(f"{self.path}: the ground truth is needed here, and this run has none")
        table = read_table(self.path / TRUTH)
        if missing := [name for name in TRUTH_COLUMNS if name not in table.columns]:
            raise InputError(f"{self.path}/{TRUTH}: the column {missing[0]!r} is missing")
        return table

    @cached_property
    def metrics(self) -> pd.DataFrame:
        """The metrics after each round's aggregation: a row per round, columns round, main_accuracy, asr, ..."""
        rows = [{"round": line["round"], **line.get("metrics", {})} for line in self.manifest.rounds]
        table = pd.DataFrame(rows, columns=None if rows else ["round"])
        return table.astype({name: float for name in table.columns if name != "round"})

    @cached_property
    def verdicts(self) -> pd.DataFrame:
        """What a filter decided while the run was recorded, a row per round and client; empty without a filter.

        Returns
        -------
        DataFrame
            round, client, detector, score, flag, kept, abstained, null, weight (1: the update was used as sent, 0: left
            out), reason (why the weight is not 1, and what held for the whole round).

        Notes
        -----
        Older runs did not record weight and reason; these are then derived from kept and flag.
        """
        named = self.manifest.named()
        names = [name for number in range(len(self.log)) if (name := f"verdicts/{stem(number)}") in named]
        if not names:
            return pd.DataFrame(columns=list(VERDICT_COLUMNS))
        table = pd.concat([read_table(self.path / name) for name in names], ignore_index=True)
        if "weight" not in table and "kept" in table:
            table["weight"] = table["kept"].astype(float)
        if "reason" not in table and {"kept", "flag"} <= set(table):
            table["reason"] = np.where(table["kept"], "", np.where(table["flag"], "flagged", "left out"))
        return table

    @property
    def start(self) -> Mapping[str, np.ndarray]:
        """The global model before the first round, layer -> array, in full at every evidence level."""
        return self._state(0)

    def states(self) -> Iterator[Mapping[str, np.ndarray]]:
        """The global model after each round, layer -> array, in full at every evidence level."""
        return (self._state(number + 1) for number in range(len(self.log)))

    def _state(self, number: int) -> Mapping[str, np.ndarray]:
        return read_state(self.path / "globals" / stem(number), self.model)

    def verify(self, head: str | None = None) -> Verification:
        """Checks every committed byte against the hash chain, and the chain against a head noted elsewhere.

        Parameters
        ----------
        head : str, optional
            A `head` that was noted before. Without it a chain that was rewritten as a whole is not detected.

        Returns
        -------
        Verification
        """
        return verify(self.path, head)


@dataclass(frozen=True)
class Sweep:
    """A folder of runs, one per combination of settings; `Sweep.open` opens one.

    Attributes
    ----------
    path : Path
        The folder of the sweep.
    runs : list of Run
        The runs of which something is committed.
    index : Mapping
        The content of `sweep.json`: which settings were varied, and which run is the control of which.

    Examples
    --------
    >>> from tempfile import TemporaryDirectory
    >>> from gradlens import LogWriter
    >>> from gradlens.examples import example_log
    >>> log = example_log(rounds=2)
    >>> index = {"format": 1, "axes": ["seed"], "runs": {"one": [7]}, "controls": {}}
    >>> with TemporaryDirectory() as folder:
    ...     with LogWriter.create(f"{folder}/one", log.model, log[0].global_model) as writer:
    ...         writer.commit(log[0], log[1].global_model)
    ...     _ = (Path(folder) / "sweep.json").write_text(json.dumps(index))
    ...     Sweep.open(folder).settings.columns.tolist(), Sweep.open(folder).run("one").log
    (['seed', 'control'], UpdateLog(1 rounds, 172 parameters in 4 layers))
    """

    path: Path
    runs: list[Run]
    index: Mapping[str, Any]

    @classmethod
    def open(cls, path: Path | str) -> "Sweep":
        """Opens the folder of a sweep; runs of which nothing is committed yet are left out.

        Parameters
        ----------
        path : Path or str
            The folder.

        Raises
        ------
        InputError
            If `sweep.json` is missing or cannot be read, a run cannot be opened, or none is there.
        """
        folder = Path(path)
        index = read_index(folder / SWEEP)
        runs = [Run.open(folder / name) for name in index["runs"] if _has_begun(folder / name)]
        if not runs:
            raise InputError(f"{folder}: the sweep names {len(index['runs'])} runs, found none of them")
        return cls(folder, runs, index)

    @property
    def name(self) -> str:
        """The name of the sweep's folder."""
        return self.path.resolve().name

    @property
    def axes(self) -> list[str]:
        """Names of the varied settings."""
        return list(self.index["axes"])

    @cached_property
    def settings(self) -> pd.DataFrame:
        """A row per run, indexed by its name: the varied settings, and whether it is an attack-free control."""
        rows = {run.name: self.index["runs"][run.name] for run in self.runs}
        table = pd.DataFrame.from_dict(rows, orient="index", columns=self.axes)
        controls = set(self.index["controls"].values())
        return table.assign(control=[name in controls for name in table.index]).rename_axis("run")

    @cached_property
    def controls(self) -> pd.DataFrame:
        """Columns run, control, round, asr: the attack success rate of `run`'s attack on its control's models."""
        path = self.path / CONTROLS
        return read_table(path) if path.exists() else pd.DataFrame(columns=list(CONTROL_COLUMNS))

    def run(self, name: str) -> Run:
        """The run of that name; raises InputError if there is none."""
        run = next((run for run in self.runs if run.name == name), None)
        if run is None:
            raise InputError(f"{self.path}: no run is called {name!r}; it has {len(self.runs)} others")
        return run

    def control_of(self, name: str) -> Run:
        """The attack-free run with the same settings and seed; raises InputError if there is none."""
        if name not in self.index["controls"]:
            raise InputError(f"{self.path}: run {name!r} has no attack-free control")
        return self.run(self.index["controls"][name])


def open_run(path: Path | str) -> Run | Sweep:
    """Opens a recorded run or a sweep of runs; also `gradlens.open`.

    Parameters
    ----------
    path : Path or str
        The folder.

    Returns
    -------
    Run or Sweep
        A sweep if the folder holds a `sweep.json`.

    Raises
    ------
    InputError
        If the folder is neither, or cannot be read.

    Examples
    --------
    >>> from tempfile import TemporaryDirectory
    >>> from gradlens import LogWriter
    >>> from gradlens.examples import example_log
    >>> log = example_log(rounds=2)
    >>> with TemporaryDirectory() as folder:
    ...     with LogWriter.create(folder, log.model, log[0].global_model) as writer:
    ...         writer.commit(log[0], log[1].global_model)
    ...     open_run(folder).log
    UpdateLog(1 rounds, 172 parameters in 4 layers)
    """
    folder = Path(path)
    if not folder.exists():
        raise InputError(f"{folder}: expected the folder of a run or a sweep, found nothing")
    if not folder.is_dir():
        raise InputError(f"{folder}: expected the folder of a run or a sweep, found a file")
    return Sweep.open(folder) if (folder / SWEEP).is_file() else Run.open(folder)


def _has_begun(folder: Path) -> bool:
    path = folder / MANIFEST
    return path.is_file() and b"\n" in path.read_bytes()


def read_index(path: Path) -> dict[str, Any]:
    """The content of a `sweep.json`; raises InputError where it is not that of a sweep."""
    try:
        index = json.loads(regular_file(path, LARGEST_TEXT).read_bytes())
    except InputError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: not readable as JSON: {error}") from error
    shapes = {"axes": list, "runs": dict, "controls": dict}
    if not isinstance(index, dict) or not all(isinstance(index.get(name), kind) for name, kind in shapes.items()):
        raise InputError(f"{path}: expected a JSON object with a list 'axes' and objects 'runs' and 'controls'")
    if not all(isinstance(values, list | dict) for values in index["runs"].values()):
        raise InputError(f"{path}: expected a list or an object of settings for each run")
    if not all(isinstance(name, str) for name in (*index["axes"], *index["controls"].values())):
        raise InputError(f"{path}: expected strings as the names of axes and controls")
    if (version := index.get("format")) != 1:
        raise InputError(
            f"{path}: this version reads sweep format 1, found {version!r}; was it written by a newer gradlens?"
        )
    for name in index["runs"]:
        if Path(name).name != name or name in ("", "..") or "\0" in name:
            raise InputError(f"{path}: {name!r} is not the name of a run's folder")
    return index
