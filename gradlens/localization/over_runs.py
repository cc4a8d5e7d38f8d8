"""Localization over the runs of one setting, by ground truth or by suspects."""

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import pandas as pd

from gradlens.errors import InputError
from gradlens.localization.effects import LabeledRun, attacked_rounds, labels_of, located
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
    """Measures how well each layer and unit separates poisoned from benign updates in runs of one setting.

    Parameters
    ----------
    runs : Run, UpdateLog, (UpdateLog, DataFrame), or a sequence of them
        The runs, one per seed; a log without ground truth needs `suspects`.
    statistics : Mapping
        Name -> statistic whose columns are layers or units.
    rounds : collection of int, optional
        The rounds to compare; None takes the attacked ones, in which any update was poisoned.
    permutations : int
        Number of permutations behind the p-values; if there are no more ways than that to name the malicious clients,
        each is taken once.
    seed : int
        Seed of the permutations.
    control : Run, UpdateLog, or a sequence of them, optional
        Attack-free runs of the same settings and seeds, one for each of `runs` and in their order.
    suspects : collection of str, Mapping or DataFrame, optional
        Who counts as malicious in place of the ground truth, which is then not read: clients, round -> clients, or a
        table of verdicts with columns round, client, flag, in which a flag by any detector counts.

    Returns
    -------
    pandas.DataFrame
        A row per feature, with the columns described in the Notes.

    Raises
    ------
    InputError
        If the ground truth lacks an update or poisons none, a suspect is unknown, the number of controls differs from
        the number of runs, a control is of another model, or every statistic abstains.

    Notes
    -----
    Updates of compromised clients that were not poisoned in their round are left out. The columns are

    - layer, statistic, unit: the feature. Unit "" is the layer as a whole, scored as its most unusual unit.
    - auc: of poisoned against benign updates, pooled over a run's rounds, then averaged over runs.
    - low, high: 95 % interval of the AUC. With several runs it is over runs, Student's t for the mean of their AUCs.
      With a single run it is over its clients, the malicious and the benign ones, each with all its rounds, and says
      nothing of other seeds; NaN with fewer than two clients of a kind. Where every poisoned update is above every
      benign one it has no width.
    - p: one-sided p-value of the null hypothesis that it makes no difference which clients are malicious, by permuting
      the malicious clients within each run. Adjusted over the layers and statistics of one call: it is the share of
      permutations under which the highest AUC of all of them is at least that of this one, the permuted clients being
      the same for all (Westfall and Young's single-step maximum). The smallest there can be is 1 in the number of ways
      to name the malicious clients, 1/20 for one of twenty. NaN for units, which are described and not tested.
    - seeds: number of runs that have an AUC.
    - effect: how far the distributions are apart, where the AUC says how often the order is right: median |robust z| of
      poisoned minus that of benign comparable updates, in robust sigmas of the round, averaged over runs.
    - control_auc: the AUC of the same labels on the control, where nobody attacks; it should be near 0.5.
    - control_effect: the effect of the control's most extreme client, its median over the rounds minus the median of
      all updates. An attacker with a smaller effect is no more unusual than a benign client, for example one with rare
      labels. NaN without a control.
    - labels: "truth" or "suspects".

    With `suspects` the table ranks features by how well they separate the suspects from all other clients, whether or
    not they are malicious. If the suspects were selected by one of these statistics, it separates them by construction
    and its p-value says nothing.

    References
    ----------
    P. H. Westfall, S. S. Young, "Resampling-based multiple testing", Wiley, 1993.

    Examples
    --------
    >>> from gradlens.examples import example_log
    >>> table = localize(example_log(), suspects=["client-9"])
    >>> table.loc[table["statistic"].eq("layer_norms"), ["layer", "auc", "seeds", "labels"]].values.tolist()[0]
    ['fc1.weight', 1.0, 1, 'suspects']
    """
    runs = _several(runs)
    controls = [None] * len(runs) if control is None else [_log_of(run) for run in _several(control)]
    if len(controls) != len(runs):
        raise InputError(f"localize: expected a control for each of {len(runs)} runs, found {len(controls)}")
    cases = []
    for run, control_log in zip(runs, controls, strict=True):
        truth = _truth_of(run) if suspects is None else _as_truth(_log_of(run), suspects)
        chosen = attacked_rounds(truth) if rounds is None else sorted(set(rounds))
        control_seen = None if control_log is None else unusual(control_log, statistics, chosen)
        cases.append(LabeledRun(unusual(_log_of(run), statistics, chosen), labels_of(truth), chosen, control_seen))
    table = located(cases, permutations, seed).assign(labels="truth" if suspects is None else "suspects")
    if table.empty:
        raise InputError(
            f"no run has both poisoned and benign updates that a statistic could score ({len(cases)} runs, "
            f"statistics {', '.join(statistics)}); are the truth and the rounds those of these runs?"
        )
    return table


def _several(runs: Any) -> list[Any]:
    """Lists the runs; a single run or log is a list of one."""
    single = hasattr(runs, "log") or isinstance(runs, UpdateLog)
    return [runs] if single else list(runs)


def _log_of(run: Any) -> UpdateLog:
    """Returns the log of a run, of a pair (log, truth), or the log itself."""
    return run[0] if isinstance(run, tuple) else getattr(run, "log", run)


def _truth_of(run: Any) -> pd.DataFrame:
    """Returns the ground truth of a run or of a pair (log, truth)."""
    if isinstance(run, UpdateLog):
        raise InputError("localize: expected a run, a pair (log, truth) or suspects, found a log alone")
    return run[1] if isinstance(run, tuple) else run.truth


def _as_truth(log: UpdateLog, suspects: Suspects) -> pd.DataFrame:
    """Builds the table of ground truth (round, client, compromised, poisoned) in which the suspects are malicious."""
    clients = {round_.index: round_.clients.tolist() for round_ in log}
    of_round = _by_round(suspects, clients)
    suspected = set().union(*of_round.values())
    known = {client for round_ in log for client in (*round_.clients.tolist(), *round_.refused)}
    if unknown := sorted(suspected - known):
        raise InputError(f"suspects: the log has no client {unknown[0]!r}")
    rows = [
        (index, client, client in suspected, client in of_round.get(index, ()))
        for index, present in clients.items()
        for client in present
    ]
    return pd.DataFrame(rows, columns=["round", "client", "compromised", "poisoned"])


def _by_round(suspects: Suspects, rounds: Iterable[int]) -> dict[int, set[str]]:
    """Returns the suspects of each round."""
    if isinstance(suspects, pd.DataFrame):
        if missing := [name for name in ("round", "client", "flag") if name not in suspects]:
            raise InputError(f"suspects: expected columns round, client and flag, found no {missing[0]!r}")
        of_round: dict[int, set[str]] = {}
        flagged = suspects[suspects["flag"].astype(bool)]
        for index, client in zip(flagged["round"].tolist(), flagged["client"].astype(str).tolist(), strict=True):
            of_round.setdefault(index, set()).add(client)
        return of_round
    if isinstance(suspects, Mapping):
        return {int(index): set(clients) for index, clients in suspects.items()}
    clients = set(suspects)
    return dict.fromkeys(rounds, clients)
