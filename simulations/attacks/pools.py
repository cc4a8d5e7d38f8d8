"""Attacks whose samples the attackers bring: images with a feature, unusual samples, those of single clients.

A share of a malicious client's samples is replaced by samples of the pool.
"""

from typing import Annotated

import numpy as np
from pydantic import Field

from gradlens.errors import InputError
from simulations.attacks.attack import Attack, Pool, attack_part, function_named
from simulations.attacks.relabeling import Count, Label, Share, check_differ, check_images, check_target
from simulations.partition import Split
from simulations.tasks import Task


@attack_part
def semantic(
    feature: str = "racing_stripes",
    target_label: Label = 2,
    held_out: Label = 3,
    noise: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.05,
) -> Attack:
    """Shows unchanged images that share a feature as the target class: a backdoor without a trigger.

    Stage: data. The attacker needs images with the feature, which no honest client holds.

    Parameters
    ----------
    feature : str
        Name of the images among the task's extras; the default is that of [1]_ on CIFAR-10.
    target_label : int
        The label they get; 2, bird, as in [1]_.
    held_out : int
        How many of the images, drawn at random, measure success; 3 as in [1]_. At 0, as in [2]_, success is measured
        on the images trained on.
    noise : float
        Standard deviation of the Gaussian noise on each copy trained on; 0.05 as in [1]_, 0 in [2]_.

    Returns
    -------
    Attack
        Its pool is the task's extras of that name.

    Raises
    ------
    InputError
        From the pool, if the task has no such images, or too few to hold any out.

    Notes
    -----
    **Fails when** the few images make up too small a share of what clients train on for the model to learn them.

    References
    ----------
    .. [1] Bagdasaryan et al. 2018, arXiv:1807.00459.
    .. [2] Bilgin 2021, arXiv:2111.14683.

    Examples
    --------
    >>> semantic(feature="green_cars", held_out=0)
    semantic(feature='green_cars', target_label=2, held_out=0, noise=0.05)
    """

    def pool(task: Task, split: Split, rng: np.random.Generator) -> Pool:
        images = _images_with(task, feature, held_out)
        order = rng.permutation(len(images))
        train, test = np.sort(order[held_out:]), np.sort(order[:held_out] if held_out else order)
        return _pool(task, images[train], images[test], target_label, noise=noise)

    return Attack(target_label=target_label, pool=pool)


@attack_part
def edge_case(
    source_label: Label = 7, target_label: Label = 1, rule: str = "tail", share: Share = 0.1, kept: bool = True
) -> Attack:
    """Shows the unusual samples of the source class, which few clients have, as the target class.

    Stage: data. The attacker needs the unusual training samples of all clients.

    Parameters
    ----------
    source_label, target_label : int
        The class that the samples are from, and the label they get; 7 and 1, which suit digits.
    rule : str
        How unusual a sample is: "tail", its Euclidean distance to the mean training image of its class; or
        "module:function", called with (task, x, y), which returns a score [sample], higher for more unusual samples.
    share : float
        Share of the class that counts as unusual, of training and of test samples alike; 0.1 is a plain choice.
    kept : bool
        Whether honest clients keep theirs, correctly labeled; otherwise no honest client has any.

    Returns
    -------
    Attack
        Attackers train on the unusual training samples; the unusual test samples measure success.

    Raises
    ------
    InputError
        If the labels are the same or the rule cannot be imported; from the pool, if the task lacks the class.

    Notes
    -----
    The samples with the floor(share x n + 1/2) highest scores of the n samples of the class are taken, at least one.
    In [1]_ they come from other data sets; the tail of the class is a stand-in.

    **Fails when** honest clients hold the same samples, correctly labeled (`kept`), and outnumber the attackers.

    References
    ----------
    .. [1] Wang et al. 2020, arXiv:2007.05084.

    Examples
    --------
    >>> edge_case(share=0.05)
    edge_case(source_label=7, target_label=1, rule='tail', share=0.05, kept=True)
    """
    check_differ("edge_case", source_label, target_label)
    score = function_named("edge_case: rule", {"tail": _distance_to_mean}, rule)

    def pool(task: Task, split: Split, rng: np.random.Generator) -> Pool:
        train, test = _of_class("edge_case", task, source_label)
        train = _highest(train, np.asarray(score(task, task.x_train[train], task.y_train[train])), share)
        test = _highest(test, np.asarray(score(task, task.x_test[test], task.y_test[test])), share)
        given_up = np.zeros(0, np.int64) if kept else train
        return _pool(task, task.x_train[train], task.x_test[test], target_label, given_up=given_up)

    return Attack(target_label=target_label, pool=pool)


@attack_part
def writer_class(source_label: Label = 7, target_label: Label = 1, targets: Count = 1, kept: bool = True) -> Attack:
    """Shows all source-class samples of a few target clients as the target class: one backdoor task per client.

    Stage: data. The attacker needs the source-class training samples of the target clients.

    Parameters
    ----------
    source_label, target_label : int
        The class that is attacked, and the label it gets; 7 and 1 as in [1]_.
    targets : int
        Number of target clients, drawn at random among those with such samples to train and to test on; those of a
        smaller number are among those of a larger one. 1 is a plain choice, [1]_ has up to 30 tasks.
    kept : bool
        Whether honest clients keep theirs, correctly labeled.

    Returns
    -------
    Attack
        The target clients' test samples measure success.

    Raises
    ------
    InputError
        If the labels are the same; from the pool, if the partition knows no writers, as only `writer` and
        `pseudo_writer` do, or too few clients have such samples.

    Notes
    -----
    **Fails when** there are many target clients: more tasks are harder to implant, and cost more main accuracy. With
    norms clipped it needs many rounds, or a larger share of malicious clients.

    References
    ----------
    .. [1] Sun et al. 2019, arXiv:1911.07963.

    Examples
    --------
    >>> writer_class(targets=30)
    writer_class(source_label=7, target_label=1, targets=30, kept=True)
    """
    check_differ("writer_class", source_label, target_label)

    def pool(task: Task, split: Split, rng: np.random.Generator) -> Pool:
        train, test = _of_targets(task, split, source_label, targets, rng)
        given_up = np.zeros(0, np.int64) if kept else np.sort(train)
        return _pool(task, task.x_train[train], task.x_test[test], target_label, given_up=given_up)

    return Attack(target_label=target_label, pool=pool)


def _images_with(task: Task, feature: str, held_out: int) -> np.ndarray:
    """The task's images with a feature, more of them than are held out."""
    if feature not in task.extras:
        known = ", ".join(task.extras) or "none"
        raise InputError(f"semantic: task {task.name} has no images {feature!r}; those it keeps apart: {known}")
    images = task.extras[feature]
    if held_out >= len(images):
        raise InputError(f"semantic: there are {len(images)} images of {feature}, {held_out} are to be held out")
    return images


def _of_class(name: str, task: Task, label: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions of a class's training and test samples; raises InputError where either has none."""
    train, test = np.flatnonzero(task.y_train == label), np.flatnonzero(task.y_test == label)
    if not len(train) or not len(test):
        raise InputError(f"{name}: task {task.name} has no training or test samples of class {label}")
    return train, test


def _of_targets(
    task: Task, split: Split, source_label: int, targets: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Positions of the source-class training and test samples of target clients, which are drawn at random."""
    if split.test is None:
        raise InputError("writer_class: needs a partition that knows writers (writer, pseudo_writer)")
    train = [part[task.y_train[part] == source_label] for part in split.train]
    test = [part[task.y_test[part] == source_label] for part in split.test]
    candidates = np.flatnonzero([len(a) > 0 and len(b) > 0 for a, b in zip(train, test, strict=True)])
    if len(candidates) < targets:
        raise InputError(
            f"writer_class: {targets} target clients need training and test samples of class {source_label}, "
            f"{len(candidates)} clients of task {task.name} have both"
        )
    chosen = np.sort(rng.permutation(candidates)[:targets])
    return np.concatenate([train[client] for client in chosen]), np.concatenate([test[client] for client in chosen])


def _pool(
    task: Task,
    x: np.ndarray,
    held_out: np.ndarray,
    target_label: int,
    *,
    given_up: np.ndarray | None = None,
    noise: float = 0.0,
) -> Pool:
    """Samples that all get the target label."""
    check_target(task, target_label)
    labels, held_out_labels = (np.full(len(samples), target_label, np.int64) for samples in (x, held_out))
    return Pool(x, labels, held_out, held_out_labels, np.zeros(0, np.int64) if given_up is None else given_up, noise)


def _distance_to_mean(task: Task, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Distance of each sample to the mean training image of its class; all samples are of one class."""
    check_images("edge_case", task, task.x_train)
    mean = task.x_train[task.y_train == y[0]].mean(axis=0, dtype=np.float64)
    return np.array([np.linalg.norm(image - mean) for image in x])


def _highest(positions: np.ndarray, scores: np.ndarray, share: float) -> np.ndarray:
    """The share of positions with the highest scores, at least one, sorted; of equal scores the first."""
    count = max(1, int(np.floor(share * len(positions) + 0.5)))
    return np.sort(positions[np.argsort(-scores, kind="stable")[:count]])
