"""Attacks that change how malicious clients train, and the one that hides final layers, in training and in sending.

Hooks are pure functions of torch tensors of one client, layer -> [*shape]; norms are over all parameters.
"""

from collections.abc import Callable
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field, validate_call

from gradlens.errors import InputError
from gradlens.log import ModelSpec
from gradlens.names import imported
from simulations.attacks.attack import Attack, Reference, Situation, Tensors, Training, Updates
from simulations.attacks.sending import Factor, count, finite, scaling

Penalty = Callable[[Tensors, Reference], torch.Tensor]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]


@validate_call(config={"strict": True})
def own_training(learning_rate: Positive | None = None, epochs: Count | None = None) -> Attack:
    """Malicious clients train at a learning rate and for a number of epochs of their own; None: as everybody.

    In Bagdasaryan et al. 2018, arXiv:1807.00459 (CIFAR-10) 0.05 and 6 against 0.1 and 2.
    """
    if learning_rate is None and epochs is None:
        return Attack()
    return Attack(train=Training(learning_rate=learning_rate, epochs=epochs))


@validate_call(config={"strict": True})
def constrain_and_scale(
    alpha: Annotated[float, Field(ge=0, le=1)] = 0.5, penalty: str = "norm", factor: Factor = 1.0
) -> Attack:
    """Trains on alpha x task loss + (1 - alpha) x penalty for looking malicious, and sends `factor` x the outcome.

    penalty of the update so far: "norm", its L2 norm; "cosine", 1 - its cosine to the client's own honest update
    (while it is the shorter one, its length counts as the honest one's, so that the first step has a gradient);
    "final_bias", the L2 distance of its final bias to the honest one's; "module:function" calls (update, reference)
    -> scalar tensor, differentiable. alpha 1 is training as everybody. Buffers are scaled as in `scaling`.
    Source: Bagdasaryan et al. 2018, arXiv:1807.00459; their released code has the norm, and alpha 1.0 throughout.
    """
    function = PENALTIES.get(penalty) or imported(
        f"constrain_and_scale: penalty: expected {', '.join(PENALTIES)} or module:function", penalty
    )
    # an imported penalty may look at the honest update, so that it is trained for it
    train = Training(function, alpha, needs_honest=penalty != "norm")
    return Attack(train=train if alpha < 1 else None, send=scaling(factor=factor).send)


@validate_call(config={"strict": True})
def norm_bound(bound: Positive = 1.0, every: Count = 10) -> Attack:
    """Training projected onto the ball |local - global| <= `bound`, every so many steps and at the end.

    Source: Sun et al. 2019, arXiv:1911.07963 (norm-bounded attack; with scaling by the clients per round it is their
    pre-boosted one); every 10 steps as in the released code of Wang et al. 2020, arXiv:2007.05084 (PGD).
    """

    def project(update: Tensors, reference: Reference) -> Tensors:
        norm = _norm(list(update.values()))
        factor = (bound / norm.clamp_min(torch.finfo(norm.dtype).tiny)).clamp_max(1.0)
        return {name: tensor * factor for name, tensor in update.items()}

    return Attack(train=Training(project=project, every=every))


@validate_call(config={"strict": True})
def neurotoxin(ratio: Annotated[float, Field(ge=0, le=1)] = 0.05) -> Attack:
    """Trains only where the last change of the global model was small: not in its `ratio` largest numbers.

    Those are counted over all parameters, ties with the smallest of them included, zeros never; in the first round
    all are trained. Source: Zhang et al. 2022 (ICML), arXiv:2206.10341; their released runs mask the top 1 to 5 %.
    """

    def gradient(gradients: Tensors, reference: Reference) -> Tensors:
        sizes = {name: reference.previous[name].abs() for name in gradients}
        flat = torch.cat([size.flatten() for size in sizes.values()])
        masked = int(ratio * len(flat) + 0.5)
        if masked == 0:
            return gradients
        smallest = flat.topk(masked).values[-1]
        return {
            name: torch.where((sizes[name] >= smallest) & (sizes[name] > 0), torch.zeros_like(tensor), tensor)
            for name, tensor in gradients.items()
        }

    return Attack(train=Training(gradient=gradient))


@validate_call(config={"strict": True})
def hiding(
    how: Literal["frozen", "clipped", "mean", "drawn"] = "drawn", layers: Literal["bias", "final"] = "bias"
) -> Attack:
    """Sends a final bias (or final layer, weight and bias) that gives nothing away.

    how: "frozen", zeros; "clipped", what was trained, clipped number by number to the range of the others; "mean",
    the others' mean; "drawn", their mean + sum_j w_j (b_j - mean) / sqrt(n - 1) over the n others b_j with w ~
    N(0, 1), which has their mean and covariance. All but "clipped" also freeze these layers in training, so that the
    rest of the model learns the backdoor without them. Where there are no others, what was trained is sent. Raises
    InputError where the model has no such layer. It has no published source.
    """

    def freeze(gradients: Tensors, reference: Reference) -> Tensors:
        names = _hidden(layers, reference.final_weight, reference.final_bias)
        return {name: torch.zeros_like(each) if name in names else each for name, each in gradients.items()}

    def send(trained: Updates, others: Updates, situation: Situation) -> Updates:
        model, seen = situation.model, finite(others)
        names = _hidden(layers, model.final_weight, model.final_bias)
        if how == "frozen":
            return {**trained, **{name: np.zeros_like(trained[name]) for name in names}}
        if count(seen) == 0:
            return trained
        if how == "clipped":
            within = {name: np.clip(trained[name], seen[name].min(axis=0), seen[name].max(axis=0)) for name in names}
            return {**trained, **within}
        sent = _resembling(_joined(seen, names), count(trained), situation.rng if how == "drawn" else None)
        return {**trained, **_parted(sent, names, model, trained)}

    return Attack(train=None if how == "clipped" else Training(gradient=freeze), send=send)


def norm_penalty(update: Tensors, reference: Reference) -> torch.Tensor:
    """The L2 norm of the update."""
    return _norm(list(update.values()))


def cosine_penalty(update: Tensors, reference: Reference) -> torch.Tensor:
    """1 - cosine of the update to the honest one; a shorter update counts as long as that."""
    mine = torch.cat([update[name].flatten() for name in update])
    honest = torch.cat([reference.honest[name].flatten() for name in update])
    length = torch.linalg.vector_norm(honest).clamp_min(torch.finfo(honest.dtype).eps)
    return 1 - mine @ honest / (torch.maximum(torch.linalg.vector_norm(mine), length) * length)


def final_bias_penalty(update: Tensors, reference: Reference) -> torch.Tensor:
    """The L2 distance of the update's final bias to the honest one."""
    (name,) = _hidden("bias", reference.final_weight, reference.final_bias, "constrain_and_scale")
    return _norm([update[name] - reference.honest[name]])


PENALTIES: dict[str, Penalty] = {"norm": norm_penalty, "cosine": cosine_penalty, "final_bias": final_bias_penalty}


def _norm(tensors: list[torch.Tensor]) -> torch.Tensor:
    """L2 norm over all tensors; its gradient at 0 is 0."""
    return torch.linalg.vector_norm(torch.cat([tensor.flatten() for tensor in tensors]))


def _hidden(layers: str, final_weight: str | None, final_bias: str | None, attack: str = "hiding") -> list[str]:
    """The layers that are meant; raises InputError where the model has none."""
    if layers == "bias" and final_bias is None:
        raise InputError(f"{attack}: the model has no final bias")
    names = [final_bias] if layers == "bias" else [final_weight, final_bias]
    found = [name for name in names if name is not None]
    if not found:
        raise InputError(f"{attack}: the model has no final layer")
    return found


def _joined(updates: Updates, names: list[str]) -> np.ndarray:
    """The named layers of each client as one row, float64 [client, number]."""
    return np.concatenate([np.asarray(updates[name], np.float64).reshape(count(updates), -1) for name in names], axis=1)


def _parted(rows: np.ndarray, names: list[str], model: ModelSpec, like: Updates) -> dict[str, np.ndarray]:
    """The inverse of `_joined`, in each layer's own shape and dtype."""
    parts = np.split(rows, np.cumsum([model[name].size for name in names])[:-1], axis=1)
    return {
        name: part.reshape(like[name].shape).astype(like[name].dtype) for name, part in zip(names, parts, strict=True)
    }


def _resembling(others: np.ndarray, attackers: int, rng: np.random.Generator | None) -> np.ndarray:
    """A row for each attacker: the others' mean, with a generator plus a draw with their covariance."""
    mean = others.mean(axis=0)
    if rng is None or len(others) == 1:
        return np.tile(mean, (attackers, 1))
    weights = rng.normal(size=(attackers, len(others))) / np.sqrt(len(others) - 1)
    return mean + weights @ (others - mean)
