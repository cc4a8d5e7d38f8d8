"""`gradlens notebook`: what it writes runs from top to bottom, wherever the recording is and whatever it is called."""

import json
from pathlib import Path

import nbformat
import pytest

from gradlens.examples import example_run
from simulations import Scenario, run_sweep, sweep


def executed(path: Path, monkeypatch, tmp_path: Path) -> str:
    """Everything that its cells show."""
    from nbclient import NotebookClient

    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    monkeypatch.setenv("JUPYTER_PLATFORM_DIRS", "1")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    client = NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(path.parent)}}
    )
    outputs = [output for cell in client.execute().cells if cell.cell_type == "code" for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    return json.dumps(outputs)


@pytest.mark.filterwarnings("default")  # of the kernel's own machinery
def test_a_notebook_of_a_run_names_who_when_and_where(command, tmp_path, monkeypatch):
    example_run(tmp_path / "it's a \\ run", 8, num_malicious=2)
    status, out, _ = command("notebook", "it's a \\ run", "-o", "deep/er/first.ipynb")
    assert (status, out.strip()) == (0, "notebook: deep/er/first.ipynb")
    shown = executed(tmp_path / "deep/er/first.ipynb", monkeypatch, tmp_path)
    assert "verdict: established" in shown
    assert shown.count("image/png") == 2
    assert "client-9" in shown


@pytest.mark.filterwarnings("default")
def test_a_notebook_of_a_sweep_has_a_case_for_each_recording(command, tmp_path, monkeypatch):
    base = Scenario(rounds=4, num_clients=10, attack={"trigger": {}}, num_malicious=2, poison_rate=1.0)
    run_sweep(sweep(base, seed=[0, 1]), tmp_path / "sweep", axes=["seed"], workers=1)
    assert command("notebook", "sweep", "-o", "sweep.ipynb")[0] == 0
    shown = executed(tmp_path / "sweep.ipynb", monkeypatch, tmp_path)
    assert shown.count("image/png") == 2
    assert "verdict" in shown


def test_a_notebook_that_is_there_is_kept(command, tmp_path):
    example_run(tmp_path / "run", 4)
    (tmp_path / "mine.ipynb").write_text("mine")
    status, _, err = command("notebook", "run", "-o", "mine.ipynb")
    assert status == 2
    assert err.strip() == "gradlens: --out: a notebook is written into a new file, found mine.ipynb"
    assert (tmp_path / "mine.ipynb").read_text() == "mine"
