"""What the command line says of itself: what there is, what is missing, and how quickly it starts."""

import json
import os
import subprocess
import sys
import time

import pytest

import gradlens
from conftest import ROOT
from gradlens.names import KINDS

WITHOUT_TORCH = "import sys; sys.modules['torch'] = None; from gradlens.cli import main; main()"


def ran(code: str, *words: str, **settings) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, **settings)


def test_list_names_everything_and_where_it_is_from(command):
    listed = json.loads(command("list", "--json")[1])
    assert tuple(listed) == KINDS
    assert [row["name"] for row in listed["detectors"]] == list(gradlens.DETECTORS)
    assert [row["name"] for row in listed["statistics"]] == list(gradlens.STATISTICS)
    assert {row["from"] for rows in listed.values() for row in rows} == {"built in"}
    assert all(row["summary"] for rows in listed.values() for row in rows)
    assert {row["needs"] for row in listed["attacks"]} == {"needs torch"}
    status, out, _ = command("list", "detectors")
    assert status == 0
    (fltrust,) = (line for line in out.splitlines() if line.split()[0] == "fltrust")
    assert "built in" in fltrust
    assert fltrust.endswith("[takes a function reference]")


def test_doctor_says_what_an_extra_would_bring(command, monkeypatch):
    from gradlens.cli import installation

    monkeypatch.setitem(installation.EXTRAS, "telescope", (("no-such-distribution",), "a view of the stars"))
    status, out, _ = command("doctor")
    assert status == 0
    assert "telescope: missing; pip install 'gradlens-forensics[telescope]' brings a view of the stars" in out
    facts = json.loads(command("doctor", "--json")[1])
    assert facts["required"]["numpy"]
    assert facts["extras"]["telescope"]["installed"] == {"no-such-distribution": ""}


def test_the_version_and_the_module_form():
    done = subprocess.run([sys.executable, "-m", "gradlens", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"gradlens {gradlens.__version__}\n"


@pytest.mark.parametrize("page", ["--help", "simulate --help", "detect --help"])
def test_help_has_no_stray_backslash_and_imports_nothing_heavy(page):
    heavy = ("numpy", "pandas", "scipy", "torch", "rich", "pydantic", "matplotlib", "simulations")
    code = "import sys\nfrom gradlens.cli import main\ntry: main()\n"
    code += f"except SystemExit: print([name for name in {heavy} if name in sys.modules])"
    done = ran(code, *page.split())
    assert done.stdout.rstrip().endswith("[]")
    assert "\\" not in done.stdout


def test_help_starts_within_twice_and_a_half_the_time_of_numpy():
    """A ratio of the fastest of several starts on one machine, taken in turns."""

    def seconds(*words: str) -> float:
        began = time.perf_counter()
        subprocess.run([sys.executable, *words], capture_output=True, check=True)
        return time.perf_counter() - began

    times = [(seconds("-m", "gradlens", "--help"), seconds("-c", "import numpy")) for _ in range(7)]
    ours, numpys = map(min, zip(*times, strict=True))
    assert ours < 2.5 * numpys


def test_what_needs_torch_says_so_in_one_line(recorded, tmp_path):
    (tmp_path / "s.toml").write_text("rounds = 1\n")
    for words in (["demo"], ["simulate", "s.toml", "-o", "out"]):
        done = ran(WITHOUT_TORCH, *words, cwd=tmp_path)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.count("\n") == 1
        assert "torch" in done.stderr
        assert "gradlens-forensics[simulations]" in done.stderr
    done = ran(WITHOUT_TORCH, "replay", str(recorded), cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_completion_of_the_shell_names_the_commands():
    told = os.environ | {"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}  # not every parent process is a shell
    done = subprocess.run(
        [sys.executable, "-m", "gradlens", "--show-completion", "bash"], capture_output=True, text=True, env=told
    )
    assert done.returncode == 0
    assert "complete" in done.stdout


def test_the_lazy_names_are_those_that_type_checkers_see():
    import ast

    tree = ast.parse((ROOT / "gradlens" / "__init__.py").read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {
        (node.module.removeprefix("gradlens."), alias.asname or alias.name)
        for node in block.body
        if isinstance(node, ast.ImportFrom) and node.module
        for alias in node.names
    }
    assert seen == {(module, name) for module, names in gradlens._HOMES.items() for name in names}
    assert {name for _, name in seen} == set(gradlens.__all__)


def test_old_module_paths_warn_and_the_functions_stay():
    import gradlens.report as _  # noqa: F401 - a path of version 0.1

    assert callable(gradlens.report)
    assert callable(gradlens.ingest)
    with pytest.warns(DeprecationWarning, match="gradlens.report is now gradlens.reporting"):
        from gradlens.report import report
    assert report is gradlens.report
