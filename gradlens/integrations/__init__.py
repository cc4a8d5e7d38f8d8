"""One file per framework of federated learning, around the same `Recorder`; gradlens itself needs none of them.

What they share: an `Answer` is what one client sent, `kept` says which answers go on to the framework's aggregation.
A client of weight 0 does not; one of another weight w goes on as the global model + w x its update.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gradlens.aggregators.rules import capped
from gradlens.log.intake import Unfit, printable, refusing
from gradlens.server import Recorder

__all__ = ["Answer", "Clients", "Kept", "kept", "numbers", "read_safely"]

CAP = 10.0  # times the median claim of examples that one client counts at most

State = Mapping[str, np.ndarray]  # layer -> array


@dataclass(frozen=True, eq=False)
class Answer:
    """What one client sent: the framework's own message, the client's name, what it holds, its number of examples.

    state: layer -> array, or why there is none.
    """

    message: Any
    client: str
    state: State | Unfit
    num_examples: Any = None


@dataclass(frozen=True, eq=False)
class Kept:
    """An answer that goes on: the framework's message, and what to put in place of what it holds.

    state: layer -> array, {} = its arrays stay; num_examples: None = its claim stays.
    """

    message: Any
    state: dict[str, np.ndarray]
    num_examples: int | None = None


def kept(recorder: Recorder, global_model: State, answers: Sequence[Answer]) -> list[Kept]:
    """The answers of the clients that are kept, and what a filter makes of them.

    All answers are recorded and judged. A client of weight 0 is left out; one of another weight w but 1 is replaced
    by the global model + w x its update (w x its update, where clients send updates), its buffers as they are. A filter
    that acts cuts claims of examples to ten times their median, as `mean(weighted=True)` does: else one client's word
    is the whole mean. Where it weighs down, the weights are scaled to mean 1 by those claims. A client that sent the
    same several times counts once.
    """
    sent: list[tuple[str, Any]] = [(answer.client, answer.state) for answer in answers]
    decision = recorder.log_round(global_model, sent, {answer.client: answer.num_examples for answer in answers})
    weights = {c: w for c, w in zip(decision.clients.tolist(), decision.weights.tolist(), strict=True) if w > 0}
    cut: dict[str, int] = {}
    if recorder.filter and recorder.filter.action != "record":
        said = zip(recorder.log[-1].clients.tolist(), recorder.log[-1].num_examples.tolist(), strict=True)
        claims = {client: claim for client, claim in said if client in weights}
        most = capped(np.array(list(claims.values())), CAP)  # 1 each where the median is 0
        cut = {
            client: int(limit) for (client, claim), limit in zip(claims.items(), most, strict=True) if limit != claim
        }
        if recorder.filter.action == "down_weight" and claims:  # a mean becomes the weighted one
            share = float(most @ [weights[client] for client in claims] / most.sum())
            weights = {client: weight / share for client, weight in weights.items()}
    first: dict[str, Answer] = {}
    for answer in answers:
        first.setdefault(printable(answer.client), answer)
    centre = global_model if recorder.sent == "models" else {}

    def scaled(state: State, weight: float) -> dict[str, np.ndarray]:
        moved = {name: np.array(array) for name, array in state.items()}
        for name in recorder.model.parameters:
            start = centre.get(name, np.float32(0))
            moved[name] = np.asarray(start + weight * (moved[name] - start), moved[name].dtype)
        return moved

    chosen = [(client, answer, weights[client]) for client, answer in first.items() if client in weights]
    return [
        Kept(each.message, {} if weight == 1 else scaled(each.state, weight), cut.get(client))  # type: ignore[arg-type]
        for client, each, weight in chosen
    ]


class Clients:
    """Who is behind a node: the number that it first sent as the metric `key`, else "node-" and its id.

    The number is a claim. A node that has made one cannot take another name, and a name belongs to the node that first
    claimed it alone: who claims it later, or in the same round as another, is called "node-7 claims 3". So nobody
    writes into another client's record or has its answer refused, and the claim is in the record. Who comes first after
    a server was started afresh is believed. key: None, nobody's claim counts.
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
        """The client's name; said: the metrics that came with the answer."""
        self.hear([(node, said)])
        claim = self._claims.get(node)
        if claim is None:
            return f"node-{node}"
        return claim if self._owners[claim] == node else f"node-{node} claims {claim}"

    def without_claims(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """The metrics of a round without the mean of its clients' numbers."""
        return {name: value for name, value in metrics.items() if name != self.key}


def read_safely(read: Callable[[], State]) -> State | Unfit:
    """What a client sent, or why it cannot be read: whatever its bytes make the reader do."""
    try:
        with refusing("what was sent cannot be read"):
            return read()
    except Unfit as reason:
        return reason


def numbers(metrics: Mapping[str, Any] | None) -> dict[str, float]:
    """Those of a framework's metrics that a run records."""
    return {str(name): float(value) for name, value in (metrics or {}).items() if isinstance(value, int | float)}
