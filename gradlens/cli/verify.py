"""`gradlens verify`: checks that the evidence is what was committed."""

import re
from dataclasses import replace
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
        str | None, typer.Option(help="The head that was noted when the run was recorded, or the sweep finished.")
    ] = None,
    key: Annotated[
        Path | None, typer.Option(metavar="PEM", help="A public key that must have signed the head (`gradlens seal`).")
    ] = None,
    authority: Annotated[
        Path | None, typer.Option(metavar="PEM", help="Certificates of the authority that must have time-stamped it.")
    ] = None,
    client_keys: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Public keys, a file CLIENT.pub each, that must have signed the updates."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Checks every committed byte of a run or sweep against its chain of hashes, its signatures and its time stamp."""
    if head is not None and not HEAD.fullmatch(head):
        raise typer.BadParameter(f"--head: expected 64 hexadecimal digits, found {head!r:.80}")
    from gradlens.sealing import is_sweep

    verifications = verified(run, head)
    verifications[str(run)] = _with_seals(run, verifications[str(run)], key, authority)
    if client_keys is not None:
        verifications[str(run)] = _with_signatures(run, verifications[str(run)], client_keys)
    if as_json:
        say_json({name: {**vars(result), "intact": result.intact} for name, result in verifications.items()})
    else:
        for name, result in verifications.items():
            whole = is_sweep(run) and name == str(run)
            say(*(_sweep_lines(name, result, len(verifications) - 1) if whole else _verification_lines(name, result)))
    if not all(result.intact for result in verifications.values()):
        raise typer.Exit(1)


def verified(path: Path, head: str | None = None) -> "dict[str, Verification]":
    """Path -> what was found: the run or the sweep as a whole, then each run of the sweep."""
    from gradlens.log import verify as verify_run
    from gradlens.sealing import is_sweep, verify_sweep

    return verify_sweep(path, head, progress=True) if is_sweep(path) else {str(path): verify_run(path, head)}


def _with_seals(path: Path, found: "Verification", key: Path | None, authority: Path | None) -> "Verification":
    """The verification of the whole, with what its seals say and what is wrong with them."""
    from gradlens.custody import check_seals
    from gradlens.log.manifest import read_manifest
    from gradlens.sealing import is_sweep

    heads = [found.head] if is_sweep(path) else list(read_manifest(path).hashes)
    seals = check_seals(path, heads, key=key, authority=authority)
    return replace(found, seals=seals.says, faults=(*found.faults, *seals.faults))


def _with_signatures(path: Path, found: "Verification", client_keys: Path) -> "Verification":
    """The verification of a run, with what its clients signed."""
    from gradlens.custody import check_updates, keys_of_clients
    from gradlens.sealing import is_sweep

    if is_sweep(path):
        raise InputError(f"--client-keys: expected the folder of a run, found a sweep: {path}")
    signatures = check_updates(path, keys_of_clients(client_keys))
    return replace(found, seals=(*found.seals, *signatures.says), faults=(*found.faults, *signatures.faults))


def _sweep_lines(name: str, whole: "Verification", runs: int) -> list[str]:
    lines = [f"{name}: {'intact' if whole.intact else 'NOT INTACT'}, a sweep of {runs} runs, {whole.rounds} rounds"]
    lines[0] += f", {'sealed' if whole.closed else 'not sealed'}, head {whole.head}"
    return lines + [f"  {said}" for said in (*whole.seals, *whole.faults)]


def _verification_lines(name: str, verification: "Verification") -> list[str]:
    rounds, state = verification.rounds, "closed" if verification.closed else "open"
    lines = [f"{name}: {'intact' if verification.intact else 'NOT INTACT'}, {rounds} rounds, {state}"]
    lines[0] += f", head {verification.head}"
    lines += [f"  {verification.in_flight}"] if verification.in_flight else []
    return lines + [f"  {said}" for said in (*verification.seals, *verification.faults)]
