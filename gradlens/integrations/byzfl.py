"""ByzFL: our detectors in front of its aggregators, its aggregators inside our filter; nothing of byzfl is imported.

    server.robust_aggregator.pre_agg_list.append(PreAggregator(Recorder(detector="krum", sent="updates"), state))
    filtered(wrapped(byzfl.TrMean(2)), DETECTORS["krum"]())

Tested with byzfl 0.0.11. ByzFL hands over vectors without names: client i is the i-th of them, "0", "1", ..., in every
round.
"""

from collections.abc import Callable
from copy import copy
from dataclasses import dataclass
from typing import Any

import numpy as np

from gradlens.aggregators import Aggregator, mean
from gradlens.aggregators.rules import rows_of
from gradlens.integrations import Answer, State, kept, read_safely
from gradlens.log import UpdateLog
from gradlens.log.intake import Unfit, as_array
from gradlens.server import Recorder

__all__ = ["PreAggregator", "wrapped"]


class PreAggregator:
    """Called with vectors, as a list of them or as rows [client, number], gives those that are kept, as it got them.

    global_model: layer -> array, in the order in which the vectors hold the layers, or a function that gives it, as
    `server.get_dict_parameters`; vectors are gradients for a recorder of `sent="updates"`, local models for one of
    "models". Where nobody is kept, one vector is left that changes nothing: zero, or the global model. ByzFL's rules
    with an f raise where 2f reaches the number of those who are kept: there our filter around `wrapped` is the way.
    """

    def __init__(self, recorder: Recorder, global_model: State | Callable[[], State]) -> None:
        self.recorder, self.global_model = recorder, global_model

    def __call__(self, vectors: Any) -> Any:
        """The vectors of the clients that are kept."""
        state = self.global_model() if callable(self.global_model) else self.global_model
        start = {name: as_array(value)[0] for name, value in state.items()}
        answers = [Answer(vector, str(place), _read(vector, start), 1) for place, vector in enumerate(vectors)]
        found = kept(self.recorder, start, answers)
        rows = [_flat(each.state, each.message) if each.state else each.message for each in found]
        if not rows:
            still = start if self.recorder.sent == "models" else {name: 0 * array for name, array in start.items()}
            rows = [_flat(still, vectors[0])]
        if isinstance(vectors, list):
            return rows
        return np.stack(rows) if isinstance(vectors, np.ndarray) else vectors.new_tensor(np.stack(rows))

    def __repr__(self) -> str:
        return f"PreAggregator({self.recorder!r})"


def wrapped(aggregate: Callable[[Any], Any]) -> Aggregator:
    """One of ByzFL's aggregators as one of ours, over the clients whose numbers are finite, in the order of names.

    Its f is lowered to the most that it stands, 2f < n, where fewer clients are left than it was made for. Buffers
    are averaged; without clients the update is zero.
    """
    return Wrapped(aggregate)


@dataclass(frozen=True)
class Wrapped:
    """What `wrapped` builds."""

    aggregate: Callable[[Any], Any]

    def __call__(self, log: UpdateLog) -> dict[str, np.ndarray]:
        round_, update = log[-1], mean()(log)
        rows = rows_of(round_)
        if not len(rows):
            return update
        rule, names = copy(self.aggregate), log.model.parameters
        if hasattr(rule, "f"):
            rule.f = min(rule.f, (len(rows) - 1) // 2)  # type: ignore[attr-defined]
        found = np.asarray(rule(np.concatenate([round_.flat(name)[rows] for name in names], axis=1)))
        return {**update, **_layers(found, {name: update[name] for name in names})}

    def __repr__(self) -> str:
        settings = ", ".join(f"{name}={value!r}" for name, value in vars(self.aggregate).items())
        return f"wrapped({type(self.aggregate).__name__}({settings}))"


def _read(vector: Any, like: State) -> State | Unfit:
    """Layer -> array, or why the vector is none of this model."""
    return read_safely(lambda: _layers(as_array(vector)[0].reshape(-1), like))


def _layers(vector: np.ndarray, like: State) -> dict[str, np.ndarray]:
    """The numbers of a vector [number] as layers of these shapes; raises Unfit for another number of them."""
    sizes = [array.size for array in like.values()]
    if len(vector) != sum(sizes):
        raise Unfit(f"a vector must hold {sum(sizes)} numbers, found {len(vector)}")
    parts = np.split(vector, np.cumsum(sizes)[:-1])
    return {name: part.reshape(array.shape) for (name, array), part in zip(like.items(), parts, strict=True)}


def _flat(state: State, like: Any) -> Any:
    """Layers as one vector of the kind of `like`: an array, or a tensor of its library."""
    vector = np.concatenate([np.ravel(array) for array in state.values()])
    return vector.astype(like.dtype) if isinstance(like, np.ndarray) else like.new_tensor(vector)
