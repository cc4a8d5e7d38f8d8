"""Flower's older strategies: one that stands around another, records every round and leaves out whom it distrusts.

    strategy = ClassicStrategy(FedAvg(), recorder, names=list(model.state_dict()))

Tested with `flwr.server` of flwr 1.41.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import zip_longest

from flwr.common import FitRes, Parameters, Scalar, ndarrays_to_parameters, parameters_to_ndarrays
from flwr.server.client_manager import ClientManager
from flwr.server.client_proxy import ClientProxy
from flwr.server.strategy import Strategy

from gradlens.errors import InputError
from gradlens.integrations import Answer, Clients, Kept, State, kept, numbers, read_safely
from gradlens.log.intake import Unfit, shown
from gradlens.server import Recorder

__all__ = ["ClassicStrategy"]


class ClassicStrategy(Strategy):
    """Around any strategy of `flwr.server`, which sees the results of those who are kept.

    What it makes of them is recorded as the next global model; where nobody is kept, the model stays.
    names: of the model's layers in their order, which are not sent here; identity: the metric that tells who is
    behind a node (`Clients`), None: the nodes' ids alone count.
    """

    def __init__(
        self, inner: Strategy, recorder: Recorder, names: Sequence[str], *, identity: str | None = "partition-id"
    ) -> None:
        self.inner, self.recorder, self.names = inner, recorder, tuple(names)
        self._clients = Clients(identity)

    def initialize_parameters(self, client_manager: ClientManager) -> Parameters | None:
        """As the inner strategy."""
        return self.inner.initialize_parameters(client_manager)

    def configure_fit(self, server_round: int, parameters: Parameters, client_manager: ClientManager) -> list:
        """Keeps the global model, for results are local models, and asks the inner strategy; raises InputError."""
        if (found := len(parameters.tensors)) != len(self.names):
            raise InputError(f"ClassicStrategy: names name {len(self.names)} layers, the model has {found}")
        self._sent = parameters
        return self.inner.configure_fit(server_round, parameters, client_manager)

    def aggregate_fit(
        self, server_round: int, results: list[tuple[ClientProxy, FitRes]], failures: list
    ) -> tuple[Parameters | None, dict[str, Scalar]]:
        """Records and judges the round; the inner strategy aggregates who is kept. An exception names no client."""
        told = [*results, *(each for each in failures if isinstance(each, tuple))]
        self._clients.hear((client.cid, result.metrics) for client, result in told)
        failed = [self._answer(*each, failed=True) for each in failures if isinstance(each, tuple)]
        answers = [self._answer(*each) for each in results] + failed
        found = [_changed(each) for each in kept(self.recorder, self._layers(self._sent), answers)]
        parameters, metrics = self.inner.aggregate_fit(server_round, found, failures) if found else (None, {})
        self.recorder.commit(self._layers(parameters or self._sent), self._clients.without_claims(numbers(metrics)))
        return parameters, metrics

    def configure_evaluate(self, server_round: int, parameters: Parameters, client_manager: ClientManager) -> list:
        """As the inner strategy."""
        return self.inner.configure_evaluate(server_round, parameters, client_manager)

    def aggregate_evaluate(self, server_round: int, results: list, failures: list) -> tuple[float | None, dict]:
        """As the inner strategy."""
        return self.inner.aggregate_evaluate(server_round, results, failures)

    def evaluate(self, server_round: int, parameters: Parameters) -> tuple[float, dict[str, Scalar]] | None:
        """As the inner strategy."""
        return self.inner.evaluate(server_round, parameters)

    def _layers(self, parameters: Parameters) -> State:
        """Layer -> array; a number of arrays that is not that of `names` shows in the names."""
        named = zip_longest(self.names, parameters_to_ndarrays(parameters))
        return {name or f"array {place}": array for place, (name, array) in enumerate(named) if array is not None}

    def _answer(self, client: ClientProxy, result: FitRes, failed: bool = False) -> Answer:
        state = (
            Unfit(f"failed: {shown(result.status)}") if failed else read_safely(lambda: self._layers(result.parameters))
        )
        return Answer((client, result), self._clients.name(client.cid, result.metrics), state, result.num_examples)


def _changed(answer: Kept) -> tuple[ClientProxy, FitRes]:
    """The result with what is put in place of its arrays and of its claim of examples."""
    client, result = answer.message
    if answer.state:
        result = replace(result, parameters=ndarrays_to_parameters(list(answer.state.values())))
    return client, result if answer.num_examples is None else replace(result, num_examples=answer.num_examples)
