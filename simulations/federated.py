"""One federated run: sample, train, attack, record, filter, aggregate, measure."""

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import nn
from tqdm import tqdm

from gradlens.aggregators import Aggregator, FilteredAggregator, FilterStopped, step
from gradlens.errors import InputError
from gradlens.log import LogWriter, ModelSpec, Round, UpdateLog
from gradlens.log.writer import is_stillborn
from gradlens.run import Run
from simulations.attacks import Attack, Pool, Reference, Situation, build_attack
from simulations.attacks.attack import unchanged
from simulations.cohorts import Cohort, client_names, cohorts, malicious_clients
from simulations.partition import Split
from simulations.randomness import Stream, address
from simulations.scenario import Scenario, build, component_label, live_filter
from simulations.tasks import Task, build_model, load_task
from simulations.training import (
    Dataset,
    Engine,
    LocalSGD,
    State,
    buffers,
    device_for,
    engine_for,
    load_state,
    one_thread,
    outputs,
    predict,
    prepared,
    state_of,
    torch_reference,
)

Goal = tuple[np.ndarray, np.ndarray]  # held-out attacked samples, and the label that each should get
Updates = dict[str, np.ndarray]  # layer -> [client, *shape]

LOOKED_AT = 64  # test samples on which a trigger is tried before the run
ASKED = 1_000  # samples at most on which attackers measure their own success


@dataclass(frozen=True, eq=False)
class Federation:
    """What a scenario is made of once its data are there; nothing in it changes from round to round.

    model: for measuring; honest: [client] the data that each client holds; poisoned: malicious client -> what it
    trains on when it attacks; chosen: malicious client -> which of those samples are poisoned; deviants: the
    malicious clients whose update then differs from an honest one; cohorts: [round].
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


def run(scenario: Scenario, path: Path | str, *, workers: int = 1, progress: bool = False) -> Run:
    """Simulates a scenario into the folder `path` and returns the closed run.

    An open run of the same scenario goes on after its last committed round, to the same bits as one that was
    never stopped; a closed one is returned as it is. The truth is written at the end. Metrics of a round:
    main_accuracy and asr after its aggregation (asr only under an attack on data); seconds, of which
    train_seconds were local training and log_seconds the wait until the round before was on the disk.
    workers: threads that train clients, which change no bit; progress: show a bar. Raises InputError where the
    folder holds anything else, or task, model and attack do not fit. Raises FilterStopped where the filter is told to
    stop: the round that made it stop is recorded, its global model stays, and a further call goes on after it.
    """
    folder = Path(path)
    found = _recorded(scenario, folder)
    if found is not None and found.is_closed:
        return found
    with one_thread():
        federation = assemble(scenario, workers)
        with _writer(federation, folder, resume=found is not None) as writer, ThreadPoolExecutor(1) as disk:
            rounds, committed = range(len(writer.log), scenario.rounds), disk.submit(lambda: None)
            state, before = dict(writer.global_model), writer.log[-1].global_model if len(writer.log) else None
            for index in tqdm(rounds, desc=folder.name, unit="round", leave=False, disable=not progress):
                following, commit = _play(federation, writer, index, state, before, committed)
                state, before = following, state
                committed = disk.submit(commit)  # the disk works while the next round trains
            committed.result()
            if not (folder / "truth.arrow").exists():
                writer.add_truth(_truth(federation))
    return Run.open(folder)


def assemble(scenario: Scenario, workers: int = 1) -> Federation:
    """Loads and shares out the data, poisons those of the malicious clients, initialises the model.

    Raises InputError where the task is unknown or too small, the attack does not fit it, changes no sample, or
    cannot be seen by the model, or the engine cannot train it.
    """
    task, attack = _task(scenario), build_attack(scenario.attack)
    split = _split(task, scenario)
    pool = _pool(task, split, attack, scenario)
    goal = attack.goal(task, pool)
    parts = split.train if pool is None else [np.setdiff1d(part, pool.given_up) for part in split.train]
    honest = [(torch.from_numpy(task.x_train[part]), torch.from_numpy(task.y_train[part])) for part in parts]
    poisoned, chosen = _poisoned(scenario, task, attack, parts, pool)
    differs = attack.send is not None or attack.train is not None
    deviants = frozenset(client for client in poisoned if differs or len(chosen[client]))
    if poisoned and not deviants:
        raise InputError(
            f"attack: {scenario.label('attack')} changes no sample of any malicious client: at poison_rate "
            f"{scenario.poison_rate:g} none of their eligible samples is poisoned, or they hold none"
        )
    device = str(device_for(scenario.device))
    bare = build_model(task, scenario.model, scenario.seed)
    model = prepared(bare, honest[0][0][:2], device)
    if poisoned:
        _check_visible(model, task, attack)
    settings = LocalSGD(
        scenario.local_epochs, scenario.batch_size, scenario.learning_rate, scenario.momentum, scenario.weight_decay
    )
    aggregate = build("aggregator", scenario.aggregator)
    final_weight = f"{task.final_layer}.weight" if task.final_layer and scenario.model == "own" else None
    return Federation(
        scenario,
        task,
        model,
        ModelSpec.of(state_of(model), buffers=buffers(model), final_weight=final_weight),
        engine_for(
            scenario.engine,
            bare,
            task.loss,
            settings,
            honest,
            rounds=scenario.rounds,
            device=device,
            workers=workers,
            largest=scenario.clients_per_round,
            key=None if scenario.model == "own" else (scenario.task, scenario.model),
        ),
        honest,
        attack,
        goal,
        poisoned,
        chosen,
        deviants,
        cohorts(scenario),
        _filtered(scenario, aggregate),
    )


def _filtered(scenario: Scenario, aggregate: Aggregator) -> Aggregator:
    """The rule behind the live filter, if there is one."""
    if not scenario.detector:
        return aggregate
    return live_filter(aggregate, scenario.detector, scenario.filter)


def attack_goal(scenario: Scenario) -> Goal:
    """What the success of a scenario's attack is measured on; nothing where it is none on data."""
    attack = build_attack(scenario.attack)
    task = tested(scenario) if attack.pool is None else _task(scenario)
    pool = None if attack.pool is None else _pool(task, _split(task, scenario), attack, scenario)
    return attack.goal(task, pool)


def tested(scenario: Scenario) -> Task:
    """The scenario's task with all its test samples, which are enough to measure on, and few to train on."""
    return load_task(scenario.task, None if ":" in scenario.task else 1)  # a user's own gives what it gives


def label_counts(scenario: Scenario) -> pd.DataFrame:
    """How many samples of each label every client holds, before any attack: client, label, count."""
    task = _task(scenario)
    names = client_names(scenario)
    rows = [
        (names[client], label, count)
        for client, part in enumerate(_split(task, scenario).train)
        for label, count in zip(
            task.label_names, np.bincount(task.y_train[part], minlength=task.num_classes).tolist(), strict=True
        )
    ]
    return pd.DataFrame(rows, columns=["client", "label", "count"])


def measure_of(scenario: Scenario) -> Callable[[State], dict[str, float]]:
    """A function of a global model, layer -> array: its main_accuracy, and asr under the scenario's attack."""
    federation = assemble(scenario)

    def measure(state: State) -> dict[str, float]:
        with one_thread():
            accuracy = main_accuracy(federation.task, federation.model, state)
            return {"main_accuracy": accuracy, "asr": attack_success(federation.goal, federation.model, state)}

    return measure


def main_accuracy(task: Task, model: nn.Module, state: State) -> float:
    """The share of test samples that the state of the model classifies rightly."""
    load_state(model, state)
    return float((predict(model, torch.tensor(task.x_test)) == task.y_test).mean())


def attack_success(goal: Goal, model: nn.Module, state: State) -> float:
    """The share of held-out attacked samples that get the label wanted for them; NaN where there are none."""
    x, labels = goal
    if not len(labels):
        return float("nan")
    load_state(model, state)
    return float((predict(model, torch.tensor(x)) == labels).mean())


def _task(scenario: Scenario) -> Task:
    share = scenario.samples_per_client
    return load_task(scenario.task, share and share * scenario.num_clients, scenario.seed)


def _split(task: Task, scenario: Scenario) -> Split:
    return build("partition", scenario.partition)(task, scenario.num_clients, address(scenario.seed, Stream.PARTITION))


def _pool(task: Task, split: Split, attack: Attack, scenario: Scenario) -> Pool | None:
    return None if attack.pool is None else attack.pool(task, split, address(scenario.seed, Stream.POOL))


def _poisoned(
    scenario: Scenario, task: Task, attack: Attack, parts: Sequence[np.ndarray], pool: Pool | None
) -> tuple[dict[int, Dataset], dict[int, np.ndarray]]:
    """What each malicious client trains on when it attacks, and which of those samples are poisoned."""
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


def _check_visible(model: nn.Module, task: Task, attack: Attack) -> None:
    """Raises InputError where a trigger changes no sample, or no answer of the model to any sample."""
    if attack.stamp is unchanged:
        return
    x = task.x_test[attack.eligible(task, task.x_test, task.y_test)][:LOOKED_AT]
    answers = torch.cat(list(outputs(model, torch.tensor(x))))
    for part in range(attack.parts):
        stamped = attack.stamp(task, x, part)
        which = f"part {part + 1} of the trigger" if attack.parts > 1 else "the trigger"
        if np.array_equal(stamped, x):
            raise InputError(f"attack: {which} changes none of {len(x)} test samples of task {task.name}")
        if torch.equal(torch.cat(list(outputs(model, torch.tensor(stamped)))), answers):
            raise InputError(
                f"attack: the model cannot see {which}: its answers to {len(x)} test samples of task {task.name} stay "
                "the same; a convolution with a stride may never read the last rows and columns"
            )


def _play(
    federation: Federation,
    writer: LogWriter,
    index: int,
    global_model: State,
    before: State | None,
    committed: Future[None],
) -> tuple[dict[str, np.ndarray], Callable[[], None]]:
    """One round: the next global model, and what commits the round. The round before is on the disk by then.

    before: the global model before the last round, None in the first.
    """
    scenario, cohort, start = federation.scenario, federation.cohorts[index], time.perf_counter()
    updates = _sent(federation, index, global_model, before)
    trained = time.perf_counter()
    committed.result()
    waited = time.perf_counter()
    counts = np.array([len(federation.honest[client][1]) for client in cohort.clients])
    names = client_names(scenario)[cohort.clients]
    round_ = Round(index, names, counts, updates, global_model, buffers=writer.model.buffers)
    log = writer.log.append(round_)
    try:
        update = federation.aggregate(log)
    except FilterStopped:  # what made it stop is evidence
        writer.commit(round_, global_model, verdict=_decided(federation, log))
        raise
    next_global = step(
        global_model, update, scenario.server_learning_rate,
        momentum=scenario.server_momentum, before=before, buffers=writer.model.buffers,
    )  # fmt: skip
    metrics = {
        "main_accuracy": main_accuracy(federation.task, federation.model, next_global),
        "asr": attack_success(federation.goal, federation.model, next_global),
        "seconds": time.perf_counter() - start,
        "train_seconds": trained - start,
        "log_seconds": waited - trained,
    }
    return next_global, partial(writer.commit, round_, next_global, verdict=_decided(federation, log), metrics=metrics)


def _sent(federation: Federation, index: int, global_model: State, before: State | None) -> Updates:
    """What arrives at the server in a round, layer -> [client, *shape]."""
    cohort = federation.cohorts[index]
    updates = _trained(federation, index, global_model, before)
    if federation.attack.send is not None and cohort.attacking.any():
        crafted = federation.attack.send(
            {name: update[cohort.attacking] for name, update in updates.items()},
            {name: update[~cohort.attacking] for name, update in updates.items()},
            _situation(federation, index, global_model, before),
        )
        for name, update in updates.items():
            update[cohort.attacking] = crafted[name]
    for update in updates.values():
        if np.issubdtype(update.dtype, np.floating):
            update[cohort.broken] = np.nan
    return updates


def _trained(federation: Federation, index: int, global_model: State, before: State | None) -> Updates:
    """What the cohort's training gives: attackers on their poisoned data, and in their own way if they have one."""
    cohort, training = federation.cohorts[index], federation.attack.train
    attacking = cohort.clients[cohort.attacking]
    data = {client: federation.poisoned[client] for client in attacking.tolist()}
    if training is None or not len(attacking):
        return _learned(federation, index, global_model, cohort.clients, data)
    updates = _learned(federation, index, global_model, cohort.clients[~cohort.attacking], {})
    honest = _learned(federation, index, global_model, attacking, {}) if training.needs_honest else None
    references = [_reference(federation, global_model, before, honest, row) for row in range(len(attacking))]
    poisoned = _learned(federation, index, global_model, attacking, data, training=training, references=references)
    order = np.argsort(np.concatenate([cohort.clients[~cohort.attacking], attacking]))
    return {name: np.concatenate([update, poisoned[name]])[order] for name, update in updates.items()}


def _learned(
    federation: Federation,
    index: int,
    global_model: State,
    clients: np.ndarray,
    data: Mapping[int, Dataset],
    **adaptation: object,
) -> Updates:
    """The updates of some clients, trained on their own data, or on what `data` has for them."""
    return federation.engine(
        global_model,
        [data.get(client, federation.honest[client]) for client in clients.tolist()],
        [address(federation.scenario.seed, Stream.BATCHES, index, client) for client in clients.tolist()],
        **adaptation,
    )


def _reference(
    federation: Federation, global_model: State, before: State | None, honest: Updates | None, row: int
) -> Reference:
    """What the training hooks of one attacker may look at."""
    names, change = federation.spec.parameters, _change(global_model, before)
    previous = {name: torch.tensor(change[name] if change else np.zeros_like(global_model[name])) for name in names}
    own = {} if honest is None else {name: torch.from_numpy(honest[name][row]) for name in names}
    return torch_reference(previous, own, federation.spec.final_weight, federation.spec.final_bias, federation.model)


def _situation(federation: Federation, index: int, global_model: State, before: State | None) -> Situation:
    """What the attackers of a round know when they send."""
    scenario, cohort = federation.scenario, federation.cohorts[index]
    attacking = cohort.clients[cohort.attacking]
    poisoned = [(federation.poisoned[client], federation.chosen[client]) for client in attacking.tolist()]
    x = torch.cat([x[chosen] for (x, _), chosen in poisoned])[:ASKED]
    wanted = torch.cat([y[chosen] for (_, y), chosen in poisoned])[:ASKED].numpy()

    def success(update: State) -> float:
        return attack_success((x.numpy(), wanted), federation.model, step(global_model, update))

    return Situation(
        index,
        global_model,
        _change(global_model, before),
        len(cohort.clients),
        scenario.server_learning_rate,
        federation.spec,
        cache(partial(_learned, federation, index, global_model, attacking, {})),
        success,
        address(scenario.seed, Stream.ATTACK, index),
    )


def _change(global_model: State, before: State | None) -> dict[str, np.ndarray] | None:
    """The last change of the global model, None in the first round."""
    return None if before is None else {name: array - before[name] for name, array in global_model.items()}


def _decided(federation: Federation, log: UpdateLog) -> pd.DataFrame | None:
    """What the live filter, if there is one, decided in the last round."""
    if not isinstance(federation.aggregate, FilteredAggregator):
        return None
    decision = federation.aggregate.decision(log)
    return decision.table(log[-1].index, component_label("detector", federation.scenario.detector))


def _truth(federation: Federation) -> pd.DataFrame:
    """Who was compromised, and which updates were poisoned: a row per round and client whose update arrived."""
    names = client_names(federation.scenario)
    rows = [
        (index, names[client], client in federation.poisoned, bool(attacks) and client in federation.deviants)
        for index, cohort in enumerate(federation.cohorts)
        for client, attacks in zip(cohort.clients.tolist(), cohort.attacking, strict=True)
    ]
    return pd.DataFrame(rows, columns=["round", "client", "compromised", "poisoned"])


def _writer(federation: Federation, folder: Path, *, resume: bool) -> LogWriter:
    if resume:
        return LogWriter.resume(folder)
    state = state_of(federation.model)
    return LogWriter.create(folder, federation.spec, state, scenario=federation.scenario.settings)


def _recorded(scenario: Scenario, folder: Path) -> Run | None:
    """The run of this scenario that lies in the folder, if any was begun."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())) or is_stillborn(folder):
        return None
    found = Run.open(folder)
    if found.scenario != scenario.settings:
        settings = Scenario(**found.scenario).settings if found.scenario else {}
        wanted = scenario.settings
        differing = [name for name in Scenario.model_fields if settings.get(name) != wanted.get(name)]
        raise InputError(f"{folder}: holds the run of another scenario, which differs in {', '.join(differing)}")
    return found
