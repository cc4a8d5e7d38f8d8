"""`gradlens inspect`: the contents of a run or a sweep."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gradlens.cli.options import AsJson, Folder, TrustCode, import_from_here
from gradlens.cli.output import ends_in, say, say_json
from gradlens.errors import InputError

if TYPE_CHECKING:
    from gradlens import ModelSpec, Run, Sweep

PICTURES = (".png", ".svg", ".pdf")


def inspect(
    run: Folder,
    as_json: AsJson = False,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Plot how many samples of each label every client holds: .png, .svg, .pdf."),
    ] = None,
    trust_code: TrustCode = False,
) -> None:
    """Shows the contents of a run or a sweep."""
    import gradlens

    if plot is not None:
        ends_in(plot, PICTURES, "--plot")
    result = gradlens.open(run)
    if plot is not None:
        _draw_labels(result, plot, trust_code)
    facts = _sweep_facts(result) if isinstance(result, gradlens.Sweep) else _run_facts(result)
    if as_json:
        say_json(facts)
    else:
        say(*(f"{name:<14} {_line(value)}" for name, value in facts.items()))


def _draw_labels(run: "Run | Sweep", path: Path, trust_code: bool) -> None:
    """Plots how many samples of each label every client of a simulated run holds."""
    from io import BytesIO

    from matplotlib.figure import Figure

    from gradlens import Sweep
    from gradlens.log.files import replace_with
    from gradlens.names import nothing_imported
    from gradlens.plots import label_counts

    if isinstance(run, Sweep):
        raise InputError(f"--plot: it draws one run; name the folder of a run of the sweep {run.path}")
    if not run.scenario:
        raise InputError(f"--plot: {run.path} was recorded elsewhere, so what its clients hold is not known")
    import simulations

    if trust_code:
        import_from_here()
    with nothing_imported(refuse=not trust_code):
        table = simulations.label_counts(simulations.Scenario(**run.scenario))
    clients = min(table["client"].nunique(), 40)
    figure, picture = Figure(figsize=(7, 1.5 + 0.22 * clients), layout="constrained"), BytesIO()
    label_counts(table, ax=figure.subplots())
    figure.savefig(picture, format=path.suffix[1:].lower(), dpi=150)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_with(path, picture.getvalue())


def _run_facts(run: "Run") -> dict[str, Any]:
    last = {} if run.metrics.empty else run.metrics.iloc[-1].drop("round").dropna().to_dict()
    refused = {client: reason for round_ in run.log for client, reason in round_.refused.items()}
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
        "final layer": _final_layer(run.model),
        "last round": {name: round(value, 4) for name, value in last.items()},
        "truth": run.has_truth,
        "scenario": run.scenario,
        "head": run.head,
    }


def _final_layer(model: "ModelSpec") -> str:
    """The final layer, why it is taken as such, and how certain that is."""
    found = model.found_final_layer
    names = ", ".join(name for name in (model.final_weight, model.final_bias) if name)
    if (found.weight, found.bias) == (model.final_weight, model.final_bias):
        return f"{names or 'none'} ({found.certainty}: {found.why})"
    return f"{names or 'none'} (as recorded)"


def _sweep_facts(sweep: "Sweep") -> dict[str, Any]:
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
        return ", ".join(f"{name}: {entry}" for name, entry in value.items()) or "-"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "-"
    return str(value) if value not in ("", None) else "-"
