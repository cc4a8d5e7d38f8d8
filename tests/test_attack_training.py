"""Attacks on training: penalties, gradients and projections of one client's tensors, and what hides final layers."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gradlens.errors import InputError
from gradlens.log import ModelSpec
from simulations.attacks import ATTACKS, Reference, Training, build_attack
from simulations.attacks.hidden_layers import hiding
from simulations.attacks.local_training import constrain_and_scale, neurotoxin, norm_bound, own_training
from test_attack_sending import flat, rows_of
from test_attacks import PARAMETERS, STATE, reference, send, updates_of


def tensors(vector) -> dict[str, torch.Tensor]:
    """Parameters of the small model from 23 numbers, float64."""
    return {
        name: torch.tensor(array[0], dtype=torch.float64)
        for name, array in rows_of(np.asarray(vector)[None]).items()
        if name in PARAMETERS
    }


def vector(parameters: Mapping[str, torch.Tensor]) -> np.ndarray:
    return torch.cat([parameters[name].flatten() for name in PARAMETERS]).numpy()


def train_of(attack) -> Training:
    assert attack.train is not None
    return attack.train


def hook(attack, kind: str):
    found = getattr(train_of(attack), kind)
    assert found is not None
    return found


def test_training_of_ones_own():
    assert train_of(own_training(learning_rate=0.05)) == Training(learning_rate=0.05)
    assert train_of(own_training(epochs=6)) == Training(epochs=6)


def test_the_norm_penalty_is_the_norm():
    numbers = np.arange(23.0)
    penalty = hook(constrain_and_scale(), "penalty")
    assert float(penalty(tensors(numbers), reference())) == pytest.approx(np.linalg.norm(numbers))
    train = train_of(constrain_and_scale(alpha=0.3))
    assert (train.alpha, train.needs_honest) == (0.3, False)


@pytest.mark.parametrize("scale", [0.5, 1.0, 3.0])
def test_the_cosine_penalty_by_hand(scale):
    honest, update = np.zeros(23), np.zeros(23)
    honest[0], update[:2] = 2.0, [scale * 1.2, scale * 1.6]  # cosine 0.6, lengths 2 and 2 x scale
    known = reference(honest=tensors(honest))
    found = float(hook(constrain_and_scale(penalty="cosine"), "penalty")(tensors(update), known))
    assert found == pytest.approx(1 - 0.6 * min(1, scale))  # the shorter one counts as long as the honest one
    assert train_of(constrain_and_scale(penalty="cosine")).needs_honest


def test_the_penalty_on_the_final_bias_sees_it_alone():
    known, update = reference(), tensors(np.arange(23.0))
    penalty = hook(constrain_and_scale(penalty="final_bias"), "penalty")
    expected = (update["fc2.bias"] - known.honest["fc2.bias"]).square().sum().sqrt()
    assert float(penalty(update, known)) == pytest.approx(float(expected))
    with pytest.raises(InputError, match="constrain_and_scale: the model has no final bias"):
        penalty(update, reference(final_bias=None))


@pytest.mark.parametrize("penalty", ["norm", "cosine", "final_bias"])
def test_penalties_have_a_finite_gradient_at_the_start_and_match_differences(penalty):
    function, known = hook(constrain_and_scale(penalty=penalty), "penalty"), reference()
    gradient = torch.func.grad(lambda update: function(update, known))
    for layer in gradient(tensors(np.zeros(23))).values():
        assert torch.isfinite(layer).all()
        assert layer.abs().max() < 10
    at = np.random.default_rng(0).normal(size=23) * 3
    found = vector(gradient(tensors(at)))
    steps = np.float32(1e-2) * np.eye(23)
    exact = [float(function(tensors(at + s), known) - function(tensors(at - s), known)) / 2e-2 for s in steps]
    np.testing.assert_allclose(found, exact, atol=2e-4)  # tensors() rounds to float32


def test_a_cosine_to_an_honest_update_of_zeros_is_finite():
    function = hook(constrain_and_scale(penalty="cosine"), "penalty")
    known = reference(honest=tensors(np.zeros(23)))
    assert float(function(tensors(np.ones(23)), known)) == 1


def absolute(update: Mapping[str, torch.Tensor], known: Reference) -> torch.Tensor:
    return torch.stack([tensor.abs().sum() for tensor in update.values()]).sum()


def test_a_penalty_of_ones_own():
    attack = constrain_and_scale(penalty="test_attack_training:absolute")
    assert float(hook(attack, "penalty")(tensors(np.full(23, -2.0)), reference())) == 46
    assert train_of(attack).needs_honest


@pytest.mark.parametrize(
    ("penalty", "found"),
    [
        ("l2", "expected norm, cosine, final_bias or module:function, found 'l2'"),
        ("no_such_module:f", "cannot import 'no_such_module:f'"),
    ],
)
def test_an_unknown_penalty_is_one_line(penalty, found):
    with pytest.raises(InputError, match=f"^constrain_and_scale: penalty: {found}"):
        constrain_and_scale(penalty=penalty)


def test_constrain_and_scale_scales_at_sending():
    attack = constrain_and_scale(factor=5.0)
    trained = updates_of(2, seed=0)
    np.testing.assert_allclose(flat(send(attack, trained, {})), 5 * flat(trained), rtol=1e-6)
    assert constrain_and_scale().send is None
    assert constrain_and_scale(alpha=1.0).train is None


@given(norm=st.floats(1e-3, 1e3), bound=st.floats(1e-3, 1e3))
def test_a_norm_bound_holds(norm, bound):
    direction = np.random.default_rng(1).normal(size=23)
    update = tensors(norm * direction / np.linalg.norm(direction))
    found = vector(hook(norm_bound(bound=bound), "project")(update, reference()))
    assert np.linalg.norm(found) <= bound * (1 + 1e-9)
    length = np.linalg.norm(vector(update))
    np.testing.assert_allclose(found, vector(update) * min(1, bound / length), rtol=1e-9)


def test_a_norm_bound_leaves_zeros_and_says_how_often():
    project = hook(norm_bound(bound=0.33, every=7), "project")
    np.testing.assert_array_equal(vector(project(tensors(np.zeros(23)), reference())), 0)
    assert train_of(norm_bound(every=7)).every == 7


@pytest.mark.parametrize(("ratio", "masked"), [(0.0, 0), (0.05, 1), (0.2, 5), (1.0, 22)])
def test_neurotoxin_stays_off_the_largest_changes(ratio, masked):
    previous = np.random.default_rng(2).permutation(23) - 11.0  # -11 ... 11, one of them 0
    gradient = hook(neurotoxin(ratio=ratio), "gradient")
    found = vector(gradient(tensors(np.ones(23)), reference(previous=tensors(previous))))
    assert (found == 0).sum() in (masked, masked + 1)  # 11 and -11 tie, and so do all pairs
    smallest = np.sort(np.abs(previous))[::-1][masked - 1] if masked else np.inf
    np.testing.assert_array_equal(found, np.where((np.abs(previous) >= smallest) & (previous != 0), 0.0, 1.0))


def test_neurotoxin_trains_everything_in_the_first_round():
    gradient = hook(neurotoxin(ratio=0.5), "gradient")
    found = gradient(tensors(np.arange(23.0)), reference(previous=tensors(np.zeros(23))))
    np.testing.assert_array_equal(vector(found), np.arange(23.0))


def test_neurotoxin_counts_over_all_parameters():
    previous = np.zeros(23)
    previous[12:15] = [5, -6, 7]  # the bias of the first layer
    gradient = hook(neurotoxin(ratio=2 / 23), "gradient")
    found = vector(gradient(tensors(np.ones(23)), reference(previous=tensors(previous))))
    np.testing.assert_array_equal(np.flatnonzero(found == 0), [13, 14])


@pytest.mark.parametrize("how", ["frozen", "mean", "drawn"])
@pytest.mark.parametrize(("layers", "frozen"), [("bias", ["fc2.bias"]), ("final", ["fc2.weight", "fc2.bias"])])
def test_hidden_layers_are_frozen_in_training(how, layers, frozen):
    gradient = hook(hiding(how=how, layers=layers), "gradient")
    found = gradient(tensors(np.ones(23)), reference())
    assert [name for name in PARAMETERS if not found[name].any()] == frozen
    assert hiding(how="clipped", layers=layers).train is None


def sends(layers: str, **changes):
    trained, others = updates_of(2, seed=0), updates_of(4, seed=1)
    hidden = ["fc2.bias"] if layers == "bias" else ["fc2.weight", "fc2.bias"]
    return trained, others, hidden, lambda how: send(hiding(how=how, layers=layers), trained, others, **changes)


@pytest.mark.parametrize("layers", ["bias", "final"])
def test_what_is_sent_instead_of_hidden_layers(layers):
    trained, others, hidden, sent_by = sends(layers)
    for how in ("frozen", "clipped", "mean", "drawn"):
        sent = sent_by(how)
        for name in STATE:
            if name not in hidden:
                np.testing.assert_array_equal(sent[name], trained[name])
    for name in hidden:
        assert not sent_by("frozen")[name].any()
        low, high = others[name].min(axis=0), others[name].max(axis=0)
        np.testing.assert_array_equal(sent_by("clipped")[name], np.minimum(np.maximum(trained[name], low), high))
        mean = np.broadcast_to(others[name].mean(axis=0), trained[name].shape)
        np.testing.assert_allclose(sent_by("mean")[name], mean, rtol=1e-6, atol=1e-7)


def test_drawn_layers_have_the_others_mean_and_covariance():
    trained = {name: np.repeat(update, 20_000, axis=0) for name, update in updates_of(1, seed=0).items()}
    others = updates_of(5, seed=1)
    sent = send(hiding(layers="final"), trained, others)
    parts = [
        np.concatenate([np.asarray(updates[name], np.float64).reshape(len(updates[name]), -1)
                        for name in ("fc2.weight", "fc2.bias")], axis=1)
        for updates in (sent, others)
    ]  # fmt: skip
    # standard errors with 20,000 draws: 0.007 of a standard deviation, 0.01 of a variance
    np.testing.assert_allclose(parts[0].mean(axis=0), parts[1].mean(axis=0), atol=0.05)
    np.testing.assert_allclose(np.cov(parts[0].T), np.cov(parts[1].T), atol=0.15)


def test_a_draw_is_the_mean_plus_a_combination_of_the_others():
    trained, others, _, sent_by = sends("bias", rng=np.random.default_rng(4))
    weights = np.random.default_rng(4).normal(size=(2, 4))
    centred = others["fc2.bias"].astype(np.float64) - others["fc2.bias"].mean(axis=0, dtype=np.float64)
    expected = others["fc2.bias"].mean(axis=0) + weights @ centred / np.sqrt(3)
    np.testing.assert_allclose(sent_by("drawn")["fc2.bias"], expected, rtol=1e-5, atol=1e-6)
    assert len(trained["fc2.bias"]) == 2


def test_one_other_gives_its_own_and_none_what_was_trained():
    trained, other = updates_of(2, seed=0), updates_of(1, seed=1)
    for how in ("mean", "drawn", "clipped"):
        found = send(hiding(how=how), trained, other)["fc2.bias"]
        np.testing.assert_allclose(found, np.repeat(other["fc2.bias"], 2, axis=0), rtol=1e-6)
        np.testing.assert_array_equal(send(hiding(how=how), trained, {})["fc2.bias"], trained["fc2.bias"])
    assert not send(hiding(how="frozen"), trained, {})["fc2.bias"].any()


def test_a_model_without_a_final_bias():
    state = {name: array for name, array in STATE.items() if name != "fc2.bias"}
    model = ModelSpec.of(state, buffers=["norm.mean", "norm.count"])
    trained, others = updates_of(2, seed=0), updates_of(3, seed=1)
    with pytest.raises(InputError, match="hiding: the model has no final bias"):
        send(hiding(), trained, others, model=model)
    with pytest.raises(InputError, match="hiding: the model has no final bias"):
        hook(hiding(), "gradient")(tensors(np.ones(23)), reference(final_bias=None))
    sent = send(hiding(how="mean", layers="final"), trained, others, model=model)
    np.testing.assert_allclose(sent["fc2.weight"][0], others["fc2.weight"].mean(axis=0), rtol=1e-6, atol=1e-7)
    with pytest.raises(InputError, match="hiding: the model has no final layer"):
        hook(hiding(layers="final"), "gradient")(tensors(np.ones(23)), reference(final_weight=None, final_bias=None))


MAPPED = {name: ATTACKS[name]() for name in ATTACKS if ATTACKS[name]().train} | {
    penalty: constrain_and_scale(penalty=penalty) for penalty in ("cosine", "final_bias")
}


@pytest.mark.parametrize("attack", MAPPED.values(), ids=list(MAPPED))
def test_hooks_can_be_mapped_over_clients(attack):
    """What a stacked engine does with them: the same numbers as one client after another."""
    train, known = train_of(attack), reference(torch.float32)
    many = {layer: torch.tensor(array) for layer, array in updates_of(3, seed=6).items() if layer in PARAMETERS}
    honest = {layer: tensor.flip(0) for layer, tensor in many.items()}

    def of(function, update, theirs):
        return function(update, replace(known, honest=theirs))

    hooks = [train.gradient, train.project, train.penalty and torch.func.grad(train.penalty)]
    for function in filter(None, hooks):
        mapped = torch.func.vmap(partial(of, function))(many, honest)
        for client in range(3):
            one = of(function, *({name: each[client] for name, each in parts.items()} for parts in (many, honest)))
            for layer in PARAMETERS:
                torch.testing.assert_close(mapped[layer][client], one[layer])


def test_a_hidden_bias_goes_with_a_norm_bound():
    train = train_of(build_attack({"hiding": {"how": "frozen"}, "norm_bound": {"bound": 0.1}, "trigger": {}}))
    assert train.gradient is not None
    assert train.project is not None
    assert train.every == 10
