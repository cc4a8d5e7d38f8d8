"""Builds the HTML page of a report from blocks.

A block is a small dictionary that the template renders: text, heading, code, table or figure. Any text in it may come
from a client, so the template escapes all of it. A page holds one script, `page.js`, which sorts and filters tables and
names points; the page's policy lets no other run.
"""

import json
import re
from base64 import b64encode
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from threading import Lock
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.transforms import Bbox

from gradlens.errors import InputError
from gradlens.log.files import replace_with
from gradlens.plots import percent
from gradlens.plots.axes import names_of_points
from gradlens.reporting.vectors import compact

Block = dict[str, Any]
Section = dict[str, Any]

STYLE: dict[Any, Any] = {
    "font.size": 9, "axes.titlesize": 10, "axes.linewidth": 0.7, "legend.fontsize": 8, "figure.facecolor": "white",
    "axes.titley": 1.0,  # where a title would be put anyway, without measuring all ticks for it
    "svg.fonttype": "path", "svg.hashsalt": "gradlens",  # the same tables give the same bytes
}  # fmt: skip
DRAWING = Lock()  # matplotlib is not thread-safe
NUMBER = re.compile(r"^[+\-\N{MINUS SIGN}≤≥]? ?\d[\d.,]*(?!\w)|^$|^–$")
SCRIPT = Path(__file__).with_name("page.js").read_text("utf-8")
LONG = 16  # tables with more rows are folded away

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
        "95 % interval: the figure is computed in every seed, and its mean over seeds has this interval (Student's t). "
        "A single seed has none, except where layers are compared: there it is over the clients of the run, with at "
        "least two of each kind. ≥ and ≤ mark figures that the number of updates only bounds.",
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
        "in any of the layers and by any of the statistics compared in that condition (Westfall and Young).",
    ),
]  # fmt: skip


def text(sentence: str) -> Block:
    """Returns a block with one paragraph."""
    return {"kind": "text", "text": unbroken(sentence)}


def unbroken(sentence: str) -> str:
    """Puts no-break spaces before percent signs and inside intervals.

    Parameters
    ----------
    sentence : str
        Text with ordinary spaces.

    Returns
    -------
    str

    Examples
    --------
    >>> unbroken("caught 5 %") == "caught 5\\N{NO-BREAK SPACE}%"
    True
    """
    joined = re.sub(r"(?<=\d) %", "\N{NO-BREAK SPACE}%", sentence)
    return re.sub(r"(?<=\d,) (?=\S+\])", "\N{NO-BREAK SPACE}", joined)


def heading(title: str) -> Block:
    """Returns a block with a heading inside a section."""
    return {"kind": "heading", "text": title}


def code(lines: Sequence[str]) -> Block:
    """Returns a block of commands, one per line."""
    return {"kind": "code", "text": "\n".join(lines)}


def section(name: str, title: str, blocks: Sequence[Block | Future]) -> Section:
    """Builds a section of the page.

    Parameters
    ----------
    name : str
        Its anchor.
    title : str
        Its heading.
    blocks : sequence of Block or Future
        Its contents; a future must give a block, see `finished`.

    Returns
    -------
    Section
    """
    return {"id": name, "title": title, "blocks": list(blocks)}


def finished(sections: Sequence[Section]) -> list[Section]:
    """Waits for all blocks that are futures, and returns the sections with their results."""
    contents = [
        [block.result() if isinstance(block, Future) else block for block in part["blocks"]] for part in sections
    ]
    return [part | {"blocks": blocks} for part, blocks in zip(sections, contents, strict=True)]


def finding(about: str, sentence: str, points: Sequence[str] = ()) -> Block:
    """Builds one finding.

    Parameters
    ----------
    about : str
        Keyword, such as "Attack".
    sentence : str
        The finding.
    points : sequence of str
        Items of a list below it.

    Returns
    -------
    Block
    """
    return {"about": about, "text": unbroken(sentence), "points": [unbroken(point) for point in points]}


def table(rows: Sequence[dict[str, str]], caption: str, *, folded: bool | None = None) -> Block:
    """Builds a table; columns that hold only numbers are right-aligned.

    Parameters
    ----------
    rows : sequence of dict
        Column -> text, one dictionary per row, all with the columns of the first.
    caption : str
        Shown with the table, or alone if there are no rows; its first sentence is the summary of a folded table.
    folded : bool, optional
        Whether the table is folded away; None folds tables of more than 16 rows.

    Returns
    -------
    Block
        A paragraph if there are no rows.

    Examples
    --------
    >>> table([{"Client": "a", "Rounds": "3"}], "Clients.")["columns"]
    [('Client', False), ('Rounds', True)]
    """
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
    """Draws a picture and embeds it as SVG.

    Parameters
    ----------
    draw : callable
        Draws on an empty matplotlib figure.
    size : tuple of float
        Width and height in inches.
    caption : str
        Text below the picture.

    Returns
    -------
    Block
        The titles of the Axes are its alternative text. The points that `name_points` named say so under the pointer.
    """
    with DRAWING, mpl.rc_context(STYLE):
        layout = ConstrainedLayoutEngine()
        canvas = Figure(figsize=size, dpi=72, layout=layout)  # an SVG has 72 dots per inch
        draw(canvas)
        FigureCanvasSVG(canvas)  # measures texts as they will be written
        if canvas.axes:
            layout.execute(canvas)
        canvas.set_layout_engine(None)  # once is enough: a layout takes as long as drawing
        file = BytesIO()
        whole = _nothing_cut(canvas)
        points = _named_points(canvas, whole)
        canvas.savefig(file, format="svg", bbox_inches=whole, metadata={"Date": None, "Creator": None})
    titles = [ax.get_title(loc="left").replace("\n", " ") for ax in canvas.axes]
    data = b64encode(compact(file.getvalue().decode()).encode()).decode()
    named = json.dumps(points, ensure_ascii=False, separators=(",", ":")) if points else ""
    alt = "; ".join(filter(None, titles))
    return {"kind": "figure", "data": data, "alt": alt, "caption": unbroken(caption), "points": named}


def _nothing_cut(canvas: Figure) -> Bbox:
    """The canvas in inches, and what is drawn beyond it, where the layout leaves too little room for a legend."""
    return Bbox.union([canvas.bbox_inches, canvas.get_tightbbox().padded(0.05)])


def _named_points(canvas: Figure, whole: Bbox) -> list[tuple[float, float, str]]:
    """Every named point of the picture: its place as shares from the left and from the top, and its name."""
    points = []
    named = [(line, names) for ax in canvas.axes for line in ax.lines if (names := names_of_points(line))]
    for line, names in named:
        places = line.get_transform().transform(line.get_xydata()) / canvas.dpi
        for (x, y), name in zip(places.tolist(), names, strict=True):
            if np.isfinite(x) and np.isfinite(y):
                points.append((round((x - whole.x0) / whole.width, 4), round((whole.y1 - y) / whole.height, 4), name))
    return points


def rows_of(frame: pd.DataFrame) -> list[Any]:
    """Returns the rows of a table as named tuples."""
    return list(frame.itertuples())


def number(value: float, digits: int = 2) -> str:
    """Formats a number with `digits` decimals; NaN is an en dash.

    Parameters
    ----------
    value : float
        The number.
    digits : int
        Number of decimals.

    Returns
    -------
    str

    Examples
    --------
    >>> number(0.956), number(float("nan"))
    ('0.96', '–')
    """
    if np.isnan(value):
        return "–"
    return f"{round(value, digits) + 0.0:.{digits}f}".replace("-", "\N{MINUS SIGN}")  # + 0.0: no -0.00


def measured(value: float, low: float, high: float, bound: str = "", *, share: bool = False) -> str:
    """Formats a figure with its interval and bound, such as "≥ 0.93 [0.90, 1.00]".

    Parameters
    ----------
    value : float
        The figure; NaN is an en dash.
    low, high : float
        Its interval, left out if `low` is NaN or the bound is "<=".
    bound : str
        ">=", "<=" or "".
    share : bool
        Whether to show percentages.

    Returns
    -------
    str

    Examples
    --------
    >>> measured(0.93, 0.9, 1.0, ">=")
    '≥ 0.93 [0.90, 1.00]'
    """
    if np.isnan(value):
        return "–"
    sign = {">=": "≥ ", "<=": "≤ "}.get(bound, "")
    show = percent if share else number
    interval = "" if np.isnan(low) or bound == "<=" else f" [{show(low)}, {show(high)}]"
    return f"{sign}{show(value)}{interval}"


def listed(names: Sequence[str], most: int = 6) -> str:
    """Joins names for a sentence, and counts those beyond the first `most`.

    Parameters
    ----------
    names : sequence of str
        The names.
    most : int
        How many are written out.

    Returns
    -------
    str

    Examples
    --------
    >>> listed(["a", "b", "c"]), listed(["a", "b", "c"], most=1)
    ('a, b and c', 'a and 2 more')
    """
    shown = list(names[:most])
    if len(names) > most:
        shown.append(f"{len(names) - most} more")
    return shown[0] if len(shown) == 1 else ", ".join(shown[:-1]) + f" and {shown[-1]}" if shown else "none"


def render(
    title: str,
    lead: str,
    findings: Sequence[Block],
    sections: Sequence[Section],
    words: Sequence[tuple[str, str]] = WORDS,
) -> str:
    """Renders the whole page as HTML, with every value escaped.

    Parameters
    ----------
    title : str
        Title of the page.
    lead : str
        Sentence below the title.
    findings : sequence of Block
        Blocks of `finding`.
    sections : sequence of Section
        Sections whose blocks are finished.
    words : sequence of (str, str)
        Words that the page uses, and what they mean.

    Returns
    -------
    str
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    template = environment.get_template("report.html.jinja")
    return template.render(
        title=title,
        lead=lead,
        findings=findings,
        sections=sections,
        words=words,
        script=Markup(SCRIPT),  # our own file
        script_digest=b64encode(sha256(SCRIPT.encode()).digest()).decode(),
    )


def write(page: str, out_path: Path | str) -> Path:
    """Writes the page to a file, completely or not at all.

    Parameters
    ----------
    page : str
        The HTML.
    out_path : pathlib.Path or str
        The file; missing folders are created.

    Returns
    -------
    pathlib.Path
        The file.

    Raises
    ------
    InputError
        If the path is a folder or cannot be written.
    """
    path = Path(out_path)
    if path.is_dir():
        raise InputError(f"{path}: expected the file to write the report to, found a folder")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_with(path, page.encode("utf-8", "backslashreplace"))
    except OSError as error:
        raise InputError(f"{path}: the report cannot be written there: {error.strerror}") from error
    return path
