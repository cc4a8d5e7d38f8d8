"""Two camps: how clients are split, whether they stand apart, which side is malicious, and what a case then says."""

from dataclasses import replace
from itertools import combinations

import jsonschema
import numpy as np
import pytest

from gradlens import investigate
from gradlens.case.camps import camps_of, malicious_side, mirrored, one_sidedness, split_in_two
from gradlens.case.null import null_of
from gradlens.case.scoring import deviations
from gradlens.case.shipped import reference
from gradlens.case.sums import sums_of
from gradlens.examples import example_log, example_run
from gradlens.log import UpdateLog
from gradlens.reporting.case_file import case_file
from gradlens.run import Run
from test_case import changed
from test_investigate import SCHEMA

ROUNDS = 8


def two_camps(size: int) -> UpdateLog:
    """Twenty clients, the last of whom differ from the others by one vector and in nothing else."""
    rng, free = np.random.default_rng(5), example_log(ROUNDS, num_clients=20, num_malicious=0)
    shifts = {name: rng.normal(scale=0.1, size=free.model[name].sent_shape) for name in free.model.parameters}
    return changed(free, lambda name, updates: updates + np.multiply.outer(last(size), shifts[name]))


def last(size: int) -> np.ndarray:
    """The last of twenty clients in a round."""
    return (np.arange(20) >= 20 - size).astype(np.float32)


def names(size: int) -> set[str]:
    return {f"client-{19 - number}" for number in range(size)}


@pytest.fixture(scope="module")
def scoring():
    return reference().scoring


@pytest.fixture(scope="module")
def null(scoring):
    free = [example_log(ROUNDS, num_clients=20, num_malicious=0, seed=seed) for seed in range(100, 119)]
    return null_of([[sums_of(log)] for log in free], scoring)


@pytest.mark.parametrize("seed", range(20))
def test_two_parts_leave_the_least_variance_of_all_splits(seed):
    values = np.random.default_rng(seed).normal(size=7) * (1 + 9 * (seed % 2))

    def within(part: np.ndarray) -> float:
        return sum(((values[of] - values[of].mean()) ** 2).sum() for of in (part, ~part))

    parts = [np.isin(np.arange(7), list(of)) for size in range(1, 7) for of in combinations(range(7), size)]
    assert within(split_in_two(values)) == pytest.approx(min(map(within, parts)))


def test_values_that_are_all_equal_are_split_without_a_complaint():
    assert 0 < split_in_two(np.zeros(5)).sum() < 5


@pytest.mark.parametrize("size", [8, 10, 12])
def test_two_camps_are_found_and_stand_apart(size, scoring, null):
    sums = sums_of(two_camps(size))
    camps = camps_of(sums, scoring)
    assert set(sums.clients[camps.smaller]) in (names(size), set(sums.clients) - names(size))
    assert camps.smaller.sum() <= 10
    assert camps.apart > null.apart_threshold(0.05)


def test_a_small_camp_is_no_camp(scoring):
    assert camps_of(sums_of(example_log(ROUNDS, num_malicious=1)), scoring).apart == -np.inf


def test_the_order_of_clients_does_not_change_the_camps(rng, scoring):
    sums = sums_of(example_log(ROUNDS, num_malicious=4))
    order = rng.permutation(10)
    shuffled = replace(sums, of_rounds={role: of[np.ix_(order, order)] for role, of in sums.of_rounds.items()})
    assert (camps_of(shuffled, scoring).smaller == camps_of(sums, scoring).smaller[order]).all()


def test_a_side_is_malicious_as_much_as_the_other_is_honest(scoring):
    sums = sums_of(example_log(ROUNDS, num_malicious=4))
    camp = np.arange(10) > 5
    assert malicious_side(sums, scoring, camp) == pytest.approx(-malicious_side(sums, scoring, ~camp))
    judged = deviations(sums, ~camp, scoring.readings, scoring.scales)[camp].mean(axis=0)
    judging = deviations(sums, camp, scoring.readings, scoring.scales)[~camp].mean(axis=0)
    np.testing.assert_allclose(mirrored(sums, scoring, camp)[:-1], judged - judging)


def test_a_camp_that_pushes_one_label_is_one_sided_and_one_that_moves_a_label_to_another_is_not(scoring):
    sums = sums_of(example_log(ROUNDS, num_malicious=4))
    camp, pushes = np.arange(10) > 5, np.zeros((10, 4))
    pushes[camp] = np.array([3.0, -1.0, -1.0, -1.0])
    moves = np.zeros((10, 4))
    moves[camp] = np.array([1.0, -1.0, 0.0, 0.0])

    def of(totals: np.ndarray) -> float:
        assert sums.drift is not None
        return one_sidedness(replace(sums, drift=replace(sums.drift, totals=totals)), camp)

    assert of(pushes) == pytest.approx((27 - 3) / 12**1.5)
    assert of(-pushes) == pytest.approx(-(27 - 3) / 12**1.5)
    assert of(moves) == pytest.approx(0)
    assert of(np.zeros((10, 4))) == one_sidedness(replace(sums, drift=None), camp) == 0


@pytest.mark.parametrize("size", [10, 12])
def test_without_an_honest_majority_both_groups_are_named_and_nobody_is_accused(size, null):
    case = investigate(two_camps(size), null)
    assert case.verdict == "cannot say"
    assert case.suspects.empty
    assert names(size) in [set(group.clients) for group in case.groups]
    assert sum(len(group.clients) for group in case.groups) == 20
    assert set(case.clients["group"]) == {"A", "B"}
    assert "which of them is honest" in case.says[0]
    jsonschema.validate(case.as_dict(), SCHEMA)


def test_more_suspects_than_can_be_accused_are_no_verdict():
    case = investigate(example_log(ROUNDS, num_malicious=5))
    assert case.verdict == "cannot say"
    assert {f"client-{number}" for number in range(5, 10)} in [set(group.clients) for group in case.groups]


def test_camps_that_stand_no_further_apart_than_those_of_attack_free_recordings_are_none(null):
    free = [example_log(ROUNDS, num_clients=20, num_malicious=0, seed=seed) for seed in range(400, 420)]
    cases = [investigate(log, null) for log in free]
    assert sum(case.verdict == "cannot say" for case in cases) <= 3  # binomial: 20 recordings at 5 %


def test_a_case_file_of_two_groups_names_both_and_puts_nobody_in_line(tmp_path):
    run = Run.open(example_run(tmp_path / "run", ROUNDS, num_malicious=5))
    page = case_file(run, investigate(run), tmp_path / "case.html").read_text("utf-8")
    assert "either group may be the honest one" in page
    assert "Group A, 5 clients: client-5, client-6, client-7, client-8 and client-9" in page
    assert "Next in line, and not accused" not in page
