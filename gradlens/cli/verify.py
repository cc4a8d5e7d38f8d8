"""`gradlens verify`: checks that the evidence is what was committed."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gradlens.cli.options import AsJson, Folder
from gradlens.cli.output import say, say_json
from gradlens.errors import InputError

if TYPE_CHECKING:
    from gradlens.log import Verification

HEAD = re.compile(r"[0-9a-f]{64}")


def verify(
    run: Folder,
    head: Annotated[
        str | None, typer.Option(help="The head of the chain that was noted when the run was recorded.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Checks every committed byte of a run (of each run of a sweep) against its chain of hashes."""
    if head is not None and not HEAD.fullmatch(head):
        raise typer.BadParameter(f"--head: expected 64 hexadecimal digits, found {head!r:.80}")
    verifications = _verified(run, head)
    if as_json:
        say_json({name: {**vars(result), "intact": result.intact} for name, result in verifications.items()})
    else:
        say(*(line for name, result in verifications.items() for line in _verification_lines(name, result)))
    if not all(result.intact for result in verifications.values()):
        raise typer.Exit(1)


def _verified(path: Path, head: str | None) -> "dict[str, Verification]":
    from tqdm import tqdm

    from gradlens.log import verify as verify_run
    from gradlens.run import SWEEP

    if not (path / SWEEP).is_file():
        return {str(path): verify_run(path, head)}
    if head is not None:
        raise InputError("--head belongs to one run; name the folder of the run, not of its sweep")
    folders = sorted(manifest.parent for manifest in path.glob("*/manifest.jsonl"))
    return {str(folder): verify_run(folder) for folder in tqdm(folders, desc="verify", disable=None, leave=False)}


def _verification_lines(name: str, verification: "Verification") -> list[str]:
    rounds, state = verification.rounds, "closed" if verification.closed else "open"
    lines = [f"{name}: {'intact' if verification.intact else 'NOT INTACT'}, {rounds} rounds, {state}"]
    lines[0] += f", head {verification.head}"
    lines += [f"  {verification.in_flight}"] if verification.in_flight else []
    return lines + [f"  {fault}" for fault in verification.faults]
