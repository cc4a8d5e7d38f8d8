"""Every detector against every attack: `python -m simulations.studies.gauntlet --help`, or `make gauntlet`.

Three settings (`simulations/scenarios/gauntlet_*.toml`): digits and Fashion-MNIST with all clients in every round, and
Fashion-MNIST with a fifth of the clients in a round. Detectors were chosen on seeds 0 to 4; the figures that rank them
are those of seeds 5 to 9, and the table holds both. Attack-free runs of other seeds are added until enough benign
clients are pooled: half of these runs calibrate the detectors, the other half test them. A run that was analyzed by the
same detectors is not analyzed again; its log is deleted unless `--keep` is given.

Writes the tables of `gauntlet_figures` and a page, to `reports/gauntlet*`. A setting can be run apart: its rows then
take the place of what was there of it, and those of other settings stay. What is no whole setting, as some of its
attacks, is written to `runs/gauntlet_part*`.

Detectors and attacks of your own take part by name: of an installed package's entry point, or `module:function`. An
attack with settings comes in a scenario file of your own: `--settings mine.toml`.
"""

import argparse
import os
import shutil
from collections.abc import Iterable, Sequence
from concurrent.futures import Executor
from pathlib import Path

import numpy as np
from tqdm import tqdm

from gradlens.errors import InputError
from gradlens.processes import processes
from simulations import Scenario, run_sweep
from simulations.studies import gauntlet_page as page
from simulations.studies import gauntlet_scores as scores
from simulations.studies.conditions import is_here, main_part
from simulations.studies.gauntlet_figures import OUT, Tables
from simulations.studies.gauntlet_scores import (
    ATTACK_FREE_SEED,
    CHOOSE_SEEDS,
    CONFIRM_SEEDS,
    DetectorNames,
    RunScores,
    scenarios,
)
from simulations.studies.results import ROOT, run_as_command

PART = ROOT / "runs" / "gauntlet_part"  # of what is no whole setting
SETTINGS = ("digits", "fashion_mnist", "sampled")
SEEDS = ",".join(map(str, [*CHOOSE_SEEDS, *CONFIRM_SEEDS]))
WHOLE_SEEDS = 3  # at least, of a setting that is no mere part
WHOLE_BENIGN, PART_BENIGN = 2_000, 400  # attack-free clients pooled for a cell
RUNS_AT_A_TIME = 24  # so that not all logs are on disk at once


def main(arguments: Sequence[str] | None = None) -> None:
    """Simulates, analyzes, writes the table and the page."""
    options = _options(arguments)
    families, attacks = _names(options.families), _names(options.attack)
    detectors = scores.detector_names(_names(options.detectors))
    seeds = [int(seed) for seed in options.seeds.split(",")]
    is_whole = len(seeds) >= WHOLE_SEEDS and not families and not attacks and not options.detectors
    benign = options.benign or (WHOLE_BENIGN if is_whole else PART_BENIGN)
    results = []
    with processes(options.workers) as pool:
        for setting in _names(options.settings):
            if not has_data(setting):
                print(f"{setting}: left out, its dataset is not here; set GRADLENS_DATA to the folder that holds it")
                continue
            runs = [*cells(setting, seeds, families, attacks), *attack_free(setting, benign)]
            results += analyzed(setting, runs, options.runs, pool, detectors, keep=options.keep)
        if not any(not result.scenario.is_control for result in results):
            raise InputError(f"gauntlet: no attack of {options.families or 'the scenarios'} in {options.settings}")
        tables = Tables.of(results, pool)
    out = options.out or (OUT if is_whole else PART)
    if is_whole and out.with_suffix(".csv").exists():
        tables = tables.beside(Tables.read(out))
    tables.write(out)
    page.write(tables, out.with_suffix(".html"))
    print(f"{len(results)} runs, {len(tables.figures)} figures: {out}.csv, {out}.html")


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="simulations.studies.gauntlet", description=(__doc__ or "").partition(":")[0] + "."
    )
    add = parser.add_argument
    add("--seeds", default=SEEDS, help=f"seeds of the attacked runs, from 5 on they confirm (default: {SEEDS})")
    add(
        "--families",
        default="",
        help="attacks of the settings, by name, capped and loud (default: all, or those of --attack alone)",
    )
    add("--attack", default="", help="further attacks with their default settings: names or module:function")
    add("--detectors", default="", help="names or module:function; the panel always takes part (default: all built in)")
    add("--settings", default=",".join(SETTINGS), help=f"names or scenario files (default: {','.join(SETTINGS)})")
    add("--benign", type=int, help=f"attack-free clients of a cell (default: {WHOLE_BENIGN}, of a part {PART_BENIGN})")
    add("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: all cores)")
    add("--runs", type=Path, default=ROOT / "runs" / "gauntlet", help="folder of the runs (default: runs/gauntlet)")
    add(
        "--out",
        type=Path,
        help="tables and page, without their endings (default: reports/gauntlet, or of a part runs/gauntlet_part)",
    )
    add("--keep", action="store_true", help="keep the logs of all runs, 100 GB for the whole gauntlet")
    return parser.parse_args(arguments)


def _names(option: str) -> list[str]:
    return [name.strip() for name in option.split(",") if name.strip()]


def has_data(setting: str) -> bool:
    """Whether the dataset of a setting is here."""
    return is_here(scenarios(setting)[0].task)


def cells(
    setting: str, seeds: Sequence[int], families: Sequence[str] = (), attacks: Sequence[str] = ()
) -> list[Scenario]:
    """The attacked runs of a setting, each after its control.

    Parameters
    ----------
    setting : str
        A name of `SETTINGS`, or a scenario file.
    seeds : sequence of int
        Of the runs.
    families : sequence of str
        Those of the setting's attacks that take part, by `main_part`; none: all, unless there are `attacks`.
    attacks : sequence of str
        Further attacks, by name, each in every partition of the setting.
    """
    attacked = [scenario for scenario in scenarios(setting) if not scenario.is_control]
    chosen = [scenario for scenario in attacked if main_part(scenario.attack) in families]
    if not families and not attacks:
        chosen = attacked
    partitions = {str(scenario.label("partition")): scenario for scenario in reversed(attacked)}
    chosen += [scenario.replace(attack=attack) for attack in attacks for scenario in reversed(partitions.values())]
    pairs = [(scenario.control, scenario) for scenario in chosen]
    return [scenario.replace(seed=seed) for seed in seeds for pair in pairs for scenario in pair]


def attack_free(setting: str, clients: int) -> list[Scenario]:
    """Attack-free runs of each partition of a setting, of seeds of their own, until so many clients are pooled."""
    controls = dict.fromkeys(scenario.control for scenario in scenarios(setting))
    count = max(max(2, -(-clients // control.num_clients)) for control in controls)
    return [control.replace(seed=ATTACK_FREE_SEED + k) for k in range(count) for control in controls]


def analyzed(
    setting: str,
    runs: Iterable[Scenario],
    folder: Path,
    pool: Executor,
    detectors: DetectorNames,
    *,
    keep: bool,
) -> list[RunScores]:
    """The scores of every run; runs that these detectors have analyzed before are read from disk."""
    name = Path(setting).stem
    score_folder = folder / f"scores-{scores.digest(detectors)}" / name
    score_folder.mkdir(parents=True, exist_ok=True)
    distinct = list(dict.fromkeys(runs))
    missing = [scenario for scenario in distinct if not (score_folder / f"{scenario.digest}.npz").exists()]
    starts = range(0, len(missing), RUNS_AT_A_TIME)
    for start in tqdm(starts, desc=name, unit=f" x {RUNS_AT_A_TIME} runs", disable=None):
        part = missing[start : start + RUNS_AT_A_TIME]
        _analyze(setting, part, folder / name, score_folder, pool, detectors)
        if not keep:
            for scenario in part:
                if not scenario.is_control or scenario.seed >= ATTACK_FREE_SEED:
                    shutil.rmtree(folder / name / scenario.digest)
    return [RunScores.read(score_folder / f"{scenario.digest}.npz", scenario, setting) for scenario in distinct]


def _analyze(
    setting: str, part: Sequence[Scenario], folder: Path, score_folder: Path, pool: Executor, detectors: DetectorNames
) -> None:
    """Simulates some runs and has every detector score them, into a file for each run."""
    with_controls = list(dict.fromkeys(run for scenario in part for run in (scenario.control, scenario)))
    sweep = run_sweep(with_controls, folder, executor=pool, progress=False)
    control_rates = {name: rows["asr"].iloc[-1] for name, rows in sweep.controls.sort_values("round").groupby("run")}
    jobs = [
        pool.submit(
            scores.analyze,
            folder / scenario.digest,
            setting,
            score_folder,
            detectors,
            float(control_rates.get(scenario.digest, np.nan)),
            scores.main_accuracy(sweep.run(scenario.control.digest)),
        )
        for scenario in part
    ]
    for job in jobs:
        job.result()


if __name__ == "__main__":
    run_as_command(main)
