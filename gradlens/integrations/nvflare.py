"""NVIDIA FLARE: an aggregator that records every round and leaves out the clients that the filter flags.

    aggregator = GradlensAggregator("/runs/live", detector="final_rows")
    job.to_server(FedAvg(num_clients=10, num_rounds=5, model=state, aggregator=aggregator))

Tested with nvflare 2.9, in its simulator. All settings are plain values, because FLARE writes a job's components to a
file and builds them again at its server.
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

RECORDED = ("final_layer", "layers", "buffers", "evidence", "strict")  # settings of the recorder


class GradlensAggregator(ModelAggregator):
    """A FLARE aggregator that records every round, filters it, or both, and aggregates by a gradlens rule.

    Parameters
    ----------
    path : str, default ""
        The folder of the run; "": nothing is recorded.
    detector : str, default ""
        Name of the filter's detector; "": there is no filter.
    aggregator : str, default "mean"
        Name of the aggregation rule.
    settings : dict, optional
        Settings of each, such as {"detector": {...}, "aggregator": {"weighted": True}, "filter": {...}}, and of the
        recorder: {"recorder": {"final_layer": "head", "layers": ["body.*"], "evidence": "sketch"}}.

    Raises
    ------
    InputError
        If a name or a table of settings is unknown, or a setting is out of its range.

    Notes
    -----
    A client's number of local steps counts as its number of examples. Whether clients send FULL models or a DIFF is
    decided by the majority in the first round, and the aggregate has the same form. If nobody is kept, the global model
    stays.

    Examples
    --------
    >>> aggregator = GradlensAggregator(detector="final_rows", aggregator="trimmed_mean")
    >>> aggregator.detector, aggregator.aggregator
    ('final_rows', 'trimmed_mean')
    """

    def __init__(
        self, path: str = "", detector: str = "", aggregator: str = "mean", settings: dict[str, Any] | None = None
    ) -> None:
        super().__init__()
        self.path, self.detector, self.aggregator, self.settings = path, detector, aggregator, settings
        tables: dict[str, Any] = {"detector": {}, "aggregator": {}, "filter": {}, "recorder": {}}
        if unknown := [name for name in settings or {} if name not in tables]:
            raise InputError(f"settings: expected tables of {', '.join(tables)}, found {unknown[0]!r:.80}")
        tables |= settings or {}
        if unknown := [name for name in tables["recorder"] if name not in RECORDED]:
            raise InputError(f"settings: recorder: expected {', '.join(RECORDED)}, found {unknown[0]!r:.80}")
        self._rule: Aggregator = named("aggregators", AGGREGATORS, aggregator)(**tables["aggregator"])
        self._filter: FilteredAggregator | None = None
        if detector:
            judge = named("detectors", DETECTORS, detector)(**tables["detector"])
            self._filter = filtered(self._rule, judge, **tables["filter"])
        self._recording, self._recorder = tables["recorder"], None
        self._global: Mapping[str, Any] = {}
        self._models: list[FLModel] = []

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        """Remembers the global model that clients are sent, and closes the run at its end.

        FLARE gives an aggregator what the clients send, but not the model that they started from.

        Parameters
        ----------
        event_type : str
            FLARE's name of the event.
        fl_ctx : FLContext
            FLARE's context, which holds the model that is sent.
        """
        super().handle_event(event_type, fl_ctx)
        if event_type == AppEventType.BEFORE_TRAIN_TASK:
            shareable: Any = fl_ctx.get_prop(AppConstants.TRAIN_SHAREABLE)
            self._global = dict(FLModelUtils.from_shareable(shareable).params or {})
        elif event_type == EventType.END_RUN and self._recorder is not None:
            self._recorder.close()

    @property
    def log(self) -> UpdateLog:
        """The rounds recorded so far; raises InputError before the first."""
        if self._recorder is None:
            raise InputError("there is no log before the first round")
        return self._recorder.log

    def accept_model(self, model: FLModel) -> None:
        """Stores what one client sent until the round is aggregated."""
        self._models.append(model)

    def reset_stats(self) -> None:
        """Discards what clients have sent so far."""
        self._models = []

    def aggregate_model(self) -> FLModel:
        """Records and judges the round, and aggregates the clients that are kept.

        Returns
        -------
        FLModel
            A FULL model or a DIFF, as the clients send it, with the mean of the metrics that all clients that are kept
            sent.

        Raises
        ------
        InputError
            If no global model was sent before this round, or its layers are not those of the rounds before.
        FilterStopped
            If the filter is set to stop in such a round.
        """
        if not self._global:
            raise InputError("GradlensAggregator: no global model was sent before this round")
        start = {name: as_array(value)[0] for name, value in self._global.items()}
        models, self._models = self._models, []
        if self._recorder is None:
            sent = "updates" if models and _usual(models) == ParamsType.DIFF else "models"
            options: dict[str, Any] = {"sent": sent, "source": {"framework": "nvflare"}, **self._recording}
            self._recorder = Recorder(self.path or None, filter=self._filter, **options)
        recorder = self._recorder
        kind = ParamsType.DIFF if recorder.sent == "updates" else ParamsType.FULL
        steps = {_name(model): model.meta.get(FLMetaKey.NUM_STEPS_CURRENT_ROUND, 1) for model in models}
        decision = recorder.log_round(start, [(_name(model), _state(model, kind)) for model in models], steps)
        update = (self._filter or self._rule)(recorder.log)
        sent = {name: start[name] for name in recorder.model}
        result = update if kind == ParamsType.DIFF else step(sent, update, buffers=recorder.log.model.buffers)
        rest = {name: 0 * array if kind == ParamsType.DIFF else array for name, array in start.items()}  # not sent
        params = {name: _like((rest | result)[name], value) for name, value in self._global.items()}
        after = params  # in the server's type of numbers, as it will be sent
        if kind == ParamsType.DIFF:
            after = {name: value + params[name] for name, value in self._global.items()}  # as FLARE adds them
        chosen = set(decision.kept)
        metrics = _means([model for model in models if _name(model) in chosen])
        recorder.commit(after, metrics)
        return FLModel(params_type=kind, params=params, metrics=metrics or None)


def _name(model: FLModel) -> str:
    return str(model.meta.get("client_name", "unknown"))


def _usual(models: Sequence[FLModel]) -> ParamsType | None:
    return Counter(model.params_type for model in models).most_common(1)[0][0]


def _state(model: FLModel, kind: ParamsType) -> Any:
    """Layer -> array, or why it cannot be read; arrays that FLARE left on the disk are loaded."""
    if model.params_type != kind:
        return Unfit(f"sent {model.params_type}, where {kind} is expected")
    params = model.params
    if not isinstance(params, Mapping):
        return params
    return read_safely(lambda: {n: v.materialize() if hasattr(v, "materialize") else v for n, v in params.items()})


def _means(models: Sequence[FLModel]) -> dict[str, float]:
    """The mean of each metric that all of these clients sent."""
    metrics = [numbers(model.metrics) for model in models]
    shared = set.intersection(*map(set, metrics)) if metrics else set()
    return {name: float(np.mean([values[name] for values in metrics])) for name in sorted(shared)}


def _like(array: np.ndarray, value: Any) -> Any:
    """The array in the type of the global model's layer: a tensor of its library, or a numpy array."""
    return value.new_tensor(array) if hasattr(value, "new_tensor") else array.astype(np.asarray(value).dtype)
