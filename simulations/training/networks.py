"""Operations on a torch model: copying its weights in and out, evaluation, and reproducible dropout masks."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import Lock
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import nn

from gradlens.errors import InputError
from simulations.randomness import GENERATOR

State = Mapping[str, np.ndarray]  # layer -> array, buffers included

Module = TypeVar("Module", bound=nn.Module)

_LOCK = Lock()
_THREADS: list[int] = []  # one entry per run in progress: the number of torch threads before the first of them


def tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Returns the model's tensors (not copies), parameters and buffers, layer -> tensor, in the model's order.

    Parameters
    ----------
    model : torch.nn.Module

    Examples
    --------
    >>> import torch
    >>> list(tensors(torch.nn.Linear(3, 2)))
    ['weight', 'bias']
    """
    return dict(model.state_dict(keep_vars=True))


def buffers(model: nn.Module) -> list[str]:
    """Returns the names of the model's buffers, list of str.

    Parameters
    ----------
    model : torch.nn.Module

    Examples
    --------
    >>> import torch
    >>> buffers(torch.nn.BatchNorm1d(3))
    ['running_mean', 'running_var', 'num_batches_tracked']
    """
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return [name for name in model.state_dict() if name not in parameters]


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """Returns the parameters that require a gradient, name -> parameter."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def state_of(model: nn.Module) -> dict[str, np.ndarray]:
    """Returns a copy of the model's parameters and buffers, layer -> array.

    Parameters
    ----------
    model : torch.nn.Module

    Examples
    --------
    >>> import torch
    >>> {name: array.shape for name, array in state_of(torch.nn.Linear(3, 2)).items()}
    {'weight': (2, 3), 'bias': (2,)}
    """
    return {name: np.array(tensor.detach().cpu().numpy(), order="C") for name, tensor in tensors(model).items()}


def load_state(model: nn.Module, state: State) -> None:
    """Copies a state into the model; they share no memory afterwards.

    Parameters
    ----------
    model : torch.nn.Module
    state : Mapping of str to ndarray
        Layer -> array.

    Examples
    --------
    >>> import torch
    >>> model = torch.nn.Linear(1, 1)
    >>> load_state(model, {"weight": np.ones((1, 1)), "bias": np.zeros(1)})
    >>> model(torch.tensor([[3.0]])).item()
    3.0
    """
    with torch.no_grad():
        for name, tensor in tensors(model).items():
            tensor.copy_(torch.tensor(state[name]))


def outputs(model: nn.Module, x: torch.Tensor, batch_size: int = 1_000) -> Iterator[torch.Tensor]:
    """Yields the model's outputs in evaluation mode, batch by batch.

    Parameters
    ----------
    model : torch.nn.Module
        It is left in evaluation mode.
    x : torch.Tensor
        Samples [sample, ...].
    batch_size : int, default 1000
        Samples per batch.

    Yields
    ------
    torch.Tensor
        Outputs of a batch [sample, ...], on the CPU.

    Examples
    --------
    >>> import torch
    >>> [batch.shape[0] for batch in outputs(torch.nn.Identity(), torch.zeros(5, 2), batch_size=3)]
    [3, 2]
    """
    device = next(model.parameters(), torch.empty(0)).device
    model.eval()
    with torch.inference_mode():
        for batch in x.split(batch_size):
            yield model(batch.to(device)).cpu()


def predict(model: nn.Module, x: torch.Tensor, batch_size: int = 1_000) -> np.ndarray:
    """Returns the most likely class of each sample, int64 [sample].

    Parameters
    ----------
    model : torch.nn.Module
    x : torch.Tensor
        Samples [sample, ...].
    batch_size : int, default 1000

    Examples
    --------
    >>> import torch
    >>> predict(torch.nn.Identity(), torch.tensor([[0.1, 0.9], [0.8, 0.2]]))
    array([1, 0])
    """
    classes = [_likeliest(logits) for logits in outputs(model, x, batch_size)]
    return torch.cat(classes).numpy() if classes else np.zeros(0, np.int64)


def _likeliest(logits: torch.Tensor) -> torch.Tensor:
    """The most likely class by each row; a single logit is positive for class 1."""
    return (logits[:, 0] > 0).long() if logits.shape[1] == 1 else logits.argmax(1)


def device_for(name: str) -> torch.device:
    """Returns the device of a setting.

    Parameters
    ----------
    name : {"auto", "cpu", "cuda"}
        "auto": a CUDA device if there is one.

    Returns
    -------
    torch.device

    Raises
    ------
    InputError
        For "cuda", if torch sees no such device.

    Examples
    --------
    >>> device_for("cpu")
    device(type='cpu')
    """
    present = torch.cuda.is_available()
    if name == "cuda" and not present:
        raise InputError("device: expected cpu or auto, found cuda, which torch does not see on this machine")
    return torch.device("cuda" if present and name != "cpu" else "cpu")


class MaskedDropout(nn.Module):
    """Dropout with given masks, one for each use in a forward pass: x times 0 or 1 / (1 - rate).

    Parameters
    ----------
    rate : float
        Share of numbers that are masked.
    shapes : sequence of tuple, optional
        Shape per sample of its input in each use; None: a forward pass collects the shapes in `seen`.

    Examples
    --------
    >>> import torch
    >>> layer = MaskedDropout(0.5)
    >>> _ = layer(torch.ones(2, 7))
    >>> layer.seen
    [(2, 7)]
    """

    def __init__(self, rate: float, shapes: Sequence[tuple[int, ...]] | None = None) -> None:
        super().__init__()
        self.rate, self.shapes, self.time = rate, shapes, 0
        self.seen: list[tuple[int, ...]] = []  # shapes of inputs, while the shapes of masks are unknown
        for number in range(len(shapes or ())):
            self.register_buffer(f"mask{number}", torch.ones(()), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns x, of any shape, masked; in evaluation mode unchanged."""
        if not self.training:
            return x
        if self.shapes is None:
            self.seen.append(tuple(x.shape))
            return x
        mask = getattr(self, f"mask{self.time % len(self.shapes)}")
        self.time += 1
        return x * mask


class Slot(NamedTuple):
    """One mask of a dropout.

    Attributes
    ----------
    layer : MaskedDropout
        The module that applies the mask.
    name : str
        Name of the mask's buffer in the module.
    rate : float
        Share of numbers that are masked.
    shape : tuple of int
        Shape of the mask per sample.

    Examples
    --------
    >>> Slot(MaskedDropout(0.5, [(4,)]), "mask0", 0.5, (4,)).shape
    (4,)
    """

    layer: MaskedDropout
    name: str
    rate: float
    shape: tuple[int, ...]


def prepared(model: nn.Module, x: torch.Tensor, device: torch.device | str = "cpu") -> nn.Module:
    """Returns a copy of a model to train: on the device, convolutions channels-last, dropouts with given masks.

    Parameters
    ----------
    model : torch.nn.Module
        It stays as it is.
    x : torch.Tensor
        A few samples, on which it is tried.
    device : torch.device or str
        Where it trains.

    Returns
    -------
    torch.nn.Module
        Every `nn.Dropout` of it, except one of rate 1, is a `MaskedDropout`.

    Raises
    ------
    InputError
        If its training cannot be reproduced: it draws random numbers other than by `nn.Dropout` modules, or replaces
        its buffers.

    Examples
    --------
    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Dropout(0.5))
    >>> list(dropouts(prepared(model, torch.ones(2, 3))))
    ['1.mask0']
    """
    copied = copy.deepcopy(model)
    _replace(copied, nn.Dropout, lambda name, layer: MaskedDropout(layer.p) if layer.p < 1 else layer)
    probe = _tried(copy.deepcopy(copied), x)
    new = {name: m for name, m in probe.named_modules() if isinstance(m, MaskedDropout) and m.shapes is None}
    shapes = {name: _per_sample(name, module.seen) for name, module in new.items()}
    _replace(copied, MaskedDropout, lambda name, layer: MaskedDropout(layer.rate, shapes.get(name, layer.shapes)))
    copied = copied.to(device)
    if any(isinstance(module, nn.Conv2d) for module in copied.modules()):
        copied = copied.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return copied


def dropouts(model: nn.Module) -> dict[str, Slot]:
    """Returns the dropout masks of a prepared model, name of the mask's buffer -> slot, in the model's order."""
    return {
        f"{name}.mask{number}": Slot(module, f"mask{number}", module.rate, shape)
        for name, module in model.named_modules()
        if isinstance(module, MaskedDropout)
        for number, shape in enumerate(module.shapes or ())
    }


def _replace(model: nn.Module, kind: type[Module], made: Callable[[str, Module], nn.Module]) -> None:
    """Replaces every module of a kind, at any depth."""
    new = {id(module): made(name, module) for name, module in model.named_modules() if isinstance(module, kind)}
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if id(child) in new:
                parent._modules[name] = new[id(child)]


def _tried(probe: nn.Module, x: torch.Tensor) -> nn.Module:
    """The model after a forward pass in training mode, in which its dropouts note the shapes of their inputs.

    Raises InputError if the pass draws random numbers or replaces buffers.
    """
    probe, before = probe.cpu().train(), {name: id(tensor) for name, tensor in tensors(probe).items()}
    with GENERATOR, torch.no_grad():
        state = torch.get_rng_state()
        probe(_two(x))
        draws = not torch.equal(state, torch.get_rng_state())
        torch.set_rng_state(state)
    if draws:
        raise InputError("model: it draws random numbers in training; only nn.Dropout modules can be reproduced")
    if replaced := [name for name, tensor in tensors(probe).items() if id(tensor) != before[name]]:
        raise InputError(f"model: its forward replaces the buffer {replaced[0]}; expected it to be changed in place")
    return probe


def _two(x: torch.Tensor) -> torch.Tensor:
    return x[:2].cpu() if len(x) > 1 else x.cpu().expand(2, *x.shape[1:])


def _per_sample(name: str, seen: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
    if any(shape[0] != 2 for shape in seen):
        raise InputError(f"model: expected the dropout {name} to mask a row per sample, found the shape {seen[0]} of 2")
    return [shape[1:] for shape in seen]


class Masks:
    """Draws one client's dropout masks from a child of its generator, so that its other draws do not change.

    Parameters
    ----------
    layers : sequence of Slot
        The masks to draw.
    rng : numpy.random.Generator
        The client's generator.

    Examples
    --------
    >>> import numpy as np, torch
    >>> layers = dropouts(prepared(torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Dropout(0.5)), torch.ones(2, 3)))
    >>> (mask,) = Masks(list(layers.values()), np.random.default_rng(0)).draw(batch=5)
    >>> mask.shape, sorted(set(mask.flatten().tolist()))
    (torch.Size([5, 4]), [0.0, 2.0])
    """

    def __init__(self, layers: Sequence[Slot], rng: np.random.Generator) -> None:
        self.layers = layers
        if layers:
            self.generator = torch.Generator().manual_seed(int(rng.spawn(1)[0].integers(2**63)))

    def draw(self, batch: int) -> list[torch.Tensor]:
        """Draws a mask for each dropout, float32 [batch, *shape]."""
        kept = [torch.rand((batch, *layer.shape), generator=self.generator) >= layer.rate for layer in self.layers]
        return [keeps / (1 - layer.rate) for keeps, layer in zip(kept, self.layers, strict=True)]


def worker_threads(workers: int) -> ThreadPoolExecutor:
    """Returns a pool of threads with the caller's number of torch threads; by default new ones would take OpenMP's."""
    return ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(torch.get_num_threads(),))


@contextmanager
def one_thread() -> Iterator[None]:
    """Limits torch to one thread in a `with` block, because other numbers of threads give other bits.

    The setting belongs to the process: of several blocks in one process, the last to end restores it.

    Yields
    ------
    None

    Examples
    --------
    >>> with one_thread():
    ...     torch.get_num_threads()
    1
    """
    with _LOCK:
        _THREADS.append(_THREADS[0] if _THREADS else torch.get_num_threads())
        torch.set_num_threads(1)
    try:
        yield
    finally:
        with _LOCK:
            threads = _THREADS.pop()
            if not _THREADS:
                torch.set_num_threads(threads)
