"""`gradlens seal`, `share` and `prune`: what happens to the evidence after it was recorded."""

import os
import shutil
from pathlib import Path
from typing import Annotated

import typer

from gradlens.cli.options import Folder
from gradlens.cli.output import say
from gradlens.errors import InputError

Out = Annotated[Path, typer.Option("--out", "-o", metavar="COPY", help="The folder of the copy.", show_default=False)]


def seal(
    run: Annotated[
        Path | None, typer.Argument(metavar="[RUN]", help="The folder of a run or of a sweep.", show_default=False)
    ] = None,
    key: Annotated[
        Path | None, typer.Option(metavar="PEM", help="Sign the head with this private Ed25519 key.")
    ] = None,
    new_key: Annotated[Path | None, typer.Option(metavar="FILE", help="Make a key: FILE and FILE.pub.")] = None,
    request: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write a request for a time stamp (RFC 3161) of the head.")
    ] = None,
    stamp: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Keep an authority's reply to such a request.")
    ] = None,
) -> None:
    """Signs and time-stamps the head of a run or sweep; `verify` checks both."""
    from gradlens import custody
    from gradlens.log.files import replace_with

    if run is None and (key or request or stamp or new_key is None):
        raise InputError("seal: name the folder of a run or sweep; without one, --new-key FILE makes a key")
    if new_key is not None:
        say(f"key: {new_key}, public key {custody.new_key(new_key)}")
    if run is None:
        return
    if not (key or new_key or request or stamp):
        raise InputError("seal: say what to do: --key signs, --request and --stamp take a time stamp")
    head = _verified_head(run)
    signer = key or (new_key if not (request or stamp) else None)
    if signer is not None:
        say(f"{run}: head {head} signed by {custody.sign(run, head, signer)}")
    if request is not None:
        replace_with(request, custody.stamp_request(head))
        say(f"{request}: a request for a time stamp of head {head}; send it to an authority, keep the reply by --stamp")
    if stamp is not None:
        say(f"{run}: head {head} time-stamped {custody.add_stamp(run, head, stamp)}")


def share(
    run: Folder,
    out: Out,
    names: Annotated[
        Path | None, typer.Option(metavar="CSV", help="Write which client has which name in the copy; keep it.")
    ] = None,
) -> None:
    """Makes a copy of a run for a second examiner: sketches instead of updates, and no names of clients."""
    from gradlens import Run
    from gradlens.custody.copies import GIVEN_AWAY
    from gradlens.custody.copies import share as copied

    if names is not None and os.path.lexists(names):
        raise InputError(f"--names: {names} exists, and is not overwritten")
    renamed = copied(Run.open(run), out)
    if names is not None:
        import pandas as pd

        pd.DataFrame(renamed.items(), columns=["client", "name"]).to_csv(names, index=False)
    say(f"run: {out}, {len(renamed)} clients renamed, head {Run.open(out).head}", f"gives away: {GIVEN_AWAY}")


def prune(
    run: Folder,
    keep: Annotated[
        str,
        typer.Option(
            metavar="sketch|LAYERS", help="What is kept of each update: sketch, or layers separated by commas."
        ),
    ] = "sketch",
    yes: Annotated[bool, typer.Option("--yes", help="Do it; without this, only say so.")] = False,
) -> None:
    """Thins a run that was recorded in full to sketches, or to some of its layers; that cannot be undone."""
    from gradlens import Evidence, Run
    from gradlens.custody import thinned

    run = run.resolve()  # a name to put others beside
    opened = Run.open(run)
    layers = tuple(name.strip() for name in keep.split(",") if name.strip())
    evidence = Evidence("sketch") if keep == "sketch" else Evidence("layers", layers=layers)
    if not yes:
        say(f"{run}: {len(opened.log)} rounds would be kept as {evidence.settings}, updates gone; --yes does it")
        return
    if not opened.is_closed:
        raise InputError(f"{run}: expected a closed run, found one that is being recorded")
    beside, old = run.with_name(f".{run.name}.thin"), run.with_name(f".{run.name}.full")
    shutil.rmtree(beside, ignore_errors=True)
    try:
        thinned(opened, beside, evidence)
        os.rename(run, old)
        os.rename(beside, run)
    except BaseException:
        if not os.path.lexists(run):
            os.rename(old, run)
        shutil.rmtree(beside, ignore_errors=True)
        raise
    shutil.rmtree(old)
    say(f"run: {run}, kept as {evidence.settings}, head {Run.open(run).head}, before {opened.head}")


def _verified_head(folder: Path) -> str:
    """The head of an intact run or sweep; raises InputError for any other."""
    from gradlens.cli.verify import verified

    found = verified(folder)[str(folder)]
    if not found.intact:
        raise InputError(f"{folder}: expected intact evidence, found: {found.faults[0]}")
    return found.head
