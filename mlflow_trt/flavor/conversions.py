"""Convert a source model, and put the result into a folder or into MLflow: whole, or not at all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.models import Model
from mlflow.models.model import ModelInfo
from mlflow.tracking._model_registry import DEFAULT_AWAIT_MAX_SLEEP_SECONDS

from mlflow_trt.convert.onnx.model import OnnxModel
from mlflow_trt.core.output_folder import check_target
from mlflow_trt.core.scratch import scratch_folder
from mlflow_trt.core.settings import LoadSettings
from mlflow_trt.errors import MlflowTrtError, OptionError
from mlflow_trt.flavor.describe import describe_version
from mlflow_trt.flavor.metrics import log_metrics
from mlflow_trt.flavor.mlmodel import PackagingOptions, check_names, write_model
from mlflow_trt.flavor.recognize import params_from, tags_from
from mlflow_trt.flavor.register import log_folder, register_version
from mlflow_trt.flavor.undo import Undo
from mlflow_trt.pipeline.make import PreparedConversion, convert_and_verify
from mlflow_trt.pipeline.verify import metrics_of
from mlflow_trt.runtime.cuda.device import open_device
from mlflow_trt.store.record import RECORD_FILE, read_record_file


@dataclass(frozen=True, kw_only=True)
class LoggingOptions:
    """What the user decides about the logged model and its registration; the keywords of `log_model` explain each.

    Checked when made, which is before anything is built. Raises what MLflow raises.
    """

    name: str | None = None
    registered_model_name: str | None = None
    description: str | None = None
    await_registration_for: int | None = DEFAULT_AWAIT_MAX_SLEEP_SECONDS
    params: Mapping[str, Any] = field(default_factory=dict)
    tags: Mapping[str, Any] = field(default_factory=dict)
    model_type: str | None = None
    step: int = 0
    model_id: str | None = None
    validate_serving_input: bool | None = None

    def __post_init__(self) -> None:
        for option in ("params", "tags"):
            given = getattr(self, option)
            if not isinstance(given, Mapping):
                raise OptionError(f"{option} is {given!r}; expected a dict", option=option)
        check_names(self.registered_model_name, self.tags, logged_model_name=self.name)


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
    if logging.model_id is not None:
        MlflowClient().get_logged_model(logging.model_id)  # which says whether there is one
    validates = logging.validate_serving_input
    if validates is None:
        validates = packaging.input_example is not None and _can_run_here(prepared.options.settings)
    with (
        convert_and_verify(source, prepared, packaging.network_example) as made,
        scratch_folder() as staging,
    ):
        # Written before MLflow hears of it: what cannot be written leaves no half of a logged model.
        folder = staging / "model"
        written = write_model(made, folder, packaging)
        record, _ = read_record_file(folder / RECORD_FILE)
        description = describe_version(record, logging.description)
        tags = {**tags_from(record), **logging.tags}
        info = log_folder(
            undo,
            folder,
            written,
            name=logging.name,
            params={**params_from(record), **logging.params},
            tags=tags,
            description=description,
            model_id=logging.model_id,
            model_type=logging.model_type,
            step=logging.step,
            validates=validates,
        )
        metrics = {} if made.verification is None else metrics_of(made.verification.comparisons)
        selected = {} if made.selection is None else made.selection.metrics()
        log_metrics(undo, {**metrics, **selected}, str(info.model_id), step=logging.step)
        # Last, so that a version that can be seen is complete.
        if logging.registered_model_name is not None:
            version = register_version(
                undo,
                logging.registered_model_name,
                str(info.model_id),
                tags=tags,
                description=description,
                await_registration_for=logging.await_registration_for,
            )
            info.registered_model_version = version.version
        return info


def _can_run_here(settings: LoadSettings) -> bool:
    if settings.runtime != "tensorrt":
        return True
    try:
        open_device(settings.first_device)
    except MlflowTrtError:
        return False
    return True
