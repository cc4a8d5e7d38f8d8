"""Writes what is left of a backdoor after training's end is mended: `python reports/pruning.py runs/pruning`.

Takes runs, or folders of them, of simulations/scenarios/pruning.toml with their attack-free controls; writes
reports/pruning.csv and .html. Each step of Wu et al. 2020, arXiv:2011.01767, on the last global model of every run:
clients rank or vote on the channels of the last convolution, extreme weights are set to 0, rounds of fine-tuning
follow. One half of the test set has the images that budgets are kept on, the other half is what is reported.
"""

import copy
import sys
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import seaborn as sns
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import nn
from tqdm import tqdm

from gradlens import mitigation
from gradlens.evaluation import bootstrap
from gradlens.log import InputError
from gradlens.mitigation import Mitigation, PruningOrder
from gradlens.plots import count
from gradlens.plots.axes import BENIGN, MALICIOUS, titled
from gradlens.report.page import (
    Block,
    code,
    figure,
    finding,
    finished,
    measured,
    number,
    render,
    section,
    table,
    text,
    write,
)
from gradlens.report.provenance import software_table
from gradlens.run import Run, Sweep, open_run
from simulations import Scenario, malicious_clients
from simulations.federated import Federation, assemble
from simulations.randomness import Stream, address
from simulations.training import Dataset, LocalSGD, load_state, one_thread, predict, state_of, train_clients

ROOT = Path(__file__).resolve().parents[1]
CSV, HTML = ROOT / "reports/pruning.csv", ROOT / "reports/pruning.html"
BUDGET = 0.02  # of validation accuracy, for each step
SHARE = 0.5  # of the channels that a client votes against
SHIELDED = 8  # channels that a liar shields: those that the trigger raises most
IMAGES = 1_000  # that budgets are kept on
ROUNDS = 2  # of fine-tuning
LIARS = (1, 2, 3)  # of 10 clients; the attacker first
DELTAS = (6.0, 5.0, 4.5, 4.0, 3.5, 3.0, 2.5, 2.0)
NOTHING, PRUNING, ADJUSTMENT, BOTH = "no step", "pruning", "adjustment", "both"
TUNED, TUNED_WITH = "both, tuned by benign clients", "both, tuned with the attacker"
TUNED_ALONE = "no step, tuned by benign clients"
STEPS = (NOTHING, PRUNING, ADJUSTMENT, BOTH, TUNED_ALONE, TUNED, TUNED_WITH)
HOW = ("ranks", "votes")
LIES = ("reverse", "shield")
RUNS = ["attacked", "attack-free control"]
KEYS = ("model", "partition")
FALLS, GONE = 0.3, 0.2  # an ASR that falls by so much has been acted on; one below has been taken away
NOTABLE = 0.1  # of an ASR
SUBJECT = {
    PRUNING: "Pruning alone", ADJUSTMENT: "Adjustment alone", BOTH: "Pruning with adjustment after it",
    TUNED_ALONE: "Fine-tuning by the benign clients, without any step before it,",
    TUNED: "Fine-tuning by the benign clients after both", TUNED_WITH: "Fine-tuning with the attacker after both",
}  # fmt: skip
ABOUT = {
    PRUNING: "Pruning", ADJUSTMENT: "Adjustment", BOTH: "Both", TUNED_ALONE: "Fine-tuning alone",
    TUNED: "Fine-tuning after both", TUNED_WITH: "With the attacker",
}  # fmt: skip
WIDTH = 10.5  # inches


def main(*folders: str) -> None:
    """Both files, from runs or folders of runs."""
    found = gathered([run for folder in folders for run in _runs(folder)])
    found.to_csv(CSV, index=False, float_format="%.4f")
    write(page(pd.read_csv(CSV), [run for folder in folders for run in _runs(folder)]), HTML)


def _runs(folder: str) -> list[Run]:
    found = open_run(folder)
    return found.runs if isinstance(found, Sweep) else [found]


def gathered(runs: Sequence[Run], *, progress: bool = True) -> pd.DataFrame:
    """All figures: a row per run, part ("steps", "lies", "deltas", "channels") and what was done.

    Columns: model, partition, seed, control, part, step, how (ranks, votes), lie, liars, value (a delta, or a number of
    channels), setting, main_accuracy, asr, validation_accuracy, pruned, kept. Raises InputError without a pair of an
    attacked run and its control.
    """
    known = {Scenario(**run.scenario): run for run in runs if run.is_closed}
    pairs = [
        (each, known[each], known[each.control]) for each in known if not each.is_control and each.control in known
    ]
    if not pairs:
        raise InputError("runs: expected attacked runs and their attack-free controls, found no pair of them")
    rows = []
    with one_thread():
        for scenario, attacked, control in tqdm(pairs, desc="runs", disable=None if progress else True):
            federation = assemble(scenario)
            for run in (attacked, control):
                case = Case.of(federation, run, is_control=run is control)
                settings = {"model": scenario.label("model"), "partition": _partition(scenario)}
                settings |= {"seed": scenario.seed, "control": case.is_control}
                lies = () if case.is_control else case.lies()
                rows += [settings | row for row in (*case.steps(), *lies, *case.curves())]
    return pd.DataFrame(rows)


def _partition(scenario: Scenario) -> str:
    """The partition with its skew: "dirichlet 0.5"."""
    ((name, values),) = scenario.partition.items()
    return f"{name} {values['alpha']:g}" if "alpha" in values else name


@dataclass(frozen=True, eq=False)
class Case:
    """One last global model, and all that its steps need; activations: float64 [client, channel], as seen by each."""

    federation: Federation
    is_control: bool
    start: Mitigation
    x: torch.Tensor
    y: np.ndarray
    activations: np.ndarray
    shielded: np.ndarray

    @classmethod
    def of(cls, federation: Federation, run: Run, *, is_control: bool) -> "Case":
        """The case of a run; the attack's success is measured on a control as well."""
        task, model = federation.task, copy.deepcopy(federation.model)
        *_, last = run.states()
        load_state(model, last)
        order = address(federation.scenario.seed, Stream.SAMPLES, 1).permutation(len(task.y_test))
        budget, held_out = order[: len(order) // 2][:IMAGES], order[len(order) // 2 :]
        half = replace(task, x_test=task.x_test[held_out], y_test=task.y_test[held_out])
        stamped, wanted = federation.attack.goal(half)
        questions = [("main_accuracy", half.x_test, half.y_test), ("asr", stamped, wanted)]
        asked = [(name, torch.tensor(x), y) for name, x, y in questions]

        def measure(model: nn.Module) -> dict[str, float]:
            return {name: float((predict(model, x) == y).mean()) for name, x, y in asked}

        activations = [mitigation.channel_activations(model, x) for x, _ in federation.honest]
        attacker = int(malicious_clients(federation.scenario)[0])
        own = federation.honest[attacker][0].numpy()
        raised = mitigation.channel_activations(model, federation.attack.stamp(task, own, None))
        shielded = mitigation.trigger_channels(activations[attacker], raised, SHIELDED)
        start = mitigation.begin(model, measure)
        x = torch.tensor(task.x_test[budget])
        return cls(federation, is_control, start, x, task.y_test[budget], np.stack(activations), shielded)

    def accuracy(self, model: nn.Module) -> float:
        """On the images that budgets are kept on."""
        return float((predict(model, self.x) == self.y).mean())

    def order(self, how: str, liars: int = 0, lie: str = "") -> PruningOrder:
        """What the server makes of the clients' ranks or votes, some of which are lies."""
        scenario = self.federation.scenario
        who = malicious_clients(scenario.replace(num_malicious=max(LIARS))).tolist()
        own = malicious_clients(scenario).tolist()
        who = [*own, *(client for client in who if client not in own)][:liars]
        said = mitigation.lied(self.activations, who, self.shielded if lie == "shield" else None)
        if how == "ranks":
            return mitigation.aggregate_ranks(mitigation.ranks_of(said))
        return mitigation.aggregate_votes(mitigation.votes_of(said, SHARE), share=SHARE)

    def steps(self) -> Iterator[dict[str, Any]]:
        """Each step alone, both, fine-tuning alone and after both; all clients tell the truth."""
        yield self._row("steps", NOTHING, self.start)
        yield self._row(
            "steps", ADJUSTMENT, mitigation.adjust_extreme_weights(self.start, self.accuracy, budget=BUDGET)
        )
        tuning = self._tuning()
        alone = mitigation.fine_tune(self.start, self._training(tuning[TUNED]), ROUNDS)
        yield self._row("steps", TUNED_ALONE, alone)
        for how in HOW:
            pruned, both = self._pruned_and_both(self.order(how))
            yield self._row("steps", PRUNING, pruned, how=how)
            yield self._row("steps", BOTH, both, how=how)
            if how == "ranks":
                for step, data in tuning.items():
                    done = mitigation.fine_tune(both, self._training(data), ROUNDS)
                    yield self._row("steps", step, done, how=how)

    def lies(self) -> Iterator[dict[str, Any]]:
        """Pruning, and both, where some of the clients lie."""
        for how in HOW:
            for lie in LIES:
                for liars in LIARS:
                    pruned, both = self._pruned_and_both(self.order(how, liars, lie))
                    yield self._row("lies", PRUNING, pruned, how=how, lie=lie, liars=liars)
                    yield self._row("lies", BOTH, both, how=how, lie=lie, liars=liars)

    def curves(self) -> Iterator[dict[str, Any]]:
        """Without a budget: every delta, and every number of channels."""
        model, measure = self.start.model, self.start.measure
        for delta in DELTAS:
            yield {"part": "deltas", "step": ADJUSTMENT, "value": delta} | dict(
                measure(mitigation.without_extreme_weights(model, delta))
            )
        order = self.order("ranks").order
        for pruned in sorted({*range(0, len(order), max(1, len(order) // 10)), len(order) - 1}):
            changed = mitigation.without_channels(model, order[:pruned], self.x)
            yield {"part": "channels", "step": PRUNING, "value": pruned / len(order)} | dict(measure(changed))

    def _pruned_and_both(self, order: PruningOrder) -> tuple[Mitigation, Mitigation]:
        pruned = mitigation.prune(self.start, order, self.accuracy, self.x, budget=BUDGET)
        return pruned, mitigation.adjust_extreme_weights(pruned, self.accuracy, budget=BUDGET)

    def _tuning(self) -> dict[str, list[Dataset]]:
        """Who fine-tunes on what: the benign clients; or all, the attacker on its poisoned data, but not boosted."""
        honest, poisoned = self.federation.honest, self.federation.poisoned
        if self.is_control:
            return {TUNED: honest}
        benign = [data for client, data in enumerate(honest) if client not in poisoned]
        return {TUNED: benign, TUNED_WITH: [poisoned.get(client, data) for client, data in enumerate(honest)]}

    def _training(self, data: Sequence[Dataset]) -> mitigation.Train:
        """Federated averaging over some clients as the run had it, in rounds after its last."""
        scenario, done = self.federation.scenario, iter(range(ROUNDS))
        settings = LocalSGD(scenario.local_epochs, scenario.batch_size, scenario.learning_rate)
        weights = np.array([len(y) for _, y in data], dtype=np.float64)

        def train(model: nn.Module) -> nn.Module:
            index, before = scenario.rounds + next(done), state_of(model)
            rngs = [address(scenario.seed, Stream.BATCHES, index, client) for client in range(len(data))]
            updates = train_clients(model, before, data, rngs, settings)
            means = {name: np.average(update, axis=0, weights=weights) for name, update in updates.items()}
            load_state(model, {name: (each + means[name]).astype(each.dtype) for name, each in before.items()})
            return model

        return train

    def _row(self, part: str, step: str, done: Mitigation, **what: Any) -> dict[str, Any]:
        return {"part": part, "step": step, **what} | dict(done.table.iloc[-1].drop("step"))


# What is drawn ------------------------------------------------------------------------------------------------


def page(found: pd.DataFrame, runs: Sequence[Run]) -> str:
    """The page as HTML."""
    seeds = found.groupby(list(KEYS))["seed"].nunique()
    lead = (
        f"{sum(seeds)} attacked runs and their attack-free controls ({_places(found)}): {runs[0].scenario['task']}, "
        f"{runs[0].scenario['num_clients']} clients, one of which replaces the global model in the last rounds. The "
        "steps of Wu et al. 2020, taken on the last global model. A budget of "
        f"{100 * BUDGET:g} points of accuracy for each step is kept on {IMAGES:,} test images; figures are of the "
        "other half."
    )
    sections = [
        section("steps", "Step by step", step_by_step(found)),
        section("lies", "Clients that lie", clients_that_lie(found)),
        section("curves", "Without a budget", without_a_budget(found)),
        section("provenance", "Where this comes from", provenance(runs)),
    ]
    return render(
        "After training: what pruning and adjustment leave of a backdoor", lead, findings(found), finished(sections)
    )


def _places(found: pd.DataFrame) -> str:
    seeds = found.groupby(list(KEYS), sort=False)["seed"].nunique()
    return ", ".join(f"{_place(key)}: {count(int(n), 'seed')}" for key, n in seeds.items())


def _place(key: Any) -> str:
    return " ".join(map(str, key)).replace("dirichlet", "Dirichlet")


def _groups(rows: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    return [(_place(key), part) for key, part in rows.groupby(list(KEYS), sort=False)]


def step_by_step(found: pd.DataFrame) -> list[Block]:
    """A picture per condition: ASR above main accuracy, attacked beside control; and the table."""
    rows = found[found["part"].eq("steps") & found["how"].fillna("ranks").eq("ranks")]
    groups = _groups(rows)

    def draw(canvas: Figure) -> None:
        axes = canvas.subplots(2, len(groups), sharex=True, sharey="row", squeeze=False)
        for (place, part), column in zip(groups, axes.T, strict=True):
            for ax, value, title in zip(column, ("asr", "main_accuracy"), (_asr_title, _accuracy_title), strict=True):
                _dots(ax, part, value)
                titled(ax, f"{place}: {title(part)}")
        for ax in axes.flat:
            ax.label_outer()
        canvas.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)

    caption = (
        "Every step within its budget, channels by the mean of truthful clients' ranks. Marks: means over seeds, "
        "bars: 95 % intervals over seeds; open grey marks: the attack-free control, the same trigger stamped."
    )
    return [figure(draw, (WIDTH, 6.4), caption), steps_table(found)]


def _dots(ax: Axes, part: pd.DataFrame, value: str) -> None:
    """Means with intervals over seeds, step by step, of attacked runs and controls."""
    for is_control, colour, marker, shift in ((False, MALICIOUS, "o", -0.12), (True, BENIGN, "s", 0.12)):
        own = part[part["control"].eq(is_control)]
        for position, step in enumerate(STEPS):
            values = own.loc[own["step"].eq(step), value].to_numpy(np.float64)
            if not len(values):
                continue
            mean, (low, high) = values.mean(), bootstrap(values)
            ax.plot([position + shift] * 2, [low, high], color=colour, linewidth=1.4)
            face = "white" if is_control else colour
            label = ("attack-free control" if is_control else "attacked") if position == 0 else None
            ax.plot(position + shift, mean, marker, color=colour, markerfacecolor=face, linestyle="", label=label)
    ax.set_xticks(range(len(STEPS)), [textwrap.fill(step, 10) for step in STEPS], fontsize="small")
    name = "ASR" if value == "asr" else "main accuracy"
    ax.set(ylim=(-0.03, 1.03), ylabel=f"{name} [share of images]", xlim=(-0.5, len(STEPS) - 0.4))
    ax.spines[["top", "right"]].set_visible(False)


def _asr_title(part: pd.DataFrame) -> str:
    at = {step: _mean(part, step, "asr") for step in STEPS}
    lowest = min((PRUNING, ADJUSTMENT, BOTH), key=lambda step: at[step])
    tuned = f"tuned alone {at[TUNED_ALONE]:.2f}, after both {at[TUNED]:.2f}"
    return f"ASR {at[NOTHING]:.2f}, lowest untuned {at[lowest]:.2f} ({lowest}); {tuned}"


def _accuracy_title(part: pd.DataFrame) -> str:
    at = {step: _mean(part, step, "main_accuracy") for step in STEPS}
    tuned = f"tuned alone {at[TUNED_ALONE]:.2f}, after both {at[TUNED]:.2f}"
    return f"accuracy {at[NOTHING]:.2f}, both {at[BOTH]:.2f}; {tuned}"


def _mean(part: pd.DataFrame, step: str, value: str, *, control: bool = False) -> float:
    return float(part.loc[part["step"].eq(step) & part["control"].eq(control), value].mean())


def steps_table(found: pd.DataFrame) -> Block:
    """Every step in every condition with its interval, by ranks and by votes, attacked and control."""
    rows = found[found["part"].eq("steps")].assign(how=lambda t: t["how"].fillna(""))
    said = [
        {
            "Condition": _place((model, partition)),
            "Run": "control" if is_control else "attacked",
            "Step": step,
            "By": how,
            "Main accuracy": _shown(own["main_accuracy"]),
            "ASR": _shown(own["asr"]),
            "Pruned": number(own["pruned"].mean(), 1),
            "Kept": number(own["kept"].mean(), 1),
        }
        for (model, partition, is_control, step, how), own in rows.groupby(
            [*KEYS, "control", "step", "how"], sort=False
        )
    ]
    caption = "Every step. Pruned, kept: channels, of an adjustment weights. Means with 95 % intervals over seeds."
    return table(said, caption, folded=True)


def _shown(values: pd.Series) -> str:
    array = values.to_numpy(np.float64)
    return measured(float(array.mean()), *bootstrap(array))


def clients_that_lie(found: pd.DataFrame) -> list[Block]:
    """ASR after both steps, and how many channels are pruned, over the number of liars."""
    about = (
        "Liars send well-formed ranks or votes: in reverse order; or with the "
        f"{SHIELDED} channels that the trigger raises most shown as the most active ones. The attacker lies first."
    )
    groups = _groups(among_liars(found))
    kinds = [(how, lie) for how in HOW for lie in LIES]
    channels = found.loc[found["part"].eq("steps") & found["step"].eq(PRUNING), ["pruned", "kept"]].sum(axis=1).max()

    def draw(canvas: Figure) -> None:
        axes = canvas.subplots(2, len(groups), sharex=True, sharey="row", squeeze=False)
        for (place, part), column in zip(groups, axes.T, strict=True):
            drawn = ((BOTH, "asr", "ASR after both"), (PRUNING, "pruned", "channels pruned"))
            for ax, (step, value, label) in zip(column, drawn, strict=True):
                own = part[part["step"].eq(step)]
                for place_of, kind in enumerate(kinds):
                    _kind(ax, own[own["how"].eq(kind[0]) & own["lie"].eq(kind[1])], value, place_of, ", ".join(kind))
                titled(ax, f"{place}: {_lies_finding(own, value, label)}")
                unit = "[share of images]" if value == "asr" else "[count]"
                ax.set(xlabel="liars [clients of 10]", ylabel=f"{label} {unit}", xticks=(0, *LIARS))
                ax.set_ylim(*((-0.03, 1.03) if value == "asr" else (0, channels)))
                ax.spines[["top", "right"]].set_visible(False)
                ax.label_outer()
        canvas.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)

    caption = "Attacked runs by number of liars: means over seeds, bars: 95 % intervals over seeds; kinds side by side."
    return [text(about), figure(draw, (WIDTH, 6.4), caption)]


def _kind(ax: Axes, rows: pd.DataFrame, value: str, place: int, label: str) -> None:
    """Means with intervals over seeds by number of liars, of one kind of lie, beside those of the other kinds."""
    colour, marker = [("0.1", "o"), ("0.1", "^"), ("0.55", "s"), ("0.55", "D")][place]
    for liars, own in rows.groupby("liars"):
        values, x = own[value].to_numpy(np.float64), liars + 0.14 * (place - 1.5)
        ax.plot([x, x], bootstrap(values), color=colour, linewidth=1.4)
        ax.plot(
            x, values.mean(), marker, color=colour, markerfacecolor="white" if place % 2 else colour,
            label=label if liars == 0 else None,
        )  # fmt: skip


def _lies_finding(rows: pd.DataFrame, value: str, label: str) -> str:
    """The kind of lie that moves a mean furthest with the most liars."""
    means = rows.pivot_table(value, ["how", "lie"], "liars")
    moved = means[max(LIARS)] - means[0]
    digits = 2 if value == "asr" else 1
    worst = moved.abs().idxmax()
    none, most = (number(float(means.loc[worst, liars]), digits) for liars in (0, max(LIARS)))
    if none == most:
        return f"{label}: no kind of lie by {max(LIARS)} liars moves the mean"
    return f"{label}: {max(LIARS)} liars move it at most from {none} to {most} ({', '.join(worst)})"


def among_liars(found: pd.DataFrame) -> pd.DataFrame:
    """The rows on lies, those of truthful clients as no liar of each kind; attacked runs only."""
    attacked = found[~found["control"].astype(bool)]
    truthful = attacked[attacked["part"].eq("steps") & attacked["step"].isin([PRUNING, BOTH])]
    none = [truthful.assign(lie=lie, liars=0) for lie in LIES]
    return pd.concat([*none, attacked[attacked["part"].eq("lies")]], ignore_index=True)


def without_a_budget(found: pd.DataFrame) -> list[Block]:
    """ASR and accuracy at every delta, and at every share of channels pruned."""
    blocks = []
    for part_name, name, unit in (
        ("deltas", "delta", "standard deviations of a layer's weights"),
        ("channels", "share pruned", "of the last convolution's channels"),
    ):
        label = f"{name} [{unit}]"
        rows = found[found["part"].eq(part_name)]
        rows = rows.melt([*KEYS, "seed", "control", "value"], ["asr", "main_accuracy"], "what", "share")
        rows["what"] = rows["what"].map({"asr": "ASR", "main_accuracy": "main accuracy"})
        rows["run"] = np.where(rows["control"].astype(bool), RUNS[1], RUNS[0])
        groups = _groups(rows)

        def draw(canvas: Figure, groups: Any = groups, label: str = label, part_name: str = part_name) -> None:
            axes = canvas.subplots(2, len(groups), sharex=True, sharey=True, squeeze=False)
            for (place, part), column in zip(groups, axes.T, strict=True):
                said = _curve_findings(part, "delta" if part_name == "deltas" else "share")
                for ax, what in zip(column, ("ASR", "main accuracy"), strict=True):
                    sns.lineplot(
                        part[part["what"].eq(what)], x="value", y="share", hue="run", hue_order=RUNS, style="run",
                        style_order=RUNS, markers=["o", "s"], dashes=["", (4, 2)], errorbar=("ci", 95),
                        err_style="bars", palette=[MALICIOUS, BENIGN], seed=0, ax=ax,
                    )  # fmt: skip
                    titled(ax, f"{place}: {said[what]}")
                    ax.set(xlabel=label, ylabel=f"{what} [share of images]", ylim=(-0.03, 1.03))
                    ax.legend().remove()
                    ax.spines[["top", "right"]].set_visible(False)
                    ax.label_outer()
            if part_name == "deltas":
                axes[0, 0].invert_xaxis()  # all share it
            canvas.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)

        caption = f"Without a budget: ASR and main accuracy over the {name}; means over seeds with 95 % intervals."
        blocks.append(figure(draw, (WIDTH, 6.4), caption))
    return blocks


def _curve_findings(part: pd.DataFrame, name: str) -> dict[str, str]:
    """The lowest mean ASR, and what accuracy it comes with, beside that of the mildest setting."""
    own = part[part["run"].eq(RUNS[0])].pivot_table(index="value", columns="what", values="share")
    best, mildest = own["ASR"].idxmin(), max(own.index) if name == "delta" else min(own.index)
    asr, accuracy = own["ASR"], own["main accuracy"]
    return {
        "ASR": f"lowest ASR {asr[best]:.2f}, at {name} {best:.2g} ({asr[mildest]:.2f} at {mildest:g})",
        "main accuracy": f"accuracy {accuracy[best]:.2f} at {name} {best:.2g} ({accuracy[mildest]:.2f} at {mildest:g})",
    }


def provenance(runs: Sequence[Run]) -> list[Block]:
    """Commands and software."""
    lines = [
        "# the runs, and this page",
        "gradlens simulate simulations/scenarios/pruning.toml -o runs/pruning",
        "python reports/pruning.py runs/pruning",
    ]
    about = f"Everything above comes from {len(runs)} recorded runs; reports/pruning.csv has the figures."
    return [text(about), code(lines), software_table(runs)]


# What is found ------------------------------------------------------------------------------------------------


def findings(found: pd.DataFrame) -> list[Block]:
    """What each step does, sentences with figures, whichever way they fall."""
    steps = found[found["part"].eq("steps")]
    ranks = steps[steps["how"].fillna("ranks").eq("ranks")]
    return [*(effect(ranks, step) for step in SUBJECT), before_tuning(ranks), ranks_or_votes(steps), liars(found)]


def effect(rows: pd.DataFrame, step: str) -> Block:
    """How far ASR and accuracy fall by a step, in every condition."""
    lines, acted, gone = [], 0, 0
    for place, part in _groups(rows):
        before, after = _mean(part, NOTHING, "asr"), _mean(part, step, "asr")
        acted, gone = acted + (before - after >= FALLS), gone + (after < GONE)
        own = part[~part["control"].astype(bool)]
        change = own[own["step"].eq(step)].set_index("seed")["main_accuracy"]
        change = 100 * (change - own[own["step"].eq(NOTHING)].set_index("seed")["main_accuracy"])
        control = 100 * (
            _mean(part, step, "main_accuracy", control=True) - _mean(part, NOTHING, "main_accuracy", control=True)
        )
        beside = "" if np.isnan(control) else f"; accuracy of the control {number(control, 1)}"
        asr = [_shown(own.loc[own["step"].eq(which), "asr"]) for which in (NOTHING, step)]
        points = number(float(change.mean()), 1)
        lines.append(f"{place}: ASR {asr[0]} to {asr[1]}, accuracy {points} points{beside}")
    of = f"of {count(len(lines), 'condition')}"
    sentence = f"lowers the mean ASR by {FALLS:g} or more in {acted} {of}, to below {GONE:g} in {gone}."
    return finding(ABOUT[step], f"{SUBJECT[step]} {sentence}", lines)


def before_tuning(rows: pd.DataFrame) -> Block:
    """What both steps add to the fine-tuning that follows them, in every condition."""
    lines, apart = [], []
    for place, part in _groups(rows):
        alone, after = (_mean(part, step, "asr") for step in (TUNED_ALONE, TUNED))
        apart.append(after - alone)
        accuracy = [number(_mean(part, step, "main_accuracy")) for step in (TUNED_ALONE, TUNED)]
        lines.append(
            f"{place}: ASR {number(alone)} after fine-tuning alone, {number(after)} with both steps before it; "
            f"accuracy {accuracy[0]} and {accuracy[1]}"
        )
    lower = sum(each <= -NOTABLE for each in apart)
    of = f"of {count(len(lines), 'condition')}"
    said = f"Both steps before fine-tuning lower the mean ASR by {NOTABLE:g} or more in {lower} {of}, against it alone."
    return finding("Worth of the steps", said, lines)


def ranks_or_votes(steps: pd.DataFrame) -> Block:
    """Whether the way in which clients are asked makes a difference."""
    names = (PRUNING, BOTH)
    own = steps[~steps["control"].astype(bool) & steps["step"].isin(names)]
    means = own.groupby(["step", "how"])[["asr", "main_accuracy"]].mean()
    lines = [
        f"{step} by {how}: ASR {number(means.loc[(step, how), 'asr'])}, "
        f"accuracy {number(means.loc[(step, how), 'main_accuracy'])}"
        for step in names
        for how in HOW
    ]
    apart = max(abs(float(means.loc[(step, "ranks"), "asr"] - means.loc[(step, "votes"), "asr"])) for step in names)
    verb = "makes a difference" if apart >= NOTABLE else "makes little difference"
    said = f"Which of them clients send {verb} (mean ASR {number(apart)} apart)."
    return finding("Ranks or votes", said, lines)


def liars(found: pd.DataFrame) -> Block:
    """What lies change against the same steps among truthful clients."""
    means = among_liars(found).groupby(["how", "lie", "step", "liars"])[["asr", "pruned"]].mean()
    lines, rises = [], []
    for how in HOW:
        for lie in LIES:
            none, most = (float(means.loc[(how, lie, BOTH, n), "asr"]) for n in (0, max(LIARS)))
            pruned = [number(float(means.loc[(how, lie, PRUNING, n), "pruned"]), 1) for n in (0, max(LIARS))]
            rises.append(most - none)
            lines.append(
                f"{how}, {lie}: ASR after both {number(none)} with no liar, {number(most)} with {max(LIARS)}; "
                f"channels pruned {pruned[0]} and {pruned[1]}"
            )
    raised = f"{sum(each >= NOTABLE for each in rises)} of {count(len(rises), 'kind')}"
    said = f"Lies of {max(LIARS)} of 10 clients raise the mean ASR after both steps by {NOTABLE:g} or more in {raised}."
    return finding("Liars", said, lines)


if __name__ == "__main__":
    main(*sys.argv[1:])
