"""Our aggregators, statistics and detectors on one round of updates: python gradlens_rules.py COHORT REPEATS.

Every call starts from a fresh round of which nothing is known. A fifth of the clients is taken as malicious. Statistics
and detectors that abstain after a single round (they need a history, or a model) are left out, and named.
"""

import json
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from workloads import shapes_of, updates_of

from gradlens.aggregators import AGGREGATORS, Aggregator
from gradlens.detectors import DETECTORS
from gradlens.errors import CannotSay
from gradlens.log import ModelSpec, Round, UpdateLog
from gradlens.statistics import STATISTICS

Question = Callable[[UpdateLog], Any]


def rules(clients: int) -> dict[str, Aggregator]:
    """The five that ByzFL has, too."""
    malicious = {"num_malicious": clients // 5}
    settings = {"krum": malicious, "multi_krum": malicious, "trimmed_mean": malicious}
    names = ("krum", "multi_krum", "median", "trimmed_mean", "geometric_median")
    return {name: AGGREGATORS[name](**settings.get(name, {})) for name in names}


def fresh_logs(cohort: str) -> Callable[[], UpdateLog]:
    """Makes logs of one round of the same updates, nothing computed yet."""
    matrix, updates, start = updates_of(cohort), {}, 0
    shapes = shapes_of(cohort)
    for name, shape in shapes.items():
        size = int(np.prod(shape))
        updates[name] = np.ascontiguousarray(matrix[:, start : start + size]).reshape(len(matrix), *shape)
        start += size
    state = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    clients = np.array([f"client-{i:03d}" for i in range(len(matrix))])

    def log() -> UpdateLog:
        return UpdateLog(ModelSpec.of(state), [Round(0, clients, np.ones(len(clients)), updates, state)])

    return log


def questions(log: UpdateLog) -> dict[str, Question]:
    """The statistics and detectors that have an answer after one round."""
    asked: dict[str, Question] = {}
    for name, statistic in STATISTICS.items():
        try:
            statistic(log)
        except CannotSay:
            continue
        asked[f"statistic {name}"] = lambda log, statistic=statistic: log.remembered(statistic)
    for name, build in DETECTORS.items():
        if not log.verdict(detector := build()).abstained:
            asked[f"detector {name}"] = lambda log, detector=detector: log.verdict(detector)
    return asked


def fastest_fresh(ask: Question, log: Callable[[], UpdateLog], repeats: int) -> float:
    """Seconds of the fastest call on a fresh log, after one that warms up; making the log is not counted."""
    found = []
    for _ in range(repeats + 1):
        fresh = log()  # the one before is gone by now, and its memory free
        start = time.perf_counter()
        ask(fresh)
        found.append(time.perf_counter() - start)
    return min(found[1:])


def main() -> None:
    cohort, repeats = sys.argv[1], int(sys.argv[2])
    log = fresh_logs(cohort)
    five = rules(len(log()[-1]))
    seconds = {name: fastest_fresh(rule, log, repeats) for name, rule in five.items()}
    seconds["five rules"] = fastest_fresh(lambda log: [rule(log) for rule in five.values()], log, repeats)
    asked = questions(log())
    seconds["all statistics and detectors"] = fastest_fresh(
        lambda log: [ask(log) for ask in asked.values()], log, max(1, repeats // 2)
    )
    print(json.dumps({"seconds": seconds, "asked": list(asked), "each": each(asked, log())}))


def each(asked: dict[str, Question], log: UpdateLog) -> dict[str, float]:
    """How long each takes when they are asked one after the other."""
    found = {}
    for name, ask in asked.items():
        start = time.perf_counter()
        ask(log)
        found[name] = round(time.perf_counter() - start, 5)
    return found


if __name__ == "__main__":
    main()
