"""Recording at a server: hostile clients, full disks, killed servers."""

import numpy as np
import pytest

import gradlens
from conftest import STATE
from gradlens import InputError, Recorder


def local(seed: int = 0, size: float = 0.1) -> dict[str, np.ndarray]:
    """A local model beside the small global one."""
    rng = np.random.default_rng(seed)
    return {
        name: array + (size * rng.normal(size=array.shape)).astype(array.dtype) if array.dtype == np.float32 else array
        for name, array in STATE.items()
    }


def moved(by: float) -> dict[str, np.ndarray]:
    """The global model, its parameters shifted."""
    return {name: array + np.float32(by) if array.dtype == np.float32 else array for name, array in STATE.items()}


COHORT = {f"client-{i}": local(i) for i in range(8)}


def test_a_round_is_recorded_as_updates_with_what_was_decided(tmp_path):
    with Recorder(tmp_path / "run", detector="layer_norms", source={"server": "test"}) as recorder:
        decision = recorder.log_round(STATE, {**COHORT, "big": local(9, 50.0)}, dict.fromkeys([*COHORT, "big"], 7))
        recorder.commit(moved(1), {"main_accuracy": 0.25})
        recorder.log_round(moved(1), COHORT)
        recorder.commit(moved(2))
    assert decision.kept == list(COHORT)
    assert decision.clients.tolist() == [*COHORT, "big"]
    assert decision.reasons[-1].startswith("flagged, score")
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
