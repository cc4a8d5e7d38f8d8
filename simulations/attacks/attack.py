"""What an attack is: what malicious clients train on, how they train, and what they send.

An attack is a value that does nothing by default. It sees no more than a malicious client could see: the task's own
data, the global model and, where a method assumes it, what the other clients of the round send.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import wraps
from typing import Any, ParamSpec

import numpy as np
import torch
from pydantic import validate_call

from gradlens.errors import InputError
from gradlens.log import ModelSpec
from gradlens.names import FUNCTION, imported
from gradlens.settings import Configured, configured
from simulations.partition import Split
from simulations.tasks import Task

Updates = Mapping[str, np.ndarray]  # layer -> [client, *shape]
Update = Mapping[str, np.ndarray]  # layer -> [*shape], of one client
Tensors = Mapping[str, torch.Tensor]  # parameters of one client, layer -> [*shape]
Settings = ParamSpec("Settings")


@dataclass(frozen=True, eq=False)
class Situation:
    """What an attacker knows when it sends its update.

    Parameters
    ----------
    index : int
        Number of the round.
    global_model : Mapping of str to array
        The global model before the round, layer -> [*shape].
    previous : Mapping of str to array, or None
        The last change of the global model; None in the first round.
    num_updates : int
        How many updates the server averages in this round.
    server_learning_rate : float
        What the server multiplies the aggregated update by.
    model : ModelSpec
        The layers, and which of them are final.
    honest : callable
        Returns what the clients that attack in this round would have sent honestly; rows as in their trained updates.
    success : callable
        Returns the attack success rate of one client's update on the attackers' own training data.
    rng : numpy.random.Generator
        The attackers' random numbers in this round.

    Examples
    --------
    >>> import numpy as np
    >>> from gradlens.log import ModelSpec
    >>> state = {"fc.weight": np.zeros((2, 3), np.float32), "fc.bias": np.zeros(2, np.float32)}
    >>> situation = Situation(
    ...     index=0, global_model=state, previous=None, num_updates=10, server_learning_rate=0.5,
    ...     model=ModelSpec.of(state), honest=dict, success=lambda update: 0.0, rng=np.random.default_rng(0),
    ... )
    >>> situation.num_updates / situation.server_learning_rate  # the factor that replaces the global model
    20.0
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

    Parameters
    ----------
    previous : Mapping of str to torch.Tensor
        The last change of the global model; zeros in the first round.
    honest : Mapping of str to torch.Tensor
        This client's own honest update; empty unless `Training.needs_honest` is set.
    final_weight, final_bias : str or None
        Names of the final layer's parameters; None where the model has none.

    Examples
    --------
    >>> import torch
    >>> Reference({"fc.bias": torch.zeros(2)}, {}, "fc.weight", "fc.bias").final_bias
    'fc.bias'
    """

    previous: Tensors
    honest: Tensors
    final_weight: str | None
    final_bias: str | None


@dataclass(frozen=True)
class Training:
    """How a malicious client trains differently; by default no field changes anything.

    Hooks see the update so far, local - global, layer -> [*shape], parameters only. They must be pure functions of
    one client's tensors, because an engine may map them over many clients.

    Parameters
    ----------
    penalty : callable, optional
        (update so far, reference) -> differentiable scalar; the loss becomes alpha x task loss + (1 - alpha) x penalty.
    alpha : float
        Weight of the task loss where there is a penalty.
    gradient : callable, optional
        (gradients of the whole loss, reference) -> gradients, in each step, before momentum.
    project : callable, optional
        (update so far, reference) -> update so far, after every `every` steps and after the last one.
    every : int
        Steps between two projections.
    learning_rate, epochs : float or int, optional
        The attacker's own; None for the scenario's.
    needs_honest : bool
        Whether the client's honest update is trained first, for `Reference.honest`.

    Examples
    --------
    >>> Training(learning_rate=0.05, epochs=6).every
    1
    """

    penalty: Callable[[Tensors, Reference], torch.Tensor] | None = None
    alpha: float = 1.0
    gradient: Callable[[Tensors, Reference], Tensors] | None = None
    project: Callable[[Tensors, Reference], Tensors] | None = None
    every: int = 1
    learning_rate: float | None = None
    epochs: int | None = None
    needs_honest: bool = False


@dataclass(frozen=True, eq=False)
class Pool:
    """Samples that the attackers bring, with the labels they want for them.

    Parameters
    ----------
    x, labels : array
        What all attackers train on, [sample, ...] and int64 [sample].
    held_out, held_out_labels : array
        What attack success is measured on.
    given_up : array
        Positions in x_train that honest clients no longer hold, int64; none by default.
    noise : float
        Standard deviation of the Gaussian noise added to each copy, which is then clipped to [0, 1].

    Examples
    --------
    >>> import numpy as np
    >>> images, labels = np.zeros((3, 1, 8, 8), np.float32), np.array([2, 2, 2])
    >>> len(Pool(images[:2], labels[:2], held_out=images[2:], held_out_labels=labels[2:]).given_up)
    0
    """

    x: np.ndarray
    labels: np.ndarray
    held_out: np.ndarray
    held_out_labels: np.ndarray
    given_up: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    noise: float = 0.0


def every_sample(task: Task, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """All samples are eligible."""
    return np.ones(len(y), dtype=bool)


def unchanged(task: Task, x: np.ndarray, part: int | None) -> np.ndarray:
    """No trigger: a copy of the samples."""
    return x.copy()


@dataclass(frozen=True, repr=False)
class Attack:
    """What malicious clients train on, how they train, and what they send; by default no field changes anything.

    Parameters
    ----------
    relabel : callable, optional
        (task, labels int64 [sample]) -> the labels wanted instead; None where the data stay as they are.
    target_label : int, optional
        The wanted label where it is the same for all samples; parts that are composed must agree on it.
    eligible : callable
        (task, x, labels) -> bool [sample], the samples that can be poisoned; never those that have the wanted label.
    stamp : callable
        (task, x, part) -> x with the trigger in it, as a new array. `part` is the number of the malicious client, None
        for the whole trigger.
    parts : int
        Number of parts the trigger is split into.
    pool : callable, optional
        (task, split, generator) -> `Pool`, the samples that the attackers bring; None where they poison their own.
    train : Training, optional
        How they train; None: as the other clients do.
    send : callable, optional
        (updates trained by the attackers of this round, updates of the others, situation) -> updates sent; None: as
        they were trained.
    deviates : bool
        Whether `train` and `send` turn even the update of a client that has no poisoned sample into another one. False
        where they only shape what the poison does: such a client is as good as honest, and the truth says so.
    calls : tuple of Configured
        The calls that built it, for `repr`.

    Examples
    --------
    >>> from simulations.attacks import ATTACKS, compose
    >>> compose(ATTACKS["label_flip"](source_label=3), ATTACKS["scaling"](factor=2.0))
    label_flip(source_label=3, target_label=5)+scaling(factor=2.0)
    >>> Attack().poisons
    False
    """

    relabel: Callable[[Task, np.ndarray], np.ndarray] | None = None
    target_label: int | None = None
    eligible: Callable[[Task, np.ndarray, np.ndarray], np.ndarray] = every_sample
    stamp: Callable[[Task, np.ndarray, int | None], np.ndarray] = unchanged
    parts: int = 1
    pool: Callable[[Task, Split, np.random.Generator], Pool] | None = None
    train: Training | None = None
    send: Callable[[Updates, Updates, Situation], Updates] | None = None
    deviates: bool = True
    calls: tuple[Configured, ...] = ()

    def __repr__(self) -> str:
        return "+".join(map(repr, self.calls)) or "Attack()"

    @property
    def poisons(self) -> bool:
        """Whether data are poisoned."""
        return self.relabel is not None or self.pool is not None

    @property
    def deviates_without_poison(self) -> bool:
        """Whether the update of a client without a poisoned sample differs from its honest one."""
        return self.deviates and (self.train is not None or self.send is not None)

    @property
    def stage(self) -> str:
        """The first of "data", "training" and "sending" that the attack changes."""
        if self.poisons or self.stamp is not unchanged:
            return "data"
        return "sending" if self.train is None else "training"

    def poison(
        self,
        x: np.ndarray,
        y: np.ndarray,
        rate: float,
        rng: np.random.Generator,
        *,
        task: Task,
        part: int = 0,
        pool: Pool | None = None,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Poisons the data of one malicious client.

        Without a pool a share of the eligible samples is stamped and relabeled. With a pool a share of all samples is
        replaced by samples of the pool, each used equally often, with their wanted labels. The number of samples is
        rounded to the nearest whole number; those of a smaller rate are among those of a larger one.

        Parameters
        ----------
        x, y : array
            The client's samples and labels; they are left as they are.
        rate : float
            The share of samples that is poisoned.
        rng : numpy.random.Generator
            Draws the samples.
        task : Task
            The task that the samples are from.
        part : int
            Number of the malicious client, which decides its part of a distributed trigger.
        pool : Pool, optional
            What `self.pool` returned.

        Returns
        -------
        tuple of array
            New samples, new labels, and the sorted positions of the poisoned samples, int64.
        """
        x, y = x.copy(), y.copy()
        if self.pool is not None:
            return _replaced(x, y, rate, rng, _present(pool))
        if self.relabel is None:
            return x, y, np.zeros(0, np.int64)
        chosen = np.sort(_share(rng.permutation(np.flatnonzero(self.eligible(task, x, y))), rate))
        x[chosen] = self.stamp(task, x[chosen], part)
        y[chosen] = self.relabel(task, y[chosen])
        return x, y, chosen

    def goal(self, task: Task, pool: Pool | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Returns what attack success is measured on: held-out attacked samples and the label that each should get.

        These are the eligible test samples with the whole trigger, or the held-out samples of the pool; none where no
        data are poisoned.

        Raises
        ------
        InputError
            If the attack does not fit the task.
        """
        if self.pool is not None:
            pool = _present(pool)
            return pool.held_out, pool.held_out_labels
        if self.relabel is None:
            return task.x_test[:0].copy(), task.y_test[:0].copy()
        eligible = self.eligible(task, task.x_test, task.y_test)
        if not eligible.any():
            raise InputError(f"attack: no test sample of task {task.name} is eligible; does it have the source class?")
        return self.stamp(task, task.x_test[eligible], None), self.relabel(task, task.y_test[eligible])


def attack_part(builder: Callable[Settings, Attack]) -> Callable[Settings, Attack]:
    """Decorates the builder of an attack: settings are checked strictly, and the attack prints as the call.

    Parameters
    ----------
    builder : callable
        (settings) -> Attack.

    Examples
    --------
    >>> @attack_part
    ... def silence(after: int = 3) -> Attack:
    ...     return Attack(send=lambda trained, others, situation: {name: 0 * trained[name] for name in trained})
    >>> silence(after=5)
    silence(after=5)
    """
    checked, signature = validate_call(config={"strict": True})(builder), inspect.signature(builder)

    @wraps(builder)
    def build(*values: Settings.args, **settings: Settings.kwargs) -> Attack:
        attack = checked(*values, **settings)
        bound = signature.bind(*values, **settings)
        bound.apply_defaults()
        return replace(attack, calls=(configured(builder, **bound.arguments),))

    return build


def function_named(setting: str, table: Mapping[str, Callable[..., Any]], name: str) -> Callable[..., Any]:
    """Returns the function that a setting of an attack names: one of a table, or `module:function`.

    Raises
    ------
    InputError
        If it is neither, cannot be imported, or the scenario is a stored one that nobody trusted.
    """
    if name in table:
        return table[name]
    if not FUNCTION.fullmatch(name):
        raise InputError(f"{setting}: expected {', '.join(table)} or module:function, found {name!r:.80}")
    return imported(setting, name)


def _replaced(
    x: np.ndarray, y: np.ndarray, rate: float, rng: np.random.Generator, pool: Pool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A client's samples, a share of which is replaced by samples of the pool."""
    chosen = _share(rng.permutation(len(y)), rate)
    copies = np.resize(rng.permutation(len(pool.labels)), len(chosen))
    x[chosen], y[chosen] = pool.x[copies], pool.labels[copies]
    if pool.noise:
        noisy = x[chosen] + rng.normal(0, pool.noise, x[chosen].shape)
        x[chosen] = np.clip(noisy, 0, 1)
    return x, y, np.sort(chosen)


def _share(order: np.ndarray, rate: float) -> np.ndarray:
    """The first `rate` of the positions, their number rounded to the nearest whole number."""
    return order[: int(np.floor(rate * len(order) + 0.5))]


def _present(pool: Pool | None) -> Pool:
    if pool is None:
        raise ValueError("an attack that brings its own samples needs its pool here")
    return pool
