"""pfl: records what every user of a simulation sends.

    recording = PflRecorder(Recorder("runs/live", sent="updates"))
    backend = SimulatedBackend(train, val, postprocessors=[recording, ...])
    algorithm.run(..., callbacks=[recording, ...])

Tested with pfl 0.6, which needs Python below 3.13. Put first among the postprocessors, it sees what a user trained; put
last, what is sent after clipping and noise. pfl sums users as they finish, so there is nothing to filter: judge the
recorded run with `gradlens detect`. Of several processes each records its own users, into a folder of its own.
"""

from collections import Counter
from typing import Any

import numpy as np
from pfl.callback.base import TrainingProcessCallback
from pfl.context import UserContext
from pfl.metrics import Metrics
from pfl.postprocessor.base import Postprocessor
from pfl.stats import MappedVectorStatistics

from gradlens.errors import InputError
from gradlens.integrations import State
from gradlens.log.intake import as_array
from gradlens.server import Recorder

__all__ = ["PflRecorder"]


class PflRecorder(Postprocessor, TrainingProcessCallback):
    """A postprocessor and a callback in one, to be given as both; a central iteration that trains is a round.

    A user who is drawn again in a round is another client of it: "7", "7 (2)", "7 (3)".
    Raises: InputError where the recorder filters, or expects models; in a round with a user that has no id.
    """

    def __init__(self, recorder: Recorder) -> None:
        if recorder.filter is not None or recorder.sent != "updates":
            raise InputError('PflRecorder: expected Recorder(path, sent="updates") without a detector or filter')
        self.recorder = recorder
        self._global: State = {}
        self._forget()

    def on_train_begin(self, *, model: Any) -> Metrics:
        """Keeps the global model."""
        self._global = _arrays(model.get_parameters())
        return Metrics()

    def postprocess_one_user(
        self, *, stats: MappedVectorStatistics, user_context: UserContext
    ) -> tuple[MappedVectorStatistics, Metrics]:
        """Keeps a copy of the user's update, its weight taken out; what pfl goes on with stays as it is."""
        if user_context.user_id is None:
            raise InputError("PflRecorder: every user needs an id, found None; give the federated dataset user ids")
        user = str(user_context.user_id)
        self._drawn[user] += 1
        client = user if self._drawn[user] == 1 else f"{user} ({self._drawn[user]})"
        update = {name: array / np.float32(stats.weight) for name, array in _arrays(stats).items()}
        self._sent[client], self._examples[client] = update, user_context.num_datapoints
        return stats, Metrics()

    def after_central_iteration(
        self, aggregate_metrics: Metrics, model: Any, *, central_iteration: int
    ) -> tuple[bool, Metrics]:
        """Records the round and the model that came of it; an iteration that trained nobody is none."""
        if self._sent:
            self.recorder.log_round(self._global, self._sent, self._examples)
            self._global = _arrays(model.get_parameters())
            self.recorder.commit(self._global)
        self._forget()
        return False, Metrics()

    def _forget(self) -> None:
        self._sent: dict[str, State] = {}
        self._examples: dict[str, int] = {}
        self._drawn = Counter[str]()


def _arrays(stats: MappedVectorStatistics) -> dict[str, np.ndarray]:
    """Layer -> array, copied: pfl writes the next user into the same memory."""
    return {name: as_array(value)[0].copy() for name, value in stats.items()}
