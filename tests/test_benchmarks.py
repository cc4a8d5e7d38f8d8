"""The benchmark of peers: the same work for all, the promised columns, and nobody held up by who is not there."""

import csv
import json
import math
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from conftest import ROOT


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tests" / "benchmarks")
    import bench

    yield bench
    for name in ("bench", "workloads", "rules", "scale", "gradlens_rules", "flower_filter"):
        sys.modules.pop(name, None)


@pytest.fixture
def scripts(bench, tmp_path, monkeypatch):
    """A folder of scripts that stand in for the frameworks."""
    monkeypatch.setattr(bench, "HERE", tmp_path)

    def script(name: str, text: str):
        (tmp_path / f"{name}.py").write_text(text)
        return bench.Peer(name, f"{name}.py")

    return script


ANSWER = "import json; print('noise'); print(json.dumps({{'samples_per_s': {}}}))"


def test_the_models_have_the_promised_numbers_of_parameters(bench):
    import torch

    counts = {name: sum(p.numel() for p in work.model().parameters()) for name, work in bench.WORKLOADS.items()}
    assert counts == {"mlp": 2_410, "lenet": 56_970, "cnn": 1_060_138}
    assert counts == {name: work.parameters for name, work in bench.WORKLOADS.items()}
    for work in bench.WORKLOADS.values():
        images, labels = work.data()
        assert images.shape == (work.clients, work.samples, *work.image)
        assert labels.shape == (work.clients, work.samples)
        assert work.samples_per_round == labels.size
        assert work.model()(torch.from_numpy(images[0, :2])).shape == (2, 10)


def test_every_peer_has_its_script(bench):
    for peer in (bench.OURS, *bench.PEERS.values()):
        assert (bench.HERE / peer.script).is_file()


def test_the_table_has_the_promised_columns(bench, scripts, tmp_path, monkeypatch, capsys):
    ours, slow = scripts("gradlens", ANSWER.format(300)), scripts("slow", ANSWER.format(100))
    monkeypatch.setattr(bench, "OURS", ours)
    monkeypatch.setattr(bench, "PEERS", {"slow": slow})
    bench.main(["--rounds", "1", "--repeats", "3", "--work", "mlp", "--out", str(tmp_path / "reports" / "b.csv")])
    with open(tmp_path / "reports" / "b.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows == [
        {"work": "mlp", "peer": "slow", "ours": "300", "theirs": "100", "unit": "samples/s", "ratio": "3.00"}
    ]
    out, err = capsys.readouterr()
    assert "slow" in out
    assert [line.split()[2] for line in err.splitlines()] == ["gradlens", "slow"] * 3  # they take turns


def test_the_median_counts_and_the_better_number_of_threads(bench, scripts, monkeypatch):
    peer = bench.Peer("varying", "varying.py", threads=("1", "2"))
    rates = iter([1.0, 5.0, 2.0, 9.0, 3.0, 7.0])
    monkeypatch.setattr(bench, "round_rate", lambda *_: next(rates))
    assert bench.measured("mlp", {peer: bench.HERE}, 1, 3) == {"varying": 7.0}


def test_who_cannot_be_installed_or_fails_is_left_out_with_a_note(bench, scripts, tmp_path, monkeypatch, capsys):
    absent = bench.Peer("absent", "absent.py", install=("gradlens-no-such-peer",))
    calls = []

    def refused(command, environ=None):
        calls.append(command)
        raise bench.Absent("no matching distribution")

    with monkeypatch.context() as patched:
        patched.setattr(bench, "did", refused)
        patched.setattr(bench.environment, "__defaults__", (tmp_path / "bench",))
        assert bench.environments([absent]) == {}
    assert "absent: left out: no matching distribution" in capsys.readouterr().err
    broken, mute = scripts("broken", "raise SystemExit('no such device')"), scripts("mute", "print('hello')")
    fine = scripts("fine", ANSWER.format(2))
    found = bench.measured("mlp", bench.environments([broken, mute, fine]), 1, 2)
    assert found == {"fine": 2.0}
    err = capsys.readouterr().err
    assert err.count("broken: left out: no such device") == 1
    assert err.count("mute: left out: mute.py mlp gave no answer") == 1
    assert bench.compared({"mlp": found}) == []  # without ours there is nothing to compare


def test_an_environment_is_made_once(bench, tmp_path, monkeypatch):
    commands = []
    monkeypatch.setattr(bench, "did", lambda command, environ=None: commands.append(command) or "")
    peer = bench.Peer("one", "one.py", ("torch", "one[x]==1"), ("two==2",))
    (tmp_path / "one").mkdir()
    python = bench.environment(peer, tmp_path)
    assert python == tmp_path / "one" / "bin" / "python"
    assert [command[-2:] for command in commands[1:]] == [["torch", "one[x]==1"], ["--no-deps", "two==2"]]
    assert (tmp_path / "constraints.txt").read_text() == "torch==2.13.0\n"
    bench.environment(peer, tmp_path)
    assert len(commands) == 3
    assert json.loads((tmp_path / "one" / "installed").read_text())[2] == "torch==2.13.0"


def test_work_that_was_not_measured_again_keeps_its_rows(bench, tmp_path):
    old = bench.compared({work: {"gradlens": 4.0, "pfl": 2.0} for work in ("mlp", "cnn")})
    bench.write(tmp_path / "bench.csv", old)
    assert [row["work"] for row in bench.others(tmp_path / "bench.csv", ["mlp"])] == ["cnn"]
    assert bench.others(tmp_path / "none.csv", []) == []


# rules over one round


def test_a_cohort_has_the_layers_of_its_model(bench):
    import workloads

    for cohort, (clients, model) in workloads.COHORTS.items():
        sizes = sum(math.prod(shape) for shape in workloads.shapes_of(cohort).values())
        assert f"{clients}x{sizes}" == cohort
        assert sizes == workloads.WORKLOADS[model].parameters


@pytest.fixture
def small(bench, monkeypatch):
    """Our script on a round that is small."""
    import gradlens_rules

    matrix = np.random.default_rng(0).standard_normal((12, 47), dtype=np.float32)
    shapes = {"a.weight": (5, 6), "a.bias": (5,), "b.weight": (2, 5), "b.bias": (2,)}
    monkeypatch.setattr(gradlens_rules, "updates_of", lambda _: matrix)
    monkeypatch.setattr(gradlens_rules, "shapes_of", lambda _: shapes)
    return gradlens_rules


def test_every_call_starts_from_a_fresh_round(small):
    log, seen = small.fresh_logs("any"), []

    def ask(log):
        seen.append((log, dict(log[-1].__dict__)))

    assert small.fastest_fresh(ask, log, 3) > 0
    assert len({id(each) for each, _ in seen}) == 4
    assert not any({"gram", "norms", "median", "finite"} & set(known) for _, known in seen)


def test_what_needs_a_history_or_a_model_is_not_asked(small):
    log = small.fresh_logs("any")()
    asked = small.questions(log)
    assert {"statistic final_bias", "detector layer_norms", "detector krum"} <= set(asked)
    assert not {"statistic accumulated_norms", "statistic ddif", "detector fldetector"} & set(asked)
    assert all(seconds >= 0 for seconds in small.each(asked, log).values())
    assert set(small.rules(12)) == {"krum", "multi_krum", "median", "trimmed_mean", "geometric_median"}
    assert repr(small.rules(12)["krum"]) == "krum(num_malicious=2)"


def test_rules_take_turns_and_their_rows_join_the_table(bench, tmp_path, monkeypatch, capsys):
    import rules

    scripts = []

    def printed(command, environ=None):
        script = Path(command[1]).name
        scripts.append((script, environ["OMP_NUM_THREADS"]))
        seconds = {"krum": 0.002, "median": 0.001 * len(scripts)}
        ours = {"seconds": seconds | dict.fromkeys(rules.TOGETHER, 0.004), "asked": ["statistic final_bias"]}
        theirs = {"krum": 0.01, "median": 0.03}
        return json.dumps(ours if script == "gradlens_rules.py" else theirs)

    monkeypatch.setattr(bench, "did", printed)
    monkeypatch.setattr(bench, "environment", lambda peer: tmp_path)
    out = tmp_path / "b.csv"
    bench.write(out, bench.compared({"mlp": {"gradlens": 4.0, "pfl": 2.0}}))
    rules.main(["--cohort", "100x56970", "--turns", "2", "--out", str(out)])
    assert scripts == [(f"{who}_rules.py", n) for n in ("1", bench.ALL_CORES) for who in ("gradlens", "byzfl")] * 2
    rows = {row["work"]: row for row in csv.DictReader(out.read_text().splitlines())}
    assert next(iter(rows)) == "mlp"
    assert (rows["krum 100x56970"]["ours"], rows["krum 100x56970"]["theirs"]) == ("2.0", "10.0")
    assert rows["median 100x56970"]["ours"] == "1.0"  # the fastest turn
    assert rows["five rules 100x56970"]["theirs"] == "40.0"
    assert rows["all statistics and detectors 100x56970"]["ratio"] == "10.00"
    assert "five rules 100x56970" in capsys.readouterr().out


# long and large logs


def test_scale_answers_both_questions(bench, tmp_path):
    import scale

    for work in ("final bias", "all"):
        found = scale.answer(work, tmp_path, width=4, rounds=3)
        assert found["seconds"] > 0
        assert found["own_memory_mb"] > 10
    assert len(list(tmp_path.iterdir())) == scale.FILES
    log = scale.repeating(tmp_path, 4, 9)
    assert [round_.index for round_ in log] == list(range(9))
    np.testing.assert_array_equal(log[8].updates["8.bias"], log[0].updates["8.bias"])
    assert scale.model_of(scale.WIDTHS[-1]).num_parameters == 1_060_138


def test_what_is_streamed_is_timed_beside_reading_it(bench):
    import streamed

    rows = {work: streamed.answers(work, clients=6, width=9) for work in ("nothing", "read files", "record sketch")}
    assert rows["nothing"][0]["seconds"] == 0
    assert rows["read files"][0]["ms_per_client"] > 0
    assert [row["clients"] for row in rows["record sketch"]] == [6] * 11
    assert all(set(row) == set(streamed.COLUMNS) for row in rows["record sketch"])
    assert sum(array.size for array in streamed.state_of(streamed.WIDTH).values()) == 997_162
    sent = [state for _, state in streamed.models(streamed.state_of(9), 3, np.zeros(2))]
    assert not any(np.array_equal(sent[0]["2.weight"], other["2.weight"]) for other in sent[1:])


def test_own_memory_is_watched(bench):
    import scale

    with scale.watched() as peak:
        held = np.ones(8_000_000)
        before, patience = scale.own_memory(), time.monotonic() + 30
        while peak() < before and time.monotonic() < patience:
            time.sleep(0.01)
        del held
    assert peak() >= before


# a filter in a round of Flower


def test_a_filter_is_timed_over_a_recorded_run(bench, recorded):
    import flower_filter

    whole = time.perf_counter()
    seconds = flower_filter.filtering(recorded, "krum")
    assert 0 < seconds < time.perf_counter() - whole
    row = flower_filter.row("krum", bench.WORKLOADS["mlp"], whole=2.0, recording=0.5, seconds=0.1)
    assert tuple(row) == flower_filter.COLUMNS
    assert (row["share"], row["filter_s"], row["parameters"]) == ("0.0500", "0.100", "2410")
