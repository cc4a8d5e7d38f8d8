"""Importing updates that another tool recorded as a run (`ingest`)."""

import hashlib
import math
import shutil
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from gradlens.errors import InputError
from gradlens.ingestion.disk import disk_faults_as_input_errors
from gradlens.ingestion.folders import TABLES, Model, Source, source_of_folder, source_of_table
from gradlens.ingestion.formats import named_by_place
from gradlens.ingestion.tables import examples_in, with_csv_truth
from gradlens.interruption import to_the_end
from gradlens.log import Evidence, LogWriter, ModelSpec, Round
from gradlens.log.global_model import readable
from gradlens.log.intake import Received, State, Unfit, as_array, received, shown, spec_of, state_of
from gradlens.log.writer import check_free
from gradlens.run import Run
from gradlens.words import several

# a client's file may take as much as 4 models and 1 MiB, which leaves room for float64 or an optimizer's moments
MODELS, MARGIN = 4, 1 << 20


@dataclass(frozen=True)
class Ingested:
    """The result of `ingest`.

    Attributes
    ----------
    run : Run
        The recorded run, closed.
    notes : tuple of str
        A line for each assumption, such as an estimated global model, and for what was left out or converted.
    faults : tuple of str
        A line for each client that was refused in a round, or sent numbers that are not finite.
    taken : str
        By which names the models were found, and how many rounds and clients that gave.

    Examples
    --------
    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     for client in "abc":
    ...         np.savez(f"{folder}/round_0_client_{client}.npz", weight=np.ones((2, 2)))
    ...     ingested = ingest(folder, f"{folder}/run")
    >>> ingested.run.is_closed, len(ingested.faults)
    (True, 0)
    """

    run: Run
    notes: tuple[str, ...]
    faults: tuple[str, ...]
    taken: str


def ingest(
    source: Path | str,
    out: Path | str,
    *,
    pattern: str | None = None,
    global_models: str | None = None,
    after: bool = False,
    updates: bool = False,
    model_key: str | None = None,
    final_layer: str | None = None,
    buffers: Collection[str] = (),
    layers: Collection[str] | None = None,
    num_examples: Path | str | None = None,
    truth: Path | str | None = None,
    strict: bool = False,
    evidence: Evidence | str = "full",
    progress: bool = False,
) -> Ingested:
    """Records the models in a folder or table as a run, and closes it.

    Parameters
    ----------
    source : Path or str
        A folder with a file per round and client, a state_dict (`.pt`, `.pth`, `.bin`, `.ckpt`, `.pt.tar`,
        `.safetensors`, one in parts with its index, `.npz`), or a checkpoint that holds one; or a table
        (`.arrow`, `.feather`, `.parquet`) with a row per round and client: the columns round, client, optionally
        num_examples, and a column of lists or tensors per layer. A row without a client is the global model before its
        round.
    out : Path or str
        The folder of the run, new or empty.
    pattern : str, optional
        Where clients' models are in the folder, such as "round_{round}/client_{client}", with or without the ending; by
        default the usual names are tried (`PATTERNS`).
    global_models : str, optional
        Likewise for global models, with {round} alone. For a table: the file of a model, which is the global model
        before the first round; flat lists take the shapes of its layers.
    after : bool, default False
        Whether the global models of a folder are those after each round, as Flower's guides save them, instead of
        before it.
    updates : bool, default False
        Whether clients sent updates instead of local models.
    model_key : str, optional
        The entry of a checkpoint that holds the model; by default the usual ones are tried, and one that is alone.
    final_layer : str, optional
        The layer that answers, by the name of its weight, its bias or its module; by default it is found.
    buffers : collection of str, default ()
        Layers that are never scored, in addition to integer layers and the statistics of batch normalization.
    layers : collection of str, optional
        The layers that clients send, by names or patterns such as "body.*", where the rest stays with them; by default
        all. What files hold of the others is left out.
    num_examples : Path or str, optional
        A CSV file: client, num_examples, and round if they vary over rounds. By default those of the table, or 1.
    truth : Path or str, optional
        A CSV file with the ground truth; see `with_csv_truth`.
    strict : bool, default False
        Whether the first faulty client raises `InputError`.
    evidence : Evidence or str, default "full"
        How much of each update is recorded, an `Evidence` or the name of its level.
    progress : bool, default False
        Whether to show a progress bar.

    Returns
    -------
    Ingested

    Raises
    ------
    InputError
        If `out` holds something, nothing can be recorded, a setting is wrong, or with `strict` a client is faulty. A
        failed import leaves nothing of the run behind.

    Notes
    -----
    Names of layers lose the prefixes ``module.`` and ``_orig_mod.`` where all have them, single numbers beside the
    layers are left out, and arrays without names are taken by their place where they fit; the notes say so.

    Unknown global models are estimated: the one before plus the mean of the finite updates. The first one is then the
    coordinate-wise median of the local models, or 0 if clients sent updates. Rounds are renumbered from 0.

    The file of a client that takes more than 4 models and 1 MiB is refused without being read. The size of a model is
    that of the global model, or else the median of the files of the first round.

    Flower itself saves no models. Its guides save global models as `model_{round}.pt` in an evaluate_fn or as
    `round-{round}-weights.npz` in a strategy; clients' models need a line in the client, such as
    ``torch.save(arrays.to_torch_state_dict(), f"client_{partition}/model_{round}.pt")``.

    Examples
    --------
    >>> from tempfile import TemporaryDirectory
    >>> from gradlens.examples import example_log
    >>> round_ = example_log()[0]
    >>> with TemporaryDirectory() as folder:
    ...     np.savez(f"{folder}/global_0.npz", **round_.global_model)
    ...     for row, client in enumerate(round_.clients):
    ...         update = {layer: rows[row] for layer, rows in round_.updates.items()}
    ...         np.savez(f"{folder}/round_0_{client.replace('-', '_')}.npz", **update)
    ...     ingested = ingest(folder, f"{folder}/run", updates=True)
    ...     len(ingested.run.log[0]), ingested.faults
    (10, ())
    """
    path, folder = Path(source), Path(out)
    with disk_faults_as_input_errors(path, folder):
        check_free(folder)
        if path.suffix in TABLES:
            recording = source_of_table(path, global_models)
        else:
            recording = source_of_folder(path, pattern, global_models, after=after, model_key=model_key)
        if not recording.rounds:
            raise InputError(f"{path}: expected the model of at least one client, found none")
        if num_examples is not None:
            if recording.examples:
                raise InputError(f"{path}: it has a column num_examples of its own, found {num_examples} besides")
            sent = {number: [str(client) for client, _ in models] for number, models in recording.rounds.items()}
            recording.examples = dict(examples_in(num_examples, sent))
        existed = folder.exists()
        model_of = partial(spec_of, buffers=buffers, final_layer=final_layer, layers=layers)
        record = partial(_write, recording, folder, path, updates=updates, model_of=model_of, layers=layers)
        level = Evidence.of(evidence)
        try:
            notes, faults = record(evidence=level, strict=strict, progress=progress)
            if truth is not None:
                with_csv_truth(folder, truth)
        except BaseException:
            _remove(folder, itself=not existed)
            raise
        return Ingested(Run.open(folder), tuple(notes), tuple(faults), recording.taken)


def _write(
    recording: Source,
    folder: Path,
    path: Path,
    *,
    updates: bool,
    model_of: Callable[[State], ModelSpec],
    layers: Collection[str] | None,
    evidence: Evidence,
    strict: bool,
    progress: bool,
) -> tuple[list[str], list[str]]:
    """Records one round after the other; returns the notes and the faults."""
    numbers, notes, faults, part = sorted(recording.rounds), [*recording.notes], [], layers is not None
    converted, refused = Counter[str](), Counter[str]()
    estimated, writer, state = [], None, {}
    total = sum(len(recording.rounds[number]) for number in numbers)
    bar = tqdm(total=total, desc="ingest", unit="model", delay=2, leave=False, disable=None if progress else True)
    try:
        for index, number in enumerate(numbers):
            start = readable(_start(recording, number), layers) if writer is None else None
            most = _most(recording.rounds[number], start) if writer is None else MODELS * _size(writer.model) + MARGIN
            sent = [(client, readable(_read(file, most, bar), layers)) for client, file in recording.rounds[number]]
            if writer is None and start is not None:
                start = _by_place(recording, start, _most_frequent([answer for _, answer in sent], start))
            estimated += [] if number in recording.starts else [number]
            if writer is None:
                example = _most_frequent([answer for _, answer in sent]) if start is None else start
                model = model_of(example)
                notes += _notes_on_model(example, model)
                state = state_of(start, model, partial=part) if start else _estimated_start(model, sent, updates, part)
                origin = {"from": str(path), "rounds": numbers, "sent": "updates" if updates else "models"}
                writer = LogWriter.create(folder, model, state, source={"ingested": origin}, evidence=evidence)
            model = writer.model
            sent = [(client, _by_place(recording, answer, state)) for client, answer in sent]
            answers = received(
                index, model, state, sent, recording.examples.get(number), as_models=not updates, partial=part
            )
            converted.update(answers.notes.values())
            refused.update(answers.round_.refused.values())
            for line in _faults(answers, number):
                if strict:
                    raise InputError(f"{path}: {line}; without --strict the others are recorded")
                faults.append(line)
            after = _start(recording, numbers[index + 1] if number != numbers[-1] else number + 1)
            if after is None:
                state = _estimated_result(answers.round_, state, model)
            else:
                state = state_of(_by_place(recording, after, state), model, partial=part)
            metrics = {"global_estimated": 1} if number in estimated else {}
            writer.commit(answers.round_, state, metrics={**metrics, **_num_converted(answers)})
        assert writer is not None
        _check_something(path, refused, total)
        writer.close()
    finally:
        bar.close()
        if writer is not None:
            writer.leave_open()
    notes += [f"{count} models: {conversion}" for conversion, count in converted.items()]
    notes += [f"{number} files: {what}" for what, number in recording.said.items()]
    return [*notes, *_notes_on_rounds(numbers, estimated, updates=updates)], faults


def _check_something(path: Path, refused: Counter[str], total: int) -> None:
    """Raises InputError where every update was refused, with the commonest reason."""
    if refused.total() == total:
        [(reason, count)] = refused.most_common(1)
        raise InputError(f"{path}: none of the {total} updates could be recorded: {reason} ({count} of {total})")


def _notes_on_rounds(numbers: Sequence[int], estimated: Sequence[int], *, updates: bool) -> Iterator[str]:
    """What is said of rounds whose global model is not known, whose numbers changed, or that are missing."""
    if estimated:
        first = "; the first is " + ("taken as 0" if updates else "the median of its local models")
        yield (
            f"the global model is not known in {len(estimated)} of {len(numbers)} rounds, and estimated as the one "
            f"before + the mean update{first if numbers[0] in estimated else ''}"
        )
    if list(numbers) != list(range(len(numbers))):
        yield f"rounds {numbers[0]} to {numbers[-1]} of the source are recorded as 0 to {len(numbers) - 1}"
    if numbers[-1] - numbers[0] != len(numbers) - 1:
        yield f"{numbers[-1] - numbers[0] + 1 - len(numbers)} rounds between them are missing"


def _remove(folder: Path, *, itself: bool) -> None:
    """Deletes the content of the folder, and with `itself` the folder, too."""
    if itself:
        shutil.rmtree(folder, ignore_errors=True)
        return
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _start(recording: Source, number: int) -> State | None:
    """The global model before a round, None if it is unknown; raises InputError if it cannot be read."""
    if number not in recording.starts:
        return None
    try:
        with to_the_end():
            return recording.starts[number].read()
    except Unfit as reason:
        raise InputError(f"the global model of round {number} {reason}") from reason


def _most(models: Sequence[tuple[str, Model]], start: State | None) -> int | None:
    """The most bytes that a client's model may take in the first round; None if no size is known."""
    if start is not None:
        return MODELS * _size(spec_of(start)) + MARGIN
    sizes = []
    for _, model in models:
        with to_the_end(), suppress(Unfit):
            sizes.append(model.size)
    return MODELS * sorted(sizes)[(len(sizes) - 1) // 2] + MARGIN if sizes else None


def _size(model: ModelSpec) -> int:
    """Bytes of a model as it is recorded."""
    return sum(math.prod(layer.shape) * np.dtype(layer.dtype).itemsize for layer in model.layers)


def _read(model: Model, most: int | None, bar: Any) -> Any:
    """Reads a client's model; returns the reason if it cannot be read."""
    bar.update()
    with to_the_end():
        try:
            return model.read(most)
        except Unfit as reason:
            return Unfit(str(reason))  # without its traceback, which holds the file


def _by_place(recording: Source, state: Any, like: State) -> Any:
    """A model whose arrays have no names, by those of another one; see `named_by_place`."""
    named = named_by_place(state, like)
    if named is not state:
        recording.said["arrays without names, arr_0 and on, are taken as the layers in their order"] += 1
    return named


def _notes_on_model(example: State, model: ModelSpec) -> list[str]:
    return [
        *_notes_on_empty(example),
        *_notes_on_integers(model),
        *_notes_on_final_layer(model),
        *_notes_on_tied(example, model),
    ]


def _notes_on_empty(state: State) -> list[str]:
    """What is said of tensors without any number, which are no layers."""
    empty = [str(name) for name, value in state.items() if math.prod(getattr(value, "shape", ())) == 0]
    return [f"tensors without numbers are no layers and are left out: {several(empty)}"] if empty else []


def _notes_on_integers(model: ModelSpec) -> list[str]:
    """What is said of weights that are integers, as those of compressed models are."""
    whole = [name for name in model.buffers if len(model[name].shape) > 1 and model[name].dtype.startswith("int")]
    if not whole:
        return []
    return [f"layers of integers are recorded and never scored: {several(whole)}; convert compressed weights first"]


def _most_frequent(states: list[Any], otherwise: State | None = None) -> State:
    """A model with the most frequent combination of layers and shapes.

    Where none can be read it is the one given, or an InputError is raised.
    """
    signatures: dict[Any, list[State]] = {}
    reason = "none was sent"
    for state in states:
        try:
            signatures.setdefault(_signature(state), []).append(state)
        except Unfit as unfit:
            reason = str(unfit)
    if not signatures and otherwise is not None:
        return otherwise
    if not signatures:
        raise InputError(f"no client's model can be read in the first round: {reason}")
    return max(signatures.values(), key=len)[0]


def _signature(state: Any) -> tuple:
    """The layers of a model with their shapes; raises Unfit where it is none."""
    if isinstance(state, Unfit):
        raise state
    if not isinstance(state, Mapping):
        raise Unfit(f"expected layers with names, found {type(state).__name__}")
    layers = []
    for name, value in state.items():
        try:
            layers.append((str(name), as_array(value)[0].shape))
        except Unfit as reason:
            raise Unfit(f"layer {shown(name)} {reason}") from reason
    return tuple(layers)


def _notes_on_final_layer(model: ModelSpec) -> list[str]:
    """What is said of a final layer that was found and not named, or was not found."""
    found = model.found_final_layer
    if (found.weight, found.bias) != (model.final_weight, model.final_bias) or found.certainty == "certain":
        return []
    if found.weight is None:
        return [f"the final layer is unknown, and statistics of it abstain: {found.why}; --final-layer names it"]
    return [f"{found.weight} is taken as the final layer: {found.why}; --final-layer names another"]


def _notes_on_tied(state: State, model: ModelSpec) -> list[str]:
    """What is said of layers that hold the same numbers, as an embedding and a head that share theirs do."""
    seen: dict[bytes, str] = {}
    notes = []
    for name in model.parameters:
        with np.errstate(all="ignore"):  # beyond float32 is infinite, as it is recorded
            array = np.asarray(as_array(state[name])[0], np.float32)
        if array.ndim < 2 or array.min() == array.max():
            continue
        key = hashlib.sha256(array.tobytes()).digest() + repr(array.shape).encode()
        if key in seen:
            notes.append(f"{name} holds the numbers of {seen[key]}: a layer that is tied counts twice")
        seen.setdefault(key, name)
    return notes


def _estimated_start(
    model: ModelSpec, sent: list[tuple[str, Any]], updates: bool, part: bool
) -> Mapping[str, np.ndarray]:
    """Estimates the global model before the first round: 0 for updates, else the median of the local models."""
    zero = {layer.name: np.zeros(layer.shape, layer.dtype) for layer in model.layers}
    if updates:
        return zero
    round_ = received(0, model, zero, sent, as_models=False, partial=part).round_
    rows = np.flatnonzero(round_.finite)
    median = {name: round_.trimmed_mean(name, None, round_.finite) for name in model.parameters}
    return {**zero, **median, **{name: round_.weighted_mean(name, rows, np.ones(len(rows))) for name in model.buffers}}


def _estimated_result(round_: Round, state: Mapping[str, np.ndarray], model: ModelSpec) -> dict[str, np.ndarray]:
    """Estimates the global model after a round: the one before it plus the mean of the finite updates."""
    rows = np.flatnonzero(round_.finite)
    with np.errstate(all="ignore"):
        mean = {name: round_.weighted_mean(name, rows, np.ones(len(rows))) for name in model}
        return {name: (state[name] + mean[name]).astype(state[name].dtype) for name in model}


def _faults(answers: Received, number: int) -> Iterator[str]:
    """A line for each client of a round that was refused or sent numbers that are not finite."""
    round_ = answers.round_
    for client, reason in round_.refused.items():
        yield f"round {number}, client {client}: refused: {reason}"
    for client in round_.clients[~round_.finite].tolist():
        yield f"round {number}, client {client}: recorded with numbers that are not finite"


def _num_converted(answers: Received) -> dict[str, int]:
    """The metric `converted`: how many models had numbers of another type; nothing if none had."""
    return {"converted": len(answers.notes)} if answers.notes else {}
