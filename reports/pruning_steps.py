"""What the steps of Wu et al. 2020, arXiv:2011.01767, leave of a backdoor: figures for each run.

For `reports/pruning.py`. Each step is taken on the last global model of every run: clients rank or vote on the channels
of the last convolution, extreme weights are set to 0, rounds of fine-tuning follow. One half of the test set has the
images that budgets are kept on, the other half is what is reported.
"""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn
from tqdm import tqdm

from gradlens import mitigation
from gradlens.errors import InputError
from gradlens.mitigation import Mitigation, PruningOrder
from gradlens.run import Run
from simulations import Scenario, malicious_clients
from simulations.assemble import Federation, assemble
from simulations.randomness import Stream, address
from simulations.training import Dataset, LocalSGD, load_state, one_thread, predict, state_of, train_clients

BUDGET = 0.02  # of validation accuracy, for each step
SHARE = 0.5  # of the channels that a client votes against
SHIELDED = 8  # channels that a liar shields: those that the trigger raises most
IMAGES = 1_000  # that budgets are kept on
ROUNDS = 2  # of fine-tuning
LIARS = (1, 2, 3)  # of 10 clients; the attacker first
DELTAS = (6.0, 5.0, 4.5, 4.0, 3.5, 3.0, 2.5, 2.0)
NOTHING, PRUNING, ADJUSTMENT, BOTH = "no step", "pruning", "adjustment", "both"
TUNED_ALONE, TUNED_ALONE_WITH = "no step, tuned by benign clients", "no step, tuned with the attacker"
TUNED, TUNED_WITH = "both, tuned by benign clients", "both, tuned with the attacker"
BETWEEN = "pruning, tuned by benign clients, adjustment"
STEPS = (NOTHING, PRUNING, ADJUSTMENT, BOTH, TUNED_ALONE, TUNED_ALONE_WITH, TUNED, TUNED_WITH, BETWEEN)
HOW = ("ranks", "votes")
LIES = ("reverse", "shield")


def gathered(runs: Sequence[Run], *, progress: bool = True) -> pd.DataFrame:
    """All figures: a row per run, part ("steps", "lies", "deltas", "channels") and what was done.

    Columns: model, partition, seed, control, part, step, how (ranks, votes), lie, liars, value (a delta, or a number of
    channels), setting, main_accuracy, asr, validation_accuracy, pruned, kept. Raises InputError without a pair of an
    attacked run and its control.
    """
    known = {Scenario(**run.scenario): run for run in runs if run.is_closed}
    pairs = [
        (each, known[each], known[each.control]) for each in known if not each.is_control and each.control in known
    ]
    if not pairs:
        raise InputError("runs: expected attacked runs and their attack-free controls, found no pair of them")
    rows = []
    with one_thread():
        for scenario, attacked, control in tqdm(pairs, desc="runs", disable=None if progress else True):
            federation = assemble(scenario)
            for run in (attacked, control):
                case = Case.of(federation, run, is_control=run is control)
                settings = {"model": scenario.label("model"), "partition": _partition(scenario)}
                settings |= {"seed": scenario.seed, "control": case.is_control}
                lies = () if case.is_control else case.lies()
                rows += [settings | row for row in (*case.steps(), *lies, *case.curves())]
    return pd.DataFrame(rows)


def _partition(scenario: Scenario) -> str:
    """The partition with its skew: "dirichlet 0.5"."""
    ((name, values),) = scenario.partition.items()
    return f"{name} {values['alpha']:g}" if "alpha" in values else name


@dataclass(frozen=True, eq=False)
class Case:
    """One last global model, and all that its steps need; activations: float64 [client, channel], as seen by each."""

    federation: Federation
    is_control: bool
    start: Mitigation
    x: torch.Tensor
    y: np.ndarray
    activations: np.ndarray
    shielded: np.ndarray

    @classmethod
    def of(cls, federation: Federation, run: Run, *, is_control: bool) -> "Case":
        """The case of a run; the attack's success is measured on a control as well."""
        task, model = federation.task, copy.deepcopy(federation.model)
        *_, last = run.states()
        load_state(model, last)
        order = address(federation.scenario.seed, Stream.SAMPLES, 1).permutation(len(task.y_test))
        budget, held_out = order[: len(order) // 2][:IMAGES], order[len(order) // 2 :]
        half = replace(task, x_test=task.x_test[held_out], y_test=task.y_test[held_out])
        stamped, wanted = federation.attack.goal(half)
        questions = [("main_accuracy", half.x_test, half.y_test), ("asr", stamped, wanted)]
        asked = [(name, torch.tensor(x), y) for name, x, y in questions]

        def measure(model: nn.Module) -> dict[str, float]:
            return {name: float((predict(model, x) == y).mean()) for name, x, y in asked}

        activations = [mitigation.channel_activations(model, x) for x, _ in federation.honest]
        attacker = int(malicious_clients(federation.scenario)[0])
        own = federation.honest[attacker][0].numpy()
        raised = mitigation.channel_activations(model, federation.attack.stamp(task, own, None))
        shielded = mitigation.trigger_channels(activations[attacker], raised, SHIELDED)
        start = mitigation.begin(model, measure)
        x = torch.tensor(task.x_test[budget])
        return cls(federation, is_control, start, x, task.y_test[budget], np.stack(activations), shielded)

    def accuracy(self, model: nn.Module) -> float:
        """On the images that budgets are kept on."""
        return float((predict(model, self.x) == self.y).mean())

    def order(self, how: str, liars: int = 0, lie: str = "") -> PruningOrder:
        """What the server makes of the clients' ranks or votes, some of which are lies."""
        scenario = self.federation.scenario
        who = malicious_clients(scenario.replace(num_malicious=max(LIARS))).tolist()
        own = malicious_clients(scenario).tolist()
        who = [*own, *(client for client in who if client not in own)][:liars]
        said = mitigation.lied(self.activations, who, self.shielded if lie == "shield" else None)
        if how == "ranks":
            return mitigation.aggregate_ranks(mitigation.ranks_of(said))
        return mitigation.aggregate_votes(mitigation.votes_of(said, SHARE), share=SHARE)

    def steps(self) -> Iterator[dict[str, Any]]:
        """Each step alone, both, fine-tuning alone, after both and between them; all clients tell the truth."""
        yield self._row("steps", NOTHING, self.start)
        yield self._row(
            "steps", ADJUSTMENT, mitigation.adjust_extreme_weights(self.start, self.accuracy, budget=BUDGET)
        )
        benign, everybody = self._tuners()
        yield self._row("steps", TUNED_ALONE, self._tuned(self.start, benign))
        if everybody:
            yield self._row("steps", TUNED_ALONE_WITH, self._tuned(self.start, everybody))
        for how in HOW:
            pruned, both = self._pruned_and_both(self.order(how))
            yield self._row("steps", PRUNING, pruned, how=how)
            yield self._row("steps", BOTH, both, how=how)
            if how == "ranks":
                yield self._row("steps", TUNED, self._tuned(both, benign), how=how)
                if everybody:
                    yield self._row("steps", TUNED_WITH, self._tuned(both, everybody), how=how)
                between = self._tuned(pruned, benign)
                adjusted = mitigation.adjust_extreme_weights(between, self.accuracy, budget=BUDGET)
                yield self._row("steps", BETWEEN, adjusted, how=how)

    def lies(self) -> Iterator[dict[str, Any]]:
        """Pruning, and both, where some of the clients lie."""
        for how in HOW:
            for lie in LIES:
                for liars in LIARS:
                    pruned, both = self._pruned_and_both(self.order(how, liars, lie))
                    yield self._row("lies", PRUNING, pruned, how=how, lie=lie, liars=liars)
                    yield self._row("lies", BOTH, both, how=how, lie=lie, liars=liars)

    def curves(self) -> Iterator[dict[str, Any]]:
        """Without a budget: every delta, and every number of channels."""
        model, measure = self.start.model, self.start.measure
        for delta in DELTAS:
            yield {"part": "deltas", "step": ADJUSTMENT, "value": delta} | dict(
                measure(mitigation.without_extreme_weights(model, delta))
            )
        order = self.order("ranks").order
        for pruned in sorted({*range(0, len(order), max(1, len(order) // 10)), len(order) - 1}):
            changed = mitigation.without_channels(model, order[:pruned], self.x)
            yield {"part": "channels", "step": PRUNING, "value": pruned / len(order)} | dict(measure(changed))

    def _pruned_and_both(self, order: PruningOrder) -> tuple[Mitigation, Mitigation]:
        pruned = mitigation.prune(self.start, order, self.accuracy, self.x, budget=BUDGET)
        return pruned, mitigation.adjust_extreme_weights(pruned, self.accuracy, budget=BUDGET)

    def _tuners(self) -> tuple[list[Dataset], list[Dataset]]:
        """Who fine-tunes on what: the benign clients; and all, the attacker on its poisoned data, but not boosted."""
        honest, poisoned = self.federation.honest, self.federation.poisoned
        if self.is_control:
            return list(honest), []
        benign = [data for client, data in enumerate(honest) if client not in poisoned]
        return benign, [poisoned.get(client, data) for client, data in enumerate(honest)]

    def _tuned(self, before: Mitigation, data: Sequence[Dataset]) -> Mitigation:
        return mitigation.fine_tune(before, self._training(data), ROUNDS)

    def _training(self, data: Sequence[Dataset]) -> mitigation.Train:
        """Federated averaging over some clients as the run had it, in rounds after its last."""
        scenario, done = self.federation.scenario, iter(range(ROUNDS))
        settings = LocalSGD(scenario.local_epochs, scenario.batch_size, scenario.learning_rate)
        weights = np.array([len(y) for _, y in data], dtype=np.float64)

        def train(model: nn.Module) -> nn.Module:
            index, before = scenario.rounds + next(done), state_of(model)
            rngs = [address(scenario.seed, Stream.BATCHES, index, client) for client in range(len(data))]
            updates = train_clients(model, before, data, rngs, settings)
            means = {name: np.average(update, axis=0, weights=weights) for name, update in updates.items()}
            load_state(model, {name: (each + means[name]).astype(each.dtype) for name, each in before.items()})
            return model

        return train

    def _row(self, part: str, step: str, done: Mitigation, **what: Any) -> dict[str, Any]:
        return {"part": part, "step": step, **what} | dict(done.table.iloc[-1].drop("step"))
