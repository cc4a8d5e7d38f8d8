"""Readings of a recording: a number per client, kind and role of layer, judged against the clients thought clean."""

from contextlib import suppress

import numpy as np

from gradlens.case.robust import in_sigmas
from gradlens.case.sums import Sums, typical
from gradlens.geometry import about_reference_mean, mean_of_largest, pairwise_cosines, squared_distances

COMPANIONS = 3  # as many as the accomplices that an attacker is expected to have
TINY = 1e-300
SMALL = 60  # clients up to which all eigenvectors are computed, though one is used


def readings_of(sums: Sums, clean: np.ndarray) -> tuple[list[str], np.ndarray]:
    """What each client shows, given which clients are thought clean.

    Parameters
    ----------
    sums : Sums
    clean : numpy.ndarray
        bool [client], at least two of them True. Means, nearest companions and leading directions of the clean clients
        rest on them alone; the companions of the others may be anybody, as accomplices know each other.

    Returns
    -------
    names : list of str
        "kind, role".
    values : ndarray, float64 [client, reading]

    Notes
    -----
    Three things are read: the residuals of single rounds; their sums over rounds (totals); and what the clients' labels
    leave of the totals (unexplained, see `Drift`). Each is centered on the clean clients' mean. The readings are the
    log size; the mean cosine to the three most similar clients (company); the component along the direction in which
    the clean clients differ most (spectrum); the log mean distance to the nearer half of the clean clients (distance);
    of sums also the mean inner product with the three clients where it is largest (pull). Then how little the updates
    agree with the median of their round (opposition), and the largest relative norm in any round (burst).

    Examples
    --------
    >>> from gradlens.case.sums import sums_of
    >>> from gradlens.examples import example_log
    >>> names, values = readings_of(sums_of(example_log()), np.ones(10, bool))
    >>> int(values[:, names.index("size of totals, weights")].argmax())
    9
    """
    table: dict[str, np.ndarray] = {}
    kinds = {"rounds": sums.of_rounds, "totals": _totals(sums), "unexplained": _unexplained(sums, clean)}
    for of, products in kinds.items():
        for role, gram in products.items():
            table |= {f"{kind} of {of}, {role}": value for kind, value in _pairwise(gram, clean, of).items()}
    table |= {f"opposition, {role}": -cosine for role, cosine in sums.agreement.items()}
    table |= {f"burst, {role}": _bursts(norms, clean) for role, norms in sums.log_norms.items()}
    return list(table), np.stack(list(table.values()), axis=1)


def _totals(sums: Sums) -> dict[str, np.ndarray]:
    """Inner products of the sums over rounds, averaged over the layers of each role."""
    return {role: _averaged([sums.totals[layer] for layer in layers]) for role, layers in sums.roles.items()}


def _unexplained(sums: Sums, clean: np.ndarray) -> dict[str, np.ndarray]:
    """The same of what label drift leaves of them; none where it explains everything, as it does the final bias."""
    drift = sums.drift
    if drift is None or sums.rounds[clean].sum() < drift.totals.shape[1] + 2:
        return {}
    roots = np.sqrt(np.outer(sums.rounds, sums.rounds))
    return {
        role: _averaged([drift.unexplained(layer, sums.totals[layer] * roots, clean) / roots for layer in layers])
        for role, layers in sums.roles.items()
        if role != "final bias"
    }


def _averaged(products: list[np.ndarray]) -> np.ndarray:
    """Mean over layers of inner products, each in units of its median square."""
    return np.mean([layer / typical(np.diagonal(layer)) for layer in products], axis=0)


def _pairwise(gram: np.ndarray, clean: np.ndarray, of: str) -> dict[str, np.ndarray]:
    """The readings that follow from inner products [client, client]."""
    products = _about_clean_mean(gram, clean)
    products = products / typical(np.diagonal(products)[clean])
    squares = np.maximum(np.diagonal(products), TINY)
    np.fill_diagonal(products, squares)  # rounding may leave a client in the middle below 0
    variance, leading = _leading(products[np.ix_(clean, clean)])
    direction = leading / np.sqrt(max(variance, TINY))
    kinds = {
        "size": np.log(squares),
        "company": _of_companions(pairwise_cosines(products), clean),
        "spectrum": np.abs(products[:, clean] @ direction),
        "distance": np.log(np.maximum(_distances(products, clean), TINY)),
    }
    return kinds if of == "rounds" else kinds | {"pull": _of_companions(products, clean)}


def _leading(products: np.ndarray) -> tuple[float, np.ndarray]:
    """The largest eigenvalue of a symmetric matrix and its eigenvector; of a large one it alone is computed."""
    if len(products) > SMALL:
        from scipy.sparse.linalg import ArpackNoConvergence, eigsh  # takes 0.1 s to import

        with suppress(ArpackNoConvergence):
            values, vectors = eigsh(products, k=1, which="LA", v0=np.sqrt(np.diagonal(products)))
            return float(values[0]), vectors[:, 0]
    values, vectors = np.linalg.eigh(products)
    return float(values[-1]), vectors[:, -1]


def _about_clean_mean(gram: np.ndarray, clean: np.ndarray) -> np.ndarray:
    """Inner products about the clean clients' mean, corrected for whether a client is part of that mean."""
    count = clean.sum()
    share = np.where(clean, 1 - 1 / count, 1 + 1 / count)  # of the variance of a client's own vector
    return about_reference_mean(gram, clean) / np.sqrt(np.outer(share, share))


def _of_companions(values: np.ndarray, clean: np.ndarray) -> np.ndarray:
    """Mean of each client's largest values: of a clean client with other clean ones, of another with anybody."""
    among_clean = mean_of_largest(values, clean, COMPANIONS)
    return np.where(clean, among_clean, mean_of_largest(values, np.ones(len(clean), bool), COMPANIONS))


def _distances(products: np.ndarray, clean: np.ndarray) -> np.ndarray:
    """Mean distance of each client to the nearer half of the clean ones."""
    nearness = -np.sqrt(squared_distances(products))
    return -mean_of_largest(nearness, clean, max((int(clean.sum()) - int(clean.all()) - 1) // 2, 1))


def _bursts(log_norms: np.ndarray, clean: np.ndarray) -> np.ndarray:
    """The largest of each client's norms in any round, in robust sigmas of the clean clients, drawn in by arcsinh."""
    seen = np.isfinite(log_norms[:, clean]).sum(axis=1) > 1
    rows = log_norms[seen]
    if not len(rows):
        return np.zeros(log_norms.shape[1])
    scores = np.arcsinh(in_sigmas(rows.T, clean, least=1e-9))
    return np.where(np.isnan(scores), -np.inf, scores).max(axis=1, initial=-30.0)
