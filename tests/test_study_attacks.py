"""The README's section on the attacks is what the script renders from the committed tables."""

import importlib.util

import numpy as np
import pandas as pd
import pytest

from conftest import ROOT
from simulations import ATTACKS, Scenario, run_sweep, sweep
from simulations.scenario import SCENARIOS, load_sweep

SENDING = {
    "sign_flip", "gaussian", "zero", "a_little_is_enough", "inner_product", "min_max", "min_sum", "mimic",
}  # fmt: skip
SIZED = {"num_clients": 6, "rounds": 2, "samples_per_client": 20}


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("attack_table", ROOT / "reports" / "attack_table.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def attacks(script) -> pd.DataFrame:
    return script.committed()[0]


@pytest.fixture(scope="module")
def replacement(script) -> pd.DataFrame:
    return script.committed()[1]


def test_the_readme_shows_the_committed_tables(script):
    readme = script.README.read_text()
    assert readme.count(script.BEGIN) == readme.count(script.END) == 1
    shown = readme.split(script.BEGIN)[1].split(script.END)[0].strip("\n")
    assert shown == script.section(*script.committed())
    assert script.with_section(readme, script.section(*script.committed())) == readme


def test_every_attack_has_a_row(attacks):
    assert set(attacks["attack"]) == set(ATTACKS)


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
    names = ("attacks.toml", "attacks_data.toml")
    scenarios = [each for name in names for each in load_sweep(SCENARIOS / name).scenarios if not each.is_control]
    committed = {(each.label("attack"), each.task, each.label("partition")) for each in scenarios}
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
def test_which_part_a_row_is_about(script, attack, shown):
    assert script.shown(dict.fromkeys(attack)) == shown


def test_the_rows_of_a_sweep(script, tmp_path):
    base = Scenario(num_malicious=2, **SIZED)
    flip = {"label_flip": {"source_label": 7, "target_label": 5}, "scaling": {"factor": 9.0}}
    found = run_sweep(sweep(base, attack=[flip, {"zero": {}}], seed=[0, 1]), tmp_path / "runs", progress=False)
    table = script.attack_rows(found).set_index("attack")
    assert table.index.tolist() == ["label_flip", "zero"]
    attacked = [each for each in found.runs if "label_flip" in each.scenario["attack"]]
    finals = [each.metrics["asr"].iloc[-1] for each in attacked]
    assert table.loc["label_flip", "asr"] == pytest.approx(np.mean(finals))
    assert table.loc["label_flip", "held_out"] == 36  # sevens of the test set
    free = [found.control_of(each.name).metrics["main_accuracy"].iloc[-1] for each in attacked]
    assert table.loc["label_flip", "control_accuracy"] == pytest.approx(np.mean(free))
    assert np.isnan(table.loc["zero", "asr"])
    assert not script.is_single_round(found)


def test_the_rows_of_a_single_round(script, tmp_path):
    schedule, attack = {"single_round": {"at": 1}}, {"trigger": {"size": 3}, "model_replacement": {}}
    base = Scenario(num_malicious=1, attack=attack, schedule=schedule, **SIZED)
    found = run_sweep(sweep(base, seed=[0, 1]), tmp_path / "runs", progress=False)
    assert script.is_single_round(found)
    table = script.replacement_rows(found)
    assert table["seed"].tolist() == [0, 1]
    assert set(table["round"]) == {1}
    assert table["asr"].equals(table["last_asr"])  # it is the last round
