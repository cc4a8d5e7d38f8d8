"""The study of defenses: its committed table, its section of the results, and its rows of a small sweep."""

import numpy as np
import pandas as pd
import pytest

from gradlens.errors import InputError
from simulations import Scenario, run_sweep, sweep
from simulations.scenario import SCENARIOS, load_sweep
from simulations.studies import defenses as study


def test_the_section_is_made_of_the_committed_table():
    table = study.committed()
    text = study.section(table)
    assert text.startswith("## The defenses, measured")
    for name in table["defense"]:
        assert f"| `{name}` |" in text
    assert "nan" not in text


def test_every_defense_is_in_the_table():
    scenarios = load_sweep(SCENARIOS / "defenses.toml").scenarios
    kinds = {(study.defense_kind(each), study.defense_label(each)) for each in scenarios}
    table = study.committed()
    assert set(zip(table["kind"], table["defense"], strict=True)) == kinds
    assert {kind for kind, _ in kinds} == set(study.KINDS)
    assert len(table) == len({each.digest for each in scenarios if not each.is_control}) / table["seeds"].max()
    assert (table["seeds"] == 3).all()


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Mean, a rule and a calibrated filter against a boosted trigger and a boosted negative after two honest rounds."""
    trigger = {"trigger": {"target_label": 1, "size": 3, "row": 0, "column": 0}, "scaling": {"factor": 5.0}}
    attacks = [trigger, {"sign_flip": {"factor": 10.0}}]
    base = Scenario(
        num_clients=10,
        rounds=9,
        num_malicious=2,
        poison_rate=0.5,
        local_epochs=2,
        schedule={"from_round": {"first": 2}},
    )
    calibrated = base.replace(detector="layer_norms", filter={"clean_rounds": 2, "fpr": 0.1})
    scenarios = sweep(base, aggregator=["mean", "multi_krum"], attack=attacks, seed=[0, 1])
    return run_sweep([*scenarios, *sweep(calibrated, attack=attacks, seed=[0, 1])], tmp_path_factory.mktemp("defenses"))


def test_what_a_filter_leaves_out_is_counted_from_the_attack_on(small):
    table = study.defense_rows(small).set_index(["kind", "attack"])
    assert table.loc[study.NONE, "works"].all()
    assert table.loc[[study.NONE, study.RULE], ["dropped_malicious", "dropped_benign"]].isna().all(axis=None)
    filtered = table.loc[study.CALIBRATED]
    assert (filtered["dropped_malicious"] == 1).all()  # several times as long as everybody else's
    for name in small.settings.index[~small.settings["control"]]:
        run = small.run(name)
        if not run.scenario["detector"]:
            continue
        late = run.verdicts[run.verdicts["round"] >= 2]
        malicious = late["client"].isin(run.truth.loc[run.truth["compromised"], "client"])
        assert study.dropped_shares(run) == (1.0, pytest.approx(1 - late.loc[~malicious, "kept"].mean()))
        assert run.verdicts[run.verdicts["round"] < 2]["kept"].all()


def test_the_summary_says_who_stops_what(small):
    table = study.defense_rows(small)
    each = study.summary(table).set_index("kind")
    bare = table[(table["kind"] == study.NONE) & (table["attack"] == "scaling")].iloc[0]
    assert each.loc[study.NONE, "asr_worst"] == bare["asr"] > 0.5
    assert each.loc[study.CALIBRATED, "asr_worst"] < 0.2
    honest = table[table["kind"] == study.NONE]["control_accuracy"]
    np.testing.assert_allclose(each.loc[study.NONE, "honest"], honest.iloc[0])
    said = study.section(table)
    assert "| `layer_norms, fpr=0.1` | calibrated filter |" in said
    assert "`mean` | none | " in said


def test_without_the_mean_there_is_nothing_to_compare_with():
    table = pd.DataFrame(
        {"kind": ["rule"], "asr": [1.0], "control_asr": [0.0], "partition": "iid", "attack": "trigger"}
    )
    with pytest.raises(InputError, match="expected runs with the plain mean"):
        study.with_works(table)


def test_the_command_writes_the_table(small, tmp_path):
    study.main([str(small.path), "--out", str(tmp_path / "defenses.csv")])
    written = pd.read_csv(tmp_path / "defenses.csv", keep_default_na=False, na_values=["nan", ""])
    assert written["defense"].tolist() == study.defense_rows(small)["defense"].tolist()
