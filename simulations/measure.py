"""Measures of a simulated run: main accuracy, attack success rate (ASR), and the labels that each client holds."""

from collections.abc import Callable

import numpy as np
import pandas as pd
import torch
from torch import nn

from gradlens.names import FUNCTION
from simulations.assemble import Goal, assemble, pool_of, split_of, task_of
from simulations.attacks import build_attack
from simulations.cohorts import client_names
from simulations.scenario import Scenario
from simulations.tasks import Task, load_task
from simulations.training import State, load_state, one_thread, predict


def measure_of(scenario: Scenario) -> Callable[[State], dict[str, float]]:
    """Returns a function that measures a global model as a run of the scenario would.

    Parameters
    ----------
    scenario : Scenario
        Names the task, the model and the attack.

    Returns
    -------
    callable
        (layer -> array) -> `{"main_accuracy": ..., "asr": ...}`, both shares of test samples; asr is NaN without an
        attack on data.

    Raises
    ------
    InputError
        As `assemble`.

    Examples
    --------
    >>> from simulations import Scenario
    >>> from simulations.assemble import assemble
    >>> from simulations.training import state_of
    >>> scenario = Scenario(attack={"trigger": {"size": 3}}, num_malicious=2)
    >>> sorted(measure_of(scenario)(state_of(assemble(scenario).model)))
    ['asr', 'main_accuracy']
    """
    federation = assemble(scenario)

    def measure(state: State) -> dict[str, float]:
        with one_thread():
            accuracy = main_accuracy(federation.task, federation.model, state)
            return {"main_accuracy": accuracy, "asr": attack_success(federation.goal, federation.model, state)}

    return measure


def main_accuracy(task: Task, model: nn.Module, state: State) -> float:
    """Returns the accuracy of a global model on the task's test samples.

    Parameters
    ----------
    task : Task
        Gives the test samples.
    model : torch.nn.Module
        Its weights are overwritten by the state's.
    state : Mapping of str to array
        Layer -> array.

    Returns
    -------
    float
        The share of test samples that are classified correctly.

    Examples
    --------
    >>> from simulations.tasks import build_model
    >>> from simulations.training import state_of
    >>> task = load_task("digits")
    >>> model = build_model(task, "mlp")
    >>> 0.0 <= main_accuracy(task, model, state_of(model)) <= 1.0
    True
    """
    load_state(model, state)
    return float((predict(model, torch.tensor(task.x_test)) == task.y_test).mean())


def attack_success(goal: Goal, model: nn.Module, state: State) -> float:
    """Returns the attack success rate (ASR) on a global model.

    Parameters
    ----------
    goal : tuple of array
        Held-out attacked samples, and the label that the attacker wants for each; from `attack_goal`.
    model : torch.nn.Module
        Its weights are overwritten by the state's.
    state : Mapping of str to array
        Layer -> array.

    Returns
    -------
    float
        The share of these samples that get the label; NaN without samples.

    Examples
    --------
    >>> from simulations import Scenario
    >>> from simulations.tasks import build_model, load_task
    >>> from simulations.training import state_of
    >>> goal = attack_goal(Scenario(attack="label_flip", num_malicious=2))
    >>> model = build_model(load_task("digits"), "mlp")
    >>> 0.0 <= attack_success(goal, model, state_of(model)) <= 1.0
    True
    """
    x, labels = goal
    if not len(labels):
        return float("nan")
    load_state(model, state)
    return float((predict(model, torch.tensor(x)) == labels).mean())


def attack_goal(scenario: Scenario) -> Goal:
    """Returns the samples on which the success of a scenario's attack is measured.

    Parameters
    ----------
    scenario : Scenario
        Names the task and the attack.

    Returns
    -------
    tuple of array
        Held-out attacked samples, and the label that the attacker wants for each; none without an attack on data.

    Examples
    --------
    >>> from simulations import Scenario
    >>> x, labels = attack_goal(Scenario(attack="label_flip", num_malicious=2))
    >>> len(x) == len(labels), set(labels.tolist())
    (True, {5})
    """
    attack = build_attack(scenario.attack)
    task = measuring_task(scenario) if attack.pool is None else task_of(scenario)
    pool = None if attack.pool is None else pool_of(task, split_of(task, scenario), attack, scenario)
    return attack.goal(task, pool)


def measuring_task(scenario: Scenario) -> Task:
    """Returns the scenario's task with all its test samples and as few training samples as possible."""
    # a task that is a function of the user's decides itself how many samples it has
    return load_task(scenario.task, None if FUNCTION.fullmatch(scenario.task) else 1)


def label_counts(scenario: Scenario) -> pd.DataFrame:
    """Counts how many samples of each label every client holds, before any attack.

    Parameters
    ----------
    scenario : Scenario
        Names the task and the partition.

    Returns
    -------
    pandas.DataFrame
        Columns client, label and count; a row per client and label.

    Examples
    --------
    >>> from simulations import Scenario
    >>> counts = label_counts(Scenario(num_clients=10, partition="dirichlet"))
    >>> int(counts["count"].sum())
    1437
    """
    task = task_of(scenario)
    names = client_names(scenario)
    rows = [
        (names[client], label, count)
        for client, part in enumerate(split_of(task, scenario).train)
        for label, count in zip(
            task.label_names, np.bincount(task.y_train[part], minlength=task.num_classes).tolist(), strict=True
        )
    ]
    return pd.DataFrame(rows, columns=["client", "label", "count"])
