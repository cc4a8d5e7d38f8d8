"""A server never stops learning unnoticed: a round of which nothing is used is a warning with the commonest reason."""

import warnings

import numpy as np
import pytest

from conftest import STATE
from gradlens import AGGREGATORS, DETECTORS, Recorder, filtered
from gradlens.errors import EverybodyRefused
from gradlens.log.global_model import averaged_in, spec_of
from gradlens.server import StartedFrom

CLIENTS = [f"c{i}" for i in range(4)]


def local(place: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(place)
    return {n: a + rng.normal(size=a.shape).astype(a.dtype) * (a.dtype != np.int64) for n, a in STATE.items()}


def everywhere(value: float) -> dict[str, np.ndarray]:
    return {name: array if array.dtype == np.int64 else np.full_like(array, value) for name, array in STATE.items()}


UNUSED = {
    "prefix": (lambda: {f"module.{n}": a for n, a in local().items()}, "'fc1.weight' is missing, found 'module.fc1"),
    "transposed": (lambda: {**local(), "fc1.weight": local()["fc1.weight"].T}, "'fc1.weight' must have shape"),
    "a list": (lambda: list(local().values()), "must send layers, found list"),
    "bytes": (lambda: b"state_dict", "must send layers, found bytes"),
    "NaN": (lambda: everywhere(np.nan), "nothing of 4 clients is used: not finite"),
    "beyond float32": (lambda: everywhere(np.inf), "nothing of 4 clients is used: not finite"),
    "from a round to come": (lambda: StartedFrom(9, local()), "started from round 9, expected one from 0 to 0"),
    "compressed": (
        lambda: {n: a.astype(np.int8) for n, a in local().items()} | {f"{n}.scale": np.ones(1) for n in STATE},
        "'fc1.weight.scale' is not in the model",
    ),
}


@pytest.mark.parametrize("detector", [None, "layer_norms"])
@pytest.mark.parametrize("kind", UNUSED)
def test_what_all_clients_do_wrong_is_said_once_a_round(kind, detector):
    send, reason = UNUSED[kind]
    recorder = Recorder(detector=detector)
    for number in range(2):
        with pytest.warns(EverybodyRefused) as said:
            decision = recorder.log_round(STATE, {name: send() for name in CLIENTS})
        assert decision.kept == []
        assert len(said) == 1
        if kind != "from a round to come":
            assert str(said[0].message).startswith(f"round {number}: nothing of 4 clients ")
            assert reason in str(said[0].message)
        recorder.commit(STATE)


def test_counts_under_other_names_than_the_clients_are_said():
    with pytest.warns(EverybodyRefused, match="num_examples must be a count, found None"):
        Recorder().log_round(STATE, {name: local(i) for i, name in enumerate(CLIENTS)}, {"node-1": 10})


def test_the_commonest_reason_is_given_with_how_many_have_it():
    sent = {"a": None, "b": everywhere(np.nan), "c": everywhere(np.nan)}
    with pytest.warns(EverybodyRefused, match=r"nothing of 3 clients is used: not finite \(2 of 3\)"):
        Recorder().log_round(STATE, sent)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"when_abstained": "keep_model"}, "is used: the detector abstained: keep_model"),
        ({"when_abstained": "use_all"}, ""),
        ({"action": "record", "when_abstained": "keep_model"}, ""),
    ],
    ids=str,
)
def test_a_filter_whose_detector_abstains_for_ever_is_heard(settings, reason):
    """Two clients are too few for any detector."""
    recorder = Recorder(filter=filtered(AGGREGATORS["mean"](), DETECTORS["krum"](), **settings))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        kept = recorder.log_round(STATE, {name: local(i) for i, name in enumerate(CLIENTS[:2])}).kept
    assert [reason in str(warning.message) for warning in said] == [True] * bool(reason)
    assert kept == ([] if reason else CLIENTS[:2])


def test_one_client_that_is_used_is_no_reason_to_warn():
    assert Recorder().log_round(STATE, {"a": None, "b": local(), "c": everywhere(np.nan)}).kept == ["b"]
    assert Recorder().log_round(STATE, {}).kept == []  # nobody was asked


# Counters that a server averages: frameworks take the mean of every array, and integers become fractions


AVERAGED = {**STATE, "norm.count": np.array(2.5)}


def test_a_counter_that_the_server_averaged_may_be_sent_back_as_it_came(tmp_path):
    """A client that keeps the types it gets, or has no samples and returns the model, is no attacker for it."""
    for level in ("full", "sketch"):
        with Recorder(tmp_path / level, evidence=level) as recorder:
            recorder.log_round(STATE, {name: local(i) for i, name in enumerate(CLIENTS)})
            recorder.commit(AVERAGED)
            sent = {"same": AVERAGED, "counted": {**AVERAGED, "norm.count": np.array(4.5)}, "torch": local()}
            decision = recorder.log_round(AVERAGED, sent)
            round_ = recorder.log[-1]
            recorder.commit(AVERAGED)
        assert decision.kept == list(sent)
        assert [len(each) for each in recorder.log] == [4, 3]  # and no round between them
        counts = dict(zip(round_.clients.tolist(), round_.updates["norm.count"].tolist(), strict=True))
        assert (counts["same"], counts["counted"]) == (0, 2)
        reasons = dict(zip(decision.clients.tolist(), decision.reasons.tolist(), strict=True))
        assert reasons["same"] == "sent float64, recorded as int64"
        assert reasons["torch"] == ""


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e300])
def test_a_counter_that_is_no_number_is_refused_whatever_the_server_holds(value):
    recorder = Recorder()
    odd = {**AVERAGED, "norm.count": np.array(value)}
    recorder.log_round(STATE, {"a": local()})
    recorder.commit(AVERAGED)
    recorder.log_round(AVERAGED, {"odd": odd, "yes": {**AVERAGED, "norm.count": np.array(True)}, "a": local()})
    assert recorder.log[-1].refused == {"odd": "layer 'norm.count' must hold int64, found other numbers"}


def test_fractions_are_known_by_the_servers_own_numbers():
    model = spec_of(STATE)
    assert averaged_in(STATE, model) == frozenset()
    assert averaged_in(AVERAGED, model) == {"norm.count"}
