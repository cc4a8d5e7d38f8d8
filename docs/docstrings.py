"""Makes docstrings fit for reStructuredText before numpydoc reads them."""

import re
from typing import Any

SECTION = re.compile(r"^(Parameters|Attributes|Returns|Yields|Raises|Notes|References|Examples)\n-{3,}$", re.MULTILINE)
CODE = r"``.+?``|:\w+:`[^`]+`|`[^`]+`_*"
SPAN = re.compile(rf"({CODE})")
MARKUP = re.compile(rf"({CODE}|\*\*[^*\n]+\*\*|(?<!\*)\*\w[\w -]*\*(?![\w*]))")  # and bold, and emphasis


def prepared(app: Any, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """Escapes what a docstring does not mean as markup: everything in plain text, stray characters in numpydoc."""
    text = "\n".join(lines)
    if not SECTION.search(text):
        lines[:] = plain(text).split("\n")
        return
    block = None  # indentation of the directive or literal block that a line may belong to
    for position, line in enumerate(lines):
        indentation = len(line) - len(line.lstrip())
        if block is not None and line.strip() and indentation <= block:
            block = None
        if block is None and line.lstrip().startswith((">>>", "...")):
            continue
        opens = line.rstrip().endswith("::") or line.lstrip().startswith(".. ")
        if block is None and not opens:
            lines[position] = without_strays(line)
        if opens and block is None:
            block = indentation


def plain(text: str) -> str:
    """Plain text as reStructuredText: names in backticks are code, nothing else is markup."""
    text = re.sub(r"^[ ]*([-+*] |\d+\. )?", lambda start: f"\\{start[1]}" if start[1] else "", text, flags=re.MULTILINE)
    parts = SPAN.split(text)
    escaped = [re.sub(r"([*|_])", r"\\\1", part) for part in parts[::2]]
    escaped[1:] = [separated(part) for part in escaped[1:]]
    code = [f"``{part.strip('`')}``" for part in parts[1::2]]
    return "".join(piece for pair in zip(escaped, [*code, ""], strict=True) for piece in pair)


def without_strays(line: str) -> str:
    """A line of numpydoc with bars, single asterisks and trailing underscores escaped outside code and bold text."""
    parts = MARKUP.split(line)
    first, *others = (re.sub(r"\||\*(?=\S)|(?<=\w)_(?!\w)", r"\\\g<0>", part) for part in parts[::2])
    parts[::2] = [first, *map(separated, others)]
    return "".join(parts)


def separated(text: str) -> str:
    """Text that follows code or bold text; a letter right after it, as in `keep`s, needs a mark."""
    return re.sub(r"^(?=\w)", r"\\ ", text)
