"""Low-rank adapters (LoRA): pairs of matrices whose product is what a client changed.

Clients send A [rank, in] and B [out, rank] for each module, and the module's weight changes by B'A' - BA. Neither A nor
B tells this alone: the same change has many pairs. Here a pair becomes one layer, the product, whose norms and inner
products are computed from the factors and which is never formed for all clients.

Frameworks multiply the product by a number, alpha / rank in PEFT, which is no layer: it is taken to be everybody's.
"""

import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from gradlens.errors import InputError
from gradlens.log import kernels
from gradlens.log.kernels import Columns
from gradlens.log.log import UpdateLog
from gradlens.log.model import Layer, ModelSpec
from gradlens.log.round import Round
from gradlens.log.sources import (
    CombinedSource,
    Judgment,
    Mixing,
    Products,
    SelectedSource,
    Source,
    with_identical_entries,
)

PATTERNS = (
    (r"lora_A\b", "lora_B"), (r"lora_embedding_A\b", "lora_embedding_B"), (r"lora_down\b", "lora_up"),
    (r"lora_(kernel|embeddings)_b\b", r"lora_\1_a"),  # Keras: of a kernel [in, out], which is a b
)  # fmt: skip
CHUNK = 1 << 24  # numbers of a block of inner products of factors


@dataclass(frozen=True)
class Pair:
    """The two layers of an adapter.

    Attributes
    ----------
    name : str
        What the product is called: the module, and ".lora".
    first : str
        A, [rank, in, ...].
    second : str
        B, [out, rank, ...].
    """

    name: str
    first: str
    second: str


def pairs_of(model: ModelSpec, patterns: Collection[tuple[str, str]] = PATTERNS) -> tuple[Pair, ...]:
    """The adapters of a model, by the names of their layers.

    Parameters
    ----------
    model : ModelSpec
    patterns : collection of (str, str)
        A regular expression that is found in the name of A, and what stands in its place in the name of B; by default
        those of PEFT, diffusers and Keras.

    Returns
    -------
    tuple of Pair
        In the order of the model.

    Examples
    --------
    >>> state = {"q.lora_A.weight": np.zeros((2, 8)), "q.lora_B.weight": np.zeros((6, 2))}
    >>> pairs_of(ModelSpec.of(state))
    (Pair(name='q.lora', first='q.lora_A.weight', second='q.lora_B.weight'),)
    """
    known, pairs = set(model.parameters), []
    for first in model.parameters:
        for pattern, other in patterns:
            second = re.sub(pattern, other, first, count=1)
            if second != first and second in known and _fit(model[first], model[second]):
                module = re.split(pattern, first, maxsplit=1)[0].rstrip("./")
                pairs.append(Pair(f"{module}.lora" if module else "lora", first, second))
    return tuple(pairs)


def with_products(log: UpdateLog, pairs: Collection[Pair] | None = None) -> UpdateLog:
    """The log in which each adapter is one layer, the product of its two.

    Parameters
    ----------
    log : UpdateLog
        Recorded in full.
    pairs : collection of Pair, optional
        By default those that `pairs_of` finds.

    Returns
    -------
    UpdateLog
        Every statistic and detector takes it. The log itself where there are no adapters.

    Raises
    ------
    InputError
        Where the layers of an adapter were not recorded in full.

    Notes
    -----
    With dA = A' - A and dB = B' - B the update is ::

        B'A' - BA = dB A' + B dA = [dB, B] [A'; dA]

    of rank 2r at most. Inner products follow from those of the factors, 2r x 2r for each pair of clients; numbers of
    the product are formed block by block where a statistic asks for them, as a median does.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> state = {"q.lora_A.weight": rng.normal(size=(2, 8)), "q.lora_B.weight": np.zeros((6, 2))}
    >>> updates = {name: rng.normal(size=(5, *array.shape)) for name, array in state.items()}
    >>> log = UpdateLog(ModelSpec.of(state), [Round(0, np.array(list("abcde")), np.ones(5), updates, state)])
    >>> product = with_products(log)
    >>> list(product.model), product[-1].updates["q.lora"].shape
    (['q.lora'], (5, 6, 8))
    """
    pairs = pairs_of(log.model) if pairs is None else tuple(pairs)
    if not pairs:
        return log
    factors = [name for pair in pairs for name in (pair.first, pair.second)]
    sketched = [name for name in factors if log.model[name].sketch_of is not None]
    if sketched:
        raise InputError(f"adapters: layer {sketched[0]!r} was recorded as a sketch, its product is not known")
    model = _model(log.model, pairs)
    return UpdateLog.lazy(model, [_Made(log, place, pairs, model) for place in range(len(log))])


def judged(log: UpdateLog) -> UpdateLog:
    """What is judged of a recording: `with_products`, or the log itself where something was recorded as a sketch.

    Parameters
    ----------
    log : UpdateLog
    """
    return log if log.model.is_reduced else with_products(log)


def padded(arrays: Mapping[str, np.ndarray], model: ModelSpec, pairs: Collection[Pair]) -> dict[str, np.ndarray]:
    """Adapters of a smaller rank than the model's, filled with zeros, which changes no product.

    Parameters
    ----------
    arrays : Mapping
        Layer -> array, as a client sent them.
    model : ModelSpec
        The layers as they are recorded.
    pairs : collection of Pair
        Those of the model.
    """
    filled = dict(arrays)
    for pair in pairs:
        for name, axis in ((pair.first, 0), (pair.second, 1)):
            if name not in arrays:
                continue
            shape, wanted = arrays[name].shape, model[name].shape
            missing = wanted[axis] - shape[axis] if len(shape) == len(wanted) else 0
            if missing > 0:
                widths = [(0, missing if place == axis else 0) for place in range(len(shape))]
                filled[name] = np.pad(arrays[name], widths)
    return filled


@dataclass(frozen=True)
class _Made:
    """Makes a round with products when it is needed."""

    log: UpdateLog
    place: int
    pairs: tuple[Pair, ...]
    model: ModelSpec

    def __call__(self) -> Round:
        round_ = self.log[self.place]
        source = ProductSource(round_.source, round_.global_model, self.pairs, tuple(self.model))
        state = _ProductState(round_.global_model, {pair.name: pair for pair in self.pairs}, self.model)
        return replace(round_, updates=source, global_model=state)


@dataclass(frozen=True)
class _ProductState(Mapping[str, np.ndarray]):
    """A global model in which each adapter is the product of its two layers, formed when it is asked for."""

    whole: Mapping[str, np.ndarray]
    pairs: Mapping[str, Pair]
    model: ModelSpec

    def __getitem__(self, layer: str) -> np.ndarray:
        if layer not in self.model:
            raise KeyError(layer)
        if layer not in self.pairs:
            return self.whole[layer]
        pair = self.pairs[layer]
        first, second = (_matrices(np.asarray(self.whole[name])[None])[0] for name in (pair.first, pair.second))
        with np.errstate(all="ignore"):
            return (second @ first).astype(np.float32)

    def __iter__(self) -> Iterator[str]:
        return iter(self.model)

    def __len__(self) -> int:
        return len(self.model)


class ProductSource(Mapping[str, np.ndarray]):
    """A source in which each adapter is one layer, the product of its two.

    Parameters
    ----------
    whole : Source
        The updates of A and B, and of the other layers.
    state : Mapping
        Layer -> array, the global model before the round.
    pairs : tuple of Pair
    names : tuple of str
        The layers, in order.
    """

    def __init__(
        self, whole: Source, state: Mapping[str, np.ndarray], pairs: Sequence[Pair], names: Sequence[str]
    ) -> None:
        self._whole, self._state, self._names = whole, state, dict.fromkeys(names)
        self._pairs = {pair.name: pair for pair in pairs}
        self.judgment: Judgment | None = whole.judgment

    @cached_property
    def factors(self) -> Mapping[str, "Factors"]:
        """Layer -> the factors of its products."""
        return {name: Factors.of(self._whole, self._state, pair) for name, pair in self._pairs.items() if name in self}

    def __getitem__(self, layer: str) -> np.ndarray:
        if layer not in self._names:
            raise KeyError(layer)
        if layer not in self._pairs:
            return self._whole[layer]
        shape = self.shape(layer)
        return self.columns(layer)(0, math.prod(shape)).reshape(-1, *shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, layer: object) -> bool:
        return layer in self._names

    def shape(self, layer: str) -> tuple[int, ...]:
        """Shape of one client's update of the layer."""
        return self.factors[layer].shape if layer in self._pairs else self._whole.shape(layer)

    def columns(self, layer: str) -> Columns:
        """A function (start, stop) -> those numbers of the layer, [client, number]."""
        return self.factors[layer].columns if layer in self._pairs else self._whole.columns(layer)

    def norms(self, layer: str) -> np.ndarray:
        """L2 norm of every client's update, float64 [client]."""
        return self.factors[layer].norms if layer in self._pairs else self._whole.norms(layer)

    def gram(self, layer: str, order: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """Inner products, float64 [client, client]; and the norms."""
        if layer not in self._pairs:
            return self._whole.gram(layer, order)
        factors = self.factors[layer]
        return factors.gram, factors.norms

    def weighted_mean(self, layer: str, clients: np.ndarray, weights: np.ndarray, total: float | None) -> np.ndarray:
        """The weighted sum over some clients divided by `total`, or by the sum of the weights, [*shape]."""
        if layer not in self._pairs:
            return self._whole.weighted_mean(layer, clients, weights, total)
        shape = self.shape(layer)
        out = np.zeros(math.prod(shape), np.float32)
        if len(clients):
            kernels.weighted_mean(self.columns(layer), clients, weights, out, total)
        return out.reshape(shape)

    def take(self, positions: np.ndarray, computed: Products, judgment: Judgment) -> Source:
        """The source of the clients at these positions."""
        return SelectedSource(self, positions, computed, judgment)

    def combine(self, mixing: Mixing, computed: Products) -> Source:
        """The source of linear combinations of the clients."""
        return CombinedSource(self, mixing, computed)

    def only(self, layers: Collection[str]) -> Source:
        """The source of some layers alone."""
        names = [name for name in self._names if name in layers]
        return ProductSource(self._whole, self._state, list(self._pairs.values()), names)


@dataclass(frozen=True, eq=False)
class Factors:
    """The updates of one adapter as products left @ right.

    Attributes
    ----------
    left : numpy.ndarray
        float64 [client, out, 2 rank]: dB and B.
    right : numpy.ndarray
        float64 [client, 2 rank, in]: A' above dA.
    """

    left: np.ndarray
    right: np.ndarray

    @classmethod
    def of(cls, source: Source, state: Mapping[str, np.ndarray], pair: Pair) -> "Factors":
        """The factors of an adapter's updates."""
        names = pair.first, pair.second
        first, second = (_matrices(source[name]) for name in names)
        before_first, before_second = (_matrices(np.asarray(state[name])[None])[0] for name in names)
        with np.errstate(all="ignore"):
            after = before_first + first
        left = np.concatenate([second, np.broadcast_to(before_second, second.shape)], axis=2)
        return cls(left, np.concatenate([after, first], axis=1))

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs and inputs."""
        return self.left.shape[1], self.right.shape[2]

    def columns(self, start: int, stop: int) -> np.ndarray:
        """Numbers of the products, flattened row by row, float32 [client, number]."""
        inputs = self.shape[1]
        top, bottom = start // inputs, -(-stop // inputs)
        with np.errstate(all="ignore"):  # what is not finite stays in its row
            rows = self.left[:, top:bottom] @ self.right
            return rows.reshape(len(rows), -1)[:, start - top * inputs : stop - top * inputs].astype(np.float32)

    @cached_property
    def gram(self) -> np.ndarray:
        """Inner products of all pairs, float64 [client, client]."""
        count, width = self.left.shape[0], self.left.shape[2]
        lefts = np.ascontiguousarray(self.left.transpose(0, 2, 1)).reshape(count * width, -1)
        rights = self.right.reshape(count * width, -1)
        gram, step = np.empty((count, count)), max(1, CHUNK // max(1, count * width * width))
        with np.errstate(all="ignore"), kernels.one_blas_thread():
            for start in range(0, count, step):
                part = slice(start * width, min(start + step, count) * width)
                products = (lefts[part] @ lefts.T) * (rights[part] @ rights.T)
                gram[start : start + step] = products.reshape(-1, width, count, width).sum(axis=(1, 3))
            gram = (gram + gram.T) / 2
        flat = np.concatenate([self.left.reshape(count, -1), self.right.reshape(count, -1)], axis=1)
        return with_identical_entries(gram, lambda start, stop: flat[:, start:stop], flat.shape[1])

    @cached_property
    def norms(self) -> np.ndarray:
        """L2 norms, float64 [client], each from its client's factors alone; infinite beyond float32, as numbers are."""
        with np.errstate(all="ignore"):
            lefts = np.einsum("kop,koq->kpq", self.left, self.left)
            rights = np.einsum("kpi,kqi->kpq", self.right, self.right)
            norms = np.sqrt(np.maximum(np.einsum("kpq,kpq->k", lefts, rights), 0))
        return np.where(norms > np.finfo(np.float32).max, np.inf, norms)

    def decomposition(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Left singular vectors [client, out, k], singular values [client, k], right ones [client, in, k].

        k is 2 rank, or less where a side has fewer numbers. Clients whose numbers are not finite count as 0.
        """
        finite = np.isfinite(self.norms)[:, None, None]
        outer, inner = np.linalg.qr(np.where(finite, self.left, 0))
        across, along = np.linalg.qr(np.where(finite, self.right, 0).transpose(0, 2, 1))
        left, values, right = np.linalg.svd(inner @ along.transpose(0, 2, 1))
        count = values.shape[1]
        return outer @ left[:, :, :count], values, across @ right.transpose(0, 2, 1)[:, :, :count]


def factors_of(source: Source, layer: str) -> Factors | None:
    """The factors of an adapter's updates, None where clients were combined.

    Parameters
    ----------
    source : Source
        Of a round of `with_products`, or of some of its clients.
    layer : str
        The product.
    """
    if isinstance(source, ProductSource):
        return source.factors[layer]
    if isinstance(source, SelectedSource) and (whole := factors_of(source.whole, layer)) is not None:
        return Factors(whole.left[source.positions], whole.right[source.positions])
    return None


def _fit(first: Layer, second: Layer) -> bool:
    """Whether two layers are the factors of a product: [rank, in, ...] and [out, rank, ...]."""
    shapes = first.sent_shape, second.sent_shape
    return min(map(len, shapes)) > 1 and shapes[0][0] == shapes[1][1] and math.prod(shapes[1][2:]) == 1


def _model(model: ModelSpec, pairs: Sequence[Pair]) -> ModelSpec:
    """The model with a layer for each product, in the place of the first of its two layers."""
    of_first, seconds = {pair.first: pair for pair in pairs}, {pair.second for pair in pairs}
    layers = []
    for layer in model.layers:
        if layer.name in of_first:
            pair = of_first[layer.name]
            inputs = layer.size // layer.shape[0]
            layers.append(Layer(pair.name, (model[pair.second].shape[0], inputs), kind="adapter"))
        elif layer.name not in seconds:
            layers.append(layer)
    names = {layer.name for layer in layers}
    final = [name if name in names else None for name in (model.final_weight, model.final_bias)]
    return ModelSpec(tuple(layers), *final)


def _matrices(array: np.ndarray) -> np.ndarray:
    """[client, a, b, ...] as float64 [client, a, number]."""
    return array.reshape(*array.shape[:2], -1).astype(np.float64)
