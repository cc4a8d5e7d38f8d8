"""One interface of sources: wherever updates come from, all that follows from them agrees with their arrays."""

from dataclasses import replace

import numpy as np
import pytest

from conftest import STATE, random_round
from gradlens.log import Evidence, ModelSpec, UpdateLog
from gradlens.log.sources import ArraySource, Source

CLIENTS = tuple("abcdef")
MIXING = np.random.default_rng(1).normal(size=(4, len(CLIENTS)))


def in_memory():
    return random_round(0, CLIENTS)


def mapped():
    round_ = in_memory()
    halves = ArraySource(tuple(round_.updates), lambda name: np.split(round_.updates[name], [2]))
    return replace(round_, updates=halves)


def sketched():
    model = ModelSpec.of(STATE, buffers=["norm.count"])
    return Evidence("sketch", width=8, seed=1).of_log(UpdateLog(model, [in_memory()]))[0]


ROUNDS = {
    "in memory": in_memory,
    "mapped": mapped,
    "selected": lambda: in_memory().take([4, 0, 3]),
    "selected twice": lambda: in_memory().take([4, 0, 3]).take([2, 1]),
    "combined": lambda: in_memory().combined(MIXING, np.array(list("wxyz"))),
    "scaled": lambda: in_memory().combined(np.diag([1, 2, 3, -1, 0.5, 4])),
    "selected of combined": lambda: in_memory().combined(MIXING, np.array(list("wxyz"))).take([3, 1]),
    "combined of selected": lambda: in_memory().take([4, 0, 3]).combined(MIXING[:2, :3], np.array(["x", "y"])),
    "combined twice": lambda: (
        in_memory().combined(MIXING, np.array(list("wxyz"))).combined(MIXING[:2, :4], np.array(["x", "y"]))
    ),
    "sketched": sketched,
    "one layer": lambda: in_memory().take([4, 0, 3]).only(["fc2.weight"]),
}


@pytest.fixture(params=ROUNDS)
def round_(request):
    return ROUNDS[request.param]()


def matrix_of(round_, layer: str) -> np.ndarray:
    return round_.updates[layer].reshape(len(round_), -1)


def test_a_source_has_the_whole_interface(round_):
    assert isinstance(round_.updates, Source)


def test_columns_are_those_of_the_array(round_):
    for layer in round_.updates:
        matrix = matrix_of(round_, layer)
        assert (len(round_), *round_.source.shape(layer)) == round_.updates[layer].shape
        np.testing.assert_array_equal(round_.columns(layer, sketch=True)(0, matrix.shape[1]), matrix)
        np.testing.assert_array_equal(round_.columns(layer, sketch=True)(1, 2), matrix[:, 1:2])


def test_norms_and_inner_products_are_those_of_the_array(round_):
    for layer in round_.parameters:
        matrix = matrix_of(round_, layer).astype(np.float64)
        size = np.square(matrix).sum(axis=1).max()
        np.testing.assert_allclose(round_.gram[layer], matrix @ matrix.T, rtol=1e-5, atol=1e-6 * size)
        np.testing.assert_allclose(round_.gram_norms[layer], np.linalg.norm(matrix, axis=1), rtol=1e-5)


def test_weighted_means_are_those_of_the_array(round_):
    weights = np.arange(1.0, len(round_) + 1)
    rows = np.arange(len(round_))[::-1]
    for layer in round_.parameters:
        numbers = round_.updates[layer][rows].astype(np.float64)
        expected = np.tensordot(weights, numbers, axes=1)
        found = round_.source.weighted_mean(layer, rows, weights, None)
        np.testing.assert_allclose(found, expected / weights.sum(), atol=1e-5)
        found = round_.source.weighted_mean(layer, rows, weights, 2.0)
        np.testing.assert_allclose(found, expected / 2, atol=1e-4)


def test_a_selection_and_some_layers_are_those_of_the_array(round_):
    part = round_.take([1, 0])
    for layer in round_.updates:
        np.testing.assert_array_equal(part.updates[layer], round_.updates[layer][[1, 0]])
    for layer in round_.parameters:
        np.testing.assert_array_equal(part.gram[layer], round_.gram[layer][np.ix_([1, 0], [1, 0])])
        np.testing.assert_array_equal(part.norms[layer], round_.norms[layer][[1, 0]])
        alone = round_.only([layer])
        assert list(alone.updates) == [layer]
        np.testing.assert_array_equal(alone.updates[layer], round_.updates[layer])
