"""Logs of one round made of plain matrices, for detectors that look at no other."""

import numpy as np

from gradlens.log import ModelSpec, Round, UpdateLog


def log_of(*layers, state=None, index=0):
    """A log of one round; layers [client, number], state: the global model's numbers of each layer, zeros if None."""
    rows = {f"layer{i}": np.asarray(layer, np.float32) for i, layer in enumerate(layers)}
    clients = np.array([f"c{i:02d}" for i in range(len(layers[0]))])
    given_state = [np.zeros(np.shape(layer)[1]) for layer in layers] if state is None else state
    model = {name: np.asarray(a, np.float32) for name, a in zip(rows, given_state, strict=True)}
    return UpdateLog(ModelSpec.of(model), [Round(index, clients, np.full(len(clients), 10), rows, model)])


def flat(log):
    """All numbers of each client as one row, float64 [client, number]."""
    round_ = log[-1]
    return np.concatenate(
        [np.asarray(round_.updates[n], np.float64).reshape(len(round_), -1) for n in log.model], axis=1
    )


def model_of(log):
    """All numbers of the global model in a row."""
    return np.concatenate([np.asarray(log[-1].global_model[name], np.float64).ravel() for name in log.model])
