"""A torch model's channels: how active they are, and the model without some of them, or without extreme weights."""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from gradlens.errors import InputError
from gradlens.mitigation.orders import PruningOrder

if TYPE_CHECKING:
    from torch import Tensor, nn


def pruned_layer(model: "nn.Module", layer: str | None = None) -> str:
    """Returns the layer whose channels are pruned: the last convolution, or without one the last hidden dense layer.

    Parameters
    ----------
    model : torch.nn.Module
        Layers count in the order in which the model registers them; name the layer if it computes in another order.
    layer : str, optional
        The dotted name of the layer, to choose another one; never the final layer, whose units are the classes.

    Returns
    -------
    str
        Its dotted name.

    Raises
    ------
    InputError
        If there is no such layer.

    Examples
    --------
    >>> from torch import nn
    >>> pruned_layer(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)))
    '0'
    """
    *hidden, _ = names = list(_layers(model)) or [""]
    if layer is not None:
        if layer not in hidden:
            raise InputError(f"layer: expected one of {', '.join(hidden) or 'none'} (not the last), found {layer!r}")
        return layer
    if not hidden:
        leaves = (module for module in model.modules() if not any(module.children()))
        kinds = ", ".join(dict.fromkeys(type(module).__name__ for module in leaves))
        raise InputError(
            f"model: expected a convolution or dense layer besides the final one ({names[0] or 'none'}), "
            f"found {kinds or 'none'}"
        )
    convolutions = [name for name in hidden if _is_convolution(_layers(model)[name])]
    return (convolutions or hidden)[-1]


def channel_activations(model: "nn.Module", x: Any, layer: str | None = None, batch_size: int = 1_000) -> np.ndarray:
    """Returns the mean activation of each channel of a layer on samples, which is what a client measures.

    Parameters
    ----------
    model : torch.nn.Module
        It stays as it is.
    x : ndarray or Tensor
        Samples as the model takes them.
    layer : str, optional
        As for `pruned_layer`.
    batch_size : int
        Samples at a time.

    Returns
    -------
    ndarray of float64 [channel]
        The positive part of the layer's output, after a norm that follows it, averaged over samples and positions.

    Raises
    ------
    InputError
        Without samples, or if the layer takes no part in what the model computes.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    >>> _ = model[0].weight.data.copy_(torch.eye(2)), model[0].bias.data.zero_()
    >>> channel_activations(model, np.array([[1.0, -1.0], [3.0, -1.0]], np.float32))
    array([2., 0.])
    """
    import torch

    if not len(x):
        raise InputError("x: expected samples to see activations on, found none")
    ours, name = copy.deepcopy(model).eval(), pruned_layer(model, layer)
    norms = norms_after(ours, name, x)
    seen = norms[0] if norms else name
    axis = 1 if norms or _is_convolution(ours.get_submodule(name)) else -1
    total, count = torch.zeros(channel_count(ours.get_submodule(name)), dtype=torch.float64), 0

    def look(module: "nn.Module", inputs: Any, output: "Tensor") -> None:
        nonlocal count
        positive = output.detach().movedim(axis, 0).flatten(1).clamp(min=0)
        total.add_(positive.sum(dim=1, dtype=torch.float64).cpu())
        count += positive.shape[1]

    ours.get_submodule(seen).register_forward_hook(look)
    with torch.no_grad():
        for first in range(0, len(x), batch_size):
            ours(_batch(ours, x[first : first + batch_size]))
    if not count:
        raise InputError(f"layer: {name} takes no part in what the model computes")
    return (total / count).numpy()


def without_channels(model: "nn.Module", channels: Sequence[int], x: Any, layer: str | None = None) -> "nn.Module":
    """Returns a copy of the model in which some channels of a layer are 0, also after a norm that follows.

    Parameters
    ----------
    model : torch.nn.Module
        It stays as it is.
    channels : sequence of int
        The channels.
    x : ndarray or Tensor
        A few samples, to see which norm follows the layer.
    layer : str, optional
        As for `pruned_layer`.

    Raises
    ------
    InputError
        If the layer has no such channel, or one is named twice.

    Examples
    --------
    >>> from torch import nn
    >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
    >>> pruned = without_channels(model, [1], np.zeros((1, 2), np.float32))
    >>> (pruned[0].weight == 0).all(dim=1).tolist()
    [False, True, False]
    """
    name = pruned_layer(model, layer)
    chosen = channel_list(channels)
    check_channels(name, chosen, channel_count(model.get_submodule(name)))
    ours = copy.deepcopy(model)
    zero_channels(ours, dict.fromkeys((name, *norms_after(model, name, x)), tuple(chosen)))
    return ours


def without_extreme_weights(model: "nn.Module", delta: float, layers: Sequence[str] | None = None) -> "nn.Module":
    """Returns a copy of the model with weights far from the mean of their layer set to 0; biases stay.

    Parameters
    ----------
    model : torch.nn.Module
        It stays as it is.
    delta : float
        Weights outside mu +- delta sigma of their layer become 0, and so do those that are not finite. mu and sigma are
        the mean and standard deviation of its finite weights other than 0, which are the pruned ones.
    layers : sequence of str, optional
        Dotted names. None: the last convolution other than the final layer, and the first dense layer.

    Raises
    ------
    InputError
        If `delta` is no positive number, or a layer is not there.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> model = nn.Sequential(nn.Linear(4, 1))
    >>> _ = model[0].weight.data.copy_(torch.tensor([[0.1, 0.2, 0.1, 9.0]]))
    >>> [round(weight, 1) for weight in without_extreme_weights(model, delta=1.5)[0].weight[0].tolist()]
    [0.1, 0.2, 0.1, 0.0]
    """
    import torch

    if not (np.isfinite(delta) and delta > 0):
        raise InputError(f"delta must be a positive number, found {delta}")
    ours = copy.deepcopy(model)
    with torch.no_grad():
        for name in adjusted_layers(model, layers):
            weights = weights_of(ours, name)
            counted = weights.double()[weights.isfinite() & (weights != 0)]
            if len(counted):
                far = (weights.double() - counted.mean()).abs() > delta * counted.std(correction=0)
                weights[far | ~weights.isfinite()] = 0
            else:
                weights.zero_()
    return ours


def _layers(model: "nn.Module") -> "dict[str, nn.Module]":
    """The convolutions and dense layers of a model by their dotted names, in the order of registration."""
    from torch import nn

    kinds = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds)}


def _is_convolution(module: "nn.Module") -> bool:
    from torch import nn

    return not isinstance(module, nn.Linear)


def channel_count(module: Any) -> int:
    """The number of output channels of a convolution or dense layer."""
    return int(module.weight.shape[0])


def weights_of(model: "nn.Module", name: str) -> "Tensor":
    """The weight of a layer; raises InputError where it has none."""
    return _parameter(name, model.get_submodule(name), "weight")


def _parameter(name: str, module: "nn.Module", which: str) -> Any:
    """A layer's weight or bias, to be written to; None where it has none."""
    parameter = module._parameters.get(which)
    if parameter is None and getattr(module, which, None) is not None:
        raise InputError(f"{name}.{which} is computed from other parameters; remove its parametrization first")
    return None if parameter is None else parameter.data


def adjusted_layers(model: "nn.Module", layers: Sequence[str] | None) -> list[str]:
    """The layers whose extreme weights are set to 0: those named, else the ones that are adjusted by default."""
    known = _layers(model)
    if layers is not None:
        if unknown := [name for name in layers if name not in known]:
            raise InputError(f"layers: expected some of {', '.join(known) or 'none'}, found {unknown[0]!r}")
        return list(layers)
    convolutions = [name for name in list(known)[:-1] if _is_convolution(known[name])]
    dense = [name for name in known if not _is_convolution(known[name])]
    if not convolutions and not dense:
        raise InputError("model: expected a convolution or a dense layer to adjust, found none")
    return [*convolutions[-1:], *dense[:1]]


def zero_channels(model: "nn.Module", channels: Mapping[str, Sequence[int]]) -> None:
    """Sets the output of some channels of layers or norms to 0, in place: layer or norm -> channels."""
    for name, chosen in channels.items():
        module = model.get_submodule(name)
        tensors = [_parameter(name, module, which) for which in ("weight", "bias")]
        if tensors[0] is None:  # a norm without weights subtracts the running mean, which is 0 for a channel at 0
            tensors = [getattr(module, "running_mean", None)]
        for tensor in tensors:
            if tensor is not None:
                tensor[list(chosen)] = 0


def norms_after(model: "nn.Module", layer: str, x: Any) -> list[str]:
    """The norms that a layer's channels reach before anything mixes them, whose channels must be 0 as well.

    Found by trying, since the order of registration tells nothing: with the layer's first channel once at 0, once at
    random numbers, such a norm sees a change in its first channel only, which is 0 the first time.
    """
    import torch
    from torch import nn

    ours = copy.deepcopy(model).eval()
    of_layer, kinds = ours.get_submodule(layer), (nn.modules.batchnorm._NormBase, nn.GroupNorm)
    norms = {name: module for name, module in ours.named_modules() if isinstance(module, kinds)}
    if not norms:
        return []
    axis, width = (1 if _is_convolution(of_layer) else -1), channel_count(of_layer)
    inputs: dict[str, list[Any]] = {name: [] for name in norms}
    fill = [0.0]

    def watch(name: str) -> "Callable[[nn.Module, Any], None]":
        return lambda module, arguments: inputs[name].append(arguments[0].clone())

    def replace(module: "nn.Module", arguments: Any, output: "Tensor") -> "Tensor":
        changed = output.clone()
        channel = changed.movedim(axis, 0)[0]
        noise = torch.rand(channel.shape, generator=torch.Generator().manual_seed(0))
        channel.copy_(fill[0] * (1 + noise).to(channel))
        return changed

    for name, norm in norms.items():
        norm.register_forward_pre_hook(watch(name))
    of_layer.register_forward_hook(replace)
    samples = _batch(ours, x[:2])
    with torch.no_grad():
        for fill[0] in (0.0, 1.0):
            ours(samples)
    reached = []
    for name, seen in inputs.items():
        if len(seen) == 2 and seen[0].dim() > 1 and seen[0].shape[1] == width:
            at_zero, at_random = (values.movedim(1, 0) for values in seen)
            same = torch.equal(at_zero[1:], at_random[1:]) and not torch.equal(at_zero[0], at_random[0])
            reached += [name] if same and not at_zero[0].any() else []
    return reached


def _batch(model: "nn.Module", x: Any) -> "Tensor":
    import torch

    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    return (x if isinstance(x, torch.Tensor) else torch.tensor(np.asarray(x))).to(device)


def channel_list(order: PruningOrder | Sequence[int] | np.ndarray) -> list[int]:
    """The channels of an order; the one to be pruned first comes first."""
    return [int(channel) for channel in (order.order if isinstance(order, PruningOrder) else order)]


def check_channels(name: str, channels: Sequence[int], width: int) -> None:
    """Raises InputError if a channel does not exist or comes twice."""
    if outside := [channel for channel in channels if not 0 <= channel < width]:
        raise InputError(f"{name} has the channels 0 to {width - 1}, found {outside[0]}")
    if len(set(channels)) < len(channels):
        raise InputError(f"{name}: expected every channel once in the order of pruning, some come twice")
