"""Statistics of accumulated updates: what adds up over a client's rounds.

They compare a client of the last round with the reference clients: everybody seen so far who has at least half the
median number of rounds (`UpdateLog.accumulated`). So they work where few clients take part in a round. A client that is
not comparable in the last round, or never was finite, is no reference.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from gradlens.errors import CannotSay
from gradlens.geometry import ROUNDING, TIE, about_reference_mean, cosines, mean_of_largest, pairwise_cosines
from gradlens.log import Round, UpdateLog, kernels
from gradlens.log.round import PAIRWISE
from gradlens.settings import whole_number
from gradlens.statistics.cohort import cohort, table

Measure = Callable[[np.ndarray, np.ndarray], np.ndarray]  # (Gram [seen, seen], reference [seen]) -> [seen]


def accumulated_norms(log: UpdateLog) -> pd.DataFrame:
    """L2 norm of the accumulated update of each client of the last round, layer by layer.

    Parameters
    ----------
    log : UpdateLog
        The rounds so far; the clients of the last one are judged.

    Returns
    -------
    DataFrame, float64 [client, layer]
        In units of the weights.

    Raises
    ------
    CannotSay
        Where it abstains.

    Notes
    -----
    The norm of the sum of the client's residuals r (its updates minus the cohort's median, see `Accumulated`), divided
    by the root of the number n of rounds that it took part in::

        |sum over rounds of r| / sqrt(n)

    The noise of local training keeps this constant; a systematic pull lets it grow with that root.

    **Abstains** when fewer than 3 clients are comparable, or most of them have taken part only once: nothing has added
    up.

    **Fails when** label skew is what pulls in every round, as it does in benign clients; and when the attacker poisons
    in few of its rounds.

    Examples
    --------
    >>> from gradlens.examples import example_log
    >>> from gradlens.statistics import accumulated_norms
    >>> accumulated_norms(example_log())["fc1.weight"].idxmax()
    'client-9'
    """
    round_, rows, rounds = cohort_with_past(log)
    squares = [squares_of_rows(log.accumulated.sums[name], rows) for name in log.model.parameters]
    norms = [np.sqrt(square / rounds[rows]) for square in squares]
    return table(round_, log.model.parameters, np.stack(norms, axis=1))


def accumulated_spectral(log: UpdateLog) -> pd.DataFrame:
    """How far each client lies along the direction in which the accumulated updates differ most, layer by layer.

    Parameters
    ----------
    log : UpdateLog
        The rounds so far; the clients of the last one are judged.

    Returns
    -------
    DataFrame, float64 [client, layer]
        In root mean squares of the reference clients' components, so without a unit; 0 where all are equal.

    Raises
    ------
    CannotSay
        Where it abstains.

    Notes
    -----
    The absolute component along the leading eigenvector of the reference clients' accumulated updates, each divided by
    the root of its rounds, minus their mean. It shows the clients that pull with the strongest common force, on either
    side.

    **Abstains** when fewer than 3 clients are comparable, or most of them have taken part only once: nothing has added
    up; and when more than 5,000 clients have been seen.

    **Fails when** label skew is the strongest common force: then the clients with the most unusual labels lead.

    Examples
    --------
    >>> from gradlens.examples import example_log
    >>> from gradlens.statistics import accumulated_spectral
    >>> accumulated_spectral(example_log())["fc1.weight"].idxmax()
    'client-9'
    """
    return _by_accumulated_gram(log, log.model.parameters, _leading_components)


def accumulated_neighbours(log: UpdateLog, neighbours: int = 3) -> pd.DataFrame:
    """Mean cosine of each client's accumulated update to the reference clients nearest to it, layer by layer.

    Parameters
    ----------
    log : UpdateLog
        The rounds so far; the clients of the last one are judged.
    neighbours : int, default 3
        As many as the accomplices that an attacker is expected to have; at most all others. The default is our own.

    Returns
    -------
    DataFrame, float64 [client, layer]
        From -1 to 1; 0 where an accumulated update is 0.

    Raises
    ------
    CannotSay
        Where it abstains.
    InputError
        Unless `neighbours` is a whole number of at least 1.

    Notes
    -----
    Benign clients pull in directions of their own. Clients with one poisoned objective share a direction and find each
    other here. What is summed was already centered on each round's median. It is not centered on the mean as well,
    which attackers move: benign clients would then be alike in what they do not share with the attackers.

    **Abstains** when fewer than 3 clients are comparable, or most of them have taken part only once: nothing has added
    up; and when more than 5,000 clients have been seen.

    **Fails when** there is a single attacker, or benign clients share unusual labels; `accomplices` accounts for these.

    Examples
    --------
    >>> from gradlens.examples import example_log
    >>> from gradlens.statistics import accumulated_neighbours
    >>> cosines = accumulated_neighbours(example_log(num_malicious=3), neighbours=2)["fc1.weight"]
    >>> sorted(cosines.nlargest(3).index)
    ['client-7', 'client-8', 'client-9']
    """
    whole_number("accumulated_neighbours: neighbours", neighbours, least=1)

    def measure(gram: np.ndarray, reference: np.ndarray) -> np.ndarray:
        return mean_of_largest(pairwise_cosines(gram), reference, neighbours)

    return _by_accumulated_gram(log, log.model.parameters, measure)


def label_drift_residual(log: UpdateLog) -> pd.DataFrame:
    """Norm of the part of each client's accumulated update that its labels do not explain, layer by layer.

    Parameters
    ----------
    log : UpdateLog
        The rounds so far; the clients of the last one are judged.

    Returns
    -------
    DataFrame, float64 [client, layer before the final ones]
        In units of the weights.

    Raises
    ------
    CannotSay
        Where it abstains.

    Notes
    -----
    A client's accumulated final-bias update is its label drift. The layer's accumulated updates (over the root of the
    rounds, minus the reference clients' mean) are regressed on the label drifts of the reference clients; the residual
    is what label skew leaves unexplained. With n reference clients, only the leading (n - 1) // 3 principal directions
    of their drifts are regressed on (there are at most classes - 1). With as many directions as clients the drifts
    would explain everything; so at least two thirds of the clients' degrees of freedom remain.

    **Abstains** when fewer than 3 clients are comparable, or most of them have taken part only once: nothing has added
    up; when more than 5,000 clients have been seen, or fewer than 4 reference clients; and when the model has no final
    bias or no layer before the final ones.

    **Fails when** the poison moves the layers just as its labels do, or the cohort has few clients: a third of their
    directions may explain an attacker away.

    Examples
    --------
    >>> from gradlens.examples import example_log
    >>> from gradlens.statistics import label_drift_residual
    >>> label_drift_residual(example_log()).columns.tolist()
    ['fc1.weight', 'fc1.bias']
    """
    model = log.model
    if model.final_bias is None:
        raise CannotSay("the model has no final bias, which tells the label drift")
    layers = [name for name in model.parameters if name not in (model.final_weight, model.final_bias)]
    if not layers:
        raise CannotSay("the model has no layer before the final ones")
    drift = accumulated_grams(log)[model.final_bias]

    def measure(gram: np.ndarray, reference: np.ndarray) -> np.ndarray:
        return _unexplained(gram, drift, reference)

    return _by_accumulated_gram(log, layers, measure)


def persistence(log: UpdateLog) -> pd.DataFrame:
    """Mean cosine of each client's residual in one round to its residuals in its other rounds, layer by layer.

    Parameters
    ----------
    log : UpdateLog
        The rounds so far; the clients of the last one are judged.

    Returns
    -------
    DataFrame, float64 [client, layer]
        From -1 to 1; 0 for a client without two residuals.

    Raises
    ------
    CannotSay
        Where it abstains.

    Notes
    -----
    Every pair of rounds counts by the product of its norms; with the sums over the client's rounds::

        (|sum r|^2 - sum |r|^2) / ((sum |r|)^2 - sum |r|^2)

    About 0 for the noise of local training. A client whose data pull one way keeps to it; a client whose aim is learned
    and drops away, or that hides in some rounds, does not.

    **Abstains** when fewer than 3 clients are comparable, or most of them have taken part only once: nothing has added
    up.

    **Fails when** label skew makes benign clients as persistent as attackers are: by itself neither much nor little of
    it is suspicious.

    Examples
    --------
    >>> from gradlens.examples import example_log
    >>> from gradlens.statistics import persistence
    >>> persistence(example_log())["fc1.weight"].idxmax()
    'client-9'
    """
    round_, rows, _ = cohort_with_past(log)
    accumulated, values = log.accumulated, np.zeros((len(round_), len(log.model.parameters)))
    for column, name in enumerate(log.model.parameters):
        squares = accumulated.squares[name][rows]
        with np.errstate(all="ignore"):  # only in rows that become NaN
            pairs = accumulated.lengths[name][rows] ** 2 - squares
            shared = squares_of_rows(accumulated.sums[name], rows) - squares
            pairs = np.where(pairs > ROUNDING * squares, pairs, 0)  # without two residuals nothing is left but rounding
            values[:, column] = cosines(shared, pairs)
    return table(round_, log.model.parameters, values)


@dataclass(frozen=True, eq=False)
class Grams:
    """Inner products of the accumulated updates over the root of their rounds: layer -> float64 [seen, seen]."""

    layers: dict[str, np.ndarray]
    reference: np.ndarray

    def __getitem__(self, layer: str) -> np.ndarray:
        return self.layers[layer]


def cohort_with_past(log: UpdateLog) -> tuple[Round, np.ndarray, np.ndarray]:
    """The last round, its clients' rows in `accumulated`, and everybody's rounds, at least 1; or CannotSay."""
    round_ = cohort(log)
    accumulated = log.accumulated
    rows = accumulated.of(round_.clients)
    rounds = np.maximum(accumulated.rounds, 1)  # 0 for those that never sent a finite update
    if np.median(rounds[rows][round_.comparable]) < 2:
        raise CannotSay(f"by round {round_.index} most of its clients have taken part once, twice is needed")
    return round_, rows, rounds


def _by_accumulated_gram(log: UpdateLog, layers: Sequence[str], measure: Measure) -> pd.DataFrame:
    round_, rows, _ = cohort_with_past(log)
    grams = accumulated_grams(log)
    with np.errstate(all="ignore"):  # only in rows that become NaN
        columns = [measure(grams[name], grams.reference)[rows] for name in layers]
    return table(round_, layers, np.stack(columns, axis=1))


def accumulated_grams(log: UpdateLog) -> Grams:
    """The Gram matrices of this log, formed once for all statistics; kept for the latest log only."""
    round_, rows, rounds = cohort_with_past(log)
    held = log.folded(_no_grams)
    if "grams" not in held:
        held["grams"] = form_grams(log, rounds, rows[~round_.comparable])
    return held["grams"]


def _no_grams(before: Any, log: UpdateLog) -> dict[str, Grams]:
    return {}


def form_grams(log: UpdateLog, rounds: np.ndarray, no_reference: np.ndarray) -> Grams:
    """The Gram matrices of everybody seen so far, and the clients that are a reference for the others."""
    accumulated, layers = log.accumulated, {}
    if len(rounds) > PAIRWISE:
        raise CannotSay(f"{len(rounds)} clients seen: nothing pairwise is formed above {PAIRWISE:,}")
    usable = accumulated.rounds > 0
    usable[no_reference] = False
    for name, sums in accumulated.sums.items():
        with np.errstate(all="ignore"):  # a residual that overflowed stays in its own row and column
            gram = kernels.inner_products(sums)
            layers[name] = gram / np.sqrt(np.outer(rounds, rounds))
        usable &= np.isfinite(np.diagonal(gram))
    enough = accumulated.rounds >= np.median(accumulated.rounds[usable]) / 2
    return Grams(layers, usable & enough)


def _leading_components(gram: np.ndarray, reference: np.ndarray) -> np.ndarray:
    about_mean = about_reference_mean(gram, reference)[:, reference]
    values, vectors = np.linalg.eigh(about_mean[reference])
    if values[-1] <= ROUNDING * np.trace(gram[np.ix_(reference, reference)]):
        return np.zeros(len(gram))
    return np.abs(about_mean @ vectors[:, -1]) * np.sqrt(reference.sum()) / values[-1]


def _unexplained(gram: np.ndarray, drift: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Norms of what a regression of the vectors of one Gram matrix on those of another leaves, float64 [seen]."""
    count = int(reference.sum())
    if count < 4:
        raise CannotSay(f"{count} clients have enough rounds, at least 4 are needed to tell label drift from the rest")
    about_mean, drifts = about_reference_mean(gram, reference), about_reference_mean(drift, reference)[:, reference]
    values, vectors = np.linalg.eigh(drifts[reference])
    values, vectors = values[-((count - 1) // 3) :], vectors[:, -((count - 1) // 3) :]
    real = values > TIE * np.trace(drift[np.ix_(reference, reference)])
    vectors, values = vectors[:, real], values[real]
    explained = (drifts @ vectors / values) @ vectors.T  # [seen, reference]: the weights of the reference clients
    products = np.einsum("ij,ij->i", explained, about_mean[:, reference])
    among = np.einsum("ij,jk,ik->i", explained, about_mean[np.ix_(reference, reference)], explained, optimize=True)
    squares = np.diagonal(about_mean) - 2 * products + among
    return np.sqrt(np.where(squares > ROUNDING * np.diagonal(gram), squares, 0))


def squares_of_rows(sums: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """The sum of squares of some rows, float64 [row], without a copy of all of them."""
    return kernels.squares(lambda start, stop: sums[rows, start:stop], len(rows), sums.shape[1])
