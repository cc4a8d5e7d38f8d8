"""Cohorts: who takes part in each round, who of them attacks, and what does not arrive."""

from collections import Counter
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.stats import hypergeom

from gradlens.errors import InputError
from simulations.attacks import SCHEDULES
from simulations.cohorts import Cohort, client_names, cohorts, malicious_clients, participants
from simulations.components import build
from simulations.scenario import Scenario

ROUNDS = 12
SETTINGS = {
    "every_round": {},
    "from_round": {"first": 4},
    "single_round": {"at": 5},
    "every_nth": {"period": 3, "first": 2},
    "in_turn": {"first": 1, "gap": 2},
    "alternating": {"period": 3},
    "random_pool": {"population": 100, "compromised": 30},
}
SAMPLED = ("every_round", "from_round", "alternating")  # client sampling decides in all rounds
FORMS = {
    "all": {"num_clients": 12, "num_malicious": 4},
    "sampled": {"num_clients": 20, "clients_per_round": 8, "num_malicious": 4},
    "crowded": {"num_clients": 12, "clients_per_round": 3, "num_malicious": 5},  # more malicious clients than places
    "few_benign": {"num_clients": 7, "clients_per_round": 5, "num_malicious": 6},
}
every_schedule = pytest.mark.parametrize("name", SCHEDULES)
every_form = pytest.mark.parametrize("form", FORMS)


def scenario_of(name: str = "every_round", **changes) -> Scenario:
    base = {
        "attack": "sign_flip", "num_clients": 20, "clients_per_round": 8, "num_malicious": 4, "rounds": ROUNDS,
        "schedule": {name: SETTINGS[name]},
    }  # fmt: skip
    return Scenario(**(base | changes))


def of(name: str, form: str, **changes) -> Scenario:
    return scenario_of(name, **({"clients_per_round": None} | FORMS[form] | changes))


def places_of(scenario: Scenario) -> int:
    return scenario.clients_per_round or scenario.num_clients


def attackers(cohort: Cohort) -> set[int]:
    return set(cohort.clients[cohort.attacking].tolist())


def is_on(scenario: Scenario, index: int, position: int, taken_part: int) -> bool:
    """Whether a malicious client that takes part attacks: written anew, by the schedule's name."""
    ((name, given_),) = scenario.schedule.items()
    return {
        "every_round": lambda: True,
        "from_round": lambda: index >= given_["first"],
        "single_round": lambda: index == given_["at"],
        "every_nth": lambda: index in range(given_["first"], scenario.rounds, given_["period"]),
        "in_turn": lambda: index == given_["first"] + position * given_["gap"],
        "alternating": lambda: taken_part % given_["period"] == 0,
        "random_pool": lambda: True,
    }[name]()  # fmt: skip


def assert_sound(scenario: Scenario) -> None:
    """What holds of the cohorts of every scenario, by the definitions."""
    found, malicious = cohorts(scenario), malicious_clients(scenario).tolist()
    assert len(found) == scenario.rounds
    taken_part = Counter()
    for index, cohort in enumerate(found):
        drawn = participants(scenario, index)
        for clients in (drawn, cohort.clients):
            assert clients.dtype == np.int64
            assert (np.diff(clients) > 0).all()
            assert set(clients.tolist()) <= set(range(scenario.num_clients))
        assert min(1, len(drawn)) <= len(cohort.clients) <= len(drawn) <= places_of(scenario)
        if "random_pool" not in scenario.schedule:
            assert len(drawn) == places_of(scenario)
        assert set(cohort.clients.tolist()) <= set(drawn.tolist())
        assert cohort.attacking.dtype == cohort.broken.dtype == bool
        assert cohort.attacking.shape == cohort.broken.shape == cohort.clients.shape
        if scenario.missing_rate == 0:
            np.testing.assert_array_equal(cohort.clients, drawn)
        if scenario.nonfinite_rate in (0, 1):
            assert (cohort.broken == bool(scenario.nonfinite_rate)).all()
        expected = {
            client
            for position, client in enumerate(malicious)
            if client in cohort.clients and is_on(scenario, index, position, taken_part[client])
        }
        assert attackers(cohort) == expected
        taken_part.update(set(drawn.tolist()) & set(malicious))


def test_no_schedule_is_missing_here():
    assert set(SETTINGS) == set(SCHEDULES)
    assert {name for name in SETTINGS if build("schedule", scenario_of(name).schedule).present is None} == set(SAMPLED)


@every_form
@every_schedule
def test_cohorts_are_sound(name, form):
    for seed in range(5):
        assert_sound(of(name, form, rounds=20, seed=seed))
        assert_sound(of(name, form, rounds=20, seed=seed, missing_rate=0.4, nonfinite_rate=0.3))


@st.composite
def scenarios(draw) -> Scenario:
    num_clients = draw(st.integers(1, 12))
    name = draw(st.sampled_from(list(SETTINGS)))
    rounds = draw(st.integers(6, 14))
    num_malicious = draw(st.integers(0, num_clients))
    # a round that nobody could take part in is a test of its own below
    assume(not (name == "random_pool" and num_malicious == num_clients))
    return scenario_of(
        name,
        num_clients=num_clients,
        clients_per_round=draw(st.none() | st.integers(1, num_clients)),
        num_malicious=num_malicious,
        rounds=rounds,
        seed=draw(st.integers(0, 2**32)),
        missing_rate=draw(st.sampled_from([0.0, 0.3, 0.99])),
        nonfinite_rate=draw(st.sampled_from([0.0, 0.5, 1.0])),
    )


@given(scenarios())
@settings(max_examples=60, deadline=None)
def test_cohorts_of_any_scenario_are_sound(scenario):
    assert_sound(scenario)


def test_a_round_that_draws_nobody_is_one_line_or_a_cohort():
    scenario = scenario_of("random_pool", num_clients=5, clients_per_round=None, num_malicious=5)
    with suppress(InputError):
        assert_sound(scenario)


def test_a_pool_that_is_smaller_than_a_round_is_one_line():
    small = {"random_pool": {"population": 7, "compromised": 2}}
    with pytest.raises(InputError, match="random_pool: 8 clients per round cannot be drawn from 7"):
        cohorts(scenario_of(schedule=small))


@every_form
@pytest.mark.parametrize("name", ["single_round", "every_nth"])
def test_all_malicious_clients_are_present_when_they_strike(name, form):
    scenario = of(name, form, rounds=20)
    due = [5] if name == "single_round" else list(range(2, 20, 3))
    malicious = set(malicious_clients(scenario).tolist())
    found = cohorts(scenario)
    assert [index for index, cohort in enumerate(found) if cohort.attacking.any()] == due
    for index in due:
        assert attackers(found[index]) <= malicious
        assert len(attackers(found[index])) == min(len(malicious), places_of(scenario))


def test_who_strikes_is_drawn_where_places_are_fewer():
    scenario = of("every_nth", "crowded", rounds=300)
    counts = Counter(client for cohort in cohorts(scenario) for client in attackers(cohort))
    assert set(counts) == set(malicious_clients(scenario).tolist())
    for count in counts.values():  # 100 rounds, 3 of 5
        assert count == pytest.approx(60, abs=4.5 * np.sqrt(100 * 0.6 * 0.4))


@every_form
def test_attackers_in_turn_come_one_at_a_time(form):
    scenario = of("in_turn", form, rounds=16)
    malicious = malicious_clients(scenario).tolist()
    benign = scenario.num_clients - len(malicious)
    for index, cohort in enumerate(cohorts(scenario)):
        position, rest = divmod(index - 1, 2)
        due = rest == 0 and 0 <= position < len(malicious)
        assert attackers(cohort) == ({malicious[position]} if due else set())
        if due:
            others = set(cohort.clients.tolist()) & set(malicious) - {malicious[position]}
            assert len(others) == max(0, places_of(scenario) - 1 - benign)  # only where benign ones are too few


@pytest.mark.parametrize(
    ("num_malicious", "population", "compromised"), [(10, 100, 20), (3, 100, 20), (10, 3383, 113), (10, 12, 5)]
)
def test_a_random_pool_follows_the_hypergeometric_law(num_malicious, population, compromised):
    """Frequencies, mean and variance of the number of attackers over 2,000 rounds, capped where there are no more."""
    scenario = scenario_of(
        schedule={"random_pool": {"population": population, "compromised": compromised}},
        num_clients=20,
        clients_per_round=10,
        num_malicious=num_malicious,
        rounds=2_000,
    )
    found = cohorts(scenario)
    counts = np.array([len(attackers(cohort)) for cohort in found])
    assert {len(cohort.clients) for cohort in found} == {10}
    law = hypergeom(population, compromised, 10)
    support = np.minimum(np.arange(11), num_malicious)
    weights = law.pmf(np.arange(11))
    mean = weights @ support
    variance = weights @ (support - mean) ** 2
    fourth = weights @ (support - mean) ** 4
    assert counts.mean() == pytest.approx(mean, abs=4.5 * np.sqrt(variance / 2_000))
    assert counts.var() == pytest.approx(variance, abs=4.5 * np.sqrt((fourth - variance**2) / 2_000))
    for number in range(num_malicious + 1):
        share = weights[support == number].sum()
        assert (counts == number).mean() == pytest.approx(share, abs=4.5 * np.sqrt(share * (1 - share) / 2_000) + 1e-12)
    if num_malicious == 10:  # uncapped, the moments are those of the law itself
        assert mean == pytest.approx(law.mean())
        assert variance == pytest.approx(law.var())
    assert len({client for cohort in found for client in attackers(cohort)}) == num_malicious


@pytest.mark.parametrize("form", ["all", "sampled", "crowded"])
def test_alternating_counts_each_clients_own_rounds(form):
    scenario = of("alternating", form, rounds=60)
    there, attacks = {}, {}
    for index, cohort in enumerate(cohorts(scenario)):
        for client in malicious_clients(scenario).tolist():
            if client in cohort.clients:
                there.setdefault(client, []).append(index)
            if client in attackers(cohort):
                attacks.setdefault(client, []).append(index)
    assert set(there) == set(malicious_clients(scenario).tolist())
    assert attacks == {client: indices[::3] for client, indices in there.items()}


def test_a_round_counts_for_a_client_whose_update_got_lost():
    whole = scenario_of("alternating", rounds=60)
    lossy = whole.replace(missing_rate=0.5)
    for full, arrived in zip(cohorts(whole), cohorts(lossy), strict=True):
        assert attackers(arrived) == attackers(full) & set(arrived.clients.tolist())


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_the_missing_rate_holds_in_the_mean(rate):
    scenario = scenario_of(num_clients=50, clients_per_round=30, rounds=400, missing_rate=rate)
    found = cohorts(scenario)
    arrived = np.array([len(cohort.clients) for cohort in found])
    expected = 30 * (1 - rate) + rate**30  # at least one arrives
    assert arrived.mean() == pytest.approx(expected, abs=4.5 * np.sqrt(30 * rate * (1 - rate) / 400))
    malicious = malicious_clients(scenario)
    drawn = np.mean([np.isin(participants(scenario, index), malicious).sum() for index in range(400)])
    came = np.mean([cohort.attacking.sum() for cohort in found])
    assert came / drawn == pytest.approx(1 - rate, abs=4.5 * np.sqrt(rate * (1 - rate) / (400 * drawn)))


def test_somebody_always_arrives():
    found = cohorts(scenario_of(rounds=50, missing_rate=1 - 1e-12))
    assert {len(cohort.clients) for cohort in found} == {1}
    assert len({int(cohort.clients[0]) for cohort in found}) > 5


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_the_nonfinite_rate_holds_in_the_mean(rate):
    scenario = scenario_of(num_clients=50, clients_per_round=30, rounds=400, nonfinite_rate=rate, missing_rate=0.5)
    broken = np.concatenate([cohort.broken for cohort in cohorts(scenario)])
    assert broken.mean() == pytest.approx(rate, abs=4.5 * np.sqrt(rate * (1 - rate) / len(broken)))


def test_what_gets_lost_or_broken_at_a_smaller_rate_does_at_a_larger_one():
    base = scenario_of(rounds=40)
    for name in ("missing_rate", "nonfinite_rate"):
        rare, often = (cohorts(base.replace(**{name: rate})) for rate in (0.2, 0.6))
        for few, many in zip(rare, often, strict=True):
            if name == "missing_rate":
                assert set(many.clients.tolist()) <= set(few.clients.tolist())
            else:
                assert (many.broken >= few.broken).all()


@every_schedule
def test_the_same_seed_gives_the_same_cohorts(name):
    changes = {"missing_rate": 0.3, "nonfinite_rate": 0.3}
    one, same, other = (cohorts(scenario_of(name, seed=seed, **changes)) for seed in (3, 3, 4))
    for first, second in zip(one, same, strict=True):
        for mine, theirs in zip(first, second, strict=True):
            np.testing.assert_array_equal(mine, theirs)
    assert any(not np.array_equal(mine.clients, theirs.clients) for mine, theirs in zip(one, other, strict=True))


@every_schedule
def test_more_rounds_change_no_earlier_one(name):
    short, long = (cohorts(scenario_of(name, rounds=rounds)) for rounds in (ROUNDS, 30))
    for first, second in zip(short, long, strict=False):
        for mine, theirs in zip(first, second, strict=True):
            np.testing.assert_array_equal(mine, theirs)


@every_form
@every_schedule
def test_a_control_draws_whom_the_attacked_run_draws(name, form):
    """In all rounds in which client sampling decides: what was attacked differs in the attack alone."""
    changes = {"missing_rate": 0.3, "nonfinite_rate": 0.3}
    attacked = of(name, form, **changes)
    control = attacked.control
    assert control.is_control
    due = {
        "single_round": {5},
        "every_nth": {2, 5, 8, 11},
        "in_turn": set(range(1, 1 + 2 * attacked.num_malicious, 2)),
        "random_pool": set(range(ROUNDS)),
    }.get(name, set())
    assert name not in SAMPLED or not due
    for index, (one, other) in enumerate(zip(cohorts(attacked), cohorts(control), strict=True)):
        assert not other.attacking.any()
        if index not in due:
            np.testing.assert_array_equal(one.clients, other.clients)
            np.testing.assert_array_equal(one.broken, other.broken)


@pytest.mark.parametrize(("num_clients", "places"), [(10, 3), (20, 1), (5, 4)])
def test_client_sampling_favours_nobody(num_clients, places):
    found = cohorts(Scenario(num_clients=num_clients, clients_per_round=places, rounds=1_000))
    shares = np.bincount(np.concatenate([cohort.clients for cohort in found]), minlength=num_clients) / 1_000
    share = places / num_clients
    np.testing.assert_allclose(shares, share, atol=4.5 * np.sqrt(share * (1 - share) / 1_000))


def test_names_are_as_long_as_the_last_one():
    assert client_names(Scenario(num_clients=3)).tolist() == ["client-00", "client-01", "client-02"]
    assert client_names(Scenario(num_clients=101))[[0, 7, 100]].tolist() == ["client-000", "client-007", "client-100"]
