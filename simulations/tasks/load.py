"""Tasks by name.

A task is built in, a folder in the layout of the Hugging Face hub (parquet with an image and a label column, splits
train and test), the hub name `owner/name` of such a dataset, or a function of your own, `module:function`. A folder
is looked for as a path, then below the one that the environment variable GRADLENS_DATA names (default: `data`): so
a scenario may say `fashion_mnist` and hold no path of one machine.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache

import numpy as np

from gradlens.errors import InputError
from gradlens.names import FUNCTION, imported, installed, named
from simulations.tasks.images import digits, hugging_face
from simulations.tasks.task import Task, frozen
from simulations.tasks.text import shakespeare_chars, shakespeare_words

TASKS: Mapping[str, Callable[[int | None, int], Task]] = {
    "digits": digits,
    "shakespeare_chars": shakespeare_chars,
    "shakespeare_words": shakespeare_words,
}


def load_task(name: str, samples: int | None = None, seed: int = 0) -> Task:
    """A task with `samples` of its training samples, drawn at random without repetition (None: all in their order).

    Only the images asked for are decoded, and the last two tasks are remembered. Raises InputError where there
    is no such task, or not as many training samples.
    """
    if name not in TASKS and FUNCTION.fullmatch(name):
        imported(f"task {name}", name)  # remembered or not: within `nothing_imported` it is an error
    return cached_task(name, samples, seed)


@lru_cache(maxsize=2)
def cached_task(name: str, samples: int | None, seed: int) -> Task:
    """As `load_task`; the last two are remembered."""
    if name in TASKS:
        return TASKS[name](samples, seed)
    if FUNCTION.fullmatch(name) or name in installed("tasks"):
        return _own(name, samples, seed)
    return hugging_face(name, samples, seed, ", ".join(TASKS))


def _own(name: str, samples: int | None, seed: int) -> Task:
    """What a function from outside gives for (samples, seed), once it is checked."""
    task = named("tasks", TASKS, name, f"task {name}")(samples, seed)
    if not isinstance(task, Task):
        raise InputError(f"task {name}: expected a Task, the function gave a {type(task).__name__}")
    for problem in _problems(task):
        raise InputError(f"task {name}: {problem}")
    if samples is not None and len(task.y_train) != samples:
        raise InputError(f"task {name}: {samples:,} training samples are asked for, it gave {len(task.y_train):,}")
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
