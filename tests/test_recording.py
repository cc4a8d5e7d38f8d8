"""The record on a disk: what is committed stays, what was not is named, what was changed is found."""

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

import gradlens.log.files
from conftest import ROOT, STATE, random_round
from gradlens.errors import InputError
from gradlens.log import Evidence, LogWriter, ModelSpec, Round, verify
from gradlens.log.files import read_updates
from gradlens.log.intake import received
from gradlens.log.writer import read_round
from gradlens.run import VERDICT_COLUMNS, Run, Sweep, open_run


def same_rounds(a: Round, b: Round) -> None:
    np.testing.assert_array_equal(a.clients, b.clients)
    np.testing.assert_array_equal(a.num_examples, b.num_examples)
    assert (a.index, dict(a.refused), a.buffers) == (b.index, dict(b.refused), b.buffers)
    assert list(a.updates) == list(b.updates)
    for name in a.updates:
        np.testing.assert_array_equal(a.updates[name], b.updates[name])
        np.testing.assert_array_equal(a.global_model[name], b.global_model[name])
        assert a.updates[name].dtype == b.updates[name].dtype


# --- writing and reading back


def test_what_was_recorded_is_read_back(recorded):
    run = Run.open(recorded)
    assert (len(run.log), run.is_closed, run.in_flight) == (3, True, "")
    for index, round_ in enumerate(run.log):
        same_rounds(round_, random_round(index))
    assert run.scenario == {"task": "none"}
    assert run.metrics.to_dict("list") == {"round": [0, 1, 2], "main_accuracy": [0.5, 0.5, 0.5]}


def test_reading_a_round_copies_nothing(recorded):
    round_ = Run.open(recorded).log[1]
    for name, array in round_.updates.items():
        owner = array
        while isinstance(owner, np.ndarray):
            owner = owner.base
        assert isinstance(owner, pa.Array), f"{name} owns its numbers"
        assert not array.flags.writeable


def test_non_finite_numbers_refused_clients_and_empty_cohorts_survive(tmp_path, model):
    updates = {name: array.copy() for name, array in random_round(0).updates.items()}
    updates["fc2.bias"][1] = [np.nan, np.inf, -np.inf]
    odd = random_round(0, updates=updates, refused={"<script>": "sent nothing"})
    empty = received(1, model, STATE, {"ü": None}, {"ü": 1}, as_models=False).round_
    with LogWriter.create(tmp_path / "run", model, STATE) as writer:
        writer.commit(odd, STATE)
        writer.commit(empty, STATE)
    log = Run.open(tmp_path / "run").log
    same_rounds(log[0], odd)
    same_rounds(log[1], empty)
    assert log[0].finite.tolist() == [row != 1 for row in range(len(odd))]
    np.testing.assert_array_equal(log[0].updates["fc2.bias"][1], [np.nan, np.inf, -np.inf])
    assert (len(log[1]), dict(log[1].refused)) == (0, {"ü": "sent nothing"})


def test_a_round_larger_than_one_batch_is_read_in_pieces(tmp_path, monkeypatch, record):
    monkeypatch.setattr(gradlens.log.files, "BATCH_BYTES", 400)  # two clients a batch
    writer = record(rounds=1)
    round_ = writer.log[0]
    assert [len(piece) for piece in round_.source.pieces("fc1.weight")] == [2, 2]
    same_rounds(round_, random_round(0))
    for name in round_.parameters:
        np.testing.assert_allclose(round_.gram[name], random_round(0).gram[name], rtol=1e-12)


def test_the_truth_lies_in_its_own_file(tmp_path, record):
    truth = pd.DataFrame({"round": [0, 0], "client": ["a", "b"], "compromised": [True, False], "poisoned": [1, 0]})
    writer = record(close=False)
    with pytest.raises(InputError, match="this run has none"):
        _ = Run.open(tmp_path / "run").truth
    writer.add_truth(truth)
    with pytest.raises(InputError, match="written once"):
        writer.add_truth(truth)
    with pytest.raises(InputError, match="'poisoned' is missing"):
        writer.add_truth(truth[["round", "client", "compromised"]])
    writer.close()
    found = Run.open(tmp_path / "run").truth
    assert found.to_dict("list") == truth.astype({"poisoned": bool}).to_dict("list")
    assert verify(tmp_path / "run").intact


def test_verdicts_are_kept_with_their_round(tmp_path, model):
    table = pd.DataFrame({"round": [0], "client": ["a"], "detector": ["d"], "score": [np.inf], "flag": [True]})
    with LogWriter.create(tmp_path / "run", model, STATE) as writer:
        writer.commit(random_round(0), STATE, verdict=table)
        writer.commit(random_round(1), STATE)
    pd.testing.assert_frame_equal(Run.open(tmp_path / "run").verdicts, table)


def test_verdicts_of_before_there_were_weights_still_open(tmp_path, model):
    old = {"round": 0, "abstained": "", "null": "", "client": list("abc"), "detector": "d", "score": [0.0, 9.0, 1.0]}
    table = pd.DataFrame({**old, "flag": [False, True, True], "kept": [True, False, False]})
    with LogWriter.create(tmp_path / "run", model, STATE) as writer:
        writer.commit(random_round(0), STATE, verdict=table)
    found = Run.open(tmp_path / "run").verdicts
    assert set(found.columns) == set(VERDICT_COLUMNS)
    assert found["weight"].tolist() == [1.0, 0.0, 0.0]
    assert found["reason"].tolist() == ["", "flagged", "flagged"]


def test_a_live_round_that_is_committed_keeps_what_was_computed(tmp_path, model):
    calls = []

    def detector(log):
        return calls.append(len(log)) or len(log)

    with LogWriter.create(tmp_path / "run", model, STATE) as writer:
        for index in range(3):
            round_ = random_round(index)
            live = writer.log.append(round_)
            total = live.accumulated
            assert live.verdict(detector) == index + 1
            writer.commit(round_, STATE)
            assert writer.log.verdict(detector) == index + 1
            again = writer.log.accumulated
            assert all(np.shares_memory(again.sums[name], total.sums[name]) for name in model.parameters)
    assert calls == [1, 2, 3]
    same_rounds(writer.log[1], random_round(1))


# --- what the caller gets wrong


def test_a_folder_that_holds_something_is_not_recorded_into(recorded, model):
    before = sorted(recorded.rglob("*"))
    with pytest.raises(InputError, match="found one that holds something"):
        LogWriter.create(recorded, model, STATE)
    assert sorted(recorded.rglob("*")) == before


def test_a_closed_run_is_not_resumed(recorded):
    with pytest.raises(InputError, match="closed with 3 rounds"):
        LogWriter.resume(recorded)


def test_two_writers_do_not_share_a_folder(record):
    first = record(close=False)
    with pytest.raises(InputError, match="another writer"):
        LogWriter.resume(first.folder)
    first.leave_open()
    LogWriter.resume(first.folder).close()
    assert verify(first.folder).closed


def test_a_round_out_of_turn_or_of_another_model_writes_nothing(tmp_path, model, record):
    writer = record(rounds=1, close=False)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError, match="expected round 1 next, found round 5"):
        writer.commit(random_round(5), STATE)
    with pytest.raises(InputError, match=r"layer 'fc2.bias' of the global model must have shape \(3,\), found \(2,\)"):
        writer.commit(random_round(1), STATE | {"fc2.bias": np.zeros(2)})
    assert sorted(tmp_path.rglob("*")) == before
    writer.commit(random_round(1), STATE)
    assert verify(tmp_path / "run").intact


def test_a_format_from_the_future_is_refused(recorded):
    header = json.loads((recorded / "run.json").read_text())
    (recorded / "run.json").write_text(json.dumps(header | {"format": 3}))
    with pytest.raises(InputError, match="reads run formats 1 and 2, found 3"):
        Run.open(recorded)


@pytest.mark.parametrize("kind", ["nothing", "csv", "empty folder"])
def test_what_is_no_run_is_named(tmp_path, kind):
    path = tmp_path / "x"
    if kind == "csv":
        path.write_text("round,client\n0,a\n")
    elif kind == "empty folder":
        path.mkdir()
    with pytest.raises(InputError, match="expected") as caught:
        open_run(path)
    assert "\n" not in str(caught.value)


# --- sweeps


def test_a_sweep_pairs_each_run_with_its_control(tmp_path, record):
    for name in ("attacked", "control"):
        record(name)
    index = {
        "format": 1,
        "axes": ["num_malicious", "seed"],
        "runs": {"attacked": {"num_malicious": 2, "seed": 0}, "control": {"num_malicious": 0, "seed": 0}},
        "controls": {"attacked": "control"},
    }
    (tmp_path / "sweep.json").write_text(json.dumps(index))
    found = open_run(tmp_path)
    assert isinstance(found, Sweep)
    assert found.control_of("attacked").name == "control"
    assert found.settings.to_dict("index") == {
        "attacked": {"num_malicious": 2, "seed": 0, "control": False},
        "control": {"num_malicious": 0, "seed": 0, "control": True},
    }
    with pytest.raises(InputError, match="'control' has no attack-free control"):
        found.control_of("control")


def test_a_run_that_was_stopped_before_its_first_commit_is_not_there_yet(tmp_path, record):
    record("begun")
    record("stopped")
    (tmp_path / "stopped" / "manifest.jsonl").write_bytes(b'{"files": {"run.js')
    (tmp_path / "stillborn" / "updates").mkdir(parents=True)
    runs = {"begun": {"seed": 0}, "stopped": {"seed": 1}, "stillborn": {"seed": 2}, "missing": {"seed": 3}}
    index = {"format": 1, "axes": ["seed"], "runs": runs, "controls": {}}
    (tmp_path / "sweep.json").write_text(json.dumps(index))
    found = open_run(tmp_path)
    assert isinstance(found, Sweep)
    assert [run.name for run in found.runs] == ["begun"]


@pytest.mark.parametrize("index", ["{", "[]", '{"format": 2, "axes": [], "runs": {}, "controls": {}}'])
def test_a_broken_sweep_is_one_clear_line(tmp_path, index):
    (tmp_path / "sweep.json").write_text(index)
    with pytest.raises(InputError, match=r"sweep\.json") as caught:
        open_run(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_sweep_does_not_name_runs_outside_its_folder(tmp_path):
    index = {"format": 1, "axes": [], "runs": {"../run": {}}, "controls": {}}
    (tmp_path / "sweep.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match="not the name of a run's folder"):
        open_run(tmp_path)


# --- interrupted writers

WRITER = """
    import sys
    sys.path.insert(0, sys.argv[2])
    from pathlib import Path
    from conftest import STATE, random_round
    from gradlens.log import LogWriter, ModelSpec
    rounds = [random_round(i) for i in range(400)]
    print("ready", flush=True)
    sys.stdin.readline()
    model = ModelSpec.of(STATE, buffers=["norm.count"])
    with LogWriter.create(Path(sys.argv[1]), model, STATE) as writer:
        for round_ in rounds:
            writer.commit(round_, STATE)
"""


def test_a_killed_writer_leaves_every_committed_round_intact(tmp_path, rng):
    """SIGKILL at 20 random moments of a recording that takes over a second."""
    command = [sys.executable, "-c", textwrap.dedent(WRITER)]
    lengths = []
    for batch in range(5):
        folders = [tmp_path / f"run-{batch}-{i}" for i in range(4)]
        writers = [
            subprocess.Popen(
                [*command, str(folder), str(ROOT / "tests")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
            )
            for folder in folders
        ]
        for writer, folder in zip(writers, folders, strict=True):
            writer.stdout.readline()
            writer.stdin.write(b"\n")
            writer.stdin.flush()
            time.sleep(rng.uniform(0.01, 0.5))
            os.kill(writer.pid, signal.SIGKILL)
            writer.communicate()
            lengths.append(check_after_kill(folder))
    assert len(set(lengths)) > 3, f"the moments did not differ: {lengths}"


def check_after_kill(folder) -> int:
    if not (folder / "manifest.jsonl").is_file():
        return 0  # killed before the first commit
    found = verify(folder)
    assert found.intact, found.faults
    if not (folder / "manifest.jsonl").read_bytes().endswith(b"\n"):
        return 0
    run = Run.open(folder)
    assert len(run.log) == found.rounds
    assert not run.is_closed
    for index, round_ in enumerate(run.log):
        same_rounds(round_, random_round(index))
    with LogWriter.resume(folder) as writer:
        writer.commit(random_round(found.rounds), STATE)
    after = verify(folder)
    assert (after.intact, after.closed, after.rounds, after.in_flight) == (True, True, found.rounds + 1, "")
    return found.rounds


def test_the_round_in_flight_is_named_and_never_read(tmp_path, model, record):
    folder = tmp_path / "run"
    writer = record(rounds=2, close=False)
    writer.leave_open()
    gradlens.log.files.write_updates(folder / "updates" / "round-000002.arrow", model, random_round(2))
    (folder / "globals" / ".round-000003.arrow.part").write_bytes(b"half")
    with open(folder / "manifest.jsonl", "ab") as manifest:
        manifest.write(b'{"round": 2, "fi\xff')
    run = Run.open(folder)
    assert len(run.log) == 2
    assert "round 2 was in flight" in run.in_flight
    assert "updates/round-000002.arrow" in run.in_flight
    assert verify(folder).intact
    with LogWriter.resume(folder) as again:
        again.commit(random_round(2, seed=9), STATE)
    assert verify(folder).intact
    same_rounds(Run.open(folder).log[2], random_round(2, seed=9))


def test_a_full_disk_tears_nothing(tmp_path, monkeypatch, record):
    folder = tmp_path / "run"
    writer = record(rounds=1, close=False)
    monkeypatch.setattr(os, "fsync", lambda fd: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        writer.commit(random_round(1), STATE)
    with pytest.raises(OSError, match="No space left"):
        writer._chain.append({"round": 1})
    monkeypatch.undo()
    writer.commit(random_round(1), STATE)
    writer.close()
    assert verify(folder).intact


# --- tampering


def test_a_flipped_byte_anywhere_is_found_and_named(recorded, rng):
    files = [p for p in recorded.rglob("*") if p.is_file() and p.name not in ("closed", "manifest.jsonl")]
    assert len(files) == 1 + 3 + 4
    for path in files:
        original = path.read_bytes()
        for position in [0, len(original) - 1, *rng.integers(len(original), size=8)]:
            changed = bytearray(original)
            changed[position] ^= 1 << int(rng.integers(8))
            path.write_bytes(changed)
            faults = verify(recorded).faults
            assert [fault.split(":")[0] for fault in faults] == [str(path.relative_to(recorded))]
        path.write_bytes(original)
    assert verify(recorded).intact


def test_a_flipped_byte_of_the_manifest_is_found(recorded, rng):
    path = recorded / "manifest.jsonl"
    original = path.read_bytes()
    for position in [0, len(original) - 1, *rng.integers(len(original), size=200)]:
        changed = bytearray(original)
        changed[position] ^= 1 << int(rng.integers(8))
        path.write_bytes(changed)
        assert not verify(recorded).intact, f"byte {position}"


def add(folder):
    (folder / "updates" / "round-000007.arrow").write_bytes(b"new")
    return "updates/round-000007.arrow"


def add_hidden(folder):
    (folder / "updates" / ".round-000003.arrow.part").write_bytes(b"new")
    return "updates/.round-000003.arrow.part"


def remove(folder):
    (folder / "globals" / "round-000001.arrow").unlink()
    return "globals/round-000001.arrow"


def swap(folder):
    one, other = folder / "updates" / "round-000000.arrow", folder / "updates" / "round-000001.arrow"
    one.rename(folder / "x")
    other.rename(one)
    (folder / "x").rename(other)
    return "updates/round-000000.arrow"


def link(folder):
    path = folder / "updates" / "round-000000.arrow"
    shutil.copy(path, folder.parent / "elsewhere")
    path.unlink()
    path.symlink_to(folder.parent / "elsewhere")
    return "updates/round-000000.arrow"


@pytest.mark.parametrize("tamper", [add, add_hidden, remove, swap, link])
def test_added_removed_and_swapped_files_are_named(recorded, tamper):
    name = tamper(recorded)
    assert any(name in fault for fault in verify(recorded).faults)


def test_a_cut_manifest_of_a_closed_run_is_found_wherever_it_is_cut(recorded):
    path = recorded / "manifest.jsonl"
    original = path.read_bytes()
    for size in range(len(original)):
        path.write_bytes(original[:size])
        assert not verify(recorded).intact, f"cut at {size} of {len(original)}"


def test_a_cut_manifest_of_an_open_run_is_found_against_its_head(tmp_path, record):
    record(close=False)
    path = tmp_path / "run" / "manifest.jsonl"
    head, original = verify(tmp_path / "run").head, path.read_bytes()
    lines = original.splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-1]))
    assert "round 2 was in flight" in verify(tmp_path / "run").in_flight
    assert not verify(tmp_path / "run", head).intact
    path.write_bytes(b"".join(lines[:-2]))
    assert any("round-000002.arrow" in fault for fault in verify(tmp_path / "run").faults)


def test_a_rewritten_chain_fails_against_the_noted_head(tmp_path, model, record):
    record()
    head = verify(tmp_path / "run").head
    shutil.rmtree(tmp_path / "run")
    with LogWriter.create(tmp_path / "run", model, STATE, scenario={"task": "none"}) as writer:
        for index in range(3):
            writer.commit(random_round(index, seed=1), STATE, metrics={"main_accuracy": 0.5})
    assert verify(tmp_path / "run").intact
    assert not verify(tmp_path / "run", head).intact
    assert "the chain was cut or rewritten" in verify(tmp_path / "run", head).faults[0]


def test_a_file_of_another_round_is_not_taken_for_this_one(recorded, model):
    swap(recorded)
    with pytest.raises(InputError, match="expected round 0, found round 1"):
        read_round(recorded, Evidence().on(model), 0)


# --- hostile files

FLIPS = """
    import sys
    from pathlib import Path
    import numpy as np
    from gradlens.errors import InputError
    from gradlens.log.files import read_state, read_updates
    from gradlens.log.writer import read_header
    folder = Path(sys.argv[1])
    model = read_header(folder)[0].sent
    state = read_state(folder / "globals" / "round-000000.arrow", model)
    path = folder / "updates" / "round-000001.arrow"
    original, changed_path = path.read_bytes(), folder.parent / "changed.arrow"
    rng, outcomes = np.random.default_rng(0), {"read": 0, "error": 0}
    for _ in range(int(sys.argv[2])):
        changed = bytearray(original)
        changed[rng.integers(len(changed))] ^= 1 << int(rng.integers(8))
        changed_path.write_bytes(changed)
        try:
            found = read_updates(changed_path, model, state)
            for name in found.updates:
                assert found.updates[name].shape == (len(found.clients), *model[name].shape)
                found.updates[name].sum()
            outcomes["read"] += 1
        except InputError as error:
            assert "\\n" not in str(error), str(error)
            outcomes["error"] += 1
    print(outcomes["read"], outcomes["error"])
"""


def test_3000_bit_flips_never_crash_the_reader(recorded):
    """Each flipped file ends in data (which verify refuses by its hash) or in one clear error."""
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(FLIPS), str(recorded), "3000"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"exit status {done.returncode}: {done.stderr[-2000:]}"
    read, error = map(int, done.stdout.split())
    assert read + error == 3000
    assert min(read, error) > 0


@pytest.mark.parametrize("payload", [b"", b"ARROW1\0\0", b"PK\x03\x04" + b"\0" * 100, b"\x80\x04\x95" + b"\xff" * 500])
def test_a_foreign_file_in_the_place_of_a_round_is_one_clear_error(recorded, model, payload):
    path = recorded / "updates" / "round-000001.arrow"
    path.write_bytes(payload)
    with pytest.raises(InputError, match="not a readable Arrow file") as caught:
        Run.open(recorded).log[1]
    assert "\n" not in str(caught.value)


def test_a_round_of_another_model_is_refused(recorded, tmp_path):
    other = ModelSpec.of({"fc1.weight": np.zeros((2, 2))})
    with pytest.raises(InputError, match="not those of the model"):
        read_updates(recorded / "updates" / "round-000000.arrow", other, {"fc1.weight": np.zeros((2, 2))})
