"""Partitions: every sample goes to one client, and skew is where it is asked for."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradlens.log import InputError
from simulations.partition import PARTITIONS, dirichlet, iid


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(sorted(PARTITIONS)),
    labels=st.lists(st.integers(0, 4), min_size=200, max_size=400),
    num_clients=st.integers(1, 12),
    seed=st.integers(0, 2**32),
)
def test_every_sample_is_used_exactly_once(name, labels, num_clients, seed):
    parts = PARTITIONS[name]()(np.array(labels), num_clients, np.random.default_rng(seed))
    assert len(parts) == num_clients
    np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.arange(len(labels)))


@given(size=st.integers(1, 100), num_clients=st.integers(1, 20), seed=st.integers(0, 2**32))
def test_iid_shares_differ_by_one_at_most(size, num_clients, seed):
    if size < num_clients:
        return
    sizes = [len(part) for part in iid()(np.zeros(size), num_clients, np.random.default_rng(seed))]
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("alpha", [1e-3, 0.1, 0.5, 100.0])
def test_dirichlet_gives_everybody_the_minimum(alpha, rng):
    labels = rng.integers(10, size=1_500)
    sizes = [len(part) for part in dirichlet(alpha=alpha, minimum=1)(labels, 8, rng)]
    assert min(sizes) >= 1
    assert sum(sizes) == 1_500
    sizes = [len(part) for part in dirichlet(alpha=max(alpha, 0.1), minimum=60)(labels, 8, rng)]
    assert min(sizes) >= 60


def test_a_small_alpha_skews_and_a_large_one_does_not(rng):
    labels = rng.integers(10, size=20_000)

    def largest_share(alpha: float) -> float:
        """Of each client's commonest class, averaged over the clients: .1 without skew, 1 at the utmost."""
        parts = dirichlet(alpha=alpha)(labels, 20, rng)
        return float(np.mean([np.bincount(labels[part], minlength=10).max() / len(part) for part in parts]))

    assert largest_share(0.05) > 0.7
    assert 0.2 < largest_share(1.0) < 0.6
    assert largest_share(10_000.0) < 0.13


def test_dirichlet_shares_of_a_class_are_dirichlet(rng):
    """One class among 5 clients: shares have mean 1/5 and the variance a (A - a) / A^2 (A + 1) of Dirichlet(2)."""
    shares = np.array([[len(part) / 2_000 for part in dirichlet(alpha=2.0, minimum=1)(np.zeros(2_000), 5, rng)]
                       for _ in range(2_000)])  # fmt: skip
    np.testing.assert_allclose(shares.mean(axis=0), 0.2, atol=0.01)
    np.testing.assert_allclose(shares.var(axis=0), 2 * 8 / (100 * 11), rtol=0.15)


def test_the_generator_decides(rng):
    labels = rng.integers(10, size=500)
    for build in PARTITIONS.values():
        first, second, other = (build()(labels, 7, np.random.default_rng(seed)) for seed in (3, 3, 4))
        assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))
        assert not all(np.array_equal(a, b) for a, b in zip(first, other, strict=True))


def test_the_impossible_is_one_line(rng):
    with pytest.raises(InputError, match="need 100 samples, found 99"):
        dirichlet(minimum=10)(np.zeros(99), 10, rng)
    with pytest.raises(InputError, match=r"no draw in 1,000 with alpha 0\.001"):
        dirichlet(alpha=0.001, minimum=10)(np.repeat(np.arange(2), 60), 12, rng)
    with pytest.raises(InputError, match="found 2"):
        iid()(np.zeros(2), 3, rng)
