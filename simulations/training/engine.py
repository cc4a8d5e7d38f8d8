"""Chooses the engine that trains: the one that the scenario names, or the one that is expected to be faster."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import nn

from gradlens.errors import InputError
from gradlens.settings import one_of
from simulations.attacks import Reference, Training
from simulations.tasks import Loss
from simulations.training.compiled import has_compiler
from simulations.training.convolution import SMALL
from simulations.training.networks import State, buffers, prepared, state_of
from simulations.training.plain import AS_EVERYBODY, Dataset, LocalSGD, Workspace, train_on
from simulations.training.stacked import StackedEngine, has_convolutions, unstackable

Engine = Callable[..., dict[str, np.ndarray]]
# (global model, datasets, generators, training=, references=) -> updates, as of `train_clients`

ENGINES = ("auto", "plain", "stacked")
STEPS_TO_COMPILE = 10_000  # steps of a run above which compiling, some 10 s the first time, saves more than it costs


class PlainEngine:
    """Trains one client after another, as `train_clients` does, in workspaces that are reused in every round.

    Parameters
    ----------
    model : torch.nn.Module
        It stays as it is.
    loss : callable
        (outputs, labels) -> loss of each sample.
    settings : LocalSGD
        How clients train.
    x : torch.Tensor
        A few samples, on which the model is tried.
    device : str
        Where it trains.
    workers : int
        Number of threads, which does not change any result.

    Examples
    --------
    >>> import torch
    >>> from simulations.tasks import cross_entropy
    >>> engine = PlainEngine(torch.nn.Linear(3, 2), cross_entropy, LocalSGD(), torch.ones(2, 3))
    >>> len(engine.spaces)
    1
    """

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
        """Trains clients from the same global model.

        Parameters
        ----------
        global_model, datasets, rngs, training, references
            As for `train_clients`.

        Returns
        -------
        dict of str to array
            Layer -> updates [client, *shape].
        """
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
    """Builds the engine of a name; for "auto" the one that is expected to be faster.

    Parameters
    ----------
    name : {"auto", "plain", "stacked"}
        The engine.
    model, loss, settings, device, workers
        As for `PlainEngine`.
    datasets : sequence of (x, y) tensors
        The data of all clients.
    rounds : int
        Number of rounds, which decides whether compiling pays.
    largest : int, optional
        Largest number of clients in a round; None: all.
    key : object, optional
        Identifies task and model, so that runs in one process share compiled steps.

    Returns
    -------
    callable
        (global model, datasets, generators, training=, references=) -> updates, layer -> [client, *shape].

    Raises
    ------
    InputError
        If there is no such engine, or it cannot train the model.

    Notes
    -----
    "auto" follows the measurements in `reports/bench.csv`. Models with dense layers are stacked, by far the fastest
    way, and compiled if the run has at least `STEPS_TO_COMPILE` steps. Models with small convolutions are compiled from
    that number of steps on, and trained by the plain engine below it. All others are trained by the plain engine: batch
    norm, recurrent layers, and large convolutions, for which libraries are fastest.

    Examples
    --------
    >>> import torch
    >>> from simulations.tasks import cross_entropy
    >>> data = [(torch.ones(4, 3), torch.tensor([0, 1, 0, 1]))]
    >>> type(engine_for("plain", torch.nn.Linear(3, 2), cross_entropy, LocalSGD(), data)).__name__
    'PlainEngine'
    """
    one_of("engine", name, *ENGINES)
    x = datasets[0][0]
    stacks, compiles = _plan(model, settings, datasets, rounds) if name != "plain" else (False, False)
    if name == "stacked" or stacks:
        try:
            return StackedEngine(
                model, loss, settings, x, device=device, compile=compiles, largest=largest or len(datasets), key=key,
                workers=workers,
            )  # fmt: skip
        except InputError:
            if name == "stacked":
                raise
    return PlainEngine(model, loss, settings, x, device=device, workers=workers)


def _plan(model: nn.Module, settings: LocalSGD, datasets: Sequence[Dataset], rounds: int) -> tuple[bool, bool]:
    """Whether clients are stacked, and whether a step is compiled, by the rule of "auto"."""
    convolutions = has_convolutions(model)
    steps = rounds * settings.epochs * sum(-(-len(dataset[1]) // settings.batch_size) for dataset in datasets)
    pays = steps // (1 if convolutions else len(datasets)) >= STEPS_TO_COMPILE and not buffers(model) and has_compiler()
    small = not convolutions or _patches_are_small(model, datasets[0][0][: settings.batch_size])
    stacks = len(datasets) > 1 and not buffers(model) and not unstackable(model) and small
    return stacks and (pays or not convolutions), pays and small


def _patches_are_small(model: nn.Module, x: torch.Tensor) -> bool:
    """Whether the patches of a batch that each convolution reads fit into a core's cache."""
    sizes = []

    def measure(layer: nn.Module, _: object, out: torch.Tensor) -> None:
        weight = layer.weight
        sizes.append(out.shape[0] * out[0, 0].numel() * weight[0].numel())  # type: ignore[index, union-attr, operator]

    layers = [layer for layer in model.modules() if isinstance(layer, nn.modules.conv._ConvNd)]
    handles = [layer.register_forward_hook(measure) for layer in layers]
    was_training = model.training
    with torch.no_grad():
        model.eval()(x)
    model.train(was_training)
    for handle in handles:
        handle.remove()
    return max(sizes, default=0) <= SMALL
