"""The stacked engine: trains many clients at once, with their parameters stacked along a first axis.

A step of all clients is `torch.func.vmap` over the gradient of one client, traced, and compiled if that pays off.
Clients without batches left, and padding that fills up smaller batches, have weight 0, so that every client makes the
same steps as in the plain engine, up to the order of sums. A compiled model with convolutions trains one client per
stack, on several threads, so that its patches fit into a core's cache.
"""

import copy
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import nn
from torch.func import functional_call, grad, vmap

from gradlens.errors import InputError
from simulations.attacks import Reference, Tensors, Training
from simulations.tasks import Loss
from simulations.training.compiled import traced
from simulations.training.convolution import with_patches
from simulations.training.networks import Masks, Slot, State, dropouts, prepared, tensors, trained, worker_threads
from simulations.training.plain import AS_EVERYBODY, NOTHING, Dataset, LocalSGD

STACK_SIZE = 2**24  # most parameters in one stack; further clients train in further stacks
BLOCK_SIZE = 2**22  # most numbers in the samples that are gathered at once
Stack = dict[str, torch.Tensor]  # layer -> [client, *shape]
Step = Callable[[Stack, Stack, Stack, "Batch"], tuple[Stack, Stack, Stack]]  # parameters, velocities, buffers


class StackedEngine:
    """Trains many clients at once, to the same updates as `train_clients` up to rounding.

    Parameters
    ----------
    model : torch.nn.Module
        It is not changed.
    loss : callable
        (outputs, labels) -> loss of each sample.
    settings : LocalSGD
        How clients train.
    x : torch.Tensor
        A few samples, on which the model is tried.
    device : str
        Where it trains.
    compile : bool
        Whether a step is compiled; if that fails it is only traced, with a warning.
    largest : int
        Largest number of clients in a round; smaller stacks are padded to it, so that only one shape is traced.
    key : object, optional
        Identifies task and model, so that runs in one process share compiled steps.
    workers : int
        Threads that train stacks side by side; the number does not change any result.

    Raises
    ------
    InputError
        If torch cannot map the model over clients.

    Examples
    --------
    >>> import numpy as np, torch
    >>> from simulations.tasks import cross_entropy
    >>> from simulations.training import state_of
    >>> model = torch.nn.Linear(3, 2)
    >>> engine = StackedEngine(model, cross_entropy, LocalSGD(), torch.ones(2, 3))
    >>> data = [(torch.ones(4, 3), torch.tensor([0, 1, 0, 1]))] * 5
    >>> engine(state_of(model), data, [np.random.default_rng(client) for client in range(5)])["bias"].shape
    (5, 2)
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        settings: LocalSGD,
        x: torch.Tensor,
        *,
        device: str = "cpu",
        compile: bool = False,
        largest: int = 1,
        key: object = None,
        workers: int = 1,
    ) -> None:
        if reason := unstackable(model):
            raise InputError(f"engine stacked: {reason}; the engine plain can")
        self.model, self.loss, self.settings, self.workers = prepared(model, x[:2], device), loss, settings, workers
        self.model = self.model.to(memory_format=torch.contiguous_format).train()  # type: ignore[call-overload]
        self.dropouts = dropouts(self.model)
        self.names = list(trained(self.model))
        self.one = next(self.model.parameters())
        self.key = (model if key is None else key, loss, settings, str(self.one.dtype), device)
        self.compile = compile
        self.width = max(1, STACK_SIZE // sum(parameter.numel() for parameter in self.model.parameters()))
        self.height = largest
        if compile and has_convolutions(model):
            self.width = 1
        self._try(x[:2])
        # a compiled model computes convolutions as products of patches, which torch cannot map over clients
        self.alone = with_patches(copy.deepcopy(self.model)) if self.width == 1 and compile else self.model

    def _try(self, x: torch.Tensor) -> None:
        """Raises InputError if torch cannot map the model or its loss over clients."""
        state = {name: tensor.detach()[None] for name, tensor in tensors(self.model).items()}
        parameters, y = {name: state.pop(name) for name in self.names}, torch.zeros((1, len(x)), dtype=torch.int64)
        masks = {name: torch.ones((1, len(x), *slot.shape)).to(self.one) for name, slot in self.dropouts.items()}
        weights, yes = torch.ones((1, len(x))).to(self.one), torch.ones(1, dtype=torch.bool, device=self.one.device)
        batch = (x[None].to(self.one.device), y.to(self.one.device), weights, yes, yes, masks)
        try:
            self._adapted(LocalSGD(), AS_EVERYBODY, {}, ())(parameters, {}, state, batch)
        except (RuntimeError, ValueError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise InputError(f"engine stacked: torch cannot map this model over clients; plain can: {reason}") from None

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

        Raises
        ------
        InputError
            If the model has batch norm and batches differ in size.
        """
        start = {name: torch.tensor(global_model[name], device=self.one.device) for name in tensors(self.model)}
        if not datasets:
            return {name: np.zeros((0, *layer.shape), layer.cpu().numpy().dtype) for name, layer in start.items()}

        def train(first: int) -> Stack:
            part = slice(first, first + self.width)
            return self._train(start, datasets[part], rngs[part], training, references[part])

        firsts = range(0, len(datasets), self.width)
        if self.workers == 1 or len(firsts) == 1 or not self._is_traced(training):
            parts = [train(first) for first in firsts]  # untraced steps write into the one model
        else:
            parts = [train(0)]  # traces and compiles
            with worker_threads(self.workers) as threads:
                parts += threads.map(train, firsts[1:])
        if len(parts) == 1:
            return {name: update.cpu().numpy() for name, update in parts[0].items()}
        return {name: torch.cat([part[name] for part in parts]).cpu().numpy() for name in start}

    def _is_traced(self, training: Training) -> bool:
        """Whether steps are traced: clients train without an attack, and the model has no buffers."""
        return training is AS_EVERYBODY and len(self.names) == len(tensors(self.model))

    def _train(
        self,
        start: Stack,
        datasets: Sequence[Dataset],
        rngs: Sequence[np.random.Generator],
        training: Training,
        references: Sequence[Reference],
    ) -> Stack:
        """The updates of one stack of clients."""
        settings = self.settings.of(training)
        as_one = self._is_traced(training)
        idle = max(0, min(self.width, self.height) - len(datasets)) if as_one else 0
        size = settings.batch_size if as_one else min(settings.batch_size, max(len(y) for _, y in datasets))
        plan = Plan(datasets, rngs, settings, self.dropouts, self.one, max(1, size), idle)
        if plan.is_ragged and has_batch_norm(self.model):
            raise InputError(
                f"engine stacked: batch norm would see the padding of smaller batches; expected numbers of samples "
                f"that {settings.batch_size} divides, or the engine plain"
            )
        x, y = (torch.cat(part).to(self.one.device) for part in zip(*datasets, strict=True))
        if as_one:
            return {name: update[: len(datasets)] for name, update in self._as_one(start, plan, x, y).items()}
        stacked = {name: layer.expand(len(datasets), *layer.shape).clone() for name, layer in start.items()}
        parameters = {name: stacked.pop(name) for name in self.names}
        velocities = {name: torch.zeros_like(layer) for name, layer in parameters.items()} if settings.momentum else {}
        step = self._adapted(settings, training, start, references)
        for batch in plan.batches(x, y, training):
            parameters, velocities, stacked = step(parameters, velocities, stacked, batch)
        return {name: (parameters | stacked)[name].detach() - start[name] for name in start}

    def _adapted(self, settings: LocalSGD, training: Training, start: Stack, references: Sequence[Reference]) -> Step:
        """Builds a step of a stack of clients, with the changes that an attack makes to it."""

        def objective(parameters: Tensors, others: Tensors, batch: "Batch", reference: Reference) -> torch.Tensor:
            x, y, weights = batch[:3]
            value = (self.loss(functional_call(self.model, {**parameters, **others}, (x,)), y) * weights).sum()
            if training.penalty is None:
                return value
            update = {name: layer - start[name] for name, layer in parameters.items()}
            return training.alpha * value + (1 - training.alpha) * training.penalty(update, reference)

        def of_one(
            parameters: Stack, velocities: Stack, state: Stack, batch: "Batch", honest: Stack
        ) -> tuple[Stack, Stack, Stack]:
            _, _, _, active, projects, masks = batch
            reference = Reference(first.previous, honest, first.final_weight, first.final_bias)
            after_buffers = {name: layer.clone() for name, layer in state.items()}
            gradients = grad(objective)(parameters, {**after_buffers, **masks}, batch, reference)
            if settings.weight_decay:
                gradients = {name: g + settings.weight_decay * parameters[name] for name, g in gradients.items()}
            if training.gradient is not None:
                gradients = training.gradient(gradients, reference)
            if settings.momentum:
                gradients = {name: settings.momentum * velocities[name] + g for name, g in gradients.items()}
            after = {name: layer - settings.learning_rate * gradients[name] for name, layer in parameters.items()}
            if training.project is not None:
                projected = training.project({name: layer - start[name] for name, layer in after.items()}, reference)
                after = {name: torch.where(projects, start[name] + projected[name], after[name]) for name in after}
            kept = {name: torch.where(active, layer, parameters[name]) for name, layer in after.items()}
            buffered = {name: torch.where(active, layer, state[name]) for name, layer in after_buffers.items()}
            return kept, dict(gradients) if velocities else {}, buffered

        first = references[0] if references else NOTHING
        honest = {name: torch.stack([reference.honest[name] for reference in references]) for name in first.honest}
        many = vmap(of_one, randomness="error")
        return lambda parameters, velocities, state, batch: many(parameters, velocities, state, batch, honest)

    def _as_one(self, start: Stack, plan: "Plan", x: torch.Tensor, y: torch.Tensor) -> Stack:
        """The updates of clients that train without an attack; a client's parameters are one flat row of numbers."""
        sizes = [start[name].numel() for name in self.names]
        first = torch.cat([start[name].flatten() for name in self.names])
        parameters = first.expand(len(plan.steps_of), -1).clone()
        velocities = torch.zeros_like(parameters) if self.settings.momentum else parameters[:, :0].clone()
        run = None
        for *seen, _, masks in plan.batches(x, y, AS_EVERYBODY):
            arguments = (parameters, velocities, *seen, *masks.values())
            if run is None:
                shapes = tuple((tuple(tensor.shape), str(tensor.dtype)) for tensor in arguments)
                example, key = [torch.ones_like(tensor) for tensor in arguments], (self.key, shapes)
                run = traced(self._flat_step(start), example, key, compile=self.compile)
            parameters, velocities = run(*arguments)
        updates = (parameters - first).split(sizes, dim=1)
        return {name: update.reshape(-1, *start[name].shape) for name, update in zip(self.names, updates, strict=True)}

    def _flat_step(self, start: Stack) -> Callable[..., tuple[torch.Tensor, ...]]:
        """Builds a step from tensors to tensors that returns parameters and velocities, both [client, number]."""
        settings, names, masked = self.settings, self.names, list(self.dropouts)
        shapes = [start[name].shape for name in names]
        sizes = [shape.numel() for shape in shapes]

        def of_one(parameters: torch.Tensor, velocities: torch.Tensor, *rest: torch.Tensor) -> tuple[torch.Tensor, ...]:
            x, y, weights, active, *masks = rest

            def objective(layers: Sequence[torch.Tensor]) -> torch.Tensor:
                state = dict(zip([*names, *masked], [*layers, *masks], strict=True))
                return (self.loss(functional_call(self.alone, state, (x,)), y) * weights).sum()

            layers = [row.view(shape) for row, shape in zip(parameters.split(sizes), shapes, strict=True)]
            if self.width == 1:
                leaves = [layer.detach().requires_grad_() for layer in layers]
                gradients = torch.autograd.grad(objective(leaves), leaves, allow_unused=True, materialize_grads=True)
            else:
                gradients = grad(objective)(layers)
            change = torch.cat([gradient.reshape(-1) for gradient in gradients])
            if settings.weight_decay:
                change = change + settings.weight_decay * parameters
            if settings.momentum:
                change = settings.momentum * velocities + change
            after = parameters - settings.learning_rate * change
            return torch.where(active, after, parameters), change if settings.momentum else velocities.clone()

        if self.width > 1:
            return vmap(of_one)
        return lambda *stacks: tuple(out[None] for out in of_one(*(stack[0] for stack in stacks)))


Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, Stack]
# x [client, sample, ...], labels, weights [client, sample], who has a batch, whose update is projected, masks


class Plan:
    """The samples that each client of a stack sees in each step, and their weights.

    Parameters
    ----------
    datasets : sequence of (x, y) tensors
        The data of each client of the stack.
    rngs : sequence of numpy.random.Generator
        One per client: it draws orders and masks as for `train_clients`.
    settings : LocalSGD
        How they train.
    layers : dict of str to Slot
        The dropout masks of the model.
    like : torch.Tensor
        Gives device and dtype of the weights.
    size : int
        Samples per step.
    idle : int
        Number of places at the end of the stack without a client.

    Examples
    --------
    >>> import numpy as np, torch
    >>> data = [(torch.ones(n, 3), torch.zeros(n, dtype=torch.int64)) for n in (4, 6)]
    >>> plan = Plan(data, [np.random.default_rng(k) for k in (0, 1)], LocalSGD(), {}, torch.ones(1), size=4)
    >>> plan.steps, plan.steps_of.tolist(), plan.is_ragged
    (2, [1, 2], True)
    """

    def __init__(
        self,
        datasets: Sequence[Dataset],
        rngs: Sequence[np.random.Generator],
        settings: LocalSGD,
        layers: dict[str, Slot],
        like: torch.Tensor,
        size: int,
        idle: int = 0,
    ) -> None:
        sizes = np.array([len(y) for _, y in datasets] + [0] * idle)
        self.size = size
        self.steps_of = -(-sizes // self.size) * settings.epochs  # steps of each client
        self.steps = int(self.steps_of.max())
        self.is_ragged = bool((sizes % self.size).any())
        self.layers, self.masks, self.like = layers, [Masks(list(layers.values()), rng) for rng in rngs], like
        chosen = np.zeros((self.steps, len(sizes), self.size), np.int64)
        self.counts = np.full((self.steps, len(sizes)), self.size)
        for client, (rng, first, count) in enumerate(zip(rngs, np.cumsum(sizes) - sizes, sizes, strict=False)):
            padded = -(-count // self.size) * self.size
            orders = np.full((settings.epochs, padded), first)  # padding repeats the client's first sample
            for order in orders:
                order[:count] += rng.permutation(count)
            steps = orders.reshape(-1, self.size)
            chosen[: len(steps), client] = steps
            if count:  # a client without samples is given sample 0 in all steps, at weight 0
                chosen[len(steps) :, client] = first
                self.counts[padded // self.size - 1 : len(steps) : padded // self.size, client] -= padded - count
        self.chosen = torch.from_numpy(chosen).to(like.device)
        if self.is_ragged or self.steps_of.min() < self.steps:
            weights = (np.arange(self.size) < self.counts[:, :, None]) / self.counts[:, :, None]
            active = np.arange(self.steps)[:, None] < self.steps_of
            self.weights = torch.from_numpy(weights).to(like)
            self.active = torch.from_numpy(active).to(like.device)
        else:
            self.weights = like.new_full((1, len(sizes), self.size), 1 / self.size).expand(self.steps, -1, -1)
            self.active = torch.ones((1, len(sizes)), dtype=torch.bool, device=like.device).expand(self.steps, -1)

    def batches(self, x: torch.Tensor, y: torch.Tensor, training: Training) -> "Iterator[Batch]":
        """Yields what all clients see in each step.

        Samples are gathered for many steps at once, because one large copy is faster than many small ones.

        Parameters
        ----------
        x, y : torch.Tensor
            The data of all clients, one client after another.
        training : Training
            Its `every` decides in which steps updates are projected.

        Yields
        ------
        tuple of torch.Tensor
            x [client, sample, ...], labels and weights [client, sample], bool [client] who has a batch, bool [client]
            whose update is projected, and the dropout masks.
        """
        block = max(1, BLOCK_SIZE // (len(self.steps_of) * self.size * max(1, x[0].numel())))
        for first in range(0, self.steps, block):
            chosen = self.chosen[first : first + block]
            shape, places = chosen.shape, chosen.flatten()
            xs, ys = (data.index_select(0, places).view(*shape, *data.shape[1:]) for data in (x, y))
            for number in range(first, first + len(chosen)):
                batch = (xs[number - first], ys[number - first], self.weights[number], self.active[number])
                yield *batch, self._projects(number, training), self._masks(number)

    def _projects(self, number: int, training: Training) -> torch.Tensor:
        if training.project is None:
            return self.active[number]
        due = ((number + 1) % training.every == 0) | (number + 1 == self.steps_of)
        return torch.from_numpy(due).to(self.like.device)

    def _masks(self, number: int) -> Stack:
        if not self.layers:
            return {}
        drawn = [[torch.ones((self.size, *layer.shape)) for _ in self.steps_of] for layer in self.layers.values()]
        for client in np.flatnonzero(number < self.steps_of):
            for layer, mask in enumerate(self.masks[client].draw(int(self.counts[number, client]))):
                drawn[layer][client][: len(mask)] = mask
        return {name: torch.stack(masks).to(self.like) for name, masks in zip(self.layers, drawn, strict=True)}


def unstackable(model: nn.Module) -> str:
    """Returns why a model cannot be stacked, "" if it can.

    Examples
    --------
    >>> unstackable(torch.nn.GRU(3, 2))
    'torch cannot map recurrent layers over clients'
    """
    if any(isinstance(module, nn.RNNBase) for module in model.modules()):
        return "torch cannot map recurrent layers over clients"
    return ""


def has_convolutions(model: nn.Module) -> bool:
    """Returns whether a model has convolutions."""
    return any(isinstance(module, nn.modules.conv._ConvNd) for module in model.modules())


def has_batch_norm(model: nn.Module) -> bool:
    """Returns whether a model has batch normalization."""
    return any(isinstance(module, nn.modules.batchnorm._NormBase) for module in model.modules())
