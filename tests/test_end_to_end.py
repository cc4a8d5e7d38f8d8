"""From a scenario to a verdict: what is planted is found, what is not there is not, live equals offline."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

import gradlens
from gradlens import DETECTORS, UpdateLog, detect, evaluate, filtered, with_truth
from gradlens.aggregators import AGGREGATORS, FilterStopped, step
from gradlens.run import VERDICT_COLUMNS
from simulations import Scenario, run

ATTACK = {"trigger": {"target_label": 1, "size": 3, "row": 0, "column": 0}, "scaling": {"factor": 3.0}}
SCENARIO = Scenario(rounds=12, local_epochs=2, batch_size=18, attack=ATTACK, num_malicious=4)


@pytest.fixture(scope="module")
def attacked(tmp_path_factory):
    return run(SCENARIO, tmp_path_factory.mktemp("attacked") / "run")


@pytest.fixture(scope="module")
def control(tmp_path_factory):
    return run(SCENARIO.control, tmp_path_factory.mktemp("control") / "run")


FILTERS = (
    {},
    {"action": "clip", "out_for": 1},
    {"action": "down_weight", "out_for": 2, "when_all_flagged": "use_all"},
    {"out_for": None, "cleared": ["client-03"], "when_abstained": "keep_model"},
    {"action": "record"},
)


@pytest.mark.parametrize("name", DETECTORS)
def test_a_live_filter_decides_what_the_offline_pass_decides(tmp_path, name):
    """Verdicts, decisions and the next global model, to the bit, whichever round the offline pass is asked first."""
    settings = FILTERS[list(DETECTORS).index(name) % len(FILTERS)]
    live = run(SCENARIO.replace(rounds=3, detector=name, filter=settings, nonfinite_rate=0.05), tmp_path / "run")
    offline, recorded = detect(live, {name: DETECTORS[name]()}), live.verdicts
    assert recorded["round"].tolist() == offline["round"].tolist()
    for column in ("client", "score", "flag", "abstained"):
        np.testing.assert_array_equal(recorded[column].to_numpy(), offline[column].to_numpy())
    rule, states = filtered(AGGREGATORS["mean"](), DETECTORS[name](), **settings), list(live.states())
    log = gradlens.open(live.path).log  # of which nothing is remembered
    for index in (2, 0, 1):
        prefix = log[: index + 1]
        decided, told = rule.decision(prefix).table(index, name), recorded[recorded["round"] == index]
        for column in VERDICT_COLUMNS:
            np.testing.assert_array_equal(told[column].to_numpy(), decided[column].to_numpy())
        replayed = step(prefix[-1].global_model, rule(prefix))
        for layer in log.model:
            np.testing.assert_array_equal(replayed[layer], states[index][layer])


@pytest.mark.parametrize("name", DETECTORS)
def test_what_the_offline_pass_decides_a_live_filter_decides(attacked, name):
    """The other way round: a recording made without a filter, its rounds then arriving one by one."""
    rule = filtered(AGGREGATORS["mean"](), DETECTORS[name](), out_for=1)
    offline = gradlens.open(attacked.path).log[:4]
    decided = [rule.decision(offline[: index + 1]).table(index, name) for index in (3, 2, 1, 0)][::-1]
    live = UpdateLog(offline.model)
    for index, table in enumerate(decided):
        arrived = offline[index]
        live = live.append(replace(arrived, updates={layer: np.array(u) for layer, u in arrived.updates.items()}))
        pd.testing.assert_frame_equal(rule.decision(live).table(index, name), table, check_exact=True)


@pytest.mark.parametrize("name", AGGREGATORS)
def test_replaying_any_rule_gives_the_recorded_global_models(tmp_path, name):
    live = run(SCENARIO.replace(rounds=3, aggregator=name), tmp_path / "run")
    log, states = gradlens.open(live.path).log, list(live.states())
    for index in (2, 0, 1):
        replayed = step(log[index].global_model, AGGREGATORS[name]()(log[: index + 1]))
        for layer in log.model:
            np.testing.assert_array_equal(replayed[layer], states[index][layer])


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
    assert set(live.verdicts["reason"]) == {"flagged; everybody is flagged: keep_model"}
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


def test_a_filter_that_is_told_to_stop_leaves_the_evidence(tmp_path):
    """The round is recorded with its verdict, its global model stays; a further call goes on after it."""
    flags_all = {"layer_norms": {"threshold": -1.0}}
    stopping = SCENARIO.replace(rounds=2, detector=flags_all, filter={"when_all_flagged": "stop"})
    for rounds in (1, 2):
        with pytest.raises(FilterStopped, match=f"round {rounds - 1}: everybody is flagged: stop"):
            run(stopping, tmp_path / "run")
        found = gradlens.open(tmp_path / "run")
        assert not found.is_closed
        assert len(found.log) == rounds
        assert set(found.verdicts["reason"]) == {"flagged; everybody is flagged: stop"}
        for layer, array in list(found.states())[-1].items():
            np.testing.assert_array_equal(array, found.log[0].global_model[layer])
    assert run(stopping, tmp_path / "run").is_closed


BOOSTED = {"trigger": {"target_label": 1, "size": 3, "row": 0, "column": 0}, "scaling": {"factor": 20.0}}


def test_norm_clipping_stops_an_unconstrained_boosted_trigger(tmp_path):
    """Sun et al. 2019: one attacker of twenty replaces the model; clipped to the median norm it is one of twenty."""
    boosted = SCENARIO.replace(attack=BOOSTED, num_malicious=1)
    bare = run(boosted, tmp_path / "bare").metrics.iloc[-1]
    clipped = run(boosted.replace(aggregator="norm_clipping"), tmp_path / "clipped").metrics.iloc[-1]
    control = run(boosted.control, tmp_path / "control").metrics.iloc[-1]
    assert bare["asr"] > 0.8
    assert clipped["asr"] < 0.2
    assert clipped["main_accuracy"] > control["main_accuracy"] - 0.02


def test_localisation_names_layers_of_the_attack_and_none_of_the_control(attacked, control):
    found = gradlens.localize([(attacked.log, attacked.truth)])
    nothing = gradlens.localize([(control.log, attacked.truth)])
    assert found.loc[found["unit"] == "", "p"].min() < 0.05
    assert nothing.loc[nothing["unit"] == "", "p"].min() > 0.05


def test_recording_costs_little(attacked):
    """The disk works while the next round trains: where it has a core to itself a round does not wait for it."""
    later = attacked.metrics.iloc[2:]
    assert later["log_seconds"].min() < 0.5 * later["seconds"].median()
