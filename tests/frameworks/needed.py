"""Packages that clients train with, which `make test-frameworks` installs."""

import os
from importlib import import_module
from types import ModuleType

import pytest


def needed(*modules: str) -> list[ModuleType]:
    """The modules; where one is missing, its tests are skipped, and fail where they were asked for."""
    found = []
    for module in modules:
        try:
            found.append(import_module(module))
        except ModuleNotFoundError as error:
            missing = f"{error.name} is not installed: `make test-frameworks` installs it"
            if os.environ.get("GRADLENS_FRAMEWORKS"):
                pytest.fail(missing, pytrace=False)
            pytest.skip(missing, allow_module_level=True)
    return found
