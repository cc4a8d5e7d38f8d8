"""What a user installs: wheel and sdist hold what they should, and the wheel works where torch is missing."""

import email
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

from conftest import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
SOURCES = ("pyproject.toml", "README.md", "LICENSE", "gradlens", "simulations")
BUILDS = "import sys; from setuptools import build_meta; print(getattr(build_meta, sys.argv[1])(sys.argv[2]))"
HIDDEN = ("torch", "functorch", "torchgen", "gradlens", "__editable__", "easy-install", "distutils-precedence")
LICENSES = (77, 0)  # the first setuptools that reads `license = "Apache-2.0"`


def setuptools_version() -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in version("setuptools").split(".")[:2])
    except PackageNotFoundError:
        return (0, 0)


pytestmark = pytest.mark.skipif(setuptools_version() < LICENSES, reason="needs setuptools 77: `make test` installs it")


def run(*command, folder: Path, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess:
    hidden = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
    clean = {name: value for name, value in os.environ.items() if name not in hidden}
    return subprocess.run(
        [str(word) for word in command], cwd=folder, env=clean | (environment or {}), capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A folder with wheel and sdist, built from a copy of the sources, below a path with a space in it."""
    folder = tmp_path_factory.mktemp("a b")
    source, out = folder / "source", folder / "dist"
    source.mkdir()
    out.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, source / name)
    for what in ("build_wheel", "build_sdist"):
        done = run(sys.executable, "-c", BUILDS, what, out, folder=source)
        assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="module")
def wheel(built) -> Path:
    return next(built.glob("*.whl"))


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory) -> Path:
    """The interpreter of an environment with the wheel and its dependencies, without torch and what needs it."""
    folder = tmp_path_factory.mktemp("without torch")
    venv.create(folder / "venv", with_pip=False)
    python = folder / "venv" / "bin" / "python"
    done = run(sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", "--no-index", wheel,
               folder=folder)  # fmt: skip
    assert done.returncode == 0, done.stderr
    installed = folder / "installed"
    installed.mkdir()
    for entry in sys.path:
        if Path(entry).name != "site-packages":
            continue
        for path in Path(entry).iterdir():
            if not path.name.startswith(HIDDEN) and path.suffix != ".pth" and not (installed / path.name).exists():
                (installed / path.name).symlink_to(path)
    (site,) = (folder / "venv" / "lib").glob("python*/site-packages")
    (site / "installed.pth").write_text(f"{installed}\n")
    return python


@pytest.fixture
def gradlens(python, tmp_path):
    """Runs `gradlens ...` of that environment in an empty folder."""
    return lambda *words: run(python.with_name("gradlens"), *words, folder=tmp_path)


def test_the_wheel_holds_the_packages_and_their_data_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    scenarios = {f"simulations/scenarios/{path.name}" for path in (ROOT / "simulations" / "scenarios").glob("*.toml")}
    wanted = {"gradlens/py.typed", "simulations/py.typed", "gradlens/reporting/report.html.jinja", *scenarios}
    assert wanted <= set(names)
    modules = {
        str(path.relative_to(ROOT)) for name in ("gradlens", "simulations") for path in (ROOT / name).rglob("*.py")
    }
    assert modules <= set(names)
    assert {name.split("/")[0].split("-")[0] for name in names} == {"gradlens", "simulations", "gradlens_forensics"}


def test_the_metadata_say_what_a_user_looks_for(wheel):
    archive = zipfile.ZipFile(wheel)
    (name,) = (name for name in archive.namelist() if name.endswith("METADATA"))
    metadata = email.message_from_bytes(archive.read(name))
    assert metadata["Version"] == PROJECT["version"]
    assert metadata["License-Expression"] == "Apache-2.0"
    assert {url.split(", ")[0] for url in metadata.get_all("Project-URL", [])} >= {
        "Homepage",
        "Documentation",
        "Issues",
    }
    assert set(metadata.get_all("Provides-Extra", [])) == set(PROJECT["optional-dependencies"])
    assert metadata.get_payload().startswith("# gradlens")


def test_the_sdist_builds_the_same_wheel(built, wheel, tmp_path):
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        archive.extractall(tmp_path, filter="data")
    (source,) = tmp_path.iterdir()
    done = run(sys.executable, "-c", BUILDS, "build_wheel", tmp_path, folder=source)
    assert done.returncode == 0, done.stderr
    again = zipfile.ZipFile(next(tmp_path.glob("*.whl")))
    before = zipfile.ZipFile(wheel)
    assert {item.filename: item.CRC for item in again.infolist() if not item.filename.endswith("RECORD")} == {
        item.filename: item.CRC for item in before.infolist() if not item.filename.endswith("RECORD")
    }


def test_it_imports_without_torch(python, tmp_path):
    code = "import gradlens, sys; print(gradlens.__file__, gradlens.__version__, 'torch' in sys.modules)"
    done = run(python, "-c", code, folder=tmp_path)
    place, version_, torch = done.stdout.rsplit(maxsplit=2)
    assert (version_, torch) == (PROJECT["version"], "False"), done.stderr
    assert "without torch" in place
    assert run(python, "-c", "import torch", folder=tmp_path).returncode == 1


def test_the_command_works_without_torch(python, gradlens, tmp_path):
    assert gradlens("--version").stdout.split() == ["gradlens", PROJECT["version"]]
    code = (
        "import gradlens; from gradlens.examples import example_log; log = example_log()\n"
        "with gradlens.LogWriter.create('run', log.model, log[0].global_model) as writer:\n"
        "    [writer.commit(round_, round_.global_model) for round_ in log]"
    )
    assert run(python, "-c", code, folder=tmp_path).returncode == 0
    for words in (["inspect", "run"], ["verify", "run"], ["detect", "run"], ["report", "run", "-o", "run.html"]):
        done = gradlens(*words)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "run.html").stat().st_size > 10_000


@pytest.mark.parametrize("words", [["demo"], ["simulate", "scenario.toml", "-o", "out"]])
def test_what_needs_torch_says_so_in_one_line(gradlens, tmp_path, words):
    (tmp_path / "scenario.toml").write_text("rounds = 1\n")
    done = gradlens(*words)
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("gradlens: ")
    assert "torch" in line
    assert "gradlens-forensics[simulations]" in line


def test_citation_changelog_and_package_name_one_version():
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert re.search(rf"^version: {re.escape(PROJECT['version'])}$", citation, flags=re.MULTILINE)
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    latest = re.search(r"^## ([\d.]+)", changelog, flags=re.MULTILINE)
    assert latest is not None
    assert PROJECT["version"].startswith(latest[1])


def test_the_workflows_run_what_there_is():
    import yaml

    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    for path in (ROOT / ".github" / "workflows").glob("*.yml"):
        jobs = yaml.safe_load(path.read_text(encoding="utf-8"))["jobs"]
        runs = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
        named = {target for command in runs for target in re.findall(r"^make ([\w-]+)", command, flags=re.MULTILINE)}
        assert named
        assert named <= targets
