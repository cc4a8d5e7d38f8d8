"""The report: what it says is what the tables say, and nothing a client sends can break out of it."""

import json
import pickle
import re
import shutil
from base64 import b64decode, b64encode
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from gradlens import DETECTORS, Recorder, Run, Sweep, calibrate, investigate, report
from gradlens.errors import InputError
from gradlens.evaluation import evaluate
from gradlens.examples import example_log
from gradlens.ingestion import with_csv_truth
from gradlens.localization import PHASES
from gradlens.log import LogWriter, ModelSpec, Round
from gradlens.log.files import write_table
from gradlens.reporting.accusations import named, who
from gradlens.reporting.analysis import analyse, attack_table, attacked_runs, labelled, outcome, thresholds_of, usual
from gradlens.reporting.findings import distinct_controls, sweep_findings
from gradlens.reporting.page import (
    SCRIPT,
    figure,
    finding,
    listed,
    measured,
    number,
    render,
    section,
    table,
    text,
    unbroken,
    write,
)
from gradlens.reporting.pictures import bias_picture, localization_picture, scores_picture
from gradlens.reporting.provenance import plain_value
from gradlens.reporting.run_report import examine, run_findings
from gradlens.reporting.sweep_report import (
    case_table,
    filtered_pairs,
    outcome_table,
    removed,
    representative,
    scores_figure,
    training_table,
)
from gradlens.reporting.vectors import compact
from planted import MODEL, STATE

VOID = {"meta", "br", "img", "link", "hr"}
CLIENTS = tuple(f"client-{i:02d}" for i in range(10))
HOSTILE = ("<script>alert(1)</script>", "$\\frac{$", '"><img src=http://x.y/z onerror=alert(1)>', "北京", *CLIENTS[4:])


# Reading a page -----------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """The tags of a page, which must be balanced; its texts and its pictures."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict]] = []
        self.texts: list[str] = []
        self.feed(self.source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] != ["style"]:
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).replace("\N{NO-BREAK SPACE}", " ").split())

    @property
    def pictures(self) -> list[tuple[str, str, str]]:
        """Alternative text, caption and SVG of every picture."""
        found = [attrs for tag, attrs in self.tags if tag == "img"]
        captions = re.findall(r"<figcaption>(.*?)</figcaption>", self.source, re.DOTALL)
        svg = [b64decode(attrs["src"].removeprefix("data:image/svg+xml;base64,")).decode() for attrs in found]
        return [(a["alt"], c, s) for a, c, s in zip(found, captions, svg, strict=True)]


def is_self_contained(page: Page) -> bool:
    """Nothing is loaded from anywhere, and nothing runs but the script of every page, by its hash."""
    addresses = [attrs[name] for _, attrs in page.tags for name in ("src", "href", "action") if name in attrs]
    inside = all(a.startswith(("#", "data:image/svg+xml;base64,")) for a in addresses)
    handlers = any(name.startswith("on") for _, attrs in page.tags for name in attrs)
    kinds = {tag for tag, _ in page.tags} & {"link", "iframe", "object", "embed", "form"}
    digest = b64encode(sha256(SCRIPT.encode()).digest()).decode()
    policy = next(attrs["content"] for tag, attrs in page.tags if attrs.get("http-equiv") == "Content-Security-Policy")
    runs_ours = f"script-src 'sha256-{digest}'" in policy and page.source.count(f"<script>{SCRIPT}</script>") == 1
    if not runs_ours or [tag for tag, _ in page.tags].count("script") != 1:
        return False
    return inside and not handlers and not kinds and "url(" not in page.source and "@import" not in page.source


# Runs made by hand --------------------------------------------------------------------------------------------


def record(
    path,
    *,
    scenario=None,
    clients=CLIENTS,
    malicious=(),
    rounds=4,
    start=0,
    asr=None,
    truth=True,
    edit=None,
    push=0.6,
    **more,
):
    """Records a run of noise in which malicious clients push class 1 of the final bias up from round `start` on."""
    seed = (scenario or {}).get("seed", 0)
    rows = []
    with LogWriter.create(path, MODEL, STATE, scenario=scenario) as writer:
        for index in range(rounds):
            rng = np.random.default_rng([seed, index])
            updates = {n: (0.05 * rng.normal(size=(len(clients), *a.shape))).astype(a.dtype) for n, a in STATE.items()}
            for i, client in enumerate(clients):
                poisons = client in malicious and index >= start
                updates["fc2.bias"][i, 1] += push * poisons
                rows.append((index, client, client in malicious, poisons))
            if edit:
                edit(updates, index)
            done = Round(
                index, np.array(clients), np.full(len(clients), 9), updates, STATE, **{"buffers": MODEL.buffers} | more
            )
            writer.commit(done, STATE, metrics={"main_accuracy": 0.8 + 0.02 * index, "asr": asr})
        if truth:
            writer.add_truth(pd.DataFrame(rows, columns=["round", "client", "compromised", "poisoned"]))
    return Run.open(path)


def recorded_sweep(
    folder, cells, *, seeds=(0, 1, 2), axes=("attack", "num_malicious", "seed"), chance=0.02, **more
) -> Sweep:
    """A sweep of hand-made runs: cells are (attack, malicious clients, final ASR)."""
    folder.mkdir()
    runs, controls, measured_asr = {}, {}, []
    for seed in seeds:
        control = {"attack": "none", "num_malicious": 0, "seed": seed}
        runs[f"control{seed}"] = control
        record(folder / f"control{seed}", scenario=control, **more)
        for attack, malicious, asr in cells:
            name = f"{attack[:4]}{len(malicious)}{seed}"
            runs[name] = {"attack": attack, "num_malicious": len(malicious), "seed": seed}
            record(folder / name, scenario=runs[name], malicious=malicious, asr=asr + 0.01 * seed, **more)
            controls[name] = f"control{seed}"
            measured_asr += [(name, f"control{seed}", r, chance) for r in range(4)]
    shown = {name: {axis: settings[axis] for axis in axes} for name, settings in runs.items()}
    index = {"format": 1, "axes": list(axes), "runs": shown, "controls": controls}
    (folder / "sweep.json").write_text(json.dumps(index))
    write_table(folder / "controls.arrow", pd.DataFrame(measured_asr, columns=["run", "control", "round", "asr"]))
    return Sweep.open(folder)


CELLS = [("trigger", CLIENTS[:2], 0.9), ("label_flip", CLIENTS[3:4], 0.03)]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Sweep:
    """Two conditions, three seeds: one attack that works, one that fails though it shows in the final bias."""
    return recorded_sweep(tmp_path_factory.mktemp("made") / "sweep", CELLS, push=2.0)


@pytest.fixture(scope="module")
def made_analysis(made):
    return analyse(made, permutations=99)


@pytest.fixture(scope="module")
def made_page(made, tmp_path_factory) -> Page:
    return Page(report(made, tmp_path_factory.mktemp("out") / "report.html", permutations=99))


# A sweep ------------------------------------------------------------------------------------------------------


def test_the_page_is_balanced_self_contained_and_has_every_section(made_page):
    assert is_self_contained(made_page)
    assert not re.search(r"https?://", made_page.source)
    titles = re.findall(r"<h2>(.*?)</h2>", made_page.source)
    assert titles[0] == "Findings"
    assert [title[0] for title in titles[1:-1]] == list("1234567")
    assert titles[-1] == "Words used in this report"
    links = [attrs["href"][1:] for tag, attrs in made_page.tags if tag == "a"]
    anchors = [attrs["id"] for tag, attrs in made_page.tags if tag == "section" and attrs["id"] != "findings"]
    assert links == anchors


def test_no_picture_stands_without_its_control(made_page):
    assert len(made_page.pictures) >= 7
    for alt, caption, svg in made_page.pictures:
        assert alt
        assert caption
        assert re.search(r"<!-- (Attacked|attacked)", svg)
        assert re.search(r"<!-- (Attack-free|attack-free) control", svg)


def test_three_sentences_come_first_what_worked_who_was_found_and_what_the_filter_did(made_analysis):
    found = sweep_findings(made_analysis, representative(made_analysis))
    assert [each["about"] for each in found[:3]] == ["Attack", "Who", "Filter"]
    assert not any(each["points"] for each in found[:3])
    assert found[0]["text"] == (
        "1 of 2 attacked conditions worked (an ASR at least 50 points above the attack-free control), 0 more in part, "
        "and 1 failed; the strongest is trigger, 2 malicious."
    )
    cases = made_analysis.cases
    attacked = cases[cases["recording"].isin(made_analysis.runs.index)]
    established = attacked["verdict"].eq("established").sum()
    assert found[1]["text"].startswith(f"From the recordings alone somebody is accused in {established} of 6 attacked")
    assert f"{attacked['found'].sum()} of 9 attackers are found" in found[1]["text"]
    assert "of 3 attack-free runs somebody is accused" in found[1]["text"]


def test_the_cases_of_a_sweep_are_those_of_its_recordings(made, made_analysis):
    cases = made_analysis.cases.set_index("recording")
    assert set(cases.index) == {run.name for run in made.runs}
    assert cases["q"].notna().eq(cases["p"].notna()).all()
    for name in ("trig20", "labe11", "control2"):
        case, poisoned = investigate(made.run(name)), made.run(name).truth.query("poisoned")["client"].unique()
        assert (cases.loc[name, "verdict"], cases.loc[name, "says"]) == (case.verdict, case.says[0])
        accused = set(case.suspects["client"])
        assert cases.loc[name, "found"] == len(accused & set(poisoned))
        assert cases.loc[name, "innocents"] == len(accused - set(poisoned))
    rows = case_table(made_analysis)
    own = cases.loc[[f"trig2{seed}" for seed in range(3)]]
    assert rows["rows"][0][:2] == ["trigger, 2 malicious", "3"]
    assert rows["rows"][0][3:5] == [f"{own['found'].sum()} of 6", str(own["innocents"].sum())]


def test_the_table_says_which_attack_worked_and_which_failed_with_the_control_beside(made_analysis):
    worked, failed = outcome_table(made_analysis)["rows"]
    assert worked[:4] == ["trigger, 2 malicious", "worked", "0.91", "0.02"]
    assert failed[:4] == ["label_flip, 1 malicious", "failed", "0.04", "0.02"]


def test_findings_name_the_malicious_clients_the_layer_and_the_null(made_page):
    assert "client-00: flagged in 4 of 4 rounds, malicious" in made_page.text
    assert "client-01: flagged in 4 of 4 rounds, malicious" in made_page.text
    assert re.search(r"the anomaly separates best in fc2.bias by final_bias: AUC 1.00 \[1.00, 1.00\]", made_page.text)
    assert "attack-free: 2 runs, 20 clients, 80 scores, fpr 0.05" in made_page.text
    assert "Not tested: no condition was run both with and without a filter." in made_page.text
    assert "the attack begins in round 0" in made_page.text
    benign_too = (
        r"first flags a malicious client in round 0; of 8 benign clients it has flagged by then \d, counted since"
    )
    assert re.search(benign_too, made_page.text)


def test_provenance_names_runs_heads_settings_software_and_commands(made, made_page):
    for run in made.runs:
        assert run.head in made_page.text
    assert f"gradlens report {made.path} -o report.html" in made_page.text
    assert re.search(r"numpy \d+\.\d+\.\d+", made_page.text)
    assert "Thresholds and the null that each rests on" in made_page.text


def test_the_attack_table_holds_the_outcomes(made):
    found = attack_table(made)
    assert found["condition"].tolist() == ["trigger, 2 malicious", "label_flip, 1 malicious"]
    assert found["outcome"].tolist() == ["worked", "failed"]
    np.testing.assert_allclose(found["ASR"], [0.91, 0.04])
    np.testing.assert_allclose(found["difference"], [0.89, 0.02])
    assert found["seeds"].tolist() == [3, 3]


@pytest.mark.parametrize(
    ("difference", "low", "expected"),
    [
        (0.6, 0.4, "worked"),
        (0.5, np.nan, "worked"),
        (0.3, 0.1, "worked in part"),
        (0.3, -0.01, "uncertain"),
        (0.09, 0.05, "failed"),
        (np.nan, np.nan, "not measured"),
    ],
)
def test_an_attack_is_judged_against_its_control(difference, low, expected):
    assert outcome(difference, low) == expected


def test_thresholds_rest_on_the_attack_free_runs_of_other_seeds_only(made, made_analysis):
    rules = made_analysis.thresholds.query("run == 'trig21' and detector == 'final_bias'")
    others = [made.run("control0"), made.run("control2")]
    expected = calibrate(DETECTORS["final_bias"](), others, 0.05)
    assert rules["threshold"].item() == pytest.approx(expected.threshold)
    assert rules["null"].item() == expected.null
    free = made_analysis.thresholds.query("run == 'control1' and detector == 'final_bias'")
    assert free["threshold"].item() == rules["threshold"].item()


def test_false_alarms_are_counted_on_held_out_controls(made_analysis):
    raw = made_analysis.raw.query("detector == 'layer_norms'")
    shares = [raw.loc[raw["run"].eq(f"control{seed}"), "flag"].mean() for seed in range(3)]
    row = made_analysis.alarms.query("detector == 'layer_norms' and metric == 'fpr'")
    assert row["value"].item() == pytest.approx(np.mean(shares))
    assert row["seeds"].item() == 3


def test_too_few_other_seeds_make_the_thresholds_nominal(made):
    found = thresholds_of(usual(["final_bias"]), [made.run("control0")], 0, 0.05)
    assert found["final_bias"].null.startswith("nominal")
    found = thresholds_of(usual(["final_bias"]), [made.run("control1")], 0, 0.001)  # 10 clients cannot tell 0.1 %
    assert found["final_bias"].null.startswith("nominal")


def test_detection_is_evaluated_against_the_control_with_the_same_labels(made, made_analysis):
    scores = labelled(made, made_analysis.runs, made_analysis.raw)
    free = scores[scores["control"] & scores["condition"].eq("trigger, 2 malicious")]
    assert set(free.loc[free["malicious"], "client"]) == set(CLIENTS[:2])
    found = made_analysis.figures.query(
        "metric == 'auc' and detector == 'final_bias' and condition == 'trigger, 2 malicious'"
    )
    assert found.set_index("control")["value"][False] == 1
    again = evaluate(scores, by=["condition", "control"])
    columns = ["condition", "control", "detector", "metric"]
    pd.testing.assert_frame_equal(
        again.sort_values(columns, ignore_index=True), made_analysis.figures.sort_values(columns, ignore_index=True)
    )


def test_an_executor_gives_the_same_tables(made, made_analysis):
    with ThreadPoolExecutor(2) as executor:
        other = analyse(made, permutations=99, executor=executor)
    for name in ("runs", "outcomes", "places", "figures", "alarms", "thresholds"):
        pd.testing.assert_frame_equal(getattr(other, name), getattr(made_analysis, name))
    assert pickle.loads(pickle.dumps(usual())) == usual()  # noqa: S301 - they travel to other processes


def test_the_same_sweep_gives_the_same_bytes_wherever_it_is_analysed_and_drawn(made, made_page, tmp_path):
    with ThreadPoolExecutor(2) as executor:
        again = report(made.path, tmp_path / "again.html", permutations=99, executor=executor)
    assert again.read_text() == made_page.source


def test_equal_control_tests_are_counted_once(made_analysis):
    names = list(made_analysis.outcomes["condition"])
    assert distinct_controls(made_analysis, names) == [[name] for name in names]
    assert distinct_controls(made_analysis, [names[0], names[0]]) == [[names[0], names[0]]]


def test_hostile_names_are_text_everywhere(tmp_path):
    sweep = recorded_sweep(tmp_path / "s", [("<b>x</b>", HOSTILE[:3], 0.9)], seeds=(0, 1), clients=HOSTILE)
    page = Page(report(sweep, tmp_path / "out.html", permutations=19))
    assert is_self_contained(page)
    assert "<script>alert(1)</script>" in page.text  # shown, as text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page.source
    assert not any(tag == "b" and "x" in attrs for tag, attrs in page.tags)
    assert page.source.count("<img") == len(page.pictures)
    assert all("<script" not in svg for _, _, svg in page.pictures)


def said(sweep: Sweep) -> str:
    """The findings on a sweep as one text."""
    a = analyse(sweep, permutations=19)
    found = sweep_findings(a, representative(a))
    return " ".join(" ".join([each["text"], *each["points"]]) for each in found).replace("\N{NO-BREAK SPACE}", " ")


def test_an_attack_that_leaves_no_trace_is_said_not_to_be_found(tmp_path):
    found = said(recorded_sweep(tmp_path / "s", CELLS[:1], seeds=(0, 1), push=0.0))
    assert "1 of 1 attacked condition worked" in found
    assert "Not found: no detector separates under trigger, 2 malicious" in found
    assert "which chance could give" in found


def test_a_sweep_over_seeds_alone_is_one_condition(tmp_path):
    sweep = recorded_sweep(tmp_path / "s", CELLS[:1], seeds=(0, 1), axes=("seed",), rounds=3)
    assert attack_table(sweep)["condition"].tolist() == ["all runs"]
    assert "the strongest is all runs" in said(sweep)


def test_an_attack_that_starts_late_is_judged_in_its_rounds(tmp_path):
    sweep = recorded_sweep(tmp_path / "s", CELLS[:1], seeds=(0, 1), rounds=6, start=4)
    a = analyse(sweep, permutations=19)
    scores = labelled(sweep, a.runs, a.raw)
    assert set(scores["round"]) == {4, 5}
    chosen = representative(a)
    assert "AUC 1.00 over 2 rounds" in scores_figure(a, chosen, "final_bias")["alt"]
    assert "the attack begins in round 4" in said(sweep)


def test_cohorts_too_small_for_any_verdict_still_make_a_report(tmp_path):
    sweep = recorded_sweep(tmp_path / "s", [("trigger", ("a",), 0.9)], seeds=(0, 1), clients=("a", "b"), rounds=3)
    page = Page(report(sweep, tmp_path / "o.html", permutations=19))
    assert is_self_contained(page)
    assert "Not found: no statistic could say where trigger, 1 malicious differs." in page.text
    assert "abstained on up to 100 % of the updates" in page.text


def test_runs_without_their_control_are_left_out_and_named(made, tmp_path):
    index = json.loads((made.path / "sweep.json").read_text())
    (tmp_path / "part").mkdir()
    for name in index["runs"]:
        if name != "control2":
            (tmp_path / "part" / name).symlink_to(made.path / name)
    for name in ("sweep.json", "controls.arrow"):
        shutil.copy(made.path / name, tmp_path / "part" / name)
    runs, left_out = attacked_runs(Sweep.open(tmp_path / "part"))
    assert sorted(runs["seed"].unique()) == [0, 1]
    assert "trig22: its attack-free control control2 is not there, or is open" in left_out
    assert "1 of 9 runs of the sweep are not there (yet)" in left_out


def test_an_open_run_of_a_sweep_is_left_out_and_named(tmp_path):
    sweep = recorded_sweep(tmp_path / "s", CELLS[:1], seeds=(0, 1), rounds=2)
    index = json.loads((sweep.path / "sweep.json").read_text())
    index["runs"]["open"] = {"attack": "trigger", "num_malicious": 2, "seed": 2}
    index["controls"]["open"] = "control0"
    (sweep.path / "sweep.json").write_text(json.dumps(index))
    LogWriter.create(sweep.path / "open", MODEL, STATE).leave_open()
    runs, left_out = attacked_runs(Sweep.open(sweep.path))
    assert sorted(runs.index) == ["trig20", "trig21"]
    assert left_out == ["open is open: it has no closing line"]


def test_a_sweep_without_attack_is_refused_in_one_line(tmp_path):
    sweep = recorded_sweep(tmp_path / "s", [], seeds=(0,), rounds=2)
    with pytest.raises(InputError, match="needs a closed attacked run and its control, found none") as error:
        report(sweep, tmp_path / "o.html")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "o.html").exists()


# A real sweep, with a filter ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real(tmp_path_factory) -> Sweep:
    from simulations import Scenario, run_sweep, sweep

    base = Scenario(
        num_clients=20, rounds=3, attack={"trigger": {"target_label": 1}, "scaling": {"factor": 4.0}}, num_malicious=2
    )
    scenarios = sweep(base, detector=[None, "layer_norms"], seed=[0, 1])
    return run_sweep(scenarios, tmp_path_factory.mktemp("real") / "runs", progress=False)


def test_a_real_sweep_from_runs_to_page(real, tmp_path):
    page = Page(report(real, tmp_path / "o.html", permutations=19))
    assert is_self_contained(page)
    assert "task digits, model mlp, 20 clients, 3 rounds" in page.text
    assert "filter layer_norms" in page.text
    assert "Malicious removed" in page.text
    for _, _, svg in page.pictures:
        assert re.search(r"<!-- (Attack-free|attack-free) control", svg)


def test_filtered_runs_are_paired_with_those_without_a_filter(real):
    a = analyse(real, permutations=19)
    (pairs,) = filtered_pairs(a).values()
    assert [row.filter for row in pairs] == ["", "layer_norms"]
    malicious, benign = removed(a, pairs[1].condition)
    verdicts = [run.verdicts.merge(run.truth, on=["round", "client"]) for run in real.runs if len(run.verdicts)]
    attacked = pd.concat([table for table in verdicts if table["poisoned"].any()])
    share = 1 - attacked.loc[attacked["poisoned"], "kept"].mean()
    assert malicious.replace("\N{NO-BREAK SPACE}", "") == f"{100 * share:.0f}%"
    assert benign.endswith("%")
    training = training_table(a, pairs[0].base)
    assert set(zip(training["filter"], training["control"], strict=True)) == {
        (name, control) for name in ("", "layer_norms") for control in (False, True)
    }
    assert training.groupby(["filter", "control"]).size().eq(6).all()  # 2 seeds, 3 rounds
    filtered = next(found["text"] for found in sweep_findings(a, representative(a)) if found["about"] == "Filter")
    assert filtered.startswith("The filter stopped ")
    assert f"on average ASR is {number(pairs[0].asr)} without and {number(pairs[1].asr)} with it" in filtered


def test_a_run_inside_a_sweep_finds_its_control_there_and_its_null_only_where_it_is_named(real, tmp_path):
    name = attacked_runs(real)[0].index[0]
    page = Page(report(real.path / name, tmp_path / "o.html", permutations=19))
    assert is_self_contained(page)
    assert f"{real.control_of(name).name} attack-free control" in page.text
    e = examine(real.run(name), usual(), fpr=0.05, permutations=19)
    assert e.control is not None
    assert e.control.name == real.control_of(name).name
    assert e.rules["null"].str.startswith("nominal").all()
    assert e.case.null.kind == "reference"
    assert "rest on each cohort itself" in page.text
    runs = attacked_runs(real)[0]
    free = [real.run(str(control)) for control in runs.loc[runs["filter"].eq(""), "control"]]
    e = examine(real.run(name), usual(), fpr=0.05, null=free, permutations=19)
    assert e.rules["null"].str.startswith("attack-free: 2 runs, 40 clients").all()
    assert (e.case.verdict, e.case.null.recordings) == ("cannot say", 2)
    assert len(e.chance) == 3
    for _, _, svg in page.pictures:
        assert re.search(r"<!-- (Attack-free|attack-free) control", svg)


# A single run -------------------------------------------------------------------------------------------------


def test_a_run_without_truth_says_who_is_accused_and_what_is_not_known(tmp_path):
    run = record(tmp_path / "run", malicious=("client-03",), truth=False)
    page = Page(report(run, tmp_path / "o.html"))
    assert is_self_contained(page)
    case = investigate(run)
    first = run_findings(examine(run, usual(), fpr=0.05))[0]
    assert (first["about"], first["points"]) == ("Who", [line for line in first["points"] if "client-" in line])
    assert f"{case.verdict.capitalize()}. {' '.join(case.says)}".replace("\N{NO-BREAK SPACE}", " ") in page.text
    assert "in more than half of its rounds" not in page.text
    assert "The run has no ground truth: how many flags are right cannot be said." in page.text
    assert "No attack-free control was given" in page.text
    assert "are nominal" in page.text
    assert "malicious" not in page.text.split("Words used")[0].replace("malicious:", "")
    for _, caption, _ in page.pictures:
        assert "No attack-free control stands beside it" in caption


def test_a_run_with_truth_and_a_control_is_evaluated_beside_it(tmp_path):
    run = record(tmp_path / "run", malicious=CLIENTS[:2], asr=0.9)
    control = record(tmp_path / "control")
    null = [record(tmp_path / f"null{seed}", scenario={"seed": seed}) for seed in (5, 6)]
    page = Page(report(run, tmp_path / "o.html", control=control.path, null=null, permutations=99))
    assert "final_bias separates malicious from benign updates: AUC 1.00" in page.text
    assert "thresholds were set for 5 % false positives on other runs (null: attack-free: 2 runs" in page.text
    assert "without a control's ASR nobody can tell" in page.text
    for _, _, svg in page.pictures:
        assert re.search(r"<!-- (Attack-free|attack-free) control", svg)


def test_the_first_finding_names_suspects_with_their_rounds_and_layer_and_the_truth_of_them(tmp_path):
    log = example_log(12, num_malicious=2)
    case = investigate(log)
    found = who(case, {"client-9", "client-1"})
    assert found["text"] == unbroken(f"Established. {' '.join(case.says)}")
    row = case.suspects.set_index("client").loc["client-9"]
    (line,) = (point for point in found["points"] if point.startswith("client-9: accused, since round "))
    assert f"most of all in {row['layer']}" in line
    assert line.endswith("malicious")
    assert "malicious and not accused: client-1" in found["points"]
    assert any(point.startswith("client-8: accused") and point.endswith("benign") for point in found["points"])
    assert not any("malicious" in point or "benign" in point for point in who(case, None)["points"])
    assert named(case) == [*case.suspects["client"], *case.ambiguous["client"]]


def test_clean_rounds_set_the_thresholds_and_widen_the_case(tmp_path):
    clients = tuple(f"client-{i:02d}" for i in range(20))
    run = record(tmp_path / "run", clients=clients, malicious=clients[:2], rounds=6, start=3, push=2.0, truth=False)
    e = examine(run, usual(), fpr=0.05, null=3)
    assert e.case.null.kind == "clean stretch"
    assert e.rules["null"].str.startswith("declared clean: rounds 0 to 2, 20 clients").all()
    assert e.rules["threshold"].notna().all()
    said = " ".join(each["text"] for each in run_findings(e)).replace("\N{NO-BREAK SPACE}", " ")
    assert "were set for 5 % false positives on these first rounds (null: declared clean" in said
    short = examine(record(tmp_path / "short"), usual(), fpr=0.05, null=2)  # 10 clients, 19 are needed
    assert short.rules["null"].str.startswith("nominal").all()
    assert "needs 19 clients with a score, found 10" in " ".join(each["text"] for each in run_findings(short))


def test_an_attacked_null_and_a_null_for_a_sweep_are_refused(made, tmp_path):
    run, attacked = record(tmp_path / "run"), record(tmp_path / "attacked", malicious=CLIENTS[:1])
    with pytest.raises(InputError, match="a null must be free of attacks, found 4 poisoned updates"):
        report(run, tmp_path / "o.html", null=[attacked])
    with pytest.raises(InputError, match="null: it is for the report on a single run"):
        report(made, tmp_path / "o.html", null=2)
    with pytest.raises(InputError, match="clean rounds: expected 1 to 4"):
        report(run, tmp_path / "o.html", null=5)


def test_figures_without_truth_show_whom_the_case_names(tmp_path):
    scores = pd.DataFrame({"round": [0, 0, 0], "client": ["a", "b", "c"], "score": [3.0, 2.0, 1.0], "abstained": ""})
    rule = {"detector": "told", "threshold": None, "null": ""}
    drawn = b64decode(scores_picture(scores, None, rule, suspects=["c", "gone"])["data"]).decode()
    assert "<!-- c -->" in drawn
    assert "<!-- a -->" not in drawn
    assert "<!-- a -->" in b64decode(scores_picture(scores, None, rule)["data"]).decode()
    run = record(tmp_path / "run", truth=False)
    assert "those that the case names first" in bias_picture(run, None, 0, None, suspects=["client-07"])["caption"]


def test_a_run_longer_than_its_null_is_told_so(tmp_path):
    null = [record(tmp_path / f"null{seed}", scenario={"seed": seed}, rounds=3) for seed in (5, 6)]
    page = Page(report(record(tmp_path / "run"), tmp_path / "o.html", null=null, permutations=19))
    assert "fpr 0.05; its last round is later than round 2, the null's last" in page.text
    assert "its last round is compared with rounds 0 to 2 of the null" in page.text


def test_an_attack_free_run_is_told_that_every_flag_is_false(tmp_path):
    page = Page(report(record(tmp_path / "run"), tmp_path / "o.html"))
    assert "By its ground truth nobody sent poison: every flag is a false alarm." in page.text
    assert all("itself attack-free" in caption for _, caption, _ in page.pictures)


def test_refused_incomparable_and_abstained_are_counted_with_reasons(tmp_path):
    def spoil(updates, index):
        updates["fc1.weight"][5] = np.nan
        updates["fc1.weight"][6] *= 1e6

    run = record(tmp_path / "run", edit=spoil, refused={"<i>late</i>": "layer 'fc1.weight' is missing"})
    page = Page(report(run, tmp_path / "o.html"))
    assert "4 updates refused, of <i>late</i>" in page.text
    assert "layer 'fc1.weight' is missing" in page.text
    assert "8 updates not finite or beyond comparison, of client-05 and client-06" in page.text
    assert "beyond comparison: over 1,000 times the median norm" in page.text
    assert "accumulated_norms abstained in 1 round: " in page.text


def test_a_model_without_a_final_bias_makes_a_report_that_says_so(tmp_path):
    state = {"w": np.zeros((3, 4), np.float32)}
    with LogWriter.create(tmp_path / "run", ModelSpec.of(state), state) as writer:
        rng = np.random.default_rng(0)
        for index in range(3):
            updates = {"w": rng.normal(size=(6, 3, 4)).astype(np.float32)}
            writer.commit(Round(index, np.array(list("abcdef")), np.ones(6), updates, state), state)
    page = Page(report(tmp_path / "run", tmp_path / "o.html"))
    assert "final_bias abstained in 3 rounds" in page.text
    assert "Neither main accuracy nor ASR was recorded" in page.text
    assert any("no final-bias picture" in alt for alt, _, _ in page.pictures)


def test_an_open_run_says_so(tmp_path):
    writer = LogWriter.create(tmp_path / "run", MODEL, STATE)
    with pytest.raises(InputError, match="at least one committed round, found none"):
        report(tmp_path / "run", tmp_path / "o.html")
    updates = {name: np.ones((4, *array.shape), array.dtype) for name, array in STATE.items()}
    writer.commit(Round(0, np.array(list("abcd")), np.ones(4), updates, STATE, buffers=MODEL.buffers), STATE)
    writer.leave_open()
    found = run_findings(examine(Run.open(tmp_path / "run"), usual(), fpr=0.05))
    assert [each["about"] for each in found][-1] == "Recording"


@pytest.mark.parametrize("source", ["nowhere", "table.csv"])
def test_what_is_no_run_is_refused_and_nothing_is_written(tmp_path, source):
    (tmp_path / "table.csv").write_text("a,b\n1,2\n")
    with pytest.raises(InputError, match="expected the folder of a run or a sweep"):
        report(tmp_path / source, tmp_path / "o.html")
    assert not (tmp_path / "o.html").exists()


# The page -----------------------------------------------------------------------------------------------------


def test_a_page_is_written_whole_with_its_folders_and_never_onto_a_folder(tmp_path):
    assert write("<p>\ud800</p>", tmp_path / "deep" / "er" / "x.html").read_text() == "<p>\\ud800</p>"
    with pytest.raises(InputError, match="found a folder"):
        write("", tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written there"):
        write("", tmp_path / "file" / "x.html")


def test_a_table_sets_numbers_right_and_folds_long_ones():
    rows = [
        {"Client": "client-01", "AUC": "0.97 [0.90, 1.00]", "Run": "1cd4e5a2e8ea"},
        {"Client": "9", "AUC": "–", "Run": ""},
    ]
    block = table(rows, "All of it. More.")
    assert block["columns"] == [("Client", False), ("AUC", True), ("Run", False)]
    assert not block["collapsed"]
    assert table(rows * 20, "All of it. More.")["summary"] == "All of it (40 rows)"
    assert table(rows * 20, "All.")["collapsed"]
    assert table([], "Nothing.")["kind"] == "text"


@pytest.mark.parametrize(("layers", "panels"), [(4, 1), (8, 2)])
def test_broad_heat_maps_are_stacked_by_phase(layers, panels):
    rows = [
        {"attack": "trigger", "control": control, "phase": phase, "layer": f"fc{i}", "unit": "", "auc": 0.6, "p": 0.2}
        for control in (False, True)
        for phase in PHASES
        for i in range(layers)
    ]
    block = localization_picture(pd.DataFrame(rows), "layer_norms", "")
    assert block["alt"].count("layer_norms: no layer separates (best AUC 0.60, control at most 0.60)") == panels


def test_a_picture_grows_where_something_is_drawn_beyond_its_edge():
    inside, beyond = (figure(lambda canvas, y=y: canvas.text(0.5, y, "text"), (2, 1), "")["data"] for y in (0.5, 1.4))
    sizes = [re.search(r'viewBox="0 0 (\S+) (\S+)"', b64decode(data).decode()) for data in (inside, beyond)]
    (width, height), (same, higher) = ((float(number) for number in size.groups()) for size in sizes if size)
    assert (width, height) == (same, 72) == (144, 72)
    assert higher > 72 * 1.4


def test_a_smaller_picture_is_the_same_drawing():
    """Texts that stand twice become one symbol; every number is within a hundredth; ids that are used stay."""
    canvas = Figure(figsize=(3, 2))
    ax = canvas.subplots()
    ax.plot([0, 1, 2], [0, 0, 1], color="#b8400a")
    for x in (0.2, 1.2):
        ax.text(x, 0.5, "0.98")
    file = StringIO()
    with mpl.rc_context({"svg.fonttype": "path"}):
        canvas.savefig(file, format="svg")
    small = compact(file.getvalue())
    assert len(small) < len(file.getvalue()) / 2
    used = set(re.findall(r'href="#(\w+)"|url\(#(\w+)\)', small))
    ids = re.findall(r' id="(\w+)"', small)
    assert {left or right for left, right in used} == set(ids)
    assert len(ids) == len(set(ids))
    assert small.count("<!-- 0.98 -->") == 2
    before, after = (Counter(re.findall(r"#[0-9a-f]{6}", svg)) for svg in (file.getvalue(), small))
    assert set(after) == set(before)
    drawn = re.search(r'd="(M[^"]*)" clip-path="[^"]*" style="fill: none; stroke: #b8400a', file.getvalue())
    assert drawn
    numbers = [float(number) for number in re.findall(r"[\d.]+", drawn[1])]
    x0, y0, x1, y1, x2, y2 = (f"{number:.2f}".rstrip("0").rstrip(".") for number in numbers)
    assert y0 == y1
    assert f'd="M{x0} {y0}H{x1}L{x2} {y2}"' in small


def test_no_table_of_a_report_has_an_empty_header(made_page):
    assert '<th scope="col"></th>' not in made_page.source


def test_rendering_escapes_every_field():
    blocks = [text("<a>"), table([{"<b>": "<i>"}], "<u>")]
    page = render("<t>", "<l>", [finding("<f>", "<g>", ["<h>"])], [section("x", "<s>", blocks)])
    assert not re.search(r"<[abituflgs]>", page.replace("<b>&lt;f&gt;</b>", ""))
    assert page.count("&lt;") >= 9


def test_numbers_read_well():
    assert number(-0.004) == "0.00"
    assert number(-0.256) == "\N{MINUS SIGN}0.26"
    assert number(np.nan) == "–"
    assert measured(0.97, 0.9, 1.0) == "0.97 [0.90, 1.00]"
    assert measured(0.97, np.nan, np.nan, ">=") == "≥ 0.97"
    assert measured(0.031, 0.0, 0.031, "<=", share=True).replace("\N{NO-BREAK SPACE}", " ") == "≤ 3.1 %"
    assert listed([]) == "none"
    assert listed(["a"]) == "a"
    assert listed(["a", "b", "c"]) == "a, b and c"
    assert listed(list("abcdefgh")) == "a, b, c, d, e, f and 2 more"
    assert unbroken("5 % of [0.1, 0.2]") == "5\N{NO-BREAK SPACE}% of [0.1,\N{NO-BREAK SPACE}0.2]"


def test_settings_are_shown_in_full():
    assert plain_value({"trigger": {"size": 4, "row": 0}, "scaling": {}}) == "trigger(size=4, row=0)+scaling"
    assert plain_value(None) == plain_value({}) == "none"
    assert plain_value(0.1) == "0.1"
    assert plain_value("digits") == "digits"


def test_a_deep_model_shows_the_layers_that_separate_best():
    places = [
        {"control": control, "layer": f"fc{i}", "unit": "", "auc": 0.5 + 0.01 * i * (not control), "p": 0.2}
        for control in (False, True)
        for i in range(20)
    ]
    block = localization_picture(pd.DataFrame(places), "layer_norms", "Layers.")
    assert block["caption"] == ("Layers. Shown: the 9 of 20 layers that separate best, in the order of the model.")
    alone = pd.DataFrame([row for row in places if not row["control"]])
    assert "the 18 of 20 layers" in localization_picture(alone, "layer_norms", "Layers.")["caption"]
    few = alone[alone["layer"].isin([f"fc{i}" for i in range(18)])]
    assert localization_picture(few, "layer_norms", "Layers.")["caption"] == "Layers."


@pytest.mark.parametrize(("layers", "clients"), [(19, 4), (2, 2)])
def test_a_deep_model_and_a_cohort_of_two_make_a_report(tmp_path, layers, clients):
    state = {f"l{i}.weight": np.zeros((3, 3), np.float32) for i in range(layers)}
    with Recorder(tmp_path / "run") as recorder:
        for index in range(2):
            rng = np.random.default_rng(index)
            sent = {f"c{k}": {n: rng.normal(size=(3, 3)).astype(np.float32) for n in state} for k in range(clients)}
            recorder.log_round(state, sent)
            recorder.commit(state)
    (tmp_path / "truth.csv").write_text("client\nc1\n")
    with_csv_truth(tmp_path / "run", tmp_path / "truth.csv")
    page = report(Run.open(tmp_path / "run"), tmp_path / "report.html").read_text()
    cannot_say = "Which layer gives malicious clients away cannot be said" in page
    assert cannot_say == (clients == 2)
