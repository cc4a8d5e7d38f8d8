"""How often `gradlens.investigate` is right, in resumable parts: `python -m simulations.studies.cases`.

Recordings by seeds and in settings that chose nothing: attack-free ones in settings that the shipped reference lacks,
ones with an odd honest client, and attacked ones with 1, 4, 8, 10 and 12 of 20 and 5 of 50 clients malicious. A row per
recording and null goes to `reports/cases.csv` as soon as it is there; the next call goes on. `section` is the text that
the results show of it.
"""

import argparse
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pandas as pd

from gradlens.case import Null, investigate
from gradlens.case.null import null_of
from gradlens.case.shipped import reference
from gradlens.case.sums import sums_of
from gradlens.evaluation import mean_interval
from gradlens.processes import processes
from gradlens.reporting.page import number
from gradlens.reporting.shared import poisoners
from gradlens.words import with_interval
from simulations import Scenario, load_sweep, run
from simulations.scenario import SCENARIOS
from simulations.studies.conditions import family, is_here
from simulations.studies.reference_settings import setting
from simulations.studies.results import REPORTS, append, markdown, run_as_command, share
from simulations.studies.shipped_reference import ended, odd_variants

CSV = REPORTS / "cases.csv"
UNSEEN, FREE = (*range(2_000, 2_008), "digits iid", "digits dirichlet"), range(700, 725)
NULL_SEEDS = range(800, 820)  # attack-free recordings of the same setting
SOON = 5  # seeds of attack-free recordings that come first
ATTACKED, MALICIOUS = range(902, 904), (1, 4, 8, 10, 12)
ODD = range(955, 960)
FIGURES = ("share", "innocent", "any", "silent", "ambiguous_attackers", "ambiguous_innocent")
ADAPTED, ADAPTED_FREE = "shakespeare_speakers", 8  # the task behind adapters, and its further attack-free recordings
MINORITY = 8  # malicious clients of 20 up to which there is an honest majority of 55 %
NULLS = {"own": "20 attack-free recordings of the setting", "reference": "the shipped reference"}
ASR_GAIN, ACCURACY_LOSS = 0.3, 0.05  # of a family, on average, from which on it works
Job = tuple[dict[str, Any], Scenario]  # what a row says of its recording, and how it is simulated


def bases() -> dict[str, Scenario]:
    """The settings of the attacked recordings: digits with 20 clients, iid and with skewed labels."""
    scenarios = load_sweep(SCENARIOS / "gauntlet_digits.toml", seed=0).scenarios
    return {f"digits {next(iter(base.partition))}": base for base in scenarios if base.is_control}


def adapter_bases() -> dict[str, Scenario]:
    """The settings in which clients send adapters: a classifier of speakers, iid and with skewed labels."""
    scenarios = load_sweep(SCENARIOS / "gauntlet_adapters.toml", seed=0).scenarios
    speakers = [base for base in scenarios if base.is_control and base.task == ADAPTED]
    return {f"adapters {next(iter(base.partition))}": base for base in speakers}


def families() -> list[Scenario]:
    """One way of every attack of the gauntlet, in both settings."""
    return [base for base in load_sweep(SCENARIOS / "gauntlet_digits.toml", seed=0).scenarios if not base.is_control]


def jobs() -> Iterator[Job]:
    """All recordings, in an order in which a part of them says something of every question."""
    for seed in FREE[:SOON]:
        yield from free(seed)
    for count in MALICIOUS:
        yield from attacked(ATTACKED[0], count)
    for seed in ODD:
        yield from odd(seed)
    for seed in FREE[SOON:]:
        yield from free(seed)
    yield from controls(50)
    for seed in ATTACKED:
        yield from attacked(seed, 5, clients=50)
    for seed in ATTACKED[1:]:
        for count in MALICIOUS:
            yield from attacked(seed, count)
    yield from adapted()


def adapted() -> Iterator[Job]:
    """Recordings of adapters, attack-free and under each attack of their part of the gauntlet."""
    scenarios = load_sweep(SCENARIOS / "gauntlet_adapters.toml", seed=0).scenarios
    for seed in (*ATTACKED, *FREE[:ADAPTED_FREE]):
        for label, base in adapter_bases().items():
            yield _row("attack-free, adapters", label, "none", 0, seed), base.replace(seed=seed)
    for seed in ATTACKED:
        for base in scenarios:
            if base.task == ADAPTED and not base.is_control:
                label = f"adapters {next(iter(base.partition))}"
                row = _row("attacked, adapters", label, family(base.attack), base.num_malicious, seed)
                yield row, base.replace(seed=seed)


def free(seed: int) -> Iterator[Job]:
    """Attack-free recordings of one seed, in settings that the reference lacks."""
    digits = bases()
    for name in UNSEEN:
        base = digits[name] if isinstance(name, str) else setting(name)
        label = name if isinstance(name, str) else f"drawn {name}"
        yield _row("attack-free", label, "none", 0, seed), base.replace(seed=seed)


def controls(clients: int) -> Iterator[Job]:
    """Attack-free recordings with another number of clients, which attacked ones are compared with."""
    for label, base in bases().items():
        for seed in ATTACKED:
            row = _row(f"attack-free, {clients} clients", label, "none", 0, seed)
            yield row, base.replace(seed=seed, num_clients=clients)


def odd(seed: int) -> Iterator[Job]:
    """Recordings of one seed with one odd honest client."""
    for label, base in bases().items():
        for kind, scenario in odd_variants(base).items():
            yield _row("odd client", label, kind, 0, seed), scenario.replace(seed=seed)


def attacked(seed: int, count: int, clients: int = 20) -> Iterator[Job]:
    """Recordings of one seed under each attack of the gauntlet."""
    kind = "attacked" if clients == 20 else f"attacked, {clients} clients"
    for base in families():
        scenario = base.replace(num_malicious=count, num_clients=clients, seed=seed)
        yield _row(kind, f"digits {next(iter(base.partition))}", family(base.attack), count, seed), scenario


def _row(kind: str, label: str, family: str, count: int, seed: int) -> dict[str, Any]:
    return {"kind": kind, "setting": label, "family": family, "malicious": count, "seed": seed}


def judged(job: Job, null: Null | None) -> pd.DataFrame:
    """Rows of one recording: its case by the shipped reference, and by attack-free recordings of its setting."""
    row, scenario = job
    with TemporaryDirectory() as place:
        recording = run(scenario, place)
        malicious = set(poisoners(recording)) if row["kind"].startswith("attacked") else set()
        outcome = ended(recording)
        cases = {"reference": investigate(recording)} | ({} if null is None else {"own": investigate(recording, null)})
    rows = []
    for of, case in cases.items():
        accused, ambiguous = set(case.suspects["client"]), set(case.ambiguous["client"])
        first = set(case.clients["client"].head(len(malicious)))
        rows.append(
            row
            | outcome
            | {"null": of, "verdict": case.verdict, "p": case.p, "attackers": len(malicious)}
            | {"found": len(accused & malicious), "innocent": len(accused - malicious)}
            | {"ambiguous_attackers": len(ambiguous & malicious), "ambiguous_innocent": len(ambiguous - malicious)}
            | {"on_top": len(first & malicious)}
        )
    return pd.DataFrame(rows)


def own_null(base: Scenario) -> Null:
    """The null of attack-free recordings of a setting, by seeds of their own."""
    recordings = []
    for seed in NULL_SEEDS:
        with TemporaryDirectory() as place:
            recordings.append([sums_of(run(base.replace(seed=seed), place).log)])
    return null_of(recordings, reference().scoring)


def _of(job: Job) -> tuple[str, int]:
    """The setting of a recording and its number of clients, by which its own null is known."""
    return job[0]["setting"], job[1].num_clients


def computed(path: Path, minutes: float, workers: int) -> int:
    """Judges what is missing for some minutes; the number of recordings that are still missing."""
    keys = ["kind", "setting", "family", "malicious", "seed"]
    done = set(pd.read_csv(path)[keys].itertuples(index=False, name=None)) if path.exists() else set()
    missing = [job for job in jobs() if tuple(job[0].values()) not in done and is_here(job[1].task)]
    end = time.monotonic() + 60 * minutes
    with processes(workers) as pool:
        settings = {
            (label, clients): base.replace(num_clients=clients)
            for label, base in bases().items()
            for clients in (20, 50)
        } | {(label, base.num_clients): base for label, base in adapter_bases().items()}
        wanted = {place: of for place, of in settings.items() if any(_of(job) == place for job in missing)}
        nulls = dict(zip(wanted, pool.map(own_null, wanted.values()), strict=True))
        for start in range(0, len(missing), 4 * workers):
            if time.monotonic() > end:
                break
            part = missing[start : start + 4 * workers]
            append(pd.concat(pool.map(judged, part, [nulls.get(_of(job)) for job in part])), path, float_format="%.4f")
            done |= {tuple(row.values()) for row, _ in part}
    return sum(tuple(row.values()) not in done for row, _ in missing)


def committed() -> pd.DataFrame:
    """The table in `reports/`."""
    return pd.read_csv(CSV)


def working(table: pd.DataFrame) -> pd.DataFrame:
    """The attacked recordings of families that work: by ASR above the control's, or accuracy lost, on average."""
    free = table[table["kind"].str.startswith("attack-free") & (table["null"] == "reference")]
    accuracy = free.groupby(["kind", "setting"])["main_accuracy"].mean()
    attacked = attacked_in(table)
    like = zip(attacked["kind"].str.replace("attacked", "attack-free"), attacked["setting"], strict=True)
    attacked["lost"] = [accuracy[key] for key in like] - attacked["main_accuracy"]
    groups = attacked.groupby(["kind", "setting", "family", "malicious"])
    gain, lost = groups["asr"].transform("mean") - 0.1, groups["lost"].transform("mean")
    return attacked[(gain.fillna(0) >= ASR_GAIN) | (lost >= ACCURACY_LOSS)]


def attacked_in(table: pd.DataFrame) -> pd.DataFrame:
    """The attacked recordings."""
    return table[table["kind"].str.startswith("attacked")].copy()


def summary(table: pd.DataFrame) -> str:
    """The front page's figures: attack-free recordings accused, and attackers found where a majority is honest."""
    free = table[(table["kind"] == "attack-free") & (table["null"] == "reference")]
    shown = working(table)
    shown = shown[(shown["kind"] == "attacked") & (shown["malicious"] <= MINORITY)]
    shown = shown.assign(share=shown["found"] / shown["attackers"].clip(lower=1))
    by_family = shown.groupby(["setting", "null", "malicious", "family"])[["share", "innocent"]].mean()
    means = by_family.groupby(["setting", "null", "malicious"]).mean()
    texts = {
        key: f"{number(found)} ({number(innocent)})"
        for key, found, innocent in zip(means.index.tolist(), means["share"], means["innocent"], strict=True)
    }
    counts = sorted(set(shown["malicious"]))
    rows = [
        [setting_, NULLS[null], *(texts.get((setting_, null, count), "–") for count in counts)]
        for setting_, null in dict.fromkeys(key[:2] for key in texts)
    ]
    columns = ["recordings", "compared with", *(f"{count} of 20 malicious" for count in counts)]
    return (
        f"Of {len(free)} attack-free recordings in {free['setting'].nunique()} settings that the shipped reference "
        f"lacks, {int((free['innocent'] > 0).sum())} had anybody accused, at a rate of 5 %. Share of the attackers "
        "that are accused, over the families of attacks that work, and in brackets innocent clients accused per "
        "recording:\n\n" + markdown(columns, rows)
    )


def section(table: pd.DataFrame) -> str:
    """What the table shows, in Markdown."""
    return "\n\n".join((free_text(table), attacked_text(table), odd_text(table), adapters_text(table)))


def free_text(table: pd.DataFrame) -> str:
    """How many attack-free recordings were accused, by setting."""
    free = table[(table["kind"] == "attack-free") & (table["null"] == "reference")]
    accused = free.assign(accused=free["innocent"] > 0).groupby("setting", sort=False)["accused"].agg(["sum", "count"])
    rows = [[str(name), str(int(row["sum"])), str(int(row["count"]))] for name, row in accused.iterrows()]
    small = [share(float((free["p"] <= level).mean())) for level in (0.05, 0.1, 0.2)]
    return (
        f"Of {len(free)} attack-free recordings in {len(accused)} settings that the reference lacks, "
        f"{int(accused['sum'].sum())} had anybody accused at 5 %; p was at most 0.05, 0.1 and 0.2 in {small[0]}, "
        f"{small[1]} and {small[2]} of them.\n\n" + markdown(["setting", "accused", "recordings"], rows)
    )


def attacked_text(table: pd.DataFrame) -> str:
    """Attackers found and innocents accused, averaged over the families that work."""
    rows = []
    for (kind, setting_, count, null), part in working(table).groupby(["kind", "setting", "malicious", "null"]):
        figures = part.assign(
            share=part["found"] / part["attackers"].clip(lower=1),
            any=part["innocent"] > 0,
            silent=part["verdict"] == "cannot say",
        )
        by_family = figures.groupby("family")[list(FIGURES)].mean()
        mean, found = by_family.mean(), by_family["share"].to_numpy(float)
        clients = 50 if "50" in str(kind) else 20
        rows.append(
            [
                str(setting_),
                f"{count} of {clients}",
                str(null),
                str(part["family"].nunique()),
                with_interval(mean["share"], *mean_interval(found, 0, 1)),
                number(mean["innocent"]),
                share(mean["any"]),
                share(mean["silent"]),
                number(mean["ambiguous_attackers"]),
                number(mean["ambiguous_innocent"]),
            ]
        )
    columns = ["setting", "malicious", "null", "families", "attackers found", "innocents a recording"]
    columns += ["recordings that accuse any", "cannot say", "attackers ambiguous", "innocents ambiguous"]
    idle = sorted(set(attacked_in(table)["family"]) - set(working(table)["family"]))
    return (
        "Attackers found and innocents accused, averaged over the families of attacks that work; in brackets 95 % "
        "intervals over families.\n\n"
        + markdown(columns, rows)
        + (f"\n\nNot averaged, because they work nowhere here: {', '.join(idle)}." if idle else "")
    )


def odd_text(table: pd.DataFrame) -> str:
    """What became of odd honest clients."""
    odd = table[(table["kind"] == "odd client") & (table["null"] == "reference")]
    accused = int((odd["innocent"] > 0).sum())
    ambiguous = float(odd["ambiguous_innocent"].mean()) if len(odd) else np.nan
    return (
        f"Of {len(odd)} recordings with one odd honest client (one label, ten times the examples, 20 % wrong labels, "
        f"another way of writing) {accused} had anybody accused, and {number(ambiguous)} clients a recording were "
        "called ambiguous."
    )


def adapters_text(table: pd.DataFrame) -> str:
    """What becomes of recordings of adapters, attack-free and attacked."""
    free = table[table["kind"] == "attack-free, adapters"]
    if not len(free):
        return "Recordings of adapters were not judged yet."
    accused = free.assign(accused=free["innocent"] > 0).groupby("null")["accused"].agg(["sum", "count"])
    texts = [f"{int(row['sum'])} of {int(row['count'])} against {NULLS[str(null)]}" for null, row in accused.iterrows()]
    return (
        "Of attack-free recordings of low-rank adapters, which the reference has none of, anybody was accused in "
        f"{' and '.join(texts)}."
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Judges what is missing."""
    parser = argparse.ArgumentParser(prog="simulations.studies.cases", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=CSV, help="the table (default: reports/cases.csv)")
    parser.add_argument("--minutes", type=float, default=90.0, help="at most (default: 90)")
    parser.add_argument("--workers", type=int, default=2, help="recordings at a time (default: 2)")
    options = parser.parse_args(arguments)
    if missing := computed(options.out, options.minutes, options.workers):
        print(f"{missing:,} recordings are missing yet: call this again")


if __name__ == "__main__":
    run_as_command(main)
