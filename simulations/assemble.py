"""Assembles a scenario before its first round: data, model, clients, attackers, engine and server rule."""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from gradlens.aggregators import Aggregator
from gradlens.errors import InputError
from gradlens.log import ModelSpec
from simulations.attacks import Attack, Pool, build_attack
from simulations.attacks.attack import unchanged
from simulations.cohorts import Cohort, cohorts, malicious_clients
from simulations.components import build, live_filter
from simulations.partition import Split
from simulations.randomness import Stream, address
from simulations.scenario import Scenario
from simulations.starting_model import pretrained, servers_samples, with_adapters
from simulations.tasks import Task, build_model, load_task, without_samples
from simulations.training import (
    Dataset,
    Engine,
    LocalSGD,
    buffers,
    device_for,
    engine_for,
    load_state,
    outputs,
    prepared,
    state_of,
)

Goal = tuple[np.ndarray, np.ndarray]  # held-out attacked samples, and the label that each should get

VISIBILITY_SAMPLES = 64  # test samples on which a trigger is tried before the run


@dataclass(frozen=True, eq=False)
class Federation:
    """A scenario once its data are loaded: everything that stays the same from round to round.

    Parameters
    ----------
    scenario : Scenario
        The settings.
    task : Task
        The data.
    model : torch.nn.Module
        The model on which global models are evaluated; its weights are overwritten.
    spec : ModelSpec
        Its layers.
    engine : callable
        Trains clients; see `simulations.training.engine_for`.
    honest : list of (x, y) tensors
        The clean data of each client, [client].
    attack : Attack
        What malicious clients do.
    goal : tuple of array
        Held-out attacked samples and the label that each should get.
    poisoned : Mapping of int to (x, y) tensors
        Malicious client -> the data that it trains on when it attacks.
    chosen : Mapping of int to array
        Malicious client -> positions of its poisoned samples.
    deviants : frozenset of int
        The malicious clients whose update differs from an honest one when they attack.
    cohorts : list of Cohort
        The clients that take part, [round].
    aggregate : callable
        The server's rule, behind the live filter where there is one.

    Examples
    --------
    >>> from simulations import Scenario
    >>> federation = assemble(Scenario(num_clients=10, attack="trigger", num_malicious=2))
    >>> len(federation.honest), len(federation.poisoned), federation.attack
    (10, 2, trigger(target_label=1, size=4, row=2, column=2, value=1.0))
    """

    scenario: Scenario
    task: Task
    model: nn.Module
    spec: ModelSpec
    engine: Engine
    honest: list[Dataset]
    attack: Attack
    goal: Goal
    poisoned: Mapping[int, Dataset]
    chosen: Mapping[int, np.ndarray]
    deviants: frozenset[int]
    cohorts: list[Cohort]
    aggregate: Aggregator


def assemble(scenario: Scenario, workers: int = 1) -> Federation:
    """Loads and partitions the data, poisons those of the malicious clients, and initializes the model.

    Parameters
    ----------
    scenario : Scenario
        The settings.
    workers : int
        Threads that train clients; the number does not change any result.

    Returns
    -------
    Federation
        The assembled scenario.

    Raises
    ------
    InputError
        If the task is unknown or too small; if its own model does not answer a number per class; if the attack does not
        fit it, changes no sample, or changes no output of the model; or if the engine cannot train the model.

    Examples
    --------
    >>> from simulations import Scenario
    >>> len(assemble(Scenario(num_clients=10, rounds=3)).cohorts)
    3
    """
    task, attack = task_of(scenario), build_attack(scenario.attack)
    split = split_of(task, scenario)
    pool = pool_of(task, split, attack, scenario)
    goal = attack.goal(task, pool)
    parts = split.train if pool is None else [np.setdiff1d(part, pool.given_up) for part in split.train]
    honest = [(torch.from_numpy(task.x_train[part]), torch.from_numpy(task.y_train[part])) for part in parts]
    poisoned, chosen = _poisoned(scenario, task, attack, parts, pool)
    deviants = _deviants(scenario, attack, chosen)
    untrained = model_of(scenario)
    model = prepared(untrained, honest[0][0][:2], device_for(scenario.device))
    if poisoned:
        _check_visible(model, task, attack)
    final_layer = task.final_layer if scenario.model == "own" and not scenario.adapters else None
    return Federation(
        scenario,
        task,
        model,
        ModelSpec.of(state_of(model), buffers=buffers(model), final_layer=final_layer),
        _engine(scenario, untrained, task, honest, workers),
        honest,
        attack,
        goal,
        poisoned,
        chosen,
        deviants,
        cohorts(scenario),
        _server_rule(scenario),
    )


def task_of(scenario: Scenario) -> Task:
    """Returns the scenario's task, with the training samples that are partitioned among its clients.

    Examples
    --------
    >>> from simulations import Scenario
    >>> len(task_of(Scenario(num_clients=10, samples_per_client=50)).y_train)
    500
    """
    task = _all_of(scenario)
    if scenario.pretraining is None:
        return task
    return without_samples(task, servers_samples(task, scenario.pretraining, scenario.seed))


def _all_of(scenario: Scenario) -> Task:
    """The scenario's task, with the training samples of the server and the clients."""
    share, servers = scenario.samples_per_client, scenario.pretraining.samples if scenario.pretraining else 0
    return load_task(scenario.task, share and share * scenario.num_clients + servers, scenario.seed)


def model_of(scenario: Scenario) -> nn.Module:
    """Returns the model that a scenario's federation starts from, on the CPU.

    Parameters
    ----------
    scenario : Scenario
        Names the task, the model, the seed, and the server's training and the adapters if there are any.

    Raises
    ------
    InputError
        As `build_model`, `pretrained` and `with_adapters`; or if a task's own model does not answer a number per class.

    Examples
    --------
    >>> from simulations import Scenario
    >>> list(state_of(model_of(Scenario(adapters={"modules": ["fc1"]}))))
    ['fc1.lora_A.weight', 'fc1.lora_B.weight']
    """
    task, seed = _all_of(scenario), scenario.seed
    model = build_model(task, scenario.model, seed)
    if scenario.model == "own":
        _check_answers(model, task)
    if scenario.pretraining is not None:
        load_state(model, pretrained(task, scenario.model, seed, scenario.pretraining, scenario.device))  # type: ignore[arg-type]
    return model if scenario.adapters is None else with_adapters(model, scenario.adapters, seed)


def split_of(task: Task, scenario: Scenario) -> Split:
    """Returns which training samples each client holds.

    Parameters
    ----------
    task : Task
        The data.
    scenario : Scenario
        Names the partition, the number of clients and the seed.

    Returns
    -------
    Split
        Positions of training samples of every client.

    Raises
    ------
    InputError
        If the partition does not fit the task, or a partition of the user's own leaves a client without samples.

    Examples
    --------
    >>> from simulations import Scenario
    >>> scenario = Scenario(num_clients=10)
    >>> len(split_of(task_of(scenario), scenario).train)
    10
    """
    partition = build("partition", scenario.partition)
    split = partition(task, scenario.num_clients, address(scenario.seed, Stream.PARTITION))
    name = next(iter(scenario.partition))
    if not isinstance(split, Split):
        raise InputError(f"partition: {name} must return a Split, found a {type(split).__name__}")
    if len(split.train) != scenario.num_clients or not all(len(part) for part in split.train):
        raise InputError(f"partition: {name} must give each of {scenario.num_clients} clients at least one sample")
    return split


def pool_of(task: Task, split: Split, attack: Attack, scenario: Scenario) -> Pool | None:
    """Returns the additional samples that the attackers bring; None if the attack needs none."""
    return None if attack.pool is None else attack.pool(task, split, address(scenario.seed, Stream.POOL))


def _poisoned(
    scenario: Scenario, task: Task, attack: Attack, parts: Sequence[np.ndarray], pool: Pool | None
) -> tuple[dict[int, Dataset], dict[int, np.ndarray]]:
    """The data that each malicious client trains on when it attacks, and which of those samples are poisoned."""
    poisoned, chosen = {}, {}
    for number, client in enumerate(malicious_clients(scenario).tolist()):
        x, y, chosen[client] = attack.poison(
            task.x_train[parts[client]],
            task.y_train[parts[client]],
            scenario.poison_rate,
            address(scenario.seed, Stream.POISON, client=client),
            task=task,
            part=number,
            pool=pool,
        )
        poisoned[client] = (torch.from_numpy(x), torch.from_numpy(y))
    return poisoned, chosen


def _deviants(scenario: Scenario, attack: Attack, chosen: Mapping[int, np.ndarray]) -> frozenset[int]:
    """The malicious clients whose update the attack changes; raises InputError if it changes nobody's."""
    always = attack.deviates_without_poison
    deviants = frozenset(client for client, positions in chosen.items() if always or len(positions))
    if chosen and not deviants:
        raise InputError(
            f"attack: {scenario.label('attack')} changes no sample of any malicious client: at poison_rate "
            f"{scenario.poison_rate:g} none of their eligible samples is poisoned, or they hold none"
        )
    return deviants


def _check_answers(model: nn.Module, task: Task) -> None:
    """Raises InputError where a task's own model answers anything but a float32 number per sample and class."""
    if any(isinstance(parameter, nn.parameter.UninitializedParameter) for parameter in model.parameters()):
        raise InputError("model: it has lazy layers of unknown shapes: call it once on a sample where it is built")
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            answer = deepcopy(model).eval()(torch.tensor(task.x_train[:2]))
    except Exception as error:  # whatever a model of the user's own does
        reason = next(iter(str(error).splitlines()), repr(error))
        raise InputError(f"model: it cannot answer 2 samples of task {task.name}: {reason:.200}") from error
    if isinstance(answer, torch.Tensor):
        found, fits = f"{answer.dtype} {list(answer.shape)}".removeprefix("torch."), answer.dtype == torch.float32
        fits = fits and tuple(answer.shape) in ((2, task.num_classes), (2, 1) if task.num_classes == 2 else ())
    else:
        found, fits = f"a {type(answer).__name__}", False
    if not fits:
        expected = f"float32 [sample, class], [2, {task.num_classes}] for 2 samples of task {task.name}"
        raise InputError(f"model: it must answer {expected}, found {found}")


def _check_visible(model: nn.Module, task: Task, attack: Attack) -> None:
    """Raises InputError if a trigger changes no sample, or no output of the model for any sample."""
    if attack.stamp is unchanged:
        return
    x = task.x_test[attack.eligible(task, task.x_test, task.y_test)][:VISIBILITY_SAMPLES]
    clean = torch.cat(list(outputs(model, torch.tensor(x))))
    for part in range(attack.parts):
        stamped = attack.stamp(task, x, part)
        which = f"part {part + 1} of the trigger" if attack.parts > 1 else "the trigger"
        if np.array_equal(stamped, x):
            raise InputError(f"attack: {which} changes none of {len(x)} test samples of task {task.name}")
        if torch.equal(torch.cat(list(outputs(model, torch.tensor(stamped)))), clean):
            raise InputError(
                f"attack: the model cannot see {which}: its outputs for {len(x)} test samples of task {task.name} stay "
                "the same; a convolution with a stride may never read the last rows and columns"
            )


def _engine(scenario: Scenario, model: nn.Module, task: Task, honest: list[Dataset], workers: int) -> Engine:
    settings = LocalSGD(
        scenario.local_epochs, scenario.batch_size, scenario.learning_rate, scenario.momentum, scenario.weight_decay
    )
    return engine_for(
        scenario.engine,
        model,
        task.loss,
        settings,
        honest,
        rounds=scenario.rounds,
        device=str(device_for(scenario.device)),
        workers=workers,
        largest=scenario.clients_per_round,
        key=None if scenario.model == "own" or scenario.adapters else (scenario.task, scenario.model),
    )


def _server_rule(scenario: Scenario) -> Aggregator:
    """The aggregation rule, behind the live filter where there is one."""
    rule = build("aggregator", scenario.aggregator)
    return live_filter(rule, scenario.detector, scenario.filter) if scenario.detector else rule
