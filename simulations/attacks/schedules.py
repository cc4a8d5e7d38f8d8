"""When malicious clients attack, and which of them take part in a round."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from pydantic import Field, validate_call

from gradlens.errors import InputError

Index = Annotated[int, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]


@dataclass(frozen=True)
class Turn:
    """One malicious client in one round that it takes part in.

    index: the round, counted from 0; position: number of the client among the malicious ones; taken_part: rounds
    that it took part in before.
    """

    index: int
    position: int
    taken_part: int


@dataclass(frozen=True)
class Schedule:
    """When the attack is on; at other times malicious clients are honest.

    due: whether a malicious client that takes part attacks.
    present: (round, number of malicious clients, clients per round, generator) -> positions of the malicious clients
    that take part, sorted, at most the clients per round, all other places going to benign clients; None in a round
    where client sampling decides, as it does in all rounds where the schedule has no `present`.
    """

    due: Callable[[Turn], bool]
    present: Callable[[int, int, int, np.random.Generator], np.ndarray | None] | None = None


@validate_call(config={"strict": True})
def every_round() -> Schedule:
    """On in every round."""
    return Schedule(lambda turn: True)


@validate_call(config={"strict": True})
def from_round(first: Index = 0) -> Schedule:
    """On from round `first` to the last, rounds counted from 0 as in the log; before it the clients are honest."""
    return Schedule(lambda turn: turn.index >= first)


@validate_call(config={"strict": True})
def single_round(at: Index = 0) -> Schedule:
    """On in round `at` alone, and then every malicious client is present; in other rounds client sampling decides.

    Source: the single-shot attack of Bagdasaryan et al. 2018, arXiv:1807.00459.
    """
    return _with_all_present(lambda index: index == at)


@validate_call(config={"strict": True})
def every_nth(period: Count = 2, first: Index = 0) -> Schedule:
    """On in rounds first, first + period, ..., with every malicious client present; else client sampling decides.

    Source: the fixed-frequency attack of Sun et al. 2019, arXiv:1911.07963, who have one attacker.
    """
    return _with_all_present(lambda index: index >= first and (index - first) % period == 0)


@validate_call(config={"strict": True})
def in_turn(first: Index = 0, gap: Count = 2) -> Schedule:
    """Malicious client k attacks once, in round first + k x gap, as the only malicious client that is present then.

    In other rounds client sampling decides. Source: the single-shot attack of DBA, Xie et al. 2020 (ICLR), whose
    four attackers come in rounds 12, 14, 16, 18 on MNIST.
    """

    def present(index: int, num_malicious: int, places: int, rng: np.random.Generator) -> np.ndarray | None:
        position, rest = divmod(index - first, gap)
        return np.array([position]) if rest == 0 and 0 <= position < num_malicious else None

    return Schedule(lambda turn: turn.index == first + turn.position * gap, present)


@validate_call(config={"strict": True})
def alternating(period: Count = 3) -> Schedule:
    """Each malicious client attacks in the first round that it takes part in and then in every period-th one."""
    return Schedule(lambda turn: turn.taken_part % period == 0)


@validate_call(config={"strict": True})
def random_pool(population: Count = 3383, compromised: Index = 113) -> Schedule:
    """On in every round, with as many malicious clients as if a round were drawn from a large population.

    Their number is hypergeometric: of `population` clients `compromised` are malicious and a round's clients are
    drawn without repetition; at most the malicious clients that there are. Which of them come is drawn at random.
    Source: the random-sampling attack of Sun et al. 2019, arXiv:1911.07963; 113 of 3,383 users as in the re-run of
    the authors of RoFL (pps-lab/fl-analysis).
    """
    if compromised > population:
        raise InputError(f"random_pool: expected at most population = {population} compromised, found {compromised}")

    def present(index: int, num_malicious: int, places: int, rng: np.random.Generator) -> np.ndarray:
        if places > population:
            raise InputError(f"random_pool: {places} clients per round cannot be drawn from {population}")
        drawn = int(rng.hypergeometric(compromised, population - compromised, places))
        return np.sort(rng.permutation(num_malicious)[:drawn])

    return Schedule(lambda turn: True, present)


SCHEDULES: Mapping[str, Callable[..., Schedule]] = {
    "every_round": every_round,
    "from_round": from_round,
    "single_round": single_round,
    "every_nth": every_nth,
    "in_turn": in_turn,
    "alternating": alternating,
    "random_pool": random_pool,
}


def _with_all_present(on: Callable[[int], bool]) -> Schedule:
    """On in some rounds, with all malicious clients present, or as many as there are places, drawn at random."""

    def present(index: int, num_malicious: int, places: int, rng: np.random.Generator) -> np.ndarray | None:
        return np.sort(rng.permutation(num_malicious)[:places]) if on(index) else None

    return Schedule(lambda turn: on(turn.index), present)
