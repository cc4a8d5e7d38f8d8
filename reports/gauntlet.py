"""Every detector against every attack: `python reports/gauntlet.py --help`, or `make gauntlet`.

Three settings (`simulations/scenarios/gauntlet_*.toml`): digits and Fashion-MNIST with everybody in every round, and
Fashion-MNIST with a fifth of the clients in a round. Beside the attacked runs attack-free ones of other seeds, until
enough benign clients are pooled: half of these runs calibrate, the other half test. Writes gauntlet.csv and
gauntlet.html. A run that was analysed is not analysed again; its log is deleted unless --keep is given.
"""

import argparse
import ast
import hashlib
import os
import shutil
from collections.abc import Iterable, Sequence
from concurrent.futures import Executor
from functools import cache
from pathlib import Path

import gauntlet_tables
import numpy as np
import pandas as pd
from tqdm import tqdm

import gradlens
from gradlens.attribution import suspected_labels
from gradlens.detectors import DETECTORS, Detector
from gradlens.detectors.panels import Panel
from gradlens.errors import CannotSay
from gradlens.log import UpdateLog
from gradlens.processes import processes
from gradlens.run import Run
from simulations import Scenario, run_sweep
from simulations.tasks import load_task

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "reports" / "gauntlet"
WHOLE = 5  # seeds of a gauntlet that the README shows
SETTINGS = ("digits", "fashion_mnist", "sampled")
EARLY = 3  # attacked rounds in which the target label is named
NEEDS = {"fltrust"}  # what the server would have to hold data for is not asked


def main(words: Sequence[str] | None = None) -> None:
    """Simulates, analyses, writes the table and the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", default="0,1,2,3,4", help="seeds of the attacked runs (default: 0,1,2,3,4)")
    parser.add_argument("--families", default="", help="attacks by the names of ATTACKS, with commas (default: all)")
    parser.add_argument("--settings", default=",".join(SETTINGS), help=f"(default: {','.join(SETTINGS)})")
    parser.add_argument("--benign", type=int, help="attack-free clients of a cell (default: 2000, of a part 400)")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: all cores)")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "gauntlet", help="(default: runs/gauntlet)")
    parser.add_argument("--out", type=Path, default=OUT, help="without its ending")
    parser.add_argument("--keep", action="store_true", help="keep the logs of the runs, 45 GB of them")
    asked = parser.parse_args(words)
    seeds = [int(seed) for seed in asked.seeds.split(",")]
    families = [name for name in asked.families.split(",") if name]
    whole = len(seeds) >= WHOLE and not families and asked.settings == ",".join(SETTINGS) and asked.out == OUT
    benign = asked.benign or (2_000 if whole else 400)
    results = []
    with processes(asked.workers) as pool:
        for setting in asked.settings.split(","):
            if not available(setting):
                print(f"{setting}: left out, its dataset is not here; name its folder in GRADLENS_DATA")
                continue
            chosen = cells(setting, seeds, families)
            free = attack_free(setting, benign)
            results += analysed(setting, [*chosen, *free], asked.runs, pool, keep=asked.keep)
        if not results:
            raise SystemExit(f"gauntlet: no attack of {asked.families or 'the scenarios'} is in {asked.settings}")
        gauntlet_tables.write(results, asked.out, ROOT / "README.md" if whole else None, pool)


@cache
def available(setting: str) -> bool:
    """Whether the dataset of a setting is here."""
    try:
        load_task(gauntlet_tables.scenarios(setting)[0].task)
    except gradlens.InputError:
        return False
    return True


def cells(setting: str, seeds: Sequence[int], families: Sequence[str]) -> list[Scenario]:
    """The attacked runs of these seeds and families, each after its control."""
    attacked = [each for each in gauntlet_tables.scenarios(setting) if not each.is_control]
    attacked = [each for each in attacked if not families or gauntlet_tables.family(each.attack) in families]
    pairs = [(each.control, each) for each in attacked]
    return [each.replace(seed=seed) for seed in seeds for pair in pairs for each in pair]


def attack_free(setting: str, clients: int) -> list[Scenario]:
    """Attack-free runs of each partition, of seeds of their own, until so many clients are pooled."""
    controls = dict.fromkeys(each.control for each in gauntlet_tables.scenarios(setting))
    most = max(max(2, -(-clients // each.num_clients)) for each in controls)
    return [each.replace(seed=gauntlet_tables.FREE + k) for k in range(most) for each in controls]


def analysed(
    setting: str, scenarios: Iterable[Scenario], folder: Path, pool: Executor, *, keep: bool
) -> list[gauntlet_tables.Scores]:
    """The scores of every run; what has been analysed by these detectors before is read again."""
    scores = folder / f"scores-{digest()}" / setting
    scores.mkdir(parents=True, exist_ok=True)
    distinct = list(dict.fromkeys(scenarios))
    missing = [each for each in distinct if not (scores / f"{each.digest}.npz").exists()]
    size = 24  # runs at a time, so that not all logs lie on the disk at once
    for start in tqdm(range(0, len(missing), size), desc=setting, unit=f" x {size} runs", disable=None):
        part = missing[start : start + size]
        whole = list(dict.fromkeys(each for one in part for each in (one.control, one)))
        sweep = run_sweep(whole, folder / setting, executor=pool, progress=False)
        gains = {name: rows["asr"].iloc[-1] for name, rows in sweep.controls.sort_values("round").groupby("run")}
        control_accuracy = {each.digest: accuracy(sweep.run(each.control.digest)) for each in part}
        jobs = [
            pool.submit(
                analyse, folder / setting / each.digest, setting, scores, float(gains.get(each.digest, np.nan)),
                control_accuracy[each.digest],
            )
            for each in part
        ]  # fmt: skip
        for job in jobs:
            job.result()
        if not keep:
            for each in part:
                if not each.is_control or each.seed >= gauntlet_tables.FREE:
                    shutil.rmtree(folder / setting / each.digest)
    return [gauntlet_tables.Scores.read(scores / f"{each.digest}.npz", each, setting) for each in distinct]


def accuracy(run: Run) -> float:
    """Main accuracy after the last round."""
    return float(run.metrics["main_accuracy"].iloc[-1])


def built() -> dict[str, Detector]:
    """The detectors that are asked, by name."""
    return {name: builder() for name, builder in DETECTORS.items() if name not in NEEDS}


def digest() -> str:
    """Eight digits that change with the detectors and the code that scores are made of, its comments aside."""
    package = Path(gradlens.__file__).parent
    files = [*package.glob("detectors/*.py"), *package.glob("statistics/*.py"), package / "scorers.py"]
    files += [package / "log" / f"{name}.py" for name in ("record", "model", "history", "kernels", "sketches")]
    code = [ast.dump(_without_docstrings(ast.parse(file.read_text("utf-8")))) for file in sorted(files)]
    return hashlib.sha256("".join([repr(sorted(built())), *code]).encode()).hexdigest()[:8]


def _without_docstrings(tree: ast.AST) -> ast.AST:
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        first = body[0] if isinstance(body, list) and body else None
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
            del body[0]
    return tree


def name_labels(log: UpdateLog) -> pd.Series:
    """The label that each client of the last round seems to push towards, -1 where none can be named."""
    try:
        return suspected_labels(log)["target"].fillna(-1).astype(np.int64)
    except CannotSay:
        return pd.Series(-1, index=log[-1].clients)


def analyse(folder: Path, setting: str, scores: Path, control_asr: float, control_accuracy: float) -> None:
    """Every detector's score and flag of every update of a run, and what the panel saw, into one file."""
    run = Run.open(folder)
    detectors = built()
    rounds, clients, answers = [], [], {name: [] for name in detectors}
    for prefix in run.log.prefixes():
        verdicts = {name: prefix.verdict(detector) for name, detector in detectors.items()}
        first = next(iter(verdicts.values()))
        clients.append(first.clients)
        rounds.append(np.full(len(first.clients), prefix.last_index))
        for name, verdict in verdicts.items():
            said = np.nan if verdict.abstained else 1.0
            answers[name].append(np.stack([verdict.scores * said, verdict.flags * said]).astype(np.float32))
    first = gauntlet_tables.clean_rounds(Scenario(**run.scenario), setting)
    early = [name_labels(run.log[: k + 1]) for k in range(first, min(first + EARLY, len(run.log)))]
    watcher = detectors[gauntlet_tables.PANEL]
    assert isinstance(watcher, Panel)
    seen = watcher.observed(run.log)
    truth = run.truth.set_index(["round", "client"])
    keys = list(zip(np.concatenate(rounds).tolist(), np.concatenate(clients).tolist(), strict=True))
    asr = run.metrics["asr"].iloc[-1] if "asr" in run.metrics else np.nan
    gauntlet_tables.save(
        scores / f"{folder.name}.npz",
        {
            "round": np.concatenate(rounds),
            "client": np.concatenate(clients),
            "poisoned": truth["poisoned"].reindex(keys).to_numpy(bool),
            "compromised": truth["compromised"].reindex(keys).to_numpy(bool),
            "detectors": np.array(list(detectors)),
            "answers": np.stack([np.concatenate(answers[name], axis=1) for name in detectors]),
            "asr": np.array([float(asr), control_asr, accuracy(run), control_accuracy]),
            "early": np.concatenate([np.full(len(names), first + k) for k, names in enumerate(early)]),
            "early_clients": np.concatenate([names.index.to_numpy(str) for names in early]),
            "targets": np.concatenate([names.to_numpy() for names in early]),
            "positions": seen.positions,
            "seen_clients": seen.clients,
            "features": np.array(seen.features),
            "values": seen.values,
            "heard": np.array(seen.heard),
        },
    )


if __name__ == "__main__":
    main()
