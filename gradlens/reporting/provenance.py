"""Provenance of a report: its runs and their manifest heads, settings, software, thresholds and commands."""

import json
import shlex
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pandas as pd

from gradlens.reporting.page import Block, code, number, rows_of, table
from gradlens.run import Run

SOFTWARE = ("gradlens-forensics", "numpy", "pandas", "scipy", "scikit-learn", "matplotlib", "seaborn")


def commands(path: Path, runs: Sequence[Run]) -> Block:
    """Lists the commands that verify the evidence and reproduce the report.

    Parameters
    ----------
    path : pathlib.Path
        Folder of the reported run or sweep.
    runs : sequence of Run
        The reported runs; the command to verify names the first.

    Returns
    -------
    Block
        A block of code.
    """
    first = runs[0]
    quoted = shlex.quote(str(path))
    return code(
        [
            "# this report again",
            f"gradlens report {quoted} -o report.html",
            "# where the anomaly is, as a table",
            f"gradlens localize {quoted} --csv",
            f"# that nobody changed the evidence of run {first.name}; the heads of all runs are below",
            f"gradlens verify {shlex.quote(str(first.path))} --head {first.head}",
        ]
    )


def common_settings(runs: Sequence[Run]) -> list[str]:
    """Names task, model, number of clients and rounds, as far as all runs share them.

    Parameters
    ----------
    runs : sequence of Run
        The reported runs.

    Returns
    -------
    list of str
        Phrases such as "10 clients"; a setting that varies or is unset is left out.
    """
    words = {"task": "task {}", "model": "model {}", "num_clients": "{} clients", "rounds": "{} rounds"}
    phrases = []
    for name, phrase in words.items():
        values = {plain_value(run.scenario.get(name)) for run in runs}
        if len(values) == 1 and values != {"none"}:
            phrases.append(phrase.format(*values))
    return phrases


def settings_table(runs: Sequence[Run]) -> Block:
    """Tabulates the scenario settings of the runs, with all values of those that vary.

    Parameters
    ----------
    runs : sequence of Run
        The reported runs; those without a scenario are skipped.

    Returns
    -------
    Block
        A table, folded away if it has more than 30 rows.
    """
    scenarios = [run.scenario for run in runs if run.scenario]
    names = list(dict.fromkeys(name for scenario in scenarios for name in scenario))
    rows = []
    for name in names:
        values = list(dict.fromkeys(plain_value(scenario.get(name)) for scenario in scenarios))
        rows.append({"Setting": name, "Value": "; ".join(values), "Varied": "yes" if len(values) > 1 else "no"})
    return table(rows, "Scenario settings of the runs.", folded=len(rows) > 30)


def plain_value(value: Any) -> str:
    """Formats a setting as text: components as `name(setting=value)`, None and {} as "none".

    Parameters
    ----------
    value : Any
        A value of a scenario, as in its JSON.

    Returns
    -------
    str

    Examples
    --------
    >>> plain_value({"dirichlet": {"alpha": 0.5}}), plain_value(None), plain_value(10)
    ('dirichlet(alpha=0.5)', 'none', '10')
    """
    if value is None or value == {}:
        return "none"
    if isinstance(value, Mapping):
        parts = [
            f"{name}({', '.join(f'{k}={v}' for k, v in inner.items())})"
            if isinstance(inner, Mapping) and inner
            else str(name)
            for name, inner in value.items()
        ]
        return "+".join(parts)
    return value if isinstance(value, str) else json.dumps(value, default=str)


def software_table(runs: Sequence[Run]) -> Block:
    """Tabulates the software versions that recorded the runs and those that wrote the report.

    Parameters
    ----------
    runs : sequence of Run
        The reported runs.

    Returns
    -------
    Block
        A table with a row per package.
    """
    recorded: dict[str, list[str]] = {}
    for run in runs:
        software = run.header.get("software", {})
        for name, release in software.items() if isinstance(software, Mapping) else ():
            recorded.setdefault(str(name), []).append(str(release))
    now = {name: installed(name) for name in SOFTWARE}
    rows = [
        {
            "Software": name,
            "Recorded with": ", ".join(dict.fromkeys(recorded.get(name, []))) or "–",
            "This report": now.get(name, "–"),
        }
        for name in dict.fromkeys([*now, *recorded])
    ]
    return table(rows, "Software versions.")


def installed(name: str) -> str:
    """Returns the version of an installed distribution, an en dash if it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return "–"


def thresholds_table(thresholds: pd.DataFrame) -> Block:
    """Tabulates every threshold with its null and the number of runs that share both.

    Parameters
    ----------
    thresholds : pandas.DataFrame
        Columns run, detector, threshold, null; a threshold of NaN is set by each cohort.

    Returns
    -------
    Block
        A table, folded away if it has more than 12 rows.
    """
    groups = thresholds.groupby(["detector", "threshold", "null"], sort=False, dropna=False)["run"].size().reset_index()
    rows = [
        {
            "Detector": row.detector,
            "Threshold": "each cohort's own" if pd.isna(row.threshold) else number(float(row.threshold), 3),
            "Null": str(row.null),
            "Runs": str(row.run),
        }
        for row in rows_of(groups)
    ]
    return table(rows, "Thresholds and the null that each rests on.", folded=len(rows) > 12)


def runs_table(runs: Sequence[Run], conditions: Mapping[str, str]) -> Block:
    """Tabulates condition, seed, number of rounds, state and manifest head of every run.

    Parameters
    ----------
    runs : sequence of Run
        The reported runs.
    conditions : Mapping
        Name of a run -> its condition; runs without one are called attack-free controls.

    Returns
    -------
    Block
        A table, folded away if it has more than 6 rows.
    """
    rows = [
        {
            "Run": run.name,
            "Condition": conditions.get(run.name, "attack-free control"),
            "Seed": str(run.scenario.get("seed", "–")),
            "Rounds": str(len(run.log)),
            "State": "closed" if run.is_closed else f"open; {run.in_flight}".rstrip("; "),
            "Manifest head": run.head,
        }
        for run in runs
    ]
    return table(rows, "Run folders and the heads of their manifests.", folded=len(rows) > 6)
