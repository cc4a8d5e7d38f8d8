"""Statistics of one round, layer by layer: exact small answers, slow float64 oracles, properties."""

from functools import partial

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import planted
from gradlens.errors import CannotSay, InputError
from gradlens.statistics import (
    aggregate_cosines,
    global_cosines,
    kurtosis,
    large_share,
    layer_cosines,
    neighbour_cosines,
    neighbour_distances,
    sign_agreement,
    spectral,
)

STATISTICS = {
    function.__name__: function
    for function in (
        aggregate_cosines,
        global_cosines,
        kurtosis,
        large_share,
        layer_cosines,
        neighbour_cosines,
        neighbour_distances,
        sign_agreement,
        spectral,
    )
}
SHAPE = (6, 5)
GLOBAL = np.random.default_rng(99).normal(size=SHAPE).astype(np.float32)

every_statistic = pytest.mark.parametrize("name", STATISTICS)
seeds = st.integers(0, 10_000)
counts = st.integers(3, 9)


def log_of(x, before=GLOBAL):
    """A log of one layer, "w"."""
    return planted.log_of({"w": np.asarray(x, np.float32)}, {"w": np.asarray(before, np.float32)})


def of(statistic, x, before=GLOBAL):
    return statistic(log_of(x, before))["w"].to_numpy()


def on_line(statistic, x, before=None):
    """The statistic of a layer [client, number] whose global model is 1 everywhere unless it is given."""
    x = np.asarray(x, np.float32)
    return of(statistic, x, np.ones(x.shape[1:]) if before is None else before)


def random_updates(seed, count, shape=SHAPE):
    rng = np.random.default_rng(seed)
    return (rng.normal(size=shape) + rng.normal(size=(count, *shape)) * rng.uniform(0.5, 2)).astype(np.float32)


# Oracles: the definition, number by number


def cosine(a, b):
    a, b = np.ravel(a).astype(float), np.ravel(b).astype(float)
    lengths = np.sqrt((a * a).sum()) * np.sqrt((b * b).sum())
    return (a * b).sum() / lengths if lengths > 0 else 0.0


def oracle_sign_agreement(x):
    flat = x.reshape(len(x), -1)
    answers = []
    for row in flat:
        same = counted = 0
        for i, number in enumerate(row):
            votes = sum(int(np.sign(other)) for other in flat[:, i])
            if number != 0 and votes != 0:
                counted += 1
                same += np.sign(number) == np.sign(votes)
        answers.append(same / counted if counted else 0.0)
    return answers


def oracle_large_share(x, multiple=2.0):
    sizes = sorted(np.sqrt(np.mean(row**2)) for row in x)
    middle = len(sizes) // 2
    typical = sizes[middle] if len(sizes) % 2 else (sizes[middle - 1] + sizes[middle]) / 2
    return [np.mean([abs(number) > multiple * typical for number in row.ravel()]) for row in x]


def oracle_kurtosis(x):
    answers = []
    for row in x.reshape(len(x), -1):
        mean = sum(row) / len(row)
        second = sum((v - mean) ** 2 for v in row) / len(row)
        fourth = sum((v - mean) ** 4 for v in row) / len(row)
        answers.append(fourth / second**2 - 3)
    return answers


def oracle_spectral(x):
    """By the singular value decomposition of the updates themselves; no Gram matrix."""
    centred = (x - x.mean(axis=0)).reshape(len(x), -1)
    direction = np.linalg.svd(centred, full_matrices=False)[2][0]
    return np.abs(centred @ direction) / np.median([np.linalg.norm(row) for row in centred])


def oracle_neighbour_distances(x, neighbours=None):
    answers = []
    for i, row in enumerate(x):
        distances = sorted(np.linalg.norm(row - other) for j, other in enumerate(x) if j != i)
        count = len(distances) // 2 if neighbours is None else neighbours
        answers.append(np.mean(distances[:count]))
    return answers


def oracle_neighbour_cosines(x, neighbours=3):
    centred = x - np.median(x, axis=0)
    answers = []
    for i, row in enumerate(centred):
        cosines = sorted((cosine(row, other) for j, other in enumerate(centred) if j != i), reverse=True)
        answers.append(np.mean(cosines[:neighbours]))
    return answers


ORACLES = {
    "aggregate_cosines": lambda x: [cosine(row, x.mean(axis=0)) for row in x],
    "global_cosines": lambda x: [cosine(row, GLOBAL) for row in x],
    "kurtosis": oracle_kurtosis,
    "large_share": oracle_large_share,
    "layer_cosines": lambda x: [cosine(row, np.median(x, axis=0)) for row in x],
    "neighbour_cosines": oracle_neighbour_cosines,
    "neighbour_distances": oracle_neighbour_distances,
    "sign_agreement": oracle_sign_agreement,
    "spectral": oracle_spectral,
}


@every_statistic
@given(seed=seeds, count=counts)
@settings(max_examples=25, deadline=None)
def test_against_a_slow_oracle(name, seed, count):
    x = random_updates(seed, count)
    np.testing.assert_allclose(of(STATISTICS[name], x), ORACLES[name](x.astype(float)), rtol=1e-5, atol=1e-6)


WITH_TIES = ["aggregate_cosines", "neighbour_cosines", "neighbour_distances", "sign_agreement"]


@pytest.mark.parametrize("name", WITH_TIES)
@given(x=arrays(np.int8, (4, 5), elements=st.integers(-2, 2)))
@settings(max_examples=60, deadline=None)
def test_against_a_slow_oracle_where_numbers_repeat_and_are_zero(name, x):
    """Whole numbers are summed exactly, so that zeros, equal clients and split votes are what they are."""
    x = np.round(4 * x.astype(float))  # mean and median of four clients are whole numbers, too
    np.testing.assert_allclose(on_line(STATISTICS[name], x), ORACLES[name](x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", sorted(set(STATISTICS) - {"layer_cosines"}))
def test_of_a_layer_larger_than_a_block(name, rng):
    x = rng.normal(size=(5, 3, 7_000)).astype(np.float32) * rng.uniform(1, 2, size=(5, 1, 1)).astype(np.float32)
    x[2, 2, 5_000:] *= 3  # the end of the layer is unlike its beginning
    before = rng.normal(size=(3, 7_000)).astype(np.float32)
    y = x.astype(float)
    votes = np.sign(np.sign(y).sum(axis=0))
    typical = np.median(np.sqrt((y**2).mean(axis=(1, 2))))
    z = (y - y.mean(axis=(1, 2), keepdims=True)) / y.std(axis=(1, 2), keepdims=True)
    expected = ORACLES[name](y) if name not in ("global_cosines", "kurtosis", "large_share", "sign_agreement") else None
    if name == "global_cosines":
        expected = [cosine(row, before) for row in y]
    elif name == "kurtosis":
        expected = (z**4).mean(axis=(1, 2)) - 3
    elif name == "large_share":
        expected = (np.abs(y) > 2 * typical).mean(axis=(1, 2))
    elif name == "sign_agreement":
        expected = [(np.sign(row) == votes)[votes != 0].mean() for row in y]
    np.testing.assert_allclose(of(STATISTICS[name], x, before), expected, rtol=1e-6, atol=1e-9)


# Exact small answers


def test_aggregate_cosines_by_hand():
    # the mean is (1, 1)
    np.testing.assert_allclose(
        on_line(aggregate_cosines, [[3, 3], [-1, 1], [1, -1], [0, 4], [2, -2]]),
        [1, 0, 0, np.sqrt(0.5), 0],
        atol=1e-12,
    )


def test_aggregate_cosines_are_0_where_the_updates_cancel():
    for seed in range(8):  # in some, what rounding leaves of the mean's square is above 0
        x = np.random.default_rng(seed).normal(size=(1, 999)).astype(np.float32) * np.array([[1], [2], [4], [-7]])
        assert on_line(aggregate_cosines, np.repeat(x, 3, axis=0)).tolist() == [0] * 12


def test_global_cosines_by_hand():
    before = [3, 4]
    answers = on_line(global_cosines, [[6, 8], [-3, -4], [4, -3], [0, 0], [1, 0]], before)
    np.testing.assert_allclose(answers, [1, -1, 0, 0, 0.6], atol=1e-12)


def test_global_cosines_are_0_where_the_model_is_0():
    assert on_line(global_cosines, np.eye(3), np.zeros(3)).tolist() == [0, 0, 0]


def test_sign_agreement_by_hand():
    # majorities: +, -, none (split), + of those who say anything; zeros say nothing
    x = [[1, -1, 1, 0], [2, -2, -1, 0], [3, 5, 1, 0], [-1, -1, -1, 7]]
    np.testing.assert_allclose(on_line(sign_agreement, x), [1, 1, 1 / 2, 2 / 3])
    assert on_line(sign_agreement, [[1, 0], [2, 0], [0, 0]]).tolist() == [1, 1, 0]


def test_large_share_by_hand():
    # root mean squares 1, 1, 2, 5: the median is 1.5, large is more than 3
    x = [[1, 1, -1, 1], [1, -1, 1, 1], [0, -4, 0, 0], [5, 5, -5, 5]]
    assert on_line(large_share, x).tolist() == [0, 0, 0.25, 1]
    assert on_line(partial(large_share, multiple=3), x).tolist() == [0, 0, 0, 1]


def test_large_share_where_most_send_0():
    assert on_line(large_share, [[0, 0], [0, 0], [0, 0], [1, 0], [1, -1]]).tolist() == [0, 0, 0, 0.5, 1]


def test_spectral_by_hand():
    # the mean is 0; along the first axis 3, 3, 0, 0, second axis 1, 1; distances 3, 3, 1, 1: the median is 2
    x = [[3, 0], [-3, 0], [0, 1], [0, -1]]
    np.testing.assert_allclose(on_line(spectral, x), [1.5, 1.5, 0, 0], atol=1e-12)


def test_spectral_is_0_where_no_direction_leads():
    assert on_line(spectral, np.eye(4)).tolist() == [0] * 4
    assert on_line(spectral, [[1, 0], [-1, 0], [0, 1], [0, -1]]).tolist() == [0] * 4
    assert on_line(spectral, np.ones((4, 3))).tolist() == [0] * 4


@pytest.mark.parametrize("seed", range(10))
def test_spectral_is_0_not_rounding_across_the_direction(seed):
    """Sevenths do not add up exactly, and a scorer would take what is left for a difference."""
    rng = np.random.default_rng(seed)
    common, along, across = rng.integers(-999, 999, size=(3, 50)) / 8  # exact in float32
    along[25:] = across[:25] = 0  # at right angles
    pulls = np.array([99 * along, -99 * along, *[4 * across] * 3, *[-3 * across] * 4])[rng.permutation(9)]
    found = on_line(spectral, common + pulls)
    assert (found[pulls[:, :25].any(axis=1)] > 1).all()
    assert (found[~pulls[:, :25].any(axis=1)] == 0).all()


def test_spectral_where_most_lie_on_the_mean():
    np.testing.assert_allclose(on_line(spectral, [[1, 2], [3, 6], [2, 4], [2, 4], [2, 4]]), [1, 1, 0, 0, 0])


def test_kurtosis_by_hand():
    two_values = np.tile([1, -1], 12)  # the flattest there is: -2
    one_of_25 = np.zeros(25)
    one_of_25[3] = 7  # p = 1/25: (1 - 3 p (1 - p)) / (p (1 - p)) - 3
    p = 1 / 25
    spike = (1 - 3 * p * (1 - p)) / (p * (1 - p)) - 3
    x = [np.append(two_values, 0), one_of_25, np.full(25, 0.1), np.full(25, 0)]
    found = on_line(kurtosis, x)
    np.testing.assert_allclose(found, [25 / 24 - 3, spike, 0, 0], rtol=1e-6)
    assert found[2:].tolist() == [0, 0]


def test_kurtosis_leaves_small_layers_out():
    small, large = np.ones((4, 23), np.float32), np.ones((4, 24), np.float32)
    log = planted.log_of({"s": small, "l": large}, {"s": small[0], "l": large[0]})
    assert kurtosis(log).columns.tolist() == ["l"]
    with pytest.raises(CannotSay, match="no layer of 24 numbers"):
        kurtosis(planted.log_of({"s": small}, {"s": small[0]}))


def test_neighbour_distances_by_hand():
    # on a line at 0, 1, 3, 7, 15: half of four others are two
    x = [[0], [1], [3], [7], [15]]
    np.testing.assert_allclose(on_line(neighbour_distances, x), [2, 1.5, 2.5, 5, 10])
    np.testing.assert_allclose(on_line(partial(neighbour_distances, neighbours=1), x), [1, 1, 2, 4, 8])
    everybody = on_line(partial(neighbour_distances, neighbours=99), x)
    np.testing.assert_allclose(everybody, [6.5, 5.75, 5.25, 6.25, 12.25])


@every_statistic
@pytest.mark.parametrize(("count", "size"), [(12, 100), (13, 1_000), (17, 1_000)])
def test_equal_updates_differ_by_no_rounding(name, count, size, rng):
    """BLAS sums the products of so many equal rows in several orders."""
    x, before = rng.normal(size=(2, size)).astype(np.float32)
    found = of(STATISTICS[name], np.tile(x, (count, 1)), before)
    np.testing.assert_allclose(found, found[0], rtol=1e-13, atol=0)
    if name in ("neighbour_cosines", "neighbour_distances", "spectral"):
        assert found.tolist() == [0] * count
    if name == "neighbour_distances":
        everybody = partial(neighbour_distances, neighbours=count)
        assert of(everybody, np.tile(x, (count, 1)), before).tolist() == [0] * count


def test_neighbour_cosines_by_hand():
    # the median is 0; cosines to the nearest: an equal pair, an opposite pair
    x = [[1, 0], [1, 0], [-1, 1], [-1, -1]]
    np.testing.assert_allclose(on_line(partial(neighbour_cosines, neighbours=1), x), [1, 1, 0, 0], atol=1e-12)
    others = -np.sqrt(0.5)
    expected = [(1 + others) / 2, (1 + others) / 2, others / 2, others / 2]
    np.testing.assert_allclose(on_line(partial(neighbour_cosines, neighbours=2), x), expected)


def test_neighbour_cosines_take_off_what_all_have_in_common():
    x = np.array([[1, 0], [1, 0], [-1, 1], [-1, -1]]) + 1_000
    np.testing.assert_allclose(on_line(partial(neighbour_cosines, neighbours=1), x), [1, 1, 0, 0], atol=1e-6)


def test_who_lies_on_the_median_has_cosine_0():
    assert on_line(neighbour_cosines, [[0.1], [0.2], [0.3]])[1] == 0
    assert on_line(neighbour_cosines, np.full((4, 3), 0.7)).tolist() == [0] * 4


@pytest.mark.parametrize("name", ["neighbour_cosines", "spectral"])
def test_three_attackers_in_a_layer_of_their_own(name):
    """A common pull of three clients in one layer shows in that layer."""
    log = planted.Planted(planted.shifted_class, planted.GROUP).log()
    table = STATISTICS[name](log)
    guilty = table.index.isin(planted.GROUP)
    assert table.loc[guilty, "fc2.weight"].min() > table.loc[~guilty, "fc2.weight"].max()
    assert not table.loc[guilty, "fc1.weight"].min() > table.loc[~guilty, "fc1.weight"].max()


def test_a_sybil_pair_is_nearest_in_direction():
    table = partial(neighbour_cosines, neighbours=1)(planted.PLANTED["equal pair"].log())
    np.testing.assert_allclose(table.loc[["client-01", "client-08"]], 1)
    assert (table.drop(["client-01", "client-08"]) < 1 - 1e-3).to_numpy().all()


# Properties

LENGTHS = {"neighbour_distances"}  # whatever has the unit of the weights


@every_statistic
@given(seed=seeds, count=counts, power=st.integers(-20, 20))
@settings(max_examples=15, deadline=None)
def test_of_updates_in_another_unit(name, seed, count, power):
    x, unit = random_updates(seed, count), 2.0**power
    expected = of(STATISTICS[name], x) * (unit if name in LENGTHS else 1)
    np.testing.assert_allclose(of(STATISTICS[name], x * unit), expected, rtol=1e-9)


@every_statistic
@given(seed=seeds, count=counts)
@settings(max_examples=15, deadline=None)
def test_order_of_clients_and_of_numbers_changes_nothing(name, seed, count):
    x, rng = random_updates(seed, count), np.random.default_rng(seed)
    clients, numbers = rng.permutation(count), rng.permutation(GLOBAL.size)
    y = x.reshape(count, -1)[np.ix_(clients, numbers)]
    expected = of(STATISTICS[name], x)[clients]
    np.testing.assert_allclose(of(STATISTICS[name], y, GLOBAL.ravel()[numbers]), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["neighbour_cosines", "neighbour_distances", "spectral"])
@given(seed=seeds, count=counts)
@settings(max_examples=15, deadline=None)
def test_what_all_have_in_common_changes_nothing(name, seed, count):
    x = np.round(random_updates(seed, count) * 64) / 64
    common = np.round(random_updates(seed + 1, 1) * 64) / 64  # sums of these are exact in float32
    np.testing.assert_allclose(of(STATISTICS[name], x + common), of(STATISTICS[name], x), rtol=1e-7, atol=1e-7)


@every_statistic
@given(seed=seeds, count=st.integers(4, 9))
@settings(max_examples=15, deadline=None)
def test_equal_updates_get_equal_numbers(name, seed, count):
    x = random_updates(seed, count)
    x[2] = x[0]
    found = of(STATISTICS[name], x)
    np.testing.assert_allclose(found[2], found[0], rtol=1e-9, atol=1e-12)


@every_statistic
@given(row=arrays(np.float32, 41, elements=st.floats(-1e3, 1e3, width=32)), count=counts)
@settings(max_examples=25, deadline=None)
def test_among_equal_updates_nobody_stands_out(name, row, count):
    found = of(STATISTICS[name], np.tile(row, (count, 1)), np.linspace(-1, 1, 41))
    np.testing.assert_allclose(found, found[0], rtol=1e-12, atol=0)


@given(seed=seeds, count=counts)
@settings(max_examples=25, deadline=None)
def test_ranges(seed, count):
    x = random_updates(seed, count) * np.random.default_rng(seed).choice([-1, 0, 1, 100], size=(count, 1, 1))
    assume(np.abs(x).sum() > 0)
    log = log_of(x)
    for name in ("aggregate_cosines", "global_cosines", "neighbour_cosines"):
        assert (np.abs(STATISTICS[name](log)["w"].dropna()) <= 1 + 1e-9).all()
    for name in ("sign_agreement", "large_share"):
        assert STATISTICS[name](log)["w"].dropna().between(0, 1).all()
    assert (spectral(log)["w"].dropna() >= 0).all()


# What they refuse, and whom they leave out


@every_statistic
@pytest.mark.parametrize("value", [np.nan, np.inf, 1e30])
def test_an_absurd_client_is_nan_and_no_reference(name, value):
    x = random_updates(0, 7)
    absurd = np.insert(x, 3, np.float32(value), axis=0)
    found = of(STATISTICS[name], absurd)
    assert np.isnan(found[3])
    np.testing.assert_allclose(np.delete(found, 3), of(STATISTICS[name], x), rtol=1e-12)


@every_statistic
@pytest.mark.parametrize("count", [0, 1, 2])
def test_small_cohorts(name, count):
    with pytest.raises(CannotSay, match=f"{count} comparable clients"):
        STATISTICS[name](planted.clean_log(clients=planted.CLIENTS[:count]))


@every_statistic
def test_scalars_and_single_numbers_are_layers_too(name):
    x = np.array([1, 2, 4, 8], np.float32)
    matrix = random_updates(0, 4)
    log = planted.log_of({"scale": x, "one": x[:, None], "w": matrix}, {"scale": x[0], "one": x[:1], "w": GLOBAL})
    table = STATISTICS[name](log)
    assert np.isfinite(table.to_numpy()).all()
    if name != "kurtosis":
        np.testing.assert_array_equal(table["scale"], table["one"])


@every_statistic
@pytest.mark.parametrize("size", [1e-30, 1e30, 3e38])
def test_sizes_at_the_ends_of_float32(name, size):
    x = np.clip(random_updates(1, 5), -1, 1) * np.float32(size)
    assert np.isfinite(of(STATISTICS[name], x)).all()


@pytest.mark.parametrize("name", ["aggregate_cosines", "neighbour_cosines", "neighbour_distances", "spectral"])
def test_nothing_pairwise_above_5000_clients(name):
    log = planted.clean_log(rounds=1, clients=[f"client-{i}" for i in range(5_001)])
    with pytest.raises(CannotSay, match="nothing pairwise"):
        STATISTICS[name](log)


@pytest.mark.parametrize("name", ["neighbour_cosines", "neighbour_distances"])
@pytest.mark.parametrize("value", [0, -1, 1.5, True, "3"])
def test_neighbours_must_be_a_count(name, value):
    with pytest.raises(InputError, match=f"{name}: neighbours must be a whole number of at least 1, found"):
        STATISTICS[name](planted.clean_log(rounds=1), neighbours=value)


@pytest.mark.parametrize("value", [0, -1, np.inf, np.nan])
def test_large_share_needs_a_positive_multiple(value):
    with pytest.raises(InputError, match="large_share: multiple must be positive and finite"):
        large_share(planted.clean_log(rounds=1), multiple=value)
