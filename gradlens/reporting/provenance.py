"""Where a report's numbers come from: runs, digests, settings, software, thresholds, commands."""

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
    """The commands that check the evidence and write the report again."""
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
    """The settings that say most about an experiment, where all runs share them."""
    words = {"task": "task {}", "model": "model {}", "num_clients": "{} clients", "rounds": "{} rounds"}
    found = []
    for name, phrase in words.items():
        values = {plain_value(run.scenario.get(name)) for run in runs}
        if len(values) == 1 and values != {"none"}:
            found.append(phrase.format(*values))
    return found


def settings_table(runs: Sequence[Run]) -> Block:
    """The settings that all runs share, and the values of those that differ."""
    scenarios = [run.scenario for run in runs if run.scenario]
    names = list(dict.fromkeys(name for scenario in scenarios for name in scenario))
    rows = []
    for name in names:
        values = list(dict.fromkeys(plain_value(scenario.get(name)) for scenario in scenarios))
        rows.append({"Setting": name, "Value": "; ".join(values), "": "varied" if len(values) > 1 else ""})
    return table(rows, "Scenario settings of the runs.", folded=len(rows) > 30)


def plain_value(value: Any) -> str:
    """A setting as text: components as `name(setting=value)`, nothing as "none"."""
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
    """The versions that recorded the runs, and those that made this report."""
    recorded: dict[str, list[str]] = {}
    for run in runs:
        software = run.header.get("software", {})
        for name, found in software.items() if isinstance(software, Mapping) else ():
            recorded.setdefault(str(name), []).append(str(found))
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
    """The version of an installed distribution."""
    try:
        return version(name)
    except PackageNotFoundError:
        return "–"


def thresholds_table(thresholds: pd.DataFrame) -> Block:
    """Every threshold with the null that it rests on, equal ones once."""
    found = thresholds.groupby(["detector", "threshold", "null"], sort=False, dropna=False)["run"].size().reset_index()
    rows = [
        {
            "Detector": row.detector,
            "Threshold": "each cohort's own" if pd.isna(row.threshold) else number(float(row.threshold), 3),
            "Null": str(row.null),
            "Runs": str(row.run),
        }
        for row in rows_of(found)
    ]
    return table(rows, "Thresholds and the null that each rests on.", folded=len(rows) > 12)


def runs_table(runs: Sequence[Run], conditions: Mapping[str, str]) -> Block:
    """The folder, rounds, state and manifest head of every run."""
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
