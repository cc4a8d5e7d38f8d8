"""Low-rank adapters: products of two layers, judged from their factors as if they had been formed."""

import numpy as np
import pytest

import gradlens
from gradlens import DETECTORS, STATISTICS, CannotSay, InputError, ModelSpec, Recorder, Round, UpdateLog
from gradlens.detectors.products import on_products
from gradlens.log.adapters import Pair, pairs_of, with_products
from gradlens.log.intake import received, spec_of
from gradlens.statistics import adapter_angles, adapter_rank, adapter_share

CLIENTS = np.array([f"c{i}" for i in range(9)])


def state_of(rank=3, outputs=7, inputs=10):
    rng = np.random.default_rng(1)
    state = {}
    for module in ("q", "v"):
        state[f"{module}.lora_A.weight"] = rng.normal(size=(rank, inputs)).astype(np.float32)
        state[f"{module}.lora_B.weight"] = rng.normal(size=(outputs, rank)).astype(np.float32)
    return state | {"head.weight": np.zeros((4, 7), np.float32), "head.bias": np.zeros(4, np.float32)}


def adapted(rounds=3, seed=0, **shape):
    rng, state = np.random.default_rng(seed), state_of(**shape)
    log = UpdateLog(ModelSpec.of(state))
    for index in range(rounds):
        updates = {name: rng.normal(scale=0.1, size=(9, *array.shape)) for name, array in state.items()}
        log = log.append(Round(index, CLIENTS, np.ones(9), updates, state))
    return log


def formed(log):
    """The same log with every product formed for every client."""
    rounds, model = [], None
    for round_ in log:
        updates, state = {}, {}
        for module in ("q", "v"):
            names = [f"{module}.lora_{part}.weight" for part in "AB"]
            a, b = (np.asarray(round_.global_model[name], np.float64) for name in names)
            da, db = (round_.updates[name].astype(np.float64) for name in names)
            updates[f"{module}.lora"] = (b + db) @ (a + da) - b @ a
            state[f"{module}.lora"] = (b @ a).astype(np.float32)
        rest = {name: round_.updates[name] for name in ("head.weight", "head.bias")}
        state |= {name: round_.global_model[name] for name in rest}
        model = model or ModelSpec.of(state, final_layer="head")
        rounds.append(Round(round_.index, round_.clients, round_.num_examples, updates | rest, state))
    assert model is not None
    return UpdateLog(model, rounds)


def test_pairs_are_found_by_their_names_and_shapes():
    assert pairs_of(ModelSpec.of(state_of()))[0] == Pair("q.lora", "q.lora_A.weight", "q.lora_B.weight")
    peft = {
        "base.q.lora_A.default.weight": (4, 8), "base.q.lora_B.default.weight": (6, 4),
        "base.e.lora_embedding_A.default": (4, 50), "base.e.lora_embedding_B.default": (8, 4),
        "base.c.lora_A.weight": (4, 3, 3, 3), "base.c.lora_B.weight": (9, 4, 1, 1),
        "odd.lora_A.weight": (4, 8), "odd.lora_B.weight": (6, 5), "alone.lora_A.weight": (4, 8),
    }  # fmt: skip
    model = spec_of({name: np.zeros(shape) for name, shape in peft.items()})
    assert [pair.name for pair in pairs_of(model)] == ["base.q.lora", "base.e.lora", "base.c.lora"]
    own = spec_of({"x.down": np.zeros((2, 5)), "x.up": np.zeros((5, 2))})
    assert pairs_of(own) == ()
    assert pairs_of(own, [(r"\bdown$", "up")]) == (Pair("x.lora", "x.down", "x.up"),)


def test_adapters_of_keras_are_a_pair_the_other_way_round():
    """Kernels are [in, out] there, and change by a b."""
    rng = np.random.default_rng(0)
    shapes = {"dense/lora_kernel_a": (8, 2), "dense/lora_kernel_b": (2, 6), "e/lora_embeddings_a": (9, 2)}
    state = {name: rng.normal(size=shape) for name, shape in (shapes | {"e/lora_embeddings_b": (2, 5)}).items()}
    model = spec_of(state)
    assert [pair.name for pair in pairs_of(model)] == ["dense.lora", "e.lora"]
    moved = {name: array + rng.normal(size=array.shape) for name, array in state.items()}
    product = with_products(UpdateLog(model, [received(0, model, state, {"c": moved}, as_models=True).round_]))[-1]
    for module, what in (("dense", "kernel"), ("e", "embeddings")):
        before, after = (each[f"{module}/lora_{what}_a"] @ each[f"{module}/lora_{what}_b"] for each in (state, moved))
        np.testing.assert_allclose(product.updates[f"{module}.lora"][0], after - before, rtol=1e-4, atol=1e-5)


def test_products_have_the_norms_inner_products_and_numbers_of_formed_ones():
    log = adapted()
    round_, expected = with_products(log)[-1], formed(log)[-1]
    assert [layer.kind for layer in with_products(log).model.layers] == ["adapter", "adapter", "parameter", "parameter"]
    assert with_products(log).model.final_bias == "head.bias"
    for name in expected.updates:
        np.testing.assert_allclose(round_.gram[name], expected.gram[name], rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(round_.norms[name], expected.norms[name], rtol=1e-6)
        np.testing.assert_allclose(round_.updates[name], expected.updates[name], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(round_.median[name], expected.median[name], rtol=1e-5, atol=1e-6)
    blocks = np.concatenate(list(round_.blocks("q.lora", 4)), axis=1)  # of a size that no row has
    np.testing.assert_array_equal(blocks, round_.flat("q.lora"))
    np.testing.assert_allclose(round_.squared_distances, expected.squared_distances, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", sorted(set(STATISTICS) - {"ddif", "global_cosines"}))
def test_every_statistic_says_of_products_what_it_says_of_formed_ones(name):
    log = adapted(rounds=4)
    expected, found = STATISTICS[name](formed(log)), STATISTICS[name](with_products(log))
    assert found.columns.tolist() == expected.columns.tolist()
    np.testing.assert_allclose(found.to_numpy(), expected.to_numpy(), rtol=1e-3, atol=1e-5)


def test_selections_and_combinations_of_clients_have_products_too():
    log = adapted(rounds=1)
    product, whole = with_products(log), formed(log)
    chosen = np.array([1, 4, 7])
    for layer in whole.model:
        np.testing.assert_allclose(
            product.keep(chosen)[-1].gram[layer], whole.keep(chosen)[-1].gram[layer], rtol=1e-5, atol=1e-7
        )
    matrix = np.array([[0.5, 0.5, 0, 0, 0, 0, 0, 0, 0], [0, 0, 2.0, 0, 0, 0, 0, 0, 0]])
    one, other = (each[-1].combined(matrix, np.array(["m", "n"])) for each in (product, whole))
    np.testing.assert_allclose(one.updates["q.lora"], other.updates["q.lora"], rtol=1e-4, atol=1e-6)
    assert list(product.only("q.lora").model if hasattr(product, "only") else []) == ["q.lora"]


def test_a_client_that_sends_infinity_stays_in_its_row():
    log = adapted(rounds=1)
    before = with_products(log)[-1]
    updates = {name: np.array(rows) for name, rows in log[-1].updates.items()}
    updates["q.lora_A.weight"][2, 0, 0] = np.inf
    broken = UpdateLog(log.model, [Round(0, CLIENTS, np.ones(9), updates, log[-1].global_model)])
    after = with_products(broken)[-1]
    others = np.delete(np.arange(9), 2)
    assert not after.finite[2]
    np.testing.assert_array_equal(after.norms["q.lora"][others], before.norms["q.lora"][others])
    np.testing.assert_allclose(
        after.gram["q.lora"][np.ix_(others, others)], before.gram["q.lora"][np.ix_(others, others)], rtol=1e-12
    )
    for statistic in (adapter_rank, adapter_share, adapter_angles):
        assert statistic(broken).iloc[2].isna().all()


def test_another_pair_of_the_same_product_is_the_same_client():
    """B'A' does not change where A' is turned by a matrix and B' by its inverse, which A and B apart do."""
    log = adapted(rounds=1)
    turn = np.array([[2.0, 1, 0], [0, 1, 0], [1, 0, 1]])
    updates = {name: np.array(rows, np.float64) for name, rows in log[-1].updates.items()}
    for module in ("q", "v"):
        a, b = f"{module}.lora_A.weight", f"{module}.lora_B.weight"
        first, second = log[-1].global_model[a], log[-1].global_model[b]
        updates[a][0] = turn @ (first + updates[a][0]) - first
        updates[b][0] = (second + updates[b][0]) @ np.linalg.inv(turn) - second
    turned = UpdateLog(log.model, [Round(0, CLIENTS, np.ones(9), updates, log[-1].global_model)])
    np.testing.assert_allclose(
        with_products(turned)[-1].norms["q.lora"], with_products(log)[-1].norms["q.lora"], rtol=1e-4
    )
    assert turned[-1].norms["q.lora_A.weight"][0] > 2 * log[-1].norms["q.lora_A.weight"][0]


def test_rank_share_and_angles_are_those_of_formed_products():
    log = adapted(rounds=1)
    dense = formed(log)[-1].updates["q.lora"].astype(np.float64)
    left, values, right = np.linalg.svd(dense, full_matrices=False)
    shares = values / values.sum(axis=1, keepdims=True)
    ranks = np.exp(-(np.where(shares > 1e-7, shares * np.log(np.maximum(shares, 1e-12)), 0)).sum(axis=1))
    np.testing.assert_allclose(adapter_rank(log)["q.lora"], ranks, rtol=1e-3)
    leading = values[:, 0] ** 2 / (values**2).sum(axis=1)
    np.testing.assert_allclose(adapter_share(log)["q.lora"], leading, rtol=1e-4)
    for side, bases in (("outputs", left[:, :, :3]), ("inputs", right.transpose(0, 2, 1)[:, :, :3])):
        cosines = np.array([[np.linalg.norm(one.T @ other) ** 2 / 3 for other in bases] for one in bases])
        expected = [np.median(np.delete(row, i)) for i, row in enumerate(cosines)]
        found = adapter_angles(log)[f"q.lora {side}"]
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5)


def test_a_direction_of_its_own_stands_out_by_share_and_angle_whatever_its_size():
    rng, state = np.random.default_rng(0), state_of(outputs=40, inputs=30)
    common = {name: rng.normal(size=array.shape) for name, array in state.items()}
    updates = {name: common[name] + 0.3 * rng.normal(size=(9, *array.shape)) for name, array in state.items()}
    updates["q.lora_B.weight"][8] = np.outer(rng.normal(size=40), [5.0, 0, 0])
    log = UpdateLog(ModelSpec.of(state), [Round(0, CLIENTS, np.ones(9), updates, state)])
    assert adapter_share(log)["q.lora"].idxmax() == "c8"
    assert adapter_angles(log)["q.lora outputs"].idxmin() == "c8"


def test_models_without_adapters_and_sketches_of_them_have_none_of_this():
    from gradlens.examples import example_log

    assert with_products(example_log()) is not None
    for statistic in (adapter_rank, adapter_share, adapter_angles):
        with pytest.raises(CannotSay, match="the model has no adapter"):
            statistic(example_log())
    with Recorder(evidence=gradlens.Evidence("sketch", width=8, seed=1)) as recorder:
        recorder.log_round(state_of(), {name: state_of() for name in "abc"})
        with pytest.raises(InputError, match="was recorded as a sketch, its product is not known"):
            with_products(recorder.log)
        with pytest.raises(CannotSay, match="not recorded in full"):
            adapter_rank(recorder.log)


def test_a_smaller_rank_is_filled_with_zeros_and_a_larger_one_refused():
    state = state_of(rank=3)
    smaller, larger = state_of(rank=2), state_of(rank=4)
    model = spec_of(state)
    round_ = received(0, model, state, {"a": state, "b": smaller, "c": larger}, as_models=True).round_
    assert round_.clients.tolist() == ["a", "b"]
    assert "must have shape (3, 10), found (4, 10)" in round_.refused["c"]
    product = with_products(UpdateLog(model, [round_]))[-1].updates["q.lora"][1].astype(np.float64)
    expected = (
        smaller["q.lora_B.weight"] @ smaller["q.lora_A.weight"] - state["q.lora_B.weight"] @ state["q.lora_A.weight"]
    )
    np.testing.assert_allclose(product, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["layer_norms", "krum", "flame", "foolsgold", "panel", "spectral"])
def test_detectors_judge_products_as_they_judge_formed_ones(name):
    log = adapted(rounds=4)
    expected, found = DETECTORS[name]()(formed(log)), DETECTORS[name]()(with_products(log))
    np.testing.assert_array_equal(found.flags, expected.flags)
    np.testing.assert_allclose(found.scores, expected.scores, rtol=1e-3, atol=1e-4)


def test_an_investigation_reads_products_of_adapters_by_itself():
    log = adapted(rounds=12)
    case = gradlens.investigate(log)
    places = set(case.clients["layer"].dropna())
    assert places <= {"q.lora", "v.lora", "head.weight", "head.bias"}


def test_detect_reads_products_and_a_live_filter_does_where_it_is_told():
    log = adapted(rounds=3)
    table = gradlens.detect(log, {"norms": DETECTORS["layer_norms"]()})
    expected = [DETECTORS["layer_norms"]()(prefix).scores for prefix in formed(log).prefixes()]
    np.testing.assert_allclose(table["score"], np.concatenate(expected), rtol=1e-3)
    live = on_products(DETECTORS["layer_norms"]())
    np.testing.assert_allclose(live(log).scores, expected[-1], rtol=1e-3)
    with Recorder(filter=gradlens.filtered(gradlens.AGGREGATORS["mean"](), live)) as recorder:
        decision = recorder.log_round(state_of(), {name: state_of() for name in "abcd"})
    assert decision.kept == list("abcd")


def test_factors_whose_product_is_beyond_float32_are_not_finite():
    log = adapted(rounds=2)
    updates = {name: np.array(rows) for name, rows in log[-1].updates.items()}
    for name in ("q.lora_A.weight", "q.lora_B.weight"):
        updates[name][4] = 1e30  # each is finite, their product is not
    hostile = UpdateLog(log.model, [log[0], Round(1, CLIENTS, np.ones(9), updates, log[-1].global_model)])
    products, others = with_products(hostile), np.delete(np.arange(9), 4)
    assert np.flatnonzero(~products[-1].finite).tolist() == [4]
    for name, statistic in STATISTICS.items():
        try:
            answer = statistic(products)
        except CannotSay:
            continue
        assert np.isfinite(answer.to_numpy()[others]).any(), name
    expected = STATISTICS["layer_norms"](with_products(log)).to_numpy()[others]
    np.testing.assert_array_equal(STATISTICS["layer_norms"](products).to_numpy()[others], expected)
