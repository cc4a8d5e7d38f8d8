"""Rounds of linear combinations of clients: numbers, inner products and means are those of the matrix product."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

import planted
from gradlens.aggregators import geometric_median, mean, trimmed_mean
from gradlens.detectors import DETECTORS
from gradlens.errors import CannotSay, InputError
from gradlens.log import ModelSpec, Round, UpdateLog


def flat(round_):
    """All parameters of each client, float64 [client, number]."""
    return np.concatenate([round_.flat(name) for name in round_.parameters], axis=1).astype(np.float64)


def flat_update(update):
    return np.concatenate([np.asarray(update[name], np.float64).reshape(-1) for name in planted.LAYERS])


@settings(deadline=None)  # other work on the machine is no fault
@given(st.integers(1, 8), st.integers(0, 999), st.booleans())
def test_a_combination_is_the_matrix_product(new, seed, thin):
    rng = np.random.default_rng(seed)
    round_ = planted.clean_log(1)[-1]
    matrix = rng.normal(size=(new, 12))
    if thin:
        matrix *= np.arange(12) == rng.integers(12, size=(new, 1))  # every row scales one client
    mixed = round_.combined(matrix, np.array([f"new-{i}" for i in range(new)]))
    expected, size = matrix @ flat(round_), np.abs(matrix).sum(axis=1).max()
    np.testing.assert_allclose(flat(mixed), expected, atol=1e-6 * size)
    np.testing.assert_allclose(mixed.total_gram, expected @ expected.T, atol=1e-9 * size**2)
    norms = np.sqrt(sum(mixed.norms[name] ** 2 for name in mixed.parameters))
    np.testing.assert_allclose(norms, np.linalg.norm(expected, axis=1), atol=1e-6 * size)
    weights = rng.random(new) + 0.1
    for name in planted.LAYERS:
        found = mixed.weighted_mean(name, np.arange(new), weights)
        product = weights @ matrix @ round_.flat(name).astype(np.float64) / weights.sum()
        np.testing.assert_allclose(found.reshape(-1), product, atol=1e-6 * size)


def test_combinations_of_parts_of_combinations(rng):
    round_ = planted.clean_log(1)[-1]
    first, second = rng.normal(size=(5, 12)), rng.normal(size=(2, 3))
    part = round_.combined(first, np.array(list("abcde"))).take(np.array([4, 0, 2]))
    twice = part.combined(second, np.array(["x", "y"]))
    expected = second @ (first @ flat(round_))[[4, 0, 2]]
    np.testing.assert_allclose(flat(twice), expected, atol=1e-5)
    np.testing.assert_allclose(twice.total_gram, expected @ expected.T, atol=1e-9)
    only = twice.only(["fc2.bias"])
    np.testing.assert_array_equal(only.updates["fc2.bias"], twice.updates["fc2.bias"])


def test_buffers_and_claims_are_mixed_by_shares():
    rows = {"w": np.array([[1.0], [2], [6]], np.float32), "count": np.array([1, 2, 6])}
    state, examples = {"w": np.zeros(1, np.float32), "count": np.array(0)}, np.array([10, 20, 60])
    log = planted.log_of(rows, state, buffers=("count",), num_examples=examples)
    mixed = log[-1].combined(np.array([[0.5, 0.5, 0], [0, 0, -0.25]]), np.array(["ab", "c"]))
    assert mixed.updates["w"].tolist() == [[1.5], [-1.5]]
    assert mixed.updates["count"].tolist() == [2, 6]  # 1.5 rounds to the even number; who is scaled keeps its own
    assert mixed.num_examples.tolist() == [15, 60]


def test_ones_change_no_bit():
    log = planted.clean_log()
    same = log.combined(np.eye(12))
    for rule in (mean(), trimmed_mean(2), geometric_median()):
        for name, array in rule(log).items():
            np.testing.assert_array_equal(rule(same)[name], array)


def test_equal_combinations_are_exactly_as_near_to_everybody(rng):
    matrix = rng.random((6, 12))
    matrix[4] = matrix[1]
    mixed = planted.clean_log()[-1].combined(matrix, np.array(list("abcdef")))
    assert mixed.squared_distances[1, 4] == 0
    np.testing.assert_array_equal(mixed.total_gram[1], mixed.total_gram[4])


def test_a_combined_log_has_answers_of_its_own():
    log = planted.PLANTED["boosted"].log()
    detector = DETECTORS["layer_norms"]()
    before = log.verdict(detector)
    halved = log.combined(0.5 * np.eye(12))
    turned = log.combined(np.eye(12)[::-1])
    assert turned.verdict(detector).scores.tolist() == before.scores[::-1].tolist()
    np.testing.assert_allclose(halved.verdict(detector).scores, before.scores, rtol=1e-6)  # a scale changes no z
    assert halved.verdict(detector) is not before
    assert log.verdict(detector) is before
    assert len(halved) == len(log)


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        (np.ones((2, 12)), r"a matrix \(12, 12\), found \(2, 12\)"),
        (np.ones((12, 12)), "none that is not finite"),
        (np.diag([1.0] * 11 + [0]), "a finite client in each row"),
    ],
)
def test_what_is_no_combination_is_refused(matrix, message):
    log = planted.with_client_at(planted.clean_log(), np.nan)
    with pytest.raises(InputError, match=message):
        log[-1].combined(matrix)


def test_a_matrix_that_is_given_stays_as_it_is():
    matrix = sparse.csr_array(np.diag([1.0] * 12))
    matrix.data[:] = [0.0, *[1.0] * 11]
    planted.clean_log()[-1].combined(matrix[1:], np.array(planted.CLIENTS[1:]))
    assert matrix.nnz == 12


def test_many_clients_are_scaled_without_pairs():
    """Above 5,000 nothing pairwise is formed; who is fewer after buckets has inner products again."""
    clients = np.array([f"{i:05d}" for i in range(5_200)])
    w = np.random.default_rng(0).normal(size=(len(clients), 3)).astype(np.float32)
    state = {"w": np.zeros(3, np.float32)}
    log = UpdateLog(ModelSpec.of(state), [Round(0, clients, np.ones(len(clients)), {"w": w}, state)])
    halved = log.combined(sparse.diags_array(np.full(len(clients), 0.5)))
    np.testing.assert_array_equal(halved[-1].norms["w"], log[-1].norms["w"] / 2)
    with pytest.raises(CannotSay, match="nothing pairwise"):
        _ = halved[-1].total_gram
    pairs = sparse.csr_array(np.kron(np.eye(2_600), [0.5, 0.5]))
    joined = log.combined(pairs, clients[::2])[-1]
    expected = (w[::2].astype(np.float64) + w[1::2]) / 2
    np.testing.assert_allclose(joined.total_gram[:5], expected[:5] @ expected.T, atol=1e-6)


def test_a_combination_started_from_no_round_and_is_signed_by_nobody(rng):
    updates = {"fc.weight": rng.normal(size=(3, 2, 2))}
    state = {"fc.weight": np.zeros((2, 2), np.float32)}
    told = {"started": {"a": 0}, "signatures": {"b": "text"}}
    round_ = Round(2, np.array(["a", "b", "c"]), np.ones(3), updates, state, **told)
    mixed = round_.combined(np.full((3, 3), 1 / 3))
    assert (mixed.started, mixed.signatures) == ({}, {})
    assert (round_.started, round_.signatures) == ({"a": 0}, {"b": "text"})
