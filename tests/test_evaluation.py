"""Evaluation against hand-counted answers, naive loops and scikit-learn."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.stats import binom
from sklearn.metrics import roc_auc_score, roc_curve

import planted
from gradlens.detectors import DETECTORS, detect
from gradlens.evaluation import bootstrap, evaluate, roc_points, with_truth
from gradlens.log import InputError

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


def figure(scores: pd.DataFrame, metric: str) -> pd.Series:
    found = evaluate(scores)
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


def test_bootstrap_against_the_exact_distribution():
    """The mean of n resampled zeros and ones is binomial: n = 40, half of them ones."""
    low, high = bootstrap(np.repeat([0.0, 1.0], 20))
    assert low == pytest.approx(binom.ppf(0.025, 40, 0.5) / 40, abs=0.013)
    assert high == pytest.approx(binom.ppf(0.975, 40, 0.5) / 40, abs=0.013)
    assert bootstrap(np.repeat([0.0, 1.0], 20)) == (low, high)
    assert bootstrap(np.full(5, 0.3)) == pytest.approx((0.3, 0.3))


def test_groups_keep_their_order_and_their_figures():
    easy, hard = table([1, 2], [3], attack="trigger"), table([2, 3], [1], attack="flip")
    found = evaluate(pd.concat([easy, hard]), by=["attack"])
    assert found.columns.tolist() == ["attack", "detector", "metric", "value", "low", "high", "seeds", "bound"]
    assert found["metric"].tolist() == ["auc", "tpr_1", "tpr_5", "fpr", "abstained"] * 2
    assert found.set_index(["attack", "metric"]).loc[("trigger", "auc"), "value"] == 1
    assert found.set_index(["attack", "metric"]).loc[("flip", "auc"), "value"] == 0
    assert found["attack"].tolist() == ["trigger"] * 5 + ["flip"] * 5


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
