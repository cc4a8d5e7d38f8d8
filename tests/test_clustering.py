"""Clusters against hand-made answers, scikit-learn, scipy, and every split tried."""

from collections import Counter
from itertools import combinations, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from scipy.cluster.vq import kmeans2
from sklearn.cluster import HDBSCAN, KMeans, MeanShift, estimate_bandwidth

from gradlens.clustering import (
    density_clusters,
    gap_clusters,
    gap_count,
    lloyd,
    lower_cluster_end,
    majority_cluster,
    mean_shift,
    two_means,
    two_means_by_column,
)

seeds = st.integers(0, 2**32 - 1)


def test_density_clusters_by_hand():
    x = np.array([0, 1, 2, 3, 10, 11, 12, 50.0])
    d = np.abs(x[:, None] - x)
    assert density_clusters(d, 3, 1).tolist() in ([0] * 4 + [1] * 3 + [-1], [1] * 4 + [0] * 3 + [-1])
    assert density_clusters(d, 5, 1, single=True).tolist() == [0] * 7 + [-1]
    assert density_clusters(d, 9).tolist() == [-1] * 8
    assert density_clusters(np.zeros((4, 4)), 3).tolist() == [0] * 4


def test_neighbors_are_counted_as_the_package_hdbscan_counts_them():
    """Labels of hdbscan 0.8.44 with min_samples=3; scikit-learn has them with 4."""
    x = np.array([12, 15, 21, 26, 36, 37, 40, 44, 50, 53, 56.0])
    d = np.abs(x[:, None] - x)
    assert density_clusters(d, 3, 3).tolist() == [-1, 0, 0, 0, 1, 1, 1, 1, 1, 1, -1]
    assert density_clusters(d, 3, 2).tolist() != density_clusters(d, 3, 3).tolist()


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("single", [True, False])
def test_one_neighbor_is_single_linkage(seed, single):
    """Nobody is nearer to another than its nearest neighbor: at 1 it does not matter whether a row counts itself."""
    d = np.abs(np.subtract.outer(*[np.random.default_rng(seed).normal(size=15)] * 2))
    linked = HDBSCAN(4, min_samples=1, metric="precomputed", copy=True, allow_single_cluster=single).fit_predict(d)
    np.testing.assert_array_equal(density_clusters(d, 4, 1, single=single), linked)


def test_density_clusters_leaves_its_input_alone(rng):
    d = np.abs(np.subtract.outer(*[rng.normal(size=9)] * 2))
    before = d.copy()
    density_clusters(d, 3, 1)
    np.testing.assert_array_equal(d, before)


def test_equal_rows_far_apart_are_clusters_of_their_own():
    """An infinite density has no excess over another, and no warning."""
    d = np.abs(np.subtract.outer(*[np.repeat([0.0, 1, 5], 3)] * 2))
    labels = density_clusters(d, 2, 1)
    assert [len(set(labels[i : i + 3])) for i in (0, 3, 6)] == [1, 1, 1]
    assert set(labels) == {0, 1, 2}


@pytest.mark.parametrize("seed", range(5))
def test_lloyd_is_scikit_learns_k_means_from_the_same_start(seed):
    rng = np.random.default_rng(seed)
    tables = 50 + rng.normal(size=(3, 25, 2))
    starts = tables[:, :4]
    labels, centers = lloyd(tables, starts)
    for x, start, label, center in zip(tables, starts, labels, centers, strict=True):
        model = KMeans(4, init=start, n_init=1, tol=0, algorithm="lloyd").fit(x)
        np.testing.assert_array_equal(label, model.labels_)
        np.testing.assert_allclose(center, model.cluster_centers_)


@pytest.mark.parametrize("shape", [(12, 3), (5, 40)])
def test_two_means_starts_from_the_principal_direction(shape, rng):
    z = rng.normal(size=shape)
    z[0] += 5
    upper = (z - z.mean(axis=0)) @ np.linalg.svd(z - z.mean(axis=0))[2][0] > 0
    start = np.stack([z[~upper].mean(axis=0), z[upper].mean(axis=0)])
    _, expected = kmeans2(z, start, iter=300, minit="matrix")
    second, centers = two_means(z)
    assert second.tolist() in ((expected == 1).tolist(), (expected == 0).tolist())
    np.testing.assert_allclose(centers[1], z[second].mean(axis=0))


def test_two_means_of_equal_rows():
    second, centers = two_means(np.full((4, 2), 0.1))
    assert not second.any()
    np.testing.assert_array_equal(centers, np.full((2, 2), 0.1))


@settings(max_examples=80, deadline=None)
@given(
    x=arrays(
        np.float32,
        array_shapes(min_dims=2, max_dims=2, min_side=2, max_side=8),
        elements=st.one_of(st.integers(-4, 4).map(float), st.floats(-10, 10, width=32)),
    )
)
def test_two_means_by_column_is_the_best_of_all_splits(x):
    gaps, minority = two_means_by_column(x)
    for column, gap, smaller in zip(x.T.astype(np.float64), gaps, minority.T, strict=True):
        if np.ptp(column) == 0:
            assert gap == 0
            assert not smaller.any()
            continue
        order = np.argsort(column)
        sides = [order[:k] for k in range(1, len(column))]
        within = [np.var(column[s]) * len(s) + np.var(np.delete(column, s)) * (len(column) - len(s)) for s in sides]
        best = [s for s, w in zip(sides, within, strict=True) if w <= min(within) + 1e-9 * np.ptp(column) ** 2]
        found = [abs(column[s].mean() - np.delete(column, s).mean()) for s in best]
        assert min(abs(gap - f) for f in found) <= 1e-9 * np.ptp(column)
        assert 2 * smaller.sum() < len(column)
        for a, b in combinations(range(len(column)), 2):
            assert column[a] != column[b] or smaller[a] == smaller[b]


def test_two_means_by_column_by_hand():
    gaps, minority = two_means_by_column(
        np.array([[0, 0, 7], [1, 0, 7], [2, 9, 7], [11, 9, 7], [0.0, 4, 7]], np.float32)
    )
    np.testing.assert_allclose(gaps, [11 - 3 / 4, 9 - 4 / 3, 0])
    assert minority.T.tolist() == [[False] * 3 + [True, False], [False, False, True, True, False], [False] * 5]


@pytest.mark.parametrize("groups", [2, 3])
def test_gap_statistic_counts_the_groups(groups, rng):
    middles = np.array([[0, 0], [10, 0], [0, 10]])[:groups]
    points = np.concatenate([middle + 0.3 * rng.normal(size=(6 + i, 2)) for i, middle in enumerate(middles)])
    labels = gap_clusters(points, 10, 5, 0)
    sizes = sorted(Counter(labels.tolist()).values())
    assert sizes == [6 + i for i in range(groups)]


def test_gap_statistic_finds_one_group_in_one():
    """FLPoison's gap statistic, off by one, never says 1."""
    ones = [len(set(gap_clusters(np.random.default_rng(s).random((20, 2)), 10, 5, 0))) == 1 for s in range(30)]
    assert sum(ones) >= 24


def test_gap_statistic_by_hand():
    """Two points three times each: within two groups there is nothing left, whatever the reference."""
    points = np.repeat([[0.0, 0.0], [1.0, 2.0]], 3, axis=0)
    labels = gap_clusters(points, 10, 5, 0)
    assert len(set(labels[:3])) == len(set(labels[3:])) == 1
    assert labels[0] != labels[3]


def naive_gap(scores, seed):
    """The official procedure with every split of the ordered scores tried."""

    def within(x, k):
        x = np.sort(x)
        cuts = ([0, *inner, len(x)] for inner in combinations(range(1, len(x)), k - 1))
        return min(sum(((x[a:b] - x[a:b].mean()) ** 2).sum() for a, b in pairwise(c)) for c in cuts)

    most = min(7, len(scores) - 1)
    uniform = np.random.default_rng(seed).uniform(size=(10, len(scores)))
    scaled = (scores - scores.min()) / (scores.max() - scores.min())
    gaps, errors = [], []
    for k in range(1, most + 1):
        reference = np.array([within(sample, k) for sample in uniform])
        gaps.append(np.log(reference.mean()) - np.log(within(scaled, k)))
        errors.append(np.sqrt(1.1) * np.std(np.log(reference)))
    return next((k for k in range(1, most) if gaps[k - 1] >= gaps[k] - errors[k]), most)


@pytest.mark.parametrize("seed", range(12))
def test_number_of_clusters_against_every_split(seed):
    rng = np.random.default_rng(seed)
    scores = np.concatenate([rng.normal(size=5), rng.normal(size=4) + [0, 3, 9][seed % 3]])
    assert gap_count(scores, seed) == naive_gap(scores, seed)


@pytest.mark.parametrize("clients", [20, 100])
def test_thirty_homogeneous_score_sets_are_no_attack(clients):
    """FLPoison's gap statistic is off by one: it never finds a single cluster, and fires on 30 of 30."""
    rng = np.random.default_rng(0)
    assert sum(gap_count(rng.normal(1, 0.1, clients), 0) > 1 for _ in range(30)) == 0


@pytest.mark.parametrize("clients", [10, 28])
def test_two_score_sets_are_an_attack(clients):
    rng = np.random.default_rng(0)
    for _ in range(10):
        scores = np.concatenate([rng.normal(1, 0.1, clients - 4), rng.normal(2.5, 0.1, 4)])
        assert gap_count(scores, 0) > 1
        assert (scores > lower_cluster_end(scores)).nonzero()[0].tolist() == [*range(clients - 4, clients)]


@settings(deadline=None, max_examples=25)
@given(seed=seeds, count=st.integers(4, 20), groups=st.integers(1, 4))
def test_mean_shift_is_scikit_learns(seed, count, groups):
    rng = np.random.default_rng(seed)
    x = rng.random((groups, 3))[rng.integers(0, groups, count)] + 0.05 * rng.random((count, 3))
    bandwidth = estimate_bandwidth(x, quantile=0.5)
    expected = MeanShift(bandwidth=bandwidth, cluster_all=False).fit(x)
    labels, centers = mean_shift(x, bandwidth)
    sizes = [sorted(np.bincount(found[found >= 0])) for found in (labels, expected.labels_)]
    assert sizes[0] == sizes[1]
    order, other = np.lexsort(np.round(centers, 6).T), np.lexsort(np.round(expected.cluster_centers_, 6).T)
    np.testing.assert_allclose(centers[order], expected.cluster_centers_[other], atol=1e-3 * bandwidth)


def test_the_majority_is_the_largest_cluster():
    """The nearest 4 of a client reach from each of the three ones to the zeros: the bandwidth is a third of that."""
    members, distances = majority_cluster(np.concatenate([np.ones((3, 3)), np.zeros((6, 3))]))
    assert members.tolist() == [False] * 3 + [True] * 6
    np.testing.assert_allclose(distances, [3] * 3 + [0] * 6, atol=1e-12)


@pytest.mark.parametrize("x", [np.repeat(np.eye(2), 3, axis=0), np.eye(3), np.zeros((4, 3))])
def test_among_equal_clusters_none_is_the_minority(x):
    members, distances = majority_cluster(x)
    assert members.all()
    assert distances.tolist() == [0] * len(x)
