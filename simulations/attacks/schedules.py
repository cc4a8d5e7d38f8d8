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

    Parameters
    ----------
    index : int
        The round, counted from 0.
    position : int
        Number of the client among the malicious ones.
    taken_part : int
        How many earlier rounds it took part in.

    Examples
    --------
    >>> Turn(index=3, position=0, taken_part=2).index
    3
    """

    index: int
    position: int
    taken_part: int


@dataclass(frozen=True)
class Schedule:
    """When the attack is on; at other times malicious clients are honest.

    Parameters
    ----------
    due : callable
        (turn) -> whether a malicious client that takes part attacks.
    present : callable, optional
        (round, number of malicious clients, clients per round, generator) -> sorted positions of the malicious clients
        that take part, at most the clients per round; all other places go to benign clients. None, from the function
        or in its place: client sampling decides.

    Examples
    --------
    >>> even = Schedule(due=lambda turn: turn.index % 2 == 0)
    >>> even.due(Turn(index=3, position=0, taken_part=0))
    False
    """

    due: Callable[[Turn], bool]
    present: Callable[[int, int, int, np.random.Generator], np.ndarray | None] | None = None


@validate_call(config={"strict": True})
def every_round() -> Schedule:
    """Attacks in every round.

    Examples
    --------
    >>> every_round().due(Turn(index=0, position=0, taken_part=0))
    True
    """
    return Schedule(lambda turn: True)


@validate_call(config={"strict": True})
def from_round(first: Index = 0) -> Schedule:
    """Attacks from a round on; before it malicious clients are honest.

    Parameters
    ----------
    first : int
        The first round with an attack, counted from 0 as in the log; 0, the default, is every round.

    Examples
    --------
    >>> schedule = from_round(first=7)
    >>> [schedule.due(Turn(index=index, position=0, taken_part=index)) for index in (6, 7, 8)]
    [False, True, True]
    """
    return Schedule(lambda turn: turn.index >= first)


@validate_call(config={"strict": True})
def single_round(at: Index = 0) -> Schedule:
    """Attacks in one round, in which every malicious client is present [1]_.

    Parameters
    ----------
    at : int
        That round, counted from 0, the default. In all others client sampling decides who takes part.

    References
    ----------
    .. [1] Bagdasaryan et al. 2018, arXiv:1807.00459, single-shot attack.

    Examples
    --------
    >>> single_round(at=40).due(Turn(index=40, position=0, taken_part=3))
    True
    """
    return _with_all_present(lambda index: index == at)


@validate_call(config={"strict": True})
def every_nth(period: Count = 2, first: Index = 0) -> Schedule:
    """Attacks in every n-th round, in which every malicious client is present [1]_.

    Parameters
    ----------
    period : int
        Rounds from one attack to the next; 2 is a plain choice.
    first : int
        The first round with an attack, counted from 0. In rounds without an attack client sampling decides who takes
        part.

    References
    ----------
    .. [1] Sun et al. 2019, arXiv:1911.07963, fixed-frequency attack, there with one attacker.

    Examples
    --------
    >>> schedule = every_nth(period=3, first=1)
    >>> [index for index in range(9) if schedule.due(Turn(index, position=0, taken_part=0))]
    [1, 4, 7]
    """
    return _with_all_present(lambda index: index >= first and (index - first) % period == 0)


@validate_call(config={"strict": True})
def in_turn(first: Index = 0, gap: Count = 2) -> Schedule:
    """Lets each malicious client attack once, one after the other, as the only malicious client of its round.

    Parameters
    ----------
    first : int
        The round in which malicious client 0 attacks, counted from 0.
    gap : int
        Rounds from one client to the next; 2 as in [1]_, whose four attackers come in rounds 12, 14, 16 and 18 on
        MNIST. In all other rounds client sampling decides who takes part.

    References
    ----------
    .. [1] Xie et al. 2020, "DBA" (ICLR), single-shot attack.

    Examples
    --------
    >>> schedule = in_turn(first=12)
    >>> [schedule.due(Turn(index=14, position=position, taken_part=0)) for position in range(4)]
    [False, True, False, False]
    """

    def present(index: int, num_malicious: int, places: int, rng: np.random.Generator) -> np.ndarray | None:
        position, rest = divmod(index - first, gap)
        return np.array([position]) if rest == 0 and 0 <= position < num_malicious else None

    return Schedule(lambda turn: turn.index == first + turn.position * gap, present)


@validate_call(config={"strict": True})
def alternating(period: Count = 3) -> Schedule:
    """Lets each malicious client attack in the first round that it takes part in and then in every n-th one.

    Parameters
    ----------
    period : int
        Rounds that it takes part in, from one attack to the next; 3 is a plain choice.

    Examples
    --------
    >>> schedule = alternating(period=2)
    >>> [schedule.due(Turn(index=20, position=0, taken_part=count)) for count in range(4)]
    [True, False, True, False]
    """
    return Schedule(lambda turn: turn.taken_part % period == 0)


@validate_call(config={"strict": True})
def random_pool(population: Count = 3383, compromised: Index = 113) -> Schedule:
    """Attacks in every round with as many malicious clients as if a round were drawn from a large population [1]_.

    Parameters
    ----------
    population : int
        Clients that the server could draw; 3,383 and 113 are those of the re-run by the authors of RoFL
        (pps-lab/fl-analysis).
    compromised : int
        How many of them are malicious.

    Raises
    ------
    InputError
        If more are compromised than there are; in a run, if a round has more places than the population.

    Notes
    -----
    The number of malicious clients of a round is hypergeometric, and at most that of the scenario. Which of them come
    is drawn at random.

    References
    ----------
    .. [1] Sun et al. 2019, arXiv:1911.07963, random-sampling attack.

    Examples
    --------
    >>> import numpy as np
    >>> random_pool(population=100, compromised=10).present(0, 5, 20, np.random.default_rng(0))
    array([2])
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
    """Attacks in some rounds, with all malicious clients present, or as many as there are places, drawn at random."""

    def present(index: int, num_malicious: int, places: int, rng: np.random.Generator) -> np.ndarray | None:
        return np.sort(rng.permutation(num_malicious)[:places]) if on(index) else None

    return Schedule(lambda turn: on(turn.index), present)
