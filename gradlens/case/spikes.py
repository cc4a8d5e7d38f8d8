"""What would have been seen: the smallest planted deviation that an investigation of this recording finds."""

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from gradlens.case.peeling import accused, peel
from gradlens.case.scoring import Scoring
from gradlens.case.sums import Sums, typical

SIZES = (0.2, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0, 20.0)
PLANTED, FOUND = 10, 8  # of so many planted clients so many are to be found


def smallest_seen(sums: Sums, scoring: Scoring, threshold: float, seed: int = 0) -> float | None:
    """The smallest of eleven sizes at which 8 of 10 planted clients would have been accused; None if none is enough.

    Parameters
    ----------
    sums : Sums
    scoring : Scoring
    threshold : float
    seed : int
        Of the draw of the clients; where there are fewer than ten each is planted.

    Returns
    -------
    float or None
        In norms of a typical client's deviation from the median of its round.

    Examples
    --------
    >>> from gradlens.case.shipped import reference
    >>> from gradlens.case.sums import sums_of
    >>> from gradlens.examples import example_log
    >>> smallest_seen(sums_of(example_log(num_malicious=0)), reference().scoring, np.inf) is None
    True
    """
    if not np.isfinite(threshold):
        return None
    rng = np.random.default_rng(seed)
    clients = rng.permutation(len(sums.clients))[:PLANTED]

    def enough(size: float) -> bool:
        missed, most = 0, len(clients) - FOUND / PLANTED * len(clients)
        for client in clients.tolist():
            missed += not _is_seen(planted(sums, client, size), client, scoring, threshold)
            if missed > most:
                return False
        return True

    place = bisect_left(SIZES, True, key=enough)  # what is found at one size is found at every larger one
    return SIZES[place] if place < len(SIZES) else None


def _is_seen(sums: Sums, client: int, scoring: Scoring, threshold: float) -> bool:
    """Whether a client is taken out first, above the threshold, and is above it again when put back."""
    first = peel(sums, scoring, 0.0)
    return bool(first.order[0] == client and accused(sums, scoring, first, threshold)[client])


def planted(sums: Sums, client: int, size: float) -> Sums:
    """The sums if in every round the client had added one vector, at right angles to what all clients sent.

    Parameters
    ----------
    sums : Sums
    client : int
        Position of the client.
    size : float
        Norm of the vector in each layer, in norms of a typical residual.

    Examples
    --------
    >>> from gradlens.case.sums import sums_of
    >>> from gradlens.examples import example_log
    >>> sums = sums_of(example_log())
    >>> added = np.diagonal(planted(sums, 0, 2.0).of_rounds["weights"]) - np.diagonal(sums.of_rounds["weights"])
    >>> added[:2].round(6).tolist()
    [4.0, 0.0]
    """
    rounds = int(sums.rounds[client])
    in_totals = {layer: typical(squares) * size**2 * rounds for layer, squares in sums.squares.items()}
    louder = {role: norms.copy() for role, norms in sums.log_norms.items()}
    for norms in louder.values():
        norms[:, client] = np.log(np.hypot(np.exp(norms[:, client]), size))
    return replace(
        sums,
        of_rounds=_added(sums.of_rounds, client, dict.fromkeys(sums.of_rounds, size**2)),
        totals=_added(sums.totals, client, in_totals),
        log_norms=louder,
    )


def _added(products: Mapping[str, np.ndarray], client: int, squares: Mapping[str, float]) -> dict[str, np.ndarray]:
    changed = {name: of.copy() for name, of in products.items()}
    for name, of in changed.items():
        of[client, client] += squares[name]
    return changed
