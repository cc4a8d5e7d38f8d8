"""What strangers leave in files, folders and disks, one of each kind: a line, a fault or a note; nothing hangs."""

import io
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

from conftest import ROOT
from gradlens import InputError, Recorder
from gradlens.log import verify
from gradlens.log.manifest import named_file
from gradlens.log.writer import LogWriter

STATE = {"fc.weight": np.zeros((3, 4), np.float32), "fc.bias": np.zeros(3, np.float32)}


def sent(clients, seed=0):
    rng = np.random.default_rng(seed)
    return {c: {n: a + rng.normal(size=a.shape).astype(np.float32) for n, a in STATE.items()} for c in clients}


def record(folder, clients=tuple("abcdef"), state=STATE, close=True):
    recorder = Recorder(folder)
    for seed in range(2):
        cohort = sent(clients, seed)
        recorder.log_round(state, {c: dict(zip(state, s.values(), strict=True)) for c, s in cohort.items()})
        recorder.commit(state)
    recorder.close() if close else recorder.leave_open()
    return folder


# Files that a command is told to read


def placed(path, kind):
    """Something at a path that is no table and no scenario."""
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "loop":
        path.symlink_to(path.name)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "10 GB":
        with open(path, "wb") as file:
            file.truncate(10 << 30)
    else:
        path.write_bytes(bytes(range(256)))
    return path


@pytest.fixture
def _no_hang():
    """A command that waits for a pipe ends the test instead."""

    def late(*_):
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.usefixtures("_no_hang")
@pytest.mark.parametrize("kind", ["pipe", "folder", "loop", "device", "10 GB", "bytes"])
def test_what_is_no_table_and_no_scenario_is_one_line_and_not_waited_for(tmp_path, command, kind):
    run, odd = record(tmp_path / "run"), placed(tmp_path / "odd", kind)
    np.savez(tmp_path / "round_0_client_a.npz", **STATE)
    (tmp_path / "in").mkdir()
    for client in "abc":
        shutil.copy(tmp_path / "round_0_client_a.npz", tmp_path / "in" / f"round_0_client_{client}.npz")
    commands = [
        ("ingest", run, "--truth", odd),
        ("ingest", "in", "-o", "out", "--num-examples", odd),
        ("localize", run, "--suspects", odd),
        ("detect", run, "-d", "layer_norms", "--null", odd),
        ("simulate", odd, "-o", "simulated"),
        ("verify", odd),
        ("inspect", odd),
        ("ingest", odd, "-o", "out"),
    ]
    for words in commands:
        status, out, err = command(*words)
        assert (status, out, err.count("\n")) == (2, "", 1), words
        assert "Traceback" not in err
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == sorted(
        ["in", "run"] + (["odd"] if kind == "folder" else [])
    )
    assert verify(run).intact


def test_a_file_that_somebody_names_may_be_a_link_and_is_not_too_large(tmp_path):
    (tmp_path / "t.csv").write_text("client\na\n")
    (tmp_path / "link.csv").symlink_to("t.csv")
    assert named_file(tmp_path / "link.csv") == tmp_path / "link.csv"
    assert named_file(tmp_path / "missing.csv") == tmp_path / "missing.csv"  # whoever opens it says so
    with pytest.raises(InputError, match="expected at most 3 bytes, found 9"):
        named_file(tmp_path / "t.csv", 3)


def test_a_long_list_of_suspects_is_no_name_of_a_file(tmp_path, command):
    clients = [f"client-{i:03d}" for i in range(60)]
    record(tmp_path / "run", clients)
    status, out, err = command("localize", tmp_path / "run", "--suspects", ",".join(clients[:40]))
    assert (status, err) == (0, "")
    assert "fc.bias" in out


# Files of a run


@pytest.mark.usefixtures("_no_hang")
@pytest.mark.parametrize("kind", ["pipe", "folder", "loop", "device", "bytes"])
@pytest.mark.parametrize("name", ["run.json", "manifest.jsonl", "closed", "updates/round-000000.arrow"])
def test_what_lies_in_place_of_a_file_of_a_run_is_a_fault_or_one_line(tmp_path, command, name, kind):
    run = record(tmp_path / "run")
    (run / name).unlink()
    placed(run / name, kind)
    for words in (("verify", run), ("inspect", run), ("detect", run, "-d", "layer_norms")):
        status, out, err = command(*words)
        assert status in ((1, 2) if words[0] == "verify" else (0, 2))
        assert err.count("\n") == (status == 2)
        assert "Traceback" not in out + err
    if name != "manifest.jsonl":
        assert any(fault.startswith(name) for fault in verify(run).faults) or name == "closed"
        assert not verify(run).intact


@pytest.mark.parametrize("name", ["run.json", "closed", "manifest.jsonl"])
def test_a_text_of_ten_gigabytes_is_not_read(tmp_path, name):
    run = record(tmp_path / "run")
    (run / name).unlink()
    placed(run / name, "10 GB")
    if name == "manifest.jsonl":
        with pytest.raises(InputError, match="expected at most 1,073,741,824 bytes, found 10,737,418,240"):
            verify(run)
    else:
        assert "bytes, found 10,737,418,240" in "".join(verify(run).faults)


def test_a_head_that_was_taken_away_is_said(tmp_path, command):
    """The file may never have been written, where the recorder was killed in its last moment: no fault, but a line."""
    run = record(tmp_path / "run")
    (run / "closed").unlink()
    found = verify(run)
    assert (found.intact, found.closed) == (True, True)
    assert (
        found.in_flight == "the file closed is missing: it was deleted, or the recorder was killed as it closed the run"
    )
    status, out, _ = command("verify", run)
    assert (status, found.in_flight in out) == (0, True)
    assert verify(record(tmp_path / "open", close=False)).in_flight == ""


# Code


@pytest.mark.parametrize("settings", [{"task": "evil:f"}, {"attack": {"semantic": {"feature": "evil:f"}}}], ids=str)
def test_no_command_runs_the_code_that_lies_beside_a_run(tmp_path, command, monkeypatch, settings):
    run = record(tmp_path / "run")
    header = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**header, "scenario": settings}))
    marker = tmp_path / "ran"
    (tmp_path / "evil.py").write_text(f"open({str(marker)!r}, 'w').write('x')\ndef f(samples, seed): pass\n")
    monkeypatch.chdir(tmp_path)
    commands = [
        ("verify", run),
        ("inspect", run),
        ("inspect", run, "--plot", "p.png"),
        ("detect", run, "-d", "layer_norms"),
        ("localize", run, "--suspects", "a"),
        ("replay", run, "-a", "median"),
    ]
    for words in commands:
        status, out, err = command(*words)
        assert "Traceback" not in out + err
        assert not marker.exists(), words
        assert "evil" not in sys.modules
        if words[0] == "replay":
            assert (status, "accuracy and ASR are not measured: " in err) == (0, True)
        if words[0] == "verify" or (len(words) == 4 and "task" in settings and words[0] == "inspect"):
            assert status == (1 if words[0] == "verify" else 2)


# Disks that are full


FULL = """
import io, os, resource, signal, sys
from contextlib import redirect_stderr, redirect_stdout
sys.path.insert(0, {root!r})
from gradlens.cli import main
import gradlens.ingestion, gradlens.reporting.case_file, matplotlib.pyplot
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
for words in {commands!r}:
    sys.argv, out, err, status = ["gradlens", *words], io.StringIO(), io.StringIO(), None
    resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, resource.RLIM_INFINITY))
    try:
        with redirect_stdout(out), redirect_stderr(err):
            main()
    except SystemExit as ended:
        status = ended.code
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    print(words[0], status, repr(err.getvalue()), flush=True)
"""


@pytest.mark.parametrize("size", [0, 700])
def test_commands_that_write_to_a_full_disk_are_one_line_each(tmp_path, size):
    """The system refuses to let any file grow beyond so many bytes."""
    run = record(tmp_path / "run")
    (tmp_path / "in").mkdir()
    for client in "abc":
        np.savez(tmp_path / "in" / f"round_0_client_{client}.npz", **STATE)
    (tmp_path / "truth.csv").write_text("client\na\n")
    commands = [
        ["ingest", str(tmp_path / "in"), "-o", str(tmp_path / "out")],
        ["investigate", str(run), "-o", str(tmp_path / "case.html")],
        ["share", str(run), "-o", str(tmp_path / "copy")],
    ]
    if not size:
        commands += [["ingest", str(run), "--truth", str(tmp_path / "truth.csv")]]
    code = FULL.format(root=str(ROOT), commands=commands, size=size)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert len(lines) == len(commands), done.stderr
    for line in lines:
        name, status, err = line.split(" ", 2)
        assert status == "2", line
        assert "File too large" in err
        assert err.count("\\n") == 1, line
        assert "Traceback" not in err, name
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "case.html").exists()
    assert verify(run).intact


def test_a_run_on_a_disk_that_became_read_only_is_one_line(tmp_path, monkeypatch):
    run = record(tmp_path / "run", close=False)

    def refused(*_, **__):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(LogWriter, "resume", refused)
    with pytest.raises(InputError, match="a run cannot be recorded here: Read-only file system"):
        Recorder(run)
    monkeypatch.undo()
    Recorder(run).close()  # and the lock was let go of
    assert verify(run).intact


def test_the_folders_entry_of_a_manifest_is_on_the_disk_when_a_run_begins(tmp_path, monkeypatch):
    synced, fsync = set(), os.fsync

    def listening(descriptor):
        synced.add(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", listening)
    recorder = Recorder(tmp_path / "run")
    recorder.log_round(STATE, sent("abc"))
    recorder.commit(STATE)
    for path in ("run/manifest.jsonl", "run", "run/updates", "run/globals"):
        assert (tmp_path / path).stat().st_ino in synced, path
    recorder.close()


# Two at once


def test_two_simulations_that_start_together_give_one_run_and_one_line(tmp_path):
    code = (
        "import sys; from simulations import Scenario, run\n"
        "from gradlens.errors import InputError\n"
        "sys.stdin.readline()\n"
        "try: run(Scenario(task='digits', rounds=3, num_clients=5), sys.argv[1]); print('ran')\n"
        "except InputError as error: print('told:', error)\n"
    )
    folder = str(tmp_path / "run")
    both = [
        subprocess.Popen(
            [sys.executable, "-c", code, folder],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        )
        for _ in range(2)
    ]
    for process in both:
        process.stdin.write("\n")
        process.stdin.flush()
    said = sorted(process.communicate(timeout=120)[0].strip() for process in both)
    assert said[0] == "ran"
    assert said[1] == "ran" or re.fullmatch(r"told: \S+: .*", said[1])
    found = verify(tmp_path / "run")
    assert (found.faults, found.rounds, found.closed) == ((), 3, True)


# Terminals and spreadsheets


RAW = re.compile(rb"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
PLAYED = """
import sys
sys.path.insert(0, {root!r})
from gradlens.cli import main
for words in {commands!r}:
    sys.argv = ["gradlens", *words]
    try:
        main()
    except SystemExit:
        pass
"""


def on_a_terminal(commands) -> bytes:
    """What a terminal gets to see of commands; where there is none, click takes escapes out by itself."""
    code = PLAYED.format(root=str(ROOT), commands=[[*map(str, words)] for words in commands])
    ours, theirs = pty.openpty()
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.DEVNULL, stdout=theirs, stderr=theirs)
    os.close(theirs)
    seen = b""
    try:
        while chunk := os.read(ours, 1 << 16):
            seen += chunk
    except OSError:  # the other end is closed
        pass
    os.close(ours)
    process.wait()
    return re.sub(rb"[^\n]*\r(?!\n)|\x1b\[A|\x1b\[K", b"", seen)  # progress bars


def test_no_name_writes_to_a_terminal_what_it_is_not(tmp_path):
    odd = {"w\x1b[35m": STATE["fc.weight"], "b\nOWNED": STATE["fc.bias"]}
    run, layers = record(tmp_path / "run"), record(tmp_path / "layers", state=odd)
    added, head, scenario = (shutil.copytree(run, tmp_path / name) for name in ("added", "head", "scenario"))
    (added / "x\nOWNED\x1b[2J\x1b[31m: intact").write_text("")
    (head / "closed").write_text("\x1b[2J\x1b]0;owned\x07")
    header = json.loads((scenario / "run.json").read_text())
    (scenario / "run.json").write_text(json.dumps({**header, "scenario": {"x\x1b[31m": "\x1b[31m\nOWNED"}}))
    (tmp_path / "in" / "round_0").mkdir(parents=True)
    for client in ("a", "b", "\x1b[31mred\nOWNED", "\u202eevil"):
        np.savez(tmp_path / "in" / "round_0" / f"client_{client}.npz", **odd)
    seen = on_a_terminal(
        [
            ("verify", added),
            ("inspect", added),
            ("verify", head),
            ("verify", run, "--head", "\x1b[31mx\nOWNED"),
            ("inspect", scenario),
            ("inspect", layers),
            ("detect", layers, "-d", "layer_norms"),
            ("localize", layers, "--suspects", "a,b"),
            ("ingest", tmp_path / "in", "-o", tmp_path / "out"),
            ("inspect", tmp_path / "out"),
            ("inspect", tmp_path / "no\x1b[31m\nOWNED"),
        ]
    )
    assert not RAW.search(seen), RAW.search(seen)
    assert not re.search(rb"^\s*OWNED", seen, re.MULTILINE)
    assert "\u202e".encode() not in seen
    assert seen.count(b"NOT INTACT") == 2
    assert rb"\x1b[35m" in seen


@pytest.mark.parametrize("first", ["=", "+", "-", "@"])
def test_no_cell_of_a_table_is_a_formula_and_what_was_written_is_read_again(tmp_path, command, first):
    name = f"{first}cmd|'/C calc'!A0"
    record(tmp_path / "run", [name, "b", "c", "d", "e"])
    _, out, _ = command("detect", tmp_path / "run", "-d", "layer_norms", "--csv")
    table = pd.read_csv(io.StringIO(out), keep_default_na=False)
    assert f"'{name}" in set(table["client"])
    assert not [cell for cell in table["client"] if cell.startswith(("=", "+", "-", "@"))]
    table["flag"] = table["client"].eq(f"'{name}")
    table.to_csv(tmp_path / "flags.csv", index=False)
    status, out, err = command("localize", tmp_path / "run", "--suspects", tmp_path / "flags.csv")
    assert (status, err) == (0, "")
