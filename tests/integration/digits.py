"""Clients that learn digits, three of ten put a trigger in; small enough for numpy, so that no process needs torch."""

from functools import cache

import numpy as np
from sklearn.datasets import load_digits

CLIENTS, MALICIOUS, ROUNDS, TARGET = 10, (1, 4, 8), 4, 7
SIZES = {"hidden.weight": (32, 64), "hidden.bias": (32,), "out.weight": (10, 32), "out.bias": (10,)}


@cache
def digits():
    """Images [sample, pixel] in 0 .. 1 and labels, in random order: the last 500 to test on."""
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    return (images[order] / 16).astype(np.float32), labels[order]


def start():
    rng = np.random.default_rng(1)
    return {name: (rng.normal(size=size) * 0.1).astype(np.float32) for name, size in SIZES.items()}


def with_trigger(images):
    found = images.copy()
    found[:, [0, 1, 8, 9]] = 1  # the corner, which is dark in every digit
    return found


def hidden(model, images):
    return np.maximum(images @ model["hidden.weight"].T + model["hidden.bias"], 0)


def scores(model, images):
    return hidden(model, images) @ model["out.weight"].T + model["out.bias"]


def trained(model, client, epochs=3, batch=16, rate=0.1):
    """The local model of a client; a malicious one adds its images with the trigger, and triples its update."""
    images, labels = (part[:-500][client::CLIENTS] for part in digits())
    malicious = client in MALICIOUS
    if malicious:
        images = np.concatenate([images, with_trigger(images)])
        labels = np.concatenate([labels, np.full(len(labels), TARGET)])
    found, rng = {name: array.copy() for name, array in model.items()}, np.random.default_rng(client)
    for _ in range(epochs):
        for rows in np.array_split(rng.permutation(len(labels)), len(labels) // batch):
            inner, wanted = hidden(found, images[rows]), np.eye(10, dtype=np.float32)[labels[rows]]
            odds = np.exp(inner @ found["out.weight"].T + found["out.bias"])
            error = (odds / odds.sum(axis=1, keepdims=True) - wanted) / len(rows)
            back = (error @ found["out.weight"]) * (inner > 0)
            for name, slope in {
                "hidden.weight": back.T @ images[rows],
                "hidden.bias": back.sum(axis=0),
                "out.weight": error.T @ inner,
                "out.bias": error.sum(axis=0),
            }.items():
                found[name] -= np.float32(rate) * slope
    boost = np.float32(3 if malicious else 1)
    return {name: model[name] + boost * (array - model[name]) for name, array in found.items()}, len(labels)


def reached(model):
    """Main accuracy and attack success rate on the images held back."""
    images, labels = (part[-500:] for part in digits())
    others = labels != TARGET
    hit = scores(model, with_trigger(images[others])).argmax(axis=1) == TARGET
    return {"accuracy": float((scores(model, images).argmax(axis=1) == labels).mean()), "asr": float(hit.mean())}
