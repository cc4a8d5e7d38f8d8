"""What a simulated run is about, in words: the attack, the task, the partition and the way clients are drawn."""

from collections.abc import Iterable
from functools import cache

import pandas as pd

from gradlens.errors import InputError
from gradlens.run import Sweep
from simulations import Scenario
from simulations.tasks import load_task

CELL = ["task", "setting", "partition", "family"]  # the columns that name a cell of the gauntlet
TASK_NAMES = {
    "fashion_mnist": "Fashion-MNIST",
    "digits": "digits",
    "shakespeare_speakers": "speakers (LoRA)",
    "shakespeare_words": "next word (LoRA)",
}
ADAPTIVE = {  # attacks made to pass for benign
    "constrain_and_scale", "norm_bound", "layer_substitution", "train_and_scale", "hiding", "a_little_is_enough",
    "min_max", "min_sum", "mimic",
}  # fmt: skip
PLAIN_TRIGGERS = {"trigger", "phrase_trigger"}
UNCAPPED = {"constrain_and_scale", "norm_bound", "layer_substitution", "hiding"}  # those that can outgrow benign norms
PARTITION_NAMES = {"iid": "iid", "dirichlet": "Dirichlet 0.5", "writer": "by role"}


def main_part(attack: Iterable[str]) -> str:
    """The part of an attack that a figure is about; "none" without an attack.

    That is the first part, the one that poisons data; beside a plain trigger it is what the trigger is combined with. A
    cap on the norm is never what a figure is about.

    Examples
    --------
    >>> main_part(["label_flip", "scaling"])
    'label_flip'
    >>> main_part(["trigger", "norm_bound", "scaling"])
    'norm_bound'
    """
    first, *others = [name for name in attack if name != "norm_cap"] or ["none"]
    if first not in PLAIN_TRIGGERS or not others:
        return first
    return next((name for name in others if name != "scaling"), "scaling")


def family(attack: Iterable[str]) -> str:
    """The family of an attack in the gauntlet: its main part, marked as loud where no cap keeps it to benign norms.

    That concerns adaptive attacks alone, which claim to pass for benign.

    Examples
    --------
    >>> family(["trigger", "norm_bound", "scaling"])
    'norm_bound (loud)'
    >>> family(["trigger", "norm_bound", "scaling", "norm_cap"])
    'norm_bound'
    """
    parts = list(attack)
    name = main_part(parts)
    return f"{name} (loud)" if name in UNCAPPED and "norm_cap" not in parts else name


def cell_of(scenario: Scenario) -> dict[str, str]:
    """The cell of the gauntlet that a run belongs to: `CELL` -> value."""
    alternating = ", every third round" if "alternating" in scenario.schedule else ""
    return {
        "task": scenario.task,
        "setting": ("sampled" if scenario.clients_per_round else "full") + alternating,
        "partition": next(iter(scenario.partition)),
        "family": family(scenario.attack),
    }


@cache
def is_here(task: str) -> bool:
    """Whether the data of a task are on this machine."""
    try:
        load_task(task)
    except InputError:
        return False
    return True


def control_asr(sweep: Sweep) -> pd.Series:
    """Attacked run -> attack success rate of its attack-free control after the last round."""
    return sweep.controls.sort_values("round").groupby("run")["asr"].last()
