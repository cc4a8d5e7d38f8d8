"""Arrow files of a run: what was sent (`updates/`), the global models (`globals/`), and plain tables.

One row per client, one fixed-shape-tensor column per layer. A file that anybody could have written is
checked in full before a number of it is touched: hostile bytes would crash the reader otherwise.
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

BATCH_BYTES = 1_000_000_000  # a round up to this size is one record batch, read as views


def write_updates(path: Path, model: ModelSpec, round_: Round) -> None:
    """Writes one round's updates beside `path`, flushes them to the disk and renames them there."""
    metadata = {"round": str(round_.index), "refused": json.dumps(dict(round_.refused), sort_keys=True)}
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
            columns += [_tensor(_moments(name), rows[part]) for name, rows in round_.moments.items()]
            yield pa.record_batch(columns, schema=schema)

    _write(path, schema, batches())


def read_updates(
    path: Path, model: ModelSpec, global_model: Mapping[str, np.ndarray], summed: tuple[str, ...] = ()
) -> Round:
    """One round as it was recorded, its arrays mapped from the file; raises InputError on anything else.

    summed: the layers of which there are moments.
    """
    batches, metadata = read_batches(path, _updates_schema(model, summed))
    try:
        index, refused = int(metadata[b"round"]), json.loads(metadata[b"refused"])
    except (KeyError, ValueError) as error:
        raise InputError(f"{path}: the round or the refused clients cannot be read: {error!r}") from error
    if not isinstance(refused, dict) or not all(isinstance(v, str) for v in refused.values()):
        raise InputError(f"{path}: the refused clients must be a table client -> reason")
    positions = {layer.name: i + 2 for i, layer in enumerate(model.layers)}

    def pieces(name: str) -> list[np.ndarray]:
        return [_numbers(batch.column(positions[name]), model[name]) for batch in batches]

    updates = ArraySource(tuple(model), pieces)
    clients = np.array([name for batch in batches for name in batch.column(0).to_pylist()], dtype=np.str_)
    num_examples = np.concatenate([batch.column(1).to_numpy(zero_copy_only=True) for batch in batches])
    place = 2 + len(model)
    moments = {
        name: np.concatenate([_numbers(batch.column(place + i), _moments(name)) for batch in batches])
        for i, name in enumerate(summed)
    }
    return Round(index, clients, num_examples, updates, global_model, refused, model.buffers, moments)


def write_state(path: Path, model: ModelSpec, state: Mapping[str, np.ndarray]) -> None:
    """Writes one global model, a file of one row."""
    schema = _state_schema(model)
    columns = [_tensor(layer, np.asarray(state[layer.name], layer.dtype)[None]) for layer in model.layers]
    _write(path, schema, iter([pa.record_batch(columns, schema=schema)]))


def read_state(path: Path, model: ModelSpec) -> Mapping[str, np.ndarray]:
    """Layer -> array of one global model, mapped from the file when the first layer is asked for."""

    @cache
    def columns() -> list[pa.Array]:
        batches, _ = read_batches(path, _state_schema(model))
        if len(batches) != 1 or batches[0].num_rows != 1:
            raise InputError(f"{path}: a global model is one row, found {sum(b.num_rows for b in batches)}")
        return batches[0].columns

    positions = {layer.name: i for i, layer in enumerate(model.layers)}
    return LazyLayers(tuple(model), lambda name: _numbers(columns()[positions[name]], model[name])[0])


def write_table(path: Path, table: pd.DataFrame) -> None:
    """Writes a plain table (verdicts, truth)."""
    arrow = pa.Table.from_pandas(table, preserve_index=False).replace_schema_metadata(None)
    _write(path, arrow.schema, iter(arrow.to_batches()))


def read_table(path: Path) -> pd.DataFrame:
    """A plain table as pandas; raises InputError where the file is none."""
    batches, _ = read_batches(path, None)
    return pa.Table.from_batches(batches).to_pandas()


def replace_with(path: Path, payload: bytes, *, secret: bool = False) -> None:
    """Writes a small file whole or not at all; a secret one is for its owner's eyes only."""
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
    """A file that is written beside its place, flushed to the disk and then renamed there, or not there at all."""
    part = beside(path)
    try:
        with open(part, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)  # a full disk is not kept full by what was not finished
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Flushes the names in a folder to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_batches(path: Path, schema: pa.Schema | None = None) -> tuple[list[pa.RecordBatch], Mapping[bytes, bytes]]:
    """The record batches of an Arrow file, every buffer of them checked, and the schema's metadata.

    Raises InputError where it is none, or its columns are not those of `schema`.
    """
    try:
        reader = pa.ipc.open_file(pa.memory_map(str(regular_file(path))))
        found = reader.schema
        if schema is not None and not found.equals(schema):
            raise UnreadableError(f"{path}: its columns are not those of the model in run.json")
        batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
        for batch in batches:
            batch.validate(full=True)
            if any(column.null_count for column in batch.columns) and schema is not None:
                raise UnreadableError(f"{path}: every cell must be filled, found empty ones")
    except UnreadableError:
        raise
    except InputError as error:
        raise UnreadableError(str(error)) from error
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = str(error).splitlines()[0] if str(error) else repr(error)
        raise UnreadableError(f"{path}: not a readable Arrow file: {reason}") from error
    if not batches:
        raise UnreadableError(f"{path}: a file of a run holds at least one record batch, found none")
    return batches, found.metadata or {}


def _updates_schema(model: ModelSpec, summed: tuple[str, ...]) -> pa.Schema:
    columns: list[tuple[str, Any]] = [("client", pa.string()), ("num_examples", pa.int64())]
    layers = (*model.layers, *map(_moments, summed))
    return pa.schema(columns + [(layer.name, _tensor_type(layer)) for layer in layers])


def _moments(layer: str) -> Layer:
    """The column of a layer's moments."""
    return Layer(f"moments of {layer}", (POWERS,), "float64", "buffer")


def _state_schema(model: ModelSpec) -> pa.Schema:
    return pa.schema([(layer.name, _tensor_type(layer)) for layer in model.layers])


def _tensor_type(layer: Layer) -> pa.FixedShapeTensorType:
    return pa.fixed_shape_tensor(pa.from_numpy_dtype(layer.dtype), layer.shape or (1,))


def _tensor(layer: Layer, rows: np.ndarray) -> pa.Array:
    """A column of tensors from an array [row, *shape], in C order; from parts, since an empty cohort is one too."""
    numbers = pa.array(np.ascontiguousarray(rows, dtype=layer.dtype).reshape(-1))
    return pa.ExtensionArray.from_storage(_tensor_type(layer), pa.FixedSizeListArray.from_arrays(numbers, layer.size))


def _numbers(column: pa.Array, layer: Layer) -> np.ndarray:
    """A view [row, *shape] of a column of tensors."""
    storage = column.storage
    numbers = storage.values.to_numpy(zero_copy_only=True)
    start = storage.offset * layer.size
    return numbers[start : start + len(column) * layer.size].reshape(len(column), *layer.shape)
