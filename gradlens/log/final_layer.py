"""Which layer of a model answers: found by names, order and shapes, or named by the user."""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, Protocol

from gradlens.errors import InputError
from gradlens.words import several

# the last parts of the name of a weight; what is before them is the module's name
WEIGHTS = (
    "weight", "kernel", "weight_orig", "weight_v", "weight_bar", "parametrizations.weight.original",
    "parametrizations.weight.original1", "base_layer.weight", "modules_to_save.default.weight",
)  # fmt: skip
# parts of the names of layers that do not answer
ASIDE = re.compile(
    r"(^|_)aux|lstm|(^|_)gru|grucell|(^|_)rnn|rnncell|recurrent|embed|emb$|^(wte|wpe)$|norm(?!al)|^ln(_\w+)?$|"
    r"^bn\d*$|lora|adapter|position|^(weight|bias)_[ih]h|weight_g$|original0$|attn|attention|in_proj",
    re.IGNORECASE,
)
EMBEDDING = re.compile(r"embed|emb$|^wte$", re.IGNORECASE)
HEAD = re.compile(
    r"^(\w*head\w*|classifier\d*|fc|out|outc|output|output_layer|outputs|logits|score|cls|predictions?|linear_out|final\w*)$",
    re.IGNORECASE,
)
DEPTH = 3  # leading parts of a name in which the name of a head counts
TRANSPOSED = re.compile(r"transpose|deconv|^up(conv)?\d*$", re.IGNORECASE)
MAGNITUDE = re.compile(r"(weight_g|parametrizations\.weight\.original0)$")  # beside the direction, in weight norm
PLACE = re.compile(r"^(arr_|array_|param_|layer_|p|w|v)?\d+$", re.IGNORECASE)  # a name that is a place in a list


class Shaped(Protocol):
    """A layer as it was sent: its name and shape."""

    @property
    def name(self) -> str:
        """Its name."""
        ...

    @property
    def sent_shape(self) -> tuple[int, ...]:
        """The shape that was sent."""
        ...


@dataclass(frozen=True)
class FinalLayer:
    """The layer that answers, or why it is not known.

    Attributes
    ----------
    weight, bias : str or None
        Names of its weight and bias, None where it has none or is not known.
    why : str
        What it was found by, or why it was not.
    certainty : {"certain", "likely", "unknown"}
        Unknown: nothing is named, and what rests on the final layer abstains.
    """

    weight: str | None
    bias: str | None
    why: str
    certainty: Literal["certain", "likely", "unknown"]


def final_layer_of(parameters: Sequence[Shaped]) -> FinalLayer:
    """Finds the layer that answers among a model's parameter layers.

    Parameters
    ----------
    parameters : sequence of Layer
        In the order of the model.

    Returns
    -------
    FinalLayer

    Notes
    -----
    Weights of recurrent, embedding, normalization, attention, auxiliary and adapter layers do not answer. Of the others
    it is the one that is named as a head, that stands last, and whose outputs no other layer takes. Names in
    alphabetical order say nothing about the order of the model, but their numbers do. Where order, names and shapes
    contradict each other, two layers may answer (`_ends_before`), or shapes cannot tell which dimension holds the
    outputs, the layer is unknown.

    Examples
    --------
    >>> import numpy as np
    >>> from gradlens import ModelSpec
    >>> model = ModelSpec.of({"out/bias": np.zeros(4), "out/kernel": np.zeros((6, 4))})
    >>> model.final_weight, model.final_bias, model.num_units("out/kernel")
    ('out/kernel', 'out/bias', 4)
    """
    candidates = _candidates(parameters)
    takers = [each for each in candidates if not MAGNITUDE.search(each.layer.name)]
    candidates = [each for each in candidates if not each.is_aside]
    if not candidates:
        return FinalLayer(None, None, "no layer of two or more dimensions could be it", "unknown")
    chosen, why, certainty = _chosen(candidates, takers, ordered=not _is_alphabetical(parameters))
    if chosen is None:
        return FinalLayer(None, None, f"{why}: {several([each.layer.name for each in candidates])}", "unknown")
    if chosen.axis is None:
        name, shape = chosen.layer.name, chosen.layer.sent_shape
        return FinalLayer(None, None, f"{why}, but which dimension of {name} {shape} holds the outputs", "unknown")
    return FinalLayer(chosen.layer.name, chosen.bias_name, why, certainty)


def named_final_layer(parameters: Sequence[Shaped], name: str) -> FinalLayer:
    """The final layer that the user names.

    Parameters
    ----------
    parameters : sequence of Layer
        In the order of the model.
    name : str
        Of its weight, its bias, or its module.

    Returns
    -------
    FinalLayer

    Raises
    ------
    InputError
        Where the model has no such layer, or the module has several weights.
    """
    candidates = _candidates(parameters)
    exact = [each for each in candidates if name in (each.layer.name, each.bias_name)]
    found = exact or [each for each in candidates if each.module == name and not MAGNITUDE.search(each.layer.name)]
    if len(found) == 1:
        return FinalLayer(found[0].layer.name, found[0].bias_name, "named", "certain")
    if any(layer.name == name for layer in parameters):
        return FinalLayer(None, name, "named", "certain")
    if found:
        raise InputError(
            f"final layer: {name!r:.80} has the weights {several([e.layer.name for e in found])}; name one"
        )
    raise InputError(f"final layer: the model has no layer {name!r:.80}, only {several([p.name for p in parameters])}")


def unit_axes(parameters: Sequence[Shaped]) -> dict[str, int]:
    """Layer -> the dimension that has an entry for each of its classes, outputs or filters.

    Parameters
    ----------
    parameters : sequence of Layer
        In the order of the model.

    Returns
    -------
    dict of str to int
        Of the layers of two or more dimensions: 0 as in torch, the last one for kernels as in Keras and flax, 1 for
        transposed convolutions of torch; where neither name nor bias tells, 0.
    """
    return {each.layer.name: each.axis or 0 for each in _candidates(parameters)}


@dataclass(frozen=True)
class _Candidate:
    """A weight that might be the final one."""

    layer: Shaped
    bias: Shaped | None

    @cached_property
    def module(self) -> str:
        return _module(self.layer.name)

    @cached_property
    def parts(self) -> list[str]:
        return _parts(self.module)

    @property
    def bias_name(self) -> str | None:
        return None if self.bias is None else self.bias.name

    @property
    def is_aside(self) -> bool:
        return any(ASIDE.search(part) for part in _parts(self.layer.name))

    @property
    def is_embedding(self) -> bool:
        return any(EMBEDDING.search(part) for part in _parts(self.layer.name))

    @cached_property
    def head(self) -> str | None:
        """The name up to its part that names a head, None if there is none."""
        for number, part in enumerate(self.parts[:DEPTH], 1):
            if HEAD.match(part):
                return "/".join(self.parts[:number])
        return None

    @cached_property
    def axis(self) -> int | None:
        """Which dimension holds the outputs, None where it cannot be told."""
        shape, name = self.layer.sent_shape, self.layer.name
        last = len(shape) - 1
        outputs = None if self.bias is None else self.bias.sent_shape[0]
        fits = [axis for axis in range(len(shape)) if outputs in (None, shape[axis])]
        if _parts(name)[-1] == "kernel":
            order = [last, last - 1]
        elif len(shape) > 2 and any(TRANSPOSED.search(part) for part in _parts(name)):
            order = [1, 0]
        elif PLACE.match(name) and len(fits) > 1 and (outputs is None or len(shape) == 2):
            return None
        else:  # as torch has it
            order = [0, 1, last] if len(shape) > 2 else [0, last]
        return next((axis for axis in order if axis in fits), None)

    @property
    def outputs(self) -> int | None:
        return None if self.axis is None else self.layer.sent_shape[self.axis]

    @property
    def narrows(self) -> bool:
        """Whether it is a matrix of fewer outputs than inputs, as a head is."""
        shape = self.layer.sent_shape
        return len(shape) == 2 and self.outputs is not None and self.outputs < shape[1 - (self.axis or 0)]

    def takes(self, outputs: int | None, *, flattened: bool) -> bool:
        """Whether this weight may take so many outputs of another one, from its channels where it is flattened."""
        if outputs is None:
            return False
        shape, axis = self.layer.sent_shape, self.axis or 0
        inputs = shape[1 - axis] if axis < 2 else shape[-2 if axis == len(shape) - 1 else -1]
        return inputs == outputs or (flattened and len(shape) == 2 and inputs % outputs == 0)


def _chosen(
    candidates: list[_Candidate], takers: list[_Candidate], *, ordered: bool
) -> tuple[_Candidate | None, str, Literal["certain", "likely"]]:
    """The candidate that answers, None if that cannot be told; why; and how certain it is."""
    if len(candidates) == 1:
        return candidates[0], "the only weight that could be it", "certain"
    if not ordered:
        candidates = sorted(candidates, key=lambda each: _natural(each.layer.name))
    free = [each for each in candidates if not _is_taken(each, takers)]
    last, heads = candidates[-1], _heads(candidates, free)
    if len(heads) > 1:
        return None, "several heads", "likely"
    head = next(iter(heads), None)
    if head is None and any(each.is_embedding and each.takes(last.outputs, flattened=False) for each in takers):
        return None, "the embedding may answer, too, or one of", "likely"
    if head is None and last in free and (ends := _ends_before(last, free, takers)):
        names = " and ".join(repr(each.layer.name) for each in [*ends, last])
        return None, f"{names} may each answer, of", "likely"
    if ordered or _is_numbered(candidates):
        if head is last:
            return last, "the last layer, and named as a head", "certain"
        if head is None and last in free:
            return last, "the last layer, and no other layer takes its outputs", "certain" if ordered else "likely"
        if head is None and not free:
            return last, "the last layer", "likely"
    if head is not None and (head in free or not free) and (not ordered or last not in free):
        return head, "named as a head" + (", and no other layer takes its outputs" if head in free else ""), "likely"
    if head is None and not ordered and len(free) == 1:
        return free[0], "the only layer whose outputs no other layer takes", "likely"
    return None, "names, order and shapes do not agree on one of", "likely"


def _ends_before(last: _Candidate, free: list[_Candidate], takers: Collection[_Candidate]) -> list[_Candidate]:
    """Layers before the last that end the model as it does: with fewer outputs than inputs, which no layer takes.

    None of them is an end where the last layer takes no whole layer, but several side by side.
    """
    others = [each for each in takers if each.layer is not last.layer]
    whole = any(last.takes(each.outputs, flattened=len(each.layer.sent_shape) > 2) for each in others)
    return [each for each in free if whole and each is not last and each.narrows and last.narrows]


def _heads(candidates: list[_Candidate], free: list[_Candidate]) -> list[_Candidate]:
    """The last layer of each head that is named as such nearest to the top, without those that another layer takes."""
    named = [each for each in candidates if each.head]
    nearest = min((len(_parts(str(each.head))) for each in named), default=0)
    heads = {each.head: each for each in named if len(_parts(str(each.head))) == nearest}
    return [each for each in heads.values() if each in free] or list(heads.values())


def _is_taken(each: _Candidate, takers: Collection[_Candidate]) -> bool:
    flattened = len(each.layer.sent_shape) > 2
    return any(other.takes(each.outputs, flattened=flattened) for other in takers if other.layer is not each.layer)


def _candidates(parameters: Sequence[Shaped]) -> list[_Candidate]:
    """The layers of two or more dimensions, each with its bias: of its module, or right after it without modules."""
    by_name = {layer.name: layer for layer in parameters}
    followers = [*parameters[1:], None][: len(parameters)]
    return [
        _Candidate(layer, _bias_of(layer, by_name, after))
        for layer, after in zip(parameters, followers, strict=True)
        if len(layer.sent_shape) > 1
    ]


def _bias_of(weight: Shaped, by_name: Mapping[str, Shaped], after: Shaped | None) -> Shaped | None:
    module = _module(weight.name)
    if module != weight.name:
        names = [weight.name[: len(module) + 1] + "bias"] if module else ["bias"]
        names += [f"{name.removesuffix('bias')}base_layer.bias" for name in names]
        beside = [by_name[name] for name in names if name in by_name]
    else:
        beside = [] if after is None else [after]
    return next((b for b in beside if len(b.sent_shape) == 1 and b.sent_shape[0] in weight.sent_shape), None)


def _module(weight: str) -> str:
    """The name of the module that a weight belongs to; the name itself where it does not say."""
    for end in sorted(WEIGHTS, key=len, reverse=True):
        if weight == end:
            return ""
        if weight.endswith(("." + end, "/" + end)):
            return weight[: -len(end) - 1]
    return weight


def _parts(name: str) -> list[str]:
    return re.split(r"[./]", name)


def _natural(name: str) -> list[tuple[int, int, str]]:
    """A key that sorts names with their numbers as numbers: 8 before 12."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", name) if part]


def _is_alphabetical(parameters: Sequence[Shaped]) -> bool:
    names = [layer.name for layer in parameters]
    return len(names) > 1 and names == sorted(names)


def _is_numbered(candidates: Sequence[_Candidate]) -> bool:
    """Whether names differ in their numbers alone, which then give the order."""
    return len({re.sub(r"\d+", "#", each.layer.name) for each in candidates}) == 1
