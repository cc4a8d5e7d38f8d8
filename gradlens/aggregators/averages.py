"""Rules that average: mean, median, trimmed mean, geometric median, robust learning rate."""

from functools import partial

import numpy as np

from gradlens.aggregators.rules import Aggregator, Rule, averaged, capped, rows_of, tolerated_of
from gradlens.errors import InputError
from gradlens.log import Round, UpdateLog
from gradlens.settings import configured, whole_number, whole_number_or_none

__all__ = ["geometric_median", "mean", "median", "rlr", "trimmed_mean"]


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


def _mean(log: UpdateLog, weighted: bool, cap: float) -> dict[str, np.ndarray]:
    rows = rows_of(log[-1])
    return averaged(log, rows, _shares(log[-1], rows, weighted, cap))


def _shares(round_: Round, rows: np.ndarray, weighted: bool, cap: float) -> np.ndarray:
    """What each of these clients counts in the mean, float64 [client]."""
    return capped(round_.num_examples[rows], cap) if weighted else np.ones(len(rows))


def _median(log: UpdateLog) -> dict[str, np.ndarray]:
    return _trimmed_mean(log, None)


def _trimmed_mean(log: UpdateLog, num_malicious: int | None) -> dict[str, np.ndarray]:
    """The mean of each coordinate's middle values; None: of the one or two in the very middle."""
    round_, rows = log[-1], rows_of(log[-1])
    trimmed = tolerated_of(num_malicious, (len(rows) - 1) // 2)
    return {
        layer.name: round_.trimmed_mean(layer.name, trimmed, round_.finite)
        if layer.kind == "parameter"
        else round_.weighted_mean(layer.name, rows, np.ones(len(rows)))
        for layer in log.model.layers
    }


def _geometric_median(log: UpdateLog, smoothing: float, iterations: int) -> dict[str, np.ndarray]:
    gram = log[-1].total_gram  # first: it finds the norms, by which who is finite is known
    rows = rows_of(log[-1])
    return averaged(log, rows, weiszfeld(gram[np.ix_(rows, rows)], smoothing, iterations))


def weiszfeld(gram: np.ndarray, smoothing: float, iterations: int) -> np.ndarray:
    """Weights [client] of the geometric median, the largest 1, from inner products [client, client]."""
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
