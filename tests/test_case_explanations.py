"""Innocent explanations: examples, labels of one kind, and that an attacker who is alone is not excused by itself."""

from dataclasses import replace

import numpy as np
import pytest

from gradlens import investigate
from gradlens.case.explanations import claimed_examples, holds_one_label, left_unexplained
from gradlens.case.null import null_of
from gradlens.case.shipped import reference
from gradlens.case.sums import sums_of
from gradlens.examples import example_log
from test_investigate import free_logs

CLEAN = np.arange(10) < 9


@pytest.fixture(scope="module")
def sums():
    return sums_of(example_log(8, num_malicious=0))


def drifting(sums, towards: list[float]):
    """The sums if the last client's labels had drifted thus, and no other's."""
    totals = np.zeros((10, 4))
    totals[:9] += np.random.default_rng(0).normal(scale=0.1, size=(9, 4))
    totals[9] = towards
    return replace(sums, drift=replace(sums.drift, totals=totals))


@pytest.mark.parametrize(
    ("towards", "one"),
    [
        ([30.0, -10.0, -10.0, -10.0], True),
        ([-10.0, -12.0, 30.0, -8.0], True),
        ([40.0, 0.0, 0.0, 0.0], True),  # what is common to all labels says nothing
        ([-30.0, 10.0, 10.0, 10.0], False),  # away from a label
        ([10.0, -10.0, 0.0, 0.0], False),  # from one label to another
        ([0.15, -0.05, -0.05, -0.05], False),  # no farther than others
    ],
)
def test_one_label_is_a_drift_towards_it_and_equally_away_from_all_others(sums, towards, one):
    assert holds_one_label(drifting(sums, towards), CLEAN).tolist() == [False] * 9 + [one]


def test_a_model_without_label_drift_tells_no_labels(sums):
    assert not holds_one_label(replace(sums, drift=None), CLEAN).any()


def test_nothing_is_left_of_who_holds_one_label(sums):
    examples = dict.fromkeys(sums.clients.tolist(), 100.0)
    left = left_unexplained(drifting(sums, [30.0, -10.0, -10.0, -10.0]), reference().scoring, CLEAN, examples)
    assert left[9] == -np.inf
    assert np.isfinite(left[:9]).all()


def test_equal_examples_explain_nothing(sums):
    scoring = reference().scoring
    left = left_unexplained(sums, scoring, CLEAN, dict.fromkeys(sums.clients.tolist(), 100.0))
    np.testing.assert_allclose(left, scoring.scores(sums, CLEAN))


def test_a_difference_of_one_in_a_hundred_examples_explains_nothing(sums):
    scoring, rng = reference().scoring, np.random.default_rng(0)
    examples = dict(zip(sums.clients.tolist(), rng.choice([71.0, 72.0], 10).tolist(), strict=True))
    left = left_unexplained(sums, scoring, CLEAN, examples)
    np.testing.assert_allclose(left, scoring.scores(sums, CLEAN), atol=0.1)


def test_what_goes_with_examples_among_the_clean_is_taken_off_a_client_with_more(sums):
    scoring, examples = reference().scoring, {f"client-{place}": 100.0 * 1.3**place for place in range(10)}
    factors = np.sqrt(1.3 ** np.arange(10))  # who has more examples differs more
    grown = replace(sums, of_rounds={role: of * np.outer(factors, factors) for role, of in sums.of_rounds.items()})
    assert left_unexplained(grown, scoring, CLEAN, examples)[9] < scoring.scores(grown, CLEAN)[9] - 0.5


@pytest.mark.parametrize(
    ("claim", "spared"), [(100.0, False), (290.0, False), (310.0, True), (34.0, False), (33.0, True)]
)
def test_three_times_the_examples_of_any_clean_client_cannot_be_compared(sums, claim, spared):
    examples = dict.fromkeys(sums.clients.tolist(), 100.0) | {"client-9": claim}
    left = left_unexplained(sums, reference().scoring, CLEAN, examples)
    assert (left[9] == -np.inf) == spared


def test_an_attacker_that_is_alone_is_not_excused_by_its_own_drift():
    null = null_of([[sums_of(log)] for log in free_logs(19)], reference().scoring)
    case = investigate(example_log(8, num_malicious=1), null)
    assert case.suspects["client"].tolist() == ["client-9"]


def test_the_median_of_what_a_client_claimed_counts():
    assert claimed_examples(example_log(3)) == {f"client-{number}": 100.0 for number in range(10)}
