"""The steps after training: `Mitigation`, what the steps so far came to, and what each step makes of it."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from gradlens.errors import InputError
from gradlens.mitigation.channels import (
    adjusted_layers,
    channel_count,
    channel_list,
    check_channels,
    norms_after,
    pruned_layer,
    weights_of,
    without_extreme_weights,
    zero_channels,
)
from gradlens.mitigation.orders import PruningOrder

if TYPE_CHECKING:
    from torch import nn

Accuracy = Callable[["nn.Module"], float]  # on the server's validation data: what a budget is about
Measure = Callable[["nn.Module"], Mapping[str, float]]  # what the table shows of a model: main_accuracy, asr
Train = Callable[["nn.Module"], "nn.Module"]  # one round of federated training

DELTAS = (5.0, 4.5, 4.0, 3.5, 3.0, 2.5, 2.0, 1.5, 1.0)


@dataclass(frozen=True, eq=False)
class Mitigation:
    """A model after some steps, and what each of them did.

    table: a row per step: step, setting, what `measure` gives (main_accuracy, asr), validation_accuracy (NaN where no
    budget was kept), pruned and kept (channels of the layer; of an adjustment weights; of fine-tuning as the step
    before). pruned: the channels at 0,
    layer -> sorted, norms that follow included: they stay at 0 through fine-tuning.
    """

    model: "nn.Module"
    table: pd.DataFrame
    measure: Measure
    pruned: Mapping[str, tuple[int, ...]]

    def __repr__(self) -> str:
        steps = ", ".join(
            f"{row['step']} ({row['setting']})" if row["setting"] else row["step"] for row in _dicts(self)
        )
        return f"Mitigation({type(self.model).__name__} after {steps})"


def begin(model: "nn.Module", measure: Measure) -> Mitigation:
    """The model as it is, no step taken; the table's first row is its own."""
    row = {"step": "none", "setting": "", **measure(model), "validation_accuracy": np.nan, "pruned": 0, "kept": 0}
    return Mitigation(model, pd.DataFrame([row]), measure, {})


def prune(
    before: Mitigation,
    order: PruningOrder | Sequence[int] | np.ndarray,
    accuracy: Accuracy,
    x: Any,
    *,
    layer: str | None = None,
    budget: float = 0.02,
) -> Mitigation:
    """Sets channels of a layer to 0, one after another in the order given, until that costs more than the budget.

    accuracy: of a model on validation data, a share; budget: how far it may fall below that of the model before, as a
    share (0.02: 2 points). The first channel that takes it further stays, and so do all after it, and always one.
    x: a few samples, to see which norm follows the layer. layer: as of `pruned_layer`.
    Raises InputError on channels that the layer does not have, or a budget below 0.
    """
    name = pruned_layer(before.model, layer)
    width, channels = channel_count(before.model.get_submodule(name)), channel_list(order)
    check_channels(name, channels, width)
    floor = _floor(before, accuracy, budget)
    norms = norms_after(before.model, name, x)
    trial, gone = copy.deepcopy(before.model), list(before.pruned.get(name, ()))
    reached = floor + budget
    for channel in [each for each in channels if each not in gone]:
        if len(gone) >= width - 1:
            break
        zero_channels(trial, dict.fromkeys((name, *norms), (channel,)))
        found = float(accuracy(trial))
        if not found >= floor:
            break
        gone, reached = [*gone, channel], found
    zeroed = dict(before.pruned) | dict.fromkeys((name, *norms), tuple(sorted(gone)))
    model = copy.deepcopy(before.model)
    zero_channels(model, zeroed)
    return _next(before, model, "pruning", f"{name}, {_budget(budget)}", reached, len(gone), width - len(gone), zeroed)


def adjust_extreme_weights(
    before: Mitigation,
    accuracy: Accuracy,
    *,
    layers: Sequence[str] | None = None,
    deltas: Sequence[float] = DELTAS,
    budget: float = 0.02,
) -> Mitigation:
    """Sets weights outside mu +- delta sigma of their layer to 0, at the lowest delta that the budget allows.

    deltas are tried from the highest down, each on the weights as they were; the first that costs more than the budget
    ends the search, and where that is the highest nothing changes. accuracy, budget: as of `prune`. layers: as of
    `without_extreme_weights`. Raises InputError on a delta that is no positive number or a budget below 0.
    """
    names, floor = adjusted_layers(before.model, layers), _floor(before, accuracy, budget)
    chosen, model, reached = None, before.model, floor + budget
    for delta in sorted(deltas, reverse=True):
        trial = without_extreme_weights(before.model, delta, names)
        found = float(accuracy(trial))
        if not found >= floor:
            break
        chosen, model, reached = delta, trial, found
    weights = [(weights_of(before.model, name), weights_of(model, name)) for name in names]
    gone = int(sum(((old != 0) & (new == 0)).sum() for old, new in weights))
    kept = int(sum((new != 0).sum() for _, new in weights))
    said = "no delta within" if chosen is None else f"delta {chosen:g},"
    setting = f"{' + '.join(names)}, {said} {_budget(budget)}"
    return _next(before, copy.deepcopy(model), "adjustment", setting, reached, gone, kept, before.pruned)


def fine_tune(before: Mitigation, train: Train, rounds: int = 1) -> Mitigation:
    """Trains on for some rounds; pruned channels are set to 0 again after each.

    train: a model -> the next global model, one round of federated training; it is given a copy. Weights that an
    adjustment set to 0 may move again. Raises InputError where it returns no model of the same layers.
    """
    if rounds < 1:
        raise InputError(f"rounds: expected at least one, found {rounds}")
    model, known = copy.deepcopy(before.model), set(before.model.state_dict())
    for _ in range(rounds):
        found = train(model)
        if not hasattr(found, "state_dict") or set(found.state_dict()) != known:
            raise InputError(f"train: expected a model with the layers of the one given, found {type(found).__name__}")
        model = copy.deepcopy(found)
        zero_channels(model, before.pruned)
    said = f"{rounds} round" + ("s" if rounds > 1 else "")
    last = before.table.iloc[-1]
    return _next(before, model, "fine-tuning", said, np.nan, int(last["pruned"]), int(last["kept"]), before.pruned)


def _floor(before: Mitigation, accuracy: Accuracy, budget: float) -> float:
    if not budget >= 0:
        raise InputError(f"budget is a share of at least 0, found {budget}")
    return float(accuracy(before.model)) - budget


def _budget(budget: float) -> str:
    return f"budget {100 * budget:g} points"


def _dicts(mitigation: Mitigation) -> list[dict[str, Any]]:
    return [{str(name): value for name, value in row.items()} for row in mitigation.table.to_dict("records")]


def _next(
    before: Mitigation,
    model: "nn.Module",
    step: str,
    setting: str,
    validation: float,
    pruned: int,
    kept: int,
    zeroed: Mapping[str, tuple[int, ...]],
) -> Mitigation:
    row = {"step": step, "setting": setting, **before.measure(model), "validation_accuracy": validation}
    table = pd.DataFrame([*_dicts(before), row | {"pruned": pruned, "kept": kept}])
    return Mitigation(model, table, before.measure, zeroed)
