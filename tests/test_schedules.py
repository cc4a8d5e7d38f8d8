"""Schedules: when malicious clients attack, and who of them is there."""

import numpy as np
import pytest
from pydantic import ValidationError

from gradlens.errors import InputError
from simulations.attacks import SCHEDULES, Schedule, Turn
from simulations.attacks.schedules import (
    alternating,
    every_nth,
    every_round,
    from_round,
    in_turn,
    random_pool,
    single_round,
)


def rounds_of(schedule: Schedule, position: int = 0, rounds: int = 12) -> list[int]:
    """The rounds in which a malicious client attacks that takes part in all of them."""
    return [index for index in range(rounds) if schedule.due(Turn(index, position, taken_part=index))]


def present(schedule: Schedule, index: int, malicious: int = 3, places: int = 10, seed: int = 0) -> list[int] | None:
    assert schedule.present is not None
    found = schedule.present(index, malicious, places, np.random.default_rng(seed))
    return None if found is None else found.tolist()


every_schedule = pytest.mark.parametrize("name", SCHEDULES)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (every_round(), list(range(12))),
        (from_round(), list(range(12))),
        (from_round(first=9), [9, 10, 11]),
        (single_round(at=4), [4]),
        (every_nth(period=4, first=2), [2, 6, 10]),
        (every_nth(period=1), list(range(12))),
        (in_turn(first=3, gap=2), [3]),
        (alternating(period=5), [0, 5, 10]),
        (random_pool(), list(range(12))),
    ],
)
def test_when_the_first_malicious_client_attacks(schedule, expected):
    assert rounds_of(schedule) == expected


def test_attackers_in_turn_are_those_of_the_paper():
    """DBA on MNIST, single-shot: rounds 12, 14, 16, 18."""
    schedule = in_turn(first=12, gap=2)
    assert [rounds_of(schedule, position, rounds=30) for position in range(4)] == [[12], [14], [16], [18]]
    there = [present(schedule, index, malicious=4) for index in range(11, 21)]
    assert there == [None, [0], None, [1], None, [2], None, [3], None, None]


def test_alternating_counts_the_rounds_that_a_client_takes_part_in():
    schedule = alternating(period=3)
    assert [schedule.due(Turn(17, 2, taken)) for taken in range(7)] == [True, False, False, True, False, False, True]


@pytest.mark.parametrize("schedule", [single_round(at=5), every_nth(period=3, first=5)])
def test_all_are_there_when_they_are_due(schedule):
    assert present(schedule, 5) == [0, 1, 2]
    assert present(schedule, 6) is None
    assert present(schedule, 2) is None
    drawn = [present(schedule, 5, malicious=6, places=4, seed=seed) for seed in range(5)]
    assert {len(each or []) for each in drawn} == {4}  # no more than there are places
    assert len({tuple(each or []) for each in drawn}) > 1


@pytest.mark.parametrize("schedule", [every_round(), from_round(first=2), alternating()])
def test_client_sampling_decides_elsewhere(schedule):
    assert schedule.present is None


@every_schedule
def test_who_is_there_is_sorted_and_fits(name):
    schedule = SCHEDULES[name]()
    if schedule.present is None:
        return
    for malicious, places, index in [(1, 1, 0), (5, 2, 0), (5, 2, 3), (40, 30, 1), (2, 30, 2)]:
        found = present(schedule, index, malicious, places)
        if found is not None:
            assert found == sorted(set(found))
            assert len(found) <= places
            assert set(found) <= set(range(malicious))
        assert found == present(schedule, index, malicious, places)


@every_schedule
def test_somebody_attacks_by_default(name):
    schedule = SCHEDULES[name]()
    assert any(schedule.due(Turn(index, 0, index)) for index in range(3))
    assert isinstance(schedule.due(Turn(0, 0, 0)), bool)


def test_a_random_pool_is_hypergeometric():
    """30 of 3,383 clients with 113 compromised: 1.002 malicious clients a round on average."""
    schedule, rng = random_pool(), np.random.default_rng(0)
    assert schedule.present is not None
    drawn = [schedule.present(0, 113, 30, rng) for _ in range(4_000)]
    counts = np.array([len(each) for each in drawn if each is not None])
    mean, share = 30 * 113 / 3383, 113 / 3383
    variance = mean * (1 - share) * (3383 - 30) / 3382
    assert counts.mean() == pytest.approx(mean, abs=4 * np.sqrt(variance / 4_000))
    assert counts.var() == pytest.approx(variance, rel=0.12)
    seen = np.bincount(np.concatenate([each for each in drawn if each is not None]), minlength=113)
    assert seen.min() > 10  # about 35 each


def test_a_random_pool_has_no_more_than_there_are():
    everybody = random_pool(population=50, compromised=50)
    assert present(everybody, 0, malicious=4, places=10) == [0, 1, 2, 3]
    assert present(everybody, 0, malicious=30, places=10) is not None
    assert len(present(everybody, 0, malicious=30, places=10) or []) == 10
    assert present(random_pool(population=50, compromised=0), 0) == []


def test_a_random_pool_that_is_none():
    with pytest.raises(InputError, match="at most population = 10 compromised, found 11"):
        random_pool(population=10, compromised=11)
    with pytest.raises(InputError, match="30 clients per round cannot be drawn from 20"):
        present(random_pool(population=20, compromised=1), 0, places=30)


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("from_round", {"first": -1}),
        ("single_round", {"at": 1.5}),
        ("every_nth", {"period": 0}),
        ("in_turn", {"gap": 0}),
        ("alternating", {"period": 0}),
        ("random_pool", {"population": 0}),
    ],
)
def test_bad_settings_are_refused(name, bad):
    with pytest.raises(ValidationError):
        SCHEDULES[name](**bad)
