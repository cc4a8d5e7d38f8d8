"""`gradlens list` and `gradlens doctor`: available names, where they come from, and what is installed."""

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Any

import typer

from gradlens.cli.options import AsJson
from gradlens.cli.output import say, say_json
from gradlens.errors import InputError
from gradlens.names import KINDS, available, hint, named

TABLES = {  # kind -> module and name of the table of its built-in entries
    "statistics": ("gradlens.statistics", "STATISTICS"),
    "scorers": ("gradlens.scorers", "SCORERS"),
    "detectors": ("gradlens.detectors", "DETECTORS"),
    "aggregators": ("gradlens.aggregators", "AGGREGATORS"),
    "attacks": ("simulations.attacks", "ATTACKS"),
    "partitions": ("simulations.partition", "PARTITIONS"),
    "schedules": ("simulations.attacks", "SCHEDULES"),
    "tasks": ("simulations.tasks", "TASKS"),
    "models": ("simulations.tasks", "MODELS"),
}
EXTRAS = {  # extra -> its distributions, and what it brings
    "simulations": (("torch",), "demo, simulate; ingesting .pt and .pth files; pruning and fine-tuning"),
    "data": (("datasets", "pillow"), "image data in the layout of the Hugging Face hub"),
    "files": (("safetensors",), "ingesting .safetensors files"),
    "cluster": (("dask", "distributed"), "sweeps and analyses on a Dask cluster"),
    "flower": (("flwr",), "recording and filtering in a Flower server"),
    "nvflare": (("nvflare",), "recording and filtering in an NVIDIA FLARE server"),
    "pfl": (("pfl",), "recording a pfl simulation"),
    "notebook": (("jupyterlab",), "the notebooks"),
}
EXTRA_OF = {  # module -> the extra that installs it
    "torch": "simulations", "datasets": "data", "PIL": "data", "safetensors": "files", "dask": "cluster",
    "distributed": "cluster", "flwr": "flower", "nvflare": "nvflare", "pfl": "pfl",
    "cryptography": "custody", "rfc3161_client": "custody",
}  # fmt: skip
SIMULATED = ("attacks", "partitions", "schedules", "tasks", "models")  # kinds of the package `simulations`
REQUIRED = ("numpy", "scipy", "pandas", "pyarrow", "scikit-learn", "matplotlib", "seaborn", "pydantic", "typer")


def list_names(
    kind: Annotated[
        str | None, typer.Argument(metavar="[KIND]", help=f"One of {', '.join(KINDS)}.", show_default=False)
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Lists detectors, attacks and everything else that has a name, where it comes from and what it needs."""
    if kind is not None and kind not in TABLES:
        raise typer.BadParameter(f"KIND: there is no {kind!r:.80}{hint(kind, TABLES)}; one of {', '.join(TABLES)}")
    entries = {name: _entries(name) for name in ([kind] if kind else TABLES)}
    if as_json:
        say_json(entries)
        return
    for name, rows in entries.items():
        say(*([f"{name}:"] if kind is None else []), *_entry_lines(rows), *([""] if kind is None else []))


def doctor(as_json: AsJson = False) -> None:
    """Shows what is installed, which extras are missing and what they would add."""
    facts = {
        "gradlens": _version("gradlens-forensics"),
        "python": _python(),
        "required": {name: _version(name) for name in REQUIRED},
        "extras": {extra: _extra_facts(extra) for extra in EXTRAS},
        "added by packages": _added(),
    }
    if as_json:
        say_json(facts)
        return
    missing = [name for name, installed in facts["required"].items() if not installed]
    say(f"gradlens {facts['gradlens'] or '(not installed as a package)'}, Python {facts['python']}")
    say("required: " + ", ".join(f"{name} {installed or 'MISSING'}" for name, installed in facts["required"].items()))
    say(*(_extra_line(extra, row) for extra, row in facts["extras"].items()))
    say(*(f"{kind}: {', '.join(names)}" for kind, names in facts["added by packages"].items()))
    if missing:
        say(f"missing: {', '.join(missing)}; install gradlens-forensics anew")


def _entries(kind: str) -> list[dict[str, str]]:
    """One row per name of a kind: name, from, needs, summary."""
    module, table_name = TABLES[kind]
    try:
        table: Mapping[str, Any] = getattr(import_module(module), table_name)
    except (ModuleNotFoundError, InputError) as error:
        return [{"name": "", "from": "", "needs": "needs torch", "summary": f"cannot be listed: {error}"}]
    rows = []
    for name, origin in available(kind, table).items():
        try:
            rows.append(_row(kind, name, origin, named(kind, table, name)))
        except InputError as error:
            rows.append({"name": name, "from": origin, "needs": "", "summary": str(error)})
    return rows


def _row(kind: str, name: str, origin: str, entry: Any) -> dict[str, str]:
    needs = ["needs torch"] if kind in SIMULATED and origin == "built in" else []
    needs += [f"takes a function {name}" for name in _functions_taken(entry)]
    return {"name": name, "from": origin, "needs": ", ".join(needs), "summary": _summary(kind, name, entry)}


def _functions_taken(entry: Any) -> list[str]:
    """Names of the settings that must be functions and have no default."""
    if isinstance(entry, partial):
        return []
    parameters = inspect.signature(entry).parameters.values()
    return [p.name for p in parameters if p.default is None and "Callable" in str(p.annotation)]


def _summary(kind: str, name: str, entry: Any) -> str:
    """First line of an entry's docstring; for a statistic combined with a scorer, of the statistic's docstring."""
    function: Callable[..., Any] = entry
    if isinstance(entry, partial):
        function = entry.args[0] if entry.args else entry.func
    summary = (inspect.getdoc(function) or "").partition("\n")[0]
    if kind == "detectors":
        from gradlens.detectors import USUAL

        return f"{'(usual) ' if name in USUAL else ''}{summary}"
    return summary


def _entry_lines(rows: list[dict[str, str]]) -> list[str]:
    names, origins = (max((len(row[column]) for row in rows), default=0) for column in ("name", "from"))
    return [
        f"  {row['name']:<{names}}  {row['from']:<{origins}}  {row['summary']}"
        + (f" [{row['needs']}]" if row["needs"] else "")
        for row in rows
    ]


def _added() -> dict[str, list[str]]:
    """Kind -> names that installed packages add, each with its package."""
    added = {kind: [f"{name} (from {origin})" for name, origin in available(kind, {}).items()] for kind in KINDS}
    return {kind: names for kind, names in added.items() if names}


def _extra_facts(extra: str) -> dict[str, Any]:
    names, purpose = EXTRAS[extra]
    return {"installed": {name: _version(name) for name in names}, "brings": purpose}


def _extra_line(extra: str, facts: Mapping[str, Any]) -> str:
    installed = facts["installed"]
    if all(installed.values()):
        return f"{extra}: {', '.join(f'{name} {release}' for name, release in installed.items())}"
    return f"{extra}: missing; pip install 'gradlens-forensics[{extra}]' brings {facts['brings']}"


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return ""


def _python() -> str:
    import platform

    return f"{platform.python_version()} on {platform.platform(terse=True)}"
