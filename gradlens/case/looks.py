"""When a live investigation looks at a recording."""


def looks_of(rounds: int) -> list[int]:
    """The numbers of rounds after which a live investigation looks: 1, 2, 4, 8, ... and the last.

    Examples
    --------
    >>> looks_of(10)
    [1, 2, 4, 8, 10]
    """
    return [2**power for power in range(rounds.bit_length()) if 2**power < rounds] + [rounds]
