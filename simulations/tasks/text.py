"""Tasks of text: the next character or word in the speeches of Shakespeare's roles, or which of them speaks."""

import re
from collections import Counter
from collections.abc import Callable, Iterable
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from gradlens.errors import InputError
from simulations.tasks.images import DATA, data_folder
from simulations.tasks.task import Task, frozen, selection

ENOUGH = 2_000  # characters of speech that a role needs to be used
HELD_OUT = 0.1  # share of each role's text, at its end, that is kept for testing
CHARACTERS, CHARACTER_STRIDE = 80, 10  # characters that are seen before the next one; from window to window
WORDS, WORD_STRIDE = 10, 2
VOCABULARY = 2_000  # words
SPEAKERS, SPOKEN, SPOKEN_STRIDE = 10, 20, 5  # roles that are told apart; words that are seen, from window to window
WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)*")  # letters and digits, with apostrophes inside


def shakespeare_chars(samples: int | None = None, seed: int = 0) -> Task:
    """Predicts the next character from the last 80 in the speeches of each role, as in LEAF.

    Parameters
    ----------
    samples : int, optional
        Number of training windows; None, the default, for all.
    seed : int
        Of their draw.

    Returns
    -------
    Task
        The classes are the characters of the whole text, in the order of their codes; a sample's owner is its role.

    Raises
    ------
    InputError
        If `shakespeare/input.txt` is not below the data folder, or is too short.

    Notes
    -----
    Windows start every 10 characters. A role's speeches follow each other, with a line break between; roles with fewer
    than 2,000 characters are left out. The last 10 % of each role's text are for testing, and no window reaches across.
    LEAF [1]_ has a stride of 1 and the text of all plays.

    References
    ----------
    .. [1] Caldas et al. 2018, arXiv:1812.01097.

    Examples
    --------
    >>> from simulations.tasks import TASKS
    >>> TASKS["shakespeare_chars"] is shakespeare_chars  # needs shakespeare/input.txt below the data folder
    True
    """
    text, speeches = _read("shakespeare_chars")
    characters = sorted(set(text))
    encode = partial(_encode, "characters", list, {character: i for i, character in enumerate(characters)})
    train, test = _windows(speeches, encode, CHARACTERS, CHARACTER_STRIDE, len(characters))
    return _task("shakespeare_chars", train, test, characters, len(characters), encode, samples, seed)


def shakespeare_words(samples: int | None = None, seed: int = 0) -> Task:
    """Predicts the next word from the last 10 in the speeches of each role.

    Parameters
    ----------
    samples : int, optional
        Number of training windows; None, the default, for all.
    seed : int
        Of their draw.

    Returns
    -------
    Task
        The classes are the 2,000 most frequent words of the training text, most frequent first; a sample's owner is
        its role.

    Raises
    ------
    InputError
        If `shakespeare/input.txt` is not below the data folder, or is too short.

    Notes
    -----
    Windows start every 2 words. Words are in lower case and without punctuation. Any word that is no class is the token
    2,000, `<unk>`, which is never a label: windows whose next word is unknown are left out. Roles and test text are
    those of `shakespeare_chars`.

    Examples
    --------
    >>> from simulations.tasks import TASKS
    >>> TASKS["shakespeare_words"] is shakespeare_words  # needs shakespeare/input.txt below the data folder
    True
    """
    _, speeches = _read("shakespeare_words")
    words = _vocabulary(speeches.values())
    numbers = {word: i for i, word in enumerate(words)}
    encode = partial(_encode, "words", _words, numbers)
    train, test = _windows(speeches, lambda text: _numbers(text, numbers), WORDS, WORD_STRIDE, len(words))
    return _task("shakespeare_words", train, test, words, len(words) + 1, encode, samples, seed)


def shakespeare_speakers(samples: int | None = None, seed: int = 0) -> Task:
    """Tells which of ten roles speaks from 20 words of a speech.

    Parameters
    ----------
    samples : int, optional
        Number of training windows; None, the default, for all.
    seed : int
        Of their draw.

    Returns
    -------
    Task
        The classes are the ten roles with the most words, the most first; samples have no owners, because a role is the
        label.

    Raises
    ------
    InputError
        If `shakespeare/input.txt` is not below the data folder, or is too short.

    Notes
    -----
    Windows start every 5 words. Words, the vocabulary of 2,000 and the test text are as in `shakespeare_words`, of
    these roles alone; where fewer roles have enough to say, there are fewer classes.

    Examples
    --------
    >>> from simulations.tasks import TASKS
    >>> TASKS["shakespeare_speakers"] is shakespeare_speakers  # needs shakespeare/input.txt below the data folder
    True
    """
    _, speeches = _read("shakespeare_speakers")
    length = {role: len(_words(text)) for role, text in speeches.items()}
    roles = sorted(length, key=lambda role: (-length[role], role))[:SPEAKERS]
    words = _vocabulary(speeches[role] for role in roles)
    numbers = {word: i for i, word in enumerate(words)}
    parts: tuple[list[Any], list[Any]] = ([], [])
    for label, role in enumerate(roles):
        for part, piece in zip(parts, _cut(speeches[role]), strict=True):
            encoded = _numbers(piece, numbers)
            if len(encoded) >= SPOKEN:
                rows = np.lib.stride_tricks.sliding_window_view(encoded, SPOKEN)[::SPOKEN_STRIDE]
                part.append((rows, np.full(len(rows), label)))
    (x, y), (x_test, y_test) = (tuple(map(np.concatenate, zip(*part, strict=True))) for part in parts)
    chosen = selection("shakespeare_speakers", len(y), samples, seed)
    encode = partial(_encode, "words", _words, numbers)
    return frozen(
        Task(
            "shakespeare_speakers",
            x[chosen],
            y[chosen],
            x_test,
            y_test,
            tuple(roles),
            encode=encode,
            num_tokens=len(words) + 1,
        )
    )


def _vocabulary(texts: Iterable[str]) -> list[str]:
    """The most frequent words of the training part of texts, most frequent first."""
    seen = Counter(word for text in texts for word in _words(_cut(text)[0]))
    return sorted(seen, key=lambda word: (-seen[word], word))[:VOCABULARY]


def _words(text: str) -> list[str]:
    return WORD.findall(text.lower())


def _numbers(text: str, numbers: dict[str, int]) -> np.ndarray:
    """The tokens of a text's words; those outside the vocabulary share the last token."""
    return np.array([numbers.get(word, len(numbers)) for word in _words(text)], np.int64)


def _encode(kind: str, split: Callable[[str], Iterable[str]], numbers: dict[str, int], text: str) -> np.ndarray:
    """The tokens of a text, int64 [position]; raises InputError that names the words or characters it does not know."""
    parts = list(split(text))
    if unknown := list(dict.fromkeys(part for part in parts if part not in numbers)):
        raise InputError(f"text {text!r}: unknown {kind} {', '.join(map(repr, unknown))}")
    return np.array([numbers[part] for part in parts], np.int64)


@lru_cache(maxsize=1)
def _speeches(path: Path) -> tuple[str, dict[str, str]]:
    """The whole text, and role -> its speeches, of the roles with enough of them, in the order of appearance.

    A speech is a paragraph whose first line is `NAME:`; names that recur in several plays are one role.
    """
    text = path.read_text(encoding="utf-8")
    spoken: dict[str, list[str]] = {}
    for speech in re.split(r"\n{2,}", text.strip("\n")):
        role, _, lines = speech.partition("\n")
        if role.endswith(":"):
            spoken.setdefault(role.removesuffix(":"), []).append(lines)
    speeches = {role: "\n".join(parts) for role, parts in spoken.items()}
    return text, {role: speech for role, speech in speeches.items() if len(speech) >= ENOUGH}


def _read(name: str) -> tuple[str, dict[str, str]]:
    path = data_folder() / "shakespeare" / "input.txt"
    if not path.is_file():
        raise InputError(f"task {name}: expected the text at {path} (set {DATA} to look elsewhere), found nothing")
    text, speeches = _speeches(path)
    if not speeches:
        raise InputError(f"task {name}: no role of {path} has {ENOUGH:,} characters of speech")
    return text, speeches


def _cut(text: str) -> tuple[str, str]:
    """A role's training and test text."""
    end = len(text) - int(len(text) * HELD_OUT)
    return text[:end], text[end:]


Windows = tuple[np.ndarray, np.ndarray, np.ndarray]  # x [sample, position], y [sample], owners [sample]


def _windows(
    speeches: dict[str, str], tokens: Callable[[str], np.ndarray], length: int, stride: int, num_classes: int
) -> tuple[Windows, Windows]:
    """All windows of all roles, for training and for testing, without those whose next token is no class."""
    parts: tuple[list[Any], list[Any]] = ([], [])
    for role, text in speeches.items():
        for part, piece in zip(parts, _cut(text), strict=True):
            encoded = tokens(piece)
            if len(encoded) > length:
                rows = np.lib.stride_tricks.sliding_window_view(encoded, length + 1)[::stride]
                rows = rows[rows[:, -1] < num_classes]
                part.append((rows[:, :-1], rows[:, -1], np.full(len(rows), role)))
    train, test = (tuple(np.concatenate(column) for column in zip(*part, strict=True)) for part in parts)
    return train, test  # type: ignore[return-value]


def _task(
    name: str, train: Windows, test: Windows, labels: list[str], num_tokens: int, encode: Any, samples: Any, seed: int
) -> Task:
    chosen = selection(name, len(train[1]), samples, seed)
    x, y, owners = (column[chosen] for column in train)
    return frozen(
        Task(name, x, y, test[0], test[1], tuple(labels), owners, test[2], encode=encode, num_tokens=num_tokens)
    )
