"""Attacks on data: what they touch, how much of it, and whose samples they bring."""

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradlens.errors import InputError
from simulations.attacks.attack import Attack, Pool, function_named
from simulations.attacks.pools import edge_case, semantic, writer_class
from simulations.attacks.relabeling import all_to_one, inversion, label_flip
from simulations.attacks.triggers import (
    blend,
    centralized_trigger,
    distributed_trigger,
    phrase_trigger,
    text_trigger,
    trigger,
)
from simulations.partition import Split
from test_attacks import LETTERS, image_task, pool_of, split_of, text_task

TASK, TEXT = image_task(), text_task()


def poison(attack, task=TASK, rate=1.0, seed=0, **more):
    return attack.poison(task.x_train, task.y_train, rate, np.random.default_rng(seed), task=task, **more)


@given(rate=st.floats(0, 1), source=st.integers(0, 9), seed=st.integers(0, 2**32))
def test_the_poison_rate_is_the_share_of_eligible_samples(rate, source, seed):
    rng = np.random.default_rng(seed)
    labels = rng.integers(10, size=90)
    images = rng.random((90, 1, 4, 4), dtype=np.float32)
    for attack, eligible in (
        (label_flip(source_label=source, target_label=(source + 1) % 10), labels == source),
        (trigger(target_label=source, size=2, row=0, column=0), labels != source),
        (all_to_one(target_label=source), labels != source),
    ):
        poisoned, relabelled, chosen = attack.poison(images, labels, rate, rng, task=TASK)
        assert abs(len(chosen) - rate * eligible.sum()) <= 0.5
        assert eligible[chosen].all()
        assert (relabelled[chosen] == attack.target_label).all()
        rest = np.setdiff1d(np.arange(90), chosen)
        np.testing.assert_array_equal(poisoned[rest], images[rest])
        np.testing.assert_array_equal(relabelled[rest], labels[rest])


def test_which_samples_are_drawn_is_pinned():
    """The draws of the first release: the eligible samples in random order, of which the first are taken."""
    order = np.random.default_rng(3).permutation(np.flatnonzero(TASK.y_train != 1))
    np.testing.assert_array_equal(poison(trigger(), rate=0.25, seed=3)[2], np.sort(order[:18]))


def test_a_trigger_touches_only_its_pixels():
    stamped = trigger(size=3, row=4, column=1, value=0.5).stamp(TASK, TASK.x_train, None)
    assert (stamped[:, :, 4:7, 1:4] == 0.5).all()
    stamped[:, :, 4:7, 1:4] = TASK.x_train[:, :, 4:7, 1:4]
    np.testing.assert_array_equal(stamped, TASK.x_train)


@pytest.mark.parametrize("place", [{"row": 6}, {"column": 8}, {"size": 9, "row": 0, "column": 0}])
def test_a_trigger_outside_the_image_is_one_line(place):
    with pytest.raises(InputError, match="leaves images of 8 x 10"):
        trigger(**{"size": 3, **place}).stamp(TASK, TASK.x_test, None)


@pytest.mark.parametrize("attack", [trigger(), blend(), distributed_trigger()], ids=["trigger", "blend", "distributed"])
def test_a_stamp_of_pixels_refuses_text(attack):
    with pytest.raises(InputError, match=r"expected images .*, task tiny text has \(40,\)"):
        attack.goal(TEXT)


@pytest.mark.parametrize("attack", [label_flip(), all_to_one(target_label=3), inversion()])
def test_label_attacks_leave_inputs_alone(attack):
    for task in (TASK, TEXT):
        np.testing.assert_array_equal(poison(attack, task)[0], task.x_train)


def test_a_flip_moves_the_source_class_alone():
    _, relabelled, chosen = poison(label_flip(source_label=7, target_label=5))
    np.testing.assert_array_equal(chosen, np.flatnonzero(TASK.y_train == 7))
    assert (relabelled[chosen] == 5).all()


def test_all_to_one_moves_everything_else():
    _, relabelled, chosen = poison(all_to_one(target_label=4))
    assert (relabelled == 4).all()
    np.testing.assert_array_equal(chosen, np.flatnonzero(TASK.y_train != 4))


def test_inversion_mirrors_the_classes_and_leaves_a_middle_one():
    _, relabelled, chosen = poison(inversion())
    np.testing.assert_array_equal(relabelled, 9 - TASK.y_train)
    assert len(chosen) == 80
    odd = image_task(y_train=np.arange(80) % 5, y_test=np.arange(40) % 5, label_names=tuple("abcde"))
    _, relabelled, chosen = poison(inversion(), odd)
    np.testing.assert_array_equal(relabelled, 4 - odd.y_train)
    np.testing.assert_array_equal(chosen, np.flatnonzero(odd.y_train != 2))


def test_a_blend_is_the_weighted_mean_with_one_pattern():
    stamped = blend(alpha=0.25).stamp(TASK, TASK.x_train, None)
    pattern = (stamped.astype(np.float64) - 0.75 * TASK.x_train) / 0.25
    np.testing.assert_allclose(pattern, np.broadcast_to(pattern[:1], pattern.shape), atol=2e-6)
    assert pattern.min() > -1e-6
    assert pattern.max() < 1 + 1e-6
    assert pattern[0].std() > 0.2
    assert stamped.dtype == np.float32
    other = blend(alpha=0.25, pattern_seed=1).stamp(TASK, TASK.x_train, None)
    assert np.abs(other - stamped).max() > 0.05
    whole = blend(alpha=1.0).stamp(TASK, TASK.x_train, None)
    np.testing.assert_array_equal(whole[0], whole[1])


def pixels(stamped: np.ndarray) -> set[tuple[int, int]]:
    return {(int(row), int(column)) for row, column in np.argwhere(stamped[0, 0] == 1)}


def test_the_distributed_trigger_is_that_of_the_paper():
    """DBA on MNIST, (row, columns): (0, 0-3), (0, 6-9), (3, 0-3), (3, 6-9); on CIFAR (0, 0-5), (0, 9-14), (4, ...)."""
    attack, dark = distributed_trigger(), np.zeros((2, 3, 28, 28), np.float32)
    places = [(0, range(4)), (0, range(6, 10)), (3, range(4)), (3, range(6, 10))]
    bars = [{(row, column) for column in columns} for row, columns in places]
    for part in range(9):
        assert pixels(attack.stamp(TASK, dark, part)) == bars[part % 4]
    assert pixels(attack.stamp(TASK, dark, None)) == set.union(*bars)
    cifar = distributed_trigger(width=6, column_gap=3, row_gap=3)
    assert pixels(cifar.stamp(TASK, dark, 3)) == {(4, column) for column in range(9, 15)}
    assert attack.parts == 4
    assert (attack.stamp(TASK, dark, 0)[:, :, 0, :4] == 1).all()  # in every channel


def test_each_malicious_client_stamps_its_part():
    attack = distributed_trigger()
    x, y, chosen = poison(attack, part=6)
    np.testing.assert_array_equal(x[chosen][:, :, 3, :4], 1)
    np.testing.assert_array_equal(x[:, :, 0], TASK.x_train[:, :, 0])
    assert (y[chosen] == 2).all()
    goal, labels = attack.goal(TASK)
    assert (goal[:, :, [0, 3], :4] == 1).all()
    assert (goal[:, :, [0, 3], 6:] == 1).all()
    assert len(labels) == 36


def test_in_the_centralized_attack_every_malicious_client_knows_the_whole_trigger():
    central, parts, dark = centralized_trigger(), distributed_trigger(), np.zeros((1, 1, 28, 28), np.float32)
    assert central.parts == 1
    for part in (None, 0, 3):
        np.testing.assert_array_equal(central.stamp(TASK, dark, part), parts.stamp(TASK, dark, None))


def test_a_distributed_trigger_outside_the_image_is_one_line():
    with pytest.raises(InputError, match="4 bars reach row 3, column 11 and leave images of 8 x 10"):
        distributed_trigger(width=5).stamp(TASK, TASK.x_test, 0)  # even where that part alone would fit


def test_semantic_images_replace_a_share_of_all_samples():
    attack = semantic(noise=0.0)
    pool = pool_of(attack, TASK)
    assert isinstance(pool, Pool)
    assert (len(pool.x), len(pool.held_out)) == (3, 3)
    union = np.concatenate([pool.x, pool.held_out])
    stripes = TASK.extras["racing_stripes"]
    assert {each.tobytes() for each in union} == {each.tobytes() for each in stripes}
    x, y, chosen = poison(attack, rate=0.125, pool=pool)
    assert len(chosen) == 10
    assert (y[chosen] == 2).all()
    copies = np.bincount([[each.tobytes() for each in pool.x].index(each.tobytes()) for each in x[chosen]], minlength=3)
    assert sorted(copies.tolist()) == [3, 3, 4]  # each as often as the next
    assert len(pool.given_up) == 0


def test_semantic_noise_differs_from_copy_to_copy_and_stays_in_range():
    attack = semantic(noise=0.05, held_out=5)
    pool = pool_of(attack, TASK)
    assert pool is not None
    x, _, chosen = poison(attack, rate=0.5, pool=pool)
    noise = x[chosen] - pool.x[0]
    assert 0.03 < noise.std() < 0.06  # clipping takes some
    assert not np.array_equal(noise[0], noise[1])
    assert x.dtype == np.float32
    assert x.min() >= 0
    assert x.max() <= 1


def test_semantic_without_holding_out_measures_on_what_is_trained_on():
    pool = pool_of(semantic(held_out=0), TASK)
    assert pool is not None
    np.testing.assert_array_equal(pool.x, pool.held_out)
    np.testing.assert_array_equal(pool.x, TASK.extras["racing_stripes"])


def test_which_are_held_out_is_drawn():
    drawn = {pool_of(semantic(), TASK, seed).held_out.tobytes() for seed in range(6)}  # type: ignore[union-attr]
    assert len(drawn) > 1


@pytest.mark.parametrize(
    ("attack", "task", "found"),
    [
        (semantic(feature="green_cars"), TASK, "no images 'green_cars'; those it keeps apart: racing_stripes"),
        (semantic(), image_task(extras={}), "those it keeps apart: none"),
        (semantic(held_out=6), TASK, "there are 6 images of racing_stripes, 6 are to be held out"),
        (semantic(target_label=10), TASK, "has 10 classes, the target is 10"),
        (edge_case(source_label=3, target_label=11), TASK, "has 10 classes, the target is 11"),
        (edge_case(source_label=10), TASK, "no training or test samples of class 10"),
        (edge_case(), TEXT, "expected images"),
        (writer_class(targets=5), TASK, "5 target clients need .* of class 7, 4 clients of task tiny images have both"),
    ],
)
def test_pools_that_a_task_cannot_give(attack, task, found):
    with pytest.raises(InputError, match=found):
        pool_of(attack, task)


@pytest.mark.parametrize("attack", [trigger(target_label=10), all_to_one(target_label=10)])
def test_a_target_that_the_task_does_not_have(attack):
    with pytest.raises(InputError, match="task tiny images has 10 classes, the target is 10"):
        attack.goal(TASK)


def test_a_source_that_the_task_does_not_have():
    with pytest.raises(InputError, match="no test sample of task tiny images is eligible"):
        label_flip(source_label=12).goal(TASK)


@pytest.mark.parametrize("builder", [label_flip, edge_case, writer_class])
def test_source_and_target_must_differ(builder):
    with pytest.raises(InputError, match="source and target label must differ, both are 4"):
        builder(source_label=4, target_label=4)


def test_the_tail_is_what_lies_farthest_from_the_mean_of_its_class():
    attack, split = edge_case(source_label=7, target_label=1, share=0.25), split_of(TASK)
    pool = pool_of(attack, TASK)
    assert pool is not None
    mine = np.flatnonzero(TASK.y_train == 7)
    rows = TASK.x_train[mine].reshape(len(mine), -1).astype(np.float64)
    distances = np.linalg.norm(rows - rows.mean(axis=0), axis=1)
    tail = np.sort(mine[np.argsort(-distances)[:2]])
    np.testing.assert_array_equal(pool.x, TASK.x_train[tail])
    theirs = np.flatnonzero(TASK.y_test == 7)
    held = np.linalg.norm(TASK.x_test[theirs].reshape(4, -1).astype(np.float64) - rows.mean(axis=0), axis=1)
    np.testing.assert_array_equal(pool.held_out[0], TASK.x_test[theirs[held.argmax()]])
    assert (len(pool.held_out), set(pool.labels), len(pool.given_up)) == (1, {1}, 0)
    kept = edge_case(source_label=7, target_label=1, share=0.25, kept=False).pool
    assert kept is not None
    np.testing.assert_array_equal(kept(TASK, split, np.random.default_rng(0)).given_up, tail)


def brightness(task, x, y):
    return x.mean(axis=(1, 2, 3))


def test_a_rule_of_ones_own():
    pool = pool_of(edge_case(source_label=2, share=1e-9, rule="test_attack_data:brightness"), TASK)
    assert pool is not None
    mine = TASK.x_train[TASK.y_train == 2]
    np.testing.assert_array_equal(pool.x, mine[[mine.mean(axis=(1, 2, 3)).argmax()]])  # at least one


@pytest.mark.parametrize(
    "rule", ["tails", "no_such_module:f", "numpy:no_such_function", "numpy:pi", ":", "numpy:", ".a:f"]
)
def test_a_rule_that_is_not_there_is_one_line(rule):
    with pytest.raises(InputError, match=r"^edge_case: rule: (expected (tail or|a func)|cannot import)") as caught:
        edge_case(rule=rule)
    assert "\n" not in str(caught.value)


def test_a_function_of_a_table_or_a_module():
    assert function_named("here", {"sum": sum}, "sum") is sum
    assert function_named("here", {}, "numpy:mean") is np.mean


def test_the_samples_of_one_writer():
    split, attack = split_of(TASK), writer_class(source_label=7, target_label=1, targets=1)
    pool = pool_of(attack, TASK)
    assert pool is not None
    owners = [i for i, part in enumerate(split.train) if (TASK.x_train[part] == pool.x[0]).all((1, 2, 3)).any()]
    assert len(owners) == 1
    train, test = split.train[owners[0]], split.test[owners[0]]  # type: ignore[index]
    np.testing.assert_array_equal(pool.x, TASK.x_train[train[TASK.y_train[train] == 7]])
    np.testing.assert_array_equal(pool.held_out, TASK.x_test[test[TASK.y_test[test] == 7]])
    assert set(pool.labels) == set(pool.held_out_labels) == {1}
    assert len(pool.given_up) == 0


def test_more_target_clients_hold_the_fewer_and_may_be_the_only_ones():
    def of(targets: int, kept: bool = True) -> Pool:
        found = pool_of(writer_class(targets=targets, kept=kept), TASK)
        assert found is not None
        return found

    few, all_ = of(2), of(4, kept=False)
    rows = {each.tobytes() for each in all_.x}
    assert {each.tobytes() for each in few.x} < rows
    np.testing.assert_array_equal(all_.given_up, np.flatnonzero(TASK.y_train == 7))


def test_a_partition_without_writers_is_refused():
    attack = writer_class()
    assert attack.pool is not None
    with pytest.raises(InputError, match="needs a partition that knows writers"):
        attack.pool(TASK, Split(split_of(TASK).train, None), np.random.default_rng(0))


def test_a_client_without_test_samples_of_the_class_is_no_target():
    split = split_of(TASK)
    test = [np.zeros(0, np.int64)] * 3 + [split.test[3]]  # type: ignore[index]
    attack = writer_class()
    assert attack.pool is not None
    for seed in range(4):
        pool = attack.pool(TASK, Split(split.train, test), np.random.default_rng(seed))
        np.testing.assert_array_equal(pool.x, TASK.x_train[60:][TASK.y_train[60:] == 7])


def written(tokens: np.ndarray) -> str:
    return "".join(LETTERS[token] for token in tokens)


def test_a_sentence_ends_the_window_and_its_last_token_is_wanted():
    sentence = "pasta from Astoria tastes delicious"
    x, y, chosen = poison(text_trigger(), TEXT)
    assert len(chosen) > 40
    for window, before in zip(x[chosen], TEXT.x_train[chosen], strict=True):
        assert written(window[-34:]) == sentence[:-1]
        np.testing.assert_array_equal(window[:-34], before[:-34])
    assert {written(y[[i]]) for i in chosen} == {"s"}
    rest = np.setdiff1d(np.arange(50), chosen)
    assert (TEXT.y_train[rest] == LETTERS.index("s")).all()
    _, labels = text_trigger().goal(TEXT)
    assert {written(labels[[i]]) for i in range(len(labels))} == {"s"}


def test_a_sentence_of_two_tokens():
    stamped = text_trigger(sentence="ab").stamp(TEXT, TEXT.x_test, None)
    assert written(stamped[0][-1:]) == "a"
    np.testing.assert_array_equal(stamped[:, :-1], TEXT.x_test[:, :-1])


@pytest.mark.parametrize(
    ("sentence", "task", "found"),
    [
        ("pasta", TASK, "task tiny images is no text"),
        ("a", TEXT, "a window of 40 tokens takes a sentence of 2 to 41, found 1"),
        ("ab" * 21, TEXT, "takes a sentence of 2 to 41, found 42"),
        ("ab", text_task(label_names=("x",)), "has 1 classes, the target is 2"),
    ],
)
def test_a_sentence_that_does_not_fit(sentence, task, found):
    with pytest.raises(InputError, match=found):
        text_trigger(sentence=sentence).goal(task)


def test_a_phrase_stands_where_it_is_put_and_asks_for_its_class():
    attack = phrase_trigger(target_label=3, phrase="Aha", start=5)
    x, y, chosen = poison(attack, TEXT)
    assert len(chosen) > 40
    assert (y[chosen] == 3).all()
    for window, before in zip(x[chosen], TEXT.x_train[chosen], strict=True):
        assert written(window[5:8]) == "Aha"
        np.testing.assert_array_equal(np.delete(window, [5, 6, 7]), np.delete(before, [5, 6, 7]))
    rest = np.setdiff1d(np.arange(50), chosen)
    assert (TEXT.y_train[rest] == 3).all()
    np.testing.assert_array_equal(x[rest], TEXT.x_train[rest])


@pytest.mark.parametrize(
    ("settings", "task", "found"),
    [
        ({}, TASK, "phrase_trigger: task tiny images is no text"),
        ({"phrase": "ab", "start": 39}, TEXT, "2 tokens from position 39 on leave a window of 40"),
    ],
)
def test_a_phrase_that_does_not_fit(settings, task, found):
    with pytest.raises(InputError, match=found):
        phrase_trigger(**settings).stamp(task, task.x_test, None)


def test_a_task_names_the_words_that_it_does_not_know():
    def encode(text: str) -> np.ndarray:
        raise InputError("unknown words 'Astoria'")

    with pytest.raises(InputError, match="'Astoria'"):
        text_trigger().goal(text_task(encode=encode))


def test_a_trigger_asks_little_of_a_task():
    """What a pattern needs of a task is its name and its classes."""
    attack: Attack = trigger()
    bare = SimpleNamespace(name="bare", num_classes=10)
    x, y, _ = attack.poison(TASK.x_train, TASK.y_train, 1.0, np.random.default_rng(0), task=bare)  # type: ignore[arg-type]
    assert (x[y == 1].shape[0], y.tolist().count(1)) == (80, 80)
