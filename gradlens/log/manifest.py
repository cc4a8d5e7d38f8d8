"""The chain that names what was committed: `manifest.jsonl`, one line per commit.

Each line holds the SHA-256 of every file of its commit and of the line before. A round exists when its line
does. The chain proves integrity only against a head (the hash of the last line) noted elsewhere.
"""

import hashlib
import json
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gradlens.errors import InputError

FORMAT = 1
REDUCED = 2  # of a run that does not record everything: what reads format 1 alone must not take it for whole
MANIFEST, RUN, CLOSED, TRUTH = "manifest.jsonl", "run.json", "closed", "truth.arrow"
SIGNATURES, STAMP = "signatures.json", "stamp.tsr"  # seals, which lie beside the manifest and are no part of the chain
FOLDERS = ("updates", "globals", "verdicts")
START = "0" * 64  # what the first line names as the line before
COMMITTED = re.compile(rf"{re.escape(RUN)}|{re.escape(TRUTH)}|(?:{'|'.join(FOLDERS)})/round-\d{{6,18}}\.arrow")
LARGEST_TABLE = 1 << 28  # bytes of the largest table or scenario in text that is read
LARGEST_TEXT = 1 << 30  # bytes of the largest manifest or run.json that is read


@dataclass(frozen=True)
class Manifest:
    """The committed lines of a run, and what follows them that was never committed.

    Attributes
    ----------
    folder : Path
        The folder of the run.
    lines, hashes : tuple
        The committed lines, and the SHA-256 of each.
    torn : bytes
        An unfinished last line.
    faults : tuple of str
        Where the chain does not hold.
    """

    folder: Path
    lines: tuple[Mapping[str, Any], ...]
    hashes: tuple[str, ...]
    torn: bytes = b""
    faults: tuple[str, ...] = ()

    @property
    def head(self) -> str:
        """SHA-256 of the last committed line: what to note elsewhere."""
        return self.hashes[-1] if self.hashes else START

    @property
    def rounds(self) -> list[Mapping[str, Any]]:
        """The lines that commit a round, in order."""
        return [line for line in self.lines if "round" in line]

    @property
    def closed(self) -> bool:
        """Whether the run was ended in order."""
        return any("closed" in line for line in self.lines)

    @property
    def sealed(self) -> bool:
        """Whether something lies where a writer notes the head after the closing line."""
        return os.path.lexists(self.folder / CLOSED)

    def named(self) -> dict[str, str]:
        """Path in the run's folder -> SHA-256 of every committed file."""
        return {path: digest for line in self.lines for path, digest in line.get("files", {}).items()}

    def in_flight(self) -> list[str]:
        """The unnamed files that the next commit could have left when its writer was stopped."""
        if self.closed or self.sealed:
            partial = {str(beside(Path(CLOSED)))}
            names: set[str] = set()
        else:
            number = len(self.rounds)
            names = {f"updates/{stem(number)}", f"verdicts/{stem(number)}", f"globals/{stem(number + 1)}", TRUTH}
            if not self.lines:
                names |= {RUN, f"globals/{stem(0)}"}
            partial = {str(beside(Path(name))) for name in (*names, CLOSED)}
        if self.sealed:
            partial = set()
        committed = self.named()
        return sorted(name for name in names | partial if name not in committed and os.path.lexists(self.folder / name))


@dataclass
class Chain:
    """Appends lines to a manifest that is open unbuffered; each is on the disk before the call returns."""

    file: Any
    head: str = START

    def append(self, line: Mapping[str, Any]) -> None:
        """Commits one line, whole or not at all; raises OSError where the manifest is no longer in its place."""
        self.check_place()
        payload = json.dumps({**line, "previous": self.head}, allow_nan=False).encode()
        end = os.fstat(self.file.fileno()).st_size
        try:
            if self.file.write(payload + b"\n") != len(payload) + 1:
                raise OSError(f"{self.file.name}: the disk took a part of the line only")
            os.fsync(self.file.fileno())
        except BaseException:
            os.ftruncate(self.file.fileno(), end)
            raise
        self.head = hashlib.sha256(payload).hexdigest()

    def check_place(self) -> None:
        """Raises OSError where the manifest was removed or replaced while it was being written."""
        held = os.fstat(self.file.fileno())
        try:
            there = os.lstat(self.file.name)
        except OSError as error:
            raise OSError(f"{self.file.name}: the manifest was removed while recording") from error
        if (held.st_dev, held.st_ino) != (there.st_dev, there.st_ino):
            raise OSError(f"{self.file.name}: the manifest was replaced while recording")


def beside(path: Path) -> Path:
    """Where a file is written before it is renamed to its place."""
    return path.with_name(f".{path.name}.part")


def stem(number: int) -> str:
    """The file name of a round or of the global model before it."""
    return f"round-{number:06d}.arrow"


def sha256(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def regular_file(path: Path, largest: int | None = None) -> Path:
    """The path of a plain file; raises InputError for a link, a folder, a pipe, a device, and for too many bytes."""
    try:
        found = os.lstat(path)
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file") from error
    except (OSError, ValueError) as error:  # a name with NUL or of 5,000 characters, a loop of links
        raise InputError(f"{path!s:.200}: cannot be a file of a run: {error}") from error
    if not stat.S_ISREG(found.st_mode):
        raise InputError(f"{path}: expected a plain file, found {kind_of_file(found.st_mode)}")
    if largest is not None and found.st_size > largest:
        raise InputError(f"{path}: expected at most {largest:,} bytes, found {found.st_size:,}")
    return path


def named_file(path: Path | str, largest: int = LARGEST_TABLE) -> Path:
    """The path of a file that somebody names, links followed; what is not there is left to whoever opens it.

    Raises InputError for a folder, a pipe and a device, which would be waited for or have no end, and for too many
    bytes.
    """
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return Path(path)
    if not stat.S_ISREG(found.st_mode):
        raise InputError(f"{path}: expected a plain file, found {kind_of_file(found.st_mode)}")
    if found.st_size > largest:
        raise InputError(f"{path}: expected at most {largest:,} bytes, found {found.st_size:,}")
    return Path(path)


def kind_of_file(mode: int) -> str:
    """What lies at a path that is no plain file, in words."""
    kinds = {
        stat.S_IFLNK: "a symbolic link", stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFCHR: "a device",
        stat.S_IFBLK: "a device", stat.S_IFSOCK: "a socket",
    }  # fmt: skip
    return kinds.get(stat.S_IFMT(mode), "something else")


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a run's folder; raises InputError where there is none."""
    path = folder / MANIFEST
    if not folder.is_dir():
        raise InputError(f"{folder}: expected the folder of a run, found {'a file' if folder.exists() else 'nothing'}")
    if not os.path.lexists(path):
        raise InputError(f"{folder}: expected a run with a {MANIFEST}, found none; is it the folder of a run?")
    *complete, torn = regular_file(path, LARGEST_TEXT).read_bytes().split(b"\n")
    lines, hashes, faults, previous = [], [], [], START
    for number, payload in enumerate(complete, start=1):
        line = _parsed(payload)
        if line is None:
            faults.append(f"{MANIFEST} line {number}: not a line of a manifest")
            break
        if line.get("previous") != previous:
            faults.append(f"{MANIFEST} line {number}: it does not follow the line before it")
        lines.append(line)
        previous = hashlib.sha256(payload).hexdigest()
        hashes.append(previous)
    return Manifest(folder, tuple(lines), tuple(hashes), torn, tuple(faults))


def describe_in_flight(manifest: Manifest) -> str:
    """Which round was being written when the writer stopped, '' if none."""
    files = manifest.in_flight()
    if not files and (not manifest.torn or manifest.closed):
        return ""
    left = ", ".join(files) or "a torn line of the manifest"
    return f"round {len(manifest.rounds)} was in flight and is not part of the record ({left})"


def _parsed(payload: bytes) -> dict[str, Any] | None:
    """A line as a table, None where it cannot be one that `Chain` wrote."""
    try:
        line = json.loads(payload)
    except (ValueError, RecursionError):
        return None
    if not isinstance(line, dict) or not isinstance(line.get("previous"), str):
        return None
    files = line.get("files", {})
    if not isinstance(files, dict) or not all(isinstance(v, str) for v in files.values()):
        return None
    numbers = [line[key] for key in ("round", "closed") if key in line]
    return line if all(type(n) is int for n in numbers) else None
