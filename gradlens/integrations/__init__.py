"""Integrations with federated learning frameworks: one module per framework, all built around `Recorder`.

gradlens itself needs none of the frameworks. Every integration turns the framework's messages into `Answer`s; `kept`
records them and returns those that the framework aggregates. A client of weight 0 is left out; a client of another
weight w is replaced by the global model + w x its update.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gradlens.aggregators.rules import capped
from gradlens.log.adapters import padded, pairs_of
from gradlens.log.intake import Unfit, as_array, printable, refusing
from gradlens.server import Recorder, Signed

__all__ = ["Answer", "Clients", "Kept", "kept", "numbers", "read_safely"]

CAP = 10.0  # a client's claimed number of examples is limited to this multiple of the median claim

State = Mapping[str, np.ndarray]  # layer -> array


@dataclass(frozen=True, eq=False)
class Answer:
    """What one client sent in one round.

    Parameters
    ----------
    message : object
        The framework's own message, which is passed on as it is.
    client : str
        The client's name.
    state : Mapping of str to array, or Unfit
        Layer -> array that the message holds, or the reason why it cannot be read.
    num_examples : object, default None
        The number of examples that the client claims. The recorder refuses an answer whose claim is not a count.
    signature : object, default None
        The signature that came with it (`gradlens.custody.sign_update`), None if none did.

    Examples
    --------
    >>> Answer("the message", "client-1", {"fc.bias": np.zeros(2, np.float32)}, num_examples=10).client
    'client-1'
    """

    message: Any
    client: str
    state: State | Unfit
    num_examples: Any = None
    signature: Any = None


@dataclass(frozen=True, eq=False)
class Kept:
    """An answer that goes on to the framework's aggregation, and what to replace in it.

    Parameters
    ----------
    message : object
        The framework's own message.
    state : dict of str to array
        Layer -> array to put in place of all of the message's arrays; {}: they stay.
    num_examples : int, optional
        The number to put in place of the claimed number of examples; None: the claim stays.

    Examples
    --------
    >>> Kept("the message", {}).num_examples is None
    True
    """

    message: Any
    state: dict[str, np.ndarray]
    num_examples: int | None = None


def kept(recorder: Recorder, global_model: State, answers: Sequence[Answer]) -> list[Kept]:
    """Records and judges all answers of a round, and returns those of the clients that are kept.

    Parameters
    ----------
    recorder : Recorder
        Records the round; its filter, if it has one, decides.
    global_model : Mapping of str to array
        Layer -> array that the clients started from.
    answers : sequence of Answer
        What the clients sent.

    Returns
    -------
    list of Kept
        In the order of the answers. A client that sent the same several times is kept once.

    Raises
    ------
    InputError
        If the layers of the global model are not those of the rounds before, or the recorder is closed.
    FilterStopped
        If the filter is set to stop in such a round.

    Notes
    -----
    A client of weight 0 is left out. A client whose weight w is neither 0 nor 1 is replaced by the global model + w x
    its update (by w x its update if clients send updates); its buffers stay as they are.

    What goes on has the layers and shapes that were checked, since a framework sums whatever it is given, or fails on
    it: adapters of a smaller rank are filled with zeros. A layer that was not agreed on is taken out, or is the
    server's own where most clients sent it.

    If the filter's action is other than "record", claimed numbers of examples are limited to ten times their median, as
    in `mean(weighted=True)`: otherwise a single client could claim enough examples to be the whole mean. Under
    "down_weight" the weights are then scaled to mean 1, weighted by these claims.

    Examples
    --------
    >>> state = {"fc.weight": np.zeros((2, 3), np.float32), "fc.bias": np.zeros(2, np.float32)}
    >>> answers = [Answer(f"message {k}", f"client-{k}", {n: a + k for n, a in state.items()}, 10) for k in range(3)]
    >>> [answer.message for answer in kept(Recorder(), state, [*answers, Answer("broken", "client-3", {}, 10)])]
    ['message 0', 'message 1', 'message 2']
    """
    sent: list[tuple[str, Any]] = [(answer.client, Signed(answer.signature, answer.state)) for answer in answers]
    decision = recorder.log_round(global_model, sent, {answer.client: answer.num_examples for answer in answers})
    weights = {c: w for c, w in zip(decision.clients.tolist(), decision.weights.tolist(), strict=True) if w > 0}
    cut: dict[str, int] = {}
    if recorder.filter and recorder.filter.action != "record":
        recorded = zip(recorder.log[-1].clients.tolist(), recorder.log[-1].num_examples.tolist(), strict=True)
        claims = {client: claim for client, claim in recorded if client in weights}
        limits = capped(np.array(list(claims.values())), CAP)  # 1 each where the median is 0
        cut = {
            client: int(limit) for (client, claim), limit in zip(claims.items(), limits, strict=True) if limit != claim
        }
        if recorder.filter.action == "down_weight" and claims:  # a mean becomes the weighted one
            mean_weight = float(limits @ [weights[client] for client in claims] / limits.sum())
            weights = {client: weight / mean_weight for client, weight in weights.items()}
    first: dict[str, Answer] = {}
    for answer in answers:
        first.setdefault(printable(answer.client), answer)
    chosen = {client: answer for client, answer in first.items() if client in weights}
    states: dict[str, State] = {client: answer.state for client, answer in chosen.items()}  # type: ignore[misc]
    changed = _changed(recorder, global_model, states, weights)
    return [Kept(answer.message, changed[client], cut.get(client)) for client, answer in chosen.items()]


def _changed(
    recorder: Recorder, global_model: State, states: Mapping[str, State], weights: Mapping[str, float]
) -> dict[str, dict[str, np.ndarray]]:
    """Client -> what goes on in place of its arrays, {} where they can stay; see the notes of `kept`."""
    start = {name: as_array(array)[0] for name, array in global_model.items()}
    if recorder.sent == "updates":  # which are measured from 0
        start = {name: np.zeros_like(array) for name, array in start.items()}
    model, known = recorder.model, set(recorder.model)
    beside = Counter(name for state in states.values() for name in state if name not in known)
    rest = {name: array for name, array in start.items() if 2 * beside[name] > len(states)}
    pairs, changed = pairs_of(model), {}
    for client, state in states.items():
        weight, fits = weights[client], all(np.shape(state[name]) == model[name].shape for name in model)
        changed[client] = {}
        if weight == 1 and fits and len(state) == len(model) and not rest:
            continue
        arrays = padded({name: as_array(state[name])[0] for name in model}, model, pairs)
        for name in model.parameters if weight != 1 else ():
            arrays[name] = np.asarray(start[name] + weight * (arrays[name] - start[name]), arrays[name].dtype)
        changed[client] = {name: (rest | arrays)[name] for name in start if name in rest or name in arrays}
    return changed


class Clients:
    """Names the client behind each node by the number that the node first sent as a metric, or by the node's id.

    Parameters
    ----------
    key : str or None
        Name of the metric that holds the client's number. None: all clients are named by their nodes' ids.

    Notes
    -----
    The number is a claim. Once a node has sent one, its name no longer changes, and a name belongs to the node that
    first claimed it alone. A node that claims it later, or in the same round as another, is called "node-7 claims 3":
    nobody writes into another client's record or has its answer refused, and the claim is in the record. After a server
    is restarted, the first claim is believed again.

    Examples
    --------
    >>> clients = Clients("partition-id")
    >>> clients.name("71", {"partition-id": 3}), clients.name("71", {"partition-id": 5}), clients.name("72", {})
    ('3', '3', 'node-72')
    >>> clients.name("72", {"partition-id": 3})
    'node-72 claims 3'
    """

    def __init__(self, key: str | None) -> None:
        self.key, self._claims = key, dict[str, str]()
        self._owners: dict[str, str | None] = {}  # number -> the node whose name it is, None: nobody's, for good

    def hear(self, answers: Iterable[tuple[str, Mapping[str, Any]]]) -> None:
        """Takes in what the nodes of a round claim, before any of them is named.

        Parameters
        ----------
        answers : iterable of (str, Mapping)
            The id of each node, and the metrics that came with its answer.
        """
        first: dict[str, set[str]] = {}
        for node, said in answers:
            claim = said.get(self.key) if self.key else None
            if isinstance(claim, int) and not isinstance(claim, bool):
                first.setdefault(self._claims.setdefault(node, str(claim)), set()).add(node)
        for claim, nodes in first.items():
            self._owners.setdefault(claim, nodes.pop() if len(nodes) == 1 else None)

    def name(self, node: str, said: Mapping[str, Any]) -> str:
        """Returns the name of the client behind a node.

        Parameters
        ----------
        node : str
            The node's id.
        said : Mapping of str to object
            The metrics that came with the answer.

        Returns
        -------
        str
            The number that the node first claimed, if it is its own; "node-" and its id if it has claimed none.
        """
        self.hear([(node, said)])
        claim = self._claims.get(node)
        if claim is None:
            return f"node-{node}"
        return claim if self._owners[claim] == node else f"node-{node} claims {claim}"

    def without_claims(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Returns a round's metrics without `key`, which after averaging is a meaningless mean of clients' numbers."""
        return {name: value for name, value in metrics.items() if name != self.key}


def read_safely(read: Callable[[], State]) -> State | Unfit:
    """Reads what a client sent; any exception while reading becomes the reason for refusing it.

    Parameters
    ----------
    read : callable
        () -> (layer -> array), the framework's way of reading the message.

    Returns
    -------
    Mapping of str to array, or Unfit
        What was read, or why it cannot be read.

    Examples
    --------
    >>> read_safely(lambda: {"fc.bias": [1, 2]})
    {'fc.bias': [1, 2]}
    >>> print(read_safely(lambda: {}["fc.bias"]))
    what was sent cannot be read: KeyError('fc.bias')
    """
    try:
        with refusing("what was sent cannot be read"):
            return read()
    except Unfit as reason:
        return reason


def numbers(metrics: Mapping[str, Any] | None) -> dict[str, float]:
    """Returns those of a framework's metrics that are plain numbers, which a run can record.

    Parameters
    ----------
    metrics : Mapping of str to object, or None
        The framework's metrics; None: there are none.

    Returns
    -------
    dict of str to float

    Examples
    --------
    >>> numbers({"accuracy": 1, "model": "cnn", "losses": [0.1, 0.2]})
    {'accuracy': 1.0}
    """
    return {str(name): float(value) for name, value in (metrics or {}).items() if isinstance(value, int | float)}
