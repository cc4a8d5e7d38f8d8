"""Published detectors that look at the final layer: naive oracles, hand-made cohorts, the faults of other ports."""

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from sklearn.decomposition import PCA
from sklearn.metrics.pairwise import cosine_similarity
from sklearn.preprocessing import StandardScaler

import planted
from gradlens.clustering import two_means_by_column
from gradlens.detectors.final_layer import auror, bilgin, lfighter, tolpegin
from gradlens.errors import InputError
from gradlens.log import ModelSpec, UpdateLog

STATE = {
    "body.weight": np.zeros((3, 4), np.float32),
    "head.weight": np.zeros((4, 6), np.float32),
    "head.bias": np.zeros(4, np.float32),
}
ATTACKERS = np.arange(28) >= 20
EVERY = [
    bilgin(),
    bilgin(robust=True),
    tolpegin(),
    tolpegin(rounds=1),
    lfighter(),
    lfighter(variant="formula"),
    auror(),
]
every_detector = pytest.mark.parametrize("detector", EVERY, ids=repr)


def random_log(seed, clients=9, rounds=1, drift=0.5, attackers=()):
    """Random updates; the attackers' row of class 1 of the final layer goes one way, in every round."""
    rng = np.random.default_rng(seed)
    common = {name: drift * rng.normal(size=a.shape) for name, a in STATE.items()}
    log = UpdateLog(ModelSpec.of(STATE))
    for index in range(rounds):
        rows = {n: common[n] + rng.normal(size=(clients, *a.shape)) for n, a in STATE.items()}
        for name in ("head.weight", "head.bias"):
            rows[name][list(attackers), 1] += 8
        one = planted.log_of({name: a.astype(np.float32) for name, a in rows.items()}, STATE)[-1]
        log = log.append(replace(one, index=index))
    return log


def two_means_by_trying(points):
    """The split with the least sum of squares, of all of them: the members of the smaller side."""
    everybody = range(len(points))
    sides = [side for size in range(1, len(points) // 2 + 1) for side in combinations(everybody, size)]

    def within(side):
        parts = points[list(side)], np.delete(points, list(side), axis=0)
        return sum(((part - part.mean(axis=0)) ** 2).sum() for part in parts)

    return np.isin(np.arange(len(points)), min(sides, key=within))


def margins(points, doubtful):
    near = np.linalg.norm(points - points[doubtful].mean(axis=0), axis=1)
    away = np.linalg.norm(points - points[~doubtful].mean(axis=0), axis=1)
    return (away - near) / np.median(away)


@every_detector
def test_eight_planted_attackers_of_28_are_flagged(detector):
    for seed in range(3):
        verdict = detector(random_log(seed, clients=28, rounds=3, attackers=range(20, 28)))
        if "bilgin" not in repr(detector):
            np.testing.assert_array_equal(verdict.flags, ATTACKERS)
        if "robust=False" not in repr(detector):  # eight attackers move the mean too far
            assert verdict.scores[ATTACKERS].min() > verdict.scores[~ATTACKERS].max()


# Bilgin


def naive_bilgin(bias, robust):
    largest = []
    for own in bias:
        centres = [np.median(column) if robust else sum(column) / len(column) for column in bias.T]
        largest.append(max(abs(centre - b) for centre, b in zip(centres, own, strict=True)))
    middle = np.median(largest)
    return (largest - middle) / (1.4826 * np.median(np.abs(largest - middle)))


@pytest.mark.parametrize("robust", [False, True])
def test_bilgin_by_its_definition(robust):
    for seed in range(5):
        log = random_log(seed, attackers=[3] if seed else [])
        expected = naive_bilgin(log[-1].updates["head.bias"].astype(np.float64), robust)
        verdict = bilgin(robust=robust)(log)
        np.testing.assert_allclose(verdict.scores, expected, rtol=1e-9, atol=1e-12)
        np.testing.assert_array_equal(verdict.flags, expected > 3.5)
        np.testing.assert_array_equal(bilgin(robust=robust, threshold=0.5)(log).flags, expected > 0.5)


def test_bilgin_by_hand():
    """Means 1 and 0; m = 1, 1, 1, 3, 2, 0: median 1, MAD 0.5 (deviations 0 0 0 2 1 1)."""
    bias = np.array([[0, 0], [0, 0], [2, 0], [4, 0], [-1, 0], [1, 0]], np.float32)
    log = planted.log_of({"w": np.ones((6, 2, 1), np.float32), "b": bias}, {"w": np.ones((2, 1)), "b": np.zeros(2)})
    np.testing.assert_allclose(bilgin()(log).scores, np.array([0, 0, 0, 2, 1, -1]) / (1.4826 * 0.5))
    assert bilgin()(log).evidence["b"].tolist() == [1, 1, 1, 3, 2, 0]


def test_bilgin_can_flag_one_of_five():
    """An ordinary z-score of five clients never exceeds 1.8."""
    bias = np.array([[0.1, 0], [0, 0], [8, 0], [-0.2, 0], [0, 0.1]], np.float32)
    log = planted.log_of({"w": np.ones((5, 2, 1), np.float32), "b": bias}, {"w": np.ones((2, 1)), "b": np.zeros(2)})
    for robust in (False, True):
        assert bilgin(robust=robust)(log).flags.tolist() == [False, False, True, False, False]


# Tolpegin


def naive_tolpegin(rows):
    plane = PCA(2, svd_solver="full").fit_transform(StandardScaler().fit_transform(rows))
    return plane, two_means_by_trying(plane)


@pytest.mark.parametrize("seed", range(4))
def test_tolpegin_of_one_round_by_its_steps(seed):
    log = random_log(seed, clients=10, attackers=[2, 7])
    rows = log[-1].updates["head.weight"].astype(np.float64)
    plane, smaller = naive_tolpegin(rows[:, 1])
    assert smaller.tolist() == [i in (2, 7) for i in range(10)]
    expected = margins(plane, smaller)
    for detector in (tolpegin(source_label=1), tolpegin(), tolpegin(rounds=1)):
        verdict = detector(log)
        np.testing.assert_array_equal(verdict.flags, smaller)
        np.testing.assert_allclose(verdict.scores, expected - np.median(expected), rtol=1e-7, atol=1e-9)


def test_tolpegin_takes_the_class_whose_groups_lie_farthest_apart():
    log = random_log(1, clients=10, attackers=[2, 7])
    assert "head.weight[1] margin" in tolpegin()(log).evidence
    assert "head.weight[3] margin" in tolpegin(source_label=3)(log).evidence


def test_tolpegin_pools_rounds_by_name():
    """Four rounds, three in the window; the order of clients differs, one is new, one was absurd once."""
    log = random_log(3, clients=6, rounds=4, attackers=[1])
    rounds = [planted.taken(log, np.roll(np.arange(6), shift))[shift] for shift in range(4)]
    rounds[1] = replace(rounds[1], **part(rounds[1], rounds[1].clients != "e"))
    broken = {n: np.array(a) for n, a in rounds[2].updates.items()}
    broken["body.weight"][rounds[2].clients == "d"] = np.nan
    rounds[2] = replace(rounds[2], updates=broken)
    verdict = tolpegin(source_label=1, rounds=3)(UpdateLog(log.model, rounds))

    whose, rows = [], []
    for round_ in rounds[1:]:
        for client, update in zip(round_.clients, round_.updates["head.weight"], strict=True):
            if not (round_.index == 2 and client == "d"):
                whose.append(str(client))
                rows.append(update[1].astype(np.float64))
    plane, smaller = naive_tolpegin(np.array(rows))
    each = margins(plane, smaller)
    mean = np.array([np.mean([m for m, w in zip(each, whose, strict=True) if w == c]) for c in rounds[3].clients])
    np.testing.assert_allclose(verdict.scores, mean - np.median(mean), rtol=1e-7, atol=1e-9)
    assert verdict.clients[verdict.flags].tolist() == ["b"]
    assert verdict.evidence["observations"].to_dict() == {"a": 3, "b": 3, "c": 3, "d": 2, "e": 2, "f": 3}


def part(round_, chosen):
    updates = {name: np.array(a[chosen]) for name, a in round_.updates.items()}
    return {"clients": round_.clients[chosen], "num_examples": round_.num_examples[chosen], "updates": updates}


def test_tolpegin_leaves_the_bias_out():
    log = random_log(2)
    other = planted.log_of({**log[-1].updates, "head.bias": 9 * np.asarray(log[-1].updates["head.bias"])}, STATE)
    np.testing.assert_array_equal(tolpegin()(other).scores, tolpegin()(log).scores)


def test_rounds_that_differ_more_than_clients_make_nobody_guilty():
    """Early updates are larger: the groups are rounds, and all clients lie in each equally often."""
    log = random_log(0, clients=8, rounds=4)
    rows = {name: np.repeat(np.asarray(a[:1]), 8, axis=0) for name, a in log[0].updates.items()}
    first = replace(log[0], updates=rows)
    later = [replace(r, updates={n: 0.01 * a for n, a in rows.items()}) for r in (log[1], log[2], log[3])]
    verdict = tolpegin()(UpdateLog(log.model, [first, *later]))
    assert verdict.scores.tolist() == [0] * 8
    assert not verdict.flags.any()


def test_tolpegin_names_a_label_that_the_model_has_not():
    with pytest.raises(InputError, match="source_label must be one of the model's 4 classes, found 4"):
        tolpegin(source_label=4)(random_log(0))


# LFighter


def naive_lfighter(log, own):
    weight = log[-1].updates["head.weight"].astype(np.float64)
    bias = log[-1].updates["head.bias"].astype(np.float64)
    moved = [
        sum(np.linalg.norm(weight[i, c]) + abs(bias[i, c]) for i in range(len(weight))) for c in range(weight.shape[1])
    ]
    chosen = sorted(range(len(moved)), key=moved.__getitem__)[-2:]
    points = np.array([np.concatenate([w[c] for c in sorted(chosen)]) for w in weight])
    smaller = two_means_by_trying(points)
    density = []
    for side in (smaller, ~smaller):
        cosines = cosine_similarity(points[side])
        lowest = [min(own if i == j else cosines[i, j] for j in range(len(cosines))) for i in range(len(cosines))]
        density.append(side.mean() * (1 - np.mean(lowest)))
    doubtful = smaller if density[0] < density[1] else ~smaller
    return doubtful, margins(points, doubtful)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("variant", "own"), [("code", 0), ("formula", 1)])
def test_lfighter_by_its_steps(seed, variant, own):
    log = random_log(seed, clients=11, attackers=range(seed + 1))
    doubtful, expected = naive_lfighter(log, own)
    verdict = lfighter(variant=variant)(log)
    np.testing.assert_array_equal(verdict.flags, doubtful)
    np.testing.assert_allclose(verdict.scores, expected, rtol=1e-7)
    assert ((verdict.scores > 0) == verdict.flags).all()


def grouped(rows):
    rows = np.asarray(rows, np.float32)[:, :, None]
    return planted.log_of({"head.weight": rows}, {"head.weight": np.zeros(rows.shape[1:], np.float32)})


def test_lfighter_drops_the_denser_group_even_where_it_is_the_larger():
    """Five attackers send the same rows, four benign clients differ: ds 5/9 against 4/9 x (1 + 1)."""
    rows = [[10, 10]] * 5 + [[1, 1], [-1, -1], [1, -1], [-1, 1]]
    verdict = lfighter()(grouped(rows))
    assert verdict.flags.tolist() == [True] * 5 + [False] * 4


def test_lfighter_variants_differ_where_the_larger_group_points_one_way():
    """Benign within 20 degrees, two attackers at right angles: by the formula the benign are the denser group."""
    rows = [[10, a] for a in (0, 1, 2, 0.5, 1.5, 2.5)] + [[-10, 3], [-3, -10]]
    assert lfighter()(grouped(rows)).flags.tolist() == [False] * 6 + [True] * 2
    assert lfighter(variant="formula")(grouped(rows)).flags.tolist() == [True] * 6 + [False] * 2


def test_lfighter_says_nothing_of_two_groups_that_are_as_large_and_as_dense():
    verdict = lfighter()(grouped([[5, 1]] * 4 + [[-5, -1]] * 4))
    assert not verdict.flags.any()
    assert verdict.scores.tolist() == [0] * 8


def test_lfighter_counts_the_bias_when_it_chooses_classes_and_only_then():
    weight = np.full((8, 4, 2), 0.1, np.float32)
    weight[5:, 3] = -3
    weight[:, 0] = 5
    bias = np.zeros((8, 4), np.float32)
    bias[:, 2] = 9  # so class 3 is not among the two
    state = {"head.weight": weight[0] * 0, "head.bias": bias[0]}
    verdict = lfighter()(planted.log_of({"head.weight": weight, "head.bias": bias}, state))
    assert list(verdict.evidence) == ["head.weight[0]", "head.weight[2]"]
    assert not verdict.flags.any()
    verdict = lfighter()(planted.log_of({"head.weight": weight, "head.bias": 0 * bias}, state))
    assert list(verdict.evidence) == ["head.weight[0]", "head.weight[3]"]
    assert verdict.flags.tolist() == [False] * 5 + [True] * 3


# Auror


@settings(max_examples=80, deadline=None)
@given(
    x=arrays(
        np.float32,
        array_shapes(min_dims=2, max_dims=2, min_side=2, max_side=8),
        elements=st.one_of(st.integers(-4, 4).map(float), st.floats(-10, 10, width=32)),
    )
)
def test_two_groups_is_the_best_of_all_splits(x):
    gaps, minority = two_means_by_column(x)
    for column, gap, smaller in zip(x.T.astype(np.float64), gaps, minority.T, strict=True):
        if np.ptp(column) == 0:
            assert gap == 0
            assert not smaller.any()
            continue
        order = np.argsort(column)
        sides = [order[:k] for k in range(1, len(column))]
        within = [np.var(column[s]) * len(s) + np.var(np.delete(column, s)) * (len(column) - len(s)) for s in sides]
        best = [s for s, w in zip(sides, within, strict=True) if w <= min(within) + 1e-9 * np.ptp(column) ** 2]
        found = [abs(column[s].mean() - np.delete(column, s).mean()) for s in best]
        assert min(abs(gap - f) for f in found) <= 1e-9 * np.ptp(column)
        assert 2 * smaller.sum() < len(column)
        for a, b in combinations(range(len(column)), 2):
            assert column[a] != column[b] or smaller[a] == smaller[b]


def test_two_groups_by_hand():
    gaps, minority = two_means_by_column(
        np.array([[0, 0, 7], [1, 0, 7], [2, 9, 7], [11, 9, 7], [0.0, 4, 7]], np.float32)
    )
    np.testing.assert_allclose(gaps, [11 - 3 / 4, 9 - 4 / 3, 0])
    assert minority.T.tolist() == [[False] * 3 + [True, False], [False, False, True, True, False], [False] * 5]


def naive_auror(log, alpha):
    rows = np.concatenate([log[-1].flat("head.weight"), log[-1].flat("head.bias")], axis=1).astype(np.float64)
    gaps, votes = [], []
    for column in rows.T:
        smaller = two_means_by_trying(column[:, None])
        gaps.append(abs(column[smaller].mean() - column[~smaller].mean()))
        votes.append(smaller if 2 * smaller.sum() < len(column) else np.zeros(len(column), bool))
    gaps, votes = np.array(gaps), np.array(votes)
    indicative = gaps > (2 * np.median(gaps) if alpha is None else alpha)
    share = votes[indicative].mean(axis=0) if indicative.any() else np.zeros(len(rows))
    return share > 0.5, (gaps**2) @ votes / (gaps**2).sum()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("alpha", [None, 4, 1e9])
def test_auror_by_its_steps(seed, alpha):
    log = random_log(seed, clients=10, attackers=range(seed))
    flags, scores = naive_auror(log, alpha)
    verdict = auror(alpha=alpha)(log)
    np.testing.assert_array_equal(verdict.flags, flags)
    np.testing.assert_allclose(verdict.scores, scores, rtol=1e-9)
    assert verdict.flags.any() == (seed > 0 and alpha != 1e9)


def test_auror_by_hand():
    """Centres 1 apart in five coordinates, where the first is alone, 2.5 in one, where the last is; one never moves."""
    rows = np.zeros((5, 7))
    rows[0, :5] = 1
    rows[4, 5] = 2.5
    verdict = auror()(grouped(rows))
    np.testing.assert_allclose(verdict.scores, np.array([5, 0, 0, 0, 6.25]) / 11.25)
    assert verdict.flags.tolist() == [False] * 4 + [True]  # indicative from 2 medians on
    assert auror(alpha=0.9)(grouped(rows)).flags.tolist() == [True] + [False] * 4
    assert not auror(alpha=2.6)(grouped(rows)).flags.any()


def test_auror_works_on_updates_not_on_weights():
    """FLPoison's port hands it the raw weights, which differ by coordinate, not by client (peers.md 0.3)."""
    log = random_log(1, clients=10, attackers=[4])
    moved = {name: np.full_like(a, 50) for name, a in STATE.items()}
    other = planted.log_of(dict(log[-1].updates), moved)
    np.testing.assert_array_equal(auror()(other).scores, auror()(log).scores)


# All of them


@every_detector
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_order_changes_nothing_and_equal_updates_score_alike(detector, data):
    seed, clients = data.draw(st.integers(0, 10_000)), data.draw(st.integers(3, 10))
    log = random_log(seed, clients=clients, rounds=2)
    rounds = [replace(r, updates={n: np.concatenate([a[:1], a[:1], a[2:]]) for n, a in r.updates.items()}) for r in log]
    log = UpdateLog(log.model, rounds)
    order = np.array(data.draw(st.permutations(range(clients))))
    verdict, shuffled = detector(log), detector(planted.taken(log, order))
    np.testing.assert_allclose(shuffled.scores, verdict.scores[order], rtol=1e-6, atol=1e-9)
    np.testing.assert_array_equal(shuffled.flags, verdict.flags[order])
    assert verdict.scores[0] == pytest.approx(verdict.scores[1], rel=1e-9, abs=1e-9)
    assert verdict.flags[0] == verdict.flags[1]


@every_detector
@pytest.mark.parametrize("clients", [3, 4, 28])
def test_where_all_are_equal_nobody_stands_out(detector, clients):
    log = random_log(5, clients=clients, rounds=4)
    rounds = [replace(r, updates={n: np.repeat(a[:1], clients, axis=0) for n, a in r.updates.items()}) for r in log]
    verdict = detector(UpdateLog(log.model, rounds))
    assert not verdict.abstained
    assert verdict.scores.tolist() == [0] * clients
    assert not verdict.flags.any()


@every_detector
@pytest.mark.parametrize("size", [1e-15, 1e-3, 1e9])
def test_units_do_not_matter(detector, size):
    log = random_log(4, clients=12, rounds=2)
    scaled = [replace(r, updates={n: a * np.float32(size) for n, a in r.updates.items()}) for r in log]
    found = detector(UpdateLog(log.model, scaled)).scores
    np.testing.assert_allclose(found, detector(log).scores, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("build", [bilgin, tolpegin, lfighter, auror])
def test_without_its_layer_there_is_no_answer(build):
    rows = {"only": np.ones((5, 4), np.float32)}
    missing = "no final bias" if build is bilgin else "no final weight"
    assert missing in build()(planted.log_of(rows, {"only": np.zeros(4, np.float32)})).abstained


@pytest.mark.parametrize("build", [tolpegin, lfighter, auror])
def test_works_without_a_final_bias(build):
    log = random_log(1, clients=9, attackers=[3])
    rows = {"head.weight": np.asarray(log[-1].updates["head.weight"])}
    verdict = build()(planted.log_of(rows, {"head.weight": STATE["head.weight"]}))
    assert verdict.flags.tolist() == [i == 3 for i in range(9)]


@pytest.mark.parametrize(
    ("build", "setting", "value"),
    [
        (bilgin, "threshold", 0),
        (tolpegin, "source_label", -1),
        (tolpegin, "source_label", "cat"),
        (tolpegin, "rounds", 0),
        (lfighter, "variant", "paper"),
        (auror, "alpha", -0.1),
    ],
)
def test_settings_out_of_range_are_named(build, setting, value):
    with pytest.raises(InputError, match=rf"^{setting}"):
        build(**{setting: value})


def test_detectors_say_what_they_are():
    assert repr(tolpegin()) == "tolpegin(source_label=None, rounds=10)"
    assert lfighter() == lfighter(variant="code")
    assert len({auror(), auror(), auror(alpha=0.1)}) == 2
