"""What a federation starts from: the server's training takes samples from clients, and adapters freeze all else."""

import numpy as np
import pytest
import torch
from torch import nn

import gradlens
from gradlens.errors import InputError
from gradlens.log import LogWriter
from gradlens.log.adapters import with_products
from simulations import Scenario, run_sweep
from simulations import run as simulate
from simulations.assemble import assemble, task_of
from simulations.measure import measure_of
from simulations.starting_model import Adapters, LowRank, Pretraining, pretrained, servers_samples, with_adapters
from simulations.tasks import build_model, cross_entropy, load_task
from simulations.training import LocalSGD, engine_for, state_of

SERVER = {"samples": 400, "epochs": 10, "learning_rate": 0.01}
SMALL = {"num_clients": 5, "rounds": 2, "samples_per_client": 40}
DENSE = {"rank": 2, "modules": ["fc1", "fc2"]}


def merged(state, start, base, name, scale):
    """The weight of a dense layer behind an adapter, formed."""
    return base + scale * state[f"{name}.lora_B.weight"] @ state[f"{name}.lora_A.weight"]


# the server's training


def test_the_servers_samples_are_those_that_no_client_has():
    scenario = Scenario(pretraining=SERVER, **SMALL)
    whole, clients = load_task("digits", 600, 0), task_of(scenario)
    mine = servers_samples(whole, Pretraining(**SERVER), seed=0)
    assert (len(mine), len(clients.y_train)) == (400, 200)
    rows = [tuple(row) for row in whole.x_train[mine].reshape(400, -1)] + [
        tuple(row) for row in clients.x_train.reshape(200, -1)
    ]
    assert sorted(rows) == sorted(map(tuple, whole.x_train.reshape(600, -1)))
    np.testing.assert_array_equal(clients.x_test, whole.x_test)


def test_owners_stay_with_their_samples():
    tumors = load_task("breast_cancer")
    kept = task_of(Scenario(task="breast_cancer", model="own", num_clients=5, pretraining={"samples": 100}))
    site = {tuple(row): owner for row, owner in zip(tumors.x_train.tolist(), tumors.owners_train, strict=True)}
    assert [site[tuple(row)] for row in kept.x_train.tolist()] == kept.owners_train.tolist()


@pytest.mark.parametrize("settings", [{}, {"optimizer": "sgd", "learning_rate": 0.1, "batch_size": 16}])
def test_clients_start_where_the_server_stopped(tmp_path, settings):
    scenario = Scenario(pretraining=SERVER | settings, **SMALL)
    run = simulate(scenario, tmp_path)
    measured = measure_of(scenario)(run.log[0].global_model)["main_accuracy"]
    untrained = measure_of(scenario)(state_of(build_model(load_task("digits"), "mlp")))["main_accuracy"]
    assert measured > 0.6 > untrained + 0.3


def test_the_server_trains_as_torch_does():
    task, model = load_task("digits", 300), build_model(load_task("digits"), "mlp")
    settings = Pretraining(samples=50, epochs=1, batch_size=50, optimizer="sgd", learning_rate=0.5)
    chosen = servers_samples(task, settings, seed=0)
    loss = cross_entropy(model(torch.tensor(task.x_train[chosen])), torch.tensor(task.y_train[chosen])).mean()
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    for (name, found), start, gradient in zip(
        pretrained(task, "mlp", 0, settings).items(), model.parameters(), gradients, strict=True
    ):
        np.testing.assert_allclose(found, (start - 0.5 * gradient).detach(), atol=1e-6, err_msg=name)


def test_the_same_seed_starts_from_the_same_model_whatever_the_attack_and_another_does_not():
    scenario = Scenario(pretraining=SERVER, attack="trigger", num_malicious=2, **SMALL)
    first, control, other = (
        state_of(assemble(each).model) for each in (scenario, scenario.control, scenario.replace(seed=1))
    )
    assert all(np.array_equal(first[name], control[name]) for name in first)
    assert not any(np.array_equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize(
    ("pretraining", "message"),
    [
        ({"samples": 1_437}, "task digits has 1,437 training samples, 1,437 for the server leave none for the clients"),
        ({"samples": 100, "optimizer": "sgd", "learning_rate": 1e30}, r"it diverged at learning_rate 1e\+30"),
    ],
)
def test_a_server_that_cannot_train_says_why(pretraining, message):
    with pytest.raises(InputError, match=f"^pretraining: {message}"):
        assemble(Scenario(pretraining=pretraining))


# settings


def test_settings_that_were_added_change_no_digest_at_their_defaults():
    assert Scenario().settings.keys().isdisjoint({"pretraining", "adapters"})
    assert Scenario(pretraining={}, adapters="none") == Scenario()
    scenario = Scenario(pretraining=SERVER, adapters={})
    assert scenario.settings["pretraining"] == SERVER | {"batch_size": 64, "optimizer": "adam"}
    assert Scenario(**scenario.settings) == scenario != Scenario()
    assert (scenario.label("pretraining"), scenario.label("adapters")) == (
        "samples=400, epochs=10, learning_rate=0.01",
        "none",
    )
    assert Scenario(adapters={"rank": 4}).label("adapters") == "default"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pretraining": {}, "adapters": {"rnak": 2}}, "adapters: 'rnak' is no setting; did you mean rank?"),
        ({"adapters": {"rank": 0}}, "adapters: rank: input should be greater than or equal to 1, found 0"),
        ({"adapters": 4}, "adapters: expected a table of its settings rank, alpha, modules, found 4"),
        ({"pretraining": {"epochs": 2}}, "pretraining: samples: field required"),
    ],
)
def test_wrong_settings_are_named(settings, message):
    with pytest.raises(InputError, match=message.replace("?", r"\?")):
        Scenario(**settings)


# adapters


def test_only_adapters_are_recorded_and_at_first_they_change_nothing(tmp_path):
    scenario = Scenario(adapters=DENSE, pretraining=SERVER, **SMALL)
    run = simulate(scenario, tmp_path)
    assert list(run.model) == [f"{layer}.lora_{side}.weight" for layer in ("fc1", "fc2") for side in "AB"]
    assert [run.model[name].shape for name in run.model] == [(2, 64), (32, 2), (2, 32), (10, 2)]
    assert not run.log[0].global_model["fc1.lora_B.weight"].any()
    whole = scenario.replace(adapters={})
    frozen, plain = measure_of(scenario), measure_of(whole)
    assert frozen(run.log[0].global_model) == pytest.approx(plain(state_of(assemble(whole).model)), nan_ok=True)
    assert run.log[-1].global_model["fc1.lora_B.weight"].any()


def test_a_product_in_the_record_is_how_the_merged_weight_changed(tmp_path):
    run = simulate(Scenario(adapters=DENSE, **SMALL), tmp_path)
    log = with_products(run.log)
    round_, products = run.log[-1], log[-1]
    before = round_.global_model
    for place in range(len(round_)):
        for layer in ("fc1", "fc2"):
            a, b = (f"{layer}.lora_{side}.weight" for side in "AB")
            after = (before[b] + round_.updates[b][place]) @ (before[a] + round_.updates[a][place])
            change = after - before[b] @ before[a]
            np.testing.assert_allclose(products.updates[f"{layer}.lora"][place], change, atol=1e-6)


def test_engines_agree_on_adapters():
    task = load_task("digits", 120)
    shards = [
        (torch.tensor(task.x_train[start : start + 30]), torch.tensor(task.y_train[start : start + 30]))
        for start in range(0, 120, 30)
    ]
    model, states = with_adapters(build_model(task, "mlp"), Adapters(**DENSE), seed=3), []
    for name in ("plain", "stacked"):
        engine = engine_for(name, model, cross_entropy, LocalSGD(epochs=2), shards)
        states.append(engine(state_of(model), shards, [np.random.default_rng(k) for k in range(4)]))
    for name in states[0]:
        assert states[0][name].any()
        np.testing.assert_allclose(states[0][name], states[1][name], atol=1e-6, err_msg=name)


def test_the_frozen_model_stays_and_its_copy_in_the_engine_too():
    task = load_task("digits", 60)
    model = with_adapters(build_model(task, "mlp"), Adapters(**DENSE))
    before = {name: tensor.clone() for name, tensor in model.named_buffers()}
    data = [(torch.tensor(task.x_train), torch.tensor(task.y_train))]
    engine = engine_for("plain", model, cross_entropy, LocalSGD(), data)
    engine(state_of(model), data, [np.random.default_rng(0)])
    for name, tensor in engine.spaces[0].model.named_buffers():
        assert torch.equal(tensor, before[name])


def test_a_layer_with_an_adapter_is_the_layer_of_the_merged_weight():
    torch.manual_seed(0)
    layer = nn.Linear(7, 5)
    adapted = LowRank(layer, Adapters(rank=3, alpha=6.0))
    nn.init.normal_(adapted.lora_B.weight)
    merged = layer.weight + 2.0 * adapted.lora_B.weight @ adapted.lora_A.weight
    x = torch.randn(4, 7)
    torch.testing.assert_close(adapted(x), nn.functional.linear(x, merged, layer.bias))


def test_adapters_are_refused_where_they_have_no_meaning():
    with pytest.raises(
        InputError, match="no dense layer is called query or key or value or out; the model has fc1, fc2"
    ):
        with_adapters(build_model(load_task("digits"), "mlp"), Adapters())
    normed = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    with pytest.raises(InputError, match=r"expected a model without buffers, .* found 1\.running_mean"):
        with_adapters(normed, Adapters(modules=["0"]))


def test_a_boosted_adapter_is_accused_and_an_honest_run_is_not(tmp_path):
    settings = {"adapters": DENSE, "pretraining": SERVER, "num_clients": 12, "rounds": 8, "learning_rate": 0.02}
    attack = {"trigger": {"size": 3, "row": 0, "column": 0}, "scaling": {"factor": 4.0}}
    attacked = simulate(Scenario(**settings, attack=attack, num_malicious=2), tmp_path / "attacked")
    honest = simulate(Scenario(**settings), tmp_path / "honest")
    malicious = set(attacked.truth.query("poisoned")["client"])
    accused = set(gradlens.investigate(attacked).suspects["client"])
    assert accused
    assert accused <= malicious
    assert not len(gradlens.investigate(honest).suspects)


def test_a_control_of_adapters_is_measured_behind_its_frozen_model(tmp_path):
    attacked = Scenario(adapters=DENSE, pretraining=SERVER, attack="trigger", num_malicious=1, **SMALL)
    swept = run_sweep([attacked.control, attacked], tmp_path)
    measure = measure_of(attacked)
    expected = [measure(state)["asr"] for state in swept.control_of(attacked.digest).states()]
    assert swept.controls.sort_values("round")["asr"].tolist() == expected


def test_a_run_with_adapters_goes_on_where_it_stopped(tmp_path, monkeypatch):
    scenario = Scenario(adapters=DENSE, pretraining=SERVER, **SMALL)
    whole = simulate(scenario, tmp_path / "whole")
    commit = LogWriter.commit

    def stop_in_the_second(writer, round_, *others, **more):
        if round_.index == 1:
            raise KeyboardInterrupt
        commit(writer, round_, *others, **more)

    with monkeypatch.context() as patched:
        patched.setattr(LogWriter, "commit", stop_in_the_second)
        with pytest.raises(KeyboardInterrupt):
            simulate(scenario, tmp_path / "stopped")
    pretrained.cache_clear()
    resumed = simulate(scenario, tmp_path / "stopped")
    for round_, expected in zip(resumed.log, whole.log, strict=True):
        for name in whole.model:
            np.testing.assert_array_equal(round_.updates[name], expected.updates[name], err_msg=name)
