"""The attack on final-layer evidence: the other layers learn the backdoor, and an ordinary final layer is sent."""

from typing import Literal

import numpy as np
import torch

from gradlens.errors import InputError
from gradlens.log import ModelSpec
from simulations.attacks.attack import Attack, Reference, Situation, Tensors, Training, Updates, attack_part
from simulations.attacks.sending import count, finite


@attack_part
def hiding(
    how: Literal["frozen", "clipped", "mean", "drawn"] = "drawn", layers: Literal["bias", "final"] = "bias"
) -> Attack:
    """Sends a final bias, or a final layer, that gives nothing away.

    Stage: training and sending. The attackers must know what the others send, unless it is "frozen".

    Parameters
    ----------
    how : {"frozen", "clipped", "mean", "drawn"}
        What is sent: zeros; what was trained, clipped number by number to the range of the others; the others' mean;
        or a draw that has the others' mean and covariance. All but "clipped" also freeze these layers in training, so
        that the other layers learn the backdoor without them.
    layers : {"bias", "final"}
        The final bias alone, or the final weight and bias.

    Returns
    -------
    Attack
        Where there are no others, what was trained is sent. With "clipped" a client without a poisoned sample counts as
        honest. It raises InputError where the model has no such layer.

    Notes
    -----
    "drawn" sends mean + sum_j w_j (b_j - mean) / sqrt(n - 1) over the n others b_j, with w ~ N(0, 1).

    **Fails when** a detector looks at the other layers, which then carry the whole backdoor, or at their relation to
    the final layer. It has no published source.

    Examples
    --------
    >>> hiding(how="mean", layers="final")
    hiding(how='mean', layers='final')
    """

    def freeze(gradients: Tensors, reference: Reference) -> Tensors:
        names = final_layers("hiding", layers, reference.final_weight, reference.final_bias)
        return {name: torch.zeros_like(layer) if name in names else layer for name, layer in gradients.items()}

    def send(trained: Updates, others: Updates, situation: Situation) -> Updates:
        names = final_layers("hiding", layers, situation.model.final_weight, situation.model.final_bias)
        return {**trained, **_disguised(how, names, trained, finite(others), situation)}

    return Attack(train=None if how == "clipped" else Training(gradient=freeze), send=send, deviates=how != "clipped")


def final_layers(attack: str, layers: str, final_weight: str | None, final_bias: str | None) -> list[str]:
    """Returns the names of the final "bias", or of the "final" layer; raises InputError where the model has none."""
    if layers == "bias" and final_bias is None:
        raise InputError(f"{attack}: the model has no final bias")
    names = [name for name in ([] if layers == "bias" else [final_weight]) + [final_bias] if name is not None]
    if not names:
        raise InputError(f"{attack}: the model has no final layer")
    return names


def _disguised(
    how: str, names: list[str], trained: Updates, others: Updates, situation: Situation
) -> dict[str, np.ndarray]:
    """The final layers that are sent."""
    if how == "frozen":
        return {name: np.zeros_like(trained[name]) for name in names}
    if count(others) == 0:
        return {}
    if how == "clipped":
        return {name: np.clip(trained[name], others[name].min(axis=0), others[name].max(axis=0)) for name in names}
    rows = _resembling(_joined(others, names), count(trained), situation.rng if how == "drawn" else None)
    return _parted(rows, names, situation.model, trained)


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
