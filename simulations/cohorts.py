"""Who takes part in each round, who of them attacks, and whose update does not arrive whole."""

from typing import NamedTuple

import numpy as np

from simulations.attacks import Schedule, Turn
from simulations.components import build
from simulations.randomness import Stream, address
from simulations.scenario import Scenario


class Cohort(NamedTuple):
    """The clients of one round whose update arrives, int64 [client], sorted, and bool [client] about each.

    attacking: malicious clients that attack in this round; broken: what arrives of them is not finite.
    """

    clients: np.ndarray
    attacking: np.ndarray
    broken: np.ndarray


def client_names(scenario: Scenario) -> np.ndarray:
    """What the clients are called, str [client]: client-00, client-01, ..."""
    width = max(2, len(str(scenario.num_clients - 1)))
    return np.array([f"client-{number:0{width}d}" for number in range(scenario.num_clients)], dtype=np.str_)


def malicious_clients(scenario: Scenario) -> np.ndarray:
    """The malicious clients' numbers, int64, sorted: drawn at random, alike for equal seed and number of clients.

    Fewer malicious clients are among those of a larger number.
    """
    order = address(scenario.seed, Stream.MALICIOUS).permutation(scenario.num_clients)
    return np.sort(order[: scenario.num_malicious])


def participants(scenario: Scenario, index: int) -> np.ndarray:
    """The numbers of the clients that are drawn for a round, int64, sorted.

    Where the schedule says which malicious clients take part, the other places go to benign clients; if those are
    too few, to malicious clients that do not attack in this round.
    """
    order = address(scenario.seed, Stream.PARTICIPANTS, index).permutation(scenario.num_clients)
    places, schedule = scenario.clients_per_round or scenario.num_clients, _schedule(scenario)
    if schedule.present is not None:
        malicious = malicious_clients(scenario)
        rng = address(scenario.seed, Stream.SCHEDULE, index)
        positions = schedule.present(index, len(malicious), places, rng)
        if positions is not None:
            idle = [client for k, client in enumerate(malicious) if not schedule.due(Turn(index, k, 0))]
            rest = np.setdiff1d(malicious, idle)
            order = np.concatenate([malicious[positions], order[~np.isin(order, malicious)], idle]).astype(np.int64)
            places = min(places, scenario.num_clients - len(rest) + len(positions))
            order = order[np.sort(np.unique(order, return_index=True)[1])]
    return np.sort(order[:places])


def cohorts(scenario: Scenario) -> list[Cohort]:
    """The cohort of every round; of those that are drawn at least one client's update arrives."""
    malicious, schedule = malicious_clients(scenario).tolist(), _schedule(scenario)
    taken_part, found = dict.fromkeys(malicious, 0), []
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
        found.append(Cohort(clients, np.isin(clients, list(attacking)), broken < scenario.nonfinite_rate))
    return found


def _schedule(scenario: Scenario) -> Schedule:
    return build("schedule", scenario.schedule)
