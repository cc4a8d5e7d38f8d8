"""Localization: in which layer, unit and class poisoned updates differ from benign ones, and how certain that is.

Every feature of an update is measured by how unusual it is in its round: |robust z| among the comparable clients.
"""

from gradlens.localization.outliers import LOCATED_BY, Unusual, unusual
from gradlens.localization.over_runs import localize
from gradlens.localization.over_sweeps import PHASES, localize_rounds, localize_sweep

__all__ = ["LOCATED_BY", "PHASES", "Unusual", "localize", "localize_rounds", "localize_sweep", "unusual"]
