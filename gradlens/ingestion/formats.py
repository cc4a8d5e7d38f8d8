"""Readers of model files, chosen by the file's ending; the size of what it holds is checked before it is read."""

import re
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import ZipFile, is_zipfile

import numpy as np

from gradlens.errors import InputError
from gradlens.log.intake import State, Unfit, shown
from gradlens.log.manifest import kind_of_file

WRAPPED = ("state_dict", "model_state_dict")  # keys of the model in a checkpoint that holds more than the model
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

    @property
    def size(self) -> int:
        """Bytes that the content takes, as the file itself states; raises Unfit if that cannot be read.

        `.npz` and `.pt` files are zip files: the directory at their end states the unpacked size of each member.
        Neither numpy nor torch unpacks more of a member than is stated there.
        """
        try:
            size = _plain(self.path)
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
        return READERS[self.path.suffix](self.path, most)


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
    state = _unwrapped(loaded)
    if not isinstance(state, Mapping):
        return state
    size = 0
    for name, value in state.items():
        if isinstance(value, torch.Tensor):
            size += value.numel() * value.element_size()  # a view that repeats one number can have any shape
        elif not isinstance(value, bool | int | float):  # nested lists may contain themselves
            raise Unfit(f"layer {shown(name)} must be a tensor, found {type(value).__name__}")
    if most is not None and size > most:
        raise Unfit(_too_large(path, size, most))
    return state


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


READERS: Mapping[str, Callable[[Path, int | None], State]] = {
    ".pt": _torch_file,
    ".pth": _torch_file,
    ".npz": _npz_file,
    ".safetensors": _safetensors_file,
}


def _tensor(view: Mapping[str, Any]) -> np.ndarray:
    """Converts a safetensors tensor (little-endian); bfloat16, the upper half of a float32, becomes float32."""
    if view["dtype"] == "BF16":
        upper = np.frombuffer(view["data"], "<u2").astype(np.uint32)
        return (upper << 16).view(np.float32).reshape(view["shape"])
    if view["dtype"] not in SAFETENSORS:
        raise ValueError(f"numbers of type {view['dtype']} are not supported")
    dtype = np.dtype(SAFETENSORS[view["dtype"]]).newbyteorder("<")
    return np.frombuffer(view["data"], dtype).reshape(view["shape"])


def _unwrapped(loaded: Any) -> State:
    """The model inside a checkpoint, or what was loaded if it is not such a checkpoint."""
    for name in WRAPPED:
        if isinstance(loaded, Mapping) and isinstance(loaded.get(name), Mapping):
            return loaded[name]
    return loaded


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
