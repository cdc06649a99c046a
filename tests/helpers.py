"""What several test files share."""

from __future__ import annotations

import shutil
import time
from importlib.metadata import version
from pathlib import Path

import mlflow
import onnx
import pytest
from mlflow import MlflowClient
from packaging.version import Version
from real_models import RealModel

from mlflow_trt.convert.onnx.model import OnnxModel, read_onnx
from mlflow_trt.core.types import ComputeCapability, Gpu
from mlflow_trt.runtime.onnxruntime_session import OnnxRuntimeSession


class Store:
    """A fresh MLflow store on SQLite, with its artifacts beside it."""

    def __init__(self, folder: Path, empty_database: Path) -> None:
        shutil.copyfile(empty_database, folder / "mlflow.db")
        self.uri = f"sqlite:///{folder / 'mlflow.db'}"
        mlflow.set_tracking_uri(self.uri)
        self.client = MlflowClient()
        self.experiment_id = mlflow.create_experiment("test", artifact_location=(folder / "artifacts").as_uri())
        mlflow.set_experiment(experiment_id=self.experiment_id)

    def logged_models(self):
        return self.client.search_logged_models([self.experiment_id])

    def is_untouched(self) -> bool:
        return not self.logged_models() and not self.client.search_registered_models()


def gpu(target: str) -> Gpu:
    """A GPU of this compute capability, which no machine has."""
    return Gpu(
        ordinal=0, name="a GPU", compute_capability=ComputeCapability.parse(target), memory=1 << 30, uuid="GPU-1"
    )


def needs_release(package: str, oldest: str) -> pytest.MarkDecorator:
    """For a test of what earlier releases lack, which `make test-lowest` installs."""
    return pytest.mark.skipif(Version(version(package)) < Version(oldest), reason=f"needs {package} {oldest}")


def wait_for(condition) -> None:
    """Wait until it holds, a minute at most."""
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def reference(source: OnnxModel) -> OnnxRuntimeSession:
    return OnnxRuntimeSession(source.path, source.inputs, source.outputs)


def read(model: RealModel | onnx.ModelProto, folder: Path) -> OnnxModel:
    return read_onnx(model.path() if isinstance(model, RealModel) else model, folder)
