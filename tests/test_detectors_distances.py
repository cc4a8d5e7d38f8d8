"""Krum, Multi-Krum, Multi-metrics and DnC against their formulas done naively, and where the answer is known."""

import numpy as np
import pytest
from hypothesis import strategies as st

import planted
from gradlens.detectors.distances import dnc, drawn, krum, multi_krum, multi_metrics, numbers_at
from gradlens.errors import InputError
from gradlens.geometry import squared_distances
from one_round import flat, log_of, model_of

seeds = st.integers(0, 2**32 - 1)


def random_log(seed, clients=9, state=True):
    """Heterogeneous clients: their norms and directions differ; two layers."""
    rng = np.random.default_rng(seed)
    sizes = rng.lognormal(0, 0.5, (clients, 1))
    layers = [sizes * (rng.normal(size=n) + rng.normal(size=(clients, n))) for n in (17, 6)]
    return log_of(*layers, state=[rng.normal(size=17), rng.normal(size=6)] if state else None)


def attacked(count=28, malicious=8, seed=0):
    """The clearest case: the malicious clients, every third one first, pull together in another direction."""
    rng = np.random.default_rng(seed)
    updates, who = rng.normal(size=(count, 60)) + 1, np.zeros(count, bool)
    who[np.arange(malicious) * 3] = True
    updates[who] += 6 * rng.normal(size=60)
    return log_of(updates, state=[rng.normal(size=60)]), who


EVERY = [krum(), multi_krum(), multi_metrics(), multi_metrics(features="code"), multi_metrics(centred=True), dnc()]
every_detector = pytest.mark.parametrize("detector", EVERY, ids=repr)


@every_detector
@pytest.mark.parametrize("size", [40, 30_000])
def test_where_all_are_equal_nobody_is_flagged(detector, size):
    rng = np.random.default_rng(1)
    verdict = detector(log_of(np.tile(rng.normal(size=size), (7, 1)), state=[rng.normal(size=size)]))
    assert verdict.scores.tolist() == [0] * 7
    assert not verdict.flags.any()


@every_detector
@pytest.mark.parametrize("size", [40, 30_000])
@pytest.mark.parametrize("each", [4, 5])
def test_two_equal_groups_are_judged_group_by_group(detector, size, each):
    rng = np.random.default_rng(2)
    updates, order = np.repeat(rng.normal(size=(2, size)), each, axis=0), rng.permutation(2 * each)
    verdict = detector(log_of(updates[order], state=[rng.normal(size=size)]))
    for group in (order < each, order >= each):
        np.testing.assert_allclose(verdict.scores[group], verdict.scores[group][0], rtol=1e-9)
        assert len(set(verdict.flags[group])) == 1
    assert verdict.scores.max() < 10


def test_equal_numbers_summed_in_another_order_are_no_distance():
    gram = np.array([[1.0, 1 + 2e-16, 0.5], [1 + 2e-16, 1 - 3e-16, 0.5], [0.5, 0.5, 1]])
    np.testing.assert_allclose(squared_distances(gram), [[0, 0, 1], [0, 0, 1], [1, 1, 0]], atol=1e-14)
    assert squared_distances(gram)[0, 1] == 0


@pytest.mark.parametrize("detector", [multi_krum(8), dnc(8)], ids=repr)
@pytest.mark.parametrize("seed", range(3))
def test_eight_attackers_among_28(detector, seed):
    log, who = attacked(seed=seed)
    verdict = detector(log)
    np.testing.assert_array_equal(verdict.flags, who)
    assert verdict.scores[who].min() > verdict.scores[~who].max()
    assert not krum(8)(log).flags[~who].all()


# Krum


def krum_oracle(log, malicious, neighbours="paper", power=2.0, by_layer=False):
    """Scores as multiples of their median, one pair of clients and one number at a time."""
    count = len(log[-1])
    apart = np.zeros((count, count))
    for i in range(count):
        for j in range(count):
            squares = []
            for name in log.model:
                a, b = (np.asarray(log[-1].updates[name][k], np.float64).ravel() for k in (i, j))
                squares.append(sum((float(x) - float(y)) ** 2 for x, y in zip(a, b, strict=True)))
            apart[i, j] = sum(s**0.5 for s in squares) if by_layer else sum(squares) ** 0.5
    nearest = count - malicious - (2 if neighbours == "paper" else 1)
    scores = [sum(sorted(apart[i, j] ** power for j in range(count) if j != i)[:nearest]) for i in range(count)]
    return np.array(scores) / np.median(scores)


@pytest.mark.parametrize("neighbours", ["paper", "n-f-1"])
@pytest.mark.parametrize("power", [1, 2, 4])
@pytest.mark.parametrize("by_layer", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_krum_is_its_formula(neighbours, power, by_layer, seed):
    log = random_log(seed)
    expected = krum_oracle(log, 2, neighbours, power, by_layer)
    verdict = krum(2, neighbours, power, by_layer)(log)
    np.testing.assert_allclose(verdict.scores, expected, rtol=1e-9)
    assert np.flatnonzero(~verdict.flags).tolist() == [np.argmin(expected)]
    several = multi_krum(2, None, neighbours, power, by_layer)(log)
    np.testing.assert_array_equal(several.scores, verdict.scores)
    assert set(np.flatnonzero(~several.flags)) == set(np.argsort(expected)[:7])


def test_krum_by_hand():
    verdict = krum(1)(log_of([[0], [1], [2], [3], [100]]))  # 5 - 1 - 2 neighbours: 1 + 4, 1 + 1, 1 + 1, 1 + 4, ...
    np.testing.assert_allclose(verdict.scores, np.array([5, 2, 2, 5, 97**2 + 98**2]) / 5)
    assert verdict.flags.tolist() == [True, False, False, True, True]  # equal scores are kept together
    assert multi_krum(1)(log_of([[0], [1], [2], [3], [100]])).flags.tolist() == [False] * 4 + [True]


def test_num_malicious_none_is_the_most_that_krum_tolerates():
    for count in range(3, 12):
        log = random_log(5, count)
        most = max(f for f in range(count) if count > 2 * f + 2)
        np.testing.assert_array_equal(krum()(log).scores, krum(most)(log).scores)
        np.testing.assert_array_equal(multi_krum()(log).flags, multi_krum(most)(log).flags)
        assert f"needs {2 * most + 5} comparable clients, found {count}" in krum(most + 1)(log).abstained


@pytest.mark.parametrize("selected", [1, 3, 8, 50])
def test_multi_krum_keeps_as_many_as_it_is_told(selected):
    log = random_log(6)
    verdict = multi_krum(2, selected)(log)
    assert (~verdict.flags).sum() == min(selected, 9)
    assert (verdict.flags == krum(2)(log).flags).all() == (selected == 1)


def test_the_krums_of_five_ports_choose_differently():
    """peers.md 0.5: on heterogeneous clients, n = 10 and f = 2, other formulas choose another client."""
    variants = [krum(2, "n-f-1"), krum(2, "n-f-1", 1), krum(2, power=4), krum(2, power=1, by_layer=True)]
    other = np.zeros(len(variants))
    for seed in range(300):
        log = random_log(seed, 10)
        chosen = krum(2)(log).flags
        other += [(variant(log).flags != chosen).any() for variant in variants]
    assert (other > 0.01 * 300).all()
    assert (other < 0.6 * 300).all()


def test_multi_krum_is_right_where_float32_of_the_weights_is_not():
    """peers.md 0.6: updates of 0.2 % of the weights, 2 M numbers, attackers 1.1 x the norm."""
    clients, size, wrong = 10, 2_000_000, 0
    for trial in range(12):
        rng = np.random.default_rng(trial)
        weights = rng.standard_normal(size, dtype=np.float32)
        updates = rng.standard_normal((clients, size), dtype=np.float32)
        updates *= np.float32(0.002)
        updates[:2] *= np.float32(1.1)
        verdict = multi_krum(2)(log_of(updates, state=[weights]))
        assert np.flatnonzero(verdict.flags).tolist() == [0, 1]
        if trial < 4:  # the trial is hard enough: this is how Flower finds distances
            models = weights + updates
            squares = np.einsum("ij,ij->i", models, models)
            apart = squares[:, None] + squares - 2 * models @ models.T
            scores = np.sort(apart + np.diag(np.full(clients, np.inf, np.float32)), axis=1)[:, :6].sum(axis=1)
            wrong += set(np.argsort(scores)[-2:]) != {0, 1}
    assert wrong > 0


def test_a_high_power_of_large_numbers_stays_finite():
    line = np.array([[1], [2], [3], [5], [100]])
    expected = krum_oracle(log_of(line), 1, power=20)
    np.testing.assert_allclose(krum(1, power=20)(log_of(line * 1e30)).scores, expected, rtol=1e-5)


# Multi-metrics


def multi_metrics_oracle(log, features, centred):
    updates, model = flat(log).astype(np.longdouble), model_of(log).astype(np.longdouble)
    clients = model + updates
    norm = lambda v: np.sqrt((v * v).sum())  # noqa: E731
    cosine = lambda a, b: (a @ b) / (norm(a) * norm(b))  # noqa: E731
    count = len(updates)
    x = np.zeros((count, 3))
    for i in range(count):
        for j in range(count):
            if i == j:
                continue
            if features == "paper":
                x[i, 0] += abs(np.abs(updates[i]).sum() - np.abs(updates[j]).sum())
                x[i, 1] += abs(norm(updates[i]) - norm(updates[j]))
                x[i, 2] += abs(cosine(model, clients[i]) - cosine(model, clients[j]))
            else:
                x[i, 0] += np.abs(clients[i] - clients[j]).sum()
                x[i, 1] += abs(norm(clients[i]) - norm(clients[j]))
                x[i, 2] += (1 - cosine(clients[i], clients[j])) ** 2
    inverse = np.linalg.inv(np.cov(x.T))
    x = x - x.mean(axis=0) if centred else x
    return np.sqrt(np.array([row @ inverse @ row for row in x]))


@pytest.mark.parametrize("features", ["paper", "code"])
@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("ratio", [1, 1e-3])
def test_multi_metrics_is_its_formula(features, centred, seed, ratio):
    """At a ratio of update to weight of 1e-3 the cosines differ from 1 in the seventh digit."""
    log = random_log(seed, 10)
    log = log_of(*(ratio * a for a in log[-1].updates.values()), state=list(log[-1].global_model.values()))
    expected = multi_metrics_oracle(log, features, centred)
    verdict = multi_metrics(features=features, centred=centred)(log)
    np.testing.assert_allclose(verdict.scores, expected, rtol=1e-5)
    assert set(np.flatnonzero(~verdict.flags)) == set(np.argsort(expected)[:3])


def test_multi_metrics_features_by_hand():
    log = log_of([[3, 4], [0, 5], [6, 8]], state=[[1, 0]])
    evidence = multi_metrics()(log).evidence
    assert evidence.index.tolist() == ["c00", "c01", "c02"]
    cosines = np.array([4 / np.sqrt(32), 1 / np.sqrt(26), 7 / np.sqrt(113)])
    np.testing.assert_allclose(evidence["manhattan"], [2 + 7, 2 + 9, 7 + 9])  # norms 7, 5, 14
    np.testing.assert_allclose(evidence["euclidean"], [0 + 5, 0 + 5, 5 + 5])  # norms 5, 5, 10
    np.testing.assert_allclose(evidence["cosine"], np.abs(cosines[:, None] - cosines).sum(axis=1))
    code = multi_metrics(features="code")(log).evidence
    np.testing.assert_allclose(code["manhattan"], [4 + 7, 4 + 9, 7 + 9])


@pytest.mark.parametrize("features", ["paper", "code"])
@pytest.mark.parametrize("clients", [3, 4, 8])
def test_multi_metrics_answers_where_the_covariance_is_singular(features, clients):
    for log in (random_log(7, clients, state=False), log_of(np.eye(clients)[:, :1] + 1)):  # no cosine; one number
        verdict = multi_metrics(features=features)(log)
        assert not verdict.abstained
        assert verdict.scores.max() < 1e6  # 1 / 1e-17 is no weight


@pytest.mark.parametrize(("keep", "kept"), [(0.01, 1), (0.3, 6), (0.34, 6), (0.5, 10), (1.0, 20)])
def test_multi_metrics_keeps_a_share(keep, kept):
    verdict = multi_metrics(keep)(random_log(8, 20))
    assert (~verdict.flags).sum() == kept


def test_without_centring_a_tight_cohort_drowns_its_outlier():
    log = planted.PLANTED["boosted"].log()
    culprit = list(planted.CLIENTS).index(planted.CULPRIT)
    assert multi_metrics(features="code")(log).scores.argmax() != culprit
    assert multi_metrics(features="code", centred=True)(log).scores.argmax() == culprit


@pytest.mark.parametrize("size", [8_191, 8_192, 20_001, 40_000])
def test_manhattan_distances_hold_over_strips(size):
    updates = np.random.default_rng(size).normal(size=(4, size))
    found = multi_metrics(features="code")(log_of(updates, updates[:, :5])).evidence["manhattan"]
    together = np.concatenate([updates, updates[:, :5]], axis=1)
    np.testing.assert_allclose(found, [np.abs(row - together).sum() for row in together], rtol=1e-6)


# DnC


def dnc_oracle(log, malicious, iterations, dimensions, filtering, seed):
    rng = np.random.default_rng([seed, log[-1].index])
    updates, kept, total = flat(log), set(range(len(log[-1]))), 0
    for _ in range(iterations):
        numbers = updates[:, drawn(log[-1], dimensions, rng)]
        centred = numbers - numbers.mean(axis=0)
        direction = np.linalg.svd(centred)[2][0]
        squares = np.array([sum(row * direction) ** 2 for row in centred])
        kept &= set(np.argsort(squares)[: len(updates) - int(filtering * malicious)])
        total = total + squares / np.median(squares)
    return total / iterations, kept


@pytest.mark.parametrize("iterations", [1, 4])
@pytest.mark.parametrize(("dimensions", "filtering"), [(10_000, 1.0), (8, 1.0), (8, 1.5), (5, 0.5)])
@pytest.mark.parametrize("seed", range(3))
def test_dnc_is_its_formula(iterations, dimensions, filtering, seed):
    log = random_log(seed)
    scores, kept = dnc_oracle(log, 3, iterations, dimensions, filtering, seed)
    verdict = dnc(3, iterations, dimensions, filtering, seed)(log)
    np.testing.assert_allclose(verdict.scores, scores, rtol=1e-7)
    assert set(np.flatnonzero(~verdict.flags)) == kept


def test_dnc_by_hand():
    verdict = dnc(1)(log_of([[0, 1], [0, -1], [0, 2], [0, -2], [0, 10]]))  # mean 2: 1, 9, 0, 16, 64
    np.testing.assert_allclose(verdict.scores, np.array([1, 9, 0, 16, 64]) / 9, atol=1e-12)
    assert verdict.flags.tolist() == [False] * 4 + [True]


def test_dnc_does_not_choose_among_equal_directions():
    verdict = dnc(1)(log_of(np.eye(3)))  # every direction varies alike
    np.testing.assert_allclose(verdict.scores, 1)
    assert not verdict.flags.any()


def test_dnc_draws_anew_in_each_iteration_round_and_seed():
    log = random_log(9)
    scores = [dnc(3, 1, 8)(log).scores, dnc(3, 2, 8)(log).scores, dnc(3, 1, 8, seed=1)(log).scores]
    later = log_of(*log[-1].updates.values(), index=1)
    scores.append(dnc(3, 1, 8)(later).scores)
    assert len({tuple(each) for each in scores}) == 4
    np.testing.assert_array_equal(dnc(3, 1, 8)(log).scores, scores[0])


def test_dnc_tolerates_the_largest_minority():
    for count in range(3, 10):
        log = random_log(10, count)
        np.testing.assert_array_equal(dnc()(log).flags, dnc((count - 1) // 2)(log).flags)
        assert f"comparable clients, found {count}" in dnc((count + 1) // 2)(log).abstained
    assert "needs 13 comparable clients, found 9" in dnc(4, filtering=3)(random_log(11)).abstained


def test_dnc_of_no_malicious_client_flags_nobody():
    assert not dnc(0)(random_log(12)).flags.any()


@pytest.mark.parametrize("size", [16_383, 16_384, 16_385, 40_000])
def test_numbers_at_positions_hold_over_layers_and_blocks(size):
    updates = np.random.default_rng(0).normal(size=(3, size)).astype(np.float32)
    log = log_of(updates, updates[:, :70], updates[:, 5:6])
    together = flat(log)
    chosen = drawn(log[-1], size // 2, np.random.default_rng(1))
    assert len(set(chosen)) == len(chosen) == size // 2
    for positions in (chosen, np.arange(together.shape[1]), np.array([0, 0, 70, size, size + 70])):
        np.testing.assert_array_equal(numbers_at(log[-1].blocks, log[-1].parameters, positions), together[:, positions])


# Settings


@pytest.mark.parametrize(
    ("builder", "settings", "said"),
    [
        (krum, {"num_malicious": -1}, "num_malicious must be a whole number of at least 0, found -1"),
        (krum, {"num_malicious": 1.5}, "num_malicious must be a whole number"),
        (krum, {"num_malicious": True}, "num_malicious must be a whole number"),
        (krum, {"neighbours": "n-f"}, "neighbours must be one of paper, n-f-1, found 'n-f'"),
        (krum, {"power": 0}, "power must be a number above 0, found 0"),
        (krum, {"power": float("inf")}, "power must be a number above 0"),
        (multi_krum, {"num_selected": 0}, "num_selected must be a whole number of at least 1, found 0"),
        (multi_metrics, {"keep": 1.2}, "keep must be a share above 0 and at most 1, found 1.2"),
        (multi_metrics, {"keep": "all"}, "keep must be a number above 0, found 'all'"),
        (multi_metrics, {"features": "both"}, "features must be one of paper, code, found 'both'"),
        (dnc, {"iterations": 0}, "iterations must be a whole number of at least 1"),
        (dnc, {"dimensions": 0}, "dimensions must be a whole number of at least 1"),
        (dnc, {"filtering": -1}, "filtering must be a number above 0"),
        (dnc, {"seed": "a"}, "seed must be a whole number"),
    ],
)
def test_a_setting_out_of_range_is_refused(builder, settings, said):
    with pytest.raises(InputError) as error:
        builder(**settings)
    assert str(error.value).startswith(said)


def test_detectors_are_values_and_say_what_they_are():
    assert krum(np.int64(2)) == krum(2)
    assert len({krum(), krum(2), multi_krum(), dnc(), multi_metrics()}) == 5
    assert repr(krum(2)) == "krum(num_malicious=2, neighbours='paper', power=2.0, by_layer=False)"
    assert repr(multi_metrics()) == "multi_metrics(keep=0.3, features='paper', centred=False)"
