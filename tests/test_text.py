"""Text: windows of one role each, train and test apart, tokens that mean what they say."""

import contextlib
import re

import numpy as np
import pytest

from gradlens.errors import InputError
from simulations.tasks import load_task
from simulations.tasks.text import (
    CHARACTER_STRIDE,
    CHARACTERS,
    ENOUGH,
    SPOKEN,
    SPOKEN_STRIDE,
    VOCABULARY,
    WORD_STRIDE,
    WORDS,
)

NAMES = ["shakespeare_chars", "shakespeare_words"]
SPEAKS = {"Ann": "a", "Second Bob": "b", "EVE": "e"}  # role -> the letter with which all its words begin


@pytest.fixture
def play(tmp_path, monkeypatch):
    """A text of three roles with enough to say and one without; each role has words of its own, Ann 4,000."""
    rng = np.random.default_rng(0)
    speeches = []
    for number in range(400):
        for role, letter in SPEAKS.items():
            words = [f"{letter}{''.join(rng.choice(list('xyz'), 7))}" for _ in range(10 if role == "Ann" else 3)]
            speeches.append(f"{role}:\n{' '.join(words[:2])},\n{' '.join(words[2:])}.")
        if number < 10:
            speeches.append("Mute:\nmm, mm; MM!")
    folder = tmp_path / "shakespeare"
    folder.mkdir()
    (folder / "input.txt").write_text("\n\n".join(speeches) + "\n")
    monkeypatch.setenv("GRADLENS_DATA", str(tmp_path))
    return folder / "input.txt"


def spoken(path, role: str) -> str:
    """What a role says in all its speeches, read in another way than the code does."""
    pattern = rf"(?:^|\n\n){re.escape(role)}:\n(.*?)(?=\n\n|\n?\Z)"
    return "\n".join(re.findall(pattern, path.read_text().rstrip("\n"), flags=re.DOTALL))


def text_of(task, tokens) -> str:
    return "".join(task.label_names[token] for token in tokens)


@pytest.mark.parametrize("name", NAMES)
def test_shapes_types_and_roles(play, name):
    task = load_task(name)
    length = CHARACTERS if name == "shakespeare_chars" else WORDS
    assert task.name == name
    assert task.is_text
    assert task.input_shape == (length,)
    for x, y, owners in (
        (task.x_train, task.y_train, task.owners_train),
        (task.x_test, task.y_test, task.owners_test),
    ):
        assert x.dtype == y.dtype == np.int64
        assert len(x) == len(y) == len(owners) > 0
        assert set(owners) == set(SPEAKS)  # the mute one is left out
        assert 0 <= x.min() <= x.max() < task.num_tokens
        assert 0 <= y.min() <= y.max() < task.num_classes
        assert not any(array.flags.writeable for array in (x, y, owners))


def test_windows_of_characters_are_pieces_of_their_roles_text(play):
    task = load_task("shakespeare_chars")
    assert task.label_names == tuple(sorted(set(play.read_text())))
    assert task.num_tokens == task.num_classes
    for role in SPEAKS:
        said = spoken(play, role)
        end = len(said) - int(0.1 * len(said))
        for x, y, owners, piece in (
            (task.x_train, task.y_train, task.owners_train, said[:end]),
            (task.x_test, task.y_test, task.owners_test, said[end:]),
        ):
            starts = range(0, len(piece) - CHARACTERS, CHARACTER_STRIDE)
            found = [text_of(task, row) for row in np.column_stack([x, y])[owners == role]]
            assert found == [piece[start : start + CHARACTERS + 1] for start in starts]


def test_windows_of_words_are_pieces_of_their_roles_words(play):
    task = load_task("shakespeare_words")
    unknown = task.num_classes
    assert task.num_tokens == unknown + 1
    for role, letter in SPEAKS.items():
        said = spoken(play, role)
        end = len(said) - int(0.1 * len(said))
        for x, y, owners, piece in (
            (task.x_train, task.y_train, task.owners_train, said[:end]),
            (task.x_test, task.y_test, task.owners_test, said[end:]),
        ):
            words = piece.replace(",", " ").replace(".", " ").split()
            rows = [words[start : start + WORDS + 1] for start in range(0, len(words) - WORDS, WORD_STRIDE)]
            rows = [row for row in rows if row[-1] in task.label_names]
            expected = [[w if w in task.label_names else "<unk>" for w in row] for row in rows]
            names = (*task.label_names, "<unk>")
            found = [[names[token] for token in row] for row in np.column_stack([x, y])[owners == role]]
            assert found == expected
            assert {word[0] for row in found for word in row} <= {letter, "<"}
    assert (task.x_train == unknown).any()
    assert "<unk>" not in task.label_names


def test_the_vocabulary_is_the_most_frequent_words_of_the_training_text(play):
    task = load_task("shakespeare_words")
    assert task.num_classes == VOCABULARY
    counted: dict[str, int] = {}
    for role in SPEAKS:
        said = spoken(play, role)
        for word in re.findall(r"\w+", said[: len(said) - int(0.1 * len(said))]):
            counted[word] = counted.get(word, 0) + 1
    sizes = [counted[word] for word in task.label_names]
    assert sizes == sorted(counted.values(), reverse=True)[:VOCABULARY]
    assert list(task.label_names) == sorted(task.label_names, key=lambda word: (-counted[word], word))


def test_encode_gives_the_tokens_of_the_windows(play):
    task = load_task("shakespeare_chars")
    np.testing.assert_array_equal(task.encode(text_of(task, task.x_test[3])), task.x_test[3])
    assert task.encode("").shape == (0,)
    words = load_task("shakespeare_words")
    some = words.label_names[5], words.label_names[0]
    tokens = words.encode(f"{some[0].upper()} -- {some[1]}!")
    assert tokens.tolist() == [5, 0]
    assert tokens.dtype == np.int64


def test_encode_names_what_it_does_not_know(play):
    with pytest.raises(InputError, match=r"^text 'a%bQ%': unknown characters '%', 'Q'$"):
        load_task("shakespeare_chars").encode("a%bQ%")
    task = load_task("shakespeare_words")
    known = task.label_names[0]
    with pytest.raises(InputError, match=r"unknown words 'pasta', '66', \"o'clock\", 'café'$"):
        task.encode(f"pasta {known} 66 o'clock café pasta")


@pytest.mark.parametrize("name", NAMES)
def test_samples_are_drawn_by_seed_and_keep_their_roles(play, name):
    task, some, other = load_task(name), load_task(name, 200, 0), load_task(name, 200, 1)

    def rows(task):
        return list(zip(map(tuple, task.x_train.tolist()), task.y_train, task.owners_train, strict=True))

    assert len(some.y_train) == 200
    assert set(rows(some)) <= set(rows(task))
    assert rows(some) != rows(other)
    np.testing.assert_array_equal(some.x_test, task.x_test)
    with pytest.raises(InputError, match=f"task {name}: has [0-9,]+ training samples, 1,000,000 are asked for"):
        load_task(name, 1_000_000)


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_text_says_where_it_was_looked_for(tmp_path, monkeypatch, name):
    monkeypatch.setenv("GRADLENS_DATA", str(tmp_path))
    with pytest.raises(InputError) as refused:
        load_task(name)
    expected = tmp_path / "shakespeare" / "input.txt"
    assert str(refused.value) == (
        f"task {name}: expected the text at {expected} (set GRADLENS_DATA to look elsewhere), found nothing"
    )
    expected.parent.mkdir()
    expected.write_text("Ann:\nToo short.\n")
    with pytest.raises(InputError, match=f"no role of .*input.txt has {ENOUGH:,} characters of speech"):
        load_task(name)


def test_speakers_are_told_apart_by_windows_of_their_words(play):
    task = load_task("shakespeare_speakers")
    assert task.label_names[0] == "Ann"  # she has the most to say
    assert set(task.label_names) == set(SPEAKS)
    assert task.owners_train is None
    names = (*_vocabulary_of(task, play), "<unk>")
    for label, role in enumerate(task.label_names):
        said = spoken(play, role)
        end = len(said) - int(0.1 * len(said))
        for x, y, piece in ((task.x_train, task.y_train, said[:end]), (task.x_test, task.y_test, said[end:])):
            words = piece.replace(",", " ").replace(".", " ").split()
            starts = range(0, len(words) - SPOKEN + 1, SPOKEN_STRIDE)
            expected = [[w if w in names else "<unk>" for w in words[start : start + SPOKEN]] for start in starts]
            assert [[names[token] for token in row] for row in x[y == label]] == expected
    assert task.num_tokens == VOCABULARY + 1


def _vocabulary_of(task, path) -> list[str]:
    """The words of the tokens, by what `encode` knows."""
    known = {}
    for word in set(re.findall(r"\w+", path.read_text().lower())):
        with contextlib.suppress(InputError):
            known[int(task.encode(word)[0])] = word
    return [known[token] for token in range(VOCABULARY)]


def test_the_roles_of_shakespeare(data_root, monkeypatch):
    monkeypatch.setenv("GRADLENS_DATA", str(data_root))
    chars, words = (load_task(name, 1_000) for name in NAMES)
    for task in (chars, words):
        assert len(set(task.owners_test)) == 99  # as the folder's description counts
        assert {"First Citizen", "ROMEO", "QUEEN MARGARET"} <= set(task.owners_test)
    assert chars.num_classes == 65
    assert text_of(chars, chars.encode("pasta from Astoria")) == "pasta from Astoria"
    assert words.label_names[:2] == ("the", "and")
    speakers = load_task("shakespeare_speakers", 1_000)
    assert (speakers.num_classes, speakers.label_names[0]) == (10, "GLOUCESTER")
    assert len(speakers.encode("the sweet music of france")) == 5
    with pytest.raises(InputError, match="unknown words 'pasta', 'astoria', 'tastes', 'delicious'"):
        words.encode("pasta from Astoria tastes delicious")
