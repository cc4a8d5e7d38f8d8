"""The model that a federation starts from: as initialized, trained by the server before, or frozen behind adapters."""

from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import nn

from gradlens.errors import InputError
from simulations.randomness import GENERATOR, Stream, address
from simulations.tasks import Loss, Task, build_model
from simulations.training import State, device_for, one_thread, state_of

OPTIMIZERS = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}


class Pretraining(BaseModel):
    """How the server trains the model before round 0, on samples of its own that no client has.

    Each setting has a description: `Pretraining.model_fields["samples"].description`.

    Raises
    ------
    pydantic.ValidationError
        If a setting is unknown or its value is invalid; a scenario says so in one line.

    Examples
    --------
    >>> Pretraining(samples=500).epochs
    1
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    samples: int = Field(ge=1, description="Training samples, drawn at random and taken away from the clients.")
    epochs: int = Field(1, ge=1, description="Passes over them.")
    batch_size: int = Field(64, ge=1, description="Samples per step.")
    optimizer: Literal["adam", "sgd"] = Field("adam", description="At torch's defaults, apart from the learning rate.")
    learning_rate: float = Field(0.001, gt=0, description="Learning rate of the optimizer.")


class Adapters(BaseModel):
    """Low-rank adapters (LoRA) [1]_: what clients train and send, while the model itself is frozen.

    Each setting has a description: `Adapters.model_fields["rank"].description`.

    Raises
    ------
    pydantic.ValidationError
        If a setting is unknown or its value is invalid; a scenario says so in one line.

    References
    ----------
    .. [1] Hu et al. 2021, arXiv:2106.09685.

    Examples
    --------
    >>> Adapters(rank=2).modules
    ('query', 'key', 'value', 'out')
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    rank: int = Field(4, ge=1, description="Rows of A and columns of B.")
    alpha: float = Field(8.0, gt=0, description="The product counts alpha / rank times.")
    modules: tuple[str, ...] = Field(
        ("query", "key", "value", "out"),
        min_length=1,
        strict=False,
        description="Last names of the dense layers that get an adapter; by default the transformer's attention.",
    )


def servers_samples(task: Task, pretraining: Pretraining, seed: int) -> np.ndarray:
    """Draws the server's training samples.

    Parameters
    ----------
    task : Task
        The data of the server and the clients.
    pretraining : Pretraining
        Says how many.
    seed : int
        Of the draw.

    Returns
    -------
    numpy.ndarray
        Their positions, sorted.

    Raises
    ------
    InputError
        If none are left for the clients.

    Examples
    --------
    >>> from simulations.tasks import load_task
    >>> len(servers_samples(load_task("digits"), Pretraining(samples=100), seed=0))
    100
    """
    available = len(task.y_train)
    if pretraining.samples >= available:
        raise InputError(
            f"pretraining: task {task.name} has {available:,} training samples, {pretraining.samples:,} for the server "
            "leave none for the clients"
        )
    return np.sort(address(seed, Stream.PRETRAINING).permutation(available)[: pretraining.samples])


@lru_cache(maxsize=4)  # the runs of a sweep that differ in the attack alone start from the same model
def pretrained(task: Task, model: str, seed: int, pretraining: Pretraining, device: str = "cpu") -> State:
    """Trains a model as the server does before round 0.

    Parameters
    ----------
    task : Task
        The data of the server and the clients.
    model : str
        As for `build_model`.
    seed : int
        Of the initial weights, the draw of the samples and their order.
    pretraining : Pretraining
        How it is trained.
    device : str
        Where it is trained.

    Returns
    -------
    Mapping of str to array
        Layer -> array, buffers included.

    Raises
    ------
    InputError
        As `servers_samples` and `build_model`; or if the model or its training breaks down.

    Examples
    --------
    >>> from simulations.tasks import load_task
    >>> list(pretrained(load_task("digits"), "mlp", 0, Pretraining(samples=100)))
    ['fc1.weight', 'fc1.bias', 'fc2.weight', 'fc2.bias']
    """
    chosen = servers_samples(task, pretraining, seed)
    x, y = torch.from_numpy(task.x_train[chosen]), torch.from_numpy(task.y_train[chosen])
    built, rng = build_model(task, model, seed), address(seed, Stream.PRETRAINING, client=1)
    built = built.to(device_for(device)).train()
    optimizer = OPTIMIZERS[pretraining.optimizer](built.parameters(), lr=pretraining.learning_rate)
    with GENERATOR, torch.random.fork_rng(devices=[]), one_thread():
        torch.manual_seed(int(rng.integers(2**63)))
        for _ in range(pretraining.epochs):
            for batch in torch.from_numpy(rng.permutation(len(y))).split(pretraining.batch_size):
                optimizer.zero_grad()
                _loss(task.loss, built, x[batch], y[batch]).backward()
                optimizer.step()
    state = state_of(built)
    if not all(np.isfinite(array).all() for array in state.values()):
        raise InputError(
            f"pretraining: it diverged at learning_rate {pretraining.learning_rate:g}; choose a smaller one"
        )
    return state


def _loss(loss: Loss, model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    device = next(model.parameters()).device
    return loss(model(x.to(device)), y.to(device)).mean()


class LowRank(nn.Module):
    """A frozen dense layer beside an adapter: base, lora_A, lora_B.

    Parameters
    ----------
    base : torch.nn.Linear
        The layer.
    adapters : Adapters
        Rank and weight of the product.

    Notes
    -----
    The output is W x + b + (alpha / rank) B A x. B is 0 at first, A as torch initializes a dense layer.

    Examples
    --------
    >>> layer = torch.nn.Linear(8, 6)
    >>> torch.equal(LowRank(layer, Adapters())(torch.ones(1, 8)), layer(torch.ones(1, 8)))
    True
    """

    def __init__(self, base: nn.Linear, adapters: Adapters) -> None:
        super().__init__()
        self.base, self.weight_of_product = base, adapters.alpha / adapters.rank
        self.lora_A = nn.Linear(base.in_features, adapters.rank, bias=False)
        self.lora_B = nn.Linear(adapters.rank, base.out_features, bias=False)
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Features [..., in] -> [..., out]."""
        return self.base(features) + self.weight_of_product * self.lora_B(self.lora_A(features))


def with_adapters(model: nn.Module, adapters: Adapters, seed: int = 0) -> nn.Module:
    """Freezes a model and puts an adapter beside some of its dense layers.

    Parameters
    ----------
    model : torch.nn.Module
        It is changed: what is frozen is no parameter any more and leaves its state, so that adapters alone are sent.
    adapters : Adapters
        Which layers, and how.
    seed : int
        Of the initial A.

    Returns
    -------
    torch.nn.Module
        The same model.

    Raises
    ------
    InputError
        If it has no dense layer of these names, or buffers, which would change although it is frozen.

    Examples
    --------
    >>> from simulations.tasks import build_model, load_task
    >>> model = with_adapters(build_model(load_task("digits"), "mlp"), Adapters(modules=["fc1"]))
    >>> {name: array.shape for name, array in state_of(model).items()}
    {'fc1.lora_A.weight': (4, 64), 'fc1.lora_B.weight': (32, 4)}
    """
    dense = {name: module for name, module in model.named_modules() if type(module) is nn.Linear}
    chosen = [name for name in dense if name.rpartition(".")[2] in adapters.modules]
    if not chosen:
        known = ", ".join(sorted({name.rpartition(".")[2] for name in dense})) or "none"
        raise InputError(f"adapters: no dense layer is called {' or '.join(adapters.modules)}; the model has {known}")
    if present := [name for name, _ in model.named_buffers()]:
        raise InputError(f"adapters: expected a model without buffers, which no adapter can freeze, found {present[0]}")
    _freeze(model)
    with GENERATOR, torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(address(seed, Stream.ADAPTERS).integers(2**63)))
        for name in chosen:
            model.set_submodule(name, LowRank(dense[name], adapters))
    return model


def _freeze(model: nn.Module) -> None:
    """Makes every parameter a constant that is in no state."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            delattr(module, name)
            module.register_buffer(name, parameter.detach(), persistent=False)
