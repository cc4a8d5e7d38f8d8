"""Small logs in which something is planted, so that a test knows the answer.

Twelve clients train a model of 76 numbers for a few rounds: a common drift and noise of their own. What is planted
changes the updates of `culprits` in every round.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from gradlens.log import ModelSpec, Round, UpdateLog

STATE = {
    "fc1.weight": np.zeros((6, 5), np.float32),
    "fc1.bias": np.zeros(6, np.float32),
    "norm.count": np.array(3, np.int64),
    "fc2.weight": np.zeros((4, 6), np.float32),
    "fc2.bias": np.zeros(4, np.float32),
}
MODEL = ModelSpec.of(STATE, buffers=["norm.count"])
LAYERS = MODEL.parameters
CLIENTS = tuple(f"client-{i:02d}" for i in range(12))
CULPRIT = "client-05"
GROUP = ("client-02", "client-05", "client-09")

Updates = dict[str, np.ndarray]  # layer -> [client, *shape]
Edit = Callable[[Updates, np.ndarray], None]  # changes the rows of a mask [client] in place


@dataclass(frozen=True)
class Planted:
    """An edit and who is guilty of it."""

    edit: Edit
    culprits: tuple[str, ...]

    def log(self, rounds: int = 4, seed: int = 0) -> UpdateLog:
        return edited(clean_log(rounds, seed=seed), self.edit, self.culprits)


def clean_log(rounds: int = 4, clients: Collection[str] = CLIENTS, seed: int = 0) -> UpdateLog:
    """Everybody is benign."""
    return UpdateLog(MODEL, [_clean_round(index, tuple(clients), seed) for index in range(rounds)])


def _clean_round(index: int, clients: tuple[str, ...], seed: int) -> Round:
    drift = np.random.default_rng([seed, 99])
    rng = np.random.default_rng([seed, index])
    updates = {name: _noisy(drift.normal(size=MODEL[name].shape), len(clients), rng) for name in LAYERS}
    updates["norm.count"] = np.full(len(clients), 2, np.int64)
    examples = rng.integers(10, 30, len(clients))
    return Round(index, np.array(clients, dtype=np.str_), examples, updates, STATE, buffers=("norm.count",))


def _noisy(drift: np.ndarray, clients: int, rng: np.random.Generator) -> np.ndarray:
    return (0.1 * drift + 0.05 * rng.normal(size=(clients, *drift.shape))).astype(np.float32)


def boosted(updates: Updates, who: np.ndarray) -> None:
    """An outlier in size: five times the update."""
    for name in LAYERS:
        updates[name][who] *= 5


def turned(updates: Updates, who: np.ndarray) -> None:
    """An outlier in direction: the same size, the other way."""
    for name in LAYERS:
        updates[name][who] *= -1


def shifted_class(updates: Updates, who: np.ndarray) -> None:
    """The final row and bias of class 2 move up."""
    updates["fc2.bias"][who, 2] += 1
    updates["fc2.weight"][who, 2] += 1


def drifting(updates: Updates, who: np.ndarray) -> None:
    """The same small pull in every round, within one round's noise."""
    updates["fc1.weight"][who] += 0.06


def one_for_all(updates: Updates, who: np.ndarray) -> None:
    """The culprits send the update of the first of them."""
    for name in LAYERS:
        updates[name][who] = updates[name][who][0]


PLANTED: Mapping[str, Planted] = {
    "boosted": Planted(boosted, (CULPRIT,)),
    "turned": Planted(turned, (CULPRIT,)),
    "shifted class": Planted(shifted_class, (CULPRIT,)),
    "shifted class, three clients": Planted(shifted_class, GROUP),
    "drifting": Planted(drifting, (CULPRIT,)),
    "equal pair": Planted(one_for_all, ("client-01", "client-08")),
}

# statistic or detector -> the planted case of its own kind, which it must rank first; "" where none fits
CASES: Mapping[str, str] = {
    # statistics, and the detectors of the same name
    "final_bias": "shifted class",
    "final_bias_deviation": "shifted class",
    "final_bias_direction": "",  # which labels, not how far
    "final_rows": "shifted class",
    "neup": "shifted class",
    "threshold_exceedings": "",  # a count of four classes
    "ddif": "shifted class",
    "final_spectrum": "shifted class",
    "layer_norms": "boosted",
    "layer_cosines": "turned",
    "aggregate_cosines": "turned",
    "global_cosines": "",  # the planted global model is zero
    "sign_agreement": "turned",
    "large_share": "boosted",
    "kurtosis": "",
    "spectral": "turned",
    "neighbour_distances": "boosted",
    "neighbour_cosines": "equal pair",
    "accumulated_norms": "drifting",
    "accumulated_spectral": "drifting",
    "accumulated_neighbours": "equal pair",
    "accomplices": "equal pair",
    "label_drift_residual": "drifting",
    "consistency": "boosted",
    "persistence": "drifting",
    "prediction_residual": "boosted",
    # detectors
    "two_clusters": "shifted class, three clients",
    "agglomerative": "shifted class, three clients",
    "hdbscan": "turned",
    "isolation_forest": "turned",
    "local_outlier_factor": "turned",
    "bilgin": "shifted class",
    "tolpegin": "shifted class, three clients",
    "lfighter": "shifted class, three clients",
    "auror": "shifted class, three clients",
    "deepsight": "shifted class",
    "freqfed": "turned",
    "krum": "boosted",
    "multi_krum": "boosted",
    "multi_metrics": "boosted",
    "dnc": "boosted",
    "flame": "turned",
    "rflbat": "boosted",
    "signguard": "turned",
    "alignins": "turned",
    "rlr": "turned",
    "fltrust": "turned",
    "foolsgold": "equal pair",
    "fldetector": "boosted",
    "flanders": "boosted",
    "panel": "drifting",
}


def case_of(kind: str, name: str) -> str:
    """The planted case of a statistic or detector; a failure that says what to add where there is none."""
    cases = ", ".join(map(repr, PLANTED))
    assert name in CASES, (
        f"no planted case for {kind} {name!r}: add one to CASES in tests/planted.py, the one that it must rank first,"
        f' of {cases}; or "" and a comment why none fits'
    )
    return CASES[name]


def edited(log: UpdateLog, edit: Edit, culprits: Collection[str]) -> UpdateLog:
    """The log with the updates of these clients changed in every round."""

    def changed(round_: Round) -> Round:
        updates = {name: np.array(array) for name, array in round_.updates.items()}
        edit(updates, np.isin(round_.clients, list(culprits)))
        return replace(round_, updates=updates)

    return UpdateLog(log.model, [changed(round_) for round_ in log])


def with_client_at(log: UpdateLog, value: float, client: str = CULPRIT) -> UpdateLog:
    """The log in which one client sends nothing but this number."""

    def at_value(updates: Updates, who: np.ndarray) -> None:
        for name in LAYERS:
            updates[name][who] = value

    return edited(log, at_value, [client])


def taken(log: UpdateLog, positions: np.ndarray) -> UpdateLog:
    """The log with the clients at these positions, in this order, in every round; nothing computed is shared."""

    def part(round_: Round) -> Round:
        updates = {name: np.array(array[positions]) for name, array in round_.updates.items()}
        clients, examples = round_.clients[positions], round_.num_examples[positions]
        return replace(round_, clients=clients, num_examples=examples, updates=updates)

    return UpdateLog(log.model, [part(round_) for round_ in log])


def without(log: UpdateLog, client: str = CULPRIT) -> UpdateLog:
    """The log of the other clients."""
    return taken(log, np.flatnonzero(log[0].clients != client))


def log_of(
    rows: Mapping[str, np.ndarray],
    state: Mapping[str, np.ndarray],
    *,
    num_examples: np.ndarray | None = None,
    buffers: tuple[str, ...] = (),
) -> UpdateLog:
    """A log of one round made of arrays layer -> [client, *shape], the clients called a, b, c, ..."""
    count = len(next(iter(rows.values())))
    clients = np.array([chr(ord("a") + i) for i in range(count)], dtype=np.str_)
    examples = np.full(count, 10) if num_examples is None else num_examples
    round_ = Round(0, clients, examples, rows, state, buffers=buffers)
    return UpdateLog(ModelSpec.of(state, buffers=buffers), [round_])


def truth_of(log: UpdateLog, culprits: Collection[str], rounds: Collection[int] | None = None) -> pd.DataFrame:
    """Ground truth: these clients are compromised and poison in these rounds (None: in every one)."""
    rows = [
        (r.index, str(c), c in culprits, c in culprits and (rounds is None or r.index in rounds))
        for r in log
        for c in r.clients
    ]
    return pd.DataFrame(rows, columns=["round", "client", "compromised", "poisoned"])
