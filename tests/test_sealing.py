"""A sweep is what it was finished with: no run more or less, and its table of contents unchanged."""

import json
import os
import shutil

import pytest

from gradlens.errors import InputError
from gradlens.run import Sweep, read_index
from gradlens.sealing import SEAL, seal_sweep, verify_sweep
from simulations import Scenario, run_sweep, sweep


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    scenarios = sweep(Scenario(rounds=1, num_clients=5, attack="label_flip"), num_malicious=[0, 1])
    return run_sweep(scenarios, tmp_path_factory.mktemp("runs") / "sweep", progress=False).path


@pytest.fixture
def folder(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "sweep")


def faults_of(folder, head=None) -> list[str]:
    return list(verify_sweep(folder, head)[str(folder)].faults)


def changed_index(folder, change) -> None:
    index = json.loads((folder / "sweep.json").read_text())
    change(index)
    (folder / "sweep.json").write_text(json.dumps(index))


def test_a_finished_sweep_is_sealed_and_each_of_its_runs_verified(folder, command):
    found = verify_sweep(folder)
    whole = found[str(folder)]
    assert [*found] == [
        str(folder),
        *(str(each.path) for each in sorted(Sweep.open(folder).runs, key=lambda r: r.name)),
    ]
    assert all(each.intact for each in found.values())
    assert (whole.rounds, whole.closed) == (2, True)
    status, out, _ = command("verify", folder)
    assert status == 0
    assert out.startswith(f"{folder}: intact, a sweep of 2 runs, 2 rounds, sealed, head {whole.head}\n")
    assert out.count("intact, 1 rounds, closed") == 2
    assert command("verify", folder, "--head", whole.head)[0] == 0
    assert command("verify", folder, "--head", "0" * 64)[0] == 1


def test_an_edited_table_of_contents_is_a_fault(folder, command):
    changed_index(folder, lambda index: index["runs"].update({name: {"seed": 7} for name in index["runs"]}))
    assert faults_of(folder) == ["sweep.json: changed since the sweep was finished"]
    status, out, _ = command("verify", folder)
    assert (status, "NOT INTACT" in out) == (1, True)


@pytest.mark.parametrize("sealed", [True, False])
def test_a_missing_and_an_extra_run_are_faults(folder, sealed):
    name, other = Sweep.open(folder).index["runs"]
    if not sealed:
        (folder / SEAL).unlink()
    (folder / name).rename(folder / "stranger")
    said = "\n".join(faults_of(folder))
    assert f"run {name}: missing; it was removed, or the sweep is not finished" in said
    assert "run stranger: sweep.json does not name it" in said
    changed_index(folder, lambda index: index["runs"].pop(name))
    said = "\n".join(faults_of(folder))
    assert ("sweep.json: changed since" in said, f"run {name}: removed since" in said) == (sealed, sealed)
    assert f"run {other}" not in said


def test_a_run_in_place_of_another_is_a_fault(folder):
    one, other = Sweep.open(folder).index["runs"]
    shutil.rmtree(folder / one)
    shutil.copytree(folder / other, folder / one)
    assert faults_of(folder) == [f"run {one}: changed since the sweep was finished"]
    (folder / one / "manifest.jsonl").unlink()
    (folder / one / "manifest.jsonl").mkdir()
    assert any(fault.startswith(f"run {one}: ") and "found a folder" in fault for fault in faults_of(folder))


def test_a_rewritten_seal_does_not_have_the_head_that_was_noted(folder):
    head = verify_sweep(folder)[str(folder)].head
    changed_index(folder, lambda index: index.update(axes=["seed"]))
    seal_sweep(folder)
    assert faults_of(folder) == []
    assert [fault.startswith("the sweep does not have the head") for fault in faults_of(folder, head)] == [True]


@pytest.mark.parametrize(
    "seal", ["", "[]", "null", '{"format": 1}', '{"format": 1, "files": 3, "runs": []}', '{"format": 2}', "[" * 10**5]
)
def test_a_seal_that_is_none_is_a_fault(folder, seal):
    (folder / SEAL).write_text(seal)
    assert [fault.startswith(f"{SEAL}: ") for fault in faults_of(folder)] == [True]


@pytest.mark.parametrize("name", ["sweep.json", SEAL])
def test_what_is_no_plain_file_is_a_fault_and_not_waited_for(folder, name):
    (folder / name).unlink()
    os.mkfifo(folder / name)
    assert f"{name}: expected a plain file, found a pipe" in faults_of(folder)
    (folder / name).unlink()
    if name == "sweep.json":
        assert "sweep.json: no such file" in faults_of(folder)
    else:
        assert not verify_sweep(folder)[str(folder)].closed


def test_going_on_with_a_sweep_breaks_its_seal_until_it_is_finished(folder, monkeypatch):
    scenarios = sweep(Scenario(rounds=1, num_clients=5, attack="label_flip"), num_malicious=[0, 1], seed=[0, 1])

    def stopped(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("simulations.sweeps.run", stopped)
        with pytest.raises(KeyboardInterrupt):
            run_sweep(scenarios, folder, progress=False)
    assert not (folder / SEAL).exists()
    assert [": missing; " in fault for fault in faults_of(folder)] == [True, True]
    run_sweep(scenarios, folder, progress=False)
    assert faults_of(folder) == []


@pytest.mark.parametrize("name", ["..", "", "a\0b", "a/b"])
def test_a_sweep_names_no_folder_but_its_own(folder, name):
    changed_index(folder, lambda index: index["runs"].update({name: {}}))
    with pytest.raises(InputError, match="not the name of a run's folder"):
        read_index(folder / "sweep.json")
