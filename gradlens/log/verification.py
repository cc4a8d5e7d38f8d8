"""`verify`: whether a run's folder holds what was committed, nothing less and nothing more."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gradlens.errors import InputError
from gradlens.log.manifest import (
    CLOSED,
    COMMITTED,
    FOLDERS,
    LARGEST_TEXT,
    MANIFEST,
    SIGNATURES,
    STAMP,
    Manifest,
    describe_in_flight,
    read_manifest,
    regular_file,
    sha256,
)

LARGEST_HEAD = 1_000  # bytes of the file `closed`


@dataclass(frozen=True)
class Verification:
    """The result of `verify`.

    Attributes
    ----------
    head : str
        SHA-256 of the manifest's last line.
    rounds : int
        Number of committed rounds.
    closed : bool
        Whether the run was ended in order.
    in_flight : str
        Which round was being written when the writer stopped, "" if none.
    faults : tuple of str
        What is wrong; empty if the evidence is what was committed.
    after_head : str
        What was committed after the head that was noted elsewhere, "" if nothing.
    seals : tuple of str
        What the signatures and the time stamp say, where they were checked (`gradlens.custody`).

    Examples
    --------
    >>> import tempfile
    >>> from gradlens.examples import example_run
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     verification = verify(example_run(f"{folder}/run"))
    >>> verification.rounds, verification.closed, verification.intact
    (4, True, True)
    """

    head: str
    rounds: int
    closed: bool
    in_flight: str = ""
    faults: tuple[str, ...] = ()
    after_head: str = ""
    seals: tuple[str, ...] = ()

    @property
    def intact(self) -> bool:
        """Whether nothing is wrong."""
        return not self.faults


def verify(folder: Path, head: str | None = None) -> Verification:
    """Recomputes the chain and the hash of every committed file, and looks for what is missing or was added.

    A run that is being recorded is not accused: the folder is listed before its manifest is read.

    Parameters
    ----------
    folder : Path
        The folder of a run.
    head : str, optional
        The head that was noted when the run was recorded; without it a rewritten chain cannot be told.

    Raises
    ------
    InputError
        Where there is no run.

    Examples
    --------
    >>> import tempfile
    >>> from gradlens.examples import example_run
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     run = example_run(f"{folder}/run")
    ...     (run / "updates" / "round-000002.arrow").unlink()
    ...     faults = verify(run).faults
    >>> len(faults)
    1
    """
    listed = _listed(folder)
    sealed, seal_faults = _seal(folder)
    manifest = read_manifest(folder)
    faults = [*manifest.faults, *_order_faults(manifest.lines), *_file_faults(manifest), *seal_faults]
    faults += _added(manifest, listed)
    if manifest.torn and (manifest.closed or manifest.sealed):
        faults.append(f"{MANIFEST}: its last line is cut")
    if sealed is not None and sealed != _closing_head(manifest):
        faults.append(f"{MANIFEST}: it was cut or rewritten after the run was closed with head {sealed:.64}")
    if head is not None and head not in manifest.hashes:
        faults.append(f"{MANIFEST}: no line has the head {head:.64}; the chain was cut or rewritten")
    lost, after = describe_in_flight(manifest), _after(manifest, head)
    if not lost and manifest.closed and not os.path.lexists(folder / CLOSED):
        lost = f"the file {CLOSED} is missing: it was deleted, or the recorder was killed as it closed the run"
    return Verification(manifest.head, len(manifest.rounds), manifest.closed, lost, tuple(faults), after)


def _listed(folder: Path) -> list[str]:
    """Paths of everything in the folder, folders with a slash at their end; nothing is followed."""
    paths = []
    for root, folders, files in os.walk(folder):
        inside = Path(root).relative_to(folder)
        paths += [str(inside / name) for name in files]
        paths += [f"{inside / name}" + ("" if os.path.islink(Path(root) / name) else "/") for name in folders]
    return sorted(paths)


def _added(manifest: Manifest, listed: Sequence[str]) -> list[str]:
    """Faults for what lies in the folder and was never committed."""
    expected = {
        MANIFEST,
        CLOSED,
        SIGNATURES,
        STAMP,
        *manifest.named(),
        *manifest.in_flight(),
        *(f"{name}/" for name in FOLDERS),
    }
    added = [name for name in listed if name not in expected and os.path.lexists(manifest.folder / name)]
    return [f"{name}: no line of the manifest names it" for name in added]


def _seal(folder: Path) -> tuple[str | None, list[str]]:
    """The head in the file `closed`, None where there is none; and what is wrong with that file."""
    path = folder / CLOSED
    if not os.path.lexists(path):
        return None, []
    try:
        return regular_file(path, LARGEST_HEAD).read_text(errors="replace").strip(), []
    except (InputError, OSError) as error:
        return None, [str(error).removeprefix(f"{folder}/")]


def _closing_head(manifest: Manifest) -> str:
    """SHA-256 of the closing line, "" where there is none."""
    pairs = zip(manifest.lines, manifest.hashes, strict=True)
    return next((digest for line, digest in pairs if "closed" in line), "")


def _after(manifest: Manifest, head: str | None) -> str:
    if head is None or head not in manifest.hashes:
        return ""
    lines = manifest.lines[manifest.hashes.index(head) + 1 :]
    kinds = {"round": "rounds", "truth": "the ground truth", "closed": "the closing line"}
    counts = {key: sum(key in line for line in lines) for key in kinds}
    parts = [f"{counts['round']} rounds"] if counts["round"] else []
    parts += [kinds[key] for key in ("truth", "closed") if counts[key]]
    return f"committed after that head: {', '.join(parts)}" if parts else ""


def _order_faults(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    """Rounds are numbered 0, 1, ...; the closing line counts them and is followed by the ground truth at most."""
    faults, count, closed, truths = [], 0, False, 0
    for number, line in enumerate(lines, start=1):
        where = f"{MANIFEST} line {number}"
        kinds = [kind for kind in ("round", "closed", "truth") if kind in line]
        if len(kinds) != (0 if number == 1 else 1):
            faults.append(f"{where}: expected {'the header' if number == 1 else 'one round, truth or closing line'}")
        truths += "truth" in line
        if "truth" in line and truths > 1:
            faults.append(f"{where}: the ground truth is written once, this is another")
        if closed and kinds != ["truth"]:
            faults.append(f"{where}: it follows the closing line")
        if "round" in line:
            if line["round"] != count:
                faults.append(f"{where}: expected round {count}, found round {line['round']}")
            count += 1
        if "closed" in line:
            closed = True
            if line["closed"] != count:
                faults.append(f"{where}: it closes {line['closed']} rounds, there are {count}")
    return faults


def _file_faults(manifest: Manifest) -> list[str]:
    faults = []
    for name, digest in manifest.named().items():
        path = manifest.folder / name
        if not COMMITTED.fullmatch(name):
            faults.append(f"{name:.200}: no name of a file of a run")
        elif not os.path.lexists(path):
            faults.append(f"{name}: missing")
        else:
            try:
                if sha256(regular_file(path, None if path.suffix == ".arrow" else LARGEST_TEXT)) != digest:
                    faults.append(f"{name}: changed since it was committed")
            except (InputError, OSError) as error:
                faults.append(f"{name}: {str(error).removeprefix(f'{path}: ')}")
    return faults
