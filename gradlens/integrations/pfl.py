"""pfl: records the update of every user of a simulation.

    recording = PflRecorder(Recorder("runs/live", sent="updates"))
    backend = SimulatedBackend(train, val, postprocessors=[recording, ...])
    algorithm.run(..., callbacks=[recording, ...])

Tested with pfl 0.6, which needs Python below 3.13. As the first postprocessor it records what a user trained, as the
last one what is sent after clipping and noise. pfl sums up users as they finish, so that there is nothing to filter:
judge the recorded run with `gradlens detect`. Where pfl runs in several processes, each of them records its own users
into a folder of its own.
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
    """Records every user's update and every global model; pass it to pfl as a postprocessor and as a callback.

    Parameters
    ----------
    recorder : Recorder
        Made by `Recorder(path, sent="updates")`, without a detector or filter.

    Raises
    ------
    InputError
        If the recorder has a filter, or expects models.

    Notes
    -----
    A central iteration in which users train is a round. A user who is drawn several times in a round is recorded as
    several clients: "7", "7 (2)", "7 (3)".

    Examples
    --------
    >>> recording = PflRecorder(Recorder(sent="updates"))
    >>> recording.recorder
    Recorder(in memory, 0 rounds, 0 lost, filter=None)
    """

    def __init__(self, recorder: Recorder) -> None:
        if recorder.filter is not None or recorder.sent != "updates":
            raise InputError('PflRecorder: expected Recorder(path, sent="updates") without a detector or filter')
        self.recorder = recorder
        self._global: State = {}
        self._forget()

    def on_train_begin(self, *, model: Any) -> Metrics:
        """Remembers the global model before the first round.

        Parameters
        ----------
        model : object
            pfl's model, whose `get_parameters` are read.

        Returns
        -------
        Metrics
            Empty.
        """
        self._global = _arrays(model.get_parameters())
        return Metrics()

    def postprocess_one_user(
        self, *, stats: MappedVectorStatistics, user_context: UserContext
    ) -> tuple[MappedVectorStatistics, Metrics]:
        """Stores a copy of the user's update, divided by its weight; pfl's own statistics stay as they are.

        Parameters
        ----------
        stats : MappedVectorStatistics
            The user's update, times its weight.
        user_context : UserContext
            Gives the user's id and number of examples.

        Returns
        -------
        stats : MappedVectorStatistics
            As given.
        metrics : Metrics
            Empty.

        Raises
        ------
        InputError
            If the user has no id.
        """
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
        """Records the round and the global model after it; an iteration in which no user trained is skipped.

        Parameters
        ----------
        aggregate_metrics : Metrics
            pfl's metrics, which are not recorded.
        model : object
            pfl's model after the iteration.
        central_iteration : int
            pfl's number of the iteration, which is not recorded.

        Returns
        -------
        stop : bool
            False: training goes on.
        metrics : Metrics
            Empty.
        """
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
    """Layer -> array, copied because pfl reuses the memory for the next user."""
    return {name: as_array(value)[0].copy() for name, value in stats.items()}
