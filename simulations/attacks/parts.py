"""How attacks compose: data poisoned by one part, training changed by another, what is sent by a third."""

from collections.abc import Callable
from functools import reduce

import numpy as np

from gradlens.errors import InputError
from simulations.attacks.attack import Attack, Reference, Situation, Tensors, Training, Updates, unchanged
from simulations.tasks import Task

Hook = Callable[[Tensors, Reference], Tensors]


def compose_all(attacks: list[Attack]) -> Attack:
    """Returns all attacks at once, in their order; of none, one that does nothing.

    Examples
    --------
    >>> from simulations.attacks import ATTACKS
    >>> compose_all([ATTACKS["sign_flip"](), ATTACKS["scaling"](factor=3.0)])
    sign_flip(factor=1.0)+scaling(factor=3.0)
    """
    return reduce(compose, attacks, Attack())


def compose(first: Attack, second: Attack) -> Attack:
    """Returns both attacks at once: stamped by the first, then by the second; the second changes what the first sends.

    Parameters
    ----------
    first, second : Attack
        In the order in which they are applied (`in_order`).

    Raises
    ------
    InputError
        If both poison data and want different labels, or one of them brings its own samples; or if both set the same
        setting of local training.

    Examples
    --------
    >>> from simulations.attacks import build_part
    >>> attack = compose(build_part("trigger", {}), build_part("scaling", {"factor": 3.0}))
    >>> attack.poisons, attack.send is None
    (True, False)
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
        deviates=first.deviates_without_poison or second.deviates_without_poison,
        calls=first.calls + second.calls,
    )


def _check_data(first: Attack, second: Attack) -> None:
    if first.pool is not None or second.pool is not None:
        raise InputError("attack: a part that brings its own samples goes with no other part that poisons data")
    targets = [attack.target_label for attack in (first, second)]
    if None in targets:
        raise InputError("attack: its parts must agree on the target label, one has a target of its own for each class")
    if len(set(targets)) > 1:
        raise InputError(f"attack: its parts must agree on the target label, found {sorted(map(int, targets))}")  # type: ignore[arg-type]


def _stamped(first: Attack, second: Attack) -> Callable[[Task, np.ndarray, int | None], np.ndarray]:
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


def _chained(first: Hook | None, second: Hook | None) -> Hook | None:
    if first is None or second is None:
        return first or second
    return lambda tensors, reference: second(first(tensors, reference), reference)
