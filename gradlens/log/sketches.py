"""Count sketches: a few hundred numbers per layer of any size, which preserve inner products.

A sketch multiplies each number by a random sign and adds it to one of `width` random places. For speed this takes two
steps: blocks of a layer are folded into one block, and only that block is spread over the places.
"""

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from gradlens.log.kernels import ROW_PADDING

BLOCK_SIZE = 1 << 14  # numbers processed at a time, and left after the first step: 64 KB
SIGN_OFFSETS = 1 << 16  # places in the table of signs at which the signs of a block may begin
FLOAT32_RANGE = 1e-28, 1e32  # of a block's sum of fourth powers; outside it float32 products lose digits
POWERS = 4  # moments: sums of the numbers, their squares, cubes and fourth powers


@dataclass(frozen=True, eq=False)
class CountSketch:
    """The sketch of one layer: a random linear map from `size` numbers to `width`; made by `of`.

    Attributes
    ----------
    size, width : int
        Numbers of the layer and of its sketch.
    step : int
        Numbers of a block.
    table : numpy.ndarray
        float32, random signs, shared by all layers of a seed (320 KB).
    begins, shifts : list of int
        For each block, where its signs begin in the table and by how many places it is rotated.
    places : numpy.ndarray
        int64 [step], a permutation of the folded block; number i of it goes to place i mod `width` (128 KB per layer).

    Notes
    -----
    For a sketch S, <Sx, Sy> equals <x, y> in expectation, with a standard deviation of at most
    sqrt((|x|^2 |y|^2 + <x, y>^2) / width) for any x and y [1]_.

    In the first step every block is multiplied by a stretch of the table of signs, rotated by a random shift and added
    to one block: two passes over memory that fits the processor's cache. In the second step that block is permuted and
    folded into `width` places. Numbers of the same block never collide in the first step, and those of two blocks only
    by the chance of their shifts. So neither numbers at regular strides pile up in one place, nor does the low rank
    of a gradient show, as it would with signs that are products of a row's sign and a column's.

    References
    ----------
    .. [1] Charikar, Chen & Farach-Colton 2002, "Finding frequent items in data streams".

    Examples
    --------
    >>> sketch = CountSketch.of(seed=0, name="fc1.weight", size=10_000, width=512)
    >>> numbers = np.ones(10_000, np.float32)
    >>> bool(np.allclose(sketch.sketch(2 * numbers), 2 * sketch.sketch(numbers)))
    True
    """

    size: int
    width: int
    step: int
    table: np.ndarray
    begins: list[int]
    shifts: list[int]
    places: np.ndarray

    @classmethod
    def of(cls, seed: int, name: str, size: int, width: int) -> "CountSketch":
        """The sketch of a layer; the same seed, name, size and width always give the same one."""
        rng = np.random.default_rng([seed, int.from_bytes(hashlib.sha256(name.encode()).digest()[:16])])
        step = width * max(1, min(BLOCK_SIZE // width, math.ceil(size / width)))
        blocks = math.ceil(size / step)
        begins, shifts = rng.integers(SIGN_OFFSETS, size=blocks), rng.integers(step, size=blocks)
        table = _signs(seed, max(BLOCK_SIZE, width))
        return cls(size, width, step, table, begins.tolist(), shifts.tolist(), rng.permutation(step))

    def sketch(self, numbers: np.ndarray) -> np.ndarray:
        """The sketch of numbers [size], float32 [width]."""
        return self.sketch_and_moments(numbers, None, moments=False)[0]

    def sketch_and_moments(
        self, numbers: np.ndarray, base: np.ndarray | None, *, moments: bool = True
    ) -> tuple[np.ndarray, np.ndarray]:
        """The sketch and the moments of an update, in one pass over its numbers.

        Parameters
        ----------
        numbers : numpy.ndarray
            [size], an update, or a local model.
        base : numpy.ndarray or None
            [size], the global model to subtract.
        moments : bool
            Whether moments are computed; else they are 0.

        Returns
        -------
        sketch : numpy.ndarray
            float32 [width]; not finite where a number is not, or where a sum exceeds float32.
        moments : numpy.ndarray
            As of `moments_of`, correct up to the largest float32 number.
        """
        folded, powers, scratch = np.zeros(2 * self.step, np.float32), np.zeros(POWERS), _scratch(self.step)
        with np.errstate(all="ignore"):
            for number, block in enumerate(_blocks(numbers, base, scratch)):
                if moments:
                    powers += _moments(scratch, len(block))
                begin, shift, count = self.begins[number], self.shifts[number], len(block)
                np.multiply(block, self.table[begin : begin + count], out=block)
                part = folded[shift : shift + count]
                np.add(part, block, out=part)
            wrapped = np.add(folded[: self.step], folded[self.step :], out=folded[: self.step])
            return wrapped[self.places].reshape(-1, self.width).sum(axis=0), powers


def moments_of(numbers: np.ndarray, base: np.ndarray | None = None) -> np.ndarray:
    """The sums of an update's numbers, of their squares, cubes and fourth powers.

    Parameters
    ----------
    numbers : numpy.ndarray
        [number], an update, or a local model.
    base : numpy.ndarray, optional
        [number], the global model to subtract.

    Returns
    -------
    numpy.ndarray
        float64 [4], to about six digits, since products within a block are float32; NaN or infinite where a number is.

    Examples
    --------
    >>> moments_of(np.array([1.0, -2.0])).tolist()
    [-1.0, 5.0, -7.0, 17.0]
    """
    scratch = _scratch(BLOCK_SIZE)
    with np.errstate(all="ignore"):
        parts = [_moments(scratch, len(block)) for block in _blocks(numbers, base, scratch)]
    return np.sum(parts, axis=0)


def _scratch(step: int) -> np.ndarray:
    """Room for a block's zeroth, first and second powers, float32 [3, number], with padded rows."""
    scratch = np.empty((3, step + ROW_PADDING), np.float32)[:, :step]
    scratch[0] = 1
    return scratch


def _blocks(numbers: np.ndarray, base: np.ndarray | None, scratch: np.ndarray) -> Iterator[np.ndarray]:
    """Numbers - base as float32, block by block, each in the scratch's row of first powers."""
    step = scratch.shape[1]
    for start in range(0, len(numbers), step):
        part = numbers[start : start + step]
        block = scratch[1, : len(part)]
        if base is None:
            np.copyto(block, part, casting="unsafe")
        else:
            np.subtract(part, base[start : start + step], out=block, casting="unsafe")
        yield block


def _moments(scratch: np.ndarray, count: int) -> np.ndarray:
    """The sums of a block's powers, float64 [4]; the scratch holds its first powers and is given its second ones."""
    powers = scratch[:, :count]
    np.multiply(powers[1], powers[1], out=powers[2])
    products = powers @ powers[1:].T  # takes half the time of four inner products
    sums = np.array([products[0, 0], products[0, 1], products[1, 1], products[2, 1]], np.float64)
    if FLOAT32_RANGE[0] < sums[3] < FLOAT32_RANGE[1]:
        return sums
    exact = powers[1].astype(np.float64)
    squares = exact * exact
    return np.array([exact.sum(), squares.sum(), squares @ exact, squares @ squares])


@lru_cache(maxsize=8)
def _signs(seed: int, longest: int) -> np.ndarray:
    """Random signs, float32, long enough for a block of `longest` numbers to begin at any offset."""
    bits = np.random.default_rng(seed).integers(2, size=SIGN_OFFSETS + longest, dtype=np.int8)
    return np.where(bits > 0, np.float32(1), np.float32(-1))
