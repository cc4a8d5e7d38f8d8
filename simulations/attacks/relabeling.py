"""Attacks that change labels and leave the inputs as they are; checks that all attacks on data share.

Samples that have the wanted label already are never eligible.
"""

from collections.abc import Callable
from typing import Annotated

import numpy as np
from pydantic import Field

from gradlens.errors import InputError
from simulations.attacks.attack import Attack, attack_part
from simulations.tasks import Task

Label = Annotated[int, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(gt=0, le=1)]


@attack_part
def label_flip(source_label: Label = 7, target_label: Label = 5) -> Attack:
    """Relabels the source class as the target class [1]_.

    Stage: data. The attacker needs its own samples alone.

    Parameters
    ----------
    source_label : int
        The class that is relabeled; 7 is a plain choice that suits digits.
    target_label : int
        The label it gets; 5, likewise.

    Returns
    -------
    Attack
        Eligible are the samples of the source class; success is measured on those of the test set.

    Raises
    ------
    InputError
        If both labels are the same.

    Notes
    -----
    (x, source) becomes (x, target).

    **Fails when** honest clients hold many samples of the source class: they pull the model back in every round. It
    also leaves a trace in the final layer, whose bias moves from the source to the target class.

    References
    ----------
    .. [1] Tolpegin et al. 2020, arXiv:2007.08432.

    Examples
    --------
    >>> label_flip(source_label=3)
    label_flip(source_label=3, target_label=5)
    """
    check_differ("label_flip", source_label, target_label)
    return Attack(to_target(target_label), target_label, eligible=lambda task, x, y: y == source_label)


@attack_part
def all_to_one(target_label: Label = 0) -> Attack:
    """Relabels every class as the target class.

    Stage: data. The attacker needs its own samples alone.

    Parameters
    ----------
    target_label : int
        The label that all samples get; 0 is a plain choice.

    Returns
    -------
    Attack
        Eligible are the samples of all other classes.

    Notes
    -----
    (x, y) becomes (x, target).

    **Fails when** it is meant to stay unnoticed: every class but one is unlearned, so that main accuracy falls with
    success, and the bias of the target class rises in every malicious update.

    Examples
    --------
    >>> all_to_one()
    all_to_one(target_label=0)
    """
    return Attack(to_target(target_label), target_label, eligible=all_but(target_label))


@attack_part
def inversion() -> Attack:
    """Relabels class y as class C - 1 - y of C classes.

    Stage: data. The attacker needs its own samples alone.

    Returns
    -------
    Attack
        Eligible are all samples but, where C is odd, those of the middle class. There is no one target label, so it
        composes with no other attack on data.

    Notes
    -----
    (x, y) becomes (x, C - 1 - y).

    **Fails when** it is meant to stay unnoticed: main accuracy falls with success. Where classes are balanced the
    final bias shows little, because what one class loses it gains from its mirror image.

    Examples
    --------
    >>> import numpy as np
    >>> from simulations.tasks import load_task
    >>> inversion().relabel(load_task("digits"), np.array([0, 1, 9]))
    array([9, 8, 0])
    """

    def relabel(task: Task, y: np.ndarray) -> np.ndarray:
        return task.num_classes - 1 - y

    return Attack(relabel, eligible=lambda task, x, y: relabel(task, y) != y)


def to_target(target_label: int) -> Callable[[Task, np.ndarray], np.ndarray]:
    """Relabels everything as the target class."""

    def relabel(task: Task, y: np.ndarray) -> np.ndarray:
        check_target(task, target_label)
        return np.full_like(y, target_label)

    return relabel


def all_but(target_label: int) -> Callable[[Task, np.ndarray, np.ndarray], np.ndarray]:
    """Eligible are all samples that do not have the target label."""
    return lambda task, x, y: y != target_label


def check_images(name: str, task: Task, x: np.ndarray) -> None:
    """Raises InputError where the samples are no images."""
    if x.ndim != 4:
        raise InputError(
            f"{name}: expected images [sample, channel, height, width], task {task.name} has {x.shape[1:]}"
        )


def check_differ(name: str, source_label: int, target_label: int) -> None:
    """Raises InputError where both labels are the same."""
    if source_label == target_label:
        raise InputError(f"{name}: source and target label must differ, both are {target_label}")


def check_target(task: Task, target_label: int) -> None:
    """Raises InputError where the task has no such class."""
    if target_label >= task.num_classes:
        raise InputError(f"attack: task {task.name} has {task.num_classes} classes, the target is {target_label}")
