"""The seal of a sweep: which runs it was finished with, and the hashes of what lies beside them."""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from gradlens.errors import InputError
from gradlens.log.files import replace_with
from gradlens.log.manifest import LARGEST_TEXT, MANIFEST, read_manifest, regular_file, sha256
from gradlens.log.verification import Verification, verify
from gradlens.run import CONTROLS, SWEEP, read_index

SEAL = "sealed.json"


def is_sweep(folder: Path) -> bool:
    """Whether a folder is that of a sweep, or was before somebody removed its `sweep.json`."""
    return any(os.path.lexists(folder / name) for name in (SWEEP, SEAL))


def seal_sweep(folder: Path) -> None:
    """Notes in `sealed.json` what a finished sweep holds.

    Parameters
    ----------
    folder : Path
        The folder of the sweep.

    Raises
    ------
    InputError
        Where a run that `sweep.json` names is not there.
    """
    names = read_index(folder / SWEEP)["runs"]
    replace_with(folder / SEAL, _content(folder, {name: read_manifest(folder / name).head for name in names}))


def break_seal(folder: Path) -> None:
    """Removes the seal of a sweep that is about to be gone on with."""
    (folder / SEAL).unlink(missing_ok=True)


def verify_sweep(folder: Path, head: str | None = None, *, progress: bool = False) -> dict[str, Verification]:
    """Verifies each run of a sweep, and whether these are the runs that `sweep.json` names and the seal was set on.

    Parameters
    ----------
    folder : Path
        The folder of the sweep.
    head : str, optional
        The head that was noted when the sweep was finished; without it a rewritten seal cannot be told.
    progress : bool
        Whether to show a bar.

    Returns
    -------
    dict of str to Verification
        Path -> what was found; first that of the sweep as a whole, with the rounds of all runs.
    """
    faults, runs, there = [], {}, _runs_in(folder)
    for name in tqdm(there, desc="verify", disable=None if progress else True, leave=False):
        try:
            runs[name] = verify(folder / name)
        except (InputError, OSError) as error:
            faults.append(f"run {name}: {str(error).removeprefix(f'{folder / name}: ')}")
    heads = {name: each.head for name, each in runs.items()}
    try:
        faults += _index_faults(set(read_index(folder / SWEEP)["runs"]), set(there))
    except InputError as error:
        faults.append(str(error).removeprefix(f"{folder}/"))
    content = _content(folder, heads)
    found, sealed = hashlib.sha256(content).hexdigest(), os.path.lexists(folder / SEAL)
    faults += _seal_faults(folder, json.loads(content)) if sealed else []
    if head is not None and head != found:
        faults.append(f"the sweep does not have the head {head:.64}; a run or {SWEEP} was changed since it was noted")
    whole = Verification(found, sum(each.rounds for each in runs.values()), sealed, faults=tuple(faults))
    return {str(folder): whole, **{str(folder / name): each for name, each in runs.items()}}


def _runs_in(folder: Path) -> list[str]:
    """Names of the folders that hold a run."""
    return sorted(name for name in os.listdir(folder) if os.path.lexists(folder / name / MANIFEST))


def _content(folder: Path, heads: Mapping[str, str]) -> bytes:
    """What a seal holds; its SHA-256 is the head of the sweep."""
    files = {name: _digest(folder / name) for name in (SWEEP, CONTROLS) if os.path.lexists(folder / name)}
    return json.dumps({"format": 1, "files": files, "runs": dict(heads)}, indent=1, sort_keys=True).encode()


def _digest(path: Path) -> str:
    """SHA-256 of a file, "" where it cannot be read."""
    try:
        return sha256(regular_file(path))
    except (InputError, OSError):
        return ""


def _index_faults(named: set[str], there: set[str]) -> Iterator[str]:
    for name in sorted(named - there):
        yield f"run {name}: missing; it was removed, or the sweep is not finished: simulate it again to go on"
    for name in sorted(there - named):
        yield f"run {name}: {SWEEP} does not name it"


def _seal_faults(folder: Path, found: Mapping[str, Any]) -> list[str]:
    """How a sweep differs from what it was sealed with."""
    try:
        sealed = json.loads(regular_file(folder / SEAL, LARGEST_TEXT).read_bytes())
        if sealed["format"] != 1:
            return [f"{SEAL}: this version reads format 1; a newer gradlens wrote it?"]
        parts = [(kind, dict(sealed[kind]), found[kind]) for kind in ("files", "runs")]
    except InputError as error:
        return [str(error).removeprefix(f"{folder}/")]
    except (OSError, ValueError, RecursionError, KeyError, TypeError):
        return [f"{SEAL}: not readable as the seal of a sweep"]
    faults = []
    for kind, before, now in parts:
        for name in sorted({*before, *now}):
            where = f"run {name:.200}" if kind == "runs" else f"{name:.200}"
            if name not in now:
                faults.append(f"{where}: removed since the sweep was finished")
            elif name not in before:
                faults.append(f"{where}: added since the sweep was finished")
            elif before[name] != now[name]:
                faults.append(f"{where}: changed since the sweep was finished")
    return faults
