"""Every random number of a run has an address: seed, purpose, round and client. No draw depends on another."""

from enum import IntEnum
from threading import Lock

import numpy as np

GENERATOR = Lock()  # torch has one global generator, from which models are initialized


class Stream(IntEnum):
    """What a random number is for; the number of one purpose is never given to another.

    Examples
    --------
    >>> Stream.PARTITION.value
    1
    """

    SAMPLES = 0  # which training samples are used at all
    PARTITION = 1
    MODEL = 2  # the initial weights
    MALICIOUS = 3  # who is malicious
    PARTICIPANTS = 4  # who takes part in a round
    BATCHES = 5
    POISON = 6  # which samples are poisoned
    ATTACK = 7  # noise in what is sent
    POOL = 8  # which samples the attackers bring
    SCHEDULE = 9  # which malicious clients take part
    MISSING = 10  # whose update does not arrive
    NONFINITE = 11  # whose update arrives broken
    PRETRAINING = 12  # which samples the server has, and their order
    ADAPTERS = 13  # the initial weights of adapters


def address(seed: int, stream: Stream, round_: int = 0, client: int = 0) -> np.random.Generator:
    """Returns the generator of one purpose in one round for one client.

    Parameters
    ----------
    seed : int
        The scenario's.
    stream : Stream
        The purpose.
    round_, client : int
        0 where the purpose has none.

    Examples
    --------
    >>> int(address(0, Stream.ATTACK, round_=3).integers(100)) == int(address(0, Stream.ATTACK, round_=3).integers(100))
    True
    """
    return np.random.default_rng([seed, stream, round_, client])
