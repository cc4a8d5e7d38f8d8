"""What every aggregation rule is made of: its form, the clients that enter, weights and means, the server's step."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

import numpy as np
from scipy import sparse

from gradlens.log import Round, UpdateLog
from gradlens.settings import Configured

__all__ = ["Aggregator", "Rule", "Weighing", "step"]

Aggregator = Callable[[UpdateLog], dict[str, np.ndarray]]  # layer -> aggregated update [*shape]
Weighing = Callable[[Round, np.ndarray], np.ndarray]  # (round, positions) -> what each client counts, float64 [client]


@dataclass(frozen=True, repr=False)
class Rule:
    """What every builder of a rule returns: a function of a log with its settings, which prints like the call.

    Attributes
    ----------
    method : Configured
        The function (log, **settings) -> update, or (inner rule, log, **settings) -> update.
    inner : Aggregator, optional
        The rule that this one is put around.
    weighing : callable, optional
        (round, positions) -> what each of these clients counts in the mean that the rule ends in, float64 [client];
        without one all clients count alike.

    Examples
    --------
    >>> from gradlens.aggregators import krum
    >>> krum(num_malicious=2)
    krum(num_malicious=2)
    >>> krum(num_malicious=2) == krum(num_malicious=2)
    True
    """

    method: Configured
    inner: Aggregator | None = None
    weighing: Weighing | None = field(default=None, compare=False)

    def __call__(self, log: UpdateLog) -> dict[str, np.ndarray]:
        """The aggregated update of the last round, layer -> array [*shape]."""
        return self.method(log) if self.inner is None else self.method(self.inner, log)

    def __repr__(self) -> str:
        parts = [] if self.inner is None else [repr(self.inner)]
        parts += [f"{name}={f'{v:g}' if isinstance(v, float) else repr(v)}" for name, v in self.method.settings]
        return f"{self.method.function.__name__.strip('_')}({', '.join(parts)})"


def step(
    global_model: Mapping[str, np.ndarray],
    update: Mapping[str, np.ndarray],
    server_learning_rate: float = 1.0,
    *,
    momentum: float = 0.0,
    before: Mapping[str, np.ndarray] | None = None,
    buffers: Collection[str] = (),
) -> dict[str, np.ndarray]:
    """The next global model, layer -> array: global + server learning rate x update + momentum x last change.

    before: the global model before the last round, None in the first one. Buffers take the update as it is. In
    float64, then back to each layer's own dtype (integers rounded). Raises KeyError for a layer without update.
    """

    def moved(name: str, array: np.ndarray) -> np.ndarray:
        now = np.asarray(array, np.float64)
        if name in buffers:
            return now + update[name]
        pushed = momentum * (now - before[name]) if momentum and before is not None else 0.0
        return np.float64(server_learning_rate) * update[name] + now + pushed

    return {name: _cast(moved(name, array), array.dtype) for name, array in global_model.items()}


def rows_of(round_: Round) -> np.ndarray:
    """Positions of the clients whose numbers are all finite, in the order of their names."""
    order = np.argsort(round_.clients)
    return order[round_.finite[order]]


def capped(num_examples: np.ndarray, cap: float) -> np.ndarray:
    """Weights [client] of the claimed numbers of examples; all alike where nobody claims any."""
    claims = np.maximum(num_examples, 0).astype(np.float64)
    weights = np.minimum(claims, cap * np.median(claims)) if len(claims) else claims
    return weights if weights.any() else np.ones(len(claims))


def scaled(log: UpdateLog, rows: np.ndarray, factors: np.ndarray) -> UpdateLog:
    """Returns the log whose last round holds only these clients, each times its factor [client]; 0 leaves it out."""
    rows, factors = rows[factors > 0], factors[factors > 0]
    part = log.keep(rows)
    if (factors == 1).all():
        return part
    return part.combined(sparse.csr_array((factors, np.arange(len(rows)), np.arange(len(rows) + 1))))


def clip_factors(norms: np.ndarray, bound: float) -> np.ndarray:
    """Factors that bring each norm to at most the bound, [client]: 1 where it is not above it."""
    return bound / np.maximum(norms, bound) if bound > 0 else np.where(norms > 0, 0.0, 1.0)


def averaged(log: UpdateLog, rows: np.ndarray, weights: np.ndarray) -> dict[str, np.ndarray]:
    """The weighted mean of these clients of the last round, layer -> float32 [*shape]; zeros without clients."""
    return {name: log[-1].weighted_mean(name, rows, weights) for name in log.model}


def tolerated_of(num_malicious: int | None, most: int) -> int:
    """How many malicious clients the rule tolerates: as many as asked for, at most `most`; None: `most`."""
    most = max(0, most)
    return most if num_malicious is None else min(num_malicious, most)


def _cast(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Float64 numbers as `dtype`: integers rounded, what is beyond float32 infinite."""
    with np.errstate(over="ignore"):
        return np.asarray(np.rint(values) if np.issubdtype(dtype, np.integer) else values, dtype)
