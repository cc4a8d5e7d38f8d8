"""Updates from elsewhere become a run: formats, hostile files, what is not known, nothing half-written."""

import io
import json
import os
import pickle
import signal
import subprocess
import sys
import time
import tracemalloc
import zipfile

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet
import pytest

import gradlens
from conftest import ROOT, STATE
from gradlens import InputError
from gradlens.ingestion import PATTERNS, ingest, with_csv_truth
from test_server import local, moved

torch = pytest.importorskip("torch")
CLIENTS = [f"c{i}" for i in range(5)]


def sent(round_: int, client: int) -> dict[str, np.ndarray]:
    """The local model of a client in a round, beside the global model of that round."""
    update = {name: array - STATE[name] for name, array in local(10 * round_ + client).items()}
    return {name: array + update[name] for name, array in moved(round_).items()}


def save(path, state) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npz":
        np.savez(path, **state)
    elif path.suffix == ".safetensors":
        pytest.importorskip("safetensors.numpy").save_file({n: np.asarray(a) for n, a in state.items()}, path)
    else:
        torch.save({name: torch.as_tensor(array) for name, array in state.items()}, path)


@pytest.fixture
def folder(tmp_path):
    """Writes a recording of three rounds as somebody else would."""

    def writing(pattern="round_{round}/client_{client}", ending=".npz", globals_as="global_{round}", change=None):
        for round_ in range(3):
            if globals_as:
                save(tmp_path / "in" / (globals_as.format(round=round_) + ending), moved(round_))
            for number, client in enumerate(CLIENTS):
                state = sent(round_, number)
                path = tmp_path / "in" / (pattern.format(round=round_, client=client) + ending)
                save(path, change(state) if change else state)
        return tmp_path / "in"

    return writing


def check(run, rounds=3, atol=0.0) -> None:
    """The run holds what `folder` wrote."""
    assert (run.verify().faults, run.is_closed, len(run.log)) == ((), True, rounds)
    assert run.log.model.buffers == ("norm.count",)
    assert run.log.model.final_bias == "fc2.bias"
    for index, round_ in enumerate(run.log):
        assert sorted(round_.clients.tolist()) == CLIENTS
        for name in STATE:
            np.testing.assert_allclose(round_.global_model[name], moved(index)[name], atol=atol)
            for row, client in enumerate(round_.clients.tolist()):
                expected = sent(index, int(client[1:]))[name] - moved(index)[name]
                np.testing.assert_allclose(round_.updates[name][row], expected, atol=atol)


@pytest.mark.parametrize("ending", [".npz", ".pt", ".pth", ".safetensors"])
def test_files_of_every_kind_are_recorded(folder, tmp_path, ending):
    done = ingest(folder(ending=ending), tmp_path / "run")
    check(done.run)
    assert done.faults == ()
    assert len(done.notes) == (ending == ".safetensors")  # which keeps its layers in alphabetical order
    assert all(note.startswith("fc2.weight is taken as the final layer: ") for note in done.notes)


def test_a_recording_is_thinned_out_as_it_is_read(folder, tmp_path):
    level = gradlens.Evidence("sketch", width=4, seed=2)
    thin, whole = ingest(folder(), tmp_path / "thin", evidence=level), ingest(tmp_path / "in", tmp_path / "whole")
    assert thin.run.evidence == level
    for round_, reduced in zip(thin.run.log, level.of_log(whole.run.log), strict=True):
        for name in reduced.updates:
            np.testing.assert_array_equal(round_.updates[name], reduced.updates[name])
    assert thin.run.log.model["fc1.weight"].shape == (4,)
    with pytest.raises(InputError, match="level is one of full, layers, sketch, found 'thin'"):
        ingest(tmp_path / "in", tmp_path / "run", evidence="thin")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("pattern", PATTERNS)
def test_usual_names_are_found(folder, tmp_path, pattern):
    done = ingest(folder(pattern), tmp_path / "run")
    check(done.run)
    assert (done.notes, done.faults) == ((), ())  # no file is left out


def test_names_can_be_given(folder, tmp_path):
    source = folder("{client}.at.{round}", globals_as="server.{round}")
    with pytest.raises(InputError, match=r"no file matches the usual names.*name them with --pattern"):
        ingest(source, tmp_path / "run")
    check(ingest(source, tmp_path / "run", pattern="{client}.at.{round}.npz", global_models="server.{round}").run)


@pytest.mark.parametrize("pattern", ["{client}", "{round}/{round}/{client}", "round_{round}"])
def test_a_pattern_names_round_and_client_once(folder, tmp_path, pattern):
    with pytest.raises(InputError, match=r"pattern: expected \{round\} and \{client\} once each"):
        ingest(folder(), tmp_path / "run", pattern=pattern)


@pytest.mark.parametrize("names", ["model_{}.npz", "round-{}-weights.npz"])
def test_flower_saves_what_came_of_a_round(folder, tmp_path, names):
    """Rounds from 1 on; the model before the first is not saved."""
    source = folder(globals_as=None)
    for number in range(3):
        (source / f"round_{2 - number}").rename(source / f"round_{3 - number}")
        save(source / names.format(number + 1), moved(number + 1))
    done = ingest(source, tmp_path / "run")
    np.testing.assert_array_equal(done.run.log[1].global_model["fc1.bias"], moved(1)["fc1.bias"])
    np.testing.assert_array_equal(done.run.log[2].global_model["fc1.bias"], moved(2)["fc1.bias"])
    assert [state["fc1.bias"][0] for state in done.run.states()] == [1, 2, 3]
    assert done.notes[0].startswith("the global model is not known in 1 of 3 rounds")
    assert done.notes[1] == "rounds 1 to 3 of the source are recorded as 0 to 2"


def test_models_without_global_ones_start_from_the_mean_before(folder, tmp_path):
    done = ingest(folder(globals_as=None), tmp_path / "run")
    log, median = done.run.log, np.median([sent(0, i)["fc2.weight"] for i in range(5)], axis=0)
    np.testing.assert_allclose(log[0].global_model["fc2.weight"], median, atol=1e-6)
    for index in (1, 2):
        mean = np.mean([sent(index - 1, i)["fc2.weight"] for i in range(5)], axis=0)
        np.testing.assert_allclose(log[index].global_model["fc2.weight"], mean, atol=1e-6)
    assert done.run.metrics["global_estimated"].tolist() == [1, 1, 1]
    assert "the first is the median of its local models" in done.notes[0]


def test_updates_without_global_models_start_from_zero(folder, tmp_path):
    done = ingest(folder(globals_as=None, change=lambda state: local(1)), tmp_path / "run", updates=True)
    assert not done.run.log[0].global_model["fc1.weight"].any()
    np.testing.assert_array_equal(done.run.log[2].updates["fc1.weight"][0], local(1)["fc1.weight"])
    np.testing.assert_allclose(done.run.log[2].global_model["fc1.weight"], 2 * local(1)["fc1.weight"], atol=1e-6)
    assert "the first is taken as 0" in done.notes[0]


def typed(kind):
    dtypes = {"float16": np.float16, "float64": np.float64}
    return lambda state: {n: a.astype(dtypes[kind]) if a.dtype == np.float32 else a for n, a in state.items()}


@pytest.mark.parametrize("ending", [".npz", ".pt", ".safetensors"])
@pytest.mark.parametrize("kind", ["float16", "float64"])
def test_other_types_of_numbers_become_float32_with_a_note(folder, tmp_path, kind, ending):
    done = ingest(folder(ending=ending, change=typed(kind)), tmp_path / "run")
    check(done.run, atol=5e-3 if kind == "float16" else 1e-6)
    assert done.notes[-1] == f"15 models: sent {kind}, recorded as float32"
    assert done.run.metrics["converted"].tolist() == [5, 5, 5]


@pytest.mark.parametrize("ending", [".pt", ".safetensors"])
def test_bfloat16_becomes_float32(folder, tmp_path, ending):
    source = folder(ending=ending)
    tensors = {n: torch.as_tensor(a).to(torch.bfloat16 if a.shape else torch.int64) for n, a in sent(1, 2).items()}
    if ending == ".pt":
        torch.save(tensors, source / "round_1" / "client_c2.pt")
    else:
        pytest.importorskip("safetensors.torch").save_file(tensors, source / "round_1" / "client_c2.safetensors")
    done = ingest(source, tmp_path / "run")
    check(done.run, atol=2e-2)
    expected = tensors["fc1.weight"].float().numpy() - moved(1)["fc1.weight"]
    np.testing.assert_array_equal(done.run.log[1].updates["fc1.weight"][2], expected)


def test_a_checkpoint_that_wraps_its_state_dict_is_opened(folder, tmp_path):
    source = folder(ending=".pt")
    state = {name: torch.as_tensor(array) for name, array in sent(0, 0).items()}
    torch.save({"epoch": 3, "state_dict": state}, source / "round_0" / "client_c0.pt")
    done = ingest(source, tmp_path / "run")
    check(done.run)
    assert (done.notes, done.faults) == ((), ())


class Bomb:
    """What a hostile pickle does when somebody opens it."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("place", ["raw.pt", "zip.pt", "raw.npz", "array.npz", "raw.safetensors"])
def test_nothing_is_unpickled(folder, tmp_path, command, place):
    kind, ending = os.path.splitext(place)
    source = folder(ending=ending)
    victim, bomb = source / "round_1" / f"client_c3{ending}", Bomb(tmp_path / "boom")
    if place == "zip.pt":
        torch.save({"fc1.weight": bomb}, victim)
    elif kind == "array":
        np.savez(victim, **{"fc1.weight": np.array([bomb], object)})
    else:
        victim.write_bytes(pickle.dumps(bomb))
    status, out, err = command("ingest", source, "-o", tmp_path / "run")
    assert not (tmp_path / "boom").exists()
    assert (status, err) == (0, "")
    lines = [line for line in out.splitlines() if line.startswith("round ")]
    assert len(lines) == 1
    assert lines[0].startswith(f"round 1, client c3: refused: 'client_c3{ending}' cannot be read")
    assert [len(round_) for round_ in gradlens.open(tmp_path / "run").log] == [5, 4, 5]
    status, out, err = command("ingest", source, "-o", tmp_path / "strict", "--strict")
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert "round 1, client c3: refused" in err
    assert not (tmp_path / "strict").exists()
    pickle.loads(pickle.dumps(bomb))  # noqa: S301 - it would have
    assert (tmp_path / "boom").is_dir()


def deflated(state) -> bytes:
    made = io.BytesIO()
    np.savez_compressed(made, **state)
    return made.getvalue()


def torch_zip(state, members) -> bytes:
    """What torch.save writes, with other members in place of its own or beside them, deflated."""
    made, whole = io.BytesIO(), io.BytesIO()
    torch.save(state, made)
    with zipfile.ZipFile(made) as old, zipfile.ZipFile(whole, "w", zipfile.ZIP_DEFLATED) as new:
        for each in old.namelist():
            new.writestr(each, members.get(each.split("/")[-1], old.read(each)))
    return whole.getvalue()


LARGE = 1 << 26  # bytes that a bomb unpacks to


def npy_of_another_size() -> bytes:
    """A file that says of its 12 numbers that they are ten million million."""
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as file, file.open("fc1.weight.npy", "w") as member:
        np.lib.format.write_array_header_1_0(member, {"descr": "<f4", "fortran_order": False, "shape": (10**13,)})
        member.write(bytes(48))
    return made.getvalue()


def tower() -> list:
    """Lists that hold each other: 10^30 numbers in a few bytes."""
    made = [0.0] * 10
    for _ in range(30):
        made = [made] * 10
    return made


BOMBS = {
    "deflated.npz": (lambda: deflated({"fc1.weight": np.zeros(LARGE // 4, np.float32)}), "would take 67,108,"),
    "header.npz": (npy_of_another_size, "cannot be read"),
    "pickle.pt": (lambda: torch_zip({}, {"data.pkl": bytes(LARGE)}), "would take 67,108,"),
    "stride.pt": (
        lambda: torch_zip({"w": torch.zeros(1, dtype=torch.bfloat16).expand(LARGE)}, {}),
        "would take 134,217,728 bytes",
    ),
    "lists.pt": (lambda: torch_zip({"w": tower()}, {}), "layer 'w' must be a tensor, found list"),
    "long.safetensors": (lambda: bytes(LARGE), "would take 67,108,864 bytes"),
}


@pytest.mark.parametrize("globals_as", ["global_{round}", None])
@pytest.mark.parametrize("bomb", BOMBS)
def test_what_would_take_far_more_than_a_model_is_refused_unread(folder, tmp_path, bomb, globals_as):
    make, reason = BOMBS[bomb]
    ending = os.path.splitext(bomb)[1]
    source = folder(ending=ending, globals_as=globals_as)
    for round_ in (0, 1):  # the first round, in which the model may not be known, and a later one
        (source / f"round_{round_}" / f"client_c0{ending}").write_bytes(make())
    tracemalloc.start()
    done = ingest(source, tmp_path / "run")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < LARGE / 4 or bomb == "header.npz"  # numpy asks for memory that it then does not touch
    assert [len(round_) for round_ in done.run.log] == [4, 4, 5]
    assert len(done.faults) == 2
    assert all("client c0: refused: " in line and reason in line for line in done.faults)


@pytest.mark.parametrize("clients", [2, 3])
def test_a_bomb_is_no_measure_of_the_others(tmp_path, clients):
    """Nobody knows the model of the first round, and of two files the smaller one is it."""
    for number in range(clients):
        state = sent(0, number) if number else {"fc1.weight": np.zeros(LARGE // 4, np.float32)}
        path = tmp_path / "in" / "round_0" / f"client_c{number}.npz"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(deflated(state))
    log = ingest(tmp_path / "in", tmp_path / "run").run.log
    assert log[0].clients.tolist() == [f"c{number}" for number in range(1, clients)]
    assert "would take 67,108," in log[0].refused["c0"]


def test_what_an_honest_client_may_send_is_read(folder, tmp_path):
    """Numbers twice as wide, in a checkpoint with the moments of an optimizer, deflated: none of it is a bomb."""
    source = folder(globals_as="global_{round}")
    wide = {name: array.astype(np.float64) for name, array in sent(0, 0).items()}
    (source / "round_0" / "client_c0.npz").write_bytes(deflated(wide))
    (source / "round_1" / "client_c0.npz").unlink()
    state = {name: torch.as_tensor(array) for name, array in sent(1, 0).items()}
    torch.save({"state_dict": state, "optimizer": [state, state]}, source / "round_1" / "client_c0.pt")
    done = ingest(source, tmp_path / "run")
    check(done.run, atol=1e-6)
    assert done.faults == ()


def test_numbers_of_examples_come_from_a_csv(folder, tmp_path, command):
    source = folder()
    for number in (2, 1, 0):  # rounds of the recording, not of the run
        (source / f"round_{number}").rename(source / f"round_{number + 1}")
    rows = [f"{number},{client},{100 * number + int(client[1:])}" for number in (1, 2, 3) for client in CLIENTS]
    (tmp_path / "counts.csv").write_text("\n".join(["round,client,num_examples", *rows]))
    status, _, err = command("ingest", source, "-o", tmp_path / "run", "--num-examples", tmp_path / "counts.csv")
    assert (status, err) == (0, "")
    found = {
        (round_.index, client): count
        for round_ in gradlens.open(tmp_path / "run").log
        for client, count in zip(round_.clients.tolist(), round_.num_examples.tolist(), strict=True)
    }
    assert found == {(r, client): 100 * (r + 1) + int(client[1:]) for r in range(3) for client in CLIENTS}
    (tmp_path / "counts.csv").write_text("client,num_examples\n" + "".join(f"{c},{c[1:]}0\n" for c in CLIENTS))
    log = ingest(source, tmp_path / "alike", num_examples=tmp_path / "counts.csv").run.log
    assert [sorted(round_.num_examples.tolist()) for round_ in log] == [[0, 10, 20, 30, 40]] * 3
    assert ingest(source, tmp_path / "plain").run.log[0].num_examples.tolist() == [1] * 5


@pytest.mark.parametrize(
    ("csv", "message"),
    [
        ("num_examples\n3\n", "expected the columns client, num_examples, and round where it varies"),
        ("client\nc0\n", "the column num_examples is missing"),
        ("client,num_examples\nc0,3\nc0,4\n", "client 'c0' appears twice"),
        ("client,num_examples\nc0,3\nc9,4\n", "the recording has no client 'c9'"),
        ("round,client,num_examples\n0,c0,3\n7,c0,4\n", "the recording has no round '7', client 'c0'"),
        ("client,num_examples\nc0,-3\n", "num_examples must be a count, found '-3'"),
        ("client,num_examples\nc0,2.5\n", "num_examples must be a count, found '2.5'"),
        ("client,num_examples\nc0,\n", "num_examples must be a count, found ''"),
        ("client,num_examples\nc0,3\n", "it has no row for round '0', client 'c1'"),
        ("", "not readable as CSV"),
    ],
)
def test_numbers_of_examples_that_cannot_be(folder, tmp_path, csv, message):
    (tmp_path / "counts.csv").write_text(csv)
    with pytest.raises(InputError, match=f"counts.csv: {message}") as raised:
        ingest(folder(), tmp_path / "run", num_examples=tmp_path / "counts.csv")
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "run").exists()


def dropped(state, name):
    return {each: array for each, array in state.items() if each != name}


FAULTS = {
    "missing": (lambda s: dropped(s, "fc2.bias"), "refused: layer 'fc2.bias' is missing"),
    "extra": (lambda s: {**s, "more": np.zeros(2)}, "refused: layer 'more' is not in the model"),
    "shape": (lambda s: {**s, "fc2.bias": np.zeros(9)}, "refused: layer 'fc2.bias' must have shape (3,), found (9,)"),
    "nan": (lambda s: {**s, "fc2.bias": np.full(3, np.nan)}, "recorded with numbers that are not finite"),
    "empty": (lambda s: {}, "refused: sent nothing"),
    "text": (lambda s: {**s, "fc2.bias": np.array(["a", "b", "c"])}, "refused: layer 'fc2.bias' must hold numbers"),
}


@pytest.mark.parametrize("globals_as", ["global_{round}", None])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_a_client_is_one_line_and_the_others_are_recorded(folder, tmp_path, fault, globals_as):
    change, line = FAULTS[fault]
    source = folder(globals_as=globals_as)
    save(source / "round_0" / "client_c0.npz", change(sent(0, 0)))  # the very first, which must not decide the model
    done = ingest(source, tmp_path / "run")
    assert len(done.faults) == 1
    assert done.faults[0].startswith(f"round 0, client c0: {line}")
    first = done.run.log[0]
    assert set(first.clients) | set(first.refused) == set(CLIENTS)
    assert all(np.isfinite(state["fc2.bias"]).all() for state in done.run.states())
    with pytest.raises(InputError, match=r"round 0, client c0: .*; without --strict the others are recorded"):
        ingest(source, tmp_path / "strict", strict=True)


@pytest.mark.parametrize("ending", [".npz", ".pt", ".safetensors"])
@pytest.mark.parametrize("kept", [0, 20, 0.5, -1])
def test_a_truncated_file_is_refused(folder, tmp_path, ending, kept):
    source = folder(ending=ending)
    victim = source / "round_2" / f"client_c1{ending}"
    whole = victim.read_bytes()
    victim.write_bytes(whole[: int(len(whole) * kept) if isinstance(kept, float) else kept])
    done = ingest(source, tmp_path / "run")
    assert len(done.faults) == 1
    assert done.faults[0].startswith("round 2, client c1: refused: ")
    assert done.faults[0].isprintable()


def test_a_global_model_that_cannot_be_read_stops_and_leaves_nothing(folder, tmp_path):
    source = folder()
    (source / "global_2.npz").write_bytes(b"PK\x03\x04 nothing")
    (tmp_path / "run").mkdir()
    with pytest.raises(InputError, match=r"the global model of round 2 'global_2.npz' cannot be read"):
        ingest(source, tmp_path / "run")
    assert list((tmp_path / "run").iterdir()) == []
    with pytest.raises(InputError):
        ingest(source, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_what_lies_in_the_way_is_left_alone(folder, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="found one that holds something"):
        ingest(folder(), tmp_path / "run")
    assert (tmp_path / "run" / "thesis.txt").read_text() == "mine"


def test_names_that_could_do_harm_are_escaped_and_links_are_not_followed(folder, tmp_path):
    source = folder()
    secret = tmp_path / "secret.npz"
    save(secret, sent(0, 0))
    (source / "round_0" / "client_link.npz").symlink_to(secret)
    save(source / "round_0" / "client_a\x1b[2J<b>.npz", sent(0, 0))
    save(source / "notes.npz", {"a": np.zeros(1)})
    done = ingest(source, tmp_path / "run")
    assert list(done.run.log[0].refused) == [r"a\x1b[2J<b>"]
    assert all(line.isprintable() for line in (*done.notes, *done.faults))
    assert any("1 links lead out of the folder" in note and "client_link" in note for note in done.notes)
    assert any("1 files match no pattern" in note and "notes.npz" in note for note in done.notes)
    assert "link" not in done.run.log[0].clients


def test_two_files_of_one_client_are_both_refused_unless_equal(folder, tmp_path):
    source = folder()
    save(source / "round_0" / "client_c0.pt", sent(0, 4))
    save(source / "round_0" / "client_c1.pt", sent(0, 1))
    done = ingest(source, tmp_path / "run")
    assert len(done.faults) == 1
    assert "client c0: refused: 2 different answers came under this name" in done.faults[0]
    assert "c1" in done.run.log[0].clients


def test_the_final_layer_and_buffers_can_be_named(folder, tmp_path):
    done = ingest(folder(), tmp_path / "run", final_layer="fc1.weight", buffers=["fc2.bias"])
    model = done.run.log.model
    assert (model.final_weight, model.final_bias) == ("fc1.weight", "fc1.bias")
    assert model.buffers == ("norm.count", "fc2.bias")
    with pytest.raises(InputError, match="final layer: the model has no layer 'head'"):
        ingest(tmp_path / "in", tmp_path / "other", final_layer="head")
    with pytest.raises(InputError, match="buffers: the model has no layer 'head'"):
        ingest(tmp_path / "in", tmp_path / "other", buffers=["head"])


def test_missing_rounds_are_said(folder, tmp_path):
    source = folder()
    for file in (source / "round_1").iterdir():
        file.unlink()
    done = ingest(source, tmp_path / "run")
    assert len(done.run.log) == 2
    assert done.notes == ("rounds 0 to 2 of the source are recorded as 0 to 1", "1 rounds between them are missing")
    assert done.run.header["source"]["ingested"]["rounds"] == [0, 2]
    np.testing.assert_array_equal(done.run.log[1].global_model["fc1.bias"], moved(2)["fc1.bias"])


def columns(rows, kind: str) -> dict[str, pa.Array]:
    """A column per layer: flat lists, nested lists, or tensors."""
    made = {}
    for name, array in STATE.items():
        cells = [row[name] for row in rows]
        if kind == "tensors" and array.shape:
            type_ = pa.fixed_shape_tensor(pa.float32(), array.shape)
            flat = pa.array(np.concatenate([cell.ravel() for cell in cells]).astype(np.float32))
            made[name] = pa.ExtensionArray.from_storage(type_, pa.FixedSizeListArray.from_arrays(flat, array.size))
        else:
            made[name] = pa.array([cell.tolist() if kind == "nested" else cell.ravel().tolist() for cell in cells])
    return made


@pytest.mark.parametrize("ending", [".parquet", ".arrow", ".feather"])
@pytest.mark.parametrize("kind", ["flat", "nested", "tensors"])
def test_tables_are_recorded(tmp_path, kind, ending):
    rows = [(r, None, moved(r)) for r in range(3)] + [
        (r, c, sent(r, i)) for i, c in enumerate(CLIENTS) for r in range(3)
    ]
    if kind == "flat":  # shapes come from a model
        rows = [row for row in rows if row[1] is not None or row[0] > 0]
    table = pa.table(
        {"round": [r for r, _, _ in rows], "client": [c for _, c, _ in rows], "num_examples": [7] * len(rows)}
        | columns([state for *_, state in rows], kind)
    )
    path = tmp_path / f"rows{ending}"
    if ending == ".parquet":
        pyarrow.parquet.write_table(table, path)
    elif ending == ".feather":
        pyarrow.feather.write_feather(table, path)
    else:
        with pa.ipc.new_file(path, table.schema) as writer:
            writer.write_table(table, max_chunksize=4)
    save(tmp_path / "first.npz", moved(0))
    first = str(tmp_path / "first.npz") if kind == "flat" else None
    done = ingest(path, tmp_path / "run", global_models=first)
    check(done.run, atol=1e-6)
    assert done.run.log[0].num_examples.tolist() == [7] * 5
    assert done.faults == ()
    with pytest.raises(InputError, match=r"it has a column num_examples of its own, found counts\.csv besides"):
        ingest(path, tmp_path / "other", global_models=first, num_examples="counts.csv")


def test_a_row_that_lacks_a_layer_is_refused(tmp_path):
    rows = [sent(0, i) for i in range(5)]
    table = pa.table({"round": [0] * 5, "client": CLIENTS} | columns(rows, "nested"))
    cells = table["fc2.bias"].to_pylist()
    cells[1], cells[2] = None, [1.0]
    table = table.set_column(table.column_names.index("fc2.bias"), "fc2.bias", pa.array(cells))
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    done = ingest(tmp_path / "rows.parquet", tmp_path / "run")
    assert [line.split(": refused: ")[1] for line in done.faults] == [
        "layer 'fc2.bias' is missing",
        "layer 'fc2.bias' must have shape (3,), found (1,)",
    ]


@pytest.mark.parametrize("ending", [".parquet", ".arrow", ".feather"])
def test_a_table_of_hostile_bytes_is_one_line(tmp_path, ending, rng):
    (tmp_path / f"rows{ending}").write_bytes(b"ARROW1\0\0" + rng.bytes(500) + b"ARROW1")
    with pytest.raises(InputError, match="not a readable"):
        ingest(tmp_path / f"rows{ending}", tmp_path / "run")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: None, "expected a folder of models, or a table .*, found nothing"),
        (lambda p: p.write_text("x"), "found a file"),
        (lambda p: p.mkdir(), r"expected models \(.pt, .*\), found none"),
    ],
)
def test_a_source_that_is_none(tmp_path, make, message):
    make(tmp_path / "in")
    with pytest.raises(InputError, match=message):
        ingest(tmp_path / "in", tmp_path / "run")


def test_truth_is_added_from_a_csv(folder, tmp_path, command):
    (tmp_path / "who.csv").write_text("client\nc1\nc4\n")
    status, out, _ = command("ingest", folder(), "-o", tmp_path / "run", "--truth", tmp_path / "who.csv")
    assert status == 0
    truth = gradlens.open(tmp_path / "run").truth
    assert len(truth) == 15
    assert set(truth.loc[truth["poisoned"], "client"]) == {"c1", "c4"}
    assert gradlens.open(tmp_path / "run").verify().intact
    ingest(tmp_path / "in", tmp_path / "other")
    (tmp_path / "some.csv").write_text("round,client,compromised,poisoned\n1,c2,true,True\n2,c2,1,no\n")
    status, out, _ = command("ingest", tmp_path / "other", "--truth", tmp_path / "some.csv")
    assert (status, "1 poisoned updates" in out) == (0, True)
    run = gradlens.open(tmp_path / "other")
    assert run.verify().intact
    assert run.is_closed
    guilty = run.truth[run.truth["compromised"]]
    assert guilty[["round", "client", "poisoned"]].to_numpy().tolist() == [[1, "c2", True], [2, "c2", False]]
    status, out, err = command("ingest", tmp_path / "other", "--truth", tmp_path / "some.csv")
    assert (status, out) == (2, "")
    assert "the ground truth is written once" in err


@pytest.mark.parametrize(
    ("csv", "message"),
    [
        ("who\nc1\n", "expected the column client"),
        ("client\nmallory\n", "the run has no client 'mallory'"),
        ("client,round\nc1,9\n", "the run has no round '9', client 'c1'"),
        ("client,round\nc1,x\n", "round must be a whole number, found 'x'"),
        ("client,poisoned\nc1,maybe\n", "poisoned must be true or false, found 'maybe'"),
        ("client\nc1\nc1\n", "client 'c1' appears twice"),
        ("", "not readable as CSV"),
    ],
)
def test_truth_that_cannot_be(recorded, tmp_path, csv, message):
    (tmp_path / "who.csv").write_text(csv.replace("c1", "a"))
    with pytest.raises(InputError, match=message.replace("c1", "a")):
        with_csv_truth(recorded, tmp_path / "who.csv")
    assert gradlens.open(recorded).verify().intact
    assert not gradlens.open(recorded).has_truth


def test_a_killed_ingest_leaves_an_open_run_and_a_stopped_one_nothing(tmp_path):
    for round_ in range(60):
        for client in range(30):
            save(tmp_path / "in" / f"round_{round_}" / f"client_{client}.npz", sent(0, client))
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from gradlens.cli import main; main()"
    for number, status in ((signal.SIGTERM, 143), (signal.SIGKILL, -9)):
        out = tmp_path / f"run{status}"
        words = [sys.executable, "-c", code, "ingest", str(tmp_path / "in"), "-o", str(out)]
        working = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        until = time.monotonic() + 60
        while not (out / "updates" / "round-000002.arrow").exists():
            assert time.monotonic() < until
            time.sleep(0.005)
        working.send_signal(number)
        said, err = working.communicate(timeout=60)
        assert (working.returncode, said) == (status, "")
        if number == signal.SIGTERM:
            assert err == "gradlens: interrupted; nothing is left of the run\n"
            assert not out.exists()
        else:
            run = gradlens.open(out)
            assert (run.is_closed, run.verify().faults) == (False, ())


def test_ten_thousand_clients_are_recorded_and_detectors_answer_or_abstain_in_seconds(tmp_path, command, rng):
    """Nothing pairwise is formed above 5,000 clients."""
    count = 10_000
    weights, biases = rng.normal(size=(count, 12)).astype(np.float32), rng.normal(size=(count, 3)).astype(np.float32)
    biases[77] += 50
    table = {
        "round": np.zeros(count, np.int64),
        "client": [f"client-{i:05d}" for i in range(count)],
        "fc.weight": pa.FixedSizeListArray.from_arrays(pa.array(weights.ravel()), 12),
        "fc.bias": pa.FixedSizeListArray.from_arrays(pa.array(biases.ravel()), 3),
    }
    pyarrow.parquet.write_table(pa.table(table), tmp_path / "rows.parquet")
    save(tmp_path / "first.npz", {"fc.weight": np.zeros((3, 4), np.float32), "fc.bias": np.zeros(3, np.float32)})
    begun = time.monotonic()
    words = ("ingest", "rows.parquet", "-o", "run", "--updates", "--globals", "first.npz", "--json")
    status, out, err = command(*words)
    assert (status, err, json.loads(out)["faults"]) == (0, "", [])
    assert len(gradlens.open(tmp_path / "run").log[0]) == count
    status, out, _ = command(
        "detect", "run", "-d", "final_bias", "-d", "layer_norms", "-d", "krum", "-d", "flame", "--csv"
    )
    answers = pd.read_csv(io.StringIO(out), keep_default_na=False)
    said = answers.groupby("detector")["abstained"].agg(set)
    assert status == 0
    assert said["krum"] == said["flame"] == {"10000 clients: nothing pairwise is formed above 5,000"}
    assert said["final_bias"] == said["layer_norms"] == {""}
    scores = answers[answers["detector"] == "final_bias"].set_index("client")["score"].astype(float)
    assert scores.idxmax() == "client-00077"
    assert time.monotonic() - begun < 60
