"""Partitions: every sample goes to one client, and skew is where it is asked for."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from gradlens.errors import InputError
from simulations.partition import (
    PARTITIONS,
    dirichlet,
    iid,
    labels,
    pseudo_writer,
    quantity,
    round_robin,
    writer,
)
from simulations.tasks import Task, load_task

DRAWN = [name for name in PARTITIONS if name != "round_robin"]


def task_of(y, owners=None, *, y_test=None, owners_test=None, x=None, x_test=None) -> Task:
    """A task with these labels; its images of 2 x 3 pixels are random where they are not given."""
    rng = np.random.default_rng(0)
    y = np.asarray(y, np.int64)
    y_test = y[:5] if y_test is None else np.asarray(y_test, np.int64)
    x = rng.random((len(y), 1, 2, 3), np.float32) if x is None else x
    x_test = rng.random((len(y_test), 1, 2, 3), np.float32) if x_test is None else x_test
    owners, owners_test = (each if each is None else np.asarray(each, np.str_) for each in (owners, owners_test))
    return Task("planted", x, y, x_test, y_test, tuple("0123456789"), owners, owners_test)


def sizes(parts) -> list[int]:
    return [len(part) for part in parts]


@settings(max_examples=80, deadline=None)
@given(
    name=st.sampled_from(sorted(PARTITIONS)),
    y=st.lists(st.integers(0, 4), min_size=200, max_size=400),
    num_clients=st.integers(3, 12),
    seed=st.integers(0, 2**32),
)
def test_every_sample_is_used_exactly_once(name, y, num_clients, seed):
    y = [*y, *np.repeat(np.arange(5), 12)]  # each class has a sample for each client
    owners = np.arange(len(y)) % 13
    task = task_of(y, owners, y_test=y[:50], owners_test=owners[:50])
    split = PARTITIONS[name]()(task, num_clients, np.random.default_rng(seed))
    assert len(split.train) == num_clients
    assert all((np.diff(part) > 0).all() for part in split.train)
    assert min(sizes(split.train)) > 0
    np.testing.assert_array_equal(np.sort(np.concatenate(split.train)), np.arange(len(y)))
    assert (split.test is None) == (name not in ("writer", "pseudo_writer"))
    if split.test is not None:
        assert len(split.test) == num_clients
        np.testing.assert_array_equal(np.sort(np.concatenate(split.test)), np.arange(50))


@pytest.mark.parametrize("name", PARTITIONS)
def test_the_task_stays_as_it_is(name, rng):
    task = task_of(rng.integers(10, size=300), rng.integers(9, size=300))
    for array in (task.x_train, task.y_train, task.x_test, task.y_test, task.owners_train):
        array.flags.writeable = False
    before = {name: array.copy() for name, array in vars(task).items() if isinstance(array, np.ndarray)}
    PARTITIONS[name]()(task, 5, rng)
    assert set(before) >= {"x_train", "y_train", "x_test", "y_test", "owners_train"}
    for name, array in before.items():
        np.testing.assert_array_equal(getattr(task, name), array)


@pytest.mark.parametrize("name", DRAWN)
def test_the_generator_decides(name, rng):
    task = task_of(rng.integers(10, size=500), rng.integers(20, size=500))
    first, second, other = (PARTITIONS[name]()(task, 7, np.random.default_rng(seed)).train for seed in (3, 3, 4))
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("dirichlet", {"alpha": 0.0}),
        ("dirichlet", {"minimum": 0}),
        ("labels", {"per_client": 0}),
        ("labels", {"per_client": 2.0}),
        ("quantity", {"alpha": float("inf")}),
        ("quantity", {"minimum": -1}),
        ("pseudo_writer", {"components": 0}),
    ],
)
def test_settings_are_checked(name, bad):
    with pytest.raises(ValidationError, match=next(iter(bad))):
        PARTITIONS[name](**bad)


# iid, round_robin ---------------------------------------------------------------------------------------------


@given(size=st.integers(1, 100), num_clients=st.integers(1, 20), seed=st.integers(0, 2**32))
def test_iid_shares_differ_by_one_at_most(size, num_clients, seed):
    if size < num_clients:
        return
    for build in (iid, round_robin):
        found = sizes(build()(task_of(np.zeros(size)), num_clients, np.random.default_rng(seed)).train)
        assert max(found) - min(found) <= 1


def test_iid_draws_what_it_always_drew():
    """So that runs of earlier versions can be made again to the bit."""
    parts = iid()(task_of(np.zeros(10)), 3, np.random.default_rng(0)).train
    order = np.random.default_rng(0).permutation(10)
    assert [part.tolist() for part in parts] == [sorted(order[:4]), sorted(order[4:7]), sorted(order[7:])]


def test_round_robin_deals_the_samples_in_turn(rng):
    parts = round_robin()(task_of(np.zeros(8)), 3, rng).train
    assert [part.tolist() for part in parts] == [[0, 3, 6], [1, 4, 7], [2, 5]]


# dirichlet ----------------------------------------------------------------------------------------------------


def test_dirichlet_draws_what_it_always_drew():
    """Computed by version 0.1.0: dirichlet(alpha=2.0, minimum=5)(np.arange(30) % 3, 3, np.random.default_rng(7))."""
    parts = dirichlet(alpha=2.0, minimum=5)(task_of(np.arange(30) % 3), 3, np.random.default_rng(7)).train
    assert [part.tolist() for part in parts] == [
        [0, 8, 11, 17, 19, 21, 23, 24, 26],
        [2, 3, 5, 9, 13, 14, 20, 25, 29],
        [1, 4, 6, 7, 10, 12, 15, 16, 18, 22, 27, 28],
    ]


@pytest.mark.parametrize("alpha", [1e-3, 0.1, 0.5, 100.0])
def test_dirichlet_gives_everybody_the_minimum(alpha, rng):
    task = task_of(rng.integers(10, size=1_500))
    found = sizes(dirichlet(alpha=alpha, minimum=1)(task, 8, rng).train)
    assert min(found) >= 1
    assert sum(found) == 1_500
    assert min(sizes(dirichlet(alpha=max(alpha, 0.1), minimum=60)(task, 8, rng).train)) >= 60


def test_a_small_alpha_skews_and_a_large_one_does_not(rng):
    y = rng.integers(10, size=20_000)
    task = task_of(y)

    def largest_share(alpha: float) -> float:
        """Of each client's commonest class, averaged over the clients: .1 without skew, 1 at the utmost."""
        parts = dirichlet(alpha=alpha)(task, 20, rng).train
        return float(np.mean([np.bincount(y[part], minlength=10).max() / len(part) for part in parts]))

    assert largest_share(0.05) > 0.7
    assert 0.2 < largest_share(1.0) < 0.6
    assert largest_share(10_000.0) < 0.13


def test_dirichlet_shares_of_a_class_are_dirichlet(rng):
    """One class among 5 clients: shares have mean 1/5 and the variance a (A - a) / A^2 (A + 1) of Dirichlet(2)."""
    task = task_of(np.zeros(2_000))
    parts = [dirichlet(alpha=2.0, minimum=1)(task, 5, rng).train for _ in range(2_000)]
    shares = np.array([sizes(part) for part in parts]) / 2_000
    np.testing.assert_allclose(shares.mean(axis=0), 0.2, atol=0.01)
    np.testing.assert_allclose(shares.var(axis=0), 2 * 8 / (100 * 11), rtol=0.15)


# labels -------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    y=st.lists(st.integers(0, 6), min_size=60, max_size=200),
    num_clients=st.integers(2, 15),
    per_client=st.integers(1, 4),
    seed=st.integers(0, 2**32),
)
def test_no_client_holds_more_labels_than_it_may(y, num_clients, per_client, seed):
    task = task_of(y)
    if num_clients * per_client < len(set(y)):
        with pytest.raises(InputError, match="raise per_client"):
            labels(per_client=per_client)(task, num_clients, np.random.default_rng(seed))
        return
    parts = labels(per_client=per_client)(task, num_clients, np.random.default_rng(seed)).train
    assert max(len(set(task.y_train[part])) for part in parts) <= per_client
    assert min(sizes(parts)) >= per_client  # no shard is empty
    np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.arange(len(y)))


def test_shards_are_about_equal_and_larger_classes_have_more(rng):
    y = np.repeat([0, 1, 2], [600, 300, 100])
    parts = labels(per_client=1)(task_of(y), 10, rng).train
    assert sizes(parts) == [100] * 10
    assert sorted(int(y[part[0]]) for part in parts) == [0] * 6 + [1] * 3 + [2]
    assert any(np.diff(part).max() > 1 for part in parts)  # drawn from the class, not a stretch of it


# writer -------------------------------------------------------------------------------------------------------


def test_each_writer_is_whole_at_one_client(rng):
    owners = rng.choice(list("ABCDEFGHI"), p=[0.3, 0.2, 0.1, 0.1, 0.1, 0.1, 0.04, 0.03, 0.03], size=400)
    owners_test = [*owners[:90], "nobody", "zero"]
    task = task_of(np.zeros(400), owners, y_test=np.zeros(92), owners_test=owners_test)
    for num_clients in (1, 4, 9):
        split = writer()(task, num_clients, rng)
        held = [set(owners[part]) for part in split.train]
        assert sum(map(len, held)) == 9
        for theirs, part in zip(held, split.test, strict=True):
            assert set(task.owners_test[part]) <= theirs
        np.testing.assert_array_equal(np.sort(np.concatenate(split.test)), np.arange(90))


def test_more_writers_than_clients_are_balanced(rng):
    owners = np.repeat([f"w{i:02d}" for i in range(20)], np.arange(10, 30))
    found = sizes(writer()(task_of(np.zeros(len(owners)), owners), 4, rng).train)
    assert sum(found) == 390
    assert max(found) - min(found) <= 10  # the smallest writer, which came last
    equal = writer()(task_of(np.zeros(60), np.arange(60) // 5), 4, rng).train
    assert sizes(equal) == [15] * 4  # twelve writers of five samples


def test_writers_come_to_clients_by_chance():
    task = task_of(np.zeros(30), np.repeat(list("ABC"), [15, 10, 5]))
    first = {task.owners_train[writer()(task, 3, np.random.default_rng(seed)).train[0][0]] for seed in range(40)}
    assert first == set("ABC")


def test_a_writer_without_test_samples_has_none(rng):
    task = task_of(np.zeros(6), list("AABBCC"), y_test=[0, 0], owners_test=list("BB"))
    split = writer()(task, 3, rng)
    assert sorted(sizes(split.test)) == [0, 0, 2]
    assert writer()(task_of(np.zeros(6), list("AABBCC")), 3, rng).test is None


def test_the_writers_of_femnist_are_clients(data_root, rng):
    task = load_task(str(data_root / "femnist"), 1_000)
    split = writer()(task, 12, rng)
    for part, read in zip(split.train, split.test, strict=True):
        assert len({*task.owners_train[part], *task.owners_test[read]}) == 1
    assert sum(sizes(split.test)) == 1_198


# quantity -----------------------------------------------------------------------------------------------------


def test_quantity_is_unequal_in_size_and_alike_in_labels(rng):
    y = np.arange(6_000) % 10
    parts = quantity(alpha=0.5, minimum=20)(task_of(y), 10, rng).train
    assert min(sizes(parts)) >= 20
    assert max(sizes(parts)) > 4 * min(sizes(parts))
    largest = y[max(parts, key=len)]
    np.testing.assert_allclose(np.bincount(largest) / len(largest), 0.1, atol=0.04)
    even = sizes(quantity(alpha=10_000.0)(task_of(y), 10, rng).train)
    assert max(even) - min(even) < 60


def test_quantity_shares_are_dirichlet_above_the_minimum(rng):
    """Of 5 clients: shares of the rest have mean 1/5 and the variance of Dirichlet(2), as above."""
    task = task_of(np.zeros(2_050))
    found = np.array([sizes(quantity(alpha=2.0, minimum=10)(task, 5, rng).train) for _ in range(2_000)])
    shares = (found - 10) / 2_000
    np.testing.assert_allclose(shares.mean(axis=0), 0.2, atol=0.01)
    np.testing.assert_allclose(shares.var(axis=0), 2 * 8 / (100 * 11), rtol=0.15)


# pseudo_writer ------------------------------------------------------------------------------------------------


def test_pseudo_writers_have_one_style_of_each_class(rng):
    """Three classes of four planted styles, far apart: every client gets one of each class, and its test images."""
    styles = np.eye(12).reshape(12, 1, 3, 4) * 5
    kind, kind_test = rng.permutation(np.arange(240) % 12), rng.permutation(np.arange(60) % 12)
    x = (styles[kind] + rng.normal(0, 0.05, (240, 1, 3, 4))).astype(np.float32)
    x_test = (styles[kind_test] + rng.normal(0, 0.05, (60, 1, 3, 4))).astype(np.float32)
    task = task_of(kind % 3, y_test=kind_test % 3, x=x, x_test=x_test)
    split = pseudo_writer(components=3)(task, 4, rng)
    for part, read in zip(split.train, split.test, strict=True):
        assert len(set(kind[part])) == 3
        assert set(kind[part] % 3) == {0, 1, 2}
        assert set(kind_test[read]) == set(kind[part])


def test_the_pseudo_writers_of_digits(rng):
    task = load_task("digits", 600)
    split = pseudo_writer()(task, 5, rng)
    for part in split.train:
        assert set(task.y_train[part]) == set(range(10))
    variance = [[task.x_train[part][task.y_train[part] == 3].var(axis=0).sum() for part in parts]
                for parts in (split.train, iid()(task, 5, rng).train)]  # fmt: skip
    assert np.mean(variance[0]) < 0.8 * np.mean(variance[1])  # the threes of one client resemble each other


def test_a_class_that_is_only_in_the_test_set_goes_to_nobody(rng):
    split = pseudo_writer()(task_of(np.arange(20) % 2, y_test=[0, 1, 2]), 3, rng)
    np.testing.assert_array_equal(np.sort(np.concatenate(split.test)), [0, 1])


# refusals -----------------------------------------------------------------------------------------------------


def test_the_impossible_is_one_line(rng):
    with pytest.raises(InputError, match="need 100 samples, found 99"):
        dirichlet(minimum=10)(task_of(np.zeros(99)), 10, rng)
    with pytest.raises(InputError, match=r"no draw in 1,000 with alpha 0\.001"):
        dirichlet(alpha=0.001, minimum=10)(task_of(np.repeat(np.arange(2), 60)), 12, rng)
    for build in (iid, round_robin, lambda: quantity(minimum=1), lambda: labels(per_client=1)):
        with pytest.raises(InputError, match="found 2"):
            build()(task_of(np.zeros(2)), 3, rng)
    with pytest.raises(InputError, match="2 clients with 2 labels each cannot hold the 5 classes of task planted"):
        labels()(task_of(np.arange(50) % 5), 2, rng)
    with pytest.raises(InputError, match=r"^writer: task planted does not say who wrote its samples$"):
        writer()(task_of(np.zeros(20)), 2, rng)
    with pytest.raises(InputError, match="writer: 3 clients need at least as many writers, task planted has 2"):
        writer()(task_of(np.zeros(20), np.arange(20) % 2), 3, rng)
    alike = task_of(np.zeros(20), x=np.zeros((20, 1, 2, 2), np.float32))
    with pytest.raises(InputError, match=r"2 clients need as many different images .* planted has 1 of class 0"):
        pseudo_writer()(alike, 2, rng)
    text = task_of(np.zeros(20), x=np.zeros((20, 4), np.int64), x_test=np.zeros((5, 4), np.int64))
    with pytest.raises(InputError, match="pseudo_writer: expected images, task planted is text"):
        pseudo_writer()(text, 2, rng)
