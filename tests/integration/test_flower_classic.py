"""Flower's older strategies with ours around them, with results made here."""

import numpy as np
import pytest

pytest.importorskip("flwr", reason="flwr is not installed: pip install 'gradlens-forensics[flower]'")

from flwr.common import Code, FitRes, Parameters, Status, ndarrays_to_parameters, parameters_to_ndarrays
from flwr.server import strategy as flower
from flwr.server.client_manager import SimpleClientManager
from flwr.server.client_proxy import ClientProxy

import gradlens
import planted
from gradlens import DETECTORS, InputError, Recorder
from gradlens.aggregators import filtered, mean
from gradlens.custody import new_key, sign_update
from gradlens.errors import EverybodyRefused
from gradlens.integrations.flower_classic import ClassicStrategy

LOG = planted.PLANTED["shifted class"].log(rounds=2)
START = {name: np.asarray(array) for name, array in planted.STATE.items()}
NAMES = list(START)
OK = Status(Code.OK, "")


class Proxy(ClientProxy):
    """A client of whom only the name is asked."""

    get_properties = get_parameters = fit = evaluate = reconnect = None


Proxy.__abstractmethods__ = frozenset()


def inner(name="FedAvg", **settings):
    return getattr(flower, name)(initial_parameters=packed(START), inplace=False, **settings)


def packed(state):
    return ndarrays_to_parameters([np.asarray(state[name]) for name in NAMES])


def local(place, start=START, index=0):
    return {name: start[name] + LOG[index].updates[name][place].astype(start[name].dtype) for name in NAMES}


def result(place, state=None, examples=10, **metrics):
    parameters = packed(local(place)) if state is None else state
    return Proxy(f"cid-{place}"), FitRes(OK, parameters, examples, metrics)


def aggregated(strategy, results, failures=(), server_round=1):
    strategy.configure_fit(server_round, packed(START), SimpleClientManager())
    parameters, metrics = strategy.aggregate_fit(server_round, results, list(failures))
    return parameters and dict(zip(NAMES, parameters_to_ndarrays(parameters), strict=True)), metrics


@pytest.fixture(autouse=True)
def _nobody_is_waited_for(monkeypatch):
    monkeypatch.setattr(SimpleClientManager, "sample", lambda *given, **settings: [])


@pytest.mark.parametrize("name", DETECTORS)
def test_every_detector_filters_by_its_name(name):
    recorder = Recorder(detector=name)
    found, _ = aggregated(ClassicStrategy(inner(), recorder, NAMES), [result(place) for place in range(12)])
    expected = filtered(mean(), DETECTORS[name]())(recorder.log)
    for layer in planted.LAYERS:
        np.testing.assert_allclose(found[layer], START[layer] + expected[layer], atol=1e-6)


def test_a_claim_of_many_examples_is_not_the_whole_mean():
    claims = 100, 30, 250, 40, 60, 10**9
    recorder = Recorder(filter=filtered(mean(weighted=True), DETECTORS["layer_norms"](), action="down_weight"))
    results = [result(place, examples=claim) for place, claim in enumerate(claims)]
    found, _ = aggregated(ClassicStrategy(inner(), recorder, NAMES), results)
    expected = recorder.filter(recorder.log)
    for layer in planted.LAYERS:
        np.testing.assert_allclose(found[layer], START[layer] + expected[layer], atol=1e-6)


@pytest.mark.parametrize("name", ["FedAvg", "FedMedian", "FedTrimmedAvg", "FedAdam", "Krum", "FedAvgM"])
def test_around_any_strategy_that_leaves_nobody_out_nothing_changes(name):
    settings = {} if name == "FedAvg" else {"Krum": {"num_malicious_clients": 2}}.get(name, {})
    build = getattr(flower, name)
    plain, inside = (build(initial_parameters=packed(START), **settings) for _ in range(2))
    results = [result(place, examples=10 + place) for place in range(12)]
    recorder = Recorder()
    strategy = ClassicStrategy(inside, recorder, NAMES)
    assert strategy.initialize_parameters(SimpleClientManager()) == plain.initialize_parameters(SimpleClientManager())
    found, metrics = aggregated(strategy, results)
    expected, told = plain.aggregate_fit(1, results, [])
    for array, wanted in zip(found.values(), parameters_to_ndarrays(expected), strict=True):
        np.testing.assert_array_equal(array, wanted)
    assert metrics == told
    assert recorder.log[0].num_examples.tolist() == list(range(10, 22))
    np.testing.assert_array_equal(recorder.log[0].updates["fc2.bias"], LOG[0].updates["fc2.bias"])


def test_clients_are_called_by_their_partition_or_their_node():
    recorder = Recorder()
    results = [result(0, **{"partition-id": 7}), result(1), result(2, **{"partition-id": True})]
    aggregated(ClassicStrategy(inner(), recorder, NAMES), results)
    assert recorder.log[0].clients.tolist() == ["7", "node-cid-1", "node-cid-2"]


def test_no_client_takes_the_name_of_another():
    recorder = Recorder()
    strategy = ClassicStrategy(inner(), recorder, NAMES)
    aggregated(strategy, [result(0, **{"partition-id": 7}), result(1)])
    aggregated(strategy, [result(1, **{"partition-id": 7}), result(0, **{"partition-id": 7})])
    assert [round_.clients.tolist() for round_ in recorder.log] == [
        ["7", "node-cid-1"],
        ["node-cid-1 claims 7", "7"],
    ]


BAD = {
    "NaN": (packed({**START, "fc2.bias": np.full(4, np.nan, np.float32)}), "not finite"),
    "nothing": (ndarrays_to_parameters([]), "sent nothing"),
    "a layer too few": (ndarrays_to_parameters([START[n] for n in NAMES[:-1]]), "'fc2.bias' is missing"),
    "a layer too many": (ndarrays_to_parameters([*START.values(), np.zeros(3)]), "'array 5'"),
    "wrong shape": (packed({**START, "fc2.bias": np.zeros(9, np.float32)}), "must have shape"),
    "bytes": (Parameters([b"\x80\x04cos\nsystem\n"] * 5, "numpy.ndarray"), "cannot be read"),
}


@pytest.mark.parametrize("fault", BAD)
def test_faults_are_left_out_and_flagged(fault):
    state, reason = BAD[fault]
    recorder = Recorder()
    found, _ = aggregated(ClassicStrategy(inner(), recorder, NAMES), [result(0), result(9, state), result(1)])
    np.testing.assert_allclose(found["fc2.bias"], (local(0)["fc2.bias"] + local(1)["fc2.bias"]) / 2, atol=1e-6)
    verdict = recorder.log.verdict(DETECTORS["final_rows"]())
    assert verdict.flags[verdict.clients == "node-cid-9"].tolist() == [True]
    if fault != "NaN":
        assert reason in recorder.log[0].refused["node-cid-9"]


def test_a_client_that_failed_is_refused_and_the_inner_strategy_is_told():
    recorder = Recorder()
    proxy, answer = result(3)
    failures = [
        (proxy, FitRes(Status(Code.FIT_NOT_IMPLEMENTED, "no\x1b[1m"), answer.parameters, 0, {})),
        OSError("lost"),
    ]
    found, _ = aggregated(ClassicStrategy(inner(accept_failures=False), recorder, NAMES), [result(0)], failures)
    assert found is None  # as the inner strategy decides where it accepts no failures
    assert "FIT_NOT_IMPLEMENTED" in recorder.log[0].refused["node-cid-3"]
    assert recorder.log[0].refused["node-cid-3"].isprintable()


def test_where_all_are_rejected_the_model_stays(tmp_path):
    strange = [result(i, BAD["NaN"][0]) for i in range(4)]
    with Recorder(tmp_path / "run", detector="krum") as recorder:
        with pytest.warns(EverybodyRefused, match="not finite"):
            found, metrics = aggregated(ClassicStrategy(inner(), recorder, NAMES), strange)
        assert (found, metrics) == (None, {})  # Flower then keeps its parameters
        np.testing.assert_array_equal(recorder.log[0].global_model["fc1.weight"], START["fc1.weight"])
    assert not gradlens.open(tmp_path / "run").verdicts["kept"].any()


def test_names_that_are_not_the_models_are_the_servers_fault():
    strategy = ClassicStrategy(inner(), Recorder(), NAMES[:-1])
    with pytest.raises(InputError, match="names name 4 layers, the model has 5"):
        aggregated(strategy, [result(0)])


def test_clients_sign_what_they_send_by_a_metric(tmp_path, monkeypatch):
    for place in range(3):
        new_key(tmp_path / str(place))
    monkeypatch.setattr(SimpleClientManager, "sample", lambda *given, **settings: [Proxy("cid-0"), Proxy("cid-1")])
    parameters, told = packed(START), []
    with Recorder(tmp_path / "run", client_keys=tmp_path) as recorder:
        strategy = ClassicStrategy(inner(), recorder, NAMES)
        for round_ in range(2):
            instructions = strategy.configure_fit(round_ + 1, parameters, SimpleClientManager())
            told.append([instruction.config["gradlens-round"] for _, instruction in instructions])
            texts = [sign_update(tmp_path / str(i), client=str(i), round=round_, arrays=local(i)) for i in range(3)]
            said = [{"partition-id": 0, "gradlens-signature": texts[0]}, {"partition-id": 1}]
            said.append({"partition-id": 2, "gradlens-signature": texts[1]})
            results = [result(i, **each) for i, each in enumerate(said)]
            parameters, _ = strategy.aggregate_fit(round_ + 1, results, [])
    assert told == [[0, 0], [1, 1]]
    for round_ in gradlens.open(tmp_path / "run").log:
        assert round_.clients.tolist() == ["0"]
        assert round_.refused == {"1": "signature: none", "2": "signature: not of client '2'"}


def test_clients_are_told_no_round_where_nothing_is_checked(monkeypatch):
    monkeypatch.setattr(SimpleClientManager, "sample", lambda *given, **settings: [Proxy("cid-0")])
    strategy = ClassicStrategy(inner(), Recorder(), NAMES)
    ((_, instruction),) = strategy.configure_fit(1, packed(START), SimpleClientManager())
    assert instruction.config == {}
