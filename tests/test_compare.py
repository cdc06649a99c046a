"""Two models side by side, where there is no GPU."""

from __future__ import annotations

import json

import mlflow
import networks
import numpy as np
import pytest
from command_line import run

import mlflow_trt
from mlflow_trt import InputShapeError
from mlflow_trt.measure.side_by_side import compare_models

NO_GPU = {"CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture
def models(store, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    mlflow.onnx.log_model(networks.product(), name="p", registered_model_name="p", pip_requirements=["onnx"])
    mlflow_trt.convert_model_version("models:/p/1", "p-trt", batch=(1, 4, 8))
    return store


def other():
    model = networks.product()
    weights = networks.onnx.numpy_helper.to_array(model.graph.initializer[0])
    model.graph.initializer[0].CopyFrom(networks.constant("w", (1.5 * weights).astype(np.float32)))
    return model


def test_a_model_and_what_was_made_of_it(models):
    data = {"x": networks.rows(5)}
    result = compare_models("models:/p/1", "models:/p-trt/1", batches=(1, 4), data=data, seconds=0.02)
    assert str(result.comparison.verdict) == "passed"
    assert result.comparison.inputs == "5 rows of the given data"
    assert {(row.model, row.batch) for row in result.benchmark.measurements} == {
        ("models:/p/1", 1), ("models:/p/1", 4), ("models:/p-trt/1", 1), ("models:/p-trt/1", 4),
    }  # fmt: skip
    assert "models:/p-trt/1 does not run on TensorRT here" in result.benchmark.problems[0]


def test_models_that_differ_fail(models, tmp_path):
    (tmp_path / "other.onnx").write_bytes(other().SerializeToString())
    result = compare_models("models:/p/1", str(tmp_path / "other.onnx"), batches=(1,), seconds=0.02)
    assert str(result.comparison.verdict) == "failed"
    assert result.comparison.outputs[0].relative_error == pytest.approx(0.5, rel=1e-3)
    assert result.comparison.inputs == "8 rows of generated noise"


def test_folders_of_either_kind(models, tmp_path):
    mlflow.onnx.save_model(networks.product(), tmp_path / "onnx", pip_requirements=["onnx"])
    mlflow_trt.save_model(networks.product(), tmp_path / "ours", batch=(1, 4, 8))
    result = compare_models(str(tmp_path / "onnx"), str(tmp_path / "ours"), batches=(1,), seconds=0.02)
    assert str(result.comparison.verdict) == "passed"


def test_models_with_other_outputs_cannot_be_compared(models, tmp_path):
    network = networks.product()
    network.graph.output[0].name = network.graph.node[0].output[0] = "z"
    (tmp_path / "other.onnx").write_bytes(network.SerializeToString())
    with pytest.raises(InputShapeError, match="cannot be compared: the outputs are z; expected y"):
        compare_models("models:/p/1", str(tmp_path / "other.onnx"), seconds=0.02)


def test_the_command(models, tmp_path):
    tracking = {"MLFLOW_TRACKING_URI": models.uri, "MLFLOW_EXPERIMENT_ID": models.experiment_id}
    np.savez(tmp_path / "inputs.npz", x=networks.rows(6))
    arguments = ["--data", tmp_path / "inputs.npz", "--seconds", "0.02", "--batch", "2"]
    code, output, errors = run(
        "compare", "models:/p/1", "models:/p-trt/1", *arguments, "--json", "--log", **tracking, **NO_GPU
    )
    assert code == 0, errors
    result = json.loads(output)
    assert result["comparison"]["verdict"] == "passed"
    metrics = mlflow.get_run(result["run_id"]).data.metrics
    assert metrics["accuracy/y/relative_error"] < 1e-6
    assert metrics["models_p-trt_1/onnx_runtime_cpu/predict/p50_ms"] > 0
    (tmp_path / "other.onnx").write_bytes(other().SerializeToString())
    code, output, _ = run("compare", "models:/p/1", tmp_path / "other.onnx", *arguments, **tracking, **NO_GPU)
    assert code == 1
    assert "failed; output 'y': relative error 0.5" in output
