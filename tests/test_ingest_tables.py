"""Tables of foreign bytes: odd columns are one line, odd rows their client's refusal, bombs are not unpacked."""

import json
import os
import struct
import subprocess
import sys
from contextlib import suppress

import numpy as np
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet
import pytest

from conftest import ROOT
from gradlens import InputError
from gradlens.ingestion import ingest
from gradlens.ingestion.sizes import arrow_size, parquet_size

CLIENTS = ["a", "b", "c", "d"]
ENDINGS = [".parquet", ".arrow", ".feather"]
WEIGHTS = [[[float(10 * i + j) for j in range(4)] for _ in range(3)] for i in range(4)]


def honest(**changes) -> dict:
    columns = {"round": [0] * 4, "client": CLIENTS, "fc.weight": WEIGHTS, "fc.bias": [[0.0, 1.0, 2.0]] * 4}
    return {**columns, **changes}


def written(table: pa.Table, path, **settings):
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(table, path, **settings)
    elif path.suffix == ".feather":
        pyarrow.feather.write_feather(table, path, compression="zstd")
    else:
        with pa.ipc.new_file(path, table.schema) as writer:
            writer.write_table(table)
    return path


def fault_of(path, **settings) -> str:
    out = path.parent / "run"
    with pytest.raises(InputError) as caught:
        ingest(path, out, **settings)
    assert str(caught.value).isprintable()
    assert str(caught.value).startswith(str(path))
    assert not out.exists()
    return str(caught.value)


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"client": [[c] for c in CLIENTS]}, "the column 'client' must hold names or numbers, found list<"),
        ({"client": [{"name": c} for c in CLIENTS]}, "the column 'client' must hold names or numbers, found struct<"),
        ({"client": [0.5] * 4}, "the column 'client' must hold names or numbers, found double"),
        ({"round": [[0]] * 4}, "the column 'round' must hold whole numbers, found list<"),
        ({"round": [0, None, 0, 0]}, "the column 'round' must hold whole numbers, found empty cells"),
        ({"num_examples": [[1]] * 4}, "the column 'num_examples' must hold numbers, found list<"),
        ({"fc.bias": ["x"] * 4}, "the column 'fc.bias' must hold numbers, lists of numbers or tensors, found string"),
        ({"fc.bias": [{"a": 1.0}] * 4}, "the column 'fc.bias' must hold numbers, lists of numbers or tensors"),
        ({"fc.bias": [[["x"]]] * 4}, "the column 'fc.bias' must hold numbers, lists of numbers or tensors"),
        ({"fc\x1b[31m": ["x"] * 4}, r"the column 'fc\x1b[31m' must hold"),
    ],
)
def test_a_column_that_cannot_hold_what_it_is_for_is_named(tmp_path, changes, message, ending):
    assert message in fault_of(written(pa.table(honest(**changes)), tmp_path / f"rows{ending}"))


@pytest.mark.parametrize("ending", [".parquet", ".arrow"])
@pytest.mark.parametrize("name", ["client", "fc.bias"])
def test_a_column_that_is_there_twice_is_named(tmp_path, ending, name):
    table = pa.table(honest())
    path = written(table.append_column(name, table[name]), tmp_path / f"rows{ending}")
    assert f"expected each column once, found '{name}' 2 times" in fault_of(path)


RAGGED = [[[0.0] * 4, [0.0] * 3, [0.0] * 4]]


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize(
    ("cell", "reason"),
    [
        (RAGGED[0], "layer 'fc.weight' must hold lists of one length, found 3 and 4"),
        ([[0.0] * 4, None, [0.0] * 4], "layer 'fc.weight' has empty cells within its lists"),
        ([[0.0] * 4, [0.0, None, 0.0, 0.0], [0.0] * 4], "layer 'fc.weight' has empty cells within its lists"),
        ([], "layer 'fc.weight' must have shape (3, 4), found (0,)"),
        ([[], [], []], "layer 'fc.weight' must have shape (3, 4), found (3, 0)"),
        ([[0.0] * 4] * 100_000, "its row would take 3,200,024 bytes, a client's model takes at most 1,049,056 here"),
    ],
)
def test_an_odd_row_is_its_clients_refusal(tmp_path, cell, reason, ending):
    weights = [WEIGHTS[0], cell, *WEIGHTS[2:]]
    done = ingest(written(pa.table(honest(**{"fc.weight": weights})), tmp_path / f"rows{ending}"), tmp_path / "run")
    assert done.run.log[0].clients.tolist() == ["a", "c", "d"]
    assert done.run.log[0].refused["b"] == reason


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("kind", ["dictionary", "large_string", "integer", "fixed", "large_list"])
def test_columns_of_other_kinds_are_read_as_before(tmp_path, ending, kind):
    table = pa.table(honest())
    client, weight = table["client"], table["fc.weight"]
    types = {"dictionary": client.dictionary_encode(), "large_string": client.cast(pa.large_string())}
    columns = {"integer": pa.array([7, 8, 9, 10]), **types}
    lists = {"fixed": pa.list_(pa.list_(pa.float32(), 4), 3), "large_list": pa.large_list(pa.large_list(pa.float16()))}
    if kind in lists:
        table = table.set_column(2, "fc.weight", pa.array(WEIGHTS, lists[kind]))
    else:
        table = table.set_column(1, "client", columns[kind])
    log = ingest(written(table, tmp_path / f"rows{ending}"), tmp_path / "run").run.log
    assert log[0].clients.tolist() == (["7", "8", "9", "10"] if kind == "integer" else CLIENTS)
    sent = log[0].updates["fc.weight"] + log[0].global_model["fc.weight"]
    np.testing.assert_allclose(sent, np.array(weight.to_pylist()))


LARGE = 40_000_000  # numbers that a bomb unpacks to


def one_row(cells: int = LARGE) -> pa.Table:
    flat = pa.array(np.zeros(cells))
    return pa.table({"round": [0], "client": ["a"], "w": pa.ListArray.from_arrays(pa.array([0, cells]), flat)})


def many_rows() -> pa.Table:
    zeros = pa.array(np.zeros(LARGE, np.int8))
    names = pa.DictionaryArray.from_arrays(zeros, pa.array(["a"]))
    return pa.table({"round": zeros, "client": names, "w": pa.nulls(LARGE)})


def lying(path) -> None:
    """Says in the footer of a Parquet file that a column of `LARGE` numbers holds one."""
    raw, number, true = path.read_bytes(), 2 * LARGE, b""
    while number:
        true, number = true + bytes([number & 127 | (128 if number > 127 else 0)]), number >> 7
    cut = len(raw) - 8 - struct.unpack("<i", raw[-8:-4])[0]
    footer = raw[cut:].replace(true, b"\x82" + b"\x80" * (len(true) - 2) + b"\x00")
    path.write_bytes(raw[:cut] + footer)
    assert pyarrow.parquet.ParquetFile(path).metadata.row_group(0).column(2).num_values == 1


MEASURED = """
import json, resource, sys
from gradlens.ingestion import ingest
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    ingest(sys.argv[1], sys.argv[2])
    said = ""
except ValueError as error:
    said = str(error)
print(json.dumps([said, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024]))
"""


@pytest.mark.parametrize("bomb", ["row.parquet", "lie.parquet", "rows.parquet", "row.feather", "rows.feather"])
def test_what_would_unpack_to_far_more_than_its_file_is_refused_unread(tmp_path, bomb):
    path = written(many_rows() if bomb.startswith("rows") else one_row(), tmp_path / bomb)
    assert path.stat().st_size < 1_000_000
    if bomb.startswith("lie"):
        lying(path)
    words = [sys.executable, "-c", MEASURED, str(path), str(tmp_path / "run")]
    done = subprocess.run(
        words, capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    said, grown = json.loads(done.stdout)
    expected = "rows in a file of its size, found 40,000,000" if bomb.startswith("rows") else "bytes of memory, found"
    assert expected in said
    assert said.isprintable()
    assert grown < LARGE
    assert not (tmp_path / "run").exists()


def test_a_table_of_a_named_model_may_hold_that_model_in_each_row(tmp_path):
    count = 3_000_000
    zeros = pa.FixedSizeListArray.from_arrays(pa.array(np.zeros(3 * count)), count)
    path = written(pa.table({"round": [0] * 3, "client": CLIENTS[:3], "w": zeros}), tmp_path / "rows.parquet")
    assert "where that is right, name a file of its model with --globals" in fault_of(path)
    np.savez(tmp_path / "first.npz", w=np.zeros(count, np.float32))
    done = ingest(path, tmp_path / "run", global_models=str(tmp_path / "first.npz"))
    assert len(done.run.log[0]) == 3


def test_a_name_of_a_million_characters_in_every_row_is_in_memory_once(tmp_path):
    names = pa.DictionaryArray.from_arrays(pa.array(np.zeros(1_000, np.int32)), pa.array(["x" * 10**6])).cast(
        pa.string()
    )
    table = pa.table({"round": [0] * 1_000, "client": names, "w": [0.0] * 1_000})
    path = written(table, tmp_path / "rows.parquet")
    words = [sys.executable, "-c", MEASURED, str(path), str(tmp_path / "run")]
    done = subprocess.run(
        words, capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert json.loads(done.stdout)[1] < 400_000_000


def test_texts_that_repeat_each_others_beginning_are_not_read(tmp_path):
    settings = {"use_dictionary": False, "column_encoding": {"client": "DELTA_BYTE_ARRAY"}}
    said = fault_of(written(pa.table(honest()), tmp_path / "rows.parquet", **settings))
    assert "texts are read in plain and in dictionary encoding only" in said


@pytest.mark.parametrize("version", ["1.0", "2.0"])
@pytest.mark.parametrize("compression", ["none", "snappy", "zstd"])
@pytest.mark.parametrize("dictionary", [True, False])
def test_the_size_of_a_parquet_file_is_that_of_its_values(tmp_path, version, compression, dictionary):
    table = pa.table(
        honest(big=[np.arange(1_000.0) + i for i in range(4)], half=pa.array([[1.5]] * 4, pa.list_(pa.float16())))
    )
    path = written(
        table, tmp_path / "rows.parquet", compression=compression, data_page_version=version, data_page_size=100,
        use_dictionary=dictionary, row_group_size=3, write_page_checksum=True, write_page_index=True,
    )  # fmt: skip
    rows, size = parquet_size(path)
    assert rows == 4
    assert 4 * 1_000 * 8 <= size <= 3 * table.nbytes


@pytest.mark.parametrize("compression", ["uncompressed", "lz4", "zstd"])
def test_the_size_of_an_arrow_file_is_that_of_its_buffers(tmp_path, compression):
    table = pa.table(honest(client=pa.array(CLIENTS).dictionary_encode(), big=[[1.5] * 1_000] * 4))
    pyarrow.feather.write_feather(table, tmp_path / "rows.feather", compression=compression)
    rows, size = arrow_size(tmp_path / "rows.feather")
    assert rows == 4
    assert table.nbytes <= size <= table.nbytes + 64 * 20


@pytest.mark.parametrize("ending", ENDINGS)
def test_cut_and_flipped_files_are_one_line_or_a_run(tmp_path, ending, rng):
    path = written(pa.table(honest()), tmp_path / f"rows{ending}")
    whole = path.read_bytes()
    for number in range(150):
        raw = bytearray(whole)
        for place in rng.integers(len(raw), size=3):
            raw[place] = rng.integers(256)
        path.write_bytes(raw if number % 3 else whole[: rng.integers(len(whole))])
        with suppress(InputError):
            ingest(path, tmp_path / f"run{number}")


def test_a_pipe_is_not_waited_for(tmp_path):
    for ending in ENDINGS:
        os.mkfifo(tmp_path / f"rows{ending}")
        assert "expected a plain file, found a pipe" in fault_of(tmp_path / f"rows{ending}")
