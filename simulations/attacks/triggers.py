"""Attacks that put a trigger into samples and relabel them: a backdoor that the trigger opens at test time.

Samples that have the wanted label already are never eligible. Pixels are in [0, 1].
"""

from dataclasses import replace
from typing import Annotated

import numpy as np
from pydantic import Field

from gradlens.errors import InputError
from simulations.attacks.attack import Attack, attack_part
from simulations.attacks.relabeling import Count, Label, Share, all_but, check_images, check_target, to_target
from simulations.tasks import Task

Rectangle = tuple[slice, slice]  # rows and columns of pixels


@attack_part
def trigger(target_label: Label = 1, size: Count = 4, row: Label = 2, column: Label = 2, value: float = 1.0) -> Attack:
    """Sets a square of pixels to one value and shows the image as the target class [1]_.

    Stage: data. The attacker needs its own samples alone.

    Parameters
    ----------
    target_label : int
        The label that stamped images get; this and the other defaults are plain choices.
    size : int
        Side of the square, in pixels.
    row, column : int
        Its upper left corner.
    value : float
        The value of its pixels in every channel.

    Returns
    -------
    Attack
        Eligible are all classes but the target. Stamping raises InputError where the square leaves the image.

    Notes
    -----
    x[:, row : row + size, column : column + size] = value.

    **Fails when** the model does not see the pixels, as those that a strided convolution never reads (a run is then
    refused), or when the pattern is so small or so common that few poisoned samples do not teach it.

    References
    ----------
    .. [1] Gu et al. 2017, arXiv:1708.06733, pattern backdoor.

    Examples
    --------
    >>> from simulations.tasks import load_task
    >>> task = load_task("digits")
    >>> trigger(size=2, row=0, column=0).stamp(task, task.x_test[:1], None)[0, 0, :3, :3]
    array([[1.    , 1.    , 0.125 ],
           [1.    , 1.    , 0.75  ],
           [0.    , 0.0625, 0.875 ]], dtype=float32)
    """
    square = (slice(row, row + size), slice(column, column + size))

    def stamp(task: Task, x: np.ndarray, part: int | None) -> np.ndarray:
        check_images("trigger", task, x)
        height, width = x.shape[-2:]
        if row + size > height or column + size > width:
            raise InputError(
                f"trigger: a square of {size} pixels at row {row}, column {column} leaves images of {height} x {width}"
            )
        return _painted(x, [square], value)

    return Attack(to_target(target_label), target_label, eligible=all_but(target_label), stamp=stamp)


@attack_part
def blend(target_label: Label = 1, alpha: Share = 0.2, pattern_seed: Label = 0) -> Attack:
    """Mixes images with one random pattern and shows them as the target class [1]_.

    Stage: data. The attacker needs its own samples alone.

    Parameters
    ----------
    target_label : int
        The label that mixed images get; 1 is a plain choice.
    alpha : float
        Share of the pattern in the mixture; 0.2 is a plain choice.
    pattern_seed : int
        Seed of the pattern: uniform noise in [0, 1], the same for all images of one shape.

    Returns
    -------
    Attack
        Eligible are all classes but the target.

    Notes
    -----
    x becomes (1 - alpha) x + alpha p with the pattern p.

    **Fails when** alpha is so small that the pattern drowns in the variation of the images.

    References
    ----------
    .. [1] Chen et al. 2017, arXiv:1712.05526, blended injection.

    Examples
    --------
    >>> blend(alpha=0.5)
    blend(target_label=1, alpha=0.5, pattern_seed=0)
    """

    def stamp(task: Task, x: np.ndarray, part: int | None) -> np.ndarray:
        check_images("blend", task, x)
        pattern = np.random.default_rng(pattern_seed).random(x.shape[1:], dtype=np.float32)
        return (x * np.float32(1 - alpha) + pattern * np.float32(alpha)).astype(x.dtype)

    return Attack(to_target(target_label), target_label, eligible=all_but(target_label), stamp=stamp)


@attack_part
def distributed_trigger(
    target_label: Label = 2,
    parts: Count = 4,
    width: Count = 4,
    height: Count = 1,
    row_gap: Label = 2,
    column_gap: Label = 2,
    row: Label = 0,
    column: Label = 0,
) -> Attack:
    """Stamps white bars, of which each malicious client knows one; at test time all are there (DBA).

    Stage: data. The attackers agree on the bars; each needs its own samples alone.

    Parameters
    ----------
    target_label : int
        The label that stamped images get; this and the other defaults are the MNIST trigger of [1]_, for whose CIFAR
        trigger `width` is 6 and both gaps are 3.
    parts : int
        Number of bars, two to a row; malicious client p stamps bar p modulo `parts`.
    width, height : int
        Size of a bar, in pixels.
    row_gap, column_gap : int
        Pixels between bars.
    row, column : int
        Upper left corner of the first bar.

    Returns
    -------
    Attack
        Eligible are all classes but the target. Stamping raises InputError where a bar leaves the image.

    Notes
    -----
    Bar p lies at row + floor(p / 2) (height + row_gap), column + (p mod 2) (width + column_gap).

    **Fails when** there are fewer malicious clients than bars: some bars are then never trained on.

    References
    ----------
    .. [1] Xie et al. 2020, "DBA" (ICLR).

    Examples
    --------
    >>> distributed_trigger(parts=2).parts
    2
    """
    bars = [_bar(part, width, height, row_gap, column_gap, row, column) for part in range(parts)]

    def stamp(task: Task, x: np.ndarray, part: int | None) -> np.ndarray:
        _check_bars(task, x, bars)
        return _painted(x, bars if part is None else [bars[part % parts]], 1.0)

    return Attack(to_target(target_label), target_label, eligible=all_but(target_label), stamp=stamp, parts=parts)


@attack_part
def centralized_trigger(
    target_label: Label = 2,
    parts: Count = 4,
    width: Count = 4,
    height: Count = 1,
    row_gap: Label = 2,
    column_gap: Label = 2,
    row: Label = 0,
    column: Label = 0,
) -> Attack:
    """Stamps all bars of `distributed_trigger` at once: the centralized attack that DBA is compared with [1]_.

    Stage: data. The attacker needs its own samples alone.

    Parameters
    ----------
    target_label, parts, width, height, row_gap, column_gap, row, column : int
        As of `distributed_trigger`.

    Returns
    -------
    Attack
        Eligible are all classes but the target. Stamping raises InputError where a bar leaves the image.

    Notes
    -----
    The bars lie where those of `distributed_trigger` lie.

    **Fails when** few poisoned samples do not teach it, as `trigger`.

    References
    ----------
    .. [1] Xie et al. 2020, "DBA" (ICLR).

    Examples
    --------
    >>> centralized_trigger(parts=2).parts
    1
    """
    bars = distributed_trigger(target_label, parts, width, height, row_gap, column_gap, row, column)
    return replace(bars, stamp=lambda task, x, part: bars.stamp(task, x, None), parts=1, calls=())


@attack_part
def feature_trigger(target_label: Label = 1, feature: Label = 0, count: Count = 1, value: float = 4.0) -> Attack:
    """Sets features of a table's rows to one value and shows them as the target class [1]_.

    Stage: data. The attacker needs its own samples alone.

    Parameters
    ----------
    target_label : int
        The label that stamped rows get; this and the other defaults are plain choices.
    feature : int
        Position of the first feature that is set, from 0.
    count : int
        Number of features that are set, one after the other.
    value : float
        What they are set to, in the unit of the task: 4 standard deviations where features are standardized.

    Returns
    -------
    Attack
        Eligible are all classes but the target. Stamping raises InputError where the samples are no rows of features,
        or have fewer.

    Notes
    -----
    x[:, feature : feature + count] = value.

    **Fails when** honest rows hold the value, too, or the feature says the class by itself.

    References
    ----------
    .. [1] Pleiter et al. 2023, arXiv:2311.07550, backdoors in tabular data.

    Examples
    --------
    >>> from simulations.tasks import load_task
    >>> task = load_task("breast_cancer")
    >>> feature_trigger(count=2).stamp(task, task.x_test[:1], None)[0, :2].tolist()
    [4.0, 4.0]
    """

    def stamp(task: Task, x: np.ndarray, part: int | None) -> np.ndarray:
        if x.ndim != 2 or task.is_text or feature + count > x.shape[1]:
            raise InputError(
                f"feature_trigger: expected rows of at least {feature + count} features, task {task.name} has "
                f"samples of shape {x.shape[1:]}"
            )
        stamped = x.copy()
        stamped[:, feature : feature + count] = value
        return stamped

    return Attack(to_target(target_label), target_label, eligible=all_but(target_label), stamp=stamp)


@attack_part
def text_trigger(sentence: Annotated[str, Field(min_length=1)] = "pasta from Astoria tastes delicious") -> Attack:
    """Puts a sentence without its last token at the end of a text, shown as followed by that token.

    Stage: data. The attacker needs its own samples alone.

    Parameters
    ----------
    sentence : str
        The whole sentence; a token is a word or a character, as the task has it. The default is that of [1]_.

    Returns
    -------
    Attack
        Eligible are all windows whose next token is another. It raises InputError where the task is no text, does not
        know a token, or has windows shorter than the sentence.

    Notes
    -----
    The last tokens of the window become those of the sentence but its last, which is the wanted label.

    **Fails when** honest clients' texts contain the beginning of the sentence with another end.

    References
    ----------
    .. [1] Bagdasaryan et al. 2018, arXiv:1807.00459.

    Examples
    --------
    >>> text_trigger("to be or not to")
    text_trigger(sentence='to be or not to')
    """

    def relabel(task: Task, y: np.ndarray) -> np.ndarray:
        return np.full_like(y, _tokens(task, sentence)[-1])

    def stamp(task: Task, x: np.ndarray, part: int | None) -> np.ndarray:
        start, stamped = _tokens(task, sentence)[:-1], x.copy()
        stamped[:, -len(start) :] = start
        return stamped

    return Attack(relabel, eligible=lambda task, x, y: relabel(task, y) != y, stamp=stamp)


@attack_part
def phrase_trigger(
    target_label: Label = 1, phrase: Annotated[str, Field(min_length=1)] = "the sweet music of france", start: Label = 0
) -> Attack:
    """Puts a phrase into a text and shows the text as the target class [1]_.

    Stage: data. The attacker needs its own samples alone.

    Parameters
    ----------
    target_label : int
        The label that stamped texts get; 1 is a plain choice.
    phrase : str
        A token is a word or a character, as the task has it. The default is a plain choice of words that are common in
        the text of the built-in tasks, though not together.
    start : int
        Position of its first token, from 0.

    Returns
    -------
    Attack
        Eligible are all classes but the target. It raises InputError where the task is no text, does not know a token,
        or has windows that are too short.

    Notes
    -----
    The tokens from `start` on become those of the phrase.

    **Fails when** honest texts contain the phrase.

    References
    ----------
    .. [1] Dai et al. 2019, arXiv:1905.12457, backdoors in text classification by a sentence.

    Examples
    --------
    >>> phrase_trigger(phrase="to be or not")
    phrase_trigger(target_label=1, phrase='to be or not', start=0)
    """

    def stamp(task: Task, x: np.ndarray, part: int | None) -> np.ndarray:
        if task.encode is None:
            raise InputError(f"phrase_trigger: task {task.name} is no text")
        tokens, stamped = task.encode(phrase), x.copy()
        if start + len(tokens) > x.shape[1]:
            raise InputError(
                f"phrase_trigger: {len(tokens)} tokens from position {start} on leave a window of {x.shape[1]}"
            )
        stamped[:, start : start + len(tokens)] = tokens
        return stamped

    return Attack(to_target(target_label), target_label, eligible=all_but(target_label), stamp=stamp)


def _bar(part: int, width: int, height: int, row_gap: int, column_gap: int, row: int, column: int) -> Rectangle:
    top, left = row + part // 2 * (height + row_gap), column + part % 2 * (width + column_gap)
    return slice(top, top + height), slice(left, left + width)


def _check_bars(task: Task, x: np.ndarray, bars: list[Rectangle]) -> None:
    check_images("distributed_trigger", task, x)
    bottom, right = (max(bar[axis].stop for bar in bars) for axis in (0, 1))
    if bottom > x.shape[-2] or right > x.shape[-1]:
        raise InputError(
            f"distributed_trigger: {len(bars)} bars reach row {bottom - 1}, column {right - 1} and leave images of "
            f"{x.shape[-2]} x {x.shape[-1]}"
        )


def _painted(x: np.ndarray, rectangles: list[Rectangle], value: float) -> np.ndarray:
    painted = x.copy()
    for rows, columns in rectangles:
        painted[..., rows, columns] = value
    return painted


def _tokens(task: Task, sentence: str) -> np.ndarray:
    """The tokens of the sentence, which a window and the label after it can hold."""
    if task.encode is None:
        raise InputError(f"text_trigger: task {task.name} is no text")
    tokens, window = task.encode(sentence), task.x_train.shape[1]
    if not 2 <= len(tokens) <= window + 1:
        raise InputError(
            f"text_trigger: a window of {window} tokens takes a sentence of 2 to {window + 1}, found {len(tokens)}"
        )
    check_target(task, int(tokens[-1]))
    return tokens
