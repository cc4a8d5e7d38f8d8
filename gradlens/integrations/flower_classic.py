"""Flower's older strategies: one that wraps another, records every round and leaves out the clients that are flagged.

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
from gradlens.log.signatures import ROUND, SIGNATURE
from gradlens.server import Recorder

__all__ = ["ClassicStrategy"]


class ClassicStrategy(Strategy):
    """Wraps a strategy of `flwr.server`, which then sees only the results of the clients that are kept.

    Parameters
    ----------
    inner : flwr.server.strategy.Strategy
        The strategy that samples clients and aggregates their results.
    recorder : Recorder
        Records every round, and judges it if it has a filter.
    names : sequence of str
        Names of the model's layers in their order; these strategies exchange arrays without names.
    identity : str or None, default "partition-id"
        Name of the metric that holds a client's number, by which the client is named (see `Clients`). None: clients are
        named by the ids of their nodes.

    Notes
    -----
    What the inner strategy aggregates is recorded as the next global model. If nobody is kept, the model stays.

    A client's signature (`gradlens.custody.sign_update`) is its metric "gradlens-signature". If the recorder has
    `client_keys`, clients are told which round to sign by "gradlens-round" in their config.

    Examples
    --------
    >>> from flwr.server.strategy import FedAvg
    >>> strategy = ClassicStrategy(FedAvg(), Recorder(detector="final_rows"), names=["fc.weight", "fc.bias"])
    >>> strategy.names
    ('fc.weight', 'fc.bias')
    """

    def __init__(
        self, inner: Strategy, recorder: Recorder, names: Sequence[str], *, identity: str | None = "partition-id"
    ) -> None:
        self.inner, self.recorder, self.names = inner, recorder, tuple(names)
        self._clients = Clients(identity)

    def initialize_parameters(self, client_manager: ClientManager) -> Parameters | None:
        """Returns the inner strategy's initial model."""
        return self.inner.initialize_parameters(client_manager)

    def configure_fit(self, server_round: int, parameters: Parameters, client_manager: ClientManager) -> list:
        """Remembers the global model that clients are sent, then configures training as the inner strategy does.

        Raises
        ------
        InputError
            If `names` does not have one name per array of the model.
        """
        if (count := len(parameters.tensors)) != len(self.names):
            raise InputError(f"ClassicStrategy: names name {len(self.names)} layers, the model has {count}")
        self._sent = parameters
        instructions = self.inner.configure_fit(server_round, parameters, client_manager)
        if self.recorder.client_keys is not None:
            number = self.recorder.next_round(self._layers(parameters))
            for _, instruction in instructions:
                instruction.config[ROUND] = number
        return instructions

    def aggregate_fit(
        self, server_round: int, results: list[tuple[ClientProxy, FitRes]], failures: list
    ) -> tuple[Parameters | None, dict[str, Scalar]]:
        """Records and judges a round, then lets the inner strategy aggregate the clients that are kept.

        Parameters
        ----------
        server_round : int
            Flower's number of the round.
        results : list of (ClientProxy, FitRes)
            What the clients sent.
        failures : list
            (ClientProxy, FitRes) pairs are recorded as refused; exceptions are not, as they name no client.

        Returns
        -------
        parameters : Parameters or None
            What the inner strategy aggregated; None if nobody is kept, so that the model stays.
        metrics : dict of str to Scalar
            The inner strategy's; {} if nobody is kept.

        Raises
        ------
        FilterStopped
            If the recorder's filter is set to stop in such a round.
        """
        named = [failure for failure in failures if isinstance(failure, tuple)]
        self._clients.hear((client.cid, result.metrics) for client, result in [*results, *named])
        answers = [self._answer(*result) for result in results]
        answers += [self._answer(*failure, failed=True) for failure in named]
        chosen = [_changed(answer) for answer in kept(self.recorder, self._layers(self._sent), answers)]
        parameters, metrics = self.inner.aggregate_fit(server_round, chosen, failures) if chosen else (None, {})
        self.recorder.commit(self._layers(parameters or self._sent), self._clients.without_claims(numbers(metrics)))
        return parameters, metrics

    def configure_evaluate(self, server_round: int, parameters: Parameters, client_manager: ClientManager) -> list:
        """Configures evaluation as the inner strategy does."""
        return self.inner.configure_evaluate(server_round, parameters, client_manager)

    def aggregate_evaluate(self, server_round: int, results: list, failures: list) -> tuple[float | None, dict]:
        """Aggregates evaluation results as the inner strategy does."""
        return self.inner.aggregate_evaluate(server_round, results, failures)

    def evaluate(self, server_round: int, parameters: Parameters) -> tuple[float, dict[str, Scalar]] | None:
        """Evaluates the global model at the server as the inner strategy does."""
        return self.inner.evaluate(server_round, parameters)

    def _layers(self, parameters: Parameters) -> State:
        """Layer -> array; one array too many is called "array 7" or so, which the recorder refuses as unknown."""
        named = zip_longest(self.names, parameters_to_ndarrays(parameters))
        return {name or f"array {place}": array for place, (name, array) in enumerate(named) if array is not None}

    def _answer(self, client: ClientProxy, result: FitRes, failed: bool = False) -> Answer:
        state = (
            Unfit(f"failed: {shown(result.status)}") if failed else read_safely(lambda: self._layers(result.parameters))
        )
        name, signature = self._clients.name(client.cid, result.metrics), result.metrics.get(SIGNATURE)
        return Answer((client, result), name, state, result.num_examples, signature)


def _changed(answer: Kept) -> tuple[ClientProxy, FitRes]:
    """The result, with its arrays and its claimed number of examples replaced where the answer says so."""
    client, result = answer.message
    if answer.state:
        result = replace(result, parameters=ndarrays_to_parameters(list(answer.state.values())))
    return client, result if answer.num_examples is None else replace(result, num_examples=answer.num_examples)
