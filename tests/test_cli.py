"""The command line: answers a script can read, one line where something is wrong, nothing half-written."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import pytest

import gradlens
import simulations
from conftest import STATE, random_round
from gradlens.detectors import USUAL
from gradlens.examples import example_run
from gradlens.log import LogWriter


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


COMMANDS = (
    "demo", "simulate", "inspect", "investigate", "detect", "localize", "report", "replay", "verify", "ingest", "list",
    "doctor", "notebook",
)  # fmt: skip


def test_help_names_every_command_and_each_shows_an_example(command):
    status, out, _ = command("--help")
    assert status == 0
    for name in COMMANDS:
        assert name in out
        status, page, _ = command(name, "--help")
        assert status == 0
        assert f"Example: gradlens {name}" in " ".join(page.split())


def test_the_working_folder_is_searched_only_for_a_module_that_the_command_names(command, planted, tmp_path):
    (tmp_path / "own_rules.py").write_text(
        "from gradlens.detectors import DETECTORS\n\ndef mine():\n    return DETECTORS['final_bias']()\n"
    )
    before = [*sys.path]
    for words in (["inspect", planted], ["detect", planted], ["verify", planted], ["replay", planted]):
        assert command(*words)[0] == 0
        assert sys.path == before
    status, out, _ = command("detect", planted, "-d", "own_rules:mine", "--csv")
    assert (status, sys.path) == (0, [*before, str(tmp_path)])
    assert asked(out) == ["own_rules:mine"]
    sys.modules.pop("own_rules")


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


def asked(out) -> list[str]:
    """The detectors in a table of `detect`."""
    return list(dict.fromkeys(pd.read_csv(io.StringIO(out), keep_default_na=False)["detector"]))


def test_detect_asks_a_few_detectors_unless_told_all(command, planted):
    usual = asked(command("detect", planted, "--csv")[1])
    assert usual == list(USUAL)
    assert {"final_bias", "layer_norms", "accumulated_norms"} <= set(usual) < set(gradlens.DETECTORS)
    listed = command("list", "detectors")[1].splitlines()
    assert [line.split()[0] for line in listed if "(usual)" in line] == sorted(
        usual, key=list(gradlens.DETECTORS).index
    )
    assert asked(command("detect", planted, "-d", "all", "--csv")[1]) == list(gradlens.DETECTORS)
    assert asked(command("detect", planted, "-d", "final_rows", "-d", "final_bias", "--csv")[1]) == [
        "final_rows",
        "final_bias",
    ]


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    """An attacked recording of ten clients, and a folder of twenty attack-free ones."""
    place = tmp_path_factory.mktemp("recordings")
    example_run(place / "attacked", 8, num_malicious=2)
    for seed in range(100, 120):
        example_run(place / "null" / f"free-{seed}", 8, num_malicious=0, seed=seed)
    return place


def flagged(out) -> set[str]:
    table = pd.read_csv(io.StringIO(out), keep_default_na=False)
    return set(table.loc[table["flag"], "client"])


def test_detect_is_calibrated_on_attack_free_recordings_and_ends_with_the_case(command, recordings):
    words = ["detect", recordings / "attacked", "-d", "layer_norms", "--null", recordings / "null"]
    status, out, _ = command(*words)
    assert status == 0
    assert "not calibrated" not in out
    assert "thresholds are calibrated on 20 attack-free recordings: the rate of 0.05 is per update" in out
    case = command("investigate", *words[1:2], "--null", recordings / "null")[1]
    assert out.endswith(case)
    null = [gradlens.open(path) for path in sorted((recordings / "null").iterdir())]
    expected = gradlens.detect(
        gradlens.open(recordings / "attacked"),
        {"layer_norms": gradlens.calibrate(gradlens.DETECTORS["layer_norms"](), null, 0.05)},
    )
    assert flagged(command(*words, "--csv")[1]) == set(expected.loc[expected["flag"], "client"])
    assert "verdict" not in command(*words, "--csv")[1]
    assert "verdict" not in command(*words, "--json")[1]


@pytest.mark.parametrize("basis", ["null", "clean"])
def test_a_null_too_small_for_detect_says_what_it_needs_and_ranks_all_the_same(command, recordings, basis):
    given = ["--null", recordings / "null" / "free-100"] if basis == "null" else ["--clean-rounds", 2]
    status, out, _ = command("detect", recordings / "attacked", "-d", "layer_norms", *given)
    assert status == 0
    assert "nobody was flagged" in out
    assert "the null is too small: calibrate to fpr 0.05 needs 19 clients with a score, found 10" in out
    ranking = out.partition("without a threshold:\n")[2].splitlines()[1:3]
    assert {line.split()[1] for line in ranking} == {"client-8", "client-9"}
    assert "thresholds are" not in out


def test_detect_is_calibrated_on_clean_rounds_in_which_nobody_is_flagged(command, recordings):
    words = ["detect", recordings / "attacked", "-d", "layer_norms", "--clean-rounds", 2, "--fpr", 0.1]
    out = command(*words)[1]
    assert "thresholds are calibrated on 2 first rounds taken to be clean: the rate of 0.1 is per update" in out
    assert "not calibrated" not in out
    assert "declared clean" in out  # by the case
    table = pd.read_csv(io.StringIO(command(*words, "--csv")[1]), keep_default_na=False)
    assert not table.loc[table["round"] < 2, "flag"].any()


def test_detect_says_what_a_rate_without_a_null_holds_for(command, recordings):
    out = command("detect", recordings / "attacked", "-d", "layer_norms", "--fpr", 0.05)[1]
    assert "the rate of 0.05 is per update and nominal, it holds only where most clients are benign" in out
    assert "not calibrated" not in out
    assert "thresholds are textbook values, not calibrated" in command("detect", recordings / "attacked")[1]


def test_detect_counts_the_verdicts_of_a_sweep(command, sweep):
    out = command("detect", sweep, "-d", "layer_norms", "-w", "1")[1]
    verdicts = [gradlens.investigate(run).verdict for run in gradlens.open(sweep).runs]
    last = out.splitlines()[-1]
    assert last.startswith("cases: ")
    for verdict in set(verdicts):
        assert f"{verdicts.count(verdict)} {verdict}" in last
    assert "verdict: " not in out


def test_report_rests_on_the_null_that_is_named(command, recordings, sweep):
    words = ["report", recordings / "attacked", "-o", "out.html"]
    assert command(*words, "--null", recordings / "null")[0] == 0
    page = Path("out.html").read_text()
    assert "20 attack-free recordings with 200" in page
    assert "null: attack-free: 20 runs, 200 clients" in page
    assert command(*words, "--clean-rounds", 3)[0] == 0
    assert "first rounds declared clean" in Path("out.html").read_text()
    status, _, err = command("report", sweep, "-o", "out.html", "--clean-rounds", 3)
    assert (status, "for the report on a single run" in err) == (2, True)


def test_the_demo_ends_with_the_case_of_a_recording_of_its_sweep(command, sweep, monkeypatch):
    monkeypatch.setattr(sys.modules["gradlens.cli.simulate"], "_simulated", lambda *_: gradlens.open(sweep))
    status, out, _ = command("demo", "-o", "out.html", "-w", "1")
    assert status == 0
    before, _, case = out.partition(" by its recording alone, without its truth or its control:\n")
    asked = gradlens.open(before.splitlines()[-1].removeprefix("investigating "))
    assert asked.scenario["num_malicious"]
    assert case == command("investigate", asked.path)[1]


def test_localize_by_suspects_needs_no_truth(command, planted, recorded):
    status, out, _ = command("localize", planted, "--suspects", "client-3", "--csv")
    table, truth = pd.read_csv(io.StringIO(out)), pd.read_csv(io.StringIO(command("localize", planted, "--csv")[1]))
    assert status == 0
    assert set(table["labels"]) == {"suspects"}
    pd.testing.assert_frame_equal(table.drop(columns="labels"), truth.drop(columns="labels"))
    said = command("localize", planted, "--suspects", "client-3")[1]
    assert "by the suspects given, not by the truth" in said
    assert "by the suspects" not in command("localize", planted)[1]
    someone = str(gradlens.open("run").log[0].clients[0])  # a run without truth
    assert command("localize", "run", "--suspects", f"{someone}, {someone}")[0] == 0


def test_suspects_may_be_what_detect_wrote(command, planted, tmp_path):
    out = command("detect", planted, "-d", "final_bias", "--csv")[1]
    (tmp_path / "flags.csv").write_text(out)
    status, out, _ = command("localize", planted, "--suspects", "flags.csv", "--csv")
    flags = pd.read_csv(tmp_path / "flags.csv", keep_default_na=False)
    expected = gradlens.localize(gradlens.open(planted), suspects=flags)
    assert status == 0
    assert len(pd.read_csv(io.StringIO(out))) == len(expected)
    assert set(flags.loc[flags["flag"], "client"]) >= {"client-3"}
    of_another = flags.assign(run="another")
    of_another.to_csv("flags.csv", index=False)
    status, out, err = command("localize", planted, "--suspects", "flags.csv")
    assert (status, out) == (2, "")
    assert "no run has both poisoned and benign updates" in err


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
        (["detect", "run", "-d", "kurm"], "--detector: there is no 'kurm'; did you mean krum"),
        (["detect", "run", "--fpr", "1.5"], "fpr is a rate above 0 and below 1, found 1.5"),
        (["detect", "run", "--executor", "threads"], "--executor: expected processes, or tcp://HOST:PORT"),
        (
            ["detect", "run", "--executor", "tcp://127.0.0.1:1"],
            "it shares out the runs of a sweep, this is a single run",
        ),
        (["detect", "run", "--clean-rounds", "9"], "--clean-rounds: expected at most 3, the rounds of run, found 9"),
        (["detect", "run", "--null", "nowhere"], "found nothing"),
        (["detect", "run", "--null", "run", "--clean-rounds", "2"], "exclude each other"),
        (["report", "run", "-o", "x.html", "--null", "run", "--clean-rounds", "2"], "exclude each other"),
        (["localize", "run", "--executor", "tcp://127.0.0.1:1"], "this is a single run"),
        (["localize", "run", "--suspects", "mallory"], "suspects: the log has no client 'mallory'"),
        (
            ["localize", "run", "--suspects", "table.csv"],
            "suspects: expected columns round, client and flag, found no 'flag'",
        ),
        (["simulate", "nowhere.toml", "-o", "out"], "no such file"),
        (["simulate", "table.csv", "-o", "out"], "expected a scenario in TOML"),
        (["simulate", "unknown.toml", "-o", "out"], "'learning_rat' is no setting"),
        (["simulate", "negative.toml", "-o", "out"], "poison_rate"),
        (["simulate", "good.toml", "-o", "out", "--set", "rounds"], "expected NAME=VALUE, found 'rounds'"),
        (["simulate", "good.toml", "-o", "out", "--set", "rounds=0"], "rounds"),
        (["simulate", "good.toml", "-o", "run"], "run"),
        (["simulate", "good.toml", "-o", "out", "--executor", "threads"], "found 'threads'"),
        (["simulate", "good.toml", "-o", "out", "--executor", "tcp://127.0.0.1:1"], "good.toml is a single scenario"),
        (
            ["simulate", "two.toml", "-o", "out", "--executor", "tcp://nowhere"],
            "tcp://HOST:PORT, found 'tcp://nowhere'",
        ),
        (["inspect", "run", "--plot", "labels.txt"], "expected a file that ends in .png, .svg, .pdf"),
        (["frobnicate"], "frobnicate"),
        (["inspect"], "RUN"),
        (["inspect", "run", "--jsno"], "--jsno"),
        (["detect", "run", "--json", "--csv"], "--csv and --json exclude each other"),
        (["localize", "run", "--json", "--csv"], "--csv and --json exclude each other"),
        (["replay", "run", "--json", "--csv"], "--csv and --json exclude each other"),
        (["report", "run", "-o", "x.pdf"], "--out: expected a file that ends in .html, .htm, found x.pdf"),
        (["notebook", "run", "-o", "x.py"], "--out: expected a file that ends in .ipynb, found x.py"),
        (["notebook", "nowhere", "-o", "x.ipynb"], "found nothing"),
        (["verify", "run", "--head", "abc"], "--head: expected 64 hexadecimal digits, found 'abc'"),
        (["verify", "run", "--head", "\x1b[31mx"], "found '\\x1b[31mx'"),
        (["list", "detector"], "there is no 'detector'; did you mean detectors?"),
        (["detect", "run", "-d", "nowhere:at_all"], "--detector: cannot import 'nowhere:at_all'"),
        (["replay", "run", "-d", "kurm"], "kurm"),
        (["verify", "no\x1b[31m\nOWNED"], "no\\x1b[31m OWNED"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(command, recorded, tmp_path, words, expected):
    (tmp_path / "table.csv").write_text("round,client\n0,a\n")
    (tmp_path / "good.toml").write_text("rounds = 1\n")
    (tmp_path / "two.toml").write_text("rounds = 1\n[[sweep]]\nseed = [0, 1]\n")
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


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """Two seeds of an attack and of its control, three rounds each."""
    base = simulations.Scenario(rounds=3, attack="trigger")
    scenarios = simulations.sweep(base, num_malicious=[0, 4], seed=[0, 1])
    return simulations.run_sweep(scenarios, tmp_path_factory.mktemp("runs") / "sweep", progress=False).path


@pytest.mark.parametrize("words", [["detect", "-d", "final_bias", "-d", "layer_norms", "--fpr", "0.1"], ["localize"]])
def test_workers_change_nothing(command, sweep, words):
    alone = command(words[0], sweep, *words[1:], "--csv", "-w", "1")
    shared = command(words[0], sweep, *words[1:], "--csv", "-w", "2")
    assert alone == shared
    assert alone[0] == 0
    table = pd.read_csv(io.StringIO(alone[1]))
    assert len(table) > 10
    if words[0] == "detect":
        assert sorted(table["run"].unique()) == sorted(run.name for run in gradlens.open(sweep).runs)


def test_a_run_of_a_sweep_is_localized_beside_its_control(command, sweep):
    found = gradlens.open(sweep)
    name = found.settings.index[~found.settings["control"]][0]
    table = pd.read_csv(io.StringIO(command("localize", sweep / name, "--csv")[1]))
    assert table["control_auc"].notna().all()
    status, _, err = command("localize", sweep, "--suspects", "client-1")
    assert (status, "those of one run; name the folder of a run" in err) == (2, True)


def test_an_executor_by_address_does_the_work(command, sweep, monkeypatch):
    """The Dask scheduler's stead is taken by threads; what runs there is asked for by path."""
    from concurrent.futures import ThreadPoolExecutor

    addresses = []

    def stand_in(address):
        addresses.append(address)
        return ThreadPoolExecutor(2)

    monkeypatch.setattr(sys.modules["simulations.sweeps"], "dask_executor", stand_in)
    for words in (["detect", sweep, "-d", "final_bias"], ["localize", sweep]):
        assert command(*words, "--csv", "--executor", "tcp://host:1") == command(*words, "--csv")
    assert addresses == ["tcp://host:1"] * 2


def test_inspect_draws_the_label_counts_of_a_simulated_run(command, tmp_path, planted):
    assert command("simulate", scenario(tmp_path, "rounds = 1\n"), "-o", "one", "-w", "1")[0] == 0
    status, out, _ = command("inspect", "one", "--plot", "deep/er/labels.png")
    assert (status, "rounds         1" in out) == (0, True)
    assert (tmp_path / "deep" / "er" / "labels.png").read_bytes().startswith(b"\x89PNG")
    status, out, err = command("inspect", planted, "--plot", "labels.png")
    assert (status, out) == (2, "")
    assert err.count("\n") == 1
    assert "was recorded elsewhere, so what its clients hold is not known" in err


def test_one_picture_is_of_one_run(command, tmp_path):
    toml = 'rounds = 1\nattack = "trigger"\n[[sweep]]\nnum_malicious = [0, 4]\n'
    assert command("simulate", scenario(tmp_path, toml), "-o", "sweep", "-w", "1")[0] == 0
    status, _, err = command("inspect", "sweep", "--plot", "labels.png")
    assert (status, "name the folder of a run" in err) == (2, True)


def test_workers_of_a_single_scenario_are_threads(command, tmp_path, monkeypatch):
    asked, original = [], simulations.run

    def noting(each, path, **settings):
        asked.append(settings)
        return original(each, path)

    monkeypatch.setattr(simulations, "run", noting)
    assert command("simulate", scenario(tmp_path, "rounds = 1\n"), "-o", "one", "-w", "3")[0] == 0
    assert asked == [{"workers": 3, "progress": True}]


MAIN = [sys.executable, "-c", "from gradlens.cli import main; main()"]


@pytest.mark.parametrize(
    ("number", "status", "whole_group"),
    [(signal.SIGTERM, 143, False), (signal.SIGINT, 130, True), (signal.SIGKILL, -9, False)],
    ids=["SIGTERM", "Ctrl-C", "SIGKILL"],
)
def test_an_interrupted_sweep_keeps_what_is_finished_and_leaves_no_process(tmp_path, number, status, whole_group):
    toml = 'rounds = 20\nattack = "trigger"\n[[sweep]]\nnum_malicious = [0, 3]\nseed = [0, 1]\n'
    words = [*MAIN, "simulate", str(scenario(tmp_path, toml)), "-o", str(tmp_path / "out"), "-w", "2"]
    sweeping = subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    wait_until(lambda: any(tmp_path.glob("out/*/closed")))
    children = psutil.Process(sweeping.pid).children(recursive=True)
    assert len(children) >= 2
    if whole_group:  # as a terminal does
        os.killpg(sweeping.pid, number)
    else:
        sweeping.send_signal(number)
    out, err = sweeping.communicate(timeout=20)
    assert sweeping.returncode == status
    assert out == ""
    if status > 0:
        assert err.startswith("gradlens: interrupted; what was finished is kept, and the same command goes on")
        assert err.count("\n") == 1
    wait_until(lambda: not any(child.is_running() and child.status() != "zombie" for child in children), seconds=5)
    runs = gradlens.open(tmp_path / "out").runs
    done = {run.name: run.head for run in runs if run.is_closed}
    assert 1 <= len(done) < 4
    assert all(run.verify().intact for run in runs)
    if number == signal.SIGTERM:
        subprocess.run(words, check=True, capture_output=True)
        runs = gradlens.open(tmp_path / "out").runs
        assert len(runs) == 4
        assert all(run.is_closed and run.verify().intact for run in runs)
        assert done.items() <= {run.name: run.head for run in runs}.items()


def wait_until(found, seconds=60):
    end = time.monotonic() + seconds
    while not found():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)
