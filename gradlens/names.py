"""What a name stands for: something built in, of an installed package, or the user's own `module:function`.

An installed package adds names by entry points in the group `gradlens.<kind>`, such as `gradlens.detectors`; each
names an object of the form that the table of that kind holds. A name that is built in cannot be replaced.
"""

import importlib
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from difflib import get_close_matches
from importlib.metadata import EntryPoint, entry_points
from typing import Any, TypeVar

from gradlens.errors import InputError

Entry = TypeVar("Entry")

KINDS = ("statistics", "scorers", "detectors", "aggregators", "attacks", "partitions", "schedules", "tasks", "models")
FUNCTION = re.compile(r"([^\W\d]\w*(?:\.[^\W\d]\w*)*):([^\W\d]\w*)")

_trusted: ContextVar[bool] = ContextVar("gradlens_trusted", default=True)


def named(kind: str, table: Mapping[str, Entry], name: str, setting: str = "") -> Entry:
    """Returns what a name stands for.

    Parameters
    ----------
    kind : str
        One of `KINDS`; which entry points are asked.
    table : Mapping of str to object
        What is built in.
    name : str
        A name in the table, of an entry point, or `module:function`.
    setting : str
        The setting that holds the name, for the error; by default the singular of `kind`.

    Raises
    ------
    InputError
        If there is no such name, with the nearest ones; if its module cannot be imported; and for `module:function`
        within `nothing_imported`.

    Examples
    --------
    >>> from gradlens import DETECTORS
    >>> named("detectors", DETECTORS, "krum").__name__
    'krum'
    >>> named("detectors", DETECTORS, "kurm")
    Traceback (most recent call last):
    gradlens.errors.InputError: detector: there is no 'kurm'; did you mean krum? `gradlens list detectors` shows all
    """
    setting = setting or kind.removesuffix("s")
    if name in table:
        return table[name]
    if FUNCTION.fullmatch(name):
        return imported(setting, name)
    if (point := installed(kind).get(name)) is not None:
        return _loaded(setting, point)
    raise InputError(f"{setting}: there is no {name!r:.80}{hint(name, {*table, *installed(kind)}, kind)}")


def available(kind: str, table: Mapping[str, Any]) -> dict[str, str]:
    """Every name of a kind and where it is from: "built in", or the package that added it."""
    added = {name: _package(point) for name, point in installed(kind).items()}
    return dict.fromkeys(table, "built in") | {name: origin for name, origin in added.items() if name not in table}


def hint(name: str, known: Iterable[str], kind: str = "") -> str:
    """The end of an error about a name that is not known: what it resembles, and where all are listed."""
    nearest = get_close_matches(name, sorted(known), n=3, cutoff=0.6)
    near = f"; did you mean {' or '.join(nearest)}?" if nearest else ""
    return f"{near}{' ' if near else '; '}`gradlens list {kind}` shows all" if kind else near


def imported(setting: str, name: str) -> Any:
    """The function that `module:function` names; raises InputError where there is none, or nothing may be imported."""
    if not FUNCTION.fullmatch(name):
        raise InputError(f"{setting}: expected module:function, found {name!r:.80}")
    if not _trusted.get():
        raise InputError(
            f"{setting}: the run names code of its own, {name!r:.80}, which is not imported unless you trust it"
            " (--trust-code)"
        )
    module, _, function = name.partition(":")
    try:
        value = getattr(importlib.import_module(module), function)
    except Exception as error:  # whatever the module does when it is imported
        raise InputError(f"{setting}: cannot import {name!r}: {_in_one_line(error)}") from error
    if not callable(value):
        raise InputError(f"{setting}: expected a function, {name!r} is of type {type(value).__name__}")
    return value


@contextmanager
def nothing_imported(refuse: bool = True) -> Iterator[None]:
    """Within, a name `module:function` is an error: for what a stored run names, which nobody has read yet."""
    token = _trusted.set(_trusted.get() and not refuse)
    try:
        yield
    finally:
        _trusted.reset(token)


def installed(kind: str) -> dict[str, EntryPoint]:
    """Name -> entry point of the installed packages that add to a kind."""
    return {point.name: point for point in entry_points(group=f"gradlens.{kind}")}


def _loaded(setting: str, point: EntryPoint) -> Any:
    try:
        value = point.load()
    except Exception as error:  # whatever the package does when it is imported
        reason = f"of {_package(point)} cannot be imported: {_in_one_line(error)}"
        raise InputError(f"{setting}: {point.name!r} {reason}") from error
    if not callable(value):
        raise InputError(f"{setting}: {point.name!r} of {_package(point)} is no function: {type(value).__name__}")
    return value


def _in_one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _package(point: EntryPoint) -> str:
    return "unknown package" if point.dist is None else f"{point.dist.name} {point.dist.version}"
