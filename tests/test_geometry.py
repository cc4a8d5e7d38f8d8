"""Ratios, cosines, distances and centering against hand-made answers."""

import numpy as np
import pytest

from gradlens.geometry import (
    centered,
    centered_on_mean,
    cosine_distances,
    cosines,
    distances,
    mean_of_largest,
    pairwise_cosines,
    ratio,
    squared_distances,
)


def test_nothing_is_divided_by_zero():
    assert ratio(np.array([1.0, 0, 3]), np.array([2.0, 0, 0])).tolist() == [0.5, 0, 0]
    assert ratio(np.array([[1.0], [2.0]]), np.array([0.0, 4.0]), otherwise=1.0).tolist() == [[1, 0.25], [1, 0.5]]


@pytest.mark.parametrize(("clip", "expected"), [(True, 1.0), (False, 1.5)])
def test_cosines_are_clipped_unless_told_otherwise(clip, expected):
    assert cosines(np.array([3.0, 0.0]), np.array([2.0, 0.0]), clip=clip).tolist() == [expected, 0]


def test_a_gram_matrix_tells_what_the_vectors_do(rng):
    x = rng.normal(size=(6, 9))
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    gram, center = x @ x.T, rng.normal(size=9)
    np.testing.assert_allclose(pairwise_cosines(gram), unit @ unit.T, atol=1e-12)
    np.testing.assert_allclose(squared_distances(gram), distances(x, x) ** 2, atol=1e-12)
    np.testing.assert_allclose(cosine_distances(gram), 1 - unit @ unit.T, atol=1e-12)
    about = x - center
    np.testing.assert_allclose(centered(gram, x @ center, center @ center), about @ about.T, atol=1e-12)
    about = x - x.mean(axis=0)
    np.testing.assert_allclose(centered_on_mean(gram), about @ about.T, atol=1e-12)
    np.testing.assert_array_equal(centered_on_mean(gram), centered_on_mean(gram).T)


def test_the_largest_of_a_row_leave_out_itself_and_who_is_no_reference():
    pairs = np.array([[9.0, 1, 5, 2], [1, 9, 3, 4], [5, 3, 9, 0], [2, 4, 0, 9]])
    reference = np.array([True, True, False, True])
    assert mean_of_largest(pairs, reference, 1).tolist() == [2, 4, 5, 4]
    assert mean_of_largest(pairs, reference, 9).tolist() == [1.5, 2.5, 4, 3]


def test_cosine_distances_of_models_lose_no_digits(rng):
    """Updates of 0.2 % of the weights: in float64, 1 - cos of the models has but four digits left."""
    start, updates = rng.normal(size=500), 2e-9 * rng.normal(size=(4, 500))
    models = np.asarray(start, np.longdouble) + np.asarray(updates, np.longdouble)
    norms = np.sqrt((models**2).sum(axis=1))
    unit = models / norms[:, None]
    expected = ((unit[:, None] - unit[None]) ** 2).sum(axis=2).astype(np.float64) / 2
    found = cosine_distances(updates @ updates.T, updates @ start, float(start @ start))
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert (np.diagonal(found) == 0).all()


def test_cosine_distances_by_hand():
    x = np.array([[1.0, 0], [0, 2], [-3, 0], [3, 0], [0, 0], [0, 0]])
    expected = [[0, 1, 2, 0, 1, 1], [1, 0, 1, 1, 1, 1], [2, 1, 0, 2, 1, 1], [0, 1, 2, 0, 1, 1]]
    np.testing.assert_allclose(cosine_distances(x @ x.T)[:4], expected, atol=1e-15)
    assert cosine_distances(x @ x.T)[4, 5] == 0


def test_equal_numbers_summed_in_another_order_are_no_distance():
    gram = np.array([[1.0, 1 + 2e-16, 0.5], [1 + 2e-16, 1 - 3e-16, 0.5], [0.5, 0.5, 1]])
    np.testing.assert_allclose(squared_distances(gram), [[0, 0, 1], [0, 0, 1], [1, 1, 0]], atol=1e-14)
    assert squared_distances(gram)[0, 1] == 0
