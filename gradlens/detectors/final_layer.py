"""Published detectors that judge the final layer alone: Bilgin, Tolpegin, LFighter, Auror."""

import numpy as np

from gradlens.clustering import two_means, two_means_by_column
from gradlens.detectors.clusters import principal_plane
from gradlens.detectors.published import Judgement, evidence_of, published
from gradlens.detectors.verdict import TEXTBOOK, Detector
from gradlens.errors import CannotSay, InputError
from gradlens.geometry import ROUNDING, TIE, cosine_distances, ratio
from gradlens.log import UpdateLog
from gradlens.scorers import robustly_scaled
from gradlens.settings import one_of, positive, whole_number
from gradlens.statistics.final_layer import final_bias_deviation, final_weight

__all__ = ["auror", "bilgin", "lfighter", "tolpegin"]

MOST_CLASSES = 1_000  # that are split one by one
CHUNK = 1 << 20  # numbers of the final layer that are sorted at a time


def bilgin(robust: bool = False, threshold: float = TEXTBOOK) -> Detector:
    """Flags clients whose final bias strays unusually far from the cohort's in some class.

    Parameters
    ----------
    robust : bool, default False
        Whether the cohort's median bias takes the place of its mean, which attackers can move (our own variant).
    threshold : float, default 3.5
        Of the score, above which a client is flagged. The paper publishes none; 3.5 is Iglewicz & Hoaglin's, for one
        feature.

    Returns
    -------
    Detector

    Raises
    ------
    InputError
        For a setting out of its range.

    Notes
    -----
    With b_k(i) the bias of class k of client i [1]_::

        m_i = max over classes k of |mean over clients j of b_k(j) - b_k(i)|
        score = (m_i - median of m) / (1.4826 MAD of m)

    The score is negative below the median, and 0 where all are equal. An ordinary z-score would not do: of n clients it
    never exceeds (n - 1) / sqrt(n), so 3.5 only from 15 clients on.

    **Abstains** when fewer than 3 clients are comparable, or the model has no final bias.

    **Fails when** benign clients differ in their labels, which moves the bias like poison does; and after the backdoor
    has been learned, when the anomaly fades.

    References
    ----------
    .. [1] Bilgin 2021, arXiv:2111.14683: the statistic, as its notebook computes it.

    Examples
    --------
    >>> from gradlens import DETECTORS
    >>> from gradlens.examples import example_log
    >>> verdict = DETECTORS["bilgin"]()(example_log())
    >>> str(verdict.clients[verdict.scores.argmax()])
    'client-9'
    """
    return published(_bilgin, robust=bool(robust), threshold=positive("threshold", threshold))


def tolpegin(source_label: int | None = None, rounds: int = 10) -> Detector:
    """Flags the smaller of two groups into which the attacked class's final-layer rows fall.

    Parameters
    ----------
    source_label : int, optional
        The attacked class, from 0. By default the class whose two group centers lie farthest apart, as in LFighter's
        port of this method; the paper takes it as known and leaves the split to the eye.
    rounds : int, default 10
        The window, with the last round; 1 is the last round alone. The paper's code takes rounds 10 to 200; 10 is our
        own choice.

    Returns
    -------
    Detector

    Raises
    ------
    InputError
        For a setting out of its range; when called, for a label that the model does not have.

    Notes
    -----
    Each client's update of the class's row of the final weight (no bias, as published [1]_), in each of the last
    rounds, is an observation. Their numbers are standardized and projected on two principal components, and 2-means
    splits them there. Flagged are the clients of the last round with more than half of their observations in the
    smaller group; nobody, where the groups are equally large. Score::

        distance to the larger group's center - distance to the smaller group's center

    averaged over the client's observations, as a multiple of the median distance to the larger group's center, minus
    the cohort's median of that; 0 where all are equal.

    **Abstains** when fewer than 3 clients are comparable, when the model has no final weight with a row per class, or
    where more than 1,000 classes, as of a vocabulary, would be split one by one to find the attacked one.

    **Fails when** nobody is malicious, since two groups are found in any cohort; when label skew splits the clients
    more than the attack does; and when rounds differ more than clients do.

    References
    ----------
    .. [1] Tolpegin, Truex, Gursoy & Liu 2020, ESORICS, arXiv:2007.08432, and its code.

    Examples
    --------
    >>> from gradlens import DETECTORS
    >>> from gradlens.examples import example_log
    >>> verdict = DETECTORS["tolpegin"]()(example_log())
    >>> "share in the smaller group" in verdict.evidence
    True
    """
    label = None if source_label is None else whole_number("source_label", source_label)
    return published(_tolpegin, source_label=label, rounds=whole_number("rounds", rounds, least=1))


def lfighter(variant: str = "code") -> Detector:
    """Splits the clients by the final rows of the two classes that move most, and flags the smaller, denser group.

    Parameters
    ----------
    variant : {"code", "formula"}, default "code"
        Whether a client's own cosine counts in its minimum as 0, as in the authors' code, so that a group whose rows
        all point one way counts by its size; or as 1, so that a group of one, or of equals, has ds 0.

    Returns
    -------
    Detector

    Raises
    ------
    InputError
        For a setting out of its range.

    Notes
    -----
    The two classes are those with the largest sum over the clients of (L2 norm of the row of the weight's update +
    absolute bias update) [1]_; a model of two classes has no others. 2-means splits the clients by these rows of the
    weight. Each group of n_c of the m clients has ::

        ds = n_c / m * (1 - mean over its clients i of the smallest cosine between i and its members)

    The group with the larger ds is kept, the larger group where these are equal, both where the sizes are equal, too.
    Score::

        distance to the kept group's center - distance to the other group's center

    as a multiple of the median distance to the kept group's center; positive for flagged clients, 0 where all are
    equal.

    **Abstains** when fewer than 3 clients are comparable, or when the model has no final weight with a row per class.

    **Fails when** nobody is malicious, since two groups are found in any cohort; when label skew moves other classes
    more than the attack does; and when the malicious group is the more diverse one.

    References
    ----------
    .. [1] Jebreel, Domingo-Ferrer, Sanchez & Blanco-Justicia 2024, "LFighter", Neural Networks, and the authors' code;
       arXiv:2207.01982 is its forerunner LFR.

    Examples
    --------
    >>> from gradlens import DETECTORS
    >>> from gradlens.examples import example_log
    >>> verdict = DETECTORS["lfighter"]()(example_log(num_malicious=3))
    >>> verdict.clients[verdict.flags].tolist()
    ['client-7', 'client-8', 'client-9']
    """
    return published(_lfighter, variant=one_of("variant", variant, "code", "formula"))


def auror(alpha: float | None = None) -> Detector:
    """Flags clients that are in the minority in most of the final-layer coordinates that fall into two groups.

    Parameters
    ----------
    alpha : float, optional
        The distance of the two means from which a coordinate is indicative, in units of the weights; the paper sets it
        by model (FLPoison: 0.002). By default twice the median distance over the coordinates that differ at all, which
        has no unit (our own choice).

    Returns
    -------
    Detector

    Raises
    ------
    InputError
        For a setting out of its range.

    Notes
    -----
    Exact 2-means splits the clients in each coordinate of the final weight and bias [1]_; as in FLPoison, only the
    final layer is used. A coordinate is indicative where the two means lie more than `alpha` apart. Groups of equal
    size have no minority. A client is flagged that is in the minority in more than half of the indicative coordinates.
    The score is the share of all coordinates in which the client is in the minority, weighted by the squared distance
    of the means: from 0 to 1, 0 where all are equal. The paper finds the indicative coordinates in the first rounds;
    this uses the last round alone.

    **Abstains** when fewer than 3 clients are comparable, when the model has no final weight with a row per class, or
    when the final layer was not recorded whole.

    **Fails when** benign clients differ in their labels, which splits the same coordinates; and when as many clients
    attack as do not.

    References
    ----------
    .. [1] Shen, Tople & Saxena 2016, "Auror", ACSAC.

    Examples
    --------
    >>> from gradlens import DETECTORS
    >>> from gradlens.examples import example_log
    >>> verdict = DETECTORS["auror"]()(example_log())
    >>> verdict.clients[verdict.flags].tolist()
    ['client-9']
    """
    return published(_auror, alpha=None if alpha is None else positive("alpha", alpha))


def _bilgin(log: UpdateLog, robust: bool, threshold: float) -> Judgement:
    deviations = final_bias_deviation(log, "median" if robust else "mean")
    scores = robustly_scaled(deviations.to_numpy())[:, 0]
    return Judgement(scores, scores > threshold, evidence=deviations)


def _tolpegin(log: UpdateLog, source_label: int | None, rounds: int) -> Judgement:
    round_, weight = log[-1], final_weight(log)
    classes = log.model.num_units(weight)
    if source_label is not None and source_label >= classes:
        raise InputError(f"source_label must be one of the model's {classes} classes, found {source_label}")
    if source_label is None and classes > MOST_CLASSES:
        raise CannotSay(f"{classes:,} classes: at most {MOST_CLASSES:,} are split one by one; source_label names one")
    owners, rows = _observations(log, weight, rounds)
    labels = range(classes) if source_label is None else [source_label]
    splits = [_split(_standardized_plane(rows[:, label])) for label in labels]
    apart, margins, minority = max(splits, key=lambda split: split[0])
    counts = np.bincount(owners, minlength=len(round_))
    scores = np.bincount(owners, margins, minlength=len(round_)) / counts
    scores -= np.median(scores)  # where rounds differ more than clients, all lie on the same side
    scores[np.abs(scores) <= TIE] = 0
    shares = np.bincount(owners, minority, minlength=len(round_)) / counts
    label = labels[[split[0] for split in splits].index(apart)]
    evidence = {f"{weight}[{label}] margin": scores, "share in the smaller group": shares, "observations": counts}
    return Judgement(scores, shares > 0.5, evidence=evidence_of(round_, evidence))


def _observations(log: UpdateLog, weight: str, rounds: int) -> tuple[np.ndarray, np.ndarray]:
    """The clients of the last round in the last rounds.

    Returns the position of each observation's client, int64 [observation], and its rows, float64 [observation, class,
    number].
    """
    clients = log[-1].clients
    order = np.argsort(clients)
    owners, rows = [], []
    for stop in range(max(0, len(log) - rounds) + 1, len(log) + 1):
        prefix = log[:stop]
        known = np.isin(prefix[-1].clients, clients)
        usable = known & prefix.remembered(_comparable) if stop < len(log) else known
        owners.append(order[np.searchsorted(clients[order], prefix[-1].clients[usable])])
        rows.append(log.model.by_unit(weight, prefix[-1].flat(weight)[usable]).astype(np.float64))
    return np.concatenate(owners), np.concatenate(rows)


def _comparable(log: UpdateLog) -> np.ndarray:
    return log[-1].comparable  # remembered: it takes a pass over all layers of a round


def _standardized_plane(rows: np.ndarray) -> np.ndarray:
    """The two principal components of rows standardized in each number: [row, number] -> [row, 2]."""
    deviation = rows - rows.mean(axis=0)
    deviation[np.abs(deviation) <= ROUNDING * np.abs(rows).max(axis=0)] = 0
    scale = np.sqrt(np.square(deviation).mean(axis=0))
    unit = ratio(deviation, scale)
    return principal_plane(unit @ unit.T)


def _split(points: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
    """2-means of points: squared distance of the centers, margin towards the smaller group, and who is in it."""
    second, centers = two_means(points)
    apart = float(np.square(centers[1] - centers[0]).sum())
    if apart == 0 or 2 * second.sum() == len(second):
        return apart, np.zeros(len(points)), np.zeros(len(points), dtype=bool)
    minority = second if 2 * second.sum() < len(second) else ~second
    return apart, _margins(points, minority), minority


def _margins(points: np.ndarray, suspicious: np.ndarray) -> np.ndarray:
    """How much nearer each point is to the suspicious group's center, in median distances to the others' center."""
    kept, other = points[~suspicious].mean(axis=0), points[suspicious].mean(axis=0)
    away = np.linalg.norm(points - kept, axis=1)
    away[away <= TIE * away.max()] = 0
    return (away - np.linalg.norm(points - other, axis=1)) / (np.median(away) or away.mean())


def _lfighter(log: UpdateLog, variant: str) -> Judgement:
    round_, weight, bias = log[-1], final_weight(log), log.model.final_bias
    rows = log.model.by_unit(weight, round_.flat(weight, sketch=True)).astype(np.float64)
    moved = np.sqrt(np.einsum("kci,kci->kc", rows, rows)).sum(axis=0)
    if bias is not None:
        moved += np.abs(round_.flat(bias)).sum(axis=0, dtype=np.float64)
    chosen = np.sort(np.argsort(moved, kind="stable")[-2:])
    points = rows[:, chosen].reshape(len(rows), -1)
    second, centers = two_means(points)
    evidence = {f"{weight}[{c}]": np.linalg.norm(rows[:, c], axis=1) for c in chosen}
    nobody = Judgement(np.zeros(len(rows)), np.zeros(len(rows), bool), evidence=evidence_of(round_, evidence))
    if not np.square(centers[1] - centers[0]).sum():
        return nobody
    cosines = 1 - cosine_distances(points @ points.T)
    np.fill_diagonal(cosines, 0.0 if variant == "code" else 1.0)
    sides = [np.flatnonzero(~second), np.flatnonzero(second)]
    kept, other = sorted(((round(_diversity(cosines, s), 9), len(s), *s) for s in sides), reverse=True)
    if kept[:2] == other[:2]:
        return nobody
    suspicious = np.ones(len(rows), dtype=bool)
    suspicious[list(kept[2:])] = False
    return Judgement(_margins(points, suspicious), suspicious, evidence=evidence_of(round_, evidence))


def _diversity(cosines: np.ndarray, members: np.ndarray) -> float:
    """The size-weighted inverse density ds of a group."""
    return len(members) / len(cosines) * (1 - float(cosines[np.ix_(members, members)].min(axis=1).mean()))


def _auror(log: UpdateLog, alpha: float | None) -> Judgement:
    round_, weight = log[-1], final_weight(log)
    layers = [weight] if log.model.final_bias is None else [weight, log.model.final_bias]
    size = max(1, CHUNK // len(round_))
    parts = [two_means_by_column(block) for name in layers for block in round_.blocks(name, size)]
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
