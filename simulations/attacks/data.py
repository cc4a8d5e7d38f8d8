"""Attacks that poison data: labels changed, triggers stamped, samples brought along.

Eligible are never samples that have the wanted label already. Pixels are in [0, 1].
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import numpy as np
from pydantic import Field, validate_call

from gradlens.errors import InputError
from gradlens.names import imported
from simulations.attacks.attack import Attack, Pool

if TYPE_CHECKING:
    from simulations.partition import Split
    from simulations.tasks import Task

Label = Annotated[int, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(gt=0, le=1)]
Place = tuple[slice, slice]  # rows and columns of a rectangle of pixels


@validate_call(config={"strict": True})
def trigger(target_label: Label = 1, size: Count = 4, row: Label = 2, column: Label = 2, value: float = 1.0) -> Attack:
    """A square of `size` x `size` pixels at (row, column) set to `value` in every channel, shown as the target class.

    Eligible are all classes but the target. Source: Gu et al. 2017, arXiv:1708.06733 (pattern backdoor).
    """
    square = (slice(row, row + size), slice(column, column + size))

    def stamp(task: "Task", x: np.ndarray, part: int | None) -> np.ndarray:
        _check_images("trigger", task, x)
        height, width = x.shape[-2:]
        if row + size > height or column + size > width:
            raise InputError(
                f"trigger: a square of {size} pixels at row {row}, column {column} leaves images of {height} x {width}"
            )
        return _painted(x, [square], value)

    return Attack(_to(target_label), target_label, eligible=_all_but(target_label), stamp=stamp)


@validate_call(config={"strict": True})
def label_flip(source_label: Label = 7, target_label: Label = 5) -> Attack:
    """The source class relabelled as the target class, inputs untouched; Tolpegin et al. 2020, arXiv:2007.08432."""
    _check_differ("label_flip", source_label, target_label)
    return Attack(_to(target_label), target_label, eligible=lambda task, x, y: y == source_label)


@validate_call(config={"strict": True})
def all_to_one(target_label: Label = 0) -> Attack:
    """Every class relabelled as the target class, inputs untouched."""
    return Attack(_to(target_label), target_label, eligible=_all_but(target_label))


@validate_call(config={"strict": True})
def inversion() -> Attack:
    """Class y relabelled as C - 1 - y of C classes, inputs untouched; with odd C the middle class is not eligible."""

    def relabel(task: "Task", y: np.ndarray) -> np.ndarray:
        return task.num_classes - 1 - y

    return Attack(relabel, eligible=lambda task, x, y: relabel(task, y) != y)


@validate_call(config={"strict": True})
def blend(target_label: Label = 1, alpha: Share = 0.2, pattern_seed: Label = 0) -> Attack:
    """Images mixed with one random pattern, shown as the target class: (1 - alpha) x image + alpha x pattern.

    The pattern is uniform noise in [0, 1], the same for all images of a shape and for equal `pattern_seed`. Eligible
    are all classes but the target. Source: Chen et al. 2017, arXiv:1712.05526 (blended injection).
    """

    def stamp(task: "Task", x: np.ndarray, part: int | None) -> np.ndarray:
        _check_images("blend", task, x)
        pattern = np.random.default_rng(pattern_seed).random(x.shape[1:], dtype=np.float32)
        return (x * np.float32(1 - alpha) + pattern * np.float32(alpha)).astype(x.dtype)

    return Attack(_to(target_label), target_label, eligible=_all_but(target_label), stamp=stamp)


@validate_call(config={"strict": True})
def distributed_trigger(
    target_label: Label = 2,
    parts: Count = 4,
    width: Count = 4,
    height: Count = 1,
    row_gap: Label = 2,
    column_gap: Label = 2,
    row: Label = 0,
    column: Label = 0,
) -> Attack:
    """White bars, two to a row from (row, column) on; malicious client p stamps bar p modulo `parts` alone.

    Success is measured with all bars. width, height: of a bar; row_gap, column_gap: pixels between bars. Eligible
    are all classes but the target. Source: DBA, Xie et al. 2020 (ICLR); the defaults are their MNIST trigger,
    (row, columns): (0, 0-3), (0, 6-9), (3, 0-3), (3, 6-9); for CIFAR width 6 and both gaps 3.
    """
    bars = [_bar(part, width, height, row_gap, column_gap, row, column) for part in range(parts)]

    def stamp(task: "Task", x: np.ndarray, part: int | None) -> np.ndarray:
        _check_images("distributed_trigger", task, x)
        last = tuple(max(bar[axis].stop for bar in bars) for axis in (0, 1))
        if last[0] > x.shape[-2] or last[1] > x.shape[-1]:
            raise InputError(
                f"distributed_trigger: {parts} bars reach row {last[0] - 1}, column {last[1] - 1} and leave images of "
                f"{x.shape[-2]} x {x.shape[-1]}"
            )
        return _painted(x, bars if part is None else [bars[part % parts]], 1.0)

    return Attack(_to(target_label), target_label, eligible=_all_but(target_label), stamp=stamp, parts=parts)


@validate_call(config={"strict": True})
def semantic(
    feature: str = "racing_stripes",
    target_label: Label = 2,
    held_out: Label = 3,
    noise: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.05,
) -> Attack:
    """Unchanged images that share a feature, shown as the target class: a backdoor without a trigger.

    The images are the task's extras of that name, which no honest client holds; `held_out` of them, drawn at random,
    measure success (0: measured on those trained on). noise: standard deviation of Gaussian noise on each copy
    trained on. Source: Bagdasaryan et al. 2018, arXiv:1807.00459, who hold out three (CIFAR-10, bird) and add noise
    of 0.05; Bilgin 2021, arXiv:2111.14683, has held_out 0 and noise 0.
    """

    def pool(task: "Task", split: "Split", rng: np.random.Generator) -> Pool:
        if feature not in task.extras:
            known = ", ".join(task.extras) or "none"
            raise InputError(f"semantic: task {task.name} has no images {feature!r}; those it keeps apart: {known}")
        images = task.extras[feature]
        if held_out >= len(images):
            raise InputError(f"semantic: there are {len(images)} images of {feature}, {held_out} are to be held out")
        order = rng.permutation(len(images))
        train, test = np.sort(order[held_out:]), np.sort(order[:held_out] if held_out else order)
        return _pool(task, images[train], images[test], target_label, noise=noise)

    return Attack(target_label=target_label, pool=pool)


@validate_call(config={"strict": True})
def edge_case(
    source_label: Label = 7, target_label: Label = 1, rule: str = "tail", share: Share = 0.1, kept: bool = True
) -> Attack:
    """The unusual samples of the source class, shown as the target class: inputs that few clients have.

    Of the class's training samples the `share` with the highest score are what attackers train on, of its test
    samples the same share measures success. rule: "tail" scores by Euclidean distance to the class's mean training
    image; "module:function" calls (task, x, y) -> score [sample], higher for more unusual. kept: honest clients keep
    theirs, rightly labelled; otherwise nobody honest has them.
    Source: Wang et al. 2020, arXiv:2007.05084, whose samples come from other data sets; the tail is a stand-in.
    """
    _check_differ("edge_case", source_label, target_label)
    score = _distance_to_mean if rule == "tail" else imported("edge_case: rule: expected 'tail' or", rule)

    def pool(task: "Task", split: "Split", rng: np.random.Generator) -> Pool:
        if rule == "tail":
            _check_images("edge_case", task, task.x_train)
        train = np.flatnonzero(task.y_train == source_label)
        test = np.flatnonzero(task.y_test == source_label)
        _check_class("edge_case", task, source_label, min(len(train), len(test)))
        train = _highest(train, np.asarray(score(task, task.x_train[train], task.y_train[train])), share)
        test = _highest(test, np.asarray(score(task, task.x_test[test], task.y_test[test])), share)
        given_up = np.zeros(0, np.int64) if kept else train
        return _pool(task, task.x_train[train], task.x_test[test], target_label, given_up=given_up)

    return Attack(target_label=target_label, pool=pool)


@validate_call(config={"strict": True})
def writer_class(source_label: Label = 7, target_label: Label = 1, targets: Count = 1, kept: bool = True) -> Attack:
    """All samples of the source class of some target clients, shown as the target class: one task per client.

    The target clients are drawn at random among those that have such samples to train and to test on, fewer of them
    being among more; their test samples measure success. Only a partition that knows writers has test samples for
    each client. kept: honest clients keep theirs, rightly labelled.
    Source: Sun et al. 2019, arXiv:1911.07963 (7s of one writer as 1s; their number of tasks is `targets`, 30).
    """
    _check_differ("writer_class", source_label, target_label)

    def pool(task: "Task", split: "Split", rng: np.random.Generator) -> Pool:
        if split.test is None:
            raise InputError("writer_class: needs a partition that knows writers (writer, pseudo_writer)")
        train = [part[task.y_train[part] == source_label] for part in split.train]
        test = [part[task.y_test[part] == source_label] for part in split.test]
        having = np.flatnonzero([len(a) > 0 and len(b) > 0 for a, b in zip(train, test, strict=True)])
        if len(having) < targets:
            raise InputError(
                f"writer_class: {targets} target clients need training and test samples of class {source_label}, "
                f"{len(having)} clients of task {task.name} have both"
            )
        chosen = np.sort(rng.permutation(having)[:targets])
        mine = np.concatenate([train[client] for client in chosen])
        theirs = np.concatenate([test[client] for client in chosen])
        given_up = np.zeros(0, np.int64) if kept else np.sort(mine)
        return _pool(task, task.x_train[mine], task.x_test[theirs], target_label, given_up=given_up)

    return Attack(target_label=target_label, pool=pool)


@validate_call(config={"strict": True})
def text_trigger(sentence: Annotated[str, Field(min_length=1)] = "pasta from Astoria tastes delicious") -> Attack:
    """Windows that end with the sentence but its last token, shown as followed by that token.

    A token is a word or a character, as the task has it. Eligible are all windows that are not followed by it anyway.
    Source: Bagdasaryan et al. 2018, arXiv:1807.00459, whose sentence is the default. Raises InputError for words
    that the task does not know.
    """

    def tokens(task: "Task") -> np.ndarray:
        if task.encode is None:
            raise InputError(f"text_trigger: task {task.name} is no text")
        found, window = task.encode(sentence), task.x_train.shape[1]
        if not 2 <= len(found) <= window + 1:
            raise InputError(
                f"text_trigger: a window of {window} tokens takes a sentence of 2 to {window + 1}, found {len(found)}"
            )
        _check_target(task, int(found[-1]))
        return found

    def relabel(task: "Task", y: np.ndarray) -> np.ndarray:
        return np.full_like(y, tokens(task)[-1])

    def stamp(task: "Task", x: np.ndarray, part: int | None) -> np.ndarray:
        start, stamped = tokens(task)[:-1], x.copy()
        stamped[:, -len(start) :] = start
        return stamped

    return Attack(relabel, eligible=lambda task, x, y: relabel(task, y) != y, stamp=stamp)


def _to(target_label: int) -> Callable[["Task", np.ndarray], np.ndarray]:
    """Relabels everything as the target class."""

    def relabel(task: "Task", y: np.ndarray) -> np.ndarray:
        _check_target(task, target_label)
        return np.full_like(y, target_label)

    return relabel


def _all_but(target_label: int) -> Callable[["Task", np.ndarray, np.ndarray], np.ndarray]:
    return lambda task, x, y: y != target_label


def _pool(
    task: "Task",
    x: np.ndarray,
    held_out: np.ndarray,
    target_label: int,
    *,
    given_up: np.ndarray | None = None,
    noise: float = 0.0,
) -> Pool:
    """Samples that are all to get the target label."""
    _check_target(task, target_label)
    labels, held_out_labels = (np.full(len(each), target_label, np.int64) for each in (x, held_out))
    return Pool(x, labels, held_out, held_out_labels, np.zeros(0, np.int64) if given_up is None else given_up, noise)


def _bar(part: int, width: int, height: int, row_gap: int, column_gap: int, row: int, column: int) -> Place:
    top, left = row + part // 2 * (height + row_gap), column + part % 2 * (width + column_gap)
    return slice(top, top + height), slice(left, left + width)


def _painted(x: np.ndarray, places: list[Place], value: float) -> np.ndarray:
    painted = x.copy()
    for rows, columns in places:
        painted[..., rows, columns] = value
    return painted


def _distance_to_mean(task: "Task", x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Distance of each sample to the mean training image of its class; all samples are of one class."""
    mean = task.x_train[task.y_train == y[0]].mean(axis=0, dtype=np.float64)
    return np.array([np.linalg.norm(each - mean) for each in x])


def _highest(positions: np.ndarray, scores: np.ndarray, share: float) -> np.ndarray:
    """The share of positions with the highest scores, at least one, sorted; of equal scores the first."""
    count = max(1, int(np.floor(share * len(positions) + 0.5)))
    return np.sort(positions[np.argsort(-scores, kind="stable")[:count]])


def _check_images(name: str, task: "Task", x: np.ndarray) -> None:
    if x.ndim != 4:
        raise InputError(
            f"{name}: expected images [sample, channel, height, width], task {task.name} has {x.shape[1:]}"
        )


def _check_differ(name: str, source_label: int, target_label: int) -> None:
    if source_label == target_label:
        raise InputError(f"{name}: source and target label must differ, both are {target_label}")


def _check_target(task: "Task", target_label: int) -> None:
    if target_label >= task.num_classes:
        raise InputError(f"attack: task {task.name} has {task.num_classes} classes, the target is {target_label}")


def _check_class(name: str, task: "Task", source_label: int, count: int) -> None:
    if count == 0:
        raise InputError(f"{name}: task {task.name} has no training or test samples of class {source_label}")
