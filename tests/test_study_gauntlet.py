"""The gauntlet: a small part of it runs, its figures hold together, and what was analysed is read again."""

import sys

import numpy as np
import pandas as pd
import pytest

from conftest import ROOT
from gradlens.detectors import DETECTORS
from simulations import ATTACKS, load_sweep
from simulations.scenario import SCENARIOS

COLUMNS = ["detector", "family", "adaptive", "works", "partition", "per", "metric", "value", "low", "high", "seeds"]


@pytest.fixture(scope="module")
def scripts():
    """The modules gauntlet and gauntlet_tables of the folder of reports."""
    sys.path.append(str(ROOT / "reports"))  # worker processes look there, too
    import gauntlet
    import gauntlet_page
    import gauntlet_tables

    yield gauntlet, gauntlet_tables, gauntlet_page
    sys.path.remove(str(ROOT / "reports"))


@pytest.fixture(scope="module")
def part(scripts, tmp_path_factory):
    """The folder of a gauntlet of one attack and one seed, with four attack-free runs of each partition."""
    folder = tmp_path_factory.mktemp("gauntlet")
    words = f"--settings digits --families trigger --seeds 7 --benign 80 --runs {folder}/runs --out {folder}/gauntlet"
    scripts[0].main([*words.split(), "--workers", "2"])
    return folder


@pytest.fixture(scope="module")
def figures(scripts, part) -> pd.DataFrame:
    return scripts[1].committed(part / "gauntlet.csv")


def test_every_detector_has_figures_in_every_cell(figures, scripts):
    assert figures.columns[: len(COLUMNS)].tolist() == COLUMNS
    assert set(figures["family"]) == {"trigger", "none"}
    assert set(figures["partition"]) == {"iid", "dirichlet"}
    asked = set(DETECTORS) - scripts[0].NEEDS
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


def test_what_was_analysed_is_neither_simulated_nor_analysed_again(scripts, part, monkeypatch):
    before = (part / "gauntlet.csv").read_bytes()

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("it runs again")

    monkeypatch.setattr(scripts[0], "run_sweep", refuse)
    words = f"--settings digits --families trigger --seeds 7 --benign 80 --runs {part}/runs --out {part}/gauntlet"
    scripts[0].main([*words.split(), "--workers", "1"])
    assert (part / "gauntlet.csv").read_bytes() == before


def test_logs_are_let_go_of_but_controls_stay(part):
    kept = [path for path in (part / "runs" / "digits").iterdir() if path.is_dir()]
    assert len(kept) == 2


def test_every_attack_on_images_is_in_the_gauntlet(scripts):
    elsewhere = {"semantic", "text_trigger", "writer_class"}  # need other data
    for setting in ("digits", "fashion_mnist"):
        scenarios = load_sweep(SCENARIOS / f"gauntlet_{setting}.toml", seed=0).scenarios
        families = {scripts[1].family(each.attack) for each in scenarios if not each.is_control}
        assert families == set(ATTACKS) - elsewhere
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
def test_a_family_is_what_an_attack_is_about(scripts, attack, family):
    assert scripts[1].family(attack) == family


def test_the_readme_shows_the_committed_gauntlet(scripts):
    path = ROOT / "reports" / "gauntlet.csv"
    readme, page = (ROOT / "README.md").read_text(), scripts[2]
    shown = readme.split(page.BEGIN)[1].split(page.END)[0].strip("\n")
    assert shown == page.readme_section(scripts[1].committed(path))


def test_the_committed_gauntlet_is_whole(scripts):
    figures = scripts[1].committed(ROOT / "reports" / "gauntlet.csv")
    attacked = figures[figures["family"].ne("none")]
    assert attacked.groupby("task")["family"].nunique().ge(20).all()
    assert (attacked.query("metric == 'auc' and detector == 'panel'")["seeds"] >= 5).all()
    assert np.isin(["full", "sampled", "sampled, every third round"], figures["setting"].unique()).all()
