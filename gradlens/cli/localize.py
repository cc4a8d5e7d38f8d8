"""`gradlens localize`: the layers, units and classes in which poisoned updates differ from benign ones."""

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from gradlens.cli.options import AsCsv, AsJson, ExecutorAddress, Folder, Workers, executor_for
from gradlens.cli.output import cell_text, lines_of, one_format, write
from gradlens.errors import InputError

if TYPE_CHECKING:
    import pandas as pd

    from gradlens import Run


def localize(
    run: Folder,
    suspects: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES|CSV",
            help="Compare these clients with the others instead of poisoned updates: names separated by commas, or a "
            "file written by `gradlens detect RUN -d NAME --csv`, whose flags are used.",
            show_default=False,
        ),
    ] = None,
    workers: Workers = 1,
    executor: ExecutorAddress = "processes",
    as_csv: AsCsv = False,
    as_json: AsJson = False,
) -> None:
    """Ranks layers, units and classes by how well they separate poisoned updates, or those of suspects, from others."""
    import gradlens
    from gradlens.localization import localize_sweep

    one_format(as_csv, as_json)
    opened = gradlens.open(run)
    several = isinstance(opened, gradlens.Sweep)
    with executor_for(executor, workers if several else 1, several=several) as pool:
        if not isinstance(opened, gradlens.Sweep):
            clients = None if suspects is None else _suspects(suspects, opened)
            table = gradlens.localize(opened, control=_control_of(opened), suspects=clients)
        elif suspects is None:
            table = localize_sweep(opened, executor=pool, progress=True)
        else:
            raise InputError(f"--suspects: they are those of one run; name the folder of a run of the sweep {run}")
    table = table.sort_values("auc", ascending=False, kind="stable", ignore_index=True)
    write(table, as_csv, as_json, lambda: _ranking_lines(table))


def _suspects(text: str, run: "Run") -> "list[str] | pd.DataFrame":
    """The clients that --suspects names, or the verdicts on this run in the file that it names."""
    import pandas as pd

    if not os.path.isfile(text):  # a long list of clients is no name of a file
        return [name for name in (part.strip() for part in text.split(",")) if name]
    from gradlens.log.manifest import named_file

    path = named_file(text)
    try:
        table = pd.read_csv(path, dtype={"client": str, "run": str}, keep_default_na=False)
    except (ValueError, UnicodeDecodeError) as error:
        raise InputError(f"--suspects: {path} is not readable as CSV: {error}") from error
    for name in {"client", "run"} & set(table):
        table[name] = table[name].map(cell_text)
    return table[table["run"].eq(run.name)] if "run" in table else table


def _control_of(run: "Run") -> "Run | None":
    """The attack-free control of a run in the folder of a sweep; None if there is none."""
    import gradlens
    from gradlens.run import SWEEP

    folder = run.path.resolve().parent
    try:
        return gradlens.Sweep.open(folder).control_of(run.name) if (folder / SWEEP).is_file() else None
    except InputError:  # it is a control itself, or its control has not run yet
        return None


def _ranking_lines(table: "pd.DataFrame") -> Iterator[str]:
    """Lines with the layers that separate best; for suspects, also what the numbers mean."""
    whole = table[table["unit"] == ""].drop(columns=["unit", "labels"]).dropna(axis="columns", how="all")
    yield from lines_of(whole.head(20))
    if table["labels"].eq("suspects").any():
        yield "by the suspects given, not by the truth: p says that they differ there, not that they are guilty"
