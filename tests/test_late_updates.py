"""Asynchronous servers: late updates, several of one client, and models of earlier rounds that are no longer there."""

import shutil
from types import MappingProxyType

import numpy as np
import pytest

import gradlens
from gradlens import Recorder
from gradlens.errors import EvidenceLost
from gradlens.server import StartedFrom

STATE = MappingProxyType({"fc.weight": np.zeros((2, 3), np.float32), "fc.bias": np.zeros(2, np.float32)})


def moved(by):
    return {name: array + np.float32(by) for name, array in STATE.items()}


def recorded(recorder, rounds):
    """Rounds in which the model moves by 1 each time."""
    for index in range(rounds):
        recorder.log_round(moved(index), {"a": moved(index + 0.5), "b": moved(index + 1.5)})
        recorder.commit(moved(index + 1))


@pytest.mark.parametrize("kind", [int, np.int64, np.int32, np.uint8])
def test_a_round_may_be_counted_in_any_type_of_integers(kind, tmp_path):
    with Recorder(tmp_path / "run") as recorder:
        recorded(recorder, 3)
        recorder.log_round(moved(3), {"late": StartedFrom(kind(1), moved(1.25)), "now": StartedFrom(kind(3), moved(4))})
        recorder.commit(moved(4))
    round_ = gradlens.open(tmp_path / "run").log[-1]
    assert dict(round_.started) == {"late": 1}
    np.testing.assert_allclose(round_.updates["fc.bias"][:, 0], [0.25, 1])


@pytest.mark.parametrize(
    "start", [True, np.array([0, 1]), float("nan"), 10**30, StartedFrom(0, {}), "1", np.float64(1)]
)
def test_a_start_of_any_other_kind_is_refused_with_what_was_found(start):
    recorder = Recorder()
    recorded(recorder, 2)
    assert recorder.log_round(moved(2), {"odd": StartedFrom(start, moved(2)), "a": moved(3)}).kept == ["a"]
    assert recorder.log[-1].refused["odd"].startswith("started from round ")
    assert "expected one from 0 to 2" in recorder.log[-1].refused["odd"]


def test_a_late_answer_that_is_none_is_refused_as_any_other():
    recorder = Recorder()
    recorded(recorder, 2)
    odd = {"nothing": None, "nested": StartedFrom(0, moved(1)), "a part": {"fc.bias": np.zeros(2)}}
    recorder.log_round(moved(2), {name: StartedFrom(0, state) for name, state in odd.items()} | {"a": moved(3)})
    assert recorder.log[-1].refused == {
        "nothing": "sent nothing",
        "nested": "must send layers, found StartedFrom",
        "a part": "layer 'fc.weight' is missing",
    }


def test_a_buffered_server_takes_several_answers_of_one_client_each_from_its_own_start():
    """Of one that is the same twice, one counts; all bear the client's name and its claim."""
    recorder = Recorder()
    recorded(recorder, 3)
    sent = [
        ("a", StartedFrom(0, moved(0.5))),
        ("a", StartedFrom(2, moved(2.25))),
        ("b", moved(4)),
        ("a", StartedFrom(0, moved(0.5))),
        ("a", StartedFrom(1, moved(3))),
    ]
    decision = recorder.log_round(moved(3), sent, {"a": 7, "b": 9})
    round_ = recorder.log[-1]
    assert decision.kept == ["a (from round 0)", "a", "b", "a (from round 1)"]
    assert dict(zip(round_.clients.tolist(), round_.updates["fc.bias"][:, 0].tolist(), strict=True)) == {
        "a (from round 0)": 0.5, "a": 0.25, "b": 1.0, "a (from round 1)": 2.0,
    }  # fmt: skip
    assert round_.num_examples.tolist() == [7, 7, 9, 7]
    assert dict(round_.started) == {"a (from round 0)": 0, "a": 2, "a (from round 1)": 1}


def test_updates_that_are_sent_as_updates_keep_their_start_in_the_record():
    recorder = Recorder(sent="updates")
    recorded(recorder, 2)
    recorder.log_round(moved(2), {"late": StartedFrom(0, moved(0.5)), "a": moved(0.5)})
    np.testing.assert_array_equal(recorder.log[-1].updates["fc.bias"], 0.5)
    assert dict(recorder.log[-1].started) == {"late": 0}


def test_a_part_that_was_agreed_on_may_come_late(tmp_path):
    with Recorder(tmp_path / "run", layers=["fc.bias"]) as recorder:
        recorded(recorder, 2)
        recorder.log_round(moved(2), {"late": StartedFrom(0, {"fc.bias": np.full(2, 0.25, np.float32)}), "a": moved(3)})
        recorder.commit(moved(3))
    np.testing.assert_array_equal(gradlens.open(tmp_path / "run").log[-1].updates["fc.bias"][:, 0], [0.25, 1])


def test_a_server_that_was_restarted_knows_the_models_of_before(tmp_path):
    recorder = Recorder(tmp_path / "run")
    recorded(recorder, 3)
    recorder.leave_open()
    with Recorder(tmp_path / "run") as again:
        again.log_round(moved(3), {"late": StartedFrom(1, moved(1.75)), "a": moved(4)})
        again.commit(moved(4))
    np.testing.assert_array_equal(gradlens.open(tmp_path / "run").log[-1].updates["fc.bias"][:, 0], [0.75, 1])


def test_without_a_folder_a_start_of_long_ago_is_refused():
    recorder = Recorder()
    recorded(recorder, 18)
    late = {f"from {start}": StartedFrom(start, moved(start + 1)) for start in (1, 2, 17)}
    assert recorder.log_round(moved(18), late).kept == ["from 2", "from 17"]
    assert recorder.log[-1].refused["from 1"].endswith("without a folder, only the last 16 rounds are")


@pytest.mark.parametrize("evidence", ["full", "sketch"])
@pytest.mark.parametrize("harm", ["removed", "cut", "swapped", "folder"])
def test_an_earlier_model_that_is_gone_from_the_disk_refuses_its_client_and_stops_nobody(tmp_path, harm, evidence):
    recorder = Recorder(tmp_path / "run", evidence=evidence)
    recorded(recorder, 3)
    models = tmp_path / "run" / "globals"
    if harm == "removed":
        (models / "round-000001.arrow").unlink()
    elif harm == "cut":
        (models / "round-000001.arrow").write_bytes((models / "round-000001.arrow").read_bytes()[:100])
    elif harm == "swapped":
        (models / "round-000001.arrow").write_text("not a model")
    else:
        shutil.rmtree(tmp_path / "run")
    decision = recorder.log_round(moved(3), {"late": StartedFrom(1, moved(2)), "a": moved(4)})
    assert decision.kept == ["a"]
    assert decision.reasons[0].startswith("refused: started from round 1, whose global model is not at hand: ")
    if harm == "folder":
        with pytest.warns(EvidenceLost):
            recorder.commit(moved(4))
        with pytest.warns(EvidenceLost):
            recorder.close()
    else:
        recorder.close(moved(4))
        assert not gradlens.open(tmp_path / "run").verify().intact
