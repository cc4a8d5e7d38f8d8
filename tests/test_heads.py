"""Heads beyond softmax: one logit, several labels, regressions, pixels, words: right, or said to be beyond reach."""

import time

import numpy as np
import pytest
import torch
from torch import nn

import gradlens
from gradlens import DETECTORS, STATISTICS, CannotSay, Round, UpdateLog
from gradlens.log.global_model import spec_of

torch.set_num_threads(1)
CLIENTS = 12
HEADS = {  # name -> shapes, outputs
    "one logit": ({"a.weight": (6, 8), "a.bias": (6,), "b.weight": (1, 6), "b.bias": (1,)}, 1),
    "one logit without bias": ({"a.weight": (6, 8), "a.bias": (6,), "b.weight": (1, 6)}, 1),
    "a mask": ({"a.weight": (8, 3, 3, 3), "a.bias": (8,), "outc.weight": (1, 8, 1, 1), "outc.bias": (1,)}, 1),
    "a mask by an upsampling": ({"a.weight": (8, 3, 3, 3), "up.weight": (8, 1, 2, 2), "up.bias": (1,)}, 1),
    "one logit in Keras": ({"d/kernel": (8, 6), "d/bias": (6,), "out/kernel": (6, 1), "out/bias": (1,)}, 1),
    "a regression of two": ({"a.weight": (6, 8), "a.bias": (6,), "b.weight": (2, 6), "b.bias": (2,)}, 2),
    "pixels of five classes": (
        {"a.weight": (8, 3, 3, 3), "a.bias": (8,), "outc.weight": (5, 8, 1, 1), "outc.bias": (5,)}, 5,
    ),
}  # fmt: skip


def log_of(shapes, clients=CLIENTS, rounds=2, change=lambda updates: None):
    """Honest clients of one distribution; `change` plants what is to be found."""
    rng = np.random.default_rng(0)
    state = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    spec, found = spec_of(state), []
    names = np.array([f"c{i}" for i in range(clients)])
    for index in range(rounds):
        updates = {n: rng.normal(size=(clients, *shape)).astype(np.float32) for n, shape in shapes.items()}
        change(updates)
        found.append(Round(index, names, np.ones(clients, int), updates, state, {}, spec.buffers))
    return UpdateLog(spec, found)


OF_LAST_LAYER = [n for n in STATISTICS if n.startswith("final_") or n in ("neup", "threshold_exceedings")]
SHARES = {"neup", "threshold_exceedings"}  # of one output the share is 1 whatever a client sends


@pytest.mark.parametrize("head", HEADS)
def test_statistics_have_a_row_of_numbers_for_each_client_or_say_why_not(head):
    shapes, outputs = HEADS[head]
    log = log_of(shapes)
    assert log.model.num_units(log.model.final_weight) == outputs
    for name in OF_LAST_LAYER:
        if (outputs == 1 and name in SHARES) or (log.model.final_bias is None and name.startswith("final_bias")):
            with pytest.raises(CannotSay):
                STATISTICS[name](log)
            continue
        table = STATISTICS[name](log)
        assert np.isfinite(table.to_numpy()).all()
        if name in ("final_rows", "final_bias"):
            assert table.shape == (CLIENTS, outputs)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("name", ["auror", "bilgin", "deepsight", "final_bias", "final_rows", "lfighter", "tolpegin"])
def test_detectors_of_the_final_layer_flag_a_minority_of_honest_clients_or_abstain(head, name):
    shapes, outputs = HEADS[head]
    verdict = DETECTORS[name]()(log_of(shapes))
    assert verdict.flags.mean() <= 0.5
    if name == "deepsight" and outputs == 1:
        assert verdict.abstained.endswith("has one output, whose share is always 1")
    if name in ("bilgin", "final_bias"):
        assert bool(verdict.abstained) == (head == "one logit without bias")


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("name", ["final_bias", "final_rows"])
def test_who_pushes_one_output_stands_out_whatever_the_head(head, name):
    shapes, outputs = HEADS[head]
    if name == "final_bias" and head == "one logit without bias":
        pytest.skip("it abstains")
    final = spec_of({n: np.zeros(s) for n, s in shapes.items()})

    def push(updates):
        axis = final.unit_axes[final.final_weight]
        np.moveaxis(updates[final.final_weight][7], axis, 0)[outputs - 1] += 30
        if final.final_bias:
            updates[final.final_bias][7, outputs - 1] += 30

    verdict = DETECTORS[name]()(log_of(shapes, change=push))
    assert verdict.clients[verdict.scores.argmax()] == "c7"
    assert verdict.flags[verdict.clients == "c7"].all()


@pytest.mark.parametrize("head", HEADS)
def test_labels_are_named_for_several_outputs_only_and_drift_for_all(head):
    shapes, outputs = HEADS[head]
    log = log_of(shapes)
    drift = gradlens.label_drift(log)
    assert drift.shape == (CLIENTS, outputs)
    if outputs == 1:
        assert "positive is label 1 of a binary task, or a larger answer of a regression" in drift.attrs["unit"]
        with pytest.raises(CannotSay, match="no labels to tell apart; label_drift tells in which direction"):
            gradlens.suspected_labels(log)
    else:
        assert gradlens.suspected_labels(log)["target"].between(0, outputs - 1).all()


def poisoned(head, loss, labels, outputs, shape=(40, 6)):
    """The updates of clients after one step down a loss; the last one has other labels."""
    torch.manual_seed(0)
    rows = []
    for client in range(8):
        module = head()
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.zero_()
        loss(module(torch.rand(shape)), labels(client)).backward()
        rows.append([-parameter.grad.numpy() for parameter in module.parameters()])
    updates = {f"head.{part}": np.stack([row[i] for row in rows]) for i, part in enumerate(["weight", "bias"])}
    state = {name: np.zeros_like(array[0]) for name, array in updates.items()}
    spec = spec_of(state)
    assert spec.num_units("head.weight") == outputs
    return UpdateLog(spec, [Round(0, np.array(list("abcdefgh")), np.ones(8, int), updates, state)])


def test_drift_has_the_sign_of_the_labels_that_one_logit_was_given():
    loss = nn.functional.binary_cross_entropy_with_logits
    log = poisoned(lambda: nn.Linear(6, 1), loss, lambda c: torch.full((40, 1), 1.0 if c == 7 else 0.5), 1)
    drift = gradlens.label_drift(log)["head.bias[0]"]
    np.testing.assert_allclose(drift["h"], 0.5, atol=1e-6)  # label 1 - the answer 1/2
    np.testing.assert_allclose(drift.drop("h"), 0, atol=1e-6)


def test_of_several_labels_the_one_that_was_switched_on_drifts():
    def switched_on(given, client):
        given[:, 2] = 1.0 if client == 7 else given[:, 2]
        return given

    def half(client):
        return switched_on(torch.full((40, 4), 0.5), client)

    def some(client):
        return switched_on((torch.rand(40, 4, generator=torch.Generator().manual_seed(client)) > 0.5).float(), client)

    loss = nn.functional.binary_cross_entropy_with_logits
    drift = gradlens.label_drift(poisoned(lambda: nn.Linear(6, 4), loss, half, 4))
    np.testing.assert_allclose(drift.loc["h", "head.bias[2]"], 0.5 / 4, atol=1e-6)  # the loss is a mean over labels
    np.testing.assert_allclose(drift.loc["h"].drop("head.bias[2]"), 0, atol=1e-6)
    log = poisoned(lambda: nn.Linear(6, 4), loss, some, 4)
    assert gradlens.suspected_labels(log).loc["h", "target"] == 2


def test_of_two_answers_of_a_regression_the_shifted_one_drifts_by_its_error():
    def labels(client):
        return torch.tensor([[0.0, 3.0 if client == 7 else 0.0]]).expand(40, 2)

    drift = gradlens.label_drift(poisoned(lambda: nn.Linear(6, 2), nn.functional.mse_loss, labels, 2))
    np.testing.assert_allclose(drift.loc["h"], [0, 3], atol=1e-6)  # 2 x the error, over two answers


def test_of_pixels_the_class_that_was_painted_drifts():
    """Each pixel of one client is labeled 1; the drift is the mean over pixels of label - prediction."""

    def labels(client):
        return torch.full((4, 5, 5), 1) if client == 7 else torch.arange(100).reshape(4, 5, 5) % 4

    log = poisoned(lambda: nn.Conv2d(3, 4, 1), nn.functional.cross_entropy, labels, 4, shape=(4, 3, 5, 5))
    drift = gradlens.label_drift(log)
    np.testing.assert_allclose(drift.loc["h"], [-0.25, 0.75, -0.25, -0.25], atol=1e-6)
    assert gradlens.suspected_labels(log).loc["h", "target"] == 1


# A vocabulary of fifty thousand words


WORDS = 50_000


@pytest.fixture(scope="module")
def words():
    """A head without a bias behind an embedding, as language models have it; the last client pushes one word."""

    def push(updates):
        updates["lm_head.weight"][5, 4_711] += 40

    return log_of({"embed.weight": (WORDS, 2), "lm_head.weight": (WORDS, 4)}, clients=6, rounds=1, change=push)


def test_a_vocabulary_without_a_bias_is_judged_by_its_rows(words):
    assert (words.model.final_weight, words.model.final_bias) == ("lm_head.weight", None)
    rows = STATISTICS["final_rows"](words)
    assert rows.shape == (6, WORDS)
    assert rows.loc["c5"].idxmax() == "lm_head.weight[4711]"
    drift = gradlens.label_drift(words)
    assert drift.loc["c5"].idxmax() == "lm_head.weight[4711]"
    assert drift.attrs["unit"].startswith("row sums of the final weight, for want of a final bias")
    assert gradlens.suspected_labels(words).loc["c5", "target"] == 4_711
    with pytest.raises(CannotSay, match="the model has no final bias"):
        STATISTICS["final_bias"](words)


def test_what_would_split_fifty_thousand_classes_one_by_one_abstains_unless_one_is_named(words):
    began = time.monotonic()
    verdict = DETECTORS["tolpegin"]()(words)
    assert verdict.abstained == "50,000 classes: at most 1,000 are split one by one; source_label names one"
    assert not verdict.flags.any()
    named = DETECTORS["tolpegin"](source_label=4_711)(words)
    assert not named.abstained
    assert named.clients[named.scores.argmax()] == "c5"
    assert time.monotonic() - began < 20


@pytest.mark.parametrize("name", ["auror", "deepsight", "lfighter", "freqfed", "panel"])
def test_a_vocabulary_takes_seconds(words, name):
    began = time.monotonic()
    verdict = DETECTORS[name]()(words)
    assert verdict.abstained or np.isfinite(verdict.scores).all()
    assert time.monotonic() - began < 20


def test_a_vocabulary_that_shares_its_matrix_has_no_known_head_unless_it_is_named():
    shapes = {"wte.weight": (500, 8), "mlp.weight": (32, 8), "proj.weight": (8, 32)}
    log = log_of(shapes)
    assert log.model.final_weight is None
    with pytest.raises(CannotSay):
        gradlens.label_drift(log)
    assert DETECTORS["final_rows"]()(log).abstained
    named = spec_of({name: np.zeros(shape) for name, shape in shapes.items()}, final_layer="wte")
    assert named.num_units("wte.weight") == 500
