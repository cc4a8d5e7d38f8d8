"""The study of attacks: its committed tables, its section of the results, and its rows of a small sweep."""

import numpy as np
import pandas as pd
import pytest

from simulations import Scenario, run_sweep, sweep
from simulations.scenario import SCENARIOS, load_sweep
from simulations.studies import attacks as study
from simulations.studies.conditions import main_part

SENDING = {
    "sign_flip", "gaussian", "zero", "a_little_is_enough", "inner_product", "min_max", "min_sum", "mimic",
}  # fmt: skip
SIZED = {"num_clients": 6, "rounds": 2, "samples_per_client": 20}


@pytest.fixture(scope="module")
def attacks() -> pd.DataFrame:
    return study.committed()[0]


@pytest.fixture(scope="module")
def replacement() -> pd.DataFrame:
    return study.committed()[1]


def test_the_section_is_made_of_the_committed_tables(attacks, replacement):
    text = study.section(attacks, replacement)
    assert text.startswith("## The attacks, measured")
    for name in attacks["attack"]:
        assert f"`{name}`" in text
    assert "nan" not in text


def test_every_attack_of_the_scenarios_has_a_row(attacks):
    committed = {main_part(scenario.attack) for scenario in committed_scenarios()}
    assert set(attacks["attack"]) == committed


def committed_scenarios() -> list[Scenario]:
    """The attacked scenarios that the table is made of; a new attack need not be among them."""
    names = ("attacks.toml", "attacks_data.toml")
    scenarios = [scenario for name in names for scenario in load_sweep(SCENARIOS / name).scenarios]
    return [scenario for scenario in scenarios if not scenario.is_control]


def test_every_row_has_its_control_and_enough_seeds(attacks):
    assert attacks[["accuracy", "accuracy_low", "accuracy_high", "control_accuracy"]].notna().all(axis=None)
    targeted = attacks[~attacks["attack"].isin(SENDING)]
    assert targeted[["asr", "asr_low", "asr_high", "control_asr"]].notna().all(axis=None)
    assert (targeted["held_out"] > 0).all()
    assert attacks.loc[attacks["attack"].isin(SENDING), ["asr", "control_asr"]].isna().all(axis=None)
    assert (attacks["seeds"] >= 3).all()


def test_intervals_hold_their_figures(attacks):
    rates = attacks[attacks["asr"].notna()]
    assert (rates["asr_low"] <= rates["asr"]).all()
    assert (rates["asr"] <= rates["asr_high"]).all()
    certain = rates["asr_bound"].eq(">=")
    expected = 0.05 ** (1 / rates.loc[certain, "held_out"])
    np.testing.assert_allclose(rates.loc[certain, "asr_low"], expected, atol=1e-4)


def test_every_row_is_of_a_committed_scenario(attacks):
    committed = {(each.label("attack"), each.task, each.label("partition")) for each in committed_scenarios()}
    assert set(attacks[["setting", "task", "partition"]].itertuples(index=False, name=None)) == committed


def test_one_late_round_of_model_replacement_is_enough(replacement):
    (scenario, *_) = [each for each in load_sweep(SCENARIOS / "replacement.toml").scenarios if not each.is_control]
    assert len(replacement) >= 3
    assert set(replacement["round"]) == {scenario.schedule["single_round"]["at"]}
    assert (replacement["asr"] >= 0.95).all()
    assert (replacement["control_asr"] < 0.1).all()


@pytest.mark.parametrize(
    ("attack", "shown"),
    [
        (["trigger"], "trigger"),
        (["trigger", "scaling"], "scaling"),
        (["label_flip", "scaling"], "label_flip"),
        (["trigger", "norm_bound", "scaling"], "norm_bound"),
        (["trigger", "scaling", "hiding"], "hiding"),
    ],
)
def test_which_part_a_row_is_about(attack, shown):
    assert main_part(dict.fromkeys(attack)) == shown


def test_the_rows_of_a_sweep(tmp_path):
    base = Scenario(num_malicious=2, **SIZED)
    flip = {"label_flip": {"source_label": 7, "target_label": 5}, "scaling": {"factor": 9.0}}
    found = run_sweep(sweep(base, attack=[flip, {"zero": {}}], seed=[0, 1]), tmp_path / "runs", progress=False)
    table = study.in_order(study.attack_rows(found)).set_index("attack")
    assert table.index.tolist() == ["label_flip", "zero"]
    attacked = [each for each in found.runs if "label_flip" in each.scenario["attack"]]
    finals = [each.metrics["asr"].iloc[-1] for each in attacked]
    assert table.loc["label_flip", "asr"] == pytest.approx(np.mean(finals))
    assert table.loc["label_flip", "held_out"] == 36  # sevens of the test set
    free = [found.control_of(each.name).metrics["main_accuracy"].iloc[-1] for each in attacked]
    assert table.loc["label_flip", "control_accuracy"] == pytest.approx(np.mean(free))
    assert np.isnan(table.loc["zero", "asr"])
    assert not study.is_single_round(found)


def test_the_rows_of_a_single_round(tmp_path):
    schedule, attack = {"single_round": {"at": 1}}, {"trigger": {"size": 3}, "model_replacement": {}}
    base = Scenario(num_malicious=1, attack=attack, schedule=schedule, **SIZED)
    found = run_sweep(sweep(base, seed=[0, 1]), tmp_path / "runs", progress=False)
    assert study.is_single_round(found)
    table = study.replacement_rows(found)
    assert table["seed"].tolist() == [0, 1]
    assert set(table["round"]) == {1}
    assert table["asr"].equals(table["last_asr"])  # it is the last round


def test_the_command_writes_both_tables(tmp_path):
    every_round = {"trigger": {"size": 3}}
    single_round = {
        "attack": {"trigger": {"size": 3}, "model_replacement": {}},
        "schedule": {"single_round": {"at": 1}},
    }
    for name, settings in (("attacks", {"attack": every_round}), ("replacement", single_round)):
        scenarios = sweep(Scenario(num_malicious=1, **settings, **SIZED), seed=[0])
        run_sweep(scenarios, tmp_path / name, progress=False)
    study.main([str(tmp_path / "attacks"), str(tmp_path / "replacement"), "--out", str(tmp_path)])
    assert pd.read_csv(tmp_path / "attacks.csv")["attack"].tolist() == ["trigger"]
    assert pd.read_csv(tmp_path / "replacement.csv")["round"].tolist() == [1]
