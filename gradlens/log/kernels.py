"""What takes time in a record: single passes over the numbers of a layer, in blocks that stay near the processor.

None of them changes a bit with the order of the clients or from run to run: rows are added up in the order that the
caller gives, and the matrix products run in one thread, since several add up in another order each time.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import cache
from itertools import pairwise

import numpy as np

BLOCK = 1 << 14  # numbers of a layer that are worked on at a time
PAD = 24  # numbers between the rows of a scratch matrix: at powers of two they share the lines of a cache
TILE = 20  # clients whose products, in slices of 2,048 numbers, BLAS forms fastest
TILED = 64  # clients up to which products are formed in such tiles
ALONE = 9_000  # numbers of a matrix below which no BLAS starts threads for a product with a vector
LANCZOS = 1_000  # rows of a symmetric matrix above which only its leading eigenvectors are sought
NETWORK = 32  # clients up to which whole rows are compared; above, each column is sorted for itself

Columns = Callable[[int, int], np.ndarray]  # (start, stop) -> those columns of a matrix, [row, number]


def squares(columns: Columns, count: int, size: int) -> np.ndarray:
    """The sum of squares of each row, float64 [row]; rests on that row alone, to the last bit."""
    total = np.zeros(count)
    with np.errstate(all="ignore"), one_blas_thread(count * size):
        for _, numbers in _float64(columns, range(count), size, count):
            total += _row_squares(numbers)
    return total


def gram(columns: Columns, order: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Inner products of all pairs of rows, float64 [row, row], formed with the rows in this order; and `squares`.

    The squares are those of `squares` to the last bit, the diagonal of the products is not.
    """
    count = len(order)
    parts = -(-count // TILE) if count <= TILED else 1
    edges = [count * part // parts for part in range(parts + 1)] if count else [0]
    tiles = list(pairwise(edges))
    step, zeros = (2_048, 1) if count <= TILED else (BLOCK, 0)
    total, own = np.zeros((count, count)), np.zeros(count)
    with np.errstate(all="ignore"), one_blas_thread(count * size):
        for _, block in _float64(columns, order, size, count, zeros):
            own += _row_squares(block[:count])
            for start in range(0, block.shape[1], step):
                numbers = block[:, start : start + step]
                for place, (top, bottom) in enumerate(tiles):
                    for left, right in tiles[place:]:
                        # One row more than needed: numpy takes the product of a matrix with itself to BLAS's symmetric
                        # routine, which for few rows takes twice as long as the general one.
                        product = numbers[top:bottom] @ numbers[left : right + zeros].T
                        total[top:bottom, left:right] += product[:, : right - left]
    upper, place = np.triu(total), np.argsort(order)
    return (upper + np.triu(upper, 1).T)[np.ix_(place, place)], own[place]


def _row_squares(numbers: np.ndarray) -> np.ndarray:
    return (numbers[:, None, :] @ numbers[:, :, None])[:, 0, 0]


def weighted_mean(
    columns: Columns, rows: np.ndarray, weights: np.ndarray, out: np.ndarray, total: float | None = None
) -> np.ndarray:
    """The mean of these rows by their weights, summed in float64 in this order; in `out` [number], which it gives back.

    Integers are rounded; what is beyond the type of `out` is infinite there. total: what the sum is divided by, None:
    the sum of the weights.
    """
    size, total = len(out), weights.sum() if total is None else total
    with np.errstate(all="ignore"), one_blas_thread(len(rows) * size):
        for start, numbers in _float64(columns, rows, size, len(rows)):
            mean = weights @ numbers / total
            out[start : start + len(mean)] = np.rint(mean) if np.issubdtype(out.dtype, np.integer) else mean
    return out


def _float64(
    columns: Columns, rows: Sequence[int] | np.ndarray, size: int, count: int, zeros: int = 0
) -> Iterator[tuple[int, np.ndarray]]:
    """These rows block after block, float64 [count + zeros, number], the next in the place of the last."""
    width = min(size, width_for(count))
    scratch = np.empty((count + zeros, width + PAD))
    scratch[count:] = 0
    for start in range(0, size, max(1, width)):
        block = columns(start, min(start + width, size))
        for place, row in enumerate(rows):
            scratch[place, : block.shape[1]] = block[row]
        yield start, scratch[:, : block.shape[1]]


def two_leading(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The two largest eigenvalues of a symmetric matrix, ascending, and their vectors, [2] and [row, 2].

    Of more than 1,000 rows by Lanczos' iteration from a fixed start, which takes a fraction of the time.
    """
    from scipy.linalg import eigh

    count = len(matrix)
    if count > LANCZOS:
        from scipy.sparse.linalg import ArpackNoConvergence, eigsh

        with suppress(ArpackNoConvergence):  # eigenvalues that all but coincide
            values, vectors = eigsh(matrix, k=2, v0=np.random.default_rng(0).standard_normal(count))
            order = np.argsort(values)
            return values[order], vectors[:, order]
    return eigh(matrix, subset_by_index=[count - 2, count - 1])


def middle_mean(columns: Columns, rows: np.ndarray, trimmed: int, out: np.ndarray) -> np.ndarray:
    """The mean of each column's values without its `trimmed` smallest and largest, in `out` [number].

    Of finite rows, taken in this order; summed in float64.
    """
    if len(rows) > NETWORK:
        return middle_mean_of_sorted(lambda start, stop: sorted_columns(columns, rows, start, stop), trimmed, out)
    size = len(out)
    plan, kept = _network(len(rows), trimmed)
    width = min(size, BLOCK)
    scratch, numbers = np.empty((len(rows) + 1, width), np.float32), np.empty((len(kept), width + PAD))
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


def middle_mean_of_sorted(columns: Columns, trimmed: int, out: np.ndarray) -> np.ndarray:
    """`middle_mean` of what is sorted already: (start, stop) -> [number, rank]."""
    size, width = len(out), BLOCK // 4
    with one_blas_thread():  # whose rows are as long as there are clients
        for start in range(0, size, width):
            ranks = columns(start, min(start + width, size))
            middle = ranks[:, trimmed : ranks.shape[1] - trimmed].astype(np.float64)
            out[start : start + width] = middle @ np.ones(middle.shape[1]) / middle.shape[1]
    return out


def sorted_columns(columns: Columns, rows: np.ndarray, start: int, stop: int) -> np.ndarray:
    """The values of these finite rows in ascending order, float32 [number, rank]; of long layers, in two threads."""
    found, width = np.empty((stop - start, len(rows)), np.float32), BLOCK // 4
    half = (start + stop) // 2

    def sort(first: int, last: int) -> None:
        scratch = np.empty((len(rows), min(last - first, width) + PAD), np.float32)
        for at in range(first, last, width):
            end = min(at + width, last)
            block, part = scratch[:, : end - at], found[at - start : end - start]
            block[...] = columns(at, end)[rows]
            part[...] = block.T
            part.sort(axis=1)  # a column's numbers lie side by side: several times faster than down the rows

    if half - start < 2 * width:
        sort(start, stop)
    else:
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(sort, (start, half), (half, stop)))
    return found


@cache
def _network(count: int, trimmed: int) -> tuple[list[tuple[int, int, bool, bool]], list[int]]:
    """Comparisons that bring the middle of this many wires to some of them, and to which.

    A comparison: the lesser goes to the first wire, the greater to the second; whether each is wanted later. Those that
    would only order the middle, or only what is trimmed, are left out.
    Source: Batcher 1968, "Sorting networks and their applications", odd-even merge of two sequences of any lengths.
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


def width_for(count: int) -> int:
    """How many columns of so many rows are worked on at a time: about 8 MB of float64 at most."""
    return max(512, min(BLOCK, (1 << 20) // max(1, count) // 512 * 512))


@contextmanager
def one_blas_thread(numbers: int = BLOCK) -> Iterator[None]:
    """Matrix products run in one thread inside.

    Their order of adding up is then fixed; and on few, shared cores several threads take longer than one.
    numbers: how many are worked on; few are left to one thread anyhow, and to say so takes longer.
    """
    if numbers < ALONE:
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
    """How to ask for and to set the threads of each library of matrix products that is loaded."""
    from threadpoolctl import ThreadpoolController

    found = ThreadpoolController().select(user_api="blas").lib_controllers
    return [(library.get_num_threads, library.set_num_threads) for library in found]
