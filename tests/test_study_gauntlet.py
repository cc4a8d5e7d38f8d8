"""The gauntlet: a small part of it runs, its figures hold together, and what was analyzed is read again."""

import sys
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from gradlens.detectors import DETECTORS
from gradlens.errors import InputError
from simulations import ATTACKS, Scenario, load_sweep
from simulations.scenario import SCENARIOS
from simulations.studies import gauntlet, gauntlet_figures, gauntlet_page, gauntlet_scores
from simulations.studies.conditions import ADAPTIVE, UNCAPPED, family, main_part

COLUMNS = ["detector", "family", "adaptive", "norm", "works", "partition", "purpose", "per", "metric", "value", "low"]
OLD = ["norm", "purpose"]  # columns that a table from before seeds were split does not have

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
    assert set(free["purpose"]) == {"attack-free"}
    assert not free["works"].any()
    attacked = figures[figures["family"].eq("trigger")]
    assert set(gauntlet_figures.METRICS) == set(attacked["metric"])
    assert set(attacked["purpose"]) == {"confirm"}  # seed 7
    assert attacked["norm"].between(0.5, 2).all()  # an attack that is not boosted is about as long as benign updates


def test_every_detector_pays_while_attacked_and_at_a_matched_threshold(figures):
    attacked = figures[figures["family"].eq("trigger")]
    for metric in ("fpr_5", "fpr_5_matched", "tpr_5_matched"):
        assert set(attacked.loc[attacked["metric"].eq(metric), "detector"]) == set(figures["detector"])
    paid = attacked[attacked["metric"].eq("fpr_5_matched") & attacked["per"].eq("update")]
    assert (gauntlet_page.observed(paid) <= 0.05).all()  # no other cell: its own benign updates set the threshold


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


def test_a_setting_takes_the_place_of_what_was_there_of_it_and_of_no_other(part):
    tables = gauntlet_figures.Tables.read(part / "gauntlet")
    assert set(tables.runs["kind"]) == {"attacked", "control", "attack-free"}
    assert len(set(tables.runs["code"])) == 1
    others = gauntlet_figures.Tables(*(table.assign(task="fashion_mnist") for table in tables))
    changed = tables.figures.assign(value=0.5)
    both = tables._replace(figures=changed).beside(tables).beside(others)
    for joined, own in zip(both, tables, strict=True):
        assert len(joined) == 2 * len(own)
        assert set(joined["task"]) == {"digits", "fashion_mnist"}
    assert both.figures.loc[both.figures["task"].eq("digits"), "value"].eq(0.5).all()


def test_a_part_does_not_touch_the_committed_tables(tmp_path, monkeypatch):
    committed, part = tmp_path / "committed", tmp_path / "part"
    monkeypatch.setattr(gauntlet, "OUT", committed)
    monkeypatch.setattr(gauntlet, "PART", part)
    line = "--settings digits --families trigger --seeds 7 --benign 40 --detectors layer_norms --workers 1"
    gauntlet.main([*line.split(), "--runs", str(tmp_path / "runs")])
    assert part.with_suffix(".csv").exists()
    assert not committed.with_suffix(".csv").exists()


def test_what_is_not_confirmed_yet_is_left_out_and_said(figures):
    waiting = figures.assign(value=0.5).replace({"purpose": {"confirm": "choose"}, "task": {"digits": "fashion_mnist"}})
    text = gauntlet_page.section(pd.concat([figures, waiting], ignore_index=True))
    body = text.partition("| detector")[2]
    assert body == gauntlet_page.section(figures).partition("| detector")[2]
    assert "**Not confirmed yet, and left out here**: Fashion-MNIST (full)." in text


def test_logs_are_let_go_of_but_controls_stay(part):
    kept = [path for path in (part / "runs" / "digits").iterdir() if path.is_dir()]
    assert len(kept) == 2


def is_confirmed(figures) -> bool:
    """Whether the table has the seeds that confirm, which one from before they were split has not."""
    return figures["purpose"].eq("confirm").any()


def test_the_scenarios_hold_the_attacks_of_the_committed_gauntlet():
    committed = gauntlet_figures.committed()
    for setting in ("digits", "fashion_mnist"):
        scenarios = load_sweep(SCENARIOS / f"gauntlet_{setting}.toml", seed=0).scenarios
        families = {family(each.attack) for each in scenarios if not each.is_control}
        of_task = committed[committed["task"].eq(setting)]
        there = set(of_task["family"]) - {"none"}
        assert there == families or (not is_confirmed(of_task) and families - there == UNCAPPED)
        assert {name.removesuffix(" (loud)") for name in families} <= set(ATTACKS)  # a new attack is not there yet
        assert {next(iter(each.partition)) for each in scenarios} == {"iid", "dirichlet"}


def test_an_adaptive_attack_keeps_to_benign_norms_or_is_loud():
    for setting in ("digits", "fashion_mnist"):
        attacks = [each.attack for each in load_sweep(SCENARIOS / f"gauntlet_{setting}.toml", seed=0).scenarios]
        capped = {main_part(attack) for attack in attacks if "norm_cap" in attack}
        assert capped == UNCAPPED
        assert {family(attack) for attack in attacks} >= {f"{name} (loud)" for name in UNCAPPED}
    assert UNCAPPED < ADAPTIVE


def test_seeds_that_choose_and_seeds_that_confirm_are_apart():
    assert not set(gauntlet_scores.CHOOSE_SEEDS) & set(gauntlet_scores.CONFIRM_SEEDS)
    for setting in gauntlet.SETTINGS:
        seeds = {each.seed for each in load_sweep(SCENARIOS / f"gauntlet_{setting}.toml").scenarios}
        assert seeds == {*gauntlet_scores.CHOOSE_SEEDS, *gauntlet_scores.CONFIRM_SEEDS}


@pytest.mark.parametrize(
    ("attack", "part", "shown"),
    [
        (["trigger"], "trigger", "trigger"),
        (["trigger", "norm_cap"], "trigger", "trigger"),
        (["trigger", "scaling"], "scaling", "scaling"),
        (["trigger", "scaling", "norm_cap"], "scaling", "scaling"),
        (["trigger", "norm_bound", "scaling"], "norm_bound", "norm_bound (loud)"),
        (["trigger", "norm_bound", "scaling", "norm_cap"], "norm_bound", "norm_bound"),
        (["label_flip", "scaling"], "label_flip", "label_flip"),
        (["trigger", "train_and_scale"], "train_and_scale", "train_and_scale"),
        ([], "none", "none"),
    ],
)
def test_a_family_is_what_an_attack_is_about(attack, part, shown):
    assert (main_part(attack), family(attack)) == (part, shown)


# Thresholds by which all detectors pay alike


@pytest.mark.parametrize(
    ("cells", "fpr", "threshold"),
    [
        ([[1, 2, 3, 4]], 0.25, 3),
        ([[1, 2, 3, 4]], 0.24, 4),
        (
            [[1, 2, 3, 4], [0] * 100],
            0.25,
            2,
        ),  # a half of the first cell and nothing of the second: a quarter on average
        ([[5, 5, 5, 1]], 0.5, 5),  # scores that are equal are flagged together
        ([[1, np.inf], [2, 3]], 0.25, 3),  # one in four is flagged whatever the threshold
    ],
)
def test_a_matched_threshold(cells, fpr, threshold):
    assert gauntlet_figures.matched_threshold([np.array(each, float) for each in cells], fpr) == threshold


def clients(family: str, benign: list[float], malicious: list[float], purpose: str = "confirm") -> pd.DataFrame:
    """Scores of the clients of one run."""
    scores = pd.DataFrame({"score": [*benign, *malicious]})
    scores["malicious"] = scores.index >= len(benign)
    cell = {"task": "digits", "setting": "full", "partition": "iid", "family": family}
    return scores.assign(**cell, purpose=purpose, detector="krum", seed=5, abstained="")


def cell(family: str) -> tuple[str, ...]:
    return ("digits", "full", "iid", family)


def test_a_cell_is_judged_at_the_threshold_of_the_others_that_work():
    hundred = np.arange(100.0)
    scores = pd.concat(
        [
            clients("trigger", [*hundred], [60.0, 95.0]),  # 5 of 100 exceed 94
            clients("scaling", [*(hundred / 2)], [60.0, 40.0]),  # 5 of 100 exceed 47
            clients("zero", [*(hundred * 9)], [60.0, 95.0]),  # does not work, so that it sets no threshold
            clients("trigger", [*hundred], [10.0], purpose="choose"),
        ],
        ignore_index=True,
    )
    rates = gauntlet_figures.matched_rates(scores, {cell("trigger"), cell("scaling")})
    found = rates.set_index(["purpose", "family", "metric"])["value"]
    assert found["confirm", "trigger", "tpr_5_matched"] == 1  # above 47
    assert found["confirm", "trigger", "fpr_5_matched"] == 0.52
    assert found["confirm", "scaling", "tpr_5_matched"] == 0  # above 94
    assert found["confirm", "zero", "tpr_5_matched"] == 0.5  # above 89: 10 % of the one, none of the other
    assert found["choose", "trigger", "fpr_5_matched"] == 0.05  # there is no other cell


def test_no_attack_that_works_leaves_nothing_to_match():
    assert gauntlet_figures.matched_rates(clients("zero", [1.0, 2.0], [3.0]), set()).empty


def test_too_few_benign_clients_only_bound_what_is_found():
    rates = gauntlet_figures.matched_rates(clients("trigger", [1.0, 2.0, 3.0], [4.0]), {cell("trigger")})
    assert rates.set_index("metric")["bound"].to_dict() == dict.fromkeys(rates["metric"], "<=")
    assert gauntlet_page.observed(rates[rates["metric"].eq("fpr_5_matched")]).tolist() == [0.0]


def test_updates_count_since_the_attack_began_and_clients_over_all_of_their_rounds():
    rounds = np.repeat(np.arange(3), 2)
    arrays = {
        "round": rounds, "client": np.tile(["a", "b"], 3), "norms": np.array([1.0, 1.0, 1.0, 4.0, 2.0, 6.0]),
        "poisoned": np.array([0, 0, 0, 1, 0, 1], bool), "compromised": np.tile([False, True], 3),
        "detectors": np.array(["krum"]), "answers": np.ones((1, 2, 6), np.float32),
    }  # fmt: skip
    scenario = Scenario(attack="trigger", num_malicious=1, seed=5)
    run = gauntlet_scores.RunScores(scenario, "digits", arrays)
    assert run.scored_by("krum")["begun"].tolist() == [False, False, True, True, True, True]
    assert run.norm == 3.5  # 4 and 3 benign norms
    assert [replace(run, scenario=scenario.replace(seed=seed)).purpose for seed in (4, 5, 11)] == [
        "choose", "confirm", "confirm",
    ]  # fmt: skip
    assert replace(run, scenario=scenario.control).purpose == "attack-free"


def test_the_section_is_made_of_the_committed_figures():
    figures = gauntlet_figures.committed()
    text = gauntlet_page.section(figures)
    assert text.startswith("## The detectors, measured")
    shown = gauntlet_page.of_purpose(figures, gauntlet_page.ranking_purpose(figures))
    best = gauntlet_page.ranking(shown[shown["per"].eq("client") & shown["works"].eq(1)]).index[0]
    assert f"| `{best}` |" in text
    assert "nan" not in text
    assert ("**Not confirmed**" in text) == (not is_confirmed(figures))


def test_a_table_from_before_seeds_were_split_says_so(figures, tmp_path):
    old = figures[~figures["metric"].str.endswith("_matched")].drop(columns=OLD).replace({"trigger": "norm_bound"})
    old.to_csv(tmp_path / "old.csv", index=False)
    read = gauntlet_figures.committed(tmp_path / "old.csv")
    assert set(read["purpose"]) == {"choose", "attack-free"}
    assert set(read["family"]) == {"norm_bound (loud)", "none"}
    text = gauntlet_page.section(read)
    assert "**Not confirmed**" in text
    assert "**Thresholds are not matched in this table**" in text
    assert "TPR at 5 %, matched" not in text


def test_the_seeds_that_confirm_rank_and_those_that_choose_stand_beside(figures):
    chosen = figures[figures["purpose"].eq("confirm")].assign(purpose="choose")
    both = pd.concat([figures, chosen.assign(value=chosen["value"] / 2)], ignore_index=True)
    text = gauntlet_page.section(both)
    assert "**" not in text
    assert "matched 5 %, choosing seeds" in text
    assert gauntlet_page.section(figures).splitlines()[2:6] == text.splitlines()[2:6]  # what ranks is as before


def test_the_committed_gauntlet_is_whole():
    figures = gauntlet_figures.committed()
    attacked = figures[figures["family"].ne("none")]
    assert attacked.groupby("task")["family"].nunique().ge(20).all()
    assert (attacked.query("metric == 'auc' and detector == 'panel' and purpose == 'choose'")["seeds"] >= 5).all()
    if is_confirmed(figures):
        confirmed = gauntlet_page.of_settings(attacked, attacked[attacked["purpose"].eq("confirm")])
        adaptive = confirmed.query("adaptive == 1 and works == 1").drop_duplicates([*gauntlet_figures.KEYS])
        assert (adaptive["norm"] < 1.5).all()
        assert (attacked.query("family.str.endswith('(loud)')", engine="python")["adaptive"] == 0).all()
    assert np.isin(["full", "sampled", "sampled, every third round"], figures["setting"].unique()).all()


@pytest.mark.xfail(reason="Fashion-MNIST and sampled cohorts are confirmed on three seeds so far", strict=True)
def test_the_committed_gauntlet_has_five_seeds_everywhere():
    figures = gauntlet_figures.committed()
    attacked = figures[figures["family"].ne("none")]
    assert (attacked.query("metric == 'auc' and detector == 'panel'")["seeds"] >= 5).all()


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
