"""`gradlens ingest`: turns updates that were saved elsewhere into a run."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gradlens.cli.options import AsJson
from gradlens.cli.output import say, say_json
from gradlens.errors import InputError, Stopped

if TYPE_CHECKING:
    from gradlens.ingestion import Ingested

SHOWN_FAULTS = 40

Source = Annotated[
    Path,
    typer.Argument(
        help="A folder with one .pt, .pth, .bin, .ckpt, .npz or .safetensors file per round and client, or an Arrow or "
        "Parquet table; with --truth but without --out, an existing run.",
        show_default=False,
    ),
]
RunFolder = Annotated[Path | None, typer.Option("--out", "-o", help="The folder of the new run.", show_default=False)]
Pattern = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="Naming pattern of the clients' files, such as round_{round}/client_{client}."),
]
Globals = Annotated[
    str | None,
    typer.Option(
        "--globals",
        metavar="NAME",
        help="Naming pattern of the files of the global models before each round, such as global_{round}; for a table, "
        "the file of the first global model.",
    ),
]
After = Annotated[
    bool, typer.Option("--globals-after", help="--globals names the models after each round, not before it.")
]
HoldUpdates = Annotated[bool, typer.Option("--updates", help="The files hold updates instead of local models.")]
ModelKey = Annotated[
    str | None,
    typer.Option(metavar="ENTRY", help="The entry of a checkpoint that holds the model, if it is not recognized."),
]
FinalLayer = Annotated[
    str | None,
    typer.Option(metavar="LAYER", help="The final layer, by its weight or module, if it is not recognized."),
]
Buffers = Annotated[
    str | None, typer.Option(metavar="LAYERS", help="Names of layers that are not trained, separated by commas.")
]
Layers = Annotated[
    str | None,
    typer.Option(
        metavar="LAYERS", help="The layers that clients send, names or patterns separated by commas. [default: all]"
    ),
]
NumExamples = Annotated[
    Path | None,
    typer.Option(
        metavar="CSV",
        help="Numbers of examples: columns client and num_examples, and round if they vary. [default: 1]",
    ),
]
Truth = Annotated[
    Path | None,
    typer.Option(
        metavar="CSV", help="Who was malicious: column client, and round, compromised and poisoned if they vary."
    ),
]
Strict = Annotated[bool, typer.Option("--strict", help="Stop at the first file that cannot be recorded.")]
Level = Annotated[
    str,
    typer.Option(metavar="LEVEL", help="How much of each update is recorded: full, or sketch (512 numbers per layer)."),
]


def ingest(
    source: Source,
    out: RunFolder = None,
    pattern: Pattern = None,
    global_models: Globals = None,
    after: After = False,
    updates: HoldUpdates = False,
    model_key: ModelKey = None,
    final_layer: FinalLayer = None,
    buffers: Buffers = None,
    layers: Layers = None,
    num_examples: NumExamples = None,
    truth: Truth = None,
    strict: Strict = False,
    evidence: Level = "full",
    as_json: AsJson = False,
) -> None:
    """Records saved updates as a run, and refuses with a reason what cannot be recorded; nothing is unpickled."""
    from gradlens.ingestion import ingest as record
    from gradlens.ingestion import with_csv_truth

    if out is None:
        if truth is None:
            raise InputError("ingest: -o RUN names the new run, or --truth CSV the ground truth of an existing one")
        run = with_csv_truth(source, truth)
        say(f"run: {run.path}, {int(run.truth['poisoned'].sum())} poisoned updates, head {run.head}")
        return
    names = [name.strip() for name in (buffers or "").split(",") if name.strip()]
    part = [name.strip() for name in (layers or "").split(",") if name.strip()] or None
    try:
        result = record(
            source, out, pattern=pattern, global_models=global_models, after=after, updates=updates,
            model_key=model_key, final_layer=final_layer, buffers=names, layers=part, num_examples=num_examples,
            truth=truth, strict=strict, evidence=evidence, progress=True,
        )  # fmt: skip
    except Stopped as stopped:
        stopped.left = "nothing is left of the run"
        raise
    if as_json:
        run = result.run
        say_json(
            {
                "run": str(run.path),
                "head": run.head,
                "taken": result.taken,
                "notes": result.notes,
                "faults": result.faults,
            }
        )
    else:
        say(*_ingested_lines(result))


def _ingested_lines(result: "Ingested") -> list[str]:
    """The first faults, the notes, and what was recorded."""
    faults, log = result.faults, result.run.log
    lines = [*faults[:SHOWN_FAULTS]]
    if len(faults) > SHOWN_FAULTS:
        lines.append(f"... and {len(faults) - SHOWN_FAULTS} more; --json lists all")
    lines += [f"taken: {result.taken}", *(f"note: {note}" for note in result.notes)]
    lines.append(f"run: {result.run.path}, {len(log)} rounds, {sum(map(len, log))} updates, head {result.run.head}")
    return lines
