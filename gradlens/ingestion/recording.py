"""Updates that were recorded elsewhere -> a run.

What one client's file holds never stops the others: it is recorded, or refused with a reason.
"""

import math
import shutil
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from gradlens.errors import InputError
from gradlens.ingestion.disk import disk_faults_as_input_errors
from gradlens.ingestion.folders import TABLES, Model, Source, several, source_of_folder, source_of_table
from gradlens.ingestion.tables import examples_in, with_csv_truth
from gradlens.log import Evidence, LogWriter, ModelSpec, Round
from gradlens.log.intake import Received, State, Unfit, as_array, received, spec_of, state_of
from gradlens.log.writer import check_free
from gradlens.run import Run

MODELS, MARGIN = 4, 1 << 20  # a client's file may take so many models and bytes: float64, an optimizer's moments


@dataclass(frozen=True)
class Ingested:
    """What became of a recording: the run, what was assumed, and a line for each client that is not as it should be."""

    run: Run
    notes: tuple[str, ...]
    faults: tuple[str, ...]


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
    num_examples: Path | str | None = None,
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
    their order. final_layer: the final weight, else found; buffers: besides integers and batch-norm's. num_examples: a
    CSV with the columns client, num_examples, and round where it varies, as the source numbers it; None: 1 for
    everybody of a folder. truth: a CSV, see `with_csv_truth`. A file that would take more memory than four models and
    1 MiB is refused unread; the model is the global one, where there is none the median of the first round's files.
    strict: the first client that is not as it should be is an InputError. evidence: what of each update is recorded, an
    `Evidence` or the name of its level.
    Raises: InputError, after which nothing of the run is left.
    """
    path, folder = Path(source), Path(out)
    with disk_faults_as_input_errors(path, folder):
        check_free(folder)
        if path.suffix in TABLES:
            found = source_of_table(path, global_models)
        else:
            found = source_of_folder(path, pattern, global_models, after=after)
        if not found.rounds:
            raise InputError(f"{path}: it holds no client's model")
        if num_examples is not None:
            if found.examples:
                raise InputError(f"{path}: it has a column num_examples of its own, found {num_examples} besides")
            sent = {number: [str(client) for client, _ in models] for number, models in found.rounds.items()}
            found.examples = dict(examples_in(num_examples, sent))
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


def _written(
    found: Source,
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
            start = _start(found, number) if writer is None else None
            most = _most(found.rounds[number], start) if writer is None else MODELS * _size(writer.model) + MARGIN
            sent = [(client, _read(each, most, bar)) for client, each in found.rounds[number]]
            if number not in found.starts:
                estimated.append(number)
            if writer is None:
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


def _start(found: Source, number: int) -> State | None:
    """The global model that a round started from, None if there is none; raises InputError where it is unreadable."""
    if number not in found.starts:
        return None
    try:
        return found.starts[number].read()
    except Unfit as reason:
        raise InputError(f"the global model of round {number} {reason}") from reason


def _most(models: Sequence[tuple[str, Model]], start: State | None) -> int | None:
    """How many bytes a client's model may take in the first round; None without anything to go by."""
    if start is not None:
        return MODELS * _size(spec_of(start)) + MARGIN
    sizes = []
    for _, model in models:
        with suppress(Unfit):
            sizes.append(model.size)
    return MODELS * sorted(sizes)[(len(sizes) - 1) // 2] + MARGIN if sizes else None


def _size(model: ModelSpec) -> int:
    """Bytes of a model as it is recorded."""
    return sum(math.prod(layer.shape) * np.dtype(layer.dtype).itemsize for layer in model.layers)


def _read(model: Model, most: int | None, bar: Any) -> Any:
    """A client's model, or why it cannot be read."""
    bar.update()
    try:
        return model.read(most)
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
        raise InputError(f"final layer: the model has no layer {final_layer!r:.80}, only {several(list(state))}")
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
