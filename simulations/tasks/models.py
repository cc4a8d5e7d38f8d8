"""Models by name: each is built for a task, and refuses in one line a task that it cannot take."""

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import nn
from torch.nn.functional import max_pool2d

from gradlens.errors import InputError
from gradlens.names import named
from simulations.randomness import GENERATOR, Stream, address
from simulations.tasks.task import Task
from simulations.tasks.transformer import Transformer


def build_model(task: Task, name: str, seed: int = 0) -> nn.Module:
    """Builds a freshly initialized model, the same for the same seed, and draws from no generator of the caller's.

    Parameters
    ----------
    task : Task
        What the model is for: it decides the shapes of its first and last layers.
    name : str
        Built in, of an installed package, `module:function` (called with the task), or "own", the task's own model.
    seed : int
        Of the initial weights.

    Returns
    -------
    torch.nn.Module
        On the CPU.

    Raises
    ------
    InputError
        If there is no such model, or it cannot take the task.

    Examples
    --------
    >>> from simulations.tasks import load_task
    >>> sum(parameter.numel() for parameter in build_model(load_task("digits"), "mlp").parameters())
    2410
    """
    builder = _own_model if name == "own" else named("models", MODELS, name)
    with GENERATOR, torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(address(seed, Stream.MODEL).integers(2**63)))
        model = builder(task)
    if not isinstance(model, nn.Module):
        raise InputError(f"model {name}: expected an nn.Module for task {task.name}, found a {type(model).__name__}")
    return model


def _own_model(task: Task) -> nn.Module:
    if task.model is None:
        raise InputError(f"model own: task {task.name} brings no model; name one of {', '.join(MODELS)}")
    return task.model()


class MLP(nn.Module):
    """A multilayer perceptron with one hidden layer of 32 units: fc1, fc2.

    Parameters
    ----------
    task : Task
        Of samples of numbers of any shape; text is refused with an InputError.

    Examples
    --------
    >>> from simulations.tasks import build_model, load_task
    >>> sum(parameter.numel() for parameter in build_model(load_task("digits"), "mlp").parameters())
    2410
    """

    def __init__(self, task: Task) -> None:
        super().__init__()
        if task.is_text:
            raise InputError(f"model mlp: expected images, task {task.name} is text")
        self.fc1 = nn.Linear(int(np.prod(task.input_shape)), 32)
        self.fc2 = nn.Linear(32, task.num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Images [sample, channel, height, width] -> logits [sample, class]."""
        return self.fc2(torch.relu(self.fc1(images.flatten(1))))


class CNN(nn.Module):
    """Two convolutions and two dense layers: conv1, conv2, fc1, fc2.

    16 filters of 5 x 5 with stride 2 (of 3 x 3 with stride 1 for images below 16 pixels), 32 of 3 x 3 with stride 2,
    then 64 units: 56,970 parameters on gray images of 28 x 28 with 10 classes.

    Parameters
    ----------
    task : Task
        Of images of 5 x 5 and more; anything else is refused with an InputError.

    Examples
    --------
    >>> from simulations.tasks import build_model, load_task
    >>> sum(parameter.numel() for parameter in build_model(load_task("digits"), "cnn").parameters())
    13706
    """

    def __init__(self, task: Task) -> None:
        super().__init__()
        channels, height, width = _image("cnn", task, smallest=5)
        kernel, stride = (5, 2) if min(height, width) >= 16 else (3, 1)
        self.conv1 = nn.Conv2d(channels, 16, kernel, stride=stride)
        self.conv2 = nn.Conv2d(16, 32, 3, stride=2)
        with torch.no_grad():
            features = self.conv2(self.conv1(torch.zeros(1, channels, height, width))).numel()
        self.fc1 = nn.Linear(features, 64)
        self.fc2 = nn.Linear(64, task.num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Images [sample, channel, height, width] -> logits [sample, class]."""
        features = torch.relu(self.conv2(torch.relu(self.conv1(images)))).flatten(1)
        return self.fc2(torch.relu(self.fc1(features)))


class BilginCNN(nn.Module):
    """The model of Bilgin 2021, as its notebook has it: conv1, conv2, fc1, fc2.

    Two convolutions of 32 filters of 3 x 3 that keep the size, the maximum over 2 x 2, then 128 units: 1,060,138
    parameters on CIFAR-10. Weights are He-uniform, those of the final layer Glorot-uniform, and biases 0, as there in
    Keras.

    Parameters
    ----------
    task : Task
        Of images of 2 x 2 and more; anything else is refused with an InputError.

    References
    ----------
    .. [1] Bilgin 2021, arXiv:2111.14683.

    Examples
    --------
    >>> from simulations.tasks import build_model, load_task
    >>> sum(parameter.numel() for parameter in build_model(load_task("digits"), "bilgin_cnn").parameters())
    76522
    """

    def __init__(self, task: Task) -> None:
        super().__init__()
        channels, height, width = _image("bilgin_cnn", task, smallest=2)
        self.conv1 = nn.Conv2d(channels, 32, 3, padding=1)
        self.conv2 = nn.Conv2d(32, 32, 3, padding=1)
        self.fc1 = nn.Linear(32 * (height // 2) * (width // 2), 128)
        self.fc2 = nn.Linear(128, task.num_classes)
        for module in (self.conv1, self.conv2, self.fc1):
            nn.init.kaiming_uniform_(module.weight, nonlinearity="relu")
        nn.init.xavier_uniform_(self.fc2.weight)
        _zero_biases(self)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Images [sample, channel, height, width] -> logits [sample, class]."""
        features = torch.relu(self.conv2(torch.relu(self.conv1(images))))
        return self.fc2(torch.relu(self.fc1(max_pool2d(features, 2).flatten(1))))


class SunCNN(nn.Module):
    """The model of Sun et al. 2019, as their code has it: conv1, conv2, dropout1, fc1, dropout2, fc2.

    32 and 64 filters of 3 x 3 without padding, the maximum over 2 x 2, dropout .25, 128 units, dropout .5: 1,199,882
    parameters on gray images of 28 x 28 with 10 classes. Weights are Glorot-uniform and biases 0, as there in Keras.

    Parameters
    ----------
    task : Task
        Of images of 6 x 6 and more; anything else is refused with an InputError.

    References
    ----------
    .. [1] Sun et al. 2019, arXiv:1911.07963.

    Examples
    --------
    >>> from simulations.tasks import build_model, load_task
    >>> sum(parameter.numel() for parameter in build_model(load_task("digits"), "sun_cnn").parameters())
    53002
    """

    def __init__(self, task: Task) -> None:
        super().__init__()
        channels, height, width = _image("sun_cnn", task, smallest=6)
        self.conv1 = nn.Conv2d(channels, 32, 3)
        self.conv2 = nn.Conv2d(32, 64, 3)
        self.dropout1 = nn.Dropout(0.25)
        self.fc1 = nn.Linear(64 * ((height - 4) // 2) * ((width - 4) // 2), 128)
        self.dropout2 = nn.Dropout(0.5)
        self.fc2 = nn.Linear(128, task.num_classes)
        for module in (self.conv1, self.conv2, self.fc1, self.fc2):
            nn.init.xavier_uniform_(module.weight)
        _zero_biases(self)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Images [sample, channel, height, width] -> logits [sample, class]."""
        features = torch.relu(self.conv2(torch.relu(self.conv1(images))))
        features = self.dropout1(max_pool2d(features, 2)).flatten(1)
        return self.fc2(self.dropout2(torch.relu(self.fc1(features))))


class WuCNN(nn.Module):
    """A stand-in for the model of Wu et al. 2020, whose own was not found: conv1, conv2, fc1, fc2.

    20 and 50 filters of 5 x 5 without padding, each followed by the maximum over 2 x 2, then 128 units: 129,388
    parameters on gray images of 28 x 28 with 10 classes.

    Parameters
    ----------
    task : Task
        Of images of 16 x 16 and more; anything else is refused with an InputError.

    References
    ----------
    .. [1] Wu et al. 2020, arXiv:2011.01767.

    Examples
    --------
    >>> from simulations.tasks import build_model, load_task
    >>> build_model(load_task("digits"), "wu_cnn")
    Traceback (most recent call last):
    gradlens.errors.InputError: model wu_cnn: expected images of at least 16 x 16 pixels, those of task digits are 8 x 8
    """

    def __init__(self, task: Task) -> None:
        super().__init__()
        channels, height, width = _image("wu_cnn", task, smallest=16)
        self.conv1 = nn.Conv2d(channels, 20, 5)
        self.conv2 = nn.Conv2d(20, 50, 5)
        self.fc1 = nn.Linear(50 * (((height - 4) // 2 - 4) // 2) * (((width - 4) // 2 - 4) // 2), 128)
        self.fc2 = nn.Linear(128, task.num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Images [sample, channel, height, width] -> logits [sample, class]."""
        features = max_pool2d(torch.relu(self.conv1(images)), 2)
        features = max_pool2d(torch.relu(self.conv2(features)), 2)
        return self.fc2(torch.relu(self.fc1(features.flatten(1))))


class ResNet18(nn.Module):
    """The light ResNet-18 of Bagdasaryan et al. 2018 for small images: conv1, stage1 to stage4, fc.

    A first convolution of 3 x 3 and stride 1; four stages of two blocks with 32, 64, 128 and 256 filters, each
    convolution followed by batch norm; the mean over the image; one dense layer: 2,797,610 parameters on color images
    with 10 classes.

    Parameters
    ----------
    task : Task
        Of images of 9 x 9 and more, so that the last stage keeps several pixels: batch norm has nothing to normalize
        where a single sample has a single one. Anything else is refused with an InputError.

    References
    ----------
    .. [1] Bagdasaryan et al. 2018, arXiv:1807.00459.

    Examples
    --------
    >>> from simulations.tasks import build_model, load_task
    >>> build_model(load_task("digits"), "resnet18")
    Traceback (most recent call last):
    gradlens.errors.InputError: model resnet18: expected images of at least 9 x 9 pixels, those of task digits are 8 x 8
    """

    def __init__(self, task: Task) -> None:
        super().__init__()
        channels, *_ = _image("resnet18", task, smallest=9)
        self.conv1 = nn.Conv2d(channels, 32, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(32)
        self.stage1 = nn.Sequential(_Block(32, 32, 1), _Block(32, 32, 1))
        self.stage2 = nn.Sequential(_Block(32, 64, 2), _Block(64, 64, 1))
        self.stage3 = nn.Sequential(_Block(64, 128, 2), _Block(128, 128, 1))
        self.stage4 = nn.Sequential(_Block(128, 256, 2), _Block(256, 256, 1))
        self.fc = nn.Linear(256, task.num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Images [sample, channel, height, width] -> logits [sample, class]."""
        features = torch.relu(self.norm1(self.conv1(images)))
        features = self.stage4(self.stage3(self.stage2(self.stage1(features))))
        return self.fc(features.mean(dim=(2, 3)))


class _Block(nn.Module):
    """Two convolutions of 3 x 3 with a shortcut around them: conv1, norm1, conv2, norm2.

    Where the shape changes, the shortcut is a convolution of 1 x 1 (shortcut, shortcut_norm).
    """

    def __init__(self, channels: int, filters: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, filters, 3, stride=stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(filters)
        self.conv2 = nn.Conv2d(filters, filters, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(filters)
        self.changes = stride != 1 or channels != filters
        if self.changes:
            self.shortcut = nn.Conv2d(channels, filters, 1, stride=stride, bias=False)
            self.shortcut_norm = nn.BatchNorm2d(filters)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        skipped = self.shortcut_norm(self.shortcut(features)) if self.changes else features
        features = torch.relu(self.norm1(self.conv1(features)))
        return torch.relu(self.norm2(self.conv2(features)) + skipped)


class LSTM(nn.Module):
    """Predicts the next token: embedding, lstm (two layers), fc on the output at the last position.

    Up to 256 tokens an embedding of 8 numbers and 256 units, as [1]_ has it for characters; beyond that 200 and 200, as
    [2]_ has it for words (there with tied weights and dropout).

    Parameters
    ----------
    task : Task
        Of text; images are refused with an InputError.

    References
    ----------
    .. [1] Caldas et al. 2018, arXiv:1812.01097 (LEAF).
    .. [2] Bagdasaryan et al. 2018, arXiv:1807.00459.

    Examples
    --------
    >>> from simulations.tasks import build_model, load_task
    >>> build_model(load_task("digits"), "lstm")
    Traceback (most recent call last):
    gradlens.errors.InputError: model lstm: expected text, task digits is images
    """

    def __init__(self, task: Task) -> None:
        super().__init__()
        if not task.is_text:
            raise InputError(f"model lstm: expected text, task {task.name} is images")
        num_tokens = task.num_tokens or task.num_classes
        width, units = (8, 256) if num_tokens <= 256 else (200, 200)
        self.embedding = nn.Embedding(num_tokens, width)
        self.lstm = nn.LSTM(width, units, num_layers=2, batch_first=True)
        self.fc = nn.Linear(units, task.num_classes)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens int64 [sample, position] -> logits [sample, class]."""
        return self.fc(self.lstm(self.embedding(tokens))[0][:, -1])


MODELS: Mapping[str, Callable[[Task], nn.Module]] = {
    "mlp": MLP,
    "cnn": CNN,
    "bilgin_cnn": BilginCNN,
    "sun_cnn": SunCNN,
    "wu_cnn": WuCNN,
    "resnet18": ResNet18,
    "lstm": LSTM,
    "transformer": Transformer,
}


def _image(model: str, task: Task, smallest: int) -> tuple[int, int, int]:
    """Channel, height and width of a task's images; raises InputError where it has none, or smaller ones."""
    if task.is_text or len(task.input_shape) != 3:
        kind = "text" if task.is_text else f"arrays of {len(task.input_shape)} axes"
        raise InputError(f"model {model}: expected images, task {task.name} is {kind}")
    channels, height, width = task.input_shape
    if min(height, width) < smallest:
        raise InputError(
            f"model {model}: expected images of at least {smallest} x {smallest} pixels, "
            f"those of task {task.name} are {height} x {width}"
        )
    return channels, height, width


def _zero_biases(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
