"""Steps after training: each takes a `Mitigation`, the result of the steps before it, and returns the next one."""

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

Accuracy = Callable[["nn.Module"], float]  # accuracy on the server's validation data, which a budget limits
Measure = Callable[["nn.Module"], Mapping[str, float]]  # figures of a model in the table, such as main_accuracy and asr
Train = Callable[["nn.Module"], "nn.Module"]  # one round of federated training

DELTAS = (5.0, 4.5, 4.0, 3.5, 3.0, 2.5, 2.0, 1.5, 1.0)


@dataclass(frozen=True, eq=False)
class Mitigation:
    """A model after some steps, and what each of them did.

    Attributes
    ----------
    model : torch.nn.Module
        The model.
    table : DataFrame
        A row per step: step, setting, the figures of `measure`, validation_accuracy (NaN where the step has no budget),
        pruned and kept (channels of the layer; for an adjustment, weights; for fine-tuning, as in the step before).
    measure : callable
        A model -> its figures by name.
    pruned : Mapping of str to tuple of int
        Layer or norm that follows it -> its channels at 0, sorted; they stay at 0 through fine-tuning.

    Examples
    --------
    >>> from torch import nn
    >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
    >>> start = begin(model, lambda model: {"main_accuracy": 0.9})
    >>> start
    Mitigation(Sequential after none)
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
    """Starts a chain of steps; the first row of the table is that of the model as it is.

    Parameters
    ----------
    model : torch.nn.Module
        The trained model.
    measure : callable
        A model -> its figures by name, such as main_accuracy and asr.

    Examples
    --------
    >>> from torch import nn
    >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
    >>> start = begin(model, lambda model: {"main_accuracy": 0.9})
    >>> start.table["step"].tolist(), start.table["main_accuracy"].tolist()
    (['none'], [0.9])
    """
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
    """Sets channels of a layer to 0 in the order given, until the next one would cost more accuracy than the budget.

    Parameters
    ----------
    before : Mitigation
        The result of the steps so far.
    order : PruningOrder or sequence of int
        Channels, the first to be pruned first.
    accuracy : callable
        A model -> its accuracy on validation data, a share.
    x : ndarray or Tensor
        A few samples, to see which norm follows the layer.
    layer : str, optional
        As for `pruned_layer`.
    budget : float
        How far the accuracy may fall below that of the model before the step, as a share; 0.02 is our own choice.

    Raises
    ------
    InputError
        If the layer has no such channel, one comes twice, or the budget is below 0.

    Notes
    -----
    The first channel that exceeds the budget stays, and so do all after it; one channel always stays. After [1]_.

    **Fails when** the backdoor uses channels that clean data use as well, or malicious clients put its channels last.

    References
    ----------
    .. [1] Wu et al. 2020, arXiv:2011.01767.

    Examples
    --------
    >>> import numpy as np
    >>> from torch import nn
    >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
    >>> start = begin(model, lambda model: {"main_accuracy": 0.9})
    >>> prune(start, [2, 0, 1], lambda model: 0.9, np.zeros((1, 2), np.float32)).pruned
    {'0': (0, 2)}
    """
    name = pruned_layer(before.model, layer)
    width, channels = channel_count(before.model.get_submodule(name)), channel_list(order)
    check_channels(name, channels, width)
    floor = _floor(before, accuracy, budget)
    norms = norms_after(before.model, name, x)
    trial, gone = copy.deepcopy(before.model), list(before.pruned.get(name, ()))
    reached = floor + budget
    for channel in [channel for channel in channels if channel not in gone]:
        if len(gone) >= width - 1:
            break
        zero_channels(trial, dict.fromkeys((name, *norms), (channel,)))
        share = float(accuracy(trial))
        if not share >= floor:
            break
        gone, reached = [*gone, channel], share
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
    """Sets weights far from the mean of their layer to 0, at the lowest delta that the budget allows.

    Parameters
    ----------
    before : Mitigation
        The result of the steps so far.
    accuracy, budget : callable, float
        As for `prune`.
    layers : sequence of str, optional
        As for `without_extreme_weights`.
    deltas : sequence of float
        Multiples of the standard deviation, tried from the highest down, each on the weights as they were; our own
        choice.

    Raises
    ------
    InputError
        If a delta is no positive number or the budget is below 0.

    Notes
    -----
    Weights outside mu +- delta sigma of their layer become 0, after [1]_. The first delta that exceeds the budget ends
    the search; if that is the highest, nothing changes.

    **Fails when** the backdoor rests on weights of ordinary size.

    References
    ----------
    .. [1] Wu et al. 2020, arXiv:2011.01767.

    Examples
    --------
    >>> from torch import nn
    >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
    >>> start = begin(model, lambda model: {"main_accuracy": 0.9})
    >>> adjust_extreme_weights(start, lambda model: 0.9, deltas=[3.0, 2.0])
    Mitigation(Sequential after none, adjustment (0, delta 2, budget 2 points))
    """
    names, floor = adjusted_layers(before.model, layers), _floor(before, accuracy, budget)
    chosen, model, reached = None, before.model, floor + budget
    for delta in sorted(deltas, reverse=True):
        trial = without_extreme_weights(before.model, delta, names)
        share = float(accuracy(trial))
        if not share >= floor:
            break
        chosen, model, reached = delta, trial, share
    weights = [(weights_of(before.model, name), weights_of(model, name)) for name in names]
    gone = int(sum(((old != 0) & (new == 0)).sum() for old, new in weights))
    kept = int(sum((new != 0).sum() for _, new in weights))
    choice = "no delta within" if chosen is None else f"delta {chosen:g},"
    setting = f"{' + '.join(names)}, {choice} {_budget(budget)}"
    return _next(before, copy.deepcopy(model), "adjustment", setting, reached, gone, kept, before.pruned)


def fine_tune(before: Mitigation, train: Train, rounds: int = 1) -> Mitigation:
    """Trains the model for some more rounds; pruned channels are set to 0 again after each.

    Parameters
    ----------
    before : Mitigation
        The result of the steps so far.
    train : callable
        One round of federated training: a copy of the model -> the next global model.
    rounds : int
        How many.

    Raises
    ------
    InputError
        If there is no round, or `train` returns no model of the same layers.

    Notes
    -----
    Weights that an adjustment set to 0 may move again.

    **Fails when** malicious clients take part in these rounds: nothing here keeps their updates out.

    Examples
    --------
    >>> from torch import nn
    >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
    >>> start = begin(model, lambda model: {"main_accuracy": 0.9})
    >>> fine_tune(start, lambda model: model, rounds=2)
    Mitigation(Sequential after none, fine-tuning (2 rounds))
    """
    if rounds < 1:
        raise InputError(f"rounds: expected at least one, found {rounds}")
    model, known = copy.deepcopy(before.model), set(before.model.state_dict())
    for _ in range(rounds):
        trained = train(model)
        if not hasattr(trained, "state_dict") or set(trained.state_dict()) != known:
            raise InputError(f"train: expected a model with the same layers, found {type(trained).__name__}")
        model = copy.deepcopy(trained)
        zero_channels(model, before.pruned)
    setting = f"{rounds} round" + ("s" if rounds > 1 else "")
    last = before.table.iloc[-1]
    return _next(before, model, "fine-tuning", setting, np.nan, int(last["pruned"]), int(last["kept"]), before.pruned)


def _floor(before: Mitigation, accuracy: Accuracy, budget: float) -> float:
    if not budget >= 0:
        raise InputError(f"budget must be a share of at least 0, found {budget}")
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
