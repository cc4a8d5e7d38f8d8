"""Where a framework is not installed its tests are skipped, but not where it must be there."""

import os
import re
import sys
from importlib import import_module
from importlib.util import find_spec

import pytest

from conftest import ROOT

MODULES = ["flwr", "ray", "nvflare", "distributed", *(["pfl"] if sys.version_info < (3, 13) else [])]


@pytest.mark.skipif(not os.environ.get("CI"), reason="elsewhere a framework may be missing")
@pytest.mark.parametrize("module", MODULES)
def test_every_framework_is_there(module):
    assert find_spec(module), f"{module} is not installed: the extras flower, nvflare, pfl and cluster are needed here"


GUIDE = ROOT / "docs" / "howto" / "operator.md"
NAMED = re.findall(r"`gradlens\.integrations\.(\w+)\.(\w+)\(", GUIDE.read_text("utf-8"))


@pytest.mark.parametrize(("module", "name"), NAMED)
def test_what_the_guide_names_is_there(module, name):
    needs = {"flower": "flwr", "flower_classic": "flwr", "byzfl": "numpy"}  # our side of ByzFL imports nothing of it
    pytest.importorskip(needs.get(module, module))
    assert callable(getattr(import_module(f"gradlens.integrations.{module}"), name))


def test_the_guide_names_every_integration():
    files = (ROOT / "gradlens" / "integrations").glob("[a-z]*.py")
    assert {module for module, _ in NAMED} == {file.stem for file in files}
