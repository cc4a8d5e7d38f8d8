"""Attacks that send what was trained in another size: scaled, boosted, cut to a norm, or in the layers that matter.

Parameters are changed; buffers are sent as trained, unless an attack says otherwise.
"""

from collections.abc import Mapping
from typing import Annotated

import numpy as np
from pydantic import Field

from simulations.attacks.attack import Attack, Situation, Update, Updates, attack_part
from simulations.attacks.sending import Factor, changed, count, finite, like, per_client


@attack_part
def scaling(factor: Factor = 1.0) -> Attack:
    """Sends the trained update times a factor [1]_.

    Stage: sending. The attacker needs its own update alone; to choose the factor that replaces the global model it
    needs the number of clients and the server learning rate.

    Parameters
    ----------
    factor : float
        What the update is multiplied by; at 1, the default, nothing changes.

    Returns
    -------
    Attack
        Buffers are scaled too, but those of whole numbers (counters) are sent as they are.

    Notes
    -----
    u becomes factor x u. With factor = n / eta, for n updates in the mean and server learning rate eta, the next
    global model is the attacker's where the other updates cancel out.

    **Fails when** the server clips norms, or a detector looks at them.

    References
    ----------
    .. [1] Bagdasaryan et al. 2018, arXiv:1807.00459, eq. (3), model replacement.

    Examples
    --------
    >>> import numpy as np
    >>> scaling(factor=3.0).send({"fc.bias": np.float32([[1.0, 2.0]])}, {}, None)
    {'fc.bias': array([[3., 6.]], dtype=float32)}
    """

    def send(trained: Updates, others: Updates, situation: Situation) -> Updates:
        return scaled(trained, factor)

    return Attack(send=None if factor == 1.0 else send)


@attack_part
def model_replacement(factor: Factor | None = None) -> Attack:
    """Sends the trained update times the factor by which the mean lands on the attackers' local model.

    Stage: sending. The attackers must know how many updates the server averages, its learning rate and, where they are
    several, how many of them attack.

    Parameters
    ----------
    factor : float, optional
        What the update is multiplied by; None, the default, for n / (eta f), as below.

    Returns
    -------
    Attack
        Buffers are scaled as by `scaling`.

    Notes
    -----
    u becomes n / (eta f) u for n updates in the mean, server learning rate eta and f attackers in the round. With the
    other updates at rest the next global model is the mean of the attackers' local models; [1]_ has f = 1.

    **Fails when** the server clips norms or takes a robust aggregate, or when the model is far from convergence, so
    that the other updates do not cancel out. A single such round fades as honest training goes on.

    References
    ----------
    .. [1] Bagdasaryan et al. 2018, arXiv:1807.00459, eq. (3).

    Examples
    --------
    >>> model_replacement()
    model_replacement(factor=None)
    """

    def send(trained: Updates, others: Updates, situation: Situation) -> Updates:
        exact = situation.num_updates / situation.server_learning_rate / count(trained)
        return scaled(trained, exact if factor is None else factor)

    return Attack(send=send)


@attack_part
def explicit_boosting(factor: Factor | None = None) -> Attack:
    """Sends the honest update plus the malicious one times a factor, from two separate trainings [1]_.

    Stage: sending. The attacker must know how many updates the server averages.

    Parameters
    ----------
    factor : float, optional
        What the malicious update is multiplied by; None, the default, for the number of updates in the mean.

    Returns
    -------
    Attack
        Buffers are sent as trained maliciously.

    Notes
    -----
    Sends h + factor x u for the honest update h and the malicious update u.

    **Fails when** the server clips norms, or a detector looks at them.

    References
    ----------
    .. [1] Sun et al. 2019, arXiv:1911.07963, unconstrained boosted attack, as in their released code.

    Examples
    --------
    >>> explicit_boosting(factor=30.0)
    explicit_boosting(factor=30.0)
    """

    def send(trained: Updates, others: Updates, situation: Situation) -> Updates:
        boost, honest = situation.num_updates if factor is None else factor, situation.honest()
        parameters = situation.model.parameters
        return {
            name: like(update, np.float64(boost) * update + honest[name]) if name in parameters else update
            for name, update in trained.items()
        }

    return Attack(send=send)


@attack_part
def train_and_scale(bound: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None) -> Attack:
    """Scales each update, up or down, to a norm that does not stand out [1]_.

    Stage: sending. The attacker must know the bound of the server's anomaly detector or, by default, what the others
    send.

    Parameters
    ----------
    bound : float, optional
        L2 norm of what is sent, over all parameters, in units of the weights; None, the default, for the median norm
        of what the others send, by which norm clipping commonly bounds.

    Returns
    -------
    Attack
        An update of zeros stays as it is, as do all where the bound is None and there are no others.

    Notes
    -----
    u becomes bound / ||u|| u.

    **Fails when** a detector looks at directions or single layers, and not only at the norm over all layers.

    References
    ----------
    .. [1] Bagdasaryan et al. 2018, arXiv:1807.00459, train-and-scale.

    Examples
    --------
    >>> train_and_scale(bound=2.0)
    train_and_scale(bound=2.0)
    """

    def send(trained: Updates, others: Updates, situation: Situation) -> Updates:
        reference, parameters = finite(others), situation.model.parameters
        if bound is None and count(reference) == 0:
            return trained
        target = float(np.median(_norms(reference, parameters))) if bound is None else bound
        norms = _norms(trained, parameters)
        factors = np.divide(target, norms, out=np.ones_like(norms), where=norms > 0)
        return changed(trained, trained, situation.model, lambda mine, _: per_client(factors, mine) * mine)

    return Attack(send=send)


@attack_part
def layer_substitution(tau: Annotated[float, Field(ge=0, le=1)] = 0.8) -> Attack:
    """Keeps the malicious update in the few layers that the backdoor needs and sends the honest one in all others.

    Stage: sending. The attacker needs its own data and two trainings, one honest and one malicious.

    Parameters
    ----------
    tau : float
        Share of the malicious update's success that the chosen layers must reach; 0.8 as in the code of [1]_.

    Returns
    -------
    Attack
        Buffers are sent as trained honestly. At least one malicious layer is kept, even where the honest update reaches
        that success by itself, or the malicious one has none. A client without a poisoned sample is honest.

    Notes
    -----
    Forward: each layer of the malicious update in turn is replaced by the honest one, and layers are ranked by how
    much attack success falls; of equal ones the earlier comes first. Backward: the honest update gets the malicious
    layers in that order, one at least, until its success reaches tau x that of the malicious update. A layer is one
    named tensor; success is measured on the attackers' own training data. Unlike in [1]_, malicious training starts
    from the global model, and the kept layers are neither scaled nor averaged.

    **Fails when** a detector looks at single layers: the malicious ones are as malicious as before.

    References
    ----------
    .. [1] Zhuang et al. 2024 (ICLR), arXiv:2308.04466, backdoor-critical layers.

    Examples
    --------
    >>> layer_substitution()
    layer_substitution(tau=0.8)
    """

    def send(trained: Updates, others: Updates, situation: Situation) -> Updates:
        honest = situation.honest()
        rows = [_substituted(_row(trained, k), _row(honest, k), situation, tau) for k in range(count(trained))]
        return {name: np.stack([row[name] for row in rows]) for name in trained}

    return Attack(send=send, deviates=False)


@attack_part
def norm_cap(quantile: Annotated[float, Field(ge=0, le=1)] = 0.9) -> Attack:
    """Shortens what is sent to a norm that honest updates of the round reach.

    Stage: sending, after boosts. The attackers need their own data alone: each trains honestly besides, and together
    they estimate how long honest updates are.

    Parameters
    ----------
    quantile : float
        Of the norms of the attackers' own honest updates, linearly interpolated; 0.9 is a plain choice, 1 their
        longest one.

    Returns
    -------
    Attack
        Shorter updates stay as they are, as do all where no honest update is finite. A client without a poisoned sample
        counts as honest.

    Notes
    -----
    u becomes min(1, c / ||u||) u, where c is the quantile of ||h|| over the honest updates h of the round's attackers.
    Norms are over all parameters. It has no published source; [1]_ bounds the norm by a constant that the server gives
    away, as `norm_bound` and `train_and_scale` can.

    **Fails when** the backdoor needs a boost that honest norms leave no room for, or when a detector looks at
    directions or single layers.

    References
    ----------
    .. [1] Sun et al. 2019, arXiv:1911.07963.

    Examples
    --------
    >>> norm_cap(quantile=0.5)
    norm_cap(quantile=0.5)
    """

    def send(trained: Updates, others: Updates, situation: Situation) -> Updates:
        honest, parameters = finite(situation.honest()), situation.model.parameters
        if count(honest) == 0:
            return trained
        cap, norms = np.quantile(_norms(honest, parameters), quantile), _norms(trained, parameters)
        factors = np.divide(cap, norms, out=np.ones_like(norms), where=norms > cap)
        return changed(trained, trained, situation.model, lambda mine, _: per_client(factors, mine) * mine)

    return Attack(send=send, deviates=False)


def scaled(updates: Updates, factor: float) -> Updates:
    """All layers times a factor; those of whole numbers stay."""
    return {
        name: update * update.dtype.type(factor) if np.issubdtype(update.dtype, np.floating) else update
        for name, update in updates.items()
    }


def _row(updates: Updates, client: int) -> dict[str, np.ndarray]:
    return {name: update[client] for name, update in updates.items()}


def _norms(updates: Updates, parameters: tuple[str, ...]) -> np.ndarray:
    """L2 norm over all parameters, float64 [client]."""
    squares = [
        np.square(updates[name], dtype=np.float64).reshape(count(updates), -1).sum(axis=1) for name in parameters
    ]
    return np.sqrt(np.sum(squares, axis=0))


def _substituted(
    malicious: Mapping[str, np.ndarray], honest: Update, situation: Situation, tau: float
) -> dict[str, np.ndarray]:
    """One attacker's honest update with the layers of its malicious update that the backdoor needs, at least one."""
    sent, success = dict(honest), situation.success(malicious)
    different = [name for name in situation.model.parameters if not np.array_equal(malicious[name], honest[name])]
    without = [situation.success({**malicious, name: honest[name]}) for name in different]
    for position in np.argsort(without, kind="stable"):  # the layer without which least success is left comes first
        sent[different[position]] = malicious[different[position]]
        if not situation.success(sent) < tau * success:
            break
    return sent
