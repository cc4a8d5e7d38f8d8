"""ByzFL: our detectors before its aggregators, its aggregators inside our filter."""

import warnings

import numpy as np
import pytest
from byzfl_bare import byzfl as installed

import gradlens
import planted
from gradlens import DETECTORS, Recorder, filtered
from gradlens.errors import EverybodyRefused
from gradlens.integrations.byzfl import PreAggregator, wrapped

LOG = planted.PLANTED["shifted class"].log(rounds=2)
START = {name: np.asarray(planted.STATE[name]) for name in planted.LAYERS}  # ByzFL sends parameters alone
CULPRIT = planted.CLIENTS.index(planted.CULPRIT)


@pytest.fixture(scope="module")
def byzfl():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its imports
        return installed()


def rows(index=0):
    return np.concatenate([LOG[index].flat(name) for name in planted.LAYERS], axis=1)


def as_rows(kind, given):
    torch = pytest.importorskip("torch")
    return {
        "array": lambda: given,
        "arrays": lambda: list(given),
        "tensor": lambda: torch.from_numpy(given),
        "tensors": lambda: list(torch.from_numpy(given)),
    }[kind]()


KINDS = ["array", "arrays", "tensor", "tensors"]


@pytest.mark.parametrize("kind", KINDS)
def test_whom_the_detector_flags_does_not_reach_the_rule(byzfl, kind):
    pre = PreAggregator(Recorder(detector="final_rows", sent="updates"), START)
    given = as_rows(kind, rows())
    found = pre(given)
    assert type(found) is type(given)
    assert type(found[0]) is type(given[0])
    np.testing.assert_array_equal(np.stack([np.asarray(each) for each in found]), np.delete(rows(), CULPRIT, axis=0))
    np.testing.assert_allclose(byzfl.Average()(found), np.delete(rows(), CULPRIT, axis=0).mean(axis=0), atol=1e-6)


@pytest.mark.parametrize("name", DETECTORS)
def test_every_detector_stands_before_byzfls_pipeline(byzfl, name, tmp_path):
    with Recorder(tmp_path / "run", detector=name, sent="updates") as recorder:
        pipeline = byzfl.RobustAggregator({"name": "Median", "parameters": {}}, [])
        pipeline.pre_agg_list.append(PreAggregator(recorder, START))
        for index in range(2):
            found = pipeline.aggregate_vectors(rows(index))
    run = gradlens.open(tmp_path / "run")
    live, offline = run.verdicts, gradlens.detect(run, {name: DETECTORS[name]()})
    assert live["score"].tolist() == offline["score"].tolist()
    last = live[live["round"] == 1]
    kept = last["client"][last["kept"]].astype(int).tolist()
    np.testing.assert_allclose(found, np.median(rows(1)[kept], axis=0), atol=1e-6)


@pytest.mark.parametrize("sent", ["updates", "models"])
def test_where_all_are_rejected_one_vector_that_changes_nothing_is_left(sent):
    state = {name: array + np.float32(3) for name, array in START.items()}
    pre = PreAggregator(Recorder(detector="krum", sent=sent), lambda: state)
    with pytest.warns(EverybodyRefused, match="nothing of 12 clients is used: not finite"):
        found = pre(np.full_like(rows(), np.nan))
    assert found.shape == (1, rows().shape[1])
    assert np.unique(found).tolist() == ([0.0] if sent == "updates" else [3.0])


def test_local_models_are_judged_by_their_updates():
    state = {name: array + np.float32(3) for name, array in START.items()}
    recorder = Recorder(detector="final_rows", sent="models")
    found = PreAggregator(recorder, lambda: state)(rows() + np.float32(3))
    assert found.shape == (11, rows().shape[1])
    np.testing.assert_allclose(recorder.log[0].updates["fc2.bias"], LOG[0].updates["fc2.bias"], atol=1e-6)


def test_a_vector_of_another_length_is_refused():
    recorder = Recorder(detector="final_rows", sent="updates")
    found = PreAggregator(recorder, START)([*rows()[:4], rows()[4, :-1]])
    assert recorder.log[0].refused == {"4": "a vector must hold 64 numbers, found 63"}
    assert all(each.shape == (64,) for each in found)


RULES = ["Average", "Median", "TrMean", "GeometricMedian", "Krum", "MultiKrum", "MDA", "Meamed", "CenteredClipping"]


def rule_of(byzfl, name):
    takes_f = name in ("TrMean", "Krum", "MultiKrum", "MDA", "Meamed")
    return getattr(byzfl, name)(2) if takes_f else getattr(byzfl, name)()


@pytest.mark.parametrize("name", RULES)
def test_byzfls_rules_aggregate_inside_our_filter(byzfl, name):
    rule = wrapped(rule_of(byzfl, name))
    found = filtered(rule, DETECTORS["final_rows"]())(LOG)
    expected = rule_of(byzfl, name)(np.delete(rows(1), CULPRIT, axis=0))
    vector = np.concatenate([found[layer].ravel() for layer in planted.LAYERS])
    np.testing.assert_array_equal(vector, np.asarray(expected, np.float32))
    assert {n: (a.shape, a.dtype) for n, a in found.items()} == {
        n: (a.shape, a.dtype) for n, a in planted.STATE.items()
    }
    assert found["norm.count"] == 2  # a buffer is averaged
    assert repr(rule).startswith(f"wrapped({name}(")
    assert "object at 0x" not in repr(rule)


def test_f_is_lowered_where_few_are_left_and_stays_for_the_next_round(byzfl):
    own = byzfl.TrMean(3)
    rule = wrapped(own)
    few = LOG[:1].keep(np.arange(4))
    expected = byzfl.TrMean(1)(rows()[:4])
    np.testing.assert_allclose(rule(few)["fc2.bias"], expected[-4:], atol=1e-7)
    assert own.f == 3


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_never_enters(byzfl, value):
    found = wrapped(byzfl.Median())(planted.with_client_at(LOG, value))
    expected = np.median(np.delete(rows(1), CULPRIT, axis=0), axis=0)
    np.testing.assert_allclose(found["fc2.bias"], expected[-4:], atol=1e-6)


def test_without_clients_the_update_is_zero(byzfl):
    found = wrapped(byzfl.TrMean(1))(planted.clean_log(clients=()))
    assert all((array == 0).all() for array in found.values())
