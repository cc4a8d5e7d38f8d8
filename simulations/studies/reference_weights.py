"""How much each reading counts: learned from recordings in which it is known who was malicious.

A logistic regression on readings above and below the clean clients' middle. It is learned for the clean sets that an
investigation passes through, right and wrong ones: everybody, everybody but some or all of the attackers, but some of
the innocent, and, in a second round, the clean sets of its own first version. Which of two camps is malicious is
learned apart, from recordings with many malicious clients, each camp judged by the other.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from gradlens.case.camps import SEVERAL, mirrored
from gradlens.case.peeling import MOST, peel
from gradlens.case.scoring import Scoring, deviations, split
from gradlens.case.sums import Sums

BENIGN_WEIGHT = 2.0  # of the benign clients of a recording, together, when its malicious ones weigh 1
FREE_WEIGHT = 5.0  # of attack-free recordings beside an attack
STRENGTH = 0.5  # of the ridge penalty: weaker ones find no more, and transfer worse to other models
SIDE_STRENGTH = 0.5  # the same of the weights of two camps
ROUNDS = 2  # the second learns from the clean sets that the first passes through


class Example(NamedTuple):
    """A recording to learn from.

    `group` is what weighs 1 in all: recordings of the same attack, or "free"; `scales` are those of its setting.
    """

    sums: Sums
    malicious: np.ndarray
    group: str
    scales: np.ndarray
    seed: int

    @property
    def malicious_share(self) -> float:
        """Share of the clients that are malicious."""
        return float(self.malicious.mean())


def learned(examples: Sequence[Example], names: tuple[str, ...], pooled: np.ndarray) -> Scoring:
    """Learns the weights of all readings; scales are pooled over settings, as no recording tells its own."""
    scoring = Scoring(names, pooled, np.zeros(len(names)), np.zeros(len(names)), 0.0, np.zeros(len(names) + 1))
    camps = [example for example in examples if example.malicious_share > SEVERAL]
    sides = fitted_sides(np.stack([mirrored(example.sums, scoring, example.malicious) for example in camps]))
    examples = [example for example in examples if example.malicious_share <= MOST]
    for round_ in range(ROUNDS):
        tables = [table(example, scoring, visited=round_ > 0) for example in examples]
        counts = {group: sum(e.group == group for e in examples) for group in {e.group for e in examples}}
        values = np.concatenate([values for values, _ in tables])
        malicious = np.concatenate([malicious for _, malicious in tables])
        weights = np.concatenate(
            [
                weights_of(labels, free=e.group == "free") / counts[e.group]
                for e, (_, labels) in zip(examples, tables, strict=True)
            ]
        )
        scoring = fitted(values, malicious, weights, scoring)
    return replace(scoring, sides=sides)


def table(example: Example, scoring: Scoring, visited: bool) -> tuple[np.ndarray, np.ndarray]:
    """Readings [row, reading] of all clients for many clean sets, by the setting's scales and by the pooled ones."""
    sets = list(clean_sets(example.malicious, np.random.default_rng(example.seed)))
    if visited:
        clean = np.ones(len(example.malicious), bool)
        for position in peel(example.sums, scoring).order:
            clean[position] = False
            sets.append(clean.copy())
    values = [
        deviations(example.sums, clean, scoring.readings, scales)
        for clean in sets
        for scales in (example.scales, scoring.scales)
    ]
    return np.concatenate(values).astype(np.float32), np.tile(example.malicious, len(values))


def clean_sets(malicious: np.ndarray, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Clean sets, right and wrong: bool [client] each."""
    everybody = np.ones(len(malicious), bool)
    yield everybody
    attackers, innocent = np.flatnonzero(malicious), np.flatnonzero(~malicious)
    if len(attackers):
        yield ~malicious
    if len(attackers) > 1:
        for _ in range(2):
            yield _without(everybody, rng.choice(attackers, rng.integers(1, len(attackers)), replace=False))
    if room := int(0.45 * len(malicious)) - len(attackers):
        for _ in range(1 if len(attackers) else 3):
            yield _without(~malicious, rng.choice(innocent, rng.integers(1, max(room, 1) + 1), replace=False))


def _without(clean: np.ndarray, positions: np.ndarray) -> np.ndarray:
    rest = clean.copy()
    rest[positions] = False
    return rest


def weights_of(malicious: np.ndarray, free: bool) -> np.ndarray:
    """Weights of the rows of a recording: 1 for all malicious ones together, more for the benign ones."""
    weights = np.where(malicious, 1 / max(malicious.sum(), 1), BENIGN_WEIGHT / max((~malicious).sum(), 1))
    return weights * (FREE_WEIGHT if free else 1)


def fitted(values: np.ndarray, malicious: np.ndarray, weights: np.ndarray, before: Scoring) -> Scoring:
    """The logistic regression."""
    from sklearn.linear_model import LogisticRegression

    parts = split(values)
    spread = parts.std(axis=0) + 0.05
    model = LogisticRegression(C=1 / (2 * STRENGTH), max_iter=1_000)
    model.fit(parts / spread, malicious, sample_weight=weights)
    above, below = np.split(model.coef_[0].astype(np.float64) / spread, 2)
    return replace(before, above=above, below=below, intercept=float(np.ravel(model.intercept_)[0]))


def fitted_sides(values: np.ndarray) -> np.ndarray:
    """Weights of `mirrored` [recording, value] that tell malicious camps, as these all are, from mirror images."""
    from sklearn.linear_model import LogisticRegression

    spread = values.std(axis=0) + 0.05
    model = LogisticRegression(C=1 / (2 * SIDE_STRENGTH), fit_intercept=False, max_iter=2_000)
    model.fit(np.concatenate([values, -values]) / spread, np.arange(2 * len(values)) < len(values))
    return model.coef_[0].astype(np.float64) / spread
