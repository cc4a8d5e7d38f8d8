"""Replay: the run itself by its own rule, other rules by hand, what a filter would have kept."""

import json

import numpy as np
import pandas as pd
import pytest

import gradlens
import planted
from gradlens import AGGREGATORS, DETECTORS, InputError, Recorder, calibrate, filtered, replay
from gradlens.log.writer import VERDICT_COLUMNS
from gradlens.replays import leaving_out
from simulations import Scenario, measure_of, run

ATTACKED = Scenario(
    num_clients=10, rounds=5, num_malicious=2, poison_rate=0.5, server_learning_rate=0.8, server_momentum=0.5,
    attack={"trigger": {"target_label": 1, "size": 3}, "scaling": {"factor": 5.0}},
    schedule={"from_round": {"first": 2}},
)  # fmt: skip


@pytest.fixture(scope="module")
def attacked(tmp_path_factory):
    return run(ATTACKED, tmp_path_factory.mktemp("replay") / "run")


def test_by_its_own_rule_the_run_comes_out_again(attacked):
    found = replay(attacked, AGGREGATORS["mean"](), measure=measure_of(ATTACKED))
    assert (found.rounds["distance"] == 0).all()
    np.testing.assert_array_equal(found.rounds["change"], found.rounds["recorded_change"])
    np.testing.assert_array_equal(found.rounds["asr"], found.rounds["recorded_asr"])
    np.testing.assert_array_equal(found.rounds["main_accuracy"], attacked.metrics["main_accuracy"])
    for layer, array in list(attacked.states())[-1].items():
        np.testing.assert_array_equal(found.state[layer], array)
    assert found.decisions.empty
    assert list(found.decisions.columns) == list(VERDICT_COLUMNS)


def test_a_filtered_run_comes_out_again_by_its_filter(tmp_path):
    live = run(ATTACKED.replace(detector="layer_norms"), tmp_path / "run")
    found = replay(live, filtered(AGGREGATORS["mean"](), DETECTORS["layer_norms"]()))
    assert (found.rounds["distance"] == 0).all()
    kept = live.verdicts.set_index(["round", "client"])["kept"]
    pd.testing.assert_series_equal(found.decisions.set_index(["round", "client"])["kept"], kept)


def test_another_rule_is_applied_to_what_was_sent(attacked):
    found = replay(attacked, AGGREGATORS["median"](), server_learning_rate=1.0, server_momentum=0.0)
    start = attacked.log[0].global_model
    for layer in attacked.model.parameters:
        moved = start[layer] + sum(np.median(round_.updates[layer], axis=0) for round_ in attacked.log)
        np.testing.assert_allclose(found.state[layer], moved, atol=1e-5)
    change = np.sqrt(sum(np.sum(np.median(attacked.log[0].updates[n], axis=0) ** 2) for n in attacked.model.parameters))
    assert found.rounds["change"][0] == pytest.approx(change, rel=1e-5)
    assert (found.rounds["distance"] > 0).all()


def test_a_filter_on_the_evidence_takes_the_backdoor_away(attacked):
    rule = filtered(AGGREGATORS["mean"](), calibrate(DETECTORS["layer_norms"](), null=2, fpr=0.1))
    found = replay(attacked, rule, measure=measure_of(ATTACKED))
    last = found.rounds.iloc[-1]
    assert last["recorded_asr"] > 0.8
    assert last["asr"] < 0.2
    assert found.rounds["left_out"].tolist()[:2] == [0, 0]
    malicious = set(attacked.truth.loc[attacked.truth["compromised"], "client"])
    late = found.decisions[found.decisions["round"] >= 2]
    assert malicious <= set(late.loc[~late["kept"], "client"])
    for client in malicious:
        assert f"{client} (3)" in str(found)


def test_what_was_recorded_elsewhere_is_replayed_at_rate_one(tmp_path):
    log = planted.clean_log(3)
    with Recorder(tmp_path / "run", sent="updates") as recorder:
        state = dict(planted.STATE)
        for round_ in log:
            rows = {c: {n: round_.updates[n][i] for n in round_.updates} for i, c in enumerate(round_.clients.tolist())}
            recorder.log_round(state, rows)
            state = {n: array + round_.updates[n].mean(axis=0).astype(array.dtype) for n, array in state.items()}
            recorder.commit(state)
    found = replay(gradlens.open(tmp_path / "run"), AGGREGATORS["mean"]())
    np.testing.assert_allclose(found.rounds["distance"], 0, atol=1e-5)


def test_sketches_cannot_be_aggregated(tmp_path):
    state = {"fc1.weight": np.ones((40, 40), np.float32), "fc2.weight": np.ones((2, 40), np.float32)}
    with Recorder(tmp_path / "run", evidence="sketch") as recorder:
        recorder.log_round(state, {f"c{i}": {n: a + i for n, a in state.items()} for i in range(4)})
        recorder.commit(state)
    with pytest.raises(InputError, match="nothing can be aggregated"):
        replay(gradlens.open(tmp_path / "run"), AGGREGATORS["mean"]())


def asked(monkeypatch, capsys, *words):
    from gradlens.cli import main

    monkeypatch.setattr("sys.argv", ["gradlens", "replay", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        main()
    return ended.value.code, capsys.readouterr()


def test_the_command_writes_the_table(attacked, monkeypatch, capsys):
    code, said = asked(
        monkeypatch, capsys, attacked.path, "-d", "layer_norms", "--clean-rounds", 2, "--fpr", 0.1, "--json"
    )
    assert code == 0
    rows = json.loads(said.out)
    assert [row["round"] for row in rows] == list(range(5))
    assert rows[-1]["asr"] < 0.2 < rows[-1]["recorded_asr"]
    code, said = asked(monkeypatch, capsys, attacked.path, "-a", "median")
    assert code == 0
    assert "the updates are as they were sent" in said.out


def test_attack_free_recordings_calibrate_the_filter(attacked, tmp_path, monkeypatch, capsys):
    for seed in (7, 8):
        run(ATTACKED.replace(seed=seed, num_malicious=0), tmp_path / "null" / str(seed))
    null = [gradlens.open(tmp_path / "null" / str(seed)) for seed in (7, 8)]
    rule = filtered(AGGREGATORS["mean"](), calibrate(DETECTORS["layer_norms"](), null, 0.05))
    expected = replay(attacked, rule).rounds["left_out"].tolist()
    words = (attacked.path, "-d", "layer_norms", "--null", tmp_path / "null", "--json")
    code, said = asked(monkeypatch, capsys, *words)
    assert code == 0
    assert [row["left_out"] for row in json.loads(said.out)] == expected
    code, said = asked(monkeypatch, capsys, *words, "--fpr", 0.01)
    assert (code, "needs 99 clients with a score, found 20" in said.err) == (2, True)
    code, said = asked(monkeypatch, capsys, *words, "--clean-rounds", 2)
    assert (code, "--null and --clean-rounds exclude each other" in said.err) == (2, True)
    code, said = asked(monkeypatch, capsys, attacked.path, "--null", tmp_path / "null")
    assert (code, "name one with --detector" in said.err) == (2, True)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("-d", "krumm"), "detector: there is no"),
        (("-a", "means"), "aggregator: there is no"),
        (("-d", "krum", "--action", "shoot"), "action is one of"),
        (("-d", "krum", "--clean-rounds", 2, "--fpr", 7), "fpr must be a rate"),
    ],
)
def test_wrong_words_are_one_line(attacked, monkeypatch, capsys, words, reason):
    code, said = asked(monkeypatch, capsys, attacked.path, *words)
    assert code == 2
    assert reason in said.err
    assert said.err.count("\n") == 1


def test_without_its_data_a_run_is_replayed_unmeasured(attacked, monkeypatch, capsys):
    import simulations

    def absent(scenario):
        raise InputError("task: expected digits, found none")

    monkeypatch.setattr(simulations, "measure_of", absent)
    code, said = asked(monkeypatch, capsys, attacked.path, "--csv")
    assert code == 0
    assert said.out.splitlines()[0] == "round,clients,left_out,change,recorded_change,distance"
    assert "accuracy and ASR are not measured: task: expected digits" in said.err


def test_named_clients_are_left_out_as_if_they_had_sent_nothing(attacked, monkeypatch, capsys):
    names = attacked.log[0].clients[[0, 3]].tolist()
    rule = leaving_out(AGGREGATORS["mean"](), names)
    found = replay(attacked, rule, server_learning_rate=1.0, server_momentum=0.0)
    start = attacked.log[0].global_model
    for layer in attacked.model.parameters:
        others = [round_.updates[layer][~np.isin(round_.clients, names)] for round_ in attacked.log]
        moved = start[layer] + sum(update.mean(axis=0) for update in others)
        np.testing.assert_allclose(found.state[layer], moved, atol=1e-5)
    code, said = asked(monkeypatch, capsys, attacked.path, "--without", names[0], "--without", "nobody", "--csv")
    assert code == 2
    assert "--without: the run has no client 'nobody'" in said.err
    code, said = asked(monkeypatch, capsys, attacked.path, "--without", names[0], "--csv")
    assert code == 0
    assert len(said.out.splitlines()) == 6
