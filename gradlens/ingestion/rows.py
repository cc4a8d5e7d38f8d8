"""The rows of a foreign table: its columns and its size are checked before a number of it is unpacked."""

import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from gradlens.errors import InputError
from gradlens.ingestion.formats import first_line
from gradlens.ingestion.sizes import arrow_size, check_size, check_text, parquet_size
from gradlens.log.files import read_batches
from gradlens.log.intake import Unfit, shown
from gradlens.log.manifest import regular_file

DEEPEST = 16  # lists within lists


def read_rows(path: Path, model_bytes: int = 0) -> pa.Table:
    """The columns of a Parquet or Arrow file: round, client, numbers of examples, and one per layer.

    Parameters
    ----------
    path : Path
        The file.
    model_bytes : int
        What the model takes, by default not known.

    Raises
    ------
    InputError
        Where it is no such table, or would take far more memory than its size lets expect.
    """
    file = regular_file(Path(os.path.realpath(path)))
    kind = "Parquet" if path.suffix == ".parquet" else "Arrow"
    try:
        table = (_parquet if kind == "Parquet" else _arrow)(path, file, model_bytes).combine_chunks()
        table.validate(full=True)
    except InputError:
        raise
    except (pa.ArrowException, OSError, ValueError, MemoryError, RecursionError) as error:
        raise InputError(f"{path}: not a readable {kind} file: {first_line(error)}") from error
    if table["round"].null_count:
        raise InputError(f"{path}: the column 'round' must hold whole numbers, found empty cells")
    return table


def names_in(path: Path, column: pa.ChunkedArray) -> list[Any]:
    """The clients of a column, each name in memory once; None where there is none."""
    names: list[Any] = []
    for chunk in column.chunks:
        if pa.types.is_string_view(chunk.type):
            check_text(path, chunk)
        encoded = chunk if pa.types.is_dictionary(chunk.type) else chunk.dictionary_encode()
        values = encoded.dictionary.to_pylist()
        names += [None if place is None else values[place] for place in encoded.indices.to_pylist()]
    return names


def layer_of(name: str, cell: Any, shape: tuple[int, ...] | None) -> np.ndarray:
    """The numbers of one layer in one row: of a tensor, a list, a list of lists, or a single number.

    Parameters
    ----------
    name : str
        The layer.
    cell : pyarrow.Scalar
        What stands in its column.
    shape : tuple of int, optional
        The shape that a flat list takes.

    Raises
    ------
    Unfit
        Where it holds no array of numbers.
    """
    try:
        if isinstance(cell, pa.ExtensionScalar):
            array = _nested(cell.value.values).reshape(cell.type.shape)
        elif isinstance(cell, pa.ListScalar | pa.FixedSizeListScalar | pa.LargeListScalar):
            array = _nested(cell.values)
        else:
            array = np.asarray(cell.as_py())
    except Unfit as reason:
        raise Unfit(f"layer {shown(name)} {reason}") from reason
    except Exception as error:  # whatever bytes do to the reader
        raise Unfit(f"layer {shown(name)} cannot be read: {first_line(error)}") from error
    if shape is not None and array.size == np.prod(shape, dtype=np.int64):
        return array.reshape(shape)
    return array


def _nested(values: Any) -> np.ndarray:
    """Lists of lists as an array, without a copy; raises Unfit where they are not of one length, or have gaps."""
    shape = [len(values)]
    while pa.types.is_nested(values.type) and not values.null_count and len(values):
        lengths = pc.min_max(pc.list_value_length(values)).as_py()  # type: ignore[attr-defined]
        if lengths["min"] != lengths["max"]:
            raise Unfit(f"must hold lists of one length, found {lengths['min']} and {lengths['max']}")
        shape.append(lengths["min"])
        values = values.flatten()
    if values.null_count:
        raise Unfit("has empty cells within its lists")
    if pa.types.is_nested(values.type) or pa.types.is_null(values.type):
        return np.zeros(shape)  # lists that hold nothing
    return values.to_numpy(zero_copy_only=False).reshape(shape)


def _parquet(path: Path, file: Path, model_bytes: int) -> pa.Table:
    import pyarrow.parquet as pq

    with pq.ParquetFile(file) as opened:
        _check_columns(path, opened.schema_arrow)
    check_size(path, *parquet_size(file), model_bytes)
    with pq.ParquetFile(file, read_dictionary=["client"]) as opened:  # a name that repeats is in memory once
        return opened.read()


def _arrow(path: Path, file: Path, model_bytes: int) -> pa.Table:
    check_size(path, *arrow_size(file), model_bytes)
    table = pa.Table.from_batches(read_batches(file)[0])
    _check_columns(path, table.schema)
    return table


def _check_columns(path: Path, schema: pa.Schema) -> None:
    """Raises InputError unless the columns are those of a recording, each of a type that can hold what it is for."""
    names = schema.names
    if missing := [name for name in ("round", "client") if name not in names]:
        raise InputError(f"{path}: expected the columns round and client, and one per layer; {missing[0]!r} is missing")
    if twice := [(name, count) for name, count in Counter(names).items() if count > 1]:
        raise InputError(f"{path}: expected each column once, found {shown(twice[0][0])} {twice[0][1]} times")
    for field in schema:
        expected = _expected(field.name, field.type)
        if expected:
            found = shown(str(field.type))[1:-1]
            raise InputError(f"{path}: the column {shown(field.name)} must hold {expected}, found {found}")


def _expected(name: str, type_: pa.DataType) -> str:
    """What a column must hold and does not, "" where it does."""
    is_ = pa.types
    if name == "round":
        return "" if is_.is_integer(type_) else "whole numbers"
    if name == "client":
        inner = type_.value_type if is_.is_dictionary(type_) else type_
        texts = is_.is_string(inner), is_.is_large_string(inner), is_.is_string_view(inner), is_.is_integer(inner)
        return "" if any(texts) or is_.is_null(inner) else "names or numbers"
    if name == "num_examples":
        return "" if is_.is_integer(type_) or is_.is_floating(type_) or is_.is_null(type_) else "numbers"
    for _ in range(DEEPEST):
        if not (is_.is_list(type_) or is_.is_large_list(type_) or is_.is_fixed_size_list(type_)):
            break
        type_ = type_.value_type
    inner = type_.value_type if isinstance(type_, pa.FixedShapeTensorType) else type_
    numbers = is_.is_integer(inner), is_.is_floating(inner), is_.is_boolean(inner), is_.is_null(inner)
    return "" if any(numbers) else "numbers, lists of numbers or tensors"
