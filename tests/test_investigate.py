"""The verdict on a recording: its error rate, what it needs, its words, and who is accused of what."""

import json
from dataclasses import replace
from importlib.resources import files

import jsonschema
import numpy as np
import pytest

import gradlens
from gradlens import InputError, investigate
from gradlens.case.activity import Stretch, stretch_of
from gradlens.case.looks import looks_of
from gradlens.case.null import Null, needed, null_of
from gradlens.case.peeling import peel
from gradlens.case.several import table_of_cases
from gradlens.case.shipped import reference
from gradlens.case.spikes import planted, smallest_seen
from gradlens.case.sums import sums_of
from gradlens.examples import example_log, example_run
from gradlens.log import UpdateLog

ROUNDS = 8
SCHEMA = json.loads(files("gradlens.case").joinpath("case.schema.json").read_text("utf-8"))


def free_logs(count: int, first: int = 100) -> list[UpdateLog]:
    return [example_log(ROUNDS, num_malicious=0, seed=seed) for seed in range(first, first + count)]


@pytest.fixture(scope="module")
def null() -> Null:
    return null_of([[sums_of(log)] for log in free_logs(19)], reference().scoring)


def of_heights(*settings: list[float]) -> Null:
    known = tuple(np.sort(of) for of in settings)
    return Null("reference", reference().scoring, known, known, 0, "made up")


def test_p_counts_the_recordings_at_least_as_high():
    one = of_heights([1.0, 2.0, 3.0, 4.0])
    assert [one.p(height) for height in (0.5, 1.0, 2.5, 4.0, 4.1)] == [1.0, 1.0, 3 / 5, 2 / 5, 1 / 5]
    assert one.resolves == 1 / 5


def test_a_threshold_is_the_least_height_above_which_p_is_small_enough():
    one = of_heights(list(range(1, 20)))
    assert one.threshold(0.05) == 19
    assert one.threshold(0.1) == 18
    assert of_heights(list(range(1, 19))).threshold(0.05) == np.inf


@pytest.mark.parametrize("fwer", [0.05, 0.1, 0.3])
def test_the_threshold_of_many_settings_is_the_order_statistic_of_theirs(fwer, rng):
    settings = [rng.normal(rng.normal(), 1, size=20).tolist() for _ in range(31)]
    thresholds = np.sort([np.sort(of)[int(np.ceil((1 - fwer) * 21)) - 1] for of in settings])
    assert of_heights(*settings).threshold(fwer) == pytest.approx(thresholds[int(np.ceil(0.9 * 32)) - 1])


def test_too_few_settings_resolve_nothing():
    few = of_heights(*[[0.0] * 20] * 8)
    assert few.resolves == 1.0
    assert few.threshold(0.05) == np.inf


def test_how_many_recordings_a_rate_needs():
    assert [needed(fwer) for fwer in (0.05, 0.01, 0.1, 0.2)] == [19, 99, 9, 4]


def test_the_rate_of_recordings_without_attack_is_kept(null):
    others = [null.p(peel(sums_of(log), null.scoring).highest) for log in free_logs(40, first=200)]
    assert np.mean(np.array(others) <= 0.05) <= 0.15  # binomial: 40 recordings at 5 %
    assert 0.25 <= np.mean(others) <= 0.75


@pytest.mark.parametrize("malicious", [1, 2, 4])
def test_attackers_alone_are_accused(malicious, null):
    case = investigate(example_log(ROUNDS, num_malicious=malicious), null)
    assert case.verdict == "established"
    assert set(case.suspects["client"]) | set(case.ambiguous["client"]) == {f"client-{9 - i}" for i in range(malicious)}
    assert case.p == 1 / 20
    assert len(case.clients) == 10
    assert case.clients["rank"].tolist() == list(range(1, 11))
    assert (case.clients["status"] == "next in line").sum() == 1


def test_accomplices_are_a_group_bound_by_their_likeness(null):
    case = investigate(example_log(ROUNDS, num_malicious=3), null)
    [group] = case.groups
    assert set(group.clients) == {"client-7", "client-8", "client-9"}
    assert group.cosine > group.innocent


def test_a_null_too_small_for_the_rate_says_how_many_are_needed_and_ranks_all_the_same():
    case = investigate(example_log(ROUNDS), free_logs(2))
    assert case.verdict == "cannot say"
    assert not len(case.suspects)
    assert "19 attack-free recordings" in case.says[0]
    assert case.clients["client"].iloc[0] == "client-9"


def test_a_rate_that_the_reference_cannot_resolve_is_not_claimed():
    case = investigate(example_log(ROUNDS), fwer=0.001)
    assert case.verdict == "cannot say"
    assert "999 attack-free recordings" in case.says[0]


def test_too_few_clients_cannot_be_judged():
    case = investigate(example_log(num_clients=4))
    assert case.verdict == "cannot say"
    assert "4 clients took part, 5 are needed" in case.says[0]
    assert len(case.clients) == 4
    assert np.isnan(case.p)


def test_a_recording_of_nothing_comparable_cannot_be_judged():
    log = example_log()
    rounds = [replace(r, updates={name: np.full_like(a, np.nan) for name, a in r.updates.items()}) for r in log]
    case = investigate(UpdateLog(log.model, rounds))
    assert case.verdict == "cannot say"
    assert "no client has a comparable update" in case.says[0]


def test_nothing_found_says_what_would_have_been_found(null):
    case = investigate(free_logs(1, first=301)[0], null)
    assert case.verdict in ("not established", "suspected")
    assert "times a typical client's" in case.says[2]


def test_clean_rounds_widen_scales_and_never_narrow_them():
    log = example_log(ROUNDS)
    case = investigate(log, 4)
    assert case.null.kind == "clean stretch"
    assert (case.null.scoring.scales >= reference().scoring.scales).all()
    with pytest.raises(InputError, match="expected 1 to 8"):
        investigate(log, 9)


def test_looks_come_after_doubling_numbers_of_rounds_and_the_last():
    assert looks_of(1) == [1]
    assert looks_of(8) == [1, 2, 4, 8]
    assert looks_of(20) == [1, 2, 4, 8, 16, 20]


def test_an_accusation_of_an_early_look_stands():
    guilty, quiet = example_log(ROUNDS, num_malicious=1), example_log(2 * ROUNDS, num_malicious=0)
    rounds = [*guilty, *[replace(r, index=r.index + ROUNDS) for r in list(quiet)[ROUNDS:]]]
    early = investigate(UpdateLog(guilty.model, rounds[:ROUNDS]), looks=True)
    whole = investigate(UpdateLog(guilty.model, rounds), looks=True)
    assert early.p >= whole.p
    assert set(early.suspects["client"]) <= set(whole.suspects["client"]) | set(whole.ambiguous["client"])


@pytest.mark.parametrize(
    ("null", "message"),
    [
        ("runs", "number of clean rounds, found a str"),
        ([], "expected attack-free recordings, found none"),
        ([example_log().only("fc1.weight")], "recordings of the same model"),
        (True, "found True"),
    ],
)
def test_a_null_that_is_none_is_refused(null, message):
    with pytest.raises(InputError, match=message):
        investigate(example_log(), null)


def test_a_null_that_was_read_before_is_of_the_same_model_too(null):
    bare = replace(null, model=example_log().only("fc1.weight").model)
    with pytest.raises(InputError, match="recordings of the same model"):
        investigate(example_log(ROUNDS), bare)


@pytest.mark.parametrize("fwer", [0, 1, -0.1, 1.5])
def test_a_rate_lies_between_0_and_1(fwer):
    with pytest.raises(InputError, match="fwer: expected a rate between 0 and 1"):
        investigate(example_log(), fwer=fwer)


def test_a_case_as_json_has_its_keys_and_nothing_that_json_does_not_know(null):
    for log in (example_log(ROUNDS, num_malicious=2), example_log(num_clients=3)):
        plain = investigate(log, null).as_dict()
        assert list(plain) == ["verdict", "p", "suspects", "ambiguous", "groups", "clients", "null", "fwer", "says"]
        jsonschema.validate(json.loads(json.dumps(plain, allow_nan=False)), SCHEMA)


def test_a_stretch_is_where_two_means_fit_best():
    assert stretch_of(np.array([0.0, 0, 0, 5, 5, 5, 5, 0, 0])) == Stretch(3, 6, 3, 3)
    assert stretch_of(np.full(4, np.nan)) is None
    noisy = stretch_of(np.array([0.1, 1.5, -0.3, 1.4, 2.9, 2.2, 3.4, 2.6]))
    assert noisy is not None
    assert noisy.earliest <= noisy.first <= noisy.latest


def test_the_rounds_of_an_attack_are_found(null):
    honest, attacked = example_log(20, num_malicious=0, seed=5), example_log(20, num_malicious=1, seed=5)
    rounds = [*list(honest)[:8], *list(attacked)[8:]]
    case = investigate(UpdateLog(honest.model, rounds), null)
    row = case.clients.iloc[0]
    assert row["client"] == "client-9"
    assert row["first_earliest"] <= 8 <= row["first_latest"]
    assert row["last_round"] == 19


def test_a_planted_deviation_adds_its_square_to_the_client_alone():
    sums = sums_of(example_log(num_malicious=0))
    spiked = planted(sums, 3, 2.0)
    added = spiked.totals["fc1.weight"] - sums.totals["fc1.weight"]
    assert added[3, 3] == pytest.approx(4 * 4 * np.median(sums.squares["fc1.weight"]))
    added[3, 3] = 0
    assert not added.any()


def test_larger_planted_deviations_are_seen_sooner():
    sums, scoring = sums_of(example_log(ROUNDS, num_malicious=0)), reference().scoring
    low, high = smallest_seen(sums, scoring, -1.0), smallest_seen(sums, scoring, 1.0)
    assert low is not None
    assert high is None or low <= high


def test_who_claims_many_times_the_examples_of_others_is_ambiguous_not_accused(null):
    log = example_log(ROUNDS, num_malicious=2)
    many = [replace(r, num_examples=np.where(np.arange(10) == 9, 1_000, 100)) for r in log]
    case = investigate(UpdateLog(log.model, many), null)
    assert "client-9" in case.ambiguous["client"].tolist()
    assert "client-9" not in case.suspects["client"].tolist()


def test_several_cases_are_adjusted_for_their_number(null):
    cases = {
        "attacked": investigate(example_log(ROUNDS, num_malicious=2), null),
        "free": investigate(free_logs(1, first=301)[0], null),
        "small": investigate(example_log(num_clients=3), null),
    }
    table = table_of_cases(cases).set_index("recording")
    assert (table["q"].dropna() >= table["p"].dropna()).all()
    assert np.isnan(table.loc["small", "q"])
    assert not len(table_of_cases({}))


def test_the_reference_is_what_its_text_says():
    shipped = reference()
    assert len(shipped.settings) >= 30
    assert all(len(setting["last"]) >= 19 for setting in shipped.settings)
    assert all((setting["looks"] >= setting["last"]).all() for setting in shipped.settings)
    assert shipped.null().resolves <= 0.05
    assert (shipped.scoring.scales > 0).all()


def test_it_is_a_name_of_the_package(tmp_path):
    run = gradlens.open(example_run(tmp_path / "run"))
    assert isinstance(gradlens.investigate(run), gradlens.Case)
