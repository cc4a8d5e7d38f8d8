"""Innocent explanations: whether a client's examples, or labels of one kind only, may account for its score."""

from collections.abc import Mapping

import numpy as np

from gradlens.case.scoring import Scoring, deviations
from gradlens.case.sums import Sums
from gradlens.log import UpdateLog

RIDGE = 2.0  # as many clean clients without any slope
TELLING = 0.1  # spread of the logarithm of examples, below which they can explain ever less
UNLIKE = 3.0  # times the most, or the fewest, examples of any clean client: beyond, no clean client can be compared
ONE_LABEL = 0.95  # share of its squared label drift that a single label explains, from which a client may hold no other


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
    """Scores of all clients once their examples and labels are accounted for, float64 [client].

    Parameters
    ----------
    sums : Sums
    scoring : Scoring
    clean : numpy.ndarray
        bool [client], the clients that are taken as examples of the innocent.
    examples : Mapping
        Client -> number of examples.

    Notes
    -----
    Every reading is regressed on the logarithm of the examples, by a ridge on the clean clients; what it says of a
    client is taken off its deviations. Nothing is left, -inf, of a client with more than three times the examples of
    any clean one, or fewer than a third, and of one that seems to hold a single label (`holds_one_label`).

    How far a client's labels drift is not regressed on: one that poisons alone drifts farther than all others, and a
    slope that they set would explain anything.

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
    cause = sizes - np.median(sizes[clean])
    cause /= max(cause[clean].std(), TELLING)
    slopes = cause[clean] @ table[clean] / (cause[clean] @ cause[clean] + RIDGE)
    left = scoring.added(table - cause[:, None] * slopes).sum(axis=1) + scoring.intercept
    unlike = (sizes > sizes[clean].max() + np.log(UNLIKE)) | (sizes < sizes[clean].min() - np.log(UNLIKE))
    return np.where(unlike | holds_one_label(sums, clean), -np.inf, left)


def holds_one_label(sums: Sums, clean: np.ndarray) -> np.ndarray:
    """Which clients drift towards one label and equally away from all others, farther than any clean client.

    A client whose examples all have the same label does, and so does one that gives them all the same label. With two
    labels each drift is of this kind, and nobody who drifts that far is accused.

    Parameters
    ----------
    sums : Sums
    clean : numpy.ndarray
        bool [client].

    Returns
    -------
    ndarray, bool [client]
        Nobody where the model does not tell label drift.

    Examples
    --------
    >>> from gradlens.case.sums import sums_of
    >>> from gradlens.examples import example_log
    >>> holds_one_label(sums_of(example_log(num_malicious=0)), np.ones(10, bool)).any()
    np.False_
    """
    drift = sums.label_drift
    if drift is None:
        return np.zeros(len(clean), bool)
    drift = drift - np.median(drift[clean], axis=0)
    drift -= drift.mean(axis=1, keepdims=True)
    squares, labels = (drift**2).sum(axis=1), drift.shape[1]
    # The direction of label k is e_k less its mean, of squared norm 1 - 1 / labels; drift has no mean.
    along = np.maximum(drift.max(axis=1), 0) ** 2 / (1 - 1 / labels) if labels > 1 else np.zeros(len(drift))
    return (squares > squares[clean].max()) & (along >= ONE_LABEL * squares)
