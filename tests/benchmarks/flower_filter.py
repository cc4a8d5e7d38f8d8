"""What a filter adds to a round of Flower beside the recording: python tests/benchmarks/flower_filter.py --help.

Flower's simulation over Ray: every client trains once over its own samples, FedAvg takes the mean, around it our
strategy records. Each detector then filters the recorded rounds again, from a log of its own; live it does the same
with the same verdicts. Its seconds are the median after the second round. The share is those seconds over those of a
round of the simulation: of training, transport, recording and the mean.
"""

import argparse
import csv
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median

os.environ["FLWR_TELEMETRY_ENABLED"] = os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
HERE, ROOT = Path(__file__).resolve().parent, Path(__file__).resolve().parents[2]

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch.nn.functional import cross_entropy  # noqa: E402
from workloads import LEARNING_RATE, MOMENTUM, WORKLOADS, Workload  # noqa: E402

from gradlens import DETECTORS, Recorder, open  # noqa: E402
from gradlens.aggregators import filtered, mean  # noqa: E402

COLUMNS = ("detector", "clients", "parameters", "samples_per_client", "round_s", "recording_s", "filter_s", "share")
kept = {}  # the data, once in each of Ray's processes


def main(words: Sequence[str] | None = None) -> None:
    """Simulates, filters, prints and writes a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", choices=WORKLOADS, default="cnn")
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=5, help="at least 3; of the simulation the first is left out")
    parser.add_argument("--detector", action="append", choices=DETECTORS, help="(default: all)")
    parser.add_argument("--out", type=Path, default=ROOT / "reports" / "flower_filter.csv")
    asked = parser.parse_args(words)
    work = replace(WORKLOADS[asked.work], clients=asked.clients)
    with tempfile.TemporaryDirectory() as folder:
        whole, recording = simulated(work, Path(folder) / "run", asked.rounds)
        rows = []
        for name in asked.detector or DETECTORS:
            seconds = filtering(Path(folder) / "run", name)
            rows.append(row(name, work, whole, recording, seconds))
            print("  ".join(f"{column} {rows[-1][column]}" for column in COLUMNS), flush=True)
    with asked.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print(f"{len(rows)} rows: {asked.out}")


def row(name: str, work: Workload, whole: float, recording: float, seconds: float) -> dict[str, str]:
    """A row of the table; whole, recording, seconds: of a round."""
    counts = {"clients": work.clients, "parameters": work.parameters, "samples_per_client": work.samples}
    times = {"round_s": whole, "recording_s": recording, "filter_s": seconds}
    return {
        "detector": name,
        **{column: str(count) for column, count in counts.items()},
        **{column: f"{value:.3f}" for column, value in times.items()},
        "share": f"{seconds / whole:.4f}",
    }


def filtering(folder: Path, name: str) -> float:
    """Seconds in which a filter decides on a round, the median after the second; the numbers are in memory by then."""
    log, rule, found = open(folder).log, filtered(mean(), DETECTORS[name]()), []
    for prefix in log.prefixes():
        for layer in prefix.model.parameters:
            prefix[-1].flat(layer).max()
        start = time.perf_counter()
        rule.decision(prefix)
        found.append(time.perf_counter() - start)
    return median(found[2:])


def simulated(work: Workload, folder: Path, rounds: int) -> tuple[float, float]:
    """Plays and records the rounds; median seconds of a round, and of its recording, after the first."""
    from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
    from flwr.clientapp import ClientApp
    from flwr.serverapp import ServerApp
    from flwr.serverapp.strategy import FedAvg
    from flwr.simulation import run_simulation

    from gradlens.integrations.flower import GradlensStrategy

    server, clients, begins, recorded = ServerApp(), ClientApp(), [], []

    class Watched(GradlensStrategy):
        """Notes when a round begins, and what it takes beside the inner strategy at its end."""

        def configure_train(self, *given):
            begins.append(time.perf_counter())
            return super().configure_train(*given)

        def aggregate_train(self, server_round, replies):
            found, start = list(replies), time.perf_counter()
            out = super().aggregate_train(server_round, found)
            recorded.append(time.perf_counter() - start - self.inner.seconds)
            return out

    class Timed(FedAvg):
        def aggregate_train(self, *given):
            start = time.perf_counter()
            out = super().aggregate_train(*given)
            self.seconds = time.perf_counter() - start
            return out

    @clients.train()
    def train(message, context):
        if str(HERE) not in sys.path:  # Ray's processes start elsewhere
            sys.path.insert(0, str(HERE))
        number = int(context.node_config["partition-id"])
        state = {name: torch.tensor(array.numpy()) for name, array in message.content["arrays"].items()}
        record = ArrayRecord({name: Array(array) for name, array in trained(work, number, state).items()})
        said = MetricRecord({"num-examples": work.samples, "partition-id": number})
        return Message(RecordDict({"arrays": record, "metrics": said}), reply_to=message)

    @server.main()
    def play(grid, context):
        inner = Timed(fraction_evaluate=0.0, min_train_nodes=work.clients, min_available_nodes=work.clients)
        start = {name: Array(tensor.numpy()) for name, tensor in work.model().state_dict().items()}
        with Recorder(folder) as recorder:
            Watched(inner, recorder).start(grid, ArrayRecord(start), num_rounds=rounds)
        begins.append(time.perf_counter())

    resources = {"client_resources": {"num_cpus": 1, "num_gpus": 0.0}}
    run_simulation(server_app=server, client_app=clients, num_supernodes=work.clients, backend_config=resources)
    return median(np.diff(begins)[1:].tolist()), median(recorded[1:])


def trained(work: Workload, number: int, state: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """The local model of a client."""
    torch.set_num_threads(1)
    if not kept:
        kept["images"], kept["labels"] = map(torch.from_numpy, work.data())
    model = work.model()
    model.load_state_dict(state)
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM)
    order = torch.from_numpy(np.random.default_rng(number).permutation(work.samples))
    for rows in order.split(work.batch_size):
        optimizer.zero_grad()
        cross_entropy(model(kept["images"][number][rows]), kept["labels"][number][rows]).backward()
        optimizer.step()
    return {name: tensor.detach().numpy() for name, tensor in model.state_dict().items()}


if __name__ == "__main__":
    import flower_filter  # this file as a module, which Ray's processes can import

    flower_filter.main()
