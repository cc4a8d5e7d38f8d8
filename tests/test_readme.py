"""What the README shows is what happens, and it stays a front page."""

import re

import pytest

from conftest import ROOT
from snippets import blocks

PATH = ROOT / "README.md"
README = PATH.read_text(encoding="utf-8")
FIFTEEN_LINES, SERVER = (block.code for block in blocks(PATH, "python"))


def test_it_fits_on_a_front_page():
    assert len(README.splitlines()) <= 130
    assert len(README) <= 12_000


def test_the_fifteen_lines_run_and_name_an_attacker(tmp_path, monkeypatch, capsys):
    code_lines = [line for line in FIFTEEN_LINES.splitlines() if line.strip()]
    assert len(code_lines) <= 15
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(compile(FIFTEEN_LINES, "README.md", "exec"), names)
    flagged = re.findall(r"client-\d\d", capsys.readouterr().out)
    truth = names["attacked"].truth
    assert set(truth.loc[truth["compromised"], "client"]) <= set(flagged)
    assert (tmp_path / "reports" / "readme.html").stat().st_size > 10_000
    assert set(names["update"]) == set(names["attacked"].log.model)


def test_the_server_of_the_readme_records_what_clients_send(tmp_path, monkeypatch):
    import torch

    import gradlens

    def trained(state, x, y):
        local = torch.nn.Linear(3, 2)
        local.load_state_dict(state)
        torch.nn.functional.cross_entropy(local(x), y).backward()
        return {name: p.detach() - 0.1 * p.grad for name, p in local.named_parameters()}

    torch.manual_seed(0)
    x, y = torch.randn(8, 20, 3), torch.randint(2, (8, 20))
    y[7] = 1 - (x[7].sum(axis=1) > 0).long()
    names = {"model": torch.nn.Linear(3, 2), "trained": trained}
    before = {name: array.clone() for name, array in names["model"].state_dict().items()}
    names["clients"] = {f"client-{i}": (x[i], y[i]) for i in range(8)}
    monkeypatch.chdir(tmp_path)
    exec(compile(SERVER, "README.md", "exec"), names)
    found = gradlens.open(tmp_path / "runs" / "server")
    assert found.is_closed
    assert len(found.log) == 5
    assert found.verify().intact
    assert len(found.verdicts) == 5 * 8
    assert not torch.equal(names["model"].state_dict()["weight"], before["weight"])


def test_it_promises_no_more_than_there_is():
    import gradlens
    import simulations

    by_score = [name for name, build in gradlens.DETECTORS.items() if "score_by" in repr(build)]
    there = {
        "statistics": gradlens.STATISTICS,
        "scorers": gradlens.SCORERS,
        "published detectors": set(gradlens.DETECTORS) - set(by_score) - {"panel"},
        "aggregation rules": gradlens.AGGREGATORS,
        "attacks": simulations.ATTACKS,
        "partitions": simulations.PARTITIONS,
        "schedules": simulations.SCHEDULES,
    }
    numbers = re.findall(r"\b(\d+) \[?(published detectors|aggregation rules|[a-z]+)", README)
    promised = {what: int(number) for number, what in numbers if what in there}
    assert set(promised) == set(there)
    assert {what: n for what, n in promised.items() if n > len(there[what])} == {}


@pytest.mark.parametrize("path", sorted(set(re.findall(r"`((?:gradlens|simulations|docs|reports)/[\w./]*)`", README))))
def test_the_places_that_it_names_exist(path):
    assert (ROOT / path).exists() or path in ("docs/_build/html", "reports/demo.html")  # those are made


@pytest.mark.parametrize("path", re.findall(r"!\[.*?\]\((.*?)\)", README))
def test_its_picture_is_there(path):
    assert (ROOT / path).read_bytes().startswith(b"\x89PNG")


def test_its_commands_exist():
    import typer

    from gradlens.cli import app

    shown = set(re.findall(r"^gradlens (\w+)", "".join(block.code for block in blocks(PATH, "")), flags=re.MULTILINE))
    assert shown
    assert shown <= set(typer.main.get_command(app).commands)


def test_the_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = re.findall(r"^make ([\w-]+)", README, flags=re.MULTILINE)
    assert {"demo", "test"} <= set(targets)
    for target in targets:
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE)
