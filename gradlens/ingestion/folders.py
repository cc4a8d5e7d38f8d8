"""Finding the models of a recording: files of a folder, matched by their names, or rows of a table."""

import os
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from gradlens.errors import InputError
from gradlens.ingestion.formats import MEASURED, READERS, ModelFile, ending_of
from gradlens.ingestion.rows import layer_of, names_in, read_rows
from gradlens.log.intake import State, Unfit, as_array
from gradlens.words import LISTED, count, several

# usual names, without the ending: of clients' models, of the global model before a round, and of the one after it
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
    "client{client}/round{round}",
    "epoch_{round}/node_{client}",  # as FLTracer saves updates
    "round_{round}/{client}",
    "round-{round}/{client}",
    "{client}/round_{round}",
    "{client}/round-{round}",
    "{round}/{client}",
)
SERVERS = ("global", "global_model", "server", "server_model")  # files of the server among those of a round's clients
RESULTS = ("aggregated", "aggregated_model", "fedavg", "FL_global_model")  # the last one is NVFlare's
ASIDE = ("best_model", "best_global_model", "best_FL_global_model", "optimizer", "scheduler", "scaler")  # no models
NO_CLIENTS = {name.lower() for name in (*SERVERS, *RESULTS, *ASIDE)}
FOLDERS = ("round_{round}", "round-{round}", "{round}", "epoch_{round}")
GLOBALS = (
    *(f"{folder}/{name}" for name in SERVERS for folder in FOLDERS),
    "server/round_{round}",
    "server/round-{round}",
    "globals/round_{round}",
    "globals/round-{round}",
    "global/round_{round}",
    "global_{round}",
    "global-{round}",
    "global_round_{round}",
    "global_model_{round}",
)
AFTER = (
    *(f"{folder}/{name}" for name in RESULTS for folder in FOLDERS),
    "model_{round}",
    "server/model_{round}",
    "round-{round}-weights",
    "model_round_{round}",
)  # as in Flower's guides
WHOLE = ("model", "pytorch_model", "adapter_model")  # names of the file in a folder that is a model's alone
TABLES = (".arrow", ".feather", ".parquet")
KERAS = (".keras", ".h5", ".hdf5")
FROM_KERAS = (
    "Keras's own files are not read: let each client write "
    "numpy.savez('round_3/client_7.npz', **{v.path: v.numpy() for v in model.weights})"
)


@dataclass(frozen=True, eq=False)
class Row:
    """A row of a table that holds a model.

    Parameters
    ----------
    columns : Mapping of str to pyarrow.ChunkedArray
        Layer -> its column of the table.
    number : int
        Position of the row.
    shapes : Mapping of str to tuple of int
        Layer -> the shape into which a flat list is brought if the sizes agree.

    Examples
    --------
    >>> columns = {"w": pa.chunked_array([[[1.0, 2.0, 3.0, 4.0]]])}
    >>> Row(columns, 0, {"w": (2, 2)}).read()["w"].tolist()
    [[1.0, 2.0], [3.0, 4.0]]
    """

    columns: Mapping[str, pa.ChunkedArray]
    number: int
    shapes: Mapping[str, tuple[int, ...]]

    @property
    def size(self) -> int:
        """Bytes of its numbers; raises Unfit where they cannot be read."""
        return sum(array.nbytes for array in self.read().values())

    def read(self, most: int | None = None) -> State:
        """Reads the model, layer -> array, without the layers whose cells are empty.

        Raises Unfit if a cell cannot be read, or the model takes more than `most` bytes.
        """
        cells = {name: column[self.number] for name, column in self.columns.items()}
        state = {name: layer_of(name, cell, self.shapes.get(name)) for name, cell in cells.items() if cell.is_valid}
        size = sum(array.nbytes for array in state.values())
        if most is not None and size > most:
            raise Unfit(f"its row would take {size:,} bytes, a client's model takes at most {most:,} here")
        return state


Model = ModelFile | Row


@dataclass(eq=False)
class Source:
    """The models of a recording, before they are read.

    Attributes
    ----------
    rounds : dict
        Number of the round -> pairs of a client and its model.
    starts : dict
        Number of the round -> the global model before it; rounds whose global model is unknown are left out.
    examples : dict
        Number of the round -> client -> number of examples; empty means 1 for every client.
    notes : list of str
        A line for each assumption, such as which files were left out.
    said : Counter of str
        What was taken off around the models, and of how many.
    taken : str
        What the models were found by, and how many rounds and clients that gave.
    """

    rounds: dict[int, list[tuple[str, Model]]] = field(default_factory=dict)
    starts: dict[int, Model] = field(default_factory=dict)
    examples: dict[int, dict[str, Any]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    said: Counter[str] = field(default_factory=Counter)
    taken: str = ""


def source_of_folder(
    path: Path, pattern: str | None, global_models: str | None, *, after: bool, model_key: str | None = None
) -> Source:
    """Finds the models of a folder by the names of the files.

    Parameters
    ----------
    path : Path
        The folder.
    pattern : str or None
        Where clients' models are, such as "round_{round}/client_{client}", with or without the ending. None takes the
        first of `PATTERNS` that matches a file.
    global_models : str or None
        Where global models are, likewise with {round} alone. None tries the usual names.
    after : bool
        Whether the global models are those after each round instead of before it.
    model_key : str, optional
        The entry of a file that holds the model.

    Returns
    -------
    Source

    Raises
    ------
    InputError
        If there is no folder or no model in it, no file matches, or a pattern does not hold {round} and {client} once
        each.

    Examples
    --------
    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     for name in ("model_0.npz", "round_0_client_a.npz", "round_0_client_b.npz"):
    ...         Path(folder, name).touch()
    ...     source = source_of_folder(Path(folder), None, None, after=False)
    >>> [client for client, _ in source.rounds[0]], list(source.starts)  # model_0 is the result of round 0
    (['a', 'b'], [1])
    """
    if not path.is_dir():
        expected = f"a folder of models, or a table ({', '.join(TABLES)})"
        advice = f"; {FROM_KERAS}" if path.exists() and path.suffix in KERAS else ""
        raise InputError(f"{path}: expected {expected}, found {'a file' if path.exists() else 'nothing'}{advice}")
    files, outside, others = _files(path)
    of_keras = sum(others[ending] for ending in KERAS)
    advice = f"; {FROM_KERAS}" if of_keras else ""
    if not files:
        endings = others.most_common(LISTED)
        found = ", ".join(f"{number} files {ending or 'without an ending'}" for ending, number in endings)
        raise InputError(f"{path}: expected models ({', '.join(READERS)}), found {found or 'none'}{advice}")
    starts: dict[int, str] = {}
    taken, shift = "", 0
    for candidate in (global_models,) if global_models is not None else (*GLOBALS, *AFTER):
        matches = {name: _matched(candidate, name) for name in files}
        shift = int(after or (global_models is None and candidate in AFTER))
        if starts := {int(match["round"]) + shift: name for name, match in matches.items() if match}:
            taken = candidate
            break
    if global_models is not None and not starts:
        raise InputError(
            f"{path}: no file matches the global models' pattern {global_models!r}; found {several(files)}"
        )
    remaining = [name for name in files if name not in set(starts.values())]
    clients: dict[str, Any] = {}
    candidate = pattern
    for candidate in (pattern,) if pattern is not None else PATTERNS:
        matched = ((name, _matched(candidate, name, client=True)) for name in remaining)
        clients = {name: match for name, match in matched if match and (pattern or not _is_no_client(match["client"]))}
        if clients:
            break
    if not clients:
        tried = f"the pattern {pattern!r}" if pattern is not None else "the usual names, such as 'round_3/client_7.pt'"
        raise InputError(f"{path}: no file matches {tried}; found {several(files)}; name them with --pattern{advice}")
    source = Source()
    source.starts = {number: ModelFile(path / name, model_key, source.said) for number, name in starts.items()}
    for name, match in clients.items():
        file = ModelFile(path / name, model_key, source.said)
        source.rounds.setdefault(int(match["round"]), []).append((match["client"], file))
    names = sorted({match["client"] for match in clients.values()})
    of_server = f"{taken}, {'after' if shift else 'before'} their rounds" if taken else "none"
    source.taken = (
        f"{candidate}: {count(len(source.rounds), 'round')} of {count(len(names), 'client')} ({several(names)}); "
        f"global models: {of_server}"
    )
    if ignored := [name for name in remaining if name not in clients]:
        source.notes.append(f"{len(ignored)} files match no pattern and are left out: {several(ignored)}")
    if of_keras:
        source.notes.append(f"{count(of_keras, 'file')} of Keras left out{advice}")
    if outside:
        source.notes.append(f"{len(outside)} links lead out of the folder and are left out: {several(outside)}")
    return source


def _is_no_client(name: str) -> bool:
    """Whether a file of a round is called as a server's, or as what is saved beside a model."""
    return name.lower().replace("-", "_") in NO_CLIENTS


def _files(path: Path) -> tuple[list[str], list[str], Counter[str]]:
    """The model files inside a folder and its subfolders, links to a file outside, and endings of other files.

    Raises OSError.
    """
    inside, outside, others, root = [], [], Counter[str](), path.resolve()

    def stop(error: OSError) -> None:  # what is silently left out would be missing evidence
        raise error

    for folder, _, names in os.walk(path, onerror=stop):
        for name in names:
            file = Path(folder) / name
            if not ending_of(name):
                others[file.suffix] += 1
            else:
                is_inside = Path(os.path.realpath(file)).is_relative_to(root)  # a loop of links raises nothing
                (inside if is_inside else outside).append(str(file.relative_to(path)))
    return sorted(inside), sorted(outside), others


def _matched(pattern: str, name: str, *, client: bool = False) -> re.Match[str] | None:
    """Matches a file's name with a pattern, with the groups round and client; None if it does not match."""
    needed = ["{round}", "{client}"] if client else ["{round}"]
    if missing := [field for field in needed if pattern.count(field) != 1]:
        raise InputError(f"pattern: expected {' and '.join(needed)} once each, found {pattern!r:.80}: {missing[0]}")
    ending = ending_of(pattern)
    stem = pattern.removesuffix(ending)
    parts = re.split(r"(\{round\}|\{client\})", stem)
    groups = {"{round}": r"(?P<round>[0-9]{1,9})", "{client}": r"(?P<client>[^/]+)"}
    expression = "".join(groups.get(part) or re.escape(part) for part in parts)
    if ending:
        return re.fullmatch(expression + re.escape(ending), name, re.DOTALL)
    alone, endings = "|".join(WHOLE), "|".join(map(re.escape, READERS))
    return re.fullmatch(f"{expression}(?:/(?:{alone}))?(?:{endings})", name, re.DOTALL)


def source_of_table(path: Path, model: str | None) -> Source:
    """Finds the models of a table.

    Parameters
    ----------
    path : Path
        The table: the columns round and client, optionally num_examples, and a column per layer. A row without a client
        is the global model before its round.
    model : str or None
        The file of a model, which is the global model before the first round; flat lists take the shapes of its layers.

    Returns
    -------
    Source

    Raises
    ------
    InputError
        If the table or the model's file cannot be read, a column is missing, or a round is not a whole number.

    Examples
    --------
    >>> from tempfile import TemporaryDirectory
    >>> import pyarrow.parquet as pq
    >>> table = pa.table({"round": [0, 0], "client": [None, "a"], "w": [[1.0], [2.0]]})
    >>> with TemporaryDirectory() as folder:
    ...     pq.write_table(table, f"{folder}/t.parquet")
    ...     source = source_of_table(Path(folder, "t.parquet"), None)
    >>> [client for client, _ in source.rounds[0]], source.starts[0].read()
    (['a'], {'w': array([1.])})
    """
    shapes: dict[str, tuple[int, ...]] = {}
    source, first, model_bytes = Source(), None, 0
    if model is not None:
        first = _model_file(Path(model))
        arrays = {name: as_array(value)[0] for name, value in _read(first).items()}
        shapes = {name: array.shape for name, array in arrays.items()}
        model_bytes = sum(array.nbytes for array in arrays.values())
    table = read_rows(path, model_bytes)
    layers = [name for name in table.column_names if name not in ("round", "client", "num_examples")]
    single = [name for name in layers if not (_holds_arrays(table[name].type) or {*"./"} & {*name})]
    if layers and all(name.lower() in MEASURED for name in layers):
        raise InputError(f"{path}: expected a column for each layer, found {several(layers)}")
    if len(single) < len(layers):
        layers = [name for name in layers if name not in single]
        if single:
            source.notes.append(f"columns of single numbers are no layers and are left out: {several(single)}")
    numbers, clients = table["round"].to_pylist(), names_in(path, table["client"])
    if first is not None:
        source.starts[min(numbers, default=0)] = first
    columns = {name: table[name] for name in layers}
    for row, (number, client) in enumerate(zip(numbers, clients, strict=True)):
        if client is None:
            source.starts[number] = Row(columns, row, shapes)
        else:
            source.rounds.setdefault(number, []).append((client, Row(columns, row, shapes)))
    found = sorted({str(client) for client in clients if client is not None})
    source.taken = (
        f"the table's rows: {count(len(source.rounds), 'round')} of {count(len(found), 'client')} ({several(found)})"
    )
    if "num_examples" in table.column_names:
        counts = zip(numbers, clients, table["num_examples"].to_pylist(), strict=True)
        for number, client, claim in counts:
            source.examples.setdefault(number, {})[client] = claim
    return source


def _holds_arrays(kind: pa.DataType) -> bool:
    """Whether the cells of a column hold lists or tensors."""
    return pa.types.is_nested(kind) or isinstance(kind, pa.BaseExtensionType)


def _model_file(path: Path) -> ModelFile:
    """The model's file at a path; raises InputError if there is none."""
    if not ending_of(path.name) or not path.is_file():
        raise InputError(f"{path}: expected a model's file ({', '.join(READERS)}), found none")
    return ModelFile(path)


def _read(model: Model) -> State:
    try:
        return model.read()
    except Unfit as reason:
        raise InputError(f"the global model {reason}") from reason
