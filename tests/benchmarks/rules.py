"""Times our aggregators and detectors beside ByzFL's aggregators: python tests/benchmarks/rules.py --help.

Both are measured in one sitting, taking turns, each in its own process with one thread and with all; the fastest of
all turns counts. The rows join those of bench.py in reports/bench.csv, in milliseconds of one call from a fresh round.
"""

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import bench
from workloads import COHORTS

TOGETHER = ("five rules", "all statistics and detectors")  # beside the sum of ByzFL's five
UNIT = "ms"


def main(words: Sequence[str] | None = None) -> None:
    """Measures, prints a table and writes it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cohort", action="append", choices=COHORTS, help="clients x parameters (default: all)")
    parser.add_argument("--repeats", type=int, default=5, help="calls in each turn (default: 5)")
    parser.add_argument("--turns", type=int, default=3, help="how often each has its turn (default: 3)")
    parser.add_argument("--out", type=Path, default=bench.ROOT / "reports" / "bench.csv")
    asked = parser.parse_args(words)
    try:
        python = bench.environment(bench.PEERS["byzfl"])
    except bench.Absent as why:
        raise SystemExit(f"byzfl cannot be installed: {why}") from why
    rows = []
    for cohort in asked.cohort or COHORTS:
        ours, theirs, left_out = measured(cohort, python, asked.repeats, asked.turns)
        rows += compared(cohort, ours, theirs)
        print(f"{cohort}: asked for all statistics and detectors: {', '.join(left_out)}", file=sys.stderr)
    print(f"\n{bench.table(rows)}\n")
    bench.write(asked.out, [*bench.others(asked.out, {row["work"] for row in rows}), *rows])
    print(f"{len(rows)} comparisons, fastest of {asked.turns} turns: {asked.out}")


def measured(
    cohort: str, python: Path, repeats: int, turns: int
) -> tuple[dict[str, float], dict[str, float], list[str]]:
    """Rule -> seconds of ours and of ByzFL's, and which of our statistics and detectors were asked together."""
    ours: dict[str, float] = {}
    theirs: dict[str, float] = {}
    asked: list[str] = []
    for turn in range(turns):
        for threads in ("1", bench.ALL_CORES):
            own = answered(Path(sys.executable), "gradlens_rules.py", cohort, repeats, threads)
            asked = own["asked"]
            for kept, found in (
                (ours, own["seconds"]),
                (theirs, answered(python, "byzfl_rules.py", cohort, repeats, threads)),
            ):
                kept.update({name: min(seconds, kept.get(name, seconds)) for name, seconds in found.items()})
        print(f"{cohort} {turn + 1}/{turns} {1e3 * ours['five rules']:8.1f} {UNIT}", file=sys.stderr, flush=True)
    return ours, theirs, asked


def answered(python: Path, script: str, cohort: str, repeats: int, threads: str) -> dict:
    """What a script printed."""
    command = [str(python), str(bench.HERE / script), cohort, str(repeats)]
    return json.loads(bench.did(command, {**os.environ, "OMP_NUM_THREADS": threads}).splitlines()[-1])


def compared(cohort: str, ours: Mapping[str, float], theirs: Mapping[str, float]) -> list[dict[str, str]]:
    """A row per rule, and of what is asked together beside the sum of theirs."""
    beside = {**theirs, **dict.fromkeys(TOGETHER, sum(theirs.values()))}
    return [
        {
            "work": f"{name} {cohort}",
            "peer": "byzfl",
            "ours": f"{1e3 * ours[name]:.1f}",
            "theirs": f"{1e3 * beside[name]:.1f}",
            "unit": UNIT,
            "ratio": f"{beside[name] / ours[name]:.2f}",
        }
        for name in beside
    ]


if __name__ == "__main__":
    main()
