"""Aggregators: a log -> the aggregated update of its last round; `filtered` lets a detector decide who enters.

Sums are formed in float64 in the order of the clients' names, so that the order of arrival changes no bit. A client
that sent a number that is not finite never enters; without any client the update is zero. Buffers are averaged over the
clients that enter.

`num_malicious` is how many malicious clients a rule tolerates; None means the most that it can for the cohort. A cohort
that is too small for the number, because a client was refused or sent NaN, is treated as with None.
"""

from collections.abc import Callable, Mapping

from gradlens.aggregators.compositions import bucketing, clipped, nearest_neighbour_mixing, noised
from gradlens.aggregators.filters import Decision, FilteredAggregator, FilterStopped, calibrated_filter, filtered
from gradlens.aggregators.published_rules import centred_clipping, crfl, flame, norm_clipping, weak_dp
from gradlens.aggregators.rules import Aggregator, geometric_median, mean, median, rlr, step, trimmed_mean
from gradlens.aggregators.selection import RULES, bulyan, krum, multi_krum

__all__ = [
    "AGGREGATORS",
    "RULES",
    "Aggregator",
    "Decision",
    "FilterStopped",
    "FilteredAggregator",
    "bucketing",
    "bulyan",
    "calibrated_filter",
    "centred_clipping",
    "clipped",
    "crfl",
    "filtered",
    "flame",
    "geometric_median",
    "krum",
    "mean",
    "median",
    "multi_krum",
    "nearest_neighbour_mixing",
    "noised",
    "norm_clipping",
    "rlr",
    "step",
    "trimmed_mean",
    "weak_dp",
]

AGGREGATORS: Mapping[str, Callable[..., Aggregator]] = {
    **RULES,
    "centred_clipping": centred_clipping,
    "norm_clipping": norm_clipping,
    "weak_dp": weak_dp,
    "nearest_neighbour_mixing": nearest_neighbour_mixing,
    "bucketing": bucketing,
    "flame": flame,
    "crfl": crfl,
}
