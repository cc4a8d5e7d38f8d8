"""The house keeps its order: who may import whom, what importing costs, which names are public."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import ROOT

# module of gradlens -> the modules of gradlens that it may import
GROUND = {"errors", "settings", "geometry", "clustering", "words", "names"}
ARROWS = {
    "errors": set(),
    "settings": {"errors"},
    "geometry": set(),
    "clustering": {"geometry"},
    "words": set(),
    "names": {"errors"},
    "examples": {"log"},
    "log": GROUND,
    "processes": GROUND,
    "run": {*GROUND, "log"},
    "statistics": {*GROUND, "log"},
    "scorers": {*GROUND, "log"},
    "detectors": {*GROUND, "log", "statistics", "scorers"},
    "aggregators": {*GROUND, "log", "detectors"},
    "evaluation": {*GROUND, "log"},
    "mitigation": {*GROUND, "log"},
    "attribution": {*GROUND, "log", "statistics", "scorers", "evaluation"},
    "localization": {*GROUND, "log", "run", "statistics", "scorers", "evaluation"},
    "replays": {*GROUND, "log", "run", "detectors", "aggregators"},
    "server": {*GROUND, "log", "detectors", "aggregators"},
    "integrations": {*GROUND, "log", "detectors", "aggregators", "server"},
    "ingestion": {*GROUND, "log", "run"},
    "plots": {*GROUND, "log", "run", "statistics", "scorers", "evaluation"},
    "reporting": {
        *GROUND, "log", "run", "statistics", "scorers", "detectors", "aggregators", "evaluation", "localization",
        "plots",
    },
}  # fmt: skip
PUBLIC = {
    "Round", "ModelSpec", "UpdateLog", "LogWriter", "Run", "Sweep", "Verdict", "CannotSay", "score_by", "calibrate",
    "filtered", "localize", "evaluate", "report", "open", "STATISTICS", "SCORERS", "DETECTORS", "AGGREGATORS",
}  # fmt: skip


def sources(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imports(path: Path) -> set[str]:
    """Dotted names that a file imports when it runs; those for type checkers only are left out."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def of_gradlens(path: Path) -> set[str]:
    """The modules of gradlens that a file imports."""
    names = {path.stem for path in (ROOT / "gradlens").iterdir()}
    parts = [name.split(".") for name in imports(path) if name.startswith("gradlens.")]
    return {part[1] for part in parts if part[1] in names}


@pytest.mark.parametrize("path", sources("gradlens"), ids=lambda path: str(path.relative_to(ROOT)))
def test_the_arrows_of_gradlens(path):
    module = path.relative_to(ROOT / "gradlens").parts[0].removesuffix(".py")
    if module in ("__init__", "cli"):
        return
    assert of_gradlens(path) - {module} <= ARROWS[module]


@pytest.mark.parametrize("path", sources("gradlens"), ids=lambda path: str(path.relative_to(ROOT)))
def test_only_the_command_line_reaches_up_to_simulations(path):
    reaches = any(name.split(".")[0] == "simulations" for name in imports(path))
    assert not reaches or path.name == "cli.py"


def test_every_module_has_its_arrows():
    modules = {path.relative_to(ROOT / "gradlens").parts[0].removesuffix(".py") for path in sources("gradlens")}
    assert modules - {"__init__", "cli"} == set(ARROWS)


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


def test_no_file_is_larger_than_it_should_be():
    lengths = {
        str(p.relative_to(ROOT)): p.read_text().count("\n") for p in sources("gradlens") + sources("simulations")
    }
    assert {name: n for name, n in lengths.items() if n > 600} == {}


def test_an_integration_is_one_short_file():
    lengths = {path.name: path.read_text().count("\n") for path in sources("gradlens/integrations")}
    assert {name: n for name, n in lengths.items() if n >= 150} == {}
