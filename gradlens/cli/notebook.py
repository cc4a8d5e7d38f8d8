"""`gradlens notebook`: a notebook pointed at a recording, to go on by hand where the commands end."""

import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from gradlens.cli.options import Folder
from gradlens.cli.output import ends_in, say
from gradlens.errors import InputError

Cells = tuple[tuple[str, str], ...]  # what is said, then the code below it

START = """\
import matplotlib.pyplot as plt

import gradlens
from gradlens import DETECTORS, plots
"""
OF_A_RUN: Cells = (
    (
        "# A recording, by hand\n\nEvery cell can be changed and run again; nothing here changes the recording.",
        START
        + "\nrun = gradlens.open({path})\n"
        + "null = None  # or attack-free recordings of the same setting, a list of runs",
    ),
    (
        "## What is it?\n\nWhether it is as it was recorded, what its layers are, and which one answers.",
        "verified = run.verify()\n"
        'print(f"{len(run.log)} rounds, intact: {verified.intact}, head: {verified.head[:16]}")\n'
        'print("layers:", *run.model.parameters)\n'
        'print("the layer that answers:", run.model.final_weight or "not known")',
    ),
    ("## Who?", "case = gradlens.investigate(run, null)\nprint(case)"),
    ("The most suspicious clients, accused or not:", "case.clients.head(10)"),
    (
        "## Since when?\n\nThe score of every client after every round, by one detector; `gradlens list detectors` "
        "names others.",
        'detector = DETECTORS["panel"]()\n'
        'scores = gradlens.detect(run, {"panel": detector})\n'
        'fig, ax = plt.subplots(figsize=(8, 4), layout="constrained")\n'
        "plots.plot_scores(scores, ax=ax);",
    ),
    (
        "## Which class?\n\nThe update of the final bias, client by client, in the last round; `run.log[:n]` is the "
        "log up to an earlier one. Where the model has none, or it is not known, the picture says so.",
        'fig, ax = plt.subplots(figsize=(6, 6), layout="constrained")\nplots.plot_final_bias(run.log, ax=ax);',
    ),
    (
        "## In which layer?\n\nHow well each layer tells the most suspicious clients apart from the others. They were "
        "chosen by what they sent, so this says where to look and is no evidence against them.",
        'suspects = (case.suspects if len(case.suspects) else case.clients.head(3))["client"].tolist()\n'
        "where = gradlens.localize(run, suspects=suspects)\n"
        'where[where["unit"] == ""].sort_values("auc", ascending=False).head(8)',
    ),
)  # fmt: skip
OF_A_SWEEP: Cells = (
    (
        "# A sweep, by hand\n\nEvery cell can be changed and run again; nothing here changes the recordings.",
        START + "\nsweep = gradlens.open({path})\nsweep.settings",
    ),
    (
        "## Who?\n\nOne case for every recording.",
        "cases = {run.name: gradlens.investigate(run) for run in sweep.runs}\n"
        'sweep.settings.assign(verdict={name: case.verdict for name, case in cases.items()})',
    ),
    ("The first of them in words:", "print(cases[sweep.runs[0].name])"),
    (
        "## In which layer?\n\nHow well each layer tells poisoned updates apart, over seeds, beside the control: the "
        "same clients where nobody attacks.",
        "from gradlens.localization import localize_sweep\n\n"
        "where = localize_sweep(sweep)\n"
        'fig, ax = plt.subplots(figsize=(9, 5), layout="constrained")\n'
        'plots.plot_localization(where, statistic="layer_norms", ax=ax);',
    ),
    (
        "## One recording\n\nThe score of every client after every round.",
        "run = sweep.runs[0]\n"
        'scores = gradlens.detect(run, {"panel": DETECTORS["panel"]()})\n'
        'fig, ax = plt.subplots(figsize=(8, 4), layout="constrained")\n'
        "plots.plot_scores(scores, ax=ax);",
    ),
)  # fmt: skip


def notebook(
    run: Folder,
    out: Annotated[Path, typer.Option("--out", "-o", help="The notebook to write.", show_default=False)],
) -> None:
    """Writes a Jupyter notebook that opens a run or a sweep and asks who, when and where."""
    import gradlens

    ends_in(out, (".ipynb",), "--out")
    if os.path.lexists(out):
        raise InputError(f"--out: a notebook is written into a new file, found {out}")
    cells = OF_A_SWEEP if isinstance(gradlens.open(run), gradlens.Sweep) else OF_A_RUN
    path = os.path.relpath(Path(run).resolve(), out.resolve().parent)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(notebook_of(cells, path), indent=1) + "\n", encoding="utf-8")
    say(f"notebook: {out}")


def notebook_of(cells: Cells, path: str) -> dict[str, Any]:
    """A notebook in Jupyter's format 4.5.

    Parameters
    ----------
    cells : tuple of (str, str)
        What is said, in Markdown, and the code below it, in which {path} stands for the recording.
    path : str
        The recording, from the folder of the notebook.

    Returns
    -------
    dict
        Plain values.

    Examples
    --------
    >>> notebook_of((("# A run", "gradlens.open({path})"),), "runs/first")["cells"][1]["source"]
    "gradlens.open('runs/first')"
    """
    said = [
        {"cell_type": kind, "id": f"cell-{2 * number + place}", "metadata": {}, "source": source}
        | ({"outputs": [], "execution_count": None} if kind == "code" else {})
        for number, (words, code) in enumerate(cells)
        for place, (kind, source) in enumerate((("markdown", words), ("code", code.replace("{path}", ascii(path)))))
    ]
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return {"cells": said, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}
