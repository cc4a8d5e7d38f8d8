"""A scenario: the plain, validated settings of one simulated run; and sweeps, products of settings.

A component (partition, attack, schedule, aggregator, detector) is a name or a table name -> settings: `"iid"`,
`{"dirichlet": {"alpha": 0.5}}`. An attack may name several parts, which compose. What a component is made of is
written out in full on validation, so a scenario says everything that ran.
"""

import hashlib
import inspect
import json
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self, TypeVar

import numpy as np
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PrivateAttr, ValidationError, model_validator

from gradlens.aggregators import AGGREGATORS, FilteredAggregator, filtered, mean
from gradlens.aggregators import Aggregator as Rule
from gradlens.detectors import DETECTORS, calibrate
from gradlens.errors import InputError
from gradlens.names import hint, named
from simulations.attacks import ATTACKS, SCHEDULES, Turn, build_attack, ordered
from simulations.partition import PARTITIONS
from simulations.tasks import MODELS

Component = dict[str, dict[str, Any]]
Builders = Mapping[str, Callable[..., Any]]
Made = TypeVar("Made")

COMPONENTS: Mapping[str, Builders] = {
    "partition": PARTITIONS,
    "attack": ATTACKS,
    "schedule": SCHEDULES,
    "aggregator": AGGREGATORS,
    "detector": DETECTORS,
}
KINDS = {name: f"{name}s" for name in COMPONENTS}  # what their names are called in `gradlens.names`
SCENARIOS = Path(__file__).parent / "scenarios"  # the demo and the reproduced experiments, in TOML
ATTACK_SETTINGS = ("attack", "num_malicious", "poison_rate", "schedule")  # what a control does not have


UNTIL_CLEARED = "until_cleared"  # in TOML, which has no None


def _component(kind: str) -> BeforeValidator:
    return BeforeValidator(lambda value: normalised(kind, value))


Partition = Annotated[Component, _component("partition")]
Attack = Annotated[Component, _component("attack")]
Schedule = Annotated[Component, _component("schedule")]
Aggregator = Annotated[Component, _component("aggregator")]
Detector = Annotated[Component, _component("detector")]
Filter = Annotated[dict[str, Any], BeforeValidator(lambda value: filter_settings(value))]
Count = Annotated[int, Field(ge=1)]
Rate = Annotated[float, Field(gt=0)]
Momentum = Annotated[float, Field(ge=0, lt=1)]


class Scenario(BaseModel):
    """Every setting of one simulated run; frozen, hashable, and refused with one line where a value is wrong.

    Settings of an attack that nobody carries out, or that changes nothing, fall back to their defaults, so that
    an attack-free run is one scenario whatever attack it is the control of.
    Raises InputError that names the setting, what was expected and what was found.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, validate_default=True, allow_inf_nan=False, protected_namespaces=()
    )

    task: Annotated[str, Field(min_length=1)] = "digits"
    model: str = "mlp"
    partition: Partition = "iid"  # type: ignore[assignment]
    num_clients: Count = 20
    clients_per_round: Count | None = None  # None: all
    samples_per_client: Count | None = None  # on average; None: the whole training set
    rounds: Count = 25
    local_epochs: Count = 1
    batch_size: Count = 16
    learning_rate: Rate = 0.1
    momentum: Momentum = 0.0
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    server_learning_rate: Rate = 1.0
    server_momentum: Momentum = 0.0
    missing_rate: Annotated[float, Field(ge=0, lt=1)] = 0.0  # share of drawn clients whose update does not arrive
    nonfinite_rate: Annotated[float, Field(ge=0, le=1)] = 0.0  # share of updates that arrive as NaN
    attack: Attack = "none"  # type: ignore[assignment]
    num_malicious: Annotated[int, Field(ge=0)] = 0
    poison_rate: Annotated[float, Field(ge=0, le=1)] = 1.0  # share of a malicious client's eligible samples
    schedule: Schedule = "every_round"  # type: ignore[assignment]
    aggregator: Aggregator = "mean"  # type: ignore[assignment]
    detector: Detector = None  # type: ignore[assignment] # the live filter's; None: no filter
    filter: Filter = {}  # `filter_settings` around the detector; {}: its defaults
    seed: Annotated[int, Field(ge=0)] = 0
    engine: Literal["auto", "plain", "stacked"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"

    _given: dict[str, Any] = PrivateAttr(default_factory=dict)  # before anything fell back to its default

    def __init__(self, **settings: Any) -> None:
        plain = {name: value.item() if isinstance(value, np.generic) else value for name, value in settings.items()}
        try:
            super().__init__(**plain)
        except ValidationError as error:
            raise one_line(error, "scenario") from None
        if plain.get("filter") and not self.detector:
            raise InputError("scenario: filter: its settings need a detector, found none")
        self._given = plain

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.model != "own":
            named("models", MODELS, self.model)
        for name in ("clients_per_round", "num_malicious"):
            if (found := getattr(self, name) or 0) > self.num_clients:
                raise ValueError(f"{name}: expected at most num_clients = {self.num_clients}, found {found}")
        if self.clients_per_round == self.num_clients:
            object.__setattr__(self, "clients_per_round", None)
        attack = build_attack(self.attack)
        if not attack.poisons:
            self._fall_back("poison_rate")
        poisons = attack.poisons and self.poison_rate > 0
        if self.num_malicious == 0 or not (poisons or attack.train or attack.send):
            self._fall_back(*ATTACK_SETTINGS)
        due = build("schedule", self.schedule).due
        turns = (Turn(index, position, 0) for index in range(self.rounds) for position in range(self.num_malicious))
        if not any(map(due, turns)) and self.num_malicious:
            label = component_label("schedule", self.schedule)
            raise ValueError(f"schedule: {label} never comes in {self.rounds} rounds, which count from 0")
        return self

    def _fall_back(self, *names: str) -> None:
        for name in names:
            default = type(self).model_fields[name].default
            value = normalised(name, default) if name in COMPONENTS else default
            object.__setattr__(self, name, value)  # frozen from the outside only

    def __hash__(self) -> int:
        return hash(self.digest)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Scenario) and self.digest == other.digest

    @cached_property
    def digest(self) -> str:
        """12 hexadecimal digits of the SHA-256 of all settings: the name of the run's folder."""
        canonical = json.dumps(self.settings, sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(canonical.encode()).hexdigest()[:12]

    @property
    def settings(self) -> dict[str, Any]:
        """All settings as plain values, as `run.json` holds them; `Scenario(**settings)` is the inverse.

        A filter at its defaults is not among them: digests name the folders of runs of before there was a choice.
        """
        return self.model_dump(mode="json", exclude=None if self.filter else {"filter"})

    @property
    def is_control(self) -> bool:
        """Whether nobody attacks."""
        return self.num_malicious == 0

    @property
    def control(self) -> "Scenario":
        """The same scenario without the attack."""
        return Scenario(**{name: value for name, value in self.settings.items() if name not in ATTACK_SETTINGS})

    def replace(self, **changes: Any) -> "Scenario":
        """The scenario as it was given, with some settings changed; a misspelt one is an error."""
        return Scenario(**{**self._given, **changes})

    def label(self, name: str) -> str | int | float:
        """A setting as a short word or number for tables: `"trigger+scaling(factor=3)"`, `0.1`, `"all"`."""
        if name not in type(self).model_fields:
            raise InputError(f"scenario: {name!r} is no setting{nearest(name, type(self).model_fields)}")
        value = getattr(self, name)
        if name in COMPONENTS:
            return component_label(name, value)
        if name == "filter":
            changed = [f"{key}={_short(value[key])}" for key in value if value[key] != FILTER[key]]
            return ", ".join(changed) or "drop"
        return "all" if value is None else value

    @classmethod
    def load(cls, path: Path | str) -> "Scenario":
        """The scenario of a TOML file; raises InputError that names the file."""
        table = _read(path)
        if "sweep" in table:
            raise InputError(f"{path}: expected one scenario, found a sweep of them")
        return _at(path, lambda: cls(**table))


def sweep(base: Scenario, **axes: Sequence[Any]) -> list[Scenario]:
    """Every combination of the axes, each preceded by its attack-free control, every scenario once.

    Combinations come in the order of the axes, the last one varying fastest; a misspelt axis is an error.
    """
    for name, values in axes.items():
        if isinstance(values, str | Mapping) or not isinstance(values, Iterable) or not len(values):
            raise InputError(f"sweep: expected a list of values for {name}, found {values!r}")
    cells = [base.replace(**dict(zip(axes, values, strict=True))) for values in product(*axes.values())]
    return list(dict.fromkeys(scenario for cell in cells for scenario in (cell.control, cell)))


class LoadedSweep(NamedTuple):
    """The scenarios of a sweep and the names of the settings that vary over them, the seed last."""

    scenarios: list[Scenario]
    axes: list[str]


def load_sweep(path: Path | str, **changes: Any) -> LoadedSweep:
    """The sweep of a TOML file: settings at the top, then any number of `[[sweep]]` tables axis -> list.

    Each table is a product over the settings at the top, attack-free controls included; the tables are united.
    Without a table it is the one scenario. A change replaces a setting or, where it is an axis, the whole list:
    `load_sweep(path, seed=0, rounds=3)`. Raises InputError that names the file.
    """
    table = _read(path)
    blocks = table.pop("sweep", [])
    if not isinstance(blocks, list) or not all(isinstance(block, dict) for block in blocks):
        raise InputError(f"{path}: expected [[sweep]] tables of axis = list of values")
    settings = {**table, **changes}
    kept = [{name: values for name, values in block.items() if name not in changes} for block in blocks]

    def scenarios() -> list[Scenario]:
        base = Scenario(**settings)
        return list(dict.fromkeys(each for block in kept for each in sweep(base, **block))) if kept else [base]

    found = _at(path, scenarios)
    return LoadedSweep(found, varied(found, list(dict.fromkeys(name for block in kept for name in block))))


def varied(scenarios: Sequence[Scenario], names: Sequence[str] = ()) -> list[str]:
    """Those of the named settings (by default all) that differ between scenarios, the seed last."""
    names = [*(name for name in names or Scenario.model_fields if name != "seed"), "seed"]
    return [name for name in names if len({str(scenario.label(name)) for scenario in scenarios}) > 1]


def normalised(kind: str, value: Any) -> Component:
    """A component as {name: {setting: value}} with every setting written out, {} for none.

    Raises InputError where a name or a setting is unknown (it names those that exist) or a value is refused.
    """
    if kind in ("attack", "detector") and (value is None or value == "none" or value == {}):
        return {}
    parts = {value: {}} if isinstance(value, str) else value
    if not isinstance(parts, Mapping) or not all(isinstance(settings, Mapping) for settings in parts.values()):
        raise InputError(f"{kind}: expected a name or a table name -> settings, found {value!r}")
    for name in parts:
        builder_of(kind, name)
    if kind != "attack" and len(parts) != 1:
        raise InputError(f"{kind}: expected exactly one name, found {', '.join(parts) or 'nothing'}")
    names = ordered(parts) if kind == "attack" else parts
    return {name: _written_out(kind, name, parts[name]) for name in names}


def builder_of(kind: str, name: str) -> Callable[..., Any]:
    """What builds a component of this name; raises InputError, with the nearest names, where there is none."""
    return named(KINDS[kind], COMPONENTS[kind], name, kind)


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of an error about an unknown setting: those it resembles, else all there are."""
    names = list(known)
    return hint(name, names) or (f"; expected one of {', '.join(names)}" if names else "; there are none")


CALIBRATION: dict[str, Any] = {"clean_rounds": 0, "fpr": 0.05}
FILTER: dict[str, Any] = {  # the settings of a filter, and their defaults
    name: list(p.default) if name == "cleared" else p.default
    for name, p in inspect.signature(filtered).parameters.items()
    if p.kind is p.KEYWORD_ONLY
} | CALIBRATION


def filter_settings(value: Any) -> dict[str, Any]:
    """The settings of a filter, all written out, {} where all are at their defaults; raises InputError for a wrong one.

    out_for may be "until_cleared" in place of None. clean_rounds: how many first rounds are declared clean, on which
    the detector is calibrated to flag a share `fpr` of benign updates (`gradlens.calibrate`); 0: uncalibrated.
    """
    if not isinstance(value, Mapping):
        raise InputError(f"filter: expected a table of its settings {', '.join(FILTER)}, found {value!r:.80}")
    if unknown := [key for key in value if key not in FILTER]:
        raise InputError(f"filter: {unknown[0]!r} is no setting{nearest(unknown[0], FILTER)}")
    plain = {name: each.item() if isinstance(each, np.generic) else each for name, each in value.items()}
    written = FILTER | plain
    if written["out_for"] == UNTIL_CLEARED:
        written["out_for"] = None
    if isinstance(written["cleared"], str) or not isinstance(written["cleared"], Iterable):
        raise InputError(f"filter: cleared is a list of clients' names, found {written['cleared']!r:.80}")
    written["cleared"] = sorted({str(name) for name in written["cleared"]})
    try:
        live_filter(mean(), {"layer_norms": {}}, written)
    except InputError as error:
        raise InputError(f"filter: {error}") from None
    if not written["clean_rounds"]:  # not written out, as in the names of the runs of before there was a choice
        written = {name: each for name, each in written.items() if name not in CALIBRATION}
    return {} if FILTER | written == FILTER else written


def live_filter(aggregate: Rule, detector: Component, settings: dict[str, Any]) -> FilteredAggregator:
    """The filter of a scenario around its rule; raises InputError for settings out of their range."""
    given = FILTER | settings
    judge, rounds, fpr = build("detector", detector), given.pop("clean_rounds"), given.pop("fpr")
    if isinstance(rounds, bool) or not isinstance(rounds, int) or rounds < 0:
        raise InputError(f"clean_rounds is a number of rounds, found {rounds!r:.80}")
    if isinstance(fpr, bool) or not isinstance(fpr, int | float) or not 0 < fpr < 1:
        raise InputError(f"fpr is a rate above 0 and below 1, found {fpr!r:.80}")
    return filtered(aggregate, calibrate(judge, null=rounds, fpr=fpr) if rounds else judge, **given)


def build(kind: str, component: Component) -> Any:
    """What the one name of a normalised component stands for, with its settings."""
    ((name, settings),) = component.items()
    return builder_of(kind, name)(**settings)


def component_label(kind: str, component: Component) -> str:
    """A component in short: its names, with the settings that are not at their defaults."""
    return "+".join(_part_label(builder_of(kind, name), name, part) for name, part in component.items()) or "none"


def one_line(error: ValidationError, where: str) -> InputError:
    """What pydantic found wrong, as one line: where, which setting, what was expected and what was found."""
    first, *others = error.errors(include_url=False)
    cause = first.get("ctx", {}).get("error")
    name = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        reason = f"{name!r} is no setting{nearest(name, Scenario.model_fields)}"
    elif isinstance(cause, ValueError):
        reason = str(cause)
    else:
        reason = f"{name}: {first['msg'][0].lower()}{first['msg'][1:]}, found {first['input']!r:.80}"
    return InputError(f"{where}: {reason}" + (f" (and {len(others)} more)" if others else ""))


def _written_out(kind: str, name: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    builder = builder_of(kind, name)
    known = _defaults(builder)
    if unknown := [key for key in settings if key not in known]:
        raise InputError(f"{kind}: {name}: {unknown[0]!r} is no setting{nearest(unknown[0], known)}")
    written = {
        key: _checked(f"{kind}: {name}: {key}", settings.get(key, default), default) for key, default in known.items()
    }
    try:
        builder(**written)
    except ValidationError as error:
        raise one_line(error, f"{kind}: {name}") from None
    except (ValueError, TypeError) as error:
        raise InputError(f"{kind}: {error}") from None
    return written


def _defaults(builder: Callable[..., Any]) -> dict[str, Any]:
    """The settings of a builder that are plain values, and their defaults."""
    parameters = inspect.signature(builder).parameters.values()
    return {p.name: p.default for p in parameters if isinstance(p.default, bool | int | float | str | None)}


def _checked(where: str, value: Any, default: Any) -> Any:
    """A plain value of the default's type (a whole number will do for a real one)."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(default, float) and type(value) is int:
        value = float(value)
    if default is not None and type(value) is not type(default):
        raise InputError(f"{where}: expected {type(default).__name__}, found {value!r:.80}")
    return value


def _part_label(builder: Callable[..., Any], name: str, settings: Mapping[str, Any]) -> str:
    defaults = _defaults(builder)
    changed = [f"{key}={_short(value)}" for key, value in settings.items() if value != defaults.get(key)]
    return f"{name}({', '.join(changed)})" if changed else name


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _read(path: Path | str) -> dict[str, Any]:
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: expected a scenario in TOML, found no such file") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: expected a scenario in TOML: {str(error).splitlines()[0]}") from None


def _at(path: Path | str, make: Callable[[], Made]) -> Made:
    try:
        return make()
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
