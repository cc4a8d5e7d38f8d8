"""What the tests of several modules share."""

import os
import sys
from pathlib import Path

import numpy as np
import pytest

from gradlens.cli import main
from gradlens.log import LogWriter, ModelSpec, Round

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The folder of real datasets; a test that needs it is skipped where it is absent."""
    root = Path(os.environ.get("GRADLENS_DATA", ROOT.parent / "shared" / "data"))
    if not (root / "fashion_mnist").is_dir():
        pytest.skip(f"real datasets are not at {root}; name their folder in GRADLENS_DATA")
    return root


STATE = {
    "fc1.weight": np.linspace(-1, 1, 24, dtype=np.float32).reshape(4, 6),
    "fc1.bias": np.zeros(4, np.float32),
    "norm.count": np.array(7, np.int64),
    "fc2.weight": np.linspace(1, -1, 12, dtype=np.float32).reshape(3, 4),
    "fc2.bias": np.zeros(3, np.float32),
}


@pytest.fixture(scope="session")
def state() -> dict[str, np.ndarray]:
    """A small global model: two dense layers and a counter."""
    return STATE


@pytest.fixture(scope="session")
def model() -> ModelSpec:
    return ModelSpec.of(STATE, buffers=["norm.count"])


def random_round(index: int, clients=("a", "b", "c", "d"), seed: int = 0, **changes) -> Round:
    """A round of random updates of the small model; `changes` replace fields."""
    rng = np.random.default_rng([seed, index])
    updates = {
        name: rng.normal(size=(len(clients), *np.shape(array))).astype(array.dtype) for name, array in STATE.items()
    }
    fields = {
        "index": index,
        "clients": np.array(list(clients), dtype=np.str_),
        "num_examples": np.full(len(clients), 10),
        "updates": updates,
        "global_model": STATE,
        "buffers": ("norm.count",),
    }
    return Round(**(fields | changes))


@pytest.fixture
def record(tmp_path, model):
    """Records a run of random rounds under `name`; the writers that a test leaves open are closed after it."""
    writers = []

    def recording(name: str = "run", rounds: int = 3, *, close: bool = True) -> LogWriter:
        writer = LogWriter.create(tmp_path / name, model, STATE, scenario={"task": "none"})
        writers.append(writer)
        for index in range(rounds):
            writer.commit(random_round(index), STATE, metrics={"main_accuracy": 0.5})
        if close:
            writer.close()
        return writer

    yield recording
    for writer in writers:
        writer.leave_open()


@pytest.fixture
def recorded(record) -> Path:
    """The folder of a closed run of three rounds."""
    return record().folder


@pytest.fixture
def command(capsys, monkeypatch, tmp_path):
    """Runs `gradlens ...` in an empty folder; gives exit status, standard output and standard error."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])  # a command adds the folder it is called in

    def run(*words) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["gradlens", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code, *capsys.readouterr()

    return run
