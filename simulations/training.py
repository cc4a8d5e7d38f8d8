"""Local training of the clients of one round: the plain engine, one client after another.

Plain SGD on softmax cross-entropy. For models this small a step costs more in calls than in arithmetic, so
an epoch's data are gathered once and cut into views, and gradients are taken and applied without an optimizer
object.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Lock

import numpy as np
import torch
from torch import nn

Dataset = tuple[torch.Tensor, torch.Tensor]  # images [sample, channel, height, width], labels int64 [sample]
State = Mapping[str, np.ndarray]  # layer -> array, buffers included
Observer = Callable[[torch.Tensor, torch.Tensor], None]  # (logits [sample, class], labels) of one step

_LOCK = Lock()
_BEFORE: list[int] = []  # torch threads before the first of the runs that are on, once per run


@dataclass(frozen=True)
class LocalSGD:
    """How a client trains: epochs over its data, batch size (the last batch may be smaller), rate, momentum."""

    epochs: int = 1
    batch_size: int = 16
    learning_rate: float = 0.1
    momentum: float = 0.0


def train_clients(
    model: nn.Module,
    global_model: State,
    datasets: Sequence[Dataset],
    rngs: Sequence[np.random.Generator],
    settings: LocalSGD,
    *,
    observe: Observer | None = None,
) -> dict[str, np.ndarray]:
    """Every client's update after local training from the same global model, layer -> [client, *shape].

    rngs: one generator per client, which draws the order of its samples in each epoch.
    observe: called in every step with the logits before it and the labels. The model's own numbers are used as
    working space; its dtype (float32, float64 in tests) is that of the training and of the updates.
    """
    layers = tensors(model)
    start = {name: torch.tensor(global_model[name], dtype=layer.dtype) for name, layer in layers.items()}
    updates = {name: np.empty((len(datasets), *layer.shape), _dtype(layer)) for name, layer in layers.items()}
    model.train()
    for client, (dataset, rng) in enumerate(zip(datasets, rngs, strict=True)):
        with torch.no_grad():
            for name, layer in layers.items():
                layer.copy_(start[name])
        _train(model, dataset, rng, settings, observe)
        with torch.no_grad():
            for name, layer in layers.items():
                updates[name][client] = (layer - start[name]).numpy()
    return updates


def _train(
    model: nn.Module, dataset: Dataset, rng: np.random.Generator, settings: LocalSGD, observe: Observer | None
) -> None:
    """Trains the model in place on one client's data."""
    parameters = list(model.parameters())
    velocities: Sequence[torch.Tensor] = ()
    for images, labels in _batches(dataset, rng, settings):
        logits = model(images)
        if observe is not None:
            observe(logits.detach(), labels)
        gradients = torch.autograd.grad(nn.functional.cross_entropy(logits, labels), parameters)
        with torch.no_grad():
            if velocities:
                gradients = [g.add(v, alpha=settings.momentum) for g, v in zip(gradients, velocities, strict=True)]
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.add_(gradient, alpha=-settings.learning_rate)
        velocities = gradients if settings.momentum else ()


def _batches(dataset: Dataset, rng: np.random.Generator, settings: LocalSGD) -> Iterator[Dataset]:
    images, labels = dataset
    for _ in range(settings.epochs):
        order = torch.from_numpy(rng.permutation(len(labels)))
        # one copy an epoch; a batch is a view of it
        yield from zip(images[order].split(settings.batch_size), labels[order].split(settings.batch_size), strict=True)


def predict(model: nn.Module, images: torch.Tensor, batch_size: int = 1_000) -> np.ndarray:
    """The most likely class of each image, int64 [sample]."""
    model.eval()
    with torch.inference_mode():
        answers = [model(batch).argmax(1) for batch in images.split(batch_size)]
    return torch.cat(answers).numpy() if answers else np.zeros(0, np.int64)


def tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Layer -> the model's own tensor, parameters and buffers, in the model's order."""
    return dict(model.state_dict(keep_vars=True))


def buffers(model: nn.Module) -> list[str]:
    """Names of the layers that are not trained."""
    parameters = {name for name, _ in model.named_parameters()}
    return [name for name in model.state_dict() if name not in parameters]


def state_of(model: nn.Module) -> dict[str, np.ndarray]:
    """Layer -> a copy of the model's numbers."""
    return {name: tensor.detach().numpy().copy() for name, tensor in tensors(model).items()}


def load_state(model: nn.Module, state: State) -> None:
    """Copies a state into the model: the arrays stay as they are, and free of it."""
    with torch.no_grad():
        for name, tensor in tensors(model).items():
            tensor.copy_(torch.tensor(state[name]))


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


def _dtype(tensor: torch.Tensor) -> np.dtype:
    return tensor.detach().numpy().dtype
