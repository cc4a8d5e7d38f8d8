"""Statistics against hand-computed answers and slow float64 oracles."""

import numpy as np
import pandas as pd
import pytest

import planted
from conftest import random_round
from gradlens.log import CannotSay, UpdateLog
from gradlens.statistics import (
    STATISTICS,
    accumulated_norms,
    final_bias,
    final_rows,
    layer_cosines,
    layer_norms,
)

STATE = {"w": np.zeros((2, 2), np.float32), "b": np.zeros(2, np.float32)}


def small_log(w, b=None):
    w = np.array(w, np.float32)
    b = np.zeros((len(w), 2), np.float32) if b is None else np.array(b, np.float32)
    return planted.log_of({"w": w, "b": b}, STATE)


FLAT = np.zeros((4, 2, 2))


def test_final_bias_by_hand():  # medians 2.5 and 0
    table = final_bias(small_log(FLAT, [[1, 0], [2, 0], [3, 0], [4, 8]]))
    assert table.columns.tolist() == ["b[0]", "b[1]"]
    assert table.index.tolist() == ["a", "b", "c", "d"]
    np.testing.assert_array_equal(table, [[-1.5, 0], [-0.5, 0], [0.5, 0], [1.5, 8]])


def test_final_rows_by_hand():  # the median row is (0, 0) for class 0, (1, 1) for class 1
    w = [[[0, 0], [1, 1]], [[0, 0], [1, 1]], [[3, 4], [1, 1]], [[0, 0], [1, 3]], [[0, 0], [1, 1]]]
    table = final_rows(small_log(w))
    assert table.columns.tolist() == ["w[0]", "w[1]"]
    np.testing.assert_array_equal(table, [[0, 0], [0, 0], [5, 0], [0, 2], [0, 0]])


def test_layer_norms_by_hand():
    table = layer_norms(small_log([[[3, 0], [0, 4]], [[1, 1], [1, 1]], [[0, 0], [0, 0]]], [[0, 2], [0, 0], [5, 12]]))
    assert table.columns.tolist() == ["w", "b"]
    np.testing.assert_allclose(table, [[5, 2], [2, 0], [0, 13]])


def test_layer_cosines_by_hand():
    # the median of b is (1, 0), that of w is 0, and so is what client c sends
    table = layer_cosines(small_log(np.zeros((5, 2, 2)), [[1, 0], [1, 1], [0, 0], [-2, 0], [7, 0]]))
    np.testing.assert_allclose(table["b"], [1, np.sqrt(0.5), 0, -1, 1])
    assert table["w"].tolist() == [0] * 5


def test_accumulated_norms_by_hand():
    # residuals to the median 0 of b: +2, -2, 0 in both rounds, every other norm equal, so nothing is clipped
    once = small_log(np.zeros((3, 2, 2)), [[2, 0], [-2, 0], [0, 0]])
    twice = once.append(once[0])
    np.testing.assert_allclose(accumulated_norms(twice)["b"], np.array([4, 4, 0]) / np.sqrt(2), rtol=1e-6)
    thrice = twice.append(once[0])
    np.testing.assert_allclose(accumulated_norms(thrice)["b"], np.array([6, 6, 0]) / np.sqrt(3), rtol=1e-6)


def test_accumulated_norms_wait_until_most_clients_have_come_twice(model):
    log = UpdateLog(model, [random_round(0, "abcd"), random_round(1, "efghab"), random_round(2, "efgab")])
    for early in (log[:1], log[:2]):
        with pytest.raises(CannotSay, match="most of its clients have taken part once"):
            accumulated_norms(early)
    assert accumulated_norms(log).index.tolist() == list("efgab")


def test_accumulated_norms_follow_the_client_not_the_row(model):
    """Rounds with other participants in another order."""
    rounds = [random_round(0, "abcd"), random_round(1, "dbx"), random_round(2, "xcab")]
    log = UpdateLog(model, rounds)
    table = accumulated_norms(log)
    assert table.index.tolist() == list("xcab")
    for client, seen in {"x": [1, 2], "c": [0, 2], "a": [0, 2], "b": [0, 1, 2]}.items():
        for layer in model.parameters:
            total = sum(clipped_residual(rounds[i], client, layer) for i in seen)
            expected = np.linalg.norm(total) / np.sqrt(len(seen))
            assert table.loc[client, layer] == pytest.approx(expected, rel=1e-5)


def clipped_residual(round_, client, layer):
    x = np.asarray(round_.updates[layer], np.float64).reshape(len(round_.clients), -1)
    residuals = x - np.median(x, axis=0)
    norms = np.linalg.norm(residuals, axis=1)
    row = round_.clients.tolist().index(client)
    return residuals[row] * min(1, 3 * np.median(norms) / norms[row])


def oracle(name, log):
    """The same in float64, client by client, of the last round of a log without absurd clients."""
    round_, columns = log[-1], {}
    for layer in planted.LAYERS:
        x = np.asarray(round_.updates[layer], np.float64)
        middle = np.median(x, axis=0)
        if name == "layer_norms":
            columns[layer] = [np.linalg.norm(row) for row in x]
        elif name == "layer_cosines":
            columns[layer] = [np.vdot(row, middle) / np.linalg.norm(row) / np.linalg.norm(middle) for row in x]
        elif name == "final_bias" and layer == "fc2.bias":
            columns |= {f"{layer}[{c}]": x[:, c] - middle[c] for c in range(4)}
        elif name == "final_rows" and layer == "fc2.weight":
            columns |= {f"{layer}[{c}]": [np.linalg.norm(row[c] - middle[c]) for row in x] for c in range(4)}
    return pd.DataFrame(columns, index=round_.clients)


@pytest.mark.parametrize("name", ["final_bias", "final_rows", "layer_norms", "layer_cosines"])
@pytest.mark.parametrize("count", [5, 6])
def test_against_a_slow_oracle(name, count):
    log = planted.clean_log(clients=planted.CLIENTS[:count])
    table, expected = STATISTICS[name](log), oracle(name, log)
    assert table.columns.tolist() == expected.columns.tolist()
    np.testing.assert_allclose(table, expected, rtol=1e-5, atol=1e-8)


def test_layer_cosines_of_a_layer_larger_than_a_block(rng):
    state = {"w": np.zeros((3, 20_000), np.float32), "b": np.zeros(3, np.float32)}
    rows = {"w": rng.normal(size=(5, 3, 20_000)).astype(np.float32), "b": np.zeros((5, 3), np.float32)}
    x = rows["w"].reshape(5, -1).astype(np.float64)
    middle = np.median(x, axis=0)
    expected = x @ middle / np.linalg.norm(x, axis=1) / np.linalg.norm(middle)
    np.testing.assert_allclose(layer_cosines(planted.log_of(rows, state))["w"], expected, rtol=1e-6)


def test_a_client_of_absurd_size_is_nan_and_no_reference():
    table = final_bias(small_log(np.zeros((4, 2, 2)), [[1, 0], [2, 0], [3, 0], [1e6, 1e6]]))
    np.testing.assert_array_equal(table, [[-1, 0], [0, 0], [1, 0], [np.nan, np.nan]])


def test_a_model_without_a_final_bias_says_so():
    log = planted.log_of({"w": np.ones((3, 2, 2), np.float32)}, {"w": STATE["w"]})
    with pytest.raises(CannotSay, match="no final bias; final_rows"):
        final_bias(log)
    assert final_rows(log).shape == (3, 2)


def test_a_model_without_a_matrix_says_so():
    log = planted.log_of({"b": np.ones((3, 2), np.float32)}, {"b": STATE["b"]})
    with pytest.raises(CannotSay, match="no final weight"):
        final_rows(log)
    assert layer_norms(log).shape == (3, 1)


def test_buffers_are_never_scored():
    for statistic in STATISTICS.values():
        assert not [column for column in statistic(planted.clean_log()).columns if "norm.count" in column]


def test_a_statistic_is_computed_once_for_a_log():
    calls = []

    def counted(log):
        calls.append(len(log))
        return layer_norms(log)

    log = planted.clean_log(rounds=2)
    for prefix in [*log.prefixes(), *log.prefixes()]:
        pd.testing.assert_frame_equal(prefix.remembered(counted), layer_norms(prefix))
    assert calls == [1, 2]
