"""Scripts of this folder in processes of their own, of which none is left."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

from conftest import ROOT

HERE = Path(__file__).resolve().parent
SECONDS = 200  # half a minute on two idle cores


def ran(script: str, *words: str) -> str:
    """What a script printed, its complaints included; AssertionError where it failed, TimeoutExpired where it hangs."""
    with without_spaces() as (python, root):
        return _ran(python, root, script, *words)


@contextmanager
def without_spaces() -> Iterator[tuple[str, Path]]:
    """The interpreter and the repository by paths without a space, which Ray and NVFlare cannot start workers from."""
    prefix, executable = Path(sys.prefix), Path(sys.executable)
    if " " not in f"{prefix}{ROOT}" or prefix not in executable.parents:
        yield sys.executable, ROOT
        return
    with TemporaryDirectory() as folder:
        environment, root = Path(folder, "environment"), Path(folder, "root")
        environment.symlink_to(prefix)
        root.symlink_to(ROOT)
        yield str(environment / executable.relative_to(prefix)), root


def _ran(python: str, root: Path, script: str, *words: str) -> str:
    here = root / HERE.relative_to(ROOT)
    paths = os.pathsep.join([str(root), str(here), os.environ.get("PYTHONPATH", "")])
    setting = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [python, str(here / script), *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=setting,
        start_new_session=True,
    )
    try:
        out, _ = process.communicate(timeout=SECONDS)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # whatever a framework left behind
        process.wait()
    assert process.returncode == 0, out[-3000:]
    return out
