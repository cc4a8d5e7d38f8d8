"""Reference pages are made of docstrings: each entry says what it does and when it fails, with an example that runs.

An entry is documented by the function that the table holds. A detector that is a statistic with a scorer is documented
by `score_by`, its statistic and its scorer.
"""

import doctest
import importlib
import inspect
import pkgutil
import re
from functools import partial

import pytest

import gradlens
import simulations
from gradlens.aggregators import AGGREGATORS
from gradlens.detectors import DETECTORS
from gradlens.scorers import SCORERS
from gradlens.statistics import STATISTICS
from simulations import ATTACKS, PARTITIONS, SCHEDULES

FAILS = "**Fails when**"
ABSTAINS = "**Abstains** when"

# kind -> its table, and what the Notes of each entry must say
TABLES = {
    "statistic": (STATISTICS, (ABSTAINS, FAILS)),
    "scorer": (SCORERS, (FAILS,)),
    "detector": (DETECTORS, (ABSTAINS, FAILS)),
    "aggregator": (AGGREGATORS, (FAILS,)),
    "attack": (ATTACKS, (FAILS,)),
    "partition": (PARTITIONS, ()),
    "schedule": (SCHEDULES, ()),
}
ENTRIES = [(kind, name) for kind, (table, _) in TABLES.items() for name in table]
OPTIONAL = ("datasets", "flwr", "nvflare", "pfl", "byzfl", "dask", "jupyterlab")  # packages that a module may lack here
SETTINGS_THAT_DESCRIBE_THEMSELVES = {"Scenario"}  # each setting has its own description
NEED_A_SWEEP = {"localize_sweep", "localize_rounds", "torch_reference"}  # an example would take longer than a test may
ORDER = ("Parameters", "Returns", "Yields", "Raises", "See Also", "Notes", "References", "Examples")  # numpydoc's


def function_of(entry):
    """The function whose docstring documents an entry."""
    return function_of(entry.func) if isinstance(entry, partial) else entry


def sections_of(docstring: str) -> list[str]:
    """The section titles of a docstring, in its order."""
    return re.findall(r"^ *([A-Z][A-Za-z ]+)\n *-{3,}$", docstring, re.M)


@pytest.mark.parametrize(("kind", "name"), ENTRIES)
def test_every_entry_is_documented(kind, name):
    table, needed = TABLES[kind]
    docstring = function_of(table[name]).__doc__ or ""
    summary, _, body = docstring.partition("\n\n")
    sections = sections_of(docstring)
    where = f"the docstring of {kind} {name!r}"
    assert re.fullmatch(r".+\.", summary), f"{where} must begin with a sentence in one line"
    expected = {"Examples", *(["Notes"] if needed else [])}
    assert set(sections) >= expected, f"{where} needs the sections {', '.join(sorted(expected))}"
    assert sections == sorted(sections, key=ORDER.index), f"{where} needs its sections in the order {ORDER}"
    for phrase in needed:
        assert f"\n    {phrase}" in body, f"{where} needs a paragraph in its Notes that begins with {phrase!r}"
    assert ">>> " in body.partition("Examples\n")[2], f"{where} needs an example that runs, after >>>"


@pytest.mark.parametrize(("kind", "name"), ENTRIES)
def test_every_cited_reference_is_listed_and_the_other_way_round(kind, name):
    docstring = function_of(TABLES[kind][0][name]).__doc__ or ""
    assert set(re.findall(r"\[(\d+)\]_", docstring)) == set(re.findall(r"^ *\.\. \[(\d+)\] ", docstring, re.M))


@pytest.mark.parametrize(("kind", "name"), ENTRIES)
def test_every_parameter_is_documented(kind, name):
    function = function_of(TABLES[kind][0][name])
    documented = re.findall(r"^ {4}(\w+(?:, \w+)*) : ", function.__doc__ or "", re.M)
    names = {name for line in documented for name in line.split(", ")}
    assert set(inspect.signature(function).parameters) <= names


def modules() -> list[str]:
    """Names of all modules of the two packages."""
    found = []
    for package in (gradlens, simulations):
        prefix = f"{package.__name__}."
        found += [package.__name__, *(module.name for module in pkgutil.walk_packages(package.__path__, prefix))]
    return [name for name in found if not name.endswith("__main__")]


def public_names() -> list[tuple[str, str]]:
    """(package, name) of every function and class that a package lists as its own."""
    pairs, known = [], set()
    for package in modules():
        if package.startswith(("simulations.studies", "gradlens.cli")):
            continue
        try:
            module = importlib.import_module(package)
        except ModuleNotFoundError:
            continue
        for name in getattr(module, "__all__", ()):
            value = getattr(module, name)
            if (inspect.isfunction(value) or inspect.isclass(value)) and id(value) not in known:
                known.add(id(value))
                pairs.append((package, name))
    return pairs


@pytest.mark.parametrize(("package", "name"), public_names())
def test_every_public_name_is_documented(package, name):
    value = getattr(importlib.import_module(package), name)
    docstring, sections = inspect.getdoc(value) or "", sections_of(value.__doc__ or "")
    is_error = inspect.isclass(value) and issubclass(value, Exception)  # takes a message
    has_parameters = not is_error and bool(set(inspect.signature(value).parameters) - {"self"})
    if name not in SETTINGS_THAT_DESCRIBE_THEMSELVES and has_parameters:
        assert {"Parameters", "Attributes"} & set(sections), f"{package}.{name} needs the section Parameters"
    if name not in NEED_A_SWEEP:
        assert ">>> " in docstring, f"{package}.{name} needs an example that runs, after >>>"


@pytest.mark.parametrize("name", modules())
def test_the_examples_run(name):
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as missing:
        if (missing.name or "").partition(".")[0] not in OPTIONAL:
            raise
        pytest.skip(f"{missing.name} is not installed")
    said: list[str] = []
    runner = doctest.DocTestRunner()
    for test in doctest.DocTestFinder(exclude_empty=True).find(module, name):
        runner.run(test, out=said.append)
    assert runner.failures == 0, "".join(said)
