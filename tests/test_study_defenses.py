"""The README's section on the defences is what the script renders from the committed table."""

import sys

import numpy as np
import pandas as pd
import pytest

from conftest import ROOT
from simulations import Scenario, run_sweep, sweep
from simulations.scenario import SCENARIOS, load_sweep


@pytest.fixture(scope="module")
def script():
    sys.path.append(str(ROOT / "reports"))
    import defence_table

    yield defence_table
    sys.path.remove(str(ROOT / "reports"))


def test_the_readme_shows_the_committed_table(script):
    readme = script.README.read_text()
    assert readme.count(script.BEGIN) == readme.count(script.END) == 1
    shown = readme.split(script.BEGIN)[1].split(script.END)[0].strip("\n")
    assert shown == script.section(script.committed())


def test_every_defence_is_in_the_table(script):
    scenarios = load_sweep(SCENARIOS / "defences.toml").scenarios
    kinds = {(script._kind(each), script.named(each)) for each in scenarios}
    table = script.committed()
    assert set(zip(table["kind"], table["defence"], strict=True)) == kinds
    assert {kind for kind, _ in kinds} == set(script.KINDS)
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
    calibrated = base.replace(detector="layer_norms", filter={"clean_rounds": 2, "fpr": 0.05})
    scenarios = sweep(base, aggregator=["mean", "multi_krum"], attack=attacks, seed=[0, 1])
    return run_sweep([*scenarios, *sweep(calibrated, attack=attacks, seed=[0, 1])], tmp_path_factory.mktemp("defences"))


def test_what_a_filter_leaves_out_is_counted_from_the_attack_on(script, small):
    table = script.rows(small).set_index(["kind", "attack"])
    assert table.loc[script.NONE, "works"].all()
    assert table.loc[[script.NONE, script.RULE], ["dropped_malicious", "dropped_benign"]].isna().all(axis=None)
    filtered = table.loc[script.CALIBRATED]
    assert (filtered["dropped_malicious"] == 1).all()  # several times as long as everybody else's
    for name in small.settings.index[~small.settings["control"]]:
        run = small.run(name)
        if not run.scenario["detector"]:
            continue
        late = run.verdicts[run.verdicts["round"] >= 2]
        malicious = late["client"].isin(run.truth.loc[run.truth["compromised"], "client"])
        assert script._dropped(run) == (1.0, pytest.approx(1 - late.loc[~malicious, "kept"].mean()))
        assert run.verdicts[run.verdicts["round"] < 2]["kept"].all()


def test_the_summary_says_who_stops_what(script, small):
    table = script.rows(small)
    each = script.summary(table).set_index("kind")
    bare = table[(table["kind"] == script.NONE) & (table["attack"] == "scaling")].iloc[0]
    assert each.loc[script.NONE, "asr_worst"] == bare["asr"] > 0.5
    assert each.loc[script.CALIBRATED, "asr_worst"] < 0.2
    honest = table[table["kind"] == script.NONE]["control_accuracy"]
    np.testing.assert_allclose(each.loc[script.NONE, "honest"], honest.iloc[0])
    said = script.section(table)
    assert "| `layer_norms, fpr=0.05` | calibrated filter |" in said
    assert "`mean` | none | " in said


def test_without_the_mean_there_is_nothing_to_compare_with(script):
    table = pd.DataFrame(
        {"kind": ["rule"], "asr": [1.0], "control_asr": [0.0], "partition": "iid", "attack": "trigger"}
    )
    with pytest.raises(script.InputError, match="the sweep needs the plain mean"):
        script._working(table)
