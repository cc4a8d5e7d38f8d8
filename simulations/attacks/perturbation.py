"""Attacks that move the others' mean as far as a bound on distances allows: min-max and min-sum."""

import math
from collections.abc import Callable, Mapping
from typing import Literal

import numpy as np

from simulations.attacks.attack import Attack, Situation, Updates, attack_part
from simulations.attacks.sending import changed, count, finite

Direction = Literal["std", "unit", "sign"]


@attack_part
def min_max(direction: Direction = "std") -> Attack:
    """Sends the others' mean, moved until its greatest distance to one of them is that of the two farthest apart.

    Stage: sending. The attackers must know what the others send.

    Parameters
    ----------
    direction : {"std", "unit", "sign"}
        Where the mean is moved: minus the standard deviation of the others, the default and a plain choice among the
        three of [1]_; minus their mean; or minus the sign of their mean.

    Returns
    -------
    Attack
        Untargeted; all attackers send the same.

    Notes
    -----
    Sends mean + gamma p with the largest gamma for which max_i ||mean + gamma p - u_i|| <= max_ij ||u_i - u_j|| over
    the others' updates u and the direction p. Distances are over all parameters. Gamma is solved for exactly; in [1]_
    it is found by halving.

    **Fails when** a detector looks for updates that are too alike, or at single layers: the bound is on the distance
    over all of them.

    References
    ----------
    .. [1] Shejwalkar and Houmansadr 2021 (NDSS).

    Examples
    --------
    >>> min_max(direction="sign")
    min_max(direction='sign')
    """
    return _perturbing(direction, _gamma_max)


@attack_part
def min_sum(direction: Direction = "std") -> Attack:
    """Sends the others' mean, moved until its summed squared distances to them reach the greatest of any of them [1]_.

    Stage: sending. The attackers must know what the others send.

    Parameters
    ----------
    direction : {"std", "unit", "sign"}
        Where the mean is moved, as for `min_max`.

    Returns
    -------
    Attack
        Untargeted; all attackers send the same.

    Notes
    -----
    Sends mean + gamma p with the largest gamma for which sum_i ||mean + gamma p - u_i||^2 <=
    max_i sum_j ||u_i - u_j||^2. It moves less far than `min_max` and is harder to see.

    **Fails when** a detector looks for updates that are too alike, or at single layers.

    References
    ----------
    .. [1] Shejwalkar and Houmansadr 2021 (NDSS).

    Examples
    --------
    >>> min_sum()
    min_sum(direction='std')
    """
    return _perturbing(direction, _gamma_sum)


def _perturbing(direction: Direction, gamma: Callable[["_Geometry"], float]) -> Attack:
    def send(trained: Updates, others: Updates, situation: Situation) -> Updates:
        seen, parameters = finite(others), situation.model.parameters
        if count(seen) == 0:
            return trained
        step = gamma(_Geometry({name: seen[name] for name in parameters}, direction))
        return changed(
            trained, seen, situation.model, lambda _, layer: layer.mean(axis=0) + step * _moved(layer, direction)
        )

    return Attack(send=send)


def _moved(others: np.ndarray, direction: Direction) -> np.ndarray:
    """The direction in which the mean is moved; its length does not matter, as gamma makes up for it."""
    if direction == "std":
        return -others.std(axis=0)
    mean = others.mean(axis=0)
    return -np.sign(mean) if direction == "sign" else -mean


class _Geometry:
    """Inner products over all parameters: of the others v_i, centered on their mean, and of the direction p.

    gram [client, client]: of v_i - mean; along [client]: p with mean - v_i; square: p with itself.
    """

    def __init__(self, layers: Mapping[str, np.ndarray], direction: Direction) -> None:
        clients = count(layers)
        self.gram, self.along, self.square = np.zeros((clients, clients)), np.zeros(clients), 0.0
        for layer in layers.values():
            others = np.asarray(layer, np.float64)
            centered = (others - others.mean(axis=0)).reshape(clients, -1)
            moved = _moved(others, direction).ravel()
            self.gram += centered @ centered.T
            self.along -= centered @ moved
            self.square += float(moved @ moved)

    @property
    def distances(self) -> np.ndarray:
        """Squared distance between each two of the others."""
        norms = np.diagonal(self.gram)
        return np.maximum(norms[:, None] + norms[None, :] - 2 * self.gram, 0)


def _gamma_max(geometry: _Geometry) -> float:
    """The largest gamma with |mean + gamma p - v_i|^2 <= greatest squared distance, for every i."""
    if geometry.square == 0:
        return 0.0
    room = np.maximum(geometry.distances.max() - np.diagonal(geometry.gram), 0)
    roots = (np.sqrt(geometry.along**2 + geometry.square * room) - geometry.along) / geometry.square
    return float(max(roots.min(), 0.0))


def _gamma_sum(geometry: _Geometry) -> float:
    """The largest gamma with sum_i |mean + gamma p - v_i|^2 <= greatest sum of squared distances of one of them."""
    if geometry.square == 0:
        return 0.0
    room = geometry.distances.sum(axis=1).max() - np.trace(geometry.gram)
    return math.sqrt(max(float(room), 0.0) / (len(geometry.along) * geometry.square))
