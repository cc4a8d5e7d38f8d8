"""Count sketches: their algebra, the error of inner products on structured layers, and the moments beside them."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradlens.log.sketches import BLOCK_SIZE, SIGN_OFFSETS, CountSketch, moments_of

SMALL = {"name": "fc1.weight", "size": 1_000, "width": 64}


def matrix_of(sketch: CountSketch) -> np.ndarray:
    """The sketch as a matrix [place, number], from what it makes of each number alone."""
    return np.stack([sketch.sketch(row) for row in np.eye(sketch.size, dtype=np.float32)], axis=1)


@pytest.mark.parametrize(("size", "width"), [(1_000, 64), (65, 64), (128, 64), (999, 100), (300, 7)])
def test_every_number_comes_to_one_place_with_one_sign_and_places_are_shared_evenly(size, width):
    matrix = matrix_of(CountSketch.of(3, "fc1.weight", size, width))
    assert set(np.unique(matrix)) <= {-1.0, 0.0, 1.0}
    np.testing.assert_array_equal(np.abs(matrix).sum(axis=0), np.ones(size))
    assert np.abs(matrix).sum(axis=1).max() <= -(-size // width)
    assert -6 < matrix.sum() / np.sqrt(size) < 6


def test_a_sketch_of_several_blocks_is_that_of_its_numbers():
    size = 2 * BLOCK_SIZE + 77
    sketch = CountSketch.of(1, "fc1.weight", size, 512)
    chosen = np.r_[0:40, BLOCK_SIZE - 20 : BLOCK_SIZE + 20, size - 40 : size]
    rng, numbers = np.random.default_rng(0), np.zeros(size, np.float32)
    numbers[chosen] = rng.normal(size=len(chosen))
    whole = np.zeros(512)
    for place in chosen:
        alone = np.zeros(size, np.float32)
        alone[place] = numbers[place]
        whole += sketch.sketch(alone)
    np.testing.assert_allclose(sketch.sketch(numbers), whole, atol=1e-6)


@given(st.integers(0, 2**32), st.floats(-3, 3), st.floats(-3, 3))
@settings(max_examples=20, deadline=None)
def test_a_sketch_is_linear(seed, a, b):
    rng, sketch = np.random.default_rng(seed), CountSketch.of(seed, **SMALL)
    x, y = rng.normal(size=(2, 1_000)).astype(np.float32)
    together = sketch.sketch((a * x + b * y).astype(np.float32))
    np.testing.assert_allclose(together, a * sketch.sketch(x) + b * sketch.sketch(y), atol=2e-4)


def test_the_difference_is_sketched_in_one_pass_and_equal_numbers_have_equal_bits():
    rng = np.random.default_rng(0)
    models, base = rng.normal(size=(2, BLOCK_SIZE + 5)).astype(np.float32)
    sketch = CountSketch.of(5, "a", BLOCK_SIZE + 5, 128)
    found, moments = sketch.sketch_and_moments(models, base)
    np.testing.assert_array_equal(found, sketch.sketch(models - base))
    np.testing.assert_array_equal(moments, sketch.sketch_and_moments(models - base, None)[1])
    apart = np.repeat(models, 3)[::3]  # not contiguous
    np.testing.assert_array_equal(found, sketch.sketch_and_moments(apart, base.astype(np.float64))[0])


def test_the_same_address_gives_the_same_sketch_and_any_other_another():
    numbers = np.random.default_rng(0).normal(size=1_000)
    first = CountSketch.of(7, **SMALL).sketch(numbers)
    np.testing.assert_array_equal(first, CountSketch.of(7, **SMALL).sketch(numbers))
    for changed in ({"seed": 8}, {"name": "fc1.bias"}):
        other = CountSketch.of(**({"seed": 7} | SMALL | changed)).sketch(numbers)
        assert np.abs(first - other).max() > 0.1


def pairs(kind: str, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Two updates of a kind that is hard for a sketch without enough chance in it."""
    rows, columns = 80, 512
    if kind == "normal":
        return tuple(rng.normal(size=(2, rows * columns)))
    if kind == "rank 1":  # every row alike, as in a dense layer's gradient
        return tuple(np.outer(rng.normal(size=rows), rng.normal(size=columns)).reshape(-1) for _ in range(2))
    if kind == "equal":
        x = np.outer(np.ones(rows), rng.normal(size=columns)).reshape(-1)
        return x, x
    if kind == "constant":
        return np.ones(rows * columns), np.full(rows * columns, -2.0)
    stride = {"stride of the width": 64, "stride of a row": 512, "stride of a block": BLOCK_SIZE}[kind]
    x, y = np.zeros((2, 40 * BLOCK_SIZE if stride == BLOCK_SIZE else rows * columns))
    x[5::stride], y[5::stride] = rng.normal(size=(2, len(x[5::stride]))) + 1
    return x, y


@pytest.mark.parametrize(
    "kind", ["normal", "rank 1", "equal", "constant", "stride of the width", "stride of a row", "stride of a block"]
)
def test_inner_products_are_kept_to_the_root_of_the_width_whatever_the_layer_looks_like(kind):
    width, errors = 64, []
    for seed in range(120):
        x, y = (each.astype(np.float32) for each in pairs(kind, np.random.default_rng(seed)))
        sketch = CountSketch.of(seed, "fc1.weight", len(x), width)
        dot, squares = np.vdot(x, y).astype(np.float64), np.vdot(x, x) * np.vdot(y, y)
        errors.append((np.vdot(sketch.sketch(x), sketch.sketch(y)) - dot) / np.sqrt((squares + dot**2) / width))
    assert np.mean(np.square(errors)) < 1.5  # at most 1 in theory; of 120 the mean strays by 0.13
    assert abs(np.mean(errors)) < 5 / np.sqrt(len(errors))


def test_the_more_numbers_the_smaller_the_error():
    def error(width: int) -> float:
        found = []
        for seed in range(60):
            x, y = np.random.default_rng(seed).normal(size=(2, 30_000)).astype(np.float32)
            sketch = CountSketch.of(seed, "a", len(x), width)
            found.append(np.vdot(sketch.sketch(x), sketch.sketch(y)) - np.vdot(x, y))
        return float(np.std(found))

    assert error(64) / error(1_024) == pytest.approx(4, rel=0.35)


def test_who_knows_the_signs_can_send_what_the_sketch_does_not_show():
    known = matrix_of(CountSketch.of(1, **SMALL)).astype(np.float64)
    update = np.random.default_rng(0).normal(size=1_000)
    hidden = (update - known.T @ np.linalg.solve(known @ known.T, known @ update)).astype(np.float32)
    length = np.linalg.norm(hidden)
    assert np.linalg.norm(CountSketch.of(1, **SMALL).sketch(hidden)) < 1e-5 * length
    assert 0.7 < np.linalg.norm(CountSketch.of(2, **SMALL).sketch(hidden)) / length < 1.3


@given(st.integers(1, 40_000), st.floats(-15, 15), st.integers(0, 2**32))
@settings(max_examples=30, deadline=None)
def test_moments_are_those_of_the_numbers_in_float64(size, exponent, seed):
    numbers = (np.random.default_rng(seed).normal(size=size) * 10**exponent).astype(np.float32)
    exact = numbers.astype(np.float64)
    for power, found in enumerate(moments_of(numbers), start=1):
        scale = (np.abs(exact) ** power).sum()
        assert abs(found - (exact**power).sum()) <= 2e-6 * scale


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_number_that_is_not_finite_shows_in_the_moments(value):
    numbers = np.ones(3 * BLOCK_SIZE, np.float32)
    numbers[2 * BLOCK_SIZE] = value
    assert not np.isfinite(moments_of(numbers)[1])
    numbers[2 * BLOCK_SIZE] = 3e38
    np.testing.assert_allclose(moments_of(numbers)[1], float(np.float32(3e38)) ** 2)


def test_the_table_of_signs_is_as_often_plus_as_minus():
    table = CountSketch.of(0, "a", 10 * BLOCK_SIZE, 512).table
    assert len(table) == SIGN_OFFSETS + BLOCK_SIZE
    assert abs(table.sum()) < 6 * np.sqrt(len(table))
