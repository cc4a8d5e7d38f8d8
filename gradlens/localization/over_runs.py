"""Localisation in the runs of one setting, against the ground truth or against suspects."""

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import pandas as pd

from gradlens.errors import InputError
from gradlens.localization.effects import Case, attacked_rounds, labels_of, located
from gradlens.localization.outliers import LOCATED_BY, unusual
from gradlens.log import UpdateLog
from gradlens.statistics import Statistic

Suspects = Collection[str] | Mapping[int, Collection[str]] | pd.DataFrame


def localize(
    runs: Any,
    statistics: Mapping[str, Statistic] = LOCATED_BY,
    rounds: Collection[int] | None = None,
    permutations: int = 999,
    seed: int = 0,
    *,
    control: Any = None,
    suspects: Suspects | None = None,
) -> pd.DataFrame:
    """How well each feature by itself tells the poisoned updates of a setting's runs from the benign ones.

    runs: a run, runs, or pairs (log, truth), one per seed. rounds: those looked at; None: the attacked ones, in
    which an update was poisoned. Updates of compromised clients that were not poisoned in that round are left out.
    control: the attack-free runs (or logs) of the same settings and seeds, as many as `runs`, in their order.
    suspects: who counts as malicious instead of the truth, which is then not asked for (runs may be plain logs):
    clients, those of each round, or a table of verdicts (round, client, flag), in which a flag by any detector counts.
    The table then ranks features by how well they tell these suspects from the others, whoever they are, and p means
    that they differ there; where they were chosen by that very statistic they do by construction.

    Returns: a row per feature.
      layer, statistic, unit: "" = the layer as a whole, its most unusual unit.
      auc: updates of a run pooled, then the mean over runs.
      low, high: 95 % percentile interval of 1,000 two-stage resamples: of the runs, and of the rounds in each of them
        (in 20 stretches of consecutive rounds where there are more). One run: of its rounds alone, which says
        nothing of other seeds; NaN for a single round.
      p: of the hypothesis that it makes no difference which clients are malicious, one-sided, by permuting
        that within each run; Holm-corrected over the layers and statistics of this call; NaN for a unit, which is
        described and not tested.
      seeds: runs with an answer.
      effect: how far, where the AUC says how often: the median |robust z| of poisoned updates minus that of benign
        ones, in robust sigmas of the round's cohort, of comparable updates; the mean over runs.
      control_auc: the AUC that the same labels have on the control's log, where nobody attacks: about a half.
      control_effect: how far a benign client moves the same tensor by itself, as one with unusual labels does: on
        the control, the effect of the client that is farthest out there (its median over these rounds minus that of
        all updates). Whoever is less far out does nothing that honest clients do not do. NaN without a control.
      labels: "truth" or "suspects".
    Raises: InputError if the truth poisons nothing or says nothing of an update, a suspect is unknown, controls
    are not as many as runs, or no statistic can say.
    """
    several = _several(runs)
    controls = [None] * len(several) if control is None else [_log_of(each) for each in _several(control)]
    if len(controls) != len(several):
        raise InputError(f"localize: expected a control for each of {len(several)} runs, found {len(controls)}")
    cases = []
    for run, free in zip(several, controls, strict=True):
        truth = _truth_of(run) if suspects is None else _as_truth(_log_of(run), suspects)
        chosen = attacked_rounds(truth) if rounds is None else sorted(set(rounds))
        beside = None if free is None else unusual(free, statistics, chosen)
        cases.append(Case(unusual(_log_of(run), statistics, chosen), labels_of(truth), chosen, beside))
    table = located(cases, permutations, seed).assign(labels="truth" if suspects is None else "suspects")
    if table.empty:
        raise InputError(
            f"no run has both poisoned and benign updates that a statistic could score ({len(cases)} runs, "
            f"statistics {', '.join(statistics)}); are the truth and the rounds those of these runs?"
        )
    return table


def _several(runs: Any) -> list[Any]:
    one = hasattr(runs, "log") or isinstance(runs, UpdateLog)
    several: Iterable[Any] = [runs] if one else runs
    return list(several)


def _log_of(run: Any) -> UpdateLog:
    return run[0] if isinstance(run, tuple) else getattr(run, "log", run)


def _truth_of(run: Any) -> pd.DataFrame:
    if isinstance(run, UpdateLog):
        raise InputError("localize: expected a run, a pair (log, truth) or suspects, found a log alone")
    return run[1] if isinstance(run, tuple) else run.truth


def _as_truth(log: UpdateLog, suspects: Suspects) -> pd.DataFrame:
    """The truth (round, client, compromised, poisoned) if these clients had done what they are suspected of."""
    clients = {round_.index: round_.clients.tolist() for round_ in log}
    of_round = _by_round(suspects, clients)
    named = set().union(*of_round.values())
    known = {client for round_ in log for client in (*round_.clients.tolist(), *round_.refused)}
    if unknown := sorted(named - known):
        raise InputError(f"suspects: the log has no client {unknown[0]!r}")
    rows = [
        (index, client, client in named, client in of_round.get(index, ()))
        for index, present in clients.items()
        for client in present
    ]
    return pd.DataFrame(rows, columns=["round", "client", "compromised", "poisoned"])


def _by_round(suspects: Suspects, rounds: Iterable[int]) -> dict[int, set[str]]:
    if isinstance(suspects, pd.DataFrame):
        if missing := [name for name in ("round", "client", "flag") if name not in suspects]:
            raise InputError(f"suspects: expected columns round, client and flag, found no {missing[0]!r}")
        found: dict[int, set[str]] = {}
        flagged = suspects[suspects["flag"].astype(bool)]
        for index, client in zip(flagged["round"].tolist(), flagged["client"].astype(str).tolist(), strict=True):
            found.setdefault(index, set()).add(client)
        return found
    if isinstance(suspects, Mapping):
        return {int(index): set(clients) for index, clients in suspects.items()}
    clients = set(suspects)
    return dict.fromkeys(rounds, clients)
