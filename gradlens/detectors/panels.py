"""The panel: several statistics of every layer, judged together, with one score and what it was made of.

No single number tells an attacker from a client with unusual labels: label skew moves everything, but in proportion.
The panel learns from attack-free clients how its parts move together and measures how far a client is from that (its
Mahalanobis distance): a first layer that moves more than the client's final bias explains is far out, though neither of
the two is unusual by itself. It also listens to each part alone, since a weak but plain sign would drown in the whole.
There it takes the weight matrices before the final layer only, since skew shows in the final layer and chance in the
biases.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import pandas as pd

from gradlens import statistics
from gradlens.detectors.nulls import NullScores
from gradlens.detectors.published import Judgement, judged
from gradlens.detectors.reference import Fit, Observed, Reference, own_fit
from gradlens.detectors.verdict import TEXTBOOK, Detector, Verdict, latest
from gradlens.errors import CannotSay, InputError
from gradlens.log import ModelSpec, UpdateLog
from gradlens.scorers import robustly_scaled
from gradlens.statistics import Statistic
from gradlens.statistics.cohort import SMALLEST

__all__ = ["PARTS", "Observed", "Panel", "Part", "panel"]

MATRICES, VECTORS = 4, 2  # groups of layers before the final one that lie together, in a model of more layers
FAR = 20.0  # robust sigmas that one round adds at most


@dataclass(frozen=True)
class Part:
    """A statistic with a column per layer, and how the panel reads it.

    Parameters
    ----------
    statistic : Statistic
        Its columns are the layers.
    averaged : bool, default False
        Whether it is averaged over the client's rounds, each in robust sigmas of its cohort. False for a statistic that
        looks back by itself.
    logarithm : bool, default False
        Whether its logarithm is taken, for a size, so that twice and half are equally far.
    suspicious : {1, -1, 0}, default 1
        1 where more of it is suspicious, -1 where less is, 0 for a part that tells nothing by itself.

    Examples
    --------
    >>> from gradlens.detectors.panels import PARTS
    >>> PARTS["direction"].suspicious
    -1
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
    """How far each client's statistics, layer by layer, are from those of benign clients: together, or part by part.

    Returns
    -------
    Panel
        Calibrate it: ``calibrate(panel(), null)`` learns from the null what benign clients show.

    Notes
    -----
    Features are the statistics of `PARTS`, layer by layer (in 8 groups for a model of more than 8 layers): of each
    round, averaged over the client's rounds, or accumulated. They are centered on the cohort's median, scaled, and
    drawn in by arcsinh. There are several readings: "together", the Mahalanobis distance under a Ledoit-Wolf covariance
    [1]_; and for each part its mean over the weights before the final layer, in the suspicious direction. Each reading
    becomes the standard normal quantile of the share of benign clients that read lower (out of sample, in five folds;
    in the highest twentieth the share above falls exponentially), so that no reading outshouts the others only because
    benign clients differ in it by leaps. The score is the largest reading. The verdict's evidence holds the readings,
    then every feature by itself. The panel is this project's own.

    Uncalibrated, the scales come from the cohort itself and nothing is known of the covariance, which tells much less;
    a client is then flagged whose score lies 3.5 robust sigmas above the cohort's median.

    **Abstains** when fewer than 3 clients are comparable. A part that cannot say is 0 for all; for sketches this is
    "signs".

    **Fails when** the null is not like what it calibrates: it must be recorded at the same evidence level, on the same
    model, with label skew of the same kind. And it fails as its parts do.

    References
    ----------
    .. [1] Ledoit & Wolf 2004, J. Multivariate Analysis 88.

    Examples
    --------
    >>> from gradlens import DETECTORS, calibrate
    >>> from gradlens.examples import example_log
    >>> nulls = [example_log(num_malicious=0, seed=seed) for seed in range(1, 6)]
    >>> verdict = calibrate(DETECTORS["panel"](), nulls, fpr=0.05)(example_log())
    >>> str(verdict.clients[verdict.scores.argmax()])
    'client-9'
    """
    return Panel(tuple(PARTS.items()))


@dataclass(frozen=True)
class Panel:
    """The detector that `panel` builds.

    Parameters
    ----------
    parts : tuple of (str, Part) pairs
        What it reads.
    reference : Reference, optional
        What benign clients show; without it each cohort is its own reference.

    Examples
    --------
    >>> from gradlens import DETECTORS
    >>> DETECTORS["panel"]().readings[:4]
    ['together', 'size', 'distance', 'direction']
    """

    parts: tuple[tuple[str, Part], ...]
    reference: Reference | None = None

    def __call__(self, log: UpdateLog) -> Verdict:
        """The verdict on the last round."""
        if self.reference is None:
            return judged(log, self._judge, "uncalibrated: each cohort itself")
        remark = self.beyond(log)
        return judged(log, self._judge, f"uncalibrated: fitted to a null{'; ' if remark else ''}{remark}")

    def beyond(self, log: UpdateLog) -> str:
        """Which of a log's rounds are later than any of the null, and what they are compared with, in words."""
        if self.reference is None:
            return ""
        positions = self.reference.positions
        late = len(log) - 1 - int(positions.max())
        if late < 1:
            return ""
        near = positions[self.reference.near(len(log) - 1)]
        first, last = int(near.min()), int(near.max())
        rounds = f"round {last}" if first == last else f"rounds {first} to {last}"
        return f"its {latest(late)} compared with {rounds} of the null"

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
        """What each part's reading is made of, float64 [feature, part that tells something]."""
        layers = np.array(heard) / sum(heard)
        columns = [
            np.kron(np.eye(len(self.parts))[i] * part.suspicious, layers)
            for i, (_, part) in enumerate(self.parts)
            if part.suspicious
        ]
        return np.stack(columns, axis=1)

    def seen(self, log: UpdateLog) -> tuple[tuple[str, ...], np.ndarray]:
        """What the panel sees in the last round.

        Returns
        -------
        features : tuple of str
        values : ndarray, float64 [client, feature]
            Minus the cohort's median. A part that cannot say, yet or of sketches, is 0 for all, so nobody stands out by
            it.
        """
        groups = _groups(log.model)
        names = tuple(f"{part}: {_named(group, log.model)}" for part, _ in self.parts for group in groups)
        values = [_grouped(_part_values(part, log), groups) for _, part in self.parts]
        return names, np.concatenate(values, axis=1)

    def observed(self, log: UpdateLog) -> Observed:
        """What the panel sees after each round of a log."""
        positions, clients, values, names, left_out = [], [], [], (), 0
        for position, prefix in enumerate(log.prefixes()):
            comparable = prefix[-1].comparable
            if comparable.sum() < SMALLEST:
                continue
            names, seen = self.seen(prefix if comparable.all() else prefix.keep(comparable))
            values.append(seen)
            clients.append(prefix[-1].clients[comparable])
            positions.append(np.full(len(seen), position))
            left_out += int((~comparable).sum()) + len(prefix[-1].refused)
        if not values:
            raise InputError(f"a null of the panel needs rounds of {SMALLEST} comparable clients, found none")
        rows = np.concatenate(positions), np.concatenate(clients)
        return Observed(*rows, names, np.concatenate(values), _heard(log.model), left_out)

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

    def _fit(self, position: int, features: tuple[str, ...], values: np.ndarray, heard: tuple[bool, ...]) -> Fit:
        if self.reference is None:
            return own_fit(values, self.directions(heard))
        return self.reference.at(position, features)

    def fitted(self, nulls: Sequence[UpdateLog | Observed]) -> tuple["Panel", NullScores]:
        """Learns what attack-free logs show.

        Parameters
        ----------
        nulls : sequence of UpdateLog or Observed

        Returns
        -------
        panel : Panel
            The panel that knows what these logs show.
        scores : NullScores
            Their own scores, each out of sample in five folds: by what the other logs show or, of one log, the other
            clients. The fit that reads them learns by whole logs as well, or by clients where it rests on one log.
        """
        seen = [null if isinstance(null, Observed) else self.observed(null) for null in nulls]
        if not seen:
            raise InputError("the null of a panel needs at least one log, found none")
        reference = Reference.of(seen, self.directions(seen[0].heard))
        left_out = sum(log.left_out for log in seen)
        scores = NullScores(reference.scores_out_of_sample(), reference.units, len(seen), left_out)
        return replace(self, reference=reference), scores

    def __repr__(self) -> str:
        return "panel()" if self.reference is None else f"panel(fitted to {len(self.reference.values)} rows)"


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
        """Mean deviation of these clients [client, layer]; 0 for a client that was never comparable."""
        if not len(self.clients):
            return np.zeros((len(clients), self.sums.shape[1]))
        rows = np.minimum(np.searchsorted(self.clients, clients), len(self.clients) - 1)
        known = self.clients[rows] == clients
        return np.where(known[:, None], self.sums[rows] / np.maximum(self.counts[rows], 1)[:, None], 0.0)


@dataclass(frozen=True)
class _Average:
    """Adds one more round of a statistic, in robust sigmas of its cohort: a step for `UpdateLog.folded`."""

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
    """Positions of the layers judged together: each alone, or matrices and vectors in a few groups each."""
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
    """Which of these groups are weights before the final layer; all, where none is."""
    first = [model[model.parameters[group[0]]] for group in _groups(model)]
    weights = tuple(len(layer.sent_shape) > 1 and layer.name != model.final_weight for layer in first)
    return weights if any(weights) else (True,) * len(weights)


def _named(group: tuple[int, ...], model: ModelSpec) -> str:
    first, last = model.parameters[group[0]], model.parameters[group[-1]]
    return first if first == last else f"{first} to {last}"


def _grouped(values: np.ndarray, groups: tuple[tuple[int, ...], ...]) -> np.ndarray:
    """Means over the layers of each group, [client, layer] -> [client, group]."""
    return np.stack([values[:, group].mean(axis=1) for group in groups], axis=1)
