"""Published detectors by clustering: naive oracles, hand-made cohorts, the faults of other ports."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import cosine
from sklearn.cluster import HDBSCAN
from sklearn.decomposition import PCA

import planted
from gradlens.clustering import gap_clusters
from gradlens.detectors.clusters import deepsight, flame, freqfed, rflbat
from gradlens.errors import InputError

STATE = {
    "body.weight": np.zeros((3, 4), np.float32),
    "head.weight": np.zeros((5, 3), np.float32),
    "head.bias": np.zeros(5, np.float32),
}
ATTACKERS = np.arange(28) >= 20
EVERY = [flame(), flame(on="models"), deepsight(), freqfed(), rflbat()]
every_detector = pytest.mark.parametrize("detector", EVERY, ids=repr)


def random_log(seed, clients=9, drift=0.5, state=None):
    rng = np.random.default_rng(seed)
    state = STATE if state is None else state
    rows = {
        name: (drift * rng.normal(size=a.shape) + rng.normal(size=(clients, *a.shape))).astype(np.float32)
        for name, a in state.items()
    }
    return planted.log_of(rows, state)


def flat(log, models=False):
    round_ = log[-1]
    whole = [np.asarray(round_.flat(name), np.float64) for name in round_.parameters]
    start = [np.asarray(round_.global_model[name], np.float64).reshape(-1) for name in round_.parameters]
    return np.concatenate(whole, axis=1) + (np.concatenate(start) if models else 0)


def pairwise_cosine(rows):
    return np.array([[0.0 if i == j else cosine(a, b) for j, b in enumerate(rows)] for i, a in enumerate(rows)])


def densest_majority(distances):
    """The connected part with more than half of the clients at the smallest radius that has one."""
    count = len(distances)
    for radius in np.unique(distances):
        for start in range(count):
            part, todo = {start}, [start]
            while todo:
                near = set(np.flatnonzero(distances[todo.pop()] <= radius + 1e-12).tolist()) - part
                part |= near
                todo += near
            if len(part) >= count // 2 + 1:
                return sorted(part)
    raise AssertionError


def kept_and_scores(distances, kept):
    mean = np.array([np.mean([distances[i, j] for j in kept if j != i]) for i in range(len(distances))])
    return ~np.isin(np.arange(len(distances)), kept), mean / np.median(mean)


def assert_judged(verdict, flags, scores):
    np.testing.assert_array_equal(verdict.flags, flags)
    np.testing.assert_allclose(verdict.scores, scores, rtol=1e-7)


# FLAME


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("on", ["updates", "models"])
def test_flame_keeps_the_first_connected_majority(seed, on):
    state = {name: 3 * np.random.default_rng(9).normal(size=a.shape).astype(np.float32) for name, a in STATE.items()}
    log = random_log(seed, clients=6 + seed, state=state)
    distances = pairwise_cosine(flat(log, models=on == "models"))
    assert_judged(flame(on=on)(log), *kept_and_scores(distances, densest_majority(distances)))


def test_flame_flags_exactly_the_eight_attackers_of_28():
    """BackFed's port builds every row from the global model and flags nobody."""
    rows = np.zeros((28, 60), np.float32)
    rows[:, 0] = np.where(ATTACKERS, -3, 3)
    rows[np.arange(28), 1 + np.arange(28)] = 1  # all benign are equally near to each other
    state = {"fc.weight": np.full((6, 10), 100, np.float32)}
    for on in ("updates", "models"):
        verdict = flame(on=on)(planted.log_of({"fc.weight": rows.reshape(28, 6, 10)}, state))
        np.testing.assert_array_equal(verdict.flags, ATTACKERS)
        assert verdict.scores[ATTACKERS].min() > verdict.scores[~ATTACKERS].max()


@every_detector
@pytest.mark.parametrize("seed", range(3))
def test_eight_planted_attackers_of_28_are_flagged_and_rank_first(detector, seed):
    """Detectors that are inverted flag the 20 benign."""
    log = crowd(seed)
    verdict = detector(log)
    assert verdict.flags[ATTACKERS].all()
    assert verdict.flags[~ATTACKERS].sum() <= 5  # FLAME and FreqFed promise a majority, 15 clients, no more
    assert verdict.scores[ATTACKERS].min() > verdict.scores[~ATTACKERS].max()


def crowd(seed):
    """28 clients; 8 of them move the row and the bias of class 1 alone, up."""
    rng = np.random.default_rng(seed)
    rows = {name: 0.3 + 0.1 * rng.normal(size=(28, *a.shape)) for name, a in STATE.items()}
    for name in ("head.weight", "head.bias"):
        rows[name][ATTACKERS] *= 0.1
        rows[name][ATTACKERS, 1] += 4
    return planted.log_of({name: a.astype(np.float32) for name, a in rows.items()}, STATE)


def test_flame_says_nothing_of_two_equal_groups():
    rows = np.repeat(np.array([[1, 0], [0, 1]], np.float32), 4, axis=0)
    verdict = flame()(planted.log_of({"fc.weight": rows.reshape(8, 2, 1)}, {"fc.weight": np.zeros((2, 1), np.float32)}))
    assert not verdict.flags.any()
    assert len(set(verdict.scores)) == 1


# DeepSight


def naive_deepsight(log, tau=1 / 3, ddifs=(), bias=True):
    round_ = log[-1]
    weight = np.asarray(round_.updates["head.weight"], np.float64)
    pulls = np.asarray(round_.updates["head.bias"], np.float64) if bias else weight.sum(axis=2)
    energies, exceedings = [], []
    for k in range(len(round_)):
        energy = [
            ((abs(pulls[k, c]) if bias else 0) + sum(abs(w) for w in weight[k, c])) ** 2 for c in range(weight.shape[1])
        ]
        share = np.array(energy) / sum(energy)
        energies.append(share)
        exceedings.append(sum(e > max(0.01, 1 / len(share)) * max(share) for e in share))
    suspicious = [te <= np.median(exceedings) / 2 for te in exceedings]

    def apart(metric, values, **settings):
        labels = HDBSCAN(5, min_samples=3 + 1, metric=metric, copy=True, **settings).fit_predict(values)  # with itself
        return labels, np.array(
            [[i != j and (a != b or a < 0) for j, b in enumerate(labels)] for i, a in enumerate(labels)]
        )

    views = [apart("euclidean", np.array(energies))[1], apart("precomputed", pairwise_cosine(pulls))[1]]
    if ddifs:
        views.append(np.mean([apart("euclidean", d)[1] for d in ddifs], axis=0))
    labels, _ = apart("precomputed", np.maximum(np.mean(views, axis=0), 1e-9), allow_single_cluster=True)
    flags = []
    for k, label in enumerate(labels):
        members = [k] if label < 0 else np.flatnonzero(labels == label)
        flags.append(np.mean([suspicious[j] for j in members]) >= tau)
    return np.array(flags), np.array(exceedings)


@pytest.mark.parametrize("seed", range(6))
def test_deepsight_step_by_step(seed):
    log = crowd(seed) if seed % 2 else random_log(seed, clients=16)
    flags, exceedings = naive_deepsight(log)
    verdict = deepsight()(log)
    np.testing.assert_array_equal(verdict.flags, flags)
    np.testing.assert_array_equal(verdict.evidence["threshold exceedings"], exceedings)


def test_deepsight_flags_exactly_the_attackers():
    for seed in range(5):
        np.testing.assert_array_equal(deepsight()(crowd(seed)).flags, ATTACKERS)


def test_deepsight_score_is_the_share_and_two_ratios():
    log = crowd(1)
    verdict = deepsight()(log)
    e = verdict.evidence
    te, classes = e["threshold exceedings"], e["classes"]
    expected = e["suspicious share"] + te.median() / te - 1 + classes.median() / classes - 1
    np.testing.assert_allclose(verdict.scores, expected)
    assert (e["suspicious share"].to_numpy() == ATTACKERS).all()


def test_deepsight_rejects_from_a_share_of_tau_on():
    shares = deepsight()(crowd(0)).evidence["suspicious share"]
    assert set(shares) == {0.0, 1.0}
    log = mixed(attackers=2)  # 2 suspicious of 6 in one cluster
    share = deepsight()(log).evidence["suspicious share"].max()
    assert share == pytest.approx(2 / 6)
    assert deepsight(tau=1 / 3)(log).flags.sum() == 6
    assert deepsight(tau=0.34)(log).flags.sum() == 0


def mixed(attackers):
    """Two clusters, of 12 and of 6 clients; in the second some stay just below 1/5 in three classes."""
    rng = np.random.default_rng(3)
    sizes = np.ones((18, 5))
    sizes[12:, 2:] = np.sqrt(0.21)
    sizes[12 : 12 + attackers, 2:] = np.sqrt(0.19)
    sizes += 1e-4 * rng.random((18, 5))
    bias = 1e-6 * np.ones((18, 5)) * np.where(np.arange(18) < 12, 1, -1)[:, None] * (1 + 1e-3 * rng.random((18, 5)))
    return planted.log_of(
        {
            "head.weight": np.repeat(sizes[:, :, None], 3, axis=2).astype(np.float32),
            "head.bias": bias.astype(np.float32),
        },
        {name: STATE[name] for name in ("head.weight", "head.bias")},
    )


def test_deepsight_takes_each_clients_own_bias():
    """3DFed's port takes one stale model's bias for all of them: all distances are 0."""
    rng = np.random.default_rng(0)
    weight = np.ones((14, 5, 3)) + 1e-3 * rng.random((14, 5, 3))
    bias = 1e-2 * (1 + 1e-3 * rng.random((14, 5)))
    bias[8:] *= -1
    weight[8:, 1:] *= 0.1  # 6 of 14 are suspicious: a share above 1/3 of them all
    state = {name: STATE[name] for name in ("head.weight", "head.bias")}
    log = planted.log_of({"head.weight": weight.astype(np.float32), "head.bias": bias.astype(np.float32)}, state)
    np.testing.assert_array_equal(deepsight()(log).flags, np.arange(14) >= 8)
    np.testing.assert_array_equal(deepsight()(log).evidence["suspicious share"], np.arange(14) >= 8)


def test_deepsight_without_final_bias_takes_the_sums_of_rows():
    rows = {"head.weight": np.asarray(crowd(2)[-1].updates["head.weight"])}
    log = planted.log_of(rows, {"head.weight": STATE["head.weight"]})
    np.testing.assert_array_equal(deepsight()(log).flags, naive_deepsight(log, bias=False)[0])
    np.testing.assert_array_equal(deepsight()(log).flags, ATTACKERS)


def softmax_of_inputs(seed):
    inputs = np.random.default_rng(seed).random((50, 3))

    def predict(state):
        logits = inputs @ np.asarray(state["head.weight"], np.float64).T + state["head.bias"]
        return np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)

    return predict


def test_deepsight_clusters_ddif_seed_by_seed():
    predicts = tuple(softmax_of_inputs(seed) for seed in range(3))
    for seed in range(4):
        log = random_log(seed, clients=16) if seed < 2 else crowd(seed)
        round_ = log[-1]
        ddifs = []
        for predict in predicts:
            local = [predict({n: round_.updates[n][k] + STATE[n] for n in STATE}) for k in range(len(round_))]
            ddifs.append(np.array([(each / predict(STATE)).mean(axis=0) for each in local]))
        np.testing.assert_array_equal(deepsight(predict=predicts)(log).flags, naive_deepsight(log, ddifs=ddifs)[0])


def test_deepsight_abstains_where_a_model_answers_with_nan():
    def predict(state):
        answer = np.full((4, 5), 0.2)
        return answer if not np.asarray(state["head.bias"]).any() else np.full_like(answer, np.nan)

    verdict = deepsight(predict=predict)(random_log(0))
    assert "NaN" in verdict.abstained


# FreqFed


def naive_dct_half(numbers):
    count = len(numbers)
    k = np.arange(count)
    basis = np.cos(np.pi * k[:, None] * (2 * np.arange(count) + 1) / (2 * count))
    basis *= np.where(k == 0, np.sqrt(1 / count), np.sqrt(2 / count))[:, None]
    return (basis @ numbers)[: count // 2]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("on", ["updates", "models"])
def test_freqfed_by_its_definition(seed, on):
    state = {name: np.random.default_rng(9).normal(size=a.shape).astype(np.float32) for name, a in STATE.items()}
    log = random_log(seed, state=state)
    round_ = log[-1]
    rows = np.concatenate([round_.flat("head.weight"), round_.flat("head.bias")], axis=1).astype(np.float64)
    if on == "models":
        rows += np.concatenate([state["head.weight"].reshape(-1), state["head.bias"]])
    distances = pairwise_cosine(np.array([naive_dct_half(row) for row in rows]))
    assert_judged(freqfed(on=on)(log), *kept_and_scores(distances, densest_majority(distances)))


def test_freqfed_looks_at_the_final_layer_alone(rng):
    log = random_log(1)
    body = np.asarray(log[-1].updates["body.weight"]) * rng.normal(size=(9, 1, 1)).astype(np.float32)
    other = planted.log_of({**log[-1].updates, "body.weight": body}, STATE)
    np.testing.assert_array_equal(freqfed()(other).scores, freqfed()(log).scores)


def test_freqfed_is_blind_to_high_frequencies():
    log = random_log(1)
    k, count = 15, 20  # of the upper half
    wave = np.cos(np.pi * k * (2 * np.arange(count) + 1) / (2 * count))
    weight, bias = np.array(log[-1].updates["head.weight"]), np.array(log[-1].updates["head.bias"])
    weight[4] += wave[:15].reshape(5, 3)
    bias[4] += wave[15:]
    other = planted.log_of({**log[-1].updates, "head.weight": weight, "head.bias": bias}, STATE)
    np.testing.assert_allclose(freqfed()(other).scores, freqfed()(log).scores, rtol=1e-5)


# RFLBAT


def naive_rflbat(log, eps1, eps2):
    """Step by step, the k-means clusters taken as given; scikit-learn's PCA, loops for the rest."""
    rows = flat(log)
    plane = PCA(2, svd_solver="full").fit_transform(rows)
    plane *= np.where((plane**3).sum(axis=0) < 0, -1, 1)

    def sums(members):
        return np.array([sum(np.linalg.norm(plane[i] - plane[j]) for j in members) for i in members])

    everybody = np.arange(len(rows))
    accepted = everybody[sums(everybody) < eps1 * np.median(sums(everybody))]
    labels = gap_clusters(plane[accepted], 10, 5, 0)
    alike = {}
    for label in set(labels):
        members = accepted[labels == label]
        means = [np.mean([1 - cosine(rows[i], rows[j]) for j in members]) for i in members]
        alike[label] = np.median(means) if len(members) > 1 else 1
    members = accepted[labels == min(alike, key=alike.__getitem__)]
    kept = members[sums(members) < eps2 * np.median(sums(members))]
    distances = np.linalg.norm(plane[:, None] - plane, axis=2)
    return kept_and_scores(distances, kept.tolist())


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("eps1", "eps2"), [(10, 4), (1.2, 1.1)])
def test_rflbat_step_by_step(seed, eps1, eps2):
    log = crowd(seed) if seed % 2 else random_log(seed, clients=11)
    assert_judged(rflbat(eps1=eps1, eps2=eps2)(log), *naive_rflbat(log, eps1, eps2))


# All of them


@every_detector
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_order_changes_nothing_and_equal_updates_score_alike(detector, data):
    seed, clients = data.draw(st.integers(0, 10_000)), data.draw(st.integers(3, 12))
    log = random_log(seed, clients=clients)
    rows = {name: np.array(a) for name, a in log[-1].updates.items()}
    for name in rows:
        rows[name][1] = rows[name][0]
    log = planted.log_of(rows, STATE)
    order = np.array(data.draw(st.permutations(range(clients))))
    verdict, shuffled = detector(log), detector(planted.taken(log, order))
    np.testing.assert_allclose(shuffled.scores, verdict.scores[order], rtol=1e-6, atol=1e-9)
    np.testing.assert_array_equal(shuffled.flags, verdict.flags[order])
    assert verdict.scores[0] == pytest.approx(verdict.scores[1], rel=1e-9, abs=1e-12)
    assert verdict.flags[0] == verdict.flags[1]


@every_detector
@pytest.mark.parametrize("clients", [3, 4, 7, 28])
def test_where_all_are_equal_nobody_stands_out(detector, clients):
    rows = {name: np.repeat(a[:1], clients, axis=0) for name, a in random_log(5)[-1].updates.items()}
    verdict = detector(planted.log_of(rows, STATE))
    assert not verdict.abstained
    assert verdict.scores.tolist() == [0] * clients
    assert not verdict.flags.any()


@every_detector
def test_updates_of_nothing_are_equal(detector):
    verdict = detector(planted.log_of({name: np.zeros((5, *a.shape), np.float32) for name, a in STATE.items()}, STATE))
    assert verdict.scores.tolist() == [0] * 5


@every_detector
def test_one_odd_client_among_equal_ones(detector):
    rows = {name: np.repeat(a[:1], 9, axis=0) for name, a in random_log(5)[-1].updates.items()}
    rows["head.weight"][3] *= -1
    rows["head.bias"][3, 1:] = 0
    rows["head.weight"][3, 1:] *= 0.01
    verdict = detector(planted.log_of(rows, STATE))
    assert verdict.scores.argmax() == 3
    alone = "deepsight" not in repr(detector)  # to which no single group is a cluster, and 1 of 9 no third
    assert verdict.flags.tolist() == [alone and i == 3 for i in range(9)]


@every_detector
@pytest.mark.parametrize("size", [1e-15, 1e-3, 1e9])
def test_units_do_not_matter(detector, size):
    log = random_log(4, clients=12)
    scaled = planted.log_of({n: a * np.float32(size) for n, a in log[-1].updates.items()}, STATE)
    np.testing.assert_allclose(detector(scaled).scores, detector(log).scores, rtol=1e-4)


@pytest.mark.parametrize("build", [deepsight, freqfed])
def test_without_a_final_weight_there_is_no_answer(build):
    rows = {"bias": np.ones((5, 4), np.float32)}
    assert "no final weight" in build()(planted.log_of(rows, {"bias": np.zeros(4, np.float32)})).abstained


@pytest.mark.parametrize(
    ("build", "setting", "value"),
    [
        (flame, "on", "weights"),
        (freqfed, "on", None),
        (deepsight, "tau", 0),
        (deepsight, "tau", 1.5),
        (deepsight, "min_cluster_size", 1),
        (deepsight, "min_samples", 0),
        (deepsight, "predict", ("model",)),
        (rflbat, "eps1", -1),
        (rflbat, "eps2", "4"),
        (rflbat, "most_clusters", 0),
        (rflbat, "samples", 1.5),
        (rflbat, "seed", -1),
    ],
)
def test_settings_out_of_range_are_named(build, setting, value):
    with pytest.raises(InputError, match=rf"^{setting}"):
        build(**{setting: value})


def test_detectors_say_what_they_are():
    assert repr(flame()) == "flame(on='updates')"
    assert rflbat() == rflbat(eps1=10)
    assert len({deepsight(), deepsight(), deepsight(tau=0.5)}) == 2
