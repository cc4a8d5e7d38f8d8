"""The panel: several statistics of every layer, judged together, with one score and what it was made of.

No single number tells an attacker from a client with unusual labels: skew moves everything, but in proportion.
The panel learns from attack-free clients how its parts move together and asks how far a client is from that (its
Mahalanobis distance): a first layer that moves more than the client's final bias explains is far out, though neither
of the two is unusual by itself. Beside that it listens to each part alone, where a weak but plain sign would drown;
there to the weight matrices before the final layer, since skew speaks in the final layer and chance in the biases.
How far out is told by the share of benign clients that read as high, so that no reading outshouts the others only
because benign clients differ in it by leaps.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import pandas as pd
from scipy.special import ndtri_exp

from gradlens import statistics
from gradlens.detectors.published import Judgement, judged
from gradlens.detectors.verdict import TEXTBOOK, Detector, Verdict
from gradlens.errors import CannotSay, InputError
from gradlens.log import ModelSpec, UpdateLog
from gradlens.scorers import robustly_scaled
from gradlens.statistics import Statistic

__all__ = ["PARTS", "Observed", "Panel", "Part", "panel"]

MATRICES, VECTORS = 4, 2  # groups of layers before the final one that lie together, in a model of more layers
FAR = 20.0  # robust sigmas that one round counts at most
ROWS = 5  # null rows for every feature, at least, where there are as many
TAIL = 0.05  # of the null's rows, beyond which their shares are taken to fall exponentially
SMALLEST = 3


@dataclass(frozen=True)
class Part:
    """A statistic with a column per layer, and how the panel reads it.

    averaged: over the client's rounds, each in robust sigmas of its cohort; False: the statistic looks back by itself.
    logarithm: of a size, so that twice and half are equally far. suspicious: 1 where more of it is, -1 where less, 0
    for a part that tells nothing by itself.
    """

    statistic: Statistic
    averaged: bool = False
    logarithm: bool = False
    suspicious: int = 1


PARTS: Mapping[str, Part] = {
    "size": Part(statistics.layer_norms, averaged=True, logarithm=True),
    "distance": Part(statistics.neighbour_distances, averaged=True, logarithm=True),
    "direction": Part(statistics.layer_cosines, averaged=True, suspicious=-1),
    "signs": Part(statistics.sign_agreement, averaged=True, suspicious=-1),
    "company": Part(statistics.neighbour_cosines, averaged=True),
    "spectrum": Part(statistics.spectral, averaged=True),
    "accumulated size": Part(statistics.accumulated_norms, logarithm=True),
    "accumulated spectrum": Part(statistics.accumulated_spectral),
    "accumulated company": Part(statistics.accumulated_neighbours),
    "accomplices": Part(statistics.accomplices),
    "persistence": Part(statistics.persistence, suspicious=0),
}


def panel() -> Detector:
    """How far each client's statistics, layer by layer, are from what benign clients show: together, or part by part.

    Parts are the statistics of `PARTS`, layer by layer (of a model of more than 8 layers in 8 groups): of each round,
    averaged over the client's rounds, and accumulated. They are centred on the cohort's median, scaled and drawn in by
    arcsinh. The readings are their Mahalanobis distance under a Ledoit-Wolf covariance, "together", and for each part
    its mean over the weights before the final layer in the suspicious direction; each as far out, in standard
    deviations of a normal variable, as the share of benign clients that read as high (out of sample in five folds; in
    the highest twentieth that share falls exponentially). The score is the largest reading. The verdict's
    evidence holds the readings, then every feature by itself.
    Of sketches the part "signs" cannot say and is 0: a null must be recorded at the level of what it calibrates.
    `calibrate(panel(), null)` learns all of that from the null. Uncalibrated the scales come from the cohort itself and
    nothing is known of the covariance, which tells much less; then a client is flagged whose score lies 3.5 robust
    sigmas above the cohort's median.
    Source: the panel is this project's; the estimator is Ledoit & Wolf 2004, J. Multivariate Analysis 88.
    """
    return Panel(tuple(PARTS.items()))


@dataclass(frozen=True, eq=False)
class Observed:
    """What the panel saw in one log: a row per comparable client and round.

    positions: int64 [row], rounds before this one; clients: str [row]; features: names [feature]; values: float64
    [row, feature], all layer groups of the first part first; heard: of which groups a part's reading is the mean.
    """

    positions: np.ndarray
    clients: np.ndarray
    features: tuple[str, ...]
    values: np.ndarray
    heard: tuple[bool, ...]


@dataclass(frozen=True)
class Panel:
    """What `panel` builds; reference: what benign clients show, None: each cohort shows it itself."""

    parts: tuple[tuple[str, Part], ...]
    reference: "Reference | None" = None

    def __call__(self, log: UpdateLog) -> Verdict:
        """The verdict on the last round."""
        null = "uncalibrated: each cohort itself" if self.reference is None else "uncalibrated: fitted to a null"
        return judged(log, self._judge, SMALLEST, null)

    def _judge(self, log: UpdateLog) -> Judgement:
        features, values = self.seen(log)
        if not values.any():  # all clients are equal
            return Judgement(np.zeros(len(values)), np.zeros(len(values), bool))
        fit = self._fit(len(log) - 1, features, values, _heard(log.model))
        readings = fit.readings(values)
        scores = readings.max(axis=1)
        flags = robustly_scaled(scores[:, None])[:, 0] > TEXTBOOK
        columns = [*self.readings, *features]
        clients = pd.Index(log[-1].clients, name="client")
        evidence = pd.DataFrame(np.column_stack([readings, fit.drawn(values)]), index=clients, columns=columns)
        return Judgement(scores, flags, evidence=evidence)

    @property
    def readings(self) -> list[str]:
        """Names of the readings: "together", and the parts that tell something by themselves."""
        return ["together", *(name for name, part in self.parts if part.suspicious)]

    def directions(self, heard: Sequence[bool]) -> np.ndarray:
        """What of each feature a part's reading is made of, float64 [feature, part that tells something]."""
        layers = np.array(heard) / sum(heard)
        columns = [
            np.kron(np.eye(len(self.parts))[i] * part.suspicious, layers)
            for i, (_, part) in enumerate(self.parts)
            if part.suspicious
        ]
        return np.stack(columns, axis=1)

    def seen(self, log: UpdateLog) -> tuple[tuple[str, ...], np.ndarray]:
        """Names [feature] and values [client of the last round, feature], minus the cohort's median.

        A part that cannot say, yet or of sketches, is 0 throughout: nobody stands out by it.
        """
        groups = _groups(log.model)
        names = tuple(f"{part}: {_named(group, log.model)}" for part, _ in self.parts for group in groups)
        values = [_grouped(_part_values(part, log), groups) for _, part in self.parts]
        return names, np.concatenate(values, axis=1)

    def observed(self, log: UpdateLog) -> Observed:
        """What the panel sees after each round of a log."""
        positions, clients, values, names = [], [], [], ()
        for position, prefix in enumerate(log.prefixes()):
            comparable = prefix[-1].comparable
            if comparable.sum() < SMALLEST:
                continue
            names, seen = self.seen(prefix if comparable.all() else prefix.keep(comparable))
            values.append(seen)
            clients.append(prefix[-1].clients[comparable])
            positions.append(np.full(len(seen), position))
        if not values:
            raise InputError(f"a null of the panel needs rounds of {SMALLEST} comparable clients, found none")
        rows = np.concatenate(positions), np.concatenate(clients)
        return Observed(*rows, names, np.concatenate(values), _heard(log.model))

    def scores(self, seen: Observed) -> np.ndarray:
        """The score of every row of what was seen of a log, float64 [row]."""
        scores = np.zeros(len(seen.values))
        for position in np.unique(seen.positions):
            rows = seen.positions == position
            values = seen.values[rows]
            if values.any():
                fit = self._fit(int(position), seen.features, values, seen.heard)
                scores[rows] = fit.readings(values).max(axis=1)
        return scores

    def _fit(self, position: int, features: tuple[str, ...], values: np.ndarray, heard: tuple[bool, ...]) -> "Fit":
        if self.reference is None:
            return _own_fit(values, self.directions(heard))
        return self.reference.at(position, features)

    def fitted(self, nulls: Sequence[UpdateLog | Observed]) -> tuple["Panel", np.ndarray]:
        """The panel that knows what these attack-free logs show, and their own scores, each out of sample.

        A row is scored by what the other logs show (of one log: the other clients), in five folds.
        """
        seen = [null if isinstance(null, Observed) else self.observed(null) for null in nulls]
        reference = Reference.of(seen, self.directions(seen[0].heard) if seen else np.zeros((0, 0)))
        return replace(self, reference=reference), reference.scores_out_of_sample()

    def __repr__(self) -> str:
        return "panel()" if self.reference is None else f"panel(fitted to {len(self.reference.values)} rows)"


@dataclass(frozen=True, eq=False)
class Reference:
    """What benign clients show: rows of attack-free logs; fold: which rows belong together, int64 [row]."""

    features: tuple[str, ...]
    positions: np.ndarray
    fold: np.ndarray
    values: np.ndarray
    directions: np.ndarray

    @classmethod
    def of(cls, seen: Sequence[Observed], directions: np.ndarray, folds: int = 5) -> "Reference":
        """The rows of several logs; raises InputError where they are of different models."""
        if len({each.features for each in seen}) != 1:
            raise InputError("the null of a panel must be of one model; found logs whose layers differ")
        if len(seen) > 1:
            fold = np.concatenate([np.full(len(each.values), i % folds) for i, each in enumerate(seen)])
        else:
            fold = np.unique(seen[0].clients, return_inverse=True)[1] % folds
        positions = np.concatenate([each.positions for each in seen])
        return cls(seen[0].features, positions, fold, np.concatenate([each.values for each in seen]), directions)

    @lru_cache(maxsize=4_096)  # noqa: B019 - a reference lives as long as its detector
    def at(self, position: int, features: tuple[str, ...]) -> "Fit":
        """The fit for the round after `position` others: of the null's rows after as many, or the nearest."""
        if features != self.features:
            raise InputError(f"the panel was calibrated on another model: {self.features[0]!r}, found {features[0]!r}")
        near = self._near(position, np.ones(len(self.values), bool))
        return Fit.of(self.values[near], self.fold[near], self.directions)

    def scores_out_of_sample(self) -> np.ndarray:
        """The score of every row by the fit of the other folds, float64 [row]."""
        scores = np.zeros(len(self.values))
        for fold in np.unique(self.fold):
            others = self.fold != fold
            if not others.any():
                raise InputError("the null of a panel needs at least two logs, or two clients of one")
            for position in np.unique(self.positions[~others]):
                rows = ~others & (self.positions == position)
                near = self._near(position, others)
                fit = Fit.of(self.values[near], self.fold[near], self.directions)
                scores[rows] = fit.readings(self.values[rows]).max(axis=1)
        return scores

    def _near(self, position: int, allowed: np.ndarray) -> np.ndarray:
        """The rows nearest in position, bool [row], until there are five for every feature."""
        distance = np.where(allowed, np.abs(self.positions - position), np.iinfo(np.int64).max)
        wanted = min(ROWS * self.values.shape[1], int(allowed.sum()))
        return allowed & (distance <= np.sort(distance)[wanted - 1])


@dataclass(frozen=True, eq=False)
class Fit:
    """What benign rows are like: scale, mean [feature], precision [feature, feature]; directions [feature, part].

    null: the raw readings of the benign rows themselves, each column ascending, float64 [row, reading].
    among_attackers: not all of these are benign, so that only their median and their spread tell anything.
    """

    scale: np.ndarray
    mean: np.ndarray
    precision: np.ndarray
    directions: np.ndarray
    null: np.ndarray
    among_attackers: bool = False

    @classmethod
    def of(cls, rows: np.ndarray, fold: np.ndarray, directions: np.ndarray) -> "Fit":
        """The fit to benign rows [row, feature]; the rows of each fold [row] are read by the fit to the others."""
        null, folds = np.empty((len(rows), 1 + directions.shape[1])), np.unique(fold)
        for each in folds:
            among = fold != each if len(folds) > 1 else np.ones(len(rows), bool)
            apart = cls(*_learnt(rows[among]), directions, null)
            null[fold == each] = apart.raw(rows[fold == each])
        return cls(*_learnt(rows), directions, np.sort(null, axis=0))

    def drawn(self, values: np.ndarray) -> np.ndarray:
        """The features as they are compared, scaled and drawn in, minus their mean: [client, feature] -> the same."""
        return np.arcsinh(values / self.scale) - self.mean

    def raw(self, values: np.ndarray) -> np.ndarray:
        """[client, feature] -> the distance and the parts' means [client, reading]."""
        z = self.drawn(values)
        squares = np.einsum("ij,ij->i", z @ self.precision, z) / z.shape[1]
        return np.column_stack([np.sqrt(np.maximum(squares, 0)), z @ self.directions])

    def readings(self, values: np.ndarray) -> np.ndarray:
        """[client, feature] -> [client, reading], in standard deviations; the first is "together"."""
        raw = self.raw(values)
        if self.among_attackers:
            centre = np.median(self.null, axis=0)
            return (raw - centre) / _positive(1.4826 * np.median(np.abs(self.null - centre), axis=0))
        pairs = zip(self.null.T, raw.T, strict=True)
        return np.stack([_normal_scores(null, numbers) for null, numbers in pairs], axis=1)


def _learnt(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scale, mean and precision of rows [row, feature]."""
    from sklearn.covariance import ledoit_wolf  # takes a second to import

    low, high = np.quantile(rows, [0.01, 0.99], axis=0)
    scale = _positive(np.sqrt(np.mean(np.clip(rows, low, high) ** 2, axis=0)))
    drawn = np.arcsinh(rows / scale)
    covariance = ledoit_wolf(drawn)[0] if len(rows) > 1 else np.eye(rows.shape[1])
    floor = 1e-6 * max(np.trace(covariance) / len(covariance), 1e-12)
    return scale, drawn.mean(axis=0), np.linalg.inv(covariance + floor * np.eye(len(covariance)))


def _normal_scores(null: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """How far out numbers lie among those of a null, ascending, in standard deviations of a normal variable.

    By the share of the null that is larger; in its highest twentieth that share falls exponentially with the mean
    excess, so that numbers beyond the largest still differ.
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


def _positive(spread: np.ndarray) -> np.ndarray:
    return np.where(spread > 0, spread, 1.0)


def _own_fit(values: np.ndarray, directions: np.ndarray) -> Fit:
    """The fit to a cohort by itself: robust scales alone, since fewer clients than features tell no covariance."""
    mad = 1.4826 * np.median(np.abs(values), axis=0)
    scale = _positive(np.where(mad > 0, mad, 1.2533 * np.abs(values).mean(axis=0)))
    fit = Fit(scale, np.zeros(len(scale)), np.eye(len(scale)), directions, np.zeros((0, 0)), among_attackers=True)
    return replace(fit, null=fit.raw(values))


def _part_values(part: Part, log: UpdateLog) -> np.ndarray:
    """A part's values of the clients of the last round [client, layer], minus their median; 0 where it cannot say."""
    clients = log[-1].clients
    if part.averaged:
        averages = log.folded(_Average(part.statistic, part.logarithm))
        values = averages.of(clients)
    else:
        try:
            values = _read(log.remembered(part.statistic), part.logarithm)
        except CannotSay:
            return np.zeros((len(clients), len(log.model.parameters)))
    return values - np.median(values, axis=0)


def _read(table: pd.DataFrame, logarithm: bool) -> np.ndarray:
    values = table.to_numpy(np.float64)
    return np.log(np.maximum(values, np.finfo(np.float64).tiny)) if logarithm else values


@dataclass(frozen=True, eq=False)
class _Averages:
    """For the clients seen so far: how often, int64 [client], and the sum of their deviations [client, layer]."""

    clients: np.ndarray
    counts: np.ndarray
    sums: np.ndarray

    def of(self, clients: np.ndarray) -> np.ndarray:
        """Mean deviation of these clients [client, layer]; 0 for one that was never comparable."""
        if not len(self.clients):
            return np.zeros((len(clients), self.sums.shape[1]))
        rows = np.minimum(np.searchsorted(self.clients, clients), len(self.clients) - 1)
        known = self.clients[rows] == clients
        return np.where(known[:, None], self.sums[rows] / np.maximum(self.counts[rows], 1)[:, None], 0.0)


@dataclass(frozen=True)
class _Average:
    """One more round of a statistic, in robust sigmas of its cohort: a step for `UpdateLog.folded`."""

    statistic: Statistic
    logarithm: bool

    def __call__(self, before: _Averages | None, log: UpdateLog) -> _Averages:
        round_ = log[-1]
        layers = len(log.model.parameters)
        if before is None:
            before = _Averages(np.zeros(0, np.str_), np.zeros(0, np.int64), np.zeros((0, layers)))
        try:
            table = log.remembered(self.statistic)
        except CannotSay:
            return before
        comparable = round_.comparable
        z = np.clip(robustly_scaled(_read(table, self.logarithm)[comparable]), -FAR, FAR)
        clients = np.union1d(before.clients, round_.clients[comparable])
        counts, sums = np.zeros(len(clients), np.int64), np.zeros((len(clients), layers))
        seen, rows = np.searchsorted(clients, before.clients), np.searchsorted(clients, round_.clients[comparable])
        counts[seen], sums[seen] = before.counts, before.sums
        counts[rows] += 1
        sums[rows] += z
        return _Averages(clients, counts, sums)


@lru_cache(maxsize=64)
def _groups(model: ModelSpec) -> tuple[tuple[int, ...], ...]:
    """Positions of the layers judged together: each by itself, or matrices and vectors in a few groups each."""
    names = model.parameters
    if len(names) <= MATRICES + VECTORS + 2:
        return tuple((i,) for i in range(len(names)))
    final = [i for i, name in enumerate(names) if name in (model.final_weight, model.final_bias)]
    matrices = [i for i in range(len(names)) if i not in final and len(model[names[i]].sent_shape) > 1]
    vectors = [i for i in range(len(names)) if i not in final and len(model[names[i]].sent_shape) < 2]
    parts = [*np.array_split(matrices, MATRICES), *np.array_split(vectors, VECTORS)]
    return (*(tuple(part.tolist()) for part in parts if len(part)), *((i,) for i in final))


@lru_cache(maxsize=64)
def _heard(model: ModelSpec) -> tuple[bool, ...]:
    """Which of these groups are weights before the final layer; all, where there are none."""
    first = [model[model.parameters[group[0]]] for group in _groups(model)]
    weights = tuple(len(each.sent_shape) > 1 and each.name != model.final_weight for each in first)
    return weights if any(weights) else (True,) * len(weights)


def _named(group: tuple[int, ...], model: ModelSpec) -> str:
    first, last = model.parameters[group[0]], model.parameters[group[-1]]
    return first if first == last else f"{first} to {last}"


def _grouped(values: np.ndarray, groups: tuple[tuple[int, ...], ...]) -> np.ndarray:
    """Means over the layers of each group, [client, layer] -> [client, group]."""
    return np.stack([values[:, group].mean(axis=1) for group in groups], axis=1)
