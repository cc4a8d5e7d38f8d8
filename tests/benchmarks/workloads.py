"""The work on which peers are compared: local training of every client of one round, then the mean.

A round: from one global model each client goes once over its own samples, in random order, by SGD with momentum on
cross-entropy; the server takes the mean of the models. The figure is samples trained per second of the whole round.
Data are noise: nobody's speed depends on what the images show. Every script here measures one peer on one of these,
as `python SCRIPT WORK ROUNDS`, and prints one line of JSON.
"""

import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

LEARNING_RATE, MOMENTUM, CLASSES = 0.05, 0.9, 10


@dataclass(frozen=True)
class Workload:
    """How much there is to do; parameters: what the model must have, whoever builds it."""

    name: str
    clients: int
    samples: int  # of each client
    image: tuple[int, int, int]  # channel, height, width
    batch_size: int
    parameters: int

    @property
    def samples_per_round(self) -> int:
        return self.clients * self.samples

    def data(self) -> tuple[np.ndarray, np.ndarray]:
        """Images float32 [client, sample, channel, height, width], labels int64 [client, sample]."""
        rng = np.random.default_rng(0)
        images = rng.standard_normal((self.clients, self.samples, *self.image), dtype=np.float32)
        return images, rng.integers(0, CLASSES, (self.clients, self.samples))

    def model(self) -> Any:
        """The model in PyTorch."""
        from torch import nn

        if self.name == "mlp":
            return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, CLASSES))
        if self.name == "lenet":
            features = [nn.Conv2d(1, 16, 5, stride=2), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2), nn.ReLU()]
            width, hidden = 800, 64
        else:
            features = [nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1), nn.ReLU()]
            features.append(nn.MaxPool2d(2))
            width, hidden = 8192, 128
        return nn.Sequential(*features, nn.Flatten(), nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, CLASSES))


WORKLOADS = {
    each.name: each
    for each in (
        Workload("mlp", 20, 64, (1, 8, 8), 16, 2_410),
        Workload("lenet", 20, 600, (1, 28, 28), 32, 56_970),
        Workload("cnn", 10, 500, (3, 32, 32), 64, 1_060_138),
    )
}


# The work of rules over one round of updates: the layers of the models above.
LAYERS = {
    "cnn": {"0": (32, 3, 3, 3), "2": (32, 32, 3, 3), "6": (128, 8192), "8": (CLASSES, 128)},
    "lenet": {"0": (16, 1, 5, 5), "2": (32, 16, 3, 3), "5": (64, 800), "7": (CLASSES, 64)},
}
COHORTS = {"20x1060138": (20, "cnn"), "100x56970": (100, "lenet")}


def shapes_of(cohort: str) -> dict[str, tuple[int, ...]]:
    """Layer -> shape: every weight and its bias."""
    weights = LAYERS[COHORTS[cohort][1]]
    return {f"{name}.{kind}": s for name, w in weights.items() for kind, s in (("weight", w), ("bias", w[:1]))}


def updates_of(cohort: str) -> np.ndarray:
    """Noise, float32 [client, parameter]: no rule's speed depends on what the updates say."""
    parameters = WORKLOADS[COHORTS[cohort][1]].parameters
    return np.random.default_rng(0).standard_normal((COHORTS[cohort][0], parameters), dtype=np.float32)


def fastest(call: Callable[[], Any], repeats: int) -> float:
    """Seconds of the fastest of several calls, after one that warms up."""
    return min(seconds_of(call, repeats))


def asked() -> tuple[Workload, int]:
    """The workload and the number of rounds of the command line."""
    return WORKLOADS[sys.argv[1]], int(sys.argv[2])


def seconds_of(play: Callable[[], None], rounds: int) -> list[float]:
    """How long each round takes, after one that warms up."""
    play()
    found = []
    for _ in range(rounds):
        start = time.perf_counter()
        play()
        found.append(time.perf_counter() - start)
    return found


def answer(work: Workload, seconds: Sequence[float]) -> None:
    """Prints the samples per second of the fastest round."""
    print(
        json.dumps({"work": work.name, "rounds": len(seconds), "samples_per_s": work.samples_per_round / min(seconds)})
    )
