"""What each attack achieves where nobody defends: `python -m simulations.studies.attacks runs/attacks ...`.

Reads the sweeps of `simulations/scenarios/attacks.toml`, `attacks_data.toml` and `replacement.toml`; writes
`reports/attacks.csv` and, for attacks in a single round, `reports/replacement.csv`. `section` is the text that the
results show of both tables.
"""

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from gradlens.evaluation import mean_interval
from gradlens.reporting.analysis import WORKED, attacked_runs, final
from gradlens.run import Run, Sweep
from simulations import ATTACKS, stored_scenario
from simulations.measure import attack_goal
from simulations.scenario import component_label
from simulations.studies.conditions import control_asr, main_part
from simulations.studies.results import REPORTS, markdown, run_as_command

ATTACKS_CSV, REPLACEMENT_CSV = REPORTS / "attacks.csv", REPORTS / "replacement.csv"
FEW_SAMPLES = 50  # a row that rests on fewer held-out samples says how many
UNTRAINED_ACCURACY = 0.1  # a control below this main accuracy has hardly learned its task
LITTLE_DAMAGE = 0.03  # of main accuracy
CERTAIN_RATES = 1.0, 0.0  # rates whose interval cannot come from the spread over seeds


def main(arguments: Sequence[str] | None = None) -> None:
    """Writes the tables of the given sweeps."""
    parser = argparse.ArgumentParser(prog="simulations.studies.attacks", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("sweeps", type=Path, nargs="+", help="folders of sweeps: runs/attacks runs/attacks_data ...")
    parser.add_argument("--out", type=Path, default=REPORTS, help="folder of the tables (default: reports)")
    options = parser.parse_args(arguments)
    sweeps = [Sweep.open(folder) for folder in options.sweeps]
    single_round = [sweep for sweep in sweeps if is_single_round(sweep)]
    continued = [sweep for sweep in sweeps if not is_single_round(sweep)]
    if continued:
        table = in_order(pd.concat([attack_rows(sweep) for sweep in continued], ignore_index=True))
        table.to_csv(options.out / ATTACKS_CSV.name, index=False, float_format="%.4f")
    if single_round:
        table = pd.concat([replacement_rows(sweep) for sweep in single_round])
        table.to_csv(options.out / REPLACEMENT_CSV.name, index=False, float_format="%.4f")


def committed() -> tuple[pd.DataFrame, pd.DataFrame]:
    """The two tables in `reports/`."""
    return pd.read_csv(ATTACKS_CSV, keep_default_na=False, na_values=["nan", ""]), pd.read_csv(REPLACEMENT_CSV)


def is_single_round(sweep: Sweep) -> bool:
    """Whether the attackers of a sweep attack in one round only."""
    return any("single_round" in run.scenario["schedule"] for run in sweep.runs)


def in_order(table: pd.DataFrame) -> pd.DataFrame:
    """The rows in the order of `ATTACKS`; attacks from elsewhere come last."""
    order = {name: position for position, name in enumerate(ATTACKS)}
    return table.sort_values("attack", key=lambda names: names.map(order), kind="stable")


def attack_rows(sweep: Sweep) -> pd.DataFrame:
    """Summarizes each condition of a sweep over its seeds, after the last round.

    Parameters
    ----------
    sweep : Sweep
        Attacked runs and their controls, aggregated by the mean and without a filter.

    Returns
    -------
    DataFrame
        A row per condition, with 95 % intervals over seeds. `held_out` is the smallest number of held-out
        samples of a seed. `asr_bound` is ">=" or "<=" where every held-out sample of every seed gives the same answer;
        `asr_low` and `asr_high` are then the exact one-sided 95 % limit for the samples of one seed, which the seeds
        share.
    """
    rows, control_rates = [], control_asr(sweep)
    for _, part in attacked_runs(sweep)[0].groupby("condition", sort=False):
        runs = [sweep.run(str(name)) for name in part.index]
        scenarios = [stored_scenario(run) for run in runs]
        scenario = scenarios[0]
        assert "mean" in scenario.aggregator, "attacks are measured without a defense"
        assert not scenario.detector, "attacks are measured without a defense"
        has_target = not np.isnan(final(runs[0], "asr"))
        held_out = min(len(attack_goal(scenario)[1]) for scenario in scenarios) if has_target else 0
        rows.append(
            {
                "attack": main_part(scenario.attack),
                "setting": component_label("attack", scenario.attack),
                "task": scenario.task,
                "model": scenario.model,
                "partition": component_label("partition", scenario.partition),
                "schedule": component_label("schedule", scenario.schedule),
                "clients": scenario.num_clients,
                "malicious": scenario.num_malicious,
                "rounds": scenario.rounds,
                "poison_rate": scenario.poison_rate if has_target else np.nan,
                **_asr_figures(runs, held_out),
                "control_asr": np.mean([control_rates[run.name] for run in runs]) if has_target else np.nan,
                "held_out": held_out,
                **_accuracy_figures(runs),
                "control_accuracy": np.mean([final(sweep.control_of(run.name), "main_accuracy") for run in runs]),
                "seeds": len(runs),
            }
        )
    return pd.DataFrame(rows)


def _asr_figures(runs: Sequence[Run], held_out: int) -> dict[str, object]:
    rates = np.array([final(run, "asr") for run in runs])
    low, high = mean_interval(rates, 0, 1)
    bound = ""
    if held_out and (rates == rates[0]).all() and rates[0] in CERTAIN_RATES:
        limit = 0.05 ** (1 / held_out)
        low, high, bound = (limit, 1.0, ">=") if rates[0] == 1 else (0.0, 1 - limit, "<=")
    return {"asr": rates.mean(), "asr_low": low, "asr_high": high, "asr_bound": bound}


def _accuracy_figures(runs: Sequence[Run]) -> dict[str, float]:
    accuracies = np.array([final(run, "main_accuracy") for run in runs])
    low, high = mean_interval(accuracies, 0, 1)
    return {"accuracy": float(accuracies.mean()), "accuracy_low": low, "accuracy_high": high}


def replacement_rows(sweep: Sweep) -> pd.DataFrame:
    """Measures an attack in a single round: a row per seed, beside the control in the same round."""
    rows = []
    runs = attacked_runs(sweep)[0]
    for name, seed in zip(runs.index.astype(str), runs["seed"], strict=True):
        run, control = sweep.run(name), sweep.control_of(name)
        attacked = int(run.truth.loc[run.truth["poisoned"].astype(bool), "round"].min())
        metrics, control_metrics = run.metrics.set_index("round"), control.metrics.set_index("round")
        control_rates = sweep.controls[sweep.controls["run"].eq(name)].set_index("round")["asr"]
        rows.append(
            {
                "seed": seed,
                "round": attacked,
                "asr": metrics["asr"][attacked],
                "accuracy": metrics["main_accuracy"][attacked],
                "accuracy_before": metrics["main_accuracy"][attacked - 1],
                "control_asr": control_rates[attacked],
                "control_accuracy": control_metrics["main_accuracy"][attacked],
                "last_round": len(run.log) - 1,
                "last_asr": final(run, "asr"),
                "last_accuracy": final(run, "main_accuracy"),
            }
        )
    return pd.DataFrame(rows).sort_values("seed")


# The section of the results ------------------------------------------------------------------------------------


def section(attacks: pd.DataFrame, replacement: pd.DataFrame) -> str:
    """The section of the results on attacks, in Markdown, from the two tables."""
    base = attacks[attacks["attack"].eq("trigger")].iloc[0]
    targeted, untargeted = attacks[attacks["asr"].notna()], attacks[attacks["asr"].isna()]
    lead = (
        f"Every attack against a server without a defense. Unless the setting says otherwise: {base['task']}, "
        f"{base['model']}, {base['malicious']} of {base['clients']} clients malicious, half of their eligible samples "
        f"poisoned, after {base['rounds']} rounds. Means over seeds with 95 % intervals, beside the attack-free "
        "control. `make reports` makes both tables ([`reports/attacks.csv`](reports/attacks.csv))."
    )
    columns = ["attack", "setting", "ASR", "control", "main accuracy", "control", "seeds"]
    rows = [[f"`{row.attack}`", _setting(row, base), *_figures(row)] for row in targeted.itertuples()]
    parts = [lead, markdown(columns, rows), _failures(targeted), _damage(untargeted), _replacement(replacement)]
    return "## The attacks, measured\n\n" + "\n\n".join(parts)


def _setting(row: Any, base: pd.Series) -> str:
    """How the run of a row differs from that of the plain trigger, whose settings are written out once."""
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
    if row.held_out < FEW_SAMPLES:
        parts.append(f"{row.held_out} held out")
    return "; ".join(parts)


def _figures(row: Any) -> list[str]:
    asr = _interval(row.asr, row.asr_low, row.asr_high, row.asr_bound)
    accuracy = _interval(row.accuracy, row.accuracy_low, row.accuracy_high)
    return [asr, f"{row.control_asr:.2f}", accuracy, f"{row.control_accuracy:.2f}", str(row.seeds)]


def _interval(value: float, low: float, high: float, bound: object = "") -> str:
    """A figure with its interval, or with the limit that its number of samples sets."""
    if bound == ">=":
        return f"{value:.2f} (≥ {np.floor(1000 * low) / 1000:.3f})"
    if bound == "<=":
        return f"{value:.2f} (≤ {np.ceil(1000 * high) / 1000:.3f})"
    return f"{value:.2f}" if np.isnan(low) else f"{value:.2f} ({low:.2f}–{high:.2f})"


def _names(attacks: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in dict.fromkeys(attacks))


def _failures(targeted: pd.DataFrame) -> str:
    """Which attacks reach less than half of their goal, and what the limits in the table mean."""
    failed = targeted[targeted["asr"] - targeted["control_asr"] < WORKED]
    sentence = f"ASR ends less than {WORKED:g} above the control for {_names(failed['attack'])}."
    sentences = [sentence if len(failed) else f"ASR ends at least {WORKED:g} above the control for every attack."]
    untrained = targeted[targeted["control_accuracy"] < UNTRAINED_ACCURACY]
    if len(untrained):
        sentences.append(
            f"In the setting of {_names(untrained['attack'])} the model has hardly learned its own task by then, so "
            "the rate is that of an untrained model."
        )
    sentences.append(
        "A limit (≥) marks attacks for which every held-out sample of every seed got the target label: the rate is "
        "then only bounded, by the exact one-sided 95 % limit for the samples of one seed."
    )
    return " ".join(sentences)


def _damage(table: pd.DataFrame) -> str:
    """The attacks without a target, by what they leave of main accuracy under each partition."""
    partitions = list(dict.fromkeys(table["partition"]))
    columns = ["attack", "setting"]
    for name in partitions:
        columns += [f"main accuracy, {name}", "control"]
    rows = []
    for name, part in table.groupby("attack", sort=False):
        row = [f"`{name}`", str(part["setting"].iloc[0])]
        for figures in part.set_index("partition").loc[partitions].to_dict("records"):
            interval = _interval(figures["accuracy"], figures["accuracy_low"], figures["accuracy_high"])
            row += [interval, f"{figures['control_accuracy']:.2f}"]
        rows.append([*row, str(part["seeds"].iloc[0])])
    loss = table["control_accuracy"] - table["accuracy"]
    harmless = table[table["partition"].eq(partitions[0]) & (loss < LITTLE_DAMAGE)]
    lead = (
        "Attacks that only change what is sent have no target label. What they do is damage, which depends on the "
        f"clients' data: alike for all clients ({partitions[0]}), or two classes for each client ({partitions[1]})."
    )
    conclusion = (
        f"Where clients' data are alike, {_names(harmless['attack'])} cost less than {LITTLE_DAMAGE:g} of main "
        "accuracy: they stay within the range of honest updates, or merely waste the attackers' share of the mean. "
        "Where clients' data differ, that share holds what only the attackers' data could teach, and the same attacks "
        "do damage."
    )
    return "\n\n".join([lead, markdown([*columns, "seeds"], rows), conclusion])


def _replacement(table: pd.DataFrame) -> str:
    """What a single round of model replacement does, in one sentence."""
    low, high = table["asr"].min(), table["asr"].max()
    first = table.iloc[0]
    return (
        f"One round is enough for model replacement: Fashion-MNIST, one of 20 clients malicious, {len(table)} seeds "
        f"(`simulations/scenarios/replacement.toml`). Before round {first['round']:.0f} main accuracy is "
        f"{table['accuracy_before'].mean():.2f}; a single update lifts ASR to {low:.3f}–{high:.3f} "
        f"(control {table['control_asr'].mean():.3f}) and leaves main accuracy at {table['accuracy'].mean():.2f}; "
        f"{first['last_round'] - first['round']:.0f} honest rounds later ASR is {table['last_asr'].mean():.2f} "
        "([`reports/replacement.csv`](reports/replacement.csv))."
    )


if __name__ == "__main__":
    run_as_command(main)
