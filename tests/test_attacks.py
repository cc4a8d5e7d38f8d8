"""Attacks: what they touch, how much of it, and that by default they touch nothing."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from gradlens.log import InputError
from simulations.attacks import ATTACKS, SCHEDULES, Attack, build_attack, compose, label_flip, scaling, trigger


@pytest.fixture
def images(rng):
    return rng.random((200, 3, 8, 9), dtype=np.float32)


@pytest.fixture
def labels(rng):
    return rng.integers(10, size=200)


@pytest.fixture
def updates(rng):
    return {"fc.weight": rng.normal(size=(2, 3, 4)).astype(np.float32), "norm.count": np.array([[3], [5]])}


@pytest.mark.parametrize("attack", [Attack(), scaling(), build_attack({})], ids=["Attack()", "scaling()", "no parts"])
def test_defaults_do_nothing(attack, images, labels, rng):
    assert attack.send is None
    poisoned, relabelled, chosen = attack.poison(images, labels, 1.0, rng)
    assert len(chosen) == 0
    np.testing.assert_array_equal(poisoned, images)
    np.testing.assert_array_equal(relabelled, labels)


def test_a_trigger_touches_only_its_pixels(images):
    before = images.copy()
    stamped = trigger(size=3, row=4, column=1, value=0.5).stamp(images)
    np.testing.assert_array_equal(images, before)
    assert (stamped[:, :, 4:7, 1:4] == 0.5).all()
    stamped[:, :, 4:7, 1:4] = images[:, :, 4:7, 1:4]
    np.testing.assert_array_equal(stamped, images)


@pytest.mark.parametrize("place", [{"row": 6}, {"column": 7}, {"size": 9, "row": 0, "column": 0}])
def test_a_trigger_outside_the_image_is_one_line(images, place):
    with pytest.raises(InputError, match="leaves images of 8 x 9"):
        trigger(**{"size": 3, **place}).stamp(images)


@given(rate=st.floats(0, 1), source=st.integers(0, 9), seed=st.integers(0, 2**32))
def test_the_poison_rate_is_the_share_of_eligible_samples(rate, source, seed):
    rng = np.random.default_rng(seed)
    labels = rng.integers(10, size=90)
    images = rng.random((90, 1, 4, 4), dtype=np.float32)
    for attack, eligible in (
        (label_flip(source_label=source, target_label=(source + 1) % 10), labels == source),
        (trigger(target_label=source, size=2, row=0, column=0), labels != source),
    ):
        poisoned, relabelled, chosen = attack.poison(images, labels, rate, rng)
        assert abs(len(chosen) - rate * eligible.sum()) <= 0.5
        assert eligible[chosen].all()
        assert (relabelled[chosen] == attack.target_label).all()
        rest = np.setdiff1d(np.arange(90), chosen)
        np.testing.assert_array_equal(poisoned[rest], images[rest])
        np.testing.assert_array_equal(relabelled[rest], labels[rest])


def test_a_smaller_rate_poisons_a_part_of_a_larger_ones(images, labels):
    rates = (0.1, 0.4, 1.0)
    chosen = [set(trigger().poison(images, labels, rate, np.random.default_rng(3))[2].tolist()) for rate in rates]
    assert chosen[0] < chosen[1] < chosen[2] == set(np.flatnonzero(labels != 1).tolist())


def test_a_flip_leaves_images_alone(images, labels, rng):
    poisoned, relabelled, chosen = label_flip(source_label=7, target_label=5).poison(images, labels, 1.0, rng)
    np.testing.assert_array_equal(poisoned, images)
    np.testing.assert_array_equal(chosen, np.flatnonzero(labels == 7))
    assert not (relabelled == 7).any()


def test_scaling_multiplies_what_is_sent_and_leaves_counters(updates, rng):
    send = scaling(factor=3.0).send
    assert send is not None
    before = updates["fc.weight"].copy()
    sent = send(updates, updates, rng)
    np.testing.assert_array_equal(updates["fc.weight"], before)
    np.testing.assert_array_equal(sent["fc.weight"], 3 * before)
    assert sent["fc.weight"].dtype == np.float32
    np.testing.assert_array_equal(sent["norm.count"], [[3], [5]])


def test_scaling_by_n_over_eta_replaces_the_global_model(rng):
    """Bagdasaryan et al. 2018, eq. (3): with the others at rest the next global model is the attacker's local one."""
    num_clients, server_learning_rate = 8, 0.5
    global_model, local = rng.normal(size=(2, 5))
    send = scaling(factor=num_clients / server_learning_rate).send
    assert send is not None
    updates = np.zeros((num_clients, 5))
    updates[2] = send({"w": (local - global_model)[None]}, {}, rng)["w"][0]
    np.testing.assert_allclose(global_model + server_learning_rate * updates.mean(axis=0), local, rtol=1e-12)


def test_parts_compose_in_one_order(images, labels, rng, updates):
    parts = {"scaling": {"factor": 2.0}, "trigger": {"target_label": 3, "size": 2}}
    attack = build_attack(parts)
    alone = trigger(target_label=3, size=2)
    assert attack.target_label == 3
    np.testing.assert_array_equal(attack.stamp(images), alone.stamp(images))
    np.testing.assert_array_equal(attack.eligible(labels), alone.eligible(labels))
    assert attack.send is not None
    np.testing.assert_array_equal(attack.send(updates, {}, rng)["fc.weight"], 2 * updates["fc.weight"])
    twice = compose(attack, scaling(factor=5.0)).send
    assert twice is not None
    np.testing.assert_array_equal(twice(updates, {}, rng)["fc.weight"], 10 * updates["fc.weight"])


def test_a_trigger_on_one_source_class(images, labels, rng):
    attack = build_attack({"trigger": {"target_label": 5, "size": 2}, "label_flip": {"source_label": 7}})
    _, relabelled, chosen = attack.poison(images, labels, 1.0, rng)
    np.testing.assert_array_equal(chosen, np.flatnonzero(labels == 7))
    assert (relabelled[chosen] == 5).all()


def test_parts_must_agree_on_the_target():
    with pytest.raises(InputError, match=r"target label, found \[1, 5\]"):
        build_attack({"trigger": {"target_label": 1}, "label_flip": {"target_label": 5}})


@pytest.mark.parametrize(
    ("name", "bad"),
    [("trigger", {"size": 0}), ("trigger", {"target_label": -1}), ("label_flip", {"source_label": "7"}),
     ("scaling", {"factor": float("inf")})],
)  # fmt: skip
def test_bad_settings_are_refused(name, bad):
    with pytest.raises(ValidationError):
        ATTACKS[name](**bad)


def test_schedules_count_rounds_from_zero():
    assert [SCHEDULES["from_round"](first=2)(index) for index in range(4)] == [False, False, True, True]
    assert all(SCHEDULES["every_round"]()(index) for index in range(4))
    assert SCHEDULES["from_round"]()(0)
