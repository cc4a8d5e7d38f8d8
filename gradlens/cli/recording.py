"""`gradlens ingest` and `gradlens replay`: runs from elsewhere, and recorded updates aggregated anew."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gradlens.cli.interruption import Stopped
from gradlens.cli.options import AsCsv, AsJson, Folder, TrustCode, import_from_here
from gradlens.cli.output import one_format, safe, say, say_json, write
from gradlens.errors import InputError

if TYPE_CHECKING:
    from gradlens import Run
    from gradlens.ingestion import Ingested

SHOWN_FAULTS = 40


def ingest(
    source: Annotated[
        Path,
        typer.Argument(
            help="A folder with a .pt, .pth, .npz or .safetensors file per round and client, or an Arrow or Parquet "
            "table; with --truth and without --out, a run.",
            show_default=False,
        ),
    ],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="The folder of the run.", show_default=False)] = None,
    pattern: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="How the clients' files are called, such as round_{round}/client_{client}."),
    ] = None,
    global_models: Annotated[
        str | None,
        typer.Option(
            "--globals",
            metavar="NAME",
            help="How the global models before each round are called, such as global_{round}; for a table, the file of "
            "the first one.",
        ),
    ] = None,
    after: Annotated[bool, typer.Option("--globals-after", help="--globals are the models after each round.")] = False,
    updates: Annotated[bool, typer.Option("--updates", help="The files hold updates, not local models.")] = False,
    final_layer: Annotated[
        str | None,
        typer.Option(metavar="LAYER", help="The weight of the model's final layer, where it is not recognized."),
    ] = None,
    buffers: Annotated[
        str | None, typer.Option(metavar="LAYERS", help="Layers that are not trained, separated by commas.")
    ] = None,
    num_examples: Annotated[
        Path | None,
        typer.Option(
            metavar="CSV",
            help="Numbers of examples: columns client, num_examples, and round where they vary. [default: 1]",
        ),
    ] = None,
    truth: Annotated[
        Path | None,
        typer.Option(
            metavar="CSV", help="Who was malicious: columns client, and round, compromised, poisoned where they vary."
        ),
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Stop at the first file with a fault.")] = False,
    evidence: Annotated[
        str,
        typer.Option(metavar="LEVEL", help="What of each update is recorded: full, or sketch (512 numbers a layer)."),
    ] = "full",
    as_json: AsJson = False,
) -> None:
    """Records updates from elsewhere as a run; what cannot be recorded is refused with a reason. Unpickles nothing."""
    from gradlens.ingestion import ingest as record
    from gradlens.ingestion import with_csv_truth

    if out is None:
        if truth is None:
            raise InputError("ingest: -o RUN names the new run, or --truth CSV the ground truth of an existing one")
        run = with_csv_truth(source, truth)
        say(f"run: {run.path}, {int(run.truth['poisoned'].sum())} poisoned updates, head {run.head}")
        return
    names = [name.strip() for name in (buffers or "").split(",") if name.strip()]
    try:
        result = record(
            source, out, pattern=pattern, global_models=global_models, after=after, updates=updates,
            final_layer=final_layer, buffers=names, num_examples=num_examples, truth=truth, strict=strict,
            evidence=evidence, progress=True,
        )  # fmt: skip
    except Stopped as stopped:
        stopped.left = "nothing is left of the run"
        raise
    if as_json:
        run = result.run
        say_json({"run": str(run.path), "head": run.head, "notes": result.notes, "faults": result.faults})
    else:
        say(*_ingested_lines(result))


def replay(
    run: Folder,
    detector: Annotated[
        str | None, typer.Option("--detector", "-d", help="The filter's detector; without it there is no filter.")
    ] = None,
    aggregator: Annotated[str, typer.Option("--aggregator", "-a", help="The aggregation rule.")] = "mean",
    action: Annotated[str, typer.Option(help="What becomes of a flagged client's update.")] = "drop",
    clean_rounds: Annotated[int, typer.Option(min=0, help="Number of first rounds that calibrate the filter.")] = 0,
    fpr: Annotated[float, typer.Option(help="The false-positive rate per update that it is calibrated to.")] = 0.05,
    trust_code: TrustCode = False,
    as_csv: AsCsv = False,
    as_json: AsJson = False,
) -> None:
    """Aggregates recorded updates anew by another rule or filter: what the server would have made of this evidence."""
    import gradlens
    from gradlens.names import nothing_imported
    from gradlens.replays import rule_named

    one_format(as_csv, as_json)
    import_from_here([detector or "", aggregator, *([":"] if trust_code else [])])
    rule = rule_named(aggregator, detector, action=action, clean_rounds=clean_rounds, fpr=fpr)
    recorded = gradlens.Run.open(run)
    with nothing_imported(refuse=not trust_code):
        result = gradlens.replay(recorded, rule, measure=_measure(recorded))
    write(result.rounds, as_csv, as_json, lambda: str(result).splitlines())


def _ingested_lines(result: "Ingested") -> list[str]:
    faults, log = result.faults, result.run.log
    lines = [*faults[:SHOWN_FAULTS]]
    if len(faults) > SHOWN_FAULTS:
        lines.append(f"... and {len(faults) - SHOWN_FAULTS} more; --json lists all")
    lines += [f"note: {note}" for note in result.notes]
    lines.append(f"run: {result.run.path}, {len(log)} rounds, {sum(map(len, log))} updates, head {result.run.head}")
    return lines


def _measure(run: "Run") -> Callable[[Any], dict[str, float]] | None:
    """What measures the global models of a simulated run, where its data and torch are at hand."""
    if not run.scenario:
        return None
    try:
        from simulations import Scenario
        from simulations.federated import measure_of

        return measure_of(Scenario(**run.scenario))
    except (InputError, ModuleNotFoundError) as error:
        print(f"gradlens: accuracy and ASR are not measured: {safe(str(error))}", file=sys.stderr)
        return None
