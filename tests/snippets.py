"""Runs what a page shows: files it names, Python, and commands, in the order of the page."""

import contextlib
import io
import re
import shlex
import sys
from pathlib import Path
from typing import Any, NamedTuple

FENCE = re.compile(r"^```([\w+-]*)\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)
FILE = re.compile(r"# ([\w./-]+\.(?:py|toml|csv))\n")
ONE_PROCESS = ("simulate", "report")  # commands that take --workers


class Block(NamedTuple):
    """A fenced block of a page."""

    language: str
    code: str

    @property
    def file(self) -> str:
        """The name of the file that the block is, by its first line; empty if it is none."""
        named = FILE.match(self.code)
        return named[1] if named else ""


def blocks(page: Path | str, language: str | None = None) -> list[Block]:
    """The fenced blocks of a page (a file, or its text), of one language or of all."""
    text = page.read_text(encoding="utf-8") if isinstance(page, Path) else page
    found = [Block(*match) for match in FENCE.findall(text)]
    return [block for block in found if language in (None, block.language)]


def run_page(page: Path, folder: Path) -> dict[str, Any]:
    """Runs a page in a folder, which is the current one; the names that its Python code left."""
    names: dict[str, Any] = {"__name__": page.stem}
    for block in blocks(page):
        if block.file:
            (folder / block.file).write_text(block.code, encoding="utf-8")
        elif block.language == "python":
            exec(compile(block.code, str(page), "exec"), names)
        elif block.language == "bash":
            for line in block.code.splitlines():
                run_command(line)
    return names


def run_command(line: str) -> None:
    """Runs one line of a shell block, a call of gradlens; raises AssertionError unless it succeeds."""
    from gradlens.cli import main

    words = shlex.split(line, comments=True)
    if not words:
        return
    assert words[0] == "gradlens", f"only gradlens is run here, found {line!r}"
    words, target = (words[: words.index(">")], words[-1]) if ">" in words else (words, "")
    before, out, status = sys.argv, io.StringIO(), None
    sys.argv = [*words, *(["--workers", "1"] if words[1] in ONE_PROCESS else [])]
    try:
        with contextlib.redirect_stdout(out):
            main()
    except SystemExit as ended:
        status = ended.code
    finally:
        sys.argv = before
    assert status == 0, f"{line!r} ended with status {status}: {out.getvalue()}"
    if target:
        Path(target).write_text(out.getvalue(), encoding="utf-8")
