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
WIDTH = 512  # numbers that a sketch keeps of a larger layer
WHOLE = 10_000  # numbers up to which the final weight is recorded whole
ROWS = 100  # of a final weight that are sketched each by itself: of more, their sketches would fill the memory
SEED_BITS = 128


@dataclass(frozen=True)
class Evidence:
    """What of every update is recorded.

    level: "full", everything. "layers": the named layers whole, and the buffers. "sketch": the final layer, the buffers
    and every layer of at most `width` numbers whole, of all others a count sketch of `width` numbers each; a final
    weight of more than 10,000 numbers is sketched row by row, unless it has more than 100 rows. Of each layer that is
    not recorded whole the sums of its numbers, squares, cubes and fourth powers are (`Round.moments`).
    layers: names, of level "layers". width: 512 keeps an inner product to 1 / sqrt(512) = 4.4 % of the two norms.
    seed: of the random signs, drawn anew by the system unless given. It is a secret of the server, who finds it in
    run.json: whoever knows the signs can send an update that its sketch does not show, so run.json goes to nobody who
    may yet take part.
    Raises: InputError for another level, layers where there are none to name, a width or a seed that is no count.
    """

    level: Literal["full", "layers", "sketch"] = "full"
    layers: tuple[str, ...] = ()
    width: int = WIDTH
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
    def of(cls, asked: "Evidence | str") -> "Evidence":
        """The evidence that was asked for by itself or by the name of its level."""
        return asked if isinstance(asked, Evidence) else cls(asked)  # type: ignore[arg-type]

    @property
    def settings(self) -> str:
        """In words, without the seed."""
        if self.level == "layers":
            return f"layers {', '.join(self.layers)}"
        return f"sketch of {self.width} numbers a layer" if self.level == "sketch" else "full"

    def to_json(self) -> dict[str, Any]:
        """Plain values, as `run.json` holds them; the seed as text, since many readers of JSON round large numbers."""
        seed = None if self.seed is None else f"{self.seed:x}"
        return {"level": self.level, "layers": list(self.layers), "width": self.width, "seed": seed}

    @classmethod
    def from_json(cls, values: Mapping[str, Any] | None) -> Self:
        """The inverse of `to_json`, None: full; raises InputError where the values are not of that form."""
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
        """What is recorded of this model; raises InputError where it has no such layer."""
        return _reduction(self, model)

    def of_log(self, log: UpdateLog) -> UpdateLog:
        """A log of whole updates as it would have been recorded at this level; its rounds are made when asked for."""
        reduction = self.on(log.model)
        rounds = [partial(_reduced_round, reduction, log, position) for position in range(len(log))]
        return log if reduction.is_full else UpdateLog.lazy(reduction.model, rounds)


@dataclass(frozen=True, eq=False)
class Reduction:
    """What an evidence level records of one model; sent: the model's layers as clients send them.

    model: the layers that are recorded, a sketch as a layer of its own shape.
    """

    evidence: Evidence
    sent: ModelSpec
    model: ModelSpec

    @classmethod
    def of(cls, evidence: Evidence, model: ModelSpec) -> Self:
        """The reduction of a model; raises InputError where it has not the layers that are named."""
        if evidence.level == "layers":
            recorded = model.only({*evidence.layers, *model.buffers, *_known(model, evidence.layers)})
        elif evidence.level == "sketch":
            recorded = replace(model, layers=tuple(_sketched(evidence, model, layer) for layer in model.layers))
        else:
            recorded = model
        return cls(evidence, model, recorded)

    @cached_property
    def is_full(self) -> bool:
        """Whether everything is recorded; of a small model it is at every level but "layers"."""
        return self.model == self.sent

    @cached_property
    def summed(self) -> tuple[str, ...]:
        """Names of the layers of which moments are recorded: those that are sketched, or not recorded."""
        names = (name for name in self.sent.parameters if name not in set(self.model) or self._is_sketched(name))
        return tuple(names)

    def _is_sketched(self, name: str) -> bool:
        return self.model[name].sketch_of is not None

    @cached_property
    def _sketches(self) -> dict[str, list[CountSketch]]:
        """Layer -> its sketch, or those of its rows."""
        found, seed = {}, self.evidence.seed or 0
        for name in self.summed:
            if name not in set(self.model):
                continue
            shape, size = self.model[name].shape, self.sent[name].size
            if len(shape) == 1:
                found[name] = [CountSketch.of(seed, name, size, shape[0])]
            else:
                rows, width = shape
                found[name] = [CountSketch.of(seed, f"{name}[{row}]", size // rows, width) for row in range(rows)]
        return found

    def state(self, state: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        """A global model as the rounds hold it, layer -> array; sketched when a layer is asked for."""
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
        """What is recorded of arrays - base (None: of the arrays): layer -> array; layer -> moments, float64 [4].

        One pass over what was sent, a block at a time.
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
        """The round of what `update` gave for each client; state: the whole global model. Empties what it is given."""
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
        """A round of whole updates as it is recorded; raises InputError where it is reduced already, in another way."""
        if self.is_full:
            return round_
        if set(round_.moments) == set(self.summed):
            return round_
        if round_.moments:
            raise InputError(
                f"round {round_.index} was recorded at another level; {self.evidence.settings} needs it whole"
            )
        layers = {name: round_.updates[name] for name in self.sent}
        reduced = [self.update({name: rows[i] for name, rows in layers.items()}, None) for i in range(len(round_))]
        names, counts = round_.clients.tolist(), round_.num_examples
        return self.round(round_.index, names, counts, reduced, round_.global_model, round_.refused)


@lru_cache(maxsize=16)
def _reduction(evidence: Evidence, model: ModelSpec) -> Reduction:
    return Reduction.of(evidence, model)


def _reduced_round(reduction: Reduction, log: UpdateLog, position: int) -> Round:
    return reduction.of_round(log[position])


def _known(model: ModelSpec, layers: Sequence[str]) -> Sequence[str]:
    """The names, if they are parameters of the model."""
    if unknown := [name for name in layers if name not in model.parameters]:
        raise InputError(
            f"evidence: the model has no parameter layer {unknown[0]!r:.80}, only {list(model.parameters)}"
        )
    return layers


def _sketched(evidence: Evidence, model: ModelSpec, layer: Layer) -> Layer:
    """The layer as it is recorded at level "sketch"."""
    if layer.kind == "buffer" or layer.size <= evidence.width or layer.name == model.final_bias:
        return layer
    shape: tuple[int, ...] = (evidence.width,)
    if layer.name == model.final_weight:
        row = layer.size // layer.shape[0]
        by_rows = layer.shape[0] <= ROWS
        if layer.size <= WHOLE or (by_rows and row <= evidence.width):
            return layer
        shape = (layer.shape[0], evidence.width) if by_rows else shape
    return replace(layer, shape=shape, sketch_of=layer.shape)


def _stacked(rows: list[np.ndarray], shape: tuple[int, ...], dtype: str) -> np.ndarray:
    return np.stack(rows) if rows else np.zeros((0, *shape), dtype)
