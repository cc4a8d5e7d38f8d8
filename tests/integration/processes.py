"""Scripts of this folder in processes of their own, of which none is left."""

import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from conftest import ROOT

HERE = Path(__file__).resolve().parent
SECONDS = 200  # half a minute on two idle cores


def ran(script: str, *words: str) -> str:
    """What a script printed, its complaints included; AssertionError where it failed, TimeoutExpired where it hangs."""
    paths = os.pathsep.join([str(ROOT), str(HERE), os.environ.get("PYTHONPATH", "")])
    setting = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, str(HERE / script), *words],
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
