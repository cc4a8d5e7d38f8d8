"""`verify` and the locks: what is added, forged or replaced is a fault; who starts second is told; nothing hangs."""

import hashlib
import json
import multiprocessing
import os
import shutil
import stat
import threading

import numpy as np
import pytest

from conftest import STATE, random_round
from gradlens import Recorder
from gradlens.detectors import DETECTORS
from gradlens.errors import EverybodyRefused, EvidenceLost, InputError, Stopped
from gradlens.log import Evidence, LogWriter, verify
from gradlens.log.manifest import read_manifest, regular_file
from gradlens.log.verification import Verification
from gradlens.run import Run

PLAIN = {"fc.weight": np.zeros((3, 4), np.float32), "fc.bias": np.zeros(3, np.float32)}


def sent(count: int = 4, seed: int = 0) -> dict:
    rng = np.random.default_rng(seed)
    return {
        f"c{k}": {n: a + rng.normal(size=a.shape).astype(np.float32) for n, a in PLAIN.items()} for k in range(count)
    }


def with_lines(folder, *lines: dict) -> None:
    """Appends lines to a manifest with a chain that holds."""
    path = folder / "manifest.jsonl"
    for line in lines:
        previous = hashlib.sha256(path.read_bytes().splitlines()[-1]).hexdigest()
        path.write_bytes(path.read_bytes() + json.dumps({**line, "previous": previous}).encode() + b"\n")


def forged_round(folder, number: int = 3) -> dict:
    names = {f"updates/round-{number:06d}.arrow": "updates/round-000000.arrow"}
    names[f"globals/round-{number + 1:06d}.arrow"] = "globals/round-000001.arrow"
    for new, old in names.items():
        shutil.copy(folder / old, folder / new)
    files = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}
    return {"round": number, "files": files, "metrics": {}}


def faults_of(folder, head=None) -> str:
    return "\n".join(verify(folder, head).faults)


@pytest.mark.parametrize("noted", [False, True])
def test_a_forged_round_after_the_closing_line_is_a_fault(recorded, noted):
    head = read_manifest(recorded).head
    with_lines(recorded, forged_round(recorded))
    found = verify(recorded, head if noted else None)
    assert not found.intact
    assert "it follows the closing line" in "\n".join(found.faults)
    assert found.after_head == ("committed after that head: 1 rounds" if noted else "")


def test_a_second_truth_or_closing_line_or_a_file_without_a_kind_is_a_fault(recorded):
    with_lines(recorded, {"truth": 1, "files": {}})
    assert verify(recorded).intact  # the ground truth may come after the run is closed
    with_lines(recorded, {"truth": 2, "files": {}})
    assert "the ground truth is written once" in faults_of(recorded)
    with_lines(recorded, {"closed": 3}, {"files": {}})
    assert faults_of(recorded).count("it follows the closing line") == 2
    assert "expected one round, truth or closing line" in faults_of(recorded)


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("closed", lambda path: (path.unlink(), os.mkfifo(path))),
        ("closed", lambda path: (path.unlink(), path.symlink_to("/dev/zero"))),
        ("closed", lambda path: (path.unlink(), path.mkdir())),
        ("closed", lambda path: path.write_text("")),
        ("updates/round-000001.arrow", lambda path: (path.unlink(), os.mkfifo(path))),
        ("updates/round-000001.arrow", lambda path: (path.unlink(), path.symlink_to("round-000000.arrow"))),
        ("linked", lambda path: path.symlink_to("updates")),
        ("empty", lambda path: path.mkdir()),
        ("bad\udc80name", lambda path: path.write_text("")),
    ],
)
def test_odd_kinds_of_file_are_faults_and_nothing_hangs(recorded, name, make):
    make(recorded / name)
    assert name.rstrip("/") in faults_of(recorded)
    assert "\n" not in "".join(verify(recorded).faults)


@pytest.mark.parametrize("name", ["updates/\0x", "u" * 5_000, "../outside", "updates/\ud800.arrow", "/etc/hostname"])
def test_a_path_that_no_run_has_is_a_fault(record, name):
    folder = record(close=False).folder
    with_lines(folder, {"round": 3, "files": {name: "0" * 64}})
    assert "no name of a file of a run" in faults_of(folder)


def test_a_manifest_that_is_no_plain_file_is_one_line(recorded):
    (recorded / "manifest.jsonl").unlink()
    os.mkfifo(recorded / "manifest.jsonl")
    with pytest.raises(InputError, match="expected a plain file, found a pipe"):
        verify(recorded)
    with pytest.raises(InputError, match="expected a plain file, found a pipe"):
        Run.open(recorded)


def test_a_file_larger_than_it_can_be_is_not_read(tmp_path):
    with open(tmp_path / "sparse", "wb") as file:
        file.truncate(10 << 30)
    with pytest.raises(InputError, match="expected at most 1,000 bytes, found 10,737,418,240"):
        regular_file(tmp_path / "sparse", 1_000)


def test_a_run_that_is_being_recorded_is_not_accused(tmp_path, model):
    answers: list[Verification] = []
    with LogWriter.create(tmp_path / "run", model, STATE) as writer:

        def record() -> None:
            for index in range(40):
                writer.commit(random_round(index), STATE)

        recording = threading.Thread(target=record)
        recording.start()
        while recording.is_alive():
            answers.append(verify(tmp_path / "run"))
        recording.join()
    assert len(answers) > 1
    assert [answer.faults for answer in answers if not answer.intact] == []
    assert verify(tmp_path / "run").closed


# --- locks


def test_the_folder_is_held_from_the_start_and_let_go_of(tmp_path, monkeypatch):
    monkeypatch.setattr("gradlens.server.PATIENCE", 0.1)
    first = Recorder(tmp_path / "run")
    with pytest.raises(InputError, match="another writer is recording into this folder"):
        Recorder(tmp_path / "run")
    first.log_round(PLAIN, sent())
    first.commit(PLAIN)
    with pytest.raises(InputError, match="another writer"):
        Recorder(tmp_path / "run")
    first.leave_open()
    with Recorder(tmp_path / "run") as second:
        assert len(second.log) == 1


def test_a_recorder_waits_for_one_that_is_about_to_end(tmp_path):
    first = Recorder(tmp_path / "run")
    first.log_round(PLAIN, sent())
    first.commit(PLAIN)
    ending = threading.Timer(0.3, first.leave_open)
    ending.start()
    with Recorder(tmp_path / "run") as second:
        assert len(second.log) == 1
    ending.join()


def race(folder: str, name: str, queue) -> None:
    try:
        with Recorder(folder) as recorder:
            for index in range(3):
                recorder.log_round(PLAIN, {f"{name}-{key}": state for key, state in sent(seed=index).items()})
                recorder.commit(PLAIN)
            queue.put((name, 3 - len(recorder.lost)))
    except InputError:
        queue.put((name, 0))


def test_two_recorders_that_start_together_lose_no_round_that_either_announced(tmp_path):
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    racers = [context.Process(target=race, args=(str(tmp_path / "run"), name, queue)) for name in "ab"]
    for each in racers:
        each.start()
    announced = dict(queue.get(timeout=60) for _ in racers)
    for each in racers:
        each.join()
    names = [str(name) for round_ in Run.open(tmp_path / "run").log for name in round_.clients[:1]]
    for name, count in announced.items():
        assert sum(client.startswith(name) for client in names) == count
    assert sum(announced.values()) >= 3
    assert verify(tmp_path / "run").intact


@pytest.mark.parametrize("harm", ["removed", "replaced", "folder"])
def test_a_manifest_that_is_taken_away_is_lost_evidence_and_training_goes_on(tmp_path, harm):
    detector = DETECTORS["accumulated_norms"]()
    folder = tmp_path / "run"
    with Recorder(folder, detector=detector) as recorder:
        recorder.log_round(PLAIN, sent())
        recorder.commit(PLAIN)
        if harm == "folder":
            shutil.rmtree(folder)
        else:
            (folder / "manifest.jsonl").unlink()
            if harm == "replaced":
                (folder / "manifest.jsonl").write_text("")
        for index in (1, 2):
            assert recorder.log_round(PLAIN, sent(seed=index)).kept
            with pytest.warns(EvidenceLost):
                recorder.commit(PLAIN)
        with pytest.warns(EvidenceLost, match="not closed"):
            recorder.close()
    assert len(recorder.lost) == 3


def test_a_secret_seed_is_for_its_owner_alone(tmp_path, model):
    LogWriter.create(tmp_path / "run", model, STATE, evidence=Evidence("sketch", width=8)).close()
    assert stat.S_IMODE((tmp_path / "run" / "run.json").stat().st_mode) == 0o600


# --- a server that learns nothing


def test_a_round_in_which_everybody_is_refused_warns_with_the_commonest_reason(tmp_path):
    with Recorder(tmp_path / "run") as recorder:
        recorder.log_round(PLAIN, sent())
        recorder.commit(PLAIN)
        heads = {f"c{k}": {"fc.bias": PLAIN["fc.bias"]} for k in range(4)} | {"c9": None}
        expected = r"round 1: nothing of 5 clients could be recorded: layer 'fc.weight' is missing \(4 of 5\)"
        with pytest.warns(EverybodyRefused, match=expected):
            decision = recorder.log_round(PLAIN, heads)
        assert not len(decision.kept)
        recorder.commit(PLAIN)


class Stopping:
    """What a client could send in a process of its own making: whatever is asked of it raises."""

    def __init__(self, error: type[BaseException]):
        self.error = error

    def raises(self, *_, **__):
        raise self.error

    __array__ = __str__ = __repr__ = __int__ = raises


class StoppingTable(dict):
    """A table of layers that cannot be walked through."""

    def keys(self):
        raise SystemExit

    __iter__ = keys


class StoppingName(str):
    """A name whose methods raise."""

    __slots__ = ()

    def __str__(self):
        return self

    def isprintable(self):
        raise SystemExit


@pytest.mark.parametrize("evidence", ["full", "sketch"])
@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt])
def test_an_object_that_ends_the_program_is_refused(error, evidence):
    recorder = Recorder(evidence=evidence)
    odd = {
        **sent(),
        "array": {name: Stopping(error) for name in PLAIN},
        "table": StoppingTable(PLAIN),
        "layer": {**PLAIN, Stopping(error): np.zeros(3)},
        "claim": sent(1)["c0"],
        Stopping(error): sent(1)["c0"],
        StoppingName("name"): sent(1)["c0"],
    }
    decision = recorder.log_round(PLAIN, odd, {**dict.fromkeys(odd, 5), "claim": Stopping(error)})
    assert sorted(decision.kept) == ["c0", "c1", "c2", "c3", "name"]
    assert set(recorder.log[-1].refused) == {"array", "table", "layer", "claim", "a Stopping without a name"}


def test_a_signal_that_ends_a_command_is_no_clients_fault():
    with pytest.raises(Stopped):
        Recorder().log_round(PLAIN, {**sent(), "late": {name: Stopping(Stopped) for name in PLAIN}})


@pytest.mark.parametrize("evidence", ["full", "sketch"])
def test_answers_that_are_unfit_for_the_same_reason_are_refused_for_it(evidence):
    recorder = Recorder(evidence=evidence)
    recorder.log_round(PLAIN, [*sent().items(), ("odd", None), ("odd", None)])
    assert recorder.log[-1].refused == {"odd": "sent nothing"}
