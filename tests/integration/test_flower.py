"""Flower's message API: our strategy around its own ones, with replies made here; the real simulation stands beside."""

import random

import numpy as np
import pytest

pytest.importorskip("flwr", reason="flwr is not installed: pip install 'gradlens-forensics[flower]'")

from flower_fakes import FakeGrid, clients_of, content, record, reply, state_of
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, MetricRecord, RecordDict
from flwr.serverapp import strategy as flower
from flwr.serverapp.strategy import FedAvg

import gradlens
import planted
from gradlens import DETECTORS, Recorder
from gradlens.aggregators import Decision, FilterStopped, filtered, mean
from gradlens.custody import check_updates, keys_of_clients, new_key, sign_update
from gradlens.errors import EverybodyRefused
from gradlens.integrations.flower import GradlensStrategy

LOG = planted.PLANTED["shifted class"].log(rounds=3)
START = {name: np.asarray(array) for name, array in planted.STATE.items()}
INNER = {
    "FedAvg": FedAvg,
    "FedMedian": flower.FedMedian,  # pops the arrays out of the replies
    "FedTrimmedAvg": flower.FedTrimmedAvg,
    "FedAdam": flower.FedAdam,
    "FedAvgM": flower.FedAvgM,
    "Krum": lambda **given: flower.Krum(num_malicious_nodes=2, **given),
    "Bulyan": lambda **given: flower.Bulyan(num_malicious_nodes=2, **given),
    "DP": lambda **given: flower.DifferentialPrivacyServerSideFixedClipping(FedAvg(**given), 0.0, 0.5, 12),
}


def played(strategy, client=None, rounds=3, nodes=12):
    """What Flower's own loop makes of the strategy."""
    random.seed(0)  # Flower draws the nodes
    grid = FakeGrid(nodes, client or clients_of(LOG))
    return strategy.start(grid, record(START), num_rounds=rounds)


def inner(name="FedAvg"):
    return INNER[name](fraction_evaluate=0.0, min_train_nodes=1, min_available_nodes=1)


def aggregated(strategy, replies, server_round=1):
    """One round, from the start model."""
    strategy.configure_train(server_round, record(START), ConfigRecord(), FakeGrid(1, None))
    arrays, _ = strategy.aggregate_train(server_round, iter(replies))
    return state_of(arrays)


def local(place, index=0):
    """The local model of a client of the planted log."""
    return {name: START[name] + LOG[index].updates[name][place] for name in START}


def benign(*places):
    return [reply(100 + place, content(local(place), partition_id=place)) for place in places]


@pytest.mark.parametrize("name", DETECTORS)
def test_every_detector_filters_by_its_name_as_it_does_offline(name, tmp_path):
    with Recorder(tmp_path / "run", detector=name) as recorder:
        result = played(GradlensStrategy(inner(), recorder))
    run = gradlens.open(tmp_path / "run")
    assert run.verify().intact
    assert [(len(round_), round_.refused) for round_ in run.log] == [(12, {})] * 3
    detector, rule = DETECTORS[name](), filtered(mean(weighted=True), DETECTORS[name]())
    offline = gradlens.detect(run, {name: detector})
    live = run.verdicts
    assert live["detector"].unique().tolist() == [name]
    for column in ("round", "client", "score", "flag", "abstained"):
        assert live[column].tolist() == offline[column].tolist()
    assert set(live["client"]) == {str(place) for place in range(12)}
    after = [*[round_.global_model for round_ in run.log][1:], state_of(result.arrays)]
    for prefix, found in zip(run.log.prefixes(), after, strict=True):  # Flower's mean of those whom we keep is ours
        for layer in planted.LAYERS:
            expected = prefix[-1].global_model[layer] + rule(prefix)[layer]
            np.testing.assert_allclose(found[layer], expected, atol=1e-6)


@pytest.mark.parametrize("name", INNER)
def test_around_any_strategy_that_leaves_nobody_out_nothing_changes(name, tmp_path):
    with Recorder(tmp_path / "run") as recorder:
        found = played(GradlensStrategy(inner(name), recorder))
    expected = played(inner(name))
    for layer, array in state_of(expected.arrays).items():
        np.testing.assert_array_equal(state_of(found.arrays)[layer], array)
    run = gradlens.open(tmp_path / "run")
    assert [len(round_) for round_ in run.log] == [12, 12, 12]
    for round_, planned in zip(run.log, LOG, strict=True):
        for layer in planted.LAYERS:
            sent = planned.updates[layer][round_.clients.astype(int)]  # Flower samples nodes in any order
            np.testing.assert_allclose(round_.updates[layer], sent, atol=1e-6)


def test_replies_are_weights_and_updates_are_recorded():
    recorder = Recorder()
    strategy = GradlensStrategy(inner(), recorder)
    start = {name: array + np.asarray(7, array.dtype) for name, array in START.items()}
    strategy.configure_train(1, record(start), ConfigRecord(), FakeGrid(3, None))
    sent = [{name: start[name] + LOG[0].updates[name][i] for name in start} for i in range(3)]
    strategy.aggregate_train(1, (reply(100 + i, content(each)) for i, each in enumerate(sent)))
    for layer in planted.LAYERS:
        expected = [each[layer] - start[layer] for each in sent]
        np.testing.assert_array_equal(recorder.log[0].updates[layer], expected)


def test_what_flower_reports_is_recorded(tmp_path):
    def client(place, index, start):
        return content(start, partition_id=place, loss=float(index))

    with Recorder(tmp_path / "run") as recorder:
        result = played(GradlensStrategy(inner(), recorder), client)
    assert gradlens.open(tmp_path / "run").metrics["loss"].tolist() == [0, 1, 2]
    assert result.train_metrics_clientapp[3]["loss"] == 2


def test_only_judging_filters_as_well():
    recorder = Recorder(detector="final_rows")
    found = state_of(played(GradlensStrategy(inner(), recorder), rounds=1).arrays)
    rows = [place for place in range(12) if place != 5]
    weights = LOG[0].num_examples[rows]
    for layer in planted.LAYERS:
        expected = np.average(LOG[0].updates[layer][rows].astype(np.float64), axis=0, weights=weights)
        np.testing.assert_allclose(found[layer], START[layer] + expected, atol=1e-6)


def test_a_first_round_of_two_replies_flags_nobody():
    recorder = Recorder(detector="final_rows")
    found = aggregated(GradlensStrategy(inner(), recorder), benign(0, 1))
    verdict = recorder.log.verdict(recorder.filter.detector)
    assert "2 comparable clients" in verdict.abstained
    for layer in planted.LAYERS:
        np.testing.assert_allclose(found[layer], (local(0)[layer] + local(1)[layer]) / 2, atol=1e-6)


def test_where_all_are_rejected_the_model_stays(tmp_path):
    def client(place, index, start):
        return content({name: array * np.float32(np.nan) for name, array in start.items() if array.dtype != np.int64})

    with Recorder(tmp_path / "run", detector="krum") as recorder, pytest.warns(EverybodyRefused, match="norm.count"):
        result = played(GradlensStrategy(inner(), recorder), client)
    assert {name: array.tolist() for name, array in state_of(result.arrays).items()} == {
        name: array.tolist() for name, array in START.items()
    }
    run = gradlens.open(tmp_path / "run")
    assert len(run.log) == 3
    assert run.verdicts["flag"].all()
    assert not run.verdicts["kept"].any()


def test_a_round_without_replies_is_a_round():
    recorder = Recorder(detector="krum")
    found = aggregated(GradlensStrategy(inner(), recorder), [])
    assert len(recorder.log[0]) == 0
    for name, array in found.items():
        np.testing.assert_array_equal(array, START[name])


def broken_bytes():
    array = Array(np.zeros(4, np.float32))
    array.data = b"\x80\x04cos\nsystem\n"  # would be a pickle
    return RecordDict({"arrays": ArrayRecord({"fc2.bias": array}), "metrics": MetricRecord({"num-examples": 10})})


BAD = {
    "NaN": (content({**START, "fc2.bias": np.full(4, np.nan, np.float32)}), "not finite"),
    "empty record": (content({}), "sent nothing"),
    "no record": (RecordDict({"metrics": MetricRecord({"num-examples": 10})}), "found 0 and 1"),
    "two records": (RecordDict({**content(START), "more": record(START)}), "found 2 and 1"),
    "no metrics": (RecordDict({"arrays": record(START)}), "found 1 and 0"),
    "wrong shape": (content({**START, "fc2.bias": np.zeros((4, 2), np.float32)}), "must have shape"),
    "layer missing": (content({k: v for k, v in START.items() if k != "fc2.bias"}), "'fc2.bias' is missing"),
    "layer unknown": (content({**START, "fc3.bias": np.zeros(4, np.float32)}), "'fc3.bias'"),
    "no examples": (content(START, num_examples=-3), "num_examples must be a count"),
    "list of examples": (content(START, num_examples=[1, 2]), "called otherwise"),
    "another metric": (content(START, surprise=1), "called otherwise"),
    "unreadable": (broken_bytes(), "cannot be read"),
    "error": (Error(1, "out of memory\x1b[31m"), r"failed: 'out of memory\x1b[31m'"),
}


@pytest.mark.parametrize("fault", BAD)
@pytest.mark.parametrize("detector", [None, "final_rows"])
def test_faults_are_left_out_and_flagged(fault, detector, tmp_path):
    sent, reason = BAD[fault]
    replies = [*benign(0, 1, 2, 3), reply(999, sent), *benign(4)]
    for each in replies[:4] + replies[5:]:  # all name their metrics alike; who is behind a node is its id
        del each.content.metric_records["metrics"]["partition-id"]
    with Recorder(tmp_path / "run", detector=detector) as recorder:
        found = aggregated(GradlensStrategy(inner(), recorder), replies)
        round_ = recorder.log[0]
        verdict = recorder.log.verdict(DETECTORS["final_rows"]())
    flagged = set(verdict.clients[verdict.flags].tolist())
    assert "node-999" in flagged
    rest = [place for place in range(5) if not detector or f"node-{100 + place}" not in flagged]
    for layer in planted.LAYERS:
        np.testing.assert_allclose(found[layer], np.mean([local(place)[layer] for place in rest], axis=0), atol=1e-6)
    if fault != "NaN":
        assert reason in round_.refused["node-999"]
        assert round_.refused["node-999"].isprintable()
    run = gradlens.open(tmp_path / "run")
    assert run.verify().intact
    if detector:
        assert reason in run.verdicts.set_index("client")["reason"]["node-999"]


def test_float64_is_taken_with_a_note(tmp_path):
    double = {name: np.asarray(array, np.float64) for name, array in local(3).items()}
    with Recorder(tmp_path / "run") as recorder:
        found = aggregated(
            GradlensStrategy(inner(), recorder), [*benign(0, 1, 2), reply(103, content(double, partition_id=3))]
        )
    run = gradlens.open(tmp_path / "run")
    assert run.metrics["converted"].tolist() == [1]
    assert run.log[0].refused == {}
    np.testing.assert_allclose(found["fc2.bias"], np.mean([local(i)["fc2.bias"] for i in range(4)], axis=0), atol=1e-6)


def claimed(place, node=200):
    """The reply of a node that says it is the client 3."""
    return reply(node, content(local(place), partition_id=3))


@pytest.mark.parametrize("first", [True, False])
def test_two_nodes_that_claim_one_name_both_take_part_under_their_own(first):
    recorder = Recorder()
    strategy = GradlensStrategy(inner(), recorder)
    replies = [claimed(5), *benign(0, 1, 2, 3)] if first else [*benign(0, 1, 2, 3), claimed(5)]
    found = aggregated(strategy, replies)
    assert recorder.log[0].refused == {}
    assert set(recorder.log[0].clients) == {"0", "1", "2", "node-103 claims 3", "node-200 claims 3"}
    expected = np.mean([local(i)["fc2.bias"] for i in (0, 1, 2, 3, 5)], axis=0)
    np.testing.assert_allclose(found["fc2.bias"], expected, atol=1e-6)
    aggregated(strategy, [claimed(5)])  # nobody gets the name later on, and both keep what they are called
    assert recorder.log[1].clients.tolist() == ["node-200 claims 3"]


@pytest.mark.parametrize("present", [True, False])
@pytest.mark.parametrize("first", [True, False])
def test_no_node_writes_into_the_record_of_another(present, first):
    """The client 3 was there before; whether it answers in this round, and who is first, makes no difference."""
    recorder = Recorder()
    strategy = GradlensStrategy(inner(), recorder)
    aggregated(strategy, benign(0, 1, 2, 3))
    honest = benign(0, 1, 2, 3) if present else benign(0, 1, 2)
    aggregated(strategy, [claimed(5), *honest] if first else [*honest, claimed(5)])
    round_ = recorder.log[1]
    assert round_.refused == {}
    assert set(round_.clients) == {"0", "1", "2", "node-200 claims 3"} | ({"3"} if present else set())
    for name, place in {"node-200 claims 3": 5, **({"3": 3} if present else {})}.items():
        row = round_.clients.tolist().index(name)
        np.testing.assert_allclose(round_.updates["fc2.bias"][row], LOG[0].updates["fc2.bias"][place], atol=1e-6)


def test_of_two_answers_of_one_node_none_is_believed():
    recorder = Recorder()
    found = aggregated(GradlensStrategy(inner(), recorder), [claimed(5, node=103), *benign(0, 1, 2, 3)])
    assert "2 different answers" in recorder.log[0].refused["3"]
    assert recorder.log[0].clients.tolist() == ["0", "1", "2"]
    np.testing.assert_allclose(found["fc2.bias"], np.mean([local(i)["fc2.bias"] for i in range(3)], axis=0), atol=1e-6)


def test_the_same_answer_twice_counts_once():
    recorder = Recorder()
    found = aggregated(GradlensStrategy(inner(), recorder), benign(0, 1, 1))
    assert recorder.log[0].clients.tolist() == ["0", "1"]
    np.testing.assert_allclose(found["fc2.bias"], (local(0)["fc2.bias"] + local(1)["fc2.bias"]) / 2, atol=1e-6)


def test_a_node_keeps_the_name_that_it_claimed_first():
    recorder = Recorder()
    strategy = GradlensStrategy(inner(), recorder)
    aggregated(strategy, benign(0, 1))
    aggregated(strategy, [*benign(0), reply(101, content(local(1), partition_id=77))])
    aggregated(strategy, [*benign(0), reply(101, Error(1, "gone"))])
    assert [[*r.clients.tolist(), *r.refused] for r in recorder.log] == [["0", "1"]] * 3


@pytest.mark.parametrize("claim", [{}, {"partition_id": 0.5}, {"partition_id": [1]}])
def test_without_a_number_the_node_is_the_client(claim):
    recorder = Recorder()
    aggregated(GradlensStrategy(inner(), recorder), [reply(2**63 + i, content(local(i), **claim)) for i in range(2)])
    assert recorder.log[0].clients.tolist() == [f"node-{2**63}", f"node-{2**63 + 1}"]


def test_the_nodes_alone_count_where_claims_are_not_wanted():
    recorder = Recorder()
    aggregated(GradlensStrategy(inner(), recorder, identity=None), benign(0, 1))
    assert recorder.log[0].clients.tolist() == ["node-100", "node-101"]


class Weighing:
    """A recorder that keeps the first client whole, half of the second and nothing of the others."""

    def __init__(self):
        self.recorder, self.sent = Recorder(), "models"

    def log_round(self, *given):
        decision = self.recorder.log_round(*given)
        weights = np.array([1, 0.5, 0, 0])
        return Decision(decision.verdict, decision.clients, weights, decision.reasons)

    def __getattr__(self, name):
        return getattr(self.recorder, name)


def test_a_client_of_half_the_weight_arrives_with_half_its_update():
    replies = benign(0, 1, 2, 3)
    found = aggregated(GradlensStrategy(inner(), Weighing()), replies)
    for layer in planted.LAYERS:
        expected = START[layer] + (LOG[0].updates[layer][0] + LOG[0].updates[layer][1] / 2) / 2
        np.testing.assert_allclose(found[layer], expected, atol=1e-6)
    np.testing.assert_array_equal(found["norm.count"], START["norm.count"] + 2)  # a buffer is not scaled
    np.testing.assert_array_equal(replies[1].content["arrays"]["fc2.bias"].numpy(), local(1)["fc2.bias"])


SETTINGS = [
    {"action": "down_weight"},
    {"action": "clip"},
    {"action": "record"},
    {"out_for": 2},
    {"when_abstained": "keep_model"},
]


@pytest.mark.filterwarnings("ignore:.*nothing of 12 clients is used. the detector abstained")
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("name", ["final_rows", "foolsgold", "fltrust"])  # one with weights, one that abstains
def test_flowers_mean_of_what_a_filter_lets_through_is_the_filters_own(name, settings):
    rule = filtered(mean(weighted=True), DETECTORS[name](), **settings)
    recorder = Recorder(filter=rule)
    result = played(GradlensStrategy(inner(), recorder))
    after = [*[round_.global_model for round_ in recorder.log][1:], state_of(result.arrays)]
    for prefix, found in zip(recorder.log.prefixes(), after, strict=True):
        for layer in planted.LAYERS:
            expected = prefix[-1].global_model[layer] + rule(prefix)[layer]
            np.testing.assert_allclose(found[layer], expected, atol=1e-6)


CLAIMS = 100, 30, 250, 40, 60, 10**9


def claiming(*claims):
    said = [{"partition_id": place, "num_examples": claim} for place, claim in enumerate(claims)]
    return [reply(100 + place, content(local(place), **each)) for place, each in enumerate(said)]


@pytest.mark.parametrize("action", ["drop", "down_weight", "clip"])
def test_a_claim_of_many_examples_is_not_the_whole_mean(action):
    """Flower weighs by claims; a filter cuts them to ten times their median, and weighs down by them."""
    rule = filtered(mean(weighted=True), DETECTORS["layer_norms"](threshold=1.0), action=action)
    recorder = Recorder(filter=rule)
    found = aggregated(GradlensStrategy(inner(), recorder), claiming(*CLAIMS))
    assert recorder.log[0].num_examples.tolist() == list(CLAIMS)  # as they were claimed
    weights = rule.decision(recorder.log).weights
    assert (0 if action == "drop" else 0.01) <= weights.min() < 1
    for layer in planted.LAYERS:
        np.testing.assert_allclose(found[layer], START[layer] + rule(recorder.log)[layer], atol=1e-6)


def test_where_most_claim_no_examples_all_count_alike():
    found = aggregated(GradlensStrategy(inner(), Recorder(detector="fltrust")), claiming(0, 0, 0, 0, 10**9))
    for layer in planted.LAYERS:
        np.testing.assert_allclose(found[layer], START[layer] + LOG[0].updates[layer][:5].mean(axis=0), atol=1e-6)


def test_who_only_records_changes_no_claim():
    found = aggregated(GradlensStrategy(inner(), Recorder()), claiming(*CLAIMS))
    for layer in planted.LAYERS:
        expected = START[layer] + np.average(LOG[0].updates[layer][: len(CLAIMS)], weights=CLAIMS, axis=0)
        np.testing.assert_allclose(found[layer], expected, atol=1e-6)


def test_a_filter_that_is_told_to_stop_stops_the_server_and_keeps_the_evidence(tmp_path):
    rule = filtered(mean(), DETECTORS["krum"](), when_abstained="stop")
    with pytest.raises(FilterStopped), Recorder(tmp_path / "run", filter=rule) as recorder:
        aggregated(GradlensStrategy(inner(), recorder), benign(0, 1))
    run = gradlens.open(tmp_path / "run")
    assert not run.is_closed
    assert sorted(run.log[0].clients) == ["0", "1"]


def test_the_count_of_examples_is_the_metric_that_the_inner_strategy_weighs_by():
    alone = {"fraction_evaluate": 0.0, "min_train_nodes": 1, "min_available_nodes": 1}
    strategy = GradlensStrategy(FedAvg(weighted_by_key="num_samples", **alone), Recorder())
    assert strategy.weighted_by_key == "num_samples"
    assert GradlensStrategy(FedAvg(), Recorder()).weighted_by_key == "num-examples"
    assert GradlensStrategy(FedAvg(), Recorder(), weighted_by_key="n").weighted_by_key == "n"
    counted = RecordDict({"arrays": record(local(0)), "metrics": MetricRecord({"num_samples": 7, "partition-id": 0})})
    aggregated(strategy, [reply(100, counted)])
    assert strategy.recorder.log[0].num_examples.tolist() == [7]
    assert not strategy.recorder.log[0].refused


def test_personal_heads_stay_with_the_clients(tmp_path):
    start = {"body.weight": np.zeros((3, 4), np.float32), "head.weight": np.ones((2, 3), np.float32)}

    def client(place, index, state):
        return content({"body.weight": state["body.weight"] + 1 + place})

    inner = FedAvg(fraction_evaluate=0.0, min_train_nodes=1, min_available_nodes=1)
    with Recorder(tmp_path / "run", layers=["body.*"]) as recorder:
        result = GradlensStrategy(inner, recorder).start(FakeGrid(4, client), record(start), num_rounds=2)
    run = gradlens.open(tmp_path / "run")
    assert list(run.model) == ["body.weight"]
    assert [len(round_) for round_ in run.log] == [4, 4]
    np.testing.assert_allclose(state_of(result.arrays)["body.weight"], 5)  # 1 + the mean of 0 to 3, twice


def test_clients_sign_what_they_send_and_who_does_not_is_refused(tmp_path):
    """Two sign, one does not, one signs with another's key, one sends again what another signed; over three rounds."""
    for place in range(5):
        new_key(tmp_path / str(place))
    told = []

    class Grid(FakeGrid):
        def send_and_receive(self, messages, *, timeout=None):
            asked = list(messages)
            told.extend(message.content["config"]["gradlens-round"] for message in asked)
            return super().send_and_receive(asked, timeout=timeout)

    def client(place, index, start):
        state = {name: array + LOG[index].updates[name][place] for name, array in start.items()}
        sent, signer = content(state, partition_id=place), place - (place == 3)
        if place == 4:
            state = {name: array + LOG[index].updates[name][0] for name, array in start.items()}
            sent, signer = content(state, partition_id=place), 0
        name = str(0 if place == 4 else place)
        text = sign_update(tmp_path / str(signer), client=name, round=told[-1], arrays=state, run="trial")
        return RecordDict({**sent, "more": ConfigRecord({"gradlens-signature": text})} if place != 2 else dict(sent))

    with Recorder(tmp_path / "run", client_keys=tmp_path, run_name="trial") as recorder:
        GradlensStrategy(inner(), recorder).start(Grid(5, client), record(START), num_rounds=3)
    run = gradlens.open(tmp_path / "run")
    assert told == [0] * 5 + [1] * 5 + [2] * 5
    for round_ in run.log:
        assert set(round_.clients) == {"0", "1"}
        assert round_.refused == {
            "2": "signature: none",
            "3": "signature: not of client '3'",
            "4": "signature: not of client '4'",
        }
        assert set(round_.signatures) == {"0", "1", "3", "4"}
    assert check_updates(tmp_path / "run", keys_of_clients(tmp_path)).says[0].startswith("6 of 6 updates are signed")


@pytest.mark.parametrize("value", [7, b"bytes", [1.5, 2.5], True, "", "x" * 100_000], ids=lambda v: f"{v!r:.9}")
def test_whatever_stands_where_a_signature_should_is_a_reason(value, tmp_path):
    new_key(tmp_path / "0")
    new_key(tmp_path / "1")
    text = sign_update(tmp_path / "1", client="1", round=0, arrays=local(1))
    replies = benign(0, 1)
    replies[0].content["said"] = ConfigRecord({"gradlens-signature": value})
    replies[1].content["said"] = ConfigRecord({"gradlens-signature": text})
    recorder = Recorder(client_keys=tmp_path)
    aggregated(GradlensStrategy(inner(), recorder), replies)
    assert recorder.log[0].clients.tolist() == ["1"]
    assert recorder.log[0].refused["0"].startswith("signature: ")


def test_clients_are_told_no_round_where_nothing_is_checked():
    strategy, config = GradlensStrategy(inner(), Recorder()), ConfigRecord({"lr": 0.1})
    (message,) = strategy.configure_train(1, record(START), config, FakeGrid(1, None))
    assert dict(message.content["config"]) == {"lr": 0.1, "server-round": 1}
