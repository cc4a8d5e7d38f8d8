"""Statistics of every layer in one round: size, direction, shape, and who lies near whom."""

import numpy as np
import pandas as pd

from gradlens.log import Round, UpdateLog
from gradlens.statistics.cohort import cohort, table


def layer_norms(log: UpdateLog) -> pd.DataFrame:
    """L2 norm of each client's update in the last round, layer by layer.

    Returns: float64 [client, layer], in units of the weights. Raises: CannotSay below 3 comparable clients.
    """
    round_ = cohort(log)
    return table(round_, log.model.parameters, np.stack([round_.norms[n] for n in log.model.parameters], axis=1))


def layer_cosines(log: UpdateLog) -> pd.DataFrame:
    """Cosine of each client's update to the coordinate-wise median of the cohort's, layer by layer.

    Returns: float64 [client, layer], from -1 to 1; 0 where either norm is 0.
    Raises: CannotSay below 3 comparable clients.
    """
    round_ = cohort(log)
    cosines = [_cosines(round_, name) for name in log.model.parameters]
    return table(round_, log.model.parameters, np.stack(cosines, axis=1))


def _cosines(round_: Round, layer: str) -> np.ndarray:
    median = round_.median[layer].reshape(-1).astype(np.float64)
    dots, start = np.zeros(len(round_)), 0
    with np.errstate(all="ignore"):  # in the rows that become NaN
        for block in round_.blocks(layer):
            dots += block.astype(np.float64) @ median[start : start + block.shape[1]]
            start += block.shape[1]
        norms = round_.norms[layer] * np.sqrt(median @ median)
        return np.divide(dots, norms, out=np.zeros_like(dots), where=norms > 0)
