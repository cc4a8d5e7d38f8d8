"""Count sketches: a few hundred numbers for a layer of any size, whose inner products stand for those of the layer.

Every number gets a random sign and a random place among `width`; what comes to one place is added up (Charikar, Chen &
Farach-Colton 2002, "Finding frequent items in data streams"). The sketch is linear, and <Sx, Sy> is <x, y> in
expectation with a standard deviation of at most sqrt((|x|^2 |y|^2 + <x, y>^2) / width), whatever x and y look like.

To be fast it is made in two steps. Blocks of `STAGE` numbers, each times a stretch of one random table of signs and
turned by a random shift, are added up to one block: two passes over memory that stays near the processor. Only this
block is spread over the places at random. Numbers of one block never meet in the first step, those of two blocks with
the chance of their shifts: so no stride of a layer piles up, and the low rank of a gradient does not either, as it
would under signs that are products of a row's and a column's.
"""

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from gradlens.log.kernels import ROW_PADDING

STAGE = 1 << 14  # numbers that are worked on at a time, and that the first step leaves: 64 KB
SIGNS = 1 << 16  # places in the table of signs at which a block's signs begin
LOWEST, HIGHEST = 1e-28, 1e32  # of a block's sum of fourth powers: outside it float32 products lose digits
POWERS = 4  # moments: sums of the numbers, their squares, cubes and fourth powers


@dataclass(frozen=True, eq=False)
class CountSketch:
    """How the numbers of one layer are sketched; memory: 320 KB of signs for all layers of a seed, 128 KB for each.

    size, width: numbers of the layer and of its sketch; step: numbers of a block; table: the signs; begins, shifts:
    of each block, where its signs begin and how far it is turned; places: the order in which what the first step leaves
    is added up, int64 [step].
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
        """The sketch of the layer of this name: the same seed, name, size and width give the same one."""
        rng = np.random.default_rng([seed, int.from_bytes(hashlib.sha256(name.encode()).digest()[:16])])
        step = width * max(1, min(STAGE // width, math.ceil(size / width)))
        blocks = math.ceil(size / step)
        begins, shifts = rng.integers(SIGNS, size=blocks), rng.integers(step, size=blocks)
        table = _signs(seed, max(STAGE, width))
        return cls(size, width, step, table, begins.tolist(), shifts.tolist(), rng.permutation(step))

    def sketch(self, numbers: np.ndarray) -> np.ndarray:
        """The sketch of these numbers [number], float32 [width]."""
        return self.sketch_and_moments(numbers, None, moments=False)[0]

    def sketch_and_moments(
        self, numbers: np.ndarray, base: np.ndarray | None, *, moments: bool = True
    ) -> tuple[np.ndarray, np.ndarray]:
        """The sketch of numbers - base, float32 [width], and its `moments_of`, in one pass over both [number].

        What is not finite, or sums beyond float32, makes the sketch so; the moments are right up to float32's largest.
        """
        stage, powers, scratch = np.zeros(2 * self.step, np.float32), np.zeros(POWERS), _scratch(self.step)
        with np.errstate(all="ignore"):
            for place, block in enumerate(_blocks(numbers, base, scratch)):
                if moments:
                    powers += _moments(scratch, len(block))
                begin, shift, count = self.begins[place], self.shifts[place], len(block)
                np.multiply(block, self.table[begin : begin + count], out=block)
                part = stage[shift : shift + count]
                np.add(part, block, out=part)
            turned = np.add(stage[: self.step], stage[self.step :], out=stage[: self.step])
            return turned[self.places].reshape(-1, self.width).sum(axis=0), powers


def moments_of(numbers: np.ndarray, base: np.ndarray | None = None) -> np.ndarray:
    """Sums of (numbers - base), of its squares, cubes and fourth powers, float64 [4], of [number].

    Within a block products are formed in float32, so about six digits are right; NaN or infinite where a number is.
    """
    scratch = _scratch(STAGE)
    with np.errstate(all="ignore"):
        parts = [_moments(scratch, len(block)) for block in _blocks(numbers, base, scratch)]
    return np.sum(parts, axis=0)


def _scratch(step: int) -> np.ndarray:
    """A block's zeroth, first and second powers, float32 [3, number]; apart, for at powers of two they share lines."""
    scratch = np.empty((3, step + ROW_PADDING), np.float32)[:, :step]
    scratch[0] = 1
    return scratch


def _blocks(numbers: np.ndarray, base: np.ndarray | None, scratch: np.ndarray) -> Iterator[np.ndarray]:
    """Numbers - base as float32, block after block, each in the place of the last: the first powers."""
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
    """The sums of a block's powers, float64 [4]: its numbers are the first powers, the second are filled in."""
    powers = scratch[:, :count]
    np.multiply(powers[1], powers[1], out=powers[2])
    products = powers @ powers[1:].T  # one matrix product takes half the time of four inner ones
    found = np.array([products[0, 0], products[0, 1], products[1, 1], products[2, 1]], np.float64)
    if LOWEST < found[3] < HIGHEST:
        return found
    exact = powers[1].astype(np.float64)
    squares = exact * exact
    return np.array([exact.sum(), squares.sum(), squares @ exact, squares @ squares])


@lru_cache(maxsize=8)
def _signs(seed: int, longest: int) -> np.ndarray:
    """Random signs, float32, from any of `SIGNS` places on as many as a block has numbers at most."""
    bits = np.random.default_rng(seed).integers(2, size=SIGNS + longest, dtype=np.int8)
    return np.where(bits > 0, np.float32(1), np.float32(-1))
