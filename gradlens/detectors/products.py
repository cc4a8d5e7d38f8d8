"""Detectors in front of low-rank adapters: they judge what a client changed, not its two factors."""

from dataclasses import dataclass

from gradlens.detectors.verdict import Detector, Verdict
from gradlens.log import UpdateLog
from gradlens.log.adapters import with_products

__all__ = ["on_products"]


def on_products(detector: Detector) -> Detector:
    """A detector that judges each adapter of a live cohort by the product of its two layers.

    Parameters
    ----------
    detector : Detector

    Returns
    -------
    Detector
        For a filter of a server, whose log holds A and B as they are aggregated. `detect` and `investigate` read
        products by themselves.

    Notes
    -----
    The same change has many pairs of A and B; see `gradlens.log.adapters`.

    **Abstains** and **fails when** the detector does.

    Examples
    --------
    >>> from gradlens import DETECTORS
    >>> from gradlens.detectors.products import on_products
    >>> on_products(DETECTORS["layer_norms"]())
    on_products(score_by(layer_norms, robust_zscore, threshold=3.5))
    """
    return _OnProducts(detector)


@dataclass(frozen=True)
class _OnProducts:
    detector: Detector

    def __call__(self, log: UpdateLog) -> Verdict:
        return with_products(log).verdict(self.detector)

    def __repr__(self) -> str:
        return f"on_products({self.detector!r})"
