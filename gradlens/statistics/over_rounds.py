"""Statistics over a client's rounds: what adds up, and what repeats.

Those of what has added up (`UpdateLog.accumulated`) compare a client of the last round with everybody seen so far who
has at least half the median number of rounds, so that they work where few clients take part in a round: those are
their reference. A client that is not comparable in the last round, or never was finite, is no reference.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

from gradlens.errors import CannotSay
from gradlens.log import Accumulated, Round, UpdateLog, kernels
from gradlens.log.accumulated import BUDGET, clipped, clipped_residuals, residuals_of, sketch_rows
from gradlens.log.round import BLOCK, PAIRWISE
from gradlens.settings import whole_number
from gradlens.statistics.cohort import ROUNDING, cohort, table

LABELS = 64  # of as many the drift is regressed on: of a vocabulary it would take more memory than the clients


def accumulated_norms(log: UpdateLog) -> pd.DataFrame:
    """L2 norm of what each client of the last round has added up to so far, layer by layer.

    The norm of the sum of its residuals (`Accumulated`), divided by the root of the rounds it took part in: the
    noise of local training keeps this constant, a systematic pull lets it grow with that root.
    Returns: float64 [client, layer], in units of the weights.
    Raises: CannotSay below 3 comparable clients, or before half of them have taken part twice: until then nothing
    has added up.
    """
    round_, rows, rounds = _cohort_with_past(log)
    squares = [_squares(log.accumulated.sums[name], rows) for name in log.model.parameters]
    norms = [np.sqrt(of_layer / rounds[rows]) for of_layer in squares]
    return table(round_, log.model.parameters, np.stack(norms, axis=1))


def accumulated_spectral(log: UpdateLog) -> pd.DataFrame:
    """How far each client of the last round lies along the direction in which the accumulated updates differ most.

    |component| along the leading eigenvector of the reference clients' accumulated updates, each divided by the root
    of its rounds, minus their mean; layer by layer. It shows who pulls with the strongest common force, on either side.
    Returns: float64 [client, layer], in root mean squares of the reference clients' components, so without a unit;
    0 where all are equal.
    Raises: CannotSay below 3 comparable clients, before half of them have taken part twice, or where more than 5,000
    clients were seen.
    """
    return _by_accumulated_gram(log, log.model.parameters, _leading_components)


def accumulated_neighbours(log: UpdateLog, neighbours: int = 3) -> pd.DataFrame:
    """Mean cosine of each client's accumulated update to the reference clients nearest to it, layer by layer.

    Benign clients pull in directions of their own; those with one poisoned objective share one, and find each other
    here. What is summed was centred on each round's median already; centred once more, on the mean, which attackers
    move, the benign clients would be alike by what they do not share with them.
    neighbours: as many as the fellow attackers that one expects; 3 is our own choice; at most all others.
    Returns: float64 [client, layer], from -1 to 1; 0 where an update is.
    Raises: CannotSay as `accumulated_spectral`; InputError unless `neighbours` is at least 1.
    """
    whole_number("accumulated_neighbours: neighbours", neighbours, least=1)

    def measure(gram: np.ndarray, reference: np.ndarray) -> np.ndarray:
        return _nearest_cosines(gram, reference, neighbours)

    return _by_accumulated_gram(log, log.model.parameters, measure)


def label_drift_residual(log: UpdateLog) -> pd.DataFrame:
    """Norm of each client's accumulated update that its labels do not explain, in every layer before the final ones.

    A client's accumulated final-bias update is its label drift. The layer's accumulated updates (over the root of
    the rounds, minus the reference clients' mean) are regressed on the label drifts of the reference clients; the
    residual is what label skew leaves unexplained. Of n reference clients' drifts only the leading (n - 1) // 3
    principal directions are regressed on (at most all there are: classes - 1), since with as many directions as
    clients they would explain everything: so at least two thirds of the clients' freedom remain.
    Returns: float64 [client, feature layer], in units of the weights.
    Raises: CannotSay as `accumulated_spectral`, if the model has no final bias or no layer before the final ones,
    or below 4 reference clients.
    """
    model = log.model
    if model.final_bias is None:
        raise CannotSay("the model has no final bias, which tells the label drift")
    layers = [name for name in model.parameters if name not in (model.final_weight, model.final_bias)]
    if not layers:
        raise CannotSay("the model has no layer before the final ones")
    drift = _accumulated_grams(log)[model.final_bias]

    def measure(gram: np.ndarray, reference: np.ndarray) -> np.ndarray:
        return _unexplained(gram, drift, reference)

    return _by_accumulated_gram(log, layers, measure)


def accomplices(log: UpdateLog, neighbours: int = 3) -> pd.DataFrame:
    """How strongly each client pulls together with the reference clients that pull with it most, its labels aside.

    A client's labels show in its final-bias update, round by round. Every client's residual (`Accumulated`) of every
    round so far is one observation in a regression of each layer on this label drift; what it leaves unexplained is
    summed per client and divided by the root of its rounds. The value is the mean inner product with the `neighbours`
    reference clients where it is largest. Clients with the same unusual labels are alike until their labels are
    accounted for; those with one poisoned objective stay alike.
    neighbours: as many as the fellow attackers that one expects; 3 is our own choice; at most all others.
    Returns: float64 [client, layer], in units of the reference clients' median squared norm, so that 1 is another
    client like itself; 0 where nothing is left, as in the final bias.
    Raises: CannotSay as `accumulated_spectral`, if the model has no final bias, or one of more than 64 labels;
    InputError unless `neighbours` is at least 1.
    """
    whole_number("accomplices: neighbours", neighbours, least=1)
    bias = log.model.final_bias
    if bias is None:
        raise CannotSay("the model has no final bias, which tells the label drift")
    if log.model[bias].size > LABELS:
        raise CannotSay(f"the final bias has {log.model[bias].size} labels, drift is regressed on {LABELS} at most")
    round_, rows, rounds = _cohort_with_past(log)
    reference = _accumulated_grams(log).reference
    accumulated, drifts = log.accumulated, log.folded(_LabelDrifts())
    weights = accumulated.sums[bias].astype(np.float64) @ np.linalg.pinv(drifts.moments, rcond=1e-9, hermitian=True)
    values = np.zeros((len(round_), len(log.model.parameters)))
    for column, name in enumerate(log.model.parameters):
        if name != bias:
            gram = _gram_of_unexplained(name, accumulated, drifts, weights) / np.sqrt(np.outer(rounds, rounds))
            with np.errstate(all="ignore"):  # in the rows that become NaN
                values[:, column] = _common_pull(gram, reference, neighbours)[rows]
    return table(round_, log.model.parameters, values)


def consistency(log: UpdateLog) -> pd.DataFrame:
    """Cosine of each client's residual in the last round to the sum of its own residuals before, layer by layer.

    A residual is the update minus the cohort's median, as `Accumulated` adds it up. About 0 for the noise of local
    training, positive where a client pulls the same way again and again, as label skew and poison do; it falls where
    an attacker starts, stops or takes turns.
    Returns: float64 [client, layer], from -1 to 1; 0 for a client without a past, and where either norm is 0.
    Raises: CannotSay below 3 comparable clients, or before half of them have taken part twice.
    """
    round_, rows, _ = _cohort_with_past(log)
    accumulated, values = log.accumulated, np.zeros((len(round_), len(log.model.parameters)))
    for column, name in enumerate(log.model.parameters):
        sums, dots = accumulated.sums[name], 0.0
        for start, now in _residual_blocks(round_, name, log.model[name].size, sketched=accumulated.sketched):
            past = sums[rows[round_.comparable], start : start + now.shape[1]] - now
            pairs = ((now, past), (now, now), (past, past))
            dots = dots + np.stack([np.einsum("ki,ki->k", one, other, dtype=np.float64) for one, other in pairs])
        values[round_.comparable, column] = _cosine(*np.asarray(dots))
    return table(round_, log.model.parameters, values)


def persistence(log: UpdateLog) -> pd.DataFrame:
    """Mean cosine of each client's residual in one round to its residuals in its other rounds, layer by layer.

    Every pair of rounds counts by the product of its norms: (|sum r|^2 - sum |r|^2) / ((sum |r|)^2 - sum |r|^2). About
    0 for the noise of local training; a client whose data pull one way keeps to it, one whose aim is learnt and drops
    away, or that hides in some rounds, does not.
    Returns: float64 [client, layer], from -1 to 1; 0 for a client without two residuals.
    Raises: CannotSay below 3 comparable clients, or before half of them have taken part twice.
    """
    round_, rows, _ = _cohort_with_past(log)
    accumulated, values = log.accumulated, np.zeros((len(round_), len(log.model.parameters)))
    for column, name in enumerate(log.model.parameters):
        squares = accumulated.squares[name][rows]
        with np.errstate(all="ignore"):  # in the rows that become NaN
            pairs = accumulated.lengths[name][rows] ** 2 - squares
            shared = _squares(accumulated.sums[name], rows) - squares
            real = pairs > ROUNDING * squares
            values[:, column] = np.clip(np.divide(shared, pairs, out=np.zeros_like(pairs), where=real), -1, 1)
    return table(round_, log.model.parameters, values)


def _residual_blocks(round_: Round, layer: str, size: int, *, sketched: bool) -> Iterator[tuple[int, np.ndarray]]:
    """What a round adds to `Accumulated` of a layer, block after block: where it starts, float32 [client, number]."""
    residuals, _, factors = residuals_of(round_, layer)
    if sketched:
        yield 0, sketch_rows(layer, clipped(residuals, factors, 0, size))
        return
    for start in range(0, size, BLOCK):
        yield start, clipped(residuals, factors, start, min(start + BLOCK, size))


Measure = Callable[[np.ndarray, np.ndarray], np.ndarray]  # (Gram [seen, seen], reference [seen]) -> [seen]


@dataclass(frozen=True, eq=False)
class _Grams:
    """Inner products of the accumulated updates over the root of their rounds: layer -> float64 [seen, seen]."""

    layers: dict[str, np.ndarray]
    reference: np.ndarray

    def __getitem__(self, layer: str) -> np.ndarray:
        return self.layers[layer]


def _cohort_with_past(log: UpdateLog) -> tuple[Round, np.ndarray, np.ndarray]:
    """The last round, its clients' rows in `accumulated`, and everybody's rounds, at least 1; or CannotSay."""
    round_ = cohort(log)
    accumulated = log.accumulated
    rows = accumulated.of(round_.clients)
    rounds = np.maximum(accumulated.rounds, 1)  # 0 for those that never sent a finite update
    if np.median(rounds[rows][round_.comparable]) < 2:
        raise CannotSay(f"by round {round_.index} most of its clients have taken part once, twice is needed")
    return round_, rows, rounds


def _by_accumulated_gram(log: UpdateLog, layers: Any, measure: Measure) -> pd.DataFrame:
    round_, rows, _ = _cohort_with_past(log)
    grams = _accumulated_grams(log)
    with np.errstate(all="ignore"):  # in the rows that become NaN
        columns = [measure(grams[name], grams.reference)[rows] for name in layers]
    return table(round_, layers, np.stack(columns, axis=1))


def _accumulated_grams(log: UpdateLog) -> _Grams:
    """Formed once for all who ask of this log; of the latest log only: one for every prefix would fill the memory."""
    round_, rows, rounds = _cohort_with_past(log)
    held = log.folded(_empty)
    if "grams" not in held:
        held["grams"] = _formed(log, rounds, rows[~round_.comparable])
    return held["grams"]


def _empty(before: Any, log: UpdateLog) -> dict[str, _Grams]:
    return {}


def _formed(log: UpdateLog, rounds: np.ndarray, no_reference: np.ndarray) -> _Grams:
    accumulated, layers = log.accumulated, {}
    if len(rounds) > PAIRWISE:
        raise CannotSay(f"{len(rounds)} clients seen: nothing pairwise is formed above {PAIRWISE:,}")
    usable = accumulated.rounds > 0
    usable[no_reference] = False
    for name, sums in accumulated.sums.items():
        gram = np.zeros((len(rounds), len(rounds)))
        with np.errstate(all="ignore"):  # a residual that overflowed stays in its own row and column
            for start in range(0, sums.shape[1], BLOCK):
                numbers = sums[:, start : start + BLOCK].astype(np.float64)
                gram += numbers @ numbers.T
            layers[name] = gram / np.sqrt(np.outer(rounds, rounds))
        usable &= np.isfinite(np.diagonal(gram))
    enough = accumulated.rounds >= np.median(accumulated.rounds[usable]) / 2
    return _Grams(layers, usable & enough)


def _centred(gram: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """The Gram matrix of everybody's vectors minus the reference clients' mean vector."""
    means = gram[:, reference].mean(axis=1)
    return gram - means[:, None] - means[None, :] + means[reference].mean()


def _leading_components(gram: np.ndarray, reference: np.ndarray) -> np.ndarray:
    centred = _centred(gram, reference)[:, reference]
    values, vectors = np.linalg.eigh(centred[reference])
    if values[-1] <= ROUNDING * np.trace(gram[np.ix_(reference, reference)]):
        return np.zeros(len(gram))
    return np.abs(centred @ vectors[:, -1]) * np.sqrt(reference.sum()) / values[-1]


def _nearest_cosines(gram: np.ndarray, reference: np.ndarray, neighbours: int) -> np.ndarray:
    norms = np.sqrt(np.diagonal(gram))
    products = np.outer(norms, norms)
    cosines = np.divide(gram, products, out=np.zeros_like(gram), where=products > 0)
    return _mean_of_largest(cosines, reference, neighbours)


def _mean_of_largest(pairs: np.ndarray, reference: np.ndarray, neighbours: int) -> np.ndarray:
    """Mean of each row's largest entries with others of the reference, [seen]; as many as `neighbours`, or all."""
    others = np.array(pairs)
    np.fill_diagonal(others, -np.inf)
    count = min(neighbours, int(reference.sum()) - 1)
    return np.sort(others[:, reference], axis=1)[:, -count:].mean(axis=1)


def _unexplained(gram: np.ndarray, drift: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Norms of the residuals of the vectors of one Gram matrix, regressed on the vectors of the other."""
    count = int(reference.sum())
    if count < 4:
        raise CannotSay(f"{count} clients have enough rounds, at least 4 are needed to tell label drift from the rest")
    centred, drifts = _centred(gram, reference), _centred(drift, reference)[:, reference]
    values, vectors = np.linalg.eigh(drifts[reference])
    values, vectors = values[-((count - 1) // 3) :], vectors[:, -((count - 1) // 3) :]
    real = values > 1e-9 * np.trace(drift[np.ix_(reference, reference)])
    explained = (drifts @ vectors[:, real] / values[real]) @ vectors[
        :, real
    ].T  # [seen, reference], of whom each is made
    products = np.einsum("ij,ij->i", explained, centred[:, reference])
    among = np.einsum("ij,jk,ik->i", explained, centred[np.ix_(reference, reference)], explained, optimize=True)
    squares = np.diagonal(centred) - 2 * products + among
    return np.sqrt(np.where(squares > ROUNDING * np.diagonal(gram), squares, 0))


@dataclass(frozen=True, eq=False)
class _Drifts:
    """Sums over all residuals of a log: of drift x drift [label, label], and layer -> drift x layer [label, number]."""

    moments: np.ndarray
    crossed: dict[str, np.ndarray]
    sketched: bool


@dataclass(frozen=True)
class _LabelDrifts:
    """One more round of them: a step for `UpdateLog.folded`."""

    def __call__(self, before: _Drifts | None, log: UpdateLog) -> _Drifts:
        if before is not None:
            before = replace(before, crossed={name: np.array(each) for name, each in before.crossed.items()})
        return self.carry(before, log)

    def carry(self, before: _Drifts | None, log: UpdateLog) -> _Drifts:
        """The same, in the arrays of the state before."""
        round_, bias = log[-1], log.model.final_bias
        assert bias is not None
        labels = log.model[bias].size
        if before is None:
            sketched = 4 * labels * log.model.num_parameters > BUDGET / 4
            nothing = {name: np.zeros((1, log.model[name].size), np.float32) for name in log.model.parameters}
            widths = {name: (sketch_rows(name, each) if sketched else each).shape[1] for name, each in nothing.items()}
            crossed = {name: np.zeros((labels, width), np.float32) for name, width in widths.items()}
            before = _Drifts(np.zeros((labels, labels)), crossed, sketched)
        if not round_.comparable.any():
            return before
        drift = clipped_residuals(round_, bias).astype(np.float64)
        for name, sums in before.crossed.items():
            for start, now in _residual_blocks(round_, name, log.model[name].size, sketched=before.sketched):
                sums[:, start : start + now.shape[1]] += drift.T @ now  # in float64: the clients' order changes nothing
        return replace(before, moments=before.moments + drift.T @ drift)


def _gram_of_unexplained(name: str, accumulated: Accumulated, drifts: _Drifts, weights: np.ndarray) -> np.ndarray:
    """Inner products of what of a layer's sums the label drift leaves, float64 [seen, seen].

    weights: [seen, label], by which the drift x layer sums explain each client's.
    """
    sums, crossed = accumulated.sums[name], drifts.crossed[name]
    if accumulated.sketched != drifts.sketched:  # sketches are linear: that of a sum is the sum of sketches
        sums = sums if accumulated.sketched else sketch_rows(name, sums)
        crossed = crossed if drifts.sketched else sketch_rows(name, crossed)
    gram = np.zeros((len(sums), len(sums)))
    with np.errstate(all="ignore"):  # a residual that overflowed stays in its own row and column
        for start in range(0, sums.shape[1], BLOCK):
            part = slice(start, start + BLOCK)
            left = sums[:, part].astype(np.float64) - weights @ crossed[:, part]
            gram += left @ left.T
    return gram


def _common_pull(gram: np.ndarray, reference: np.ndarray, neighbours: int) -> np.ndarray:
    """Mean of each row's largest products with others of the reference, over the median of the reference's squares."""
    largest = _mean_of_largest(gram, reference, neighbours)
    typical = np.median(np.diagonal(gram)[reference])
    return largest / typical if typical > 0 else np.zeros(len(gram))


def _squares(sums: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """The sum of squares of some rows, float64 [row], without a copy of them all."""
    return kernels.squares(lambda start, stop: sums[rows, start:stop], len(rows), sums.shape[1])


def _cosine(dots: np.ndarray, squares: np.ndarray, others: np.ndarray) -> np.ndarray:
    norms = np.sqrt(squares * others)
    with np.errstate(all="ignore"):  # in the rows that become NaN
        return np.clip(np.divide(dots, norms, out=np.zeros_like(dots), where=norms > 0), -1, 1)
