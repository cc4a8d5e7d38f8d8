"""Recording: `LogWriter` commits one round at a time, whole or not at all."""

import fcntl
import json
import os
import platform
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import pandas as pd

from gradlens.errors import InputError
from gradlens.log.files import (
    read_state,
    read_updates,
    replace_with,
    sync_folder,
    write_state,
    write_table,
    write_updates,
)
from gradlens.log.levels import Evidence, Reduction
from gradlens.log.log import UpdateLog, fitted
from gradlens.log.manifest import (
    CLOSED,
    FOLDERS,
    FORMAT,
    LARGEST_TEXT,
    MANIFEST,
    REDUCED,
    RUN,
    TRUTH,
    Chain,
    Manifest,
    beside,
    read_manifest,
    regular_file,
    sha256,
    stem,
)
from gradlens.log.model import ModelSpec
from gradlens.log.round import Round

FULL = Evidence()
TRUTH_COLUMNS = ("round", "client", "compromised", "poisoned")
VERDICT_COLUMNS = ("round", "client", "detector", "score", "flag", "kept", "abstained", "null", "weight", "reason")


class LogWriter:
    """Records a run: `commit` a round at a time, `add_truth`, `close`; as a context manager it closes by itself.

    A round is written beside its place, flushed, renamed, and exists when its line stands in the manifest: a
    writer that is killed leaves every committed round intact. One writer at a time holds a folder. A block that
    is left through an exception leaves the run open, to be resumed.
    model: of what clients send; log: the committed rounds, of what `evidence` records of it; global_model: layer ->
    array, after the last of them, whole.
    """

    def __init__(self, folder: Path, reduction: Reduction, manifest: Manifest, file: Any, lock: "FolderLock") -> None:
        self._lock = lock
        self.folder, self.model, self.evidence = folder, reduction.sent, reduction.evidence
        self._reduction, self._chain = reduction, Chain(file, manifest.head)
        self.global_model = read_state(folder / "globals" / stem(len(manifest.rounds)), self.model)
        self.log = UpdateLog.lazy(reduction.model, sources(folder, reduction, len(manifest.rounds)))

    @classmethod
    def create(
        cls,
        path: Path | str,
        model: ModelSpec,
        global_model: Mapping[str, np.ndarray],
        *,
        scenario: Mapping[str, Any] | None = None,
        source: Mapping[str, Any] | None = None,
        evidence: Evidence = FULL,
        lock: "FolderLock | None" = None,
    ) -> Self:
        """Starts a run in a new or empty folder; raises InputError where something lies there already.

        evidence: what of each update is recorded; the global models always are whole.
        What a writer left that was stopped before its first commit is cleared away. A start that fails leaves nothing.
        lock: of the folder, where the caller holds it already; the writer lets go of it in the end.
        """
        folder = Path(path)
        _check_state(model, global_model)
        reduction = evidence.on(model)
        held = lock or FolderLock.of(folder)
        try:
            check_free(folder)
            _clear(folder)
        except BaseException:
            _release(held, lock)
            raise
        header = {"format": FORMAT, "model": model.to_json(), "software": _software()}
        if evidence != FULL:
            header |= {"format": REDUCED, "evidence": evidence.to_json()}
        header["scenario" if scenario is not None else "source"] = dict(scenario or source or {})
        file = None
        try:
            for name in FOLDERS:
                (folder / name).mkdir(parents=True)
            payload = json.dumps(header, indent=1, allow_nan=False).encode()
            replace_with(folder / RUN, payload, secret=evidence.seed is not None)
            write_state(folder / "globals" / stem(0), model, global_model)
            file = _locked(folder / MANIFEST)
            Chain(file).append({"files": _digests(folder, [RUN, f"globals/{stem(0)}"])})
            sync_folder(folder)
        except BaseException:
            if file is not None:
                file.close()
            _clear(folder)
            _release(held, lock)
            raise
        return cls(folder, reduction, read_manifest(folder), file, held)

    @classmethod
    def resume(cls, path: Path | str, *, lock: "FolderLock | None" = None) -> Self:
        """Goes on with an open run after its last committed round; what was in flight is dropped.

        Raises InputError where there is no run, it is closed, its chain is broken, or another writer holds it.
        """
        folder = Path(path)
        read_manifest(folder)  # says in one line where there is none
        held = lock or FolderLock.of(folder)
        file = None
        try:
            file = _locked(folder / MANIFEST)
            manifest = read_manifest(folder)  # only now: whoever held the lock may have committed
            fault = (*manifest.faults, "" if manifest.lines else "no line was committed")[0]
            if manifest.closed and not fault:
                fault = f"the run is closed with {len(manifest.rounds)} rounds"
            if fault:
                raise InputError(f"{folder}: {fault}; record into a new folder")
            for name in manifest.in_flight():
                (folder / name).unlink()
            os.truncate(folder / MANIFEST, (folder / MANIFEST).stat().st_size - len(manifest.torn))
            return cls(folder, read_header(folder)[0], manifest, file, held)
        except BaseException:
            if file is not None:
                file.close()
            _release(held, lock)
            raise

    def commit(
        self,
        round_: Round,
        next_global: Mapping[str, np.ndarray],
        *,
        verdict: pd.DataFrame | None = None,
        metrics: Mapping[str, Any] | None = None,
    ) -> None:
        """Records what was sent, what was decided and what came of it; on the disk when the call returns.

        round_: of whole updates, or as the evidence level records them.
        Raises InputError where the round is not the next one or its layers are not the model's, OSError where the
        disk does not take it; then nothing of it stays, and the next commit is of the same round.
        """
        number = len(self.log)
        if round_.index != number:
            raise InputError(f"{self.folder}: expected round {number} next, found round {round_.index}")
        round_ = fitted(self.log.model, self._reduction.of_round(round_))
        _check_state(self.model, next_global)
        self._chain.check_place()
        names = [f"updates/{stem(number)}", f"globals/{stem(number + 1)}"]
        try:
            write_updates(self.folder / names[0], self.log.model, round_)
            write_state(self.folder / names[1], self.model, next_global)
            if verdict is not None:
                names.append(f"verdicts/{stem(number)}")
                write_table(self.folder / names[2], verdict)
            line = {"round": number, "files": _digests(self.folder, names), "metrics": _plain(metrics or {})}
            self._chain.append(line)
        except BaseException:
            for name in names:
                (self.folder / name).unlink(missing_ok=True)
            raise
        self.log = self.log.recorded(round_, sources(self.folder, self._reduction, number + 1)[number])
        self.global_model = read_state(self.folder / names[1], self.model)

    def add_truth(self, table: pd.DataFrame) -> None:
        """Records once who was compromised and which updates were poisoned: round, client, compromised, poisoned."""
        add_truth(self.folder, self._chain, table)

    def close(self) -> None:
        """Ends the run with its closing line; the head is then noted in the file `closed`."""
        if self._chain.file.closed:
            return
        self._chain.append({"closed": len(self.log)})
        replace_with(self.folder / CLOSED, f"{self._chain.head}\n".encode())
        self.leave_open()

    def leave_open(self) -> None:
        """Lets go of the folder without a closing line: the run can be resumed."""
        self._chain.file.close()
        self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.leave_open()


def sources(folder: Path, reduction: Reduction, count: int) -> list[Callable[[], Round]]:
    """One reader for each of the committed rounds."""
    return [partial(read_round, folder, reduction, number) for number in range(count)]


def read_round(folder: Path, reduction: Reduction, number: int) -> Round:
    """One committed round, mapped; raises InputError where its files are not what was recorded."""
    path = folder / "updates" / stem(number)
    state = reduction.state(read_state(folder / "globals" / stem(number), reduction.sent))
    round_ = read_updates(path, reduction.model, state, reduction.summed)
    if round_.index != number:
        raise InputError(f"{path}: expected round {number}, found round {round_.index}")
    return round_


def read_header(folder: Path) -> tuple[Reduction, dict[str, Any]]:
    """What is recorded of which model, and all of `run.json`; raises InputError where it is unreadable or too new."""
    path = folder / RUN
    try:
        header = json.loads(regular_file(path, LARGEST_TEXT).read_bytes())
    except InputError as error:
        raise InputError(f"{folder}: expected a run with a {RUN}: {error}") from error
    except (ValueError, OSError, RecursionError) as error:
        raise InputError(f"{path}: not readable as JSON: {error}") from error
    found = header.get("format") if isinstance(header, dict) else None
    if not isinstance(found, int) or found > REDUCED or found < 1:
        reads = f"this version reads run formats {FORMAT} and {REDUCED}"
        raise InputError(f"{path}: {reads}, found {found!r}; a newer gradlens wrote it?")
    if found == REDUCED and "evidence" not in header:
        raise InputError(f"{path}: a run of format {REDUCED} says what of each update is recorded, this one does not")
    if not isinstance(header.get("model"), dict):
        raise InputError(f"{path}: it names no model")
    return Evidence.from_json(header.get("evidence")).on(ModelSpec.from_json(header["model"])), header


def add_truth(folder: Path, chain: Chain, table: pd.DataFrame) -> None:
    """Writes `truth.arrow` and its line; raises InputError where there is one or a column is missing."""
    if missing := [name for name in TRUTH_COLUMNS if name not in table.columns]:
        raise InputError(f"truth needs the columns {', '.join(TRUTH_COLUMNS)}; {missing[0]!r} is missing")
    if TRUTH in read_manifest(folder).named():
        raise InputError(f"{folder}: the truth is written once, and this run has one")
    types = {"round": np.int64, "client": str, "compromised": bool, "poisoned": bool}
    write_table(folder / TRUTH, table[list(TRUTH_COLUMNS)].astype(types))
    chain.append({"truth": len(table), "files": _digests(folder, [TRUTH])})


def record_truth(folder: Path, table: pd.DataFrame) -> None:
    """Adds the truth to a run that nobody is writing, open or closed, as one more commit."""
    read_manifest(folder)  # says in one line where there is none
    with FolderLock.of(folder), _locked(folder / MANIFEST) as file:
        manifest = read_manifest(folder)
        if fault := (*manifest.faults, "its last line is cut; go on with the run first" if manifest.torn else "")[0]:
            raise InputError(f"{folder}: {fault}")
        add_truth(folder, Chain(file, manifest.head), table)


@dataclass(eq=False)
class FolderLock:
    """The right to write into a folder, held before anybody looks at what lies there.

    The folder itself is locked: it is never removed, and the lock ends with the process that holds it.
    """

    folder: Path
    descriptor: int

    @classmethod
    def of(cls, folder: Path, patience: float = 0.0) -> Self:
        """Takes the lock, and makes the folder where there is none.

        Parameters
        ----------
        folder : Path
            The folder of a run.
        patience : float
            Seconds for which a writer that is about to end is waited for.

        Raises
        ------
        InputError
            Where another writer holds the folder, or it cannot be made or opened.
        """
        until = time.monotonic() + patience
        while True:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            except OSError as error:
                raise InputError(f"{folder}: a run cannot be recorded here: {error.strerror}") from error
            if _is_locked_by_us(descriptor, folder):
                return cls(folder, descriptor)
            os.close(descriptor)
            if time.monotonic() > until:
                raise InputError(f"{folder}: another writer is recording into this folder")
            time.sleep(0.05)

    def release(self) -> None:
        """Lets go of the folder; a second call does nothing."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def check_free(folder: Path) -> None:
    """Raises InputError where something lies that is no remainder of a start that was stopped."""
    if not folder.exists() or is_stillborn(folder):
        return
    if not folder.is_dir() or any(folder.iterdir()):
        raise InputError(f"{folder}: a run is recorded into a new folder, found one that holds something")


def is_stillborn(folder: Path) -> bool:
    """Whether all that a folder holds is what a writer leaves that was stopped before its first commit."""
    if not (folder / RUN).exists() and not any((folder / name).is_dir() for name in FOLDERS):
        return False
    state = Path("globals") / stem(0)
    first = {str(path) for each in (Path(RUN), state) for path in (each, beside(each))} | {MANIFEST}
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()}
    folders = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_dir()}
    if not files <= first or not folders <= set(FOLDERS):
        return False
    return MANIFEST not in files or not read_manifest(folder).lines


def _clear(folder: Path) -> None:
    """Removes what a start left in the folder, which stays."""
    for name in (RUN, beside(Path(RUN)), MANIFEST):
        (folder / name).unlink(missing_ok=True)
    for name in FOLDERS:
        shutil.rmtree(folder / name, ignore_errors=True)


def _check_state(model: ModelSpec, state: Mapping[str, np.ndarray]) -> None:
    if difference := sorted(set(state) ^ set(model)):
        raise InputError(f"the global model and the specification differ in layer {difference[0]!r}")
    for layer in model.layers:
        if (shape := np.shape(state[layer.name])) != layer.shape:
            raise InputError(f"layer {layer.name!r} of the global model must have shape {layer.shape}, found {shape}")


def _digests(folder: Path, names: list[str]) -> dict[str, str]:
    return {name: sha256(folder / name) for name in names}


def _locked(path: Path) -> Any:
    file = open(path, "ab", buffering=0)  # noqa: SIM115 - the writer holds it, and its lock, until it is closed
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.close()
        raise InputError(f"{path.parent}: another writer is recording into this folder") from error
    return file


def _release(held: FolderLock, given: FolderLock | None) -> None:
    """Lets go of a lock that was taken here; one that was given stays the caller's."""
    if given is None:
        held.release()


def _is_locked_by_us(descriptor: int, folder: Path) -> bool:
    """Whether the lock could be taken, of the folder that is still the one at this path."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(descriptor), os.stat(folder))
    except (BlockingIOError, FileNotFoundError):
        return False


def _plain(metrics: Mapping[str, Any]) -> dict[str, float | int | None]:
    """Metrics as JSON numbers; what is not finite is null."""
    values = {name: value.item() if isinstance(value, np.generic) else value for name, value in metrics.items()}
    return {name: None if v is None or not np.isfinite(v) else v for name, v in values.items()}


def _software() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("gradlens-forensics", "numpy", "pyarrow", "torch"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
