"""Sweeps: every cell once, controls measured, nothing lost when it is stopped, and the same bits in any process."""

import json
import multiprocessing
import time
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from importlib import import_module
from threading import Timer

import numpy as np
import pytest
import torch

import gradlens
from gradlens.errors import InputError
from gradlens.log import LogWriter
from simulations import rounds, run_sweep
from simulations.measure import attack_goal, attack_success
from simulations.rounds import run
from simulations.scenario import Scenario, sweep
from simulations.tasks import build_model, load_task

sweep_module = import_module("simulations.sweeps")
BASE = Scenario(rounds=2, num_malicious=3)
CELLS = sweep(
    BASE,
    attack=["trigger", {"trigger": {}, "scaling": {"factor": 2}}, {"label_flip": {"source_label": 3}}],
    seed=[0, 1],
)
AXES = ["attack", "seed"]


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    return run_sweep(CELLS, tmp_path_factory.mktemp("sweep"), axes=AXES, progress=False)


def heads(found: gradlens.Sweep) -> dict[str, dict[str, str]]:
    return {each.name: {n: h for n, h in each.manifest.named().items() if n != "run.json"} for each in found.runs}


def test_every_cell_is_a_closed_run_named_by_its_digest(swept):
    assert [each.name for each in swept.runs] == [cell.digest for cell in CELLS]
    assert all(each.is_closed and each.verify().intact for each in swept.runs)
    assert isinstance(gradlens.open(swept.path), gradlens.Sweep)


def test_the_index_says_what_was_varied_and_which_control_belongs_to_whom(swept):
    index = json.loads((swept.path / "sweep.json").read_text())
    assert index["format"] == 1
    assert index["axes"] == swept.axes == AXES
    assert index["runs"] == {c.digest: {"attack": c.label("attack"), "seed": c.seed} for c in CELLS}
    assert index["controls"] == {c.digest: c.control.digest for c in CELLS if not c.is_control}
    assert swept.settings["control"].sum() == 2
    for cell in CELLS:
        if not cell.is_control:
            assert swept.control_of(cell.digest).scenario == cell.control.settings


def test_controls_hold_the_attack_measured_where_nobody_attacked(swept):
    task, table = load_task("digits"), swept.controls
    assert len(table) == 6 * 2
    for cell in CELLS:
        if cell.is_control:
            continue
        rows = table[table["run"] == cell.digest].sort_values("round")
        assert set(rows["control"]) == {cell.control.digest}
        model, goal = build_model(task, "mlp"), attack_goal(cell)
        states = swept.control_of(cell.digest).states()
        np.testing.assert_array_equal(rows["asr"], [attack_success(goal, model, state) for state in states])
    boosted = {c.seed: c.digest for c in CELLS if "scaling" in c.attack}
    unboosted = {c.seed: c.digest for c in CELLS if list(c.attack) == ["trigger"]}
    for seed in (0, 1):  # what is sent does not matter where nobody sends it
        pair = [table[table["run"] == names[seed]]["asr"].tolist() for names in (boosted, unboosted)]
        assert pair[0] == pair[1]


def test_a_second_call_runs_nothing(swept, monkeypatch):
    def untouched(*_):
        pytest.fail("it ran again")

    monkeypatch.setattr(rounds, "assemble", untouched)
    monkeypatch.setattr(sweep_module, "control_success", untouched)
    assert heads(run_sweep(CELLS, swept.path, axes=AXES, workers=2, progress=False)) == heads(swept)


def test_what_was_finished_is_kept_when_it_is_stopped(swept, tmp_path, monkeypatch):
    calls = []

    def stopping(scenario, path):
        calls.append(scenario)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return run(scenario, path)

    with monkeypatch.context() as patched:
        patched.setattr(sweep_module, "run", stopping)
        with pytest.raises(KeyboardInterrupt):
            run_sweep(CELLS, tmp_path, axes=AXES, progress=False)
    assert len(gradlens.open(tmp_path).runs) == 3
    done = {each.name: each.head for each in gradlens.open(tmp_path).runs}
    whole = run_sweep(CELLS, tmp_path, axes=AXES, progress=False)
    assert {name: each for name, each in done.items() if whole.run(name).head != each} == {}
    assert heads(whole) == heads(swept)
    assert whole.controls.equals(swept.controls)


def test_a_larger_sweep_keeps_what_a_smaller_one_ran(swept, tmp_path, monkeypatch):
    small = run_sweep(CELLS[:2], tmp_path, progress=False)
    before = {each.name: each.head for each in small.runs}
    measured = []
    original = sweep_module.control_success
    monkeypatch.setattr(
        sweep_module, "control_success", lambda *question: measured.append(question) or original(*question)
    )
    large = run_sweep(CELLS, tmp_path, progress=False)
    assert {name: large.run(name).head for name in before} == before
    assert len(measured) == 3  # of the four pairs of a control and an attack one was there
    assert large.controls.equals(swept.controls)
    assert large.axes == ["attack", "num_malicious", "seed"]  # those that vary, where none are named


def test_processes_give_the_same_bits(swept, tmp_path):
    assert heads(run_sweep(CELLS, tmp_path, axes=AXES, workers=2, progress=False)) == heads(swept)


def test_any_executor_gives_the_same_bits(swept, tmp_path):
    before = torch.get_num_threads()
    with ThreadPoolExecutor(3) as executor:
        found = run_sweep(CELLS, tmp_path, axes=AXES, executor=executor, progress=False)
    assert heads(found) == heads(swept)
    assert torch.get_num_threads() == before


@pytest.fixture
def half(tmp_path):
    """A sweep of one run that was stopped after its first round; gives the sweep's folder and the run's."""
    folder = run(CELLS[0], tmp_path / "half" / CELLS[0].digest).path
    lines = (folder / "manifest.jsonl").read_bytes().splitlines(keepends=True)[:2]
    kept = {name for line in lines for name in json.loads(line)["files"]}
    (folder / "manifest.jsonl").write_bytes(b"".join(lines))
    for path in folder.rglob("*"):
        if path.is_file() and path.name != "manifest.jsonl" and str(path.relative_to(folder)) not in kept:
            path.unlink()
    return tmp_path / "half", folder


def test_an_executor_waits_for_who_still_records_a_run(swept, half):
    writer = LogWriter.resume(half[1])
    with pytest.raises(InputError, match="another writer is recording"):  # in this process there is nothing to wait for
        run_sweep(CELLS[:1], half[0], progress=False)
    with ThreadPoolExecutor(1) as executor:
        release = Timer(0.5, writer.leave_open)
        release.start()
        found = run_sweep(CELLS[:1], half[0], executor=executor, progress=False)
        release.join()
    assert heads(found)[CELLS[0].digest] == heads(swept)[CELLS[0].digest]


def test_an_executor_does_not_wait_for_ever(half, monkeypatch):
    monkeypatch.setattr(sweep_module, "PATIENCE", 0.3)
    writer = LogWriter.resume(half[1])
    with ThreadPoolExecutor(1) as executor, pytest.raises(InputError, match="another writer is recording"):
        run_sweep(CELLS[:1], half[0], executor=executor, progress=False)
    writer.leave_open()


def test_a_run_that_was_killed_at_its_start_begins_again(swept, tmp_path):
    folder = tmp_path / CELLS[0].digest
    for name in ("updates", "globals", "verdicts"):
        (folder / name).mkdir(parents=True)
    (folder / "manifest.jsonl").touch()
    found = run_sweep(CELLS[:1], tmp_path, progress=False)
    assert heads(found)[CELLS[0].digest] == heads(swept)[CELLS[0].digest]


class Elsewhere(Executor):
    """Workers that write into files of their own."""

    def submit(self, fn, /, *args, **kwargs):
        future = Future()
        future.set_result(None)
        return future


def test_workers_that_do_not_see_the_files_are_named(tmp_path):
    with pytest.raises(InputError, match="do the workers see the same files"):
        run_sweep(CELLS[:1], tmp_path, executor=Elsewhere(), progress=False)


def test_a_relative_folder_is_the_same_for_workers_elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with ThreadPoolExecutor(1, initializer=monkeypatch.chdir, initargs=("/",)) as executor:
        found = run_sweep(CELLS[:1], "here", executor=executor, progress=False)
    assert found.path == tmp_path / "here"


def test_a_killed_worker_process_is_one_line(tmp_path):
    def kill():
        while not any(tmp_path.glob("*/manifest.jsonl")):
            time.sleep(0.01)
        multiprocessing.active_children()[0].kill()

    with ThreadPoolExecutor(1) as beside:
        beside.submit(kill)
        with pytest.raises(InputError, match="a worker process ended early"):
            run_sweep([cell.replace(rounds=200) for cell in CELLS], tmp_path, workers=2, progress=False)
    assert multiprocessing.active_children() == []


def test_a_failing_run_calls_off_the_rest(tmp_path):
    cells = [BASE.replace(task="nowhere"), *CELLS]
    with ThreadPoolExecutor(1) as executor, pytest.raises(InputError, match="found 'nowhere'"):
        run_sweep(cells, tmp_path, executor=executor, progress=False)
    assert len(list(tmp_path.glob("*/run.json"))) < len(CELLS)


def test_a_sweep_without_its_controls_has_none(tmp_path):
    attacked = [cell for cell in CELLS if not cell.is_control][:1]
    found = run_sweep(attacked, tmp_path, progress=False)
    assert found.controls.empty
    with pytest.raises(InputError, match="no attack-free control"):
        found.control_of(attacked[0].digest)


def test_bad_calls_are_one_line(tmp_path):
    with pytest.raises(InputError, match="at least one scenario"):
        run_sweep([], tmp_path / "none")
    with pytest.raises(InputError, match="at least one worker, found 0"):
        run_sweep(CELLS, tmp_path / "none", workers=0)
    run(BASE, tmp_path / "run")
    with pytest.raises(InputError, match="expected the folder of a sweep, found a run"):
        run_sweep(CELLS, tmp_path / "run")
    assert not (tmp_path / "none").exists()
