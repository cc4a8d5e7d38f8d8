"""What a framework goes on with is what the run holds as the next global model, in every type of numbers."""

import random

import numpy as np
import pytest

import gradlens
from gradlens import AGGREGATORS, DETECTORS, Recorder, filtered
from gradlens.integrations.byzfl import PreAggregator
from gradlens.log.arrays import as_array

SHAPES = {"a.weight": (3, 4), "a.bias": (3,)}
KINDS = ["float16", "bfloat16", "float64"]
ROUNDS = 3


def start(kind):
    """A global model of numbers that only float64 holds exactly, as this type holds them."""
    rng = np.random.default_rng(0)
    return {name: of_kind(rng.normal(size=shape), kind) for name, shape in SHAPES.items()}


def of_kind(array, kind):
    if kind == "bfloat16":
        return pytest.importorskip("torch").tensor(array).bfloat16()
    return np.asarray(array).astype(kind)


def trained(state, kind, seed, size=0.1):
    """A local model, in the type of the global one."""
    rng = np.random.default_rng(seed)
    return {n: of_kind(as_array(a)[0] + size * rng.normal(size=SHAPES[n]), kind) for n, a in state.items()}


def check(folder, after, kind, clients):
    """The run holds these global models, and no round between its rounds."""
    run = gradlens.open(folder)
    assert run.verify().intact
    assert [len(round_) for round_ in run.log] == [clients] * ROUNDS
    for recorded, state in zip([run.log[0].global_model, *run.states()], after, strict=True):
        for name, value in state.items():
            array, found = as_array(value)
            assert found == kind
            assert recorded[name].dtype == np.float32
            np.testing.assert_array_equal(recorded[name], array.astype(np.float32))
            if kind != "float64":  # which float32 does not hold
                np.testing.assert_array_equal(as_array(of_kind(recorded[name], kind))[0], array)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sent", ["models", "updates"])
def test_a_bare_recorder_holds_what_it_is_given(kind, sent, tmp_path):
    state = start(kind)
    after = [state]
    with Recorder(tmp_path / "run", sent=sent) as recorder:
        for index in range(ROUNDS):
            given = {f"c{i}": trained(state, kind, 10 * index + i) for i in range(4)}
            recorder.log_round(state, given)
            state = given["c0"]
            recorder.commit(state)
            after.append(state)
    check(tmp_path / "run", after, kind, 4)


FLOWER = ["FedAvg", "FedMedian", "FedTrimmedAvg"]  # the adaptive ones answer in float64


@pytest.mark.parametrize("kind", ["float16", "float64"])  # Flower has no bfloat16
@pytest.mark.parametrize("action", [None, "down_weight"])
@pytest.mark.parametrize("name", FLOWER)
def test_flower(name, action, kind, tmp_path):
    pytest.importorskip("flwr")
    from flower_fakes import FakeGrid, content, record, state_of
    from flwr.serverapp import strategy as flower

    from gradlens.integrations.flower import GradlensStrategy

    after = [start(kind)]

    class Listening(GradlensStrategy):
        def aggregate_train(self, server_round, replies):
            arrays, metrics = super().aggregate_train(server_round, replies)
            after.append(state_of(arrays))
            return arrays, metrics

    def client(place, index, state):
        return content(trained(state, kind, 10 * index + place), partition_id=place, num_examples=10 + place)

    detector = DETECTORS["layer_norms"](threshold=1.0)
    rule = filtered(AGGREGATORS["mean"](weighted=True), detector, action=action) if action else None
    inner = getattr(flower, name)(fraction_evaluate=0.0, min_train_nodes=1, min_available_nodes=1)
    random.seed(0)  # Flower draws the nodes
    with Recorder(tmp_path / "run", filter=rule) as recorder:
        Listening(inner, recorder).start(FakeGrid(7, client), record(after[0]), num_rounds=ROUNDS)
    check(tmp_path / "run", after, kind, 7)


@pytest.mark.parametrize("kind", ["float16", "float64"])
@pytest.mark.parametrize("name", FLOWER)
def test_flowers_older_strategies(name, kind, tmp_path, monkeypatch):
    pytest.importorskip("flwr")
    from flwr.common import Code, FitRes, Status, ndarrays_to_parameters, parameters_to_ndarrays
    from flwr.server import strategy as flower
    from flwr.server.client_manager import SimpleClientManager
    from test_flower_classic import Proxy

    from gradlens.integrations.flower_classic import ClassicStrategy

    monkeypatch.setattr(SimpleClientManager, "sample", lambda *given, **settings: [])
    state = start(kind)
    after = [state]
    with Recorder(tmp_path / "run") as recorder:
        inner = getattr(flower, name)(initial_parameters=ndarrays_to_parameters(list(state.values())))
        strategy = ClassicStrategy(inner, recorder, list(SHAPES))
        for index in range(ROUNDS):
            strategy.configure_fit(index + 1, ndarrays_to_parameters(list(state.values())), SimpleClientManager())
            sent = [list(trained(state, kind, 10 * index + i).values()) for i in range(5)]
            results = [
                (Proxy(f"cid-{i}"), FitRes(Status(Code.OK, ""), ndarrays_to_parameters(each), 10 + i, {}))
                for i, each in enumerate(sent)
            ]
            parameters, _ = strategy.aggregate_fit(index + 1, results, [])
            state = dict(zip(SHAPES, parameters_to_ndarrays(parameters), strict=True))
            after.append(state)
    check(tmp_path / "run", after, kind, 5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ["FULL", "DIFF"])
@pytest.mark.parametrize("rule", ["mean", "median"])
def test_nvflare_keeps_the_type_of_its_numbers(rule, form, kind, tmp_path):
    pytest.importorskip("nvflare")
    from nvflare.apis.event_type import EventType
    from nvflare.app_common.abstract.fl_model import FLModel
    from test_nvflare import played, told

    from gradlens.integrations.nvflare import GradlensAggregator

    state = start(kind)
    after, aggregator = [state], GradlensAggregator(str(tmp_path / "run"), aggregator=rule)
    for index in range(ROUNDS):
        zero = {name: 0 * value for name, value in state.items()}
        sent = [trained(zero if form == "DIFF" else state, kind, 10 * index + i) for i in range(4)]
        models = [FLModel(params_type=form, params=p, meta={"client_name": f"site-{i}"}) for i, p in enumerate(sent)]
        state, _ = played(aggregator, models, state)
        after.append(state)
    told(aggregator, EventType.END_RUN)
    check(tmp_path / "run", after, kind, 4)


@pytest.mark.parametrize("form", ["FULL", "DIFF"])
def test_nvflare_keeps_small_integers_small(form):
    pytest.importorskip("nvflare")
    from nvflare.app_common.abstract.fl_model import FLModel
    from test_nvflare import played

    from gradlens.integrations.nvflare import GradlensAggregator

    state = {**start("float16"), "seen": np.array([7, 9], np.int32)}
    sent = {**start("float16"), "seen": np.array([2, 3] if form == "DIFF" else [9, 12], np.int32)}
    models = [FLModel(params_type=form, params=sent, meta={"client_name": f"site-{i}"}) for i in range(3)]
    after, _ = played(GradlensAggregator(), models, state)
    assert (after["seen"].dtype, after["seen"].tolist()) == (np.int32, [9, 12])


@pytest.mark.parametrize("kind", KINDS)
def test_pfl(kind, tmp_path):
    stats = pytest.importorskip("pfl.stats", reason="pfl is not installed, or Python is not below 3.13")
    from pfl.context import UserContext

    from gradlens.integrations.pfl import PflRecorder

    class Model:
        """What pfl's model is asked for."""

        def __init__(self):
            self.state = start(kind)

        def get_parameters(self):
            return stats.MappedVectorStatistics(self.state)

    model = Model()
    after = [model.state]
    with Recorder(tmp_path / "run", sent="updates") as recorder:
        recording = PflRecorder(recorder)
        recording.on_train_begin(model=model)
        for index in range(ROUNDS):
            for user in range(4):
                update = trained({name: 0 * value for name, value in model.state.items()}, kind, 10 * index + user)
                context = UserContext(num_datapoints=10, seed=0, user_id=str(user), metrics=None)
                recording.postprocess_one_user(stats=stats.MappedVectorStatistics(update), user_context=context)
            model.state = trained(model.state, kind, index)
            recording.after_central_iteration(None, model, central_iteration=index)
            after.append(model.state)
    check(tmp_path / "run", after, kind, 4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sent", ["models", "updates"])
def test_byzfl(sent, kind, tmp_path):
    """It commits nothing: the model of the next round is what came of a round."""
    state = start(kind)
    after = [state]
    with Recorder(tmp_path / "run", sent=sent) as recorder:
        before = PreAggregator(recorder, lambda: state)
        for index in range(ROUNDS):
            local = [trained(state, kind, 10 * index + i) for i in range(4)]
            rows = [np.concatenate([as_array(a)[0].ravel() for a in each.values()]) for each in local]
            vectors = [of_kind(row, kind) for row in rows]
            for vector, found in zip(vectors, before(vectors), strict=True):
                assert as_array(found)[1] == kind
                np.testing.assert_array_equal(as_array(found)[0], as_array(vector)[0])
            state = local[0]
            after.append(state)
        recorder.close(state)
    check(tmp_path / "run", after, kind, 4)


# Replies in fewer digits than the model


@pytest.mark.parametrize("kind", ["float16", "bfloat16", "int8"])
def test_replies_of_fewer_digits_are_recorded_as_they_came_with_a_note(kind, tmp_path):
    state = {name: np.asarray(as_array(a)[0], np.float32) for name, a in start("float64").items()}
    sent = {n: a.astype(np.int8) for n, a in state.items()} if kind == "int8" else trained(state, kind, 1)
    with Recorder(tmp_path / "run") as recorder:
        decision = recorder.log_round(state, {"short": sent, "plain": state})
        recorder.commit(state)
    assert decision.reasons.tolist() == [f"sent {kind}, recorded as float32", ""]
    run = gradlens.open(tmp_path / "run")
    assert run.metrics["converted"].tolist() == [1]
    for name, rows in run.log[0].updates.items():
        np.testing.assert_array_equal(rows[0], as_array(sent[name])[0].astype(np.float32) - state[name])


def test_codes_with_their_scales_are_taken_where_they_are_turned_back():
    state = {"w": np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4)}
    scale = np.float32(np.abs(state["w"]).max() / 127)
    codes = (state["w"] / scale).round().astype(np.int8)
    recorder = Recorder()
    sent = {"codes": {"w": codes, "w.scale": np.array(scale)}, "turned back": {"w": codes * scale}}
    assert recorder.log_round(state, sent).kept == ["turned back"]
    assert recorder.log[0].refused == {"codes": "layer 'w.scale' is not in the model"}
    np.testing.assert_allclose(recorder.log[0].updates["w"], 0, atol=scale)
