"""The rounds of a run: clients train, attackers attack, the server filters and aggregates, and all is recorded."""

import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from gradlens.aggregators import FilteredAggregator, FilterStopped, step
from gradlens.errors import InputError
from gradlens.log import LogWriter, Round, UpdateLog
from gradlens.log.writer import is_stillborn
from gradlens.run import Run
from simulations.assemble import Federation, assemble
from simulations.attacks import Reference, Situation
from simulations.cohorts import client_names
from simulations.components import component_label
from simulations.measure import attack_success, main_accuracy
from simulations.randomness import Stream, address
from simulations.scenario import Scenario
from simulations.training import Dataset, State, one_thread, state_of, torch_reference

Updates = dict[str, np.ndarray]  # layer -> [client, *shape]

SUCCESS_SAMPLES = 1_000  # samples at most on which attackers measure their own success


@dataclass(frozen=True, eq=False)
class Start:
    """The start of a round.

    Attributes
    ----------
    index : int
        Number of the round, from 0.
    global_model : Mapping of str to array
        Layer -> array, before the round.
    before : Mapping of str to array or None
        The global model before the last round; None in the first round.

    Examples
    --------
    >>> Start(1, {"fc.bias": np.array([3.0])}, {"fc.bias": np.array([1.0])}).change
    {'fc.bias': array([2.])}
    """

    index: int
    global_model: State
    before: State | None

    @property
    def change(self) -> dict[str, np.ndarray] | None:
        """The last change of the global model; None in the first round."""
        before = self.before
        return None if before is None else {name: array - before[name] for name, array in self.global_model.items()}


def run(scenario: Scenario, path: Path | str, *, workers: int = 1, progress: bool = False) -> Run:
    """Simulates a scenario into a folder and returns the closed run.

    An open run of the same scenario is continued after its last committed round and ends with the same bits as one that
    was never interrupted; a closed one is returned as it is. The ground truth is written at the end.

    Parameters
    ----------
    scenario : Scenario
        The settings.
    path : Path or str
        The folder of the run.
    workers : int
        Threads that train clients; the number does not change any result.
    progress : bool
        Whether to show a progress bar.

    Returns
    -------
    Run
        Its metrics of a round are main_accuracy and asr after the aggregation (asr only under an attack on data), and
        seconds, of which train_seconds were local training and log_seconds the wait for the disk.

    Raises
    ------
    InputError
        If the folder holds anything else, or task, model and attack do not fit together.
    FilterStopped
        If the filter is set to stop in such a round. The round is recorded, the global model stays as it was before it,
        and a further call continues after it.

    Examples
    --------
    >>> import tempfile
    >>> from simulations import Scenario
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     recorded = run(Scenario(rounds=2, num_clients=5), folder)
    ...     len(recorded.log), recorded.is_closed
    (2, True)
    """
    folder = Path(path)
    recorded = _recorded(scenario, folder)
    if recorded is not None and recorded.is_closed:
        return recorded
    with one_thread():
        federation = assemble(scenario, workers)
        with _writer(federation, folder, resume=recorded is not None) as writer, ThreadPoolExecutor(1) as disk:
            rounds, committed = range(len(writer.log), scenario.rounds), disk.submit(lambda: None)
            state, before = dict(writer.global_model), writer.log[-1].global_model if len(writer.log) else None
            for index in tqdm(rounds, desc=folder.name, unit="round", leave=False, disable=not progress):
                following, commit = _play(federation, writer, Start(index, state, before), committed)
                state, before = following, state
                committed = disk.submit(commit)  # the disk works while the next round trains
            committed.result()
            if not (folder / "truth.arrow").exists():
                writer.add_truth(_truth(federation))
    return Run.open(folder)


def _play(
    federation: Federation, writer: LogWriter, start: Start, committed: Future[None]
) -> tuple[dict[str, np.ndarray], Callable[[], None]]:
    """Plays one round, and waits until the round before is committed.

    Returns the next global model, and a function that commits this round.
    """
    scenario, cohort, started = federation.scenario, federation.cohorts[start.index], time.perf_counter()
    updates = _sent(federation, start)
    trained = time.perf_counter()
    committed.result()
    waited = time.perf_counter()
    counts = np.array([len(federation.honest[client][1]) for client in cohort.clients])
    names = client_names(scenario)[cohort.clients]
    round_ = Round(start.index, names, counts, updates, start.global_model, buffers=writer.model.buffers)
    log = writer.log.append(round_)
    try:
        update = federation.aggregate(log)
    except FilterStopped:  # the round that made it stop is evidence
        writer.commit(round_, start.global_model, verdict=_decision(federation, log))
        raise
    next_global = step(
        start.global_model, update, scenario.server_learning_rate,
        momentum=scenario.server_momentum, before=start.before, buffers=writer.model.buffers,
    )  # fmt: skip
    metrics = {
        "main_accuracy": main_accuracy(federation.task, federation.model, next_global),
        "asr": attack_success(federation.goal, federation.model, next_global),
        "seconds": time.perf_counter() - started,
        "train_seconds": trained - started,
        "log_seconds": waited - trained,
    }
    return next_global, partial(writer.commit, round_, next_global, verdict=_decision(federation, log), metrics=metrics)


def _sent(federation: Federation, start: Start) -> Updates:
    """The updates that arrive at the server in a round, layer -> [client, *shape]."""
    cohort = federation.cohorts[start.index]
    updates = _trained(federation, start)
    if federation.attack.send is not None and cohort.attacking.any():
        crafted = federation.attack.send(
            {name: update[cohort.attacking] for name, update in updates.items()},
            {name: update[~cohort.attacking] for name, update in updates.items()},
            _situation(federation, start),
        )
        for name, update in updates.items():
            update[cohort.attacking] = crafted[name]
    for update in updates.values():
        if np.issubdtype(update.dtype, np.floating):
            update[cohort.broken] = np.nan
    return updates


def _trained(federation: Federation, start: Start) -> Updates:
    """The cohort's trained updates: attackers use their poisoned data, and their own training if they have one."""
    cohort, training = federation.cohorts[start.index], federation.attack.train
    attacking = cohort.clients[cohort.attacking]
    data = {client: federation.poisoned[client] for client in attacking.tolist()}
    if training is None or not len(attacking):
        return _learned(federation, start, cohort.clients, data)
    updates = _learned(federation, start, cohort.clients[~cohort.attacking], {})
    honest = _learned(federation, start, attacking, {}) if training.needs_honest else None
    references = [_reference(federation, start, honest, row) for row in range(len(attacking))]
    poisoned = _learned(federation, start, attacking, data, training=training, references=references)
    order = np.argsort(np.concatenate([cohort.clients[~cohort.attacking], attacking]))
    return {name: np.concatenate([update, poisoned[name]])[order] for name, update in updates.items()}


def _learned(
    federation: Federation, start: Start, clients: np.ndarray, data: Mapping[int, Dataset], **adaptation: object
) -> Updates:
    """The updates of some clients, trained on the data that `data` holds for them, or else on their clean data."""
    return federation.engine(
        start.global_model,
        [data.get(client, federation.honest[client]) for client in clients.tolist()],
        [address(federation.scenario.seed, Stream.BATCHES, start.index, client) for client in clients.tolist()],
        **adaptation,
    )


def _reference(federation: Federation, start: Start, honest: Updates | None, row: int) -> Reference:
    """What the training hooks of one attacker may look at."""
    names = federation.spec.parameters
    change = start.change or {name: np.zeros_like(start.global_model[name]) for name in names}
    previous = {name: torch.tensor(change[name]) for name in names}
    benign = {} if honest is None else {name: torch.from_numpy(honest[name][row]) for name in names}
    return torch_reference(previous, benign, federation.spec.final_weight, federation.spec.final_bias, federation.model)


def _situation(federation: Federation, start: Start) -> Situation:
    """What the attackers of a round know when they craft their updates."""
    scenario, cohort = federation.scenario, federation.cohorts[start.index]
    attacking = cohort.clients[cohort.attacking]
    poisoned = [(federation.poisoned[client], federation.chosen[client]) for client in attacking.tolist()]
    x = torch.cat([x[chosen] for (x, _), chosen in poisoned])[:SUCCESS_SAMPLES]
    wanted = torch.cat([y[chosen] for (_, y), chosen in poisoned])[:SUCCESS_SAMPLES].numpy()

    def success(update: State) -> float:
        return attack_success((x.numpy(), wanted), federation.model, step(start.global_model, update))

    return Situation(
        start.index,
        start.global_model,
        start.change,
        len(cohort.clients),
        scenario.server_learning_rate,
        federation.spec,
        cache(partial(_learned, federation, start, attacking, {})),
        success,
        address(scenario.seed, Stream.ATTACK, start.index),
    )


def _decision(federation: Federation, log: UpdateLog) -> pd.DataFrame | None:
    """The live filter's decision in the last round, as a table; None without a filter."""
    if not isinstance(federation.aggregate, FilteredAggregator):
        return None
    decision = federation.aggregate.decision(log)
    return decision.table(log[-1].index, component_label("detector", federation.scenario.detector))


def _truth(federation: Federation) -> pd.DataFrame:
    """The ground truth, who was compromised and which updates were poisoned: a row per round and recorded client."""
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
    """The run of this scenario that was begun in the folder; None without one. Code that it names is not imported."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())) or is_stillborn(folder):
        return None
    recorded = Run.open(folder)
    if recorded.scenario != scenario.settings:
        recorded_settings = Scenario().settings | recorded.scenario if recorded.scenario else {}
        settings = scenario.settings
        differing = [name for name in Scenario.model_fields if recorded_settings.get(name) != settings.get(name)]
        raise InputError(f"{folder}: holds the run of another scenario, which differs in {', '.join(differing)}")
    return recorded
