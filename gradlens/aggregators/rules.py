"""Rules that average: mean, median, trimmed mean, geometric median, RLR; and their common class, `Rule`."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import partial

import numpy as np
from scipy import sparse

from gradlens.errors import InputError
from gradlens.log import Round, UpdateLog
from gradlens.settings import Configured, configured, whole_number, whole_number_or_none

__all__ = [
    "Aggregator",
    "Rule",
    "geometric_median",
    "mean",
    "median",
    "rlr",
    "step",
    "trimmed_mean",
]

Aggregator = Callable[[UpdateLog], dict[str, np.ndarray]]  # layer -> aggregated update [*shape]
Weighing = Callable[[Round, np.ndarray], np.ndarray]  # (round, positions) -> weight of each client, float64 [client]


def mean(weighted: bool = False, cap: float = 10.0) -> Aggregator:
    """Averages the updates, each client counting alike or by its number of examples.

    Parameters
    ----------
    weighted : bool
        Whether a client counts by `num_examples`, which is a claim.
    cap : float
        Multiple of the median client's number of examples that a client counts at most.

    Returns
    -------
    Aggregator
        Buffers are averaged in the same way.

    Notes
    -----
    As in [1]_, the aggregate is sum_i w_i u_i / sum_i w_i, with w_i = 1, or w_i = min(n_i, cap * median of n).

    **Fails when** anybody attacks: one client moves the mean as far as it likes. It is the baseline.

    References
    ----------
    .. [1] McMahan et al. 2017, "Communication-Efficient Learning of Deep Networks from Decentralized Data".

    Examples
    --------
    >>> from gradlens.examples import example_log
    >>> mean()(example_log())["fc2.bias"].shape
    (4,)
    """
    settings = {"weighted": weighted, "cap": float(cap)}
    return Rule(configured(_mean, **settings), weighing=partial(_shares, **settings))


def median() -> Aggregator:
    """Takes the median of each coordinate; buffers are averaged.

    Returns
    -------
    Aggregator
        Of an even number of clients, the mean of the two middle values.

    Notes
    -----
    As in [1]_, the aggregate of coordinate j is the median over i of u_ij. It stays within the range of the benign
    values as long as fewer than half of the clients are malicious.

    **Fails when** benign clients differ much more than the attackers' shift, as under label skew: a small consistent
    shift of a minority moves every coordinate a little.

    References
    ----------
    .. [1] Yin et al. 2018, "Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates",
       arXiv:1803.01498.

    Examples
    --------
    >>> from gradlens.examples import example_log
    >>> median()(example_log())["fc2.bias"].shape
    (4,)
    """
    return Rule(configured(_median))


def trimmed_mean(num_malicious: int | None = None) -> Aggregator:
    """Averages each coordinate without its smallest and largest values.

    Parameters
    ----------
    num_malicious : int, optional
        How many values are left out at each end, fewer than half of the clients. None leaves one or two values, which
        is the median.

    Returns
    -------
    Aggregator
        Buffers are averaged.

    Raises
    ------
    InputError
        If `num_malicious` is no count.

    Notes
    -----
    Definition 2 of [1]_ with beta = num_malicious / number of clients. It tolerates `num_malicious` malicious clients.

    **Fails when** there are more of them, or they stay inside the range of the benign values (a little is enough).

    References
    ----------
    .. [1] Yin et al. 2018, "Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates",
       arXiv:1803.01498.

    Examples
    --------
    >>> from gradlens.examples import example_log
    >>> trimmed_mean(num_malicious=1)(example_log())["fc2.bias"].shape
    (4,)
    """
    number = whole_number_or_none("trimmed_mean: num_malicious", num_malicious)
    return Rule(configured(_trimmed_mean, num_malicious=number))


def geometric_median(smoothing: float = 1e-6, iterations: int = 100) -> Aggregator:
    """Finds the point whose distances to the updates have the smallest sum, by the smoothed Weiszfeld algorithm.

    Parameters
    ----------
    smoothing : float
        Smallest distance that a client is divided by, a length; 1e-6 as in [1]_.
    iterations : int
        Most iterations. The paper is content with 3, since each costs its server a round of messages; here they cost
        nothing.

    Returns
    -------
    Aggregator
        Buffers are averaged with the same weights.

    Raises
    ------
    InputError
        Unless both are positive.

    Notes
    -----
    From the mean on, each client weighs 1 / max(smoothing, its distance to the last point); every client counts alike
    in the sum of distances. Weights follow from inner products, so that coordinates are read once; they are rounded to
    float32, so that their last digit does not depend on who else took part.

    **Fails when** half of the clients are malicious, or the benign updates differ more than the attackers shift them.

    References
    ----------
    .. [1] Pillutla, Kakade & Harchaoui 2019, "Robust Aggregation for Federated Learning" (RFA), arXiv:1912.13445.

    Examples
    --------
    >>> from gradlens.examples import example_log
    >>> geometric_median()(example_log())["fc2.bias"].shape
    (4,)
    """
    if not smoothing > 0:
        raise InputError(f"geometric_median: smoothing is a length above 0, found {smoothing!r}")
    count = whole_number("geometric_median: iterations", iterations, least=1)
    return Rule(configured(_geometric_median, smoothing=float(smoothing), iterations=count))


def rlr(threshold: int | None = None) -> Aggregator:
    """Averages the updates, and reverses each coordinate on whose sign too few clients agree.

    Parameters
    ----------
    threshold : int, optional
        |sum of the clients' signs| from which a coordinate is not reversed. None: (n - 1) // 2 + 1, which no minority
        reaches alone; the authors' program has 4 of 10 clients and 8 of 33. More than there are clients is treated as
        None.

    Returns
    -------
    Aggregator
        Buffers are averaged.

    Raises
    ------
    InputError
        If the threshold is no count above 0.

    Notes
    -----
    Equations 4 and 5 of [1]_, every client counting alike.

    **Fails when** benign clients disagree on many signs, as late in training or under label skew: it then undoes what
    they learn.

    References
    ----------
    .. [1] Ozdayi, Kantarcioglu & Gel 2021, "Defending against Backdoors in Federated Learning with Robust Learning
       Rate", AAAI, arXiv:2007.03767.

    Examples
    --------
    >>> from gradlens.examples import example_log
    >>> rlr()(example_log())["fc2.bias"].shape
    (4,)
    """
    return Rule(configured(_rlr, threshold=whole_number_or_none("rlr: threshold", threshold, 1)))


def step(
    global_model: Mapping[str, np.ndarray],
    update: Mapping[str, np.ndarray],
    server_learning_rate: float = 1.0,
    *,
    momentum: float = 0.0,
    before: Mapping[str, np.ndarray] | None = None,
    buffers: Collection[str] = (),
) -> dict[str, np.ndarray]:
    """Computes the next global model from the aggregated update.

    Parameters
    ----------
    global_model : Mapping of str to array
        Layer -> array [*shape], before the round.
    update : Mapping of str to array
        Layer -> aggregated update [*shape], for every layer of the global model.
    server_learning_rate : float, default 1.0
        Factor of the update.
    momentum : float, default 0.0
        Factor of the global model's last change, which is added.
    before : Mapping of str to array, optional
        Layer -> array, the global model before the last round; None, in the first round: no momentum is added.
    buffers : collection of str
        Layers that are not trained; their update is added as it is.

    Returns
    -------
    dict of str to array
        Layer -> array [*shape], in the dtype of the global model's layer (integers rounded).

    Raises
    ------
    KeyError
        If the update, or `before` where it is needed, lacks a layer.

    Notes
    -----
    A parameter w becomes w + server_learning_rate * update + momentum * (w - before), computed in float64.

    Examples
    --------
    >>> step({"fc.bias": np.array([1.0, 2.0])}, {"fc.bias": np.array([0.5, -0.5])}, server_learning_rate=2.0)
    {'fc.bias': array([2., 1.])}
    """

    def stepped(name: str, array: np.ndarray) -> np.ndarray:
        weights = np.asarray(array, np.float64)
        if name in buffers:
            return weights + update[name]
        velocity = momentum * (weights - before[name]) if momentum and before is not None else 0.0
        return np.float64(server_learning_rate) * update[name] + weights + velocity

    return {name: _cast(stepped(name, array), array.dtype) for name, array in global_model.items()}


@dataclass(frozen=True, repr=False)
class Rule:
    """An aggregation rule with its settings: a function of a log that prints like the call that built it.

    Attributes
    ----------
    method : Configured
        The function (log, **settings) -> update, or (inner rule, log, **settings) -> update.
    inner : Aggregator, optional
        The rule that this one is put around.
    weighing : callable, optional
        (round, positions) -> the weight of each of these clients in the mean that the rule ends in, float64 [client];
        None: all weights are equal.

    Examples
    --------
    >>> trimmed_mean(num_malicious=2)
    trimmed_mean(num_malicious=2)
    >>> trimmed_mean(num_malicious=2) == trimmed_mean(num_malicious=2)
    True
    """

    method: Configured
    inner: Aggregator | None = None
    weighing: Weighing | None = field(default=None, compare=False)

    def __call__(self, log: UpdateLog) -> dict[str, np.ndarray]:
        """Returns the aggregated update of the last round, layer -> array [*shape]."""
        return self.method(log) if self.inner is None else self.method(self.inner, log)

    def __repr__(self) -> str:
        parts = [] if self.inner is None else [repr(self.inner)]
        parts += [f"{name}={f'{v:g}' if isinstance(v, float) else repr(v)}" for name, v in self.method.settings]
        return f"{self.method.function.__name__.strip('_')}({', '.join(parts)})"


def _mean(log: UpdateLog, weighted: bool, cap: float) -> dict[str, np.ndarray]:
    rows = rows_of(log[-1])
    return averaged(log, rows, _shares(log[-1], rows, weighted, cap))


def _shares(round_: Round, rows: np.ndarray, weighted: bool, cap: float) -> np.ndarray:
    """The weight of each of these clients in the mean, float64 [client]."""
    return capped(round_.num_examples[rows], cap) if weighted else np.ones(len(rows))


def _median(log: UpdateLog) -> dict[str, np.ndarray]:
    return _trimmed_mean(log, None)


def _geometric_median(log: UpdateLog, smoothing: float, iterations: int) -> dict[str, np.ndarray]:
    gram = log[-1].total_gram  # first: it also computes the norms, which tell who is finite
    rows = rows_of(log[-1])
    return averaged(log, rows, weiszfeld(gram[np.ix_(rows, rows)], smoothing, iterations))


def _rlr(log: UpdateLog, threshold: int | None) -> dict[str, np.ndarray]:
    round_, rows = log[-1], rows_of(log[-1])
    update = averaged(log, rows, np.ones(len(rows)))
    majority = (len(rows) - 1) // 2 + 1
    least = majority if threshold is None or threshold > len(rows) else threshold
    for name in log.model.parameters:
        flat, start = update[name].reshape(-1), 0
        for block in round_.blocks(name):
            stop = start + block.shape[1]
            votes = np.sign(block[rows]).sum(axis=0, dtype=np.float64)
            flat[start:stop] *= np.where(np.abs(votes) >= least, 1, -1).astype(np.float32)
            start = stop
    return update


def rows_of(round_: Round) -> np.ndarray:
    """Returns the positions of the clients whose numbers are all finite, int64 [client], in the order of their names.

    Examples
    --------
    >>> from gradlens.examples import example_log
    >>> rows_of(example_log(num_clients=4)[-1]).tolist()
    [0, 1, 2, 3]
    """
    order = np.argsort(round_.clients)
    return order[round_.finite[order]]


def capped(num_examples: np.ndarray, cap: float) -> np.ndarray:
    """Returns claimed numbers of examples as weights, float64 [client], of at most `cap` times the median claim.

    Negative claims count as 0. If all weights would be 0, all are 1.

    Examples
    --------
    >>> capped(np.array([10, 20, 30, 1_000_000]), cap=10.0).tolist()
    [10.0, 20.0, 30.0, 250.0]
    """
    claims = np.maximum(num_examples, 0).astype(np.float64)
    weights = np.minimum(claims, cap * np.median(claims)) if len(claims) else claims
    return weights if weights.any() else np.ones(len(claims))


def scaled(log: UpdateLog, rows: np.ndarray, factors: np.ndarray) -> UpdateLog:
    """Scales the updates of the last round.

    Parameters
    ----------
    log : UpdateLog
        Its last round is scaled.
    rows : ndarray of int [client]
        Positions of clients in the last round.
    factors : ndarray of float64 [client]
        What each client's update is multiplied by; 0 leaves the client out.

    Returns
    -------
    UpdateLog
        Its last round holds these clients only.

    Examples
    --------
    >>> from gradlens.examples import example_log
    >>> len(scaled(example_log(), np.arange(3), np.array([1.0, 0.5, 0.0]))[-1])
    2
    """
    rows, factors = rows[factors > 0], factors[factors > 0]
    part = log.keep(rows)
    if (factors == 1).all():
        return part
    return part.combined(sparse.csr_array((factors, np.arange(len(rows)), np.arange(len(rows) + 1))))


def clip_factors(norms: np.ndarray, bound: float) -> np.ndarray:
    """Returns the factors that clip norms to a bound, float64 [client]: 1 where a norm is at most the bound.

    Examples
    --------
    >>> clip_factors(np.array([1.0, 2.0, 4.0]), bound=2.0).tolist()
    [1.0, 1.0, 0.5]
    """
    return bound / np.maximum(norms, bound) if bound > 0 else np.where(norms > 0, 0.0, 1.0)


def averaged(log: UpdateLog, rows: np.ndarray, weights: np.ndarray) -> dict[str, np.ndarray]:
    """Returns the weighted mean of clients of the last round, layer -> array [*shape]; zeros without clients.

    `rows` holds the positions of the clients, int [client], `weights` their weights, float64 [client].

    Examples
    --------
    >>> from gradlens.examples import example_log
    >>> averaged(example_log(), np.arange(3), np.ones(3))["fc2.bias"].shape
    (4,)
    """
    return {name: log[-1].weighted_mean(name, rows, weights) for name in log.model}


def _trimmed_mean(log: UpdateLog, num_malicious: int | None) -> dict[str, np.ndarray]:
    """The mean of each coordinate without the `num_malicious` smallest and largest values; None: the median."""
    round_, rows = log[-1], rows_of(log[-1])
    trimmed = tolerated_of(num_malicious, (len(rows) - 1) // 2)
    return {
        layer.name: round_.trimmed_mean(layer.name, trimmed, round_.finite)
        if layer.kind != "buffer"
        else round_.weighted_mean(layer.name, rows, np.ones(len(rows)))
        for layer in log.model.layers
    }


def tolerated_of(num_malicious: int | None, most: int) -> int:
    """Returns how many malicious clients a rule tolerates: `num_malicious`, but at most `most`; None: `most`."""
    most = max(0, most)
    return most if num_malicious is None else min(num_malicious, most)


def weiszfeld(gram: np.ndarray, smoothing: float, iterations: int) -> np.ndarray:
    """Finds the clients' weights in the geometric median of their updates by the smoothed Weiszfeld algorithm.

    Parameters
    ----------
    gram : ndarray of float64 [client, client]
        Inner products of the updates.
    smoothing : float
        Smallest distance that a client is divided by.
    iterations : int
        Most iterations.

    Returns
    -------
    ndarray of float64 [client]
        Weights, the largest of which is 1.

    Examples
    --------
    >>> updates = np.array([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [50.0, 50.0]])
    >>> weiszfeld(updates @ updates.T, smoothing=1e-6, iterations=100).round(3).argmin().item()
    3
    """
    weights = np.ones(len(gram))
    for _ in range(iterations if len(gram) else 0):
        shares = weights / weights.sum()
        products = gram @ shares
        squares = np.diagonal(gram) - 2 * products + shares @ products  # of the distances to the last point
        nearness = 1 / np.maximum(smoothing, np.sqrt(np.maximum(squares, 0)))
        before, weights = weights, nearness / nearness.max()
        if (np.abs(weights - before) <= 1e-12 * before).all():
            break
    return weights.astype(np.float32).astype(np.float64)


def _cast(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Casts float64 numbers to `dtype`: integers are rounded, numbers beyond the range of float32 become infinite."""
    with np.errstate(over="ignore"):
        return np.asarray(np.rint(values) if np.issubdtype(dtype, np.integer) else values, dtype)
