"""Arrays of any library, and why something is none."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np

from gradlens.errors import Stopped

LONGEST_QUOTE = 80  # characters of a value that a reason quotes

State = Mapping[str, Any]  # layer -> array of any library


class Unfit(Exception):  # noqa: N818 - an answer, not a fault
    """Why what a client sent cannot be recorded; also stands in for an answer that could not even be read."""


@contextmanager
def refusing(fault: str) -> Iterator[None]:
    """Turns whatever a client's own code raises into `Unfit`, SystemExit and KeyboardInterrupt included.

    Only the signals that end a command of gradlens pass through. A Ctrl-C at a server of another kind cannot be told
    from a client's own KeyboardInterrupt, and refuses the client whose answer was being read.

    Parameters
    ----------
    fault : str
        What could not be done; the error is appended after a colon.
    """
    try:
        yield
    except (Unfit, Stopped):
        raise
    except BaseException as error:
        raise Unfit(f"{fault}: {shown(error)}") from error


def as_array(value: Any) -> tuple[np.ndarray, str]:
    """Converts an array of any library to numpy.

    Torch tensors are converted without importing torch; bfloat16 and smaller floats become float32.

    Parameters
    ----------
    value : Any
        A numpy array, a torch tensor, or what `numpy.asarray` takes.

    Returns
    -------
    array : numpy.ndarray
        Of floats, integers or booleans.
    kind : str
        The type that the numbers had, such as "bfloat16".

    Raises
    ------
    Unfit
        Where the value is no array, or holds something other than numbers.

    Examples
    --------
    >>> array, kind = as_array([[1.0, 2.0]])
    >>> array.shape, kind
    ((1, 2), 'float64')
    """
    with refusing("is no array"):
        if hasattr(value, "detach"):
            value = value.detach().cpu()
            kind = str(value.dtype).removeprefix("torch.")
            array = np.asarray(value.float().numpy() if kind.startswith(("bfloat", "float8")) else value.numpy())
        else:
            array = np.asarray(value)
            kind = array.dtype.name
            if array.dtype.kind == "V" and kind.startswith(("bfloat", "float")):  # types that ml_dtypes adds
                array = array.astype(np.float32)
    if array.dtype.kind not in "fiub":
        raise Unfit(f"must hold numbers, found {type(value).__name__} of type {array.dtype}")
    return array, kind


def shown(value: Any) -> str:
    """A value in a few characters, to quote it in a reason."""
    try:
        return f"{value!r:.{LONGEST_QUOTE}}"
    except Stopped:
        raise
    except BaseException:  # an integer of 5,000 digits, an object that raises when it is printed
        return f"a value of type {type(value).__name__}"
