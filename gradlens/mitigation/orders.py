"""Pruning orders: what clients report of a layer's channels, as ranks or votes, and what the server makes of it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gradlens.errors import InputError

Sent = Mapping[str, Any] | np.ndarray | Sequence[Any]  # client -> what it sent, or [client, channel]

NUM_SHOWN = 5  # channels that a repr names


@dataclass(frozen=True, eq=False)
class PruningOrder:
    """The order in which to prune the channels of a layer, and the clients that it rests on.

    Attributes
    ----------
    order : ndarray of int64 [channel]
        The channel to be pruned first comes first.
    scores : ndarray of float64 [channel]
        The mean rank, or the share of votes against the channel.
    counted : tuple of str
        Clients that the order rests on.
    refused : Mapping of str to str
        Client -> why what it sent was not counted.

    Examples
    --------
    >>> aggregate_ranks({"a": [0, 1, 2], "b": [1, 0, 2], "c": [0, 0, 0]}, num_channels=3)
    PruningOrder(3 channels, first 0, 1, 2; 2 of 3 clients counted)
    """

    order: np.ndarray
    scores: np.ndarray
    counted: tuple[str, ...]
    refused: Mapping[str, str]

    def __repr__(self) -> str:
        first = ", ".join(map(str, self.order[:NUM_SHOWN].tolist())) + (", ..." if len(self.order) > NUM_SHOWN else "")
        clients = f"{len(self.counted)} of {len(self.counted) + len(self.refused)} clients"
        return f"PruningOrder({len(self.order)} channels, first {first}; {clients} counted)"


def ranks_of(activations: np.ndarray) -> np.ndarray:
    """Ranks channels by activation, 0 for the least active.

    Parameters
    ----------
    activations : ndarray of float [..., channel]
        As of `channel_activations`.

    Returns
    -------
    ndarray of int64 [..., channel]
        Among equal activations the first channel comes first.

    Raises
    ------
    InputError
        If a number is not finite.

    Examples
    --------
    >>> ranks_of(np.array([0.3, 0.0, 0.2]))
    array([2, 0, 1])
    """
    finite = _finite(activations)
    return np.argsort(np.argsort(finite, axis=-1, kind="stable"), axis=-1, kind="stable")


def votes_of(activations: np.ndarray, share: float = 0.5) -> np.ndarray:
    """Votes against a share of the channels, the least active ones.

    Parameters
    ----------
    activations : ndarray of float [..., channel]
        As of `channel_activations`.
    share : float
        Above 0 and at most 1; the number of votes is rounded, and at least 1.

    Returns
    -------
    ndarray of int64 [..., channel]
        1 for a vote to prune the channel, else 0.

    Raises
    ------
    InputError
        If the share is out of its range or a number is not finite.

    Examples
    --------
    >>> votes_of(np.array([0.3, 0.0, 0.2, 0.1]))
    array([0, 1, 0, 1])
    """
    ranks = ranks_of(activations)
    return (ranks < _num_votes(share, ranks.shape[-1])).astype(np.int64)


def aggregate_ranks(ranks: Sent, num_channels: int | None = None) -> PruningOrder:
    """Orders channels by the mean of the clients' ranks, the lowest first (rank aggregation, RAP).

    Parameters
    ----------
    ranks : ndarray [client, channel], sequence of rows, or Mapping of client to row
        Each row holds every whole number from 0, the least active channel, to num_channels - 1 once; a client that
        sends anything else is refused with a reason.
    num_channels : int, optional
        Needed unless `ranks` is an array: clients do not decide how many channels there are.

    Returns
    -------
    PruningOrder
        Among equal means the first channel comes first.

    Raises
    ------
    InputError
        If no client can be counted, or `num_channels` is needed.

    Notes
    -----
    As in [1]_. One client moves a mean rank by (num_channels - 1) / clients at most.

    **Fails when** malicious clients report a well-formed order that protects the backdoor's channels (`lied`), which
    cannot be refused.

    References
    ----------
    .. [1] Wu et al. 2020, arXiv:2011.01767.

    Examples
    --------
    >>> aggregate_ranks(np.array([[0, 2, 1], [1, 2, 0], [0, 2, 1]])).order
    array([0, 2, 1])
    """
    rows, width = _rows("ranks", ranks, num_channels)
    everything = np.arange(width)
    sound, refused = _sorted_out(
        rows, width, lambda row: "" if np.array_equal(np.sort(row), everything) else f"no order of 0 to {width - 1}"
    )
    scores = _mean("ranks", sound, refused)
    return PruningOrder(np.argsort(scores, kind="stable"), scores, tuple(sound), refused)


def aggregate_votes(votes: Sent, num_channels: int | None = None, share: float | None = None) -> PruningOrder:
    """Orders channels by the number of votes against them, the most first (majority voting, MVP).

    Parameters
    ----------
    votes : ndarray [client, channel], sequence of rows, or Mapping of client to row
        Of 0 and 1; a client that sends anything else is refused with a reason.
    num_channels : int, optional
        As for `aggregate_ranks`.
    share : float, optional
        If given, a client that votes against any other share of the channels is refused as well.

    Returns
    -------
    PruningOrder
        Among equal numbers of votes, which are common, the first channel comes first.

    Raises
    ------
    InputError
        If no client can be counted, `num_channels` is needed, or the share is out of its range.

    Notes
    -----
    As in [1]_.

    **Fails when** malicious clients cast well-formed votes that protect the backdoor's channels (`lied`), which cannot
    be refused.

    References
    ----------
    .. [1] Wu et al. 2020, arXiv:2011.01767.

    Examples
    --------
    >>> aggregate_votes(np.array([[1, 0, 0], [1, 0, 1], [1, 0, 1]])).order
    array([0, 2, 1])
    """
    rows, width = _rows("votes", votes, num_channels)
    wanted = None if share is None else _num_votes(share, width)

    def problem(row: np.ndarray) -> str:
        if not np.isin(row, (0, 1)).all():
            return "expected 0 and 1 only"
        cast = int(row.sum())
        return "" if wanted in (None, cast) else f"expected {wanted} votes, found {cast}"

    sound, refused = _sorted_out(rows, width, problem)
    scores = _mean("votes", sound, refused)
    return PruningOrder(np.argsort(-scores, kind="stable"), scores, tuple(sound), refused)


def lied(activations: np.ndarray, liars: Sequence[int], protected: Sequence[int] | None = None) -> np.ndarray:
    """What clients report of their activations if some of them lie.

    Parameters
    ----------
    activations : ndarray of float [client, channel]
        What they measure.
    liars : sequence of int
        Rows of the clients that lie.
    protected : sequence of int, optional
        Channels that a liar reports as its most active ones, the rest as they are: for a backdoor in channels that
        clean data leave quiet, see `trigger_channels`. None: it reports the reverse order.

    Returns
    -------
    ndarray of float64 [client, channel]
        A new array. The ranks or votes that follow from it are well-formed: they cannot be refused.

    Examples
    --------
    >>> ranks_of(lied(np.array([[0.1, 0.2, 0.3], [0.1, 0.2, 0.3]]), liars=[1], protected=[0]))
    array([[0, 1, 2],
           [2, 0, 1]])
    """
    reported = _finite(activations).copy()
    for row in liars:
        if protected is None:
            reported[row] = -reported[row]
        else:
            reported[row, list(protected)] += 1 + np.ptp(reported[row])
    return reported


def trigger_channels(clean: np.ndarray, triggered: np.ndarray, count: int) -> np.ndarray:
    """The channels whose activation a trigger raises most.

    Parameters
    ----------
    clean, triggered : ndarray of float [channel]
        Activations without and with the trigger.
    count : int
        How many channels.

    Returns
    -------
    ndarray of int64 [count]
        In ascending order.

    Examples
    --------
    >>> trigger_channels(np.array([0.1, 0.0, 0.2]), np.array([0.1, 0.9, 0.4]), count=2)
    array([1, 2])
    """
    return np.sort(np.argsort(_finite(clean) - _finite(triggered), kind="stable")[:count])


def _finite(activations: Any) -> np.ndarray:
    values = np.asarray(activations, dtype=np.float64)
    if not np.isfinite(values).all():
        where = tuple(np.argwhere(~np.isfinite(values))[0].tolist())
        raise InputError(f"activations: expected finite numbers, found {values[where]} at {list(where)}")
    return values


def _num_votes(share: float, width: int) -> int:
    if not 0 < share <= 1:
        raise InputError(f"share is above 0 and at most 1, found {share}")
    return max(1, int(np.floor(share * width + 0.5)))


def _rows(name: str, sent: Sent, num_channels: int | None) -> tuple[dict[str, Any], int]:
    """What each client sent, and how many channels there are."""
    if isinstance(sent, Mapping):
        if num_channels is None:
            raise InputError(f"{name}: rows of named clients need num_channels, found None")
        return {str(client): row for client, row in sent.items()}, num_channels
    rows = {str(number): row for number, row in enumerate(sent)}
    if num_channels is not None:
        return rows, num_channels
    if not isinstance(sent, np.ndarray) or sent.ndim != 2:
        raise InputError(f"{name}: expected an array [client, channel], or num_channels for rows of any length")
    return rows, sent.shape[1]


def _sorted_out(
    rows: Mapping[str, Any], width: int, problem: Callable[[np.ndarray], str]
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The rows that can be counted, client -> float64 [channel], and why the others cannot, client -> reason."""
    sound, refused = {}, {}
    for client, sent in rows.items():
        row = _numbers(sent)
        if row is None:
            refused[client] = "expected numbers, found " + ("nothing" if sent is None else type(sent).__name__)
        elif row.shape != (width,):
            refused[client] = f"expected {width} channels, found the shape {row.shape}"
        elif not np.isfinite(row).all():
            refused[client] = f"channel {int(np.flatnonzero(~np.isfinite(row))[0])} is not finite"
        elif reason := problem(row):
            refused[client] = reason
        else:
            sound[client] = row
    return sound, refused


def _numbers(sent: Any) -> np.ndarray | None:
    """What a client sent as float64, None unless it is an array of real numbers; text is not read as numbers."""
    try:
        row = np.asarray(sent)
    except (ValueError, TypeError):  # rows of several lengths
        return None
    return row.astype(np.float64) if row.dtype.kind in "biuf" else None


def _mean(name: str, sound: Mapping[str, np.ndarray], refused: Mapping[str, str]) -> np.ndarray:
    if not sound:
        why = "; ".join(f"{client}: {reason}" for client, reason in list(refused.items())[:3])
        raise InputError(f"{name}: no client's can be counted" + (f" ({why})" if why else ": no client sent any"))
    return np.mean(list(sound.values()), axis=0)
