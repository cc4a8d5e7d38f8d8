"""Writing a run to disk: `LogWriter` commits each round atomically, whole or not at all."""

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
    """Writes a run to a folder, one round per `commit`; start one with `create` or `resume`.

    Attributes
    ----------
    folder : Path
        The folder of the run.
    model : ModelSpec
        The layers as clients send them.
    evidence : Evidence
        The evidence level: how much of each update is recorded.
    log : UpdateLog
        The committed rounds, as the evidence level records them.
    global_model : Mapping of str to ndarray
        Layer -> array, the global model after the last committed round; in full at every evidence level.

    Notes
    -----
    Each file is written under a temporary name, flushed to the disk and renamed. A round exists once its line is in the
    manifest, so a writer that is killed leaves every committed round intact. Only one writer at a time can hold a
    folder.

    Used as a context manager, the writer closes the run when the block ends. If the block ends with an exception, the
    run stays open and can be resumed.

    Examples
    --------
    >>> from tempfile import TemporaryDirectory
    >>> from gradlens.examples import example_log
    >>> log = example_log(rounds=2)
    >>> with TemporaryDirectory() as folder:
    ...     with LogWriter.create(folder, log.model, log[0].global_model) as writer:
    ...         writer.commit(log[0], next_global=log[1].global_model)
    ...     len(writer.log), bool((writer.log[0].updates["fc2.bias"] == log[0].updates["fc2.bias"]).all())
    (1, True)
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
        """Starts a new run.

        Parameters
        ----------
        path : Path or str
            A folder that is new, empty, or holds only what a writer left that was stopped before its first commit;
            such leftovers are removed.
        model : ModelSpec
            The layers as clients send them.
        global_model : Mapping of str to ndarray
            Layer -> array, the global model before the first round.
        scenario, source : Mapping, optional
            JSON values for `run.json`: the settings of a simulation, or where the updates come from. `source` is
            ignored if there is a scenario.
        evidence : Evidence, default full
            How much of each update is recorded. Global models are always recorded in full.
        lock : FolderLock, optional
            The lock of the folder, if the caller already holds it; the writer releases it when it ends.

        Raises
        ------
        InputError
            If the folder holds something else, another writer holds it, it cannot be created, or the layers of the
            global model differ from the specification's. A start that fails leaves no files behind.
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
        header |= {"source": dict(source or {})} if scenario is None else {"scenario": dict(scenario)}
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
        """Continues an open run after its last committed round.

        Parameters
        ----------
        path : Path or str
            The folder of the run. The files of a round that was never committed are deleted.
        lock : FolderLock, optional
            The lock of the folder, if the caller already holds it; the writer releases it when it ends.

        Raises
        ------
        InputError
            If there is no run, it is closed, its hash chain is broken, or another writer holds it.
        """
        folder = Path(path)
        read_manifest(folder)  # raises a clear error if there is no run
        held = lock or FolderLock.of(folder)
        file = None
        try:
            file = _locked(folder / MANIFEST)
            manifest = read_manifest(folder)  # again, under the lock: another writer may have committed in between
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
        """Records the next round; when the call returns, it is on the disk.

        Parameters
        ----------
        round_ : Round
            The updates, in full or as the evidence level records them.
        next_global : Mapping of str to ndarray
            Layer -> array, the global model after the round.
        verdict : DataFrame, optional
            What a filter decided, with the columns of `Run.verdicts`.
        metrics : Mapping, optional
            Name -> number; numbers that are not finite are recorded as null.

        Raises
        ------
        InputError
            If the round is not the next one, or its layers or those of `next_global` differ from the model's.
        OSError
            If the disk does not take the round, or the manifest was removed or replaced. Nothing of the round is kept,
            and the next commit must be of the same round.
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
        """Records the ground truth, once per run.

        Parameters
        ----------
        table : DataFrame
            The columns round, client, compromised (bool) and poisoned (bool).

        Raises
        ------
        InputError
            If the run already has a ground truth, or a column is missing.
        """
        add_truth(self.folder, self._chain, table)

    def close(self) -> None:
        """Ends the run: writes the closing line, and the hash of that line into the file `closed`."""
        if self._chain.file.closed:
            return
        self._chain.append({"closed": len(self.log)})
        replace_with(self.folder / CLOSED, f"{self._chain.head}\n".encode())
        self.leave_open()

    def leave_open(self) -> None:
        """Releases the folder without closing the run, which can be resumed."""
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
    """Functions without arguments that read the committed rounds, one per round."""
    return [partial(read_round, folder, reduction, number) for number in range(count)]


def read_round(folder: Path, reduction: Reduction, number: int) -> Round:
    """Reads one committed round, memory-mapped; raises InputError if its files are not what was recorded."""
    path = folder / "updates" / stem(number)
    state = reduction.state(read_state(folder / "globals" / stem(number), reduction.sent))
    round_ = read_updates(path, reduction.model, state, reduction.summed)
    if round_.index != number:
        raise InputError(f"{path}: expected round {number}, found round {round_.index}")
    return round_


def read_header(folder: Path) -> tuple[Reduction, dict[str, Any]]:
    """Reads `run.json`: what is recorded of which model, and the whole content.

    Raises
    ------
    InputError
        If the file is missing, unreadable or of a newer format.
    """
    path = folder / RUN
    try:
        header = json.loads(regular_file(path, LARGEST_TEXT).read_bytes())
    except InputError as error:
        raise InputError(f"{folder}: expected a run with a {RUN}: {error}") from error
    except (ValueError, OSError, RecursionError) as error:
        raise InputError(f"{path}: not readable as JSON: {error}") from error
    version_ = header.get("format") if isinstance(header, dict) else None
    if not isinstance(version_, int) or version_ > REDUCED or version_ < 1:
        expected = f"this version reads run formats {FORMAT} and {REDUCED}"
        raise InputError(f"{path}: {expected}, found {version_!r}; was it written by a newer gradlens?")
    if version_ == REDUCED and "evidence" not in header:
        raise InputError(f"{path}: a run of format {REDUCED} must have the key 'evidence', found none")
    if not isinstance(header.get("model"), dict):
        raise InputError(f"{path}: expected a JSON object under the key 'model', found none")
    return Evidence.from_json(header.get("evidence")).on(ModelSpec.from_json(header["model"])), header


def add_truth(folder: Path, chain: Chain, table: pd.DataFrame) -> None:
    """Writes `truth.arrow` and its manifest line; raises InputError if there is one or a column is missing."""
    if missing := [name for name in TRUTH_COLUMNS if name not in table.columns]:
        raise InputError(f"the ground truth needs the columns {', '.join(TRUTH_COLUMNS)}; {missing[0]!r} is missing")
    if TRUTH in read_manifest(folder).named():
        raise InputError(f"{folder}: the ground truth is written once, and this run already has one")
    types = {"round": np.int64, "client": str, "compromised": bool, "poisoned": bool}
    write_table(folder / TRUTH, table[list(TRUTH_COLUMNS)].astype(types))
    chain.append({"truth": len(table), "files": _digests(folder, [TRUTH])})


def record_truth(folder: Path, table: pd.DataFrame) -> None:
    """Adds the ground truth, as `LogWriter.add_truth` does, to a run that no writer holds, open or closed.

    Raises
    ------
    InputError
        If there is no run, its manifest is broken or cut, another writer holds it, it already has a ground truth, or a
        column is missing.
    """
    read_manifest(folder)  # raises a clear error if there is no run
    with FolderLock.of(folder), _locked(folder / MANIFEST) as file:
        manifest = read_manifest(folder)
        if fault := (*manifest.faults, "its last line is cut; resume the run first" if manifest.torn else "")[0]:
            raise InputError(f"{folder}: {fault}")
        add_truth(folder, Chain(file, manifest.head), table)


@dataclass(eq=False)
class FolderLock:
    """The exclusive right to write into a folder, taken before its content is read.

    The folder itself is locked: it is never removed, and the lock ends with the process that holds it.
    """

    folder: Path
    descriptor: int  # of the open folder, -1 once it is released

    @classmethod
    def of(cls, folder: Path, patience: float = 0.0) -> Self:
        """Takes the lock, and creates the folder if it does not exist.

        Parameters
        ----------
        folder : Path
            The folder of a run.
        patience : float, default 0
            Seconds to wait for another writer to release the folder.

        Raises
        ------
        InputError
            If another writer holds the folder, or it cannot be created or opened.
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
        """Releases the folder; a second call does nothing."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def check_free(folder: Path) -> None:
    """Raises InputError if a folder holds anything but what a writer left that was stopped before its first commit."""
    if not folder.exists() or is_stillborn(folder):
        return
    if not folder.is_dir() or any(folder.iterdir()):
        raise InputError(f"{folder}: a run is recorded into a new folder, found one that holds something")


def is_stillborn(folder: Path) -> bool:
    """Whether a folder holds only what a writer left that was stopped before its first commit."""
    if not (folder / RUN).exists() and not any((folder / name).is_dir() for name in FOLDERS):
        return False
    state = Path("globals") / stem(0)
    first = {str(written) for path in (Path(RUN), state) for written in (path, beside(path))} | {MANIFEST}
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()}
    folders = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_dir()}
    if not files <= first or not folders <= set(FOLDERS):
        return False
    return MANIFEST not in files or not read_manifest(folder).lines


def _clear(folder: Path) -> None:
    """Deletes the files of a start that failed or was stopped; the folder itself stays."""
    for name in (RUN, beside(Path(RUN)), MANIFEST):
        (folder / name).unlink(missing_ok=True)
    for name in FOLDERS:
        shutil.rmtree(folder / name, ignore_errors=True)


def _check_state(model: ModelSpec, state: Mapping[str, np.ndarray]) -> None:
    if difference := sorted(set(state) ^ set(model)):
        raise InputError(f"layer {difference[0]!r} is not in both the global model and its specification")
    for layer in model.layers:
        if (shape := np.shape(state[layer.name])) != layer.shape:
            raise InputError(f"layer {layer.name!r} of the global model must have shape {layer.shape}, found {shape}")


def _digests(folder: Path, names: list[str]) -> dict[str, str]:
    return {name: sha256(folder / name) for name in names}


def _locked(path: Path) -> Any:
    file = open(path, "ab", buffering=0)  # noqa: SIM115 - stays open, and locked, until the writer closes it
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.close()
        raise InputError(f"{path.parent}: another writer is recording into this folder") from error
    return file


def _release(held: FolderLock, given: FolderLock | None) -> None:
    """Releases a lock that was taken here; one that the caller gave stays with the caller."""
    if given is None:
        held.release()


def _is_locked_by_us(descriptor: int, folder: Path) -> bool:
    """Takes the lock; False if another process holds it, or the path no longer leads to the same folder."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(descriptor), os.stat(folder))
    except (BlockingIOError, FileNotFoundError):
        return False


def _plain(metrics: Mapping[str, Any]) -> dict[str, float | int | None]:
    """Converts metrics to JSON numbers; None for those that are not finite."""
    values = {name: value.item() if isinstance(value, np.generic) else value for name, value in metrics.items()}
    return {name: None if value is None or not np.isfinite(value) else value for name, value in values.items()}


def _software() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in ("gradlens-forensics", "numpy", "pyarrow", "torch"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions
