"""What malicious clients do: what they train on, what they send, and when.

An attack is a value that by default does nothing; parts that poison data and parts that change what is sent
compose into one. Settings are named as in a scenario: `{"trigger": {"target_label": 1}, "scaling": {"factor": 3}}`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Annotated, Any

import numpy as np
from pydantic import Field, validate_call

from gradlens.log import InputError

Updates = Mapping[str, np.ndarray]  # layer -> [client, *shape]
Schedule = Callable[[int], bool]  # round, counted from 0 as in the log -> is the attack on?

Label = Annotated[int, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]


@dataclass(frozen=True)
class Attack:
    """What a malicious client trains on and what it sends; every field by default changes nothing.

    target_label: what poisoned samples are relabelled to, None where the data stay as they are.
    eligible: labels int64 [sample] -> bool [sample], the samples that can be poisoned (target class never).
    stamp: float32 [sample, channel, height, width] -> the same with the trigger in it, as a new array.
    send: (what the malicious clients of the round trained, what the others send, generator) -> what is sent,
    None where the update is sent as it was trained.
    """

    target_label: int | None = None
    eligible: Callable[[np.ndarray], np.ndarray] = lambda labels: np.ones(len(labels), dtype=bool)
    stamp: Callable[[np.ndarray], np.ndarray] = np.copy
    send: Callable[[Updates, Updates, np.random.Generator], Updates] | None = None

    def poison(
        self, images: np.ndarray, labels: np.ndarray, rate: float, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """One client's data with a share `rate` of its eligible samples stamped and relabelled.

        The count is rounded to the nearest whole; the samples of a smaller rate are among those of a larger.
        Returns: new images, new labels, and the positions of the poisoned samples.
        """
        images, labels = images.copy(), labels.copy()
        if self.target_label is None:
            return images, labels, np.zeros(0, np.int64)
        candidates = rng.permutation(np.flatnonzero(self.eligible(labels)))
        chosen = np.sort(candidates[: int(np.floor(rate * len(candidates) + 0.5))])
        images[chosen] = self.stamp(images[chosen])
        labels[chosen] = self.target_label
        return images, labels, chosen


@validate_call(config={"strict": True})
def trigger(target_label: Label = 1, size: Count = 4, row: Label = 2, column: Label = 2, value: float = 1.0) -> Attack:
    """A square of `size` x `size` pixels at (row, column) set to `value` in every channel, shown as the target class.

    Eligible are all classes but the target. Source: Gu et al. 2017, arXiv:1708.06733 (pattern backdoor).
    """
    square = (..., slice(row, row + size), slice(column, column + size))

    def stamp(images: np.ndarray) -> np.ndarray:
        height, width = images.shape[-2:]
        if row + size > height or column + size > width:
            raise InputError(
                f"trigger: a square of {size} pixels at row {row}, column {column} leaves images of {height} x {width}"
            )
        stamped = images.copy()
        stamped[square] = value
        return stamped

    return Attack(target_label, eligible=lambda labels: labels != target_label, stamp=stamp)


@validate_call(config={"strict": True})
def label_flip(source_label: Label = 7, target_label: Label = 5) -> Attack:
    """The source class relabelled as the target class, images untouched; Tolpegin et al. 2020, arXiv:2007.08432."""
    if source_label == target_label:
        raise InputError(f"label_flip: source and target label must differ, both are {target_label}")
    return Attack(target_label, eligible=lambda labels: labels == source_label)


@validate_call(config={"strict": True})
def scaling(factor: Annotated[float, Field(allow_inf_nan=False)] = 1.0) -> Attack:
    """Sends `factor` x the trained update; num_clients / server learning rate replaces the global model.

    Buffers that hold whole numbers (counters) are sent as they are. Source: model replacement, Bagdasaryan et
    al. 2018, arXiv:1807.00459, eq. (3).
    """

    def send(trained: Updates, others: Updates, rng: np.random.Generator) -> Updates:
        return {name: _scaled(update, factor) for name, update in trained.items()}

    return Attack(send=None if factor == 1.0 else send)


@validate_call(config={"strict": True})
def every_round() -> Schedule:
    """On in every round."""
    return lambda index: True


@validate_call(config={"strict": True})
def from_round(first: Label = 0) -> Schedule:
    """On from round `first` to the last, rounds counted from 0 as in the log; before it the clients are honest."""
    return lambda index: index >= first


ATTACKS: Mapping[str, Callable[..., Attack]] = {"trigger": trigger, "label_flip": label_flip, "scaling": scaling}
SCHEDULES: Mapping[str, Callable[..., Schedule]] = {"every_round": every_round, "from_round": from_round}


def build_attack(parts: Mapping[str, Mapping[str, Any]]) -> Attack:
    """The attack made of the named parts, applied in the order of `ATTACKS`; of none: one that does nothing.

    Two parts that poison data must agree on the target label; then the samples eligible for both are stamped by
    both. Raises InputError where they disagree.
    """
    built = [ATTACKS[name](**parts[name]) for name in ATTACKS if name in parts]
    return reduce(compose, built, Attack())


def compose(first: Attack, second: Attack) -> Attack:
    """Both attacks at once: stamped by the first, then the second; what the first sends is changed by the second."""
    targets = {attack.target_label for attack in (first, second) if attack.target_label is not None}
    if len(targets) > 1:
        raise InputError(f"attack: its parts must agree on the target label, found {sorted(targets)}")
    return Attack(
        targets.pop() if targets else None,
        eligible=lambda labels: first.eligible(labels) & second.eligible(labels),
        stamp=lambda images: second.stamp(first.stamp(images)),
        send=_in_turn(first, second),
    )


def _in_turn(first: Attack, second: Attack) -> Callable[[Updates, Updates, np.random.Generator], Updates] | None:
    if first.send is None or second.send is None:
        return first.send or second.send
    send_first, send_second = first.send, second.send
    return lambda trained, others, rng: send_second(send_first(trained, others, rng), others, rng)


def _scaled(update: np.ndarray, factor: float) -> np.ndarray:
    return update * update.dtype.type(factor) if np.issubdtype(update.dtype, np.floating) else update
