"""A scenario: the validated settings of one simulated run; and sweeps: combinations of settings.

A component (partition, attack, schedule, aggregator, detector) is a name, or a table name -> settings: `"iid"`,
`{"dirichlet": {"alpha": 0.5}}`. An attack may name several parts, which compose. Validation writes out every setting,
so that a scenario describes a run completely.
"""

import hashlib
import json
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self, TypeVar

import numpy as np
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PrivateAttr, ValidationError, model_validator

from gradlens.errors import InputError
from gradlens.names import FUNCTION, imported, named, nothing_imported
from gradlens.run import Run
from simulations.attacks import Turn, build_attack
from simulations.components import (
    COMPONENTS,
    FILTER,
    Component,
    build,
    component_label,
    filter_settings,
    no_setting,
    normalized,
    one_line,
    settings_table,
    short,
)
from simulations.starting_model import Adapters, Pretraining
from simulations.tasks import MODELS

Made = TypeVar("Made")

SCENARIOS = Path(__file__).parent / "scenarios"  # TOML files of the demo and the reproduced experiments
ATTACK_SETTINGS = ("attack", "num_malicious", "poison_rate", "schedule")  # settings that a control has at defaults
LATER = ("filter", "pretraining", "adapters")  # settings that were added: at their defaults they change no digest
TABLES = {"pretraining": Pretraining, "adapters": Adapters}  # settings with settings of their own, or none


def _component(kind: str) -> BeforeValidator:
    return BeforeValidator(lambda value: normalized(kind, value))


Partition = Annotated[Component, _component("partition")]
Attack = Annotated[Component, _component("attack")]
Schedule = Annotated[Component, _component("schedule")]
Aggregator = Annotated[Component, _component("aggregator")]
Detector = Annotated[Component, _component("detector")]


def _table(name: str) -> BeforeValidator:
    return BeforeValidator(lambda value: settings_table(name, TABLES[name], value))


Filter = Annotated[dict[str, Any], BeforeValidator(lambda value: filter_settings(value))]


class Scenario(BaseModel):
    """All settings of one simulated run; frozen and hashable.

    Without malicious clients, or with an attack that changes nothing, the settings of the attack fall back to their
    defaults, so that one attack-free run is the control of every attack. Each setting has a description:
    `Scenario.model_fields["rounds"].description`.

    Raises
    ------
    InputError
        If a setting is unknown or its value is invalid. The message names the setting, what was expected and what was
        found.

    Examples
    --------
    >>> scenario = Scenario(attack={"trigger": {"size": 3}}, num_malicious=2, rounds=10)
    >>> scenario.label("attack"), scenario.control.is_control
    ('trigger(size=3)', True)
    >>> Scenario(partitoin="iid")
    Traceback (most recent call last):
    gradlens.errors.InputError: scenario: 'partitoin' is no setting; did you mean partition?
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, validate_default=True, allow_inf_nan=False, protected_namespaces=()
    )

    task: str = Field(
        "digits",
        min_length=1,
        description="The learning task: a built-in one, a folder or hub name of images, or `module:function`.",
    )
    model: str = Field(
        "mlp", description="The model that clients train; `own` is the task's own, `module:function` is given the task."
    )
    pretraining: Annotated[Pretraining | None, _table("pretraining")] = Field(
        None, description="The server's training before round 0, on samples of its own; none: it does not train."
    )
    adapters: Annotated[Adapters | None, _table("adapters")] = Field(
        None, description="Low-rank adapters, which clients train and send instead of the model; none: the model."
    )
    partition: Partition = Field("iid", description="Which client holds which training samples.")  # type: ignore[assignment]
    num_clients: int = Field(20, ge=1, description="Number of clients.")
    clients_per_round: int | None = Field(None, ge=1, description="Number of clients drawn in each round; none: all.")
    samples_per_client: int | None = Field(
        None, ge=1, description="Training samples per client on average; none: the whole training set is used."
    )
    rounds: int = Field(25, ge=1, description="Number of rounds.")
    local_epochs: int = Field(1, ge=1, description="Passes over a client's own data in each round.")
    batch_size: int = Field(16, ge=1, description="Samples per local step; a client's last batch may be smaller.")
    learning_rate: float = Field(0.1, gt=0, description="Learning rate of the clients' SGD.")
    momentum: float = Field(0.0, ge=0, lt=1, description="Momentum of the clients' SGD; starts at zero in each round.")
    weight_decay: float = Field(0.0, ge=0, description="Weight decay of the clients' SGD.")
    server_learning_rate: float = Field(1.0, gt=0, description="Factor of the aggregated update at the server.")
    server_momentum: float = Field(
        0.0, ge=0, lt=1, description="Factor of the global model's last change that is added."
    )
    missing_rate: float = Field(0.0, ge=0, lt=1, description="Share of drawn clients whose update does not arrive.")
    nonfinite_rate: float = Field(0.0, ge=0, le=1, description="Share of updates that arrive as NaN.")
    attack: Attack = Field("none", description="What malicious clients do; several parts compose.")  # type: ignore[assignment]
    num_malicious: int = Field(0, ge=0, description="Number of malicious clients, drawn at random.")
    poison_rate: float = Field(
        1.0, ge=0, le=1, description="Share of a malicious client's eligible samples that are poisoned."
    )
    schedule: Schedule = Field("every_round", description="Which malicious client attacks in which round.")  # type: ignore[assignment]
    aggregator: Aggregator = Field("mean", description="The server's aggregation rule.")  # type: ignore[assignment]
    detector: Detector = Field(None, description="The live filter's detector; none: no filter.")  # type: ignore[assignment]
    filter: Filter = Field(
        {}, description="Settings of `gradlens.filtered`; `clean_rounds` and `fpr` calibrate the detector."
    )
    seed: int = Field(0, ge=0, description="Seed of all random numbers.")
    engine: Literal["auto", "plain", "stacked"] = Field(
        "auto",
        description="How clients are trained: one by one, many at once, or the faster; results agree to rounding.",
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="Where clients are trained.")

    _given: dict[str, Any] = PrivateAttr(default_factory=dict)  # as given, before settings fell back to defaults

    def __init__(self, **settings: Any) -> None:
        plain = {name: value.item() if isinstance(value, np.generic) else value for name, value in settings.items()}
        try:
            super().__init__(**plain)
        except ValidationError as error:
            raise one_line(error, "scenario", type(self).model_fields) from None
        if plain.get("filter") and not self.detector:
            raise InputError("scenario: filter: its settings need a detector, found none")
        self._given = plain

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.model != "own":
            named("models", MODELS, self.model)
        for name in ("clients_per_round", "num_malicious"):
            if (count := getattr(self, name) or 0) > self.num_clients:
                raise ValueError(f"{name}: expected at most num_clients = {self.num_clients}, found {count}")
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
            value = normalized(name, default) if name in COMPONENTS else default
            object.__setattr__(self, name, value)  # frozen from the outside only

    def __hash__(self) -> int:
        return hash(self.digest)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Scenario) and self.digest == other.digest

    @cached_property
    def digest(self) -> str:
        """First 12 hexadecimal digits of the SHA-256 hash of all settings: the name of the run's folder in a sweep."""
        canonical = json.dumps(self.settings, sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(canonical.encode()).hexdigest()[:12]

    @property
    def settings(self) -> dict[str, Any]:
        """All settings as plain values, as in `run.json`; `Scenario(**settings)` is the inverse.

        Settings of `LATER` are left out at their defaults, so that runs from before them keep their digests.
        """
        return self.model_dump(mode="json", exclude={name for name in LATER if not getattr(self, name)})

    @property
    def is_control(self) -> bool:
        """Whether there are no malicious clients."""
        return self.num_malicious == 0

    @property
    def control(self) -> "Scenario":
        """The same scenario without the attack."""
        return Scenario(**{name: value for name, value in self.settings.items() if name not in ATTACK_SETTINGS})

    def replace(self, **changes: Any) -> "Scenario":
        """Returns the scenario with some settings changed.

        Parameters
        ----------
        **changes
            Setting -> new value.

        Returns
        -------
        Scenario
            Built from the settings as they were given, before any of them fell back to its default.

        Raises
        ------
        InputError
            If a setting is unknown or its value is invalid.

        Examples
        --------
        >>> Scenario(attack="trigger").replace(num_malicious=2).label("attack")
        'trigger'
        """
        return Scenario(**{**self._given, **changes})

    def label(self, name: str) -> str | int | float:
        """Returns a setting as a short word or number for tables.

        Parameters
        ----------
        name : str
            Name of the setting.

        Returns
        -------
        str, int or float
            Such as `"trigger+scaling(factor=3)"`, `0.1` or `"all"`.

        Raises
        ------
        InputError
            If there is no such setting.

        Examples
        --------
        >>> Scenario(partition={"dirichlet": {"alpha": 0.1}}).label("partition")
        'dirichlet(alpha=0.1)'
        """
        if name not in type(self).model_fields:
            raise InputError(f"scenario: {no_setting(name, type(self).model_fields)}")
        value = getattr(self, name)
        if name in COMPONENTS:
            return component_label(name, value)
        if name == "filter":
            changed = [f"{key}={short(value[key])}" for key in value if value[key] != FILTER[key]]
            return ", ".join(changed) or "drop"
        if name in TABLES:
            given = value.model_dump(exclude_defaults=True) if value else {}
            return ", ".join(f"{key}={short(given[key])}" for key in given) or ("default" if value else "none")
        return "all" if value is None else value

    @classmethod
    def load(cls, path: Path | str) -> "Scenario":
        """Reads a scenario from a TOML file.

        Parameters
        ----------
        path : Path or str
            The file.

        Returns
        -------
        Scenario

        Raises
        ------
        InputError
            If the file cannot be read, holds a sweep, or a setting is invalid; the message names the file.
        """
        table = _read(path)
        if "sweep" in table:
            raise InputError(f"{path}: expected one scenario, found a sweep of them")
        return _at(path, lambda: cls(**table))


def stored_scenario(run: Run, trust_code: bool = False) -> Scenario:
    """Returns the scenario of a recorded run, from which task, model and attack can be built again.

    Parameters
    ----------
    run : Run
        A simulated run.
    trust_code : bool
        Whether functions that the run names as `module:function` may be imported, which runs their code. By default a
        run that names any is refused, so that only built-in and installed code runs.

    Returns
    -------
    Scenario

    Raises
    ------
    InputError
        If the run was recorded elsewhere; if its settings are invalid; or if it names code and is not trusted.

    Examples
    --------
    >>> import tempfile
    >>> from simulations import run
    >>> scenario = Scenario(rounds=1, num_clients=5)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     stored_scenario(run(scenario, folder)) == scenario
    True
    """
    if not run.scenario:
        raise InputError(f"{run.path}: expected a simulated run, found one that was recorded elsewhere")

    def checked() -> Scenario:
        scenario = Scenario(**run.scenario)
        if FUNCTION.fullmatch(scenario.task):
            imported("task", scenario.task)
        return scenario

    with nothing_imported(refuse=not trust_code):
        return _at(run.path, checked)


def sweep(base: Scenario, **axes: Sequence[Any]) -> list[Scenario]:
    """Returns all combinations of settings, each preceded by its attack-free control.

    Parameters
    ----------
    base : Scenario
        The settings that no axis changes.
    **axes : sequence
        Setting -> its values. Combinations are in the order of the axes, the last axis varying fastest.

    Returns
    -------
    list of Scenario
        Each scenario once.

    Raises
    ------
    InputError
        If an axis is not a setting, or has no list of values.

    Examples
    --------
    >>> base = Scenario(attack="trigger", num_malicious=2)
    >>> [(s.num_malicious, s.seed) for s in sweep(base, seed=[0, 1])]
    [(0, 0), (2, 0), (0, 1), (2, 1)]
    """
    for name, values in axes.items():
        if isinstance(values, str | Mapping) or not isinstance(values, Iterable) or not len(values):
            raise InputError(f"sweep: expected a list of values for {name}, found {values!r}")
    cells = [base.replace(**dict(zip(axes, values, strict=True))) for values in product(*axes.values())]
    return list(dict.fromkeys(scenario for cell in cells for scenario in (cell.control, cell)))


class LoadedSweep(NamedTuple):
    """A sweep as read from a file.

    Attributes
    ----------
    scenarios : list of Scenario
        All scenarios.
    axes : list of str
        Names of the settings that vary between them, the seed last.

    Examples
    --------
    >>> LoadedSweep([Scenario()], []).axes
    []
    """

    scenarios: list[Scenario]
    axes: list[str]


def load_sweep(path: Path | str, **changes: Any) -> LoadedSweep:
    """Reads a sweep from a TOML file: settings at the top, then any number of `[[sweep]]` tables axis -> list.

    Each table stands for all combinations of its axes with the settings at the top, attack-free controls included; the
    sweep is the union of its tables. Without a table it is a single scenario.

    Parameters
    ----------
    path : Path or str
        The file.
    **changes
        Each replaces a setting, or the whole list of an axis: `load_sweep(path, seed=0, rounds=3)`.

    Returns
    -------
    LoadedSweep
        The scenarios and the axes.

    Raises
    ------
    InputError
        If the file cannot be read or a setting is invalid; the message names the file.

    Examples
    --------
    >>> scenarios, axes = load_sweep(SCENARIOS / "demo.toml", seed=0)
    >>> axes
    ['attack', 'num_malicious', 'learning_rate', 'poison_rate', 'schedule', 'detector', 'filter']
    """
    table = _read(path)
    blocks = table.pop("sweep", [])
    if not isinstance(blocks, list) or not all(isinstance(block, dict) for block in blocks):
        raise InputError(f"{path}: expected [[sweep]] tables of axis = list of values")
    settings = {**table, **changes}
    tables = [{name: values for name, values in block.items() if name not in changes} for block in blocks]

    def union() -> list[Scenario]:
        base = Scenario(**settings)
        return list(dict.fromkeys(cell for axes in tables for cell in sweep(base, **axes))) if tables else [base]

    scenarios = _at(path, union)
    return LoadedSweep(scenarios, varied(scenarios, list(dict.fromkeys(name for axes in tables for name in axes))))


def varied(scenarios: Sequence[Scenario], names: Sequence[str] = ()) -> list[str]:
    """Returns the names of the settings that differ between scenarios, the seed last.

    Parameters
    ----------
    scenarios : sequence of Scenario
        The scenarios to compare.
    names : sequence of str
        The settings to compare; all by default. The seed is always compared.

    Returns
    -------
    list of str

    Examples
    --------
    >>> varied([Scenario(), Scenario(seed=1, rounds=3)])
    ['rounds', 'seed']
    """
    names = [*(name for name in names or Scenario.model_fields if name != "seed"), "seed"]
    return [name for name in names if len({str(scenario.label(name)) for scenario in scenarios}) > 1]


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
