"""What a model is made of: `Layer`, `ModelSpec`."""

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, Self

import numpy as np

from gradlens.errors import InputError

DTYPES = ("float32", "float64", "int8", "int16", "int32", "int64", "uint8")


@dataclass(frozen=True)
class Layer:
    """One named tensor of the model; a buffer (batch-norm statistics, counters) is recorded and never scored.

    shape: of what is recorded; sketch_of: the shape that was sent, where only a sketch of it was recorded.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str = "float32"
    kind: Literal["parameter", "buffer"] = "parameter"
    sketch_of: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.kind not in ("parameter", "buffer"):
            raise InputError(f"layer {self.name!r}: kind is 'parameter' or 'buffer', found {self.kind!r}")
        if any(not isinstance(n, int) or n < 1 for n in self.shape):
            raise InputError(f"layer {self.name!r}: every dimension must be at least 1, found {self.shape}")
        if self.kind == "parameter" and self.dtype != "float32":
            raise InputError(f"layer {self.name!r}: parameters are recorded as float32, found {self.dtype}")
        if self.dtype not in DTYPES:
            raise InputError(f"layer {self.name!r}: dtype must be one of {', '.join(DTYPES)}, found {self.dtype}")

    @cached_property
    def size(self) -> int:
        """How many numbers of the layer are recorded."""
        return math.prod(self.shape)

    @property
    def sent_shape(self) -> tuple[int, ...]:
        """The shape that was sent."""
        return self.shape if self.sketch_of is None else self.sketch_of

    @cached_property
    def sent_size(self) -> int:
        """How many numbers of the layer were sent."""
        return math.prod(self.sent_shape)


@dataclass(frozen=True)
class ModelSpec:
    """Names, shapes and kinds of a model's layers, in the model's order, and which of them are the final ones."""

    layers: tuple[Layer, ...]
    final_weight: str | None = None
    final_bias: str | None = None

    def __post_init__(self) -> None:
        names = [layer.name for layer in self.layers]
        if len(set(names)) < len(names):
            raise InputError(f"a model names each layer once, found {first_duplicate(names)!r} twice")
        if not self.parameters:
            raise InputError("a model needs at least one parameter layer, found none")
        for name in (self.final_weight, self.final_bias):
            if name is not None and name not in self.parameters:
                raise InputError(f"the final layer {name!r} is not a parameter layer of the model {names}")

    @classmethod
    def of(
        cls,
        state: Mapping[str, np.ndarray],
        *,
        buffers: Collection[str] = (),
        final_weight: str | None = None,
        final_bias: str | None = None,
    ) -> Self:
        """The specification of a model's state; finds the final layer by itself unless it is named.

        The final weight is the last parameter of two or more dimensions, the final bias the parameter
        right after it with one number per row of that weight; a model without one has `final_bias` None.
        """
        arrays = {name: np.asarray(array) for name, array in state.items()}
        layers = tuple(
            Layer(name, a.shape, str(a.dtype) if name in buffers else "float32", _kind(name, buffers))
            for name, a in arrays.items()
        )
        parameters = [layer for layer in layers if layer.kind == "parameter"]
        if final_weight is None:
            final_weight = next((p.name for p in reversed(parameters) if len(p.shape) >= 2), None)
        if final_bias is None and final_weight is not None:
            final_bias = _bias_of(final_weight, parameters)
        return cls(layers, final_weight, final_bias)

    @cached_property
    def _by_name(self) -> dict[str, Layer]:
        return {layer.name: layer for layer in self.layers}

    def __getitem__(self, name: str) -> Layer:
        return self._by_name[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._by_name)

    def __len__(self) -> int:
        return len(self.layers)

    @cached_property
    def parameters(self) -> tuple[str, ...]:
        """Names of the layers that are scored."""
        return tuple(layer.name for layer in self.layers if layer.kind == "parameter")

    @cached_property
    def buffers(self) -> tuple[str, ...]:
        """Names of the layers that are recorded and aggregated, never scored."""
        return tuple(layer.name for layer in self.layers if layer.kind == "buffer")

    @property
    def num_parameters(self) -> int:
        """How many numbers are trained."""
        return sum(self[name].size for name in self.parameters)

    def only(self, names: Collection[str]) -> Self:
        """The specification of these layers alone; raises InputError where there is no such layer."""
        if unknown := [name for name in names if name not in self._by_name]:
            raise InputError(f"the model has no layer {unknown[0]!r}, only {list(self)}")
        final = (name if name in names else None for name in (self.final_weight, self.final_bias))
        return type(self)(tuple(layer for layer in self.layers if layer.name in names), *final)

    def to_json(self) -> dict[str, Any]:
        """Plain values, as `run.json` holds them; of the layers as they were sent."""
        layers = [
            {"name": each.name, "shape": list(each.sent_shape), "dtype": each.dtype, "kind": each.kind}
            for each in self.layers
        ]
        return {"layers": layers, "final_weight": self.final_weight, "final_bias": self.final_bias}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of `to_json`; raises InputError where the values are not of that form."""
        try:
            layers = tuple(Layer(str(v["name"]), tuple(v["shape"]), v["dtype"], v["kind"]) for v in values["layers"])
            return cls(layers, values["final_weight"], values["final_bias"])
        except InputError:
            raise
        except (KeyError, TypeError) as error:
            raise InputError(f"the model in run.json is not readable: {error!r}") from error


def _kind(name: str, buffers: Collection[str]) -> Literal["parameter", "buffer"]:
    return "buffer" if name in buffers else "parameter"


def _bias_of(weight: str, parameters: Sequence[Layer]) -> str | None:
    position = [p.name for p in parameters].index(weight)
    after = parameters[position + 1 : position + 2]
    return next((p.name for p in after if p.shape == parameters[position].shape[:1]), None)


def first_duplicate(names: Sequence[str]) -> str:
    """The first name that stands there a second time."""
    return next(name for i, name in enumerate(names) if name in names[:i])
