"""A real NVFlare simulation on digits, 6 clients, 2 with a trigger: python nvflare_app.py KIND FOLDER DETECTOR.

KIND: what clients send, FULL or DIFF as arrays, or BFLOAT16: full models as tensors of that type, on both sides. The
last global model is left in FOLDER/KIND.npz, the run in FOLDER/KIND, what a client was sent in FOLDER/KIND-ROUND.npz.
"""

import sys
from pathlib import Path

import numpy as np
from nvflare.apis.dxo import DXO, DataKind, MetaKey, from_shareable
from nvflare.apis.executor import Executor
from nvflare.app_common.abstract.model import make_model_learnable
from nvflare.app_common.abstract.model_persistor import ModelPersistor
from nvflare.app_common.app_constant import AppConstants

CLIENTS, ROUNDS = 6, 3


def tensors(model):
    """The model as tensors of bfloat16, which FLARE is taught to send."""
    import torch
    from nvflare.app_opt.pt.decomposers import TensorDecomposer
    from nvflare.fuel.utils import fobs

    fobs.register(TensorDecomposer)
    return {name: torch.tensor(array).bfloat16() for name, array in model.items()}


def arrays(model):
    """The model as arrays of float32, whichever it came as."""
    return {name: array.float().numpy() if hasattr(array, "float") else array for name, array in model.items()}


class DigitsExecutor(Executor):
    """Trains what `digits.trained` does, as the client that its site is named after."""

    def __init__(self, kind="FULL", folder=""):
        super().__init__()
        self.kind, self.folder = kind, folder
        if kind == "BFLOAT16":
            tensors({})

    def execute(self, task_name, shareable, fl_ctx, abort_signal):
        from digits import trained

        model = arrays(from_shareable(shareable).data)
        client = int(fl_ctx.get_identity_name().removeprefix("site-")) - 1
        if client == 0:
            np.savez(f"{self.folder}/{self.kind}-{shareable.get_header(AppConstants.CURRENT_ROUND)}.npz", **model)
        local, examples = trained(model, client)
        if self.kind == "DIFF":
            local = {name: array - model[name] for name, array in local.items()}
        if self.kind == "BFLOAT16":
            local = tensors(local)
        kind = DataKind.WEIGHT_DIFF if self.kind == "DIFF" else DataKind.WEIGHTS
        return DXO(kind, data=local, meta={MetaKey.NUM_STEPS_CURRENT_ROUND: examples}).to_shareable()


class DigitsPersistor(ModelPersistor):
    """Begins with the model of `digits.start`, writes the last one."""

    def __init__(self, path="", kind="FULL"):
        super().__init__()
        self.path, self.kind = path, kind

    def load_model(self, fl_ctx):
        from digits import start

        return make_model_learnable(tensors(start()) if self.kind == "BFLOAT16" else start(), {})

    def save_model(self, model, fl_ctx):
        np.savez(self.path, **arrays(model["weights"]))


if __name__ == "__main__":
    import nvflare_app  # this file as a module, from which FLARE builds its components again
    from nvflare.app_common.workflows.fedavg import FedAvg
    from nvflare.job_config.api import FedJob

    from gradlens.integrations.nvflare import GradlensAggregator

    kind, folder, detector = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
    aggregator = GradlensAggregator(str(folder / kind), detector, settings={"aggregator": {"weighted": True}})
    job = FedJob(name="digits", min_clients=CLIENTS)
    job.to_server(nvflare_app.DigitsPersistor(str(folder / f"{kind}.npz"), kind), id="persistor")
    job.to_server(FedAvg(num_clients=CLIENTS, num_rounds=ROUNDS, persistor_id="persistor", aggregator=aggregator))
    job.to_clients(nvflare_app.DigitsExecutor(kind, str(folder)))
    job.simulator_run(str(folder / f"workspace-{kind}"), n_clients=CLIENTS, threads=CLIENTS)
