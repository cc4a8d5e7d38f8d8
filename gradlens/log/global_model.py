"""The server's global model: its layers, which of them are scored, and its numbers as they are recorded."""

import re
from collections.abc import Collection, Mapping
from fnmatch import fnmatchcase
from itertools import groupby
from typing import Any

import numpy as np

from gradlens.errors import InputError
from gradlens.log.arrays import State, Unfit, as_array
from gradlens.log.final_layer import PLACE
from gradlens.log.model import ModelSpec
from gradlens.words import several

BUFFER_NAMES = (  # last part of a layer's name: running statistics of torch, Keras, and of spectral normalization
    "running_mean", "running_var", "num_batches_tracked", "moving_mean", "moving_variance", "_u", "_v", "weight_u",
    "vector_u",
)  # fmt: skip


def found_buffers(state: State) -> list[str]:
    """The layers that are buffers by type or name: integers, and statistics of batch and spectral normalization.

    Parameters
    ----------
    state : Mapping
        Layer -> array of any library.

    Notes
    -----
    A mean and a variance of one length in one module are running statistics, too (Keras's Normalization, flax's nnx).
    Where names are numbers, as in a list of arrays, two vectors before a single integer are the running statistics of
    batch normalization that torch lists with their counter; so are the last two of four or five vectors of one length,
    unless one of the last has a negative number (Keras: scale, shift, mean, variance).
    """
    arrays = {name: as_array(value)[0] for name, value in state.items()}
    parts = {name: re.split(r"[./]", name) for name in arrays}
    statistics = _running_statistics(arrays)
    spectral = {name.removesuffix("_orig") for name in arrays if name.endswith("weight_orig")}
    return [
        name
        for name, array in arrays.items()
        if array.dtype.kind in "iub"
        or parts[name][-1] in BUFFER_NAMES
        or "batch_stats" in parts[name]
        or name in statistics
        or (name.endswith("weight_v") and name.removesuffix("_v") in spectral)
    ] + _buffers_by_place(arrays)


def _running_statistics(arrays: Mapping[str, np.ndarray]) -> set[str]:
    """Vectors called mean and variance, or var, that stand beside each other in a module."""
    found = set()
    for mean in arrays:
        if re.split(r"[./]", mean)[-1] == "mean":
            variances = [mean.removesuffix("mean") + last for last in ("variance", "var")]
            pairs = [[mean, variance] for variance in variances if variance in arrays]
            found |= {name for pair in pairs if _are_vectors(arrays, pair) for name in pair}
    return found


def _buffers_by_place(arrays: Mapping[str, np.ndarray]) -> list[str]:
    """Running statistics among arrays whose names are places in a list."""
    if not all(PLACE.match(name) for name in arrays):
        return []
    names, found = list(arrays), []
    for *statistics, counter in zip(names, names[1:], names[2:], strict=False):
        is_counter = arrays[counter].size == 1 and arrays[counter].dtype.kind in "iu"
        if is_counter and _are_vectors(arrays, statistics):
            found += statistics
    alike = [list(group) for _, group in groupby(names, key=lambda name: arrays[name].shape)]
    for group in alike:
        if len(group) in (4, 5) and _are_vectors(arrays, group) and not (arrays[group[-1]] < 0).any():
            found += group[-2:]
    return list(dict.fromkeys(found))


def _are_vectors(arrays: Mapping[str, np.ndarray], names: list[str]) -> bool:
    shapes = {arrays[name].shape for name in names}
    return len(shapes) == 1 and len(arrays[names[0]].shape) == 1 and arrays[names[0]].dtype.kind == "f"


def spec_of(
    state: State,
    buffers: Collection[str] = (),
    *,
    final_layer: str | None = None,
    layers: Collection[str] | None = None,
) -> ModelSpec:
    """The specification of a global model whose arrays may be of any library.

    Parameters
    ----------
    state : Mapping
        Layer -> array.
    buffers : collection of str
        Layers that are never scored, besides those that `found_buffers` finds.
    final_layer : str, optional
        The layer that answers, by the name of its weight, its bias or its module; found where it is not given.
    layers : collection of str, optional
        The layers that clients send, by names or patterns such as "body.*"; by default all. The others are no part of
        the specification, and a final layer among them is none.

    Raises
    ------
    InputError
        Where the state is no table of arrays, or has no such buffer, final layer or layer to send.

    Notes
    -----
    A tensor without any number, such as a counter of shape (0,), is no layer.
    """
    _check_named(state)
    if unknown := [name for name in buffers if name not in state]:
        raise InputError(f"buffers: the model has no layer {unknown[0]!r}, only {list(state)}")
    arrays = {n: _recorded_type(_array_of_server(n, value)) for n, value in readable(state, layers).items()}
    arrays = {name: array for name, array in arrays.items() if array.size}
    every_buffer = {*buffers, *found_buffers(arrays)}
    model = ModelSpec.of(arrays, buffers=every_buffer, final_layer=final_layer)
    return model if layers is None else model.only(_matching(model, layers))


def readable(state: Any, layers: Collection[str] | None) -> Any:
    """A model without what is no array, such as complex numbers, among the layers that are not sent.

    Parameters
    ----------
    state : Any
        Layer -> array of any library; what is no table is returned as it is.
    layers : collection of str, optional
        The layers that are sent, by names or patterns; by default all, and the state is returned as it is.
    """
    if layers is None or not isinstance(state, Mapping):
        return state
    return {name: value for name, value in state.items() if _is_sent(name, layers) or _is_array(value)}


def _is_sent(name: str, layers: Collection[str]) -> bool:
    return any(fnmatchcase(str(name), pattern) for pattern in layers)


def _is_array(value: Any) -> bool:
    try:
        as_array(value)
    except Unfit:
        return False
    return True


def _matching(model: ModelSpec, patterns: Collection[str]) -> list[str]:
    """The layers that match one of the patterns; raises InputError where a pattern matches none."""
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in model):
            raise InputError(f"layers: no layer of the model matches {pattern!r:.80}, only {several(list(model))}")
    return [name for name in model if _is_sent(name, patterns)]


def state_of(state: State, model: ModelSpec, *, partial: bool = False) -> dict[str, np.ndarray]:
    """A copy of a global model in the types in which it is recorded.

    Parameters
    ----------
    state : Mapping
        Layer -> array of any library.
    model : ModelSpec
        The layers that it must have.
    partial : bool, default False
        Whether it may have others, which clients do not send.

    Raises
    ------
    InputError
        Where its layers or their shapes are not those of the model.
    """
    _check_named(state)
    known = set(model)
    others = [name for name in state if name not in known and not partial and _array_of_server(name, state[name]).size]
    if differing := [name for name in model if name not in state] + others:
        whose = "recorded" if differing[0] not in state else "given"
        raise InputError(f"the global model changed its layers: {differing[0]!r:.80} is in the {whose} model alone")
    arrays = {layer.name: _array_of_server(layer.name, state[layer.name]) for layer in model.layers}
    for layer in model.layers:
        if (shape := arrays[layer.name].shape) != layer.shape:
            raise InputError(f"layer {layer.name!r} of the global model must have shape {layer.shape}, found {shape}")
    with np.errstate(all="ignore"):
        return {layer.name: np.array(arrays[layer.name], layer.dtype) for layer in model.layers}


def _check_named(state: Any) -> None:
    """Raises InputError where a global model does not name its layers."""
    if isinstance(state, Mapping) and all(isinstance(name, str) for name in state):
        return
    found = type(state).__name__
    if isinstance(state, Mapping):
        found += f" with the name {next(name for name in state if not isinstance(name, str))!r:.80}"
    if isinstance(state, list | tuple):
        found += "; {str(place): array for place, array in enumerate(arrays)} names arrays by their places"
    raise InputError(f"a global model is a table layer -> array, whose names are text, found {found}")


def averaged_in(state: State, model: ModelSpec) -> frozenset[str]:
    """The integer layers of which a global model holds fractions, as a plain mean of counters leaves them.

    Parameters
    ----------
    state : Mapping
        Layer -> array of any library.
    model : ModelSpec
        The layers as they are recorded.
    """
    counters = [layer.name for layer in model.layers if layer.dtype.startswith(("int", "uint"))]
    return frozenset(name for name in counters if _array_of_server(name, state[name]).dtype.kind == "f")


def _array_of_server(name: str, value: Any) -> np.ndarray:
    try:
        return as_array(value)[0]
    except Unfit as reason:
        raise InputError(f"layer {name!r} of the global model {reason}") from reason


def _recorded_type(array: np.ndarray) -> np.ndarray:
    """Integers as int64, since differences of smaller ones would wrap around; floats as float32, float64 kept."""
    if array.dtype.kind in "iub":
        return array.astype(np.int64)
    return array if array.dtype == np.float64 else array.astype(np.float32)
