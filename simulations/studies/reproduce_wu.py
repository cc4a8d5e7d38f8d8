"""Wu et al. 2020, reproduced: what pruning, extreme weights and fine-tuning leave of a backdoor in a converged model.

The paper's figures are those of its abstracts (arXiv:2011.01767 and ICDCS 2022); its models and deltas were not found.
Steps are those of the study of pruning, and every layer's extreme weights are set to 0 apart, too.
"""

from collections.abc import Iterator
from typing import Any

import pandas as pd

from gradlens import mitigation
from gradlens.evaluation import mean_interval
from gradlens.run import Run
from gradlens.words import with_interval
from simulations import Scenario
from simulations.assemble import assemble
from simulations.studies.pruning_steps import (
    ADJUSTMENT,
    BOTH,
    COLUMNS,
    DELTAS,
    NOTHING,
    PAIR,
    PRUNING,
    TUNED,
    TUNED_ALONE,
    Case,
)
from simulations.studies.results import Finding, markdown, over_seeds
from simulations.training import one_thread

ASR, LEFT, LOST = 0.997, 0.019, 5.5  # before, and after both steps, with the points of accuracy lost
TUNED_LEFT, TUNED_LOST = 0.064, 1.7  # with fine-tuning after pruning
DEVIATION = "another model, which the server has trained before; a bar of five pixels"
SHOWN = (NOTHING, PRUNING, ADJUSTMENT, BOTH, TUNED_ALONE, TUNED)
MEASURES = [name for name in COLUMNS if name not in (*PAIR, "control")] + ["layer"]


def measured(run: Run, scenario: Scenario) -> pd.DataFrame:
    """Takes every step on the last global model of a run.

    Parameters
    ----------
    run : Run
        The recording.
    scenario : Scenario
        The attacked scenario that it is, or is the control of.

    Returns
    -------
    DataFrame
        The rows of the study of pruning (`pruning_steps.parts_of`), and of part "layers": every delta on each layer by
        itself (column layer).
    """
    is_control = run.scenario["num_malicious"] == 0
    with one_thread():
        case = Case.of(assemble(scenario), run, is_control=is_control)
        lies = () if is_control else case.lies()
        rows = [*case.steps(), *lies, *case.curves(), *_layers(case)]
    return pd.DataFrame(rows, columns=MEASURES)


def _layers(case: Case) -> Iterator[dict[str, Any]]:
    """Every delta on each layer of weights by itself."""
    model = case.start.model
    names = [name.removesuffix(".weight") for name, weight in model.named_parameters() if weight.dim() > 1]
    for layer in names:
        for delta in DELTAS:
            changed = mitigation.without_extreme_weights(model, delta, [layer])
            yield {"part": "layers", "step": ADJUSTMENT, "layer": layer, "value": delta} | dict(
                case.start.measure(changed)
            )


def findings(table: pd.DataFrame) -> list[Finding]:
    """What the steps leave, beside the paper's figures.

    Parameters
    ----------
    table : DataFrame
        Rows of `measured`, with the columns of `reproduce.computed`.
    """
    if not len(table):
        return []
    steps = _steps(table[~table["control"]])
    lowest = _lowest(table[~table["control"]])
    before = (f"{ASR:.3f}", _figure(steps, NOTHING, "asr"))
    return [
        Finding("ASR before any step", *before, DEVIATION),
        Finding("ASR of the control's model", "–", _figure(_steps(table[table["control"]]), NOTHING, "asr"), DEVIATION),
        Finding("main accuracy before any step", "–", _figure(steps, NOTHING, "main_accuracy"), DEVIATION),
        Finding("ASR after pruning and extreme weights", f"{LEFT:.3f}", _figure(steps, BOTH, "asr"), DEVIATION),
        Finding("points of accuracy lost by both", f"{LOST:g}", _points(steps, BOTH), DEVIATION),
        Finding("ASR after fine-tuning, too", f"{TUNED_LEFT:.3f}", _figure(steps, TUNED, "asr"), DEVIATION),
        Finding("points lost then", f"{TUNED_LOST:g}", _points(steps, TUNED), DEVIATION),
        Finding(f"lowest ASR of any step at {LOST:g} points or less", f"{LEFT:.3f}", lowest, DEVIATION),
    ]


def text(table: pd.DataFrame) -> str:
    """Each step, then each layer by itself.

    Parameters
    ----------
    table : DataFrame
        As of `findings`.
    """
    if not len(table):
        return "Not run yet."
    attacked, control = (_steps(table[table["control"].eq(is_control)]) for is_control in (False, True))
    rows = [
        [
            step,
            _figure(attacked, step, "asr"),
            _figure(attacked, step, "main_accuracy"),
            _figure(control, step, "main_accuracy"),
        ]
        for step in SHOWN
    ]
    columns = ["step, by ranks", "ASR", "main accuracy", "main accuracy, control"]
    return "\n\n".join([markdown(columns, rows), _which_layer(table[~table["control"]])])


def _which_layer(table: pd.DataFrame) -> str:
    """Which layer's extreme weights carry the backdoor: the lowest ASR at the price of the paper, layer by layer."""
    layers = table[table["part"].eq("layers")]
    figures = {
        str(layer): _lowest(pd.concat([_steps(table), part])) for layer, part in layers.groupby("layer", sort=False)
    }
    listed = ", ".join(f"`{layer}` {figure}" for layer, figure in figures.items())
    return (
        f"Setting the extreme weights of one layer to 0, at {LOST:g} points of accuracy or less, leaves an ASR of: "
        f"{listed}."
    )


def _steps(table: pd.DataFrame) -> pd.DataFrame:
    return table[table["part"].eq("steps") & table["how"].fillna("ranks").eq("ranks")]


def _figure(rows: pd.DataFrame, step: str, column: str) -> str:
    return over_seeds(rows[rows["step"].eq(step)], column)


def _points(rows: pd.DataFrame, step: str) -> str:
    """Points of accuracy that a step costs."""
    accuracy = rows.pivot_table(index="seed", columns="step", values="main_accuracy")
    lost = 100 * (accuracy[NOTHING] - accuracy[step])
    return with_interval(float(lost.mean()), *mean_interval(lost))


def _lowest(rows: pd.DataFrame) -> str:
    """The lowest ASR at the paper's price, seed by seed."""
    before = rows[rows["part"].eq("steps") & rows["step"].eq(NOTHING)].groupby("seed")["main_accuracy"].mean()
    cheap = rows[100 * (rows["seed"].map(before) - rows["main_accuracy"]) <= LOST]
    lowest = cheap.groupby("seed")["asr"].min()
    return with_interval(float(lowest.mean()), *mean_interval(lowest, 0, 1))
