"""What lies around models in a folder: optimizers, servers' files, other forms and measures; what is taken is said."""

import json

import numpy as np
import pandas as pd
import pytest

from conftest import STATE
from gradlens import Evidence, InputError, Recorder
from gradlens.ingestion import ingest
from gradlens.log.global_model import spec_of
from test_ingest import CLIENTS, check, moved, sent
from test_ingest_found import sharded, tensors, written

torch = pytest.importorskip("torch")


# What is no client, and where the server's models are


@pytest.mark.parametrize("name", ["best_model", "Best-Global-Model", "best_FL_global_model", "optimizer", "scheduler"])
def test_what_is_saved_beside_the_models_of_a_round_is_no_client(tmp_path, name):
    folder = written(tmp_path / "in", dict, clients="round_{round}/{client}.pt")
    for round_ in range(3):
        torch.save({"state": {0: {"exp_avg": torch.ones(3)}}, **tensors(STATE)}, folder / f"round_{round_}/{name}.pt")
    done = ingest(folder, tmp_path / "run")
    check(done.run)
    assert done.notes == (
        f"3 files match no pattern and are left out: 'round_0/{name}.pt', 'round_1/{name}.pt', 'round_2/{name}.pt'",
    )


def test_an_optimizers_state_under_a_clients_name_is_a_refusal(tmp_path):
    folder = written(tmp_path / "in", dict)
    torch.save({"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": []}, folder / "round_0/client_c0_optim.pt")
    done = ingest(folder, tmp_path / "run")
    check(done.run)
    assert done.faults == ("round 0, client c0_optim: refused: layer 'state' must be a tensor, found dict",)


@pytest.mark.parametrize(
    ("clients", "server", "when"),
    [
        ("{client}/round_{round}.pt", "server/round_{round}.pt", "before"),
        ("client-{client}/round-{round}.pt", "server/round-{round}.pt", "before"),
        ("epoch_{round}/node_{client}.pt", "epoch_{round}/global.pt", "before"),
        ("epoch_{round}/node_{client}.pt", "epoch_{round}/aggregated.pt", "after"),
        ("round_{round}/{client}.pt", "round_{round}/FL_global_model.pt", "after"),
    ],
)
def test_a_servers_models_lie_where_those_of_the_clients_do(tmp_path, clients, server, when):
    done = ingest(written(tmp_path / "in", dict, clients=clients, server=server), tmp_path / "run")
    names = f"{clients.removesuffix('.pt')}: 3 rounds of 5 clients ('c0', 'c1', 'c2', 'c3', 'c4'); "
    assert done.taken == f"{names}global models: {server.removesuffix('.pt')}, {when} their rounds"
    if when == "before":
        check(done.run)
    else:
        np.testing.assert_allclose(done.run.log[1].global_model["fc2.bias"], moved(0)["fc2.bias"])


def test_one_global_model_of_no_round_is_left_out_with_a_note(tmp_path):
    folder = written(tmp_path / "in", dict, clients="site-{client}/round_{round}.pt", server="")
    torch.save(tensors(STATE), folder / "global_model.pt")
    done = ingest(folder, tmp_path / "run")
    assert done.taken.startswith("{client}/round_{round}: 3 rounds of 5 clients ('site-c0', ")
    assert "1 files match no pattern and are left out: 'global_model.pt'" in done.notes


def test_names_that_are_numbers_alone_are_rounds_first_and_said_to_be(tmp_path):
    """Two rounds of three clients in a folder for each client are taken for three rounds of two."""
    for client in range(3):
        for round_ in range(2):
            path = tmp_path / "in" / str(client) / f"{round_}.npz"
            path.parent.mkdir(parents=True, exist_ok=True)
            np.savez(path, **sent(round_, client))
    assert ingest(tmp_path / "in", tmp_path / "run").taken.startswith("{round}/{client}: 3 rounds of 2 clients")
    right = ingest(tmp_path / "in", tmp_path / "right", pattern="{client}/{round}")
    assert right.taken.startswith("{client}/{round}: 2 rounds of 3 clients ('0', '1', '2')")
    assert [round_.clients.tolist() for round_ in right.run.log] == [["0", "1", "2"]] * 2


# Forms


def test_updates_by_epoch_and_node_without_global_models(tmp_path):
    for epoch in (1, 2):
        (tmp_path / "in" / f"epoch_{epoch}").mkdir(parents=True)
        for node in range(3):
            update = {n: (sent(epoch, node)[n] - moved(epoch)[n]).astype(STATE[n].dtype) for n in STATE}
            np.savez(tmp_path / "in" / f"epoch_{epoch}" / f"node_{node}.npz", **update)
    done = ingest(tmp_path / "in", tmp_path / "run", updates=True)
    assert done.taken == "epoch_{round}/node_{client}: 2 rounds of 3 clients ('0', '1', '2'); global models: none"
    expected = sent(2, 1)["fc1.weight"] - moved(2)["fc1.weight"]
    np.testing.assert_allclose(done.run.log[1].updates["fc1.weight"][1], expected, atol=1e-7)
    assert "rounds 1 to 2 of the source are recorded as 0 to 1" in done.notes


def test_clients_without_names_are_taken_by_the_place_of_the_servers_layers(tmp_path):
    (tmp_path / "in").mkdir()
    np.savez(tmp_path / "in" / "global_0.npz", **moved(0))
    for number, client in enumerate(CLIENTS):
        np.savez(tmp_path / "in" / f"round_0_client_{client}.npz", *sent(0, number).values())
    done = ingest(tmp_path / "in", tmp_path / "run")
    check(done.run, rounds=1)
    assert done.notes == ("5 files: arrays without names, arr_0 and on, are taken as the layers in their order",)
    np.savez(tmp_path / "in" / "round_0_client_odd.npz", *list(sent(0, 0).values())[::-1])
    again = ingest(tmp_path / "in", tmp_path / "again")
    assert again.faults == ("round 0, client odd: refused: layer 'fc1.weight' is missing, found 'arr_0'",)


@pytest.mark.parametrize(
    ("form", "reason"),
    [
        (lambda state: list(state.values()), "expected layers with names, found list"),
        (lambda state: {"state": {"inner": {"model": state}}}, "layer 'state' must be a tensor, found dict"),
        (lambda state: {**state, "fft": torch.zeros(2, dtype=torch.complex64)}, "found Tensor of type complex64"),
        (lambda state: {"loss": torch.tensor(0.5), "accuracy": 0.9}, "holds no layers, only 'loss', 'accuracy'"),
        (lambda state: torch.nn.Linear(2, 2), "it is a pickle that asks for 'torch.nn.modules.linear.Linear'"),
        (lambda state: {n: t.to(torch.int8) for n, t in state.items()}, "found none: integers and running statistics"),
    ],
    ids=["list", "nested", "complex", "measures", "module", "integers"],
)
def test_what_cannot_be_recorded_is_one_line_for_people(tmp_path, command, form, reason):
    written(tmp_path / "in", form, server="")
    status, out, err = command("ingest", tmp_path / "in", "-o", tmp_path / "run")
    assert (status, out) == (2, "")
    assert reason in err
    assert err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_wrapper_of_another_name_on_both_sides_is_part_of_the_names(tmp_path):
    """Lightning calls the layers of a module that holds them `model.fc1.weight`: it is recorded as it came."""

    def lightning(state):
        layers = {f"model.{name}": value for name, value in state.items()}
        return {"state_dict": layers, "optimizer_states": [{"state": {}}], "hyper_parameters": {"lr": 0.1}}

    done = ingest(written(tmp_path / "in", lightning), tmp_path / "run")
    assert done.run.log.model.final_bias == "model.fc2.bias"
    expected = (
        r"none of the 15 updates could be recorded: layer 'fc1.weight' is missing, found 'model.fc1.weight' \(15 of 15"
    )
    with pytest.raises(InputError, match=expected):
        ingest(written(tmp_path / "other", lightning, dict), tmp_path / "none")


def test_each_client_may_wrap_its_model_in_its_own_way(tmp_path):
    folder = written(tmp_path / "in", dict)
    for number, prefix in enumerate(["module.", "_orig_mod.module."]):
        state = {f"{prefix}{name}": value for name, value in tensors(sent(0, number)).items()}
        torch.save({"model_state_dict": state, "epoch": 3}, folder / "round_0" / f"client_c{number}.pt")
    done = ingest(folder, tmp_path / "run")
    check(done.run)
    assert "2 files: names of layers lost their prefix 'module.'" in done.notes
    assert "1 files: names of layers lost their prefix '_orig_mod.'" in done.notes


def test_parts_of_a_model_that_lack_one_are_refused_with_its_name(tmp_path):
    for client in "ab":
        sharded(tmp_path / "in" / "round_0" / f"client_{client}", moved(0))
    index = tmp_path / "in" / "round_0" / "client_b" / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    first = next(file for file in weight_map.values() if "00001" in file)
    index.write_text(json.dumps({"weight_map": {n: file for n, file in weight_map.items() if file == first}}))
    done = ingest(tmp_path / "in", tmp_path / "run")
    assert done.run.log[0].clients.tolist() == ["a"]
    assert done.faults[0].startswith("round 0, client b: refused: layer 'fc2")


def test_one_client_in_two_files_of_other_digits_is_two_answers(tmp_path):
    folder = written(tmp_path / "in", dict)
    np.savez(folder / "round_0" / "client_c1.npz", **{n: a.astype(np.float64) + 1e-9 for n, a in sent(0, 1).items()})
    done = ingest(folder, tmp_path / "run")
    assert [list(round_.refused) for round_ in done.run.log] == [["c1"], [], []]
    assert "2 different answers came under this name" in done.faults[0]


# Numbers and tensors that are no layers


def test_tensors_without_numbers_are_said_to_be_left_out(tmp_path):
    done = ingest(written(tmp_path / "in", lambda state: {**state, "seen": torch.zeros(0, 3)}), tmp_path / "run")
    check(done.run)
    assert done.notes == ("tensors without numbers are no layers and are left out: 'seen'",)


@pytest.mark.parametrize("level", ["full", Evidence("sketch", width=4, seed=1)], ids=["full", "sketch"])
def test_complex_layers_are_left_out_where_others_were_agreed_on(tmp_path, level):
    """Of complex numbers nothing can be recorded; without the agreement the server is told at once."""
    state = {"fft.weight": np.zeros((2, 2), complex), **STATE}
    with pytest.raises(
        InputError, match=r"'fft.weight' of the global model must hold numbers, found ndarray of type co"
    ):
        Recorder().log_round(state, {"a": state})
    recorder = Recorder(layers=["fc*", "norm.*"], evidence=level)
    answer = {name: array + 1 for name, array in state.items()}
    assert recorder.log_round(state, {"a": answer, "b": STATE, "c": {**STATE, "fft.weight": object()}}).kept == [*"abc"]
    assert list(recorder.model) == list(STATE)
    assert recorder.model.final_bias == "fc2.bias"
    for client in "abc":
        np.savez(tmp_path / f"round_0_client_{client}.npz", **answer)
    assert list(ingest(tmp_path, tmp_path / "run", layers=["fc*", "norm.*"]).run.model) == list(STATE)
    np.savez(tmp_path / "global_0.npz", **state)
    assert list(ingest(tmp_path, tmp_path / "from", layers=["fc*", "norm.*"]).run.model) == list(STATE)


def test_a_live_model_of_integers_alone_is_one_line():
    with pytest.raises(InputError, match="a model needs a parameter layer, found none: integers and running"):
        Recorder().log_round({"w": np.zeros((3, 4), np.int8), "b": np.zeros(3, np.int8)}, {})


def test_running_statistics_of_other_libraries_are_buffers_by_name():
    names = [
        "layer1.bn1.running_mean", "layer1.bn1.num_batches_tracked", "params/bn/moving_variance",
        "batch_stats/Block_0/BatchNorm_0/mean", "module.bn.running_var",
    ]  # fmt: skip
    state = {**{name: np.ones(4) for name in names}, "fc.weight": np.ones((3, 4)), "fc.running_mean_weight": np.ones(4)}
    model = spec_of(state)
    assert set(model.buffers) == set(names)
    assert model.parameters == ("fc.weight", "fc.running_mean_weight")


def test_a_single_number_that_is_learned_is_a_layer_and_one_that_is_measured_is_not(tmp_path):
    def with_numbers(state):
        return {
            **state,
            "logit_scale": torch.tensor(2.6),
            "head.loss": torch.tensor(0.1),
            "val_loss": torch.tensor(1.0),
        }

    done = ingest(written(tmp_path / "in", with_numbers), tmp_path / "run")
    assert {"logit_scale", "head.loss"} <= set(done.run.model)
    assert "val_loss" not in set(done.run.model)
    assert done.notes == ("18 files: single numbers beside the layers are left out: 'val_loss'",)


@pytest.mark.parametrize("measures", [{}, {"loss": 0.3, "accuracy": 0.9}], ids=["none", "measures"])
def test_a_table_without_layers_records_nothing(tmp_path, command, measures):
    rows = [{"round": 0, "client": c, "num_examples": 5, **measures} for c in CLIENTS]
    pd.DataFrame(rows).to_parquet(tmp_path / "t.parquet")
    status, out, err = command("ingest", tmp_path / "t.parquet", "-o", tmp_path / "run")
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert not measures or "expected a column for each layer, found 'loss', 'accuracy'" in err
    assert not (tmp_path / "run").exists()


def test_tied_layers_in_a_live_recording_are_each_a_layer(tmp_path):
    """One matrix under two names is sent twice: both are recorded, and ingest says that it counts twice."""
    table = np.random.default_rng(0).normal(size=(9, 4)).astype(np.float32)
    state = {"embed.weight": table, "body.weight": np.ones((4, 4), np.float32), "head.weight": table}
    with Recorder(tmp_path / "run") as recorder:
        recorder.log_round(state, {c: {n: a + i for n, a in state.items()} for i, c in enumerate(CLIENTS)})
        recorder.commit(state)
        rows = recorder.log[0].updates
    np.testing.assert_array_equal(rows["embed.weight"], rows["head.weight"])
    for i, client in enumerate(CLIENTS):
        torch.save({n: torch.tensor(a + i) for n, a in state.items()}, tmp_path / f"round_0_client_{client}.pt")
    notes = ingest(tmp_path, tmp_path / "files").notes
    assert any("head.weight holds the numbers of embed.weight: a layer that is tied counts twice" in n for n in notes)
