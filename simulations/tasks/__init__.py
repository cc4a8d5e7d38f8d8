"""Datasets and models by name."""

from simulations.tasks.images import DATA
from simulations.tasks.load import TASKS, load_task
from simulations.tasks.models import MODELS, build_model
from simulations.tasks.task import Loss, Task, cross_entropy, without_samples

__all__ = ["DATA", "MODELS", "TASKS", "Loss", "Task", "build_model", "cross_entropy", "load_task", "without_samples"]
