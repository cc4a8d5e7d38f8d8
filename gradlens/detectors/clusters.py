"""Published detectors that cluster the cohort and doubt one cluster: FLAME, DeepSight, FreqFed, RFLBAT."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from gradlens.clustering import density_clusters, lloyd
from gradlens.detectors.distances import global_products, relative, squared_distances
from gradlens.detectors.published import Judgement, published
from gradlens.detectors.verdict import Detector
from gradlens.errors import CannotSay, InputError
from gradlens.log import Round, UpdateLog
from gradlens.log.kernels import two_leading
from gradlens.settings import one_of, positive, share, whole_number
from gradlens.statistics.final_layer import Predict, ddif, final_weight, neup, threshold_exceedings

__all__ = ["cosine_distances", "deepsight", "flame", "freqfed", "principal_plane", "rflbat"]

ROUNDING = 1e-12  # of the largest number of its kind; float64 sums in another order differ by less
APART = 1e-9  # of the largest distance in the plane; nearer is equal


def flame(on: str = "updates") -> Detector:
    """Keeps the majority that lies densest by cosine distance and flags all the others.

    HDBSCAN with min_cluster_size n // 2 + 1, min_samples 1 and one cluster allowed: with nobody malicious it flags up
    to half of the cohort, too. The filter only: clipping to the median norm and noise are an aggregator's.
    Score: mean cosine distance to the (other) kept clients, as a multiple of the cohort's median of that (of its mean
    where the median is 0); about 1 for an inconspicuous client, 0 where all are equal.
    on: "updates", as LFighter's port has it, or "models", global model + update, as most ports read the paper. Close
    to convergence the cosines of models are all but 1; they are formed from the inner products of the updates without
    loss of digits. Raises: InputError for another `on`.
    Source: Nguyen et al. 2022, "FLAME: Taming Backdoors in Federated Learning", USENIX Security, arXiv:2101.02281.
    """
    return published(_flame, on=one_of("on", on, "updates", "models"))


def deepsight(
    predict: Predict | Sequence[Predict] | None = None,
    tau: float = 1 / 3,
    min_cluster_size: int = 5,
    min_samples: int = 3,
) -> Detector:
    """Rejects every cluster of similar clients of which a share `tau` or more looks trained on few labels.

    A client is suspicious where its threshold exceedings are at most half of the cohort's median. HDBSCAN clusters the
    clients by NEUP, by the cosine distances of their final-bias updates and by DDif (`gradlens.statistics`); two
    clients are apart by the share of these clusterings that does not join them, and HDBSCAN on that makes the final
    clusters. Whoever is in no cluster is judged alone, as in BackFed. Clipping is an aggregator's.
    Score: the share of suspicious clients in the client's cluster, + the median number of exceedings / its own - 1, +
    the same of the number of classes that share its update's energy, 1 / sum of NEUP^2, which is no whole number
    (the last two ours: the shares alone tell few clients apart). 0 where all are equal.
    predict: model state -> probabilities [input, class] of fixed random inputs (see `ddif`), or one per seed; without
    it DDif is left out; the paper takes 3 seeds of 20,000 inputs. tau: 1/3, the paper's. min_cluster_size,
    min_samples: of HDBSCAN, its default 5, and 3 as in FLPoison; one final cluster is allowed, as there. Without a
    final bias the cosines are those of the sums over each row of the final weight's update.
    Raises: InputError for a setting out of its range. Abstains if the model has no final weight.
    Source: Rieger et al. 2022, NDSS, arXiv:2201.00763 (BackFed's port has the acceptance inverted).
    """
    predicts = () if predict is None else (predict,) if callable(predict) else tuple(predict)
    if not all(callable(each) for each in predicts):
        raise InputError(f"predict must be a function of a model's state, or several, found {predict!r:.80}")
    return published(
        _deepsight,
        predict=predicts,
        tau=share("tau", tau),
        min_cluster_size=whole_number("min_cluster_size", min_cluster_size, least=2),
        min_samples=whole_number("min_samples", min_samples, least=1),
    )


def freqfed(on: str = "updates") -> Detector:
    """Keeps the majority whose low frequencies of the FINAL LAYER lie densest, and flags all the others.

    Final weight, flattened row by row, and final bias after it go through an orthonormal type-II cosine transform; the
    low half of the coefficients is compared by cosine distance and clustered by HDBSCAN as in `flame`. Only the final
    layer is transformed, as in the ports; scores are those of `flame`, of these distances.
    on: "updates", or "models", global model + update (the paper speaks of "model updates (i.e., weights)").
    Raises: InputError for another `on`. Abstains if the model has no final weight.
    Source: Fereidooni et al. 2024, NDSS, arXiv:2312.04432; settings of HDBSCAN as its ports have them.
    """
    return published(_freqfed, on=one_of("on", on, "updates", "models"))


def rflbat(eps1: float = 10.0, eps2: float = 4.0, most_clusters: int = 10, samples: int = 5, seed: int = 0) -> Detector:
    """Keeps the most diverse cluster in the plane of the two principal components of the updates.

    The sum of a client's distances to the others in that plane must be at most eps1 times the median sum. Those left
    are split by k-means, the number of clusters by the gap statistic; kept is the cluster with the smallest median
    of its members' mean cosine similarity (backdoored updates being more alike; a cluster of one counts as 1), and of
    that whose sum of distances inside it is at most eps2 times the cluster's median. All others are flagged.
    Score: mean distance in the plane to the (other) kept clients, as a multiple of the cohort's median of that (mean
    where the median is 0); 0 where all are equal.
    eps1, eps2: 10 and 4. most_clusters, samples: 10 clusters tried, 5 uniform reference tables drawn from `seed`. The
    gap statistic is Tibshirani, Walther & Hastie's of 2001; k-means grows by the farthest client each, without chance.
    Raises: InputError for a setting out of its range.
    Source: Wang et al. 2022, arXiv:2201.03772; steps and defaults as its ports in 3DFed and BackFed agree on them.
    """
    return published(
        _rflbat,
        eps1=positive("eps1", eps1),
        eps2=positive("eps2", eps2),
        most_clusters=whole_number("most_clusters", most_clusters, least=1),
        samples=whole_number("samples", samples, least=1),
        seed=whole_number("seed", seed),
    )


def _flame(log: UpdateLog, on: str) -> Judgement:
    round_ = log[-1]
    gram = round_.total_gram
    if on == "updates":
        return _outside_the_majority(round_, cosine_distances(gram))
    parts = (np.asarray(round_.global_model[name], np.float64).reshape(-1) for name in round_.parameters)
    square = sum(float(part @ part) for part in parts)
    return _outside_the_majority(round_, cosine_distances(gram, log.remembered(global_products), square))


def _freqfed(log: UpdateLog, on: str) -> Judgement:
    from scipy.fft import dct

    round_, weight = log[-1], final_weight(log)
    layers = [weight] if log.model.final_bias is None else [weight, log.model.final_bias]
    rows = [np.concatenate([round_.flat(name) for name in layers], axis=1)]
    if on == "models":
        rows.append(np.concatenate([np.asarray(round_.global_model[name]).reshape(1, -1) for name in layers], axis=1))
    spectra = [np.asarray(dct(np.asarray(each, np.float64), type=2, norm="ortho", axis=1)) for each in rows]
    low, *before = (spectrum[:, : max(1, spectrum.shape[1] // 2)] for spectrum in spectra)
    if not before:
        return _outside_the_majority(round_, cosine_distances(low @ low.T))
    start = before[0][0]
    return _outside_the_majority(round_, cosine_distances(low @ low.T, low @ start, float(start @ start)))


def _outside_the_majority(round_: Round, distances: np.ndarray) -> Judgement:
    clusters = _in_order(round_, distances, len(round_) // 2 + 1, neighbours=1, single=True)
    kept = clusters == 0
    apart = _distance_to(distances, kept)
    return Judgement(relative(apart), ~kept, evidence=evidence_of(round_, {"cosine distance": apart}))


def _deepsight(
    log: UpdateLog, predict: tuple[Predict, ...], tau: float, min_cluster_size: int, min_samples: int
) -> Judgement:
    round_ = log[-1]
    energies = log.remembered(neup).to_numpy()
    exceedings = log.remembered(threshold_exceedings).to_numpy()[:, 0]
    pulls = _pulls(log)

    def apart(distances: np.ndarray) -> np.ndarray:
        clusters = _in_order(round_, distances, min_cluster_size, min_samples)
        return ((clusters[:, None] != clusters) | (clusters < 0)) & ~np.eye(len(clusters), dtype=bool)

    views: list[np.ndarray] = [apart(_euclidean(energies)), apart(cosine_distances(pulls @ pulls.T))]
    if predict:
        views.append(np.mean([apart(_euclidean(_ratios(log, each))) for each in predict], axis=0))
    clusters = _in_order(round_, np.mean(views, axis=0), min_cluster_size, min_samples, single=True)
    suspicious = exceedings <= np.median(exceedings) / 2
    clusters = np.where(clusters < 0, len(clusters) + np.arange(len(clusters)), clusters)  # each alone
    shares = np.array([suspicious[clusters == own].mean() for own in clusters])
    classes = 1 / np.square(energies).sum(axis=1)
    fewer = np.median(exceedings) / np.maximum(exceedings, 1) - 1 + np.median(classes) / classes - 1
    evidence = {"threshold exceedings": exceedings, "suspicious share": shares, "classes": classes}
    return Judgement(shares + fewer, shares >= tau - ROUNDING, evidence=evidence_of(round_, evidence))


def _pulls(log: UpdateLog) -> np.ndarray:
    """The final-bias updates, or the sums over each row of the final weight's, float64 [client, class]."""
    round_, bias = log[-1], log.model.final_bias
    if bias is not None:
        return round_.flat(bias).astype(np.float64)
    weight = final_weight(log)
    rows = round_.flat(weight).reshape(len(round_), log.model[weight].shape[0], -1)
    return rows.sum(axis=2, dtype=np.float64)


def _ratios(log: UpdateLog, predict: Predict) -> np.ndarray:
    """Division differences [client, class]; raises CannotSay where a client's model answers with NaN."""
    ratios = ddif(log, predict=predict).to_numpy()
    if not np.isfinite(ratios).all():
        raise CannotSay("predict answers with NaN or infinity for the model of a client, DDif cannot be compared")
    return ratios


def _rflbat(log: UpdateLog, eps1: float, eps2: float, most_clusters: int, samples: int, seed: int) -> Judgement:
    round_ = log[-1]
    order = np.argsort(round_.clients)
    gram = round_.total_gram[np.ix_(order, order)]
    plane = principal_plane(gram)
    distances = _euclidean(plane)
    distances[distances <= APART * distances.max()] = 0
    accepted = np.flatnonzero(_near(distances, eps1))
    clusters = _clusters_by_gap(plane[accepted], most_clusters, samples, seed)
    cosines = 1 - cosine_distances(gram[np.ix_(accepted, accepted)])
    parts = [np.flatnonzero(clusters == c) for c in np.unique(clusters)]
    alike = [np.median(cosines[np.ix_(p, p)].mean(axis=1)) if len(p) > 1 else 1.0 for p in parts]
    chosen = accepted[min(zip(alike, parts, strict=True), key=lambda pair: (round(pair[0], 9), -len(pair[1])))[1]]
    chosen = chosen[_near(distances[np.ix_(chosen, chosen)], eps2)]
    kept, apart = np.zeros(len(round_), dtype=bool), np.empty(len(round_))
    kept[order[chosen]] = True
    apart[order] = _distance_to(distances, kept[order])
    return Judgement(relative(apart), ~kept, evidence=evidence_of(round_, {"distance in the plane": apart}))


def principal_plane(gram: np.ndarray) -> np.ndarray:
    """Coordinates along the two principal components, from inner products: [client, client] -> [client, 2]."""
    centred = gram - gram.mean(axis=0) - gram.mean(axis=1, keepdims=True) + gram.mean()
    values, vectors = two_leading((centred + centred.T) / 2)
    values = np.where(values > ROUNDING * np.trace(gram), values, 0)
    vectors = vectors * np.where((vectors**3).sum(axis=0) < 0, -1, 1)  # of either sign: the one with the longer tail
    return vectors * np.sqrt(values)


def _near(distances: np.ndarray, multiple: float) -> np.ndarray:
    """Whose sum of distances to the others is at most a multiple of the median sum, bool [client]."""
    sums = distances.sum(axis=1)
    return sums <= multiple * np.median(sums)


def _clusters_by_gap(points: np.ndarray, most: int, samples: int, seed: int) -> np.ndarray:
    """k-means clusters of points in the plane, int [point], k the smallest with Gap(k) >= Gap(k + 1) - s(k + 1).

    Points and uniform reference tables fill the unit square; both grow from k to k + 1 clusters by starting one at the
    point farthest from its centre.
    """
    width = np.ptp(points, axis=0)
    unit = (points - points.min(axis=0)) / np.where(width > 0, width, 1)
    reference = np.random.default_rng(seed).random((samples, *points.shape)) * (width > 0)
    tables = np.concatenate([unit[None], reference])
    centres = tables.mean(axis=1, keepdims=True)
    before, clusters = -np.inf, np.zeros(len(points), dtype=np.int64)
    for _ in range(min(most, len(points) - 1)):
        labels, centres = lloyd(tables, centres)
        squares = np.square(tables - np.take_along_axis(centres, labels[:, :, None], axis=1)).sum(axis=2)
        within = squares.sum(axis=1)
        if within[0] <= ROUNDING:
            return labels[0]
        logs = np.log(within)
        gap, spread = logs[1:].mean() - logs[0], logs[1:].std() * np.sqrt(1 + 1 / samples)
        if before >= gap - spread:
            return clusters
        before, clusters = gap, labels[0]
        farthest = np.take_along_axis(tables, squares.argmax(axis=1)[:, None, None], axis=1)
        centres = np.concatenate([centres, farthest], axis=1)
    return clusters


def cosine_distances(gram: np.ndarray, along: np.ndarray | None = None, square: float = 0.0) -> np.ndarray:
    """1 - cosine of all pairs of vectors g + u_i from the inner products of the u_i, float64 [client, client].

    along: <g, u_i> [client], and square: <g, g>, where there is a common part g. 1 - cos = sin^2 / (1 + cos), and sin^2
    by Lagrange's identity from the difference of the two vectors, so that a large g costs no digits. Equal vectors are
    0 apart, a vector of zeros is 1 apart from all others.
    """
    own = np.diagonal(gram)
    along = np.zeros(len(gram)) if along is None else along
    inner = gram + along[:, None] + along + square
    squares = own + 2 * along + square
    apart = squared_distances(gram)
    towards = own[:, None] - gram + along[:, None] - along
    lengths = np.sqrt(np.maximum(squares[:, None], 0)) * np.sqrt(np.maximum(squares, 0))
    sines = np.maximum(squares[:, None] * apart - towards**2, 0)
    distances = np.ones_like(gram)
    near, far = (inner > 0) & (lengths > 0), (inner <= 0) & (lengths > 0)
    distances[near] = sines[near] / lengths[near] / (lengths[near] + inner[near])
    distances[far] = 1 - inner[far] / lengths[far]
    distances[apart == 0] = 0
    return (distances + distances.T) / 2


def _euclidean(points: np.ndarray) -> np.ndarray:
    return np.sqrt(np.square(points[:, None] - points).sum(axis=2))


def _in_order(round_: Round, distances: np.ndarray, smallest: int, neighbours: int, single: bool = False) -> np.ndarray:
    """HDBSCAN's clusters of the clients, put in the order of their names: theirs in the round changes nothing."""
    order = np.argsort(round_.clients)
    clusters = np.empty(len(order), dtype=np.int64)
    clusters[order] = density_clusters(distances[np.ix_(order, order)], smallest, neighbours, single)
    return clusters


def _distance_to(distances: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """Mean distance of each client to the kept ones other than itself, [client]."""
    others = kept & ~np.eye(len(kept), dtype=bool)
    return (distances * others).sum(axis=1) / np.maximum(others.sum(axis=1), 1)


def evidence_of(round_: Round, columns: dict[str, Any]) -> pd.DataFrame:
    """Columns [client] as the evidence of a judgement on the clients of a round."""
    return pd.DataFrame(columns, index=pd.Index(round_.clients.tolist(), name="client"))
