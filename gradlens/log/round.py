"""What the server saw in one round: `Round`."""

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Self

import numpy as np
from scipy import sparse

from gradlens.errors import CannotSay, InputError
from gradlens.log import kernels
from gradlens.log.kernels import BLOCK, Columns
from gradlens.log.model import Layer, ModelSpec, first_duplicate
from gradlens.log.sources import Combination, LazyLayers, shares_of

GROSS = 1_000.0  # a client whose update is this many times the cohort's median norm is no reference for anybody
PAIRWISE = 5_000  # clients up to which inner products of all pairs are formed
ORDERED = 256_000_000  # bytes of a round's numbers that are held in ascending order; above it each use sorts anew
TWINS = 1e-9  # share of their squares by which the inner products of equal updates may differ


@dataclass(frozen=True, eq=False)
class Round:
    """What the server saw in one round: each participant's update = its local model - the global model.

    clients: str [client], in no meaningful order; num_examples: int64 [client], a claim;
    updates: layer -> [client, *shape], float32 for parameters; global_model: layer -> [*shape], before the round;
    refused: client -> why what it sent could not be recorded; buffers: the layers that are never scored.
    moments: layer -> float64 [client, 4], of each parameter layer that was not recorded whole, the sums of a client's
    numbers, of their squares, cubes and fourth powers. Its updates and global model are sketches, or it has none: what
    is linear in the updates asks for `linear`, what needs a layer's own numbers is told that there are none.
    Raises InputError on unequal lengths, a repeated client, and layers or shapes that differ from the model's.
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
        if not isinstance(self.updates, LazyLayers):  # those were checked where they come from
            object.__setattr__(self, "updates", self._checked(self.updates))

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

    @classmethod
    def collect(
        cls,
        index: int,
        model: ModelSpec,
        global_model: Mapping[str, np.ndarray],
        sent: Mapping[str, Mapping[str, np.ndarray] | None],
        num_examples: Mapping[str, Any],
    ) -> Self:
        """The round made of what clients sent, client -> (layer -> update); never raises because of a client.

        What cannot be a row (nothing, a layer missing, unknown or of another shape, a claim of examples that is
        no count) goes to `refused` with the reason; non-finite numbers are recorded: they are evidence.
        """
        reasons = {c: _refusal(model, c, sent[c], num_examples.get(c)) for c in sent}
        clients = [client for client, reason in reasons.items() if not reason]
        updates = {}
        for layer in model.layers:
            rows = np.zeros((len(clients), *layer.shape), layer.dtype)
            for position, client in enumerate(clients):
                with np.errstate(all="ignore"):
                    rows[position] = np.asarray(sent[client][layer.name])  # type: ignore[index]
            updates[layer.name] = rows
        counts = np.array([int(num_examples[c]) for c in clients], dtype=np.int64)
        refused = {client: reason for client, reason in reasons.items() if reason}
        names = np.array(clients, dtype=np.str_)
        return cls(index, names, counts, updates, global_model, refused, model.buffers)

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

    def flat(self, layer: str) -> np.ndarray:
        """The updates of one layer as a matrix [client, number]; raises CannotSay where it is a sketch."""
        self._own_numbers(layer)
        return _as_matrix(self.updates[layer])

    def linear_flat(self, layer: str) -> np.ndarray:
        """As `flat`, for what is linear in the updates or rests on inner products: of a sketch its numbers."""
        return _as_matrix(self.updates[layer])

    def columns(self, layer: str) -> Columns:
        """The function (start, stop) -> these numbers of the layer, [client, number], without copying the layer.

        Raises CannotSay where the layer was recorded as a sketch.
        """
        self._own_numbers(layer)
        return self.linear(layer)

    def _own_numbers(self, layer: str) -> None:
        if layer in self.moments:
            raise CannotSay(
                f"layer {layer!r} was recorded as a sketch of {self._size(layer)} numbers; what needs its own numbers"
                " cannot be asked of it"
            )

    def linear(self, layer: str) -> Columns:
        """As `columns`, for what is linear in the updates or rests on inner products (`linear_flat`)."""
        updates = self.updates
        if isinstance(updates, LazyLayers) and updates.combination is not None:
            return updates.combination.columns(layer, layer in self.buffers)
        pieces = updates.pieces(layer) if isinstance(updates, LazyLayers) else [updates[layer]]
        matrices = [_as_matrix(piece) for piece in pieces]
        if len(matrices) == 1:
            return lambda start, stop: matrices[0][:, start:stop]
        return lambda start, stop: np.concatenate([matrix[:, start:stop] for matrix in matrices])

    def blocks(self, layer: str, size: int = BLOCK) -> Iterator[np.ndarray]:
        """The updates of one layer in slices [client, at most `size` numbers], without copying the layer."""
        return self._slices(self.columns(layer), self._size(layer), size)

    def linear_blocks(self, layer: str, size: int = BLOCK) -> Iterator[np.ndarray]:
        """As `blocks`, for what is linear in the updates or rests on inner products (`linear_flat`)."""
        return self._slices(self.linear(layer), self._size(layer), size)

    @staticmethod
    def _slices(columns: Columns, numbers: int, size: int) -> Iterator[np.ndarray]:
        return (columns(start, min(start + size, numbers)) for start in range(0, numbers, size))

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
        """The round of the clients in a mask [client] or a list of positions; nothing is computed again."""
        positions = np.arange(len(self.clients))[selection]
        updates = LazyLayers(tuple(self.updates), lambda name: self.updates[name][positions], keep=False)
        if isinstance(self.updates, LazyLayers) and self.updates.combination is not None:
            updates = self.updates.combination.rows(positions).layers(tuple(self.updates))
        moments = {name: array[positions] for name, array in self.moments.items()}
        names, examples = self.clients[positions], self.num_examples[positions]
        part = replace(self, clients=names, num_examples=examples, updates=updates, moments=moments)
        if len(self) <= PAIRWISE:  # of more clients there is no Gram to take a part of, but of few of them there can be
            pairs = np.ix_(positions, positions)
            part.__dict__["gram"] = LazyLayers(self.parameters, lambda name: self.gram[name][pairs])
        part.__dict__["linear_norms"] = LazyLayers(self.parameters, lambda name: self.linear_norms[name][positions])
        part.__dict__["finite"] = self.finite[positions]
        part.__dict__["comparable"] = self.comparable[positions]  # beside all of them, as they were judged
        return part

    def only(self, layers: Collection[str]) -> "Round":
        """The round of these layers alone, in its own order; nothing is computed or read of the others."""
        names = [name for name in self.updates if name in layers]
        updates = LazyLayers(names, lambda name: self.updates[name], keep=False)
        if isinstance(self.updates, LazyLayers):
            updates.pieces, updates.combination = self.updates.pieces, self.updates.combination
        state = {name: self.global_model[name] for name in names}
        buffers = tuple(name for name in self.buffers if name in names)
        moments = {name: array for name, array in self.moments.items() if name in names}
        return replace(self, updates=updates, global_model=state, buffers=buffers, moments=moments)

    def combined(self, matrix: np.ndarray | sparse.csr_array, clients: np.ndarray | None = None) -> "Round":
        """The round whose clients are linear combinations of these; only who asks for numbers forms them, in blocks.

        matrix: float64 [new, client]; clients: the new names, str [new], None: the same ones. Inner products and
        weighted means follow from those of this round. Buffers, and claims of examples, are mixed by the row's shares
        (its absolute values, over their sum): a client that is scaled keeps its own.
        Raises: InputError on a row without any client, on one that uses a client that is not finite, where there
        are not as many names as rows, and where the round is not whole.
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
        past = self.updates.combination if isinstance(self.updates, LazyLayers) else None
        base, whole = (self, matrix) if past is None else (past.base, sparse.csr_array(matrix @ past.matrix))
        shares = shares_of(matrix) if past is None else sparse.csr_array(shares_of(matrix) @ past.shares)
        mixed = Combination.of(base, whole, shares)
        examples = np.rint(shares_of(matrix) @ self.num_examples.astype(np.float64)).astype(np.int64)
        round_ = replace(self, clients=names, num_examples=examples, updates=mixed.layers(tuple(self.updates)))
        round_.__dict__["finite"] = np.ones(len(names), dtype=bool)
        if len(base) <= PAIRWISE:
            round_.__dict__["gram"] = LazyLayers(self.parameters, mixed.gram)
        round_.__dict__["linear_norms"] = LazyLayers(self.parameters, mixed.norms)
        return round_

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
        gram, squares = kernels.gram(self.linear(layer), self._by_name, self._size(layer))
        self.linear_norms.give(layer, np.sqrt(squares))
        return self._with_equal_entries(gram, layer)

    def _with_equal_entries(self, gram: np.ndarray, layer: str) -> np.ndarray:
        """Equal updates get equal entries, whose last digits else hang on where a client stands."""
        squares = np.diagonal(gram)
        with np.errstate(invalid="ignore"):  # of clients that are not finite
            near = np.abs(gram - squares[:, None]) <= TWINS * squares[:, None]
        near &= near.T
        done = np.zeros(len(gram), dtype=bool)
        for client in np.flatnonzero(near.sum(axis=1) > 1):
            for other in np.flatnonzero(near[client] & ~done):
                if other > client and all(np.array_equal(b[client], b[other]) for b in self.linear_blocks(layer)):
                    gram[other], done[other] = gram[client], True
                    gram[:, other] = gram[:, client]
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
    def linear_norms(self) -> LazyLayers:
        """Layer -> float64 [client]: the norms that belong to `gram`, of a sketched layer those of the sketches."""
        return LazyLayers(
            self.parameters,
            lambda name: np.sqrt(kernels.squares(self.linear(name), len(self.clients), self._size(name))),
        )

    @cached_property
    def norms(self) -> Mapping[str, np.ndarray]:
        """Layer -> float64 [client]: L2 norm of what each client sent, sketched or not; rests on that client alone."""
        if self.is_whole:
            return self.linear_norms
        return LazyLayers(
            self.parameters,
            lambda name: np.sqrt(self.moments[name][:, 1]) if name in self.moments else self.linear_norms[name],
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
        norms = np.where(self.finite, self.total_norms, 0)
        median = np.median(norms[self.finite]) if self.finite.any() else 0.0
        return self.finite & (norms <= GROSS * median if median > 0 else True)

    @cached_property
    def ordered(self) -> Mapping[str, np.ndarray]:
        """Layer -> float32 [rank, number]: the comparable clients' values of each number in ascending order.

        As large as the updates: `forget` gives the memory back.
        """

        def make(layer: str) -> np.ndarray:
            rows = np.flatnonzero(self.comparable)
            return kernels.sorted_columns(self.linear(layer), rows, 0, self._size(layer)).T

        return LazyLayers(self.parameters, make)

    @cached_property
    def median(self) -> Mapping[str, np.ndarray]:
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
        held = self.nbytes <= ORDERED
        if len(rows) > kernels.NETWORK and held and np.array_equal(clients, self.comparable):
            ranks = self.ordered[layer].T
            return kernels.middle_mean_of_sorted(lambda start, stop: ranks[start:stop], trimmed, out).reshape(shape)
        return kernels.middle_mean(self.linear(layer), rows, trimmed, out).reshape(shape)

    def weighted_mean(self, layer: str, clients: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """Mean of the updates of the clients at these positions, [*shape] of the layer's own type.

        Summed in float64 in this order, integers rounded; 0 without clients. weights: float64 [client], not all 0.
        """
        self.require_whole()
        if isinstance(self.updates, LazyLayers) and self.updates.combination is not None and len(clients):
            return self.updates.combination.weighted_mean(layer, layer in self.buffers, clients, weights)
        shape, dtype = np.shape(self.global_model[layer]), np.dtype(np.float32)
        out = np.zeros(self._size(layer), self.updates[layer].dtype if layer in self.buffers else dtype)
        if len(clients):
            kernels.weighted_mean(self.columns(layer), clients, weights, out)
        return out.reshape(shape)

    def weighted_sum(self, layer: str, clients: np.ndarray, weights: np.ndarray, total: float) -> np.ndarray:
        """As `weighted_mean`, divided by `total` in place of the weights' own sum, which may then be 0."""
        self.require_whole()
        dtype = self.updates[layer].dtype if layer in self.buffers else np.dtype(np.float32)
        out = np.zeros(self._size(layer), dtype)
        if len(clients):
            kernels.weighted_mean(self.columns(layer), clients, weights, out, total)
        return out.reshape(np.shape(self.global_model[layer]))

    def forget(self) -> None:
        """Gives back the memory of what is as large as an update, or as all of them, and can be found again."""
        for found in ("ordered", "median"):
            self.__dict__.pop(found, None)


def _as_matrix(array: np.ndarray) -> np.ndarray:
    return array.reshape(len(array), math.prod(array.shape[1:]))


def _refusal(model: ModelSpec, client: str, sent: Mapping[str, np.ndarray] | None, num_examples: Any) -> str:
    """Why what a client sent cannot be a row of the round, '' if it can."""
    if "\0" in client or not client.isprintable():
        return "the client's name holds characters that cannot be printed"
    if not isinstance(sent, Mapping):
        return "sent nothing"
    if reason := names_refusal(model, sent):
        return reason
    for layer in model.layers:
        if reason := layer_refusal(layer, sent[layer.name]):
            return reason
    try:
        count = int(num_examples)
    except (TypeError, ValueError, OverflowError):
        return f"num_examples must be a count, found {num_examples!r:.80}"
    return "" if 0 <= count < 2**63 else f"num_examples must be a count, found {count!r:.80}"


def names_refusal(model: ModelSpec, sent: Collection[str]) -> str:
    """Why layers of these names are not those of the model, '' if they are."""
    if not sent:
        return "sent nothing"
    if missing := [name for name in model if name not in sent]:
        return f"layer {missing[0]!r} is missing"
    if unknown := [name for name in sent if name not in set(model)]:
        return f"layer {unknown[0]!r:.80} is not in the model"
    return ""


def layer_refusal(layer: Layer, sent: Any) -> str:
    """Why what was sent cannot be this layer, '' if it can."""
    try:
        array = np.asarray(sent)
    except Exception as error:  # whatever an object does when it is asked for its numbers
        return f"layer {layer.name!r} is no array: {error!r:.80}"
    if array.dtype.kind not in "fiub":
        return f"layer {layer.name!r} must hold numbers, found dtype {array.dtype}"
    if array.shape != layer.shape:
        return f"layer {layer.name!r} must have shape {layer.shape}, found {array.shape}"
    with np.errstate(all="ignore"):
        if layer.dtype.startswith(("int", "uint")) and not np.array_equal(array.astype(layer.dtype), array):
            return f"layer {layer.name!r} must hold {layer.dtype}, found numbers that are none"
    return ""
