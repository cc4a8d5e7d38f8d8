"""What goes on to a framework's aggregation has the layers and shapes that were checked, whatever clients send."""

import numpy as np
import pytest

from gradlens import DETECTORS, Recorder, filtered
from gradlens.aggregators import mean
from gradlens.integrations import Answer, kept

STATE = {"body.weight": np.ones((3, 4), np.float32), "head.weight": np.ones((2, 3), np.float32)}
BODY = {"body.weight": np.full((3, 4), 2, np.float32)}
HEAD = {"head.weight": np.full((2, 3), 9, np.float32)}


def gone_on(recorder, state, *sent):
    """The arrays with which each answer goes on."""
    answers = [Answer(content, str(place), content, 10) for place, content in enumerate(sent)]
    return [answer.state or answer.message for answer in kept(recorder, state, answers)]


def test_a_layer_that_few_send_beside_the_agreed_ones_is_taken_out():
    odd = {**BODY, **HEAD, "unheard of": np.zeros(7)}
    for each in gone_on(Recorder(layers=["body.*"]), STATE, BODY, BODY, odd):
        assert list(each) == ["body.weight"]
        np.testing.assert_array_equal(each["body.weight"], BODY["body.weight"])


@pytest.mark.parametrize("head", [HEAD, {"head.weight": np.zeros((5, 5))}, {}], ids=["as usual", "other", "none"])
def test_where_most_send_the_rest_too_it_stays_the_servers_own(head):
    whole = {**HEAD, **BODY}
    for each in gone_on(Recorder(layers=["body.*"]), STATE, whole, whole, {**head, **BODY}):
        assert list(each) == list(STATE)  # in the order of the model, which is all that some frameworks know
        np.testing.assert_array_equal(each["body.weight"], BODY["body.weight"])
        np.testing.assert_array_equal(each["head.weight"], STATE["head.weight"])
    for each in gone_on(Recorder(layers=["body.*"], sent="updates"), STATE, whole, whole, {**head, **BODY}):
        np.testing.assert_array_equal(each["head.weight"], np.zeros((2, 3)))


def test_a_smaller_rank_goes_on_filled_with_zeros():
    state = {"q.lora_A.weight": np.ones((4, 8), np.float32), "q.lora_B.weight": np.zeros((6, 4), np.float32)}
    small = {"q.lora_A.weight": np.full((2, 8), 3, np.float32), "q.lora_B.weight": np.full((6, 2), 5, np.float32)}
    first, second = gone_on(Recorder(), state, state, small)
    assert first is state
    np.testing.assert_array_equal(second["q.lora_A.weight"], [[3] * 8] * 2 + [[0] * 8] * 2)
    np.testing.assert_array_equal(second["q.lora_B.weight"], [[5, 5, 0, 0]] * 6)
    assert {array.dtype for array in second.values()} == {np.dtype(np.float32)}


def test_a_smaller_rank_can_be_weighed_down():
    rng = np.random.default_rng(0)
    state = {"q.lora_A.weight": rng.normal(size=(4, 8)), "q.lora_B.weight": rng.normal(size=(6, 4))}
    usual = [{name: array + rng.normal(size=array.shape) / 9 for name, array in state.items()} for _ in range(5)]
    small = {"q.lora_A.weight": np.full((2, 8), 30.0), "q.lora_B.weight": np.full((6, 2), 30.0)}
    softly = filtered(mean(), DETECTORS["layer_norms"](), action="clip")
    recorder = Recorder(filter=softly)
    *_, last = gone_on(recorder, state, *usual, small)
    (weight,) = softly.decision(recorder.log).weights[recorder.log[0].clients == "5"]
    assert 0 < weight < 0.5
    filled = np.pad(small["q.lora_A.weight"], [(0, 2), (0, 0)])
    expected = state["q.lora_A.weight"] + weight * (filled - state["q.lora_A.weight"])
    np.testing.assert_allclose(last["q.lora_A.weight"], expected, rtol=1e-6)
