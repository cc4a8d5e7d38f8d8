"""`gradlens investigate`: one answer for a run, a table for several, one line where something is wrong."""

import json
from importlib.resources import files

import jsonschema
import pytest

from gradlens.examples import example_run

SCHEMA = json.loads(files("gradlens.case").joinpath("case.schema.json").read_text("utf-8"))
ROUNDS = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of recordings, attacked and not, and one of twenty attack-free ones."""
    place = tmp_path_factory.mktemp("recordings")
    example_run(place / "mixed" / "attacked", ROUNDS, num_malicious=2)
    example_run(place / "mixed" / "free", ROUNDS, num_malicious=0, seed=3)
    for seed in range(100, 120):
        example_run(place / "null" / f"free-{seed}", ROUNDS, num_malicious=0, seed=seed)
    return place


def test_a_run_gets_its_verdict_its_sentences_and_who_is_next_in_line(command, folder):
    status, out, _ = command("investigate", folder / "mixed" / "attacked", "--null", folder / "null")
    assert status == 0
    assert out.startswith("verdict: established\n2 of 10 clients stand out over 8 rounds")
    assert "20 attack-free recordings with 200 clients" in out
    assert "next in line" in out


def test_nobody_accused_is_no_error(command, folder):
    status, out, _ = command("investigate", folder / "mixed" / "free", "--null", folder / "null")
    assert status == 0
    assert "established\n" not in out or "not established" in out


def test_json_is_one_object_of_the_committed_schema(command, folder):
    status, out, _ = command("investigate", folder / "mixed" / "attacked", "--json", "--null", folder / "null")
    assert status == 0
    case = json.loads(out)
    jsonschema.validate(case, SCHEMA)
    assert {row["client"] for row in case["suspects"]} <= {"client-8", "client-9"}


def test_a_folder_of_recordings_is_a_table(command, folder):
    status, out, _ = command("investigate", folder / "mixed", "--null", folder / "null")
    assert status == 0
    assert [line.split()[0] for line in out.splitlines()[1:3]] == ["attacked", "free"]
    status, out, _ = command("investigate", folder / "mixed", "--json", "--null", folder / "null")
    assert set(json.loads(out)) == {"attacked", "free"}


def test_a_null_that_is_too_small_says_how_many_are_needed(command, folder):
    status, out, _ = command("investigate", folder / "mixed" / "attacked", "--null", folder / "null" / "free-100")
    assert status == 0
    assert out.startswith("verdict: cannot say")
    assert "19 attack-free recordings of this setting are needed, there is 1" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--null", "{folder}/null", "--clean-rounds", "2"], "--null and --clean-rounds exclude each other"),
        (["--clean-rounds", "9"], "expected 1 to 8"),
        (["--fwer", "2"], "expected a rate between 0 and 1"),
        (["--null", "{folder}/nowhere"], "nowhere"),
        (["-o", "case.txt"], ".html"),
    ],
)
def test_bad_input_is_one_line_and_status_2(command, folder, words, message):
    status, out, err = command("investigate", folder / "mixed" / "attacked", *[w.format(folder=folder) for w in words])
    assert status == 2
    assert not out
    assert message in err
    assert "Traceback" not in err
