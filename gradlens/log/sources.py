"""Where the updates of a round come from: arrays in memory or on disk, a selection of clients, or combinations of them.

A `Source` is a mapping layer -> array [client, *shape] that also computes columns, norms, inner products and weighted
means without forming that array. A `Round` rests on one source, whatever kind it is.
"""

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, Self, runtime_checkable

import numpy as np
from scipy import sparse

from gradlens.log import kernels
from gradlens.log.kernels import BLOCK, Columns

DUPLICATE_TOLERANCE = 1e-9  # share of their squares by which the inner products of identical updates may differ


class LazyLayers(Mapping[str, np.ndarray]):
    """A mapping layer -> array that makes each array when it is read.

    Parameters
    ----------
    names : sequence of str
        The layers, in order.
    make : callable
        Layer -> array.
    keep : bool
        Whether an array, once made, is kept.

    Examples
    --------
    >>> squares = LazyLayers(["fc1", "fc2"], lambda name: np.full(2, float(name[-1])) ** 2)
    >>> squares["fc2"]
    array([4., 4.])
    """

    def __init__(self, names: Sequence[str], make: Callable[[str], np.ndarray], *, keep: bool = True) -> None:
        self._names, self._make, self._keep = dict.fromkeys(names), make, keep
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
        """Stores an array that was computed as a by-product, unless there is one."""
        self._made.setdefault(name, array)

    @property
    def held(self) -> tuple[str, ...]:
        """The layers whose arrays are kept at present."""
        return tuple(self._made)

    def forget(self) -> None:
        """Frees every array that is kept; it is made again when it is read."""
        self._made.clear()

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


@dataclass(frozen=True, eq=False)
class Products:
    """What a round has computed from its source, for the selections and combinations of its clients.

    Attributes
    ----------
    gram : Mapping or None
        Layer -> float64 [client, client]; None where there are too many clients to form it.
    norms : Mapping
        Layer -> float64 [client], the norms that belong to `gram`.
    """

    gram: Mapping[str, np.ndarray] | None
    norms: Mapping[str, np.ndarray]


@dataclass(frozen=True, eq=False)
class Judgment:
    """Which clients are finite and comparable, as determined in a larger cohort.

    Attributes
    ----------
    finite : numpy.ndarray
        bool [client].
    comparable : numpy.ndarray or None
        bool [client]; None where it is still to be determined in the round itself.
    """

    finite: np.ndarray
    comparable: np.ndarray | None = None


@runtime_checkable
class Source(Protocol):
    """The updates of one round: layer -> array [client, *shape], and what follows from them."""

    @property
    def judgment(self) -> Judgment | None:
        """Which clients are finite and comparable, where that is known already."""
        ...

    def __getitem__(self, layer: str) -> np.ndarray: ...
    def __iter__(self) -> Iterator[str]: ...
    def __len__(self) -> int: ...

    def shape(self, layer: str) -> tuple[int, ...]:
        """Shape of one client's update of the layer."""
        ...

    def columns(self, layer: str) -> Columns:
        """A function (start, stop) -> those numbers of the layer, [client, number], not copied."""
        ...

    def norms(self, layer: str) -> np.ndarray:
        """L2 norm of every client's update, float64 [client]; independent of the other clients to the last bit."""
        ...

    def gram(self, layer: str, order: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """Inner products, float64 [client, client], and the norms where they were computed along the way.

        Parameters
        ----------
        layer : str
            Its name.
        order : numpy.ndarray
            int [client], the order in which clients enter the matrix products.
        """
        ...

    def weighted_mean(self, layer: str, clients: np.ndarray, weights: np.ndarray, total: float | None) -> np.ndarray:
        """The weighted sum over some clients divided by `total`, or by the sum of the weights, [*shape]."""
        ...

    def take(self, positions: np.ndarray, computed: "Products", judgment: Judgment) -> "Source":
        """The source of the clients at these positions."""
        ...

    def combine(self, mixing: "Mixing", computed: "Products") -> "Source":
        """The source of linear combinations of the clients."""
        ...

    def only(self, layers: Collection[str]) -> "Source":
        """The source of some layers alone."""
        ...


class ArraySource(Mapping[str, np.ndarray]):
    """Arrays, in memory or mapped from a file; sketches are arrays too.

    Parameters
    ----------
    names : sequence of str
        The layers, in order.
    pieces : callable
        Layer -> the arrays that make up [client, *shape] when stacked: several where a file holds several batches, so
        that nothing is copied to read a few columns.

    Examples
    --------
    >>> source = ArraySource(["fc"], lambda _: [np.ones((2, 3), np.float32), np.zeros((1, 3), np.float32)])
    >>> source["fc"].shape
    (3, 3)
    >>> source.columns("fc")(0, 1).ravel().tolist()
    [1.0, 1.0, 0.0]
    """

    judgment: Judgment | None = None

    def __init__(self, names: Sequence[str], pieces: Callable[[str], list[np.ndarray]]) -> None:
        self._names, self.pieces = dict.fromkeys(names), pieces

    @classmethod
    def of(cls, arrays: Mapping[str, np.ndarray]) -> Self:
        """The source of arrays in memory."""
        return cls(tuple(arrays), lambda name: [arrays[name]])

    def __getitem__(self, layer: str) -> np.ndarray:
        if layer not in self._names:
            raise KeyError(layer)
        pieces = self.pieces(layer)
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def shape(self, layer: str) -> tuple[int, ...]:
        """Shape of one client's update of the layer."""
        return self.pieces(layer)[0].shape[1:]

    def columns(self, layer: str) -> Columns:
        """A function (start, stop) -> those numbers of the layer, [client, number]."""
        matrices = [as_matrix(piece) for piece in self.pieces(layer)]
        if len(matrices) == 1:
            return lambda start, stop: matrices[0][:, start:stop]
        return lambda start, stop: np.concatenate([matrix[:, start:stop] for matrix in matrices])

    def norms(self, layer: str) -> np.ndarray:
        """L2 norm of every client's update, float64 [client]."""
        return _norms(self.columns(layer), *self._extent(layer))

    def gram(self, layer: str, order: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """Inner products, float64 [client, client], with identical entries for identical updates; and the norms."""
        return _gram(self.columns(layer), order, self._extent(layer)[1])

    def weighted_mean(self, layer: str, clients: np.ndarray, weights: np.ndarray, total: float | None) -> np.ndarray:
        """The weighted sum over some clients divided by `total`, or by the sum of the weights, [*shape]."""
        shape, columns = self.shape(layer), self.columns(layer)
        out = np.zeros(math.prod(shape), columns(0, 0).dtype)
        if len(clients):
            kernels.weighted_mean(columns, clients, weights, out, total)
        return out.reshape(shape)

    def take(self, positions: np.ndarray, computed: Products, judgment: Judgment) -> Source:
        """The source of the clients at these positions."""
        return SelectedSource(self, positions, computed, judgment)

    def combine(self, mixing: "Mixing", computed: Products) -> Source:
        """The source of linear combinations of the clients."""
        return CombinedSource(self, mixing, computed)

    def only(self, layers: Collection[str]) -> Source:
        """The source of some layers alone."""
        return ArraySource([name for name in self._names if name in layers], self.pieces)

    def _extent(self, layer: str) -> tuple[int, int]:
        return sum(map(len, self.pieces(layer))), math.prod(self.shape(layer))


class SelectedSource(Mapping[str, np.ndarray]):
    """Some of the clients of a source; their inner products and norms are not computed again.

    Parameters
    ----------
    whole : Source
        All clients.
    positions : numpy.ndarray
        int64 [client], the chosen ones.
    computed : Products
        Inner products and norms of all clients.
    judgment : Judgment
        Which of the chosen ones are finite and comparable.
    """

    def __init__(self, whole: Source, positions: np.ndarray, computed: Products, judgment: Judgment) -> None:
        self.whole, self.positions, self._computed, self.judgment = whole, positions, computed, judgment

    def __getitem__(self, layer: str) -> np.ndarray:
        return self.whole[layer][self.positions]

    def __iter__(self) -> Iterator[str]:
        return iter(self.whole)

    def __len__(self) -> int:
        return len(self.whole)

    def shape(self, layer: str) -> tuple[int, ...]:
        """Shape of one client's update of the layer."""
        return self.whole.shape(layer)

    def columns(self, layer: str) -> Columns:
        """A function (start, stop) -> those numbers of the layer, [client, number]."""
        columns = self.whole.columns(layer)
        return lambda start, stop: columns(start, stop)[self.positions]

    def norms(self, layer: str) -> np.ndarray:
        """L2 norm of every client's update, float64 [client]."""
        return self._computed.norms[layer][self.positions]

    def gram(self, layer: str, order: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """Inner products, float64 [client, client]."""
        if self._computed.gram is None:
            return _gram(self.columns(layer), order, math.prod(self.shape(layer)))
        return self._computed.gram[layer][np.ix_(self.positions, self.positions)], None

    def weighted_mean(self, layer: str, clients: np.ndarray, weights: np.ndarray, total: float | None) -> np.ndarray:
        """The weighted sum over some clients divided by `total`, or by the sum of the weights, [*shape]."""
        return self.whole.weighted_mean(layer, self.positions[clients], weights, total)

    def take(self, positions: np.ndarray, computed: Products, judgment: Judgment) -> Source:
        """The source of the clients at these positions."""
        return SelectedSource(self, positions, computed, judgment)

    def combine(self, mixing: "Mixing", computed: Products) -> Source:
        """The source of linear combinations of the clients."""
        return CombinedSource(self, mixing, computed)

    def only(self, layers: Collection[str]) -> Source:
        """The source of some layers alone, by which clients are found finite and comparable anew."""
        whole, positions = self.whole.only(layers), self.positions
        return ArraySource(tuple(whole), lambda name: [whole[name][positions]])


@dataclass(frozen=True, eq=False)
class Mixing:
    """How new clients are mixed from those of a round.

    Attributes
    ----------
    matrix : scipy.sparse.csr_array
        float64 [new, client], for parameters.
    shares : scipy.sparse.csr_array
        float64 [new, client], for buffers; every row has sum 1.
    order : numpy.ndarray
        int [client], positions in the order of the clients' names, so that sums do not depend on the order of arrival.
    buffers : tuple of str
        The layers that are mixed by shares.
    """

    matrix: sparse.csr_array
    shares: sparse.csr_array
    order: np.ndarray
    buffers: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.matrix.indptr) - 1

    def after(self, first: "Mixing") -> "Mixing":
        """The mixing that does both: first `first`, then this one."""
        matrix = sparse.csr_array(self.matrix @ first.matrix)
        return Mixing(matrix, sparse.csr_array(self.shares @ first.shares), first.order, self.buffers)

    def of(self, layer: str) -> tuple[sparse.csr_array, np.ndarray]:
        """The matrix [new, used client] for a layer, and the positions of the clients that are used."""
        used = self.order[np.isin(self.order, self.shares.indices)]
        return sparse.csr_array((self.shares if layer in self.buffers else self.matrix)[:, used]), used

    def rows(self, positions: np.ndarray) -> "Mixing":
        """The mixing of some of the new clients."""
        return Mixing(self.matrix[positions], self.shares[positions], self.order, self.buffers)


class CombinedSource(Mapping[str, np.ndarray]):
    """Linear combinations of a source's clients, formed only when their numbers are read.

    Parameters
    ----------
    base : Source
        The clients that are mixed.
    mixing : Mixing
        How they are mixed.
    computed : Products
        Inner products and norms of the clients that are mixed.
    """

    def __init__(self, base: Source, mixing: Mixing, computed: Products) -> None:
        self._base, self._mixing, self._computed = base, mixing, computed
        self.judgment: Judgment | None = Judgment(np.ones(len(mixing), dtype=bool))

    def __getitem__(self, layer: str) -> np.ndarray:
        columns, shape = self.columns(layer), self.shape(layer)
        out = np.empty((len(self._mixing), math.prod(shape)), columns(0, 0).dtype)
        for start in range(0, out.shape[1], BLOCK):
            out[:, start : start + BLOCK] = columns(start, min(start + BLOCK, out.shape[1]))
        return out.reshape(len(out), *shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._base)

    def __len__(self) -> int:
        return len(self._base)

    def shape(self, layer: str) -> tuple[int, ...]:
        """Shape of one combination's update of the layer."""
        return self._base.shape(layer)

    def columns(self, layer: str) -> Columns:
        """A function (start, stop) -> those numbers of the combinations, [new, number], summed in float64."""
        (mixing, used), columns = self._mixing.of(layer), self._base.columns(layer)
        dtype = columns(0, 0).dtype

        def numbers(start: int, stop: int) -> np.ndarray:
            mixed = mixing @ columns(start, stop)[used].astype(np.float64)
            return np.asarray(np.rint(mixed) if np.issubdtype(dtype, np.integer) else mixed, dtype)

        return numbers

    def norms(self, layer: str) -> np.ndarray:
        """L2 norms of the combinations, float64 [new]; where clients are only scaled, from their own norms."""
        mixing, used = self._mixing.of(layer)
        if (np.diff(mixing.indptr) == 1).all():
            return np.abs(mixing.data) * self._computed.norms[layer][used[mixing.indices]]
        return _norms(self.columns(layer), len(self._mixing), math.prod(self.shape(layer)))

    def gram(self, layer: str, order: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """Inner products of the combinations, float64 [new, new]; identical combinations have identical entries."""
        if self._computed.gram is None:
            return _gram(self.columns(layer), order, math.prod(self.shape(layer)))
        mixing, used = self._mixing.of(layer)
        gram = mixing @ self._computed.gram[layer][np.ix_(used, used)] @ mixing.T
        first = _first_equal(mixing)
        return ((gram + gram.T) / 2)[np.ix_(first, first)], None

    def weighted_mean(self, layer: str, clients: np.ndarray, weights: np.ndarray, total: float | None) -> np.ndarray:
        """The weighted sum over some combinations, as a sum over the clients that they are made of."""
        mixing, used = self._mixing.of(layer)
        per_client = sparse.csc_array(mixing[clients].T) @ weights  # added up in the order of the rows
        divisor = float(weights.sum()) if total is None else total
        return self._base.weighted_mean(layer, used if len(clients) else clients, per_client, divisor)

    def take(self, positions: np.ndarray, computed: Products, judgment: Judgment) -> Source:
        """The source of the combinations at these positions."""
        part = CombinedSource(self._base, self._mixing.rows(positions), self._computed)
        part.judgment = judgment
        return part

    def combine(self, mixing: Mixing, computed: Products) -> Source:
        """The source of linear combinations of the combinations."""
        return CombinedSource(self._base, mixing.after(self._mixing), self._computed)

    def only(self, layers: Collection[str]) -> Source:
        """The source of some layers alone."""
        return CombinedSource(self._base.only(layers), self._mixing, self._computed)


def shares_of(matrix: sparse.csr_array) -> sparse.csr_array:
    """Absolute values of each row over their sum."""
    sizes = abs(matrix)
    return sparse.csr_array(sizes.multiply(1 / sizes.sum(axis=1)[:, None]))


def as_matrix(array: np.ndarray) -> np.ndarray:
    """An array [client, *shape] as a matrix [client, number]."""
    return array.reshape(len(array), math.prod(array.shape[1:]))


def _norms(columns: Columns, count: int, size: int) -> np.ndarray:
    return np.sqrt(kernels.squares(columns, count, size))


def _gram(columns: Columns, order: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    gram, squares = kernels.gram(columns, order, size)
    return with_identical_entries(gram, columns, size), np.sqrt(squares)


def with_identical_entries(gram: np.ndarray, columns: Columns, size: int) -> np.ndarray:
    """Gives identical updates identical Gram entries; otherwise rounding would depend on client order."""
    squares = np.diagonal(gram)
    with np.errstate(invalid="ignore"):  # of clients that are not finite
        near = np.abs(gram - squares[:, None]) <= DUPLICATE_TOLERANCE * squares[:, None]
    near &= near.T
    done = np.zeros(len(gram), dtype=bool)
    for client in np.flatnonzero(near.sum(axis=1) > 1):
        for other in np.flatnonzero(near[client] & ~done):
            if other > client and _are_identical(columns, client, other, size):
                gram[other], done[other] = gram[client], True
                gram[:, other] = gram[:, client]
    return gram


def _are_identical(columns: Columns, one: np.intp, other: np.intp, size: int) -> bool:
    blocks = (columns(start, min(start + BLOCK, size)) for start in range(0, size, BLOCK))
    return all(np.array_equal(block[one], block[other]) for block in blocks)


def _first_equal(matrix: sparse.csr_array) -> np.ndarray:
    """For each row the first row identical to it, int [row]."""
    seen: dict[bytes, int] = {}
    rows = (slice(*matrix.indptr[row : row + 2]) for row in range(len(matrix.indptr) - 1))
    keys = (matrix.indices[row].tobytes() + matrix.data[row].tobytes() for row in rows)
    return np.array([seen.setdefault(key, row) for row, key in enumerate(keys)], np.int64)
