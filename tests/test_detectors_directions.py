"""AlignIns, RLR, FLTrust and SignGuard against their formulas done naively, and where the answer is known."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import planted
from gradlens.clustering import majority_cluster, mean_shift
from gradlens.detectors.directions import alignins, fltrust, kth_largest, rlr, signguard
from gradlens.detectors.distances import drawn
from gradlens.errors import InputError
from one_round import flat, log_of, model_of

seeds = st.integers(0, 2**32 - 1)


def random_log(seed, clients=9, zeros=True):
    """Clients with a direction in common; two layers; some numbers are zero, as behind a unit that never fires."""
    rng = np.random.default_rng(seed)
    layers = [rng.normal(size=n) + rng.normal(size=(clients, n)) for n in (70, 31)]
    for layer in layers if zeros else []:
        layer[rng.random(layer.shape) < 0.2] = 0
    return log_of(*layers, state=[rng.normal(size=70), rng.normal(size=31)])


def with_model(log, state):
    return log_of(*log[-1].updates.values(), state=state)


def mean_update(log):
    """A reference: the mean of the clients, as if the server had data of its own like theirs."""
    return {name: np.asarray(log[-1].updates[name], np.float64).mean(axis=0) for name in log.model}


def server(log):
    return {name: np.ones(log.model[name].shape) for name in log.model}


EVERY = [alignins(), rlr(), fltrust(mean_update), signguard()]
NAMES = ["alignins", "rlr", "fltrust", "signguard"]
every_detector = pytest.mark.parametrize("detector", EVERY, ids=NAMES)


@pytest.mark.parametrize("detector", [alignins(), rlr(), signguard()], ids=repr)
@pytest.mark.parametrize("one", [np.random.default_rng(1).normal(size=40), np.zeros(40)])
def test_where_all_are_equal_nobody_is_flagged(detector, one):
    verdict = detector(log_of(np.tile(one, (7, 1)), state=[np.ones(40)]))
    assert verdict.scores.tolist() == [0] * 7
    assert not verdict.flags.any()


@every_detector
def test_two_equal_groups_are_judged_group_by_group(detector):
    rng = np.random.default_rng(2)
    verdict = detector(log_of(np.repeat(rng.normal(size=(2, 40)), 4, axis=0), state=[rng.normal(size=40)]))
    for group in (slice(0, 4), slice(4, 8)):
        np.testing.assert_allclose(verdict.scores[group], verdict.scores[group][0], rtol=1e-9)
        assert len(set(verdict.flags[group])) == 1


@pytest.mark.parametrize("detector", [rlr(), signguard()], ids=repr)
def test_updates_are_judged_and_not_the_weights(detector):
    """peers.md 0.3: a port that hands over raw weights judges what all clients have in common."""
    log = random_log(4)
    shifted = with_model(log, [1e3 * np.ones(70), 1e3 * np.ones(31)])
    np.testing.assert_array_equal(detector(shifted).scores, detector(log).scores)


@pytest.mark.parametrize(
    "detector", [alignins(), signguard(), fltrust(server)], ids=["alignins", "signguard", "fltrust"]
)
@pytest.mark.parametrize("seed", range(3))
def test_eight_attackers_among_28(detector, seed):
    """The malicious clients, every third one first, move the other way than most."""
    rng = np.random.default_rng(seed)
    updates, who = rng.normal(size=(28, 2000)) + 1, np.zeros(28, bool)
    who[np.arange(8) * 3] = True
    updates[who] *= -1
    log = log_of(updates, state=[np.ones(2000)])
    verdict = detector(log)
    assert verdict.scores[who].min() > verdict.scores[~who].max()
    assert verdict.flags[who].all()
    assert not verdict.flags[~who].all()
    scores = rlr()(log).scores
    assert scores[who].min() > scores[~who].max()


# AlignIns


def alignins_oracle(log, sparsity, lambda_s, lambda_c):
    updates, model = flat(log), model_of(log)
    majority = np.array([np.sign(sum(np.sign(x) for x in column)) for column in updates.T])
    count = int(sparsity * len(model))
    tda, mpsa = [], []
    for row in updates:
        largest = np.argsort(-np.abs(row), kind="stable")[:count]
        mpsa.append(sum(np.sign(row[k]) == majority[k] for k in largest) / count)
        tda.append(row @ model / np.linalg.norm(row) / np.linalg.norm(model))
    distances = [np.abs(x - np.median(x)) / (np.std(x) or 1) for x in (mpsa, tda)]
    kept = (distances[0] < lambda_s) & (distances[1] < lambda_c)
    return np.maximum(distances[0] / lambda_s, distances[1] / lambda_c), ~kept, np.array(tda), np.array(mpsa)


@pytest.mark.parametrize("sparsity", [0.05, 0.3, 0.7])
@pytest.mark.parametrize("lambdas", [(1.0, 1.0), (1.5, 0.7)])
@pytest.mark.parametrize("seed", range(4))
def test_alignins_is_its_formula(sparsity, lambdas, seed):
    log = random_log(seed, 10)
    scores, flags, tda, mpsa = alignins_oracle(log, sparsity, *lambdas)
    verdict = alignins(sparsity, *lambdas)(log)
    np.testing.assert_allclose(verdict.evidence["tda"], tda, rtol=1e-9)
    np.testing.assert_allclose(verdict.evidence["mpsa"], mpsa, rtol=1e-9)
    np.testing.assert_allclose(verdict.scores, scores, rtol=1e-7, atol=1e-9)
    np.testing.assert_array_equal(verdict.flags, flags)


def test_alignins_by_hand():
    """The largest of three numbers: the majority's signs are +, +, level; no model, so no TDA."""
    log = log_of([[3, 1, -1], [1, 3, 1], [-3, 1, 0], [1, 1, -2], [1, -1, 2]])
    evidence = alignins(1 / 3)(log).evidence
    assert evidence["mpsa"].tolist() == [1, 1, 0, 0, 0]
    assert evidence["tda"].tolist() == [0] * 5
    np.testing.assert_allclose(alignins(1 / 3)(log).scores, np.array([1, 1, 0, 0, 0]) / np.sqrt(0.24))


def test_alignins_flags_at_lambda_and_not_below():
    """Two groups of three: everybody is one standard deviation from the median, give or take a rounding."""
    for seed in range(5):
        rng = np.random.default_rng(seed)
        log = log_of(np.repeat(rng.normal(size=(2, 50)), 3, axis=0), state=[rng.normal(size=50)])
        assert alignins()(log).flags.all()
        assert not alignins(lambda_s=1.01, lambda_c=1.01)(log).flags.any()


def test_alignins_counts_equally_large_numbers_alike():
    """Two of three equal numbers are counted: whichever they are, two thirds of those agree."""
    log = log_of([[1, 1, -1], [1, 2, 3], [1, 2, 3], [1, 2, 3]])
    assert alignins(0.67)(log).evidence["mpsa"].iloc[0] == pytest.approx(2 / 3)


def test_alignins_takes_a_zero_for_a_vote_that_is_level():
    log = log_of([[0, 0], [1, 0], [1, 0], [-1, 0]])
    assert alignins(1.0)(log).evidence["mpsa"].tolist() == [0.5, 1, 1, 0.5]


def test_alignins_looks_at_the_model_before_the_round():
    log = random_log(5)
    other = with_model(log, [np.ones(70), -np.ones(31)])
    assert np.abs(alignins()(log).evidence["tda"] - alignins()(other).evidence["tda"]).max() > 0.1
    np.testing.assert_array_equal(alignins()(log).evidence["mpsa"], alignins()(other).evidence["mpsa"])


@settings(deadline=None, max_examples=60)
@given(
    seed=seeds, size=st.sampled_from([1, 2, 50, 9_000, 40_000]), kind=st.sampled_from(["normal", "few", "zero", "runs"])
)
def test_largest_finds_the_kth_among_many(seed, size, kind):
    rng = np.random.default_rng(seed)
    numbers = {
        "normal": np.abs(rng.standard_normal(size)),
        "few": rng.integers(0, 4, size),
        "zero": np.maximum(rng.standard_normal(size), 0),
        "runs": np.where(np.arange(size) % max(1, size // 8192), 1.0, 100.0),  # a sample by steps sees 100 alone
    }[kind].astype(np.float32)
    k = int(rng.integers(1, size + 1))
    edge, above, at = kth_largest(numbers, k)
    assert edge == np.sort(numbers)[size - k]
    assert above == (numbers > edge).sum()
    np.testing.assert_array_equal(at, np.flatnonzero(numbers == edge))


# RLR


def rlr_oracle(log, threshold):
    shares = []
    updates = flat(log)
    for row in updates:
        lost = 0.0
        for k, number in enumerate(row):
            votes = sum(np.sign(updates[:, k]))
            turned_round, outvoted = abs(votes) < threshold, np.sign(votes) != np.sign(number)
            lost += abs(number) if turned_round or outvoted else 0.0
        shares.append(lost / np.abs(row).sum())
    return np.array(shares)


@pytest.mark.parametrize("threshold", [1, 4, 9])
@pytest.mark.parametrize("seed", range(4))
def test_rlr_is_its_formula(threshold, seed):
    log = random_log(seed)
    verdict = rlr(threshold)(log)
    np.testing.assert_allclose(verdict.scores, rlr_oracle(log, threshold), rtol=1e-6, atol=1e-9)
    assert not verdict.flags.any()


def test_rlr_by_hand():
    """Votes: +3 and +1 of 5; a threshold of 2 lets the first number through, for whoever goes that way."""
    log = log_of([[1, 1], [1, 3], [3, 1], [2, -1], [-1, -2]])
    assert rlr(2)(log).scores.tolist() == pytest.approx([1 / 2, 3 / 4, 1 / 4, 1 / 3, 1])
    assert rlr(1)(log).scores.tolist() == pytest.approx([0, 0, 0, 1 / 3, 1])


def test_rlr_needs_by_default_what_no_minority_reaches():
    for count in range(3, 10):
        log = random_log(6, count)
        np.testing.assert_array_equal(rlr()(log).scores, rlr((count - 1) // 2 + 1)(log).scores)
        assert f"needs {count + 1} comparable clients, found {count}" in rlr(count + 1)(log).abstained


# FLTrust


@pytest.mark.parametrize("seed", range(3))
def test_fltrust_is_its_formula(seed):
    log, own = random_log(seed), np.ones(101)
    updates = flat(log)
    cosines = np.array([row @ own / (np.linalg.norm(row) * np.linalg.norm(own)) for row in updates])
    trust = np.maximum(cosines, 0)
    verdict = fltrust(server)(log)
    np.testing.assert_allclose(verdict.scores, 1 - cosines, rtol=1e-9)
    np.testing.assert_array_equal(verdict.flags, trust == 0)
    scaled = [t * np.linalg.norm(own) / np.linalg.norm(row) * row for t, row in zip(trust, updates, strict=True)]
    paper = sum(scaled) / sum(trust)
    found = verdict.weights @ updates
    np.testing.assert_allclose(found / np.linalg.norm(found), paper / np.linalg.norm(paper), atol=1e-9)
    assert verdict.weights.max() == 1
    assert verdict.weights.min() >= 0


def test_fltrust_by_hand():
    log = log_of([[2, 0], [0, 3], [-1, 0], [3, 4], [0, 0]])
    verdict = fltrust(lambda log: {"layer0": np.array([1.0, 0.0])})(log)
    assert verdict.scores.tolist() == pytest.approx([0, 1, 2, 0.4, 1])
    assert verdict.flags.tolist() == [False, True, True, False, True]
    assert verdict.weights.tolist() == pytest.approx([1, 0, 0, 0.6 / 5 * 2, 0])  # 1/2 and .6/5, by the larger
    assert verdict.evidence["norm_ratio"].tolist() == pytest.approx([1 / 2, 1 / 3, 1, 1 / 5, 0])


def test_fltrust_is_no_plain_mean():
    """BackFed issue 10: a port that averages alike."""
    log = random_log(7)
    assert np.ptp(fltrust(server)(log).weights) > 0.1


def test_fltrust_trusts_nobody_who_goes_the_other_way():
    verdict = fltrust(lambda log: {name: -array for name, array in mean_update(log).items()})(random_log(8))
    assert verdict.flags.all()
    assert verdict.weights.tolist() == [0] * 9


def test_fltrust_abstains_without_a_direction():
    assert "needs the server's own update" in fltrust()(random_log(0)).abstained
    nothing = fltrust(lambda log: {name: np.zeros(log.model[name].shape) for name in log.model})
    assert "is zero: it has no direction" in nothing(random_log(0)).abstained


def test_fltrust_sees_the_log_of_comparable_clients():
    seen = []

    def reference(log):
        seen.append(len(log[-1]))
        return server(log)

    fltrust(reference)(planted.with_client_at(planted.clean_log(), np.nan))
    assert seen == [11]


@pytest.mark.parametrize(
    ("own", "said"),
    [
        (np.ones(3), "must give {layer: array}"),
        ({"layer0": np.ones(70)}, "'layer1' must have shape (31,), found none"),
        ({"layer0": np.ones(71), "layer1": np.ones(31)}, "'layer0' must have shape (70,), found (71,)"),
        ({"layer0": np.ones(70), "layer1": np.full(31, np.nan)}, "'layer1' must be finite"),
    ],
)
def test_a_reference_that_is_no_update_is_refused(own, said):
    with pytest.raises(InputError) as error:
        fltrust(lambda log: own)(random_log(0))
    assert said in str(error.value)


# SignGuard


def sign_shares_oracle(log, sample, seed):
    chosen = drawn(log[-1], max(1_000, int(sample * 101)), np.random.default_rng([seed, log[-1].index]))
    shares = [[np.mean(np.sign(row[chosen]) == sign) for sign in (1, 0, -1)] for row in flat(log)]
    return np.array(shares) / np.maximum(np.max(shares, axis=0), 1e-8)


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("seed", range(8))
def test_signguard_is_its_formula(seed, zeros):
    """With scikit-learn's mean shift and bandwidth, as in the authors' program."""
    from sklearn.cluster import MeanShift, estimate_bandwidth

    log = random_log(seed, 15, zeros)
    signs = sign_shares_oracle(log, 0.1, seed)
    labels = MeanShift(bandwidth=estimate_bandwidth(signs, quantile=0.5), cluster_all=False).fit(signs).labels_
    sizes = [np.sum(labels == k) for k in range(labels.max() + 1)]
    norms = np.linalg.norm(flat(log), axis=1)
    kept = (labels == np.argmax(sizes)) & (norms > 0.1 * np.median(norms)) & (norms < 3 * np.median(norms))
    verdict = signguard(seed=seed)(log)
    np.testing.assert_allclose(verdict.evidence[["positive", "zero", "negative"]], signs, rtol=1e-9)
    if sizes.count(max(sizes)) == 1:  # among clusters of equal size the program takes the first
        np.testing.assert_array_equal(verdict.flags, ~kept)


@settings(deadline=None, max_examples=25)
@given(seed=seeds, count=st.integers(4, 20), groups=st.integers(1, 4))
def test_mean_shift_is_scikit_learns(seed, count, groups):
    from sklearn.cluster import MeanShift, estimate_bandwidth

    rng = np.random.default_rng(seed)
    x = rng.random((groups, 3))[rng.integers(0, groups, count)] + 0.05 * rng.random((count, 3))
    bandwidth = estimate_bandwidth(x, quantile=0.5)
    expected = MeanShift(bandwidth=bandwidth, cluster_all=False).fit(x)
    labels, centres = mean_shift(x, bandwidth)
    sizes = [sorted(np.bincount(found[found >= 0])) for found in (labels, expected.labels_)]
    assert sizes[0] == sizes[1]
    order, other = np.lexsort(np.round(centres, 6).T), np.lexsort(np.round(expected.cluster_centers_, 6).T)
    np.testing.assert_allclose(centres[order], expected.cluster_centers_[other], atol=1e-3 * bandwidth)


def test_the_majority_is_the_largest_cluster():
    """The nearest 4 of a client reach from each of the three ones to the zeros: the bandwidth is a third of that."""
    members, distances = majority_cluster(np.concatenate([np.ones((3, 3)), np.zeros((6, 3))]))
    assert members.tolist() == [False] * 3 + [True] * 6
    np.testing.assert_allclose(distances, [3] * 3 + [0] * 6, atol=1e-12)


@pytest.mark.parametrize("x", [np.repeat(np.eye(2), 3, axis=0), np.eye(3), np.zeros((4, 3))])
def test_among_equal_clusters_none_is_the_minority(x):
    members, distances = majority_cluster(x)
    assert members.all()
    assert distances.tolist() == [0] * len(x)


@pytest.mark.parametrize(("factor", "flagged"), [(0.0, True), (0.09, True), (0.11, False), (2.9, False), (3.1, True)])
def test_signguard_bounds_the_norm(factor, flagged):
    updates = np.tile(np.random.default_rng(0).normal(size=500), (9, 1))
    updates[4] *= factor
    verdict = signguard()(log_of(updates))
    if factor:  # zeros have other sign shares, too
        assert verdict.flags.tolist() == [k == 4 and flagged for k in range(9)]
        assert verdict.scores[4] == pytest.approx(np.log(factor) / np.log(3 if factor > 1 else 0.1))
    assert np.isfinite(verdict.scores).all()
    assert verdict.flags[4] == flagged
    assert (verdict.scores[4] >= 1) == flagged


@settings(deadline=None, max_examples=30)
@given(seed=seeds)
def test_signguard_scores_agree_with_its_flags(seed):
    log = random_log(seed, 12)
    verdict = signguard()(log)
    assert (verdict.scores[verdict.flags] >= 1).all()
    assert (verdict.scores[~verdict.flags] <= 1).all()


def test_signguard_draws_coordinates_of_a_large_model_anew():
    updates = np.random.default_rng(0).normal(size=(6, 20_000))
    scores = [signguard(seed=s)(log_of(updates, index=i)).scores for s, i in [(0, 0), (1, 0), (0, 1)]]
    assert len({tuple(each) for each in scores}) == 3
    assert (
        signguard(sample=1.0)(log_of(updates)).scores == signguard(sample=1.0, seed=5)(log_of(updates)).scores
    ).all()


# Settings


@pytest.mark.parametrize(
    ("builder", "given_settings", "said"),
    [
        (alignins, {"sparsity": 0}, "sparsity must be a number above 0, found 0"),
        (alignins, {"sparsity": 2}, "sparsity must be a share above 0 and at most 1, found 2"),
        (alignins, {"lambda_s": -1}, "lambda_s must be a number above 0"),
        (alignins, {"lambda_c": None}, "lambda_c must be a number above 0"),
        (rlr, {"threshold": 0}, "threshold must be a whole number of at least 1, found 0"),
        (fltrust, {"reference": {"layer0": 1}}, "reference must be a function"),
        (signguard, {"lower": 1.5}, "lower and upper must lie on both sides of 1, found 1.5 and 3.0"),
        (signguard, {"upper": 0.5}, "lower and upper must lie on both sides of 1"),
        (signguard, {"sample": 0}, "sample must be a number above 0"),
        (signguard, {"seed": -1}, "seed must be a whole number of at least 0"),
    ],
)
def test_a_setting_out_of_range_is_refused(builder, given_settings, said):
    with pytest.raises(InputError) as error:
        builder(**given_settings)
    assert str(error.value).startswith(said)


def test_detectors_are_values_and_say_what_they_are():
    assert len({alignins(), alignins(0.3), rlr(), rlr(4), fltrust(), fltrust(server), signguard()}) == 6
    assert repr(alignins()) == "alignins(sparsity=0.3, lambda_s=1.0, lambda_c=1.0)"
    assert repr(fltrust()) == "fltrust(reference=None)"
