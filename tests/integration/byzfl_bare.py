"""ByzFL as it is on the index, without what it asks for: torch and numpy are ours, torchvision is an empty stand-in."""

import os
import subprocess
import sys
from types import ModuleType
from unittest.mock import MagicMock

import pytest

from conftest import ROOT

VERSION = "0.0.11"


def byzfl() -> ModuleType:
    """The package, installed below .bench where it is not there; without it a test is skipped, in CI it fails."""
    pytest.importorskip("torch")
    folder = ROOT / ".bench" / f"byzfl-{VERSION}"
    if not (folder / "byzfl").is_dir():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
        done = subprocess.run(
            [*pip, "--target", str(folder), f"byzfl=={VERSION}"], capture_output=True, text=True, check=False
        )
        if done.returncode:
            complaint = (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
            missing = f"byzfl {VERSION} cannot be installed: {complaint:.200}"
            pytest.fail(missing) if os.environ.get("CI") else pytest.skip(missing)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        for name in ("torchvision", "torchvision.datasets", "torchvision.models", "torchvision.transforms"):
            patch.setitem(sys.modules, name, MagicMock())
        import byzfl
    return byzfl
