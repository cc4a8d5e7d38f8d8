"""Published detectors that look at the final layer alone: Bilgin, Tolpegin, LFighter, Auror."""

import numpy as np

from gradlens.detectors.clusters import APART, ROUNDING, cosine_distances, evidence_of, principal_plane
from gradlens.detectors.published import Judgement, published
from gradlens.detectors.verdict import TEXTBOOK, Detector
from gradlens.errors import InputError
from gradlens.log import UpdateLog
from gradlens.scorers import robustly_scaled, two_means
from gradlens.settings import one_of, positive, whole_number
from gradlens.statistics.final_layer import final_bias_deviation, final_weight

__all__ = ["auror", "bilgin", "lfighter", "tolpegin"]

WORKING = 1 << 20  # numbers of the final layer that are sorted at a time


def bilgin(robust: bool = False, threshold: float = TEXTBOOK) -> Detector:
    """Flags whose final bias strays farthest from the cohort's in some class, by an unusual margin.

    m_i = max over classes k of |mean over clients j of b_k(j) - b_k(i)|. Score: (m_i - median) / (1.4826 MAD) of the
    cohort's m, negative below the median; 0 where all are equal.
    robust: the cohort's median bias in place of its mean, which the attackers move (ours). threshold: of the score;
    the paper publishes none, 3.5 is Iglewicz & Hoaglin's (ours, too). An ordinary z-score of n clients never exceeds
    (n - 1) / sqrt(n), 3.5 only from 15 clients on, so none is taken.
    Raises: InputError for a threshold not above 0. Abstains if the model has no final bias.
    Source: Bilgin 2021, arXiv:2111.14683: the statistic, as its notebook computes it.
    """
    return published(_bilgin, robust=bool(robust), threshold=positive("threshold", threshold))


def tolpegin(source_label: int | None = None, rounds: int = 10) -> Detector:
    """Flags the smaller of two groups into which the final-layer rows of the attacked class fall.

    Each client's update of the class's row of the final weight, in each of the last rounds, is an observation. Their
    numbers are standardised and projected on two principal components, and 2-means splits them there; flagged is who
    has more than half of its observations in the smaller group, nobody where the groups are equally large.
    Score: mean over a client's observations of (distance to the larger group's centre - distance to the smaller
    one's), as a multiple of the median distance to the larger one's centre, minus the cohort's median of that; 0 where
    all are equal.
    source_label: the class, from 0; None: the one whose two centres lie farthest apart, as LFighter's port of this
    method has it (the paper supposes it known and leaves the split to the eye). rounds: the window, this round
    included; 1 is this round alone; the paper's code takes rounds 10 to 200, 10 is ours. Observations of clients of the
    last round only; weights only, no bias, as published.
    Raises: InputError for a setting out of its range, or a label that the model has not. Abstains if the model has no
    final weight. Source: Tolpegin, Truex, Gursoy & Liu 2020, ESORICS, arXiv:2007.08432, and its code.
    """
    label = None if source_label is None else whole_number("source_label", source_label)
    return published(_tolpegin, source_label=label, rounds=whole_number("rounds", rounds, least=1))


def lfighter(variant: str = "code") -> Detector:
    """Splits the clients by the final rows of the two classes that move most, and flags the denser, smaller group.

    The two classes are those with the largest sum over clients of |row of the weight's update|_2 + |its bias update|;
    with two classes at most, all. 2-means splits the clients by these rows of the weight alone. Each group of n_c
    of m clients has ds = n_c / m x (1 - mean over its clients i of the smallest cosine between i and its members);
    the group with the larger ds is kept, the larger group where they are equal, both where these are, too.
    Score: (distance to the kept group's centre - distance to the other's), as a multiple of the median distance to
    the kept group's; positive for those flagged; 0 where all are equal.
    variant: "code", a client's own cosine counts as 0 in its minimum, so that a group whose rows all point one way
    counts by its size; "formula", it counts as 1, so that a group of one, or of equals, has ds 0.
    Raises: InputError for another variant. Abstains if the model has no final weight.
    Source: Jebreel, Domingo-Ferrer, Sanchez & Blanco-Justicia 2024, "LFighter", Neural Networks, and the authors'
    code; arXiv:2207.01982 is its forerunner LFR.
    """
    return published(_lfighter, variant=one_of("variant", variant, "code", "formula"))


def auror(alpha: float | None = None) -> Detector:
    """Flags who is in the minority in more than half of the coordinates of the final layer that fall into two groups.

    Exact 2-means splits the clients in each coordinate of final weight and bias; a coordinate is indicative where the
    two centres lie more than alpha apart. Groups of equal size have no minority.
    Score: the share of all coordinates in which the client is in the minority, weighted by the squared distance of the
    centres, from 0 to 1; 0 where all are equal.
    alpha: in units of the weights, which the paper sets by model (FLPoison: 0.002); None: twice the median distance
    of the centres over the coordinates that differ at all (ours), which no unit enters. The paper finds the indicative
    coordinates in the first rounds, this looks at the last round alone.
    Raises: InputError for an alpha not above 0. Abstains if the model has no final weight.
    Source: Shen, Tople & Saxena 2016, "Auror", ACSAC; the final layer only as in FLPoison.
    """
    return published(_auror, alpha=None if alpha is None else positive("alpha", alpha))


def _bilgin(log: UpdateLog, robust: bool, threshold: float) -> Judgement:
    deviations = final_bias_deviation(log, "median" if robust else "mean")
    scores = robustly_scaled(deviations.to_numpy())[:, 0]
    return Judgement(scores, scores > threshold, evidence=deviations)


def _tolpegin(log: UpdateLog, source_label: int | None, rounds: int) -> Judgement:
    round_, weight = log[-1], final_weight(log)
    classes = log.model[weight].shape[0]
    if source_label is not None and source_label >= classes:
        raise InputError(f"source_label must be one of the model's {classes} classes, found {source_label}")
    whose, rows = _observations(log, weight, rounds)
    labels = range(classes) if source_label is None else [source_label]
    splits = [_split(_standardised_plane(rows[:, label])) for label in labels]
    apart, margins, minority = max(splits, key=lambda split: split[0])
    counts = np.bincount(whose, minlength=len(round_))
    scores = np.bincount(whose, margins, minlength=len(round_)) / counts
    scores -= np.median(scores)  # where rounds differ more than clients, all lie on one side together
    scores[np.abs(scores) <= APART] = 0
    shares = np.bincount(whose, minority, minlength=len(round_)) / counts
    label = labels[[split[0] for split in splits].index(apart)]
    evidence = {f"{weight}[{label}] margin": scores, "share in the smaller group": shares, "observations": counts}
    return Judgement(scores, shares > 0.5, evidence=evidence_of(round_, evidence))


def _observations(log: UpdateLog, weight: str, rounds: int) -> tuple[np.ndarray, np.ndarray]:
    """Of the last round's clients in the last rounds: whose int64 [observation], rows [observation, class, number]."""
    clients, classes = log[-1].clients, log.model[weight].shape[0]
    order = np.argsort(clients)
    whose, rows = [], []
    for stop in range(max(0, len(log) - rounds) + 1, len(log) + 1):
        prefix = log[:stop]
        known = np.isin(prefix[-1].clients, clients)
        usable = known & prefix.remembered(_comparable) if stop < len(log) else known
        whose.append(order[np.searchsorted(clients[order], prefix[-1].clients[usable])])
        rows.append(_rows(prefix[-1].flat(weight)[usable], classes))
    return np.concatenate(whose), np.concatenate(rows)


def _comparable(log: UpdateLog) -> np.ndarray:
    return log[-1].comparable  # takes a pass over all layers of a round, so it is remembered


def _standardised_plane(rows: np.ndarray) -> np.ndarray:
    """The two principal components of rows of mean 0 and variance 1 in each number: [row, number] -> [row, 2]."""
    deviation = rows - rows.mean(axis=0)
    deviation[np.abs(deviation) <= ROUNDING * np.abs(rows).max(axis=0)] = 0
    scale = np.sqrt(np.square(deviation).mean(axis=0))
    unit = np.divide(deviation, scale, out=np.zeros_like(deviation), where=scale > 0)
    return principal_plane(unit @ unit.T)


def _split(points: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
    """2-means of points: squared distance of the centres, relative margin towards the smaller group, who is in it."""
    second, centres = two_means(points)
    apart = float(np.square(centres[1] - centres[0]).sum())
    if apart == 0 or 2 * second.sum() == len(second):
        return apart, np.zeros(len(points)), np.zeros(len(points), dtype=bool)
    minority = second if 2 * second.sum() < len(second) else ~second
    return apart, _margins(points, minority), minority


def _margins(points: np.ndarray, doubtful: np.ndarray) -> np.ndarray:
    """How much nearer each point is to the doubtful group's centre, in median distances to the others' centre."""
    kept, other = points[~doubtful].mean(axis=0), points[doubtful].mean(axis=0)
    away = np.linalg.norm(points - kept, axis=1)
    away[away <= APART * away.max()] = 0
    return (away - np.linalg.norm(points - other, axis=1)) / (np.median(away) or away.mean())


def _lfighter(log: UpdateLog, variant: str) -> Judgement:
    round_, weight, bias = log[-1], final_weight(log), log.model.final_bias
    rows = _rows(round_.flat(weight, sketch=True), log.model[weight].shape[0])
    moved = np.sqrt(np.einsum("kci,kci->kc", rows, rows)).sum(axis=0)
    if bias is not None:
        moved += np.abs(round_.flat(bias)).sum(axis=0, dtype=np.float64)
    chosen = np.sort(np.argsort(moved, kind="stable")[-2:])
    points = rows[:, chosen].reshape(len(rows), -1)
    second, centres = two_means(points)
    evidence = {f"{weight}[{c}]": np.linalg.norm(rows[:, c], axis=1) for c in chosen}
    nobody = Judgement(np.zeros(len(rows)), np.zeros(len(rows), bool), evidence=evidence_of(round_, evidence))
    if not np.square(centres[1] - centres[0]).sum():
        return nobody
    cosines = 1 - cosine_distances(points @ points.T)
    np.fill_diagonal(cosines, 0.0 if variant == "code" else 1.0)
    sides = [np.flatnonzero(~second), np.flatnonzero(second)]
    kept, other = sorted(((round(_diversity(cosines, s), 9), len(s), *s) for s in sides), reverse=True)
    if kept[:2] == other[:2]:
        return nobody
    doubtful = np.ones(len(rows), dtype=bool)
    doubtful[list(kept[2:])] = False
    return Judgement(_margins(points, doubtful), doubtful, evidence=evidence_of(round_, evidence))


def _diversity(cosines: np.ndarray, members: np.ndarray) -> float:
    """The size-weighted inverse density ds of a group."""
    return len(members) / len(cosines) * (1 - float(cosines[np.ix_(members, members)].min(axis=1).mean()))


def _auror(log: UpdateLog, alpha: float | None) -> Judgement:
    round_, weight = log[-1], final_weight(log)
    layers = [weight] if log.model.final_bias is None else [weight, log.model.final_bias]
    size = max(1, WORKING // len(round_))
    parts = [two_groups(block) for name in layers for block in round_.blocks(name, size)]
    gaps = np.concatenate([gap for gap, _ in parts])
    minority = np.concatenate([part for _, part in parts], axis=1)
    if not gaps.any():
        return Judgement(np.zeros(len(round_)), np.zeros(len(round_), dtype=bool))
    indicative = gaps > (2 * np.median(gaps[gaps > 0]) if alpha is None else alpha)
    shares = minority[:, indicative].sum(axis=1) / max(1, indicative.sum())
    weights = np.square(gaps / gaps.max())
    scores = minority @ weights / weights.sum()
    evidence = {"minority share": scores, "minority share of indicative": shares}
    return Judgement(scores, shares > 0.5, evidence=evidence_of(round_, evidence))


def two_groups(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Exact 2-means of each column, [client, column]: distance of the centres [column] and who is in the minority.

    On the line two groups are what lies below and above a cut: all cuts of the sorted column are tried at once.
    minority: bool [client, column], False where both groups are equally large or all numbers are equal.
    """
    columns = np.ascontiguousarray(x.T)
    ordered = np.sort(columns, axis=1)
    clients = ordered.shape[1]
    below = np.arange(1, clients)
    sums = np.cumsum(ordered, axis=1, dtype=np.float64)
    gaps = (sums[:, -1:] - sums[:, :-1]) / (clients - below) - sums[:, :-1] / below
    between = np.where(ordered[:, 1:] > ordered[:, :-1], below * (clients - below) * np.square(gaps), 0)
    best = between.argmax(axis=1)[:, None]
    gaps = np.where(np.take_along_axis(between, best, 1) > 0, np.take_along_axis(gaps, best, 1), 0)
    lower = columns <= np.take_along_axis(ordered, best, axis=1)
    minority = np.where(2 * (best + 1) < clients, lower, ~lower) & (2 * (best + 1) != clients) & (gaps > 0)
    return gaps[:, 0], minority.T


def _rows(matrix: np.ndarray, classes: int) -> np.ndarray:
    """The updates of the final weight [client, number] as float64 [client, class, number]."""
    return matrix.reshape(len(matrix), classes, matrix.shape[1] // classes).astype(np.float64)
