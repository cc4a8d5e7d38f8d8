"""`gradlens replay`: aggregates recorded updates again, by another rule or filter."""

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gradlens.cli.options import AsCsv, AsJson, CleanRounds, Folder, NullRuns, TrustCode, basis_from, import_from_here
from gradlens.cli.output import one_format, safe, write
from gradlens.errors import InputError

if TYPE_CHECKING:
    from gradlens import Run


def replay(
    run: Folder,
    detector: Annotated[
        str | None, typer.Option("--detector", "-d", help="The filter's detector. By default there is no filter.")
    ] = None,
    aggregator: Annotated[str, typer.Option("--aggregator", "-a", help="The aggregation rule.")] = "mean",
    action: Annotated[
        str, typer.Option(help="What happens to the update of a flagged client: drop, down_weight, clip or record.")
    ] = "drop",
    null: NullRuns = None,
    clean_rounds: CleanRounds = 0,
    fpr: Annotated[
        float,
        typer.Option(help="Rate of false positives per update to which --null or --clean-rounds calibrate the filter."),
    ] = 0.05,
    without: Annotated[
        list[str] | None,
        typer.Option(metavar="CLIENT", help="A client that is left out; repeatable.", show_default=False),
    ] = None,
    trust_code: TrustCode = False,
    as_csv: AsCsv = False,
    as_json: AsJson = False,
) -> None:
    """Aggregates recorded updates again by another rule or filter, as if the server had used that one."""
    import gradlens
    from gradlens.names import nothing_imported
    from gradlens.replays import leaving_out, rule_named

    one_format(as_csv, as_json)
    import_from_here([detector or "", aggregator, *([":"] if trust_code else [])])
    basis = basis_from(null or [], clean_rounds)
    if isinstance(basis, list) and detector is None:
        raise InputError("--null: it calibrates the detector of a filter; name one with --detector")
    free = basis if isinstance(basis, list) else ()
    rule = rule_named(aggregator, detector, action=action, clean_rounds=clean_rounds, null=free, fpr=fpr)
    recorded = gradlens.Run.open(run)
    if without:
        known = {client for round_ in recorded.log for client in round_.clients.tolist()}
        if unknown := sorted(set(without) - known):
            raise InputError(f"--without: the run has no client {unknown[0]!r:.80}")
        rule = leaving_out(rule, without)
    with nothing_imported(refuse=not trust_code):
        result = gradlens.replay(recorded, rule, measure=measure_of_run(recorded))
    write(result.rounds, as_csv, as_json, lambda: str(result).splitlines())


def measure_of_run(run: "Run") -> Callable[[Any], dict[str, float]] | None:
    """A function that measures the global models of a simulated run; None where data or torch are missing.

    Parameters
    ----------
    run : Run
        The recording; the reason why its models cannot be measured goes to stderr.

    Examples
    --------
    >>> import tempfile, gradlens
    >>> from gradlens.examples import example_run
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     measure_of_run(gradlens.open(example_run(f"{folder}/run"))) is None
    True
    """
    if not run.scenario:
        return None
    try:
        from simulations import measure_of, stored_scenario

        measure = measure_of(stored_scenario(run, trust_code=True))
        if len(run.log) and run.evidence.level == "full":
            measure(run.log[0].global_model)  # an edited header may name another model than the recorded one
        return measure
    except (InputError, ModuleNotFoundError) as error:
        reason = str(error)
    except (KeyError, RuntimeError, ValueError) as error:
        reason = f"{run.path}: the recorded model is not that of its scenario: {' '.join(str(error).split())}"
    print(f"gradlens: accuracy and ASR are not measured: {safe(reason)}", file=sys.stderr)
    return None
