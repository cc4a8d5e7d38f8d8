"""Reproduces the seed papers, and single figures of others: `python -m simulations.studies.reproduce NAME`.

`make reproduce-NAME` calls it. An experiment is made of parts, each a scenario file and a function that measures its
runs. A run is simulated, measured and deleted; its rows go to `reports/reproduced_PART.csv` as soon as they are there,
and the next call goes on. With `--quick` the small version of every part is done, whose rows go to `runs/`. What came
of it stands beside the papers' figures in `docs/results/reproduced.md`.
"""

import argparse
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import pandas as pd

from gradlens.errors import InputError
from gradlens.processes import processes
from gradlens.run import Run
from gradlens.words import count
from simulations import Scenario, load_sweep, run
from simulations.scenario import SCENARIOS
from simulations.studies import reproduce_bagdasaryan as bagdasaryan
from simulations.studies import reproduce_bilgin as bilgin
from simulations.studies import reproduce_dba as dba
from simulations.studies import reproduce_evasion as evasion
from simulations.studies import reproduce_lfighter as lfighter
from simulations.studies import reproduce_sun as sun
from simulations.studies import reproduce_wu as wu
from simulations.studies.reproduce_outcomes import outcomes
from simulations.studies.results import REPORTS, ROOT, Finding, append, markdown, run_as_command

Measure = Callable[[Run, Scenario], pd.DataFrame]  # (run, the attacked scenario that it is, or is the control of)
AT_A_TIME = 2  # runs per process between two looks at the clock


@dataclass(frozen=True)
class Experiment:
    """A paper's experiments, redone.

    Parameters
    ----------
    paper : str
        Name, year and number of the paper.
    parts : Mapping of str to callable
        Name of a part, for `scenarios/reproduce_PART.toml` and `reports/reproduced_PART.csv` -> (run,
        attacked scenario that it is, or is the control of) -> rows.
    findings : callable
        (table of each part, in their order) -> list of Finding.
    text : callable
        (table of each part, in their order) -> what else is to be said, in Markdown.
    page : str
        The page of the results on which it stands.
    """

    paper: str
    parts: Mapping[str, Measure]
    findings: Callable[..., list[Finding]]
    text: Callable[..., str]
    page: str = "reproduced"


EXPERIMENTS: Mapping[str, Experiment] = {
    "bilgin": Experiment(
        "Bilgin 2021, arXiv:2111.14683",
        {"bilgin": bilgin.measured, "bilgin_conditions": bilgin.measured},
        bilgin.findings,
        bilgin.text,
    ),
    "bagdasaryan": Experiment(
        "Bagdasaryan et al. 2018, arXiv:1807.00459",
        dict.fromkeys(("bagdasaryan", "bagdasaryan_stealth", "bagdasaryan_words"), bagdasaryan.measured),
        bagdasaryan.findings,
        bagdasaryan.text,
    ),
    "sun": Experiment(
        "Sun et al. 2019, arXiv:1911.07963",
        {"sun": sun.measured, "sun_femnist": sun.measured},
        sun.findings,
        sun.text,
    ),
    "wu": Experiment(
        "Wu et al. 2020, arXiv:2011.01767",
        {"wu": wu.measured, "wu_cifar10": wu.measured},
        wu.findings,
        wu.text,
    ),
    "dba": Experiment(
        'Xie et al. 2020, "DBA", ICLR', {"dba": outcomes, "dba_foolsgold": outcomes}, dba.findings, dba.text
    ),
    "lfighter": Experiment(
        'Jebreel et al. 2024, "LFighter", Neural Networks',
        {"lfighter": outcomes, "lfighter_cifar10": outcomes},
        lfighter.findings,
        lfighter.text,
    ),
    "evasion": Experiment(
        "Attackers who know the detectors", {"evasion": evasion.measured}, evasion.findings, evasion.text, "evasion"
    ),
}


def scenarios_of(part: str, *, quick: bool = False) -> dict[Scenario, Scenario]:
    """The scenarios of a part, seed by seed, controls last -> the attacked one that it is, or is the control of.

    Parameters
    ----------
    part : str
        Its name.
    quick : bool
        Whether those of its small version are meant.
    """
    found = load_sweep(_file(part, quick)).scenarios
    attacked = {scenario: scenario for scenario in found if not scenario.is_control}
    controls = {scenario.control: scenario for scenario in reversed(attacked)}
    return dict(sorted((attacked | controls).items(), key=lambda pair: (pair[0].seed, pair[0].is_control)))


def _file(part: str, quick: bool) -> Path:
    return SCENARIOS / f"reproduce_{part}{'_quick' if quick else ''}.toml"


def computed(part: str, measure: Measure, path: Path, *, quick: bool, minutes: float, workers: int) -> int:
    """Simulates and measures what is missing of a part for some minutes.

    Parameters
    ----------
    part : str
        Its name.
    measure : callable
        As of `Experiment`.
    path : Path
        The table.
    quick : bool
        Whether its small version is meant.
    minutes : float
        After which no further run is begun.
    workers : int
        Processes.

    Returns
    -------
    int
        The number of runs that are still missing.
    """
    done = set(pd.read_csv(path)["run"]) if path.exists() else set()
    missing = [pair for pair in scenarios_of(part, quick=quick).items() if pair[0].digest not in done]
    end = time.monotonic() + 60 * minutes
    with processes(workers) as pool:
        while missing and time.monotonic() < end:
            now, missing = missing[: AT_A_TIME * workers], missing[AT_A_TIME * workers :]
            for rows in pool.map(partial(_rows, measure), now):
                append(rows, path, float_format="%.6g")
    return len(missing)


def _rows(measure: Measure, pair: tuple[Scenario, Scenario]) -> pd.DataFrame:
    """The rows of one run: what it is, what was measured, and how long it took."""
    started, (scenario, attacked) = time.process_time(), pair
    with TemporaryDirectory() as folder:
        rows = measure(run(scenario, folder), attacked)
    first = {
        "run": scenario.digest,
        "control_run": scenario.control.digest,
        "control": scenario.is_control,
        "seed": scenario.seed,
    }
    labels = {name: scenario.label(name) for name in SHOWN}
    minutes = {"minutes": (time.process_time() - started) / 60, "machine": machine()}
    return pd.DataFrame([first | labels | row | minutes for row in rows.to_dict("records")])


SHOWN = ("task", "model", "pretraining", "partition", "learning_rate", "attack", "poison_rate", "num_malicious",
         "schedule", "aggregator", "detector")  # fmt: skip


def machine() -> str:
    """What the runs were made on: kind of processor and number of cores."""
    return f"{platform.machine()}, {count(os.cpu_count() or 1, 'core')}"


def tables(experiment: Experiment) -> list[pd.DataFrame]:
    """The committed table of each part; without rows where it was not run yet."""
    return [pd.read_csv(path) if (path := table_of(part)).exists() else pd.DataFrame() for part in experiment.parts]


def table_of(part: str, *, quick: bool = False) -> Path:
    """Where the rows of a part are."""
    return (ROOT / "runs" if quick else REPORTS) / f"reproduced_{part}{'_quick' if quick else ''}.csv"


def section() -> str:
    """What was reproduced, in Markdown: the findings of all papers, then what is to be said of each."""
    rows, texts = [], []
    for name, experiment in EXPERIMENTS.items():
        if experiment.page != "reproduced":
            continue
        found = tables(experiment)
        whole = pd.concat(found, ignore_index=True)
        if not len(whole):
            continue
        runs = whole.drop_duplicates("run")
        cost = f"{runs['minutes'].sum():.0f} min of {', '.join(sorted(set(runs['machine'])))}"
        rows += [
            [experiment.paper.partition(",")[0], finding.claim, finding.paper, finding.ours, finding.deviation or "–"]
            for finding in experiment.findings(*found)
        ]
        texts.append(
            f"## {experiment.paper}\n\n`make reproduce-{name}`: {len(runs)} runs, seeds "
            f"{', '.join(map(str, sorted(set(runs['seed']))))}, {cost}.\n\n{experiment.text(*found)}"
        )
    lead = (
        "What the seed papers measured, and what the same experiment measures here; intervals are 95 % over seeds. "
        "Figures of a paper that were never found in it are not quoted."
    )
    columns = ["paper", "figure", "there", "here", "deviation"]
    return "\n\n".join([lead, markdown(columns, rows), *texts])


def evasion_section() -> str:
    """What is left of the signal where attackers know the detectors, in Markdown."""
    (table,) = tables(EXPERIMENTS["evasion"])
    runs = table.drop_duplicates("run")
    lead = (
        "One backdoor is sent in several ways, each of which hides more from the detectors than the one before. The "
        "attacker has read them all; no paper has these figures. AUCs are of single updates, means over "
        f"{runs['seed'].nunique()} seeds; intervals are 95 % over seeds. `make reproduce-evasion`: {len(runs)} runs, "
        f"{runs['minutes'].sum():.0f} min of {', '.join(sorted(set(runs['machine'])))}."
    )
    return f"{lead}\n\n{evasion.text(table)}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Does what is missing of one experiment, or of all."""
    parser = argparse.ArgumentParser(
        prog="simulations.studies.reproduce", description=(__doc__ or "").partition(":")[0]
    )
    parser.add_argument("name", nargs="*", help=f"experiments (default: {', '.join(EXPERIMENTS)})")
    parser.add_argument("--quick", action="store_true", help="the small version of each")
    parser.add_argument("--minutes", type=float, default=90.0, help="at most, to begin runs (default: 90)")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: all cores)")
    options = parser.parse_args(arguments)
    if unknown := [name for name in options.name if name not in EXPERIMENTS]:
        raise InputError(f"reproduce: expected one of {', '.join(EXPERIMENTS)}, found {unknown[0]!r:.80}")
    end = time.monotonic() + 60 * options.minutes
    for name, part, measure in _parts(options.name or list(EXPERIMENTS)):
        if options.quick and not _file(part, quick=True).exists():
            continue  # what is small already, or needs data that not every machine has
        path, left = table_of(part, quick=options.quick), (end - time.monotonic()) / 60
        missing = computed(part, measure, path, quick=options.quick, minutes=left, workers=options.workers)
        print(f"{name}: {part}: " + (f"{count(missing, 'run')} missing yet: call this again" if missing else "done"))


def _parts(names: Sequence[str]) -> Iterator[tuple[str, str, Measure]]:
    for name in names:
        for part, measure in EXPERIMENTS[name].parts.items():
            yield name, part, measure


if __name__ == "__main__":
    run_as_command(main)
