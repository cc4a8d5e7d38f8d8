"""Which training samples each client holds; every sample goes to exactly one client."""

from collections.abc import Callable, Mapping
from typing import Annotated

import numpy as np
from pydantic import Field, validate_call

from gradlens.log import InputError

Partition = Callable[[np.ndarray, int, np.random.Generator], list[np.ndarray]]
# (labels int64 [sample], number of clients, generator) -> positions of each client's samples, sorted

ATTEMPTS = 1_000  # draws of a skewed partition before it is called impossible


@validate_call(config={"strict": True})
def iid() -> Partition:
    """Equal shares at random; sizes differ by one sample at most."""

    def split(labels: np.ndarray, num_clients: int, rng: np.random.Generator) -> list[np.ndarray]:
        _check(labels, num_clients, 1)
        return [np.sort(part) for part in np.array_split(rng.permutation(len(labels)), num_clients)]

    return split


@validate_call(config={"strict": True})
def dirichlet(
    alpha: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.5, minimum: Annotated[int, Field(ge=1)] = 10
) -> Partition:
    """Label skew: each class is shared out in proportions drawn from a symmetric Dirichlet(alpha).

    A client that already holds its share of the data gets nothing of the classes that follow, and the whole is
    drawn again until every client holds `minimum` samples. Raises InputError after 1,000 draws.
    Source: Yurochkin et al. 2019, arXiv:1905.12022.
    """

    def split(labels: np.ndarray, num_clients: int, rng: np.random.Generator) -> list[np.ndarray]:
        _check(labels, num_clients, minimum)
        for _ in range(ATTEMPTS):
            owners = _owners(labels, num_clients, alpha, rng)
            if np.bincount(owners, minlength=num_clients).min() >= minimum:
                return [np.flatnonzero(owners == client) for client in range(num_clients)]
        raise InputError(
            f"dirichlet: no draw in {ATTEMPTS:,} with alpha {alpha:g} gave each of {num_clients} clients "
            f"{minimum} of {len(labels)} samples; raise alpha or lower minimum"
        )

    return split


PARTITIONS: Mapping[str, Callable[..., Partition]] = {"iid": iid, "dirichlet": dirichlet}


def _owners(labels: np.ndarray, num_clients: int, alpha: float, rng: np.random.Generator) -> np.ndarray:
    """One draw: the client that owns each sample, int64 [sample]."""
    owners = np.zeros(len(labels), np.int64)
    held = np.zeros(num_clients, np.int64)
    for label in np.unique(labels):
        samples = rng.permutation(np.flatnonzero(labels == label))
        shares = rng.dirichlet(np.full(num_clients, alpha)) * (held * num_clients < len(labels))
        # a tiny alpha may give the whole class to clients that have their share already: those then draw lots
        shares = shares / shares.sum() if shares.sum() > 0 else np.full(num_clients, 1 / num_clients)
        cuts = np.rint(np.cumsum(shares)[:-1] * len(samples)).astype(np.int64)
        owner = np.repeat(np.arange(num_clients), np.diff(cuts, prepend=0, append=len(samples)))
        owners[samples] = owner
        held += np.bincount(owner, minlength=num_clients)
    return owners


def _check(labels: np.ndarray, num_clients: int, minimum: int) -> None:
    if len(labels) < num_clients * minimum:
        raise InputError(
            f"partition: {num_clients} clients with at least {minimum} samples each need "
            f"{num_clients * minimum} samples, found {len(labels)}"
        )
