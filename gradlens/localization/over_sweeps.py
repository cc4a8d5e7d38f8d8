"""Localization under each condition of a sweep."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from itertools import repeat
from pathlib import Path
from typing import Any

import pandas as pd
from tqdm import tqdm

from gradlens.errors import InputError
from gradlens.localization.effects import COLUMNS, LabeledRun, attacked_rounds, labels_of, located
from gradlens.localization.outliers import LOCATED_BY, Unusual, unusual
from gradlens.run import Run
from gradlens.statistics import Statistic

PHASES = ("first 3 attacked rounds", "later")
TOGETHER = 8  # most conditions of one job, which reads the control that they share once

Condition = tuple[Mapping[str, Any], list[tuple[Any, Any]]]  # settings; pairs (run, control) or their paths
Parts = Callable[[Sequence[int]], Mapping[Any, Sequence[int]]]  # attacked rounds -> name of a part -> its rounds


def localize_sweep(
    sweep: Any,
    statistics: Mapping[str, Statistic] = LOCATED_BY,
    permutations: int = 999,
    seed: int = 0,
    *,
    executor: Executor | None = None,
    progress: bool = False,
) -> pd.DataFrame:
    """Applies `localize` under each condition of a sweep, attacked and control, in early and late rounds.

    Parameters
    ----------
    sweep : Sweep
        The runs. A condition is a combination of the varied settings except the seed; its runs are those of all seeds.
    statistics : Mapping
        Name -> statistic whose columns are layers or units.
    permutations : int
        Number of permutations behind the p-values.
    seed : int
        Seed of the permutations.
    executor : concurrent.futures.Executor, optional
        Distributes the conditions, without changing the result; its processes must see the same files. None works in
        this process.
    progress : bool
        Whether to show a progress bar, which appears on a terminal only.

    Returns
    -------
    pandas.DataFrame
        The varied settings, control (bool), phase ("first 3 attacked rounds" or "later"), then the columns of
        `localize`. Control rows apply the ground truth of the attacked runs to the logs of their controls.

    Raises
    ------
    InputError
        If a run has an update without ground truth, or a control is of another model.

    See Also
    --------
    localize : One condition.
    localize_rounds : Round by round.
    """
    return _over(sweep, "phase", _phases, (statistics, permutations, seed), executor, progress)


def localize_rounds(
    sweep: Any,
    statistics: Mapping[str, Statistic] = LOCATED_BY,
    permutations: int = 999,
    seed: int = 0,
    *,
    executor: Executor | None = None,
    progress: bool = False,
) -> pd.DataFrame:
    """Applies `localize` under each condition of a sweep, attacked and control, to each attacked round.

    Parameters
    ----------
    sweep : Sweep
        The runs. A condition is a combination of the varied settings except the seed; its runs are those of all seeds.
    statistics : Mapping
        Name -> statistic whose columns are layers or units.
    permutations : int
        Number of permutations behind the p-values.
    seed : int
        Seed of the permutations.
    executor : concurrent.futures.Executor, optional
        As for `localize_sweep`.
    progress : bool
        As for `localize_sweep`.

    Returns
    -------
    pandas.DataFrame
        The columns of `localize_sweep` with `since` in place of phase: the number of rounds since the run's first
        poisoned update, 0 for the round of that update. A round without a poisoned update has no row.

    Raises
    ------
    InputError
        If a run has an update without ground truth, or a control is of another model.

    See Also
    --------
    localize_sweep : In early and late rounds.
    """
    return _over(sweep, "since", _since, (statistics, permutations, seed), executor, progress)


def _phases(attacked: Sequence[int]) -> dict[str, Sequence[int]]:
    """Splits attacked rounds into the first three and the rest."""
    return dict(zip(PHASES, (attacked[:3], attacked[3:]), strict=True))


def _since(attacked: Sequence[int]) -> dict[int, Sequence[int]]:
    """Splits attacked rounds into single ones, named by their distance from the first."""
    return {index - attacked[0]: [index] for index in attacked}


def _over(
    sweep: Any, column: str, parts: Parts, settings: tuple[Any, ...], executor: Executor | None, progress: bool
) -> pd.DataFrame:
    """Builds the table of a sweep, with attacked rounds split into parts that are named in `column`."""
    axes = [axis for axis in sweep.axes if axis != "seed"]
    conditions = _conditions(sweep, axes)
    jobs = list(_jobs(conditions))
    work = [[conditions[i] for i in job] for job in jobs]
    if executor is None:
        results: Iterable[list[pd.DataFrame]] = (_located_in(part, column, parts, *settings) for part in work)
    else:
        work = [[(key, [(_path(run), _path(control)) for run, control in runs]) for key, runs in part] for part in work]
        results = executor.map(
            _located_in, work, repeat(column), repeat(parts), *(repeat(setting) for setting in settings)
        )
    by_condition: dict[int, pd.DataFrame] = {}
    with tqdm(total=len(conditions), desc="localize", unit=" conditions", disable=None if progress else True) as bar:
        for job, tables in zip(jobs, results, strict=True):
            by_condition |= dict(zip(job, tables, strict=True))
            bar.update(len(job))
    columns = [*axes, "control", column, *COLUMNS]
    filled = [by_condition[i] for i in range(len(conditions)) if len(by_condition[i])]
    return pd.concat(filled, ignore_index=True)[columns] if filled else pd.DataFrame(columns=columns)


def _conditions(sweep: Any, axes: Sequence[str]) -> list[Condition]:
    """Lists the combinations of varied settings that are attacked, with pairs (run, control or None)."""
    runs = {run.name: run for run in sweep.runs}
    attacked = sweep.settings[~sweep.settings["control"].astype(bool)]
    groups: Iterable[Any] = [((), attacked)] if len(attacked) else []
    if axes:
        groups = attacked.groupby(list(axes), sort=False, dropna=False)
    return [
        (dict(zip(axes, key, strict=True)), [(runs[name], _control_of(sweep, name)) for name in group.index])
        for key, group in groups
    ]


def _control_of(sweep: Any, name: str) -> Any:
    """Returns the control of a run, None if it has none or its control has not run yet."""
    try:
        return sweep.control_of(name)
    except InputError:
        return None


def _path(run: Any) -> Path | None:
    """Returns the folder of a run, which is sent to other processes in its place."""
    return None if run is None else run.path


def _jobs(conditions: Sequence[Condition]) -> Iterator[list[int]]:
    """Yields positions of conditions, in groups of at most 8 that share their controls."""
    by_controls: dict[tuple[str, ...], list[int]] = {}
    for i, (_, runs) in enumerate(conditions):
        names = tuple(sorted({control.name for _, control in runs if control is not None}))
        by_controls.setdefault(names, []).append(i)
    for group in by_controls.values():
        yield from (group[start : start + TOGETHER] for start in range(0, len(group), TOGETHER))


def _located_in(
    job: Sequence[Condition],
    column: str,
    parts: Parts,
    statistics: Mapping[str, Statistic],
    permutations: int,
    seed: int,
) -> list[pd.DataFrame]:
    """Builds the table of each condition of a job, attacked rows first, then control; opens runs given as paths."""
    controls: dict[str, Mapping[str, Unusual]] = {}  # one control may serve many attacked runs

    def seen(control: Any) -> Mapping[str, Unusual]:
        if control.name not in controls:
            controls[control.name] = unusual(_opened(control).log, statistics)
        return controls[control.name]

    tables = []
    for key, runs in job:
        cases = []
        for run, control in ((_opened(run), control) for run, control in runs):
            control_seen = None if control is None else seen(control)
            case = LabeledRun(unusual(run.log, statistics), labels_of(run.truth), (), control_seen)
            cases.append((case, parts(attacked_rounds(run.truth))))
        located_parts = []
        for control in (False, True):
            for name in dict.fromkeys(name for _, rounds in cases for name in rounds):
                part = [case.during(rounds.get(name, ())) for case, rounds in cases]
                part = [case.on_control() for case in part if case.control] if control else part
                table = located(part, permutations, seed)
                located_parts.append(table.assign(**key, control=control, **{column: name}))
        located_parts = [table for table in located_parts if len(table)]
        tables.append(pd.concat(located_parts, ignore_index=True) if located_parts else pd.DataFrame())
    return tables


def _opened(run: Any) -> Any:
    """Opens a run that is given as its folder."""
    return Run.open(run) if isinstance(run, Path) else run
