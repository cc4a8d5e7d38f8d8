"""From a scenario to a verdict: what is planted is found, what is not there is not, live equals offline."""

import numpy as np
import pytest

import gradlens
from gradlens import DETECTORS, detect, evaluate, filtered, with_truth
from gradlens.aggregators import AGGREGATORS, step
from simulations import Scenario, run

ATTACK = {"trigger": {"target_label": 1, "size": 3, "row": 0, "column": 0}, "scaling": {"factor": 3.0}}
SCENARIO = Scenario(rounds=12, local_epochs=2, batch_size=18, attack=ATTACK, num_malicious=4)


@pytest.fixture(scope="module")
def attacked(tmp_path_factory):
    return run(SCENARIO, tmp_path_factory.mktemp("attacked") / "run")


@pytest.fixture(scope="module")
def control(tmp_path_factory):
    return run(SCENARIO.control, tmp_path_factory.mktemp("control") / "run")


@pytest.mark.parametrize("name", DETECTORS)
def test_a_live_filter_decides_what_the_offline_pass_decides(tmp_path, name):
    live = run(SCENARIO.replace(rounds=3, detector=name), tmp_path / "run")
    offline = detect(live, {name: DETECTORS[name]()})
    recorded = live.verdicts
    assert recorded["round"].tolist() == offline["round"].tolist()
    for column in ("client", "score", "flag", "abstained"):
        np.testing.assert_array_equal(recorded[column].to_numpy(), offline[column].to_numpy())
    np.testing.assert_array_equal(recorded["kept"].to_numpy(bool), ~offline["flag"].to_numpy(bool))


def test_replaying_the_filter_gives_the_recorded_global_models(tmp_path):
    live = run(SCENARIO.replace(rounds=3, detector="layer_norms"), tmp_path / "run")
    aggregate = filtered(AGGREGATORS["mean"](), DETECTORS["layer_norms"]())
    for prefix, after in zip(live.log.prefixes(), live.states(), strict=True):
        replayed = step(prefix[-1].global_model, aggregate(prefix))
        for name in live.log.model:
            np.testing.assert_array_equal(replayed[name], after[name])


def test_where_everybody_is_flagged_the_global_model_stays(tmp_path):
    live = run(SCENARIO.replace(rounds=2, detector={"layer_norms": {"threshold": -1.0}}), tmp_path / "run")
    assert live.verdicts["flag"].all()
    assert not live.verdicts["kept"].any()
    for name in live.log.model:
        np.testing.assert_array_equal(live.log[0].global_model[name], live.log[1].global_model[name])


def test_a_working_attack_is_found_and_its_control_is_not(attacked, control):
    assert attacked.metrics["asr"].iloc[-1] > 0.8
    detectors = {"layer_norms": DETECTORS["layer_norms"]()}
    figures = []
    for log in (attacked, control):  # the same labels on a run in which nobody attacked
        table = evaluate(with_truth(detect(log, detectors), attacked.truth)).set_index("metric")
        figures.append(table.loc["auc", "value"])
    assert figures[0] > 0.99
    assert 0.25 < figures[1] < 0.75


def test_the_filter_takes_the_attack_away(attacked, tmp_path):
    """What the server does with a verdict: ASR falls by over 50 points, main accuracy does not suffer."""
    defended = run(SCENARIO.replace(detector="layer_norms"), tmp_path / "run")
    assert defended.metrics["asr"].iloc[-1] < attacked.metrics["asr"].iloc[-1] - 0.5
    assert defended.metrics["main_accuracy"].iloc[-1] > attacked.metrics["main_accuracy"].iloc[-1] - 0.02
    flagged = defended.verdicts.merge(defended.truth, on=["round", "client"])
    assert flagged.loc[flagged["poisoned"], "flag"].mean() > 0.9


def test_localisation_names_layers_of_the_attack_and_none_of_the_control(attacked, control):
    found = gradlens.localize([(attacked.log, attacked.truth)])
    nothing = gradlens.localize([(control.log, attacked.truth)])
    assert found.loc[found["unit"] == "", "p"].min() < 0.05
    assert nothing.loc[nothing["unit"] == "", "p"].min() > 0.05


def test_recording_costs_little(attacked):
    """The wait for the disk is a small part of a round, even of one as short as these."""
    later = attacked.metrics.iloc[2:]
    assert later["log_seconds"].median() < 0.5 * later["seconds"].median()
