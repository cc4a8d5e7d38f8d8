"""The task: samples, their labels and whose they are, as partitions, attacks, models and training take them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import nn

from gradlens.errors import InputError
from simulations.randomness import Stream, address

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
# (outputs of the model [sample, ...], labels int64 [sample]) -> loss [sample], not reduced


def cross_entropy(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Returns the softmax cross-entropy of each sample, in nats.

    Parameters
    ----------
    outputs : torch.Tensor
        Logits, [sample, class].
    labels : torch.Tensor
        int64 [sample].

    Returns
    -------
    torch.Tensor
        [sample], not reduced.

    Examples
    --------
    >>> import torch
    >>> cross_entropy(torch.zeros(2, 4), torch.tensor([0, 3]))
    tensor([1.3863, 1.3863])
    """
    if outputs.shape[-1] == 1:
        return nn.functional.binary_cross_entropy_with_logits(
            outputs[..., 0], labels.to(outputs.dtype), reduction="none"
        )
    return nn.functional.cross_entropy(outputs, labels, reduction="none")


@dataclass(frozen=True, eq=False)
class Task:
    """Samples, their labels, and whose they are: images, text, or rows of a table.

    Parameters
    ----------
    name : str
        What errors and reports call it.
    x_train, x_test : array
        Images, float32 [sample, channel, height, width] in [0, 1]; text, int64 [sample, position] of tokens; or rows of
        a table, float32 [sample, feature].
    y_train, y_test : array
        Labels, int64 [sample].
    label_names : tuple of str
        What the classes 0, 1, ... are called.
    owners_train, owners_test : array, optional
        Whose each sample is (the writer, the speaking role), str [sample], where that is known.
    extras : Mapping of str to array
        Named samples that are in neither set.
    encode : callable, optional
        Text -> tokens, int64 [position]; raises InputError that names what it does not know.
    loss : callable
        What training minimizes: (outputs, labels) -> loss of each sample; softmax cross-entropy by default, and that of
        a sigmoid where the model answers one logit.
    model : callable, optional
        Builds the task's own model, which a scenario calls `own`. It answers float32 [sample, class]; of two classes,
        one logit will do, which is positive for the second.
    final_layer : str, optional
        Dotted name of the module that is the own model's final layer, where it is not the last one.
    num_tokens : int, optional
        Number of tokens; None: as many as classes.

    Notes
    -----
    The arrays of all tasks that `load_task` returns are read-only.

    Examples
    --------
    >>> import numpy as np
    >>> x, y = np.zeros((4, 1, 8, 8), np.float32), np.array([0, 1, 0, 1])
    >>> task = Task("two shapes", x, y, x, y, label_names=("square", "circle"))
    >>> task.num_classes, task.input_shape, task.is_text
    (2, (1, 8, 8), False)
    """

    name: str
    x_train: np.ndarray
    y_train: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray
    label_names: tuple[str, ...]
    owners_train: np.ndarray | None = None
    owners_test: np.ndarray | None = None
    extras: Mapping[str, np.ndarray] = field(default_factory=dict)
    encode: Callable[[str], np.ndarray] | None = None
    loss: Loss = cross_entropy
    model: Callable[[], nn.Module] | None = None
    final_layer: str | None = None
    num_tokens: int | None = None

    @property
    def num_classes(self) -> int:
        """How many classes there are."""
        return len(self.label_names)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """The shape of one sample: channel, height, width; of text, its length."""
        return self.x_train.shape[1:]

    @property
    def is_text(self) -> bool:
        """Whether the samples are tokens."""
        return bool(np.issubdtype(self.x_train.dtype, np.integer))


def selection(name: str, available: int, samples: int | None, seed: int) -> np.ndarray:
    """Returns the positions of the training samples to use, drawn without repetition; None for all in their order.

    Raises
    ------
    InputError
        If there are fewer.
    """
    if samples is None:
        return np.arange(available)
    if samples > available:
        raise InputError(f"task {name}: has {available:,} training samples, {samples:,} are asked for")
    return address(seed, Stream.SAMPLES).permutation(available)[:samples]


def without_samples(task: Task, positions: np.ndarray) -> Task:
    """Returns the task without some of its training samples.

    Parameters
    ----------
    task : Task
        It stays as it is.
    positions : array
        int64 [sample], of those that are left out.

    Returns
    -------
    Task

    Examples
    --------
    >>> import numpy as np
    >>> x, y = np.zeros((4, 1, 8, 8), np.float32), np.array([0, 1, 0, 1])
    >>> task = Task("two shapes", x, y, x, y, label_names=("square", "circle"))
    >>> without_samples(task, np.array([1, 3])).y_train
    array([0, 0])
    """
    kept = np.setdiff1d(np.arange(len(task.y_train)), positions)
    owners = None if task.owners_train is None else task.owners_train[kept]
    return frozen(replace(task, x_train=task.x_train[kept], y_train=task.y_train[kept], owners_train=owners))


def frozen(task: Task) -> Task:
    """Returns the task with all its arrays read-only, because a task is remembered and shared."""
    owners = [array for array in (task.owners_train, task.owners_test) if array is not None]
    for array in (task.x_train, task.y_train, task.x_test, task.y_test, *owners, *task.extras.values()):
        array.flags.writeable = False
    return task


def first_line(error: Exception) -> str:
    """Returns the first line of an error's message."""
    return (str(error).splitlines() or [type(error).__name__])[0]
