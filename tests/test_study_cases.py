"""The studies behind cases: what the reference is learned from, odd clients, and what is said of the figures."""

import numpy as np
import pandas as pd
import pytest

from gradlens.case.scoring import Scoring
from gradlens.case.sums import sums_of
from gradlens.examples import example_log
from simulations import Scenario
from simulations.studies import cases, shipped_reference
from simulations.studies.odd_clients import many_examples, one_label, other_writing, wrong_labels
from simulations.studies.reference_settings import attacked, setting
from simulations.studies.reference_tasks import chains, clusters
from simulations.studies.reference_weights import clean_sets, fitted, weights_of
from simulations.tasks import load_task


def test_a_setting_is_the_same_for_the_same_number_and_attack_free():
    settings = [setting(number) for number in range(40)]
    assert settings == [setting(number) for number in range(40)]
    assert all(scenario.is_control for scenario in settings)
    assert len({scenario.digest for scenario in settings}) == 40
    assert all(2 * scenario.num_malicious < scenario.num_clients for scenario in attacked(0, 20))


def test_no_recording_of_the_reference_chose_the_weights_and_none_is_judged_by_the_study():
    names = [job.name for job in shipped_reference.jobs()]
    assert len(names) == len(set(names))
    learning = {scenario.digest for _, scenario in shipped_reference.learning()}
    reference = {setting(n).replace(seed=s).digest for n in shipped_reference.REFERENCE for s in range(20)}
    judged = {scenario.digest for _, scenario in cases.jobs()}
    own = {base.replace(seed=s).digest for base in cases.bases().values() for s in cases.NULL_SEEDS}
    assert not learning & reference
    assert not judged & (learning | reference | own)
    assert not own & learning


@pytest.mark.parametrize("task", [clusters, chains])
def test_synthetic_tasks_give_as_many_samples_as_asked_for_and_the_same_for_the_same_seed(task):
    one, same, other = task(50, 1), task(50, 1), task(50, 2)
    assert len(one.y_train) == 50
    np.testing.assert_array_equal(one.x_train, same.x_train)
    assert not np.array_equal(one.x_train, other.x_train)


@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_odd_partitions_share_out_every_sample_once(alpha, rng):
    task = load_task("digits")
    for partition, odd in ((one_label(alpha), "label"), (many_examples(alpha=alpha), "size")):
        parts = partition(task, 10, rng).train
        np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.arange(len(task.y_train)))
        if odd == "label":
            assert len(set(task.y_train[parts[0]].tolist())) == 1
        else:
            assert len(parts[0]) == pytest.approx(10 * np.mean([len(part) for part in parts[1:]]), rel=0.02)


def test_wrong_labels_are_wrong_and_other_writing_keeps_labels(rng):
    task = load_task("digits", samples=100)
    wrong = wrong_labels().poison(task.x_train, task.y_train, 0.2, rng, task=task)
    assert len(wrong[2]) == 20
    assert (wrong[1] != task.y_train).sum() == 20
    x, y, _ = other_writing().poison(task.x_train, task.y_train, 1.0, rng, task=task)
    np.testing.assert_array_equal(y, task.y_train)
    assert not np.array_equal(x, task.x_train)
    assert (x.min(), x.max() <= 1) == (0, True)


def test_clean_sets_leave_a_majority_and_hold_the_right_one(rng):
    malicious = np.arange(20) < 6
    sets = list(clean_sets(malicious, rng))
    assert any((clean == ~malicious).all() for clean in sets)
    assert all(clean.sum() >= 11 for clean in sets)


def test_rows_of_a_recording_weigh_the_same_whatever_its_number_of_clients():
    for count in (5, 50):
        weights = weights_of(np.arange(count) < 2, free=False)
        assert weights[:2].sum() == pytest.approx(1)
        assert weights[2:].sum() == pytest.approx(2)


def test_the_regression_finds_the_reading_that_tells(rng):
    malicious = rng.random(400) < 0.5
    values = rng.normal(size=(400, 2))
    values[malicious, 0] += 3
    before = Scoring(("tells", "noise"), np.ones(2), np.zeros(2), np.zeros(2), 0.0, np.zeros(3))
    scoring = fitted(values, malicious, np.ones(400), before)
    assert scoring.above[0] > 5 * abs(scoring.above[1])
    assert scoring.above.dtype == np.float64


def test_sums_survive_being_kept():
    sums = sums_of(example_log())
    again = shipped_reference.sums_from(shipped_reference.arrays_of(sums))
    assert again.roles == sums.roles
    np.testing.assert_array_equal(again.totals["fc1.weight"], sums.totals["fc1.weight"])
    assert again.drift is not None
    assert sums.drift is not None
    np.testing.assert_array_equal(again.drift.moments, sums.drift.moments)


@pytest.fixture
def table() -> pd.DataFrame:
    """Two attack-free recordings, one accused; a family that works and one that does not; an odd client."""
    blank = {"setting": "digits iid", "seed": 0, "main_accuracy": 0.9, "asr": np.nan, "null": "reference", "p": 0.5}
    blank |= {"verdict": "not established", "attackers": 0, "found": 0, "innocent": 0, "malicious": 0}
    blank |= {"ambiguous_attackers": 0, "ambiguous_innocent": 0, "on_top": 0}
    free = blank | {"kind": "attack-free", "family": "none"}
    hit = blank | {"kind": "attacked", "malicious": 4, "attackers": 4, "verdict": "established", "p": 0.05}
    rows = [free, free | {"seed": 1, "innocent": 1, "p": 0.04}, blank | {"kind": "odd client", "family": "one_label"}]
    rows += [hit | {"family": "trigger", "asr": 0.8, "found": 3, "innocent": 1}]
    rows += [hit | {"family": "weak", "asr": 0.1, "found": 0}]
    rows += [hit | {"family": "zero", "main_accuracy": 0.5, "found": 4}]
    return pd.DataFrame(rows)


def test_families_that_do_not_work_are_not_averaged(table):
    assert set(cases.working(table)["family"]) == {"trigger", "zero"}


def test_the_section_says_what_the_table_holds(table):
    text = " ".join(cases.section(table).split())  # with plain spaces
    assert "Of 2 attack-free recordings in 1 settings" in text
    assert "1 had anybody accused" in text
    assert "| digits iid | 4 of 20 | reference | 2 | 0.88 [" in text
    assert "| 0.50 | 50 % | 0 % |" in text
    assert "they work nowhere here: weak." in text
    assert "Of 1 recordings with one odd honest client" in text


def test_a_recording_is_judged_by_the_reference_and_by_a_null_of_its_own():
    row = {"kind": "attacked", "setting": "digits iid", "family": "sign_flip", "malicious": 2, "seed": 0}
    scenario = Scenario(rounds=3, num_clients=8, attack="sign_flip", num_malicious=2)
    rows = cases.judged((row, scenario), None)
    assert rows["null"].tolist() == ["reference"]
    assert rows["attackers"].tolist() == [2]
