"""The Arrow files of a run: updates (`updates/`), global models (`globals/`), and plain tables.

A file of updates has a row per client and a fixed-shape tensor column per layer. Files may come from anybody, so each
is validated in full before its numbers are used: malformed bytes could crash the reader otherwise.
"""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pandas as pd
import pyarrow as pa

from gradlens.errors import InputError, UnreadableError
from gradlens.log.manifest import beside, regular_file
from gradlens.log.model import Layer, ModelSpec
from gradlens.log.round import Round
from gradlens.log.sketches import POWERS
from gradlens.log.sources import ArraySource, LazyLayers

BATCH_BYTES = 1_000_000_000  # a round up to this size is one record batch, which is read without a copy


def write_updates(path: Path, model: ModelSpec, round_: Round) -> None:
    """Writes the updates of one round, whole or not at all.

    Parameters
    ----------
    path : Path
        Where to.
    model : ModelSpec
        The layers that are recorded.
    round_ : Round
        Its updates, moments and refused clients.
    """
    metadata = {"round": str(round_.index), "refused": json.dumps(dict(round_.refused), sort_keys=True)}
    if round_.started:
        metadata["started"] = json.dumps(dict(round_.started), sort_keys=True)
    if round_.signatures:
        metadata["signatures"] = json.dumps(dict(round_.signatures), sort_keys=True)
    schema = _updates_schema(model, tuple(round_.moments)).with_metadata(metadata)
    row_bytes = sum(layer.size * np.dtype(layer.dtype).itemsize for layer in model.layers)
    rows = max(1, BATCH_BYTES // row_bytes)

    def batches() -> Iterator[pa.RecordBatch]:
        for start in range(0, max(1, len(round_)), rows):
            part = slice(start, start + rows)
            columns = [
                pa.array(round_.clients[part].tolist(), pa.string()),
                pa.array(round_.num_examples[part]),
            ]
            columns += [_tensor(layer, round_.updates[layer.name][part]) for layer in model.layers]
            columns += [_tensor(_moments(name), moments[part]) for name, moments in round_.moments.items()]
            yield pa.record_batch(columns, schema=schema)

    _write(path, schema, batches())


def read_updates(
    path: Path, model: ModelSpec, global_model: Mapping[str, np.ndarray], summed: tuple[str, ...] = ()
) -> Round:
    """Reads the updates of one round, memory-mapped.

    Parameters
    ----------
    path : Path
        A file that `write_updates` wrote.
    model : ModelSpec
        The layers that are recorded.
    global_model : Mapping of str to ndarray
        Layer -> array, the global model before the round.
    summed : tuple of str, default ()
        The layers whose moments are recorded.

    Returns
    -------
    Round

    Raises
    ------
    InputError
        If the file is not a round of this model.
    """
    batches, metadata = read_batches(path, _updates_schema(model, summed))
    try:
        index, refused = int(metadata[b"round"]), json.loads(metadata[b"refused"])
        started = json.loads(metadata.get(b"started", b"{}"))
        signatures = json.loads(metadata.get(b"signatures", b"{}"))
    except (KeyError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: the round or the refused clients cannot be read: {error!r:.200}") from error
    for what, texts in (("refused clients", refused), ("signatures", signatures)):
        if not isinstance(texts, dict) or not all(isinstance(text, str) for text in texts.values()):
            raise InputError(f"{path}: the {what} must be a JSON object, client -> text")
    if not isinstance(started, dict) or not all(isinstance(start, int) for start in started.values()):
        raise InputError(f"{path}: the rounds that clients started from must be a JSON object, client -> round")
    positions = {layer.name: column for column, layer in enumerate(model.layers, start=2)}

    def pieces(name: str) -> list[np.ndarray]:
        return [_numbers(batch.column(positions[name]), model[name]) for batch in batches]

    updates = ArraySource(tuple(model), pieces)
    clients = np.array([name for batch in batches for name in batch.column(0).to_pylist()], dtype=np.str_)
    num_examples = np.concatenate([batch.column(1).to_numpy(zero_copy_only=True) for batch in batches])
    moments = {
        name: np.concatenate([_numbers(batch.column(column), _moments(name)) for batch in batches])
        for column, name in enumerate(summed, start=2 + len(model))
    }
    buffers = model.buffers
    return Round(index, clients, num_examples, updates, global_model, refused, buffers, moments, started, signatures)


def write_state(path: Path, model: ModelSpec, state: Mapping[str, np.ndarray]) -> None:
    """Writes one global model, layer -> array, as a file of one row."""
    schema = _state_schema(model)
    columns = [_tensor(layer, np.asarray(state[layer.name], layer.dtype)[None]) for layer in model.layers]
    _write(path, schema, iter([pa.record_batch(columns, schema=schema)]))


def read_state(path: Path, model: ModelSpec) -> Mapping[str, np.ndarray]:
    """Opens a global model, layer -> array; the file is mapped, and checked, when the first layer is read.

    Reading a layer raises InputError if the file is not one row of this model.
    """

    @cache
    def columns() -> list[pa.Array]:
        batches, _ = read_batches(path, _state_schema(model))
        if len(batches) != 1 or batches[0].num_rows != 1:
            raise InputError(f"{path}: a global model is one row, found {sum(batch.num_rows for batch in batches)}")
        return batches[0].columns

    positions = {layer.name: i for i, layer in enumerate(model.layers)}
    return LazyLayers(tuple(model), lambda name: _numbers(columns()[positions[name]], model[name])[0])


def write_table(path: Path, table: pd.DataFrame) -> None:
    """Writes a plain table, such as verdicts or the ground truth."""
    arrow = pa.Table.from_pandas(table, preserve_index=False).replace_schema_metadata(None)
    _write(path, arrow.schema, iter(arrow.to_batches()))


def read_table(path: Path) -> pd.DataFrame:
    """Reads a plain table; raises InputError if the file is not a readable Arrow file."""
    batches, _ = read_batches(path, None)
    return pa.Table.from_batches(batches).to_pandas()


def replace_with(path: Path, payload: bytes, *, secret: bool = False) -> None:
    """Writes a small file, whole or not at all; only its owner may read a secret one."""
    with _placed(path) as file:
        if secret:
            os.fchmod(file.fileno(), 0o600)
        file.write(payload)


def _write(path: Path, schema: pa.Schema, batches: Iterator[pa.RecordBatch]) -> None:
    with _placed(path) as file, pa.ipc.new_file(file, schema) as writer:
        for batch in batches:
            writer.write_batch(batch)


@contextmanager
def _placed(path: Path) -> Iterator[BinaryIO]:
    """Opens a temporary file; when the block ends it is flushed and renamed to `path`, on an exception removed."""
    part = beside(path)
    try:
        with open(part, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)  # so that an unfinished file does not keep a full disk full
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Flushes a folder's entries (new and renamed files) to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_batches(path: Path, schema: pa.Schema | None = None) -> tuple[list[pa.RecordBatch], Mapping[bytes, bytes]]:
    """Reads an Arrow file, memory-mapped, and validates every buffer of it.

    Parameters
    ----------
    path : Path
        The file.
    schema : pyarrow.Schema, optional
        The expected columns, none of which may have empty cells; None accepts any table.

    Returns
    -------
    batches : list of pyarrow.RecordBatch
        At least one.
    metadata : Mapping of bytes to bytes
        Of the schema.

    Raises
    ------
    UnreadableError
        If it is not a readable Arrow file, or its columns are not those of `schema`.
    """
    try:
        reader = pa.ipc.open_file(pa.memory_map(str(regular_file(path))))
        file_schema = reader.schema
        if schema is not None and not file_schema.equals(schema):
            raise UnreadableError(f"{path}: its columns are not those of the model in run.json")
        batches = [reader.get_batch(number) for number in range(reader.num_record_batches)]
        for batch in batches:
            batch.validate(full=True)
            if any(column.null_count for column in batch.columns) and schema is not None:
                raise UnreadableError(f"{path}: every cell must have a value, found empty ones")
    except UnreadableError:
        raise
    except InputError as error:
        raise UnreadableError(str(error)) from error
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = str(error).splitlines()[0] if str(error) else repr(error)
        raise UnreadableError(f"{path}: not a readable Arrow file: {reason}") from error
    if not batches:
        raise UnreadableError(f"{path}: expected at least one record batch, found none")
    return batches, file_schema.metadata or {}


def _updates_schema(model: ModelSpec, summed: tuple[str, ...]) -> pa.Schema:
    columns: list[tuple[str, Any]] = [("client", pa.string()), ("num_examples", pa.int64())]
    layers = (*model.layers, *map(_moments, summed))
    return pa.schema(columns + [(layer.name, _tensor_type(layer)) for layer in layers])


def _moments(layer: str) -> Layer:
    """The column that holds a layer's moments."""
    return Layer(f"moments of {layer}", (POWERS,), "float64", "buffer")


def _state_schema(model: ModelSpec) -> pa.Schema:
    return pa.schema([(layer.name, _tensor_type(layer)) for layer in model.layers])


def _tensor_type(layer: Layer) -> pa.FixedShapeTensorType:
    return pa.fixed_shape_tensor(pa.from_numpy_dtype(layer.dtype), layer.shape or (1,))


def _tensor(layer: Layer, rows: np.ndarray) -> pa.Array:
    """A tensor column from an array [row, *shape], in C order; built from its storage, which allows zero rows."""
    numbers = pa.array(np.ascontiguousarray(rows, dtype=layer.dtype).reshape(-1))
    return pa.ExtensionArray.from_storage(_tensor_type(layer), pa.FixedSizeListArray.from_arrays(numbers, layer.size))


def _numbers(column: pa.Array, layer: Layer) -> np.ndarray:
    """The values of a tensor column as an array [row, *shape], without a copy."""
    storage = column.storage
    numbers = storage.values.to_numpy(zero_copy_only=True)
    start = storage.offset * layer.size
    return numbers[start : start + len(column) * layer.size].reshape(len(column), *layer.shape)
