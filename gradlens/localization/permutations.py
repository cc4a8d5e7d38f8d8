"""Which clients could have been the malicious ones: one set of labelings for all places."""

from collections.abc import Sequence
from itertools import combinations
from math import comb, prod

import numpy as np


def labelings(attackers: Sequence[np.ndarray], permutations: int, seed: int) -> tuple[list[np.ndarray], bool]:
    """Names as many clients of each run malicious as there are, in all possible ways or at random.

    Parameters
    ----------
    attackers : sequence of numpy.ndarray
        bool [client] of each run, who is malicious.
    permutations : int
        Number of random labelings; if there are no more possible ones than that, all of them are listed instead.
    seed : int
        Seed of the random ones.

    Returns
    -------
    tuple of (list of numpy.ndarray, bool)
        bool [labeling, client] of each run, and whether these are all possible labelings.

    Examples
    --------
    >>> (of_run,), exact = labelings([np.array([True, False, False])], permutations=99, seed=0)
    >>> of_run.astype(int).tolist(), exact
    ([[1, 0, 0], [0, 1, 0], [0, 0, 1]], True)
    """
    numbers = [comb(len(run), int(run.sum())) for run in attackers]
    if prod(numbers) > permutations:
        tiled = [np.tile(run, (permutations, 1)) for run in attackers]
        return [np.random.default_rng([seed, i]).permuted(run, axis=1) for i, run in enumerate(tiled)], False
    chosen = np.indices(numbers).reshape(len(numbers), -1)  # of each run, with every one of the others
    return [_choices(run)[which] for run, which in zip(attackers, chosen, strict=True)], True


def _choices(attackers: np.ndarray) -> np.ndarray:
    """Lists every choice of as many clients, bool [choice, client]."""
    choices = list(combinations(range(len(attackers)), int(attackers.sum())))
    table = np.zeros((len(choices), len(attackers)), dtype=bool)
    for row, choice in zip(table, choices, strict=True):
        row[list(choice)] = True
    return table


def adjusted(values: np.ndarray, highest: np.ndarray, *, exact: bool) -> np.ndarray:
    """Computes p-values adjusted over places by the single-step maximum (Westfall and Young 1993).

    Parameters
    ----------
    values : numpy.ndarray
        float64 [place], the figure of each place under the true labeling, NaN for none.
    highest : numpy.ndarray
        float64 [labeling], the highest figure of all places under each labeling.
    exact : bool
        Whether the labelings are all possible ones, the true one among them.

    Returns
    -------
    numpy.ndarray
        float64 [place], the share of labelings under which any place is at least as high. Random labelings count the
        true one as one more.

    Examples
    --------
    >>> adjusted(np.array([1.0, 0.7]), np.array([0.6, 0.9, 1.0, 0.5]), exact=True).tolist()
    [0.25, 0.5]
    """
    as_high = (highest >= values[:, None] - 1e-12).sum(axis=1)
    return as_high / len(highest) if exact else (1 + as_high) / (1 + len(highest))
