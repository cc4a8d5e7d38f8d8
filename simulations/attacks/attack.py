"""What an attack is: what malicious clients train on, how they train, and what they send; and how parts compose.

An attack is a value that by default does nothing. Its parts see no more than a malicious client could: the task's
own data, the global model, and, where a method assumes it, what the other clients of the round send.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import reduce
from typing import TYPE_CHECKING

import numpy as np

from gradlens.errors import InputError
from gradlens.log import ModelSpec

if TYPE_CHECKING:
    import torch

    from simulations.partition import Split
    from simulations.tasks import Task

Updates = Mapping[str, np.ndarray]  # layer -> [client, *shape]
Update = Mapping[str, np.ndarray]  # layer -> [*shape], of one client
Tensors = Mapping[str, "torch.Tensor"]  # parameters of one client, layer -> [*shape]


@dataclass(frozen=True, eq=False)
class Situation:
    """What an attacker knows when its update is sent.

    index: the round; global_model: before the round; previous: last change of the global model, None in the first
    round; num_updates: how many updates enter this round's mean; honest: what the clients that attack in this round
    would have sent honestly, rows as in what they trained; success: one client's update -> attack success on the
    attackers' own training data.
    """

    index: int
    global_model: Mapping[str, np.ndarray]
    previous: Mapping[str, np.ndarray] | None
    num_updates: int
    server_learning_rate: float
    model: ModelSpec
    honest: Callable[[], Updates]
    success: Callable[[Update], float]
    rng: np.random.Generator


@dataclass(frozen=True, eq=False)
class Reference:
    """What a training hook may look at, as torch tensors of one client.

    previous: last change of the global model, zeros in the first round; honest: this client's own honest update,
    empty unless `Training.needs_honest`.
    """

    previous: Tensors
    honest: Tensors
    final_weight: str | None
    final_bias: str | None


@dataclass(frozen=True)
class Training:
    """How a poisoned client trains differently; every field by default changes nothing.

    The update so far is local - global, layer -> [*shape], parameters only; hooks must be pure functions of tensors
    of one client, so that an engine may map them over many.
    penalty: differentiable, of the update so far; the loss is alpha x task loss + (1 - alpha) x penalty.
    gradient: changes the gradient of each step, of the whole loss and before momentum. project: changes the update so
    far, after every `every` steps and after the last. learning_rate, epochs: the attacker's own, None for the
    scenario's.
    """

    penalty: "Callable[[Tensors, Reference], torch.Tensor] | None" = None
    alpha: float = 1.0
    gradient: Callable[[Tensors, Reference], Tensors] | None = None
    project: Callable[[Tensors, Reference], Tensors] | None = None
    every: int = 1
    learning_rate: float | None = None
    epochs: int | None = None
    needs_honest: bool = False


@dataclass(frozen=True, eq=False)
class Pool:
    """Samples that the attackers bring, with the labels wanted for them.

    x, labels: what they train on, shared by all of them; noise: standard deviation of Gaussian noise on each copy
    (then clipped to [0, 1]); held_out, held_out_labels: what success is measured on; given_up: positions in x_train
    that honest clients no longer hold.
    """

    x: np.ndarray
    labels: np.ndarray
    held_out: np.ndarray
    held_out_labels: np.ndarray
    given_up: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    noise: float = 0.0


def every_sample(task: "Task", x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """All samples are eligible."""
    return np.ones(len(y), dtype=bool)


def unchanged(task: "Task", x: np.ndarray, part: int | None) -> np.ndarray:
    """No trigger: a copy."""
    return x.copy()


@dataclass(frozen=True)
class Attack:
    """What malicious clients train on, how, and what they send; every field by default changes nothing.

    relabel: (task, labels int64 [sample]) -> the labels wanted instead, None where the data stay as they are.
    target_label: the wanted label where it is one for all samples, so that parts can be compared.
    eligible: (task, x, labels) -> bool [sample], the samples that can be poisoned (never those that have the wanted
    label already).
    stamp: (task, x, part) -> x with the trigger in it, as a new array; part is the number of the malicious client,
    None the whole trigger. parts: into how many parts the trigger is split.
    pool: (task, split, generator) -> samples that the attackers bring, None where they poison their own.
    train: how they train, None as everybody.
    send: (what the clients that attack in this round trained, what the others send, situation) -> what is sent, None
    where the update is sent as it was trained.
    """

    relabel: Callable[["Task", np.ndarray], np.ndarray] | None = None
    target_label: int | None = None
    eligible: Callable[["Task", np.ndarray, np.ndarray], np.ndarray] = every_sample
    stamp: Callable[["Task", np.ndarray, int | None], np.ndarray] = unchanged
    parts: int = 1
    pool: Callable[["Task", "Split", np.random.Generator], Pool] | None = None
    train: Training | None = None
    send: Callable[[Updates, Updates, Situation], Updates] | None = None

    @property
    def poisons(self) -> bool:
        """Whether data are poisoned."""
        return self.relabel is not None or self.pool is not None

    def poison(
        self,
        x: np.ndarray,
        y: np.ndarray,
        rate: float,
        rng: np.random.Generator,
        *,
        task: "Task",
        part: int = 0,
        pool: Pool | None = None,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """One malicious client's data, poisoned.

        Without a pool a share `rate` of the eligible samples is stamped and relabelled; with one a share `rate` of
        all samples is replaced by samples of the pool, each as often as the next, and their wanted labels. The
        count is rounded to the nearest whole; the samples of a smaller rate are among those of a larger.
        part: the number of the malicious client; pool: what `self.pool` gave.
        Returns: new x, new labels, and the positions of the poisoned samples, sorted.
        """
        x, y = x.copy(), y.copy()
        if self.pool is not None:
            return self._replaced(x, y, rate, rng, pool)
        if self.relabel is None:
            return x, y, np.zeros(0, np.int64)
        chosen = np.sort(_share(rng.permutation(np.flatnonzero(self.eligible(task, x, y))), rate))
        x[chosen] = self.stamp(task, x[chosen], part)
        y[chosen] = self.relabel(task, y[chosen])
        return x, y, chosen

    def goal(self, task: "Task", pool: Pool | None = None) -> tuple[np.ndarray, np.ndarray]:
        """What success is measured on: held-out attacked samples and the label that each should get.

        Those are the eligible test samples, with the whole trigger, or the held-out samples of the pool; none where
        no data are poisoned. Raises InputError where the attack does not fit the task.
        """
        if self.pool is not None:
            pool = _given(pool)
            return pool.held_out, pool.held_out_labels
        if self.relabel is None:
            return task.x_test[:0].copy(), task.y_test[:0].copy()
        eligible = self.eligible(task, task.x_test, task.y_test)
        if not eligible.any():
            raise InputError(f"attack: no test sample of task {task.name} is eligible; does it have the source class?")
        return self.stamp(task, task.x_test[eligible], None), self.relabel(task, task.y_test[eligible])

    def _replaced(
        self, x: np.ndarray, y: np.ndarray, rate: float, rng: np.random.Generator, pool: Pool | None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        pool = _given(pool)
        chosen = _share(rng.permutation(len(y)), rate)
        copies = np.resize(rng.permutation(len(pool.labels)), len(chosen))
        x[chosen], y[chosen] = pool.x[copies], pool.labels[copies]
        if pool.noise:
            noisy = x[chosen] + rng.normal(0, pool.noise, x[chosen].shape)
            x[chosen] = np.clip(noisy, 0, 1)
        return x, y, np.sort(chosen)


def compose_all(attacks: "list[Attack]") -> Attack:
    """All attacks at once, in their order; of none: one that does nothing."""
    return reduce(compose, attacks, Attack())


def compose(first: Attack, second: Attack) -> Attack:
    """Both attacks at once: stamped by the first, then the second; what the first sends is changed by the second.

    Raises InputError where they want different labels, where one of two that poison data brings its own samples,
    or where both have a penalty, or settings of training that differ.
    """
    if first.poisons and second.poisons:
        _check_data(first, second)
    data = first if first.poisons else second
    return Attack(
        data.relabel,
        data.target_label,
        eligible=lambda task, x, y: first.eligible(task, x, y) & second.eligible(task, x, y),
        stamp=_stamped(first, second),
        parts=max(first.parts, second.parts),
        pool=data.pool,
        train=_trained(first.train, second.train),
        send=_sent(first, second),
    )


def _check_data(first: Attack, second: Attack) -> None:
    if first.pool is not None or second.pool is not None:
        raise InputError("attack: a part that brings its own samples goes with no other part that poisons data")
    targets = [attack.target_label for attack in (first, second)]
    if None in targets:
        raise InputError("attack: its parts must agree on the target label, one has a target of its own for each class")
    if len(set(targets)) > 1:
        raise InputError(f"attack: its parts must agree on the target label, found {sorted(map(int, targets))}")  # type: ignore[arg-type]


def _stamped(first: Attack, second: Attack) -> Callable[["Task", np.ndarray, int | None], np.ndarray]:
    if unchanged in (first.stamp, second.stamp):
        return second.stamp if first.stamp is unchanged else first.stamp
    return lambda task, x, part: second.stamp(task, first.stamp(task, x, part), part)


def _sent(first: Attack, second: Attack) -> Callable[[Updates, Updates, Situation], Updates] | None:
    if first.send is None or second.send is None:
        return first.send or second.send
    send_first, send_second = first.send, second.send
    return lambda trained, others, situation: send_second(send_first(trained, others, situation), others, situation)


def _trained(first: Training | None, second: Training | None) -> Training | None:
    """How a client trains that does both."""
    if first is None or second is None:
        return first or second
    for name in ("penalty", "learning_rate", "epochs"):
        if getattr(first, name) is not None and getattr(second, name) is not None:
            raise InputError(f"attack: only one of its parts can set the {name.replace('_', ' ')} of training")
    if first.project and second.project and first.every != second.every:
        raise InputError(f"attack: its parts project after every {first.every} and every {second.every} steps")
    return Training(
        first.penalty or second.penalty,
        first.alpha if first.penalty else second.alpha,
        _chained(first.gradient, second.gradient),
        _chained(first.project, second.project),
        first.every if first.project else second.every,
        second.learning_rate if first.learning_rate is None else first.learning_rate,
        second.epochs if first.epochs is None else first.epochs,
        first.needs_honest or second.needs_honest,
    )


Hook = Callable[[Tensors, Reference], Tensors]


def _chained(first: Hook | None, second: Hook | None) -> Hook | None:
    if first is None or second is None:
        return first or second
    return lambda tensors, reference: second(first(tensors, reference), reference)


def _share(order: np.ndarray, rate: float) -> np.ndarray:
    """The first `rate` of what is in order, rounded to the nearest whole."""
    return order[: int(np.floor(rate * len(order) + 0.5))]


def _given(pool: Pool | None) -> Pool:
    if pool is None:
        raise ValueError("an attack that brings its own samples needs its pool here")
    return pool
