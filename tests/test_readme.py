"""What the README shows is what happens."""

import re
import tomllib

import pytest

from conftest import ROOT

README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)
    return [block for named, block in fenced if named == language]


def test_the_fifteen_lines_run_and_name_an_attacker(tmp_path, monkeypatch, capsys):
    (example,) = blocks("python")
    code_lines = [line for line in example.splitlines() if line.strip()]
    assert len(code_lines) <= 15
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(compile(example, "README.md", "exec"), names)
    flagged = re.findall(r"client-\d\d", capsys.readouterr().out)
    truth = names["attacked"].truth
    assert set(truth.loc[truth["compromised"], "client"]) <= set(flagged)
    assert (tmp_path / "reports" / "readme.html").stat().st_size > 10_000
    assert set(names["update"]) == set(names["attacked"].log.model)


def test_the_scenario_is_one():
    from simulations import Scenario, sweep

    settings = tomllib.loads(blocks("toml")[0])
    axes = settings.pop("sweep")
    scenarios = sweep(Scenario(**settings), **axes[0])
    assert len(scenarios) == 2 * 5 + 5  # cells and their controls


@pytest.mark.parametrize("path", re.findall(r"`((?:gradlens|simulations|notebooks|reports)/[\w./]*)`", README))
def test_the_places_that_it_names_exist(path):
    assert (ROOT / path).exists()


@pytest.mark.parametrize("path", re.findall(r"!\[.*?\]\((.*?)\)", README))
def test_its_picture_is_there(path):
    assert (ROOT / path).read_bytes().startswith(b"\x89PNG")


def test_its_commands_exist():
    from gradlens.cli import app

    named = {command.name or command.callback.__name__ for command in app.registered_commands}
    shown = set(re.findall(r"^gradlens (\w+)", "".join(blocks("")), flags=re.MULTILINE))
    assert shown
    assert shown <= named


def test_the_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", README, flags=re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE)
