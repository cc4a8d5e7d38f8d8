"""Innocent explanations: what is left of a client's score once its examples and labels account for what they can."""

from collections.abc import Mapping

import numpy as np

from gradlens.case.scoring import Scoring, deviations
from gradlens.case.sums import Sums
from gradlens.log import UpdateLog

RIDGE = 2.0  # as many clean clients without any slope
UNLIKE = 3.0  # times the most, or the fewest, examples of any clean client: beyond, no clean client can be compared


def claimed_examples(log: UpdateLog) -> Mapping[str, float]:
    """Client -> median number of examples that it claimed.

    Parameters
    ----------
    log : UpdateLog

    Examples
    --------
    >>> from gradlens.examples import example_log
    >>> claimed_examples(example_log())["client-0"]
    100.0
    """
    claims: dict[str, list[int]] = {}
    for round_ in log:
        for client, count in zip(round_.clients.tolist(), round_.num_examples.tolist(), strict=True):
            claims.setdefault(client, []).append(count)
    return {client: float(np.median(of)) for client, of in claims.items()}


def left_unexplained(sums: Sums, scoring: Scoring, clean: np.ndarray, examples: Mapping[str, float]) -> np.ndarray:
    """Scores of all clients once every reading was regressed on examples and label drift, float64 [client].

    Parameters
    ----------
    sums : Sums
    scoring : Scoring
    clean : numpy.ndarray
        bool [client], the clients that the regression rests on.
    examples : Mapping
        Client -> number of examples.

    Notes
    -----
    The two explanations are the logarithm of the examples, and of the norm of what the client's final bias drifted over
    all rounds. The regression is a ridge on the clean clients; what it says of a client is taken off its deviations.
    Nothing is left, -inf, of a client with more than three times the examples of any clean one, or fewer than a third.

    Examples
    --------
    >>> from gradlens.case.shipped import reference
    >>> from gradlens.case.sums import sums_of
    >>> from gradlens.examples import example_log
    >>> log = example_log()
    >>> left = left_unexplained(sums_of(log), reference().scoring, np.arange(10) < 9, claimed_examples(log))
    >>> left.shape
    (10,)
    """
    table = deviations(sums, clean, scoring.readings, scoring.scales)
    sizes = np.log([max(examples[str(client)], 1.0) for client in sums.clients])
    columns = [sizes]
    if "final bias" in sums.roles:
        drift = np.diagonal(sums.totals[sums.roles["final bias"][0]])
        columns.append(0.5 * np.log(np.maximum(drift, 1e-30)))
    causes = np.stack(columns, axis=1)
    causes = causes - np.median(causes[clean], axis=0)
    spread = causes[clean].std(axis=0)
    causes = np.where(spread > 1e-9, causes / np.where(spread > 1e-9, spread, 1.0), 0.0)
    square = causes[clean].T @ causes[clean] + RIDGE * np.eye(causes.shape[1])
    slopes = np.linalg.solve(square, causes[clean].T @ table[clean])
    left = scoring.added(table - causes @ slopes).sum(axis=1) + scoring.intercept
    unlike = (sizes > sizes[clean].max() + np.log(UNLIKE)) | (sizes < sizes[clean].min() - np.log(UNLIKE))
    return np.where(unlike, -np.inf, left)
