"""What the clients of a round sent, as it arrives.

This is the one place where a client's answer is checked, for a live server, for ingestion and for the integrations.
Nothing that a client sent raises an error: it becomes a row of the round, or a reason why it cannot.
"""

import hashlib
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from gradlens.errors import InputError
from gradlens.log.adapters import Pair, padded, pairs_of
from gradlens.log.arrays import State as State
from gradlens.log.arrays import Unfit as Unfit
from gradlens.log.arrays import as_array as as_array
from gradlens.log.arrays import refusing as refusing
from gradlens.log.arrays import shown as shown
from gradlens.log.global_model import averaged_in as averaged_in
from gradlens.log.global_model import spec_of as spec_of
from gradlens.log.global_model import state_of as state_of
from gradlens.log.levels import Reduction
from gradlens.log.model import Layer, ModelSpec
from gradlens.log.round import Round
from gradlens.log.signatures import Signers, digest_of, kept_text

LONGEST_NAME = 200  # characters of a client's name

Sent = Mapping[Any, State] | Iterable[tuple[Any, State]]


@dataclass(frozen=True, eq=False)
class StartedFrom:
    """What a client sent that started from the global model of an earlier round, as in asynchronous learning.

    Parameters
    ----------
    round : int
        Index of the round whose global model it started from, as the server knows it.
    state : Mapping
        Layer -> array.

    Examples
    --------
    >>> StartedFrom(3, {"fc.bias": [0.0, 1.0]}).round
    3
    """

    round: int
    state: Any


@dataclass(frozen=True, eq=False)
class Signed:
    """What a client sent that came with a signature (`gradlens.custody.sign_update`).

    Where it also started from an earlier round: ``StartedFrom(round, Signed(signature, state))``.

    Parameters
    ----------
    signature : object
        As it came; whatever it is, None if nothing came.
    state : Mapping
        Layer -> array.

    Examples
    --------
    >>> Signed("no signature", {"fc.bias": [0.0, 1.0]}).signature
    'no signature'
    """

    signature: Any
    state: Any


@dataclass(frozen=True, eq=False)
class Received:
    """A round made of what the clients sent.

    Attributes
    ----------
    round_ : Round
        The recorded clients, and those that were refused, with the reasons.
    clients : tuple of str
        All names in the order of arrival, refused clients included.
    notes : Mapping
        Client -> which types of numbers were converted; clients without a conversion are left out.
    """

    round_: Round
    clients: tuple[str, ...]
    notes: Mapping[str, str]


def received(
    index: int,
    model: ModelSpec,
    global_model: Mapping[str, np.ndarray],
    sent: Sent,
    num_examples: Mapping[Any, Any] | None = None,
    *,
    as_models: bool,
    reduction: Reduction | None = None,
    partial: bool = False,
    averaged: frozenset[str] = frozenset(),
    base: Callable[[int], Mapping[str, np.ndarray]] | None = None,
    signers: Signers | None = None,
) -> Received:
    """The round made of what the clients sent; no client can make it raise an error.

    Parameters
    ----------
    index : int
        Number of the round.
    model : ModelSpec
        The layers that clients send.
    global_model : Mapping
        Layer -> array, the model that the clients started from.
    sent : Mapping or iterable of pairs
        Client -> (layer -> array of any library). Clients are known by `str(client)`.
    num_examples : Mapping, optional
        Client -> the number of examples that it claims; by default 1 for everybody.
    as_models : bool
        Whether clients sent local models, from which the global model is subtracted, rather than updates.
    reduction : Reduction, optional
        What is recorded of each update; by default everything. Below that, each answer is reduced as it arrives and
        then let go of, so that an iterable of many answers takes the memory of one.
    partial : bool, default False
        Whether the model is a part that was agreed on: what a client sends besides is left out.
    averaged : frozenset of str
        Integer layers of which the server itself holds fractions (`averaged_in`): those of a client are cut off, as
        those of the global model are where it is recorded.
    base : callable, optional
        (index of an earlier round) -> the global model of that round, for answers that are `StartedFrom` it; raises
        InputError where it is not at hand.
    signers : Signers, optional
        Whose signatures are expected; without it, signatures that come (`Signed`) are kept and not checked.

    Returns
    -------
    Received

    Notes
    -----
    Refused with a reason are: a name that cannot be printed (it is recorded escaped) or is too long; an answer that
    cannot be read, whose layers are not those of the model, or that is not signed as is expected; a claim that is no
    count; and different answers under one name, since it cannot be told which is genuine. Identical ones count once.
    Numbers that are not finite are recorded: they are evidence. Of several answers of one client that started from
    different global models the latest bears its name, and "client (from round 3)" an earlier one.
    """
    reduction = None if reduction is None or reduction.is_full else reduction
    checks = _Checks(index, model, global_model, as_models, reduction, partial, averaged, signers)
    arrived: dict[tuple[str, int], list[_Answer | Unfit]] = {}
    latest: dict[str, int] = {}
    claims: dict[str, Any] = {}
    refused, signatures = dict[str, str](), dict[str, str]()
    texts: dict[tuple[str, int], str] = {}
    for client, state in sent.items() if isinstance(sent, Mapping) else sent:
        name, fault = _name_of(client)
        if fault:
            refused[name] = fault
        claims.setdefault(name, 1 if num_examples is None else _claim_of(client, name, num_examples))
        start, state = (state.round, state.state) if isinstance(state, StartedFrom) else (index, state)
        signature, state = (state.signature, state.state) if isinstance(state, Signed) else (None, state)
        origin = _base(start, index, global_model, base)
        start = index if isinstance(origin, Unfit) else int(start)
        arrived.setdefault((name, start), []).append(checks.answer(name, start, state, origin, signature))
        if signature is not None:
            texts.setdefault((name, start), kept_text(signature))
        latest[name] = max(start, latest.get(name, 0))
        del state  # the next answer may need its memory
    answers: dict[str, list[_Answer | Unfit]] = {}
    started: dict[str, int] = {}
    for (name, start), several_answers in arrived.items():
        row = name if start == latest[name] else f"{name} (from round {start})"
        answers.setdefault(row, []).extend(several_answers)
        claims.setdefault(row, claims[name])
        if name in refused:
            refused[row] = refused[name]
        if start != index:
            started[row] = start
        if (name, start) in texts:
            signatures.setdefault(row, texts[name, start])
    accepted, counts = {}, {}
    for name in answers:
        try:
            accepted[name], counts[name] = _agreed(answers[name]), _count(claims[name])
        except Unfit as reason:
            refused.setdefault(name, str(reason))
    accepted = {name: answer for name, answer in accepted.items() if name not in refused}
    notes = {name: answer.note for name, answer in accepted.items() if answer.note}
    round_ = checks.round(index, accepted, [counts[name] for name in accepted])
    in_order = {name: refused[name] for name in answers if name in refused}
    started = {name: start for name, start in started.items() if name in accepted}
    round_ = replace(round_, refused=in_order, started=started, signatures=signatures)
    return Received(round_, tuple(answers), notes)


def printable(name: str) -> str:
    """A name that can be printed and recorded: escaped where it cannot be printed, and cut where it is too long."""
    if not name.isprintable():
        name = name.encode("unicode_escape").decode("ascii")
    if len(name) > LONGEST_NAME:
        name = f"{name[: LONGEST_NAME // 2]}...{hashlib.sha256(name.encode()).hexdigest()[:16]}"
    return name


@dataclass(frozen=True, eq=False)
class _Answer:
    """What one client sent, or what is recorded of it: arrays, their moments, and which types were converted."""

    arrays: dict[str, np.ndarray]
    moments: dict[str, np.ndarray] = field(default_factory=dict)
    note: str = ""
    base: Mapping[str, np.ndarray] = field(default_factory=dict)  # the global model that it started from


@dataclass(frozen=True, eq=False)
class _Checks:
    """What the answers of one round are checked against, and what is recorded of them (`received`)."""

    index: int
    model: ModelSpec
    global_model: Mapping[str, np.ndarray]
    as_models: bool
    reduction: Reduction | None
    partial: bool
    averaged: frozenset[str]
    signers: Signers | None

    @cached_property
    def pairs(self) -> tuple[Pair, ...]:
        """The adapters of the model."""
        return pairs_of(self.model)

    def answer(
        self, client: str, start: int, state: Any, base: Mapping[str, np.ndarray] | Unfit, signature: Any
    ) -> _Answer | Unfit:
        """What is kept of an answer, or why it cannot be recorded; base: the global model that it started from."""
        try:
            if isinstance(base, Unfit):
                raise base
            # a signature is of all that was sent, also of what is left out
            arrays, kinds = _arrays(state, set(self.model) if self.partial and self.signers is None else None)
            if self.signers is not None:
                self.signers.checked(signature, client, start, self.index, lambda: digest_of(arrays, kinds))
            if self.partial:
                arrays = {name: arrays[name] for name in self.model if name in arrays}
            if self.as_models and self.pairs:
                arrays = padded(arrays, self.model, self.pairs)
            arrays |= {name: np.trunc(arrays[name]) for name in self.averaged & arrays.keys()}
            if fault := self._fault(arrays, base):
                raise Unfit(fault)
        except Unfit as reason:
            return Unfit(str(reason))  # without its traceback, which holds what was sent
        note = _conversions(kinds, self.model)
        if self.reduction is None:
            return _Answer(arrays, note=note, base=base)
        return _Answer(*self.reduction.update(arrays, base if self.as_models else None), note)

    def update(self, arrays: Mapping[str, np.ndarray], base: Mapping[str, np.ndarray], layer: str) -> np.ndarray:
        """The update of one layer, formed when it is needed: a second copy of what was sent is not held."""
        if not self.as_models:
            return arrays[layer]
        with np.errstate(all="ignore"):
            return np.subtract(arrays[layer], base[layer])

    def round(self, index: int, accepted: Mapping[str, _Answer], counts: list[int]) -> Round:
        """The round of the clients that were accepted."""
        if self.reduction is not None:
            rows = [(answer.arrays, answer.moments) for answer in accepted.values()]
            return self.reduction.round(index, list(accepted), counts, rows, self.global_model, {})
        updates = {}
        for layer in self.model.layers:
            updates[layer.name] = np.zeros((len(accepted), *layer.shape), layer.dtype)
            for row, answer in enumerate(accepted.values()):
                with np.errstate(all="ignore"):  # beyond float32 is infinite, and recorded as such
                    updates[layer.name][row] = self.update(answer.arrays, answer.base, layer.name)
        names, examples = np.array(list(accepted), np.str_), np.array(counts, np.int64)
        return Round(index, names, examples, updates, self.global_model, {}, self.model.buffers)

    def _fault(self, arrays: Mapping[str, np.ndarray], base: Mapping[str, np.ndarray]) -> str:
        """Why these arrays cannot be a row of the round, "" if they can."""
        if not arrays:
            return "sent none of the layers that were agreed on" if self.partial else "sent nothing"
        known = set(self.model)
        unknown = [name for name, array in arrays.items() if name not in known and array.size]
        if missing := [name for name in self.model if name not in arrays]:
            return f"layer {missing[0]!r} is missing" + (f", found {unknown[0]!r:.80}" if unknown else "")
        if unknown:
            return f"layer {unknown[0]!r:.80} is not in the model"
        return next(filter(None, (self._layer_fault(layer, arrays, base) for layer in self.model.layers)), "")

    def _layer_fault(self, layer: Layer, arrays: Mapping[str, np.ndarray], base: Mapping[str, np.ndarray]) -> str:
        if (shape := arrays[layer.name].shape) != layer.shape:
            return f"layer {layer.name!r} must have shape {layer.shape}, found {shape}"
        if layer.dtype.startswith(("int", "uint")):
            update = self.update(arrays, base, layer.name)
            with np.errstate(all="ignore"):
                if not np.array_equal(update.astype(layer.dtype), update):
                    return f"layer {layer.name!r} must hold {layer.dtype}, found other numbers"
        return ""


def _base(
    start: Any,
    index: int,
    global_model: Mapping[str, np.ndarray],
    earlier: Callable[[int], Mapping[str, np.ndarray]] | None,
) -> Mapping[str, np.ndarray] | Unfit:
    """The global model that an answer started from, or why it is not known."""
    if isinstance(start, bool) or not isinstance(start, int | np.integer) or not 0 <= start <= index:
        return Unfit(f"started from round {shown(start)}, expected one from 0 to {index}")
    if start == index:
        return global_model
    if earlier is None:
        return Unfit(f"started from round {start}, whose global model is not at hand")
    try:
        state = earlier(int(start))
        state[next(iter(state))]  # a recorded model is read when its first layer is
        return state
    except InputError as error:
        return Unfit(f"started from round {start}, whose global model is not at hand: {error}")


def _name_of(client: Any) -> tuple[str, str]:
    """The name under which a client is recorded, and why it is refused for it, "" if it is not."""
    try:
        with refusing("the client's name cannot be read"):
            text = str.__str__(str(client))  # no subclass, whose methods are the client's own code
    except Unfit as reason:
        return f"a {type(client).__name__} without a name", str(reason)
    name = printable(text)
    if name != text:
        return name, f"the client's name is longer than {LONGEST_NAME} characters or cannot be printed"
    return name, ""


def _claim_of(client: Any, name: str, num_examples: Mapping[Any, Any]) -> Any:
    """The number of examples that a client claims, known by its name or by what the server knows it by."""
    try:
        with refusing("num_examples cannot be read"):
            return num_examples.get(client, num_examples.get(name))
    except Unfit as reason:
        return Unfit(str(reason))


def _count(claim: Any) -> int:
    """A claimed number of examples; raises Unfit where it is no count."""
    if isinstance(claim, Unfit):
        raise claim
    try:
        with refusing("no number"):
            count = int(claim)
        if 0 <= count < 2**63:
            return count
    except Unfit:
        pass
    raise Unfit(f"num_examples must be a count, found {shown(claim)}")


def _arrays(state: Any, only: Collection[str] | None) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Layer -> what a client sent as an array, and layer -> the type of its numbers; raises Unfit.

    Others than `only` these layers are not looked at.
    """
    with refusing("what was sent cannot be read"):
        if isinstance(state, Unfit):
            raise state
        if state is None:
            raise Unfit("sent nothing")
        if not isinstance(state, Mapping):
            raise Unfit(f"must send layers, found {type(state).__name__}")
        layers = list(dict(state).items())
    arrays, kinds = {}, {}
    for key, value in layers:
        if not issubclass(type(key), str):
            raise Unfit(f"names of layers must be text, found {shown(key)}")
        name = str.__str__(key)
        if only is not None and name not in only:
            continue
        try:
            arrays[name], kinds[name] = as_array(value)
        except Unfit as reason:
            raise Unfit(f"layer {shown(name)} {reason}") from reason
    return arrays, kinds


def _agreed(answers: list[_Answer | Unfit]) -> _Answer:
    """What a client sent, once or several times the same; raises Unfit."""
    fingerprints = [""] if len(answers) == 1 else [_fingerprint(answer) for answer in answers]
    if len(set(fingerprints)) > 1:
        several = "; ".join(fingerprints[:3]) + ("; ..." if len(fingerprints) > 3 else "")
        raise Unfit(f"{len(answers)} different answers came under this name, and any may be forged: {several}")
    if isinstance(answers[0], Unfit):
        raise answers[0]
    return answers[0]


def _fingerprint(answer: _Answer | Unfit) -> str:
    """What tells one answer from another, in a reason: digest and norm of what is kept of it, or why it is unfit."""
    if isinstance(answer, Unfit):
        return str(answer)
    digest, square = hashlib.sha256(), sum(float(powers[1]) for powers in answer.moments.values())
    arrays = [*answer.arrays.items(), *answer.moments.items()]
    for name, array in sorted(arrays, key=lambda item: (item[0], item[1].shape)):
        digest.update(f"{name!r}{array.dtype}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
        if name not in answer.moments:
            with np.errstate(all="ignore"):
                square += float(np.square(array, dtype=np.float64).sum())
    return f"sha256 {digest.hexdigest()[:16]}, norm {np.sqrt(square):.6g}"


def _conversions(kinds: Mapping[str, str], model: ModelSpec) -> str:
    """Which types of numbers were converted, "" if none; the integer types of buffers are all alike."""
    pairs = {
        (kinds[layer.name], layer.dtype)
        for layer in model.layers
        if kinds[layer.name] != layer.dtype and "float" in kinds[layer.name] + layer.dtype
    }
    return ", ".join(f"sent {kind}, recorded as {dtype}" for kind, dtype in sorted(pairs))
