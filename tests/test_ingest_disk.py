"""What a disk does not allow is one line of the project's own error, from Python as on the command line."""

import errno
import os

import numpy as np
import pytest

from gradlens import InputError, LogWriter
from gradlens.ingestion import ingest, with_csv_truth
from gradlens.run import Run

CLIENTS = 3


@pytest.fixture
def folder(tmp_path):
    """A recording of two rounds that begins with a global model."""
    rng = np.random.default_rng(0)
    for number in range(2):
        (tmp_path / "in" / f"round_{number}").mkdir(parents=True)
        for client in range(CLIENTS):
            state = {"fc.weight": rng.normal(size=(3, 4)).astype(np.float32), "fc.bias": np.zeros(3, np.float32)}
            np.savez(tmp_path / "in" / f"round_{number}" / f"client_{client}.npz", **state)
            np.savez(tmp_path / "in" / f"global_{number}.npz", **state)
    return tmp_path / "in"


def fault_of(source, out, **settings) -> str:
    with pytest.raises(InputError) as caught:
        ingest(source, out, **settings)
    assert str(caught.value).isprintable()
    assert not out.exists()
    return str(caught.value)


@pytest.mark.parametrize(
    ("number", "found"),
    [
        (errno.EACCES, "found: Permission denied; check who may read and write it"),
        (errno.ENOENT, "found: No such file or directory; it was there before; ingest again"),
        (errno.EIO, "found: Input/output error; check the disk"),
    ],
)
def test_a_folder_that_cannot_be_listed_stops_and_is_named(folder, tmp_path, monkeypatch, command, number, found):
    """Without its files the run would look whole and lack evidence."""
    whole = os.scandir

    def scandir(path="."):
        if str(path).endswith("round_1"):
            raise OSError(number, os.strerror(number), str(path))
        return whole(path)

    monkeypatch.setattr(os, "scandir", scandir)
    said = fault_of(folder, tmp_path / "run")
    assert said.startswith(f"{folder / 'round_1'}: expected to read the recording, {found}")
    assert command("ingest", folder, "-o", tmp_path / "run") == (2, "", f"gradlens: {said}\n")


def test_a_file_that_vanishes_refuses_its_client(folder, tmp_path, monkeypatch):
    walk = os.walk

    def walked(*given, **more):
        found = list(walk(*given, **more))
        (folder / "round_1" / "client_0.npz").unlink(missing_ok=True)
        return found

    monkeypatch.setattr(os, "walk", walked)
    done = ingest(folder, tmp_path / "run")
    assert "No such file" in done.run.log[1].refused["0"]
    assert len(done.run.log[1]) == CLIENTS - 1


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EDQUOT])
def test_a_disk_that_takes_no_more_is_one_line_and_leaves_nothing(folder, tmp_path, monkeypatch, number):
    def commit(*_, **__):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(LogWriter, "commit", commit)
    said = fault_of(folder, tmp_path / "run")
    assert said.startswith(f"{tmp_path / 'run'}: expected to write the run, found: {os.strerror(number)}; ")


def test_a_run_that_cannot_be_made_is_one_line(folder, tmp_path):
    (tmp_path / "file").write_text("in the way")
    said = fault_of(folder, tmp_path / "file" / "run")
    assert said.startswith(f"{tmp_path / 'file'}")
    assert said.endswith("a run cannot be recorded here: Not a directory")


def test_a_truth_that_cannot_be_written_is_one_line(folder, tmp_path, monkeypatch):
    ingest(folder, tmp_path / "run")
    (tmp_path / "who.csv").write_text("client\n0\n")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("gradlens.log.writer.write_table", full)
    with pytest.raises(InputError, match="expected to write the run, found: No space left on device; free some"):
        with_csv_truth(tmp_path / "run", tmp_path / "who.csv")
    assert Run.open(tmp_path / "run").verify().intact


def test_what_is_no_plain_file_is_refused_and_not_waited_for(folder, tmp_path):
    places = [folder / f"round_{number}" / f"client_{number}.npz" for number in range(2)]
    for path in places:
        path.unlink()
    os.mkfifo(places[0])
    places[1].symlink_to(places[1])
    done = ingest(folder, tmp_path / "run")
    assert "expected a plain file, found a pipe" in done.run.log[0].refused["0"]
    assert "1" in done.run.log[1].refused
    (folder / "global_1.npz").unlink()
    os.mkfifo(folder / "global_1.npz")
    assert "expected a plain file, found a pipe" in fault_of(folder, tmp_path / "other")
