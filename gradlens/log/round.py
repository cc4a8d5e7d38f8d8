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

OUTLIER_RATIO = 1_000.0  # a client this many times as long as the cohort's median update is no reference for anybody
PAIRWISE = 5_000  # clients up to which inner products of all pairs are formed
SORTED_BYTES = 256_000_000  # of a round's numbers that are kept in ascending order; above it each use sorts anew


@dataclass(frozen=True, eq=False)
class Round:
    """What the server saw in one round: each participant's update = its local model - the global model.

    Parameters
    ----------
    index : int
        Number of the round, from 0.
    clients : numpy.ndarray
        str [client], the participants, in no meaningful order.
    num_examples : numpy.ndarray
        int64 [client], what each client claims to have trained on.
    updates : Mapping
        Layer -> [client, *shape], float32 for parameters.
    global_model : Mapping
        Layer -> [*shape], before the round.
    refused : Mapping
        Client -> why what it sent could not be recorded.
    buffers : tuple of str
        The layers that are never scored.
    moments : Mapping
        Layer -> float64 [client, 4], for each parameter layer that was not recorded in full: the sums of a client's
        numbers, of their squares, cubes and fourth powers. Such a layer's updates are sketches, or are missing.

    Raises
    ------
    InputError
        On unequal lengths, a repeated client, or layers or shapes that differ from the model's.

    Notes
    -----
    Sketches keep inner products. A method with the keyword `sketch` answers from a sketch where it is True, and raises
    `CannotSay` where it is False (the default) and the layer's own numbers were not recorded.

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
        if not hasattr(self.updates, "columns"):  # a source was checked where it comes from
            object.__setattr__(self, "updates", ArraySource.of(self._checked(self.updates)))

    def _checked(self, updates: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The updates as arrays of the right shapes that nobody writes into."""
        checked = {}
        for name, sent in updates.items():
            expected = (len(self.clients), *np.shape(self.global_model[name]))
            if np.shape(sent) != expected:
                raise InputError(
                    f"round {self.index}: updates of {name!r} must have shape {expected}, found {np.shape(sent)}"
                )
            with np.errstate(all="ignore"):  # beyond float32 is infinite, and recorded as such
                array = np.asarray(sent, None if name in self.buffers else np.float32)[...]
            array.flags.writeable = False
            checked[name] = array
        return checked

    def __len__(self) -> int:
        return len(self.clients)

    @property
    def is_whole(self) -> bool:
        """Whether all that was sent is recorded with its own numbers: nothing is sketched, or left out."""
        return not self.moments

    def require_whole(self) -> None:
        """Raises InputError unless the round is whole: what is to be aggregated."""
        if not self.is_whole:
            raise InputError(
                f"round {self.index} was recorded without all of its numbers: nothing can be aggregated from it; "
                "aggregate where the updates are, a filter's `decision` says whose"
            )

    @property
    def source(self) -> Source:
        """The updates, with what can be computed of them without forming arrays."""
        return cast(Source, self.updates)

    def flat(self, layer: str, *, sketch: bool = False) -> np.ndarray:
        """The updates of one layer as a matrix [client, number]."""
        self._check_recorded(layer, sketch)
        return as_matrix(self.updates[layer])

    def columns(self, layer: str, *, sketch: bool = False) -> Columns:
        """The function (start, stop) -> these numbers of the layer, [client, number], without copying the layer."""
        self._check_recorded(layer, sketch)
        return self.source.columns(layer)

    def blocks(self, layer: str, size: int = BLOCK, *, sketch: bool = False) -> Iterator[np.ndarray]:
        """The updates of one layer in slices [client, at most `size` numbers], without copying the layer."""
        columns, numbers = self.columns(layer, sketch=sketch), self._size(layer)
        return (columns(start, min(start + size, numbers)) for start in range(0, numbers, size))

    def _check_recorded(self, layer: str, sketch: bool) -> None:
        if layer in self.moments and not sketch:
            raise CannotSay(
                f"layer {layer!r} was recorded as a sketch of {self._size(layer)} numbers; what needs its own numbers"
                " cannot be asked of it"
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
        """The round of some clients, judged as they were among all; nothing is computed again.

        Parameters
        ----------
        selection : numpy.ndarray
            A mask, bool [client], or positions, int [chosen].
        """
        positions = np.arange(len(self.clients))[selection]
        judgment = Judgment(self.finite[positions], self.comparable[positions])
        moments = {name: array[positions] for name, array in self.moments.items()}
        return replace(
            self,
            clients=self.clients[positions],
            num_examples=self.num_examples[positions],
            updates=self.source.take(positions, self._products, judgment),
            moments=moments,
        )

    def only(self, layers: Collection[str]) -> "Round":
        """The round of these layers alone, in its own order; nothing is computed or read of the others."""
        updates = self.source.only(layers)
        state = {name: self.global_model[name] for name in updates}
        buffers = tuple(name for name in self.buffers if name in state)
        moments = {name: array for name, array in self.moments.items() if name in state}
        return replace(self, updates=updates, global_model=state, buffers=buffers, moments=moments)

    def combined(self, matrix: np.ndarray | sparse.csr_array, clients: np.ndarray | None = None) -> "Round":
        """The round whose clients are linear combinations of these; numbers are formed in blocks, when needed.

        Inner products and weighted means follow from those of this round. Buffers and claims of examples are mixed by
        the row's shares (its absolute values over their sum), so that a client that is only scaled keeps its own.

        Parameters
        ----------
        matrix : numpy.ndarray or scipy.sparse.csr_array
            float64 [new, client].
        clients : numpy.ndarray, optional
            str [new], the new names; by default the same ones.

        Raises
        ------
        InputError
            On a row without any client, on one that uses a client that is not finite, where there are not as many
            names as rows, and where the round was not recorded in full.
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
        return replace(self, clients=names, num_examples=examples, updates=updates)

    @property
    def _products(self) -> Products:
        """What a selection or a combination of these clients need not compute again."""
        return Products(self.gram if len(self) <= PAIRWISE else None, self.gram_norms)

    @cached_property
    def parameters(self) -> tuple[str, ...]:
        """Names of the layers that are scored."""
        return tuple(name for name in self.updates if name not in self.buffers)

    @cached_property
    def gram(self) -> Mapping[str, np.ndarray]:
        """Layer -> float64 [client, client]: inner products of the updates, formed layer by layer when asked.

        Of a sketched layer all of them are those of the sketches, so that distances keep their digits. Nothing is
        centred beforehand: each entry rests on its two clients alone, whatever a third one sends. Raises
        CannotSay above 5,000 clients.
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
        """Float64 [client, client]: inner products of the whole updates, all parameters together."""
        return np.sum([self.gram[name] for name in self.parameters], axis=0)

    @cached_property
    def squared_distances(self) -> np.ndarray:
        """Float64 [client, client]: squared Euclidean distances of the whole updates; inf or NaN to who is not finite.

        Exactly 0 between equal updates.
        """
        squares = np.diagonal(self.total_gram)
        with np.errstate(invalid="ignore"):
            return np.maximum(squares[:, None] + squares[None, :] - 2 * self.total_gram, 0)

    @cached_property
    def gram_norms(self) -> LazyLayers:
        """Layer -> float64 [client]: the norms that belong to `gram`, of a sketched layer those of the sketches."""
        return LazyLayers(self.parameters, self.source.norms)

    @cached_property
    def norms(self) -> Mapping[str, np.ndarray]:
        """Layer -> float64 [client]: L2 norm of what each client sent, sketched or not; rests on that client alone."""
        if self.is_whole:
            return self.gram_norms
        return LazyLayers(
            self.parameters,
            lambda name: np.sqrt(self.moments[name][:, 1]) if name in self.moments else self.gram_norms[name],
        )

    @cached_property
    def total_norms(self) -> np.ndarray:
        """Float64 [client]: L2 norm of the whole update, of layers that were not recorded, too."""
        squares = [self.norms[name] ** 2 for name in self.parameters]
        squares += [moments[:, 1] for name, moments in self.moments.items() if name not in self.updates]
        return np.sqrt(np.sum(squares, axis=0))

    @cached_property
    def finite(self) -> np.ndarray:
        """Bool [client]: every number that the client sent, buffers included, is finite."""
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
        """Bool [client]: finite, and of a norm of at most 1,000 times the median norm of the finite clients.

        Every reference (a mean, median, spread or cluster) rests on these clients alone, so one that sends
        NaN, 1e6 or 1e30 changes nobody else's score; it scores +inf itself.
        """
        judgment = self.source.judgment
        if judgment is not None and judgment.comparable is not None:
            return judgment.comparable
        norms = np.where(self.finite, self.total_norms, 0)
        median = np.median(norms[self.finite]) if self.finite.any() else 0.0
        return self.finite & (norms <= OUTLIER_RATIO * median if median > 0 else True)

    @cached_property
    def ordered(self) -> LazyLayers:
        """Layer -> float32 [rank, number]: the comparable clients' values of each number in ascending order.

        As large as the updates: `forget` gives the memory back.
        """

        def make(layer: str) -> np.ndarray:
            rows = np.flatnonzero(self.comparable)
            return kernels.sorted_columns(self.source.columns(layer), rows, 0, self._size(layer)).T

        return LazyLayers(self.parameters, make)

    @cached_property
    def median(self) -> LazyLayers:
        """Layer -> float32 [*shape]: coordinate-wise median of the comparable clients' updates, 0 without any.

        Of a sketched layer the median of the sketches: a centre among them, not the sketch of the median.
        """
        return LazyLayers(self.parameters, self._trimmed_mean)

    def trimmed_mean(self, layer: str, trimmed: int | None = None, clients: np.ndarray | None = None) -> np.ndarray:
        """Float32 [*shape]: mean of each number without its `trimmed` smallest and largest values, summed in float64.

        trimmed: None, as many as possible: the median; clients: a mask [client] of finite ones, None: the comparable
        ones. 0 without clients. Many clients are sorted once for all who ask while that takes less than 256 MB.
        Raises InputError where the round is not whole, as do the means by weights.
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
        """Gives back the memory of what is as large as an update, or as all of them; it can be computed again."""
        self.ordered.forget()
        self.median.forget()
