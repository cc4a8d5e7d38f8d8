"""Layers that are made when they are asked for: `LazyLayers`, and linear combinations of clients: `Combination`."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import numpy as np
from scipy import sparse

from gradlens.log import kernels
from gradlens.log.kernels import BLOCK, Columns

if TYPE_CHECKING:
    from gradlens.log.round import Round


class LazyLayers(Mapping[str, np.ndarray]):
    """A mapping layer -> array that makes an array when it is asked for; `keep`: once only.

    `pieces` gives an array as several stacked ones, where joining them would copy it.
    """

    def __init__(
        self,
        names: Sequence[str],
        make: Callable[[str], np.ndarray],
        *,
        keep: bool = True,
        pieces: Callable[[str], list[np.ndarray]] | None = None,
    ) -> None:
        self._names, self._make, self._keep = dict.fromkeys(names), make, keep
        self.pieces = pieces or (lambda name: [self[name]])
        self.combination: Combination | None = None
        self._made: dict[str, np.ndarray] = {}

    def __getitem__(self, name: str) -> np.ndarray:
        if name in self._made:
            return self._made[name]
        if name not in self._names:
            raise KeyError(name)
        array = self._make(name)
        if self._keep:
            self._made[name] = array
        return array

    def give(self, name: str, array: np.ndarray) -> None:
        """Puts in an array that was found on the way, where it is not there yet."""
        self._made.setdefault(name, array)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


@dataclass(frozen=True, eq=False)
class Combination:
    """Linear combinations of the clients of a round, of which nothing is copied: what `Round.combined` builds.

    matrix: [new, client]; used: positions of the clients that have a part in it, in the order of their names, so that
    sums do not hang on the order of arrival; shares: [new, client], how buffers are mixed, every row of sum 1.
    """

    base: "Round"
    matrix: sparse.csr_array
    shares: sparse.csr_array
    used: np.ndarray

    @classmethod
    def of(cls, base: "Round", matrix: sparse.csr_array, shares: sparse.csr_array) -> Self:
        """The combinations of the clients of a round by a matrix, and by the shares for its buffers."""
        order = np.argsort(base.clients)
        return cls(base, matrix, shares, order[np.isin(order, shares.indices)])

    def __len__(self) -> int:
        return len(self.matrix.indptr) - 1

    def rows(self, positions: np.ndarray) -> Self:
        """The combinations at these positions."""
        return type(self).of(self.base, self.matrix[positions], self.shares[positions])

    def layers(self, names: tuple[str, ...]) -> "LazyLayers":
        """Layer -> [new, *shape], formed anew each time."""

        def make(layer: str) -> np.ndarray:
            shape = np.shape(self.base.global_model[layer])
            size = math.prod(shape)
            columns, dtype = self.columns(layer, layer in self.base.buffers), self.base.updates[layer].dtype
            out = np.empty((len(self), size), dtype)
            for start in range(0, size, BLOCK):
                out[:, start : start + BLOCK] = columns(start, min(start + BLOCK, size))
            return out.reshape(len(out), *shape)

        layers = LazyLayers(names, make, keep=False)
        layers.combination = self
        return layers

    def _mixing(self, buffer: bool) -> sparse.csr_array:
        return sparse.csr_array((self.shares if buffer else self.matrix)[:, self.used])

    def columns(self, layer: str, buffer: bool) -> Columns:
        """(start, stop) -> these numbers of the combinations, [new, number], summed in float64."""
        mixing, columns, dtype = self._mixing(buffer), self.base.columns(layer), self.base.updates[layer].dtype

        def numbers(start: int, stop: int) -> np.ndarray:
            mixed = mixing @ columns(start, stop)[self.used].astype(np.float64)
            return np.asarray(np.rint(mixed) if np.issubdtype(dtype, np.integer) else mixed, dtype)

        return numbers

    def gram(self, layer: str) -> np.ndarray:
        """Inner products of the combinations, float64 [new, new]; equal combinations have equal entries."""
        mixing = self._mixing(buffer=False)
        gram = mixing @ self.base.gram[layer][np.ix_(self.used, self.used)] @ mixing.T
        first = _first_equal(mixing)
        return ((gram + gram.T) / 2)[np.ix_(first, first)]

    def norms(self, layer: str) -> np.ndarray:
        """L2 norms of the combinations, float64 [new]; of scaled clients from their own, without inner products."""
        mixing = self._mixing(buffer=False)
        if (np.diff(mixing.indptr) == 1).all():
            return np.abs(mixing.data) * self.base.norms[layer][self.used[mixing.indices]]
        size = np.size(self.base.global_model[layer])
        return np.sqrt(kernels.squares(self.columns(layer, buffer=False), len(self), size))

    def weighted_mean(self, layer: str, buffer: bool, rows: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """The mean of these combinations by weights [row], as a sum over the clients that they are made of."""
        mixing = self._mixing(buffer)[rows]
        per_client = sparse.csc_array(mixing.T) @ weights  # added up in the order of the rows
        return self.base.weighted_sum(layer, self.used, per_client, float(weights.sum()))


def shares_of(matrix: sparse.csr_array) -> sparse.csr_array:
    """Absolute values of each row over their sum."""
    sizes = abs(matrix)
    return sparse.csr_array(sizes.multiply(1 / sizes.sum(axis=1)[:, None]))


def _first_equal(matrix: sparse.csr_array) -> np.ndarray:
    """For each row the first one that equals it, int [row]."""
    seen: dict[bytes, int] = {}
    rows = (slice(*matrix.indptr[row : row + 2]) for row in range(len(matrix.indptr) - 1))
    keys = (matrix.indices[row].tobytes() + matrix.data[row].tobytes() for row in rows)
    return np.array([seen.setdefault(key, row) for row, key in enumerate(keys)], np.int64)
