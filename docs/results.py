"""Writes the pages of results, and the figures of the README, from the committed tables: `python docs/results.py`.

What it writes is committed, and a test holds it against what this writes.
"""

import csv
import re
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
REPORTS = ROOT / "reports"
ADAPTERS = REPORTS / "gauntlet_adapters.csv"
PAGES = ROOT / "docs" / "results"
README, BEGIN, END = ROOT / "README.md", "<!-- Written by docs/results.py: -->\n", "<!-- . -->\n"
NOTE = "<!-- Written by docs/results.py from the tables in reports/. Do not edit. -->\n\n"
BENCH = {
    "work": "work",
    "peer": "peer",
    "ours": "gradlens",
    "theirs": "peer's",
    "unit": "unit",
    "ratio": "times as fast",
}


def pages() -> dict[str, str]:
    """Name -> text of every page that is made of tables."""
    from simulations.studies import attacks, cases, defenses, gauntlet_figures, gauntlet_page, reproduce

    later = {}
    if ADAPTERS.exists():
        later["adapters.md"] = titled("Adapters", adapters())
    if any(reproduce.table_of(part).exists() for each in reproduce.EXPERIMENTS.values() for part in each.parts):
        later["reproduced.md"] = titled("The seed papers, reproduced", reproduce.section())
    if reproduce.table_of("evasion").exists():
        later["evasion.md"] = titled("Attackers who know the detectors", reproduce.evasion_section())
    return later | {
        "cases.md": titled("Cases", cases.section(cases.committed())),
        "detectors.md": titled("Detectors", gauntlet_page.section(gauntlet_figures.committed())),
        "defenses.md": titled("Defenses", defenses.section(defenses.committed())),
        "attacks.md": titled("Attacks", attacks.section(*attacks.committed())),
        "speed.md": titled("Speed", speed()),
    }


def adapters() -> str:
    """What of the detectors and of the case carries over to low-rank adapters."""
    from simulations.studies import cases, gauntlet_figures, gauntlet_page

    judged = cases.committed()
    judged = judged[judged["kind"].str.endswith(", adapters")]
    parts = [
        "Clients train and send low-rank adapters beside the attention of a small transformer that the server has "
        "trained: a classifier of Shakespeare's speakers, where a phrase is the trigger, and a model of the next word, "
        "where a sentence is to end as the attacker wants. Adapters have no final layer, so what rests on it abstains; "
        "everything else judges the products of the pairs.",
        re.sub(r"\A## .*\n+", "", gauntlet_page.section(gauntlet_figures.committed(ADAPTERS), "gauntlet_adapters")),
        "## Cases",
        cases.adapters_text(cases.committed()),
        *([cases.attacked_text(judged)] if len(judged) else []),
    ]
    return "\n\n".join(parts)


def speed() -> str:
    """Beside the peers; large logs; a filter in a round of Flower; streamed sketches."""
    parts = [
        "What `make bench` measured, on two cores; the commands are in `tests/benchmarks/`. Ratios above 1 mean that "
        "gradlens is faster.",
        "## Training and rules, beside the peers",
        tabulated("bench.csv", BENCH),
        "## Long and large logs",
        tabulated("scale.csv"),
        "## A filter in a round of Flower",
        tabulated("flower_filter.csv"),
        "## Sketches, recorded as answers arrive",
        tabulated("streamed.csv"),
    ]
    return "\n\n".join(parts)


def titled(title: str, text: str) -> str:
    """A page: its title, and the text with links as they are from docs/results."""
    body = re.sub(r"\A## .*\n+", "", text)
    return f"{NOTE}# {title}\n\n{body.replace('](reports/', '](../../reports/')}\n"


def tabulated(name: str, columns: dict[str, str] | None = None) -> str:
    """A committed CSV file as a table, and a link to it."""
    with open(REPORTS / name, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    columns = columns or {name: name.replace("_", " ") for name in rows[0]}
    body = markdown(list(columns.values()), [[row[name] for name in columns] for row in rows])
    return f"{body}\n\n[`reports/{name}`](reports/{name})"


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    return "\n".join("| " + " | ".join(row) + " |" for row in [columns, ["---"] * len(columns), *rows])


def readme(text: str) -> str:
    """The README with the figures of the committed tables."""
    from simulations.studies import cases

    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}{cases.summary(cases.committed())}\n{END}{after}"


def main() -> None:
    """Writes every page, and the README's part."""
    for name, text in pages().items():
        (PAGES / name).write_text(text, encoding="utf-8")
    README.write_text(readme(README.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
