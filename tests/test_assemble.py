"""What a scenario is made of before its first round, and what cannot be: one line, and nothing is written."""

import sys

import numpy as np
import pytest
import torch
from torch import nn

from gradlens.errors import InputError
from simulations.assemble import assemble
from simulations.rounds import run
from simulations.scenario import Scenario
from simulations.tasks import Task, load_task

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


# What a task's own model answers --------------------------------------------------------------------------------


class _Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(16, 3), nn.Linear(16, 3)

    def forward(self, x):
        return self.one(x.flatten(1)), self.other(x.flatten(1))


OWN = {
    "one logit": (lambda: flat(1), r"found float32 \[2, 1\]"),
    "more numbers than labels": (lambda: flat(5), r"found float32 \[2, 5\]"),
    "a number per pixel": (lambda: nn.Conv2d(1, 3, 3, padding=1), r"found float32 \[2, 3, 4, 4\]"),
    "two answers": (_Two, "found a tuple"),
    "short numbers": (lambda: flat(3).bfloat16(), "cannot answer 2 samples of task own: .*dtype"),
    "lazy": (lambda: nn.Sequential(nn.Flatten(), nn.LazyLinear(3)), "lazy layers"),
}


def flat(classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(16, classes))


def own_task(model):
    rng = np.random.default_rng(0)
    x, y = rng.random((200, 1, 4, 4), np.float32), rng.integers(3, size=200)
    return Task("own", x[:150], y[:150], x[150:], y[150:], ("a", "b", "c"), model=model)


@pytest.mark.parametrize("kind", OWN)
@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_an_own_model_that_does_not_answer_a_number_per_class_is_one_line_before_training(kind, monkeypatch):
    model, message = OWN[kind]
    monkeypatch.setattr("simulations.assemble.load_task", lambda *_, **__: own_task(model))
    with pytest.raises(InputError, match=message):
        assemble(Scenario(task="digits", model="own", num_clients=4, rounds=1))


def test_an_own_model_that_answers_a_number_per_class_is_taken_and_not_changed_by_the_try(monkeypatch):
    monkeypatch.setattr("simulations.assemble.load_task", lambda *_, **__: own_task(lambda: flat(3)))
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    federation = assemble(Scenario(task="digits", model="own", num_clients=4, rounds=1))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert federation.spec.final_weight == "1.weight"
