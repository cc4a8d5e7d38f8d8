"""Statistics: a log -> a table [client, feature] of measurements in its last round.

A feature is named after its layer, "fc1.weight", or after one unit of it, "fc2.bias[2]". Rows of clients that are not
comparable (`Round.comparable`) are NaN, and no median, mean or spread rests on them. A statistic without an answer
raises `CannotSay` with the reason.
"""

from collections.abc import Mapping

from gradlens.statistics.accumulation import (
    accumulated_neighbours,
    accumulated_norms,
    accumulated_spectral,
    label_drift_residual,
    persistence,
)
from gradlens.statistics.adapters import adapter_angles, adapter_rank, adapter_share
from gradlens.statistics.cohort import Statistic
from gradlens.statistics.final_layer import (
    ddif,
    final_bias,
    final_bias_deviation,
    final_bias_direction,
    final_rows,
    final_spectrum,
    neup,
    threshold_exceedings,
)
from gradlens.statistics.layers import (
    global_cosines,
    kurtosis,
    large_share,
    layer_cosines,
    layer_norms,
    sign_agreement,
)
from gradlens.statistics.over_rounds import accomplices, consistency
from gradlens.statistics.pairs import aggregate_cosines, neighbour_cosines, neighbour_distances, spectral
from gradlens.statistics.prediction import prediction_residual

__all__ = [
    "STATISTICS",
    "Statistic",
    "accomplices",
    "accumulated_neighbours",
    "accumulated_norms",
    "accumulated_spectral",
    "adapter_angles",
    "adapter_rank",
    "adapter_share",
    "aggregate_cosines",
    "consistency",
    "ddif",
    "final_bias",
    "final_bias_deviation",
    "final_bias_direction",
    "final_rows",
    "final_spectrum",
    "global_cosines",
    "kurtosis",
    "label_drift_residual",
    "large_share",
    "layer_cosines",
    "layer_norms",
    "neighbour_cosines",
    "neighbour_distances",
    "neup",
    "persistence",
    "prediction_residual",
    "sign_agreement",
    "spectral",
    "threshold_exceedings",
]

STATISTICS: Mapping[str, Statistic] = {
    # the final layer
    "final_bias": final_bias,
    "final_bias_deviation": final_bias_deviation,
    "final_bias_direction": final_bias_direction,
    "final_rows": final_rows,
    "neup": neup,
    "threshold_exceedings": threshold_exceedings,
    "ddif": ddif,
    "final_spectrum": final_spectrum,
    # every layer, in one round
    "layer_norms": layer_norms,
    "layer_cosines": layer_cosines,
    "aggregate_cosines": aggregate_cosines,
    "global_cosines": global_cosines,
    "sign_agreement": sign_agreement,
    "large_share": large_share,
    "kurtosis": kurtosis,
    "spectral": spectral,
    "neighbour_distances": neighbour_distances,
    "neighbour_cosines": neighbour_cosines,
    # over a client's rounds
    "accumulated_norms": accumulated_norms,
    "accumulated_spectral": accumulated_spectral,
    "accumulated_neighbours": accumulated_neighbours,
    "accomplices": accomplices,
    "label_drift_residual": label_drift_residual,
    "consistency": consistency,
    "persistence": persistence,
    "prediction_residual": prediction_residual,
}
