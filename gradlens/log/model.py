"""The layers of a model: `Layer` and `ModelSpec`."""

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, Self

import numpy as np

from gradlens.errors import InputError
from gradlens.log.final_layer import FinalLayer, final_layer_of, named_final_layer, unit_axes

DTYPES = ("float32", "float64", "int8", "int16", "int32", "int64", "uint8")


@dataclass(frozen=True)
class Layer:
    """One named tensor of a model.

    Parameters
    ----------
    name : str
        Its name.
    shape : tuple of int
        The shape that is recorded.
    dtype : str, default "float32"
        The type that is recorded; always "float32" for parameters.
    kind : {"parameter", "buffer", "adapter"}, default "parameter"
        A buffer (batch-normalization statistics, counters) is recorded and aggregated but never scored. An adapter is
        the product of two recorded layers (`gradlens.log.adapters`), and is scored.
    sketch_of : tuple of int, optional
        The shape that was sent, where only a sketch is recorded.

    Raises
    ------
    InputError
        For an unknown kind or type, or an empty dimension.

    Examples
    --------
    >>> Layer("fc1.weight", (8, 16)).size
    128
    """

    name: str
    shape: tuple[int, ...]
    dtype: str = "float32"
    kind: Literal["parameter", "buffer", "adapter"] = "parameter"
    sketch_of: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.kind not in ("parameter", "buffer", "adapter"):
            raise InputError(f"layer {self.name!r}: kind is 'parameter', 'buffer' or 'adapter', found {self.kind!r}")
        if any(not isinstance(n, int) or n < 1 for n in self.shape):
            raise InputError(f"layer {self.name!r}: every dimension must be at least 1, found {self.shape}")
        if self.kind != "buffer" and self.dtype != "float32":
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
    """The layers of a model in its order, and which of them are the final ones.

    Parameters
    ----------
    layers : tuple of Layer
        At least one of them a parameter.
    final_weight : str, optional
        Name of the final layer's weight.
    final_bias : str, optional
        Name of the final layer's bias.

    Raises
    ------
    InputError
        On a repeated name, a model without parameters, or a final layer that is not among them.

    Examples
    --------
    >>> model = ModelSpec.of({"fc.weight": np.zeros((3, 2)), "fc.bias": np.zeros(3)})
    >>> model.final_bias, model.num_parameters
    ('fc.bias', 9)
    """

    layers: tuple[Layer, ...]
    final_weight: str | None = None
    final_bias: str | None = None

    def __post_init__(self) -> None:
        names = [layer.name for layer in self.layers]
        if len(set(names)) < len(names):
            raise InputError(f"a model names each layer once, found {first_duplicate(names)!r} twice")
        if not self.parameters:
            raise InputError("a model needs a parameter layer, found none: integers and running statistics are buffers")
        for name in (self.final_weight, self.final_bias):
            if name is not None and name not in self.parameters:
                raise InputError(f"the final layer {name!r} is not a parameter layer of the model {names}")

    @classmethod
    def of(
        cls,
        state: Mapping[str, np.ndarray],
        *,
        buffers: Collection[str] = (),
        final_layer: str | None = None,
        final_weight: str | None = None,
        final_bias: str | None = None,
    ) -> Self:
        """The specification of a model, from its arrays.

        Parameters
        ----------
        state : Mapping
            Layer -> array.
        buffers : collection of str
            The layers that are never scored.
        final_layer : str, optional
            The layer that answers, by the name of its weight, its bias or its module; by default it is found
            (`found_final_layer`), and none where that is not sure.
        final_weight, final_bias : str, optional
            Its weight, and its bias where that is not to be found.

        Raises
        ------
        InputError
            Where the model has no such layer.
        """
        arrays = {name: np.asarray(array) for name, array in state.items()}
        layers = tuple(
            Layer(name, a.shape, str(a.dtype) if name in buffers else "float32", _kind(name, buffers))
            for name, a in arrays.items()
        )
        if final_bias is None:
            parameters = [layer for layer in layers if layer.kind == "parameter"]
            name = final_layer or final_weight
            found = final_layer_of(parameters) if name is None else named_final_layer(parameters, name)
            final_weight, final_bias = found.weight, found.bias
        return cls(layers, final_weight, final_bias)

    @property
    def found_final_layer(self) -> FinalLayer:
        """Which layer names, order and shapes say is the final one, why, and how certain that is.

        Examples
        --------
        >>> model = ModelSpec.of({"fc.weight": np.zeros((3, 2)), "fc.bias": np.zeros(3)})
        >>> model.found_final_layer.why
        'the only weight that could be it'
        """
        return final_layer_of([self[name] for name in self.parameters])

    def by_unit(self, layer: str, numbers: np.ndarray) -> np.ndarray:
        """The numbers of a layer, unit by unit: those of a class, an output or a filter together.

        Parameters
        ----------
        layer : str
            Its name.
        numbers : numpy.ndarray
            [..., number], in the order of the layer.

        Returns
        -------
        numpy.ndarray
            [..., unit, number]. Kernels of Keras and flax have their units in the last dimension.

        Examples
        --------
        >>> model = ModelSpec.of({"fc.kernel": np.zeros((2, 3)), "fc.bias": np.zeros(3)})
        >>> model.by_unit("fc.kernel", np.arange(6)).tolist()
        [[0, 3], [1, 4], [2, 5]]
        """
        shape, axis, before = self[layer].shape, self.unit_axes[layer], numbers.shape[:-1]
        if axis:
            numbers = np.moveaxis(numbers.reshape(*before, *shape), len(before) + axis, len(before))
        return numbers.reshape(*before, self.num_units(layer), self[layer].size // self.num_units(layer))

    def num_units(self, layer: str) -> int:
        """How many units a layer has: classes, outputs or filters."""
        shape = self[layer].shape
        return shape[self.unit_axes[layer]] if shape else 1

    @cached_property
    def unit_axes(self) -> Mapping[str, int]:
        """Layer -> which of its recorded dimensions counts its units."""
        axes = unit_axes([self[name] for name in self.parameters])
        return {layer.name: axes.get(layer.name, 0) if layer.sketch_of is None else 0 for layer in self.layers}

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
        return tuple(layer.name for layer in self.layers if layer.kind != "buffer")

    @cached_property
    def buffers(self) -> tuple[str, ...]:
        """Names of the layers that are recorded and aggregated, never scored."""
        return tuple(layer.name for layer in self.layers if layer.kind == "buffer")

    @property
    def is_reduced(self) -> bool:
        """Whether a layer is recorded as a sketch."""
        return any(layer.sketch_of is not None for layer in self.layers)

    @property
    def num_parameters(self) -> int:
        """Number of recorded parameters, buffers not included."""
        return sum(self[name].size for name in self.parameters)

    def only(self, names: Collection[str]) -> Self:
        """The specification of these layers alone; raises InputError where the model lacks one."""
        if unknown := [name for name in names if name not in self._by_name]:
            raise InputError(f"the model has no layer {unknown[0]!r}, only {list(self)}")
        final = (name if name in names else None for name in (self.final_weight, self.final_bias))
        return type(self)(tuple(layer for layer in self.layers if layer.name in names), *final)

    def to_json(self) -> dict[str, Any]:
        """Plain values, as in `run.json`; the layers are described as they were sent."""
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


def first_duplicate(names: Sequence[str]) -> str:
    """The first name that occurs a second time."""
    return next(name for i, name in enumerate(names) if name in names[:i])
