"""Recording at a server: hostile clients, full disks, killed servers."""

import errno
import os
import re
import subprocess
import sys
import warnings
from contextlib import contextmanager, suppress

import numpy as np
import pytest

import gradlens
from conftest import ROOT, STATE
from gradlens import DETECTORS, InputError, Recorder, filtered
from gradlens.aggregators import FilterStopped, mean
from gradlens.errors import EverybodyRefused, EvidenceLost
from gradlens.log import files
from gradlens.server import StartedFrom

COUNT = "norm.count"
SKETCH = gradlens.Evidence("sketch", width=4, seed=1)  # of fc1.weight, the only layer of more than 4 numbers before fc2


def local(seed: int = 0, size: float = 0.1) -> dict[str, np.ndarray]:
    """A local model beside the small global one."""
    rng = np.random.default_rng(seed)
    return {
        name: array + (size * rng.normal(size=array.shape)).astype(np.float32) if name != COUNT else array.copy()
        for name, array in STATE.items()
    }


def moved(by: float) -> dict[str, np.ndarray]:
    """The global model, its parameters shifted."""
    return {name: array + np.float32(by) if name != COUNT else array.copy() for name, array in STATE.items()}


COHORT = {f"client-{i}": local(i) for i in range(8)}


@pytest.fixture(params=["full", SKETCH], ids=["full", "sketch"])
def level(request):
    """What is recorded of an answer: whatever a client sends, it is the same at each level."""
    return request.param


def test_a_round_is_recorded_as_updates_with_what_was_decided(tmp_path):
    with Recorder(tmp_path / "run", detector="layer_norms", source={"server": "test"}) as recorder:
        decision = recorder.log_round(STATE, {**COHORT, "big": local(9, 50.0)}, dict.fromkeys([*COHORT, "big"], 7))
        recorder.commit(moved(1), {"main_accuracy": 0.25})
        recorder.log_round(moved(1), COHORT)
        recorder.commit(moved(2))
    assert decision.kept == list(COHORT)
    assert decision.clients.tolist() == [*COHORT, "big"]
    assert decision.reasons[-1] == "flagged"
    run = gradlens.open(tmp_path / "run")
    assert (run.verify().intact, run.is_closed, len(run.log)) == (True, True, 2)
    assert run.header["source"]["server"] == "test"
    assert run.metrics["main_accuracy"].tolist()[0] == 0.25
    assert run.log[0].num_examples.tolist() == [7] * 9
    for row, state in enumerate(COHORT.values()):
        for name, update in run.log[0].updates.items():
            np.testing.assert_array_equal(update[row], state[name] - STATE[name])
    np.testing.assert_array_equal(run.log[1].global_model["fc1.weight"], moved(1)["fc1.weight"])
    verdicts = run.verdicts[run.verdicts["round"] == 0].set_index("client")
    assert verdicts["kept"].to_dict() == {**dict.fromkeys(COHORT, True), "big": False}


def test_a_closed_run_is_not_gone_on_with(tmp_path, recorded):
    with pytest.raises(InputError, match="closed with 3 rounds"):
        Recorder(recorded)


class Grumpy:
    """What a client could send to break the server."""

    def __array__(self, *_, **__):
        raise MemoryError("no")

    def __repr__(self):
        raise RuntimeError("no")


def changed(**layers) -> dict[str, np.ndarray]:
    return {**local(3), **{name.replace("_", "."): value for name, value in layers.items()}}


def lacking(layer: str) -> dict[str, np.ndarray]:
    return {name: array for name, array in local(3).items() if name != layer}


REFUSED = {
    "nothing": (None, "sent nothing"),
    "empty": ({}, "sent nothing"),
    "no table": (5, "must send layers, found int"),
    "shape": (changed(fc2_bias=np.zeros(4)), r"layer 'fc2.bias' must have shape \(3,\), found \(4,\)"),
    "scalar": (changed(fc2_bias=7), r"layer 'fc2.bias' must have shape \(3,\), found \(\)"),
    "missing": (lacking("fc2.bias"), "layer 'fc2.bias' is missing"),
    "extra": ({**local(3), "head\x1b[2J": np.zeros(3)}, r"layer 'head\\x1b\[2J' is not in the model"),
    "text": (changed(fc2_bias="abc"), "layer 'fc2.bias' must hold numbers, found str"),
    "objects": (changed(fc2_bias=[None, 1, 2]), "layer 'fc2.bias' must hold numbers, found list of type object"),
    "ragged": (changed(fc2_bias=[[1], [2, 3]]), "layer 'fc2.bias' is no array"),
    "complex": (changed(fc2_bias=np.zeros(3, complex)), "must hold numbers, found ndarray of type complex128"),
    "huge integers": (changed(fc2_bias=[10**5000, 0, 0]), "layer 'fc2.bias' must hold numbers"),
    "grumpy": (changed(fc2_bias=Grumpy()), "layer 'fc2.bias' is no array: MemoryError"),
    "counter": (changed(norm_count=np.array(2.5)), "layer 'norm.count' must hold int64, found other numbers"),
    "names": ({**local(3), 4: np.zeros(3)}, "names of layers must be text, found 4"),
}


@pytest.mark.parametrize("detector", [None, "layer_norms"])
@pytest.mark.parametrize("fault", REFUSED)
def test_what_cannot_be_recorded_is_refused_with_a_reason(fault, detector, level):
    sent, reason = REFUSED[fault]
    recorder = Recorder(detector=detector, evidence=level)
    decision = recorder.log_round(STATE, {"odd": sent, **COHORT})
    round_ = recorder.log[0]
    assert list(round_.refused) == ["odd"]
    assert pytest.approx(1) == decision.weights[1:].sum() / 8
    assert (decision.clients[0], decision.weights[0]) == ("odd", 0)
    np.testing.assert_array_equal(decision.verdict.flags, decision.verdict.clients == "odd")

    assert re.search(reason, round_.refused["odd"])
    assert "\x1b" not in round_.refused["odd"]
    assert decision.reasons[0] == f"refused: {round_.refused['odd']}"


@pytest.mark.parametrize(
    "claim", [-1, "many", None, float("nan"), 2**63, 10**5000, Grumpy()], ids=lambda c: type(c).__name__
)
def test_a_claim_that_is_no_count_is_refused(claim, level):
    recorder = Recorder(evidence=level)
    decision = recorder.log_round(STATE, COHORT, {**dict.fromkeys(COHORT, 5), "client-3": claim})
    assert decision.kept == [name for name in COHORT if name != "client-3"]
    assert recorder.log[0].refused["client-3"].startswith("num_examples must be a count")


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e300])
@pytest.mark.parametrize("detector", [None, "layer_norms"])
def test_numbers_that_are_not_finite_are_evidence_and_have_no_weight(value, detector, level):
    recorder = Recorder(detector=detector, evidence=level)
    decision = recorder.log_round(STATE, {**COHORT, "odd": changed(fc1_bias=np.full(4, value))})
    assert decision.kept == list(COHORT)
    assert not np.isfinite(recorder.log[0].updates["fc1.bias"][-1]).any()
    assert np.isfinite(recorder.log[0].updates["fc1.weight"][-1]).all()
    assert decision.reasons[-1]


def numbers(kind: str):
    """A local model in another type of numbers."""
    if kind == "torch.bfloat16":
        torch = pytest.importorskip("torch")
        return {name: torch.tensor(a).to(torch.bfloat16 if a.shape else torch.int64) for name, a in local(3).items()}
    if kind == "torch":
        torch = pytest.importorskip("torch")
        return {n: torch.tensor(a, requires_grad=a.dtype == np.float32) for n, a in local(3).items()}
    if kind == "lists":
        return {name: array.tolist() for name, array in local(3).items()}
    return {name: array.astype(kind if array.dtype == np.float32 else np.int32) for name, array in local(3).items()}


@pytest.mark.parametrize("kind", ["float64", "float16", "torch.bfloat16", "torch", "lists", ">f4"])
def test_other_types_of_numbers_are_recorded_as_float32_with_a_note(tmp_path, kind):
    with Recorder(tmp_path / "run") as recorder:
        decision = recorder.log_round(STATE, {"odd": numbers(kind), **COHORT})
        recorder.commit(STATE)
    run = gradlens.open(tmp_path / "run")
    exact = {"float16": 1e-3, "torch.bfloat16": 1e-2}.get(kind, 1e-7)
    for name, update in run.log[0].updates.items():
        assert update.dtype == (np.int64 if name == "norm.count" else np.float32)
        np.testing.assert_allclose(update[0], local(3)[name] - STATE[name], atol=2 * exact)
    sent = {"lists": "float64", "torch": "", ">f4": ""}.get(kind, kind.removeprefix("torch."))
    assert decision.reasons[0] == (f"sent {sent}, recorded as float32" if sent else "")
    assert ("converted" in run.metrics) == bool(sent)
    assert len(decision.kept) == 9


def test_float64_keeps_the_digits_of_a_small_update():
    base = {**STATE, "fc1.bias": np.full(4, 1024, np.float32)}
    recorder = Recorder()
    recorder.log_round(base, {"a": {**base, "fc1.bias": np.full(4, 1024 + 2.0**-30)}})
    np.testing.assert_array_equal(recorder.log[0].updates["fc1.bias"][0], np.float32(2.0**-30))


def test_updates_are_recorded_as_they_are():
    recorder = Recorder(sent="updates")
    recorder.log_round(moved(5), {"a": local(1)})
    for name, update in recorder.log[0].updates.items():
        np.testing.assert_array_equal(update[0], local(1)[name])


def test_different_answers_under_one_name_are_all_refused_and_equal_ones_count_once(level):
    recorder = Recorder(detector="layer_norms", evidence=level)
    twice = [*COHORT.items(), ("client-0", local(7, 50.0)), ("client-1", local(1)), ("client-2", None)]
    decision = recorder.log_round(STATE, iter(twice))
    assert decision.kept == ["client-1", *list(COHORT)[3:]]
    assert decision.clients.tolist() == list(COHORT)
    reason = recorder.log[0].refused["client-0"]
    assert reason.startswith("2 different answers came under this name")
    assert (reason.count("sha256"), reason.count("norm")) == (2, 2)
    assert recorder.log[0].refused["client-2"].endswith("; sent nothing")


def test_names_that_cannot_be_printed_are_escaped_and_refused(tmp_path, level):
    names = ["a\x1b[2Jb", "nul\0", "nul", "line\nbreak", "\ud800", "x" * 10_000, 17]
    with Recorder(tmp_path / "run", evidence=level) as recorder:
        decision = recorder.log_round(STATE, {name: local(i) for i, name in enumerate(names)})
        recorder.commit(STATE)
    assert decision.kept == ["nul", "17"]
    assert all(name.isprintable() and len(name) < 200 for name in decision.clients.tolist())
    round_ = gradlens.open(tmp_path / "run").log[0]
    assert set(round_.refused) == set(decision.clients.tolist()) - {"nul", "17"}
    assert decision.clients[0] == r"a\x1b[2Jb"


@pytest.mark.parametrize("detector", ["layer_norms", "krum", "panel", "accumulated_norms"])
@pytest.mark.parametrize("size", [0, 1, 2])
def test_tiny_cohorts_are_recorded_and_abstained_on(tmp_path, size, detector, level):
    with Recorder(tmp_path / "run", detector=detector, evidence=level) as recorder:
        for _ in range(2):
            decision = recorder.log_round(STATE, dict(list(COHORT.items())[:size]))
            recorder.commit(STATE)
    assert decision.verdict.abstained
    assert len(decision.kept) == size
    assert [len(round_) for round_ in gradlens.open(tmp_path / "run").log] == [size, size]


def everybody(log) -> gradlens.Verdict:
    clients = log[-1].clients
    return gradlens.Verdict(clients, np.ones(len(clients)), np.ones(len(clients), bool))


def test_where_everybody_is_flagged_nobody_is_kept_and_it_is_said(tmp_path, level):
    with Recorder(tmp_path / "run", detector=everybody, evidence=level) as recorder:
        with pytest.warns(EverybodyRefused, match="round 0: nothing of 8 clients is used: flagged$"):
            decision = recorder.log_round(STATE, COHORT)
        recorder.commit(STATE)
    assert decision.kept == []
    assert decision.outcome == "everybody is flagged: keep_model"
    assert not gradlens.open(tmp_path / "run").verdicts["kept"].any()


def test_a_filter_that_is_told_to_stop_keeps_the_evidence(tmp_path, level):
    stopping = filtered(mean(), everybody, when_all_flagged="stop")
    with suppress(FilterStopped), Recorder(tmp_path / "run", filter=stopping, evidence=level) as recorder:
        recorder.log_round(STATE, COHORT)
        pytest.fail("it did not stop")
    run = gradlens.open(tmp_path / "run")
    assert (run.is_closed, len(run.log[0]), len(run.verdicts)) == (False, 8, 8)
    assert set(run.verdicts["reason"]) == {"flagged; everybody is flagged: stop"}


def test_a_filter_weighs_down_instead_of_dropping(level):
    softly = filtered(mean(), DETECTORS["layer_norms"](), action="down_weight")
    decision = Recorder(filter=softly, evidence=level).log_round(STATE, {"a": local(9, 0.6), **COHORT})
    assert decision.clients[0] == "a"
    assert 0 < decision.weights[0] < 1
    assert decision.weights[1:].tolist() == [1] * 8
    assert decision.reasons[0] == "flagged, weighed down"


def test_the_evidence_is_kept_where_the_detector_fails(tmp_path, level):
    def broken(log):
        raise ZeroDivisionError

    recorder = Recorder(tmp_path / "run", detector=broken, evidence=level)
    with pytest.raises(ZeroDivisionError):
        recorder.log_round(STATE, COHORT)
    recorder.close(moved(1))
    assert len(gradlens.open(tmp_path / "run").log[0]) == 8


def test_the_servers_arrays_may_change_while_a_round_waits(tmp_path):
    state, cohort = {n: a.copy() for n, a in STATE.items()}, {"a": local(1)}
    with Recorder(tmp_path / "run") as recorder:
        recorder.log_round(state, cohort)
        for arrays in (state, cohort["a"]):
            for array in arrays.values():
                array += 1
        recorder.commit(state)
    round_ = gradlens.open(tmp_path / "run").log[0]
    np.testing.assert_array_equal(round_.global_model["fc1.weight"], STATE["fc1.weight"])
    np.testing.assert_array_equal(round_.updates["fc1.weight"][0], local(1)["fc1.weight"] - STATE["fc1.weight"])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda r: r.log_round(lacking("fc2.bias"), COHORT), "changed its layers: 'fc2.bias' is in the recorded model"),
        (lambda r: r.log_round(changed(fc2_bias=np.zeros(9)), COHORT), r"must have shape \(3,\), found \(9,\)"),
        (lambda r: r.commit({}), "changed its layers"),
        (lambda r: r.commit(STATE, {"loss": "low"}), "metrics are numbers, found 'loss': 'low'"),
        (lambda r: (r.commit(STATE), r.commit(STATE)), "log_round comes first"),
        (lambda r: (r.close(), r.log_round(STATE, {})), "this recorder is closed"),
    ],
    ids=["layers", "shape", "commit", "metrics", "twice", "closed"],
)
def test_what_the_server_gets_wrong_is_said_and_the_round_still_waits(tmp_path, call, message, level):
    recorder = Recorder(tmp_path / "run", evidence=level)
    recorder.log_round(STATE, COHORT)
    with pytest.raises(InputError, match=message):
        call(recorder)
    recorder.close(moved(1))
    assert len(gradlens.open(tmp_path / "run").log) == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sent": "gradients"}, "'models' or 'updates', found 'gradients'"),
        ({"detector": "krumm"}, "there is no 'krumm'; did you mean krum"),
        ({"detector": "krum", "filter": 1}, "a detector or a filter, found both"),
        ({"source": {"model": object()}}, "expected plain values"),
    ],
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(InputError, match=message):
        Recorder(**settings)


def test_buffers_are_found_by_type_and_name_and_others_can_be_named():
    state = {"w": np.zeros((2, 3), np.float32), "bn.running_mean": np.zeros(2), "seen": np.array(3, np.uint8)}
    recorder = Recorder(buffers=["mask"])
    recorder.log_round({**state, "mask": np.zeros(2, bool)}, {})
    assert recorder.log.model.buffers == ("bn.running_mean", "seen", "mask")
    with pytest.raises(InputError, match="no layer 'masks'"):
        Recorder(buffers=["masks"]).log_round(state, {})


def test_a_counter_that_falls_does_not_wrap_around(level):
    state = {"w": np.zeros((2, 3), np.float32), "seen": np.array(3, np.uint8)}
    recorder = Recorder(evidence=level)
    recorder.log_round(state, {"a": {**state, "seen": np.array(1, np.uint8)}})
    assert recorder.log[0].updates["seen"].tolist() == [-2]


@pytest.fixture
def full_disk(monkeypatch):
    """`full_disk(n)`: from the n-th file on the disk is full, until `full_disk(None)`."""
    left, placed = [None], files._placed

    @contextmanager
    def refusing(path):
        with placed(path) as file:
            if left[0] is not None:
                left[0] -= 1
                if left[0] < 0:
                    file.write(b"half of it")
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
            yield file

    def full(after):
        left[0] = after

    monkeypatch.setattr(files, "_placed", refusing)
    return full


BEFORE, WITH_FIRST = ([8, 8, 8], [4, 5, 6]), ([0, 8, 8, 8], [3, 4, 5, 6])


@pytest.mark.parametrize(
    ("after", "lost", "sizes", "ends"),
    [
        (0, 3, *BEFORE),  # run.json
        (1, 3, *BEFORE),  # the first global model
        (2, 3, *WITH_FIRST),  # the updates of round 0
        (3, 3, *WITH_FIRST),  # the global model after it
        (4, 3, *WITH_FIRST),  # the verdict
        (5, 2, [8, 0, 8, 8, 8], [1, 3, 4, 5, 6]),  # the updates of round 1
        (7, 2, [8, 0, 8, 8, 8], [1, 3, 4, 5, 6]),  # the verdict of round 1
    ],
)
def test_a_full_disk_loses_evidence_loudly_and_training_goes_on(tmp_path, full_disk, after, lost, sizes, ends, level):
    recorder = Recorder(tmp_path / "run", detector="layer_norms", evidence=level)
    full_disk(after)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        for index in range(3):
            assert len(recorder.log_round(moved(index), COHORT).kept) == 8
            recorder.commit(moved(index + 1))
    assert all(each.category is EvidenceLost and "No space left" in str(each.message) for each in warned)
    assert len(warned) == len(recorder.lost) == lost
    assert not list(tmp_path.rglob("*.part"))
    full_disk(None)
    for index in range(3, 6):
        recorder.log_round(moved(index), COHORT)
        recorder.commit(moved(index + 1))
    recorder.close()
    run = gradlens.open(tmp_path / "run")
    assert (run.verify().faults, run.in_flight, run.is_closed) == ((), "", True)
    assert [len(round_) for round_ in run.log] == sizes
    assert [state["fc1.bias"][0] for state in run.states()] == ends
    noted = sizes.index(0) if 0 in sizes else 0
    assert run.metrics["lost"].dropna().to_dict() == {noted: lost}


def test_lost_evidence_stops_the_server_where_it_asked_for_that(tmp_path, full_disk, level):
    recorder = Recorder(tmp_path / "run", strict=True, evidence=level)
    recorder.log_round(STATE, COHORT)
    full_disk(0)
    with pytest.raises(EvidenceLost, match=r"round 0 was not recorded: .*No space left"):
        recorder.commit(STATE)
    assert list((tmp_path / "run").iterdir()) == []


@pytest.mark.parametrize("detector", gradlens.DETECTORS)
def test_without_a_folder_the_last_rounds_are_enough(monkeypatch, detector):
    monkeypatch.setattr("gradlens.server.HELD", 10)
    recorder, rounds = Recorder(detector=detector), []
    for index in range(14):
        decision = recorder.log_round(moved(index), {f"client-{i}": local(8 * index + i) for i in range(6)})
        rounds.append(recorder.log[-1])
    whole = gradlens.UpdateLog(recorder.log.model, rounds).verdict(gradlens.DETECTORS[detector]())
    np.testing.assert_array_equal(decision.verdict.scores, whole.scores)
    with pytest.raises(InputError, match="round 0 is no longer held"):
        recorder.log[0]


@pytest.mark.parametrize("detector", gradlens.DETECTORS)
def test_verdicts_beside_a_gap_are_those_of_the_recorded_log(tmp_path, full_disk, detector):
    recorder, live = Recorder(tmp_path / "run", detector=detector), {}
    for index in range(6):
        cohort = {f"client-{i}": local(10 * index + i) for i in range(8)}
        cohort = {name: {n: array + moved(index)[n] - STATE[n] for n, array in s.items()} for name, s in cohort.items()}
        decision = recorder.log_round(moved(index), cohort)
        live[recorder.log.last_index] = decision
        full_disk(0 if index == 2 else None)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            recorder.commit(moved(index + 1))
    recorder.close()
    run = gradlens.open(tmp_path / "run")
    assert [len(round_) for round_ in run.log] == [8, 8, 0, 8, 8, 8]
    for prefix in run.log.prefixes():
        if len(prefix[-1]):
            verdict = prefix.verdict(gradlens.DETECTORS[detector]())
            np.testing.assert_array_equal(verdict.scores, live[prefix.last_index].verdict.scores)
            np.testing.assert_array_equal(verdict.flags, live[prefix.last_index].verdict.flags)


SERVER = """
import os, sys, time
sys.path[:0] = {paths!r}
from gradlens import Recorder
from gradlens.log import manifest, writer
from test_server import COHORT, moved

stage = {stage!r}
def wait(*_, **__):
    print("waiting", flush=True)
    time.sleep(60)

def torn(chain, line):
    os.write(chain.file.fileno(), b'{{"round": 2, "fil')
    wait()

recorder = Recorder({folder!r}, detector="layer_norms", evidence={level!r})
for index in range({start}, 4):
    recorder.log_round(moved(index), COHORT)
    if index == {start} + 2 or ({start} == 0 and index == 0 and stage == "create"):
        if stage == "open": wait()
        if stage == "updates": writer.write_state = wait
        if stage == "create": writer.write_state = wait
        if stage == "files": manifest.Chain.append = wait
        if stage == "torn": manifest.Chain.append = torn
    recorder.commit(moved(index + 1))
    if index == {start} + 2 and stage == "committed": wait()
"""


@pytest.mark.parametrize("stage", ["create", "open", "updates", "files", "torn", "committed"])
def test_a_killed_server_leaves_a_run_that_verifies_and_goes_on(tmp_path, stage, level):
    level = "full" if level == "full" else "sketch"
    code = SERVER.format(
        paths=[str(ROOT), str(ROOT / "tests")], folder=str(tmp_path / "run"), stage=stage, start=0, level=level
    )
    server = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    assert server.stdout.readline() == "waiting\n"
    server.kill()
    server.wait()
    server.stdout.close()
    recorded = {"create": 0, "committed": 3}.get(stage, 2)
    if recorded:
        run = gradlens.open(tmp_path / "run")
        assert (run.verify().faults, len(run.log), run.is_closed) == ((), recorded, False)
    with Recorder(tmp_path / "run", detector="layer_norms", evidence=level) as recorder:
        for index in range(recorded, 4):  # from the last model that the server knows to be on the disk
            recorder.log_round(moved(index), COHORT)
            recorder.commit(moved(index + 1))
    run = gradlens.open(tmp_path / "run")
    assert (run.verify().faults, run.in_flight, run.is_closed) == ((), "", True)
    assert [len(round_) for round_ in run.log] == [8] * 4
    assert [state["fc1.bias"][0] for state in run.states()] == [1, 2, 3, 4]
    assert run.verdicts.groupby("round").size().tolist() == [8] * 4


def test_a_server_that_starts_from_another_model_says_so_with_an_empty_round(tmp_path, level):
    first = Recorder(tmp_path / "run", evidence=level)
    first.log_round(STATE, COHORT)
    first.commit(moved(1))
    first.leave_open()
    with Recorder(tmp_path / "run", evidence=level) as recorder:
        recorder.log_round(moved(3), COHORT)
        recorder.commit(moved(4))
    run = gradlens.open(tmp_path / "run")
    assert [len(round_) for round_ in run.log] == [8, 0, 8]
    assert run.metrics["lost"].dropna().tolist() == [0]
    assert [state["fc1.bias"][0] for state in run.states()] == [1, 3, 4]
    assert run.verify().intact


def test_another_model_is_not_recorded_into_a_run(tmp_path):
    first = Recorder(tmp_path / "run")
    first.log_round(STATE, COHORT)
    first.commit(STATE)
    first.leave_open()
    recorder = Recorder(tmp_path / "run")
    with pytest.raises(InputError, match="'other' is in the given model alone"):
        recorder.log_round({**STATE, "other": np.zeros(3)}, {})
    with pytest.raises(InputError, match="another writer is recording"):
        Recorder(tmp_path / "run")
    recorder.leave_open()


def test_a_folder_that_holds_something_else_is_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="a run is recorded into a new folder"):
        Recorder(tmp_path)
    with pytest.raises(InputError, match="cannot be recorded here: Not a directory"):
        Recorder(tmp_path / "notes.txt" / "run")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_rounds_that_nobody_committed_are_recorded_with_the_model_that_came_next(tmp_path):
    with Recorder(tmp_path / "run") as recorder:
        for index in range(3):
            recorder.log_round(moved(index), COHORT)
    run = gradlens.open(tmp_path / "run")
    assert [state["fc1.bias"][0] for state in run.states()] == [1, 2, 2]
    assert run.metrics["result_unknown"].dropna().tolist() == [1]
    assert run.verify().intact


def test_an_exception_leaves_the_run_open_with_its_last_round(tmp_path):
    with suppress(KeyboardInterrupt), Recorder(tmp_path / "run") as recorder:
        recorder.log_round(STATE, COHORT)
        raise KeyboardInterrupt
    run = gradlens.open(tmp_path / "run")
    assert (run.is_closed, len(run.log), run.verify().intact) == (False, 1, True)


LIMITED = """
import resource, sys, warnings
sys.path[:0] = {paths!r}
from gradlens import Recorder
from test_server import COHORT, moved

warnings.simplefilter("always")
def limit(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

with Recorder({folder!r}, detector="layer_norms") as recorder:
    for index in range(8):
        if index == 2: limit({size})
        if index == 5: limit(resource.RLIM_INFINITY)
        kept = recorder.log_round(moved(index), COHORT).kept
        assert len(kept) == 8
        recorder.commit(moved(index + 1))
print(len(recorder.lost))
"""


@pytest.mark.parametrize("size", [0, 1_500, 3_000])
def test_a_disk_that_is_really_full(tmp_path, size):
    """The system refuses to let any file grow beyond so many bytes: the first, or one in the middle of a commit."""
    code = LIMITED.format(paths=[str(ROOT), str(ROOT / "tests")], folder=str(tmp_path / "run"), size=size)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "3\n"
    assert done.stderr.count("EvidenceLost: ") == 3
    assert done.stderr.count("File too large") == 3
    run = gradlens.open(tmp_path / "run")
    assert (run.verify().faults, run.is_closed) == ((), True)
    assert [len(round_) for round_ in run.log] == [8, 8, 0, 8, 8, 8]
    assert run.metrics["lost"].dropna().tolist() == [3]


BODY = ["fc1.weight", "fc1.bias"]


def test_clients_may_send_a_part_of_the_layers_that_was_agreed_on(tmp_path):
    rng = np.random.default_rng(0)
    sent = {f"c{i}": {name: STATE[name] + rng.normal(size=STATE[name].shape) for name in BODY} for i in range(6)}
    sent["c0"] |= {"fc2.weight": np.full((2, 2), np.nan), "own.head": np.ones(3)}  # stays out, whatever it holds
    with Recorder(tmp_path / "run", layers=["fc1.*"], detector="layer_norms") as recorder:
        for _ in range(2):
            decision = recorder.log_round(STATE, sent)  # the server's model has all layers
            recorder.commit({name: STATE[name] for name in BODY})  # what it aggregates may not
    assert set(decision.kept) == set(sent)
    run = gradlens.open(tmp_path / "run")
    assert list(run.model) == BODY
    assert (run.model.final_weight, run.model.final_bias) == (None, None)  # the head was not sent
    assert run.header["source"]["recorder"]["layers"] == ["fc1.*"]
    assert all(len(round_) == 6 and not round_.refused for round_ in run.log)
    assert run.verify().intact


def test_a_part_that_was_not_agreed_on_is_refused_and_the_warning_says_what_to_do():
    body = {name: STATE[name] for name in BODY}
    with pytest.warns(EverybodyRefused, match=r"'norm.count' is missing; Recorder\(layers=...\) names the"):
        Recorder().log_round(STATE, {"c0": body, "c1": body})
    with pytest.warns(EverybodyRefused, match="sent none of the layers that were agreed on"):
        Recorder(layers=["fc2.*"]).log_round(STATE, {"c0": body, "c1": body})
    with pytest.raises(InputError, match="layers: no layer of the model matches 'head"):
        Recorder(layers=["head.*"]).log_round(STATE, {"c0": body})


@pytest.mark.parametrize("where", ["memory", "folder"])
def test_an_update_is_measured_from_the_model_that_its_client_started_from(tmp_path, where, level):
    if where == "memory" and level != "full":
        pytest.skip("earlier models are kept in a folder only")
    with Recorder(None if where == "memory" else tmp_path / "run", evidence=level) as recorder:
        for round_ in range(3):
            recorder.log_round(moved(round_), {f"c{i}": local(i) for i in range(4)})
            recorder.commit(moved(round_ + 1))
        late = [(f"c{i}", moved(3.5)) for i in range(3)]  # a step of a half
        late += [("c3", StartedFrom(1, moved(1.5))), ("c4", StartedFrom(0, moved(0.5))), ("c4", moved(3.5))]
        decision = recorder.log_round(moved(3), late)
        recorder.commit(moved(4))
        round_ = recorder.log[-1]
    assert decision.clients.tolist() == ["c0", "c1", "c2", "c3", "c4 (from round 0)", "c4"]
    assert not round_.refused
    np.testing.assert_allclose(round_.updates["fc1.bias"], 0.5, atol=1e-6)
    np.testing.assert_allclose(round_.total_norms, round_.total_norms[0], rtol=1e-5)
    assert dict(round_.started) == {"c3": 1, "c4 (from round 0)": 0}
    assert dict(round_.take(round_.clients == "c3").started) == {"c3": 1}
    if where == "folder":
        run = gradlens.open(tmp_path / "run")
        assert dict(run.log[-1].started) == dict(round_.started)
        assert run.verify().intact


@pytest.mark.parametrize("start", [7, -1, 1.5, "0", None])
def test_a_start_that_cannot_be_is_a_reason_and_no_crash(start):
    recorder = Recorder()
    recorder.log_round(STATE, COHORT)
    recorder.commit(STATE)
    recorder.log_round(STATE, {**COHORT, "late": StartedFrom(start, local())})
    assert recorder.log[-1].refused["late"].startswith("started from round ")


def test_two_answers_of_one_start_are_still_two_answers_under_one_name():
    recorder = Recorder()
    recorder.log_round(STATE, COHORT)
    recorder.commit(STATE)
    twice = [
        ("a", StartedFrom(0, local(1))),
        ("a", StartedFrom(0, local(2))),
        ("a (from round 0)", local(3)),
        ("a", local(4)),
    ]
    recorder.log_round(STATE, [*COHORT.items(), *twice])
    assert set(recorder.log[-1].refused) == {"a (from round 0)"}
    assert "a" in recorder.log[-1].clients
