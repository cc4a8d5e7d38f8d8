"""Attacks that send something else than was trained: turned, noise, nothing, or made of what the others send.

Parameters are changed; buffers are sent as trained. The others are the clients of the round that send honestly. Those
with a number that is not finite are left out; where nobody is left the update is sent as trained. Sums are formed in
float64.
"""

from collections.abc import Callable
from typing import Annotated

import numpy as np
from pydantic import Field
from scipy.special import ndtri

from gradlens.log import ModelSpec
from simulations.attacks.attack import Attack, Situation, Updates, attack_part

Factor = Annotated[float, Field(allow_inf_nan=False)]
Make = Callable[[np.ndarray, np.ndarray], np.ndarray]  # a layer's (trained, others), [client, *shape] -> sent


@attack_part
def sign_flip(factor: Factor = 1.0) -> Attack:
    """Sends the negative of the trained update, times a factor.

    Stage: sending. The attacker needs its own update alone.

    Parameters
    ----------
    factor : float
        Length of what is sent, in lengths of the trained update; 1 is a plain choice.

    Returns
    -------
    Attack
        Untargeted: it has no success rate, and shows in main accuracy alone.

    Notes
    -----
    u becomes -factor x u.

    **Fails when** attackers are few: the mean is then only shortened. A detector of directions finds it easily.

    Examples
    --------
    >>> sign_flip(factor=4.0)
    sign_flip(factor=4.0)
    """
    return _alone(lambda mine: -factor * mine)


@attack_part
def gaussian(std: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0) -> Attack:
    """Sends Gaussian noise [1]_.

    Stage: sending. The attacker needs to know nothing.

    Parameters
    ----------
    std : float
        Standard deviation of each number, in units of the weights; 1 is a plain choice.

    Returns
    -------
    Attack
        Untargeted. Each attacker of each round draws noise of its own.

    Notes
    -----
    Sends N(0, std^2) in each number.

    **Fails when** norms are looked at or clipped: over d parameters the norm is about std x sqrt(d).

    References
    ----------
    .. [1] Blanchard et al. 2017, arXiv:1703.02757, Gaussian attack.

    Examples
    --------
    >>> gaussian(std=0.1)
    gaussian(std=0.1)
    """

    def send(trained: Updates, others: Updates, situation: Situation) -> Updates:
        return changed(trained, trained, situation.model, lambda mine, _: situation.rng.normal(0, std, mine.shape))

    return Attack(send=send)


@attack_part
def zero() -> Attack:
    """Sends zeros: free riders, which take the global model and contribute nothing.

    Stage: sending. The attacker needs to know nothing.

    Returns
    -------
    Attack
        Untargeted.

    Notes
    -----
    u becomes 0.

    **Fails when** it is meant to do harm: it slows training down and nothing else. A norm of 0 is found at once.

    Examples
    --------
    >>> zero()
    zero()
    """
    return _alone(lambda mine: np.zeros_like(mine))


@attack_part
def copies() -> Attack:
    """Sends from every attacker the mean of what all attackers would have sent: colluding copies.

    Stage: sending, after all other parts. The attackers must share their updates.

    Returns
    -------
    Attack
        One attacker alone sends what it would have sent.

    Notes
    -----
    u_i becomes (1 / f) sum_j u_j over the f attackers of the round. Two equal updates are each other's nearest
    neighbor, which deceives rules that select by distance, such as Krum.

    **Fails when** a detector looks for clients that are too alike, such as FoolsGold.

    Examples
    --------
    >>> copies()
    copies()
    """
    return _alone(lambda mine: mine.mean(axis=0))


@attack_part
def a_little_is_enough(z: Factor | None = None) -> Attack:
    """Sends the others' mean, moved by z of their standard deviations in each number (ALIE).

    Stage: sending. The attackers must know what the others send; in [1]_ they estimate both from their own honest
    updates.

    Parameters
    ----------
    z : float, optional
        Standard deviations; None, the default, for the largest z that leaves enough honest clients farther out.

    Returns
    -------
    Attack
        Untargeted; all attackers send the same.

    Notes
    -----
    Sends mean - z x standard deviation, which divides by the number of others. The default z is the standard normal
    quantile of (n - f - s) / (n - f), with s = floor(n / 2 + 1) - f, for n updates in the round, f of them the
    attackers'. It is at least 0, which is reached in small rounds, and s is at least 1.

    **Fails when** rounds are small, as z is then 0, or when a detector looks for updates that are too alike.

    References
    ----------
    .. [1] Baruch et al. 2019, arXiv:1902.06156.

    Examples
    --------
    >>> a_little_is_enough(z=1.5)
    a_little_is_enough(z=1.5)
    >>> round(supported(num_updates=50, num_attackers=12), 3)
    0.336
    """

    def send(trained: Updates, others: Updates, situation: Situation) -> Updates:
        deviations = supported(situation.num_updates, count(trained)) if z is None else z
        return changed(
            trained, others, situation.model, lambda _, seen: seen.mean(axis=0) - deviations * seen.std(axis=0)
        )

    return Attack(send=send)


@attack_part
def inner_product(epsilon: Factor = 2.0) -> Attack:
    """Sends the negative of the others' mean, times a factor: the inner product with the true mean turns negative [1]_.

    Stage: sending. The attackers must know what the others send.

    Parameters
    ----------
    epsilon : float
        Length of what is sent, in lengths of the mean; 2 is a plain choice.

    Returns
    -------
    Attack
        Untargeted; all attackers send the same.

    Notes
    -----
    Sends -epsilon x mean of the others.

    **Fails when** attackers are few and epsilon is small: the mean keeps its direction while
    epsilon < (n - f) / f, for f attackers of n clients.

    References
    ----------
    .. [1] Xie et al. 2019, arXiv:1903.03936.

    Examples
    --------
    >>> inner_product(epsilon=0.5)
    inner_product(epsilon=0.5)
    """

    def send(trained: Updates, others: Updates, situation: Situation) -> Updates:
        return changed(trained, others, situation.model, lambda _, seen: -epsilon * seen.mean(axis=0))

    return Attack(send=send)


@attack_part
def mimic(client: Annotated[int, Field(ge=0)] = 0) -> Attack:
    """Sends what one of the others sends, and so gives one honest client too much weight.

    Stage: sending. The attackers must know what the others send.

    Parameters
    ----------
    client : int
        Number of the client among the others of the round, modulo their number; 0 is a plain choice, in [1]_ the
        attackers choose it.

    Returns
    -------
    Attack
        Untargeted; all attackers send the same.

    Notes
    -----
    u becomes the update of that client.

    **Fails when** clients hold similar data: the mean then hardly moves. Equal updates give it away.

    References
    ----------
    .. [1] Karimireddy et al. 2022, arXiv:2006.09365.

    Examples
    --------
    >>> mimic(client=2)
    mimic(client=2)
    """

    def send(trained: Updates, others: Updates, situation: Situation) -> Updates:
        return changed(trained, others, situation.model, lambda _, seen: seen[client % len(seen)])

    return Attack(send=send)


def supported(num_updates: int, num_attackers: int) -> float:
    """Returns the default z of `a_little_is_enough` for n updates, f of them the attackers'."""
    honest = num_updates - num_attackers
    if honest < 1:
        return 0.0
    supporters = max(1, num_updates // 2 + 1 - num_attackers)
    return max(0.0, float(ndtri((honest - supporters) / honest)))


def finite(updates: Updates) -> Updates:
    """Returns the updates of the clients all of whose numbers are finite."""
    rows = np.ones(count(updates), dtype=bool)
    for update in updates.values():
        rows &= np.isfinite(update).all(axis=tuple(range(1, update.ndim)))
    return updates if rows.all() else {name: update[rows] for name, update in updates.items()}


def count(updates: Updates) -> int:
    """Returns the number of clients."""
    return len(next(iter(updates.values()), ()))


def changed(trained: Updates, others: Updates, model: ModelSpec, make: Make) -> Updates:
    """Returns the trained updates with each parameter layer made anew, in float64.

    `make` is called with the layer of the trained updates and of the finite others, [client, *shape]. One row is sent
    by every attacker. Where no other is left, the trained updates are returned.
    """
    seen = trained if others is trained else finite(others)
    if count(seen) == 0:
        return trained
    return {
        name: like(update, make(np.asarray(update, np.float64), np.asarray(seen[name], np.float64)))
        if name in model.parameters
        else update
        for name, update in trained.items()
    }


def like(update: np.ndarray, sent: np.ndarray) -> np.ndarray:
    """Returns what is sent in the shape and dtype of the trained update."""
    return np.broadcast_to(sent, update.shape).astype(update.dtype)


def per_client(factors: np.ndarray, update: np.ndarray) -> np.ndarray:
    """Returns one number per client in a shape that multiplies an update [client, *shape]."""
    return factors.reshape(-1, *[1] * (update.ndim - 1))


def _alone(make: Callable[[np.ndarray], np.ndarray]) -> Attack:
    """Sends what is made of the trained updates alone."""

    def send(trained: Updates, others: Updates, situation: Situation) -> Updates:
        return changed(trained, trained, situation.model, lambda mine, _: make(mine))

    return Attack(send=send)
