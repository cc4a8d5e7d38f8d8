"""Localisation: in which layer, unit and class poisoned updates differ from benign ones, and how surely.

An update's feature counts by how unusual it is in its round: |robust z| among that round's comparable clients.
"""

from gradlens.localization.outliers import LOCATED_BY, Unusual, unusual
from gradlens.localization.over_runs import localize
from gradlens.localization.over_sweeps import PHASES, localize_rounds, localize_sweep

__all__ = ["LOCATED_BY", "PHASES", "Unusual", "localize", "localize_rounds", "localize_sweep", "unusual"]
