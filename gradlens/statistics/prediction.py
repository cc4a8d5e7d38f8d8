"""Predicts each update from the client's past updates and the global model's trajectory (FLDetector)."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from gradlens.errors import CannotSay
from gradlens.geometry import ROUNDING
from gradlens.log import Round, UpdateLog
from gradlens.log.accumulated import BUDGET, sketch_rows
from gradlens.log.round import BLOCK
from gradlens.settings import whole_number
from gradlens.statistics.cohort import cohort, table


def prediction_residual(log: UpdateLog, window: int = 10) -> pd.DataFrame:
    """How badly each client's recent updates were predicted from its own earlier ones (FLDetector's score).

    Parameters
    ----------
    log : UpdateLog
        The rounds so far; the clients of the last one are judged.
    window : int, default 10
        Rounds that are averaged, and pairs that L-BFGS uses; 10 is the official code's.

    Returns
    -------
    DataFrame, float64 [client, 1]
        1 = as badly as the average client, also for a client without a prediction; the column is "update".

    Raises
    ------
    CannotSay
        Where it abstains.
    InputError
        Unless `window` is a whole number of at least 1.

    Notes
    -----
    With g_i(t') the client's last update before round t, in round t', and w_t the global model::

        g_i(t') + H (w_t - w_t')

    is the prediction [1]_. H v comes from L-BFGS in the compact form of Byrd, Nocedal & Schnabel 1994, with the latest
    `window` pairs of moves of the global model and changes of the cohort's median update (the official code's default
    aggregation) that were known before round t. A pair without curvature (the global model or the median did not
    change) is left out; without any pair the prediction is the last update itself. The L2 norms of update - prediction,
    over the whole update, are divided by their mean over the round's comparable clients and averaged over those of the
    last `window` rounds in which the client has one.

    This differs from the paper in two points. The paper divides by the sum, which depends on the number of clients. And
    it has every client in every round, so t' = t - 1; under client sampling t' may be earlier, by up to `window`
    rounds. Beyond 0.5 GB the vectors are sketched (`Accumulated`).

    **Abstains** when fewer than 3 clients are comparable, or before half of them have a prediction.

    **Fails when** an attacker is consistent: updates that are poisoned alike in every round are predicted well.

    References
    ----------
    .. [1] Zhang, Cao, Jia & Gong 2022, KDD, arXiv:2207.09209.

    Examples
    --------
    >>> from gradlens.examples import example_log
    >>> from gradlens.statistics import prediction_residual
    >>> prediction_residual(example_log())["update"].idxmax()
    'client-9'
    """
    whole_number("prediction_residual: window", window, least=1)
    round_ = cohort(log)
    shares = log.folded(_Predicting(int(window))).shares
    residuals = [[of[client] for of in shares if client in of] for client in round_.clients.tolist()]
    predicted = np.array([len(of_client) > 0 for of_client in residuals])
    if 2 * predicted[round_.comparable].sum() < round_.comparable.sum():
        raise CannotSay(
            f"by round {round_.index} most of its clients have no earlier update to predict from"
            f" within {window} round{'s' if window > 1 else ''}"
        )
    values = np.array([np.mean(of_client) if of_client else 1.0 for of_client in residuals])
    return table(round_, ["update"], values[:, None])


Layers = Mapping[str, np.ndarray]  # layer -> float32 [number]


@dataclass(frozen=True, eq=False)
class _Course:
    """The state that predictions rest on, from at most the last `window` rounds and the one before them.

    last: the last round; before: the number of rounds before it; places, middles: the global models and the median
    updates until then, oldest first; seen: client -> the number of rounds before its last comparable one; absent: the
    last updates of those clients that are not in the last round; shares: for each round, client -> the norm of its
    residual, over the mean norm.
    """

    last: Round
    before: int
    places: tuple[Layers, ...]
    middles: tuple[Layers, ...]
    seen: Mapping[str, int] = field(default_factory=dict)
    absent: Mapping[str, Layers] = field(default_factory=dict)
    shares: tuple[Mapping[str, float], ...] = ({},)


@dataclass(frozen=True)
class _Predicting:
    """Carries the state from round to round: a step for `UpdateLog.folded`."""

    window: int

    def __call__(self, course: _Course | None, log: UpdateLog) -> _Course:
        round_, window = log[-1], self.window
        sketched = 4 * log.model.num_parameters * (2 * window + 2) > BUDGET / 2
        place = {name: _vector(name, round_.global_model[name], sketched) for name in round_.parameters}
        middle = {name: _vector(name, round_.median[name], sketched) for name in round_.parameters}
        present = round_.clients[round_.comparable].tolist()
        if course is None:
            return _Course(round_, 0, (place,), (middle,), seen=dict.fromkeys(present, 0))
        if not present:  # then there is no median
            middle = course.middles[-1]
        before = course.before + 1
        places = (*course.places, place)
        shares = relative_residuals(course, round_, places, sketched)
        seen = {client: when for client, when in course.seen.items() if when > before - window}
        absent = _absent(course, set(seen) - set(present), sketched)
        return _Course(
            round_,
            before,
            places[-window - 1 :],
            (*course.middles, middle)[-window - 1 :],
            {client: seen[client] for client in absent} | dict.fromkeys(present, before),
            absent,
            (*course.shares, shares)[-window:],
        )


def _vector(layer: str, numbers: np.ndarray, sketched: bool) -> np.ndarray:
    """The numbers of a layer in a row: not copied, or sketched."""
    return sketch_rows(layer, numbers.reshape(1, -1))[0] if sketched else numbers.reshape(-1)


def _absent(course: _Course, clients: set[str], sketched: bool) -> dict[str, Layers]:
    """The last updates of these clients; no more than 0.5 GB hold, the latest ones first."""
    latest = sorted(clients, key=lambda client: (-course.seen[client], client))
    known = dict(course.absent)
    for row, client in enumerate(course.last.clients.tolist()):
        if client in clients and course.seen[client] == course.before:
            flat = {name: course.last.flat(name, sketch=True)[row] for name in course.last.parameters}
            known[client] = {name: np.array(_vector(name, numbers, sketched)) for name, numbers in flat.items()}
    size = 4 * sum(len(numbers) for numbers in course.places[-1].values())
    return {client: known[client] for client in latest[: int(BUDGET / 2) // size]}


def relative_residuals(course: _Course, round_: Round, places: tuple[Layers, ...], sketched: bool) -> dict[str, float]:
    """Client -> the norm of its update minus the predicted one, over the mean of these norms."""
    rows = {c: r for r, c in enumerate(round_.clients.tolist()) if round_.comparable[r] and c in course.seen}
    if not rows:
        return {}
    gram, products, squares = _inner_products(course, round_, rows, places, sketched)
    if not np.isfinite(gram).all():  # the global model is not
        return {}
    led_to = course.before + 1 - np.arange(len(places) - 2, -1, -1)  # which round each move led to
    steps = (led_to[None, :] > np.array([course.seen[client] for client in rows])[:, None]).astype(np.float64)
    change = hessian_times(gram, steps)
    left = squares - 2 * (change * products).sum(axis=1) + np.einsum("ki,ij,kj->k", change, gram, change)
    norms = np.sqrt(np.where(left > ROUNDING * squares, left, 0))
    mean = norms.mean()
    return dict(zip(rows, (norms / mean if mean > 0 else np.ones(len(norms))).tolist(), strict=True))


def _inner_products(
    course: _Course, round_: Round, rows: Mapping[str, int], places: tuple[Layers, ...], sketched: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Inner products of the basis [vector, vector], of each client's change of update with the basis, and with itself.

    The basis holds the moves of the global model from round to round, oldest first, then those of the medians.
    """
    count = len(places) + len(course.middles) - 2
    gram, products, squares = np.zeros((count, count)), np.zeros((len(rows), count)), np.zeros(len(rows))
    for name in round_.parameters:
        pairs = _pairs(course, round_, rows, name, sketched)
        for start in range(0, len(places[-1][name]), BLOCK):
            part = slice(start, start + BLOCK)
            with np.errstate(all="ignore"):  # the global model may not be finite
                courses = [np.stack([state[name][part] for state in states]) for states in (places, course.middles)]
                vectors = np.concatenate([np.diff(course_.astype(np.float64), axis=0) for course_ in courses])
                gram += vectors @ vectors.T
            changes = np.stack([new[part] for new, _ in pairs]).astype(np.float64)
            changes -= np.stack([old[part] for _, old in pairs])
            products += changes @ vectors.T
            squares += np.einsum("ki,ki->k", changes, changes)
    return gram, products, squares


def _pairs(
    course: _Course, round_: Round, rows: Mapping[str, int], layer: str, sketched: bool
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Each client's update of one layer in this round and the one before it; not copied."""
    now, last = round_.flat(layer, sketch=True), course.last.flat(layer, sketch=True)
    position = {client: row for row, client in enumerate(course.last.clients.tolist())}
    pairs = []
    for client, row in rows.items():
        if course.seen[client] == course.before:
            before = _vector(layer, last[position[client]], sketched)
        else:
            before = course.absent[client][layer]
        pairs.append((_vector(layer, now[row], sketched), before))
    return pairs


def hessian_times(gram: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """H v by the compact form of L-BFGS, as combinations of the moves s and the changes y of the medians.

    Parameters
    ----------
    gram : ndarray, float64 [vector, vector]
        Inner products of the vectors [s..., the latest s, y...].
    steps : ndarray, float64 [client, s]
        v of each client as a sum of moves s, the latest included.

    Returns
    -------
    ndarray, float64 [client, vector]
        H v as a combination of the vectors.

    Notes
    -----
    With sigma = s'y / s's of the latest pair, L the strictly lower part and D the diagonal of S'Y::

        H = sigma I - [sigma S, Y] [[sigma S'S, L], [L', -D]]^-1 [sigma S, Y]'
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
