"""The panel: what it looks at, what it learns from a null, and that its score is what its evidence says."""

from dataclasses import replace

import numpy as np
import pytest
from scipy import stats
from sklearn.covariance import ledoit_wolf

import planted
from gradlens.detectors import calibrate
from gradlens.detectors.panels import PARTS, Fit, Observed, Panel, Reference, panel
from gradlens.detectors.reference import _ledoit_wolf
from gradlens.errors import InputError
from gradlens.log import Round, UpdateLog
from gradlens.ranks import rank_threshold
from gradlens.scorers import robustly_scaled
from gradlens.statistics import layer_cosines, layer_norms

NULLS = [planted.clean_log(rounds=4, seed=seed) for seed in range(1, 13)]


@pytest.fixture(scope="module")
def fitted() -> Panel:
    return panel().fitted(NULLS)[0]


def watched(rng: np.random.Generator, rows: int = 400, features: int = 4, own: float = 0.1) -> np.ndarray:
    """Rows of correlated features: all of them are one number and a little of their own."""
    return rng.normal(size=(rows, 1)) + own * rng.normal(size=(rows, features))


def test_every_part_has_a_column_for_every_layer():
    names, values = panel().seen(planted.clean_log())
    assert names == tuple(f"{part}: {layer}" for part in PARTS for layer in planted.LAYERS)
    assert values.shape == (12, len(PARTS) * len(planted.LAYERS))
    np.testing.assert_allclose(np.median(values, axis=0), 0, atol=1e-12)


def test_parts_of_one_round_are_averaged_over_a_clients_rounds():
    """By hand: each round's numbers in robust sigmas, at most 20, their mean, minus the cohort's median of those."""
    log = planted.PLANTED["boosted"].log(rounds=3)
    rounds = [np.log(layer_norms(prefix).to_numpy()) for prefix in log.prefixes()]
    mean = np.mean([np.clip(robustly_scaled(x), -20, 20) for x in rounds], axis=0)
    names, values = panel().seen(log)
    columns = [names.index(f"size: {layer}") for layer in planted.LAYERS]
    np.testing.assert_allclose(values[:, columns], mean - np.median(mean, axis=0), rtol=1e-9)


def test_a_client_is_averaged_over_the_rounds_it_took_part_in():
    log = planted.clean_log(rounds=3)
    present = [np.arange(12), np.arange(8), np.arange(12)]
    part = UpdateLog(log.model, [r.take(rows) for r, rows in zip(log, present, strict=True)])
    tables = [layer_cosines(prefix) for prefix in part.prefixes()]
    z = [robustly_scaled(table.to_numpy()) for table in tables]
    expected = np.stack([(z[0] + z[2])[row] / 2 for row in range(8, 12)])
    names, values = panel().seen(part)
    column = names.index("direction: fc1.weight")
    found = values[8:, column] - values[8, column]
    np.testing.assert_allclose(found, expected[:, 0] - expected[0, 0], rtol=1e-9)


def test_in_the_first_round_nothing_has_added_up():
    names, values = panel().seen(planted.PLANTED["boosted"].log()[:1])
    late = [i for i, name in enumerate(names) if name.startswith(("accumulated", "persistence"))]
    assert not values[:, late].any()
    assert values[:, 0].any()


def thirds(rows: np.ndarray) -> np.ndarray:
    return np.arange(len(rows)) % 3


def test_fit_against_a_naive_mahalanobis_distance(rng):
    """With many rows the shrinkage fades: scale, arcsinh, mean, inverse covariance and the parts written out."""
    rows, directions = watched(rng, 20_000), np.array([[1, 0], [1, 0], [0, -1], [0, -1]]) / 2
    fit = Fit.of(rows, thirds(rows), directions)
    low, high = np.quantile(rows, [0.01, 0.99], axis=0)
    scale = np.sqrt(np.mean(np.clip(rows, low, high) ** 2, axis=0))
    drawn = np.arcsinh(rows / scale)
    precision = np.linalg.inv(np.cov(drawn.T, ddof=0))
    z = drawn - drawn.mean(axis=0)
    together = np.sqrt([row @ precision @ row / len(row) for row in z])
    expected = np.stack([together, (z[:, 0] + z[:, 1]) / 2, -(z[:, 2] + z[:, 3]) / 2], axis=1)
    np.testing.assert_allclose(fit.raw(rows), expected, rtol=0.05, atol=0.05)


def test_a_reading_is_as_far_out_as_the_share_of_benign_rows_beyond_it(rng):
    """On a null of a known distribution: what lies at its p-th quantile reads as a normal variable's."""
    parts, size = np.eye(4)[:, :2], 40_000
    rows = np.column_stack([rng.exponential(size=size), *rng.normal(size=(3, size))])
    fit = Fit.of(rows, thirds(rows), parts)
    levels = np.array([0.1, 0.5, 0.9, 0.99, 0.999])
    asked = np.zeros((5, 4))
    asked[:, 0], asked[:, 1] = stats.expon.ppf(levels), stats.norm.ppf(levels)
    off = fit.readings(asked)[:, 1:] - stats.norm.ppf(levels)[:, None]
    np.testing.assert_allclose(off[:4], 0, atol=0.12)
    np.testing.assert_allclose(off[4], 0, atol=0.35)  # the tail of a normal falls faster than exponentially
    high = np.zeros((3, 4))
    high[:, 0] = [10, 20, 1e6]  # beyond all of the null they still differ
    assert np.all(np.diff(fit.readings(high)[:, 1]) > 0)
    assert np.isfinite(fit.readings(high)).all()


def test_its_own_rows_are_read_out_of_sample(rng):
    """Few rows of many features lie far inside the fit to themselves; new ones must not read as far out."""
    rows, fresh = rng.normal(size=(60, 20)), rng.normal(size=(4_000, 20))
    fit = Fit.of(rows, thirds(rows), np.zeros((20, 0)))
    assert abs(fit.readings(fresh).mean()) < 0.5
    inside = replace(fit, null=np.sort(fit.raw(rows), axis=0))
    assert inside.readings(fresh).mean() > fit.readings(fresh).mean() + 0.4
    with pytest.raises(InputError, match="at least two folds"):
        Fit.of(rows, np.zeros(60, int), np.zeros((20, 0)))


def test_the_covariance_is_to_the_last_bit_that_of_scikit_learn(rng):
    for rows, features in [(2, 3), (40, 44), (400, 12)]:
        numbers = watched(rng, rows, features) * rng.exponential(size=features)
        numbers[:, 0] = 1.0  # a feature in which nobody differs
        np.testing.assert_array_equal(_ledoit_wolf(numbers), ledoit_wolf(numbers)[0])
    np.testing.assert_array_equal(_ledoit_wolf(np.zeros((9, 3))), np.zeros((3, 3)))


def test_where_the_null_is_constant_the_same_reads_as_usual():
    rows = np.zeros((40, 4))
    fit = Fit.of(rows, thirds(rows), np.eye(4))
    np.testing.assert_allclose(fit.readings(rows), 0, atol=1e-9)
    assert fit.readings(np.ones((1, 4))).min() > 3


def test_what_breaks_the_pattern_is_farther_out_than_what_is_large(rng):
    """Every feature of the second client is usual; together they are not."""
    rows = watched(rng)
    fit = Fit.of(rows, thirds(rows), np.zeros((4, 0)))
    large, odd = np.full((1, 4), 2.5), np.array([[1.0, -1.0, 1.0, -1.0]])
    together = fit.readings(np.concatenate([large, odd]))[:, 0]
    assert together[1] > 2 * together[0]


def test_a_part_is_heard_in_its_suspicious_direction_and_in_the_feature_weights_only():
    log = planted.clean_log()
    assert panel().observed(log).heard == (True, False, False, False)  # fc1.weight
    parts = panel().directions((True, False, True, False))
    names = [name for name, part in PARTS.items() if part.suspicious]
    assert panel().readings == ["together", *names]
    assert parts.shape == (len(PARTS) * 4, len(names))
    column = parts[:, names.index("direction")].reshape(len(PARTS), 4)
    np.testing.assert_array_equal(column[list(PARTS).index("direction")], [-0.5, 0, -0.5, 0])
    assert np.count_nonzero(column) == 2
    assert not parts.reshape(len(PARTS), 4, -1)[list(PARTS).index("persistence")].any()
    turned = panel()(planted.PLANTED["turned"].log()).evidence
    assert turned is not None
    assert turned["direction"].idxmax() == planted.CULPRIT
    assert len(turned.columns) == 1 + len(names) + len(panel().seen(log)[0])


def test_the_score_is_the_largest_reading(fitted):
    verdict = fitted(planted.PLANTED["boosted"].log())
    assert verdict.evidence is not None
    readings = verdict.evidence[fitted.readings]
    np.testing.assert_allclose(readings.max(axis=1), verdict.scores, rtol=1e-12)
    assert readings.max(axis=1).idxmax() == planted.CULPRIT


@pytest.mark.parametrize("case", ["boosted", "turned", "shifted class", "drifting", "equal pair"])
def test_fitted_it_ranks_every_planted_case_first(fitted, case):
    found = planted.PLANTED[case]
    verdict = fitted(found.log(rounds=4, seed=50))
    guilty = np.isin(verdict.clients, found.culprits)
    assert verdict.scores[guilty].min() > verdict.scores[~guilty].max()


def test_calibrated_on_attack_free_logs_its_rate_holds_on_others():
    detector = calibrate(panel(), NULLS, fpr=0.1)
    fresh = [planted.clean_log(rounds=4, seed=seed) for seed in range(100, 120)]
    flags = np.concatenate([detector(prefix).flags for log in fresh for prefix in log.prefixes()])
    assert 0.03 < flags.mean() < 0.2  # of 960 that are not independent
    assert "attack-free: 12 runs" in detector(fresh[0]).null


def test_null_scores_are_out_of_sample(rng):
    """Each of two logs is scored by the other one, which reads itself by fifths of its clients, as a log alone does."""
    rows = [watched(rng, 30, 8) for _ in "ab"]
    clients = np.arange(30).astype(str)
    seen = [Observed(np.zeros(30, int), clients, tuple("abcdefgh"), values, (True,)) for values in rows]
    parts, fifths = np.eye(8)[:, :2], np.unique(clients, return_inverse=True)[1] % 5
    expected = [Fit.of(rows[1 - k], fifths, parts).readings(rows[k]).max(axis=1) for k in range(2)]
    np.testing.assert_allclose(Reference.of(seen, parts).scores_out_of_sample(), np.concatenate(expected), rtol=1e-9)
    alone = Reference.of(seen[:1], parts)
    fifth = alone.fold == 3
    expected = Fit.of(rows[0][~fifth], alone.fold[~fifth], parts).readings(rows[0][fifth]).max(axis=1)
    np.testing.assert_allclose(alone.scores_out_of_sample()[fifth], expected, rtol=1e-9)


@pytest.mark.parametrize("logs", [1, 2, 3, 6])
def test_scores_of_a_null_are_like_those_of_others_however_few_its_logs(rng, logs):
    """At 10 %: read in-sample, two logs would set a threshold that one client of a thousand passes."""
    names, clients, passed = tuple("abcdefghij"), np.repeat(np.arange(20), 6), []

    def rows() -> np.ndarray:
        """Of 20 clients that hardly change in six rounds."""
        values = np.repeat(watched(rng, 20, 10, own=1), 6, axis=0) + 0.01 * rng.normal(size=(120, 10))
        return values - np.median(values, axis=0)

    for _ in range(60):
        seen = [Observed(np.tile(np.arange(6), 20), clients.astype(str), names, rows(), (True,)) for _ in range(logs)]
        reference = Reference.of(seen, np.eye(10)[:, :3])
        threshold = rank_threshold(reference.scores_out_of_sample(), reference.units, 0.1)
        fresh = np.concatenate([rows() for _ in range(5)])
        passed.append((reference.at(3, names).readings(fresh).max(axis=1) > threshold).mean())
    assert 0.02 < np.mean(passed) < 0.13


def test_late_rounds_of_a_single_long_log_are_read_out_of_sample(rng):
    """Three logs, of which only one is long: the fit of a late round rests on that log, by its clients."""
    parts, names, clients = np.zeros((8, 0)), tuple("abcdefgh"), np.arange(40).astype(str)
    rows = rng.normal(size=(4, 40, 8))
    seen = [Observed(np.full(40, p), clients, names, rows[k], (True,)) for k, p in ((0, 0), (1, 0))]
    both = np.concatenate([np.zeros(40, int), np.full(40, 9)])
    seen.append(Observed(both, np.tile(clients, 2), names, rows[2:].reshape(80, 8), (True,)))
    late = Reference.of(seen, parts).at(9, names)
    expected = Fit.of(rows[3], np.unique(clients, return_inverse=True)[1] % 5, parts)
    fresh = rng.normal(size=(100, 8))
    np.testing.assert_allclose(late.readings(fresh), expected.readings(fresh), rtol=1e-9)


def test_later_than_its_null_it_says_which_rounds_it_is_compared_with():
    fitted, _ = panel().fitted([planted.clean_log(rounds=3, seed=seed) for seed in (1, 2)])
    detector = calibrate(panel(), [planted.clean_log(rounds=3, seed=seed) for seed in (1, 2)], fpr=0.1)
    log = planted.clean_log(rounds=5)
    null = "attack-free: 2 runs, 24 clients, 72 scores, fpr 0.1"
    remarks = ["", "; its last round is compared with rounds 0 to 2 of the null"]
    remarks.append("; its last 2 rounds are compared with rounds 0 to 2 of the null")
    assert [detector(log[:stop]).null for stop in (3, 4, 5)] == [null + remark for remark in remarks]
    assert [fitted(log[:stop]).null for stop in (3, 5)] == [
        "uncalibrated: fitted to a null" + remarks[k] for k in (0, 2)
    ]
    many = [planted.clean_log(rounds=2, seed=seed) for seed in range(1, 21)]  # five rows a feature in a round
    assert "its last 3 rounds are compared with round 1 of the null" in calibrate(panel(), many, fpr=0.1)(log).null


def test_one_declared_stretch_is_a_null_of_its_own():
    log = planted.PLANTED["boosted"].log(rounds=8)
    clean = planted.clean_log(rounds=8)
    both = UpdateLog(log.model, [*clean[:5], *log[5:]])
    detector = calibrate(panel(), both[:5], fpr=0.1)
    verdict = detector(both)
    assert verdict.scores.argmax() == list(verdict.clients).index(planted.CULPRIT)
    assert "declared clean: rounds 0 to 4, 12 clients" in verdict.null
    assert "its last 3 rounds are compared with rounds" in verdict.null


def test_rows_of_rounds_as_late_are_its_reference(rng):
    """Early rows are small and late ones large: each round is compared with its own kind."""
    early, late = watched(rng, 100), 10 * watched(rng, 100)
    positions = np.repeat([0, 9], 100)
    clients = np.tile(np.arange(100).astype(str), 2)
    seen = Observed(positions, clients, tuple("abcd"), np.concatenate([early, late]), (True,))
    reference = Reference.of([seen, seen], np.zeros((4, 0)))
    one = np.full((1, 4), 10.0)
    distances = [reference.at(p, seen.features).readings(one).max() for p in (0, 2, 8, 20)]
    assert distances[0] == distances[1] > 2 * abs(distances[2])
    assert distances[2] == distances[3]


def test_a_null_of_another_model_is_refused(fitted):
    state = {"w.weight": np.zeros((3, 4), np.float32), "w.bias": np.zeros(3, np.float32)}
    rng = np.random.default_rng(0)
    rows = {name: rng.normal(size=(6, *a.shape)).astype(np.float32) for name, a in state.items()}
    other = planted.log_of(rows, state)
    with pytest.raises(InputError, match="another model"):
        fitted(other)
    with pytest.raises(InputError, match="one model"):
        panel().fitted([NULLS[0], other])


def test_a_null_without_enough_to_leave_out_is_refused():
    seen = Observed(np.zeros(4, int), np.array(["a"] * 4), ("x",), np.ones((4, 1)), (True,))
    with pytest.raises(InputError, match="two logs, or two clients"):
        Reference.of([seen], np.zeros((1, 0))).scores_out_of_sample()
    with pytest.raises(InputError, match="two clients in each log, found a log of one"):
        Reference.of([seen, seen], np.zeros((1, 0))).scores_out_of_sample()
    with pytest.raises(InputError, match="at least one log"):
        panel().fitted([])
    with pytest.raises(InputError, match="comparable clients, found none"):
        panel().fitted([planted.clean_log(clients=planted.CLIENTS[:2])])


def test_scores_of_what_was_seen_are_those_of_the_verdicts(fitted):
    log = planted.PLANTED["turned"].log()
    for watcher in (fitted, panel()):
        assert isinstance(watcher, Panel)
        expected = np.concatenate([watcher(prefix).scores for prefix in log.prefixes()])
        np.testing.assert_allclose(watcher.scores(watcher.observed(log)), expected, rtol=1e-9)


def test_a_model_of_many_layers_is_seen_in_groups():
    shapes = {f"layer{i:02d}.{kind}": shape for i in range(10) for kind, shape in (("weight", (2, 2)), ("bias", (2,)))}
    shapes |= {"out.weight": (3, 2), "out.bias": (3,)}
    state = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    rng = np.random.default_rng(0)
    rows = {name: rng.normal(size=(5, *a.shape)).astype(np.float32) for name, a in state.items()}
    log = planted.log_of(rows, state)
    names, values = panel().seen(log)
    assert values.shape[1] == len(names) == len(PARTS) * 8
    weights = ["layer00.weight to layer02.weight", "layer03.weight to layer05.weight"]
    weights += ["layer06.weight to layer07.weight", "layer08.weight to layer09.weight"]
    biases = ["layer00.bias to layer04.bias", "layer05.bias to layer09.bias"]
    assert names[:8] == tuple(f"size: {each}" for each in [*weights, *biases, "out.weight", "out.bias"])
    assert panel().observed(log).heard == (True,) * 4 + (False,) * 4
    single = np.log(layer_norms(log).to_numpy())
    z = robustly_scaled(single)
    centred = z - np.median(z, axis=0)
    np.testing.assert_allclose(values[:, 0], centred[:, [0, 2, 4]].mean(axis=1), rtol=1e-9)


def test_of_a_model_of_one_layer_all_is_heard():
    state = {"weight": np.zeros((3, 4), np.float32), "bias": np.zeros(3, np.float32)}
    rows = {name: np.ones((5, *a.shape), np.float32) for name, a in state.items()}
    assert panel().observed(planted.log_of(rows, state)).heard == (True, True)


def test_uncalibrated_it_rests_on_the_cohort_and_says_so():
    verdict = panel()(planted.clean_log())
    assert verdict.null == "uncalibrated: each cohort itself"
    assert not verdict.abstained


def test_an_absurd_round_of_the_past_changes_nobody_else(fitted):
    """A client that sends NaN once is looked at again when it answers in order."""
    log = planted.clean_log(rounds=5)
    rounds = [planted.with_client_at(log, np.nan)[k] if k == 2 else log[k] for k in range(5)]
    verdict = fitted(UpdateLog(log.model, rounds))
    assert np.isfinite(verdict.scores).all()


def test_refused_clients_stay_flagged_when_it_is_calibrated(fitted):
    log = planted.clean_log()
    last: Round = replace(log[-1], refused={"z": "no"})
    verdict = calibrate(fitted, None)(UpdateLog(log.model, [*log[:3], last]))
    assert verdict.clients[-1] == "z"
    assert verdict.flags[-1]
