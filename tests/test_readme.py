"""What the README shows is what happens."""

import re
import sys
import tomllib

import pytest

from conftest import ROOT

README = (ROOT / "README.md").read_text()


PANEL, SERVER, AFTER = 2, 3, 4  # which of its examples those are


def blocks(language: str) -> list[str]:
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)
    return [block for named, block in fenced if named == language]


def test_the_fifteen_lines_run_and_name_an_attacker(tmp_path, monkeypatch, capsys):
    example = blocks("python")[0]
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


SWEPT = "simulate swept.toml -o swept --workers 1 --set samples_per_client=50"  # its controls, too, are measured


def test_your_own_model_runs_and_says_that_it_has_no_final_bias(tmp_path, monkeypatch, capsys):
    from gradlens.cli import main

    (tmp_path / "my_task.py").write_text(blocks("python")[1])
    lines = ['task = "my_task:blobs"', 'model = "own"', "num_clients = 8", "rounds = 6", "num_malicious = 2"]
    attack = ["[attack.trigger]", "target_label = 0", "size = 2", "[attack.scaling]", "factor = 4.0"]
    (tmp_path / "mine.toml").write_text("\n".join([*lines, *attack]))
    (tmp_path / "swept.toml").write_text("\n".join([*lines, *attack, "[[sweep]]", "seed = [0, 1]"]))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*sys.path])
    for command in ("simulate mine.toml -o run --workers 1", "detect run -d final_bias", SWEPT):
        monkeypatch.setattr("sys.argv", ["gradlens", *command.split()])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 0
    assert "abstained in 6 verdicts" in capsys.readouterr().out
    sys.modules.pop("my_task")


def test_the_names_that_it_lists_are_those_that_there_are():
    from simulations import ATTACKS, MODELS, PARTITIONS, SCHEDULES

    rows = {cells[1].strip(): cells[2] for line in README.splitlines() if len(cells := line.split("|")) == 4}
    attacks = "".join(text for name, text in rows.items() if name.startswith("`attack`"))
    listed = {"`model`": [*MODELS, "own"], "`partition`": PARTITIONS, "`schedule`": SCHEDULES}
    for row, names in listed.items():
        assert set(re.findall(r"`(\w+)`", rows[row])) == set(names)
    assert sorted(re.findall(r"`(\w+)`", attacks)) == sorted(ATTACKS)


def test_what_can_be_measured_is_all_of_it():
    import gradlens

    section = README.split("## What can be measured")[1].split("```")[0]
    rows = {
        c[1].strip(): set(re.findall(r"`(\w+)`", c[2]))
        for line in section.splitlines()
        if len(c := line.split("|")) == 4
    }
    statistics = set().union(*(names for name, names in rows.items() if name.startswith("statistics")))
    assert statistics == set(gradlens.STATISTICS)
    assert rows["scorers"] - {"outlier"} == set(gradlens.SCORERS)
    assert rows["published detectors"] | rows["all together"] <= set(gradlens.DETECTORS)
    by_score = {name for name, build in gradlens.DETECTORS.items() if "score_by" in repr(build)}
    assert set(gradlens.DETECTORS) - by_score == rows["published detectors"] | rows["all together"]
    assert all(hasattr(gradlens, name) for name in rows["attribution"])


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
    exec(compile(blocks("python")[SERVER], "README.md", "exec"), names)
    found = gradlens.open(tmp_path / "runs" / "server")
    assert found.is_closed
    assert len(found.log) == 5
    assert found.verify().intact
    assert len(found.verdicts) == 5 * 8
    assert not torch.equal(names["model"].state_dict()["weight"], before["weight"])


def test_the_filter_of_the_readme_is_calibrated_on_its_first_rounds():
    from simulations import Scenario

    found = Scenario(rounds=20, **tomllib.loads(blocks("toml")[1]))
    assert found.label("filter") == "out_for=5, clean_rounds=10, fpr=0.02"


def test_after_training_channels_are_pruned_and_weights_adjusted():
    import torch

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 6, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(96, 3))
    images = torch.randn(40, 1, 6, 6)
    with torch.no_grad():
        labels = model(images).argmax(axis=1)

    def accuracy(found):
        with torch.no_grad():
            return float((found(images).argmax(axis=1) == labels).float().mean())

    names = {"model": model, "accuracy": accuracy, "images_of_the_server": images}
    names["clients"] = {f"client-{i}": images[i::4] for i in range(4)}
    exec(compile(blocks("python")[AFTER], "README.md", "exec"), names)
    table = names["done"].table
    assert table["step"].tolist() == ["none", "pruning", "adjustment"]
    assert (table["validation_accuracy"].iloc[1:] >= 1 - 2 * 0.02).all()
    assert table["main_accuracy"].iloc[0] == 1


def test_the_rules_that_it_lists_are_those_that_there_are():
    from gradlens import AGGREGATORS

    text = README.split("Rules to aggregate by:")[1].split("\n\n")[0]
    assert set(re.findall(r"`(\w+)`", text)) == set(AGGREGATORS)


def test_the_panel_of_the_readme_names_an_attacker(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(compile(blocks("python")[PANEL], "README.md", "exec"), names)
    truth = names["attacked"].truth
    assert names["worst"] in set(truth.loc[truth["compromised"], "client"])
    assert "attack-free: 8 runs" in capsys.readouterr().out


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
