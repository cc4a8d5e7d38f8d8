"""Published detectors that cluster the cohort and reject one cluster: FLAME, DeepSight, FreqFed, RFLBAT."""

from collections.abc import Sequence

import numpy as np

from gradlens.clustering import density_clusters, gap_clusters
from gradlens.detectors.distances import global_products
from gradlens.detectors.published import Judgement, evidence_of, published, relative
from gradlens.detectors.verdict import Detector
from gradlens.errors import CannotSay, InputError
from gradlens.geometry import ROUNDING, TIE, centered_on_mean, cosine_distances, distances
from gradlens.log import Round, UpdateLog
from gradlens.log.kernels import two_leading
from gradlens.settings import one_of, positive, share, whole_number
from gradlens.statistics.final_layer import Predict, ddif, final_weight, neup, threshold_exceedings

__all__ = ["deepsight", "flame", "freqfed", "principal_plane", "rflbat"]


def flame(on: str = "updates") -> Detector:
    """Keeps the majority that lies densest by cosine distance and flags all others.

    Parameters
    ----------
    on : {"updates", "models"}, default "updates"
        What is compared: the updates, as in LFighter's port, or the clients' models (global model + update), as most
        ports read the paper. Close to convergence the cosines of models are all nearly 1; they are formed from the
        inner products of the updates without loss of digits.

    Returns
    -------
    Detector

    Raises
    ------
    InputError
        For a setting out of its range.

    Notes
    -----
    HDBSCAN clusters the clients with ``min_cluster_size`` n // 2 + 1, ``min_samples`` 1 and one cluster allowed [1]_;
    at 1 it makes no difference whether a client counts among its own neighbors. The score is the mean cosine distance
    to the (other) kept clients, as a multiple of the cohort's median of that (of its mean where the median is 0): about
    1 for an inconspicuous client, 0 where all are equal. This is the filter only; clipping to the median norm and noise
    are the aggregator's.

    **Abstains** when fewer than 3 clients are comparable, or more than 5,000 clients took part.

    **Fails when** nobody is malicious, since up to half of the cohort is flagged all the same; when attackers keep to
    the direction of the others, whatever their norm; and when label skew leaves the benign updates without a common
    one.

    References
    ----------
    .. [1] Nguyen et al. 2022, "FLAME: Taming Backdoors in Federated Learning", USENIX Security, arXiv:2101.02281.

    Examples
    --------
    >>> from gradlens import DETECTORS
    >>> from gradlens.examples import example_log
    >>> verdict = DETECTORS["flame"]()(example_log())
    >>> (~verdict.flags).sum().item() > 5  # a majority of the 10 clients is kept
    True
    """
    return published(_flame, on=one_of("on", on, "updates", "models"))


def deepsight(
    predict: Predict | Sequence[Predict] | None = None,
    tau: float = 1 / 3,
    min_cluster_size: int = 5,
    min_samples: int = 3,
) -> Detector:
    """Rejects every cluster of similar clients in which too many look trained on few labels.

    Parameters
    ----------
    predict : callable or sequence of callables, optional
        Model state -> probabilities [input, class] for fixed random inputs (see `ddif`), or one such function per seed;
        the paper takes 3 seeds of 20,000 inputs. Without it DDif is left out.
    tau : float, default 1/3
        The share of suspicious clients from which a cluster is rejected; the paper's.
    min_cluster_size : int, default 5
        Of HDBSCAN, its own default.
    min_samples : int, default 3
        Of HDBSCAN, as in FLPoison; one final cluster is allowed, as there. Other clients are counted, as by the package
        ``hdbscan`` of the paper and the ports; scikit-learn, which counts the client itself too, has 4 for this 3.

    Returns
    -------
    Detector

    Raises
    ------
    InputError
        For a setting out of its range.

    Notes
    -----
    A client is suspicious if its threshold exceedings are at most half of the cohort's median [1]_. HDBSCAN clusters
    the clients by NEUP, by the cosine distances of their final-bias updates, and by DDif (`gradlens.statistics`). The
    distance of two clients is the share of these clusterings that does not join them, and HDBSCAN on that makes the
    final clusters. A client in no cluster is judged alone, as in BackFed. Without a final bias the sums over each row
    of the final weight's update take its place. Clipping is an aggregator's. (BackFed's port has the acceptance
    inverted.) Score::

        share of suspicious clients in the client's cluster
        + median exceedings / its exceedings - 1
        + median classes / its classes - 1

    where its classes, 1 / sum of NEUP^2, are the number of classes that share its update's energy, which need not be
    whole. The last two terms are ours, since the shares alone tell few clients apart. 0 where all are equal.

    **Abstains** when fewer than 3 clients are comparable, when the model has no final weight with a row per class, when
    the final layer was not recorded whole, or when `predict` answers with NaN for a client's model.

    **Fails when** benign clients hold few labels, as under strong label skew; when the model has few classes, since
    counts are then coarse; and in cohorts so small that HDBSCAN finds no clusters.

    References
    ----------
    .. [1] Rieger et al. 2022, NDSS, arXiv:2201.00763.

    Examples
    --------
    >>> from gradlens import DETECTORS
    >>> from gradlens.examples import example_log
    >>> verdict = DETECTORS["deepsight"]()(example_log())
    >>> verdict.evidence.columns.tolist()
    ['threshold exceedings', 'suspicious share', 'classes']
    """
    predicts = () if predict is None else (predict,) if callable(predict) else tuple(predict)
    if not all(map(callable, predicts)):
        raise InputError(f"predict must be a function of a model's state, or several, found {predict!r:.80}")
    return published(
        _deepsight,
        predict=predicts,
        tau=share("tau", tau),
        min_cluster_size=whole_number("min_cluster_size", min_cluster_size, least=2),
        min_samples=whole_number("min_samples", min_samples, least=1),
    )


def freqfed(on: str = "updates") -> Detector:
    """Keeps the majority whose final layers lie densest in their low frequencies, and flags all others.

    Parameters
    ----------
    on : {"updates", "models"}, default "updates"
        What is compared: the updates, or the clients' models, global model + update (the paper speaks of "model updates
        (i.e., weights)").

    Returns
    -------
    Detector

    Raises
    ------
    InputError
        For a setting out of its range.

    Notes
    -----
    The final weight, flattened row by row and followed by the final bias, goes through an orthonormal type-II cosine
    transform [1]_. The low half of the coefficients is compared by cosine distance and clustered by HDBSCAN as in
    `flame`, with its settings as the ports have them. Only the final layer is transformed, as in the ports. The scores
    are those of `flame` for these distances.

    **Abstains** when fewer than 3 clients are comparable, when the model has no final weight with a row per class, or
    when the final layer was not recorded whole.

    **Fails when** nobody is malicious, since up to half of the cohort is flagged all the same; and when benign clients
    differ in their labels, which moves the final layer most.

    References
    ----------
    .. [1] Fereidooni et al. 2024, NDSS, arXiv:2312.04432.

    Examples
    --------
    >>> from gradlens import DETECTORS
    >>> from gradlens.examples import example_log
    >>> verdict = DETECTORS["freqfed"]()(example_log())
    >>> (~verdict.flags).sum().item() > 5  # a majority of the 10 clients is kept
    True
    """
    return published(_freqfed, on=one_of("on", on, "updates", "models"))


def rflbat(eps1: float = 10.0, eps2: float = 4.0, most_clusters: int = 10, samples: int = 5, seed: int = 0) -> Detector:
    """Keeps the most diverse cluster in the plane of the two principal components of the updates.

    Parameters
    ----------
    eps1 : float, default 10.0
        A client is dropped whose sum of distances to the others exceeds this multiple of the median sum.
    eps2 : float, default 4.0
        The same within the chosen cluster.
    most_clusters : int, default 10
        Clusters that the gap statistic tries at most.
    samples : int, default 5
        Uniform reference samples of the gap statistic.
    seed : int, default 0
        Of these samples.

    Returns
    -------
    Detector

    Raises
    ------
    InputError
        For a setting out of its range.

    Notes
    -----
    Clients far from the others in the plane are dropped (`eps1`). Those left are split by k-means, with the number of
    clusters from the gap statistic [2]_; k-means grows from the farthest client, without chance. Kept is the cluster
    with the smallest median of its members' mean cosine similarity (backdoored updates being more alike; a cluster of
    one counts as 1), without members that are far from the rest of it (`eps2`). All others are flagged. Steps and
    defaults are those on which the ports of [1]_ in 3DFed and BackFed agree. The score is the mean distance in the
    plane to the (other) kept clients, as a multiple of the cohort's median of that (of its mean where the median is 0);
    0 where all are equal.

    **Abstains** when fewer than 3 clients are comparable, or more than 5,000 clients took part.

    **Fails when** malicious updates are as diverse as benign ones, so that the benign cluster is rejected; and when
    nobody is malicious but the cohort splits by label skew.

    References
    ----------
    .. [1] Wang et al. 2022, arXiv:2201.03772.
    .. [2] Tibshirani, Walther & Hastie 2001 (the gap statistic).

    Examples
    --------
    >>> from gradlens import DETECTORS
    >>> from gradlens.examples import example_log
    >>> verdict = DETECTORS["rflbat"]()(example_log())
    >>> str(verdict.clients[verdict.scores.argmax()])
    'client-9'
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
    spectra = [np.asarray(dct(np.asarray(part, np.float64), type=2, norm="ortho", axis=1)) for part in rows]
    low, *before = (spectrum[:, : max(1, spectrum.shape[1] // 2)] for spectrum in spectra)
    if not before:
        return _outside_the_majority(round_, cosine_distances(low @ low.T))
    start = before[0][0]
    return _outside_the_majority(round_, cosine_distances(low @ low.T, low @ start, float(start @ start)))


def _outside_the_majority(round_: Round, apart: np.ndarray) -> Judgement:
    """Keeps HDBSCAN's majority by distances of all pairs [client, client] and flags all others."""
    clusters = _in_order(round_, apart, len(round_) // 2 + 1, neighbors=1, single=True)
    kept = clusters == 0
    away = _distance_to(apart, kept)
    return Judgement(relative(away), ~kept, evidence=evidence_of(round_, {"cosine distance": away}))


def _deepsight(
    log: UpdateLog, predict: tuple[Predict, ...], tau: float, min_cluster_size: int, min_samples: int
) -> Judgement:
    round_ = log[-1]
    energies = log.remembered(neup).to_numpy()
    exceedings = log.remembered(threshold_exceedings).to_numpy()[:, 0]
    pulls = _pulls(log)

    def apart(between: np.ndarray) -> np.ndarray:
        clusters = _in_order(round_, between, min_cluster_size, min_samples)
        return ((clusters[:, None] != clusters) | (clusters < 0)) & ~np.eye(len(clusters), dtype=bool)

    views: list[np.ndarray] = [apart(distances(energies, energies)), apart(cosine_distances(pulls @ pulls.T))]
    if predict:
        views.append(np.mean([apart(_ratio_distances(log, of_seed)) for of_seed in predict], axis=0))
    clusters = _in_order(round_, np.mean(views, axis=0), min_cluster_size, min_samples, single=True)
    suspicious = exceedings <= np.median(exceedings) / 2
    clusters = np.where(clusters < 0, len(clusters) + np.arange(len(clusters)), clusters)  # in no cluster: alone
    shares = np.array([suspicious[clusters == cluster].mean() for cluster in clusters])
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
    rows = log.model.by_unit(weight, round_.flat(weight))
    return rows.sum(axis=2, dtype=np.float64)


def _ratio_distances(log: UpdateLog, predict: Predict) -> np.ndarray:
    """Distances of the clients by DDif; raises CannotSay where a client's model answers with NaN."""
    ratios = ddif(log, predict=predict).to_numpy()
    if not np.isfinite(ratios).all():
        raise CannotSay("predict answers with NaN or infinity for the model of a client, DDif cannot be compared")
    return distances(ratios, ratios)


def _rflbat(log: UpdateLog, eps1: float, eps2: float, most_clusters: int, samples: int, seed: int) -> Judgement:
    round_ = log[-1]
    order = np.argsort(round_.clients)
    gram = round_.total_gram[np.ix_(order, order)]
    plane = principal_plane(gram)
    apart = distances(plane, plane)
    apart[apart <= TIE * apart.max()] = 0
    accepted = np.flatnonzero(_near(apart, eps1))
    clusters = gap_clusters(plane[accepted], most_clusters, samples, seed)
    cosines = 1 - cosine_distances(gram[np.ix_(accepted, accepted)])
    parts = [np.flatnonzero(clusters == c) for c in np.unique(clusters)]
    alike = [np.median(cosines[np.ix_(p, p)].mean(axis=1)) if len(p) > 1 else 1.0 for p in parts]
    chosen = accepted[min(zip(alike, parts, strict=True), key=lambda pair: (round(pair[0], 9), -len(pair[1])))[1]]
    chosen = chosen[_near(apart[np.ix_(chosen, chosen)], eps2)]
    kept, away = np.zeros(len(round_), dtype=bool), np.empty(len(round_))
    kept[order[chosen]] = True
    away[order] = _distance_to(apart, kept[order])
    return Judgement(relative(away), ~kept, evidence=evidence_of(round_, {"distance in the plane": away}))


def principal_plane(gram: np.ndarray) -> np.ndarray:
    """Coordinates of clients along the second and the first principal component.

    Parameters
    ----------
    gram : ndarray, float64 [client, client]
        Inner products of the clients' vectors.

    Returns
    -------
    ndarray, float64 [client, 2]

    Examples
    --------
    >>> x = np.array([[0.0], [0.0], [3.0]])
    >>> principal_plane(x @ x.T).round(6).tolist()
    [[0.0, -1.0], [0.0, -1.0], [0.0, 2.0]]
    """
    values, vectors = two_leading(centered_on_mean(gram))
    values = np.where(values > ROUNDING * np.trace(gram), values, 0)
    vectors = vectors * np.where((vectors**3).sum(axis=0) < 0, -1, 1)  # the sign is free: the longer tail is positive
    return vectors * np.sqrt(values)


def _near(apart: np.ndarray, multiple: float) -> np.ndarray:
    """Bool [client]: the sum of distances to the others is at most a multiple of the median sum."""
    sums = apart.sum(axis=1)
    return sums <= multiple * np.median(sums)


def _in_order(round_: Round, apart: np.ndarray, smallest: int, neighbors: int, single: bool = False) -> np.ndarray:
    """HDBSCAN's clusters of the clients, sorted by name so that their order in the round changes nothing."""
    order = np.argsort(round_.clients)
    clusters = np.empty(len(order), dtype=np.int64)
    clusters[order] = density_clusters(apart[np.ix_(order, order)], smallest, neighbors, single)
    return clusters


def _distance_to(apart: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """Mean distance of each client to the kept ones other than itself, [client]."""
    others = kept & ~np.eye(len(kept), dtype=bool)
    return (apart * others).sum(axis=1) / np.maximum(others.sum(axis=1), 1)
