"""Which clients take part in each round, which of them attack, and whose update is lost or arrives broken."""

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
        Numbers of the clients, int64 [client], sorted.
    attacking : array
        bool [client], whether each is a malicious client that attacks in this round.
    broken : array
        bool [client], whether its update arrives as NaN.

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
    """Returns the names of the clients, str [client]: client-00, client-01, ...

    Examples
    --------
    >>> from simulations import Scenario
    >>> client_names(Scenario(num_clients=3)).tolist()
    ['client-00', 'client-01', 'client-02']
    """
    width = max(2, len(str(scenario.num_clients - 1)))
    return np.array([f"client-{number:0{width}d}" for number in range(scenario.num_clients)], dtype=np.str_)


def malicious_clients(scenario: Scenario) -> np.ndarray:
    """Draws the malicious clients.

    They depend only on the seed and the number of clients; a smaller set of malicious clients is part of a larger one.

    Parameters
    ----------
    scenario : Scenario
        Gives the seed, the number of clients, and the number of malicious ones.

    Returns
    -------
    array
        Their numbers, int64, sorted.

    Examples
    --------
    >>> from simulations import Scenario
    >>> malicious_clients(Scenario(attack="trigger", num_malicious=3)).tolist()
    [6, 8, 10]
    """
    order = address(scenario.seed, Stream.MALICIOUS).permutation(scenario.num_clients)
    return np.sort(order[: scenario.num_malicious])


def participants(scenario: Scenario, index: int) -> np.ndarray:
    """Draws the clients of a round.

    Parameters
    ----------
    scenario : Scenario
        Gives the seed, the numbers of clients and the schedule.
    index : int
        Number of the round, from 0.

    Returns
    -------
    array
        Their numbers, int64, sorted.

    Notes
    -----
    If the schedule decides which malicious clients take part, the other places go to benign clients, and if these are
    too few, to malicious clients that do not attack in this round.

    Examples
    --------
    >>> from simulations import Scenario
    >>> len(participants(Scenario(num_clients=10, clients_per_round=4), index=0))
    4
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
    """Draws the cohorts of all rounds.

    Parameters
    ----------
    scenario : Scenario
        Gives the seed, the numbers of clients, the schedule, and the rates of missing and broken updates.

    Returns
    -------
    list of Cohort
        One per round, of the clients whose update arrives; at least one does in every round.

    Examples
    --------
    >>> from simulations import Scenario
    >>> [len(cohort.clients) for cohort in cohorts(Scenario(rounds=3, num_clients=5))]
    [5, 5, 5]
    """
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
