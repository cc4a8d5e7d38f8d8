"""Evaluation against hand-counted answers, naive loops and scikit-learn."""

from itertools import combinations

import numpy as np
import pandas as pd
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.stats import binom, rankdata, sem
from scipy.stats import t as student
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

import planted
from gradlens.detectors import DETECTORS, calibrate, detect
from gradlens.errors import InputError
from gradlens.evaluation import (
    average_precision,
    bootstrap,
    detection,
    detection_times,
    evaluate,
    mean_interval,
    per_client,
    roc_points,
    rounds_to_detection,
    with_truth,
)
from gradlens.evaluation.ranking import ranks

INF = np.inf


def table(benign, malicious, threshold=INF, **columns) -> pd.DataFrame:
    """A table of scores; `columns` are constant."""
    scores = np.array([*benign, *malicious], np.float64)
    return pd.DataFrame(
        {
            "detector": "d",
            "score": scores,
            "flag": scores > threshold,
            "abstained": "",
            "malicious": [False] * len(benign) + [True] * len(malicious),
            **columns,
        }
    )


def figure(scores: pd.DataFrame, metric: str, null: pd.DataFrame | None = None) -> pd.Series:
    found = evaluate(scores, null=null)
    return found[found["metric"] == metric].iloc[0]


# with_truth


def test_truth_joins_by_round_and_client():
    log = planted.PLANTED["boosted"].log(rounds=3)
    truth = planted.truth_of(log, [planted.CULPRIT], rounds=[1])
    scores = detect(log, {"norms": DETECTORS["layer_norms"](), "bias": DETECTORS["final_bias"]()})
    joined = with_truth(scores, truth.sample(frac=1, random_state=0))
    assert joined.columns.tolist() == [*scores.columns, "malicious"]
    culprit = joined[joined["client"] == planted.CULPRIT]
    assert culprit[["round", "malicious"]].to_numpy().tolist() == [[1, True]] * 2  # idle in rounds 0 and 2
    assert not joined.loc[joined["client"] != planted.CULPRIT, "malicious"].any()
    assert len(joined) == len(scores) - 4
    assert joined["malicious"].dtype == bool


def test_idle_updates_stay_where_they_are_asked_for():
    log = planted.clean_log(3)
    truth = planted.truth_of(log, [planted.CULPRIT], rounds=[1])
    scores = detect(log, {"norms": DETECTORS["layer_norms"]()})
    joined = with_truth(scores, truth, idle=True)
    assert len(joined) == len(scores)
    culprit = joined[joined["compromised"]]
    assert culprit["client"].unique().tolist() == [planted.CULPRIT]
    assert culprit["malicious"].tolist() == [False, True, False]
    without = with_truth(scores, truth)
    assert len(without) == len(scores) - 2
    pd.testing.assert_frame_equal(evaluate(joined), evaluate(without))
    pd.testing.assert_frame_equal(roc_points(joined), roc_points(without))


def test_truth_of_another_run_is_refused():
    scores = detect(planted.clean_log(2), {"norms": DETECTORS["layer_norms"]()})
    truth = planted.truth_of(planted.clean_log(2, clients=planted.CLIENTS[:10]), [])
    with pytest.raises(InputError, match="nothing of 4 scored updates, the first of client 'client-10' in round 0"):
        with_truth(scores, truth)


def test_truth_that_names_an_update_twice_is_refused():
    truth = planted.truth_of(planted.clean_log(1), [])
    with pytest.raises(InputError, match="names client 'client-00' twice in round 0"):
        with_truth(detect(planted.clean_log(1), {}), pd.concat([truth, truth.head(1)]))


# AUC


def test_auc_by_hand():  # of 3 x 2 pairs: 4 > 1, 4 > 2, 4 = 4; 2 > 1, 2 = 2, 2 < 4
    assert figure(table([1, 2, 4], [4, 2]), "auc")["value"] == pytest.approx((1 + 1 + 0.5 + 1 + 0.5 + 0) / 6)


def test_auc_with_infinities_by_hand():  # two at +inf: their pair is a tie
    assert figure(table([1, INF], [INF, 3]), "auc")["value"] == pytest.approx((1 + 0.5 + 1 + 0) / 4)
    assert figure(table([INF, INF], [INF]), "auc")["value"] == 0.5


labelled = st.lists(
    st.tuples(st.sampled_from([0.0, 0.5, 1.0, 2.5, -3.0, 1e30]), st.booleans()), min_size=2, max_size=40
)


@settings(deadline=None)
@given(labelled)
def test_auc_and_curve_against_scikit_learn(rows):
    score, malicious = np.array([s for s, _ in rows]), np.array([m for _, m in rows])
    assume(malicious.any() and not malicious.all())
    scores = table(score[~malicious], score[malicious])
    assert figure(scores, "auc")["value"] == pytest.approx(roc_auc_score(malicious, score))
    points = roc_points(scores)
    fpr, tpr, _ = roc_curve(malicious, score)
    assert np.trapezoid(points["tpr"], points["fpr"]) == pytest.approx(roc_auc_score(malicious, score))
    ours, theirs = points[["fpr", "tpr"]].to_numpy(), np.column_stack([fpr, tpr])
    assert all(np.isclose(theirs, point).all(axis=1).any() for point in ours)


@pytest.mark.parametrize("shape", [(0,), (1,), (40,), (0, 3), (40, 3)])
def test_ranks_against_scipy(rng, shape):
    values = rng.choice([0.0, -0.0, 0.5, -3.0, 1e30, INF], size=shape)
    np.testing.assert_array_equal(ranks(values), rankdata(values, axis=0))
    if len(values) > 1 and values.ndim > 1:
        values[3, 1] = np.nan  # ranks of that column alone become unknown
        np.testing.assert_array_equal(ranks(values), rankdata(values, axis=0))


# TPR at FPR


def naive_tpr(benign, malicious, target):
    """Every threshold there is, those above all scores too."""
    best = 0.0
    for t in [-INF, *benign, *malicious, INF]:
        if np.mean(np.array(benign) > t) <= target + 1e-12:
            best = max(best, float(np.mean(np.array(malicious) > t)))
    return best


levels = st.integers(0, 12).map(float) | st.just(INF)


@settings(deadline=None)
@given(st.lists(levels, min_size=1, max_size=120), st.lists(levels, min_size=1, max_size=20))
def test_tpr_at_fpr_against_every_threshold(benign, malicious):
    for metric, target in (("tpr_1", 0.01), ("tpr_5", 0.05)):
        found = figure(table(benign, malicious), metric)
        assert found["value"] == pytest.approx(naive_tpr(benign, malicious, target))
        assert found["bound"] == (">=" if len(benign) < 1 / target else "")


def test_tpr_at_fpr_by_hand():
    benign = np.arange(100.0)  # one of a hundred may pass: 99, so the threshold is 98
    assert figure(table(benign, [98, 98.5, 200, 5]), "tpr_1")["value"] == 0.5
    assert figure(table(benign, [94, 94.5, 200, 5]), "tpr_5")["value"] == 0.5


# FPR


def test_fpr_needs_nothing_malicious():
    found = figure(table([1, 2, 3, 9], [], threshold=8), "fpr")
    assert (found["value"], found["bound"]) == (0.25, "")
    assert np.isnan(figure(table([1, 2, 3, 9], []), "auc")["value"])
    assert figure(table([1, 2, 3, 9], []), "auc")["seeds"] == 0


def test_fpr_of_none_is_an_upper_limit():
    """At the limit, seeing none of n flagged has a chance of exactly 5 %."""
    found = figure(table(np.zeros(300), []), "fpr")
    assert found["bound"] == "<="
    assert binom.pmf(0, 300, found["value"]) == pytest.approx(0.05)
    assert found["value"] == pytest.approx(3 / 300, rel=0.01)  # the rule of three
    assert (found["low"], found["high"]) == (0, found["value"])


def test_fpr_ignores_the_malicious():
    assert figure(table([1, 2], [9, 9, 9], threshold=1.5), "fpr")["value"] == 0.5


# Abstentions, seeds, groups


def test_abstentions_are_counted_apart():
    said = table([1, 2], [3], threshold=0)
    silent = table([0, 0], [0]).assign(abstained="too few clients")
    both = pd.concat([said, silent])
    assert figure(both, "abstained")["value"] == 0.5
    for metric in ("auc", "tpr_1", "fpr"):
        assert figure(both, metric)["value"] == figure(said, metric)["value"]
    assert figure(silent, "abstained")["value"] == 1
    assert np.isnan(figure(silent, "fpr")["value"])


def seeded(*aucs):
    """Seeds with one benign update each and an AUC of 0 or 1."""
    return pd.concat([table([1], [2 if auc else 0], seed=seed) for seed, auc in enumerate(aucs)])


def test_figures_are_averaged_over_seeds_not_pooled():
    low, high = table([10, 11], [12], seed=0), table([1, 2], [3], seed=1)
    assert figure(pd.concat([low, high]), "auc")["value"] == 1
    assert figure(pd.concat([low, high]), "auc")["seeds"] == 2
    pooled = pd.concat([low, high]).assign(seed=0)
    assert figure(pooled, "auc")["value"] == 0.75


def test_interval_is_over_seeds():
    assert figure(seeded(0, 1, 1, 1), "auc")["value"] == 0.75
    low, high = figure(seeded(0, 1, 1, 1), "auc")[["low", "high"]]
    assert 0 <= low < 0.75 < high <= 1
    more_clients = pd.concat([seeded(0, 1, 1, 1)] * 50)
    assert figure(more_clients, "auc")[["low", "high"]].tolist() == [low, high]
    more_seeds = seeded(*[0, 1, 1, 1] * 25)
    assert figure(more_seeds, "auc")["low"] > low


def test_one_seed_has_no_interval():
    for scores in (seeded(1), table([1], [2])):
        assert figure(scores, "auc")["seeds"] == 1
        assert np.isnan(figure(scores, "auc")[["low", "high"]].astype(float)).all()


def test_a_seed_without_both_kinds_is_left_out():
    scores = pd.concat([seeded(1, 1), table([5], [], seed=7)])
    assert figure(scores, "auc")["seeds"] == 2
    assert figure(scores, "fpr")["seeds"] == 3


@settings(deadline=None)
@given(st.lists(st.floats(0, 1), min_size=2, max_size=10))
def test_interval_of_a_mean_against_scipy(values):
    low, high = mean_interval(np.array(values))
    if np.ptp(values) < 1e-6:
        assert (low, high) == pytest.approx((values[0], values[0]), abs=1e-4)
        return
    assert (low, high) == pytest.approx(student.interval(0.95, len(values) - 1, np.mean(values), sem(values)))
    cut = mean_interval(np.array(values), 0, 1)
    assert cut == (max(low, 0), min(high, 1))
    assert cut[0] <= np.mean(values) <= cut[1]


def test_interval_of_two_seeds_by_hand():
    """Mean 0.5, standard error 0.1, and 12.706 is the quantile of one degree of freedom."""
    assert mean_interval(np.array([0.4, 0.6])) == pytest.approx((0.5 - 1.2706, 0.5 + 1.2706), abs=1e-4)
    assert mean_interval(np.array([0.4, 0.6]), 0, 1) == (0, 1)
    assert np.isnan(mean_interval(np.array([0.4]), 0, 1)).all()
    assert np.isnan(mean_interval(np.array([np.nan, 0.4, 0.6]), 0, 1)).all()


def covered(drawn, mean):
    """The share of rows [repetition, seed] whose interval holds the mean."""
    ends = np.array([mean_interval(values, 0, 1) for values in drawn])
    return np.mean((ends[:, 0] <= mean) & (mean <= ends[:, 1]))


@pytest.mark.parametrize("seeds", [2, 3, 5, 8])
def test_intervals_of_normal_figures_cover_what_they_say(seeds):
    drawn = np.random.default_rng(0).normal(0.5, 0.1, (2_000, seeds))
    assert covered(drawn, 0.5) == pytest.approx(0.95, abs=0.02)


@pytest.mark.parametrize(("seeds", "crowded", "mostly_equal"), [(2, 92, 18), (3, 90, 27), (5, 90, 41), (8, 91, 57)])
def test_intervals_of_figures_near_their_end_cover_what_the_documentation_says(seeds, crowded, mostly_equal):
    rng = np.random.default_rng(0)
    assert covered(rng.beta(9, 1, (2_000, seeds)), 0.9) == pytest.approx(crowded / 100, abs=0.025)
    two_values = np.where(rng.random((2_000, seeds)) < 0.9, 1.0, 0.5)
    assert covered(two_values, 0.95) == pytest.approx(mostly_equal / 100, abs=0.035)


def test_the_evaluation_covers_the_mean_of_other_seeds():
    """A benign update at 0 and ten malicious ones, above it with a chance that varies from seed to seed."""
    rng, hits = np.random.default_rng(1), []
    for _ in range(200):
        chances = rng.uniform(0.4, 0.8, 3)
        scores = [table([0], np.where(rng.random(10) < chance, 1, -1), seed=i) for i, chance in enumerate(chances)]
        found = figure(pd.concat(scores), "auc")
        hits.append(found["low"] <= 0.6 <= found["high"])
    assert np.mean(hits) > 0.9


def test_the_old_name_of_the_interval_warns():
    with pytest.warns(DeprecationWarning, match="bootstrap is now mean_interval"):
        assert bootstrap(np.array([0.3, 0.3])) == (0.3, 0.3)


def test_groups_keep_their_order_and_their_figures():
    easy, hard = table([1, 2], [3], attack="trigger"), table([2, 3], [1], attack="flip")
    found = evaluate(pd.concat([easy, hard]), by=["attack"])
    assert found.columns.tolist() == ["attack", "detector", "metric", "value", "low", "high", "seeds", "bound"]
    assert found["metric"].tolist() == ["auc", "pr_auc", "tpr_1", "tpr_5", "fpr", "abstained"] * 2
    assert found.set_index(["attack", "metric"]).loc[("trigger", "auc"), "value"] == 1
    assert found.set_index(["attack", "metric"]).loc[("flip", "auc"), "value"] == 0
    assert found["attack"].tolist() == ["trigger"] * 6 + ["flip"] * 6


def test_nothing_to_evaluate_is_an_empty_table():
    assert evaluate(table([], [])).empty
    assert roc_points(table([], [])).empty


def test_roc_points_by_hand():
    points = roc_points(table([1, 2, 4], [4, 2]))
    assert points.columns.tolist() == ["detector", "fpr", "tpr"]
    # >= 4 takes one of each kind; >= 2 the same again, on the same slope; then the last benign one
    np.testing.assert_allclose(points[["fpr", "tpr"]], [[0, 0], [2 / 3, 1], [1, 1]])


def test_roc_points_leave_out_who_abstained_or_has_one_kind():
    scores = pd.concat([table([1], [2]), table([9], []).assign(abstained="why"), table([1], []).assign(detector="e")])
    points = roc_points(scores)
    assert set(points["detector"]) == {"d"}
    np.testing.assert_allclose(points[["fpr", "tpr"]], [[0, 0], [0, 1], [1, 1]])


def test_a_missing_column_is_named():
    with pytest.raises(InputError, match="scores need the column 'malicious', found detector, score"):
        evaluate(table([1], [2]).drop(columns="malicious"))
    with pytest.raises(InputError, match="scores need the column 'attack'"):
        roc_points(table([1], [2]), by=["attack"])


# Average precision


@settings(deadline=None)
@given(labelled)
def test_average_precision_against_scikit_learn(rows):
    score, malicious = np.array([s for s, _ in rows]), np.array([m for _, m in rows])
    assume(malicious.any() and not malicious.all())
    expected = average_precision_score(malicious, score)
    assert average_precision(score, malicious) == pytest.approx(expected)
    assert figure(table(score[~malicious], score[malicious]), "pr_auc")["value"] == pytest.approx(expected)


def test_average_precision_by_hand():
    # thresholds 5: 1 of 1; 4: 1 of 2, no gain; 3: 3 of 4, the two gained together
    assert figure(table([4, 1], [5, 3, 3]), "pr_auc")["value"] == pytest.approx(1 / 3 + 2 / 3 * 3 / 4)
    assert average_precision(np.array([INF, INF, 0]), np.array([True, False, False])) == 0.5
    assert np.isnan(figure(table([1, 2], []), "pr_auc")["value"])


# A null


def naive_null_figures(scores, null, rate):
    """Of one seed: the share of malicious and of benign ones above the ceil((m + 1)(1 - rate))-th smallest."""
    finite = [score for score in null if score < INF]
    m = len(finite)
    k = int(np.ceil((m + 1) * (1 - rate) - 1e-9))
    threshold = np.sort(finite)[min(k, m) - 1]
    above = (scores["score"] > threshold) | (scores["score"] == INF)
    return above[scores["malicious"]].mean(), above[~scores["malicious"]].mean(), k > m


@settings(deadline=None, max_examples=50)
@given(st.lists(levels, min_size=1, max_size=130), st.integers(0, 2**16))
def test_thresholds_of_a_null_against_the_definition(null, seed):
    assume(min(null) < INF)
    rng = np.random.default_rng(seed)
    parts = [table(rng.integers(0, 13, 30), rng.integers(5, 15, 6), seed=i) for i in range(3)]
    free = table(null, [], seed=99).sample(frac=1, random_state=0)
    found = evaluate(pd.concat(parts), null=free).set_index("metric")
    for suffix, rate in (("1", 0.01), ("5", 0.05)):
        tpr, fpr, unresolved = zip(*(naive_null_figures(part, null, rate) for part in parts), strict=True)
        bound = "<=" if unresolved[0] else ""
        assert found.loc[f"tpr_{suffix}", ["value", "bound"]].tolist() == [pytest.approx(np.mean(tpr)), bound]
        assert found.loc[f"tpr_{suffix}", "low"] == 0 or not unresolved[0]
        expected = [pytest.approx(np.mean(fpr)), bound] if np.mean(fpr) else [pytest.approx(1 - 0.05 ** (1 / 90)), "<="]
        assert found.loc[f"fpr_{suffix}", ["value", "bound"]].tolist() == expected


def test_a_null_by_hand():
    null = table(range(1, 100), [], seed=7)  # 99 scores: the 99th and the 95th smallest
    scores = table([98, 99, 100, 20], [95, 96, 99, 120], seed=1)
    for metric, value in (("tpr_1", 0.25), ("tpr_5", 0.75), ("fpr_1", 0.25), ("fpr_5", 0.75)):
        assert figure(scores, metric, null)["value"] == value
        assert figure(scores, metric, null)["bound"] == ""
    names = ["auc", "pr_auc", "tpr_1", "tpr_5", "fpr_1", "fpr_5", "fpr", "abstained"]
    assert evaluate(scores, null=null)["metric"].tolist() == names


def test_the_threshold_is_that_of_calibrate():
    free, log = planted.clean_log(8, clients=[f"c{i}" for i in range(25)], seed=1), planted.PLANTED["boosted"].log()
    detector, truth = DETECTORS["layer_norms"](), planted.truth_of(log, [planted.CULPRIT])
    null = detect(free, {"d": detector}).assign(seed=1)
    scores = with_truth(detect(log, {"d": detector}), truth).assign(seed=0)
    flags = with_truth(detect(log, {"d": calibrate(detector, [free], fpr=0.05)}), truth).assign(seed=0)
    assert figure(scores, "tpr_5", null)["value"] == flags.loc[flags["malicious"], "flag"].mean() == 1
    assert figure(scores, "fpr_5", null)["value"] == figure(flags, "fpr")["value"]


def test_a_null_of_the_same_seed_is_left_out():
    null = pd.concat([table(range(30), [], seed=0), table(range(100, 130), [], seed=1)])
    scores = pd.concat([table([50], [60], seed=0), table([50], [60], seed=1), table([50], [60], seed=2)])
    # seed 0 is judged by 100-129 alone, seed 1 by 0-29, seed 2 by both; 31 x 0.05 and 61 x 0.05 leave 1 and 3 above
    assert figure(scores, "tpr_5", null)["value"] == pytest.approx(1 / 3)
    own_only = figure(table([50], [60], seed=0), "tpr_5", null[null["seed"] == 0])
    assert np.isnan(own_only["value"])
    assert (own_only["seeds"], own_only["bound"]) == (0, "")


def test_a_null_is_that_of_the_same_group_and_without_abstentions():
    easy, hard = (table([5], [9], task=task, attack="flip", seed=0) for task in "ab")
    null = pd.concat([table([8] * 20, [], task="a"), table([10] * 20, [], task="b")]).assign(seed=5)
    silent = table([99] * 80, [], task="a", seed=5).assign(abstained="why")
    found = evaluate(pd.concat([easy, hard]), by=["task", "attack"], null=pd.concat([null, silent]))
    assert found[found["metric"] == "tpr_5"].set_index("task")["value"].to_dict() == {"a": 1, "b": 0}
    elsewhere = evaluate(easy, by=["task"], null=null[null["task"] == "b"])
    assert np.isnan(elsewhere.set_index("metric")["value"]["tpr_5"])


def test_an_infinite_score_passes_every_threshold():
    null = table([9] * 100, [], seed=1)
    assert figure(table([1], [INF, 5], seed=0), "tpr_5", null)["value"] == 0.5


def test_infinite_scores_of_a_null_set_no_threshold():
    """60 of 100 benign updates were refused; the other 40 set the threshold as if by themselves."""
    null = table([*range(40), *[INF] * 60], [], seed=1)
    scores = table([1, 38], [39, 50, INF], seed=0)
    assert figure(scores, "tpr_5", null)["value"] == pytest.approx(1)  # 41 x 0.05: above the second largest, 38
    assert figure(scores, "fpr_5", null)["bound"] == "<="
    assert np.isnan(figure(scores, "tpr_5", table([INF] * 100, [], seed=1))["value"])


def test_a_clients_rounds_do_not_make_a_null_larger():
    """Twenty clients of ten rounds resolve 5 %, and not 1 %; each weighs as one, however many its rounds."""
    rounds, names = np.repeat(np.arange(10), 20), np.tile([f"c{i}" for i in range(20)], 10)
    null = table(np.tile(np.arange(20), 10), [], seed=1).assign(round=rounds, client=names)
    scores = table([5], [18.5, 30], seed=0)
    for metric, expected in (("tpr_1", (0.5, "<=")), ("tpr_5", (0.5, ""))):
        found = figure(scores, metric, null)
        assert (found["value"], found["bound"]) == expected
    lone = null[(null["round"] == 0) | (null["client"] == "c3")]  # ten scores of c3, one of the others
    assert figure(scores, "tpr_5", lone)["value"] == 0.5


def test_a_null_with_attackers_is_refused():
    with pytest.raises(InputError, match="free of attacks, found 2 malicious rows"):
        evaluate(table([1], [2]), null=table([1], [2, 3]))


def test_a_null_too_small_bounds_the_rate_from_above():
    for metric in ("tpr_1", "fpr_1"):
        found = figure(table([1, 9], [5, 6], seed=0), metric, table(range(6), [], seed=1))
        assert found[["value", "low", "high", "bound"]].tolist() == [0.5, 0, 0.5, "<="]


# Per client


def over_rounds(rows, **columns) -> pd.DataFrame:
    """Rows (client, round, score, flag, malicious, abstained); `columns` are constant."""
    names = ["client", "round", "score", "flag", "malicious", "abstained"]
    return pd.DataFrame(rows, columns=names).assign(detector="d", **columns)


ROUNDS = [
    ("a", 2, 4.0, True, True, ""),
    ("a", 0, 1.0, False, False, ""),
    ("a", 1, 9.0, False, False, "silent"),
    ("b", 0, 2.0, False, False, ""),
    ("b", 1, 0.0, True, False, ""),
    ("c", 0, 0.0, False, False, "early"),
    ("c", 1, 0.0, True, False, "late"),
]


def test_clients_over_rounds_by_hand():
    found = per_client(over_rounds(ROUNDS))
    assert found.columns.tolist() == ["client", "detector", "score", "flag", "abstained", "malicious", "rounds"]
    assert found.drop(columns="detector").to_numpy().tolist() == [
        ["a", 2.5, True, "", True, 2],
        ["b", 1.0, True, "", False, 2],
        ["c", 0.0, False, "late", False, 0],
    ]
    assert per_client(over_rounds(ROUNDS), how="last")["score"].tolist() == [4, 0, 0]
    assert per_client(over_rounds(ROUNDS), how={"d": "last"})["score"].tolist() == [4, 0, 0]
    assert per_client(over_rounds(ROUNDS), how={"e": "last"})["score"].tolist() == [2.5, 1, 0]
    thrice = over_rounds([*ROUNDS, ("b", 2, 0.0, False, False, "")])
    assert per_client(thrice, flagged="half")["flag"].tolist() == [True, False, False]


def test_attackers_that_come_and_go_keep_their_idle_rounds():
    scores = over_rounds(ROUNDS).assign(compromised=lambda t: t["client"].isin(["a", "b"]))
    found = per_client(scores)
    assert found["client"].tolist() == ["a", "c"]  # b is compromised and poisoned nothing
    assert found["score"].tolist() == [2.5, 0]  # with the idle round 0
    poisoned_only = scores[scores["malicious"] | ~scores["compromised"]]
    assert per_client(poisoned_only)["score"].tolist() == [4, 0]


def test_clients_of_several_runs_are_kept_apart():
    two = pd.concat([over_rounds(ROUNDS, seed=0, attack="x"), over_rounds(ROUNDS, seed=1, attack="x")])
    found = per_client(two, by=["attack"])
    assert found["seed"].tolist() == [0, 0, 0, 1, 1, 1]
    assert found.columns[:4].tolist() == ["attack", "seed", "client", "detector"]
    figures = evaluate(found, by=["attack"]).set_index("metric")
    assert figures["value"]["auc"] == 1
    assert figures["value"]["abstained"] == pytest.approx(1 / 3)
    with pytest.raises(InputError, match="two scores of one detector in round"):
        per_client(two.drop(columns="seed"))


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**16))
def test_clients_over_rounds_against_loops(seed):
    rng = np.random.default_rng(seed)
    played = [(client, round_) for client in "abcd" for round_ in range(5) if rng.random() < 0.8]
    rows = [
        (*each, rng.choice([0, 1, 2.5, INF]), rng.random() < 0.4, rng.random() < 0.1, str(rng.choice(["", "why"])))
        for each in played
    ]
    scores = over_rounds(rows).sample(frac=1, random_state=seed)
    for how in ("mean", "last"):
        found = per_client(scores, how=how, flagged="half").set_index("client")
        assert set(found.index) == set(scores["client"])
        for client, mine in scores.sort_values("round").groupby("client"):
            said = mine[mine["abstained"] == ""]
            expected = 0.0 if said.empty else said["score"].mean() if how == "mean" else said["score"].iloc[-1]
            assert found["score"][client] == pytest.approx(expected)
            assert found["flag"][client] == (len(said) > 0 and said["flag"].mean() >= 0.5)
            assert found["malicious"][client] == mine["malicious"].any()
            assert found["abstained"][client] == ("why" if said.empty else "")


def test_settings_of_per_client_are_checked():
    with pytest.raises(InputError, match="how must be 'mean' or 'last', found 'max'"):
        per_client(over_rounds(ROUNDS), how={"d": "max"})
    with pytest.raises(InputError, match="flagged must be 'any' or 'half', found 'all'"):
        per_client(over_rounds(ROUNDS), flagged="all")
    assert per_client(over_rounds([])).empty


# Rounds to detection

ATTACKED = [  # a poisons from 2 on and is flagged at 5; b poisons in 3 and 6, flagged where it abstains
    *[("a", r, 0.0, r in (1, 5, 6), r >= 2, "") for r in range(7)],
    *[("b", r, 0.0, r in (3, 5), r in (3, 6), "no" if r == 3 else "") for r in range(8)],
    *[("c", r, 0.0, True, False, "") for r in range(8)],
]


def test_rounds_to_detection_by_hand():
    scores = over_rounds(ATTACKED, seed=0)
    times = detection_times(scores, per="client")
    assert times.columns.tolist() == ["seed", "client", "detector", "first", "rounds", "detected"]
    assert times[["first", "rounds", "detected"]].to_numpy().tolist() == [[2, 3, True], [3, 4, False]]
    assert detection_times(scores)[["first", "rounds", "detected"]].to_numpy().tolist() == [[2, 3, True]]
    idle = scores.assign(compromised=scores["client"].isin(["a", "b"]))
    times = detection_times(idle, per="client")  # now b's idle round 5 counts; a's round 1 was before its attack
    assert times[["first", "rounds", "detected"]].to_numpy().tolist() == [[2, 3, True], [3, 2, True]]


def test_detection_is_summed_up_over_seeds():
    quick, never = ([("a", r, 0.0, r == when, True, "") for r in range(5)] for when in (1, 9))
    parts = [over_rounds(quick, seed=0), over_rounds(quick, seed=1), over_rounds(never, seed=2)]
    found = rounds_to_detection(pd.concat(parts))
    columns = ["detected", "low", "high", "median", "benign_detected", "benign_median", "cases", "seeds"]
    assert found.columns.tolist() == ["detector", *columns]
    assert found[["benign_detected", "benign_median"]].isna().all(axis=None)  # there is nobody else
    assert found[["detected", "median", "cases", "seeds"]].to_numpy().tolist() == [[pytest.approx(2 / 3), 1, 3, 3]]
    assert found["low"][0] < 2 / 3 < found["high"][0]
    assert rounds_to_detection(pd.concat([parts[0], parts[2], over_rounds(never, seed=3)]))["median"][0] == INF
    two = pd.concat([parts[0].assign(attack="x"), parts[2].assign(attack="y")])
    assert rounds_to_detection(two, by=["attack"])["detected"].tolist() == [1, 0]


WATCHED = [  # a poisons from 2 to 4 and is flagged at 4, b from 3 and never is; of the benign, c is flagged at 1 and 3
    *[("a", r, 0.0, r == 4, r >= 2, "") for r in range(5)],
    *[("b", r, 0.0, False, r >= 3, "") for r in range(5)],
    *[("c", r, 0.0, r in (1, 3), False, "") for r in range(5)],
    *[("d", r, 0.0, r == 4, False, "no" if r == 4 else "") for r in range(5)],
    *[("e", r, 0.0, r == 4, False, "") for r in (0, 1, 3, 4)],
    *[("f", r, 0.0, False, False, "") for r in (0, 1)],
]


def test_benign_clients_in_the_attackers_place_by_hand():
    """From 2 on c is flagged after 1 round, d where it abstains, e after 1 of its own; from 3 on c at once, e after 1.

    f is not there any more.
    """
    scores = over_rounds(WATCHED, seed=0).assign(compromised=lambda table: table["client"].isin(["a", "b"]))
    each = rounds_to_detection(scores, per="client").iloc[0]
    assert each[["detected", "median", "cases"]].tolist() == [0.5, 2, 2]
    assert (each["benign_detected"], each["benign_median"]) == (pytest.approx(2 / 3), 1)
    run = rounds_to_detection(scores).iloc[0]  # two of c, d, e: each of the three pairs holds c or e
    assert run[["detected", "median", "benign_detected", "benign_median"]].tolist() == [1, 2, 1, 1]
    calm = scores.assign(flag=False)
    assert rounds_to_detection(calm)[["benign_detected", "benign_median"]].to_numpy().tolist() == [[0, INF]]


@pytest.mark.parametrize("per", ["run", "client"])
def test_a_coin_finds_benign_clients_as_often_as_attackers(per):
    """Flags of 5 % of all updates at random, 16 rounds, 4 of 20 clients malicious."""
    rng, parts = np.random.default_rng(0), []
    for seed in range(400):
        flags = rng.random((16, 20)) < 0.05
        rows = [(f"c{i:02d}", r, 0.0, bool(flags[r, i]), i < 4, "") for r in range(16) for i in range(20)]
        parts.append(over_rounds(rows, seed=seed))
    found = rounds_to_detection(pd.concat(parts), per=per).iloc[0]
    exact = 1 - 0.95 ** (16 * (4 if per == "run" else 1))  # 96 % and 56 %
    assert found["detected"] == pytest.approx(exact, abs=0.03)
    assert found["benign_detected"] == pytest.approx(exact, abs=0.03)
    median = np.ceil(np.log(0.5) / np.log(0.95) / (4 if per == "run" else 1)) - 1
    assert abs(found["median"] - median) <= 1
    assert abs(found["benign_median"] - median) <= 1


def test_benign_clients_are_those_of_the_same_run():
    """In the run of x nobody benign is flagged, in that of y everybody at once; a condition may have no name."""
    quiet = [(c, r, 0.0, False, c == "a", "") for r in range(3) for c in "abc"]
    loud = [(c, r, 0.0, True, c == "a", "") for r in range(3) for c in "abc"]
    scores = pd.concat([over_rounds(quiet, attack="x", seed=0), over_rounds(loud, attack=None, seed=0)])
    found = rounds_to_detection(scores, by=["attack"])
    assert found[["benign_detected", "benign_median"]].to_numpy().tolist() == [[0, INF], [1, 0]]
    assert rounds_to_detection(scores.assign(seed=scores["attack"].eq("x")))["benign_detected"].tolist() == [0.5]


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(0, 6) | st.just(INF), min_size=1, max_size=7), st.integers(1, 4))
def test_the_chance_of_clients_drawn_is_that_of_every_choice(waiting, drawn):
    chances = detection._chance_over_rounds(np.array(waiting, np.float64), drawn, 6)
    earliest = np.array([min(chosen) for chosen in combinations(waiting, min(drawn, len(waiting)))])
    np.testing.assert_allclose(chances, [np.mean(earliest <= t) for t in range(7)], atol=1e-12)


def test_nothing_attacked_is_nothing_to_detect():
    calm = over_rounds([("c", r, 0.0, True, False, "") for r in range(3)])
    assert detection_times(calm).empty
    assert rounds_to_detection(calm).empty
    with pytest.raises(InputError, match="per must be 'run' or 'client'"):
        detection_times(calm, per="round")
