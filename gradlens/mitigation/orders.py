"""What clients send of a model's channels, ranks or votes, and what the server makes of it: `PruningOrder`."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gradlens.errors import InputError

Sent = Mapping[str, Any] | np.ndarray | Sequence[Any]  # client -> what it sent, or [client, channel]

SHOWN = 5  # channels that a repr names


@dataclass(frozen=True, eq=False)
class PruningOrder:
    """In which order to prune the channels of a layer, and whose word it rests on.

    order: int64 [channel], the first to go first. scores: float64 [channel], the mean rank, or the share of votes
    against it. counted: the clients that it rests on; refused: client -> why what it sent was not counted.
    """

    order: np.ndarray
    scores: np.ndarray
    counted: tuple[str, ...]
    refused: Mapping[str, str]

    def __repr__(self) -> str:
        first = ", ".join(map(str, self.order[:SHOWN].tolist())) + (", ..." if len(self.order) > SHOWN else "")
        clients = f"{len(self.counted)} of {len(self.counted) + len(self.refused)} clients"
        return f"PruningOrder({len(self.order)} channels, first {first}; {clients} counted)"


def ranks_of(activations: np.ndarray) -> np.ndarray:
    """Ranks of channels by activation, 0 the least active: float [..., channel] -> int64 [..., channel].

    Of equal ones the first channel comes first. Raises InputError on a number that is not finite.
    """
    found = _finite(activations)
    return np.argsort(np.argsort(found, axis=-1, kind="stable"), axis=-1, kind="stable")


def votes_of(activations: np.ndarray, share: float = 0.5) -> np.ndarray:
    """Votes against the least active channels, a share of them: float [..., channel] -> int64 0 or 1, same shape.

    share: above 0 and at most 1; the count is rounded, and one vote at least. Raises InputError on a share out of its
    range or a number that is not finite.
    """
    ranks = ranks_of(activations)
    return (ranks < _num_votes(share, ranks.shape[-1])).astype(np.int64)


def aggregate_ranks(ranks: Sent, num_channels: int | None = None) -> PruningOrder:
    """Rank aggregation (RAP): channels by the mean of the clients' ranks, the lowest first.

    ranks: [client, channel] or client -> [channel], 0 the least active; whoever sends anything but each of 0, 1, ...,
    num_channels - 1 once is refused with a reason, so that a client moves a mean by (num_channels - 1) / clients at
    most. num_channels: needed where clients are named, for who sends is not asked how many there are. Of equal means
    the first channel comes first. Raises InputError where nobody is left. Source: Wu et al. 2020, arXiv:2011.01767.
    """
    rows, width = _rows("ranks", ranks, num_channels)
    everything = np.arange(width)
    sound, refused = _sorted_out(
        rows, width, lambda row: "" if np.array_equal(np.sort(row), everything) else f"no order of 0 to {width - 1}"
    )
    scores = _mean("ranks", sound, refused)
    return PruningOrder(np.argsort(scores, kind="stable"), scores, tuple(sound), refused)


def aggregate_votes(votes: Sent, num_channels: int | None = None, share: float | None = None) -> PruningOrder:
    """Majority voting (MVP): channels by the number of votes against them, the most first.

    votes: [client, channel] or client -> [channel] of 0 and 1; anything else is refused with a reason, and so is
    another number of votes than `share` of the channels where that is given. num_channels: as of `aggregate_ranks`.
    Of equal counts, which are common, the first channel comes first. Raises InputError where nobody is left.
    Source: Wu et al. 2020, arXiv:2011.01767.
    """
    rows, width = _rows("votes", votes, num_channels)
    wanted = None if share is None else _num_votes(share, width)

    def problem(row: np.ndarray) -> str:
        if not np.isin(row, (0, 1)).all():
            return "expected 0 and 1 only"
        given = int(row.sum())
        return "" if wanted in (None, given) else f"expected {wanted} votes, found {given}"

    sound, refused = _sorted_out(rows, width, problem)
    scores = _mean("votes", sound, refused)
    return PruningOrder(np.argsort(-scores, kind="stable"), scores, tuple(sound), refused)


def lied(activations: np.ndarray, liars: Sequence[int], protected: Sequence[int] | None = None) -> np.ndarray:
    """What clients report of their activations if some lie: float64 [client, channel], as a new array.

    liars: rows. protected: channels that a liar reports as its most active ones, the rest as they are (for a backdoor
    in channels that clean data leave quiet, see `trigger_channels`); None: it reports the reverse order. What follows
    from such a report is a well-formed row of ranks or votes: it cannot be refused.
    """
    reported = _finite(activations).copy()
    for row in liars:
        if protected is None:
            reported[row] = -reported[row]
        else:
            chosen = list(protected)
            reported[row, chosen] += 1 + np.ptp(reported[row])
    return reported


def trigger_channels(clean: np.ndarray, triggered: np.ndarray, count: int) -> np.ndarray:
    """The `count` channels that a trigger raises most: activations [channel] without and with it -> int64, sorted."""
    return np.sort(np.argsort(_finite(clean) - _finite(triggered), kind="stable")[:count])


def _finite(activations: Any) -> np.ndarray:
    found = np.asarray(activations, dtype=np.float64)
    if not np.isfinite(found).all():
        where = tuple(np.argwhere(~np.isfinite(found))[0].tolist())
        raise InputError(f"activations: expected finite numbers, found {found[where]} at {list(where)}")
    return found


def _num_votes(share: float, width: int) -> int:
    if not 0 < share <= 1:
        raise InputError(f"share is above 0 and at most 1, found {share}")
    return max(1, int(np.floor(share * width + 0.5)))


def _rows(name: str, sent: Sent, num_channels: int | None) -> tuple[dict[str, Any], int]:
    """What each client sent, and how many channels there are."""
    if isinstance(sent, Mapping):
        if num_channels is None:
            raise InputError(f"{name}: of named clients num_channels is needed: they are not asked how many there are")
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
    """What can be counted, client -> float64 [channel], and why the rest cannot."""
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
    """What a client sent as float64, None where it is no array of real numbers; its text is not taken for numbers."""
    try:
        found = np.asarray(sent)
    except (ValueError, TypeError):  # rows of several lengths
        return None
    return found.astype(np.float64) if found.dtype.kind in "biuf" else None


def _mean(name: str, sound: Mapping[str, np.ndarray], refused: Mapping[str, str]) -> np.ndarray:
    if not sound:
        why = "; ".join(f"{client}: {reason}" for client, reason in list(refused.items())[:3])
        raise InputError(f"{name}: nobody's can be counted" + (f" ({why})" if why else ": nobody sent any"))
    return np.mean(list(sound.values()), axis=0)
