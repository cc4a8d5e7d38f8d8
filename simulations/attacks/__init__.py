"""What malicious clients do: what they train on, how they train, what they send, and when.

An attack is a value that does nothing by default. Parts that poison data, that train differently and that change what
is sent compose into one: `build_attack({"trigger": {"target_label": 1}, "scaling": {"factor": 3.0}})`.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from gradlens.errors import InputError
from gradlens.names import named
from gradlens.settings import configured
from simulations.attacks.attack import (
    Attack,
    Pool,
    Reference,
    Situation,
    Tensors,
    Training,
    Update,
    Updates,
    attack_part,
)
from simulations.attacks.boosting import (
    explicit_boosting,
    layer_substitution,
    model_replacement,
    norm_cap,
    scaling,
    train_and_scale,
)
from simulations.attacks.hidden_layers import hiding
from simulations.attacks.local_training import constrain_and_scale, neurotoxin, norm_bound, own_training
from simulations.attacks.parts import compose, compose_all
from simulations.attacks.perturbation import min_max, min_sum
from simulations.attacks.pools import edge_case, semantic, writer_class
from simulations.attacks.relabeling import all_to_one, inversion, label_flip
from simulations.attacks.schedules import SCHEDULES, Schedule, Turn
from simulations.attacks.sending import (
    a_little_is_enough,
    copies,
    gaussian,
    inner_product,
    mimic,
    sign_flip,
    zero,
)
from simulations.attacks.triggers import (
    blend,
    centralized_trigger,
    distributed_trigger,
    feature_trigger,
    phrase_trigger,
    text_trigger,
    trigger,
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
    "attack_part",
    "build_attack",
    "build_part",
    "compose",
    "in_order",
    "label_flip",
    "scaling",
    "trigger",
]

ATTACKS: Mapping[str, Callable[..., Attack]] = {  # in the order in which parts are applied
    # data
    "trigger": trigger,
    "blend": blend,
    "distributed_trigger": distributed_trigger,
    "centralized_trigger": centralized_trigger,
    "text_trigger": text_trigger,
    "feature_trigger": feature_trigger,
    "phrase_trigger": phrase_trigger,
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
    "norm_cap": norm_cap,
    "copies": copies,
}
NEXT_STAGE = {"data": "own_training", "training": "layer_substitution"}  # stage -> first built-in part of the next one


def build_attack(parts: Mapping[str, Mapping[str, Any]]) -> Attack:
    """Builds the attack made of the named parts.

    Parts are applied in the order of `ATTACKS`; one that is not built in comes after the built-in ones of its stage.
    Parts that poison data must agree on the target label; then the samples eligible for all of them are stamped by all.

    Parameters
    ----------
    parts : Mapping of str to Mapping
        Name -> settings; a name is built in, of an installed package, or `module:function`.

    Returns
    -------
    Attack
        Of no parts, one that does nothing.

    Raises
    ------
    InputError
        If there is no such part, or parts do not go together.

    Examples
    --------
    >>> build_attack({"scaling": {"factor": 3.0}, "label_flip": {}})
    label_flip(source_label=7, target_label=5)+scaling(factor=3.0)
    """
    built = {name: build_part(name, settings) for name, settings in parts.items()}
    return compose_all([built[name] for name in in_order(built)])


def build_part(name: str, settings: Mapping[str, Any]) -> Attack:
    """Builds one part of an attack.

    Parameters
    ----------
    name : str
        A name of `ATTACKS`, of an installed package, or `module:function`.
    settings : Mapping of str to object

    Raises
    ------
    InputError
        If there is no such part, a setting is wrong, or what it names builds no attack.

    Examples
    --------
    >>> build_part("scaling", {"factor": 3.0})
    scaling(factor=3.0)
    """
    builder = named("attacks", ATTACKS, name)
    attack = builder(**settings)
    if not isinstance(attack, Attack):
        raise InputError(f"{name} must build an Attack, found a {type(attack).__name__}")
    return attack if attack.calls else replace(attack, calls=(configured(builder, **settings),))


def in_order(parts: Mapping[str, Attack]) -> list[str]:
    """Returns the names of parts in the order in which they are applied: data, training, sending.

    Parameters
    ----------
    parts : Mapping of str to object
        The parts by name.

    Examples
    --------
    >>> in_order({"scaling": {}, "trigger": {}})
    ['trigger', 'scaling']
    """
    names = list(ATTACKS)
    ends = {stage: names.index(first) for stage, first in NEXT_STAGE.items()}

    def place(name: str) -> tuple[float, str]:
        return (names.index(name), "") if name in ATTACKS else (ends.get(parts[name].stage, len(names)) - 0.5, name)

    return sorted(parts, key=place)
