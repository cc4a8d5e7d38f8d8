"""Detectors: a log -> a verdict on the clients of its last round.

`score_by` makes one of any statistic and any scorer, `calibrate` sets its threshold by a named null,
`detect` asks several after every round of a log.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from scipy.special import ndtri

from gradlens.errors import CannotSay, InputError
from gradlens.log import Round, UpdateLog
from gradlens.scorers import Scorer, robust_zscore
from gradlens.statistics import Statistic

__all__ = ["TEXTBOOK", "Detector", "Verdict", "calibrate", "detect", "score_by", "verdict_on"]

TEXTBOOK = 3.5  # Iglewicz & Hoaglin 1993, for one feature; the largest of several passes it more often


@dataclass(frozen=True, eq=False)
class Verdict:
    """What a detector says of the clients of one round: of those recorded, in the round's order, then the refused.

    scores: float64 [client], higher = more suspicious; flags: bool [client]; evidence: what the score was made of
    [recorded client, feature]; weights: float64 [client], of soft verdicts; abstained: why there is no verdict:
    the comparable clients then score 0 and are not flagged; null: what the threshold rests on.
    Clients that were refused or are not comparable score +inf and are flagged in every verdict.
    """

    clients: np.ndarray
    scores: np.ndarray
    flags: np.ndarray
    weights: np.ndarray | None = None
    evidence: pd.DataFrame | None = None
    abstained: str = ""
    null: str = ""

    def table(self, round_: int, detector: str) -> pd.DataFrame:
        """The verdict as rows round, client, detector, score, flag, abstained."""
        return _rows([(round_, detector, self.clients, self.scores, self.flags, self.abstained)])


Detector = Callable[[UpdateLog], Verdict]


def score_by(statistic: Statistic, scorer: Scorer, threshold: float) -> Detector:
    """The detector that flags whoever the scorer gives more than `threshold` on the statistic's table.

    threshold: in the scorer's units, uncalibrated: see `calibrate`. The detector abstains where the statistic
    cannot say. Raises: InputError, when called, if the scorer does not give one number per client.
    """
    return ScoreDetector(statistic, scorer, float(threshold))


@dataclass(frozen=True)
class ScoreDetector:
    """What `score_by` builds."""

    statistic: Statistic
    scorer: Scorer
    threshold: float

    def __call__(self, log: UpdateLog) -> Verdict:
        round_ = log[-1]
        try:
            features = log.remembered(self.statistic)
            scores = np.asarray(self.scorer(features), dtype=np.float64)
        except CannotSay as reason:
            return verdict_on(round_, np.zeros(len(round_)), np.inf, abstained=str(reason), null=self._null)
        if scores.shape != (len(round_),) or np.isnan(scores).any():
            raise InputError(f"{self!r} must give one number per client, {len(round_)}, found {scores}")
        return verdict_on(round_, scores, self.threshold, evidence=features, null=self._null)

    @property
    def _null(self) -> str:
        textbook = self.scorer is robust_zscore and self.threshold == TEXTBOOK
        return f"uncalibrated: {'textbook' if textbook else 'threshold'} {self.threshold:g}"

    def __repr__(self) -> str:
        return f"score_by({_name(self.statistic)}, {_name(self.scorer)}, threshold={self.threshold:g})"


def calibrate(detector: Detector, null: Any = None, fpr: float = 0.05) -> Detector:
    """The same detector with its threshold set so that a share `fpr` of benign updates is flagged.

    null: in order of preference, attack-free logs or runs of other seeds (a sequence); a stretch of a log that is
    declared clean (an `UpdateLog`), or the first rounds of whatever log is asked about (their number), in which nobody
    is flagged for a score: a live filter's shadow mode; or None, each cohort itself, its majority taken as benign.
    But for None the threshold is a rank of the m scores found there, the k-th smallest with k = ceil((m + 1)(1 - fpr)):
    an update exchangeable with them passes it with probability at most `fpr`. With None it is the median
    + the normal quantile x 1.4826 MAD of the cohort's scores: then the rate is nominal.
    Raises: InputError where the null has too few scores for `fpr` (after too few first rounds the detector abstains),
    or its truth knows of a poisoned update.
    """
    if not 0 < fpr < 1:
        raise InputError(f"fpr is a rate above 0 and below 1, found {fpr}")
    if isinstance(null, int):
        if isinstance(null, bool) or null < 1:
            raise InputError(f"a null of first rounds is a number of them, at least 1, found {null}")
        return ShadowedDetector(detector, null, fpr)
    if null is None:
        basis = f"nominal {fpr:g}: each cohort itself, its majority taken as benign"
        return CalibratedDetector(detector, None, fpr, basis)
    if isinstance(null, UpdateLog):
        logs, what = [null], f"declared clean: {_stretch(null)}"
    else:
        logs = [_attack_free(source) for source in ([null] if hasattr(null, "log") else null)]
        what = f"attack-free: {len(logs)} run{'s' if len(logs) != 1 else ''}"
    fit = getattr(detector, "fitted", None)  # a panel learns from the null more than where to cut
    if fit is not None:
        detector, scores = fit(logs)
    else:
        scores = np.concatenate([np.zeros(0), *(_null_scores(detector, log) for log in logs)])
    return CalibratedDetector(
        detector, rank_threshold(scores, fpr, what), fpr, f"{what}, {len(scores)} scores, fpr {fpr:g}"
    )


@dataclass(frozen=True)
class CalibratedDetector:
    """What `calibrate` builds; threshold: None where each cohort sets its own."""

    detector: Detector
    threshold: float | None
    fpr: float
    null: str

    def __call__(self, log: UpdateLog) -> Verdict:
        verdict = log.verdict(self.detector)
        if verdict.abstained:
            return replace(verdict, null=self.null)
        threshold = nominal_threshold(verdict.scores, self.fpr) if self.threshold is None else self.threshold
        flags = (verdict.scores > threshold) | np.isposinf(verdict.scores)
        return replace(verdict, flags=flags, null=self.null)

    def __repr__(self) -> str:
        threshold = "" if self.threshold is None else f", threshold={self.threshold:g}"
        return f"calibrate({self.detector!r}, null={self.null!r}, fpr={self.fpr:g}{threshold})"


@dataclass(frozen=True)
class ShadowedDetector:
    """What `calibrate` builds of a number of first rounds."""

    detector: Detector
    rounds: int
    fpr: float

    def __call__(self, log: UpdateLog) -> Verdict:
        if len(log) <= self.rounds:
            verdict, null = log.verdict(self.detector), f"none yet: the first {self.rounds} rounds are its null"
            return replace(verdict, flags=np.isposinf(verdict.scores), null=null)
        try:
            calibrated = log[: self.rounds].remembered(_Calibration(self.detector, self.fpr))
        except InputError as reason:  # a server goes on
            round_ = log[-1]
            return verdict_on(round_, np.zeros(len(round_)), np.inf, abstained=str(reason), null="none")
        return log.verdict(calibrated)

    def __repr__(self) -> str:
        return f"calibrate({self.detector!r}, null={self.rounds}, fpr={self.fpr:g})"


@dataclass(frozen=True)
class _Calibration:
    """A log -> the detector calibrated on it."""

    detector: Detector
    fpr: float

    def __call__(self, log: UpdateLog) -> Detector:
        return calibrate(self.detector, null=log, fpr=self.fpr)


def detect(run: Any, detectors: Mapping[str, Detector]) -> pd.DataFrame:
    """What each detector says after each round of a log, or of a run's log.

    Returns: a row per update and detector: round, client, detector, score, flag, abstained (the reason, or "").
    """
    log: UpdateLog = getattr(run, "log", run)
    answers = []
    for prefix in log.prefixes():  # rounds outside: each is read once
        for name, detector in detectors.items():
            v = prefix.verdict(detector)
            answers.append((prefix.last_index, name, v.clients, v.scores, v.flags, v.abstained))
    return _rows(answers)


def verdict_on(round_: Round, scores: np.ndarray, threshold: float, **said: Any) -> Verdict:
    """The verdict on recorded and refused clients, who is not comparable at +inf and flagged."""
    refused = sorted(round_.refused)
    clients = np.concatenate([round_.clients, np.array(refused, dtype=np.str_)])
    scores = np.concatenate([np.where(round_.comparable, scores, np.inf), np.full(len(refused), np.inf)])
    return Verdict(clients, scores, (scores > threshold) | np.isposinf(scores), **said)


def nominal_threshold(scores: np.ndarray, fpr: float) -> float:
    """Median + normal quantile x 1.4826 MAD of a cohort's scores [client]: what `calibrate` without a null cuts at."""
    finite = scores[np.isfinite(scores)]
    if not len(finite):
        return np.inf
    deviation = np.abs(finite - np.median(finite))
    sigma = 1.4826 * np.median(deviation) or 1.2533 * deviation.mean()
    return float(np.median(finite) + ndtri(1 - fpr) * sigma)


def rank_threshold(scores: np.ndarray, fpr: float, what: str) -> float:
    """The null score [score] that a share `fpr` of the null and one more lie above; raises InputError for too few."""
    flagged = int(np.floor((len(scores) + 1) * fpr + 1e-9))  # of the null and one more, those above the threshold
    if flagged < 1:
        needed = int(np.ceil(1 / fpr - 1e-9)) - 1
        raise InputError(f"calibrate to fpr {fpr:g} needs {needed} null scores, found {len(scores)} ({what})")
    return float(np.sort(scores)[len(scores) - flagged])


def _null_scores(detector: Detector, log: UpdateLog) -> np.ndarray:
    verdicts = [prefix.verdict(detector) for prefix in log.prefixes()]
    return np.concatenate([np.zeros(0), *(v.scores for v in verdicts if not v.abstained)])


def _attack_free(source: Any) -> UpdateLog:
    """The log of a null; raises InputError if it is none, or the truth of its run knows of a poisoned update."""
    if isinstance(source, UpdateLog):
        return source
    if not isinstance(getattr(source, "log", None), UpdateLog):
        raise InputError(f"a null is a sequence of runs or logs, a stretch of a log, or None, found {source!r:.80}")
    try:
        poisoned = int(source.truth["poisoned"].sum())
    except InputError:  # nobody wrote the truth down: the caller's word counts
        poisoned = 0
    if poisoned:
        raise InputError(f"a null must be free of attacks, found {poisoned} poisoned updates in run {source.name}")
    return source.log


def _stretch(log: UpdateLog) -> str:
    return f"rounds {log[0].index} to {log[-1].index}" if len(log) else "no rounds"


def _name(function: Any) -> str:
    if isinstance(function, partial):
        settings = "".join(f", {name}={value!r}" for name, value in function.keywords.items())
        return f"partial({_name(function.func)}{settings})"
    return getattr(function, "__name__", repr(function))


def _rows(answers: Sequence[tuple[int, str, np.ndarray, np.ndarray, np.ndarray, str]]) -> pd.DataFrame:
    sizes = [len(clients) for _, _, clients, *_ in answers]

    def each(position: int, dtype: Any) -> np.ndarray:
        return np.repeat(np.array([answer[position] for answer in answers], dtype=dtype), sizes)

    def joined(position: int, dtype: Any) -> np.ndarray:
        return np.concatenate([np.zeros(0, dtype), *(answer[position] for answer in answers)])

    columns = {"round": each(0, np.int64), "client": joined(2, np.str_), "detector": each(1, np.str_)}
    columns |= {"score": joined(3, np.float64), "flag": joined(4, bool), "abstained": each(5, np.str_)}
    return pd.DataFrame(columns)
