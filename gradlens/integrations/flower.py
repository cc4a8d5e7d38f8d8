"""Flower: strategies that stand around another one, record every round and leave out whom the filter distrusts.

    with Recorder("runs/live", detector="final_rows") as recorder:
        GradlensStrategy(FedAvg(), recorder).start(grid, initial_arrays)

Tested with flwr 1.41; for the strategies of `flwr.server` see `flower_classic`.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from copy import copy
from dataclasses import replace
from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from gradlens.integrations import Answer, Clients, Kept, State, kept, numbers, read_safely
from gradlens.log.intake import Unfit, shown
from gradlens.server import Recorder

__all__ = ["GradlensStrategy"]


class GradlensStrategy(Strategy):
    """Around any strategy of Flower's message API, which sees the replies of those who are kept.

    What it makes of them is recorded as the next global model; where nobody is kept, the model stays.
    weighted_by_key: the metric that holds a client's number of examples; identity: the metric that tells who is
    behind a node (`Clients`), None: the nodes' ids alone count.
    """

    def __init__(
        self,
        inner: Strategy,
        recorder: Recorder,
        *,
        weighted_by_key: str = "num-examples",
        identity: str | None = "partition-id",
    ) -> None:
        self.inner, self.recorder, self.weighted_by_key = inner, recorder, weighted_by_key
        self._clients = Clients(identity)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Keeps the global model, for replies are local models, and asks the inner strategy."""
        self._sent = arrays
        return self.inner.configure_train(server_round, arrays, config, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Records and judges the round; the inner strategy aggregates who is kept."""
        arrived = list(replies)
        self._clients.hear((_node(reply), _said(reply)) for reply in arrived)
        answers = _of_one_form([self._answer(reply) for reply in arrived])
        found = [self._changed(each) for each in kept(self.recorder, _arrays(self._sent), answers)]
        failed = [answer.message for answer in answers if answer.message.has_error()]  # for the inner strategy's log
        arrays, metrics = self.inner.aggregate_train(server_round, found + failed) if found else (None, None)
        arrays = arrays or self._sent  # a training without any arrays would end with an empty record
        self.recorder.commit(_arrays(arrays), self._clients.without_claims(numbers(metrics)))
        return arrays, metrics

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """As the inner strategy."""
        return self.inner.configure_evaluate(server_round, arrays, config, grid)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """As the inner strategy."""
        return self.inner.aggregate_evaluate(server_round, replies)

    def summary(self) -> None:
        """As the inner strategy."""
        self.inner.summary()

    def _answer(self, reply: Message) -> Answer:
        node, said = _node(reply), _said(reply)
        if reply.has_error():
            return Answer(reply, self._clients.name(node, {}), Unfit(f"failed: {shown(reply.error.reason)}"))
        arrays, metrics = list(reply.content.array_records.values()), list(reply.content.metric_records.values())
        if len(arrays) == len(metrics) == 1:
            state = read_safely(lambda: _arrays(arrays[0]))
        else:
            state = Unfit(f"must send one ArrayRecord and one MetricRecord, found {len(arrays)} and {len(metrics)}")
        return Answer(reply, self._clients.name(node, said), state, said.get(self.weighted_by_key))

    def _changed(self, answer: Kept) -> Message:
        """The reply with what is put in place of its arrays and of its claim of examples."""
        if not answer.state and answer.num_examples is None:
            return answer.message
        changed = copy(answer.message)
        content = RecordDict(dict(changed.content))
        if answer.state:
            record = ArrayRecord({layer: Array(array) for layer, array in answer.state.items()})
            content[next(iter(content.array_records))] = record
        if answer.num_examples is not None:
            name, said = next(iter(content.metric_records.items()))
            content[name] = MetricRecord({**said, self.weighted_by_key: answer.num_examples})
        changed.content = content
        return changed


def _node(reply: Message) -> str:
    return str(reply.metadata.src_node_id)


def _said(reply: Message) -> Mapping[str, Any]:
    """The metrics that came with a reply."""
    records = [] if reply.has_error() else list(reply.content.metric_records.values())
    return records[0] if records else {}


def _of_one_form(answers: list[Answer]) -> list[Answer]:
    """Who names records and metrics otherwise than most is refused: Flower's strategies raise on a mixture."""
    forms = [_form(answer.message) if not isinstance(answer.state, Unfit) else None for answer in answers]
    usual = next(iter(Counter(form for form in forms if form).most_common(1)), (None, 0))[0]
    odd = Unfit("its records or metrics are called otherwise than those of most")
    return [
        replace(each, state=odd) if form and form != usual else each for each, form in zip(answers, forms, strict=True)
    ]


def _form(reply: Message) -> tuple:
    """What must be alike: the names of the records, those of the metrics, and how many numbers each metric has."""
    records = *reply.content.array_records, *reply.content.metric_records
    said = next(iter(reply.content.metric_records.values()))
    return *records, frozenset((name, len(v) if isinstance(v, list) else -1) for name, v in said.items())


def _arrays(record: ArrayRecord) -> State:
    return {name: array.numpy() for name, array in record.items()}
