"""Runs: what is logged is what was trained and aggregated, to the bit, however often it was stopped on the way."""

import numpy as np
import pytest
import torch
from torch import nn

import gradlens
from gradlens.aggregators import AGGREGATORS, filtered, step
from gradlens.detectors import DETECTORS
from gradlens.errors import InputError
from gradlens.log import LogWriter
from gradlens.run import VERDICT_COLUMNS
from simulations import rounds
from simulations.assemble import assemble
from simulations.attacks import ATTACKS, build_part
from simulations.cohorts import cohorts, malicious_clients, participants
from simulations.randomness import Stream, address
from simulations.rounds import run
from simulations.scenario import Scenario
from simulations.tasks import build_model, load_task
from simulations.training import LocalSGD, one_thread, train_clients

PLAIN = Scenario(rounds=4)
ATTACKED = PLAIN.replace(
    attack={"trigger": {"size": 3}, "scaling": {"factor": 2.0}}, num_malicious=3, poison_rate=0.5, rounds=4
)
CASES = {
    "plain": PLAIN,
    "attacked": ATTACKED,
    "sampled": ATTACKED.replace(clients_per_round=7, samples_per_client=40, schedule={"from_round": {"first": 2}}),
    "filtered": ATTACKED.replace(detector="layer_norms", partition="dirichlet", momentum=0.9, local_epochs=2),
    "cnn, median": ATTACKED.replace(model="cnn", aggregator="median", server_learning_rate=0.5, rounds=2),
    "adapted": ATTACKED.replace(
        attack={"trigger": {"size": 3}, "constrain_and_scale": {"penalty": "cosine"}, "norm_bound": {}, "hiding": {}},
        server_momentum=0.5, missing_rate=0.3, engine="plain",
    ),
}  # fmt: skip


@pytest.fixture(scope="module", params=CASES, ids=list(CASES))
def finished(request, tmp_path_factory):
    """A scenario and the run of it."""
    scenario = CASES[request.param]
    return scenario, run(scenario, tmp_path_factory.mktemp("runs") / scenario.digest)


def evidence(found: gradlens.Run) -> dict[str, str]:
    """SHA-256 of everything that does not hold seconds."""
    return {name: digest for name, digest in found.manifest.named().items() if name != "run.json"}


def test_a_run_is_closed_intact_and_says_what_it_was(finished):
    scenario, found = finished
    assert found.is_closed
    assert found.verify().intact
    assert found.scenario == scenario.settings
    assert len(found.log) == scenario.rounds
    assert Scenario(**found.scenario) == scenario


def test_no_update_is_all_zero(finished):
    for round_ in finished[1].log:
        for name, update in round_.updates.items():
            assert (np.abs(update).reshape(len(round_), -1).max(axis=1) > 0).all(), name


def test_aggregating_the_logged_updates_gives_the_next_logged_global_model(finished):
    scenario, found = finished
    aggregate = AGGREGATORS[next(iter(scenario.aggregator))]()
    if scenario.detector:
        aggregate = filtered(aggregate, DETECTORS["layer_norms"]())
    before = None
    for prefix, after in zip(found.log.prefixes(), found.states(), strict=True):
        now, momentum = prefix[-1].global_model, scenario.server_momentum
        replayed = step(now, aggregate(prefix), scenario.server_learning_rate, momentum=momentum, before=before)
        before = now
        for name, array in after.items():
            np.testing.assert_array_equal(replayed[name], array)


def test_final_bias_updates_sum_to_zero_over_classes(finished):
    """Sum over classes of y - p, whatever the data and however the update was scaled."""
    for round_ in finished[1].log:
        assert np.abs(round_.updates["fc2.bias"].sum(axis=1)).max() < 3e-6


def test_the_same_scenario_gives_the_same_bits(finished, tmp_path):
    scenario, found = finished
    torch.manual_seed(99)  # whatever was drawn before
    again = run(scenario, tmp_path / "again")
    assert evidence(again) == evidence(found)


def test_the_truth_names_who_and_when(finished):
    scenario, found = finished
    malicious = {f"client-{number:02d}" for number in malicious_clients(scenario)}
    assert len(malicious) == scenario.num_malicious
    first = scenario.schedule.get("from_round", {}).get("first", 0)
    assert set(found.truth["client"][found.truth["compromised"]]) <= malicious
    for round_ in found.log:
        rows = found.truth[found.truth["round"] == round_.index]
        assert set(rows["client"]) == set(round_.clients)
        assert (rows["compromised"] == rows["client"].isin(malicious)).all()
        assert (rows["poisoned"] == (rows["compromised"] & (round_.index >= first))).all()


def test_metrics_are_there_after_every_round(finished):
    scenario, found = finished
    metrics = found.metrics
    assert metrics["round"].tolist() == list(range(scenario.rounds))
    assert metrics["main_accuracy"].between(0, 1).all()
    assert metrics["asr"].isna().all() if scenario.is_control else metrics["asr"].between(0, 1).all()
    assert (metrics["seconds"] >= metrics["train_seconds"]).all()
    assert (metrics["train_seconds"] > 0).all()
    assert (metrics["log_seconds"][1:] > 0).all()


def test_the_logged_metrics_are_those_of_the_logged_models(finished):
    scenario, found = finished
    task = load_task(scenario.task)
    model = build_model(task, scenario.model)
    for state, row in zip(found.states(), found.metrics.itertuples(), strict=True):
        model.load_state_dict({name: torch.tensor(array) for name, array in state.items()})
        with torch.no_grad():
            right = model(torch.tensor(task.x_test)).argmax(1).numpy() == task.y_test
            assert row.main_accuracy == pytest.approx(right.mean())
            if not scenario.is_control:
                stamped = task.x_test.copy()
                stamped[:, :, 2:5, 2:5] = 1
                hit = model(torch.tensor(stamped)).argmax(1).numpy() == 1
                assert row.asr == pytest.approx(hit[task.y_test != 1].mean())


def test_the_identity_of_the_final_bias_on_the_record(tmp_path):
    """Under plain SGD the logged update is learning rate x sum over steps of mean(y - p), seen during training."""
    scenario = PLAIN.replace(engine="plain")
    federation = assemble(scenario)
    found = run(scenario, tmp_path / "run")
    conflict = np.zeros(10)

    def observe(logits: torch.Tensor, labels: torch.Tensor) -> None:
        one_hot = nn.functional.one_hot(labels, 10)
        conflict[:] += (one_hot - torch.softmax(logits.double(), 1)).mean(0).numpy()

    for round_ in found.log:
        for client in range(20):
            conflict[:] = 0
            rng = address(PLAIN.seed, Stream.BATCHES, round_.index, client)
            with one_thread():
                again = train_clients(
                    federation.model,
                    round_.global_model,
                    [federation.honest[client]],
                    [rng],
                    LocalSGD(epochs=1, batch_size=16, learning_rate=0.1),
                    observe=observe,
                )
            for name, update in round_.updates.items():
                np.testing.assert_array_equal(again[name][0], update[client])
            np.testing.assert_allclose(round_.updates["fc2.bias"][client], 0.1 * conflict, rtol=0, atol=1e-6)


class Stop(Exception):  # noqa: N818 - stands for whatever ends a process
    pass


def stop_after(monkeypatch, method: str, calls: int) -> None:
    """Makes a method of the writer stop the process instead of answering its call number `calls`."""
    original, count = getattr(LogWriter, method), iter(range(1_000))

    def stopping(self, *arguments, **settings):
        if next(count) == calls:
            self.leave_open()  # as the end of the process would
            raise Stop
        return original(self, *arguments, **settings)

    monkeypatch.setattr(LogWriter, method, stopping)


@pytest.mark.parametrize("method, calls", [("commit", 0), ("commit", 2), ("add_truth", 0), ("close", 0)])  # noqa: PT006
def test_a_stopped_run_goes_on_to_the_same_bits(tmp_path, monkeypatch, method, calls):
    scenario = CASES["filtered"]
    whole = run(scenario, tmp_path / "whole")
    with monkeypatch.context() as patched:
        stop_after(patched, method, calls)
        with pytest.raises(Stop):
            run(scenario, tmp_path / "stopped")
    assert not gradlens.open(tmp_path / "stopped").is_closed
    resumed = run(scenario, tmp_path / "stopped")
    assert evidence(resumed) == evidence(whole)
    assert resumed.verify().intact
    assert resumed.truth.equals(whole.truth)


@pytest.mark.parametrize("left", [["run.json"], ["run.json", "globals/round-000000.arrow"], [".run.json.part"]])
def test_a_run_that_was_stopped_at_its_very_start_starts_afresh(tmp_path, left):
    whole = run(PLAIN, tmp_path / "whole")
    for folder in ("updates", "globals", "verdicts"):
        (tmp_path / "stopped" / folder).mkdir(parents=True)
    for name in left:
        (tmp_path / "stopped" / name).write_bytes(b"{")
    assert evidence(run(PLAIN, tmp_path / "stopped")) == evidence(whole)


def test_a_closed_run_is_returned_as_it_is(tmp_path, monkeypatch):
    first = run(PLAIN, tmp_path / "run")
    monkeypatch.setattr(rounds, "assemble", lambda scenario: pytest.fail("it trained again"))
    assert run(PLAIN, tmp_path / "run").head == first.head


def test_a_folder_that_holds_something_else_is_refused(tmp_path):
    run(PLAIN, tmp_path / "run")
    with pytest.raises(InputError, match=r"another scenario, which differs in learning_rate, seed$"):
        run(PLAIN.replace(seed=1, learning_rate=0.2), tmp_path / "run")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "important.txt").write_text("keep me")
    with pytest.raises(InputError, match="notes"):
        run(PLAIN, tmp_path / "notes")
    assert (tmp_path / "notes" / "important.txt").read_text() == "keep me"
    (tmp_path / "file").write_text("a,b")
    with pytest.raises(InputError, match="file"):
        run(PLAIN, tmp_path / "file")


def test_before_its_round_an_attack_changes_no_bit(tmp_path):
    late = ATTACKED.replace(schedule={"from_round": {"first": 2}})
    attacked, control = run(late, tmp_path / "attacked"), run(late.control, tmp_path / "control")
    for index in (0, 1):
        for name, update in control.log[index].updates.items():
            np.testing.assert_array_equal(attacked.log[index].updates[name], update)
    malicious = np.isin(np.arange(20), malicious_clients(late))
    for name, update in control.log[2].updates.items():
        differs = (attacked.log[2].updates[name] != update).reshape(20, -1).any(axis=1)
        np.testing.assert_array_equal(differs, malicious)


def test_malicious_clients_depend_on_seed_and_count_alone():
    base = ATTACKED.replace(num_malicious=4)
    drawn = malicious_clients(base)
    for changes in ({"learning_rate": 0.5}, {"attack": "label_flip"}, {"clients_per_round": 5}, {"rounds": 9}):
        np.testing.assert_array_equal(malicious_clients(base.replace(**changes)), drawn)
    draws = [set(malicious_clients(base.replace(num_malicious=count)).tolist()) for count in (1, 2, 4)]
    assert draws[0] < draws[1] < draws[2]
    counts = np.zeros(20)
    for seed in range(400):
        counts[malicious_clients(base.replace(seed=seed))] += 1
    assert counts.min() > 45  # 80 expected for each client, sigma 8
    assert counts.max() < 115


def test_participants_are_drawn_anew_in_every_round():
    scenario = ATTACKED.replace(clients_per_round=7)
    rounds = [tuple(participants(scenario, index)) for index in range(30)]
    assert {len(set(clients)) for clients in rounds} == {7}
    assert len(set(rounds)) == 30
    np.testing.assert_array_equal(participants(ATTACKED, 3), np.arange(20))


def test_a_live_filter_writes_what_it_decided(tmp_path):
    found = run(CASES["filtered"], tmp_path / "run")
    verdicts = found.verdicts
    assert list(verdicts.columns) == list(VERDICT_COLUMNS)
    assert len(verdicts) == 4 * 20
    assert (verdicts["kept"] == ~verdicts["flag"]).all()
    assert set(verdicts["detector"]) == {"layer_norms"}
    table = gradlens.detect(found, {"layer_norms": DETECTORS["layer_norms"]()})
    np.testing.assert_array_equal(table["score"], verdicts["score"])


def test_threads_are_restored(tmp_path, monkeypatch):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        run(PLAIN.replace(rounds=1), tmp_path / "run")
        assert torch.get_num_threads() == 2
        stop_after(monkeypatch, "commit", 0)
        with pytest.raises(Stop):
            run(PLAIN, tmp_path / "stopped")
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_attackers_train_as_the_others_where_they_do_not_attack(tmp_path):
    """Before an adapted attack begins nothing differs, and then only the attackers."""
    late = CASES["adapted"].replace(schedule={"from_round": {"first": 1}}, rounds=2)
    attacked, control = run(late, tmp_path / "attacked"), run(late.control, tmp_path / "control")
    malicious = np.isin(cohorts(late)[1].clients, malicious_clients(late))
    assert 0 < malicious.sum() < len(malicious)
    for name, update in control.log[1].updates.items():
        np.testing.assert_array_equal(attacked.log[0].updates[name], control.log[0].updates[name])
        differs = (attacked.log[1].updates[name] != update).reshape(len(malicious), -1).any(axis=1)
        np.testing.assert_array_equal(differs, malicious)


@pytest.mark.parametrize("name", [name for name in ATTACKS if build_part(name, {}).stage != "data"])
def test_no_update_called_poisoned_is_the_honest_one(tmp_path, name):
    """Two of the four attackers hold samples of the source class; what the others send may well be honest."""
    flip = {"label_flip": {"source_label": 7, "target_label": 1}}
    scenario = PLAIN.replace(
        attack=flip | {name: {"factor": 2.0} if name == "scaling" else {}}, rounds=2, num_malicious=4, seed=4,
        partition={"dirichlet": {"alpha": 0.1}}, poison_rate=1.0,
    )  # fmt: skip
    found = run(scenario, tmp_path / "run")
    federation = assemble(scenario)
    attackers = list(federation.chosen)
    assert sorted(map(bool, map(len, federation.chosen.values()))) == [False, False, True, True]
    alike = []
    for round_ in found.log:
        generators = [address(scenario.seed, Stream.BATCHES, round_.index, client) for client in attackers]
        honest = federation.engine(round_.global_model, [federation.honest[client] for client in attackers], generators)
        sent = {layer: update[attackers] for layer, update in round_.updates.items()}
        alike += np.all([(sent[k] == honest[k]).reshape(4, -1).all(axis=1) for k in honest], axis=0).tolist()
    truth = found.truth[found.truth["compromised"]]
    assert truth["client"].tolist() == [f"client-{number:02d}" for number in attackers] * 2
    assert truth["poisoned"].sum() >= 4
    assert not (truth["poisoned"].to_numpy() & alike).any()


def test_single_shot_model_replacement_lands_on_the_attackers_model(tmp_path):
    """With the others' updates at rest it is exact; near convergence nearly so: here the norm of what is left."""
    scenario = PLAIN.replace(
        attack={"trigger": {"size": 3}, "model_replacement": {}}, num_malicious=1, rounds=3, server_learning_rate=0.5,
        schedule={"single_round": {"at": 2}}, clients_per_round=5,
    )  # fmt: skip
    found, last = run(scenario, tmp_path / "run"), cohorts(scenario)[2]
    assert last.attacking.sum() == 1
    *_, before, after = found.states()
    sent = found.log[2].updates["fc2.weight"]
    trained = sent[last.attacking][0] * (0.5 / 5)
    others = 0.5 * sent[~last.attacking].sum(axis=0) / 5
    np.testing.assert_allclose(after["fc2.weight"], before["fc2.weight"] + trained + others, atol=1e-6)


def test_dropped_out_and_broken_clients(tmp_path):
    scenario = PLAIN.replace(missing_rate=0.3, nonfinite_rate=0.2, rounds=6, attack="trigger", num_malicious=4)
    found = run(scenario, tmp_path / "run")
    expected = cohorts(scenario)
    sizes = [len(round_) for round_ in found.log]
    assert 8 < np.mean(sizes) < 19
    assert len(set(sizes)) > 1
    for round_, cohort in zip(found.log, expected, strict=True):
        np.testing.assert_array_equal(round_.finite, ~cohort.broken)
        assert (found.truth["round"] == round_.index).sum() == len(round_)
    assert 0 < sum(cohort.broken.sum() for cohort in expected) < 40
    assert all(np.isfinite(array).all() for state in found.states() for array in state.values())
    everybody_but_one = PLAIN.replace(missing_rate=0.999, rounds=3)
    assert [len(each.clients) for each in cohorts(everybody_but_one)] == [1, 1, 1]


def test_momentum_of_the_server_is_the_last_change_again():
    now, before, update = {"w": np.float32([3.0])}, {"w": np.float32([1.0])}, {"w": np.float32([10.0])}
    assert step(now, update, 0.1, momentum=0.5, before=before)["w"] == pytest.approx(3 + 1 + 1)
    assert step(now, update, 0.1, momentum=0.5)["w"] == pytest.approx(4)
    assert step(now, update, 0.1, momentum=0.5, before=before, buffers=["w"])["w"] == pytest.approx(13)


def test_threads_change_no_bit(tmp_path):
    scenario = CASES["adapted"]
    assert evidence(run(scenario, tmp_path / "one")) == evidence(run(scenario, tmp_path / "three", workers=3))


def test_the_two_engines_give_one_run(tmp_path):
    """The same to rounding: float32, a few steps."""
    scenario = ATTACKED.replace(rounds=1, partition="dirichlet")
    plain, stacked = (run(scenario.replace(engine=name), tmp_path / name) for name in ("plain", "stacked"))
    assert evidence(plain) != evidence(stacked)
    for name, update in plain.log[0].updates.items():
        np.testing.assert_allclose(stacked.log[0].updates[name], update, rtol=0, atol=2e-6)


def test_fashion_mnist_runs_from_its_folder(tmp_path, data_root):
    folder = str(data_root / "fashion_mnist")
    scenario = PLAIN.replace(task=folder, model="cnn", num_clients=4, samples_per_client=128, rounds=3, local_epochs=2)
    found = run(scenario, tmp_path / "run")
    assert found.log.model.num_parameters == 56_970
    assert found.verify().intact
    assert found.metrics["main_accuracy"].iloc[-1] > 0.3
