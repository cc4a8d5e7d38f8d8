"""`gradlens verify`: checks that the evidence is what was committed."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gradlens.cli.options import AsJson, Folder
from gradlens.cli.output import say, say_json

if TYPE_CHECKING:
    from gradlens.log import Verification

HEAD = re.compile(r"[0-9a-f]{64}")


def verify(
    run: Folder,
    head: Annotated[
        str | None, typer.Option(help="The head that was noted when the run was recorded, or the sweep finished.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Checks every committed byte of a run (of each run of a sweep, and its seal) against its chain of hashes."""
    if head is not None and not HEAD.fullmatch(head):
        raise typer.BadParameter(f"--head: expected 64 hexadecimal digits, found {head!r:.80}")
    from gradlens.sealing import is_sweep

    verifications = _verified(run, head)
    if as_json:
        say_json({name: {**vars(result), "intact": result.intact} for name, result in verifications.items()})
    else:
        for name, result in verifications.items():
            whole = is_sweep(run) and name == str(run)
            say(*(_sweep_lines(name, result, len(verifications) - 1) if whole else _verification_lines(name, result)))
    if not all(result.intact for result in verifications.values()):
        raise typer.Exit(1)


def _verified(path: Path, head: str | None) -> "dict[str, Verification]":
    from gradlens.log import verify as verify_run
    from gradlens.sealing import is_sweep, verify_sweep

    return verify_sweep(path, head, progress=True) if is_sweep(path) else {str(path): verify_run(path, head)}


def _sweep_lines(name: str, whole: "Verification", runs: int) -> list[str]:
    lines = [f"{name}: {'intact' if whole.intact else 'NOT INTACT'}, a sweep of {runs} runs, {whole.rounds} rounds"]
    lines[0] += f", {'sealed' if whole.closed else 'not sealed'}, head {whole.head}"
    return lines + [f"  {fault}" for fault in whole.faults]


def _verification_lines(name: str, verification: "Verification") -> list[str]:
    rounds, state = verification.rounds, "closed" if verification.closed else "open"
    lines = [f"{name}: {'intact' if verification.intact else 'NOT INTACT'}, {rounds} rounds, {state}"]
    lines[0] += f", head {verification.head}"
    lines += [f"  {verification.in_flight}"] if verification.in_flight else []
    return lines + [f"  {fault}" for fault in verification.faults]
