"""reports/evidence.py: figures of a table whose answers are known; the committed page beside the committed rows."""

import html
import re

import numpy as np
import pandas as pd
import pytest

from conftest import ROOT
from gradlens import DETECTORS
from test_evidence import ANSWER, NEED_A_FINAL_LAYER, NEED_ITS_ROWS, NEED_NUMBERS

with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(str(ROOT / "reports"))
    import evidence

CSV = ROOT / "reports" / "evidence.csv"


def rows(differences: dict[str, list[float]]) -> pd.DataFrame:
    """A run for each difference of a detector's AUC at 512 numbers."""
    made = [
        ("run", "digits", "iid", "trigger", i, name, 512, 0.9, 0.9 + d, 1 - abs(d))
        for name, of in differences.items()
        for i, d in enumerate(of)
    ]
    return pd.DataFrame(made, columns=list(evidence.COLUMNS))


def test_differences_are_averaged_over_runs_with_their_sizes_beside():
    table = evidence.summarised(rows({"a": [0.1, -0.1, np.nan], "b": [0.02, 0.02]})).set_index("detector")
    np.testing.assert_allclose(table["difference"], [0, 0.02], atol=1e-12)
    np.testing.assert_allclose(table["away"], [0.1, 0.02])
    np.testing.assert_allclose(table["equal_flags"], [0.9, 0.98])
    assert table["runs"].tolist() == [2, 2]
    assert (table.loc["a", "low"], table.loc["a", "high"]) == pytest.approx((-0.1, 0.1))


def test_the_sentence_names_who_is_beyond_the_bound():
    summary = evidence.summarised(rows({"near": [0.01, -0.01], "off": [-0.03, -0.05], "wide": [0.2, -0.2]}))
    agreement, certainty, *_ = evidence.findings(summary)
    assert agreement["text"].startswith("At 512 numbers a layer 2 of 3 detectors keep their mean AUC within 0.02")
    assert agreement["text"].endswith("; beyond it: off.")
    assert agreement["points"][0].startswith("off: \N{MINUS SIGN}0.040 [")
    assert "For 1 of them" in certainty["text"]
    assert certainty["text"].endswith("near.")


def test_flags_are_compared_update_by_update():
    one, other = (pd.DataFrame({"flag": flags}) for flags in ([True, False, True, False], [True, True, True, False]))
    assert evidence.equal(one, other) == 0.75


def test_every_detector_is_asked_or_said_why_not():
    assert set(evidence.detectors()) == set(ANSWER & set(DETECTORS)) - {"final_bias", "bilgin"}
    assert set(DETECTORS) & NEED_NUMBERS == evidence.NUMBERS
    assert set(DETECTORS) & (NEED_A_FINAL_LAYER | NEED_ITS_ROWS) == evidence.FINAL - {"final_bias", "bilgin"}


def test_the_committed_page_says_what_the_committed_rows_say():
    table = pd.read_csv(CSV)
    assert set(table["detector"]) == set(evidence.detectors())
    assert set(table["width"]) == set(evidence.WIDTHS)
    page = html.unescape((ROOT / "reports" / "evidence.html").read_text())
    plain = re.sub(r"\s+", " ", page)
    for said in evidence.findings(evidence.summarised(table)):
        assert re.sub(r"\s+", " ", said["text"]) in plain
        assert all(re.sub(r"\s+", " ", point) in plain for point in said["points"])
