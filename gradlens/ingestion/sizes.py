"""How much memory a table would take: asked of the headers in its file, before anything is unpacked.

A footer can say anything, so each page of a Parquet file and each batch of an Arrow file is asked as well: it is their
headers that a reader believes when it sets memory aside.
"""

import mmap
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from gradlens.errors import InputError

PER_ROW = 256  # bytes that a row takes as the number of its round, its client and what stands for its model
PLAIN_MOST, TIMES_FILE = 1 << 26, 100  # what a table may take: so many bytes, and so many times its file
SCHEMA, ROWS, ROW_GROUPS = 2, 3, 4  # fields of a Parquet file's footer, of its leaves, groups of rows and columns
TYPE, TYPE_LENGTH, NUM_CHILDREN = 1, 2, 5
CHUNKS, CHUNK_METADATA = 1, 3
VALUES, PACKED, FIRST_PAGE, DICTIONARY = 5, 7, 9, 11
WIDTHS = {0: 1, 1: 4, 2: 8, 3: 12, 4: 4, 5: 8, 6: 4}  # type of a leaf -> bytes of a value; of a text, of its place
TEXT = 6
DATA_PAGE, DATA_PAGE_2 = 5, 8  # fields of a page's header that only pages of values have
TEXT_ENCODINGS = {0, 2, 8}  # plain, by dictionary: in others a text may repeat the beginning of the one before
DICTIONARY_BATCH, RECORD_BATCH = 2, 3
BLOCK = struct.Struct("<qi4xq")  # of an Arrow footer: where a message lies, bytes of its header and of its body
BUFFER = struct.Struct("<qq")  # where it lies in the body, and its bytes there


class MalformedError(ValueError):
    """Bytes that are no header."""


def check_size(path: Path, rows: int, size: int, model_bytes: int) -> None:
    """Raises InputError where a table would take far more memory than its file lets expect.

    Parameters
    ----------
    path : Path
        The file.
    rows, size : int
        What it holds, and the bytes that its columns take when they are unpacked.
    model_bytes : int
        What the model takes, of which each row may take four; 0 where it is not known.
    """
    most = PLAIN_MOST + TIMES_FILE * path.stat().st_size
    if rows * PER_ROW > most:
        raise InputError(f"{path}: expected at most {most // PER_ROW:,} rows in a file of its size, found {rows:,}")
    most = max(most, rows * 4 * model_bytes)
    if size > most:
        raise InputError(
            f"{path}: expected a table that takes at most {most:,} bytes of memory, found one of {size:,}; where that "
            "is right, name a file of its model with --globals, or write the table without compression and dictionaries"
        )


def check_text(path: Path, column: pa.StringViewArray) -> None:
    """Raises InputError where texts that share their characters would take far more memory than their file."""
    views = column.buffers()[1]
    lengths = np.frombuffer(views, np.int32)[::4][column.offset : column.offset + len(column)]
    check_size(path, len(column), int(lengths.sum(dtype=np.int64)), 0)


def parquet_size(path: Path) -> tuple[int, int]:
    """Rows of a Parquet file, and bytes that its columns take when they are unpacked; raises MalformedError.

    pyarrow's own view of the footer is not asked: it ends the process where some of its numbers contradict each other.
    """
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        footer, _ = _thrift(data, len(data) - 8 - _int(data, len(data) - 8, 4))
        leaves = [leaf for leaf in _structs(footer, SCHEMA) if TYPE in leaf and not leaf.get(NUM_CHILDREN)]
        rows, size, packed = _number(footer, ROWS), 0, 0
        for group in _structs(footer, ROW_GROUPS):
            chunks = [chunk.get(CHUNK_METADATA) for chunk in _structs(group, CHUNKS)]
            if len(chunks) != len(leaves):
                raise MalformedError("its groups of rows differ in their columns")
            for leaf, chunk in zip(leaves, chunks, strict=True):
                if not isinstance(chunk, dict) or chunk.get(TYPE) != leaf[TYPE]:
                    raise MalformedError("its columns are not those of its schema")
                packed += _number(chunk, PACKED)
                if packed > len(data):
                    raise MalformedError("its columns hold more bytes than the file")  # one lies in another
                size += _chunk_size(data, chunk, WIDTHS.get(leaf[TYPE]) or _number(leaf, TYPE_LENGTH))
    return rows, size


def _chunk_size(data: mmap.mmap, chunk: dict[int, Any], width: int) -> int:
    """Bytes that the pages of a column take when they are unpacked, and those of the values in them."""
    at = _number(chunk, FIRST_PAGE)
    if DICTIONARY in chunk:
        at = min(at, _number(chunk, DICTIONARY)) or at
    end, seen, unpacked, most = at + _number(chunk, PACKED), 0, 0, _number(chunk, VALUES)
    while at < end and seen < most:
        header, at = _thrift(data, at)
        page = header.get(DATA_PAGE) or header.get(DATA_PAGE_2) or {}
        if not isinstance(page, dict):
            raise MalformedError("the header of a page is none")
        encoding = page.get(2 if DATA_PAGE in header else 4)
        if chunk[TYPE] == TEXT and page and encoding not in TEXT_ENCODINGS:
            raise MalformedError("texts are read in plain and in dictionary encoding only, found another")
        unpacked, at = unpacked + _number(header, 2), at + _number(header, 3)
        seen += _number(page, 1) if page else 0
    return unpacked + max(seen, most) * width


def _structs(fields: dict[int, Any], name: int) -> list[dict[int, Any]]:
    found = fields.get(name)
    if not isinstance(found, list) or not all(isinstance(each, dict) for each in found):
        raise MalformedError("the footer lacks what each file has")
    return found


def _number(fields: dict[int, Any], name: int) -> int:
    found = fields.get(name)
    if not isinstance(found, int) or found < 0:
        raise MalformedError("a header lacks a number that each has")
    return found


def _thrift(data: mmap.mmap, at: int) -> tuple[dict[int, Any], int]:
    """The numbers, structs and lists of a struct in Thrift's compact protocol, and where it ends; no texts."""
    fields: dict[int, Any] = {}
    name = 0
    while byte := _byte(data, at):
        at, kind = at + 1, byte & 15
        if byte >> 4:
            name += byte >> 4
        else:
            name, at = _zigzag(data, at)
        if kind in (1, 2):  # true and false take no bytes of their own
            continue
        fields[name], at = _value(data, at, kind)
    return fields, at + 1


def _value(data: mmap.mmap, at: int, kind: int) -> tuple[Any, int]:
    """A value of one of Thrift's kinds, and where it ends; None for what is passed over."""
    if kind in (4, 5, 6):
        return _zigzag(data, at)
    if kind == 8:
        length, at = _varint(data, at)
        return None, at + length
    if kind == 9:
        byte, at = _byte(data, at), at + 1
        length, at = _varint(data, at) if byte >> 4 == 15 else (byte >> 4, at)
        values = []
        for _ in range(length):
            value, at = _value(data, at, byte & 15)
            values.append(value)
        return values, at
    if kind == 12:
        return _thrift(data, at)
    if kind in (1, 2, 3, 7):
        return None, at + (8 if kind == 7 else 1)
    raise MalformedError("a header holds what none has")


def _byte(data: mmap.mmap, at: int) -> int:
    if not 0 <= at < len(data):
        raise MalformedError("the file ends within a header")
    return data[at]


def _varint(data: mmap.mmap, at: int) -> tuple[int, int]:
    number = shift = 0
    while shift < 70:
        byte = _byte(data, at)
        number, at, shift = number | (byte & 127) << shift, at + 1, shift + 7
        if byte < 128:
            return number, at
    raise MalformedError("a number has no end")


def _zigzag(data: mmap.mmap, at: int) -> tuple[int, int]:
    number, at = _varint(data, at)
    return (number >> 1) ^ -(number & 1), at


def arrow_size(path: Path) -> tuple[int, int]:
    """Rows of an Arrow file, and bytes that its buffers take when they are unpacked; raises MalformedError."""
    rows = size = parts = 0
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        try:
            end = len(data) - 10
            footer = end - _int(data, end, 4)
            table = footer + _int(data, footer, 4)
            for field in (2, 3):  # dictionaries, record batches
                start = _pointed(data, table, field)
                for number in range(_int(data, start, 4) if start else 0):
                    at, header_bytes, _ = BLOCK.unpack_from(data, start + 4 + BLOCK.size * number)
                    more, buffers = _batch(data, at, header_bytes)
                    rows, size = rows + (more if field == 3 else 0), size + sum(buffers)
                    parts += 1 + len(buffers)
                    if BUFFER.size * parts > len(data):
                        raise MalformedError("its batches hold more buffers than the file")  # one lies in another
        except (struct.error, IndexError) as error:
            raise MalformedError("the file ends within a header") from error
    return rows, size


def _batch(data: mmap.mmap, at: int, header_bytes: int) -> tuple[int, list[int]]:
    """Rows of a batch, and bytes that each of its buffers takes."""
    body = at + header_bytes
    at += 8 if data[at : at + 4] == b"\xff\xff\xff\xff" else 4
    message = at + _int(data, at, 4)
    place = _field(data, message, 1)
    kind = data[place] if place else 0
    batch = _pointed(data, message, 2)
    if kind == DICTIONARY_BATCH:
        batch = _pointed(data, batch, 1)
    if kind not in (DICTIONARY_BATCH, RECORD_BATCH) or not batch:
        raise MalformedError("a batch is none")
    place = _field(data, batch, 0)
    rows = _int(data, place, 8) if place else 0
    return rows, list(_buffers(data, batch, body))


def _buffers(data: mmap.mmap, batch: int, body: int) -> Iterator[int]:
    start, compressed = _pointed(data, batch, 2), bool(_field(data, batch, 3))
    for number in range(_int(data, start, 4) if start else 0):
        offset, length = BUFFER.unpack_from(data, start + 4 + BUFFER.size * number)
        whole = _int(data, body + offset, 8) if compressed and length else -1
        if length < 0 or whole < -1:
            raise MalformedError("a buffer has less than no bytes")
        yield length if whole == -1 else whole


def _int(data: mmap.mmap, at: int, size: int) -> int:
    """A little-endian number; raises MalformedError where it lies outside the file."""
    if not 0 <= at <= len(data) - size:
        raise MalformedError("the file ends within a header")
    return int.from_bytes(data[at : at + size], "little", signed=True)


def _field(data: mmap.mmap, table: int, number: int) -> int:
    """Where a field of a FlatBuffers table lies, 0 where it is left out."""
    names = table - _int(data, table, 4)
    slot = 4 + 2 * number
    shift = _int(data, names + slot, 2) if slot < _int(data, names, 2) else 0
    return table + shift if shift else 0


def _pointed(data: mmap.mmap, table: int, number: int) -> int:
    """Where the table or vector begins that a field points to, 0 where it is left out."""
    place = _field(data, table, number)
    return place + _int(data, place, 4) if place else 0
