"""What was logged with a source model besides the model goes along, or is named in a remark."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import mlflow
import networks
import numpy as np
import onnx
import pytest
from mlflow.models import ModelSignature, infer_signature
from mlflow.types import ParamSchema, ParamSpec

import mlflow_trt
from mlflow_trt.core.settings import LoadSettings
from mlflow_trt.flavor.fetch import read_record

CPU = {"runtime": "onnxruntime"}
OPTIONS = {"intra_op_num_threads": 3, "execution_mode": "sequential"}


def convert(source="models:/product/1", **keywords):
    version = mlflow_trt.convert_model_version(source, "product-trt", batch=(1, 4, 8), verify=False, **keywords)
    uri = f"models:/product-trt/{version.version}"
    return uri, Path(mlflow.artifacts.download_artifacts(uri)), mlflow.models.Model.load(uri)


def register(**keywords):
    keywords = {"pip_requirements": ["onnx", "onnxruntime"]} | keywords
    mlflow.onnx.log_model(networks.product(), name="product", registered_model_name="product", **keywords)


@pytest.fixture
def belongings(store, tmp_path, monkeypatch):
    """A registered model with all that `mlflow.onnx` lets be logged with one."""
    monkeypatch.setattr("sys.path", [*__import__("sys").path])
    (tmp_path / "belongs_here.py").write_text("ANSWER = 42\n")
    (tmp_path / "labels.txt").write_text("cat\ndog\n")
    register(
        code_paths=[str(tmp_path / "belongs_here.py")],
        extra_files=[str(tmp_path / "labels.txt")],
        pip_requirements=["onnx", "onnxruntime==1.22.0", "pillow>=10", "git+https://host/own.git"],
        onnx_session_options=OPTIONS,
        onnx_execution_providers=["CPUExecutionProvider"],
        params={"epochs": 7},
        model_type="classifier",
    )


def test_everything_goes_along(belongings, store):
    uri, folder, model = convert(model_config=CPU)
    assert (folder / "code" / "belongs_here.py").read_text() == "ANSWER = 42\n"
    assert (folder / "extra_files" / "labels.txt").read_text() == "cat\ndog\n"
    requirements = (folder / "requirements.txt").read_text().splitlines()
    assert "pillow>=10" in requirements
    assert not any(line.startswith("onnxruntime") for line in requirements)
    logged = mlflow.get_logged_model(model.model_id)
    assert logged.params["epochs"] == "7"
    assert logged.params["mlflow_trt.batch"] == "1:4:8"
    assert logged.model_type == "classifier"
    loaded = mlflow.pyfunc.load_model(uri).get_raw_model()
    assert loaded.inference_session.get_session_options().intra_op_num_threads == 3
    assert model.flavors["onnx"]["onnx_session_options"] == OPTIONS
    remarks = read_record(uri).remarks
    assert any("git+https://host/own.git" in remark for remark in remarks)


@pytest.mark.exhaustive
def test_what_the_user_says_comes_before_it(belongings):
    own = {**CPU, "onnx_session_options": {"intra_op_num_threads": 5}}
    uri, _, _ = convert(model_config=own)
    loaded = mlflow.pyfunc.load_model(uri).get_raw_model()
    assert loaded.inference_session.get_session_options().intra_op_num_threads == 5


def test_converting_again_finds_it(belongings):
    first, second = convert()[0], convert()[0]
    assert first == second == "models:/product-trt/1"


@pytest.mark.exhaustive
def test_a_model_of_our_own_hands_everything_on_as_well(belongings):
    convert(model_config=CPU)
    uri, folder, model = convert("models:/product-trt/1", tags={"again": "yes"})
    assert (folder / "code" / "belongs_here.py").exists()
    assert (folder / "extra_files" / "labels.txt").exists()
    assert "pillow>=10" in (folder / "requirements.txt").read_text()
    assert mlflow.get_logged_model(model.model_id).params["epochs"] == "7"
    assert uri == "models:/product-trt/2"


def test_without_any_there_are_none(store):
    register()
    uri, folder, model = convert()
    assert not (folder / "code").exists()
    assert not (folder / "extra_files").exists()
    assert model.flavors["python_function"]["config"] == LoadSettings().to_dict()
    assert not any("carried over" in remark for remark in read_record(uri).remarks)


def test_options_of_onnx_runtime_that_nobody_knows_are_named(store):
    register(onnx_session_options={"enable_profiling": False})
    uri, _, _ = convert()
    assert any("onnx_session_options are not carried over" in remark for remark in read_record(uri).remarks)


def test_to_a_folder_as_well(belongings, tmp_path):
    from mlflow_trt.pipeline.options import ConversionOptions
    from mlflow_trt.registry.convert_version import convert_to_folder

    convert_to_folder("models:/product/1", tmp_path / "model", ConversionOptions(verify=False))
    assert (tmp_path / "model" / "code" / "belongs_here.py").exists()
    assert (tmp_path / "model" / "extra_files" / "labels.txt").exists()


@pytest.mark.exhaustive
def test_params_of_a_signature_are_left_out_and_calls_work(store):
    x = networks.rows(2)
    signature = infer_signature(x, networks.rows(2, 8))
    params = ParamSchema([ParamSpec("temperature", "float", 0.5)])
    register(signature=ModelSignature(inputs=signature.inputs, outputs=signature.outputs, params=params))
    uri, _, model = convert(model_config=CPU)
    assert model.signature.params is None
    assert any("temperature" in remark for remark in read_record(uri).remarks)
    loaded = mlflow.pyfunc.load_model(uri)
    (stored,) = networks.product().graph.initializer
    weights = onnx.numpy_helper.to_array(stored)
    assert np.allclose(loaded.predict(x)["y"], x @ weights, atol=1e-5)
    assert np.allclose(loaded.predict(x, params={"temperature": 2.0})["y"], x @ weights, atol=1e-5)


@pytest.mark.parametrize("in_a_run", [True, False])
def test_metrics_are_logged_at_the_step(in_a_run, store):
    with mlflow.start_run() if in_a_run else nullcontext():
        info = mlflow_trt.log_model(networks.product(), name="product", precision="fp16", batch=(1, 4, 8), step=7)
    metrics = mlflow.get_logged_model(info.model_id).metrics
    assert metrics
    assert {metric.step for metric in metrics} == {7}
