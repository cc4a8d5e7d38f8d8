"""Which engine trains: as the scenario says, or the faster one by a rule."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import nn

from gradlens.errors import InputError
from simulations.attacks import Reference, Training
from simulations.tasks import Loss
from simulations.training.compiled import has_compiler
from simulations.training.convolution import SMALL
from simulations.training.networks import State, buffers, prepared, state_of
from simulations.training.plain import AS_EVERYBODY, Dataset, LocalSGD, Workspace, train_on
from simulations.training.stacked import StackedEngine, has_convolutions, unstackable

Engine = Callable[..., dict[str, np.ndarray]]
# (global model, datasets, generators, training=, references=) -> updates, as `train_clients`

ENGINES = ("auto", "plain", "stacked")
PAYS = 10_000  # steps of a run from which compiling one, some 10 s the first time, costs less than it saves


class PlainEngine:
    """`train_clients` with working spaces that stay; workers: threads, which change no bit."""

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        settings: LocalSGD,
        x: torch.Tensor,
        *,
        device: str = "cpu",
        workers: int = 1,
    ) -> None:
        start = state_of(model)
        self.spaces = [Workspace(prepared(model, x[:2], device), start) for _ in range(workers)]
        self.loss, self.settings = loss, settings

    def __call__(
        self,
        global_model: State,
        datasets: Sequence[Dataset],
        rngs: Sequence[np.random.Generator],
        training: Training = AS_EVERYBODY,
        references: Sequence[Reference] = (),
    ) -> dict[str, np.ndarray]:
        """The clients' updates, layer -> [client, *shape]."""
        for space in self.spaces:
            space.load(global_model)
        return train_on(self.spaces, datasets, rngs, self.settings, self.loss, training, references)


def engine_for(
    name: str,
    model: nn.Module,
    loss: Loss,
    settings: LocalSGD,
    datasets: Sequence[Dataset],
    *,
    rounds: int = 1,
    device: str = "cpu",
    workers: int = 1,
    largest: int | None = None,
    key: object = None,
) -> Engine:
    """The engine `plain` or `stacked`, or for `auto` the faster one; raises InputError where it cannot do the work.

    The rule of `auto`, as `reports/bench.csv` and the figures beside it justify: dense layers are stacked, by far the
    faster way, and compiled where the run makes `PAYS` steps or more; small convolutions are compiled from there on,
    and plain below; all else is plain (batch norm, recurrent layers, large convolutions, which a library does best).
    datasets: of all clients. largest: how many of them a round has at most. key: names task and model, so that
    runs of one process share what is compiled.
    """
    if name not in ENGINES:
        raise InputError(f"engine: expected one of {', '.join(ENGINES)}, found {name!r}")
    x, convolutions = datasets[0][0], has_convolutions(model)
    if name == "plain":
        return PlainEngine(model, loss, settings, x, device=device, workers=workers)
    steps = rounds * settings.epochs * sum(-(-len(dataset[1]) // settings.batch_size) for dataset in datasets)
    pays = steps // (1 if convolutions else len(datasets)) >= PAYS and not buffers(model) and has_compiler()
    small = not convolutions or _patches_are_small(model, x[: settings.batch_size])
    stacks = len(datasets) > 1 and not buffers(model) and not unstackable(model) and small
    if name == "stacked" or (stacks and (pays or not convolutions)):
        try:
            return StackedEngine(
                model, loss, settings, x, device=device, compile=pays and small, largest=largest or len(datasets),
                key=key, workers=workers,
            )  # fmt: skip
        except InputError:
            if name == "stacked":
                raise
    return PlainEngine(model, loss, settings, x, device=device, workers=workers)


def _patches_are_small(model: nn.Module, x: torch.Tensor) -> bool:
    """Whether what each convolution reads of a batch, patch by patch, stays in a core's cache."""
    sizes = []

    def look(layer: nn.Module, _: object, out: torch.Tensor) -> None:
        weight = layer.weight
        sizes.append(out.shape[0] * out[0, 0].numel() * weight[0].numel())  # type: ignore[index, union-attr, operator]

    layers = [layer for layer in model.modules() if isinstance(layer, nn.modules.conv._ConvNd)]
    handles = [layer.register_forward_hook(look) for layer in layers]
    was_training = model.training
    with torch.no_grad():
        model.eval()(x)
    model.train(was_training)
    for handle in handles:
        handle.remove()
    return max(sizes, default=0) <= SMALL
