"""pfl: a real simulation in this process, every user of it recorded."""

import numpy as np
import pytest

pytest.importorskip("pfl", reason="pfl is not installed: pip install 'gradlens-forensics[pfl]', on Python below 3.13")
pytest.importorskip("torch")

import torch
from digits import digits
from pfl.aggregate.simulate import SimulatedBackend
from pfl.aggregate.weighting import WeightByDatapoints
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.data.dataset import Dataset
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.sampling import get_user_sampler
from pfl.hyperparam import NNEvalHyperParams, NNTrainHyperParams
from pfl.metrics import Weighted
from pfl.model.pytorch import PyTorchModel

import gradlens
from gradlens import DETECTORS, InputError, Recorder
from gradlens.integrations.pfl import PflRecorder

USERS, ROUNDS = 8, 3


class Net(torch.nn.Module):
    """A dense layer with the loss that pfl asks a module for."""

    def __init__(self):
        super().__init__()
        self.out = torch.nn.Linear(64, 10)

    def forward(self, images):
        return self.out(images)

    def loss(self, images, labels, eval=False):
        return torch.nn.functional.cross_entropy(self(images), labels)

    def metrics(self, images, labels, eval=False):
        return {"loss": Weighted(0.0, 1.0)}


def user_data(user):
    """User 5 has turned its labels round, and users differ in how much they have."""
    images, labels = (torch.from_numpy(part)[user::USERS][: 40 + 10 * user] for part in digits())
    return Dataset((images, 9 - labels if user == 5 else labels), user_id=str(user))


def played(recording, before=(), after=(), sampler="minimize_reuse", users=range(USERS)):
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002 - where pfl draws from
    net = Net()
    FederatedAveraging().run(
        NNAlgorithmParams(
            central_num_iterations=ROUNDS, evaluation_frequency=10, train_cohort_size=USERS, val_cohort_size=0
        ),
        SimulatedBackend(
            training_data=FederatedDataset(user_data, get_user_sampler(sampler, list(users))),
            val_data=None,
            postprocessors=[*before, recording, *after],
        ),
        PyTorchModel(
            net,
            local_optimizer_create=torch.optim.SGD,
            central_optimizer=torch.optim.SGD(net.parameters(), lr=1.0),
        ),
        NNTrainHyperParams(local_learning_rate=0.1, local_num_epochs=2, local_batch_size=10),
        NNEvalHyperParams(local_batch_size=10),
        callbacks=[recording],
    )
    return {name: value.detach().numpy() for name, value in net.state_dict().items()}


@pytest.mark.parametrize("place", ["alone", "before the weights", "after the weights"])
def test_every_user_of_every_round_is_recorded(place, tmp_path):
    given = {
        "before the weights": {"after": [WeightByDatapoints()]},
        "after the weights": {"before": [WeightByDatapoints()]},
    }
    with Recorder(tmp_path / "run", sent="updates") as recorder:
        last = played(PflRecorder(recorder), **given.get(place, {}))
    run = gradlens.open(tmp_path / "run")
    assert run.verify().intact
    assert run.is_closed
    assert [sorted(round_.clients) for round_ in run.log] == [[str(user) for user in range(USERS)]] * ROUNDS
    after = [*[round_.global_model for round_ in run.log][1:], last]
    for round_, model in zip(run.log, after, strict=True):
        users = round_.clients.astype(int)
        assert round_.num_examples.tolist() == (40 + 10 * users).tolist()
        weights = np.ones(USERS) if place == "alone" else round_.num_examples
        for name, updates in round_.updates.items():  # what pfl made of them is what it would make of the record
            assert len(np.unique(updates.reshape(USERS, -1), axis=0)) == USERS  # and no view of one buffer
            expected = round_.global_model[name] + np.average(updates.astype(np.float64), axis=0, weights=weights)
            np.testing.assert_allclose(model[name], expected, atol=1e-6)
    verdict = run.log.verdict(DETECTORS["final_rows"]())
    assert verdict.clients[verdict.scores.argmax()] == "5"


def test_a_user_drawn_again_is_another_client(tmp_path):
    with Recorder(tmp_path / "run", sent="updates") as recorder:
        played(PflRecorder(recorder), users=range(3))
    run = gradlens.open(tmp_path / "run")
    for round_ in run.log:
        assert round_.refused == {}
        assert (
            sorted(round_.clients) == ["0", "0 (2)", "0 (3)", "1", "1 (2)", "1 (3)", "2", "2 (2)"] or len(round_) == 8
        )


def test_a_recorder_that_filters_has_nothing_to_filter_here():
    with pytest.raises(InputError, match='expected Recorder\\(path, sent="updates"\\)'):
        PflRecorder(Recorder(detector="krum", sent="updates"))
    with pytest.raises(InputError, match="sent="):
        PflRecorder(Recorder())


def test_users_need_an_id():
    recording = PflRecorder(Recorder(sent="updates"))
    context = type("Context", (), {"user_id": None})()
    with pytest.raises(InputError, match="every user needs an id"):
        recording.postprocess_one_user(stats=None, user_context=context)
