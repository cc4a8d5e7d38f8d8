"""Updates that were recorded elsewhere -> a run: folders of state_dicts, Arrow and Parquet tables.

Nothing is unpickled: `.pt` is read by torch with `weights_only=True`, `.npz` with `allow_pickle=False`. What one
client's file holds never stops the others: it is recorded, or refused with a reason.
"""

import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from tqdm import tqdm

from gradlens.log import Evidence, InputError, LogWriter, ModelSpec, Round
from gradlens.log.files import read_batches
from gradlens.log.received import Received, State, Unfit, as_array, received, shown, spec_of, state_of
from gradlens.log.writer import TRUTH_COLUMNS, check_free, record_truth
from gradlens.run import Run

__all__ = ["PATTERNS", "Ingested", "ingest", "with_csv_truth"]

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
WRAPPED = ("state_dict", "model_state_dict")  # where a checkpoint holds more than the model
SAFETENSORS = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "I64": np.int64, "I32": np.int32, "I16": np.int16,
    "I8": np.int8, "U64": np.uint64, "U32": np.uint32, "U16": np.uint16, "U8": np.uint8, "BOOL": np.bool_,
}  # fmt: skip
LISTED = 5  # file names in a message

Reader = Callable[[], State]  # reads a model when it is asked for; raises Unfit


@dataclass(frozen=True)
class Ingested:
    """What became of a recording: the run, what was assumed, and a line for each client that is not as it should be."""

    run: Run
    notes: tuple[str, ...]
    faults: tuple[str, ...]


@dataclass(eq=False)
class _Source:
    """What was found: number of a round -> what its clients sent, and what it started from; notes on the whole."""

    rounds: dict[int, list[tuple[str, Reader]]] = field(default_factory=dict)
    starts: dict[int, Reader] = field(default_factory=dict)
    examples: dict[int, dict[str, Any]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    by_name: bool = False  # the layers come in the order of their names, not of the model


def ingest(
    source: Path | str,
    out: Path | str,
    *,
    pattern: str | None = None,
    global_models: str | None = None,
    after: bool = False,
    updates: bool = False,
    final_layer: str | None = None,
    buffers: Collection[str] = (),
    truth: Path | str | None = None,
    strict: bool = False,
    evidence: Evidence | str = "full",
    progress: bool = False,
) -> Ingested:
    """Records what lies in `source` as the closed run `out`: a folder of models, or a table.

    A folder holds a `.pt`, `.pth`, `.safetensors` or `.npz` file per round and client, a state_dict of local models
    (`updates`: of updates). pattern: where, without the ending, as in `round_{round}/client_{client}`; None tries the
    usual ones, `PATTERNS`. global_models: likewise, the model that each round started from (`after`: what came of it,
    as Flower's guides save it: `model_{round}.pt` from an evaluate_fn, `round-{round}-weights.npz` from a strategy;
    Flower itself saves nothing, and no client's model: those come from a line in the client, such as
    `torch.save(arrays.to_torch_state_dict(), f"client_{partition}/model_{round}.pt")`).
    A table (`.arrow`, `.feather`, `.parquet`) has a row per round and client: columns round, client, num_examples (may
    be missing: 1), and a list (or tensor) column per layer; a row without a client is the global model that its round
    started from; global_models: a file of a model, whose shapes flat lists take.
    Where a global model is not known it is estimated: the one before + the mean of the updates that are finite; the
    first from local models as the median of each number, from updates as 0. Rounds are numbered 0, 1, ... in
    their order. final_layer: the final weight, else found; buffers: besides integers and batch-norm's. truth: a CSV,
    see `with_csv_truth`. strict: the first client that is not as it should be is an InputError. evidence: what of each
    update is recorded, an `Evidence` or the name of its level.
    Raises: InputError, after which nothing of the run is left.
    """
    path, folder = Path(source), Path(out)
    check_free(folder)
    found = _table(path, global_models) if path.suffix in TABLES else _folder(path, pattern, global_models, after=after)
    if not found.rounds:
        raise InputError(f"{path}: it holds no client's model")
    existed = folder.exists()
    record = partial(_written, found, folder, path, updates=updates, final_layer=final_layer, buffers=buffers)
    level = Evidence.of(evidence)
    try:
        notes, faults = record(evidence=level, strict=strict, progress=progress)
        if truth is not None:
            with_csv_truth(folder, truth)
    except BaseException:
        _remove(folder, itself=not existed)
        raise
    return Ingested(Run.open(folder), tuple(notes), tuple(faults))


def with_csv_truth(run: Path | str, csv: Path | str) -> Run:
    """Adds the ground truth to a run that has none: a CSV with the column client, and round, compromised, poisoned.

    Without `round` a row holds for all rounds of the client; without `compromised` the clients named are; without
    `poisoned` every update of theirs is. Updates of clients that are not named are benign. Rounds are those of the run.
    Raises: InputError where a client or round is not the run's, or a value is neither true nor false.
    """
    found = Run.open(Path(run))
    try:
        table = pd.read_csv(csv, dtype=str, keep_default_na=False)
    except (OSError, ValueError, UnicodeDecodeError) as error:
        raise InputError(f"{csv}: not readable as CSV: {_line(error)}") from error
    if "client" not in table.columns:
        raise InputError(f"{csv}: expected the column client, and round, compromised, poisoned; found {list(table)}")
    rows = [(round_.index, str(client)) for round_ in found.log for client in (*round_.clients, *round_.refused)]
    known = pd.DataFrame(rows, columns=["round", "client"])
    on = [name for name in ("round", "client") if name in table.columns]
    if "round" in table.columns:
        wrong = table.loc[~table["round"].str.fullmatch(r"\d{1,9}"), "round"]
        if len(wrong):
            raise InputError(f"{csv}: round {wrong.iloc[0]!r:.80} is no number")
        table["round"] = table["round"].astype(np.int64)
    if table.duplicated(on).any():
        raise InputError(f"{csv}: {_said(table.loc[table.duplicated(on), on].iloc[0])} stands there twice")
    strangers = table.merge(known.drop_duplicates(on), on=on, how="left", indicator=True)["_merge"] == "left_only"
    if strangers.any():
        raise InputError(f"{csv}: the run has no {_said(table.loc[strangers.to_numpy(), on].iloc[0])}")
    compromised = _booleans(table, "compromised", csv, np.ones(len(table), bool))
    poisoned = _booleans(table, "poisoned", csv, compromised)
    table = table[on].assign(compromised=compromised, poisoned=poisoned)
    whole = known.merge(table, on=on, how="left")
    flags = {name: whole[name].eq(True) for name in ("compromised", "poisoned")}
    record_truth(found.path, whole.assign(**flags)[list(TRUTH_COLUMNS)])
    return Run.open(found.path)


def _written(
    found: _Source,
    folder: Path,
    path: Path,
    *,
    updates: bool,
    final_layer: str | None,
    buffers: Collection[str],
    evidence: Evidence,
    strict: bool,
    progress: bool,
) -> tuple[list[str], list[str]]:
    """Records the rounds one after the other; gives the notes and the faults."""
    numbers, notes, faults, converted = sorted(found.rounds), [*found.notes], [], Counter[str]()
    estimated, writer, state = [], None, {}
    total = sum(len(found.rounds[number]) for number in numbers)
    bar = tqdm(total=total, desc="ingest", unit="model", delay=2, leave=False, disable=None if progress else True)
    try:
        for index, number in enumerate(numbers):
            sent = [(client, _read(reader, bar)) for client, reader in found.rounds[number]]
            if number not in found.starts:
                estimated.append(number)
            if writer is None:
                start = _start(found, number)
                shaped = _most_usual([state for _, state in sent]) if start is None else start
                model = _model(shaped, buffers, final_layer)
                if final_layer is None and found.by_name:
                    notes.append(_by_name(model))
                state = _first(model, sent, updates=updates) if start is None else state_of(start, model)
                origin = {"from": str(path), "rounds": numbers, "sent": "updates" if updates else "models"}
                writer = LogWriter.create(folder, model, state, source={"ingested": origin}, evidence=evidence)
            model = writer.model
            answers = received(index, model, state, sent, found.examples.get(number), as_models=not updates)
            converted.update(answers.notes.values())
            for line in _faults(answers, number):
                if strict:
                    raise InputError(f"{path}: {line}; without --strict the others are recorded")
                faults.append(line)
            after = _start(found, numbers[index + 1] if number != numbers[-1] else number + 1)
            state = _moved(answers.round_, state, model) if after is None else state_of(after, model)
            said = {"global_estimated": 1} if number in estimated else {}
            writer.commit(answers.round_, state, metrics={**said, **_counted(answers)})
        assert writer is not None
        writer.close()
    finally:
        bar.close()
        if writer is not None:
            writer.leave_open()
    notes += [f"{count} models: {what}" for what, count in converted.items()]
    if estimated:
        first = "; the first is " + ("taken as 0" if updates else "the median of its local models")
        notes.append(
            f"the global model is not known in {len(estimated)} of {len(numbers)} rounds, and estimated as the one "
            f"before + the mean update{first if numbers[0] in estimated else ''}"
        )
    if numbers != list(range(len(numbers))):
        notes.append(f"rounds {numbers[0]} to {numbers[-1]} of the source are recorded as 0 to {len(numbers) - 1}")
    if numbers[-1] - numbers[0] != len(numbers) - 1:
        notes.append(f"{numbers[-1] - numbers[0] + 1 - len(numbers)} rounds between them are missing")
    return notes, faults


def _remove(folder: Path, *, itself: bool) -> None:
    """Removes what was made in the folder, and the folder where that was made, too."""
    if itself:
        shutil.rmtree(folder, ignore_errors=True)
        return
    for each in folder.iterdir():
        shutil.rmtree(each) if each.is_dir() else each.unlink()


def _start(found: _Source, number: int) -> State | None:
    """The global model that a round started from, None if there is none; raises InputError where it is unreadable."""
    if number not in found.starts:
        return None
    try:
        return found.starts[number]()
    except Unfit as reason:
        raise InputError(f"the global model of round {number} {reason}") from reason


def _read(reader: Reader, bar: Any) -> Any:
    """A client's model, or why it cannot be read."""
    bar.update()
    try:
        return reader()
    except Unfit as reason:
        return reason


def _most_usual(states: list[Any]) -> State:
    """A model of the layers that most clients sent."""
    signatures: dict[Any, list[State]] = {}
    for state in states:
        try:
            key = tuple((str(name), as_array(value)[0].shape) for name, value in state.items())
        except (Unfit, AttributeError):
            continue
        signatures.setdefault(key, []).append(state)
    if not signatures:
        raise InputError(f"no client's model can be read in the first round: {states[0]}")
    return max(signatures.values(), key=len)[0]


def _model(state: State, buffers: Collection[str], final_layer: str | None) -> ModelSpec:
    """The specification, its final bias found by name first: some formats keep no order of layers."""
    if final_layer is not None and final_layer not in state:
        raise InputError(f"final layer: the model has no layer {final_layer!r:.80}, only {_several(list(state))}")
    model = spec_of(state, buffers)
    weight = final_layer or model.final_weight
    bias = f"{weight}".removesuffix("weight") + "bias"
    named = weight is not None and bias in model.parameters and model[bias].shape == model[weight].shape[:1]
    return spec_of(state, buffers, final_weight=weight, final_bias=bias if named else None)


def _by_name(model: ModelSpec) -> str:
    return (
        f"safetensors keep no order of layers: the last by name, {model.final_weight}, is taken as the final one; "
        "--final-layer names another"
    )


def _first(model: ModelSpec, sent: list[tuple[str, Any]], *, updates: bool) -> Mapping[str, np.ndarray]:
    """What stands for the model that the first round started from."""
    zero = {layer.name: np.zeros(layer.shape, layer.dtype) for layer in model.layers}
    if updates:
        return zero
    round_ = received(0, model, zero, sent, as_models=False).round_
    rows = np.flatnonzero(round_.finite)
    median = {name: round_.trimmed_mean(name, None, round_.finite) for name in model.parameters}
    return {**zero, **median, **{name: round_.weighted_mean(name, rows, np.ones(len(rows))) for name in model.buffers}}


def _moved(round_: Round, state: Mapping[str, np.ndarray], model: ModelSpec) -> dict[str, np.ndarray]:
    """The model after a round, where nobody wrote it down: plus the mean of the updates that are finite."""
    rows = np.flatnonzero(round_.finite)
    with np.errstate(all="ignore"):
        mean = {name: round_.weighted_mean(name, rows, np.ones(len(rows))) for name in model}
        return {name: (state[name] + mean[name]).astype(state[name].dtype) for name in model}


def _faults(answers: Received, number: int) -> Iterator[str]:
    round_ = answers.round_
    for client, reason in round_.refused.items():
        yield f"round {number}, client {client}: refused: {reason}"
    for client in round_.clients[~round_.finite].tolist():
        yield f"round {number}, client {client}: recorded with numbers that are not finite"


def _counted(answers: Received) -> dict[str, int]:
    return {"converted": len(answers.notes)} if answers.notes else {}


def _folder(path: Path, pattern: str | None, global_models: str | None, *, after: bool) -> _Source:
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
        raise InputError(f"{path}: no file is called {global_models!r}, there are {_several(files)}")
    left = [name for name in files if name not in set(starts.values())]
    clients: dict[str, Any] = {}
    for shape in (pattern,) if pattern is not None else PATTERNS:
        clients = {name: m for name in left if (m := _matched(shape, name, client=True))}
        if clients:
            break
    if not clients:
        tried = f"{pattern!r}" if pattern is not None else "of the usual names, such as 'round_3/client_7.pt'"
        raise InputError(f"{path}: no file is called {tried}; there are {_several(files)}; name them with --pattern")
    found = _Source(starts={number: READERS[_ending(name)](path / name) for number, name in starts.items()})
    for name, match in clients.items():
        found.rounds.setdefault(int(match["round"]), []).append((match["client"], READERS[_ending(name)](path / name)))
    first = min(found.rounds)
    found.by_name = starts.get(first, next(iter(clients))).endswith(".safetensors")
    if ignored := [name for name in left if name not in clients]:
        found.notes.append(f"{len(ignored)} files match no pattern and are left out: {_several(ignored)}")
    if outside:
        found.notes.append(f"{len(outside)} links lead out of the folder and are left out: {_several(outside)}")
    return found


def _files(path: Path) -> tuple[list[str], list[str]]:
    """The files of models below a folder, and those that are links to the outside."""
    inside, outside, root = [], [], path.resolve()
    for folder, _, names in os.walk(path):
        for name in names:
            each = Path(folder) / name
            if each.suffix in READERS:
                lies_within = each.resolve().is_relative_to(root)
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


def _torch_file(path: Path) -> Reader:
    def read() -> State:
        try:
            import torch
        except ModuleNotFoundError as error:
            raise InputError(
                f"{path}: torch is needed to read it: pip install 'gradlens-forensics[simulations]'"
            ) from error
        try:
            try:
                loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            except RuntimeError:  # written before torch 1.6, or no such file at all
                loaded = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # whatever bytes do to the reader
            raise Unfit(_unreadable(path, error)) from error
        return _unwrapped(loaded)

    return read


def _npz_file(path: Path) -> Reader:
    def read() -> State:
        try:
            with open(path, "rb") as file, np.load(file, allow_pickle=False) as loaded:
                return {name: loaded[name] for name in loaded.files}
        except Exception as error:  # whatever bytes do to the reader
            raise Unfit(_unreadable(path, error)) from error

    return read


def _safetensors_file(path: Path) -> Reader:
    def read() -> State:
        try:
            from safetensors import deserialize  # pyright: ignore[reportMissingImports]
        except ModuleNotFoundError as error:
            raise InputError(
                f"{path}: safetensors is needed to read it: pip install 'gradlens-forensics[files]'"
            ) from error
        try:
            return {name: _tensor(view) for name, view in sorted(deserialize(path.read_bytes()))}
        except Exception as error:  # whatever bytes do to the reader
            raise Unfit(_unreadable(path, error)) from error

    return read


READERS: Mapping[str, Callable[[Path], Reader]] = {
    ".pt": _torch_file,
    ".pth": _torch_file,
    ".npz": _npz_file,
    ".safetensors": _safetensors_file,
}


def _tensor(view: Mapping[str, Any]) -> np.ndarray:
    """A tensor of safetensors, little-endian bytes; bfloat16, the upper half of a float32, as float32."""
    if view["dtype"] == "BF16":
        upper = np.frombuffer(view["data"], "<u2").astype(np.uint32)
        return (upper << 16).view(np.float32).reshape(view["shape"])
    if view["dtype"] not in SAFETENSORS:
        raise ValueError(f"numbers of type {view['dtype']} are not read")
    dtype = np.dtype(SAFETENSORS[view["dtype"]]).newbyteorder("<")
    return np.frombuffer(view["data"], dtype).reshape(view["shape"])


def _unwrapped(loaded: Any) -> State:
    for name in WRAPPED:
        if isinstance(loaded, Mapping) and isinstance(loaded.get(name), Mapping):
            return loaded[name]
    return loaded


def _table(path: Path, model: str | None) -> _Source:
    """The rows of a table: whose model of which round."""
    table = _arrow(path)
    if missing := [name for name in ("round", "client") if name not in table.column_names]:
        raise InputError(f"{path}: expected the columns round and client, and one per layer; {missing[0]!r} is missing")
    if not pa.types.is_integer(table.schema.field("round").type) or table["round"].null_count:
        raise InputError(f"{path}: the column round must hold whole numbers, found {table.schema.field('round').type}")
    layers = [name for name in table.column_names if name not in ("round", "client", "num_examples")]
    numbers, clients = table["round"].to_pylist(), table["client"].to_pylist()
    shapes: dict[str, tuple[int, ...]] = {}
    found = _Source()
    if model is not None:
        first = _named_model(Path(model))
        shapes = {name: as_array(value)[0].shape for name, value in first.items()}
        found.starts[min(numbers, default=0)] = lambda: first
    columns = {name: table[name] for name in layers}

    def reader(row: int) -> Reader:
        return lambda: {n: _cell(column[row], shapes.get(n)) for n, column in columns.items() if column[row].is_valid}

    for row, (number, client) in enumerate(zip(numbers, clients, strict=True)):
        if client is None:
            found.starts[number] = reader(row)
        else:
            found.rounds.setdefault(number, []).append((client, reader(row)))
    if "num_examples" in table.column_names:
        counts = zip(numbers, clients, table["num_examples"].to_pylist(), strict=True)
        for number, client, count in counts:
            found.examples.setdefault(number, {})[client] = count
    return found


def _arrow(path: Path) -> pa.Table:
    """A table of foreign bytes, checked in full before a number of it is touched."""
    if path.suffix != ".parquet":
        return pa.Table.from_batches(read_batches(path)[0]).combine_chunks()
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path).combine_chunks()
        table.validate(full=True)
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path}: not a readable Parquet file: {_line(error)}") from error
    return table


def _cell(cell: Any, shape: tuple[int, ...] | None) -> np.ndarray:
    """The numbers of one layer in one row: of a tensor, a list, a list of lists, or a single number."""
    if isinstance(cell, pa.ExtensionScalar):
        if isinstance(cell.type, pa.FixedShapeTensorType):
            array = np.asarray(cell.value.values).reshape(cell.type.shape)
        else:
            raise Unfit(f"holds values of type {cell.type}")
    elif isinstance(cell, pa.ListScalar | pa.FixedSizeListScalar | pa.LargeListScalar):
        numbers = cell.values
        nested = pa.types.is_nested(numbers.type)
        array = np.asarray(cell.as_py() if nested or numbers.null_count else numbers.to_numpy(zero_copy_only=False))
    else:
        array = np.asarray(cell.as_py())
    if shape is not None and array.size == np.prod(shape, dtype=np.int64):
        return array.reshape(shape)
    return array


def _named_model(path: Path) -> State:
    """The model in a file of its own; raises InputError where there is none."""
    if path.suffix not in READERS or not path.is_file():
        raise InputError(f"{path}: expected the file of a model ({', '.join(READERS)}), found none")
    try:
        return READERS[path.suffix](path)()
    except Unfit as reason:
        raise InputError(f"the global model {reason}") from reason


def _booleans(table: pd.DataFrame, name: str, csv: Path | str, usual: np.ndarray) -> np.ndarray:
    if name not in table.columns:
        return usual
    words = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    values = table[name].str.strip().str.lower()
    if (wrong := table.loc[~values.isin(words), name]).size:
        raise InputError(f"{csv}: {name} is true or false, found {wrong.iloc[0]!r:.80}")
    return values.map(words).to_numpy(bool)


def _needs(path: Path, package: str, extra: str) -> str:
    return f"{path}: {package} is needed to read it: pip install 'gradlens-forensics[{extra}]'"


def _unreadable(path: Path, error: Exception) -> str:
    return f"{shown(path.name)} cannot be read: {_line(error)}"


def _line(error: Exception) -> str:
    """The first line of what went wrong."""
    if match := re.search(r"GLOBAL (\S+)", str(error)):  # how torch says it
        return f"it is a pickle that asks for {shown(match[1])}"
    lines = [line for line in str(error).splitlines() if line.strip()] or [repr(error)]
    return shown(lines[0])[1:-1]


def _said(row: pd.Series) -> str:
    return ", ".join(f"{name} {shown(str(value))}" for name, value in row.items())


def _several(names: Collection[Any]) -> str:
    listed = [name if isinstance(name, int) else shown(name) for name in list(names)[:LISTED]]
    return ", ".join(map(str, listed)) + (f" and {len(names) - LISTED} more" if len(names) > LISTED else "")
