"""NVFlare: our aggregator by itself, and in its simulator (`nvflare_app.py`), in a process of its own."""

import numpy as np
import pytest

pytest.importorskip("nvflare", reason="nvflare is not installed: pip install 'gradlens-forensics[nvflare]'")

from digits import reached
from nvflare.apis.event_type import EventType
from nvflare.apis.fl_constant import FLMetaKey
from nvflare.apis.fl_context import FLContext
from nvflare.app_common.abstract.fl_model import FLModel, ParamsType
from nvflare.app_common.app_constant import AppConstants
from nvflare.app_common.app_event_type import AppEventType
from nvflare.app_common.utils.fl_model_utils import FLModelUtils
from processes import ran

import gradlens
import planted
from gradlens import AGGREGATORS, DETECTORS, InputError
from gradlens.aggregators import filtered, mean
from gradlens.errors import EverybodyRefused
from gradlens.integrations.nvflare import GradlensAggregator

LOG = planted.PLANTED["shifted class"].log(rounds=2)
START = {name: np.asarray(array) for name, array in planted.STATE.items()}
KINDS = [ParamsType.FULL, ParamsType.DIFF]


def sent(place, kind=ParamsType.FULL, index=0, start=START, **changes):
    update = {name: LOG[index].updates[name][place] for name in START}
    params = update if kind == ParamsType.DIFF else {name: start[name] + update[name] for name in START}
    meta = {"client_name": f"site-{place}", FLMetaKey.NUM_STEPS_CURRENT_ROUND: 10 + place}
    return FLModel(**{"params_type": kind, "params": params, "metrics": {"loss": float(place)}, "meta": meta} | changes)


def told(aggregator, event, state=None):
    context = FLContext()
    if state is not None:
        shareable = FLModelUtils.to_shareable(FLModel(params=state, params_type=ParamsType.FULL))
        context.set_prop(AppConstants.TRAIN_SHAREABLE, shareable, sticky=False)
    aggregator.handle_event(event, context)


def played(aggregator, models, state=START):
    """One round as FLARE's FedAvg does it: the next global model and the aggregate."""
    told(aggregator, AppEventType.BEFORE_TRAIN_TASK, state)
    aggregator.reset_stats()
    for model in models:
        aggregator.accept_model(model)
    result = aggregator.aggregate_model()
    start = FLModel(params=dict(state), params_type=ParamsType.FULL)
    return FLModelUtils.update_model(start, result).params, result


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", DETECTORS)
def test_every_detector_filters_by_its_name(name, kind):
    found, result = played(GradlensAggregator(detector=name), [sent(place, kind) for place in range(12)])
    expected = filtered(mean(), DETECTORS[name]())(planted.PLANTED["shifted class"].log(rounds=1))
    assert result.params_type == kind
    for layer in planted.LAYERS:
        np.testing.assert_allclose(found[layer], START[layer] + expected[layer], atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", AGGREGATORS)
def test_every_rule_aggregates_by_its_name(name, kind):
    found, _ = played(GradlensAggregator(aggregator=name), [sent(place, kind) for place in range(12)])
    log = LOG[:1]
    for layer, update in AGGREGATORS[name]()(log).items():
        np.testing.assert_allclose(found[layer], START[layer] + update, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_the_run_holds_what_flare_goes_on_with(kind, tmp_path):
    settings = {"aggregator": {"weighted": True}, "detector": {"num_malicious": 1}}
    aggregator = GradlensAggregator(str(tmp_path / "run"), "krum", settings=settings)
    states = [START]
    for index in range(2):
        found, result = played(aggregator, [sent(p, kind, index, states[-1]) for p in range(12)], states[-1])
        states.append(found)
    told(aggregator, EventType.END_RUN)
    run = gradlens.open(tmp_path / "run")
    assert (run.verify().intact, run.is_closed, len(run.log)) == (True, True, 2)  # a gap would be a round
    for name, array in run.log[1].global_model.items():
        np.testing.assert_array_equal(array, states[1][name])
    assert run.log[0].num_examples.tolist() == list(range(10, 22))
    kept = run.verdicts[run.verdicts["kept"] & (run.verdicts["round"] == 1)]["client"].str[5:].astype(int)
    assert run.metrics["loss"][1] == pytest.approx(kept.mean())
    assert result.metrics["loss"] == pytest.approx(kept.mean())


@pytest.mark.parametrize("kind", KINDS)
def test_where_all_are_rejected_the_model_stays(kind, tmp_path):
    nothing = {name: np.full(array.shape, np.nan, np.float32) for name, array in START.items()}
    aggregator = GradlensAggregator(str(tmp_path / "run"), "krum")
    with pytest.warns(EverybodyRefused, match="nothing of 4 clients"):
        found, result = played(aggregator, [sent(place, kind, params=nothing) for place in range(4)])
    assert set(result.params) == set(START)
    for name, array in START.items():
        np.testing.assert_array_equal(found[name], array)
    told(aggregator, EventType.END_RUN)
    assert not gradlens.open(tmp_path / "run").verdicts["kept"].any()


def test_a_round_of_nobody_keeps_the_model():
    found, _ = played(GradlensAggregator(detector="krum"), [])
    for name, array in START.items():
        np.testing.assert_array_equal(found[name], array)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("settings", [{"action": "down_weight"}, {"action": "clip"}, {"out_for": 2}], ids=str)
def test_a_filters_settings_are_plain_values(settings, kind):
    aggregator = GradlensAggregator(detector="final_rows", settings={"filter": settings})
    rule, state = filtered(mean(), DETECTORS["final_rows"](), **settings), START
    for index in range(2):
        found, _ = played(aggregator, [sent(place, kind, index, state) for place in range(12)], state)
        for layer, update in rule(aggregator.log).items():
            np.testing.assert_allclose(found[layer], state[layer] + update, atol=1e-6)
        state = found


class Lazy:
    """What FLARE hands over where tensors wait on the disk."""

    def __init__(self, array):
        self.array = array

    def materialize(self):
        if self.array is None:
            raise OSError("the file is gone")
        return self.array


BAD = {
    "NaN": (sent(5, params={**START, "fc2.bias": np.full(4, np.nan, np.float32)}), "not finite"),
    "empty": (sent(5, params={}), "sent nothing"),
    "no table": (sent(5, params=[1, 2]), "must send layers"),
    "other kind": (sent(5, ParamsType.DIFF), "DIFF"),
    "wrong shape": (sent(5, params={**START, "fc2.bias": np.zeros(5, np.float32)}), "must have shape"),
    "steps": (sent(5, meta={"client_name": "site-5", FLMetaKey.NUM_STEPS_CURRENT_ROUND: float("inf")}), "a count"),
    "lost": (sent(5, params={**START, "fc2.bias": Lazy(None)}), "cannot be read"),
}


@pytest.mark.parametrize("fault", BAD)
def test_faults_are_left_out_and_flagged(fault):
    model, reason = BAD[fault]
    aggregator = GradlensAggregator()
    found, _ = played(aggregator, [sent(0), sent(1), model, sent(2)])
    expected = np.mean([LOG[0].updates["fc2.bias"][place] for place in range(3)], axis=0)
    np.testing.assert_allclose(found["fc2.bias"], START["fc2.bias"] + expected, atol=1e-6)
    log = aggregator.log
    verdict = log.verdict(DETECTORS["final_rows"]())
    assert verdict.flags[verdict.clients == "site-5"].tolist() == [True]
    if fault != "NaN":
        assert reason in log[0].refused["site-5"]


def test_what_waits_on_the_disk_is_read():
    models = [sent(place, params={n: Lazy(START[n] + LOG[0].updates[n][place]) for n in START}) for place in range(3)]
    found, _ = played(GradlensAggregator(), models)
    expected = np.mean([LOG[0].updates["fc2.bias"][place] for place in range(3)], axis=0)
    np.testing.assert_allclose(found["fc2.bias"], START["fc2.bias"] + expected, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_tensors_come_back_as_tensors(kind):
    torch = pytest.importorskip("torch")
    state = {name: torch.from_numpy(np.array(array)) for name, array in START.items()}
    found, _ = played(GradlensAggregator(), [sent(place, kind) for place in range(3)], state)
    assert {name: (value.dtype, value.shape) for name, value in found.items()} == {
        name: (value.dtype, value.shape) for name, value in state.items()
    }


def test_settings_that_mean_nothing_are_one_line():
    with pytest.raises(InputError, match="detector: there is no"):
        GradlensAggregator(detector="nobody")
    with pytest.raises(InputError, match="aggregator: there is no"):
        GradlensAggregator(aggregator="nobody")
    with pytest.raises(InputError, match="settings: expected"):
        GradlensAggregator(settings={"filters": {}})
    with pytest.raises(InputError, match="no global model was sent"):
        GradlensAggregator().aggregate_model()


@pytest.fixture(scope="module")
def simulated(tmp_path_factory):
    folder = tmp_path_factory.mktemp("nvflare")
    for kind in ("FULL", "DIFF"):
        ran("nvflare_app.py", kind, str(folder), "final_rows")
    return folder


@pytest.mark.parametrize("kind", ["FULL", "DIFF"])
def test_a_real_simulation_is_recorded_and_filtered(kind, simulated):
    run = gradlens.open(simulated / kind)
    assert (run.verify().intact, run.is_closed) == (True, True)
    assert [(len(round_), round_.refused) for round_ in run.log] == [(6, {})] * 3
    for _, round_ in run.verdicts.groupby("round"):
        assert set(round_["client"][~round_["kept"]]) == {"site-2", "site-5"}
    offline = gradlens.detect(run, {"final_rows": DETECTORS["final_rows"]()})
    assert run.verdicts["score"].tolist() == offline["score"].tolist()
    with np.load(simulated / f"{kind}.npz", allow_pickle=False) as file:
        last = dict(file)
    assert reached(last)["asr"] < 0.1
    rule = filtered(mean(weighted=True), DETECTORS["final_rows"]())
    for name, update in rule(run.log).items():  # what FLARE saved is what the run says came of it
        np.testing.assert_allclose(last[name], run.log[-1].global_model[name] + update, atol=1e-6)


def test_a_real_simulation_of_short_numbers_starts_each_round_from_what_the_last_one_returned(tmp_path):
    torch = pytest.importorskip("torch")
    ran("nvflare_app.py", "BFLOAT16", str(tmp_path), "final_rows")
    run = gradlens.open(tmp_path / "BFLOAT16")
    assert (run.verify().intact, run.is_closed) == (True, True)
    assert [(len(round_), round_.refused) for round_ in run.log] == [(6, {})] * 3  # a gap would be a round of nobody
    names = [f"BFLOAT16-{index}.npz" for index in range(3)] + ["BFLOAT16.npz"]
    models = []
    for name in names:  # what a client was sent in each round, and what FLARE saved at the end
        with np.load(tmp_path / name, allow_pickle=False) as file:
            models.append(dict(file))
    rule = filtered(mean(weighted=True), DETECTORS["final_rows"]())
    for prefix, before, after in zip(run.log.prefixes(), models[:-1], models[1:], strict=True):
        round_, update = prefix[-1], rule(prefix)
        for name, array in round_.global_model.items():
            np.testing.assert_array_equal(array, before[name])
            np.testing.assert_array_equal(after[name], short(torch, array + update[name]))
            local = array + round_.updates[name]
            np.testing.assert_allclose(local, short(torch, local), atol=1e-7)  # as the clients sent it
    for _, decided in run.verdicts.groupby("round"):
        assert set(decided["client"][~decided["kept"]]) == {"site-2", "site-5"}


def short(torch, array):
    return torch.tensor(array).bfloat16().float().numpy()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_model_of_short_numbers_has_no_round_between_its_rounds(kind, dtype, tmp_path):
    torch = pytest.importorskip("torch")
    state = {name: torch.tensor(array).to(getattr(torch, dtype)) for name, array in START.items()}
    aggregator = GradlensAggregator(str(tmp_path / "run"))
    for index in range(3):
        models = []
        for place in range(4):
            update = {name: torch.tensor(LOG[0].updates[name][place] * (index + 1)) for name in START}
            params = update if kind == ParamsType.DIFF else {name: state[name].float() + update[name] for name in START}
            models.append(
                sent(place, kind, params={name: value.to(state[name].dtype) for name, value in params.items()})
            )
        state, _ = played(aggregator, models, state)
    told(aggregator, EventType.END_RUN)
    log = gradlens.open(tmp_path / "run").log
    assert [len(round_) for round_ in log] == [4, 4, 4]


def test_a_tensor_without_numbers_is_handed_back(tmp_path):
    empty = {"bn.count": np.zeros(0)}
    models = [sent(place, params={**sent(place).params, **empty}) for place in range(4)]
    found, _ = played(GradlensAggregator(), models, {**START, **empty})
    assert found["bn.count"].size == 0
    assert set(found) == {*START, "bn.count"}


ALL_WRONG = {
    "the other form": (lambda p: {"params_type": ParamsType.DIFF}, "sent ParamsType.DIFF, where ParamsType.FULL"),
    "a part": (lambda p: {"params": {"fc1.weight": START["fc1.weight"]}}, "'fc1.bias' is missing; Recorder.layers="),
    "nothing": (lambda p: {"params": {}}, "sent nothing"),
    "no names": (lambda p: {"meta": {}}, "4 different answers came under this name"),
    "diverged": (lambda p: {"params": {n: a * np.float32(np.nan) for n, a in START.items()}}, "norm.count|not finite"),
}


@pytest.mark.parametrize("fault", ALL_WRONG)
def test_what_all_sites_do_wrong_is_said_and_the_model_stays(fault):
    changes, reason = ALL_WRONG[fault]
    aggregator = GradlensAggregator()
    state, _ = played(aggregator, [sent(place) for place in range(4)])
    with pytest.warns(EverybodyRefused, match=reason):
        found, _ = played(aggregator, [sent(place, **changes(place)) for place in range(4)], state)
    for name, array in state.items():
        np.testing.assert_array_equal(found[name], array)
