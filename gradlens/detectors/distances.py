"""Published detectors that judge how far the updates lie from each other: Krum, Multi-Krum, Multi-metrics, DnC."""

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import numpy as np

from gradlens.detectors.published import Judgement, evidence_of, published, relative
from gradlens.detectors.verdict import Detector
from gradlens.errors import CannotSay
from gradlens.geometry import ROUNDING, TIE, ratio, squared_distances
from gradlens.log import Round, UpdateLog
from gradlens.log.round import PAIRWISE
from gradlens.settings import one_of, positive, share, whole_number

__all__ = ["dnc", "krum", "multi_krum", "multi_metrics"]

STRIP = 8_192  # numbers of a layer whose pairwise differences fit into the processor's cache


def krum(
    num_malicious: int | None = None, neighbours: str = "paper", power: float = 2, by_layer: bool = False
) -> Detector:
    """Keeps the one update that lies nearest to its neighbors and flags all others.

    Parameters
    ----------
    num_malicious : int, optional
        The number f of attackers that is allowed for; by default the most that n clients tolerate, n > 2f + 2.
    neighbours : {"paper", "n-f-1"}, default "paper"
        How many of the nearest clients count: n - f - 2 as in the paper, or n - f - 1 (ByzFL, FLPoison).
    power : float, default 2
        Of the distances; 2 is the paper's, FLPoison has 1, and fedlib, which squares twice, 4.
    by_layer : bool, default False
        Whether distances are sums over layers of L2 distances (FederatedScope, with power 1) instead of L2 distances of
        the whole updates.

    Returns
    -------
    Detector

    Raises
    ------
    InputError
        For a setting out of its range.

    Notes
    -----
    Score of client i, over its nearest clients j [1]_::

        sum over j of |u_i - u_j| ** power

    as a multiple of the cohort's median score (of its mean where the median is 0): about 1 for an inconspicuous client,
    0 where all are equal. Updates nearer than a millionth of their norms count as equal. Equal scores are kept or
    flagged together, where the paper takes the smallest identifier.

    **Abstains** when fewer than 3 clients are comparable, when n <= 2f + 2, or more than 5,000 clients took part.

    **Fails when** nobody is malicious, since it flags all clients but one; and when label skew spreads the benign
    updates more than the malicious ones, which then are the nearest neighbors of each other.

    References
    ----------
    .. [1] Blanchard, El Mhamdi, Guerraoui & Stainer 2017, "Machine Learning with Adversaries", arXiv:1703.02757.

    Examples
    --------
    >>> from gradlens import DETECTORS
    >>> from gradlens.examples import example_log
    >>> verdict = DETECTORS["krum"](num_malicious=1)(example_log())
    >>> str(verdict.clients[verdict.scores.argmax()]), (~verdict.flags).sum().item()
    ('client-9', 1)
    """
    return published(_krum, **_krum_settings(num_malicious, neighbours, power, by_layer))


def multi_krum(
    num_malicious: int | None = None,
    num_selected: int | None = None,
    neighbours: str = "paper",
    power: float = 2,
    by_layer: bool = False,
) -> Detector:
    """Keeps the best updates by one Krum ranking and flags the others.

    Parameters
    ----------
    num_malicious : int, optional
        The number f of attackers that is allowed for; by default the most that n clients tolerate, n > 2f + 2.
    num_selected : int, optional
        The number m of clients that are kept; by default n - f, as in Blades, Flower and most reproductions. The paper
        leaves it open; 1 is Krum.
    neighbours : {"paper", "n-f-1"}, default "paper"
        How many of the nearest clients count: n - f - 2 as in the paper, or n - f - 1 (ByzFL, FLPoison).
    power : float, default 2
        Of the distances; 2 is the paper's, FLPoison has 1, and fedlib, which squares twice, 4.
    by_layer : bool, default False
        Whether distances are sums over layers of L2 distances (FederatedScope, with power 1) instead of L2 distances of
        the whole updates.

    Returns
    -------
    Detector

    Raises
    ------
    InputError
        For a setting out of its range.

    Notes
    -----
    The scores are those of `krum`; there is one ranking [1]_, unlike the repeated ones of Bulyan.

    **Abstains** when fewer than 3 clients are comparable, when n <= 2f + 2, or more than 5,000 clients took part.

    **Fails when** nobody is malicious, since it flags f clients all the same; and when label skew spreads the benign
    updates more than the malicious ones.

    References
    ----------
    .. [1] Blanchard et al. 2017, "Machine Learning with Adversaries", arXiv:1703.02757, section 4.

    Examples
    --------
    >>> from gradlens import DETECTORS
    >>> from gradlens.examples import example_log
    >>> verdict = DETECTORS["multi_krum"](num_malicious=1)(example_log())
    >>> verdict.clients[verdict.flags].tolist()
    ['client-9']
    """
    if num_selected is not None:
        num_selected = whole_number("num_selected", num_selected, least=1)
    settings = _krum_settings(num_malicious, neighbours, power, by_layer)
    return published(_multi_krum, num_selected=num_selected, **settings)


def multi_metrics(keep: float = 0.3, features: str = "paper", centred: bool = False) -> Detector:
    """Keeps the share of clients that strays least in Manhattan, Euclidean and cosine terms together.

    Parameters
    ----------
    keep : float, default 0.3
        The share of clients that is kept, at least one; 0.3 is the paper's.
    features : {"paper", "code"}, default "paper"
        What differs between two clients. "paper": the L1 and the L2 norm of the update, and the cosine of the client's
        model to the global one. "code": what the authors' program sums, namely L1 distances of the updates, differences
        of the L2 norms of the clients' models, and (1 - cosine of the two models) ** 2; its work grows with the square
        of the number of clients.
    centred : bool, default False
        Whether x is taken minus its mean, which gives the Mahalanobis distance. Paper and program do not do so; a
        cohort that is tight in these features then drowns its outlier, since most of x' S^-1 x is the mean's.

    Returns
    -------
    Detector

    Raises
    ------
    InputError
        For a setting out of its range.

    Notes
    -----
    Each client has three features x, each the sum over all others of how far the two differ; S is the covariance of x
    over the clients [1]_. Score::

        sqrt(x' S^-1 x)

    without a unit; 0 where all are equal. Where S is singular (three clients, a feature without spread, a global model
    of zeros) its pseudo-inverse takes its place, for the features in units of their deviations. Equal scores are kept
    or flagged together.

    **Abstains** when fewer than 3 clients are comparable, when more than 5,000 clients took part, or when the updates
    were not recorded whole.

    **Fails when** nobody is malicious, since it flags most of the cohort by design; and when the cohort is tight in the
    features (see `centred`).

    References
    ----------
    .. [1] Huang et al. 2023, ICCV, arXiv:2303.06601; github.com/siquanhuang/Multi-metrics, defense.py.

    Examples
    --------
    >>> from gradlens import DETECTORS
    >>> from gradlens.examples import example_log
    >>> verdict = DETECTORS["multi_metrics"]()(example_log())
    >>> (~verdict.flags).sum().item()  # of 10 clients
    3
    """
    chosen = one_of("features", features, "paper", "code")
    return published(_multi_metrics, keep=share("keep", keep), features=chosen, centred=bool(centred))


def dnc(
    num_malicious: int | None = None,
    iterations: int = 5,
    dimensions: int = 10_000,
    filtering: float = 1.0,
    seed: int = 0,
) -> Detector:
    """Flags clients far out in the direction in which the updates vary most, in any of several random samples.

    Parameters
    ----------
    num_malicious : int, optional
        The number f of attackers that is allowed for; by default the largest minority, n > 2f.
    iterations : int, default 5
        5 as in fedlib; the paper's table has 1.
    dimensions : int, default 10_000
        Coordinates that are sampled, the paper's b and fedlib's; the whole model where it is smaller.
    filtering : float, default 1.0
        The paper's c. ``filtering * f`` clients fall out in each iteration; a fraction of a client is rounded down, as
        in fedlib.
    seed : int, default 0
        Of the coordinates, which are drawn anew in every round.

    Returns
    -------
    Detector

    Raises
    ------
    InputError
        For a setting out of its range.

    Notes
    -----
    Each iteration draws coordinates without replacement, centers them on the mean of the comparable clients and takes
    the squared projections on the top right singular vector; the ``filtering * f`` largest fall out. Kept are the
    clients that stay in every iteration [1]_. The score is the mean over the iterations of the squared projection, as a
    multiple of the cohort's median one (of the mean where that is 0); 0 where all are equal. Where several directions
    vary equally, all of them count. For a layer that is recorded as a sketch, coordinates are those of the sketch.
    Equal scores are kept or flagged together.

    **Abstains** when fewer than 3 clients are comparable, when n <= 2f or filtering * f >= n, or when more than 5,000
    clients took part.

    **Fails when** nobody is malicious, since it flags f clients all the same; and when label skew is the direction in
    which the updates vary most.

    References
    ----------
    .. [1] Shejwalkar & Houmansadr 2021, "Manipulating the Byzantine", NDSS, algorithm 2.

    Examples
    --------
    >>> from gradlens import DETECTORS
    >>> from gradlens.examples import example_log
    >>> verdict = DETECTORS["dnc"](num_malicious=1)(example_log())
    >>> verdict.clients[verdict.flags].tolist()
    ['client-9']
    """
    return published(
        _dnc,
        num_malicious=_tolerated(num_malicious),
        iterations=whole_number("iterations", iterations, least=1),
        dimensions=whole_number("dimensions", dimensions, least=1),
        filtering=positive("filtering", filtering),
        seed=whole_number("seed", seed),
    )


# Methods


def _krum(log: UpdateLog, num_malicious: int | None, neighbours: str, power: float, by_layer: bool) -> Judgement:
    malicious = _malicious(log[-1], num_malicious)
    scores = _krum_scores(log[-1], malicious, neighbours, power, by_layer)
    return Judgement(scores, ~lowest(scores, 1))


def _multi_krum(
    log: UpdateLog, num_selected: int | None, num_malicious: int | None, neighbours: str, power: float, by_layer: bool
) -> Judgement:
    malicious = _malicious(log[-1], num_malicious)
    scores = _krum_scores(log[-1], malicious, neighbours, power, by_layer)
    return Judgement(scores, ~lowest(scores, len(scores) - malicious if num_selected is None else num_selected))


def _krum_scores(round_: Round, malicious: int, neighbours: str, power: float, by_layer: bool) -> np.ndarray:
    apart = _layer_distances(round_) if by_layer else np.sqrt(squared_distances(round_.total_gram))
    if not apart.any():
        return np.zeros(len(round_))
    apart /= apart[apart > 0].mean()  # a high power of a large distance stays finite
    nearest = np.sort(apart, axis=1)[:, 1:]  # the first is the client itself
    count = len(round_) - malicious - (2 if neighbours == "paper" else 1)
    return relative((nearest[:, :count] ** power).sum(axis=1))


def _multi_metrics(log: UpdateLog, keep: float, features: str, centred: bool) -> Judgement:
    x = _paper_features(log) if features == "paper" else _code_features(log)
    deviation = x.std(axis=0, ddof=1)
    z = ratio(x, np.where(deviation > TIE * x.mean(axis=0), deviation, 0))
    inverse = np.linalg.pinv(np.cov(z.T), rcond=1e-10, hermitian=True)
    z = z - z.mean(axis=0) if centred else z
    scores = np.sqrt(np.maximum(np.einsum("ki,ij,kj->k", z, inverse, z), 0.0))
    kept = lowest(scores, max(1, math.floor(keep * len(x) + TIE)))
    evidence = evidence_of(log[-1], dict(zip(("manhattan", "euclidean", "cosine"), x.T, strict=True)))
    return Judgement(scores, ~kept, evidence=evidence)


def _dnc(
    log: UpdateLog, num_malicious: int | None, iterations: int, dimensions: int, filtering: float, seed: int
) -> Judgement:
    round_, clients = log[-1], len(log[-1])
    malicious = (clients - 1) // 2 if num_malicious is None else num_malicious
    removed = math.floor(filtering * malicious + TIE)
    if clients > PAIRWISE:
        raise CannotSay(f"{clients} clients: nothing pairwise is formed above {PAIRWISE:,}")
    if clients <= 2 * malicious or removed >= clients:
        needed = max(2 * malicious, removed) + 1
        raise CannotSay(f"num_malicious {malicious} needs {needed} comparable clients, found {clients}")
    rng = np.random.default_rng([seed, round_.index])
    samples = np.stack([drawn(round_, dimensions, rng) for _ in range(iterations)])
    order = np.argsort(samples, axis=None, kind="stable")
    numbers = numbers_at(partial(round_.blocks, sketch=True), round_.parameters, samples.reshape(-1)[order])
    sample = order // samples.shape[1]  # that each position belongs to
    scores, kept = np.zeros(clients), np.ones(clients, dtype=bool)
    for iteration in range(iterations):
        projections = relative(_squared_projections(numbers[:, sample == iteration].astype(np.float64)))
        kept &= lowest(projections, clients - removed)
        scores += projections / iterations
    return Judgement(scores, ~kept)


def _squared_projections(numbers: np.ndarray) -> np.ndarray:
    """Squared projection of each row on the direction in which the centered rows vary most, float64 [client]."""
    size = np.abs(numbers).max(initial=0.0)
    if size == 0:
        return np.zeros(len(numbers))
    centered = numbers / size
    total = np.square(centered).sum()
    centered -= centered.mean(axis=0)
    values, vectors = np.linalg.eigh(centered @ centered.T)  # s^2 and u of the decomposition u s v
    if values[-1] <= ROUNDING**2 * total:
        return np.zeros(len(numbers))
    top = values >= (1 - TIE) * values[-1]  # of equal eigenvalues none is the first
    return values[-1] * np.square(vectors[:, top]).sum(axis=1)


# Features of Multi-metrics, [client, 3]


def _paper_features(log: UpdateLog) -> np.ndarray:
    round_ = log[-1]
    squares = np.diagonal(round_.total_gram)
    model, models, longer = _model_norms(log, squares)
    both = 2 * models * model
    angles = ratio(squares - longer**2, both)  # 1 - cosine: the cosine itself is 1 to many digits
    parts = [_apart(_manhattan_norms(round_)), _apart(np.sqrt(squares)), _apart(angles, ratio(squares, both))]
    return np.stack([part.sum(axis=1) for part in parts], axis=1)


def _code_features(log: UpdateLog) -> np.ndarray:
    round_ = log[-1]
    gram = round_.total_gram
    squares = np.diagonal(gram)
    _, models, longer = _model_norms(log, squares)
    taller = _apart(longer, np.sqrt(squares))
    both = 2 * models[:, None] * models
    angles = ratio(squared_distances(gram) - taller**2, both)  # 1 - cosine
    angles[angles <= ROUNDING * ratio(squares[:, None] + squares, both)] = 0
    return np.stack([_manhattan_distances(round_).sum(axis=1), taller.sum(axis=1), (angles**2).sum(axis=1)], axis=1)


def _model_norms(log: UpdateLog, squares: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
    """L2 norms of the global model and of the clients' models [client], and by how much the latter are longer.

    The differences follow from the updates (`squares` of their norms); those of the norms themselves would have lost
    most of their digits.
    """
    round_ = log[-1]
    arrays = (np.asarray(round_.global_model[name], np.float64) for name in round_.parameters)
    square = float(sum(np.square(array).sum() for array in arrays))
    gained = 2 * log.remembered(global_products) + squares
    model, models = math.sqrt(square), np.sqrt(np.maximum(square + gained, 0.0))
    return model, models, ratio(gained, models + model)


def _apart(x: np.ndarray, made_of: np.ndarray | None = None) -> np.ndarray:
    """|x_i - x_j|, [client] -> [client, client]; 0 where it is rounding of x, or of `made_of`."""
    apart, size = np.abs(x[:, None] - x), np.abs(x if made_of is None else made_of)
    return np.where(apart > ROUNDING * np.maximum(size[:, None], size), apart, 0.0)


def _manhattan_norms(round_: Round) -> np.ndarray:
    norms = np.zeros(len(round_))
    for name in round_.parameters:
        for block in round_.blocks(name):
            norms += np.abs(block).sum(axis=1)
    return norms


def _manhattan_distances(round_: Round) -> np.ndarray:
    """L1 distances of the updates, float64 [client, client]: float32 differences, summed in float64 over strips."""
    apart = np.zeros((len(round_), len(round_)))
    for name in round_.parameters:
        for block in round_.blocks(name, STRIP):
            for client in range(len(block) - 1):
                differences = block[client + 1 :] - block[client]
                apart[client, client + 1 :] += np.abs(differences, out=differences).sum(axis=1)
    return apart + apart.T


# What several detectors need


def _layer_distances(round_: Round) -> np.ndarray:
    return np.sum([np.sqrt(squared_distances(round_.gram[name])) for name in round_.parameters], axis=0)


def global_products(log: UpdateLog) -> np.ndarray:
    """Inner product of each update of the last round with the global model, float64 [client]; to be remembered."""
    round_ = log[-1]
    return inner_products(round_, {name: round_.global_model[name] for name in round_.parameters})


def inner_products(round_: Round, direction: dict[str, np.ndarray]) -> np.ndarray:
    """Inner product of each update with a direction, which maps layers to arrays [*shape], float64 [client]."""
    products = np.zeros(len(round_))
    for name in round_.parameters:
        along, start = np.asarray(direction[name]).reshape(-1), 0
        for block in round_.blocks(name, sketch=True):
            stop = start + block.shape[1]
            products += block.astype(np.float64) @ along[start:stop].astype(np.float64)
            start = stop
    return products


def drawn(round_: Round, count: int, rng: np.random.Generator) -> np.ndarray:
    """Sorted positions of `count` random numbers of the model without replacement; all of them if it has fewer."""
    size = sum(np.size(round_.global_model[name]) for name in round_.parameters)
    return np.sort(rng.choice(size, min(count, size), replace=False, shuffle=False))


def numbers_at(
    blocks: Callable[[str], Iterable[np.ndarray]], layers: Sequence[str], positions: np.ndarray
) -> np.ndarray:
    """The updates' numbers at sorted positions of the whole model, float32 [client, position].

    blocks: a function of the layer that yields its updates in slices.
    """
    parts, start = [], 0
    for name in layers:
        for block in blocks(name):
            stop = start + block.shape[1]
            low, high = np.searchsorted(positions, [start, stop])
            parts.append(block[:, positions[low:high] - start])
            start = stop
    return np.concatenate(parts, axis=1)


def lowest(scores: np.ndarray, count: int) -> np.ndarray:
    """Bool [client]: the `count` lowest scores, and all that equal the highest of these."""
    last = np.sort(scores)[min(count, len(scores)) - 1]
    return scores <= last + TIE * max(abs(last), 1.0)


# Settings


def _krum_settings(num_malicious: int | None, neighbours: str, power: float, by_layer: bool) -> dict[str, Any]:
    return {
        "num_malicious": _tolerated(num_malicious),
        "neighbours": one_of("neighbours", neighbours, "paper", "n-f-1"),
        "power": positive("power", power),
        "by_layer": bool(by_layer),
    }


def _tolerated(num_malicious: int | None) -> int | None:
    return None if num_malicious is None else whole_number("num_malicious", num_malicious)


def _malicious(round_: Round, num_malicious: int | None) -> int:
    clients = len(round_)
    malicious = (clients - 3) // 2 if num_malicious is None else num_malicious
    if clients <= 2 * malicious + 2:
        needed = 2 * malicious + 3
        raise CannotSay(f"num_malicious {malicious} needs {needed} comparable clients, found {clients}")
    return malicious
