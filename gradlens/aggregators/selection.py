"""Rules that select clients by distance: Krum, Multi-Krum and Bulyan; and the table of all plain rules, `RULES`."""

from collections.abc import Callable, Mapping

import numpy as np

from gradlens.aggregators.rules import (
    Aggregator,
    Rule,
    averaged,
    geometric_median,
    mean,
    median,
    rlr,
    rows_of,
    tolerated_of,
    trimmed_mean,
)
from gradlens.errors import InputError
from gradlens.log import Round, UpdateLog, kernels
from gradlens.settings import configured, whole_number_or_none

__all__ = ["RULES", "bulyan", "krum", "multi_krum"]


def krum(num_malicious: int | None = None) -> Aggregator:
    """Takes the update of the one client that lies nearest to its neighbors.

    Parameters
    ----------
    num_malicious : int, optional
        How many malicious clients are to be tolerated; n > 2 num_malicious + 2. None: the most that the cohort allows.

    Returns
    -------
    Aggregator
        Buffers are those of the same client.

    Raises
    ------
    InputError
        If `num_malicious` is no count.

    Notes
    -----
    Of n clients each scores the sum of its squared distances to its n - num_malicious - 2 nearest others; the smallest
    score wins, among equal ones the first name ([1]_, section 4).

    **Fails when** the benign clients' data differ: a single client's update is a poor average, and attackers that lie
    close together win.

    References
    ----------
    .. [1] Blanchard et al. 2017, "Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent".

    Examples
    --------
    >>> from gradlens.examples import example_log
    >>> krum(num_malicious=2)(example_log())["fc2.bias"].shape
    (4,)
    """
    return Rule(configured(_krum, num_malicious=whole_number_or_none("krum: num_malicious", num_malicious)))


def multi_krum(num_malicious: int | None = None, num_selected: int | None = None) -> Aggregator:
    """Averages the updates with the smallest Krum scores.

    Parameters
    ----------
    num_malicious : int, optional
        As for `krum`.
    num_selected : int, optional
        How many clients are averaged; None: all but `num_malicious`, as in most implementations. The paper leaves it
        open.

    Returns
    -------
    Aggregator
        Buffers are averaged over the same clients.

    Raises
    ------
    InputError
        If one of them is no count.

    Notes
    -----
    The scores are those of `krum`, computed once ([1]_, section 4.1).

    **Fails when** attackers lie as close together as benign clients do, or there are more than `num_malicious`.

    References
    ----------
    .. [1] Blanchard et al. 2017, "Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent".

    Examples
    --------
    >>> from gradlens.examples import example_log
    >>> multi_krum(num_malicious=2)(example_log())["fc2.bias"].shape
    (4,)
    """
    number = whole_number_or_none("multi_krum: num_malicious", num_malicious)
    selected = whole_number_or_none("multi_krum: num_selected", num_selected, 1)
    return Rule(configured(_multi_krum, num_malicious=number, num_selected=selected))


def bulyan(num_malicious: int | None = None, selection: str = "repeated") -> Aggregator:
    """Averages the values of each coordinate that are nearest to the median, among clients that Krum selects.

    Parameters
    ----------
    num_malicious : int, optional
        n >= 4 num_malicious + 3. None: the most that the cohort allows.
    selection : {"repeated", "once"}
        "repeated", as in [1]_: Krum selects one client at a time from those that are left. "once": the clients with the
        smallest scores of a single Krum, as in faster implementations.

    Returns
    -------
    Aggregator
        Buffers are averaged over the selected clients.

    Raises
    ------
    InputError
        If `num_malicious` is no count, or for another selection.

    Notes
    -----
    Of n clients n - 2 num_malicious are selected, and of these n - 4 num_malicious values of each coordinate averaged
    ([1]_, section 4).

    **Fails when** benign clients differ under label skew: it leaves out most of them, which costs accuracy.

    References
    ----------
    .. [1] El Mhamdi, Guerraoui & Rouault 2018, "The Hidden Vulnerability of Distributed Learning in Byzantium",
       arXiv:1802.07927.

    Examples
    --------
    >>> from gradlens.examples import example_log
    >>> bulyan(num_malicious=1)(example_log())["fc2.bias"].shape
    (4,)
    """
    if selection not in ("repeated", "once"):
        raise InputError(f"bulyan: selection is 'repeated' or 'once', found {selection!r:.80}")
    number = whole_number_or_none("bulyan: num_malicious", num_malicious)
    return Rule(configured(_bulyan, num_malicious=number, selection=selection))


RULES: Mapping[str, Callable[..., Aggregator]] = {
    "mean": mean,
    "median": median,
    "trimmed_mean": trimmed_mean,
    "geometric_median": geometric_median,
    "krum": krum,
    "multi_krum": multi_krum,
    "bulyan": bulyan,
    "rlr": rlr,
}


def _krum(log: UpdateLog, num_malicious: int | None) -> dict[str, np.ndarray]:
    nearest = _by_krum(log[-1], num_malicious)[0][:1]
    return averaged(log, nearest, np.ones(len(nearest)))


def _multi_krum(log: UpdateLog, num_malicious: int | None, num_selected: int | None) -> dict[str, np.ndarray]:
    rows, tolerated = _by_krum(log[-1], num_malicious)
    rows = rows[: num_selected or len(rows) - tolerated]
    rows = rows[np.argsort(log[-1].clients[rows])]
    return averaged(log, rows, np.ones(len(rows)))


def _bulyan(log: UpdateLog, num_malicious: int | None, selection: str) -> dict[str, np.ndarray]:
    round_ = log[-1]
    distances = round_.squared_distances  # first: it also computes the norms, which tell who is finite
    rows = rows_of(round_)
    tolerated = tolerated_of(num_malicious, (len(rows) - 3) // 4)
    rows = rows[np.sort(_selected_by_krum(distances[np.ix_(rows, rows)], tolerated, selection))]
    return {
        layer.name: _near_median(round_, layer.name, rows, len(rows) - 2 * tolerated)
        if layer.kind != "buffer"
        else round_.weighted_mean(layer.name, rows, np.ones(len(rows)))
        for layer in log.model.layers
    }


def _selected_by_krum(distances: np.ndarray, tolerated: int, selection: str) -> np.ndarray:
    """Positions of the n - 2 `tolerated` clients that Krum selects, from squared distances [client, client]."""
    count = len(distances) - 2 * tolerated
    if selection == "once":
        return np.argsort(_krum_scores(distances, tolerated), kind="stable")[:count]
    remaining, selected = np.arange(len(distances)), []
    for _ in range(count):
        best = int(np.argmin(_krum_scores(distances[np.ix_(remaining, remaining)], tolerated)))
        selected.append(remaining[best])
        remaining = np.delete(remaining, best)
    return np.array(selected, np.int64)


def _by_krum(round_: Round, num_malicious: int | None) -> tuple[np.ndarray, int]:
    """Positions of the finite clients by ascending Krum score, and how many malicious clients are tolerated."""
    distances = round_.squared_distances  # first: it also computes the norms, which tell who is finite
    rows = rows_of(round_)
    tolerated = tolerated_of(num_malicious, (len(rows) - 3) // 2)
    scores = _krum_scores(distances[np.ix_(rows, rows)], tolerated)
    return rows[np.argsort(scores, kind="stable")], tolerated


def _krum_scores(distances: np.ndarray, tolerated: int) -> np.ndarray:
    """Krum score [client]: sum of the squared distances to the n - `tolerated` - 2 nearest other clients."""
    others = distances.copy()
    np.fill_diagonal(others, np.inf)  # no client is its own neighbor
    neighbors = max(1, len(others) - tolerated - 2) if len(others) > 1 else 0
    return np.sort(others, axis=1)[:, :neighbors].sum(axis=1)


def _near_median(round_: Round, layer: str, rows: np.ndarray, count: int) -> np.ndarray:
    """Mean of the `count` values of each coordinate nearest to these clients' median, float32 [*shape]; 0 without any.

    In ascending order the values nearest to the median form a window; among equally near ones the smaller enters.
    """
    round_.require_whole()
    shape = np.shape(round_.global_model[layer])
    out, columns = np.zeros(int(np.prod(shape)), np.float32), round_.columns(layer)
    for start in range(0, len(out) if len(rows) else 0, kernels.BLOCK):
        stop = min(start + kernels.BLOCK, len(out))
        values = kernels.sorted_columns(columns, rows, start, stop).astype(np.float64)
        middle = (values[:, (len(rows) - 1) // 2] + values[:, len(rows) // 2]) / 2
        first = np.zeros(stop - start, np.int64)
        for place in range(len(rows) - count):  # move the window up while the value that enters it is nearer
            first += middle - values[:, place] > values[:, place + count] - middle
        window = np.take_along_axis(values, first[:, None] + np.arange(count), axis=1)
        out[start:stop] = window.sum(axis=1) / count
    return out.reshape(shape)
