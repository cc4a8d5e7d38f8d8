"""What a scenario is made of before its first round, and what cannot be: one line, and nothing is written."""

import sys

import pytest
import torch
from torch import nn

from gradlens.errors import InputError
from simulations.rounds import run
from simulations.scenario import Scenario
from simulations.tasks import load_task

PLAIN = Scenario(rounds=4)
ATTACKED = PLAIN.replace(
    attack={"trigger": {"size": 3}, "scaling": {"factor": 2.0}}, num_malicious=3, poison_rate=0.5, rounds=4
)


@pytest.fixture
def unseen(monkeypatch):
    """The task `unseen:task`: digits, and a model that reads the first four rows only."""
    from dataclasses import replace
    from types import ModuleType

    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(32, 10)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(x[:, :, :4].flatten(1))

    module = ModuleType("unseen")
    module.task = lambda samples, seed: replace(load_task("digits", samples, seed), name="unseen", model=Half)
    monkeypatch.setitem(sys.modules, "unseen", module)
    return "unseen:task"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"task": "digitz"}, "expected digits"),
        ({"samples_per_client": 100}, "2,000 are asked for"),
        ({"attack": {"trigger": {"size": 7}}}, "leaves images of 8 x 8"),
        ({"attack": {"trigger": {"target_label": 10}}}, "10 classes, the target is 10"),
        ({"attack": {"label_flip": {"source_label": 12}}}, "no test sample of task digits is eligible"),
        ({"partition": {"dirichlet": {"minimum": 100}}}, "need 2000 samples"),
    ],
)
def test_a_scenario_that_cannot_run_is_one_line_and_writes_nothing(tmp_path, changes, said):
    with pytest.raises(InputError) as refused:
        run(ATTACKED.replace(**changes), tmp_path / "run")
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "run").exists()


def test_a_trigger_that_the_model_cannot_see_is_refused(tmp_path, unseen):
    base = ATTACKED.replace(task=unseen, model="own", rounds=1)
    with pytest.raises(InputError, match="the model cannot see the trigger"):
        run(base.replace(attack={"trigger": {"size": 3, "row": 5}}), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert run(base, tmp_path / "run").log.model.final_bias == "head.bias"


def test_the_last_rows_that_a_strided_convolution_never_reads_are_found(tmp_path, data_root):
    """28 pixels, 5 x 5 with stride 2, then 3 x 3 with stride 2: the second never reads the first one's last row."""
    scenario = ATTACKED.replace(task=str(data_root / "fashion_mnist"), model="cnn", samples_per_client=20)
    with pytest.raises(InputError, match="the model cannot see the trigger"):
        run(scenario.replace(attack={"trigger": {"size": 1, "row": 27, "column": 27}}), tmp_path / "run")


@pytest.mark.parametrize(
    "attack",
    [
        {"trigger": {"size": 1, "row": 0, "column": 0, "value": 0.0}},  # the corner of a digit is black already
        {"label_flip": {"source_label": 7}},
    ],
)
def test_an_attack_that_changes_no_sample_is_refused(tmp_path, attack):
    with pytest.raises(InputError, match=r"changes no(ne| sample)"):
        run(ATTACKED.replace(attack=attack, poison_rate=1e-6 if "label_flip" in attack else 1.0), tmp_path / "run")
    assert not (tmp_path / "run").exists()
