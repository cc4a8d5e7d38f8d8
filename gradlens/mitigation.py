"""After training: channels pruned as clients rank or vote, extreme weights set to 0, fine-tuning.

The steps of Wu et al. 2020, arXiv:2011.01767. A step takes a `Mitigation`, what the steps before it came to, and gives
the next one, so that they chain in any order and number:

    start = begin(model, measure)
    pruned = prune(start, aggregate_ranks(ranks), accuracy, x)
    done = fine_tune(adjust_extreme_weights(pruned, accuracy), train, rounds=2)
    done.model, done.table

What the server makes of the clients' ranks or votes (`aggregate_ranks`, `aggregate_votes`) is plain arithmetic on what
they sent; how they get there (`channel_activations`, `ranks_of`, `votes_of`) and how some may lie (`lied`) is apart.
The paper's layers, deltas and budgets are not published where they could be read; those here are our own, and settings.
A channel is an output channel of a convolution or a unit of a dense layer. Models are torch modules.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from gradlens.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = [
    "Mitigation",
    "PruningOrder",
    "adjust_extreme_weights",
    "aggregate_ranks",
    "aggregate_votes",
    "begin",
    "channel_activations",
    "fine_tune",
    "lied",
    "prune",
    "pruned_layer",
    "ranks_of",
    "trigger_channels",
    "votes_of",
    "without_channels",
    "without_extreme_weights",
]

Accuracy = Callable[["nn.Module"], float]  # on the server's validation data: what a budget is about
Measure = Callable[["nn.Module"], Mapping[str, float]]  # what the table shows of a model: main_accuracy, asr
Train = Callable[["nn.Module"], "nn.Module"]  # one round of federated training
Sent = Mapping[str, Any] | np.ndarray | Sequence[Any]  # client -> what it sent, or [client, channel]

DELTAS = (5.0, 4.5, 4.0, 3.5, 3.0, 2.5, 2.0, 1.5, 1.0)
SHOWN = 5  # channels that a repr names


# What clients send, and what the server makes of it -----------------------------------------------------------


@dataclass(frozen=True, eq=False)
class PruningOrder:
    """In which order to prune the channels of a layer, and whose word it rests on.

    order: int64 [channel], the first to go first. scores: float64 [channel], the mean rank, or the share of votes
    against it. counted: the clients that it rests on; refused: client -> why what it sent was not counted.
    """

    order: np.ndarray
    scores: np.ndarray
    counted: tuple[str, ...]
    refused: Mapping[str, str]

    def __repr__(self) -> str:
        first = ", ".join(map(str, self.order[:SHOWN].tolist())) + (", ..." if len(self.order) > SHOWN else "")
        clients = f"{len(self.counted)} of {len(self.counted) + len(self.refused)} clients"
        return f"PruningOrder({len(self.order)} channels, first {first}; {clients} counted)"


def ranks_of(activations: np.ndarray) -> np.ndarray:
    """Ranks of channels by activation, 0 the least active: float [..., channel] -> int64 [..., channel].

    Of equal ones the first channel comes first. Raises InputError on a number that is not finite.
    """
    found = _finite(activations)
    return np.argsort(np.argsort(found, axis=-1, kind="stable"), axis=-1, kind="stable")


def votes_of(activations: np.ndarray, share: float = 0.5) -> np.ndarray:
    """Votes against the least active channels, a share of them: float [..., channel] -> int64 0 or 1, same shape.

    share: above 0 and at most 1; the count is rounded, and one vote at least. Raises InputError on a share out of its
    range or a number that is not finite.
    """
    ranks = ranks_of(activations)
    return (ranks < _num_votes(share, ranks.shape[-1])).astype(np.int64)


def aggregate_ranks(ranks: Sent, num_channels: int | None = None) -> PruningOrder:
    """Rank aggregation (RAP): channels by the mean of the clients' ranks, the lowest first.

    ranks: [client, channel] or client -> [channel], 0 the least active; whoever sends anything but each of 0, 1, ...,
    num_channels - 1 once is refused with a reason, so that a client moves a mean by (num_channels - 1) / clients at
    most. num_channels: needed where clients are named, for who sends is not asked how many there are. Of equal means
    the first channel comes first. Raises InputError where nobody is left. Source: Wu et al. 2020, arXiv:2011.01767.
    """
    rows, width = _rows("ranks", ranks, num_channels)
    everything = np.arange(width)
    sound, refused = _sorted_out(
        rows, width, lambda row: "" if np.array_equal(np.sort(row), everything) else f"no order of 0 to {width - 1}"
    )
    scores = _mean("ranks", sound, refused)
    return PruningOrder(np.argsort(scores, kind="stable"), scores, tuple(sound), refused)


def aggregate_votes(votes: Sent, num_channels: int | None = None, share: float | None = None) -> PruningOrder:
    """Majority voting (MVP): channels by the number of votes against them, the most first.

    votes: [client, channel] or client -> [channel] of 0 and 1; anything else is refused with a reason, and so is
    another number of votes than `share` of the channels where that is given. num_channels: as of `aggregate_ranks`.
    Of equal counts, which are common, the first channel comes first. Raises InputError where nobody is left.
    Source: Wu et al. 2020, arXiv:2011.01767.
    """
    rows, width = _rows("votes", votes, num_channels)
    wanted = None if share is None else _num_votes(share, width)

    def problem(row: np.ndarray) -> str:
        if not np.isin(row, (0, 1)).all():
            return "expected 0 and 1 only"
        given = int(row.sum())
        return "" if wanted in (None, given) else f"expected {wanted} votes, found {given}"

    sound, refused = _sorted_out(rows, width, problem)
    scores = _mean("votes", sound, refused)
    return PruningOrder(np.argsort(-scores, kind="stable"), scores, tuple(sound), refused)


def lied(activations: np.ndarray, liars: Sequence[int], protected: Sequence[int] | None = None) -> np.ndarray:
    """What clients report of their activations if some lie: float64 [client, channel], as a new array.

    liars: rows. protected: channels that a liar reports as its most active ones, the rest as they are (for a backdoor
    in channels that clean data leave quiet, see `trigger_channels`); None: it reports the reverse order. What follows
    from such a report is a well-formed row of ranks or votes: it cannot be refused.
    """
    reported = _finite(activations).copy()
    for row in liars:
        if protected is None:
            reported[row] = -reported[row]
        else:
            chosen = list(protected)
            reported[row, chosen] += 1 + np.ptp(reported[row])
    return reported


def trigger_channels(clean: np.ndarray, triggered: np.ndarray, count: int) -> np.ndarray:
    """The `count` channels that a trigger raises most: activations [channel] without and with it -> int64, sorted."""
    return np.sort(np.argsort(_finite(clean) - _finite(triggered), kind="stable")[:count])


def _finite(activations: Any) -> np.ndarray:
    found = np.asarray(activations, dtype=np.float64)
    if not np.isfinite(found).all():
        where = tuple(np.argwhere(~np.isfinite(found))[0].tolist())
        raise InputError(f"activations: expected finite numbers, found {found[where]} at {list(where)}")
    return found


def _num_votes(share: float, width: int) -> int:
    if not 0 < share <= 1:
        raise InputError(f"share is above 0 and at most 1, found {share}")
    return max(1, int(np.floor(share * width + 0.5)))


def _rows(name: str, sent: Sent, num_channels: int | None) -> tuple[dict[str, Any], int]:
    """What each client sent, and how many channels there are."""
    if isinstance(sent, Mapping):
        if num_channels is None:
            raise InputError(f"{name}: of named clients num_channels is needed: they are not asked how many there are")
        return {str(client): row for client, row in sent.items()}, num_channels
    rows = {str(number): row for number, row in enumerate(sent)}
    if num_channels is not None:
        return rows, num_channels
    if not isinstance(sent, np.ndarray) or sent.ndim != 2:
        raise InputError(f"{name}: expected an array [client, channel], or num_channels for rows of any length")
    return rows, sent.shape[1]


def _sorted_out(
    rows: Mapping[str, Any], width: int, problem: Callable[[np.ndarray], str]
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """What can be counted, client -> float64 [channel], and why the rest cannot."""
    sound, refused = {}, {}
    for client, sent in rows.items():
        row = _numbers(sent)
        if row is None:
            refused[client] = "expected numbers, found " + ("nothing" if sent is None else type(sent).__name__)
        elif row.shape != (width,):
            refused[client] = f"expected {width} channels, found the shape {row.shape}"
        elif not np.isfinite(row).all():
            refused[client] = f"channel {int(np.flatnonzero(~np.isfinite(row))[0])} is not finite"
        elif reason := problem(row):
            refused[client] = reason
        else:
            sound[client] = row
    return sound, refused


def _numbers(sent: Any) -> np.ndarray | None:
    """What a client sent as float64, None where it is no array of real numbers; its text is not taken for numbers."""
    try:
        found = np.asarray(sent)
    except (ValueError, TypeError):  # rows of several lengths
        return None
    return found.astype(np.float64) if found.dtype.kind in "biuf" else None


def _mean(name: str, sound: Mapping[str, np.ndarray], refused: Mapping[str, str]) -> np.ndarray:
    if not sound:
        why = "; ".join(f"{client}: {reason}" for client, reason in list(refused.items())[:3])
        raise InputError(f"{name}: nobody's can be counted" + (f" ({why})" if why else ": nobody sent any"))
    return np.mean(list(sound.values()), axis=0)


# What clients see in the model --------------------------------------------------------------------------------


def pruned_layer(model: "nn.Module", layer: str | None = None) -> str:
    """The layer whose channels are pruned: the one named, or the last convolution, or without one the last dense layer.

    Never the final layer, whose units are the classes. Layers count in the order in which the model registers them;
    name the layer where it computes in another. Raises InputError where there is no such layer.
    """
    *hidden, _ = names = list(_layers(model)) or [""]
    if layer is not None:
        if layer not in hidden:
            raise InputError(f"layer: expected one of {', '.join(hidden) or 'none'} (not the last), found {layer!r}")
        return layer
    if not hidden:
        kinds = ", ".join(dict.fromkeys(type(each).__name__ for each in model.modules() if not any(each.children())))
        raise InputError(
            f"model: expected a convolution or dense layer besides the final one ({names[0] or 'none'}), "
            f"found {kinds or 'none'}"
        )
    convolutions = [name for name in hidden if _is_convolution(_layers(model)[name])]
    return (convolutions or hidden)[-1]


def channel_activations(model: "nn.Module", x: Any, layer: str | None = None, batch_size: int = 1_000) -> np.ndarray:
    """The mean activation of each channel of a layer on samples: float64 [channel]; what a client computes.

    The positive part of what the layer gives, after a norm that follows it, averaged over samples and positions.
    x: samples as the model takes them, a numpy array or a tensor. layer: as of `pruned_layer`. The model stays as it
    is. Raises InputError without samples.
    """
    import torch

    if not len(x):
        raise InputError("x: expected samples to see activations on, found none")
    ours, name = copy.deepcopy(model).eval(), pruned_layer(model, layer)
    norms = _norms_after(ours, name, x)
    seen = norms[0] if norms else name
    axis = 1 if norms or _is_convolution(ours.get_submodule(name)) else -1
    total, count = torch.zeros(_num_channels(ours.get_submodule(name)), dtype=torch.float64), 0

    def look(module: "nn.Module", inputs: Any, output: "Tensor") -> None:
        nonlocal count
        positive = output.detach().movedim(axis, 0).flatten(1).clamp(min=0)
        total.add_(positive.sum(dim=1, dtype=torch.float64).cpu())
        count += positive.shape[1]

    ours.get_submodule(seen).register_forward_hook(look)
    with torch.no_grad():
        for first in range(0, len(x), batch_size):
            ours(_batch(ours, x[first : first + batch_size]))
    if not count:
        raise InputError(f"layer: {name} takes no part in what the model computes")
    return (total / count).numpy()


# The steps ----------------------------------------------------------------------------------------------------


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
    width, channels = _num_channels(before.model.get_submodule(name)), _channels(order)
    _check_channels(name, channels, width)
    floor = _floor(before, accuracy, budget)
    norms = _norms_after(before.model, name, x)
    trial, gone = copy.deepcopy(before.model), list(before.pruned.get(name, ()))
    reached = floor + budget
    for channel in [each for each in channels if each not in gone]:
        if len(gone) >= width - 1:
            break
        _zero(trial, dict.fromkeys((name, *norms), (channel,)))
        found = float(accuracy(trial))
        if not found >= floor:
            break
        gone, reached = [*gone, channel], found
    zeroed = dict(before.pruned) | dict.fromkeys((name, *norms), tuple(sorted(gone)))
    model = copy.deepcopy(before.model)
    _zero(model, zeroed)
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
    names, floor = _adjusted_layers(before.model, layers), _floor(before, accuracy, budget)
    chosen, model, reached = None, before.model, floor + budget
    for delta in sorted(deltas, reverse=True):
        trial = without_extreme_weights(before.model, delta, names)
        found = float(accuracy(trial))
        if not found >= floor:
            break
        chosen, model, reached = delta, trial, found
    weights = [(_weights(before.model, name), _weights(model, name)) for name in names]
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
        _zero(model, before.pruned)
    said = f"{rounds} round" + ("s" if rounds > 1 else "")
    last = before.table.iloc[-1]
    return _next(before, model, "fine-tuning", said, np.nan, int(last["pruned"]), int(last["kept"]), before.pruned)


def without_channels(model: "nn.Module", channels: Sequence[int], x: Any, layer: str | None = None) -> "nn.Module":
    """A copy of the model in which channels of a layer are 0, also after a norm that follows; as of `prune`."""
    name = pruned_layer(model, layer)
    chosen = _channels(channels)
    _check_channels(name, chosen, _num_channels(model.get_submodule(name)))
    ours = copy.deepcopy(model)
    _zero(ours, dict.fromkeys((name, *_norms_after(model, name, x)), tuple(chosen)))
    return ours


def without_extreme_weights(model: "nn.Module", delta: float, layers: Sequence[str] | None = None) -> "nn.Module":
    """A copy of the model with weights outside mu +- delta sigma of their layer at 0; biases stay.

    mu, sigma: mean and standard deviation of the layer's weights, those that are 0 (pruned) or not finite left out; a
    weight that is not finite is always outside. layers: names; None: the last convolution but the final layer, and
    the first dense layer. Raises InputError on a delta that is no positive number, or a layer that is not there.
    """
    import torch

    if not (np.isfinite(delta) and delta > 0):
        raise InputError(f"delta is a positive number, found {delta}")
    ours = copy.deepcopy(model)
    with torch.no_grad():
        for name in _adjusted_layers(model, layers):
            weights = _weights(ours, name)
            counted = weights.double()[weights.isfinite() & (weights != 0)]
            if len(counted):
                far = (weights.double() - counted.mean()).abs() > delta * counted.std(correction=0)
                weights[far | ~weights.isfinite()] = 0
            else:
                weights.zero_()
    return ours


# How a model is looked at and changed -------------------------------------------------------------------------


def _layers(model: "nn.Module") -> "dict[str, nn.Module]":
    """The convolutions and dense layers of a model by their dotted names, in the order of registration."""
    from torch import nn

    kinds = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds)}


def _is_convolution(module: "nn.Module") -> bool:
    from torch import nn

    return not isinstance(module, nn.Linear)


def _num_channels(module: Any) -> int:
    return int(module.weight.shape[0])


def _weights(model: "nn.Module", name: str) -> "Tensor":
    return _parameter(name, model.get_submodule(name), "weight")


def _parameter(name: str, module: "nn.Module", which: str) -> Any:
    """A layer's own numbers, to be written; None where it has none."""
    found = module._parameters.get(which)
    if found is None and getattr(module, which, None) is not None:
        raise InputError(f"{name}.{which} is computed from others; remove its parametrization first")
    return None if found is None else found.data


def _adjusted_layers(model: "nn.Module", layers: Sequence[str] | None) -> list[str]:
    known = _layers(model)
    if layers is not None:
        if unknown := [name for name in layers if name not in known]:
            raise InputError(f"layers: expected some of {', '.join(known) or 'none'}, found {unknown[0]!r}")
        return list(layers)
    convolutions = [name for name in list(known)[:-1] if _is_convolution(known[name])]
    dense = [name for name in known if not _is_convolution(known[name])]
    if not convolutions and not dense:
        raise InputError("model: expected a convolution or a dense layer to adjust, found none")
    return [*convolutions[-1:], *dense[:1]]


def _zero(model: "nn.Module", channels: Mapping[str, Sequence[int]]) -> None:
    """Sets what the channels of some layers or norms give to 0, in place."""
    for name, chosen in channels.items():
        module = model.get_submodule(name)
        owned = [_parameter(name, module, which) for which in ("weight", "bias")]
        if owned[0] is None:  # a norm without numbers of its own takes the mean away, which is 0 from now on
            owned = [getattr(module, "running_mean", None)]
        for tensor in owned:
            if tensor is not None:
                tensor[list(chosen)] = 0


def _norms_after(model: "nn.Module", layer: str, x: Any) -> list[str]:
    """The norms that a layer's channels come to before anything mixes them: those of which a channel at 0 is to be 0.

    Found by trying, as the order of registration says nothing: with the layer's first channel at 0, then at random
    numbers, such a norm sees nothing else change, and 0 the first time.
    """
    import torch
    from torch import nn

    ours = copy.deepcopy(model).eval()
    of_layer, kinds = ours.get_submodule(layer), (nn.modules.batchnorm._NormBase, nn.GroupNorm)
    norms = {name: each for name, each in ours.named_modules() if isinstance(each, kinds)}
    if not norms:
        return []
    axis, width = (1 if _is_convolution(of_layer) else -1), _num_channels(of_layer)
    inputs: dict[str, list[Any]] = {name: [] for name in norms}
    fill = [0.0]

    def watch(name: str) -> "Callable[[nn.Module, Any], None]":
        return lambda module, given: inputs[name].append(given[0].clone())

    def replace(module: "nn.Module", given: Any, output: "Tensor") -> "Tensor":
        changed = output.clone()
        channel = changed.movedim(axis, 0)[0]
        noise = torch.rand(channel.shape, generator=torch.Generator().manual_seed(0))
        channel.copy_(fill[0] * (1 + noise).to(channel))
        return changed

    for name, norm in norms.items():
        norm.register_forward_pre_hook(watch(name))
    of_layer.register_forward_hook(replace)
    few = _batch(ours, x[:2])
    with torch.no_grad():
        for fill[0] in (0.0, 1.0):
            ours(few)
    found = []
    for name, seen in inputs.items():
        if len(seen) == 2 and seen[0].dim() > 1 and seen[0].shape[1] == width:
            at_zero, at_random = (each.movedim(1, 0) for each in seen)
            same = torch.equal(at_zero[1:], at_random[1:]) and not torch.equal(at_zero[0], at_random[0])
            found += [name] if same and not at_zero[0].any() else []
    return found


def _batch(model: "nn.Module", x: Any) -> "Tensor":
    import torch

    device = next((each.device for each in model.parameters()), torch.device("cpu"))
    return (x if isinstance(x, torch.Tensor) else torch.tensor(np.asarray(x))).to(device)


def _channels(order: PruningOrder | Sequence[int] | np.ndarray) -> list[int]:
    return [int(each) for each in (order.order if isinstance(order, PruningOrder) else order)]


def _check_channels(name: str, channels: Sequence[int], width: int) -> None:
    if outside := [each for each in channels if not 0 <= each < width]:
        raise InputError(f"{name} has the channels 0 to {width - 1}, found {outside[0]}")
    if len(set(channels)) < len(channels):
        raise InputError(f"{name}: expected every channel once in the order of pruning, some come twice")


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
