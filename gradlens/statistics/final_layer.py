"""Statistics of the final layer: what a client's update says about labels."""

from collections.abc import Callable, Mapping
from typing import Literal

import numpy as np
import pandas as pd

from gradlens.errors import CannotSay, InputError
from gradlens.geometry import ratio
from gradlens.log import Round, UpdateLog
from gradlens.statistics.cohort import cohort, deviations, table, units

Predict = Callable[[Mapping[str, np.ndarray]], np.ndarray]  # a model's state -> probabilities [sample, class]

SMALLEST_PROBABILITY = float(np.finfo(np.float32).tiny)  # a smaller softmax output is 0 in float32
SMALLEST_THRESHOLD = 0.01  # of the largest NEUP, by DeepSight


def final_bias(log: UpdateLog) -> pd.DataFrame:
    """Each client's final-layer bias update in the last round, minus the cohort's median.

    Parameters
    ----------
    log : UpdateLog
        The rounds so far; the last one is judged.

    Returns
    -------
    DataFrame, float64 [client, class]
        In logits; a column per class, "fc2.bias[c]".

    Raises
    ------
    CannotSay
        Where it abstains.

    Notes
    -----
    Under softmax cross-entropy and plain SGD the bias of class c moves by ::

        learning rate * sum over local steps of mean over the batch of (y_c - p_c)

    (label minus predicted probability [1]_), so a client with more labels c than the model predicts moves it up.
    Reading the bias for poisoned labels is due to [2]_.

    **Abstains** when fewer than 3 clients are comparable, or the model has no final bias.

    **Fails when** benign clients differ in their labels: it measures label conflict, and label skew is one. It also
    fades once the backdoor has been learned, since labels and predictions then agree.

    References
    ----------
    .. [1] Jebreel et al. 2022, arXiv:2207.01982, eq. (1).
    .. [2] Bilgin 2021, arXiv:2111.14683.

    Examples
    --------
    >>> from gradlens.examples import example_log
    >>> from gradlens.statistics import final_bias
    >>> bias = final_bias(example_log())
    >>> bias.loc["client-9"].idxmin(), bias.loc["client-9"].idxmax()  # it flips label 3 to label 1
    ('fc2.bias[3]', 'fc2.bias[1]')
    """
    round_ = cohort(log)
    layer = _final_bias(log)
    return table(round_, units(layer, log.model[layer].size), deviations(round_, layer))


def final_bias_deviation(log: UpdateLog, centre: Literal["mean", "median"] = "mean") -> pd.DataFrame:
    """The largest deviation, over the classes, of each client's final-layer bias from the cohort's center.

    Parameters
    ----------
    log : UpdateLog
        The rounds so far; the last one is judged.
    centre : {"mean", "median"}, default "mean"
        The cohort's center: the mean of the paper, which deviating clients move, or the median.

    Returns
    -------
    DataFrame, float64 [client, 1]
        In logits; the column is the bias's name, "fc2.bias".

    Raises
    ------
    CannotSay
        Where it abstains.
    InputError
        For another center.

    Notes
    -----
    Over the comparable clients j, with b the local biases or their updates, which gives the same [1]_::

        m_i = max over classes k of |mean over j of b_k(j) - b_k(i)|

    **Abstains** when fewer than 3 clients are comparable, or the model has no final bias.

    **Fails when** benign clients differ in their labels, as `final_bias` does, and when several attackers move the mean
    towards themselves.

    References
    ----------
    .. [1] Bilgin 2021, arXiv:2111.14683, as its notebook computes it.

    Examples
    --------
    >>> from gradlens.examples import example_log
    >>> from gradlens.statistics import final_bias_deviation
    >>> final_bias_deviation(example_log())["fc2.bias"].idxmax()
    'client-9'
    """
    if centre not in ("mean", "median"):
        raise InputError(f"final_bias_deviation: centre must be 'mean' or 'median', found {centre!r}")
    round_ = cohort(log)
    layer = _final_bias(log)
    bias = round_.flat(layer).astype(np.float64)
    center = np.mean if centre == "mean" else np.median
    with np.errstate(all="ignore"):  # only in rows that become NaN
        largest = np.abs(bias - center(bias[round_.comparable], axis=0)).max(axis=1)
    return table(round_, [layer], largest[:, None])


def final_bias_direction(log: UpdateLog) -> pd.DataFrame:
    """Which labels each client's final-layer bias pulls up and down, whatever the size of the pull.

    Parameters
    ----------
    log : UpdateLog
        The rounds so far; the last one is judged.

    Returns
    -------
    DataFrame, float64 [client, class]
        Rows of L2 norm 1, or of 0 where a client does not deviate; a column per class, "fc2.bias[c]".

    Raises
    ------
    CannotSay
        Where it abstains.

    Notes
    -----
    The deviation of `final_bias`, divided by its L2 norm.

    **Abstains** when fewer than 3 clients are comparable, or the model has no final bias.

    **Fails when** it is used to tell attackers from others: a client without any pull has a direction all the same,
    made of noise. It tells clients apart by label.

    Examples
    --------
    >>> from gradlens.examples import example_log
    >>> from gradlens.statistics import final_bias_direction
    >>> direction = final_bias_direction(example_log()).loc["client-9"]
    >>> direction.idxmin(), direction.idxmax()
    ('fc2.bias[3]', 'fc2.bias[1]')
    """
    round_ = cohort(log)
    layer = _final_bias(log)
    deviation = deviations(round_, layer)
    with np.errstate(all="ignore"):  # only in rows that become NaN
        norms = np.sqrt(np.einsum("kc,kc->k", deviation, deviation))[:, None]
        direction = ratio(deviation, norms)
    return table(round_, units(layer, log.model[layer].size), direction)


def final_rows(log: UpdateLog) -> pd.DataFrame:
    """How far each class's row of the final weight strays from the cohort's median row in the last round.

    Parameters
    ----------
    log : UpdateLog
        The rounds so far; the last one is judged.

    Returns
    -------
    DataFrame, float64 [client, class]
        L2 norms, in units of the weight; a column per class, "fc2.weight[c]".

    Raises
    ------
    CannotSay
        Where it abstains.

    Notes
    -----
    For class c with row W_c of the final weight's update::

        |W_c(i) - median over clients j of W_c(j)|_2

    **Abstains** when fewer than 3 clients are comparable, or the model has no final weight with a row per class.

    **Fails when** benign clients differ in their labels: rows move with label skew as they do with poison.

    Examples
    --------
    >>> from gradlens.examples import example_log
    >>> from gradlens.statistics import final_rows
    >>> final_rows(example_log()).max(axis=1).idxmax()
    'client-9'
    """
    round_ = cohort(log)
    layer = final_weight(log)
    classes = log.model.num_units(layer)
    rows = log.model.by_unit(layer, deviations(round_, layer))
    with np.errstate(all="ignore"):  # only in rows that become NaN
        return table(round_, units(layer, classes), np.sqrt(np.einsum("kci,kci->kc", rows, rows)))


def neup(log: UpdateLog) -> pd.DataFrame:
    """The share of each class in the energy of a client's final-layer update (DeepSight's NEUP).

    Parameters
    ----------
    log : UpdateLog
        The rounds so far; the last one is judged.

    Returns
    -------
    DataFrame, float64 [client, class]
        Shares that sum to 1 in each row; a column per class, "fc2.weight[c]".

    Raises
    ------
    CannotSay
        Where it abstains.

    Notes
    -----
    With db the bias's update (left out where there is none) and dW the weight's [1]_::

        E_c = (|db_c| + sum over h of |dW_ch|)^2,  NEUP_c = E_c / sum over classes of E

    An update of 0 prefers no class and has 1 / classes everywhere. The size of an update does not matter.

    **Abstains** when fewer than 3 clients are comparable, or the model has no final weight with a row for each of two
    classes or more.

    **Fails when** benign clients differ in their labels, or poisoned samples are so few that clean ones dominate the
    energy.

    References
    ----------
    .. [1] Rieger et al. 2022, NDSS, arXiv:2201.00763 (update energy, NEUP).

    Examples
    --------
    >>> from gradlens.examples import example_log
    >>> from gradlens.statistics import neup
    >>> neup(example_log()).sum(axis=1).round(6).unique().tolist()
    [1.0]
    """
    round_ = cohort(log)
    layer = final_weight(log)
    return table(round_, units(layer, log.model.num_units(layer)), _neup(log, round_))


def threshold_exceedings(log: UpdateLog) -> pd.DataFrame:
    """The number of classes that carry much of a client's final-layer update; few suggest training on few labels.

    Parameters
    ----------
    log : UpdateLog
        The rounds so far; the last one is judged.

    Returns
    -------
    DataFrame, float64 [client, 1]
        Whole numbers up to the number of classes; the column is the final weight's name.

    Raises
    ------
    CannotSay
        Where it abstains.

    Notes
    -----
    The number of classes c with (`neup`) ::

        NEUP_c > max(0.01, 1 / classes) * the client's largest NEUP

    where 0.01 and 1 / classes are the paper's [1]_.

    **Abstains** when fewer than 3 clients are comparable, or the model has no final weight with a row for each of two
    classes or more.

    **Fails when** the model has few classes, since a count is then coarse, and when benign clients hold few labels.

    References
    ----------
    .. [1] Rieger et al. 2022, NDSS, arXiv:2201.00763 (threshold exceedings).

    Examples
    --------
    >>> from gradlens.examples import example_log
    >>> from gradlens.statistics import threshold_exceedings
    >>> threshold_exceedings(example_log())["fc2.weight"].between(1, 4).all().item()
    True
    """
    round_ = cohort(log)
    energies = _neup(log, round_)
    share = max(SMALLEST_THRESHOLD, 1 / energies.shape[1])
    exceedings = (energies > share * energies.max(axis=1, keepdims=True)).sum(axis=1)
    return table(round_, [final_weight(log)], exceedings[:, None].astype(np.float64))


def ddif(log: UpdateLog, predict: Predict | None = None) -> pd.DataFrame:
    """How a client's model changes the probability of each class on random inputs (DeepSight's division differences).

    Parameters
    ----------
    log : UpdateLog
        The rounds so far; the last one is judged.
    predict : callable, optional
        Takes a model's state (layer -> array) and returns softmax outputs [sample, class]. It holds the model and its
        random inputs, the same ones in every call. DeepSight takes 20,000 inputs for each of 3 seeds and clusters
        each seed by itself: pass one ``partial(ddif, predict=...)`` per seed, or all inputs in one.

    Returns
    -------
    DataFrame, float64 [client, class]
        Ratios, 1 where the update changes nothing; a column per class, "fc2.weight[c]". NaN in the row of a client
        whose model answers with NaN.

    Raises
    ------
    CannotSay
        Where it abstains.
    InputError
        If `predict` returns no matrix with a column per class, numbers for the global model that are not finite, or
        another shape for a client.

    Notes
    -----
    With f_i the client's model (global model + update, buffers included) [1]_::

        DDif_c = mean over random inputs x of f_i(x)_c / f_global(x)_c

    Outputs below 1.2e-38, the smallest normal number of float32, count as that.

    **Abstains** when fewer than 3 clients are comparable, without `predict`, when the model has no final weight with a
    row per class, or when not all numbers of the updates were recorded.

    **Fails when** random inputs do not reach what a trigger reaches, and when benign clients differ in their labels.

    References
    ----------
    .. [1] Rieger et al. 2022, NDSS, arXiv:2201.00763 (division differences).

    Examples
    --------
    >>> import numpy as np
    >>> from gradlens.examples import example_log
    >>> from gradlens.statistics import ddif
    >>> hidden = np.random.default_rng(0).random((50, 8))
    >>> def predict(state):
    ...     odds = np.exp(hidden @ state["fc2.weight"].T + state["fc2.bias"])
    ...     return odds / odds.sum(axis=1, keepdims=True)
    >>> ddif(example_log(), predict=predict).shape
    (10, 4)
    """
    round_ = cohort(log)
    if predict is None:
        raise CannotSay("ddif needs predict, a function of a model's state that gives its softmax outputs")
    if not round_.is_whole:
        raise CannotSay("ddif needs the clients' models, of which not everything was recorded")
    layer = final_weight(log)
    classes = log.model.num_units(layer)
    before = np.asarray(predict(round_.global_model), np.float64)
    if before.ndim != 2 or before.shape[1] != classes or not np.isfinite(before).all() or not len(before):
        raise InputError(f"ddif: predict must give finite probabilities [sample, {classes}], found {before.shape}")
    values = np.full((len(round_), classes), np.nan)
    for row in np.flatnonzero(round_.comparable).tolist():
        after = np.asarray(predict(_local_model(round_, row)), np.float64)
        if after.shape != before.shape:
            raise InputError(f"ddif: predict gave {before.shape} for the global model, {after.shape} for a client")
        with np.errstate(all="ignore"):  # NaN stays in the row of the client that caused it
            ratios = np.maximum(after, SMALLEST_PROBABILITY) / np.maximum(before, SMALLEST_PROBABILITY)
            values[row] = ratios.mean(axis=0)
    return table(round_, units(layer, classes), values)


def final_spectrum(log: UpdateLog, share: float = 0.5) -> pd.DataFrame:
    """The share of low frequencies in the energy of a client's final-layer update.

    Parameters
    ----------
    log : UpdateLog
        The rounds so far; the last one is judged.
    share : float, default 0.5
        How much of the frequencies counts as low, rounded down, at least one of them; the low half is FreqFed's [1]_.

    Returns
    -------
    DataFrame, float64 [client, 1]
        From 0 to 1, about `share` for white noise, 0 for an update of 0; the column is the final weight's name.

    Raises
    ------
    CannotSay
        Where it abstains.
    InputError
        Unless `share` lies between 0 and 1.

    Notes
    -----
    The final weight, flattened row by row and followed by the final bias, if there is one, goes through an orthonormal
    type-II discrete cosine transform; energy is the sum of squares. FreqFed looks at the final layer only, too: it
    clusters the low half of the frequencies of the local weights there, which this sums up in one number.

    **Abstains** when fewer than 3 clients are comparable, or the model has no final weight with a row per class.

    **Fails when** malicious updates have the spectrum of benign ones, as those of most label flips nearly do: it is one
    number where FreqFed compares whole spectra.

    References
    ----------
    .. [1] Fereidooni et al. 2024, NDSS, arXiv:2312.04432.

    Examples
    --------
    >>> from gradlens.examples import example_log
    >>> from gradlens.statistics import final_spectrum
    >>> final_spectrum(example_log())["fc2.weight"].between(0, 1).all().item()
    True
    """
    if not 0 < share < 1:
        raise InputError(f"final_spectrum: share must lie between 0 and 1, found {share!r}")
    from scipy.fft import dct

    round_ = cohort(log)
    weight = final_weight(log)
    layers = [weight] if log.model.final_bias is None else [weight, log.model.final_bias]
    values = np.full((len(round_), 1), np.nan)
    for row in np.flatnonzero(round_.comparable).tolist():
        parts = [log.model.by_unit(layer, round_.flat(layer)[row]).reshape(-1) for layer in layers]
        numbers = np.concatenate(parts).astype(np.float64)
        energy = np.square(np.asarray(dct(numbers, type=2, norm="ortho")))
        total = energy.sum()
        values[row] = energy[: max(1, int(share * len(energy)))].sum() / total if total > 0 else 0
    return table(round_, [weight], values)


def _final_bias(log: UpdateLog) -> str:
    if log.model.final_bias is None:
        raise CannotSay("the model has no final bias; final_rows looks at the final weight instead")
    return log.model.final_bias


def final_weight(log: UpdateLog) -> str:
    """The name of the final weight; raises CannotSay where there is none with a row per class."""
    weight = log.model.final_weight
    if weight is None:
        raise CannotSay("the model has no final weight (a layer of two or more dimensions) that is known as such")
    if len(log.model[weight].shape) < 2:
        raise CannotSay(f"the final weight {weight!r} was recorded as one sketch, without a row for each class")
    return weight


def _neup(log: UpdateLog, round_: Round) -> np.ndarray:
    """Normalized update energies, float64 [client, class]; NaN or infinite where a client is not comparable."""
    weight, bias = final_weight(log), log.model.final_bias
    if log.model.num_units(weight) < 2:
        raise CannotSay(f"the final layer {weight!r} has one output, whose share is always 1")
    with np.errstate(all="ignore"):
        rows = log.model.by_unit(weight, np.abs(round_.flat(weight))).astype(np.float64)
        size = rows.sum(axis=2)
        if bias is not None:
            size += np.abs(round_.flat(bias))
        largest = size.max(axis=1, keepdims=True)
        energies = np.where(largest > 0, size / largest, 1) ** 2  # of 1 at most, so that no square is lost
        return energies / energies.sum(axis=1, keepdims=True)


def _local_model(round_: Round, row: int) -> dict[str, np.ndarray]:
    """The state that a client sent: global model + update, in the global model's dtypes."""
    return {
        name: (before + round_.updates[name][row]).astype(before.dtype) for name, before in round_.global_model.items()
    }
