"""Honest clients that look odd: an investigation must not accuse them.

Partitions in which the first client is odd, and what makes malicious clients of a scenario odd honest ones.
"""

import numpy as np

from gradlens.errors import InputError
from simulations.attacks.attack import Attack, attack_part
from simulations.partition import PARTITIONS, Partition, Split
from simulations.tasks import Task


def one_label(alpha: float = 0.0) -> Partition:
    """Gives the first client samples of a single label, as many as the others hold on average.

    Parameters
    ----------
    alpha : float
        Of the Dirichlet partition of the rest; 0: they are shared out at random.
    """

    def split(task: Task, num_clients: int, rng: np.random.Generator) -> Split:
        label = rng.integers(task.num_classes)
        own = rng.permutation(np.flatnonzero(task.y_train == label))[: len(task.y_train) // num_clients]
        return _with_first(np.sort(own), task, num_clients, rng, alpha)

    return split


def many_examples(factor: float = 10.0, alpha: float = 0.0) -> Partition:
    """Gives the first client ten times as many samples as each of the others holds on average.

    Parameters
    ----------
    factor : float
        How many times as many.
    alpha : float
        Of the Dirichlet partition of the rest; 0: they are shared out at random.
    """

    def split(task: Task, num_clients: int, rng: np.random.Generator) -> Split:
        count = int(factor * len(task.y_train) / (factor + num_clients - 1))
        own = np.sort(rng.permutation(len(task.y_train))[:count])
        return _with_first(own, task, num_clients, rng, alpha)

    return split


def _with_first(own: np.ndarray, task: Task, num_clients: int, rng: np.random.Generator, alpha: float) -> Split:
    """The first client's samples, and all others shared out among the other clients."""
    rest = np.setdiff1d(np.arange(len(task.y_train)), own)
    others = Task(task.name, task.x_train[rest], task.y_train[rest], task.x_test, task.y_test, task.label_names)
    partition = PARTITIONS["dirichlet"](alpha=alpha, minimum=2) if alpha else PARTITIONS["iid"]()
    return Split([own, *(rest[part] for part in partition(others, num_clients - 1, rng).train)])


@attack_part
def wrong_labels() -> Attack:
    """Gives each poisoned sample another label, spread evenly: at a poison rate of .2 a careless client."""

    def relabel(task: Task, y: np.ndarray) -> np.ndarray:
        return (y + 1 + np.arange(len(y)) % (task.num_classes - 1)) % task.num_classes

    return Attack(relabel)


@attack_part
def other_writing() -> Attack:
    """Makes the strokes of images bolder and paler and keeps their labels: a client with another pen."""

    def stamp(task: Task, x: np.ndarray, part: int | None) -> np.ndarray:
        if x.ndim != 4:
            raise InputError("other_writing: expected images")
        left, right = np.roll(x, 1, axis=-1), np.roll(x, -1, axis=-1)
        return (0.7 * np.maximum(np.maximum(left, right), x)).astype(x.dtype)

    return Attack(lambda task, y: y, stamp=stamp)
