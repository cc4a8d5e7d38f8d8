"""Local training of the clients of one round, by one of two engines that agree to rounding.

`plain` trains one client after another, `stacked` many at once; `engine_for` builds the one that a scenario names.
"""

from simulations.training.engine import ENGINES, Engine, engine_for
from simulations.training.networks import (
    State,
    buffers,
    device_for,
    load_state,
    one_thread,
    outputs,
    predict,
    prepared,
    state_of,
    tensors,
)
from simulations.training.plain import Dataset, LocalSGD, Observer, torch_reference, train_clients

__all__ = [
    "ENGINES",
    "Dataset",
    "Engine",
    "LocalSGD",
    "Observer",
    "State",
    "buffers",
    "device_for",
    "engine_for",
    "load_state",
    "one_thread",
    "outputs",
    "predict",
    "prepared",
    "state_of",
    "tensors",
    "torch_reference",
    "train_clients",
]
