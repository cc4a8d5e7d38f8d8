"""The gauntlet's figures: from the scores of single runs to gauntlet.csv and gauntlet.html."""

import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from attack_table import shown

from gradlens.attribution import attribution_accuracy
from gradlens.detectors.panels import Observed, Panel, panel
from gradlens.detectors.verdict import nominal_threshold, rank_threshold
from gradlens.errors import InputError
from gradlens.evaluation import bootstrap, evaluate, per_client
from simulations import Scenario, load_sweep
from simulations.attacks import build_attack

FREE = 1_000  # the first seed of the attack-free runs that calibrate (even ones) and test (odd ones)
WORKS = 0.2  # ASR above its control, or main accuracy below it for an attack without a target
RATES = {"1": 0.01, "5": 0.05}
ADAPTIVE = {  # made to pass for benign
    "constrain_and_scale", "norm_bound", "layer_substitution", "train_and_scale", "hiding", "a_little_is_enough",
    "min_max", "min_sum", "mimic",
}  # fmt: skip
LOOKS_BACK = {  # whose last score of a client speaks for all of its rounds; of the others the mean does
    "accumulated_norms", "accumulated_spectral", "accumulated_neighbours", "accomplices", "label_drift_residual",
    "persistence", "foolsgold", "fldetector", "flanders", "panel", "panel (clean stretch)", "panel (each cohort)",
}  # fmt: skip
PANEL, STRETCH, COHORT = "panel", "panel (clean stretch)", "panel (each cohort)"
SCENARIOS = Path(__file__).resolve().parents[1] / "simulations" / "scenarios"
KEYS = ["task", "setting", "partition", "family"]
COLUMNS = [
    "detector", "family", "adaptive", "works", "partition", "per", "metric", "value", "low", "high", "seeds", "bound",
    "task", "setting",
]  # fmt: skip
METRICS = ("auc", "tpr_1", "tpr_5", "fpr_1", "fpr_5")


def family(attack: Iterable[str]) -> str:
    """The name in ATTACKS of what an attack of several parts is about, "none" for no attack."""
    return shown(list(attack) or ["none"])


@dataclass(frozen=True, eq=False)
class Scores:
    """What every detector said of every update of one run."""

    scenario: Scenario
    setting: str
    arrays: Mapping[str, np.ndarray]

    @classmethod
    def read(cls, path: Path, scenario: Scenario, setting: str) -> "Scores":
        """What `save` wrote."""
        with np.load(path, allow_pickle=False) as file:
            return cls(scenario, setting, dict(file))

    @property
    def cell(self) -> dict[str, str]:
        """Task, setting, partition and family."""
        scenario = self.scenario
        rest = ", every third round" if "alternating" in scenario.schedule else ""
        return {
            "task": scenario.task,
            "setting": ("sampled" if scenario.clients_per_round else "full") + rest,
            "partition": next(iter(scenario.partition)),
            "family": family(scenario.attack),
        }

    @property
    def free(self) -> bool:
        """Whether it is one of the attack-free runs that calibrate or test."""
        return self.scenario.is_control and self.scenario.seed >= FREE

    @property
    def gain(self) -> float:
        """By how much the attack works: ASR above its control, or main accuracy below it where there is no target."""
        asr, control_asr, accuracy, control_accuracy = self.arrays["asr"]
        return float(control_accuracy - accuracy if np.isnan(asr) else asr - control_asr)

    @cached_property
    def seen(self) -> Observed:
        """What the panel saw of the run."""
        of = self.arrays
        return Observed(
            of["positions"],
            of["seen_clients"],
            tuple(of["features"].tolist()),
            of["values"],
            tuple(of["heard"].tolist()),
        )

    def updates(self, score: np.ndarray, flag: np.ndarray) -> pd.DataFrame:
        """A row per update: round, client, score, flag, abstained, malicious, compromised, seed."""
        abstained = np.isnan(score)
        return pd.DataFrame(
            {
                "round": self.arrays["round"],
                "client": self.arrays["client"],
                "score": np.where(abstained, 0, score).astype(np.float64),
                "flag": np.where(abstained, 0, flag).astype(bool),
                "abstained": np.where(abstained, "cannot say", ""),
                "malicious": self.arrays["poisoned"],
                "compromised": self.arrays["compromised"],
                "seed": self.scenario.seed,
            }
        )

    def of(self, detector: str) -> pd.DataFrame:
        """The updates with one detector's scores."""
        score, flag = self.arrays["answers"][self.arrays["detectors"].tolist().index(detector)]
        return self.updates(score, flag)


def save(path: Path, arrays: Mapping[str, Any]) -> None:
    """The arrays of one run as a file, whole or not at all."""
    part = path.with_suffix(".part.npz")
    np.savez_compressed(part, **arrays)
    os.replace(part, path)


def write(results: Sequence[Scores], out: Path, readme: Path | None = None, executor: Executor | None = None) -> None:
    """The table as CSV and the page; readme: the README, whose section on the detectors is written anew."""
    import gauntlet_page

    table = figures(results, executor)
    out.parent.mkdir(parents=True, exist_ok=True)
    table.to_csv(out.with_suffix(".csv"), index=False, float_format="%.5g")
    gauntlet_page.write(table, results, out.with_suffix(".html"))
    if readme is not None:  # from the file, as anybody could
        readme.write_text(gauntlet_page.readme(readme.read_text(), committed(out.with_suffix(".csv"))))
    print(f"{len(results)} runs, {len(table)} figures: {out.with_suffix('.csv')}, {out.with_suffix('.html')}")


def committed(path: Path) -> pd.DataFrame:
    """The figures of a gauntlet.csv."""
    return pd.read_csv(path, keep_default_na=False, na_values=["nan", ""], dtype={"family": str}).fillna({"bound": ""})


def figures(results: Sequence[Scores], executor: Executor | None = None) -> pd.DataFrame:
    """Every figure of every detector in every cell, in the columns of gauntlet.csv; one null's runs go together."""
    gain = gains(results)
    groups = list(_nulls(results).values())
    parts = map(_figures, groups) if executor is None else executor.map(_figures, groups)
    table = pd.concat(list(parts), ignore_index=True)
    table["works"] = [int(gain.get(tuple(key), 0.0) >= WORKS) for key in table[KEYS].itertuples(index=False, name=None)]
    table["adaptive"] = table["family"].isin(ADAPTIVE).astype(int)
    table = table[table["metric"].isin(METRICS) & table["value"].notna()]
    return table.sort_values([*KEYS, "detector", "per", "metric"], kind="stable")[COLUMNS].reset_index(drop=True)


def _figures(runs: Sequence[Scores]) -> pd.DataFrame:
    """The figures of runs that share a null: half of the attack-free ones calibrate, the other half is tested."""
    calibrating = _calibrating(runs)
    tested = [run for run in runs if not run.scenario.is_control or (run.free and run.scenario.seed % 2)]
    names = [name for name in runs[0].arrays["detectors"].tolist() if not name.startswith(PANEL)]
    tables = [_evaluated(n, [r.of(n) for r in calibrating], [(r, r.of(n)) for r in tested]) for n in names]
    return pd.concat([*tables, *_panels(calibrating, tested)], ignore_index=True)


def _calibrating(runs: Sequence[Scores]) -> list[Scores]:
    return [run for run in runs if run.free and run.scenario.seed % 2 == 0]


def named(results: Sequence[Scores]) -> pd.DataFrame:
    """How often the suspected target label is right in the first attacked rounds, of all attackers and of the flagged.

    Columns of `KEYS`, whose ("attackers", "flagged"), value, low, high, seeds, clients; flagged: by the panel, on
    attack-free runs of other seeds, at 5 % per update.
    """
    rows = []
    for runs in _nulls(results).values():
        built = panel()
        assert isinstance(built, Panel)
        fitted, null = built.fitted([run.seen for run in _calibrating(runs)])
        threshold = rank_threshold(null, RATES["5"], "attack-free runs")
        for run in runs:
            target = build_attack(run.scenario.attack).target_label
            if target is None:
                continue
            scores = dict(
                zip(
                    zip(run.seen.positions.tolist(), run.seen.clients.tolist(), strict=True),
                    fitted.scores(run.seen),
                    strict=True,
                )
            )
            guilty = set(run.arrays["client"][run.arrays["poisoned"]].tolist())
            of = zip(
                run.arrays["early"].tolist(),
                run.arrays["early_clients"].tolist(),
                run.arrays["targets"].tolist(),
                strict=True,
            )
            for position, client, found in of:
                if client in guilty:
                    flagged = scores.get((position, client), np.inf) > threshold
                    rows.append(
                        run.cell
                        | {
                            "seed": run.scenario.seed,
                            "target": found,
                            "source": pd.NA,
                            "true_target": target,
                            "true_source": pd.NA,
                            "flagged": flagged,
                        }
                    )
    if not rows:
        return pd.DataFrame(columns=[*KEYS, "whose", "value", "low", "high", "seeds", "clients"])
    table = pd.DataFrame(rows)
    parts = [
        attribution_accuracy(part, KEYS).query("label == 'target'").assign(whose=whose)
        for whose, part in (("attackers", table), ("flagged", table[table["flagged"]]))
        if len(part)
    ]
    return pd.concat(parts, ignore_index=True).drop(columns="label")


@cache
def scenarios(setting: str) -> list[Scenario]:
    """The scenarios of a setting with seed 0, each attacked one after its control."""
    return load_sweep(SCENARIOS / f"gauntlet_{setting}.toml", seed=0).scenarios


def clean_rounds(scenario: Scenario, setting: str) -> int:
    """How many rounds each run of its setting begins with in which nobody attacks."""
    if scenario.is_control:
        scenario = scenarios(setting)[-1]
    return int(scenario.schedule.get("from_round", {}).get("first", 0))


def gains(results: Sequence[Scores]) -> dict[tuple[str, ...], float]:
    """By how much the attack works in each cell (its `KEYS`), the mean over its runs."""
    found: dict[tuple[str, ...], list[float]] = {}
    for run in results:
        if not run.scenario.is_control:
            found.setdefault(tuple(run.cell.values()), []).append(run.gain)
    return {cell: float(np.mean(each)) for cell, each in found.items()}


def _nulls(results: Sequence[Scores]) -> dict[tuple[object, ...], list[Scores]]:
    """The runs that share a null: those of a task, a partition and a way of drawing clients."""
    groups: dict[tuple[object, ...], list[Scores]] = {}
    for run in results:
        key = (run.scenario.task, run.cell["partition"], run.scenario.clients_per_round is not None)
        groups.setdefault(key, []).append(run)
    return groups


def _evaluated(
    detector: str, null: Sequence[pd.DataFrame], tested: Sequence[tuple[Scores, pd.DataFrame]]
) -> pd.DataFrame:
    """The figures of one detector, its thresholds set on the null, per update and per client."""
    scores = pd.concat([frame.assign(**run.cell) for run, frame in tested], ignore_index=True).assign(detector=detector)
    free = pd.concat(null, ignore_index=True).assign(detector=detector)
    how = "last" if detector in LOOKS_BACK else "mean"
    parts = [evaluate(scores, KEYS, free).assign(per="update")]
    parts.append(evaluate(per_client(scores, KEYS, how), KEYS, per_client(free, (), how)).assign(per="client"))
    return pd.concat(parts, ignore_index=True)


def _panels(calibrating: Sequence[Scores], tested: Sequence[Scores]) -> list[pd.DataFrame]:
    """The panel under the three nulls of `calibrate`: attack-free runs, the run's first rounds, each cohort itself."""
    built = panel()
    assert isinstance(built, Panel)
    fitted, scores = built.fitted([run.seen for run in calibrating])
    each = np.split(scores, np.cumsum([len(run.seen.values) for run in calibrating])[:-1])
    null = [_panelled(run, of_run) for run, of_run in zip(calibrating, each, strict=True)]
    tables = [_evaluated(PANEL, null, [(run, _panelled(run, fitted.scores(run.seen))) for run in tested])]
    for name, judge in ((STRETCH, _by_stretch), (COHORT, _by_cohort)):
        judged = [(run, flags) for run in tested if (flags := judge(built, run))]
        for metric in RATES:
            frames = [_panelled(r, f[metric]).assign(**r.cell, detector=name) for r, f in judged if metric in f]
            if frames:
                tables.append(_flagged(pd.concat(frames, ignore_index=True), metric))
    return tables


def _by_stretch(built: Panel, run: Scores) -> dict[str, np.ndarray]:
    """Whom the panel flags [row] at each rate, its null being the run's clean first rounds, where they are enough."""
    seen = run.seen
    clean = seen.positions < clean_rounds(run.scenario, run.setting)
    if not clean.any():
        return {}
    part = Observed(seen.positions[clean], seen.clients[clean], seen.features, seen.values[clean], seen.heard)
    flags = {}
    try:
        fitted, null = built.fitted([part])
        scores = fitted.scores(seen)
        for metric, fpr in sorted(RATES.items(), reverse=True):  # the rarer one needs more scores
            flags[metric] = (scores > rank_threshold(null, fpr, "")).astype(float)
    except InputError:  # too few
        pass
    return flags


def _by_cohort(built: Panel, run: Scores) -> dict[str, np.ndarray]:
    """Whom the panel flags [row] at each rate where each cohort is its own null."""
    seen, scores = run.seen, built.scores(run.seen)
    cohorts = [scores[seen.positions == position] for position in range(int(seen.positions.max()) + 1)]
    flags = {}
    for metric, fpr in RATES.items():
        thresholds = np.array([nominal_threshold(cohort, fpr) for cohort in cohorts])
        flags[metric] = (scores > thresholds[seen.positions]).astype(float)
    return flags


def _panelled(run: Scores, scores: np.ndarray) -> pd.DataFrame:
    """The updates of a run with a panel's scores or flags (1) of what it saw [row]; not comparable: +inf, flagged."""
    known = run.arrays["answers"][run.arrays["detectors"].tolist().index(PANEL)][0].astype(np.float64)
    known[np.isfinite(known)] = scores  # NaN where it could not say
    return run.updates(known, np.isinf(known) | (known == 1))


def _flagged(scores: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Shares of malicious and of benign ones that a calibrated detector flags, per update and per client."""
    answered = scores.assign(score=scores["flag"].astype(float))  # a client's last flag is its last score
    rows = []
    for per, table in (("update", _poisoned_or_benign(answered)), ("client", per_client(answered, KEYS, "last"))):
        for key, cell in table.groupby([*KEYS, "detector", "malicious"], sort=False):
            values = cell.groupby("seed")["score"].mean().to_numpy()
            low, high = bootstrap(values)
            name = f"{'tpr' if key[-1] else 'fpr'}_{metric}"
            row = dict(zip([*KEYS, "detector"], key[:-1], strict=True)) | {"per": per, "metric": name, "bound": ""}
            row |= {"value": values.mean(), "low": low, "high": high, "seeds": len(values)}
            if name.startswith("fpr") and not cell["score"].any():
                limit = 1 - 0.05 ** (1 / len(cell))
                row |= {"value": limit, "low": 0.0, "high": limit, "bound": "<="}
            rows.append(row)
    return pd.DataFrame(rows)


def _poisoned_or_benign(updates: pd.DataFrame) -> pd.DataFrame:
    return updates[updates["malicious"] | ~updates["compromised"]]
