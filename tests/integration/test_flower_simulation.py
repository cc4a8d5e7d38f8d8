"""Real Flower simulations (`flower_app.py`), each in a process of its own: ten clients, three of them poisoned."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import digits
import numpy as np
import pytest
from processes import ran

import gradlens
from gradlens import DETECTORS, cli

pytest.importorskip("flwr", reason="flwr is not installed: pip install 'gradlens-forensics[flower]'")
pytest.importorskip("ray", reason="ray is not installed: pip install 'gradlens-forensics[flower]'")

DETECTOR, MALICIOUS = "final_rows", {"1", "4", "8"}


def simulated(api: str, folder: Path) -> dict[str, dict[str, float]]:
    """What was reached. Ray gives up, and Flower waits for ever, where a busy machine needs 15 s to start Ray's agent:
    then it gets a second chance."""
    try:
        out = ran("flower_app.py", api, str(folder), DETECTOR)
    except subprocess.TimeoutExpired:
        shutil.rmtree(folder, ignore_errors=True)
        out = ran("flower_app.py", api, str(folder), DETECTOR)
    return json.loads([line for line in out.splitlines() if line.startswith("{")][-1])


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("flower")


@pytest.fixture(scope="module")
def message(folder) -> dict[str, dict[str, float]]:
    return simulated("message", folder / "message")


@pytest.fixture(scope="module")
def classic(folder) -> dict[str, dict[str, float]]:
    return simulated("classic", folder / "classic")


def recorded(folder: Path, api: str) -> gradlens.Run:
    run = gradlens.open(folder / api)
    assert run.verify().intact
    assert run.is_closed
    assert [(sorted(round_.clients), round_.refused) for round_ in run.log] == [([str(n) for n in range(10)], {})] * 4
    return run


def test_the_filter_takes_the_attack_away(message):
    assert message["without"]["asr"] > 0.9
    assert message["with"]["asr"] < 0.1
    assert message["with"]["accuracy"] > 0.7


def test_both_apis_see_and_decide_the_same(message, classic, folder):
    assert classic["with"] == pytest.approx(message["with"], abs=0.02)  # replies come in any order
    for api in ("message", "classic"):
        live = recorded(folder, api).verdicts
        for _, round_ in live.groupby("round"):
            assert set(round_["client"][~round_["kept"]]) == MALICIOUS


def test_live_verdicts_are_those_of_the_recorded_run(message, folder):
    run = recorded(folder, "message")
    offline = gradlens.detect(run, {DETECTOR: DETECTORS[DETECTOR]()})
    for column in ("round", "client", "detector", "score", "flag", "abstained"):
        assert run.verdicts[column].tolist() == offline[column].tolist()


def test_personal_heads_stay_with_the_clients_and_the_body_moves(message, folder):
    run = recorded(folder, "message-personal")
    with np.load(folder / "message-personal.npz", allow_pickle=False) as file:
        last = dict(file)
    assert list(run.model) == list(last) == ["hidden.weight", "hidden.bias"]
    start = {name: digits.start()[name] for name in last}
    after = [*[round_.global_model for round_ in run.log], last]
    for name, array in start.items():
        np.testing.assert_array_equal(after[0][name], array)
    for round_, model in zip(run.log, after[1:], strict=True):
        for name, updates in round_.updates.items():
            expected = round_.global_model[name] + np.average(updates, axis=0, weights=round_.num_examples)
            np.testing.assert_allclose(model[name], expected, atol=1e-6)
            assert np.abs(model[name] - round_.global_model[name]).max() > 1e-3
    heads = {name: array for name, array in digits.start().items() if name not in last}  # of a client before training
    first, updates = [int(client) for client in run.log[0].clients], run.log[0].updates["hidden.weight"]
    local, _ = digits.trained(start | heads, first[0])
    np.testing.assert_allclose(updates[0], local["hidden.weight"] - start["hidden.weight"], atol=1e-6)


def test_the_command_line_works_on_the_recorded_run(message, folder, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gradlens", "detect", str(folder / "message"), "--detector", DETECTOR])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert {row[1] for row in rows if row[:1] == [DETECTOR] and row[2:] == ["4", "4"]} == MALICIOUS
