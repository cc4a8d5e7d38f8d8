"""Datasets and models by name.

A task is `digits` (built in), a folder in the layout of the Hugging Face hub (parquet with an image and a label
column, splits train and test), or the hub name `owner/name` of such a dataset. A folder is looked for as a path,
then below the one that the environment variable GRADLENS_DATA names (default: `data`): so a scenario may say
`fashion_mnist` and hold no path of one machine.
"""

import io
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import torch
from torch import nn

from gradlens.log import InputError
from simulations.randomness import Stream, address

DATA = "GRADLENS_DATA"
_GENERATOR = Lock()  # torch has one global generator, which models are initialised from


@dataclass(frozen=True, eq=False)
class Task:
    """Images to be told apart: float32 x [sample, channel, height, width] in [0, 1], int64 y [sample].

    All arrays are read-only; label_names: what the classes 0, 1, ... are called.
    """

    name: str
    x_train: np.ndarray
    y_train: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray
    label_names: tuple[str, ...]

    @property
    def num_classes(self) -> int:
        """How many classes there are."""
        return len(self.label_names)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channel, height, width."""
        return self.x_train.shape[1:]


@lru_cache(maxsize=2)
def load_task(name: str, samples: int | None = None, seed: int = 0) -> Task:
    """A task with `samples` of its training images, drawn at random without repetition (None: all in their order).

    Only the images asked for are decoded, and the last two tasks are remembered. Raises InputError where there
    is no such task, or not as many training images.
    """
    return TASKS[name](samples, seed) if name in TASKS else _hugging_face(name, samples, seed)


def digits(samples: int | None = None, seed: int = 0) -> Task:
    """The 1,797 handwritten digits of 8 x 8 pixels that come with scikit-learn; 1,437 train, 360 test, stratified."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    bunch: Any = load_digits()
    x = (bunch.images[:, None] / 16).astype(np.float32)
    y = bunch.target.astype(np.int64)
    train, test = train_test_split(np.arange(len(y)), test_size=360, stratify=y, random_state=0)
    chosen = train[_selection("digits", len(train), samples, seed)]
    return _task("digits", x[chosen], y[chosen], x[test], y[test], [str(digit) for digit in range(10)])


TASKS: Mapping[str, Callable[[int | None, int], Task]] = {"digits": digits}


def build_model(task: Task, name: str, seed: int = 0) -> nn.Module:
    """A freshly initialised model; the same for the same seed, whatever was drawn before, and drawing from nothing.

    Raises InputError for an unknown name.
    """
    if name not in MODELS:
        raise InputError(f"model: expected one of {', '.join(MODELS)}, found {name!r}")
    with _GENERATOR, torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(address(seed, Stream.MODEL).integers(2**63)))
        return MODELS[name](task.image_shape, task.num_classes)


class MLP(nn.Module):
    """One hidden layer: fc1 (32 units), fc2."""

    def __init__(self, image_shape: tuple[int, int, int], num_classes: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(int(np.prod(image_shape)), 32)
        self.fc2 = nn.Linear(32, num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Images [sample, channel, height, width] -> logits [sample, class]."""
        return self.fc2(torch.relu(self.fc1(images.flatten(1))))


class CNN(nn.Module):
    """Two convolutions and two dense layers: conv1, conv2, fc1, fc2.

    16 filters of 5 x 5 with stride 2 (of 3 x 3 with stride 1 for images below 16 pixels), 32 of 3 x 3 with stride
    2, 64 units: 56,970 parameters on grey images of 28 x 28 with 10 classes.
    """

    def __init__(self, image_shape: tuple[int, int, int], num_classes: int) -> None:
        super().__init__()
        channels, height, width = image_shape
        kernel, stride = (5, 2) if min(height, width) >= 16 else (3, 1)
        self.conv1 = nn.Conv2d(channels, 16, kernel, stride=stride)
        self.conv2 = nn.Conv2d(16, 32, 3, stride=2)
        with torch.no_grad():
            features = self.conv2(self.conv1(torch.zeros(1, *image_shape))).numel()
        self.fc1 = nn.Linear(features, 64)
        self.fc2 = nn.Linear(64, num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Images [sample, channel, height, width] -> logits [sample, class]."""
        features = torch.relu(self.conv2(torch.relu(self.conv1(images)))).flatten(1)
        return self.fc2(torch.relu(self.fc1(features)))


MODELS: Mapping[str, Callable[[tuple[int, int, int], int], nn.Module]] = {"mlp": MLP, "cnn": CNN}


def _hugging_face(name: str, samples: int | None, seed: int) -> Task:
    """A task from a folder in Hugging Face layout or from the hub."""
    source = _source(name)
    train = _splits(source)["train"]
    chosen = _selection(name, len(train), samples, seed)
    x_test, y_test = _test_images(source)
    x_train, y_train = _images(source, "train", chosen)
    if x_train.shape[1:] != x_test.shape[1:]:
        raise InputError(
            f"{source}: train images are {x_train.shape[1:]}, test images {x_test.shape[1:]}; expected one shape"
        )
    return _task(name, x_train, y_train, x_test, y_test, _label_names(source))


def _source(name: str) -> str:
    """The folder or hub name that a task's name stands for."""
    data = Path(os.environ.get(DATA, "data"))
    for folder in (Path(name), data / name):
        if folder.is_dir():
            return str(folder)
    if name.count("/") == 1 and not name.startswith((".", "/", "~")):
        return name
    raise InputError(
        f"task: expected {', '.join(TASKS)}, a folder of parquet files, a folder below {data}/ (set {DATA} to look "
        f"elsewhere) or a hub name owner/name, found {name!r}"
    )


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
        raise InputError(f"task {source}: cannot be loaded: {str(error).splitlines()[0]}") from error
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


def _columns(source: str) -> tuple[str, str]:
    """The names of the image and the label column: the first of their kinds."""
    features = _splits(source)["train"].features
    kinds = {name: type(feature).__name__ for name, feature in features.items()}
    image = next((name for name, kind in kinds.items() if kind == "Image"), None)
    label = next((name for name, kind in kinds.items() if kind == "ClassLabel"), "label" if "label" in kinds else None)
    if image is None or label is None:
        raise InputError(f"task {source}: expected an image and a label column, found {', '.join(kinds)}")
    return image, label


def _label_names(source: str) -> list[str]:
    splits, label = _splits(source), _columns(source)[1]
    names = getattr(splits["train"].features[label], "names", None)
    if names:
        return list(names)
    labels = [splits[split].select_columns(label).with_format("arrow")[:].column(label) for split in ("train", "test")]
    return [str(number) for number in range(max(int(column.to_numpy().max()) for column in labels) + 1)]


@lru_cache(maxsize=2)
def _test_images(source: str) -> tuple[np.ndarray, np.ndarray]:
    return _images(source, "test", np.arange(len(_splits(source)["test"])))


def _images(source: str, split: str, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The chosen images, float32 [sample, channel, height, width] in [0, 1], and their labels, int64 [sample]."""
    from PIL import Image

    image, label = _columns(source)
    rows = _splits(source)[split].with_format("arrow")[chosen]
    grey, decoded = None, []
    for cell in rows.column(image).to_pylist():
        picture = Image.open(cell["path"] if cell["bytes"] is None else io.BytesIO(cell["bytes"]))
        grey = picture.mode in ("1", "L", "I;16") if grey is None else grey
        mode = "L" if grey else "RGB"
        decoded.append(np.asarray(picture if picture.mode == mode else picture.convert(mode)))
    if len({array.shape for array in decoded}) != 1:
        raise InputError(f"task {source}: expected {split} images of one size, found several or none")
    pixels = np.stack(decoded).reshape(len(decoded), *decoded[0].shape[:2], -1)
    x = np.ascontiguousarray(pixels.transpose(0, 3, 1, 2), dtype=np.float32) / np.float32(255)
    return x, rows.column(label).to_numpy().astype(np.int64)


def _selection(name: str, available: int, samples: int | None, seed: int) -> np.ndarray:
    """Positions of the training samples to use."""
    if samples is None:
        return np.arange(available)
    if samples > available:
        raise InputError(f"task {name}: has {available:,} training samples, {samples:,} are asked for")
    return address(seed, Stream.SAMPLES).permutation(available)[:samples]


def _task(
    name: str, x_train: np.ndarray, y_train: np.ndarray, x_test: np.ndarray, y_test: np.ndarray, names: list[str]
) -> Task:
    for array in (x_train, y_train, x_test, y_test):
        array.flags.writeable = False  # a task is remembered and shared
    return Task(name, x_train, y_train, x_test, y_test, tuple(names))
