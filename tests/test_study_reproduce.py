"""The seed papers in small: what is measured, that it goes on where it stopped, and that it points the papers' way."""

import re
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from gradlens import DETECTORS
from gradlens.errors import InputError
from simulations import Scenario
from simulations import run as simulate
from simulations.assemble import assemble
from simulations.measure import attack_success
from simulations.studies import reproduce
from simulations.studies import reproduce_bagdasaryan as bagdasaryan
from simulations.studies import reproduce_bilgin as bilgin
from simulations.studies import reproduce_dba as dba
from simulations.studies import reproduce_evasion as evasion
from simulations.studies import reproduce_lfighter as lfighter
from simulations.studies import reproduce_sun as sun
from simulations.studies import reproduce_wu as wu
from simulations.studies.pruning_steps import BOTH, DELTAS, NOTHING
from simulations.studies.reproduce_outcomes import outcomes

SCENARIO = Scenario(
    num_clients=5, rounds=2, samples_per_client=40, batch_size=40, learning_rate=0.1,
    attack={"trigger": {"size": 3, "row": 0, "column": 0}}, num_malicious=1, poison_rate=0.5,
)  # fmt: skip


def test_the_deviation_is_from_the_mean_of_all_at_the_farthest_number():
    updates = np.array([[[1.0, 0], [0, 0]], [[1, 0], [0, 0]], [[1, 0], [0, 6]]])
    np.testing.assert_allclose(bilgin.deviation(updates), [2, 2, 4])


def test_drift_is_that_of_plain_sgd(tmp_path):
    """One step with all samples: a bias moves by the learning rate times the mean of y - p, of each client's own."""
    run, federation = simulate(SCENARIO, tmp_path), assemble(SCENARIO)
    round_ = run.log[0]
    malicious = next(iter(federation.poisoned))
    attacking = np.arange(5) == malicious
    found = bilgin.drifts(federation, round_, attacking)

    def moved(client: int) -> float:
        x, y = federation.poisoned.get(client, federation.honest[client])
        model = assemble(SCENARIO).model.eval()
        with torch.no_grad():
            p = torch.softmax(model(x), 1)[:, 1]
        return 0.1 * float(((y == 1).float() - p).mean())

    others = np.mean([moved(client) for client in range(5) if client != malicious])
    assert found["drift"] == pytest.approx(moved(malicious) - others, abs=1e-6)
    chosen = federation.chosen[malicious]
    with torch.no_grad():
        p = torch.softmax(assemble(SCENARIO).model.eval()(federation.poisoned[malicious][0][chosen]), 1)[:, 1]
    assert found["expected"] == pytest.approx(0.1 * len(chosen) / 40 * (1 - float(p.mean())))


def test_a_run_is_measured_round_by_round_and_layer_by_layer(tmp_path):
    run = simulate(SCENARIO, tmp_path / "attacked")
    rows = bilgin.measured(run, SCENARIO)
    assert list(rows) == bilgin.COLUMNS
    assert len(rows) == 2 * 4
    assert rows.loc[rows["is_final_bias"], "layer"].unique().tolist() == ["fc2.bias"]
    m = bilgin.deviation(run.log[1].updates["fc1.weight"])
    malicious = run.log[1].clients == run.truth.query("poisoned")["client"].iloc[0]
    row = rows[rows["round"].eq(1) & rows["layer"].eq("fc1.weight")].iloc[0]
    assert row["malicious"] == pytest.approx(m[malicious][0])
    assert row["benign_max"] == pytest.approx(m[~malicious].max())
    assert row["rank"] == 1 + (m > m[malicious]).sum()
    assert row["auc"] == pytest.approx((m[~malicious] < m[malicious]).mean())
    free = simulate(SCENARIO.control, tmp_path / "control")
    control = bilgin.measured(free, SCENARIO)
    assert list(control) == bilgin.COLUMNS
    m = bilgin.deviation(free.log[1].updates["fc1.weight"])
    goal, states = assemble(SCENARIO).goal, list(free.states())
    assert control["asr"].iloc[-1] == attack_success(goal, assemble(SCENARIO).model, states[-1])
    row = control[control["round"].eq(1) & control["layer"].eq("fc1.weight")].iloc[0]
    assert row["malicious"] == pytest.approx(m[malicious][0])  # of the same client, which is honest here


def table_of(aucs: dict[tuple[float, int, str], list[float]]) -> pd.DataFrame:
    """(learning rate, seed, layer) -> AUC of each round, as rows of a table."""
    rows = []
    for (rate, seed, layer), values in aucs.items():
        for index, auc in enumerate(values):
            settings = dict.fromkeys(bilgin.AXES, "same") | {"learning_rate": rate}
            of_run = {"run": f"{rate}-{seed}", "seed": seed, "control": False}
            rows.append(
                settings | of_run | {"layer": layer, "auc": auc, "round": index, "is_final_bias": "bias" in layer}
            )
    return pd.DataFrame(rows)


def test_conditions_are_what_differs_from_what_most_runs_have():
    early, later = [1.0] * 5, [0.25, 0.75]
    aucs = {(rate, seed, "fc.bias"): early + later for rate, seed in ((0.1, 0), (0.1, 1), (0.2, 0))}
    aucs |= {(0.1, 0, "fc.weight"): [0.5] * 7, (0.1, 1, "fc.weight"): [np.nan] * 2 + [0.6] * 5 + [0.9]}
    found = bilgin.by_condition(table_of(aucs)).set_index(["condition", "layer", "phase"])["auc"]
    assert found["center", "fc.bias", "early"] == 1
    assert found["center", "fc.bias", "later"] == 0.5
    assert found["learning rate 0.2", "fc.bias", "later"] == 0.5
    assert found.index[0][0] == "center"


def test_an_experiment_goes_on_where_it_stopped(tmp_path, monkeypatch):
    cells = {SCENARIO: SCENARIO, SCENARIO.control: SCENARIO, SCENARIO.replace(seed=1): SCENARIO.replace(seed=1)}
    monkeypatch.setattr(reproduce, "scenarios_of", lambda part, quick: cells)
    monkeypatch.setattr(reproduce, "AT_A_TIME", 1)
    path = tmp_path / "rows.csv"
    todo = {"part": "bilgin", "measure": bilgin.measured, "path": path, "quick": True, "workers": 1}
    assert reproduce.computed(**todo, minutes=0) == 3
    assert not path.exists()
    clock = iter([0.0, 0.0])  # it is late when it looks again
    monkeypatch.setattr(reproduce, "time", SimpleNamespace(monotonic=lambda: next(clock, 1e9)))
    assert reproduce.computed(**todo, minutes=1) == 2
    monkeypatch.undo()
    monkeypatch.setattr(reproduce, "scenarios_of", lambda part, quick: cells)
    assert reproduce.computed(**todo, minutes=10) == 0
    rows = pd.read_csv(path)
    assert rows["run"].value_counts().to_dict() == {scenario.digest: 8 for scenario in cells}
    assert set(rows["layer"]) == {"fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"}
    assert rows.groupby("control")["auc"].count().to_dict() == {False: 16, True: 8}


def test_an_unknown_experiment_is_named():
    with pytest.raises(InputError, match=r"expected one of bilgin.*, found 'bligin'"):
        reproduce.main(["bligin"])


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """The small version of every experiment: name -> its tables."""
    folder = tmp_path_factory.mktemp("quick")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reproduce, "ROOT", folder)
        reproduce.main(["--quick", "--workers", "2"])
        return {
            name: [
                pd.read_csv(path) if (path := reproduce.table_of(part, quick=True)).exists() else pd.DataFrame()
                for part in experiment.parts
            ]
            for name, experiment in reproduce.EXPERIMENTS.items()
        }


def test_bagdasaryan_in_small_points_the_papers_way(quick):
    single, stealth, words = quick["bagdasaryan"]
    attacked, control = single[~single["control"]], single[single["control"]]
    at = attacked[attacked["since"].eq(0)]
    assert (at["asr"] > 0.9).all()  # at once, and for no longer than honest clients let it
    assert control["asr"].max() < 0.3
    assert (at["accuracy"] > control.loc[control["since"].eq(0), "accuracy"].mean() - 0.3).all()
    assert attacked.loc[attacked["since"].eq(7), "asr"].mean() < at["asr"].mean()
    assert attacked.loc[attacked["since"].lt(0), "asr"].max() < 0.3
    assert at["norm_rank"].eq(1).all()
    sent = stealth[~stealth["control"] & stealth["since"].eq(0)].set_index("attack")
    alike, replaced = (next(name for name in sent.index if part in name) for part in ("train_and_scale", "replacement"))
    assert sent.loc[replaced, "norm"] > 5 * sent.loc[alike, "norm"]
    assert sent.loc[alike, "norm_rank"] > 1  # it hides its norm
    assert "nan" not in bagdasaryan.text(single, stealth, words)
    assert all("nan" not in finding.ours for finding in bagdasaryan.findings(single, stealth, words))


def test_wu_in_small_points_the_papers_way(quick):
    table, cifar10 = quick["wu"]
    steps = table[table["part"].eq("steps") & ~table["control"]].groupby("step")["asr"].mean()
    assert steps[NOTHING] > 0.5  # the backdoor is there,
    assert steps[BOTH] < steps[NOTHING]  # and the steps lower it
    control = table[table["part"].eq("steps") & table["control"] & table["step"].eq(NOTHING)]
    assert control["asr"].max() < steps[NOTHING] - 0.3
    layers = table[table["part"].eq("layers")]
    assert layers["layer"].unique().tolist() == ["conv1", "conv2", "fc1", "fc2"]
    assert layers.groupby("run").size().tolist() == [4 * len(DELTAS)] * 2
    assert all("nan" not in finding.ours for finding in wu.findings(table, cifar10))
    assert "`conv2`" in wu.text(table, cifar10)


def test_bilgin_in_small_points_the_papers_way(quick):
    exact, conditions = quick["bilgin"]
    bias = exact[~exact["control"] & exact["is_final_bias"]]
    early = bias[bias["round"] < bilgin.EARLY]
    assert (early["malicious"] > 1.5 * early["benign"]).all()
    assert early["rank"].eq(1).mean() > 0.8
    by_round = bias.groupby("round")["malicious"].mean()
    assert by_round.iloc[-3:].mean() < by_round.iloc[:3].mean()  # it fades while the backdoor is learned
    found = bilgin.by_condition(conditions).query("is_final_bias and phase == 'early'").set_index("condition")["auc"]
    assert found["center"] > 0.9 > found["partition dirichlet"] + 0.1
    findings = bilgin.findings(exact, conditions)
    assert all(finding.ours and "nan" not in finding.ours for finding in findings)
    assert "**Which gradients:**" in bilgin.text(exact, conditions)


def test_sun_in_small_points_the_papers_way(quick):
    table, femnist = quick["sun"]
    attacked, control = table[~table["control"] & table["attackers"].gt(0)], table[table["control"]]
    clipped = attacked["aggregator"].str.startswith("norm_clipping")
    assert attacked.loc[~clipped, "asr"].mean() > 0.5  # without a defense the backdoor is there,
    assert attacked.loc[clipped, "asr"].max() < 0.2  # and a bound stops it
    assert control["asr"].max() < 0.2
    accuracies = control.groupby("aggregator")["accuracy"].mean()
    assert accuracies.max() - accuracies.min() < 0.05  # and costs nothing
    assert (control["norm_90"] >= control["norm"]).all()
    assert "boosted" in sun.text(table, femnist)
    assert sun.findings(table, femnist)


def test_dba_in_small_replaces_the_model_and_lasts(quick):
    """The paper's difference between parts and the whole needs its size; that both are there at once does not."""
    single, multi = quick["dba"]
    attacked = single[~single["control"]]
    assert attacked.loc[attacked["since"].eq(0), "asr"].min() > 0.9
    assert attacked.loc[attacked["since"].eq(10), "asr"].min() > 0.5
    assert single.loc[single["control"], "asr"].max() < 0.2
    assert dba.findings(single, multi)
    assert dba.text(single, multi) == "FoolsGold was not run yet."


def test_outcomes_count_rounds_from_the_last_attack(tmp_path):
    scenario = SCENARIO.replace(schedule={"single_round": {"at": 0}}, detector="layer_norms")
    rows = outcomes(simulate(scenario, tmp_path / "attacked"), scenario)
    assert rows["since"].tolist() == [0, 1]
    assert rows["attackers"].tolist() == [1, 0]
    assert rows["dropped_malicious"].between(0, 1).all()
    assert outcomes(simulate(scenario.control, tmp_path / "control"), scenario)["asr"].notna().all()


def test_rules_and_filters_are_told_apart():
    rows = [
        {"run": f"{rule}{detector}{seed}{control}", "seed": seed, "control": control, "aggregator": rule,
         "detector": detector, "round": index, "asr": 0.1 if control else asr, "accuracy": 0.9,
         "dropped_malicious": 0.5 if detector != "none" else np.nan, "dropped_benign": 0.0}
        for rule, detector, asr in (("mean", "none", 0.5), ("median", "none", 0.4), ("mean", "lfighter", 0.2))
        for control in (False, True) for seed in (0, 1) for index in range(8)
    ]  # fmt: skip
    table = pd.DataFrame(rows)
    found = {finding.claim: finding for finding in lfighter.findings(table, pd.DataFrame())}
    assert found["MNIST: ASR, no attack"].ours.startswith("0.10 [")
    assert found["MNIST: ASR, mean"].ours.startswith("0.50 [")
    assert found["MNIST: ASR, lfighter"].ours.startswith("0.20 [")
    assert found["MNIST: ASR, lfighter"].paper == "0.01"
    assert found["MNIST: ASR, median"].paper == "–"
    assert re.search(
        r"\| 0\.20 \S+\s\S+ \| 0\.90 \S+\s\S+ \| 0\.50 \S+\s\S+ \| 0\.00 ", lfighter.text(table, pd.DataFrame())
    )


def test_what_detectors_and_layers_see_is_measured_beside_the_same_clients_in_peace(tmp_path):
    scenario = SCENARIO.replace(num_clients=8, rounds=4, num_malicious=2, poison_rate=1.0, learning_rate=0.5)
    attacked = evasion.measured(simulate(scenario, tmp_path / "attacked"), scenario)
    control = evasion.measured(simulate(scenario.control, tmp_path / "control"), scenario)
    for rows in (attacked, control):
        assert list(rows) == evasion.COLUMNS
        assert set(rows.loc[rows["what"].eq("detector"), "name"]) == set(DETECTORS)
        assert rows.loc[rows["what"].eq("place"), "auc"].between(0, 1).all()
        assert rows.loc[rows["what"].eq("outcome"), "asr"].between(0, 1).all()
    norms = [rows[rows["what"].eq("place") & rows["name"].eq("layer_norms")] for rows in (attacked, control)]
    assert norms[0]["auc"].max() > norms[1]["auc"].max() + 0.1


def test_ways_of_sending_are_words():
    head = "trigger(size=3, row=0, column=0)"
    assert evasion.way(head) == "as trained"
    assert evasion.way(f"{head}+scaling(factor=4)") == "boosted fourfold"
    assert evasion.way(f"{head}+hiding") == "final bias drawn from the others'"
    assert evasion.way(f"{head}+hiding(layers=final)+norm_cap") == "final layer drawn from the others', norms capped"
    known = {evasion.way(scenario.label("attack")) for scenario in reproduce.scenarios_of("evasion")}
    assert len(known) == 8  # none of the names is lost


def test_the_page_says_whether_a_final_layer_signal_survives():
    rows = []
    for control in (False, True):
        for seed in (0, 1):
            run = {"run": f"{control}{seed}", "control": control, "seed": seed, "partition": "iid"}
            run |= {"attack": "none" if control else "trigger+hiding(layers=final)+norm_cap"}
            rows += [
                run | {"what": "outcome", "asr": 0.0 if control else 0.9, "accuracy": 0.9},
                run | {"what": "case", "accused": 0.0 if control else 0.5, "innocent": 0},
                run | {"what": "detector", "name": "panel", "auc": 0.5 if control else 0.9, "tpr": 0.25},
                run | {"what": "place", "name": "final_bias", "layer": "fc2.bias", "auc": 0.5},
                run | {"what": "place", "name": "spectral", "layer": "fc1.weight", "auc": 0.5 if control else 0.95},
            ]
    text = evasion.text(pd.DataFrame(rows))
    assert "no outlier is left in it" in text
    assert "The best of any layer is 0.95, by `spectral` in `fc1.weight`; where nobody attacks it is 0.50." in text
    rows = [row | ({"auc": 0.8} if row.get("name") == "final_bias" and not row["control"] else {}) for row in rows]
    assert "a signal survives in it" in evasion.text(pd.DataFrame(rows))
