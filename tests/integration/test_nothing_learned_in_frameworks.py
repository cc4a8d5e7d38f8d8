"""What all clients of a framework's server do wrong at once is a warning that names what to change."""

import numpy as np
import pytest

pytest.importorskip("flwr", reason="flwr is not installed: pip install 'gradlens-forensics[flower]'")

from flower_fakes import FakeGrid, content, record, state_of
from flwr.app import Error, MetricRecord, RecordDict
from flwr.common import Code, FitRes, Parameters, Status, ndarrays_to_parameters
from flwr.server.client_manager import SimpleClientManager
from flwr.server.strategy import FedAvg as ClassicFedAvg
from flwr.serverapp.strategy import FedAvg
from test_flower_classic import Proxy

from gradlens import Recorder
from gradlens.errors import EverybodyRefused
from gradlens.integrations.flower import GradlensStrategy
from gradlens.integrations.flower_classic import ClassicStrategy

START = {"body.weight": np.zeros((3, 4), np.float32), "head.weight": np.ones((2, 3), np.float32)}
NAMES = list(START)


def trained(place):
    return {name: array + np.float32(1 + place) for name, array in START.items()}


def played(client, rounds=2, **settings):
    recorder = Recorder(**settings)
    inner = FedAvg(fraction_evaluate=0.0, min_train_nodes=1, min_available_nodes=1)
    result = GradlensStrategy(inner, recorder).start(FakeGrid(4, client), record(START), num_rounds=rounds)
    return recorder, state_of(result.arrays)


ALL = {
    "the body alone": (
        lambda p, r, s: content({"body.weight": s["body.weight"] + 1}),
        r"layer 'head.weight' is missing; Recorder\(layers=...\) names the layers that clients send",
    ),
    "another weighting key": (
        lambda p, r, s: RecordDict({"arrays": record(trained(p)), "metrics": MetricRecord({"num_samples": 10})}),
        "sent no metric 'num-examples', found 'num_samples'",
    ),
    "two records of arrays": (
        lambda p, r, s: RecordDict({**content(trained(p)), "control": record(START)}),
        "must send one ArrayRecord and one MetricRecord, found 2 and 1",
    ),
    "no metrics": (
        lambda p, r, s: RecordDict({"arrays": record(trained(p))}),
        "must send one ArrayRecord and one MetricRecord, found 1 and 0",
    ),
    "names of a list": (
        lambda p, r, s: content({str(i): array for i, array in enumerate(trained(p).values())}),
        "layer 'body.weight' is missing, found '0'",
    ),
    "out of memory": (lambda p, r, s: Error(1, "CUDA out of memory"), "failed: 'CUDA out of memory'"),
    "diverged": (lambda p, r, s: content({n: a + np.float32(np.nan) for n, a in s.items()}), "is used: not finite"),
}


@pytest.mark.parametrize("detector", [None, "layer_norms"])
@pytest.mark.parametrize("fault", ALL)
def test_what_all_clients_of_flower_do_wrong_is_said_in_every_round(fault, detector):
    client, reason = ALL[fault]
    with pytest.warns(EverybodyRefused, match=reason) as said:
        _, after = played(client, detector=detector)
    assert [str(each.message).split(":")[0] for each in said] == ["round 0", "round 1"]
    for name, array in START.items():
        np.testing.assert_array_equal(after[name], array)


def test_nodes_that_all_claim_one_number_train_under_names_of_their_own():
    recorder, after = played(lambda p, r, s: content(trained(p), partition_id=0))
    names = {f"node-{100 + place} claims 0" for place in range(4)}
    assert [set(round_.clients) for round_ in recorder.log] == [names, names]
    np.testing.assert_allclose(after["body.weight"], 2.5)


def test_metrics_of_the_majority_count_where_some_send_others():
    def client(place, index, state):
        return content(trained(place), **({"loss": 0.5} if place else {"surprise": 1.0}))

    recorder, after = played(client)
    assert [list(round_.refused.values()) for round_ in recorder.log] == [
        ["its records or metrics are called otherwise than those of most"]
    ] * 2
    np.testing.assert_allclose(after["body.weight"], 3)  # 2, 3 and 4


CLASSIC = {
    "the body alone": (lambda p: [trained(p)["body.weight"]], "layer 'head.weight' is missing"),
    "in another order": (lambda p: list(trained(p).values())[::-1], r"must have shape \(3, 4\), found \(2, 3\)"),
    "one array too many": (lambda p: [*trained(p).values(), np.zeros(2)], "'array 2' is not in the model"),
    "diverged": (lambda p: [np.full_like(a, np.nan) for a in START.values()], "is used: not finite"),
}


@pytest.mark.parametrize("fault", CLASSIC)
def test_what_all_clients_of_flowers_older_strategies_do_wrong_is_said(fault, monkeypatch):
    monkeypatch.setattr(SimpleClientManager, "sample", lambda *given, **settings: [])
    arrays, reason = CLASSIC[fault]
    packed = ndarrays_to_parameters(list(START.values()))
    strategy = ClassicStrategy(ClassicFedAvg(initial_parameters=packed), Recorder(), NAMES)
    strategy.configure_fit(1, packed, SimpleClientManager())
    results = [
        (Proxy(f"cid-{p}"), FitRes(Status(Code.OK, ""), ndarrays_to_parameters(arrays(p)), 10, {})) for p in range(4)
    ]
    with pytest.warns(EverybodyRefused, match=reason):
        assert strategy.aggregate_fit(1, results, []) == (None, {})  # Flower then keeps its parameters


def test_parameters_that_are_no_arrays_are_said(monkeypatch):
    monkeypatch.setattr(SimpleClientManager, "sample", lambda *given, **settings: [])
    packed = ndarrays_to_parameters(list(START.values()))
    strategy = ClassicStrategy(ClassicFedAvg(initial_parameters=packed), Recorder(), NAMES)
    strategy.configure_fit(1, packed, SimpleClientManager())
    odd = FitRes(Status(Code.OK, ""), Parameters([b"\x80\x04cos\nsystem\n"], "numpy.ndarray"), 10, {})
    with pytest.warns(EverybodyRefused, match="what was sent cannot be read"):
        assert strategy.aggregate_fit(1, [(Proxy("cid-0"), odd)], []) == (None, {})
