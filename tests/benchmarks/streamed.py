"""Times the recording of sketches: python tests/benchmarks/streamed.py --help.

20,000 clients x 1 million parameters go through one process as a generator, one model at a time, at the level "sketch";
what they send comes from a small pool, scaled and added up, and is made before the clock runs. Beside it what reading
the same numbers once takes: from memory (one inner product of float32 numbers with themselves) and from files in the
page cache. Then a verdict on 5,000 clients, of whom inner products of all pairs are formed, and on all, of whom they
are not. Seconds are those of the processor, which other work on the machine does not stretch, beside those of the
clock. Memory is the most that the process held (ru_maxrss): each question is asked in a process of its own.
"""

import argparse
import csv
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from workloads import LAYERS, shapes_of

from gradlens import DETECTORS, Recorder
from gradlens.log import kernels

ROOT = Path(__file__).resolve().parents[2]
COLUMNS = ("work", "clients", "parameters", "seconds", "ms_per_client", "clock_seconds", "memory_mb")
CLIENTS, PAIRS, POOL = 20_000, 5_000, 8
WIDTH = 7_700  # of the layer that holds most: 1.0 million parameters
READ = 200  # clients whose numbers are read, over and over, until a time is known
QUESTIONS = ("nothing", "read memory", "read files", "record full", "record sketch")
FULL = 400  # clients that are recorded in full: what they send fills the memory
Spent = np.ndarray  # seconds of the processor, seconds of the clock
ASKED = ("layer_norms", "layer_cosines", "spectral", "krum", "foolsgold")


def main(words: Sequence[str] | None = None) -> None:
    """Asks, prints a table and writes it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    out = ROOT / "reports" / "streamed.csv"
    parser.add_argument("--out", type=Path, default=out, help="(default: reports/streamed.csv)")
    parser.add_argument("--clients", type=int, default=CLIENTS, help=f"(default: {CLIENTS:,})")
    parser.add_argument("--width", type=int, default=WIDTH, help="of the largest layer")
    parser.add_argument("--work", choices=QUESTIONS, help="answer this alone, as JSON")
    asked = parser.parse_args(words)
    if asked.work:
        print(json.dumps(answers(asked.work, asked.clients, asked.width)))
        return
    rows = [row for work in QUESTIONS for row in answered(work, asked.clients, asked.width)]
    with open(asked.out, "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print(f"{len(rows)} rows: {asked.out}")


def answered(work: str, clients: int, width: int) -> list[dict[str, object]]:
    """The rows of one question, asked in a process of its own."""
    command = [sys.executable, __file__, "--work", work, "--clients", str(clients), "--width", str(width)]
    found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])
    for row in found:
        print("  ".join(f"{name} {row[name]}" for name in COLUMNS), flush=True)
    return found


def answers(work: str, clients: int, width: int) -> list[dict[str, object]]:
    """What one question takes in this process."""
    base = state_of(width)
    parameters = sum(array.size for array in base.values())

    def row(name: str, count: int, spent: Spent) -> dict[str, object]:
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        figures = {"seconds": round(spent[0], 3), "ms_per_client": round(1e3 * spent[0] / max(count, 1), 4)}
        figures |= {"clock_seconds": round(spent[1], 3), "memory_mb": round(memory)}
        return {"work": name, "clients": count, "parameters": parameters, **figures}

    if work == "nothing":
        return [row(work, 0, np.zeros(2))]
    if work.startswith("read"):
        read = read_memory if work == "read memory" else read_files
        return [row(work, READ, read(base))]
    if work == "record full":
        return [row(work, min(FULL, clients), recorded(base, min(FULL, clients), "full")[0])]
    spent, recorder = recorded(base, clients, "sketch")
    rows = [row(work, clients, spent)]
    for log in (recorder.log.keep(np.arange(min(PAIRS, clients))), recorder.log):
        for name in ASKED:
            start = now()
            verdict = log.verdict(DETECTORS[name]())
            said = f"{name} abstains" if verdict.abstained else name
            rows.append(row(said, len(log[-1]), now() - start))
    return rows


def now() -> Spent:
    """Seconds of the processor and of the clock."""
    return np.array([time.process_time(), time.perf_counter()])


def state_of(width: int) -> dict[str, np.ndarray]:
    """The global model: the benchmark's largest, its largest layer as wide as asked for."""
    largest = max(LAYERS["cnn"], key=lambda name: int(np.prod(LAYERS["cnn"][name])))
    shapes = shapes_of("20x1060138") | {f"{largest}.weight": (LAYERS["cnn"][largest][0], width)}
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal(shape, dtype=np.float32) * np.float32(0.1) for name, shape in shapes.items()}


def models(base: dict[str, np.ndarray], count: int, spent: Spent) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    """Client after client: the global model + two updates of the pool, one of them scaled; spent: on making them."""
    rng = np.random.default_rng(1)
    pool = [
        {name: rng.standard_normal(array.shape, dtype=np.float32) * np.float32(0.01) for name, array in base.items()}
        for _ in range(POOL)
    ]
    moved = [{name: base[name] + array for name, array in update.items()} for update in pool]
    for number in range(count):
        start = now()
        one, other = rng.choice(POOL, 2, replace=False)
        sent = {name: array * np.float32(rng.uniform(0.5, 2)) for name, array in pool[one].items()}
        for name, array in sent.items():
            array += moved[other][name]
        spent += now() - start
        yield f"client-{number:05d}", sent


def recorded(base: dict[str, np.ndarray], clients: int, level: str) -> tuple[Spent, Recorder]:
    """Seconds of a round through the recorder besides the making of what is sent; and the recorder."""
    making, recorder = np.zeros(2), Recorder(evidence=level)
    start = now()
    recorder.log_round(base, models(base, clients, making))
    return now() - start - making, recorder


def read_memory(base: dict[str, np.ndarray]) -> Spent:
    """Seconds of one pass over the numbers of `READ` clients in memory, the best of five."""
    sent = [[array.reshape(-1) for array in state.values()] for _, state in models(base, READ // 8, np.zeros(2))]
    times = []
    with kernels.one_blas_thread():
        for _ in range(5):
            start = now()
            for _ in range(8):
                for arrays in sent:
                    for numbers in arrays:
                        np.dot(numbers, numbers)
            times.append(now() - start)
    return np.min(times, axis=0)


def read_files(base: dict[str, np.ndarray]) -> Spent:
    """Seconds to read the files of `READ` clients out of the page cache, the best of five."""
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / str(number) for number in range(READ // 8)]
        for path, (_, state) in zip(paths, models(base, len(paths), np.zeros(2)), strict=True):
            path.write_bytes(b"".join(array.tobytes() for array in state.values()))
        times = []
        for _ in range(5):
            start = now()
            for _ in range(8):
                for path in paths:
                    np.fromfile(path, np.float32)
            times.append(now() - start)
    return np.min(times, axis=0)


if __name__ == "__main__":
    main()
