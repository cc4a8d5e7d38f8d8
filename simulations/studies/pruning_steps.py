"""What the steps of Wu et al. 2020, arXiv:2011.01767, leave of a backdoor: figures of each run, for `pruning.csv`.

Each step is taken on the last global model of every run: clients rank or vote on the channels of the last convolution,
extreme weights are set to 0, rounds of fine-tuning follow. Budgets are kept on one half of the test set; what is
reported is measured on the other half.
"""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn

from gradlens import mitigation
from gradlens.errors import InputError
from gradlens.mitigation import Mitigation, PruningOrder
from gradlens.run import Run
from simulations import Scenario, malicious_clients, stored_scenario
from simulations.assemble import Federation, assemble
from simulations.randomness import Stream, address
from simulations.studies.results import Part
from simulations.training import Dataset, LocalSGD, load_state, one_thread, predict, state_of, train_clients

BUDGET = 0.02  # of validation accuracy, for each step
VOTED_SHARE = 0.5  # of the channels, that a client votes against
NUM_SHIELDED = 8  # channels that a liar shields: those that the trigger raises most
VALIDATION_IMAGES = 1_000  # that budgets are kept on
TUNING_ROUNDS = 2
LIARS = (1, 2, 3)  # of 10 clients; the attacker first
DELTAS = (6.0, 5.0, 4.5, 4.0, 3.5, 3.0, 2.5, 2.0)
NOTHING, PRUNING, ADJUSTMENT, BOTH = "no step", "pruning", "adjustment", "both"
TUNED_ALONE, TUNED_ALONE_WITH = "no step, tuned by benign clients", "no step, tuned with the attacker"
TUNED, TUNED_WITH = "both, tuned by benign clients", "both, tuned with the attacker"
BETWEEN = "pruning, tuned by benign clients, adjustment"
STEPS = (NOTHING, PRUNING, ADJUSTMENT, BOTH, TUNED_ALONE, TUNED_ALONE_WITH, TUNED, TUNED_WITH, BETWEEN)
REPORTED = ("ranks", "votes")  # what clients report of the channels
LIES = ("reverse", "shield")
PAIR = ["model", "partition", "seed"]
COLUMNS = [
    *PAIR, "control", "part", "step", "setting", "main_accuracy", "asr", "validation_accuracy", "pruned", "kept", "how",
    "lie", "liars", "value",
]  # fmt: skip


def parts_of(runs: Sequence[Run]) -> list[Part]:
    """The pairs of an attacked run and its control, by the values of `PAIR`, with what computes their rows.

    The rows are in `COLUMNS`: a row per run, part ("steps", "lies", "deltas", "channels") and step; how: "ranks" or
    "votes"; value: a delta, or the share of channels pruned; pruned, kept: channels, of an adjustment weights.

    Raises
    ------
    InputError
        If there is no pair.
    """
    closed = {stored_scenario(run): run for run in runs if run.is_closed}
    pairs = [scenario for scenario in closed if not scenario.is_control and scenario.control in closed]
    if not pairs:
        raise InputError("runs: expected attacked runs and their attack-free controls, found no pair of them")
    return [
        (
            (str(scenario.label("model")), partition_label(scenario), scenario.seed),
            lambda scenario=scenario: rows_of_pair(scenario, closed[scenario], closed[scenario.control]),
        )
        for scenario in pairs
    ]


def gathered(runs: Sequence[Run]) -> pd.DataFrame:
    """The rows of all pairs; see `parts_of`."""
    return pd.concat([rows() for _, rows in parts_of(runs)], ignore_index=True)


def rows_of_pair(scenario: Scenario, attacked: Run, control: Run) -> pd.DataFrame:
    """The rows of an attacked run and its control; see `parts_of`."""
    rows = []
    with one_thread():
        federation = assemble(scenario)
        for run in (attacked, control):
            case = Case.of(federation, run, is_control=run is control)
            settings = {"model": scenario.label("model"), "partition": partition_label(scenario)}
            settings |= {"seed": scenario.seed, "control": case.is_control}
            lies = () if case.is_control else case.lies()
            rows += [settings | row for row in (*case.steps(), *lies, *case.curves())]
    return pd.DataFrame(rows, columns=COLUMNS)


def partition_label(scenario: Scenario) -> str:
    """The partition with its skew: "dirichlet 0.5"."""
    ((name, settings),) = scenario.partition.items()
    return f"{name} {settings['alpha']:g}" if "alpha" in settings else name


@dataclass(frozen=True, eq=False)
class Case:
    """The last global model of a run, and all that the steps on it need.

    Parameters
    ----------
    federation : Federation
        Of the attacked run.
    is_control : bool
        Whether the model is that of the control.
    start : Mitigation
        The model before any step.
    x, y : Tensor, array
        The images that budgets are kept on, and their labels.
    activations : array
        Mean activations of the channels on each client's data, float64 [client, channel].
    shielded : array
        The channels that the trigger raises most, int64 [channel].
    """

    federation: Federation
    is_control: bool
    start: Mitigation
    x: torch.Tensor
    y: np.ndarray
    activations: np.ndarray
    shielded: np.ndarray

    @classmethod
    def of(cls, federation: Federation, run: Run, *, is_control: bool) -> "Case":
        """The case of a run; the success of the attack is measured on a control as well."""
        task, model = federation.task, copy.deepcopy(federation.model)
        *_, last = run.states()
        load_state(model, last)
        order = address(federation.scenario.seed, Stream.SAMPLES, 1).permutation(len(task.y_test))
        validation, held_out = order[: len(order) // 2][:VALIDATION_IMAGES], order[len(order) // 2 :]
        held_out_task = replace(task, x_test=task.x_test[held_out], y_test=task.y_test[held_out])
        stamped, wanted = federation.attack.goal(held_out_task)
        samples = [("main_accuracy", held_out_task.x_test, held_out_task.y_test), ("asr", stamped, wanted)]
        tensors = [(name, torch.tensor(x), y) for name, x, y in samples]

        def measure(model: nn.Module) -> dict[str, float]:
            return {name: float((predict(model, x) == y).mean()) for name, x, y in tensors}

        activations = [mitigation.channel_activations(model, x) for x, _ in federation.honest]
        attacker = int(malicious_clients(federation.scenario)[0])
        clean = federation.honest[attacker][0].numpy()
        triggered = mitigation.channel_activations(model, federation.attack.stamp(task, clean, None))
        shielded = mitigation.trigger_channels(activations[attacker], triggered, NUM_SHIELDED)
        start = mitigation.begin(model, measure)
        x = torch.tensor(task.x_test[validation])
        return cls(federation, is_control, start, x, task.y_test[validation], np.stack(activations), shielded)

    def accuracy(self, model: nn.Module) -> float:
        """Accuracy on the images that budgets are kept on."""
        return float((predict(model, self.x) == self.y).mean())

    def order(self, how: str, liars: int = 0, lie: str = "") -> PruningOrder:
        """The order that the server makes of the clients' ranks or votes, some of which are lies."""
        scenario = self.federation.scenario
        attackers = malicious_clients(scenario).tolist()
        drawn = malicious_clients(scenario.replace(num_malicious=max(LIARS))).tolist()
        who = [*attackers, *(client for client in drawn if client not in attackers)][:liars]
        protected = self.shielded.tolist() if lie == "shield" else None
        reported = mitigation.lied(self.activations, who, protected)
        if how == "ranks":
            return mitigation.aggregate_ranks(mitigation.ranks_of(reported))
        return mitigation.aggregate_votes(mitigation.votes_of(reported, VOTED_SHARE), share=VOTED_SHARE)

    def steps(self) -> Iterator[dict[str, Any]]:
        """Each step alone, both, fine-tuning alone, after both and between them; all clients tell the truth."""
        yield self._row("steps", NOTHING, self.start)
        yield self._row("steps", ADJUSTMENT, self._adjusted(self.start))
        benign, everybody = self._tuners()
        yield self._row("steps", TUNED_ALONE, self._tuned(self.start, benign))
        if everybody:
            yield self._row("steps", TUNED_ALONE_WITH, self._tuned(self.start, everybody))
        for how in REPORTED:
            pruned, both = self._pruned_and_both(self.order(how))
            yield self._row("steps", PRUNING, pruned, how=how)
            yield self._row("steps", BOTH, both, how=how)
            if how == "ranks":
                yield self._row("steps", TUNED, self._tuned(both, benign), how=how)
                if everybody:
                    yield self._row("steps", TUNED_WITH, self._tuned(both, everybody), how=how)
                yield self._row("steps", BETWEEN, self._adjusted(self._tuned(pruned, benign)), how=how)

    def lies(self) -> Iterator[dict[str, Any]]:
        """Pruning, and both steps, where some of the clients lie."""
        for how in REPORTED:
            for lie in LIES:
                for liars in LIARS:
                    pruned, both = self._pruned_and_both(self.order(how, liars, lie))
                    yield self._row("lies", PRUNING, pruned, how=how, lie=lie, liars=liars)
                    yield self._row("lies", BOTH, both, how=how, lie=lie, liars=liars)

    def curves(self) -> Iterator[dict[str, Any]]:
        """Without a budget: every delta, and every number of channels."""
        model, measure = self.start.model, self.start.measure
        for delta in DELTAS:
            adjusted = mitigation.without_extreme_weights(model, delta)
            yield {"part": "deltas", "step": ADJUSTMENT, "value": delta} | dict(measure(adjusted))
        order = self.order("ranks").order.tolist()
        for pruned in sorted({*range(0, len(order), max(1, len(order) // 10)), len(order) - 1}):
            changed = mitigation.without_channels(model, order[:pruned], self.x)
            yield {"part": "channels", "step": PRUNING, "value": pruned / len(order)} | dict(measure(changed))

    def _adjusted(self, before: Mitigation) -> Mitigation:
        return mitigation.adjust_extreme_weights(before, self.accuracy, budget=BUDGET)

    def _pruned_and_both(self, order: PruningOrder) -> tuple[Mitigation, Mitigation]:
        pruned = mitigation.prune(self.start, order, self.accuracy, self.x, budget=BUDGET)
        return pruned, self._adjusted(pruned)

    def _tuners(self) -> tuple[list[Dataset], list[Dataset]]:
        """The data of the benign clients; and of all, the attacker with its poisoned data, but not boosted."""
        honest, poisoned = self.federation.honest, self.federation.poisoned
        if self.is_control:
            return list(honest), []
        benign = [data for client, data in enumerate(honest) if client not in poisoned]
        return benign, [poisoned.get(client, data) for client, data in enumerate(honest)]

    def _tuned(self, before: Mitigation, data: Sequence[Dataset]) -> Mitigation:
        return mitigation.fine_tune(before, self._training(data), TUNING_ROUNDS)

    def _training(self, data: Sequence[Dataset]) -> mitigation.Train:
        """Federated averaging over some clients with the settings of the run, in rounds after its last."""
        scenario, rounds_done = self.federation.scenario, iter(range(TUNING_ROUNDS))
        settings = LocalSGD(scenario.local_epochs, scenario.batch_size, scenario.learning_rate)
        weights = np.array([len(y) for _, y in data], dtype=np.float64)

        def train(model: nn.Module) -> nn.Module:
            index, before = scenario.rounds + next(rounds_done), state_of(model)
            rngs = [address(scenario.seed, Stream.BATCHES, index, client) for client in range(len(data))]
            updates = train_clients(model, before, data, rngs, settings)
            means = {name: np.average(update, axis=0, weights=weights) for name, update in updates.items()}
            load_state(model, {name: (layer + means[name]).astype(layer.dtype) for name, layer in before.items()})
            return model

        return train

    def _row(self, part: str, step: str, after: Mitigation, **settings: Any) -> dict[str, Any]:
        return {"part": part, "step": step, **settings} | dict(after.table.iloc[-1].drop("step"))
