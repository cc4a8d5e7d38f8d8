"""Where a framework is not installed its tests are skipped, but not where it must be there."""

import os
import sys
from importlib.util import find_spec

import pytest

MODULES = ["flwr", "ray", "nvflare", "distributed", *(["pfl"] if sys.version_info < (3, 13) else [])]


@pytest.mark.skipif(not os.environ.get("CI"), reason="elsewhere a framework may be missing")
@pytest.mark.parametrize("module", MODULES)
def test_every_framework_is_there(module):
    assert find_spec(module), f"{module} is not installed: the extras flower, nvflare, pfl and cluster are needed here"
