"""What is registered, and what is left of it."""

from __future__ import annotations

import mlflow
import networks


def register(name, width=16, **more):
    mlflow.onnx.log_model(
        networks.product(width=width), name=name, registered_model_name=name, pip_requirements=["onnx"], **more
    )


def registry_state(client):
    """Everything that a conversion could leave behind in the registry and among the logged models."""
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    return (
        {
            (version.name, str(version.version), version.description, tuple(sorted(version.tags.items())))
            for version in client.search_model_versions()
        },
        {(model.name, tuple(sorted(model.aliases.items()))) for model in client.search_registered_models()},
        {model.model_id for model in client.search_logged_models(experiments)},
        {run.info.run_id for run in client.search_runs(experiments)},
    )


def failing(error):
    def fail(*arguments, **keywords):
        raise error

    return fail
