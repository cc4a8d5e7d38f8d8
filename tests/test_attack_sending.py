"""Attacks on what is sent: golden values by hand, and each formula against a slow one over all parameters."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from simulations.attacks import build_attack
from simulations.attacks.boosting import (
    explicit_boosting,
    layer_substitution,
    model_replacement,
    norm_cap,
    scaling,
    train_and_scale,
)
from simulations.attacks.perturbation import min_max, min_sum
from simulations.attacks.sending import (
    a_little_is_enough,
    copies,
    gaussian,
    inner_product,
    mimic,
    sign_flip,
    supported,
    zero,
)
from test_attacks import PARAMETERS, STATE, send, updates_of

TRAINED, OTHERS = updates_of(2, seed=0), updates_of(3, seed=1)


def flat(updates) -> np.ndarray:
    """All parameters of each client as one row, float64 [client, number]."""
    rows = [np.asarray(updates[name], np.float64).reshape(len(updates["fc2.bias"]), -1) for name in PARAMETERS]
    return np.concatenate(rows, axis=1)


def rows_of(vectors, like=None) -> dict[str, np.ndarray]:
    """The inverse: updates of the small model from a row of 23 parameters each, buffers 0."""
    vectors = np.asarray(vectors, np.float64)
    made, start = {}, 0
    for name, array in STATE.items():
        if name in PARAMETERS:
            made[name] = vectors[:, start : start + array.size].reshape(-1, *array.shape).astype(np.float32)
            start += array.size
        else:
            made[name] = np.zeros((len(vectors), *array.shape), array.dtype)
    assert start == vectors.shape[1]
    return made


def test_scaling_multiplies_what_is_sent_and_leaves_counters():
    sent = send(scaling(factor=3.0), TRAINED, OTHERS)
    for name in ("fc1.weight", "fc2.bias", "norm.mean"):
        np.testing.assert_array_equal(sent[name], np.float32(3) * TRAINED[name])
    np.testing.assert_array_equal(sent["norm.count"], TRAINED["norm.count"])


def test_scaling_by_n_over_eta_replaces_the_global_model():
    """Bagdasaryan et al. 2018, eq. (3): with the others at rest the next global model is the attacker's local one."""
    num_clients, server_learning_rate = 8, 0.5
    updates = np.zeros((num_clients, 23))
    sent = send(scaling(factor=num_clients / server_learning_rate), updates_of(1, seed=3), {})
    updates[2] = flat(sent)[0]
    moved = server_learning_rate * updates.mean(axis=0)
    np.testing.assert_allclose(moved, flat(updates_of(1, seed=3))[0], rtol=1e-6)


@pytest.mark.parametrize("attackers", [1, 3])
def test_model_replacement_knows_the_factor(attackers):
    trained = updates_of(attackers, seed=3)
    sent = send(model_replacement(), trained, OTHERS, num_updates=10, server_learning_rate=0.5)
    moved = 0.5 * flat(sent).sum(axis=0) / 10
    np.testing.assert_allclose(moved, flat(trained).mean(axis=0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(sent["norm.mean"], 20 / attackers * trained["norm.mean"], rtol=1e-6)
    np.testing.assert_array_equal(sent["norm.count"], trained["norm.count"])


def test_model_replacement_with_a_factor_is_scaling():
    sent, expected = (
        send(model_replacement(factor=100.0), TRAINED, OTHERS),
        send(scaling(factor=100.0), TRAINED, OTHERS),
    )
    for name in sent:
        np.testing.assert_array_equal(sent[name], expected[name])


def test_explicit_boosting_adds_the_honest_update():
    """ClientExplicitBoosting of Sun et al. 2019: benign + beta x malicious, beta the clients per round."""
    honest = updates_of(2, seed=9)
    sent = send(explicit_boosting(), TRAINED, OTHERS, num_updates=30, honest=lambda: honest)
    np.testing.assert_allclose(flat(sent), flat(honest) + 30 * flat(TRAINED), rtol=1e-6, atol=1e-5)
    np.testing.assert_array_equal(sent["norm.mean"], TRAINED["norm.mean"])
    sent = send(explicit_boosting(factor=4.0), TRAINED, OTHERS, honest=lambda: honest)
    np.testing.assert_allclose(flat(sent), flat(honest) + 4 * flat(TRAINED), rtol=1e-6, atol=1e-5)


def test_train_and_scale_reaches_its_bound():
    np.testing.assert_allclose(np.linalg.norm(flat(send(train_and_scale(bound=2.5), TRAINED, {})), axis=1), 2.5)
    sent, norms = send(train_and_scale(), TRAINED, OTHERS), np.linalg.norm(flat(OTHERS), axis=1)
    np.testing.assert_allclose(np.linalg.norm(flat(sent), axis=1), np.median(norms), rtol=1e-6)
    cosines = np.sum(flat(sent) * flat(TRAINED), axis=1) / np.median(norms) / np.linalg.norm(flat(TRAINED), axis=1)
    np.testing.assert_allclose(cosines, 1, rtol=1e-6)


def test_an_update_of_zeros_cannot_be_scaled_to_a_norm():
    np.testing.assert_array_equal(flat(send(train_and_scale(bound=1.0), rows_of(np.zeros((2, 23))), {})), 0)


def test_train_and_scale_makes_up_for_a_norm_bound():
    attack = build_attack({"train_and_scale": {"bound": 1.0}, "scaling": {"factor": 10.0}})
    np.testing.assert_allclose(np.linalg.norm(flat(send(attack, TRAINED, OTHERS)), axis=1), 10, rtol=1e-6)


@pytest.mark.parametrize(("quantile", "cap"), [(0.0, 1.0), (0.5, 2.0), (0.75, 3.0), (1.0, 4.0)])
def test_a_norm_cap_is_a_quantile_of_the_attackers_honest_norms(quantile, cap):
    axis = np.eye(23)[5]
    honest = rows_of(np.outer([4.0, 1.0, 2.0], axis))  # norms 1, 2 and 4
    trained = rows_of(np.outer([10.0, 0.5, -3.5], axis))
    sent = flat(send(norm_cap(quantile=quantile), trained, OTHERS, honest=lambda: honest))
    np.testing.assert_allclose(sent, np.outer([cap, 0.5, -min(cap, 3.5)], axis), rtol=1e-6)


@pytest.mark.parametrize(
    "boost",
    [
        {"scaling": {"factor": 50.0}},
        {"model_replacement": {}},
        {"explicit_boosting": {}},
        {"gaussian": {}},
        {"copies": {}},
    ],
)
def test_no_boost_gets_past_a_norm_cap(boost):
    attack = build_attack({"norm_cap": {"quantile": 1.0}, **boost})
    longest = np.linalg.norm(flat(updates_of(2, seed=9)), axis=1).max()
    sent = send(attack, TRAINED, OTHERS, honest=lambda: updates_of(2, seed=9))
    assert (np.linalg.norm(flat(sent), axis=1) <= longest * (1 + 1e-6)).all()


def test_a_norm_cap_rests_on_finite_honest_updates():
    honest = rows_of([np.eye(23)[0], np.full(23, np.inf)])
    sent = flat(send(norm_cap(quantile=1.0), rows_of(np.full((2, 23), 3.0)), OTHERS, honest=lambda: honest))
    np.testing.assert_allclose(np.linalg.norm(sent, axis=1), 1, rtol=1e-6)
    broken = rows_of(np.full((2, 23), np.nan))
    np.testing.assert_array_equal(flat(send(norm_cap(), TRAINED, OTHERS, honest=lambda: broken)), flat(TRAINED))


def test_simple_ones():
    np.testing.assert_array_equal(flat(send(sign_flip(), TRAINED, OTHERS)), -flat(TRAINED))
    np.testing.assert_array_equal(flat(send(sign_flip(factor=4.0), TRAINED, OTHERS)), -4 * flat(TRAINED))
    np.testing.assert_array_equal(flat(send(zero(), TRAINED, OTHERS)), 0)
    np.testing.assert_allclose(flat(send(inner_product(epsilon=0.5), TRAINED, OTHERS)),
                               np.tile(-0.5 * flat(OTHERS).mean(axis=0), (2, 1)), rtol=1e-6)  # fmt: skip
    for client, row in ((0, 0), (2, 2), (5, 2)):
        np.testing.assert_array_equal(flat(send(mimic(client=client), TRAINED, OTHERS)), flat(OTHERS)[[row, row]])
    mean = flat(TRAINED).mean(axis=0)
    np.testing.assert_allclose(flat(send(copies(), TRAINED, OTHERS)), [mean, mean], rtol=1e-6, atol=1e-7)


def test_gaussian_noise_has_its_spread_and_differs_between_attackers():
    many = {name: np.repeat(update, 500, axis=0) for name, update in TRAINED.items()}
    noise = flat(send(gaussian(std=0.2), many, {}))
    assert abs(noise.std() - 0.2) < 0.004  # 23,000 draws: standard error 0.001
    assert abs(noise.mean()) < 0.006
    assert len(np.unique(noise, axis=0)) == len(noise)
    np.testing.assert_array_equal(flat(send(gaussian(std=0.0), TRAINED, {})), 0)


def test_copies_come_last_and_hide_what_each_would_have_sent():
    sent = flat(send(build_attack({"copies": {}, "gaussian": {}}), TRAINED, OTHERS))
    np.testing.assert_array_equal(sent[0], sent[1])
    assert np.abs(sent).min() > 0


def test_without_others_the_round_goes_on_with_what_was_trained():
    for attack in (a_little_is_enough(), inner_product(), min_max(), min_sum(), mimic(), train_and_scale()):
        for others in ({}, updates_of(0, seed=0)):
            np.testing.assert_array_equal(flat(send(attack, TRAINED, others)), flat(TRAINED))


@pytest.mark.parametrize(
    ("num_updates", "attackers", "z"),
    [
        (50, 24, 1.4261),  # s = 2, normal quantile of 24 / 26
        (20, 4, 0.1573),  # s = 7, of 9 / 16
        (10, 1, 0.0),  # s = 5, of 4 / 9, which lies below 0
        (2, 1, 0.0),
        (10, 8, 0.0),  # s at least 1, of 1 / 2
        (100, 60, 1.9600),  # s at least 1, of 39 / 40
        (3, 3, 0.0),
    ],
)
def test_the_z_of_a_little_is_enough(num_updates, attackers, z):
    assert supported(num_updates, attackers) == pytest.approx(z, abs=1e-4)


def test_a_little_is_enough_by_hand():
    others = rows_of(np.outer([1.0, 2.0, 6.0], np.ones(23)))  # mean 3, standard deviation sqrt(14 / 3)
    sent = flat(send(a_little_is_enough(z=1.5), TRAINED, others))
    np.testing.assert_allclose(sent, 3 - 1.5 * np.sqrt(14 / 3), rtol=1e-6)
    crowd, few = updates_of(26, seed=4), updates_of(24, seed=5)
    sent = flat(send(a_little_is_enough(), few, crowd))
    expected = flat(crowd).mean(axis=0) - 1.4261 * flat(crowd).std(axis=0)
    np.testing.assert_allclose(sent, np.tile(expected, (24, 1)), atol=1e-4)


def direction_of(vectors, direction):
    mean = vectors.mean(axis=0)
    if direction == "std":
        return -vectors.std(axis=0)
    return -np.sign(mean) if direction == "sign" else -mean / np.linalg.norm(mean)


def halved(vectors, direction, rule):
    """The slow way: the largest gamma by doubling and halving, over all parameters in float64."""
    mean, turned = vectors.mean(axis=0), direction_of(vectors, direction)
    squares = np.square(vectors[:, None] - vectors[None, :]).sum(axis=2)
    bound = squares.max() if rule == "max" else squares.sum(axis=1).max()

    def fits(gamma):
        to_others = np.square(mean + gamma * turned - vectors).sum(axis=1)
        return (to_others.max() if rule == "max" else to_others.sum()) <= bound

    low, high = 0.0, 1.0
    while fits(high):
        low, high = high, 2 * high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return mean + low * turned


@given(seed=st.integers(0, 2**32), clients=st.integers(2, 7), spread=st.sampled_from([0.05, 1.0]))
@pytest.mark.parametrize("direction", ["std", "unit", "sign"])
@pytest.mark.parametrize(("attack", "rule"), [(min_max, "max"), (min_sum, "sum")])
def test_min_max_and_min_sum_against_halving(attack, rule, direction, seed, clients, spread):
    rng = np.random.default_rng(seed)
    others = rows_of(rng.normal(size=23) + spread * rng.normal(size=(clients, 23)))
    sent = flat(send(attack(direction=direction), TRAINED, others))
    np.testing.assert_array_equal(sent[0], sent[1])
    expected = halved(flat(others), direction, rule)
    np.testing.assert_allclose(sent[0], expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


def test_min_max_by_hand():
    """Two others at +-1 of one number: spread 1, they lie 2 apart, so that the mean can move by 1."""
    others = rows_of(np.outer([1.0, -1.0], np.eye(23)[0]))
    sent = flat(send(min_max(), TRAINED, others))
    np.testing.assert_allclose(sent, np.tile(-np.eye(23)[0], (2, 1)), atol=1e-6)
    # min_sum: both are 4 from the other in squares; (1 + g)^2 + (1 - g)^2 = 4 at g = 1
    np.testing.assert_allclose(flat(send(min_sum(), TRAINED, others)), np.tile(-np.eye(23)[0], (2, 1)), atol=1e-6)


@pytest.mark.parametrize("attack", [min_max, min_sum])
@pytest.mark.parametrize("direction", ["std", "unit", "sign"])
def test_others_that_agree_leave_no_room(attack, direction):
    same = rows_of(np.ones((3, 23)))
    np.testing.assert_allclose(flat(send(attack(direction=direction), TRAINED, same)), 1, rtol=1e-6)
    np.testing.assert_array_equal(flat(send(attack(direction=direction), TRAINED, rows_of(np.zeros((3, 23))))), 0)


# fc2.weight carries .5 of success, fc1.weight .3, fc2.bias .2; the others nothing
SHARES = {"fc2.weight": 0.5, "fc1.weight": 0.3, "fc2.bias": 0.2}


def success(update):
    return sum(share for name, share in SHARES.items() if (update[name] == 1).all())


@pytest.mark.parametrize(
    ("tau", "kept"),
    [
        (0.0, ["fc2.weight"]),
        (0.4, ["fc2.weight"]),
        (0.8, ["fc2.weight", "fc1.weight"]),
        (1.0, ["fc2.weight", "fc1.weight", "fc2.bias"]),
    ],
)
def test_only_critical_layers_keep_the_malicious_update(tau, kept):
    trained, honest = rows_of(np.ones((2, 23))), rows_of(np.full((2, 23), 0.1))
    honest["norm.mean"] += 4
    sent = send(layer_substitution(tau=tau), trained, OTHERS, honest=lambda: honest, success=success)
    for name in STATE:
        np.testing.assert_array_equal(sent[name], (trained if name in kept else honest)[name], err_msg=name)


def test_each_attacker_finds_its_own_critical_layers():
    trained, honest = rows_of(np.outer([1.0, 2.0], np.ones(23))), rows_of(np.zeros((2, 23)))
    trained["fc2.weight"][1] = 1  # the second carries success in that layer alone
    sent = send(layer_substitution(), trained, OTHERS, honest=lambda: honest, success=success)
    np.testing.assert_array_equal(sent["fc2.weight"], 1)
    np.testing.assert_array_equal(sent["fc1.weight"], trained["fc1.weight"] * [[[1]], [[0]]])


@pytest.mark.parametrize("everywhere", [0.0, 1.0, float("nan")])
def test_at_least_one_layer_is_substituted(everywhere):
    """Where no layer matters more than another, the first: the malicious update fails, or the honest one succeeds."""
    honest = updates_of(2, seed=6)
    sent = send(layer_substitution(), TRAINED, OTHERS, honest=lambda: honest, success=lambda update: everywhere)
    for name in STATE:
        np.testing.assert_array_equal(sent[name], (TRAINED if name == "fc1.weight" else honest)[name], err_msg=name)


def test_the_layer_substituted_is_one_that_differs():
    trained, honest = rows_of(np.ones((2, 23))), rows_of(np.zeros((2, 23)))
    trained["fc1.weight"] = honest["fc1.weight"]
    sent = send(layer_substitution(), trained, OTHERS, honest=lambda: honest, success=lambda update: 0.0)
    np.testing.assert_array_equal(sent["fc1.bias"], 1)
    same = send(layer_substitution(), honest, OTHERS, honest=lambda: honest, success=lambda update: 0.0)
    np.testing.assert_array_equal(flat(same), 0)  # trained without a poisoned sample


def test_how_often_success_is_asked_for():
    """Once for the malicious update, once for each layer forward, once for each that is kept backward."""
    asked = []

    def counted(update):
        asked.append(update)
        return success(update)

    trained, honest = rows_of(np.ones((1, 23))), rows_of(np.zeros((1, 23)))
    send(layer_substitution(), trained, OTHERS, honest=lambda: honest, success=counted)
    assert len(asked) == 1 + len(PARAMETERS) + 2
