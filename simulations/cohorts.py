"""Who takes part in each round, who of them attacks, and whose update is lost or arrives broken."""

from typing import NamedTuple

import numpy as np

from simulations.attacks import Schedule, Turn
from simulations.components import build
from simulations.randomness import Stream, address
from simulations.scenario import Scenario


class Cohort(NamedTuple):
    """The clients of one round whose update arrives.

    Parameters
    ----------
    clients : array
        Their numbers, int64 [client], sorted.
    attacking : array
        bool [client], the malicious clients that attack in this round.
    broken : array
        bool [client], those whose update arrives as NaN.

    Examples
    --------
    >>> from simulations import Scenario
    >>> cohort = cohorts(Scenario(num_clients=5, attack="trigger", num_malicious=2))[0]
    >>> cohort.clients.tolist(), int(cohort.attacking.sum())
    ([0, 1, 2, 3, 4], 2)
    """

    clients: np.ndarray
    attacking: np.ndarray
    broken: np.ndarray


def client_names(scenario: Scenario) -> np.ndarray:
    """Returns the names of the clients, str [client]: client-00, client-01, ..."""
    width = max(2, len(str(scenario.num_clients - 1)))
    return np.array([f"client-{number:0{width}d}" for number in range(scenario.num_clients)], dtype=np.str_)


def malicious_clients(scenario: Scenario) -> np.ndarray:
    """Returns the numbers of the malicious clients, drawn at random.

    They depend on the seed and the number of clients alone; those of a smaller number are among those of a larger one.

    Parameters
    ----------
    scenario : Scenario
        Its `num_malicious` is how many there are.

    Returns
    -------
    array
        int64, sorted.

    Examples
    --------
    >>> from simulations import Scenario
    >>> malicious_clients(Scenario(attack="trigger", num_malicious=3)).tolist()
    [6, 8, 10]
    """
    order = address(scenario.seed, Stream.MALICIOUS).permutation(scenario.num_clients)
    return np.sort(order[: scenario.num_malicious])


def participants(scenario: Scenario, index: int) -> np.ndarray:
    """Returns the numbers of the clients that are drawn for a round, int64, sorted.

    Where the schedule decides which malicious clients take part, the other places go to benign clients, and if those
    are too few, to malicious clients that do not attack in this round.
    """
    order = address(scenario.seed, Stream.PARTICIPANTS, index).permutation(scenario.num_clients)
    places, schedule = scenario.clients_per_round or scenario.num_clients, _schedule(scenario)
    if schedule.present is not None:
        malicious = malicious_clients(scenario)
        rng = address(scenario.seed, Stream.SCHEDULE, index)
        positions = schedule.present(index, len(malicious), places, rng)
        if positions is not None:
            idle = [client for k, client in enumerate(malicious) if not schedule.due(Turn(index, k, 0))]
            ready = np.setdiff1d(malicious, idle)
            order = np.concatenate([malicious[positions], order[~np.isin(order, malicious)], idle]).astype(np.int64)
            places = min(places, scenario.num_clients - len(ready) + len(positions))
            order = order[np.sort(np.unique(order, return_index=True)[1])]
    return np.sort(order[:places])


def cohorts(scenario: Scenario) -> list[Cohort]:
    """Returns the cohort of every round; at least one update of those that are drawn arrives."""
    malicious, schedule = malicious_clients(scenario).tolist(), _schedule(scenario)
    taken_part, rounds = dict.fromkeys(malicious, 0), []
    for index in range(scenario.rounds):
        drawn = participants(scenario, index)
        attacking = {
            client
            for position, client in enumerate(malicious)
            if client in drawn and schedule.due(Turn(index, position, taken_part[client]))
        }
        for client in set(malicious) & set(drawn.tolist()):
            taken_part[client] += 1
        luck = address(scenario.seed, Stream.MISSING, index).random(scenario.num_clients)[drawn]
        clients = drawn[(luck >= scenario.missing_rate) | (luck == luck.max(initial=0.0))]
        broken = address(scenario.seed, Stream.NONFINITE, index).random(scenario.num_clients)[clients]
        rounds.append(Cohort(clients, np.isin(clients, list(attacking)), broken < scenario.nonfinite_rate))
    return rounds


def _schedule(scenario: Scenario) -> Schedule:
    return build("schedule", scenario.schedule)
