"""The scores of single runs of the gauntlet: what every detector says of every update, kept in a file for each run."""

import ast
import hashlib
import inspect
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd

import gradlens
from gradlens.attribution import suspected_labels
from gradlens.detectors import DETECTORS, Detector
from gradlens.detectors.panels import Observed, Panel, panel
from gradlens.errors import CannotSay
from gradlens.log import UpdateLog
from gradlens.log.adapters import judged
from gradlens.names import named
from gradlens.run import Run
from simulations import Scenario, load_sweep, stored_scenario
from simulations.scenario import SCENARIOS
from simulations.studies.conditions import cell_of

ATTACK_FREE_SEED = 1_000  # first seed of the attack-free runs that calibrate (even seeds) and test (odd seeds)
CHOOSE_SEEDS = range(5)  # of the attacked runs on which detectors were chosen and tuned
CONFIRM_SEEDS = range(5, 10)  # of those that confirm; nothing was chosen on them
CHOOSE, CONFIRM, ATTACK_FREE = "choose", "confirm", "attack-free"  # the purpose of a run
NAMED_ROUNDS = 3  # attacked rounds in which the target label is named
NEED_SERVER_DATA = {"fltrust"}  # left out unless named: the server holds no data here
PANEL = "panel"
ANALYSIS = ("detectors", "statistics", "log")  # the packages and modules of gradlens that scores are made by
ANALYSIS_MODULES = ("scorers", "geometry", "clustering")
SAVED = 2  # counts the changes of what `analyze` saves, so that files of before are not read

DetectorNames = tuple[str, ...]


@cache
def scenarios(setting: str) -> list[Scenario]:
    """The scenarios of a setting (a name, or a scenario file) with seed 0, each attacked one after its control."""
    path = Path(setting) if setting.endswith(".toml") else SCENARIOS / f"gauntlet_{setting}.toml"
    return load_sweep(path, seed=0).scenarios


def clean_rounds(scenario: Scenario, setting: str) -> int:
    """The number of rounds before the attack begins, which is the same for all runs of a setting."""
    if scenario.is_control:
        scenario = scenarios(setting)[-1]
    return int(scenario.schedule.get("from_round", {}).get("first", 0))


def detector_names(names: Sequence[str] = ()) -> DetectorNames:
    """The detectors that take part: those named and the panel, by default all that are built in.

    Raises
    ------
    InputError
        If there is no detector of a name.
    """
    for name in names:
        named("detectors", DETECTORS, name)  # raises for an unknown one
    chosen = names or [name for name in DETECTORS if name not in NEED_SERVER_DATA]
    return tuple(dict.fromkeys([*chosen, PANEL]))


def detectors(names: DetectorNames) -> dict[str, Detector]:
    """The detectors of these names at their default settings."""
    return {name: named("detectors", DETECTORS, name)() for name in names}


def digest(names: DetectorNames) -> str:
    """Eight hexadecimal digits that change with the detectors and the code behind them, apart from its comments."""
    package = Path(gradlens.__file__).parent
    files = {file for folder in ANALYSIS for file in package.glob(f"{folder}/*.py")}
    files |= {file for name in ANALYSIS_MODULES if (file := package / f"{name}.py").exists()}
    files |= {file for name in names if name not in DETECTORS and (file := _source(name)) is not None}
    code = [ast.dump(_without_docstrings(ast.parse(file.read_text("utf-8")))) for file in sorted(files)]
    return hashlib.sha256("".join([repr((sorted(names), SAVED)), *code]).encode()).hexdigest()[:8]


def _source(name: str) -> Path | None:
    """The file of a detector from elsewhere; None where it has none."""
    builder = named("detectors", DETECTORS, name)
    builder = builder.func if isinstance(builder, partial) else builder
    try:
        return Path(inspect.getfile(cast(Any, builder)))
    except TypeError:
        return None


def _without_docstrings(tree: ast.AST) -> ast.AST:
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if not isinstance(body, list) or not body:
            continue
        if isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
            del body[0]
    return tree


@dataclass(frozen=True, eq=False)
class RunScores:
    """What every detector says of every update of one run.

    Parameters
    ----------
    scenario : Scenario
        Of the run.
    setting : str
        The setting of the gauntlet that the run belongs to.
    arrays : mapping of str to array
        What `analyze` saved.
    """

    scenario: Scenario
    setting: str
    arrays: Mapping[str, np.ndarray]

    @classmethod
    def read(cls, path: Path, scenario: Scenario, setting: str) -> "RunScores":
        """Reads the file that `analyze` wrote."""
        with np.load(path, allow_pickle=False) as file:
            return cls(scenario, setting, dict(file))

    @property
    def cell(self) -> dict[str, str]:
        """Task, setting, partition and family."""
        return cell_of(self.scenario)

    @property
    def is_attack_free(self) -> bool:
        """Whether it is one of the attack-free runs that calibrate or test, which are nobody's control."""
        return self.scenario.is_control and self.scenario.seed >= ATTACK_FREE_SEED

    @property
    def purpose(self) -> str:
        """Whether detectors were chosen on the run, or are confirmed by it; attack-free runs do neither."""
        if self.scenario.is_control:
            return ATTACK_FREE
        return CHOOSE if self.scenario.seed in CHOOSE_SEEDS else CONFIRM

    @property
    def norm(self) -> float:
        """How long poisoned updates are: their median norm, each in median norms of its round's benign updates."""
        rounds, norms, poisoned = (self.arrays[name] for name in ("round", "norms", "poisoned"))
        benign = ~(self.arrays["compromised"] | poisoned)
        medians = pd.Series(norms[benign]).groupby(rounds[benign]).median()
        return float(np.nanmedian(norms[poisoned] / medians.reindex(rounds[poisoned]).to_numpy()))

    @property
    def gain(self) -> float:
        """How far the attack works: ASR above the control's, or main accuracy below it for attacks without a target."""
        asr, control_asr, accuracy, control_accuracy = self.arrays["asr"]
        return float(control_accuracy - accuracy if np.isnan(asr) else asr - control_asr)

    @cached_property
    def observed(self) -> Observed:
        """What the panel observed in the run."""
        arrays = self.arrays
        return Observed(
            arrays["positions"],
            arrays["seen_clients"],
            tuple(arrays["features"].tolist()),
            arrays["values"],
            tuple(arrays["heard"].tolist()),
        )

    def answers(self, detector: str) -> np.ndarray:
        """The scores and the flags of a detector, float32 [2, update]; NaN where it abstains."""
        return self.arrays["answers"][self.arrays["detectors"].tolist().index(detector)]

    def updates(self, score: np.ndarray, flag: np.ndarray) -> pd.DataFrame:
        """A row per update: round, client, score, flag, abstained, malicious, compromised, begun, seed.

        Begun is what came in or after the first round with a poisoned update, in attack-free runs everything.
        """
        abstained, rounds, poisoned = np.isnan(score), self.arrays["round"], self.arrays["poisoned"]
        first = rounds[poisoned].min() if poisoned.any() else 0
        return pd.DataFrame(
            {
                "round": rounds,
                "client": self.arrays["client"],
                "score": np.where(abstained, 0, score).astype(np.float64),
                "flag": np.where(abstained, 0, flag).astype(bool),
                "abstained": np.where(abstained, "cannot say", ""),
                "malicious": poisoned,
                "compromised": self.arrays["compromised"],
                "begun": rounds >= first,
                "seed": self.scenario.seed,
            }
        )

    def scored_by(self, detector: str) -> pd.DataFrame:
        """The updates with the scores of one detector."""
        return self.updates(*self.answers(detector))


def main_accuracy(run: Run) -> float:
    """Main accuracy after the last round."""
    return float(run.metrics["main_accuracy"].iloc[-1])


def analyze(
    folder: Path, setting: str, out: Path, names: DetectorNames, control_asr: float, control_accuracy: float
) -> None:
    """Writes what the detectors say of a run, and what the panel observed in it, into one file.

    Parameters
    ----------
    folder : Path
        Of the run.
    setting : str
        Of the gauntlet.
    out : Path
        The folder that the file is written to; it is named after the run.
    names : tuple of str
        The detectors, the panel among them.
    control_asr, control_accuracy : float
        Attack success rate (NaN for a control) and main accuracy of the run's control after the last round.
    """
    run = Run.open(folder)
    judges = detectors(names)
    first = clean_rounds(stored_scenario(run), setting)
    log = judged(run.log)
    rounds, clients, norms, answers = _verdicts(log, judges)
    labels = [named_labels(log[: k + 1]) for k in range(first, min(first + NAMED_ROUNDS, len(log)))]
    judge = judges[PANEL]
    assert isinstance(judge, Panel)
    observed = judge.observed(log)
    truth = run.truth.set_index(["round", "client"]).reindex(list(zip(rounds.tolist(), clients.tolist(), strict=True)))
    asr = float(run.metrics["asr"].iloc[-1]) if "asr" in run.metrics else np.nan
    save(
        out / f"{folder.name}.npz",
        {
            "round": rounds,
            "client": clients,
            "norms": norms,
            "poisoned": truth["poisoned"].to_numpy(bool),
            "compromised": truth["compromised"].to_numpy(bool),
            "detectors": np.array(list(judges)),
            "answers": answers,
            "asr": np.array([asr, control_asr, main_accuracy(run), control_accuracy]),
            "early": np.concatenate([np.full(len(named), first + k) for k, named in enumerate(labels)]),
            "early_clients": np.concatenate([named.index.to_numpy(str) for named in labels]),
            "targets": np.concatenate([named.to_numpy() for named in labels]),
            "positions": observed.positions,
            "seen_clients": observed.clients,
            "features": np.array(observed.features),
            "values": observed.values,
            "heard": np.array(observed.heard),
        },
    )


def _verdicts(log: UpdateLog, judges: Mapping[str, Detector]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Round, client and norm [update], and scores and flags, float32 [detector, 2, update], NaN where one abstains."""
    rounds, clients, norms, answers = [], [], [], []
    for prefix in log.prefixes():
        verdicts = [prefix.verdict(judge) for judge in judges.values()]
        clients.append(verdicts[0].clients)
        rounds.append(np.full(len(verdicts[0].clients), prefix.last_index))
        of_client = pd.Series(prefix[-1].total_norms, index=prefix[-1].clients)
        norms.append(of_client.reindex(verdicts[0].clients).to_numpy(np.float64))  # NaN for one that was refused
        known = [np.nan if verdict.abstained else 1.0 for verdict in verdicts]
        pairs = [(verdict.scores * one, verdict.flags * one) for verdict, one in zip(verdicts, known, strict=True)]
        answers.append(np.array(pairs).astype(np.float32))
    return np.concatenate(rounds), np.concatenate(clients), np.concatenate(norms), np.concatenate(answers, axis=2)


def named_labels(log: UpdateLog) -> pd.Series:
    """The label that each client of the last round seems to push towards, -1 where none can be named."""
    try:
        return suspected_labels(log)["target"].fillna(-1).astype(np.int64)
    except CannotSay:
        return pd.Series(-1, index=log[-1].clients)


def save(path: Path, arrays: Mapping[str, Any]) -> None:
    """Writes the arrays of one run as a file, whole or not at all."""
    part = path.with_suffix(".part.npz")
    np.savez_compressed(part, **arrays)
    os.replace(part, path)


def unfitted_panel() -> Panel:
    """The panel as it is built, before it learns from a null."""
    built = panel()
    assert isinstance(built, Panel)
    return built
