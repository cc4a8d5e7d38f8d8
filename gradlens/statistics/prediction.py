"""What a client's updates were to be expected to be, from its own earlier ones and the course of the global model."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from gradlens.log import CannotSay, Round, UpdateLog
from gradlens.log.history import BUDGET, _sketch
from gradlens.log.record import BLOCK
from gradlens.statistics.cohort import check_count, cohort, table

ROUNDING = 1e-12  # of a squared norm, what is left of 0 after sums of products


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
