"""Statistics of the final layer: what a client's update says about labels."""

from collections.abc import Callable, Mapping
from typing import Literal

import numpy as np
import pandas as pd

from gradlens.errors import CannotSay, InputError
from gradlens.log import Round, UpdateLog
from gradlens.statistics.cohort import cohort, deviations, table, units

Predict = Callable[[Mapping[str, np.ndarray]], np.ndarray]  # a model's state -> probabilities [sample, class]

SMALLEST_PROBABILITY = float(np.finfo(np.float32).tiny)  # below it a softmax in float32 is 0
SMALLEST_THRESHOLD = 0.01  # of the largest NEUP, by DeepSight


def final_bias(log: UpdateLog) -> pd.DataFrame:
    """Each client's final-layer bias update in the last round, minus the cohort's median.

    Under softmax cross-entropy and plain SGD the bias of class c moves by learning rate x sum over steps of
    mean(y_c - p_c): a client with more labels c than the model predicts moves it up. It measures label conflict,
    so a label-skewed benign client moves it too.
    Returns: float64 [client, class] in logits, a column per class, "fc2.bias[c]".
    Raises: CannotSay below 3 comparable clients, or if the model has no final bias.
    Source: Bilgin 2021, arXiv:2111.14683; the identity is Jebreel et al. 2022, arXiv:2207.01982, eq. (1).
    """
    round_ = cohort(log)
    layer = _final_bias(log)
    return table(round_, units(layer, log.model[layer].size), deviations(round_, layer))


def final_bias_deviation(log: UpdateLog, centre: Literal["mean", "median"] = "mean") -> pd.DataFrame:
    """The largest deviation of each client's final-layer bias from the cohort's, over the classes.

    m_i = max over classes k of |centre over clients j of b_k(j) - b_k(i)|, over the comparable clients; of local biases
    or of their updates, which is the same.
    centre: "mean", the paper's, which the deviating clients move, or "median".
    Returns: float64 [client, 1] in logits; the column is the bias's name, "fc2.bias".
    Raises: CannotSay below 3 comparable clients, or if the model has no final bias; InputError for another centre.
    Source: Bilgin 2021, arXiv:2111.14683, as its notebook computes it.
    """
    if centre not in ("mean", "median"):
        raise InputError(f"final_bias_deviation: centre must be 'mean' or 'median', found {centre!r}")
    round_ = cohort(log)
    layer = _final_bias(log)
    bias = round_.flat(layer).astype(np.float64)
    middle = np.mean if centre == "mean" else np.median
    with np.errstate(all="ignore"):  # in the rows that become NaN
        largest = np.abs(bias - middle(bias[round_.comparable], axis=0)).max(axis=1)
    return table(round_, [layer], largest[:, None])


def final_bias_direction(log: UpdateLog) -> pd.DataFrame:
    """Which labels each client's final-layer bias pulls up and down, whatever the size of the pull.

    The deviation from the cohort's median bias (`final_bias`), divided by its L2 norm. Clients without a pull of their
    own have one all the same, made of noise: it tells clients apart by label, not attackers from others.
    Returns: float64 [client, class], rows of norm 1, 0 where there is no deviation; a column per class, "fc2.bias[c]".
    Raises: CannotSay below 3 comparable clients, or if the model has no final bias.
    """
    round_ = cohort(log)
    layer = _final_bias(log)
    deviation = deviations(round_, layer)
    with np.errstate(all="ignore"):  # in the rows that become NaN
        norms = np.sqrt(np.einsum("kc,kc->k", deviation, deviation))[:, None]
        direction = np.divide(deviation, norms, out=np.zeros_like(deviation), where=norms > 0)
    return table(round_, units(layer, log.model[layer].size), direction)


def final_rows(log: UpdateLog) -> pd.DataFrame:
    """How far each class's row of the final weight strays from the cohort's median row in the last round.

    Returns: float64 [client, class], L2 norms in units of the weight, a column per class, "fc2.weight[c]".
    Raises: CannotSay below 3 comparable clients, or if the model has no final weight.
    """
    round_ = cohort(log)
    layer = final_weight(log)
    classes = log.model[layer].shape[0]
    rows = deviations(round_, layer).reshape(len(round_), classes, -1)
    with np.errstate(all="ignore"):  # in the rows that become NaN
        return table(round_, units(layer, classes), np.sqrt(np.einsum("kci,kci->kc", rows, rows)))


def neup(log: UpdateLog) -> pd.DataFrame:
    """DeepSight's normalised update energy of each class: its share of the energy of a client's final-layer update.

    E_c = (|db_c| + sum over h of |dW_ch|)^2, NEUP_c = E_c / sum over classes of E; a row sums to 1, whatever the
    size of the update. Without a final bias the weight's part alone. An update of 0 prefers no class: 1 / classes each.
    Returns: float64 [client, class], a column per class, "fc2.weight[c]".
    Raises: CannotSay below 3 comparable clients, or if the model has no final weight.
    Source: Rieger et al. 2022, NDSS, arXiv:2201.00763 (update energy, NEUP).
    """
    round_ = cohort(log)
    layer = final_weight(log)
    return table(round_, units(layer, log.model[layer].shape[0]), _neup(log, round_))


def threshold_exceedings(log: UpdateLog) -> pd.DataFrame:
    """DeepSight's count of the classes on which a client's final-layer update really works: few suggest few labels.

    TE_i = number of classes c with NEUP_c > max(0.01, 1 / classes) x the client's largest NEUP (`neup`). A count is
    coarse where classes are few.
    Returns: float64 [client, 1], whole numbers up to the number of classes; the column is the weight's name.
    Raises: CannotSay below 3 comparable clients, or if the model has no final weight.
    Source: Rieger et al. 2022, NDSS, arXiv:2201.00763 (threshold exceedings); 0.01 and 1 / classes are its.
    """
    round_ = cohort(log)
    energies = _neup(log, round_)
    share = max(SMALLEST_THRESHOLD, 1 / energies.shape[1])
    exceedings = (energies > share * energies.max(axis=1, keepdims=True)).sum(axis=1)
    return table(round_, [final_weight(log)], exceedings[:, None].astype(np.float64))


def ddif(log: UpdateLog, predict: Predict | None = None) -> pd.DataFrame:
    """DeepSight's division differences: how much more probable than the global model a client's makes each class.

    DDif_c = mean over random inputs x of f_i(x)_c / f_global(x)_c, where f_i is the client's local model (global +
    update, buffers too). Softmax outputs below 1.2e-38, float32's smallest normal number, count as that.
    predict: layer -> array in, probabilities [sample, class] out; the caller's function holds the model and its
    random inputs, the same in every call. DeepSight takes 20,000 inputs for each of 3 seeds and clusters each seed
    apart: one `partial(ddif, predict=...)` per seed, or all inputs in one.
    Returns: float64 [client, class], ratios, 1 where the update changes nothing; a column per class, "fc2.weight[c]".
    A client whose model answers with NaN has a row of NaN.
    Raises: CannotSay below 3 comparable clients, without `predict`, or if the model has no final weight; InputError
    where `predict` gives no matrix of a column per class, NaN for the global model, or another shape for a client.
    Source: Rieger et al. 2022, NDSS, arXiv:2201.00763 (division differences).
    """
    round_ = cohort(log)
    if predict is None:
        raise CannotSay("ddif needs predict, a function of a model's state that gives its softmax outputs")
    if not round_.is_whole:
        raise CannotSay("ddif needs the clients' models, of which not everything was recorded")
    layer = final_weight(log)
    classes = log.model[layer].shape[0]
    before = np.asarray(predict(round_.global_model), np.float64)
    if before.ndim != 2 or before.shape[1] != classes or not np.isfinite(before).all() or not len(before):
        raise InputError(f"ddif: predict must give finite probabilities [sample, {classes}], found {before.shape}")
    values = np.full((len(round_), classes), np.nan)
    for row in np.flatnonzero(round_.comparable).tolist():
        after = np.asarray(predict(_local_model(round_, row)), np.float64)
        if after.shape != before.shape:
            raise InputError(f"ddif: predict gave {before.shape} for the global model, {after.shape} for a client")
        with np.errstate(all="ignore"):  # a client's NaN is its own
            ratios = np.maximum(after, SMALLEST_PROBABILITY) / np.maximum(before, SMALLEST_PROBABILITY)
            values[row] = ratios.mean(axis=0)
    return table(round_, units(layer, classes), values)


def final_spectrum(log: UpdateLog, share: float = 0.5) -> pd.DataFrame:
    """Share of the energy of a client's final-layer update that lies in its low frequencies.

    The final weight, flattened row by row, and the final bias after it, if there is one, go through an orthonormal
    type-II discrete cosine transform; energy is the sum of squares. The final layer only, as FreqFed does: it
    clusters the low half of the frequencies of the local weights there, which this sums up in one number.
    share: of the frequencies, from the lowest up, rounded down, at least one; the low half is FreqFed's.
    Returns: float64 [client, 1], from 0 to 1, `share` for white noise, 0 for an update of 0; the column is the
    weight's name.
    Raises: CannotSay below 3 comparable clients, or if the model has no final weight; InputError unless 0 < share < 1.
    Source: Fereidooni et al. 2024, NDSS, arXiv:2312.04432.
    """
    if not 0 < share < 1:
        raise InputError(f"final_spectrum: share must lie between 0 and 1, found {share!r}")
    from scipy.fft import dct

    round_ = cohort(log)
    weight = final_weight(log)
    layers = [weight] if log.model.final_bias is None else [weight, log.model.final_bias]
    values = np.full((len(round_), 1), np.nan)
    for row in np.flatnonzero(round_.comparable).tolist():
        numbers = np.concatenate([round_.flat(layer)[row] for layer in layers]).astype(np.float64)
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
        raise CannotSay("the model has no final weight (a layer of two or more dimensions)")
    if len(log.model[weight].shape) < 2:
        raise CannotSay(f"the final weight {weight!r} was recorded as one sketch, without a row for each class")
    return weight


def _neup(log: UpdateLog, round_: Round) -> np.ndarray:
    """Normalised update energies, float64 [client, class]; NaN or infinite where a client is not comparable."""
    weight, bias = final_weight(log), log.model.final_bias
    classes = log.model[weight].shape[0]
    with np.errstate(all="ignore"):
        rows = np.abs(round_.flat(weight)).reshape(len(round_), classes, -1).astype(np.float64)
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
