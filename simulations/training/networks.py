"""A torch model as the simulation handles it: its numbers in and out, its answers, and its dropout masks."""

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
_BEFORE: list[int] = []  # torch threads before the first of the runs that are on, once per run


def tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Layer -> the model's own tensor, parameters and buffers, in the model's order."""
    return dict(model.state_dict(keep_vars=True))


def buffers(model: nn.Module) -> list[str]:
    """Names of the layers that are not trained."""
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return [name for name in model.state_dict() if name not in parameters]


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name -> parameter, of those that are trained."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def state_of(model: nn.Module) -> dict[str, np.ndarray]:
    """Layer -> a copy of the model's numbers."""
    return {name: np.array(each.detach().cpu().numpy(), order="C") for name, each in tensors(model).items()}


def load_state(model: nn.Module, state: State) -> None:
    """Copies a state into the model: the arrays stay as they are, and free of it."""
    with torch.no_grad():
        for name, tensor in tensors(model).items():
            tensor.copy_(torch.tensor(state[name]))


def outputs(model: nn.Module, x: torch.Tensor, batch_size: int = 1_000) -> Iterator[torch.Tensor]:
    """What the model answers, outside training, batch by batch."""
    device = next(model.parameters(), torch.empty(0)).device
    model.eval()
    with torch.inference_mode():
        for batch in x.split(batch_size):
            yield model(batch.to(device)).cpu()


def predict(model: nn.Module, x: torch.Tensor, batch_size: int = 1_000) -> np.ndarray:
    """The most likely class of each sample, int64 [sample]."""
    answers = [answer.argmax(1) for answer in outputs(model, x, batch_size)]
    return torch.cat(answers).numpy() if answers else np.zeros(0, np.int64)


def device_for(name: str) -> torch.device:
    """`cpu`, `cuda`, or for `auto` a CUDA device where there is one; raises InputError where it is not there."""
    present = torch.cuda.is_available()
    if name == "cuda" and not present:
        raise InputError("device: expected cpu or auto, found cuda, which torch does not see on this machine")
    return torch.device("cuda" if present and name != "cpu" else "cpu")


class MaskedDropout(nn.Module):
    """Dropout whose masks are given, one for each time that a forward pass comes by: x times 0 or 1 / (1 - rate)."""

    def __init__(self, rate: float, shapes: Sequence[tuple[int, ...]] | None = None) -> None:
        """Shapes: of what it masks each time, per sample; None: to be found out."""
        super().__init__()
        self.rate, self.shapes, self.time = rate, shapes, 0
        self.seen: list[tuple[int, ...]] = []  # what came by while the shapes were not known
        for number in range(len(shapes or ())):
            self.register_buffer(f"mask{number}", torch.ones(()), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """X of any shape, alike in evaluation mode."""
        if not self.training:
            return x
        if self.shapes is None:
            self.seen.append(tuple(x.shape))
            return x
        mask = getattr(self, f"mask{self.time % len(self.shapes)}")
        self.time += 1
        return x * mask


class Slot(NamedTuple):
    """One mask of a dropout: the module that has it, its name there, the rate and the shape per sample."""

    layer: MaskedDropout
    name: str
    rate: float
    shape: tuple[int, ...]


def prepared(model: nn.Module, x: torch.Tensor, device: torch.device | str = "cpu") -> nn.Module:
    """A copy of the model to train: on the device, convolutions channels-last, masks for its dropouts given.

    x: a few samples, to try it on. Raises InputError where it cannot be trained so that others get the same: it draws
    random numbers in any other way than `nn.Dropout` modules, or replaces its buffers.
    """
    ours = copy.deepcopy(model)
    _replace(ours, nn.Dropout, lambda name, layer: MaskedDropout(layer.p) if layer.p < 1 else layer)
    probe = _tried(copy.deepcopy(ours), x)
    new = {name: m for name, m in probe.named_modules() if isinstance(m, MaskedDropout) and m.shapes is None}
    shapes = {name: _per_sample(name, module.seen) for name, module in new.items()}
    _replace(ours, MaskedDropout, lambda name, layer: MaskedDropout(layer.rate, shapes.get(name, layer.shapes)))
    ours = ours.to(device)
    if any(isinstance(module, nn.Conv2d) for module in ours.modules()):
        ours = ours.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return ours


def dropouts(model: nn.Module) -> dict[str, Slot]:
    """The masks of a prepared model by the names of their buffers, in the model's order."""
    return {
        f"{name}.mask{number}": Slot(module, f"mask{number}", module.rate, shape)
        for name, module in model.named_modules()
        if isinstance(module, MaskedDropout)
        for number, shape in enumerate(module.shapes or ())
    }


def _replace(model: nn.Module, kind: type[Module], made: Callable[[str, Module], nn.Module]) -> None:
    """Puts a new module in the place of each of a kind, wherever it is."""
    new = {id(module): made(name, module) for name, module in model.named_modules() if isinstance(module, kind)}
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if id(child) in new:
                parent._modules[name] = new[id(child)]


def _tried(probe: nn.Module, x: torch.Tensor) -> nn.Module:
    """The model after it was trained forward once, to see what comes by its dropouts, and what else happens."""
    probe, before = probe.cpu().train(), {name: id(each) for name, each in tensors(probe).items()}
    with GENERATOR, torch.no_grad():
        state = torch.get_rng_state()
        probe(_two(x))
        draws = not torch.equal(state, torch.get_rng_state())
        torch.set_rng_state(state)
    if draws:
        raise InputError("model: it draws random numbers in training; only nn.Dropout modules can be reproduced")
    if replaced := [name for name, each in tensors(probe).items() if id(each) != before[name]]:
        raise InputError(f"model: its forward replaces the buffer {replaced[0]}; expected it to be changed in place")
    return probe


def _two(x: torch.Tensor) -> torch.Tensor:
    return x[:2].cpu() if len(x) > 1 else x.cpu().expand(2, *x.shape[1:])


def _per_sample(name: str, seen: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
    if any(shape[0] != 2 for shape in seen):
        raise InputError(f"model: expected the dropout {name} to mask a row per sample, found the shape {seen[0]} of 2")
    return [shape[1:] for shape in seen]


class Masks:
    """Draws one client's dropout masks, from a child of its generator: its other draws stay as they are."""

    def __init__(self, layers: Sequence[Slot], rng: np.random.Generator) -> None:
        self.layers = layers
        if layers:
            self.generator = torch.Generator().manual_seed(int(rng.spawn(1)[0].integers(2**63)))

    def draw(self, batch: int) -> list[torch.Tensor]:
        """A mask for each dropout, float32 [batch, *shape]."""
        kept = [torch.rand((batch, *layer.shape), generator=self.generator) >= layer.rate for layer in self.layers]
        return [each / (1 - layer.rate) for each, layer in zip(kept, self.layers, strict=True)]


def worker_threads(workers: int) -> ThreadPoolExecutor:
    """Threads that compute with as many torch threads as the caller: a new one starts with OpenMP's own number."""
    return ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(torch.get_num_threads(),))


@contextmanager
def one_thread() -> Iterator[None]:
    """One torch thread, then as many as before: two give other bits than one.

    The setting is the process's, so among several runs in one process the last to end puts it back.
    """
    with _LOCK:
        _BEFORE.append(_BEFORE[0] if _BEFORE else torch.get_num_threads())
        torch.set_num_threads(1)
    try:
        yield
    finally:
        with _LOCK:
            threads = _BEFORE.pop()
            if not _BEFORE:
                torch.set_num_threads(threads)
