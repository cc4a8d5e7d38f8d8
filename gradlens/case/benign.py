"""What benign clients show: how far the readings of attack-free recordings lie from their middle, and together."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gradlens.case.readings import readings_of
from gradlens.case.sums import Sums
from gradlens.errors import InputError

WITHIN, SIGMAS = 0.4, 0.5244  # this share of normal deviations is at most so many sigmas: nearer than the median's .5,
# so that a scale rests on fewer than half of the clients


@dataclass(frozen=True, eq=False)
class Benign:
    """The scale of every reading among benign clients, and how the readings move together.

    Attributes
    ----------
    names : tuple of str
        The readings.
    scales : numpy.ndarray
        float64 [reading], robust sigma of a benign client's deviation from the middle of its recording.
    center : numpy.ndarray
        float64 [reading], mean of the scaled deviations.
    precision : numpy.ndarray
        float64 [reading, reading], inverse of their Ledoit-Wolf covariance [1]_.

    References
    ----------
    .. [1] Ledoit & Wolf 2004, J. Multivariate Analysis 88.

    Examples
    --------
    >>> from gradlens.case.sums import sums_of
    >>> from gradlens.examples import example_log
    >>> benign = Benign.of([sums_of(example_log(num_malicious=0, seed=seed)) for seed in range(1, 6)])
    >>> distances = benign.distances(sums_of(example_log()), np.ones(10, bool))
    >>> int(distances.argmax())
    9
    """

    names: tuple[str, ...]
    scales: np.ndarray
    center: np.ndarray
    precision: np.ndarray

    @classmethod
    def of(cls, recordings: Sequence[Sums]) -> "Benign":
        """Learns from attack-free recordings what benign clients show.

        Parameters
        ----------
        recordings : sequence of Sums
            At least one, all of models with the same roles of layers.

        Raises
        ------
        InputError
            If there is none, or their models differ in their roles.
        """
        from sklearn.covariance import LedoitWolf  # takes long to import

        if not recordings:
            raise InputError("expected at least one attack-free recording, found none")
        tables = [readings_of(sums, np.ones(len(sums.clients), bool)) for sums in recordings]
        names = tables[0][0]
        for other, _ in tables:
            if other != names:
                raise InputError("attack-free recordings must be of models with the same roles of layers")
        deviations = np.concatenate([values - np.median(values, axis=0) for _, values in tables])
        scales = np.maximum(1.4826 * np.median(np.abs(deviations), axis=0), 1e-9)
        fit = LedoitWolf().fit(np.arcsinh(deviations / scales))
        return cls(tuple(names), scales, fit.location_, np.linalg.inv(fit.covariance_))

    def distances(self, sums: Sums, clean: np.ndarray) -> np.ndarray:
        """How far each client is from what benign clients show, float64 [client]; about 1 for a benign one.

        Parameters
        ----------
        sums : Sums
        clean : numpy.ndarray
            bool [client], the clients that the middle rests on, and the scale of a reading where they differ more in it
            than benign clients elsewhere.

        Raises
        ------
        InputError
            If the recording's model has other roles of layers than those that this was learned from.
        """
        names, values = readings_of(sums, clean)
        if tuple(names) != self.names:
            raise InputError("the recording is of a model with other roles of layers than the attack-free recordings")
        deviations = values - np.median(values[clean], axis=0)
        here = np.quantile(np.abs(deviations[clean]), WITHIN, axis=0) / SIGMAS
        scaled = np.arcsinh(deviations / np.maximum(self.scales, here)) - self.center
        squares = np.einsum("ki,ij,kj->k", scaled, self.precision, scaled)
        return np.sqrt(np.maximum(squares, 0) / len(names))
