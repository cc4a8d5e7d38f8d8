"""The study of evidence levels: figures of a table with known answers; the committed page beside its rows."""

import html
import re

import numpy as np
import pandas as pd
import pytest

from conftest import ROOT
from gradlens import DETECTORS
from simulations.studies import evidence_levels as study
from test_evidence import ANSWER, NEED_A_FINAL_LAYER, NEED_ITS_ROWS, NEED_NUMBERS

CSV = ROOT / "reports" / "evidence.csv"


def rows(differences: dict[str, list[float]]) -> pd.DataFrame:
    """A run for each difference of a detector's AUC at 512 numbers."""
    made = [
        ("run", "digits", "iid", "trigger", i, name, 512, 0.9, 0.9 + d, 1 - abs(d))
        for name, of in differences.items()
        for i, d in enumerate(of)
    ]
    return pd.DataFrame(made, columns=list(study.COLUMNS))


def test_differences_are_averaged_over_runs_with_their_sizes_beside():
    """Student's t for two runs is 12.706; the standard error of 0.1 and -0.1 is 0.1, which is beyond what AUCs can."""
    table = study.summarized(rows({"a": [0.1, -0.1, np.nan], "b": [0.03, 0.01]})).set_index("detector")
    np.testing.assert_allclose(table["difference"], [0, 0.02], atol=1e-12)
    np.testing.assert_allclose(table["distance"], [0.1, 0.02])
    np.testing.assert_allclose(table["equal_flags"], [0.9, 0.98])
    assert table["runs"].tolist() == [2, 2]
    assert (table.loc["a", "low"], table.loc["a", "high"]) == (-1, 1)
    assert (table.loc["b", "low"], table.loc["b", "high"]) == pytest.approx((0.02 - 0.12706, 0.02 + 0.12706), abs=1e-5)


def test_the_sentence_names_who_is_beyond_the_bound():
    summary = study.summarized(rows({"near": [0.001, -0.001], "off": [-0.03, -0.05], "wide": [0.2, -0.2]}))
    agreement, certainty, *_ = study.findings(summary)
    assert agreement["text"].startswith(
        "With 512 numbers per layer, 2 of 3 detectors keep their mean AUC to within 0.02"
    )
    assert agreement["text"].endswith("; off does not.")
    assert agreement["points"][0].startswith("off: \N{MINUS SIGN}0.040 [")
    assert "For 1 of them" in certainty["text"]
    assert certainty["text"].endswith("near.")


def test_flags_are_compared_update_by_update():
    one, other = (pd.DataFrame({"flag": flags}) for flags in ([True, False, True, False], [True, True, True, False]))
    assert study.equal_flags(one, other) == 0.75


def test_every_detector_is_asked_or_said_why_not():
    assert set(study.detectors()) == set(ANSWER & set(DETECTORS)) - {"final_bias", "bilgin"}
    assert set(DETECTORS) & NEED_NUMBERS == study.NEED_COORDINATES
    assert set(DETECTORS) & (NEED_A_FINAL_LAYER | NEED_ITS_ROWS) == study.FINAL_LAYER_ONLY - {"final_bias", "bilgin"}


def test_the_committed_page_says_what_the_committed_rows_say():
    table = pd.read_csv(CSV)
    assert set(table["detector"]) <= set(study.detectors())  # a new detector has no rows yet
    assert set(table["width"]) == set(study.WIDTHS)
    page = html.unescape((ROOT / "reports" / "evidence.html").read_text())
    plain = re.sub(r"\s+", " ", page)
    for said in study.findings(study.summarized(table)):
        assert re.sub(r"\s+", " ", said["text"]) in plain
        assert all(re.sub(r"\s+", " ", point) in plain for point in said["points"])
