"""ByzFL's robust aggregators on one round of updates: python byzfl_rules.py COHORT REPEATS.

Each rule is given the updates as numpy and as torch, and the faster counts. ByzFL imports torchvision for data sets
that are not used here; an empty module stands in for it. A fifth of the clients is taken as malicious.
"""

import json
import sys
from unittest.mock import MagicMock

for name in ("torchvision", "torchvision.datasets", "torchvision.models", "torchvision.transforms"):
    sys.modules[name] = MagicMock()

import byzfl  # noqa: E402
import torch  # noqa: E402
from workloads import fastest, updates_of  # noqa: E402

cohort, repeats = sys.argv[1], int(sys.argv[2])
updates = updates_of(cohort)
tensor, malicious = torch.from_numpy(updates), len(updates) // 5
rules = {
    "krum": byzfl.Krum(malicious),
    "multi_krum": byzfl.MultiKrum(malicious),
    "median": byzfl.Median(),
    "trimmed_mean": byzfl.TrMean(malicious),
    "geometric_median": byzfl.GeometricMedian(),
}
seconds = {
    name: min(fastest(lambda rule=rule, sent=sent: rule(sent), repeats) for sent in (updates, tensor))
    for name, rule in rules.items()
}
print(json.dumps(seconds))
