"""Statistics over a client's rounds: what adds up, what repeats, what was to be expected."""

import numpy as np
import pandas as pd

from gradlens.log import CannotSay, UpdateLog
from gradlens.statistics.cohort import cohort, table


def accumulated_norms(log: UpdateLog) -> pd.DataFrame:
    """L2 norm of what each client of the last round has added up to so far, layer by layer.

    The norm of the sum of its residuals (`Accumulated`), divided by the root of the rounds it took part in: the
    noise of local training keeps this constant, a systematic pull lets it grow with that root.
    Returns: float64 [client, layer], in units of the weights.
    Raises: CannotSay below 3 comparable clients, or before half of them have taken part twice: until then nothing
    has added up.
    """
    round_ = cohort(log)
    accumulated = log.accumulated
    rows = accumulated.of(round_.clients)
    rounds = np.maximum(accumulated.rounds[rows], 1)  # 0 for those that never sent a finite update
    if np.median(rounds[round_.comparable]) < 2:
        raise CannotSay(f"by round {round_.index} most of its clients have taken part once, twice is needed")
    sums = [accumulated.sums[name][rows] for name in log.model.parameters]
    norms = [np.sqrt(np.einsum("ki,ki->k", s, s, dtype=np.float64) / rounds) for s in sums]
    return table(round_, log.model.parameters, np.stack(norms, axis=1))
