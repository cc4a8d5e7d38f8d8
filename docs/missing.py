"""Stands in for frameworks that are not installed, so that the integrations around them can be documented."""

import sys
from collections.abc import Iterable
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any


class Anything(type):
    """The type of stand-ins for classes: whatever is looked up on one is another one."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Anything(name, (), {})


class StandIn(ModuleType):
    """A module of which every attribute is a class that does nothing."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Anything(name, (), {})


class Frameworks(MetaPathFinder, Loader):
    """Finds a stand-in for every module of the packages that are not installed."""

    def __init__(self, packages: Iterable[str]) -> None:
        self.packages = {package for package in packages if find_spec(package) is None}

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        """The module's specification, None for what is none of theirs."""
        return ModuleSpec(name, self, is_package=True) if name.partition(".")[0] in self.packages else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """A stand-in."""
        return StandIn(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Nothing is run."""


def stand_in(*packages: str) -> None:
    """Makes the modules of those packages importable that are not installed."""
    sys.meta_path.append(Frameworks(packages))
