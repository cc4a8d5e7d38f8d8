"""The documentation: its snippets run, its links lead somewhere, its pages say what the code says."""

import json
import re
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest

import gradlens
import simulations
from conftest import ROOT
from snippets import blocks, run_page

DOCS = ROOT / "docs"
WRITTEN = sorted(path for path in DOCS.rglob("*.md") if not {"_build", "generated"} & set(path.parts))
PAGES = [*WRITTEN, *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md"))]
RUN = [page for page in WRITTEN if any(block.language in ("python", "bash") for block in blocks(page))]
LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)|!\[[^\]]*\]\(([^)\s]+)\)")


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.fixture
def docs(monkeypatch):
    """The scripts in docs, importable."""
    monkeypatch.syspath_prepend(DOCS)
    yield
    for name in ("generate", "docstrings", "results", "check_links", "missing"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("page", RUN, ids=name_of)
def test_what_a_page_shows_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    before = set(sys.modules)
    run_page(page, tmp_path)
    for name in set(sys.modules) - before:  # modules of the page's own
        if (tmp_path / f"{name}.py").exists():
            sys.modules.pop(name)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_between_files_lead_somewhere(page):
    text = re.sub(r"^```.*?^```$|`[^`\n]+`", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for link in (first or second for first, second in LINK.findall(text)):
        path, _, anchor = link.partition("#")
        if "://" in link or not path:
            continue
        target = (page.parent / path).resolve()
        if "generated" in target.parts:
            assert target.relative_to(DOCS / "generated").parts[0].split(".")[0] in generated_names(), link
            continue
        assert target.exists(), f"{name_of(page)}: {link}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), flags=re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", h).strip().lower().replace(" ", "-") for h in headings}, link


def generated_names() -> set[str]:
    kinds = {"statistics", "scorers", "detectors", "aggregators", "attacks", "partitions", "schedules"}
    notebooks = {path.stem.partition("_")[2] for path in (ROOT / "notebooks").glob("*.ipynb")}
    return {*kinds, *notebooks, "api", "commands", "scenario"}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_structured_snippets_parse(page):
    for block in blocks(page):
        if block.language == "toml":
            tomllib.loads(block.code)
        if block.language == "json":
            json.loads(block.code)


def test_every_page_is_in_the_table_of_contents():
    index = (DOCS / "index.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"^([\w/]+)$", index, flags=re.MULTILINE))
    assert {str(page.relative_to(DOCS).with_suffix("")) for page in WRITTEN} - {"index"} <= listed


def test_every_committed_report_is_listed_beside_them_and_every_one_listed_is_there():
    listed = set(re.findall(r"`([a-z_]+\.(?:html|csv|png))`", (ROOT / "reports" / "README.md").read_text("utf-8")))
    not_committed = {"demo.html"}  # `make demo` writes it
    assert (
        listed - not_committed == {path.name for path in (ROOT / "reports").iterdir()} - {"README.md"} - not_committed
    )


def test_results_are_those_of_the_committed_tables(docs):
    import results

    for name, text in results.pages().items():
        assert (DOCS / "results" / name).read_text(encoding="utf-8") == text, "run python docs/results.py"
    front = results.README.read_text(encoding="utf-8")
    assert results.BEGIN in front
    assert results.readme(front) == front, "run python docs/results.py"


def test_every_entry_and_every_public_name_has_a_page(docs, tmp_path):
    import generate

    generate.everything(tmp_path / "pages", tmp_path / "extra")
    tables = {
        "statistics": gradlens.STATISTICS,
        "scorers": gradlens.SCORERS,
        "detectors": gradlens.DETECTORS,
        "aggregators": gradlens.AGGREGATORS,
        "attacks": simulations.ATTACKS,
    }
    for kind, table in tables.items():
        index = (tmp_path / "pages" / kind / "index.rst").read_text(encoding="utf-8")
        for name in table:
            page = (tmp_path / "pages" / kind / f"{name}.rst").read_text(encoding="utf-8")
            assert page.startswith(f"{name}\n=")
            assert "autofunction" in page or "score_by" in page or "autoclass" in page
            assert f"<{name}>" in index
    for name in gradlens.__all__:
        if callable(getattr(gradlens, name)):
            assert (tmp_path / "pages" / "api" / f"gradlens.{name}.rst").exists()
    assert (tmp_path / "extra" / "reports" / "gauntlet.html").exists()


def test_an_integration_has_its_page_where_its_framework_is_missing(docs, monkeypatch):
    import generate

    installed = generate.public("gradlens.integrations.nvflare")
    monkeypatch.setitem(sys.modules, "gradlens.integrations.nvflare", None)
    assert set(installed) == set(generate.public("gradlens.integrations.nvflare")) == {"GradlensAggregator"}
    assert generate.is_class("gradlens.integrations.nvflare", "GradlensAggregator")


def test_what_is_not_installed_is_stood_in_for(docs, monkeypatch):
    import missing

    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path])
    missing.stand_in("no_such_framework", "numpy")
    from no_such_framework.app import Message, Strategy

    class Ours(Strategy):
        def go(self, message: Message | None = Message.EMPTY) -> None: ...

    assert Ours.__mro__[1] is Strategy
    assert np.zeros(1) == 0  # what is installed stays
    for name in [name for name in sys.modules if name.startswith("no_such_framework")]:
        sys.modules.pop(name)


def test_pages_of_entries_that_went_away_go_away_and_the_others_stay_untouched(docs, tmp_path):
    import generate

    generate.everything(tmp_path / "pages", tmp_path / "extra")
    gone = tmp_path / "pages" / "detectors" / "gone.rst"
    gone.write_text("gone\n====\n")
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.rst") if path != gone}
    generate.everything(tmp_path / "pages", tmp_path / "extra")
    assert not gone.exists()
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.rst")} == stamps


def test_every_setting_of_a_scenario_is_described(docs):
    import generate

    from simulations.scenario import TABLES

    page = generate.scenario_page()
    for kind in (simulations.Scenario, *TABLES.values()):
        for name, field in kind.model_fields.items():
            assert f"* - ``{name}``" in page
            assert (field.description or "").endswith("."), name


def test_every_command_is_on_the_page_with_its_options(docs):
    import generate
    import typer

    from gradlens.cli import app

    page = generate.commands_page()
    for name, command in typer.main.get_command(app).commands.items():
        if not command.hidden:
            assert f"\ngradlens {name}\n---" in page
    assert "``--detector, -d" in page


def test_docstrings_become_markup(docs):
    import docstrings

    old = ["The largest |z| of `keep`s, n * 2.", "", "- one", "two"]
    docstrings.prepared(None, "", "", None, None, old)
    assert old == ["The largest \\|z\\| of ``keep``\\ s, n \\* 2.", "", "\\- one", "two"]
    new = ["Largest |z|.", "", "Returns", "-------", "int", "    Of |x|.", "", ".. math:: |x|", "", "    |y|", "`|a|`"]
    docstrings.prepared(None, "", "", None, None, new)
    assert new[0] == "Largest \\|z\\|."
    assert new[5] == "    Of \\|x\\|."
    assert new[7:] == [".. math:: |x|", "", "    |y|", "`|a|`"]


def test_links_of_a_site_are_checked(docs, tmp_path):
    import check_links

    (tmp_path / "sub").mkdir()
    (tmp_path / "index.html").write_text(
        '<a href="sub/page.html#there">ok</a> <a href="https://example.org">out</a> <h1 id="top"></h1>'
    )
    (tmp_path / "sub" / "page.html").write_text('<a id="there"></a> <a href="../index.html#top"></a> <img src="x.png">')
    assert check_links.broken(tmp_path) == ["sub/page.html: x.png: no such file"]
    (tmp_path / "sub" / "x.png").write_bytes(b"")
    (tmp_path / "index.html").write_text('<a href="sub/page.html#gone"></a>')
    faults = check_links.broken(tmp_path)
    assert faults[0] == "index.html: sub/page.html#gone: no such anchor"
    assert faults[1] == "sub/page.html: ../index.html#top: no such anchor"
