"""The chain that names what was committed: `manifest.jsonl`, one line per commit.

Each line holds the SHA-256 of every file of its commit and of the line before. A round exists when its line
does. The chain proves integrity only against a head (the hash of the last line) noted elsewhere.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gradlens.errors import InputError

FORMAT = 1
REDUCED = 2  # of a run that does not record everything: what reads format 1 alone must not take it for whole
MANIFEST, RUN, CLOSED = "manifest.jsonl", "run.json", "closed"
FOLDERS = ("updates", "globals", "verdicts")
START = "0" * 64  # what the first line names as the line before


@dataclass(frozen=True)
class Manifest:
    """The committed lines of a run, and what follows them that was never committed."""

    folder: Path
    lines: tuple[Mapping[str, Any], ...]
    hashes: tuple[str, ...]
    torn: bytes = b""  # an unfinished last line
    faults: tuple[str, ...] = ()  # where the chain does not hold

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

    def named(self) -> dict[str, str]:
        """Path in the run's folder -> SHA-256 of every committed file."""
        return {path: digest for line in self.lines for path, digest in line.get("files", {}).items()}

    def unnamed(self) -> list[str]:
        """Files in the folder that no line names."""
        own = {MANIFEST, CLOSED, *self.named()}
        found = (p for p in self.folder.rglob("*") if not p.is_dir())
        return sorted(str(p.relative_to(self.folder)) for p in found if str(p.relative_to(self.folder)) not in own)

    @property
    def sealed(self) -> bool:
        """Whether the head was noted in the file `closed`, which is written after the closing line."""
        return (self.folder / CLOSED).exists()

    def in_flight(self) -> list[str]:
        """The unnamed files that the next commit could have left when its writer was stopped."""
        number = len(self.rounds)
        names = {f"updates/{stem(number)}", f"verdicts/{stem(number)}", f"globals/{stem(number + 1)}", "truth.arrow"}
        if not self.lines:
            names |= {RUN, f"globals/{stem(0)}"}
        if self.closed:
            names = set()
        partial = {str(beside(Path(name))) for name in (*names, CLOSED)}
        return [] if self.sealed else [name for name in self.unnamed() if name in names | partial]


@dataclass(frozen=True)
class Verification:
    """What `verify` found: the faults, none if the evidence is what was committed."""

    head: str
    rounds: int
    closed: bool
    in_flight: str = ""
    faults: tuple[str, ...] = ()

    @property
    def intact(self) -> bool:
        """Whether nothing is wrong."""
        return not self.faults


@dataclass
class Chain:
    """Appends lines to a manifest that is open unbuffered; each is on the disk before the call returns."""

    file: Any
    head: str = START

    def append(self, line: Mapping[str, Any]) -> None:
        """Commits one line, whole or not at all."""
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


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a run's folder; raises InputError where there is none."""
    path = folder / MANIFEST
    if not folder.is_dir():
        raise InputError(f"{folder}: expected the folder of a run, found {'a file' if folder.exists() else 'nothing'}")
    if not path.is_file():
        raise InputError(f"{folder}: expected a run with a {MANIFEST}, found none; is it the folder of a run?")
    *complete, torn = path.read_bytes().split(b"\n")
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


def verify(folder: Path, head: str | None = None) -> Verification:
    """Recomputes the chain and the hash of every committed file, and looks for what is missing or was added.

    `head` is the hash that was noted when the run was recorded: without it a rewritten chain cannot be told.
    """
    manifest = read_manifest(folder)
    faults = [*manifest.faults, *_order_faults(manifest.lines), *_file_faults(manifest)]
    in_flight = manifest.in_flight()
    faults += [f"{name}: no line of the manifest names it" for name in manifest.unnamed() if name not in in_flight]
    if manifest.torn and (manifest.closed or manifest.sealed):
        faults.append(f"{MANIFEST}: its last line is cut")
    if manifest.sealed:
        sealed = (folder / CLOSED).read_text(errors="replace").strip()
        if sealed not in manifest.hashes:
            faults.append(f"{MANIFEST}: it was cut or rewritten after the run was closed with head {sealed:.64}")
    if head is not None and head not in manifest.hashes:
        faults.append(f"{MANIFEST}: no line has the head {head:.64}; the chain was cut or rewritten")
    lost = describe_in_flight(manifest)
    return Verification(manifest.head, len(manifest.rounds), manifest.closed, lost, tuple(faults))


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


def _order_faults(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    """Rounds are numbered 0, 1, ... and the closing line counts them."""
    faults, count = [], 0
    for number, line in enumerate(lines, start=1):
        if "round" in line:
            if line["round"] != count:
                faults.append(f"{MANIFEST} line {number}: expected round {count}, found round {line['round']}")
            count += 1
        if "closed" in line and line["closed"] != count:
            faults.append(f"{MANIFEST} line {number}: it closes {line['closed']} rounds, there are {count}")
    return faults


def _file_faults(manifest: Manifest) -> list[str]:
    faults = []
    for name, digest in manifest.named().items():
        path = manifest.folder / name
        if not path.resolve().is_relative_to(manifest.folder.resolve()):
            faults.append(f"{name}: lies outside the folder of the run")
        elif not path.is_file():
            faults.append(f"{name}: missing")
        elif sha256(path) != digest:
            faults.append(f"{name}: changed since it was committed")
    return faults
