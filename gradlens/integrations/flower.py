"""Flower: a strategy that wraps another one, records every round and leaves out the clients that the filter flags.

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
from gradlens.log.signatures import ROUND, SIGNATURE
from gradlens.server import Recorder
from gradlens.words import several

__all__ = ["GradlensStrategy"]


class GradlensStrategy(Strategy):
    """Wraps a strategy of Flower's message API, which then sees only the replies of the clients that are kept.

    Parameters
    ----------
    inner : flwr.serverapp.strategy.Strategy
        The strategy that samples clients and aggregates their replies.
    recorder : Recorder
        Records every round, and judges it if it has a filter.
    weighted_by_key : str, optional
        Name of the metric that holds a client's number of examples; by default the inner strategy's, or "num-examples".
    identity : str or None, default "partition-id"
        Name of the metric that holds a client's number, by which the client is named (see `Clients`). None: clients are
        named by the ids of their nodes.

    Notes
    -----
    What the inner strategy aggregates is recorded as the next global model. If nobody is kept, the model stays.

    A client's signature (`gradlens.custody.sign_update`) is the value "gradlens-signature" of a ConfigRecord in its
    reply. If the recorder has `client_keys`, clients are told which round to sign by "gradlens-round" in their config.

    Examples
    --------
    >>> from flwr.serverapp.strategy import FedAvg
    >>> strategy = GradlensStrategy(FedAvg(), Recorder(detector="final_rows"))
    >>> type(strategy.inner).__name__, strategy.weighted_by_key
    ('FedAvg', 'num-examples')
    """

    def __init__(
        self,
        inner: Strategy,
        recorder: Recorder,
        *,
        weighted_by_key: str | None = None,
        identity: str | None = "partition-id",
    ) -> None:
        self.inner, self.recorder = inner, recorder
        self.weighted_by_key: str = weighted_by_key or getattr(inner, "weighted_by_key", None) or "num-examples"
        self._clients = Clients(identity)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Remembers the global model that clients are sent, then configures training as the inner strategy does."""
        self._sent = arrays
        if self.recorder.client_keys is not None:
            config = ConfigRecord({**config, ROUND: self.recorder.next_round(_arrays(arrays))})
        return self.inner.configure_train(server_round, arrays, config, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Records and judges a round, then lets the inner strategy aggregate the clients that are kept.

        Parameters
        ----------
        server_round : int
            Flower's number of the round.
        replies : iterable of flwr.app.Message
            What the clients sent, failures included.

        Returns
        -------
        arrays : ArrayRecord
            The next global model; the one before if nobody is kept.
        metrics : MetricRecord or None
            The inner strategy's; None if nobody is kept.

        Raises
        ------
        FilterStopped
            If the recorder's filter is set to stop in such a round.
        """
        arrived = list(replies)
        self._clients.hear((_node(reply), _claims(reply)) for reply in arrived)
        answers = _of_one_form([self._answer(reply) for reply in arrived])
        chosen = [self._changed(answer) for answer in kept(self.recorder, _arrays(self._sent), answers)]
        failed = [answer.message for answer in answers if answer.message.has_error()]  # for the inner strategy's log
        arrays, metrics = self.inner.aggregate_train(server_round, chosen + failed) if chosen else (None, None)
        arrays = arrays or self._sent  # without arrays in any round, Flower would return an empty record
        self.recorder.commit(_arrays(arrays), self._clients.without_claims(numbers(metrics)))
        return arrays, metrics

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Configures evaluation as the inner strategy does."""
        return self.inner.configure_evaluate(server_round, arrays, config, grid)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Aggregates evaluation metrics as the inner strategy does."""
        return self.inner.aggregate_evaluate(server_round, replies)

    def summary(self) -> None:
        """Logs the inner strategy's summary."""
        self.inner.summary()

    def _answer(self, reply: Message) -> Answer:
        node, claims = _node(reply), _claims(reply)
        if reply.has_error():
            return Answer(reply, self._clients.name(node, {}), Unfit(f"failed: {shown(reply.error.reason)}"))
        arrays, metrics = list(reply.content.array_records.values()), list(reply.content.metric_records.values())
        if len(arrays) == len(metrics) == 1:
            state = read_safely(lambda: _arrays(arrays[0]))
        else:
            state = Unfit(f"must send one ArrayRecord and one MetricRecord, found {len(arrays)} and {len(metrics)}")
        said = (record[SIGNATURE] for record in reply.content.config_records.values() if SIGNATURE in record)
        key, name = self.weighted_by_key, self._clients.name(node, claims)
        claim = claims[key] if key in claims else Unfit(f"sent no metric {key!r}, found {several(list(claims))}")
        return Answer(reply, name, state, claim, signature=next(said, None))

    def _changed(self, answer: Kept) -> Message:
        """The reply, with its arrays and its claimed number of examples replaced where the answer says so."""
        if not answer.state and answer.num_examples is None:
            return answer.message
        changed = copy(answer.message)
        content = RecordDict(dict(changed.content))
        if answer.state:
            record = ArrayRecord({layer: Array(array) for layer, array in answer.state.items()})
            content[next(iter(content.array_records))] = record
        if answer.num_examples is not None:
            name, metrics = next(iter(content.metric_records.items()))
            content[name] = MetricRecord({**metrics, self.weighted_by_key: answer.num_examples})
        changed.content = content
        return changed


def _node(reply: Message) -> str:
    return str(reply.metadata.src_node_id)


def _claims(reply: Message) -> Mapping[str, Any]:
    """The metrics that came with a reply."""
    records = [] if reply.has_error() else list(reply.content.metric_records.values())
    return records[0] if records else {}


def _of_one_form(answers: list[Answer]) -> list[Answer]:
    """Refuses answers whose records or metrics have other names than most: Flower's strategies raise on a mixture."""
    forms = [_form(answer.message) if not isinstance(answer.state, Unfit) else None for answer in answers]
    usual = next(iter(Counter(form for form in forms if form).most_common(1)), (None, 0))[0]
    odd = Unfit("its records or metrics are called otherwise than those of most")
    return [
        replace(answer, state=odd) if form and form != usual else answer
        for answer, form in zip(answers, forms, strict=True)
    ]


def _form(reply: Message) -> tuple:
    """What all replies must share: the names of their records and metrics, and the length of each metric."""
    records = *reply.content.array_records, *reply.content.metric_records
    metrics = next(iter(reply.content.metric_records.values()))
    return *records, frozenset((name, len(v) if isinstance(v, list) else -1) for name, v in metrics.items())


def _arrays(record: ArrayRecord) -> State:
    return {name: array.numpy() for name, array in record.items()}
