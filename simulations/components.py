"""The components of a scenario: partition, attack, schedule, aggregator, detector and filter, each with its settings.

A component is a name, or a table name -> settings. A name is built in, added by an installed package, or
`module:function`.
"""

import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import numpy as np
from pydantic import BaseModel, ValidationError

from gradlens.aggregators import AGGREGATORS, Aggregator, FilteredAggregator, calibrated_filter, filtered, mean
from gradlens.detectors import DETECTORS
from gradlens.errors import InputError
from gradlens.names import hint, named
from simulations.attacks import ATTACKS, SCHEDULES, Schedule, build_part, in_order
from simulations.partition import PARTITIONS

Component = dict[str, dict[str, Any]]
Builder = Callable[..., Any]
Table = TypeVar("Table", bound=BaseModel)

COMPONENTS: Mapping[str, Mapping[str, Builder]] = {
    "partition": PARTITIONS,
    "attack": ATTACKS,
    "schedule": SCHEDULES,
    "aggregator": AGGREGATORS,
    "detector": DETECTORS,
}
OPTIONAL = ("attack", "detector")  # components that may be "none"
UNTIL_CLEARED = "until_cleared"  # stands for None in TOML, which has no None
CALIBRATION: dict[str, Any] = {"clean_rounds": 0, "fpr": 0.05}
FILTER: dict[str, Any] = {  # the settings of a filter, and their defaults
    name: list(p.default) if name == "cleared" else p.default
    for name, p in inspect.signature(filtered).parameters.items()
    if p.kind is p.KEYWORD_ONLY
} | CALIBRATION


def normalized(kind: str, value: Any) -> Component:
    """Returns a component as {name: {setting: value}} with every setting written out, {} for none.

    Parameters
    ----------
    kind : str
        One of `COMPONENTS`.
    value : str, Mapping or None
        A name, or a table name -> settings. Only an attack may have several names.

    Returns
    -------
    dict
        Name -> (setting -> value).

    Raises
    ------
    InputError
        If a name or a setting is unknown (the message suggests similar ones), or a value is invalid.

    Examples
    --------
    >>> normalized("partition", "dirichlet")
    {'dirichlet': {'alpha': 0.5, 'minimum': 10}}
    >>> normalized("attack", {"scaling": {"factor": 3}, "label_flip": {}})
    {'label_flip': {'source_label': 7, 'target_label': 5}, 'scaling': {'factor': 3.0}}
    """
    if kind in OPTIONAL and (value is None or value == "none" or value == {}):
        return {}
    parts = {value: {}} if isinstance(value, str) else value
    if not isinstance(parts, Mapping) or not all(
        isinstance(name, str) and isinstance(settings, Mapping) for name, settings in parts.items()
    ):
        raise InputError(f"{kind}: expected a name or a table name -> settings, found {value!r:.80}")
    if kind != "attack" and len(parts) != 1:
        raise InputError(f"{kind}: expected exactly one, found {', '.join(parts) or 'none'}")
    written = {name: _written_out(kind, name, settings) for name, settings in parts.items()}
    if kind != "attack":
        return written
    return {name: written[name] for name in in_order({name: build_part(name, written[name]) for name in written})}


def build(kind: str, component: Component) -> Any:
    """Builds a component from its name and settings.

    Parameters
    ----------
    kind : str
        One of `COMPONENTS`.
    component : dict
        A normalized component with one name.

    Returns
    -------
    object
        What the named builder returns, such as an `Attack` or an aggregator.

    Examples
    --------
    >>> build("attack", {"scaling": {"factor": 3.0}})
    scaling(factor=3.0)
    """
    ((name, settings),) = component.items()
    return named(f"{kind}s", COMPONENTS[kind], name)(**settings)


def component_label(kind: str, component: Component) -> str:
    """Returns a short label of a component: its names, with the settings that differ from their defaults.

    Examples
    --------
    >>> component_label("partition", {"dirichlet": {"alpha": 0.1, "minimum": 10}})
    'dirichlet(alpha=0.1)'
    """
    return "+".join(_part_label(kind, name, settings) for name, settings in component.items()) or "none"


def filter_settings(value: Any) -> dict[str, Any]:
    """Returns the settings of a live filter, all written out; {} if all are at their defaults.

    Parameters
    ----------
    value : Mapping
        Settings of `gradlens.filtered`, where `out_for` may be "until_cleared" in place of None. `clean_rounds` is the
        number of first rounds that are declared clean, on which the detector is calibrated to flag a share `fpr` of
        benign updates (see `gradlens.calibrate`); 0, the default, leaves it uncalibrated.

    Returns
    -------
    dict
        Setting -> value, without `clean_rounds` and `fpr` if the detector is not calibrated.

    Raises
    ------
    InputError
        If a setting is unknown or its value is invalid.

    Examples
    --------
    >>> filter_settings({"action": "drop"})
    {}
    >>> filter_settings({"clean_rounds": 10})["fpr"]
    0.05
    """
    if not isinstance(value, Mapping):
        raise InputError(f"filter: expected a table of its settings {', '.join(FILTER)}, found {value!r:.80}")
    if unknown := [name for name in value if name not in FILTER]:
        raise InputError(f"filter: {no_setting(unknown[0], FILTER)}")
    written = FILTER | {name: _plain(setting) for name, setting in value.items()}
    if written["out_for"] == UNTIL_CLEARED:
        written["out_for"] = None
    if isinstance(written["cleared"], str) or not isinstance(written["cleared"], Iterable):
        raise InputError(f"filter: cleared must be a list of clients' names, found {written['cleared']!r:.80}")
    written["cleared"] = sorted({str(name) for name in written["cleared"]})
    try:
        live_filter(mean(), {"layer_norms": {}}, written)
    except InputError as error:
        raise InputError(f"filter: {error}") from None
    if not written["clean_rounds"]:  # left out, so that runs from before these settings keep their digests
        written = {name: setting for name, setting in written.items() if name not in CALIBRATION}
    return {} if FILTER | written == FILTER else written


def live_filter(rule: Aggregator, detector: Component, settings: Mapping[str, Any]) -> FilteredAggregator:
    """Puts a scenario's live filter around its aggregation rule.

    Parameters
    ----------
    rule : Aggregator
        The rule for the clients that enter.
    detector : dict
        The normalized component of the detector.
    settings : Mapping
        Settings of the filter, as from `filter_settings`.

    Returns
    -------
    FilteredAggregator
        The rule behind the filter.

    Raises
    ------
    InputError
        If a setting is out of its range.

    Examples
    --------
    >>> live_filter(mean(), {"layer_norms": {}}, {"action": "clip"}).action
    'clip'
    """
    return calibrated_filter(rule, build("detector", detector), **(FILTER | dict(settings)))


def settings_table(name: str, kind: type[Table], value: Any) -> Table | None:
    """Returns a setting that is a table of settings of its own, validated; None for "none", None or {}.

    Parameters
    ----------
    name : str
        Of the setting.
    kind : type
        A model of pydantic.
    value : Mapping, instance of it, or None
        Setting -> value.

    Raises
    ------
    InputError
        If a setting is unknown or its value is invalid.

    Examples
    --------
    >>> from simulations.starting_model import Adapters
    >>> settings_table("adapters", Adapters, {"rank": 2})
    Adapters(rank=2, alpha=8.0, modules=('query', 'key', 'value', 'out'))
    """
    if value is None or value == "none" or value == {}:
        return None
    if isinstance(value, kind):
        return value
    if not isinstance(value, Mapping):
        raise InputError(
            f"{name}: expected a table of its settings {', '.join(kind.model_fields)}, found {value!r:.80}"
        )
    try:
        return kind(**{key: _plain(setting) for key, setting in value.items()})
    except ValidationError as error:
        raise one_line(error, name, kind.model_fields) from None


def one_line(error: ValidationError, where: str, known: Iterable[str] = ()) -> InputError:
    """Turns pydantic's error into one line: where, which setting, what was expected and what was found.

    Parameters
    ----------
    error : pydantic.ValidationError
        Its first fault is described, the others are counted.
    where : str
        What the settings belong to, with which the message begins.
    known : iterable of str
        Names of the settings, from which similar ones are suggested for an unknown one.

    Returns
    -------
    InputError
        To be raised by the caller.
    """
    first, *others = error.errors(include_url=False)
    cause = first.get("ctx", {}).get("error")
    name = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        reason = no_setting(name, known)
    elif isinstance(cause, ValueError):
        reason = str(cause)
    else:
        reason = f"{name}: {first['msg'][0].lower()}{first['msg'][1:]}, found {first['input']!r:.80}"
    return InputError(f"{where}: {reason}" + (f" (and {len(others)} more)" if others else ""))


def no_setting(name: str, known: Iterable[str]) -> str:
    """Returns the end of an error message about an unknown setting: similar settings, or else all of them.

    Examples
    --------
    >>> no_setting("alhpa", ["alpha", "minimum"])
    "'alhpa' is no setting; did you mean alpha?"
    """
    known = list(known)
    everything = f"; expected one of {', '.join(known)}" if known else "; there are none"
    return f"{name!r:.80} is no setting{hint(name, known) or everything}"


def _written_out(kind: str, name: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of one name, all written out, and checked by building the component."""
    builder = named(f"{kind}s", COMPONENTS[kind], name)
    known = _defaults(kind, name, builder)
    if unknown := [key for key in settings if key not in known]:
        raise InputError(f"{kind}: {name}: {no_setting(unknown[0], known)}")
    written = {
        key: _checked(f"{kind}: {name}: {key}", settings.get(key, default), default) for key, default in known.items()
    }
    try:
        built = builder(**written)
    except ValidationError as error:
        raise one_line(error, f"{kind}: {name}") from None
    except (ValueError, TypeError) as error:
        raise InputError(f"{kind}: {' '.join(str(error).split())}") from None
    if not (isinstance(built, Schedule) if kind == "schedule" else kind == "attack" or callable(built)):
        raise InputError(f"{kind}: {name} builds no {kind}, found a {type(built).__name__}")
    return written


def _defaults(kind: str, name: str, builder: Builder) -> dict[str, Any]:
    """The settings of a builder that are plain values, and their defaults."""
    try:
        parameters = inspect.signature(builder).parameters.values()
    except (TypeError, ValueError):
        raise InputError(f"{kind}: {name} does not say what settings it has") from None
    return {p.name: p.default for p in parameters if isinstance(p.default, bool | int | float | str | None)}


def _checked(where: str, value: Any, default: Any) -> Any:
    """The value as a plain one of the default's type; an integer is accepted as a float."""
    value = _plain(value)
    if isinstance(default, float) and type(value) is int:
        value = float(value)
    if default is not None and type(value) is not type(default):
        raise InputError(f"{where}: expected {type(default).__name__}, found {value!r:.80}")
    if isinstance(value, float) and not math.isfinite(value):
        raise InputError(f"{where}: expected a finite number, found {value!r}")
    return value


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value


def _part_label(kind: str, name: str, settings: Mapping[str, Any]) -> str:
    defaults = _defaults(kind, name, named(f"{kind}s", COMPONENTS[kind], name))
    changed = [f"{key}={short(value)}" for key, value in settings.items() if value != defaults.get(key)]
    return f"{name}({', '.join(changed)})" if changed else name


def short(value: Any) -> str:
    """Returns a value as labels show it.

    Examples
    --------
    >>> short(0.5), short("all")
    ('0.5', 'all')
    """
    return f"{value:g}" if isinstance(value, float) else str(value)
