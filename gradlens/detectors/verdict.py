"""Verdicts, detectors made of a statistic and a scorer, and the calibration of thresholds.

`score_by` makes a detector of any statistic and any scorer, `calibrate` sets its threshold by a named null, and
`detect` asks several detectors after every round of a log.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import pandas as pd

from gradlens.detectors.nulls import NullScores, attack_free, nominal_threshold
from gradlens.errors import CannotSay, InputError
from gradlens.log import Round, UpdateLog
from gradlens.log.adapters import judged
from gradlens.scorers import Scorer, robust_zscore
from gradlens.statistics import Statistic
from gradlens.words import count

__all__ = ["TEXTBOOK", "Detector", "Verdict", "calibrate", "detect", "score_by", "verdict_on"]

TEXTBOOK = 3.5  # Iglewicz & Hoaglin 1993, for one feature; the largest of several exceeds it more often


@dataclass(frozen=True, eq=False)
class Verdict:
    """What a detector says of the clients of one round: those recorded, in the round's order, then the refused ones.

    Clients that were refused or are not comparable score +inf and are flagged in every verdict.

    Parameters
    ----------
    clients : ndarray, str [client]
    scores : ndarray, float64 [client]
        Higher is more suspicious.
    flags : ndarray, bool [client]
    weights : ndarray, float64 [client], optional
        Of a soft verdict, from 0 to 1.
    evidence : DataFrame [recorded client, feature], optional
        What the score was made of.
    abstained : str, default ""
        Why there is no verdict; the comparable clients then score 0 and are not flagged.
    null : str, default ""
        What the threshold rests on.

    Examples
    --------
    >>> from gradlens import DETECTORS
    >>> from gradlens.examples import example_log
    >>> verdict = DETECTORS["layer_norms"]()(example_log())
    >>> verdict.clients[verdict.flags].tolist(), verdict.null
    (['client-9'], 'uncalibrated: textbook 3.5')
    """

    clients: np.ndarray
    scores: np.ndarray
    flags: np.ndarray
    weights: np.ndarray | None = None
    evidence: pd.DataFrame | None = None
    abstained: str = ""
    null: str = ""

    def table(self, round_: int, detector: str) -> pd.DataFrame:
        """The verdict as rows round, client, detector, score, flag, abstained.

        Parameters
        ----------
        round_ : int
            The round's index.
        detector : str
            The detector's name.
        """
        return _rows([(round_, detector, self.clients, self.scores, self.flags, self.abstained)])


Detector = Callable[[UpdateLog], Verdict]


def score_by(statistic: Statistic, scorer: Scorer, threshold: float) -> Detector:
    """The detector that flags clients to which a scorer gives more than a threshold on a statistic's table.

    Parameters
    ----------
    statistic : Statistic
        One of `STATISTICS`, or a function of your own, ``log -> table``.
    scorer : Scorer
        One of `SCORERS`, or a function of your own, ``table -> scores``.
    threshold : float
        In the scorer's units, uncalibrated; see `calibrate`.

    Returns
    -------
    Detector

    Raises
    ------
    InputError
        When called, if the scorer does not give one number per client.

    Notes
    -----
    Flagged are the clients with ``scorer(statistic(log)) > threshold``.

    **Abstains** when the statistic or the scorer cannot say.

    **Fails when** the statistic does, and when the scorer does. A threshold that was not calibrated flags benign
    clients at a rate that nobody knows.

    Examples
    --------
    >>> from gradlens import score_by
    >>> from gradlens.examples import example_log
    >>> from gradlens.scorers import robust_zscore
    >>> from gradlens.statistics import layer_norms
    >>> detector = score_by(layer_norms, robust_zscore, threshold=3.5)
    >>> detector
    score_by(layer_norms, robust_zscore, threshold=3.5)
    >>> verdict = detector(example_log())
    >>> verdict.clients[verdict.flags].tolist()
    ['client-9']
    """
    return ScoreDetector(statistic, scorer, float(threshold))


@dataclass(frozen=True)
class ScoreDetector:
    """The detector that `score_by` builds.

    Parameters
    ----------
    statistic : Statistic
    scorer : Scorer
    threshold : float
        In the scorer's units.

    Examples
    --------
    >>> from gradlens import DETECTORS
    >>> DETECTORS["final_bias"]()
    score_by(final_bias, robust_zscore, threshold=3.5)
    """

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

    Parameters
    ----------
    detector : Detector
    null : sequence of Run or UpdateLog, UpdateLog, int or None, default None
        What the threshold rests on, in order of preference: attack-free logs or runs of other seeds (a sequence); a
        stretch of a log that is declared clean (an `UpdateLog`), or the first rounds of the log that is judged (their
        number), in which nobody is flagged for a score (a live filter's shadow mode); or None, each cohort itself, its
        majority taken as benign.
    fpr : float, default 0.05
        The share of benign updates that is flagged.

    Returns
    -------
    Detector
        Its verdicts name the null.

    Raises
    ------
    InputError
        If the null has too few clients for `fpr` (after too few first rounds the detector abstains instead), or its
        truth knows of a poisoned update.

    Notes
    -----
    The rate is per update, and the n clients of the null support it, each counted once for every run it is in: a
    client's data persist, so that its rounds are not independent, and more of them do not make the null larger. At
    least 1 / fpr - 1 clients are needed: 19 for 5 %, 99 for 1 %. The threshold is the smallest score t with ::

        sum over clients of (share of the client's scores above t) <= (n + 1) * fpr - 1

    An update of a further client, exchangeable with those of the null, passes it with probability at most `fpr`,
    however its rounds depend on each other [1]_. Where each client has one score, t is the k-th smallest with
    k = ceil((n + 1)(1 - fpr)). Clients that were refused or not finite are flagged whatever the threshold; they are
    left out of the null, and the verdict says how many. With None the threshold is ::

        median + normal quantile of 1 - fpr * 1.4826 MAD

    of the cohort's scores; the rate is then nominal.

    **Fails when** the log goes on longer than its null and the scores of late rounds differ from those of early ones;
    the verdict's null then says how many rounds are later.

    References
    ----------
    .. [1] Lee, Barber & Willett 2023, arXiv 2306.06342 (hierarchical conformal prediction).

    Examples
    --------
    >>> from gradlens import DETECTORS, calibrate
    >>> from gradlens.examples import example_log
    >>> nulls = [example_log(num_malicious=0, seed=seed) for seed in (1, 2, 3)]
    >>> detector = calibrate(DETECTORS["layer_norms"](), nulls, fpr=0.05)
    >>> verdict = detector(example_log())
    >>> verdict.clients[verdict.flags].tolist(), verdict.null
    (['client-9'], 'attack-free: 3 runs, 30 clients, 120 scores, fpr 0.05')
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
        logs = [attack_free(source) for source in ([null] if hasattr(null, "log") else null)]
        what = f"attack-free: {count(len(logs), 'run')}"
    fit = getattr(detector, "fitted", None)  # a panel learns more from the null than a threshold
    detector, scores = fit(logs) if fit is not None else (detector, _null_scores(detector, logs))
    last = max((log.last_index for log in logs if len(log)), default=None)
    basis = f"{what}, {scores.summary}, fpr {fpr:g}"
    return CalibratedDetector(detector, scores.threshold(fpr, what), fpr, basis, last)


@dataclass(frozen=True)
class CalibratedDetector:
    """The detector that `calibrate` builds of a null.

    Parameters
    ----------
    detector : Detector
    threshold : float or None
        None where each cohort sets its own.
    fpr : float
    null : str
        What the threshold rests on, in words.
    last : int, optional
        The latest round of the null.

    Examples
    --------
    >>> from gradlens import DETECTORS, calibrate
    >>> calibrate(DETECTORS["layer_norms"]()).threshold is None
    True
    """

    detector: Detector
    threshold: float | None
    fpr: float
    null: str
    last: int | None = None

    def __call__(self, log: UpdateLog) -> Verdict:
        verdict = log.verdict(self.detector)
        if verdict.abstained:
            return replace(verdict, null=self.null)
        threshold = nominal_threshold(verdict.scores, self.fpr) if self.threshold is None else self.threshold
        flags = (verdict.scores > threshold) | np.isposinf(verdict.scores)
        return replace(verdict, flags=flags, null="; ".join(filter(None, [self.null, self._beyond(log)])))

    def _beyond(self, log: UpdateLog) -> str:
        """Which rounds of a log have no equal in the null, "" where all have."""
        beyond = getattr(self.detector, "beyond", None)  # a panel compares each round with its own kind
        if beyond is not None and (remark := beyond(log)):
            return remark
        late = 0 if self.last is None else log.last_index - self.last
        return f"its {latest(late)} later than round {self.last}, the null's last" if late > 0 else ""

    def __repr__(self) -> str:
        threshold = "" if self.threshold is None else f", threshold={self.threshold:g}"
        return f"calibrate({self.detector!r}, null={self.null!r}, fpr={self.fpr:g}{threshold})"


@dataclass(frozen=True)
class ShadowedDetector:
    """The detector that `calibrate` builds of a number of first rounds.

    Parameters
    ----------
    detector : Detector
    rounds : int
        The first rounds of a log, in which nobody is flagged for a score.
    fpr : float

    Examples
    --------
    >>> from gradlens import DETECTORS, calibrate
    >>> calibrate(DETECTORS["krum"](), null=3)
    calibrate(krum(num_malicious=None, neighbours='paper', power=2.0, by_layer=False), null=3, fpr=0.05)
    """

    detector: Detector
    rounds: int
    fpr: float

    def __call__(self, log: UpdateLog) -> Verdict:
        if len(log) <= self.rounds:
            verdict, null = log.verdict(self.detector), f"none yet: the first {self.rounds} rounds are its null"
            return replace(verdict, flags=np.isposinf(verdict.scores), null=null)
        try:
            calibrated = log[: self.rounds].remembered(_Calibration(self.detector, self.fpr))
        except InputError as reason:  # a server must go on
            round_ = log[-1]
            return verdict_on(round_, np.zeros(len(round_)), np.inf, abstained=str(reason), null="none")
        return log.verdict(calibrated)

    def __repr__(self) -> str:
        return f"calibrate({self.detector!r}, null={self.rounds}, fpr={self.fpr:g})"


@dataclass(frozen=True)
class _Calibration:
    """Calibrates a detector on a log, so that a log can remember it."""

    detector: Detector
    fpr: float

    def __call__(self, log: UpdateLog) -> Detector:
        return calibrate(self.detector, null=log, fpr=self.fpr)


def detect(run: Any, detectors: Mapping[str, Detector]) -> pd.DataFrame:
    """What each detector says after each round of a log, or of a run's log.

    Parameters
    ----------
    run : Run or UpdateLog
    detectors : mapping of str to Detector
        The names appear in the table.

    Returns
    -------
    DataFrame
        A row per update and detector: round, client, detector, score, flag, abstained (the reason, or "").

    Notes
    -----
    Low-rank adapters are judged by the products of their layers (`gradlens.log.adapters.with_products`).

    Examples
    --------
    >>> from gradlens import DETECTORS, detect
    >>> from gradlens.examples import example_log
    >>> table = detect(example_log(), {"norms": DETECTORS["layer_norms"]()})
    >>> table.shape, table["client"][table["flag"]].unique().tolist()
    ((40, 6), ['client-9'])
    """
    log: UpdateLog = judged(getattr(run, "log", run))
    answers = []
    for prefix in log.prefixes():  # rounds outermost, so that each is read once
        for name, detector in detectors.items():
            v = prefix.verdict(detector)
            answers.append((prefix.last_index, name, v.clients, v.scores, v.flags, v.abstained))
    return _rows(answers)


def verdict_on(round_: Round, scores: np.ndarray, threshold: float, **fields: Any) -> Verdict:
    """The verdict on recorded and refused clients.

    Parameters
    ----------
    round_ : Round
    scores : ndarray, float64 [recorded client]
        Those of clients that are not comparable are replaced by +inf.
    threshold : float
        Clients above it are flagged.
    **fields
        The other fields of the `Verdict`.

    Examples
    --------
    >>> import numpy as np
    >>> from gradlens.examples import example_log
    >>> round_ = example_log()[-1]
    >>> verdict_on(round_, np.arange(len(round_)), threshold=8.5).flags.sum().item()
    1
    """
    refused = sorted(round_.refused)
    clients = np.concatenate([round_.clients, np.array(refused, dtype=np.str_)])
    scores = np.concatenate([np.where(round_.comparable, scores, np.inf), np.full(len(refused), np.inf)])
    return Verdict(clients, scores, (scores > threshold) | np.isposinf(scores), **fields)


def latest(rounds: int) -> str:
    """ "last round is", "last 5 rounds are"."""
    return "last round is" if rounds == 1 else f"last {rounds} rounds are"


def _null_scores(detector: Detector, logs: Sequence[UpdateLog]) -> NullScores:
    """What a detector says of the clients of attack-free logs, where it does not abstain."""
    scores, units, left_out = [np.zeros(0)], [np.zeros((0, 2), np.str_)], 0
    for run, log in enumerate(logs):
        for prefix in log.prefixes():
            verdict = prefix.verdict(detector)
            if verdict.abstained:
                continue
            finite = np.isfinite(verdict.scores)
            scores.append(verdict.scores[finite])
            units.append(np.stack([np.full(int(finite.sum()), str(run)), verdict.clients[finite]], axis=1))
            left_out += int((~finite).sum())
    unit = np.unique(np.concatenate(units), axis=0, return_inverse=True)[1].reshape(-1)
    return NullScores(np.concatenate(scores), unit, len(logs), left_out)


def _stretch(log: UpdateLog) -> str:
    return f"rounds {log[0].index} to {log[-1].index}" if len(log) else "no rounds"


def _name(function: Any) -> str:
    if isinstance(function, partial):
        settings = "".join(f", {name}={value!r}" for name, value in function.keywords.items())
        return f"partial({_name(function.func)}{settings})"
    return getattr(function, "__name__", repr(function))


def _rows(answers: Sequence[tuple[int, str, np.ndarray, np.ndarray, np.ndarray, str]]) -> pd.DataFrame:
    sizes = [len(clients) for _, _, clients, *_ in answers]

    def repeated(position: int, dtype: Any) -> np.ndarray:
        return np.repeat(np.array([answer[position] for answer in answers], dtype=dtype), sizes)

    def joined(position: int, dtype: Any) -> np.ndarray:
        return np.concatenate([np.zeros(0, dtype), *(answer[position] for answer in answers)])

    columns = {"round": repeated(0, np.int64), "client": joined(2, np.str_), "detector": repeated(1, np.str_)}
    columns |= {"score": joined(3, np.float64), "flag": joined(4, bool), "abstained": repeated(5, np.str_)}
    return pd.DataFrame(columns)
