"""The case file: what its first page says by verdict, and that names of clients and changed evidence do it no harm."""

import re
from dataclasses import replace

import numpy as np
import pytest

import gradlens
from gradlens import InputError, investigate
from gradlens.case.several import table_of_cases
from gradlens.case.verdicts import CANNOT_SAY, ESTABLISHED, NOT_ESTABLISHED, SUSPECTED
from gradlens.examples import example_log, example_run
from gradlens.log import LogWriter, Round
from gradlens.reporting.case_advice import advice
from gradlens.reporting.case_clients import reading_in_words
from gradlens.reporting.case_evidence import evidence_of
from gradlens.reporting.case_file import case_file, cases_file
from test_report import HOSTILE, Page, is_self_contained

ROUNDS = 8


@pytest.fixture(scope="module")
def free():
    return [example_log(ROUNDS, num_malicious=0, seed=seed) for seed in range(100, 119)]


@pytest.fixture(scope="module")
def attacked(tmp_path_factory):
    return gradlens.open(example_run(tmp_path_factory.mktemp("case") / "run", ROUNDS, num_malicious=2))


@pytest.fixture(scope="module")
def page(attacked, free, tmp_path_factory):
    return Page(case_file(attacked, investigate(attacked, free), tmp_path_factory.mktemp("out") / "case.html"))


@pytest.fixture(scope="module")
def quiet(free):
    """The seed of a log without attack in which nobody is suspected, as in four of five."""
    logs = ((seed, example_log(ROUNDS, num_malicious=0, seed=seed)) for seed in range(300, 330))
    return next(seed for seed, log in logs if investigate(log, free).verdict == NOT_ESTABLISHED)


def written(run, null, folder, **more):
    case = investigate(run, null)
    return case, Page(case_file(run, case, folder / "case.html", **more))


def test_an_established_case_says_first_who_how_sure_and_what_to_do(page, attacked):
    assert is_self_contained(page)
    first = page.text.split("1. Who, and what speaks against them")[1]  # of the navigation and of the section
    assert "Verdict Established" in first
    assert "client-8, accused" in first
    assert "client-9, accused" in first
    assert "p = 0.050" in first
    assert "Leave client-8 and client-9 out" in re.sub(r"client-9 and client-8", "client-8 and client-9", page.text)
    assert f"note its head in another place: {attacked.head}" in page.text
    assert "Whether it was done on purpose" in page.text


def test_every_accused_client_has_its_activity_and_what_speaks_against_it(page):
    captions = [caption for _, caption, _ in page.pictures]
    for client in ("client-8", "client-9"):
        assert any(caption.startswith(f"Activity of {client} round by round") for caption in captions)
        assert f"What speaks against {client}" in page.text
    assert "It acts with client-8 (group A" in page.text
    assert all(caption for caption in captions)
    assert "The suspects were chosen by what is now localized" in page.text


def test_the_last_section_has_the_lines_that_do_it_again(page, attacked):
    assert f"gradlens verify {attacked.path} --head {attacked.head}" in page.text
    assert "--null ATTACK_FREE_RUNS --fwer 0.05" in page.text
    assert re.search(r"gradlens replay \S+ --without client-\d --without client-\d", page.text)


def test_every_reading_adds_to_the_score(attacked, free):
    case = investigate(attacked, free)
    evidence = evidence_of(attacked, case)
    for row in case.suspects.itertuples():
        readings = evidence.readings(row.client)
        assert readings["adds"].sum() + case.null.scoring.intercept == pytest.approx(row.score)
        assert readings["adds"].is_monotonic_decreasing


def test_every_reading_has_words(attacked, free):
    for reading in investigate(attacked, free).null.scoring.readings:
        words, role = reading_in_words(reading)
        assert words.startswith(("How", "Its"))
        assert "{" not in words
        assert role


@pytest.mark.parametrize("clients", [4, 10])
def test_without_anybody_accused_the_page_reads_well(clients, free, quiet, tmp_path):
    run = gradlens.open(example_run(tmp_path / "run", ROUNDS, num_clients=clients, num_malicious=0, seed=quiet))
    case, page = written(run, free, tmp_path)
    assert case.verdict in (CANNOT_SAY, NOT_ESTABLISHED)
    assert "Nobody is accused" in page.text
    assert "nan" not in page.text
    assert "The model without them" not in page.text
    assert ("at least 5 clients" in page.text) == (clients == 4)
    assert ("Nothing has to be done" in page.text) == (clients == 10)


def test_a_null_that_is_too_small_leads_to_the_advice_to_record_more(free, tmp_path):
    run = gradlens.open(example_run(tmp_path / "run", ROUNDS))
    case, page = written(run, free[:3], tmp_path)
    assert case.verdict == CANNOT_SAY
    assert "Record at least 19 attack-free runs" in page.text
    assert "--fwer 0.25" in page.text


def test_who_is_suspected_is_shown_and_not_accused(free, tmp_path):
    run = gradlens.open(example_run(tmp_path / "run", ROUNDS))
    case = investigate(run, free)
    spared = case.clients.assign(status=np.where(case.clients["rank"] == 1, "next in line", ""))
    none = case.suspects.iloc[:0]
    case = replace(case, verdict=SUSPECTED, suspects=none, ambiguous=none, clients=spared)
    page = Page(case_file(run, case, tmp_path / "case.html"))
    assert "client-9: most conspicuous, not accused" in page.text
    assert "Do not leave anybody out for this" in page.text


def test_what_the_model_would_have_been_is_measured_where_it_can_be(attacked, free, tmp_path):
    def measure(state):
        return {"main_accuracy": 0.5, "asr": float(np.clip(state["fc2.bias"][1], 0, 1))}

    _, page = written(attacked, free, tmp_path, measure=measure)
    assert any("without client" in caption for _, caption, _ in page.pictures)
    _, page = written(attacked, free, tmp_path)
    assert "This was not measured" in page.text


def test_changed_evidence_comes_before_any_advice(free, tmp_path):
    run = gradlens.open(example_run(tmp_path / "run", ROUNDS, num_malicious=2))
    (tmp_path / "run" / "extra").write_text("x")
    case, page = written(run, free, tmp_path)
    assert case.verdict == ESTABLISHED
    assert "WARNING: the evidence is not what was recorded" in page.text
    assert "Find out who changed the evidence" in page.text
    assert "Leave client" not in page.text


def test_hostile_names_stay_names(free, tmp_path):
    log = example_log(ROUNDS, num_malicious=2)
    names = np.array([*HOSTILE[4:10], *HOSTILE[2:4], *HOSTILE[:2]])
    with LogWriter.create(tmp_path / "run", log.model, log[0].global_model) as writer:
        for round_ in log:
            updates = {name: round_.updates[name] for name in log.model.parameters}
            sent = Round(round_.index, names, round_.num_examples, updates, round_.global_model)
            writer.commit(sent, round_.global_model)
    case, page = written(gradlens.open(tmp_path / "run"), free, tmp_path)
    assert set(case.suspects["client"]) == set(HOSTILE[:2])
    assert is_self_contained(page)
    assert HOSTILE[0] in page.text


def test_advice_follows_the_verdict(attacked, free):
    evidence = evidence_of(attacked, investigate(attacked, free))
    sentence, points = advice(evidence, intact=True)
    assert sentence == "Act on the accused, and keep the evidence."
    assert points[-1].endswith(attacked.head)


def test_a_page_of_cases_begins_with_three_sentences(free, quiet, tmp_path):
    logs = {"<b>one</b>": example_log(ROUNDS, num_malicious=2), "two": example_log(ROUNDS, num_malicious=0, seed=quiet)}
    cases = {name: investigate(log, free) for name, log in logs.items()}
    cases["small"] = investigate(example_log(num_clients=4))
    page = Page(cases_file(table_of_cases(cases), cases, tmp_path / "cases.html"))
    assert is_self_contained(page)
    assert "3 recordings: 1 established, 1 not established and 1 cannot say" in page.text
    assert "Next comes two: not established" in page.text
    assert "<b>one</b>" in page.text
    assert cases["<b>one</b>"].says[0] in page.text


def test_a_folder_is_no_page(attacked, free, tmp_path):
    with pytest.raises(InputError, match="found a folder"):
        case_file(attacked, investigate(attacked, free), tmp_path)
