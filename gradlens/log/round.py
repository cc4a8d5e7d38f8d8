"""What the server saw in one round: `Round`."""

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import cast

import numpy as np
from scipy import sparse

from gradlens.errors import CannotSay, InputError
from gradlens.log import kernels
from gradlens.log.kernels import BLOCK, Columns
from gradlens.log.model import first_duplicate
from gradlens.log.sources import (
    ArraySource,
    Judgment,
    LazyLayers,
    Mixing,
    Products,
    Source,
    as_matrix,
    shares_of,
)

OUTLIER_RATIO = 1_000.0  # norm, as a multiple of the cohort's median norm, above which a client is not comparable
PAIRWISE = 5_000  # clients up to which inner products of all pairs are formed
SORTED_BYTES = 256_000_000  # of updates up to which a round's sorted values are kept; above it each use sorts again


@dataclass(frozen=True, eq=False)
class Round:
    """What the server saw in one round: the update of each participant, its local model minus the global model.

    Parameters
    ----------
    index : int
        Number of the round, from 0.
    clients : numpy.ndarray
        str [client], the participants, in no meaningful order.
    num_examples : numpy.ndarray
        int64 [client], what each client claims to have trained on.
    updates : Mapping
        Layer -> [client, *shape], float32 for parameters; or a `Source`.
    global_model : Mapping
        Layer -> [*shape], before the round.
    refused : Mapping
        Client -> why what it sent could not be recorded.
    buffers : tuple of str
        The layers that are never scored.
    moments : Mapping
        Layer -> float64 [client, 4], for each parameter layer that was not recorded in full: the sums of a client's
        numbers, of their squares, cubes and fourth powers. Such a layer's updates are sketches, or are missing.
    started : Mapping
        Client -> index of the round whose global model it started from, where that is an earlier one; its update is
        measured from that model.
    signatures : Mapping
        Client -> what it signed of what it sent (`gradlens.log.signatures`), refused clients included, or in a few
        characters what came in its place; clients of which no signature came are left out.

    Raises
    ------
    InputError
        On unequal lengths, a repeated client, or layers or shapes that differ from the global model's.

    Notes
    -----
    A sketch keeps inner products, but not a layer's own numbers. `flat`, `columns` and `blocks` raise `CannotSay` for a
    layer that was recorded as a sketch, unless the caller says with `sketch=True` that a sketch will do.

    Examples
    --------
    >>> from gradlens.examples import example_log
    >>> round_ = example_log()[-1]
    >>> len(round_), round_.updates["fc2.bias"].shape
    (10, (10, 4))
    >>> round_.clients[round_.norms["fc1.weight"].argmax()].item()
    'client-9'
    """

    index: int
    clients: np.ndarray
    num_examples: np.ndarray
    updates: Mapping[str, np.ndarray]
    global_model: Mapping[str, np.ndarray]
    refused: Mapping[str, str] = field(default_factory=dict)
    buffers: tuple[str, ...] = ()
    moments: Mapping[str, np.ndarray] = field(default_factory=dict)
    started: Mapping[str, int] = field(default_factory=dict)
    signatures: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        clients = np.asarray(self.clients, dtype=np.str_).reshape(-1)
        num_examples = np.asarray(self.num_examples, dtype=np.int64).reshape(-1)
        object.__setattr__(self, "clients", clients)
        object.__setattr__(self, "num_examples", num_examples)
        where = f"round {self.index}"
        if len(num_examples) != len(clients):
            raise InputError(f"{where}: {len(clients)} clients but {len(num_examples)} num_examples")
        if len(np.unique(clients)) < len(clients):
            raise InputError(f"{where}: client {first_duplicate(clients.tolist())!r} appears twice")
        if both := sorted(set(clients.tolist()) & set(self.refused)):
            raise InputError(f"{where}: client {both[0]!r} is both recorded and refused")
        if difference := sorted(set(self.updates) ^ set(self.global_model)):
            raise InputError(f"{where}: layer {difference[0]!r} is not in both the updates and the global model")
        for name, moments in self.moments.items():
            if np.shape(moments) != (len(clients), 4):
                raise InputError(f"{where}: moments of {name!r} must be [client, 4], found {np.shape(moments)}")
        if not isinstance(self.updates, Source):  # a source is checked where it comes from
            arrays = {name: self._read_only(name, array) for name, array in self.updates.items()}
            object.__setattr__(self, "updates", ArraySource.of(arrays))

    def _read_only(self, layer: str, updates: np.ndarray) -> np.ndarray:
        """The updates of a layer in their type, which cannot be written into; raises InputError on a wrong shape."""
        expected, shape = (len(self.clients), *np.shape(self.global_model[layer])), np.shape(updates)
        if shape != expected:
            raise InputError(f"round {self.index}: updates of {layer!r} must have shape {expected}, found {shape}")
        with np.errstate(all="ignore"):  # beyond float32 is infinite, and recorded as such
            array = np.asarray(updates, None if layer in self.buffers else np.float32)[...]
        array.flags.writeable = False
        return array

    def __len__(self) -> int:
        return len(self.clients)

    @property
    def is_whole(self) -> bool:
        """Whether everything that was sent is recorded in full: no layer is sketched or left out."""
        return not self.moments

    def require_whole(self) -> None:
        """Raises InputError unless the round was recorded in full, as aggregation requires."""
        if not self.is_whole:
            raise InputError(
                f"round {self.index} was not recorded in full: nothing can be aggregated from it; "
                "aggregate where the updates are, of the clients that a filter's `decision` keeps"
            )

    @property
    def source(self) -> Source:
        """The updates, together with what can be computed from them without forming arrays."""
        return cast(Source, self.updates)

    def flat(self, layer: str, *, sketch: bool = False) -> np.ndarray:
        """The updates of one layer as a matrix, float32 [client, number].

        Parameters
        ----------
        layer : str
            Its name.
        sketch : bool, default False
            Whether a sketch will do: for what is linear in the updates or rests on inner products.

        Raises
        ------
        CannotSay
            Where the layer was recorded as a sketch and `sketch` is False.
        """
        self._check_recorded(layer, sketch)
        return as_matrix(self.updates[layer])

    def columns(self, layer: str, *, sketch: bool = False) -> Columns:
        """As `flat`, in parts: a function (start, stop) -> those numbers of the layer, [client, number], not copied."""
        self._check_recorded(layer, sketch)
        return self.source.columns(layer)

    def blocks(self, layer: str, size: int = BLOCK, *, sketch: bool = False) -> Iterator[np.ndarray]:
        """As `flat`, in slices [client, at most `size` numbers] that are not copied."""
        columns, numbers = self.columns(layer, sketch=sketch), self._size(layer)
        return (columns(start, min(start + size, numbers)) for start in range(0, numbers, size))

    def _check_recorded(self, layer: str, sketch: bool) -> None:
        if layer in self.moments and not sketch:
            raise CannotSay(
                f"layer {layer!r} was recorded as a sketch of {self._size(layer)} numbers; its own numbers, which are"
                " needed here, were not"
            )

    @cached_property
    def _by_name(self) -> np.ndarray:
        """Positions of the clients in the order of their names."""
        return np.argsort(self.clients)

    @cached_property
    def nbytes(self) -> int:
        """Bytes of all updates of the layers that are scored."""
        return 4 * len(self.clients) * sum(self._size(name) for name in self.parameters)

    def _size(self, layer: str) -> int:
        return math.prod(np.shape(self.global_model[layer]))

    def take(self, selection: np.ndarray) -> "Round":
        """The round of some clients, which are as finite and comparable as they were among all of them.

        Parameters
        ----------
        selection : numpy.ndarray
            A mask, bool [client], or positions, int [chosen].
        """
        positions = np.arange(len(self.clients))[selection]
        judgment = Judgment(self.finite[positions], self.comparable[positions])
        moments = {name: array[positions] for name, array in self.moments.items()}
        clients = self.clients[positions]
        started = {client: start for client, start in self.started.items() if (clients == client).any()}
        return replace(
            self,
            started=started,
            clients=clients,
            num_examples=self.num_examples[positions],
            updates=self.source.take(positions, self._products, judgment),
            moments=moments,
        )

    def only(self, layers: Collection[str]) -> "Round":
        """The round of some layers alone, in the round's order; the others are neither read nor computed."""
        updates = self.source.only(layers)
        state = {name: self.global_model[name] for name in updates}
        buffers = tuple(name for name in self.buffers if name in state)
        moments = {name: array for name, array in self.moments.items() if name in state}
        return replace(self, updates=updates, global_model=state, buffers=buffers, moments=moments)

    def combined(self, matrix: np.ndarray | sparse.csr_array, clients: np.ndarray | None = None) -> "Round":
        """The round whose clients are linear combinations of this round's clients.

        Parameters
        ----------
        matrix : numpy.ndarray or scipy.sparse.csr_array
            float64 [new, client].
        clients : numpy.ndarray, optional
            str [new], the new names; by default the same ones.

        Raises
        ------
        InputError
            On a row without any client, a row with a client that is not finite, fewer or more names than rows, and a
            round that was not recorded in full.

        Notes
        -----
        Combined updates are formed block by block, when they are needed; inner products and weighted means follow from
        those of this round. Buffers and claimed numbers of examples are mixed by the shares of a row (its absolute
        values over their sum), so that a client that is only scaled keeps its own. A mixture started from no round, and
        nobody signed it.
        """
        self.require_whole()
        matrix = sparse.csr_array(matrix, dtype=np.float64, copy=True)
        matrix.eliminate_zeros()
        names = self.clients if clients is None else np.asarray(clients, np.str_)
        where = f"round {self.index}: a combination of clients"
        if matrix.shape != (len(names), len(self.clients)):
            raise InputError(f"{where} is a matrix {(len(names), len(self.clients))}, found {matrix.shape}")
        used = np.isin(np.arange(len(self.clients)), matrix.indices)
        if (np.diff(matrix.indptr) == 0).any() or not self.finite[used].all():
            raise InputError(f"{where} needs a finite client in each row, and none that is not finite")
        shares = shares_of(matrix)
        examples = np.rint(shares @ self.num_examples.astype(np.float64)).astype(np.int64)
        mixing = Mixing(matrix, shares, self._by_name, self.buffers)
        updates = self.source.combine(mixing, self._products)
        return replace(self, clients=names, num_examples=examples, updates=updates, started={}, signatures={})

    @property
    def _products(self) -> Products:
        """What a selection or a combination of this round's clients does not compute again."""
        return Products(self.gram if len(self) <= PAIRWISE else None, self.gram_norms)

    @cached_property
    def parameters(self) -> tuple[str, ...]:
        """Names of the layers that are scored."""
        return tuple(name for name in self.updates if name not in self.buffers)

    @cached_property
    def gram(self) -> Mapping[str, np.ndarray]:
        """Layer -> float64 [client, client], the inner products of all pairs of updates, formed when they are needed.

        Raises
        ------
        CannotSay
            Above 5,000 clients.

        Notes
        -----
        Nothing is centered beforehand, so each entry depends on its two clients alone, whatever a third one sends. For
        a sketched layer the diagonal, too, is that of the sketches; otherwise distances would lose their digits.
        """
        return LazyLayers(self.parameters, self._gram_of)

    def _gram_of(self, layer: str) -> np.ndarray:
        if len(self.clients) > PAIRWISE:
            raise CannotSay(f"{len(self.clients)} clients: nothing pairwise is formed above {PAIRWISE:,}")
        gram, norms = self.source.gram(layer, self._by_name)
        if norms is not None:
            self.gram_norms.give(layer, norms)
        return gram

    @cached_property
    def total_gram(self) -> np.ndarray:
        """float64 [client, client], the inner products of the updates over all parameter layers."""
        return np.sum([self.gram[name] for name in self.parameters], axis=0)

    @cached_property
    def squared_distances(self) -> np.ndarray:
        """float64 [client, client], squared Euclidean distances over all parameter layers.

        Exactly 0 between identical updates; infinite or NaN to a client that is not finite.
        """
        squares = np.diagonal(self.total_gram)
        with np.errstate(invalid="ignore"):
            return np.maximum(squares[:, None] + squares[None, :] - 2 * self.total_gram, 0)

    @cached_property
    def gram_norms(self) -> LazyLayers:
        """Layer -> float64 [client], the norms that belong to `gram`: for a sketched layer, those of the sketches."""
        return LazyLayers(self.parameters, self.source.norms)

    @cached_property
    def norms(self) -> Mapping[str, np.ndarray]:
        """Layer -> float64 [client], the L2 norm of what each client sent, sketched or not."""
        if self.is_whole:
            return self.gram_norms
        return LazyLayers(
            self.parameters,
            lambda name: np.sqrt(self.moments[name][:, 1]) if name in self.moments else self.gram_norms[name],
        )

    @cached_property
    def total_norms(self) -> np.ndarray:
        """float64 [client], the L2 norm of everything each client sent, including layers that were not recorded."""
        squares = [self.norms[name] ** 2 for name in self.parameters]
        squares += [moments[:, 1] for name, moments in self.moments.items() if name not in self.updates]
        return np.sqrt(np.sum(squares, axis=0))

    @cached_property
    def finite(self) -> np.ndarray:
        """bool [client], whether every number that the client sent is finite, buffers included."""
        if self.source.judgment is not None:
            return self.source.judgment.finite
        with np.errstate(all="ignore"):
            finite = np.isfinite(self.total_norms)  # the square of a float32 number is finite in float64
        for name in self.buffers:
            for block in self.blocks(name):
                finite &= np.isfinite(block).all(axis=1)
        return finite

    @cached_property
    def comparable(self) -> np.ndarray:
        """bool [client], whether a client is finite and at most 1,000 times as long as the finite clients' median.

        Every reference (a mean, median, spread or cluster) rests on these clients alone. So a client that sends NaN,
        1e6 or 1e30 changes nobody else's score, and scores +inf itself.
        """
        judgment = self.source.judgment
        if judgment is not None and judgment.comparable is not None:
            return judgment.comparable
        norms = np.where(self.finite, self.total_norms, 0)
        median = np.median(norms[self.finite]) if self.finite.any() else 0.0
        return self.finite & (norms <= OUTLIER_RATIO * median if median > 0 else True)

    @cached_property
    def ordered(self) -> LazyLayers:
        """Layer -> float32 [rank, number], the comparable clients' values of each number in ascending order.

        It takes as much memory as the updates; `forget` frees it.
        """

        def make(layer: str) -> np.ndarray:
            rows = np.flatnonzero(self.comparable)
            return kernels.sorted_columns(self.source.columns(layer), rows, 0, self._size(layer)).T

        return LazyLayers(self.parameters, make)

    @cached_property
    def median(self) -> LazyLayers:
        """Layer -> float32 [*shape], the coordinate-wise median of the comparable clients' updates; 0 without any.

        For a sketched layer it is the median of the sketches: a center among them, not the sketch of the median.
        """
        return LazyLayers(self.parameters, self._trimmed_mean)

    def trimmed_mean(self, layer: str, trimmed: int | None = None, clients: np.ndarray | None = None) -> np.ndarray:
        """Coordinate-wise trimmed mean of a layer's updates, float32 [*shape], summed in float64; 0 without clients.

        Parameters
        ----------
        layer : str
            Its name.
        trimmed : int, optional
            How many of the smallest and of the largest values are left out of each number's mean; by default as many
            as possible, which gives the median.
        clients : numpy.ndarray, optional
            A mask, bool [client], of finite clients; by default the comparable ones.

        Raises
        ------
        InputError
            Where the round was not recorded in full.
        """
        self.require_whole()
        return self._trimmed_mean(layer, trimmed, clients)

    def _trimmed_mean(self, layer: str, trimmed: int | None = None, clients: np.ndarray | None = None) -> np.ndarray:
        clients = self.comparable if clients is None else clients
        rows, shape = self._by_name[clients[self._by_name]], np.shape(self.global_model[layer])
        trimmed = max(0, len(rows) - 1) // 2 if trimmed is None else trimmed
        out = np.zeros(self._size(layer), np.float32)
        if len(rows) <= 2 * trimmed:
            return out.reshape(shape)
        held = self.nbytes <= SORTED_BYTES
        if len(rows) > kernels.NETWORK_ROWS and held and np.array_equal(clients, self.comparable):
            ranks = self.ordered[layer].T
            return kernels.trimmed_mean_of_sorted(lambda start, stop: ranks[start:stop], trimmed, out).reshape(shape)
        return kernels.trimmed_mean(self.source.columns(layer), rows, trimmed, out).reshape(shape)

    def weighted_mean(
        self, layer: str, clients: np.ndarray, weights: np.ndarray, total: float | None = None
    ) -> np.ndarray:
        """Weighted mean of a layer's updates, [*shape], of the layer's own type.

        Parameters
        ----------
        layer : str
            Its name.
        clients : numpy.ndarray
            int [chosen], positions, in the order in which they are summed in float64; without any the mean is 0.
        weights : numpy.ndarray
            float64 [chosen], not all 0.
        total : float, optional
            What the weighted sum is divided by, in place of the sum of the weights, which may then be 0.

        Raises
        ------
        InputError
            Where the round was not recorded in full.
        """
        self.require_whole()
        return self.source.weighted_mean(layer, clients, weights, total)

    def forget(self) -> None:
        """Frees arrays as large as an update, or as all of them; they are computed again when they are needed."""
        self.ordered.forget()
        self.median.forget()
