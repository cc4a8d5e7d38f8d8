"""What a client's labels explain of its residuals: a regression on label drift that can leave any clients out.

A client's labels show in its final-bias update, round by round: its label drift. Each layer's residuals are regressed
on it over all rounds of the clean clients. Which clients those are is not known when the rounds are read, so that the
sums of the regression are kept client by client, as inner products.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from gradlens.log import ModelSpec
from gradlens.log.accumulated import Accumulated, Residuals, sketch_rows
from gradlens.log.kernels import BLOCK, inner_products

MOST_LABELS, MOST_SUMS = 64, 4_096  # labels, and clients x labels, up to which drift is regressed on
IN_FULL = 250_000_000  # bytes that the sums of a recording may take; above it they are count sketches


@dataclass(frozen=True, eq=False)
class Drift:
    """The sums of a regression of residuals on label drift.

    Attributes
    ----------
    totals : numpy.ndarray
        float64 [client, label], label drift summed over rounds.
    moments : numpy.ndarray
        float64 [client, label, label], products of the drift with itself, summed over rounds.
    with_totals : Mapping
        Layer -> float64 [client, label, client], inner products of (drift x residual, summed over rounds) of one client
        with the summed residuals of another.
    with_each_other : Mapping
        Layer -> float64 [client, label, client, label], likewise of two of the former.
    """

    totals: np.ndarray
    moments: np.ndarray
    with_totals: Mapping[str, np.ndarray]
    with_each_other: Mapping[str, np.ndarray]

    def unexplained(self, layer: str, products: np.ndarray, clean: np.ndarray) -> np.ndarray:
        """Inner products of what label drift leaves of the summed residuals, float64 [client, client].

        Parameters
        ----------
        layer : str
        products : ndarray, float64 [client, client]
            Inner products of the summed residuals.
        clean : numpy.ndarray
            bool [client], the clients that the regression rests on.
        """
        weights = self.totals @ np.linalg.pinv(self.moments[clean].sum(axis=0), rcond=1e-9, hermitian=True)
        crossed = weights @ self.with_totals[layer][clean].sum(axis=0)
        squared = self.with_each_other[layer][clean][:, :, clean].sum(axis=(0, 2))
        return products - crossed - crossed.T + weights @ squared @ weights.T


def running_drift(model: ModelSpec, clients: np.ndarray) -> "RunningDrift | None":
    """Begins to sum up what the regression needs, whatever clients are to be left out later.

    Parameters
    ----------
    model : ModelSpec
    clients : numpy.ndarray
        str [client], all that will be added.

    Returns
    -------
    RunningDrift or None
        None where the model has no final bias, or one of more than 64 labels, or where clients x labels exceed 4,096.

    Examples
    --------
    >>> from gradlens.examples import example_log
    >>> log = example_log()
    >>> running_drift(log.only("fc1.weight").model, log[-1].clients) is None
    True
    """
    bias = model.final_bias
    if bias is None or model[bias].size > MOST_LABELS or len(clients) * model[bias].size > MOST_SUMS:
        return None
    return RunningDrift(model, bias, len(clients))


class RunningDrift:
    """The sums over the rounds that were added so far.

    Parameters
    ----------
    model : ModelSpec
    bias : str
        The final bias.
    count : int
        Number of clients.
    """

    def __init__(self, model: ModelSpec, bias: str, count: int) -> None:
        self.bias, labels = bias, model[bias].size
        self.sketched = 4 * count * labels * model.num_parameters > IN_FULL
        self.sizes = {name: model[name].size for name in model.parameters if name != bias}
        self.totals, self.moments = np.zeros((count, labels)), np.zeros((count, labels, labels))
        widths = {name: self._width(name, size) for name, size in self.sizes.items()}
        self.crossed = {name: np.zeros((count, labels, width), np.float32) for name, width in widths.items()}

    def _width(self, layer: str, size: int) -> int:
        return sketch_rows(layer, np.zeros((1, size), np.float32)).shape[1] if self.sketched else size

    def add(self, rows: np.ndarray, residuals: Mapping[str, Residuals]) -> None:
        """Adds a round: layer -> residuals of the clients in some rows."""
        drift = residuals[self.bias].clipped(0, self.totals.shape[1]).astype(np.float64)
        self.totals[rows] += drift
        self.moments[rows] += drift[:, :, None] * drift[:, None, :]
        for layer, sums in self.crossed.items():
            size = self.sizes[layer]
            if self.sketched:
                sums[rows] += drift[:, :, None] * sketch_rows(layer, residuals[layer].clipped(0, size))[:, None, :]
                continue
            for start in range(0, size, BLOCK):
                block = residuals[layer].clipped(start, min(start + BLOCK, size))
                sums[rows, :, start : start + BLOCK] += drift[:, :, None] * block[:, None, :]

    def drift(self, accumulated: Accumulated) -> Drift:
        """The inner products of all sums, also with what the same clients accumulated."""
        count, labels = self.totals.shape
        present, with_totals, with_each_other = accumulated.rounds > 0, {}, {}
        for layer, crossed in self.crossed.items():
            sums = accumulated.sums[layer][present]
            if self.sketched and not accumulated.sketched:
                sums = sketch_rows(layer, sums)
            flat = crossed.reshape(count * labels, -1)
            with_totals[layer] = inner_products(flat, sums).reshape(count, labels, count)
            with_each_other[layer] = inner_products(flat).reshape(count, labels, count, labels)
        return Drift(self.totals, self.moments, with_totals, with_each_other)
