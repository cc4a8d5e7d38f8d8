"""The HTML reports in a browser: whole on a phone, a screen and paper, in light and dark; they ask for nothing.

Their tables sort and filter and their points say what they are, by the one script that the policy of a page allows.
"""

import importlib.util
import json
import os
import re
import shutil
from base64 import b64decode
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gradlens import investigate, report
from gradlens.case.several import table_of_cases
from gradlens.examples import example_log, example_run
from gradlens.plots.axes import name_points
from gradlens.reporting.case_file import case_file, cases_file
from gradlens.reporting.page import figure, render, section, table, text
from gradlens.run import Run
from test_report import CELLS, CLIENTS, record, recorded_sweep

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PACKAGES = ("playwright", "axe_playwright_python")
ABSENT = [name for name in PACKAGES if importlib.util.find_spec(name) is None] + ["chromium"] * (not CHROMIUM)
if ABSENT:
    REASON = f"needs {' and '.join(ABSENT)}: `make install`, and `apt-get install chromium`"
    if os.environ.get("CI") == "true":
        pytest.fail(REASON, pytrace=False)
    pytest.skip(REASON, allow_module_level=True)

from axe_playwright_python.sync_playwright import Axe  # noqa: E402
from playwright.sync_api import Browser, Page, Route, sync_playwright  # noqa: E402

QUIET = ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
WIDTHS = (390, 1280)  # a phone and a screen, in CSS pixels
PAPER, PRINTABLE = 688, 1001  # A4 within the margins of 14 and 16 mm, in CSS pixels
REPORTS = ("run with truth", "run without truth", "run beside its control", "sweep")
KINDS = (*REPORTS, "case file")

OUTSIDE = """sideways => [...document.querySelectorAll('body *')].filter(element => {
  const box = element.getBoundingClientRect();
  const scrolls = sideways && element.closest('.scroll') && !element.matches('.scroll');
  return box.width > 0 && !scrolls && (box.left < -1 || box.right > innerWidth + 1);
}).map(element => element.outerHTML.slice(0, 120))"""

HIDDEN = """() => [...document.querySelectorAll('body *')].filter(element => {
  const hides = ['hidden', 'clip'].includes(getComputedStyle(element).overflowX);
  return hides && element.scrollWidth > element.clientWidth + 1;
}).map(element => element.outerHTML.slice(0, 120))"""

BROKEN_WORDS = """() => [...document.querySelectorAll('.findings b, nav a, th, dt, h2')].flatMap(element => {
  const node = element.firstChild;
  return [...(node?.data ?? '').matchAll(/\\S+/g)].filter(word => {
    const range = document.createRange();
    range.setStart(node, word.index);
    range.setEnd(node, word.index + word[0].length);
    return new Set([...range.getClientRects()].map(box => Math.round(box.top))).size > 1;
  }).map(word => word[0]);
})"""

BEYOND_THE_PICTURE = """() => {
  const svg = document.querySelector('svg'), whole = svg.getBoundingClientRect();
  return [...svg.querySelectorAll('path, use, image')].filter(element => {
    if (element.closest('defs, [clip-path]')) return false;
    const box = element.getBoundingClientRect();
    return box.left < whole.left - 1 || box.top < whole.top - 1 || box.right > whole.right + 1
      || box.bottom > whole.bottom + 1;
  }).map(element => element.outerHTML.slice(0, 120));
}"""


@pytest.fixture(scope="module")
def reports(tmp_path_factory) -> dict[str, Path]:
    """A small report of every kind."""
    folder = tmp_path_factory.mktemp("pages")
    attacked: dict[str, Any] = {"malicious": CLIENTS[:2], "asr": 0.9}
    sweep = recorded_sweep(folder / "sweep", CELLS, seeds=(0, 1))
    sources = (
        record(folder / "with", start=1, **attacked),
        record(folder / "without", truth=False, **attacked),
        next(run for run in sweep.runs if run.name.startswith("trig")),
        sweep,
    )
    pages = {
        kind: report(source, folder / f"{kind}.html", permutations=19)
        for kind, source in zip(REPORTS, sources, strict=True)
    }
    free = [example_log(8, num_malicious=0, seed=seed) for seed in range(100, 119)]
    run = Run.open(example_run(folder / "case", 8, num_malicious=2))
    case = investigate(run, free)
    pages["case file"] = case_file(run, case, folder / "case file.html")
    cases = {"attacked": case, "small": investigate(example_log(num_clients=4))}
    pages["cases"] = cases_file(table_of_cases(cases), cases, folder / "cases.html")
    return pages


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        arguments = QUIET + ["--no-sandbox"] * (os.geteuid() == 0)
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield opened
        opened.close()


def opened(browser: Browser, path: Path, width: int, **settings: Any) -> tuple[Page, list[str]]:
    """The page with everything unfolded, and a list that fills with what it asks for and complains of."""
    context = browser.new_context(viewport={"width": width, "height": 900}, **settings)
    complaints: list[str] = []

    def refuse(route: Route) -> None:
        if route.request.url == path.as_uri() or route.request.url.startswith("data:"):
            return route.continue_()
        complaints.append(f"asks for {route.request.url[:80]}")
        return route.abort()

    context.route("**/*", refuse)
    page = context.new_page()
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(path.as_uri())
    page.evaluate("document.querySelectorAll('details').forEach(details => details.open = true)")
    page.wait_for_function("[...document.images].every(image => image.complete)")
    return page, complaints


@pytest.fixture(scope="module", params=[(kind, width) for kind in KINDS for width in WIDTHS], ids=str)
def shown(request, browser, reports):
    kind, width = request.param
    return opened(browser, reports[kind], width)


def luminance(color: str) -> float:
    """Relative luminance of rgb(...), 0 for black and 1 for white (WCAG 2)."""
    parts = np.array([float(part) for part in re.findall(r"[\d.]+", color)[:3]]) / 255
    linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


def violations(page: Page) -> list[str]:
    """What axe finds, of any severity: rule, severity and the first element."""
    found = Axe().run(page).response["violations"]
    return [f"{each['id']} ({each['impact']}): {each['nodes'][0]['html'][:120]}" for each in found]


def test_a_page_renders_with_its_sections_pictures_and_tables(shown):
    page, _ = shown
    assert page.locator("h1").is_visible()
    assert page.locator("main section h2").count() >= 8
    assert page.locator("img").count() >= 3
    assert page.evaluate("[...document.images].every(image => image.naturalWidth > 100 && image.height > 100)")
    assert page.evaluate("[...document.querySelectorAll('th')].every(header => header.innerText.trim())")
    assert page.locator("main > section").last.get_attribute("id") == "words"  # the evidence comes first


def test_a_page_asks_for_nothing_runs_nothing_and_complains_of_nothing(shown):
    page, complaints = shown
    assert complaints == []
    assert page.evaluate("document.scripts.length") == 1


def test_a_page_is_accessible(shown):
    assert violations(shown[0]) == []


def test_nothing_is_cut_and_the_page_does_not_scroll_sideways(shown):
    page, _ = shown
    assert page.evaluate("document.scrollingElement.scrollWidth <= innerWidth")
    assert page.evaluate(OUTSIDE, True) == []
    assert page.evaluate(HIDDEN) == []
    assert page.evaluate(BROKEN_WORDS) == []


@pytest.mark.parametrize("kind", KINDS)
def test_no_picture_is_cut_at_its_edge(browser, reports, kind):
    pictures = re.findall(r"data:image/svg\+xml;base64,([^\"]+)", reports[kind].read_text())
    page = browser.new_page(viewport={"width": 1600, "height": 1200})
    for picture in pictures:
        page.set_content(b64decode(picture).decode())
        assert page.evaluate(BEYOND_THE_PICTURE) == []
    assert pictures


@pytest.mark.parametrize("width", WIDTHS)
def test_a_page_of_cases_is_whole_and_accessible(browser, reports, width):
    page, complaints = opened(browser, reports["cases"], width)
    assert complaints == []
    assert violations(page) == []
    assert page.evaluate("document.scrollingElement.scrollWidth <= innerWidth")
    assert page.evaluate(OUTSIDE, True) == []
    assert page.evaluate(BROKEN_WORDS) == []


@pytest.mark.parametrize("kind", KINDS)
def test_in_the_dark_a_page_is_dark_and_can_be_read(browser, reports, kind):
    page, _ = opened(browser, reports[kind], 1280, color_scheme="dark")
    ink, paper = page.evaluate(
        "(({color, backgroundColor}) => [color, backgroundColor])(getComputedStyle(document.body))"
    )
    assert luminance(paper) < 0.05
    assert (luminance(ink) + 0.05) / (luminance(paper) + 0.05) > 7
    assert violations(page) == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("kind", KINDS)
def test_on_paper_nothing_is_cut_and_nothing_is_parted(browser, reports, kind, scheme):
    page, _ = opened(browser, reports[kind], PAPER, color_scheme=scheme)
    page.evaluate("document.querySelectorAll('details').forEach(details => details.open = false)")
    page.emulate_media(media="print")
    assert luminance(page.evaluate("getComputedStyle(document.body).backgroundColor")) == 1
    assert page.evaluate("document.scrollingElement.scrollWidth <= innerWidth")
    assert page.evaluate(OUTSIDE, False) == []
    assert page.evaluate(BROKEN_WORDS) == []
    assert page.evaluate("[...document.querySelectorAll('pre')].every(p => p.scrollWidth <= p.clientWidth)")
    assert page.evaluate("[...document.querySelectorAll('td')].every(cell => cell.offsetHeight > 0)")  # unfolded
    style = "[...document.querySelectorAll('{}')].map(element => getComputedStyle(element).{})"
    assert set(page.evaluate(style.format("figure, tr, pre, .findings > li", "breakInside"))) == {"avoid"}
    assert set(page.evaluate(style.format("h2, h3, p.caption", "breakAfter"))) == {"avoid"}
    heights = page.evaluate("[...document.querySelectorAll('figure')].map(figure => figure.offsetHeight)")
    assert max(heights) < PRINTABLE - 100  # with its heading it fits on one sheet


# What the script does -------------------------------------------------------------------------------------------

COLUMN = "place => [...document.querySelector('#{}  table').tBodies[0].rows].map(row => row.cells[place].textContent)"


@pytest.fixture
def page_of_tables(browser, tmp_path):
    """A page with a table of twelve rows and a picture of three named points, one name being hostile."""
    values = ["1,200", "−3.5", "≤ 0.2", "–", "0.95 [0.90, 1.00]", "7", "10", "9", "8 %", "2e3", "client", ""]
    rows = [{"Client": f"client-{number}", "Value": value} for number, value in enumerate(values)]

    def draw(canvas):
        ax = canvas.subplots()
        [line] = ax.plot([0, 1, 2], [0, 1, 0], "o")
        name_points(line, ["client-1, round 0", "<img src=x onerror=alert(1)>", "client-1, round 2"])

    blocks = [table(rows, "Values of clients.", folded=False), figure(draw, (4, 3), "Three points.")]
    path = tmp_path / "page.html"
    path.write_text(render("Tables", "A lead.", [], [section("values", "Values", blocks)]))
    return opened(browser, path, 900)


def column(page: Page, place: int) -> list[str]:
    return page.evaluate(COLUMN.format("values"), place)


def test_a_click_on_a_header_sorts_by_value_and_a_second_one_turns_it_round(page_of_tables):
    page, complaints = page_of_tables
    page.get_by_role("button", name="Value").click()
    numbers = ["−3.5", "≤ 0.2", "0.95 [0.90, 1.00]", "7", "8 %", "9", "10", "1,200", "2e3"]
    assert column(page, 1)[:9] == numbers
    assert page.locator("th[aria-sort=ascending]").inner_text().startswith("Value")
    page.get_by_role("button", name="Value").press("Enter")
    assert column(page, 1)[3:] == numbers[::-1]
    page.get_by_role("button", name="Client").click()
    assert column(page, 0) == [f"client-{number}" for number in range(12)]  # 2 before 10
    assert page.locator("th[aria-sort]").count() == 1
    assert complaints == []


def test_a_filter_leaves_the_rows_that_hold_its_text_and_says_how_many(page_of_tables):
    page, _ = page_of_tables
    page.get_by_label("Filter").fill("CLIENT-1")
    assert page.locator("tbody tr:visible").count() == 3  # client-1, client-10, client-11
    assert page.locator("output").inner_text() == "3 of 12 rows"
    page.get_by_label("Filter").fill("")
    assert page.locator("tbody tr:visible").count() == 12
    assert violations(page) == []


def test_a_point_says_what_it_is_under_the_pointer_and_what_a_client_wrote_is_text(page_of_tables):
    page, complaints = page_of_tables
    picture = page.locator("img[data-points]")
    points = json.loads(picture.get_attribute("data-points"))
    picture.scroll_into_view_if_needed()
    box = picture.bounding_box()
    for x, y, name in points:
        page.mouse.move(box["x"] + x * box["width"] + 2, box["y"] + y * box["height"] - 2)
        assert page.locator(".note").inner_text() == name
    page.mouse.move(box["x"] + 1, box["y"] + 1)
    assert not page.locator(".note").is_visible()
    assert page.locator(".note *").count() == 0
    assert complaints == []


def test_named_points_lie_on_the_dots_of_the_picture(page_of_tables):
    page, _ = page_of_tables
    dots = page.evaluate(
        """() => {
          const picture = document.querySelector('img[data-points]');
          const svg = new DOMParser().parseFromString(atob(picture.src.split(',')[1]), 'image/svg+xml').documentElement;
          document.body.append(svg);
          const whole = svg.getBoundingClientRect();
          const line = [...svg.querySelectorAll('use')].map(use => use.getBoundingClientRect());
          return line.map(box => [(box.left + box.width / 2 - whole.left) / whole.width,
            (box.top + box.height / 2 - whole.top) / whole.height]);
        }"""
    )
    points = json.loads(page.locator("img[data-points]").get_attribute("data-points"))
    for x, y, _name in points:
        assert min(abs(x - left) + abs(y - top) for left, top in dots) < 0.01


def test_no_other_script_runs(browser, tmp_path):
    path = tmp_path / "page.html"
    page = render("Hostile", "A lead.", [], [section("a", "A", [text("evidence")])])
    path.write_text(page.replace("evidence", "<script>document.title = 'taken'</script><b onclick='1'>x</b>"))
    shown, complaints = opened(browser, path, 900)
    assert shown.title() == "Hostile"
    assert any("Content Security Policy" in complaint for complaint in complaints)


@pytest.mark.parametrize("kind", KINDS)
def test_every_table_of_a_report_can_be_sorted(browser, reports, kind):
    page, complaints = opened(browser, reports[kind], 1280)
    longer = "[...document.querySelectorAll('table')].filter(table => table.tBodies[0].rows.length > 1)"
    assert page.evaluate(
        f"{longer}.every(table => table.querySelectorAll('th button').length === table.rows[0].cells.length)"
    )
    page.locator("th button").first.click()
    assert page.locator("th[aria-sort=ascending]").count() == 1
    assert complaints == []
