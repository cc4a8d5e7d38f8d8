"""What is measured: attack success on eligible held-out samples, and which labels each client holds."""

import numpy as np
import torch
from torch import nn

from simulations.assemble import assemble
from simulations.measure import attack_goal, attack_success, label_counts
from simulations.scenario import Scenario
from simulations.tasks import load_task
from simulations.training import state_of

PLAIN = Scenario(rounds=4)
ATTACKED = PLAIN.replace(
    attack={"trigger": {"size": 3}, "scaling": {"factor": 2.0}}, num_malicious=3, poison_rate=0.5, rounds=4
)


class Says(nn.Module):
    """A model that always answers `label`, whatever it is shown; it remembers what that was."""

    def __init__(self, label: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(nn.functional.one_hot(torch.tensor(label), 10).float())
        self.shown: list[torch.Tensor] = []

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.shown.append(images)
        return self.bias.expand(len(images), 10)


def test_attack_success_counts_eligible_held_out_samples_only():
    task = load_task("digits")
    goal = attack_goal(ATTACKED.replace(attack={"trigger": {"size": 2}}))
    always, never = Says(1), Says(2)
    assert attack_success(goal, always, state_of(always)) == 1.0
    assert attack_success(goal, never, state_of(never)) == 0.0
    shown = torch.cat(always.shown)
    assert len(shown) == (task.y_test != 1).sum()
    assert (shown[:, :, 2:4, 2:4] == 1).all()
    goal = attack_goal(ATTACKED.replace(attack={"label_flip": {"source_label": 7, "target_label": 1}}))
    always.shown.clear()
    assert attack_success(goal, always, state_of(always)) == 1.0
    np.testing.assert_array_equal(torch.cat(always.shown).numpy(), task.x_test[task.y_test == 7])
    assert np.isnan(attack_success(attack_goal(PLAIN), always, state_of(always)))


def test_label_counts_are_those_of_the_data():
    table = label_counts(PLAIN.replace(partition="dirichlet"))
    task = load_task("digits")
    assert list(table.columns) == ["client", "label", "count"]
    assert len(table) == 20 * 10
    totals = table.groupby("label")["count"].sum()
    assert [totals[str(digit)] for digit in range(10)] == np.bincount(task.y_train).tolist()
    federation = assemble(PLAIN.replace(partition="dirichlet"))
    assert table.groupby("client")["count"].sum().tolist() == [len(y) for _, y in federation.honest]
