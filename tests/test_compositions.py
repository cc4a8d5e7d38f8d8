"""Bulyan, RLR, clipping, noise, mixing, buckets, FLAME, CRFL against their definitions, by naive float64 oracles."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sklearn.cluster import HDBSCAN

import planted
from gradlens.aggregators import (
    AGGREGATORS,
    RULES,
    bucketing,
    bulyan,
    centred_clipping,
    clipped,
    crfl,
    filtered,
    flame,
    geometric_median,
    krum,
    mean,
    median,
    nearest_neighbour_mixing,
    noised,
    norm_clipping,
    rlr,
    weak_dp,
)
from gradlens.detectors import score_by
from gradlens.errors import InputError
from gradlens.log import ModelSpec, Round, UpdateLog
from gradlens.scorers import robust_zscore
from gradlens.statistics import layer_norms

STATE = {"v": np.zeros(1, np.float32), "w": np.zeros((2, 1), np.float32), "count": np.array(5, np.int64)}
COMPOSED = [name for name in AGGREGATORS if name not in ("mean", "median", "trimmed_mean", "krum", "multi_krum")]


def log_of(x, *, rounds=1, state=STATE, counts=None):
    """A log whose every round has these updates of three numbers in two layers, [client, 3], and a counter."""
    x = np.asarray(x, np.float32)
    updates = {"v": x[:, :1], "w": x[:, 1:, None], "count": np.arange(len(x)) if counts is None else np.array(counts)}
    clients = np.array([f"client-{i:02d}" for i in range(len(x))], dtype=np.str_)
    model = ModelSpec.of(state, buffers=["count"])
    examples = np.full(len(x), 10)
    return UpdateLog(model, [Round(i, clients, examples, updates, state, buffers=("count",)) for i in range(rounds)])


def numbers(update):
    return np.array([*update["v"].reshape(-1), *update["w"].reshape(-1)], np.float64)


def drawn(clients, seed, spread=1.0):
    """Updates around a common drift, one of them long."""
    rng = np.random.default_rng(seed)
    x = np.array([1.0, -0.5, 0.2]) + spread * rng.normal(size=(clients, 3))
    x[rng.integers(clients)] *= 8
    return x.astype(np.float32)


each_cohort = given(st.integers(1, 13), st.integers(0, 9_999))


# Bulyan and RLR


def naive_bulyan(x, f, repeated):
    left, chosen = list(range(len(x))), []

    def scores(among):
        near = max(1, len(among) - f - 2)
        return [sum(sorted(sum((x[i] - x[j]) ** 2) for j in among if j != i)[:near]) for i in among]

    if repeated:
        while len(chosen) < len(x) - 2 * f:
            chosen += [left.pop(int(np.argmin(scores(left))))]
    else:
        chosen = [left[i] for i in np.argsort(scores(left), kind="stable")[: len(x) - 2 * f]]
    found = []
    for column in x[chosen].T:
        middle = np.median(column)
        found.append(np.mean(sorted(column, key=lambda value: (abs(value - middle), value))[: len(x) - 4 * f]))
    return np.array(found)


@settings(deadline=None)  # other work on the machine is no fault
@given(st.integers(3, 15), st.integers(0, 9_999), st.booleans())
def test_bulyan_is_its_definition(clients, seed, repeated):
    x, most = drawn(clients, seed), (clients - 3) // 4
    for f in range(most + 1):
        found = numbers(bulyan(f, "repeated" if repeated else "once")(log_of(x)))
        np.testing.assert_allclose(found, naive_bulyan(x.astype(float), f, repeated), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(numbers(bulyan()(log_of(x))), numbers(bulyan(most)(log_of(x))))
    np.testing.assert_array_equal(numbers(bulyan(99)(log_of(x))), numbers(bulyan(most)(log_of(x))))


def test_bulyan_stands_what_krum_does_not(rng):
    """Of many coordinates one is far out, which distances hardly feel: Krum chooses the attacker."""
    x = rng.normal(size=(11, 60))
    x[9:] = np.eye(60)[0] * 4
    log = planted.log_of({"w": x}, {"w": np.zeros(60, np.float32)})
    assert krum(2)(log)["w"][0] == 4
    assert x[:9, 0].min() < bulyan(2)(log)["w"][0] < x[:9, 0].max()


@settings(deadline=None)
@given(st.integers(1, 13), st.integers(0, 9_999), st.sampled_from([None, 1, 3, 8, 50]))
def test_rlr_is_its_definition(clients, seed, threshold):
    x = drawn(clients, seed).astype(float)
    least = (clients - 1) // 2 + 1 if threshold is None or threshold > clients else threshold
    expected = np.array([np.mean(c) * (1 if abs(sum(np.sign(c))) >= least else -1) for c in x.T])
    np.testing.assert_allclose(numbers(rlr(threshold)(log_of(x))), expected, rtol=1e-5, atol=1e-6)


# Clipping


@settings(deadline=None)
@given(st.integers(1, 13), st.integers(0, 9_999), st.sampled_from([None, 0.5, 2.0, 1e9]))
@example(4, 613, 0.5)  # a buffer whose mean is 1.5
def test_norm_clipping_is_its_definition(clients, seed, bound):
    x = drawn(clients, seed).astype(float)
    norms = np.array([np.sqrt(sum(row**2)) for row in x])
    most = np.median(norms) if bound is None else bound
    expected = sum(row / max(1, norm / most) for row, norm in zip(x, norms, strict=True)) / clients
    found = norm_clipping(bound)(log_of(x))
    np.testing.assert_allclose(numbers(found), expected, rtol=1e-5, atol=1e-6)
    assert np.linalg.norm(numbers(found)) <= most * (1 + 1e-6)
    assert int(found["count"]) == int(mean()(log_of(x))["count"])  # buffers are not clipped


def test_a_bound_that_nobody_reaches_changes_no_bit():
    log = planted.clean_log()
    for rule in (mean(), median(), geometric_median(), krum()):
        for name, array in rule(log).items():
            np.testing.assert_array_equal(clipped(rule, 1e6)(log)[name], array)


@pytest.mark.parametrize("size", [1e3, 1e30])
def test_how_far_an_attacker_goes_changes_nothing_once_it_is_clipped(size, rng):
    x = rng.normal(size=(7, 3))
    x[3] = [size, -size, size]
    far = x.copy()
    far[3] *= 100
    for rule in (norm_clipping(), norm_clipping(1.0), clipped(median()), centred_clipping()):
        np.testing.assert_allclose(numbers(rule(log_of(x))), numbers(rule(log_of(far))), rtol=1e-5, atol=1e-6)


def test_whom_it_clips_to_nothing_still_leaves_an_update():
    """Where most clients send zeros the median norm is 0."""
    x = np.zeros((5, 3))
    x[0] = 1
    assert numbers(norm_clipping()(log_of(x))).tolist() == [0, 0, 0]


def naive_centred_clipping(x, centre, radius, iterations):
    for _ in range(iterations):
        apart = [np.sqrt(sum((row - centre) ** 2)) for row in x]
        most = np.median(apart) if radius is None else radius
        steps = [(row - centre) * min(1, most / d) if d else 0 * row for row, d in zip(x, apart, strict=True)]
        centre = centre + sum(steps) / len(x)
    return centre


@settings(deadline=None)
@given(st.integers(1, 9), st.integers(0, 9_999), st.sampled_from([None, 0.7, 100.0]), st.sampled_from([1, 3]))
def test_centred_clipping_is_its_definition(clients, seed, radius, iterations):
    x = drawn(clients, seed)
    found = numbers(centred_clipping(radius, iterations, "zero")(log_of(x)))
    expected = naive_centred_clipping(x.astype(float), np.zeros(3), radius, iterations)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_centred_clipping_starts_where_the_model_went_last(rng):
    first = log_of(rng.normal(size=(5, 3)))
    moved = {"v": np.array([0.5], np.float32), "w": np.array([[1], [-1]], np.float32), "count": np.array(6)}
    x = rng.normal(size=(5, 3)).astype(np.float32)
    second = log_of(x, state=moved)[0]
    log = first.append(replace(second, index=1))
    expected = naive_centred_clipping(x.astype(float), np.array([0.5, 1, -1]), 0.7, 2)
    np.testing.assert_allclose(numbers(centred_clipping(0.7, 2)(log)), expected, atol=1e-6)
    np.testing.assert_array_equal(numbers(centred_clipping()(first)), numbers(centred_clipping(start="zero")(first)))


# Noise


def test_noise_has_the_stated_deviation():
    """Of 40,000 numbers the deviation is known to 0.4 %."""
    state = {"w": np.zeros(40_000, np.float32)}
    log = planted.log_of({"w": np.ones((3, 40_000), np.float32)}, state)
    for rule, std in ((noised(mean(), 0.5), 0.5), (weak_dp(std=0.025), 0.025), (weak_dp(1e6, 2.0, seed=3), 2.0)):
        noise = rule(log)["w"] - 1
        assert abs(noise.mean()) < 5 * std / 200
        assert noise.std() == pytest.approx(std, rel=0.02)
        assert np.abs(noise / std).max() < 6
    bound = np.sqrt(40_000)  # the norm of everybody here
    assert (flame(noise=0.01)(log)["w"] - 1).std() == pytest.approx(0.01 * bound, rel=0.02)


def test_noise_has_an_address():
    log, rule = log_of(np.ones((4, 3)), rounds=3), weak_dp(std=1.0)
    found = [numbers(rule(log[: k + 1])) for k in range(3)]
    assert len({tuple(each) for each in found}) == 3
    np.testing.assert_array_equal(numbers(rule(log)), found[2])  # again the same bits
    assert (numbers(weak_dp(std=1.0, seed=1)(log)) != found[2]).all()
    expected = 1 + np.random.default_rng([0, 101, 2]).standard_normal(3)
    np.testing.assert_allclose(found[2], expected, rtol=1e-6)
    assert int(rule(log)["count"]) == 2  # (0 + 1 + 2 + 3) / 4 = 1.5: buffers are not noised


# Mixing and buckets


def naive_mixing(x, f):
    """Each client's mean of its nearest, itself among them."""
    found = []
    for own in x:
        order = np.argsort([sum((own - other) ** 2) for other in x], kind="stable")
        found.append(x[order[: len(x) - f]].mean(axis=0))
    return np.array(found)


@settings(deadline=None)
@given(st.integers(1, 11), st.integers(0, 9_999), st.sampled_from(["mean", "median", "geometric_median"]))
def test_mixing_is_its_definition(clients, seed, rule):
    x = drawn(clients, seed)
    for f in (0, (clients - 1) // 2):
        mixed = log_of(naive_mixing(x.astype(float), f))
        found = numbers(nearest_neighbour_mixing(rule, f)(log_of(x)))
        np.testing.assert_allclose(found, numbers(RULES[rule]()(mixed)), rtol=1e-4, atol=1e-5)
    assert nearest_neighbour_mixing(rule) == nearest_neighbour_mixing(RULES[rule]())


@settings(deadline=None)
@given(st.integers(1, 11), st.integers(1, 5), st.integers(0, 9), st.sampled_from(["mean", "median", "krum"]))
def test_bucketing_is_its_definition(clients, size, seed, rule):
    x = drawn(clients, seed)
    order = np.random.default_rng([seed, 102, 0]).permutation(clients)
    buckets = [x[order[i : i + size]].astype(float).mean(axis=0) for i in range(0, clients, size)]
    found = numbers(bucketing(rule, size, seed)(log_of(x)))
    np.testing.assert_allclose(found, numbers(RULES[rule]()(log_of(buckets))), rtol=1e-5, atol=1e-6)


def test_buckets_are_drawn_anew_in_every_round():
    log = log_of(np.arange(30).reshape(10, 3) ** 2, rounds=4)
    found = {tuple(numbers(bucketing("median")(log[: k + 1]))) for k in range(4)}
    assert len(found) > 1
    np.testing.assert_array_equal(numbers(bucketing("median", size=1)(log)), numbers(median()(log)))


# FLAME and CRFL


@pytest.mark.parametrize("seed", range(4))
def test_flame_is_its_definition(seed):
    """Cosine distances, HDBSCAN of scikit-learn, the whole cohort's median norm, the kept ones' mean."""
    x = drawn(11, seed, spread=0.3).astype(float)
    x[[2, 7]] = [-3, 4, 5]  # two who go elsewhere, and far
    norms = np.sqrt((x**2).sum(axis=1))
    distances = np.maximum(1 - x @ x.T / norms[:, None] / norms, 0)
    np.fill_diagonal(distances, 0)
    cluster = HDBSCAN(
        min_cluster_size=11 // 2 + 1, min_samples=2, metric="precomputed", allow_single_cluster=True, copy=True
    ).fit(distances)  # scikit-learn counts a client among its own neighbours
    kept = x[cluster.labels_ == 0]
    bound = np.median(norms)
    clip = np.minimum(1, bound / norms[cluster.labels_ == 0])
    np.testing.assert_allclose(numbers(flame(noise=0)(log_of(x))), (kept * clip[:, None]).mean(axis=0), rtol=1e-5)
    assert not (cluster.labels_[[2, 7]] == 0).any()


def test_crfl_clips_and_noises_the_global_model():
    state = {"v": np.array([3], np.float32), "w": np.array([[0], [3]], np.float32), "count": np.array(5)}
    log = log_of([[0, 4, 1], [0, 4, 1]], state=state)  # the next model would be (3, 4, 4), of norm sqrt(41)
    model = np.array([3, 0, 3])
    np.testing.assert_allclose(numbers(crfl(100, 0)(log)), [0, 4, 1])
    after = model + numbers(crfl(2.0, 0)(log))
    np.testing.assert_allclose(after, np.array([3, 4, 4]) * 2 / np.sqrt(41), rtol=1e-6)
    noise = np.random.default_rng([7, 101, 0]).standard_normal(3)
    np.testing.assert_allclose(numbers(crfl(2.0, 0.1, 7)(log)), after - model + 0.1 * noise, rtol=1e-5)


# All of them


@pytest.mark.parametrize("name", COMPOSED)
@pytest.mark.parametrize("clients", [0, 1, 2])
def test_small_cohorts_have_an_update(name, clients):
    x = np.array([[3.0, 4, 0], [3, 4, 0]])[:clients]
    rule = AGGREGATORS[name](**{"weak_dp": {"std": 0}, "flame": {"noise": 0}, "crfl": {"std": 0}}.get(name, {}))
    found = rule(log_of(x))
    np.testing.assert_allclose(numbers(found), [3, 4, 0] if clients else [0, 0, 0])
    assert int(found["count"]) == 0


@pytest.mark.parametrize("name", COMPOSED)
def test_buffers_are_averaged_whatever_is_done_to_the_rest(name):
    log = log_of(np.ones((5, 3)) * [[1], [1], [1], [1], [9]], counts=[7, 7, 7, 7, 7])
    assert int(AGGREGATORS[name]()(log)["count"]) == 7


def test_compositions_compose():
    """Around a filter, inside it, and each other: what is inside sees what the outside left."""
    log = planted.with_client_at(planted.PLANTED["boosted"].log(), np.nan, "client-00")
    rest = planted.without(planted.without(log), "client-00")
    detector = score_by(layer_norms, robust_zscore, 20)
    for rule in (norm_clipping(), weak_dp(), nearest_neighbour_mixing(), bucketing(), centred_clipping(), bulyan()):
        for name, array in filtered(rule, detector)(log).items():
            np.testing.assert_array_equal(array, rule(rest)[name])
    inside = clipped(filtered(median(), detector))  # nobody stands out once everybody is clipped
    assert filtered(median(), detector).kept(log.combined(np.eye(12)[1:], log[-1].clients[1:])).sum() == 10
    np.testing.assert_array_equal(inside(log)["fc2.bias"], clipped(median())(log)["fc2.bias"])
    deep = bucketing(nearest_neighbour_mixing("median"), 2)
    assert np.isfinite(deep(log)["fc2.bias"]).all()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: norm_clipping(0), "norm_clipping: bound is a length above 0, or None, found 0"),
        (lambda: clipped(mean(), "3"), "clipped: bound"),
        (lambda: weak_dp(std=-1), "weak_dp: std is a number of at least 0"),
        (lambda: noised(mean(), float("nan")), "noised: std"),
        (lambda: weak_dp(seed=None), "weak_dp: seed"),
        (lambda: centred_clipping(start="mean"), "start is 'last' or 'zero', found 'mean'"),
        (lambda: centred_clipping(radius=-1), "centred_clipping: radius"),
        (lambda: bucketing("means"), "bucketing: rule is an aggregator or one of mean, median"),
        (lambda: bucketing(size=0), "bucketing: size"),
        (lambda: nearest_neighbour_mixing("mean", -1), "nearest_neighbour_mixing: num_malicious"),
        (lambda: bulyan(selection="twice"), "bulyan: selection is 'repeated' or 'once'"),
        (lambda: rlr(0), "rlr: threshold must be a whole number of at least 1"),
        (lambda: crfl(None), "crfl: bound"),
        (lambda: flame(on="models?"), "on must be one of updates, models"),
    ],
)
def test_wrong_settings_are_refused_in_one_line(build, message):
    with pytest.raises(InputError, match=message) as refused:
        build()
    assert "\n" not in str(refused.value)
