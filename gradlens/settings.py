"""Checks of settings, one for each kind of value, and `Configured`, a function with its settings."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from gradlens.errors import InputError


def whole_number(setting: str, value: Any, least: int = 0) -> int:
    """The value of a setting as an int; raises InputError where it is no whole number, or less than `least`."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
        raise InputError(f"{setting} must be a whole number of at least {least}, found {value!r:.80}")
    return int(value)


def whole_number_or_none(setting: str, value: Any, least: int = 0) -> int | None:
    """As `whole_number`, with None left as it is."""
    return None if value is None else whole_number(setting, value, least)


def positive(setting: str, value: Any) -> float:
    """The value of a setting as a float; raises InputError where it is no finite number above 0."""
    if isinstance(value, bool) or not isinstance(value, int | float | np.number) or not 0 < value < math.inf:
        raise InputError(f"{setting} must be a number above 0, found {value!r:.80}")
    return float(value)


def share(setting: str, value: Any) -> float:
    """The value of a setting as a float; raises InputError where it is not above 0 and at most 1."""
    if positive(setting, value) > 1:
        raise InputError(f"{setting} must be a share above 0 and at most 1, found {value!r:.80}")
    return float(value)


def one_of(setting: str, value: Any, *allowed: str) -> str:
    """The value of a setting; raises InputError where it is not among those allowed."""
    if value not in allowed:
        raise InputError(f"{setting} must be one of {', '.join(allowed)}, found {value!r:.80}")
    return value


@dataclass(frozen=True, repr=False)
class Configured:
    """A function with its settings; compares, hashes and prints like the call that made it.

    Parameters
    ----------
    function : callable
        Takes its arguments first and the settings by keyword; its name, without leading underscores, is printed.
    settings : tuple of (str, value) pairs
        In the order in which they are printed.

    Examples
    --------
    >>> def powered(base, exponent):
    ...     return base**exponent
    >>> square = configured(powered, exponent=2)
    >>> square
    powered(exponent=2)
    >>> square(3)
    9
    """

    function: Callable[..., Any]
    settings: tuple[tuple[str, Any], ...]

    def __call__(self, *arguments: Any) -> Any:
        """What the function returns for these arguments and its settings."""
        return self.function(*arguments, **dict(self.settings))

    def __repr__(self) -> str:
        settings = ", ".join(f"{name}={value!r}" for name, value in self.settings)
        return f"{self.function.__name__.strip('_')}({settings})"


def configured(function: Callable[..., Any], **settings: Any) -> Configured:
    """The function with these settings."""
    return Configured(function, tuple(settings.items()))
