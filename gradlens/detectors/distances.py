"""Published detectors that ask how far the updates lie from each other: Krum, Multi-Krum, Multi-metrics, DnC."""

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import numpy as np
import pandas as pd

from gradlens.detectors.published import Judgement, published
from gradlens.detectors.verdict import Detector
from gradlens.errors import CannotSay
from gradlens.log import Round, UpdateLog
from gradlens.log.round import PAIRWISE
from gradlens.settings import one_of, positive, share, whole_number

__all__ = ["dnc", "krum", "multi_krum", "multi_metrics"]

ROUNDING = 1e-12  # of what a difference is made of; float64 sums in another order differ by less
SAME = 1e-9  # of two scores: as equal as the same numbers summed in another order
STRIP = 8_192  # numbers of a layer whose pairwise differences stay in the processor's cache


def krum(
    num_malicious: int | None = None, neighbours: str = "paper", power: float = 2, by_layer: bool = False
) -> Detector:
    """Keeps the one update that lies nearest to its neighbours and flags all the others.

    Score: the sum of distance ** power to the nearest clients, as a multiple of the cohort's median score (of its mean
    where the median is 0); about 1 for an inconspicuous client, 0 where all are equal.
    num_malicious: f, None: the most that the rule tolerates, n > 2f + 2. neighbours: how many, "paper": n - f - 2,
    or "n-f-1" (ByzFL, FLPoison). power: 2 as in the paper; 1 in FLPoison, 4 in fedlib, which squares twice.
    by_layer: distances are sums over layers of L2 distances (FederatedScope, with power 1), not L2 over the whole.
    Updates nearer than a millionth of their norm count as equal. Equal scores are kept or flagged together; the paper
    takes the smallest identifier. Raises: InputError for a setting out of its range. Abstains where n <= 2f + 2.
    Source: Blanchard, El Mhamdi, Guerraoui & Stainer 2017, "Machine Learning with Adversaries", arXiv:1703.02757.
    """
    return published(_krum, **_krum_settings(num_malicious, neighbours, power, by_layer))


def multi_krum(
    num_malicious: int | None = None,
    num_selected: int | None = None,
    neighbours: str = "paper",
    power: float = 2,
    by_layer: bool = False,
) -> Detector:
    """Keeps the `num_selected` best by one Krum ranking and flags the others; scores and settings are those of `krum`.

    num_selected: m; None: n - f, as in Blades, Flower and most reproductions; the paper leaves m open, 1 is Krum.
    Raises: InputError for a setting out of its range. Abstains where n <= 2f + 2.
    Source: Blanchard et al. 2017, arXiv:1703.02757, section 4: one ranking, unlike Bulyan's repeated ones.
    """
    if num_selected is not None:
        num_selected = whole_number("num_selected", num_selected, least=1)
    settings = _krum_settings(num_malicious, neighbours, power, by_layer)
    return published(_multi_krum, num_selected=num_selected, **settings)


def multi_metrics(keep: float = 0.3, features: str = "paper", centred: bool = False) -> Detector:
    """Keeps the share of clients that strays least in Manhattan, Euclidean and cosine terms together.

    Each client has three features x, each the sum over all others of how far the two differ; S is their covariance
    over the clients. Score: sqrt(x' S^-1 x), which has no unit; 0 where all are equal.
    keep: the share kept, at least one client; 0.3 in the paper. features: what differs,
    "paper": the L1 and the L2 norm of the update and the cosine of the client's model to the global one;
    "code": what the authors' program sums, L1 distances of the updates, differences of the L2 norms of the clients'
    models, and (1 - cosine of the two models) ** 2; its work grows with the square of the number of clients.
    centred: x minus its mean, the Mahalanobis distance; not so in paper and program, where a cohort that is tight in
    these features drowns its outlier: most of x' S^-1 x is then the mean's.
    Where S is singular (three clients, a feature without spread, a global model of zeros) its pseudo-inverse is taken,
    of the features in units of their deviations. Equal scores are kept or flagged together.
    Raises: InputError for a setting out of its range.
    Source: Huang et al. 2023, ICCV, arXiv:2303.06601; github.com/siquanhuang/Multi-metrics, defense.py.
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
    """Flags whoever reaches far along the direction in which the updates vary most, on any of several random samples.

    Each iteration draws coordinates without replacement, centres them by the mean of the comparable clients and takes
    the squared projection on the top right singular vector; the `filtering` x f largest fall out. Kept is who stays in
    every iteration. Score: the mean over iterations of the squared projection as a multiple of the cohort's median one
    (of the mean where that is 0); 0 where all are equal. Where several directions vary equally, all of them count.
    num_malicious: f, None: the largest minority, n > 2f. iterations: 5 as in fedlib, the paper's table has 1.
    dimensions: 10,000, the paper's b and fedlib's; the whole model where it is smaller. filtering: the paper's c = 1; a
    fraction of a client is rounded down (fedlib). seed: of the coordinates, drawn afresh in every round. Of a layer
    that is recorded as a sketch the coordinates are those of the sketch.
    Equal scores are kept or flagged together. Raises: InputError for a setting out of its range.
    Abstains where n <= 2f or filtering x f >= n.
    Source: Shejwalkar & Houmansadr 2021, "Manipulating the Byzantine", NDSS, algorithm 2.
    """
    return published(
        _dnc,
        num_malicious=_tolerated(num_malicious),
        iterations=whole_number("iterations", iterations, least=1),
        dimensions=whole_number("dimensions", dimensions, least=1),
        filtering=positive("filtering", filtering),
        seed=whole_number("seed", seed),
    )


# Rules


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
    z = np.divide(x, deviation, out=np.zeros_like(x), where=deviation > SAME * x.mean(axis=0))
    inverse = np.linalg.pinv(np.cov(z.T), rcond=1e-10, hermitian=True)
    z = z - z.mean(axis=0) if centred else z
    scores = np.sqrt(np.maximum(np.einsum("ki,ij,kj->k", z, inverse, z), 0.0))
    kept = lowest(scores, max(1, math.floor(keep * len(x) + SAME)))
    evidence = pd.DataFrame(x, index=log[-1].clients, columns=["manhattan", "euclidean", "cosine"])
    return Judgement(scores, ~kept, evidence=evidence)


def _dnc(
    log: UpdateLog, num_malicious: int | None, iterations: int, dimensions: int, filtering: float, seed: int
) -> Judgement:
    round_, clients = log[-1], len(log[-1])
    malicious = (clients - 1) // 2 if num_malicious is None else num_malicious
    removed = math.floor(filtering * malicious + SAME)
    if clients > PAIRWISE:
        raise CannotSay(f"{clients} clients: nothing pairwise is formed above {PAIRWISE:,}")
    if clients <= 2 * malicious or removed >= clients:
        needed = max(2 * malicious, removed) + 1
        raise CannotSay(f"num_malicious {malicious} needs {needed} comparable clients, found {clients}")
    rng = np.random.default_rng([seed, round_.index])
    samples = np.stack([drawn(round_, dimensions, rng) for _ in range(iterations)])
    order = np.argsort(samples, axis=None, kind="stable")
    numbers, whose = (
        numbers_at(partial(round_.blocks, sketch=True), round_.parameters, samples.reshape(-1)[order]),
        order // samples.shape[1],
    )
    scores, kept = np.zeros(clients), np.ones(clients, dtype=bool)
    for iteration in range(iterations):
        projections = relative(_squared_projections(numbers[:, whose == iteration].astype(np.float64)))
        kept &= lowest(projections, clients - removed)
        scores += projections / iterations
    return Judgement(scores, ~kept)


def _squared_projections(numbers: np.ndarray) -> np.ndarray:
    """Of each row of float64 [client, number] on the direction in which the centred rows vary most, [client]."""
    size = np.abs(numbers).max(initial=0.0)
    if size == 0:
        return np.zeros(len(numbers))
    centred = numbers / size
    total = np.square(centred).sum()
    centred -= centred.mean(axis=0)
    values, vectors = np.linalg.eigh(centred @ centred.T)  # the squares of s, and u, of the decomposition u s v
    if values[-1] <= ROUNDING**2 * total:
        return np.zeros(len(numbers))
    top = values >= (1 - SAME) * values[-1]  # among equal ones none is the first
    return values[-1] * np.square(vectors[:, top]).sum(axis=1)


# Features of Multi-metrics, [client, 3]


def _paper_features(log: UpdateLog) -> np.ndarray:
    round_ = log[-1]
    squares = np.diagonal(round_.total_gram)
    model, models, longer = _model_norms(log, squares)
    both = 2 * models * model
    angles = _ratio(squares - longer**2, both)  # 1 - cosine: the cosine itself is 1 to many digits
    parts = [_apart(_manhattan_norms(round_)), _apart(np.sqrt(squares)), _apart(angles, _ratio(squares, both))]
    return np.stack([part.sum(axis=1) for part in parts], axis=1)


def _code_features(log: UpdateLog) -> np.ndarray:
    round_ = log[-1]
    gram = round_.total_gram
    squares = np.diagonal(gram)
    _, models, longer = _model_norms(log, squares)
    taller = _apart(longer, np.sqrt(squares))
    both = 2 * models[:, None] * models
    angles = _ratio(squared_distances(gram) - taller**2, both)  # 1 - cosine
    angles[angles <= ROUNDING * _ratio(squares[:, None] + squares, both)] = 0
    return np.stack([_manhattan_distances(round_).sum(axis=1), taller.sum(axis=1), (angles**2).sum(axis=1)], axis=1)


def _model_norms(log: UpdateLog, squares: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
    """L2 norms of the global model and of the clients' [client], and how much longer these are; `squares` of updates.

    The differences are formed from the updates: those of the norms themselves have lost most of their digits.
    """
    round_ = log[-1]
    arrays = (np.asarray(round_.global_model[name], np.float64) for name in round_.parameters)
    square = float(sum(np.square(array).sum() for array in arrays))
    gained = 2 * log.remembered(global_products) + squares
    model, models = math.sqrt(square), np.sqrt(np.maximum(square + gained, 0.0))
    return model, models, _ratio(gained, models + model)


def _apart(x: np.ndarray, made_of: np.ndarray | None = None) -> np.ndarray:
    """|x_i - x_j|, [client] -> [client, client]; what is rounding of x, or of `made_of`, is none."""
    apart, size = np.abs(x[:, None] - x), np.abs(x if made_of is None else made_of)
    return np.where(apart > ROUNDING * np.maximum(size[:, None], size), apart, 0.0)


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """Above / below, 0 where there is nothing below."""
    return np.divide(above, below, out=np.zeros_like(above), where=below > 0)


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


def squared_distances(gram: np.ndarray) -> np.ndarray:
    """Squared L2 distances from inner products, float64 [client, client]; 0 below a millionth of the norms."""
    squares = np.diagonal(gram)
    both = squares[:, None] + squares
    apart = both - 2 * gram
    return np.where(apart > ROUNDING * both, apart, 0.0)


def _layer_distances(round_: Round) -> np.ndarray:
    return np.sum([np.sqrt(squared_distances(round_.gram[name])) for name in round_.parameters], axis=0)


def global_products(log: UpdateLog) -> np.ndarray:
    """Inner product of each update of the last round with the global model, float64 [client]; to be remembered."""
    round_ = log[-1]
    return inner_products(round_, {name: round_.global_model[name] for name in round_.parameters})


def inner_products(round_: Round, direction: dict[str, np.ndarray]) -> np.ndarray:
    """Inner product of each update with a direction, layer -> [*shape], float64 [client]."""
    products = np.zeros(len(round_))
    for name in round_.parameters:
        along, start = np.asarray(direction[name]).reshape(-1), 0
        for block in round_.blocks(name, sketch=True):
            stop = start + block.shape[1]
            products += block.astype(np.float64) @ along[start:stop].astype(np.float64)
            start = stop
    return products


def drawn(round_: Round, count: int, rng: np.random.Generator) -> np.ndarray:
    """Positions of `count` random numbers of the model, or of all if it has fewer, in order, without replacement."""
    size = sum(np.size(round_.global_model[name]) for name in round_.parameters)
    return np.sort(rng.choice(size, min(count, size), replace=False, shuffle=False))


def numbers_at(
    blocks: Callable[[str], Iterable[np.ndarray]], layers: Sequence[str], positions: np.ndarray
) -> np.ndarray:
    """The updates' numbers at these positions, which are in order, float32 [client, position]; blocks: of a layer."""
    parts, start = [], 0
    for name in layers:
        for block in blocks(name):
            stop = start + block.shape[1]
            low, high = np.searchsorted(positions, [start, stop])
            parts.append(block[:, positions[low:high] - start])
            start = stop
    return np.concatenate(parts, axis=1)


def relative(scores: np.ndarray) -> np.ndarray:
    """Scores as multiples of their median, of their mean where that is 0; 0 where all are 0, [client] -> [client]."""
    scale = np.median(scores) or scores.mean()
    return scores / scale if scale > 0 else np.zeros_like(scores)


def lowest(scores: np.ndarray, count: int) -> np.ndarray:
    """Bool [client]: the `count` lowest scores, and all that equal the highest of these."""
    last = np.sort(scores)[min(count, len(scores)) - 1]
    return scores <= last + SAME * max(abs(last), 1.0)


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
