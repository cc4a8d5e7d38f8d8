"""Tasks of images: the built-in digits, and datasets in the layout of the Hugging Face hub."""

import io
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gradlens.errors import InputError
from gradlens.names import hint
from simulations.tasks.task import Task, first_line, frozen, selection

DATA = "GRADLENS_DATA"
OWNERS = ("writer_id", "user_id", "client_id", "writer", "user", "client")  # columns that say whose a sample is
BACKDOORS = "semantic_backdoors.json"  # beside the parquet files: name -> rows of train that are kept out of it


def digits(samples: int | None = None, seed: int = 0) -> Task:
    """The 1,797 handwritten digits of 8 x 8 gray pixels that come with scikit-learn.

    Parameters
    ----------
    samples : int, optional
        Number of training samples; None, the default, for all 1,437. The other 360, drawn stratified, are for testing.
    seed : int
        Of the draw of training samples.

    Returns
    -------
    Task
        Ten classes, "0" to "9".

    Examples
    --------
    >>> digits(samples=50).x_train.shape
    (50, 1, 8, 8)
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    bunch: Any = load_digits()
    x = (bunch.images[:, None] / 16).astype(np.float32)
    y = bunch.target.astype(np.int64)
    train, test = train_test_split(np.arange(len(y)), test_size=360, stratify=y, random_state=0)
    chosen = train[selection("digits", len(train), samples, seed)]
    return frozen(Task("digits", x[chosen], y[chosen], x[test], y[test], tuple("0123456789")))


def hugging_face(name: str, samples: int | None, seed: int, known: Sequence[str] = ("digits",)) -> Task:
    """Loads a task of images from a folder in Hugging Face layout, or from the hub.

    Parameters
    ----------
    name : str
        A folder, a folder below the data folder, or a hub name `owner/name`.
    samples : int or None
        Number of training samples; None for all in their order.
    seed : int
        Of their draw.
    known : sequence of str
        Names of the built-in tasks, for the error message.

    Returns
    -------
    Task
        The label is the first column of class labels, or the one called `label`; a column writer_id, user_id or
        client_id says whose each image is. Rows that `semantic_backdoors.json` in the folder names are never in
        x_train, whatever is attacked; they are the task's extras, in the order of their list.

    Raises
    ------
    InputError
        If there is no such dataset, it cannot be read, or has fewer training samples.
    """
    source = data_source(name, known)
    backdoors = _backdoors(source)
    pool = np.setdiff1d(np.arange(len(_splits(source)["train"])), [row for rows in backdoors.values() for row in rows])
    chosen = pool[selection(name, len(pool), samples, seed)]
    train, test = _images(source, "train", chosen), _test_images(source)
    if train.x.shape[1:] != test.x.shape[1:]:
        raise InputError(
            f"{source}: train images are {train.x.shape[1:]}, test images {test.x.shape[1:]}; expected one shape"
        )
    extras = {feature: _images(source, "train", rows).x for feature, rows in backdoors.items()}
    names = tuple(_label_names(source))
    return frozen(Task(name, train.x, train.y, test.x, test.y, names, train.owners, test.owners, extras))


def data_folder() -> Path:
    """Returns the folder below which datasets are looked for by name."""
    return Path(os.environ.get(DATA, "data"))


def data_source(name: str, known: Sequence[str]) -> str:
    """Returns the folder or hub name that a task's name stands for."""
    data = data_folder()
    for folder in (Path(name), data / name):
        if folder.is_dir():
            return str(folder)
    if name.count("/") == 1 and not name.startswith((".", "/", "~")):
        return name
    raise InputError(
        f"task: expected {', '.join(known)}, a folder of parquet files, a folder below {data}/ (set {DATA} to look "
        f"elsewhere), a hub name owner/name or a function module:function, found {name!r}{hint(name, known)}"
    )


class _Columns(NamedTuple):
    image: str
    label: str
    owner: str | None


class _Images(NamedTuple):
    x: np.ndarray
    y: np.ndarray
    owners: np.ndarray | None


@lru_cache(maxsize=4)
def _splits(source: str) -> Any:
    """The undecoded `datasets.DatasetDict` of a folder or hub name."""
    try:
        import datasets
        import PIL  # noqa: F401 - decodes the images
    except ImportError as error:
        raise InputError(
            f"task {source}: needs the extra `data`: pip install 'gradlens-forensics[data]' ({error})"
        ) from None
    try:
        with _quiet(datasets):
            splits: Any = datasets.load_dataset(source)
    except Exception as error:  # whatever the network, the disk or the files did
        raise InputError(f"task {source}: cannot be loaded: {first_line(error)}") from error
    if not isinstance(splits, dict) or not {"train", "test"} <= set(splits):
        raise InputError(f"task {source}: expected the splits train and test, found {', '.join(splits)}")
    return splits


@contextmanager
def _quiet(datasets: Any) -> Iterator[None]:
    """Silences progress bars and log messages of the library, and puts both back."""
    logging, bars = datasets.utils.logging, not datasets.utils.are_progress_bars_disabled()
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    datasets.utils.disable_progress_bars()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            datasets.utils.enable_progress_bars()


def _columns(source: str) -> _Columns:
    """The names of the image, the label and the owner's column: the first of their kinds."""
    features = _splits(source)["train"].features
    kinds = {name: type(feature).__name__ for name, feature in features.items()}
    owner = next((name for name in OWNERS if name in kinds), None)
    image = next((name for name, kind in kinds.items() if kind == "Image"), None)
    label = next((name for name, kind in kinds.items() if kind == "ClassLabel" and name != owner), None)
    label = "label" if label is None and "label" in kinds else label
    if image is None or label is None:
        raise InputError(f"task {source}: expected an image and a label column, found {', '.join(kinds)}")
    return _Columns(image, label, owner)


def _label_names(source: str) -> list[str]:
    splits, label = _splits(source), _columns(source).label
    names = getattr(splits["train"].features[label], "names", None)
    if names:
        return list(names)
    labels = [splits[split].select_columns(label).with_format("arrow")[:].column(label) for split in ("train", "test")]
    return [str(number) for number in range(max(int(column.to_numpy().max()) for column in labels) + 1)]


@lru_cache(maxsize=2)
def _test_images(source: str) -> _Images:
    return _images(source, "test", np.arange(len(_splits(source)["test"])))


def _images(source: str, split: str, chosen: np.ndarray) -> _Images:
    """The chosen images, float32 [sample, channel, height, width] in [0, 1], their labels and their owners."""
    from PIL import Image

    columns = _columns(source)
    rows = _splits(source)[split].with_format("arrow")[chosen]
    is_gray, decoded = None, []
    for cell in rows.column(columns.image).to_pylist():
        picture = Image.open(cell["path"] if cell["bytes"] is None else io.BytesIO(cell["bytes"]))
        is_gray = picture.mode in ("1", "L", "I;16") if is_gray is None else is_gray
        mode = "L" if is_gray else "RGB"
        decoded.append(np.asarray(picture if picture.mode == mode else picture.convert(mode)))
    if len({array.shape for array in decoded}) != 1:
        raise InputError(f"task {source}: expected {split} images of one size, found several or none")
    pixels = np.stack(decoded).reshape(len(decoded), *decoded[0].shape[:2], -1)
    x = np.ascontiguousarray(pixels.transpose(0, 3, 1, 2), dtype=np.float32) / np.float32(255)
    owners = np.array(rows.column(columns.owner).to_pylist(), dtype=np.str_) if columns.owner else None
    return _Images(x, rows.column(columns.label).to_numpy().astype(np.int64), owners)


def _backdoors(source: str) -> dict[str, np.ndarray]:
    """The rows of train that carry a semantic feature, name -> int64 [row]; {} where no file names them."""
    file = Path(source) / BACKDOORS
    if not file.is_file():
        return {}
    available = len(_splits(source)["train"])
    try:
        lists = {str(name): np.array(rows) for name, rows in json.loads(file.read_text()).items()}
    except (ValueError, AttributeError) as error:
        raise InputError(f"{file}: expected a JSON object of lists of rows: {first_line(error)}") from None
    for name, rows in lists.items():
        if rows.ndim != 1 or rows.dtype.kind != "i" or not len(rows) or rows.min() < 0 or rows.max() >= available:
            raise InputError(f"{file}: {name}: expected a list of rows from 0 to {available - 1:,}")
    return lists
