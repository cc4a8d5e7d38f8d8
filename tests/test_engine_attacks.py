"""Attacks on training are what they are defined to be, in both engines."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from learning import (  # noqa: F401 - two fixtures
    BOTH,
    PARTS,
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
    references,
    train_of,
)
from simulations.attacks import ATTACKS, Training, build_attack
from simulations.training import load_state, state_of
from simulations.training.engine import PlainEngine
from simulations.training.stacked import StackedEngine

every_attack = pytest.mark.parametrize("name", PARTS)


def naive(model, shards, training: Training, known) -> dict[str, np.ndarray]:
    """The definition of `Training` step by step, around torch's own optimizer."""
    start = state_of(model)
    epochs, rate = training.epochs or SETTINGS.epochs, training.learning_rate or SETTINGS.learning_rate
    rows: dict[str, list[np.ndarray]] = {name: [] for name in start}
    for (x, y), rng, reference in zip(shards, generators(len(shards)), known, strict=True):
        load_state(model, start)
        parameters = dict(model.train().named_parameters())
        optimizer = torch.optim.SGD(parameters.values(), lr=rate, momentum=SETTINGS.momentum)
        batches = [
            batch
            for _ in range(epochs)
            for batch in np.split(rng.permutation(len(y)), range(SETTINGS.batch_size, len(y), SETTINGS.batch_size))
        ]
        for number, batch in enumerate(batches, 1):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x[batch]), y[batch])
            if training.penalty:
                so_far = {name: each - torch.tensor(start[name]) for name, each in parameters.items()}
                loss = training.alpha * loss + (1 - training.alpha) * training.penalty(so_far, reference)
            loss.backward()
            for each in parameters.values():
                each.grad = (torch.zeros_like(each) if each.grad is None else each.grad) + 0.01 * each.detach()
            if training.gradient:
                changed = training.gradient({name: each.grad for name, each in parameters.items()}, reference)
                for name, each in parameters.items():
                    each.grad = changed[name].clone()
            optimizer.step()
            if training.project and (number % training.every == 0 or number == len(batches)):
                with torch.no_grad():
                    so_far = {name: each - torch.tensor(start[name]) for name, each in parameters.items()}
                    for name, each in training.project(so_far, reference).items():
                        parameters[name].copy_(torch.tensor(start[name]) + each)
        for name, array in state_of(model).items():
            rows[name].append(array - start[name])
    load_state(model, start)
    return {name: np.stack(each) for name, each in rows.items()}


def test_no_attack_on_training_is_missing_here():
    named = {part for parts in PARTS.values() for part in parts}
    assert {"own_training", *(name for name in ATTACKS if ATTACKS[name]().train)} <= named


@every_attack
@BOTH
def test_attacks_on_training_are_their_definition(name, engine):
    model, shards = dense(), data()
    known = references(model, 3)
    expected = naive(model, shards, train_of(name), known)
    assert_agree(learned(engine, model, shards, training=train_of(name), references=known), expected)
    with pytest.raises(AssertionError):  # each does change something
        assert_agree(learned(PlainEngine, model, shards), expected, 1e-6)


@pytest.mark.parametrize("name", ["norm_bound", "cosine", "all_at_once"])
def test_attacks_on_training_go_with_dropout_and_batch_norm(name):
    model, shards = dense(nn.BatchNorm1d(7), nn.Dropout(0.4)), data((8, 4, 12))
    options = {"training": train_of(name), "references": references(model, 3)}
    assert_agree(learned(StackedEngine, model, shards, **options), learned(PlainEngine, model, shards, **options))


@BOTH
@pytest.mark.parametrize("every", [1, 4, 100])
def test_a_norm_bound_ends_inside_its_ball(engine, every):
    model, shards = dense(nn.BatchNorm1d(7)).float(), data((8, 4, 12), dtype=torch.float32)
    train = build_attack({"norm_bound": {"bound": 0.05, "every": every}}).train
    found = norms(
        learned(engine, model, shards, training=train, references=references(model, 3)),
        [name for name, _ in model.named_parameters()],
    )
    assert (found <= 0.05 * (1 + 1e-5)).all()
    assert (found > 0.04).all()


@BOTH
def test_neurotoxin_leaves_masked_numbers_where_they_were(engine):
    model, shards = dense(), data()
    known = references(model, 3)
    updates = learned(engine, model, shards, training=train_of("neurotoxin_of_half"), references=known)
    sizes = {name: each.abs().numpy() for name, each in known[0].previous.items()}
    middle = np.median(np.concatenate([size.ravel() for size in sizes.values()]))
    for name, size in sizes.items():
        assert (updates[name][:, size > middle] == 0).all()
        assert (updates[name][:, size < middle] != 0).mean() > 0.9


@BOTH
@pytest.mark.parametrize("layers", ["bias", "final"])
def test_hidden_layers_are_not_trained(engine, layers):
    model, shards = dense(), data()
    train = build_attack({"hiding": {"how": "drawn", "layers": layers}}).train
    updates = learned(engine, model, shards, training=train, references=references(model, 3))
    hidden = ["2.bias"] if layers == "bias" else ["2.weight", "2.bias"]
    assert [name for name, update in updates.items() if not update.any()] == hidden


@BOTH
def test_training_of_ones_own_is_a_run_with_those_settings(engine):
    model, shards = dense(nn.Dropout(0.4)), data()
    found = learned(engine, model, shards, training=train_of("own_training"), references=references(model, 3))
    assert_equal(found, learned(engine, model, shards, replace(SETTINGS, learning_rate=0.02, epochs=3)))


@BOTH
def test_a_penalty_without_weight_changes_nothing(engine):
    model, shards = dense(), data()
    assert build_attack({"constrain_and_scale": {"alpha": 1.0, "factor": 2.0}}).train is None
    train = replace(train_of("cosine"), alpha=1.0)
    assert_agree(
        learned(engine, model, shards, training=train, references=references(model, 3)),
        learned(engine, model, shards),
        1e-12,
    )
