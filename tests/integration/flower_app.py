"""A real Flower simulation on digits, 10 clients of which 3 put a trigger in: python flower_app.py API FOLDER DETECTOR.

First without a filter, then with it, from the same model; prints one line of JSON with what was reached. The message
API runs a third time with personal heads: clients keep the layer `out`, and the rest is recorded in FOLDER-personal.
"""

import json
import os
import sys
from pathlib import Path

os.environ["FLWR_TELEMETRY_ENABLED"] = os.environ["RAY_USAGE_STATS_ENABLED"] = "0"

import numpy as np
from digits import CLIENTS, ROUNDS, SIZES, reached, start, trained


def message_apps(folder, detector):
    from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
    from flwr.clientapp import ClientApp
    from flwr.serverapp import ServerApp
    from flwr.serverapp.strategy import FedAvg

    from gradlens import Recorder
    from gradlens.integrations.flower import GradlensStrategy

    server, clients = ServerApp(), ClientApp()

    def record(state):
        return ArrayRecord({name: Array(array) for name, array in state.items()})

    def state(arrays):
        return {name: array.numpy() for name, array in arrays.items()}

    @clients.train()
    def train(message, context):
        number = int(context.node_config["partition-id"])
        personal = bool(message.content["config"].get("personal"))
        start = state(message.content["arrays"])
        if personal and "head" in context.state:
            start |= state(context.state["head"])
        model, examples = trained(start, number)
        if personal:
            context.state["head"] = record({name: model.pop(name) for name in SIZES if name.startswith("out.")})
        said = MetricRecord({"num-examples": examples, "partition-id": number})
        return Message(RecordDict({"arrays": record(model), "metrics": said}), reply_to=message)

    @server.main()
    def main(grid, context):
        inner = FedAvg(fraction_evaluate=0.0, min_train_nodes=CLIENTS, min_available_nodes=CLIENTS)
        plain = inner.start(grid, record(start()), num_rounds=ROUNDS)
        with Recorder(folder, detector=detector) as recorder:
            kept = GradlensStrategy(inner, recorder).start(grid, record(start()), num_rounds=ROUNDS)
        with Recorder(f"{folder}-personal", layers=["hidden.*"]) as recorder:
            strategy, config = GradlensStrategy(inner, recorder), ConfigRecord({"personal": True})
            body = strategy.start(grid, record(start()), num_rounds=ROUNDS, train_config=config)
        np.savez(f"{folder}-personal.npz", **state(body.arrays))
        print(json.dumps({"without": reached(state(plain.arrays)), "with": reached(state(kept.arrays))}))

    return server, clients


def classic_apps(folder, detector):
    from flwr.client import ClientApp, NumPyClient
    from flwr.common import ndarrays_to_parameters
    from flwr.server import ServerApp, ServerAppComponents, ServerConfig
    from flwr.server.strategy import FedAvg

    from gradlens import Recorder
    from gradlens.integrations.flower_classic import ClassicStrategy

    recorder = Recorder(folder, detector=detector)

    class Client(NumPyClient):
        def __init__(self, number):
            self.number = number

        def fit(self, parameters, config):
            model, examples = trained(dict(zip(SIZES, parameters, strict=True)), self.number)
            return list(model.values()), examples, {"partition-id": self.number}

    def evaluate(server_round, arrays, config):
        if server_round == ROUNDS:
            print(json.dumps({"with": reached(dict(zip(SIZES, arrays, strict=True)))}))
            recorder.close()

    def server(context):
        inner = FedAvg(
            fraction_evaluate=0.0,
            min_fit_clients=CLIENTS,
            min_available_clients=CLIENTS,
            initial_parameters=ndarrays_to_parameters(list(start().values())),
            evaluate_fn=evaluate,
        )
        strategy = ClassicStrategy(inner, recorder, list(SIZES))
        return ServerAppComponents(strategy=strategy, config=ServerConfig(num_rounds=ROUNDS))

    def client(context):
        return Client(int(context.node_config["partition-id"])).to_client()

    return ServerApp(server_fn=server), ClientApp(client_fn=client)


if __name__ == "__main__":
    import flower_app  # this file as a module, which Ray's processes can import
    from flwr.simulation import run_simulation

    apps = {"message": flower_app.message_apps, "classic": flower_app.classic_apps}
    server, client = apps[sys.argv[1]](Path(sys.argv[2]), sys.argv[3])
    run_simulation(
        server_app=server,
        client_app=client,
        num_supernodes=CLIENTS,
        backend_config={"client_resources": {"num_cpus": 1, "num_gpus": 0.0}},
    )
