"""Tasks by name.

A task is built in, of an installed package, a function of the user's own (`module:function`), a folder in the layout of
the Hugging Face hub (parquet with an image and a label column, splits train and test), or the hub name `owner/name` of
such a dataset. A folder is looked for as a path, then below the one that the environment variable GRADLENS_DATA names
(default: `data`): so a scenario may say `fashion_mnist` and hold no path of one machine.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path

import numpy as np

from gradlens.errors import InputError
from gradlens.names import FUNCTION, installed, named
from simulations.tasks.images import data_folder, digits, hugging_face
from simulations.tasks.tabular import breast_cancer
from simulations.tasks.task import Task, frozen
from simulations.tasks.text import shakespeare_chars, shakespeare_speakers, shakespeare_words

Builder = Callable[[int | None, int], Task]  # (number of training samples, seed) -> task

TASKS: Mapping[str, Builder] = {
    "digits": digits,
    "shakespeare_chars": shakespeare_chars,
    "shakespeare_words": shakespeare_words,
    "shakespeare_speakers": shakespeare_speakers,
    "breast_cancer": breast_cancer,
}


def load_task(name: str, samples: int | None = None, seed: int = 0) -> Task:
    """Loads a task with some of its training samples, drawn at random without repetition.

    Parameters
    ----------
    name : str
        Built in, of an installed package, `module:function`, a folder, or a hub name.
    samples : int, optional
        Number of training samples; None, the default, for all of them in their order.
    seed : int
        Of the draw.

    Returns
    -------
    Task
        Its arrays are read-only. Only the images that are needed are decoded; the last two tasks are remembered.

    Raises
    ------
    InputError
        If there is no such task, it is not one, or it has fewer training samples.

    Examples
    --------
    >>> task = load_task("digits", samples=100)
    >>> task.x_train.shape, task.x_test.shape
    ((100, 1, 8, 8), (360, 1, 8, 8))
    """
    builder = None
    if name in TASKS or FUNCTION.fullmatch(name) or name in installed("tasks"):
        # each time, because what is remembered may have been trusted then and not be now
        builder = named("tasks", TASKS, name)
    return _loaded(name, builder, samples, seed, data_folder())


@lru_cache(maxsize=2)
def _loaded(name: str, builder: Builder | None, samples: int | None, seed: int, folder: Path) -> Task:
    """What a builder, or the folder or hub name, gives; data found in another folder are another task."""
    if builder is None:
        return hugging_face(name, samples, seed, tuple(TASKS))
    task = builder(samples, seed)
    return task if name in TASKS else _checked(name, task, samples)


def _checked(name: str, task: object, samples: int | None) -> Task:
    """A task from outside, whose arrays are made read-only; raises InputError for what is wrong with it."""
    if not isinstance(task, Task):
        raise InputError(f"task {name}: expected a Task, the function returned a {type(task).__name__}")
    for problem in _problems(task):
        raise InputError(f"task {name}: {problem}")
    if samples is not None and len(task.y_train) != samples:
        raise InputError(f"task {name}: expected {samples:,} training samples, found {len(task.y_train):,}")
    return frozen(task)


def _problems(task: Task) -> Iterator[str]:
    """What is wrong with a task from outside, in words."""
    for split, x, y, owners in (
        ("train", task.x_train, task.y_train, task.owners_train),
        ("test", task.x_test, task.y_test, task.owners_test),
    ):
        if x.dtype not in (np.float32, np.int64):
            yield f"x_{split}: expected float32, or int64 tokens, found {x.dtype}"
        if y.dtype != np.int64 or y.ndim != 1:
            yield f"y_{split}: expected int64 [sample], found {y.dtype} of {y.ndim} axes"
        if not len(x) or len(x) != len(y) or (owners is not None and len(owners) != len(y)):
            yield f"{split}: expected as many samples as labels and owners, at least one, found {len(x)} and {len(y)}"
        if y.min() < 0 or y.max() >= task.num_classes:
            yield f"y_{split}: expected 0 to {task.num_classes - 1}, found {y.min()} to {y.max()}"
        if not np.isfinite(x).all():
            yield f"x_{split}: expected finite numbers only"
    if task.x_train.shape[1:] != task.x_test.shape[1:] or task.x_train.dtype != task.x_test.dtype:
        yield f"expected samples of one kind, train has {task.x_train.shape[1:]}, test {task.x_test.shape[1:]}"
