"""Times the analysis of long and large logs and takes its own memory: python tests/benchmarks/scale.py --help.

A log of 1,000 rounds x 20 clients x 1,060,138 parameters (85 GB) is stood for by one that repeats a few recorded
rounds, mapped from files as any other. Three questions: the final bias of every round, which reads that layer alone;
the whole analysis, every statistic and every detector of the tables after every round; and one investigation of the
whole log. Each is asked in a process of its own. Its own memory is the most that it held beside mapped files (RssAnon).
"""

import argparse
import csv
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
from workloads import LAYERS, shapes_of

from gradlens.case import investigate
from gradlens.detectors import DETECTORS
from gradlens.errors import CannotSay
from gradlens.log import ModelSpec, Round, UpdateLog
from gradlens.log.files import read_updates, write_updates
from gradlens.statistics import STATISTICS

ROOT = Path(__file__).resolve().parents[2]
CLIENTS, FILES = 20, 4
COLUMNS = ("work", "clients", "parameters", "rounds", "seconds", "ms_per_round", "own_memory_mb")
WIDTHS = (2_036, 4_084, 8_192)  # of the layer that holds most: 0.27, 0.53 and 1.06 million parameters
QUESTIONS = (  # work, width, rounds
    ("final bias", 8_192, 100),
    ("final bias", 8_192, 300),
    ("final bias", 8_192, 1_000),
    ("all", 8_192, 6),
    ("all", 8_192, 12),
    ("all", 8_192, 24),
    ("all", 4_084, 12),
    ("all", 2_036, 12),
    ("all", 8_192, 50),
    ("case", 8_192, 50),
)


def main(words: Sequence[str] | None = None) -> None:
    """Asks, prints a table and writes it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "reports" / "scale.csv", help="(default: reports/scale.csv)")
    parser.add_argument("--folder", type=Path, help="where the recorded rounds are (default: made, then removed)")
    parser.add_argument("--work", choices=("final bias", "all", "case"), help="answer this alone, as JSON")
    parser.add_argument("--width", type=int, default=WIDTHS[-1], help="of the largest layer")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--only", type=int, metavar="ROUNDS", help="ask those of so many rounds, and keep other rows")
    asked = parser.parse_args(words)
    with tempfile.TemporaryDirectory() as made:
        folder = asked.folder or Path(made)
        if asked.work:
            print(json.dumps(answer(asked.work, folder, asked.width, asked.rounds)))
            return
        asks = [question for question in QUESTIONS if asked.only in (None, question[2])]
        rows = [*kept(asked.out, asks), *(answered(folder, *question) for question in asks)]
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    with open(asked.out, "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print(f"{len(rows)} rows: {asked.out}")


def kept(path: Path, asks: Sequence[tuple[str, int, int]]) -> list[dict[str, str]]:
    """Rows of the table that are not asked for anew; none if all are."""
    if len(asks) == len(QUESTIONS) or not path.exists():
        return []
    anew = {(work, str(model_of(width).num_parameters), str(rounds)) for work, width, rounds in asks}
    with open(path, newline="") as file:
        return [row for row in csv.DictReader(file) if (row["work"], row["parameters"], row["rounds"]) not in anew]


def answered(folder: Path, work: str, width: int, rounds: int) -> dict[str, str]:
    """The row of one question, asked in a process of its own."""
    record(folder, width)
    command = [sys.executable, __file__, "--folder", str(folder), "--work", work]
    command += ["--width", str(width), "--rounds", str(rounds)]
    found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])
    row = {
        "work": work,
        "clients": str(CLIENTS),
        "parameters": str(model_of(width).num_parameters),
        "rounds": str(rounds),
        "seconds": f"{found['seconds']:.2f}",
        "ms_per_round": f"{1e3 * found['seconds'] / rounds:.2f}",
        "own_memory_mb": f"{found['own_memory_mb']:.0f}",
    }
    print("  ".join(f"{name} {row[name]}" for name in COLUMNS), flush=True)
    return row


def answer(work: str, folder: Path, width: int, rounds: int) -> dict[str, float]:
    """Seconds and megabytes that one question takes in this process."""
    record(folder, width)
    log = repeating(folder, width, rounds)
    with watched() as peak:
        start = time.perf_counter()
        if work == "final bias":
            assert log.model.final_bias is not None
            for prefix in log.only(log.model.final_bias).prefixes():
                STATISTICS["final_bias"](prefix)
        elif work == "case":
            investigate(log)
        else:
            detectors = [build() for build in DETECTORS.values()]
            for prefix in log.prefixes():
                for statistic in STATISTICS.values():
                    with suppress(CannotSay):
                        prefix.remembered(statistic)
                for detector in detectors:
                    prefix.verdict(detector)
        seconds = time.perf_counter() - start
    return {"seconds": seconds, "own_memory_mb": peak() / 1e6}


@cache
def model_of(width: int) -> ModelSpec:
    """The benchmark's largest model, its largest layer as wide as asked for."""
    largest = max(LAYERS["cnn"], key=lambda name: int(np.prod(LAYERS["cnn"][name])))
    shapes = shapes_of("20x1060138") | {f"{largest}.weight": (LAYERS["cnn"][largest][0], width)}
    return ModelSpec.of({name: np.zeros(shape, np.float32) for name, shape in shapes.items()})


def record(folder: Path, width: int) -> None:
    """Writes a few rounds of noise, each client's with a drift of its own, unless they are there."""
    model, clients = model_of(width), np.array([f"client-{i:02d}" for i in range(CLIENTS)])
    state = {layer.name: np.zeros(layer.shape, np.float32) for layer in model.layers}
    for index in range(FILES):
        path = folder / f"{width}-{index}.arrow"
        if path.is_file():
            continue
        rng = np.random.default_rng(index)
        updates = {
            layer.name: rng.standard_normal((CLIENTS, *layer.shape), dtype=np.float32) * np.float32(0.01)
            for layer in model.layers
        }
        write_updates(path, model, Round(index, clients, np.full(CLIENTS, 600), updates, state))


def repeating(folder: Path, width: int, rounds: int) -> UpdateLog:
    """A log of so many rounds, made of the few that were recorded over and over."""
    model = model_of(width)
    state = {layer.name: np.zeros(layer.shape, np.float32) for layer in model.layers}

    def source(index: int) -> Callable[[], Round]:
        path = folder / f"{width}-{index % FILES}.arrow"
        return lambda: replace(read_updates(path, model, state), index=index)

    return UpdateLog.lazy(model, [source(index) for index in range(rounds)])


@contextmanager
def watched() -> Iterator[Callable[[], float]]:
    """Gives a function that says the most own memory, in bytes, that this process held inside."""
    held, done = [own_memory()], threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            held[0] = max(held[0], own_memory())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield lambda: held[0]
    finally:
        done.set()
        thread.join()


def own_memory() -> float:
    """Bytes of this process beside mapped files (Linux)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return 1024.0 * int(line.split()[1])


if __name__ == "__main__":
    main()
