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
    LIARS,
    NOTHING,
    PAIR,
    PRUNING,
    TUNED,
    TUNED_ALONE,
    Case,
)
from simulations.studies.results import Finding, markdown, over_seeds
from simulations.training import one_thread

ASR, LEFT, LOST = 0.997, 0.019, 5.5  # Fashion-MNIST: before, and after both steps, with the points of accuracy lost
TUNED_LEFT, TUNED_LOST = 0.064, 1.7  # with fine-tuning after pruning
CIFAR10_DROP, CIFAR10_LOST = 70.0, 2.0  # CIFAR-10 under DBA: points of ASR at least, of accuracy at most
DEVIATION = "another model, which the server has trained before; a bar of five pixels"
DBA = "another model, which the server has trained before; ten clients, all in every round"
LIE_WORDS = {"reverse": "in reverse", "shield": "the trigger's channels shielded"}
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


def findings(fashion_mnist: pd.DataFrame, cifar10: pd.DataFrame) -> list[Finding]:
    """What the steps leave, beside the paper's figures.

    Parameters
    ----------
    fashion_mnist, cifar10 : DataFrame
        Rows of `measured`, with the columns of `reproduce.computed`.
    """
    found = []
    if len(fashion_mnist):
        steps, lowest = _steps(fashion_mnist[~fashion_mnist["control"]]), _lowest(fashion_mnist, LOST)
        rows = [
            *_before(fashion_mnist, f"{ASR:.3f}"),
            ("ASR after pruning and extreme weights", f"{LEFT:.3f}", _figure(steps, BOTH, "asr")),
            ("points of accuracy lost by both", f"{LOST:g}", _points(steps, BOTH)),
            ("ASR after fine-tuning, too", f"{TUNED_LEFT:.3f}", _figure(steps, TUNED, "asr")),
            ("points lost then", f"{TUNED_LOST:g}", _points(steps, TUNED)),
            (f"lowest ASR of any step at {LOST:g} points or less", f"{LEFT:.3f}", lowest),
        ]
        found += [Finding(f"Fashion-MNIST: {row[0]}", *row[1:], DEVIATION) for row in rows]
    if len(cifar10):
        steps, price = _steps(cifar10[~cifar10["control"]]), CIFAR10_LOST
        rows = [
            *_before(cifar10, "–"),
            ("points of ASR taken by both steps", f"> {CIFAR10_DROP:g}", _points(steps, BOTH, "asr")),
            ("points of accuracy lost by both", f"< {price:g}", _points(steps, BOTH)),
            (f"lowest ASR of any step at {price:g} points or less", "–", _lowest(cifar10, price)),
        ]
        found += [Finding(f"CIFAR-10, DBA: {row[0]}", *row[1:], DBA) for row in rows]
    return found


def _before(table: pd.DataFrame, paper: str) -> list[tuple[str, str, str]]:
    """The situation before any step."""
    attacked, control = (_steps(table[table["control"].eq(is_control)]) for is_control in (False, True))
    return [
        ("ASR before any step", paper, _figure(attacked, NOTHING, "asr")),
        ("ASR of the control's model", "–", _figure(control, NOTHING, "asr")),
        ("main accuracy before any step", "–", _figure(attacked, NOTHING, "main_accuracy")),
        ("main accuracy of the control's model", "–", _figure(control, NOTHING, "main_accuracy")),
    ]


def text(fashion_mnist: pd.DataFrame, cifar10: pd.DataFrame) -> str:
    """Each step, then each layer by itself, then lies.

    Parameters
    ----------
    fashion_mnist, cifar10 : DataFrame
        As of `findings`.
    """
    named = (("Fashion-MNIST", fashion_mnist, LOST), ("CIFAR-10 under DBA", cifar10, CIFAR10_LOST))
    parts = [part for name, table, price in named if len(table) for part in _text(name, table, price)]
    return "\n\n".join(parts) or "Not run yet."


def _text(name: str, table: pd.DataFrame, price: float) -> list[str]:
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
    columns = [f"{name}: step, by ranks", "ASR", "main accuracy", "main accuracy, control"]
    return [markdown(columns, rows), _which_layer(table, price), _lies(table)]


def _lies(table: pd.DataFrame) -> str:
    """What is left of pruning where some of the ten clients lie about their channels."""
    lies = table[table["part"].eq("lies") & table["step"].eq(BOTH)]
    cells = [
        [f"{how}, {LIE_WORDS[str(lie)]}",
         *(over_seeds(part[part["liars"].eq(count)], "asr") for count in LIARS)]
        for (how, lie), part in lies.groupby(["how", "lie"], sort=False)  # type: ignore[misc]
    ]  # fmt: skip
    return markdown(["ASR after both steps, clients lie", *(f"{count} of 10" for count in LIARS)], cells)


def _which_layer(table: pd.DataFrame, price: float) -> str:
    """Which layer's extreme weights carry the backdoor: the lowest ASR at the price of the paper, layer by layer."""
    layers = table[table["part"].eq("layers")]
    before = table[table["part"].eq("steps")]
    figures = {
        str(layer): _lowest(pd.concat([before, part]), price) for layer, part in layers.groupby("layer", sort=False)
    }
    listed = ", ".join(f"`{layer}` {figure}" for layer, figure in figures.items())
    return (
        f"Setting the extreme weights of one layer to 0, at {price:g} points of accuracy or less, leaves an ASR of: "
        f"{listed}."
    )


def _steps(table: pd.DataFrame) -> pd.DataFrame:
    return table[table["part"].eq("steps") & table["how"].fillna("ranks").eq("ranks")]


def _figure(rows: pd.DataFrame, step: str, column: str) -> str:
    return over_seeds(rows[rows["step"].eq(step)], column)


def _points(rows: pd.DataFrame, step: str, column: str = "main_accuracy") -> str:
    """Points of accuracy, or of ASR, that a step costs."""
    figures = rows.pivot_table(index="seed", columns="step", values=column)
    lost = 100 * (figures[NOTHING] - figures[step])
    return with_interval(float(lost.mean()), *mean_interval(lost))


def _lowest(table: pd.DataFrame, price: float) -> str:
    """The lowest ASR of any honest step at a price in points of accuracy, seed by seed."""
    rows = table[~table["control"] & ~table["part"].eq("lies")]
    before = rows[rows["part"].eq("steps") & rows["step"].eq(NOTHING)].groupby("seed")["main_accuracy"].mean()
    cheap = rows[100 * (rows["seed"].map(before) - rows["main_accuracy"]) <= price]
    lowest = cheap.groupby("seed")["asr"].min()
    return with_interval(float(lowest.mean()), *mean_interval(lowest, 0, 1))
