"""Localisation under each condition of a sweep."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from itertools import repeat
from pathlib import Path
from typing import Any

import pandas as pd
from tqdm import tqdm

from gradlens.errors import InputError
from gradlens.localization.effects import COLUMNS, Case, attacked_rounds, labels_of, located
from gradlens.localization.outliers import LOCATED_BY, Unusual, unusual
from gradlens.run import Run
from gradlens.statistics import Statistic

PHASES = ("first 3 attacked rounds", "later")
TOGETHER = 8  # conditions that are located in one go, and look at a common control once

Condition = tuple[Mapping[str, Any], list[tuple[Any, Any]]]  # settings; its runs and their controls, or their paths
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
    """`localize` under each condition of a sweep, attacked and control, early and late.

    A condition is a combination of the varied settings without the seed; its runs are those of all seeds.
    executor: works over the conditions, with the same result; its processes must see the same files.
    Returns: the varied settings, control (bool), phase ("first 3 attacked rounds", "later"), then the columns
    of `localize`; control rows use the attacked runs' truth on their controls' logs.
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
    """`localize` under each condition of a sweep, round by round since the attack began.

    Returns: as `localize_sweep`, with `since` instead of phase: rounds since the run's first poisoned update, 0 for
    its own; a round without a poisoned update has no row.
    """
    return _over(sweep, "since", _since, (statistics, permutations, seed), executor, progress)


def _phases(attacked: Sequence[int]) -> dict[str, Sequence[int]]:
    return dict(zip(PHASES, (attacked[:3], attacked[3:]), strict=True))


def _since(attacked: Sequence[int]) -> dict[int, Sequence[int]]:
    return {index - attacked[0]: [index] for index in attacked}


def _over(
    sweep: Any, column: str, parts: Parts, settings: tuple[Any, ...], executor: Executor | None, progress: bool
) -> pd.DataFrame:
    """The table of a sweep whose attacked rounds are split in parts, which a column names."""
    axes = [axis for axis in sweep.axes if axis != "seed"]
    conditions = _conditions(sweep, axes)
    jobs = list(_jobs(conditions))
    work = [[conditions[i] for i in job] for job in jobs]
    if executor is None:
        done: Iterable[list[pd.DataFrame]] = (_located_in(each, column, parts, *settings) for each in work)
    else:
        work = [[(key, [(_path(run), _path(free)) for run, free in runs]) for key, runs in each] for each in work]
        done = executor.map(_located_in, work, repeat(column), repeat(parts), *(repeat(each) for each in settings))
    found = {}
    with tqdm(total=len(conditions), desc="localize", unit=" conditions", disable=None if progress else True) as bar:
        for job, tables in zip(jobs, done, strict=True):
            found |= dict(zip(job, tables, strict=True))
            bar.update(len(job))
    columns = [*axes, "control", column, *COLUMNS]
    answers = [found[i] for i in range(len(conditions)) if len(found[i])]
    return pd.concat(answers, ignore_index=True)[columns] if answers else pd.DataFrame(columns=columns)


def _conditions(sweep: Any, axes: Sequence[str]) -> list[Condition]:
    """Each combination of the varied settings that is no control, with its runs and their controls (or None)."""
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
    try:
        return sweep.control_of(name)
    except InputError:  # it has none, or that has not run yet
        return None


def _path(run: Any) -> Path | None:
    return None if run is None else run.path


def _jobs(conditions: Sequence[Condition]) -> Iterator[list[int]]:
    """The positions of the conditions, in small groups of the same controls."""
    alike: dict[tuple[str, ...], list[int]] = {}
    for i, (_, runs) in enumerate(conditions):
        alike.setdefault(tuple(sorted({free.name for _, free in runs if free is not None})), []).append(i)
    for group in alike.values():
        yield from (group[start : start + TOGETHER] for start in range(0, len(group), TOGETHER))


def _located_in(
    job: Sequence[Condition],
    column: str,
    parts: Parts,
    statistics: Mapping[str, Statistic],
    permutations: int,
    seed: int,
) -> list[pd.DataFrame]:
    """The tables of some conditions, attacked first, then control; their runs are opened where they are paths."""
    known: dict[str, Mapping[str, Unusual]] = {}  # a control serves many attacked runs

    def seen(control: Any) -> Mapping[str, Unusual]:
        if control.name not in known:
            known[control.name] = unusual(_opened(control).log, statistics)
        return known[control.name]

    tables = []
    for key, runs in job:
        cases = []
        for run, control in ((_opened(run), control) for run, control in runs):
            free = None if control is None else seen(control)
            case = Case(unusual(run.log, statistics), labels_of(run.truth), (), free)
            cases.append((case, parts(attacked_rounds(run.truth))))
        found = []
        for control in (False, True):
            for name in dict.fromkeys(name for _, rounds in cases for name in rounds):
                part = [case.during(rounds.get(name, ())) for case, rounds in cases]
                part = [case.on_control() for case in part if case.control] if control else part
                table = located(part, permutations, seed)
                found.append(table.assign(**key, control=control, **{column: name}))
        found = [table for table in found if len(table)]
        tables.append(pd.concat(found, ignore_index=True) if found else pd.DataFrame())
    return tables


def _opened(run: Any) -> Any:
    return Run.open(run) if isinstance(run, Path) else run
