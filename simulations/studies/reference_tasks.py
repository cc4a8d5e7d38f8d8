"""Two small synthetic tasks that need no data: images that are noisy templates, and text drawn from a Markov chain."""

import numpy as np
import torch
from torch import nn

from simulations.tasks.task import Task

LENGTH, LETTERS = 6, 12  # tokens that the next one is predicted from; how many there are


class SmallLSTM(nn.Module):
    """A recurrent model that trains in seconds: embedding of 8, one LSTM layer of 16 units, fc."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(LETTERS, 8)
        self.lstm = nn.LSTM(8, 16, batch_first=True)
        self.fc = nn.Linear(16, LETTERS)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens int64 [sample, position] -> logits [sample, class]."""
        return self.fc(self.lstm(self.embedding(tokens))[0][:, -1])


def clusters(samples: int | None = None, seed: int = 0) -> Task:
    """Images of 10 x 10 pixels: one of six smooth templates, shifted by up to a pixel, under noise.

    Parameters
    ----------
    samples : int, optional
        Number of training samples; None, the default, for 1,200.
    seed : int
        Of the templates and the noise: another seed is another task of the same kind.

    Examples
    --------
    >>> clusters(samples=30).x_train.shape
    (30, 1, 10, 10)
    """
    rng = np.random.default_rng([seed, 1])
    count, classes = (samples or 1_200) + 300, 6
    coarse = rng.random((classes, 4, 4))
    templates = np.kron(coarse, np.ones((3, 3)))  # 12 x 12, of which 10 x 10 are seen
    y = rng.integers(classes, size=count)
    shifts = rng.integers(3, size=(count, 2))
    x = np.stack([templates[k, i : i + 10, j : j + 10] for k, (i, j) in zip(y, shifts, strict=True)])
    x = np.clip(x + rng.normal(0, 0.6, x.shape), 0, 1).astype(np.float32)[:, None]
    names = tuple(f"template {k}" for k in range(classes))
    return Task("clusters", x[:-300], y[:-300].astype(np.int64), x[-300:], y[-300:].astype(np.int64), names)


def chains(samples: int | None = None, seed: int = 0) -> Task:
    """Text of a Markov chain over twelve letters: the next letter is to be predicted from six.

    Parameters
    ----------
    samples : int, optional
        Number of training samples; None, the default, for 1,200.
    seed : int
        Of the chain and the text: another seed is another task of the same kind.

    Examples
    --------
    >>> chains(samples=30).x_train.shape
    (30, 6)
    """
    rng = np.random.default_rng([seed, 2])
    count = (samples or 1_200) + 300
    after = rng.dirichlet(np.full(LETTERS, 0.15), size=LETTERS).cumsum(axis=1)
    text = np.zeros((count, LENGTH + 1), np.int64)
    text[:, 0] = rng.integers(LETTERS, size=count)
    for position in range(LENGTH):
        draws = rng.random(count)[:, None] > after[text[:, position]]
        text[:, position + 1] = np.minimum(draws.sum(axis=1), LETTERS - 1)
    x, y = text[:, :LENGTH], text[:, LENGTH]
    return Task("chains", x[:-300], y[:-300], x[-300:], y[-300:], tuple("abcdefghijkl"), model=SmallLSTM)
