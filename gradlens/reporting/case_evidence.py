"""What a case file shows of a recording beyond what its case holds, computed once."""

from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from gradlens.case import Case
from gradlens.case.accomplices import likeness
from gradlens.case.activity import Stretch, activity, stretch_of
from gradlens.case.robust import in_sigmas
from gradlens.case.scoring import deviations
from gradlens.case.sums import Sums, sums_of
from gradlens.case.verdicts import SUSPECTED
from gradlens.errors import CannotSay
from gradlens.reporting.accusations import named
from gradlens.run import Run

MOST_SHOWN = 6  # clients with pages of their own


@dataclass(frozen=True, eq=False)
class CaseEvidence:
    """A case with what its pictures and tables are made of.

    Attributes
    ----------
    run : Run
    case : Case
    sums : Sums or None
        None where the recording cannot be summed up or nobody could be ranked.
    clean : numpy.ndarray
        bool [client of the sums], who is neither accused nor ambiguous nor looked at.
    shown : tuple of str
        Clients with pages of their own: the accused and the ambiguous, or, where somebody is suspected and nobody
        accused, the most conspicuous client.
    active : numpy.ndarray
        float64 [round, client], see `gradlens.case.activity.activity`.
    alike : numpy.ndarray
        float64 [client, client], see `gradlens.case.accomplices.likeness`.

    Examples
    --------
    >>> import tempfile, gradlens
    >>> from gradlens.examples import example_log, example_run
    >>> free = [example_log(num_malicious=0, seed=seed) for seed in range(100, 119)]
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     run = gradlens.open(example_run(f"{folder}/run"))
    ...     evidence_of(run, gradlens.investigate(run, free)).shown
    ('client-9',)
    """

    run: Run
    case: Case
    sums: Sums | None
    clean: np.ndarray
    shown: tuple[str, ...]
    active: np.ndarray = field(repr=False)
    alike: np.ndarray = field(repr=False)

    @property
    def accused(self) -> list[str]:
        """Names of the accused, the most suspicious first."""
        return self.case.suspects["client"].tolist()

    @property
    def ambiguous(self) -> list[str]:
        """Names of the ambiguous clients."""
        return self.case.ambiguous["client"].tolist()

    @property
    def ranked(self) -> bool:
        """Whether the clients have scores."""
        return bool(len(self.case.clients)) and bool(self.case.clients["rank"].notna().all())

    def position(self, client: str) -> int:
        """Place of a client in the sums."""
        assert self.sums is not None
        return int(np.flatnonzero(self.sums.clients == client)[0])

    def stretch(self, client: str) -> Stretch | None:
        """Positions of the rounds in which a client was active."""
        return stretch_of(self.active[:, self.position(client)])

    def readings(self, client: str) -> pd.DataFrame:
        """Columns reading, sigmas (of the clean clients), adds (to the score); what adds most first."""
        assert self.sums is not None
        scoring, place = self.case.null.scoring, self.position(client)
        drawn_in = deviations(self.sums, self.clean, scoring.readings, scoring.scales)
        table = pd.DataFrame(
            {
                "reading": list(scoring.readings),
                "sigmas": np.sinh(drawn_in[place]),
                "adds": scoring.added(drawn_in)[place],
            }
        )
        return table.sort_values("adds", ascending=False, kind="stable", ignore_index=True)

    def neighbors(self, client: str, most: int = 3) -> pd.DataFrame:
        """Columns client, cosine: whom a client is most alike over all rounds."""
        assert self.sums is not None
        place = self.position(client)
        cosines = self.alike[place].copy()
        cosines[place] = -np.inf
        nearest = np.argsort(-cosines, kind="stable")[: min(most, len(cosines) - 1)]
        return pd.DataFrame({"client": self.sums.clients[nearest], "cosine": cosines[nearest]})

    def most_alike_clean(self) -> float:
        """The largest cosine between two clean clients."""
        cosines = self.alike[np.ix_(self.clean, self.clean)]
        return float(cosines[np.triu_indices(len(cosines), 1)].max())

    def label_drift(self, client: str) -> pd.DataFrame:
        """Columns label, sigmas (of the clean clients): where its final bias drifted, the farthest first; or empty."""
        if self.sums is None or self.sums.drift is None:
            return pd.DataFrame({"label": [], "sigmas": []})
        drift = self.sums.drift.totals / np.sqrt(np.maximum(self.sums.rounds, 1))[:, None]
        sigmas = in_sigmas(drift, self.clean)[self.position(client)]
        order = np.argsort(-np.abs(sigmas), kind="stable")
        return pd.DataFrame({"label": order, "sigmas": sigmas[order]})


def evidence_of(run: Run, case: Case) -> CaseEvidence:
    """Computes what the case file of a recording shows.

    Parameters
    ----------
    run : Run
    case : Case
        Of this run.
    """
    names = named(case)
    if not names and case.verdict == SUSPECTED:
        names = [case.clients["client"].iloc[0]]
    try:
        sums = sums_of(run.log) if case.clients["rank"].notna().all() else None
    except CannotSay:
        sums = None
    if sums is None:
        return CaseEvidence(run, case, None, np.zeros(0, bool), (), np.zeros((0, 0)), np.zeros((0, 0)))
    clean = ~np.isin(sums.clients, names)
    shown = tuple(str(name) for name in names[:MOST_SHOWN])
    active = activity(run.log, sums, clean) if shown else np.zeros((0, 0))
    return CaseEvidence(run, case, sums, clean, shown, active, likeness(sums, clean))
