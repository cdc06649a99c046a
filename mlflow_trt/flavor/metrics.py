"""Numbers about a logged model, as MLflow metrics."""

from __future__ import annotations

from collections.abc import Mapping

import mlflow
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.models.model import ModelInfo

from mlflow_trt.core.log import get_logger

_log = get_logger(__name__)


def log_metrics(metrics: Mapping[str, float], info: ModelInfo) -> None:
    """Log metrics of a logged model to the active run; without one, to a short run of their own.

    MLflow keeps metrics with runs, and shows them with the logged model that they are about. The model is logged
    already, so that a failure is a warning.
    """
    if not metrics:
        return
    run = mlflow.active_run()
    try:
        if run is not None:
            mlflow.log_metrics(dict(metrics), model_id=info.model_id)
            return
        client = MlflowClient()
        experiment_id = client.get_logged_model(info.model_id).experiment_id
        own = client.create_run(experiment_id, run_name="verification")
        try:
            mlflow.log_metrics(dict(metrics), run_id=own.info.run_id, model_id=info.model_id)
        except BaseException:
            client.set_terminated(own.info.run_id, status="FAILED")
            raise
        client.set_terminated(own.info.run_id)
    except MlflowException as error:
        _log.warning("The metrics of the model could not be logged: %s", error.message)
