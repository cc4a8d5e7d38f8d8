"""Attacks that change how malicious clients train.

Hooks are pure functions of torch tensors of one client, layer -> [*shape]; norms are over all parameters.
"""

from collections.abc import Callable
from typing import Annotated

import torch
from pydantic import Field

from simulations.attacks.attack import Attack, Reference, Tensors, Training, attack_part, function_named
from simulations.attacks.boosting import scaling
from simulations.attacks.hidden_layers import final_layers
from simulations.attacks.sending import Factor

Penalty = Callable[[Tensors, Reference], torch.Tensor]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]


@attack_part
def own_training(learning_rate: Positive | None = None, epochs: Count | None = None) -> Attack:
    """Trains malicious clients at a learning rate and for a number of epochs of their own.

    Stage: training. The attacker needs its own data alone.

    Parameters
    ----------
    learning_rate : float, optional
        Of the malicious clients' SGD; None, the default, for the scenario's. In [1]_ 0.05 against 0.1 on CIFAR-10.
    epochs : int, optional
        Passes over a malicious client's data; None, the default, for the scenario's. In [1]_ 6 against 2.

    Returns
    -------
    Attack
        With both at None it does nothing.

    Notes
    -----
    **Fails when** more epochs make updates so long that norms give them away.

    References
    ----------
    .. [1] Bagdasaryan et al. 2018, arXiv:1807.00459.

    Examples
    --------
    >>> own_training(learning_rate=0.05, epochs=6)
    own_training(learning_rate=0.05, epochs=6)
    """
    if learning_rate is None and epochs is None:
        return Attack()
    return Attack(train=Training(learning_rate=learning_rate, epochs=epochs))


@attack_part
def constrain_and_scale(
    alpha: Annotated[float, Field(ge=0, le=1)] = 0.5, penalty: str = "norm", factor: Factor = 1.0
) -> Attack:
    """Trains with a penalty for looking malicious and sends the result times a factor.

    Stage: training and sending. The attacker must know what the server looks at; the penalties "cosine" and
    "final_bias" take an honest training of its own besides.

    Parameters
    ----------
    alpha : float
        Weight of the task loss; 1 is training without a penalty. 0.5 is a plain choice: the code of [1]_ has 1.0 in
        all its settings.
    penalty : str
        Of the update so far: "norm", its L2 norm; "cosine", 1 - its cosine to the client's own honest update;
        "final_bias", the L2 distance of its final bias to the honest one; or "module:function", called with
        (update, reference), which returns a differentiable scalar tensor. The code of [1]_ has the norm.
    factor : float
        What the update is multiplied by, buffers as by `scaling`; 1, the default, leaves it as it is.

    Returns
    -------
    Attack
        "final_bias" raises InputError in training where the model has no final bias.

    Raises
    ------
    InputError
        If the penalty is unknown or cannot be imported.

    Notes
    -----
    The loss is alpha x task loss + (1 - alpha) x penalty. While the update is shorter than the honest one, "cosine"
    takes its length for the honest one's, so that the first step has a gradient.

    **Fails when** the server looks at something that the penalty leaves out.

    References
    ----------
    .. [1] Bagdasaryan et al. 2018, arXiv:1807.00459.

    Examples
    --------
    >>> constrain_and_scale(alpha=0.3, penalty="cosine")
    constrain_and_scale(alpha=0.3, penalty='cosine', factor=1.0)
    """
    function = function_named("constrain_and_scale: penalty", PENALTIES, penalty)
    # an imported penalty may look at the honest update, so that it is trained for it
    train = Training(function, alpha, needs_honest=penalty != "norm")
    return Attack(train=train if alpha < 1 else None, send=scaling(factor=factor).send)


@attack_part
def norm_bound(bound: Positive = 1.0, every: Count = 10) -> Attack:
    """Projects the update onto a ball around the global model while it trains (PGD).

    Stage: training. The attacker must know the norm that the server accepts.

    Parameters
    ----------
    bound : float
        L2 norm of the update at most, over all parameters, in units of the weights; 1 is a plain choice.
    every : int
        Steps between two projections; 10 as in the code of [2]_. The last step is always followed by one.

    Returns
    -------
    Attack
        With `scaling` by the number of clients per round it is the pre-boosted attack of [1]_. A client without a
        poisoned sample counts as honest.

    Notes
    -----
    w becomes g + min(1, bound / ||w - g||) (w - g) for the local model w and the global model g.

    **Fails when** the bound leaves too little room to learn the backdoor, or when a detector looks at directions.

    References
    ----------
    .. [1] Sun et al. 2019, arXiv:1911.07963, norm-bounded attack.
    .. [2] Wang et al. 2020, arXiv:2007.05084.

    Examples
    --------
    >>> norm_bound(bound=0.3)
    norm_bound(bound=0.3, every=10)
    """

    def project(update: Tensors, reference: Reference) -> Tensors:
        norm = _norm(list(update.values()))
        factor = (bound / norm.clamp_min(torch.finfo(norm.dtype).tiny)).clamp_max(1.0)
        return {name: tensor * factor for name, tensor in update.items()}

    return Attack(train=Training(project=project, every=every), deviates=False)


@attack_part
def neurotoxin(ratio: Annotated[float, Field(ge=0, le=1)] = 0.05) -> Attack:
    """Trains only those parameters that honest clients moved little in the last round.

    Stage: training. The attacker needs the last two global models, which every participant sees.

    Parameters
    ----------
    ratio : float
        Share of the parameters that is left alone; 0.05, the released runs of [1]_ mask the top 1 to 5 %.

    Returns
    -------
    Attack
        In the first round all parameters are trained. A client without a poisoned sample counts as honest.

    Notes
    -----
    The gradient is 0 where the last change of the global model is among its `ratio` largest in magnitude, counted over
    all parameters. Ties with the smallest of them are included; a change of 0 never is.

    **Fails when** rounds differ so much in who takes part that the last change says little about the next one.

    References
    ----------
    .. [1] Zhang et al. 2022 (ICML), arXiv:2206.10341.

    Examples
    --------
    >>> neurotoxin(ratio=0.01)
    neurotoxin(ratio=0.01)
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

    return Attack(train=Training(gradient=gradient), deviates=False)


def norm_penalty(update: Tensors, reference: Reference) -> torch.Tensor:
    """Returns the L2 norm of the update."""
    return _norm(list(update.values()))


def cosine_penalty(update: Tensors, reference: Reference) -> torch.Tensor:
    """Returns 1 - cosine of the update to the honest one; a shorter update counts as being as long as that."""
    mine = torch.cat([update[name].flatten() for name in update])
    honest = torch.cat([reference.honest[name].flatten() for name in update])
    length = torch.linalg.vector_norm(honest).clamp_min(torch.finfo(honest.dtype).eps)
    return 1 - mine @ honest / (torch.maximum(torch.linalg.vector_norm(mine), length) * length)


def final_bias_penalty(update: Tensors, reference: Reference) -> torch.Tensor:
    """Returns the L2 distance of the update's final bias to the honest one."""
    (name,) = final_layers("constrain_and_scale", "bias", reference.final_weight, reference.final_bias)
    return _norm([update[name] - reference.honest[name]])


PENALTIES: dict[str, Penalty] = {"norm": norm_penalty, "cosine": cosine_penalty, "final_bias": final_bias_penalty}


def _norm(tensors: list[torch.Tensor]) -> torch.Tensor:
    """L2 norm over all tensors; its gradient at 0 is 0."""
    return torch.linalg.vector_norm(torch.cat([tensor.flatten() for tensor in tensors]))
