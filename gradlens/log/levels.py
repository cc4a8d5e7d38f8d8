"""How much of an update is recorded: `Evidence`, and what it makes of one model: `Reduction`."""

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache, partial
from typing import Any, Literal, Self

import numpy as np

from gradlens.errors import InputError
from gradlens.log import kernels
from gradlens.log.log import UpdateLog
from gradlens.log.model import Layer, ModelSpec
from gradlens.log.round import Round
from gradlens.log.sketches import POWERS, CountSketch, moments_of
from gradlens.log.sources import LazyLayers

LEVELS = ("full", "layers", "sketch")
SKETCH_WIDTH = 512  # numbers of the sketch of a layer
WHOLE_SIZE = 10_000  # numbers up to which the final weight is recorded in full
MOST_SKETCHED_ROWS = 100  # rows up to which a final weight is sketched row by row: more sketches would fill the memory
SEED_BITS = 128  # of a seed that is drawn


@dataclass(frozen=True)
class Evidence:
    """The evidence level: how much of every update is recorded.

    Parameters
    ----------
    level : {"full", "layers", "sketch"}, default "full"
        "full" records everything. "layers" records the named layers and the buffers. "sketch" records the final layer,
        the buffers and every layer of at most `width` numbers in full, and a count sketch of every other layer; a final
        weight of more than 10,000 numbers is sketched row by row, or as a whole where it has more than 100 rows.
    layers : tuple of str
        The layers to record, for the level "layers" only.
    width : int, default 512
        Numbers of a sketch. With 512 the error of an inner product is about 1 / sqrt(512) = 4.4 % of the product of the
        two norms.
    seed : int, optional
        Of the random signs, for the level "sketch"; by default drawn by the operating system.

    Raises
    ------
    InputError
        For an unknown level, layers that are missing or do not belong to the level, or a width or seed that is no whole
        number.

    Notes
    -----
    For each layer that is not recorded in full, the sums of its numbers, their squares, cubes and fourth powers are
    (`Round.moments`).

    The seed is a secret of the server. Whoever knows the signs can send an update that its sketch does not show, so
    nobody who may still take part may see `run.json`, which holds the seed.

    Examples
    --------
    >>> from gradlens.examples import example_log
    >>> log = Evidence("sketch", width=16, seed=1).of_log(example_log())
    >>> log[-1].updates["fc1.weight"].shape, log[-1].updates["fc2.weight"].shape
    ((10, 16), (10, 4, 8))
    """

    level: Literal["full", "layers", "sketch"] = "full"
    layers: tuple[str, ...] = ()
    width: int = SKETCH_WIDTH
    seed: int | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.level not in LEVELS:
            raise InputError(f"evidence: level is one of {', '.join(LEVELS)}, found {self.level!r:.80}")
        if isinstance(self.layers, str) or (self.level == "layers") != bool(self.layers):
            raise InputError(f"evidence: level 'layers' names the layers, no other does, found {self.layers!r:.80}")
        object.__setattr__(self, "layers", tuple(self.layers))
        if isinstance(self.width, bool) or not isinstance(self.width, int) or self.width < 1:
            raise InputError(f"evidence: width is a whole number of at least 1, found {self.width!r:.80}")
        if self.seed is None and self.level == "sketch":
            object.__setattr__(self, "seed", secrets.randbits(SEED_BITS))
        if self.seed is not None and (not isinstance(self.seed, int) or self.seed < 0):
            raise InputError("evidence: seed is a whole number of at least 0")

    @classmethod
    def of(cls, level: "Evidence | str") -> "Evidence":
        """The evidence level given by itself, or by its name with default settings."""
        return level if isinstance(level, Evidence) else cls(level)  # type: ignore[arg-type]

    @property
    def settings(self) -> str:
        """The level and its settings in words, without the seed."""
        if self.level == "layers":
            return f"layers {', '.join(self.layers)}"
        return f"sketch of {self.width} numbers a layer" if self.level == "sketch" else "full"

    def to_json(self) -> dict[str, Any]:
        """Plain values, as in `run.json`; the seed is text because many readers of JSON round large numbers."""
        seed = None if self.seed is None else f"{self.seed:x}"
        return {"level": self.level, "layers": list(self.layers), "width": self.width, "seed": seed}

    @classmethod
    def from_json(cls, values: Mapping[str, Any] | None) -> Self:
        """The inverse of `to_json`, "full" for None; raises InputError where the values are not of that form."""
        if values is None:
            return cls()
        try:
            seed = None if values["seed"] is None else int(values["seed"], 16)
            return cls(values["level"], tuple(values["layers"]), values["width"], seed)
        except InputError:
            raise
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"the evidence level in run.json is not readable: {error!r}") from error

    def on(self, model: ModelSpec) -> "Reduction":
        """What this level records of a model; raises InputError where the model lacks a named layer."""
        return _reduction(self, model)

    def of_log(self, log: UpdateLog) -> UpdateLog:
        """A fully recorded log as this level would have recorded it; its rounds are reduced when they are read."""
        reduction = self.on(log.model)
        rounds = [partial(_reduced_round, reduction, log, position) for position in range(len(log))]
        return log if reduction.is_full else UpdateLog.lazy(reduction.model, rounds)


@dataclass(frozen=True, eq=False)
class Reduction:
    """What an evidence level records of one model.

    Attributes
    ----------
    evidence : Evidence
        The level.
    sent : ModelSpec
        The layers as clients send them.
    model : ModelSpec
        The layers that are recorded; a sketch is a layer with its own shape.
    """

    evidence: Evidence
    sent: ModelSpec
    model: ModelSpec

    @classmethod
    def of(cls, evidence: Evidence, model: ModelSpec) -> Self:
        """What a level records of a model; raises InputError where the model lacks a named layer."""
        if evidence.level == "layers":
            recorded = model.only({*evidence.layers, *model.buffers, *_known(model, evidence.layers)})
        elif evidence.level == "sketch":
            recorded = replace(model, layers=tuple(_sketched(evidence, model, layer) for layer in model.layers))
        else:
            recorded = model
        return cls(evidence, model, recorded)

    @cached_property
    def is_full(self) -> bool:
        """Whether everything is recorded, as "sketch" does for a small model."""
        return self.model == self.sent

    @cached_property
    def summed(self) -> tuple[str, ...]:
        """Names of the layers whose moments are recorded: those that are sketched, and those left out."""
        names = (name for name in self.sent.parameters if name not in set(self.model) or self._is_sketched(name))
        return tuple(names)

    def _is_sketched(self, name: str) -> bool:
        return self.model[name].sketch_of is not None

    @cached_property
    def _sketches(self) -> dict[str, list[CountSketch]]:
        """Layer -> its sketch, or the sketches of its rows."""
        sketches, seed = {}, self.evidence.seed or 0
        for name in self.summed:
            if name not in set(self.model):
                continue
            shape, size = self.model[name].shape, self.sent[name].size
            if len(shape) == 1:
                sketches[name] = [CountSketch.of(seed, name, size, shape[0])]
            else:
                rows, width = shape
                sketches[name] = [CountSketch.of(seed, f"{name}[{row}]", size // rows, width) for row in range(rows)]
        return sketches

    def state(self, state: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        """A global model as the rounds hold it, layer -> array; a layer is sketched when it is read."""
        if self.is_full:
            return state

        def recorded(name: str) -> np.ndarray:
            if not self._is_sketched(name):
                return state[name]
            with kernels.one_blas_thread():
                return self._sketched(name, np.asarray(state[name]).reshape(-1), None, moments=False)[0]

        return LazyLayers(tuple(self.model), recorded)

    def update(
        self, arrays: Mapping[str, np.ndarray], base: Mapping[str, np.ndarray] | None
    ) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """Reduces what one client sent, in one pass over its numbers.

        Parameters
        ----------
        arrays : Mapping
            Layer -> array, an update or a local model.
        base : Mapping or None
            Layer -> array, the global model to subtract from a local model; None for an update.

        Returns
        -------
        recorded : dict
            Layer -> array or sketch.
        moments : dict
            Layer -> float64 [4].
        """
        recorded, moments = {}, {}
        with kernels.one_blas_thread(), np.errstate(all="ignore"):
            for name, layer in zip(self.sent, self.sent.layers, strict=True):
                array, start = np.asarray(arrays[name]), None if base is None else np.asarray(base[name])
                if name in self._sketches:
                    flat = None if start is None else start.reshape(-1)
                    recorded[name], moments[name] = self._sketched(name, array.reshape(-1), flat)
                elif name in self.summed:
                    moments[name] = moments_of(array.reshape(-1), None if start is None else start.reshape(-1))
                else:
                    moved = array if start is None else np.subtract(array, start)
                    recorded[name] = np.array(moved, layer.dtype)
        return recorded, moments

    def _sketched(
        self, name: str, numbers: np.ndarray, base: np.ndarray | None, *, moments: bool = True
    ) -> tuple[np.ndarray, np.ndarray]:
        sketches = self._sketches[name]
        if len(self.model[name].shape) == 1:
            return sketches[0].sketch_and_moments(numbers, base, moments=moments)
        rows = numbers.reshape(len(sketches), -1)
        bases = [None] * len(rows) if base is None else base.reshape(rows.shape)
        parts = [
            each.sketch_and_moments(row, start, moments=moments)
            for each, row, start in zip(sketches, rows, bases, strict=True)
        ]
        return np.stack([part for part, _ in parts]), np.sum([powers for _, powers in parts], axis=0)

    def round(
        self,
        index: int,
        clients: Sequence[str],
        num_examples: Sequence[int] | np.ndarray,
        reduced: list[tuple[dict[str, np.ndarray], dict[str, np.ndarray]]],
        state: Mapping[str, np.ndarray],
        refused: Mapping[str, str],
    ) -> Round:
        """The round made of what `update` returned for each client.

        Parameters
        ----------
        index : int
            Number of the round.
        clients : sequence of str
            Names.
        num_examples : sequence of int
            What each client claims.
        reduced : list of pairs
            What `update` returned for each client; emptied, to save memory.
        state : Mapping
            Layer -> array, the full global model.
        refused : Mapping
            Client -> reason.
        """
        updates = {
            layer.name: _stacked([arrays.pop(layer.name) for arrays, _ in reduced], layer.shape, layer.dtype)
            for layer in self.model.layers
        }
        moments = {
            name: _stacked([powers.pop(name) for _, powers in reduced], (POWERS,), "float64") for name in self.summed
        }
        names, counts = np.array(clients, np.str_), np.array(num_examples, np.int64)
        buffers = self.model.buffers
        return Round(index, names, counts, updates, self.state(state), dict(refused), buffers, moments)

    def of_round(self, round_: Round) -> Round:
        """A round as it is recorded; raises InputError where it was already reduced at another level."""
        if self.is_full:
            return round_
        if set(round_.moments) == set(self.summed):
            return round_
        if round_.moments:
            raise InputError(
                f"round {round_.index} was recorded at another level; {self.evidence.settings} needs it in full"
            )
        layers = {name: round_.updates[name] for name in self.sent}
        reduced = [self.update({name: rows[i] for name, rows in layers.items()}, None) for i in range(len(round_))]
        names, counts = round_.clients.tolist(), round_.num_examples
        made = self.round(round_.index, names, counts, reduced, round_.global_model, round_.refused)
        return replace(made, started=round_.started, signatures=round_.signatures)


@lru_cache(maxsize=16)
def _reduction(evidence: Evidence, model: ModelSpec) -> Reduction:
    return Reduction.of(evidence, model)


def _reduced_round(reduction: Reduction, log: UpdateLog, position: int) -> Round:
    return reduction.of_round(log[position])


def _known(model: ModelSpec, layers: Sequence[str]) -> Sequence[str]:
    """The names; raises InputError where one is no parameter layer of the model."""
    if unknown := [name for name in layers if name not in model.parameters]:
        raise InputError(
            f"evidence: the model has no parameter layer {unknown[0]!r:.80}, only {list(model.parameters)}"
        )
    return layers


def _sketched(evidence: Evidence, model: ModelSpec, layer: Layer) -> Layer:
    """The layer as the level "sketch" records it."""
    if layer.kind == "buffer" or layer.size <= evidence.width or layer.name == model.final_bias:
        return layer
    shape: tuple[int, ...] = (evidence.width,)
    if layer.name == model.final_weight:
        row = layer.size // layer.shape[0]
        by_rows = layer.shape[0] <= MOST_SKETCHED_ROWS and model.unit_axes[layer.name] == 0
        if layer.size <= WHOLE_SIZE or (by_rows and row <= evidence.width):
            return layer
        shape = (layer.shape[0], evidence.width) if by_rows else shape
    return replace(layer, shape=shape, sketch_of=layer.shape)


def _stacked(rows: list[np.ndarray], shape: tuple[int, ...], dtype: str) -> np.ndarray:
    return np.stack(rows) if rows else np.zeros((0, *shape), dtype)
