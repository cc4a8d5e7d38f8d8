"""Which clients act together, and what binds them."""

from typing import NamedTuple

import numpy as np

from gradlens.case.sums import Sums, typical
from gradlens.geometry import about_reference_mean, pairwise_cosines


class Group(NamedTuple):
    """Suspects who act together, or one of two camps.

    Parameters
    ----------
    name : str
        "A", "B", ...
    clients : tuple of str
    cosine : float
        Mean cosine between them, of what they sent over all rounds beyond what the clean clients did.
    innocent : float
        The largest such cosine between two clean clients; NaN where it is not known who is clean.

    Examples
    --------
    >>> Group("A", ("client-3", "client-7"), 0.9, 0.4).clients
    ('client-3', 'client-7')
    """

    name: str
    clients: tuple[str, ...]
    cosine: float
    innocent: float


def likeness(sums: Sums, clean: np.ndarray) -> np.ndarray:
    """Cosines between what clients sent over all rounds beyond what the clean ones did, float64 [client, client].

    Parameters
    ----------
    sums : Sums
    clean : numpy.ndarray
        bool [client], the clients that are no suspects.

    Examples
    --------
    >>> from gradlens.case.sums import sums_of
    >>> from gradlens.examples import example_log
    >>> cosine = likeness(sums_of(example_log(num_malicious=3)), np.arange(10) < 7)
    >>> sorted(cosine[9].argsort()[-3:].tolist())
    [7, 8, 9]
    """
    products = np.mean([of / typical(np.diagonal(of)) for of in sums.totals.values()], axis=0)
    return pairwise_cosines(about_reference_mean(products, clean))


def groups_of(sums: Sums, suspects: np.ndarray) -> list[Group]:
    """Groups of suspects that are more alike than any two clean clients, the largest first.

    Parameters
    ----------
    sums : Sums
    suspects : numpy.ndarray
        bool [client].

    Examples
    --------
    >>> from gradlens.case.sums import sums_of
    >>> from gradlens.examples import example_log
    >>> [group] = groups_of(sums_of(example_log(num_malicious=3)), np.arange(10) > 6)
    >>> group.clients
    ('client-7', 'client-8', 'client-9')
    """
    from scipy.sparse import csr_array
    from scipy.sparse.csgraph import connected_components

    clean, positions = ~suspects, np.flatnonzero(suspects)
    if len(positions) < 2 or clean.sum() < 2:
        return []
    cosine = likeness(sums, clean)
    innocent = float(_of_pairs(cosine, np.flatnonzero(clean)).max())
    among = cosine[np.ix_(positions, positions)]
    count, labels = connected_components(csr_array(among > innocent), directed=False)
    groups = []
    for members in sorted((np.flatnonzero(labels == label) for label in range(count)), key=len, reverse=True):
        if len(members) > 1:
            names = tuple(sums.clients[positions[members]].tolist())
            mean = float(_of_pairs(among, members).mean())
            groups.append(Group(chr(ord("A") + len(groups) % 26), names, mean, innocent))
    return groups


def both_groups(sums: Sums, camp: np.ndarray) -> list[Group]:
    """Two camps as groups, where it cannot be told which one is honest.

    Parameters
    ----------
    sums : Sums
    camp : numpy.ndarray
        bool [client], one of them.

    Examples
    --------
    >>> from gradlens.case.sums import sums_of
    >>> from gradlens.examples import example_log
    >>> [one, other] = both_groups(sums_of(example_log(num_malicious=5)), np.arange(10) > 4)
    >>> one.clients, one.cosine > 0, other.name
    (('client-5', 'client-6', 'client-7', 'client-8', 'client-9'), True, 'B')
    """
    cosine, groups = likeness(sums, np.ones(len(camp), bool)), []
    for name, members in zip("AB", map(np.flatnonzero, (camp, ~camp)), strict=True):
        mean = float(_of_pairs(cosine, members).mean())
        groups.append(Group(name, tuple(sums.clients[members].tolist()), mean, float("nan")))
    return groups


def _of_pairs(cosine: np.ndarray, members: np.ndarray) -> np.ndarray:
    """The cosines of all pairs of some clients, by their positions."""
    return cosine[np.ix_(members, members)][np.triu_indices(len(members), 1)]
