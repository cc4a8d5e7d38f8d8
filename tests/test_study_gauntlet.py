"""The gauntlet: a small part of it runs, its figures hold together, and what was analyzed is read again."""

import sys

import numpy as np
import pandas as pd
import pytest

from gradlens.detectors import DETECTORS
from gradlens.errors import InputError
from simulations import ATTACKS, load_sweep
from simulations.scenario import SCENARIOS
from simulations.studies import gauntlet, gauntlet_figures, gauntlet_page, gauntlet_scores
from simulations.studies.conditions import main_part

COLUMNS = ["detector", "family", "adaptive", "works", "partition", "per", "metric", "value", "low", "high", "seeds"]


OWN_DETECTOR = """
import numpy as np
from gradlens import score_by
from gradlens.scorers import robust_zscore
from gradlens.statistics import layer_norms

def own_norms():
    return score_by(layer_norms, robust_zscore, threshold=5.0)
"""


@pytest.fixture(scope="module")
def part(tmp_path_factory):
    """The folder of a gauntlet of one attack and one seed, with four attack-free runs of each partition."""
    folder = tmp_path_factory.mktemp("gauntlet")
    gauntlet.main([*words(folder), "--workers", "2"])
    return folder


def words(folder) -> list[str]:
    line = f"--settings digits --families trigger --seeds 7 --benign 80 --runs {folder}/runs --out {folder}/gauntlet"
    return line.split()


@pytest.fixture(scope="module")
def figures(part) -> pd.DataFrame:
    return gauntlet_figures.committed(part / "gauntlet.csv")


def test_every_detector_has_figures_in_every_cell(figures):
    assert figures.columns[: len(COLUMNS)].tolist() == COLUMNS
    assert set(figures["family"]) == {"trigger", "none"}
    assert set(figures["partition"]) == {"iid", "dirichlet"}
    asked = set(DETECTORS) - gauntlet_scores.NEED_SERVER_DATA
    panels = {"panel (clean stretch)", "panel (each cohort)"}
    assert set(figures["detector"]) == asked | panels
    assert set(figures["per"]) == {"update", "client"}


def test_shares_are_shares_inside_their_intervals(figures):
    assert figures["value"].between(0, 1).all()
    known = figures.dropna(subset=["low", "high"])
    assert (known["low"] <= known["value"] + 1e-4).all()
    assert (known["value"] <= known["high"] + 1e-4).all()


def test_attack_free_runs_have_rates_of_false_alarm_only(figures):
    free = figures[figures["family"].eq("none")]
    assert set(free["metric"]) <= {"fpr_1", "fpr_5"}
    assert not free["works"].any()
    attacked = figures[figures["family"].eq("trigger")]
    assert {"auc", "tpr_1", "tpr_5"} <= set(attacked["metric"])


def test_the_panel_finds_an_iid_trigger(figures):
    found = figures.query("detector == 'panel' and family == 'trigger' and partition == 'iid' and per == 'client'")
    assert found.set_index("metric")["value"]["auc"] > 0.95


def test_the_page_is_one_file_and_names_what_it_shows(part):
    page = (part / "gauntlet.html").read_text()
    assert "<script src" not in page
    assert 'src="http' not in page
    for word in ("krum", "panel", "trigger", "Attack-free", "attack-free runs of other seeds"):
        assert word in page


def test_what_was_analyzed_is_neither_simulated_nor_analyzed_again(part, monkeypatch):
    before = (part / "gauntlet.csv").read_bytes()

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("it runs again")

    monkeypatch.setattr(gauntlet, "run_sweep", refuse)
    gauntlet.main([*words(part), "--workers", "1"])
    assert (part / "gauntlet.csv").read_bytes() == before


def test_logs_are_let_go_of_but_controls_stay(part):
    kept = [path for path in (part / "runs" / "digits").iterdir() if path.is_dir()]
    assert len(kept) == 2


def test_the_scenarios_hold_the_attacks_of_the_committed_gauntlet():
    committed = gauntlet_figures.committed()
    for setting in ("digits", "fashion_mnist"):
        scenarios = load_sweep(SCENARIOS / f"gauntlet_{setting}.toml", seed=0).scenarios
        families = {main_part(each.attack) for each in scenarios if not each.is_control}
        assert families == set(committed.loc[committed["task"].eq(setting), "family"]) - {"none"}
        assert families <= set(ATTACKS)  # a new attack is not there yet
        assert {next(iter(each.partition)) for each in scenarios} == {"iid", "dirichlet"}


@pytest.mark.parametrize(
    ("attack", "family"),
    [
        ({"trigger": {}}, "trigger"),
        ({"trigger": {}, "scaling": {}}, "scaling"),
        ({"trigger": {}, "norm_bound": {}, "scaling": {}}, "norm_bound"),
        ({"label_flip": {}, "scaling": {}}, "label_flip"),
        ({}, "none"),
    ],
)
def test_a_family_is_what_an_attack_is_about(attack, family):
    assert main_part(attack) == family


def test_the_section_is_made_of_the_committed_figures():
    figures = gauntlet_figures.committed()
    text = gauntlet_page.section(figures)
    assert text.startswith("## The detectors, measured")
    best = gauntlet_page.ranking(figures[figures["per"].eq("client") & figures["works"].eq(1)]).index[0]
    assert f"| `{best}` |" in text
    assert "nan" not in text


def test_the_committed_gauntlet_is_whole():
    figures = gauntlet_figures.committed()
    attacked = figures[figures["family"].ne("none")]
    assert attacked.groupby("task")["family"].nunique().ge(20).all()
    assert (attacked.query("metric == 'auc' and detector == 'panel'")["seeds"] >= 5).all()
    assert np.isin(["full", "sampled", "sampled, every third round"], figures["setting"].unique()).all()


@pytest.fixture
def own_package(tmp_path, monkeypatch):
    """A module of the user's own with a detector, that is importable here and in worker processes."""
    (tmp_path / "own_detectors.py").write_text(OWN_DETECTOR)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    sys.modules.pop("own_detectors", None)


def test_a_detector_and_a_scenario_of_ones_own_take_part(own_package):
    (own_package / "mine.toml").write_text(
        "num_malicious = 4\nrounds = 6\nschedule = { from_round = { first = 2 } }\n[attack.sign_flip]\nfactor = 3.0\n"
    )
    line = f"--settings {own_package}/mine.toml --seeds 3 --benign 40 --detectors layer_norms,own_detectors:own_norms"
    gauntlet.main([*line.split(), "--runs", f"{own_package}/runs", "--out", f"{own_package}/own", "--workers", "1"])
    figures = gauntlet_figures.committed(own_package / "own.csv")
    assert set(figures["family"]) == {"sign_flip", "none"}
    assert set(figures["detector"]) >= {"layer_norms", "own_detectors:own_norms", "panel"}
    aucs = figures[figures["metric"].eq("auc") & figures["per"].eq("client")].set_index("detector")["value"]
    assert aucs["own_detectors:own_norms"] == aucs["layer_norms"]  # the same scores
    assert "own_detectors:own_norms" in (own_package / "own.html").read_text()


def test_a_further_attack_is_run_in_every_partition_of_a_setting():
    chosen = [each for each in gauntlet.cells("digits", [5], attacks=["sign_flip"]) if not each.is_control]
    assert [main_part(each.attack) for each in chosen] == ["sign_flip"] * 2
    assert [next(iter(each.partition)) for each in chosen] == ["iid", "dirichlet"]
    assert {each.seed for each in chosen} == {5}
    with_families = gauntlet.cells("digits", [5], ["trigger"], ["zero"])
    assert {main_part(each.attack) for each in with_families} == {"none", "trigger", "zero"}


def test_the_digest_changes_with_the_detectors_and_the_code_behind_them(own_package):
    before = gauntlet_scores.digest(("layer_norms", "panel"))
    assert before == gauntlet_scores.digest(("panel", "layer_norms"))
    assert before != gauntlet_scores.digest(("panel",))
    names = ("own_detectors:own_norms", "panel")
    own = gauntlet_scores.digest(names)
    (own_package / "own_detectors.py").write_text(OWN_DETECTOR.replace("5.0", "4.0"))
    assert gauntlet_scores.digest(names) != own


def test_an_unknown_detector_is_one_line():
    with pytest.raises(InputError, match=r"there is no 'kurm'; did you mean krum"):
        gauntlet_scores.detector_names(["kurm"])
