"""Small models, shards of samples, and what an engine learns from them: what the tests of the engines share."""

import numpy as np
import pytest
import torch
from torch import nn

from gradlens.errors import InputError
from simulations.attacks import ATTACKS, Reference, Training, build_attack
from simulations.tasks import cross_entropy
from simulations.training import LocalSGD, one_thread, state_of, torch_reference
from simulations.training.engine import PlainEngine
from simulations.training.plain import AS_EVERYBODY
from simulations.training.stacked import StackedEngine

SETTINGS = LocalSGD(epochs=2, batch_size=4, learning_rate=0.05, momentum=0.9, weight_decay=0.01)
RAGGED = (9, 3, 6)  # 6, 2 and 4 steps in two epochs of batches of 4, none without a smaller last batch
CLASSES = 5


@pytest.fixture(autouse=True)
def on_one_thread():
    """As a run trains; two threads are slower on so little."""
    with one_thread():
        yield


BOTH = pytest.mark.parametrize("engine", [PlainEngine, StackedEngine])


def data(sizes=RAGGED, shape=(6,), dtype=torch.float64, num_tokens: int | None = None, seed: int = 0):
    """Random samples of each client, and their labels."""
    generator = torch.Generator().manual_seed(seed)
    shards = []
    for size in sizes:
        if num_tokens is None:
            x = torch.randn((size, *shape), generator=generator, dtype=dtype)
        else:
            x = torch.randint(num_tokens, (size, *shape), generator=generator)
        shards.append((x, torch.randint(CLASSES, (size,), generator=generator)))
    return shards


def generators(count: int, round_: int = 0):
    return [np.random.default_rng([7, round_, client]) for client in range(count)]


def learned(
    engine, model, shards, settings=SETTINGS, training=AS_EVERYBODY, references=(), loss=cross_entropy, **options
):
    made = engine(model, loss, settings, shards[0][0], device="cpu", **options)
    return made(state_of(model), shards, generators(len(shards)), training=training, references=references)


def assert_agree(found, expected, within: float = 1e-9):
    """Within a share of each layer's largest update; counters are equal."""
    assert list(found) == list(expected)
    for name, update in expected.items():
        assert found[name].shape == update.shape
        assert found[name].dtype == update.dtype
        if np.issubdtype(update.dtype, np.integer):
            np.testing.assert_array_equal(found[name], update)
        else:
            np.testing.assert_allclose(found[name], update, rtol=0, atol=within * np.abs(update).max(), err_msg=name)


def assert_equal(found, expected):
    for name, update in expected.items():
        np.testing.assert_array_equal(found[name], update, err_msg=name)


def dense(*between: nn.Module, width: int = 7, seed: int = 0) -> nn.Module:
    """Two dense layers of float64 with other modules between them."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(6, width), *between, nn.ReLU(), nn.Linear(width, CLASSES)).double()


class Words(nn.Module):
    """The mean of embedded tokens, with dropout, then a dense layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.dropout = nn.Dropout(0.3)
        self.fc = nn.Linear(6, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.dropout(self.embedding(x)).mean(1))


def words() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Words().double()


def references(model: nn.Module, count: int, seed: int = 0) -> list[Reference]:
    """What the hooks of some clients may look at: a last change that is everybody's, an honest update of their own."""
    rng = np.random.default_rng(seed)

    def random() -> dict[str, torch.Tensor]:
        return {name: torch.tensor(rng.normal(size=each.shape) / 30) for name, each in model.named_parameters()}

    previous, final = random(), [name.rpartition(".")[0] for name, _ in model.named_parameters()][-1]
    return [torch_reference(previous, random(), f"{final}.weight", f"{final}.bias", model) for _ in range(count)]


PARTS = {
    "own_training": {"own_training": {"learning_rate": 0.02, "epochs": 3}},
    "own_rate": {"own_training": {"learning_rate": 0.02}},
    **{name: {name: {}} for name in ATTACKS if ATTACKS[name]().train},
    "norm_bound": {"norm_bound": {"bound": 0.05}},
    "cosine": {"constrain_and_scale": {"penalty": "cosine", "alpha": 0.3}},
    "final_bias": {"constrain_and_scale": {"penalty": "final_bias", "alpha": 0.7}},
    "penalty_alone": {"constrain_and_scale": {"alpha": 0.0, "penalty": "cosine"}},
    "tight_norm_bound": {"norm_bound": {"bound": 0.05, "every": 2}},
    "hiding_the_final_layer": {"hiding": {"how": "mean", "layers": "final"}},
    "neurotoxin_of_half": {"neurotoxin": {"ratio": 0.5}},
    "hidden_in_a_ball": {"hiding": {"how": "frozen"}, "norm_bound": {"bound": 0.1, "every": 3}},
    "all_at_once": {
        "own_training": {"learning_rate": 0.1, "epochs": 3},
        "constrain_and_scale": {"penalty": "cosine", "factor": 3.0},
        "norm_bound": {"bound": 0.2, "every": 2},
        "neurotoxin": {"ratio": 0.2},
        "hiding": {"how": "drawn"},
    },
}


def train_of(name: str) -> Training:
    train = build_attack(PARTS[name]).train
    assert train is not None
    return train


def norms(updates, parameters) -> np.ndarray:
    return np.sqrt(sum((updates[name].astype(np.float64) ** 2).reshape(3, -1).sum(1) for name in parameters))


def refusal(function, match: str) -> None:
    with pytest.raises(InputError, match=match) as found:
        function()
    assert "\n" not in str(found.value)


def unless_refused(function):
    """What a function gives; None where it refuses in one line."""
    try:
        return function()
    except InputError as error:
        text = str(error)
    assert "\n" not in text
    return None


def compiled_steps() -> dict:
    from simulations.training import compiled

    return compiled._STEPS


@pytest.fixture(autouse=True)
def nothing_compiled(monkeypatch):
    """Each test compiles for itself."""
    from simulations.training import compiled

    monkeypatch.setattr(compiled, "_STEPS", {})
