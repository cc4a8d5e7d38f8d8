"""What benign clients show the panel: rows of attack-free logs, and how far out a client lies among them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from scipy.special import ndtri_exp

from gradlens.errors import InputError
from gradlens.log.kernels import one_blas_thread

ROWS = 5  # null rows for every feature, where there are as many
FOLDS = 5
TAIL = 0.05  # of the null's rows, beyond which their shares are taken to fall exponentially


@dataclass(frozen=True, eq=False)
class Observed:
    """What the panel saw in one log: a row per comparable client and round.

    Parameters
    ----------
    positions : ndarray, int64 [row]
        The number of rounds before this one.
    clients : ndarray, str [row]
    features : tuple of str
        Names of the features.
    values : ndarray, float64 [row, feature]
        All layer groups of the first part first.
    heard : tuple of bool
        Which layer groups a part's reading is the mean of.
    left_out : int, default 0
        Number of updates of these rounds that were refused or not comparable.

    Examples
    --------
    >>> from gradlens.detectors.panels import panel
    >>> from gradlens.examples import example_log
    >>> panel().observed(example_log(rounds=2)).values.shape
    (20, 44)
    """

    positions: np.ndarray
    clients: np.ndarray
    features: tuple[str, ...]
    values: np.ndarray
    heard: tuple[bool, ...]
    left_out: int = 0


@dataclass(frozen=True, eq=False)
class Reference:
    """What benign clients show: rows of attack-free logs.

    Parameters
    ----------
    features : tuple of str
    positions : ndarray, int64 [row]
        The number of rounds before the row's.
    fold : ndarray, int64 [row]
        Which rows belong together, when some are scored by the others: those of whole logs, or of one log those of
        whole clients.
    units : ndarray, int64 [row]
        Which client of which log the row is of.
    values : ndarray, float64 [row, feature]
    directions : ndarray, float64 [feature, part]
        What each part's reading is made of.

    Examples
    --------
    >>> from gradlens.detectors.panels import panel
    >>> from gradlens.examples import example_log
    >>> fitted, scores = panel().fitted([example_log(num_malicious=0, seed=seed) for seed in (1, 2)])
    >>> fitted.reference.values.shape
    (80, 44)
    """

    features: tuple[str, ...]
    positions: np.ndarray
    fold: np.ndarray
    units: np.ndarray
    values: np.ndarray
    directions: np.ndarray

    @classmethod
    def of(cls, seen: Sequence[Observed], directions: np.ndarray) -> "Reference":
        """The rows of several logs; raises InputError where they are of different models."""
        if len({log.features for log in seen}) != 1:
            raise InputError("the null of a panel must be of one model; found logs whose layers differ")
        log = np.repeat(np.arange(len(seen)), [len(part.values) for part in seen])
        client = np.concatenate([np.unique(part.clients, return_inverse=True)[1] for part in seen])
        units = np.unique(np.stack([log, client], axis=1), axis=0, return_inverse=True)[1].reshape(-1)
        fold = (log if len(seen) > 1 else units) % FOLDS
        positions = np.concatenate([part.positions for part in seen])
        return cls(seen[0].features, positions, fold, units, np.concatenate([part.values for part in seen]), directions)

    @lru_cache(maxsize=4_096)  # noqa: B019 - a reference lives as long as its detector
    def at(self, position: int, features: tuple[str, ...]) -> "Fit":
        """The fit for the round after `position` others, from the null's rows after as many, or the nearest."""
        if features != self.features:
            raise InputError(f"the panel was calibrated on another model: {self.features[0]!r}, found {features[0]!r}")
        return self._fit(self.near(position))

    def scores_out_of_sample(self) -> np.ndarray:
        """The score of every row by the fit of the other folds, float64 [row].

        That fit, too, reads its own rows out of sample: where it rests on a single log, as of two, by its clients.
        """
        scores = np.zeros(len(self.values))
        for fold in np.unique(self.fold):
            others = self.fold != fold
            if not others.any():
                raise InputError("the null of a panel needs at least two logs, or two clients of one")
            fit, learned_from = None, np.zeros(0, bool)
            for position in np.unique(self.positions[~others]):
                rows, near = ~others & (self.positions == position), self.near(position, others)
                if fit is None or not np.array_equal(near, learned_from):  # the first rounds share theirs, and the last
                    fit, learned_from = self._fit(near), near
                scores[rows] = fit.readings(self.values[rows]).max(axis=1)
        return scores

    def near(self, position: int, allowed: np.ndarray | None = None) -> np.ndarray:
        """The rows nearest in position, bool [row], as many as make five for every feature."""
        allowed = np.ones(len(self.values), bool) if allowed is None else allowed
        distance = np.where(allowed, np.abs(self.positions - position), np.iinfo(np.int64).max)
        wanted = min(ROWS * self.values.shape[1], int(allowed.sum()))
        return allowed & (distance <= np.sort(distance)[wanted - 1])

    def _fit(self, rows: np.ndarray) -> "Fit":
        """The fit to some rows; where all are of one fold, each client is read by the others."""
        fold = self.fold[rows]
        if len(np.unique(fold)) < 2:
            clients, fold = np.unique(self.units[rows], return_inverse=True)
            if len(clients) < 2:
                raise InputError("the null of a panel needs at least two clients in each log, found a log of one")
            fold = fold % FOLDS
        with one_blas_thread():  # several would wait for each other most of the time
            return Fit.of(self.values[rows], fold, self.directions)


@dataclass(frozen=True, eq=False)
class Fit:
    """What benign rows are like.

    Parameters
    ----------
    scale, mean : ndarray, float64 [feature]
    precision : ndarray, float64 [feature, feature]
        The inverse of the covariance.
    directions : ndarray, float64 [feature, part]
        What each part's reading is made of.
    null : ndarray, float64 [row, reading]
        The raw readings of the benign rows themselves, each column ascending.
    among_attackers : bool, default False
        Whether not all of these rows are benign, so that only their median and spread tell anything.

    Examples
    --------
    >>> import numpy as np
    >>> from gradlens.detectors.reference import Fit
    >>> rows = np.random.default_rng(0).normal(size=(200, 3))
    >>> fit = Fit.of(rows, fold=np.arange(200) % 5, directions=np.eye(3))
    >>> fit.readings(np.array([[0.0, 0.0, 9.0]])).argmax().item()  # of "together" and three parts
    3
    """

    scale: np.ndarray
    mean: np.ndarray
    precision: np.ndarray
    directions: np.ndarray
    null: np.ndarray
    among_attackers: bool = False

    @classmethod
    def of(cls, rows: np.ndarray, fold: np.ndarray, directions: np.ndarray) -> "Fit":
        """The fit to benign rows [row, feature]; the rows of each fold [row] are read by the fit to the others.

        Raises InputError for rows of a single fold: read by the fit to themselves they would lie far inside it, and
        every other row far out.
        """
        null, folds = np.empty((len(rows), 1 + directions.shape[1])), np.unique(fold)
        if len(folds) < 2:
            raise InputError("a fit needs rows of at least two folds, found one")
        for number in folds:
            others = fold != number
            by_others = cls(*_learned(rows[others]), directions, null)
            null[fold == number] = by_others.raw(rows[fold == number])
        return cls(*_learned(rows), directions, np.sort(null, axis=0))

    def drawn(self, values: np.ndarray) -> np.ndarray:
        """The features as they are compared: scaled, drawn in, minus their mean, [client, feature] -> the same."""
        return np.arcsinh(values / self.scale) - self.mean

    def raw(self, values: np.ndarray) -> np.ndarray:
        """The distance and the parts' means, [client, feature] -> [client, reading]."""
        z = self.drawn(values)
        squares = np.einsum("ij,ij->i", z @ self.precision, z) / z.shape[1]
        return np.column_stack([np.sqrt(np.maximum(squares, 0)), z @ self.directions])

    def readings(self, values: np.ndarray) -> np.ndarray:
        """The readings in standard deviations, [client, feature] -> [client, reading]; the first is "together"."""
        raw = self.raw(values)
        if self.among_attackers:
            center = np.median(self.null, axis=0)
            return (raw - center) / _or_one(1.4826 * np.median(np.abs(self.null - center), axis=0))
        pairs = zip(self.null.T, raw.T, strict=True)
        return np.stack([_normal_scores(null, numbers) for null, numbers in pairs], axis=1)


def own_fit(values: np.ndarray, directions: np.ndarray) -> Fit:
    """The fit of a cohort to itself: robust scales alone, since fewer clients than features give no covariance."""
    mad = 1.4826 * np.median(np.abs(values), axis=0)
    scale = _or_one(np.where(mad > 0, mad, 1.2533 * np.abs(values).mean(axis=0)))
    fit = Fit(scale, np.zeros(len(scale)), np.eye(len(scale)), directions, np.zeros((0, 0)), among_attackers=True)
    return replace(fit, null=fit.raw(values))


def _learned(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scale, mean and precision of rows [row, feature]."""
    low, high = np.quantile(rows, [0.01, 0.99], axis=0)
    scale = _or_one(np.sqrt(np.mean(np.clip(rows, low, high) ** 2, axis=0)))
    drawn = np.arcsinh(rows / scale)
    covariance = _ledoit_wolf(drawn) if len(rows) > 1 else np.eye(rows.shape[1])
    floor = 1e-6 * max(np.trace(covariance) / len(covariance), 1e-12)
    return scale, drawn.mean(axis=0), np.linalg.inv(covariance + floor * np.eye(len(covariance)))


def _ledoit_wolf(rows: np.ndarray) -> np.ndarray:
    """The covariance of at least two rows [row, feature], shrunk as by Ledoit & Wolf 2004.

    To the last bit what scikit-learn's `ledoit_wolf` gives, which takes a second to import, and each time as long to
    check its arguments as to compute.
    """
    count, features = rows.shape
    centered = rows - rows.mean(axis=0)
    squares = centered**2
    variances = squares.sum(axis=0) / count
    mean = variances.sum() / features
    products = np.dot(centered.T, centered)
    size = np.sum(products**2) / count**2
    error = 1 / (features * count) * (np.sum(np.dot(squares.T, squares)) / count - size)
    distance = (size - 2 * mean * variances.sum() + features * mean**2) / features
    shrinkage = min(error, distance) / distance if min(error, distance) else 0.0
    covariance = products / count
    shrunk = (1 - shrinkage) * covariance
    shrunk.flat[:: features + 1] += shrinkage * (np.trace(covariance) / features)
    return shrunk


def _normal_scores(null: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """How far out numbers lie among those of an ascending null, in standard deviations of a normal variable.

    They follow from the share of the null that is larger. In its highest twentieth that share falls exponentially with
    the mean excess, so that numbers beyond the largest still differ.
    """
    count = len(null)
    below = (np.searchsorted(null, numbers, "left") + np.searchsorted(null, numbers, "right")) / 2
    logs = np.log((count - below + 0.5) / (count + 1))
    many = min(max(int(TAIL * count), 10), count // 2)
    if many:
        start = null[-many]
        excess = max((null[-many:] - start).mean(), 1e-9 * (abs(start) + 1))
        far = numbers > start
        logs[far] = np.log(many / count) - (numbers[far] - start) / excess
    return -ndtri_exp(logs)


def _or_one(spread: np.ndarray) -> np.ndarray:
    return np.where(spread > 0, spread, 1.0)
