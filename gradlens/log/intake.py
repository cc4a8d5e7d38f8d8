"""What arrives from elsewhere: arrays of any library, a model's state, what the clients of a round sent.

What a client sent never raises: it becomes a row of the round, or a reason why it cannot.
"""

import hashlib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from gradlens.errors import InputError
from gradlens.log.levels import Reduction
from gradlens.log.model import Layer, ModelSpec
from gradlens.log.round import Round
from gradlens.log.sources import LazyLayers

BUFFER_NAMES = ("running_mean", "running_var", "num_batches_tracked")
LONGEST = 200  # characters of a client's name
SHOWN = 80  # characters of what was found, in a reason

State = Mapping[str, Any]  # layer -> array of any library
Sent = Mapping[Any, State] | Iterable[tuple[Any, State]]


class Unfit(Exception):  # noqa: N818 - an answer, not a fault
    """Why what a client sent cannot be recorded; stands for what it sent where it cannot even be read."""


@dataclass(frozen=True, eq=False)
class Received:
    """A round made of what the clients sent; clients: their names in the order of arrival, refused ones included.

    notes: client -> which number types were converted.
    """

    round_: Round
    clients: tuple[str, ...]
    notes: Mapping[str, str]


@dataclass(frozen=True, eq=False)
class _Answer:
    """What one client sent, as arrays, and the types of the numbers that it sent."""

    arrays: Mapping[str, np.ndarray]
    types: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class _Reduced:
    """What is kept of an answer below the level "full": what is recorded of it, its moments, and `_note`."""

    arrays: dict[str, np.ndarray]
    moments: dict[str, np.ndarray]
    note: str


def as_array(value: Any) -> tuple[np.ndarray, str]:
    """An array of any library as one of numpy, and the type that its numbers had.

    Torch tensors are asked for theirs without importing torch; bfloat16 and smaller floats become float32.
    Raises Unfit for what holds no numbers.
    """
    try:
        if hasattr(value, "detach"):
            value = value.detach().cpu()
            kind = str(value.dtype).removeprefix("torch.")
            array = np.asarray(value.float().numpy() if kind.startswith(("bfloat", "float8")) else value.numpy())
        else:
            array = np.asarray(value)
            kind = array.dtype.name
            if array.dtype.kind == "V" and kind.startswith(("bfloat", "float")):  # types that ml_dtypes adds
                array = array.astype(np.float32)
    except BaseException as error:  # whatever an object does when it is asked for its numbers, SystemExit too
        raise Unfit(f"is no array: {shown(error)}") from error
    if array.dtype.kind not in "fiub":
        raise Unfit(f"must hold numbers, found {type(value).__name__} of type {array.dtype}")
    return array, kind


def found_buffers(state: State) -> list[str]:
    """The layers that are buffers by their type or name: integers, and what batch normalisation keeps."""
    by_name = [name for name in state if name.rsplit(".", 1)[-1] in BUFFER_NAMES]
    return [name for name in state if name in by_name or as_array(state[name])[0].dtype.kind in "iub"]


def spec_of(
    state: State, buffers: Collection[str] = (), *, final_weight: str | None = None, final_bias: str | None = None
) -> ModelSpec:
    """The specification of a model's state of any library; buffers: besides those that `found_buffers` finds.

    Raises InputError where the state holds what is no array, or has no such buffer.
    """
    if not isinstance(state, Mapping) or not all(isinstance(name, str) for name in state):
        raise InputError(f"a global model is a table layer -> array, found {type(state).__name__}")
    if unknown := [name for name in buffers if name not in state]:
        raise InputError(f"buffers: the model has no layer {unknown[0]!r}, only {list(state)}")
    arrays = {name: _recorded_type(_servers(name, value)) for name, value in state.items()}
    found = {*buffers, *found_buffers(state)}
    return ModelSpec.of(arrays, buffers=found, final_weight=final_weight, final_bias=final_bias)


def state_of(state: State, model: ModelSpec) -> dict[str, np.ndarray]:
    """A global model as it is recorded, copied; raises InputError where its layers are not those of `model`."""
    if not isinstance(state, Mapping):
        raise InputError(f"a global model is a table layer -> array, found {type(state).__name__}")
    if differing := [name for name in [*model, *state] if name not in state or name not in set(model)]:
        whose = "recorded" if differing[0] not in state else "given"
        raise InputError(f"the global model changed its layers: {differing[0]!r:.80} is in the {whose} model alone")
    arrays = {layer.name: _servers(layer.name, state[layer.name]) for layer in model.layers}
    for layer in model.layers:
        if arrays[layer.name].shape != layer.shape:
            found = arrays[layer.name].shape
            raise InputError(f"layer {layer.name!r} of the global model must have shape {layer.shape}, found {found}")
    with np.errstate(all="ignore"):
        return {layer.name: np.array(arrays[layer.name], layer.dtype) for layer in model.layers}


def received(
    index: int,
    model: ModelSpec,
    global_model: Mapping[str, np.ndarray],
    sent: Sent,
    num_examples: Mapping[Any, Any] | None = None,
    *,
    as_models: bool,
    reduction: Reduction | None = None,
) -> Received:
    """The round made of what clients sent: client -> (layer -> array), or pairs of them; never raises because of one.

    as_models: local models were sent, of which the global model is taken away; else updates. num_examples: client ->
    count, None: 1 for everybody. Answers that differ under one name are all refused, since none can be told from the
    others; equal ones count once. Names that cannot be printed are escaped, and refused. reduction: what is recorded
    of the model, None: everything; below that nothing else is held of an answer once the next one is asked for.
    """
    reduction = None if reduction is None or reduction.is_full else reduction
    answers: dict[str, list[tuple[Any, Any]]] = {}
    refused: dict[str, str] = {}
    for client, state in sent.items() if isinstance(sent, Mapping) else sent:
        text = _text(client)
        name = printable(text)
        if name != text:
            refused[name] = f"the client's name is longer than {LONGEST} characters or cannot be printed"
        count = 1 if num_examples is None else num_examples.get(client, num_examples.get(text))
        kept = state if reduction is None else _kept(state, reduction, global_model, as_models=as_models)
        del state  # the next answer may need its memory
        answers.setdefault(name, []).append((kept, count))
    updates, counts, notes = {}, {}, {}
    for name, given in answers.items():
        try:
            answer = _one_of([state for state, _ in given])
            counts[name] = _count(given[0][1])
        except Unfit as reason:
            refused.setdefault(name, str(reason))
            continue
        if name in refused:
            continue
        if isinstance(answer, _Reduced):
            updates[name], note = answer, answer.note
        else:
            updates[name], note = _updates(answer, global_model, as_models=as_models), _note(answer, model)
        if note:
            notes[name] = note
    if reduction is None:
        unfit = {name: refusal(model, layers) for name, layers in updates.items()}
        updates = {name: layers for name, layers in updates.items() if not unfit[name]}
        refused |= {name: reason for name, reason in unfit.items() if reason}
        names, examples = np.array(list(updates), np.str_), np.array([counts[name] for name in updates], np.int64)
        round_ = Round(index, names, examples, _stacked(model, updates), global_model, {}, model.buffers)
    else:
        rows = [(each.arrays, each.moments) for each in updates.values()]
        round_ = reduction.round(index, list(updates), [counts[name] for name in updates], rows, global_model, {})
    refused = {name: refused[name] for name in answers if name in refused}
    notes = {name: note for name, note in notes.items() if name not in refused}
    return Received(replace(round_, refused=refused), tuple(answers), notes)


def refusal(model: ModelSpec, layers: Mapping[str, Any]) -> str:
    """Why an update cannot be a row of a round, '' if it can."""
    if reason := names_refusal(model, layers):
        return reason
    return next(filter(None, (layer_refusal(layer, layers[layer.name]) for layer in model.layers)), "")


def _stacked(model: ModelSpec, updates: Mapping[str, Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Layer -> the updates of all clients, [client, *shape]."""
    stacked = {}
    for layer in model.layers:
        rows = np.zeros((len(updates), *layer.shape), layer.dtype)
        for position, layers in enumerate(updates.values()):
            with np.errstate(all="ignore"):  # beyond float32 is infinite, and recorded as such
                rows[position] = np.asarray(layers[layer.name])
        stacked[layer.name] = rows
    return stacked


def _text(client: Any) -> str:
    """The name of a client as text, whatever its own code does when it is asked for it."""
    try:
        return str(client)
    except BaseException as error:  # SystemExit too
        return f"a {type(client).__name__} whose name raises\n{type(error).__name__}"


def printable(name: str) -> str:
    """A name that can be printed and recorded: what cannot is escaped, what is too long is cut."""
    if not name.isprintable():
        name = name.encode("unicode_escape").decode("ascii")
    if len(name) > LONGEST:
        name = f"{name[: LONGEST // 2]}...{hashlib.sha256(name.encode()).hexdigest()[:16]}"
    return name


def shown(value: Any) -> str:
    """What was found, in a few characters."""
    try:
        return f"{value!r:.{SHOWN}}"
    except Exception:  # an integer of 5,000 digits, an object that raises when it is printed
        return f"a value of type {type(value).__name__}"


def _servers(name: str, value: Any) -> np.ndarray:
    try:
        return as_array(value)[0]
    except Unfit as reason:
        raise InputError(f"layer {name!r} of the global model {reason}") from reason


def _recorded_type(array: np.ndarray) -> np.ndarray:
    """Integers as int64, for differences of smaller ones would wrap around; floats as float32, or float64 kept."""
    if array.dtype.kind in "iub":
        return array.astype(np.int64)
    return array if array.dtype == np.float64 else array.astype(np.float32)


def _one_of(states: list[Any]) -> _Answer | _Reduced:
    """What a client sent, once or several times the same; raises Unfit."""
    if len(states) == 1:
        return _read(states[0])
    answers, evidence = [], []
    for state in states:
        try:
            answers.append(_read(state))
            evidence.append(_fingerprint(answers[-1]))
        except Unfit as reason:
            evidence.append(str(reason))
    if len(answers) == len(states) and len(set(evidence)) == 1:
        return answers[0]
    several = "; ".join(evidence[:3]) + ("; ..." if len(evidence) > 3 else "")
    raise Unfit(f"{len(states)} different answers came under this name, and none can be told from another: {several}")


def _kept(state: Any, reduction: Reduction, base: Mapping[str, np.ndarray], *, as_models: bool) -> _Reduced | Unfit:
    """What is recorded of what a client sent, or why it cannot be."""
    try:
        answer = _answer(state)
    except Unfit as reason:
        return Unfit(str(reason))  # without its traceback, which holds what was sent
    model, moved = reduction.sent, _updates(answer, base, as_models=as_models)

    def judged(layer: Layer) -> np.ndarray:  # whole numbers must be some as updates; of the others no copy is made
        return moved[layer.name] if layer.dtype.startswith(("int", "uint")) else answer.arrays[layer.name]

    reasons = [names_refusal(model, answer.arrays)]
    if not reasons[0]:
        reasons += [layer_refusal(layer, judged(layer)) for layer in model.layers]
    if any(reasons):
        return Unfit(next(filter(None, reasons)))
    recorded, moments = reduction.update(answer.arrays, base if as_models else None)
    return _Reduced(recorded, moments, _note(answer, model))


def _read(state: Any) -> _Answer | _Reduced:
    """What was kept of what a client sent, or that as arrays; raises Unfit."""
    return state if isinstance(state, _Reduced) else _answer(state)


def _answer(state: Any) -> _Answer:
    """What a client sent as arrays; raises Unfit."""
    if isinstance(state, Unfit):
        raise state
    if state is None:
        raise Unfit("sent nothing")
    if not isinstance(state, Mapping):
        raise Unfit(f"must send layers, found {type(state).__name__}")
    arrays, types = {}, {}
    try:
        layers = dict(state)
    except Exception as error:  # a mapping that reads what cannot be read
        raise Unfit(f"what was sent cannot be read: {shown(error)}") from error
    for name, value in layers.items():
        if not isinstance(name, str):
            raise Unfit(f"names of layers must be text, found {shown(name)}")
        try:
            arrays[name], types[name] = as_array(value)
        except Unfit as reason:
            raise Unfit(f"layer {shown(name)} {reason}") from reason
    return _Answer(arrays, types)


def _updates(answer: _Answer, base: Mapping[str, np.ndarray], *, as_models: bool) -> Mapping[str, np.ndarray]:
    """Layer -> update, made when it is asked for: a second copy of everything that was sent is not held."""

    def update(name: str) -> np.ndarray:
        array = answer.arrays[name]
        if not as_models or name not in base or base[name].shape != array.shape:
            return array  # what does not fit is refused as it is
        with np.errstate(all="ignore"):
            return np.subtract(array, base[name])

    return LazyLayers(tuple(answer.arrays), update, keep=False)


def _note(answer: _Answer, model: ModelSpec) -> str:
    """Which types of numbers were converted, '' if none; integer types of buffers are all alike."""
    floats = [layer for layer in model.layers if layer.dtype.startswith("float")]
    odd = {
        (answer.types[each.name], each.dtype)
        for each in floats
        if answer.types.get(each.name, each.dtype) != each.dtype
    }
    return ", ".join(f"sent {found}, recorded as {dtype}" for found, dtype in sorted(odd))


def _count(claim: Any) -> int:
    """The number of examples that a client claims; raises Unfit for what is no count."""
    try:
        count = int(claim)
    except Exception as error:  # whatever an object does when it is asked for a number
        raise Unfit(f"num_examples must be a count, found {shown(claim)}") from error
    if not 0 <= count < 2**63:
        raise Unfit(f"num_examples must be a count, found {shown(claim)}")
    return count


def _fingerprint(answer: _Answer | _Reduced) -> str:
    """What tells one answer from another in a reason; of a reduced one what is recorded of it."""
    moments = answer.moments if isinstance(answer, _Reduced) else {}
    digest, square = hashlib.sha256(), sum(float(powers[1]) for powers in moments.values())
    for name, array in sorted([*answer.arrays.items(), *moments.items()], key=lambda item: (item[0], item[1].shape)):
        digest.update(f"{name!r}{array.dtype}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
        if name not in moments:
            with np.errstate(all="ignore"):
                square += float(np.square(array, dtype=np.float64).sum())
    return f"sha256 {digest.hexdigest()[:16]}, norm {np.sqrt(square):.6g}"


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
    except BaseException as error:  # whatever an object does when it is asked for its numbers, SystemExit too
        return f"layer {layer.name!r} is no array: {error!r:.80}"
    if array.dtype.kind not in "fiub":
        return f"layer {layer.name!r} must hold numbers, found dtype {array.dtype}"
    if array.shape != layer.shape:
        return f"layer {layer.name!r} must have shape {layer.shape}, found {array.shape}"
    with np.errstate(all="ignore"):
        if layer.dtype.startswith(("int", "uint")) and not np.array_equal(array.astype(layer.dtype), array):
            return f"layer {layer.name!r} must hold {layer.dtype}, found numbers that are none"
    return ""
