"""The command `gradlens`: every answer of the library from a shell.

Exit status 0 is success, 1 a `verify` that found a fault, 2 bad input, which is one line on standard error, 130 and
143 an interruption by Ctrl-C and by SIGTERM.
"""

import json
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import repeat
from pathlib import Path
from typing import Annotated, Any, NoReturn

import pandas as pd
import typer
from tqdm import tqdm

import gradlens
from gradlens.detectors import DETECTORS, USUAL, Detector
from gradlens.errors import InputError
from gradlens.log.manifest import Verification
from gradlens.processes import processes
from gradlens.replays import rule_named

app = typer.Typer(
    help="Finds the clients that poison a federated model, and shows where they gave themselves away.",
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
PICTURES = (".png", ".svg", ".pdf")
UsageFault: type[Exception] = typer.BadParameter.__mro__[2]  # the parent of everything wrong on a command line

Folder = Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run or of a sweep.", show_default=False)]
AsJson = Annotated[bool, typer.Option("--json", help="Write the answer as JSON.")]
AsCsv = Annotated[bool, typer.Option("--csv", help="Write the whole table as CSV.")]
Workers = Annotated[int, typer.Option("--workers", "-w", min=1, help="Processes to run in.")]
OnWhat = Annotated[
    str,
    typer.Option(
        "--executor",
        metavar="processes|ADDRESS",
        help="Where a sweep runs; ADDRESS is a Dask scheduler, tcp://HOST:PORT.",
    ),
]
Named = Annotated[
    list[str] | None,
    typer.Option(
        "--detector",
        "-d",
        help=f"A detector by name, or all; repeat for several. Without it: {', '.join(USUAL)}.",
        show_default=False,
    ),
]


class Stopped(BaseException):
    """A signal came that ends the command, its number with it; no KeyboardInterrupt, which typer keeps for itself.

    left: what is left of the work.
    """

    left = "what was finished is kept, and the same command goes on from there"


def main() -> None:
    """Runs the command line; what went wrong is one line on standard error."""
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.append(here)  # last, for the user's own tasks: nothing there hides a library
    try:
        with _stoppable():
            status = app(standalone_mode=False)
    except InputError as error:
        status = _fail(str(error))
    except UsageFault as error:
        status = _fail(str(error.format_message()), " (gradlens --help shows what there is)")  # type: ignore[attr-defined]
    except Stopped as error:
        _fail(f"interrupted; {error.left}")
        status = 128 + error.args[0]
    except BrokenPipeError:  # the reader of our output has seen enough
        sys.stderr.close()
        status = 0
    sys.exit(status if isinstance(status, int) else 0)


@app.command(epilog="Example: gradlens demo --workers 2")
def demo(
    folder: Annotated[Path, typer.Option("--runs", help="Where the runs go.")] = Path("runs/demo"),
    out: Annotated[Path, typer.Option("--out", "-o", help="The report.")] = Path("reports/demo.html"),
    workers: Workers = 2,
) -> None:
    """Simulates a sweep of attacks on scikit-learn's digits, analyses it and writes a report."""
    import simulations

    sweep = _simulated(Path(simulations.__file__).parent / "scenarios" / "demo.toml", folder, workers, {})
    path = _reported(sweep, out, workers)
    typer.echo(_summary(sweep))
    typer.echo(f"\nreport: {path}")


@app.command(epilog="Example: gradlens simulate scenario.toml -o runs/first --set seed=3 --set rounds=10")
def simulate(
    scenario: Annotated[Path, typer.Argument(help="A TOML file of one scenario or of a sweep.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder of the run or sweep.", show_default=False)],
    workers: Annotated[
        int, typer.Option("--workers", "-w", min=1, help="Processes of a sweep, or threads of a single run.")
    ] = 2,
    executor: OnWhat = "processes",
    changes: Annotated[
        list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="Replace a setting or an axis; repeatable.")
    ] = None,
) -> None:
    """Simulates a scenario, or every scenario of a sweep; a second call runs only what is missing."""
    sweep = _simulated(scenario, out, workers, dict(_change(text) for text in changes or []), executor)
    typer.echo(_summary(sweep) if isinstance(sweep, gradlens.Sweep) else f"run: {sweep.path}, head {sweep.head}")


@app.command(epilog="Example: gradlens inspect runs/demo/0a1b2c3d4e5f")
def inspect(
    run: Folder,
    as_json: AsJson = False,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Draw how many samples of each label every client holds: .png, .svg, .pdf."),
    ] = None,
) -> None:
    """Says what a run or a sweep holds."""
    found = gradlens.open(run)
    if plot is not None:
        _plotted(found, plot)
    facts = _sweep_facts(found) if isinstance(found, gradlens.Sweep) else _run_facts(found)
    if as_json:
        typer.echo(json.dumps(facts, indent=1, default=str))
    else:
        typer.echo("\n".join(f"{name:<14} {_line(value)}" for name, value in facts.items()))


@app.command(epilog="Example: gradlens detect runs/demo/0a1b2c3d4e5f -d final_bias -d layer_norms --csv")
def detect(
    run: Folder,
    detector: Named = None,
    fpr: Annotated[
        float | None, typer.Option(help="Calibrate on each cohort itself to this nominal false-positive rate.")
    ] = None,
    workers: Workers = 1,
    executor: OnWhat = "processes",
    as_csv: AsCsv = False,
    as_json: AsJson = False,
) -> None:
    """Scores every client in every round, and says who was flagged how often."""
    names = _names(detector)
    _detectors(names, fpr)  # what is wrong with them is said before any work
    runs = _runs(run)
    with _sharing(executor, min(workers, len(runs)), several=len(runs) > 1) as pool:
        done = (pool.map if pool else map)(_detected, [each.path for each in runs], repeat(names), repeat(fpr))
        tables = list(tqdm(done, "detect", len(runs), unit="run", disable=None, leave=False))
    table = pd.concat(tables, ignore_index=True)
    table = table[["run", *(c for c in table.columns if c != "run")]] if len(tables) > 1 else table.drop(columns="run")
    _write(table, as_csv, as_json, lambda: _flagged(table))


@app.command(epilog="Example: gradlens localize runs/demo --csv > localized.csv")
def localize(
    run: Folder,
    suspects: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES|CSV",
            help="Whom to tell from the others instead of the truth: clients, with commas between, or the flags in "
            "what `gradlens detect RUN -d NAME --csv` wrote.",
            show_default=False,
        ),
    ] = None,
    workers: Workers = 1,
    executor: OnWhat = "processes",
    as_csv: AsCsv = False,
    as_json: AsJson = False,
) -> None:
    """Ranks layers, units and classes by how well they tell poisoned updates, or those of suspects, from the others."""
    from gradlens.localization import localize_sweep

    found = gradlens.open(run)
    several = isinstance(found, gradlens.Sweep)
    with _sharing(executor, workers if several else 1, several=several) as pool:
        if not isinstance(found, gradlens.Sweep):
            who = None if suspects is None else _suspects(suspects, found)
            table = gradlens.localize(found, control=_control_of(found), suspects=who)
        elif suspects is None:
            table = localize_sweep(found, executor=pool, progress=True)
        else:
            raise InputError(f"--suspects: they are those of one run; name the folder of a run of the sweep {run}")
    table = table.sort_values("auc", ascending=False, kind="stable", ignore_index=True)
    _write(table, as_csv, as_json, lambda: _ranked(table))


@app.command(epilog="Example: gradlens report runs/demo -o reports/demo.html")
def report(
    run: Folder,
    out: Annotated[Path, typer.Option("--out", "-o", help="The HTML file.", show_default=False)],
    workers: Workers = 2,
) -> None:
    """Writes what was found as one self-contained HTML file."""
    typer.echo(f"report: {_reported(gradlens.open(run), out, workers)}")


@app.command(epilog="Example: gradlens ingest checkpoints -o runs/first --pattern 'round_{round}/client_{client}'")
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
            help="Likewise the model that a round started from: global_{round}; of a table, a file of the first one.",
        ),
    ] = None,
    after: Annotated[bool, typer.Option("--globals-after", help="--globals are what came of a round.")] = False,
    updates: Annotated[bool, typer.Option("--updates", help="The files hold updates, not local models.")] = False,
    final_layer: Annotated[
        str | None, typer.Option(metavar="LAYER", help="The weight of the model's last layer, where it is not found.")
    ] = None,
    buffers: Annotated[
        str | None, typer.Option(metavar="LAYERS", help="Layers that are not trained, with commas between.")
    ] = None,
    num_examples: Annotated[
        Path | None,
        typer.Option(
            metavar="CSV", help="What updates rest on: client, num_examples, and round where it varies. [default: 1]"
        ),
    ] = None,
    truth: Annotated[
        Path | None,
        typer.Option(
            metavar="CSV", help="Who was malicious: client, and round, compromised, poisoned where it varies."
        ),
    ] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Stop at the first file that is not as it should be.")
    ] = False,
    evidence: Annotated[
        str,
        typer.Option(metavar="LEVEL", help="What of each update is recorded: full, or sketch, 512 numbers a layer."),
    ] = "full",
    as_json: AsJson = False,
) -> None:
    """Records updates from elsewhere as a run; what cannot be recorded is refused with a reason. Unpickles nothing."""
    from gradlens.ingestion import ingest, with_csv_truth

    if out is None:
        if truth is None:
            raise InputError("ingest: -o RUN names the new run, or --truth CSV what is known about one that is there")
        run = with_csv_truth(source, truth)
        typer.echo(f"run: {run.path}, {int(run.truth['poisoned'].sum())} poisoned updates, head {run.head}")
        return
    names = [name.strip() for name in (buffers or "").split(",") if name.strip()]
    try:
        done = ingest(
            source, out, pattern=pattern, global_models=global_models, after=after, updates=updates,
            final_layer=final_layer, buffers=names, num_examples=num_examples, truth=truth, strict=strict,
            evidence=evidence,
            progress=True,
        )  # fmt: skip
    except Stopped as stopped:
        stopped.left = "nothing is left of the run"
        raise
    if as_json:
        facts = {"run": str(done.run.path), "head": done.run.head, "notes": done.notes, "faults": done.faults}
        typer.echo(json.dumps(facts, indent=1))
        return
    lines = [
        *done.faults[:40],
        *([f"... and {len(done.faults) - 40} more; --json lists all"] if done.faults[40:] else []),
    ]
    lines += [f"note: {note}" for note in done.notes]
    log = done.run.log
    lines.append(f"run: {done.run.path}, {len(log)} rounds, {sum(map(len, log))} updates, head {done.run.head}")
    typer.echo("\n".join(lines))


@app.command(epilog="Example: gradlens replay runs/demo/RUN -d panel --clean-rounds 10 --fpr 0.02")
def replay(
    run: Folder,
    detector: Annotated[str | None, typer.Option("--detector", "-d", help="The filter's; without it: none.")] = None,
    aggregator: Annotated[str, typer.Option("--aggregator", "-a", help="The rule, by name.")] = "mean",
    action: Annotated[str, typer.Option(help="What becomes of a flagged client.")] = "drop",
    clean_rounds: Annotated[int, typer.Option(min=0, help="First rounds that the filter is calibrated on.")] = 0,
    fpr: Annotated[float, typer.Option(help="The rate that it is calibrated to.")] = 0.05,
    as_csv: AsCsv = False,
    as_json: AsJson = False,
) -> None:
    """Aggregates recorded updates anew by another rule or filter: what the server would have made of this evidence."""
    rule = rule_named(aggregator, detector, action=action, clean_rounds=clean_rounds, fpr=fpr)
    found = gradlens.Run.open(run)
    told = gradlens.replay(found, rule, measure=_measure(found))
    _write(told.rounds, as_csv, as_json, lambda: str(told))


@app.command(epilog="Example: gradlens verify runs/demo/0a1b2c3d4e5f --head 5d41402a...")
def verify(
    run: Folder,
    head: Annotated[str | None, typer.Option(help="The head that was noted when the run was recorded.")] = None,
    as_json: AsJson = False,
) -> None:
    """Checks every committed byte of a run (of each run of a sweep) against its chain of hashes."""
    found = _verified(run, head)
    if as_json:
        typer.echo(json.dumps({name: {**vars(each), "intact": each.intact} for name, each in found.items()}, indent=1))
    else:
        for name, each in found.items():
            typer.echo(_verdict_line(name, each))
    if not all(each.intact for each in found.values()):
        raise typer.Exit(1)


@contextmanager
def _stoppable() -> Iterator[None]:
    """Within, Ctrl-C and SIGTERM are one exception: files are let go of, and worker processes end."""

    def stop(number: int, _: object) -> NoReturn:
        raise Stopped(number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _fail(message: str, hint: str = "") -> int:
    print(f"gradlens: {' '.join(message.split())}{hint}", file=sys.stderr)
    return 2


def _simulated(
    toml: Path, out: Path, workers: int, changes: Mapping[str, Any], executor: str = "processes"
) -> gradlens.Run | gradlens.Sweep:
    from simulations import load_sweep, run, run_sweep

    scenarios, axes = load_sweep(toml, **changes)
    _check(executor)
    if executor != "processes":
        if len(scenarios) == 1:
            raise InputError(f"--executor: it shares out the runs of a sweep, {toml} is a single scenario")
        with _sharing(executor, workers, several=True) as pool:
            return run_sweep(scenarios, out, axes=axes, executor=pool)
    if len(scenarios) == 1:
        return run(scenarios[0], out, workers=workers, progress=True)
    return run_sweep(scenarios, out, axes=axes, workers=workers)


def _sharing(executor: str, workers: int, *, several: bool) -> AbstractContextManager[Executor | None]:
    """What the runs of a sweep are shared out by; None for this process."""
    _check(executor)
    if executor == "processes":
        return processes(workers) if workers > 1 else nullcontext()
    if not several:
        raise InputError("--executor: it shares out the runs of a sweep, this is a single run")
    from simulations.sweeps import dask_executor

    return dask_executor(executor)


def _check(executor: str) -> None:
    if executor != "processes" and "://" not in executor:
        raise InputError(f"--executor: expected processes, or tcp://HOST:PORT of a Dask scheduler, found {executor!r}")


def _detected(path: Path, names: Sequence[str], fpr: float | None) -> pd.DataFrame:
    """What `detect` says of one run, wherever it is asked."""
    run = gradlens.Run.open(path)
    return gradlens.detect(run, _detectors(names, fpr)).assign(run=run.name)


def _reported(found: gradlens.Run | gradlens.Sweep, out: Path, workers: int) -> Path:
    if workers == 1 or isinstance(found, gradlens.Run):
        return gradlens.report(found, out, progress=True)
    with processes(workers) as executor:
        return gradlens.report(found, out, executor=executor, progress=True)


def _plotted(run: gradlens.Run | gradlens.Sweep, path: Path) -> None:
    """Draws how many samples of each label every client of a simulated run holds."""
    from io import BytesIO

    from matplotlib.figure import Figure

    from gradlens.log.files import replace_with
    from gradlens.plots import label_counts

    if isinstance(run, gradlens.Sweep):
        raise InputError(f"--plot: it draws one run; name the folder of a run of the sweep {run.path}")
    if not run.scenario:
        raise InputError(f"--plot: {run.path} was recorded elsewhere, so what its clients hold is not known")
    if path.suffix not in PICTURES:
        raise InputError(f"--plot: expected a file that ends in {', '.join(PICTURES)}, found {path}")
    from simulations import Scenario
    from simulations.federated import label_counts as counted

    table = counted(Scenario(**run.scenario))
    clients = min(table["client"].nunique(), 40)
    figure, picture = Figure(figsize=(7, 1.5 + 0.22 * clients), layout="constrained"), BytesIO()
    label_counts(table, ax=figure.subplots())
    figure.savefig(picture, format=path.suffix[1:], dpi=150)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_with(path, picture.getvalue())


def _change(text: str) -> tuple[str, Any]:
    """`name=value`, the value as in TOML, or a bare word."""
    import tomllib

    name, equals, value = text.partition("=")
    if not equals or not name:
        raise InputError(f"--set: expected NAME=VALUE, found {text!r}")
    try:
        return name, tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return name, value


def _runs(path: Path) -> list[gradlens.Run]:
    found = gradlens.open(path)
    return found.runs if isinstance(found, gradlens.Sweep) else [found]


def _names(asked: Sequence[str] | None) -> list[str]:
    """The detectors asked for, each once."""
    for name in asked or []:
        if name not in DETECTORS and name != "all":
            raise InputError(f"--detector: expected all or one of {', '.join(DETECTORS)}, found {name!r}")
    return list(DETECTORS if "all" in (asked or []) else dict.fromkeys(asked or USUAL))


def _detectors(names: Sequence[str], fpr: float | None) -> dict[str, Detector]:
    built = {name: DETECTORS[name]() for name in names}
    return built if fpr is None else {name: gradlens.calibrate(each, None, fpr) for name, each in built.items()}


def _measure(run: gradlens.Run) -> Callable[[Any], dict[str, float]] | None:
    """What measures the global models of a simulated run, where its data are at hand."""
    if not run.scenario:
        return None
    from simulations import Scenario
    from simulations.federated import measure_of

    try:
        return measure_of(Scenario(**run.scenario))
    except InputError as error:
        typer.echo(f"gradlens: accuracy and ASR are not measured: {error}", err=True)
        return None


def _suspects(text: str, run: gradlens.Run) -> list[str] | pd.DataFrame:
    """The clients that --suspects names, or the verdicts in its file, those on this run."""
    path = Path(text)
    if not path.is_file():
        return [name for name in (part.strip() for part in text.split(",")) if name]
    try:
        table = pd.read_csv(path, dtype={"client": str, "run": str}, keep_default_na=False)
    except (ValueError, UnicodeDecodeError) as error:
        raise InputError(f"--suspects: {path} is not readable as CSV: {error}") from error
    return table[table["run"].eq(run.name)] if "run" in table else table


def _control_of(run: gradlens.Run) -> gradlens.Run | None:
    """The attack-free control of a run that lies in the folder of its sweep, None if there is none."""
    from gradlens.run import SWEEP

    folder = run.path.resolve().parent
    try:
        return gradlens.Sweep.open(folder).control_of(run.name) if (folder / SWEEP).is_file() else None
    except InputError:  # it is a control itself, or its control has not run yet
        return None


def _ranked(table: pd.DataFrame) -> str:
    """The layers that separate best; of suspects, what the figures mean."""
    whole = table[table["unit"] == ""].drop(columns=["unit", "labels"]).dropna(axis="columns", how="all")
    lines = [whole.head(20).to_string(index=False, float_format=lambda value: f"{value:.4g}")]
    if table["labels"].eq("suspects").any():
        lines.append("by the suspects given, not by the truth: p says that they differ there, not that they are guilty")
    return "\n".join(lines)


def _write(table: pd.DataFrame, as_csv: bool, as_json: bool, short: Callable[[], str]) -> None:
    if as_csv:
        typer.echo(table.to_csv(index=False), nl=False)
    elif as_json:
        typer.echo(table.to_json(orient="records", indent=1))
    else:
        typer.echo(short())


def _flagged(table: pd.DataFrame) -> str:
    """Who was flagged in how many of its rounds, the most suspicious first."""
    answered = table[table["abstained"] == ""]
    keys = [name for name in ("run", "detector", "client") if name in table.columns]
    counts = answered.groupby(keys, sort=False)["flag"].agg(flagged="sum", rounds="count").reset_index()
    top = counts[counts["flagged"] > 0].sort_values("flagged", ascending=False, kind="stable")
    lines = [top.head(40).to_string(index=False) if len(top) else "nobody was flagged"]
    if len(top) > 40:
        lines.append(f"... and {len(top) - 40} more; --csv writes all")
    for reason, rows in table[table["abstained"] != ""].groupby("abstained"):
        lines.append(f"abstained in {rows.groupby(['detector', 'round']).ngroups} verdicts: {reason}")
    lines.append("thresholds are textbook values, not calibrated; --fpr 0.05 sets them by each cohort itself")
    return "\n".join(lines)


def _run_facts(run: gradlens.Run) -> dict[str, Any]:
    last = {} if run.metrics.empty else run.metrics.iloc[-1].drop("round").dropna().to_dict()
    refused = {client: why for round_ in run.log for client, why in round_.refused.items()}
    return {
        "run": str(run.path),
        "rounds": len(run.log),
        "state": "closed" if run.is_closed else "open",
        "in flight": run.in_flight,
        "clients": len({client for round_ in run.log for client in round_.clients}),
        "refused": refused,
        "evidence": run.evidence.settings,
        "parameters": run.model.num_parameters,
        "layers": {layer.name: f"{list(layer.shape)} {layer.kind}" for layer in run.model.layers},
        "final bias": run.model.final_bias,
        "last round": {name: round(value, 4) for name, value in last.items()},
        "truth": run.has_truth,
        "scenario": run.scenario,
        "head": run.head,
    }


def _sweep_facts(sweep: gradlens.Sweep) -> dict[str, Any]:
    varied = {axis: list(dict.fromkeys(sweep.settings[axis])) for axis in sweep.axes}
    return {
        "sweep": str(sweep.path),
        "runs": len(sweep.runs),
        "controls": int(sweep.settings["control"].sum()),
        "open": [run.name for run in sweep.runs if not run.is_closed],
        "varied": varied,
    }


def _line(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name}: {each}" for name, each in value.items()) or "-"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "-"
    return str(value) if value not in ("", None) else "-"


def _summary(sweep: gradlens.Run | gradlens.Sweep) -> str:
    """What came of each condition of a sweep: main accuracy and ASR at the end, its control's beside it."""
    from gradlens.reporting.analysis import attack_table

    assert isinstance(sweep, gradlens.Sweep)
    return attack_table(sweep).to_string(index=False, float_format=lambda value: f"{value:.2f}")


def _verified(path: Path, head: str | None) -> dict[str, Verification]:
    from gradlens.log import verify as verify_run
    from gradlens.run import SWEEP

    if not (path / SWEEP).is_file():
        return {str(path): verify_run(path, head)}
    if head is not None:
        raise InputError("--head belongs to one run; name the folder of the run, not of its sweep")
    folders = sorted(manifest.parent for manifest in path.glob("*/manifest.jsonl"))
    return {str(folder): verify_run(folder) for folder in tqdm(folders, desc="verify", disable=None, leave=False)}


def _verdict_line(name: str, found: Verification) -> str:
    state = f"{found.rounds} rounds, {'closed' if found.closed else 'open'}, head {found.head}"
    flight = f"\n  {found.in_flight}" if found.in_flight else ""
    faults = "".join(f"\n  {fault}" for fault in found.faults)
    return f"{name}: {'intact' if found.intact else 'NOT INTACT'}, {state}{flight}{faults}"
