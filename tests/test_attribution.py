"""Attribution against exact identities, hand-made answers and naive loops."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import planted
from gradlens.attribution import attribution_accuracy, influence, label_drift, suspected_labels, sybils
from gradlens.errors import CannotSay, InputError
from gradlens.log import ModelSpec, Round, UpdateLog

CLASSES, FEATURES = 4, 6
RATE = 0.25
SOFTMAX = {"out.weight": np.zeros((CLASSES, FEATURES), np.float32), "out.bias": np.zeros(CLASSES, np.float32)}


def softmax(x: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    logits = x @ weight.T + bias
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    return p / p.sum(axis=1, keepdims=True)


def trained(state, x, y, batch=5):
    """Plain SGD on softmax cross-entropy: the update, and the sum over steps of mean(y - p)."""
    weight, bias = (np.asarray(state[name], np.float64).copy() for name in ("out.weight", "out.bias"))
    surplus = np.zeros(CLASSES)
    for start in range(0, len(x), batch):
        xs, ys = x[start : start + batch], np.eye(CLASSES)[y[start : start + batch]]
        error = ys - softmax(xs, weight, bias)
        surplus += error.mean(axis=0)
        weight += RATE * error.T @ xs / len(xs)
        bias += RATE * error.mean(axis=0)
    return {"out.weight": weight - state["out.weight"], "out.bias": bias - state["out.bias"]}, surplus


CENTRES = np.abs(np.random.default_rng(5).normal(size=(CLASSES, FEATURES))) * 2


def federation(rounds=3, clients=9, relabel=None, attack_from=0, boost=1.0, seed=0):
    """A log of clients that train a softmax regression; client-00 relabels its data; and everybody's surplus."""
    rng = np.random.default_rng(seed)
    state, made, surpluses = SOFTMAX, [], []
    for index in range(rounds):
        sent, surplus = [], []
        for client in range(clients):
            y = rng.permutation(np.arange(60) % CLASSES)
            x = np.abs(CENTRES[y] + 0.3 * rng.normal(size=(60, FEATURES)))
            poisons = client == 0 and relabel is not None and index >= attack_from
            update, saw = trained(state, *(relabel(x, y) if poisons else (x, y)))
            sent.append({name: array * (boost if poisons else 1) for name, array in update.items()})
            surplus.append(saw)
        updates = {name: np.stack([each[name] for each in sent]).astype(np.float32) for name in state}
        names = np.array([f"client-{i:02d}" for i in range(clients)])
        made.append(Round(index, names, np.full(clients, 60), updates, state))
        surpluses.append(np.array(surplus))
        state = {name: state[name] + updates[name].mean(axis=0) for name in state}
    return UpdateLog(ModelSpec.of(SOFTMAX), made), surpluses


def flip(x, y):
    return x, np.where(y == 2, 3, y)


def trigger(x, y):
    stamped = x.copy()
    stamped[::2, 0] = 6
    return stamped, np.where(np.arange(len(y)) % 2 == 0, 1, y)


# label_drift


def test_drift_is_exactly_the_surplus_of_labels():
    log, surpluses = federation(relabel=flip)
    for index in range(3):
        drift = label_drift(log[: index + 1], learning_rate=RATE)
        expected = surpluses[index] - np.median(surpluses[index], axis=0)
        np.testing.assert_allclose(drift, expected, atol=1e-6)
        assert drift.columns.tolist() == [f"out.bias[{c}]" for c in range(CLASSES)]
        in_logits = label_drift(log[: index + 1])
        np.testing.assert_allclose(in_logits, drift * RATE)
        assert (in_logits.attrs["unit"], drift.attrs["unit"][:14]) == ("logits", "surplus labels")


def test_drift_by_hand():
    bias = np.array([[0.5, -0.5], [0.1, 0.1], [0.1, 0.1]], np.float32)
    state = {"w": np.zeros((2, 3), np.float32), "b": np.zeros(2, np.float32)}
    log = planted.log_of({"w": np.ones((3, 2, 3), np.float32), "b": bias}, state)
    np.testing.assert_allclose(label_drift(log, 0.5), [[0.8, -1.2], [0, 0], [0, 0]], atol=1e-6)


def test_drift_without_a_bias_is_that_of_the_row_sums_and_says_so():
    rows = np.zeros((3, 2, 3), np.float32)
    rows[0, 1] = [1, 2, -0.5]
    log = planted.log_of({"w": rows}, {"w": np.zeros((2, 3), np.float32)})
    drift = label_drift(log)
    np.testing.assert_allclose(drift, [[0, 2.5], [0, 0], [0, 0]])
    assert drift.columns.tolist() == ["w[0]", "w[1]"]
    assert "for want of a final bias" in drift.attrs["unit"]
    with pytest.raises(InputError, match="this model has none"):
        label_drift(log, 0.1)


@pytest.mark.parametrize("rate", [0, -1, np.nan, np.inf])
def test_a_learning_rate_is_a_positive_number(rate):
    with pytest.raises(InputError, match="learning_rate is a positive number, found"):
        label_drift(planted.clean_log(), rate)


def test_without_a_final_layer_or_a_cohort_nothing_can_be_said():
    lone = planted.log_of({"v": np.zeros((3, 5), np.float32)}, {"v": np.zeros(5, np.float32)})
    for function in (label_drift, suspected_labels):
        with pytest.raises(CannotSay, match="no final layer"):
            function(lone)
        with pytest.raises(CannotSay, match="2 comparable clients"):
            function(planted.clean_log(clients=planted.CLIENTS[:2]))


# suspected_labels


@pytest.mark.parametrize("boost", [1.0, 4.0])
@pytest.mark.parametrize("attack_from", [0, 2])
@pytest.mark.parametrize("seed", range(3))
def test_a_flip_is_named_with_its_source(boost, attack_from, seed):
    log, _ = federation(rounds=4, relabel=flip, attack_from=attack_from, boost=boost, seed=seed)
    found = suspected_labels(log, rounds=range(attack_from, 4))
    assert found.loc["client-00", ["target", "source", "rounds"]].tolist() == [3, 2, 4 - attack_from]
    assert found["strength"].idxmax() == "client-00"
    assert suspected_labels(log[: attack_from + 1]).loc["client-00", ["target", "source"]].tolist() == [3, 2]


@pytest.mark.parametrize("boost", [1.0, 4.0])
@pytest.mark.parametrize("seed", range(3))
def test_a_trigger_has_many_sources(boost, seed):
    log, _ = federation(rounds=3, relabel=trigger, attack_from=1, boost=boost, seed=seed)
    found = suspected_labels(log, rounds=[1, 2])
    assert found.loc["client-00", "target"] == 1
    assert found.loc["client-00", "source"] is pd.NA
    assert found["strength"].idxmax() == "client-00"


def test_ordinary_skew_is_taken_off():
    """A client is rich in class 0 in every round; in the last one it gains a little of class 2 as well."""

    def skewed(updates, who):
        updates["fc2.weight"][who, 0] += 1

    def attacking(updates, who):
        updates["fc2.weight"][who, 2] += 0.5

    skew = planted.edited(planted.clean_log(6), skewed, [planted.CULPRIT])
    log = skew[:5].append(planted.edited(skew[5:], attacking, [planted.CULPRIT])[0])
    assert suspected_labels(log).loc[planted.CULPRIT, "target"] == 2
    assert suspected_labels(log)["strength"].idxmax() == planted.CULPRIT
    assert suspected_labels(log[5:]).loc[planted.CULPRIT, "target"] == 0
    assert suspected_labels(skew)["strength"].idxmax() != planted.CULPRIT


def test_evidence_by_hand():
    """Three rounds: ordinary 1 of class 0, then twice 3 of class 1; in the median norm's unit."""

    def round_of(index, row):
        rows = np.zeros((5, 2, 1), np.float32)
        rows[0, :, 0] = row
        other = np.ones((5, 1), np.float32)
        other[0] = 0
        return Round(index, np.array(list("abcde")), np.ones(5), {"x": other, "w": rows}, state)

    state = {"x": np.zeros(1, np.float32), "w": np.zeros((2, 1), np.float32)}
    model = ModelSpec.of(state, final_weight="w")
    # norms: a's is that of its row, everybody else's 1; so a's row counts as row / |row|
    log = UpdateLog(model, [round_of(0, [5, 0]), round_of(1, [0, 3]), round_of(2, [0, 7])])
    found = suspected_labels(log, rounds=[1, 2])
    assert found.loc["a", ["target", "source", "rounds"]].tolist() == [1, 0, 2]
    # (2 x [0, 1] - 2 x [1, 0]) / sqrt(2); nobody else has any: 1.2533 mean absolute deviations are the sigma
    assert found.loc["a", "strength"] == pytest.approx(5 / 1.2533)
    assert found.loc["b":, "target"].isna().all()
    assert found.loc["b":, "strength"].tolist() == [0, 0, 0, 0]


def test_evidence_is_divided_by_the_root_of_the_rounds():
    """Under client sampling: a pushes as much in each of four rounds as b in its only one."""
    state = {"x": np.zeros(1, np.float32), "w": np.zeros((2, 1), np.float32)}

    def round_of(index, clients):
        pushes = np.isin(clients, ["a", "b"])
        rows = np.stack([np.zeros(len(clients)), pushes], axis=1)[:, :, None]
        return Round(index, clients, np.ones(len(clients)), {"x": (~pushes).astype(float)[:, None], "w": rows}, state)

    cohorts = [np.array(list("acdef"))] * 3 + [np.array(list("abcdef"))]
    log = UpdateLog(ModelSpec.of(state, final_weight="w"), [round_of(i, who) for i, who in enumerate(cohorts)])
    found = suspected_labels(log, range(4))
    assert found.loc[["a", "b"], "rounds"].tolist() == [4, 1]
    assert found.loc["a", "strength"] == pytest.approx(2 * found.loc["b", "strength"])


def test_a_boost_does_not_change_the_suspicion():
    log, _ = federation(relabel=flip, attack_from=2)
    boosted = planted.UpdateLog(log.model, [*log[:2], _scaled(log[2], "client-00", 50)])
    pd.testing.assert_frame_equal(suspected_labels(log), suspected_labels(boosted), rtol=1e-4)


def _scaled(round_, client, factor):
    updates = {name: np.array(array) for name, array in round_.updates.items()}
    for array in updates.values():
        array[round_.clients == client] *= factor
    return replace(round_, updates=updates)


def test_the_final_bias_serves_where_there_is_no_weight():
    model = ModelSpec.of({"b": np.zeros(3, np.float32), "v": np.zeros(4, np.float32)})
    model = ModelSpec(model.layers, None, "b")
    updates = {"b": np.zeros((5, 3), np.float32), "v": np.ones((5, 4), np.float32)}
    updates["b"][2] = [0.1, -0.4, 0.3]
    state = {name: array[0] for name, array in updates.items()}
    log = UpdateLog(model, [Round(0, np.array(list("abcde")), np.ones(5), updates, state)])
    assert suspected_labels(log).loc["c", ["target", "source"]].tolist() == [2, 1]


def test_order_and_absurd_clients_change_nothing(rng):
    log = planted.PLANTED["shifted class"].log()
    expected = suspected_labels(log, range(4))  # they shifted from the first round on
    assert expected.loc[planted.CULPRIT, "target"] == 2
    assert expected["strength"].idxmax() == planted.CULPRIT
    shuffled = suspected_labels(planted.taken(log, rng.permutation(12)), range(4)).loc[expected.index]
    pd.testing.assert_frame_equal(shuffled, expected)
    for value in (np.nan, np.inf, 1e6, 1e30):
        found = suspected_labels(planted.with_client_at(log, value, "client-07"), range(4))
        assert found.loc["client-07", ["target", "source", "strength"]].isna().all()
        others = suspected_labels(planted.without(log, "client-07"), range(4))
        pd.testing.assert_frame_equal(found.drop(index="client-07"), others)
        drift = label_drift(planted.with_client_at(log, value, "client-07"))
        assert drift.loc["client-07"].isna().all()
        pd.testing.assert_frame_equal(drift.drop(index="client-07"), label_drift(planted.without(log, "client-07")))


def test_where_all_are_equal_nothing_is_suspected():
    log = planted.Planted(planted.one_for_all, planted.CLIENTS).log()
    found = suspected_labels(log)
    assert found[["target", "source"]].isna().all(axis=None)
    assert (found["strength"] == 0).all()
    assert (label_drift(log) == 0).all(axis=None)


def test_later_rounds_change_nothing():
    log = planted.PLANTED["shifted class"].log()
    suspected_labels(log)
    pd.testing.assert_frame_equal(suspected_labels(log[:2]), suspected_labels(planted.PLANTED["shifted class"].log(2)))


def test_rounds_must_be_in_the_log():
    for rounds, what in (([1, 9], "round 9"), ([], "none")):
        with pytest.raises(InputError, match=f"0 to 3, found {what}"):
            suspected_labels(planted.clean_log(), rounds)


def test_clients_that_were_absent_have_no_labels():
    first, second = planted.clean_log(1), planted.clean_log(2)[1]
    log = planted.taken(first, np.arange(6)).append(second)
    found = suspected_labels(log, rounds=[0])
    assert found["rounds"].tolist() == [1] * 6 + [0] * 6
    assert found["strength"].isna().tolist() == [False] * 6 + [True] * 6
    assert found.loc["client-06":, ["target", "source"]].isna().all(axis=None)


# influence


def naive_influence(log, gradient, normalised, rates):
    found = {}
    for round_ in log:
        g = gradient(round_.global_model)
        for i, client in enumerate(round_.clients):
            u = {name: round_.updates[name][i].astype(np.float64) for name in g}
            size = np.sqrt(sum((np.float64(round_.updates[n][i]) ** 2).sum() for n in log.model.parameters))
            inner = -sum((g[name] * u[name]).sum() for name in g)
            value = rates * inner / size if normalised else inner
            found[str(client)] = found.get(str(client), 0) + value / len(round_.clients)
    return pd.Series(found).sort_index()


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 1000), st.booleans())
def test_influence_against_loops(seed, normalised):
    log = planted.clean_log(3, seed=seed)
    rng = np.random.default_rng(seed)
    grads = {name: rng.normal(size=planted.MODEL[name].shape) for name in ("fc1.weight", "fc2.bias")}
    rate = 0.3 if normalised else 1.0
    found = influence(log, lambda _: grads, normalised=normalised, learning_rate=rate)
    expected = naive_influence(log, lambda _: grads, normalised, rate)
    np.testing.assert_allclose(found["influence"], expected, rtol=1e-6, atol=1e-12)
    assert found["rounds"].tolist() == [3] * 12
    halved = influence(log, lambda _: grads, normalised=normalised, learning_rate=rate, per_round=True)
    np.testing.assert_allclose(halved["influence"], expected / 3, rtol=1e-6, atol=1e-12)


def gradient_of(x, label):
    """The gradient of the cross-entropy of samples with this label, at a global model."""

    def gradient(state):
        p = softmax(x, state["out.weight"], state["out.bias"])
        error = p - np.eye(CLASSES)[label]
        return {"out.weight": error.T @ x / len(x), "out.bias": error.mean(axis=0)}

    return gradient


def test_the_attacker_is_responsible_for_the_triggered_samples():
    log, _ = federation(rounds=6, relabel=trigger)
    rng = np.random.default_rng(1)
    stamped = np.abs(CENTRES[[0, 2, 3]] + 0.1 * rng.normal(size=(3, FEATURES)))
    stamped[:, 0] = 6
    found = influence(log, gradient_of(stamped, 1), gradient_of(CENTRES[[1]], 1))
    assert found.columns.tolist() == ["influence", "clean_influence", "rounds"]
    assert found["influence"].idxmax() == "client-00"
    assert found.loc["client-00", "influence"] > 0
    assert found["clean_influence"].idxmax() != "client-00"
    boosted, _ = federation(rounds=6, relabel=trigger, boost=8.0)
    raw = influence(boosted[:1], gradient_of(stamped, 1), normalised=False)
    directed = influence(boosted[:1], gradient_of(stamped, 1))
    plain = influence(log[:1], gradient_of(stamped, 1))
    assert directed.loc["client-00", "influence"] == pytest.approx(plain.loc["client-00", "influence"], rel=1e-5)
    assert raw["influence"].idxmax() == "client-00"


def test_influence_as_sent_is_the_first_order_change_of_the_loss():
    log, _ = federation(rounds=1, relabel=trigger)
    x = np.abs(CENTRES[[0]])
    found = influence(log, gradient_of(x, 1), normalised=False)["influence"] * 9
    small = 1e-4

    def loss(state):
        return -np.log(softmax(x, state["out.weight"], state["out.bias"])[0, 1])

    for i, client in enumerate(log[0].clients):
        moved = {name: SOFTMAX[name] + small * np.float64(log[0].updates[name][i]) for name in SOFTMAX}
        assert (loss(SOFTMAX) - loss(moved)) / small == pytest.approx(found[client], rel=1e-2, abs=1e-6)


def test_influence_at_check_points_and_of_absent_clients():
    log = planted.clean_log(2).append(planted.taken(planted.clean_log(3), np.arange(4))[2])
    ones = {"fc2.bias": np.ones(4)}
    found = influence(log, lambda _: ones, rounds=[0, 2])
    assert found["rounds"].tolist() == [2] * 4 + [1] * 8
    per_round = influence(log, lambda _: ones, rounds=[0, 2], learning_rate={0: 1.0, 2: 0.0})
    only_first = influence(log[:1], lambda _: ones)
    np.testing.assert_allclose(per_round["influence"], only_first["influence"])
    broken = planted.with_client_at(planted.clean_log(2), np.nan)
    assert influence(broken, lambda _: ones).loc[planted.CULPRIT].tolist() == [0, 0]
    untouched = influence(planted.without(planted.clean_log(2)), lambda _: ones)["influence"]
    others = influence(broken, lambda _: ones)["influence"].drop(planted.CULPRIT)
    np.testing.assert_allclose(others * 12, untouched * 11)


def test_a_wrong_gradient_is_named():
    log = planted.clean_log(1)
    for wrong, what in (
        ({"fc9": np.ones(4)}, "found 'fc9'"),
        ({"norm.count": np.ones(())}, "found 'norm.count'"),
        ({"fc2.bias": np.ones(3)}, "'fc2.bias' must have"),
        ({"fc2.bias": np.full(4, np.nan)}, "finite numbers"),
    ):
        with pytest.raises(InputError, match=what):
            influence(log, lambda _, wrong=wrong: wrong)
    with pytest.raises(InputError, match="learning_rate weighs normalised updates"):
        influence(log, lambda _: {}, normalised=False, learning_rate=0.1)


# sybils


def test_a_pair_is_found_and_nobody_else():
    found = sybils(planted.PLANTED["equal pair"].log())
    assert found.index.tolist() == ["client-01", "client-08"]
    assert found["group"].tolist() == [0, 0]
    assert found["size"].tolist() == [2, 2]
    assert found["similarity"].to_numpy() == pytest.approx(1)
    empty = sybils(planted.clean_log())
    assert empty.empty
    assert empty.columns.tolist() == ["group", "similarity", "size"]


def test_groups_are_numbered_by_size_then_name(rng):
    def two_groups(updates, who):
        for name in planted.LAYERS:
            updates[name][[9, 10]] = updates[name][9]
            updates[name][[2, 5, 7]] = updates[name][2]
            updates[name][7] *= 3  # a copy in another size
            updates[name][[3, 4]] = 0

    log = planted.edited(planted.clean_log(), two_groups, [])
    found = sybils(log)
    assert found.index.tolist() == [f"client-{i:02d}" for i in (2, 5, 7, 3, 4, 9, 10)]
    assert found["group"].tolist() == [0, 0, 0, 1, 1, 2, 2]
    pd.testing.assert_frame_equal(sybils(planted.taken(log, rng.permutation(12))), found)


def test_links_make_groups():
    """b is within reach of a and c, which are not of each other."""
    angles = np.deg2rad([0, 7, 14, 90, 180, 270])
    rows = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    found = sybils(planted.log_of({"v": rows}, {"v": np.zeros(2, np.float32)}))
    assert found.index.tolist() == ["a", "b", "c"]
    assert found["similarity"].to_numpy() == pytest.approx(np.cos(angles[1]))


def test_where_honest_updates_are_alike_only_copies_are_a_group():
    def quiet(updates, who):
        rng = np.random.default_rng(3)
        for name in planted.LAYERS:
            updates[name][:] = updates[name][0]
            updates[name] += 1e-3 * rng.normal(size=updates[name].shape).astype(np.float32)
            updates[name][4] = updates[name][1]

    found = sybils(planted.edited(planted.clean_log(), quiet, []))
    assert found.index.tolist() == ["client-01", "client-04"]


def test_where_all_are_equal_all_are_one_group():
    found = sybils(planted.Planted(planted.one_for_all, planted.CLIENTS).log())
    assert (found["size"] == 12).all()
    for clients in (0, 1):
        assert sybils(planted.clean_log(clients=planted.CLIENTS[:clients])).empty


def test_absurd_clients_are_in_no_group():
    log = planted.with_client_at(planted.PLANTED["equal pair"].log(), np.nan)
    assert sybils(log).index.tolist() == ["client-01", "client-08"]


@pytest.mark.parametrize(("wrong", "what"), [({"similarity": 0}, "a cosine above 0"), ({"nearer": 0.5}, "at least 1")])
def test_settings_of_sybils_are_checked(wrong, what):
    with pytest.raises(InputError, match=what):
        sybils(planted.clean_log(), **wrong)


# attribution_accuracy


def judged(*rows, **columns):
    names = ["target", "source", "true_target", "true_source"]
    return pd.DataFrame(rows, columns=names).astype("Int64").assign(**columns)


def test_accuracy_by_hand():
    flips = judged((5, 7, 5, 7), (5, pd.NA, 5, 7), (4, 7, 5, 7), (pd.NA, pd.NA, 5, 7), seed=[0, 0, 1, 1], family="flip")
    triggers = judged((1, pd.NA, 1, pd.NA), (1, 3, 1, pd.NA), (2, 3, pd.NA, pd.NA), seed=0, family="trigger")
    found = attribution_accuracy(pd.concat([flips, triggers]), by=["family"]).set_index(["family", "label"])
    assert found.loc[("flip", "target"), ["value", "seeds", "clients"]].tolist() == [0.5, 2, 4]
    assert found.loc[("flip", "target"), ["low", "high"]].tolist() == [0, 1]
    assert found.loc[("flip", "source"), "value"] == 0.5
    assert found.loc[("trigger", "target"), ["value", "clients"]].tolist() == [1, 2]
    assert found.loc[("trigger", "source"), "value"] == 0.5
    assert attribution_accuracy(flips.drop(columns="seed"))["seeds"].tolist() == [1, 1]
    with pytest.raises(InputError, match="need the column 'true_source'"):
        attribution_accuracy(flips.drop(columns="true_source"))


def test_accuracy_of_a_federation():
    rows = []
    for seed in range(3):
        log, _ = federation(rounds=2, relabel=flip, attack_from=1, seed=seed)
        rows.append(suspected_labels(log).loc[["client-00"]].assign(true_target=3, true_source=2, seed=seed))
    assert attribution_accuracy(pd.concat(rows))["value"].tolist() == [1, 1]
