"""A model for Triton's Python backend: the MLflow model as the version's folder, run by this package's own runtime."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlflow_trt.core.settings import LoadSettings
from mlflow_trt.deploy.triton_config import Fields, Symbol, tensor_fields, to_text
from mlflow_trt.errors import UnsupportedModelError
from mlflow_trt.store.folder import ModelFolder
from mlflow_trt.store.record import Record

_SETTINGS = "load_settings"  # as triton_backend, which only Triton can import, reads it
_MODEL_FILE = "model.py"
_MODEL = '''\
"""Lets Triton's Python backend run the MLflow model in this folder; it needs mlflow-trt where Triton runs."""

from mlflow_trt.deploy.triton_backend import TritonPythonModel

__all__ = ["TritonPythonModel"]
'''
REMARKS: tuple[str, ...] = (
    "needs a Triton with the Python backend, of 24.10 or later",
    "needs mlflow-trt in its Python, with numpy below 2 before 24.12: `pip install --requirement 1/requirements.txt`",
)


def write_mlflow_model(folder: ModelFolder, target: Path) -> None:
    """The model, whole, and what Triton loads beside it."""
    shutil.copytree(folder.path, target, dirs_exist_ok=True)
    (target / _MODEL_FILE).write_text(_MODEL)


def python_config_text(record: Record, name: str, instances: int, settings: Mapping[str, Any]) -> str:
    """The config.pbtxt. Triton puts no requests together: the session does, in every size that the engine has.

    Raises OptionError for settings that make no sense, UnsupportedModelError for a type that Triton does not have.
    """
    runtime = LoadSettings.of(settings).runtime if settings else "tensorrt"
    kind = {"onnxruntime": "KIND_CPU", "auto": "KIND_AUTO"}.get(str(runtime), "KIND_GPU")
    for spec in (*record.inputs, *record.outputs):
        if spec.dtype == "bfloat16":
            raise UnsupportedModelError(
                f"{spec.name!r} is of dtype bfloat16, which Triton's Python backend does not hand over; cast it in the "
                "model"
            )
    fields: Fields = {
        "name": name,
        "backend": "python",
        "max_batch_size": 0,
        "input": [tensor_fields(spec, 0) for spec in record.inputs],
        "output": [tensor_fields(spec, 0) for spec in record.outputs],
        "instance_group": [{"count": instances, "kind": Symbol(kind)}],
        "parameters": [{"key": _SETTINGS, "value": {"string_value": json.dumps(dict(settings))}}] if settings else [],
    }
    return to_text(fields)
