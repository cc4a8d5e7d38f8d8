"""The record that partitions, attacks, models and training take: samples, their labels, and whose they are."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn

from gradlens.errors import InputError
from simulations.randomness import Stream, address

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
# (outputs of the model [sample, ...], labels int64 [sample]) -> loss [sample], not reduced


def cross_entropy(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The softmax cross-entropy of each sample: logits [sample, class], labels [sample] -> [sample], in nats."""
    return nn.functional.cross_entropy(outputs, labels, reduction="none")


@dataclass(frozen=True, eq=False)
class Task:
    """Samples to be told apart: images, float32 x [sample, channel, height, width] in [0, 1], or text.

    Text is int64 x [sample, position] of tokens 0, 1, ..., num_tokens - 1 (None: as many as classes). y: int64
    [sample]; label_names: what the classes 0, 1, ... are called. owners: whose each sample is (the writer, the
    speaking role), str [sample], where that is known. extras: named samples that are in neither set. encode: text ->
    tokens int64 [position]; raises InputError that names what it does not know. loss: what training minimises.
    model: builds the task's own model, called `own` in a scenario; final_layer: the dotted name of the module that
    is the final layer, where it is not the last one. The arrays of all tasks that `load_task` gives are read-only.
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
        """The shape of one sample: channel, height, width; of text its length."""
        return self.x_train.shape[1:]

    @property
    def is_text(self) -> bool:
        """Whether the samples are tokens."""
        return bool(np.issubdtype(self.x_train.dtype, np.integer))


def selection(name: str, available: int, samples: int | None, seed: int) -> np.ndarray:
    """Positions of the training samples to use, at random without repetition; None: all in their order.

    Raises InputError where there are not as many.
    """
    if samples is None:
        return np.arange(available)
    if samples > available:
        raise InputError(f"task {name}: has {available:,} training samples, {samples:,} are asked for")
    return address(seed, Stream.SAMPLES).permutation(available)[:samples]


def frozen(task: Task) -> Task:
    """The task with all its arrays read-only: a task is remembered and shared."""
    owners = [each for each in (task.owners_train, task.owners_test) if each is not None]
    for array in (task.x_train, task.y_train, task.x_test, task.y_test, *owners, *task.extras.values()):
        array.flags.writeable = False
    return task


def first_line(error: Exception) -> str:
    """What an error says, in one line."""
    return (str(error).splitlines() or [type(error).__name__])[0]
