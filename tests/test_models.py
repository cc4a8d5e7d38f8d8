"""Models: the layers and sizes they promise, their seed, and what they refuse."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call

from gradlens.errors import InputError
from gradlens.log import ModelSpec
from simulations.randomness import Stream, address
from simulations.tasks import MODELS, Task, build_model, cross_entropy, load_task
from simulations.tasks.transformer import Block

TEXT = ("lstm", "transformer")
IMAGES = [name for name in MODELS if name not in TEXT]


def images(*shape: int, classes: int = 10) -> Task:
    """Three random images of [channel, height, width] pixels."""
    x = np.random.default_rng(0).random((3, *shape), np.float32)
    y = np.arange(3) % classes
    return Task("pictures", x, y, x, y, tuple(map(str, range(classes))))


def tokens(num_tokens: int | None = None, classes: int = 7) -> Task:
    """Three random texts of six tokens."""
    x = np.random.default_rng(0).integers(num_tokens or classes, size=(3, 6))
    y = np.arange(3)
    return Task("letters", x, y, x, y, tuple(map(str, range(classes))), num_tokens=num_tokens)


def fitting(name: str) -> Task:
    return tokens() if name in TEXT else images(3, 16, 16)


def size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_its_seed_and_draws_from_nothing(name):
    task = fitting(name)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = build_model(task, name, 3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    second, other = build_model(task, name, 3), build_model(task, name, 4)
    for (layer, one), two, three in zip(first.named_parameters(), second.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two), layer
        drawn = len(torch.unique(one)) > 1  # all biases 0, all scales of a norm 1: not drawn
        assert drawn != torch.equal(one, three), layer


@pytest.mark.parametrize("name", MODELS)
def test_a_model_gives_a_logit_per_class_and_learns(name):
    task = fitting(name)
    model = build_model(task, name)
    x, y = torch.tensor(task.x_train), torch.tensor(task.y_train)
    losses = []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(4):
        outputs = model.eval()(x)
        assert outputs.shape == (3, task.num_classes)
        losses.append(cross_entropy(outputs, y).mean())
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert all(torch.count_nonzero(p.grad) for _, p in model.named_parameters())
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("name", MODELS)
def test_the_final_layer_is_found_by_its_place(name):
    task = fitting(name)
    model = build_model(task, name)
    spec = ModelSpec.of(
        {layer: value.numpy() for layer, value in model.state_dict().items()},
        buffers=[layer for layer, _ in model.named_buffers()],
    )
    last = [layer for layer, _ in model.named_children()][-1]
    assert (spec.final_weight, spec.final_bias) == (f"{last}.weight", f"{last}.bias")
    assert model.state_dict()[spec.final_weight].shape[0] == task.num_classes


@pytest.mark.parametrize(
    ("name", "task", "expected", "layers"),
    [
        ("mlp", images(1, 8, 8), 64 * 32 + 32 + 32 * 10 + 10, ["fc1", "fc2"]),
        ("cnn", images(1, 28, 28), 56_970, ["conv1", "conv2", "fc1", "fc2"]),
        ("bilgin_cnn", images(3, 32, 32), 1_060_138, ["conv1", "conv2", "fc1", "fc2"]),
        ("sun_cnn", images(1, 28, 28), 1_199_882, ["conv1", "conv2", "dropout1", "fc1", "dropout2", "fc2"]),
        ("wu_cnn", images(1, 28, 28), 20 * 26 + 50 * 501 + 128 * 801 + 10 * 129, ["conv1", "conv2", "fc1", "fc2"]),
        ("resnet18", images(3, 32, 32), 2_797_610, ["conv1", "norm1", *(f"stage{i}" for i in (1, 2, 3, 4)), "fc"]),
        ("lstm", tokens(80, 80), 80 * 8 + 4 * 256 * (8 + 256 + 2 + 512 + 2) + 80 * 257, ["embedding", "lstm", "fc"]),
        (
            "transformer",
            tokens(301, 300),
            307 * 64 + 2 * 33_408 + 128 + 300 * 65,
            ["embedding", "blocks", "norm", "fc"],
        ),
        ("lstm", tokens(301, 300), 301 * 200 + 4 * 200 * (400 + 2) * 2 + 300 * 201, ["embedding", "lstm", "fc"]),
    ],
)
def test_models_have_the_layers_and_sizes_they_promise(name, task, expected, layers):
    model = build_model(task, name)
    assert size(model) == expected
    assert [layer for layer, _ in model.named_children()] == layers
    if name not in TEXT:
        assert f"{expected:,}" in (type(model).__doc__ or "") or name == "mlp"


def test_the_first_two_models_are_drawn_layer_by_layer_as_torch_does_it():
    """So that runs of earlier versions can be made again to the bit."""

    def drawn(*layers):
        torch.manual_seed(int(address(3, Stream.MODEL).integers(2**63)))
        return [parameter for build in layers for parameter in build().parameters()]

    mlp = drawn(lambda: nn.Linear(64, 32), lambda: nn.Linear(32, 10))
    cnn = drawn(
        lambda: nn.Conv2d(1, 16, 3), lambda: nn.Conv2d(16, 32, 3, stride=2),
        lambda: nn.Linear(128, 64), lambda: nn.Linear(64, 10),
    )  # fmt: skip
    for name, expected in (("mlp", mlp), ("cnn", cnn)):
        found = list(build_model(images(1, 8, 8), name, 3).parameters())
        assert all(torch.equal(one, two) for one, two in zip(found, expected, strict=True)), name


def test_initial_weights_are_those_of_the_source():
    """He-uniform is U(-sqrt(6 / fan in), +), Glorot-uniform U(-sqrt(6 / (fan in + fan out)), +): Keras's defaults."""

    def limits(model: nn.Module) -> dict[str, float]:
        return {layer: value.abs().max().item() for layer, value in model.named_parameters()}

    bilgin = limits(build_model(images(3, 32, 32), "bilgin_cnn"))
    glorot = {"fc2.weight": (128 + 10) / 2}
    for layer, fan in {"conv1.weight": 27, "conv2.weight": 288, "fc1.weight": 8_192, **glorot}.items():
        assert bilgin[layer] == pytest.approx((6 / (2 * fan if layer in glorot else fan)) ** 0.5, rel=0.02)
    sun = limits(build_model(images(1, 28, 28), "sun_cnn"))
    for layer, fans in {"conv1.weight": 9 * 33, "conv2.weight": 9 * 96, "fc1.weight": 9_216 + 128}.items():
        assert sun[layer] == pytest.approx((6 / fans) ** 0.5, rel=0.02)
    assert all(model[layer] == 0 for model in (bilgin, sun) for layer in model if layer.endswith("bias"))


def test_dropout_is_there_in_training_only():
    model = build_model(images(1, 12, 12), "sun_cnn")
    x = torch.tensor(images(1, 12, 12).x_train)
    torch.manual_seed(0)
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))
    assert [module.p for module in model.modules() if isinstance(module, nn.Dropout)] == [0.25, 0.5]


def test_resnet18_works_on_given_parameters_and_leaves_its_own():
    task = images(3, 9, 12)
    model = build_model(task, "resnet18")
    before = {layer: value.clone() for layer, value in model.state_dict().items()}
    given = {layer: value.clone() for layer, value in model.state_dict().items()}
    functional_call(model, given, (torch.tensor(task.x_train),))
    assert all(torch.equal(before[layer], value) for layer, value in model.state_dict().items())
    moved = [layer for layer, value in given.items() if not torch.equal(before[layer], value)]
    assert len(moved) == 3 * 20  # mean, variance and count of each of the 20 norms
    assert {layer.rpartition(".")[2] for layer in moved} == {"running_mean", "running_var", "num_batches_tracked"}


def test_lstm_reads_the_order_and_the_last_position():
    task = tokens()
    model = build_model(task, "lstm").eval()
    x = torch.tensor([[1, 2, 3, 4], [2, 1, 3, 4], [1, 2, 3, 5]])
    outputs = model(x)
    assert len(torch.unique(outputs, dim=0)) == 3
    hidden, _ = model.lstm(model.embedding(x))
    torch.testing.assert_close(outputs, model.fc(hidden[:, -1]))


def test_the_transformer_reads_the_order_and_every_position():
    model = build_model(tokens(), "transformer").eval()
    x = torch.tensor([[1, 2, 3, 4, 5, 6], [2, 1, 3, 4, 5, 6], [1, 2, 3, 4, 5, 5], [0, 2, 3, 4, 5, 6]])
    assert len(torch.unique(model(x), dim=0)) == 4


def test_attention_is_that_of_torch():
    torch.manual_seed(0)
    block, features = Block(width=8, heads=2), torch.randn(3, 5, 8)
    query, key, value = (
        layer(features).unflatten(2, (2, 4)).transpose(1, 2) for layer in (block.query, block.key, block.value)
    )
    expected = nn.functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
    torch.testing.assert_close(block._attended(features), expected)


@pytest.mark.parametrize("name", IMAGES)
def test_a_model_of_images_refuses_text(name):
    with pytest.raises(InputError, match=f"^model {name}: expected images, task letters is text$"):
        build_model(tokens(), name)


@pytest.mark.parametrize("name", TEXT)
def test_a_model_of_text_refuses_images(name):
    with pytest.raises(InputError, match=f"^model {name}: expected text, task digits is images$"):
        build_model(load_task("digits"), name)


@pytest.mark.parametrize("name", [name for name in IMAGES if name != "mlp"])
def test_images_that_are_too_small_are_refused_and_the_smallest_are_not(name):
    with pytest.raises(InputError, match=f"^model {name}: expected images of at least .* task pictures are 1 x 20$"):
        build_model(images(1, 1, 20), name)
    with pytest.raises(InputError) as refused:
        build_model(images(1, 1, 1), name)
    smallest = int(str(refused.value).split("at least ")[1].split()[0])
    task = images(2, smallest, smallest + 1)
    assert build_model(task, name).train()(torch.tensor(task.x_train[:1])).shape == (1, 10)
    with pytest.raises(InputError):
        build_model(images(2, smallest - 1, 40), name)
    with pytest.raises(InputError, match="arrays of 1 axes"):
        build_model(images(40), name)


@settings(max_examples=25, deadline=None)
@given(
    name=st.sampled_from(IMAGES),
    channels=st.integers(1, 4),
    height=st.integers(16, 24),
    width=st.integers(16, 24),
    classes=st.integers(2, 12),
)
def test_any_shape_from_16_pixels_on_is_taken(name, channels, height, width, classes):
    task = images(channels, height, width, classes=classes)
    assert build_model(task, name)(torch.tensor(task.x_test)).shape == (3, classes)


def test_mlp_takes_numbers_of_any_shape():
    assert build_model(images(5), "mlp")(torch.tensor(images(5).x_test)).shape == (3, 10)


def test_the_tasks_own_model_is_built_from_the_seed():
    task = images(1, 4, 4)
    own = Task(**{**vars(task), "model": lambda: nn.Sequential(nn.Flatten(), nn.Linear(16, 10))})
    first, second = (build_model(own, "own", 3)[1].weight for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, build_model(own, "own", 4)[1].weight)
    with pytest.raises(InputError, match=r"model own: task pictures brings no model; name one of mlp, cnn"):
        build_model(task, "own")
    with pytest.raises(InputError, match=r"model own: expected an nn\.Module for task pictures, found a int"):
        build_model(Task(**{**vars(task), "model": lambda: 3}), "own")


def test_an_unknown_model_is_one_line():
    with pytest.raises(InputError, match=r"^model: there is no 'vgg'; `gradlens list models` shows all$"):
        build_model(images(1, 8, 8), "vgg")
