"""After training: what is counted and refused, which channels go, which weights, and what a backdoor makes of it."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from gradlens.errors import InputError
from gradlens.mitigation import (
    adjust_extreme_weights,
    aggregate_ranks,
    aggregate_votes,
    begin,
    channel_activations,
    fine_tune,
    lied,
    prune,
    pruned_layer,
    ranks_of,
    trigger_channels,
    votes_of,
    without_channels,
    without_extreme_weights,
)
from simulations import Scenario, run
from simulations.assemble import assemble
from simulations.tasks import Task, build_model, load_task
from simulations.tasks.models import LSTM
from simulations.training import load_state, predict


class Crossed(nn.Module):
    """Two convolutions of equal width, registered before their norms, with a shortcut, and a conv - relu - norm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(4, 4, 3, padding=1, bias=False) for _ in range(2))
        self.norm1, self.norm2 = (nn.BatchNorm2d(4) for _ in range(2))
        self.first, self.conv3 = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3)
        self.norm3, self.fc = nn.BatchNorm2d(4), nn.Linear(4, 3)

    def forward(self, x):
        x = torch.relu(self.first(x))
        x = torch.relu(self.norm2(self.conv2(torch.relu(self.norm1(self.conv1(x))))) + x)
        return self.fc(self.norm3(torch.relu(self.conv3(x))).mean(dim=(2, 3)))


def sequential(norm: nn.Module | None = None) -> nn.Module:
    middle = [norm] if norm is not None else []
    return nn.Sequential(nn.Conv2d(1, 4, 3), *middle, nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 3))


def text() -> Task:
    """A task of five tokens."""
    x, y = np.zeros((2, 3), np.int64), np.zeros(2, np.int64)
    return Task("text", x, y, x, y, tuple("abcde"))


def parametrized() -> nn.Module:
    """A model whose weights are computed from others."""
    return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(1, 4, 3)), nn.Flatten(), nn.Linear(144, 3))


def made(name: str) -> nn.Module:
    """A model for digits, its numbers and running statistics at random, so that nothing is 0 by chance."""
    torch.manual_seed(0)
    if name in ("mlp", "cnn"):
        model = build_model(load_task("digits"), name)
    else:
        norms = {"batch": nn.BatchNorm2d(4), "bare": nn.BatchNorm2d(4, affine=False), "group": nn.GroupNorm(2, 4)}
        model = Crossed() if name == "crossed" else sequential(norms.get(name))
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand_like(tensor) - 0.3).abs_() if tensor.dim() == 1 else None
    return model.eval()


def nothing(model: nn.Module) -> dict[str, float]:
    """A measure that gives nothing."""
    return {}


MODELS = {  # name -> the layer that is pruned, and what comes after it
    "mlp": ("fc1", "fc1"),
    "cnn": ("conv2", "conv2"),
    "plain": ("0", "0"),
    "batch": ("0", "1"),
    "bare": ("0", "1"),
    "group": ("0", "1"),
    "crossed": ("conv3", "norm3"),
}


@pytest.fixture(scope="module")
def x() -> np.ndarray:
    return load_task("digits").x_test[:40]


def given_by(model: nn.Module, layer: str, x: np.ndarray) -> torch.Tensor:
    """What a layer gives for x: [channel, ...]."""
    seen = []
    handle = model.get_submodule(layer).register_forward_hook(lambda m, i, output: seen.append(output.detach()))
    with torch.no_grad():
        model.eval()(torch.tensor(x))
    handle.remove()
    return seen[0].movedim(1, 0)


def unchanged(model: nn.Module, before: dict[str, torch.Tensor]) -> bool:
    hooks = sum(len(each._forward_hooks) + len(each._forward_pre_hooks) for each in model.modules())
    return hooks == 0 and all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return copy.deepcopy(model.state_dict())


# What is sent -------------------------------------------------------------------------------------------------

ACTIVATIONS = np.array([[0.5, 0.0, 2.0, 0.1], [0.4, 0.1, 3.0, 0.0], [0.6, 0.0, 1.0, 0.2]])


def test_ranks_and_votes_by_hand():
    ranks = ranks_of(ACTIVATIONS)
    assert ranks.tolist() == [[2, 0, 3, 1], [2, 1, 3, 0], [2, 0, 3, 1]]
    assert votes_of(ACTIVATIONS, 0.25).tolist() == [[0, 1, 0, 0], [0, 0, 0, 1], [0, 1, 0, 0]]
    by_rank, by_vote = aggregate_ranks(ranks), aggregate_votes(votes_of(ACTIVATIONS, 0.25), share=0.25)
    assert by_rank.order.tolist() == [1, 3, 0, 2]
    np.testing.assert_allclose(by_rank.scores, [2, 1 / 3, 3, 2 / 3])
    assert by_vote.order.tolist() == [1, 3, 0, 2]
    np.testing.assert_allclose(by_vote.scores, [0, 2 / 3, 0, 1 / 3])
    assert repr(by_rank) == "PruningOrder(4 channels, first 1, 3, 0, 2; 3 of 3 clients counted)"


def test_what_cannot_be_counted_is_refused_with_a_reason():
    sent = {
        "a": [2, 0, 3, 1],
        "nan": [2, np.nan, 3, 1],
        "twice": [0, 0, 3, 1],
        "huge": [2, 0, 3e9, 1],
        "short": [1, 0],
        "text": ["2", "0", "3", "1"],
        "ragged": [[1], [2, 3]],
        "object": [None, 0, 1, 2],
        "missing": None,
        "complex": [2j, 0, 3, 1],
        "b": np.array([3, 1, 2, 0], np.int8),
    }
    found = aggregate_ranks(sent, num_channels=4)
    assert found.counted == ("a", "b")
    assert set(found.refused) == set(sent) - {"a", "b"}
    assert found.refused["nan"] == "channel 1 is not finite"
    assert found.refused["twice"] == "no order of 0 to 3"
    assert found.refused["short"] == "expected 4 channels, found the shape (2,)"
    assert found.refused["missing"] == "expected numbers, found nothing"
    np.testing.assert_allclose(found.scores, [2.5, 0.5, 2.5, 0.5])
    votes = {"a": [1, 0, 0, 0], "all": [1, 1, 1, 1], "two": [2, 0, 0, 0], "half": [0.5, 0.5, 0, 0]}
    counted = aggregate_votes(votes, num_channels=4, share=0.25)
    assert counted.counted == ("a",)
    assert counted.refused["all"] == "expected 1 votes, found 4"
    assert counted.refused["two"] == counted.refused["half"] == "expected 0 and 1 only"


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: aggregate_ranks({"a": [0, 0]}, num_channels=2), "no client's can be counted .a: no order of 0 to 1."),
        (lambda: aggregate_ranks(np.zeros((0, 3))), "no client sent any"),
        (lambda: aggregate_votes({"a": [0, 1]}), "rows of named clients need num_channels, found None"),
        (lambda: aggregate_ranks([[0, 1]]), r"expected an array \[client, channel\]"),
        (lambda: votes_of(ACTIVATIONS, 0.0), "share is above 0"),
        (lambda: ranks_of(np.array([[0.0, np.nan]])), r"found nan at \[0, 1\]"),
    ],
)
def test_errors_say_what_was_found(call, says):
    with pytest.raises(InputError, match=says):
        call()


@given(st.integers(2, 9), st.integers(2, 12), st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_one_client_moves_a_mean_by_its_share_at_most(clients, channels, seed):
    rng = np.random.default_rng(seed)
    ranks = ranks_of(rng.normal(size=(clients, channels)))
    honest, shuffled = aggregate_ranks(ranks), aggregate_ranks(ranks[rng.permutation(clients)])
    np.testing.assert_array_equal(honest.order, shuffled.order)
    assert sorted(honest.order.tolist()) == list(range(channels))
    assert (np.diff(honest.scores[honest.order]) >= 0).all()
    lie = ranks.copy()
    lie[0] = rng.permutation(channels)
    assert np.abs(aggregate_ranks(lie).scores - honest.scores).max() <= (channels - 1) / clients + 1e-12
    votes = aggregate_votes((ranks < channels // 2).astype(int))
    assert (np.diff(votes.scores[votes.order]) <= 0).all()


def test_a_liar_turns_its_order_round_or_shields_channels():
    turned = ranks_of(lied(ACTIVATIONS, [1]))
    assert turned[1].tolist() == (3 - ranks_of(ACTIVATIONS)[1]).tolist()
    assert turned[[0, 2]].tolist() == ranks_of(ACTIVATIONS)[[0, 2]].tolist()
    shielded = ranks_of(lied(ACTIVATIONS, [0, 2], protected=[1, 3]))
    assert shielded[0].tolist() == [0, 2, 1, 3]
    assert ACTIVATIONS[0].tolist() == [0.5, 0.0, 2.0, 0.1]
    assert trigger_channels(np.array([1.0, 0, 3, 0]), np.array([1.0, 5, 2, 1]), 2).tolist() == [1, 3]


# What is pruned -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_activations_are_the_mean_positive_part_after_the_norm(name, x):
    model, (layer, after) = made(name), MODELS[name]
    before = state(model)
    positive = given_by(model, after, x).double().clamp(min=0).flatten(1).mean(dim=1)
    if name == "crossed":  # the positive part comes before this norm, and a negative mean after it
        assert (positive >= 0).all()
    for batch_size in (7, 1_000):
        np.testing.assert_allclose(channel_activations(model, x, layer, batch_size), positive, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(channel_activations(model, torch.tensor(x)), positive, rtol=1e-5, atol=1e-7)
    assert unchanged(model, before)


@pytest.mark.parametrize("name", MODELS)
def test_a_pruned_channel_gives_0_and_no_other_changes(name, x):
    model, (layer, after) = made(name), MODELS[name]
    assert pruned_layer(model) == layer
    before, as_it_was = state(model), given_by(model, after, x)
    pruned = without_channels(model, [0, 2], x)
    now = given_by(pruned, after, x)
    assert as_it_was[[0, 2]].abs().flatten(1).amax(dim=1).min() > 0
    assert not now[[0, 2]].any()
    assert torch.isfinite(pruned(torch.tensor(x))).all()
    assert unchanged(model, before)
    rest = [channel for channel in range(len(now)) if channel not in (0, 2)]
    if name != "group":  # a group norm sees its other channels
        assert torch.equal(now[rest], as_it_was[rest])
    changed = {key for key, tensor in pruned.state_dict().items() if not torch.equal(tensor, before[key])}
    assert {key.rpartition(".")[0] for key in changed} == {layer, after}


def test_the_norm_is_found_by_what_it_sees_not_by_its_place(x):
    model = made("crossed")
    for layer, norm in (("conv1", "norm1"), ("conv2", "norm2")):
        changed = without_channels(model, [1], x, layer)
        assert not given_by(changed, norm, x)[1].any()
        other = "norm2" if norm == "norm1" else "norm1"
        assert torch.equal(changed.get_submodule(other).weight, model.get_submodule(other).weight)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (
            lambda m, x: pruned_layer(LSTM(text())),
            "besides the final one .fc., found Embedding, LSTM, Linear",
        ),
        (lambda m, x: pruned_layer(nn.Sequential(nn.ReLU())), "found ReLU"),
        (lambda m, x: pruned_layer(m, "4"), "expected one of 0 .not the last., found '4'"),
        (lambda m, x: without_channels(m, [4], x), "0 has the channels 0 to 3, found 4"),
        (lambda m, x: channel_activations(m, x[:0]), "found none"),
        (lambda m, x: without_extreme_weights(m, 0.0), "delta must be a positive number"),
        (lambda m, x: without_extreme_weights(m, 3.0, ["7"]), "found '7'"),
        (lambda m, x: prune(begin(m, nothing), [1, 1], len, x), "some come twice"),
        (lambda m, x: prune(begin(m, nothing), [1], lambda m: 1.0, x, budget=float("nan")), "budget must be a share"),
        (lambda m, x: fine_tune(begin(m, nothing), lambda m: None), "found NoneType"),
        (lambda m, x: fine_tune(begin(m, nothing), lambda m: m, rounds=0), "at least one"),
        (lambda m, x: without_channels(parametrized(), [0], x), "remove its parametrization"),
    ],
)
def test_what_cannot_be_done_is_one_line(call, says, x):
    with pytest.raises(InputError, match=says) as error:
        call(sequential(), x)
    assert "\n" not in str(error.value)


def alive(model: nn.Module) -> int:
    return int((model.get_submodule("0").weight.flatten(1) != 0).any(dim=1).sum())


def test_pruning_stops_at_the_budget(x):
    """An accuracy that falls by 3 points a channel, from 0.9: a budget of 2 allows none, of 7 two."""
    model = made("batch")
    before = state(model)

    def accuracy(m: nn.Module) -> float:
        return 0.9 - 0.03 * (4 - alive(m))

    for budget, pruned, reached in ((0.02, (), 0.9), (0.07, (1, 3), 0.84), (1.0, (0, 1, 3), 0.81)):
        done = prune(
            begin(model, lambda m: {"main_accuracy": accuracy(m), "asr": 0.5}), [3, 1, 0, 2], accuracy, x, budget=budget
        )
        row = done.table.iloc[-1]
        assert done.pruned == {"0": pruned, "1": pruned}
        assert row["main_accuracy"] == row["validation_accuracy"] == pytest.approx(reached)
        assert (row["pruned"], row["kept"]) == (len(pruned), 4 - len(pruned))
        assert alive(done.model) == 4 - len(pruned)
    assert unchanged(model, before)
    assert done.table["step"].tolist() == ["none", "pruning"]
    assert list(done.table) == ["step", "setting", "main_accuracy", "asr", "validation_accuracy", "pruned", "kept"]
    again = prune(prune(begin(model, nothing), [3], accuracy, x, budget=1), [3, 1], accuracy, x, budget=0.04)
    assert again.pruned["0"] == (1, 3)
    assert prune(begin(model, nothing), [0, 1], lambda m: float("nan"), x).pruned["0"] == ()


def test_pruned_channels_stay_at_0_through_fine_tuning(x):
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.LeakyReLU(), nn.Flatten(), nn.Linear(4 * 36, 3))
    calls = []

    def train(m: nn.Module) -> nn.Module:
        calls.append(m)
        m.train()
        loss = nn.functional.cross_entropy(m(torch.tensor(x)), torch.tensor([0, 1] * 20))
        steps = torch.autograd.grad(loss, list(m.parameters()))
        with torch.no_grad():
            for parameter, gradient in zip(m.parameters(), steps, strict=True):
                parameter -= 0.1 * gradient
        return m

    pruned = prune(begin(model, nothing), [2, 0], lambda m: 1.0, x)
    before = state(pruned.model)
    tuned = fine_tune(pruned, train, rounds=3)
    assert len(calls) == 3
    assert unchanged(pruned.model, before)
    out = given_by(tuned.model, "1", x)
    assert not out[[0, 2]].any()
    assert out[[1, 3]].any()
    assert not torch.equal(tuned.model[4].weight, model[4].weight)
    assert tuned.table["step"].tolist() == ["none", "pruning", "fine-tuning"]
    assert tuned.table["pruned"].tolist() == [0, 2, 2]
    assert repr(tuned) == "Mitigation(Sequential after none, pruning (0, budget 2 points), fine-tuning (3 rounds))"


# Which weights are set to 0 -----------------------------------------------------------------------------------


@given(st.integers(0, 2**31), st.floats(0.5, 4), st.booleans())
@settings(max_examples=40, deadline=None)
def test_extreme_weights_against_a_naive_oracle(seed, delta, broken):
    rng = np.random.default_rng(seed)
    weights = rng.standard_t(2, size=(6, 9)).astype(np.float32) + np.float32(0.3)
    weights[2] = 0  # a pruned unit
    if broken:
        weights[0, :2] = np.nan, np.inf
    model = nn.Sequential(nn.Linear(9, 6), nn.ReLU(), nn.Linear(6, 3))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor(weights))
    before = state(model)
    found = without_extreme_weights(model, delta)[0].weight.detach().numpy()
    flat = [float(w) for w in weights.ravel() if np.isfinite(w) and w != 0]
    mu = sum(flat) / len(flat)
    sigma = (sum((w - mu) ** 2 for w in flat) / len(flat)) ** 0.5
    for old, new in zip(weights.ravel(), found.ravel(), strict=True):
        inside = np.isfinite(old) and abs(float(old) - mu) <= delta * sigma
        if not np.isfinite(old) or abs(abs(float(old) - mu) / sigma - delta) > 1e-9:
            assert new == (old if inside else 0)
    broken_rows = {"0.weight"} if broken else set()
    for name, tensor in model.state_dict().items():
        assert name in broken_rows or torch.equal(tensor, before[name])


@pytest.mark.parametrize(
    ("model", "layers"),
    [
        (lambda: made("cnn"), {"conv2.weight", "fc1.weight"}),
        (lambda: made("mlp"), {"fc1.weight"}),
        (lambda: made("crossed"), {"conv3.weight", "fc.weight"}),
        (lambda: LSTM(text()), {"fc.weight"}),
    ],
)
def test_adjusted_are_the_last_convolution_and_the_first_dense_layer(model, layers):
    model = model()
    changed = without_extreme_weights(model, 0.5).state_dict()
    assert {name for name, each in model.state_dict().items() if not torch.equal(each, changed[name])} == layers


def test_the_lowest_delta_within_the_budget():
    """Ten weights of 1, -1 and one of 9: each delta sets some to 0; the accuracy is a function of how many."""
    model = nn.Sequential(nn.Linear(11, 1), nn.Linear(1, 2))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, -1] * 5 + [9.0]]))
    before = state(model)

    def accuracy(m: nn.Module) -> float:
        return 0.9 - 0.01 * float((m[0].weight == 0).sum())  # type: ignore[union-attr]

    def adjusted(budget: float, deltas=(5.0, 3.0, 2.0, 0.5)):
        return adjust_extreme_weights(begin(model, nothing), accuracy, budget=budget, deltas=deltas, layers=["0"])

    # mu 9/11, sigma sqrt(91/11 - mu^2) = 2.757: 9 lies 2.97 sigma off, -1 lies 0.66, 1 lies 0.07
    for budget, said, pruned in ((0.005, "delta 3,", 0), (0.02, "delta 2,", 1), (0.5, "delta 0.5,", 6)):
        done = adjusted(budget)
        row = done.table.iloc[-1]
        assert said in row["setting"]
        assert (row["pruned"], row["kept"]) == (pruned, 11 - pruned)
        assert row["validation_accuracy"] == pytest.approx(0.9 - 0.01 * pruned)
    as_it_was = adjusted(0.005, deltas=(2.0, 0.5))
    assert "no delta within" in as_it_was.table["setting"].iloc[-1]
    assert torch.equal(as_it_was.model[0].weight, model[0].weight)  # type: ignore[index]
    assert unchanged(model, before)


# From a backdoor to what remains of it ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def backdoored(tmp_path_factory):
    """Digits: one of 10 clients boosts a backdoor of one pixel from round 10 on. The model, clients, a look at it.

    The test set in halves: one for the budget's accuracy, the other for what is reported.
    """
    attack = {"trigger": {"target_label": 1, "size": 1, "row": 0, "column": 0}, "scaling": {"factor": 10.0}}
    scenario = Scenario(
        num_clients=10, rounds=25, local_epochs=2, num_malicious=1, poison_rate=0.5, attack=attack,
        schedule={"from_round": {"first": 10}},
    )  # fmt: skip
    *_, last = run(scenario, tmp_path_factory.mktemp("backdoored") / "run").states()
    federation = assemble(scenario)
    model, task = federation.model, federation.task
    load_state(model, last)
    validation, reported = (replace(task, x_test=task.x_test[k::2], y_test=task.y_test[k::2]) for k in (0, 1))
    stamped, wanted = federation.attack.goal(reported)

    def share(m: nn.Module, images: np.ndarray, labels: np.ndarray) -> float:
        return float((predict(m, torch.tensor(images)) == labels).mean())

    def measure(m: nn.Module) -> dict[str, float]:
        return {
            "main_accuracy": share(m, reported.x_test, reported.y_test),
            "asr": share(m, stamped, wanted),
        }

    activations = np.stack([channel_activations(model, x) for x, _ in federation.honest])
    start = begin(model, measure)
    return start, activations, lambda m: share(m, validation.x_test, validation.y_test), validation.x_test


def test_the_adjustment_takes_most_of_a_backdoor_away_for_less_than_2_points(backdoored):
    start, _, accuracy, _ = backdoored
    none, adjusted = adjust_extreme_weights(start, accuracy).table.to_dict("records")
    assert none["asr"] > 0.9
    assert adjusted["asr"] < none["asr"] - 0.5
    assert adjusted["main_accuracy"] > none["main_accuracy"] - 0.02


@pytest.mark.parametrize("liars", [[], [0, 1, 2]])
def test_both_steps_work_on_ranks_and_votes_with_and_without_liars(backdoored, liars):
    """Pruning alone leaves the backdoor in; the adjustment after it does its work whoever lied."""
    start, activations, accuracy, x = backdoored
    reported = lied(activations, liars)
    for order in (aggregate_ranks(ranks_of(reported)), aggregate_votes(votes_of(reported), share=0.5)):
        pruned = prune(start, order, accuracy, x)
        both = adjust_extreme_weights(pruned, accuracy)
        none, first, second = both.table.to_dict("records")
        assert none["asr"] - 0.3 < first["asr"]
        assert second["asr"] < none["asr"] - 0.4
        assert second["main_accuracy"] > none["main_accuracy"] - 0.07
        assert accuracy(both.model) >= accuracy(start.model) - 0.04 - 1e-9
        assert first["kept"] == 32 - first["pruned"] == 32 - len(both.pruned["fc1"])
