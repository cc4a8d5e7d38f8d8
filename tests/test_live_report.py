"""What a report says of a run that was filtered live: who was left out or counted less, when, and why."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex

from gradlens import Run, report
from gradlens.log import LogWriter, Round
from gradlens.plots import plot_weights
from gradlens.reporting.live import by_client, live, live_section
from gradlens.run import VERDICT_COLUMNS
from planted import MODEL, STATE
from test_report import Page, is_self_contained

EVIL = "<b>evil</b>"
# round -> client -> weight, flag, reason; the detector abstains in round 3
DECIDED = {
    0: {"a": (1, False, ""), "b": (1, False, ""), EVIL: (0, True, "flagged")},
    1: {"a": (1, False, ""), "b": (0.25, True, "flagged, clipped"), EVIL: (0, False, "flagged in round 0")},
    2: {"a": (1, False, ""), "b": (0.5, False, "flagged in round 1, clipped")},
    3: {"a": (1, False, "too few: use_all"), "b": (1, False, "too few: use_all"), EVIL: (1, False, "too few: use_all")},
}


def record(path, decided=DECIDED, *, truth=True):
    """A run with these live verdicts, in which the evil one poisons whenever it takes part."""
    rows = []
    with LogWriter.create(path, MODEL, STATE) as writer:
        for index, said in decided.items():
            rng, clients = np.random.default_rng(index), np.array(list(said))
            updates = {n: rng.normal(size=(len(said), *a.shape)).astype(a.dtype) for n, a in STATE.items()}
            table = pd.DataFrame(
                {
                    "round": index, "client": clients, "detector": "told", "score": 0.5,
                    "flag": [flag for _, flag, _ in said.values()], "kept": [w > 0 for w, _, _ in said.values()],
                    "abstained": "too few" if index == 3 else "", "null": "",
                    "weight": [float(w) for w, _, _ in said.values()], "reason": [why for *_, why in said.values()],
                }
            )  # fmt: skip
            done = Round(index, clients, np.full(len(said), 9), updates, STATE, buffers=MODEL.buffers)
            writer.commit(done, STATE, verdict=table[list(VERDICT_COLUMNS)])
            rows += [(index, client, client == EVIL, client == EVIL) for client in said]
        if truth:
            writer.add_truth(pd.DataFrame(rows, columns=["round", "client", "compromised", "poisoned"]))
    return Run.open(path)


@pytest.fixture
def ax():
    figure = plt.figure()
    yield figure.add_subplot()
    plt.close(figure)


def test_a_row_per_client_that_did_not_always_count_in_full(tmp_path):
    found = by_client(record(tmp_path / "run"))
    assert found.to_dict("list") == {
        "client": [EVIL, "b"],
        "rounds": [3, 4],
        "out": [2, 0],
        "less": [0, 2],
        "weight": [pytest.approx(np.nan, nan_ok=True), 0.375],
        "flags": [1, 1],
        "reasons": [["flagged", "flagged in round 0"], ["flagged, clipped", "flagged in round 1, clipped"]],
    }


def test_the_finding_counts_what_was_done_and_to_whom(tmp_path):
    found = live(record(tmp_path / "run"))
    assert found is not None
    assert found["text"] == (
        "Of 11 updates a live filter kept out 2 (2 of them poisoned) and let 2 count less (0 of them poisoned); 1 "
        "poisoned update counted in full; 2 clients affected."
    )
    assert found["points"] == [
        f"{EVIL}: kept out in 2 of 3 rounds, malicious",
        "b: counted 0.38 on average in 2 of 4 rounds, benign",
    ]
    unknown = live(record(tmp_path / "other", truth=False))
    assert unknown is not None
    assert unknown["text"] == "Of 11 updates a live filter kept out 2 and let 2 count less; 2 clients affected."
    assert unknown["points"][0] == f"{EVIL}: kept out in 2 of 3 rounds"


def test_the_section_has_every_update_that_did_not_count_in_full(tmp_path):
    blocks = live_section(record(tmp_path / "run"), None, "alone")
    abstained, clients, updates = (block for block in blocks if block["kind"] == "table")
    assert abstained["rows"] == [["too few", "1", "3", "3"]]
    assert clients["rows"] == [
        [EVIL, "malicious", "3", "1", "2", "0", "–", "flagged and flagged in round 0"],
        ["b", "benign", "4", "1", "0", "2", "0.38", "flagged, clipped and flagged in round 1, clipped"],
    ]
    assert updates["rows"] == [
        ["0", EVIL, "0.50", "yes", "0.000", "flagged"],
        ["1", EVIL, "0.50", "", "0.000", "flagged in round 0"],
        ["1", "b", "0.50", "yes", "0.250", "flagged, clipped"],
        ["2", "b", "0.50", "", "0.500", "flagged in round 1, clipped"],
    ]


def test_the_page_shows_it_as_text_beside_the_filtered_control(tmp_path):
    run, control = record(tmp_path / "run"), record(tmp_path / "control", {r: DECIDED[r] for r in (0, 1)}, truth=False)
    page = Page(report(run, tmp_path / "o.html", control=control.path, permutations=19))
    assert is_self_contained(page)
    assert "6 What a live filter did" in page.text
    assert f"{EVIL}: kept out in 2 of 3 rounds, malicious" in page.text
    (picture,) = (each for each in page.pictures if "left out" in each[0])
    assert picture[0] == (
        "Attacked 2 of 11 updates left out, 2 counted less; Attack-free control 2 of 6 updates left out, 1 counted less"
    )
    assert "×" in picture[1]


@pytest.mark.parametrize("decided", [{}, {0: DECIDED[3], 1: DECIDED[3]}])
def test_where_nobody_was_affected_it_says_so(tmp_path, decided):
    run = record(tmp_path / "run", decided)
    said = " ".join(block["text"] for block in live_section(run, None, "") if block["kind"] == "text")
    if decided:
        assert "Every update counted in full." in said
        assert live(run)["text"].startswith("Of 6 updates a live filter let all count in full; 2 poisoned updates")
    else:
        assert "No filter ran" in said
        assert live(run) is None


def test_the_picture_has_a_cell_per_client_and_round(tmp_path, ax):
    run = record(tmp_path / "run")
    plot_weights(run.verdicts, run.truth, ax=ax)
    cells = np.ma.filled(ax.collections[0].get_array().reshape(2, 4), np.nan)
    np.testing.assert_array_equal(cells, [[0, 0, np.nan, 1], [1, 0.25, 0.5, 1]])
    words = {tuple(np.array(text.get_position()) - 0.5): text.get_text() for text in ax.texts}
    assert words == {(0, 0): "×", (1, 0): "×", (1, 1): ".2", (2, 1): ".5"}
    names = [label.get_text() for label in ax.get_yticklabels()]
    assert names[0].startswith("malicious")
    assert names[1] == "b"
    assert ax.patch.get_hatch() == "///"
    greys = [to_hex(ax.collections[0].to_rgba(weight)) for weight in (0.0, 0.5, 1.0)]
    assert sorted(greys) == greys  # the darker the less


def test_a_picture_of_nobody_says_why_it_is_empty(ax):
    verdicts = pd.DataFrame({"round": [0, 0], "client": ["a", "b"], "weight": [1.0, 1.0]})
    plot_weights(verdicts, ax=ax)
    assert [text.get_text() for text in ax.texts] == ["every update counted in full"]
    assert ax.get_title(loc="left") == "0 of 2 updates left out, 0 counted less"
