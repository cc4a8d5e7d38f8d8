"""CONTRIBUTING is enough: its steps, followed as they are written, add what they promise and touch no other file."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import ROOT
from snippets import FILE, Block, blocks, run_page

PAGE = ROOT / "CONTRIBUTING.md"
COPIED = (
    "gradlens",
    "simulations",
    "tests",
    "docs",
    "pyproject.toml",
    "constraints.txt",
    "README.md",
    "CONTRIBUTING.md",
    "Makefile",
)
LEFT_OUT = shutil.ignore_patterns("__pycache__", "_build", "generated")
TABLE = re.compile(r"^(\w+)[^\n]*\{\n    \.\.\.\n(.*?)^\}", flags=re.MULTILINE | re.DOTALL)
ROW = re.compile(r"<!-- ([\w./-]+) -->\n")
SCENARIO = """
attack = {label_flip = {source_label = 7, target_label = 1}, rounding = {step = 0.01}}
aggregator = "midrange"
detector = "norm_ratio"
num_malicious = 2
num_clients = 6
samples_per_client = 20
rounds = 2
"""


def steps() -> list[tuple[str, Block]]:
    """File of the repository -> what becomes of it, in the order of the page."""
    named = [(block.file or ROW.match(block.code), block) for block in blocks(PAGE)]
    found = [(name if isinstance(name, str) else name[1], block) for name, block in named if name]
    return [(name, block) for name, block in found if "/" in name]


def follow(folder: Path) -> set[str]:
    """Follows every step in a copy of the repository; the files that were touched."""
    for name, block in steps():
        path = folder / name
        if not path.exists():
            path.write_text(block.code, encoding="utf-8")
        elif path.suffix == ".md":
            add_row(path, ROW.sub("", block.code))
        else:
            add_entries(path, FILE.sub("", block.code))
    return {name for name, _ in steps()}


def add_row(path: Path, row: str) -> None:
    """A row below the last one of the page's last table."""
    lines = path.read_text(encoding="utf-8").split("\n")
    last = max(position for position, line in enumerate(lines) if line.startswith("|"))
    path.write_text("\n".join([*lines[: last + 1], row.strip(), *lines[last + 1 :]]), encoding="utf-8")


def add_entries(path: Path, code: str) -> None:
    """Imports among the imports, and lines at the end of the tables that are shown with `...` in place of the rest."""
    text = path.read_text(encoding="utf-8")
    for line in re.findall(r"^from .*$", code, flags=re.MULTILINE):
        first = re.search(r"^from gradlens|^from simulations", text, flags=re.MULTILINE)
        assert first, path
        text = f"{text[: first.start()]}{line}\n{text[first.start() :]}"
    shown = TABLE.findall(code)
    assert shown, f"no table in the step for {path}"
    for table, lines in shown:
        opened = re.search(rf"^{table}\b[^\n]* = [^\n]*\{{", text, flags=re.MULTILINE)
        assert opened, f"{path} has no table {table}"
        place = text.index("\n}", opened.end()) + 1
        new = [line for line in lines.splitlines(keepends=True) if line.strip() != "..."]
        if (before := text.find(f"\n{new[0]}", opened.end(), place)) >= 0:  # an entry that is there: below it
            place = before + 1 + len(new.pop(0))
        text = f"{text[:place]}{''.join(new)}{text[place:]}"
    path.write_text(text, encoding="utf-8")


def python(folder: Path, *words: object) -> str:
    """Runs Python in the copy, with its packages; what it printed."""
    environment = os.environ | {"PYTHONPATH": str(folder)}
    command = [sys.executable, *map(str, words)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and not {"__pycache__", ".pytest_cache", ".ruff_cache"} & set(path.parts)
    }


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    """A copy of the repository in which every step was followed, and that touched only the files that they name."""
    folder = tmp_path_factory.mktemp("a clone")
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=LEFT_OUT)
        else:
            shutil.copy(ROOT / name, folder / name)
    before = contents(folder)
    touched = follow(folder)
    python(folder, "-m", "ruff", "check", "--quiet", "--fix", "--no-cache", *(n for n in touched if n.endswith(".py")))
    after = contents(folder)
    assert {name for name in after if after[name] != before.get(name)} == touched
    return folder


def test_every_kind_has_its_example():
    headings = re.findall(r"^## (.*)$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    kinds = ["A statistic", "A detector", "An aggregation rule", "An attack", "A task", "An integration"]
    assert [heading for heading in headings if heading in kinds] == kinds
    assert {"From outside", "Deprecation", "Style, in ten lines"} <= set(headings)


def test_the_contracts_accept_what_was_added(copy):
    added = ["largest_number", "norm_ratio", "midrange", "rounding", "test_toy"]
    whole = ["tables_hold", "order_of_the_table", "decided", "guide_names"]
    files = [f"tests/{name}.py" for name in ("test_contracts", "test_attacks", "test_evidence")]
    files += [f"tests/integration/{name}.py" for name in ("test_toy", "test_frameworks")]
    out = python(copy, "-m", "pytest", *files, "-k", " or ".join([*added, *whole]))
    passed = re.search(r"(\d+) passed", out)
    assert passed
    assert int(passed[1]) > 40


def test_the_house_accepts_what_was_added(copy):
    python(copy, "-m", "pytest", "tests/test_architecture.py", "-k", "not public_names and not importing")
    python(copy, "-m", "ruff", "check", "--no-cache", *sorted({name for name, _ in steps() if name.endswith(".py")}))
    python(copy, "-m", "ruff", "format", "--check", "--no-cache", *sorted({n for n, _ in steps() if n.endswith(".py")}))


def test_the_examples_of_the_docstrings_run(copy):
    added = [name for name, _ in steps() if not (ROOT / name).exists() and not name.startswith("tests")]
    out = python(copy, "-m", "pytest", "--doctest-modules", *added)
    assert re.search(r"[4-9] passed", out)


def test_a_scenario_takes_them(copy, tmp_path):
    (tmp_path / "scenario.toml").write_text(SCENARIO)
    code = f"""
from gradlens import DETECTORS, STATISTICS
from simulations import Scenario, run
recorded = run(Scenario.load({str(tmp_path / "scenario.toml")!r}), {str(tmp_path / "run")!r})
assert recorded.log.verdict(DETECTORS["norm_ratio"]()).null
assert STATISTICS["largest_number"](recorded.log).shape == (6, 4)
"""
    python(copy, "-c", code)


def test_the_task_runs_from_where_it_is(tmp_path, monkeypatch):
    text = PAGE.read_text(encoding="utf-8")
    (tmp_path / "page.md").write_text(text[text.index("## A task") : text.index("## An integration")])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    run_page(tmp_path / "page.md", tmp_path)
    sys.modules.pop("stripes", None)
    assert (tmp_path / "runs" / "stripes" / "closed").exists()


def test_the_groups_of_entry_points_are_those_that_are_asked():
    from gradlens.names import KINDS

    text = PAGE.read_text(encoding="utf-8").split("## From outside")[1]
    assert {f"gradlens.{kind}" for kind in KINDS} == set(re.findall(r"`(gradlens\.\w+)`", text.split("Each entry")[0]))


def test_the_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^make ([\w-]+)", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE)
