"""One federated run: sample, train, attack, record, filter, aggregate, measure."""

import shutil
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import nn
from tqdm import tqdm

from gradlens.aggregators import Aggregator, FilteredAggregator, filtered, step
from gradlens.log import InputError, LogWriter, ModelSpec, Round, UpdateLog
from gradlens.log.manifest import read_manifest
from gradlens.run import VERDICT_COLUMNS, Run
from simulations.attacks import Attack, Schedule, build_attack
from simulations.randomness import Stream, address
from simulations.scenario import Scenario, build, component_label
from simulations.tasks import Task, build_model, load_task
from simulations.training import (
    Dataset,
    LocalSGD,
    State,
    buffers,
    load_state,
    one_thread,
    predict,
    state_of,
    train_clients,
)


@dataclass(frozen=True, eq=False)
class Federation:
    """What a scenario is made of once its data are there; nothing in it changes from round to round.

    model: working space for training and measuring; honest: [client] the data that each client holds; poisoned:
    malicious client -> what it trains on while the attack is on; deviants: the malicious clients whose update
    then differs from an honest one.
    """

    scenario: Scenario
    task: Task
    model: nn.Module
    honest: list[Dataset]
    attack: Attack
    is_on: Schedule
    poisoned: Mapping[int, Dataset]
    deviants: frozenset[int]
    aggregate: Aggregator


def run(scenario: Scenario, path: Path | str, *, progress: bool = False) -> Run:
    """Simulates a scenario into the folder `path` and returns the closed run.

    An open run of the same scenario goes on after its last committed round, to the same bits as one that was
    never stopped; a closed one is returned as it is. The truth is written at the end. Metrics of a round:
    main_accuracy and asr after its aggregation (asr only under an attack with a target); seconds, of which
    train_seconds were local training and log_seconds the wait until the round before was on the disk.
    progress: show a bar. Raises InputError where the folder holds anything else, or task and attack do not fit.
    """
    folder = Path(path)
    found = _recorded(scenario, folder)
    if found is not None and found.is_closed:
        return found
    with one_thread():
        federation = assemble(scenario)
        with _writer(federation, folder, resume=found is not None) as writer, ThreadPoolExecutor(1) as disk:
            rounds, committed = range(len(writer.log), scenario.rounds), disk.submit(lambda: None)
            state = dict(writer.global_model)
            for index in tqdm(rounds, desc=folder.name, unit="round", leave=False, disable=not progress):
                state, commit = _play(federation, writer, index, state, committed)
                committed = disk.submit(commit)  # the disk works while the next round trains
            committed.result()
            if not (folder / "truth.arrow").exists():
                writer.add_truth(_truth(federation))
    return Run.open(folder)


def assemble(scenario: Scenario) -> Federation:
    """Loads and shares out the data, poisons those of the malicious clients, initialises the model.

    Raises InputError where the task is unknown or too small, or the attack does not fit it.
    """
    share = scenario.samples_per_client
    task = load_task(scenario.task, share and share * scenario.num_clients, scenario.seed)
    attack = build_attack(scenario.attack)
    check_attack(attack, task)
    parts = build("partition", scenario.partition)(
        task.y_train, scenario.num_clients, address(scenario.seed, Stream.PARTITION)
    )
    poisoned, deviants = {}, set()
    for client in malicious_clients(scenario).tolist():
        rng = address(scenario.seed, Stream.POISON, client=client)
        part = parts[client]
        images, labels, chosen = attack.poison(task.x_train[part], task.y_train[part], scenario.poison_rate, rng)
        poisoned[client] = (torch.from_numpy(images), torch.from_numpy(labels))
        if len(chosen) or attack.send is not None:
            deviants.add(client)
    aggregate = build("aggregator", scenario.aggregator)
    return Federation(
        scenario,
        task,
        build_model(task, scenario.model, scenario.seed),
        [(torch.from_numpy(task.x_train[part]), torch.from_numpy(task.y_train[part])) for part in parts],
        attack,
        build("schedule", scenario.schedule),
        poisoned,
        frozenset(deviants),
        filtered(aggregate, build("detector", scenario.detector)) if scenario.detector else aggregate,
    )


def client_names(scenario: Scenario) -> np.ndarray:
    """What the clients are called, str [client]: client-00, client-01, ..."""
    width = max(2, len(str(scenario.num_clients - 1)))
    return np.array([f"client-{number:0{width}d}" for number in range(scenario.num_clients)], dtype=np.str_)


def malicious_clients(scenario: Scenario) -> np.ndarray:
    """The malicious clients' numbers, int64, sorted: drawn at random, alike for equal seed and number of clients.

    Fewer malicious clients are among those of a larger number.
    """
    order = address(scenario.seed, Stream.MALICIOUS).permutation(scenario.num_clients)
    return np.sort(order[: scenario.num_malicious])


def participants(scenario: Scenario, index: int) -> np.ndarray:
    """The numbers of the clients that take part in a round, int64, sorted."""
    order = address(scenario.seed, Stream.PARTICIPANTS, index).permutation(scenario.num_clients)
    return np.sort(order[: scenario.clients_per_round])


def main_accuracy(task: Task, model: nn.Module, state: State) -> float:
    """The share of test images that the state of the model classifies rightly."""
    load_state(model, state)
    return float((predict(model, torch.tensor(task.x_test)) == task.y_test).mean())


def attack_success(task: Task, attack: Attack, model: nn.Module, state: State) -> float:
    """The share of eligible test images, stamped, that get the target label; NaN without a target."""
    if attack.target_label is None:
        return float("nan")
    load_state(model, state)
    attacked = attack.stamp(task.x_test[attack.eligible(task.y_test)])
    return float((predict(model, torch.from_numpy(attacked)) == attack.target_label).mean())


def check_attack(attack: Attack, task: Task) -> None:
    """Raises InputError where an attack cannot be carried out on a task."""
    if attack.target_label is None:
        return
    if attack.target_label >= task.num_classes:
        raise InputError(
            f"attack: task {task.name} has {task.num_classes} classes, the target is {attack.target_label}"
        )
    if not attack.eligible(task.y_test).any():
        raise InputError(f"attack: no test image of task {task.name} is eligible; does it have the source class?")
    attack.stamp(task.x_test[:1])


def _play(
    federation: Federation, writer: LogWriter, index: int, global_model: State, committed: Future[None]
) -> tuple[dict[str, np.ndarray], Callable[[], None]]:
    """One round: the next global model, and what commits the round. The round before is on the disk by then."""
    scenario, start = federation.scenario, time.perf_counter()
    clients = participants(scenario, index)
    updates = _sent(federation, clients, index, _trained(federation, clients, index, global_model))
    trained = time.perf_counter()
    committed.result()
    waited = time.perf_counter()
    counts = np.array([len(federation.honest[client][1]) for client in clients])
    round_ = Round(index, client_names(scenario)[clients], counts, updates, global_model, buffers=writer.model.buffers)
    log = writer.log.append(round_)
    next_global = step(global_model, federation.aggregate(log), scenario.server_learning_rate)
    metrics = {
        "main_accuracy": main_accuracy(federation.task, federation.model, next_global),
        "asr": attack_success(federation.task, federation.attack, federation.model, next_global),
        "seconds": time.perf_counter() - start,
        "train_seconds": trained - start,
        "log_seconds": waited - trained,
    }
    return next_global, partial(writer.commit, round_, next_global, verdict=_decided(federation, log), metrics=metrics)


def _trained(federation: Federation, clients: np.ndarray, index: int, global_model: State) -> dict[str, np.ndarray]:
    """The participants' updates as training left them, layer -> [client, *shape]."""
    scenario = federation.scenario
    poisoned = federation.poisoned if federation.is_on(index) else {}
    return train_clients(
        federation.model,
        global_model,
        [poisoned.get(client, federation.honest[client]) for client in clients.tolist()],
        [address(scenario.seed, Stream.BATCHES, index, client) for client in clients.tolist()],
        LocalSGD(scenario.local_epochs, scenario.batch_size, scenario.learning_rate, scenario.momentum),
    )


def _sent(
    federation: Federation, clients: np.ndarray, index: int, trained: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """The participants' updates as they are sent: those of malicious clients may be changed by the attack."""
    malicious = np.isin(clients, list(federation.poisoned))
    if federation.attack.send is None or not federation.is_on(index) or not malicious.any():
        return trained
    crafted = federation.attack.send(
        {name: update[malicious] for name, update in trained.items()},
        {name: update[~malicious] for name, update in trained.items()},
        address(federation.scenario.seed, Stream.ATTACK, index),
    )
    for name, update in trained.items():
        update[malicious] = crafted[name]
    return trained


def _decided(federation: Federation, log: UpdateLog) -> pd.DataFrame | None:
    """What the live filter, if there is one, decided in the last round."""
    if not isinstance(federation.aggregate, FilteredAggregator):
        return None
    verdict = federation.aggregate.verdict(log)
    kept = log[-1].clients[federation.aggregate.kept(log)]
    table = verdict.table(log[-1].index, component_label("detector", federation.scenario.detector))
    table = table.assign(kept=np.isin(verdict.clients, kept), null=verdict.null)
    return table[list(VERDICT_COLUMNS)]


def _truth(federation: Federation) -> pd.DataFrame:
    """Who was compromised, and which updates were poisoned: a row per round and participant."""
    scenario, names = federation.scenario, client_names(federation.scenario)
    rows = [
        (index, names[client], client in federation.poisoned, federation.is_on(index) and client in federation.deviants)
        for index in range(scenario.rounds)
        for client in participants(scenario, index).tolist()
    ]
    return pd.DataFrame(rows, columns=["round", "client", "compromised", "poisoned"])


def _writer(federation: Federation, folder: Path, *, resume: bool) -> LogWriter:
    if resume:
        return LogWriter.resume(folder)
    state = state_of(federation.model)
    model = ModelSpec.of(state, buffers=buffers(federation.model))
    return LogWriter.create(folder, model, state, scenario=federation.scenario.settings)


def _recorded(scenario: Scenario, folder: Path) -> Run | None:
    """The run of this scenario that lies in the folder; what a writer left that was stopped at its start is removed."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return None
    if _is_stillborn(folder):
        shutil.rmtree(folder)
        return None
    found = Run.open(folder)
    if found.scenario != scenario.settings:
        settings = Scenario(**found.scenario).settings if found.scenario else {}
        differing = [name for name, value in scenario.settings.items() if settings.get(name) != value]
        raise InputError(f"{folder}: holds the run of another scenario, which differs in {', '.join(differing)}")
    return found


def _is_stillborn(folder: Path) -> bool:
    """Whether all that a folder holds is what a writer leaves that was stopped before its first commit."""
    first = {"run.json", "manifest.jsonl", "globals/round-000000.arrow"}
    parts = {".run.json.part", "globals/.round-000000.arrow.part"}
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()}
    if not folder.is_dir() or not files <= first | parts:
        return False
    return "manifest.jsonl" not in files or not read_manifest(folder).lines
