"""What a client's labels explain of its residuals: a regression on label drift that can leave any clients out.

A client's labels show in its final-bias update, round by round: its label drift. Each layer's residuals are regressed
on it over all rounds of the clean clients. Which clients those are is not known when the rounds are read, so that the
sums of the regression are kept client by client, as inner products.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from gradlens.log import ModelSpec, Round, UpdateLog
from gradlens.log.accumulated import residuals_of, sketch_rows
from gradlens.log.round import BLOCK

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


def drift_of(log: UpdateLog, clients: np.ndarray) -> Drift | None:
    """Sums up what the regression needs, whatever clients are to be left out later.

    Parameters
    ----------
    log : UpdateLog
    clients : numpy.ndarray
        str [client], sorted, those that were comparable in a round.

    Returns
    -------
    Drift or None
        None where the model has no final bias, or one of more than 64 labels, or where clients x labels exceed 4,096.

    Examples
    --------
    >>> from gradlens.examples import example_log
    >>> log = example_log()
    >>> drift = drift_of(log, log[-1].clients)
    >>> drift.totals.shape, sorted(drift.with_totals)
    ((10, 4), ['fc1.bias', 'fc1.weight', 'fc2.weight'])
    """
    bias = log.model.final_bias
    if bias is None or log.model[bias].size > MOST_LABELS or len(clients) * log.model[bias].size > MOST_SUMS:
        return None
    running = _Running(log.model, clients, log.model[bias].size)
    for round_ in log:
        running.add(round_, bias)
    return running.drift(log)


class _Running:
    """The sums over the rounds that were added so far; crossed: layer -> float32 [client, label, number]."""

    def __init__(self, model: ModelSpec, clients: np.ndarray, labels: int) -> None:
        count = len(clients)
        self.sketched = 4 * count * labels * model.num_parameters > IN_FULL
        self.clients, self.layers = clients, [name for name in model.parameters if name != model.final_bias]
        self.totals, self.moments = np.zeros((count, labels)), np.zeros((count, labels, labels))
        widths = {name: self._width(name, model[name].size) for name in self.layers}
        self.crossed = {name: np.zeros((count, labels, width), np.float32) for name, width in widths.items()}

    def _width(self, layer: str, size: int) -> int:
        return sketch_rows(layer, np.zeros((1, size), np.float32)).shape[1] if self.sketched else size

    def add(self, round_: Round, bias: str) -> None:
        """Adds a round."""
        rows = np.searchsorted(self.clients, round_.clients[round_.comparable])
        if not len(rows):
            return
        labels = self.totals.shape[1]
        drift = residuals_of(round_, bias).clipped(0, labels).astype(np.float64)
        self.totals[rows] += drift
        self.moments[rows] += drift[:, :, None] * drift[:, None, :]
        for layer, sums in self.crossed.items():
            residuals, size = residuals_of(round_, layer), round_.median[layer].size
            if self.sketched:
                sums[rows] += drift[:, :, None] * sketch_rows(layer, residuals.clipped(0, size))[:, None, :]
                continue
            for start in range(0, size, BLOCK):
                block = residuals.clipped(start, min(start + BLOCK, size))
                sums[rows, :, start : start + BLOCK] += drift[:, :, None] * block[:, None, :]

    def drift(self, log: UpdateLog) -> Drift:
        """The inner products of all sums."""
        accumulated, (count, labels) = log.accumulated, self.totals.shape
        rows, with_totals, with_each_other = accumulated.of(self.clients), {}, {}
        for layer, crossed in self.crossed.items():
            sums = accumulated.sums[layer][rows]
            if self.sketched and not accumulated.sketched:
                sums = sketch_rows(layer, sums)
            flat = crossed.reshape(count * labels, -1)
            products, squares = np.zeros((len(flat), count)), np.zeros((len(flat), len(flat)))
            for start in range(0, flat.shape[1], BLOCK):
                block = flat[:, start : start + BLOCK].astype(np.float64)
                products += block @ sums[:, start : start + BLOCK].astype(np.float64).T
                squares += block @ block.T
            with_totals[layer] = products.reshape(count, labels, count)
            with_each_other[layer] = squares.reshape(count, labels, count, labels)
        return Drift(self.totals, self.moments, with_totals, with_each_other)
