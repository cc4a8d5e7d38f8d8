"""Models as they lie about: endings, checkpoints, prefixes, files in parts or without names, servers among clients."""

import json
import os

import numpy as np
import pandas as pd
import pytest

from conftest import STATE
from gradlens import InputError, Recorder
from gradlens.ingestion import ingest
from test_ingest import CLIENTS, check, moved, sent

torch = pytest.importorskip("torch")


def tensors(state) -> dict:
    return {name: torch.as_tensor(array) for name, array in state.items()}


def written(place, of_client, of_server=None, clients="round_{round}/client_{client}.pt", server="global_{round}.pt"):
    """A recording of three rounds: what a client's file holds of its model, and the server's."""
    for round_ in range(3):
        files = {
            clients.format(round=round_, client=c): of_client(tensors(sent(round_, i))) for i, c in enumerate(CLIENTS)
        }
        if server:
            files[server.format(round=round_)] = (of_server or of_client)(tensors(moved(round_)))
        for name, content in files.items():
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            torch.save(content, place / name)
    return place


@pytest.mark.parametrize("ending", [".bin", ".ckpt", ".pt.tar", ".pth.tar"])
def test_further_endings_are_read_by_torch(tmp_path, ending):
    names = {"clients": f"round_{{round}}/client_{{client}}{ending}", "server": f"global_{{round}}{ending}"}
    done = ingest(written(tmp_path / "in", lambda state: state, **names), tmp_path / "run")
    check(done.run)
    assert done.notes == done.faults == ()
    assert done.taken.startswith("round_{round}/client_{client}: 3 rounds of 5 clients ('c0', 'c1'")
    assert done.taken.endswith("global models: global_{round}, before their rounds")


@pytest.mark.parametrize("key", ["model", "model_state", "net", "module", "ema_state_dict", "a name of somebody's own"])
def test_the_entry_that_holds_the_model_is_found(tmp_path, key):
    def checkpoint(state):
        return {"epoch": 3, "train_conf": {"lr": 0.1}, "optimizer": {"exp_avg": torch.ones(3)}, key: state}

    done = ingest(written(tmp_path / "in", checkpoint), tmp_path / "run")
    check(done.run)
    assert done.notes == (f"18 files: the model is the entry {key!r} of its file",)


def test_of_several_tables_the_one_named_is_taken(tmp_path):
    folder = written(tmp_path / "in", lambda state: {"student": state, "teacher": {"w": torch.ones(2)}})
    with pytest.raises(
        InputError, match="several tables of arrays, 'student', 'teacher': --model-key names the model's"
    ):
        ingest(folder, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    check(ingest(folder, tmp_path / "run", model_key="student").run)
    with pytest.raises(InputError, match="has no entry 'net' with a model, only 'student', 'teacher'"):
        ingest(folder, tmp_path / "other", model_key="net")


FROM_KERAS = "Keras's own files are not read: let each client write numpy.savez"


@pytest.mark.parametrize("ending", [".keras", ".weights.h5", ".hdf5"])
def test_files_of_keras_are_one_line_that_says_what_to_write(tmp_path, command, ending):
    folder = written(tmp_path / "in", dict)
    (folder / "round_0" / f"client_c9{ending}").write_bytes(b"\x89HDF")
    done = ingest(folder, tmp_path / "run")
    check(done.run)
    assert done.notes[0].startswith(f"1 file of Keras left out; {FROM_KERAS}")
    for file in folder.glob("round_*/*.pt"):
        file.rename(file.with_name(file.name.removesuffix(".pt") + ending))
    for source in (folder, folder / "round_0" / f"client_c9{ending}"):  # the models of the server are still there
        code, out, complaint = command("ingest", source, "-o", tmp_path / "other")
        assert (code, out) == (2, "")
        (line,) = complaint.splitlines()
        assert FROM_KERAS in line
    for file in folder.glob("global_*.pt"):
        file.unlink()
    with pytest.raises(InputError, match=rf"expected models \(.*\), found 16 files .*; {FROM_KERAS}"):
        ingest(folder, tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "_orig_mod.module."])
@pytest.mark.parametrize("both", [True, False])
def test_prefixes_of_wrappers_are_taken_off(tmp_path, prefix, both):
    def wrapped(state):
        return {prefix + name: value for name, value in state.items()}

    done = ingest(written(tmp_path / "in", wrapped, wrapped if both else dict), tmp_path / "run")
    check(done.run)
    assert f"{18 if both else 15} files: names of layers lost their prefix {prefix.split('.')[0] + '.'!r}" in done.notes


def test_a_client_that_gives_a_prefix_to_one_layer_is_refused_with_both_names(tmp_path):
    folder = written(tmp_path / "in", dict)
    state = tensors(sent(0, 0))
    state["module.fc2.bias"] = state.pop("fc2.bias")
    torch.save(state, folder / "round_0" / "client_c0.pt")
    done = ingest(folder, tmp_path / "run")
    assert done.faults == ("round 0, client c0: refused: layer 'fc2.bias' is missing, found 'module.fc2.bias'",)


def test_where_nothing_can_be_recorded_nothing_is_left_and_the_names_are_said(tmp_path):
    def other(state):
        return {f"net.{name}": value for name, value in state.items()}

    expected = (
        r"none of the 15 updates could be recorded: layer 'fc1.weight' is missing, found 'net.fc1.weight' \(15 of 15\)"
    )
    with pytest.raises(InputError, match=expected):
        ingest(written(tmp_path / "in", other, dict), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_single_numbers_beside_the_layers_are_left_out(tmp_path):
    def with_measures(state):
        return {**state, "loss": 0.3, "epoch": 2, "accuracy": torch.tensor(0.9), "note": "first"}

    done = ingest(written(tmp_path / "in", with_measures), tmp_path / "run")
    check(done.run)
    said = "18 files: single numbers beside the layers are left out: 'loss', 'epoch', 'accuracy', 'note'"
    assert done.notes == (said,)


def test_columns_of_single_numbers_are_no_layers_unless_they_are_named_as_layers_are(tmp_path):
    rows = [
        {"round": 0, "client": client, "loss": 0.3, "norm.count": 7, "fc.weight": [1.0, 2.0], "fc.bias": [0.5]}
        for client in CLIENTS
    ]
    pd.DataFrame(rows).to_parquet(tmp_path / "table.parquet")
    done = ingest(tmp_path / "table.parquet", tmp_path / "run")
    assert done.run.log.model.parameters == ("fc.weight", "fc.bias")
    assert done.run.log.model.buffers == ("norm.count",)
    assert done.notes[0] == "columns of single numbers are no layers and are left out: 'loss'"
    assert done.taken == "the table's rows: 1 round of 5 clients ('c0', 'c1', 'c2', 'c3', 'c4')"


@pytest.mark.parametrize("server", ["global_model", "server"])
def test_a_servers_file_among_those_of_the_clients_is_the_global_model(tmp_path, server):
    folder = written(tmp_path / "in", dict, clients="round_{round}/{client}.pt", server=f"round_{{round}}/{server}.pt")
    done = ingest(folder, tmp_path / "run")
    check(done.run)
    assert done.taken.endswith(f"global models: round_{{round}}/{server}, before their rounds")


def test_an_aggregated_model_is_the_one_after_its_round_and_never_a_client(tmp_path):
    folder = written(tmp_path / "in", dict, clients="round_{round}/{client}.pt", server="round_{round}/aggregated.pt")
    done = ingest(folder, tmp_path / "run")
    assert done.taken.endswith("global models: round_{round}/aggregated, after their rounds")
    assert done.run.log[0].clients.tolist() == CLIENTS
    np.testing.assert_allclose(done.run.log[1].global_model["fc2.bias"], moved(0)["fc2.bias"])


@pytest.mark.parametrize(
    "clients", ["epoch_{round}/node_{client}.pt", "{client}/round_{round}.pt", "client{client}/round{round}.pt"]
)
def test_further_patterns_are_known(tmp_path, clients):
    done = ingest(written(tmp_path / "in", dict, clients=clients), tmp_path / "run")
    check(done.run)
    assert done.taken.startswith(clients.removesuffix(".pt"))


def test_arrays_without_names_are_taken_by_their_place(tmp_path):
    folder = written(tmp_path / "in", dict, clients="client_{client}/model_{round}.pt", server="")
    for round_ in range(3):
        np.savez(folder / f"global_{round_}.npz", *moved(round_).values())
    done = ingest(folder, tmp_path / "run")
    check(done.run)
    assert done.notes == ("3 files: arrays without names, arr_0 and on, are taken as the layers in their order",)


def test_arrays_without_names_that_do_not_fit_are_not_taken_for_others(tmp_path):
    folder = written(tmp_path / "in", dict, server="")
    np.savez(folder / "global_0.npz", *list(moved(0).values())[::-1])
    with pytest.raises(
        InputError, match=r"none of the 15 updates could be recorded: layer 'arr_0' is missing, found 'fc1.weight'"
    ):
        ingest(folder, tmp_path / "run")


def sharded(folder, state) -> None:
    """A model in two files beside an index, as transformers writes it."""
    save_file = pytest.importorskip("safetensors.numpy").save_file
    folder.mkdir(parents=True, exist_ok=True)
    names = list(state)
    files = {"model-00001-of-00002.safetensors": names[:2], "model-00002-of-00002.safetensors": names[2:]}
    for file, of in files.items():
        save_file({name: np.asarray(state[name]) for name in of}, folder / file)
    weight_map = {name: file for file, of in files.items() for name in of}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_a_model_in_parts_is_read_by_its_index(tmp_path):
    for round_ in range(3):
        sharded(tmp_path / "in" / f"global_{round_}", moved(round_))
        for number, client in enumerate(CLIENTS):
            sharded(tmp_path / "in" / f"round_{round_}" / f"client_{client}", sent(round_, number))
    check(ingest(tmp_path / "in", tmp_path / "run", buffers=["norm.count"]).run)


@pytest.mark.parametrize(
    "weight_map",
    [
        {"w": "../../secret-00001-of-00001.safetensors"},
        {"w": "/etc/passwd"},
        {"w": 3},
        {"w": "model.safetensors"},
        [],
    ],
)
def test_an_index_names_parts_beside_it_and_nothing_else(tmp_path, weight_map):
    folder = tmp_path / "in"
    sharded(folder / "round_0" / "client_a", moved(0))
    sharded(folder / "round_0" / "client_b", moved(0))
    (folder / "round_0" / "client_b" / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": weight_map})
    )
    done = ingest(folder, tmp_path / "run")
    assert done.run.log[0].clients.tolist() == ["a"]
    assert len(done.faults) == 1
    assert "client b: refused" in done.faults[0]


def test_weights_of_integers_are_recorded_and_said_to_be_never_scored(tmp_path):
    def compressed(state):
        whole = (state["fc1.weight"] * 100).to(torch.int8)
        return {**state, "fc1.weight": whole, "fc1.scale": torch.tensor([0.01])}

    done = ingest(written(tmp_path / "in", compressed), tmp_path / "run")
    assert "fc1.weight" in done.run.log.model.buffers
    assert (
        "layers of integers are recorded and never scored: 'fc1.weight'; convert compressed weights first" in done.notes
    )


def test_tensors_without_numbers_are_no_layers(tmp_path):
    def with_nothing(state):
        return {**state, "empty.count": torch.zeros(0)}

    check(ingest(written(tmp_path / "in", with_nothing), tmp_path / "run").run)
    state = {**STATE, "empty.count": np.zeros(0)}
    with Recorder() as recorder:
        assert recorder.log_round(state, {"a": state, "b": STATE}).kept == ["a", "b"]


def test_files_of_other_kinds_are_counted_by_their_endings(tmp_path):
    (tmp_path / "in").mkdir()
    for name in ("a.h5", "b.h5", "notes"):
        (tmp_path / "in" / name).touch()
    with pytest.raises(InputError, match=r"found 2 files \.h5, 1 files without an ending"):
        ingest(tmp_path / "in", tmp_path / "run")


@pytest.mark.filterwarnings("ignore:Sparse")
def test_a_sparse_tensor_is_a_refusal_or_a_row_and_never_a_crash(tmp_path):
    folder = written(tmp_path / "in", dict)
    state = tensors(sent(0, 0))
    state["fc1.weight"] = state["fc1.weight"].to_sparse()
    torch.save(state, folder / "round_0" / "client_c0.pt")
    done = ingest(folder, tmp_path / "run")
    assert len(done.run.log[0]) + len(done.run.log[0].refused) == len(CLIENTS)


@pytest.mark.parametrize("kind", ["pipe", "link out", "missing"])
def test_a_part_that_is_no_plain_file_beside_its_index_is_refused_without_waiting(tmp_path, kind):
    folder = tmp_path / "in"
    for client in "ab":
        sharded(folder / "round_0" / f"client_{client}", moved(0))
    part = folder / "round_0" / "client_b" / "model-00002-of-00002.safetensors"
    outside = part.rename(tmp_path / part.name)
    if kind == "pipe":
        os.mkfifo(part)
    elif kind == "link out":
        part.symlink_to(outside)
    done = ingest(folder, tmp_path / "run")
    assert done.run.log[0].clients.tolist() == ["a"]
    assert list(done.run.log[0].refused) == ["b"]


def test_files_may_hold_a_part_of_the_layers_that_was_agreed_on(tmp_path):
    head = {"head.weight": np.zeros((3, 2))}
    np.savez(tmp_path / "global_0.npz", **{"body.weight": np.zeros((2, 4)), **head})
    for client, rest in (("a", {}), ("b", head), ("c", {})):
        np.savez(tmp_path / f"round_0_client_{client}.npz", **{"body.weight": np.ones((2, 4)), **rest})
    done = ingest(tmp_path, tmp_path / "run", layers=["body.*"])
    assert list(done.run.model) == ["body.weight"]
    assert len(done.run.log[0]) == 3
    with pytest.raises(InputError, match=r"layers: no layer of the model matches 'trunk\."):
        ingest(tmp_path, tmp_path / "other", layers=["trunk.*"])
