"""The record in memory: rounds, logs, what is derived from them, what a client cannot break."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import STATE, random_round
from gradlens.errors import CannotSay, InputError
from gradlens.log import Layer, ModelSpec, Round, UpdateLog, accumulated, memory
from gradlens.log import round as round_module
from gradlens.log.intake import received
from gradlens.settings import whole_number


@pytest.fixture
def log(model) -> UpdateLog:
    return UpdateLog(model, [random_round(i) for i in range(5)])


# --- the model


def test_the_final_layer_is_found(model):
    assert (model.final_weight, model.final_bias) == ("fc2.weight", "fc2.bias")
    assert model.parameters == ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias")
    assert model.buffers == ("norm.count",)
    assert model.num_parameters == 24 + 4 + 12 + 3


def test_a_model_without_final_bias_says_so():
    state = {"fc1.weight": np.zeros((4, 6)), "fc1.bias": np.zeros(4), "fc2.weight": np.zeros((3, 4))}
    assert ModelSpec.of(state).final_weight == "fc2.weight"
    assert ModelSpec.of(state).final_bias is None


def test_the_final_layer_can_be_named():
    named = ModelSpec.of(STATE, buffers=["norm.count"], final_weight="fc1.weight")
    assert (named.final_weight, named.final_bias) == ("fc1.weight", "fc1.bias")


def test_a_specification_survives_json(model):
    assert ModelSpec.from_json(model.to_json()) == model


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (lambda: Layer("a", (0, 3)), "every dimension must be at least 1"),
        (lambda: Layer("a", (3,), "float16"), "parameters are recorded as float32"),
        (lambda: Layer("a", (3,), "bool", "buffer"), "dtype must be one of"),
        (lambda: ModelSpec((Layer("a", (2,)), Layer("a", (2,)))), "found 'a' twice"),
        (lambda: ModelSpec(()), "needs a parameter layer, found none"),
        (lambda: ModelSpec((Layer("a", (2,)),), final_bias="b"), "'b' is not a parameter layer"),
        (lambda: ModelSpec.from_json({"layers": [{"name": "a"}]}), "not readable"),
    ],
)
def test_a_wrong_model_is_refused_in_one_line(fault, message):
    with pytest.raises(InputError, match=message) as caught:
        fault()
    assert "\n" not in str(caught.value)


# --- a round


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_examples": np.array([1, 2])}, "4 clients but 2 num_examples"),
        ({"clients": np.array(["a", "b", "c", "a"])}, "client 'a' appears twice"),
        ({"refused": {"a": "sent nothing"}}, "client 'a' is both recorded and refused"),
        ({"updates": {"fc1.weight": np.zeros((4, 4, 6))}}, "is not in both the updates and the global model"),
        (
            {"updates": {k: np.zeros((3, *v.shape)) for k, v in STATE.items()}},
            r"'fc1.weight' must have shape \(4, 4, 6\), found \(3, 4, 6\)",
        ),
    ],
)
def test_what_the_caller_gets_wrong_is_one_clear_line(changes, message):
    with pytest.raises(InputError, match=message) as caught:
        random_round(0, **changes)
    assert "\n" not in str(caught.value)


def test_a_layer_that_the_model_lacks_is_refused(model):
    extra = {"fc9.weight": np.zeros((4, 2), np.float32)}
    strange = random_round(
        0,
        updates=dict(random_round(0).updates) | extra,
        global_model=STATE | {"fc9.weight": np.zeros(2, np.float32)},
    )
    with pytest.raises(InputError, match=r"layer 'fc9\.weight' is in the updates alone"):
        UpdateLog(model, [strange])


def test_what_a_client_sends_never_raises(model):
    good = {name: np.ones_like(array) for name, array in STATE.items()}
    sent = {
        "good": good,
        "nan": good | {"fc2.bias": np.array([np.nan, 1, np.inf])},
        "huge": good | {"fc2.bias": np.full(3, 1e300)},
        "shape": good | {"fc2.bias": np.ones(4)},
        "missing": {name: array for name, array in good.items() if name != "fc1.bias"},
        "extra": good | {"fc3.bias": np.ones(2)},
        "nothing": None,
        "empty": {},
        "text": good | {"fc2.bias": np.array(["x", "y", "z"])},
        "ragged": good | {"fc2.bias": [[1.0], [1.0, 2.0], 3.0]},
        "object": good | {"fc2.bias": np.array([1, None, 3], dtype=object)},
        "counter": good | {"norm.count": np.array(np.nan)},
        "claim": good,
        "many": good,
        "bad\0name": good,
    }
    claims = dict.fromkeys(sent, 5) | {"claim": float("nan"), "many": 2**70}
    round_ = received(0, model, STATE, sent, claims, as_models=False).round_
    assert list(round_.clients) == ["good", "nan", "huge"]
    assert set(round_.refused) == set(sent) - {"good", "nan", "huge", "bad\0name"} | {"bad\\x00name"}
    assert round_.refused["shape"] == "layer 'fc2.bias' must have shape (3,), found (4,)"
    assert round_.refused["missing"] == "layer 'fc1.bias' is missing"
    assert round_.refused["extra"] == "layer 'fc3.bias' is not in the model"
    assert round_.refused["nothing"] == round_.refused["empty"] == "sent nothing"
    assert all(reason and "\n" not in reason for reason in round_.refused.values())
    np.testing.assert_array_equal(round_.finite, [True, False, False])
    np.testing.assert_array_equal(round_.updates["fc2.bias"][1], np.array([np.nan, 1, np.inf], np.float32))


def test_updates_cannot_be_written_into(log):
    with pytest.raises(ValueError, match="read-only"):
        log[0].updates["fc2.bias"][0] = 0


def test_gram_is_the_plain_inner_product(rng):
    updates = {"w": rng.normal(size=(5, 40, 900)).astype(np.float32)}  # more than one block
    round_ = Round(0, list("abcde"), np.ones(5), updates, {"w": np.zeros((40, 900), np.float32)})
    flat = updates["w"].reshape(5, -1).astype(np.float64)
    np.testing.assert_allclose(round_.gram["w"], np.array([[u @ v for v in flat] for u in flat]), rtol=1e-12)
    np.testing.assert_allclose(round_.norms["w"], np.linalg.norm(flat, axis=1), rtol=1e-12)
    np.testing.assert_allclose(round_.median["w"], np.median(updates["w"], axis=0), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e6, 1e30])
def test_one_client_changes_nobody_elses_entries(value):
    updates = {name: array.copy() for name, array in random_round(0).updates.items()}
    updates["fc2.weight"][2] = value
    hostile, others = random_round(0, updates=updates), np.array([0, 1, 3])
    without = random_round(0).take(others)
    np.testing.assert_array_equal(hostile.comparable, [True, True, False, True])
    for name in hostile.parameters:
        np.testing.assert_allclose(hostile.gram[name][np.ix_(others, others)], without.gram[name], rtol=1e-12)
        np.testing.assert_array_equal(hostile.median[name], without.median[name])


def test_a_round_of_many_clients_forms_no_pairs(monkeypatch):
    monkeypatch.setattr(round_module, "PAIRWISE", 3)
    round_ = random_round(0)
    with pytest.raises(CannotSay, match="4 clients: nothing pairwise"):
        _ = round_.gram["fc2.bias"]
    np.testing.assert_allclose(
        round_.norms["fc2.bias"], np.linalg.norm(round_.updates["fc2.bias"].astype(float), axis=1)
    )
    few = random_round(0).take([0, 2, 3])
    np.testing.assert_array_equal(round_.take([0, 2, 3]).gram["fc2.bias"], few.gram["fc2.bias"][:3, :3])


@given(st.lists(st.floats(-(2.0**126), 2.0**126, width=32), min_size=1, max_size=9))
def test_the_median_is_numpys(values):
    column, count = np.array(values, np.float32)[:, None], len(values)
    round_ = Round(0, [str(i) for i in range(count)], np.ones(count), {"w": column}, {"w": np.zeros(1)})
    found = round_.trimmed_mean("w", clients=np.ones(count, bool))  # also of those that are not comparable
    np.testing.assert_allclose(found[0], np.median(column.astype(np.float64)), rtol=1e-6, atol=1e-44)


def test_a_part_of_a_round_is_that_part():
    whole, part = random_round(0), random_round(0).take([3, 1])
    assert list(part.clients) == ["d", "b"]
    for name in whole.parameters:
        np.testing.assert_array_equal(part.updates[name], whole.updates[name][[3, 1]])
        np.testing.assert_array_equal(part.gram[name], whole.gram[name][np.ix_([3, 1], [3, 1])])


def test_an_empty_round_has_empty_answers(model):
    round_ = received(0, model, STATE, {"a": None}, {"a": 1}, as_models=False).round_
    assert len(round_) == 0
    assert round_.gram["fc2.bias"].shape == (0, 0)
    assert round_.comparable.shape == (0,)
    np.testing.assert_array_equal(round_.median["fc2.bias"], np.zeros(3))


# --- a log


def test_a_log_is_a_sequence(log):
    assert len(log) == 5
    assert [round_.index for round_ in log] == [0, 1, 2, 3, 4]
    assert log[-1].index == 4
    assert [r.index for r in log[1:3]] == [1, 2]
    assert [len(prefix) for prefix in log.prefixes()] == [1, 2, 3, 4, 5]
    with pytest.raises(IndexError):
        log[5]
    with pytest.raises(InputError, match="a step of 2"):
        log[::2]


def test_a_prefix_copies_nothing(log):
    assert log[:2][0] is log[0]


def test_keep_restricts_the_last_round_only(log):
    kept = log.keep(np.array([True, False, True, True]))
    assert list(kept[-1].clients) == ["a", "c", "d"]
    assert list(kept[0].clients) == ["a", "b", "c", "d"]
    assert list(kept[:2][-1].clients) == ["a", "b", "c", "d"]
    assert list(kept.keep(np.array([2]))[-1].clients) == ["d"]
    assert list(log[-1].clients) == ["a", "b", "c", "d"]


def test_two_futures_of_one_past_do_not_mix(model, log):
    past = log[:3]
    one, other = past.append(random_round(3, seed=1)), past.append(random_round(3, seed=2))
    assert len(past) == 3
    for name in model.parameters:
        assert not np.array_equal(one[-1].updates[name], other[-1].updates[name])
        np.testing.assert_array_equal(log[3].updates[name], random_round(3).updates[name])


def naive_accumulated(rounds, layer):
    """The definition, client by client, in float64."""
    sums, counts = {}, {}
    for round_ in rounds:
        x = round_.flat(layer).astype(np.float64)
        residuals = x - np.median(x, axis=0)
        norms = np.linalg.norm(residuals, axis=1)
        bound = 3 * np.median(norms[norms > 0])
        for client, residual, norm in zip(round_.clients, residuals, norms, strict=True):
            sums[client] = sums.get(client, 0) + residual * min(1, bound / norm) if norm else sums.get(client, 0)
            counts[client] = counts.get(client, 0) + 1
    return sums, counts


def test_accumulated_is_its_definition_with_changing_participants(model):
    rounds = [random_round(0, "abcd"), random_round(1, "cdef"), random_round(2, "abef"), random_round(3, "bacd")]
    log = UpdateLog(model, rounds)
    for prefix in [*log.prefixes(), log[:2], log]:  # forwards, then back again
        total = prefix.accumulated
        for name in model.parameters:
            sums, counts = naive_accumulated(list(prefix), name)
            assert list(total.clients) == sorted(sums)
            assert dict(zip(total.clients, total.rounds, strict=True)) == counts
            expected = np.array([sums[client] for client in total.clients])
            np.testing.assert_allclose(total.sums[name], expected, rtol=1e-5, atol=1e-6)


def test_accumulated_of_a_kept_log_has_the_kept_clients_in_its_last_round(model):
    log = UpdateLog(model, [random_round(i, "abcde") for i in range(3)])
    kept = log.keep(np.array([0, 1, 2, 3])).accumulated
    sums, counts = naive_accumulated([log[0], log[1], log[2].take(np.arange(4))], "fc2.weight")
    assert kept.rounds.tolist() == [counts[c] for c in kept.clients] == [3, 3, 3, 3, 2]
    np.testing.assert_allclose(kept.sums["fc2.weight"], np.array([sums[c] for c in kept.clients]), rtol=1e-5)


def test_one_round_counts_at_most_three_median_residuals(model):
    rounds = [random_round(i, "abcde") for i in range(2)]
    updates = {name: array.copy() for name, array in rounds[1].updates.items()}
    updates["fc2.weight"][4] *= 200
    wild = UpdateLog(model, [rounds[0], random_round(1, "abcde", updates=updates)])
    sums, _ = naive_accumulated(list(wild), "fc2.weight")
    before = wild[:1].accumulated.sums["fc2.weight"][4]
    added = np.linalg.norm(wild.accumulated.sums["fc2.weight"][4] - before)
    residuals = wild[1].flat("fc2.weight") - wild[1].median["fc2.weight"].reshape(-1)
    assert added == pytest.approx(3 * np.median(np.linalg.norm(residuals, axis=1)), rel=1e-4)
    np.testing.assert_allclose(wild.accumulated.sums["fc2.weight"][4], sums["e"], rtol=1e-4)


def test_a_non_finite_update_adds_nothing(model):
    updates = {name: array.copy() for name, array in random_round(1).updates.items()}
    updates["fc1.bias"][0] = np.nan
    log = UpdateLog(model, [random_round(0), random_round(1, updates=updates)])
    total = log.accumulated
    assert total.rounds.tolist() == [1, 2, 2, 2]
    np.testing.assert_array_equal(total.sums["fc2.weight"][0], log[:1].accumulated.sums["fc2.weight"][0])


def test_nothing_has_accumulated_before_the_first_round(log):
    assert log[:0].accumulated.sums["fc2.weight"].shape == (0, 12)


def test_what_was_handed_out_does_not_change(log):
    before = log[:2].accumulated.sums["fc2.weight"]
    copy = before.copy()
    _ = log.accumulated
    np.testing.assert_array_equal(before, copy)


def test_above_the_budget_sums_are_sketched_and_inner_products_hold(monkeypatch, rng):
    """A count sketch of 512 numbers errs by about norm x norm / sqrt(512); four times that is allowed here."""
    model = ModelSpec((Layer("w", (100, 200)), Layer("b", (3,))))
    state = {layer.name: np.zeros(layer.shape, np.float32) for layer in model.layers}
    rounds = []
    for index in range(3):
        updates = {k: rng.normal(size=(6, *v.shape)).astype(np.float32) for k, v in state.items()}
        rounds.append(Round(index, list("abcdef"), np.ones(6), updates, state))
    full = UpdateLog(model, rounds).accumulated
    monkeypatch.setattr(accumulated, "BUDGET", 1_000)
    sketched = UpdateLog(model, rounds).accumulated
    assert (full.sketched, sketched.sketched) == (False, True)
    assert sketched.sums["w"].shape == (6, 512)
    np.testing.assert_allclose(sketched.sums["b"], full.sums["b"], rtol=1e-6)
    exact, estimate = (a.sums["w"] @ a.sums["w"].T for a in (full, sketched))
    assert abs(estimate - exact).max() < 4 / np.sqrt(512) * np.diagonal(exact).max()


def test_a_verdict_is_computed_once_and_shared_by_prefixes(log):
    calls = []

    def detector(prefix):
        calls.append(len(prefix))
        return len(prefix)

    assert log.verdict(detector) == 5
    assert log[:5].verdict(detector) == 5
    assert log[:2].verdict(detector) == 2
    assert log.keep(np.array([0, 1])).verdict(detector) == 5
    assert log.keep(np.array([0, 2])).verdict(detector) == 5
    assert calls == [5, 2, 5, 5]


def test_a_log_touches_one_round_at_a_time(model):
    """However long the log, no more rounds are held than the few recent ones."""
    made = []

    def source(index):
        def make():
            made.append(index)
            return random_round(index)

        return make

    log = UpdateLog.lazy(model, [source(i) for i in range(1_000)])
    assert not made
    for prefix in log.prefixes():
        assert len(prefix[-1].clients) == 4
    assert made == list(range(1_000))
    assert len(log._memory.recent) == memory.RECENT_ROUNDS


def test_who_is_comparable_stays_so_in_a_part(model):
    """Among clients of very different sizes a part has another median; it was judged beside all of them."""
    sizes = np.array([1, 1, 2e3, 5e3, 9e3, 8e3, 7e3], np.float32)
    updates = {
        layer.name: np.ones((7, *layer.shape), layer.dtype)
        if layer.kind == "buffer"
        else sizes.reshape(-1, *[1] * len(layer.shape)) * np.ones((7, *layer.shape), np.float32)
        for layer in model.layers
    }
    round_ = random_round(0, clients="abcdefg", updates=updates)
    assert round_.comparable.all()
    part = UpdateLog(model, [round_]).keep(np.array([0, 1, 2]))[-1]
    assert part.comparable.all()


@pytest.mark.parametrize("value", [3, np.int64(3), np.uint8(3)])
def test_a_whole_number_is_an_int(value):
    found = whole_number("rule: count", value, least=3)
    assert (found, type(found)) == (3, int)


@pytest.mark.parametrize("value", [2, -1, 3.0, np.float64(3), True, "3", None, "x" * 1_000])
def test_what_is_no_whole_number_is_refused_in_one_short_line(value):
    with pytest.raises(InputError, match="rule: count must be a whole number of at least 3, found") as refused:
        whole_number("rule: count", value, least=3)
    assert len(str(refused.value)) < 150
