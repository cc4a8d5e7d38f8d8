"""Statistics of the final layer: what a client's update says about labels."""

import numpy as np
import pandas as pd

from gradlens.log import CannotSay, UpdateLog
from gradlens.statistics.cohort import cohort, deviations, table, units


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
    layer = log.model.final_bias
    if layer is None:
        raise CannotSay("the model has no final bias; final_rows looks at the final weight instead")
    return table(round_, units(layer, log.model[layer].size), deviations(round_, layer))


def final_rows(log: UpdateLog) -> pd.DataFrame:
    """How far each class's row of the final weight strays from the cohort's median row in the last round.

    Returns: float64 [client, class], L2 norms in units of the weight, a column per class, "fc2.weight[c]".
    Raises: CannotSay below 3 comparable clients, or if the model has no final weight.
    """
    round_ = cohort(log)
    layer = log.model.final_weight
    if layer is None:
        raise CannotSay("the model has no final weight (a layer of two or more dimensions)")
    classes = log.model[layer].shape[0]
    rows = deviations(round_, layer).reshape(len(round_), classes, -1)
    with np.errstate(all="ignore"):  # in the rows that become NaN
        return table(round_, units(layer, classes), np.sqrt(np.einsum("kci,kci->kc", rows, rows)))
