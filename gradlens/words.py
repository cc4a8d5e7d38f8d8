"""Names, numbers and conditions in words."""

import math
import re
from collections.abc import Collection, Mapping, Sequence
from numbers import Real
from typing import Any

SHORT = {
    "attack": "{}", "schedule": "{}", "partition": "{}", "task": "{}", "num_malicious": "{} malicious",
    "num_clients": "{} clients", "learning_rate": "lr {}", "poison_rate": "poison rate {}",
    "detector": "filter {}", "aggregator": "aggregator {}",
}  # fmt: skip


def plain(name: Any, most: int = 24) -> str:
    """A name from outside, safe to draw: printable ASCII, other characters as escapes, the middle of long ones cut.

    Parameters
    ----------
    name : Any
    most : int, default 24
        Number of characters from which it is cut.

    Examples
    --------
    >>> plain("client-\\u2028")
    'client-\\\\u2028'
    """
    text = str(name).encode("ascii", "backslashreplace").decode()
    text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
    return text if len(text) <= most else f"{text[: most // 2]}...{text[-(most // 2 - 3) :]}"


USUAL = {"filter": "drop", "schedule": "every_round"}  # what a scenario does where nothing else is set


def conditions(settings: Sequence[Mapping[Any, Any]]) -> list[str]:
    """A short line per condition, "trigger, 2 malicious, lr 0.1", of its varied settings; unset ones are left out.

    Parameters
    ----------
    settings : sequence of Mapping
        For each condition, the name and value of every varied setting. The settings of a component, as in
        "trigger(size=3)", are left out where its name alone tells it apart.

    Examples
    --------
    >>> conditions([{"attack": "trigger(size=3)", "num_malicious": 2}, {"attack": "none", "num_malicious": 0}])
    ['trigger, 2 malicious', '0 malicious']
    """
    names = list(dict.fromkeys(name for row in settings for name in row))
    columns = {name: _short_values([row.get(name) for row in settings]) for name in names}
    texts = [[phrase(name, columns[name][i]) for name in names] for i in range(len(settings))]
    return [", ".join(filter(None, row)) or "all runs" for row in texts]


def phrase(name: Any, value: Any) -> str:
    """One setting in words; "" for one that is not set.

    Parameters
    ----------
    name : Any
        The setting's name.
    value : Any
        Its value.

    Examples
    --------
    >>> phrase("learning_rate", 0.1), phrase("aggregator", None)
    ('lr 0.1', '')
    """
    if value is None or value in ("", "none", USUAL.get(str(name))) or (isinstance(value, float) and math.isnan(value)):
        return ""
    text = f"{value:g}" if isinstance(value, Real) else plain(value, 60)
    return SHORT.get(str(name), f"{plain(name)} {{}}").format(text)


def _short_values(values: Sequence[Any]) -> list[Any]:
    bare = [re.sub(r"\([^()]*\)", "", value) if isinstance(value, str) else value for value in values]
    return bare if len(set(map(str, bare))) == len(set(map(str, values))) else list(values)


LISTED = 5  # names that a message lists


def several(names: Collection[Any]) -> str:
    """Lists the first names, and how many more there are.

    Parameters
    ----------
    names : collection of str or int

    Examples
    --------
    >>> several(["fc1.weight", "fc1.bias"]), several(range(9))
    ("'fc1.weight', 'fc1.bias'", '0, 1, 2, 3, 4 and 4 more')
    """
    listed = ", ".join(f"{name!r:.80}" if isinstance(name, str) else str(name) for name in list(names)[:LISTED])
    return listed + (f" and {len(names) - LISTED} more" if len(names) > LISTED else "")


def count(number: int, what: str) -> str:
    """A number of things, with an s where there is not just one.

    Parameters
    ----------
    number : int
    what : str
        One of them.

    Examples
    --------
    >>> count(1, "seed"), count(3, "seed")
    ('1 seed', '3 seeds')
    """
    return f"{number} {what}" + ("s" if number != 1 else "")


def percent(share: float) -> str:
    """A share as a percentage with the digits that matter.

    Parameters
    ----------
    share : float
        From 0 to 1.

    Examples
    --------
    >>> percent(0.004).replace("\N{NO-BREAK SPACE}", " "), percent(0.12).replace("\N{NO-BREAK SPACE}", " ")
    ('0.4 %', '12 %')
    """
    value = round(100 * share, 1)
    digits = 0 if value >= 10 or value == round(value) else 1
    return f"{value:.{digits}f}\N{NO-BREAK SPACE}%"


def with_interval(value: float, low: float, high: float) -> str:
    """A figure with its interval, or without one where there is a single seed.

    Parameters
    ----------
    value : float
    low, high : float
        Ends of the interval; NaN where there is none.

    Examples
    --------
    >>> with_interval(0.97, 0.93, 1.0).replace("\N{NO-BREAK SPACE}", " "), with_interval(0.97, math.nan, math.nan)
    ('0.97 [0.93, 1.00]', '0.97')
    """
    return f"{value:.2f}" if math.isnan(low) else f"{value:.2f} [{low:.2f},\N{NO-BREAK SPACE}{high:.2f}]"
