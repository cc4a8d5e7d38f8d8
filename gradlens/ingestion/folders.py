"""Where models lie that were recorded elsewhere: the files of a folder, by their names; the rows of a table."""

import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from gradlens.errors import InputError
from gradlens.ingestion.formats import READERS, ModelFile
from gradlens.ingestion.rows import layer_of, names_in, read_rows
from gradlens.log.intake import State, Unfit, as_array, shown

PATTERNS = (
    "round_{round}/client_{client}",
    "round-{round}/client-{client}",
    "round{round}/client{client}",
    "client_{client}/round_{round}",
    "client-{client}/round-{round}",
    "client_{client}/model_{round}",
    "round_{round}_client_{client}",
    "round-{round}-client-{client}",
    "client_{client}_round_{round}",
    "client-{client}-round-{round}",
    "round_{round}/{client}",
    "round-{round}/{client}",
    "{round}/{client}",
)
GLOBALS = (
    "round_{round}/global",
    "round-{round}/global",
    "{round}/global",
    "globals/round_{round}",
    "globals/round-{round}",
    "global/round_{round}",
    "global_{round}",
    "global-{round}",
    "global_round_{round}",
    "global_model_{round}",
)
AFTER = (
    "model_{round}",
    "server/model_{round}",
    "round-{round}-weights",
    "model_round_{round}",
)  # as Flower's guides do
TABLES = (".arrow", ".feather", ".parquet")
LISTED = 5  # file names in a message


@dataclass(frozen=True, eq=False)
class Row:
    """A row of a table that holds a model."""

    columns: Mapping[str, pa.ChunkedArray]
    number: int
    shapes: Mapping[str, tuple[int, ...]]  # layer -> the shape that a flat list takes

    @property
    def size(self) -> int:
        """Bytes of its numbers; raises Unfit where it cannot be read."""
        return sum(array.nbytes for array in self.read().values())

    def read(self, most: int | None = None) -> State:
        """The model; raises Unfit where it cannot be read, or takes more than so many bytes, None: of any size."""
        cells = {name: column[self.number] for name, column in self.columns.items()}
        state = {name: layer_of(name, cell, self.shapes.get(name)) for name, cell in cells.items() if cell.is_valid}
        size = sum(array.nbytes for array in state.values())
        if most is not None and size > most:
            raise Unfit(f"its row would take {size:,} bytes, a client's model takes at most {most:,} here")
        return state


Model = ModelFile | Row


@dataclass(eq=False)
class Source:
    """What was found: number of a round -> what its clients sent, and what it started from; notes on the whole."""

    rounds: dict[int, list[tuple[str, Model]]] = field(default_factory=dict)
    starts: dict[int, Model] = field(default_factory=dict)
    examples: dict[int, dict[str, Any]] = field(default_factory=dict)  # empty: 1 for everybody
    notes: list[str] = field(default_factory=list)
    by_name: bool = False  # the layers come in the order of their names, not of the model


def source_of_folder(path: Path, pattern: str | None, global_models: str | None, *, after: bool) -> Source:
    """Which file is whose model of which round."""
    if not path.is_dir():
        expected = f"a folder of models, or a table ({', '.join(TABLES)})"
        raise InputError(f"{path}: expected {expected}, found {'a file' if path.exists() else 'nothing'}")
    files, outside = _files(path)
    if not files:
        raise InputError(f"{path}: expected models ({', '.join(READERS)}), found none")
    starts: dict[int, str] = {}
    for shape in (global_models,) if global_models is not None else (*GLOBALS, *AFTER):
        matched = {name: _matched(shape, name) for name in files}
        later = int(after or (global_models is None and shape in AFTER))
        if starts := {int(m["round"]) + later: name for name, m in matched.items() if m}:
            break
    if global_models is not None and not starts:
        raise InputError(f"{path}: no file is called {global_models!r}, there are {several(files)}")
    left = [name for name in files if name not in set(starts.values())]
    clients: dict[str, Any] = {}
    for shape in (pattern,) if pattern is not None else PATTERNS:
        clients = {name: m for name in left if (m := _matched(shape, name, client=True))}
        if clients:
            break
    if not clients:
        tried = f"{pattern!r}" if pattern is not None else "of the usual names, such as 'round_3/client_7.pt'"
        raise InputError(f"{path}: no file is called {tried}; there are {several(files)}; name them with --pattern")
    found = Source(starts={number: ModelFile(path / name) for number, name in starts.items()})
    for name, match in clients.items():
        found.rounds.setdefault(int(match["round"]), []).append((match["client"], ModelFile(path / name)))
    first = min(found.rounds)
    found.by_name = starts.get(first, next(iter(clients))).endswith(".safetensors")
    if ignored := [name for name in left if name not in clients]:
        found.notes.append(f"{len(ignored)} files match no pattern and are left out: {several(ignored)}")
    if outside:
        found.notes.append(f"{len(outside)} links lead out of the folder and are left out: {several(outside)}")
    return found


def _files(path: Path) -> tuple[list[str], list[str]]:
    """The files of models below a folder, and those that are links to the outside; raises OSError."""
    inside, outside, root = [], [], path.resolve()

    def stop(error: OSError) -> None:  # what is silently left out would be missing evidence
        raise error

    for folder, _, names in os.walk(path, onerror=stop):
        for name in names:
            each = Path(folder) / name
            if each.suffix in READERS:
                lies_within = Path(os.path.realpath(each)).is_relative_to(root)  # a loop of links raises nothing
                (inside if lies_within else outside).append(str(each.relative_to(path)))
    return sorted(inside), sorted(outside)


def _matched(pattern: str, name: str, *, client: bool = False) -> re.Match[str] | None:
    """Round and client in a file's name by a pattern, None where it does not match."""
    needed = ["{round}", "{client}"] if client else ["{round}"]
    if missing := [field for field in needed if pattern.count(field) != 1]:
        raise InputError(f"pattern: expected {' and '.join(needed)} once each, found {pattern!r:.80}: {missing[0]}")
    stem = pattern.removesuffix(_ending(pattern))
    parts = re.split(r"(\{round\}|\{client\})", stem)
    groups = {"{round}": r"(?P<round>[0-9]{1,9})", "{client}": r"(?P<client>[^/]+)"}
    ending = re.escape(_ending(pattern)) if _ending(pattern) else "|".join(map(re.escape, READERS))
    return re.fullmatch("".join(groups.get(p) or re.escape(p) for p in parts) + f"(?:{ending})", name, re.DOTALL)


def _ending(name: str) -> str:
    return next((ending for ending in READERS if name.endswith(ending)), "")


def source_of_table(path: Path, model: str | None) -> Source:
    """The rows of a table: whose model of which round."""
    shapes: dict[str, tuple[int, ...]] = {}
    found, first, model_bytes = Source(), None, 0
    if model is not None:
        first = _named_model(Path(model))
        arrays = {name: as_array(value)[0] for name, value in _read(first).items()}
        shapes = {name: array.shape for name, array in arrays.items()}
        model_bytes = sum(array.nbytes for array in arrays.values())
    table = read_rows(path, model_bytes)
    layers = [name for name in table.column_names if name not in ("round", "client", "num_examples")]
    numbers, clients = table["round"].to_pylist(), names_in(path, table["client"])
    if first is not None:
        found.starts[min(numbers, default=0)] = first
    columns = {name: table[name] for name in layers}

    for row, (number, client) in enumerate(zip(numbers, clients, strict=True)):
        if client is None:
            found.starts[number] = Row(columns, row, shapes)
        else:
            found.rounds.setdefault(number, []).append((client, Row(columns, row, shapes)))
    if "num_examples" in table.column_names:
        counts = zip(numbers, clients, table["num_examples"].to_pylist(), strict=True)
        for number, client, count in counts:
            found.examples.setdefault(number, {})[client] = count
    return found


def _named_model(path: Path) -> ModelFile:
    """The file of a model by its own name; raises InputError where there is none."""
    if path.suffix not in READERS or not path.is_file():
        raise InputError(f"{path}: expected the file of a model ({', '.join(READERS)}), found none")
    return ModelFile(path)


def _read(first: Model) -> State:
    try:
        return first.read()
    except Unfit as reason:
        raise InputError(f"the global model {reason}") from reason


def several(names: Collection[Any]) -> str:
    """The first names, and how many more there are."""
    listed = [name if isinstance(name, int) else shown(name) for name in list(names)[:LISTED]]
    return ", ".join(map(str, listed)) + (f" and {len(names) - LISTED} more" if len(names) > LISTED else "")
