"""ByzFL: gradlens detectors in front of its aggregators, its aggregators inside a gradlens filter.

    server.robust_aggregator.pre_agg_list.append(PreAggregator(Recorder(detector="krum", sent="updates"), state))
    filtered(wrapped(byzfl.TrMean(2)), DETECTORS["krum"]())

Tested with byzfl 0.0.11; nothing of it is imported here. ByzFL passes vectors without names: client i is the i-th
vector, "0", "1", ..., in every round.
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
    """A pre-aggregator of ByzFL that records and judges the clients' vectors and passes on those that are kept.

    Parameters
    ----------
    recorder : Recorder
        Records and judges. With `sent="updates"` the vectors are gradients, with `sent="models"` local models.
    global_model : Mapping of str to array, or callable
        Layer -> array, in the order in which the vectors hold the layers; or a function () -> such a mapping, such as
        `server.get_dict_parameters`.

    Notes
    -----
    If nobody is kept, a single vector is passed on that changes nothing: zero, or the global model.

    **Fails when** one of ByzFL's rules with an f follows and 2f reaches the number of clients that are kept: the rule
    then raises. Put a filter around `wrapped` instead.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> vectors = rng.normal(size=(10, 8)).astype(np.float32)
    >>> vectors[3] *= 20
    >>> before = PreAggregator(Recorder(detector="layer_norms", sent="updates"), {"fc.weight": np.zeros((2, 4))})
    >>> before(vectors).shape
    (9, 8)
    """

    def __init__(self, recorder: Recorder, global_model: State | Callable[[], State]) -> None:
        self.recorder, self.global_model = recorder, global_model

    def __call__(self, vectors: Any) -> Any:
        """Records and judges the vectors, and returns those of the clients that are kept.

        Parameters
        ----------
        vectors : list of vectors, array or tensor [client, number]
            One vector per client.

        Returns
        -------
        list of vectors, array or tensor [client, number]
            Of the same kind as `vectors`.

        Raises
        ------
        FilterStopped
            If the recorder's filter is set to stop in such a round.
        """
        state = self.global_model() if callable(self.global_model) else self.global_model
        start = {name: as_array(value)[0] for name, value in state.items()}
        answers = [Answer(vector, str(place), _read(vector, start), 1) for place, vector in enumerate(vectors)]
        chosen = kept(self.recorder, start, answers)
        rows = [_flat(answer.state, answer.message) if answer.state else answer.message for answer in chosen]
        if not rows:
            neutral = start if self.recorder.sent == "models" else {name: 0 * array for name, array in start.items()}
            rows = [_flat(neutral, vectors[0])]
        if isinstance(vectors, list):
            return rows
        return np.stack(rows) if isinstance(vectors, np.ndarray) else vectors.new_tensor(np.stack(rows))

    def __repr__(self) -> str:
        return f"PreAggregator({self.recorder!r})"


def wrapped(aggregate: Callable[[Any], Any]) -> Aggregator:
    """Turns one of ByzFL's aggregators into a gradlens aggregator.

    Parameters
    ----------
    aggregate : callable
        One of ByzFL's aggregators: array [client, number] -> aggregate [number].

    Returns
    -------
    Aggregator
        It aggregates the clients whose numbers are all finite, in the order of their names. Buffers are averaged;
        without clients the update is zero.

    Notes
    -----
    If the aggregator has an f, it is lowered to the largest f with 2f < n where a filter leaves only n clients.

    Examples
    --------
    >>> from gradlens.examples import example_log
    >>> class Median:
    ...     def __call__(self, vectors):
    ...         return np.median(vectors, axis=0)
    >>> rule = wrapped(Median())
    >>> rule
    wrapped(Median())
    >>> rule(example_log())["fc2.bias"].shape
    (4,)
    """
    return Wrapped(aggregate)


@dataclass(frozen=True)
class Wrapped:
    """One of ByzFL's aggregators as a gradlens aggregator, as `wrapped` builds it.

    Attributes
    ----------
    aggregate : callable
        ByzFL's aggregator: array [client, number] -> aggregate [number].

    Examples
    --------
    >>> from gradlens.examples import example_log
    >>> sorted(Wrapped(lambda vectors: vectors.mean(axis=0))(example_log()))
    ['fc1.bias', 'fc1.weight', 'fc2.bias', 'fc2.weight']
    """

    aggregate: Callable[[Any], Any]

    def __call__(self, log: UpdateLog) -> dict[str, np.ndarray]:
        """Returns the aggregated update of the last round, layer -> array [*shape]."""
        round_, update = log[-1], mean()(log)
        rows = rows_of(round_)
        if not len(rows):
            return update
        rule, names = copy(self.aggregate), log.model.parameters
        if hasattr(rule, "f"):
            rule.f = min(rule.f, (len(rows) - 1) // 2)  # type: ignore[attr-defined]
        aggregated = np.asarray(rule(np.concatenate([round_.flat(name)[rows] for name in names], axis=1)))
        return {**update, **_layers(aggregated, {name: update[name] for name in names})}

    def __repr__(self) -> str:
        settings = ", ".join(f"{name}={value!r}" for name, value in vars(self.aggregate).items())
        return f"wrapped({type(self.aggregate).__name__}({settings}))"


def _read(vector: Any, like: State) -> State | Unfit:
    """The vector as layer -> array, or why it does not fit this model."""
    return read_safely(lambda: _layers(as_array(vector)[0].reshape(-1), like))


def _layers(vector: np.ndarray, like: State) -> dict[str, np.ndarray]:
    """Splits a vector [number] into layers of these shapes; raises Unfit unless the numbers add up."""
    sizes = [array.size for array in like.values()]
    if len(vector) != sum(sizes):
        raise Unfit(f"a vector must hold {sum(sizes)} numbers, found {len(vector)}")
    parts = np.split(vector, np.cumsum(sizes)[:-1])
    return {name: part.reshape(array.shape) for (name, array), part in zip(like.items(), parts, strict=True)}


def _flat(state: State, like: Any) -> Any:
    """Concatenates layers into one vector of the kind of `like`: a numpy array, or a tensor."""
    vector = np.concatenate([np.ravel(array) for array in state.values()])
    return vector.astype(like.dtype) if isinstance(like, np.ndarray) else like.new_tensor(vector)
