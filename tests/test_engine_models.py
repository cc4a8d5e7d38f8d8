"""What engines make of dropout, whose masks have an address, and of models and data that users bring."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from learning import (  # noqa: F401 - two fixtures
    BOTH,
    CLASSES,
    RAGGED,
    SETTINGS,
    assert_agree,
    assert_equal,
    data,
    dense,
    generators,
    learned,
    norms,
    nothing_compiled,
    on_one_thread,
    refusal,
    train_of,
    unless_refused,
)
from simulations.tasks import cross_entropy
from simulations.training import LocalSGD, buffers, engine_for, load_state, predict, prepared, state_of, train_clients
from simulations.training.engine import PlainEngine
from simulations.training.networks import Masks, dropouts
from simulations.training.stacked import StackedEngine

# dropout


def masks_of(*rates: float, shape=(6,), address=(7, 0, 0)) -> Masks:
    """The masks that a client with that address draws for dropouts of those rates, all on samples of 6 numbers."""
    model = prepared(nn.Sequential(*map(nn.Dropout, rates)), torch.zeros(2, *shape))
    return Masks(list(dropouts(model).values()), np.random.default_rng(address))


def test_masks_are_their_address():
    first, second = masks_of(0.5, 0.2), masks_of(0.5, 0.2)
    for batch in (4, 4, 1):
        for one, two in zip(first.draw(batch), second.draw(batch), strict=True):
            assert one.shape == (batch, 6)
            assert torch.equal(one, two)
    rng = np.random.default_rng([7, 0, 0])
    rng.random(1000)
    assert torch.equal(Masks(first.layers, rng).draw(4)[0], masks_of(0.5, 0.2).draw(4)[0])


def test_masks_differ_between_steps_clients_rounds_and_layers():
    masks = masks_of(0.5, 0.5, shape=(40,))
    drawn = [*masks.draw(4), *masks.draw(4)]
    drawn += [masks_of(0.5, shape=(40,), address=address).draw(4)[0] for address in ((7, 0, 1), (7, 1, 0), (8, 0, 0))]
    for position, one in enumerate(drawn):
        for other in drawn[:position]:
            assert 40 < (one != other).sum() < 120  # 80 on average, standard deviation 6
    assert (drawn[0][0] != drawn[0][1]).any()  # and between samples


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5, 0.9])
def test_a_dropouts_rate_is_the_share_of_zeros(rate):
    (mask,) = masks_of(rate, shape=(1000,)).draw(40)
    kept = mask > 0
    assert torch.equal(mask, kept / (1 - rate))
    assert float(kept.float().mean()) == pytest.approx(1 - rate, abs=4.5 * np.sqrt(rate * (1 - rate) / 40_000))
    assert float(mask.mean()) == pytest.approx(1, abs=4.5 * np.sqrt(rate / (1 - rate) / 40_000) + 1e-6)


class Shown(nn.Module):
    """x, masked twice, times a weight: with loss = output the gradient of the weight is the mean of x times masks."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Dropout(0.5), nn.Dropout(0.25)
        self.weight = nn.Parameter(torch.zeros(40, dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x)) * self.weight


@BOTH
def test_engines_use_the_masks_of_each_clients_address(engine):
    """Steps of one sample: the update is minus the sum of their masks."""
    shards = [(torch.ones(size, 40, dtype=torch.float64), torch.zeros(size, dtype=torch.int64)) for size in (3, 2)]
    updates = learned(
        engine, Shown(), shards, LocalSGD(batch_size=1, learning_rate=1.0), loss=lambda outputs, _: outputs.sum(1)
    )
    for client, steps in enumerate((3, 2)):
        masks = masks_of(0.5, 0.25, shape=(40,), address=(7, 0, client))
        expected = sum(first * second for first, second in (masks.draw(1) for _ in range(steps)))
        np.testing.assert_allclose(updates["weight"][client], -expected[0].numpy(), rtol=1e-6)


@BOTH
def test_dropout_changes_no_batch_order(engine):
    """A dropout that keeps everything gives what no dropout gives, to the last bit."""
    shards = data()
    without = learned(engine, dense(nn.Identity()), shards)
    assert_equal(learned(engine, dense(nn.Dropout(0.0)), shards), without)
    with pytest.raises(AssertionError):
        assert_equal(learned(engine, dense(nn.Dropout(0.1)), shards), without)


def test_dropout_changes_no_batch_order_of_the_plain_engine():
    seen: dict[bool, list] = {}
    x, _ = data((9,))[0]
    for has_dropout in (True, False):
        model = dense(nn.Dropout(0.4)) if has_dropout else dense(nn.Identity())
        order = seen.setdefault(has_dropout, [])
        train_clients(
            model,
            state_of(model),
            [(x, torch.arange(9) % CLASSES)],
            generators(1),
            SETTINGS,
            observe=lambda _, labels, order=order: order.append(labels.tolist()),
        )
    assert seen[True] == seen[False]


def test_a_model_is_measured_without_masks():
    model = dense(nn.Dropout(0.4))
    x = data((20,))[0][0]
    ours = prepared(model, x[:2])
    for slot in dropouts(ours).values():
        setattr(slot.layer, slot.name, torch.zeros(6, 7))  # as training left it, of another batch size
    assert torch.equal(ours.eval()(x), model.eval()(x))
    np.testing.assert_array_equal(predict(ours, x), predict(model, x))
    assert list(state_of(ours)) == list(state_of(model))
    assert buffers(ours) == buffers(model) == []


def test_preparing_copies_the_model():
    model = dense(nn.Dropout(0.4), nn.BatchNorm1d(7))
    start = state_of(model)
    ours = prepared(model, data()[0][0][:2])
    assert isinstance(model[1], nn.Dropout)
    assert_equal(state_of(ours), start)  # the batch that it was tried on left nothing in its buffers
    load_state(ours, {name: array + 1 for name, array in start.items()})
    assert_equal(state_of(model), start)


# what users bring


class TwoBiases(nn.Module):
    """Two parameters whose gradient is one and the same tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, CLASSES, bias=False)
        self.one, self.two = nn.Parameter(torch.zeros(CLASSES)), nn.Parameter(torch.zeros(CLASSES))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x) + (self.one + self.two)


class Summed(nn.Module):
    """A parameter whose gradient is one number, expanded."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, CLASSES)
        self.scales = nn.Parameter(torch.ones(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x) * self.scales.sum()


@pytest.mark.parametrize("make", [TwoBiases, Summed])
@pytest.mark.parametrize("engine", [PlainEngine, StackedEngine])
def test_momentum_is_of_each_parameter_alone(engine, make):
    model, shards = make().double(), data()
    settings = replace(SETTINGS, weight_decay=0.0)
    expected = {name: [] for name in state_of(model)}
    start = state_of(model)
    for (x, y), rng in zip(shards, generators(3), strict=True):
        load_state(model, start)
        optimizer = torch.optim.SGD(model.parameters(), lr=settings.learning_rate, momentum=settings.momentum)
        for _ in range(settings.epochs):
            for batch in np.split(rng.permutation(len(y)), range(4, len(y), 4)):
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
                optimizer.step()
        for name, array in state_of(model).items():
            expected[name].append(array - start[name])
    load_state(model, start)
    assert_agree(learned(engine, model, shards, settings), {name: np.stack(each) for name, each in expected.items()})


@BOTH
def test_frozen_parameters_stay(engine):
    model, shards = dense(), data()
    model[0].weight.requires_grad_(False)
    updates = learned(engine, model, shards)
    assert not updates["0.weight"].any()
    assert updates["2.weight"].any()


class HalfUsed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.spare = nn.Linear(6, CLASSES), nn.Linear(2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x)


@pytest.mark.parametrize("engine", [PlainEngine, StackedEngine])
def test_parameters_that_nothing_uses_stay(engine):
    model, shards = HalfUsed().double(), data()
    updates = learned(engine, model, shards, replace(SETTINGS, weight_decay=0.0))
    assert not updates["spare.weight"].any()
    assert updates["fc.weight"].any()


class Reused(nn.Module):
    """One dropout used twice, as many models have it."""

    def __init__(self, first: int, second: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(6, first), nn.Linear(first, second)
        self.fc3, self.dropout = nn.Linear(second, CLASSES), nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.dropout(torch.relu(self.fc1(x)))
        return self.fc3(self.dropout(torch.relu(self.fc2(x))))


class Twice(Shown):
    """x, masked twice by one dropout, times a weight."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.first(self.first(x)) * self.weight


@BOTH
def test_one_dropout_may_be_used_on_two_shapes(engine):
    model, shards = Reused(7, 8).double(), data()
    assert learned(engine, model, shards)["fc1.weight"].any()


@BOTH
def test_one_dropout_may_have_two_names(engine):
    dropout = nn.Dropout(0.5)
    assert learned(engine, dense(dropout, nn.LayerNorm(7), dropout), data())["0.weight"].any()


@BOTH
def test_one_dropout_used_twice_masks_each_time_anew(engine):
    shards = [(torch.ones(1, 40, dtype=torch.float64), torch.zeros(1, dtype=torch.int64))] * 10
    found = learned(engine, Twice(), shards, LocalSGD(learning_rate=1.0), loss=lambda outputs, _: outputs.sum(1))
    assert float((found["weight"] != 0).mean()) == pytest.approx(0.25, abs=0.1)


class Rows(nn.Module):
    """Dropout on samples x positions in one axis."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.dropout = nn.Linear(2, 4), nn.Linear(12, CLASSES), nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.dropout(self.fc1(x.reshape(-1, 2))).reshape(-1, 12))


@BOTH
def test_dropout_where_the_first_axis_is_not_the_samples_is_refused(engine):
    refusal(
        lambda: learned(engine, Rows().double(), data()),
        r"model: expected the dropout dropout to mask a row per sample, found the shape \(6, 4\) of 2",
    )


@pytest.mark.parametrize("sizes", [(5, 0, 4), (5, 4, 0)])
@pytest.mark.parametrize(
    "engine",
    [
        PlainEngine,
        pytest.param(StackedEngine),
    ],
)
def test_a_client_without_samples_learns_nothing(engine, sizes):
    updates = learned(engine, dense(), data(sizes))
    assert all(not update[sizes.index(0)].any() for update in updates.values())


@pytest.mark.parametrize("engine", [PlainEngine, pytest.param(StackedEngine, marks=())])
def test_what_one_client_holds_never_reaches_another(engine):
    shards = data((5, 6))
    shards[0][0][0] = float("nan")
    assert np.isfinite(learned(engine, dense(), shards)["0.weight"][1]).all()


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x) if x.sum() > 0 else self.fc(-x)


class Counting(nn.Module):
    """A buffer that is assigned anew in every step."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, CLASSES)
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.steps = self.steps + self.training
        return self.fc(x) / self.steps


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, CLASSES)
        self.fc2.weight = self.fc1.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc3(self.fc2(torch.relu(self.fc1(x))))


UNFIT = {
    "branching": Branching,
    "tied_weights": Tied,
    "instance_norm": lambda: nn.Sequential(
        nn.Unflatten(1, (3, 2)), nn.InstanceNorm1d(3, track_running_stats=True), nn.Flatten(), nn.Linear(6, CLASSES)
    ),
    "batch_norm_without_momentum": lambda: dense(nn.BatchNorm1d(7, momentum=None)),
}


@pytest.mark.parametrize("name", UNFIT)
def test_what_cannot_be_stacked_is_refused_or_right(name):
    model, shards = UNFIT[name]().double(), data((8, 4, 12) if name.startswith("batch_norm") else RAGGED)
    expected = learned(PlainEngine, model, shards)
    found = unless_refused(lambda: learned(StackedEngine, model, shards))
    assert_agree(found or expected, expected)
    made = engine_for("auto", model, cross_entropy, SETTINGS, shards)
    assert_agree(made(state_of(model), shards, generators(3)), expected)


@BOTH
def test_a_buffer_may_be_assigned_anew(engine):
    model, shards = Counting().double(), data()
    found = unless_refused(lambda: learned(engine, model, shards))
    if found is not None:
        assert found["steps"].tolist() == [6, 2, 4]
        alone = engine(model, cross_entropy, SETTINGS, shards[0][0], device="cpu")
        last = alone(state_of(model), shards[2:], generators(3)[2:])
        np.testing.assert_allclose(found["fc.weight"][2], last["fc.weight"][0], rtol=0, atol=1e-12)


def test_auto_takes_a_loss_that_cannot_be_mapped():
    def squared(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return (outputs - nn.functional.one_hot(labels, CLASSES)).square().sum(1)

    shards, model = data(), dense()
    found = engine_for("auto", model, squared, SETTINGS, shards)(state_of(model), shards, generators(3))
    assert_agree(found, learned(PlainEngine, model, shards, loss=squared))
    assert all(update[client].any() for update in found.values() for client in range(3))


@pytest.mark.parametrize("engine", [PlainEngine, StackedEngine])
def test_a_hook_that_needs_no_reference_needs_none(engine):
    updates = learned(engine, dense(), data(), training=train_of("tight_norm_bound"))
    assert (norms(updates, updates) <= 0.05 * (1 + 1e-9)).all()


@pytest.mark.parametrize("sizes", [(1, 4), (4, 9)])
def test_batch_norm_of_a_single_sample_is_one_line(sizes):
    model, shards = dense(nn.BatchNorm1d(7)), data(sizes)
    refusal(lambda: learned(PlainEngine, model, shards), "batch norm")
