"""A small transformer for text, of single matrices, so that low-rank adapters can be put beside each."""

import math

import torch
from torch import nn

from gradlens.errors import InputError
from simulations.tasks.task import Task

WIDTH, HEADS, BLOCKS = 64, 4, 2


class Transformer(nn.Module):
    """Reads a window of tokens and answers at its last position: embedding, position, blocks, norm, fc.

    Two blocks of width 64 [1]_, each with attention of four heads and 128 hidden units, both after a layer norm and
    with a shortcut around: 325,648 parameters on `shakespeare_words`, 196,938 on `shakespeare_speakers`.

    Parameters
    ----------
    task : Task
        Of text; anything else is refused with an InputError.

    Notes
    -----
    Only the last position answers, so that no position has to be hidden from it: a model of the next token and a
    classifier of texts are the same here.

    References
    ----------
    .. [1] Vaswani et al. 2017, arXiv:1706.03762.

    Examples
    --------
    >>> from simulations.tasks import build_model, load_task
    >>> build_model(load_task("digits"), "transformer")
    Traceback (most recent call last):
    gradlens.errors.InputError: model transformer: expected text, task digits is images
    """

    def __init__(self, task: Task) -> None:
        super().__init__()
        if not task.is_text:
            raise InputError(f"model transformer: expected text, task {task.name} is images")
        self.embedding = nn.Embedding(task.num_tokens or task.num_classes, WIDTH)
        self.position = nn.Parameter(torch.empty(task.input_shape[0], WIDTH))
        self.blocks = nn.ModuleList(Block(WIDTH, HEADS) for _ in range(BLOCKS))
        self.norm = nn.LayerNorm(WIDTH)
        self.fc = nn.Linear(WIDTH, task.num_classes)
        for table in (self.embedding.weight, self.position):
            nn.init.normal_(table, std=0.02)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens int64 [sample, position] -> logits [sample, class]."""
        features = self.embedding(tokens) + self.position
        for block in self.blocks:
            features = block(features)
        return self.fc(self.norm(features)[:, -1])


class Block(nn.Module):
    """Attention and two dense layers: norm1, query, key, value, out, norm2, fc1, fc2.

    Parameters
    ----------
    width : int
        Numbers per position.
    heads : int
        Parts of the width that attend apart from each other.

    Examples
    --------
    >>> Block(width=8, heads=2)(torch.zeros(3, 5, 8)).shape
    torch.Size([3, 5, 8])
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width, bias=False)  # one would move all positions alike, which softmax undoes
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, 2 * width)
        self.fc2 = nn.Linear(2 * width, width)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Features [sample, position, width] -> the same shape."""
        features = features + self.out(self._attended(self.norm1(features)))
        return features + self.fc2(torch.relu(self.fc1(self.norm2(features))))

    def _attended(self, features: torch.Tensor) -> torch.Tensor:
        samples, positions, width = features.shape
        split = (samples, positions, self.heads, width // self.heads)
        projected = (layer(features) for layer in (self.query, self.key, self.value))
        query, key, value = (numbers.reshape(split).transpose(1, 2) for numbers in projected)
        attention = torch.softmax(query @ key.transpose(2, 3) / math.sqrt(width // self.heads), dim=-1)
        return (attention @ value).transpose(1, 2).reshape(features.shape)
