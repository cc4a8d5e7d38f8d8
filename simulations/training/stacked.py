"""The stacked engine: many clients at once, their parameters stacked along a first axis.

A step of all clients is `torch.func.vmap` over the gradient of one client, traced, and compiled where that pays. A
client without a batch left, and samples that a smaller last batch lacks, have weight 0: everybody gets the steps
that the plain engine would make, up to the order of sums. A compiled model with convolutions is stacked one client
high, on several threads: its patches then stay in a core's cache.
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

WIDTH = 2**24  # parameters in one stack at most; more clients train in several
BLOCK = 2**22  # numbers of samples gathered at once
Stack = dict[str, torch.Tensor]  # layer -> [client, *shape]
Step = Callable[[Stack, Stack, Stack, "Batch"], tuple[Stack, Stack, Stack]]  # parameters, velocities, buffers


class StackedEngine:
    """Trains clients as `train_clients` does, many at once; raises InputError where it cannot do so exactly.

    compile: whether a step is compiled; where that fails it is not, with a warning. largest: number of clients at
    most; smaller stacks are filled up to it, so that one shape is traced. key: names task and model, for runs of
    one process to share what is compiled. workers: threads that train stacks side by side, to the same bits.
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
        if found := unstackable(model):
            raise InputError(f"engine stacked: {found}; the engine plain can")
        self.model, self.loss, self.settings, self.workers = prepared(model, x[:2], device), loss, settings, workers
        self.model = self.model.to(memory_format=torch.contiguous_format).train()  # type: ignore[call-overload]
        self.dropouts = dropouts(self.model)
        self.names = list(trained(self.model))
        self.one = next(self.model.parameters())
        self.key = (model if key is None else key, loss, settings, str(self.one.dtype), device)
        self.compile = compile
        self.width = max(1, WIDTH // sum(each.numel() for each in self.model.parameters()))
        self.height = largest
        if compile and has_convolutions(model):
            self.width = 1
        self._try(x[:2])
        # what is compiled has its convolutions as products of patches, which torch cannot map over clients
        self.alone = with_patches(copy.deepcopy(self.model)) if self.width == 1 and compile else self.model

    def _try(self, x: torch.Tensor) -> None:
        """Raises InputError where torch cannot map the model or its loss over clients."""
        state = {name: each.detach()[None] for name, each in tensors(self.model).items()}
        parameters, y = {name: state.pop(name) for name in self.names}, torch.zeros((1, len(x)), dtype=torch.int64)
        masks = {name: torch.ones((1, len(x), *each.shape)).to(self.one) for name, each in self.dropouts.items()}
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
        """The clients' updates, layer -> [client, *shape]."""
        start = {name: torch.tensor(global_model[name], device=self.one.device) for name in tensors(self.model)}
        if not datasets:
            return {name: np.zeros((0, *each.shape), each.cpu().numpy().dtype) for name, each in start.items()}

        def train(first: int) -> Stack:
            part = slice(first, first + self.width)
            return self._train(start, datasets[part], rngs[part], training, references[part])

        firsts = range(0, len(datasets), self.width)
        if self.workers == 1 or len(firsts) == 1 or not self._is_traced(training):
            parts = [train(first) for first in firsts]  # what is not traced puts numbers into the one model
        else:
            parts = [train(0)]  # traces and compiles
            with worker_threads(self.workers) as threads:
                parts += threads.map(train, firsts[1:])
        if len(parts) == 1:
            return {name: each.cpu().numpy() for name, each in parts[0].items()}
        return {name: torch.cat([part[name] for part in parts]).cpu().numpy() for name in start}

    def _is_traced(self, training: Training) -> bool:
        """Whether clients train as everybody does, and all that the model has is trained."""
        return training is AS_EVERYBODY and len(self.names) == len(tensors(self.model))

    def _train(
        self,
        start: Stack,
        datasets: Sequence[Dataset],
        rngs: Sequence[np.random.Generator],
        training: Training,
        references: Sequence[Reference],
    ) -> Stack:
        """What one stack of clients learns."""
        settings = self.settings.of(training)
        as_one = self._is_traced(training)
        idle = max(0, min(self.width, self.height) - len(datasets)) if as_one else 0
        size = settings.batch_size if as_one else min(settings.batch_size, max(len(y) for _, y in datasets))
        plan = Plan(datasets, rngs, settings, self.dropouts, self.one, max(1, size), idle)
        if plan.is_ragged and has_batch_norm(self.model):
            raise InputError(
                f"engine stacked: batch norm would see the padding of smaller batches; expected shares that "
                f"{settings.batch_size} divides, or the engine plain"
            )
        x, y = (torch.cat(part).to(self.one.device) for part in zip(*datasets, strict=True))
        if as_one:
            return {name: each[: len(datasets)] for name, each in self._as_one(start, plan, x, y).items()}
        stacked = {name: each.expand(len(datasets), *each.shape).clone() for name, each in start.items()}
        parameters = {name: stacked.pop(name) for name in self.names}
        velocities = {name: torch.zeros_like(each) for name, each in parameters.items()} if settings.momentum else {}
        step = self._adapted(settings, training, start, references)
        for batch in plan.batches(x, y, training):
            parameters, velocities, stacked = step(parameters, velocities, stacked, batch)
        return {name: (parameters | stacked)[name].detach() - start[name] for name in start}

    def _adapted(self, settings: LocalSGD, training: Training, start: Stack, references: Sequence[Reference]) -> Step:
        """One step of a stack of clients, with what an attacker changes about it."""

        def objective(parameters: Tensors, others: Tensors, batch: "Batch", reference: Reference) -> torch.Tensor:
            x, y, weights = batch[:3]
            value = (self.loss(functional_call(self.model, {**parameters, **others}, (x,)), y) * weights).sum()
            if training.penalty is None:
                return value
            so_far = {name: each - start[name] for name, each in parameters.items()}
            return training.alpha * value + (1 - training.alpha) * training.penalty(so_far, reference)

        def of_one(
            parameters: Stack, velocities: Stack, state: Stack, batch: "Batch", honest: Stack
        ) -> tuple[Stack, Stack, Stack]:
            _, _, _, active, projects, masks = batch
            reference = Reference(first.previous, honest, first.final_weight, first.final_bias)
            after_buffers = {name: each.clone() for name, each in state.items()}
            gradients = grad(objective)(parameters, {**after_buffers, **masks}, batch, reference)
            if settings.weight_decay:
                gradients = {name: g + settings.weight_decay * parameters[name] for name, g in gradients.items()}
            if training.gradient is not None:
                gradients = training.gradient(gradients, reference)
            if settings.momentum:
                gradients = {name: settings.momentum * velocities[name] + g for name, g in gradients.items()}
            after = {name: each - settings.learning_rate * gradients[name] for name, each in parameters.items()}
            if training.project is not None:
                so_far = training.project({name: each - start[name] for name, each in after.items()}, reference)
                after = {name: torch.where(projects, start[name] + so_far[name], each) for name, each in after.items()}
            kept = {name: torch.where(active, each, parameters[name]) for name, each in after.items()}
            buffered = {name: torch.where(active, each, state[name]) for name, each in after_buffers.items()}
            return kept, dict(gradients) if velocities else {}, buffered

        first = references[0] if references else NOTHING
        honest = {name: torch.stack([each.honest[name] for each in references]) for name in first.honest}
        many = vmap(of_one, randomness="error")
        return lambda parameters, velocities, state, batch: many(parameters, velocities, state, batch, honest)

    def _as_one(self, start: Stack, plan: "Plan", x: torch.Tensor, y: torch.Tensor) -> Stack:
        """What clients learn that train as everybody does; all parameters of one are a single row of numbers."""
        sizes = [start[name].numel() for name in self.names]
        first = torch.cat([start[name].flatten() for name in self.names])
        parameters = first.expand(len(plan.each), -1).clone()
        velocities = torch.zeros_like(parameters) if self.settings.momentum else parameters[:, :0].clone()
        run = None
        for *seen, _, masks in plan.batches(x, y, AS_EVERYBODY):
            given = (parameters, velocities, *seen, *masks.values())
            if run is None:
                shapes = tuple((tuple(each.shape), str(each.dtype)) for each in given)
                example, key = [torch.ones_like(each) for each in given], (self.key, shapes)
                run = traced(self._flat_step(start), example, key, compile=self.compile)
            parameters, velocities = run(*given)
        moved = (parameters - first).split(sizes, dim=1)
        return {name: each.reshape(-1, *start[name].shape) for name, each in zip(self.names, moved, strict=True)}

    def _flat_step(self, start: Stack) -> Callable[..., tuple[torch.Tensor, ...]]:
        """A step of a stack, from tensors to tensors: parameters and velocities, both [client, number]."""
        settings, names, masked = self.settings, self.names, list(self.dropouts)
        shapes = [start[name].shape for name in names]
        sizes = [shape.numel() for shape in shapes]

        def of_one(parameters: torch.Tensor, velocities: torch.Tensor, *rest: torch.Tensor) -> tuple[torch.Tensor, ...]:
            x, y, weights, active, *masks = rest

            def objective(layers: Sequence[torch.Tensor]) -> torch.Tensor:
                state = dict(zip([*names, *masked], [*layers, *masks], strict=True))
                return (self.loss(functional_call(self.alone, state, (x,)), y) * weights).sum()

            layers = [each.view(shape) for each, shape in zip(parameters.split(sizes), shapes, strict=True)]
            if self.width == 1:
                leaves = [each.detach().requires_grad_() for each in layers]
                gradients = torch.autograd.grad(objective(leaves), leaves, allow_unused=True, materialize_grads=True)
            else:
                gradients = grad(objective)(layers)
            change = torch.cat([each.reshape(-1) for each in gradients])
            if settings.weight_decay:
                change = change + settings.weight_decay * parameters
            if settings.momentum:
                change = settings.momentum * velocities + change
            after = parameters - settings.learning_rate * change
            return torch.where(active, after, parameters), change if settings.momentum else velocities.clone()

        if self.width > 1:
            return vmap(of_one)
        return lambda *each: tuple(out[None] for out in of_one(*(tensor[0] for tensor in each)))


Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, Stack]
# x [client, sample, ...], labels, weights [client, sample], who has a batch, whose update is projected, masks


class Plan:
    """Which samples each client of a stack sees in each step, and with which weight."""

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
        self.each = -(-sizes // self.size) * settings.epochs  # steps of each client
        self.steps = int(self.each.max())
        self.is_ragged = bool((sizes % self.size).any())
        self.layers, self.masks, self.like = layers, [Masks(list(layers.values()), rng) for rng in rngs], like
        chosen = np.zeros((self.steps, len(sizes), self.size), np.int64)
        self.counts = np.full((self.steps, len(sizes)), self.size)
        for client, (rng, first, count) in enumerate(zip(rngs, np.cumsum(sizes) - sizes, sizes, strict=False)):
            padded = -(-count // self.size) * self.size
            orders = np.full((settings.epochs, padded), first)  # what is padded shows the client's first sample
            for order in orders:
                order[:count] += rng.permutation(count)
            mine = orders.reshape(-1, self.size)
            chosen[: len(mine), client] = mine
            if count:  # else its places show sample 0, with which nothing happens
                chosen[len(mine) :, client] = first
                self.counts[padded // self.size - 1 : len(mine) : padded // self.size, client] -= padded - count
        self.chosen = torch.from_numpy(chosen).to(like.device)
        if self.is_ragged or self.each.min() < self.steps:
            weights = (np.arange(self.size) < self.counts[:, :, None]) / self.counts[:, :, None]
            active = np.arange(self.steps)[:, None] < self.each
            self.weights = torch.from_numpy(weights).to(like)
            self.active = torch.from_numpy(active).to(like.device)
        else:
            self.weights = like.new_full((1, len(sizes), self.size), 1 / self.size).expand(self.steps, -1, -1)
            self.active = torch.ones((1, len(sizes)), dtype=torch.bool, device=like.device).expand(self.steps, -1)

    def batches(self, x: torch.Tensor, y: torch.Tensor, training: Training) -> "Iterator[Batch]":
        """What all clients see in each step; gathered for many steps at once, as one large copy is the faster."""
        block = max(1, BLOCK // (len(self.each) * self.size * max(1, x[0].numel())))
        for first in range(0, self.steps, block):
            chosen = self.chosen[first : first + block]
            shape, places = chosen.shape, chosen.flatten()
            xs, ys = (data.index_select(0, places).view(*shape, *data.shape[1:]) for data in (x, y))
            for number in range(first, first + len(chosen)):
                now = (xs[number - first], ys[number - first], self.weights[number], self.active[number])
                yield *now, self._projects(number, training), self._masks(number)

    def _projects(self, number: int, training: Training) -> torch.Tensor:
        if training.project is None:
            return self.active[number]
        due = ((number + 1) % training.every == 0) | (number + 1 == self.each)
        return torch.from_numpy(due).to(self.like.device)

    def _masks(self, number: int) -> Stack:
        if not self.layers:
            return {}
        drawn = [[torch.ones((self.size, *layer.shape)) for _ in self.each] for layer in self.layers.values()]
        for client in np.flatnonzero(number < self.each):
            for layer, mask in enumerate(self.masks[client].draw(int(self.counts[number, client]))):
                drawn[layer][client][: len(mask)] = mask
        return {name: torch.stack(each).to(self.like) for name, each in zip(self.layers, drawn, strict=True)}


def unstackable(model: nn.Module) -> str:
    """Why a model cannot be stacked, empty where it can."""
    if any(isinstance(module, nn.RNNBase) for module in model.modules()):
        return "torch cannot map recurrent layers over clients"
    return ""


def has_convolutions(model: nn.Module) -> bool:
    """Whether any of its modules is a convolution."""
    return any(isinstance(module, nn.modules.conv._ConvNd) for module in model.modules())


def has_batch_norm(model: nn.Module) -> bool:
    """Whether any of its modules is a batch norm."""
    return any(isinstance(module, nn.modules.batchnorm._NormBase) for module in model.modules())
