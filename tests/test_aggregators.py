"""Aggregators against hand-computed answers and float64 oracles; the filter; the step of the global model."""

import statistics as standard

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import planted
from gradlens.aggregators import (
    AGGREGATORS,
    filtered,
    geometric_median,
    krum,
    mean,
    median,
    multi_krum,
    step,
    trimmed_mean,
)
from gradlens.detectors import DETECTORS, score_by
from gradlens.errors import InputError
from gradlens.scorers import robust_zscore
from gradlens.statistics import layer_norms

STATE = {"w": np.zeros(2, np.float32)}
BUFFERED = {
    "w": np.zeros(2, np.float32),
    "running_mean": np.zeros(2),
    "count": np.array(5, np.int64),
}


def log_of(w, examples=None):
    w = np.array(w, np.float32)
    fields = {} if examples is None else {"num_examples": np.array(examples)}
    return planted.log_of({"w": w}, STATE, **fields)


def buffered_log(running, counts):
    rows = {"w": np.zeros((3, 2), np.float32), "running_mean": np.array(running, np.float64), "count": np.array(counts)}
    return planted.log_of(rows, BUFFERED, buffers=("running_mean", "count"))


def test_mean_by_hand():
    np.testing.assert_array_equal(mean()(log_of([[1, 10], [2, 20], [6, 0]]))["w"], [3, 10])


def test_weighted_mean_by_hand():  # (1 x 10 + 5 x 30) / 40
    np.testing.assert_array_equal(mean(weighted=True)(log_of([[1, 0], [5, 4]], [10, 30]))["w"], [4, 3])


def test_a_claim_of_examples_is_capped():
    # the median claim is 10, so a million counts as 20: (1 x 10 + 1 x 10 + 7 x 20) / 40
    log = log_of([[1, 0], [1, 0], [7, 0]], [10, 10, 1_000_000])
    np.testing.assert_array_equal(mean(weighted=True, cap=2)(log)["w"], [4, 0])
    np.testing.assert_allclose(mean(weighted=True)(log)["w"], [(2 * 10 + 7 * 100) / 120, 0], rtol=1e-6)


def test_a_broken_client_sets_no_cap():
    log = log_of([[1, 0], [5, 0], [np.nan, 0]], [10, 30, 1_000_000])
    np.testing.assert_array_equal(mean(weighted=True)(log)["w"], [4, 0])


@pytest.mark.parametrize("examples", [[0, 0], [-5, 0]])
def test_claims_of_no_examples_count_alike(examples):
    np.testing.assert_array_equal(mean(weighted=True)(log_of([[1, 0], [5, 4]], examples))["w"], [3, 2])


def test_a_negative_claim_counts_as_none():
    log = log_of([[9, 9], [1, 0], [5, 4]], [-5, 10, 10])
    np.testing.assert_array_equal(mean(weighted=True)(log)["w"], [3, 2])


def test_the_order_of_arrival_changes_no_bit():
    """2^60 + 1 is 2^60 in float64, so that the sum of these three depends on their order."""
    w = np.array([[2.0**60, 0], [-(2.0**60), 0], [1, 0]], np.float32)
    log = log_of(w)
    for order in ([0, 1, 2], [0, 2, 1], [2, 1, 0]):
        np.testing.assert_array_equal(mean()(log.keep(np.array(order)))["w"], np.float32([1 / 3, 0]))


@pytest.mark.parametrize("rows", [1, 2, 5, 6])
def test_median_against_the_standard_library(rows, rng):
    w = rng.normal(size=(rows, 2)).astype(np.float32)
    expected = [standard.median(w[:, c].astype(float).tolist()) for c in range(2)]
    np.testing.assert_array_equal(median()(log_of(w))["w"], np.float32(expected))


def test_median_of_huge_numbers_does_not_overflow():
    np.testing.assert_array_equal(median()(log_of([[3e38, 0], [3.2e38, 1]]))["w"], np.float32([3.1e38, 0.5]))


def test_sums_are_formed_in_float64():
    """Float32 loses the small ones: 1e8 + 1 = 1e8 there."""
    w = [[1e8, 0]] + [[1, 0]] * 9
    np.testing.assert_array_equal(mean()(log_of(w))["w"], np.float32([(1e8 + 9) / 10, 0]))


@pytest.mark.parametrize("rule", [mean(), median(), trimmed_mean(), geometric_median()], ids=repr)
def test_buffers_are_averaged_in_their_own_type(rule):
    update = rule(buffered_log([[1, 2], [2, 2], [9, 2]], [7, 8, 8]))  # 23 / 3 = 7.67
    assert update["running_mean"].tolist() == [4, 2]
    assert update["running_mean"].dtype == np.float64
    assert (int(update["count"]), update["count"].dtype, update["count"].shape) == (8, np.int64, ())


@settings(deadline=None)  # other work on the machine is no fault
@given(
    arrays(np.float32, st.tuples(st.integers(1, 7), st.just(2)), elements=st.floats(-(2.0**100), 2.0**100, width=32))
)
def test_mean_and_median_lie_between_the_extremes(w):
    for rule in (mean(), median(), mean(weighted=True), trimmed_mean(1), geometric_median(), krum(), multi_krum()):
        found = rule(log_of(w))["w"]
        assert (found >= w.min(axis=0)).all()
        assert (found <= w.max(axis=0)).all()


def test_settings_show():
    assert repr(AGGREGATORS["mean"](weighted=True)) == "mean(weighted=True, cap=10)"
    assert mean() != mean(weighted=True)
    assert repr(trimmed_mean(2)) == "trimmed_mean(num_malicious=2)"
    assert repr(geometric_median()) == "geometric_median(smoothing=1e-06, iterations=100)"
    assert repr(krum()) == "krum(num_malicious=None)"
    assert repr(multi_krum(2, 3)) == "multi_krum(num_malicious=2, num_selected=3)"


# trimmed mean, geometric median, Krum


def test_trimmed_mean_by_hand():
    w = [[1, -50], [2, 3], [9, 4], [4, 5], [100, 6]]
    np.testing.assert_array_equal(trimmed_mean(1)(log_of(w))["w"], [5, 4])
    np.testing.assert_array_equal(trimmed_mean(0)(log_of(w))["w"], np.float32([23.2, -6.4]))
    np.testing.assert_array_equal(trimmed_mean()(log_of(w))["w"], median()(log_of(w))["w"])
    np.testing.assert_array_equal(trimmed_mean(9)(log_of(w))["w"], median()(log_of(w))["w"])  # it tolerates 2


@settings(deadline=None)  # other work on the machine is no fault
@given(st.integers(1, 9), st.integers(0, 4), st.integers(0, 99))
def test_trimmed_mean_is_its_definition(clients, trimmed, seed):
    w = np.random.default_rng(seed).normal(size=(clients, 2)).astype(np.float32)
    stood = min(trimmed, (clients - 1) // 2)
    expected = [np.mean(sorted(w[:, c].astype(float))[stood : clients - stood]) for c in range(2)]
    np.testing.assert_allclose(trimmed_mean(trimmed)(log_of(w))["w"], expected, rtol=1e-6, atol=1e-9)


def naive_weiszfeld(w, iterations, smoothing=1e-6):
    """The formula, coordinate by coordinate in float64."""
    point = w.mean(axis=0)
    for _ in range(iterations):
        nearness = np.array([1 / max(smoothing, np.sqrt(sum((row - point) ** 2))) for row in w])
        point = sum(n * row for n, row in zip(nearness, w, strict=True)) / nearness.sum()
    return point


@pytest.mark.parametrize("iterations", [1, 3, 100])
@pytest.mark.parametrize("clients", [1, 2, 3, 8])
def test_geometric_median_is_its_definition(iterations, clients, rng):
    w = (np.array([30, 0]) + rng.normal(size=(clients, 2))).astype(np.float32)
    found = geometric_median(iterations=iterations)(log_of(w))["w"]
    np.testing.assert_allclose(found, naive_weiszfeld(w.astype(float), iterations), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [1e3, 1e30])
def test_geometric_median_stays_where_the_others_are(size, rng):
    """A client that is far away pulls with the same force however far it is."""
    w = rng.normal(size=(9, 2)).astype(np.float32)
    w[0] = size
    found = geometric_median()(log_of(w))["w"]
    w[0] = w[0] / size * 1e5
    np.testing.assert_allclose(found, geometric_median()(log_of(w))["w"], atol=0.01)
    assert np.abs(found).max() < 1


def test_geometric_median_minimises_the_sum_of_distances(rng):
    w = rng.normal(size=(7, 2)).astype(np.float32)
    found = geometric_median()(log_of(w))["w"].astype(float)

    def total(point):
        return np.linalg.norm(w - point, axis=1).sum()

    nearby = found + 0.01 * rng.normal(size=(50, 2))
    assert total(found) <= min(total(point) for point in nearby) + 1e-9


def naive_krum(w, malicious):
    """Scores by the definition: the sum of squared distances to the n - f - 2 nearest others."""
    return [
        sum(sorted(sum((a - b) ** 2) for j, b in enumerate(w) if j != i)[: len(w) - malicious - 2])
        for i, a in enumerate(w.astype(float))
    ]


@settings(deadline=None)  # other work on the machine is no fault
@given(st.integers(4, 11), st.integers(0, 3), st.integers(0, 9_999))
def test_krum_is_its_definition(clients, malicious, seed):
    """Not n - f - 1 neighbours, not distances, not their fourth powers: each picks others in some of these."""
    malicious = min(malicious, (clients - 3) // 2)
    w = np.random.default_rng(seed).standard_t(2, size=(clients, 2)).astype(np.float32)
    order = np.argsort(naive_krum(w, malicious), kind="stable")
    np.testing.assert_array_equal(krum(malicious)(log_of(w))["w"], w[order[0]])
    for selected in (None, 1, 3):
        best = order[: selected or clients - malicious]
        found = multi_krum(malicious, selected)(log_of(w))["w"]
        np.testing.assert_allclose(found, w[best].astype(float).mean(axis=0), rtol=1e-5, atol=1e-6)


def test_krum_tolerates_as_many_as_its_bound_allows(rng):
    """n > 2 f + 2: of 12 clients 4; six who agree exactly are too many, four are not."""
    w = rng.normal(size=(12, 2)).astype(np.float32)
    w[:4] = [5, 5]
    assert np.linalg.norm(krum()(log_of(w))["w"]) < 4
    np.testing.assert_array_equal(krum(9)(log_of(w))["w"], krum(4)(log_of(w))["w"])
    w[:6] = [5, 5]
    np.testing.assert_array_equal(krum()(log_of(w))["w"], [5, 5])


@pytest.mark.parametrize("rule", [krum(), multi_krum(2, 1)], ids=repr)
def test_krum_in_small_cohorts_takes_the_first_of_equals(rule):
    np.testing.assert_array_equal(rule(log_of([[4, 1]]))["w"], [4, 1])
    np.testing.assert_array_equal(rule(log_of([[4, 1], [0, 0]]))["w"], [4, 1])
    np.testing.assert_array_equal(rule(log_of([[9, 9], [0, 1], [0, 0]]))["w"], [0, 1])


def test_krum_averages_the_buffers_of_whom_it_selects():
    rows = {
        "w": np.array([[0, 0], [0, 1], [0, 2], [50, 50]], np.float32),
        "running_mean": np.array([[1, 1], [2, 2], [3, 3], [99, 99]], np.float64),
        "count": np.array([1, 2, 3, 99]),
    }
    log = planted.log_of(rows, BUFFERED, buffers=("running_mean", "count"))
    assert int(krum(0)(log)["count"]) == 2
    assert multi_krum(0, 3)(log)["running_mean"].tolist() == [2, 2]


def test_rules_see_the_whole_update():
    """Client a is nearest in either layer, client b in both together."""
    rows = {"v": np.array([[0.0], [1], [5], [1]]), "w": np.array([[9.0, 0], [1, 0], [1, 0], [0, 0]])}
    log = planted.log_of(rows, {"v": np.zeros(1, np.float32), "w": np.zeros(2, np.float32)})
    assert krum(0)(log)["v"].tolist() == [1]
    assert krum(0)(log)["w"].tolist() == [1, 0]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: krum(-1), "krum: num_malicious must be a whole number of at least 0"),
        (lambda: trimmed_mean(1.5), "trimmed_mean: num_malicious"),
        (lambda: multi_krum(1, 0), "multi_krum: num_selected must be a whole number of at least 1"),
        (lambda: geometric_median(iterations=True), "geometric_median: iterations"),
        (lambda: geometric_median(smoothing=0), "geometric_median: smoothing is a length above 0"),
    ],
)
def test_wrong_settings_are_refused_in_one_line(build, message):
    with pytest.raises(InputError, match=message):
        build()


def test_who_is_not_finite_does_not_count_among_the_tolerated(rng):
    w = rng.normal(size=(9, 2)).astype(np.float32)
    broken = np.vstack([w, [[np.nan, 0], [np.inf, 1]]]).astype(np.float32)
    for rule in (trimmed_mean(), krum(), multi_krum(), geometric_median(), trimmed_mean(3), multi_krum(3)):
        np.testing.assert_array_equal(rule(log_of(broken))["w"], rule(log_of(w))["w"])


# filtered


def norms(threshold=3.5):
    return score_by(layer_norms, robust_zscore, threshold)


def test_filter_leaves_out_the_outlier():
    log = planted.PLANTED["boosted"].log()
    rule = filtered(mean(), norms(20))
    assert log[-1].clients[~rule.kept(log)].tolist() == [planted.CULPRIT]
    expected = mean()(planted.without(log))
    for name, array in rule(log).items():
        np.testing.assert_array_equal(array, expected[name])
    assert rule.verdict(log) is log.verdict(norms(20))


def test_filter_that_abstains_uses_everybody_it_can():
    log = planted.with_client_at(planted.clean_log(clients=planted.CLIENTS[4:7]), np.nan)
    rule = filtered(mean(), norms())
    assert rule.verdict(log).abstained
    assert rule.kept(log).tolist() == [True, False, True]
    two = planted.clean_log(clients=planted.CLIENTS[:2])
    np.testing.assert_array_equal(rule(two)["fc1.weight"], mean()(two)["fc1.weight"])


def test_filter_uses_the_whole_history_and_only_the_last_cohort():
    """A detector that flags by history must see the earlier rounds; the aggregate is of the last one."""
    log = planted.PLANTED["drifting"].log(rounds=8)
    rule = filtered(mean(), DETECTORS["accumulated_norms"](threshold=6))
    assert log[-1].clients[~rule.kept(log)].tolist() == [planted.CULPRIT]
    assert rule.kept(log[:2]).all()


def test_filters_are_values():
    assert filtered(mean(), norms()) == filtered(mean(), norms())
    assert len({filtered(mean(), norms()), filtered(mean(), norms()), filtered(median(), norms())}) == 2
    assert repr(filtered(mean(), norms())) == (
        "filtered(mean(weighted=False, cap=10), score_by(layer_norms, robust_zscore, threshold=3.5))"
    )


def test_filters_nest():
    log = planted.with_client_at(planted.PLANTED["boosted"].log(), np.nan, "client-00")
    outer = filtered(filtered(mean(), norms(20)), DETECTORS["final_bias"](threshold=1e9))
    rest = planted.without(planted.without(log), "client-00")
    np.testing.assert_array_equal(outer(log)["fc2.bias"], mean()(rest)["fc2.bias"])


# step


def test_step_by_hand():
    state = {"w": np.array([1, 2], np.float32), "count": np.array(5, np.int64)}
    update = {"w": np.array([2, -4], np.float32), "count": np.array(3, np.int64)}
    half = step(state, update, 0.5)
    assert half["w"].tolist() == [2, 0]
    assert half["w"].dtype == np.float32
    assert (int(half["count"]), half["count"].dtype) == (6, np.int64)  # 6.5 rounds to the even number
    whole = step(state, update)
    assert whole["w"].tolist() == [3, -2]
    assert int(whole["count"]) == 8
    assert state["w"].tolist() == [1, 2]


def test_step_rounds_once():
    """In float32 the product would be rounded before the sum, here to another last digit."""
    w, u = np.float32(-0.7037352323532104), np.float32(-1.2654215097427368)
    assert np.float32(0.3) * u + w != np.float32(np.float64(w) + 0.3 * np.float64(u))
    found = step({"w": np.array([w])}, {"w": np.array([u])}, 0.3)["w"][0]
    assert found == np.float32(np.float64(w) + 0.3 * np.float64(u))


def test_step_needs_an_update_for_every_layer():
    with pytest.raises(KeyError):
        step({"w": np.zeros(1, np.float32)}, {})
