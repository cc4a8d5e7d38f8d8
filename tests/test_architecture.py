"""The house keeps its order: who may import whom, how large a room is, what importing costs, which names are public."""

import ast
import subprocess
import sys
from collections import defaultdict
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from conftest import ROOT

# module of gradlens -> the modules of gradlens that it may import
GROUND = {"errors", "settings", "geometry", "clustering", "words", "names", "ranks", "interruption"}
ARROWS = {
    "errors": set(),
    "settings": {"errors"},
    "interruption": {"errors"},
    "names": {"errors"},
    "ranks": {"errors"},
    "geometry": {"errors", "settings"},
    "clustering": {"errors", "settings", "geometry"},
    "words": set(),
    "moved": set(),
    "log": GROUND,
    "examples": {"log"},
    "processes": GROUND,
    "run": {*GROUND, "log"},
    "sealing": {*GROUND, "log", "run"},
    "custody": {*GROUND, "log", "run"},
    "statistics": {*GROUND, "log"},
    "scorers": {*GROUND, "log"},
    "detectors": {*GROUND, "log", "statistics", "scorers"},
    "aggregators": {*GROUND, "log", "detectors"},
    "evaluation": {*GROUND, "log"},
    "case": {*GROUND, "log", "statistics", "scorers", "detectors", "evaluation", "attribution"},
    "mitigation": {*GROUND, "log"},
    "attribution": {*GROUND, "log", "statistics", "scorers", "evaluation"},
    "localization": {*GROUND, "log", "run", "statistics", "scorers", "evaluation"},
    "replays": {*GROUND, "log", "run", "detectors", "aggregators"},
    "server": {*GROUND, "log", "custody", "detectors", "aggregators"},
    "integrations": {*GROUND, "log", "detectors", "aggregators", "server"},
    "ingestion": {*GROUND, "log", "run"},
    "plots": {*GROUND, "log", "run", "statistics", "scorers", "evaluation"},
    "reporting": {
        *GROUND, "log", "run", "statistics", "scorers", "detectors", "aggregators", "evaluation", "localization",
        "plots", "attribution", "case", "replays",
    },
}  # fmt: skip
ABOVE = {"__init__", "__main__", "cli"}  # what may import everything
# file names that stand twice, for the same subject seen by two packages
SAME_SUBJECT = {"adapters", "custody", "final_layer", "localization"}
LONGEST_FUNCTION, LONGEST_FILE = 60, 500
PUBLIC = {
    "Round", "ModelSpec", "UpdateLog", "LogWriter", "Run", "Sweep", "Verdict", "Case", "CannotSay", "score_by",
    "calibrate", "filtered", "investigate", "localize", "evaluate", "report", "open", "STATISTICS", "SCORERS",
    "DETECTORS", "AGGREGATORS",
}  # fmt: skip


def sources(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


EVERY_FILE = [*sources("gradlens"), *sources("simulations")]
TREES = {path: ast.parse(path.read_text()) for path in EVERY_FILE}


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


def module_file(dotted: str) -> Path | None:
    """The file of a module of ours, None for a name that is no module."""
    path = ROOT.joinpath(*dotted.split("."))
    candidates = (path.with_suffix(".py"), path / "__init__.py")
    return next((each for each in candidates if each in TREES), None)


def imports(path: Path) -> set[str]:
    """Dotted names that a file imports anywhere, inside functions and for type checkers too."""
    names = set()
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                member = f"{node.module}.{alias.name}"
                names.add(member if module_file(member) else node.module)
    return names


def of_gradlens(path: Path) -> set[str]:
    """The modules of gradlens that a file imports."""
    return {name.split(".")[1] for name in imports(path) if name.startswith("gradlens.")}


@pytest.mark.parametrize("path", sources("gradlens"), ids=named)
def test_the_arrows_of_gradlens(path):
    module = path.relative_to(ROOT / "gradlens").parts[0].removesuffix(".py")
    if module not in ABOVE:
        assert of_gradlens(path) - {module} <= ARROWS[module]


@pytest.mark.parametrize("path", sources("gradlens"), ids=named)
def test_only_the_command_line_reaches_up_to_simulations(path):
    reaches = any(name.split(".")[0] == "simulations" for name in imports(path))
    assert not reaches or path.parent.name == "cli"


def test_simulations_do_not_reach_up_to_their_studies():
    studies = ROOT / "simulations" / "studies"
    below = [path for path in sources("simulations") if studies not in path.parents]
    assert [named(path) for path in below if any(n.startswith("simulations.studies") for n in imports(path))] == []


@pytest.mark.parametrize("path", sources("simulations"), ids=str)
def test_what_a_run_stores_becomes_a_scenario_in_one_place(path):
    if path.name == "scenario.py":
        return
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    made = [call for call in calls if getattr(call.func, "id", "") == "Scenario"]
    stored = [ast.unparse(word.value) for call in made for word in call.keywords if word.arg is None]
    assert not [text for text in stored if text.endswith("scenario")], "use stored_scenario, which imports nothing"


def test_no_file_imports_itself_through_others():
    graph = {
        path: {file for name in imports(path) if (file := module_file(name)) is not None} - {path}
        for path in EVERY_FILE
        if path != ROOT / "gradlens" / "__init__.py"  # its names are imported when they are used
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(named(path) for path in error.args[1]))


def test_every_module_has_its_arrows():
    modules = {path.relative_to(ROOT / "gradlens").parts[0].removesuffix(".py") for path in sources("gradlens")}
    assert modules - ABOVE == set(ARROWS)


@pytest.mark.parametrize("path", EVERY_FILE, ids=named)
def test_no_private_name_of_another_module(path):
    borrowed, modules = [], set()
    for node in ast.walk(TREES[path]):
        if (
            isinstance(node, ast.ImportFrom)
            and node.module
            and node.module.split(".")[0] in ("gradlens", "simulations")
        ):
            borrowed += [alias.name for alias in node.names if is_private(alias.name)]
            modules |= {a.asname or a.name for a in node.names if module_file(f"{node.module}.{a.name}")}
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules:
            borrowed += [node.attr] if is_private(node.attr) else []
    assert borrowed == []


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def test_no_public_function_shadows_its_module():
    shadowing = []
    for init in (path for path in EVERY_FILE if path.name == "__init__.py"):
        modules = {path.stem for path in init.parent.glob("*.py")}
        modules |= {path.parent.name for path in init.parent.glob("*/__init__.py")}
        for node in TREES[init].body:
            if isinstance(node, ast.ImportFrom):
                names = {a.asname or a.name for a in node.names if not module_file(f"{node.module}.{a.name}")}
                shadowing += [f"{named(init)}: {name}" for name in names & modules]
    assert shadowing == []


def test_a_file_is_found_by_its_name():
    places = defaultdict(list)
    for path in EVERY_FILE:
        if path.name not in ("__init__.py", "__main__.py"):
            places[path.stem].append(named(path))
    twice = {stem: files for stem, files in places.items() if len(files) > 1}
    assert {stem: files for stem, files in twice.items() if stem not in SAME_SUBJECT} == {}


Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def lines_of_docstring(node: Documented) -> int:
    """Lines of the docstring of a module, class or function; 0 without one."""
    if ast.get_docstring(node) is None:
        return 0
    return (node.body[0].end_lineno or node.body[0].lineno) - node.body[0].lineno + 1


def lines_of_code(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function without those of its docstring."""
    return (function.end_lineno or function.lineno) - function.lineno + 1 - lines_of_docstring(function)


def test_every_function_fits_a_screen():
    lengths = {
        f"{named(path)}: {node.name}": lines_of_code(node)
        for path, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    assert {name: length for name, length in lengths.items() if length > LONGEST_FUNCTION} == {}


def test_every_file_is_easy_to_read_through():
    lengths = {named(path): path.read_text().count("\n") for path in EVERY_FILE}
    assert {name: length for name, length in lengths.items() if length > LONGEST_FILE} == {}


def test_importing_gradlens_imports_neither_torch_nor_simulations_nor_a_framework():
    heavy = ("torch", "simulations", "datasets", "flwr", "nvflare", "pfl", "byzfl")
    code = f"import sys, gradlens; print(*(name for name in {heavy} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_the_public_names_are_there():
    import gradlens
    import simulations

    assert set(gradlens.__all__) >= PUBLIC
    assert all(hasattr(gradlens, name) for name in gradlens.__all__)
    assert set(simulations.__all__) >= {"Scenario", "sweep", "run", "run_sweep", "ATTACKS", "TASKS"}


def test_torch_is_pinned_and_every_constraint_is_a_version():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    assert "torch==2.13.0" in lines
    assert not any(name in line for line in lines for name in ("torchvision", "hdbscan", "hydra"))
    assert all(line.count("==") == 1 for line in lines)


def test_an_integration_is_one_short_file():
    lengths = {}  # without docstrings
    for path in sources("gradlens/integrations"):
        docstrings = sum(lines_of_docstring(node) for node in ast.walk(TREES[path]) if isinstance(node, Documented))
        lengths[path.name] = path.read_text().count("\n") - docstrings
    assert {name: n for name, n in lengths.items() if n >= 125} == {}
