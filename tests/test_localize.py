"""Localisation against naive loops, exact permutation and planted answers."""

import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import combinations
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn.metrics import roc_auc_score

import planted
from gradlens.detectors import DETECTORS, detect
from gradlens.errors import CannotSay, InputError
from gradlens.localization import LOCATED_BY, PHASES, effects, localize, localize_rounds, localize_sweep, unusual
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


def naive_intervals(runs, resamples=1_000):
    """Runs drawn with replacement, in each its rounds; every pair of updates compared."""
    rng, scored = np.random.default_rng(5), []
    for log, _ in runs:
        scores = naive_scores(log, final_bias, "fc2.bias", "1")
        of = {
            bad: [
                [v for (r, c), v in scores.items() if r == i and (c in planted.GROUP) == bad] for i in range(len(log))
            ]
            for bad in (True, False)
        }
        scored.append((np.array(of[True]), np.array(of[False])))
    means = []
    for _ in range(resamples):
        aucs = []
        for run in rng.integers(len(scored), size=len(scored)):
            drawn = rng.integers(len(runs[0][0]), size=len(runs[0][0]))
            bad, good = (kind[drawn].ravel() for kind in scored[run])
            aucs.append((bad[:, None] > good).mean())
        means.append(np.mean(aucs))
    return np.quantile(means, [0.025, 0.975])


@pytest.mark.parametrize("seeds", [1, 3])
def test_interval_is_that_of_resampled_runs_and_rounds(seeds):
    runs = [noisy(seed) for seed in range(seeds)]
    found = row(quick(runs, {"b": final_bias}), "fc2.bias", "b", "1")
    low, high = naive_intervals(runs)
    assert (found["low"], found["high"]) == pytest.approx((low, high), abs=0.02)
    assert high - low > 0.1
    assert found["low"] < found["auc"] < found["high"]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.booleans(), st.integers(0, 4)), min_size=2, max_size=30))
def test_pairs_won_are_counted_round_by_round_and_a_tie_counts_half(updates):
    scores, malicious, when = (np.array(each) for each in zip(*updates, strict=True))
    wins = effects._wins(scores[:, None].astype(float), malicious, when, 5).reshape(5, 5)
    for first in range(5):
        for second in range(5):
            bad, good = scores[malicious & (when == first)], scores[~malicious & (when == second)]
            assert wins[first, second] == (bad[:, None] > good).sum() + (bad[:, None] == good).sum() / 2


def test_one_seed_in_one_round_has_no_interval_and_several_seeds_have():
    one = quick([noisy(0)], {"b": final_bias}, rounds=[1])
    assert one[["low", "high"]].isna().all(axis=None)
    assert (one["seeds"] == 1).all()
    several = quick([noisy(seed) for seed in range(4)], {"b": final_bias}, rounds=[1])
    assert (several["low"] <= several["auc"]).all()
    assert (several["high"] >= several["auc"]).all()
    assert (several["high"] > several["low"]).any()


def test_interval_does_not_depend_on_the_statistics_asked_together():
    runs = [noisy(seed) for seed in range(2)]
    alone, together = quick(runs, {"b": final_bias}), quick(runs, {"n": layer_norms, "b": final_bias})
    together = together[together["statistic"] == "b"].reset_index(drop=True)
    pd.testing.assert_frame_equal(alone.drop(columns="p"), together.drop(columns="p"))


def test_rounds_beyond_twenty_are_resampled_in_stretches():
    """Thirty rounds, of which every fourth attacked one counts: an interval that holds the AUC, and no error."""
    found = row(quick([noisy(0, rounds=30)], {"b": final_bias}), "fc2.bias", "b")
    assert found["low"] < found["auc"] < found["high"]
    assert found["high"] - found["low"] < 0.3


def test_resamples_without_a_poisoned_update_are_left_out():
    log = planted.PLANTED["shifted class"].log(5)
    found = quick([(log, planted.truth_of(log, [planted.CULPRIT], [1]))], {"b": final_bias}, rounds=range(5))
    assert np.isfinite(found[["low", "high"]]).all(axis=None)


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
    # the final layer has one tested row here, so that Holm's correction changes nothing
    name = "layer_norms"
    only = {name: lambda prefix: layer_norms(prefix)[[layer]]}
    found = row(localize([(log, truth)], only, permutations=4_999), layer, name)["p"]
    assert found == pytest.approx(exact_p(log, truth, name, layer), abs=4 * np.sqrt(0.25 / 4_999))


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
    p = row(localize([(log, truth)], {"b": final_bias}, permutations=4_999), "fc2.bias", "b")["p"]
    assert p == pytest.approx(1 / 220, abs=4 * np.sqrt(1 / 220 / 4_999))  # 12 choose 3 is 220


def test_holm_by_hand():
    """p of .01, .04, .03 become 3 x .01, then 2 x .03, then the larger of that and 1 x .04."""
    np.testing.assert_allclose(effects._holm(np.array([0.01, 0.04, 0.03])), [0.03, 0.06, 0.06])
    np.testing.assert_allclose(effects._holm(np.array([0.5, 0.9])), [1, 1])
    assert effects._holm(np.zeros(0)).shape == (0,)


def test_holm_counts_the_layers_not_the_units():
    runs = [planted_run("shifted class, three clients", seed=s) for s in range(3)]
    together = localize(runs, FIVE, permutations=999)
    tested = int((together["unit"] == "").sum())
    assert tested == 2 + 3 * 4
    assert row(together, "fc2.bias", "final_bias")["p"] == pytest.approx(tested / 1000)


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
