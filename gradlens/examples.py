"""A small made-up log to try things on, and its recording; the examples of the documentation start from them."""

from pathlib import Path

import numpy as np
import pandas as pd

from gradlens.log import LogWriter, ModelSpec, Round, UpdateLog

SHAPES = {"fc1.weight": (8, 16), "fc1.bias": (8,), "fc2.weight": (4, 8), "fc2.bias": (4,)}
SOURCE, TARGET = 3, 1  # the labels between which the attackers flip


def example_log(rounds: int = 4, num_clients: int = 10, num_malicious: int = 1, seed: int = 0) -> UpdateLog:
    """A log of made-up updates in which the last clients flip label 3 to label 1 and boost what they send.

    Every client follows a direction common to its round, with noise of its own. The malicious ones, "client-9" and as
    many before it as asked for, add one shared direction in every layer, move the final bias from label 3 to label 1
    and send three times the result. Nothing is trained.

    Parameters
    ----------
    rounds : int
        Number of rounds.
    num_clients : int
        Clients of each round, "client-0" and on.
    num_malicious : int
        How many of them are malicious.
    seed : int
        Of the random numbers.

    Returns
    -------
    UpdateLog
        Of a model with the layers `fc1` and `fc2`, 16 inputs, 8 hidden units and 4 labels.

    Examples
    --------
    >>> from gradlens.examples import example_log
    >>> log = example_log()
    >>> log
    UpdateLog(4 rounds, 172 parameters in 4 layers)
    >>> log[-1].clients.tolist()[-2:]
    ['client-8', 'client-9']
    """
    rng = np.random.default_rng(seed)
    model = {name: rng.normal(scale=0.5, size=shape).astype(np.float32) for name, shape in SHAPES.items()}
    spec = ModelSpec.of(model)
    clients = np.array([f"client-{number}" for number in range(num_clients)])
    malicious = np.arange(num_clients) >= num_clients - num_malicious
    aim = {name: rng.normal(scale=0.05, size=shape) for name, shape in SHAPES.items()}
    aim["fc2.bias"] = np.zeros(4)
    aim["fc2.bias"][[SOURCE, TARGET]] = -0.2, 0.2
    log = UpdateLog(spec)
    for index in range(rounds):
        updates = {}
        for name, shape in SHAPES.items():
            common = rng.normal(scale=0.05, size=shape)
            sent = common + rng.normal(scale=0.05, size=(num_clients, *shape))
            sent[malicious] = 3 * (sent[malicious] + aim[name])
            updates[name] = (sent - sent.mean(axis=1, keepdims=True) if name == "fc2.bias" else sent).astype(np.float32)
        log = log.append(Round(index, clients, np.full(num_clients, 100), updates, model))
        model = {name: model[name] + updates[name].mean(axis=0) for name in SHAPES}
    return log


def example_run(
    folder: Path | str, rounds: int = 4, num_clients: int = 10, num_malicious: int = 1, seed: int = 0
) -> Path:
    """Records the log of `example_log` with its ground truth, and closes the run.

    Parameters
    ----------
    folder : Path or str
        The folder of the run, which must not exist.
    rounds, num_clients, num_malicious, seed
        As for `example_log`.

    Returns
    -------
    Path
        The folder.

    Examples
    --------
    >>> import tempfile, gradlens
    >>> from gradlens.examples import example_run
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     run = gradlens.open(example_run(f"{folder}/run"))
    ...     print(len(run.log), run.truth["poisoned"].sum())
    4 4
    """
    log = example_log(rounds, num_clients, num_malicious, seed)
    rows = [(round_.index, str(client)) for round_ in log for client in round_.clients]
    truth = pd.DataFrame(rows, columns=["round", "client"])
    last = {f"client-{number}" for number in range(num_clients - num_malicious, num_clients)}
    truth["compromised"] = truth["poisoned"] = truth["client"].isin(last)
    with LogWriter.create(folder, log.model, log[0].global_model) as writer:
        for round_ in log:
            mean = {name: update.mean(axis=0) for name, update in round_.updates.items()}
            writer.commit(round_, {name: round_.global_model[name] + mean[name] for name in mean})
        writer.add_truth(truth)
    return Path(folder)
