"""A sweep on a real Dask cluster of this machine: the same bits as in one process, also when a worker is killed."""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

import gradlens
from gradlens import cli
from gradlens.errors import InputError
from simulations import Scenario, run_sweep, sweep
from simulations.sweeps import dask_executor

pytest.importorskip("distributed")
CELLS = sweep(Scenario(rounds=25, attack="trigger"), num_malicious=[0, 3], seed=[0, 1, 2])


def until(found: Callable[[], object], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not found():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


class Cluster:
    """A scheduler and its workers, one thread each, as subprocesses that write into a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.started, self.workers = folder, [], []
        self.noted = folder / "scheduler.json"
        self.scheduler = self.start("scheduler", "--host=127.0.0.1", "--port=0", f"--scheduler-file={self.noted}")
        until(lambda: self.noted.exists() and self.noted.read_text().endswith("}"))

    def start(self, kind: str, *words: str) -> subprocess.Popen:
        command = [sys.executable, "-m", "dask", kind, "--no-dashboard", *words]
        with open(self.folder / f"{kind}-{len(self.started)}.log", "wb") as log:
            self.started.append(subprocess.Popen(command, stdout=log, stderr=log, cwd=self.folder))
        return self.started[-1]

    def add_worker(self) -> None:
        words = [f"--scheduler-file={self.noted}", "--host=127.0.0.1", "--nthreads=1"]
        self.workers.append(self.start("worker", "--no-nanny", *words))

    @property
    def address(self) -> str:
        return json.loads(self.noted.read_text())["address"]

    def stop(self) -> None:
        for process in reversed(self.started):
            process.kill()
            process.wait()

    def kill_a_worker(self, out: Path) -> dict[Path, list[str]]:
        """Kills the worker that is in the middle of a run; gives the lines of the manifest that it leaves open."""
        victim = psutil.Process(self.workers[0].pid)
        held: dict[Path, list[str]] = {}

        def caught() -> bool:
            victim.suspend()
            paths = [Path(each.path) for each in victim.open_files() if each.path.endswith("manifest.jsonl")]
            held.update({path: lines for path in paths if 3 < len(lines := path.read_text().splitlines(True)) < 15})
            if not held:
                victim.resume()
            return bool(held)

        until(caught)
        victim.kill()
        self.workers[0].wait()
        assert all(path.is_relative_to(out) for path in held)
        return held


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[Cluster]:
    """Two workers, of which a test may kill one."""
    found = Cluster(tmp_path_factory.mktemp("cluster"))
    found.add_worker()
    found.add_worker()
    yield found
    found.stop()


@pytest.fixture
def doomed(tmp_path) -> Iterator[Cluster]:
    """A cluster of one worker that a test may do away with."""
    (tmp_path / "cluster").mkdir()
    found = Cluster(tmp_path / "cluster")
    found.add_worker()
    yield found
    found.stop()


@pytest.fixture(scope="module")
def here(tmp_path_factory) -> gradlens.Sweep:
    return run_sweep(CELLS, tmp_path_factory.mktemp("here"), progress=False)


def heads(found: gradlens.Sweep) -> dict[str, dict[str, str]]:
    return {each.name: {n: h for n, h in each.manifest.named().items() if n != "run.json"} for each in found.runs}


def test_a_killed_worker_costs_nothing(cluster, here, tmp_path):
    out = tmp_path / "out"
    with dask_executor(cluster.address) as executor, ThreadPoolExecutor(1) as beside:
        killed = beside.submit(cluster.kill_a_worker, out)
        found = run_sweep(CELLS, out, executor=executor, progress=False)
        left = killed.result()
    assert sorted(path.name for path in out.iterdir() if path.is_dir()) == sorted(cell.digest for cell in CELLS)
    assert all(run.is_closed and run.verify().intact and not run.in_flight for run in found.runs)
    assert [len(run.log) for run in found.runs] == [CELLS[0].rounds] * len(CELLS)
    for manifest, lines in left.items():  # another worker went on after the last line of the dead one
        assert manifest.read_text().splitlines(True)[: len(lines)] == lines
    assert heads(found) == heads(here)
    assert found.controls.equals(here.controls)


def test_the_command_line_takes_the_address_of_a_scheduler(cluster, tmp_path, monkeypatch, capsys):
    (tmp_path / "s.toml").write_text('rounds = 2\nattack = "trigger"\n[[sweep]]\nnum_malicious = [0, 3]\n')
    (tmp_path / "one.toml").write_text("rounds = 2\n")
    monkeypatch.chdir(tmp_path)  # the workers are elsewhere

    def simulate(toml: str) -> int:
        monkeypatch.setattr(sys, "argv", ["gradlens", "simulate", toml, "-o", "out", "--executor", cluster.address])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return ended.value.code

    assert simulate("one.toml") == 2
    assert "a single scenario" in capsys.readouterr().err
    assert simulate("s.toml") == 0
    assert "ASR on control" in capsys.readouterr().out
    assert all(run.verify().intact for run in gradlens.open(tmp_path / "out").runs)


def test_a_failing_run_is_one_line(cluster, tmp_path):
    with dask_executor(cluster.address) as executor, pytest.raises(InputError, match="found 'nowhere'"):
        run_sweep([Scenario(task="nowhere")], tmp_path, executor=executor, progress=False)


def test_a_lost_scheduler_is_one_line(doomed, tmp_path):
    def kill() -> None:
        until(lambda: any(tmp_path.glob("out/*/closed")))
        doomed.scheduler.kill()

    def lose() -> None:
        with ThreadPoolExecutor(1) as beside, dask_executor(doomed.address) as executor:
            beside.submit(kill)
            run_sweep(CELLS, tmp_path / "out", executor=executor, progress=False)

    with pytest.raises(InputError, match="was lost; what was finished is kept"):
        lose()


def test_nobody_answers(tmp_path, monkeypatch):
    with (
        pytest.raises(InputError, match="no scheduler answers at tcp:"),
        dask_executor("tcp://127.0.0.1:1", timeout=0.5),
    ):
        pass
    for address in ("127.0.0.1:1", "http://127.0.0.1:1", "tcp://127.0.0.1"):
        with (
            pytest.raises(InputError, match=r"expected the address of a scheduler, tcp://HOST:PORT"),
            dask_executor(address),
        ):
            pass
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(InputError, match=r"pip install 'dask\[distributed\]'"), dask_executor("tcp://127.0.0.1:1"):
        pass
