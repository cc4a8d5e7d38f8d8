"""The page on what is left of a backdoor: a row per step of every run, and sentences that follow the figures."""

import html

import numpy as np
import pandas as pd
import pytest

from conftest import ROOT
from gradlens.errors import InputError
from simulations import load_sweep, run_sweep
from simulations.studies import pruning, pruning_page
from simulations.studies import pruning_findings as told
from simulations.studies import pruning_steps as steps_of
from simulations.studies.results import REPORTS


@pytest.fixture(scope="module", autouse=True)
def short():
    """Fewer images and liars."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(steps_of, "VALIDATION_IMAGES", 90)
        patch.setattr(steps_of, "LIARS", (1, 3))
        yield


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The report's scenarios on digits, two seeds of six rounds."""
    changes = {
        "task": "digits", "samples_per_client": None, "rounds": 6, "partition": "iid", "model": "mlp",
        "schedule": {"from_round": {"first": 2}},
    }  # fmt: skip
    toml = ROOT / "simulations/scenarios/pruning.toml"
    scenarios = [each for seed in (0, 1) for each in load_sweep(toml, seed=seed, **changes).scenarios]
    return run_sweep(scenarios, tmp_path_factory.mktemp("pruning") / "sweep", progress=False).runs


@pytest.fixture(scope="module")
def figures(small):
    return steps_of.gathered(small)


def test_the_report_has_every_step_of_every_run_and_its_control(small, figures):
    steps = figures[figures["part"].eq("steps")]
    assert steps.groupby(["seed", "control"])["step"].nunique().tolist() == [9, 7] * 2
    assert figures.loc[figures["part"].eq("lies"), "liars"].value_counts().to_dict() == {1: 16, 3: 16}
    assert figures["main_accuracy"].between(0, 1).all()
    assert figures["asr"].between(0, 1).all()
    none = steps[steps["step"].eq(steps_of.NOTHING)].set_index(["seed", "control"])["asr"]
    assert (none.xs(False, level="control") > none.xs(True, level="control")).all()
    whole = figures[figures["part"].eq("channels") & figures["value"].eq(0)].set_index(["seed", "control"])["asr"]
    assert whole.to_dict() == none.to_dict()
    assert pruning_page.page(figures, small).count("<img") == 4
    said = " ".join(" ".join([block["text"], *block["points"]]) for block in told.findings(figures))
    assert "nan" not in said
    for step in (steps_of.PRUNING, steps_of.ADJUSTMENT):
        own = steps[steps["step"].eq(step) & ~steps["control"] & steps["how"].fillna("ranks").eq("ranks")]
        assert f"to {own['asr'].mean():.2f} [" in said


def test_other_figures_give_other_sentences(small, figures):
    mended = figures.assign(asr=np.where(figures["step"].isin([steps_of.PRUNING, steps_of.BOTH]), 0.05, 0.9))
    said = told.effect(mended[mended["part"].eq("steps")], steps_of.PRUNING)["text"]
    assert "lowers the mean ASR by 0.3 or more in 1 of 1 condition, to below 0.2 in 1" in said
    worse = mended.assign(asr=np.where(mended["liars"].eq(3), 0.5, mended["asr"]))
    assert "by 0.1 or more in 4 of 4 kinds" in told.liars(worse)["text"]
    assert "by 0.1 or more in 0 of 4 kinds" in told.liars(mended)["text"]
    assert "in 0 of 1 condition, compared with" in told.before_tuning(mended[mended["part"].eq("steps")])["text"]
    tuned = mended.assign(asr=np.where(mended["step"].eq(steps_of.TUNED), 0.1, mended["asr"]))
    assert "in 1 of 1 condition, compared with" in told.before_tuning(tuned[tuned["part"].eq("steps")])["text"]
    with pytest.raises(InputError, match="found no pair"):
        steps_of.gathered(small[:1])


@pytest.mark.xfail(reason="the committed page has intervals by resampling: remake it", strict=True)
def test_the_committed_page_says_what_the_committed_figures_hold():
    found = pd.read_csv(REPORTS / "pruning.csv")
    steps = found[found["part"].eq("steps")]
    seeds = steps.groupby(["model", "partition", "control", "step"], sort=False)["seed"].nunique()
    each = seeds.groupby(level=["model", "partition"], sort=False)
    assert each.unique().map(list).to_dict() == {
        ("cnn", "iid"): [5],
        ("cnn", "dirichlet 0.5"): [5],
        ("wu_cnn", "iid"): [3],
    }
    assert each.size().eq(9 + 7).all()
    page = html.unescape((REPORTS / "pruning.html").read_text())
    for block in told.findings(found):
        for sentence in (block["text"], *block["points"]):
            assert sentence in page
    said, beside = pruning_page.beside_the_paper(found)
    assert said["text"] in page
    for row in beside["rows"]:
        assert all(cell in page for cell in row)


def test_what_the_paper_says_stands_beside_the_same_steps(figures):
    _, beside = pruning_page.beside_the_paper(figures)
    paper, own, paper_tuned, tuned = beside["rows"]
    assert paper == ["the paper", "both", "99.7 %", "1.9 %", "5.5 points"]
    assert paper_tuned[2:] == ["99.7 %", "6.4 %", "1.7 points"]
    steps = figures[figures["part"].eq("steps") & ~figures["control"] & figures["how"].fillna("ranks").eq("ranks")]
    means = steps.groupby("step")[["asr", "main_accuracy"]].mean()
    for row, step in ((own, steps_of.BOTH), (tuned, steps_of.BETWEEN)):
        assert row[:2] == ["mlp iid", step]
        assert row[3] == f"{100 * means.loc[step, 'asr']:.1f} %"
        lost = 100 * (means.loc[steps_of.NOTHING, "main_accuracy"] - means.loc[step, "main_accuracy"])
        assert row[4].replace("\N{MINUS SIGN}", "-") == f"{lost:.1f} points"


def test_the_command_writes_each_pair_once_and_resumes(small, figures, tmp_path, monkeypatch):
    out = ["--out", str(tmp_path / "pruning")]
    folders = [str(run.path) for run in small]
    first = [folder for folder, run in zip(folders, small, strict=True) if run.scenario["seed"] == 0]
    pruning.main([*first, *out])
    seeds = []
    monkeypatch.setattr(steps_of, "rows_of_pair", lambda *pair: seeds.append(pair[0].seed) or figures.tail(0))
    pruning.main([*folders, *out, "--resume"])
    assert seeds == [1]
    written = pd.read_csv(tmp_path / "pruning.csv")
    assert len(written) == len(figures[figures["seed"].eq(0)])
    assert (tmp_path / "pruning.html").exists()
