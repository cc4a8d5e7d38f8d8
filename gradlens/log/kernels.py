"""What takes time in a record: single passes over the numbers of a layer, in blocks that stay near the processor.

None of them changes a bit with the order of the clients or from run to run: rows are added up in the order that the
caller gives, and the matrix products run in one thread, since several add up in another order each time.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np

BLOCK = 1 << 14  # numbers of a layer that are worked on at a time
PAD = 24  # numbers between the rows of a scratch matrix: at powers of two they share the lines of a cache
SMALL = 32  # clients up to which a general product beats the symmetric one, in slices of SLICE / clients^2 numbers
SLICE = 1_000_000
NETWORK = 32  # clients up to which whole rows are compared; above, each column is sorted for itself
ROWS = 1 << 15  # numbers of a row that are compared at a time


Columns = Callable[[int, int], np.ndarray]  # (start, stop) -> those columns of a matrix, [row, number]


def squares(columns: Columns, count: int, size: int) -> np.ndarray:
    """The sum of squares of each row, float64 [row]; rests on that row alone, to the last bit."""
    total = np.zeros(count)
    with np.errstate(all="ignore"), one_blas_thread():
        for _, numbers in _float64(columns, range(count), size, count):
            total += _row_squares(numbers)
    return total


def gram(columns: Columns, order: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Inner products of all pairs of rows, float64 [row, row], formed with the rows in this order; and `squares`.

    The squares are those of `squares` to the last bit, the diagonal of the products is not.
    """
    count = len(order)
    small = count <= SMALL
    step = min(2_048, SLICE // (count + 1) ** 2) if small else BLOCK
    total, own = np.zeros((count, count + small)), np.zeros(count)
    with np.errstate(all="ignore"), one_blas_thread():
        for _, block in _float64(columns, order, size, count, small):
            own += _row_squares(block[:count])
            for start in range(0, block.shape[1], step):
                # One more row, of zeros, for few clients: numpy takes the product of a matrix with itself to BLAS's
                # symmetric routine, which for few rows takes twice as long as the general one.
                numbers = block[:, start : start + step]
                total += numbers[:count] @ numbers.T
    upper, place = np.triu(total[:, :count]), np.argsort(order)
    return (upper + np.triu(upper, 1).T)[np.ix_(place, place)], own[place]


def _row_squares(numbers: np.ndarray) -> np.ndarray:
    return (numbers[:, None, :] @ numbers[:, :, None])[:, 0, 0]


def weighted_sum(columns: Columns, rows: Sequence[int] | np.ndarray, weights: np.ndarray, size: int) -> np.ndarray:
    """The sum over these rows, in this order, of weight x row: float64 [number]."""
    total = np.zeros(size)
    with np.errstate(all="ignore"), one_blas_thread():
        for start, numbers in _float64(columns, rows, size, len(rows)):
            total[start : start + numbers.shape[1]] = weights @ numbers
    return total


def _float64(
    columns: Columns, rows: Sequence[int] | np.ndarray, size: int, count: int, zeros: int = 0
) -> Iterator[tuple[int, np.ndarray]]:
    """These rows block after block, float64 [count + zeros, number], the next in the place of the last."""
    width = min(size, width_for(count))
    scratch = np.zeros((count + zeros, width + PAD))
    for start in range(0, size, max(1, width)):
        block = columns(start, min(start + width, size))
        for place, row in enumerate(rows):
            scratch[place, : block.shape[1]] = block[row]
        yield start, scratch[:, : block.shape[1]]


def ascending(columns: Columns, count: int, size: int) -> np.ndarray:
    """Each column's numbers in ascending order, float32 [rank, number], of a finite matrix.

    Long rows are sorted in two threads.
    """
    out = np.empty((count, size), np.float32)
    step = ROWS if count <= NETWORK else BLOCK // 2

    def sort(bounds: tuple[int, int]) -> None:
        for start in range(*bounds, step):
            stop = min(start + step, bounds[1])
            ascend(columns(start, stop), out[:, start:stop])

    half = size // 2 // step * step
    if half:
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(sort, ((0, half), (half, size))))
    else:
        sort((0, size))
    return out


def ascend(block: np.ndarray, out: np.ndarray) -> np.ndarray:
    """Writes each column of a finite block [row, number] in ascending order; gives `out` back."""
    count, width = block.shape
    if count > NETWORK or count < 2 or width < 4 * count * count:  # for few numbers the calls take longer than the work
        numbers = np.array(block.T, order="C")  # a column's numbers side by side
        numbers.sort(axis=1)
        out[...] = numbers.T
        return out
    scratch = np.empty((count + 1, width), np.float32)
    scratch[:count] = block
    wires, spare = list(scratch[:count]), [scratch[count]]
    for low, high, low_rank, high_rank in _network(count):
        one, other = wires[low], wires[high]
        lesser = spare.pop() if low_rank is None else out[low_rank]
        greater = other if high_rank is None else out[high_rank]
        np.minimum(one, other, out=lesser)
        np.maximum(one, other, out=greater)
        spare.append(one)
        wires[low], wires[high] = lesser, greater
    return out


@cache
def _network(count: int) -> list[tuple[int, int, int | None, int | None]]:
    """The comparisons that sort this many wires: the lesser goes to the first, the greater to the second.

    The last two entries: the rank that a wire has from here on, None where it is compared again.
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

    rank = {wire: place for place, wire in enumerate(in_order(list(range(count))))}
    last = {wire: at for at, pair in enumerate(pairs) for wire in pair}
    return [
        (low, high, rank[low] if last[low] == at else None, rank[high] if last[high] == at else None)
        for at, (low, high) in enumerate(pairs)
    ]


def width_for(count: int) -> int:
    """How many columns of so many rows are worked on at a time: about 16 MB of float64 at most."""
    return max(512, min(BLOCK, (1 << 21) // max(1, count) // 512 * 512))


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """Matrix products run in one thread inside.

    Their order of adding up is then fixed; and on few, shared cores several threads take longer than one.
    """
    with _blas().limit(limits=1):
        yield


@cache
def _blas() -> Any:
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController().select(user_api="blas")
