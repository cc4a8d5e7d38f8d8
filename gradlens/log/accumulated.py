"""Evidence that adds up over rounds: `Accumulated`, the sum of every client's residuals.

A residual is a client's update minus the coordinate-wise median of the round's comparable clients, clipped in norm.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Protocol
from weakref import ref

import numpy as np

from gradlens.log import kernels
from gradlens.log.kernels import BLOCK, Columns
from gradlens.log.model import ModelSpec
from gradlens.log.round import Round
from gradlens.log.sketches import CountSketch

BUDGET = 1_000_000_000  # bytes of accumulated residuals held in full; above it they are sketched
CLIP_RATIO = 3.0  # norm at which a residual is clipped, as a multiple of the cohort's median residual norm
SKETCH_WIDTH = 512  # numbers of the sketch of a layer


class Rounds(Protocol):
    """The part of an `UpdateLog` that this module needs."""

    model: ModelSpec

    def __getitem__(self, key: int) -> Round: ...


@dataclass(frozen=True, eq=False)
class Accumulated:
    """The sum of every client's residuals over the rounds so far; what `UpdateLog.accumulated` returns.

    The noise of local training averages out in such a sum, while a systematic conflict of objectives adds up.

    Attributes
    ----------
    clients : numpy.ndarray
        str [client], sorted.
    rounds : numpy.ndarray
        int64 [client], the number of rounds summed. Divide a sum by its square root to compare clients.
    sums : Mapping
        Layer -> float32 [client, number], read-only.
    lengths, squares : Mapping
        Layer -> float64 [client], the sums of the residuals' norms and of their squares.
    sketched : bool
        Whether the sums are count sketches, which they are where they would take more than 1 GB.

    Notes
    -----
    The residual of client k in layer l is its update minus the coordinate-wise median of the round's comparable
    clients. Its norm is clipped at three times the cohort's median residual norm in that layer, so that no single round
    decides. A client that is not comparable adds nothing in that round. Sketches are linear and keep inner products in
    expectation.

    Examples
    --------
    >>> from gradlens.examples import example_log
    >>> accumulated = example_log(rounds=3).accumulated
    >>> accumulated.rounds[:2].tolist()
    [3, 3]
    >>> accumulated.sums["fc1.weight"].shape
    (10, 128)
    """

    clients: np.ndarray
    rounds: np.ndarray
    sums: Mapping[str, np.ndarray]
    lengths: Mapping[str, np.ndarray]
    squares: Mapping[str, np.ndarray]
    sketched: bool = False

    def of(self, clients: np.ndarray) -> np.ndarray:
        """The rows of some clients, int64 [client]."""
        return np.searchsorted(self.clients, clients)


@dataclass(eq=False)
class RunningSums:
    """The sums that a log carries from round to round, and the arrays of them that readers still hold."""

    sums: Accumulated
    lent: list[ref[np.ndarray]] = field(default_factory=list)

    def lend(self) -> Accumulated:
        """The sums, to be read; they are not changed in place while a reader holds an array of them, or a part."""
        arrays = {name: _lent(array) for name, array in self.sums.sums.items()}
        self.lent = [reader for reader in self.lent if reader() is not None] + [ref(array) for array in arrays.values()]
        return replace(self.sums, sums=arrays)

    @property
    def has_readers(self) -> bool:
        """Whether an array that was lent is still held."""
        return any(reader() is not None for reader in self.lent)


@dataclass(frozen=True)
class Accumulating:
    """One more round of residuals: a step for `UpdateLog.folded`."""

    def __call__(self, before: RunningSums | None, log: Rounds) -> RunningSums:
        """The sums after one more round, in new arrays."""
        return RunningSums(
            _advanced(nothing_accumulated(log.model) if before is None else before.sums, log[-1], log.model)
        )

    def carry(self, before: RunningSums | None, log: Rounds) -> RunningSums:
        """The same in the arrays of `before`, which can be most of the memory, unless they are still read."""
        if before is None or before.has_readers:
            return self(before, log)
        return RunningSums(_advanced(before.sums, log[-1], log.model, in_place=True))


def _lent(array: np.ndarray) -> np.ndarray:
    """A read-only array over the same memory, kept alive by every view of it.

    It rests on a memoryview: numpy would make a view of a view refer to the first array, and forget the one between.
    """
    lent = np.asarray(array.data) if array.size else array.copy()
    lent.flags.writeable = False
    return lent


def nothing_accumulated(model: ModelSpec) -> Accumulated:
    """The sums before the first round."""
    sums = {name: np.zeros((0, model[name].size), np.float32) for name in model.parameters}
    empty = dict.fromkeys(model.parameters, np.zeros(0))
    return Accumulated(np.zeros(0, np.str_), np.zeros(0, np.int64), sums, empty, empty)


def _advanced(before: Accumulated, round_: Round, model: ModelSpec, *, in_place: bool = False) -> Accumulated:
    """The sums after one more round, in new arrays or, `in_place`, in those of the sums before."""
    clients = np.union1d(before.clients, round_.clients)
    sketched = before.sketched or len(clients) * model.num_parameters * 4 > BUDGET
    seen = np.searchsorted(clients, before.clients)
    rows = np.searchsorted(clients, round_.clients[round_.comparable])
    rounds = np.zeros(len(clients), np.int64)
    rounds[seen] = before.rounds
    rounds[rows] += 1
    sums, lengths, squares = {}, {}, {}
    for name in model.parameters:
        residuals = residuals_of(round_, name)
        lengths[name], squares[name] = np.zeros(len(clients)), np.zeros(len(clients))
        lengths[name][seen], squares[name][seen] = before.lengths[name], before.squares[name]
        lengths[name][rows] += residuals.norms * residuals.factors
        squares[name][rows] += (residuals.norms * residuals.factors) ** 2
        past = before.sums[name]
        if sketched:
            past = past if before.sketched else sketch_rows(name, past)
        if in_place and len(past) == len(clients):
            sums[name] = past
        else:
            sums[name] = np.zeros((len(clients), past.shape[1]), np.float32)
            sums[name][seen] = past
        if sketched:
            sums[name][rows] += sketch_rows(name, residuals.clipped(0, model[name].size))
            continue
        for start in range(0, model[name].size, BLOCK):
            block = residuals.clipped(start, min(start + BLOCK, model[name].size))
            for row, numbers in zip(rows, block, strict=True):
                sums[name][row, start : start + BLOCK] += numbers
    return Accumulated(clients, rounds, sums, lengths, squares, sketched)


@dataclass(frozen=True, eq=False)
class Residuals:
    """The residuals of one round's comparable clients in one layer.

    Attributes
    ----------
    columns : callable
        (start, stop) -> those numbers before clipping, float32 [client, number].
    norms : numpy.ndarray
        float64 [client], before clipping.
    factors : numpy.ndarray
        float64 [client], by which clipping multiplies each residual.
    """

    columns: Columns
    norms: np.ndarray
    factors: np.ndarray

    def clipped(self, start: int, stop: int) -> np.ndarray:
        """Some numbers of the clipped residuals, float32 [client, number]."""
        block = self.columns(start, stop)
        return np.multiply(block, self.factors.astype(np.float32)[:, None], out=block)


def residuals_of(round_: Round, layer: str) -> Residuals:
    """The residuals of a round's comparable clients in a layer (`Accumulated`)."""
    comparable, median = round_.comparable, round_.median[layer].reshape(-1)
    columns = round_.columns(layer, sketch=True)

    def residuals(start: int, stop: int) -> np.ndarray:
        numbers = columns(start, stop)
        return (numbers if comparable.all() else numbers[comparable]) - median[start:stop]

    norms = np.sqrt(kernels.squares(residuals, int(comparable.sum()), median.size))
    positive = norms[norms > 0]  # among many identical updates the median norm would be 0
    bound = CLIP_RATIO * np.median(positive) if len(positive) else np.inf
    return Residuals(residuals, norms, bound / np.maximum(norms, bound) if len(positive) else np.ones(len(norms)))


def sketch_rows(layer: str, matrix: np.ndarray) -> np.ndarray:
    """The count sketch of each row, float32 [client, 512]; a layer of at most 512 numbers stays as it is."""
    if matrix.shape[1] <= SKETCH_WIDTH:
        return matrix
    sketch = _count_sketch(layer, matrix.shape[1])
    return np.stack([sketch.sketch(row) for row in matrix]) if len(matrix) else np.zeros((0, SKETCH_WIDTH), np.float32)


@lru_cache(maxsize=64)
def _count_sketch(layer: str, size: int) -> CountSketch:
    return CountSketch.of(0, layer, size, SKETCH_WIDTH)  # a fixed seed, so that a log always gives the same sums
