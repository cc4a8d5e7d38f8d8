"""Names from outside: `module:function` and entry points, and neither code nor a file from a stored run."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest

import simulations
from gradlens.errors import InputError
from gradlens.names import nothing_imported
from gradlens.run import Run
from simulations import Scenario, label_counts, measure_of, run, stored_scenario
from simulations.scenario import load_sweep
from simulations.tasks import build_model, load_task

OWN = """
from dataclasses import replace
from functools import partial

import numpy as np
from torch import nn

from gradlens.detectors import score_by
from gradlens.aggregators import mean
from gradlens.scorers import robust_zscore
from gradlens.statistics import layer_norms
from simulations.attacks import Attack, Schedule
from simulations.partition import Split
from simulations.tasks import load_task


def digits(samples, seed):
    return replace(load_task("digits", samples, seed), name="own digits")


def flat(task):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))


def reversed_update(factor: float = 2.0):
    return Attack(send=lambda trained, others, _: {name: -factor * array for name, array in trained.items()})


def stretches(shift: int = 0):
    def split(task, num_clients, rng):
        return Split(np.array_split(np.roll(np.arange(len(task.y_train)), shift), num_clients))
    return split


def nobody():
    return lambda task, num_clients, rng: Split([np.arange(0)] * num_clients)


def half():
    return lambda task, num_clients, rng: "half of them"


def odd():
    return Schedule(lambda turn: turn.index % 2 == 1)


def loud(threshold: float = 4.0):
    return score_by(layer_norms, robust_zscore, threshold=threshold)


def average():
    return mean()


def unusual(task, x, y):
    return x.sum(axis=(1, 2, 3))


def needs(value):
    return value
"""
NAMED = {
    "task": "own_names:digits", "model": "own_names:flat", "partition": {"own_names:stretches": {"shift": 3}},
    "attack": {"own_names:reversed_update": {"factor": 3.0}}, "schedule": "own_names:odd",
    "aggregator": "own_names:average", "detector": {"own_names:loud": {"threshold": 5.0}},
}  # fmt: skip
BASE = {"rounds": 2, "num_clients": 4, "num_malicious": 1, "samples_per_client": 20}
TOML = """
rounds = 2
num_clients = 4
num_malicious = 1
samples_per_client = 20
task = "own_names:digits"
model = "own_names:flat"
partition = { "own_names:stretches" = { shift = 3 } }
attack = { "own_names:reversed_update" = { factor = 3 } }
schedule = "own_names:odd"
aggregator = "own_names:average"
detector = { "own_names:loud" = { threshold = 5 } }
"""


@pytest.fixture(autouse=True)
def own_names(tmp_path, monkeypatch):
    """A module `own_names` of the user's own, and `evil`, which leaves a file where it is imported."""
    (tmp_path / "own_names.py").write_text(OWN)
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'imported')!r}, 'w').close()\n{OWN}")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    for name in ("own_names", "evil"):
        sys.modules.pop(name, None)


def test_every_name_of_a_scenario_may_be_a_function(tmp_path):
    scenario = Scenario(**BASE, **NAMED)
    (tmp_path / "own.toml").write_text(TOML)
    assert Scenario.load(tmp_path / "own.toml") == scenario == Scenario(**scenario.settings)
    assert load_sweep(tmp_path / "own.toml").scenarios == [scenario]
    assert scenario.partition == {"own_names:stretches": {"shift": 3}}
    assert scenario.label("attack") == "own_names:reversed_update(factor=3)"
    found = run(scenario, tmp_path / "run")
    assert found.log.model.num_parameters == 650
    assert set(found.verdicts["detector"]) == {"own_names:loud(threshold=5)"}
    assert found.truth.groupby("round")["poisoned"].sum().tolist() == [0, 1]
    control = run(scenario.control, tmp_path / "control")
    (attacker,) = (found.log[1].clients == found.truth["client"][found.truth["poisoned"]].item()).nonzero()[0]
    sent, honest = (each.log[1].updates["1.bias"][attacker] for each in (found, control))
    assert sent == pytest.approx(-3 * honest)


@pytest.mark.parametrize(
    ("settings", "found"),
    [
        ({"attack": {"own_names:reversed_update": {"factr": 3.0}}}, "'factr' is no setting; did you mean factor"),
        ({"attack": {"own_names:reversed_update": {"factor": "3"}}}, "factor: expected float, found '3'"),
        ({"attack": {"own_names:reversed_update": {"factor": float("nan")}}}, "factor: expected a finite number"),
        ({"attack": "own_names:odd"}, "own_names:odd must build an Attack, found a Schedule"),
        ({"schedule": "own_names:loud"}, "schedule: own_names:loud builds no schedule, found a"),
        ({"partition": "own_names:odd"}, "partition: own_names:odd builds no partition, found a Schedule"),
        ({"partition": "own_names:needs"}, "partition: needs() missing 1 required positional argument: 'value'"),
        ({"detector": "own_names:quiet"}, "detector: cannot import 'own_names:quiet'"),
        ({"model": "no_such_module:f"}, "model: cannot import 'no_such_module:f'"),
        ({"aggregator": "builtins:dict"}, "aggregator: builtins:dict does not say what settings it has"),
    ],
)
def test_what_is_none_is_one_line(settings, found):
    with pytest.raises(InputError) as refused:
        Scenario(**BASE, **settings)
    assert found in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("settings", "found"),
    [
        ({"partition": "own_names:nobody"}, "own_names:nobody must give each of 4 clients at least one sample"),
        ({"partition": "own_names:half"}, "own_names:half must return a Split, found a str"),
        ({"model": "own_names:digits"}, "digits() missing 1 required positional argument"),
    ],
)
def test_what_turns_out_to_be_none_writes_nothing(tmp_path, settings, found):
    with pytest.raises((InputError, TypeError)) as refused:
        run(Scenario(**BASE, **settings), tmp_path / "run")
    assert found in str(refused.value)
    assert not (tmp_path / "run").exists()


ENTRY_POINTS = {
    "attacks": "reversed_update", "tasks": "digits", "partitions": "stretches", "schedules": "odd", "models": "flat",
    "detectors": "loud", "aggregators": "average",
}  # fmt: skip


@pytest.fixture
def package(tmp_path):
    """What pip leaves of a package that adds `their_...` by entry points, beside `own_names`."""
    information = tmp_path / "their_names-1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: their-names\nVersion: 1.0\n")
    groups = (f"[gradlens.{kind}]\ntheir_{name} = own_names:{name}\n" for kind, name in ENTRY_POINTS.items())
    (information / "entry_points.txt").write_text("\n".join(groups))


def test_an_installed_package_adds_names(tmp_path, package):
    scenario = Scenario(
        **BASE, task="their_digits", model="their_flat", partition="their_stretches",
        attack={"their_reversed_update": {"factor": 3}}, schedule="their_odd", aggregator="their_average",
        detector="their_loud",
    )  # fmt: skip
    assert scenario.attack == {"their_reversed_update": {"factor": 3.0}}
    found = run(scenario, tmp_path / "run")
    assert found.log.model.num_parameters == 650
    assert stored_scenario(found) == scenario  # what the user installed is no code of the run
    with nothing_imported():
        assert label_counts(scenario)["count"].sum() == 80


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A run of plain names, to be rewritten."""
    return run(Scenario(**BASE, attack="trigger"), tmp_path_factory.mktemp("stored") / "run").path


def saying(folder, **settings) -> Run:
    """The run, as if its `run.json` named something else."""
    found = Run.open(folder)
    scenario = json.loads(json.dumps(found.scenario | settings))
    return replace(found, header=dict(found.header) | {"scenario": scenario})


EVIL = [
    {"task": "evil:digits"},
    {"model": "evil:flat"},
    {"partition": {"evil:stretches": {}}},
    {"attack": {"evil:reversed_update": {}}},
    {"schedule": {"evil:odd": {}}},
    {"aggregator": {"evil:average": {}}},
    {"detector": {"evil:loud": {}}},
    {"attack": {"edge_case": {"rule": "evil:unusual"}}},
    {"attack": {"trigger": {}, "constrain_and_scale": {"penalty": "evil:unusual"}}},
]


@pytest.mark.parametrize("settings", EVIL, ids=str)
def test_a_stored_run_imports_nothing(stored, tmp_path, settings):
    found = saying(stored, **settings)
    with pytest.raises(InputError) as refused:
        stored_scenario(found)
    assert "evil:" in str(refused.value)
    assert "--trust-code" in str(refused.value)
    assert str(found.path) in str(refused.value)
    assert "\n" not in str(refused.value)
    for build in (label_counts, measure_of):  # what the command line does, under the same guard
        with pytest.raises(InputError, match="trust-code"), nothing_imported():
            build(Scenario(**found.scenario))
    assert "evil" not in sys.modules
    assert not (tmp_path / "imported").exists()


@pytest.mark.parametrize("settings", EVIL[:7], ids=str)
def test_a_stored_run_that_is_trusted_imports_what_it_names(stored, tmp_path, settings):
    scenario = stored_scenario(saying(stored, **settings), trust_code=True)
    assert label_counts(scenario)["count"].sum() == 80
    if "task" not in settings:
        assert "evil" in sys.modules
    assert (tmp_path / "imported").exists()


def test_what_is_remembered_of_trusted_code_is_refused_as_well():
    scenario = Scenario(**BASE, **NAMED)
    label_counts(scenario)
    with nothing_imported():
        for build in (
            lambda: load_task("own_names:digits", 80, 0),
            lambda: build_model(load_task("digits"), "own_names:flat"),
            lambda: label_counts(scenario),
            lambda: measure_of(scenario),
        ):
            with pytest.raises(InputError, match="trust-code"):
                build()


def test_a_folder_that_holds_a_run_with_code_of_its_own_is_compared_without_it(stored, tmp_path, monkeypatch):
    evil = saying(stored, task="evil:digits")
    monkeypatch.setattr("simulations.rounds.Run.open", lambda folder: evil)
    with pytest.raises(InputError, match="another scenario, which differs in task"):
        run(Scenario(**BASE, attack="trigger"), stored)
    assert not (tmp_path / "imported").exists()


def test_a_stored_run_gives_its_scenario_back(stored):
    assert stored_scenario(Run.open(stored)) == Scenario(**BASE, attack="trigger")
    with pytest.raises(InputError, match="expected a simulated run, found one that was recorded elsewhere"):
        stored_scenario(replace(Run.open(stored), header={}))


@pytest.mark.parametrize("code", ["import simulations", "from simulations.scenario import Scenario; Scenario()"])
def test_without_torch_it_is_one_line(code):
    program = f"import sys; sys.modules['torch'] = None\n{code}"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        "gradlens.errors.InputError: simulations need torch: pip install 'gradlens-forensics[simulations]'"
    )


def test_the_public_names():
    assert all(hasattr(simulations, name) for name in simulations.__all__)
    assert {"stored_scenario", "label_counts", "attack_success", "run"} <= set(simulations.__all__)
