"""What malicious clients do: what they train on, how they train, what they send, and when.

An attack is a value that by default does nothing; parts that poison data, parts that train differently and parts
that change what is sent compose into one. Settings are named as in a scenario:
`{"trigger": {"target_label": 1}, "scaling": {"factor": 3}}`.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from gradlens.names import named
from simulations.attacks.attack import (
    Attack,
    Pool,
    Reference,
    Situation,
    Tensors,
    Training,
    Update,
    Updates,
    compose,
    compose_all,
)
from simulations.attacks.data import (
    all_to_one,
    blend,
    distributed_trigger,
    edge_case,
    inversion,
    label_flip,
    semantic,
    text_trigger,
    trigger,
    writer_class,
)
from simulations.attacks.local_training import constrain_and_scale, hiding, neurotoxin, norm_bound, own_training
from simulations.attacks.schedules import SCHEDULES, Schedule, Turn
from simulations.attacks.sending import (
    a_little_is_enough,
    copies,
    explicit_boosting,
    gaussian,
    inner_product,
    layer_substitution,
    mimic,
    min_max,
    min_sum,
    model_replacement,
    scaling,
    sign_flip,
    train_and_scale,
    zero,
)

__all__ = [
    "ATTACKS",
    "SCHEDULES",
    "Attack",
    "Pool",
    "Reference",
    "Schedule",
    "Situation",
    "Tensors",
    "Training",
    "Turn",
    "Update",
    "Updates",
    "build_attack",
    "compose",
    "label_flip",
    "ordered",
    "scaling",
    "trigger",
]

ATTACKS: Mapping[str, Callable[..., Attack]] = {  # in the order in which parts are applied
    # data
    "trigger": trigger,
    "blend": blend,
    "distributed_trigger": distributed_trigger,
    "text_trigger": text_trigger,
    "label_flip": label_flip,
    "all_to_one": all_to_one,
    "inversion": inversion,
    "semantic": semantic,
    "edge_case": edge_case,
    "writer_class": writer_class,
    # training
    "own_training": own_training,
    "constrain_and_scale": constrain_and_scale,
    "norm_bound": norm_bound,
    "neurotoxin": neurotoxin,
    # sending
    "layer_substitution": layer_substitution,
    "train_and_scale": train_and_scale,
    "scaling": scaling,
    "model_replacement": model_replacement,
    "explicit_boosting": explicit_boosting,
    "sign_flip": sign_flip,
    "gaussian": gaussian,
    "zero": zero,
    "a_little_is_enough": a_little_is_enough,
    "inner_product": inner_product,
    "min_max": min_max,
    "min_sum": min_sum,
    "mimic": mimic,
    "hiding": hiding,
    "copies": copies,
}


def build_attack(parts: Mapping[str, Mapping[str, Any]]) -> Attack:
    """The attack made of the named parts; of none: one that does nothing.

    Parts are applied stage by stage (data, training, sending): the built-in ones in the order of `ATTACKS`, then those
    from outside in the order of their names. Parts that poison data must agree on the target label; then the samples
    eligible for all are stamped by all. Raises InputError where there is no such part, or parts do not go together.
    """
    return compose_all([named("attacks", ATTACKS, name, "attack")(**parts[name]) for name in ordered(parts)])


def ordered(parts: Iterable[str]) -> list[str]:
    """Names of parts in the order in which they are applied."""
    return [*(name for name in ATTACKS if name in parts), *sorted(name for name in parts if name not in ATTACKS)]
