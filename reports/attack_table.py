"""Writes what each attack does where nobody defends: `python reports/attack_table.py RUNS...`.

Reads folders of sweeps; writes reports/attacks.csv, for sweeps of a single round reports/replacement.csv, and of
both the README's section on the attacks.
"""

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from gradlens.evaluation import bootstrap
from gradlens.reporting.analysis import WORKED, attacked_runs, final
from gradlens.run import Run, Sweep
from simulations import Scenario
from simulations.attacks import ATTACKS
from simulations.measure import attack_goal
from simulations.scenario import component_label

ROOT = Path(__file__).resolve().parents[1]
ATTACKS_CSV, REPLACEMENT_CSV, README = (
    ROOT / "reports/attacks.csv",
    ROOT / "reports/replacement.csv",
    ROOT / "README.md",
)
BEGIN, END = "<!-- attacks -->", "<!-- /attacks -->"
BEFORE = "## What to know before trusting a figure"
FEW = 50  # held-out samples; fewer are named beside the rate that rests on them
UNLEARNT = 0.1  # main accuracy of a control
LITTLE = 0.03  # of main accuracy
LONE = 1.0, 0.0  # rates that seeds alone cannot bound


def main(folders: Sequence[str]) -> None:
    """Both tables of the sweeps, and the README's section."""
    sweeps = [Sweep.open(folder) for folder in folders]
    late = [sweep for sweep in sweeps if is_single_round(sweep)]
    each_round = [sweep for sweep in sweeps if not is_single_round(sweep)]
    if each_round:
        order = {name: position for position, name in enumerate(ATTACKS)}
        table = pd.concat([attack_rows(sweep) for sweep in each_round], ignore_index=True)
        table = table.sort_values("attack", key=lambda column: column.map(order), kind="stable")
        table.to_csv(ATTACKS_CSV, index=False, float_format="%.4f")
    if late:
        pd.concat([replacement_rows(sweep) for sweep in late]).to_csv(REPLACEMENT_CSV, index=False, float_format="%.4f")
    README.write_text(with_section(README.read_text(), section(*committed())))


def committed() -> tuple[pd.DataFrame, pd.DataFrame]:
    """Both tables as they are in the repository."""
    return pd.read_csv(ATTACKS_CSV, keep_default_na=False, na_values=["nan", ""]), pd.read_csv(REPLACEMENT_CSV)


def is_single_round(sweep: Sweep) -> bool:
    """Whether the attack of a sweep comes in one round alone."""
    return any("single_round" in run.scenario["schedule"] for run in sweep.runs)


def shown(attack: Iterable[str]) -> str:
    """Which of the parts a row is about: the one that poisons data, or what is shown with the plain trigger."""
    first, *others = attack
    if first != "trigger" or not others:
        return first
    return next((name for name in others if name != "scaling"), "scaling")


def control_rates(sweep: Sweep) -> pd.Series:
    """Attacked run -> the ASR of its attack-free control after the last round."""
    return sweep.controls.sort_values("round").groupby("run")["asr"].last()


def attack_rows(sweep: Sweep) -> pd.DataFrame:
    """A row per condition of a sweep: means over seeds after the last round, with 95 % bootstrap intervals.

    asr_bound: ">=" or "<=" where every held-out sample of every seed says the same: then low and high are the exact
    one-sided 95 % limit for the samples of one seed, which the other seeds share. held_out: the fewest that a seed has.
    """
    rows, reference = [], control_rates(sweep)
    for _, part in attacked_runs(sweep)[0].groupby("condition", sort=False):
        runs = [sweep.run(str(name)) for name in part.index]
        scenarios = [Scenario(**run.scenario) for run in runs]
        scenario = scenarios[0]
        assert "mean" in scenario.aggregator, "no defence is meant"
        assert not scenario.detector, "no defence is meant"
        measured = final(runs[0], "asr") == final(runs[0], "asr")
        held_out = min(len(attack_goal(each)[1]) for each in scenarios) if measured else 0
        rows.append(
            {
                "attack": shown(scenario.attack),
                "setting": component_label("attack", scenario.attack),
                "task": scenario.task,
                "model": scenario.model,
                "partition": component_label("partition", scenario.partition),
                "schedule": component_label("schedule", scenario.schedule),
                "clients": scenario.num_clients,
                "malicious": scenario.num_malicious,
                "rounds": scenario.rounds,
                "poison_rate": scenario.poison_rate if measured else np.nan,
                **_rate("asr", runs, held_out),
                "control_asr": np.mean([reference[run.name] for run in runs]) if measured else np.nan,
                "held_out": held_out,
                **_accuracy(runs),
                "control_accuracy": np.mean([final(sweep.control_of(run.name), "main_accuracy") for run in runs]),
                "seeds": len(runs),
            }
        )
    return pd.DataFrame(rows)


def replacement_rows(sweep: Sweep) -> pd.DataFrame:
    """A row per seed of a single-round attack: what that one round does, beside its control in the same round."""
    rows = []
    for name, part in attacked_runs(sweep)[0].iterrows():
        run, control = sweep.run(str(name)), sweep.control_of(str(name))
        attacked = int(run.truth.loc[run.truth["poisoned"].astype(bool), "round"].min())
        metrics, free = run.metrics.set_index("round"), control.metrics.set_index("round")
        asr = sweep.controls.query("run == @name").set_index("round")["asr"]
        rows.append(
            {
                "seed": part["seed"],
                "round": attacked,
                "asr": metrics["asr"][attacked],
                "accuracy": metrics["main_accuracy"][attacked],
                "accuracy_before": metrics["main_accuracy"][attacked - 1],
                "control_asr": asr[attacked],
                "control_accuracy": free["main_accuracy"][attacked],
                "last_round": len(run.log) - 1,
                "last_asr": final(run, "asr"),
                "last_accuracy": final(run, "main_accuracy"),
            }
        )
    return pd.DataFrame(rows).sort_values("seed")


def section(attacks: pd.DataFrame, replacement: pd.DataFrame) -> str:
    """The README's section on the attacks, from the two tables."""
    base = attacks[attacks["attack"].eq("trigger")].iloc[0]
    goals, damage = attacks[attacks["asr"].notna()], attacks[attacks["asr"].isna()]
    lead = (
        f"Every attack against a server without any defence: {base['task']}, {base['model']}, {base['malicious']} of "
        f"{base['clients']} clients malicious, half of their eligible samples poisoned, after {base['rounds']} rounds, "
        "unless the setting says otherwise. Means over seeds with 95 % intervals; beside them the attack-free control. "
        f"`make reports` makes both tables ([`reports/attacks.csv`](reports/attacks.csv))."
    )
    columns = ["attack", "setting", "ASR", "control", "main accuracy", "control", "seeds"]
    rows = [[f"`{row.attack}`", _setting(row, base), *_figures(row)] for row in goals.itertuples()]
    parts = [lead, _table(columns, rows), _weak(goals), _damage(damage), _replaced(replacement)]
    return "## The attacks, measured\n\n" + "\n\n".join(parts)


def with_section(readme: str, text: str, begin: str = BEGIN, end: str = END, next_section: str = BEFORE) -> str:
    """The README with the section between two marks replaced, or put before the next one; by default the attacks'."""
    marked = f"{begin}\n{text}\n{end}"
    if begin not in readme:
        return readme.replace(next_section, f"{marked}\n\n{next_section}", 1)
    before, rest = readme.split(begin, 1)
    return before + marked + rest.split(end, 1)[1]


def _rate(name: str, runs: Sequence[Run], held_out: int) -> dict[str, object]:
    values = np.array([final(run, name) for run in runs])
    low, high = bootstrap(values)
    bound = ""
    if held_out and (values == values[0]).all() and values[0] in LONE:
        limit = 0.05 ** (1 / held_out)
        low, high, bound = (limit, 1.0, ">=") if values[0] == 1 else (0.0, 1 - limit, "<=")
    return {name: values.mean(), f"{name}_low": low, f"{name}_high": high, f"{name}_bound": bound}


def _accuracy(runs: Sequence[Run]) -> dict[str, float]:
    values = np.array([final(run, "main_accuracy") for run in runs])
    low, high = bootstrap(values)
    return {"accuracy": float(values.mean()), "accuracy_low": low, "accuracy_high": high}


def _setting(row: Any, base: pd.Series) -> str:
    """What a row's run differs in from that of the plain trigger, which is written out only there."""
    label, carrier = str(row.setting), base["setting"]
    parts = [label.replace(carrier, "trigger") if row.attack != base["attack"] else label]
    if row.task != base["task"]:
        parts.append(f"{row.task}, {row.model}")
    parts += [str(getattr(row, name)) for name in ("partition", "schedule") if getattr(row, name) != base[name]]
    if (row.malicious, row.clients) != (base["malicious"], base["clients"]):
        parts.append(f"{row.malicious} of {row.clients}")
    if row.poison_rate != base["poison_rate"]:
        parts.append(f"rate {row.poison_rate:g}")
    if row.rounds != base["rounds"]:
        parts.append(f"{row.rounds} rounds")
    if row.held_out < FEW:
        parts.append(f"{row.held_out} held out")
    return "; ".join(parts)


def _figures(row: Any) -> list[str]:
    asr = _interval(row.asr, row.asr_low, row.asr_high, row.asr_bound)
    accuracy = _interval(row.accuracy, row.accuracy_low, row.accuracy_high)
    return [asr, f"{row.control_asr:.2f}", accuracy, f"{row.control_accuracy:.2f}", str(row.seeds)]


def _interval(value: float, low: float, high: float, bound: object = "") -> str:
    """A figure with its interval, or with the limit that its few samples set."""
    if bound == ">=":
        return f"{value:.2f} (≥ {np.floor(1000 * low) / 1000:.3f})"
    if bound == "<=":
        return f"{value:.2f} (≤ {np.ceil(1000 * high) / 1000:.3f})"
    return f"{value:.2f}" if np.isnan(low) else f"{value:.2f} ({low:.2f}–{high:.2f})"


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [columns, ["---"] * len(columns), *rows])


def _names(table: pd.DataFrame) -> str:
    return ", ".join(f"`{name}`" for name in dict.fromkeys(table["attack"]))


def _weak(goals: pd.DataFrame) -> str:
    """Which attacks do not get half of what they want; and what the limits mean."""
    weak = goals[goals["asr"] - goals["control_asr"] < WORKED]
    said = f"Less than {WORKED:g} above the control: {_names(weak)}." if len(weak) else "None fails."
    raw = goals[goals["control_accuracy"] < UNLEARNT]
    if len(raw):
        said += f" Of {_names(raw)} the model has hardly learnt its own task by then: the rate is that of a raw model."
    return (
        f"{said} A limit (≥) stands where every held-out sample of every seed got the target label: then the rate is "
        "only bounded, by the exact one-sided 95 % limit for one seed's samples."
    )


def _damage(table: pd.DataFrame) -> str:
    """The attacks that only send, by what they leave of main accuracy under each partition."""
    partitions = list(dict.fromkeys(table["partition"]))
    columns = ["attack", "setting"]
    for name in partitions:
        columns += [f"main accuracy, {name}", "control"]
    rows = []
    for name, part in table.groupby("attack", sort=False):
        found = part.set_index("partition").loc[partitions]
        row = [f"`{name}`", str(part["setting"].iloc[0])]
        for each in found.to_dict("records"):
            interval = _interval(each["accuracy"], each["accuracy_low"], each["accuracy_high"])
            row += [interval, f"{each['control_accuracy']:.2f}"]
        rows.append([*row, str(part["seeds"].iloc[0])])
    harmless = table[table["partition"].eq(partitions[0]) & (table["control_accuracy"] - table["accuracy"] < LITTLE)]
    about = (
        "Attacks that only send have no target; what they do is damage, and that depends on what clients hold: the "
        f"same for all ({partitions[0]}), or two classes each ({partitions[1]})."
    )
    after = (
        f"Where clients hold alike, {_names(harmless)} cost less than {LITTLE:g} of main accuracy: they stay "
        "inside what honest clients send, or merely waste the attackers' share of the mean. Where clients differ, that "
        "share is what only they know, and the same attacks do damage."
    )
    return "\n\n".join([about, _table([*columns, "seeds"], rows), after])


def _replaced(replacement: pd.DataFrame) -> str:
    """One sentence on the single round."""
    low, high = replacement["asr"].min(), replacement["asr"].max()
    first = replacement.iloc[0]
    return (
        f"One round is enough for model replacement: Fashion-MNIST, one of 20 clients, {len(replacement)} seeds "
        f"(`simulations/scenarios/replacement.toml`). Before round {first['round']:.0f} main accuracy stands at "
        f"{replacement['accuracy_before'].mean():.2f}; its one update lifts ASR to {low:.3f}–{high:.3f} "
        f"(control {replacement['control_asr'].mean():.3f}) and leaves main accuracy at "
        f"{replacement['accuracy'].mean():.2f}; "
        f"{first['last_round'] - first['round']:.0f} honest rounds later ASR is {replacement['last_asr'].mean():.2f} "
        "([`reports/replacement.csv`](reports/replacement.csv))."
    )


if __name__ == "__main__":
    main(sys.argv[1:])
