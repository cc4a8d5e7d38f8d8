"""Numerical kernels: single passes over the numbers of a layer, in blocks that fit the processor's cache.

All results are reproducible to the last bit. Rows are summed in the order that the caller gives, and matrix products
run in one thread, because several threads sum in a different order each time.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import cache
from itertools import pairwise

import numpy as np

BLOCK = 1 << 14  # columns (numbers of a layer) processed at a time
ROW_PADDING = 24  # unused numbers after each row of a scratch matrix: strides of a power of two share cache lines
TILE_ROWS, TILE_COLUMNS = 20, 2_048  # size of the matrix products that BLAS computes fastest
MOST_TILED_ROWS = 64  # rows up to which a Gram matrix is computed in such tiles
SINGLE_THREAD_SIZE = 9_000  # numbers of a matrix below which BLAS starts no threads for a product with a vector
DENSE_EIGEN_ROWS = 1_000  # rows up to which eigenvectors come from the dense solver, above it from Lanczos' iteration
NETWORK_ROWS = 32  # rows up to which a trimmed mean uses a sorting network, above it each column is sorted

Columns = Callable[[int, int], np.ndarray]  # (start, stop) -> those columns of a matrix, [row, number]


def squares(columns: Columns, count: int, size: int) -> np.ndarray:
    """The sum of squares of each row, float64 [row]; independent of all other rows to the last bit."""
    total = np.zeros(count)
    with np.errstate(all="ignore"), one_blas_thread(count * size):
        for _, numbers in _float64(columns, range(count), size, count):
            total += _row_squares(numbers)
    return total


def gram(columns: Columns, order: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """The Gram matrix of all rows and their sums of squares.

    Parameters
    ----------
    columns : callable
        (start, stop) -> those columns, [row, number].
    order : numpy.ndarray
        int [row], the order in which the rows enter the matrix products.
    size : int
        Number of columns.

    Returns
    -------
    gram : numpy.ndarray
        float64 [row, row], in the order of `columns`.
    squares : numpy.ndarray
        float64 [row], equal to those of `squares` to the last bit, unlike the diagonal of `gram`.
    """
    count = len(order)
    tiled = count <= MOST_TILED_ROWS
    parts = -(-count // TILE_ROWS) if tiled else 1
    edges = [count * part // parts for part in range(parts + 1)] if count else [0]
    tiles = list(pairwise(edges))
    step, zeros = (TILE_COLUMNS, 1) if tiled else (BLOCK, 0)
    total, squared = np.zeros((count, count)), np.zeros(count)
    with np.errstate(all="ignore"), one_blas_thread(count * size):
        for _, block in _float64(columns, order, size, count, zeros):
            squared += _row_squares(block[:count])
            for start in range(0, block.shape[1], step):
                numbers = block[:, start : start + step]
                for place, (top, bottom) in enumerate(tiles):
                    for left, right in tiles[place:]:
                        # One row of zeros more than needed: for the product of a matrix with its own transpose numpy
                        # calls BLAS's symmetric routine, which takes twice as long as the general one for few rows.
                        product = numbers[top:bottom] @ numbers[left : right + zeros].T
                        total[top:bottom, left:right] += product[:, : right - left]
    upper, place = np.triu(total), np.argsort(order)
    return (upper + np.triu(upper, 1).T)[np.ix_(place, place)], squared[place]


def inner_products(rows: np.ndarray, others: np.ndarray | None = None) -> np.ndarray:
    """Inner products of the rows of one wide matrix with those of another, summed in float64 block by block.

    Parameters
    ----------
    rows : numpy.ndarray
        [row, number].
    others : numpy.ndarray, optional
        [other, number]; by default the same rows.

    Returns
    -------
    numpy.ndarray
        float64 [row, other].

    Examples
    --------
    >>> inner_products(np.array([[1.0, 2.0], [0.0, 3.0]])).tolist()
    [[5.0, 6.0], [6.0, 9.0]]
    """
    total = np.zeros((len(rows), len(rows if others is None else others)))
    for start in range(0, rows.shape[1], BLOCK):
        block = rows[:, start : start + BLOCK].astype(np.float64)
        other = block if others is None else others[:, start : start + BLOCK].astype(np.float64)
        total += block @ other.T
    return total


def _row_squares(numbers: np.ndarray) -> np.ndarray:
    return (numbers[:, None, :] @ numbers[:, :, None])[:, 0, 0]


def weighted_mean(
    columns: Columns, rows: np.ndarray, weights: np.ndarray, out: np.ndarray, total: float | None = None
) -> np.ndarray:
    """The weighted mean of some rows, summed in float64.

    Parameters
    ----------
    columns : callable
        (start, stop) -> those columns, [row, number].
    rows : numpy.ndarray
        int [chosen], the rows in the order in which they are summed.
    weights : numpy.ndarray
        float64 [chosen].
    out : numpy.ndarray
        [number], filled and returned. Integers are rounded; values beyond the range of its type become infinite.
    total : float, optional
        What the weighted sum is divided by; by default the sum of the weights.
    """
    size, total = len(out), weights.sum() if total is None else total
    with np.errstate(all="ignore"), one_blas_thread(len(rows) * size):
        for start, numbers in _float64(columns, rows, size, len(rows)):
            mean = weights @ numbers / total
            if np.issubdtype(out.dtype, np.integer):
                mean = np.rint(mean.round(6))  # 1.5, or the last digit below it, become the same integer
            out[start : start + len(mean)] = mean
    return out


def _float64(
    columns: Columns, rows: Sequence[int] | np.ndarray, size: int, count: int, zeros: int = 0
) -> Iterator[tuple[int, np.ndarray]]:
    """Some rows block by block: where a block starts and float64 [count + zeros, number], overwritten by the next."""
    width = min(size, columns_per_block(count))
    scratch = np.empty((count + zeros, width + ROW_PADDING))
    scratch[count:] = 0
    for start in range(0, size, max(1, width)):
        block = columns(start, min(start + width, size))
        for place, row in enumerate(rows):
            scratch[place, : block.shape[1]] = block[row]
        yield start, scratch[:, : block.shape[1]]


def two_leading(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The two largest eigenvalues of a symmetric matrix in ascending order, [2], and their eigenvectors, [row, 2].

    Above 1,000 rows they come from Lanczos' iteration with a fixed start, in a fraction of the time.
    """
    from scipy.linalg import eigh

    count = len(matrix)
    if count > DENSE_EIGEN_ROWS:
        from scipy.sparse.linalg import ArpackNoConvergence, eigsh

        with suppress(ArpackNoConvergence):  # where eigenvalues nearly coincide
            values, vectors = eigsh(matrix, k=2, v0=np.random.default_rng(0).standard_normal(count))
            order = np.argsort(values)
            return values[order], vectors[:, order]
    return eigh(matrix, subset_by_index=[count - 2, count - 1])


def trimmed_mean(columns: Columns, rows: np.ndarray, trimmed: int, out: np.ndarray) -> np.ndarray:
    """The mean of each column without its `trimmed` smallest and largest values, summed in float64.

    Parameters
    ----------
    columns : callable
        (start, stop) -> those columns, [row, number].
    rows : numpy.ndarray
        int [chosen], rows that are finite, in the order in which they are compared.
    trimmed : int
        How many values are left out at each end.
    out : numpy.ndarray
        [number], filled and returned.
    """
    if len(rows) > NETWORK_ROWS:
        return trimmed_mean_of_sorted(lambda start, stop: sorted_columns(columns, rows, start, stop), trimmed, out)
    size = len(out)
    plan, kept = _network(len(rows), trimmed)
    width = min(size, BLOCK)
    scratch, numbers = np.empty((len(rows) + 1, width), np.float32), np.empty((len(kept), width + ROW_PADDING))
    ones = np.ones(len(kept))
    with one_blas_thread(len(rows) * size):
        for start in range(0, size, width):
            block = columns(start, min(start + width, size))
            wires = list(scratch[:, : block.shape[1]])
            for wire, row in zip(wires, rows, strict=False):
                wire[...] = block[row]
            spare = wires.pop()
            for low, high, want_low, want_high in plan:
                one, other = wires[low], wires[high]
                if want_low and want_high:
                    np.minimum(one, other, out=spare)
                    np.maximum(one, other, out=other)
                    wires[low], spare = spare, one
                elif want_low:
                    np.minimum(one, other, out=one)
                else:
                    np.maximum(one, other, out=other)
            middle = numbers[:, : block.shape[1]]
            for place, wire in enumerate(kept):
                middle[place] = wires[wire]
            out[start : start + width] = ones @ middle / len(kept)
    return out


def trimmed_mean_of_sorted(columns: Columns, trimmed: int, out: np.ndarray) -> np.ndarray:
    """As `trimmed_mean`, for columns that are sorted already: (start, stop) -> [number, rank]."""
    size, width = len(out), BLOCK // 4
    with one_blas_thread():
        for start in range(0, size, width):
            ranks = columns(start, min(start + width, size))
            middle = ranks[:, trimmed : ranks.shape[1] - trimmed].astype(np.float64)
            out[start : start + width] = middle @ np.ones(middle.shape[1]) / middle.shape[1]
    return out


def sorted_columns(columns: Columns, rows: np.ndarray, start: int, stop: int) -> np.ndarray:
    """The values of some finite rows in ascending order, float32 [number, rank]; two threads sort long layers."""
    ordered, width = np.empty((stop - start, len(rows)), np.float32), BLOCK // 4
    half = (start + stop) // 2

    def sort(first: int, last: int) -> None:
        scratch = np.empty((len(rows), min(last - first, width) + ROW_PADDING), np.float32)
        for at in range(first, last, width):
            end = min(at + width, last)
            block, part = scratch[:, : end - at], ordered[at - start : end - start]
            block[...] = columns(at, end)[rows]
            part[...] = block.T
            part.sort(axis=1)  # on contiguous numbers, several times faster than along columns

    if half - start < 2 * width:
        sort(start, stop)
    else:
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(sort, (start, half), (half, stop)))
    return ordered


@cache
def _network(count: int, trimmed: int) -> tuple[list[tuple[int, int, bool, bool]], list[int]]:
    """A sorting network [1]_ that selects the values left after trimming, without sorting them.

    Comparisons that would only order the values that are kept, or only those that are trimmed, are left out.

    Parameters
    ----------
    count : int
        Number of wires (values to compare).
    trimmed : int
        How many values are left out at each end.

    Returns
    -------
    plan : list of tuples
        (low wire, high wire, whether the lesser value is needed later, whether the greater one is): after a comparison
        the low wire holds the lesser value and the high wire the greater one.
    kept : list of int
        The wires that hold the kept values at the end.

    References
    ----------
    .. [1] Batcher 1968, "Sorting networks and their applications"; odd-even merge of two sequences of any lengths.
    """
    pairs: list[tuple[int, int]] = []

    def merged(one: list[int], other: list[int]) -> list[int]:
        if not one or not other:
            return one or other
        if len(one) == len(other) == 1:
            pairs.append((one[0], other[0]))
            return one + other
        odd, even = merged(one[::2], other[::2]), merged(one[1::2], other[1::2])
        between = list(zip(even, odd[1:], strict=False))
        pairs.extend(between)
        return [odd[0], *(wire for pair in between for wire in pair), *even[len(odd) - 1 :], *odd[len(even) + 1 :]]

    def in_order(wires: list[int]) -> list[int]:
        half = len(wires) // 2
        return merged(in_order(wires[:half]), in_order(wires[half:])) if half else wires

    order = in_order(list(range(count)))
    kept = set(order[trimmed : count - trimmed])
    untouched, wanted, plan = set(order), set(kept), []
    for low, high in reversed(pairs):
        if {low, high} <= untouched and (low in kept) == (high in kept):
            continue
        untouched -= {low, high}
        if {low, high} & wanted:
            plan.append((low, high, low in wanted, high in wanted))
            wanted |= {low, high}
    return plan[::-1], sorted(kept)


def columns_per_block(count: int) -> int:
    """How many columns of `count` rows are processed at a time: about 8 MB of float64 at most."""
    return max(512, min(BLOCK, (1 << 20) // max(1, count) // 512 * 512))


@contextmanager
def one_blas_thread(numbers: int = BLOCK) -> Iterator[None]:
    """Runs the matrix products inside in one thread, so that they sum in a fixed order.

    On few or shared cores one thread is also faster than several.

    Parameters
    ----------
    numbers : int
        Size of the matrices; BLAS uses one thread for small ones anyway, and then the setting is not touched.
    """
    if numbers < SINGLE_THREAD_SIZE:
        yield
        return
    before = [count() for count, _ in _blas()]
    for _, limit in _blas():
        limit(1)
    try:
        yield
    finally:
        for threads, (_, limit) in zip(before, _blas(), strict=True):
            limit(threads)


@cache
def _blas() -> list[tuple[Callable[[], int], Callable[[int], None]]]:
    """How to get and to set the number of threads of each BLAS library that is loaded."""
    from threadpoolctl import ThreadpoolController

    libraries = ThreadpoolController().select(user_api="blas").lib_controllers
    return [(library.get_num_threads, library.set_num_threads) for library in libraries]
