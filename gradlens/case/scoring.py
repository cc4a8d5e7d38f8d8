"""A score per client: its readings beside those of the clean clients, each counted by a learned weight."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gradlens.case.readings import readings_of
from gradlens.case.robust import MAD
from gradlens.case.sums import Sums

WITHIN, SIGMAS = 0.4, 0.5244  # this share of normal deviations is at most so many sigmas: nearer than the median's .5,
# so that a scale rests on fewer than half of the clients
FARTHEST = 50.0  # what an infinite deviation counts, drawn in


@dataclass(frozen=True, eq=False)
class Scoring:
    """What counts against a client: the scale of each reading among benign clients, and its weight.

    A reading that a model has not, as one without biases, counts nothing.

    Attributes
    ----------
    readings : tuple of str
        The readings, as `readings_of` names them.
    scales : numpy.ndarray
        float64 [reading], robust sigma of a benign client's deviation from the middle of its recording.
    above, below : numpy.ndarray
        float64 [reading], weight of a deviation above the middle, and below it.
    intercept : float
        Score of a client in the middle of everything.
    sides : numpy.ndarray
        float64 [reading + 1], weights by which the malicious one of two camps is told (`malicious_side`).

    Examples
    --------
    >>> from gradlens.case.shipped import reference
    >>> from gradlens.case.sums import sums_of
    >>> from gradlens.examples import example_log
    >>> scores = reference().scoring.scores(sums_of(example_log()), np.ones(10, bool))
    >>> int(scores.argmax())
    9
    """

    readings: tuple[str, ...]
    scales: np.ndarray
    above: np.ndarray
    below: np.ndarray
    intercept: float
    sides: np.ndarray

    def scores(self, sums: Sums, clean: np.ndarray) -> np.ndarray:
        """Scores of all clients, float64 [client]: log odds as they were among the recordings of the study.

        Parameters
        ----------
        sums : Sums
        clean : numpy.ndarray
            bool [client], the clients that judge.
        """
        return self.parts(sums, clean).sum(axis=1) + self.intercept

    def parts(self, sums: Sums, clean: np.ndarray) -> np.ndarray:
        """What each reading adds to the score, float64 [client, reading].

        Parameters
        ----------
        sums : Sums
        clean : numpy.ndarray
            bool [client], the clients that judge.
        """
        return self.added(deviations(sums, clean, self.readings, self.scales))

    def added(self, table: np.ndarray) -> np.ndarray:
        """What deviations add to the score, float64 [client, reading].

        Parameters
        ----------
        table : ndarray, float64 [client, reading]
            As `deviations` gives them.
        """
        above, below = np.split(split(table), 2, axis=1)
        return above * self.above + below * self.below


def deviations(sums: Sums, clean: np.ndarray, readings: Sequence[str], scales: np.ndarray) -> np.ndarray:
    """Deviations of all readings from the clean clients' middle, in sigmas, drawn in by arcsinh: [client, reading].

    The sigma is the given scale, or that of the clean clients where they differ more: in a recording whose training
    goes wrong, the innocent differ from each other more than they do elsewhere.
    """
    names, values = readings_of(sums, clean)
    places = {name: place for place, name in enumerate(readings)}
    columns = [places[name] for name in names]
    apart = values - np.median(values[clean], axis=0)
    here = np.quantile(np.abs(apart[clean]), WITHIN, axis=0) / SIGMAS
    table = np.zeros((len(values), len(readings)))
    table[:, columns] = np.arcsinh(apart / np.maximum(scales[columns], here))
    return np.nan_to_num(table, nan=0.0, posinf=FARTHEST, neginf=-FARTHEST)


def split(table: np.ndarray) -> np.ndarray:
    """Deviations above the middle, then below it, both as sizes: [client, 2 x reading]."""
    return np.concatenate([np.maximum(table, 0), np.maximum(-table, 0)], axis=1)


def scales_of(recordings: Sequence[Sums], readings: Sequence[str]) -> np.ndarray:
    """Robust sigma of each reading's deviation from the middle of its recording; NaN where the models have none.

    Parameters
    ----------
    recordings : sequence of Sums
        Attack-free.
    readings : sequence of str
    """
    apart: dict[str, list[np.ndarray]] = {name: [] for name in readings}
    for sums in recordings:
        names, values = readings_of(sums, np.ones(len(sums.clients), bool))
        for name, column in zip(names, (values - np.median(values, axis=0)).T, strict=True):
            apart[name].append(np.abs(column))
    return np.array([max(MAD * float(np.median(np.concatenate(of))), 1e-9) if of else np.nan for of in apart.values()])
