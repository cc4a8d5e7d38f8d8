"""What the filter adds to a round of Flower beside the recording: python tests/benchmarks/flower_filter.py --help.

Flower's FedAvg aggregates the replies of a cohort of clients, around it our strategy: once it only records, once it
records and filters, taking turns from the same replies. Training, transport and the clients' side are left out, so
that the ratio is an upper bound of what a real round sees. The fastest round of each kind counts, and the least time
that the processor spent on one, which another process lengthens less.
"""

import argparse
import logging
import shutil
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg
from flwr.supercore.task_identity import TaskIdentity

from gradlens import DETECTORS, Recorder
from gradlens.integrations.flower import GradlensStrategy

TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1  # whose messages these are


class Nobody(FedAvg):
    """Flower's mean, which asks no node."""

    def configure_train(self, *given):
        return []


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--width", type=int, default=1_000, help="of the hidden layer; 1,000: a million numbers")
    parser.add_argument("--rounds", type=int, default=7, help="of each kind, after one that warms up")
    parser.add_argument("--detector", action="append", choices=DETECTORS, help="(default: some of each kind)")
    asked = parser.parse_args()
    logging.disable(logging.INFO)
    state = model(asked.width)
    count = sum(array.size for array in state.values())
    print(f"{asked.clients} clients x {count:,} parameters, seconds of a round at the server", file=sys.stderr)
    replies = [reply(place, state) for place in range(asked.clients)]
    for name in asked.detector or ("final_rows", "layer_norms", "layer_cosines", "krum", "panel"):
        for clock, (recording, both) in measured(name, state, replies, asked.rounds).items():
            more = f"{100 * (both / recording - 1):+.1f} %"
            print(f"{name:14} {clock:9} recording {recording:.3f}, with the filter {both:.3f}: {more}", flush=True)


def model(width: int) -> dict[str, np.ndarray]:
    """Two dense layers: 989 inputs, ten classes."""
    rng = np.random.default_rng(0)
    sizes = {"fc1.weight": (width, 989), "fc1.bias": (width,), "fc2.weight": (10, width), "fc2.bias": (10,)}
    return {name: rng.normal(size=size).astype(np.float32) for name, size in sizes.items()}


def reply(place: int, state: dict[str, np.ndarray]) -> Message:
    """What a client sends: the model and noise of its own."""
    rng = np.random.default_rng([1, place])
    local = {n: a + np.float32(0.01) * rng.standard_normal(a.shape, dtype=np.float32) for n, a in state.items()}
    said = MetricRecord({"num-examples": 100, "partition-id": place})
    instruction = Message(RecordDict(), dst_node_id=100 + place, message_type="train")
    return Message(RecordDict({"arrays": arrays(local), "metrics": said}), reply_to=instruction)


def arrays(state: dict[str, np.ndarray]) -> ArrayRecord:
    return ArrayRecord({name: Array(array) for name, array in state.items()})


CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}


def measured(
    name: str, state: dict[str, np.ndarray], replies: list[Message], rounds: int
) -> dict[str, tuple[float, float]]:
    """Clock -> least seconds of a round that is recorded, and of one that is recorded and filtered."""
    folder = Path(tempfile.mkdtemp())
    seconds: dict[str, dict[str | None, list[float]]] = {clock: {None: [], name: []} for clock in CLOCKS}
    try:
        kinds = {kind: GradlensStrategy(Nobody(), Recorder(folder / str(kind), detector=kind)) for kind in (None, name)}
        for server_round in range(rounds + 1):
            for kind, strategy in kinds.items():
                strategy.configure_train(server_round, arrays(state), ConfigRecord(), None)
                began = {clock: read() for clock, read in CLOCKS.items()}
                strategy.aggregate_train(server_round, replies)
                for clock, read in CLOCKS.items() if server_round else ():
                    seconds[clock][kind].append(read() - began[clock])
        for strategy in kinds.values():
            strategy.recorder.close()
    finally:
        shutil.rmtree(folder)
    return {clock: (min(found[None]), min(found[name])) for clock, found in seconds.items()}


if __name__ == "__main__":
    main()
