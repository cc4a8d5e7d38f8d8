"""The plain engine: trains one client after another, or several at once, each on a thread of its own.

In small models a step spends more time on calls than on arithmetic. Therefore an epoch's data are gathered once and
split into views, and gradients are applied without an optimizer object.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from queue import SimpleQueue

import numpy as np
import torch
from torch import nn

from gradlens.errors import InputError
from simulations.attacks import Reference, Tensors, Training
from simulations.tasks import Loss, cross_entropy
from simulations.training.networks import Masks, State, dropouts, prepared, tensors, trained, worker_threads

Dataset = tuple[torch.Tensor, torch.Tensor]  # x [sample, ...], labels int64 [sample]
Observer = Callable[[torch.Tensor, torch.Tensor], None]  # (outputs [sample, ...], labels) of one step

AS_EVERYBODY = Training()
NOTHING = Reference({}, {}, None, None)


@dataclass(frozen=True)
class LocalSGD:
    """Settings of local training by SGD; the defaults are those of a scenario.

    Parameters
    ----------
    epochs : int
        Passes over the data, each in a new random order.
    batch_size : int
        Samples per step; the last batch of an epoch may be smaller.
    learning_rate, momentum, weight_decay : float
        As in torch.optim.SGD; the momentum starts at zero in each round.

    Examples
    --------
    >>> LocalSGD(epochs=2).batch_size
    16
    """

    epochs: int = 1
    batch_size: int = 16
    learning_rate: float = 0.1
    momentum: float = 0.0
    weight_decay: float = 0.0

    def of(self, training: Training) -> "LocalSGD":
        """Returns these settings with the epochs and the learning rate of an attack's training, if it has its own.

        Parameters
        ----------
        training : Training
            How attackers train.

        Returns
        -------
        LocalSGD

        Examples
        --------
        >>> LocalSGD().of(Training(epochs=3)).epochs
        3
        """
        return replace(
            self, epochs=training.epochs or self.epochs, learning_rate=training.learning_rate or self.learning_rate
        )


def train_clients(
    model: nn.Module,
    global_model: State,
    datasets: Sequence[Dataset],
    rngs: Sequence[np.random.Generator],
    settings: LocalSGD,
    *,
    loss: Loss = cross_entropy,
    training: Training = AS_EVERYBODY,
    references: Sequence[Reference] = (),
    workers: int = 1,
    observe: Observer | None = None,
) -> dict[str, np.ndarray]:
    """Trains every client from the same global model and returns their updates.

    Parameters
    ----------
    model : torch.nn.Module
        It is not changed; training and updates have its dtype.
    global_model : Mapping of str to array
        Layer -> array, buffers included.
    datasets : sequence of (x, y) tensors
        The data of each client.
    rngs : sequence of numpy.random.Generator
        One per client: it draws the order of the samples in each epoch, and a child of it the dropout masks.
    settings : LocalSGD
        How they train.
    loss : callable
        (outputs, labels) -> loss of each sample.
    training : Training
        Changes of an attack to the training of these clients; none by default.
    references : sequence of Reference
        One per client: what the hooks of `training` may use.
    workers : int
        Number of threads, which does not change any result.
    observe : callable, optional
        Called in every step with (outputs before the step, labels).

    Returns
    -------
    dict of str to array
        Layer -> updates, [client, *shape].

    Examples
    --------
    >>> import numpy as np, torch
    >>> from simulations.training import state_of
    >>> model = torch.nn.Linear(3, 2)
    >>> data = (torch.ones(4, 3), torch.tensor([0, 1, 0, 1]))
    >>> updates = train_clients(model, state_of(model), [data], [np.random.default_rng(0)], LocalSGD())
    >>> {name: update.shape for name, update in updates.items()}
    {'weight': (1, 2, 3), 'bias': (1, 2)}
    """
    first = prepared(model, datasets[0][0][:2], next(iter(tensors(model).values())).device) if datasets else model
    spaces = [Workspace(first, global_model)]
    spaces += [Workspace(prepared(first, datasets[0][0][:2]), global_model) for _ in range(workers - 1) if datasets]
    return train_on(spaces, datasets, rngs, settings, loss, training, references, observe)


class Workspace:
    """A model that one thread trains, and the global model from which each client starts.

    Parameters
    ----------
    model : torch.nn.Module
        A model as from `prepared`; it is trained in place.
    global_model : Mapping of str to array
        Layer -> array, buffers included.

    Examples
    --------
    >>> import torch
    >>> from simulations.training import state_of
    >>> model = torch.nn.Linear(3, 2)
    >>> float(Workspace(model, state_of(model)).update("bias").abs().max())
    0.0
    """

    def __init__(self, model: nn.Module, global_model: State) -> None:
        self.model = model
        self.layers = tensors(model)
        self.parameters = trained(model)
        self.dropouts = list(dropouts(model).values())
        self.start = {name: torch.empty_like(layer, requires_grad=False) for name, layer in self.layers.items()}
        self.load(global_model)

    def load(self, global_model: State) -> None:
        """Replaces the global model, layer -> array."""
        for name, layer in self.start.items():
            layer.copy_(torch.tensor(global_model[name]))

    def restart(self) -> None:
        """Resets the model to the global model, in training mode."""
        self.model.train()
        with torch.no_grad():
            for name, layer in self.layers.items():
                layer.copy_(self.start[name])

    def update(self, name: str) -> torch.Tensor:
        """Returns the update of one layer, local minus global model, on the CPU."""
        return (self.layers[name].detach() - self.start[name]).cpu()


def train_on(
    spaces: Sequence[Workspace],
    datasets: Sequence[Dataset],
    rngs: Sequence[np.random.Generator],
    settings: LocalSGD,
    loss: Loss,
    training: Training = AS_EVERYBODY,
    references: Sequence[Reference] = (),
    observe: Observer | None = None,
) -> dict[str, np.ndarray]:
    """Trains clients as `train_clients` does, in given workspaces.

    Parameters
    ----------
    spaces : sequence of Workspace
        One per thread.
    datasets, rngs, settings, loss, training, references, observe
        As for `train_clients`.

    Returns
    -------
    dict of str to array
        Layer -> updates [client, *shape].
    """
    layers = spaces[0].layers
    updates = {
        name: np.empty((len(datasets), *layer.shape), torch.empty(0, dtype=layer.dtype).numpy().dtype)
        for name, layer in layers.items()
    }
    idle: SimpleQueue[Workspace] = SimpleQueue()
    for space in spaces:
        idle.put(space)

    def train(client: int) -> None:
        space = idle.get()
        try:
            reference = references[client] if references else NOTHING
            _train(space, datasets[client], rngs[client], settings.of(training), loss, training, reference, observe)
            for name in layers:
                updates[name][client] = space.update(name).numpy()
        finally:
            idle.put(space)

    if len(spaces) == 1:
        for client in range(len(datasets)):
            train(client)
    else:
        with worker_threads(len(spaces)) as threads:
            list(threads.map(train, range(len(datasets))))
    return updates


def torch_reference(
    previous: Tensors, honest: Tensors, final_weight: str | None, final_bias: str | None, like: nn.Module
) -> Reference:
    """Returns what the hooks of an attack's training may use, in a model's dtype and on its device.

    Parameters
    ----------
    previous : dict of str to torch.Tensor
        Layer -> last change of the global model.
    honest : dict of str to torch.Tensor
        Layer -> update that the client would send if it were benign; {} if the training does not need it.
    final_weight, final_bias : str or None
        Names of the final layer's parameters.
    like : torch.nn.Module
        Gives dtype and device.

    Returns
    -------
    Reference
    """
    one = next(like.parameters())

    def cast(tensors: Tensors) -> Tensors:
        return {name: tensor.to(one.device, one.dtype) for name, tensor in tensors.items()}

    return Reference(cast(previous), cast(honest), final_weight, final_bias)


def _train(
    space: Workspace,
    dataset: Dataset,
    rng: np.random.Generator,
    settings: LocalSGD,
    loss: Loss,
    training: Training,
    reference: Reference,
    observe: Observer | None,
) -> None:
    """Trains the workspace's model on one client's data, starting from the global model."""
    space.restart()
    masks, names = Masks(space.dropouts, rng), list(space.parameters)
    parameters = list(space.parameters.values())
    velocities: Sequence[torch.Tensor] = ()
    steps = settings.epochs * -(-len(dataset[1]) // settings.batch_size)
    for number, (x, y) in enumerate(batches(dataset, rng, settings, parameters[0].device), 1):
        for slot, mask in zip(space.dropouts, masks.draw(len(y)), strict=True):
            setattr(slot.layer, slot.name, mask.to(parameters[0]))
        out = _outputs(space.model, x)
        if observe is not None:
            observe(out.detach(), y)
        value = loss(out, y).mean()
        if training.penalty is not None:
            update = {name: parameter - space.start[name] for name, parameter in space.parameters.items()}
            value = training.alpha * value + (1 - training.alpha) * training.penalty(update, reference)
        gradients = torch.autograd.grad(value, parameters, allow_unused=True, materialize_grads=True)
        with torch.no_grad():
            if settings.weight_decay:
                gradients = [g.add(p, alpha=settings.weight_decay) for g, p in zip(gradients, parameters, strict=True)]
            if training.gradient is not None:
                changed = training.gradient(dict(zip(names, gradients, strict=True)), reference)
                gradients = [changed[name] for name in names]
            if velocities:
                gradients = [v.mul_(settings.momentum).add_(g) for v, g in zip(velocities, gradients, strict=True)]
            elif settings.momentum:  # copies: autograd may give one tensor to two parameters
                gradients = [gradient.clone() for gradient in gradients]
            velocities = gradients if settings.momentum else ()
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.add_(gradient, alpha=-settings.learning_rate)
            if training.project is not None and (number % training.every == 0 or number == steps):
                _project(space, training.project, reference)


def _outputs(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    try:
        return model(x)
    except ValueError as error:
        if len(x) > 1:
            raise
        raise InputError(
            "model: its batch norm cannot train on a single sample, which is the last batch of some client; choose a "
            f"batch_size that leaves more ({str(error).splitlines()[0]})"
        ) from None


def _project(space: Workspace, project: Callable[[Tensors, Reference], Tensors], reference: Reference) -> None:
    update = {name: parameter - space.start[name] for name, parameter in space.parameters.items()}
    projected = project(update, reference)
    for name, parameter in space.parameters.items():
        parameter.copy_(space.start[name] + projected[name])


def batches(dataset: Dataset, rng: np.random.Generator, settings: LocalSGD, device: torch.device) -> Iterator[Dataset]:
    """Yields the batches of a client's local training in their order.

    Parameters
    ----------
    dataset : (x, y) tensors
        The client's data.
    rng : numpy.random.Generator
        Draws the order of the samples in each epoch.
    settings : LocalSGD
        Gives the number of epochs and the batch size.
    device : torch.device
        Where the batches are.

    Yields
    ------
    (x, y) tensors
        Images are channels-last in memory.

    Examples
    --------
    >>> import torch
    >>> data = (torch.ones(5, 3), torch.arange(5))
    >>> found = batches(data, np.random.default_rng(0), LocalSGD(batch_size=2), torch.device("cpu"))
    >>> [len(y) for _, y in found]
    [2, 2, 1]
    """
    x, y = (part.to(device) for part in dataset)
    if not len(y):
        return
    images = torch.channels_last if x.dim() == 4 else torch.contiguous_format
    for _ in range(settings.epochs):
        order = torch.from_numpy(rng.permutation(len(y))).to(device)
        shuffled = x[order].contiguous(memory_format=images)  # one copy per epoch, of which batches are views
        yield from zip(shuffled.split(settings.batch_size), y[order].split(settings.batch_size), strict=True)
