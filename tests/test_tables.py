"""Tasks of tables, and models that answer two classes by one logit."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.datasets import load_breast_cancer
from torch import nn

import gradlens
from gradlens.errors import InputError
from simulations import Scenario
from simulations import run as simulate
from simulations.attacks import ATTACKS
from simulations.tasks import build_model, cross_entropy, load_task
from simulations.training.networks import predict


@pytest.fixture(scope="module")
def tumors():
    return load_task("breast_cancer")


def test_the_rows_are_those_of_scikit_learn_standardized_by_the_training_rows(tumors):
    data, target = load_breast_cancer(return_X_y=True)
    assert (tumors.x_train.shape, tumors.x_test.shape, tumors.num_classes) == ((455, 30), (114, 30), 2)
    np.testing.assert_allclose(tumors.x_train.mean(axis=0), 0, atol=1e-6)
    np.testing.assert_allclose(tumors.x_train.std(axis=0), 1, rtol=1e-5)
    assert sum(tumors.y_train) + sum(tumors.y_test) == (target == 0).sum()  # malignant
    largest = np.concatenate([tumors.x_train, tumors.x_test])[:, 0].argmax()
    assert np.concatenate([tumors.y_train, tumors.y_test])[largest] == 1 - target[data[:, 0].argmax()]


def test_every_row_has_one_of_twelve_sites(tumors):
    sites = set(tumors.owners_train)
    assert len(sites) == 12
    assert set(tumors.owners_test) <= sites


def test_one_logit_is_trained_as_two_of_which_the_first_is_zero():
    torch.manual_seed(0)
    logit, labels = torch.randn(20, 1, dtype=torch.float64), torch.randint(2, (20,))
    both = torch.cat([torch.zeros_like(logit), logit], dim=1)
    torch.testing.assert_close(cross_entropy(logit, labels), cross_entropy(both, labels))
    assert np.array_equal(predict(nn.Identity(), logit), predict(nn.Identity(), both))


def test_its_own_model_answers_by_one_logit(tumors):
    assert build_model(tumors, "own")(torch.tensor(tumors.x_test[:3])).shape == (3, 1)
    with pytest.raises(InputError, match="model cnn: expected images, task breast_cancer is arrays of 1 axes"):
        build_model(tumors, "cnn")


def test_a_feature_trigger_sets_its_features_and_no_others(tumors):
    attack = ATTACKS["feature_trigger"](feature=3, count=2, value=-7.5)
    stamped = attack.stamp(tumors, tumors.x_test, None)
    expected = tumors.x_test.copy()
    expected[:, [3, 4]] = -7.5
    np.testing.assert_array_equal(stamped, expected)
    assert not np.shares_memory(stamped, tumors.x_test)
    with pytest.raises(InputError, match="expected rows of at least 31 features, task breast_cancer has samples of"):
        ATTACKS["feature_trigger"](feature=30).stamp(tumors, tumors.x_test, None)
    with pytest.raises(InputError, match="expected rows of at least 1 features, task digits"):
        ATTACKS["feature_trigger"]().stamp(load_task("digits"), load_task("digits").x_test, None)


@pytest.mark.parametrize("engine", ["plain", "stacked"])
def test_a_backdoor_by_a_feature_works_on_one_logit_and_its_control_has_none(tmp_path, engine):
    settings = {"task": "breast_cancer", "model": "own", "num_clients": 8, "rounds": 12, "learning_rate": 0.2,
                "engine": engine}  # fmt: skip
    attacked = simulate(Scenario(**settings, attack="feature_trigger", num_malicious=2), tmp_path / "attacked")
    control = simulate(Scenario(**settings), tmp_path / "control")
    for run in (attacked, control):
        assert run.metrics["main_accuracy"].iloc[-1] > 0.85
        assert (run.model.final_bias, run.model.num_units("fc2.weight")) == ("fc2.bias", 1)
    assert attacked.metrics["asr"].iloc[-1] > 0.9
    drift = gradlens.label_drift(attacked.log)  # towards label 1
    malicious = attacked.truth.query("poisoned")["client"].unique()
    assert drift.loc[malicious].to_numpy().min() > drift.drop(malicious).to_numpy().max()


def test_sites_are_the_clients_of_a_partition_by_writer(tmp_path, tumors):
    run = simulate(Scenario(task="breast_cancer", model="own", num_clients=6, rounds=2, partition="writer"), tmp_path)
    assert len(run.log[0]) == 6


def test_a_task_of_ones_own_may_answer_by_one_logit_where_it_has_two_classes(tumors):
    from simulations.assemble import _check_answers

    task = replace(tumors, model=lambda: nn.Linear(30, 1))
    _check_answers(task.model(), task)
    with pytest.raises(InputError, match=r"must answer float32 \[sample, class\], .* found float32 \[2, 1\]"):
        _check_answers(task.model(), replace(task, label_names=("a", "b", "c")))
