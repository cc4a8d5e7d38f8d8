"""Local training of a round's clients, by one of two engines whose results agree to rounding.

The plain engine trains one client after another, the stacked one many at once; `engine_for` builds the one that a
scenario names.
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
