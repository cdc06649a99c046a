"""Convert a source model, and put the result into a folder or into MLflow: whole, or not at all."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from mlflow import MlflowClient
from mlflow.models import Model
from mlflow.models.model import ModelInfo
from mlflow.tracking._model_registry import DEFAULT_AWAIT_MAX_SLEEP_SECONDS

from mlflow_trt.convert.onnx.model import OnnxModel
from mlflow_trt.core.output_folder import check_target
from mlflow_trt.core.settings import LoadSettings
from mlflow_trt.errors import MlflowTrtError
from mlflow_trt.flavor.metrics import log_metrics
from mlflow_trt.flavor.mlmodel import PackagingOptions, check_names, move_model, searchable_facts, write_model
from mlflow_trt.flavor.undo import Undo, undo_logging
from mlflow_trt.pipeline.make import PreparedConversion, convert_and_verify
from mlflow_trt.pipeline.verify import metrics_of
from mlflow_trt.runtime.cuda.device import open_device
from mlflow_trt.store.record import FLAVOR_NAME


@dataclass(frozen=True, kw_only=True)
class LoggingOptions:
    """What the user decides about the logged model and its registration; the keywords of `log_model` explain each.

    Checked when made, which is before anything is built. Raises what MLflow raises.
    """

    name: str | None = None
    registered_model_name: str | None = None
    await_registration_for: int | None = DEFAULT_AWAIT_MAX_SLEEP_SECONDS
    params: Mapping[str, Any] = field(default_factory=dict)
    tags: Mapping[str, Any] = field(default_factory=dict)
    model_type: str | None = None
    step: int = 0
    model_id: str | None = None
    validate_serving_input: bool | None = None

    def __post_init__(self) -> None:
        check_names(self.registered_model_name, self.tags)


def save_conversion(
    source: OnnxModel,
    path: Path,
    prepared: PreparedConversion,
    packaging: PackagingOptions,
    mlflow_model: Model | None = None,
) -> None:
    """Convert a model and write the result to a new folder. Raises what `save_model` raises."""
    check_target(path)
    with convert_and_verify(source, prepared, packaging.network_example) as made:
        write_model(made, path, packaging, mlflow_model)


def log_conversion(
    source: OnnxModel,
    prepared: PreparedConversion,
    packaging: PackagingOptions,
    logging: LoggingOptions,
    undo: Undo,
) -> ModelInfo:
    """Convert a model, log the result and register it where it has a name. Raises what `log_model` raises.

    The steps that take all of it back are added to `undo`, which whoever called runs.
    """
    validates = logging.validate_serving_input
    if validates is None:
        validates = packaging.input_example is not None and _can_run_here(prepared.options.settings)
    with (
        convert_and_verify(source, prepared, packaging.network_example) as made,
        tempfile.TemporaryDirectory(prefix="mlflow-trt-") as staging,
    ):
        note_logged = undo_logging(undo, logging.registered_model_name, keep_model=logging.model_id is not None)
        # Written before MLflow hears of it: what cannot be written leaves no half of a logged model.
        folder = Path(staging) / "model"
        written = write_model(made, folder, packaging)

        def save(path: str, mlflow_model: Model, validate_serving_input: bool) -> None:
            del validate_serving_input  # Model.log reads it, and passes on all its keywords
            note_logged(str(mlflow_model.model_id))
            move_model(written, folder, Path(path), mlflow_model)

        facts = searchable_facts(made)
        tags = {**facts, **logging.tags}
        info: ModelInfo = Model.log(
            artifact_path=None,
            name=logging.name,
            flavor=SimpleNamespace(__name__=FLAVOR_NAME, save_model=save),
            registered_model_name=logging.registered_model_name,
            await_registration_for=logging.await_registration_for,
            params={**facts, **logging.params},
            tags=tags,
            model_type=logging.model_type,
            step=logging.step,
            model_id=logging.model_id,
            validate_serving_input=validates,
        )
        if logging.registered_model_name is not None:
            _tag_version(logging.registered_model_name, str(info.registered_model_version), tags)
        metrics = {} if made.verification is None else metrics_of(made.verification.comparisons)
        log_metrics({**metrics, **(made.selection.metrics() if made.selection is not None else {})}, info)
        return info


def _tag_version(name: str, version: str, tags: Mapping[str, Any]) -> None:
    """Give a model version the tags of its logged model, as recent releases of MLflow do by themselves."""
    client = MlflowClient()
    present = client.get_model_version(name, version).tags
    for key, value in tags.items():
        if key not in present:
            client.set_model_version_tag(name, version, key, str(value))


def _can_run_here(settings: LoadSettings) -> bool:
    if settings.runtime != "tensorrt":
        return True
    try:
        open_device(settings.first_device)
    except MlflowTrtError:
        return False
    return True
