"""The public names, and what importing them costs."""

from __future__ import annotations

import re
import subprocess
import sys

import networks
import pytest
from repository import ROOT

import mlflow_trt
from mlflow_trt import OptionError, errors

NAMES = {
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
}


def test_the_public_names():
    assert set(mlflow_trt.__all__) == NAMES
    assert all(getattr(mlflow_trt, name) is not None for name in NAMES)
    assert set(dir(mlflow_trt)) == NAMES
    with pytest.raises(AttributeError, match="has no attribute 'tensorrt'"):
        mlflow_trt.tensorrt  # noqa: B018  # the access is the test


def test_every_public_name_is_on_one_page():
    page = (ROOT / "docs" / "api.md").read_text()
    assert "\n::: mlflow_trt.errors\n" in page  # all of them
    others = NAMES - {name for name in vars(errors) if name.endswith("Error")}
    assert [name for name in others if not re.search(rf"(`|^::: )mlflow_trt\.{name}\b", page, re.MULTILINE)] == []


def test_mlflow_finds_its_loader_which_is_no_public_name():
    assert callable(mlflow_trt._load_pyfunc)
    assert "_load_pyfunc" not in dir(mlflow_trt)


def test_every_error_is_public():
    assert {name for name in vars(errors) if name.endswith("Error")} <= NAMES


@pytest.mark.slow
def test_a_folder_may_be_given_as_a_path(product_folder, tmp_path):
    """Wherever a URI may, as `mlflow.onnx.load_model` takes it, since `save_model` does."""
    data = {"x": networks.rows(4)}
    with mlflow_trt.load_model(product_folder, tmp_path, runtime="onnxruntime") as session:
        assert len(session.run(data)["y"]) == 4
    assert mlflow_trt.verify_model(product_folder, data).verdict
    assert mlflow_trt.benchmark(product_folder, [1], seconds=0.01).measurements
    assert mlflow_trt.compare_models(product_folder, product_folder, batches=[1], seconds=0.01, data=data).comparison
    with pytest.raises(OptionError, match="is no registered version"):
        mlflow_trt.add_engine(product_folder)


@pytest.mark.parametrize(
    ("statement", "banned"),
    [
        ("import mlflow_trt", {"mlflow", "onnx", "numpy", "pandas"}),
        # The process that builds engines starts with every build.
        ("import mlflow_trt.convert.engine.worker", {"mlflow", "onnx", "numpy", "pandas", "pydantic"}),
        ("import mlflow_trt.client", {"mlflow", "onnx", "pandas", "pyarrow", "pydantic"}),
        ("import mlflow_trt.flavor.api, mlflow_trt.flavor.pyfunc, mlflow_trt.registry.convert_version", set()),
    ],
)
def test_importing_loads_neither_tensorrt_nor_cuda_nor_onnxruntime_nor_the_cli(statement, banned):
    banned = banned | {"tensorrt", "tensorrt_rtx", "pycuda", "cuda", "onnxruntime", "mlflow_trt.cli"}
    program = f"{statement}; import sys; print(sorted({banned!r} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
