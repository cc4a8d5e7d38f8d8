"""Settings that the shipped reference is made of: each is drawn by its number, and so are the attacks tried on it."""

from typing import Any

import numpy as np

from simulations.scenario import Scenario

TASKS = {
    "digits": ("mlp", "cnn"),
    "simulations.studies.reference_tasks:clusters": ("mlp", "cnn"),
    "simulations.studies.reference_tasks:chains": ("own",),
}
SLOW = ("cnn", "own")  # models that are given fewer clients, rounds and epochs
COHORTS = (6, 8, 10, 12, 15, 20, 20, 25, 30, 40, 60)
SKEWS: tuple[Any, ...] = (
    "iid",
    "iid",
    {"dirichlet": {"alpha": 0.2, "minimum": 2}},
    {"dirichlet": {"alpha": 0.5, "minimum": 2}},
    {"dirichlet": {"alpha": 0.5, "minimum": 2}},
    {"dirichlet": {"alpha": 1.0, "minimum": 2}},
    {"labels": {"per_client": 3}},
    {"quantity": {"alpha": 1.0, "minimum": 2}},
)
TRIGGER = {"target_label": 1, "size": 3, "row": 0, "column": 0}
IMAGE_ATTACKS: tuple[dict[str, Any], ...] = (
    {"trigger": TRIGGER},
    {"blend": {"alpha": 0.5}},
    {"distributed_trigger": {"width": 3, "row_gap": 1, "column_gap": 1}, "scaling": {"factor": 3.0}},
    {"edge_case": {"share": 0.3}, "scaling": {"factor": 5.0}},
    {"trigger": TRIGGER, "own_training": {"epochs": 6}},
    {"trigger": TRIGGER, "constrain_and_scale": {"alpha": 0.8, "factor": 3.0}},
    {"trigger": TRIGGER, "norm_bound": {"bound": 0.3}, "scaling": {"factor": 5.0}},
    {"trigger": TRIGGER, "neurotoxin": {}},
    {"trigger": TRIGGER, "layer_substitution": {}, "scaling": {"factor": 3.0}},
    {"trigger": TRIGGER, "train_and_scale": {}},
    {"trigger": TRIGGER, "scaling": {"factor": 5.0}},
    {"trigger": TRIGGER, "hiding": {"how": "drawn"}},
    {"trigger": TRIGGER, "copies": {}},
)
LABEL_ATTACKS: tuple[dict[str, Any], ...] = (
    {"label_flip": {"source_label": 3, "target_label": 1}, "scaling": {"factor": 5.0}},
    {"label_flip": {"source_label": 3, "target_label": 1}},
    {"all_to_one": {}, "scaling": {"factor": 5.0}},
    {"inversion": {}, "scaling": {"factor": 5.0}},
    {"sign_flip": {"factor": 3.0}},
    {"gaussian": {}},
    {"zero": {}},
    {"a_little_is_enough": {}},
    {"inner_product": {}},
    {"min_max": {}},
    {"min_sum": {}},
    {"mimic": {}},
)


def setting(number: int) -> Scenario:
    """Returns an attack-free setting, drawn from the menu above; the same for the same number.

    Parameters
    ----------
    number : int
        Its address.

    Examples
    --------
    >>> setting(0) == setting(0), setting(0).is_control
    (True, True)
    """
    rng = np.random.default_rng([number, 0])
    task = str(rng.choice(list(TASKS), p=(0.4, 0.4, 0.2)))
    model, clients = str(rng.choice(TASKS[task])), int(rng.choice(COHORTS))
    sampled = clients >= 20 and rng.random() < 0.4
    rounds, epochs = int(rng.choice((6, 10, 15, 20, 25, 30))), int(rng.choice((1, 2, 3)))
    if model in SLOW:
        clients, rounds, epochs = min(clients, 30), min(rounds, 20), 1 if rounds > 10 else min(epochs, 2)
    return Scenario(
        task=task,
        model=model,
        num_clients=clients,
        clients_per_round=max(clients // 2, 10) if sampled else None,
        partition=SKEWS[rng.integers(len(SKEWS))],
        rounds=rounds,
        local_epochs=epochs,
        batch_size=int(rng.choice((10, 16, 32))),
        learning_rate=float(rng.choice((0.05, 0.1, 0.2))) * (5 if "chains" in task else 1),
        momentum=float(rng.choice((0.0, 0.0, 0.0, 0.5))),
    )


def attacked(number: int, count: int) -> list[Scenario]:
    """Returns attacked variants of a setting: attacks, numbers of attackers, poison rates and begins are drawn.

    Parameters
    ----------
    number : int
        Address of the setting.
    count : int
        How many.

    Examples
    --------
    >>> len(attacked(0, 3))
    3
    """
    base = setting(number)
    rng = np.random.default_rng([number, 1_000])
    menu = LABEL_ATTACKS if "chains" in base.task else IMAGE_ATTACKS + LABEL_ATTACKS
    most = max(int(0.42 * base.num_clients), 1)
    chosen = rng.permutation(len(menu))[:count] if count <= len(menu) else rng.integers(len(menu), size=count)
    variants = []
    for place in chosen:
        share = rng.choice((0.0, 0.1, 0.2, 0.4))
        variants.append(
            base.replace(
                attack=menu[place],
                num_malicious=min(max(round(share * base.num_clients), 1), most),
                poison_rate=float(rng.choice((0.3, 0.5, 1.0))),
                schedule={"from_round": {"first": int(rng.integers(0, max(base.rounds // 3, 1)))}},
                seed=int(rng.integers(10_000, 20_000)),
            )
        )
    return variants
