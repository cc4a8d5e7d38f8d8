"""The two engines: one result, the refusals of each, which one `auto` takes, and compiled steps."""

import shutil
from dataclasses import replace
from functools import partial

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
    compiled_steps,
    data,
    dense,
    generators,
    learned,
    nothing_compiled,
    on_one_thread,
    references,
    refusal,
    train_of,
    words,
)
from simulations.tasks import MODELS, build_model, cross_entropy
from simulations.training import ENGINES, LocalSGD, device_for, engine_for, state_of, train_clients
from simulations.training.engine import PlainEngine
from simulations.training.stacked import StackedEngine
from test_models import images, tokens

SHAPES = {
    "mlp": (1, 28, 28),
    "cnn": (1, 28, 28),
    "bilgin_cnn": (3, 8, 8),
    "sun_cnn": (1, 10, 10),
    "wu_cnn": (1, 28, 28),
    "resnet18": (3, 12, 12),
}
STACKABLE = [name for name in MODELS if name != "lstm"]


@pytest.mark.parametrize("name", STACKABLE)
def test_the_engines_agree_on_every_model(name):
    """Two epochs with momentum and weight decay, in float64."""
    if name == "transformer":
        model, shards = build_model(tokens(), name).double(), data(shape=(6,), num_tokens=7)
        plain = learned(PlainEngine, model, shards)
        assert_agree(learned(StackedEngine, model, shards), plain, 1e-9)
        assert all(np.abs(update).max() > 0 for update in plain.values())
        return
    shape = SHAPES[name]
    model = build_model(images(*shape, classes=CLASSES), name).double()
    has_norm = any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    shards = data((4, 4) if has_norm else RAGGED, shape)
    settings = replace(SETTINGS, learning_rate=0.01)
    plain = learned(PlainEngine, model, shards, settings)
    assert_agree(learned(StackedEngine, model, shards, settings), plain, 1e-9)
    assert all(np.abs(update).max() > 0 for update in plain.values())


USERS = {
    "batch_norm": (lambda: dense(nn.BatchNorm1d(7)), (8, 4, 12)),
    "dropout": (lambda: dense(nn.Dropout(0.4)), RAGGED),
    "two_dropouts": (lambda: dense(nn.Dropout(0.4), nn.LayerNorm(7), nn.Dropout(0.2)), RAGGED),
    "dropout_and_batch_norm": (lambda: dense(nn.BatchNorm1d(7), nn.Dropout(0.4)), (8, 4, 12)),
    "whole_shares_below_a_batch": (lambda: dense(nn.BatchNorm1d(7)), (3, 3)),
    "smaller_than_a_batch": (lambda: dense(), (3, 2, 1)),
    "one_client": (lambda: dense(), (9,)),
}


@pytest.mark.parametrize("name", USERS)
def test_the_engines_agree_on_a_users_model(name):
    make, sizes = USERS[name]
    model, shards = make(), data(sizes)
    assert_agree(learned(StackedEngine, model, shards), learned(PlainEngine, model, shards))


def test_the_engines_agree_on_tokens():
    shards = data(shape=(4,), num_tokens=11)
    assert_agree(learned(StackedEngine, words(), shards), learned(PlainEngine, words(), shards))


def test_the_engines_agree_on_a_loss_of_the_users_own():
    def squared(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return (outputs - (labels[:, None] == torch.arange(CLASSES)).to(outputs)).square().sum(1)

    shards = data()
    found, expected = (learned(engine, dense(), shards, loss=squared) for engine in (StackedEngine, PlainEngine))
    assert_agree(found, expected)
    with pytest.raises(AssertionError):
        assert_agree(expected, learned(PlainEngine, dense(), shards), 1e-3)


@pytest.mark.parametrize("name", ["mlp", "cnn", "sun_cnn"])
def test_the_engines_agree_in_float32_after_a_step(name):
    shape = SHAPES[name]
    model = build_model(images(*shape, classes=CLASSES), name)
    shards = data((4, 3, 2), shape, torch.float32)
    settings = LocalSGD(epochs=1, batch_size=4, learning_rate=0.1)
    plain = learned(PlainEngine, model, shards, settings)
    assert_agree(learned(StackedEngine, model, shards, settings), plain, 1e-5)
    assert {update.dtype for update in plain.values()} == {np.dtype(np.float32)}


def test_clients_with_fewer_steps_keep_what_they_had():
    """Parameters and buffers to the last bit, however long the others go on."""
    model = dense(nn.BatchNorm1d(7))
    short, (x, y) = data((4, 40))
    few, many = (learned(StackedEngine, model, [short, (x[:size], y[:size])]) for size in (8, 40))
    for name in few:
        np.testing.assert_array_equal(few[name][0], many[name][0])
        assert (few[name][1] != many[name][1]).any()
    assert many["1.num_batches_tracked"].tolist() == [2, 20]


@BOTH
def test_nobody_learns_nothing(engine):
    model = dense(nn.BatchNorm1d(7), nn.Dropout(0.4))
    made = engine(model, cross_entropy, SETTINGS, data()[0][0], device="cpu")
    for options in ({}, {"training": train_of("norm_bound"), "references": []}):
        updates = made(state_of(model), [], [], **options)
        assert {name: update.shape for name, update in updates.items()} == {
            name: (0, *array.shape) for name, array in state_of(model).items()
        }
        assert [update.dtype for update in updates.values()] == [each.dtype for each in state_of(model).values()]


@pytest.mark.parametrize("width", [1, 2])
def test_a_stack_that_is_too_wide_is_cut(width):
    model, shards = dense(nn.Dropout(0.4)), data()
    for options in ({}, {"training": train_of("cosine"), "references": references(model, 3)}):
        made = StackedEngine(model, cross_entropy, SETTINGS, shards[0][0], device="cpu")
        expected = made(state_of(model), shards, generators(3), **options)
        made.width = width
        assert_agree(made(state_of(model), shards, generators(3), **options), expected)


@BOTH
def test_an_engine_remembers_nothing(engine):
    """Another round with another global model: what a fresh engine gives; inputs stay as they are."""
    model, shards = dense(nn.BatchNorm1d(7), nn.Dropout(0.4)), data((8, 4, 12))
    start = state_of(model)
    later = {name: array + 1 for name, array in start.items()}
    copies = {name: array.copy() for name, array in later.items()}
    used = engine(model, cross_entropy, SETTINGS, shards[0][0], device="cpu")
    used(start, shards, generators(3))
    used(start, shards[:2], generators(2, 1), training=train_of("norm_bound"), references=references(model, 2))
    fresh = engine(model, cross_entropy, SETTINGS, shards[0][0], device="cpu")
    assert_equal(used(later, shards, generators(3, 2)), fresh(later, shards, generators(3, 2)))
    assert_equal(later, copies)
    assert_equal(state_of(model), start)
    for (x, y), (same, labels) in zip(shards, data((8, 4, 12)), strict=True):
        assert torch.equal(x, same)
        assert torch.equal(y, labels)


@BOTH
def test_training_neither_draws_from_torchs_generator_nor_listens_to_it(engine):
    model, shards, found = dense(nn.Dropout(0.4)), data(), []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        found.append(learned(engine, model, shards))
        assert torch.equal(torch.get_rng_state(), before)
    assert_equal(*found)


def test_threads_change_no_bit():
    model, shards = dense(nn.BatchNorm1d(7), nn.Dropout(0.4)), data((8, 4, 12, 8, 4, 12, 8), seed=3)
    one, three = (learned(PlainEngine, model, shards, workers=workers) for workers in (1, 3))
    assert_equal(one, three)
    options = {"training": train_of("all_at_once"), "references": references(model, 7)}
    one, three = (learned(PlainEngine, model, shards, workers=workers, **options) for workers in (1, 3))
    assert_equal(one, three)
    assert_equal(
        train_clients(model, state_of(model), shards, generators(7), SETTINGS, workers=3),
        learned(PlainEngine, model, shards),
    )


# refusals


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.layers = nn.ModuleList([kind(4, 3, batch_first=True)])
        self.fc = nn.Linear(3, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.layers[0](x)[0][:, -1])


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_are_not_stacked(kind):
    model, shards = Recurrent(kind), data(shape=(3, 4), dtype=torch.float32)
    refusal(lambda: learned(StackedEngine, model, shards), "engine stacked: .*recurrent.*; the engine plain can")
    refusal(lambda: engine_for("stacked", model, cross_entropy, SETTINGS, shards), "engine stacked: .*recurrent")
    assert isinstance(engine_for("auto", model, cross_entropy, SETTINGS, shards), PlainEngine)
    assert learned(PlainEngine, model, shards)["fc.bias"].any()


def test_the_language_model_is_not_stacked():
    model, shards = build_model(tokens(), "lstm"), data(shape=(6,), num_tokens=7)
    refusal(lambda: engine_for("stacked", model, cross_entropy, SETTINGS, shards), "engine stacked: .*recurrent")


@pytest.mark.parametrize("sizes", [(8, 9), (8, 6), (3, 4), (5, 5)])
def test_batch_norm_with_smaller_last_batches_is_not_stacked(sizes):
    model, shards = dense(nn.BatchNorm1d(7)), data(sizes)
    refusal(lambda: learned(StackedEngine, model, shards), "batch norm .*samples that 4 divides, or the engine plain")


class Drawn(nn.Module):
    """Dense, with dropout by a function instead of a module."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(nn.functional.dropout(x, 0.5, self.training))


DRAWING = {
    "function": Drawn,
    "alpha_dropout": lambda: nn.Sequential(nn.AlphaDropout(0.5), nn.Linear(6, CLASSES)),
    "dropout1d": lambda: nn.Sequential(nn.Dropout1d(0.5), nn.Linear(6, CLASSES)),
    "rrelu": lambda: nn.Sequential(nn.Linear(6, CLASSES), nn.RReLU()),
}


@BOTH
@pytest.mark.parametrize("name", DRAWING)
def test_other_random_numbers_than_dropout_are_refused(engine, name):
    model, shards = DRAWING[name](), data(dtype=torch.float32)
    before = torch.get_rng_state()
    refusal(lambda: learned(engine, model, shards), r"model: it draws random numbers.*only nn\.Dropout modules")
    assert torch.equal(torch.get_rng_state(), before)


def test_an_engine_that_is_not_there():
    shards = data()
    refusal(
        lambda: engine_for("fast", dense(), cross_entropy, SETTINGS, shards),
        "engine must be one of auto, plain, stacked, found 'fast'",
    )
    assert ENGINES == ("auto", "plain", "stacked")


def test_a_device_that_is_not_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refusal(lambda: device_for("cuda"), "device: expected cpu or auto, found cuda")
    assert [str(device_for(name)) for name in ("cpu", "auto")] == ["cpu", "cpu"]


# which one


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: build_model(images(1, 8, 8, classes=CLASSES), "mlp"), StackedEngine),
        (lambda: build_model(images(1, 8, 8, classes=CLASSES), "cnn"), PlainEngine),
        (lambda: build_model(images(1, 8, 8, classes=CLASSES), "sun_cnn"), PlainEngine),
        (lambda: nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64), nn.Linear(64, CLASSES)), PlainEngine),
        (lambda: nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(64, CLASSES)), StackedEngine),
    ],
)
def test_the_engine_is_chosen_by_the_model(make, expected):
    model, shards = make(), data(shape=(1, 8, 8), dtype=torch.float32)
    made = engine_for("auto", model, cross_entropy, SETTINGS, shards)
    assert isinstance(made, expected)
    assert isinstance(engine_for("auto", model, cross_entropy, SETTINGS, shards[:1]), PlainEngine)
    for name, engine in (("plain", PlainEngine), ("stacked", StackedEngine)):
        assert isinstance(engine_for(name, model, cross_entropy, SETTINGS, shards), engine)


def test_the_language_model_trains_plainly():
    made = engine_for("auto", build_model(tokens(), "lstm"), cross_entropy, SETTINGS, data(shape=(6,), num_tokens=7))
    assert isinstance(made, PlainEngine)


@pytest.mark.parametrize("name", ["plain", "stacked", "auto"])
def test_engine_for_gives_the_engines_numbers(name):
    model, shards = dense(), data()
    made = engine_for(name, model, cross_entropy, SETTINGS, shards, workers=2)
    expected = train_clients(model, state_of(model), shards, generators(3), SETTINGS)
    assert_agree(made(state_of(model), shards, generators(3)), expected)


@pytest.mark.parametrize("name", ["stacked", "auto"])
def test_only_long_runs_are_compiled(monkeypatch, name):
    monkeypatch.setattr(shutil, "which", lambda program: f"/usr/bin/{program}")

    def compiled(**settings) -> bool:
        return engine_for(name, dense(), cross_entropy, SETTINGS, data(), **settings).compile  # type: ignore

    assert not compiled(rounds=1)
    assert not compiled(rounds=100)
    assert compiled(rounds=10**6)


@pytest.mark.parametrize(
    "make", [dense, lambda: nn.Sequential(nn.Conv2d(1, 3, 3), nn.Flatten(), nn.Linear(108, CLASSES))]
)
def test_without_a_compiler_it_says_so_and_runs(monkeypatch, make):
    monkeypatch.setattr(shutil, "which", lambda program: None)
    model, shards = make().double(), data(shape=(6,) if make is dense else (1, 8, 8))
    made = StackedEngine(model, cross_entropy, SETTINGS, shards[0][0], compile=True)
    with pytest.warns(RuntimeWarning, match=r"steps are not compiled: no C\+\+ compiler found"):
        found = made(state_of(model), shards, generators(3))
    assert_agree(found, learned(PlainEngine, model, shards))
    assert not isinstance(engine_for("auto", model, cross_entropy, SETTINGS, shards, rounds=10**6), type(None))


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
@pytest.mark.skipif(" " in torch.__file__, reason="torch compiles nothing where its own folder has a space in its name")
@pytest.mark.parametrize("kind", ["dense", "convolutions"])
def test_a_compiled_step_is_the_step(kind):
    if kind == "dense":
        model, shards = dense(nn.Dropout(0.4)).float(), data(dtype=torch.float32)
    else:
        layers = (nn.Conv2d(1, 2, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(2, 3, 3), nn.Dropout(0.4), nn.Flatten())
        model, shards = nn.Sequential(*layers, nn.Linear(12, CLASSES)), data(shape=(1, 8, 8), dtype=torch.float32)
    made = StackedEngine(model, cross_entropy, SETTINGS, shards[0][0], compile=True, largest=5, workers=2)
    for round_ in range(2):  # the second one has another global model and fewer clients, and compiles nothing again
        start = {name: array * (round_ + 1) for name, array in state_of(model).items()}
        clients = 3 - round_
        found = made(start, shards[:clients], generators(clients, round_))
        expected = train_clients(model, start, shards[:clients], generators(clients, round_), SETTINGS)
        for name, update in expected.items():
            np.testing.assert_allclose(found[name], update, rtol=0, atol=1e-6)
    assert len(compiled_steps()) == 1
    attack = {"training": train_of("all_at_once"), "references": references(model, 3)}
    start = state_of(model)
    found = made(start, shards, generators(3), attack["training"], attack["references"])  # not compiled, and the same
    for name, update in train_clients(model, start, shards, generators(3), SETTINGS, **attack).items():
        np.testing.assert_allclose(found[name], update, rtol=0, atol=1e-6)


def test_what_is_traced_for_one_model_or_loss_is_not_used_for_another():
    """Of the same shapes, one after the other is gone: an address in memory may come again."""

    class Scaled(nn.Module):
        def __init__(self, factor: float) -> None:
            super().__init__()
            self.fc, self.factor = nn.Linear(6, CLASSES), factor

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(x) * self.factor

    for factor in (1.0, 2.0, 3.0, 4.0):
        model, shards = Scaled(factor).double(), data()
        assert_agree(learned(StackedEngine, model, shards), learned(PlainEngine, model, shards))
    for weight in (1.0, 2.0):
        loss = partial(weighted, weight)
        engine = StackedEngine(model, loss, SETTINGS, shards[0][0], key="one")
        expected = train_clients(model, state_of(model), shards, generators(3), SETTINGS, loss=loss)
        assert_agree(engine(state_of(model), shards, generators(3)), expected)


def weighted(weight: float, out: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return weight * cross_entropy(out, y)
