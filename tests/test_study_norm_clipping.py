"""The page on norm clipping and weak DP: figures of every run and its control, and sentences that follow them."""

import html

import numpy as np
import pandas as pd
import pytest

from conftest import ROOT
from gradlens.errors import InputError
from simulations import Scenario, load_sweep, run_sweep, sweep
from simulations.studies import norm_clipping
from simulations.studies import norm_clipping_figures as study
from simulations.studies import norm_clipping_findings as told
from simulations.studies.norm_clipping_page import page
from simulations.studies.results import REPORTS

BASE = Scenario(
    task="digits", model="mlp", partition="pseudo_writer", num_clients=12, clients_per_round=6, rounds=6,
    local_epochs=5, num_malicious=1, schedule={"every_nth": {"period": 1, "first": 2}},
)  # fmt: skip
RULES = ["mean", {"norm_clipping": {"bound": 1.5}}, {"norm_clipping": {"bound": 9.0}}]
NOISY = {"weak_dp": {"bound": 9.0, "std": 0.01}}


def boosted(tasks: int) -> dict:
    return {"writer_class": {"targets": tasks}, "explicit_boosting": {}}


def bounded(bound: float) -> dict:
    """The attack of somebody who knows the bound, among six clients."""
    return {
        "writer_class": {"targets": 4},
        "norm_bound": {"bound": bound / 6, "every": 5},
        "scaling": {"factor": 6.0},
    }


@pytest.fixture(scope="module", autouse=True)
def short():
    """Few rounds to average over, and one detector."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study, "LAST_ROUNDS", 2)
        patch.setattr(study, "DETECTOR_NAMES", ("layer_norms",))
        yield


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The report's kinds of cells on digits, two seeds of six rounds, attacked from round 2 on."""
    seeds = [0, 1]
    cells = sweep(BASE, attack=[boosted(4)], aggregator=[*RULES, NOISY], seed=seeds)
    cells += sweep(BASE, attack=[bounded(1.5)], poison_rate=[0.5], aggregator=[RULES[1]], seed=seeds)
    cells += sweep(BASE, attack=[bounded(9.0)], poison_rate=[0.5], aggregator=[RULES[2], NOISY], seed=seeds)
    cells += sweep(BASE, attack=[boosted(4)], num_malicious=[2], seed=seeds)
    cells += sweep(BASE, attack=[boosted(2)], seed=seeds)
    return run_sweep(cells, tmp_path_factory.mktemp("clipping") / "sweep", progress=False)


@pytest.fixture(scope="module")
def figures(small):
    return study.gathered([small], progress=False)


def test_every_run_and_its_control_are_told(small, figures):
    runs = figures[figures["part"].eq("runs")]
    assert len(runs) == len(small.runs) == 8 + 2 * (4 + 3 + 1 + 1)
    assert runs["attack"].value_counts().to_dict() == {"unconstrained": 12, "none": 8, "norm-bounded": 6}
    one = runs[runs["attack"].eq("unconstrained") & runs["bound"].eq(1.5) & runs["seed"].eq(1)].iloc[0]
    wanted = BASE.replace(attack=boosted(4), aggregator=RULES[1], seed=1)
    run, control = small.run(wanted.digest), small.run(wanted.control.digest)
    assert one["asr"] == run.metrics["asr"].iloc[-2:].mean()
    assert one["control_accuracy"] == control.metrics["main_accuracy"].iloc[-2:].mean()
    on_control = small.controls[small.controls["run"].eq(run.name)].set_index("round")["asr"]
    assert one["control_asr"] == on_control.loc[4:5].mean()
    assert sorted(runs["fraction"].unique()) == [0, 1 / 6, 2 / 6]


def test_what_is_clipped_is_what_is_longer_than_the_bound(small, figures):
    runs = figures[figures["part"].eq("runs")]
    norm_bounded = runs[runs["attack"].eq("norm-bounded")]
    assert norm_bounded["clipped"].eq(0).all()  # their senders know the bound
    tight = runs[runs["bound"].eq(1.5)]
    assert tight.loc[tight["attack"].eq("unconstrained"), "clipped"].eq(1).all()
    assert runs.loc[runs["bound"].isna(), ["clipped", "clipped_benign"]].isna().all(axis=None)
    free = small.run(BASE.replace(attack=boosted(4), aggregator=RULES[1]).control.digest)
    longer = [
        np.linalg.norm(np.concatenate([update[i].ravel() for update in round_.updates.values()])) > 1.5
        for round_ in free.log[2:6]
        for i in range(len(round_.clients))
    ]
    told = tight.loc[tight["attack"].eq("none") & tight["seed"].eq(0), "clipped_benign"].item()
    assert told == pytest.approx(np.mean(longer))
    assert 0 < told < 1


def test_norms_are_those_of_attack_free_runs_without_a_defense(small, figures):
    norms = figures[figures["part"].eq("norms")]
    whole = norms[norms["round"].isna()].iloc[0]
    logs = [small.run(BASE.replace(seed=seed).control.digest).log for seed in (0, 1)]
    found = [
        np.linalg.norm(np.concatenate([update[i].ravel() for update in round_.updates.values()]))
        for log in logs
        for round_ in log[2:6]
        for i in range(len(round_.clients))
    ]
    assert whole[["q50", "q90"]].tolist() == pytest.approx(np.quantile(found, [0.5, 0.9]), rel=1e-5)
    assert len(norms) == 2 * 6 + 1
    assert whole["first"] == 2


def test_the_page_is_written_from_the_figures(small, figures):
    text = page(figures, small.runs)
    assert text.count("<img") == 4
    said = sentences(told.findings(told.places_of(figures)))
    assert "nan" not in said.lower()
    assert "Every norm-bounded update passes the clipping whole." in said
    (place,) = told.places_of(figures)
    assert place.rules[0] == "no defense"
    assert [rule.split(" at ")[0] for rule in place.rules[1:]] == ["clipping", "clipping", "weak DP"]
    own = place.runs[place.runs["rule"].eq("no defense")]
    here = own[own["tasks"].ne(2) & own["malicious"].ne(2)]
    free, attacked = (here[here["attack"].eq(name)] for name in ("none", "unconstrained"))
    points = 100 * (attacked.set_index("seed")["main_accuracy"] - free.set_index("seed")["main_accuracy"])
    assert told.cost(place, attacked).mean == pytest.approx(points.mean())


def test_other_figures_give_other_sentences(figures):
    def said(**changes) -> str:
        runs = figures["part"].eq("runs") & figures["attack"].ne("none")
        changed = figures.copy()
        for name, value in changes.items():
            changed.loc[runs, name] = value(changed[runs]) if callable(value) else value
        return sentences(told.findings(told.places_of(changed)))

    deaf = said(asr=0.1, control_asr=0.05)
    assert "implants the backdoor in 0 of 1 condition" in deaf
    assert "In 1 of 1 condition there is an M" in deaf
    assert "stops the attack that does not know of it at 2 of 2 bounds" in deaf
    won = said(asr=0.9, control_asr=0.05)
    assert "implants the backdoor in 1 of 1 condition" in won
    assert "In 0 of 1 condition there is an M" in won
    assert "no M stops it" in won
    but_one = said(asr=lambda rows: np.where(rows["seed"].eq(0), 0.2, 0.05), control_asr=0.05)
    assert "In 0 of 1 condition there is an M" in but_one
    assert "By the means alone: 1 and" in but_one
    assert "no M stops it" not in but_one
    assert "at 0 of 2 bounds, by the means alone at 2" in but_one
    farther = said(asr=lambda rows: np.where(rows["attack"].eq("norm-bounded"), 0.9, 0.1), control_asr=0.1)
    assert "the attack that knows M gets farther by more than 0.1 at 2." in farther
    assert "where ASR above control is over 0.1, at" in farther
    assert "where ASR above control is at most 0.1, at" in deaf
    only_tight = said(asr=lambda rows: np.where(rows["bound"].eq(1.5), 0.1, 0.9), control_asr=0.1)
    (place,) = told.places_of(figures)
    tight = told.rule_name(1.5, np.nan, place.q90)
    assert f"{tight} and below" in only_tight
    assert "no attack in 1." in said(asr=0.1, control_asr=0.05, main_accuracy=1.0)
    assert "no attack in 0." in said(asr=0.1, control_asr=0.05, main_accuracy=0.1)
    clipped = said(clipped=0.25)
    assert "Up to 25\N{NO-BREAK SPACE}% of a run's norm-bounded updates are clipped." in clipped


def test_what_is_no_such_sweep_is_refused(small, tmp_path):
    gathered = study.gathered
    krum = run_sweep(
        sweep(BASE.replace(rounds=3), attack=[boosted(4)], aggregator=["krum"]), tmp_path / "krum", progress=False
    )
    with pytest.raises(InputError, match="found krum"):
        gathered([krum], progress=False)
    alone = run_sweep([BASE.control.replace(rounds=3)], tmp_path / "alone", progress=False)
    with pytest.raises(InputError, match="found no pair"):
        gathered([alone], progress=False)


def test_the_scenarios_senders_know_the_bound():
    """In every cell the norm-bounded attack multiplies up to exactly M, and the noise is 0.005 M or a 30th of it."""
    for name in ("norm_clipping", "norm_clipping_femnist"):
        scenarios = load_sweep(ROOT / f"simulations/scenarios/{name}.toml").scenarios
        for each in scenarios:
            ((_, rule),) = each.aggregator.items()
            cohort = each.clients_per_round or each.num_clients
            if "norm_bound" in each.attack:
                sent = each.attack["norm_bound"]["bound"] * each.attack["scaling"]["factor"]
                assert sent == pytest.approx(rule["bound"])
                assert each.attack["scaling"]["factor"] == cohort
            if "std" in rule:
                assert min(abs(rule["std"] * times / rule["bound"] - 0.005) for times in (1, cohort)) < 1e-5


@pytest.mark.xfail(reason="the committed page has intervals by resampling: remake it", strict=True)
def test_the_committed_page_says_what_the_committed_figures_hold():
    found = pd.read_csv(REPORTS / "norm_clipping.csv")
    runs = found[found["part"].eq("runs")]
    cells = runs.groupby(["task", "bound", "std", "attack", "malicious", "period", "tasks"], dropna=False)["seed"]
    assert cells.nunique().eq(3).all()
    scenarios = [
        scenario
        for name in ("norm_clipping", "norm_clipping_femnist")
        for scenario in load_sweep(ROOT / f"simulations/scenarios/{name}.toml").scenarios
    ]
    assert len(runs) == len(scenarios)
    written = html.unescape((REPORTS / "norm_clipping.html").read_text())
    for block in told.findings(told.places_of(found)):
        for sentence in (block["text"], *block["points"]):
            assert sentence in written


def sentences(blocks) -> str:
    return " ".join(" ".join([block["text"], *block["points"]]) for block in blocks)


def test_the_command_writes_each_sweep_once_and_resumes(figures, small, tmp_path, monkeypatch):
    arguments = [str(small.path), "--out", str(tmp_path / "clipping"), "--workers", "1"]
    norm_clipping.main(arguments)
    written = (tmp_path / "clipping.csv").read_bytes()
    assert len(pd.read_csv(tmp_path / "clipping.csv")) == len(figures)
    page_written = (tmp_path / "clipping.html").read_bytes()

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("it is computed again")

    monkeypatch.setattr(study, "rows_of_sweep", refuse)
    norm_clipping.main([*arguments, "--resume"])
    assert (tmp_path / "clipping.csv").read_bytes() == written
    assert (tmp_path / "clipping.html").read_bytes() == page_written
