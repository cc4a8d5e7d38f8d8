"""Attacks: one contract over all of them, and how parts compose."""

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from gradlens.errors import InputError
from gradlens.log import ModelSpec
from simulations.attacks import (
    ATTACKS,
    NEXT_STAGE,
    Attack,
    Pool,
    Reference,
    Situation,
    Training,
    build_attack,
    compose,
    in_order,
)
from simulations.partition import Split
from simulations.tasks import Task

LETTERS = " abcdefghijklmnopqrstuvwxyzAP"
STATE = {
    "fc1.weight": np.zeros((3, 4), np.float32),
    "fc1.bias": np.zeros(3, np.float32),
    "norm.mean": np.zeros(3, np.float32),
    "norm.count": np.array(7, np.int64),
    "fc2.weight": np.zeros((2, 3), np.float32),
    "fc2.bias": np.zeros(2, np.float32),
}
MODEL = ModelSpec.of(STATE, buffers=["norm.mean", "norm.count"])
PARAMETERS = MODEL.parameters


def image_task(**changes: Any) -> Task:
    """80 training and 40 test images of 2 x 8 x 10 pixels in ten classes, and six striped ones kept apart."""
    rng = np.random.default_rng(7)
    fields = {
        "name": "tiny images",
        "x_train": rng.random((80, 2, 8, 10), dtype=np.float32),
        "y_train": np.arange(80) % 10,
        "x_test": rng.random((40, 2, 8, 10), dtype=np.float32),
        "y_test": np.arange(40) % 10,
        "label_names": tuple("0123456789"),
        "extras": {"racing_stripes": rng.random((6, 2, 8, 10), dtype=np.float32)},
    }
    return Task(**(fields | changes))


def text_task(**changes: Any) -> Task:
    """Windows of 40 characters, followed by one."""
    rng = np.random.default_rng(8)
    fields = {
        "name": "tiny text",
        "x_train": rng.integers(len(LETTERS), size=(50, 40)),
        "y_train": rng.integers(len(LETTERS), size=50),
        "x_test": rng.integers(len(LETTERS), size=(30, 40)),
        "y_test": np.arange(30) % len(LETTERS),
        "label_names": tuple(LETTERS),
        "encode": lambda text: np.array([LETTERS.index(letter) for letter in text]),
    }
    return Task(**(fields | changes))


def table_task() -> Task:
    """The tiny images with their pixels as features."""
    task = image_task()
    return replace(task, x_train=task.x_train.reshape(80, -1), x_test=task.x_test.reshape(40, -1))


def split_of(task: Task, num_clients: int = 4) -> Split:
    """Samples to clients in stretches, test samples too."""
    parts = (np.array_split(np.arange(len(y)), num_clients) for y in (task.y_train, task.y_test))
    return Split(*parts)


def task_for(name: str) -> Task:
    if name in ("text_trigger", "phrase_trigger"):
        return text_task()
    return table_task() if name == "feature_trigger" else image_task()


def pool_of(attack: Attack, task: Task, seed: int = 0) -> Pool | None:
    return attack.pool and attack.pool(task, split_of(task), np.random.default_rng(seed))


def updates_of(clients: int, seed: int) -> dict[str, np.ndarray]:
    """Random updates of the small model, layer -> [client, *shape]."""
    rng = np.random.default_rng([seed, clients])
    drawn = {name: rng.normal(size=(clients, *array.shape)).astype(np.float32) for name, array in STATE.items()}
    return drawn | {"norm.count": rng.integers(1, 9, size=clients)}


def situation(attackers: int = 2, others: int = 3, **changes: Any) -> Situation:
    """What attackers know; success is the mean of the final bias, clipped to [0, 1]."""
    fields: dict[str, Any] = {
        "index": 3,
        "global_model": STATE,
        "previous": None,
        "num_updates": attackers + others,
        "server_learning_rate": 1.0,
        "model": MODEL,
        "honest": lambda: updates_of(attackers, seed=5),
        "success": lambda update: float(np.clip(update["fc2.bias"].mean(), 0, 1)),
        "rng": np.random.default_rng(11),
    }
    return Situation(**(fields | changes))


def send(attack: Attack, trained: Any, others: Any, **changes: Any) -> dict[str, np.ndarray]:
    """What is sent, as a dictionary; the inputs are checked to stay as they are."""
    assert attack.send is not None
    before = [{name: array.copy() for name, array in updates.items()} for updates in (trained, others)]
    attackers = len(trained["fc2.bias"])
    sent = attack.send(trained, others, situation(attackers, len(others.get("fc2.bias", ())), **changes))
    for updates, copy in zip((trained, others), before, strict=True):
        assert_same(updates, copy)
    return dict(sent)


def assert_same(found: Any, expected: Any) -> None:
    assert list(found) == list(expected)
    for name in expected:
        np.testing.assert_array_equal(found[name], expected[name], err_msg=name)
        assert found[name].dtype == expected[name].dtype


def reference(dtype: torch.dtype = torch.float64, **changes: Any) -> Reference:
    """What a training hook may look at, of the small model."""
    previous, honest = (
        {name: torch.tensor(array[0], dtype=dtype) for name, array in updates_of(1, seed).items() if name in PARAMETERS}
        for seed in (1, 2)
    )
    fields = {"previous": previous, "honest": honest, "final_weight": "fc2.weight", "final_bias": "fc2.bias"}
    return Reference(**(fields | changes))


every_attack = pytest.mark.parametrize("name", ATTACKS)


def sender(name: str) -> Attack:
    """The attack with its defaults, where these change what is sent."""
    return ATTACKS[name](factor=2.0) if name == "scaling" else ATTACKS[name]()


every_sender = pytest.mark.parametrize("name", [name for name in ATTACKS if sender(name).send])


@every_attack
def test_poisoned_data_and_nothing_else(name):
    attack, task = ATTACKS[name](), task_for(name)
    pool = pool_of(attack, task)
    before, seen = task.x_train.copy(), task.y_train.copy()
    draw = lambda rate: attack.poison(  # noqa: E731
        task.x_train, task.y_train, rate, np.random.default_rng(3), task=task, part=1, pool=pool
    )
    x, y, chosen = draw(0.5)
    np.testing.assert_array_equal(task.x_train, before)
    np.testing.assert_array_equal(task.y_train, seen)
    assert (x.dtype, x.shape, y.dtype, y.shape) == (before.dtype, before.shape, seen.dtype, seen.shape)
    rest = np.setdiff1d(np.arange(len(y)), chosen)
    np.testing.assert_array_equal(x[rest], before[rest])
    np.testing.assert_array_equal(y[rest], seen[rest])
    if not attack.poisons:
        assert len(chosen) == 0
        return
    assert len(chosen) > 0
    np.testing.assert_array_equal(chosen, np.unique(chosen))
    assert y.min() >= 0
    assert y.max() < task.num_classes
    again = draw(0.5)
    for first, second in zip((x, y, chosen), again, strict=True):
        np.testing.assert_array_equal(first, second)
    assert len(draw(0.0)[2]) == 0
    assert set(draw(0.2)[2].tolist()) <= set(chosen.tolist()) <= set(draw(1.0)[2].tolist())
    if pool is None:
        eligible = attack.eligible(task, before, seen)
        assert abs(len(chosen) - eligible.sum() / 2) <= 0.5
        assert eligible[chosen].all()
        assert (y[chosen] != seen[chosen]).all()
    else:
        assert len(chosen) == len(y) / 2


@every_attack
def test_success_is_measured_on_held_out_samples_that_do_not_have_the_label(name):
    attack, task = ATTACKS[name](), task_for(name)
    pool = pool_of(attack, task)
    before = task.x_test.copy()
    x, labels = attack.goal(task, pool)
    np.testing.assert_array_equal(task.x_test, before)
    assert x.shape[1:] == task.input_shape
    assert (x.dtype, labels.dtype) == (task.x_test.dtype, np.int64)
    assert x.flags.writeable  # torch warns of an array that is not
    assert len(x) == len(labels)
    assert bool(len(x)) == attack.poisons
    if attack.target_label is not None:
        assert (labels == attack.target_label).all()
    if pool is None and attack.poisons:
        truth = task.y_test[attack.eligible(task, task.x_test, task.y_test)]
        assert (labels != truth).all()
    if pool is not None:
        trained = {each.tobytes() for each in pool.x}
        assert not any(each.tobytes() in trained for each in x)


@every_sender
@pytest.mark.parametrize(("attackers", "others"), [(2, 3), (1, 1), (3, 1), (2, 0)])
def test_what_is_sent(name, attackers, others):
    trained, honest = updates_of(attackers, seed=0), updates_of(others, seed=1)
    sent = send(sender(name), trained, honest)
    assert list(sent) == list(trained)
    for layer, update in trained.items():
        assert (sent[layer].shape, sent[layer].dtype) == (update.shape, update.dtype)
        assert np.isfinite(sent[layer]).all()
    if name != "layer_substitution":
        np.testing.assert_array_equal(sent["norm.count"], trained["norm.count"])
    if name not in ("layer_substitution", "scaling", "model_replacement"):
        np.testing.assert_array_equal(sent["norm.mean"], trained["norm.mean"])
    assert_same(sent, send(sender(name), trained, honest))


@every_sender
def test_nobody_rests_on_broken_clients(name):
    trained, honest, broken = updates_of(2, seed=0), updates_of(3, seed=1), updates_of(2, seed=2)
    broken["fc1.weight"][0, 0, 0], broken["norm.mean"][1, 0] = np.nan, np.inf
    mixed = {layer: np.concatenate([update, broken[layer]]) for layer, update in honest.items()}
    assert_same(send(sender(name), trained, mixed, num_updates=5), send(sender(name), trained, honest, num_updates=5))


@every_sender
def test_the_order_of_the_others_does_not_matter(name):
    if name in ("mimic", "hiding"):  # one picks by number, the other draws a weight for each
        return
    trained, honest = updates_of(2, seed=0), updates_of(5, seed=1)
    turned = {layer: update[::-1].copy() for layer, update in honest.items()}
    first, second = (send(sender(name), trained, others) for others in (honest, turned))
    for layer in trained:
        np.testing.assert_allclose(first[layer], second[layer], rtol=1e-6, atol=1e-7)


@every_attack
def test_training_hooks_keep_shapes_and_change_nothing_in_place(name):
    train = ATTACKS[name]().train or Training()
    known = reference()
    tensors = {layer: torch.tensor(array[0], dtype=torch.float64) for layer, array in updates_of(1, 3).items()}
    tensors = {layer: tensors[layer] for layer in PARAMETERS}
    copies = {layer: tensor.clone() for layer, tensor in tensors.items()}
    for hook in (train.gradient, train.project):
        made = hook(tensors, known) if hook else tensors
        assert list(made) == list(PARAMETERS)
        for layer, tensor in made.items():
            assert (tensor.shape, tensor.dtype) == (tensors[layer].shape, tensors[layer].dtype)
            assert torch.isfinite(tensor).all()
    if train.penalty:
        value = train.penalty(tensors, known)
        assert value.shape == ()
        assert value >= 0
    for layer, tensor in tensors.items():
        assert torch.equal(tensor, copies[layer])


@pytest.mark.parametrize("attack", [Attack(), build_attack({}), ATTACKS["scaling"](), ATTACKS["own_training"]()])
def test_defaults_do_nothing(attack):
    task = image_task()
    assert (attack.send, attack.train, attack.poisons, attack.parts) == (None, None, False, 1)
    x, y, chosen = attack.poison(task.x_train, task.y_train, 1.0, np.random.default_rng(0), task=task)
    assert len(chosen) == 0
    np.testing.assert_array_equal(x, task.x_train)
    np.testing.assert_array_equal(y, task.y_train)
    assert len(attack.goal(task)[0]) == 0


def test_parts_compose_in_one_order():
    parts = {"scaling": {"factor": 2.0}, "trigger": {"target_label": 3, "size": 2}, "gaussian": {}}
    attack, alone, task = build_attack(parts), ATTACKS["trigger"](target_label=3, size=2), image_task()
    assert attack.target_label == 3
    np.testing.assert_array_equal(attack.stamp(task, task.x_test, None), alone.stamp(task, task.x_test, None))
    eligible = [each.eligible(task, task.x_test, task.y_test) for each in (attack, alone)]
    np.testing.assert_array_equal(*eligible)
    trained = updates_of(2, seed=0)
    noise = send(ATTACKS["gaussian"](), trained, {})
    np.testing.assert_array_equal(send(attack, trained, {})["fc1.weight"], noise["fc1.weight"])  # noise comes last
    twice = compose(ATTACKS["scaling"](factor=2.0), ATTACKS["scaling"](factor=5.0))
    np.testing.assert_array_equal(send(twice, trained, {})["fc1.weight"], 10 * trained["fc1.weight"])


def test_the_order_of_the_table():
    order = list(ATTACKS)
    assert order[-3:] == ["hiding", "norm_cap", "copies"]
    assert order.index("writer_class") < order.index("own_training") < order.index("layer_substitution")
    assert order.index("norm_bound") < order.index("scaling") < order.index("sign_flip")


def test_a_trigger_on_one_source_class():
    attack, task = (
        build_attack({"trigger": {"target_label": 5, "size": 2}, "label_flip": {"source_label": 7}}),
        image_task(),
    )
    x, y, chosen = attack.poison(task.x_train, task.y_train, 1.0, np.random.default_rng(0), task=task)
    np.testing.assert_array_equal(chosen, np.flatnonzero(task.y_train == 7))
    assert (y[chosen] == 5).all()
    assert (x[chosen][..., 2:4, 2:4] == 1).all()


def test_a_distributed_trigger_keeps_its_parts_in_company():
    attack = build_attack({"distributed_trigger": {}, "label_flip": {"source_label": 7, "target_label": 2}, "zero": {}})
    assert attack.parts == 4
    assert attack.target_label == 2


@pytest.mark.parametrize(
    ("parts", "found"),
    [
        ({"trigger": {"target_label": 1}, "label_flip": {"target_label": 5}}, r"target label, found \[1, 5\]"),
        ({"trigger": {}, "inversion": {}}, "target label, one has a target of its own for each class"),
        ({"semantic": {}, "edge_case": {}}, "brings its own samples"),
        ({"trigger": {"target_label": 2}, "semantic": {}}, "brings its own samples"),
    ],
)
def test_parts_that_do_not_go_together(parts, found):
    with pytest.raises(InputError, match=found):
        build_attack(parts)


def test_settings_of_training_compose():
    both = compose(
        ATTACKS["own_training"](learning_rate=0.05),
        compose(ATTACKS["constrain_and_scale"](alpha=0.3, penalty="cosine"), ATTACKS["norm_bound"](every=4)),
    ).train
    assert both is not None
    assert (both.learning_rate, both.epochs, both.alpha, both.every) == (0.05, None, 0.3, 4)
    assert both.needs_honest
    assert both.penalty is not None
    assert both.project is not None


def test_gradients_and_projections_chain():
    double = Training(gradient=lambda tensors, _: {name: 2 * tensor for name, tensor in tensors.items()})
    add = Training(gradient=lambda tensors, _: {name: tensor + 1 for name, tensor in tensors.items()})
    train = compose(Attack(train=double), Attack(train=add)).train
    assert train is not None
    assert train.gradient is not None
    assert float(train.gradient({"a": torch.tensor(3.0)}, reference())["a"]) == 7
    shrink = Training(project=lambda tensors, _: {name: tensor / 4 for name, tensor in tensors.items()}, every=3)
    grow = Training(project=lambda tensors, _: {name: tensor + 8 for name, tensor in tensors.items()}, every=3)
    train = compose(Attack(train=shrink), Attack(train=grow)).train
    assert train is not None
    assert train.project is not None
    assert float(train.project({"a": torch.tensor(4.0)}, reference())["a"]) == 9


@pytest.mark.parametrize(
    ("first", "second", "found"),
    [
        (Training(penalty=lambda u, r: u["a"]), Training(penalty=lambda u, r: u["a"]), "penalty of training"),
        (Training(learning_rate=0.1), Training(learning_rate=0.2), "learning rate of training"),
        (Training(project=lambda u, r: u, every=2), Training(project=lambda u, r: u), "every 2 and every 1 steps"),
    ],
)
def test_settings_of_training_that_differ_are_refused(first, second, found):
    with pytest.raises(InputError, match=found):
        compose(Attack(train=first), Attack(train=second))


def test_a_pool_is_asked_for():
    attack, task = ATTACKS["semantic"](), image_task()
    with pytest.raises(ValueError, match="needs its pool"):
        attack.goal(task)
    with pytest.raises(ValueError, match="needs its pool"):
        attack.poison(task.x_train, task.y_train, 1.0, np.random.default_rng(0), task=task)


BAD: list[tuple[str, dict[str, Any], str]] = [
    ("trigger", {"size": 0}, "greater than or equal to 1"),
    ("trigger", {"target_label": -1}, "greater than or equal to 0"),
    ("label_flip", {"source_label": "7"}, "valid integer"),
    ("blend", {"alpha": 0.0}, "greater than 0"),
    ("blend", {"alpha": 1.5}, "less than or equal to 1"),
    ("distributed_trigger", {"parts": 0}, "greater than or equal to 1"),
    ("semantic", {"noise": -0.1}, "greater than or equal to 0"),
    ("edge_case", {"share": 0.0}, "greater than 0"),
    ("writer_class", {"targets": 0}, "greater than or equal to 1"),
    ("text_trigger", {"sentence": ""}, "at least 1 character"),
    ("phrase_trigger", {"phrase": ""}, "at least 1 character"),
    ("own_training", {"learning_rate": 0.0}, "greater than 0"),
    ("constrain_and_scale", {"alpha": 1.1}, "less than or equal to 1"),
    ("norm_bound", {"bound": float("inf")}, "finite number"),
    ("norm_bound", {"every": 0}, "greater than or equal to 1"),
    ("neurotoxin", {"ratio": 1.5}, "less than or equal to 1"),
    ("layer_substitution", {"tau": -0.1}, "greater than or equal to 0"),
    ("train_and_scale", {"bound": 0.0}, "greater than 0"),
    ("scaling", {"factor": float("inf")}, "finite number"),
    ("model_replacement", {"factor": float("nan")}, "finite number"),
    ("explicit_boosting", {"factor": "3"}, "valid number"),
    ("gaussian", {"std": -1.0}, "greater than or equal to 0"),
    ("min_max", {"direction": "up"}, "'std', 'unit' or 'sign'"),
    ("min_sum", {"direction": "up"}, "'std', 'unit' or 'sign'"),
    ("mimic", {"client": -1}, "greater than or equal to 0"),
    ("hiding", {"how": "away"}, "'frozen', 'clipped', 'mean' or 'drawn'"),
    ("hiding", {"layers": "first"}, "'bias' or 'final'"),
]


@pytest.mark.parametrize(("name", "bad", "reason"), BAD, ids=[f"{name} {bad}" for name, bad, _ in BAD])
def test_bad_settings_are_refused(name, bad, reason):
    with pytest.raises(ValidationError, match=reason):
        ATTACKS[name](**bad)


@every_attack
def test_every_attack_says_what_it_is_and_takes_plain_settings(name):
    builder: Callable[..., Attack] = ATTACKS[name]
    assert builder.__doc__
    assert builder.__doc__.strip()
    for parameter in inspect.signature(builder).parameters.values():
        assert isinstance(parameter.default, bool | int | float | str | None)


@every_attack
def test_an_attack_prints_as_the_call_that_built_it(name):
    builder = ATTACKS[name]
    settings = {key: parameter.default for key, parameter in inspect.signature(builder).parameters.items()}
    expected = f"{name}({', '.join(f'{key}={value!r}' for key, value in settings.items())})"
    assert repr(builder()) == repr(build_attack({name: {}})) == expected


def negated(factor: float = 2.0) -> Attack:
    """An attack of the user's own, made without the decorator of the built-in ones."""
    return Attack(send=lambda trained, others, _: {name: -factor * array for name, array in trained.items()})


def gray(target_label: int = 3) -> Attack:
    """Another one, on data."""
    return Attack(
        lambda task, y: np.full_like(y, target_label), target_label, stamp=lambda task, x, part: np.full_like(x, 0.5)
    )


def frozen() -> Attack:
    """Another one, in training."""
    return Attack(train=Training(gradient=lambda gradients, _: {name: 0 * each for name, each in gradients.items()}))


def test_an_attack_from_outside_comes_after_the_built_in_ones_of_its_stage():
    parts = {
        "test_attacks:negated": {"factor": 3.0},
        "scaling": {"factor": 2.0},
        "test_attacks:frozen": {},
        "norm_bound": {},
        "test_attacks:gray": {},
        "trigger": {"target_label": 3, "size": 2},
    }
    attack = build_attack(parts)
    assert repr(attack) == (
        "trigger(target_label=3, size=2)+gray()+norm_bound()+frozen()+scaling(factor=2.0)+negated(factor=3.0)"
    ).replace("size=2", "size=2, row=2, column=2, value=1.0").replace("bound()", "bound(bound=1.0, every=10)")
    task, trained = image_task(), updates_of(2, seed=0)
    assert (attack.stamp(task, task.x_test, None) == 0.5).all()  # after the trigger
    np.testing.assert_array_equal(send(attack, trained, {})["fc1.bias"], -6 * trained["fc1.bias"])
    assert {"norm_bound", "test_attacks:frozen"} < set(parts)
    assert build_attack(dict(reversed(parts.items()))).calls == attack.calls


def test_the_stage_of_the_built_in_attacks_is_that_of_their_place():
    order = in_order({name: sender(name) for name in ATTACKS})
    assert order == list(ATTACKS)
    starts = [order.index(name) for name in NEXT_STAGE.values()]
    stages = ["data"] * starts[0] + ["training"] * (starts[1] - starts[0]) + ["sending"] * (len(order) - starts[1])
    for name, stage in zip(order, stages, strict=True):
        if name not in ("own_training", "hiding"):  # one does nothing by default, the other is in two stages
            assert ATTACKS[name]().stage == stage


@pytest.mark.parametrize(
    ("parts", "found"),
    [
        ({"triger": {}}, r"attack: there is no 'triger'; did you mean trigger"),
        ({"no_such_module:f": {}}, "attack: cannot import 'no_such_module:f'"),
        ({"test_attacks:LETTERS": {}}, "attack: expected a function"),
        ({"builtins:dict": {}}, "builtins:dict must build an Attack, found a dict"),
    ],
)
def test_what_is_no_attack_is_one_line(parts, found):
    with pytest.raises(InputError, match=found) as caught:
        build_attack(parts)
    assert "\n" not in str(caught.value)
