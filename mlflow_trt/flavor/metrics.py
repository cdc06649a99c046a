"""Numbers about a logged model, as MLflow metrics."""

from __future__ import annotations

from collections.abc import Mapping

import mlflow
from mlflow import MlflowClient
from mlflow.entities import LoggedModelInput
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from mlflow_trt.core.log import get_logger
from mlflow_trt.flavor.fetch import read_record
from mlflow_trt.flavor.register import model_id_of
from mlflow_trt.flavor.tags import CONVERSION_TAG, PRECISION_TAG, VERIFICATION_OF_TAG
from mlflow_trt.flavor.undo import Undo
from mlflow_trt.pipeline.verify import metrics_of
from mlflow_trt.store.record import Record

_log = get_logger(__name__)


def log_metrics(undo: Undo, metrics: Mapping[str, float], model_id: str, *, step: int = 0) -> None:
    """Log metrics of a logged model to the active run; without one, to a short run of their own.

    MLflow keeps metrics with runs, and shows them with the logged model that they are about. The model is logged
    already, so that a failure is a warning. What went into an active run stays there: MLflow cannot delete a metric.
    """
    if not metrics:
        return
    run, client = mlflow.active_run(), MlflowClient()
    try:
        if run is not None:
            mlflow.log_metrics(dict(metrics), step=step, model_id=model_id)
            return
        own = _create_run(undo, client, model_id)
        try:
            mlflow.log_metrics(dict(metrics), step=step, run_id=own, model_id=model_id)
            client.log_inputs(own, models=[LoggedModelInput(model_id)])
        except Exception:
            client.set_terminated(own, status="FAILED")
            raise
        client.set_terminated(own)
    except MlflowException as error:
        _log.warning("The metrics of the model could not be logged: %s", error.message)


def metrics_from(record: Record) -> dict[str, float]:
    """What was logged, or should have been, when the model of this record was."""
    return {**metrics_of(record.comparisons), **(record.selection.metrics() if record.selection is not None else {})}


def complete_metrics(undo: Undo, client: MlflowClient, version: ModelVersion) -> None:
    """Log the metrics of a version whose logged model has none, because an earlier run of it was killed."""
    model_id = model_id_of(version)
    if model_id is not None and not client.get_logged_model(model_id).metrics:
        log_metrics(undo, metrics_from(read_record(f"models:/{version.name}/{version.version}")), model_id)


def _create_run(undo: Undo, client: MlflowClient, model_id: str) -> str:
    model = client.get_logged_model(model_id)
    experiment_id = model.experiment_id
    tags = {CONVERSION_TAG: undo.token, VERIFICATION_OF_TAG: model.name}
    name = ", ".join(filter(None, (f"verification of {model.name}", model.params.get(PRECISION_TAG))))
    return undo.make(
        "The run with the numbers of the verification",
        lambda: str(client.create_run(experiment_id, run_name=name, tags=tags).info.run_id),
        take_back=client.delete_run,
        look=lambda: [
            str(found.info.run_id)
            for found in client.search_runs([experiment_id], f"tags.`{CONVERSION_TAG}` = '{undo.token}'")
        ],
    )
