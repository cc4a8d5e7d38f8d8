"""FoolsGold, FLDetector and FLANDERS against hand-made answers, naive oracles and the faults of other ports."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import planted
from gradlens.clustering import gap_count, lower_cluster_end
from gradlens.detectors import trajectories
from gradlens.detectors.trajectories import flanders, fldetector, foolsgold
from gradlens.errors import InputError
from gradlens.log import ModelSpec, Round, UpdateLog, accumulated
from gradlens.statistics.prediction import prediction_residual

STATE = {"w": np.zeros((2, 3), np.float32), "b": np.zeros(2, np.float32)}
EVERY = (foolsgold(), foolsgold(layers="final"), fldetector(window=2), flanders(), flanders(num_malicious=3))


def log_from(sent, names=None, places=None):
    """Rounds of updates [client, 8], the last two of each the bias, over a global model of these [8]."""
    rounds = []
    for index, updates in enumerate(sent):
        updates = np.array(updates, np.float32)
        who = np.array([f"c{i:02d}" for i in range(len(updates))]) if names is None else np.array(names[index])
        place = np.zeros(8, np.float32) if places is None else np.array(places[index], np.float32)
        rows = {"w": updates[:, :6].reshape(-1, 2, 3), "b": updates[:, 6:]}
        rounds.append(Round(index, who, np.full(len(who), 9), rows, {"w": place[:6].reshape(2, 3), "b": place[6:]}))
    return UpdateLog(ModelSpec.of(STATE), rounds)


def random_log(seed, rounds=6, clients=7, each=7):
    rng = np.random.default_rng(seed)
    places = np.cumsum(rng.normal(size=(rounds, 8)), axis=0)
    names = [np.array([f"c{i:02d}" for i in rng.permutation(clients)[:each]]) for _ in range(rounds)]
    sent = [rng.normal(size=8) * 0.3 - 0.2 * place + 0.3 * rng.normal(size=(each, 8)) for place in places]
    return log_from(sent, names, places)


def culprits_log(edit, rounds=8):
    """28 clients, 8 of them malicious by this edit of their updates."""
    names = tuple(f"client-{i:02d}" for i in range(28))
    return planted.edited(planted.clean_log(rounds, names), edit, names[:8]), set(names[:8])


def flagged(verdict):
    assert not verdict.abstained
    return set(verdict.clients[verdict.flags])


# FoolsGold


def naive_foolsgold(log, kappa=1.0, columns=slice(None)):
    """client -> (weight, rescaled trust), the algorithm written out over everybody's history."""
    total = {}
    for round_ in log:
        for row, client in enumerate(round_.clients.tolist()):
            update = np.concatenate([np.asarray(round_.updates[n][row], np.float64).ravel() for n in ("w", "b")])
            total[client] = total.get(client, 0) + update[columns]
    clients = sorted(total)
    cs = np.zeros((len(clients), len(clients)))
    for i, a in enumerate(clients):
        for j, b in enumerate(clients):
            if i != j:
                cs[i, j] = total[a] @ total[b] / np.linalg.norm(total[a]) / np.linalg.norm(total[b])
    v = cs.max(axis=1)
    for i in range(len(clients)):
        for j in range(len(clients)):
            if v[i] < v[j]:
                cs[i, j] *= v[i] / v[j]
    trust = 1 - cs.max(axis=1)
    trust /= trust.max()
    with np.errstate(divide="ignore"):
        weight = np.clip(kappa * (np.log(trust / (1 - trust)) + 0.5), 0, 1)
    return dict(zip(clients, zip(weight, trust, strict=True), strict=True))


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 999), each=st.integers(3, 7), kappa=st.sampled_from([0.5, 1.0, 2.0]))
def test_foolsgold_against_the_algorithm_written_out(seed, each, kappa):
    log = random_log(seed, each=each)
    for layers, columns in (("all", slice(None)), ("final", slice(0, 6))):
        expected = naive_foolsgold(log, kappa, columns)
        verdict = foolsgold(kappa=kappa, layers=layers)(log)
        weights, trust = np.array([expected[c] for c in verdict.clients.tolist()]).T
        np.testing.assert_allclose(verdict.scores, 1 - trust, atol=1e-5)
        assert verdict.weights is not None
        np.testing.assert_allclose(verdict.weights, weights, atol=1e-4)
        np.testing.assert_array_equal(verdict.flags, verdict.weights < 0.5)


def test_foolsgold_by_hand():
    """Cosines: a-b 1, a-c and b-c 0.6, d with nobody. Pardoned: c's 0.6 * 0.6 / 1 = 0.36; trusts 0, 0, 0.64, 1."""
    x, y, z = np.eye(8)[:3]
    verdict = foolsgold()(log_from([[x, 2 * x, 0.6 * x + 0.8 * y, z]]))
    np.testing.assert_allclose(verdict.scores, [1, 1, 0.36, 0], atol=1e-7)
    np.testing.assert_allclose(verdict.weights, [0, 0, 1, 1], atol=1e-7)
    assert verdict.flags.tolist() == [True, True, False, False]
    steep = foolsgold(kappa=0.5)(log_from([[x, 2 * x, 0.6 * x + 0.8 * y, z]]))
    assert steep.weights is not None
    np.testing.assert_allclose(steep.weights[2], 0.5 * (np.log(0.64 / 0.36) + 0.5))


def test_foolsgold_sums_updates_over_rounds():
    """Alike in the last round, not in their histories; and the other way round."""
    x, y, z = np.eye(8)[:3]
    alike_now = log_from([[9 * x, 9 * y, 9 * z], [z + x, z + y, z]])
    assert foolsgold()(alike_now[1:]).evidence["similarity"].min() > 0.7
    assert foolsgold()(alike_now).evidence["similarity"].max() < 0.2
    alike_then = log_from([[9 * x, 9 * x, 9 * z], [x, y, z]])
    assert flagged(foolsgold()(alike_then)) == {"c00", "c01"}


def test_foolsgold_looks_at_updates_not_at_weights():
    """The fault of FLPoison: over a large global model all weights point the same way."""
    sent = np.random.default_rng(0).normal(size=(3, 6, 8))
    far = foolsgold()(log_from(sent, places=np.full((3, 8), 1e4)))
    near = foolsgold()(log_from(sent))
    np.testing.assert_array_equal(far.scores, near.scores)
    assert len(np.unique(far.scores)) > 3


def test_foolsgold_does_not_take_the_residuals():
    """Two that agree with the common drift alone are alike; centred on the median they would not be."""
    x, y, z = np.eye(8)[:3]
    verdict = foolsgold()(log_from([[5 * x + 0.1 * y, 5 * x - 0.1 * y, 5 * x, y, z]]))
    assert flagged(verdict) == {"c00", "c01", "c02"}


def test_foolsgold_finds_sybils_that_never_came_together():
    rng = np.random.default_rng(1)
    pull = rng.normal(size=40)
    state = {"w": np.zeros((4, 10), np.float32)}
    rounds = []
    for index, names in enumerate((["s0", "a", "b", "c"], ["s1", "a", "b", "c"])):
        u = np.concatenate([pull[None], rng.normal(size=(3, 40))]).astype(np.float32).reshape(4, 4, 10)
        rounds.append(Round(index, np.array(names), np.full(4, 9), {"w": u}, state))
    assert flagged(foolsgold()(UpdateLog(ModelSpec.of(state), rounds))) == {"s1"}


def test_foolsgold_finds_one_sybil_pair():
    log = planted.PLANTED["equal pair"].log()
    verdict = foolsgold()(log)
    assert flagged(verdict) == {"client-01", "client-08"}
    assert set(verdict.clients[np.argsort(verdict.scores)[-2:]]) == {"client-01", "client-08"}


def test_foolsgold_flags_two_groups_of_equals():
    x, y, z = np.eye(8)[:3]
    assert flagged(foolsgold()(log_from([[x, x, x, y, y, y, z]]))) == {f"c{i:02d}" for i in range(6)}


def test_foolsgold_finds_eight_of_twenty_eight():
    rng = np.random.default_rng(5)

    def sybils(updates, who):
        for name in planted.LAYERS:
            updates[name][who] = 0.3 + 0.01 * rng.normal(size=updates[name][who].shape)

    def own_ways(updates, who):
        for name in planted.LAYERS:
            updates[name][~who] -= updates[name][~who].mean(axis=0)

    log, culprits = culprits_log(lambda u, w: (own_ways(u, w), sybils(u, w)))
    assert flagged(foolsgold()(log)) == culprits


def test_foolsgold_abstains_where_all_point_the_same_way():
    log = planted.Planted(planted.one_for_all, planted.CLIENTS).log()
    verdict = foolsgold()(log)
    assert verdict.abstained == "the histories of all 12 clients point the same way"
    assert not verdict.flags.any()


def test_foolsgold_says_that_there_is_no_final_weight():
    log = planted.log_of({"b": np.ones((4, 2), np.float32)}, {"b": STATE["b"]})
    assert "no final weight" in foolsgold(layers="final")(log).abstained


def test_foolsgold_of_too_many_clients(monkeypatch):
    monkeypatch.setattr(trajectories, "PAIRWISE", 11)
    assert "12 clients seen: nothing pairwise" in foolsgold()(planted.clean_log()).abstained


def test_foolsgold_on_sketches(monkeypatch):
    state = {"w": np.zeros((30, 40), np.float32)}
    rng = np.random.default_rng(0)
    names = [list("abcd"), list("acef"), list("abcf")]
    rounds = [
        Round(i, np.array(n), np.full(4, 9), {"w": rng.normal(size=(4, 30, 40)).astype(np.float32)}, state)
        for i, n in enumerate(names)
    ]
    for round_ in rounds:
        round_.updates["w"].flags.writeable = True
        round_.updates["w"][1] = round_.updates["w"][0]
    whole = foolsgold()(UpdateLog(ModelSpec.of(state), rounds))
    for module in (accumulated, trajectories):  # from the second round on
        monkeypatch.setattr(module, "BUDGET", 4 * 1200 * 4 + 1)
    sketched = foolsgold()(UpdateLog(ModelSpec.of(state), rounds))
    assert not np.array_equal(sketched.scores, whole.scores)
    np.testing.assert_allclose(sketched.scores, whole.scores, atol=0.15)


# FLDetector


def naive_gap(scores, seed):
    """The official procedure with every split of the ordered scores tried."""
    from itertools import combinations, pairwise

    def within(x, k):
        x = np.sort(x)
        cuts = ([0, *inner, len(x)] for inner in combinations(range(1, len(x)), k - 1))
        return min(sum(((x[a:b] - x[a:b].mean()) ** 2).sum() for a, b in pairwise(c)) for c in cuts)

    most = min(7, len(scores) - 1)
    uniform = np.random.default_rng(seed).uniform(size=(10, len(scores)))
    scaled = (scores - scores.min()) / (scores.max() - scores.min())
    gaps, errors = [], []
    for k in range(1, most + 1):
        reference = np.array([within(sample, k) for sample in uniform])
        gaps.append(np.log(reference.mean()) - np.log(within(scaled, k)))
        errors.append(np.sqrt(1.1) * np.std(np.log(reference)))
    return next((k for k in range(1, most) if gaps[k - 1] >= gaps[k] - errors[k]), most)


@pytest.mark.parametrize("seed", range(12))
def test_number_of_clusters_against_every_split(seed):
    rng = np.random.default_rng(seed)
    scores = np.concatenate([rng.normal(size=5), rng.normal(size=4) + [0, 3, 9][seed % 3]])
    assert gap_count(scores, seed) == naive_gap(scores, seed)


@pytest.mark.parametrize("clients", [20, 100])
def test_thirty_homogeneous_score_sets_are_no_attack(clients):
    """FLPoison's gap statistic is off by one: it never finds a single cluster, and fires on 30 of 30."""
    rng = np.random.default_rng(0)
    assert sum(gap_count(rng.normal(1, 0.1, clients), 0) > 1 for _ in range(30)) == 0


@pytest.mark.parametrize("clients", [10, 28])
def test_two_score_sets_are_an_attack(clients):
    rng = np.random.default_rng(0)
    for _ in range(10):
        scores = np.concatenate([rng.normal(1, 0.1, clients - 4), rng.normal(2.5, 0.1, 4)])
        assert gap_count(scores, 0) > 1
        assert (scores > lower_cluster_end(scores)).nonzero()[0].tolist() == [*range(clients - 4, clients)]


def test_fldetector_finds_eight_of_twenty_eight():
    log, culprits = culprits_log(planted.boosted)
    verdict = fldetector(window=4)(log)
    assert flagged(verdict) == culprits
    np.testing.assert_array_equal(verdict.scores, prediction_residual(log, 4)["update"] - 1)


def test_fldetector_is_silent_on_clean_cohorts():
    names = tuple(f"client-{i:02d}" for i in range(28))
    flags = [fldetector(window=4)(planted.clean_log(8, names, seed)).flags.any() for seed in range(10)]
    assert sum(flags) <= 1


def test_fldetector_waits_for_its_rounds():
    log = planted.clean_log(12)
    assert fldetector()(log[:10]).abstained == "the log has 10 rounds, FLDetector decides from 11 on"
    assert not fldetector()(log[:11]).abstained
    assert fldetector(start=50)(log).abstained == "the log has 12 rounds, FLDetector decides from 50 on"
    assert "no earlier update" in fldetector(start=1)(log[:1]).abstained
    assert not fldetector(start=2)(log[:2]).abstained


def test_fldetector_with_two_equal_groups():
    groups = planted.CLIENTS[:6]

    def two(updates, who):
        for name in planted.LAYERS:
            updates[name][~who] = updates[name][~who][0]
            updates[name][who] = 3 * updates[name][~who][0]

    verdict = fldetector(window=2)(planted.edited(planted.clean_log(), two, groups))
    assert flagged(verdict) == set(groups)


# FLANDERS


def naive_forecast(models, alpha, beta, iterations):
    """Alternating least squares with B as a matrix and every sum written out."""
    scale = np.abs(models).max()
    x = models / scale
    clients, numbers = x.shape[1:]
    a, b = np.eye(clients), np.eye(numbers)
    for _ in range(iterations):
        one = sum(x[t] @ b.T @ x[t - 1].T for t in range(1, len(x)))
        two = sum(x[t - 1] @ b @ b.T @ x[t - 1].T for t in range(1, len(x)))
        a = one @ np.linalg.inv(two + alpha * np.eye(clients))
        one = sum(x[t - 1].T @ a.T @ x[t] for t in range(1, len(x)))
        two = sum(x[t - 1].T @ a.T @ a @ x[t - 1] for t in range(1, len(x)))
        b = np.linalg.inv(two + beta * np.eye(numbers)) @ one
    return scale * (a @ x[-1] @ b)


@pytest.mark.parametrize(("alpha", "beta", "iterations", "window"), [(1, 1, 100, 5), (0.1, 0.3, 7, 3), (2, 1, 1, 9)])
def test_flanders_against_the_regression_written_out(alpha, beta, iterations, window):
    log = random_log(3)
    models = []
    for round_ in list(log)[-window:]:
        order = np.argsort(round_.clients)
        flat = [
            np.concatenate([round_.updates[n][r].ravel() + round_.global_model[n].ravel() for n in "wb"]) for r in order
        ]
        models.append(np.array(flat, np.float64))
    models = np.stack(models)
    errors = np.linalg.norm(models[-1] - naive_forecast(models[:-1], alpha, beta, iterations), axis=1)
    verdict = flanders(2, alpha=alpha, beta=beta, iterations=iterations, window=window)(log)
    order = np.argsort(verdict.clients)
    np.testing.assert_allclose(verdict.scores[order], errors / np.median(errors) - 1, rtol=1e-4, atol=1e-5)
    assert set(np.argsort(errors)[-2:]) == set(verdict.flags[order].nonzero()[0])


def test_flanders_absent_clients_count_as_the_global_model():
    full = random_log(4)
    rounds = [r if r.index != 3 else r.take(r.clients != "c02") for r in full]
    absent = flanders()(UpdateLog(full.model, rounds))

    def nothing(updates, who):
        for name in updates:
            updates[name][who] = 0

    still = UpdateLog(full.model, [r if r.index != 3 else planted.edited(full[3:4], nothing, ["c02"])[0] for r in full])
    np.testing.assert_allclose(absent.scores, flanders()(still).scores, rtol=1e-6, atol=1e-7)


def test_flanders_finds_eight_of_twenty_eight():
    def noise(updates, who):
        for name in planted.LAYERS:
            updates[name][who] += np.random.default_rng(abs(int(1e6 * updates[name].sum()))).normal(
                size=updates[name][who].shape
            )

    log, culprits = culprits_log(noise)
    assert flagged(flanders(num_malicious=8)(log)) == culprits
    verdict = flanders()(log)
    assert verdict.flags.sum() == 13
    assert set(verdict.clients[np.argsort(verdict.scores)[-8:]]) == culprits


def test_flanders_looks_at_a_sample_of_the_coordinates():
    log = planted.PLANTED["boosted"].log()
    whole, part = flanders(sampled=64)(log), flanders(sampled=20)(log)
    assert not np.array_equal(whole.scores, part.scores)
    np.testing.assert_array_equal(whole.scores, flanders(seed=5)(log).scores)  # all 64 of them
    assert not np.array_equal(part.scores, flanders(sampled=20, seed=5)(log).scores)


def test_flanders_says_what_is_missing():
    log = planted.clean_log()
    assert "2 rounds, at least 3 are needed" in flanders()(log[:2]).abstained
    assert not flanders()(log[:3]).abstained
    assert "12 clients took part, more than num_malicious = 12" in flanders(num_malicious=12)(log).abstained
    rounds = [r if r.index != 2 else r.take(np.arange(5)) for r in log]
    assert "not in the round before" in flanders()(UpdateLog(log.model, rounds)).abstained
    assert not flanders(num_malicious=0)(log).flags.any()


def test_flanders_flags_nobody_where_all_are_equal():
    verdict = flanders()(planted.Planted(planted.one_for_all, planted.CLIENTS).log())
    assert verdict.scores.tolist() == [0] * 12
    assert not verdict.flags.any()


# What they have in common


@pytest.mark.parametrize("detector", EVERY, ids=repr)
def test_order_of_clients_changes_nothing(detector):
    log = planted.PLANTED["boosted"].log(6)
    order = np.random.default_rng(0).permutation(12)
    verdict, shuffled = detector(log), detector(planted.taken(log, order))
    np.testing.assert_allclose(shuffled.scores, verdict.scores[order], rtol=1e-9, atol=1e-9)
    np.testing.assert_array_equal(shuffled.flags, verdict.flags[order])


@pytest.mark.parametrize("detector", EVERY, ids=repr)
def test_equal_updates_get_equal_scores(detector):
    verdict = detector(planted.PLANTED["equal pair"].log(6))
    assert verdict.scores[1] == pytest.approx(verdict.scores[8], rel=1e-9)
    assert verdict.flags[1] == verdict.flags[8]


@pytest.mark.parametrize("detector", EVERY, ids=repr)
@pytest.mark.parametrize("value", [np.nan, np.inf, 1e6, 1e30])
def test_an_absurd_client_changes_no_other_score(detector, value):
    log = planted.PLANTED["shifted class"].log(6)
    verdict = detector(planted.with_client_at(log, value, "client-07"))
    expected = detector(planted.without(log, "client-07"))
    others = verdict.clients != "client-07"
    assert verdict.scores[~others] == np.inf
    assert verdict.flags[~others].all()
    np.testing.assert_allclose(verdict.scores[others], expected.scores, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("detector", EVERY, ids=repr)
def test_later_rounds_change_nothing(detector):
    log = planted.PLANTED["boosted"].log(7)
    forward = {len(prefix): detector(prefix) for prefix in log.prefixes()}
    for length in (7, 4, 6):
        for asked in (log[:length], planted.PLANTED["boosted"].log(length)):
            verdict = detector(asked)
            np.testing.assert_array_equal(verdict.scores, forward[length].scores)
            assert verdict.abstained == forward[length].abstained


@pytest.mark.parametrize("detector", EVERY[:4], ids=repr)
def test_three_clients_with_the_least_history(detector):
    verdict = detector(planted.clean_log(3, clients=planted.CLIENTS[:3]))
    assert np.isfinite(verdict.scores).all()
    assert not verdict.abstained


@pytest.mark.parametrize("detector", EVERY, ids=repr)
def test_where_all_are_equal_nobody_stands_out(detector):
    verdict = detector(planted.Planted(planted.one_for_all, planted.CLIENTS).log())
    assert verdict.scores.tolist() == [0] * 12
    assert not verdict.flags.any()


def test_detectors_are_values():
    assert foolsgold(1) == foolsgold(1.0)
    assert repr(foolsgold()) == "foolsgold(kappa=1.0, layers='all')"
    assert repr(fldetector(np.int64(3))) == "fldetector(window=3, start=None, seed=0)"
    assert repr(flanders()).startswith("flanders(num_malicious=None, window=5, sampled=500, alpha=1.0, beta=1.0")
    assert len({*EVERY, *EVERY}) == len(EVERY)


@pytest.mark.parametrize(
    ("build", "settings_", "message"),
    [
        (foolsgold, {"kappa": 0}, "foolsgold: kappa must be a number above 0, found 0"),
        (foolsgold, {"kappa": np.nan}, "kappa must be a number above 0"),
        (foolsgold, {"layers": "last"}, "layers must be one of all, final, found 'last'"),
        (fldetector, {"window": 0}, "fldetector: window must be a whole number of at least 1, found 0"),
        (fldetector, {"start": 2.5}, "start must be a whole number of at least 1, found 2.5"),
        (fldetector, {"seed": -1}, "seed must be a whole number of at least 0"),
        (flanders, {"window": 2}, "flanders: window must be a whole number of at least 3, found 2"),
        (flanders, {"num_malicious": -1}, "num_malicious must be a whole number of at least 0"),
        (flanders, {"sampled": True}, "sampled must be a whole number"),
        (flanders, {"alpha": 0}, "alpha must be a number above 0"),
        (flanders, {"beta": "1"}, "beta must be a number above 0"),
        (flanders, {"iterations": 0}, "iterations must be a whole number of at least 1"),
    ],
)
def test_settings_are_checked(build, settings_, message):
    with pytest.raises(InputError, match=message):
        build(**settings_)
