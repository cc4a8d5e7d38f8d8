"""Scenarios: what is written out, what is refused, which settings make another run."""

import hashlib
import pickle
import tomllib

import numpy as np
import pytest

from gradlens.aggregators import AGGREGATORS, filtered
from gradlens.detectors import DETECTORS, calibrate
from gradlens.errors import InputError
from simulations.components import live_filter
from simulations.scenario import SCENARIOS, Scenario, load_sweep, sweep, varied

ATTACKED = {"attack": {"trigger": {"size": 3}}, "num_malicious": 4, "poison_rate": 0.3}


def test_every_setting_of_a_component_is_written_out():
    scenario = Scenario(partition="dirichlet", attack={"scaling": {"factor": 3}, "trigger": {}}, num_malicious=1)
    assert scenario.partition == {"dirichlet": {"alpha": 0.5, "minimum": 10}}
    assert scenario.attack == {
        "trigger": {"target_label": 1, "size": 4, "row": 2, "column": 2, "value": 1.0},
        "scaling": {"factor": 3.0},
    }
    assert list(scenario.attack) == ["trigger", "scaling"]  # in the order they are applied
    assert scenario.detector == {}
    assert scenario.schedule == {"every_round": {}}


def test_equal_scenarios_have_equal_digests_however_they_are_spelled():
    spelled = [
        Scenario(**ATTACKED, partition="iid"),
        Scenario(**ATTACKED, partition={"iid": {}}, detector="none", clients_per_round=20),
        Scenario(**ATTACKED | {"attack": {"trigger": {"value": 1, "size": 3}}}, learning_rate=np.float64(0.1)),
    ]
    assert len({scenario.digest for scenario in spelled}) == 1
    assert len(set(spelled)) == 1
    assert len(spelled[0].digest) == 12
    assert int(spelled[0].digest, 16) >= 0


def test_digests_stay_what_they_were():
    """They name the folders of runs that exist: taken from the release before a filter had settings."""
    assert Scenario().digest == "4b22759ed4fc"
    assert Scenario(detector="flame", aggregator="krum").digest == "7ea9c802ca3e"
    assert Scenario(detector="flame", aggregator="krum", filter={"action": "drop"}).digest == "7ea9c802ca3e"
    known = {"demo": "c61b325e5411", "first_look": "2dcddfeb497b", "replacement": "1cc5c67ac438"}
    for name, digest in known.items():
        digests = [each.digest for each in load_sweep(SCENARIOS / f"{name}.toml").scenarios]
        assert hashlib.sha256(",".join(digests).encode()).hexdigest()[:12] == digest


def test_the_filter_is_written_out_where_it_is_not_the_usual_one():
    usual = Scenario(detector="flame", filter={"action": "drop", "out_for": 0})
    assert usual.filter == {}
    assert "filter" not in usual.settings
    assert usual.label("filter") == "drop"
    other = Scenario(detector="flame", filter={"out_for": "until_cleared", "cleared": ["b", "a", "b"]})
    assert other.settings["filter"] == {
        "action": "drop", "out_for": None, "when_all_flagged": "keep_model", "when_abstained": "use_all",
        "cleared": ["a", "b"],
    }  # fmt: skip
    assert other.label("filter") == "out_for=None, cleared=['a', 'b']"
    assert Scenario(**other.settings) == other
    assert other.digest != usual.digest
    assert pickle.loads(pickle.dumps(other)) == other  # noqa: S301 - our own bytes
    assert other.control == other  # the defence stays
    axes = [{"action": "clip"}, {}]
    cells = sweep(Scenario(**ATTACKED, detector="flame"), filter=axes)
    assert [cell.label("filter") for cell in cells] == ["action=clip", "action=clip", "drop", "drop"]
    assert varied(cells)[-1] == "filter"


def test_a_filter_that_is_calibrated_on_first_rounds():
    found = Scenario(detector="flame", filter={"clean_rounds": 10, "fpr": 0.01})
    assert found.label("filter") == "clean_rounds=10, fpr=0.01"
    assert Scenario(**found.settings) == found
    assert Scenario(detector="flame", filter={"fpr": 0.01}) == Scenario(detector="flame")  # of no null
    rule = live_filter(AGGREGATORS["median"](), {"krum": {}}, {"clean_rounds": 10, "fpr": 0.01, "action": "clip"})
    expected = calibrate(DETECTORS["krum"](), null=10, fpr=0.01)
    assert rule == filtered(AGGREGATORS["median"](), expected, action="clip")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"filter": {"clean_rounds": -1}, "detector": "flame"}, "filter: clean_rounds must be a whole number of"),
        ({"filter": {"clean_rounds": True}, "detector": "flame"}, "filter: clean_rounds must be a whole number"),
        ({"filter": {"clean_rounds": 3, "fpr": 1}, "detector": "flame"}, "filter: fpr must be a rate above 0"),
        ({"filter": {"action": "clip"}}, "filter: its settings need a detector, found none"),
        ({"filter": {"action": "drop"}}, "filter: its settings need a detector, found none"),
        ({"filter": {"actoin": "clip"}, "detector": "flame"}, "'actoin' is no setting; did you mean action?"),
        ({"filter": {"action": "clap"}, "detector": "flame"}, "action is one of drop, down_weight, clip, record"),
        ({"filter": {"out_for": -2}, "detector": "flame"}, "out_for is a number of rounds, or None until cleared"),
        ({"filter": {"cleared": "a"}, "detector": "flame"}, "cleared must be a list of clients' names"),
        ({"filter": "clip", "detector": "flame"}, "filter: expected a table of its settings"),
        ({"aggregator": {"weak_dp": {"std": -1.0}}}, "weak_dp: std is a number of at least 0"),
        ({"aggregator": {"bucketing": {"rule": "means"}}}, "bucketing: rule is an aggregator or one of mean"),
    ],
)
def test_wrong_settings_of_the_server_are_one_line(settings, said):
    with pytest.raises(InputError) as refused:
        Scenario(**settings)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


def test_settings_and_pickle_bring_a_scenario_back():
    scenario = Scenario(**ATTACKED)
    assert scenario.digest == Scenario(**scenario.settings).digest
    assert scenario.digest != scenario.replace(seed=1).digest
    assert pickle.loads(pickle.dumps(scenario)) == scenario  # noqa: S301 - our own bytes, as a process pool moves them


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"num_malicious": 4},  # nobody attacks: no attack
        {"attack": "trigger"},  # nobody attacks: no attackers
        {"attack": {"label_flip": {"source_label": 3}}, "poison_rate": 0.5, "schedule": {"from_round": {"first": 3}}},
        {"attack": "trigger", "num_malicious": 4, "poison_rate": 0.0},
        {"attack": "scaling", "num_malicious": 4},  # by its default factor of 1
    ],
)
def test_an_attack_that_does_nothing_is_the_control(settings):
    scenario = Scenario(**settings)
    assert scenario == Scenario()
    assert scenario.is_control
    assert scenario.control == scenario


def test_a_control_keeps_everything_but_the_attack():
    attacked = Scenario(**ATTACKED, schedule={"from_round": {"first": 7}}, detector="final_bias", seed=5)
    assert not attacked.is_control
    assert attacked.control == Scenario(detector="final_bias", seed=5)
    assert attacked.replace(poison_rate=0.9).control == attacked.control


def test_an_attack_that_poisons_nothing_has_no_poison_rate():
    boosted = Scenario(attack={"scaling": {"factor": 3}}, num_malicious=2, poison_rate=0.25)
    assert boosted == boosted.replace(poison_rate=0.5)
    assert not boosted.is_control


def test_replace_remembers_what_was_given():
    base = Scenario(num_malicious=4, poison_rate=0.3)  # without an attack both fell back
    assert base.is_control
    assert base.replace(attack={"trigger": {"size": 3}}) == Scenario(**ATTACKED)


def test_labels_are_short():
    scenario = Scenario(
        attack={"trigger": {}, "scaling": {"factor": 3}}, num_malicious=2, partition={"dirichlet": {"alpha": 0.1}}
    )
    assert scenario.label("attack") == "trigger+scaling(factor=3)"
    assert scenario.label("partition") == "dirichlet(alpha=0.1)"
    assert scenario.label("detector") == "none"
    assert scenario.label("clients_per_round") == "all"
    assert scenario.label("learning_rate") == 0.1
    with pytest.raises(InputError, match="'lerning_rate' is no setting"):
        scenario.label("lerning_rate")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"lr": 0.1}, "'lr' is no setting; expected one of task, model"),
        ({"learning_rate": -0.1}, "learning_rate: input should be greater than 0, found -0.1"),
        ({"learning_rate": float("nan")}, "learning_rate: input should be a finite number, found nan"),
        ({"poison_rate": 1.5}, "poison_rate"),
        ({"rounds": 0}, "rounds"),
        ({"rounds": "3"}, "rounds: input should be a valid integer, found '3'"),
        ({"momentum": 1.0}, "momentum"),
        ({"seed": -1}, "seed"),
        ({"task": ""}, "task"),
        ({"model": "vgg"}, "model: there is no 'vgg'; `gradlens list models` shows all"),
        ({"model": "resnet"}, "model: there is no 'resnet'; did you mean resnet18?"),
        ({"num_malicious": 21}, "num_malicious: expected at most num_clients = 20, found 21"),
        ({"clients_per_round": 21}, "clients_per_round: expected at most num_clients = 20, found 21"),
        ({"attack": "triger"}, "attack: there is no 'triger'; did you mean trigger or"),
        ({"attack": {"trigger": {"sise": 3}}}, "attack: trigger: 'sise' is no setting; did you mean size?"),
        ({"attack": {"trigger": {"depth": 3}}}, "'depth' is no setting; expected one of target_label, size, row"),
        ({"attack": {"trigger": {"size": 0}}}, "trigger: size"),
        ({"attack": {"scaling": {"factor": float("inf")}}}, "scaling: factor: expected a finite number, found inf"),
        ({"attack": {"trigger": {"size": "3"}}}, "trigger: size: expected int, found '3'"),
        ({"attack": {"label_flip": {"target_label": 7}}}, "source and target label must differ, both are 7"),
        ({"attack": {"trigger": {}, "label_flip": {}}}, "must agree on the target label, found [1, 5]"),
        ({"attack": ["trigger"]}, "attack: expected a name or a table name -> settings, found ['trigger']"),
        ({"partition": {"dirichlet": {"alpha": 0.0}}}, "partition: dirichlet: alpha"),
        ({"partition": {"iid": {}, "dirichlet": {}}}, "partition: expected exactly one, found iid, dirichlet"),
        ({"partition": None}, "partition: expected a name"),
        ({"schedule": {"every_round": {"first": 1}}}, "every_round: 'first' is no setting; there are none"),
        (ATTACKED | {"schedule": {"from_round": {"first": 25}}}, "from_round(first=25) never comes in 25 rounds"),
        (ATTACKED | {"schedule": {"single_round": {"at": 30}}}, "single_round(at=30) never comes in 25 rounds"),
        (
            {"attack": {"model_replacement": {}}, "server_learning_rate": 0.0},
            "server_learning_rate: input should be",
        ),
        ({"server_momentum": 1.0}, "server_momentum: input should be less than 1"),
        ({"missing_rate": 1.0}, "missing_rate: input should be less than 1"),
        ({"nonfinite_rate": -0.1}, "nonfinite_rate: input should be greater than or equal to 0"),
        ({"engine": "fast"}, "engine: input should be 'auto', 'plain' or 'stacked', found 'fast'"),
        ({"device": "tpu"}, "device: input should be 'auto', 'cpu' or 'cuda', found 'tpu'"),
        ({"aggregator": "avarage"}, "aggregator: there is no 'avarage'; `gradlens list aggregators`"),
        ({"detector": "oracle"}, "detector: there is no 'oracle'; `gradlens list detectors` shows all"),
        ({"partition": "dirichelt"}, "partition: there is no 'dirichelt'; did you mean dirichlet?"),
        ({"rounds": 0, "seed": -1}, "(and 1 more)"),
    ],
)
def test_bad_settings_are_one_line(settings, said):
    with pytest.raises(InputError) as refused:
        Scenario(**settings)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)
    assert str(refused.value).startswith("scenario: ")


def test_a_scenario_is_frozen():
    with pytest.raises(ValueError, match="frozen"):
        Scenario().seed = 3


def test_a_sweep_is_the_product_with_its_controls_once():
    cells = sweep(Scenario(**ATTACKED), num_malicious=[0, 1, 2], learning_rate=[0.02, 0.1], seed=range(2))
    assert len(cells) == len(set(cells)) == 2 * 2 * 2 + 2 * 2
    assert sum(cell.is_control for cell in cells) == 4
    assert {cell.control for cell in cells} <= set(cells)
    assert [(c.num_malicious, c.learning_rate, c.seed) for c in cells[:5]] == [
        (0, 0.02, 0), (0, 0.02, 1), (0, 0.1, 0), (0, 0.1, 1), (1, 0.02, 0)
    ]  # fmt: skip
    assert varied(cells) == ["learning_rate", "attack", "num_malicious", "poison_rate", "seed"]


def test_a_sweep_without_a_cell_for_its_control_adds_it():
    assert sweep(Scenario(**ATTACKED)) == [Scenario(), Scenario(**ATTACKED)]


@pytest.mark.parametrize("axes", [{"lerning_rate": [0.1]}, {"seed": []}, {"attack": "trigger"}, {"seed": 3}])
def test_a_bad_axis_is_one_line(axes):
    with pytest.raises(InputError) as refused:
        sweep(Scenario(), **axes)
    assert next(iter(axes)) in str(refused.value)
    assert "\n" not in str(refused.value)


SWEEP = """
rounds = 14
num_malicious = 4
[[sweep]]
attack = ["trigger", { trigger = {}, scaling = { factor = 3 } }]
poison_rate = [0.3]
seed = [0, 1]
[[sweep]]
attack = ["label_flip"]
schedule = [{ from_round = { first = 7 } }]
seed = [0, 1]
"""


def test_the_tables_of_a_file_are_united(tmp_path):
    path = tmp_path / "sweep.toml"
    path.write_text(SWEEP)
    scenarios, axes = load_sweep(path)
    assert axes == ["attack", "poison_rate", "schedule", "seed"]
    assert len(scenarios) == 4 + 2 + 2
    assert [s.seed for s in scenarios if s.is_control] == [0, 1]
    flipped = [s for s in scenarios if s.label("attack") == "label_flip"]
    assert [s.label("schedule") for s in flipped] == ["from_round(first=7)"] * 2
    assert {s.num_malicious for s in flipped} == {4}


def test_a_change_replaces_a_setting_or_a_whole_axis(tmp_path):
    path = tmp_path / "sweep.toml"
    path.write_text(SWEEP)
    scenarios, axes = load_sweep(path, seed=3, rounds=9)
    assert len(scenarios) == 4
    assert {(s.seed, s.rounds) for s in scenarios} == {(3, 9)}
    assert "seed" not in axes


def test_a_file_of_one_scenario(tmp_path):
    path = tmp_path / "scenario.toml"
    path.write_text("rounds = 3\nnum_malicious = 2\n[attack.trigger]\nsize = 3\n")
    assert Scenario.load(path) == Scenario(rounds=3, num_malicious=2, attack={"trigger": {"size": 3}})
    assert load_sweep(path) == ([Scenario.load(path)], [])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("rounds = ", "expected a scenario in TOML"),
        ("round,client\n0,a\n", "expected a scenario in TOML"),
        ("learning_rate = -1", "learning_rate"),
        ("sweep = 3", "expected [[sweep]] tables"),
        ("[[sweep]]\nsed = [1]", "'sed' is no setting"),
        ("[[sweep]]\nseed = 1", "expected a list of values for seed, found 1"),
    ],
)
def test_a_bad_file_is_one_line_that_names_it(tmp_path, text, said):
    path = tmp_path / "bad.toml"
    path.write_text(text)
    with pytest.raises(InputError) as refused:
        load_sweep(path)
    assert said in str(refused.value)
    assert str(path) in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_missing_file_and_a_sweep_where_one_scenario_is_expected(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        Scenario.load(tmp_path / "none.toml")
    path = tmp_path / "sweep.toml"
    path.write_text(SWEEP)
    with pytest.raises(InputError, match="found a sweep"):
        Scenario.load(path)


@pytest.mark.parametrize("path", sorted(SCENARIOS.glob("*.toml")), ids=lambda path: path.stem)
def test_the_scenarios_that_come_with_it_load(path):
    scenarios, axes = load_sweep(path)
    assert len(scenarios) >= {"demo": 50, "first_look": 50}.get(path.stem, 2 if path.stem.endswith("_quick") else 6)
    assert {scenario.control for scenario in scenarios} <= set(scenarios)
    assert (axes[-1:] == ["seed"]) == (len({scenario.seed for scenario in scenarios}) > 1)


def test_the_demo_is_the_sweep_that_the_readme_promises():
    table = tomllib.loads((SCENARIOS / "demo.toml").read_text())
    axes, without, behind = table["sweep"]
    assert axes["num_malicious"] == [0, 1, 4]
    assert axes["learning_rate"] == [0.02, 0.1]
    assert axes["poison_rate"] == [0.25, 1.0]
    (clean,) = (settings["clean_rounds"] for settings in behind["filter"])
    assert [schedule["from_round"]["first"] for schedule in without["schedule"]] == [clean]  # nobody attacks before
    assert behind == without | {"detector": ["layer_norms"], "filter": behind["filter"]}
    assert len(load_sweep(SCENARIOS / "demo.toml").scenarios) == 63
