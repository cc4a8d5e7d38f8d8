"""What a case rests on: inner products summed over the rounds of a recording, from which every reading follows.

The median of a round moves with the attackers in it, but by one vector for all clients. Inner products of residuals can
therefore be centered afterwards on any set of clients that is thought clean, and no round is read again however many
clients are left out of that set.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from gradlens.case.drift import Drift, running_drift
from gradlens.errors import CannotSay
from gradlens.geometry import cosines
from gradlens.log import ModelSpec, Round, UpdateLog
from gradlens.log.accumulated import Residuals, residuals_of
from gradlens.log.kernels import BLOCK, inner_products
from gradlens.log.round import PAIRWISE

ROLES = ("weights", "biases", "final weight", "final bias")


@dataclass(frozen=True, eq=False)
class Sums:
    """Sums over the rounds of a recording, for every client that was comparable in one of them.

    A residual is a client's update minus the round's coordinate-wise median, clipped in norm (`Accumulated`). Layers
    are summed by their role in the model, each divided by its median squared norm, so that models of any depth have the
    same few entries.

    Attributes
    ----------
    clients : numpy.ndarray
        str [client], sorted.
    rounds : numpy.ndarray
        int64 [client], in how many rounds each was comparable.
    of_rounds : Mapping
        Role -> float64 [client, client], inner products of the residuals of the same round, summed over rounds and
        divided by the roots of both clients' rounds.
    totals : Mapping
        Layer -> float64 [client, client], inner products of the residuals' sums over rounds, divided likewise.
    roles : Mapping
        Role -> its layers.
    drift : Drift or None
        What explains the totals by the clients' labels; None where the model cannot tell them.
    agreement : Mapping
        Role -> float64 [client], mean cosine of the client's update to the median of its round.
    log_norms : Mapping
        Role -> float64 [round, client], logarithm of the residual's norm relative to the round; NaN where a client was
        not comparable.
    squares : Mapping
        Layer -> float64 [client], mean square of the norm of the client's residuals.

    Examples
    --------
    >>> from gradlens.examples import example_log
    >>> sums = sums_of(example_log())
    >>> sums.totals["fc1.weight"].shape, int(np.diagonal(sums.totals["fc1.weight"]).argmax())
    ((10, 10), 9)
    """

    clients: np.ndarray
    rounds: np.ndarray
    of_rounds: Mapping[str, np.ndarray]
    totals: Mapping[str, np.ndarray]
    roles: Mapping[str, list[str]]
    drift: Drift | None
    agreement: Mapping[str, np.ndarray]
    log_norms: Mapping[str, np.ndarray]
    squares: Mapping[str, np.ndarray]

    @property
    def label_drift(self) -> np.ndarray | None:
        """Label drift summed over rounds, over the root of their number, float64 [client, label]; None without."""
        return None if self.drift is None else self.drift.totals / np.sqrt(self.rounds)[:, None]


def sums_of(log: UpdateLog) -> Sums:
    """Sums a recording up, whatever clients are to be left out later.

    Parameters
    ----------
    log : UpdateLog
        The rounds of the recording.

    Returns
    -------
    Sums

    Raises
    ------
    CannotSay
        If there is no round, nobody was comparable, or more than 5,000 clients took part: nothing pairwise is formed
        above that.

    Examples
    --------
    >>> from gradlens.examples import example_log
    >>> sums_of(example_log(rounds=3)).rounds.tolist()
    [3, 3, 3, 3, 3, 3, 3, 3, 3, 3]
    """
    accumulated = log.accumulated
    present = np.flatnonzero(accumulated.rounds > 0)
    if not len(present):
        raise CannotSay("no client has a comparable update in any round")
    if len(present) > PAIRWISE:
        raise CannotSay(f"{len(present):,} clients took part: nothing pairwise is formed above {PAIRWISE:,}")
    clients, rounds = accumulated.clients[present], accumulated.rounds[present]
    roles = roles_of(log.model)
    running, drifts = _Running(clients, len(log), roles), running_drift(log.model, clients)
    for position, round_ in enumerate(log):
        rows = np.searchsorted(clients, round_.clients[round_.comparable])
        if not len(rows):
            continue
        residuals = {layer: residuals_of(round_, layer) for layer in log.model.parameters}
        running.add(position, rows, round_, residuals)
        if drifts is not None:
            drifts.add(rows, residuals)
    products = {name: inner_products(sums)[np.ix_(present, present)] for name, sums in accumulated.sums.items()}
    roots = np.sqrt(np.outer(rounds, rounds))
    return Sums(
        clients,
        rounds,
        {role: product / roots for role, product in running.products.items()},
        {layer: product / roots for layer, product in products.items()},
        roles,
        None if drifts is None else drifts.drift(accumulated),
        {role: cosine / rounds for role, cosine in running.cosines.items()},
        running.log_norms,
        {layer: squares[present] / rounds for layer, squares in accumulated.squares.items()},
    )


def roles_of(model: ModelSpec) -> dict[str, list[str]]:
    """The layers of each role that the model has.

    Parameters
    ----------
    model : ModelSpec

    Returns
    -------
    dict of str to list of str

    Examples
    --------
    >>> from gradlens.examples import example_log
    >>> roles_of(example_log().model)["weights"]
    ['fc1.weight']
    """
    roles: dict[str, list[str]] = {role: [] for role in ROLES}
    for name in model.parameters:
        if name in (model.final_weight, model.final_bias):
            role = "final weight" if name == model.final_weight else "final bias"
        else:
            role = "weights" if len(model[name].sent_shape) > 1 else "biases"
        roles[role].append(name)
    return {role: layers for role, layers in roles.items() if layers}


class _Running:
    """The sums over the rounds that were added so far."""

    def __init__(self, clients: np.ndarray, num_rounds: int, roles: Mapping[str, list[str]]) -> None:
        count = len(clients)
        self.roles = roles
        self.products = {role: np.zeros((count, count)) for role in roles}
        self.cosines = {role: np.zeros(count) for role in roles}
        self.log_norms = {role: np.full((num_rounds, count), np.nan) for role in roles}

    def add(self, position: int, rows: np.ndarray, round_: Round, residuals: Mapping[str, Residuals]) -> None:
        """Adds a round: layer -> residuals of the clients in some rows."""
        for role, layers in self.roles.items():
            log_norms = np.zeros(len(rows))
            for layer in layers:
                median, norms = round_.median[layer].reshape(-1).astype(np.float64), residuals[layer].norms
                products, along = _products(residuals[layer], median)
                scale = typical(np.diagonal(products))
                self.products[role][np.ix_(rows, rows)] += products / (scale * len(layers))
                self.cosines[role][rows] += _cosines_to(median, along, norms) / len(layers)
                log_norms += np.log(np.maximum(norms / np.sqrt(scale), 1e-30)) / len(layers)
            self.log_norms[role][position, rows] = log_norms


def _products(residuals: Residuals, median: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Inner products of the clipped residuals [client, client], and of the unclipped ones with the median [client]."""
    count = len(residuals.norms)
    products, along = np.zeros((count, count)), np.zeros(count)
    for start in range(0, len(median), BLOCK):
        block = residuals.clipped(start, min(start + BLOCK, len(median))).astype(np.float64)
        products += block @ block.T
        along += block @ median[start : start + BLOCK]
    return products, along / residuals.factors


def _cosines_to(median: np.ndarray, along: np.ndarray, norms: np.ndarray) -> np.ndarray:
    """Cosines to the median of updates that are the median plus a residual; 0 where either is 0."""
    square = median @ median
    updates = np.sqrt(np.maximum(norms**2 + 2 * along + square, 0))
    return cosines(along + square, updates * np.sqrt(square), clip=False)


def typical(squares: np.ndarray) -> float:
    """Median of the positive values, 1 where none is positive.

    Parameters
    ----------
    squares : ndarray, float64 [client]

    Examples
    --------
    >>> typical(np.array([0.0, 2.0, 4.0, 6.0]))
    4.0
    """
    positive = squares[squares > 0]
    return float(np.median(positive)) if len(positive) else 1.0
