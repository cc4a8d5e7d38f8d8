"""Localisation: in which layer, unit and class poisoned updates differ from benign ones, and how surely.

An update's feature counts by how unusual it is in its round: |robust z| among that round's comparable clients.
"""

from gradlens.localize.runs import localize
from gradlens.localize.sweep import PHASES, localize_rounds, localize_sweep
from gradlens.localize.unusual import LOCATED_BY, Unusual, unusual

__all__ = ["LOCATED_BY", "PHASES", "Unusual", "localize", "localize_rounds", "localize_sweep", "unusual"]
