"""mlflow-trt: an MLflow flavor for TensorRT.

    import mlflow, mlflow_trt

    info = mlflow_trt.log_model("model.onnx", name="model-trt", batch=(1, 8, 64), registered_model_name="model-trt")
    model = mlflow.pyfunc.load_model("models:/model-trt/1")

Importing this package loads neither MLflow nor TensorRT, CUDA or ONNX Runtime: each is imported by what needs it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from mlflow_trt._version import __version__

if TYPE_CHECKING:
    from mlflow_trt.backends.onnxruntime import ONNX_EXECUTION_PROVIDERS
    from mlflow_trt.convert.recipe import Recipe
    from mlflow_trt.core.accuracy import Tolerance
    from mlflow_trt.core.settings import LoadSettings
    from mlflow_trt.core.types import Precision
    from mlflow_trt.errors import (
        AccuracyError,
        ArtifactError,
        BuildError,
        EngineMismatchError,
        ExecutionError,
        FormatError,
        InputDtypeError,
        InputError,
        InputShapeError,
        InputTooLargeError,
        IntegrityError,
        MissingDependencyError,
        MlflowTrtError,
        NotPicklableError,
        OnnxModelError,
        OptionError,
        OutOfMemoryError,
        RecipeError,
        RuntimeUnavailableError,
        SelfTestError,
        ServerError,
        ServerTimeoutError,
        ServerUnavailableError,
        SessionClosedError,
        SignatureError,
        UnsupportedModelError,
    )
    from mlflow_trt.flavor.api import load_model, log_model, save_model
    from mlflow_trt.flavor.environment import get_default_conda_env, get_default_pip_requirements
    from mlflow_trt.flavor.import_engine import log_engine, save_engine
    from mlflow_trt.measure.benchmark import benchmark
    from mlflow_trt.measure.side_by_side import compare_models
    from mlflow_trt.measure.verify_logged import verify_model
    from mlflow_trt.registry.add_engine import add_engine
    from mlflow_trt.registry.convert_version import convert_model_version
    from mlflow_trt.runtime.session import Session
    from mlflow_trt.store.record import FLAVOR_NAME

__all__ = [
    "FLAVOR_NAME",
    "ONNX_EXECUTION_PROVIDERS",
    "AccuracyError",
    "ArtifactError",
    "BuildError",
    "EngineMismatchError",
    "ExecutionError",
    "FormatError",
    "InputDtypeError",
    "InputError",
    "InputShapeError",
    "InputTooLargeError",
    "IntegrityError",
    "LoadSettings",
    "MissingDependencyError",
    "MlflowTrtError",
    "NotPicklableError",
    "OnnxModelError",
    "OptionError",
    "OutOfMemoryError",
    "Precision",
    "Recipe",
    "RecipeError",
    "RuntimeUnavailableError",
    "SelfTestError",
    "ServerError",
    "ServerTimeoutError",
    "ServerUnavailableError",
    "Session",
    "SessionClosedError",
    "SignatureError",
    "Tolerance",
    "UnsupportedModelError",
    "__version__",
    "add_engine",
    "benchmark",
    "compare_models",
    "convert_model_version",
    "get_default_conda_env",
    "get_default_pip_requirements",
    "load_model",
    "log_engine",
    "log_model",
    "save_engine",
    "save_model",
    "verify_model",
]

# Where a name comes from, unless it is an error.
_MODULES = {
    "FLAVOR_NAME": "store.record",
    "LoadSettings": "core.settings",
    "ONNX_EXECUTION_PROVIDERS": "backends.onnxruntime",
    "Precision": "core.types",
    "Recipe": "convert.recipe",
    "Session": "runtime.session",
    "Tolerance": "core.accuracy",
    "add_engine": "registry.add_engine",
    "benchmark": "measure.benchmark",
    "compare_models": "measure.side_by_side",
    "convert_model_version": "registry.convert_version",
    "get_default_conda_env": "flavor.environment",
    "get_default_pip_requirements": "flavor.environment",
    "load_model": "flavor.api",
    "log_engine": "flavor.import_engine",
    "log_model": "flavor.api",
    "save_engine": "flavor.import_engine",
    "save_model": "flavor.api",
    "verify_model": "measure.verify_logged",
}


def __getattr__(name: str) -> Any:
    if name == "_load_pyfunc":  # not for people: MLflow looks for it in the model's loader_module
        return importlib.import_module(f"{__name__}.flavor.pyfunc").load_pyfunc
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f"{__name__}.{_MODULES.get(name, 'errors')}")
    value = getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
