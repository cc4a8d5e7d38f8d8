"""What is put around a rule, clipping and noise, and the published rules that are made of it.

Clipped clients are linear combinations of clients (`Round.combined`): nothing is copied. Noise has an address (seed,
purpose and round), so that a replay draws the same bits. Buffers are averaged over the clients that enter, and never
clipped or noised.
"""

import numpy as np

from gradlens.aggregators.averages import mean
from gradlens.aggregators.filters import filtered
from gradlens.aggregators.rules import Aggregator, Rule, Weighing, averaged, clip_factors, rows_of, scaled
from gradlens.detectors import flame as flame_detector
from gradlens.detectors.distances import inner_products
from gradlens.errors import InputError
from gradlens.log import UpdateLog
from gradlens.settings import configured, whole_number

__all__ = ["centred_clipping", "clipped", "crfl", "flame", "noised", "norm_clipping", "weak_dp"]

NOISE = 101  # purpose of the random numbers, apart from those of buckets and of simulations
FINEST = np.float32  # clipping factors are rounded to it: their last digits in float64 depend on who else took part


def clipped(aggregate: Aggregator, bound: float | None = None) -> Aggregator:
    """Clips the L2 norm of each whole update to a bound, then aggregates.

    Parameters
    ----------
    aggregate : Aggregator
        The rule that aggregates the clipped updates.
    bound : float, optional
        A length above 0. None: the median norm of the round's finite clients, which follows training.

    Returns
    -------
    Aggregator
        Buffers are never clipped.

    Raises
    ------
    InputError
        For any other bound.

    Notes
    -----
    Each update becomes u / max(1, norm(u) / bound) ([1]_, section 4).

    **Fails when** attackers keep to the norm of benign clients.

    References
    ----------
    .. [1] Sun, Kairouz, Suresh & McMahan 2019, "Can You Really Backdoor Federated Learning?", arXiv:1911.07963.

    Examples
    --------
    >>> from gradlens.aggregators import mean
    >>> clipped(mean(), bound=1.0)
    clipped(mean(weighted=False, cap=10), bound=1)
    """
    return Rule(configured(_clipped, bound=_bound("clipped", bound)), aggregate, _weighing(aggregate))


def noised(aggregate: Aggregator, std: float, seed: int = 0) -> Aggregator:
    """Aggregates, then adds Gaussian noise to each parameter of the update.

    Parameters
    ----------
    aggregate : Aggregator
        The rule.
    std : float
        Standard deviation of the noise, in units of the weights, at least 0.
    seed : int
        The noise of round i is drawn from default_rng([seed, 101, i]), layer after layer.

    Returns
    -------
    Aggregator
        Buffers get no noise. Without a finite client there is none.

    Raises
    ------
    InputError
        Unless `std` is a finite number of at least 0 and `seed` a count.

    Notes
    -----
    Around a filter the noise also moves a model that the filter keeps: put the filter outside.

    **Fails when** the noise is small beside the backdoor's update, or so large that it hides what is learned.

    Examples
    --------
    >>> from gradlens.aggregators import mean
    >>> noised(mean(), std=0.01)
    noised(mean(weighted=False, cap=10), std=0.01, seed=0)
    """
    method = configured(_noised, std=_std("noised", std), seed=whole_number("noised: seed", seed))
    return Rule(method, aggregate, _weighing(aggregate))


def norm_clipping(bound: float | None = None) -> Aggregator:
    """Averages the updates, each clipped to a norm.

    Parameters
    ----------
    bound : float, optional
        A length above 0; None: the median norm of the round's clients. The paper's bounds are 3, 5 and 10 on updates of
        its own model: a bound says nothing without the benign norms.

    Returns
    -------
    Aggregator
        As `clipped(mean(), bound)`.

    Raises
    ------
    InputError
        For a bound that is no length.

    Notes
    -----
    "Norm thresholding of updates" in [1]_: the mean of u / max(1, norm(u) / bound).

    **Fails when** attackers train within the bound, or are a large share of the clients.

    References
    ----------
    .. [1] Sun, Kairouz, Suresh & McMahan 2019, "Can You Really Backdoor Federated Learning?", arXiv:1911.07963.

    Examples
    --------
    >>> from gradlens.examples import example_log
    >>> norm_clipping(bound=1.0)(example_log())["fc2.bias"].shape
    (4,)
    """
    return Rule(configured(_norm_clipping, bound=_bound("norm_clipping", bound)))


def weak_dp(bound: float | None = None, std: float = 0.025, seed: int = 0) -> Aggregator:
    """Averages clipped updates and adds noise, too little of it for differential privacy.

    Parameters
    ----------
    bound : float, optional
        As for `norm_clipping`; the paper's runs have 5.
    std : float
        Standard deviation of the noise on the aggregate, in each coordinate. 0.025 is the paper's as most programs read
        it; backdoors101 takes it for the variance (0.158). Programs that add noise to the sum, such as TensorFlow
        Privacy's GaussianSumQuery, divide theirs by the number of clients.
    seed : int
        As for `noised`.

    Returns
    -------
    Aggregator
        As `noised(clipped(mean(), bound), std, seed)`.

    Raises
    ------
    InputError
        For a setting out of its range.

    Notes
    -----
    "(Weak) differential privacy" in [1]_.

    **Fails when** the bound fails; at the scales measured here the noise adds nothing to clipping.

    References
    ----------
    .. [1] Sun, Kairouz, Suresh & McMahan 2019, "Can You Really Backdoor Federated Learning?", arXiv:1911.07963.

    Examples
    --------
    >>> from gradlens.examples import example_log
    >>> weak_dp(bound=1.0, std=0.001)(example_log())["fc2.bias"].shape
    (4,)
    """
    settings = {"bound": _bound("weak_dp", bound), "std": _std("weak_dp", std)}
    return Rule(configured(_weak_dp, **settings, seed=whole_number("weak_dp: seed", seed)))


def centred_clipping(radius: float | None = None, iterations: int = 1, start: str = "last") -> Aggregator:
    """Moves a center by the mean of the clients' differences to it, each clipped to a radius.

    Parameters
    ----------
    radius : float, optional
        A length above 0; None: the median distance to the center, anew in each iteration. ByzFL has 100, which clips
        nothing of updates that are shorter.
    iterations : int
        How often; 1 as in [1]_.
    start : {"last", "zero"}
        "last": the last change of the global model, which is the last aggregate where the server's learning rate is 1,
        and zero in the first round. "zero": as in ByzFL.

    Returns
    -------
    Aggregator
        Buffers are averaged.

    Raises
    ------
    InputError
        For a setting out of its range.

    Notes
    -----
    v <- v + mean over i of (u_i - v) min(1, radius / norm(u_i - v)), equation (CC) of [1]_; its workers send momentum.

    **Fails when** the radius is too large to clip anything, or attackers push the same way in every round.

    References
    ----------
    .. [1] Karimireddy, He & Jaggi 2021, "Learning from History for Byzantine Robust Optimization", ICML,
       arXiv:2012.10333.

    Examples
    --------
    >>> from gradlens.examples import example_log
    >>> centred_clipping()(example_log())["fc2.bias"].shape
    (4,)
    """
    if start not in ("last", "zero"):
        raise InputError(f"centred_clipping: start is 'last' or 'zero', found {start!r:.80}")
    count = whole_number("centred_clipping: iterations", iterations, least=1)
    length = _bound("centred_clipping", radius, "radius")
    return Rule(configured(_centred_clipping, radius=length, iterations=count, start=start))


def flame(noise: float = 0.001, seed: int = 0, on: str = "updates") -> Aggregator:
    """Averages the clients that FLAME's clusters keep, clipped to the cohort's median norm, and adds noise.

    Parameters
    ----------
    noise : float
        Standard deviation as a share of that median norm; 0.001 as in the image tasks of [1]_ (its implementations have
        0.001 to 1.2e-5).
    seed : int
        Of the noise.
    on : {"updates", "models"}
        What is clustered; see the detector `flame`.

    Returns
    -------
    Aggregator
        Buffers are averaged over the kept clients.

    Raises
    ------
    InputError
        For a setting out of its range.

    Notes
    -----
    Algorithm 1 of [1]_; the median norm is that of the whole cohort, before clients are left out.

    **Fails when** attackers are as close in angle as benign clients are, which label skew makes easy.

    References
    ----------
    .. [1] Nguyen et al. 2022, "FLAME: Taming Backdoors in Federated Learning", USENIX Security, arXiv:2101.02281.

    Examples
    --------
    >>> from gradlens.examples import example_log
    >>> flame()(example_log())["fc2.bias"].shape
    (4,)
    """
    flame_detector(on)  # refuses another `on`
    number = whole_number("flame: seed", seed)
    return Rule(configured(_flame, noise=_std("flame", noise, "noise"), seed=number, on=on))


def crfl(bound: float = 15.0, std: float = 0.01, seed: int = 0) -> Aggregator:
    """Averages the updates, then clips the norm of the global model and adds noise to it.

    Parameters
    ----------
    bound : float
        Largest norm of the global model; 15 as the authors' program has for MNIST, 100 for EMNIST.
    std : float
        Standard deviation of the noise; 0.01, as there.
    seed : int
        Of the noise.

    Returns
    -------
    Aggregator
        The update that takes the global model there, at a server learning rate of 1 and without server momentum.

    Raises
    ------
    InputError
        For a setting out of its range.

    Notes
    -----
    Algorithm 1 of [1]_. The paper leaves the noise out of the last round, which a server that does not know its last
    round cannot do, and votes over noised copies when it predicts, which is not done here: there is no certificate.

    **Fails when** the bound is far above the model's norm; and a small backdoor survives small noise.

    References
    ----------
    .. [1] Xie, Chen, Chen & Li 2021, "CRFL: Certifiably Robust Federated Learning against Backdoor Attacks", ICML,
       arXiv:2106.08283; github.com/AI-secure/CRFL.

    Examples
    --------
    >>> from gradlens.examples import example_log
    >>> crfl()(example_log())["fc2.bias"].shape
    (4,)
    """
    if bound is None:
        raise InputError("crfl: bound is a length above 0, found None")
    settings = {"bound": _bound("crfl", bound), "std": _std("crfl", std)}
    return Rule(configured(_crfl, **settings, seed=whole_number("crfl: seed", seed)))


def _clipped(aggregate: Aggregator, log: UpdateLog, bound: float | None) -> dict[str, np.ndarray]:
    rows = rows_of(log[-1])
    norms = log[-1].total_norms[rows]
    length = (float(np.median(norms)) if len(norms) else 0.0) if bound is None else bound
    return aggregate(scaled(log, rows, clip_factors(norms, length)))


def _noised(aggregate: Aggregator, log: UpdateLog, std: float, seed: int) -> dict[str, np.ndarray]:
    update = aggregate(log)
    return _with_noise(log, update, std, seed) if log[-1].finite.any() else update


def _norm_clipping(log: UpdateLog, bound: float | None) -> dict[str, np.ndarray]:
    return clipped(mean(), bound)(log)


def _weak_dp(log: UpdateLog, bound: float | None, std: float, seed: int) -> dict[str, np.ndarray]:
    return noised(clipped(mean(), bound), std, seed)(log)


def _centred_clipping(log: UpdateLog, radius: float | None, iterations: int, start: str) -> dict[str, np.ndarray]:
    rows = rows_of(log[-1])
    update = averaged(log, rows, np.ones(len(rows)))  # of the buffers; the parameters come next
    if not len(rows):
        return update
    part = log[-1].take(rows)
    everyone, norms, center = np.arange(len(rows)), part.total_norms, _start(log, start)
    for _ in range(iterations):
        square = sum(float(np.vdot(array, array)) for array in center.values())
        distances = np.sqrt(np.maximum(norms**2 - 2 * inner_products(part, center) + square, 0))
        bound = float(np.median(distances)) if radius is None else radius
        factors = clip_factors(distances, bound).astype(FINEST).astype(np.float64)
        stays = 1 - factors.sum() / len(rows)
        for name, array in center.items():
            center[name] = array * stays + part.weighted_mean(name, everyone, factors, len(rows))
    return update | {name: array.astype(np.float32) for name, array in center.items()}


def _start(log: UpdateLog, start: str) -> dict[str, np.ndarray]:
    """The first center of centered clipping, layer -> float64 [*shape]."""
    now = log[-1].global_model
    if start == "zero" or len(log) < 2:
        return {name: np.zeros(now[name].shape) for name in log.model.parameters}
    before = log[-2].global_model
    return {name: now[name].astype(np.float64) - before[name] for name in log.model.parameters}


def _flame(log: UpdateLog, noise: float, seed: int, on: str) -> dict[str, np.ndarray]:
    norms = log[-1].total_norms[log[-1].finite]
    bound = float(np.median(norms)) if len(norms) else 0.0  # of the whole cohort, before the filter
    kept = filtered(mean(), flame_detector(on)).kept(log)
    rule = clipped(mean(), bound) if bound > 0 else mean()
    return noised(rule, noise * bound, seed)(log.keep(kept))


def _crfl(log: UpdateLog, bound: float, std: float, seed: int) -> dict[str, np.ndarray]:
    update = mean()(log)
    if not log[-1].finite.any():
        return update
    now = {name: log[-1].global_model[name].astype(np.float64) for name in log.model.parameters}
    following = {name: array + update[name] for name, array in now.items()}
    norm = np.sqrt(sum(float(np.vdot(array, array)) for array in following.values()))
    factor = float(clip_factors(norm, bound))
    change = {name: (array * factor - now[name]).astype(np.float32) for name, array in following.items()}
    return _with_noise(log, update | change, std, seed)


def _weighing(aggregate: Aggregator) -> Weighing | None:
    """What clients count in the mean inside a rule that is put around another, which changes nothing of that."""
    return getattr(aggregate, "weighing", None)


def _with_noise(log: UpdateLog, update: dict[str, np.ndarray], std: float, seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng([seed, NOISE, log[-1].index])
    parts = ((name, update[name]) for name in log.model.parameters)
    return update | {
        name: np.asarray(array + std * rng.standard_normal(array.shape), np.float32) for name, array in parts
    }


def _bound(where: str, value: float | None, setting: str = "bound") -> float | None:
    if value is not None and (not _is_number(value) or not 0 < value < np.inf):
        raise InputError(f"{where}: {setting} is a length above 0, or None, found {value!r:.80}")
    return None if value is None else float(value)


def _std(where: str, value: float, setting: str = "std") -> float:
    if not _is_number(value) or not 0 <= value < np.inf:
        raise InputError(f"{where}: {setting} is a number of at least 0, found {value!r:.80}")
    return float(value)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float | np.number) and not isinstance(value, bool)
