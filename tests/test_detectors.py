"""Detectors, verdicts and calibration."""

from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from scipy import stats

import planted
from gradlens.detectors import DETECTORS, Verdict, calibrate, detect, score_by
from gradlens.errors import CannotSay, InputError
from gradlens.log import Round, UpdateLog
from gradlens.scorers import local_outlier_factor, robust_zscore, zscore
from gradlens.statistics import final_bias, layer_norms

COLUMNS = ["round", "client", "detector", "score", "flag", "abstained"]


def attack_free(runs: int, rounds: int = 6):
    return [planted.clean_log(rounds, seed=seed) for seed in range(10, 10 + runs)]


# score_by


def test_score_by_is_the_scorer_of_the_statistic():
    log = planted.PLANTED["boosted"].log()
    verdict = score_by(layer_norms, robust_zscore, threshold=4)(log)
    expected = robust_zscore(layer_norms(log))
    np.testing.assert_array_equal(verdict.scores, expected)
    np.testing.assert_array_equal(verdict.flags, expected > 4)
    assert verdict.clients[verdict.flags].tolist() == [planted.CULPRIT]
    assert verdict.evidence is not None
    pd.testing.assert_frame_equal(verdict.evidence, layer_norms(log))
    assert verdict.null == "uncalibrated: threshold 4"


def test_textbook_threshold_is_called_that():
    assert DETECTORS["final_bias"]()(planted.clean_log()).null == "uncalibrated: textbook 3.5"
    assert DETECTORS["final_bias"](threshold=5)(planted.clean_log()).null == "uncalibrated: threshold 5"


def test_flags_are_above_the_threshold_not_at_it():
    verdict = score_by(layer_norms, lambda features: np.arange(12.0), threshold=10)(planted.clean_log())
    assert verdict.flags.nonzero()[0].tolist() == [11]


def test_repr_tells_what_it_does():
    assert repr(DETECTORS["final_bias"]()) == "score_by(final_bias, robust_zscore, threshold=3.5)"
    with_settings = score_by(layer_norms, partial(local_outlier_factor, neighbours=4), 1.5)
    assert repr(with_settings) == "score_by(layer_norms, partial(local_outlier_factor, neighbours=4), threshold=1.5)"


def test_equal_detectors_are_one_to_a_log():
    assert DETECTORS["final_bias"]() == DETECTORS["final_bias"](threshold=3.5)
    assert DETECTORS["final_bias"]() != DETECTORS["final_bias"](threshold=3)
    log = planted.clean_log()
    assert log.verdict(DETECTORS["final_bias"]()) is log.verdict(DETECTORS["final_bias"]())


@pytest.mark.parametrize("answer", [np.zeros(3), np.full(12, np.nan), np.zeros((12, 1))])
def test_a_scorer_without_a_number_per_client_is_refused(answer):
    with pytest.raises(InputError, match="one number per client, 12"):
        score_by(layer_norms, lambda features: answer, 1)(planted.clean_log())


def test_a_scorer_cannot_clear_who_is_not_comparable():
    log = planted.with_client_at(planted.clean_log(), 1e30)
    verdict = score_by(layer_norms, lambda features: np.zeros(12), 1)(log)
    assert verdict.clients[verdict.flags].tolist() == [planted.CULPRIT]


def test_abstention_keeps_who_is_refused_or_not_finite_flagged():
    log = planted.with_client_at(planted.clean_log(clients=planted.CLIENTS[4:7]), np.nan)
    last = log[-1]
    log = log.append(Round(4, last.clients, last.num_examples, last.updates, last.global_model, {"x": "sent nothing"}))
    verdict = DETECTORS["layer_norms"]()(log)
    assert verdict.abstained == "round 4 has 2 comparable clients, at least 3 are needed"
    assert verdict.clients.tolist() == ["client-04", "client-05", "client-06", "x"]
    assert verdict.scores.tolist() == [0, np.inf, 0, np.inf]
    assert verdict.flags.tolist() == [False, True, False, True]


def test_a_scorer_may_abstain_too():
    def speechless(features):
        raise CannotSay("too few features")

    verdict = score_by(layer_norms, speechless, 1)(planted.clean_log())
    assert (verdict.abstained, verdict.scores.tolist()) == ("too few features", [0] * 12)


def test_verdict_as_a_table():
    verdict = Verdict(np.array(["a", "b"]), np.array([1.0, np.inf]), np.array([False, True]), abstained="why")
    table = verdict.table(7, "some")
    assert table.columns.tolist() == COLUMNS
    assert table.to_numpy().tolist() == [[7, "a", "some", 1.0, False, "why"], [7, "b", "some", np.inf, True, "why"]]


# calibrate


def null_scores(detector, logs):
    return np.concatenate([detector(prefix).scores for log in logs for prefix in log.prefixes()])


@pytest.mark.parametrize("fpr", [0.05, 0.07, 0.25])
def test_threshold_is_the_rank_of_the_null_scores(fpr):
    """Where each client has one score: the k-th smallest, k = ceil((m + 1)(1 - fpr))."""
    detector, logs = DETECTORS["final_bias"](), attack_free(12, rounds=1)
    scores = np.sort(null_scores(detector, logs))
    m = len(scores)
    k = next(k for k in range(m + 2) if k >= (m + 1) * (1 - fpr) - 1e-9)  # the smallest integer that is as large
    assert m == 144
    assert calibrate(detector, logs, fpr).threshold == scores[k - 1]  # type: ignore[attr-defined]


@pytest.mark.parametrize("fpr", [0.05, 0.1, 0.25])
def test_threshold_is_where_the_clients_shares_above_it_add_up_to_the_rate(fpr):
    """By its definition: each client weighs 1, each of its six scores a sixth."""
    detector, logs = DETECTORS["final_bias"](), attack_free(2, rounds=6)
    by_client = [np.array([detector(p).scores for p in log.prefixes()]).T for log in logs]  # [client, round]
    table = np.concatenate(by_client)
    assert table.shape == (24, 6)
    allowed = 25 * fpr - 1 + 1e-9
    expected = min(t for t in table.ravel() if (table > t).mean(axis=1).sum() <= allowed)
    assert calibrate(detector, logs, fpr).threshold == expected  # type: ignore[attr-defined]


def test_rank_of_nineteen_and_twenty_scores():
    """19 scores and 5 %: of 20 exchangeable ones the largest is flagged, so the threshold is the largest of 19."""
    detector = score_by(layer_norms, lambda features: features.index.str[-2:].astype(float).to_numpy(), 0)
    nineteen = planted.clean_log(1, clients=[f"client-{i:02d}" for i in range(1, 20)])
    assert calibrate(detector, [nineteen], 0.05).threshold == 19  # type: ignore[attr-defined]
    many = planted.clean_log(1, clients=[f"client-{i:02d}" for i in range(1, 100)])
    assert 100 * 0.29 < 29  # in floating point; k = 100 - 29
    assert calibrate(detector, [many], 0.29).threshold == 71  # type: ignore[attr-defined]


def test_a_clients_rounds_do_not_make_a_null_larger():
    """60 clients cannot tell 1 %, however many rounds there are; what would do is said."""
    clients = [f"client-{i:02d}" for i in range(20)]
    logs = [planted.clean_log(8, seed=seed, clients=clients) for seed in (1, 2, 3)]
    inner = DETECTORS["layer_norms"]()
    problem = (
        r"fpr 0.01 needs 99 clients with a score, found 60 \(attack-free: 3 runs\); rounds of the same client count "
    )
    with pytest.raises(InputError, match=problem + r"once: give 5 such runs or set fpr to at least 0.017"):
        calibrate(inner, logs, 0.01)
    assert calibrate(inner, logs, 0.017)(logs[0]).null == "attack-free: 3 runs, 60 clients, 480 scores, fpr 0.017"
    with pytest.raises(
        InputError, match=r"found 20 \(declared clean: rounds 0 to 7\).*once: set fpr to at least 0.048"
    ):
        calibrate(inner, logs[0], 0.01)


@dataclass(frozen=True)
class Recalls:
    """Scores each client by a number in its name, the same in each round."""

    def __call__(self, log):
        scores = np.array([float(client.split("_")[-1]) for client in log[-1].clients])
        return Verdict(log[-1].clients, scores, np.zeros(len(scores), bool))


def test_rate_of_clients_that_never_change(rng):
    """A client's score stays: 30 clients of ten rounds tell no more than of one, and the rate holds all the same."""
    passed = []
    for _ in range(60):
        names = [f"client_{score:.6f}" for score in rng.normal(size=30)]
        threshold = calibrate(Recalls(), [planted.clean_log(10, clients=names)], 0.05).threshold
        passed.append(stats.norm.sf(threshold))
    # above the largest of 30 lies 1 / 31 on average; above the second, which 300 independent scores would give, 2 / 31
    assert abs(np.mean(passed) - 1 / 31) < 5 * (1 / 31) / np.sqrt(60)
    assert np.mean(passed) < 0.05


def test_calibrated_rate_holds_on_other_seeds():
    """900 exchangeable updates at 10 %: the flagged ones are 90 +- 5 sigma of a binomial and its threshold's own."""
    detector = calibrate(DETECTORS["layer_norms"](), attack_free(25, rounds=3), 0.1)
    flags = np.concatenate([detector(planted.clean_log(1, seed=s)).flags for s in range(200, 275)])
    assert len(flags) == 900
    assert abs(flags.mean() - 0.1) < 5 * np.sqrt(0.1 * 0.9 / 900 * 2)


def test_calibrated_scores_are_the_detectors_own():
    log, inner = planted.PLANTED["shifted class"].log(), DETECTORS["final_bias"]()
    detector = calibrate(inner, attack_free(9), 0.01)
    found, expected = detector(log), inner(log)
    np.testing.assert_array_equal(found.scores, expected.scores)
    assert found.evidence is expected.evidence or found.evidence.equals(expected.evidence)
    assert found.null == "attack-free: 9 runs, 108 clients, 648 scores, fpr 0.01"
    assert found.clients[found.flags].tolist() == [planted.CULPRIT]


def test_a_stretch_declared_clean_is_a_null():
    log = planted.clean_log(6)
    detector = calibrate(DETECTORS["final_bias"](), log[2:], 0.1)
    table = np.array([DETECTORS["final_bias"]()(prefix).scores for prefix in log[2:].prefixes()])
    # 13 x 0.1 - 1 = 0.3 of a client: one score of four may lie above
    assert detector.threshold == np.sort(table.ravel())[-2]  # type: ignore[attr-defined]
    assert detector(log).null == "declared clean: rounds 2 to 5, 12 clients, 48 scores, fpr 0.1"


@pytest.mark.parametrize("null", ["runs", "stretch"])
def test_rounds_later_than_the_null_are_named(null):
    log = planted.clean_log(8)
    source = log[:5] if null == "stretch" else [planted.clean_log(5, seed=4), planted.clean_log(2, seed=5)]
    detector = calibrate(DETECTORS["layer_norms"](), source, 0.1)
    assert [detector(prefix).null.partition("; ")[2] for prefix in log.prefixes()] == [
        *[""] * 5,
        "its last round is later than round 4, the null's last",
        "its last 2 rounds are later than round 4, the null's last",
        "its last 3 rounds are later than round 4, the null's last",
    ]


@pytest.mark.parametrize("name", ["layer_norms", "accumulated_norms", "panel"])
def test_the_first_rounds_of_any_log_are_a_null(name):
    late = planted.PLANTED["boosted"].log(rounds=7)[4:]
    log, inner = UpdateLog(planted.MODEL, [*planted.clean_log(4), *late]), DETECTORS[name]()
    detector = calibrate(inner, null=4, fpr=0.1)
    for prefix in log[:4].prefixes():
        found = detector(prefix)
        np.testing.assert_array_equal(found.scores, inner(prefix).scores)
        assert not found.flags.any()
        assert found.abstained == inner(prefix).abstained
        assert found.null == "none yet: the first 4 rounds are its null"
    expected = calibrate(inner, null=log[:4], fpr=0.1)
    for stop in (5, 6, 7):
        found, wanted = detector(log[:stop]), expected(log[:stop])
        np.testing.assert_array_equal(found.scores, wanted.scores)
        np.testing.assert_array_equal(found.flags, wanted.flags)
        assert found.null == wanted.null
    assert planted.CULPRIT in found.clients[found.flags]


def test_while_its_null_is_made_who_is_not_finite_is_flagged():
    log = planted.with_client_at(planted.clean_log(3), np.nan)
    verdict = calibrate(DETECTORS["layer_norms"](), null=5)(log)
    assert verdict.clients[verdict.flags].tolist() == [planted.CULPRIT]


def test_after_too_few_first_rounds_there_is_no_verdict():
    detector = calibrate(DETECTORS["layer_norms"](), null=2, fpr=0.01)
    verdict = detector(planted.PLANTED["boosted"].log(rounds=3))
    assert "calibrate to fpr 0.01 needs 99 clients with a score, found 12" in verdict.abstained
    assert not verdict.flags.any()


@pytest.mark.parametrize("rounds", [0, -3, True])
def test_a_number_of_first_rounds_is_at_least_one(rounds):
    with pytest.raises(InputError, match="a null of first rounds is a number of them, at least 1, found"):
        calibrate(DETECTORS["layer_norms"](), null=rounds)


def test_without_a_null_each_cohort_sets_its_own_threshold():
    log = planted.PLANTED["boosted"].log()
    inner = DETECTORS["layer_norms"]()
    verdict = calibrate(inner, fpr=0.02)(log)
    scores = inner(log).scores
    sigma = stats.median_abs_deviation(scores, scale="normal")
    threshold = np.median(scores) + stats.norm.ppf(0.98) * sigma
    np.testing.assert_array_equal(verdict.flags, scores > threshold)
    assert verdict.flags[verdict.clients == planted.CULPRIT].all()
    assert verdict.null == "nominal 0.02: each cohort itself, its majority taken as benign"


def test_without_a_null_broken_clients_set_no_threshold():
    log = planted.clean_log()
    detector = calibrate(DETECTORS["layer_norms"](), fpr=0.2)
    verdict = detector(planted.with_client_at(log, np.nan))
    expected = detector(planted.without(log))
    others = verdict.clients != planted.CULPRIT
    np.testing.assert_array_equal(verdict.flags[others], expected.flags)
    assert verdict.flags[~others].all()


@dataclass(frozen=True)
class Says:
    scores: tuple[float, ...]

    def __call__(self, log):
        return Verdict(log[-1].clients, np.array(self.scores), np.zeros(12, bool))


def test_without_a_null_and_without_spread():
    log = planted.clean_log()
    assert not calibrate(Says((2.0,) * 12))(log).flags.any()
    # MAD 0, mean absolute deviation 13 / 12: sigma 1.358, threshold 2.23
    assert calibrate(Says((0.0,) * 7 + (1.0,) * 4 + (9.0,)))(log).flags.nonzero()[0].tolist() == [11]
    assert calibrate(Says((np.inf,) * 12))(log).flags.all()


@pytest.mark.parametrize("name", ["final_bias", "krum", "panel"])
@pytest.mark.parametrize("how", ["not finite", "refused"])
def test_who_was_refused_or_not_finite_is_left_out_of_the_null(name, how):
    """Four such clients in each of three logs, a third of all: the threshold is that of the others by themselves."""
    inner, broken = DETECTORS[name](), list(planted.CLIENTS[:4])
    logs = attack_free(3)
    others = [UpdateLog(log.model, [r.take(np.arange(4, 12)) for r in log]) for log in logs]
    if how == "refused":
        rounds = [[replace(r, refused=dict.fromkeys(broken, "no")) for r in log] for log in others]
        nulls = [UpdateLog(planted.MODEL, of_log) for of_log in rounds]
    else:
        nulls = logs
        for client in broken:
            nulls = [planted.with_client_at(log, np.nan, client) for log in nulls]
    detector, expected = calibrate(inner, nulls, 0.05), calibrate(inner, others, 0.05)
    assert np.isfinite(expected.threshold)  # type: ignore[attr-defined]
    assert detector.threshold == pytest.approx(expected.threshold, rel=1e-9)  # type: ignore[attr-defined]
    attacked = planted.PLANTED["boosted"].log()
    left_out = "24 clients, 144 scores, 72 updates left out as refused or not finite, fpr 0.05"
    assert detector(attacked).null == f"attack-free: 3 runs, {left_out}"
    assert set(broken) <= set((verdict := detector(nulls[0])).clients[verdict.flags])


def test_abstentions_are_no_null_and_stay_abstentions():
    small = planted.clean_log(3, clients=planted.CLIENTS[:2])
    inner = DETECTORS["final_bias"]()
    with pytest.raises(InputError, match="needs 19 clients with a score, found 0"):
        calibrate(inner, [small], 0.05)
    verdict = calibrate(inner, attack_free(2), 0.05)(small)
    assert "2 comparable clients" in verdict.abstained
    assert verdict.null == "attack-free: 2 runs, 24 clients, 144 scores, fpr 0.05"


@pytest.mark.parametrize("null", [None, "logs", "stretch"])
def test_verdict_of_a_round_does_not_depend_on_later_rounds(null):
    sources = {None: None, "logs": attack_free(2), "stretch": planted.clean_log(8)[:6]}
    log = planted.PLANTED["drifting"].log(rounds=5)
    detectors = {"calibrated": calibrate(DETECTORS["accumulated_norms"](), sources[null], 0.1)}
    whole = detect(log, detectors)
    part = detect(planted.PLANTED["drifting"].log(rounds=3), detectors)
    pd.testing.assert_frame_equal(whole[whole["round"] < 3].reset_index(drop=True), part)


def run_of(log, truth, name="run-1"):
    def tell():
        if truth is None:
            raise InputError("no truth")
        return truth

    return type("Run", (SimpleNamespace,), {"truth": property(lambda self: tell())})(log=log, name=name)


def test_runs_are_a_null_unless_their_truth_knows_of_poison():
    log = planted.clean_log(6)
    clean, attacked = planted.truth_of(log, []), planted.truth_of(log, [planted.CULPRIT], rounds=[2, 3])
    inner = DETECTORS["final_bias"]()
    expected = calibrate(inner, [log], 0.1)
    assert calibrate(inner, [run_of(log, clean)], 0.1) == expected
    assert calibrate(inner, [run_of(log, None)], 0.1) == expected
    assert calibrate(inner, run_of(log, clean), 0.1) == expected
    with pytest.raises(InputError, match="2 poisoned updates in run run-1"):
        calibrate(inner, [run_of(log, attacked)], 0.1)


@pytest.mark.parametrize("fpr", [0, 1, -0.1, 2, np.nan])
def test_a_rate_is_between_0_and_1(fpr):
    with pytest.raises(InputError, match="fpr is a rate"):
        calibrate(DETECTORS["final_bias"](), None, fpr)


def test_a_null_of_something_else_is_refused():
    with pytest.raises(InputError, match="a null is a sequence of runs or logs"):
        calibrate(DETECTORS["final_bias"](), ["runs/demo"], 0.05)


def test_calibrated_repr_names_null_and_threshold():
    detector = calibrate(DETECTORS["final_bias"](), None, 0.1)
    assert "score_by(final_bias, robust_zscore" in repr(detector)
    assert "majority taken as benign" in repr(detector)
    assert "threshold=" in repr(calibrate(DETECTORS["final_bias"](), attack_free(1), 0.1)).split("null")[1]


# detect


def test_detect_has_rounds_outside_and_detectors_inside():
    log = planted.PLANTED["boosted"].log(rounds=2)
    detectors = {"norms": DETECTORS["layer_norms"](), "bias": DETECTORS["final_bias"]()}
    table = detect(log, detectors)
    parts = [detectors[name](log[: r + 1]).table(r, name) for r in range(2) for name in detectors]
    pd.testing.assert_frame_equal(table, pd.concat(parts, ignore_index=True))
    assert table.columns.tolist() == COLUMNS
    assert len(table) == 48


def test_detect_takes_a_run_and_keeps_its_round_numbers():
    log = planted.clean_log(5)[3:]
    table = detect(SimpleNamespace(log=log), {"z": score_by(final_bias, zscore, 2)})
    assert table["round"].unique().tolist() == [3, 4]


def test_detect_of_nothing_is_an_empty_table():
    for table in (detect(planted.clean_log(0), {"a": DETECTORS["final_bias"]()}), detect(planted.clean_log(2), {})):
        assert table.columns.tolist() == COLUMNS
        assert table.empty
        assert table["score"].dtype == np.float64


def test_every_builder_works_without_arguments():
    for name, builder in DETECTORS.items():
        assert builder() == builder(), name
        assert isinstance(builder()(planted.clean_log()), Verdict)
