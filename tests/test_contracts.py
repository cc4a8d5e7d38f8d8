"""One contract over every statistic x scorer, every detector, every aggregator of the tables.

`planted.CASES` names what an entry is tried on; entries of installed packages are not in the tables and need none.
"""

import re
from dataclasses import dataclass
from functools import cache, partial

import numpy as np
import pandas as pd
import pytest

import planted
from gradlens.aggregators import AGGREGATORS, filtered
from gradlens.detectors import DETECTORS, calibrate, score_by
from gradlens.errors import CannotSay, InputError
from gradlens.log import Round, UpdateLog
from gradlens.scorers import SCORERS
from gradlens.statistics import STATISTICS


def predict(state):
    """Class probabilities of a softmax over fixed hidden features, of the planted model's final layer."""
    hidden = np.random.default_rng(0).normal(size=(50, 6))
    logits = hidden @ state["fc2.weight"].T + state["fc2.bias"]
    odds = np.exp(logits - logits.max(axis=1, keepdims=True))
    return odds / odds.sum(axis=1, keepdims=True)


def own_update(log):
    """What the server's own data would give: here, the cohort's median."""
    return dict(log[-1].median)


# what a method needs besides the log
GIVEN_STATISTIC = {"ddif": partial(STATISTICS["ddif"], predict=predict)}
GIVEN_DETECTOR = {
    "deepsight": {"predict": predict},
    "fltrust": {"reference": own_update},
    "fldetector": {"window": 2, "start": 2},
    "flanders": {"window": 3, "iterations": 10},
}
BASIC = ("final_bias", "final_rows", "layer_norms", "layer_cosines", "accumulated_norms")  # with every scorer
GIVEN = {name: GIVEN_STATISTIC.get(name, statistic) for name, statistic in STATISTICS.items()}
PAIRS = {
    f"{statistic} x {scorer}": (score_by(GIVEN[statistic], SCORERS[scorer], 1.0), planted.CASES.get(statistic, ""))
    for statistic in STATISTICS
    for scorer in (SCORERS if statistic in BASIC else ["robust_zscore"])
}
NAMED = {name: (DETECTORS[name](**GIVEN_DETECTOR.get(name, {})), planted.CASES.get(name, "")) for name in DETECTORS}
CALIBRATED = {
    f"calibrated {name}": (calibrate(NAMED[name][0]), NAMED[name][1])
    for name in ("final_bias", "two_clusters", "panel")
}
CASES = PAIRS | NAMED | CALIBRATED
COUNTS = {NAMED["alignins"][0]}  # the share of a few signs, and the cosine to a global model of zeros

every_detector = pytest.mark.parametrize(("detector", "case"), CASES.values(), ids=list(CASES))
every_statistic = pytest.mark.parametrize("name", STATISTICS)
every_aggregator = pytest.mark.parametrize("name", AGGREGATORS)


@pytest.mark.parametrize(
    ("kind", "name"), [*(("statistic", name) for name in STATISTICS), *(("detector", name) for name in DETECTORS)]
)
def test_every_entry_has_a_planted_case(kind, name):
    assert planted.case_of(kind, name) in {*planted.PLANTED, ""}


def test_an_entry_without_a_planted_case_is_told_what_to_add():
    with pytest.raises(
        AssertionError, match=r"no planted case for detector 'x': add one to CASES in tests/planted\.py"
    ):
        planted.case_of("detector", "x")


@cache
def case_log(case):
    """The planted log of that name; it remembers verdicts, so that the tests share them."""
    return planted.PLANTED[case or "shifted class"].log()


@cache
def clean_log():
    return planted.clean_log()


@cache
def odd_log():
    """Eleven clients: two clusters of them cannot be equally large."""
    return planted.clean_log(clients=planted.CLIENTS[:11])


@cache
def log_without(client):
    return planted.without(case_log("shifted class"), client)


def scores_by_name(verdict):
    return pd.Series(verdict.scores, index=verdict.clients).sort_index()


def assert_same_scores(one, other):
    pd.testing.assert_series_equal(scores_by_name(one), scores_by_name(other), rtol=1e-9, atol=1e-9)


@every_detector
def test_order_of_clients_changes_nothing(detector, case, rng):
    log = case_log(case)
    shuffled = detector(planted.taken(log, rng.permutation(12)))
    assert_same_scores(shuffled, log.verdict(detector))


@every_detector
def test_later_rounds_change_nothing(detector, case):
    log = case_log(case)
    log.verdict(detector)  # and whatever is remembered of the later rounds
    known_before = planted.PLANTED[case or "shifted class"].log(rounds=2)
    assert_same_scores(detector(log[:2]), detector(known_before))


@every_detector
def test_equal_updates_get_equal_scores(detector, case):
    scores = scores_by_name(detector(planted.PLANTED["equal pair"].log()))
    assert scores["client-01"] == pytest.approx(scores["client-08"], rel=1e-9)


@every_detector
def test_where_all_are_equal_nobody_stands_out(detector, case):
    log = planted.Planted(planted.one_for_all, planted.CLIENTS).log()
    verdict = detector(log)
    assert len(np.unique(verdict.scores)) == 1
    assert not verdict.flags.any()


@every_detector
def test_planted_case_ranks_first(detector, case):
    if not case:
        pytest.skip("no case here: its own tests have one")
    culprits = planted.PLANTED[case].culprits
    scores = scores_by_name(detector(planted.PLANTED[case].log(rounds=8)))
    assert scores[list(culprits)].min() > scores.drop(list(culprits)).max()


@every_detector
def test_scores_are_finite_and_not_constant(detector, case):
    if case == "" or detector in COUNTS:
        pytest.skip("no number in this case, or a count of few coordinates")
    scores = odd_log().verdict(detector).scores
    assert np.isfinite(scores).all()
    assert len(np.unique(scores)) > 2


@every_detector
@pytest.mark.parametrize("value", [np.nan, np.inf, 1e6, 1e30])
def test_an_absurd_client_changes_no_other_score(detector, case, value):
    client = "client-07"
    verdict = detector(planted.with_client_at(case_log("shifted class"), value, client))
    expected = scores_by_name(log_without(client).verdict(detector))
    found = scores_by_name(verdict)
    assert found[client] == np.inf
    assert verdict.flags[verdict.clients == client].all()
    pd.testing.assert_series_equal(found.drop(client), expected, rtol=1e-9, atol=1e-9)


@every_detector
@pytest.mark.parametrize("count", [0, 1, 2])
def test_small_cohorts_abstain_and_say_so(detector, case, count):
    verdict = detector(planted.clean_log(clients=planted.CLIENTS[:count]))
    assert f"{count} comparable clients" in verdict.abstained
    assert verdict.null
    assert verdict.scores.tolist() == [0] * count
    assert not verdict.flags.any()


@every_detector
def test_three_clients_are_enough(detector, case):
    verdict = detector(planted.clean_log(clients=planted.CLIENTS[:3]))
    assert np.isfinite(verdict.scores).all()
    assert not verdict.abstained or re.search(r"\d", verdict.abstained)  # how many it needs, or has


@every_detector
def test_refused_clients_are_flagged_last(detector, case):
    log = planted.clean_log()
    last = log[-1]
    refusing = Round(9, last.clients, last.num_examples, last.updates, last.global_model, {"z": "no", "b": "no"})
    verdict = detector(log.append(refusing))
    assert verdict.clients.tolist() == [*planted.CLIENTS, "b", "z"]
    assert verdict.scores[-2:].tolist() == [np.inf, np.inf]
    assert verdict.flags[-2:].all()
    assert np.isfinite(verdict.scores[:-2]).all()


@every_detector
def test_inputs_stay_and_answers_repeat(detector, case):
    log = planted.PLANTED[case or "shifted class"].log()
    before = [{name: np.array(a) for name, a in r.updates.items()} for r in log]
    np.testing.assert_array_equal(detector(log).scores, case_log(case).verdict(detector).scores)
    for round_, arrays in zip(log, before, strict=True):
        for name, array in arrays.items():
            np.testing.assert_array_equal(round_.updates[name], array)


@every_detector
def test_detectors_are_values(detector, case):
    assert {detector: 1}[detector] == 1
    assert "object at 0x" not in repr(detector)
    assert clean_log().verdict(detector).null


@pytest.mark.parametrize("table", [STATISTICS, SCORERS])
def test_tables_hold_functions_under_their_own_name(table):
    assert [function.__name__ for function in table.values()] == list(table)


@every_statistic
def test_statistic_has_a_row_per_client_and_a_column_per_feature(name):
    log = planted.PLANTED["shifted class"].log()
    table = GIVEN[name](log)
    assert table.index.tolist() == list(planted.CLIENTS)
    assert table.index.name == "client"
    assert all(column.split("[")[0] in (*planted.LAYERS, "update") for column in table.columns)
    assert np.isfinite(table.to_numpy()).all()


@every_statistic
@pytest.mark.parametrize("value", [np.nan, 1e30])
def test_statistic_has_no_numbers_of_an_absurd_client(name, value):
    log = planted.clean_log()
    table = GIVEN[name](planted.with_client_at(log, value))
    assert table.loc[planted.CULPRIT].isna().all()
    others = GIVEN[name](planted.without(log))
    pd.testing.assert_frame_equal(table.drop(index=planted.CULPRIT), others, rtol=1e-12)


@every_statistic
@pytest.mark.parametrize("count", [0, 1, 2])
def test_statistic_cannot_say_of_small_cohorts(name, count):
    with pytest.raises(CannotSay, match=f"{count} comparable clients"):
        GIVEN[name](planted.clean_log(clients=planted.CLIENTS[:count]))


# Aggregators

NOISY = {"weak_dp": {"std": 0.0}, "flame": {"noise": 0.0}, "crfl": {"std": 0.0}}  # what takes the noise away
# stays inside the coordinate range of the clients
IN_RANGE = {
    "mean", "median", "trimmed_mean", "geometric_median", "krum", "multi_krum", "bulyan", "nearest_neighbour_mixing",
    "bucketing",
}  # fmt: skip
OUTVOTES = {"median", "trimmed_mean"}  # stays inside the benign coordinate range while fewer than half are malicious
# of 12 clients; nearest-neighbour mixing and buckets around a median
TOLERATES = {
    "krum": 4, "multi_krum": 4, "geometric_median": 5, "bulyan": 2, "nearest_neighbour_mixing": 5, "bucketing": 2,
    "flame": 5,
}  # fmt: skip
CLIPPED = ("norm_clipping", "weak_dp", "centred_clipping", "flame")


def updates_of(log: UpdateLog, name: str) -> np.ndarray:
    return np.asarray(log[-1].updates[name], np.float64)


def million(updates, who):
    for layer in planted.LAYERS:
        updates[layer][who] = 1e6


def assert_same_update(one, other):
    assert list(one) == list(other)
    for name in one:
        assert one[name].dtype == other[name].dtype
        np.testing.assert_array_equal(one[name], other[name])


@every_aggregator
def test_order_of_clients_changes_no_bit_of_the_aggregate(name, rng):
    log = planted.clean_log()
    assert_same_update(AGGREGATORS[name]()(planted.taken(log, rng.permutation(12))), AGGREGATORS[name]()(log))


@every_aggregator
def test_aggregate_has_the_layers_of_the_model(name):
    aggregate = AGGREGATORS[name]()(planted.clean_log())
    assert {n: (a.shape, str(a.dtype)) for n, a in aggregate.items()} == {
        layer.name: (layer.shape, layer.dtype) for layer in planted.MODEL.layers
    }
    assert all(isinstance(array, np.ndarray) for array in aggregate.values())


@every_aggregator
def test_equal_updates_come_back(name):
    log = planted.Planted(planted.one_for_all, planted.CLIENTS).log()
    for layer, array in AGGREGATORS[name](**NOISY.get(name, {}))(log).items():
        np.testing.assert_array_equal(array, log[-1].updates[layer][0])


@pytest.mark.parametrize("name", sorted(IN_RANGE & set(AGGREGATORS)))
def test_aggregate_stays_inside_the_coordinate_range(name):
    log = planted.PLANTED["boosted"].log()
    for layer, array in AGGREGATORS[name]()(log).items():
        assert (array >= updates_of(log, layer).min(axis=0) - 1e-6).all()
        assert (array <= updates_of(log, layer).max(axis=0) + 1e-6).all()


@pytest.mark.parametrize("name", sorted(OUTVOTES & set(AGGREGATORS)))
def test_aggregate_is_bounded_when_fewer_than_half_send_a_million(name):
    log = planted.clean_log()
    attacked = planted.edited(log, million, planted.CLIENTS[:5])
    for layer in planted.LAYERS:
        benign = updates_of(log, layer)[5:]
        array = AGGREGATORS[name]()(attacked)[layer]
        assert (array >= benign.min(axis=0)).all()
        assert (array <= benign.max(axis=0)).all()


@pytest.mark.parametrize("name", TOLERATES)
def test_as_many_as_a_rule_tolerates_move_it_no_farther_than_the_benign_are_apart(name):
    """Of 12 clients that many send a million in each number: the update stays among the benign ones."""
    log, rule = planted.clean_log(), AGGREGATORS[name]
    culprits, benign = planted.CLIENTS[: TOLERATES[name]], planted.CLIENTS[TOLERATES[name] :]
    attacked = planted.edited(log, million, culprits)
    rows = np.isin(log[-1].clients, benign)
    inner = {"rule": "median"} if name in ("nearest_neighbour_mixing", "bucketing") else {}
    found, clean = rule(**inner)(attacked), log[-1].take(rows)
    for layer in planted.LAYERS:
        spread = np.ptp(updates_of(log, layer)[rows], axis=0).max()
        centre = clean.weighted_mean(layer, np.arange(len(benign)), np.ones(len(benign)))
        assert np.abs(found[layer] - centre).max() <= spread


@pytest.mark.parametrize("name", CLIPPED)
@pytest.mark.parametrize("value", [1e6, 1e30])
def test_a_client_of_any_length_moves_a_clipping_rule_by_one_client(name, value):
    """By the median norm, at most the share of one client: what it would do at that norm."""
    log, rule = planted.clean_log(), AGGREGATORS[name](**NOISY.get(name, {}))
    found, without = rule(planted.with_client_at(log, value)), rule(planted.without(log))
    norms = np.sqrt(sum(log[-1].norms[layer] ** 2 for layer in planted.LAYERS))
    moved = sum(np.square(np.asarray(found[layer] - without[layer], np.float64)).sum() for layer in planted.LAYERS)
    assert np.sqrt(moved) <= 3 * np.median(norms) / 12


@every_aggregator
def test_a_client_of_absurd_length_makes_no_number_that_is_none(name):
    found = AGGREGATORS[name]()(planted.with_client_at(planted.clean_log(), 1e30))
    assert all(np.isfinite(array).all() for array in found.values())


@every_aggregator
@pytest.mark.parametrize("count", [1, 2])
def test_one_or_two_clients_are_enough_for_an_update(name, count):
    """Each number lies between the clients' own, or nearer to zero where it was clipped."""
    log = planted.clean_log(clients=planted.CLIENTS[:count])
    found = AGGREGATORS[name](**NOISY.get(name, {}))(log)
    for layer in planted.LAYERS:
        numbers = updates_of(log, layer)
        if name == "rlr":  # turns round where two disagree
            numbers = np.concatenate([numbers, -numbers])
        low, high = np.minimum(numbers.min(axis=0), 0), np.maximum(numbers.max(axis=0), 0)  # clipped: towards zero
        assert (found[layer] >= low - 1e-6).all()
        assert (found[layer] <= high + 1e-6).all()
        assert found[layer].any()


@every_aggregator
def test_replaying_a_prefix_gives_the_same_bits(name):
    """Whatever was asked of later rounds, or of this one before."""
    log, rule = planted.PLANTED["boosted"].log(), AGGREGATORS[name]()
    later = rule(log)
    assert_same_update(rule(log[:2]), rule(planted.PLANTED["boosted"].log(rounds=2)))
    assert_same_update(rule(log), later)


def test_a_client_that_comes_twice_is_no_round():
    last = planted.clean_log()[-1]
    with pytest.raises(InputError, match="client 'client-00' appears twice"):
        Round(0, np.array(["client-00"] * 12), last.num_examples, last.updates, last.global_model)


@every_aggregator
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_never_enters(name, value):
    log = planted.clean_log()
    found = AGGREGATORS[name]()(planted.with_client_at(log, value))
    assert_same_update(found, AGGREGATORS[name]()(planted.without(log)))


@every_aggregator
def test_without_clients_the_update_is_zero(name):
    aggregate = AGGREGATORS[name]()(planted.clean_log(clients=()))
    assert {n: (a.shape, a.dtype) for n, a in aggregate.items()} == {
        n: (a.shape, a.dtype) for n, a in planted.STATE.items()
    }
    assert all((array == 0).all() for array in aggregate.values())


@dataclass(frozen=True)
class Flags:
    """A detector that flags the clients it is told to."""

    names: frozenset[str]

    def __call__(self, log):
        verdict = DETECTORS["final_bias"]()(log)
        flags = np.isin(verdict.clients, sorted(self.names))
        return type(verdict)(verdict.clients, flags.astype(float), flags)


@every_aggregator
def test_a_filter_that_flags_nobody_equals_its_inner_rule(name):
    log, rule = planted.clean_log(), AGGREGATORS[name]()
    assert_same_update(filtered(rule, Flags(frozenset()))(log), rule(log))


@every_aggregator
def test_a_filter_leaves_out_whom_it_flags(name):
    log, rule = planted.clean_log(), AGGREGATORS[name]()
    found = filtered(rule, Flags(frozenset({planted.CULPRIT})))(log)
    assert_same_update(found, rule(planted.without(log)))


@every_aggregator
def test_a_filter_that_flags_everybody_keeps_the_global_model(name):
    aggregate = filtered(AGGREGATORS[name](), Flags(frozenset(planted.CLIENTS)))(planted.clean_log())
    assert all((array == 0).all() for array in aggregate.values())


@every_aggregator
def test_aggregators_are_values(name):
    assert AGGREGATORS[name]() == AGGREGATORS[name]()
    assert len({AGGREGATORS[name](), AGGREGATORS[name]()}) == 1
    assert repr(AGGREGATORS[name]()).startswith(f"{name}(")
