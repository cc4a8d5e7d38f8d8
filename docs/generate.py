"""Writes the reference pages from what the code says of itself: docstrings, tables, commands, settings.

`everything` is called by conf.py at each build; nothing that it writes is committed.
"""

import ast
import inspect
import shutil
import sys
import tomllib
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from docstrings import plain

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import gradlens  # noqa: E402
import simulations  # noqa: E402

REPOSITORY = "https://github.com/gradlens/gradlens/blob/main"
SETTING = ["setting", "type", "default", "meaning"]
REPORTS = ("*.html", "*.csv", "*.png")


class Kind(NamedTuple):
    """A table of the library whose entries get a page each."""

    title: str
    where: str  # how an entry is reached in Python
    table: Mapping[str, Callable[..., Any]]
    lead: str


KINDS = {
    "statistics": Kind(
        "Statistics",
        "gradlens.STATISTICS",
        gradlens.STATISTICS,
        "A statistic measures something about each client's update of the last round, in the light of the rounds "
        "before it. It returns a table with a row per client and a column per feature, and raises `CannotSay` where it "
        "has no answer.",
    ),
    "scorers": Kind(
        "Scorers",
        "gradlens.SCORERS",
        gradlens.SCORERS,
        "A scorer turns a statistic's table into one score per client. A higher score is more suspicious.",
    ),
    "detectors": Kind(
        "Detectors",
        "gradlens.DETECTORS",
        gradlens.DETECTORS,
        "A detector gives a verdict on every client of the last round: a score, a flag, and the evidence for them. "
        "Each entry is a builder that works without arguments; `gradlens.score_by` makes one of any statistic and "
        "any scorer.",
    ),
    "aggregators": Kind(
        "Aggregation rules",
        "gradlens.AGGREGATORS",
        gradlens.AGGREGATORS,
        "An aggregation rule turns the updates of the last round into one. `gradlens.filtered` puts a detector in "
        "front of any of them.",
    ),
    "attacks": Kind(
        "Attacks",
        "simulations.ATTACKS",
        simulations.ATTACKS,
        "An attack is made of parts that poison data, change local training, or change what is sent. Parts compose: a "
        "scenario may name several of them.",
    ),
    "partitions": Kind(
        "Partitions",
        "simulations.PARTITIONS",
        simulations.PARTITIONS,
        "A partition decides which client holds which training samples.",
    ),
    "schedules": Kind(
        "Schedules",
        "simulations.SCHEDULES",
        simulations.SCHEDULES,
        "A schedule decides which malicious client attacks in which round.",
    ),
}
API = {
    "gradlens": "Recordings, analysis, reports.",
    "gradlens.plots": "Figures from tidy tables.",
    "gradlens.evaluation": "How well scores tell malicious clients from benign ones.",
    "gradlens.case": "From a recording to a case: who can be accused, and how sure that is.",
    "gradlens.mitigation": "What can be done about a backdoor after training.",
    "gradlens.integrations.flower": "Flower, the message API.",
    "gradlens.integrations.flower_classic": "Flower, the classic strategies.",
    "gradlens.integrations.nvflare": "NVFlare.",
    "gradlens.integrations.pfl": "pfl-research.",
    "gradlens.integrations.byzfl": "ByzFL.",
    "gradlens.examples": "A made-up log to try things on.",
    "simulations": "Scenarios, sweeps, simulated runs.",
}


def version() -> str:
    """The version that is being documented."""
    with open(ROOT / "pyproject.toml", "rb") as file:
        return tomllib.load(file)["project"]["version"]


def everything(folder: Path, extra: Path) -> None:
    """Writes all generated pages into `folder`, and copies the committed reports below `extra`."""
    pages = {f"{kind}/index.rst": kind_index(kind) for kind in KINDS}
    for kind in KINDS:
        pages |= {f"{kind}/{name}.rst": entry_page(kind, name) for name in KINDS[kind].table}
    pages |= api_pages()
    pages |= {"commands.rst": commands_page(), "scenario.rst": scenario_page()}
    for path in sorted(folder.rglob("*.rst")):
        if str(path.relative_to(folder)) not in pages:
            path.unlink()
    for name, text in pages.items():
        write(folder / name, text)
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        text = path.read_text(encoding="utf-8").replace("](../docs/", "](../")
        write(folder / path.name.partition("_")[2], text)
    for pattern in REPORTS:
        for path in (ROOT / "reports").glob(pattern):
            (extra / "reports").mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, extra / "reports" / path.name)


def write(path: Path, text: str) -> None:
    """Writes a page, unless it says already what it should: Sphinx reads again only what changed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")


def kind_index(kind: str) -> str:
    """The page that lists the entries of a table with what each is in a sentence."""
    found = KINDS[kind]
    rows = [[f":doc:`{name} <{name}>`", plain(summary(entry))] for name, entry in found.table.items()]
    names = "\n".join(f"   {name}" for name in found.table)
    return (
        f"{heading(found.title)}{plain(found.lead)}\n\n{table(['name', 'in a sentence'], rows)}\n"
        f".. toctree::\n   :hidden:\n\n{names}\n"
    )


def entry_page(kind: str, name: str) -> str:
    """The page of one entry: how to reach it, its signature and its docstring."""
    found = KINDS[kind]
    entry = found.table[name]
    page = f'{heading(name)}``{found.where}["{name}"]``, or ``{name}`` in a scenario or on the command line.\n\n'
    if kind in ("statistics", "scorers"):
        page = f'{heading(name)}``{found.where}["{name}"]``\n\n'
    return page + (scored_by(entry) if isinstance(entry, partial) else documented(entry))


def scored_by(entry: partial) -> str:
    """A detector that is a statistic by a scorer: links to both, and the threshold."""
    statistic, scorer, threshold = parts_of(entry)
    measured, scored = f":doc:`{statistic} <../statistics/{statistic}>`", f":doc:`{scorer} <../scorers/{scorer}>`"
    return (
        f"The statistic {measured}, scored by {scored}; a client is flagged above the threshold {threshold:g}, in the "
        "scorer's units.\n\n"
        f'.. code-block:: python\n\n   gradlens.score_by(STATISTICS["{statistic}"], SCORERS["{scorer}"], '
        f"threshold={threshold:g})\n\n"
        "The formula, the source, when it abstains and when it fails are those of the statistic. The threshold is a "
        "textbook's until ``gradlens.calibrate`` sets one for a stated false-positive rate.\n"
    )


def parts_of(entry: partial) -> tuple[str, str, float]:
    """The names of statistic and scorer, and the threshold, of a detector made of them."""
    detector = entry()
    names = [next(n for n, f in known.items() if f is part) for known, part in scored_parts(detector)]
    return names[0], names[1], detector.threshold


def scored_parts(detector: Any) -> list[tuple[Mapping[str, Any], Any]]:
    """The statistic and the scorer of a detector, each with the table that names it."""
    return [(gradlens.STATISTICS, detector.statistic), (gradlens.SCORERS, detector.scorer)]


def summary(entry: Callable[..., Any]) -> str:
    """The first paragraph of a docstring, as one line."""
    if isinstance(entry, partial):
        statistic, scorer, threshold = parts_of(entry)
        return f"The statistic `{statistic}`, scored by `{scorer}`, threshold {threshold:g}."
    return first_paragraph(entry)


def first_paragraph(entry: Any) -> str:
    """The first paragraph of a docstring, as one line."""
    return one_line(inspect.getdoc(entry))


def one_line(docstring: str | None) -> str:
    """The first paragraph, as one line."""
    return " ".join((docstring or "").split("\n\n")[0].split())


def documented(entry: Any) -> str:
    """The directive that shows signature and docstring of a function or class."""
    place = f"{entry.__module__}.{entry.__qualname__}"
    if inspect.isclass(entry):
        return f".. autoclass:: {place}\n   :members:\n"
    return f".. autofunction:: {place}\n"


def api_pages() -> dict[str, str]:
    """A page per module with its public names, and one per name; entries of the tables have theirs already.

    A name that `gradlens` itself has is described there alone.
    """
    pages = {}
    for module, lead in API.items():
        summaries = public(module)
        own = [name for name in summaries if module == "gradlens" or not is_of_gradlens(module, name)]
        for name in own:
            directive = "autoclass" if is_class(module, name) else "autofunction"
            members = "   :members:\n" if directive == "autoclass" else ""
            pages[f"api/{module}.{name}.rst"] = f"{heading(name)}.. {directive}:: {module}.{name}\n{members}"
        places = {name: module if name in own else "gradlens" for name in summaries}
        rows = [[f":doc:`{name} <{places[name]}.{name}>`", plain(text)] for name, text in summaries.items()]
        hidden = "\n".join(f"   {module}.{name}" for name in own)
        pages[f"api/{module}.rst"] = (
            f"{heading(module)}{lead}\n\n{table(['name', 'in a sentence'], rows)}\n"
            f".. toctree::\n   :hidden:\n\n{hidden}\n"
        )
    body = "\n".join(f"   {name}" for name in API)
    pages["api/index.rst"] = f"{heading('Python API')}What is listed here is public and stable in the sense of the "
    pages["api/index.rst"] += f"deprecation rule in CONTRIBUTING.\n\n.. toctree::\n   :maxdepth: 1\n\n{body}\n"
    return pages


def public(module_name: str) -> dict[str, str]:
    """Name -> first paragraph of the docstring of the functions and classes that a module means to be used."""
    try:
        module = import_module(module_name)
    except ModuleNotFoundError:  # a framework that is not installed
        return {name: one_line(ast.get_docstring(node)) for name, node in defined(module_name).items()}
    names = [n for n, v in vars(module).items() if getattr(v, "__module__", "") == module_name and n[0] != "_"]
    things = {name: getattr(module, name) for name in getattr(module, "__all__", names)}
    return {n: first_paragraph(thing) for n, thing in things.items() if callable(thing) and first_paragraph(thing)}


def is_of_gradlens(module_name: str, name: str) -> bool:
    """Whether a public name of a module is one of the package, too."""
    try:
        return getattr(import_module(module_name), name) is getattr(gradlens, name, None)
    except ModuleNotFoundError:
        return False


def is_class(module_name: str, name: str) -> bool:
    """Whether a public name is a class."""
    try:
        return inspect.isclass(getattr(import_module(module_name), name))
    except ModuleNotFoundError:
        return isinstance(defined(module_name)[name], ast.ClassDef)


def defined(module_name: str) -> dict[str, ast.ClassDef | ast.FunctionDef]:
    """The public classes and functions of a module that cannot be imported here."""
    tree = ast.parse((ROOT / f"{module_name.replace('.', '/')}.py").read_text(encoding="utf-8"))
    nodes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef)}
    (names,) = (node.value for node in tree.body if isinstance(node, ast.Assign) and "__all__" in ast.unparse(node))
    return {name: nodes[name] for name in ast.literal_eval(names)}


def commands_page() -> str:
    """Every command of the command line with its arguments and options."""
    import typer

    from gradlens.cli import app

    group = typer.main.get_command(app)
    context = group.make_context("gradlens", [], resilient_parsing=True)
    page = heading("Commands") + plain(sentence(group.help)) + "\n\n"
    page += "Exit status 0 is success, 1 a ``verify`` that found a fault, 2 bad input, which is one line on standard "
    page += "error, 130 and 143 an interruption by Ctrl-C and by SIGTERM.\n\n"
    for name, command in group.commands.items():  # type: ignore[attr-defined]
        if not command.hidden:
            page += command_section(name, command, context)
    return page


def command_section(name: str, command: Any, context: Any) -> str:
    """The section of one command."""
    rows = [
        [f"``{parameter_name(parameter)}``", plain(parameter_help(parameter)), default_of(parameter)]
        for parameter in command.params
        if not getattr(parameter, "hidden", False) and parameter.name not in ("help", "show_completion")
    ]
    page = f"gradlens {name}\n{'-' * (9 + len(name))}\n\n{plain(sentence(command.help))}\n\n"
    if command.epilog:
        page += f".. code-block:: console\n\n   $ {command.epilog.removeprefix('Example: ')}\n\n"
    return page + (table(["argument or option", "meaning", "default"], rows) + "\n" if rows else "")


def parameter_name(parameter: Any) -> str:
    """How a parameter is written on the command line."""
    if parameter.param_type_name == "argument":
        return parameter.metavar or parameter.name.upper()
    value = "" if parameter.is_flag else f" {parameter.metavar or parameter.type.name.upper().removesuffix(' RANGE')}"
    return ", ".join(parameter.opts) + value


def parameter_help(parameter: Any) -> str:
    """What a parameter means; with the values that it may take."""
    return sentence(getattr(parameter, "help", "") or "")


def default_of(parameter: Any) -> str:
    """The default of a parameter, as it would be typed."""
    if parameter.required:
        return "required"
    value = parameter.default
    return "" if value in (None, False, "", ()) or callable(value) else f"``{value}``"


def scenario_page() -> str:
    """The settings of a scenario: names, types, defaults, meaning."""
    from simulations.scenario import TABLES

    fields = simulations.Scenario.model_fields
    tables = "".join(
        f"\nSettings of ``{name}``:\n\n{table(SETTING, settings_rows(kind.model_fields))}"
        for name, kind in TABLES.items()
    )
    return (
        f"{heading('Scenario settings')}"
        "A scenario is a TOML file, or a ``simulations.Scenario``, of these settings. A component (partition, attack, "
        'schedule, aggregator, detector) is a name, or a table from name to settings: ``"iid"``, '
        "``{dirichlet = {alpha = 0.5}}``. An unknown setting is an error.\n\n"
        f"{table(SETTING, settings_rows(fields))}{tables}\n"
        "Components are listed under :doc:`partitions <partitions/index>`, :doc:`attacks <attacks/index>`, "
        ":doc:`schedules <schedules/index>`, :doc:`aggregation rules <aggregators/index>` and "
        ":doc:`detectors <detectors/index>`. "
        f"Models are {', '.join(f'``{name}``' for name in simulations.MODELS)} and ``own``, the task's own model; "
        f"tasks are {', '.join(f'``{name}``' for name in simulations.TASKS)}, a folder or hub name of images, or "
        "``module:function``.\n"
    )


def settings_rows(fields: Mapping[str, Any]) -> list[list[str]]:
    """Name, type, default and meaning of each setting."""
    return [
        [
            f"``{name}``",
            plain(type_of(name, field)),
            f"``{'required' if field.is_required() else default(field.default)}``",
            plain(field.description or ""),
        ]
        for name, field in fields.items()
    ]


def type_of(name: str, field: Any) -> str:
    """The type of a setting with its range, in words."""
    from simulations.scenario import COMPONENTS, TABLES

    if name in COMPONENTS or name in ("filter", *TABLES):
        return "name or table" if name in COMPONENTS else "table"
    options = getattr(field.annotation, "__args__", ())
    if options and all(isinstance(option, str) for option in options):
        return " or ".join(options)
    if getattr(field.annotation, "__origin__", None) is tuple:
        return "list of text"
    names = [getattr(part, "__name__", str(part)) for part in options or (field.annotation,)]
    names = ["number" if part == "float" else "whole number" if part == "int" else part for part in names]
    names = ["text" if part == "str" else part for part in names if part not in ("NoneType", "Annotated")]
    signs = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
    bounds = [f"{signs[k]} {getattr(m, k):g}" for m in field.metadata for k in signs if hasattr(m, k)]
    return ", ".join([" or ".join(names) or "whole number", *bounds])


def default(value: Any) -> str:
    """A default as a scenario file would say it."""
    if value is None or value == {}:
        return "none"
    if isinstance(value, tuple):
        return f"[{', '.join(map(default, value))}]"
    return f'"{value}"' if isinstance(value, str) else str(value)


def heading(text: str) -> str:
    """A page's title in reStructuredText."""
    return f"{text}\n{'=' * len(text)}\n\n"


def sentence(text: str | None) -> str:
    """A help text as one line."""
    return " ".join((text or "").split())


def table(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A list-table in reStructuredText."""
    lines = [".. list-table::", "   :header-rows: 1", ""]
    for row in [columns, *rows]:
        for position, cell in enumerate(row):
            lines.append(f"   {'* -' if position == 0 else '  -'} {cell}".rstrip())
    return "\n".join(lines) + "\n"


def site_links(app: Any, name: str, source: list[str]) -> None:
    """Links to reports lead to their copies in the site, those to other files of the repository to its address."""
    text = source[0].replace("](../../reports/", "](report:").replace("](../reports/", "](report:")
    for file, page in (("CONTRIBUTING", "contributing"), ("SECURITY", "security"), ("CHANGELOG", "changelog")):
        text = text.replace(f"](../../{file}.md", f"](../project/{page}.md")
    for folder in ("simulations", "gradlens", "tests", "notebooks"):
        text = text.replace(f"](../../{folder}/", f"]({REPOSITORY}/{folder}/")
    source[0] = text
