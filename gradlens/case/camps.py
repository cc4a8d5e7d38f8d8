"""Two camps: whether the clients fall into groups that stand out from each other, and which of them is malicious."""

from dataclasses import dataclass

import numpy as np

from gradlens.case.scoring import Scoring, deviations
from gradlens.case.sums import Sums
from gradlens.geometry import about_reference_mean, pairwise_cosines

SEVERAL = 0.25  # of the clients: a larger camp may be the honest one, and is judged as such


@dataclass(frozen=True, eq=False)
class Camps:
    """The best split of the clients into two.

    Attributes
    ----------
    smaller : numpy.ndarray
        bool [client], the smaller of the two.
    apart : float
        The smaller of two medians: the score of one camp judged by the other, and the reverse. -inf where the smaller
        camp is no more than a quarter of the clients, as then the larger one is taken for the honest.

    Examples
    --------
    >>> Camps(np.array([True, False, False]), 1.5).smaller.sum().item()
    1
    """

    smaller: np.ndarray
    apart: float


def camps_of(sums: Sums, scoring: Scoring) -> Camps:
    """Splits the clients by the direction in which the residuals of their rounds differ most.

    Neither camp is taken for the clean one: where half of the clients or more are malicious, everything that is judged
    by a majority is judged by theirs.

    Parameters
    ----------
    sums : Sums
    scoring : Scoring

    Returns
    -------
    Camps

    Examples
    --------
    >>> from gradlens.case.shipped import reference
    >>> from gradlens.case.sums import sums_of
    >>> from gradlens.examples import example_log
    >>> camps = camps_of(sums_of(example_log(num_malicious=4)), reference().scoring)
    >>> np.flatnonzero(camps.smaller).tolist()
    [6, 7, 8, 9]
    """
    everybody = np.ones(len(sums.clients), bool)
    alike = np.zeros((len(everybody), len(everybody)))
    for gram in sums.of_rounds.values():
        products = about_reference_mean(gram, everybody)
        np.fill_diagonal(products, np.maximum(np.diagonal(products), 0))  # rounding may leave a client below 0
        alike += pairwise_cosines(products)
    camp = split_in_two(np.linalg.eigh(alike).eigenvectors[:, -1])
    smaller = camp if 2 * camp.sum() <= len(camp) else ~camp
    if smaller.sum() <= SEVERAL * len(smaller) or smaller.sum() < 2:
        return Camps(smaller, -np.inf)
    judged = (np.median(scoring.scores(sums, ~of)[of]) for of in (smaller, ~smaller))
    return Camps(smaller, float(min(judged)))


def split_in_two(values: np.ndarray) -> np.ndarray:
    """The larger values, bool [client], of the split that leaves the least variance within both parts.

    Parameters
    ----------
    values : ndarray, float64 [client]

    Examples
    --------
    >>> split_in_two(np.array([1.0, 9.0, 2.0, 8.0])).tolist()
    [False, True, False, True]
    """
    order = np.argsort(values, kind="stable")
    counts = np.arange(1, len(values))
    sums = np.cumsum(values[order] - values.mean())[:-1]  # the variance between the parts is largest
    larger = np.zeros(len(values), bool)
    larger[order[1 + np.argmax(sums**2 / (counts * (len(values) - counts))) :]] = True
    return larger


def malicious_side(sums: Sums, scoring: Scoring, camp: np.ndarray) -> float:
    """Log odds, as they were in the study, that a camp is the malicious one of the two; of the others it is minus that.

    Parameters
    ----------
    sums : Sums
    scoring : Scoring
    camp : numpy.ndarray
        bool [client].

    Notes
    -----
    Each camp is judged by the other, and the means of their deviations are compared, reading by reading, by learned
    weights. Two camps look much alike in this mirror; but attackers push towards a label or away from the honest
    median, and the honest do not.

    Examples
    --------
    >>> from gradlens.case.shipped import reference
    >>> from gradlens.case.sums import sums_of
    >>> from gradlens.examples import example_log
    >>> sums, scoring = sums_of(example_log(num_malicious=4)), reference().scoring
    >>> attackers = np.arange(10) > 5
    >>> malicious_side(sums, scoring, attackers) == -malicious_side(sums, scoring, ~attackers)
    True
    """
    return float(mirrored(sums, scoring, camp) @ scoring.sides)


def mirrored(sums: Sums, scoring: Scoring, camp: np.ndarray) -> np.ndarray:
    """How a camp differs from the others as these do from it, float64 [reading + 1]; the last is `one_sidedness`.

    Parameters
    ----------
    sums : Sums
    scoring : Scoring
    camp : numpy.ndarray
        bool [client].
    """
    from_others, from_camp = (deviations(sums, clean, scoring.readings, scoring.scales) for clean in (~camp, camp))
    return np.append(from_others[camp].mean(axis=0) - from_camp[~camp].mean(axis=0), one_sidedness(sums, camp))


def one_sidedness(sums: Sums, camp: np.ndarray) -> float:
    """Sum of cubes of the direction in which a camp's label drift differs from the others': 1 pushes one label only.

    Parameters
    ----------
    sums : Sums
    camp : numpy.ndarray
        bool [client].

    Returns
    -------
    float
        Between -1 and 1; 0 where the model does not tell label drift.
    """
    drift = sums.label_drift
    if drift is None:
        return 0.0
    apart = drift[camp].mean(axis=0) - drift[~camp].mean(axis=0)
    apart -= apart.mean()
    norm = np.linalg.norm(apart)
    return float(((apart / norm) ** 3).sum()) if norm > 0 else 0.0
