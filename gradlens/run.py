"""A recorded run with its scenario, ground truth, metrics and live verdicts; and a folder of them."""

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
    """One recorded run; what is read from its folder is read when it is asked for.

    A run whose writer was stopped is open: it holds every committed round, and `in_flight` names the lost one.
    model: of what clients sent; evidence: what of it the log holds.
    """

    path: Path
    log: UpdateLog
    header: Mapping[str, Any]
    manifest: Manifest
    model: ModelSpec
    evidence: Evidence

    @classmethod
    def open(cls, path: Path | str) -> "Run":
        """Opens the folder of a run; raises InputError where it is none or its manifest is broken."""
        folder = Path(path)
        manifest = read_manifest(folder)
        if manifest.faults:
            raise InputError(f"{folder}: {manifest.faults[0]}; `gradlens verify {folder}` tells more")
        if not manifest.lines:
            raise InputError(f"{folder}: nothing was committed")
        reduction, header = read_header(folder)
        log = UpdateLog.lazy(reduction.model, sources(folder, reduction, len(manifest.rounds)))
        return cls(folder, log, header, manifest, reduction.sent, reduction.evidence)

    @property
    def name(self) -> str:
        """The name of the run's folder."""
        return self.path.resolve().name

    @property
    def scenario(self) -> dict[str, Any]:
        """The settings it was simulated with, {} for a run recorded elsewhere."""
        return dict(self.header.get("scenario", {}))

    @property
    def is_closed(self) -> bool:
        """Whether the run was ended in order."""
        return self.manifest.closed

    @property
    def in_flight(self) -> str:
        """Which round was lost when the writer was stopped, '' if none."""
        return describe_in_flight(self.manifest)

    @property
    def head(self) -> str:
        """SHA-256 of the manifest's last line: what to note elsewhere."""
        return self.manifest.head

    @property
    def has_truth(self) -> bool:
        """Whether the ground truth was recorded."""
        return TRUTH in self.manifest.named()

    @cached_property
    def truth(self) -> pd.DataFrame:
        """Columns round, client, compromised, poisoned; raises InputError where the run has none."""
        if not self.has_truth:
            raise InputError(f"{self.path}: the ground truth is needed here, and this run has none")
        table = read_table(self.path / TRUTH)
        if missing := [name for name in TRUTH_COLUMNS if name not in table.columns]:
            raise InputError(f"{self.path}/{TRUTH}: the column {missing[0]!r} is missing")
        return table

    @cached_property
    def metrics(self) -> pd.DataFrame:
        """A row per round: round, main_accuracy, asr, seconds, ..., after the round's aggregation."""
        rows = [{"round": line["round"], **line.get("metrics", {})} for line in self.manifest.rounds]
        table = pd.DataFrame(rows, columns=None if rows else ["round"])
        return table.astype({name: float for name in table.columns if name != "round"})

    @cached_property
    def verdicts(self) -> pd.DataFrame:
        """What a live filter decided: round, client, detector, score, flag, kept, abstained, null, weight, reason.

        weight: what the client counted, 1 as it came, 0 not at all; reason: why not 1, and what held for the whole
        round. Runs of before there were these two get them from `kept` and `flag`.
        """
        named = self.manifest.named()
        names = [name for n in range(len(self.log)) if (name := f"verdicts/{stem(n)}") in named]
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
        """The global model before the first round, layer -> array; whole at every evidence level."""
        return self._state(0)

    def states(self) -> Iterator[Mapping[str, np.ndarray]]:
        """The global model after each round, layer -> array; whole at every evidence level."""
        return (self._state(n + 1) for n in range(len(self.log)))

    def _state(self, number: int) -> Mapping[str, np.ndarray]:
        return read_state(self.path / "globals" / stem(number), self.model)

    def verify(self, head: str | None = None) -> Verification:
        """Checks every committed byte against the chain, and the chain against a head noted elsewhere."""
        return verify(self.path, head)


@dataclass(frozen=True)
class Sweep:
    """A folder of runs named by digest, and `sweep.json`: what was varied, and which control belongs to which run."""

    path: Path
    runs: list[Run]
    index: Mapping[str, Any]

    @classmethod
    def open(cls, path: Path | str) -> "Sweep":
        """Opens the folder of a sweep; runs of which nothing is committed yet are left out."""
        folder = Path(path)
        index = read_index(folder / SWEEP)
        runs = [Run.open(folder / name) for name in index["runs"] if _has_begun(folder / name)]
        if not runs:
            raise InputError(f"{folder}: the sweep names {len(index['runs'])} runs, none of which is here")
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
        """The varied settings of each run and whether it is an attack-free control; index: name of the run."""
        rows = {run.name: self.index["runs"][run.name] for run in self.runs}
        table = pd.DataFrame.from_dict(rows, orient="index", columns=self.axes)
        controls = set(self.index["controls"].values())
        return table.assign(control=[name in controls for name in table.index]).rename_axis("run")

    @cached_property
    def controls(self) -> pd.DataFrame:
        """Columns run, control, round, asr: the attack of `run`, measured on the global models of its control."""
        path = self.path / CONTROLS
        return read_table(path) if path.exists() else pd.DataFrame(columns=list(CONTROL_COLUMNS))

    def run(self, name: str) -> Run:
        """The run of that name; raises InputError where there is none."""
        found = next((run for run in self.runs if run.name == name), None)
        if found is None:
            raise InputError(f"{self.path}: no run is called {name!r}; it has {len(self.runs)} others")
        return found

    def control_of(self, name: str) -> Run:
        """The attack-free run of the same settings and seed."""
        if name not in self.index["controls"]:
            raise InputError(f"{self.path}: run {name!r} has no attack-free control")
        return self.run(self.index["controls"][name])


def open_run(path: Path | str) -> Run | Sweep:
    """Opens what lies at a path, a run or a sweep; raises InputError where it is neither."""
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
        raise InputError(f"{path}: expected a list of axes, and tables of runs and controls")
    if not all(isinstance(values, list | dict) for values in index["runs"].values()):
        raise InputError(f"{path}: expected the settings of each run")
    if not all(isinstance(name, str) for name in (*index["axes"], *index["controls"].values())):
        raise InputError(f"{path}: names of axes and of controls are text")
    if (found := index.get("format")) != 1:
        raise InputError(f"{path}: this version reads sweep format 1, found {found!r}; a newer gradlens wrote it?")
    for name in index["runs"]:
        if Path(name).name != name or name in ("", "..") or "\0" in name:
            raise InputError(f"{path}: {name!r} is no name of a run's folder")
    return index
