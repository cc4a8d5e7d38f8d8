"""The reference that `gradlens.investigate` rests on where a recording has no null of its own, in resumable parts.

`python -m simulations.studies.shipped_reference` simulates recordings of many small settings (what has run is not run
again), learns from the attacked ones among them how much each reading weighs, and writes what the attack-free ones show
to `gradlens/case/reference.json`. `--minutes` ends the simulation early; the next call goes on.
"""

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, as_completed
from itertools import repeat
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from gradlens.case.camps import camps_of
from gradlens.case.drift import Drift
from gradlens.case.looks import looks_of
from gradlens.case.peeling import SMALLEST, peel
from gradlens.case.readings import readings_of
from gradlens.case.scoring import Scoring, scales_of
from gradlens.case.sums import Sums, sums_of
from gradlens.errors import InputError
from gradlens.processes import processes
from gradlens.reporting.shared import poisoners
from gradlens.run import Run
from simulations import Scenario, load_sweep, run
from simulations.scenario import SCENARIOS
from simulations.studies.conditions import main_part
from simulations.studies.reference_settings import attacked, setting
from simulations.studies.reference_weights import Example, learned
from simulations.studies.results import ROOT, run_as_command

FOLDER, OUT = ROOT / "runs" / "reference", ROOT / "gradlens" / "case" / "reference.json"
VERSION = 2
WORKS, COSTS = 0.3, 0.05  # attack success rate, and main accuracy lost, from which on an attack works
DESCRIBED = (
    "task",
    "model",
    "num_clients",
    "clients_per_round",
    "partition",
    "rounds",
    "local_epochs",
    "batch_size",
    "learning_rate",
    "momentum",
)
REFERENCE, RECORDINGS = range(42), range(20)  # numbers of the settings, seeds of their attack-free recordings
LEARNING, FREE, ATTACKED = range(1_000, 1_012), range(6), 10  # settings that the weights are learned from, of each
# so many attack-free recordings and attacks; and digits with 20 clients as in the gauntlet, by other seeds
DIGITS_FREE, DIGITS_ATTACKED, ODD = range(220, 240), range(300, 302), range(200, 205)
DIGITS_MALICIOUS = (1, 4, 8, 10, 12)

TABLES = ("of_rounds", "totals", "agreement", "log_norms", "squares")


class Job(NamedTuple):
    """A recording to be simulated: the name of its file, its scenario, and whether its early looks are kept too."""

    name: str
    scenario: Scenario
    looks: bool = False


def jobs() -> Iterator[Job]:
    """All recordings that the study needs."""
    for name, scenario in learning():
        yield Job(name, scenario)
    for seed in RECORDINGS:
        for number in REFERENCE:
            yield Job(f"reference-{number}-free-{seed}", setting(number).replace(seed=seed), looks=True)


def learning() -> Iterator[tuple[str, Scenario]]:
    """Attack-free, attacked and odd honest recordings that the weights are learned from."""
    for number in LEARNING:
        for seed in FREE:
            yield f"learning-{number}-free-{seed}", setting(number).replace(seed=seed)
        for place, scenario in enumerate(attacked(number, ATTACKED)):
            yield f"learning-{number}-attacked-{place}", scenario
    for base in (s for s in load_sweep(SCENARIOS / "gauntlet_digits.toml", seed=0).scenarios):
        skew = next(iter(base.partition))
        if base.is_control:
            for seed in DIGITS_FREE:
                yield f"learning-{skew}-free-{seed}", base.replace(seed=seed)
            for kind, odd in odd_variants(base).items():
                for seed in ODD:
                    yield f"learning-{skew}-odd-{kind}-{seed}", odd.replace(seed=seed)
        elif "norm_cap" not in base.attack:  # capped ones are kept apart, as attacks that nothing was learned from
            for count in DIGITS_MALICIOUS:
                for seed in DIGITS_ATTACKED:
                    name = f"learning-{skew}-attacked-{main_part(base.attack)}-{count}-{seed}"
                    yield name, base.replace(seed=seed, num_malicious=count)


def odd_variants(base: Scenario) -> dict[str, Scenario]:
    """Kind of odd honest client -> the setting with one of them."""
    odd = "simulations.studies.odd_clients:"
    alpha = {"alpha": base.partition["dirichlet"]["alpha"]} if "dirichlet" in base.partition else {}
    return {
        "one_label": base.replace(partition={f"{odd}one_label": alpha}),
        "many_examples": base.replace(partition={f"{odd}many_examples": alpha}),
        "wrong_labels": base.replace(attack=f"{odd}wrong_labels", num_malicious=1, poison_rate=0.2),
        "other_writing": base.replace(attack=f"{odd}other_writing", num_malicious=1, poison_rate=1.0),
    }


def simulated(job: Job, folder: Path) -> None:
    """Simulates a recording and keeps its sums, who was malicious, and how the model ended; or why it is impossible."""
    path = folder / f"{job.name}.npz"
    if path.exists():
        return
    try:
        arrays = _kept(job)
    except InputError as error:  # such as clients that hold no sample of the source class
        arrays = {"impossible": np.array(str(error))}
    temporary = path.with_suffix(".part.npz")
    np.savez_compressed(temporary, **arrays)  # pyright: ignore[reportArgumentType]
    temporary.rename(path)


def _kept(job: Job) -> dict[str, np.ndarray]:
    with TemporaryDirectory() as place:
        recording = run(job.scenario, place)
        log, malicious = recording.log, sorted(poisoners(recording))
        arrays = {"malicious": np.array(malicious, str), "rounds": np.array(len(log))}
        arrays |= {name: np.array(value) for name, value in ended(recording).items()}
        for look in looks_of(len(log)) if job.looks else [len(log)]:
            arrays |= {f"{look}/{name}": value for name, value in arrays_of(sums_of(log[:look])).items()}
    return arrays


def ended(recording: Run) -> dict[str, float]:
    """Main accuracy and ASR over the last three rounds; NaN for what was not measured."""
    last = recording.metrics.tail(3).mean(numeric_only=True)
    return {name: float(last.get(name, np.nan)) for name in ("main_accuracy", "asr")}


def arrays_of(sums: Sums) -> dict[str, np.ndarray]:
    """The sums as named arrays; `sums_from` is the inverse."""
    arrays = {"clients": sums.clients, "rounds": sums.rounds, "roles": np.array(json.dumps(dict(sums.roles)))}
    for field in TABLES:
        arrays |= {f"{field}/{name}": value for name, value in getattr(sums, field).items()}
    if sums.drift is not None:
        arrays |= {"drift.totals": sums.drift.totals, "drift.moments": sums.drift.moments}
        for field in ("with_totals", "with_each_other"):
            arrays |= {f"drift.{field}/{name}": value for name, value in getattr(sums.drift, field).items()}
    return arrays


def sums_from(arrays: dict[str, np.ndarray]) -> Sums:
    """The inverse of `arrays_of`."""

    def table(field: str) -> dict[str, np.ndarray]:
        return {name.split("/", 1)[1]: value for name, value in arrays.items() if name.startswith(f"{field}/")}

    drift = None
    if "drift.totals" in arrays:
        drift = Drift(
            arrays["drift.totals"],
            arrays["drift.moments"],
            table("drift.with_totals"),
            table("drift.with_each_other"),
        )
    tables = {field: table(field) for field in TABLES}
    roles = json.loads(str(arrays["roles"]))
    return Sums(arrays["clients"], arrays["rounds"], roles=roles, drift=drift, **tables)


def simulate(folder: Path, minutes: float, workers: int) -> int:
    """Simulates what is missing for some minutes; the number of recordings that are still missing."""
    folder.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * minutes
    missing = [job for job in jobs() if not (folder / f"{job.name}.npz").exists()]
    with processes(workers) as pool:
        waiting = {pool.submit(simulated, job, folder): job for job in missing}
        for future in tqdm(as_completed(waiting), total=len(waiting), desc="recordings", disable=None):
            if not future.cancelled():
                future.result()
            if time.monotonic() > end:
                pool.shutdown(wait=True, cancel_futures=True)
                break
    return sum(not (folder / f"{job.name}.npz").exists() for job in missing)


def examples(folder: Path) -> tuple[list[Example], tuple[str, ...], np.ndarray]:
    """What the weights are learned from, the names of all readings, and their scales pooled over settings.

    Attacked recordings count only where the attack worked: they raise the attack success rate to 0.3 at least, or lower
    main accuracy by 0.05, beside the attack-free ones of the setting. Odd honest clients count as benign.
    """
    recordings = [(job, loaded(folder / f"{job.name}.npz")) for job, _ in [(Job(*of), 0) for of in learning()]]
    recordings = [(job, of) for job, of in recordings if "impossible" not in of]
    free: dict[str, list[dict[str, np.ndarray]]] = {}
    for job, of in recordings:
        if "-free-" in job.name:
            free.setdefault(setting_of(job.name), []).append(of)
    names = tuple(sorted({name for of in free.values() for name in readings_in(of[0])}))
    scales = {key: scales_of([last_sums(of) for of in several], names) for key, several in free.items()}
    pooled = np.exp(np.nanmean(np.log(list(scales.values())), axis=0))
    kept = []
    for seed, (job, of) in enumerate(recordings):
        key, sums = setting_of(job.name), last_sums(of)
        accuracy = np.mean([float(other["main_accuracy"]) for other in free[key]])
        attacked_here = "-attacked-" in job.name
        if attacked_here and not (of["asr"] >= WORKS or accuracy - of["main_accuracy"] >= COSTS):
            continue
        malicious = np.isin(sums.clients, of["malicious"]) & attacked_here
        group = main_part(job.scenario.attack) if attacked_here else "free" if "-free-" in job.name else "odd"
        kept.append(Example(sums, malicious, group, np.where(np.isnan(scales[key]), pooled, scales[key]), seed))
    return kept, names, pooled


def setting_of(name: str) -> str:
    """The setting that a learning recording's name says: "learning-1003-attacked-8" -> "1003"."""
    return name.split("-")[1]


def readings_in(of: dict[str, np.ndarray]) -> list[str]:
    """Names of the readings that a recording has."""
    sums = last_sums(of)
    return readings_of(sums, np.ones(len(sums.clients), bool))[0]


def loaded(path: Path) -> dict[str, np.ndarray]:
    """The arrays that were kept of a recording."""
    with np.load(path) as stored:
        return {name: stored[name] for name in stored.files}


def sums_at(of: dict[str, np.ndarray], look: int) -> Sums:
    """The sums of a recording after some rounds."""
    start = f"{look}/"
    return sums_from({name.removeprefix(start): value for name, value in of.items() if name.startswith(start)})


def last_sums(of: dict[str, np.ndarray]) -> Sums:
    """The sums of a whole recording."""
    return sums_at(of, int(of["rounds"]))


class Heights(NamedTuple):
    """The highest score of a recording after the last round, and over all looks, and how far its camps stand apart."""

    last: float
    looks: float
    apart: float


def heights_of(path: Path, scoring: Scoring) -> Heights | None:
    """How far an attack-free recording comes; None where it was impossible."""
    of = loaded(path)
    if "impossible" in of:
        return None
    looks = [sums_at(of, look) for look in looks_of(int(of["rounds"]))]
    heights = [peel(sums, scoring).highest for sums in looks if len(sums.clients) >= SMALLEST]
    return Heights(heights[-1], max(heights), camps_of(looks[-1], scoring).apart)


def written(folder: Path, path: Path, workers: int) -> None:
    """Learns the weights, reads all attack-free recordings by them, and writes the reference."""
    scoring = learned(*examples(folder))
    *sides, one_sidedness = scoring.sides.tolist()
    readings = zip(scoring.readings, scoring.scales, scoring.above, scoring.below, sides, strict=True)
    with processes(workers) as pool:
        settings = [described(number, folder, scoring, pool) for number in tqdm(REFERENCE, "settings", disable=None)]
    stored = {
        "version": VERSION,
        "made by": "python -m simulations.studies.shipped_reference",
        "intercept": round(scoring.intercept, 6),
        "readings": [
            {
                "name": name,
                "scale": float(f"{scale:.6g}"),
                "above": round(above, 6),
                "below": round(below, 6),
                "side": round(side, 6),
            }
            for name, scale, above, below, side in readings
        ],
        "one-sidedness": round(one_sidedness, 6),
        "settings": settings,
    }
    path.write_text(json.dumps(stored, indent=1) + "\n", "utf-8")


def described(number: int, folder: Path, scoring: Scoring, pool: Executor) -> dict[str, Any]:
    """A setting of the reference: what it is, and how high its attack-free recordings come."""
    scenario, paths = setting(number), [folder / f"reference-{number}-free-{seed}.npz" for seed in RECORDINGS]
    heights = [of for of in pool.map(heights_of, paths, repeat(scoring)) if of is not None]
    return {
        "setting": {name: scenario.label(name) for name in DESCRIBED},
        "clients": scenario.num_clients,
        "sampled": scenario.clients_per_round is not None,
        **{name: [_rounded(getattr(of, name)) for of in heights] for name in Heights._fields},
    }


def _rounded(value: float) -> float | None:
    return round(value, 3) if np.isfinite(value) else None


def main(arguments: Sequence[str] | None = None) -> None:
    """Simulates what is missing; once nothing is, learns and writes the reference."""
    parser = argparse.ArgumentParser(
        prog="simulations.studies.shipped_reference", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where recordings are kept (runs/reference)")
    parser.add_argument("--out", type=Path, default=OUT, help="the reference (gradlens/case/reference.json)")
    parser.add_argument("--minutes", type=float, default=90.0, help="of simulation, at most (default: 90)")
    parser.add_argument("--workers", type=int, default=2, help="recordings at a time (default: 2)")
    options = parser.parse_args(arguments)
    if missing := simulate(options.folder, options.minutes, options.workers):
        print(f"{missing:,} recordings are missing yet: call this again")
    else:
        written(options.folder, options.out, options.workers)


if __name__ == "__main__":
    run_as_command(main)
