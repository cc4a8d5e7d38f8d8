"""NVIDIA FLARE: an aggregator that records every round and leaves out whom the filter distrusts.

    aggregator = GradlensAggregator("/runs/live", detector="final_rows")
    job.to_server(FedAvg(num_clients=10, num_rounds=5, model=state, aggregator=aggregator))

Tested with nvflare 2.9, in its simulator. All settings are plain values, for FLARE writes a job's components down and
builds them again at its server.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from nvflare.apis.event_type import EventType
from nvflare.apis.fl_constant import FLMetaKey
from nvflare.apis.fl_context import FLContext
from nvflare.app_common.abstract.fl_model import FLModel, ParamsType
from nvflare.app_common.aggregators.model_aggregator import ModelAggregator
from nvflare.app_common.app_constant import AppConstants
from nvflare.app_common.app_event_type import AppEventType
from nvflare.app_common.utils.fl_model_utils import FLModelUtils

from gradlens.aggregators import AGGREGATORS, Aggregator, FilteredAggregator, filtered, step
from gradlens.detectors import DETECTORS
from gradlens.errors import InputError
from gradlens.integrations import numbers, read_safely
from gradlens.log import UpdateLog
from gradlens.log.intake import Unfit, as_array
from gradlens.names import named
from gradlens.server import Recorder

__all__ = ["GradlensAggregator"]


class GradlensAggregator(ModelAggregator):
    """A `ModelAggregator` that records, filters, or both, and aggregates by one of our own rules.

    path: the folder of the run, "" = only judge; detector: its name, "" = only record; aggregator: the name of the
    rule; settings: of each, {"detector": {...}, "aggregator": {"weighted": True}, "filter": {...}}. A client's steps
    are its number of examples. Clients send FULL models or a DIFF, as most of them do in the first round; the same
    comes out. Where nobody is kept, the global model stays.
    Raises: InputError for a name that is not known; in a round whose global model nothing told.
    """

    def __init__(
        self, path: str = "", detector: str = "", aggregator: str = "mean", settings: dict[str, Any] | None = None
    ) -> None:
        super().__init__()
        self.path, self.detector, self.aggregator, self.settings = path, detector, aggregator, settings
        given: dict[str, Any] = {"detector": {}, "aggregator": {}, "filter": {}}
        if unknown := [part for part in settings or {} if part not in given]:
            raise InputError(f"settings: expected tables of {', '.join(given)}, found {unknown[0]!r:.80}")
        given |= settings or {}
        self._rule: Aggregator = named("aggregators", AGGREGATORS, aggregator)(**given["aggregator"])
        self._filter: FilteredAggregator | None = None
        if detector:
            judge = named("detectors", DETECTORS, detector)(**given["detector"])
            self._filter = filtered(self._rule, judge, **given["filter"])
        self._recorder: Recorder | None = None
        self._global: Mapping[str, Any] = {}
        self._models: list[FLModel] = []

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        """Keeps the global model that the clients are sent, which no aggregator is told; ends the run."""
        super().handle_event(event_type, fl_ctx)
        if event_type == AppEventType.BEFORE_TRAIN_TASK:
            shareable: Any = fl_ctx.get_prop(AppConstants.TRAIN_SHAREABLE)
            self._global = dict(FLModelUtils.from_shareable(shareable).params or {})
        elif event_type == EventType.END_RUN and self._recorder is not None:
            self._recorder.close()

    @property
    def log(self) -> UpdateLog:
        """The rounds so far; raises InputError before the first."""
        if self._recorder is None:
            raise InputError("there is no log before the first round")
        return self._recorder.log

    def accept_model(self, model: FLModel) -> None:
        """Keeps what one client sent until all have."""
        self._models.append(model)

    def reset_stats(self) -> None:
        """Forgets what the clients of the last round sent."""
        self._models = []

    def aggregate_model(self) -> FLModel:
        """Records and judges the round, and aggregates who is kept."""
        if not self._global:
            raise InputError(
                "GradlensAggregator: no global model was sent before this round, found nothing to aggregate"
            )
        start = {name: as_array(value)[0] for name, value in self._global.items()}
        models, self._models = self._models, []
        if self._recorder is None:
            sent = "updates" if models and _usual(models) == ParamsType.DIFF else "models"
            self._recorder = Recorder(
                self.path or None, filter=self._filter, sent=sent, source={"framework": "nvflare"}
            )
        recorder = self._recorder
        kind = ParamsType.DIFF if recorder.sent == "updates" else ParamsType.FULL
        steps = {_name(model): model.meta.get(FLMetaKey.NUM_STEPS_CURRENT_ROUND, 1) for model in models}
        decision = recorder.log_round(start, [(_name(model), _state(model, kind)) for model in models], steps)
        update = (self._filter or self._rule)(recorder.log)
        if kind == ParamsType.DIFF:
            result, after = update, {name: start[name] + update[name] for name in start}  # as FLARE adds them
        else:
            result = after = step(start, update, buffers=recorder.log.model.buffers)
        counted = set(decision.clients[decision.weights > 0].tolist())
        metrics = _means([model for model in models if _name(model) in counted])
        recorder.commit(after, metrics)
        params = {name: _like(result[name], value) for name, value in self._global.items()}
        return FLModel(params_type=kind, params=params, metrics=metrics or None)


def _name(model: FLModel) -> str:
    return str(model.meta.get("client_name", "unknown"))


def _usual(models: Sequence[FLModel]) -> ParamsType | None:
    return Counter(model.params_type for model in models).most_common(1)[0][0]


def _state(model: FLModel, kind: ParamsType) -> Any:
    """Layer -> array, or why there is none; what FLARE left on the disk is read."""
    if model.params_type != kind:
        return Unfit(f"sent {model.params_type}, where {kind} is expected")
    params = model.params
    if not isinstance(params, Mapping):
        return params
    return read_safely(lambda: {n: v.materialize() if hasattr(v, "materialize") else v for n, v in params.items()})


def _means(models: Sequence[FLModel]) -> dict[str, float]:
    """The mean of each metric that all of these clients sent."""
    said = [numbers(model.metrics) for model in models]
    shared = set.intersection(*map(set, said)) if said else set()
    return {name: float(np.mean([each[name] for each in said])) for name in sorted(shared)}


def _like(array: np.ndarray, value: Any) -> Any:
    """The array as what the global model is made of: a tensor of its own library, or numpy's."""
    return value.new_tensor(array) if hasattr(value, "new_tensor") else array
