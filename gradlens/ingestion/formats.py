"""Readers of model files, chosen by the file's ending; the size of what it holds is checked before it is read.

What stands around the model in a file, as frameworks write it, is taken off here: the entry of a checkpoint that holds
it, prefixes that wrappers give to all names, and numbers that are no layers. What was taken off is said.
"""

import json
import math
import os
import re
import stat
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zipfile import ZipFile, is_zipfile

import numpy as np

from gradlens.errors import InputError
from gradlens.log.intake import State, Unfit, shown
from gradlens.log.manifest import kind_of_file

WRAPPED = (  # entries that hold the model in checkpoints that hold more; another name is found if it is alone
    "state_dict", "model_state_dict", "model", "model_state", "module", "net", "network", "weights", "params",
)  # fmt: skip
BESIDE = re.compile("optim|sched|scaler|rng", re.IGNORECASE)  # in names of other entries
PREFIXES = ("module.", "_orig_mod.")  # of torch's DataParallel and compile
MEASURED = {  # names of single numbers beside the layers that are no layers
    "loss", "train_loss", "val_loss", "acc", "accuracy", "epoch", "round", "step", "lr", "learning_rate", "time",
    "seed", "num_examples", "num_samples",
}  # fmt: skip
LARGEST_INDEX = 1 << 24  # bytes
INDEX, SHARD = ".safetensors.index.json", re.compile(r"-\d{5}-of-\d{5}\.safetensors$")
SAFETENSORS = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "I64": np.int64, "I32": np.int32, "I16": np.int16,
    "I8": np.int8, "U64": np.uint64, "U32": np.uint32, "U16": np.uint16, "U8": np.uint8, "BOOL": np.bool_,
}  # fmt: skip


@dataclass(frozen=True)
class ModelFile:
    """A file that may hold a model; it is opened on use.

    Parameters
    ----------
    path : Path
        A file whose ending is one of `READERS`.
    key : str, optional
        The entry that holds the model; by default the usual ones are tried, and one that is alone.
    said : Counter of str
        What was taken off around the model, and how often; files of a recording share it.

    Examples
    --------
    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     path = Path(folder, "client.npz")
    ...     np.savez(path, w=np.ones(3))
    ...     ModelFile(path).read()
    {'w': array([1., 1., 1.])}
    """

    path: Path
    key: str | None = None
    said: Counter[str] = field(default_factory=Counter, compare=False)

    @property
    def size(self) -> int:
        """Bytes that the content takes, as the file itself states; raises Unfit if that cannot be read.

        `.npz` and `.pt` files are zip files: the directory at their end states the unpacked size of each member.
        Neither numpy nor torch unpacks more of a member than is stated there.
        """
        try:
            size = _plain(self.path)
            if self.path.name.endswith(INDEX):
                return sum(_plain(shard) for shard in _shards(self.path))
            if is_zipfile(self.path):
                with ZipFile(self.path) as file:
                    return max(size, sum(member.file_size for member in file.infolist()))
            return size
        except Exception as error:  # malformed bytes can raise anything
            raise Unfit(_unreadable(self.path, error)) from error

    def read(self, most: int | None = None) -> State:
        """Reads the model.

        Parameters
        ----------
        most : int, optional
            The most bytes that the model may take; by default any size.

        Returns
        -------
        Mapping
            Layer -> array; what the file holds is not checked further.

        Raises
        ------
        Unfit
            If the file cannot be read or the model is too large.
        InputError
            If the package that reads this format is not installed.
        """
        if most is not None and self.size > most:
            raise Unfit(_too_large(self.path, self.size, most))
        try:
            _plain(self.path)
        except OSError as error:
            raise Unfit(_unreadable(self.path, error)) from error
        state = self._bare(self._unwrapped(READERS[ending_of(self.path.name)](self.path, most)))
        if not isinstance(state, Mapping):
            return state
        size = 0
        for name, value in state.items():
            if _is_array(value):
                # not its memory: a view that repeats one number can have any shape, and a sparse tensor tells none
                size += math.prod(value.shape) * value.dtype.itemsize
            elif not isinstance(value, bool | int | float):  # nested lists may contain themselves
                raise Unfit(f"layer {shown(name)} must be a tensor, found {type(value).__name__}")
        if most is not None and size > most:
            raise Unfit(_too_large(self.path, size, most))
        return state

    def _unwrapped(self, loaded: Any) -> Any:
        """The model inside a checkpoint, or what was loaded if it is not such a checkpoint."""
        if not isinstance(loaded, Mapping):
            return loaded
        if self.key is not None:
            if not isinstance(loaded.get(self.key), Mapping):
                entries = ", ".join(map(shown, list(loaded)[:5]))
                raise Unfit(f"{shown(self.path.name)} has no entry {shown(self.key)} with a model, only {entries}")
            return loaded[self.key]
        inside = [name for name, value in loaded.items() if isinstance(value, Mapping) and _has_arrays(value)]
        if not inside or any(_is_array(value) for value in loaded.values()):
            return loaded
        usual = [name for name in WRAPPED if name in inside]
        others = [name for name in inside if not BESIDE.search(str(name))]
        if not usual and len(others) != 1:
            entries = ", ".join(map(shown, inside))
            what = f"holds several tables of arrays, {entries}"
            raise Unfit(f"{shown(self.path.name)} {what}: --model-key names the model's")
        name = usual[0] if usual else others[0]
        if name not in WRAPPED[:2]:
            self.said[f"the model is the entry {shown(name)} of its file"] += 1
        return loaded[name]

    def _bare(self, state: Any) -> Any:
        """The layers, by their names without the prefixes of wrappers, and without single numbers beside them."""
        if not isinstance(state, Mapping) or not all(isinstance(name, str) for name in state):
            return state
        beside = [name for name, value in state.items() if _is_beside(name, value)]
        if state and all(name.lower() in MEASURED for name in beside) and len(beside) == len(state):
            raise Unfit(f"{shown(self.path.name)} holds no layers, only {', '.join(map(shown, beside[:5]))}")
        if beside and len(beside) < len(state):
            self.said[f"single numbers beside the layers are left out: {', '.join(map(shown, beside[:5]))}"] += 1
            state = {name: value for name, value in state.items() if name not in beside}
        while prefix := next((each for each in PREFIXES if all(name.startswith(each) for name in state) and state), ""):
            self.said[f"names of layers lost their prefix {prefix!r}"] += 1
            state = {name.removeprefix(prefix): value for name, value in state.items()}
        return state


def _plain(path: Path) -> int:
    """Bytes of a plain file; raises OSError where it is none: a pipe would be waited for, a device has no end."""
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise OSError(f"expected a plain file, found {kind_of_file(found.st_mode)}")
    return found.st_size


def _torch_file(path: Path, most: int | None) -> State:
    try:
        import torch
    except ModuleNotFoundError as error:
        raise InputError(_needs(path, "torch", "simulations")) from error
    try:
        try:
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # written before torch 1.6, or not a file of torch
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # malformed bytes can raise anything
        raise Unfit(_unreadable(path, error)) from error
    return loaded


def _npz_file(path: Path, _: int | None) -> State:
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as loaded:
            return {name: loaded[name] for name in loaded.files}
    except Exception as error:  # malformed bytes can raise anything
        raise Unfit(_unreadable(path, error)) from error


def _safetensors_file(path: Path, _: int | None) -> State:
    try:
        from safetensors import deserialize  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError as error:
        raise InputError(_needs(path, "safetensors", "files")) from error
    try:
        return {name: _tensor(view) for name, view in sorted(deserialize(path.read_bytes()))}
    except Exception as error:  # malformed bytes can raise anything
        raise Unfit(_unreadable(path, error)) from error


def _sharded_file(path: Path, most: int | None) -> State:
    state: dict[str, Any] = {}
    for shard in _shards(path):
        part = _safetensors_file(shard, most)
        if both := [name for name in part if name in state]:
            raise Unfit(f"{shown(path.name)}: layer {shown(both[0])} stands in two of its files")
        state |= part
    return dict(sorted(state.items()))


def _shards(path: Path) -> list[Path]:
    """The files that an index names, all of them plain files beside it; raises Unfit."""
    try:
        if _plain(path) > LARGEST_INDEX:
            raise ValueError(f"an index takes at most {LARGEST_INDEX:,} bytes")
        names = sorted(set(json.loads(path.read_text("utf-8"))["weight_map"].values()))
    except Exception as error:  # malformed bytes can raise anything
        raise Unfit(_unreadable(path, error)) from error
    if strange := [
        name for name in names if not isinstance(name, str) or not SHARD.search(name) or Path(name).name != name
    ]:
        raise Unfit(f"{shown(path.name)} names files that are no parts of a model beside it: {shown(strange[0])}")
    shards, folder = [path.with_name(name) for name in names], os.path.realpath(path.parent)
    for shard in shards:
        try:
            _plain(shard)  # a pipe would be waited for
        except OSError as error:
            raise Unfit(_unreadable(shard, error)) from error
        if os.path.dirname(os.path.realpath(shard)) != folder:
            raise Unfit(f"{shown(shard.name)} is a link that leads out of its folder")
    return shards


READERS: Mapping[str, Callable[[Path, int | None], State]] = {
    ".pt": _torch_file,
    ".pth": _torch_file,
    ".npz": _npz_file,
    ".safetensors": _safetensors_file,
    ".bin": _torch_file,
    ".ckpt": _torch_file,
    ".pt.tar": _torch_file,
    ".pth.tar": _torch_file,
    INDEX: _sharded_file,
}


def ending_of(name: str) -> str:
    """The ending by which a file is read, "" where there is none, as for a part of a sharded model.

    Examples
    --------
    >>> ending_of("client_3.pth.tar"), ending_of("model-00001-of-00002.safetensors"), ending_of("notes.txt")
    ('.pth.tar', '', '')
    """
    return "" if SHARD.search(name) else next((ending for ending in READERS if name.endswith(ending)), "")


def _is_array(value: Any) -> bool:
    return hasattr(value, "shape") and hasattr(value, "dtype")


def _has_arrays(table: Mapping[Any, Any]) -> bool:
    return (
        bool(table)
        and all(_is_array(value) or isinstance(value, bool | int | float) for value in table.values())
        and any(_is_array(value) for value in table.values())
    )


def _is_beside(name: str, value: Any) -> bool:
    """Whether an entry beside the layers is none: a plain number, or a single one that is called as measures are."""
    if isinstance(value, bool | int | float | str) or value is None:
        return True
    return _is_array(value) and not value.shape and name.lower() in MEASURED


def _tensor(view: Mapping[str, Any]) -> np.ndarray:
    """Converts a safetensors tensor (little-endian); bfloat16, the upper half of a float32, becomes float32."""
    if view["dtype"] == "BF16":
        upper = np.frombuffer(view["data"], "<u2").astype(np.uint32)
        return (upper << 16).view(np.float32).reshape(view["shape"])
    if view["dtype"] not in SAFETENSORS:
        raise ValueError(f"numbers of type {view['dtype']} are not supported")
    dtype = np.dtype(SAFETENSORS[view["dtype"]]).newbyteorder("<")
    return np.frombuffer(view["data"], dtype).reshape(view["shape"])


def _needs(path: Path, package: str, extra: str) -> str:
    return f"{path}: {package} is needed to read it: pip install 'gradlens-forensics[{extra}]'"


def _too_large(path: Path, size: int, most: int) -> str:
    return f"{shown(path.name)} would take {size:,} bytes, a client's model may take at most {most:,}"


def _unreadable(path: Path, error: Exception) -> str:
    return f"{shown(path.name)} cannot be read: {first_line(error)}"


def first_line(error: Exception) -> str:
    """The first line of an error message, printable and shortened."""
    if match := re.search(r"GLOBAL (\S+)", str(error)):  # torch refuses a pickle with this word
        return f"it is a pickle that asks for {shown(match[1])}"
    lines = [line for line in str(error).splitlines() if line.strip()] or [repr(error)]
    return shown(lines[0])[1:-1]


def named_by_place(state: Any, like: State) -> Any:
    """Arrays without names by those of a model, where they are as many and have its shapes in its order.

    `numpy.savez` calls arrays without names arr_0, arr_1 and so on, which is how Flower's guides save a model.

    Parameters
    ----------
    state : Any
        A model; what is none, or has names, is returned as it is.
    like : Mapping
        Layer -> array, in the order of the model.

    Examples
    --------
    >>> list(named_by_place({"arr_0": np.ones((2, 3)), "arr_1": np.ones(2)}, {"w": np.ones((2, 3)), "b": np.ones(2)}))
    ['w', 'b']
    """
    if not isinstance(state, Mapping) or not state:
        return state
    places = [f"arr_{place}" for place in range(len(state))]
    if set(places) != set(state) or len(like) != len(state):
        return state
    arrays = [state[place] for place in places]
    shapes = [tuple(np.shape(array)) for array in like.values()]
    return dict(zip(like, arrays, strict=True)) if [tuple(np.shape(each)) for each in arrays] == shapes else state
