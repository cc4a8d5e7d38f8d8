"""What a disk does not allow, in one line for people."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gradlens.errors import InputError
from gradlens.log.intake import shown

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EROFS}  # what only writing can meet; such errors may name no file
ADVICE = {
    errno.EACCES: "check who may read and write it",
    errno.EPERM: "check who may read and write it",
    errno.ENOENT: "it was there before; ingest again when nothing else changes the folder",
    errno.ESTALE: "it was there before; ingest again when nothing else changes the folder",
    errno.ENOSPC: "free some space, or name a run on another disk",
    errno.EDQUOT: "free some space, or name a run on another disk",
    errno.EROFS: "name a run on a disk that can be written",
}


@contextmanager
def disk_faults_as_input_errors(source: Path, run: Path) -> Iterator[None]:
    """Turns an OSError into an InputError that says what was expected, what was found, where, and what to do.

    Parameters
    ----------
    source : Path
        What is read.
    run : Path
        The folder that is written.
    """
    try:
        yield
    except OSError as error:
        named = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else ""
        writing = error.errno in FULL or (bool(named) and Path(named).is_relative_to(run))
        place = named or str(run if writing else source)
        place = place if place.isprintable() else shown(place)
        expected = "expected to write the run" if writing else "expected to read the recording"
        found = error.strerror or type(error).__name__
        advice = ADVICE.get(error.errno or 0, "check the disk")
        raise InputError(f"{place}: {expected}, found: {found}; {advice}") from error
