"""What adds up over rounds: `Accumulated`, the sum of every client's residuals.

A residual is a client's update minus the coordinate-wise median of that round's comparable clients, its norm clipped.
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

BUDGET = 1_000_000_000  # bytes of accumulated updates held in full; above it they are sketched
CLIP = 3.0  # median residual norms that one round of a client counts at most
SKETCH = 512  # numbers that a sketch keeps of a larger layer


class Rounds(Protocol):
    """A log, as far as this module needs one."""

    model: ModelSpec

    def __getitem__(self, key: int) -> Round: ...


@dataclass(frozen=True, eq=False)
class Accumulated:
    """For every client seen so far, the sum of its residuals over its rounds.

    Layer by layer a residual's norm is clipped at three times the cohort's median residual norm, so that no single
    round decides; a client that is not comparable adds nothing in that round. The sampling noise of local training
    averages out in such a sum, while a systematic conflict of objectives adds up.

    Attributes
    ----------
    clients : numpy.ndarray
        str [client], sorted.
    rounds : numpy.ndarray
        int64 [client], how many rounds were summed; divide a sum by its root to compare clients.
    sums : Mapping
        Layer -> float32 [client, number], read-only.
    lengths, squares : Mapping
        Layer -> float64 [client], the sums of the residuals' norms and of their squares.
    sketched : bool
        Whether the sums are count sketches, to stay within 1 GB; they are linear, so inner products hold in
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
        """The rows of these clients, int64 [client]."""
        return np.searchsorted(self.clients, clients)


@dataclass(eq=False)
class RunningSums:
    """The sums that a log carries from round to round, and which of their arrays somebody still reads."""

    sums: Accumulated
    lent: list[ref[np.ndarray]] = field(default_factory=list)

    def lend(self) -> Accumulated:
        """The sums to read; as long as an array of them, or a part of one, is alive, they are not changed in place."""
        arrays = {name: _lent(array) for name, array in self.sums.sums.items()}
        self.lent = [reader for reader in self.lent if reader() is not None] + [ref(each) for each in arrays.values()]
        return replace(self.sums, sums=arrays)

    @property
    def has_readers(self) -> bool:
        """Whether somebody still reads an array that was lent."""
        return any(reader() is not None for reader in self.lent)


@dataclass(frozen=True)
class Accumulating:
    """One more round of residuals: a step for `UpdateLog.folded`."""

    def __call__(self, before: RunningSums | None, log: Rounds) -> RunningSums:
        """The sums after one more round, as a new value."""
        return RunningSums(_advanced(nothing(log.model) if before is None else before.sums, log[-1], log.model))

    def carry(self, before: RunningSums | None, log: Rounds) -> RunningSums:
        """The same in the arrays of `before`, unless somebody reads them: they can be most of the memory."""
        if before is None or before.has_readers:
            return self(before, log)
        return RunningSums(_advanced(before.sums, log[-1], log.model, in_place=True))


def _lent(array: np.ndarray) -> np.ndarray:
    """A read-only array over the same memory, which every part of it keeps alive."""
    lent = np.asarray(array.data) if array.size else array.copy()
    lent.flags.writeable = False
    return lent


def nothing(model: ModelSpec) -> Accumulated:
    """The sums before the first round."""
    sums = {name: np.zeros((0, model[name].size), np.float32) for name in model.parameters}
    nothing = dict.fromkeys(model.parameters, np.zeros(0))
    return Accumulated(np.zeros(0, np.str_), np.zeros(0, np.int64), sums, nothing, nothing)


def _advanced(before: Accumulated, round_: Round, model: ModelSpec, *, in_place: bool = False) -> Accumulated:
    """The sums after one more round; a new value, so that what was handed out does not change.

    in_place: nobody else holds the arrays of the sums before, which may change: they can be most of the memory.
    """
    clients = np.union1d(before.clients, round_.clients)
    sketched = before.sketched or len(clients) * model.num_parameters * 4 > BUDGET
    seen = np.searchsorted(clients, before.clients)
    rows = np.searchsorted(clients, round_.clients[round_.comparable])
    rounds = np.zeros(len(clients), np.int64)
    rounds[seen] = before.rounds
    rounds[rows] += 1
    sums, lengths, squares = {}, {}, {}
    for name in model.parameters:
        residuals, norms, factors = residuals_of(round_, name)
        lengths[name], squares[name] = np.zeros(len(clients)), np.zeros(len(clients))
        lengths[name][seen], squares[name][seen] = before.lengths[name], before.squares[name]
        lengths[name][rows] += norms * factors
        squares[name][rows] += (norms * factors) ** 2
        past = before.sums[name]
        if sketched:
            past = past if before.sketched else sketch_rows(name, past)
        if in_place and len(past) == len(clients):
            sums[name] = past
        else:
            sums[name] = np.zeros((len(clients), past.shape[1]), np.float32)
            sums[name][seen] = past
        if sketched:
            sums[name][rows] += sketch_rows(name, clipped(residuals, factors, 0, model[name].size))
            continue
        for start in range(0, model[name].size, BLOCK):
            block = clipped(residuals, factors, start, min(start + BLOCK, model[name].size))
            for row, numbers in zip(rows, block, strict=True):
                sums[name][row, start : start + BLOCK] += numbers
    return Accumulated(clients, rounds, sums, lengths, squares, sketched)


def residuals_of(round_: Round, layer: str) -> tuple[Columns, np.ndarray, np.ndarray]:
    """What is added up: (start, stop) -> the comparable clients' updates minus the median's, float32 [client, number];
    the norms of these residuals, float64 [client]; and what clips them at three times their median.
    """
    comparable, median = round_.comparable, round_.median[layer].reshape(-1)
    columns = round_.columns(layer, sketch=True)

    def residuals(start: int, stop: int) -> np.ndarray:
        numbers = columns(start, stop)
        return (numbers if comparable.all() else numbers[comparable]) - median[start:stop]

    norms = np.sqrt(kernels.squares(residuals, int(comparable.sum()), median.size))
    positive = norms[norms > 0]  # among many equal updates the median residual would be 0
    bound = CLIP * np.median(positive) if len(positive) else np.inf
    return residuals, norms, bound / np.maximum(norms, bound) if len(positive) else np.ones(len(norms))


def clipped(residuals: Columns, factors: np.ndarray, start: int, stop: int) -> np.ndarray:
    """These numbers of the residuals, each client's times its factor, float32 [client, number]."""
    block = residuals(start, stop)
    return np.multiply(block, factors.astype(np.float32)[:, None], out=block)


def clipped_residuals(round_: Round, layer: str) -> np.ndarray:
    """Float32 [comparable client, number]: updates minus the median's, norms clipped at three times their median."""
    residuals, _, factors = residuals_of(round_, layer)
    return clipped(residuals, factors, 0, round_.median[layer].size)


def sketch_rows(layer: str, matrix: np.ndarray) -> np.ndarray:
    """The count sketch of each row, float32 [client, at most 512 numbers]; a small layer stays whole."""
    if matrix.shape[1] <= SKETCH:
        return matrix
    sketch = _count_sketch(layer, matrix.shape[1])
    return np.stack([sketch.sketch(row) for row in matrix]) if len(matrix) else np.zeros((0, SKETCH), np.float32)


@lru_cache(maxsize=64)
def _count_sketch(layer: str, size: int) -> CountSketch:
    return CountSketch.of(0, layer, size, SKETCH)  # whoever looks at a log again must get the same
