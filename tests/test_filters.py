"""What a filter does with a verdict: its actions, its memory, its fallbacks, and what it says of them."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

import planted
from gradlens.aggregators import (
    AGGREGATORS,
    FilterStopped,
    clipped,
    filtered,
    krum,
    mean,
    median,
    multi_krum,
    noised,
    trimmed_mean,
)
from gradlens.detectors import DETECTORS, Verdict, score_by
from gradlens.detectors.verdict import verdict_on
from gradlens.errors import InputError
from gradlens.log import Round, UpdateLog
from gradlens.run import VERDICT_COLUMNS
from gradlens.scorers import robust_zscore
from gradlens.statistics import layer_norms

STATE = {"w": np.zeros(2, np.float32)}
ALL = frozenset("abcd")


@dataclass(frozen=True)
class Said:
    """A detector that says what it is told to: per round the flagged clients; scores, weights, an abstention."""

    flags: tuple[str, ...]
    scores: tuple[float, ...] = ()
    weights: tuple[float, ...] = ()
    abstained: str = ""

    def __call__(self, log: UpdateLog) -> Verdict:
        round_ = log[-1]
        named = np.isin(round_.clients, list(self.flags[round_.index] if self.flags else ""))
        scores = np.array(self.scores) if self.scores else named * 1.0
        verdict = verdict_on(round_, scores, np.inf, abstained=self.abstained, null="told")
        verdict.flags[: len(round_)] |= named
        weights = np.concatenate([self.weights, np.zeros(len(round_.refused))]) if self.weights else None
        return replace(verdict, weights=weights)


def log_of(w, rounds=1, refused=None):
    w = np.array(w, np.float32)
    clients = np.array(list("abcdefgh")[: len(w)], dtype=np.str_)
    state = planted.log_of({"w": w}, STATE)
    made = [Round(i, clients, np.full(len(w), 10), {"w": w}, STATE, refused or {}) for i in range(rounds)]
    return UpdateLog(state.model, made)


W = [[3, 4], [0, 5], [5, 0], [30, 40]]  # of norms 5, 5, 5, 50


def weights_of(rule, log):
    decision = rule.decision(log)
    return dict(zip(decision.clients.tolist(), decision.weights.tolist(), strict=True))


def reasons_of(rule, log):
    decision = rule.decision(log)
    return dict(zip(decision.clients.tolist(), decision.reasons.tolist(), strict=True))


# Actions


def test_drop():
    rule = filtered(mean(), Said(("d",)))
    np.testing.assert_allclose(rule(log_of(W))["w"], [8 / 3, 3])
    assert weights_of(rule, log_of(W)) == {"a": 1, "b": 1, "c": 1, "d": 0}
    assert reasons_of(rule, log_of(W)) == {"a": "", "b": "", "c": "", "d": "flagged"}
    assert rule.kept(log_of(W)).tolist() == [True, True, True, False]


def test_clip_takes_the_flagged_to_the_median_norm_of_the_others():
    rule = filtered(mean(), Said(("d",)), action="clip")
    np.testing.assert_allclose(rule(log_of(W))["w"], [11 / 4, 13 / 4])  # d counts as (3, 4)
    assert weights_of(rule, log_of(W)) == {"a": 1, "b": 1, "c": 1, "d": 0.1}
    assert reasons_of(rule, log_of(W))["d"] == "flagged, clipped"
    short = filtered(mean(), Said(("a",)), action="clip")  # is not longer than they: stays as it is
    np.testing.assert_array_equal(short(log_of(W[:3]))["w"], mean()(log_of(W[:3]))["w"])


def test_weighing_down_by_the_weights_of_the_verdict():
    rule = filtered(mean(), Said((), weights=(1, 0.5, 0, 0.25)), action="down_weight")
    expected = (np.array(W[0]) + 0.5 * np.array(W[1]) + 0.25 * np.array(W[3])) / 1.75
    np.testing.assert_allclose(rule(log_of(W))["w"], expected, rtol=1e-6)
    assert weights_of(rule, log_of(W)) == {"a": 1, "b": 0.5, "c": 0, "d": 0.25}
    assert reasons_of(rule, log_of(W))["b"] == "weighed down"


def test_weighing_down_by_the_documented_rule():
    """Scores 0, 1, 2, 10: median 1.5, MAD 1, so z of d is 8.5 / 1.4826; c is flagged at z below 2 and counts 1/2."""
    rule = filtered(mean(), Said(("cd",), scores=(0, 1, 2, 10)), action="down_weight")
    found = weights_of(rule, log_of(W))
    assert found == {"a": 1, "b": 1, "c": 0.5, "d": pytest.approx(1.4826 / 8.5)}
    expected = np.average(np.array(W), axis=0, weights=list(found.values()))
    np.testing.assert_allclose(rule(log_of(W))["w"], expected, rtol=1e-6)
    even = filtered(mean(), Said(("d",), scores=(1, 1, 1, 2)), action="down_weight")
    assert weights_of(even, log_of(W))["d"] == 0.5  # no spread


@given(data=st.data(), weighted=st.booleans(), around=st.sampled_from(["mean", "noised", "clipped"]))
def test_weighing_down_gives_the_weighted_mean_of_what_each_counts(data, weighted, around):
    """Sum of examples x weight x update over the sum of examples x weight, claims capped over who counts at all."""
    count = data.draw(st.integers(2, 8))
    number = st.floats(-4, 4, width=32)
    w = np.array(data.draw(st.lists(st.tuples(number, number), min_size=count, max_size=count)), np.float32)
    weights = data.draw(st.lists(st.sampled_from([0, 0.01, 0.25, 0.5, 1]), min_size=count, max_size=count))
    examples = np.array(data.draw(st.lists(st.integers(0, 1_000_000), min_size=count, max_size=count)))
    assume(any(weights))
    rule = mean(weighted, cap=10)
    rule = {"mean": rule, "noised": noised(rule, 0), "clipped": clipped(rule, 1e9)}[around]
    log = log_of(w)
    log = UpdateLog(log.model, [replace(log[0], num_examples=examples)])
    assume(log[0].comparable.all())  # a client that is far longer than the median never enters
    found = filtered(rule, Said((), weights=tuple(weights)), action="down_weight")(log)["w"]
    counts = np.array(weights) > 0
    claims = np.minimum(examples, 10 * np.median(examples[counts])) if weighted else np.ones(count)
    claims = claims if claims[counts].any() else np.ones(count)
    counted = claims * weights
    oracle = (counted[:, None] * w.astype(np.float64)).sum(axis=0) / counted.sum()
    np.testing.assert_allclose(found, oracle, rtol=1e-6, atol=1e-6)


def test_record_changes_nothing_but_is_told():
    rule = filtered(mean(), Said(("d",)), action="record")
    np.testing.assert_array_equal(rule(log_of(W))["w"], mean()(log_of(W))["w"])
    decision = rule.decision(log_of(W))
    assert decision.verdict.flags.tolist() == [False, False, False, True]
    assert decision.weights.tolist() == [1, 1, 1, 1]
    assert decision.outcome == "only recorded"


@pytest.mark.parametrize("action", ["drop", "down_weight", "clip"])
@pytest.mark.parametrize("value", [np.nan, 1e30])
def test_who_is_not_comparable_moves_nothing_whatever_the_action(action, value):
    log = log_of([*W[:3], [value, value]], refused={"z": "sent nothing"})
    rule = filtered(mean(), Said(("",)), action=action)
    found = rule(log)["w"]
    np.testing.assert_allclose(found, rule(log_of(W[:3]))["w"], atol=5)  # at most by one clipped update
    assert reasons_of(rule, log)["z"] == "refused: sent nothing"
    assert reasons_of(rule, log)["d"].startswith("not finite" if np.isnan(value) else "too long to be compared")
    assert weights_of(rule, log)["z"] == 0


@pytest.mark.parametrize("name", AGGREGATORS)
@pytest.mark.parametrize("action", ["drop", "down_weight", "clip", "record"])
def test_where_nobody_is_flagged_every_action_is_the_rule_itself(name, action):
    log, rule = planted.clean_log(), AGGREGATORS[name]()
    found = filtered(rule, score_by(layer_norms, robust_zscore, 1e9), action=action)(log)
    for layer, array in rule(log).items():
        np.testing.assert_array_equal(found[layer], array)


def test_f_is_counted_anew():
    """With three of eight flagged five are left, of whom Krum stands one whatever it was told."""
    rng = np.random.default_rng(0)
    w = rng.normal(size=(8, 2)).astype(np.float32)
    flagged = Said(("fgh",))
    for rule in (krum(3), multi_krum(3), trimmed_mean(3), AGGREGATORS["bulyan"](1)):
        np.testing.assert_array_equal(filtered(rule, flagged)(log_of(w))["w"], rule(log_of(w[:5]))["w"])
    most = filtered(multi_krum(3), flagged)(log_of(w))["w"]
    np.testing.assert_array_equal(most, multi_krum(1)(log_of(w[:5]))["w"])


# Memory


FLAGS = ("d", "", "a", "", "")  # by round


def outs(rule, rounds=5):
    """Per round, who does not count fully."""
    log = log_of(W, rounds)
    return ["".join(c for c, w in weights_of(rule, prefix).items() if w < 1) for prefix in log.prefixes()]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, ["d", "", "a", "", ""]),
        ({"out_for": 1}, ["d", "d", "a", "a", ""]),
        ({"out_for": 2}, ["d", "d", "ad", "a", "a"]),
        ({"out_for": None}, ["d", "d", "ad", "ad", "ad"]),
        ({"out_for": None, "cleared": {"d"}}, ["d", "", "a", "a", "a"]),  # a flag of this round still counts
        ({"out_for": None, "action": "record"}, ["", "", "", "", ""]),
    ],
)
def test_memory(settings, expected):
    assert outs(filtered(mean(), Said(FLAGS), **settings)) == expected


@pytest.mark.parametrize("action", ["clip", "down_weight"])
def test_who_was_flagged_earlier_counts_as_flagged(action):
    rule = filtered(mean(), Said(FLAGS), action=action, out_for=2)
    log = log_of(W, 2)
    assert weights_of(rule, log)["d"] == (0.1 if action == "clip" else 0.5)
    assert reasons_of(rule, log)["d"].startswith("flagged in round 0, ")


def test_memory_is_that_of_the_log():
    """Asked once at the end, round by round, or again after more rounds: the same."""
    rule = filtered(median(), Said(FLAGS), out_for=2)
    log, other = log_of(W, 5), log_of(W, 5)
    by_round = [rule(prefix)["w"] for prefix in log.prefixes()]
    backwards = [rule(other[: k + 1])["w"] for k in reversed(range(5))][::-1]
    for one, two in zip(by_round, backwards, strict=True):
        np.testing.assert_array_equal(one, two)
    kept = log.keep(np.array([0, 1, 3]))
    assert weights_of(rule, kept) == {"a": 0, "b": 1, "d": 1}


# When nobody is left, and when the detector abstains


@pytest.mark.parametrize("action", ["drop", "clip", "down_weight"])
@pytest.mark.parametrize("fallback", ["keep_model", "use_all", "stop"])
def test_everybody_is_flagged(action, fallback):
    rule = filtered(mean(), Said(("abcd",)), action=action, when_all_flagged=fallback)
    log = log_of(W, refused={"z": "sent nothing"})
    decision = rule.decision(log)
    assert decision.outcome == f"everybody is flagged: {fallback}"
    assert decision.weights.tolist() == [*[fallback == "use_all"] * 4, 0]
    if fallback == "stop":
        assert decision.stopped
        with pytest.raises(FilterStopped, match="round 0: everybody is flagged") as stopped:
            rule(log)
        assert isinstance(stopped.value, InputError)
        assert "\n" not in str(stopped.value)
        return
    expected = mean()(log)["w"] if fallback == "use_all" else [0, 0]
    np.testing.assert_array_equal(rule(log)["w"], expected)


@pytest.mark.parametrize("fallback", ["keep_model", "use_all", "stop"])
def test_the_detector_abstains(fallback):
    rule = filtered(mean(), Said((), abstained="too few"), when_abstained=fallback)
    log = log_of([*W, [np.nan, 0]])
    decision = rule.decision(log)
    assert decision.outcome == f"the detector abstained: {fallback}"
    assert decision.weights.tolist() == [*[fallback == "use_all"] * 4, 0]
    if fallback == "stop":
        with pytest.raises(FilterStopped, match="the detector abstained"):
            rule(log)
    else:
        expected = mean()(log_of(W))["w"] if fallback == "use_all" else [0, 0]
        np.testing.assert_array_equal(rule(log)["w"], expected)


def test_using_all_trusts_nobody_whom_no_verdict_trusts():
    log = log_of([*W[:3], [np.nan, 0], [1e30, 0]])
    rule = filtered(mean(), Said(("abcde",)), when_all_flagged="use_all")
    np.testing.assert_array_equal(rule(log)["w"], mean()(log_of(W[:3]))["w"])


@pytest.mark.parametrize("name", ["mean", "krum", "weak_dp", "bucketing", "flame", "crfl"])
def test_a_round_without_clients_moves_nothing(name):
    rule = filtered(AGGREGATORS[name](), DETECTORS["layer_norms"](), when_all_flagged="stop")
    update = rule(planted.clean_log(clients=()))
    assert not any(array.any() for array in update.values())


# What is told


def test_the_table_of_a_decision():
    rule = filtered(mean(), Said(("cd",)), action="clip")
    table = rule.decision(log_of(W, refused={"z": "sent nothing"})).table(7, "told")
    assert tuple(table.columns) == VERDICT_COLUMNS
    assert table["round"].tolist() == [7] * 5
    assert table["kept"].tolist() == [True] * 4 + [False]
    assert table["weight"].tolist() == [1, 1, 1, 0.1, 0]
    assert table["reason"].tolist() == ["", "", "", "flagged, clipped", "refused: sent nothing"]
    stays = filtered(mean(), Said(("abcd",))).decision(log_of(W)).table(0, "told")
    assert set(stays["reason"]) == {"flagged; everybody is flagged: keep_model"}


def test_settings_show_and_compare():
    rule = filtered(mean(), Said(()), action="clip", out_for=None, cleared=["b", "a"])
    assert repr(rule).endswith(", action='clip', out_for=None, cleared=['a', 'b'])")
    assert rule == filtered(mean(), Said(()), action="clip", out_for=None, cleared={"a", "b"})
    assert rule != filtered(mean(), Said(()), action="clip", out_for=None)
    assert hash(rule) == hash(filtered(mean(), Said(()), action="clip", out_for=None, cleared={"a", "b"}))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"action": "ignore"}, "action is one of drop, down_weight, clip, record, found 'ignore'"),
        ({"out_for": -1}, "out_for is a number of rounds, or None until cleared, found -1"),
        ({"out_for": True}, "out_for"),
        ({"when_all_flagged": "crash"}, "when_all_flagged is one of keep_model, use_all, stop"),
        ({"when_abstained": None}, "when_abstained is one of"),
        ({"cleared": "client-01"}, "cleared is a set of clients' names"),
    ],
)
def test_wrong_settings_are_refused_in_one_line(settings, message):
    with pytest.raises(InputError, match=message):
        filtered(mean(), Said(()), **settings)


def test_ten_thousand_clients_are_decided_quickly():
    """No step compares all clients with all others."""
    clients = np.array([f"{i:05d}" for i in range(10_000)])
    w = np.random.default_rng(0).normal(size=(10_000, 2)).astype(np.float32)
    log = UpdateLog(log_of(W).model, [Round(0, clients, np.ones(10_000), {"w": w}, STATE)])
    for action in ("drop", "clip", "down_weight"):
        rule = filtered(AGGREGATORS["norm_clipping"](), score_by(layer_norms, robust_zscore, 2.5), action=action)
        assert 0 < rule.decision(log).verdict.flags.mean() < 0.1
        assert np.isfinite(rule(log)["w"]).all()
