"""A Flower server without a network: instructions go out and replies come back within the process."""

import itertools
from collections.abc import Callable, Iterable, Mapping

import numpy as np
from flwr.app import Array, ArrayRecord, Error, Message, MetricRecord, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from gradlens.log import UpdateLog

TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1  # whose messages these are

State = Mapping[str, np.ndarray]
Content = RecordDict | Error
Client = Callable[[int, int, State], Content | list[Content]]  # place, round, global model -> one reply or several


def record(state: State) -> ArrayRecord:
    return ArrayRecord({name: Array(np.asarray(array)) for name, array in state.items()})


def state_of(arrays: ArrayRecord) -> dict[str, np.ndarray]:
    return {name: array.numpy() for name, array in arrays.items()}


def content(state: State, **metrics: int | float | list) -> RecordDict:
    """What a client sends: its local model, its number of examples and other metrics (`partition_id=3`)."""
    said = {"num-examples": 10} | {name.replace("_", "-"): value for name, value in metrics.items()}
    return RecordDict({"arrays": record(state), "metrics": MetricRecord(said)})


def reply(node: int, sent: Content) -> Message:
    instruction = Message(RecordDict(), dst_node_id=node, message_type="train")
    return Message(sent, reply_to=instruction)


class FakeGrid:
    """Nodes 100, 101, ...; `client` answers for each of them."""

    def __init__(self, nodes: int, client: Client) -> None:
        self.nodes, self.client, self.rounds = nodes, client, itertools.count()

    def get_node_ids(self) -> list[int]:
        return [100 + place for place in range(self.nodes)]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Replies that can be read once, as `replies` may be any iterable."""
        asked = list(messages)
        if not asked or asked[0].metadata.message_type != "train":
            return []
        index = next(self.rounds)
        return (reply(m.metadata.dst_node_id, sent) for m in asked for sent in self._sent(m, index))

    def _sent(self, message: Message, index: int) -> list[Content]:
        start = state_of(message.content.array_records["arrays"])
        sent = self.client(message.metadata.dst_node_id - 100, index, start)
        return sent if isinstance(sent, list) else [sent]


def clients_of(log: UpdateLog) -> Client:
    """The client at place i does in round t what client i of the log did then."""

    def client(place: int, index: int, start: State) -> Content:
        updates = log[index].updates  # into the types of the model, as torch does: Flower's mean makes integers float64
        local = {name: array.astype(updates[name].dtype) + updates[name][place] for name, array in start.items()}
        return content(local, partition_id=place, num_examples=int(log[index].num_examples[place]))

    return client
