"""What a case rests on: readings against a naive oracle, what an excluded client can change, and who is taken out."""

import numpy as np
import pytest

from gradlens import CannotSay
from gradlens.case import readings
from gradlens.case.drift import running_drift
from gradlens.case.peeling import accused, peel
from gradlens.case.readings import readings_of
from gradlens.case.shipped import reference
from gradlens.case.sums import sums_of
from gradlens.examples import example_log
from gradlens.log import Round, UpdateLog
from gradlens.log.accumulated import residuals_of

LAYER = {"weights": "fc1.weight", "biases": "fc1.bias", "final weight": "fc2.weight", "final bias": "fc2.bias"}


@pytest.fixture(scope="module")
def scoring():
    return reference().scoring


def changed(log: UpdateLog, change) -> UpdateLog:
    """The log with other updates: change(layer, updates [client, ...]) -> updates."""
    rounds = [
        Round(r.index, r.clients, r.num_examples, {n: change(n, a) for n, a in r.updates.items()}, r.global_model)
        for r in log
    ]
    return UpdateLog(log.model, rounds)


def reading(log: UpdateLog, clean: np.ndarray, name: str) -> np.ndarray:
    names, values = readings_of(sums_of(log), clean)
    return values[:, names.index(name)]


def totals(log: UpdateLog, layer: str) -> np.ndarray:
    """Every client's summed updates of a layer, float64 [client, number]."""
    return sum(r.updates[layer].reshape(len(r.clients), -1).astype(np.float64) for r in log)


@pytest.mark.parametrize("role", LAYER)
@pytest.mark.parametrize("excluded", [[], [9], [0, 4, 9]])
def test_sizes_of_totals_are_those_about_the_clean_mean(role, excluded):
    log, clean = example_log(num_malicious=0), np.ones(10, bool)
    clean[excluded] = False
    about = totals(log, LAYER[role])
    about = about - about[clean].mean(axis=0)
    squares = (about**2).sum(axis=1) / np.where(clean, 1 - 1 / clean.sum(), 1 + 1 / clean.sum())
    expected = np.log(squares / np.median(squares[clean]))
    np.testing.assert_allclose(reading(log, clean, f"size of totals, {role}"), expected, atol=1e-4)


def test_company_of_totals_is_the_mean_of_the_three_largest_cosines():
    log, clean = example_log(num_malicious=0), np.ones(10, bool)
    about = totals(log, "fc1.weight")
    about = about - about.mean(axis=0)
    unit = about / np.linalg.norm(about, axis=1, keepdims=True)
    cosines = unit @ unit.T - 2 * np.eye(10)
    expected = np.sort(cosines, axis=1)[:, -3:].mean(axis=1)
    np.testing.assert_allclose(reading(log, clean, "company of totals, weights"), expected, atol=1e-4)


@pytest.mark.parametrize("excluded", [[], [3, 8]])
def test_what_label_drift_leaves_is_the_residual_of_a_regression_on_the_clean_clients_rounds(excluded):
    log, clean = example_log(rounds=5, num_malicious=1), np.ones(10, bool)
    clean[excluded] = False
    drifts = [residuals_of(round_, "fc2.bias").clipped(0, 4).astype(np.float64) for round_ in log]
    layers = [residuals_of(round_, "fc1.weight").clipped(0, 128).astype(np.float64) for round_ in log]
    fit = np.linalg.lstsq(np.concatenate([d[clean] for d in drifts]), np.concatenate([x[clean] for x in layers]))[0]
    left = sum(layers) - sum(drifts) @ fit
    drift = sums_of(log).drift
    assert drift is not None
    unexplained = drift.unexplained("fc1.weight", sum(layers) @ sum(layers).T, clean)
    np.testing.assert_allclose(unexplained, left @ left.T, atol=1e-5 * np.abs(left @ left.T).max())


def test_many_labels_are_not_regressed_on():
    log = example_log()
    assert running_drift(log.only("fc1.weight").model, log[-1].clients) is None
    assert running_drift(log.model, np.array([f"client-{number:04}" for number in range(1025)])) is None


@pytest.mark.parametrize("kind", ["size", "company", "spectrum", "distance", "pull"])
def test_an_excluded_client_changes_nothing_that_rests_on_totals(kind):
    log, clean = example_log(num_malicious=0), np.arange(10) != 4
    other = changed(log, lambda name, a: np.where(np.arange(10).reshape(-1, *[1] * (a.ndim - 1)) == 4, -1.4 * a, a))
    name = f"{kind} of totals, weights"
    before, after = reading(log, clean, name)[clean], reading(other, clean, name)[clean]
    np.testing.assert_allclose(after, before, atol=1e-4)


def test_the_order_of_clients_changes_nothing(rng, scoring):
    log, order = example_log(num_malicious=3), rng.permutation(10)
    shuffled = UpdateLog(log.model, [round_.take(order) for round_ in log])
    one, other = peel(sums_of(log), scoring), peel(sums_of(shuffled), scoring)
    np.testing.assert_array_equal(one.order, other.order)
    np.testing.assert_allclose(one.heights, other.heights, atol=1e-5)


@pytest.mark.parametrize("malicious", [1, 2, 4])
def test_attackers_are_taken_out_first_and_put_back_in_vain(malicious, scoring):
    sums = sums_of(example_log(rounds=8, num_malicious=malicious))
    peeling = peel(sums, scoring)
    attackers = np.arange(10) >= 10 - malicious
    assert set(peeling.order[:malicious]) == set(np.flatnonzero(attackers))
    innocent = scoring.scores(sums, ~attackers)[~attackers].max()
    np.testing.assert_array_equal(accused(sums, scoring, peeling, innocent), attackers)


def test_nobody_is_accused_where_no_height_is_above_the_threshold(scoring):
    sums = sums_of(example_log())
    peeling = peel(sums, scoring)
    assert not accused(sums, scoring, peeling, peeling.highest).any()


def test_a_score_is_the_sum_of_what_its_readings_add(scoring):
    sums, clean = sums_of(example_log()), np.arange(10) < 9
    parts = scoring.parts(sums, clean)
    assert parts.shape == (10, len(scoring.readings))
    np.testing.assert_allclose(parts.sum(axis=1) + scoring.intercept, scoring.scores(sums, clean))


def test_a_client_that_is_never_comparable_is_not_among_the_clients(rng):
    log = changed(
        example_log(), lambda name, a: np.where(np.arange(10).reshape(-1, *[1] * (a.ndim - 1)) == 2, np.nan, a)
    )
    sums = sums_of(log)
    assert "client-2" not in sums.clients.tolist()
    assert all(np.isfinite(gram).all() for gram in (*sums.of_rounds.values(), *sums.totals.values()))


def test_who_takes_part_seldom_is_summed_by_its_own_rounds():
    log = example_log(rounds=4, num_malicious=0)
    rounds = [round_ if i % 2 else round_.take(np.arange(9)) for i, round_ in enumerate(log)]
    sums = sums_of(UpdateLog(log.model, rounds))
    assert sums.rounds.tolist() == [4] * 9 + [2]
    assert np.isnan(sums.log_norms["weights"][::2, 9]).all()


def test_nothing_to_sum_up_is_said():
    with pytest.raises(CannotSay, match="no client has a comparable update"):
        sums_of(example_log()[:0])


def test_a_model_without_biases_is_scored_by_the_readings_that_it_has(scoring):
    bare = sums_of(example_log().only("fc1.weight", "fc2.weight"))
    assert np.isfinite(scoring.scores(bare, np.ones(10, bool))).all()
    biases = [place for place, name in enumerate(scoring.readings) if "bias" in name]
    assert not scoring.parts(bare, np.ones(10, bool))[:, biases].any()


def test_the_leading_direction_of_many_clients_is_that_of_all_eigenvectors(rng):
    vectors = rng.normal(size=(150, 40)) + 3 * rng.normal(size=(150, 1))
    products = vectors @ vectors.T
    value, direction = readings._leading(products)
    values, all_directions = np.linalg.eigh(products)
    assert value == pytest.approx(values[-1])
    assert abs(direction @ all_directions[:, -1]) == pytest.approx(1)


def test_of_many_clients_several_are_taken_out_at_a_time_and_attackers_still_first(scoring):
    sums = sums_of(example_log(num_clients=180, num_malicious=6))
    peeling = peel(sums, scoring)
    assert len(peeling.order) == len(set(peeling.order.tolist())) == 81
    assert set(sums.clients[peeling.order[:6]]) == {f"client-{number}" for number in range(174, 180)}
    assert (np.diff(peeling.heights[:3]) <= 0).all()  # of those that go together the most conspicuous first
    few = peel(sums, scoring, 0.0)
    assert (few.order.tolist(), few.highest) == ([peeling.order[0]], peeling.heights[0])
