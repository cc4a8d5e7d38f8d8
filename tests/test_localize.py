"""Localisation against naive loops, exact permutation and planted answers."""

from functools import partial
from itertools import combinations
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from sklearn.metrics import roc_auc_score

import planted
from gradlens.evaluation import bootstrap
from gradlens.localize import localize, localize_sweep, unusual
from gradlens.log import CannotSay, InputError, UpdateLog
from gradlens.scorers import robust_zscore
from gradlens.statistics import STATISTICS, accumulated_norms, final_bias, final_rows, layer_norms

COLUMNS = ["layer", "statistic", "unit", "auc", "low", "high", "p", "seeds"]
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
    table = localize([planted_run(seed=s) for s in range(3)])
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
    table = quick([planted_run()])
    expected = {("fc2.bias", "final_bias", u) for u in ("", "0", "1", "2", "3")}
    expected |= {("fc2.weight", "final_rows", u) for u in ("", "0", "1", "2", "3")}
    names = ("layer_norms", "layer_cosines", "accumulated_norms")
    expected |= {(layer, name, "") for layer in planted.LAYERS for name in names}
    assert set(map(tuple, table[["layer", "statistic", "unit"]].to_numpy())) == expected
    assert len(table) == len(expected)


def test_control_is_chance():
    """The same labels on attack-free logs: no feature stands out after the correction, the mean AUC is about half."""
    runs = [(planted.clean_log(6, seed=s), planted_run(seed=s, rounds=6)[1]) for s in range(4)]
    table = localize(runs)
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
    assert (found["low"], found["high"]) == pytest.approx(bootstrap(np.array(aucs)))


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
    from gradlens.localize import _holm

    np.testing.assert_allclose(_holm(np.array([0.01, 0.04, 0.03])), [0.03, 0.06, 0.06])
    np.testing.assert_allclose(_holm(np.array([0.5, 0.9])), [1, 1])
    assert _holm(np.zeros(0)).shape == (0,)


def test_holm_counts_the_layers_not_the_units():
    runs = [planted_run("shifted class, three clients", seed=s) for s in range(3)]
    together = localize(runs, permutations=999)
    tested = int((together["unit"] == "").sum())
    assert tested == 2 + 3 * 4
    assert row(together, "fc2.bias", "final_bias")["p"] == pytest.approx(tested / 1000)


def test_answers_repeat_and_follow_the_seed():
    runs = [planted_run("drifting", seed=s) for s in range(2)]
    pd.testing.assert_frame_equal(quick(runs), quick(runs))
    assert (quick(runs)["p"].dropna() != quick(runs, seed=1)["p"].dropna()).any()


# Inputs


def test_one_seed_has_no_interval():
    table = quick([planted_run()])
    assert table["low"].isna().all()
    assert (table["seeds"] == 1).all()


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
    early, late = "first 3 attacked rounds", "later"
    assert set(groups) == {(0, c, p) for c in (False, True) for p in (early, late)} | {
        (3, c, early) for c in (False, True)
    }
    whole = table[table["unit"] == ""]
    assert (whole.loc[~whole["control"], "auc"] == 1).all()
    assert (whole.loc[whole["control"], "auc"] < 0.8).all()
    assert (table["seeds"] == 2).all()


def test_sweep_is_localize_of_each_part():
    sweep = Sweep.planted()
    table = localize_sweep(sweep, {"b": final_bias, "r": final_rows}, permutations=49)
    attacked = [run for run in sweep.runs if run.name.startswith("run-0")]
    controls = [(sweep.control_of(run.name).log, run.truth) for run in attacked]
    for control, runs in ((False, attacked), (True, controls)):
        for phase, rounds in (("first 3 attacked rounds", [0, 1, 2]), ("later", [3, 4])):
            part = table[(table["start"] == 0) & (table["control"] == control) & (table["phase"] == phase)]
            expected = localize(runs, {"b": final_bias, "r": final_rows}, rounds=rounds, permutations=49)
            pd.testing.assert_frame_equal(part[COLUMNS].reset_index(drop=True), expected)


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
