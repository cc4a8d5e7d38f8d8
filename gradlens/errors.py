"""Errors and warnings: `InputError` for a caller's mistake, `CannotSay` for a question without an answer."""


class InputError(ValueError):
    """Bad input, in one line: what was expected, what was found, where, and what to do.

    Examples
    --------
    >>> from gradlens.detectors import DETECTORS
    >>> try:
    ...     DETECTORS["krum"](num_malicious=-1)
    ... except InputError as error:
    ...     print(error)
    num_malicious must be a whole number of at least 0, found -1
    """


class CannotSay(Exception):  # noqa: N818 - an answer, not a fault
    """Why there is no answer: the cohort is too small, the model has no such layer, the history is too short.

    Examples
    --------
    >>> from gradlens.examples import example_log
    >>> from gradlens.statistics import layer_norms
    >>> try:
    ...     layer_norms(example_log(num_clients=2, num_malicious=0))
    ... except CannotSay as reason:
    ...     print(reason)
    round 3 has 2 comparable clients, at least 3 are needed
    """


class EvidenceLost(RuntimeWarning):
    """A round could not be recorded; aggregation goes on."""


class UnreadableError(InputError):
    """A recorded round that can no longer be read: its file is missing, or is not what was recorded."""


class EverybodyRefused(RuntimeWarning):
    """Nothing of a round is used: everybody was refused or left out, so the global model learns nothing."""


class Stopped(BaseException):
    """A signal that ends a command, with its number; no KeyboardInterrupt, which typer keeps for itself.

    Attributes
    ----------
    left : str
        What remains of the work, in words.
    """

    left = "what was finished is kept, and the same command goes on from there"
