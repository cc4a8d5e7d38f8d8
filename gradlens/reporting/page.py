"""The parts that a report's page is made of, and the page itself.

A block is a small dictionary that the template knows: text, heading, code, table or figure. Every text in
it may come from a client: the template escapes all of it.
"""

import re
from base64 import b64encode
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from io import BytesIO
from pathlib import Path
from threading import Lock
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.figure import Figure

from gradlens.errors import InputError
from gradlens.log.files import replace_with
from gradlens.plots import percent

Block = dict[str, Any]
Section = dict[str, Any]

STYLE: dict[Any, Any] = {
    "font.size": 9, "axes.titlesize": 10, "axes.linewidth": 0.7, "legend.fontsize": 8, "figure.facecolor": "white",
    "svg.fonttype": "path", "svg.hashsalt": "gradlens",  # the same tables give the same bytes
}  # fmt: skip
DRAWING = Lock()  # matplotlib is not made for threads
NUMBER = re.compile(r"^[+\-\N{MINUS SIGN}≤≥]? ?\d[\d.,]*(?!\w)|^$|^–$")
LONG = 16  # rows from which a table is folded away

WORDS = [
    (
        "Client, update",
        "A participant, and what it sent in one round: its locally trained model minus the global model.",
    ),
    (
        "Attack-free control",
        "The same simulation with the same seed, in which nobody attacks. Whatever it shows is no attack.",
    ),
    (
        "ASR, attack success rate",
        "Share of held-out samples that the attack is meant to change and that get the attacker's label. On a control "
        "the same attack is measured on a model that nobody attacked: what success chance alone gives.",
    ),
    ("Main accuracy", "Share of untouched held-out samples that the global model labels correctly."),
    (
        "Statistic, score, flag",
        "A statistic is a number taken from each update, such as the norm of a layer. A detector turns one into a "
        "score per client and round, higher = more suspicious, and flags the scores above its threshold.",
    ),
    (
        "AUC",
        "Chance that a malicious update scores higher than a benign one: 1 separates perfectly, 0.5 is a coin toss. "
        "It needs no threshold.",
    ),
    (
        "TPR, FPR",
        "True- and false-positive rate: share of malicious, and of benign, updates that are flagged. "
        "TPR at 5 % FPR is the most that can be caught while at most 5 % of the benign updates are flagged.",
    ),
    (
        "Null",
        "What a threshold was set on: scores taken to be benign. A false-positive rate is worth what its null is.",
    ),
    (
        "[low, high]",
        "95 % interval: the figure is computed in every seed and the seeds are resampled (bootstrap). "
        "A single seed has none. Where layers are compared the rounds of each run are resampled, too; for a single run "
        "they alone. ≥ and ≤ mark figures that the number of updates only bounds.",
    ),
    (
        "Effect",
        "How far, where the AUC says how often: the median of how unusual malicious updates are minus that of benign "
        "ones, in robust standard deviations of the cohort. Farthest benign: the same of the benign client of the "
        "control that moves that layer most, as one with unusual labels does.",
    ),
    (
        "p",
        "Chance of an AUC this high if it made no difference which clients are malicious, by permuting them, "
        "corrected (Holm) over the layers and statistics compared in that condition.",
    ),
]  # fmt: skip


def text(sentence: str) -> Block:
    """A paragraph."""
    return {"kind": "text", "text": unbroken(sentence)}


def unbroken(sentence: str) -> str:
    """The sentence with numbers and their per cent signs, and intervals, held together."""
    joined = re.sub(r"(?<=\d) %", "\N{NO-BREAK SPACE}%", sentence)
    return re.sub(r"(?<=\d,) (?=\S+\])", "\N{NO-BREAK SPACE}", joined)


def heading(title: str) -> Block:
    """A heading inside a section."""
    return {"kind": "heading", "text": title}


def code(lines: Sequence[str]) -> Block:
    """Commands, a line each."""
    return {"kind": "code", "text": "\n".join(lines)}


def section(name: str, title: str, blocks: Sequence[Block | Future]) -> Section:
    """A section of the page; `name` is its anchor; blocks may still be in the making."""
    return {"id": name, "title": title, "blocks": list(blocks)}


def finished(sections: Sequence[Section]) -> list[Section]:
    """The sections once all of their blocks are made."""
    made = [[b.result() if isinstance(b, Future) else b for b in each["blocks"]] for each in sections]
    return [each | {"blocks": blocks} for each, blocks in zip(sections, made, strict=True)]


def finding(about: str, sentence: str, points: Sequence[str] = ()) -> Block:
    """One finding: a word on what it is about, a sentence, and perhaps a list."""
    return {"about": about, "text": unbroken(sentence), "points": [unbroken(point) for point in points]}


def table(rows: Sequence[dict[str, str]], caption: str, *, folded: bool | None = None) -> Block:
    """A table of texts, a dictionary per row; columns of numbers are set right, long tables folded away."""
    if not rows:
        return text(f"{caption} Nothing to show.")
    columns = [(name, all(NUMBER.match(row[name]) for row in rows)) for name in rows[0]]
    collapsed = len(rows) > LONG if folded is None else folded
    return {
        "kind": "table",
        "caption": caption,
        "summary": f"{caption.partition('. ')[0].rstrip('.')} ({len(rows)} rows)",
        "columns": columns,
        "rows": [list(row.values()) for row in rows],
        "collapsed": collapsed,
    }


def figure(draw: Callable[[Figure], None], size: tuple[float, float], caption: str) -> Block:
    """A picture, embedded as SVG; size: width and height in inches. Its titles are what a screen reader says."""
    with DRAWING, mpl.rc_context(STYLE):
        canvas = Figure(figsize=size, layout="constrained")
        draw(canvas)
        file = BytesIO()
        canvas.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    titles = [ax.get_title(loc="left").replace("\n", " ") for ax in canvas.axes]
    data = b64encode(file.getvalue()).decode()
    return {"kind": "figure", "data": data, "alt": "; ".join(filter(None, titles)), "caption": unbroken(caption)}


def rows_of(frame: pd.DataFrame) -> list[Any]:
    """The rows of a table as named tuples."""
    return list(frame.itertuples())


def number(value: float, digits: int = 2) -> str:
    """A number with so many digits, an en dash for none."""
    if np.isnan(value):
        return "–"
    return f"{round(value, digits) + 0.0:.{digits}f}".replace("-", "\N{MINUS SIGN}")  # + 0.0: no -0.00


def measured(value: float, low: float, high: float, bound: str = "", *, share: bool = False) -> str:
    """A figure with its interval and bound, "≥ 0.93 [0.90, 1.00]"; share: in per cent."""
    if np.isnan(value):
        return "–"
    sign = {">=": "≥ ", "<=": "≤ "}.get(bound, "")
    show = percent if share else number
    interval = "" if np.isnan(low) or bound == "<=" else f" [{show(low)}, {show(high)}]"
    return f"{sign}{show(value)}{interval}"


def listed(names: Sequence[str], most: int = 6) -> str:
    """Names in a sentence, the rest of a long list counted."""
    shown = list(names[:most])
    if len(names) > most:
        shown.append(f"{len(names) - most} more")
    return shown[0] if len(shown) == 1 else ", ".join(shown[:-1]) + f" and {shown[-1]}" if shown else "none"


def render(title: str, lead: str, findings: Sequence[Block], sections: Sequence[Section]) -> str:
    """The whole page as HTML; every value is escaped."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    template = environment.get_template("report.html.jinja")
    return template.render(title=title, lead=lead, findings=findings, sections=sections, words=WORDS)


def write(page: str, out_path: Path | str) -> Path:
    """Writes the page whole or not at all; raises InputError where the path cannot be a file."""
    path = Path(out_path)
    if path.is_dir():
        raise InputError(f"{path}: expected the file to write the report to, found a folder")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_with(path, page.encode("utf-8", "backslashreplace"))
    except OSError as error:
        raise InputError(f"{path}: the report cannot be written there: {error.strerror}") from error
    return path
