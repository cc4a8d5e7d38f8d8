"""Statistics of low-rank adapters: the rank and the directions of what a client changed.

They read the products of A and B (`gradlens.log.adapters`), from the factors alone.
"""

import numpy as np
import pandas as pd

from gradlens.errors import CannotSay
from gradlens.log import Round, UpdateLog
from gradlens.log.adapters import Factors, factors_of, pairs_of, with_products
from gradlens.statistics.cohort import cohort, table


def adapter_rank(log: UpdateLog) -> pd.DataFrame:
    """Effective rank of what each client changed by each adapter in the last round.

    Parameters
    ----------
    log : UpdateLog
        The rounds so far; the last one is judged.

    Returns
    -------
    DataFrame, float64 [client, adapter]
        From 1 to twice the adapter's rank; 0 for an update of 0.

    Raises
    ------
    CannotSay
        Where it abstains.

    Notes
    -----
    With the singular values s of B'A' - BA and p = s / sum of s [1]_::

        exp(- sum of p log p)

    **Abstains** when fewer than 3 clients are comparable, or the model has no adapter that was recorded in full.

    **Fails when** malicious clients train on as varied samples as benign ones.

    References
    ----------
    .. [1] Roy & Vetterli 2007, EUSIPCO, "The effective rank".

    Examples
    --------
    >>> from gradlens.examples import example_log
    >>> from gradlens.errors import CannotSay
    >>> try:
    ...     adapter_rank(example_log())
    ... except CannotSay as reason:
    ...     print(reason)
    the model has no adapter (layers such as q.lora_A.weight and q.lora_B.weight)
    """
    return _by_singular_values(log, _effective_rank)


def adapter_share(log: UpdateLog) -> pd.DataFrame:
    """Share of the leading direction in the energy of what each client changed by each adapter in the last round.

    Parameters
    ----------
    log : UpdateLog
        The rounds so far; the last one is judged.

    Returns
    -------
    DataFrame, float64 [client, adapter]
        From 0 to 1; 0 for an update of 0.

    Raises
    ------
    CannotSay
        Where it abstains.

    Notes
    -----
    The square of the largest singular value of B'A' - BA over the sum of all squares. A backdoor is one kind of sample
    with one answer, and adds one direction.

    **Abstains** when fewer than 3 clients are comparable, or the model has no adapter that was recorded in full.

    **Fails when** the poisoned samples are few beside the clean ones.

    Examples
    --------
    >>> from gradlens import score_by
    >>> from gradlens.scorers import robust_zscore
    >>> score_by(adapter_share, robust_zscore, threshold=3.5)
    score_by(adapter_share, robust_zscore, threshold=3.5)
    """
    return _by_singular_values(log, lambda s: s[:, 0] ** 2 / np.maximum((s**2).sum(axis=1), np.finfo(float).tiny))


def adapter_angles(log: UpdateLog) -> pd.DataFrame:
    """How far the directions in which each client changed each adapter agree with those of the other clients.

    Parameters
    ----------
    log : UpdateLog
        The rounds so far; the last one is judged.

    Returns
    -------
    DataFrame, float64 [client, 2 x adapter]
        From 0 (orthogonal) to 1 (the same space): for the outputs, "q.lora outputs" (the column space), and for the
        inputs, "q.lora inputs" (the row space).

    Raises
    ------
    CannotSay
        Where it abstains.

    Notes
    -----
    Of each client's update B'A' - BA the leading r singular vectors on either side span a space, r being the adapter's
    rank. The value is the median over the other comparable clients of the mean squared cosine of the principal angles
    between the two spaces: the norm of the update does not matter, and no minority moves the median.

    **Abstains** when fewer than 3 clients are comparable, or the model has no adapter that was recorded in full.

    **Fails when** most clients attack, or when the attack moves within the space that all clients use.

    Examples
    --------
    >>> from gradlens import score_by
    >>> from gradlens.scorers import robust_zscore
    >>> score_by(adapter_angles, robust_zscore, threshold=3.5)
    score_by(adapter_angles, robust_zscore, threshold=3.5)
    """
    round_, factors = _adapters(log)
    values, names = [], []
    for name, each in factors.items():
        left, _, right = each.decomposition()
        rank = max(1, each.left.shape[2] // 2)
        for side, bases in (("outputs", left), ("inputs", right)):
            names.append(f"{name} {side}")
            values.append(_agreement(bases[:, :, :rank], round_.comparable))
    return table(round_, names, np.stack(values, axis=1))


def _adapters(log: UpdateLog) -> tuple[Round, dict[str, Factors]]:
    """The last round, and adapter -> the factors of its products; raises CannotSay where there are none."""
    round_ = cohort(log)
    if not any(layer.kind == "adapter" for layer in log.model.layers):
        pairs = pairs_of(log.model)
        if not pairs:
            raise CannotSay("the model has no adapter (layers such as q.lora_A.weight and q.lora_B.weight)")
        if not round_.is_whole:
            raise CannotSay("the adapters were not recorded in full")
        log = with_products(log[-1:], pairs)
        round_ = log[-1]
    names = [layer.name for layer in log.model.layers if layer.kind == "adapter"]
    factors = {name: factors_of(round_.source, name) for name in names}
    if any(each is None for each in factors.values()):
        raise CannotSay("the factors of the adapters are not known for combined clients")
    return round_, {name: each for name, each in factors.items() if each is not None}


def _by_singular_values(log: UpdateLog, measure) -> pd.DataFrame:
    round_, factors = _adapters(log)
    with np.errstate(all="ignore"):  # only in rows that become NaN
        values = [measure(each.decomposition()[1]) for each in factors.values()]
    return table(round_, list(factors), np.stack(values, axis=1))


def _effective_rank(singular: np.ndarray) -> np.ndarray:
    total = singular.sum(axis=1, keepdims=True)
    shares = singular / np.where(total > 0, total, 1)
    logs = np.log(np.where(shares > 0, shares, 1))
    return np.where(total[:, 0] > 0, np.exp(-(shares * logs).sum(axis=1)), 0)


def _agreement(bases: np.ndarray, comparable: np.ndarray) -> np.ndarray:
    """Median over the others of the mean squared cosine between clients' spaces [client, number, direction]."""
    count, _, rank = bases.shape
    flat = bases.transpose(0, 2, 1).reshape(count * rank, -1)
    squares = np.square(flat @ flat.T).reshape(count, rank, count, rank).sum(axis=(1, 3)) / rank
    np.fill_diagonal(squares, np.nan)
    squares[:, ~comparable] = np.nan
    return np.nanmedian(squares, axis=1)
