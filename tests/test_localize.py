"""Localization against naive loops, exact permutation and planted answers."""

import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import combinations, product
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from scipy.special import expit, logit
from sklearn.metrics import roc_auc_score

import planted
from gradlens.detectors import DETECTORS, detect
from gradlens.errors import CannotSay, InputError
from gradlens.evaluation import mean_interval
from gradlens.localization import (
    LOCATED_BY,
    PHASES,
    Unusual,
    effects,
    localize,
    localize_rounds,
    localize_sweep,
    unusual,
)
from gradlens.localization.client_intervals import client_interval
from gradlens.log import LogWriter, UpdateLog
from gradlens.run import Run
from gradlens.scorers import robust_zscore
from gradlens.statistics import STATISTICS, accumulated_norms, final_bias, final_rows, layer_cosines, layer_norms

COLUMNS = ["layer", "statistic", "unit", "auc", "low", "high", "p", "seeds"]
COLUMNS += ["effect", "control_auc", "control_effect", "labels"]
FIVE = {f.__name__: f for f in (final_bias, final_rows, layer_norms, layer_cosines, accumulated_norms)}
quick = partial(localize, permutations=49)


def planted_run(case="shifted class", seed=0, rounds=4, attacked=None):
    log = planted.PLANTED[case].log(rounds, seed)
    return log, planted.truth_of(log, planted.PLANTED[case].culprits, attacked)


def row(table, layer, statistic, unit="") -> pd.Series:
    found = table[(table["layer"] == layer) & (table["statistic"] == statistic) & (table["unit"] == unit)]
    assert len(found) == 1
    return found.iloc[0]


# What is planted is found


def test_shifted_class_is_found_in_its_layer_and_unit():
    table = localize([planted_run(seed=s) for s in range(3)], FIVE)
    assert table.columns.tolist() == COLUMNS
    for layer, statistic in (("fc2.bias", "final_bias"), ("fc2.weight", "final_rows")):
        whole, unit = row(table, layer, statistic), row(table, layer, statistic, "2")
        assert (whole["auc"], unit["auc"]) == (1, 1)
        assert (whole["low"], whole["high"]) == (1, 1)
        assert whole["p"] < 0.05
        assert np.isnan(unit["p"])
        assert row(table, layer, statistic, "0")["auc"] < 0.9
    assert row(table, "fc1.weight", "layer_norms")["p"] > 0.05
    assert (table["seeds"] == 3).all()


def test_every_feature_of_every_statistic_has_a_row():
    table = quick([planted_run()], FIVE)
    expected = {("fc2.bias", "final_bias", u) for u in ("", "0", "1", "2", "3")}
    expected |= {("fc2.weight", "final_rows", u) for u in ("", "0", "1", "2", "3")}
    names = ("layer_norms", "layer_cosines", "accumulated_norms")
    expected |= {(layer, name, "") for layer in planted.LAYERS for name in names}
    assert set(map(tuple, table[["layer", "statistic", "unit"]].to_numpy())) == expected
    assert len(table) == len(expected)


def test_by_default_the_named_statistics_locate_whatever_else_there_is():
    assert set(LOCATED_BY) <= set(STATISTICS)
    assert set(LOCATED_BY) >= set(FIVE)
    table = quick([planted_run()])
    assert table["statistic"].drop_duplicates().tolist() == list(LOCATED_BY)
    assert set(table["layer"]) == set(planted.LAYERS)


def test_control_is_chance():
    """The same labels on attack-free logs: no feature stands out after the correction, the mean AUC is about half."""
    runs = [(planted.clean_log(6, seed=s), planted_run(seed=s, rounds=6)[1]) for s in range(4)]
    table = localize(runs, FIVE)
    assert (table["p"].dropna() > 0.05).all()
    assert abs(table.loc[table["unit"] == "", "auc"].mean() - 0.5) < 0.15


# Against naive loops


def naive_scores(log, statistic, layer, unit):
    """|robust z| of one feature, round by round; a layer is its largest unit."""
    rows = {}
    for prefix in log.prefixes():
        table = statistic(prefix)
        mine = [c for c in table.columns if (c == f"{layer}[{unit}]" if unit else c.split("[")[0] == layer)]
        rows |= dict(zip([(prefix[-1].index, c) for c in table.index], robust_zscore(table[mine]), strict=True))
    return rows


@pytest.mark.parametrize("unit", ["", "1"])
def test_auc_pools_the_rounds_of_a_run_and_averages_runs(unit):
    runs = [planted_run("shifted class, three clients", seed=s, rounds=3) for s in range(2)]
    aucs = []
    for log, truth in runs:
        scores = naive_scores(log, final_bias, "fc2.bias", unit)
        poisoned = {(r, c): p for r, c, _, p in truth.itertuples(index=False)}
        aucs.append(roc_auc_score([poisoned[key] for key in scores], list(scores.values())))
    found = row(quick(runs, {"final_bias": final_bias}), "fc2.bias", "final_bias", unit)
    assert found["auc"] == pytest.approx(np.mean(aucs))


def test_only_attacked_rounds_count_unless_rounds_are_named():
    log = planted.clean_log(6)  # nothing stands out, so that every update that is counted moves the AUC
    truth = planted.truth_of(log, [planted.CULPRIT], [2, 4])
    noted = unusual(log, {"n": layer_norms})["n"]
    scores = noted.scores[:, noted.features.index(("fc1.weight", ""))]

    def auc(rounds):
        chosen = np.isin(noted.rounds, rounds)
        idle = (noted.clients == planted.CULPRIT) & ~np.isin(noted.rounds, [2, 4])
        chosen &= ~idle
        return roc_auc_score((noted.clients == planted.CULPRIT)[chosen], scores[chosen])

    only = {"n": layer_norms}
    assert row(quick([(log, truth)], only), "fc1.weight", "n")["auc"] == pytest.approx(auc([2, 4]))
    assert row(quick([(log, truth)], only, rounds=[4]), "fc1.weight", "n")["auc"] == pytest.approx(auc([4]))
    every = row(quick([(log, truth)], only, rounds=range(6)), "fc1.weight", "n")["auc"]
    assert every == pytest.approx(auc([0, 1, 2, 3, 4, 5]))
    assert len({auc([2, 4]), auc([4]), every}) == 3


def test_idle_updates_of_an_attacker_are_neither():
    """One of two attackers poisons, the other never does; its updates are no benign ones."""
    log = planted.clean_log(2)
    truth = planted.truth_of(log, ["client-05"])
    truth["compromised"] |= truth["client"] == "client-07"
    noted = unusual(log, {"n": layer_norms})["n"]
    kept = noted.clients != "client-07"
    expected = roc_auc_score(noted.clients[kept] == "client-05", noted.scores[kept, 0])
    found = row(quick([(log, truth)], {"n": layer_norms}), noted.features[0][0], "n")
    assert found["auc"] == pytest.approx(expected)
    assert expected != roc_auc_score(noted.clients == "client-05", noted.scores[:, 0])


def test_an_attacker_that_was_still_honest_is_neither():
    """Truth that calls it compromised only where it poisons, or never, gives the same table."""
    log = planted.clean_log(4)
    truth = planted.truth_of(log, planted.GROUP, [2, 3])
    expected = quick([(log, truth)], {"n": layer_norms}, rounds=range(4))
    for compromised in (truth["poisoned"], False):
        late = truth.assign(compromised=compromised)
        pd.testing.assert_frame_equal(quick([(log, late)], {"n": layer_norms}, rounds=range(4)), expected)


def test_a_client_that_is_not_comparable_is_most_unusual():
    log = planted.with_client_at(planted.clean_log(3), np.nan)
    table = quick([(log, planted.truth_of(log, [planted.CULPRIT]))])
    assert (table["auc"] == 1).all()


# Intervals


def noisy(seed, rounds=6):
    """Clean, with a bias pushed now and then, so that the AUC depends on the rounds."""
    log = planted.clean_log(rounds, seed=seed)
    pushed = planted.PLANTED["shifted class, three clients"].log(rounds, seed)
    mixed = UpdateLog(planted.MODEL, [(pushed if i % 3 == 0 else log)[i] for i in range(rounds)])
    return mixed, planted.truth_of(log, planted.GROUP)


def scored(scores, malicious):
    """A case of one layer per column, from scores [client, round, layer]; the first clients are malicious."""
    clients, rounds, layers = scores.shape
    names = np.array([f"c{i:03d}" for i in range(clients)])
    seen = Unusual(
        np.tile(np.arange(rounds), clients),
        np.repeat(names, rounds),
        tuple((f"layer{j}", "") for j in range(layers)),
        scores.reshape(clients * rounds, layers),
    )
    labels = {(r, name): int(i < malicious) for i, name in enumerate(names) for r in range(rounds)}
    return effects.LabeledRun({"s": seen}, labels, range(rounds))


def normal_scores(rng, clients, malicious, shift, layers, rounds=5):
    """A client's scores lie around a height of its own: half of the variance is the client's, half the round's."""
    scores = rng.normal(size=(clients, 1, layers)) + rng.normal(size=(clients, rounds, layers))
    scores[:malicious] += shift
    return scores


@pytest.mark.parametrize(
    ("malicious", "clients", "shift", "coverage"),
    [(4, 20, 0, 95), (4, 20, 1, 95), (6, 20, 1, 96), (10, 50, 2, 95), (4, 20, 3, 91), (2, 12, 1, 92), (2, 12, 3, 89)],
)
def test_the_interval_of_one_run_covers_what_other_clients_would_show(malicious, clients, shift, coverage):
    scores = normal_scores(np.random.default_rng(0), clients, malicious, shift, layers=2_000)
    table = effects.located([scored(scores, malicious)], permutations=0, seed=0)
    truth = stats.norm.cdf(shift / 2)  # the difference of two updates of different clients has variance 4
    covered = ((table["low"] <= truth) & (truth <= table["high"])).mean()
    assert covered == pytest.approx(coverage / 100, abs=0.025)


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_the_interval_over_runs_covers_what_other_runs_would_show(seeds):
    rng = np.random.default_rng(1)
    cases = [scored(normal_scores(rng, 20, 4, 1, layers=1_000, rounds=2), 4) for _ in range(seeds)]
    table = effects.located(cases, permutations=0, seed=0)
    covered = ((table["low"] <= stats.norm.cdf(0.5)) & (stats.norm.cdf(0.5) <= table["high"])).mean()
    assert covered == pytest.approx(0.95, abs=0.025)


def test_more_rounds_of_the_same_clients_are_no_more_evidence():
    scores = normal_scores(np.random.default_rng(2), 20, 4, 1, layers=50, rounds=3)
    once, often = (
        effects.located([scored(np.tile(scores, (1, times, 1)), 4)], permutations=0, seed=0) for times in (1, 10)
    )
    pd.testing.assert_frame_equal(once[["auc", "low", "high"]], often[["auc", "low", "high"]])


def delong(malicious, benign):
    """The variance of the AUC of a score per client, from the placements of each (DeLong et al. 1988)."""
    wins = (malicious[:, None] > benign) + (malicious[:, None] == benign) / 2
    parts = wins.mean(axis=1), wins.mean(axis=0)
    return wins.mean(), [part.var(ddof=1) / len(part) for part in parts]


@pytest.mark.parametrize("seed", range(5))
def test_of_one_round_it_is_the_interval_of_delong(seed):
    scores = np.random.default_rng(seed).integers(0, 8, (14, 1)) + np.r_[[2] * 5, [0] * 9][:, None]
    auc, variances = delong(scores[:5, 0], scores[5:, 0])
    free = sum(variances) ** 2 / (variances[0] ** 2 / 4 + variances[1] ** 2 / 8)
    reach = stats.t.ppf(0.975, free) * np.sqrt(sum(variances)) / (auc * (1 - auc))
    found = client_interval(scores, np.arange(14) < 5, np.arange(14))
    assert np.ravel(found) == pytest.approx(expit(logit(auc) + np.array([-reach, reach])))


def test_the_variance_is_that_of_resampled_clients():
    """Many clients with different numbers of updates, where the percentiles of resamples may be believed."""
    rng, owner = np.random.default_rng(3), np.repeat(np.arange(80), np.random.default_rng(4).integers(1, 6, 80))
    malicious = owner < 30
    scores = (rng.normal(size=80)[owner] + rng.normal(size=len(owner)) + malicious)[:, None]
    rows, aucs = [np.flatnonzero(owner == i) for i in range(80)], []
    for _ in range(1_000):
        drawn = np.concatenate([rows[i] for i in [*rng.integers(0, 30, 30), *rng.integers(30, 80, 50)]])
        aucs.append(roc_auc_score(malicious[drawn], scores[drawn, 0]))
    low, high = client_interval(scores, malicious, owner)
    assert (low[0], high[0]) == pytest.approx(tuple(np.quantile(aucs, [0.025, 0.975])), abs=0.02)


def test_a_single_client_of_a_kind_has_no_interval():
    log, truth = planted_run()
    assert quick([(log, truth)], FIVE)[["low", "high"]].isna().all(axis=None)
    several = quick([planted_run(seed=s) for s in range(2)], FIVE)
    assert several[["low", "high"]].notna().all(axis=None)


def test_the_interval_over_runs_is_that_of_a_mean_over_seeds():
    runs = [noisy(seed) for seed in range(3)]
    found = row(quick(runs, {"b": final_bias}), "fc2.bias", "b", "1")
    aucs = [row(quick([run], {"b": final_bias}), "fc2.bias", "b", "1")["auc"] for run in runs]
    assert (found["low"], found["high"]) == pytest.approx(mean_interval(np.array(aucs), 0, 1))


def test_interval_does_not_depend_on_the_statistics_asked_together():
    runs = [noisy(seed) for seed in range(2)]
    alone, together = quick(runs, {"b": final_bias}), quick(runs, {"n": layer_norms, "b": final_bias})
    together = together[together["statistic"] == "b"].reset_index(drop=True)
    pd.testing.assert_frame_equal(alone.drop(columns="p"), together.drop(columns="p"))


# Effects and controls


def test_effect_is_the_difference_of_medians_in_robust_sigmas():
    runs = [planted_run("shifted class, three clients", seed=s, rounds=3) for s in range(2)]
    expected = []
    for log, _ in runs:
        scores = naive_scores(log, final_bias, "fc2.bias", "2")
        of = {bad: [v for (_, c), v in scores.items() if (c in planted.GROUP) == bad] for bad in (True, False)}
        expected.append(np.median(of[True]) - np.median(of[False]))
    table = quick(runs, {"b": final_bias})
    assert row(table, "fc2.bias", "b", "2")["effect"] == pytest.approx(np.mean(expected))
    assert row(table, "fc2.bias", "b", "2")["effect"] > 10
    assert abs(row(table, "fc2.bias", "b", "0")["effect"]) < 2


def test_effect_tells_apart_what_the_auc_does_not():
    def farther(updates, who):
        updates["fc2.bias"][who, 2] += 10

    log = planted.edited(planted.clean_log(4), farther, [planted.CULPRIT])
    near, far = quick([planted_run()]), quick([(log, planted.truth_of(log, [planted.CULPRIT]))])
    near, far = (row(table, "fc2.bias", "final_bias") for table in (near, far))
    assert near["auc"] == far["auc"] == 1
    assert far["effect"] > 5 * near["effect"]


def test_effect_is_of_comparable_updates():
    log = planted.with_client_at(planted.clean_log(3), np.nan)
    table = quick([(log, planted.truth_of(log, [planted.CULPRIT]))])
    assert table["effect"].isna().all()
    both = quick([(log, planted.truth_of(log, [planted.CULPRIT, "client-07"]))], {"n": layer_norms})
    assert np.isfinite(both["effect"]).all()


def test_control_stands_beside_each_row():
    runs = [planted_run("shifted class, three clients", seed=s) for s in range(2)]
    controls = [planted.clean_log(4, seed=s) for s in range(2)]
    only = {"b": final_bias}
    table = quick(runs, only, control=controls)
    alone = quick([(log, truth) for log, (_, truth) in zip(controls, runs, strict=True)], only)
    np.testing.assert_allclose(table["control_auc"], alone["auc"])
    pd.testing.assert_frame_equal(
        table.drop(columns=["control_auc", "control_effect"]),
        quick(runs, only).drop(columns=["control_auc", "control_effect"]),
    )
    assert quick(runs, only)[["control_auc", "control_effect"]].isna().all(axis=None)


def test_control_effect_is_of_the_benign_client_farthest_out():
    """One of the control's clients holds other labels: its bias moves by a third of what the attackers' does."""

    def skewed(updates, who):
        updates["fc2.bias"][who, 2] += 0.6

    control = planted.edited(planted.clean_log(4), skewed, ["client-07"])
    scores = naive_scores(control, final_bias, "fc2.bias", "2")
    usual = {c: np.median([v for (_, who), v in scores.items() if who == c]) for c in planted.CLIENTS}
    assert max(usual, key=usual.__getitem__) == "client-07"
    found = row(quick([planted_run()], {"b": final_bias}, control=[control]), "fc2.bias", "b", "2")
    assert found["control_effect"] == pytest.approx(usual["client-07"] - np.median(list(scores.values())))
    assert 2 < found["control_effect"] < found["effect"]
    assert found["control_auc"] < 0.8


def test_controls_must_be_as_many_as_the_runs_and_of_their_model():
    with pytest.raises(InputError, match="expected a control for each of 1 runs, found 2"):
        quick([planted_run()], control=[planted.clean_log(), planted.clean_log()])
    other = planted.log_of({"only": np.arange(12.0, dtype=np.float32).reshape(4, 3)}, {"only": np.zeros(3, np.float32)})
    with pytest.raises(InputError, match="another model: layer_norms has other layers"):
        quick([planted_run()], {"layer_norms": layer_norms}, rounds=[0], control=[other])


# Suspects instead of the truth


def test_suspects_rank_as_if_they_were_guilty():
    log, truth = planted_run("shifted class, three clients")
    expected = quick([(log, truth)]).assign(labels="suspects")
    pd.testing.assert_frame_equal(quick(log, suspects=planted.GROUP), expected)
    pd.testing.assert_frame_equal(quick([(log, None)], suspects=list(planted.GROUP)), expected)
    pd.testing.assert_frame_equal(quick(log, suspects=dict.fromkeys(range(4), planted.GROUP)), expected)
    assert (quick([(log, truth)])["labels"] == "truth").all()


def test_suspects_of_single_rounds_are_neither_in_the_others():
    log, _ = planted_run("drifting")
    truth = planted.truth_of(log, [planted.CULPRIT], [1, 3])
    expected = quick([(log, truth)]).assign(labels="suspects")
    pd.testing.assert_frame_equal(quick(log, suspects={1: [planted.CULPRIT], 3: {planted.CULPRIT}}), expected)


def test_suspects_may_be_the_flags_of_a_detector():
    log, _ = planted_run()
    verdicts = detect(log, {"final_bias": DETECTORS["final_bias"]()})
    flagged = verdicts[verdicts["flag"]]
    found = quick(log, suspects=verdicts)
    by_round = {index: set(part["client"]) for index, part in flagged.groupby("round")}
    pd.testing.assert_frame_equal(found, quick(log, suspects=by_round))
    assert row(found, "fc2.bias", "final_bias")["auc"] > 0.9


def test_innocent_suspects_differ_nowhere():
    found = localize(planted.clean_log(6), FIVE, suspects=["client-01", "client-06"])
    assert (found["p"].dropna() > 0.05).all()


def test_suspects_nobody_knows_and_logs_without_any_are_errors():
    log, _ = planted_run()
    with pytest.raises(InputError, match="suspects: the log has no client 'mallory'"):
        quick(log, suspects=["client-01", "mallory"])
    with pytest.raises(InputError, match="columns round, client and flag, found no 'flag'"):
        quick(log, suspects=pd.DataFrame({"round": [0], "client": ["client-01"]}))
    with pytest.raises(InputError, match="or suspects, found a log alone"):
        quick(log)
    with pytest.raises(InputError, match="no run has both"):
        quick(log, suspects=[])


# p-values


def exact_p(log, truth, name, layer):
    """Every choice of as many clients, none left out; the AUC by scikit-learn."""
    noted = unusual(log, {name: STATISTICS[name]})[name]
    scores = noted.scores[:, noted.features.index((layer, ""))]
    clients = np.unique(noted.clients)
    guilty = truth.loc[truth["poisoned"], "client"].unique()
    auc = {who: roc_auc_score(np.isin(noted.clients, who), scores) for who in combinations(clients, len(guilty))}
    observed = auc[tuple(sorted(guilty))]
    return np.mean([value >= observed - 1e-12 for value in auc.values()])


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("layer", ["fc1.bias", "fc2.bias"])
def test_p_is_that_of_all_choices_of_clients(seed, layer):
    log = planted.clean_log(3, seed=seed)
    truth = planted.truth_of(log, planted.GROUP)
    # one place, so that nothing is adjusted
    name = "layer_norms"
    only = {name: lambda prefix: layer_norms(prefix)[[layer]]}
    found = row(localize([(log, truth)], only, permutations=220), layer, name)["p"]
    assert found == pytest.approx(exact_p(log, truth, name, layer))
    drawn = row(localize([(log, truth)], only, permutations=219), layer, name)["p"]
    assert drawn == pytest.approx(found, abs=4 * np.sqrt(0.25 / 219))


def test_the_smallest_p_is_one_in_all_permutations():
    only = {"b": final_bias}
    assert row(localize([planted_run(seed=0)], only, permutations=0), "fc2.bias", "b")["p"] == 1
    three = [planted_run("shifted class, three clients", seed=s) for s in range(3)]
    assert row(localize(three, only, permutations=99), "fc2.bias", "b")["p"] == 0.01


def test_p_is_uniform_where_nothing_is_planted():
    """A fixed choice of clients on attack-free logs is an arbitrary one."""
    only = {"n": lambda log: layer_norms(log)[["fc1.weight"]]}
    ps = []
    for seed in range(60):
        log = planted.clean_log(2, seed=1_000 + seed)
        ps.append(quick([(log, planted.truth_of(log, planted.GROUP))], only)["p"].iloc[0])
    assert stats.kstest(ps, "uniform").pvalue > 0.001


def test_p_permutes_clients_not_updates():
    """Many rounds of the same three odd benign-like clients are no more evidence than the choice of three of twelve."""
    log = planted.PLANTED["shifted class, three clients"].log(rounds=40)
    truth = planted.truth_of(log, planted.GROUP)
    p = row(localize([(log, truth)], {"b": final_bias}, permutations=999), "fc2.bias", "b")["p"]
    assert p == pytest.approx(1 / 220)  # 12 choose 3 is 220


def test_one_of_twenty_that_stands_out_everywhere_has_the_smallest_p_there_is():
    scores = np.random.default_rng(0).normal(size=(20, 3, 22))
    scores[0] += 100
    table = effects.located([scored(scores, 1)], permutations=999, seed=0)
    assert (table["auc"] == 1).all()
    assert table["p"].tolist() == [1 / 20] * 22


def test_p_by_hand_is_the_share_of_clients_that_stand_out_anywhere():
    """Of four clients the first is highest in one layer, the second in another; in a third the first is second."""
    scores = np.array([[9, 0, 2], [0, 9, 0], [1, 1, 1], [2, 2, 3]], np.float64)[:, None, :]
    table = effects.located([scored(scores, 1)], permutations=4, seed=0)
    assert table["auc"].tolist() == [1, 0, pytest.approx(2 / 3)]
    # highest AUC over layers: 1, 1, 1/3, 1
    assert table["p"].tolist() == [3 / 4, 1, 3 / 4]


@pytest.mark.parametrize("permutations", [66, 9])
def test_two_runs_are_labeled_in_all_ways_together_if_these_are_few(permutations):
    """2 of 4 clients and 1 of 11: 66 labelings of both runs."""
    rng = np.random.default_rng(6)
    first, second = (rng.normal(size=(clients, 2, 3)) for clients in (4, 11))
    table = effects.located([scored(first, 2), scored(second, 1)], permutations, seed=0)
    highest = []
    for who, whom in product(combinations(range(4), 2), range(11)):
        aucs = []
        for scores, chosen in ((first, who), (second, [whom])):
            malicious = np.repeat(np.isin(np.arange(len(scores)), chosen), 2)
            aucs.append([roc_auc_score(malicious, scores[:, :, j].ravel()) for j in range(3)])
        highest.append(np.mean(aucs, axis=0).max())
    assert len(highest) == 66
    exact = [np.mean(np.array(highest) >= auc - 1e-12) for auc in table["auc"]]
    if permutations == 66:
        assert table["p"].tolist() == pytest.approx(exact)
    else:
        assert all(round(10 * p) / 10 == pytest.approx(p) for p in table["p"])


def test_places_share_their_labelings_and_are_adjusted_together():
    """Twenty copies of a layer are no more tests than one, whichever statistics they belong to."""
    scores = np.random.default_rng(7).normal(size=(12, 4, 1))
    alone = effects.located([scored(scores, 3)], permutations=99, seed=0)
    case = scored(np.repeat(scores, 20, axis=2), 3)
    both = effects.located([replace(case, seen={"s": case.seen["s"], "t": case.seen["s"]})], permutations=99, seed=0)
    assert set(both["p"]) == set(alone["p"])


def test_a_statistic_that_did_not_score_everybody_counts_where_it_can():
    """It knows 3 of 6 clients, among them the malicious one; where another one is named it has no AUC."""
    scores = np.random.default_rng(8).normal(size=(6, 2, 1))
    scores[0] += 100
    whole = scored(scores, 1)
    part = scored(scores[:3], 1).seen["s"]
    table = effects.located([replace(whole, seen={"s": whole.seen["s"], "t": part})], permutations=99, seed=0)
    assert table["auc"].tolist() == [1, 1]
    assert table["p"].tolist() == [1 / 6, 1 / 6]


def test_any_place_is_significant_by_chance_in_at_most_5_percent_of_runs():
    """Fifteen layers without an attack, 6 of 20 clients called malicious."""
    rng, alarms = np.random.default_rng(9), 0
    for seed in range(300):
        cases = [scored(normal_scores(rng, 20, 0, 0, layers=15, rounds=2), 6)]
        alarms += (effects.located(cases, permutations=199, seed=seed)["p"] <= 0.05).any()
    assert alarms <= stats.binom.ppf(0.999, 300, 0.05)


def test_units_are_described_and_not_tested():
    runs = [planted_run("shifted class, three clients", seed=s) for s in range(3)]
    together = localize(runs, FIVE, permutations=999)
    assert together.loc[together["unit"] != "", "p"].isna().all()
    assert together.loc[together["unit"] == "", "p"].notna().all()
    assert row(together, "fc2.bias", "final_bias")["p"] == 1 / 1000


def test_answers_repeat_and_follow_the_seed():
    runs = [planted_run("drifting", seed=s) for s in range(2)]
    pd.testing.assert_frame_equal(quick(runs), quick(runs))
    assert (quick(runs)["p"].dropna() != quick(runs, seed=1)["p"].dropna()).any()


# Inputs


def test_a_run_runs_and_pairs_are_the_same():
    log, truth = planted_run()
    run = SimpleNamespace(log=log, truth=truth)
    expected = quick([(log, truth)])
    pd.testing.assert_frame_equal(quick(run), expected)
    pd.testing.assert_frame_equal(quick([run]), expected)


def test_a_statistic_without_an_answer_has_no_row():
    def silent(log):
        raise CannotSay("never")

    def later(log):
        if len(log) < 3:
            raise CannotSay("not enough history")
        return layer_norms(log)

    table = quick([planted_run("boosted")], {"silent": silent, "later": later})
    assert set(table["statistic"]) == {"later"}
    assert row(table, "fc1.weight", "later")["auc"] == 1


def test_rounds_may_have_other_participants(rng):
    rounds = []
    for index, round_ in enumerate(planted.PLANTED["boosted"].log(6)):
        others = rng.choice([i for i in range(12) if i != 5], size=6, replace=False)
        rounds.append(round_.take(np.append(others, 5) if index % 2 else others))
    log = UpdateLog(planted.MODEL, rounds)
    table = quick([(log, planted.truth_of(log, [planted.CULPRIT]))], {"n": layer_norms, "a": accumulated_norms})
    assert row(table, "fc1.weight", "n")["auc"] == 1


def test_truth_that_poisons_nothing_is_an_error():
    log = planted.clean_log(2)
    with pytest.raises(InputError, match="no run has both poisoned and benign updates"):
        localize([(log, planted.truth_of(log, []))])
    with pytest.raises(InputError, match=r"no run has both poisoned and benign updates .* \(0 runs"):
        localize([])


def test_truth_of_another_run_is_an_error():
    log, truth = planted_run()
    with pytest.raises(InputError, match="the truth says nothing of client 'client-00' in round 0"):
        localize([(log, truth[truth["client"] != "client-00"])])


def test_a_run_without_an_attack_is_left_out():
    clean = planted.clean_log(2, seed=9)
    table = quick([planted_run(), (clean, planted.truth_of(clean, []))])
    assert (table["seeds"] == 1).all()


# Sweeps


class Sweep(SimpleNamespace):
    """Two conditions (rounds attacked from the start, or the last two of five) x two seeds, one control per seed."""

    @classmethod
    def planted(cls):
        runs, rows = [], {}
        for seed in (0, 1):
            control = planted.clean_log(5, seed=seed)
            runs.append(SimpleNamespace(name=f"control-{seed}", log=control, truth=planted.truth_of(control, [])))
            rows[f"control-{seed}"] = {"start": 0, "seed": seed, "control": True}
            for start in (0, 3):
                name = f"run-{start}-{seed}"
                attacked = planted.PLANTED["shifted class, three clients"].log(5, seed)
                log = UpdateLog(planted.MODEL, [*control[:start], *attacked[start:]])
                truth = planted.truth_of(log, planted.GROUP, range(start, 5))
                runs.append(SimpleNamespace(name=name, log=log, truth=truth))
                rows[name] = {"start": start, "seed": seed, "control": False}
        settings = pd.DataFrame.from_dict(rows, orient="index").rename_axis("run")
        return cls(runs=runs, settings=settings, axes=["start", "seed"])

    def control_of(self, name):
        return next(run for run in self.runs if run.name == f"control-{name[-1]}")


def test_sweep_has_attacked_and_control_rows_per_condition_and_phase():
    table = localize_sweep(Sweep.planted(), {"b": final_bias}, permutations=49)
    assert table.columns.tolist() == ["start", "control", "phase", *COLUMNS]
    groups = table.groupby(["start", "control", "phase"]).size().index.tolist()
    early, late = PHASES
    assert set(groups) == {(0, c, p) for c in (False, True) for p in (early, late)} | {
        (3, c, early) for c in (False, True)
    }
    whole = table[table["unit"] == ""]
    assert (whole.loc[~whole["control"], "auc"] == 1).all()
    assert (whole.loc[whole["control"], "auc"] < 0.8).all()
    assert (table["seeds"] == 2).all()


def of(table, **where):
    """The rows with these values, and the columns of `localize`."""
    for name, value in where.items():
        table = table[table[name] == value]
    return table[COLUMNS].reset_index(drop=True)


def test_sweep_is_localize_of_each_part():
    sweep, two = Sweep.planted(), {"b": final_bias, "r": final_rows}
    table, single = (f(sweep, two, permutations=49) for f in (localize_sweep, localize_rounds))
    attacked = [run for run in sweep.runs if run.name.startswith("run-0")]
    free = [sweep.control_of(run.name).log for run in attacked]
    controls = [(log, run.truth) for log, run in zip(free, attacked, strict=True)]
    parts = [(table, {"phase": PHASES[0]}, [0, 1, 2]), (table, {"phase": PHASES[1]}, [3, 4])]
    parts += [(single, {"since": index}, [index]) for index in range(5)]
    for whole, part, rounds in parts:
        for control, runs, beside in ((False, attacked, free), (True, controls, None)):
            found = of(whole, start=0, control=control, **part)
            pd.testing.assert_frame_equal(found, localize(runs, two, rounds, 49, control=beside))


def test_conditions_keep_their_order_though_those_of_one_control_are_located_together(monkeypatch):
    class Interleaved(Sweep):
        def control_of(self, name):
            control = super().control_of(name)
            return SimpleNamespace(**vars(control) | {"name": "other"}) if name.startswith("run-3") else control

    sweep = Interleaved.planted()
    again = [SimpleNamespace(**vars(run) | {"name": f"again-{run.name}"}) for run in sweep.runs if "run-0" in run.name]
    rows = pd.DataFrame({"start": 7, "seed": [0, 1], "control": False}, index=[run.name for run in again])
    sweep.runs, sweep.settings = [*sweep.runs, *again], pd.concat([sweep.settings, rows])
    table = localize_sweep(sweep, {"b": final_bias}, permutations=9)
    assert table["start"].drop_duplicates().tolist() == [0, 3, 7]
    pd.testing.assert_frame_equal(of(table, start=7), of(table, start=0))


def test_rounds_count_since_the_attack_began():
    table = localize_rounds(Sweep.planted(), {"b": final_bias}, permutations=9)
    assert table.columns.tolist() == ["start", "control", "since", *COLUMNS]
    assert {start: set(part["since"]) for start, part in table.groupby("start")} == {0: {0, 1, 2, 3, 4}, 3: {0, 1}}
    first = of(table, start=3, control=False, since=0)
    late = [run for run in Sweep.planted().runs if run.name.startswith("run-3")]
    pd.testing.assert_series_equal(first["auc"], quick(late, {"b": final_bias}, rounds=[3])["auc"])


def test_sweep_without_controls_has_attacked_rows_alone():
    class Uncontrolled(Sweep):
        def control_of(self, name):
            raise InputError(f"run {name!r} has no attack-free control")

    table = localize_sweep(Uncontrolled.planted(), {"b": final_bias}, permutations=9)
    assert not table["control"].any()
    assert table[["control_auc", "control_effect"]].isna().all(axis=None)
    whole = localize_sweep(Sweep.planted(), {"b": final_bias}, permutations=9)
    beside = ["control_auc", "control_effect"]
    pd.testing.assert_frame_equal(
        table.drop(columns=beside), whole[~whole["control"]].drop(columns=beside).reset_index(drop=True)
    )


@pytest.fixture
def recorded_sweep(tmp_path):
    """The planted sweep, its runs on disk."""
    sweep = Sweep.planted()

    def recorded(run):
        with LogWriter.create(tmp_path / run.name, planted.MODEL, planted.STATE) as writer:
            for round_ in run.log:
                writer.commit(round_, planted.STATE)
            writer.add_truth(run.truth)
        return Run.open(tmp_path / run.name)

    sweep.runs = [recorded(run) for run in sweep.runs]
    return sweep


@pytest.mark.parametrize("locate", [localize_sweep, localize_rounds])
def test_an_executor_changes_nothing(recorded_sweep, locate, monkeypatch):
    monkeypatch.setattr(sys.modules["gradlens.localization.over_sweeps"], "TOGETHER", 1)
    expected = locate(Sweep.planted(), FIVE, permutations=9)
    with ThreadPoolExecutor(2) as executor:
        found = locate(recorded_sweep, FIVE, permutations=9, executor=executor)
    pd.testing.assert_frame_equal(found, expected)


def test_sweep_over_seeds_alone_is_one_condition():
    sweep = Sweep.planted()
    sweep.axes = ["seed"]
    sweep.settings = sweep.settings[sweep.settings["control"] | (sweep.settings["start"] == 3)]
    table = localize_sweep(sweep, {"b": final_bias}, permutations=9)
    assert table.columns.tolist() == ["control", "phase", *COLUMNS]
    assert (table["seeds"] == 2).all()


def test_sweep_of_controls_alone_is_an_empty_table():
    sweep = Sweep.planted()
    sweep.settings = sweep.settings[sweep.settings["control"]]
    table = localize_sweep(sweep, {"b": final_bias}, permutations=9)
    assert table.columns.tolist() == ["start", "control", "phase", *COLUMNS]
    assert table.empty
