"""The command line: answers a script can read, one line where something is wrong, nothing half-written."""

import io
import json
import sys

import numpy as np
import pandas as pd
import pytest

from conftest import STATE, random_round
from gradlens import cli
from gradlens.log import LogWriter


@pytest.fixture
def command(capsys, monkeypatch, tmp_path):
    """Runs `gradlens ...` in an empty folder; gives exit status, standard output and standard error."""
    monkeypatch.chdir(tmp_path)

    def run(*words) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["gradlens", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return ended.value.code, *capsys.readouterr()

    return run


@pytest.fixture
def planted(tmp_path, model):
    """A run of four rounds of eight clients, one of which moves its final bias far."""
    clients = [f"client-{i}" for i in range(8)]
    with LogWriter.create(tmp_path / "planted", model, STATE) as writer:
        for index in range(4):
            updates = {name: array.copy() for name, array in random_round(index, clients).updates.items()}
            updates["fc2.bias"][3] += 40
            writer.commit(random_round(index, clients, updates=updates), STATE)
        truth = [(r, c, c == "client-3", c == "client-3") for r in range(4) for c in clients]
        writer.add_truth(pd.DataFrame(truth, columns=["round", "client", "compromised", "poisoned"]))
    return tmp_path / "planted"


COMMANDS = ("demo", "simulate", "inspect", "detect", "localize", "report", "verify")


def test_help_names_every_command_and_each_shows_an_example(command):
    status, out, _ = command("--help")
    assert status == 0
    for name in COMMANDS:
        assert name in out
        status, page, _ = command(name, "--help")
        assert status == 0
        assert f"Example: gradlens {name}" in " ".join(page.split())


def test_inspect_says_what_a_run_holds(command, planted):
    status, out, _ = command("inspect", planted, "--json")
    facts = json.loads(out)
    assert status == 0
    assert (facts["rounds"], facts["clients"], facts["state"], facts["truth"]) == (4, 8, "closed", True)
    assert facts["final bias"] == "fc2.bias"
    assert "rounds         4" in command("inspect", planted)[1]


def test_detect_names_the_planted_client(command, planted):
    status, out, _ = command("detect", planted, "-d", "final_bias", "--csv")
    table = pd.read_csv(io.StringIO(out), keep_default_na=False)
    assert status == 0
    assert list(table.columns) == ["round", "client", "detector", "score", "flag", "abstained"]
    worst = table.loc[table.groupby("round")["score"].idxmax(), "client"]
    assert set(worst) == {"client-3"}
    assert "client-3" in command("detect", planted, "-d", "final_bias")[1]


def test_localize_names_the_planted_layer(command, planted):
    status, out, _ = command("localize", planted, "--csv")
    table = pd.read_csv(io.StringIO(out), keep_default_na=False)
    best = table[(table["unit"] == "") & (table["auc"].astype(float) == 1)]
    assert status == 0
    assert "fc2.bias" in set(best["layer"])


def test_verify_tells_by_its_exit_status(command, planted):
    status, out, _ = command("verify", planted)
    head = json.loads(command("verify", planted, "--json")[1])[str(planted)]["head"]
    assert (status, head in out, "intact" in out) == (0, True, True)
    assert command("verify", planted, "--head", head)[0] == 0
    assert command("verify", planted, "--head", "0" * 64)[0] == 1
    (planted / "updates" / "round-000001.arrow").write_bytes(b"other")
    status, out, _ = command("verify", planted)
    assert status == 1
    assert "updates/round-000001.arrow: changed since it was committed" in out


def test_an_open_run_is_intact_and_says_that_it_is_open(command, record):
    folder = record(close=False).folder
    status, out, _ = command("verify", folder)
    assert (status, "3 rounds, open" in out) == (0, True)


def scenario(tmp_path, text):
    (tmp_path / "s.toml").write_text(text)
    return tmp_path / "s.toml"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["inspect", "nowhere"], "found nothing"),
        (["detect", "nowhere"], "found nothing"),
        (["report", "nowhere", "-o", "out.html"], "found nothing"),
        (["verify", "nowhere"], "found nothing"),
        (["detect", "table.csv"], "found a file"),
        (["report", "table.csv", "-o", "out.html"], "found a file"),
        (["verify", "table.csv"], "found a file"),
        (["localize", "run"], "the ground truth is needed here, and this run has none"),
        (["detect", "run", "-d", "kurm"], "expected one of final_bias"),
        (["detect", "run", "--fpr", "1.5"], "fpr is a rate above 0 and below 1, found 1.5"),
        (["simulate", "nowhere.toml", "-o", "out"], "no such file"),
        (["simulate", "table.csv", "-o", "out"], "expected a scenario in TOML"),
        (["simulate", "unknown.toml", "-o", "out"], "'learning_rat' is no setting"),
        (["simulate", "negative.toml", "-o", "out"], "poison_rate"),
        (["simulate", "good.toml", "-o", "out", "--set", "rounds"], "expected NAME=VALUE, found 'rounds'"),
        (["simulate", "good.toml", "-o", "out", "--set", "rounds=0"], "rounds"),
        (["simulate", "good.toml", "-o", "run"], "run"),
        (["frobnicate"], "frobnicate"),
        (["inspect"], "RUN"),
        (["inspect", "run", "--jsno"], "--jsno"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(command, recorded, tmp_path, words, expected):
    (tmp_path / "table.csv").write_text("round,client\n0,a\n")
    (tmp_path / "good.toml").write_text("rounds = 1\n")
    (tmp_path / "unknown.toml").write_text("learning_rat = 0.1\n")
    (tmp_path / "negative.toml").write_text('attack = "trigger"\nnum_malicious = 1\npoison_rate = -0.5\n')
    before = {path: path.stat().st_mtime_ns for path in sorted(tmp_path.rglob("*"))}
    status, out, err = command(*words)
    assert status == 2
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("gradlens: ")
    assert expected in err
    assert {path: path.stat().st_mtime_ns for path in sorted(tmp_path.rglob("*"))} == before


def test_a_single_client_is_an_explained_abstention(command, tmp_path, model):
    with LogWriter.create(tmp_path / "alone", model, STATE) as writer:
        writer.commit(random_round(0, ["a"]), STATE)
    status, out, _ = command("detect", "alone")
    assert status == 0
    assert "nobody was flagged" in out
    assert "has 1 comparable clients, at least 3 are needed" in out


def test_a_small_sweep_from_toml_to_report(command, tmp_path):
    toml = 'rounds = 3\nattack = "trigger"\n[[sweep]]\nnum_malicious = [0, 4]\nseed = [0, 1]\n'
    status, out, _ = command("simulate", scenario(tmp_path, toml), "-o", "sweep", "-w", "1")
    assert status == 0
    assert "ASR on control" in out
    status, out, _ = command("inspect", "sweep", "--json")
    assert (json.loads(out)["runs"], json.loads(out)["controls"]) == (4, 2)
    assert command("verify", "sweep")[0] == 0
    status, out, _ = command("localize", "sweep", "--csv")
    table = pd.read_csv(io.StringIO(out), keep_default_na=False)
    assert {"control", "phase", "layer", "auc"} <= set(table.columns)
    assert np.isfinite(table["auc"].astype(float)).all()
    assert command("report", "sweep", "-o", "deep/er/out.html", "-w", "1")[0] == 0
    assert "<html" in (tmp_path / "deep" / "er" / "out.html").read_text()
