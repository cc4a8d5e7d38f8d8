"""Statistics over a client's rounds: what adds up, what repeats, what was to be expected.

Those of what has added up (`UpdateLog.accumulated`) compare a client of the last round with everybody seen so far who
has at least half the median number of rounds, so that they work where few clients take part in a round: those are
their reference. A client that is not comparable in the last round, or never was finite, is no reference.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from gradlens.log import CannotSay, Round, UpdateLog, kernels
from gradlens.log.history import BUDGET, _clipped, _residuals, _sketch
from gradlens.log.record import BLOCK, PAIRWISE
from gradlens.statistics.cohort import check_count, cohort, table

ROUNDING = 1e-12  # of a squared norm, what is left of 0 after sums of products


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
    check_count("accumulated_neighbours", "neighbours", neighbours)

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
        residuals, _, factors = _residuals(round_, name)
        sums, size, dots = accumulated.sums[name], log.model[name].size, 0.0
        for start in [0] if accumulated.sketched else range(0, size, BLOCK):
            now = _clipped(residuals, factors, start, size if accumulated.sketched else min(start + BLOCK, size))
            now = _sketch(name, now) if accumulated.sketched else now
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


def prediction_residual(log: UpdateLog, window: int = 10) -> pd.DataFrame:
    """How badly each client's updates of the last rounds were predicted from its own earlier ones, FLDetector's score.

    Predicted is g_i(t') + H (w_t - w_t'), from the client's last update g_i before round t, in round t', and the move
    of the global model w since then; H by L-BFGS (the compact form of Byrd, Nocedal & Schnabel 1994) from the latest
    `window` pairs of moves of the global model and changes of the cohort's median update, known before round t. The
    L2 norms of update - prediction over the whole update are divided by their mean over the round's comparable clients
    and averaged over those of the last `window` rounds in which the client has one.
    Where this differs from the paper: it divides by the sum, which depends on the number of clients; it has every
    client in every round, t' = t - 1. Under client sampling t' may be earlier, up to `window` rounds; a client without
    a prediction in the last `window` rounds has 1, the average. A pair without curvature (the global model or the
    median did not change) is left out; without any, the prediction is the last update itself. Beyond 0.5 GB the
    vectors are sketched (`Accumulated`).
    window: rounds; 10 is the official code's.
    Returns: float64 [client, 1], 1 = as badly as the average client; the column is "update".
    Raises: CannotSay below 3 comparable clients, or before half of them have a prediction; InputError unless `window`
    is at least 1.
    Source: Zhang, Cao, Jia & Gong 2022, KDD, arXiv:2207.09209; the median is the official code's default aggregation.
    """
    check_count("prediction_residual", "window", window)
    round_ = cohort(log)
    shares = log.folded(_Predicting(int(window))).shares
    found = [[of[client] for of in shares if client in of] for client in round_.clients.tolist()]
    predicted = np.array([len(each) > 0 for each in found])
    if 2 * predicted[round_.comparable].sum() < round_.comparable.sum():
        raise CannotSay(
            f"by round {round_.index} most of its clients have no earlier update to predict from"
            f" within {window} round{'s' if window > 1 else ''}"
        )
    values = np.array([np.mean(each) if each else 1.0 for each in found])
    return table(round_, ["update"], values[:, None])


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
    np.fill_diagonal(cosines, -np.inf)
    count = min(neighbours, int(reference.sum()) - 1)
    return np.sort(cosines[:, reference], axis=1)[:, -count:].mean(axis=1)


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


def _squares(sums: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """The sum of squares of some rows, float64 [row], without a copy of them all."""
    return kernels.squares(lambda start, stop: sums[rows, start:stop], len(rows), sums.shape[1])


def _cosine(dots: np.ndarray, squares: np.ndarray, others: np.ndarray) -> np.ndarray:
    norms = np.sqrt(squares * others)
    with np.errstate(all="ignore"):  # in the rows that become NaN
        return np.clip(np.divide(dots, norms, out=np.zeros_like(dots), where=norms > 0), -1, 1)


@dataclass(frozen=True, eq=False)
class _Course:
    """What predictions rest on: of at most the last `window` rounds, as float32 vectors over all layers.

    last: the last round; before: its number of predecessors; place, middle: its global model, its median update;
    moves, turns: how these two changed from round to round, oldest first; seen: client -> the number of predecessors of
    its last comparable round; absent: the updates of those of them that are not in the last round; shares: for each
    round, client -> its residual over the mean one.
    """

    last: Round
    before: int
    place: np.ndarray
    middle: np.ndarray
    moves: tuple[np.ndarray, ...] = ()
    turns: tuple[np.ndarray, ...] = ()
    seen: Mapping[str, int] = field(default_factory=dict)
    absent: Mapping[str, np.ndarray] = field(default_factory=dict)
    shares: tuple[Mapping[str, float], ...] = ({},)


@dataclass(frozen=True)
class _Predicting:
    """The course of a log, from round to round (`UpdateLog.folded`)."""

    window: int

    def __call__(self, course: _Course | None, log: UpdateLog) -> _Course:
        round_, window = log[-1], self.window
        sketched = 4 * log.model.num_parameters * (2 * window + 2) > BUDGET / 2
        place = _joined({name: round_.global_model[name].reshape(1, -1) for name in round_.parameters}, sketched)
        middle = _joined({name: round_.median[name].reshape(1, -1) for name in round_.parameters}, sketched)
        present = round_.clients[round_.comparable].tolist()
        if course is None:
            return _Course(round_, 0, place, middle, seen=dict.fromkeys(present, 0))
        if not present:  # then there is no median
            middle = course.middle
        before = course.before + 1
        with np.errstate(all="ignore"):  # the global model may not be finite
            move, turn = place - course.place, middle - course.middle
        shares = _shares(course, round_, move, sketched)
        seen = {client: when for client, when in course.seen.items() if when > before - window}
        absent = _absent(course, set(seen) - set(present), sketched)
        return _Course(
            round_,
            before,
            place,
            middle,
            (*course.moves, move)[-window:],
            (*course.turns, turn)[-window:],
            {client: seen[client] for client in absent} | dict.fromkeys(present, before),
            absent,
            (*course.shares, shares)[-window:],
        )


def _joined(layers: Mapping[str, np.ndarray], sketched: bool) -> np.ndarray:
    """One float32 vector of matrices [1, number]."""
    return np.concatenate([(_sketch(name, each) if sketched else each)[0] for name, each in layers.items()])


def _absent(course: _Course, clients: set[str], sketched: bool) -> dict[str, np.ndarray]:
    """The last updates of these clients; of as many as 0.5 GB hold, the latest ones."""
    latest = sorted(clients, key=lambda client: (-course.seen[client], client))
    known = dict(course.absent)
    for row, client in enumerate(course.last.clients.tolist()):
        if client in clients and course.seen[client] == course.before:
            layers = {name: course.last.flat(name)[row : row + 1] for name in course.last.parameters}
            known[client] = _joined(layers, sketched)
    return {client: known[client] for client in latest[: int(BUDGET / 2) // (4 * len(course.place))]}


def _shares(course: _Course, round_: Round, move: np.ndarray, sketched: bool) -> dict[str, float]:
    """Client -> the norm of its update minus the predicted one, over the mean of these norms."""
    rows = {c: r for r, c in enumerate(round_.clients.tolist()) if round_.comparable[r] and c in course.seen}
    if not rows:
        return {}
    gram, products, squares = _inner_products(course, round_, rows, [*course.moves, move, *course.turns], sketched)
    if not np.isfinite(gram).all():  # the global model is not
        return {}
    led_to = course.before + 1 - np.arange(len(course.moves), -1, -1)  # which round each move led to
    steps = (led_to[None, :] > np.array([course.seen[client] for client in rows])[:, None]).astype(np.float64)
    change = _hessian_times(gram, steps)
    left = squares - 2 * (change * products).sum(axis=1) + np.einsum("ki,ij,kj->k", change, gram, change)
    norms = np.sqrt(np.where(left > ROUNDING * squares, left, 0))
    mean = norms.mean()
    return dict(zip(rows, (norms / mean if mean > 0 else np.ones(len(norms))).tolist(), strict=True))


def _inner_products(
    course: _Course, round_: Round, rows: Mapping[str, int], basis: list[np.ndarray], sketched: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of the basis [vector, vector], of what changed in each client's update with it, and of that with itself."""
    gram = np.zeros((len(basis), len(basis)))
    products, squares = np.zeros((len(rows), len(basis))), np.zeros(len(rows))
    offset = 0
    for name in round_.parameters:
        pairs = _pairs(course, round_, rows, name, offset, sketched)
        size = len(pairs[0][0])
        for start in range(0, size, BLOCK):
            part = slice(start, min(start + BLOCK, size))
            vectors = np.stack([v[offset + part.start : offset + part.stop] for v in basis]).astype(np.float64)
            changes = np.stack([new[part] for new, _ in pairs]).astype(np.float64)
            changes -= np.stack([old[part] for _, old in pairs])
            gram += vectors @ vectors.T
            products += changes @ vectors.T
            squares += np.einsum("ki,ki->k", changes, changes)
        offset += size
    return gram, products, squares


def _pairs(
    course: _Course, round_: Round, rows: Mapping[str, int], layer: str, offset: int, sketched: bool
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Each client's update of one layer in this round and the one before it; not copied."""
    now, last = round_.flat(layer), course.last.flat(layer)
    position = {client: row for row, client in enumerate(course.last.clients.tolist())}

    def of(matrix: np.ndarray, row: int) -> np.ndarray:
        return _sketch(layer, matrix[row : row + 1])[0] if sketched else matrix[row]

    pairs = []
    for client, row in rows.items():
        new = of(now, row)
        if course.seen[client] == course.before:
            pairs.append((new, of(last, position[client])))
        else:
            pairs.append((new, course.absent[client][offset : offset + len(new)]))
    return pairs


def _hessian_times(gram: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """H v by the compact form of L-BFGS, as combinations of moves s (with the latest) and turns y, in their Gram.

    H = sigma I - [sigma S, Y] [[sigma S'S, L], [L', -D]]^-1 [sigma S, Y]', sigma = s'y / s's of the latest pair, L the
    strictly lower part and D the diagonal of S'Y. gram: [s..., the latest s, y...]; steps: v as sums of s.
    """
    count = steps.shape[1] - 1
    change = np.zeros((len(steps), 2 * count + 1))
    s, y = np.arange(count), np.arange(count) + count + 1
    curvatures, squares = gram[s, y], np.diagonal(gram)
    real = np.abs(curvatures) > ROUNDING * np.sqrt(squares[s] * squares[y])
    s, y = s[real], y[real]
    if not len(s):
        return change
    scale = 1 / np.sqrt(squares[s])  # a pair may be scaled
    sigma = curvatures[real][-1] / squares[s[-1]]
    mixed = gram[np.ix_(s, y)] * np.outer(scale, scale)
    lower, diagonal = np.tril(mixed, -1), np.diag(np.diagonal(mixed))
    middle = np.block([[sigma * gram[np.ix_(s, s)] * np.outer(scale, scale), lower], [lower.T, -diagonal]])
    both = np.concatenate([sigma * gram[s, : count + 1] * scale[:, None], gram[y, : count + 1] * scale[:, None]])
    weights = np.linalg.lstsq(middle, both @ steps.T, rcond=None)[0].T * np.tile(scale, 2)
    change[:, : count + 1] = sigma * steps
    change[:, s] -= sigma * weights[:, : len(s)]
    change[:, y] -= weights[:, len(s) :]
    return change
