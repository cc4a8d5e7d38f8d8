"""Statistics over rounds against hand-made answers and slow float64 oracles."""

from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import planted
from gradlens.errors import CannotSay, InputError
from gradlens.log import ModelSpec, Round, UpdateLog
from gradlens.log import accumulated as log_accumulated
from gradlens.statistics import (
    accomplices,
    accumulated_neighbours,
    accumulated_norms,
    accumulated_spectral,
    accumulation,
    consistency,
    label_drift_residual,
    over_rounds,
    prediction,
    prediction_residual,
)

ACCUMULATED = (
    accumulated_norms,
    accumulated_spectral,
    accumulated_neighbours,
    accomplices,
    label_drift_residual,
    consistency,
)
EVERY = (*ACCUMULATED, prediction_residual)
FEATURES = ("fc1.weight", "fc1.bias")


def sampled_log(rounds=12, clients=10, each=6, seed=0, *, moving=True):
    """Rounds of some of the clients, in another order every time, over a global model that moves."""
    rng = np.random.default_rng(seed)
    names = np.array([f"c{i}" for i in range(clients)])
    state = {name: np.array(array) for name, array in planted.STATE.items()}
    pull = {name: rng.normal(size=(clients, *planted.MODEL[name].shape)) for name in planted.LAYERS}
    made = []
    for index in range(rounds):
        who = rng.permutation(clients)[:each]
        updates = {"norm.count": np.full(each, 1)}
        for name in planted.LAYERS:
            noise = rng.normal(size=(each, *planted.MODEL[name].shape))
            toward = -0.3 * state[name] + 0.05 * pull[name][who] + 0.1 * noise
            updates[name] = toward.astype(np.float32)
        made.append(Round(index, names[who], np.full(each, 9), updates, dict(state), buffers=("norm.count",)))
        if moving:
            for name in planted.LAYERS:
                step = updates[name].mean(axis=0) + 0.02 * rng.normal(size=planted.MODEL[name].shape)
                state[name] = (state[name] + step).astype(np.float32)
    return UpdateLog(planted.MODEL, made)


# Oracles


def residuals(round_, layer):
    x = np.asarray(round_.updates[layer], np.float64).reshape(len(round_), -1)
    x = x - np.median(x, axis=0)
    norms = np.linalg.norm(x, axis=1)
    bound = 3 * np.median(norms[norms > 0])
    return {str(c): row * min(1, bound / n) if n else row for c, row, n in zip(round_.clients, x, norms, strict=True)}


def sums_of(log, layer):
    """client -> (sum of its residuals, rounds)"""
    found = {}
    for round_ in log:
        for client, residual in residuals(round_, layer).items():
            total, count = found.get(client, (0, 0))
            found[client] = (total + residual, count + 1)
    return found


def references(log):
    rounds = {client: count for client, (_, count) in sums_of(log, "fc1.bias").items()}
    return sorted(c for c in rounds if rounds[c] >= np.median(list(rounds.values())) / 2)


def scaled(log, layer):
    return {client: total / np.sqrt(count) for client, (total, count) in sums_of(log, layer).items()}


def oracle_spectral(log, layer):
    x, among = scaled(log, layer), references(log)
    matrix = np.stack([x[c] for c in among])
    mean = matrix.mean(axis=0)
    direction = np.linalg.svd(matrix - mean)[2][0]
    typical = np.sqrt(np.mean([((x[c] - mean) @ direction) ** 2 for c in among]))
    return [abs((x[c] - mean) @ direction) / typical for c in log[-1].clients.tolist()]


def oracle_neighbours(log, layer, neighbours=3):
    x, among, answer = scaled(log, layer), references(log), []
    for c in log[-1].clients.tolist():
        cosines = [x[c] @ x[o] / np.linalg.norm(x[c]) / np.linalg.norm(x[o]) for o in among if o != c]
        answer.append(np.mean(sorted(cosines)[-neighbours:]))
    return answer


def oracle_drift(log, layer):
    x, b, among = scaled(log, layer), scaled(log, "fc2.bias"), references(log)
    drift = np.stack([b[c] for c in among])
    centre = drift.mean(axis=0)
    directions = np.linalg.svd(drift - centre)[2][: (len(among) - 1) // 3]
    design = (drift - centre) @ directions.T
    target = np.stack([x[c] for c in among])
    weights = np.linalg.lstsq(design, target - target.mean(axis=0), rcond=None)[0]
    rows = log[-1].clients.tolist()
    left = [x[c] - target.mean(axis=0) - (b[c] - centre) @ directions.T @ weights for c in rows]
    return np.linalg.norm(left, axis=1)


def oracle_accomplices(log, layer, neighbours=3):
    """Least squares over one row per client and round, instead of running sums."""
    if layer == "fc2.bias":
        return np.zeros(len(log[-1]))
    observed = [(residuals(r, "fc2.bias"), residuals(r, layer)) for r in log]
    drift = np.stack([row for drifts, _ in observed for row in drifts.values()])
    moved = np.stack([row for _, moves in observed for row in moves.values()])
    left = moved - drift @ np.linalg.lstsq(drift, moved, rcond=1e-6)[0]
    names = np.array([client for drifts, _ in observed for client in drifts])
    sums = {client: left[names == client].sum(axis=0) / np.sqrt((names == client).sum()) for client in names.tolist()}
    among, rows = references(log), log[-1].clients.tolist()
    largest = [sorted(sums[c] @ sums[other] for other in among if other != c)[-neighbours:] for c in rows]
    return np.mean(largest, axis=1) / np.median([sums[c] @ sums[c] for c in among])


def oracle_consistency(log, layer):
    past, now, answer = sums_of(log[:-1], layer), residuals(log[-1], layer), []
    for c in log[-1].clients.tolist():
        before = past[c][0] if c in past else np.zeros(1)
        norms = np.linalg.norm(before) * np.linalg.norm(now[c])
        answer.append(before @ now[c] / norms if norms else 0)
    return answer


ORACLES = {
    accumulated_spectral: oracle_spectral,
    accumulated_neighbours: oracle_neighbours,
    accomplices: oracle_accomplices,
    label_drift_residual: oracle_drift,
    consistency: oracle_consistency,
}


@pytest.mark.parametrize("statistic", ORACLES, ids=lambda s: s.__name__)
@pytest.mark.parametrize(("rounds", "each"), [(5, 10), (12, 6), (9, 4)])
def test_against_a_slow_oracle(statistic, rounds, each):
    log = sampled_log(rounds, each=each, seed=rounds)
    table = statistic(log)
    assert table.columns.tolist() == list(FEATURES if statistic is label_drift_residual else planted.LAYERS)
    for layer in table.columns:
        np.testing.assert_allclose(table[layer], ORACLES[statistic](log, layer), rtol=2e-4, atol=2e-6)


# FLDetector's prediction, with the direct BFGS recursion instead of the compact form


def flat(layers, row=None):
    return np.concatenate(
        [np.asarray(layers[n] if row is None else layers[n][row], np.float64).ravel() for n in planted.LAYERS]
    )


def hessian(pairs, size):
    if not pairs:
        return np.zeros((size, size))
    s, y = pairs[-1]
    h = (s @ y) / (s @ s) * np.eye(size)
    for s, y in pairs:
        h = h - np.outer(h @ s, h @ s) / (s @ h @ s) + np.outer(y, y) / (y @ s)
    return h


def oracle_prediction(log, window):
    rounds = list(log)
    place = [flat(r.global_model) for r in rounds]
    middle = [flat({n: np.median(r.updates[n], axis=0) for n in planted.LAYERS}) for r in rounds]
    shares = {}
    for t, round_ in enumerate(rounds):
        pairs = [(place[k] - place[k - 1], middle[k] - middle[k - 1]) for k in range(max(1, t - window), t)]
        h, found = hessian(pairs, len(place[0])), {}
        for row, client in enumerate(round_.clients.tolist()):
            earlier = [k for k in range(max(0, t - window), t) if client in rounds[k].clients]
            if earlier:
                k = earlier[-1]
                last = flat(rounds[k].updates, rounds[k].clients.tolist().index(client))
                predicted = last + h @ (place[t] - place[k])
                found[client] = np.linalg.norm(flat(round_.updates, row) - predicted)
        shares[t] = {c: d / np.mean(list(found.values())) for c, d in found.items()}
    recent = [shares[t] for t in range(max(0, len(rounds) - window), len(rounds))]
    own = [[of[c] for of in recent if c in of] for c in rounds[-1].clients.tolist()]
    return [np.mean(each) if each else 1.0 for each in own]


@pytest.mark.parametrize(("rounds", "each", "window"), [(6, 10, 3), (12, 6, 3), (12, 10, 10), (9, 5, 4), (5, 10, 1)])
def test_prediction_residual_against_the_bfgs_recursion(rounds, each, window):
    log = sampled_log(rounds, each=each, seed=rounds)
    table = prediction_residual(log, window)
    assert table.columns.tolist() == ["update"]
    np.testing.assert_allclose(table["update"], oracle_prediction(log, window), rtol=1e-4)


def test_hessian_times_a_move_it_knows_is_the_turn():
    """The secant equation H s = y of the latest pair."""
    rng = np.random.default_rng(0)
    s, y, latest = rng.normal(size=(3, 9)), rng.normal(size=(3, 9)), rng.normal(size=9)
    y[1] = 0  # without curvature: left out
    basis = np.concatenate([s, latest[None], y])
    change = prediction.hessian_times(basis @ basis.T, np.array([[0.0, 0, 1, 0]]))
    np.testing.assert_allclose(change @ basis, y[2][None], atol=1e-10)


def test_a_model_of_two_numbers_by_hand():
    """b moves by (1, 0), its median update from (2, 0) to (1, 0): H = -1 along the move; then by (1, 0) once more."""
    state = {"w": np.zeros((1, 2), np.float32)}
    sent = [[[2, 0], [2, 0], [2, 4]], [[1, 0], [1, 0], [1, 4]], [[0, 1], [0, 0], [0, 1]]]
    rounds = [
        Round(
            i,
            np.array(list("abc")),
            np.full(3, 9),
            {"w": np.array(u, np.float32)[:, None]},
            {"w": np.full((1, 2), [i, 0.0])},
        )
        for i, u in enumerate(sent)
    ]
    log = UpdateLog(ModelSpec.of(state), rounds)
    with pytest.raises(CannotSay, match="no earlier update to predict from within 1 round"):
        prediction_residual(log[:1], 1)
    # from round 0 to 1 there is no pair yet: |(1, 0) - (2, 0)| = 1 for all
    assert prediction_residual(log[:2], 1)["update"].tolist() == [1, 1, 1]
    # predicted (0, 0), (0, 0), (0, 4); found (0, 1), (0, 0), (0, 1): norms 1, 0, 3 over their mean 4 / 3
    np.testing.assert_allclose(prediction_residual(log, 1)["update"], [0.75, 0, 2.25], atol=1e-7)
    np.testing.assert_allclose(prediction_residual(log, 2)["update"], [0.875, 0.5, 1.625], atol=1e-7)


def test_a_client_is_predicted_from_its_own_name_not_from_its_row():
    log = sampled_log(6, each=10)
    shuffled = UpdateLog(log.model, [planted.taken(log, np.random.default_rng(i).permutation(10))[i] for i in range(6)])
    left, right = prediction_residual(log), prediction_residual(shuffled)
    np.testing.assert_allclose(left.sort_index(), right.sort_index(), rtol=1e-9)


def test_a_client_that_stayed_away_longer_than_the_window_is_average():
    log = planted.clean_log(6)
    rounds = [r if r.index in (0, 5) else r.take(np.arange(1, 12)) for r in log]
    table = prediction_residual(UpdateLog(log.model, rounds), 3)
    assert table.loc["client-00", "update"] == 1
    assert (table["update"] == 1).sum() == 1


# Hand-made


def two_layers(sent):
    """A log of rounds of updates [client, 2] of one layer "w" and a bias of no meaning."""
    state = {"w": np.zeros((1, 2), np.float32)}
    names = np.array([chr(ord("a") + i) for i in range(len(sent[0]))])
    rounds = [
        Round(i, names, np.full(len(names), 9), {"w": np.array(u, np.float32)[:, None]}, state)
        for i, u in enumerate(sent)
    ]
    return UpdateLog(ModelSpec.of(state), rounds)


def test_accumulated_by_hand():
    # the medians are 0; twice the same
    log = two_layers([[[1, 0], [1, 0], [-2, 0], [0, 1], [0, -1]]] * 2)
    np.testing.assert_allclose(accumulated_spectral(log)["w"], np.array([1, 1, 2, 0, 0]) / np.sqrt(6 / 5), atol=1e-6)
    np.testing.assert_allclose(accumulated_neighbours(log, 1)["w"], [1, 1, 0, 0, 0], atol=1e-6)
    np.testing.assert_allclose(accumulated_neighbours(log, 2)["w"], [0.5, 0.5, 0, 0, 0], atol=1e-6)
    np.testing.assert_allclose(consistency(log)["w"], np.ones(5), atol=1e-6)


def test_who_turns_round_is_inconsistent():
    one = [[1, 0], [1, 1], [-2, 0], [0, 1], [0, -1]]
    log = two_layers([one, [[-1, 0], *one[1:]]])
    np.testing.assert_allclose(consistency(log)["w"].iloc[[0, 4]], [-1, 1], atol=1e-6)


def drifting_log(who, label=True, clients=12):
    """Each client has a label drift which moves fc1.weight too; those in `who` move it without."""
    rng = np.random.default_rng(3)
    drift, effect = rng.normal(size=clients), rng.normal(size=(6, 5))
    updates = {n: 1e-3 * rng.normal(size=(clients, *planted.MODEL[n].shape)) for n in planted.LAYERS}
    updates["fc2.bias"] += drift[:, None] * np.array([1, -1, 0, 0])
    updates["fc1.weight"] += drift[:, None, None] * effect * label
    updates["fc1.weight"][who] += 0.3
    updates["norm.count"] = np.zeros(clients, np.int64)
    names = np.array([f"c{i:02d}" for i in range(clients)])
    rows = {n: u.astype(planted.STATE[n].dtype) for n, u in updates.items()}
    rounds = [Round(i, names, np.full(clients, 9), rows, planted.STATE, buffers=("norm.count",)) for i in range(4)]
    return UpdateLog(planted.MODEL, rounds)


def test_label_drift_explains_a_label_skewed_client_and_not_a_pull_of_its_own():
    log = drifting_log([4])
    norms, left = accumulated_norms(log)["fc1.weight"], label_drift_residual(log)["fc1.weight"]
    assert norms.idxmax() != "c04"
    assert left.idxmax() == "c04"
    assert left.drop("c04").max() < 0.6 * left["c04"]
    clean = drifting_log([])
    assert label_drift_residual(clean)["fc1.weight"].max() < 0.02 * accumulated_norms(clean)["fc1.weight"].max()


def test_accomplices_are_found_among_clients_whose_labels_make_them_more_alike():
    pair = ["c04", "c07"]
    log = drifting_log([4, 7])
    alike, together = (each(log, neighbours=1)["fc1.weight"] for each in (accumulated_neighbours, accomplices))
    assert alike.drop(pair).max() > 0.95  # by their labels
    assert set(together.nlargest(2).index) == set(pair)
    assert together.drop(pair).max() < 0.5 * together[pair].min()


def test_label_drift_of_few_clients_does_not_explain_everything():
    log = planted.clean_log(clients=planted.CLIENTS[:4])
    left, norms = label_drift_residual(log)["fc1.weight"], accumulated_norms(log)["fc1.weight"]
    assert left.sum() > 0.5 * norms.sum()
    with pytest.raises(CannotSay, match="3 clients have enough rounds, at least 4 are needed"):
        label_drift_residual(planted.clean_log(clients=planted.CLIENTS[:3]))


def test_label_drift_says_what_is_missing():
    for statistic in (label_drift_residual, accomplices):
        with pytest.raises(CannotSay, match="no final bias"):
            statistic(two_layers([[[1, 0], [0, 1], [1, 1], [2, 0]]] * 2))
    shapes = {"w": (3, 2, 2), "b": (3, 2)}
    rows = {n: np.ones(s, np.float32) for n, s in shapes.items()}
    with pytest.raises(CannotSay, match="no layer before the final ones"):
        label_drift_residual(planted.log_of(rows, {n: np.zeros(s[1:], np.float32) for n, s in shapes.items()}))


# What they have in common


def test_planted_groups_rank_first():
    def worst(table, layer):
        return set(table[layer].nlargest(3).index)

    log = planted.PLANTED["shifted class, three clients"].log(rounds=8)
    for statistic in (accumulated_spectral, accumulated_neighbours):
        assert worst(statistic(log), "fc2.weight") == set(planted.GROUP)
    shifted = planted.Planted(planted.drifting, planted.GROUP).log(rounds=8)
    for statistic in (accumulated_spectral, partial(accumulated_neighbours, neighbours=2)):
        assert worst(statistic(shifted), "fc1.weight") == set(planted.GROUP)


@pytest.mark.parametrize("statistic", EVERY, ids=lambda s: s.__name__)
def test_prefixes_know_nothing_of_later_rounds(statistic):
    log = sampled_log(7)
    forward = {}
    for prefix in log.prefixes():
        try:
            forward[len(prefix)] = statistic(prefix)
        except CannotSay:
            forward[len(prefix)] = None
    assert sum(table is not None for table in forward.values()) >= 4
    for length in (7, 3, 5):
        fresh = UpdateLog(log.model, list(log)[:length])
        for asked in (log[:length], fresh):  # back again, and for the first time
            if forward[length] is None:
                with pytest.raises(CannotSay):
                    statistic(asked)
            else:
                np.testing.assert_array_equal(statistic(asked), forward[length])


@pytest.mark.parametrize("statistic", EVERY, ids=lambda s: s.__name__)
def test_a_log_kept_to_its_comparable_clients_says_the_same(statistic):
    log = planted.with_client_at(planted.clean_log(5), np.nan)
    whole = statistic(log).drop(index=planted.CULPRIT)
    kept = statistic(log.keep(log[-1].comparable))
    np.testing.assert_allclose(kept.loc[whole.index], whole, rtol=1e-9)


@pytest.mark.parametrize("statistic", EVERY, ids=lambda s: s.__name__)
@pytest.mark.parametrize("value", [np.nan, np.inf, 1e6, 1e30, 3e38])
def test_an_absurd_client_is_nan_and_no_reference(statistic, value):
    log = planted.clean_log(5)
    table = statistic(planted.with_client_at(log, value))
    assert table.loc[planted.CULPRIT].isna().all()
    expected = statistic(planted.without(log))
    np.testing.assert_allclose(table.drop(index=planted.CULPRIT), expected, rtol=1e-9)


@pytest.mark.parametrize("statistic", EVERY, ids=lambda s: s.__name__)
def test_where_all_are_equal_all_values_are(statistic):
    log = planted.Planted(planted.one_for_all, planted.CLIENTS).log(5)
    np.testing.assert_array_equal(statistic(log).nunique(), 1)


@pytest.mark.parametrize("statistic", ACCUMULATED, ids=lambda s: s.__name__)
def test_they_wait_until_most_have_come_twice(statistic):
    with pytest.raises(CannotSay, match="most of its clients have taken part once"):
        statistic(planted.clean_log(1))


@pytest.mark.parametrize("statistic", EVERY, ids=lambda s: s.__name__)
def test_who_comes_for_the_first_time_has_finite_values(statistic):
    log = planted.clean_log(6)
    rounds = [r if r.index == 5 else r.take(np.arange(1, 12)) for r in log]
    table = statistic(UpdateLog(log.model, rounds))
    assert np.isfinite(table.to_numpy()).all()
    if statistic is consistency:
        assert (table.loc["client-00"] == 0).all()


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 99), factor=st.sampled_from([1e-3, 0.5, 200.0]), each=st.integers(4, 9))
def test_what_has_no_unit_stays_when_all_updates_grow(seed, factor, each):
    log = sampled_log(6, clients=9, each=each, seed=seed, moving=False)

    def grow(updates, who):
        for name in planted.LAYERS:
            updates[name] *= np.float32(factor)

    grown = planted.edited(log, grow, ())
    for statistic in (accumulated_spectral, accumulated_neighbours, accomplices, consistency, prediction_residual):
        try:
            expected = statistic(log)
        except CannotSay:
            continue
        np.testing.assert_allclose(statistic(grown), expected, rtol=1e-2, atol=2e-4)
        if statistic not in (prediction_residual, accomplices):
            assert (expected.to_numpy() >= -1).all()


def test_one_gram_serves_all_who_ask_of_one_log(monkeypatch):
    formed = []
    original = accumulation.form_grams
    monkeypatch.setattr(accumulation, "form_grams", lambda *a: formed.append(1) or original(*a))
    log = sampled_log(5)
    for prefix in [*log.prefixes()][2:]:
        for statistic in (accumulated_spectral, accumulated_neighbours, label_drift_residual):
            statistic(prefix)
    assert len(formed) == 3


def test_each_round_is_looked_at_once(monkeypatch):
    calls = []
    original = prediction.relative_residuals
    monkeypatch.setattr(prediction, "relative_residuals", lambda *a: calls.append(1) or original(*a))
    log = sampled_log(9)
    for prefix in [*log.prefixes()][1:]:
        prediction_residual(prefix, 3)
    assert len(calls) == 8


def test_above_the_budget_they_work_on_sketches(monkeypatch):
    shapes = {"w": (30, 40), "v": (3, 30), "b": (3,)}
    state = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    rng = np.random.default_rng(0)

    def pulled(shape):  # h pulls one way in every round, so that there is a leading direction
        return (np.arange(7) == 6).reshape(7, *[1] * len(shape)) * 2.0

    rounds = [
        Round(
            i,
            np.array(list("abcdefgh"))[np.arange(8) != i],  # everybody is away once
            np.full(7, 9),
            {n: (rng.normal(size=(7, *s)) + pulled(s)).astype(np.float32) for n, s in shapes.items()},
            {n: np.full(s, 0.1 * i * i, np.float32) for n, s in shapes.items()},
        )
        for i in range(5)
    ]
    whole = {statistic: statistic(UpdateLog(ModelSpec.of(state), rounds)) for statistic in EVERY}
    for module in (log_accumulated, over_rounds, prediction):
        monkeypatch.setattr(module, "BUDGET", 30_000)
    for statistic, table in whole.items():
        found = statistic(UpdateLog(ModelSpec.of(state), rounds))
        assert np.isfinite(found.to_numpy()).all()
        assert not np.array_equal(found, table)  # or nothing was sketched
        np.testing.assert_allclose(found, table, rtol=0.35, atol=0.35)


def test_the_drift_of_a_vocabulary_is_left_alone():
    rows = {"w": np.ones((65, 2), np.float32), "b": np.zeros(65, np.float32)}
    log = planted.log_of({n: np.stack([r] * 4) for n, r in rows.items()}, rows)
    with pytest.raises(CannotSay, match="the final bias has 65 labels, drift is regressed on 64 at most"):
        accomplices(log)


@pytest.mark.parametrize("value", [0, -1, 2.5, True, "3", None])
def test_settings_are_checked(value):
    log = planted.clean_log()
    with pytest.raises(InputError, match="accumulated_neighbours: neighbours must be a whole number of at least 1"):
        accumulated_neighbours(log, value)
    with pytest.raises(InputError, match="accomplices: neighbours must be a whole number of at least 1"):
        accomplices(log, value)
    with pytest.raises(InputError, match="prediction_residual: window must be a whole number of at least 1"):
        prediction_residual(log, value)
