"""Scorers against hand-computed answers, slow oracles, second libraries and properties."""

import warnings
from functools import partial
from itertools import combinations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from scipy import stats
from scipy.cluster.vq import kmeans2
from sklearn.base import BaseEstimator
from sklearn.cluster import HDBSCAN, AgglomerativeClustering, KMeans
from sklearn.covariance import EllipticEnvelope
from sklearn.ensemble import IsolationForest
from sklearn.neighbors import LocalOutlierFactor
from sklearn.svm import OneClassSVM

from gradlens.clustering import density_clusters, lloyd, two_means
from gradlens.errors import InputError
from gradlens.scorers import (
    SCORERS,
    agglomerative_margin,
    hdbscan_outlier,
    isolation_forest,
    local_outlier_factor,
    outlier,
    robust_zscore,
    robustly_scaled,
    two_cluster_margin,
    zscore,
)

every_scorer = pytest.mark.parametrize("scorer", SCORERS.values(), ids=list(SCORERS))
quick_scorer = pytest.mark.parametrize("scorer", SCORERS.values(), ids=list(SCORERS))


def table(*columns) -> pd.DataFrame:
    return pd.DataFrame({f"feature {i}": np.asarray(c, np.float64) for i, c in enumerate(columns)})


def test_zscore_by_hand():  # mean 4, variance (9 + 4 + 1 + 0 + 36) / 5 = 10
    np.testing.assert_allclose(zscore(table([1, 2, 3, 4, 10])), np.array([3, 2, 1, 0, 6]) / np.sqrt(10))


def test_zscore_is_the_largest_of_scipy(rng):
    x = rng.normal(size=(15, 4))
    np.testing.assert_allclose(zscore(pd.DataFrame(x)), np.abs(stats.zscore(x)).max(axis=1))


def test_robust_zscore_by_hand():  # median 3, MAD 1
    found = robust_zscore(table([1, 2, 3, 4, 100]))
    np.testing.assert_allclose(found, np.array([2, 1, 0, 1, 97]) / 1.4826)


def test_robust_zscore_takes_the_largest_feature_in_absolute_value():
    # the second feature has median 0 and MAD 2
    found = robust_zscore(table([1, 2, 3, 4, 100], [-40, 2, 0, -2, 1]))
    np.testing.assert_allclose(found, np.array([20, 1, 0, 1, 97]) / 1.4826)


def test_robust_zscore_against_scipy(rng):
    x = rng.standard_t(2, size=(21, 5))
    expected = np.abs(x - np.median(x, axis=0)) / (1.4826 * stats.median_abs_deviation(x, axis=0))
    np.testing.assert_allclose(robust_zscore(pd.DataFrame(x)), expected.max(axis=1))


def test_where_the_mad_is_zero_the_mean_absolute_deviation_replaces_it():
    # deviations 0 0 0 0 5: MAD 0, mean 1
    np.testing.assert_allclose(robust_zscore(table([7, 7, 7, 7, 12])), [0, 0, 0, 0, 5 / 1.2533])


def test_robustly_scaled_keeps_the_sign():
    np.testing.assert_allclose(robustly_scaled(np.array([[1.0], [2], [4]])), np.array([[-1], [0], [2]]) / 1.4826)


def test_rounding_is_no_spread():
    """0.1 + 0.2 is not 0.3, and a sum in another order is not the same number; nobody may stand out by that."""
    x = np.full(9, 0.3)
    x[4] = 0.1 + 0.2
    assert x[4] != x[0]
    for scorer in SCORERS.values():
        assert (scorer(table(x)) == 0).all()


def test_two_cluster_margin_by_hand():
    # median 3, MAD 1; clusters {1, 2, 3, 4} around 2.5 and {100}
    x = np.array([1, 2, 3, 4, 100.0])
    expected = (np.abs(x - 2.5) - np.abs(x - 100)) / 1.4826
    np.testing.assert_allclose(two_cluster_margin(table(x)), expected)
    assert (expected > 0).tolist() == [False, False, False, False, True]


def test_two_cluster_margin_says_nothing_of_equal_halves():
    assert two_cluster_margin(table([0, 1, 2, 50, 51, 52])).tolist() == [0] * 6


def test_two_cluster_margin_in_two_dimensions():
    # two clients 30 MADs up in both features: the centres are (0, 0), (30, 30) after scaling by hand
    x, y = [-1, -1, 1, 1, 0, 0, 0, 30, 30], [-1, 1, -1, 1, 0, 0, 0, 30, 30]
    found = two_cluster_margin(table(x, y))
    far = np.hypot(30, 30) / 1.4826
    np.testing.assert_allclose(found[4:], [-far] * 3 + [far] * 2)


@pytest.mark.parametrize("minority", [1, 2, 3, 4])
def test_two_cluster_margin_finds_the_best_split(minority, rng):
    x = rng.normal(size=(9, 3))
    x[:minority, 1] += 12
    z = robustly_scaled(x)

    def within(side):
        return sum(
            ((part - part.mean(axis=0)) ** 2).sum() for part in (z[list(side)], np.delete(z, list(side), axis=0))
        )

    sides = [side for size in range(1, 5) for side in combinations(range(9), size)]
    best = min(sides, key=within)
    small, large = z[list(best)].mean(axis=0), np.delete(z, list(best), axis=0).mean(axis=0)
    expected = np.linalg.norm(z - large, axis=1) - np.linalg.norm(z - small, axis=1)
    assert best == tuple(range(minority))
    np.testing.assert_allclose(two_cluster_margin(pd.DataFrame(x)), expected)


@pytest.mark.parametrize("seed", range(10))
def test_two_cluster_margin_goes_on_to_the_end_of_two_means(seed):
    """SciPy from the same start, the halves along the principal direction, on clients without clear clusters."""
    x = np.random.default_rng(seed).standard_t(3, size=(61, 4))
    z = robustly_scaled(x)
    upper = (z - z.mean(axis=0)) @ np.linalg.svd(z - z.mean(axis=0))[2][0] > 0
    start = np.stack([z[upper].mean(axis=0), z[~upper].mean(axis=0)])
    centres, labels = kmeans2(z, start, iter=300, minit="matrix")
    small, large = centres[np.argsort(np.bincount(labels))]
    expected = np.linalg.norm(z - large, axis=1) - np.linalg.norm(z - small, axis=1)
    np.testing.assert_allclose(two_cluster_margin(pd.DataFrame(x)), expected)


# Clustering


def test_agglomerative_margin_by_hand():
    """Median 3, MAD 1: average linkage joins {1, 2, 3, 4} first, as 2-means does."""
    x = np.array([1, 2, 3, 4, 100.0])
    np.testing.assert_allclose(agglomerative_margin(table(x)), (np.abs(x - 2.5) - np.abs(x - 100)) / 1.4826)


def test_agglomerative_margin_isolates_one_far_client_where_two_means_halves():
    x = np.concatenate([np.linspace(0, 10, 12), np.linspace(14, 24, 9), [44]])
    assert (agglomerative_margin(table(x)) > 0).tolist() == [False] * 21 + [True]
    assert (two_cluster_margin(table(x)) > 0).sum() == 10


@pytest.mark.parametrize("seed", range(6))
def test_agglomerative_margin_against_scikit_learn(seed):
    x = np.random.default_rng(seed).standard_t(2, size=(15, 3))
    z = robustly_scaled(x)
    side = AgglomerativeClustering(2, linkage="average").fit_predict(z) == 1
    if 2 * side.sum() > len(side):
        side = ~side
    small, large = z[side].mean(axis=0), z[~side].mean(axis=0)
    expected = np.linalg.norm(z - large, axis=1) - np.linalg.norm(z - small, axis=1)
    np.testing.assert_allclose(agglomerative_margin(pd.DataFrame(x)), expected)


@pytest.mark.parametrize("scorer", [agglomerative_margin, two_cluster_margin])
def test_margins_say_nothing_of_equal_halves(scorer):
    assert scorer(table([0, 1, 2, 50, 51, 52])).tolist() == [0] * 6


def test_hdbscan_outlier_by_hand():
    """{0, ..., 4} hang together at steps of 1, then come 7 and 9; the majority is 4 of 7."""
    found = hdbscan_outlier(table([0, 1, 2, 3, 4, 7, 9]))
    scale = 1.4826 * 2  # median 3, deviations 3 2 1 0 1 4 6
    np.testing.assert_allclose(found, np.array([1, 1, 1, 1, 1, 3, 5]) / scale)


@pytest.mark.parametrize("seed", range(8))
def test_hdbscan_outlier_agrees_with_the_labels(seed):
    """Whoever scikit-learn's HDBSCAN leaves outside scores more than anybody inside."""
    x = np.random.default_rng(seed).standard_t(3, size=(17, 3))
    z = robustly_scaled(x)
    labels = HDBSCAN(17 // 2 + 1, min_samples=1, allow_single_cluster=True, copy=True).fit_predict(z)
    found = hdbscan_outlier(pd.DataFrame(x))
    assert found[labels < 0].min() > found[labels == 0].max()
    d = np.linalg.norm(z[:, None] - z, axis=2) + np.where(np.eye(17), np.inf, 0)
    np.testing.assert_allclose(found, d[:, labels == 0].min(axis=1))


def test_density_clusters_by_hand():
    x = np.array([0, 1, 2, 3, 10, 11, 12, 50.0])
    d = np.abs(x[:, None] - x)
    assert density_clusters(d, 3, 1).tolist() in ([0] * 4 + [1] * 3 + [-1], [1] * 4 + [0] * 3 + [-1])
    assert density_clusters(d, 5, 1, single=True).tolist() == [0] * 7 + [-1]
    assert density_clusters(d, 9).tolist() == [-1] * 8
    assert density_clusters(np.zeros((4, 4)), 3).tolist() == [0] * 4


def test_density_clusters_leaves_its_input_alone(rng):
    d = np.abs(np.subtract.outer(*[rng.normal(size=9)] * 2))
    before = d.copy()
    density_clusters(d, 3, 1)
    np.testing.assert_array_equal(d, before)


def test_equal_rows_far_apart_are_clusters_of_their_own():
    """An infinite density has no excess over another, and no warning."""
    d = np.abs(np.subtract.outer(*[np.repeat([0.0, 1, 5], 3)] * 2))
    labels = density_clusters(d, 2, 2)
    assert [len(set(labels[i : i + 3])) for i in (0, 3, 6)] == [1, 1, 1]
    assert set(labels) == {0, 1, 2}


@pytest.mark.parametrize("seed", range(5))
def test_lloyd_is_scikit_learns_k_means_from_the_same_start(seed):
    rng = np.random.default_rng(seed)
    tables = 50 + rng.normal(size=(3, 25, 2))
    starts = tables[:, :4]
    labels, centres = lloyd(tables, starts)
    for x, start, label, centre in zip(tables, starts, labels, centres, strict=True):
        model = KMeans(4, init=start, n_init=1, tol=0, algorithm="lloyd").fit(x)
        np.testing.assert_array_equal(label, model.labels_)
        np.testing.assert_allclose(centre, model.cluster_centers_)


@pytest.mark.parametrize("shape", [(12, 3), (5, 40)])
def test_two_means_starts_from_the_principal_direction(shape, rng):
    z = rng.normal(size=shape)
    z[0] += 5
    upper = (z - z.mean(axis=0)) @ np.linalg.svd(z - z.mean(axis=0))[2][0] > 0
    start = np.stack([z[~upper].mean(axis=0), z[upper].mean(axis=0)])
    _, expected = kmeans2(z, start, iter=300, minit="matrix")
    second, centres = two_means(z)
    assert second.tolist() in ((expected == 1).tolist(), (expected == 0).tolist())
    np.testing.assert_allclose(centres[1], z[second].mean(axis=0))


def test_two_means_of_equal_rows():
    second, centres = two_means(np.full((4, 2), 0.1))
    assert not second.any()
    np.testing.assert_array_equal(centres, np.full((2, 2), 0.1))


# Isolation forest


@pytest.mark.parametrize(("rows", "features"), [(12, 5), (60, 3), (300, 4)])
def test_isolation_forest_means_what_scikit_learns_does(rows, features, rng):
    """No farther from a forest of 500 trees than two forests of 100 are apart; 300 rows are sub-sampled."""
    x = rng.normal(size=(rows, features))
    x[3] += 4
    z = robustly_scaled(x)
    truth = -IsolationForest(n_estimators=500, random_state=0).fit(z).score_samples(z)
    found = isolation_forest(pd.DataFrame(x))
    assert found.argmax() == 3
    assert np.abs(found - truth).max() < 0.05
    assert abs((found - truth).mean()) < 0.01
    assert np.corrcoef(found, truth)[0, 1] > 0.95


def test_isolation_forest_by_hand():
    """Of two rows each is cut off at once: depth 1, expected depth 1. Of 0, 1 and 10^6 the last falls first."""
    np.testing.assert_allclose(isolation_forest(table([0, 1])), [0.5, 0.5])
    expected = 2 * (np.log(2) + np.euler_gamma) - 4 / 3
    found = isolation_forest(table([0, 1, 1e6]))
    np.testing.assert_allclose(found, 2 ** (-np.array([2, 2, 1]) / expected), rtol=1e-3)
    expected = 2 * (np.log(3) + np.euler_gamma) - 3 / 2  # of four; trees are cut off at depth 2, with 1 left to cut
    found = isolation_forest(table([0, 1, 1e6, 1e12]))
    np.testing.assert_allclose(found, 2 ** (-np.array([3, 3, 2, 1]) / expected), rtol=1e-3)


def test_isolation_forest_leaves_constant_features_out(rng):
    x = rng.normal(size=(9, 2))
    wide = np.concatenate([x, np.ones((9, 30))], axis=1)
    np.testing.assert_array_equal(isolation_forest(pd.DataFrame(wide)), isolation_forest(pd.DataFrame(x)))


@every_scorer
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e200])
def test_a_row_that_is_not_finite_scores_infinity_and_is_no_reference(scorer, bad, rng):
    x = rng.normal(size=(9, 3))
    broken = np.insert(x, 4, [0.5, bad, 0.1], axis=0)
    found = scorer(pd.DataFrame(broken))
    assert found[4] == np.inf
    np.testing.assert_array_equal(np.delete(found, 4), scorer(pd.DataFrame(x)))


@every_scorer
@pytest.mark.parametrize("rows", [0, 1, 2, 3])
def test_few_rows_have_finite_scores(scorer, rows):
    found = scorer(pd.DataFrame(np.arange(2.0 * rows).reshape(rows, 2)))
    assert found.shape == (rows,)
    assert np.isfinite(found).all()


@every_scorer
def test_nothing_but_broken_rows(scorer):
    assert scorer(table([np.nan, np.inf])).tolist() == [np.inf, np.inf]


@every_scorer
def test_without_features_nobody_stands_out(scorer):
    assert scorer(pd.DataFrame(index=range(4))).tolist() == [0] * 4


@every_scorer
@pytest.mark.parametrize("size", [1e-300, 1e-12, 1.0, 1e12, 1e140])
def test_units_do_not_matter(scorer, size, rng):
    x = rng.normal(size=(9, 2))
    np.testing.assert_allclose(scorer(pd.DataFrame(x * size)), scorer(pd.DataFrame(x)), rtol=1e-6)


numbers = st.one_of(st.integers(-3, 3).map(float), st.floats(allow_nan=True, allow_infinity=True))


@quick_scorer
@settings(max_examples=60, deadline=None)
@given(x=arrays(np.float64, array_shapes(min_dims=2, max_dims=2, max_side=7), elements=numbers), data=st.data())
def test_any_table_has_scores_that_follow_the_rows(scorer, x, data):
    found = scorer(pd.DataFrame(x))
    assert not np.isnan(found).any()
    assert not np.isneginf(found).any()
    order = np.array(data.draw(st.permutations(range(len(x)))))
    np.testing.assert_allclose(scorer(pd.DataFrame(x[order])), found[order], rtol=1e-6)
    twice = scorer(pd.DataFrame(np.concatenate([x, x])))
    np.testing.assert_array_equal(twice[: len(x)], twice[len(x) :])


# The bridge to scikit-learn


def test_bridge_gives_what_the_estimator_gives(rng):
    x = rng.normal(size=(20, 3))
    x[3] += 9
    z = robustly_scaled(x)
    found = outlier(LocalOutlierFactor(n_neighbors=7))(pd.DataFrame(x))
    expected = -LocalOutlierFactor(n_neighbors=7).fit(z).negative_outlier_factor_
    np.testing.assert_allclose(found, expected, rtol=1e-9)
    assert found.argmax() == 3


def test_local_outlier_factor_against_its_definition(rng):
    """Breunig et al. 2000, definitions 3 to 7, client by client."""
    x, k = rng.normal(size=(14, 2)), 4
    z = robustly_scaled(x)
    d = np.linalg.norm(z[:, None] - z[None], axis=2)
    near = [[j for j in np.argsort(d[i]) if j != i][:k] for i in range(14)]
    reach = [[max(d[j, near[j][-1]], d[i, j]) for j in near[i]] for i in range(14)]
    density = [1 / np.mean(r) for r in reach]
    expected = [np.mean([density[j] for j in near[i]]) / density[i] for i in range(14)]
    np.testing.assert_allclose(local_outlier_factor(pd.DataFrame(x), neighbours=k), expected, rtol=1e-6)


ESTIMATORS = [
    IsolationForest(n_estimators=30),
    LocalOutlierFactor(n_neighbors=5),
    LocalOutlierFactor(n_neighbors=5, novelty=True),
    OneClassSVM(),
    EllipticEnvelope(support_fraction=0.9),
]


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=repr)
def test_any_outlier_estimator_ranks_the_outlier_first(estimator, rng):
    x = rng.normal(size=(24, 2))
    x[11] += [8, -8]
    found = outlier(estimator)(pd.DataFrame(x))
    assert found.argmax() == 11
    order = rng.permutation(24)
    np.testing.assert_allclose(outlier(estimator)(pd.DataFrame(x[order])), found[order], rtol=1e-6)


def test_bridge_leaves_the_estimator_as_it_was(rng):
    estimator = IsolationForest(n_estimators=10)
    scorer = outlier(estimator)
    x = pd.DataFrame(rng.normal(size=(9, 2)))
    np.testing.assert_array_equal(scorer(x), scorer(x))
    assert estimator.random_state is None
    assert not hasattr(estimator, "estimators_")


def test_bridge_keeps_a_seed_that_is_set(rng):
    x = pd.DataFrame(rng.normal(size=(30, 2)))
    by_seed = [outlier(IsolationForest(n_estimators=10, random_state=seed))(x) for seed in (0, 1)]
    assert (by_seed[0] != by_seed[1]).any()
    np.testing.assert_array_equal(outlier(IsolationForest(n_estimators=10))(x), by_seed[0])


def test_many_equal_rows_do_not_upset_the_neighbours():
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # scikit-learn warns of duplicates that leave no neighbour
        found = local_outlier_factor(table([0] * 6 + [1, 2, 3, 4, 5, 6, 7, 50]))
    assert len(set(found[:6])) == 1
    assert found.argmax() == 13


def test_bridge_asks_for_no_more_neighbours_than_there_are(rng):
    x = pd.DataFrame(rng.normal(size=(8, 2)))
    everybody = outlier(LocalOutlierFactor(n_neighbors=7))(x)
    np.testing.assert_array_equal(outlier(LocalOutlierFactor(n_neighbors=20))(x), everybody)


def test_bridge_takes_an_estimator_in_the_manner_of_pyod(rng):
    class Norm:
        def __sklearn_clone__(self):
            return Norm()

        def get_params(self):
            return {}

        def fit(self, z):
            self.decision_scores_ = np.linalg.norm(z, axis=1)
            return self

    x = rng.normal(size=(9, 2))
    expected = np.linalg.norm(robustly_scaled(x), axis=1)
    np.testing.assert_allclose(outlier(Norm())(pd.DataFrame(x)), expected)


def test_bridge_takes_an_estimator_that_keeps_to_pyods_rules(rng):
    """PyOD's own `decision_function` and `labels_` say the opposite of scikit-learn's: its scores must win."""

    class Detector(BaseEstimator):
        def __init__(self, contamination=0.1):
            self.contamination = contamination

        def fit(self, z, y=None):
            self.decision_scores_ = self.decision_function(z)
            self.labels_ = (self.decision_scores_ > 2).astype(int)
            return self

        def decision_function(self, z):
            return np.abs(z).sum(axis=1)

    x = rng.normal(size=(9, 2))
    x[4] += 20
    found = outlier(Detector())(pd.DataFrame(x))
    np.testing.assert_allclose(found, np.abs(robustly_scaled(x)).sum(axis=1))
    assert found.argmax() == 4


def test_bridge_refuses_what_does_not_score(rng):
    from sklearn.preprocessing import StandardScaler

    with pytest.raises(InputError, match="must have score_samples or decision_function, found StandardScaler"):
        outlier(StandardScaler())(pd.DataFrame(rng.normal(size=(5, 2))))


def test_bridge_says_what_it_is():
    assert repr(outlier(LocalOutlierFactor(n_neighbors=3))) == "outlier(LocalOutlierFactor(n_neighbors=3))"


def test_settings_go_in_by_partial(rng):
    x = pd.DataFrame(rng.normal(size=(12, 2)))
    three = partial(SCORERS["local_outlier_factor"], neighbours=3)(x)
    np.testing.assert_array_equal(three, outlier(LocalOutlierFactor(n_neighbors=3))(x))
    half = SCORERS["local_outlier_factor"](x)
    np.testing.assert_array_equal(half, outlier(LocalOutlierFactor(n_neighbors=6))(x))
    assert (three != half).any()
