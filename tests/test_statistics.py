"""Statistics against hand-computed answers and slow float64 oracles."""

from functools import partial

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import planted
from conftest import random_round
from gradlens.errors import CannotSay, InputError
from gradlens.log import UpdateLog
from gradlens.statistics import (
    STATISTICS,
    accumulated_norms,
    ddif,
    final_bias,
    final_bias_deviation,
    final_bias_direction,
    final_rows,
    final_spectrum,
    layer_cosines,
    layer_norms,
    neup,
    threshold_exceedings,
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
    log, asking = planted.clean_log(rounds=6), {"ddif": partial(ddif, predict=lambda state: np.full((1, 4), 0.25))}
    for statistic in (STATISTICS | asking).values():
        assert not [column for column in statistic(log).columns if "norm.count" in column]


def test_a_statistic_is_computed_once_for_a_log():
    calls = []

    def counted(log):
        calls.append(len(log))
        return layer_norms(log)

    log = planted.clean_log(rounds=2)
    for prefix in [*log.prefixes(), *log.prefixes()]:
        pd.testing.assert_frame_equal(prefix.remembered(counted), layer_norms(prefix))
    assert calls == [1, 2]


# The final layer: labels, energies, probabilities, frequencies


def without_bias(w):
    """A log of one final weight [client, class, input]."""
    w = np.asarray(w, np.float32)
    return planted.log_of({"w": w}, {"w": np.zeros(w.shape[1:], np.float32)})


def random_final_layer(seed, count, classes=5, inputs=7):
    rng = np.random.default_rng(seed)
    w, b = rng.normal(size=(count, classes, inputs)), rng.normal(size=(count, classes))
    state = {"w": np.zeros((classes, inputs), np.float32), "b": np.zeros(classes, np.float32)}
    return planted.log_of({"w": w.astype(np.float32), "b": b.astype(np.float32)}, state)


def arrays_of(log):
    return (np.asarray(log[-1].updates[name], np.float64) for name in ("w", "b"))


def test_final_bias_deviation_by_hand():  # the mean is (2.5, 2), the median (2.5, 0)
    log = small_log(FLAT, [[1, 0], [2, 0], [3, 0], [4, 8]])
    assert final_bias_deviation(log).columns.tolist() == ["b"]
    assert final_bias_deviation(log)["b"].tolist() == [2, 2, 2, 6]
    assert final_bias_deviation(log, centre="median")["b"].tolist() == [1.5, 0.5, 0.5, 8]


def test_final_bias_direction_by_hand():  # deviations from the median (0, 0)
    table = final_bias_direction(small_log(np.zeros((5, 2, 2)), [[3, 4], [-30, -40], [0, 0], [0, -2], [0, 0.5]]))
    assert table.columns.tolist() == ["b[0]", "b[1]"]
    np.testing.assert_allclose(table, [[0.6, 0.8], [-0.6, -0.8], [0, 0], [0, -1], [0, 1]])


W = [[[1, -1], [0, 1]], [[0, 0], [0, 0]], [[2, 0], [-1, 1]]]
B = [[-1, 0], [0, 0], [0, 0]]


def test_neup_by_hand():  # sums of sizes 3 and 1, 0 and 0, 2 and 2
    table = neup(small_log(W, B))
    assert table.columns.tolist() == ["w[0]", "w[1]"]
    np.testing.assert_allclose(table, [[0.9, 0.1], [0.5, 0.5], [0.5, 0.5]])


def test_neup_without_a_bias():  # sums of sizes 2 and 1
    np.testing.assert_allclose(neup(without_bias(W)).loc["a"], [0.8, 0.2])


def test_threshold_exceedings_by_hand():
    table = threshold_exceedings(small_log(W, B))
    assert table.columns.tolist() == ["w"]
    assert table["w"].tolist() == [1, 2, 2]


def test_a_class_at_the_threshold_does_not_exceed_it():
    # four classes: a quarter of the largest energy, which half of its size has, is not enough
    rows = [[[2], [1], [1], [1]], [[2], [1.01], [1], [0]], [[4], [3], [-3], [-3]]]
    assert threshold_exceedings(without_bias(rows))["w"].tolist() == [1, 2, 4]


def test_the_threshold_is_at_least_a_hundredth():
    # of 200 classes: 1/200 of the largest energy is that of 0.071 of its size, 0.01 that of 0.1
    rows = np.full((3, 200, 1), 0.08)
    rows[1], rows[2] = 0.11, -0.11
    rows[:, 17] = 1
    assert threshold_exceedings(without_bias(rows))["w"].tolist() == [1, 200, 200]


@given(seed=st.integers(0, 10_000), count=st.integers(3, 8))
@settings(max_examples=25, deadline=None)
def test_the_final_layer_against_slow_oracles(seed, count):
    log = random_final_layer(seed, count)
    w, b = arrays_of(log)
    for centre, middle in (("mean", np.mean), ("median", np.median)):
        expected = [max(abs(middle(b[:, k]) - b[i, k]) for k in range(5)) for i in range(count)]
        np.testing.assert_allclose(final_bias_deviation(log, centre)["b"], expected)  # type: ignore[arg-type]
    energies = np.array([[(abs(b[i, c]) + sum(abs(v) for v in w[i, c])) ** 2 for c in range(5)] for i in range(count)])
    shares = energies / energies.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(neup(log), shares)
    expected = [sum(share > max(0.01, 1 / 5) * max(row) for share in row) for row in shares]
    assert threshold_exceedings(log)["w"].tolist() == expected
    deviation = b - np.median(b, axis=0)
    expected = [row / (np.linalg.norm(row) or 1) for row in deviation]
    np.testing.assert_allclose(final_bias_direction(log), expected, rtol=1e-5, atol=1e-6)
    for share in (0.5, 0.19):  # of 40
        expected = [low_share(np.append(w[i], b[i]), share) for i in range(count)]
        np.testing.assert_allclose(final_spectrum(log, share)["w"], expected)


def low_share(numbers, share):
    """The energy of the lowest frequencies by the definition of the transform, DCT-II, orthonormal."""
    n = len(numbers)
    energy = []
    for k in range(n):
        total = sum(x * np.cos(np.pi * k * (2 * i + 1) / (2 * n)) for i, x in enumerate(numbers))
        energy.append(total**2 * (1 if k == 0 else 2) / n)
    return sum(energy[: int(share * n)]) / sum(energy)


def test_final_spectrum_by_hand():
    constant, alternating = np.full((2, 2), 3), np.array([[1, -1], [1, -1]])
    log = small_log([constant, alternating, np.zeros((2, 2))], [[3, 3], [1, -1], [0, 0]])
    table = final_spectrum(log)
    assert table.columns.tolist() == ["w"]
    np.testing.assert_allclose(table["w"], [1, low_share(np.tile([1.0, -1.0], 3), 0.5), 0], atol=1e-12)
    assert table["w"]["b"] < 0.1


def test_final_spectrum_is_of_the_weight_alone_without_a_bias():
    row = np.arange(6.0)
    found = final_spectrum(without_bias([row.reshape(3, 2)] * 3))
    np.testing.assert_allclose(found["w"], [low_share(row, 0.5)] * 3)


def test_the_final_layer_alone_decides():
    def others_changed(updates, who):
        updates["fc1.weight"][who] *= 7
        updates["fc1.bias"][who] -= 1

    log = planted.clean_log()
    changed = planted.edited(log, others_changed, planted.CLIENTS[:4])
    for statistic in (final_bias_deviation, final_bias_direction, neup, threshold_exceedings, final_spectrum):
        pd.testing.assert_frame_equal(statistic(changed), statistic(log))


@pytest.mark.parametrize("statistic", [final_bias_direction, neup, threshold_exceedings, final_spectrum])
@given(seed=st.integers(0, 10_000), power=st.integers(-60, 40))
@settings(max_examples=15, deadline=None)
def test_these_do_not_depend_on_the_size_of_the_update(statistic, seed, power):
    log = random_final_layer(seed, 5)
    scaled = {name: np.asarray(a) * np.float32(2.0**power) for name, a in log[-1].updates.items()}
    np.testing.assert_allclose(statistic(planted.log_of(scaled, log[-1].global_model)), statistic(log), rtol=1e-9)


@given(seed=st.integers(0, 10_000))
@settings(max_examples=15, deadline=None)
def test_renamed_labels_rename_the_columns(seed):
    log, order = random_final_layer(seed, 5), np.random.default_rng(seed).permutation(5)
    renamed = {name: np.asarray(a)[:, order] for name, a in log[-1].updates.items()}
    other = planted.log_of(renamed, log[-1].global_model)
    for statistic in (neup, final_bias_direction):
        np.testing.assert_allclose(statistic(other), statistic(log).to_numpy()[:, order])
    for statistic in (final_bias_deviation, threshold_exceedings):
        np.testing.assert_allclose(statistic(other), statistic(log))


@given(w=arrays(np.float32, (2, 2), elements=st.floats(-(2.0**99), 2.0**99, width=32)), count=st.integers(3, 6))
@settings(max_examples=30, deadline=None)
def test_equal_final_layers_say_the_same(w, count):
    log = small_log([w] * count, [w[0]] * count)
    for statistic in (final_bias_deviation, final_bias_direction, neup, threshold_exceedings, final_spectrum):
        table = statistic(log).to_numpy()
        assert np.isfinite(table).all()
        assert (table == table[0]).all()
    assert not final_bias_deviation(log).to_numpy().any()
    np.testing.assert_allclose(neup(log).sum(axis=1), 1)


@pytest.mark.parametrize(
    "statistic", [final_bias_deviation, final_bias_direction, neup, threshold_exceedings, final_spectrum]
)
@pytest.mark.parametrize("value", [np.nan, np.inf, 1e6])
def test_an_absurd_final_layer_is_nan_and_no_reference(statistic, value):
    log = planted.clean_log(rounds=1)
    table = statistic(planted.with_client_at(log, value))
    assert table.loc[planted.CULPRIT].isna().all()
    pd.testing.assert_frame_equal(table.drop(index=planted.CULPRIT), statistic(planted.without(log)), rtol=1e-12)


def test_settings_are_checked():
    log = planted.clean_log(rounds=1)
    with pytest.raises(InputError, match="centre must be 'mean' or 'median', found 'mode'"):
        final_bias_deviation(log, centre="mode")  # type: ignore[arg-type]
    for share in (0, 1, -1, np.nan):
        with pytest.raises(InputError, match="share must lie between 0 and 1"):
            final_spectrum(log, share=share)


def test_what_a_model_lacks_is_said():
    weight_only = planted.log_of({"w": np.ones((3, 2, 2), np.float32)}, {"w": STATE["w"]})
    for statistic in (final_bias_deviation, final_bias_direction):
        with pytest.raises(CannotSay, match="no final bias"):
            statistic(weight_only)
    bias_only = planted.log_of({"b": np.ones((3, 2), np.float32)}, {"b": STATE["b"]})
    for statistic in (neup, threshold_exceedings, final_spectrum, partial(ddif, predict=softmax)):
        with pytest.raises(CannotSay, match="no final weight"):
            statistic(bias_only)


INPUTS = np.random.default_rng(1).random((40, 2))


def softmax(state):
    """A linear model's probabilities of fixed random inputs."""
    logits = np.exp(INPUTS @ np.asarray(state["w"], np.float64).T + state["b"])
    return logits / logits.sum(axis=1, keepdims=True)


def test_ddif_needs_predict():
    with pytest.raises(CannotSay, match="ddif needs predict"):
        ddif(small_log(W, B))


def test_ddif_by_hand():
    """A mean of ratios, not a ratio of means; and of softmax outputs."""

    def predict(state):
        second = np.array([0.5, 0.2]) + state["b"][1]
        return np.stack([1 - second, second], axis=1)

    table = ddif(small_log(np.zeros((3, 2, 2)), [[0, 0], [0, 0.25], [0, -0.1]]), predict)
    assert table.columns.tolist() == ["w[0]", "w[1]"]
    expected = [[1, 1], [(0.25 / 0.5 + 0.55 / 0.8) / 2, (0.75 / 0.5 + 0.45 / 0.2) / 2]]
    expected += [[(0.6 / 0.5 + 0.9 / 0.8) / 2, (0.4 / 0.5 + 0.1 / 0.2) / 2]]
    np.testing.assert_allclose(table, expected, rtol=1e-6)


def test_ddif_against_a_slow_oracle():
    log = small_log(np.random.default_rng(0).normal(size=(4, 2, 2)), np.random.default_rng(1).normal(size=(4, 2)))
    w, b = arrays_of(log)
    before = softmax(STATE)
    for row, found in enumerate(ddif(log, predict=softmax).to_numpy()):
        after = softmax({"w": w[row], "b": b[row]})
        expected = [np.mean([after[m, c] / before[m, c] for m in range(40)]) for c in range(2)]
        np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_ddif_asks_of_whole_local_models_of_comparable_clients():
    asked = []

    def predict(state):
        asked.append(state)
        return np.full((1, 4), 0.25)

    log = planted.with_client_at(planted.clean_log(rounds=1, clients=planted.CLIENTS[:6]), np.nan)
    table = ddif(log, predict)
    assert table.loc[planted.CULPRIT].isna().all()
    assert (table.drop(index=planted.CULPRIT) == 1).to_numpy().all()
    assert len(asked) == 6
    for state, row in zip(asked[1:], range(5), strict=True):
        for name, array in planted.STATE.items():
            assert state[name].dtype == array.dtype
            np.testing.assert_array_equal(state[name], array + log[-1].updates[name][row])


def test_ddif_of_probabilities_that_vanish():
    def predict(state):
        return np.array([[1.0, state["b"][1]]])

    found = ddif(small_log(np.zeros((4, 2, 2)), [[0, 0], [0, 0], [0, np.float32(2e-38)], [0, 0]]), predict)["w[1]"]
    np.testing.assert_allclose(found, [1, 1, 2e-38 / np.finfo(np.float32).tiny, 1], rtol=1e-6)


def test_a_client_whose_model_answers_nan_is_nan():
    def predict(state):
        return np.array([[0.5, np.nan if state["b"][0] > 1 else 0.5]])

    table = ddif(small_log(FLAT, [[0, 0], [2, 0], [0, 0], [0, 0]]), predict)
    assert np.isfinite(table).all(axis=1).tolist() == [True, False, True, True]


@pytest.mark.parametrize("answer", [np.full(2, 0.5), np.full((3, 3), 1 / 3), np.full((3, 2), np.nan), np.ones((0, 2))])
def test_ddif_checks_what_predict_gives(answer):
    with pytest.raises(InputError, match=r"predict must give finite probabilities \[sample, 2\]"):
        ddif(small_log(W, B), lambda state: answer)


def test_ddif_wants_the_same_samples_every_time():
    sizes = iter([3, 3, 4, 3])
    with pytest.raises(InputError, match=r"\(3, 2\) for the global model, \(4, 2\) for a client"):
        ddif(small_log(W, B), lambda state: np.full((next(sizes), 2), 0.5))
