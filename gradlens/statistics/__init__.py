"""Statistics: what of a log's last round is measured, a table [client, feature].

A feature is named after its layer, "fc1.weight", or after one unit of it, "fc2.bias[2]". Rows of clients that
are not comparable (`Round.comparable`) are NaN, and no reference rests on them.
"""

from collections.abc import Mapping

from gradlens.log import CannotSay
from gradlens.statistics.cohort import Statistic
from gradlens.statistics.final_layer import final_bias, final_rows
from gradlens.statistics.history import accumulated_norms
from gradlens.statistics.layers import layer_cosines, layer_norms

__all__ = [
    "STATISTICS",
    "CannotSay",
    "Statistic",
    "accumulated_norms",
    "final_bias",
    "final_rows",
    "layer_cosines",
    "layer_norms",
]

STATISTICS: Mapping[str, Statistic] = {
    "final_bias": final_bias,
    "final_rows": final_rows,
    "layer_norms": layer_norms,
    "layer_cosines": layer_cosines,
    "accumulated_norms": accumulated_norms,
}
