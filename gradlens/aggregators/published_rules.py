"""Published rules made of others: norm clipping, weak DP, centered clipping, FLAME, CRFL."""

import numpy as np

from gradlens.aggregators.compositions import clipped, deviation, length_or_none, noised, with_noise
from gradlens.aggregators.filters import filtered
from gradlens.aggregators.rules import Aggregator, Rule, averaged, clip_factors, mean, rows_of
from gradlens.detectors import flame as flame_detector
from gradlens.detectors.distances import inner_products
from gradlens.errors import InputError
from gradlens.log import UpdateLog
from gradlens.settings import configured, whole_number

__all__ = ["centred_clipping", "crfl", "flame", "norm_clipping", "weak_dp"]

FINEST = np.float32  # clipping factors are rounded to it: their last digits in float64 depend on who else took part


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
    return Rule(configured(_norm_clipping, bound=length_or_none("norm_clipping", bound)))


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
    settings = {"bound": length_or_none("weak_dp", bound), "std": deviation("weak_dp", std)}
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
    length = length_or_none("centred_clipping", radius, "radius")
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
    return Rule(configured(_flame, noise=deviation("flame", noise, "noise"), seed=number, on=on))


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
    settings = {"bound": length_or_none("crfl", bound), "std": deviation("crfl", std)}
    return Rule(configured(_crfl, **settings, seed=whole_number("crfl: seed", seed)))


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
    return with_noise(log, update | change, std, seed)
